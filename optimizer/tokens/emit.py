"""What reductions are written with: nodes in front of an anchor, and what is known of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs

#: Marks that a reduction was written, on the model: a second run changes nothing.
NOTE = "optimize.tokens"


@dataclass(frozen=True)
class State:
    """The tokens at one place of the model.

    Attributes:
        count: How many.
        protected: The positions of protected tokens, rising.
        sizes: [B, count, 1], how many original tokens each stands for; None: each for itself.
        places: int64 [B, N, 1], where each original token is now; None: where it was.
        padded: Whether some tokens may have size 0.
        mask: [B, 1, 1, count], what the attentions here add to their scores; None: nothing.
        origins: int64 [B, count, 1], where the token that others went into was; None: here.
        followed: Whether somebody reads ``origins``.
        taken: [B, count, 1], 1 for a token that is protected in each row by itself; None: none is.
    """

    count: int
    protected: tuple[int, ...]
    sizes: ir.Value | None = None
    places: ir.Value | None = None
    padded: bool = False
    mask: ir.Value | None = None
    origins: ir.Value | None = None
    followed: bool = False
    taken: ir.Value | None = None


class Emitter:
    """Inserts nodes before ``anchor``, named after ``name``, of element type ``dtype``."""

    def __init__(self, graph: ir.Graph, anchor: ir.Node | None, name: str, dtype: Any) -> None:
        self.graph, self.anchor, self.name, self.dtype = graph, anchor, name, dtype
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._zero: ir.Value | None = None

    def put(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        as_: str = "",
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """One node with one output of type ``dtype``, that of the emitter by default."""
        name = f"{self.name}/{as_ or op_type.lower()}"
        return graphs.insert(
            self.graph, self.anchor, op_type, inputs, attributes, name=name,
            dtype=dtype or self.dtype,
        )  # fmt: skip

    def integers(self, numbers: Sequence[int] | np.ndarray, as_: str = "index") -> ir.Value:
        """An int64 constant; equal ones are shared."""
        return self._constant(np.asarray(numbers, np.int64), as_)

    def numbers(self, array: Any, as_: str = "number") -> ir.Value:
        """A constant of the emitter's element type."""
        return self._constant(np.asarray(array, self.dtype.numpy()), as_)

    def flags(self, array: Any, as_: str) -> ir.Value:
        """A bool constant."""
        return self._constant(np.asarray(array, np.bool_), as_)

    def _constant(self, array: np.ndarray, as_: str) -> ir.Value:
        key = (array.dtype, array.shape, array.tobytes())
        if key not in self._constants:
            made = graphs.add_initializer(self.graph, f"{self.name}/{as_}", array)
            self._constants[key] = made
        return self._constants[key]

    def topk(
        self, value: ir.Value, k: int, *, axis: int = -1, largest: bool = True
    ) -> tuple[ir.Value, ir.Value]:
        """The ``k`` largest (or smallest) in order, and where they were; ties: the lower first."""
        values, indices = graphs.insert(
            self.graph, self.anchor, "TopK", (value, self.integers([k], "k")),
            {"axis": axis, "largest": int(largest), "sorted": 1}, name=f"{self.name}/topk",
            outputs=2, dtype=(value.dtype, ir.DataType.INT64),
        )  # fmt: skip
        return values, indices

    def rows(self, value: ir.Value, index: ir.Value, as_: str) -> ir.Value:
        """[B, M, D] of ``value`` [B, N, D] and int64 ``index`` [B, M, 1]."""
        return self.put("GatherND", value, index, as_=as_, dtype=value.dtype, batch_dims=1)

    def entries(self, value: ir.Value, index: ir.Value, as_: str = "entries") -> ir.Value:
        """[B, M, 1] of ``value`` [B, N, 1] and int64 ``index`` [B, M, 1]."""
        return self.put("GatherElements", value, index, as_=as_, dtype=value.dtype, axis=1)

    def parts(self, value: ir.Value, first: int, second: int) -> tuple[ir.Value, ir.Value]:
        """Both parts of [B, first + second, 1]; the whole twice where the second is empty."""
        if not second:
            return value, value
        made = graphs.insert(
            self.graph, self.anchor, "Split", (value, self.integers([first, second], "split")),
            {"axis": 1}, name=f"{self.name}/part", outputs=2, dtype=(value.dtype, value.dtype),
        )  # fmt: skip
        return made[0], made[1]

    def everywhere(self, like: ir.Value, numbers: Sequence[int] | np.ndarray) -> ir.Value:
        """int64 constants [B, len, 1] for the batch of ``like`` [B, N, 1], int64."""
        if self._zero is None:
            start, end = self.integers([0], "start"), self.integers([1], "end")
            one = self.put("Slice", like, start, end, end, as_="one", dtype=like.dtype)
            self._zero = self.put("Sub", one, one, as_="zero", dtype=like.dtype)
        column = self.integers(np.asarray(numbers, int)[:, None], "column")
        return self.put("Add", self._zero, column, as_="fixed", dtype=like.dtype)

    def first(self, value: ir.Value, size: int, count: int) -> ir.Value:
        """Bool [B, size, 1]: the ``count`` largest of ``value`` [B, size, 1]; ties: the lower.

        The rank of a number is how many are larger, or equal and before it: no sort is needed.
        """
        flag = ir.DataType.BOOL
        others = self.put("Transpose", value, perm=(0, 2, 1))
        earlier = self.flags(np.tri(size, k=-1), "earlier")
        same = self.put("And", self.put("Equal", others, value, dtype=flag), earlier, dtype=flag)
        larger = self.put("Or", self.put("Greater", others, value, dtype=flag), same, dtype=flag)
        counted = self.put("Cast", larger, to=self.dtype)
        rank = self.put("ReduceSum", counted, self.integers([2], "axes"), as_="rank", keepdims=1)
        return self.put("Less", rank, self.numbers(count), as_="first", dtype=flag)

    def between(
        self, value: ir.Value, before: np.ndarray, size: int, after: np.ndarray
    ) -> ir.Value:
        """[B, N, 1]: ``value`` [B, size, 1] with constants before and after it."""
        if not len(before) + len(after):
            return value
        pads = self.integers([0, len(before), 0, 0, len(after), 0], "pads")
        constants = np.concatenate([before, np.zeros(size), after])[:, None]
        return self.put("Add", self.put("Pad", value, pads), self.numbers(constants), as_="rows")


def read_instead(node: ir.Node | None, value: ir.Value, new: ir.Value) -> None:
    """Let ``node`` read ``new`` for ``value``; None: let ``new`` be the output that it was."""
    if node is None:
        graphs.replace_output(value, new)
        new.type, new.shape = value.type, value.shape
        value.shape = None
        return
    for index, found in enumerate(node.inputs):
        if found is value:
            node.replace_input_with(index, new)
