"""The operator ``optimize.SparseMatMul``: attributes, inputs, and its body in standard operators.

y = activation(x W + bias), W [K, N] constant, stored as a bitmap and its non-zero values. The body
is the documentation of the operator, the oracle of its tests, and what runs where the library is
not registered: ONNX Runtime then decodes the weight once, when the session is made, and runs the
dense product.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

DOMAIN = "optimize"
OP_TYPE = "SparseMatMul"
VERSION = 1

#: Rows (K) and columns (N) of a tile of the stored form.
TILE = 64
#: Bytes of one tile's bitmap.
BITMAP_BYTES = TILE * TILE // 8

#: Inputs in order; the last three may be absent, from the end.
INPUTS = ("x", "bitmap", "values", "offsets", "bias", "scale", "x_scale")
#: "num_inputs" is the number of inputs, "most_values" at least the stored values of any tile, gaps
#: included, or 0 where that is not known (layouts of the CPU); "declaration" is
#: ``declaration_hash()``.
ATTRIBUTES = ("K", "N", "layout", "activation", "num_inputs", "most_values", "declaration")
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")

#: Where a token's largest number is below this, its scale is that of this number.
FLOOR = 1e-12
#: Sums of int8 products, taken with activations moved to 0..255, must fit in int32.
MAX_K_INT8 = 2**31 // (255 * 127)


@dataclass(frozen=True)
class Layout:
    """Order of a tile's 4096 positions.

    Attributes:
        name: As in the attribute ``layout``.
        dims: The positions, as an array of these dimensions ...
        perm: ... give the tile [64 (k), 64 (n)] when transposed by this and reshaped.
        int8: Whether the values are int8 with one scale per column.
        device: "cpu" or "cuda".
    """

    name: str
    dims: tuple[int, ...]
    perm: tuple[int, ...]
    int8: bool = False
    device: str = "cpu"


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        # one row of 64 columns after the other
        Layout("n64k1", (64, 64), (0, 1)),
        # groups of 16 columns by 4 rows: what one 64-byte instruction of int8 products takes
        Layout("n16k4", (16, 4, 16, 4), (0, 3, 1, 2), int8=True),
        # positions [nb, kb, h, g, t, e] with k = 16 t + 4 kb + e and n = 16 nb + 8 h + g: lane
        # 4 g + t of a warp has four bits of each group (nb, kb, h)
        Layout("mma16", (4, 4, 2, 8, 4, 4), (4, 1, 5, 0, 2, 3), device="cuda"),
        Layout("mma8", (4, 4, 2, 8, 4, 4), (4, 1, 5, 0, 2, 3), int8=True, device="cuda"),
    )
}


@dataclass(frozen=True)
class MetadataLayout:
    """Order of a tile's 2048 values and 1024 nibbles of 2:4 sparsity along K.

    Every four neighbours along K have two values and a nibble: the place of the first among the
    four in bits 0 and 1, that of the second in bits 2 and 3.

    Attributes:
        values: The values, as an array of these dimensions ...
        values_perm: ... give [64 (n), 16 (fours along k), 2] when transposed by this and reshaped.
        nibbles: The nibbles, those of a byte's lower half first, of these dimensions ...
        nibbles_perm: ... give [64 (n), 16 (fours along k)].
        int8: Whether the values are int8 with one scale per column.
        version: Of the order.
        device: "cuda".
    """

    name: str
    values: tuple[int, ...]
    values_perm: tuple[int, ...]
    nibbles: tuple[int, ...]
    nibbles_perm: tuple[int, ...]
    int8: bool = False
    version: int = 1
    device: str = "cuda"


#: Instead of values and a bitmap: what ``mma.sp`` takes (optimizer.custom_ops.cuda_layout).
METADATA_LAYOUTS: dict[str, MetadataLayout] = {
    layout.name: layout
    for layout in (
        # values [nb, s, g, t, q, h, 2] with fours (s, q, t); nibbles [g, s, u, nb, h, 4]
        MetadataLayout(
            "sp16", (4, 2, 8, 4, 2, 2, 2), (0, 5, 2, 1, 4, 3, 6), (8, 2, 2, 4, 2, 4),
            (3, 4, 0, 1, 2, 5),
        ),
        # values [nb, g, t, q, h, r, 2] with fours (q, t, r); nibbles [g, v, h, nb, 8]
        MetadataLayout(
            "sp8", (4, 8, 4, 2, 2, 2, 2), (0, 4, 1, 3, 2, 5, 6), (8, 2, 2, 4, 8),
            (3, 2, 0, 1, 4), int8=True,
        ),
    )
}  # fmt: skip


def layout_of(name: str) -> Layout | MetadataLayout:
    """The layout of a name.

    Raises:
        ValueError: There is none.
    """
    found = LAYOUTS.get(name) or METADATA_LAYOUTS.get(name)
    if found is None:
        msg = f"{OP_TYPE} has no layout '{name}'"
        raise ValueError(msg)
    return found


def declaration_hash() -> int:
    """A positive 63-bit number that changes whenever a model or a library must be made again."""
    facts = {
        "name": [DOMAIN, OP_TYPE, VERSION],
        "inputs": INPUTS,
        "attributes": ATTRIBUTES,
        "activations": ACTIVATIONS,
        "tile": TILE,
        "floor": FLOOR,
        "layouts": [[x.name, x.dims, x.perm, x.int8, x.device] for x in LAYOUTS.values()],
        "metadata_layouts": {x.name: x.version for x in METADATA_LAYOUTS.values()},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def overload(layout: str, activation: str, inputs: int) -> str:
    """Name of the body for a form of the operator: attributes choose among bodies by it."""
    return f"{layout}.{activation}.{inputs}"


class _Body:
    """Collects the nodes of a function."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        self.nodes.append(node)
        return node.outputs[0]

    def const(self, value: Any, dtype: str) -> ir.Value:
        tensor = ir.tensor(np.array(value, dtype))
        return self.op("Constant", value=tensor)

    def float32(self, value: ir.Value) -> ir.Value:
        return self.op("Cast", value, to=ir.DataType.FLOAT.value)

    def attribute(self, name: str) -> ir.Value:
        """An int attribute of the operator as int64 [1]."""
        node = ir.Node(
            "", "Constant", [], [ir.RefAttr("value_int", name, ir.AttributeType.INT)], num_outputs=1
        )
        self.nodes.append(node)
        return self.op("Reshape", node.outputs[0], self.const([1], "int64"))


def body(
    layout: str, activation: str, inputs: int, opset: int = 21, *, decoded: bool = False
) -> ir.Function:
    """The operator as a function of standard operators.

    Args:
        layout: A name of ``LAYOUTS`` or ``METADATA_LAYOUTS``. The body of a layout of CUDA computes
            in float32 whatever the type of x is, as the kernels do, and rounds the result once.
        activation: One of ``ACTIVATIONS``.
        inputs: How many of ``INPUTS`` there are: 4 or 5, for int8 values 6 or 7.
        opset: Of the model: 18 or later, 20 or later with a Gelu.
        decoded: Whether W [K, N] itself comes in the place of the bitmap. A float product is then
            one of the type of x, from which the operator was made.

    Raises:
        ValueError: There is no such form.
    """
    form = layout_of(layout)
    if activation not in ACTIVATIONS or inputs not in ((6, 7) if form.int8 else (4, 5)):
        msg = f"SparseMatMul has no form {overload(layout, activation, inputs)}"
        raise ValueError(msg)
    values = [ir.Value(name=name) for name in INPUTS[:inputs]]
    given = dict(zip(INPUTS, values, strict=False))
    b = _Body()
    weight = given["bitmap"] if decoded else _decode(b, form, given)
    x = given["x"]
    narrow = form.device == "cuda" and (form.int8 or not decoded)
    if narrow:
        given |= {name: b.float32(given[name]) for name in ("x", "bias") if name in given}
        weight = weight if form.int8 else b.float32(weight)
    y = _int8_product(b, given, weight) if form.int8 else b.op("MatMul", given["x"], weight)
    if "bias" in given:
        y = b.op("Add", y, given["bias"])
    y = _activate(b, y, activation)
    if narrow:
        y = b.op("CastLike", y, x)
    y.name = "y"
    graph = ir.Graph(values, [y], nodes=b.nodes, opset_imports={"": opset})
    attributes = [ir.Attr(n, ir.AttributeType.UNDEFINED, None) for n in ATTRIBUTES]
    name = overload(layout, activation, inputs) + (".decoded" if decoded else "")
    return ir.Function(DOMAIN, OP_TYPE, name, graph=graph, attributes=attributes)


def _decode(b: _Body, layout: Layout | MetadataLayout, given: dict[str, ir.Value]) -> ir.Value:
    """W [K, N]: int8, or float32 (of the values' type for the CPU's layouts)."""
    # ONNX Runtime selects among numbers of 32 bits; where it cannot, it would decode in every run.
    values = given["values"]
    if layout.int8 or layout.device == "cuda":
        wide = ir.DataType.INT32 if layout.int8 else ir.DataType.FLOAT
        given = given | {"values": b.op("Cast", values, to=wide.value)}
    if isinstance(layout, MetadataLayout):
        whole = _whole(b, _pairs(b, layout, given), (TILE, TILE), (1, 3, 0, 2))
    else:
        whole = _by_bitmap(b, layout, given)
    return b.op("Cast", whole, to=ir.DataType.INT8.value) if layout.int8 else whole


def _by_bitmap(b: _Body, layout: Layout, given: dict[str, ir.Value]) -> ir.Value:
    size = TILE * TILE
    shaped = b.op("Reshape", given["bitmap"], b.const([-1, BITMAP_BYTES, 1], "int64"))
    powers = b.const([1, 2, 4, 8, 16, 32, 64, -128], "int8")
    bits = b.op("Cast", b.op("BitwiseAnd", shaped, powers), to=ir.DataType.BOOL.value)
    stored = b.op("Reshape", bits, b.const([-1, size], "int64"))
    ranks = b.op("CumSum", b.op("Cast", stored, to=ir.DataType.INT32.value), b.const(1, "int64"))
    starts = b.op("Slice", given["offsets"], b.const([0], "int64"), b.const([-1], "int64"))
    starts = b.op("Sub", b.op("Unsqueeze", starts, b.const([1], "int64")), b.const(1, "int32"))
    places = b.op("Where", stored, b.op("Add", ranks, starts), b.const(0, "int32"))
    # There is at least one value, so that place 0 can be read.
    numbers = b.op("Gather", given["values"], places, axis=0)
    tiles = b.op("Where", stored, numbers, _zero(b, given))
    rows = _rows_of(layout)
    order = (1, *(2 + i for i in layout.perm[:rows]), 0, *(2 + i for i in layout.perm[rows:]))
    return _whole(b, tiles, layout.dims, order)


def _zero(b: _Body, given: dict[str, ir.Value]) -> ir.Value:
    return b.op("CastLike", b.const(0, "float32"), given["values"])


def _pairs(b: _Body, layout: MetadataLayout, given: dict[str, ir.Value]) -> ir.Value:
    """Tiles [T, 64 (n), 64 (k)] of what is stored as pairs of four."""
    octets = b.op("Cast", given["bitmap"], to=ir.DataType.UINT8.value)
    octets = b.op("Cast", octets, to=ir.DataType.INT32.value)
    octets = b.op("Reshape", octets, b.const([-1, BITMAP_BYTES, 1], "int64"))
    halves = b.op("Mod", b.op("Div", octets, b.const([1, 16], "int32")), b.const(16, "int32"))
    shaped = b.op("Reshape", halves, b.const([-1, *layout.nibbles], "int64"))
    nibbles = b.op("Transpose", shaped, perm=(0, *(1 + i for i in layout.nibbles_perm)))
    nibbles = b.op("Reshape", nibbles, b.const([-1, TILE, TILE // 4, 1, 1], "int64"))
    places = b.op("Mod", b.op("Div", nibbles, b.const([[1], [4]], "int32")), b.const(4, "int32"))
    shaped = b.op("Reshape", given["values"], b.const([-1, *layout.values], "int64"))
    values = b.op("Transpose", shaped, perm=(0, *(1 + i for i in layout.values_perm)))
    values = b.op("Reshape", values, b.const([-1, TILE, TILE // 4, 2, 1], "int64"))
    here = b.op("Equal", places, b.const([0, 1, 2, 3], "int32"))  # [T, 64, 16, 2, 4]
    numbers = b.op("Where", here, values, _zero(b, given))
    # At most one of the two is here.
    return b.op("ReduceSum", numbers, b.const([3], "int64"), keepdims=0)


def _whole(b: _Body, tiles: ir.Value, dims: tuple[int, ...], order: tuple[int, ...]) -> ir.Value:
    """W [K, N] of the tiles [strip of columns, tile along K, *dims], transposed by ``order``."""
    one = b.const([1], "int64")
    last = b.const([TILE - 1], "int64")
    edge = b.const([TILE], "int64")
    k, n = b.attribute("K"), b.attribute("N")
    tiles_k = b.op("Div", b.op("Add", k, last), edge)
    tiles_n = b.op("Div", b.op("Add", n, last), edge)
    shape = b.op("Concat", tiles_n, tiles_k, b.const(dims, "int64"), axis=0)
    turned = b.op("Transpose", b.op("Reshape", tiles, shape), perm=order)
    whole = b.op("Concat", b.op("Mul", tiles_k, edge), b.op("Mul", tiles_n, edge), axis=0)
    padded = b.op("Reshape", turned, whole)
    return b.op(
        "Slice", padded, b.const([0, 0], "int64"), b.op("Concat", k, n, axis=0),
        b.const([0, 1], "int64"), b.op("Concat", one, one, axis=0),
    )  # fmt: skip


def _rows_of(layout: Layout) -> int:
    """How many of the permuted dimensions make up k."""
    product, count = 1, 0
    while product < TILE:
        product *= layout.dims[layout.perm[count]]
        count += 1
    return count


def _int8_product(b: _Body, given: dict[str, ir.Value], weight: ir.Value) -> ir.Value:
    """Float sums of int8 codes; W8 [K, N]."""
    x = given["x"]
    if "x_scale" in given:
        step = given["x_scale"]
    else:
        top = b.op("ReduceMax", b.op("Abs", x), b.const([-1], "int64"), keepdims=1)
        top = b.op("Max", top, b.const(FLOOR, "float32"))
        step = b.op("Div", top, b.const(127, "float32"))
    codes = b.op("Round", b.op("Mul", x, b.op("Reciprocal", step)))
    codes = b.op("Clip", codes, b.const(-128, "float32"), b.const(127, "float32"))
    sums = b.op("MatMulInteger", b.op("Cast", codes, to=ir.DataType.INT8.value), weight)
    # One after the other: ONNX Runtime takes the product of two scales as its own fused form, where
    # a scale per token is read as one number (seen in 1.32).
    y = b.op("Mul", b.op("Cast", sums, to=ir.DataType.FLOAT.value), step)
    return b.op("Mul", y, given["scale"])


def _activate(b: _Body, y: ir.Value, activation: str) -> ir.Value:
    if activation == "relu":
        return b.op("Relu", y)
    if activation == "silu":
        return b.op("Mul", y, b.op("Sigmoid", y))
    if activation == "gelu":
        return b.op("Gelu", y, approximate="none")
    if activation == "gelu_tanh":
        return b.op("Gelu", y, approximate="tanh")
    return y
