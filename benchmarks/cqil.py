"""What running layers side by side costs in perplexity and gives in speed, in one command.

    python benchmarks/cqil.py perplexity [--tokens FILE.npz] [--stories260K FILE.onnx] [--every]
    python benchmarks/cqil.py decode
    python benchmarks/cqil.py packing

perplexity  stories12l (ships with the project) through this project's graph, for windows chosen by
            hand and for the automatic partition at each depth. Text: rows the model wrote itself,
            or ``--tokens`` with arrays calibration_input_ids, eval_input_ids [rows, length] and
            eval_valid (``eval_valid[n, t]``: predicting token t + 1 counts). Two perplexities are
            printed: over the positions t with valid[t], and with valid[t + 1], which is how the
            reference values that come with the TinyStories rows were computed.
decode      one token after a past of 128 with KV cache, one thread: ONNX Runtime on the export,
            this project's canonicalize, and cqil on top of it; caches appended to and in place.
packing     what packing linears that read one value costs or saves on this machine: the figures
            behind the cost model of fuse-concurrent.

Nothing is trained: all figures are training-free.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer.benchmark import Setup, benchmark, write_result
from optimizer.blocks import find_blocks
from optimizer.calibration import Calibration, input_specs
from optimizer.feeds import Sizes
from optimizer.fusion import fuse_group
from optimizer.graph import add_initializer, insert
from optimizer.legalize import legalize
from optimizer.model_io import load_model
from optimizer.pass_base import Context
from optimizer.runners.ort import OrtRunner
from optimizer.samples import load_samples
from passes import get_pass
from passes.cqil import Cqil, Options
from passes.fuse_concurrent import FuseConcurrent
from passes.fuse_concurrent import Options as PackOptions

HOME = Path(__file__).resolve().parent
SHIPPED = HOME / "models" / "stories12l"
RESULTS = HOME / "results"
VARIANTS: tuple[tuple[str, Any], ...] = (("d=0", 0), ("causal", "full"), ("symmetric", "symmetric"))
#: Rows evaluated per run of the model; bounds memory.
BATCH = 4

#: (group, first, last) of the windows that reference values exist for.
WINDOWS = (
    (2, 8, 9), (2, 6, 9), (2, 4, 9), (2, 2, 9), (2, 2, 11), (2, 0, 11),
    (4, 4, 7), (4, 6, 9), (4, 4, 11),
)  # fmt: skip
WINDOWS_260K = ((2, 0, 1), (2, 1, 2), (2, 2, 3), (2, 3, 4), (2, 1, 4), (2, 0, 3))


def canonical(path: Path) -> ir.Model:
    """The model in the dialect that passes work on."""
    model = load_model(path)
    canonicalize = get_pass("canonicalize")
    canonicalize(canonicalize.Options()).call(model, Context())
    return model


def grouped(model: ir.Model, **options: Any) -> ir.Model:
    """A copy with layers grouped."""
    copy = model.clone()
    report = Cqil(Options(**options)).call(copy, Context())
    if not report.modified:
        sys.exit(f"no group was made: {report.skipped}")
    return copy


class Text:
    """Rows of token ids and which of their tokens count."""

    def __init__(self, path: Path | None, rows: int) -> None:
        arrays = np.load(path or SHIPPED / "stories12l.eval.npz")
        prefix = "eval_" if "eval_input_ids" in arrays else ""
        self.ids = arrays[f"{prefix}input_ids"][:rows].astype(np.int64)
        self.valid = arrays[f"{prefix}valid"][:rows].astype(bool)
        self.calibration = arrays["calibration_input_ids"] if prefix else None

    def losses(self, model: ir.Model) -> np.ndarray:
        """[rows, length - 1] -ln p(token t + 1 | tokens 0..t)."""
        runner, parts = OrtRunner(model), []
        for start in range(0, len(self.ids), BATCH):
            ids = self.ids[start : start + BATCH]
            feed = {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "position_ids": np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
            }
            feed = {name: feed[name] for name in runner.input_names}
            logits = runner.run(feed)["logits"][:, :-1].astype(np.float64)
            logits -= logits.max(axis=-1, keepdims=True)
            chosen = np.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
            parts.append(np.log(np.exp(logits).sum(axis=-1)) - chosen)
        return np.concatenate(parts)

    def perplexity(self, model: ir.Model) -> tuple[float, float]:
        """Over positions with valid[t], and with valid[t + 1]."""
        losses = self.losses(model)
        return tuple(  # type: ignore[return-value]
            float(np.exp(losses[mask].mean())) for mask in (self.valid[:, :-1], self.valid[:, 1:])
        )

    def samples(self, model: ir.Model) -> Calibration:
        """What the automatic partition measures on: never the rows it is judged by."""
        if self.calibration is None:
            return Calibration(
                load_samples(SHIPPED / "stories12l.calibration.npz", input_specs(model))
            )
        ids = self.calibration.astype(np.int64)
        arrays = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
        }
        return Calibration(load_samples(arrays, input_specs(model)))


def every_window(layers: int, sizes: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """All windows of whole groups, by group size, length and first layer."""
    for size in sizes:
        for count in range(1, layers // size + 1):
            for first in range(layers - count * size + 1):
                yield size, first, first + count * size - 1


def windows_table(
    model: ir.Model, text: Text, windows: Sequence[tuple[int, int, int]], layers: int
) -> list[dict[str, Any]]:
    """Perplexity of every window in every variant."""
    rows = []
    for size, first, last in windows:
        row: dict[str, Any] = {
            "group": size,
            "first": first,
            "last": last,
            "depth": layers - (last - first + 1) // size * (size - 1),
        }
        for name, bypass in VARIANTS:
            copy = grouped(model, group=size, first=first, last=last, bypass=bypass)
            row[name] = text.perplexity(copy)
        print(
            f"{size}, {first}-{last}".ljust(10),
            f"{layers} -> {row['depth']}".ljust(10),
            *(f"{row[n][0]:8.3f} {row[n][1]:8.3f}  " for n, _ in VARIANTS),
            flush=True,
        )
        rows.append(row)
    return rows


def automatic_table(
    model: ir.Model, text: Text, by_hand: list[dict[str, Any]], samples: int
) -> list[dict[str, Any]]:
    """The automatic partition of every depth, and the best window of equal depth."""
    started = time.perf_counter()
    copy = model.clone()
    options = Options(depth=4, samples=samples)
    report = Cqil(options).call(copy, Context(calibration=text.samples(model)))
    seconds = time.perf_counter() - started
    print(f"automatic partition: {seconds:.0f} s")
    rows = []
    for step in report.details["path"]:
        trial = model.clone()
        blocks = find_blocks(trial).blocks
        for first, last in step["groups"]:
            fuse_group(trial, blocks[first : last + 1], "symmetric")
        equal = [r["symmetric"][1] for r in by_hand if r["depth"] == step["depth"]]
        best = min(equal, default=None)
        row = {**step, "perplexity": text.perplexity(trial), "best_window": best}
        groups = " ".join(f"{a}-{b}" for a, b in step["groups"])
        hand = "" if best is None else f"best window {best:.3f}"
        print(f"depth {step['depth']:2}  {row['perplexity'][1]:8.3f}  {hand}  {groups}", flush=True)
        rows.append(row)
    return [{"seconds": seconds, "samples": samples, "single": report.details["single"]}, *rows]


def perplexity(arguments: argparse.Namespace) -> dict[str, Any]:
    """All perplexity tables."""
    text = Text(arguments.tokens, arguments.rows)
    model = canonical(SHIPPED / "stories12l.onnx")
    layers = len(find_blocks(model).blocks)
    sequential = text.perplexity(model)
    print(f"stories12l sequential: {sequential[0]:.3f} {sequential[1]:.3f}")
    windows = list(every_window(layers, (2, 3, 4))) if arguments.every else list(WINDOWS)
    rows = windows_table(model, text, windows, layers)
    result: dict[str, Any] = {
        "text": arguments.tokens.name if arguments.tokens else "stories12l.eval.npz",
        "rows": len(text.ids),
        "columns": ["valid[t]", "valid[t + 1]"],
        "stories12l": {"sequential": sequential, "windows": rows},
    }
    result["stories12l"]["automatic"] = automatic_table(model, text, rows, arguments.samples)
    if arguments.stories260K:
        small = canonical(arguments.stories260K)
        sequential = text.perplexity(small)
        print(f"stories260K sequential: {sequential[0]:.3f} {sequential[1]:.3f}")
        result["stories260K"] = {
            "sequential": sequential,
            "windows": windows_table(small, text, WINDOWS_260K, len(find_blocks(small).blocks)),
        }
    return result


def decode(arguments: argparse.Namespace) -> dict[str, Any]:
    """Latency of one token after ``past`` tokens."""
    path = SHIPPED / "stories12l-kv.onnx"
    model = canonical(path)
    last = len(find_blocks(model).blocks) - 1
    operands: list[ir.Model | Path] = [path]
    labels = ["ONNX Runtime on the export"]
    for form in ("append", "in-place"):
        candidates = [("canonicalize", model.clone())]
        for name, bypass in reversed(VARIANTS):
            if form == "in-place" and name != "symmetric":
                continue
            for size in (2, 4):
                copy = grouped(model, group=size, first=0, last=last, bypass=bypass)
                candidates.append((f"cqil {name} p={size}", copy))
        for label, copy in candidates:
            legalize(copy, "ort-cpu", kv_cache=form)
            operands.append(copy)
            labels.append(f"{label}, {form}")
    setup = Setup(sizes=Sizes(1, 1, arguments.past), threads=1, vocabulary=512)
    result = benchmark(operands, setup, labels=labels, rounds=arguments.rounds).as_dict()
    own = {form: labels.index(f"canonicalize, {form}") for form in ("append", "in-place")}
    for timing in result["timings"]:
        form = "in-place" if timing["label"].endswith("in-place") else "append"
        reference = result["timings"][own[form]]["speedup"]
        timing["over_canonicalize"] = timing["speedup"] / reference
        low, high = timing["interval"]
        print(
            f"{timing['label']:30} {timing['median_ms']:.3f} ms  min {timing['min_ms']:.3f}  "
            f"{timing['speedup']:.2f}x [{low:.2f}, {high:.2f}]  "
            f"vs canonicalize {timing['over_canonicalize']:.2f}x"
        )
    return {**result, "past": arguments.past}


def packing(arguments: argparse.Namespace) -> dict[str, Any]:
    """Microseconds that packing n linears of width D saves, per layer."""
    rows = []
    for width in (64, 128, 256, 512):
        for count, biased in ((2, False), (3, False), (5, False), (2, True), (3, True), (5, True)):
            layers = max(2, min(8, 512 // width * 2))
            pair = [_siblings(width, count, layers, biased=biased, packed=p) for p in (False, True)]
            row: dict[str, Any] = {"width": width, "linears": count, "biased": biased, "tokens": {}}
            for tokens in (1, 4, 16, 128):
                setup = Setup(sizes=Sizes(1, tokens, 0, {"n": tokens}), threads=1)
                timings = benchmark(
                    pair, setup, labels=["apart", "packed"], rounds=arguments.rounds
                ).timings
                row["tokens"][tokens] = {
                    "apart_us": timings[0].min_ms * 1e3 / layers,
                    "saved_us": (timings[0].min_ms - timings[1].min_ms) * 1e3 / layers,
                    "speedup": timings[1].speedup,
                }
            cells = [
                f"{tokens}: {cell['saved_us']:+.2f} of {cell['apart_us']:.1f}"
                for tokens, cell in row["tokens"].items()
            ]
            print(width, count, "biased" if biased else "plain ", *cells, sep="  ", flush=True)
            rows.append(row)
    return {"rows": rows}


def _siblings(width: int, count: int, layers: int, *, biased: bool, packed: bool) -> ir.Model:
    """Layers of ``count`` linears that read one normalized value; the first result goes on."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "n", width]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="siblings")

    def linear(source: ir.Value) -> ir.Value:
        weight = rng.normal(0, width**-0.5, (width, width)).astype(np.float32)
        y = insert(graph, None, "MatMul", [source, add_initializer(graph, "w", weight)])
        if biased:
            y = insert(graph, None, "Add", [y, add_initializer(graph, "b", weight[0])])
        return y

    stream = x
    scale = add_initializer(graph, "scale", np.ones(width, np.float32))
    for _ in range(layers):
        normalized = insert(graph, None, "RMSNormalization", [stream, scale], {"axis": -1})
        ends = [insert(graph, None, "Tanh", [linear(normalized)]) for _ in range(count)]
        stream = insert(graph, None, "Add", [stream, linear(ends[0])])
        graph.outputs.extend(ends[1:])
    graph.outputs.append(stream)
    for value in graph.outputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    model = ir.Model(graph, ir_version=10)
    if packed:
        FuseConcurrent(PackOptions(pack="always")).call(model, Context())
    return model


def main() -> None:
    """Run one of the measurements and write its result."""
    parser = argparse.ArgumentParser(description="Figures of cqil and fuse-concurrent.")
    parser.add_argument("what", choices=("perplexity", "decode", "packing"))
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--every", action="store_true", help="every window of groups of 2 to 4")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--stories260K", type=Path, dest="stories260K")
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    run = {"perplexity": perplexity, "decode": decode, "packing": packing}[arguments.what]
    result = run(arguments)
    if arguments.out:
        write_result(arguments.out, result)
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
