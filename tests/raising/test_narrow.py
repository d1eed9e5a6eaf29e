"""Packed layers of int8, split with the steps after them: every column keeps its numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from contrib_case import constant
from rule_case import apply, graph, ops, refuses

from optimizer.raising import packed
from optimizer.raising.narrow import layer_at, selector

RNG = np.random.default_rng(11)
CODES = RNG.integers(-127, 127, (4, 6))
BY_COLUMN = np.linspace(0.01, 0.06, 6, dtype=np.float32)
BY_ROW = np.linspace(0.01, 0.04, 4, dtype=np.float32)
BLOCKS = np.linspace(0.01, 0.12, 12, dtype=np.float32).reshape(2, 6)


def integers(name: str, array: np.ndarray, kind: str = "int8") -> str:
    sizes = ",".join(map(str, array.shape))
    return f"{kind}[{sizes}] {name} = {{{', '.join(map(str, array.reshape(-1).tolist()))}}}"


CONSTANTS = ", ".join(
    (
        integers("codes", CODES), constant("columns", BY_COLUMN), constant("rows", BY_ROW),
        constant("blocks", BLOCKS), integers("middles", np.arange(6) - 2),
        constant("b", RNG.normal(size=6).astype(np.float32)),
        constant("row", RNG.normal(size=(1, 6)).astype(np.float32)),
        integers("biases", np.arange(6) * 7 - 20, "int32"),
        "float step = {0.05}, float[1] step1 = {0.05}, int8 zero = {0}, float big = {0.1}, "
        "int64[2] sizes = {2, 4}",
    )
)  # fmt: skip
SPLIT = "p, o = Split<axis = -1>(l, sizes)  y = Neg(p)  z = Neg(o)"
FLOATS = "e = DequantizeLinear<axis = 1>(codes, columns)  m = MatMul(x, e)"
PAIR = "q = QuantizeLinear(m, step, zero)  l = DequantizeLinear(q, step, zero)"
DYNAMIC = "i, s, n = DynamicQuantizeLinear(x)  a = MatMulInteger(i, codes, n)  f = Cast<to = 1>(a)"
LAYERS = {
    "scales per column": f"{FLOATS}  l = Add(m, b)",
    "scales per column, counted from the end": (
        "e = DequantizeLinear<axis = -1>(codes, columns, middles)  l = MatMul(x, e)"
    ),
    "one scale": "e = DequantizeLinear(codes, step)  l = MatMul(x, e)",
    "one scale of rank 1": "e = DequantizeLinear(codes, step1)  l = MatMul(x, e)",
    "scales per row": "e = DequantizeLinear<axis = 0>(codes, rows)  l = MatMul(x, e)",
    "scales per row, counted from the end": (
        "e = DequantizeLinear<axis = -2>(codes, rows)  l = MatMul(x, e)"
    ),
    "scales of blocks of rows": (
        "e = DequantizeLinear<axis = 0, block_size = 2>(codes, blocks)  l = MatMul(x, e)"
    ),
    "a result that is rounded": f"{FLOATS}  {PAIR}",
    "a result that is rounded behind its bias": f"{FLOATS}  k = Add(m, b)  {PAIR}".replace(
        "QuantizeLinear(m", "QuantizeLinear(k", 1
    ),
    "a bias of integers": (
        f"{FLOATS}  d = DequantizeLinear<axis = 0>(biases, columns)  l = Add(m, d)"
    ),
    "a bias of integers with one scale": (
        f"{FLOATS}  d = DequantizeLinear(biases, step)  l = Add(m, d)"
    ),
    "a bias before the product": f"{FLOATS}  l = Add(b, m)",
    "a bias of rank 2": f"{FLOATS}  l = Add(m, row)",
    "an added number": f"{FLOATS}  l = Add(m, big)",
    "dynamic scales": f"{DYNAMIC}  g = Mul(s, columns)  t = Mul(f, g)  l = Add(t, b)",
    "dynamic scales, in another order": f"{DYNAMIC}  g = Mul(columns, s)  l = Mul(g, f)",
    "a dynamic scale": f"{DYNAMIC}  l = Mul(f, s)",
    "integers and their middles": (
        "i, s, n = DynamicQuantizeLinear(x)  a = MatMulInteger(i, codes, n, middles)"
        "  f = Cast<to = 1>(a)  l = Mul(f, s)"
    ),
}  # fmt: skip


def case(layer: str) -> ir.Model:
    return graph(f"{layer}  {SPLIT}", inputs="float[B,3,4] x",
                 output="float[B,3,2] y, float[B,3,4] z", constants=CONSTANTS)  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_layer_is_split_with(name: str) -> None:
    model = case(LAYERS[name])
    before = ops(model)
    assert apply(model, packed.run).applied == 1
    after = ops(model)
    assert "Split" not in after
    for op_type, count in before.items():
        if op_type not in ("DynamicQuantizeLinear", "Neg", "Split"):
            assert after[op_type] == 2 * count, op_type
    products = [node for node in model.graph if node.op_type in ("MatMul", "MatMulInteger")]
    stored = [next(v for v in _constants(n) if len(v.shape) == 2) for n in products]
    assert sorted(value.shape[1] for value in stored) == [2, 4]


def _constants(node: ir.Node) -> list[ir.Value]:
    weight = node.inputs[1]
    producer = weight.producer()
    return [weight] if producer is None else [v for v in producer.inputs if v is not None]


UNSPLIT = {
    "blocks of columns": (
        "e = DequantizeLinear<axis = 1, block_size = 3>(codes, pairs)  l = MatMul(x, e)"
    ),
    "a bias that is computed": f"{FLOATS}  l = Add(m, u)",
    "a result that is rounded per token": (
        f"{FLOATS}  q = QuantizeLinear<axis = 1>(m, t)  l = DequantizeLinear<axis = 1>(q, t)"
    ),
    "a factor of a float product": f"{FLOATS}  l = Mul(m, b)",
    "a factor that is computed": f"{DYNAMIC}  g = Mul(columns, u)  l = Mul(f, g)",
}


@pytest.mark.parametrize("name", UNSPLIT)
def test_a_layer_stays_packed_with(name: str) -> None:
    model = graph(
        f"{UNSPLIT[name]}  {SPLIT}", inputs="float[B,3,4] x, float[B,3,6] u",
        output="float[B,3,2] y, float[B,3,4] z",
        constants=f"{CONSTANTS}, {constant('pairs', np.ones((4, 2), np.float32))}, "
        "float[3] t = {0.1, 0.2, 0.3}",
    )  # fmt: skip
    refuses(model, packed.run, None)


def test_scales_per_token_are_not_taken_for_scales_per_column() -> None:
    """As many tokens as columns: only the axis tells."""
    pair = "q = QuantizeLinear<axis = 1>(m, columns)  l = DequantizeLinear<axis = 1>(q, columns)"
    model = graph(f"{FLOATS}  {pair}  {SPLIT}", inputs="float[B,6,4] x",
                  output="float[B,6,2] y, float[B,6,4] z", constants=CONSTANTS)  # fmt: skip
    refuses(model, packed.run, None)


def test_scales_per_column_behind_the_product_are_cut() -> None:
    pair = "q = QuantizeLinear<axis = 2>(m, columns)  l = DequantizeLinear<axis = -1>(q, columns)"
    model = case(f"{FLOATS}  {pair}")
    apply(model, packed.run)


def test_a_bias_per_token_and_column_is_cut_like_the_weight() -> None:
    matrix = constant("matrix", RNG.normal(size=(3, 6)).astype(np.float32))
    model = graph(f"{FLOATS}  l = Add(m, matrix)  {SPLIT}", inputs="float[B,3,4] x",
                  output="float[B,3,2] y, float[B,3,4] z",
                  constants=f"{CONSTANTS}, {matrix}")  # fmt: skip
    apply(model, packed.run)


def test_steps_that_others_read_end_the_layer() -> None:
    model = graph(f"{FLOATS}  l = Add(m, b)  {SPLIT}  w = Neg(m)", inputs="float[B,3,4] x",
                  output="float[B,3,2] y, float[B,3,4] z, float[B,3,6] w",
                  constants=CONSTANTS)  # fmt: skip
    refuses(model, packed.run, None)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert layer_at(product).steps == ()


def test_a_layer_says_where_it_ends() -> None:
    model = case(LAYERS["a result that is rounded behind its bias"])
    product = next(node for node in model.graph if node.op_type == "MatMul")
    layer = layer_at(product)
    assert [step.op_type for step in layer.steps] == ["Add", "QuantizeLinear", "DequantizeLinear"]
    assert (layer.width, layer.output.name) == (6, "l")


@pytest.mark.parametrize("node", ["MatMul(x, u)", "Gemm(x, codes4)", "MatMul(x, v)"])
def test_what_is_no_layer(node: str) -> None:
    """A product of two values, another operator, and a constant that is no matrix."""
    output = "float[1,4,1] l" if "v)" in node else "float[4,6] l"
    model = graph(f"l = {node}", inputs="float[4,4] x, float[4,6] u", output=output,
                  constants=constant("codes4", CODES.astype(np.float32))
                  + ", float[1,4,1] v = {1, 2, 3, 4}")  # fmt: skip
    assert layer_at(next(iter(model.graph))) is None


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [([2, 3, 4], slice(2, 5)), ([0], slice(0, 1)), ([0, 2], None), ([2, 1], None)],
)
def test_neighbours_are_a_slice(chosen: list[int], expected: slice | None) -> None:
    found = selector(np.array(chosen))
    assert found == expected if expected else np.array_equal(found, chosen)
