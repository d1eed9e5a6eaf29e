"""Bipartite soft matching as graph: which tokens are merged, and into which.

Tokens are counted as they enter a reduction. Protected tokens come first in the result, in their
order; then the unmerged tokens of A in their order, then B (ToMe, arXiv 2210.09461, Appendix D).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer.structure import Attention
from optimizer.tokens.emit import Emitter, State


@dataclass(frozen=True)
class Sides:
    """How tokens are divided before anything is known about them.

    Attributes:
        count: N, the tokens that enter.
        protected: Their indices, rising; never merged, and nothing is merged into them.
    """

    count: int
    protected: tuple[int, ...]

    @property
    def sources(self) -> np.ndarray:
        """A: the tokens with even index."""
        return self._free(0)

    @property
    def destinations(self) -> np.ndarray:
        """B: the tokens with odd index."""
        return self._free(1)

    def _free(self, parity: int) -> np.ndarray:
        return np.setdiff1d(np.arange(parity, self.count, 2), self.protected)

    @property
    def limit(self) -> int:
        """The most tokens that can be merged."""
        most = min(len(self.sources), (self.count - len(self.protected)) // 2)
        return most if len(self.destinations) else 0


@dataclass(frozen=True)
class Gathered:
    """A reduction by indices: token ``sources[b, i]`` goes into row ``targets[b, i]``.

    Attributes:
        keep: int64 [B, M], the token that each row of the result begins with.
        sources: int64 [B, r].
        targets: int64 [B, r].
    """

    keep: ir.Value
    sources: ir.Value
    targets: ir.Value


@dataclass(frozen=True)
class Positioned:
    """A reduction by rows: token ``order[i]`` goes into row ``rows[b, i]`` of the result.

    Attributes:
        order: int64 constant [N], a permutation.
        rows: [B, N], whole numbers in the model's floating-point type.
    """

    order: np.ndarray
    rows: ir.Value


def head_mean(pen: Emitter, attention: Attention, key: ir.Value) -> ir.Value:
    """[B, N, c]: the keys [B, N, Hkv*c] summed over heads, divided by their length.

    The mean of ToMe points the same way as the sum.
    """
    shape = pen.integers([0, 0, attention.kv_heads, attention.head_dim], "heads")
    split = pen.put("Reshape", key, shape)
    total = pen.put("ReduceSum", split, pen.integers([2], "axes"), as_="metric", keepdims=0)
    return normalized(pen, total)


def normalized(pen: Emitter, value: ir.Value) -> ir.Value:
    """Rows of length one; a row of zeros stays."""
    length = pen.put("ReduceL2", value, pen.integers([-1], "axes"), keepdims=1)
    floor = pen.put("Max", length, pen.numbers(1e-6), as_="length")
    return pen.put("Div", value, floor, as_="unit")


def padding_of(pen: Emitter, state: State) -> ir.Value | None:
    """[B, N], 1 where a token is padding; None where there is none."""
    if not state.padded or state.sizes is None:
        return None
    real = pen.put("Greater", state.sizes, pen.numbers(0, "zero"), dtype=ir.DataType.BOOL)
    return _float(pen, pen.put("Not", real, dtype=ir.DataType.BOOL))


def _best(
    pen: Emitter, metric: ir.Value, sides: Sides, padded: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """The similarity of each token of A to the nearest of B, and which that is; both [B, |A|].

    ``padded`` [B, N] (1 where a token is padding) leads padding into padding, before all else.
    """
    a = pen.put("Gather", metric, pen.integers(sides.sources, "a"), as_="a", axis=1)
    b = pen.put("Gather", metric, pen.integers(sides.destinations, "b"), as_="b", axis=1)
    turned = pen.put("Transpose", b, perm=(0, 2, 1))
    scores = pen.put("MatMul", a, turned, as_="scores")
    if padded is not None:
        scores = _padding_apart(pen, scores, sides, padded)
    values, indices = pen.topk(scores, 1)
    axes = pen.integers([2], "axes")
    return (
        pen.put("Squeeze", values, axes, as_="best"),
        pen.put("Squeeze", indices, axes, as_="nearest", dtype=ir.DataType.INT64),
    )


def _padding_apart(pen: Emitter, scores: ir.Value, sides: Sides, padded: ir.Value) -> ir.Value:
    """Adds 4 to the scores of padding, wherever it goes: it weighs nothing in any token.

    Real tokens lose 4 into padding, which has no weight and would move them away from their kind.
    """
    a = pen.put("Gather", padded, pen.integers(sides.sources, "a"), axis=1)
    b = pen.put("Gather", padded, pen.integers(sides.destinations, "b"), axis=1)
    both = pen.put("Sub", pen.unsqueeze(a, 2), pen.unsqueeze(b, 1))
    return pen.put("Add", scores, pen.put("Mul", both, pen.numbers(4)), as_="scores")


def gathered(
    pen: Emitter, metric: ir.Value, sides: Sides, r: int, padded: ir.Value | None = None
) -> Gathered:
    """The ``r`` closest pairs, as indices."""
    best, nearest = _best(pen, metric, sides, padded)
    size, first = len(sides.sources), len(sides.protected)
    _, order = pen.topk(best, size)
    merged, others = _split(pen, order, r, size - r)
    integer = ir.DataType.INT64
    a = pen.integers(sides.sources, "a")
    sources = pen.put("Gather", a, merged, as_="sources", dtype=integer, axis=0)
    offset = pen.integers([first + size - r], "offset")
    targets = pen.put("Add", pen.entries(nearest, merged), offset, as_="targets", dtype=integer)
    fixed = [_everywhere(pen, order, part) for part in (sides.protected, sides.destinations)]
    parts = [part for part in fixed if part is not None]
    if size > r:
        rising, _ = pen.topk(others, size - r, largest=False)
        kept = pen.put("Gather", a, rising, as_="kept", dtype=integer, axis=0)
        parts.insert(1 if first else 0, kept)
    keep = pen.put("Concat", *parts, as_="keep", dtype=integer, axis=1)
    return Gathered(keep, sources, targets)


def _split(pen: Emitter, order: ir.Value, first: int, second: int) -> tuple[ir.Value, ir.Value]:
    """Both parts of [B, first + second]; the second is the whole where it would be empty."""
    if not second:
        return order, order
    zero, middle = pen.integers([0], "start"), pen.integers([first], "middle")
    end, axis = pen.integers([first + second], "end"), pen.integers([1], "axes")
    integer = ir.DataType.INT64
    return (
        pen.put("Slice", order, zero, middle, axis, as_="merged", dtype=integer),
        pen.put("Slice", order, middle, end, axis, as_="others", dtype=integer),
    )


def _everywhere(
    pen: Emitter, like: ir.Value, numbers: tuple[int, ...] | np.ndarray
) -> ir.Value | None:
    """Constant indices [B, len] for the batch of ``like`` [B, n]."""
    if not len(numbers):
        return None
    integer = ir.DataType.INT64
    batch = pen.put("Shape", like, as_="batch", dtype=integer, start=0, end=1)
    shape = pen.put(
        "Concat", batch, pen.integers([len(numbers)]), as_="shape", dtype=integer, axis=0
    )
    row = pen.integers(np.asarray(numbers)[None], "row")
    return pen.put("Expand", row, shape, as_="fixed", dtype=integer)


def positioned(
    pen: Emitter, metric: ir.Value, sides: Sides, r: int, padded: ir.Value | None = None
) -> Positioned:
    """The ``r`` closest pairs, as the row of each token: no sort, no gather by data, no scatter.

    The rank of a pair is the number of pairs that are closer, or equally close and before it.
    """
    best, nearest = _best(pen, metric, sides, padded)
    size, first = len(sides.sources), len(sides.protected)
    mine, theirs = pen.unsqueeze(best, 2), pen.unsqueeze(best, 1)
    flag = ir.DataType.BOOL
    earlier = pen.integers(np.tri(size, k=-1), "earlier")
    before = pen.put("Cast", earlier, dtype=flag, to=flag)
    same = pen.put("And", pen.put("Equal", theirs, mine, dtype=flag), before, dtype=flag)
    closer = pen.put("Or", pen.put("Greater", theirs, mine, dtype=flag), same, dtype=flag)
    axes = pen.integers([2], "axes")
    rank = pen.put("ReduceSum", _float(pen, closer), axes, as_="rank", keepdims=0)
    merged = pen.put("Less", rank, pen.numbers(r), as_="merged", dtype=flag)
    stays = _float(pen, pen.put("Not", merged, dtype=flag))
    triangle = pen.numbers(np.triu(np.ones((size, size)), k=1), "triangle")
    own = pen.put("Add", pen.put("MatMul", stays, triangle), pen.numbers(first), as_="own")
    target = pen.put("Add", _float(pen, nearest), pen.numbers(first + size - r), as_="target")
    a_rows = pen.put("Where", merged, target, own, as_="a_rows")
    # The rows of the others are constants: pad in front and behind.
    last = np.arange(first + size - r, sides.count - r)
    fixed = np.concatenate([np.arange(first), np.zeros(size), last])
    pads = pen.integers([0, first, 0, len(last)], "pads")
    rows = pen.put("Add", pen.put("Pad", a_rows, pads), pen.numbers(fixed, "fixed"), as_="rows")
    order = np.concatenate([np.asarray(sides.protected, int), sides.sources, sides.destinations])
    return Positioned(order.astype(np.int64), rows)


def _float(pen: Emitter, value: ir.Value) -> ir.Value:
    return pen.put("Cast", value, to=pen.dtype)
