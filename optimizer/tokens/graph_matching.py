"""Complete-graph soft matching: any token may be merged into any other, in one step.

CrossGET (arXiv 2305.17455). Tokens are ranked by their similarity to
the nearest other one; an edge may only lead to a token of higher rank number, so no two tokens wish
to be merged into each other. What is left keeps its order, as causal attention needs it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer.tokens.emit import Emitter
from optimizer.tokens.matching import Gathered, Positioned

#: Below every cosine, and below every cosine minus another.
_NEVER = -4.0


@dataclass(frozen=True)
class Line:
    """Tokens in their order: protected ones in front and behind, the others between.

    Attributes:
        count: N.
        front, behind: How many are protected at either end.
    """

    count: int
    front: int
    behind: int

    @classmethod
    def of(cls, count: int, protected: tuple[int, ...]) -> Line | None:
        """None where a protected token has others on both sides."""
        front = next((i for i in range(count) if i not in protected), count)
        behind = len(protected) - front
        fits = protected == (*range(front), *range(count - behind, count))
        return cls(count, front, behind) if fits else None

    @property
    def free(self) -> int:
        """Tokens that may be merged."""
        return self.count - self.front - self.behind

    @property
    def limit(self) -> int:
        """The most that one reduction can take: half."""
        return self.free // 2

    def protected(self, count: int) -> tuple[int, ...]:
        """The positions of protected tokens when ``count`` are left."""
        return (*range(self.front), *range(count - self.behind, count))


@dataclass(frozen=True)
class Scores:
    """What is known of the F free tokens.

    Attributes:
        unit: [B, F, C], keys of length one.
        similarity: [B, F, F], their cosines.
        priority: [B, F, 1], high where a token is to be merged: the similarity to the nearest
            token that an edge may lead to, minus its importance.
        kept: [B, F, 1], 1 for a token that is protected in its row of the batch; or None.
    """

    unit: ir.Value
    similarity: ir.Value
    priority: ir.Value
    kept: ir.Value | None = None


def scores(
    pen: Emitter,
    unit: ir.Value,
    line: Line,
    importance: ir.Value | None,
    padded: ir.Value | None,
    taken: ir.Value | None = None,
) -> Scores:
    """Steps 1 to 4 of the algorithm.

    Args:
        pen: Where to write.
        unit: [B, N, C], keys of length one.
        line: The tokens.
        importance: [B, N, 1], or None for none.
        padded: [B, N, 1], 1 where a token is padding, which is merged first; or None.
        taken: [B, N, 1], 1 for a free token that is protected in its row of the batch; or None.
    """
    keys = _free(pen, unit, line)
    size = line.free
    similarity = pen.put("MatMul", keys, pen.put("Transpose", keys, perm=(0, 2, 1)), as_="cosine")
    kept = None if taken is None else _free(pen, taken, line)
    if kept is not None:
        similarity = _without(pen, _without(pen, similarity, kept), kept, columns=True)
    others = pen.put("Add", similarity, pen.numbers(_NEVER * np.eye(size), "diagonal"))
    axes = pen.integers([2], "axes")
    nearest = pen.put("ReduceMax", others, axes, as_="nearest", keepdims=1)
    theirs = pen.put("Transpose", nearest, perm=(0, 2, 1))
    flag = ir.DataType.BOOL
    later = pen.flags(np.triu(np.ones((size, size)), k=1), "later")
    same = pen.put("And", pen.put("Equal", theirs, nearest, dtype=flag), later, dtype=flag)
    allowed = pen.put("Or", pen.put("Less", theirs, nearest, dtype=flag), same, dtype=flag)
    edges = pen.put("Where", allowed, similarity, pen.numbers(_NEVER, "never"), as_="edges")
    priority = pen.put("ReduceMax", edges, axes, as_="priority", keepdims=1)
    if importance is not None:
        priority = pen.put("Sub", priority, _free(pen, importance, line), as_="priority")
    if padded is not None:
        first = pen.put("Mul", _free(pen, padded, line), pen.numbers(-2 * _NEVER))
        priority = pen.put("Add", priority, first, as_="priority")
    if kept is not None:
        priority = _without(pen, priority, kept)
    return Scores(keys, similarity, priority, kept)


def _without(pen: Emitter, value: ir.Value, kept: ir.Value, *, columns: bool = False) -> ir.Value:
    """``value`` [B, F, .] lower than all others in the rows, or columns, of ``kept`` [B, F, 1]."""
    turned = pen.put("Transpose", kept, perm=(0, 2, 1)) if columns else kept
    return pen.put("Add", value, pen.put("Mul", turned, pen.numbers(4 * _NEVER)), as_="without")


def _free(pen: Emitter, value: ir.Value, line: Line) -> ir.Value:
    """[B, F, .] of [B, N, .]."""
    if line.free == line.count:
        return value
    bounds = (line.front, line.front + line.free, 1)
    start, end, axis = (pen.integers([number]) for number in bounds)
    return pen.put("Slice", value, start, end, axis, as_="free", dtype=value.dtype)


def gathered(
    pen: Emitter, found: Scores, line: Line, r: int, ensemble: ir.Value | None
) -> Gathered:
    """Step 5: the ``r`` tokens of highest priority go into the nearest of the others.

    ``ensemble``: importance [B, N, 1] that merged tokens weigh by (step 6), or None.
    """
    integer, size = ir.DataType.INT64, line.free
    _, order = pen.topk(found.priority, size, axis=1)
    merged, others = pen.parts(order, r, size - r)
    rising, _ = pen.topk(others, size - r, axis=1, largest=False)
    sources = pen.rows(found.unit, merged, "sources_unit")
    targets = pen.put("Transpose", pen.rows(found.unit, rising, "targets_unit"), perm=(0, 2, 1))
    near = pen.put("MatMul", sources, targets)
    if found.kept is not None:
        near = _without(pen, near, pen.entries(found.kept, rising), columns=True)
    _, nearest = pen.topk(near, 1)
    front = pen.integers([line.front], "front")
    ends = [pen.everywhere(order, np.arange(line.front))] if line.front else []
    keep = [*ends, pen.put("Add", rising, front, dtype=integer)]
    if line.behind:
        keep.append(pen.everywhere(order, np.arange(line.front + size, line.count)))
    return Gathered(
        pen.put("Concat", *keep, as_="keep", dtype=integer, axis=1) if keep[1:] else keep[0],
        pen.put("Add", merged, front, as_="sources", dtype=integer),
        pen.put("Add", nearest, front, as_="targets", dtype=integer),
        ensemble,
    )


def positioned(
    pen: Emitter, found: Scores, line: Line, r: int, ensemble: ir.Value | None
) -> Positioned:
    """The same as the row of each token, without sorting."""
    size = line.free
    merged = pen.first(found.priority, size, r)
    flag = ir.DataType.BOOL
    stays = pen.put("Cast", pen.put("Not", merged, dtype=flag), to=pen.dtype)
    triangle = pen.numbers(np.tri(size, k=-1), "triangle")
    before = pen.put("MatMul", triangle, stays)
    own = pen.put("Add", before, pen.numbers(line.front, "front"), as_="own")
    column = pen.put("Transpose", merged, dtype=flag, perm=(0, 2, 1))
    never = pen.numbers(16 * _NEVER, "never")
    _, nearest = pen.topk(pen.put("Where", column, never, found.similarity), 1)
    target = pen.entries(own, nearest, "target")
    shares = None
    if ensemble is not None:
        mine = _free(pen, ensemble, line)
        theirs = pen.entries(mine, nearest)
        twice = pen.put("Mul", pen.put("Sigmoid", pen.put("Sub", mine, theirs)), pen.numbers(2))
        twice = pen.put("Where", merged, twice, pen.numbers(0, "zero"))
        nothing = np.zeros(line.front), np.zeros(line.behind)
        shares = pen.between(twice, nothing[0], size, nothing[1])
    rows = pen.put("Where", merged, target, own, as_="free_rows")
    rows = pen.between(
        rows, np.arange(line.front), size, np.arange(line.behind) + size - r + line.front
    )
    begins = pen.between(stays, np.ones(line.front), size, np.ones(line.behind))
    return Positioned(np.arange(line.count), rows, None, shares, begins)
