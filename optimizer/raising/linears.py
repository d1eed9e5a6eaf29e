"""Linear layers become ``Add(MatMul(x, W), b)`` with W [K, N] and b [N] constant.

Rewrite:      Gemm(x, W, b), with or without transposed W, alpha, beta -> Add(MatMul(x, W'), b')
              Conv over one position between two Transposes -> linear
              Add(b, MatMul(x, W)) -> Add(MatMul(x, W), b); b [1, .., N] -> [N]
Applies when: W is constant (an initializer, or one that is dequantized); a W that other operators
              read untransposed stays as it is, because the model would hold it twice
Exactness:    bitwise but for alpha and beta, which are multiplied into the constants
Cost:         weights are transposed when they are written, not now
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir

from optimizer.graph import (
    add_initializer,
    constant,
    derived,
    inherit_name,
    insert,
    replace_value,
)
from optimizer.nodes import node_of
from optimizer.quantized_parts import scaled_along
from optimizer.raising.base import Miss, RuleReport, site, sweep
from optimizer.raising.constants import GROWTH_LIMIT
from optimizer.raising.shapes import Shapes


def run(model: ir.Model) -> RuleReport:
    """Raise linear layers; each sweep builds on the one before."""
    made = _Made(model.graph)
    raised = sweep(
        model,
        {
            "Gemm": partial(_gemm, made=made),
            "MatMul": partial(_transposed_weight, made=made),
            "Conv": partial(_pointwise, made=made),
        },
    )
    biased = sweep(model, {"Add": partial(_bias, shapes=Shapes(), made=made)})
    for old, new in made.pairs:
        inherit_name(model.graph, old, new)
    return RuleReport.total([raised, biased])


@dataclass
class _Made:
    """Constants made from others.

    Attributes:
        graph: The main graph.
        transposed: W -> W', so that layers that share one go on sharing it.
        pairs: (before, after) of every constant, for its name.
    """

    graph: ir.Graph
    transposed: dict[ir.Value, ir.Value] = field(default_factory=dict)
    pairs: list[tuple[ir.Value, ir.Value]] = field(default_factory=list)

    def constant(
        self, value: ir.Value, shape: Sequence[int], fn: Callable[[np.ndarray], np.ndarray]
    ) -> ir.Value:
        """A new initializer ``fn(value)`` of this shape."""
        tensor = derived(value, shape, fn)
        result = add_initializer(self.graph, value.name or "constant", tensor)
        self.pairs.append((value, result))
        return result

    def transpose(self, node: ir.Node, weight: ir.Value) -> ir.Value:
        """W' for the use of ``node``."""
        if weight in self.transposed:
            return self.transposed[weight]
        dequantized = node_of(weight, "DequantizeLinear")
        stored = weight if dequantized is None else dequantized.inputs[0]
        if stored is None:
            msg = f"the weight '{weight.name}' is dequantized from nothing"
            raise ValueError(msg)
        result = self.constant(stored, _dims(stored)[::-1], np.transpose)
        if dequantized is not None:
            attributes = dict(dequantized.attributes.items())
            axis = dequantized.attributes.get_int("axis", 1) % 2
            attributes["axis"] = ir.AttrInt64("axis", 1 - axis)
            result = insert(
                self.graph, node, "DequantizeLinear", (result, *dequantized.inputs[1:]),
                attributes, name=weight.name, dtype=weight.dtype, shape=result.shape,
            )  # fmt: skip
        self.transposed[weight] = result
        return result

    def vector(self, bias: ir.Value, columns: int, factor: float = 1.0) -> ir.Value:
        """The constant [N] that broadcasts like ``bias`` over the last axis, if there is one."""
        tensor = constant(bias)
        if tensor is None:
            return bias
        shape = _dims(bias)
        row = tensor.size in (1, columns) and (not shape or shape[-1] == tensor.size)
        if (shape == (columns,) or not row) and factor == 1.0:
            return bias

        def scaled(array: np.ndarray) -> np.ndarray:
            wide = np.broadcast_to(array.reshape(-1), (columns,)) if row else array
            return wide if factor == 1.0 else (wide * wide.dtype.type(factor)).astype(wide.dtype)

        return self.constant(bias, (columns,) if row else shape, scaled)


def _dims(value: ir.Value) -> tuple[int, ...]:
    tensor = constant(value)
    return () if tensor is None else tuple(tensor.shape.numpy())


def weight_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The stored tensor of a constant matrix, also of one that is dequantized."""
    dequantized = node_of(value, "DequantizeLinear")
    return constant(dequantized.inputs[0] if dequantized is not None else value)


def _gemm(node: ir.Node, made: _Made) -> bool | Miss:
    graph, (x, weight) = node.graph, node.inputs[:2]
    tensor = weight_of(weight)
    if x is None or weight is None or tensor is None or not isinstance(graph, ir.Graph):
        return False
    if node.attributes.get_int("transA", 0):
        return Miss(site(node), "Gemm multiplies a constant by a transposed activation")
    columns = tensor.shape.numpy()[0 if node.attributes.get_int("transB", 0) else 1]
    alpha, beta = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    third = node.inputs[2] if len(node.inputs) > 2 else None
    if beta != 1.0 and third is not None and constant(third) is None:
        return Miss(site(node), f"Gemm scales an activation by beta = {beta:g}")
    if alpha != 1.0 and constant(weight) is None:
        return Miss(site(node), f"Gemm scales a dequantized weight by alpha = {alpha:g}")
    transposed = node.attributes.get_int("transB", 0)
    if scaled_along(weight, 1 if transposed else 0):
        return Miss(site(node), "ONNX Runtime refuses int8 products of weights scaled row by row")
    if transposed:
        if not _transposable(weight):
            return Miss(site(node), "the weight is also read untransposed")
        weight = made.transpose(node, weight)
    if alpha != 1.0:
        weight = made.constant(
            weight, _dims(weight), lambda w: (w * w.dtype.type(alpha)).astype(w.dtype)
        )
    output = node.outputs[0]
    shape = None if output.shape is None else [output.shape[0], int(columns)]
    y = insert(
        graph, node, "MatMul", (x, weight), name=f"{output.name}/matmul" if third else output.name,
        dtype=output.dtype, shape=shape,
    )  # fmt: skip
    if third is not None:
        bias = made.vector(third, int(columns), beta)
        y = insert(graph, node, "Add", (y, bias), name=output.name, dtype=output.dtype, shape=shape)
    replace_value(output, y, keep_name=True)
    return True


def _transposable(weight: ir.Value) -> bool:
    """Whether W' may be stored: it is small, or nobody reads W itself."""
    dequantized = node_of(weight, "DequantizeLinear")
    stored = weight if dequantized is None else dequantized.inputs[0]
    tensor = constant(stored)
    if tensor is None or len(tensor.shape) != 2:
        return False
    if dequantized is not None and len(weight.uses()) > 1:
        return False
    if tensor.nbytes <= GROWTH_LIMIT or dequantized is not None:
        return True
    return not weight.is_graph_output() and all(
        _reads_transposed(use.node, use.idx) for use in weight.uses()
    )


def _reads_transposed(node: ir.Node, index: int) -> bool:
    if node.op_type == "Gemm":
        return index == 1 and node.attributes.get_int("transB", 0) == 1
    return node.op_type == "Transpose"


def _transposed_weight(node: ir.Node, made: _Made) -> bool | Miss:
    """MatMul(x, Transpose(W)) where folding left the Transpose: W is large, or dequantized."""
    turned = node_of(node.inputs[1], "Transpose")
    if turned is None or turned.inputs[0] is None:
        return False
    weight = turned.inputs[0]
    if weight_of(weight) is None or list(turned.attributes.get_ints("perm", (1, 0))) != [1, 0]:
        return False
    if not _transposable(weight):
        return Miss(site(node), "the weight is also read untransposed")
    node.replace_input_with(1, made.transpose(turned, weight))
    return True


def _pointwise(node: ir.Node, made: _Made) -> bool:
    """Transpose -> Conv with one tap -> Transpose, over sequences [B, C, S]."""
    before = node_of(node.inputs[0], "Transpose")
    tensor, graph, output = constant(node.inputs[1]), node.graph, node.outputs[0]
    after = [use.node for use in output.uses()]
    swap = [0, 2, 1]
    if before is None or tensor is None or not after or not isinstance(graph, ir.Graph):
        return False
    if any(list(n.attributes.get_ints("perm", ())) != swap for n in (before, *after)):
        return False
    ones = all(set(node.attributes.get_ints(k, (1,))) == {1} for k in ("strides", "kernel_shape"))
    pads = any(node.attributes.get_ints("pads", (0,))) or node.attributes.get_int("group", 1) != 1
    if not ones or pads or tensor.shape.numpy()[2:] != (1,) or output.is_graph_output():
        return False
    weight, x = node.inputs[1], before.inputs[0]
    if weight is None or x is None or "auto_pad" in node.attributes:
        return False
    columns, rows, _ = tensor.shape.numpy()
    matrix = made.constant(weight, (rows, columns), lambda w: w[:, :, 0].T)
    y = insert(graph, node, "MatMul", (x, matrix), name=f"{output.name}/matmul", dtype=x.dtype)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        y = insert(graph, node, "Add", (y, node.inputs[2]), name=output.name, dtype=x.dtype)
    for user in after:
        replace_value(user.outputs[0], y)
    return True


def _bias(node: ir.Node, shapes: Shapes, made: _Made) -> bool:
    """A bias [1, .., N] becomes [N], one that is added after splitting N into heads comes first."""
    graph, (y, bias) = node.graph, node.inputs
    split = node_of(y, "Reshape")
    product = y if split is None else split.inputs[0]
    matmul = node_of(product, "MatMul")
    weight = weight_of(matmul.inputs[1]) if matmul is not None else None
    tensor, shape, full = constant(bias), shapes.of(y), shapes.of(product)
    if weight is None or tensor is None or bias is None or shape is None or product is None:
        return False
    columns, own = int(weight.shape.numpy()[-1]), tuple(tensor.shape.numpy())
    if full is None or tensor.size != columns or not isinstance(graph, ir.Graph):
        return False
    parts = len(shape) - len(full) + 1  # axes that N was split into
    padded = (1,) * (len(shape) - len(own)) + own
    if full[:-1] != shape[:-parts] or padded != (1,) * (len(full) - 1) + shape[-parts:]:
        return False  # another split, or the bias widens what it is added to
    output = node.outputs[0]
    if split is None:
        if len(own) < 2:
            return False
        node.replace_input_with(1, made.vector(bias, columns))
        return True
    vector = made.constant(bias, (columns,), lambda array: array.reshape(-1))
    y = insert(
        graph, node, "Add", (product, vector), name=f"{output.name}/bias", dtype=output.dtype,
        shape=product.shape,
    )  # fmt: skip
    new = insert(
        graph, node, "Reshape", (y, split.inputs[1]), dict(split.attributes.items()),
        name=output.name, dtype=output.dtype, shape=output.shape,
    )  # fmt: skip
    replace_value(output, new, keep_name=True)
    return True
