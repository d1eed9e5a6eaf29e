"""Writes nodes of the canonical dialect in front of a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer.fusion.weights import shared
from optimizer.graph import add_initializer, insert
from optimizer.structure import Norm

#: A weight [K, N] and a bias [N] or None, as ``weights.beside`` and ``weights.stacked`` return.
Tensors = tuple[ir.LazyTensor, ir.LazyTensor | None]


@dataclass
class Writer:
    """Appends nodes before ``anchor``.

    Attributes:
        graph: The graph.
        anchor: Everything written so far is right before it.
        prefix: Of all names.
    """

    graph: ir.Graph
    anchor: ir.Node
    prefix: str

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, Any] | None = None,
        like: ir.Value | None = None,
    ) -> ir.Value:
        """One node with one output, whose type and rank are those of ``like`` (default: input 0).

        Only the last dimension may differ from ``like``'s: it is left unknown.
        """
        like = like if like is not None else next(v for v in inputs if v is not None)
        return insert(
            self.graph,
            self.anchor,
            op_type,
            inputs,
            attributes,
            name=f"{self.prefix}/{name}",
            dtype=like.dtype,
        )

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A new initializer."""
        return add_initializer(self.graph, f"{self.prefix}/{name}", array)

    def integers(self, *numbers: int) -> ir.Value:
        """An int64 initializer [n], shared by everything that asks for the same numbers."""
        name = "int64_" + "_".join(str(n).replace("-", "m") for n in numbers)
        return shared(self.graph, name, np.array(numbers, np.int64))

    def linear(self, x: ir.Value, tensors: Tensors, name: str) -> ir.Value:
        """``MatMul(x, W)``, and ``Add(y, b)`` where there is a bias."""
        weight, bias = tensors
        y = self._typed(x, weight)
        out = insert(
            self.graph,
            self.anchor,
            "MatMul",
            [x, add_initializer(self.graph, f"{self.prefix}/{name}.weight", weight)],
            name=f"{self.prefix}/{name}",
            dtype=weight.dtype,
            shape=y,
        )
        if bias is None:
            return out
        return insert(
            self.graph,
            self.anchor,
            "Add",
            [out, add_initializer(self.graph, f"{self.prefix}/{name}.bias", bias)],
            name=f"{self.prefix}/{name}.biased",
            dtype=weight.dtype,
            shape=y,
        )

    def norm(self, norm: Norm, x: ir.Value, scale: ir.Value, name: str) -> ir.Value:
        """A norm like ``norm`` over ``x`` with another scale and no bias."""
        attributes = list(norm.node.attributes.values())
        return insert(
            self.graph,
            self.anchor,
            norm.node.op_type,
            [x, scale],
            {attribute.name: attribute for attribute in attributes},
            name=f"{self.prefix}/{name}",
            dtype=x.dtype,
            shape=x.shape,
        )

    def split(self, x: ir.Value, sizes: Sequence[int], name: str) -> tuple[ir.Value, ...]:
        """``x`` cut along its last axis."""
        lead = None if x.shape is None else list(x.shape)[:-1]
        return insert(  # type: ignore[no-any-return]
            self.graph,
            self.anchor,
            "Split",
            [x, self.integers(*sizes)],
            {"axis": -1},
            name=f"{self.prefix}/{name}",
            outputs=len(sizes),
            dtype=x.dtype and [x.dtype] * len(sizes),
            shape=None if lead is None else [[*lead, size] for size in sizes],
        )

    def copy(self, nodes: Sequence[ir.Node], mapping: dict[ir.Value, ir.Value]) -> None:
        """Copies of ``nodes`` reading what ``mapping`` says; their outputs are added to it."""
        for node in nodes:
            inputs = [v if v is None else mapping.get(v, v) for v in node.inputs]
            mapping[node.outputs[0]] = insert(
                self.graph,
                self.anchor,
                node.op_type,
                inputs,
                dict(node.attributes.items()),
                domain=node.domain,
                name=f"{self.prefix}/{node.op_type.lower()}",
                dtype=node.outputs[0].dtype,
            )

    @staticmethod
    def _typed(x: ir.Value, weight: ir.LazyTensor) -> list[Any] | None:
        if x.shape is None:
            return None
        return [*list(x.shape)[:-1], weight.shape[-1]]
