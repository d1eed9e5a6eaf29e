"""Factors of queries and keys, sizes of a cache, the type of the Softmax, and the 4-D form."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from attention_text import (
    BACK,
    CACHE,
    CACHE_INPUTS,
    CACHE_OUTPUTS,
    CONSTANTS,
    END,
    HEADS,
    INPUTS,
    SCORES,
    TURNED,
)
from rule_case import apply, graph, only, ops, refuses

from optimizer.raising import attention

MORE = (
    CONSTANTS + ", float minus = {-0.5}, float[1,1,1] ratio3 = {0.5}, "
    "int64[1] i0 = {0}, int64[1] i2 = {2}, int64[2] column = {3, 1}, double wide_low = {-1e300}, "
    "double wide_half = {0.5}"
)
FLAT = "y = Attention<q_num_heads = 2, kv_num_heads = 2, scale = 0.5>"


def case(*parts: str, inputs: str = INPUTS, output: str = "float[B,S,8] y") -> ir.Model:
    return graph("  ".join(parts), inputs=inputs, output=output, constants=MORE)


# --- factors --------------------------------------------------------------------------------------

TAKEN = {
    "of the queries": (f"q = Mul(x, half)  {FLAT}(q, u, v)", 0.25),
    "of the keys": (f"k = Div(u, four)  {FLAT}(x, k, v)", 0.125),
    "of both": (f"q = Mul(half, x)  k = Mul(u, half)  {FLAT}(q, k, v)", 0.125),
    "of both, which are negative": (
        f"q = Mul(x, minus)  k = Mul(u, minus)  {FLAT}(q, k, v)", 0.125,
    ),
    "with as many axes": (f"q = Mul(x, ratio3)  {FLAT}(q, u, v)", 0.25),
}  # fmt: skip
LEFT = {
    "that is negative": f"q = Mul(x, minus)  {FLAT}(q, u, v)",
    "that is zero": f"q = Mul(x, zero)  {FLAT}(q, u, v)",
    "beside a scale that depends on the size": (
        f"q = Mul(x, half)  {FLAT.replace(', scale = 0.5', '')}(q, u, v)"
    ),
    "per channel": f"q = Mul(x, channels)  {FLAT}(q, u, v)",
    "of the values": f"w = Mul(v, half)  {FLAT}(x, u, w)",
}


@pytest.mark.parametrize("name", TAKEN)
def test_the_scale_takes_a_factor(name: str) -> None:
    nodes, scale = TAKEN[name]
    model = case(nodes)
    assert apply(model, attention.run).applied == 1
    assert ops(model) == {"Attention": 1}
    assert only(model, "Attention").attributes["scale"].as_float() == pytest.approx(scale)


@pytest.mark.parametrize("name", LEFT)
def test_a_factor_stays(name: str) -> None:
    model = case(LEFT[name], inputs=f"{INPUTS}, float[8] channels")
    refuses(model, attention.run, None)


def test_a_factor_that_adds_the_batch_stays() -> None:
    model = case(f"q = Mul(x, ratio3)  {FLAT}(q, u, v)", output="float[1,S,8] y",
                 inputs="float[S,8] x, float[1,S,8] u, float[1,S,8] v")  # fmt: skip
    refuses(model, attention.run, None)


def test_factors_of_keys_in_a_cache_stay_and_those_of_queries_do_not() -> None:
    model = case(
        f"q = Mul(x, half)  k = Mul(u, half)  y, a, b = {FLAT[4:]}(q, k, v, m, pk, pv)",
        inputs=f"{CACHE_INPUTS}, bool[S,6] m",
    )  # fmt: skip
    apply(model, attention.run)
    node = only(model, "Attention")
    assert node.inputs[0].name == "x"
    assert node.inputs[1].producer().op_type == "Mul"
    assert node.attributes["scale"].as_float() == pytest.approx(0.25)


@pytest.mark.parametrize("factor", ["minus", "zero"])
def test_a_factor_before_the_heads_are_split_is_positive(factor: str) -> None:
    heads = HEADS.replace("(x,", "(x1,")
    model = case(f"x1 = Mul(x, {factor})", heads, TURNED, "s2 = MatMul(q, kt)", END)
    apply(model, attention.run)
    node = only(model, "Attention")
    assert node.inputs[0].producer().op_type == "Mul"
    assert node.attributes["scale"].as_float() == 1


def test_a_factor_that_adds_an_axis_before_the_heads_are_split_stays() -> None:
    one = INPUTS.replace("B", "1").replace("float[1,S,8] x", "float[S,8] x")
    heads = HEADS.replace("(x,", "(x1,")
    model = case("x1 = Mul(x, ratio3)", heads, "o = Attention<scale = 1.0>(q, k, w)", BACK,
                 inputs=one, output="float[1,S,8] y")  # fmt: skip
    apply(model, attention.run)
    assert len(only(model, "Attention").inputs[0].producer().inputs) == 2


# --- sizes of a cache -----------------------------------------------------------------------------

#: how the number of keys is read from the concatenated keys
SIZES = {
    "the whole shape": "h = Shape(ka)  n = Gather(h, i2)",
    "the end of it": "h = Shape<start = 2>(ka)  n = Gather(h, i0)",
    "an axis from the end": "n = Shape<start = -2, end = -1>(ka)",
    "the values": "h = Shape(wa)  n = Gather(h, i2)",
    "both": "g = Shape<start = 2, end = 3>(ka)  h = Shape<start = 2, end = 3>(wa)  n = Max(g, h)",
}
MASK = (
    "z = ConstantOfShape<value = float[1] {0.25}>(n)  z1 = Unsqueeze(z, i0)  m = Expand(z1, column)"
)


@pytest.mark.parametrize("name", SIZES)
def test_a_mask_of_the_size_of_the_cache_is_computed_without_it(name: str) -> None:
    inputs, output = (text.replace("S", "3") for text in (CACHE_INPUTS, CACHE_OUTPUTS))
    model = case(HEADS, CACHE, SIZES[name], MASK, "o = Attention(q, ka, wa, m)", BACK,
                 inputs=inputs, output=output)  # fmt: skip
    assert apply(model, attention.run).applied == 1
    node = only(model, "Attention")
    assert [value.name for value in node.inputs[4:]] == ["pk", "pv"]
    assert [value.name for value in node.outputs[1:]] == ["ka", "wa"]


REFUSED = {
    "depends on its numbers": (
        "h = Shape(ka)  z0 = ConstantOfShape(h)  z1 = Add(z0, ka)"
        "  m0 = ReduceMean<keepdims = 1>(z1)  m = Add(m0, n)",
        "o = Attention(q, ka, wa, m)", "depend on the concatenated cache",
    ),
    "belongs to other keys": (
        "h = Shape<start = 2, end = 3>(ka)  c = Cast<to = 1>(h)  m = Add(n, c)",
        "kb = Reshape(k, by_two)  kc = Concat<axis = 2>(pk, kb)  o = Attention(q, kc, wa, m)",
        "does not come from a Transpose",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_written_where_a_mask(name: str) -> None:
    mask, node, reason = REFUSED[name]
    model = graph(
        "  ".join((HEADS, CACHE, mask, node, BACK)), output="float[B,S,8] y",
        inputs=f"{CACHE_INPUTS}, float[B,1,S,T] n",
        constants=f"{MORE}, int64[4] by_two = {{0, 0, -1, 4}}",
    )  # fmt: skip
    refuses(model, attention.run, reason)


ONE_SIDED = {
    "only the keys or only the values are concatenated": "o = Attention(q, ka, w)",
    "another batch, number of heads or head size": (
        "kd = Concat<axis = 2>(other, k)  wd = Concat<axis = 2>(pv, w)  o = Attention(q, kd, wd)"
    ),
}


@pytest.mark.parametrize("reason", ONE_SIDED)
def test_what_is_no_cache_stays_concatenated(reason: str) -> None:
    model = graph("  ".join((HEADS, CACHE, ONE_SIDED[reason], BACK)), output="float[B,S,8] y",
                  inputs=f"{CACHE_INPUTS}, float[A,2,P,4] other", constants=MORE)  # fmt: skip
    refuses(model, attention.run, reason)


# --- the type of the Softmax ----------------------------------------------------------------------

SOFTMAX = "p0 = Softmax(s2)  p = Cast<to = 1>(p0)  o = MatMul(p, w)"
WIDE = {
    "alone": "s2 = Cast<to = 11>(s)",
    "behind a scale": "s1 = Mul(s, half)  s2 = Cast<to = 11>(s1)",
    "behind a mask": "s1 = Add(s, m)  s2 = Cast<to = 11>(s1)",
    "before scores are left out": "s1 = Cast<to = 11>(s)  s2 = Where(keep, s1, wide_low)",
}
NARROW = {
    "a scale in the wider type": (
        "s1 = Cast<to = 11>(s)  s2 = Mul(s1, wide_half)", SOFTMAX,
        "before they are masked or scaled",
    ),
    "a mask in the wider type": (
        "s1 = Cast<to = 11>(s)  s2 = Add(s1, wide_mask)", SOFTMAX,
        "before they are masked or scaled",
    ),
    "probabilities in the wider type": (
        "s2 = Cast<to = 11>(s)", "p = Softmax(s2)  w2 = Cast<to = 11>(w)  o2 = MatMul(p, w2)"
        "  o = Cast<to = 1>(o2)", "are not cast back to FLOAT",
    ),
    "probabilities that others read in the wider type": (
        "s2 = Cast<to = 11>(s)", f"{SOFTMAX}  e = Neg(p0)", "are not cast back to FLOAT",
    ),
    "probabilities in a third type": (
        "s2 = Cast<to = 11>(s)", "p0 = Softmax(s2)  p = Cast<to = 10>(p0)  w2 = Cast<to = 10>(w)"
        "  o2 = MatMul(p, w2)  o = Cast<to = 1>(o2)", "are not cast back to FLOAT",
    ),
    "a narrower type": (
        "s2 = Cast<to = 10>(s)", SOFTMAX, "cast between the product and the Softmax",
    ),
    "two casts": (
        "s1 = Cast<to = 11>(s)  s3 = Cast<to = 1>(s1)  s2 = Cast<to = 11>(s3)", SOFTMAX,
        "cast between the product and the Softmax",
    ),
}  # fmt: skip
TYPED = f"{INPUTS}, float[B,1,S,S] m, bool[B,1,S,S] keep, double[B,1,S,S] wide_mask"


@pytest.mark.parametrize("name", WIDE)
def test_the_softmax_has_its_own_type(name: str) -> None:
    model = case(HEADS, TURNED, SCORES, WIDE[name], SOFTMAX, BACK, inputs=TYPED)
    apply(model, attention.run)
    node = only(model, "Attention")
    assert node.attributes["softmax_precision"].as_int() == ir.DataType.DOUBLE
    assert "Cast" not in ops(model)


@pytest.mark.parametrize("name", NARROW)
def test_attention_stays_spelled_out_with(name: str) -> None:
    scores, end, reason = NARROW[name]
    model = case(HEADS, TURNED, SCORES, scores, end, BACK, inputs=TYPED)
    refuses(model, attention.run, reason)


def test_probabilities_in_the_type_of_the_model_may_be_read() -> None:
    model = case(HEADS, TURNED, SCORES, WIDE["alone"], SOFTMAX, BACK,
                 output="float[B,S,8] y, float[B,2,S,S] p")  # fmt: skip
    apply(model, attention.run)
    assert only(model, "Attention").outputs[3].name == "p"


# --- the 4-D form ---------------------------------------------------------------------------------

GIVEN = "float[B,S,8] x, float[B,2,T,4] k, float[B,2,T,4] w"
SPLIT = "r = Reshape(x, heads)  q = Transpose<perm = [0, 2, 1, 3]>(r)"


@pytest.mark.parametrize("scale", ["", "<scale = 0.5>"])
def test_a_complete_cache_keeps_the_form_and_takes_the_factor(scale: str) -> None:
    split = SPLIT.replace("(x,", "(x1,")
    model = case("x1 = Mul(x, half)", split, f"o = Attention{scale}(q, k, w)", BACK, inputs=GIVEN)
    apply(model, attention.run)
    node = only(model, "Attention")
    assert "q_num_heads" not in node.attributes
    assert "Mul" not in ops(model)
    assert node.attributes["scale"].as_float() == pytest.approx(0.25)


def test_a_complete_cache_takes_a_factor_and_gives_its_mask_the_axis_of_queries() -> None:
    model = case("x1 = Mul(x, half)", SPLIT.replace("(x,", "(x1,"), "o = Attention(q, k, w, m)",
                 BACK, inputs=f"{GIVEN}, float[B,1,1,T] m")  # fmt: skip
    apply(model, attention.run)
    node = only(model, "Attention")
    assert "Mul" not in ops(model)
    assert node.inputs[3].producer().op_type == "Expand"


def test_a_complete_cache_does_not_take_a_negative_factor() -> None:
    model = case("x1 = Mul(x, minus)", SPLIT.replace("(x,", "(x1,"), "o = Attention(q, k, w)", BACK,
                 inputs=GIVEN)  # fmt: skip
    refuses(model, attention.run, None)


def test_presents_that_are_read_keep_the_form() -> None:
    model = case(HEADS, "o, a, b = Attention(q, k, w)", BACK,
                 output="float[B,S,8] y, float[B,2,S,4] a")  # fmt: skip
    refuses(model, attention.run, "a 4-D Attention whose present keys or values are used")


def test_a_cache_of_its_own_keeps_the_form() -> None:
    model = case(HEADS, "o, a, b = Attention(q, k, w, m, pk, pv)", BACK,
                 inputs=f"{CACHE_INPUTS}, bool[S,T] m")  # fmt: skip
    refuses(model, attention.run, "a 4-D Attention with its own cache")


def test_keys_repeated_without_the_values_keep_the_form() -> None:
    more = (
        "ub = Reshape(u, group)  k = Transpose<perm = [0, 2, 1, 3]>(ub)  k5 = Unsqueeze(k, two)"
        "  k6 = Expand(k5, wide)  k7 = Reshape(k6, many)"
    )
    heads = HEADS.partition("  ur")[0] + "  vr" + HEADS.partition("  vr")[2]
    model = case(heads, more, "o = Attention(q, k7, w)", BACK,
                 inputs="float[B,S,8] x, float[B,S,4] u, float[B,S,8] v")  # fmt: skip
    refuses(model, attention.run, "keys are repeated 2 times, values 1 times")
