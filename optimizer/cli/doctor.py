"""The command ``doctor``: what is installed here, which targets work, and what does not fit.

It imports nothing but click and what comes with Python, so that it also answers where a library is
missing or broken.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from optimizer.diagnosis import Availability, Diagnosis, Finding
    from optimizer.environment import Facts
    from optimizer.environment.facts import Library

_WIDTH = 110
_INDENT = " " * 10
_LIBRARIES = (
    *("numpy", "ml-dtypes", "protobuf", "onnx", "onnx-ir", "onnxscript", "onnx-graphsurgeon"),
    *("torch", "transformers"),
)


@click.command("doctor", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME",
    help="A target that must work here (repeatable).  [default: ort-cpu]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def doctor_command(targets: tuple[str, ...], as_json: bool) -> int:  # noqa: FBT001
    """Show what is installed here, which targets work, and what does not fit together.

    Exit code 6 if a target named with --target (by default ort-cpu) cannot be used here: ONNX
    Runtime cannot run it, or TensorRT can neither build nor run it. Warnings do not change it.
    """
    from optimizer.diagnosis import diagnose
    from optimizer.environment import collect
    from optimizer.targets import get_target

    for name in targets:
        get_target(name)  # a wrong word is refused before anything is looked at
    facts = collect()
    diagnosis = diagnose(facts, targets)
    if as_json:
        content = {"facts": facts.as_dict(), **diagnosis.as_dict()}
        click.echo(json.dumps(content, indent=1, sort_keys=True))
    else:
        for line in _lines(facts, diagnosis):
            click.echo(line)
    return diagnosis.exit_code


def _lines(facts: Facts, diagnosis: Diagnosis) -> Iterator[str]:
    yield (
        f"optimize-onnx {facts.version} in {facts.folder}, Python {facts.python}, {facts.system}"
    )
    yield from _section("libraries", _libraries(facts))
    yield from _section("cpu", _cpu(facts))
    yield from _section("memory", _memory(facts))
    yield from _section("ort", _onnxruntime(facts))
    yield from _section("tensorrt", _tensorrt(facts))
    yield from _section("gpu", _gpu(facts))
    yield from _section("targets", [line for item in diagnosis.targets for line in _target(item)])
    yield from _section("findings", [line for item in diagnosis.findings for line in _said(item)])
    unusable = diagnosis.unusable
    yield f"{'not usable' if unusable else 'usable'} here: {', '.join(unusable or diagnosis.asked)}"


def _section(title: str, lines: Sequence[str]) -> Iterator[str]:
    for index, line in enumerate(lines or ["none"]):
        head = f"{title if index == 0 else '':{len(_INDENT)}}"
        lead = " " * (len(line) - len(line.lstrip()))
        yield from textwrap.wrap(
            line.lstrip(),
            _WIDTH,
            initial_indent=head + lead,
            subsequent_indent=_INDENT + lead + "  ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def _libraries(facts: Facts) -> list[str]:
    found = [f"{name} {version}" for name in _LIBRARIES if (version := facts.version_of(name))]
    return [", ".join(found)] if found else []


def _cpu(facts: Facts) -> list[str]:
    from optimizer.diagnosis.kernels import fp32_kernel, int8_kernel

    cpu = facts.cpu
    quota = "" if cpu.quota is None else f", {cpu.quota:g} by control group"
    lines = [f"{cpu.model}, {cpu.usable} of {cpu.cores} cores usable{quota}"]
    fp32, int8 = fp32_kernel(cpu), int8_kernel(cpu)
    if fp32 is None or int8 is None:
        return [*lines, "instruction sets: not known on this system"]
    speed = "fast" if int8.dot_product else "no dot product: may be slower than fp32, measure"
    return [*lines, f"fp32 by {fp32.name}; int8 by {int8.name}: {speed}"]


def _memory(facts: Facts) -> list[str]:
    memory = facts.memory
    parts = []
    if memory.total is not None:
        parts.append(f"{_size(memory.total)}, {_size(memory.available)} available")
    if memory.limit is not None:
        parts.append(f"limited to {_size(memory.limit)} by control group")
    parts += [f"{_size(free)} free in {folder}" for folder, free in facts.free.items()]
    return [", ".join(parts)] if parts else []


def _onnxruntime(facts: Facts) -> list[str]:
    ort = facts.onnxruntime
    if ort.folder is None:
        return ["not installed"]
    kind = "no CUDA" if ort.cuda is None else f"for CUDA {ort.cuda}"
    lines = [f"{ort.wheel} {ort.version} ({kind}) in {ort.folder}"]
    if ort.offers:
        lines.append(
            f"offers {', '.join(name.removesuffix('ExecutionProvider') for name in ort.offers)}"
        )
    if facts.platform != "linux":
        return [*lines, "shared libraries: not looked at on this system"]
    return [*lines, *(_provider(name, library) for name, library in ort.providers.items())]


def _provider(name: str, library: Library) -> str:
    if library.error:
        return f"{name} provider: {library.error}"
    special = [need for need in library.needs if need.finder != "loader"]
    if not special:
        return f"{name} provider: all it needs is found"
    hidden = [need.name for need in special if need.finder == "python"]
    parts = []
    if library.missing:
        parts.append(f"not found {', '.join(need.name for need in library.missing)}")
    if hidden:
        parts.append(f"only in Python packages {', '.join(hidden)}")
    return f"{name} provider: {'; '.join(parts)}"


def _tensorrt(facts: Facts) -> list[str]:
    return [
        f"{item.flavour} {item.version}: "
        + (", ".join(str(path) for path in item.libraries) or "no shared libraries found")
        for item in facts.tensorrt
    ]


def _gpu(facts: Facts) -> list[str]:
    nvidia = facts.nvidia
    lines = [
        f"{gpu.name}, compute capability {gpu.capability}"
        + ("" if gpu.memory is None else f", {_size(gpu.memory)}")
        for gpu in nvidia.gpus
    ] or [nvidia.error or "none found"]
    known = (
        ("driver", nvidia.driver),
        ("CUDA up to", nvidia.cuda),
        ("CUDA toolkit", nvidia.toolkit),
        ("Jetson Linux", nvidia.jetpack),
    )
    parts = [f"{title} {value}" for title, value in known if value is not None]
    return [*lines, ", ".join(parts)] if parts else lines


def _target(item: Availability) -> list[str]:
    if item.builds is None:
        able = "runs here" if item.runs else "does not run here"
    elif item.builds:
        able = "engines can be built" + (" and run here" if item.runs else " here, not run")
    else:
        able = "engines can neither be built nor run here"
    reasons = f": {'; '.join(item.reasons)}" if item.reasons else ""
    return [f"{item.target:13} {able}{reasons}"]


def _said(item: Finding) -> list[str]:
    return [f"{item.severity.value}: {item.what}", f"  -> {item.advice} [{item.id}]"]


def _size(count: int | None) -> str:
    """Bytes, with decimal units as everywhere in this program."""
    if count is None:
        return "?"
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
