"""Token pruning: tokens that little attention goes to become one, their mean weighted by it.

EViT (arXiv 2202.07800): a_i is the attention of the class token to token i, averaged
over heads; the k tokens of largest a_i stay, the others give sum a_i x_i / sum a_i. FastV
(arXiv 2403.06764) takes the last token or all tokens in the place of the class token.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from optimizer.structure import Block
from optimizer.tokens.emit import Emitter, State
from optimizer.tokens.matching import Positioned

#: Attention below this counts as this, so that a sum of nothing is no division by zero.
_LEAST = 1e-6


def received(pen: Emitter, block: Block, state: State, query: int | None) -> ir.Value:
    """[B, N, 1]: the attention that each token gets, averaged over heads and queries.

    Args:
        pen: Where to write.
        block: Whose attention.
        state: The tokens; their mask is that of the attention.
        query: Position of the token that attends; None: all do.
    """
    attention = block.attention
    groups = attention.heads // attention.kv_heads
    queries, keys = attention.node.inputs[0], attention.node.inputs[1]
    if query is not None:
        queries = pen.put("Gather", queries, pen.integers([query]), as_="query", axis=1)
    # [B, S, Hkv, G*c] as [B, Hkv, S*G, c]: queries of one group of heads read the same keys.
    sizes = (attention.kv_heads, groups, attention.head_dim)
    split = pen.put("Reshape", queries, pen.integers([0, 0, *sizes], "heads"))
    turned = pen.put("Transpose", split, perm=(0, 2, 1, 3, 4))
    shape = pen.integers([0, attention.kv_heads, -1, attention.head_dim], "rows")
    rows = pen.put("Reshape", turned, shape)
    split = pen.put("Reshape", keys, pen.integers([0, 0, sizes[0], sizes[2]], "heads"))
    columns = pen.put("Transpose", split, perm=(0, 2, 3, 1))
    scores = pen.put("MatMul", rows, columns, as_="scores")
    scores = pen.put("Mul", scores, pen.numbers(attention.scale, "scale"), as_="scaled")
    if state.mask is not None:
        scores = pen.put("Add", scores, state.mask, as_="masked")
    weights = pen.put("Softmax", scores, axis=-1)
    mean = pen.put("ReduceMean", weights, pen.integers([1, 2], "axes"), keepdims=0)
    column = pen.put("Unsqueeze", mean, pen.integers([2], "axes"), as_="received")
    if state.padded and state.sizes is not None:  # in a first layer the mask does not say it
        real = pen.put("Min", state.sizes, pen.numbers(1, "one"))
        column = pen.put("Mul", column, real, as_="received")
    return pen.put("Max", column, pen.numbers(_LEAST, "least"), as_="received")


def _free(state: State) -> np.ndarray:
    return np.setdiff1d(np.arange(state.count), state.protected)


def fuse_by_index(
    pen: Emitter, x: ir.Value, state: State, weight: ir.Value, r: int
) -> tuple[ir.Value, State]:
    """``x`` with r + 1 tokens of least ``weight`` [B, N, 1] as one, the last of the result."""
    integer, free, first = ir.DataType.INT64, _free(state), len(state.protected)
    stay = len(free) - r - 1
    candidates = pen.integers(free, "free")
    _, order = pen.topk(pen.put("Gather", weight, candidates, axis=1), len(free), axis=1)
    kept, rest = pen.parts(order, stay, r + 1) if stay else (order, order)
    fixed = pen.everywhere(order, state.protected)
    parts = [fixed] if first else []
    if stay:
        rising, _ = pen.topk(kept, stay, axis=1, largest=False)
        parts.append(pen.put("Gather", candidates, rising, dtype=integer, axis=0))
    rest = pen.put("Gather", candidates, rest, as_="rest", dtype=integer, axis=0)
    shares = pen.entries(weight, rest, "shares")
    axes = pen.integers([1], "axes")
    shares = pen.put("Div", shares, pen.put("ReduceSum", shares, axes, keepdims=1))
    turned = pen.put("Transpose", shares, perm=(0, 2, 1))
    merged = pen.put("MatMul", turned, pen.rows(x, rest, "moved"), as_="fused")
    ones = _sizes(pen, state, weight)
    sizes = pen.put("ReduceSum", pen.entries(ones, rest), axes, as_="gone", keepdims=1)
    token, rows = rest, first + stay
    if parts:
        keep = pen.put("Concat", *parts, as_="keep", dtype=integer, axis=1)
        merged = pen.put("Concat", pen.rows(x, keep, "kept"), merged, as_="merged", axis=1)
        sizes = pen.put("Concat", pen.entries(ones, keep), sizes, as_="sizes", axis=1)
        token = pen.put("Concat", keep, rest, dtype=integer, axis=1)
    row = pen.everywhere(order, [*range(rows), *[rows] * (r + 1)])
    now = pen.put("ScatterElements", token, token, row, as_="now", dtype=integer, axis=1)
    return merged, _after(pen, state, sizes, now, rows + 1)


def _sizes(pen: Emitter, state: State, like: ir.Value) -> ir.Value:
    """[B, N, 1]: the sizes, where all are one too."""
    if state.sizes is not None:
        return state.sizes
    zero = pen.put("Sub", like, like)
    return pen.put("Add", zero, pen.numbers(1, "one"), as_="ones")


def _after(pen: Emitter, state: State, sizes: ir.Value, now: ir.Value, rows: int) -> State:
    places = now if state.places is None else pen.entries(now, state.places, "places")
    first = tuple(range(len(state.protected)))
    return replace(state, count=rows, protected=first, sizes=sizes, places=places)


def fused_rows(pen: Emitter, state: State, weight: ir.Value, r: int) -> Positioned:
    """The same as the row of each token, without sorting; shares go by ``weight``."""
    free, first = _free(state), len(state.protected)
    stay = len(free) - r - 1
    order = np.concatenate([np.asarray(state.protected, int), free]).astype(np.int64)
    candidates = pen.put("Gather", weight, pen.integers(free, "free"), axis=1)
    kept = pen.first(candidates, len(free), stay)
    counted = pen.put("Cast", kept, to=pen.dtype)
    triangle = pen.numbers(np.tri(len(free), k=-1), "triangle")
    own = pen.put("Add", pen.put("MatMul", triangle, counted), pen.numbers(first), as_="own")
    rows = pen.put("Where", kept, own, pen.numbers(first + stay, "fused"), as_="free_rows")
    rows = pen.between(rows, np.arange(first), len(free), np.arange(0))
    ordered = pen.put("Gather", weight, pen.integers(order, "order"), axis=1)
    return Positioned(order, rows, ordered)
