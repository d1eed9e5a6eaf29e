"""Known bad combinations of Python distributions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from optimizer.diagnosis.findings import Found
from optimizer.environment import Facts
from optimizer.environment.versions import Requirement, satisfies

#: Distributions whose versions matter to each other here.
_STACK = frozenset(
    (
        *("numpy", "ml-dtypes", "protobuf", "onnx", "onnx-ir", "onnxscript", "onnx-graphsurgeon"),
        *("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch", "transformers"),
        "optimize-onnx",
    )
)
#: Extras with a rule of their own, or of no interest to who only uses this program.
_SPECIAL = ("cpu", "gpu", "test")


def core_import_fails(facts: Facts) -> Iterator[Found]:
    """A library that is always needed cannot be imported."""
    if facts.core.facts is None:
        yield Found(
            f"numpy, ml_dtypes, pydantic, onnx and onnx_ir cannot be imported: {facts.core.error}",
            "repair what the message names: pip install --force-reinstall optimize-onnx",
        )


def own_requirements(facts: Facts) -> Iterator[Found]:
    """A library that is always needed has the wrong version."""
    yield from _out_of_range(facts, [r for r in facts.requirements if r.extra is None])


def onnxruntime_version(facts: Facts) -> Iterator[Found]:
    """ONNX Runtime in a version that the targets' forms were not made for."""
    wheel, version = facts.onnxruntime.wheel, facts.onnxruntime.version
    wanted = next((r for r in facts.requirements if r.name == wheel and r.extra != "test"), None)
    if wanted is not None and version and not satisfies(version, wanted.range):
        yield _wrong_version(wanted, version)


def other_extras(facts: Facts) -> Iterator[Found]:
    """A library of an extra in a version that was not tried."""
    wanted = [r for r in facts.requirements if r.extra and r.extra not in _SPECIAL]
    yield from _out_of_range(facts, wanted)


def _out_of_range(facts: Facts, wanted: Iterable[Requirement]) -> Iterator[Found]:
    for requirement in wanted:
        version = facts.version_of(requirement.name)
        if version is not None and not satisfies(version, requirement.range):
            yield _wrong_version(requirement, version)


def _wrong_version(wanted: Requirement, version: str) -> Found:
    return Found(
        f"{wanted.name} is {version}, optimize-onnx takes {wanted.range}",
        f'pip install "{wanted.name}{wanted.range}"',
    )


def conflicts(facts: Facts) -> Iterator[Found]:
    """An installed distribution wants another version of one that matters here."""
    for item in facts.distributions.values():
        for requirement in item.requires:
            version = facts.version_of(requirement.name)
            if requirement.name not in _STACK or item.name == "optimize-onnx" or version is None:
                continue
            if not satisfies(version, requirement.range):
                yield Found(
                    f"{item.name} {item.version} wants {requirement.name}{requirement.range}, "
                    f"installed is {version}",
                    f"update {item.name}, or give it an environment of its own",
                )


def onnxruntime_twice(facts: Facts) -> Iterator[Found]:
    """Several wheels that write into the same folder."""
    names = facts.onnxruntime.distributions
    if len(names) > 1:
        yield Found(
            f"{' and '.join(names)} are both installed and overwrite each other's files; those of "
            f"{facts.onnxruntime.wheel} {facts.onnxruntime.version} are in place",
            f"pip uninstall -y {' '.join(names)}, then install the one you want",
        )


def onnxruntime_broken(facts: Facts) -> Iterator[Found]:
    """ONNX Runtime is there and cannot be imported."""
    ort = facts.onnxruntime
    if ort.distributions and (ort.folder is None or not ort.complete):
        yield Found(
            f"{ort.distributions[0]} is installed by name, but files of it are gone: another wheel "
            "of ONNX Runtime, which had the same ones, was uninstalled after it",
            f"pip install --force-reinstall {ort.distributions[0]}",
        )
    elif ort.loaded is not None and ort.loaded.facts is None:
        name = ort.wheel or "onnxruntime"
        yield Found(
            f"onnxruntime in {ort.folder} cannot be imported: {ort.loaded.error}",
            f"pip install --force-reinstall {name}; rename a folder called onnxruntime of your own",
        )


def installed_twice(facts: Facts) -> Iterator[Found]:
    """Two versions of one distribution on the search path."""
    for other in facts.doubles:
        used = facts.distributions[other.name]
        if other.name in _STACK and other.folder != used.folder:
            yield Found(
                f"{other.name} is installed twice: {used.version} in {used.folder.parent} is used, "
                f"{other.version} lies in {other.folder.parent}",
                "uninstall one of them, or leave user packages out with PYTHONNOUSERSITE=1",
            )


def foreign_packages(facts: Facts) -> Iterator[Found]:
    """Another package under one of our names that Python would take instead."""
    for item in facts.foreign:
        if item.first:
            owner = f" (of {item.owner})" if item.owner else ""
            yield Found(
                f"{item.path}{owner} is called '{item.name}' as a package of ours, and may be "
                "imported instead of it",
                f"pip uninstall {item.owner}, then reinstall optimize-onnx"
                if item.owner
                else "rename it, or run from another folder",
            )


def optimizer_of_onnxruntime(facts: Facts) -> Iterator[Found]:
    """ONNX Runtime offers its own ``optimizer`` where ours is not installed."""
    folder = facts.onnxruntime.folder
    if folder is None or facts.installed:
        return
    if (folder / "transformers" / "optimizer.py").is_file():
        yield Found(
            "optimize-onnx runs from a checkout: after onnxruntime.quantization, a program that "
            "imports 'optimizer' elsewhere gets a module of ONNX Runtime's",
            "pip install the checkout",
        )
