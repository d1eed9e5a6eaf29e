"""Spells canonical operators in elementary ones, as exporters of earlier opsets do.

Each rule writes a form that ``canonicalize`` raises back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.errors import UnsupportedError
from optimizer.half_weights import HALF_TYPES
from optimizer.nodes import operand, optional
from optimizer.raising.shapes import Shapes

#: ``qk_matmul_output_mode`` of an Attention whose fourth output comes after the softmax.
_WEIGHTS = 3


@dataclass(frozen=True)
class Pen:
    """Writes nodes in front of the one being replaced, and constants of its element type.

    Attributes:
        shared: What later nodes of the graph can read too: masks as numbers, rotary tables,
            rotated queries and keys by heads.
        floor: How far below a row's largest score the others may lie in attention, None = any.
            ``exp`` of cut-off scores would be a denormal number, which processors are slow at.
    """

    graph: ir.Graph
    node: ir.Node
    shared: dict[ir.Value, ir.Value]
    floor: float | None = None

    def put(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """A new node's output."""
        return graphs.insert(self.graph, self.node, op_type, inputs, attributes, dtype=dtype)

    def integers(self, *numbers: int) -> ir.Value:
        """An int64 vector."""
        name = "int_" + "_".join(str(n).replace("-", "m") for n in numbers)
        return self._known(name, np.array(numbers, np.int64))

    def number(self, value: float) -> ir.Value:
        """A scalar of the element type of the node's first input."""
        dtype = operand(self.node).dtype or ir.DataType.FLOAT
        array = np.array(value, dtype.numpy())
        return self._known(f"{dtype.name.lower()}_{value!r}", array)

    def _known(self, name: str, array: np.ndarray) -> ir.Value:
        known = self.graph.initializers.get(name)
        if known is not None:
            tensor = graphs.const(known)
            if tensor is not None and tensor.dtype == array.dtype and np.array_equal(tensor, array):
                return known
        return graphs.add_initializer(self.graph, name, array)

    def done(self, *values: ir.Value) -> None:
        """Put ``values`` in the place of the node's outputs, but for those left out (no name)."""
        for old, new in zip(self.node.outputs, values, strict=False):
            if old.name:
                graphs.replace_value(old, new, keep_name=True)
        self.graph.remove(self.node, safe=True)


def gelu(pen: Pen) -> None:
    """GELU: x * 0.5 * (1 + erf(x / sqrt 2)), or with tanh(sqrt(2 / pi) (x + 0.044715 x^3))."""
    node, x = pen.node, operand(pen.node)
    if node.attributes.get_string("approximate", "none") == "tanh":
        cube = pen.put("Mul", (pen.put("Mul", (x, x)), x))
        inner = pen.put("Add", (x, pen.put("Mul", (cube, pen.number(0.044715)))))
        curve = pen.put("Tanh", (pen.put("Mul", (inner, pen.number(math.sqrt(2 / math.pi)))),))
    else:
        curve = pen.put("Erf", (pen.put("Div", (x, pen.number(math.sqrt(2)))),))
    double = pen.put("Mul", (x, pen.put("Add", (curve, pen.number(1.0)))))
    pen.done(pen.put("Mul", (double, pen.number(0.5))))


def rms_normalization(pen: Pen) -> None:
    """RMS norm: x / sqrt(mean(x^2) + epsilon) * scale, in float32 where the operator asks for it.

    Raises:
        UnsupportedError: It is not over the last axis.
    """
    node, x, scale = pen.node, operand(pen.node), operand(pen.node, 1)
    if node.attributes.get_int("axis", -1) != -1:
        msg = f"node '{node.name}': RMSNormalization is lowered over the last axis only"
        raise UnsupportedError(msg)
    own = x.dtype or ir.DataType.FLOAT
    narrow = own not in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    stash = narrow and node.attributes.get_int("stash_type", 1) == 1
    source = pen.put("Cast", (x,), {"to": ir.DataType.FLOAT.value}) if stash else x
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    small = pen.number(epsilon)
    if stash:
        small = graphs.add_initializer(pen.graph, "epsilon", np.array(epsilon, np.float32))
    mean = pen.put("ReduceMean", (pen.put("Mul", (source, source)), pen.integers(-1)))
    root = pen.put("Sqrt", (pen.put("Add", (mean, small)),))
    unit = pen.put("Div", (source, root))
    if stash:
        unit = pen.put("Cast", (unit,), {"to": own.value})
    pen.done(pen.put("Mul", (unit, scale)))


def rotary_embedding(pen: Pen) -> None:
    """[x1 cos - x2 sin, x2 cos + x1 sin] of the halves x1, x2 of each head.

    Raises:
        UnsupportedError: It is not the canonical 3-D form with tables per token.
    """
    node, x = pen.node, operand(pen.node)
    heads, part = node.attributes.get_int("num_heads", 0), _rotary_dim(node)
    shape = Shapes().of(x)
    size = None if shape is None or len(shape) != 3 or not heads else shape[-1]
    if not isinstance(size, int) or optional(node, 3) is not None:
        msg = (
            f"node '{node.name}': RotaryEmbedding is lowered in the form [batch, sequence, "
            "heads * size] with one row of cos and sin per token only"
        )
        raise UnsupportedError(msg)
    width = size // heads
    x = pen.put("Reshape", (x, pen.integers(0, 0, heads, width)))
    x = pen.put("Transpose", (x,), {"perm": [0, 2, 1, 3]})
    rest = None
    if part and part != width:
        rest = _slice(pen, x, part, width)
        x = _slice(pen, x, 0, part)
    turn = _turn_pairs if node.attributes.get_int("interleaved", 0) else _turn_halves
    x = turn(pen, x, part or width)
    if rest is not None:
        x = pen.put("Concat", (x, rest), {"axis": -1})
    y = pen.put("Transpose", (x,), {"perm": [0, 2, 1, 3]})
    y = pen.put("Reshape", (y, pen.integers(0, 0, size)))
    pen.shared[y] = x  # attention wants it by heads, as it is before the last two
    pen.done(y)


def _rotary_dim(node: ir.Node) -> int:
    return int(node.attributes.get_int("rotary_embedding_dim", 0) or 0)


def _slice(pen: Pen, x: ir.Value, start: int, stop: int) -> ir.Value:
    return pen.put("Slice", (x, pen.integers(start), pen.integers(stop), pen.integers(-1)))


def _turn_halves(pen: Pen, x: ir.Value, width: int) -> ir.Value:
    """X [B, H, S, r] with halves x1, x2: x * [cos, cos] + [-x2, x1] * [sin, sin]."""
    tables = []
    for table in (operand(pen.node, 1), operand(pen.node, 2)):
        if table not in pen.shared:
            both = pen.put("Concat", (table, table), {"axis": -1})
            pen.shared[table] = pen.put("Unsqueeze", (both, pen.integers(1)))
        tables.append(pen.shared[table])
    one, two = _slice(pen, x, 0, width // 2), _slice(pen, x, width // 2, width)
    crossed = pen.put("Concat", (pen.put("Neg", (two,)), one), {"axis": -1})
    along, across = (
        pen.put("Mul", (v, table)) for v, table in zip((x, crossed), tables, strict=True)
    )
    return pen.put("Add", (along, across))


def _turn_pairs(pen: Pen, x: ir.Value, width: int) -> ir.Value:
    """X [B, H, S, r] with x1, x2 next to each other: [x1 cos - x2 sin, x2 cos + x1 sin]."""
    x = pen.put("Reshape", (x, pen.integers(0, 0, 0, width // 2, 2)))
    cos, sin = (pen.put("Unsqueeze", (operand(pen.node, i), pen.integers(1, 4))) for i in (1, 2))
    one, two = _slice(pen, x, 0, 1), _slice(pen, x, 1, 2)
    real = pen.put("Sub", (pen.put("Mul", (one, cos)), pen.put("Mul", (two, sin))))
    imaginary = pen.put("Add", (pen.put("Mul", (two, cos)), pen.put("Mul", (one, sin))))
    turned = pen.put("Concat", (real, imaginary), {"axis": -1})
    return pen.put("Reshape", (turned, pen.integers(0, 0, 0, width)))


def attention(pen: Pen) -> None:
    """Attention: softmax(softcap(scale q k^T) + mask) v on [batch, heads, tokens, size].

    Raises:
        UnsupportedError: It is neither the canonical 3-D form nor the 4-D form over a complete
            cache, or returns scores before the softmax.
    """
    node = pen.node
    heads, kv_heads, flat = head_counts(node)
    if _returns_scores(node) and node.attributes.get_int("qk_matmul_output_mode", 0) != _WEIGHTS:
        msg = (
            f"node '{node.name}': this Attention returns its scores from before the softmax, which "
            "is not lowered; choose --opset 23, or a --target that takes it"
        )
        raise UnsupportedError(msg)
    if optional(node, 6) is not None:
        msg = (
            f"node '{node.name}': this Attention says how many keys are no padding "
            "(nonpad_kv_seqlen), which is not lowered; say it with a mask"
        )
        raise UnsupportedError(msg)
    query, key, value = (operand(node, i) for i in range(3))
    if flat:
        query = by_heads(pen, query, heads)
        key, value = (by_heads(pen, v, kv_heads) for v in (key, value))
    if optional(node, 4) is not None:
        key = pen.put("Concat", (operand(node, 4), key), {"axis": 2})
        value = pen.put("Concat", (operand(node, 5), value), {"axis": 2})
    present = (key, value)
    if heads != kv_heads:
        key, value = (_repeat(pen, v, i, heads, kv_heads) for v, i in ((key, 1), (value, 2)))
    scores = _scores(pen, query, key, heads)
    if pen.floor is not None:
        top = pen.put("ReduceMax", (scores, pen.integers(-1)))
        scores = pen.put("Max", (scores, pen.put("Sub", (top, pen.number(pen.floor)))))
    weights = _softmax(pen, scores)
    total = pen.put("MatMul", (weights, value))
    if not flat:
        pen.done(total, *present, weights)
        return
    y = pen.put("Transpose", (total,), {"perm": [0, 2, 1, 3]})
    size = head_size(node, 2, kv_heads)
    y = pen.put("Reshape", (y, pen.integers(0, 0, heads * size)))
    pen.done(y, *present, weights)


def head_counts(node: ir.Node) -> tuple[int, int, bool]:
    """(H, Hkv, whether the heads are joined in the last axis).

    Raises:
        UnsupportedError: They are not known.
    """
    heads = node.attributes.get_int("q_num_heads", 0)
    kv_heads = node.attributes.get_int("kv_num_heads", 0)
    if heads and kv_heads:
        return heads, kv_heads, True
    shapes = Shapes()
    found = [shapes.of(operand(node, i)) for i in range(3)]
    counts = [shape[1] for shape in found if shape is not None and len(shape) == 4]
    if optional(node, 4) is None:
        match counts:
            case [int(heads), int(kv_heads), same] if same == kv_heads and heads % kv_heads == 0:
                return heads, kv_heads, False
    msg = (
        f"node '{node.name}': Attention is lowered in its 3-D form, and in its 4-D form with "
        "numbers of heads that are known and without a cache of its own, only"
    )
    raise UnsupportedError(msg)


def has_known_heads(node: ir.Node) -> bool:
    """Whether number and sizes of an Attention's heads are known, so that it can be spelled out."""
    try:
        heads, kv_heads, _ = head_counts(node)
        for index, count in ((0, heads), (1, kv_heads), (2, kv_heads)):
            head_size(node, index, count)
    except UnsupportedError:
        return False
    return True


def _softmax(pen: Pen, scores: ir.Value) -> ir.Value:
    """Over the keys, in the precision that the node asks for."""
    node = pen.node
    own = operand(node).dtype or ir.DataType.FLOAT
    precision = ir.DataType(node.attributes.get_int("softmax_precision", own.value))
    if precision is not own:
        scores = pen.put("Cast", (scores,), {"to": precision.value}, dtype=precision)
    weights = pen.put("Softmax", (scores,), {"axis": -1}, dtype=precision)
    graphs.carry_notes(node, weights)  # where raising looks for them
    if precision is not own:
        weights = pen.put("Cast", (weights,), {"to": own.value}, dtype=own)
    return weights


def _returns_scores(node: ir.Node) -> bool:
    """Whether anything reads the fourth output."""
    if len(node.outputs) < 4:
        return False
    return bool(node.outputs[3].uses()) or node.outputs[3].is_graph_output()


def head_size(node: ir.Node, index: int, heads: int) -> int:
    """The size of a head of an input [B, S, heads*c] or [B, heads, S, c].

    Raises:
        UnsupportedError: It is not known.
    """
    shape = Shapes().of(operand(node, index))
    width = None if shape is None else shape[-1]
    if shape is None or not isinstance(width, int):
        msg = f"node '{node.name}': the head size of this Attention is not known"
        raise UnsupportedError(msg)
    return width if len(shape) == 4 else width // heads


def _default_scale(node: ir.Node, heads: int) -> float:
    return math.sqrt(1 / head_size(node, 0, heads))


def by_heads(pen: Pen, x: ir.Value, heads: int) -> ir.Value:
    """An input [B, S, H*c] of the node as [B, H, S, c]."""
    if x in pen.shared:
        return pen.shared[x]
    index = next(i for i, v in enumerate(pen.node.inputs) if v is x)
    shape = pen.integers(0, 0, heads, head_size(pen.node, index, heads))
    return pen.put("Transpose", (pen.put("Reshape", (x, shape)),), {"perm": [0, 2, 1, 3]})


def _repeat(pen: Pen, x: ir.Value, index: int, heads: int, kv_heads: int) -> ir.Value:
    """[B, Hkv, T, c] -> [B, H, T, c], every head several times in a row."""
    count = heads // kv_heads
    wide = pen.put("Unsqueeze", (x, pen.integers(2)))
    wide = pen.put("Expand", (wide, pen.integers(1, 1, count, 1, 1)))
    return pen.put(
        "Reshape", (wide, pen.integers(0, heads, -1, head_size(pen.node, index, kv_heads)))
    )


def _scores(pen: Pen, query: ir.Value, key: ir.Value, heads: int) -> ir.Value:
    node = pen.node
    scale = node.attributes.get_float("scale", 0.0) or _default_scale(node, heads)
    turned = pen.put("Transpose", (key,), {"perm": [0, 1, 3, 2]})
    scores = pen.put("Mul", (pen.put("MatMul", (query, turned)), pen.number(scale)))
    softcap = node.attributes.get_float("softcap", 0.0)
    if softcap:
        bent = pen.put("Tanh", (pen.put("Div", (scores, pen.number(softcap))),))
        scores = pen.put("Mul", (bent, pen.number(softcap)))
    mask = optional(node, 3)
    if node.attributes.get_int("is_causal", 0):
        mask = _causal(pen, query, key, mask)
    if mask is None:
        return scores
    if mask.dtype in (None, ir.DataType.BOOL):
        mask = _additive(pen, mask)
    return pen.put("Add", (scores, mask))


def _additive(pen: Pen, mask: ir.Value) -> ir.Value:
    """0 where ``mask`` is True, else the lowest number: a row without keys stays finite."""
    if mask in pen.shared:
        return pen.shared[mask]
    dtype = operand(pen.node).dtype or ir.DataType.FLOAT
    lowest = float(ml_dtypes.finfo(dtype.numpy()).min)
    if dtype in HALF_TYPES:  # a score added to the lowest number would make it infinite
        lowest /= 2
    low = pen.number(lowest)
    result = pen.put("Where", (mask, pen.number(0.0), low), dtype=dtype)
    pen.shared[mask] = result  # the first node to ask comes first, so all others can read it
    return result


def _causal(pen: Pen, query: ir.Value, key: ir.Value, mask: ir.Value | None) -> ir.Value:
    """Key j is seen by query i where j <= i + past; combined with ``mask``."""
    rows, columns = (
        pen.put("Squeeze", (pen.put("Shape", (v,), {"start": 2, "end": 3}),)) for v in (query, key)
    )
    one, zero = (graphs.add_initializer(pen.graph, f"causal_{n}", np.array(n)) for n in (1, 0))
    past = pen.put("Sub", (columns, rows))
    last = pen.put("Add", (pen.put("Range", (zero, rows, one)), past))
    last = pen.put("Unsqueeze", (last, pen.integers(-1)))
    seen = pen.put("LessOrEqual", (pen.put("Range", (zero, columns, one)), last))
    seen.type = ir.TensorType(ir.DataType.BOOL)
    if mask is None:
        return seen
    if mask.dtype in (None, ir.DataType.BOOL):
        return pen.put("And", (seen, mask), dtype=ir.DataType.BOOL)
    return pen.put("Add", (_additive(pen, seen), mask), dtype=mask.dtype)
