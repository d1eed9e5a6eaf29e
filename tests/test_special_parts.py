"""What only some layers have, and the reasons that say why a layer is no block."""

from __future__ import annotations

from collections.abc import Callable

import models
import numpy as np
import onnx_ir as ir
import pytest
from rule_case import graph, only

from optimizer import graph as graphs
from optimizer.blocks import find_blocks
from optimizer.special_parts import (
    Crossing,
    clamped,
    crossing,
    experts,
    is_complete_cache,
    products_under,
    windowed,
)

# --- clamps ---------------------------------------------------------------------------------------

BOUNDS = (
    "float low = {-9}, float high = {9}, float[1] low1 = {-9}, float[1] high1 = {9}, "
    "float[4] vector = {9, 9, 9, 9}"
)
CLAMPS = {
    "a Clip": "c = Clip(x, low, high)",
    "Max and Min": "m = Max(x, low)  c = Min(m, high)",
    "Min and Max": "m = Min(x, high)  c = Max(m, low)",
    "the bound first": "m = Min(high1, x)  c = Max(low1, m)",
    "a bound that is computed": "h = Neg(low)  c = Clip(x, low, h)",
}
NO_CLAMPS = {
    "half of a clamp": "c = Min(x, high)",
    "a bound per channel": "m = Max(x, low)  c = Min(m, vector)",
    "a half that others read": "m = Max(x, low)  c = Min(m, high)  d = Neg(m)",
    "more than two operands": "m = Max(x, low, low)  c = Min(m, high)",
    "another function between": "m = Max(x, low)  t = Tanh(m)  c = Min(t, high)",
    "another value": "s = ReduceMax<keepdims = 0>(x)  c = Clip(s, low, high)",
    "an upper bound alone": 'c = Clip(x, "", high)',
}


@pytest.mark.parametrize("name", CLAMPS)
def test_a_value_is_seen_behind(name: str) -> None:
    model = graph(f"{CLAMPS[name]}  y = Relu(c)", constants=BOUNDS)
    x = model.graph.inputs[0]
    assert clamped(x).name == "c"
    assert clamped(clamped(x)) is clamped(x)


@pytest.mark.parametrize("name", NO_CLAMPS)
def test_a_value_is_not_seen_behind(name: str) -> None:
    nodes = NO_CLAMPS[name]
    output = "float y" if "keepdims" in nodes else "float[B,S,4] y"
    model = graph(f"{nodes}  y = Relu(c)", output=output, constants=BOUNDS)
    x = model.graph.inputs[0]
    assert clamped(x) is x


def _clamp(model: ir.Model, name: str) -> ir.Value:
    """Clamp a value of the stream for all of its readers."""
    value = next(v for node in model.graph for v in node.outputs if v.name == name)
    low, high = (
        graphs.add_initializer(model.graph, "bound", np.array(n, np.float32)) for n in (-9, 9)
    )
    uses = list(value.uses())
    new = graphs.insert(model.graph, uses[0].node, "Clip", [value, low, high], name=f"{name}.c",
                        shape=value.shape, dtype=value.dtype)  # fmt: skip
    for use in uses:
        use.node.replace_input_with(use.idx, new)
    return new


@pytest.mark.parametrize("where", [("hidden.0",), ("stream.1",), ("hidden.0", "stream.1")])
def test_a_clamped_stream_goes_on_behind_the_clamp(where: tuple[str, ...]) -> None:
    model = models.build(layers=3)
    for name in where:
        _clamp(model, name)
    structure = find_blocks(model)
    assert structure.misses == ()
    first, second, third = structure.blocks
    assert first.extras == ("the residual stream is clamped",)
    assert second.extras == third.extras == ()
    assert first.hidden.name == ("hidden.0.c" if "hidden.0" in where else "hidden.0")
    assert first.output is second.input
    assert second.input.name == ("stream.1.c" if "stream.1" in where else "stream.1")


def test_a_clamp_before_the_stream_begins_belongs_to_no_layer() -> None:
    model = models.build(layers=2)
    start = _clamp(model, "stream.0")
    first, second = find_blocks(model).blocks
    assert first.input is start
    assert first.extras == second.extras == ()


# --- attention that stays spelled out -------------------------------------------------------------

WEIGHTS = (
    "float[8,8] w = {" + ", ".join(["0.1"] * 64) + "}, float[8] g = {1, 1, 1, 1, 1, 1, 1, 1}, "
    "float step = {0.1}, int8 zero = {0}, float two = {2}"
)
SIDES = "float[B,2,S,4] q, float[B,2,4,S] k, float[B,2,S,4] v, float[B,2,4,S] r, float[B,2,S,S] m"
UNRECOGNISED = {
    "the attention was not recognised": "s = MatMul(q, k)  t = Sin(s)  a = Add(s, m)",
    "disentangled attention: its scores are the sum of 2 products": (
        "s = MatMul(q, k)  t = MatMul(q, r)  a = Add(s, t)"
    ),
    "disentangled attention: its scores are the sum of 3 products": (
        "s = MatMul(q, k)  t = MatMul(q, r)  u = MatMul(v, r)  b = Add(s, t)  c = Add(b, u)"
        "  a = Div(c, two)"
    ),
    "the scores of the attention are quantized": (
        "s = MatMul(q, k)  i = QuantizeLinear(s, step, zero)  a = DequantizeLinear(i, step, zero)"
    ),
}


@pytest.mark.parametrize("reason", UNRECOGNISED)
def test_a_softmax_over_scores_is_no_block_and_says_why(reason: str) -> None:
    model = graph(f"{UNRECOGNISED[reason]}  p = Softmax(a)  y = MatMul(p, v)", inputs=SIDES,
                  output="float[B,2,S,4] y", constants=WEIGHTS)  # fmt: skip
    assert find_blocks(model).misses[0][1] == reason


@pytest.mark.parametrize(
    "after",
    [
        "y = MatMul(p, v)",
        "n = IsNaN(p)  w2 = Where(n, two, p)  y = MatMul(w2, v)",
        "c = Cast<to = 11>(p)  d = Cast<to = 1>(c)  y = MatMul(d, v)",
        "i = QuantizeLinear(p, step, zero)  d = DequantizeLinear(i, step, zero)  y = MatMul(d, v)",
    ],
)
def test_probabilities_are_followed_to_the_values(after: str) -> None:
    model = graph(f"s = MatMul(q, k)  p = Softmax(s)  {after}", inputs=SIDES,
                  output="float[B,2,S,4] y", constants=WEIGHTS)  # fmt: skip
    assert len(find_blocks(model).misses) == 1


@pytest.mark.parametrize("after", ["y = Neg(p)", "y = MatMul(p, e)", "y = MatMul(v2, p)"])
def test_a_softmax_that_weighs_no_values_is_no_attention(after: str) -> None:
    """A router, a pooling by a matrix of weights, a product from the left."""
    model = graph(f"p = Softmax(x)  {after}", inputs="float[8,8] x, float[8,8] v2",
                  output="float[8,8] y", constants=WEIGHTS.replace("] w =", "] e ="))  # fmt: skip
    assert find_blocks(model).misses == ()


def test_products_are_found_through_layouts_and_not_through_shapes() -> None:
    model = graph(
        "a = MatMul(q, k)  b = MatMul(q, r)  h = Shape(b)  c = Reshape(a, h)"
        "  d = Concat<axis = 3>(c, m)  e = Slice(d, zero, end, axis)  y = Where(f, e, m)",
        inputs=f"{SIDES}, bool[S] f", output="float[B,2,S,T] y",
        constants="int64[1] zero = {0}, int64[1] end = {3}, int64[1] axis = {3}",
    )  # fmt: skip
    found = products_under(model.graph.outputs[0])
    assert [node.outputs[0].name for node in found] == ["a"]


# --- windows --------------------------------------------------------------------------------------

CUT = (
    "n = LayerNormalization(x, g)  a = Reshape(n, s1)  b = Transpose<perm = [0, 1, 3, 2, 4]>(a)"
    "  c = Reshape(b, s2)"
)
HEADS = "q = MatMul(c, w)  y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, q, q)"
WINDOWS = {
    "cut out of a norm": (f"{CUT}  {HEADS}", True),
    "scaled queries": (f"{CUT}  q0 = MatMul(c, w)  q = Mul(q0, half)  {HEADS[18:]}", True),
    "flattened once": (f"n = LayerNormalization(x, g)  c = Reshape(n, s2)  {HEADS}", False),
    "flattened once, their heads turned": (
        "n = LayerNormalization(x, g)  c = Reshape(n, s2)  q0 = MatMul(c, w)  q1 = Reshape(q0, h)"
        "  q = Transpose<perm = [0, 2, 1, 3]>(q1)  y = Attention(q, q, q)", False,
    ),
    "without any norm": (f"{CUT}  {HEADS}".replace("LayerNormalization(x, g)", "Neg(x)"), False),
    "another function between": (
        f"{CUT}  {HEADS}".replace("b = Tr", "t = Relu(a)  b = Tr").replace("]>(a)", "]>(t)"), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
def test_queries_come_from_windows(name: str) -> None:
    nodes, expected = WINDOWS[name]
    output = "float[N,2,4,4] y" if "turned" in name else "float[N,4,8] y"
    model = graph(nodes, inputs="float[B,16,8] x", output=output,
                  constants=f"{WEIGHTS}, int64[5] s1 = {{0, 2, 2, 4, 8}}, "
                  "int64[3] s2 = {-1, 4, 8}, float half = {0.5}, "
                  "int64[4] h = {0, 0, 2, 4}")  # fmt: skip
    assert windowed(only(model, "Attention")) is expected
    said = find_blocks(model).misses[0][1]
    assert (said == "attention within windows of the tokens") is expected


# --- attention to another sequence ----------------------------------------------------------------

FLAT = "q = MatMul(x, w)  k = MatMul(e, w)  v = MatMul(e, w)"
ATTEND = "a = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v)  y = MatMul(a, w)"
APART = (
    "q0 = MatMul(x, w)  q1 = Reshape(q0, heads)  q = Transpose<perm = [0, 2, 1, 3]>(q1)"
    "  a = Attention(q, K, V)  a1 = Transpose<perm = [0, 2, 1, 3]>(a)  a2 = Reshape(a1, joined)"
    "  y = MatMul(a2, w)"
)
CROSSED: dict[str, tuple[str, str | None]] = {
    "projections": (f"{FLAT}  {ATTEND}", None),
    "a complete cache": (APART.replace("K, V", "pk, pv"), None),
    "a complete cache of another type": (
        "dk = Cast<to = 1>(hk)  dv = Cast<to = 1>(hv)  " + APART.replace("K, V", "dk, dv"), None,
    ),
    "queries as they are": (
        f"{FLAT}  {ATTEND}".replace("q = MatMul(x, w)", "q = Neg(x)"),
        "the query is not a linear projection",
    ),
    "the same sequence": (
        f"{FLAT}  {ATTEND}".replace("MatMul(e", "MatMul(x"), "query and keys read the same value",
    ),
    "values as they are": (
        f"{FLAT}  {ATTEND}".replace("v = MatMul(e, w)", "v = Neg(e)"),
        "only one of keys and values is a linear projection",
    ),
    "two other sequences": (
        f"{FLAT}  {ATTEND}".replace("v = MatMul(e, w)", "f = Neg(e)  v = MatMul(f, w)"),
        "keys and values read different values",
    ),
    "keys and values that are computed otherwise": (
        "nk = Neg(pk)  nv = Neg(pv)  " + APART.replace("K, V", "nk, nv"),
        "keys and values are neither linear projections nor a complete cache",
    ),
    "a result that is read twice": (
        f"{FLAT}  {ATTEND.replace('y =', 'b =')}  c = Neg(a)  y = Add(b, c)",
        "the output is not read by exactly one linear projection",
    ),
    "a result that stays apart": (
        APART.replace("K, V", "pk, pv").replace("a1 = Tr", "z = Neg(a)  a1 = Tr").replace(
            "]>(a)", "]>(z)"
        ),
        "the output is not read by exactly one linear projection",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CROSSED)
def test_attention_to_another_sequence_with(name: str) -> None:
    nodes, reason = CROSSED[name]
    model = graph(
        nodes, output="float[B,S,8] y",
        inputs="float[B,S,8] x, float[B,T,8] e, float[B,2,T,4] pk, float[B,2,T,4] pv, "
        "float16[B,2,T,4] hk, float16[B,2,T,4] hv",
        constants=f"{WEIGHTS}, int64[4] heads = {{0, 0, 2, 4}}, int64[3] joined = {{0, 0, 8}}",
    )  # fmt: skip
    found = crossing(only(model, "Attention"))
    if reason is not None:
        assert found == reason
        return
    assert isinstance(found, Crossing)
    assert (found.heads, found.kv_heads, found.head_dim) == (2, 2, 4)
    assert found.q.input.name == "x"
    assert (found.k is None) == (found.v is None) == ("cache" in name)
    assert found.o.output.name == "y"


def test_heads_that_do_not_divide_the_width_are_no_heads() -> None:
    model = graph(f"{FLAT}  {ATTEND}", inputs="float[B,S,8] x, float[B,T,8] e",
                  output="float[B,S,8] y", constants=WEIGHTS)  # fmt: skip
    node = only(model, "Attention")
    for name in ("q_num_heads", "kv_num_heads"):
        node.attributes[name] = ir.AttrInt64(name, 3)
    assert crossing(node) == "the number of heads is not known"


def test_only_inputs_of_the_model_are_a_complete_cache() -> None:
    model = graph("c = Cast<to = 1>(h)  n = Neg(c)  y = Add(x, n)",
                  inputs="float[B,S,4] x, float16[B,S,4] h")  # fmt: skip
    cast, negated, _ = model.graph
    assert is_complete_cache(model.graph.inputs[0])
    assert is_complete_cache(cast.outputs[0])
    assert not is_complete_cache(negated.outputs[0])
    assert not is_complete_cache(None)


# --- experts --------------------------------------------------------------------------------------


def named(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def end_of_experts(model: ir.Model) -> ir.Value:
    (end,) = [v for v in named(model, "stream.1").producer().inputs if v.name != "hidden.0"]
    return end


def router(model: ir.Model) -> ir.Node:
    return model.graph.initializers["layers.0.router.weight"].uses()[0].node


def _another_norm(model: ir.Model) -> None:
    router(model).replace_input_with(0, named(model, "layers.0.norm1.out"))


def _no_norm(model: ir.Model) -> None:
    router(model).replace_input_with(0, named(model, "hidden.0"))


def _not_asked_which(model: ir.Model) -> None:
    """The k best are masked, but their places are constant: nothing is routed."""
    top = next(node for node in model.graph if node.op_type == "TopK")
    for use in list(top.outputs[1].uses()):
        places = np.zeros((1, 1, 2), np.int64)
        use.node.replace_input_with(use.idx, graphs.add_initializer(model.graph, "p", places))


ROUTED: dict[Callable[[ir.Model], None], str | None] = {
    _another_norm: "mixture of experts whose input is not one norm",
    _no_norm: "mixture of experts whose input is not one norm",
    _not_asked_which: None,
}


@pytest.mark.parametrize("edit", ROUTED)
def test_experts_read_one_norm(edit: Callable[[ir.Model], None]) -> None:
    model = models.build(experts=2)
    edit(model)
    assert experts(end_of_experts(model)) == ROUTED[edit]


@pytest.mark.parametrize("edit", [_another_norm, _no_norm])
def test_a_layer_with_other_experts_says_so(edit: Callable[[ir.Model], None]) -> None:
    model = models.build(experts=2)
    edit(model)
    structure = find_blocks(model)
    assert [block.input.name for block in structure.blocks] == ["stream.1"]
    assert [reason for _, reason in structure.misses] == [ROUTED[edit]]


def test_a_dense_mlp_has_no_experts() -> None:
    assert experts(end_of_experts(models.build())) is None
