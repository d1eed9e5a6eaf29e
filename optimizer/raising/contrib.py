"""Operators that ONNX Runtime's tools fuse become the standard ones they are made of.

Rewrite: SkipLayerNormalization(x, s, g, b, c) -> LayerNormalization((x + c) + s, g, b), and the
         same of SkipSimplifiedLayerNormalization with RMSNormalization;
         SimplifiedLayerNormalization -> RMSNormalization;
         BiasGelu, FastGelu, Gelu, QuickGelu -> Add, Gelu, x * Sigmoid(a x);
         FusedMatMul -> Transpose, MatMul, Mul; FusedGemm, FusedConv -> Gemm or Conv and activation;
         EmbedLayerNormalization -> Gather, Add, LayerNormalization
Applies when: no output is read that the standard operators do not give (mean, deviation)
Exactness: reassociated
Source:  ONNX Runtime's documentation of its operators (ContribOperators); epsilon is 1e-12 where a
         Skip node gives none
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.half_weights import HALF_TYPES
from optimizer.nodes import node_of, operand, operands, optional
from optimizer.raising.base import LocalRule, Miss, RuleReport, site, sweep
from optimizer.raising.shapes import Shapes

DOMAIN = "com.microsoft"
_QUICK = 1.702
_ACTIVATIONS = frozenset({"HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})


def run(model: ir.Model) -> RuleReport:
    """Raise every fused operator of the main graph but attention."""
    contrib: dict[str, LocalRule] = {
        "BiasGelu": lambda node: _gelu(node, "none"),
        "EmbedLayerNormalization": _embeddings,
        "FastGelu": lambda node: _gelu(node, "tanh"),
        "FusedConv": _conv,
        "FusedGemm": _gemm,
        "FusedMatMul": partial(_matmul, shapes=Shapes()),
        "Gelu": lambda node: _gelu(node, "none"),
        "QuickGelu": _quick_gelu,
        "SkipLayerNormalization": _skip_norm,
        "SkipSimplifiedLayerNormalization": _skip_norm,
    }
    added: dict[str, LocalRule] = {"SimplifiedLayerNormalization": _simplified}
    return RuleReport.total([sweep(model, added), sweep(model, contrib, DOMAIN)])


@dataclass(frozen=True)
class Pen:
    """Writes nodes in front of the one being raised."""

    graph: ir.Graph
    node: ir.Node

    @staticmethod
    def of(node: ir.Node) -> Pen:
        """For a node of a graph.

        Raises:
            ValueError: The node is in none.
        """
        if not isinstance(node.graph, ir.Graph):
            msg = f"node '{node.name}' is in no graph"
            raise ValueError(msg)  # noqa: TRY004 - not a matter of the argument's type
        return Pen(node.graph, node)

    def put(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, object] | None = None,
        dtype: ir.DataType | None = None,
        name: str | None = None,
    ) -> ir.Value:
        """A new node's output, of the element type of its first input unless told."""
        known = dtype or next((v.dtype for v in inputs if v is not None), None)
        return graphs.insert(
            self.graph, self.node, op_type, inputs, attributes, dtype=known, name=name
        )

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A new initializer."""
        return graphs.add_initializer(self.graph, name, array)

    def integers(self, *numbers: int) -> ir.Value:
        """An int64 vector."""
        return self.constant("integers", np.array(numbers, np.int64))

    def done(self, index: int, value: ir.Value) -> bool:
        """Put ``value`` in the place of an output."""
        graphs.replace_value(self.node.outputs[index], value, keep_name=True)
        return True


def output(node: ir.Node, index: int) -> ir.Value | None:
    """An output that anything reads, else None."""
    if index >= len(node.outputs):
        return None
    value = node.outputs[index]
    return value if value.uses() or value.is_graph_output() else None


def _skip_norm(node: ir.Node) -> bool | Miss:
    if output(node, 1) is not None or output(node, 2) is not None:
        return Miss(site(node), "the mean or the deviation of a fused norm is read")
    pen = Pen.of(node)
    layer = node.op_type == "SkipLayerNormalization"
    x, skip, gamma = (operand(node, index) for index in range(3))
    bias = optional(node, 4 if layer else 3)
    if bias is not None and node_of(x, "MatMul") is not None and node_of(skip, "MatMul") is None:
        x, skip = skip, x
    if bias is not None:  # it belongs to the projection whose result is added to the stream
        skip = pen.put("Add", (skip, bias), name=f"{skip.name}_biased")
    total = pen.put("Add", (x, skip), name=f"{node.outputs[0].name}_sum")
    attributes = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-12)}
    if layer:
        beta = optional(node, 3)
        inputs = (total, gamma) if beta is None else (total, gamma, beta)
        y = pen.put("LayerNormalization", inputs, {**attributes, "stash_type": 1})
    else:
        y = pen.put("RMSNormalization", (total, gamma), {**attributes, "stash_type": 1})
    pen.done(0, y)
    if output(node, 3) is not None:
        pen.done(3, total)
    return True


def _simplified(node: ir.Node) -> bool | Miss:
    if output(node, 1) is not None:
        return Miss(site(node), "the deviation of a fused norm is read")
    attributes: dict[str, object] = {
        "axis": node.attributes.get_int("axis", -1),
        "epsilon": node.attributes.get_float("epsilon", 1e-5),
        "stash_type": node.attributes.get_int("stash_type", 1),
    }
    pen, x, scale = Pen.of(node), operand(node), operand(node, 1)
    if x.dtype != scale.dtype:  # ONNX infers the type of x for what has that of the scale
        if scale.dtype is not ir.DataType.FLOAT or x.dtype not in HALF_TYPES:
            return Miss(site(node), "input and scale of a fused norm differ in element type")
        x = pen.put("Cast", (x,), {"to": scale.dtype.value}, scale.dtype)
    return pen.done(0, pen.put("RMSNormalization", (x, scale), attributes))


def _gelu(node: ir.Node, approximate: str) -> bool:
    pen, x, bias = Pen.of(node), operand(node), optional(node, 1)
    if bias is not None:
        x = pen.put("Add", (x, bias), name=f"{x.name}_biased")
    return pen.done(0, pen.put("Gelu", (x,), {"approximate": approximate}))


def _quick_gelu(node: ir.Node) -> bool:
    pen, x = Pen.of(node), operand(node)
    alpha, inner = node.attributes.get_float("alpha", _QUICK), x
    if alpha != 1.0:
        dtype = (x.dtype or ir.DataType.FLOAT).numpy()
        inner = pen.put("Mul", (x, pen.constant("alpha", np.array(alpha, dtype))))
    return pen.done(0, pen.put("Mul", (x, pen.put("Sigmoid", (inner,)))))


def _matmul(node: ir.Node, shapes: Shapes) -> bool | Miss:
    orders: list[list[int] | None] = []
    for index, name in enumerate("AB"):
        value = operand(node, index)
        last, batch = (bool(node.attributes.get_int(f"trans{w}{name}", 0)) for w in ("", "Batch"))
        shape = shapes.of(value) or value.shape
        if shape is None and (last or batch):
            return Miss(site(node), "the rank of what it transposes is not known")
        orders.append(_order(len(shape or ()), last=last, batch=batch) if last or batch else None)
    pen, alpha = Pen.of(node), node.attributes.get_float("alpha", 1.0)
    sides = [
        value if order is None else pen.put("Transpose", (value,), {"perm": order})
        for value, order in zip(operands(node), orders, strict=True)
    ]
    if alpha == 1.0:
        return pen.done(0, pen.put("MatMul", sides))
    dtype = (sides[0].dtype or ir.DataType.FLOAT).numpy()
    factor = pen.constant("alpha", np.array(alpha, dtype))
    if _ends_activation(node, sides):
        sides[0] = pen.put("Mul", (sides[0], factor))
        return pen.done(0, pen.put("MatMul", sides))
    return pen.done(0, pen.put("Mul", (pen.put("MatMul", sides), factor)))


def _ends_activation(node: ir.Node, sides: list[ir.Value]) -> bool:
    """Whether alpha may be the last factor of an activation before the product, moved behind it."""
    last = node_of(sides[0], "Mul")
    alone = last is not None and graphs.only_user(sides[0]) is node
    return alone and graphs.constant(sides[1]) is not None


def _order(rank: int, *, last: bool, batch: bool) -> list[int]:
    """Axes of a factor; ``batch`` brings the first one before the last."""
    order = list(range(rank))
    if batch and rank > 2:
        order = [*range(1, rank - 1), 0, rank - 1]
    if last and rank > 1:
        order[-2:] = order[-1], order[-2]
    return order


def _gemm(node: ir.Node) -> bool | Miss:
    kept = {k: v for k, v in node.attributes.items() if not k.startswith("activation")}
    return _with_activation(node, "Gemm", node.inputs, kept)


def _conv(node: ir.Node) -> bool | Miss:
    if optional(node, 3) is not None:
        return Miss(site(node), "a fused Conv adds another value before its activation")
    kept = {k: v for k, v in node.attributes.items() if not k.startswith("activation")}
    return _with_activation(node, "Conv", node.inputs[:3], kept)


def _with_activation(
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, ir.Attr]
) -> bool | Miss:
    name = node.attributes.get_string("activation", "")
    numbers = list(node.attributes.get_floats("activation_params", ()))
    if name == "Clip" and len(numbers) == 2:
        given: dict[str, object] = {}
    elif name in _ACTIVATIONS:
        keys = ("alpha", "beta") if name == "HardSigmoid" else ("alpha",)
        single = [
            node.attributes.get_float(f"activation_{key}", None)
            for key in keys
            if f"activation_{key}" in node.attributes
        ]
        given = dict(zip(keys, single or numbers, strict=False))
    elif name:
        return Miss(site(node), f"it has {name} fused, which is not raised")
    pen = Pen.of(node)
    y = pen.put(op_type, inputs, dict(attributes))
    if name == "Clip":
        dtype = (y.dtype or ir.DataType.FLOAT).numpy()
        limits = [pen.constant("limit", np.array(number, dtype)) for number in numbers]
        y = pen.put("Clip", (y, *limits))
    elif name:
        y = pen.put(name, (y,), given)
    return pen.done(0, y)


def _embeddings(node: ir.Node) -> bool | Miss:
    """The sum of word, position and segment embeddings, normalized; and the lengths of a mask."""
    pen = Pen.of(node)
    ids, segments, words, places, kinds = (optional(node, index) for index in range(5))
    mask, positions = optional(node, 7), optional(node, 8)
    if ids is None or words is None or places is None:
        return Miss(site(node), "it lacks an embedding")
    total = pen.put("Gather", (words, ids), {"axis": 0})
    if positions is None:
        length = pen.put("Shape", (ids,), {"start": 1, "end": 2}, ir.DataType.INT64)
        row = pen.put("Slice", (places, pen.integers(0), length, pen.integers(0)))
    else:
        row = pen.put("Gather", (places, positions), {"axis": 0})
    total = pen.put("Add", (total, row))
    if segments is not None and kinds is not None:
        total = pen.put("Add", (total, pen.put("Gather", (kinds, segments), {"axis": 0})))
    attributes: dict[str, object] = {
        "axis": -1,
        "epsilon": node.attributes.get_float("epsilon", 1e-12),
        "stash_type": 1,
    }
    pen.done(0, pen.put("LayerNormalization", (total, *node.inputs[5:7]), attributes))
    if output(node, 1) is not None:
        if mask is None:
            shape = pen.put("Shape", (ids,), {"start": 0, "end": 1}, ir.DataType.INT64)
            nothing = ir.tensor(np.zeros(1, np.int32))
            kept = pen.put("ConstantOfShape", (shape,), {"value": nothing}, ir.DataType.INT32)
        else:
            kept = pen.put("ReduceSum", (mask, pen.integers(1)), {"keepdims": 0})
        pen.done(1, kept)
    if output(node, 2) is not None:
        pen.done(2, total)
    return True
