"""Small models of every family in ONNX Runtime's CUDA provider: right, and on the GPU?

    python benchmarks/gpu_families.py --write FOLDER     # on any machine; needs the extra "test"
    python benchmarks/gpu_families.py FOLDER [--out FILE.json]   # on one with a GPU

The first writes what ``--target ort-cuda`` gives for every family, with and without KV cache, and
each pass set, with a feed and what ONNX Runtime's CPU kernels make of it. The second runs the files
on the GPU (float32 without TF32), compares, and counts the nodes that ONNX Runtime left to the CPU.
Outputs of the same file on both devices may differ by the roundings of its type; in bfloat16, for
which the CPU has no kernels, the exporter's file is the comparison. A mixture of experts may send a
token to another expert for one rounding, and is then far off.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

PASS_SETS = {
    "untouched": None,
    "fp32": "",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "outliertune:force=true",
    "int8, fp16": "outliertune:force=true,fp16",
    "cqil, fp16": "cqil:group=2;first=0;last=1,fp16",
    "tome, fp16": "tome:r=2,fp16",
    "2:4, fp16": "sparsify:pattern=2:4;method=magnitude,fp16,sparse-matmul:force=true;tokens=1",
    "70 % zeros, int8, fp16": "sparsify:pattern=unstructured;sparsity=0.7;method=magnitude,fp16,"
    "sparse-matmul:force=true;tokens=1;precision=int8",
}
#: For decoders; and those that the library is for.
SPARSE = re.compile("cqil|2:4|zeros")
#: Relative L2 of an output on the GPU to that on the CPU: sums in other orders, some layers deep.
#: Small numbers are rounded to 16 bits after every node, and int8 steps are met or missed.
BOUNDS = {"untouched": 1e-4, "fp32": 1e-4, "fp16": 0.01, "bf16": 0.05, "int8": 0.05}
RESULTS = ROOT / "benchmarks" / "results" / "gpu_families.json"


def write_cell(name: str, cached: bool, pass_set: str, folder: Path) -> str:  # noqa: FBT001
    """One model with its data, or why there is none."""
    import exporters
    import families
    from rewriters import Cell, NotExported

    from optimizer.api import optimize
    from optimizer.errors import OptimizerError

    entry, passes = families.FAMILIES[name], PASS_SETS[pass_set]
    stem = f"{name}{'-kv' if cached else ''} {pass_set}"
    stem = stem.replace(":", "_").replace(" % ", "pct-").replace(", ", "+").replace(" ", "--", 1)
    try:
        source = exporters.export(Cell(entry, "dynamo-23", cached))
    except NotExported as error:
        return f"{stem}: not exported: {error}"
    feed = families.make_feeds(entry, cached)
    target = folder / f"{stem}.onnx"
    if target.with_suffix(".npz").exists():
        return f"{stem}: there already"
    if passes is None:
        target.write_bytes(source.read_bytes())
    else:
        data = families.make_feeds(entry, cached and entry.kind != "decoder", seed=1)
        try:
            optimize(
                source,
                passes,
                target="ort-cuda",
                output=target,
                calibration=data,
                verify="off",
                force=True,
            )
        except OptimizerError as error:
            return f"{stem}: refused: {error}"
    # without the library of operators: their bodies are the comparison
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    file = str(source if "bf16" in pass_set else target)
    try:
        on_cpu = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        target.unlink()
        return f"{stem}: the CPU has no kernels for it: {str(error)[:200]}"
    if "cqil" in pass_set:
        feed |= joined_cache(feed, on_cpu.get_inputs())
    names = [value.name for value in on_cpu.get_outputs()]
    given = fed(on_cpu, feed)
    outputs = dict(zip(names, on_cpu.run(names, given), strict=True))
    arrays = {f"in {key}": value for key, value in feed.items()}
    arrays |= {f"out {key}": np.asarray(value) for key, value in outputs.items()}
    np.savez(target.with_suffix(".npz"), **arrays)
    return f"{stem}: written"


def fed(session: Any, feed: dict[str, Any]) -> dict[str, Any]:
    """What the session has inputs for, in their types."""
    return {
        value.name: feed[value.name].astype(np.float16)
        if "float16" in value.type
        else feed[value.name]
        for value in session.get_inputs()
    }


def joined_cache(feed: dict[str, Any], inputs: Any) -> dict[str, Any]:
    """The cache of a model whose layers were joined: that of the first, for as many heads."""
    return {
        spec.name: np.concatenate(
            [feed[spec.name]] * (spec.shape[1] // feed[spec.name].shape[1]), 1
        )
        for spec in inputs
        if spec.name.startswith("past")
    }


def write(folder: Path, workers: int) -> None:
    """All cells."""
    import families

    folder.mkdir(parents=True, exist_ok=True)
    cells = [
        (name, cached, pass_set, folder)
        for name, entry in families.FAMILIES.items()
        for cached in ((False, True) if entry.cached else (False,))
        for pass_set in PASS_SETS
        if not (SPARSE.search(pass_set) and entry.kind != "decoder")
        if not ("tome" in pass_set and entry.kind != "vision")
    ]
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        for future in concurrent.futures.as_completed([pool.submit(write_cell, *c) for c in cells]):
            print(future.result(), flush=True)


def run_cell(path: Path, folder: Path, library: Path | None) -> dict[str, Any]:
    """One model on the GPU."""
    family, _, passes = path.stem.partition("--")
    row: dict[str, Any] = {"family": family, "passes": passes.replace("+", ", ")}
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_profiling = True
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.profile_file_prefix = str(folder / "profile")
    providers = [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    with np.load(path.with_suffix(".npz")) as content:
        arrays = dict(content)
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
        names = [value.name for value in session.get_outputs()]
        feed = fed(session, {k[3:]: v for k, v in arrays.items() if k.startswith("in ")})
        found = dict(zip(names, session.run(None, feed), strict=True))
    except Exception as error:
        return {**row, "failed": f"{type(error).__name__}: {error}"[:400]}
    errors = {name: distance(found[name], arrays[f"out {name}"]) for name in names}
    events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    nodes = [e["args"] for e in events if e["cat"] == "Node" and e["name"].endswith("kernel_time")]
    count = Counter(args.get("provider", "?") for args in nodes)
    on_cpu = Counter(args["op_name"] for args in nodes if "CPU" in args.get("provider", ""))
    return {**row, "worst_relative_l2": max(errors.values()), "nodes": dict(count),
            "on_cpu": dict(on_cpu)}  # fmt: skip


def distance(found: Any, expected: Any) -> float:
    """Relative L2; infinite where there is no number."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        return float("inf")
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


def run(folder: Path, library: Path | None, out: Path) -> int:
    """All models of a folder; 1 if one is wrong."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for path in sorted(folder.glob("*.onnx")):
            row = run_cell(path, Path(scratch), library)
            bound = BOUNDS.get(row["passes"].split(", ")[0], 0.05)
            row["right"] = row.get("worst_relative_l2", float("inf")) <= bound
            rows.append(row)
            if not row["right"]:
                print(row, flush=True)
    for passes in dict.fromkeys(row["passes"] for row in rows):
        own = [row for row in rows if row["passes"] == passes]
        left = sum((Counter(row.get("on_cpu", {})) for row in own), Counter())
        print(f"{passes}: {sum(row['right'] for row in own)} of {len(own)} right; "
              f"on the CPU: {dict(left) or 'nothing'}", flush=True)  # fmt: skip
    from optimizer.benchmark import write_result
    from optimizer.environment import collect

    gpus = [gpu.name for gpu in collect().nvidia.gpus]
    date = time.strftime("%Y-%m-%d")
    write_result(out, {"rows": rows}, onnxruntime=ort.__version__, gpus=gpus, date=date)
    return int(not all(row["right"] for row in rows))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true", help="make the models")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--library", type=Path, help="liboptimize_ops_cuda.so")
    parser.add_argument("--out", type=Path, default=RESULTS)
    words = parser.parse_args()
    if words.write:
        write(words.folder, words.workers)
        return 0
    return run(words.folder, words.library, words.out)


if __name__ == "__main__":
    sys.exit(main())
