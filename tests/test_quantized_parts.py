"""The block search looks through int8 linear layers, and only through those."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx_ir as ir
import pytest
from quantized import quantize

from optimizer import graph as graphs
from optimizer.block_parts import linear_reading, width
from optimizer.blocks import find_blocks
from optimizer.calibration import Calibration, input_specs
from optimizer.legalize import legalize
from optimizer.model_io import save_model
from optimizer.nodes import other
from optimizer.pass_base import Context
from optimizer.quantized_parts import fed_by, quantized_at, quantized_linear, reads
from optimizer.samples import load_samples
from optimizer.structure import Block, Linear
from passes.canonicalize import Canonicalize
from passes.cqil import Cqil
from passes.fuse_concurrent import FuseConcurrent
from passes.outliertune import Options, OutlierTune

SITES = ("after_norm", "after_attention", "in_mlp", "elsewhere")
STATIC, PER_TOKEN = dict.fromkeys(SITES, "static"), dict.fromkeys(SITES, "per-token")
GELU = {"norm": "layer", "bias": True, "gated": False, "activation": "gelu"}
MODELS: dict[str, dict[str, Any]] = {
    "gated, grouped queries, cache": {"kv_cache": True},
    "plain": {**GELU, "activation": "relu", "rotary": False},
    "post-norm": {**GELU, "style": "post-norm"},
    "post-norm, rms": {"style": "post-norm", "bias": True},
    "parallel": {**GELU, "style": "parallel"},
    "parallel, two norms": {**GELU, "style": "parallel-two-norms"},
    "dynamic tanh": {"norm": "tanh"},
    "dynamic tanh, post-norm": {"norm": "tanh", "style": "post-norm"},
    "layer scale": {"layer_scale": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "static": {**STATIC, "shift": True},
    "static, scaled": {**STATIC, "alpha": 0.5, "shift": False},
    "4 bits": {**STATIC, "bits": 4},
    "per token": PER_TOKEN,
    "per token, shifted": {**PER_TOKEN, "shift": True, "alpha": 0.5},
    "per token, symmetric": {**PER_TOKEN, "asymmetric": False, "shift": False},
    "one layer in float": {"exclude": "*.1.k.weight,*.0.up.weight"},
}


def linears(block: Block) -> list[Linear]:
    a, m = block.attention, block.mlp
    return [layer for layer in (a.q, a.k, a.v, a.o, m.gate, m.up, m.down) if layer is not None]


def described(model: ir.Model) -> list[Any]:
    return [
        (
            *(block.style, block.input.name, block.output.name, block.hidden_size),
            *(block.attention_norm.kind, block.mlp_norm.kind, block.mlp.activation),
            *(block.attention.heads, block.attention.kv_heads, block.attention.head_dim),
            [width(layer) for layer in linears(block)],
            [extra for extra in block.extras if extra != "quantized weights"],
        )
        for block in find_blocks(model).blocks
    ]


def layers(model: ir.Model) -> list[Any]:
    return [
        [(layer.input.name, layer.output.name) for layer in linears(block)]
        for block in find_blocks(model).blocks
    ]


def tuned(changes: dict[str, Any], options: dict[str, Any]) -> tuple[ir.Model, ir.Model]:
    """A canonical float model, and what outliertune makes of it."""
    config = models.Config(**changes)
    before = models.build(config)
    Canonicalize().call(before, Context())
    after = before.clone()
    data = load_samples(models.feed(config, batch=4, sequence=12), input_specs(after))
    report = OutlierTune(Options(**options)).call(after, Context(calibration=Calibration(data)))
    assert report.modified
    return before, after


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_outliertune_leaves_the_blocks_as_they_were(name: str, options: str) -> None:
    before, after = tuned(MODELS[name], OPTIONS[options])
    assert find_blocks(after).misses == ()
    assert described(after) == described(before)
    assert layers(after) == layers(before)
    assert all("quantized weights" in block.extras for block in find_blocks(after).blocks)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_lowered_and_raised_again_the_blocks_are_the_same(name: str, options: str) -> None:
    before, after = tuned(MODELS[name], OPTIONS[options])
    legalize(after, "ort-cpu")
    Canonicalize().call(after, Context())
    assert find_blocks(after).misses == ()
    assert described(after) == described(before)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_view_of_a_layer_is_the_same_from_both_ends(options: str) -> None:
    _, after = tuned({"bias": True}, OPTIONS[options])
    for block in find_blocks(after).blocks:
        for layer in linears(block):
            if layer.matmul.inputs[0] is layer.input:
                continue  # left in float
            assert quantized_at(layer.matmul) == layer == quantized_linear(layer.output)
            assert layer in fed_by(layer.input)
            assert layer in linear_reading(layer.matmul.inputs[0])
            assert {use.node for use in layer.input.uses()} & reads(layer)
            assert layer.bias is not None
            assert other(layer.add, layer.bias).uses()


@pytest.mark.parametrize("options", ["as it comes", "per token"])
def test_passes_that_rewrite_weights_refuse_quantized_layers(options: str) -> None:
    _, model = tuned({"style": "parallel"}, OPTIONS[options])
    again = OutlierTune().call(model, Context())
    assert not again.modified
    assert "already quantized" in {skip.reason for skip in again.skipped}
    report = Cqil(Cqil.Options(first=0, last=1)).call(model, Context())
    assert not report.modified
    assert "quantized weights" in report.skipped[0].reason
    report = FuseConcurrent(FuseConcurrent.Options(pack="always", stack="always")).call(
        model, Context()
    )
    assert not report.modified
    reasons = [skip.reason for skip in report.skipped]
    assert reasons.count("quantized weights") == 2  # the readers of each block's norm


# --- what looks alike and is none -----------------------------------------------------------------


def _per_token() -> tuple[ir.Model, ir.Node, ir.Node]:
    """A model with the attention's results divided row by row; MatMul and Mul of layer 0."""
    model = models.build()
    quantize(model, per_token=(".o.",))
    layer = find_blocks(model).blocks[0].attention.o
    assert layer.input.name == "attention.0"
    back = graphs.only_user(layer.matmul.outputs[0])
    assert back is not None
    return model, layer.matmul, back


def _not_multiplied_back(matmul: ir.Node, back: ir.Node) -> None:
    graphs.replace_value(back.outputs[0], matmul.outputs[0])


def _multiplied_by_something_else(matmul: ir.Node, back: ir.Node) -> None:
    gain = other(back, matmul.outputs[0])
    twice = graphs.insert(back.graph, back, "Add", [gain, gain])
    back.replace_input_with(list(back.inputs).index(gain), twice)


def _divided_channel_by_channel(matmul: ir.Node, back: ir.Node) -> None:
    gain = other(back, matmul.outputs[0])
    wide = graphs.add_initializer(back.graph, "wide", np.full(32, 2, np.float32))
    first = next(use.node for use in gain.uses() if use.node.op_type == "Div")
    wider = graphs.insert(back.graph, first, "Mul", [gain, wide])
    for use in list(gain.uses()):
        if use.node is not wider.producer():
            use.node.replace_input_with(use.idx, wider)


def _reduced_over_tokens(matmul: ir.Node, back: ir.Node) -> None:
    axes = next(v for v in back.graph.initializers.values() if v.name.startswith("last"))
    axes.const_value = ir.tensor(np.array([1], np.int64))
    for node in back.graph:
        if node.op_type == "ReduceMax":
            node.replace_input_with(1, axes)


def _read_in_between(matmul: ir.Node, back: ir.Node) -> None:
    back.graph.outputs.append(matmul.outputs[0])


SPOILERS: list[Callable[[ir.Node, ir.Node], None]] = [
    _not_multiplied_back, _multiplied_by_something_else, _divided_channel_by_channel,
    _reduced_over_tokens, _read_in_between,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILERS)
def test_scaled_rows_belong_to_a_layer_only_where_it_is_linear(
    spoil: Callable[[ir.Node, ir.Node], None],
) -> None:
    model, matmul, back = _per_token()
    spoil(matmul, back)
    found = quantized_at(matmul)
    assert found is None or found.input.producer().op_type == "Div"
    structure = find_blocks(model)
    assert structure.misses[0][1] == "the output is not read by exactly one linear projection"


def _before(model: ir.Model, op_type: str, *constants: Any) -> ir.Value:
    """Put a node before the rounding of layer 0's attention results."""
    quantized = find_blocks(model).blocks[0].attention.o.input
    (quantizer,) = (use.node for use in quantized.uses())
    values = [graphs.add_initializer(model.graph, "c", np.float32(c)) for c in constants]
    made = graphs.insert(model.graph, quantizer, op_type, [quantized, *values])
    quantizer.replace_input_with(0, made)
    return made


def test_only_a_clip_of_the_range_of_codes_belongs_to_a_layer() -> None:
    for low, high, inside in ((-3, 3, True), (0, 6, False)):
        model = models.build()
        quantize(model)
        clipped = _before(model, "Clip", low, high)
        matmul = quantized_at_weight(model, "layers.0.o.weight")
        assert (matmul.input is clipped) != inside
        assert len(find_blocks(model).blocks) == 1 + inside


def quantized_at_weight(model: ir.Model, name: str) -> Linear:
    codes = model.graph.initializers[f"{name}_int8"]
    wide = next(iter(codes.uses())).node.outputs[0]
    found = quantized_at(next(iter(wide.uses())).node)
    assert found is not None
    return found


def test_a_function_before_the_rounding_is_not_skipped() -> None:
    model = models.build()
    quantize(model)
    tanh = _before(model, "Tanh")
    assert quantized_at_weight(model, "layers.0.o.weight").input is tanh
    assert len(find_blocks(model).blocks) == 1


def test_a_second_reader_of_the_attention_is_seen_behind_the_rounding() -> None:
    model = models.build()
    quantize(model)
    layer = find_blocks(model).blocks[0].attention.o
    model.graph.outputs.append(graphs.insert(model.graph, layer.matmul, "Neg", [layer.input]))
    assert [b.index for b in find_blocks(model).blocks] == [0]
    assert len(find_blocks(model).misses) == 1


def test_a_float_layer_is_no_quantized_one() -> None:
    model = models.build(bias=True)
    for block in find_blocks(model).blocks:
        for layer in linears(block):
            assert quantized_at(layer.matmul) is None
            assert quantized_linear(layer.output) is None
            assert fed_by(layer.input) == []
            assert reads(layer) == {layer.matmul}


# --- what inspect says ----------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_inspect_shows_groups_of_layers_and_quantized_blocks(
    tmp_path: Path, command: Callable[..., Any], cached: bool
) -> None:
    config = models.Config(layers=5, kv_cache=cached)
    model = models.build(config)
    Cqil(Cqil.Options(first=1, last=4)).call(model, Context())
    feed = {k: v for k, v in models.feed(config, sequence=12).items() if "past" not in k}
    data = Calibration(load_samples(feed, input_specs(model)))
    OutlierTune().call(model, Context(calibration=data))
    legalize(model, "ort-cpu")
    save_model(model, tmp_path / "m.onnx")
    content = json.loads(command("inspect", tmp_path / "m.onnx", "--json").out)
    assert [block["layers"] for block in content["blocks"]] == [None, [1, 2], [3, 4]]
    single, double = (content["blocks"][i]["parameters"] for i in (0, 1))
    assert 2 * single <= double <= 2 * single + 256  # and biases, where a shift left one
    text = command("inspect", tmp_path / "m.onnx").out
    assert ("KV caches shared by the layers of a group: 1+2, 3+4" in text) == cached
    assert re.search(r"blocks 1-2 \([0-9.]+ k parameters, [0-9]+ kB\): ", text)
    assert "quantized weights, 2 layers side by side: 1+2, 3+4" in text


def test_inspect_names_the_cache_that_is_filled_in_place(
    tmp_path: Path, command: Callable[..., Any]
) -> None:
    model = models.build(kv_cache=True)
    legalize(model, "ort-cpu", kv_cache="in-place")
    save_model(model, tmp_path / "m.onnx")
    text = command("inspect", tmp_path / "m.onnx").out
    assert "KV cache filled in-place, 4 buffers [batch, kv_heads, max_length, head_dim]" in text
    assert "KV cache, causal, each row of the batch keeps" in text
