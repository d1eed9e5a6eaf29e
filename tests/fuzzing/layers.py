"""Motifs of transformer layers: the spellings ``canonicalize`` raises, and what looks like one.

Each motif reads what is in scope and writes nodes; it gives up silently where nothing fits.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from fuzzing.graphs import Writer
from fuzzing.values import BOOL, FLOAT, INT64, Value

_ODD = (1.0, 0.5, 2.0, 1.41421356, 1.4, 0.70710678, 0.7978845608, 0.044715, 3.0, 1.702, 1.7)


def binary(w: Writer) -> None:
    """x op y for another value or a constant of any shape that broadcasts."""
    x = w.floats()
    if x is None:
        return
    op = w.pick(["Add", "Sub", "Mul", "Add", "Mul", "Div", "Max", "Min", "Sum"])
    other = w.floats() if w.chance(40) else None
    if other is not None and (w.broadcast(x, other) is None or op == "Div"):
        other = None
    if other is None:
        own = [x.size(axis) or 1 for axis in range(x.rank)]
        shape = tuple(size if w.chance(60) else 1 for size in own)[w.r.randrange(x.rank + 1) :]
        if w.chance(15):
            shape = (1,) * w.r.randrange(4) + shape
        numbers = w.array(shape, 0.5, 1.5) if op == "Div" else w.array(shape)
        if w.chance(15):
            numbers = np.full(shape, w.pick([0.0, 1.0, *_ODD]))
        if op == "Div":
            numbers = np.where(numbers == 0, 1.0, numbers)
        other = w.const(numbers)
    if w.broadcast(x, other) is None:
        return
    if op in ("Max", "Min") and w.opset < 8:
        return
    first, second = (x, other) if op == "Div" else w.swap(x, other)
    if op == "Sum" and w.opset >= 8:
        extra = [x] if w.chance(30) else []
        w.op(op, *[first, second, *extra][: 1 if w.chance(20) else 3])
    elif op != "Sum":
        w.op(op, first, second)


def unary(w: Writer) -> None:
    """A smooth function of one value, or a node that changes nothing."""
    x = w.floats()
    if x is None:
        return
    ops = ["Tanh", "Sigmoid", "Neg", "Identity", "Abs", "Erf", "Softsign", "Relu", "Softplus"]
    op = w.pick(ops)
    if op == "Erf" and w.opset < 9:
        return
    if w.chance(15):
        _dropout(w, x)
    elif w.chance(10) and x.exact is False:
        w.op("Exp", w.op("Tanh", x))
    elif w.chance(10):
        w.emit("LeakyRelu", [x], [(x.dtype, x.shapes)], alpha=0.1)
    else:
        w.op(op, x, exact=op in ("Identity", "Neg", "Abs", "Relu") and x.exact)


def _dropout(w: Writer, x: Value) -> None:
    mask = w.chance(30)
    kinds = [(x.dtype, x.shapes)]
    if mask:
        kinds.append((BOOL if w.opset >= 10 else x.dtype, x.shapes))
    if w.opset < 12:
        w.emit("Dropout", [x], kinds, ratio=0.3)
        return
    inputs = [x]
    if w.chance(50):
        inputs.append(w.const(0.4, FLOAT))
        if w.chance(50):
            inputs.append(w.const(False, BOOL))
    w.emit("Dropout", inputs, kinds)


def linear(w: Writer) -> None:
    """x @ W + b in every form."""
    x = w.floats(last=True)
    if x is not None:
        apply_linear(w, x, w.r.randrange(1, 7))


def apply_linear(w: Writer, x: Value, columns: int) -> Value:
    """A linear layer on x [.., K]."""
    rows = x.size(-1) or 1
    way = w.r.randrange(7)
    if way in (0, 1) and x.rank == 2:
        return _gemm(w, x, rows, columns)
    if way == 2 and x.rank >= 3:
        return _flattened_gemm(w, x, rows, columns)
    if way == 3 and x.rank == 3:
        return _pointwise(w, x, rows, columns)
    product = w.matmul(x, _weight(w, rows, columns))
    assert product is not None
    if w.chance(60):
        shape = w.pick([(columns,), (columns,), (1, columns), (1, 1, columns), (1,), ()])
        bias = w.const(w.array(shape))
        if w.broadcast(product, bias) is not None:
            product = w.op("Add", *w.swap(product, bias))
    return product


def _weight(w: Writer, rows: int, columns: int) -> Value:
    """[K, N], stored in one of several ways, sometimes one that is there already."""
    old = w.find(lambda v: v.numbers is not None and v.shapes[0] == (rows, columns))
    if old is not None and old.dtype == w.dtype and w.chance(40):
        return old
    numbers = w.array((rows, columns)) / math.sqrt(max(rows, 1))
    way = w.r.randrange(10)
    if way == 0:
        return w.transpose(w.const(numbers.T), [1, 0])
    if way == 1 and w.opset >= 13 and w.dtype == FLOAT:
        return _dequantized(w, numbers)
    if way == 2:
        name = w.name("override")
        value = w.input([rows, columns], name=name)
        w.scope.remove(value)
        w.initializers.append(onnx.numpy_helper.from_array(numbers.astype(np.float32), name))
        if w.dtype != FLOAT:
            w.initializers.pop()
            del w.inputs[name]
            return w.const(numbers)
        return value
    if way == 3 and w.opset >= 9:
        return w.cast(w.const(numbers, onnx.TensorProto.DOUBLE), w.dtype)
    if way == 4:
        flat = w.const(numbers.reshape(-1))
        shapes = ((rows, columns),) * w.feeds
        return w.reshape(flat, w.ints([rows, columns]), shapes)
    value = w.const(numbers)
    w.scope.append(value)
    return value


def _dequantized(w: Writer, numbers: np.ndarray) -> Value:
    rows, columns = numbers.shape
    axis = w.pick([None, 0, 1, -1])
    codes = np.clip(np.rint(numbers * 100), -127, 127).astype(np.int8)
    shape = () if axis is None else (numbers.shape[axis],)
    scale = w.const(w.array(shape, 0.005, 0.02))
    inputs = [w.const(codes, onnx.TensorProto.INT8), scale]
    if w.chance(50):
        zero = np.zeros(shape) if w.chance(70) else w.rng.integers(-3, 3, shape)
        inputs.append(w.const(zero, onnx.TensorProto.INT8))
    extra = {} if axis is None else {"axis": axis}
    shapes = ((rows, columns),) * w.feeds
    return w.emit("DequantizeLinear", inputs, [(FLOAT, shapes)], exact=True, **extra)[0]


def _gemm(w: Writer, x: Value, rows: int, columns: int) -> Value:
    turn = w.chance(50)
    weight = _weight(w, columns, rows) if turn else _weight(w, rows, columns)
    extra: dict[str, float] = {"transB": 1} if turn else {}
    if w.chance(25):
        extra["alpha"] = w.pick([0.5, 1.0, -2.0, 0.0])
    inputs = [x, weight]
    if w.chance(70) or w.opset < 11:
        shape = w.pick([(columns,), (1, columns), (1,), (1, 1), ()])
        inputs.append(w.const(w.array(shape)))
        if w.chance(25):
            extra["beta"] = w.pick([0.5, 1.0, 0.0])
        if w.chance(10) and x.size(0):
            inputs[2] = w.const(w.array((x.size(0), 1)))
    shapes = tuple((shape[0], columns) for shape in x.shapes)
    if w.chance(15):  # a transposed activation
        x = w.transpose(x, [1, 0])
        inputs[0] = x
        extra["transA"] = 1
    return w.emit("Gemm", inputs, [(x.dtype, shapes)], **extra)[0]


def _flattened_gemm(w: Writer, x: Value, rows: int, columns: int) -> Value:
    lead = tuple(math.prod(shape[:-1]) for shape in x.shapes)
    flat_shapes = tuple((count, rows) for count in lead)
    if w.chance(30):
        axis = x.rank - 1 if w.chance(50) or w.opset < 11 else -1
        flat = w.emit("Flatten", [x], [(x.dtype, flat_shapes)], exact=x.exact, axis=axis)[0]
    else:
        flat = w.reshape(x, w.ints([-1, rows]), flat_shapes)
    y = _gemm(w, flat, rows, columns)
    shapes = tuple((*shape[:-1], columns) for shape in x.shapes)
    unknown = sum(x.size(axis) is None for axis in range(x.rank - 1))
    if w.chance(50) or unknown > 1:
        parts = [w.dim(x, axis) for axis in range(x.rank - 1)]
        target = w.concat([*parts, w.ints([columns if w.chance(60) else -1])], 0)
    else:
        known = [x.size(axis) for axis in range(x.rank - 1)]
        target = w.ints([*(-1 if size is None else size for size in known), columns])
    return w.reshape(y, target, shapes)


def _pointwise(w: Writer, x: Value, rows: int, columns: int) -> Value:
    weight = w.const(w.array((columns, rows, 1)))
    inputs = [w.transpose(x, [0, 2, 1]), weight]
    if w.chance(50):
        inputs.append(w.const(w.array((columns,))))
    shapes = tuple((shape[0], columns, shape[1]) for shape in x.shapes)
    extra: dict[str, object] = {"kernel_shape": [1]} if w.chance(50) else {}
    if w.chance(20):
        extra["auto_pad"] = w.pick(["VALID", "SAME_UPPER"])
    y = w.emit("Conv", inputs, [(x.dtype, shapes)], **extra)[0]
    return w.transpose(y, [0, 2, 1])


def norm(w: Writer) -> None:
    """LayerNormalization or RMSNormalization, spelled out, with something odd now and then."""
    x = w.floats(last=True)
    if x is None or x.rank < 2:
        return
    size = x.size(-1) or 1
    axes = [w.pick([-1, x.rank - 1])] if w.chance(88) else [w.r.randrange(x.rank)]
    if w.chance(4) and x.rank > 2:
        axes = [-2, -1]
    if axes[0] < 0 and w.opset < 11:
        axes = [axis % x.rank for axis in axes]
    centred = w.chance(50)
    if w.chance(12) and w.opset >= 17 and centred:
        _norm_operator(w, x, axes, size)
        return
    base = x
    if centred:
        mean = w.reduce("ReduceMean", x, axes)
        x = w.op("Sub", *((x, mean) if w.chance(93) else (mean, x)))
    square = w.op("Mul", x, x) if w.chance(40) else w.op("Pow", x, w.const(2.0))
    if w.chance(4):
        square = w.op("Mul", x, base)
    spread = w.reduce("ReduceMean", square, axes)
    epsilon = w.const(np.full(w.pick([(), (), (1,), (1, 1)]), w.pick([1e-5, 1e-6, 1e-2])))
    if w.chance(4):
        epsilon = w.const(w.array((size,), 0.1, 0.2))
    if w.chance(93):
        spread = w.op("Add", *w.swap(spread, epsilon))
        root = w.op("Sqrt", spread) if w.chance(80) else w.op("Pow", spread, w.const(0.5))
    else:
        root = w.op("Add", w.op("Sqrt", spread), epsilon)
    y = _normalized(w, x if w.chance(96) else base, root)
    if w.chance(80):
        y = w.op("Mul", *w.swap(y, _vector(w, size)))
    if w.chance(50):
        w.op("Add", *w.swap(y, _vector(w, size)))


def _normalized(w: Writer, x: Value, root: Value) -> Value:
    way = w.r.randrange(3)
    if way == 0:
        return w.op("Div", x, root)
    inverse = w.op("Reciprocal", root) if way == 1 else w.op("Div", w.const(1.0), root)
    return w.op("Mul", *w.swap(x, inverse))


def _vector(w: Writer, size: int) -> Value:
    shape = w.pick([(size,), (size,), (size,), (1, size), (1, 1, size), (1,), ()])
    return w.const(w.array(shape, 0.5, 1.5))


def _norm_operator(w: Writer, x: Value, axes: list[int], size: int) -> None:
    if len(axes) > 1 or axes[0] % x.rank != x.rank - 1:
        return
    inputs = [x, w.const(w.array((size,), 0.5, 1.5))]
    if w.chance(50):
        inputs.append(w.const(w.array((size,))))
    outputs = [(x.dtype, x.shapes)]
    if w.chance(15) and w.dtype == FLOAT:
        outputs.append((FLOAT, tuple((*s[:-1], 1) for s in x.shapes)))
    if w.opset >= 23 and w.chance(50):
        w.emit("RMSNormalization", inputs[:2], outputs[:1], axis=axes[0])
    else:
        w.emit("LayerNormalization", inputs, outputs, axis=axes[0], epsilon=1e-5)


def activation(w: Writer) -> None:
    """GELU, SiLU, quick-GELU, with constants that are right, rounded or wrong."""
    x = w.floats()
    if x is None or (w.opset < 9):
        return
    off = w.pick([0.0] * 8 + [1e-7, 1e-3, 0.3])
    kind = w.pick(["erf", "tanh", "silu", "quick", "exp", "operator"])
    if kind == "erf":
        root = w.const(math.sqrt(2) + off)
        inner = w.op("Div", x, root)
        if w.chance(30):
            inner = w.op("Mul", *w.swap(x, w.const(1 / math.sqrt(2) + off)))
        gate = w.op("Add", *w.swap(w.op("Erf", inner), w.const(1.0 if w.chance(95) else 1.1)))
        _gated(w, x, gate, 0.5)
    elif kind == "tanh":
        cube = w.op("Pow", x, w.const(3.0)) if w.chance(60) else w.op("Mul", w.op("Mul", x, x), x)
        inner = w.op("Add", *w.swap(x, w.op("Mul", cube, w.const(0.044715 + off))))
        inner = w.op("Mul", *w.swap(inner, w.const(math.sqrt(2 / math.pi))))
        _gated(w, x, w.op("Add", *w.swap(w.op("Tanh", inner), w.const(1.0))), 0.5)
    elif kind == "operator":
        if w.opset >= 20:
            w.emit("Gelu", [x], [(x.dtype, x.shapes)], approximate=w.pick(["none", "tanh"]))
    else:
        inner = x
        if kind == "quick":
            inner = w.op("Mul", *w.swap(x, w.const(1.702 + off)))
        gate = w.op("Sigmoid", inner)
        if kind == "exp":
            base = w.op("Add", w.op("Exp", w.op("Neg", inner)), w.const(1.0))
            gate = w.op("Div", w.const(1.0), base)
        source = (
            x if w.chance(92) else w.find(lambda v: v.dtype == x.dtype and v.shapes == x.shapes)
        )
        w.op("Mul", *w.swap(source or x, gate))


def _gated(w: Writer, x: Value, gate: Value, half: float) -> None:
    factor = w.const(half if w.chance(95) else 0.6)
    way = w.r.randrange(3)
    if way == 0:
        w.op("Mul", *w.swap(w.op("Mul", *w.swap(x, gate)), factor))
    elif way == 1:
        w.op("Mul", *w.swap(w.op("Mul", *w.swap(x, factor)), gate))
    else:
        w.op("Mul", *w.swap(x, w.op("Mul", *w.swap(gate, factor))))


def residual(w: Writer) -> None:
    """Two values of one shape are added."""
    x = w.floats()
    y = None if x is None else w.find(lambda v: v.dtype == x.dtype and v.shapes == x.shapes)
    if x is not None and y is not None:
        w.op("Add", x, y)


def dynamic_tanh(w: Writer) -> None:
    """scale * tanh(alpha * x) + bias with constants of any number of axes."""
    x = w.floats(last=True)
    if x is None:
        return
    size = x.size(-1) or 1
    alpha = w.const(np.full(w.pick([(), (1,), (1, 1), (1, 1, 1)]), 0.7))
    y = w.op("Mul", *w.swap(_vector(w, size), w.op("Tanh", w.op("Mul", *w.swap(x, alpha)))))
    if w.chance(70):
        w.op("Add", *w.swap(y, _vector(w, size)))


def packed(w: Writer) -> None:
    """One wide layer, cut by Split, Slice or Gather, its parts used apart or joined again."""
    x = w.floats(last=True)
    if x is None or x.rank < 2:
        return
    sizes = [w.r.randrange(1, 4) for _ in range(w.r.randrange(2, 4))]
    if w.chance(50):
        sizes = [sizes[0]] * len(sizes)
    y = apply_linear(w, x, sum(sizes))
    if w.chance(60):
        parts = w.split(y, w.pick([-1, y.rank - 1]), sizes)
    else:
        ends = np.cumsum(sizes).tolist()
        starts = [0, *ends[:-1]]
        if w.chance(15):
            starts = [max(0, start - 1) for start in starts]  # parts that overlap
        axis = y.rank - 1 if w.opset < 10 else -1
        parts = [w.slice(y, axis, a, b) for a, b in zip(starts, ends, strict=True)]
    if w.chance(20):
        parts.reverse()
    if w.chance(30):
        w.concat(parts, -1 if w.opset >= 11 else parts[0].rank - 1)
    elif len({part.shapes for part in parts}) == 1 and w.chance(70):
        w.op("Mul", w.op("Sigmoid", parts[0]), parts[1])


def float_mask(w: Writer, allowed: Value, low: float) -> Value:
    """0 where allowed, very low elsewhere."""
    way = w.r.randrange(3)
    if way == 0 and w.opset >= 9:
        return w.op("Where", allowed, w.const(0.0), w.const(low), dtype=w.dtype)
    wide = w.cast(allowed, w.dtype)
    if way == 1:
        return w.op("Mul", w.op("Sub", w.const(1.0), wide), w.const(low))
    return w.op("Mul", w.op("Sub", wide, w.const(1.0)), w.const(-low))


def positions(w: Writer, length: Value) -> Value:
    """Range(0, length) as int64 [n] for a vector of one."""
    assert length.known is not None
    sizes = tuple((int(array[0]),) for array in length.known)
    scalar = w.squeeze(length, [0])
    return w.emit("Range", [w.ints(0), scalar, w.ints(1)], [(INT64, sizes)], exact=True)[0]
