"""Sparse products against ONNX Runtime's dense ones, on one CPU thread, in one command.

    python benchmarks/sparse.py [--quick] [--calibrate] [--out FILE.json]

A and B take turns in one process, both in ONNX Runtime sessions: ``SparseMatMul`` in float32 and
int8 against MatMul in fp32 and DynamicQuantizeMatMul. Weights and masks are random. The roofline
beside a figure is what the bytes of the stored weight allow at the memory bandwidth (few tokens).
``--calibrate`` writes the lowest ratio over the shapes, per class of machine, into the cost model
(optimizer/sparse_figures.json), and keeps the classes that are there.

OPTIMIZE_ISA=avx512 (or avx2, scalar) measures our kernels of another instruction set; ONNX Runtime
keeps its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from optimizer.custom_ops import library_path
from optimizer.custom_ops.declaration import DOMAIN, OP_TYPE, declaration_hash
from optimizer.custom_ops.packing import pack
from optimizer.machine import describe_machine
from optimizer.sparse_cost import machine_class

HOME = Path(__file__).resolve().parent
FIGURES = HOME.parent / "optimizer" / "sparse_figures.json"
SHAPES = ((768, 768), (768, 3072), (2048, 2048), (4096, 4096))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 512)
DENSITIES = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
#: Dense float32 bytes of one chain of layers: more than a second-level cache holds.
CHAIN = 48e6


def weights(shape: tuple[int, int], density: float) -> list[np.ndarray]:
    """Enough random layers [K, N] that one run does not find them in a cache."""
    k, n = shape
    rng = np.random.default_rng(k + n)
    count = max(1, round(CHAIN / (4 * k * n)))
    made = []
    for _ in range(count):
        w = rng.standard_normal((k, n), dtype=np.float32) / np.float32(np.sqrt(k * density))
        made.append(w * (rng.random((k, n), dtype=np.float32) < density))
    return made


def int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [K, N] and scales [N]."""
    scale = (np.maximum(np.abs(weight).max(axis=0), 1e-12) / 127).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def layer(kind: str, weight: np.ndarray, i: int) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """One node that reads ``x`` and writes ``y<i>``, and its constants."""
    k, n = weight.shape
    arrays: dict[str, np.ndarray]
    attributes: dict[str, Any] = {}
    if kind == "fp32":
        op, domain, arrays = "MatMul", "", {"w": weight}
    elif kind == "int8":
        codes, scale = int8(weight)
        op, domain = "DynamicQuantizeMatMul", "com.microsoft"
        arrays = {"w": codes, "s": scale, "z": np.zeros(n, np.int8)}
    else:
        quantized = kind == "sparse int8"
        codes, scale = int8(weight) if quantized else (weight, None)
        packed = pack(codes, "n16k4" if quantized else "n64k1")
        op, domain = OP_TYPE, DOMAIN
        arrays = {"bitmap": packed.bitmap, "values": packed.values, "offsets": packed.offsets}
        if scale is not None:
            arrays |= {"bias": np.zeros(n, np.float32), "scale": scale}
        attributes = {
            "K": k, "N": n, "layout": "n16k4" if quantized else "n64k1", "activation": "none",
            "num_inputs": len(arrays) + 1, "declaration": declaration_hash(),
        }  # fmt: skip
    names = [f"{name}{i}" for name in arrays]
    node = helper.make_node(op, ["x", *names], [f"y{i}"], domain=domain, **attributes)
    return node, [
        numpy_helper.from_array(a, m) for a, m in zip(arrays.values(), names, strict=True)
    ]


def session(kind: str, layers: list[np.ndarray]) -> ort.InferenceSession:
    """Layers side by side: all read x, and only the first results are returned."""
    made = [layer(kind, weight, i) for i, weight in enumerate(layers)]
    k, n = layers[0].shape
    outputs = [
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["m", n])
        for node, _ in made
    ]
    graph = helper.make_graph(
        [node for node, _ in made],
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        outputs,
        [tensor for _, tensors in made for tensor in tensors],
    )
    imports = [
        helper.make_opsetid(domain, version)
        for domain, version in (("", 21), (DOMAIN, 1), ("com.microsoft", 1))
    ]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library_path()))
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options)


def compare(
    sessions: dict[str, ort.InferenceSession], x: np.ndarray, seconds: float
) -> dict[str, list[float]]:
    """Times in seconds, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for made in sessions.values():
        made.run(None, {"x": x})
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["fp32"]) < 7:
        for name, made in sessions.items():
            start = time.perf_counter()
            made.run(None, {"x": x})
            times[name].append(time.perf_counter() - start)
    return times


def ratio(base: list[float], other: list[float]) -> tuple[float, float, float]:
    """Median of base / other by turn, and its quartiles."""
    each = [a / b for a, b in zip(base, other, strict=True)]
    low, _, high = statistics.quantiles(each, n=4)
    return statistics.median(each), low, high


def rows(shapes: Any, densities: Any, tokens: Any, seconds: float) -> Iterator[dict[str, Any]]:
    """One measurement after the other."""
    for shape in shapes:
        for density in densities:
            layers = weights(shape, density)
            kinds = ("fp32", "int8", "sparse fp32", "sparse int8")
            sessions = {kind: session(kind, layers) for kind in kinds}
            for count in tokens:
                x = np.random.default_rng(count).standard_normal(
                    (count, shape[0]), dtype=np.float32
                )
                times = compare(sessions, x, seconds)
                row: dict[str, Any] = {
                    "shape": list(shape), "layers": len(layers), "density": density,
                    "tokens": count, "fp32_us": statistics.median(times["fp32"]) * 1e6,
                }  # fmt: skip
                for kind, bytes_ in (("sparse fp32", 4), ("sparse int8", 1)):
                    for base in ("fp32", "int8"):
                        row[f"{kind} vs {base}"] = ratio(times[base], times[kind])
                    row[f"{kind} byte ratio"] = 4 / (0.125 + bytes_ * density)
                yield row


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    k, n = row["shape"]
    parts = [f"{k}x{n}  M={row['tokens']:<4} {1 - row['density']:.0%} zeros"]
    for kind in ("sparse fp32", "sparse int8"):
        for base in ("fp32", "int8"):
            middle, low, high = row[f"{kind} vs {base}"]
            parts.append(f"{kind}/{base} {middle:5.2f} ({low:.2f}-{high:.2f})")
        parts.append(f"[bytes {row[f'{kind} byte ratio']:.1f}]")
    return "  ".join(parts)


def calibrate(results: list[dict[str, Any]], name: str) -> None:
    """Write the lowest ratio over the shapes into the cost model."""
    data = json.loads(FIGURES.read_text("utf-8"))
    kinds: dict[str, list[list[float]]] = {}
    for precision in ("fp32", "int8"):
        lines = []
        for count in sorted({r["tokens"] for r in results}):
            for density in sorted({r["density"] for r in results}):
                here = [r for r in results if (r["tokens"], r["density"]) == (count, density)]
                lowest = [
                    round(min(r[f"sparse {precision} vs {base}"][0] for r in here), 2)
                    for base in ("fp32", "int8")
                ]
                lines.append([count, density, *lowest])
        kinds[precision] = lines
    data["classes"][name] = kinds
    FIGURES.write_text(json.dumps(data) + "\n", "utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and densities")
    parser.add_argument("--calibrate", action="store_true", help="write the cost model")
    parser.add_argument("--seconds", type=float, default=0.25, help="per measurement")
    parser.add_argument("--out", type=Path, default=HOME / "results" / "sparse.json")
    arguments = parser.parse_args()
    shapes, densities = (SHAPES[:3:2], DENSITIES[::2]) if arguments.quick else (SHAPES, DENSITIES)
    results = []
    for row in rows(shapes, densities, TOKENS, arguments.seconds):
        print(show(row), flush=True)
        results.append(row)
    facts = {
        "class": machine_class(), "machine": describe_machine(), "onnxruntime": ort.__version__,
        "date": time.strftime("%Y-%m-%d"), "rows": results,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(facts, indent=1, default=str) + "\n", "utf-8")
    if arguments.calibrate:
        calibrate(results, machine_class())


if __name__ == "__main__":
    main()
