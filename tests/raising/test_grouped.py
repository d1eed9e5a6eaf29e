"""Two key and value heads of size 4, each for three of six query heads."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from rule_case import apply, graph, only, ops, refuses

from optimizer.raising import grouped

CONSTANTS = (
    "int64[5] apart = {0, 0, 2, 1, 4}, int64[5] wide = {1, 1, 1, 3, 1}, "
    "int64[3] joined = {0, 0, 24}, int64[5] thirds = {0, 0, 3, 1, 4}, "
    "int64[5] pair = {1, 1, 1, 2, 1}, int64[4] by_heads = {0, 2, -1, 4}, "
    "int64[1] three = {3}, int64[4] heads = {0, 0, 2, 4}, int64[5] tiled = {0, 0, 1, 2, 4}, "
    "int64[5] twice = {1, 1, 3, 1, 1}, int64[3] narrow = {0, 0, 8}, "
    "int64[5] halves = {0, 0, 4, 1, 2}"
)
INPUTS = "float[B,S,24] q, float[B,T,8] k, float[B,T,8] v"
TABLES = ", float[B,T,2] c, float[B,T,2] s"
SIX = "y = Attention<q_num_heads = 6, kv_num_heads = 6, scale = 0.5>"


def repeat(name: str, source: str = "") -> str:
    """Node texts that repeat the heads of ``source``."""
    source = source or name
    return (
        f"{name}1 = Reshape({source}, apart)  {name}2 = Expand({name}1, wide)"
        f"  {name}r = Reshape({name}2, joined)"
    )


def case(nodes: str, inputs: str = INPUTS, **changes: str) -> ir.Model:
    return graph(nodes, inputs=inputs, output="float[B,S,24] y", constants=CONSTANTS, **changes)


BOTH = f"{repeat('k')}  {repeat('v')}"


def test_heads_that_are_repeated_are_repeated_by_the_attention() -> None:
    model = case(f"{BOTH}  {SIX}(q, kr, vr)")
    assert apply(model, grouped.run).applied == 1
    assert ops(model) == {"Attention": 1}
    node = only(model, "Attention")
    assert node.attributes["kv_num_heads"].as_int() == 2
    assert [value.name for value in node.inputs] == ["q", "k", "v"]


def test_an_unsqueeze_begins_a_repetition_too() -> None:
    model = case(
        "k0 = Unsqueeze(k4, three)  k2 = Expand(k0, wide)  kr = Reshape(k2, joined)"
        f"  {repeat('v')}  {SIX}(q, kr, vr)",
        inputs=INPUTS.replace("float[B,T,8] k", "float[B,T,2,4] k4"),
    )  # fmt: skip
    refuses(model, grouped.run, None)  # its source is not in 3-D form


@pytest.mark.parametrize("mask", ["", ", m"])
@pytest.mark.parametrize("attributes", ["", ", interleaved = 1", ", rotary_embedding_dim = 4"])
def test_the_rotary_embedding_turns_the_heads_once(attributes: str, mask: str) -> None:
    model = case(
        f"{BOTH}  t = RotaryEmbedding<num_heads = 6{attributes}>(kr, c, s)  {SIX}(q, t, vr{mask})",
        inputs=INPUTS + TABLES + (", bool[S,T] m" if mask else ""),
    )
    assert apply(model, grouped.run).applied == 1
    rotary = only(model, "RotaryEmbedding")
    assert rotary.attributes["num_heads"].as_int() == 2
    assert rotary.inputs[0].name == "k"


def test_a_rotary_embedding_that_others_read_stays_as_well() -> None:
    model = case(
        f"{BOTH}  t = RotaryEmbedding<num_heads = 6>(kr, c, s)  z = {SIX[4:]}(q, t, vr)"
        "  n = ReduceSum(t)  y = Add(z, n)",
        inputs=INPUTS + TABLES,
    )
    apply(model, grouped.run)
    assert ops(model)["RotaryEmbedding"] == 2


TILED = "k1 = Reshape(k, tiled)  k2 = Expand(k1, twice)  kr = Reshape(k2, joined)"
HALVES = "k1 = Reshape(k, halves)  k2 = Expand(k1, wide)  kr = Reshape(k2, joined)"
THREE = "v1 = Reshape(w, thirds)  v2 = Expand(v1, pair)  vr = Reshape(v2, joined)"
STAY = {
    "one after the other, not each": (f"{TILED}  {repeat('v')}  {SIX}(q, kr, vr)", None),
    "keys alone": (f"{repeat('k')}  {SIX}(q, kr, w)", None),
    "heads of another size": (
        f"{HALVES}  {repeat('v')}  {SIX}(q, kr, vr)", "keys and values are repeated differently",
    ),
    "keys twice, values three times": (
        f"{repeat('k')}  {THREE}  {SIX}(q, kr, vr)", "keys and values are repeated differently",
    ),
    "for other heads than the attention counts": (
        f"{BOTH}  y = Attention<q_num_heads = 3, kv_num_heads = 3>(q, kr, vr)",
        "keys and values are repeated differently",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_heads_stay_that_are_repeated(name: str) -> None:
    nodes, reason = STAY[name]
    width = 12 if "thirds" in nodes else 24
    refuses(case(nodes, inputs=f"{INPUTS}, float[B,T,{width}] w"), grouped.run, reason)


def test_heads_that_are_repeated_before_a_cache_stay() -> None:
    model = case(
        f"{BOTH}  y, nk, nv = Attention<q_num_heads = 6, kv_num_heads = 6>(q, kr, vr, m, pk, pv)",
        inputs=INPUTS + ", bool[S,U] m, float[B,6,P,4] pk, float[B,6,P,4] pv",
    )
    refuses(model, grouped.run, "repeated before the cache")


# --- the 4-D form ---------------------------------------------------------------------------------

GIVEN = "float[B,S,8] q, float[B,2,T,4] k, float[B,2,T,4] v"
JOINS = (
    "k1 = Transpose<perm = [0, 2, 1, 3]>(k)  kj = Reshape(k1, narrow)"
    "  v1 = Transpose<perm = [0, 2, 1, 3]>(v)  vj = Reshape(v1, narrow)"
)
TWO = "Attention<q_num_heads = 2, kv_num_heads = 2>"


def opened(nodes: str, inputs: str = GIVEN, output: str = "float[B,S,8] y") -> ir.Model:
    return graph(nodes, inputs=inputs, output=output, constants=CONSTANTS)


@pytest.mark.parametrize("mask", ["", ", m"])
def test_a_complete_cache_keeps_its_form(mask: str) -> None:
    model = opened(f"{JOINS}  y = {TWO}(q, kj, vj{mask})", GIVEN + ", bool[S,T] m" * bool(mask))
    assert apply(model, grouped.run).applied == 1
    node = only(model, "Attention")
    assert [value.name for value in node.inputs[1:3]] == ["k", "v"]
    assert "q_num_heads" not in node.attributes


def test_a_cache_that_is_concatenated_keeps_its_form() -> None:
    model = opened(
        "pk2 = Concat<axis = 2>(pk, k)  pv2 = Concat<axis = 2>(pv, v)  "
        + JOINS.replace("(k)", "(pk2)").replace("(v)", "(pv2)") + f"  y = {TWO}(q, kj, vj)",
        f"{GIVEN}, float[B,2,P,4] pk, float[B,2,P,4] pv",
    )  # fmt: skip
    apply(model, grouped.run)


def test_queries_may_have_more_heads_than_the_cache() -> None:
    model = opened(f"{JOINS}  y = Attention<q_num_heads = 6, kv_num_heads = 2>(q, kj, vj)",
                   GIVEN.replace("S,8] q", "S,24] q"), "float[B,S,24] y")  # fmt: skip
    apply(model, grouped.run)


CLOSED = {
    "are counted as other heads": f"{JOINS}  y = {TWO.replace('2', '1')}(q, kj, vj)",
    "are the sum of two": JOINS.replace("(k)", "(k0)") + f"  y = {TWO}(q, kj, vj)",
    "are given back": f"{JOINS}  y, a, b = {TWO}(q, kj, vj)",
    "follow a cache": f"{JOINS}  y = {TWO}(q, kj, vj, m, pk, pv)",
    "come from another layout": JOINS.replace("(k)", "(k0)") + f"  y = {TWO}(q, kj, vj)  ",
}


@pytest.mark.parametrize("name", CLOSED)
def test_the_flat_form_stays_where_keys(name: str) -> None:
    made = "Reshape(l, by_heads)" if "layout" in name else "Add(k, k)"
    more = f"k0 = {made}  " if "k0" in CLOSED[name] else ""
    cache = ", bool[S,U] m, float[B,2,P,4] pk, float[B,2,P,4] pv, float[B,8,T] l"
    refuses(opened(more + CLOSED[name], GIVEN + cache), grouped.run, None)


def test_the_flat_form_stays_where_a_reshape_moves_tokens_into_heads() -> None:
    """[B, 6, 2, 4], six tokens of two heads, is read as three tokens of two heads of size 8."""
    model = graph(
        JOINS.replace("narrow", "regrouped") + f"  y = {TWO}(q, kj, vj)",
        inputs="float[B,S,16] q, float[B,2,6,4] k, float[B,2,6,4] v",
        output="float[B,S,16] y", constants="int64[3] regrouped = {0, 3, 16}",
    )  # fmt: skip
    refuses(model, grouped.run, None)
