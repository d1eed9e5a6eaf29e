"""What a measurement was made on, and what a run can use: processor, memory, versions, date.

Every file is looked up below ``root``, so that other machines can be described from their files.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Instruction sets that decide how fast int8 and float32 products are.
_INSTRUCTIONS = (
    "avx",
    "fma",
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
_PACKAGES = ("optimize-onnx", "onnxruntime", "onnx", "onnx-ir", "numpy")
_ROOT = Path("/")
#: What version 1 of the control groups writes where there is no limit: the largest page count.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Cpu:
    """The processor, as far as the system tells.

    Attributes:
        model: Its name.
        architecture: As ``platform.machine`` spells it.
        cores: Logical cores of the machine.
        usable: Logical cores this process may run on (its affinity).
        quota: Cores' worth of time that control groups grant; None = no limit.
        instructions: Those that matter here; None where the system does not say.
    """

    model: str
    architecture: str
    cores: int | None
    usable: int | None
    quota: float | None
    instructions: tuple[str, ...] | None


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes; None where the system does not say.

    Attributes:
        total: Of the machine.
        available: Without swapping.
        limit: What control groups grant; None = no limit.
    """

    total: int | None
    available: int | None
    limit: int | None


def describe_machine() -> dict[str, Any]:
    """Processor, cores, instruction sets, system, versions and the date (UTC)."""
    cpu = describe_cpu()
    return {
        "cpu": cpu.model,
        "cores": cpu.cores,
        "cores_usable": cpu.usable,
        "instructions": list(cpu.instructions or ()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: v for name in _PACKAGES if (v := _version(name))},
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def describe_cpu(root: Path = _ROOT) -> Cpu:
    """The processor and how much of it this process gets."""
    facts = _first_processor(root)
    flags = facts.get("flags", facts.get("features", "")).split()
    return Cpu(
        model=facts.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        cores=os.cpu_count(),
        usable=_usable_cores(),
        quota=min(_cpu_quotas(root), default=None),
        instructions=tuple(i for i in _INSTRUCTIONS if i in flags) if flags else None,
    )


def describe_memory(root: Path = _ROOT) -> Memory:
    """How much memory there is, and how much of it this process may use."""
    facts = dict(_pairs(_read(root / "proc/meminfo") or ""))
    total, available = (
        int(facts[key].split()[0]) * 1024 if key in facts else None
        for key in ("memtotal", "memavailable")
    )
    return Memory(total, available, min(_memory_limits(root), default=None))


def _usable_cores() -> int | None:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count()


def _first_processor(root: Path) -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo, where there is one."""
    return dict(_pairs((_read(root / "proc/cpuinfo") or "").split("\n\n")[0]))


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        yield key.strip().lower(), value.strip()


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control groups, each with those around it: all limits hold.

    Version 2 has one tree, version 1 one per controller (proc(5), cgroups(7)).
    """
    mount = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = mount if not controllers else mount / controllers
        if not top.is_dir():
            top = mount / controller
        inner = top / group.strip("/")
        yield inner
        yield from (folder for folder in inner.parents if folder.is_relative_to(top))


def _cpu_quotas(root: Path) -> Iterator[float]:
    for folder in _control_groups(root, "cpu"):
        quota, period = _numbers(folder / "cpu.max", 2)
        if quota is None:
            (quota,), (period,) = (
                _numbers(folder / f"cpu.cfs_{name}_us", 1) for name in ("quota", "period")
            )
        if quota is not None and period and quota > 0:
            yield quota / period


def _memory_limits(root: Path) -> Iterator[int]:
    for folder in _control_groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            (limit,) = _numbers(folder / name, 1)
            if limit is not None and limit < _NO_LIMIT:
                yield limit


def _numbers(path: Path, count: int) -> tuple[int | None, ...]:
    """The first numbers in a file; None for each that is missing or a word such as "max"."""
    words = [*(_read(path) or "").split(), *[""] * count][:count]
    return tuple(int(word) if word.lstrip("-").isdecimal() else None for word in words)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
