from __future__ import annotations

import numpy as np
import pytest
from rule_case import apply, graph, only, ops, refuses

from optimizer.raising import norms

AXIS = "int64[1] last = {-1}"
SHARED = (
    AXIS + ", float two = {2}, float e = {0.01}, float one = {1}, float half = {-0.5}, "
    "float[4] w = {2, 0.5, -1, 3}, float[4] b = {1, -2, 0.25, 4}, "
    "float[1,1,4] wide = {2, 0.5, -1, 3}"
)
SQUARE = "p = Pow(x, two)  m = ReduceMean<keepdims = 1>(p, last)  v = Add(m, e)  s = Sqrt(v)"
CENTRE = "mu = ReduceMean<keepdims = 1>(x, last)  d = Sub(x, mu)"
SPREAD = (
    f"{CENTRE}  p = Mul(d, d)  m = ReduceMean<keepdims = 1>(p, last)  v = Add(m, e)  s = Sqrt(v)"
)

RMS = {
    "reciprocal": f"{SQUARE}  r = Reciprocal(s)  n = Mul(x, r)  y = Mul(w, n)",
    "division": f"{SQUARE}  n = Div(x, s)  y = Mul(n, w)",
    "one over": f"{SQUARE}  r = Div(one, s)  n = Mul(r, x)  y = Mul(n, w)",
    "scale [1, 1, D]": f"{SQUARE}  n = Div(x, s)  y = Mul(n, wide)",
    "epsilon first": SQUARE.replace("Add(m, e)", "Add(e, m)") + "  n = Div(x, s)  y = Mul(n, w)",
    "x * x": SQUARE.replace("Pow(x, two)", "Mul(x, x)") + "  n = Div(x, s)  y = Mul(n, w)",
    "power": "p = Mul(x, x)  m = ReduceMean<keepdims = 1>(p, last)  v = Add(m, e)"
    "  r = Pow(v, half)  n = Mul(x, r)  y = Mul(n, w)",
    "scale into the root": f"{SQUARE}  r = Reciprocal(s)  f = Mul(r, w)  y = Mul(x, f)",
    "no scale": f"{SQUARE}  y = Div(x, s)",
    "axis by number": SQUARE.replace("last", "second") + "  n = Div(x, s)  y = Mul(n, w)",
}
LAYER = {
    "division": f"{SPREAD}  n = Div(d, s)  g = Mul(n, w)  y = Add(g, b)",
    "power of two": SPREAD.replace("Mul(d, d)", "Pow(d, two)")
    + "  n = Div(d, s)  g = Mul(n, w)  y = Add(b, g)",
    "reciprocal": f"{SPREAD}  r = Reciprocal(s)  n = Mul(d, r)  g = Mul(w, n)  y = Add(g, b)",
    "centred twice": f"{SPREAD}  d2 = Sub(x, mu)  n = Div(d2, s)  g = Mul(n, w)  y = Add(g, b)",
    "batch-norm style": f"{SPREAD}  r = Reciprocal(s)  f = Mul(r, w)  a = Mul(x, f)"
    "  c = Mul(mu, f)  q = Sub(b, c)  y = Add(a, q)",
    "scale into the root": f"{SPREAD}  r = Reciprocal(s)  f = Mul(r, w)  g = Mul(d, f)"
    "  y = Add(g, b)",
    "no shift": f"{SPREAD}  n = Div(d, s)  y = Mul(n, w)",
    "nothing learnt": f"{SPREAD}  y = Div(d, s)",
}


@pytest.mark.parametrize("nodes", RMS.values(), ids=RMS.keys())
def test_every_spelling_of_rms_norm_becomes_one_node(nodes):
    case = graph(nodes, constants=SHARED + ", int64[1] second = {2}")
    assert apply(case, norms.run).applied == 1
    node = only(case, "RMSNormalization")
    assert ops(case) == {"RMSNormalization": 1}
    assert node.attributes["axis"].as_int() == -1
    assert node.attributes["epsilon"].as_float() == pytest.approx(0.01)
    assert list(node.inputs[1].shape) == [4]


@pytest.mark.parametrize("nodes", LAYER.values(), ids=LAYER.keys())
def test_every_spelling_of_layer_norm_becomes_one_node(nodes):
    case = graph(nodes, constants=SHARED)
    assert apply(case, norms.run).applied == 1
    assert ops(case) == {"LayerNormalization": 1}
    shifted = "Add(g, b)" in nodes or "Add(b, g)" in nodes or "Sub(b, c)" in nodes
    assert len(only(case, "LayerNormalization").inputs) == (3 if shifted else 2)


def test_casts_to_float_inside_disappear():
    nodes = (
        "f = Cast<to = 1>(x)  p = Mul(f, f)  m = ReduceMean<keepdims = 1>(p, last)  v = Add(m, e)"
        "  s = Sqrt(v)  n = Div(f, s)  h = Cast<to = 10>(n)  y = Mul(w, h)"
    )
    case = graph(
        nodes,
        inputs="float16[B,S,4] x",
        output="float16[B,S,4] y",
        # the bit patterns of 2, 0.5, -1, 3
        constants=f"{AXIS}, float e = {{0.01}}, float16[4] w = {{16384, 14336, 48128, 16896}}",
    )
    assert apply(case, norms.run).applied == 1
    assert ops(case) == {"RMSNormalization": 1}


def test_a_float_scale_keeps_the_casts_around_the_norm():
    nodes = (
        "f = Cast<to = 1>(x)  p = Mul(f, f)  m = ReduceMean<keepdims = 1>(p, last)  v = Add(m, e)"
        "  s = Sqrt(v)  n = Div(f, s)  g = Mul(w, n)  y = Cast<to = 10>(g)"
    )
    case = graph(
        nodes,
        inputs="float16[B,S,4] x",
        output="float16[B,S,4] y",
        constants=f"{AXIS}, float e = {{0.01}}, float[4] w = {{2, 0.5, -1, 3}}",
    )
    assert apply(case, norms.run).applied == 1
    assert ops(case) == {"Cast": 2, "RMSNormalization": 1}


REFUSES = {
    "mean over another axis": (
        SQUARE.replace("last", "middle") + "  y = Div(x, s)",
        "float[B,S,4] y",
        "not over the last axis",
    ),
    "root of another value": (
        f"{SQUARE}  t = Tanh(x)  y = Div(t, s)",
        "float[B,S,4] y",
        "does not divide what was squared",
    ),
    "mean of squares is an output": (
        f"{SQUARE}  y = Div(x, s)",
        "float[B,S,4] y, float[B,S,1] m",
        "value 'm' within the norm is read elsewhere",
    ),
    "root read twice": (
        f"{SQUARE}  y = Div(x, s)  t = Tanh(s)",
        "float[B,S,4] y, float[B,S,1] t",
        "is read elsewhere",
    ),
    "cube": (SQUARE.replace("two", "three") + "  y = Div(x, s)", "float[B,S,4] y", None),
}


@pytest.mark.parametrize(("nodes", "output", "reason"), REFUSES.values(), ids=REFUSES.keys())
def test_leaves_alone_and_says_why(nodes, output, reason):
    constants = SHARED + ", int64[1] middle = {1}, float three = {3}"
    refuses(graph(nodes, output=output, constants=constants), norms.run, reason)


def test_an_unknown_width_is_not_guessed():
    nodes = f"{SQUARE}  y = Div(x, s)"
    case = graph(nodes, inputs="float[B,S,D] x", output="float[B,S,D] y", constants=SHARED)
    refuses(case, norms.run, "size of the normalized axis is not known")


def test_existing_norms_get_axis_minus_one_and_vectors():
    case = graph(
        "y = LayerNormalization<axis = 2>(x, wide, b)",
        constants="float[1,1,4] wide = {2, 0.5, -1, 3}, float[4] b = {1, -2, 0.25, 4}",
    )
    assert apply(case, norms.run).applied == 1
    node = only(case, "LayerNormalization")
    assert node.attributes["axis"].as_int() == -1
    assert [list(v.shape) for v in node.inputs[1:]] == [[4], [4]]
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), [2, 0.5, -1, 3])


def test_a_norm_over_two_axes_stays():
    case = graph(
        "y = LayerNormalization<axis = 1>(x, w)",
        inputs="float[B,2,4] x",
        output="float[B,2,4] y",
        constants="float[2,4] w = {1, 2, 3, 4, 5, 6, 7, 8}",
    )
    refuses(case, norms.run, "normalizes more than the last axis")


NORM = "n = RMSNormalization<axis = -1, epsilon = 0.01>(x, {})"
ONES = SHARED + ", float[4] ones = {1, 1, 1, 1}, float[1] number = {3}"


LAYER_NORM = "n = LayerNormalization<axis = -1, epsilon = 0.01>(x, {})"


@pytest.mark.parametrize(
    "nodes",
    [
        f"{LAYER_NORM.format('w')}  y = Add(n, b)",
        f"{LAYER_NORM.format('ones')}  s = Mul(wide, n)  y = Add(b, s)",
        f"{CENTRE}  {NORM.replace('(x', '(d').format('w')}  y = Add(n, b)",
        f"{CENTRE}  {NORM.replace('(x', '(d').format('ones')}  s = Mul(n, w)  y = Add(s, b)",
    ],
    ids=["shift", "scale and shift", "centred before", "everything"],
)
def test_parts_around_a_norm_are_taken_in(nodes):
    case = graph(nodes, constants=ONES)
    assert apply(case, norms.run).applied >= 1
    assert ops(case) == {"LayerNormalization": 1}
    assert len(only(case, "LayerNormalization").inputs) == 3


def test_only_what_is_centred_along_the_same_axis_is_layer_norm():
    nodes = (
        f"{CENTRE.replace('last', 'second')}  {NORM.replace('(x', '(d').format('w')}  y = Relu(n)"
    )
    refuses(graph(nodes, constants=ONES + ", int64[1] second = {1}"), norms.run, None)


@pytest.mark.parametrize("scale", ["Mul(n, w)", "Mul(wide, n)"])
def test_a_scale_after_a_norm_without_one_is_taken_in(scale):
    case = graph(f"{NORM.format('ones')}  y = {scale}", constants=ONES)
    assert apply(case, norms.run).applied >= 1
    assert ops(case) == {"RMSNormalization": 1}


@pytest.mark.parametrize(
    "nodes",
    [
        f"{NORM.format('w')}  y = Mul(n, w)",
        f"{NORM.format('ones')}  y = Mul(n, number)",
        f"{NORM.format('ones')}  y = Mul(n, x)",
        f"{NORM.format('ones')}  m = Mul(n, w)  y = Add(n, m)",
        f"{NORM.format('w')}  y = Add(n, b)",
        "n = LayerNormalization<axis = -1>(x, w, b)  y = Add(n, b)",
    ],
    ids=[
        "a scale already",
        "one number",
        "no constant",
        "read elsewhere",
        "a shift of an RMS norm",
        "a shift already",
    ],
)
def test_a_product_after_a_norm_stays(nodes):
    refuses(graph(nodes, constants=ONES), norms.run, None)


HEADS = "h = Reshape(x, heads)  t = Transpose<perm = {}>(h)"


@pytest.mark.parametrize("op_type", ["RMSNormalization", "LayerNormalization"])
def test_a_norm_of_heads_goes_before_their_transpose(op_type):
    nodes = f"{HEADS.format([0, 2, 1, 3])}  y = {op_type}<axis = 3, epsilon = 0.01>(t, v)"
    constants = ONES + ", int64[4] heads = {0, 0, 2, 2}, float[2] v = {3, -1}"
    case = graph(nodes, constants=constants, output="float[B,2,S,2] y")
    assert apply(case, norms.run).applied >= 1
    assert [node.op_type for node in case.graph] == ["Reshape", op_type, "Transpose"]


@pytest.mark.parametrize(
    "nodes",
    [
        f"{HEADS.format([0, 1, 3, 2])}  n = RMSNormalization<axis = -1>(t, v)  y = Relu(n)",
        f"{HEADS.format([0, 2, 1, 3])}  n = RMSNormalization<axis = -1>(t, v)  y = Add(n, t)",
    ],
    ids=["another axis comes last", "the heads are read elsewhere"],
)
def test_a_norm_after_a_transpose_stays(nodes):
    constants = ONES + ", int64[4] heads = {0, 0, 2, 2}, float[2] v = {3, -1}"
    refuses(graph(nodes, constants=constants, output="float[A,C,D,2] y"), norms.run, None)


RAISED = (
    ", float[1,1,1,1] two4 = {2}, float[1,1,1,1] e4 = {0.01}, float[1,1,1,1] one4 = {1}, "
    "float[1,1,1,1] half4 = {-0.5}, float[1,1,1,4] w4 = {2, 0.5, -1, 3}"
)
ADDS_AN_AXIS = {
    "epsilon": SQUARE.replace("Add(m, e)", "Add(m, e4)") + "  y = Div(x, s)",
    "epsilon before a scale": (
        SQUARE.replace("Add(m, e)", "Add(m, e4)") + "  n = Div(x, s)  y = Mul(n, w)"
    ),
    "the square": SQUARE.replace("Pow(x, two)", "Pow(x, two4)") + "  y = Div(x, s)",
    "the reciprocal": f"{SQUARE}  r = Div(one4, s)  y = Mul(x, r)",
    "the power": SQUARE.replace("s = Sqrt(v)", "r = Pow(v, half4)  y = Mul(x, r)"),
    "a scale in the root": f"{SQUARE}  r = Reciprocal(s)  f = Mul(r, w4)  y = Mul(x, f)",
    "a shift in the root": f"{SPREAD}  r = Reciprocal(s)  f = Mul(r, w)  a = Mul(x, f)"
    "  c = Mul(mu, f)  q = Sub(w4, c)  y = Add(a, q)",
}


@pytest.mark.parametrize("nodes", ADDS_AN_AXIS.values(), ids=ADDS_AN_AXIS.keys())
def test_a_constant_that_adds_an_axis_keeps_the_norm_as_it_is(nodes):
    case = graph(nodes, output="float[1,B,S,4] y", constants=SHARED + RAISED)
    refuses(case, norms.run, "a constant within the norm adds an axis")


def test_a_scale_that_adds_an_axis_comes_after_the_norm():
    case = graph(f"{SQUARE}  n = Div(x, s)  y = Mul(n, w4)", output="float[1,B,S,4] y",
                 constants=SHARED + RAISED)  # fmt: skip
    apply(case, norms.run)
    assert ops(case) == {"RMSNormalization": 1, "Mul": 1}


TWO_SCALES = "a = Mul(n, w)  t = Mul(b, n)  y = Add(a, t)"


@pytest.mark.parametrize("core", [f"{SQUARE}  n = Div(x, s)", f"{SPREAD}  n = Div(d, s)"])
def test_norms_that_share_their_core_are_two(core):
    case = graph(f"{core}  {TWO_SCALES}", constants=SHARED)
    apply(case, norms.run)
    kind = "RMSNormalization" if core.startswith(SQUARE) else "LayerNormalization"
    assert ops(case) == {kind: 2, "Add": 1}


@pytest.mark.parametrize(
    "users",
    ["a = Mul(n, w)  t = Tanh(n)  y = Add(a, t)", "a = Mul(n, w)  t = Mul(n, x)  y = Add(a, t)"],
)
def test_a_core_that_something_else_reads_ends_the_norm(users):
    case = graph(f"{SQUARE}  n = Div(x, s)  {users}", constants=SHARED)
    apply(case, norms.run)
    assert ops(case)["RMSNormalization"] == 1
    assert only(case, "RMSNormalization").outputs[0].name == "n"


EXISTING = {
    "last axis by number": ("LayerNormalization<axis = 2>(x, w, b)", 1),
    "scale [1, 1, D]": ("LayerNormalization(x, wide, b)", 1),
    "no bias": ("LayerNormalization<axis = -1>(x, w)", 0),
    "canonical": ("RMSNormalization<axis = -1>(x, w)", 0),
    "the default axis": ("RMSNormalization(x, w)", 1),
}


@pytest.mark.parametrize(("node", "changed"), EXISTING.values(), ids=EXISTING.keys())
def test_existing_norms_are_brought_into_the_canonical_form(node, changed):
    case = graph(f"y = {node}", constants=SHARED)
    assert apply(case, norms.run).applied == changed
    (norm,) = case.graph
    assert norm.attributes["axis"].as_int() == -1
    assert [len(value.shape) for value in norm.inputs[1:]] == [1] * (len(norm.inputs) - 1)


KEPT = {
    "more than the last axis": (
        "y = LayerNormalization<axis = 1>(x, m)", "float[B,S,4] y", "more than the last axis",
    ),
    "its mean is read": (
        "y, n = LayerNormalization(x, w)  z = Neg(n)", "float[B,S,4] y, float[B,S,1] z",
        "the mean or inverse deviation of the norm is read",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "output", "reason"), KEPT.values(), ids=KEPT.keys())
def test_existing_norms_stay_where(nodes, output, reason):
    twelve = ", ".join("1" * 12)
    case = graph(nodes, inputs="float[B,3,4] x", output=output.replace("S", "3"),
                 constants=f"{SHARED}, float[3,4] m = {{{twelve}}}")  # fmt: skip
    refuses(case, norms.run, reason)


def test_a_scale_that_is_no_number_stays_outside():
    constants = SHARED + ", float[4] damaged = {1, inf, 2, 3}"
    case = graph(f"{SQUARE}  n = Div(x, s)  y = Mul(n, damaged)", constants=constants)
    refuses(case, norms.run, "not finite")


def test_no_scale_is_made_for_a_size_that_no_model_has():
    case = graph(f"{SQUARE}  y = Div(x, s)", inputs="float[1,1,2147483647] x",
                 output="float[1,1,2147483647] y", constants=SHARED)  # fmt: skip
    refuses(case, norms.run, "the size of the normalized axis")
