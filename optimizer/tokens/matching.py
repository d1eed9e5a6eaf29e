"""Bipartite soft matching as graph: which tokens are merged, and into which.

Tokens are counted as they enter a reduction. Protected tokens come first in the result, in their
order; then the unmerged tokens of A in their order, then B (ToMe, arXiv 2210.09461, its
pseudocode).
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
class Parts:
    """The rows of a result in three parts; only the last takes tokens in.

    Attributes:
        protected: The tokens that the first rows are.
        kept: int64 [B, K, 1], the tokens that the next rows are; None: no rows.
        destinations: The tokens that the last rows begin with.
    """

    protected: tuple[int, ...]
    kept: ir.Value | None
    destinations: np.ndarray


@dataclass(frozen=True)
class Gathered:
    """A reduction by indices: token ``sources[b, i, 0]`` goes into row ``targets[b, i, 0]``.

    Attributes:
        keep: int64 [B, M, 1], the token that each row of the result begins with.
        sources: int64 [B, r, 1].
        targets: int64 [B, r, 1].
        importance: [B, N, 1], where merged tokens weigh by it; None: by size alone.
        parts: The rows of ``keep`` in parts, where it is known which take nothing in.
    """

    keep: ir.Value
    sources: ir.Value
    targets: ir.Value
    importance: ir.Value | None = None
    parts: Parts | None = None


@dataclass(frozen=True)
class Positioned:
    """A reduction by rows: token ``order[i]`` goes into row ``rows[b, i]`` of the result.

    Attributes:
        order: int64 constant [N], a permutation.
        rows: [B, N, 1], whole numbers in the model's floating-point type.
        weights: [B, N, 1], above 0, of token ``order[i]`` in its row; None: the sizes.
        shares: [B, N, 1], for each token that is merged into another, twice its weight beside it;
            0 for the others; None: 1 for all.
        stays: [B, N, 1], 1 where token ``order[i]`` is the one that its row begins with, else 0;
            None: a row begins with no token.
    """

    order: np.ndarray
    rows: ir.Value
    weights: ir.Value | None = None
    shares: ir.Value | None = None
    stays: ir.Value | None = None


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
    return pen.put("LpNormalization", value, as_="unit", axis=-1, p=2)


def padding_of(pen: Emitter, state: State) -> ir.Value | None:
    """[B, N, 1], 1 where a token is padding; None where there is none."""
    if not state.padded or state.sizes is None:
        return None
    real = pen.put("Greater", state.sizes, pen.numbers(0, "zero"), dtype=ir.DataType.BOOL)
    return _float(pen, pen.put("Not", real, dtype=ir.DataType.BOOL))


def _best(
    pen: Emitter, metric: ir.Value, sides: Sides, padded: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """The similarity of each token of A to the nearest of B, and which that is; both [B, |A|, 1].

    ``padded`` [B, N, 1] is 1 where a token is padding.
    """
    a, b = _parts(pen, metric, sides)
    scores = pen.put("MatMul", a, pen.put("Transpose", b, perm=(0, 2, 1)), as_="scores")
    if padded is not None:
        a, b = _parts(pen, padded, sides)
        both = pen.put("Sub", a, pen.put("Transpose", b, perm=(0, 2, 1)))
        # Padding weighs nothing, wherever it goes: it goes first, and into no other padding.
        # Nothing real goes into padding if it can be helped.
        scores = pen.put("Add", scores, pen.put("Mul", both, pen.numbers(4)), as_="scores")
    return pen.topk(scores, 1)


def _parts(pen: Emitter, value: ir.Value, sides: Sides) -> tuple[ir.Value, ir.Value]:
    a, b = pen.integers(sides.sources, "a"), pen.integers(sides.destinations, "b")
    return pen.put("Gather", value, a, as_="a", axis=1), pen.put("Gather", value, b, axis=1)


def gathered(
    pen: Emitter, metric: ir.Value, sides: Sides, r: int, padded: ir.Value | None = None
) -> Gathered:
    """The ``r`` closest pairs, as indices."""
    best, nearest = _best(pen, metric, sides, padded)
    size, first = len(sides.sources), len(sides.protected)
    _, order = pen.topk(best, size, axis=1)
    merged, others = pen.parts(order, r, size - r)
    integer = ir.DataType.INT64
    a = pen.integers(sides.sources, "a")
    sources = pen.put("Gather", a, merged, as_="sources", dtype=integer, axis=0)
    offset = pen.integers([first + size - r], "offset")
    targets = pen.put("Add", pen.entries(nearest, merged), offset, as_="targets", dtype=integer)
    parts = [pen.everywhere(order, sides.protected)] if first else []
    kept = None
    if size > r:
        rising, _ = pen.topk(others, size - r, axis=1, largest=False)
        kept = pen.put("Gather", a, rising, as_="kept", dtype=integer, axis=0)
        parts.append(kept)
    parts.append(pen.everywhere(order, sides.destinations))
    keep = pen.put("Concat", *parts, as_="keep", dtype=integer, axis=1)
    known = None if padded is not None else Parts(sides.protected, kept, sides.destinations)
    return Gathered(keep, sources, targets, parts=known)


def positioned(
    pen: Emitter, metric: ir.Value, sides: Sides, r: int, padded: ir.Value | None = None
) -> Positioned:
    """The ``r`` closest pairs, as the row of each token: no sort, no gather by data, no scatter."""
    best, nearest = _best(pen, metric, sides, padded)
    size, first = len(sides.sources), len(sides.protected)
    flag = ir.DataType.BOOL
    merged = pen.first(best, size, r)
    stays = _float(pen, pen.put("Not", merged, dtype=flag))
    triangle = pen.numbers(np.tri(size, k=-1), "triangle")
    own = pen.put("Add", pen.put("MatMul", triangle, stays), pen.numbers(first), as_="own")
    target = pen.put("Add", _float(pen, nearest), pen.numbers(first + size - r), as_="target")
    a_rows = pen.put("Where", merged, target, own, as_="a_rows")
    last = np.arange(first + size - r, sides.count - r)
    rows = pen.between(a_rows, np.arange(first), size, last)
    order = np.concatenate([np.asarray(sides.protected, int), sides.sources, sides.destinations])
    begins = pen.between(stays, np.ones(first), size, np.ones(len(last)))
    return Positioned(order.astype(np.int64), rows, stays=begins)


def _float(pen: Emitter, value: ir.Value) -> ir.Value:
    return pen.put("Cast", value, to=pen.dtype)
