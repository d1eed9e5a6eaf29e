"""NVIDIA GPUs, their driver, an installed CUDA toolkit, and whether this is a Jetson."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from optimizer.environment.facts import Gpu, Nvidia
from optimizer.environment.probe import Probe

_QUERY = ("name", "compute_cap", "driver_version", "memory.total")
#: First line of /etc/nv_tegra_release: "# R36 (release), REVISION: 4.0, GCID: ..., BOARD: ...".
_TEGRA = re.compile(r"#\s*R(\d+)\s*\(release\),\s*REVISION:\s*(\d+)")
_CUDA_VERSION = re.compile(r"^#define CUDA_VERSION (\d+)", re.MULTILINE)

#: Is run by another process where there is a driver and no nvidia-smi (containers, Jetson).
#: Attributes 75 and 76 are the compute capability (CUdevice_attribute in cuda.h).
_ASK_DRIVER = """\
import ctypes, json
cuda = ctypes.CDLL("libcuda.so.1")
status = cuda.cuInit(0)
if status:
    raise SystemExit(f"cuInit failed with CUDA error {status}")
def number(function, *arguments, kind=ctypes.c_int):
    value = kind()
    status = function(ctypes.byref(value), *arguments)
    if status:
        raise SystemExit(f"the driver failed with CUDA error {status}")
    return value.value
gpus = []
for index in range(number(cuda.cuDeviceGetCount)):
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, 256, index)
    total = number(cuda.cuDeviceTotalMem_v2, index, kind=ctypes.c_size_t)
    major, minor = (number(cuda.cuDeviceGetAttribute, kind, index) for kind in (75, 76))
    gpus.append([name.value.decode(errors="replace"), f"{major}.{minor}", total])
print(json.dumps({"cuda": number(cuda.cuDriverGetVersion), "gpus": gpus}))
"""


def find_nvidia(probe: Probe, *, has_driver: bool) -> Nvidia:
    """Ask nvidia-smi, else the driver itself; neither can stop or crash this process.

    Args:
        probe: Of the machine.
        has_driver: Whether the loader finds ``libcuda.so.1``.
    """
    tegra = _TEGRA.search(probe.read("/etc/nv_tegra_release") or "")
    jetpack = None if tegra is None else f"{tegra[1]}.{tegra[2]}"
    known = Nvidia(toolkit=_toolkit(probe), jetpack=jetpack)
    words = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    asked = probe.run(words)
    if asked.code == 0:
        rows = [[cell.strip() for cell in line.split(",")] for line in asked.out.splitlines()]
        rows = [row for row in rows if len(row) == len(_QUERY)]
        if rows:
            gpus = tuple(Gpu(name, able, _mebibytes(memory)) for name, able, _, memory in rows)
            return replace(known, gpus=gpus, driver=rows[0][2])
    error = asked.problem or (asked.out + asked.err).strip().partition("\n")[0][:200]
    error = "" if error == "not found" else f"nvidia-smi: {error or 'it names no GPU'}"
    if not has_driver:
        return replace(known, error=error)
    told = probe.import_module(_ASK_DRIVER)
    if told.facts is None:
        return replace(known, error=f"libcuda.so.1: {told.error}")
    return replace(
        known,
        gpus=tuple(Gpu(*described) for described in told.facts["gpus"]),
        cuda=_spelled(int(told.facts["cuda"])),
        error=error,
    )


def _mebibytes(text: str) -> int | None:
    return int(text) * 2**20 if text.isdecimal() else None


def _toolkit(probe: Probe) -> str | None:
    """Version of the CUDA toolkit at its usual place."""
    folder = probe.environment.get("CUDA_HOME") or "/usr/local/cuda"
    try:
        return str(json.loads(probe.read(f"{folder}/version.json") or "")["cuda"]["version"])
    except (ValueError, KeyError, TypeError):  # it has none, as packages of other publishers
        found = _CUDA_VERSION.search(probe.read(f"{folder}/include/cuda.h") or "")
        return None if found is None else _spelled(int(found[1]))


def _spelled(number: int) -> str:
    """A version of CUDA from the number that stands for it: 12080 is 12.8."""
    return f"{number // 1000}.{number % 1000 // 10}"
