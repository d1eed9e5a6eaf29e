"""Brings what an attention adds to its scores, or puts in their place, into one mask.

Attention takes one mask: bool (True = attend) or float (added to the scores). A mask that is 0 or
the smallest number becomes bool. A float constant like -10000 stays a float mask, because a large
score could outweigh it.

Rows without any allowed key: Attention gives zeros there (ONNX Attention-23), adding the smallest
number to every score gives the mean of all values instead. Only a query that may attend to nothing,
that is padding, has such a row, and no valid token reads it, because padding is masked as a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import node_of, operand
from optimizer.raising.dims import Dim, Shape
from optimizer.raising.shapes import Shapes

_DTYPES = {"And": ir.DataType.BOOL, "Not": ir.DataType.BOOL, "Shape": ir.DataType.INT64}


@dataclass(frozen=True)
class Part:
    """One thing that masks the scores.

    Attributes:
        value: What is added to the scores, or the condition that chooses them.
        keeps: None for an added value; else the value of the condition that keeps the scores.
    """

    value: ir.Value
    keeps: bool | None = None

    @property
    def adds(self) -> bool:
        """Whether numbers are added to the scores, and not only some scores left out."""
        return self.keeps is None and _chosen(self.value) is None


def is_lowest(value: ir.Value | None) -> bool:
    """Whether a constant is minus infinity or near the smallest finite number of its type.

    Half of the smallest number is as good, and in a wider type the smallest of float16 is: no sum
    with a finite score of ordinary size leaves the range in which exp gives 0.
    """
    tensor = graphs.constant(value)
    number = graphs.scalar(value)
    if tensor is None or number is None or not tensor.dtype.is_floating_point():
        return False
    least = float(np.finfo(np.float16).min)
    return number <= (least / 2 if tensor.dtype is ir.DataType.FLOAT16 else least)


def _chosen(value: ir.Value) -> tuple[ir.Value, bool] | None:
    """(condition, its value where the scores count) of what is 0 or the smallest number."""
    where = node_of(value, "Where")
    if where is None:
        return None
    condition, chosen, rest = (operand(where, index) for index in range(3))
    if graphs.scalar(chosen) == 0 and is_lowest(rest):
        return condition, True
    if graphs.scalar(rest) == 0 and is_lowest(chosen):
        return condition, False
    return None


def _may_widen(size: Dim, mask: Dim) -> bool:
    """Whether a mask of this length could broadcast scores of this one, for some feed.

    Two different names are taken for the same length, of which only the proof is missing.
    """
    return mask not in (1, size) and (size == 1 or isinstance(mask, int))


class Masks:
    """Combines mask parts, each combination only once per graph.

    Sites must come in graph order: what is made for a site is used by later ones.
    """

    def __init__(self, graph: ir.Graph, shapes: Shapes) -> None:
        self._graph = graph
        self._shapes = shapes
        self._made: dict[object, ir.Value] = {}

    def refusal(self, parts: Sequence[Part], scores: Shape | None) -> str | None:
        """Why ``combine`` cannot be asked for one mask of ``parts``; nothing is written.

        Args:
            parts: Of one attention.
            scores: [B, H, S, T].
        """
        if not parts:
            return None
        shapes = [self._shapes.of(part.value) for part in parts]
        whole = self._shapes.broadcast(parts[0].value, shapes)
        if whole is None or scores is None or len(whole) > 4:
            return "the rank of the mask is not known"
        padded = (1,) * (len(scores) - len(whole)) + whole
        if padded[-1] == 1 != scores[-1]:
            return "the mask does not span the keys"
        if any(map(_may_widen, scores, padded)):
            return "the mask may have more rows or heads than the scores"
        return None

    def combine(self, parts: Sequence[Part], anchor: ir.Node) -> ir.Value | None:
        """One mask value of ``parts``, for which ``refusal`` found nothing; None without any."""
        bools: list[ir.Value] = []
        floats: list[ir.Value] = []
        for part in parts:
            condition = self._condition(part, anchor)
            (floats if condition is None else bools).append(
                part.value if condition is None else condition
            )
        keep = self._chain(list(dict.fromkeys(bools)), "And", anchor)
        added = self._chain(floats, "Add", anchor)
        if keep is None or added is None:
            return keep if added is None else added
        number = np.array(-np.inf, (added.dtype or ir.DataType.FLOAT).numpy())
        lowest = graphs.add_initializer(self._graph, "lowest", number)
        return self._once("Where", [keep, added, lowest], anchor)

    def _condition(self, part: Part, anchor: ir.Node) -> ir.Value | None:
        """The bool value that is True where the scores count; None for a float mask."""
        if part.keeps is not None:
            return part.value if part.keeps else self._once("Not", [part.value], anchor)
        found = _chosen(part.value)
        if found is None:
            return None
        condition, keeps = found
        return condition if keeps else self._once("Not", [condition], anchor)

    def _chain(self, values: list[ir.Value], op_type: str, anchor: ir.Node) -> ir.Value | None:
        result: ir.Value | None = None
        for value in values:
            result = value if result is None else self._once(op_type, [result, value], anchor)
        return result

    def fitted(
        self, mask: ir.Value, query: ir.Value, rows: Dim, anchor: ir.Node, axis: int = 1
    ) -> ir.Value:
        """The mask with the queries' axis written out, and with rank 2 to 4.

        ONNX lets the axis of the queries be 1; ONNX Runtime 1.31 refuses such a mask.

        Args:
            mask: Broadcastable to [B, H, S, T].
            query: [B, S, H*c], or with ``axis`` 2 [B, H, S, c].
            rows: S.
            anchor: The first site of the mask.
            axis: Where S is in ``query``.
        """
        shape = self._shapes.of(mask)
        if shape is None or (len(shape) >= 2 and shape[-2] == rows):
            return mask
        if len(shape) >= 2 and shape[-2] != 1:
            return mask  # equal to S for every valid feed, only the proof is missing
        key = "rows", mask, rows
        if key not in self._made:
            size = self._once("Shape", [query], anchor, start=axis, end=axis + 1)
            one = graphs.add_initializer(self._graph, "one", np.ones(1, np.int64))
            target = self._once("Concat", [size, one], anchor, axis=0)
            self._made[key] = self._once("Expand", [mask, target], anchor)
        return self._made[key]

    def _once(
        self, op_type: str, inputs: list[ir.Value], anchor: ir.Node, **attributes: int
    ) -> ir.Value:
        key = op_type, tuple(inputs), tuple(attributes.items())
        if key not in self._made:
            name = f"{inputs[0].name}_{op_type.lower()}"
            dtype = _DTYPES.get(
                op_type, inputs[-1].dtype if op_type == "Where" else inputs[0].dtype
            )
            self._made[key] = graphs.insert(
                self._graph, anchor, op_type, inputs, attributes, name=name, dtype=dtype
            )
        return self._made[key]
