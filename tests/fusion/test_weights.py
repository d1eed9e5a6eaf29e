"""Folding and packing of weights."""

from __future__ import annotations

import models
import numpy as np
import onnx_ir as ir
import pytest
from fused import (
    assert_close,
    run,
)
from group_reference import Definition

from optimizer import fusion
from optimizer.blocks import find_blocks
from optimizer.fusion.weights import overflows
from optimizer.graph import remove_dead


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("bias", [False, True])
def test_folding_a_norm_does_not_change_the_model(norm: str, bias: bool) -> None:
    config = models.Config(norm=norm, bias=bias)
    model = models.build(config)
    feed = models.feed(config)
    expected = Definition(config, models.build(config), [[0], [1]], 0).run(feed)
    for block in find_blocks(model).blocks:
        a, m = block.attention, block.mlp
        assert fusion.fold_norm(model.graph, block.attention_norm, [a.q, a.k, a.v]) is None
        assert m.gate is not None
        assert fusion.fold_norm(model.graph, block.mlp_norm, [m.up, m.gate]) is None
    for block in find_blocks(model).blocks:
        for part in (block.attention_norm, block.mlp_norm):
            assert part.bias is None
            assert np.all(part.scale.const_value.numpy() == 1)  # type: ignore[union-attr]
    assert_close(run(model, feed)["logits"], expected)


def test_norm_with_another_reader_is_not_folded() -> None:
    config = models.Config(style="parallel")
    model = models.build(config)
    before = ir.to_proto(model).SerializeToString()
    block = find_blocks(model).blocks[0]
    a = block.attention
    reason = fusion.fold_norm(model.graph, block.attention_norm, [a.q, a.k, a.v])
    assert reason is not None
    assert reason.startswith("the norm is also read by node '")
    assert reason.endswith("', which cannot absorb its scale")
    assert ir.to_proto(model).SerializeToString() == before


def test_folding_that_overflows_float16_is_refused() -> None:
    weight = ir.Value(name="w", const_value=ir.tensor(np.full((2, 2), 6e4, np.float16)))
    scale = ir.Value(name="s", const_value=ir.tensor(np.array([1, 2], np.float16)))
    assert overflows(fusion.Affine(weight, scale=scale))
    assert not overflows(fusion.Affine(weight))


def test_float16_weights_are_folded_in_float64_and_rounded_once() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, 6)).astype(np.float16)
    scale = rng.uniform(0.5, 2, 8).astype(np.float16)
    values = [ir.Value(name=n, const_value=ir.tensor(a)) for n, a in (("w", weight), ("s", scale))]
    part = fusion.Affine(values[0], scale=values[1])
    folded, bias = fusion.beside([part], "x")
    assert bias is None
    expected = (weight.astype(np.float64) * scale.astype(np.float64)[:, None]).astype(np.float16)
    assert np.array_equal(folded.numpy(), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_packed_linears_compute_the_same(bias: bool) -> None:
    config = models.Config(bias=bias, style="parallel", gated=False, activation="gelu")
    model = models.build(config)
    feed = models.feed(config)
    expected = Definition(config, models.build(config), [[0], [1]], 0).run(feed)
    for block in find_blocks(model).blocks:
        a, m = block.attention, block.mlp
        fusion.pack_beside(model.graph, [a.q, a.k, a.v, m.up], a.q.matmul, "p")
        total = fusion.pack_stacked(model.graph, [a.o, m.down], block.mlp_add, "o")
        last = block.output.producer()
        assert last is not None
        block.attention_add.replace_input_with(1, total)
        last.outputs[0].replace_all_uses_with(block.attention_add.outputs[0])
        model.graph.sort()
    remove_dead(model)
    assert sum(n.op_type == "MatMul" for n in model.graph) == 2 * 2 + 1
    assert_close(run(model, feed)["logits"], expected)
