"""Motifs of attention: decomposed, masked, cached, grouped, rotated, and nearly so."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from fuzzing.graphs import Writer
from fuzzing.layers import apply_linear, float_mask, positions
from fuzzing.values import BOOL, INT64, Value


@dataclass
class _Heads:
    """[B, H, S, c] and what it is made of."""

    value: Value
    count: int
    size: int


def attention(w: Writer) -> None:
    """``softmax(q @ k^T * scale + mask) @ v``; each step may be spelled in several ways."""
    x = w.floats(rank=3, last=True)
    if x is None or w.opset < 11:
        return
    groups = w.pick([1, 1, 2, 3])
    kv_heads = w.pick([1, 1, 2])
    size = w.pick([1, 2, 4])
    query = _heads(w, x, kv_heads * groups, size)
    source = x
    if w.chance(15):
        other = w.floats(rank=3, last=True)
        if other is not None and [s[0] for s in other.shapes] == [s[0] for s in x.shapes]:
            source = other  # cross attention
    keys, values = _heads(w, source, kv_heads, size), _heads(w, source, kv_heads, size)
    if w.chance(30):
        query = _Heads(rotate(w, query.value), query.count, size)
        keys = _Heads(rotate(w, keys.value), keys.count, size)
    past = w.chance(25)
    if past:
        keys, values = _cached(w, keys), _cached(w, values)
    if w.chance(12) and w.opset >= 23:
        _operator(w, query, keys, values)
        return
    if groups > 1:
        keys, values = _repeated(w, keys, groups), _repeated(w, values, groups)
    scores = _scores(w, query, keys, size)
    if scores is None:
        return
    scores = _masked(w, scores)
    axis = w.pick([-1, -1, -1, 3]) if w.chance(96) else 2
    weights = w.emit("Softmax", [scores], [(scores.dtype, scores.shapes)], axis=axis)[0]
    if w.chance(10):
        w.forced_outputs.append(weights)
    y = w.matmul(weights, values.value)
    if y is None:
        return
    _joined(w, y, query.count * size)


def _heads(w: Writer, x: Value, count: int, size: int) -> _Heads:
    """A projection [B, S, H*c] -> [B, H, S, c]."""
    y = apply_linear(w, x, count * size)
    shapes = tuple((s[0], s[1], count, size) for s in y.shapes)
    way = w.r.randrange(4)
    if way == 0:
        target = w.ints([0, 0, count, size] if w.chance(60) else [0, 0, -1, size])
    elif way == 1:
        parts = [w.dim(x, 0), w.dim(x, 1), w.ints([count]), w.ints([size])]
        target = w.concat(parts, 0)
    elif way == 2 and y.size(0):
        target = w.ints([y.size(0), -1, count, size])
    else:
        target = w.ints([0, -1, count, size])
    if w.chance(5):  # not heads at all: the sequence is torn apart
        torn = tuple((s[0], count, s[1], size) for s in y.shapes)
        return _Heads(w.reshape(y, w.ints([0, count, -1, size]), torn), count, size)
    return _Heads(w.transpose(w.reshape(y, target, shapes), [0, 2, 1, 3]), count, size)


def _cached(w: Writer, new: _Heads) -> _Heads:
    """Concat(past, new); the whole is sometimes an output."""
    rows = w.dims_text(new.value)[0]
    if rows is None:
        return new
    past = w.input([rows, new.count, "T", new.size])
    parts = [past, new.value] if w.chance(95) else [new.value, past]
    whole = w.concat(parts, w.pick([2, -2]))
    if w.chance(80):
        w.forced_outputs.append(whole)
    return _Heads(whole, new.count, new.size)


def _repeated(w: Writer, x: _Heads, times: int) -> _Heads:
    """[B, H, T, c] -> [B, H*n, T, c], each head n times; now and then in the wrong order."""
    place = 2 if w.chance(90) else 1
    wide = w.unsqueeze(x.value, [place])
    shape = [1] * 5
    shape[place] = times
    shapes = tuple((*s[:place], times, *s[place + 1 :]) for s in wide.shapes)
    if w.chance(40):
        target = w.ints(shape)
    else:
        parts = [
            w.ints([times]) if axis == place else w.dim(wide, axis) for axis in range(wide.rank)
        ]
        target = w.concat(parts, 0)
    wide = w.emit("Expand", [wide, target], [(wide.dtype, shapes)], exact=wide.exact)[0]
    flat = tuple((s[0], x.count * times, s[3], s[4]) for s in shapes)
    if w.chance(50):
        end = w.ints([0, x.count * times, -1, x.size])
    else:
        end = w.concat(
            [w.dim(x.value, 0), w.ints([x.count * times]), w.dim(x.value, 2), w.ints([x.size])], 0
        )
    return _Heads(w.reshape(wide, end, flat), x.count * times, x.size)


def _scores(w: Writer, query: _Heads, keys: _Heads, size: int) -> Value | None:
    q, k = query.value, keys.value
    scale = 1 / math.sqrt(size) if w.chance(80) else w.pick([0.3, 1.0, -0.5])
    where = w.r.randrange(4)
    if where == 0:
        q = w.op("Mul", *w.swap(q, w.const(scale)))
    elif where == 1:
        half = w.const(math.sqrt(abs(scale)))
        q, k = w.op("Mul", q, half), w.op("Mul", k, half)
    turned = w.transpose(k, [0, 1, 3, 2]) if w.chance(96) else None
    scores = w.matmul(q, turned or k)  # unturned, it fits only where sizes happen to agree
    if scores is None:
        return None
    if where == 2:
        scores = w.op("Div", scores, w.const(np.full(w.pick([(), (1,)]), 1 / scale)))
    if w.chance(12):
        cap = w.const(2.0)
        scores = w.op("Mul", w.op("Tanh", w.op("Div", scores, cap)), cap)
    if w.chance(3):
        scores = w.op("Add", scores, w.const(w.array((1,))))
    return scores


def _masked(w: Writer, scores: Value) -> Value:
    low = w.pick([-1e9, -3.4028234663852886e38, -1e4, -60.0, float("-inf")])
    if w.dtype not in (1, 11):
        low = max(low, -1e4)
    way = w.r.randrange(6)
    if way == 0:
        return scores
    if way == 1:  # given from outside
        dims = [w.pick([1, d]) if d is not None else 1 for d in w.dims_text(scores)]
        mask = w.input(dims)
        added = w.op("Add", *w.swap(scores, mask))
        return w.op("Add", added, mask) if w.chance(5) else added
    if way == 2:
        constant = [w.pick([1, s]) if s else 1 for s in map(scores.size, range(4))]
        return w.op("Add", *w.swap(scores, w.const(w.array(tuple(constant), -3, 0))))
    rows, columns = w.dim(scores, 2), w.dim(scores, 3)
    at, key = positions(w, rows), positions(w, columns)
    compare = w.pick(["GreaterOrEqual", "Less"]) if w.opset >= 12 else "Less"
    left = w.unsqueeze(at, [1])
    longer = all(s[3] >= s[2] for s in scores.shapes)
    if longer and w.chance(50):  # counts from the end: with a cache the queries are the last
        left = w.op("Add", left, w.op("Sub", columns, rows, exact=True), exact=True)
    allowed = w.op(compare, left, w.unsqueeze(key, [0]), dtype=BOOL, exact=True)
    if compare == "Less":
        allowed = w.op("Not", allowed, exact=True)
    if w.chance(40):
        dims = w.dims_text(scores)
        if dims[0] is not None and dims[3] is not None:
            kind = INT64 if w.chance(70) else BOOL
            padding = w.input([dims[0], dims[3]], kind, w.name("mask"))
            if padding.dtype == INT64:
                padding = w.cast(padding, BOOL)
            allowed = w.op("And", allowed, w.unsqueeze(padding, [1, 2]), exact=True)
    if way == 3 and low > float("-inf"):
        return w.op("Where", allowed, scores, w.const(low), dtype=scores.dtype)
    if low == float("-inf"):
        low = -1e4
    return w.op("Add", scores, float_mask(w, allowed, low))


def _joined(w: Writer, y: Value, width: int) -> None:
    if w.chance(5):
        return
    rows = w.transpose(y, [0, 2, 1, 3] if w.chance(96) else [0, 1, 2, 3])
    shapes = tuple((s[0], s[1], s[2] * s[3]) for s in rows.shapes)
    last = rows.shapes[0][2] * rows.shapes[0][3]
    fixed = all(s[2] == last for s in shapes)
    del width
    if fixed and w.chance(60):
        target = w.ints([0, 0, last] if w.chance(60) else [0, 0, -1])
    else:
        target = w.concat([w.dim(rows, 0), w.dim(rows, 1), w.ints([-1])], 0)
    joined = w.reshape(rows, target, shapes)
    if fixed and last:
        apply_linear(w, joined, last)


def _operator(w: Writer, query: _Heads, keys: _Heads, values: _Heads) -> None:
    """The operator itself, in 4-D form."""
    inputs: list[Value | None] = [query.value, keys.value, values.value]
    extra: dict[str, object] = {}
    if w.chance(40):
        mask = (1, 1, 1, 1)
        inputs.append(w.const(w.array(mask)))
    elif w.chance(30):
        extra["is_causal"] = 1
    if w.chance(30):
        extra["scale"] = 0.37
    w.emit("Attention", inputs, [(query.value.dtype, query.value.shapes)], **extra)


def rotate(w: Writer, x: Value) -> Value:
    """x * cos + rotated(x) * sin on [B, H, S, c], or nearly."""
    size = x.size(-1) or 1
    if size < 2 or size % 2:
        return x
    tables = [w.array((16, size)) for _ in range(2)]
    if w.chance(85):  # both halves alike, as in every real table
        tables = [np.concatenate([t[:, : size // 2]] * 2, axis=1) for t in tables]
    at = positions(w, w.dim(x, 2))
    cos, sin = (
        w.unsqueeze(w.unsqueeze(w.gather(w.const(t), at), [0]), [1 if w.chance(90) else 0])
        for t in tables
    )
    half = size // 2
    axis = x.rank - 1 if w.chance(50) else -1
    if w.chance(50):
        first, second = w.slice(x, axis, 0, half), w.slice(x, axis, half, w.pick([size, 2**62]))
    else:
        first, second = w.split(x, axis, [half, half])
    if w.chance(93):
        turned = w.concat([w.op("Neg", second), first], -1)
    else:
        turned = w.concat([second, w.op("Neg", first)], -1)
    return w.op("Add", *w.swap(w.op("Mul", x, cos), w.op("Mul", turned, sin)))


def rotary(w: Writer) -> None:
    """A rotary embedding by itself, partial at times."""
    x = w.floats(rank=4, last=True)
    if x is None or w.opset < 13:
        return
    size = x.size(-1) or 1
    if size >= 3 and w.chance(40):
        cut = 2 * w.r.randrange(1, (size - 1) // 2 + 1)
        first, rest = w.slice(x, -1, 0, cut), w.slice(x, -1, cut, size)
        w.concat([rotate(w, first), rest], -1)
    else:
        rotate(w, x)
