"""Symbolic shapes: proves that two dimensions are the same number without running the model.

Symbols are the named dimensions of graph inputs, which ONNX defines to be equal wherever the name
appears, and fresh names for whatever the rules below cannot follow. A shape or a dimension that is
not known is never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.custom_ops.declaration import DOMAIN, OP_TYPE
from optimizer.raising import dims
from optimizer.raising import shape_rules as rules
from optimizer.raising.dims import Dim, Shape
from optimizer.raising.indexed_rules import INDEXED_RULES
from optimizer.raising.vector_rules import VECTOR_RULES, vector_of_split

_SAME = frozenset(
    {
        "Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "CumSum", "DequantizeLinear", "Dropout",
        "Elu", "Erf",
        "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
        "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "Mish", "Neg", "Not",
        "QuantizeLinear", "RMSNormalization", "Reciprocal", "Relu", "RotaryEmbedding", "Round",
        "Selu", "Sigmoid", "Sign", "Sin", "Softmax", "Softplus", "Softsign", "Sqrt", "Swish",
        "Tanh", "Trilu", "LpNormalization",
    }
)  # fmt: skip
_BROADCAST = frozenset(
    {
        "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max",
        "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
    }
)  # fmt: skip


def _stored_weights(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    left = shapes.of(node.inputs[0])
    return None if left is None else (*left[:-1], node.attributes.get_int("N", 0))


class Shapes:
    """Shapes of the values of one graph, computed when asked for.

    A rewrite may keep using one instance: a value's shape does not change while it lives.
    """

    def __init__(self) -> None:
        self._shapes: dict[ir.Value, Shape | None] = {}
        self._vectors: dict[ir.Value, Shape | None] = {}
        #: Sizes of Slices with computed bounds -> what they are unless the data ends before.
        self.capped: dict[Dim, Dim] = {}

    def of(self, value: ir.Value | None) -> Shape | None:
        """The shape, None where not even the rank is known."""
        if value is None:
            return None
        return _resolve(value, self._shapes, self._compute_shape)

    def vector(self, value: ir.Value | None) -> Shape | None:
        """The numbers in an integer vector or scalar, as dimensions."""
        self.of(value)
        return self.vector_within(value)

    def same(self, left: ir.Value | None, right: ir.Value | None) -> bool:
        """Whether both shapes are known and equal."""
        shape = self.of(left)
        return shape is not None and shape == self.of(right)

    # Both computations answer with None for whatever they do not know.

    def _compute_shape(self, value: ir.Value) -> Shape | None:
        tensor = graphs.constant(value)
        if tensor is not None:
            return tuple(int(d) for d in tensor.shape.numpy())
        node = value.producer()
        if node is None:
            return _declared(value)
        if (node.domain, node.op_type) == (DOMAIN, OP_TYPE):
            rule: rules.Rule | None = _stored_weights
        elif node.domain != "":
            rule = rules.CONTRIB_RULES.get((node.domain, node.op_type))
        else:
            rule = rules.RULES.get(node.op_type) or INDEXED_RULES.get(node.op_type)
        try:
            if rule is not None:
                return rule(self, node, value)
            if node.domain != "":
                return None
            if node.op_type in _SAME:
                return self.of(node.inputs[0]) if value.index() == 0 else None
            if node.op_type in _BROADCAST:
                return self.broadcast(value, [self.of(v) for v in node.inputs])
        except (IndexError, TypeError, ValueError, ZeroDivisionError):
            return None  # a node that breaks its operator's rules has no shape here
        return None

    def broadcast(self, value: ir.Value, shapes: Sequence[Shape | None]) -> Shape | None:
        """The shape that ``value`` gets from broadcasting ``shapes``."""
        if any(shape is None for shape in shapes):
            return None
        known = [shape for shape in shapes if shape is not None]
        rank = max(len(shape) for shape in known)
        padded = [(1,) * (rank - len(shape)) + shape for shape in known]
        columns = enumerate(zip(*padded, strict=True))
        return tuple(rules.joined(sizes, value, axis, self.capped) for axis, sizes in columns)

    def vector_within(self, value: ir.Value | None) -> Shape | None:
        """``vector`` for rules: whatever ``value`` depends on has its shape already."""
        if value is None:
            return None
        return _resolve(value, self._vectors, self._compute_vector)

    def _compute_vector(self, value: ir.Value) -> Shape | None:
        tensor = graphs.constant(value)
        if tensor is not None:
            numbers = rules.numbers(value) if tensor.dtype.is_integer() else None
            return None if numbers is None else tuple(numbers)
        node = value.producer()
        if node is None or node.domain != "":
            return None
        rule = VECTOR_RULES.get(node.op_type)
        try:
            if node.op_type == "Split":
                return vector_of_split(self, node, value)
            return None if rule is None or value.index() != 0 else rule(self, node)
        except (IndexError, TypeError, ValueError):
            return None


def _resolve(
    value: ir.Value,
    memo: dict[ir.Value, Shape | None],
    compute: Callable[[ir.Value], Shape | None],
) -> Shape | None:
    """``compute(value)`` with its producers computed first, so that depth is no recursion."""
    stack, expanded = [value], set[ir.Value]()
    while stack:
        current = stack[-1]
        if current in memo or current in expanded:
            if current not in memo:
                memo[current] = compute(current)
            stack.pop()
            continue
        expanded.add(current)
        node = current.producer()
        sources = [] if node is None else [v for v in node.inputs if v is not None]
        # What is expanded and has no shape yet depends on ``current``: a cycle, left out.
        stack.extend(v for v in sources if v not in memo and v not in expanded)
    return memo[value]


def _declared(value: ir.Value) -> Shape | None:
    """The shape of a graph input."""
    if value.shape is None:
        return None
    return tuple(_declared_dim(value, axis) for axis in range(len(value.shape)))


def _declared_dim(value: ir.Value, axis: int) -> Dim:
    dim = value.shape[axis] if value.shape is not None else None
    if isinstance(dim, int):
        return dim
    name = None if dim is None else dim.value
    return rules.unknown(value, axis) if name is None else dims.symbol(str(name))
