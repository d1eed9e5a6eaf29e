"""What a measurement was made on: processor, memory, versions, date."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

#: Instruction sets that decide how fast int8 and float32 products are.
_INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimddp",
    "i8mm",
    "sve",
)
_PACKAGES = ("optimize-onnx", "onnxruntime", "onnx", "onnx-ir", "numpy")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, instruction sets, system, versions and the date (UTC)."""
    facts = _cpu_facts()
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cores_usable": _usable_cores(),
        "instructions": [i for i in _INSTRUCTIONS if i in facts.get("flags", "").split()],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: v for name in _PACKAGES if (v := _version(name))},
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def _usable_cores() -> int | None:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count()


def _cpu_facts() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo, where there is one."""
    facts: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return facts
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        facts[key.strip().lower()] = value.strip()
    if "flags" not in facts and "features" in facts:
        facts["flags"] = facts["features"]
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
