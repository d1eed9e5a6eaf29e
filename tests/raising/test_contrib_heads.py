"""Every fused attention and rotary embedding: what it becomes computes the same in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from contrib_case import apply, build, constant, refuses, weights
from rule_case import only, ops

from optimizer.raising import contrib_attention

RULE = contrib_attention.run
B, S, T, P = 3, 3, 5, 2
QKV = "float[B,S,8] q, float[B,T,8] k, float[B,T,8] v"
MULTI = "com.microsoft.MultiHeadAttention<num_heads = 2>"
CAUSAL = "com.microsoft.MultiHeadAttention<num_heads = 2, unidirectional = 1>"
BIASES = weights(b=(24,), w=(8, 24), wide=(8, 20), odd=(20,))
#: At least one key per row counts: see ``masks`` on what happens otherwise.
LENGTHS = np.array([1, 3, 2], np.int32)
FLAGS = np.array([[1, 0, 1], [1, 1, 1], [1, 1, 0]], np.int32)
EACH = np.stack([FLAGS] * S, axis=1)
EACH[0, 1, 1] = 1
PAST = ", float[B,2,P,4] pk, float[B,2,P,4] pv"
PRESENT = ", float[B,2,R,4] nk, float[B,2,R,4] nv"

MULTI_HEADS = {
    "plain": (f"y = {MULTI}(q, k, v)", "", "", None),
    "biases": (f"y = {MULTI}(q, k, v, b)", "", "", None),
    "a scale": (f"y = {MULTI[:-1]}, scale = 0.3>(q, k, v, b)", "", "", None),
    "added scores": (f'y = {MULTI}(q, k, v, "", "", a)', ", float[B,2,S,T] a", "", None),
    "added scores of one head": (
        f'y = {MULTI}(q, k, v, "", "", a)', ", float[1,1,S,T] a", "", None,
    ),
    "lengths": (f'y = {MULTI}(q, k, v, "", m)', ", int32[B] m", "", LENGTHS),
    "flags": (f'y = {MULTI}(q, k, v, "", m)', ", int32[B,T] m", "", FLAGS),
    "flags per query": (f'y = {MULTI}(q, k, v, "", m)', ", int32[B,S,T] m", "", EACH),
    "flags and added scores": (
        f'y = {MULTI}(q, k, v, "", m, a)', ", int32[B,T] m, float[B,2,S,T] a", "", FLAGS,
    ),
    "present keys": (
        f"y, nk, nv = {MULTI}(q, k, v, b)", "", ", float[B,2,T,4] nk, float[B,2,T,4] nv", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MULTI_HEADS)
def test_attention_of_several_heads_with(name: str) -> None:
    nodes, inputs, outputs, mask = MULTI_HEADS[name]
    model = build(nodes, inputs=QKV + inputs, outputs="float[B,S,8] y" + outputs, constants=BIASES)
    given = {} if mask is None else {"m": mask}
    assert apply(model, RULE, given).applied == 1
    attention = only(model, "Attention")
    assert attention.domain == ""
    assert attention.attributes["q_num_heads"].as_int() == 2
    scale = 0.3 if name == "a scale" else 0.5
    assert attention.attributes["scale"].as_float() == pytest.approx(scale)


CACHED = {
    "a cache": (f'y, nk, nv = {MULTI}(q, k, v, b, "", "", pk, pv)', "", None),
    "a cache and flags": (
        f'y, nk, nv = {MULTI}(q, k, v, b, m, "", pk, pv)', ", int32[B,U] m",
        np.array([[1, 0, 1, 1, 1, 0], [1] * 6, [0, 0, 0, 1, 1, 1]], np.int32),
    ),
    "a cache and lengths": (
        f'y, nk, nv = {MULTI}(q, k, v, b, m, "", pk, pv)', ", int32[B] m",
        np.array([2, 6, 4], np.int32),
    ),
    "a cache and the order of tokens": (
        f'y, nk, nv = {CAUSAL}(q, q, q, b, "", "", pk, pv)', "", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHED)
def test_attention_with(name: str) -> None:
    nodes, inputs, mask = CACHED[name]
    model = build(
        nodes, inputs=f"{QKV}{PAST}{inputs}", constants=BIASES,
        outputs="float[B,S,8] y" + (PRESENT if "nk" in nodes else ""),
    )  # fmt: skip
    apply(model, RULE, {} if mask is None else {"m": mask})
    assert [v.name for v in only(model, "Attention").inputs[4:]] == ["pk", "pv"]


def test_attention_of_as_many_queries_as_keys_may_keep_the_order_of_tokens() -> None:
    model = build(f"y = {CAUSAL}(x, x, x, b)", constants=BIASES)
    apply(model, RULE)


def test_values_may_be_wider_than_keys() -> None:
    model = build(f"y = {MULTI}(q, k, v, b)", outputs="float[B,S,4] y",
                  inputs="float[B,S,8] q, float[B,T,8] k, float[B,T,4] v",
                  constants=weights(b=(20,)))  # fmt: skip
    apply(model, RULE)


COMPLETE = "float[B,S,8] q, float[B,2,T,4] k, float[B,2,T,4] v"


@pytest.mark.parametrize("extra", ["", ', "", "", a'])
def test_complete_keys_and_values_stay_in_their_form(extra: str) -> None:
    model = build(f"y = {MULTI}(q, k, v{extra})",
                  inputs=COMPLETE + ", float[B,2,S,T] a" * bool(extra))  # fmt: skip
    apply(model, RULE)
    assert [v.name for v in only(model, "Attention").inputs[1:3]] == ["k", "v"]


def test_complete_keys_have_their_bias_already() -> None:
    model = build(f"y = {MULTI}(q, k, v, b)", inputs=COMPLETE, constants=BIASES)
    assert contrib_attention.run(model).applied == 1
    assert ops(model)["Add"] == 1


UNRAISED = {
    "packed in one value": (f"y = {MULTI}(q)", "float[B,S,2,3,4] q"),
    "its queries, keys and values are packed": (
        f"y = {MULTI}(q, k)", "float[B,S,8] q, float[B,T,2,2,4] k",
    ),
    "a mask or a cache beside keys and values that are complete": (
        f'y = {MULTI}(q, k, v, "", m)', f"{COMPLETE}, int32[B,T] m",
    ),
    "its cache is shared in place or by beams": (
        f'y = {MULTI}(q, k, v, "", "", "", pk, pv, n)', f"{QKV}{PAST}, int32[1] n",
    ),
    "its mask is not one length per row": (f'y = {MULTI}(q, k, v, "", m)', f"{QKV}, int32[11] m"),
    "its mask is neither of flags nor of lengths": (
        f'y = {MULTI}(q, k, v, "", m)', f"{QKV}, int32[B,1,S,T] m",
    ),
    "the size of its heads is not known": (
        "y = com.microsoft.MultiHeadAttention<num_heads = 3>(q, k, v)", QKV,
    ),
    "the biases of its projections are not constant": (
        f"y = {MULTI}(q, k, v, d)", f"{QKV}, float[24] d",
    ),
    "the biases of its projections are not constant ": (
        f"y = {MULTI}(q, k, v)", "float[B,S,Q] q, float[B,T,Q] k, float[B,T,V] v",
    ),
    "an order of tokens beside keys and values": (f"y = {CAUSAL}(q, k, v)", COMPLETE),
    "an order of tokens of which keys and queries may not be": (f"y = {CAUSAL}(q, k, v)", QKV),
}  # fmt: skip


@pytest.mark.parametrize("reason", UNRAISED)
def test_attention_stays_because(reason: str) -> None:
    nodes, inputs = UNRAISED[reason]
    model = build(nodes, inputs=inputs, constants=BIASES)
    refuses(model, RULE, reason.strip())


def test_scores_that_are_read_keep_the_attention() -> None:
    model = build(f'y, "", "", s = {MULTI}(q, k, v)', inputs=QKV,
                  outputs="float[B,S,8] y, float[B,2,S,T] s")  # fmt: skip
    refuses(model, RULE, "its scores are read")


def test_complete_keys_that_are_given_back_keep_the_attention() -> None:
    model = build(f"y, nk, nv = {MULTI}(q, k, v)", inputs=COMPLETE,
                  outputs="float[B,S,8] y, float[B,2,T,4] nk, float[B,2,T,4] nv")  # fmt: skip
    refuses(model, RULE, "a mask or a cache beside keys and values that are complete")


def test_the_width_of_queries_is_not_guessed_beside_wider_values() -> None:
    """Biases [30] are 8 + 8 + 14 here, not three of 10."""
    model = build(f"y = {MULTI}(q, k, v, b)", outputs="float[B,S,14] y",
                  inputs="float[B,S,Q] q, float[B,T,8] k, float[B,T,14] v",
                  constants=weights(b=(30,)))  # fmt: skip
    apply(model, RULE, {"q": np.ones((B, S, 8), np.float32)})


PACKED = "com.microsoft.Attention<num_heads = 2>"
PACKINGS = {
    "plain": (f"y = {PACKED}(x, w, b)", "", None),
    "no biases": (f"y = {PACKED}(x, w)", "", None),
    "a scale": (f"y = {PACKED[:-1]}, scale = 0.3>(x, w, b)", "", None),
    "lengths": (f"y = {PACKED}(x, w, b, m)", ", int32[B] m", LENGTHS),
    "flags": (f"y = {PACKED}(x, w, b, m)", ", int32[B,S] m", FLAGS),
    "flags per query": (f"y = {PACKED}(x, w, b, m)", ", int32[B,S,S] m", EACH),
    "added scores": (f'y = {PACKED}(x, w, b, "", "", a)', ", float[B,2,S,S] a", None),
    "the order of tokens": (f"y = {PACKED[:-1]}, unidirectional = 1>(x, w, b)", "", None),
    "the order of tokens and flags": (
        f"y = {PACKED[:-1]}, unidirectional = 1>(x, w, b, m)", ", int32[B,S] m", FLAGS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKINGS)
def test_packed_projections_with(name: str) -> None:
    nodes, inputs, mask = PACKINGS[name]
    model = build(nodes, inputs="float[B,S,8] x" + inputs, constants=BIASES)
    apply(model, RULE, {} if mask is None else {"m": mask})
    assert ops(model)["MatMul"] == 3
    assert "w" not in model.graph.initializers


def test_values_may_have_a_size_of_their_own() -> None:
    model = build(f"y = {PACKED[:-1]}, qkv_hidden_sizes = [8, 8, 4]>(x, wide, odd)",
                  outputs="float[B,S,4] y", constants=BIASES)  # fmt: skip
    apply(model, RULE)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("read", [True, False])
def test_packed_projections_with_a_cache(causal: int, *, read: bool) -> None:
    model = build(
        f"y, n = {PACKED[:-1]}, unidirectional = {causal}>(x, w, b, m, p)",
        inputs="float[B,S,8] x, int32[B,U] m, float[2,B,2,P,4] p", constants=BIASES,
        outputs="float[B,S,8] y" + ", float[2,B,2,R,4] n" * read,
    )  # fmt: skip
    flags = np.array([[1, 0, 1, 1, 1, 0], [1] * 6, [1, 0, 0, 1, 1, 1]], np.int32)
    past = np.random.default_rng(2).normal(size=(2, 3, 2, 3, 4)).astype(np.float32)
    apply(model, RULE, {"m": flags, "p": past})


UNPACKED = {
    "its weights are not constant": (f"y = {PACKED}(x, d)", ", float[8,24] d"),
    "it turns queries and keys itself": (f"y = {PACKED[:-1]}, do_rotary = 1>(x, w, b)", ""),
    "its cache is filled in place": (
        f"y = {PACKED[:-1]}, past_present_share_buffer = 1>(x, w, b)", "",
    ),
    "the size of its heads is not known": (
        "y = com.microsoft.Attention<num_heads = 3>(x, w, b)", "",
    ),
    "its mask is neither of flags nor of lengths": (
        f"y = {PACKED}(x, w, b, m)", ", int32[B,1,S,S] m",
    ),
    "its mask is not one length per row": (f"y = {PACKED}(x, w, b, m)", ", int32[N] m"),
}  # fmt: skip


@pytest.mark.parametrize("reason", UNPACKED)
def test_packed_projections_stay_because(reason: str) -> None:
    nodes, inputs = UNPACKED[reason]
    refuses(build(nodes, inputs="float[B,S,8] x" + inputs, constants=BIASES), RULE, reason)


ANGLES = np.random.default_rng(7).normal(size=(9, 2)).astype(np.float32)
TABLES = f"{constant('c', np.cos(ANGLES))}, {constant('s', np.sin(ANGLES))}"
TURN = "com.microsoft.RotaryEmbedding"
PLACES = np.array([[0, 1, 2], [5, 3, 8], [2, 2, 2]], np.int64)
TURNS = {
    "rows": (f"y = {TURN}<num_heads = 2>(x, p, c, s)", "float[B,S,8] x, int64[B,S] p"),
    "rows of heads that are counted": (f"y = {TURN}(x, p, c, s)", "float[B,S,8] x, int64[B,S] p"),
    "neighbours": (
        f"y = {TURN}<num_heads = 2, interleaved = 1>(x, p, c, s)", "float[B,S,8] x, int64[B,S] p",
    ),
    "an offset": (f"y = {TURN}(x, o, c, s)", "float[B,S,8] x, int64[1] o"),
    "heads": (f"y = {TURN}(x, p, c, s)", "float[B,2,S,4] x, int64[B,S] p"),
    "heads from an offset": (f"y = {TURN}(x, o, c, s)", "float[B,2,S,4] x, int64[1] o"),
    "a part of each head": (
        f"y = {TURN}<num_heads = 1, rotary_embedding_dim = 4>(x, p, c, s)",
        "float[B,S,8] x, int64[B,S] p",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS)
def test_a_rotary_embedding_turns(name: str) -> None:
    nodes, inputs = TURNS[name]
    shape = "[B,2,S,4]" if "heads" in name and "counted" not in name else "[B,S,8]"
    model = build(nodes, inputs=inputs, outputs=f"float{shape} y", constants=TABLES)
    used = {"p": PLACES} if " p" in inputs else {"o": np.array([4], np.int64)}
    assert apply(model, RULE, used).applied == 1
    turned = only(model, "RotaryEmbedding")
    assert turned.domain == ""
    assert turned.attributes["interleaved"].as_int() == (name == "neighbours")


UNTURNED = {
    "its rows are packed into one": (
        f"y = {TURN}<num_heads = 2, is_packed_batching = 1>(x, p, c, s)",
        "float[B,S,8] x, int64[B,S] p",
    ),
    "its tables, are not known": (
        f"y = {TURN}<num_heads = 2>(x, p, t, s)", "float[B,S,8] x, int64[B,S] p, float[9,2] t",
    ),
    "the number of its heads is not known": (
        f"y = {TURN}(x, p, c, s)", "float[B,S,W] x, int64[B,S] p",
    ),
    "the rank of its positions is not known": (
        f"y = {TURN}(x, p, c, s)", "float[B,S,8] x, int64[] p",
    ),
    "are multiplied by a scale": (
        f"y = {TURN}<scale = 2.0>(x, p, c, s)", "float[B,S,8] x, int64[B,S] p",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", UNTURNED)
def test_a_rotary_embedding_stays_because(reason: str) -> None:
    nodes, inputs = UNTURNED[reason]
    refuses(build(nodes, inputs=inputs, constants=TABLES), RULE, reason)


GROUPED = "com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2, do_rotary = 0>"
CACHE = ", float[B,2,P,8] pk, float[B,2,P,8] pv, int32[B] l, int32 t"
KEPT = ", float[B,2,R,8] nk, float[B,2,R,8] nv"
GROUP = weights(w=(8, 64), b=(64,))


def grouped(layer: str, constants: str = GROUP, inputs: str = "float[B,S,8] x") -> ir.Model:
    return build(
        f'{layer}  y, nk, nv = {GROUPED}(h, "", "", pk, pv, l, t)', inputs=inputs + CACHE,
        outputs="float[B,S,32] y" + KEPT, constants=constants,
    )  # fmt: skip


@pytest.mark.parametrize("layer", ["h = MatMul(x, w)", "m = MatMul(x, w)  h = Add(m, b)"])
def test_a_grouped_attention_reads_three_projections(layer: str) -> None:
    model = grouped(layer)
    empty = np.zeros((B, 2, 0, 8), np.float32)
    given = {"pk": empty, "pv": empty, "l": np.full(B, S - 1, np.int32), "t": np.array(S, np.int32)}
    apply(model, RULE, given)
    node = only(model, "GroupQueryAttention")
    assert ops(model)["MatMul"] == 3
    widths = [v.producer().inputs[1].shape[-1] for v in node.inputs[:3]]
    assert widths == [32, 16, 16]


def test_a_projection_with_dequantized_biases_stays_packed() -> None:
    codes = np.arange(64, dtype=np.int32)
    model = grouped(
        "e = DequantizeLinear(codes, step)  m = MatMul(x, w)  h = Add(m, e)",
        f"{GROUP}, {constant('codes', codes)}, float step = {{0.5}}",
    )
    refuses(model, RULE, "its packed queries, keys and values are no linear layer")


def test_what_is_no_projection_stays_packed() -> None:
    model = grouped("h = Concat<axis = -1>(x, x, x, x, x, x, x, x)")
    refuses(model, RULE, "its packed queries, keys and values are no linear layer")


def test_columns_that_are_no_heads_stay_packed() -> None:
    model = grouped("h = MatMul(x, w)", weights(w=(8, 68)))
    refuses(model, RULE, "the size of its heads is not known")


def test_three_projections_are_left_as_they_are() -> None:
    model = build(f"y, nk, nv = {GROUPED}(q, k, v, pk, pv, l, t)",
                  inputs="float[B,S,32] q, float[B,S,16] k, float[B,S,16] v" + CACHE,
                  outputs="float[B,S,32] y" + KEPT)  # fmt: skip
    report = contrib_attention.run(model)
    assert (report.applied, report.skipped) == (0, ())
