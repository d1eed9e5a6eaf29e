"""Which types change with a node, by the definitions of the standard alone."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from rule_case import graph

from optimizer.precision.limits import BF16, FP16
from optimizer.precision.retyping import Retyper, Retyping


def retyped(nodes: str, format_=FP16, written: int = 23, opset: int = 23, **signature) -> object:
    model = graph(nodes, opset=opset, **signature)
    return Retyper(model, format_, written).of(next(iter(model.graph)))


def case(inputs: set[int], outputs: set[int]) -> Retyping:
    return Retyping(frozenset(inputs), frozenset(outputs))


CHANGES = {
    "all operands of a sum": ("y = Add(x, x)", {}, case({0, 1}, {0})),
    "norm, scale and bias": (
        "y = LayerNormalization(x, w, w)", {"constants": "float[4] w = {1, 1, 1, 1}"},
        case({0, 1, 2}, {0}),
    ),
    "queries, keys, values and a float mask": (
        "y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x, m)",
        {"inputs": "float[B,S,4] x, float[S,S] m"}, case({0, 1, 2, 3}, {0}),
    ),
    "queries, keys and values beside a mask of bools": (
        "y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x, m)",
        {"inputs": "float[B,S,4] x, bool[S,S] m"}, case({0, 1, 2}, {0}),
    ),
    "the table of a lookup, not its indices": (
        "y = Gather(x, i)", {"inputs": "float[9,4] x, int64[B,S] i"}, case({0}, {0}),
    ),
    "the image of a resize, not its scales": (
        "y = Resize(x, , s)", {"inputs": "float[B,S,4] x, float[3] s"}, case({0}, {0}),
    ),
    "what a dequantizer returns, by its scale": (
        "y = DequantizeLinear(x, s)", {"inputs": "int8[B,S,4] x, float s"}, case({1}, {0}),
    ),
    "what a quantizer reads": (
        "y = QuantizeLinear(x, s, z)",
        {"inputs": "float[B,S,4] x, float s, int8 z", "output": "int8[B,S,4] y"},
        case({0, 1}, set()),
    ),
    "any number of parts": ("y = Concat<axis = 1>(x, x, x)", {}, case({0, 1, 2}, {0})),
    "only what is read": (
        "y = Shape(x)", {"output": "int64[3] y"}, case({0}, set()),
    ),
    "nothing of integers": (
        "y = Add(x, x)", {"inputs": "int64[B] x", "output": "int64[B] y"}, case(set(), set()),
    ),
    "nothing that is half precision already": (
        "y = Add(x, x)", {"inputs": "float16[B] x", "output": "float16[B] y"},
        case(set(), set()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_types_change_together_as_the_definition_ties_them(name):
    nodes, signature, expected = CHANGES[name]
    assert retyped(nodes, **signature) == expected


REFUSALS = {
    "an operator without the type": (
        "y, s, z = DynamicQuantizeLinear(x)", {"output": "uint8[B,S,4] y"},
        "DynamicQuantizeLinear takes no FLOAT16 as 'x' in opset 23",
    ),
    "an operator that the standard does not have": (
        "y = com.example.Add(x)", {}, "the ONNX standard does not define the types of",
    ),
    "a branch": (
        "y = If<then_branch = a () => (float[2] t) { t = Identity(x) },"
        " else_branch = b () => (float[2] e) { e = Neg(x) }>(c)",
        {"inputs": "float[2] x, bool c", "output": "float[2] y"},
        "it holds a subgraph, whose values keep their types",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_such_type_says_why(name):
    nodes, signature, reason = REFUSALS[name]
    if "com.example" in nodes:
        header = '<ir_version: 10, opset_import: ["" : 23, "com.example" : 1]>\n'
        text = f"{header}g (float[2] x) => (float[2] y) {{ {nodes} }}"
        model = ir.from_onnx_text(text)
        model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        found = Retyper(model, FP16, 23).of(next(iter(model.graph)))
    else:
        found = retyped(nodes, **signature)
    assert isinstance(found, str)
    assert found.startswith(reason)


def test_the_version_that_the_result_is_written_in_must_have_the_type_too():
    signature = {"inputs": "float[B,3,8,8] x, float[2,3,2,2] w", "output": "float[B,2,7,7] y"}
    assert isinstance(retyped("y = Conv(x, w)", BF16, **signature), Retyping)
    reason = retyped("y = Conv(x, w)", BF16, written=20, **signature)
    assert reason == "Conv takes no BFLOAT16 as 'X' in opset 20"
    assert isinstance(retyped("y = Conv(x, w)", FP16, written=20, **signature), Retyping)


def test_an_operator_that_is_spelled_out_for_an_older_version_is_judged_as_it_is():
    signature = {"constants": "float[4] w = {1, 1, 1, 1}"}
    change = retyped("y = RMSNormalization(x, w)", written=20, **signature)
    assert change == case({0, 1}, {0})


def test_a_value_of_unknown_type_keeps_its_node():
    model = graph("y = Add(x, x)")
    node = next(iter(model.graph))
    node.outputs[0].type = None
    assert Retyper(model, FP16, 23).of(node) == "the element type of 'y' is not known"
