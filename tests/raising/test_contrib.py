"""Every fused operator but attention: what it becomes computes the same in ONNX Runtime."""

from __future__ import annotations

import re

import numpy as np
import pytest
from contrib_case import apply, build, constant, refuses, weights
from rule_case import ops

from optimizer.raising import contrib

#: node text -> operators that it becomes
LAYER = "com.microsoft.SkipLayerNormalization"
SIMPLE = "com.microsoft.SkipSimplifiedLayerNormalization"
NORM = weights(g=(8,), c=(8,), b=(8,), w=(8, 8))
NORMS = {
    f"y = {LAYER}(x, s, g)": {"Add": 1, "LayerNormalization": 1},
    f"y = {LAYER}<epsilon = 0.5>(x, s, g, c)": {"Add": 1, "LayerNormalization": 1},
    f"y = {LAYER}(x, s, g, c, b)": {"Add": 2, "LayerNormalization": 1},
    f'y = {LAYER}(x, s, g, "", b)': {"Add": 2, "LayerNormalization": 1},
    f'y, "", "", t = {LAYER}(x, s, g, c, b)': {"Add": 2, "LayerNormalization": 1},
    f"y = {SIMPLE}<epsilon = 0.5>(x, s, g)": {"Add": 1, "RMSNormalization": 1},
    f"y = {SIMPLE}(x, s, g, b)": {"Add": 2, "RMSNormalization": 1},
    f'y, "", "", t = {SIMPLE}(x, s, g, b)': {"Add": 2, "RMSNormalization": 1},
    f"m = MatMul(s, w)  y = {LAYER}(x, m, g, c, b)": {
        "MatMul": 1, "Add": 2, "LayerNormalization": 1,
    },
    f"m = MatMul(x, w)  y = {LAYER}(m, s, g, c, b)": {
        "MatMul": 1, "Add": 2, "LayerNormalization": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("nodes", NORMS)
def test_a_sum_that_is_normalized_becomes_both(nodes: str) -> None:
    outputs = "float[B,S,8] y" + (", float[B,S,8] t" if " t = " in nodes else "")
    model = build(nodes, inputs="float[B,S,8] x, float[B,S,8] s", outputs=outputs, constants=NORM)
    assert apply(model, contrib.run).applied == 1
    assert ops(model) == NORMS[nodes]


def test_only_the_sum_may_be_read() -> None:
    model = build(
        f'y, "", "", t = {LAYER}(x, s, g, c)',
        inputs="float[B,S,8] x, float[B,S,8] s",
        outputs="float[B,S,8] t",
        constants=NORM,
    )
    apply(model, contrib.run)
    assert ops(model) == {"Add": 1}


def test_a_stream_that_is_broadcast_over_the_batch_stays_so() -> None:
    model = build(f"y = {LAYER}(x, s, g, c, b)", inputs="float[B,3,8] x, float[3,8] s",
                  outputs="float[B,3,8] y", constants=NORM)  # fmt: skip
    apply(model, contrib.run)


def test_the_bias_of_a_projection_is_added_to_it() -> None:
    model = build(f"m = MatMul(x, w)  y = {LAYER}(m, s, g, c, b)",
                  inputs="float[B,S,8] x, float[B,S,8] s", constants=NORM)  # fmt: skip
    contrib.run(model)
    biased = next(n for n in model.graph if n.op_type == "MatMul").outputs[0].consumers()[0]
    assert [v.name for v in biased.inputs] == ["m", "b"]


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("op_type", [LAYER, SIMPLE])
def test_statistics_that_are_read_keep_the_fused_norm(op_type: str, index: int) -> None:
    names = ["y", '""', '""', '""']
    names[index] = "r"
    model = build(f"{', '.join(names)} = {op_type}(x, s, g)", constants=NORM,
                  inputs="float[B,S,8] x, float[B,S,8] s",
                  outputs="float[B,S,8] y, float[B,S,1] r")  # fmt: skip
    refuses(model, contrib.run, "the mean or the deviation of a fused norm is read")


@pytest.mark.parametrize("attributes", ["", "<axis = -1, epsilon = 0.5>", "<axis = 2>"])
def test_a_simplified_norm_becomes_the_standard_one(attributes: str) -> None:
    model = build(f"y = SimplifiedLayerNormalization{attributes}(x, g)", constants=NORM)
    assert apply(model, contrib.run).applied == 1
    assert ops(model) == {"RMSNormalization": 1}


def test_a_simplified_norm_whose_deviation_is_read_stays() -> None:
    model = build("y, r = SimplifiedLayerNormalization(x, g)", constants=NORM,
                  outputs="float[B,S,8] y, float[B,S,1] r")  # fmt: skip
    refuses(model, contrib.run, "the deviation of a fused norm is read")


def test_a_simplified_norm_of_another_type_than_its_scale_is_cast_first() -> None:
    model = build("y = SimplifiedLayerNormalization(x, g)  z = Neg(y)", constants=NORM,
                  inputs="float16[B,S,8] x", outputs="float[B,S,8] z")  # fmt: skip
    apply(model, contrib.run)
    assert ops(model) == {"Cast": 1, "RMSNormalization": 1, "Neg": 1}


def test_a_simplified_norm_whose_scale_holds_fewer_digits_stays() -> None:
    model = build("y = SimplifiedLayerNormalization(x, g)", inputs="float[B,S,8] x, float16[8] g",
                  outputs="float16[B,S,8] y")  # fmt: skip
    refuses(model, contrib.run, "input and scale of a fused norm differ in element type")


GELUS = {
    "y = com.microsoft.Gelu(x)": {"Gelu": 1},
    "y = com.microsoft.FastGelu(x)": {"Gelu": 1},
    "y = com.microsoft.FastGelu(x, b)": {"Add": 1, "Gelu": 1},
    "y = com.microsoft.BiasGelu(x, b)": {"Add": 1, "Gelu": 1},
    "y = com.microsoft.QuickGelu(x)": {"Mul": 2, "Sigmoid": 1},
    "y = com.microsoft.QuickGelu<alpha = 1.0>(x)": {"Mul": 1, "Sigmoid": 1},
    "y = com.microsoft.QuickGelu<alpha = -0.5>(x)": {"Mul": 2, "Sigmoid": 1},
}


@pytest.mark.parametrize("nodes", GELUS)
def test_an_activation_becomes_what_it_is_made_of(nodes: str) -> None:
    model = build(nodes, constants=NORM)
    assert apply(model, contrib.run).applied == 1
    assert ops(model) == GELUS[nodes]
    approximate = {
        n.attributes["approximate"].as_string() for n in model.graph if n.op_type == "Gelu"
    }
    assert approximate <= {"tanh" if "Fast" in nodes else "none"}


@pytest.mark.parametrize("op_type", ["Gelu", "FastGelu", "QuickGelu"])
def test_constants_have_the_type_of_the_activation(op_type: str) -> None:
    model = build(f"y = com.microsoft.{op_type}(x)", inputs="float16[B,S,8] x",
                  outputs="float16[B,S,8] y")  # fmt: skip
    contrib.run(model)
    assert {v.dtype.name for v in model.graph.initializers.values()} <= {"FLOAT16"}
    assert all(n.outputs[0].dtype.name == "FLOAT16" for n in model.graph)


FUSED = "com.microsoft.FusedMatMul"
PRODUCTS = {
    f"y = {FUSED}(x, z)": ("float[B,2,3,4] x, float[B,2,4,5] z", {"MatMul": 1}),
    f"y = {FUSED}<alpha = 0.5>(x, z)": (
        "float[B,2,3,4] x, float[B,2,4,5] z", {"MatMul": 1, "Mul": 1},
    ),
    f"y = {FUSED}<transA = 1>(x, z)": (
        "float[B,2,4,3] x, float[B,2,4,5] z", {"MatMul": 1, "Transpose": 1},
    ),
    f"y = {FUSED}<transB = 1, alpha = -2.0>(x, z)": (
        "float[B,2,3,4] x, float[B,2,5,4] z", {"MatMul": 1, "Transpose": 1, "Mul": 1},
    ),
    f"y = {FUSED}<transA = 1, transB = 1>(x, z)": (
        "float[B,2,4,3] x, float[B,2,5,4] z", {"MatMul": 1, "Transpose": 2},
    ),
    f"y = {FUSED}<transB = 1>(x, z) ": (
        "float[B,2,3,4] x, float[5,4] z", {"MatMul": 1, "Transpose": 1},
    ),
    f"y = {FUSED}<transBatchA = 1>(x, z)": (
        "float[3,B,2,4] x, float[B,2,4,5] z", {"MatMul": 1, "Transpose": 1},
    ),
    f"y = {FUSED}<transBatchB = 1>(x, z)": (
        "float[B,2,3,4] x, float[4,B,2,5] z", {"MatMul": 1, "Transpose": 1},
    ),
    f"y = {FUSED}<transBatchA = 1, transA = 1>(x, z)": (
        "float[4,B,2,3] x, float[B,2,4,5] z", {"MatMul": 1, "Transpose": 1},
    ),
    f"y = {FUSED}<transBatchA = 1, transBatchB = 1, transB = 1, alpha = 3.0>(x, z)": (
        "float[3,B,2,4] x, float[5,B,2,4] z", {"MatMul": 1, "Transpose": 2, "Mul": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("nodes", PRODUCTS)
def test_a_product_with_transposed_factors_is_written_out(nodes: str) -> None:
    inputs, made = PRODUCTS[nodes]
    model = build(nodes, inputs=inputs, outputs="float[B,2,3,5] y")
    assert apply(model, contrib.run).applied == 1
    assert ops(model) == made
    assert model.graph[-1].op_type == ("Mul" if "alpha" in nodes else "MatMul")


def test_transposing_a_vector_is_nothing() -> None:
    model = build(f"y = {FUSED}<transA = 1, transB = 1>(x, z)", inputs="float[4] x, float[4] z",
                  outputs="float y")  # fmt: skip
    apply(model, contrib.run)


def test_a_factor_behind_an_activation_stays_before_the_product() -> None:
    """A Gelu that ends in a multiplication by 0.5 would no longer be recognised."""
    model = build(f"e = Erf(x)  h = Mul(e, x)  y = {FUSED}<alpha = 0.5>(h, w)", constants=NORM)
    apply(model, contrib.run)
    assert [n.op_type for n in model.graph] == ["Erf", "Mul", "Mul", "MatMul"]


def test_a_product_of_unknown_rank_is_left_alone() -> None:
    """An If whose branches differ in rank gives no rank; the other factor stays as it is, too."""
    model = build(
        "h = If (p) <then_branch = t () => (float[] u) { u = Neg(x) },"
        " else_branch = e () => (float[] v) { v = Flatten(x) }>"
        f" y = {FUSED}<transA = 1, transB = 1>(x, h)",
        inputs="float[B,S,2] x, bool p", outputs="float[] y",
    )  # fmt: skip
    refuses(model, contrib.run, "the rank of what it transposes is not known")


GEMM = weights(w=(8, 5), b=(5,))
ACTIVATIONS = {
    "<activation = \"Relu\">": {"Gemm": 1, "Relu": 1},
    "<activation = \"Tanh\", alpha = 2.0, beta = 0.5>": {"Gemm": 1, "Tanh": 1},
    "<activation = \"LeakyRelu\", activation_alpha = 0.3>": {"Gemm": 1, "LeakyRelu": 1},
    "<activation = \"HardSigmoid\", activation_alpha = 0.3, activation_beta = 0.1>": {
        "Gemm": 1, "HardSigmoid": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("attributes", ACTIVATIONS)
def test_a_layer_and_its_activation_come_apart(attributes: str) -> None:
    model = build(f"y = com.microsoft.FusedGemm{attributes}(x, w, b)", inputs="float[N,8] x",
                  outputs="float[N,5] y", constants=GEMM)  # fmt: skip
    assert apply(model, contrib.run).applied == 1
    assert ops(model) == ACTIVATIONS[attributes]


def test_an_activation_that_is_not_known_keeps_the_layer() -> None:
    model = build('y = com.microsoft.FusedGemm<activation = "Softplus">(x, w, b)',
                  inputs="float[N,8] x", outputs="float[N,5] y", constants=GEMM)  # fmt: skip
    refuses(model, contrib.run, "it has Softplus fused, which is not raised")


CONV = weights(w=(4, 2, 3), b=(4,))
CONVS = {
    '<activation = "Relu", kernel_shape = [3]>(x, w, b)': {"Conv": 1, "Relu": 1},
    '<activation = "Sigmoid", pads = [1, 1], kernel_shape = [3]>(x, w)': {"Conv": 1, "Sigmoid": 1},
    '<activation = "LeakyRelu", activation_params = [0.3], kernel_shape = [3]>(x, w, b)': {
        "Conv": 1, "LeakyRelu": 1,
    },
    '<activation = "HardSigmoid", activation_params = [0.3, 0.1], kernel_shape = [3]>(x, w, b)': {
        "Conv": 1, "HardSigmoid": 1,
    },
    '<activation = "Clip", activation_params = [-0.1, 0.2], kernel_shape = [3]>(x, w, b)': {
        "Conv": 1, "Clip": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("node", CONVS)
def test_a_convolution_and_its_activation_come_apart(node: str) -> None:
    size = 6 if "pads" in node else 4
    model = build(f"y = com.microsoft.FusedConv{node}", inputs="float[N,2,6] x",
                  outputs=f"float[N,4,{size}] y", constants=CONV)  # fmt: skip
    assert apply(model, contrib.run).applied == 1
    assert ops(model) == CONVS[node]


def test_a_convolution_that_adds_a_value_first_is_left_alone() -> None:
    node = 'y = com.microsoft.FusedConv<activation = "Relu", kernel_shape = [3]>(x, w, b, z)'
    model = build(node, inputs="float[N,2,6] x, float[N,4,4] z", outputs="float[N,4,4] y",
                  constants=CONV)  # fmt: skip
    refuses(model, contrib.run, "adds another value before its activation")


EMBEDDINGS = weights(words=(7, 8), places=(9, 8), kinds=(2, 8), g=(8,), c=(8,))
IDS = {
    "i": np.array([[1, 2, 6], [0, 3, 3]], np.int32),
    "k": np.array([[0, 0, 1], [1, 0, 0]], np.int32),
    "m": np.array([[1, 1, 0], [1, 1, 1]], np.int32),
    "p": np.array([[2, 1, 0], [4, 4, 8]], np.int32),
}
EMBED = "com.microsoft.EmbedLayerNormalization"
EMBEDS = {
    f'y, n = {EMBED}(i, "", words, places, "", g, c)': {"Gather", "Slice", "ConstantOfShape"},
    f"y, n = {EMBED}<epsilon = 0.5>(i, k, words, places, kinds, g, c, m)": {"ReduceSum"},
    f'y, n = {EMBED}(i, k, words, places, kinds, g, c, "", p)': {"ConstantOfShape"},
    f"y, n, t = {EMBED}(i, k, words, places, kinds, g, c, m, p)": {"ReduceSum"},
}


@pytest.mark.parametrize("nodes", EMBEDS)
def test_embeddings_become_lookups_and_a_norm(nodes: str) -> None:
    read = re.findall(r"\w+", nodes.partition("(")[2])
    used = {name: array for name, array in IDS.items() if name in read}
    inputs = ", ".join(f"int32[N,M] {name}" for name in used)
    outputs = "float[N,M,8] y, int32[N] n" + (", float[N,M,8] t" if ", t =" in nodes else "")
    model = build(nodes, inputs=inputs, outputs=outputs, constants=EMBEDDINGS)
    assert apply(model, contrib.run, used).applied == 1
    assert {"LayerNormalization", *EMBEDS[nodes]} <= set(ops(model))
    assert not any(n.domain for n in model.graph)


def test_lengths_that_nobody_reads_are_not_computed() -> None:
    model = build(f'y, n = {EMBED}(i, "", words, places, "", g, c)', inputs="int32[N,M] i",
                  outputs="float[N,M,8] y", constants=EMBEDDINGS)  # fmt: skip
    apply(model, contrib.run, {"i": IDS["i"]})
    assert ops(model) == {"Gather": 1, "Shape": 1, "Slice": 1, "Add": 1, "LayerNormalization": 1}


def test_embeddings_without_words_are_left_alone() -> None:
    model = build(f'y, n = {EMBED}(i, "", "", places, "", g, c)', inputs="int32[N,M] i",
                  outputs="float[N,M,8] y", constants=EMBEDDINGS)  # fmt: skip
    refuses(model, contrib.run, "it lacks an embedding")


def test_operators_of_another_domain_are_not_ours() -> None:
    model = build("y = Gelu(x)")
    assert not contrib.run(model).applied
    assert constant("n", np.array([1], np.int64)) == "int64[1] n = {1}"
