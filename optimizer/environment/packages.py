"""Installed Python distributions, read from the files they leave; nothing is imported."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from optimizer.environment.facts import Distribution, Foreign
from optimizer.environment.probe import Probe
from optimizer.environment.versions import Requirement, normalize, parse_requirement

#: This program, and the packages it consists of.
OURS = "optimize-onnx"
_PACKAGES = ("optimizer", "passes")
_ENDINGS = (".dist-info", ".egg-info")


def distributions(probe: Probe) -> Iterator[Distribution]:
    """All that can be seen, in the order of the search path."""
    for folder in dict.fromkeys(probe.search_path):
        try:
            entries = sorted(item for item in folder.iterdir() if item.name.endswith(_ENDINGS))
        except OSError:  # a zip file, or a folder that is gone
            continue
        for entry in entries:
            lines = list(_header(entry))
            fields = dict(line.partition(": ")[::2] for line in lines)
            name, version = fields.get("Name"), fields.get("Version")
            if name is None or version is None:
                continue  # what an interrupted installation left
            needs = [r for r in _requirements(lines) if r.extra is None and not r.condition]
            yield Distribution(normalize(name), version, entry, tuple(needs))


def _header(entry: Path) -> Iterator[str]:
    """Lines of the metadata before the description, which may be long."""
    names = (entry / "METADATA", entry / "PKG-INFO", entry)
    path = next((item for item in names if item.is_file()), None)
    if path is None:
        return
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    return
                yield line.rstrip()
    except OSError:
        return


def _requirements(header: Iterable[str]) -> Iterator[Requirement]:
    for line in header:
        key, _, text = line.partition(": ")
        if key == "Requires-Dist" and (parsed := parse_requirement(text)) is not None:
            yield parsed


def first_of_each(
    found: Iterator[Distribution],
) -> tuple[dict[str, Distribution], tuple[Distribution, ...]]:
    """Those that Python uses by name, and the others of the same name."""
    used: dict[str, Distribution] = {}
    others = tuple(item for item in found if used.setdefault(item.name, item) is not item)
    return used, others


def own_requirements(
    probe: Probe, installed: dict[str, Distribution]
) -> tuple[tuple[Requirement, ...], bool]:
    """What this program needs, and whether it is installed.

    A checkout says so in the ``pyproject.toml`` beside its packages, an installed distribution in
    its metadata.
    """
    ours = installed.get(OURS)
    checkout = _from_checkout(probe.own / "pyproject.toml")
    if checkout is not None:
        return checkout, ours is not None
    if ours is None:
        return (), False
    return tuple(_requirements(_header(ours.folder))), True


def _from_checkout(path: Path) -> tuple[Requirement, ...] | None:
    try:
        project = tomllib.loads(path.read_text("utf-8"))["project"]
        if project["name"] != OURS:
            return None
        groups = project.get("optional-dependencies", {})
        lines = [(line, None) for line in project.get("dependencies", ())]
        lines += [(line, extra) for extra, group in groups.items() for line in group]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    parsed = [(parse_requirement(line), extra) for line, extra in lines]
    return tuple(Requirement(r.name, r.range, extra, r.condition) for r, extra in parsed if r)


def foreign_packages(probe: Probe, installed: dict[str, Distribution]) -> tuple[Foreign, ...]:
    """Whatever else Python may import under the names of our packages."""
    found: dict[Path, Foreign] = {}
    # Ours is not on the search path where an editable installation redirects to it: then it wins.
    first = any(_same(folder, probe.own) for folder in probe.search_path)
    for folder in probe.search_path:
        if _same(folder, probe.own):
            first = False
        else:
            _look_in(folder, found, first=first)
    if not _same(probe.working, probe.own):  # where ``python -m`` looks first
        _look_in(probe.working, found, first=True)
    for item in installed.values():
        record = "" if item.name == OURS else _record(item)
        for name in _PACKAGES:
            if _lists(record, f"{name}/__init__.py"):
                site = item.folder.parent
                path = site / name / "__init__.py"
                # In our own folder it has replaced files of ours, or ours have replaced its.
                first = found[path].first if path in found else _same(site, probe.own)
                found[path] = Foreign(name, path, first=first, owner=item.name)
    return tuple(found.values())


def _look_in(folder: Path, found: dict[Path, Foreign], *, first: bool) -> None:
    for name in _PACKAGES:
        for path in (folder / name / "__init__.py", folder / f"{name}.py"):
            if path.is_file():
                found.setdefault(path, Foreign(name, path, first=first))


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _record(distribution: Distribution) -> str:
    """The list of files that a distribution installed; empty where it keeps none."""
    try:
        return (distribution.folder / "RECORD").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _lists(record: str, file: str) -> bool:
    return record.startswith(f"{file},") or f"\n{file}," in record


def owners(installed: dict[str, Distribution], package: str) -> tuple[Distribution, ...]:
    """The distributions that put files into a package's folder, such as ``onnxruntime``."""
    start = f"{package}/__init__.py"
    return tuple(item for item in installed.values() if _lists(_record(item), start))
