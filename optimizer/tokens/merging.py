"""The reduction itself, in two lowerings, and the way back.

Merge:        x'_j = sum_i s_i x_i / sum_i s_i over the tokens i of row j, s'_j = sum_i s_i
              (ToMe, arXiv 2210.09461, Section 3), with s the number of original tokens in each.
Attention:    softmax(q k / sqrt(c) + log s) (the same, eq. 1): each token counts as often as it
              stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from optimizer.tokens.emit import Emitter, State
from optimizer.tokens.matching import Gathered, Parts, Positioned

#: Added to the scores of padding, which has no size; float16 holds it, and exp of it is 0.
CUT = -1e4


def merge(
    pen: Emitter, x: ir.Value, state: State, found: Gathered | Positioned, r: int
) -> tuple[ir.Value, State]:
    """The tokens [B, N - r, D] of ``x`` [B, N, D], and what is known about them."""
    rows = state.count - r
    if isinstance(found, Gathered):
        merged, sizes = _by_index(pen, x, state, found, rows)
        now = _places_by_index(pen, found, rows)
    else:
        merged, sizes = _by_matrix(pen, x, state, found, rows)
        now = _places_by_row(pen, found)
    places = now if state.places is None else pen.entries(now, state.places, "places")
    first = tuple(range(len(state.protected)))
    after = replace(state, count=rows, protected=first, sizes=sizes, places=places)
    return merged, replace(after, origins=_origins(pen, state, found, rows))


def _origins(
    pen: Emitter, state: State, found: Gathered | Positioned, rows: int
) -> ir.Value | None:
    """int64 [B, M, 1]: the original position of the token that each row begins with."""
    if not state.followed:
        return None
    if isinstance(found, Gathered):
        now = found.keep
    elif found.stays is None:
        return None
    else:
        flag, integer = ir.DataType.BOOL, ir.DataType.INT64
        zero, row = pen.numbers(0, "zero"), pen.numbers(np.arange(rows)[:, None], "rows")
        column = pen.put("Transpose", found.rows, perm=(0, 2, 1))
        here = pen.put("Equal", column, row, dtype=flag)
        own = pen.put("Where", here, pen.put("Transpose", found.stays, perm=(0, 2, 1)), zero)
        _, first = pen.topk(own, 1)
        order = pen.integers(found.order, "order")
        now = pen.put("Gather", order, first, as_="origins", dtype=integer, axis=0)
    return now if state.origins is None else pen.entries(state.origins, now, "origins")


def _by_index(
    pen: Emitter, x: ir.Value, state: State, found: Gathered, rows: int
) -> tuple[ir.Value, ir.Value]:
    """Rows are copied; what goes into them is added by a product with a narrow matrix [M, r].

    A scatter that adds would need one index per number, and runs in one thread.
    """
    parts = found.parts
    moved, taking = pen.rows(x, found.sources, "moved"), range(rows)
    own = brought = pen.numbers(1, "one")
    if state.sizes is not None:
        brought = pen.put("Transpose", pen.entries(state.sizes, found.sources), perm=(0, 2, 1))
    if parts is None:
        kept = pen.rows(x, found.keep, "kept")
        own = own if state.sizes is None else pen.entries(state.sizes, found.keep)
    else:
        taking = range(rows - len(parts.destinations), rows)
        kept = _fixed(pen, x, parts.destinations)
        own = own if state.sizes is None else _fixed(pen, state.sizes, parts.destinations)
    row = pen.integers(np.array(taking)[:, None], "rows")
    targets = pen.put("Transpose", found.targets, dtype=ir.DataType.INT64, perm=(0, 2, 1))
    here = pen.put("Equal", targets, row, dtype=ir.DataType.BOOL)
    weights = pen.put("Where", here, brought, pen.numbers(0, "zero"), as_="weights")
    added = pen.put("ReduceSum", weights, pen.integers([2], "axes"), as_="added", keepdims=1)
    sizes = pen.put("Add", added, own, as_="sizes")
    divisor = _divisor(pen, sizes, state)
    if found.importance is not None:
        own, weights = _ensemble(pen, found, here, own, weights)
    share = pen.put("Div", own, divisor, as_="share")
    sums = pen.put("MatMul", pen.put("Div", weights, divisor, as_="weights"), moved, as_="sums")
    merged = pen.put("Add", pen.put("Mul", kept, share), sums, as_="merged")
    if parts is None:
        return merged, sizes
    return _joined(pen, x, state, parts, merged, sizes, taking.start)


def _fixed(pen: Emitter, value: ir.Value, tokens: Sequence[int] | np.ndarray) -> ir.Value:
    return pen.put("Gather", value, pen.integers(tokens), dtype=value.dtype, axis=1)


def _joined(
    pen: Emitter,
    x: ir.Value,
    state: State,
    parts: Parts,
    merged: ir.Value,
    sizes: ir.Value,
    still: int,
) -> tuple[ir.Value, ir.Value]:
    """All rows and sizes, the ``still`` that take nothing in before ``merged`` and ``sizes``."""
    tokens = [_fixed(pen, x, parts.protected)] if parts.protected else []
    if parts.kept is not None:
        tokens.append(pen.rows(x, parts.kept, "kept"))
    if not tokens:
        return merged, sizes
    whole = pen.put("Concat", *tokens, merged, as_="merged", axis=1)
    if state.sizes is None:  # one each
        pads = pen.integers([0, still, 0, 0, 0, 0], "pads")
        return whole, pen.put("Pad", sizes, pads, pen.numbers(1, "one"), as_="sizes")
    counts = [_fixed(pen, state.sizes, parts.protected)] if parts.protected else []
    if parts.kept is not None:
        counts.append(pen.entries(state.sizes, parts.kept))
    return whole, pen.put("Concat", *counts, sizes, as_="sizes", axis=1)


def _ensemble(
    pen: Emitter, found: Gathered, here: ir.Value, own: ir.Value, weights: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Weights of tokens that stay [B, M, 1] and of those that go into them [B, M, r].

    CrossGET (arXiv 2305.17455), cross-guided ensemble: with w = softmax(I_i, I_j) the sum of row j
    gets 2 w_0 s_i x_i + (2 w_1 - 1) s_j x_j for each token i that goes into it.
    """
    assert found.importance is not None  # noqa: S101 - asked for only then
    mine = pen.entries(found.importance, found.sources)
    theirs = pen.entries(pen.entries(found.importance, found.keep), found.targets)
    share = pen.put("Sigmoid", pen.put("Sub", mine, theirs))  # softmax of two
    twice = pen.put("Mul", share, pen.numbers(2, "two"), as_="twice")
    turned = pen.put("Transpose", twice, perm=(0, 2, 1))
    rest = pen.put("Sub", pen.numbers(1, "one"), turned)
    rest = pen.put("Where", here, rest, pen.numbers(0, "zero"))
    more = pen.put("ReduceSum", rest, pen.integers([2], "axes"), keepdims=1)
    factor = pen.put("Add", more, pen.numbers(1, "one"), as_="factor")
    return pen.put("Mul", own, factor), pen.put("Mul", weights, turned, as_="weights")


def _shared(pen: Emitter, found: Positioned, here: ir.Value, matrix: ir.Value) -> ir.Value:
    """``matrix`` [B, M, N] of sizes with the weights of ``_ensemble``."""
    assert found.shares is not None  # noqa: S101 - asked for only then
    twice = pen.put("Transpose", found.shares, perm=(0, 2, 1))
    zero, one = pen.numbers(0, "zero"), pen.numbers(1, "one")
    merged = pen.put("Greater", twice, zero, dtype=ir.DataType.BOOL)
    rest = pen.put("Where", merged, pen.put("Sub", one, twice), zero)
    rest = pen.put("Where", here, rest, zero)
    more = pen.put("ReduceSum", rest, pen.integers([2], "axes"), keepdims=1)
    factor = pen.put("Where", merged, twice, pen.put("Add", more, one), as_="factor")
    return pen.put("Mul", matrix, factor, as_="matrix")


def _by_matrix(
    pen: Emitter, x: ir.Value, state: State, found: Positioned, rows: int
) -> tuple[ir.Value, ir.Value]:
    """One product with the merge matrix [M, N] of zeros and shares."""
    order = pen.integers(found.order, "order")
    x = pen.put("Gather", x, order, as_="ordered", dtype=x.dtype, axis=1)
    row = pen.numbers(np.arange(rows)[:, None], "rows")
    column = pen.put("Transpose", found.rows, perm=(0, 2, 1))
    here = pen.put("Equal", column, row, dtype=ir.DataType.BOOL)
    zero, axes = pen.numbers(0, "zero"), pen.integers([2], "axes")
    sizes_in = pen.numbers(1, "one")
    if state.sizes is not None:
        ordered = pen.put("Gather", state.sizes, order, axis=1)
        sizes_in = pen.put("Transpose", ordered, perm=(0, 2, 1))
    matrix = pen.put("Where", here, sizes_in, zero, as_="matrix")
    sizes = pen.put("ReduceSum", matrix, axes, as_="sizes", keepdims=1)
    total = _divisor(pen, sizes, state)
    if found.weights is not None:
        weights = pen.put("Transpose", found.weights, perm=(0, 2, 1))
        matrix = pen.put("Where", here, weights, zero, as_="matrix")
        total = pen.put("ReduceSum", matrix, axes, as_="total", keepdims=1)
    if found.shares is not None:
        matrix = _shared(pen, found, here, matrix)
    shares = pen.put("Div", matrix, total, as_="shares")
    return pen.put("MatMul", shares, x, as_="merged"), sizes


def _divisor(pen: Emitter, sizes: ir.Value, state: State) -> ir.Value:
    """Sizes that can be divided by; those of real tokens are 1 or more."""
    return pen.put("Max", sizes, pen.numbers(1, "one")) if state.padded else sizes


def _places_by_index(pen: Emitter, found: Gathered, rows: int) -> ir.Value:
    """int64 [B, N, 1]: the row that each token is in; every entry is written once."""
    integer = ir.DataType.INT64
    nothing = pen.put("Sub", found.keep, found.keep, dtype=integer)
    own = pen.put("Add", nothing, pen.integers(np.arange(rows)[:, None], "rows"), dtype=integer)
    token = pen.put("Concat", found.keep, found.sources, dtype=integer, axis=1)
    row = pen.put("Concat", own, found.targets, dtype=integer, axis=1)
    return pen.put("ScatterElements", token, token, row, as_="places", dtype=integer, axis=1)


def _places_by_row(pen: Emitter, found: Positioned) -> ir.Value:
    back = pen.integers(np.argsort(found.order), "back")
    rows = pen.put("Gather", found.rows, back, axis=1)
    integer = ir.DataType.INT64
    return pen.put("Cast", rows, as_="places", dtype=integer, to=integer)


def size_mask(pen: Emitter, state: State, *, proportional: bool) -> ir.Value | None:
    """Log s as an additive attention mask [B, 1, 1, N]; padding, which has no size, is hidden.

    None where there is nothing to add: tokens count once (not ``proportional``) and none is hidden.
    """
    assert state.sizes is not None  # noqa: S101 - asked for after a reduction
    if not proportional and not state.padded:
        return None
    divisor = _divisor(pen, state.sizes, state)
    logs = pen.put("Log", divisor, as_="log_sizes") if proportional else pen.numbers(0, "zero")
    if state.padded:
        real = pen.put("Greater", state.sizes, pen.numbers(0, "zero"), dtype=ir.DataType.BOOL)
        logs = pen.put("Where", real, logs, pen.numbers(CUT, "cut"), as_="log_sizes")
    turned = pen.put("Transpose", logs, perm=(0, 2, 1))
    return pen.put("Unsqueeze", turned, pen.integers([1], "axes"), as_="size_mask")
