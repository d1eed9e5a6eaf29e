"""Spelled-out activations become Gelu, x * Sigmoid(x) or x * Sigmoid(1.702 x).

Rewrite:      any arithmetic that computes GELU (erf or tanh), SiLU or quick-GELU -> its one form
Applies when: between x and the result are only sums, products, quotients, powers and the functions
              below, of x and constant numbers, and the result agrees with the activation on 121
              points: these functions are analytic, so this leaves no room for another function
Exactness:    reassociated
Source:       Hendrycks and Gimpel, Gaussian Error Linear Units (2016), section 2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import onnx_ir as ir

from optimizer.graph import add_initializer, constant, insert, only_user, replace_value, scalar
from optimizer.nodes import dims, node_of
from optimizer.raising.base import LocalRule, Miss, RuleReport, site, sweep
from optimizer.raising.shapes import Shapes

_POINTS = np.linspace(-6.0, 6.0, 121)
_MAX_STEPS = 8
_QUICK = 1.702


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


_erf = np.vectorize(math.erf, otypes=[np.float64])
_UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Cast": lambda x: x,
    "Erf": _erf,
    "Exp": np.exp,
    "Identity": lambda x: x,
    "Neg": np.negative,
    "Reciprocal": np.reciprocal,
    "Sigmoid": _sigmoid,
    "Tanh": np.tanh,
}
_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Add": np.add,
    "Div": np.divide,
    "Mul": np.multiply,
    "Pow": np.power,
    "Sub": np.subtract,
}


#: What a curve may turn out to be, per function that every spelling of it contains.
_TARGETS: dict[str, dict[str, np.ndarray]] = {
    "Erf": {"none": 0.5 * _POINTS * (1 + _erf(_POINTS / math.sqrt(2)))},
    "Tanh": {
        "tanh": 0.5
        * _POINTS
        * (1 + np.tanh(math.sqrt(2 / math.pi) * (_POINTS + 0.044715 * _POINTS**3)))
    },
    "Sigmoid": {
        "silu": _POINTS * _sigmoid(_POINTS),
        "quick": _POINTS * _sigmoid(_QUICK * _POINTS),
    },
}
_TARGETS["Exp"] = _TARGETS["Sigmoid"]


def run(model: ir.Model, *, gelu: bool = True) -> RuleReport:
    """Raise activations.

    Args:
        model: Rewritten in place.
        gelu: Whether the operator Gelu (opset 20) may be written.
    """
    anchors = ("Erf", "Tanh", "Sigmoid", "Exp") if gelu else ("Sigmoid", "Exp")
    rules: dict[str, LocalRule] = dict.fromkeys(anchors, partial(_raise, shapes=Shapes()))
    return sweep(model, {**rules, "Swish": _swish})


def _raise(node: ir.Node, shapes: Shapes) -> bool | Miss:
    best: Miss | None = None
    for x in _candidates(node):
        rank = len(shapes.of(x) or ())
        for end, curve in _curves(node, x, rank):
            kind = _recognized(node, x, curve)
            if kind is not None:
                return _write(node, x, end, kind)
            if node.op_type == "Erf" and best is None and _near(node, curve):
                best = Miss(site(node), "close to GELU, but its constants are rounded too much")
    return best or False


def _candidates(node: ir.Node) -> Iterator[ir.Value]:
    """Values the anchor may be a function of, nearest first."""
    frontier = [value for value in node.inputs if value is not None]
    seen: dict[ir.Value, None] = {}
    for _ in range(_MAX_STEPS):
        following = []
        for value in frontier:
            if value in seen or constant(value) is not None:
                continue
            seen[value] = None
            yield value
            producer = node_of(value, *_UNARY, *_BINARY)
            following += [v for v in producer.inputs if v is not None] if producer else []
        frontier = following


def _curves(node: ir.Node, x: ir.Value, rank: int) -> Iterator[tuple[ir.Value, np.ndarray]]:
    """Values computed from the anchor and ``x`` alone, with their graph over ``_POINTS``."""
    known: dict[ir.Value, np.ndarray | None] = {x: _POINTS}
    value = node.outputs[0]
    if x is value:
        return
    for _ in range(_MAX_STEPS):
        user = only_user(value)
        if user is None or len(user.outputs) != 1 or user.domain != "":
            return
        value = user.outputs[0]
        curve = _evaluate(value, known, rank, _MAX_STEPS * 2)
        if curve is None:
            return
        yield value, curve


def _evaluate(
    value: ir.Value, known: dict[ir.Value, np.ndarray | None], rank: int, depth: int
) -> np.ndarray | None:
    """The graph of ``value`` as a function of the one value in ``known``, None if it is none.

    A number with more axes than that value, which has ``rank``, would add them to the result.
    """
    if value in known:
        return known[value]
    known[value] = None  # until proven otherwise
    number = scalar(value)
    if number is not None and len(dims(value) or ()) <= rank:
        known[value] = np.full_like(_POINTS, number)
        return known[value]
    node = node_of(value, *_UNARY, *_BINARY)
    if node is None or depth == 0:
        return None
    if node.op_type == "Cast" and not _keeps_floats(node):
        return None
    operands = [None if v is None else _evaluate(v, known, rank, depth - 1) for v in node.inputs]
    arrays = [operand for operand in operands if operand is not None]
    if len(arrays) != len(operands):
        return None
    with np.errstate(all="ignore"):
        known[value] = (
            _UNARY[node.op_type](arrays[0])
            if node.op_type in _UNARY
            else _BINARY[node.op_type](arrays[0], arrays[1])
        )
    return known[value]


def _keeps_floats(node: ir.Node) -> bool:
    source = node.inputs[0].dtype if node.inputs[0] is not None else None
    target = ir.DataType(node.attributes["to"].as_int())
    return source is not None and source.is_floating_point() and target.is_floating_point()


def _recognized(node: ir.Node, x: ir.Value, curve: np.ndarray) -> str | None:
    # Constants are rounded to the element type, each by half a unit; four of them at most.
    unit = _unit(x)
    for kind, target in _TARGETS[node.op_type].items():
        if np.all(np.abs(curve - target) <= 4 * unit * (1 + np.abs(_POINTS))):
            return kind
    return None


def _unit(x: ir.Value) -> float:
    if x.dtype is None or not x.dtype.is_floating_point():
        return 0.0
    return {16: 2.0**-10, 32: 2.0**-23, 64: 2.0**-52}.get(x.dtype.bitwidth, 0.0) * (
        8 if x.dtype == ir.DataType.BFLOAT16 else 1
    )


def _near(node: ir.Node, curve: np.ndarray) -> bool:
    return any(np.all(np.abs(curve - t) <= 1e-2) for t in _TARGETS[node.op_type].values())


def _write(node: ir.Node, x: ir.Value, end: ir.Value, kind: str) -> bool | Miss:
    graph, last = node.graph, end.producer()
    if last is None or not isinstance(graph, ir.Graph) or end.dtype != x.dtype:
        return Miss(site(node), "the activation changes the element type")
    write = partial(insert, graph, last, dtype=end.dtype, shape=end.shape)
    if kind in ("none", "tanh"):
        new = write("Gelu", (x,), {"approximate": kind}, name=end.name)
    else:
        if _is_canonical(last, x, kind):
            return False
        inner = x
        if kind == "quick":
            array = np.array(_QUICK, dtype=None if x.dtype is None else x.dtype.numpy())
            factor = add_initializer(graph, f"{end.name}/factor", array)
            inner = write("Mul", (x, factor), name=f"{end.name}/scaled")
        gate = write("Sigmoid", (inner,), name=f"{end.name}/gate")
        new = write("Mul", (x, gate), name=end.name)
    replace_value(end, new, keep_name=True)
    return True


def _is_canonical(last: ir.Node, x: ir.Value, kind: str) -> bool:
    gate = node_of(last.inputs[1], "Sigmoid")
    if last.op_type != "Mul" or last.inputs[0] is not x or gate is None:
        return False
    if kind == "silu":
        return gate.inputs[0] is x
    scaled = node_of(gate.inputs[0], "Mul")
    return scaled is not None and scaled.inputs[0] is x and scalar(scaled.inputs[1]) is not None


def _swish(node: ir.Node) -> bool:
    graph, x, output = node.graph, node.inputs[0], node.outputs[0]
    if x is None or x.dtype is None or not isinstance(graph, ir.Graph):
        return False
    write = partial(insert, graph, node, dtype=x.dtype, shape=output.shape)
    alpha, inner = node.attributes.get_float("alpha", 1.0), x
    if alpha != 1.0:
        array = np.array(alpha, dtype=x.dtype.numpy())
        factor = add_initializer(graph, f"{output.name}/factor", array)
        inner = write("Mul", (x, factor), name=f"{output.name}/scaled")
    gate = write("Sigmoid", (inner,), name=f"{output.name}/gate")
    replace_value(output, write("Mul", (x, gate), name=output.name), keep_name=True)
    return True
