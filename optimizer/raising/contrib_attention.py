"""Attention that ONNX Runtime's tools fuse becomes the standard Attention and its projections.

Rewrite: MultiHeadAttention(q, k, v, b, mask, bias, past) -> Attention(q + bq, k + bk, v + bv, ..);
         Attention(x, [Wq | Wk | Wv], b, mask, past) -> the same with x Wq, x Wk, x Wv;
         RotaryEmbedding(x, positions, cos, sin) -> RotaryEmbedding(x, cos[positions], ..);
         GroupQueryAttention(x [Wq | Wk | Wv]) -> GroupQueryAttention(x Wq, x Wk, x Wv)
Applies when: weights are constant, masks are flags or lengths per row, caches are appended. A
         GroupQueryAttention stays what it is: it puts new keys after the last valid ones of each
         row, which no standard operator does.
Exactness: reassociated
Source:  ONNX Runtime's documentation of its operators (ContribOperators)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer import block_parts
from optimizer import graph as graphs
from optimizer.nodes import dims, operand, optional
from optimizer.raising.base import LocalRule, Miss, RuleReport, site, sweep
from optimizer.raising.contrib import DOMAIN, Pen, output
from optimizer.raising.dims import Dim
from optimizer.raising.masks import Masks, Part
from optimizer.raising.shapes import Shapes


def run(model: ir.Model) -> RuleReport:
    """Raise every fused attention and rotary embedding of the main graph."""
    shapes = Shapes()
    masks = Masks(model.graph, shapes)
    rules: dict[str, LocalRule] = {
        "Attention": lambda node: _packed(_Site(node, shapes, masks)),
        "GroupQueryAttention": _unpacked,
        "MultiHeadAttention": lambda node: _multi_head(_Site(node, shapes, masks)),
        "RotaryEmbedding": lambda node: _rotary(node, shapes),
    }
    return sweep(model, rules, DOMAIN)


#: What is added to scores that do not count, unless a node says otherwise.
_FILTER = -10000.0
#: Input that says which keys count, of each operator.
_MASKS = {"Attention": 3, "MultiHeadAttention": 4}


@dataclass(frozen=True)
class _Site:
    node: ir.Node
    shapes: Shapes
    masks: Masks

    @property
    def pen(self) -> Pen:
        return Pen.of(self.node)

    def miss(self, reason: str) -> Miss:
        return Miss(site(self.node), reason)

    @property
    def heads(self) -> int:
        return int(self.node.attributes.get_int("num_heads", 0))


def _multi_head(here: _Site) -> bool | Miss:
    node, pen = here.node, here.pen
    query, key, value, bias = (optional(node, index) for index in range(4))
    if query is None or key is None or value is None:
        return here.miss("its queries, keys and values are packed in one value")
    if any(optional(node, index) is not None for index in (8, 9)):
        return here.miss("its cache is shared in place or by beams")
    if output(node, 3) is not None:
        return here.miss("its scores are read")
    ranks = [len(v.shape) if v.shape is not None else 3 for v in (query, key, value)]
    if ranks[0] != 3 or ranks[1] != ranks[2] or ranks[1] not in (3, 4):
        return here.miss("its queries, keys and values are packed")
    sides, past = [query, key, value], [optional(node, 6), optional(node, 7)]
    size, width = None if bias is None else dims(bias), _width(here, query, key)
    if not isinstance(width, int) or (bias is not None and (size is None or len(size) != 1)):
        return here.miss("the biases of its projections are not constant")
    complete = ranks[1] == 4  # keys and values in a cache have their bias already
    problem = _cache_refusal(here, key, past) if complete else _refusal(here, key, width)
    if problem is not None:
        return here.miss(problem)
    if bias is not None and size is not None:
        ends = [(0, width), (width, 2 * width), (2 * width, size[0])][: 1 if complete else 3]
        biased = [_shifted(pen, v, bias, part) for v, part in zip(sides, ends, strict=False)]
        sides = [*biased, *sides[len(biased) :]]
    if complete:
        return _over_cache(here, sides)
    return _attend(here, sides, width, past, (optional(node, 4), optional(node, 5)))


def _width(here: _Site, query: ir.Value, key: ir.Value) -> Dim | None:
    """The width of all heads of the queries, which is that of the keys [B, T, H*c]."""
    shapes = [here.shapes.of(query), here.shapes.of(key)]
    known = (shape[2] for shape in shapes if shape is not None and len(shape) == 3)
    return next((size for size in known if isinstance(size, int)), None)


def _columns(pen: Pen, weights: ir.Value, start: int, end: int) -> ir.Value:
    """Some columns of a constant matrix, or numbers of a constant vector."""
    shape = (*(dims(weights) or ())[:-1], end - start)
    tensor = graphs.derived(weights, shape, lambda array: array[..., start:end])
    return graphs.add_initializer(pen.graph, f"{weights.name}_{start}", tensor)


def _shifted(pen: Pen, value: ir.Value, bias: ir.Value, part: tuple[int, int]) -> ir.Value:
    return pen.put("Add", (value, _columns(pen, bias, *part)), name=f"{value.name}_biased")


def _cache_refusal(here: _Site, keys: ir.Value, past: Sequence[ir.Value | None]) -> str | None:
    more = (*past, optional(here.node, 4), output(here.node, 1), output(here.node, 2))
    if any(value is not None for value in more):
        return "a mask or a cache beside keys and values that are complete"
    if here.node.attributes.get_int("unidirectional", 0):
        return "an order of tokens beside keys and values that are complete"
    size = (here.shapes.of(keys) or (None,))[-1]
    return None if isinstance(size, int) and here.heads else "the size of its heads is not known"


def _over_cache(here: _Site, sides: list[ir.Value]) -> bool:
    """Queries [B, S, H*c] over keys and values [B, H, T, c] that are complete."""
    node, pen = here.node, here.pen
    size = (here.shapes.of(sides[1]) or (None,))[-1]
    assert isinstance(size, int)  # noqa: S101 - else it was refused
    split = pen.put("Reshape", (sides[0], pen.integers(0, 0, here.heads, size)))
    query = pen.put("Transpose", (split,), {"perm": [0, 2, 1, 3]})
    attributes = _attributes(node, size)
    inputs = [query, *sides[1:], *([] if (added := optional(node, 5)) is None else [added])]
    y = pen.put("Attention", inputs, attributes)
    rows = pen.put("Transpose", (y,), {"perm": [0, 2, 1, 3]})
    return pen.done(0, pen.put("Reshape", (rows, pen.integers(0, 0, here.heads * size))))


def _attributes(node: ir.Node, size: int) -> dict[str, object]:
    scale = node.attributes.get_float("scale", 0.0) or size**-0.5
    return {"scale": float(scale), "softcap": 0.0, "is_causal": 0}


def _packed(here: _Site) -> bool | Miss:
    """Projections in one matrix become three."""
    node, pen = here.node, here.pen
    x, weights, bias = operand(node), optional(node, 1), optional(node, 2)
    shape = None if weights is None else dims(weights)
    if (
        weights is None
        or shape is None
        or len(shape) != 2
        or (bias is not None and dims(bias) is None)
    ):
        return here.miss("its weights are not constant")
    if node.attributes.get_int("do_rotary", 0):
        return here.miss("it turns queries and keys itself")
    if node.attributes.get_int("past_present_share_buffer", 0) or optional(node, 6) is not None:
        return here.miss("its cache is filled in place")
    sizes = list(node.attributes.get_ints("qkv_hidden_sizes", [shape[1] // 3] * 3))
    problem = _refusal(here, x, sizes[0])
    if problem is not None:
        return here.miss(problem)
    starts = [0, sizes[0], sizes[0] + sizes[1]]
    sides = []
    for start, size in zip(starts, sizes, strict=True):
        own = _columns(pen, weights, start, start + size)
        y = pen.put("MatMul", (x, own), name=f"{node.outputs[0].name}_{start}")
        sides.append(y if bias is None else _shifted(pen, y, bias, (start, start + size)))
    past = optional(node, 4)
    pair: list[ir.Value | None] = [None, None]
    if past is not None:
        places = [pen.constant("place", np.array(index, np.int64)) for index in (0, 1)]
        pair = [pen.put("Gather", (past, place), {"axis": 0}) for place in places]
    return _attend(here, sides, sizes[0], pair, (optional(node, 3), optional(node, 5)))


def _refusal(here: _Site, keys: ir.Value, width: Dim | None) -> str | None:
    """Why there is no standard Attention, to be asked before anything is written.

    Args:
        here: The site.
        keys: [B, T, ..], what they are made of included.
        width: Of all heads of the queries.
    """
    if not isinstance(width, int) or not here.heads or width % here.heads:
        return "the size of its heads is not known"
    shape, size = here.shapes.of(operand(here.node)), here.shapes.of(keys)
    if shape is None:
        return "the rank of its queries is not known"
    if here.node.attributes.get_int("unidirectional", 0) and (shape[1:2] != (size or ())[1:2]):
        return "an order of tokens of which keys and queries may not be the same"
    mask = optional(here.node, _MASKS[here.node.op_type])
    if mask is None:
        return None
    shape, batch = here.shapes.of(mask), (size or (None,))[0]
    if shape is None or len(shape) not in (1, 2, 3):
        return "its mask is neither of flags nor of lengths"
    return "its mask is not one length per row" if len(shape) == 1 and shape[0] != batch else None


def _attend(
    here: _Site,
    sides: list[ir.Value],
    width: int,
    past: Sequence[ir.Value | None],
    masks: tuple[ir.Value | None, ir.Value | None],
) -> bool:
    """Write the Attention of queries, keys and values in 3-D form."""
    node, pen = here.node, here.pen
    mask, added = masks
    parts = [] if added is None else [Part(added)]
    if mask is not None:
        parts.append(Part(_filtered(here, mask, sides, past[0])))
    if node.attributes.get_int("unidirectional", 0):
        parts.append(Part(_causal(pen, sides[0], past[0]), keeps=True))
    combined = _combined(here, sides[0], parts)
    inputs: list[ir.Value | None] = [*sides, combined]
    caches = any(value is not None for value in past)
    if caches:
        inputs += past
    elif combined is None:
        inputs.pop()
    attributes = _attributes(node, width // here.heads)
    attributes |= {"q_num_heads": here.heads, "kv_num_heads": here.heads}
    count = 3 if caches or output(node, 1) is not None else 1
    made = graphs.insert(
        pen.graph, node, "Attention", inputs, attributes, outputs=count, dtype=sides[0].dtype,
        name=f"{node.outputs[0].name}_standard",
    )  # fmt: skip
    results = made if isinstance(made, tuple) else (made,)
    graphs.carry_notes(node, results[0])
    pen.done(0, results[0])
    if node.op_type == "Attention" and output(node, 1) is not None:
        axis = pen.integers(0)
        stacked = [pen.put("Unsqueeze", (value, axis)) for value in results[1:]]
        pen.done(1, pen.put("Concat", stacked, {"axis": 0}))
    elif node.op_type == "MultiHeadAttention":
        for index in (1, 2):
            if output(node, index) is not None:
                pen.done(index, results[index])
    return True


def _combined(here: _Site, query: ir.Value, parts: list[Part]) -> ir.Value | None:
    """One mask with the queries' axis written out, None without any."""
    mask = here.masks.combine(parts, here.node)
    shape = here.shapes.of(query)
    if mask is None or shape is None:
        return mask
    return here.masks.fitted(mask, query, shape[1], here.node)


def _filtered(
    here: _Site, mask: ir.Value, sides: Sequence[ir.Value], past: ir.Value | None
) -> ir.Value:
    """What ONNX Runtime adds to the scores: 0, or a number that a large score could outweigh."""
    dtype = sides[0].dtype or ir.DataType.FLOAT
    hidden = here.node.attributes.get_float("mask_filter_value", _FILTER)
    zero, low = (here.pen.constant("number", np.array(n, dtype.numpy())) for n in (0, hidden))
    kept = _kept(here, mask, sides[1], past)
    return here.pen.put("Where", (kept, zero, low), dtype=dtype)


def _kept(here: _Site, mask: ir.Value, keys: ir.Value, past: ir.Value | None) -> ir.Value:
    """The bool mask, broadcastable to [B, H, S, T], of flags or of lengths."""
    pen = here.pen
    shape = here.shapes.of(mask) or ()
    if len(shape) == 1:
        total = _count(pen, keys, past)
        zero, one = (pen.constant("number", np.array(n, np.int64)) for n in (0, 1))
        places = pen.put("Range", (zero, total, one))
        lengths = pen.put("Cast", (mask,), {"to": ir.DataType.INT64.value}, ir.DataType.INT64)
        column = pen.put("Unsqueeze", (lengths, pen.integers(1)))
        flags = pen.put("Less", (places, column), dtype=ir.DataType.BOOL)
    else:
        flags = pen.put("Cast", (mask,), {"to": ir.DataType.BOOL.value}, ir.DataType.BOOL)
    axes = (1,) if len(shape) == 3 else (1, 2)
    return pen.put("Unsqueeze", (flags, pen.integers(*axes)))


def _count(pen: Pen, values: ir.Value, past: ir.Value | None) -> ir.Value:
    """The number of tokens of ``values`` [B, T, ..] and of a cache [B, H, P, c], a scalar."""
    axis = pen.integers(0)
    shape = pen.put("Shape", (values,), {"start": 1, "end": 2}, ir.DataType.INT64)
    total = pen.put("Squeeze", (shape, axis))
    if past is None:
        return total
    before = pen.put("Shape", (past,), {"start": 2, "end": 3}, ir.DataType.INT64)
    return pen.put("Add", (total, pen.put("Squeeze", (before, axis))))


def _causal(pen: Pen, query: ir.Value, past: ir.Value | None) -> ir.Value:
    """Key j is seen by query i of this step where j <= i + P; [S, P + S]."""
    zero, one = (pen.constant("number", np.array(n, np.int64)) for n in (0, 1))
    total, step = _count(pen, query, past), _count(pen, query, None)
    first = pen.put("Sub", (total, step))
    rows = pen.put("Range", (first, total, one))
    column = pen.put("Unsqueeze", (rows, pen.integers(1)))
    places = pen.put("Range", (zero, total, one))
    return pen.put("LessOrEqual", (places, column), dtype=ir.DataType.BOOL)


def _rotary(node: ir.Node, shapes: Shapes) -> bool | Miss:
    """Tables are looked up by position: once for all that look up the same."""
    x, positions, cos, sin = (operand(node, index) for index in range(4))
    pen = Pen.of(node)
    shape, size = shapes.of(x), dims(cos)
    if node.attributes.get_int("is_packed_batching", 0):
        return Miss(site(node), "its rows are packed into one")
    if node.attributes.get_float("scale", 1.0) != 1.0:  # ONNX Runtime's CPU takes no notice
        return Miss(site(node), "its tables are multiplied by a scale")
    if shape is None or len(shape) not in (3, 4) or size is None:
        return Miss(site(node), "the rank of its input, or its tables, are not known")
    part = node.attributes.get_int("rotary_embedding_dim", 0)
    heads = node.attributes.get_int("num_heads", 0)
    if len(shape) == 3 and not heads:
        width = shape[2]
        if not isinstance(width, int):
            return Miss(site(node), "the number of its heads is not known")
        heads = width // (2 * size[1])
    where = shapes.of(positions)
    if where is None or len(where) not in (1, 2):
        return Miss(site(node), "the rank of its positions is not known")
    if len(where) == 1:
        positions = _from_offset(pen, x, positions, axis=1 if len(shape) == 3 else 2)
    attributes: dict[str, object] = {
        "interleaved": node.attributes.get_int("interleaved", 0),
        "rotary_embedding_dim": part,
    }
    if len(shape) == 3:
        attributes["num_heads"] = heads
    inputs = (x, cos, sin, positions)
    return pen.done(0, pen.put("RotaryEmbedding", inputs, attributes))


def _from_offset(pen: Pen, x: ir.Value, offset: ir.Value, axis: int) -> ir.Value:
    """Positions [B, S] of rows that all start at ``offset`` [1]."""
    zero, one = (pen.constant("number", np.array(n, np.int64)) for n in (0, 1))
    batch = pen.put("Shape", (x,), {"start": 0, "end": 1}, ir.DataType.INT64)
    length = pen.put("Shape", (x,), {"start": axis, "end": axis + 1}, ir.DataType.INT64)
    count = pen.put("Squeeze", (length, pen.integers(0)))
    row = pen.put("Add", (pen.put("Range", (zero, count, one)), offset))
    target = pen.put("Concat", (batch, length), {"axis": 0})
    return pen.put("Expand", (row, target))


def _unpacked(node: ir.Node) -> bool | Miss:
    """The packed projection of a GroupQueryAttention, cut into three."""
    if optional(node, 1) is not None or optional(node, 2) is not None:
        return False
    layer = block_parts.linear(operand(node))
    sizes = [node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads")]
    constants = () if layer is None else (layer.weight, layer.bias)
    if layer is None or any(v is not None and graphs.constant(v) is None for v in constants):
        return Miss(site(node), "its packed queries, keys and values are no linear layer")
    columns = (dims(layer.weight) or (0,))[-1]
    size = columns // max(1, sizes[0] + 2 * sizes[1])
    if not all(sizes) or size * (sizes[0] + 2 * sizes[1]) != columns:
        return Miss(site(node), "the size of its heads is not known")
    pen, start = Pen.of(node), 0
    for index, count in enumerate((sizes[0], sizes[1], sizes[1])):
        own = _columns(pen, layer.weight, start, start + count * size)
        y = pen.put("MatMul", (layer.input, own), name=f"{layer.output.name}_{index}")
        if layer.bias is not None:
            y = _shifted(pen, y, layer.bias, (start, start + count * size))
        node.replace_input_with(index, y)
        start += count * size
    return True
