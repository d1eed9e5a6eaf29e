"""Judges one cell of the support table: are the blocks right, and do both forms compute the same?

The verdict is independent of the code that is judged: expectations come from ``families``, numbers
from the original file in float64.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import exporters
import families
import numpy as np
import onnx_ir as ir
from exporters import Cell

from optimizer.blocks import find_blocks
from optimizer.checks import check_model, check_pass
from optimizer.errors import OptimizerError, UnsupportedError
from optimizer.legalize import legalize
from optimizer.model_io import load_model
from optimizer.pass_base import Context, Report
from optimizer.runners.ort import OrtRunner
from optimizer.runners.reference import ReferenceRunner
from optimizer.structure import Block, Experts, Structure
from passes.canonicalize import Canonicalize


class Outcome(enum.Enum):
    """Of one cell.

    RIGHT: every layer is a block with the right parts, and the outputs are the original's.
    REFUSED: the outputs are the original's, and each missing layer has a reason.
    WRONG: anything else.
    NOT_EXPORTED: exporter or tool cannot make the file, so there is nothing to judge.
    """

    RIGHT = "right"
    REFUSED = "refused"
    WRONG = "wrong"
    NOT_EXPORTED = "not exported"


@dataclass(frozen=True)
class Verdict:
    """An outcome and why."""

    outcome: Outcome
    detail: str = ""


#: Sizes other than those the models were traced with.
SIZES: tuple[dict[str, int], ...] = (
    {"batch": 3, "sequence": 6, "past": 4, "source": 5},
    {"batch": 1, "sequence": 1, "past": 9, "source": 4},
)
#: The sizes they were traced with, for files that run at no others.
TRACED = {"batch": 2, "sequence": 3, "past": 5, "source": 7}
_ROUNDING = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul"})


def judge(cell: Cell) -> Verdict:
    """Make the file, raise and lower it, and say what came out."""
    try:
        path = exporters.export(cell)
    except exporters.NotExported as error:
        return Verdict(Outcome.NOT_EXPORTED, str(error))
    try:
        OrtRunner(path)
    except UnsupportedError:
        pass  # valid, but not for this runtime
    except OptimizerError as error:
        return Verdict(Outcome.NOT_EXPORTED, f"the file is not valid: {error}")
    try:
        original = load_model(path)
        model = original.clone()
        graph_pass = Canonicalize()
        report = graph_pass.call(model, Context())
        check_pass(original, model, graph_pass, report)
        structure = _explained(find_blocks(model), report)
        lowered = model.clone()
        legalize(lowered, "ort-cpu")
        check_model(lowered, "ort-cpu")
        difference = _difference(cell, original, [model, lowered])
    except exporters.NotExported as error:
        return Verdict(Outcome.NOT_EXPORTED, str(error))
    except OptimizerError as error:
        return Verdict(Outcome.WRONG, f"{type(error).__name__}: {error}")
    except Exception as error:
        return Verdict(Outcome.WRONG, f"defect: {type(error).__name__}: {error}")
    if difference is not None:
        return Verdict(Outcome.WRONG, difference)
    return _judge_structure(cell, structure)


def _explained(structure: Structure, report: Report) -> Structure:
    """With what ``canonicalize`` itself said about a site, which is more precise."""
    said = {skip.site: skip.reason for skip in report.skipped}
    misses = ((name, said.get(name, reason)) for name, reason in structure.misses)
    return replace(structure, misses=tuple(misses))


def _judge_structure(cell: Cell, structure: Structure) -> Verdict:
    expected = cell.entry.blocks
    reasons = "; ".join(dict.fromkeys(reason for _, reason in structure.misses))
    if expected.refused is not None:
        if structure.blocks:
            return Verdict(Outcome.WRONG, "blocks found where there are none of the known kind")
        if len(structure.misses) < expected.layers or expected.refused not in reasons:
            return Verdict(
                Outcome.WRONG, f"expected '{expected.refused}' as reason, got: {reasons}"
            )
        return Verdict(Outcome.REFUSED, reasons)
    wrong = [text for block in structure.blocks for text in mismatches(cell, block)]
    if wrong:
        return Verdict(Outcome.WRONG, "; ".join(dict.fromkeys(wrong)))
    found = len(structure.blocks)
    for before, after in zip(structure.blocks, structure.blocks[1:], strict=False):
        if after.input is not before.output:
            return Verdict(Outcome.WRONG, "a block does not read what the one before it writes")
    if found == expected.layers:
        return Verdict(Outcome.RIGHT)
    if found > expected.layers:
        return Verdict(Outcome.WRONG, f"{found} blocks, expected {expected.layers}")
    if found + len(structure.misses) < expected.layers:
        return Verdict(
            Outcome.WRONG, f"{found} blocks, and only these reasons: {reasons or 'none'}"
        )
    return Verdict(Outcome.REFUSED, reasons)


def mismatches(cell: Cell, block: Block) -> Iterator[str]:
    """What differs between a block and what its family has."""
    expected, attention = cell.entry.blocks, block.attention
    usual = "silu" if expected.gated else "gelu"
    pairs: dict[str, tuple[object, object]] = {
        "style": (block.style.value, expected.style),
        "norms": (
            {block.attention_norm.kind.value, block.mlp_norm.kind.value}, {expected.norm}
        ),
        "heads": (attention.heads, expected.heads),
        "KV heads": (attention.kv_heads, _kv_heads(cell)),
        "head size": (attention.head_dim, expected.head_dim),
        "hidden size": (block.hidden_size, expected.hidden),
        "rotary": (attention.q_rotary is not None, expected.rotary),
        "rotary of keys": (attention.k_rotary is not None, expected.rotary),
        "norm of heads": (attention.q_norm is not None, expected.head_norm),
        "norm of key heads": (attention.k_norm is not None, expected.head_norm),
        "soft cap": (attention.softcap, expected.softcap),
        "cross-attention": (block.cross is not None, expected.cross),
        "experts": (isinstance(block.mlp, Experts), expected.experts),
    }  # fmt: skip
    if not isinstance(block.mlp, Experts):
        pairs |= {
            "gated": (block.mlp.gate is not None, expected.gated),
            "MLP size": (_width(block.mlp.down.weight), expected.ffn),
            "activation": (block.mlp.activation, expected.activation or usual),
        }
    for what, (found, wanted) in pairs.items():
        if found != wanted:
            yield f"{what}: {found}, expected {wanted}"
    scale = expected.scale or expected.head_dim**-0.5
    if not math.isclose(attention.scale, scale, rel_tol=_rounding(cell)):
        yield f"scale: {attention.scale}, expected {scale}"
    extras = set(block.extras) - {
        "quantized weights",
        "the residual stream is clamped",
        "the residual stream is rounded",
        "each row of the batch keeps its own cache (GroupQueryAttention)",
    }
    wanted_extras = set(expected.extras) | ({"cross-attention"} if expected.cross else set())
    if extras - {"keys and values are repeated before the cache"} != wanted_extras:
        yield f"extras: {sorted(extras)}, expected {sorted(wanted_extras)}"
    cached = attention.past_key is not None and attention.present_key is not None
    if cached != cell.kv_cache:
        yield f"cache: {cached}, expected {cell.kv_cache}"


def _kv_heads(cell: Cell) -> int:
    expected = cell.entry.blocks
    return expected.cache_heads or expected.kv_heads if cell.kv_cache else expected.kv_heads


def _rounding(cell: Cell) -> float:
    """How far a factor may be off that passed through the element type of the model."""
    half = {"fp16": 2.0**-10, "bf16": 2.0**-7}.get(cell.way.rpartition("-")[2])
    return half or 1e-6


def _width(weight: ir.Value) -> int:
    producer = weight.producer()
    stored = weight if producer is None else producer.inputs[0]
    return int(stored.shape[0])  # type: ignore[union-attr,index,arg-type]


def _difference(cell: Cell, original: ir.Model, candidates: list[ir.Model]) -> str | None:
    """Where a candidate computes something else than the original, None if nowhere.

    The bound on reassociated sums: twice the original's own error, or 16 roundings, both judged
    against the original in float64. Where codes are rounded to integers, or ONNX Runtime cannot
    run the original, both sides are in float64 instead.
    """
    try:
        before: OrtRunner | None = OrtRunner(original)
    except UnsupportedError:
        before = None
    types = {v.name: v.dtype for v in original.graph.inputs}
    feeds = [_feed(cell, types, seed, sizes) for seed, sizes in enumerate(SIZES)]
    if before is not None:
        feeds = [feed for feed in feeds if _runs(before, feed)] or [_feed(cell, types, 0, TRACED)]
        if not _runs(before, feeds[0]):
            raise exporters.NotExported("the file does not run in ONNX Runtime, at no size")
    rounds = any(node.op_type in _ROUNDING for node in original.graph)
    try:
        truths = [ReferenceRunner(original, double=True).run(feed) for feed in feeds]
    except UnsupportedError:  # the runtime's own layouts of Conv
        if before is None:
            raise
        plain = OrtRunner(original, optimize=False)
        truths, rounds = [plain.run(feed) for feed in feeds], False
    for candidate, form in zip(candidates, ("raised", "lowered"), strict=True):
        if rounds or before is None:
            again = ReferenceRunner(candidate, double=True)
            results = [again.run(feed) for feed in feeds]
            own = truths
        else:
            own = [before.run(feed) for feed in feeds]
            after = OrtRunner(candidate)
            results = [after.run(feed) for feed in feeds]
        for truth, old, new in zip(truths, own, results, strict=True):
            problem = _compare(truth, old, new, cell)
            if problem is not None:
                return f"{form}: {problem}"
        if rounds and before is not None:
            OrtRunner(candidate).run(feeds[0])
    return None


def _runs(runner: OrtRunner, feed: dict[str, np.ndarray]) -> bool:
    try:
        runner.run(feed)
    except OptimizerError:
        return False
    return True


def _feed(
    cell: Cell, types: dict[str | None, ir.DataType | None], seed: int, sizes: dict[str, int]
) -> dict[str, np.ndarray]:
    feed = families.make_feeds(cell.entry, cell.kv_cache, seed=seed, **sizes)
    kept = {name: array for name, array in feed.items() if name in types}
    return {
        name: array.astype(types[name].numpy()) if array.dtype.kind == "f" else array  # type: ignore[union-attr]
        for name, array in kept.items()
    }


def _compare(
    truth: dict[str, np.ndarray],
    old: dict[str, np.ndarray],
    new: dict[str, np.ndarray],
    cell: Cell,
) -> str | None:
    if list(new) != list(truth):
        return f"outputs {list(new)}, expected {list(truth)}"
    unit = {"fp16": 2.0**-11, "bf16": 2.0**-8}.get(cell.way.rpartition("-")[2], 2.0**-24) * 2
    for name, value in truth.items():
        wide = value.astype(np.float64)
        size = np.abs(wide).max(initial=0)
        own = np.abs(old[name].astype(np.float64) - wide).max(initial=0)
        found = np.abs(new[name].astype(np.float64) - wide).max(initial=0)
        bound = max(2 * own, 16 * unit * size)
        if not found <= bound:
            return f"output '{name}' is off by {found:.3g} of {size:.3g}, {bound:.3g} allowed"
    return None
