"""Registers, spills and shared memory of every CUDA kernel, for every architecture: no GPU needed.

    python benchmarks/cuda_resources.py [--out FILE.json]

Builds the kernels as a release does (CMake, warnings as errors) and keeps what ptxas says. Shared
memory is what a kernel has beside the dynamic one, whose size the launch chooses.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "plugins" / "sparse_matmul" / "cuda"
REPORT = ROOT / "benchmarks" / "results" / "cuda_resources.json"
ARCHITECTURES = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90")
#: As they are mangled in names.
ARGUMENTS = {
    "6__half": "half", "13__nv_bfloat16": "bfloat16", "a": "int8", "f": "float", "i": "int",
}  # fmt: skip
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def kernels() -> list[str]:
    """Names of the kernels in the sources."""
    found = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\(.*?\)\s+)?(\w+)\(", re.DOTALL)
    return sorted(
        {name for file in SOURCES.glob("*.cu") for name in found.findall(file.read_text())}
    )


def readable(mangled: str) -> str:
    """``name<arguments>`` of one of ``kernels``."""
    for name in kernels():
        match = re.search(rf"{len(name)}{name}(?:I(.*?)EEv|E)", mangled)
        if match and match[1]:
            parts = re.findall(rf"Li(\d+)E?|({'|'.join(ARGUMENTS)})", match[1])
            return f"{name}<{', '.join(n or ARGUMENTS[t] for n, t in parts)}>"
        if match:
            return name
    msg = f"{mangled} is no kernel of {SOURCES}: {kernels()}"
    raise ValueError(msg)


def build(folder: Path) -> str:
    """What the build said.

    Raises:
        RuntimeError: It failed; with what it said.
    """
    configure = [
        "cmake", "-S", str(ROOT / "plugins"), "-B", str(folder), "-DOPTIMIZE_CUDA=ON",
        "-DOPTIMIZE_WERROR=ON", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
    ]  # fmt: skip
    make = ["cmake", "--build", str(folder), "--parallel", "2", "--target", "optimize_cuda"]
    said = ""
    for command in (configure, make):
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        said += result.stdout + result.stderr
        if result.returncode:
            msg = f"{' '.join(command)}\n{said}"
            raise RuntimeError(msg)
    return said


def parse(said: str) -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {architecture: its resources}}."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for match in ENTRY.finditer(said):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.setdefault(readable(match["name"]), {})[match["arch"]] = {
            "registers": int(match["registers"]),
            "spilled_bytes": int(match["stores"]) + int(match["loads"]),
            "stack_bytes": int(match["stack"]),
            "static_shared_bytes": int(shared[1]) if shared else 0,
        }
    return {name: dict(sorted(found[name].items())) for name in sorted(found)}


def compiler() -> str:
    """Release of nvcc, as ``13.0.88``."""
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"release [\d.]+, V([\d.]+)", said)
    return match[1] if match else "unknown"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPORT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report: dict[str, Any] = {"nvcc": compiler(), "kernels": parse(build(Path(folder)))}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    for name, of in report["kernels"].items():
        print(f"{name:32}", *(f"{a} {r['registers']:4}" for a, r in of.items()))


if __name__ == "__main__":
    main()
