"""Motifs beside the layers: quantization, subgraphs, fused operators, lookups, repetitions."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx.helper as oh
from fuzzing.graphs import Writer
from fuzzing.layers import apply_linear, binary, linear, norm, unary
from fuzzing.values import BOOL, DTYPES, FLOAT, INT64, Value

_INT8, _UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8
_CONTRIB = "com.microsoft"


def quantized(w: Writer) -> None:
    """QuantizeLinear and DequantizeLinear of exact numbers, as a pair or with work between."""
    x = w.find(lambda v: v.exact and v.dtype == FLOAT and v.rank > 0)
    if x is None or w.opset < 13 or w.dtype != FLOAT:
        return
    kind = w.pick([_INT8, _INT8, _UINT8])
    zero = w.const(0 if kind == _INT8 and w.chance(70) else w.pick([0, 128, 100, 3]) % 127, kind)
    scale = w.const(w.pick([0.0217, 0.5013, 0.01237]))  # quotients that end on .5 are rare
    codes = w.emit("QuantizeLinear", [x, scale, zero], [(kind, x.shapes)], exact=True)[0]
    back = [codes, scale, zero] if w.chance(85) else [codes, w.const(0.0307), zero]
    y = w.emit("DequantizeLinear", back, [(FLOAT, x.shapes)], exact=True)[0]
    if y.size(-1):
        apply_linear(w, y, w.r.randrange(1, 5))


def integer_product(w: Writer) -> None:
    """The int8 products of ONNX Runtime."""
    x = w.find(lambda v: v.exact and v.dtype == FLOAT and v.rank > 1 and bool(v.size(-1)))
    if x is None or w.opset < 13 or w.dtype != FLOAT:
        return
    rows, columns = x.size(-1) or 1, w.r.randrange(1, 5)
    zero = w.const(w.pick([128, 128, 0, 100]), _UINT8)
    scale = w.const(0.0203)
    codes = w.emit("QuantizeLinear", [x, scale, zero], [(_UINT8, x.shapes)], exact=True)[0]
    weight = w.const(w.rng.integers(-127, 128, (rows, columns)), _INT8)
    factor = w.const(w.array(w.pick([(), (columns,)]), 0.01, 0.02))
    shapes = tuple((*s[:-1], columns) for s in x.shapes)
    taken = zero if w.chance(80) else w.const(128, _UINT8)
    inputs: list[Value | None] = [codes, weight, scale, factor, taken]
    if w.chance(60):
        inputs += [w.const(0, _INT8) if w.chance(50) else None, w.const(w.array((columns,)))]
    w.emit("MatMulIntegerToFloat", inputs, [(FLOAT, shapes)], domain=_CONTRIB)


def branch(w: Writer) -> None:
    """If on an input or a constant; its branches read values from outside."""
    x = w.floats()
    if x is None or w.opset < 11:
        return
    constant = w.chance(50)
    condition = w.const(bool(w.r.randrange(2)), BOOL) if constant else w.input([], BOOL)
    graphs = [_body(w, x, name) for name in ("then", "else")]
    w.emit("If", [condition], [(x.dtype, x.shapes)], then_branch=graphs[0], else_branch=graphs[1])


def _body(w: Writer, x: Value, name: str) -> onnx.GraphProto:
    """A graph without inputs whose output has the shape of ``x``."""
    inner = _inside(w)
    value = x
    for _ in range(w.r.randrange(1, 4)):
        way = w.r.randrange(4)
        if way == 0:
            value = inner.op(inner.pick(["Tanh", "Neg", "Identity"]), value)
        elif way == 1:
            value = inner.op(inner.pick(["Add", "Mul"]), value, inner.const(0.7))
        elif way == 2:
            other = inner.find(lambda v, y=value: v.shapes == y.shapes and v.dtype == y.dtype)
            value = inner.op("Add", value, other or value)
        else:
            value = inner.reshape(value, inner.shape_of(x), x.shapes) if x.rank else value
    if value is x:
        value = inner.op("Identity", value)
    info = oh.make_tensor_value_info(value.name, value.dtype, None)
    return oh.make_graph(inner.nodes, name, [], [info], inner.initializers)


def _inside(w: Writer) -> Writer:
    """A writer of a subgraph: it reads what is outside, and nothing of it is seen there."""
    return Writer(
        w.r, w.opset, w.dtype, w.sizes, list(w.scope), domains=w.domains, counter=w.counter,
        rng_seed=w.rng_seed,
    )  # fmt: skip


def loop(w: Writer) -> None:
    """Loop with a carried value and a value from outside."""
    x = w.floats()
    if x is None or w.opset < 13:
        return
    inner = _inside(w)
    carried = Value(w.name("carried"), x.dtype, x.shapes)
    inner.scope.append(carried)
    y = inner.op("Tanh", inner.op("Add", *inner.swap(carried, x)))
    keep = inner.op("Identity", Value("going_in", BOOL, ((),) * w.feeds), dtype=BOOL)
    infos = [
        oh.make_tensor_value_info(w.name("iteration"), INT64, []),
        oh.make_tensor_value_info("going_in", BOOL, []),
        oh.make_tensor_value_info(carried.name, x.dtype, None),
    ]
    results = [
        oh.make_tensor_value_info(keep.name, BOOL, []),
        oh.make_tensor_value_info(y.name, x.dtype, None),
    ]
    body = oh.make_graph(inner.nodes, "body", infos, results, inner.initializers)
    inputs = [w.ints(w.pick([0, 1, 3])), w.const(True, BOOL), x]
    w.emit("Loop", inputs, [(x.dtype, x.shapes)], body=body)


def lookup(w: Writer) -> None:
    """An embedding."""
    ids = w.find(lambda v: v.dtype == INT64 and v.exact and v.name in w.inputs)
    if ids is None:
        return
    table = w.const(w.array((3, w.pick([2, 4, 6]))))
    w.scope.append(table)
    w.gather(table, ids)


def twice(w: Writer) -> None:
    """A node again, word for word or with its operands in another order."""
    inside = ("If", "Loop", "Constant", "Dropout")
    nodes = [n for n in w.nodes if n.op_type not in inside and len(n.output) == 1]
    if not nodes:
        return
    node = w.pick(nodes)
    old = next((v for v in w.scope if v.name == node.output[0]), None)
    if old is None:
        return
    again = copy.deepcopy(node)
    again.name, again.output[0] = w.name("n"), w.name("v")
    if node.op_type in ("Add", "Mul") and w.chance(40):
        first, second = again.input
        del again.input[:]
        again.input.extend([second, first])
    w.nodes.append(again)
    value = Value(again.output[0], old.dtype, old.shapes, old.exact, known=old.known)
    w.scope.append(value)
    if w.broadcast(old, value) is not None and old.dtype == w.dtype:
        w.op("Add", old, value)


def constants(w: Writer) -> None:
    """Nodes that depend on constants alone."""
    shape = w.pick([(), (1,), (3,), (2, 3), (0,), (1, 1, 4)])
    value = w.const(w.array(shape, 0.1, 1.0))
    for _ in range(w.r.randrange(1, 4)):
        way = w.r.randrange(5)
        if way == 0:
            value = w.op(w.pick(["Sqrt", "Exp", "Neg", "Reciprocal"]), value)
        elif way == 1:
            value = w.op(w.pick(["Add", "Mul", "Sub"]), value, w.const(w.array((1,))))
        elif way == 2 and value.rank >= 2:
            value = w.transpose(value, list(reversed(range(value.rank))))
        elif way == 3 and value.rank:
            value = w.unsqueeze(value, [0])
        else:
            value = w.cast(w.cast(value, onnx.TensorProto.DOUBLE), w.dtype)
    x = w.floats()
    if x is not None and w.broadcast(x, value) is not None:
        w.op("Add", *w.swap(x, value))
    elif w.chance(30):
        w.forced_outputs.append(value)


def attribute_constant(w: Writer) -> None:
    """A Constant node in each of its other spellings."""
    if w.opset < 12:
        return
    way = w.r.randrange(4)
    name = w.name("k")
    numbers, kind, shape = [
        ({"value_float": 0.25}, FLOAT, ()),
        ({"value_floats": [0.5, 1.5]}, FLOAT, (2,)),
        ({"value_int": 3}, INT64, ()),
        ({"value_ints": [1, 2, 3]}, INT64, (3,)),
    ][way]
    w.nodes.append(oh.make_node("Constant", [], [name], **numbers))
    value = Value(name, kind, (shape,) * w.feeds, exact=True)
    x = w.floats()
    if kind == FLOAT and w.dtype == FLOAT and x is not None and w.broadcast(x, value) is not None:
        w.op("Mul", x, value)
    else:
        made = w.emit("Identity", [value], [(kind, value.shapes)], exact=True)
        w.forced_outputs.extend(made)


def ordered(w: Writer) -> None:
    """What looks at the order of numbers, of exact ones only."""
    x = w.find(lambda v: v.exact and v.dtype == w.dtype and v.rank > 0)
    if x is None or any(0 in s for s in x.shapes) or w.opset < 13 or w.dtype != FLOAT:
        return
    axis = w.r.randrange(-x.rank, x.rank)
    real = axis % x.rank
    shapes = tuple((*s[:real], 1, *s[real + 1 :]) for s in x.shapes)
    way = w.r.randrange(3)
    if way == 0:
        w.emit("ArgMax", [x], [(INT64, shapes)], exact=True, axis=axis)
    elif way == 1:
        w.emit("TopK", [x, w.ints([1])], [(x.dtype, shapes), (INT64, shapes)], axis=axis)
    elif DTYPES[x.dtype] is np.float32:
        w.emit("CumSum", [x, w.ints(axis)], [(x.dtype, x.shapes)])


def stack(w: Writer) -> None:
    """Norm, linear, activation, residual: a layer as they come."""
    norm(w)
    linear(w)
    unary(w)
    binary(w)


def reduction(w: Writer) -> None:
    """Any reduction over any axes."""
    x = w.floats()
    if x is None or x.rank == 0 or any(0 in s for s in x.shapes):
        return
    axes = sorted({w.r.randrange(x.rank) for _ in range(w.r.randrange(1, 3))})
    op = w.pick(["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2"])
    w.reduce(op, x, axes, w.r.randrange(2))


def selection(w: Writer) -> None:
    """Where by a comparison of exact numbers; Clip; Trilu."""
    x = w.floats()
    if x is None or w.opset < 9:
        return
    if w.opset >= 14 and x.rank >= 2 and w.chance(30):
        w.emit("Trilu", [x], [(x.dtype, x.shapes)], exact=x.exact, upper=w.r.randrange(2))
        return
    condition = w.find(lambda v: v.dtype == BOOL and w.broadcast(v, x) is not None)
    if condition is None or w.chance(30):
        exact = w.find(lambda v: v.exact and v.dtype == w.dtype and w.broadcast(v, x) is not None)
        if exact is None:
            return
        condition = w.op("Less", exact, w.const(0.1), dtype=BOOL, exact=True)
    other = w.const(w.pick([0.0, -1e4, 1.5]))
    first, second = w.swap(x, other)
    shapes = w.broadcast(condition, first, second)
    assert shapes is not None
    w.emit("Where", [condition, first, second], [(x.dtype, shapes)])
