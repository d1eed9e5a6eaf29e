"""Sparse products against ONNX Runtime's dense ones, on one CPU thread, in one command.

    python benchmarks/sparse.py [--shapes 768x768,..] [--tokens 1,..] [--zeros 50,..]
                                [--gemv-bytes 2e9] [--plots] [--calibrate] [--out FILE.json]

A sparse and a dense kind take turns in one process, in ONNX Runtime sessions with all its
optimizations on: ``SparseMatMul`` in float32 and int8 against MatMul in float32; dynamic int8
(DynamicQuantizeMatMul); static int8 (Q/DQ around MatMul, which ONNX Runtime fuses); and int4
weights (MatMulNBits, blocks of 32). A session is a chain of layers [K, N], [N, K], ..; weights and
masks are random. Ratios are medians over the turns with their quartiles. Nothing else should run
meanwhile: virtual cores often share one core.

Rooflines beside a figure, as shares of 1: ``bytes``, the time in which the stored weight can be
read at the bandwidth that reading a large array reaches here, divided by the time it took; and
``products``, the same for the non-zero products at the best rate that dense int8 reached here.

``--gemv-bytes`` measures one token with so many bytes of float32 weights, in sessions of one layer
that take turns: more than the last cache holds. ``--calibrate`` writes the cost model's figures of
this class of machine (optimizer/sparse_figures.json) and keeps those of other classes.
``python benchmarks/without_amx.py benchmarks/sparse.py ..`` measures the class avx512 on a machine
with AMX.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from optimizer.benchmark import write_result
from optimizer.custom_ops import library_path
from optimizer.custom_ops.declaration import DOMAIN, OP_TYPE, declaration_hash
from optimizer.custom_ops.packing import pack
from optimizer.machine import describe_machine
from optimizer.sparse_cost import machine_class

HOME = Path(__file__).resolve().parent
FIGURES = HOME.parent / "optimizer" / "sparse_figures.json"
SHAPES = ((256, 256), (384, 1536), (768, 768), (768, 3072), (2048, 2048), (4096, 4096))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 512)
ZEROS = (50, 60, 70, 80, 90, 95)
CHAIN = 48e6  # float32 bytes of one chain of layers: more than a second-level cache holds
DENSE = ("fp32", "int8", "qdq", "int4")
SPARSE = ("sparse fp32", "sparse int8")


def label() -> str:
    """The class of machine that is being measured."""
    return "avx512" if os.environ.get("OPTIMIZE_WITHOUT_AMX") else machine_class()


def weights(shape: tuple[int, int], density: float, count: int) -> list[np.ndarray]:
    """Random layers [K, N], [N, K], .. that keep the size of what passes through them."""
    rng = np.random.default_rng(shape[0] + shape[1])
    made = []
    for i in range(count):
        k, n = shape if i % 2 == 0 else shape[::-1]
        w = rng.standard_normal((k, n), dtype=np.float32) / np.float32(np.sqrt(k * density))
        made.append(w * (rng.random((k, n), dtype=np.float32) < density))
    return made


def int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [K, N] and scales [N]."""
    scale = (np.maximum(np.abs(weight).max(axis=0), 1e-12) / 127).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


class Chain:
    """Nodes and constants of a chain of layers of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(
        self, op: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any
    ) -> None:
        """Add a node."""
        self.nodes.append(helper.make_node(op, inputs, [output], domain=domain, **attributes))

    def const(self, name: str, array: np.ndarray) -> str:
        """Add a constant."""
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, weight: np.ndarray, i: int) -> None:
        """y<i + 1> = y<i> W."""
        x, y = f"y{i}", f"y{i + 1}"
        k, n = weight.shape
        if self.kind == "fp32":
            self.node("MatMul", [x, self.const(f"w{i}", weight)], y)
        elif self.kind == "int8":
            codes, scale = int8(weight)
            names = [self.const(f"w{i}", codes), self.const(f"s{i}", scale)]
            zero = self.const(f"z{i}", np.zeros(n, np.int8))
            self.node("DynamicQuantizeMatMul", [x, *names, zero], y, "com.microsoft")
        elif self.kind == "qdq":
            self._qdq(x, y, weight, i)
        elif self.kind == "int4":
            codes, scale = int4(weight)
            names = [self.const(f"w{i}", codes), self.const(f"s{i}", scale)]
            self.node(
                "MatMulNBits", [x, *names], y, "com.microsoft",
                K=k, N=n, bits=4, block_size=32, accuracy_level=4,
            )  # fmt: skip
        else:
            self._sparse(x, y, weight, i)

    def _qdq(self, x: str, y: str, weight: np.ndarray, i: int) -> None:
        codes, scale = int8(weight)
        # Activations are normal with a deviation of about 1 throughout.
        step = self.const(f"step{i}", np.array(6 / 127, np.float32))
        zero = self.const(f"zero{i}", np.array(0, np.int8))
        self.node("QuantizeLinear", [x, step, zero], f"q{i}")
        self.node("DequantizeLinear", [f"q{i}", step, zero], f"d{i}")
        parts = [self.const(f"w{i}", codes), self.const(f"s{i}", scale)]
        parts.append(self.const(f"z{i}", np.zeros(weight.shape[1], np.int8)))
        self.node("DequantizeLinear", parts, f"dw{i}", axis=1)
        self.node("MatMul", [f"d{i}", f"dw{i}"], y)

    def _sparse(self, x: str, y: str, weight: np.ndarray, i: int) -> None:
        quantized = self.kind == "sparse int8"
        codes, scale = int8(weight) if quantized else (weight, None)
        layout = "n16k4" if quantized else "n64k1"
        packed = pack(codes, layout)
        arrays = {"bitmap": packed.bitmap, "values": packed.values, "offsets": packed.offsets}
        if scale is not None:
            arrays |= {"bias": np.zeros(weight.shape[1], np.float32), "scale": scale}
        self.node(
            OP_TYPE, [x, *(self.const(f"{name}{i}", a) for name, a in arrays.items())], y, DOMAIN,
            K=weight.shape[0], N=weight.shape[1], layout=layout, activation="none",
            num_inputs=len(arrays) + 1, most_values=0, declaration=declaration_hash(),
        )  # fmt: skip


def int4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """MatMulNBits' bytes [N, K / 32, 16] and scales [N * K / 32], blocks of 32 along K."""
    k, n = weight.shape
    blocks = weight.T.reshape(n, k // 32, 32)
    scale = np.maximum(np.abs(blocks).max(axis=2), 1e-12) / 7
    codes = (np.rint(blocks / scale[..., None]) + 8).astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scale.astype(np.float32).reshape(-1)


def session(kind: str, layers: Sequence[np.ndarray]) -> ort.InferenceSession:
    """The chain's session: one thread, all optimizations."""
    chain = Chain(kind)
    for i, weight in enumerate(layers):
        chain.add(weight, i)
    ends = [("y0", layers[0].shape[0]), (f"y{len(layers)}", layers[-1].shape[1])]
    x, y = (helper.make_tensor_value_info(v, TensorProto.FLOAT, ["m", size]) for v, size in ends)
    graph = helper.make_graph(chain.nodes, "chain", [x], [y], chain.constants)
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


def take_turns(
    one: Sequence[ort.InferenceSession],
    other: Sequence[ort.InferenceSession],
    x: np.ndarray,
    seconds: float,
) -> tuple[list[float], list[float]]:
    """Seconds of a run of all sessions of each of two kinds, turn by turn."""
    times: tuple[list[float], list[float]] = ([], [])
    end = None
    while end is None or time.perf_counter() < end or len(times[0]) < 7:
        for sessions, taken in zip((one, other), times, strict=True):
            start = time.perf_counter()
            for each in sessions:
                each.run(None, {"y0": x})
            taken.append(time.perf_counter() - start)
        if end is None:  # the first turn makes what is derived on first use
            times[0].clear(), times[1].clear()
            end = time.perf_counter() + seconds
    return times


def ratio(base: list[float], other: list[float]) -> list[float]:
    """Median of base / other by turn, and its quartiles."""
    each = [a / b for a, b in zip(base, other, strict=True)]
    low, _, high = statistics.quantiles(each, n=4)
    return [round(v, 3) for v in (statistics.median(each), low, high)]


def bandwidth() -> float:
    """Bytes per second of reading an array larger than any cache, the best of some turns."""
    array = np.ones(1 << 27, np.float32)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        array.max()
        best = min(best, time.perf_counter() - start)
    return array.nbytes / best


def measure(
    sessions: Mapping[str, Sequence[ort.InferenceSession]],
    layers: Sequence[np.ndarray],
    tokens: int,
    seconds: float,
) -> dict[str, Any]:
    """One row: times in us, ratios against every dense kind, bytes of the sparse weights."""
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, layers[0].shape[0]), dtype=np.float32)
    row: dict[str, Any] = {"tokens": tokens, "us": {}, **{kind: {} for kind in SPARSE}}
    pairs = [("sparse int8", base) for base in DENSE]
    for kind, base in [*pairs, ("sparse fp32", "fp32"), ("sparse fp32", "int8")]:
        dense, ours = take_turns(sessions[base], sessions[kind], x, seconds)
        row[kind][base] = ratio(dense, ours)
        row["us"][base] = round(statistics.median(dense) * 1e6, 1)
        row["us"][kind] = round(statistics.median(ours) * 1e6, 1)
        row["turns"] = min(row.get("turns", len(ours)), len(ours))
    return row


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One measurement after the other."""
    for shape in arguments.shapes:
        count = max(1, round(CHAIN / (4 * shape[0] * shape[1])))
        count = min(16, count + count % 2)
        for zeros in arguments.zeros:
            layers = weights(shape, 1 - zeros / 100, count)
            sessions = {kind: [session(kind, layers)] for kind in (*DENSE, *SPARSE)}
            for tokens in arguments.tokens:
                row = measure(sessions, layers, tokens, arguments.seconds)
                yield {"shape": list(shape), "layers": count, "zeros": zeros, **row}


def gemv_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One token, weights from memory: every layer is a session of its own."""
    shape = (4096, 4096)
    count = max(2, round(arguments.gemv_bytes / (4 * shape[0] * shape[1])))
    for zeros in arguments.zeros if arguments.gemv_bytes else ():
        layers = weights(shape, 1 - zeros / 100, 1)
        sessions = {
            kind: [session(kind, layers) for _ in range(count)] for kind in (*DENSE, *SPARSE)
        }
        row = measure(sessions, layers, 1, arguments.seconds)
        yield {"shape": list(shape), "layers": count, "zeros": zeros, "from memory": True, **row}


def add_rooflines(results: list[dict[str, Any]], read: float) -> None:
    """``bytes`` and ``products`` of every sparse figure, as the module says."""

    def products(row: dict[str, Any]) -> float:
        k, n = row["shape"]
        return float(k) * n * row["layers"] * row["tokens"]

    best = max((products(r) / r["us"]["int8"] for r in results), default=0.0)
    for row in results:
        k, n = row["shape"]
        density = 1 - row["zeros"] / 100
        for kind, size in zip(SPARSE, (4, 1), strict=True):
            nbytes = k * n * row["layers"] * (0.125 + density * size)
            us = row["us"][kind]
            row[kind]["bytes"] = round(nbytes / read * 1e6 / us, 3)
            if size == 1:
                row[kind]["products"] = round(products(row) * density / best / us, 3)


def show(row: dict[str, Any]) -> str:
    """One line of the table."""
    where = " from memory" if row.get("from memory") else ""
    parts = ["{}x{}".format(*row["shape"]), f"M={row['tokens']:<4} {row['zeros']}% zeros{where}"]
    for kind in SPARSE:
        figures = " ".join(
            f"{base} {found[0]:.2f}" for base, found in row[kind].items() if base in DENSE
        )
        parts.append(f"{kind} vs {figures}")
    return "  ".join(parts)


def summary(results: list[dict[str, Any]]) -> list[str]:
    """Median and lowest over the shapes of 768 and more, for few and for many tokens."""
    results = [r for r in results if min(r["shape"]) >= 768 and not r.get("from memory")]
    lines = []
    for name, low, high in (("M 16, 32", 16, 32), ("M 64 and more", 64, 1 << 30)):
        for zeros in sorted({r["zeros"] for r in results}):
            here = [r for r in results if r["zeros"] == zeros and low <= r["tokens"] <= high]
            parts = []
            for base in DENSE:
                values = [r["sparse int8"][base][0] for r in here]
                if values:
                    parts.append(f"{base} {statistics.median(values):.2f} ({min(values):.2f})")
            if parts:
                lines.append(f"{name}, {zeros} % zeros: sparse int8 vs " + ", ".join(parts))
    return lines


def calibrate(results: list[dict[str, Any]], name: str) -> None:
    """Write the cost model's figures: [K, N, tokens, density, vs fp32, vs int8]."""
    data = json.loads(FIGURES.read_text("utf-8"))
    data["classes"][name] = {
        precision: [
            [*row["shape"], row["tokens"], round(1 - row["zeros"] / 100, 4),
             round(row[f"sparse {precision}"]["fp32"][0], 2),
             round(row[f"sparse {precision}"]["int8"][0], 2)]
            for row in results if not row.get("from memory")
        ]
        for precision in ("fp32", "int8")
    }  # fmt: skip
    FIGURES.write_text(json.dumps(data) + "\n", "utf-8")


def plots(results: list[dict[str, Any]], folder: Path, name: str) -> None:
    """Speed-up of sparse int8 over zeros and over tokens, a line per shape, as PNG."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SystemExit("--plots needs matplotlib: pip install matplotlib") from error
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    cached = [r for r in results if not r.get("from memory")]
    axes = {"zeros": ("tokens", "zeros, %"), "tokens": ("zeros", "tokens per run")}
    for key, (fixed, text) in axes.items():
        values = sorted({r[fixed] for r in cached})
        figure, parts = plt.subplots(1, len(values), figsize=(3 * len(values), 3), sharey=True)
        for part, value in zip(np.atleast_1d(parts), values, strict=True):
            for shape in sorted({tuple(r["shape"]) for r in cached}):
                line = [r for r in cached if r[fixed] == value and tuple(r["shape"]) == shape]
                points = sorted((r[key], r["sparse int8"]["int8"][0]) for r in line)
                part.plot(*zip(*points, strict=True), marker=".", label=f"{shape[0]}x{shape[1]}")
            part.axhline(1, color="black", linewidth=0.5)
            part.set(title=f"{value} {fixed}", xlabel=text)
            if key == "tokens":
                part.set_xscale("log", base=2)
        np.atleast_1d(parts)[0].set_ylabel("times as fast as dense int8")
        np.atleast_1d(parts)[-1].legend(fontsize="x-small")
        figure.savefig(folder / f"sparse_{name}_{key}.png", dpi=110, bbox_inches="tight")
        plt.close(figure)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    def shapes(text: str) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(int(v) for v in part.split("x")) for part in text.split(","))

    parser.add_argument("--shapes", type=shapes, default=SHAPES, help="KxN, multiples of 32")
    parser.add_argument("--tokens", type=numbers, default=TOKENS)
    parser.add_argument("--zeros", type=numbers, default=ZEROS, help="per cent")
    parser.add_argument("--seconds", type=float, default=0.15, help="per pair")
    parser.add_argument("--gemv-bytes", type=float, default=0, help="0: leave that part out")
    parser.add_argument("--calibrate", action="store_true", help="write the cost model")
    parser.add_argument("--plots", action="store_true", help="PNG files")
    parser.add_argument("--out", type=Path, default=HOME / "results" / f"sparse_{label()}.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = arguments_of(argv)
    read = bandwidth()
    results = []
    for row in itertools.chain(rows(arguments), gemv_rows(arguments)):
        print(show(row), flush=True)
        results.append(row)
    add_rooflines(results, read)
    lines = summary(results)
    print("\n".join(lines))
    write_result(arguments.out, {
        "class": label(), "machine": describe_machine(), "onnxruntime": ort.__version__,
        "date": time.strftime("%Y-%m-%d"), "read_GBps": round(read / 1e9, 1), "summary": lines,
        "rows": results,
    })  # fmt: skip
    if arguments.plots:
        plots(results, arguments.out.parent / "plots", label())
    if arguments.calibrate:
        calibrate(results, label())


if __name__ == "__main__":
    main()
