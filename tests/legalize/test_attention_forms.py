"""Attention in its 4-D form and with a Softmax of its own type, spelled out and raised back."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from rule_case import feed, graph, only, ops

from optimizer.errors import UnsupportedError
from optimizer.legalize.decompose import Pen, attention
from optimizer.raising import attention as raising
from optimizer.raising import value_info

FLAT = "float[B,S,8] q, float[B,S,8] k, float[B,S,8] v"
HEADS = "float[B,2,S,4] q, float[B,2,T,4] k, float[B,2,T,4] v"
CASES = {
    "flat": ("y = Attention<q_num_heads = 2, kv_num_heads = 2, scale = 0.3>(q, k, v)", FLAT),
    "the default scale": ("y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v)", FLAT),
    "heads apart": ("y = Attention<scale = 0.3>(q, k, v)", HEADS),
    "heads apart, the default scale": ("y = Attention(q, k, v)", HEADS),
    "heads apart and a mask": ("y = Attention(q, k, v, m)", f"{HEADS}, float[B,1,S,T] m"),
    "fewer key heads apart": (
        "y = Attention<scale = 0.3>(q, k, v)",
        "float[B,2,S,4] q, float[B,1,T,4] k, float[B,1,T,4] v",
    ),
    "a wider Softmax": (
        "y = Attention<q_num_heads = 2, kv_num_heads = 2, softmax_precision = 11>(q, k, v)", FLAT,
    ),
    "heads apart, a wider Softmax": ("y = Attention<softmax_precision = 11>(q, k, v)", HEADS),
}  # fmt: skip


def lowered(nodes: str, inputs: str) -> tuple[ir.Model, np.ndarray, np.ndarray]:
    """The graph spelled out, and what it gave before and gives after."""
    shape = "B,S,8" if inputs.startswith(FLAT) else "B,2,S,4"
    model = graph(nodes, inputs=inputs, output=f"float[{shape}] y")
    arrays = feed(model)
    before = ReferenceEvaluator(ir.to_proto(model)).run(None, arrays)[0]
    attention(Pen(model.graph, only(model, "Attention"), {}))
    after = ReferenceEvaluator(ir.to_proto(model)).run(None, arrays)[0]
    return model, before, after


@pytest.mark.parametrize("name", CASES)
def test_attention_is_spelled_out_and_raised_back(name: str) -> None:
    nodes, inputs = CASES[name]
    model, before, after = lowered(nodes, inputs)
    assert "Attention" not in ops(model)
    assert ("Cast" in ops(model)) == ("wider" in name)
    # Sums of four products and of three probabilities, in float32.
    assert np.abs(before - after).max() <= 32 * np.finfo(np.float32).eps
    value_info.fill(model)
    raising.run(model)
    node = only(model, "Attention")
    assert not {"Softmax", "Cast", "MatMul"} & set(ops(model))
    precision = node.attributes.get_int("softmax_precision", 0)
    assert precision == (ir.DataType.DOUBLE if "wider" in name else 0)
    assert node.attributes["scale"].as_float() == pytest.approx(0.5 if "0.3" not in nodes else 0.3)


UNSPELLED = {
    "an unknown number of heads": (
        "y = Attention(q, k, v)", "float[B,H,S,4] q, float[B,H,T,4] k, float[B,H,T,4] v",
        "is lowered in its 3-D form",
    ),
    "heads apart with a cache": (
        "y, a, b = Attention(q, k, v, m, pk, pv)",
        f"{HEADS}, bool[S,U] m, float[B,2,P,4] pk, float[B,2,P,4] pv", "is lowered in its 3-D form",
    ),
    "keys that are no padding": (
        "y = Attention(q, k, v, , , , n)", f"{HEADS}, int64[B] n", "nonpad_kv_seqlen",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSPELLED)
def test_other_forms_are_refused(name: str) -> None:
    nodes, inputs, said = UNSPELLED[name]
    model = graph(nodes, inputs=inputs, output="float[B,2,S,4] y", opset=24)
    with pytest.raises(UnsupportedError, match=said):
        attention(Pen(model.graph, only(model, "Attention"), {}))
