"""Finds shared libraries as the dynamic loader of Linux would, without loading any.

Order of the search: ld.so(8). Libraries that only lie in a Python package's folder are found by a
program that opens them there first, as importing the package does; the loader does not look there.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from optimizer.elf import Dynamic, read_dynamic, read_loader_cache
from optimizer.environment.facts import Library, Needed
from optimizer.environment.probe import Probe
from optimizer.errors import UnsupportedError

#: Folders of Python packages that hold nothing but shared libraries, below a folder of packages.
_PACKAGE_FOLDERS = ("nvidia/*/lib", "tensorrt_libs", "tensorrt_rtx_libs", "tensorrt", "torch/lib")
_DEFAULT_FOLDERS = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")
_NAME = re.compile(r"(?P<stem>.+?\.so)(?:\.(?P<version>[\d.]+))?$")


class Libraries:
    """The shared libraries of one machine."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe

    def describe(self, path: Path) -> Library:
        """What a library asks for, and who would find that."""
        try:
            dynamic = read_dynamic(path)
        except UnsupportedError as error:
            return Library(path, error=str(error))
        return Library(path, tuple(self._find(name, dynamic, path) for name in dynamic.needed))

    def in_packages(self, stem: str) -> tuple[Path, ...]:
        """Files of a library in the folders of Python packages, whatever their version."""
        return tuple(path for path in self._packaged if _stem(path.name) == stem)

    def known_to_loader(self, stem: str) -> tuple[Path, ...]:
        """Files of a library that the loader finds by itself, whatever their version."""
        cached = (self._probe.below(path) for name, path in self._cache if _stem(name) == stem)
        listed = (path for path in self._listed if _stem(path.name) == stem)
        return tuple(dict.fromkeys(path for path in (*cached, *listed) if path.is_file()))

    def _find(self, name: str, wanted: Dynamic, user: Path) -> Needed:
        for path in self._where_the_loader_looks(name, wanted, user):
            if _fits(path, wanted):
                return Needed(name, "loader", path)
        packaged = [path for path in self._packaged if path.name == name and _fits(path, wanted)]
        if packaged:
            return Needed(name, "python", packaged[0])
        stem = _stem(name)
        others = (*self.in_packages(stem), *self.known_to_loader(stem))
        return Needed(name, "nobody", None, tuple(p for p in others if _version(p.name)))

    def _where_the_loader_looks(self, name: str, wanted: Dynamic, user: Path) -> Iterator[Path]:
        origin = user.resolve().parent
        for folder in () if wanted.runpath else wanted.rpath:
            yield self._expanded(folder, origin) / name
        yield from (folder / name for folder in self._environment_folders)
        for folder in wanted.runpath:
            yield self._expanded(folder, origin) / name
        yield from (self._probe.below(path) for known, path in self._cache if known == name)
        yield from (self._probe.below(folder) / name for folder in self._default_folders)

    def _expanded(self, folder: str, origin: Path) -> Path:
        text = folder.replace("${ORIGIN}", "$ORIGIN")
        if text.startswith("$ORIGIN"):
            return Path(str(origin) + text.removeprefix("$ORIGIN"))
        return self._probe.below(text)

    @cached_property
    def _cache(self) -> list[tuple[str, str]]:
        return read_loader_cache(self._probe.below("/etc/ld.so.cache"))

    @cached_property
    def _environment_folders(self) -> tuple[Path, ...]:
        text = self._probe.environment.get("LD_LIBRARY_PATH", "")
        return tuple(self._probe.below(item) for item in re.split("[:;]", text) if item)

    @cached_property
    def _default_folders(self) -> tuple[str, ...]:
        # Debian's multiarch folders; elsewhere they do not exist.
        multiarch = f"{platform.machine()}-linux-gnu"
        return (f"/lib/{multiarch}", f"/usr/lib/{multiarch}", *_DEFAULT_FOLDERS)

    @cached_property
    def _listed(self) -> tuple[Path, ...]:
        """All libraries in the folders that are searched by name and not through the cache."""
        default = (self._probe.below(folder) for folder in self._default_folders)
        return tuple(_files((*self._environment_folders, *default)))

    @cached_property
    def _packaged(self) -> tuple[Path, ...]:
        folders = (
            found
            for entry in dict.fromkeys(self._probe.search_path)
            for pattern in _PACKAGE_FOLDERS
            for found in sorted(entry.glob(pattern))
        )
        return tuple(_files(folders))


def _files(folders: Iterator[Path] | tuple[Path, ...]) -> Iterator[Path]:
    for folder in folders:
        try:
            yield from sorted(item for item in folder.iterdir() if ".so" in item.name)
        except OSError:  # not there, or not readable: the loader passes over it too
            continue


def _fits(path: Path, wanted: Dynamic) -> bool:
    """Whether a file is a library for the same processor: the loader passes over others."""
    if not path.is_file():
        return False
    try:
        found = read_dynamic(path)
    except UnsupportedError:
        return False
    return (found.machine, found.bits) == (wanted.machine, wanted.bits)


def _stem(name: str) -> str:
    found = _NAME.match(name)
    return found["stem"] if found else name


def _version(name: str) -> str:
    found = _NAME.match(name)
    return (found["version"] or "") if found else ""


def version_in_name(path: Path) -> str:
    """The version that the name of a library ends in, following links to the real file."""
    return _version(path.resolve().name) or _version(path.name)
