"""Motifs that ONNX Runtime's tools write: its own operators, fused from the standard ones."""

from __future__ import annotations

import math

import numpy as np
import onnx
from fuzzing.graphs import Writer
from fuzzing.values import FLOAT, INT64, Shape, Value

DOMAIN = "com.microsoft"
INT32 = onnx.TensorProto.INT32


def fused(w: Writer) -> None:
    """One operator of the domain."""
    x = w.floats(last=True)
    if x is None or w.dtype != FLOAT or x.rank < 2 or not x.size(-1):
        return
    kinds = [_gelu, _skip, _matmul, _simplified]
    if x.rank == 2:
        kinds.append(_gemm)
    if x.rank == 3:
        kinds += [_multi_head, _multi_head, _packed, _packed, _rotary]
    w.pick(kinds)(w, x, int(x.size(-1) or 1))


def _vector(w: Writer, size: int) -> Value:
    return w.const(w.array((size,), 0.5, 1.5))


def _gelu(w: Writer, x: Value, size: int) -> None:
    kind = w.pick(["FastGelu", "BiasGelu", "Gelu", "QuickGelu"])
    inputs = [x, _vector(w, size)]
    if kind in ("Gelu", "QuickGelu") or (kind == "FastGelu" and w.chance(50)):
        inputs.pop()
    extra = {"alpha": w.pick([1.702, 1.0, 0.5])} if kind == "QuickGelu" else {}
    w.emit(kind, inputs, [(FLOAT, x.shapes)], domain=DOMAIN, **extra)


def _skip(w: Writer, x: Value, size: int) -> None:
    """A norm of a sum, which may be read as well."""
    if x.rank != 3:
        return
    skip = w.find(lambda v: v.shapes == x.shapes and v.dtype == FLOAT) or x
    layer = w.chance(50)
    inputs: list[Value | None] = [x, skip, _vector(w, size)]
    if layer:
        inputs.append(_vector(w, size) if w.chance(70) else None)
    if w.chance(50):
        inputs.append(_vector(w, size))
    name = "SkipLayerNormalization" if layer else "SkipSimplifiedLayerNormalization"
    extra = {"epsilon": 1e-5} if w.chance(70) else {}
    outputs: list[tuple[int, tuple[Shape, ...]]] = [(FLOAT, x.shapes)]
    if w.chance(50):
        rows = tuple((*s[:-1], 1) for s in x.shapes)
        outputs += [(FLOAT, rows), (FLOAT, rows), (FLOAT, x.shapes)]
    before = len(w.scope)
    made = w.emit(name, inputs, outputs, domain=DOMAIN, **extra)
    del w.scope[before:]
    w.scope += [made[0], *made[3:]]
    if len(made) > 1:  # what the CPU does not compute is not there
        for index in (1, 2):
            w.nodes[-1].output[index] = ""


def _simplified(w: Writer, x: Value, size: int) -> None:
    kind = [(FLOAT, x.shapes)]
    extra = {"epsilon": w.pick([1e-5, 1e-6]), "axis": w.pick([-1, x.rank - 1])}
    w.emit("SimplifiedLayerNormalization", [x, _vector(w, size)], kind, stash_type=1, **extra)


def _matmul(w: Writer, x: Value, size: int) -> None:
    columns, alpha = w.r.randrange(1, 5), w.pick([1.0, 0.5, -2.0, 0.125])
    turned = w.chance(50)
    weight = w.const(w.array((columns, size) if turned else (size, columns)))
    shapes = tuple((*s[:-1], columns) for s in x.shapes)
    w.emit("FusedMatMul", [x, weight], [(FLOAT, shapes)], domain=DOMAIN,
           transB=int(turned), alpha=alpha)  # fmt: skip
    if w.chance(30):  # scores
        scores = tuple((*s[:-1], s[-2]) for s in x.shapes)
        w.emit("FusedMatMul", [x, x], [(FLOAT, scores)], domain=DOMAIN, transB=1, alpha=alpha)
    elif w.chance(30):
        gram = tuple((*s[:-2], s[-1], s[-1]) for s in x.shapes)
        w.emit("FusedMatMul", [x, x], [(FLOAT, gram)], domain=DOMAIN, transA=1, alpha=alpha)


def _gemm(w: Writer, x: Value, size: int) -> None:
    columns = w.r.randrange(1, 5)
    name, extra = w.pick(
        [("Relu", {}), ("Tanh", {}), ("LeakyRelu", {"activation_alpha": 0.1}), ("Sigmoid", {})]
    )
    inputs = [x, w.const(w.array((size, columns))), _vector(w, columns)]
    shapes = tuple((s[0], columns) for s in x.shapes)
    w.emit("FusedGemm", inputs[: w.pick([2, 3])], [(FLOAT, shapes)], domain=DOMAIN,
           activation=name, **extra)  # fmt: skip


def _project(w: Writer, x: Value, columns: int) -> Value:
    weight = w.const(w.array((int(x.size(-1) or 1), columns)))
    y = w.matmul(x, weight)
    assert y is not None
    return y


def _mask(w: Writer, x: Value, past: bool) -> Value | None:
    """Flags [B, total], their number per row [B], or nothing."""
    rows = w.dims_text(x)[:2]
    if w.chance(40) or rows != ["B", "S"]:
        return None
    flags = w.input(["B", "S"], INT32, w.name("mask"))
    if past:
        flags = w.concat([w.input(["B", "T"], INT32, w.name("mask")), flags], 1)
    if w.chance(30):
        return w.cast(w.reduce("ReduceSum", w.cast(flags, INT64), [1], 0), INT32)
    return flags


def _past(w: Writer, x: Value, heads: int, size: int) -> list[Value] | None:
    """A cache of keys and values [B, H, T, c]."""
    if w.dims_text(x)[0] != "B" or w.chance(60):
        return None
    return [w.input(["B", heads, "T", size]) for _ in range(2)]


def _multi_head(w: Writer, x: Value, size: int) -> None:
    heads, width = w.pick([1, 2]), w.pick([1, 2, 4])
    del size
    source = x
    past = _past(w, x, heads, width)
    if past is None and w.chance(20):
        other = w.floats(rank=3, last=True)
        if other is not None and [s[0] for s in other.shapes] == [s[0] for s in x.shapes]:
            source = other
    query = _project(w, x, heads * width)
    key, value = (_project(w, source, heads * width) for _ in range(2))
    bias = w.const(w.array((3 * heads * width,))) if w.chance(50) else None
    before = [p[2] for p in past[0].shapes] if past else [0] * w.feeds
    totals = [s[1] + n for s, n in zip(source.shapes, before, strict=True)]
    mask = _mask(w, source, past is not None)
    added = None
    if w.chance(25) and past is None and source is x and w.dims_text(x)[1] == "S":
        added = w.input([w.pick([1, "B"]) if w.dims_text(x)[0] == "B" else 1, heads, "S", "S"])
    inputs = [query, key, value, bias, mask, added, *(past or [])]
    whole = tuple((s[0], heads, t, width) for s, t in zip(x.shapes, totals, strict=True))
    outputs = [(FLOAT, query.shapes)]
    if past is not None:
        outputs += [(FLOAT, whole)] * 2
    extra = {"scale": w.pick([0.5, 1.0])} if w.chance(30) else {}
    if w.chance(20) and source is x:
        extra["unidirectional"] = 1
    made = w.emit("MultiHeadAttention", inputs, outputs, domain=DOMAIN, num_heads=heads, **extra)
    w.forced_outputs += made[1:]


def _packed(w: Writer, x: Value, size: int) -> None:
    heads, width = w.pick([1, 2]), w.pick([1, 2, 4])
    columns = heads * width
    weights = w.const(w.array((size, 3 * columns)) / math.sqrt(size))
    bias = w.const(w.array((3 * columns,)))
    rows = w.dims_text(x)
    past = None
    if rows[0] == "B" and w.chance(40):
        past = w.input([2, "B", heads, "T", width])
    mask = _mask(w, x, past is not None)
    extra = {"unidirectional": 1} if w.chance(40) else {}
    outputs = [(FLOAT, tuple((*s[:-1], columns) for s in x.shapes))]
    if past is not None:
        whole = tuple(
            (2, s[0], heads, s[1] + p[3], width) for s, p in zip(x.shapes, past.shapes, strict=True)
        )
        outputs.append((FLOAT, whole))
    made = w.emit("Attention", [x, weights, bias, mask, past], outputs, domain=DOMAIN,
                  num_heads=heads, **extra)  # fmt: skip
    w.forced_outputs += made[1:]


def _rotary(w: Writer, x: Value, size: int) -> None:
    """Turned by tables looked up at positions."""
    heads, width = w.pick([1, 2]), w.pick([2, 4])
    del size
    query = _project(w, x, heads * width)
    angles = np.outer(np.arange(8), 1.0 / 10.0 ** np.arange(width // 2))
    tables = [w.const(f(angles)) for f in (np.cos, np.sin)]
    if w.dims_text(x)[:2] == ["B", "S"] and w.chance(70):
        places = w.input(["B", "S"], INT64)
    else:
        places = w.ints([w.pick([0, 1, 2])])
    extra: dict[str, int] = {"interleaved": int(w.chance(40))}
    if w.chance(30):
        extra["num_heads"] = heads
    w.emit("RotaryEmbedding", [query, places, *tables], [(FLOAT, query.shapes)], domain=DOMAIN,
           **extra)  # fmt: skip


def embeddings(w: Writer) -> None:
    """The sum of up to three embeddings, normalized."""
    ids = w.find(lambda v: v.dtype == INT64 and v.exact and v.name in w.inputs and v.rank == 2)
    if ids is None or w.dtype != FLOAT:
        return
    size = w.pick([2, 4])
    whole = w.cast(ids, INT32)
    segments = w.cast(w.find(lambda v: v is ids) or ids, INT32) if w.chance(50) else None
    tables = [w.const(w.array((rows, size))) for rows in (3, 8, 3)]
    if segments is None:
        tables[2] = None
    inputs = [whole, segments, *tables, _vector(w, size), _vector(w, size)]
    shapes = tuple((*s, size) for s in ids.shapes)
    counts = tuple((s[0],) for s in ids.shapes)
    before = len(w.scope)
    made = w.emit("EmbedLayerNormalization", inputs, [(FLOAT, shapes), (INT32, counts)],
                  domain=DOMAIN, epsilon=1e-5)  # fmt: skip
    del w.scope[before:]
    w.scope.append(made[0])


def taken_apart(w: Writer) -> None:
    """A sequence of parts, of which some are read."""
    x = w.floats(last=True)
    size = None if x is None else x.size(-1)
    if x is None or w.opset < 11 or not size or size < 2:
        return
    keep = w.chance(80)
    first = w.r.randrange(1, size)
    sizes = [first, size - first]
    given = w.ints(sizes) if keep and w.chance(70) else None
    count = 2 if given is not None else size
    sequence = w.name("q")
    inputs = [x.name] if given is None else [x.name, given.name]
    extra = {} if keep or given is not None else {"keepdims": 0}
    axis = w.pick([-1, x.rank - 1])
    node = onnx.helper.make_node("SplitToSequence", inputs, [sequence], axis=axis, **extra)
    w.nodes.append(node)
    for _ in range(w.pick([1, 2])):
        place = w.r.randrange(count)
        one = 1 if given is None else sizes[place]
        shapes = tuple((*s[:-1], one) if keep or given is not None else s[:-1] for s in x.shapes)
        index = w.ints(place if w.chance(80) else place - count)
        handle = Value(sequence, x.dtype, shapes)
        w.emit("SequenceAt", [handle, index], [(x.dtype, shapes)])
