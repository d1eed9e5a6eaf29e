"""What belongs to single heads stays with its layer: norms, scales, masks."""

from __future__ import annotations

import models
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fused import (
    assert_close,
    run,
)
from group_reference import Definition

from optimizer import fusion
from optimizer.blocks import find_blocks
from optimizer.graph import add_initializer, insert


class _WithHeadNorms(Definition):
    """Query and key pass a norm per head, or one over all heads, before the rotary embedding."""

    whole = False

    def heads(self, x: np.ndarray, count: int) -> np.ndarray:
        if x.shape[-1] == count * self.config.head_dim and self.kind is not None:
            scale = self.weights[f"layers.{self.layer}.{self.kind}_norm.weight"]
            size = scale.size
            parts = x.reshape(*x.shape[:2], -1, size)
            parts = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-6) * scale
            x = parts.reshape(x.shape)
        return super().heads(x, count)

    def linear(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        self.layer = layer
        self.kind = name if name in ("q", "k") else None
        return super().linear(layer, name, x)


def add_head_norms(model: ir.Model, config: models.Config, *, whole: bool) -> None:
    rng = np.random.default_rng(5)
    for block in find_blocks(model).blocks:
        for kind, linear, heads in (
            ("q", block.attention.q, config.heads),
            ("k", block.attention.k, config.kv_heads),
        ):
            size = config.head_dim * (heads if whole else 1)
            scale = add_initializer(
                model.graph,
                f"layers.{block.index}.{kind}_norm.weight",
                rng.uniform(0.5, 1.5, size).astype(np.float32),
            )
            anchor = next(iter(linear.output.uses())).node
            shapes = [
                add_initializer(model.graph, "shape", np.array(s, np.int64))
                for s in ([0, 0, -1, size], [0, 0, heads * config.head_dim])
            ]
            x = insert(model.graph, anchor, "Reshape", [linear.output, shapes[0]])
            x = insert(
                model.graph, anchor, "RMSNormalization", [x, scale], {"axis": -1, "epsilon": 1e-6}
            )
            x = insert(model.graph, anchor, "Reshape", [x, shapes[1]])
            anchor.replace_input_with(0, x) if anchor.op_type == "RotaryEmbedding" else None


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("bypass", ["symmetric", 0])
def test_query_and_key_norms_keep_the_scales_of_their_layer(
    bypass: fusion.Bypass, whole: bool
) -> None:
    config = models.Config(layers=3)
    model = models.build(config)
    add_head_norms(model, config, whole=whole)
    blocks = find_blocks(model).blocks
    assert all(block.attention.q_norm is not None for block in blocks)
    definition = _WithHeadNorms(config, model.clone(), [[0], [1, 2]], bypass)
    feed = models.feed(config)
    expected = definition.run(feed)
    assert fusion.refusal(blocks[1:]) is None
    fusion.fuse_group(model, blocks[1:], bypass)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_close(run(model, feed)["logits"], expected)


def test_different_attention_scales_are_folded_into_the_queries() -> None:
    config = models.Config(layers=2, bias=True)
    model = models.build(config)
    blocks = find_blocks(model).blocks
    blocks[1].attention.node.attributes["scale"] = ir.AttrFloat32("scale", 0.9)
    # The definition knows one scale only: the ratio on layer 1's queries means the same.
    twin = models.build(config)
    ratio = 0.9 / blocks[0].attention.scale
    for name in ("layers.1.q.weight", "layers.1.q.bias"):
        value = twin.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(ratio))  # type: ignore[union-attr]
    feed = models.feed(config)
    expected = Definition(config, twin, [[0, 1]], "symmetric").run(feed)
    blocks = find_blocks(model).blocks
    assert fusion.refusal(blocks) is None
    fusion.fuse_group(model, blocks, "symmetric")
    assert_close(run(model, feed)["logits"], expected)


def test_mask_per_head_is_repeated_for_every_member() -> None:
    config = models.Config(layers=2, mask=False, kv_heads=4)
    model = models.build(config)
    rng = np.random.default_rng(3)
    slopes = rng.uniform(0, 1, (1, config.heads, 1, 1)).astype(np.float32)
    distance = -np.abs(np.arange(5)[:, None] - np.arange(5)).astype(np.float32)
    bias = slopes * distance
    mask = add_initializer(model.graph, "alibi", bias)
    for block in find_blocks(model).blocks:
        block.attention.node.resize_inputs(4)
        block.attention.node.replace_input_with(3, mask)
    single = run(model, models.feed(config))["logits"]
    blocks = find_blocks(model).blocks
    assert fusion.refusal(blocks) is None
    fusion.fuse_group(model, blocks, "symmetric")
    node = next(n for n in model.graph if n.op_type == "Attention")
    assert node.inputs[3] is not None
    assert node.inputs[3].producer().op_type == "Concat"  # type: ignore[union-attr]
    # The second layer without weights behind it: the group is the first layer alone.
    zeroed = models.Config(layers=2, mask=False, kv_heads=4, zero_layers=(1,))
    for grouped in (False, True):
        model = models.build(zeroed)
        mask = add_initializer(model.graph, "alibi", bias)
        for block in find_blocks(model).blocks:
            block.attention.node.resize_inputs(4)
            block.attention.node.replace_input_with(3, mask)
        if grouped:
            fusion.fuse_group(model, find_blocks(model).blocks, "symmetric")
            assert_close(run(model, models.feed(config))["logits"], single)
        else:
            single = run(model, models.feed(config))["logits"]
