from __future__ import annotations

from collections.abc import Callable

import models
import numpy as np
import onnx_ir as ir
import pytest

from optimizer import graph as graphs
from optimizer.blocks import Experts, find_blocks
from optimizer.structure import NormKind, Style

STYLES = {
    "pre-norm": Style.PRE_NORM,
    "post-norm": Style.POST_NORM,
    "parallel": Style.PARALLEL,
    "parallel-two-norms": Style.PARALLEL,
}
LAYER_NORM = {"norm": "layer", "gated": False, "bias": True, "rotary": False}
TANH = {"norm": "tanh"}
KINDS = {"layer": NormKind.LAYER, "rms": NormKind.RMS, "tanh": NormKind.TANH}


def node(model: ir.Model, output: str) -> ir.Node:
    (found,) = [n for n in model.graph if any(v.name == output for v in n.outputs)]
    return found


def value(model: ir.Model, name: str) -> ir.Value:
    return next(v for n in model.graph for v in n.outputs if v.name == name)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("changes", [{}, LAYER_NORM, TANH, {"kv_cache": True}], ids=str)
def test_finds_every_layer_of(style: str, changes: dict[str, object]) -> None:
    model = models.build(layers=3, style=style, **changes)
    structure = find_blocks(model)
    assert structure.misses == ()
    assert [block.index for block in structure.blocks] == [0, 1, 2]
    for i, block in enumerate(structure.blocks):
        assert block.style is STYLES[style]
        assert block.extras == ()
        assert block.input.name == f"stream.{i}"
        assert block.output.name == f"stream.{i + 1}"
        assert block.hidden_size == 32
        assert (block.attention_norm == block.mlp_norm) == (style == "parallel")
        assert (block.mlp.gate is not None) == ("gated" not in changes)
        norm = KINDS[str(changes.get("norm", "rms"))]
        assert block.attention_norm.kind is block.mlp_norm.kind is norm


def test_views_hold_the_nodes_and_weights_of_their_layer() -> None:
    model = models.build(layers=2, kv_cache=True, bias=True)
    block = find_blocks(model).blocks[1]
    attention, mlp = block.attention, block.mlp
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 2, 8)
    assert attention.scale == pytest.approx(8**-0.5)
    assert not attention.is_causal
    assert attention.softcap == 0
    layers = [attention.q, attention.k, attention.v, attention.o, mlp.gate, mlp.up, mlp.down]
    for layer, name in zip(layers, ("q", "k", "v", "o", "gate", "up", "down"), strict=True):
        assert layer is not None
        assert layer.weight.name == f"layers.1.{name}.weight"
        assert layer.bias is not None
        assert layer.bias.name == f"layers.1.{name}.bias"
        assert layer.output is layer.add.outputs[0]
    assert attention.mask.name == "mask"
    assert attention.past_key.name == "past_key_values.1.key"
    assert attention.present_value.name == "present.1.value"
    assert attention.q_rotary.op_type == attention.k_rotary.op_type == "RotaryEmbedding"
    assert block.hidden.name == "hidden.1"
    assert block.attention_add.outputs[0] is block.hidden
    assert block.mlp_add.outputs[0] is block.output
    assert block.attention_norm.scale.name == "layers.1.norm1.weight"
    assert block.attention_norm.epsilon == pytest.approx(1e-5)
    assert [n.op_type for n in mlp.inner] == ["Sigmoid", "Mul", "Mul"]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu-tanh", "relu", "quick-gelu"])
@pytest.mark.parametrize("gated", [True, False])
def test_names_the_activation(activation: str, gated: bool) -> None:
    model = models.build(activation=activation, gated=gated)
    assert {b.mlp.activation for b in find_blocks(model).blocks} == {activation}


@pytest.mark.parametrize("norm", ["rms", "tanh"])
@pytest.mark.parametrize("style", STYLES)
def test_operands_of_additions_come_in_either_order(style: str, norm: str) -> None:
    model = models.build(style=style, norm=norm, bias=True)
    expected = [(b.input.name, b.output.name) for b in find_blocks(model).blocks]
    for add in [n for n in model.graph if n.op_type in ("Add", "Mul")]:
        first, second = add.inputs
        add.replace_input_with(0, second)
        add.replace_input_with(1, first)
    found = find_blocks(model)
    assert [(b.input.name, b.output.name) for b in found.blocks] == expected
    assert {b.mlp.activation for b in found.blocks} == {"silu"}


def _sum(model: ir.Model, i: int, order: str) -> None:
    """Write the output of parallel layer i as (x + a) + m, (a + m) + x or a + (x + m)."""
    last = node(model, f"stream.{i + 1}")
    inner = next(
        v for v in last.inputs if v.producer().op_type == "Add" and v.name != f"stream.{i}"
    )
    x, a = inner.producer().inputs
    m = next(v for v in last.inputs if v is not inner)
    first, second, third = {"xam": (x, a, m), "amx": (a, m, x), "xma": (x, m, a)}[order]
    partial = graphs.insert(model.graph, last, "Add", [first, second])
    last.replace_input_with(0, partial)
    last.replace_input_with(1, third)


@pytest.mark.parametrize("order", ["xam", "amx", "xma"])
@pytest.mark.parametrize("style", ["parallel", "parallel-two-norms"])
def test_parallel_sums_come_in_any_association(order: str, style: str) -> None:
    model = models.build(style=style)
    for i in range(2):
        _sum(model, i, order)
    graphs.remove_dead(model)
    blocks = find_blocks(model).blocks
    assert [(b.input.name, b.output.name) for b in blocks] == [
        ("stream.0", "stream.1"), ("stream.1", "stream.2"),
    ]  # fmt: skip
    for block in blocks:
        assert block.hidden is None
        assert block.attention.o.output in block.attention_add.inputs
        assert block.mlp.down.output in block.mlp_add.inputs
        assert (block.attention_add is block.mlp_add) == (order == "amx")


@pytest.mark.parametrize("style", STYLES)
def test_a_norm_on_the_embedding_belongs_to_no_layer(style: str) -> None:
    model = models.build(style=style, **LAYER_NORM)
    stream = value(model, "stream.0")
    first = next(iter(stream.uses())).node
    scale = graphs.add_initializer(model.graph, "e.scale", np.ones(32, np.float32))
    embedded = graphs.insert(model.graph, first, "LayerNormalization", [stream, scale], name="e")
    users = [use for use in stream.uses() if use.node is not embedded.producer()]
    for use in users:
        use.node.replace_input_with(use.idx, embedded)
    structure = find_blocks(model)
    assert structure.misses == ()
    assert [b.input.name for b in structure.blocks] == ["e", "stream.1"]


@pytest.mark.parametrize("style", STYLES)
def test_a_stream_that_is_also_an_output_is_found(style: str) -> None:
    model = models.build(style=style, layers=3, hidden_output=1)
    assert [b.output.name for b in find_blocks(model).blocks] == [
        "stream.1",
        "stream.2",
        "stream.3",
    ]


def test_layer_scale_is_named() -> None:
    blocks = find_blocks(models.build(layer_scale=True)).blocks
    assert [b.extras for b in blocks] == [
        ("layer scale after attention", "layer scale after MLP")
    ] * 2


def _after(model: ir.Model, name: str, op_type: str, *constants: np.ndarray) -> None:
    """Put a node between the result of a linear layer of layer 0 and its users."""
    layer = next(n for n in model.graph if n.inputs[-1] and n.inputs[-1].name == name).outputs[0]
    users = list(layer.uses())
    values = [graphs.add_initializer(model.graph, "extra", c) for c in constants]
    new = graphs.insert(model.graph, users[0].node, op_type, [layer, *values])
    for use in users:
        use.node.replace_input_with(use.idx, new)


ONES = np.ones(32, np.float32)
EXTRAS = {
    "norm after attention": ("o", "RMSNormalization", ONES),
    "norm after MLP": ("down", "RMSNormalization", ONES),
    "residual scale after attention": ("o", "Mul", np.array(0.2, np.float32)),
    "residual scale after MLP": ("down", "Mul", np.array([0.2], np.float32)),
    "Tanh after MLP": ("down", "Tanh"),
    "shift after attention": ("o", "Add", np.ones((1, 1, 32), np.float32)),
    "shift after MLP": ("down", "Add", np.ones((1, 1, 32), np.float32)),
}


@pytest.mark.parametrize("reason", EXTRAS)
def test_extra_is_named(reason: str) -> None:
    model = models.build()
    name, op_type, *constants = EXTRAS[reason]
    _after(model, f"layers.0.{name}.weight", op_type, *constants)
    first, second = find_blocks(model).blocks
    assert first.extras == (reason,)
    assert second.extras == ()


def test_norms_of_queries_and_keys_are_part_of_the_attention() -> None:
    model = models.build(layers=1)
    for name, heads in (("q", 4), ("k", 2)):
        layer = node(model, value_of(model, f"layers.0.{name}.weight"))
        rotary = next(iter(layer.outputs[0].uses())).node
        apart = graphs.add_initializer(model.graph, "s", np.array([0, 0, heads, 8], np.int64))
        joined = graphs.add_initializer(model.graph, "s", np.array([0, 0, heads * 8], np.int64))
        scale = graphs.add_initializer(model.graph, f"{name}_norm", np.ones(8, np.float32))
        split = graphs.insert(model.graph, rotary, "Reshape", [layer.outputs[0], apart])
        normed = graphs.insert(model.graph, rotary, "RMSNormalization", [split, scale])
        rotary.replace_input_with(
            0, graphs.insert(model.graph, rotary, "Reshape", [normed, joined])
        )
    (block,) = find_blocks(model).blocks
    assert block.attention.q_norm.scale.name == "q_norm"
    assert block.attention.k_norm.scale.name == "k_norm"
    assert block.attention.q.weight.name == "layers.0.q.weight"


def value_of(model: ir.Model, weight: str) -> str:
    """Name of the result of the MatMul with this weight."""
    (use,) = model.graph.initializers[weight].uses()
    return str(use.node.outputs[0].name)


def _four_dimensional(model: ir.Model) -> None:
    attention = next(n for n in model.graph if n.op_type == "Attention")
    del attention.attributes["q_num_heads"]


def _cross_attention(model: ir.Model) -> None:
    key = model.graph.initializers["layers.0.k.weight"]
    next(iter(key.uses())).node.replace_input_with(0, value(model, "stream.0"))


def _two_readers(model: ir.Model) -> None:
    y = value(model, "attention.0")
    last = node(model, "stream.1")
    twice = graphs.insert(model.graph, last, "Add", [y, y])
    model.graph.outputs.append(twice)


def _routed(model: ir.Model) -> None:
    down = model.graph.initializers["layers.0.down.weight"]
    matmul = next(iter(down.uses())).node
    two = graphs.add_initializer(model.graph, "two", np.array([24], np.int64))
    best, _ = graphs.insert(model.graph, matmul, "TopK", [matmul.inputs[0], two], outputs=2)
    matmul.replace_input_with(0, best)


def _no_norm(model: ir.Model) -> None:
    graphs.replace_value(value(model, "layers.0.norm1.out"), value(model, "stream.0"))
    graphs.remove_dead(model)


def _added_twice(model: ir.Model) -> None:
    down = model.graph.initializers["layers.0.down.weight"]
    result = next(iter(down.uses())).node.outputs[0]
    user = next(iter(result.uses())).node
    new = graphs.insert(model.graph, user, "Add", [result, result])
    user.replace_input_with(1, new)


@pytest.mark.parametrize("style", ["pre-norm", "post-norm", "parallel"])
def test_a_mixture_of_experts_stands_in_the_place_of_the_mlp(style: str) -> None:
    found = find_blocks(models.build(experts=3, style=style))
    assert not found.misses
    assert len(found.blocks) == 2
    for block in found.blocks:
        assert isinstance(block.mlp, Experts)
        assert block.mlp.input is block.mlp_norm.output or style == "post-norm"
        assert {"TopK", "ScatterElements"} <= {node.op_type for node in block.mlp.nodes}
        assert block.extras == ("mixture of experts",)
        with pytest.raises(ValueError, match="mixture of experts"):
            _ = block.dense


MISSES: dict[str, Callable[[ir.Model], None]] = {
    "4-D inputs": _four_dimensional,
    "cross-attention": _cross_attention,
    "not read by exactly one linear projection": _two_readers,
    "TopK inside the MLP": _routed,
    "a norm before the MLP, but none before the attention": _no_norm,
    "does not end in a linear layer": _added_twice,
}


@pytest.mark.parametrize("reason", MISSES)
def test_says_why_a_layer_is_no_block(reason: str) -> None:
    model = models.build()
    MISSES[reason](model)
    structure = find_blocks(model)
    assert len(structure.blocks) == 1
    ((_, said),) = structure.misses
    assert reason in said


def test_a_graph_without_attention_has_neither_blocks_nor_misses() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 3]))
    y = ir.node("Softmax", [x], outputs=[ir.Value(name="y")])
    graph = ir.Graph([x], y.outputs, nodes=[y], opset_imports={"": 23}, name="g")
    structure = find_blocks(ir.Model(graph, ir_version=10))
    assert structure.blocks == structure.misses == ()
