"""Motifs of layout and shape arithmetic: reshapes, slices, expansions, integers from Shape."""

from __future__ import annotations

import math

import numpy as np
import onnx
from fuzzing.graphs import Writer
from fuzzing.values import BOOL, DTYPES, FLOAT, INT64, Shape, Value

_INT32 = onnx.TensorProto.INT32


def transpose(w: Writer) -> None:
    """Any permutation; often right after another one."""
    x = w.floats()
    if x is None or x.rank < 2:
        return
    perm = list(range(x.rank))
    if w.chance(50):
        a, b = w.r.randrange(x.rank), w.r.randrange(x.rank)
        perm[a], perm[b] = perm[b], perm[a]
    else:
        w.r.shuffle(perm)
    y = w.transpose(x, perm)
    if w.chance(40):
        w.transpose(y, perm)


def reshape(w: Writer) -> None:
    """Axes merged, split, or taken from elsewhere; the target given in one of its spellings."""
    x = w.floats()
    if x is None:
        return
    way = w.r.randrange(4)
    if way == 0 and x.rank >= 2:
        _merge(w, x)
    elif way == 1 and x.rank >= 1:
        _split(w, x)
    elif way == 2 and x.rank >= 1:
        axis = w.r.randrange(-x.rank if w.opset >= 11 else 0, x.rank + 1)
        real = axis + x.rank if axis < 0 else axis
        shapes = tuple((math.prod(s[:real]), math.prod(s[real:])) for s in x.shapes)
        w.emit("Flatten", [x], [(x.dtype, shapes)], exact=x.exact, axis=axis)
    else:
        _like(w, x)


def _merge(w: Writer, x: Value) -> None:
    first = w.r.randrange(x.rank - 1)
    last = w.r.randrange(first + 1, x.rank)
    shapes = tuple((*s[:first], math.prod(s[first : last + 1]), *s[last + 1 :]) for s in x.shapes)
    y = to_shape(w, x, shapes)
    if y is not None and w.chance(50):
        to_shape(w, y, x.shapes)


def _split(w: Writer, x: Value) -> None:
    axis = w.r.randrange(x.rank)
    size = x.size(axis)
    if not size:
        return
    factors = [f for f in range(1, size + 1) if size % f == 0]
    first = w.pick(factors)
    shapes = tuple((*s[:axis], first, size // first, *s[axis + 1 :]) for s in x.shapes)
    y = to_shape(w, x, shapes)
    if y is None:
        return
    if w.chance(50):
        perm = list(range(y.rank))
        perm[axis], perm[axis + 1] = perm[axis + 1], perm[axis]
        y = w.transpose(y, perm)
    if w.chance(50):
        merged = tuple((*s[:axis], s[axis] * s[axis + 1], *s[axis + 2 :]) for s in y.shapes)
        to_shape(w, y, merged)


def _like(w: Writer, x: Value) -> None:
    """Reshape to the shape of another value of as many elements."""
    counts = [math.prod(s) for s in x.shapes]
    y = w.find(lambda v: v.rank > 0 and [math.prod(s) for s in v.shapes] == counts)
    if y is not None and not any(0 in s for s in y.shapes):
        w.reshape(x, w.shape_of(y), y.shapes)


def to_shape(w: Writer, x: Value, shapes: tuple[Shape, ...]) -> Value | None:
    """Reshape ``x``; None where no spelling of the target is found."""
    rank = len(shapes[0])
    entries: list[Value] = []
    inferred = False
    constant = True
    for axis in range(rank):
        sizes = [s[axis] for s in shapes]
        kept = axis < x.rank and sizes == [s[axis] for s in x.shapes]
        fixed = len(set(sizes)) == 1
        usable = not inferred and all(math.prod(s[:axis] + s[axis + 1 :]) for s in shapes)
        if kept and w.chance(40):
            entries.append(w.ints([0]))
        elif fixed and sizes[0] != 0 and w.chance(70):
            entries.append(w.ints([sizes[0]]))
        elif usable and w.chance(60):
            inferred = True
            entries.append(w.ints([-1]))
        elif kept:
            entries.append(w.dim(x, axis) if w.chance(60) else w.ints([0]))
            constant = False
        elif fixed and sizes[0] != 0:
            entries.append(w.ints([sizes[0]]))
        else:
            found = _computed(w, x, tuple(sizes))
            if found is None:
                return None
            entries.append(found)
            constant = False
    constant = all(entry.numbers is not None for entry in entries)
    if not entries:
        return w.reshape(x, w.ints(np.zeros(0)), shapes)
    if constant and w.chance(80):
        target = w.ints([int(e.numbers[0]) for e in entries if e.numbers is not None])
    else:
        target = w.concat(entries, 0)
    extra = {}
    zeros = target.known is not None and any((array == 0).any() for array in target.known)
    if w.opset >= 14 and not zeros and w.chance(10):
        extra["allowzero"] = 1
    return w.reshape(x, target, shapes, **extra)


def _computed(w: Writer, x: Value, sizes: tuple[int, ...]) -> Value | None:
    """A vector of one with these numbers, from the dimensions of ``x``."""
    for axis in range(x.rank):
        if tuple(s[axis] for s in x.shapes) == sizes:
            return w.dim(x, axis)
    for a in range(x.rank):
        for b in range(x.rank):
            if a != b and tuple(s[a] * s[b] for s in x.shapes) == sizes:
                return integers(w, "Mul", w.dim(x, a), w.dim(x, b))
    return None


def integers(w: Writer, op: str, x: Value, y: Value) -> Value:
    """Integer arithmetic whose numbers are followed."""
    compute = {
        "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Max": np.maximum,
        "Min": np.minimum, "Mod": np.mod,
        "Div": lambda a, b: np.trunc(a / b).astype(a.dtype),
    }[op]  # fmt: skip
    return w.op(op, x, y, exact=True, compute=compute)


def arithmetic(w: Writer) -> None:
    """Integers computed from a shape, through casts that may change them; mostly an output."""
    x = w.find(lambda v: v.rank > 0)
    if x is None:
        return
    value = w.dim(x, w.r.randrange(x.rank)) if w.chance(60) else w.shape_of(x)
    for _ in range(w.r.randrange(1, 5)):
        value = _step(w, value, x)
    if w.chance(60):
        w.forced_outputs.append(value)
    if value.rank == 1 and value.known is not None and w.chance(40):
        _use(w, value)


def _step(w: Writer, value: Value, x: Value) -> Value:
    way = w.r.randrange(8)
    if way <= 2:
        op = w.pick(["Add", "Sub", "Mul", "Div", "Max", "Min"])
        number = w.pick([2, 3, -2, 1, 0, -1, 7])
        if w.opset < 12 and op in ("Max", "Min"):
            return value
        if op == "Div" and number == 0:
            number = 2
        other = w.ints(np.full(w.pick([(), (1,)]), number))
        if w.chance(30) and op != "Div":
            other = w.dim(x, w.r.randrange(x.rank))
        if w.broadcast(value, other) is None:
            return value
        first, second = (value, other) if op == "Div" else w.swap(value, other)
        return integers(w, op, first, second)
    if way == 3 and value.known is not None:
        kinds = [_INT32, FLOAT, BOOL, onnx.TensorProto.INT8, onnx.TensorProto.FLOAT16]
        between = w.cast(value, w.pick(kinds))
        return w.knowing(
            w.cast(between, INT64),
            [a.astype(DTYPES[between.dtype]).astype(np.int64) for a in value.known],
        )
    if way == 4 and value.rank == 1 and value.size(0):
        index = w.r.randrange(-value.shapes[0][0], value.shapes[0][0])
        at = w.ints(index if w.chance(50) else [index])
        taken = w.gather(value, at)
        return w.unsqueeze(taken, [0]) if taken.rank == 0 else taken
    if way == 5 and value.rank == 1 and w.opset >= 10:
        step = w.pick([1, 1, 2, -1])
        start, end = (0, 2**31) if step > 0 else (-1, -(2**31))
        return w.slice(value, 0, start, end, step)
    if way == 6 and value.rank == 1:
        return w.concat([value, w.ints([w.r.randrange(-1, 5)])], 0)
    if way == 7 and w.opset >= 9 and value.rank == 1:
        return _choice(w, value)
    return value


def _choice(w: Writer, value: Value) -> Value:
    """Where(value == n, a, b)."""
    number = w.ints([w.pick([-1, 0, 1, 3])])
    equal = w.op("Equal", value, number, dtype=BOOL, exact=True, compute=np.equal)
    other = w.ints([w.pick([-1, 1, 4])])
    first, second = w.swap(value, other)
    shapes = w.broadcast(equal, first, second)
    assert shapes is not None
    kind = [(INT64, shapes)]
    return w.emit("Where", [equal, first, second], kind, exact=True, compute=np.where)[0]


def _use(w: Writer, value: Value) -> None:
    """Expand, Tile, ConstantOfShape, Range or Slice by a computed vector."""
    assert value.known is not None
    numbers = [tuple(int(n) for n in array) for array in value.known]
    small = all(0 <= n <= 6 for row in numbers for n in row)
    if not small or not numbers[0] or max(math.prod(row) for row in numbers) > 4000:
        return
    way = w.r.randrange(4)
    if way == 0 and w.opset >= 9:
        filled = onnx.numpy_helper.from_array(np.array([0.5], DTYPES[w.dtype]))
        kind = [(w.dtype, tuple(numbers))]
        w.emit("ConstantOfShape", [value], kind, exact=True, value=filled)
    elif way == 1 and w.opset >= 8:
        x = w.const(w.array((1,)))
        shapes = tuple(tuple(row) for row in numbers)
        w.emit("Expand", [x, value], [(w.dtype, shapes)], exact=True)
    elif way == 2 and w.opset >= 11 and value.size(0) == 1:
        _range(w, value, [row[0] for row in numbers])
    elif way == 3 and w.opset >= 10 and value.size(0) == 1:
        x = w.floats()
        if x is None or x.rank == 0:
            return
        shapes = tuple(
            (min(row[0], s[0]), *s[1:]) for row, s in zip(numbers, x.shapes, strict=True)
        )
        w.emit("Slice", [x, w.ints([0]), value, w.ints([0])], [(x.dtype, shapes)], exact=x.exact)


def _range(w: Writer, value: Value, limits: list[int]) -> None:
    start, step = w.pick([0, 0, 0, 1]), w.pick([1, 1, 2])
    shapes = tuple((len(range(start, limit, step)),) for limit in limits)
    inputs = [w.ints(start), w.squeeze(value, [0]), w.ints(step)]
    row = w.emit("Range", inputs, [(INT64, shapes)], exact=True)[0]
    if w.chance(60):
        w.cast(row, w.dtype)


def dims(w: Writer) -> None:
    """Unsqueeze and Squeeze, stacked."""
    x = w.floats()
    if x is None or x.rank > 4:
        return
    low = 0 if w.opset < 11 else -(x.rank + 1)
    y = w.unsqueeze(x, [w.r.randrange(low, x.rank + 1)])
    if w.chance(40):
        y = w.unsqueeze(y, [w.r.randrange(y.rank + 1)])
    ones = [axis for axis in range(y.rank) if y.size(axis) == 1]
    if ones and w.chance(60):
        axis = w.pick(ones)
        w.squeeze(y, [axis if w.opset < 11 or w.chance(50) else axis - y.rank])


def part(w: Writer) -> None:
    """Slice, Gather, Split and Concat with constant places."""
    x = w.floats()
    if x is None or x.rank == 0:
        return
    axis = w.r.randrange(x.rank)
    size = x.size(axis)
    way = w.r.randrange(5)
    if way == 0:
        step = 1 if w.opset < 10 else w.pick([1, 1, 2, -1, -2])
        far = [2**31 - 1, 2**63 - 1] if step > 0 else []
        start, end = w.pick([0, 1, -1, -2, 100]), w.pick([1, 2, -1, -100, *far])
        w.slice(x, axis, start, end, step)
    elif way == 1 and size:
        index = w.rng.integers(0, size, w.pick([(), (1,), (2,), (2, 2)]))
        if w.opset >= 11 and w.chance(30):
            index = index - size
        w.gather(x, w.ints(index), axis)
    elif way == 2 and size and size > 1:
        cut = w.r.randrange(1, size)
        pieces = w.split(x, axis, [cut, size - cut])
        if w.chance(60):
            w.concat(pieces if w.chance(60) else pieces[::-1], axis)
    elif way == 3:
        y = w.find(
            lambda v: (
                v.dtype == x.dtype
                and v.rank == x.rank
                and all(
                    a[:axis] + a[axis + 1 :] == b[:axis] + b[axis + 1 :]
                    for a, b in zip(v.shapes, x.shapes, strict=True)
                )
            )
        )
        w.concat([x, y or x][: 1 if w.chance(15) else 2], axis)
    elif w.opset >= 13 and size:
        repeats = [1] * x.rank
        repeats[axis] = w.pick([1, 2])
        shapes = tuple((*s[:axis], s[axis] * repeats[axis], *s[axis + 1 :]) for s in x.shapes)
        w.emit("Tile", [x, w.ints(repeats)], [(x.dtype, shapes)], exact=x.exact)


def expand(w: Writer) -> None:
    """Expand to a constant or computed shape, also of what is that wide already."""
    x = w.floats()
    if x is None or w.opset < 8:
        return
    y = w.find(lambda v: v.rank > 0 and w.broadcast(v, x) is not None)
    if y is not None and w.chance(60):
        shapes = w.broadcast(x, y)
        assert shapes is not None
        w.emit("Expand", [x, w.shape_of(y)], [(x.dtype, shapes)], exact=x.exact)
        return
    ones = [1 if x.size(a) != 1 or w.chance(50) else 2 for a in range(x.rank)]
    target = w.const(np.array([*([1] if w.chance(30) else []), *ones]), INT64)
    if not target.shapes[0][0]:
        return
    assert target.numbers is not None
    shapes = tuple(np.broadcast_shapes(s, tuple(target.numbers)) for s in x.shapes)
    w.emit("Expand", [x, target], [(x.dtype, shapes)], exact=x.exact)


def casts(w: Writer) -> None:
    """Cast there and back; CastLike."""
    x = w.floats()
    if x is None:
        return
    kind = w.pick([FLOAT, onnx.TensorProto.DOUBLE, w.dtype, w.dtype])
    if w.opset >= 15 and w.chance(30):
        like = w.const(1.0)
        w.emit("CastLike", [x, like], [(x.dtype, x.shapes)], exact=x.exact)
        return
    y = w.cast(x, kind)
    w.cast(y, w.dtype)


def grid(w: Writer) -> None:
    """GatherND by a grid of all indices, as exporters spell a mask lookup."""
    x = w.floats()
    if x is None or x.rank != 2 or w.opset < 12:
        return
    rows = _run(w, x, 0)
    columns = _run(w, x, 1)
    left, right = w.unsqueeze(rows, [1]), w.unsqueeze(columns, [0])
    shape = w.concat([w.dim(rows, 0), w.dim(columns, 0)], 0)
    whole = w.broadcast(left, right)
    assert whole is not None
    sides = [
        w.unsqueeze(w.emit("Expand", [side, shape], [(INT64, whole)], exact=True)[0], [2])
        for side in (left, right)
    ]
    if w.chance(10):
        return
    index = w.concat(sides, -1)
    w.emit("GatherND", [x, index], [(x.dtype, whole)], exact=x.exact)


def _run(w: Writer, x: Value, axis: int) -> Value:
    length = w.dim(x, axis)
    assert length.known is not None
    start = w.pick([0, 0, 0, 0, 1])
    sizes = tuple((max(0, int(a[0]) - start),) for a in length.known)
    inputs = [w.ints(start), w.squeeze(length, [0]), w.ints(1)]
    return w.emit("Range", inputs, [(INT64, sizes)], exact=True)[0]
