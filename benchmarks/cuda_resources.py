"""Registers, spills and shared memory of every CUDA kernel on every architecture.

    python benchmarks/cuda_resources.py [--out FILE.json]

Needs nvcc, no GPU. A kernel that spills registers to memory, or warns, is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent
SOURCES = HOME.parent / "plugins" / "sparse_matmul" / "cuda"
ARCHITECTURES = (80, 86, 87, 89, 90)
_FLAGS = ("-O3", "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v", "-lineinfo")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def demangled(names: list[str]) -> list[str]:
    """Names as in the source, without arguments."""
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    text = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    )
    plain = [re.sub(r"\(anonymous namespace\)::|optimize::sparse_matmul::cuda::|^void ", "", line)
             for line in text.stdout.splitlines()]  # fmt: skip
    return [line.split("(", 1)[0] for line in plain]


def compile_for(source: Path, architecture: int, nvcc: str) -> list[dict[str, Any]]:
    """One row per kernel.

    Raises:
        RuntimeError: The source does not compile without warnings; with what the compiler says.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *_FLAGS, f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        command += ["-c", str(source), "-o", f"{folder}/kernel.o"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        msg = f"{source.name} for sm_{architecture}:\n{run.stdout}{run.stderr}"
        raise RuntimeError(msg)
    rows: list[dict[str, Any]] = []
    for line in (run.stdout + run.stderr).splitlines():
        if entry := _ENTRY.search(line):
            rows.append({"source": source.name, "architecture": architecture, "kernel": entry[1]})
        elif spills := _SPILLS.search(line):
            rows[-1]["spill_bytes"] = int(spills[1]) + int(spills[2])
        elif used := _USED.search(line):
            rows[-1] |= {"registers": int(used[1]), "static_smem": int(used[2] or 0)}
    for row, name in zip(rows, demangled([row["kernel"] for row in rows]), strict=True):
        row["kernel"] = name
    return rows


def report(nvcc: str, architectures: tuple[int, ...] = ARCHITECTURES) -> list[dict[str, Any]]:
    """Rows of all kernels."""
    sources = sorted(path for path in SOURCES.glob("*.cu") if path.name != "c_api.cu")
    return [row for s in sources for a in architectures for row in compile_for(s, a, nvcc)]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HOME / "results" / "cuda_resources.json")
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("cuda_resources: there is no nvcc on the PATH")
    rows = report(nvcc)
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    facts = {"nvcc": version.stdout.strip().splitlines()[-1], "rows": rows}
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    for row in rows:
        where = f"{row['kernel']}: sm_{row['architecture']}"
        print(f"{where}, {row['registers']} registers, {row['spill_bytes']} bytes spilled")
    if spilling := [row for row in rows if row["spill_bytes"]]:
        raise SystemExit(f"cuda_resources: {len(spilling)} kernels spill")


if __name__ == "__main__":
    main()
