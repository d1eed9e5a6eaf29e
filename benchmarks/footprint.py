"""Resident memory and file size of models in ONNX Runtime, each in a process of its own.

    python benchmarks/footprint.py MODEL.onnx .. [--past 256] [--out FILE.json]

Memory is what the process has resident after the session was made and three runs, of one token
where there is a cache, less what it had with ONNX Runtime imported. Every model is measured with
ONNX Runtime's defaults and with the settings for small memory that need no other file: no
prepacked copies of weights, no arena. The first model is the baseline. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from optimizer.benchmark import write_result
from optimizer.custom_ops import library_path
from optimizer.feeds import Sizes, synthesize
from optimizer.machine import describe_machine
from optimizer.runners.ort import OrtRunner

_CHILD = """
import gc, sys
import numpy as np
import onnxruntime as ort

def resident():
    gc.collect()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

model, feed, library, small = sys.argv[1:]
feed = dict(np.load(feed))
before = resident()
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
options.register_custom_ops_library(library)
if small == "small":
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
for _ in range(3):
    session.run(None, feed)
print(resident() - before)
"""


def resident(model: Path, feed: Path, settings: str) -> int:
    """Bytes, the median of three processes."""
    command = [sys.executable, "-c", _CHILD, str(model), str(feed), str(library_path()), settings]
    values = [
        int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    return sorted(values)[1]


def file_bytes(path: Path) -> int:
    """Of the model and what lies beside it under its name."""
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*") if p.is_file())


def measure(models: list[Path], sizes: Sizes) -> list[dict[str, Any]]:
    """One row per model, ratios to the first."""
    rows: list[dict[str, Any]] = []
    for path in models:
        specs = OrtRunner(path, optimize=False).inputs
        with tempfile.TemporaryDirectory() as folder:
            feed = Path(folder) / "feed.npz"
            np.savez(feed, **synthesize(specs, sizes, np.random.default_rng(0)))
            row: dict[str, Any] = {"model": path.stem, "file": file_bytes(path)}
            for settings in ("default", "small"):
                row[settings] = resident(path, feed, settings)
        first = rows[0] if rows else row
        row["ratios"] = {
            key: round(row[key] / first[key], 3) for key in ("file", "default", "small")
        }
        rows.append(row)
        print(
            f"{path.stem:20} file {row['file'] / 1e6:8.1f} MB ({row['ratios']['file']:.3f}x)  "
            f"resident {row['default'] / 1e6:8.1f} MB ({row['ratios']['default']:.3f}x), "
            f"small settings {row['small'] / 1e6:8.1f} MB ({row['ratios']['small']:.3f}x)",
            flush=True,
        )
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--past", type=int, default=256, help="tokens in the cache")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments.models, Sizes(1, 1, arguments.past))
    if arguments.out:
        facts = {
            "machine": describe_machine(), "onnxruntime": ort.__version__,
            "past": arguments.past, "rows": rows,
        }  # fmt: skip
        write_result(arguments.out, facts)


if __name__ == "__main__":
    main()
