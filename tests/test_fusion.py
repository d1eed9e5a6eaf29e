"""The algebra of concurrent layers, against the definition in float64."""

from __future__ import annotations

import itertools
from typing import Any

import models
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from group_reference import Definition
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer import fusion
from optimizer.blocks import find_blocks
from optimizer.graph import remove_dead, size_bytes
from optimizer.runners.ort import OrtRunner

# The fused graph has to be within this fraction of the largest output: the figure required of the
# method. Everything is float32; the reference is float64.
TOLERANCE = 1e-5

BYPASSES: tuple[fusion.Bypass, ...] = ("symmetric", 0, 1, 3)


def fused(config: models.Config, groups: list[list[int]], bypass: fusion.Bypass) -> ir.Model:
    model = models.build(config)
    blocks = find_blocks(model).blocks
    assert len(blocks) == config.layers
    for group in groups:
        members = [blocks[i] for i in group]
        if len(members) > 1:
            assert fusion.refusal(members) is None
            fusion.fuse_group(model, members, bypass)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    runner = OrtRunner(model)
    return runner.run({k: v for k, v in feed.items() if k in runner.input_names})


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


def assert_follows_definition(
    config: models.Config, groups: list[list[int]], bypass: fusion.Bypass, **shape: Any
) -> ir.Model:
    definition = Definition(config, models.build(config), groups, bypass)
    feed = models.feed(config, **shape)
    expected = definition.run(feed)
    model = fused(config, groups, bypass)
    assert_close(run(model, grouped_feed(feed, groups))["logits"], expected)
    return model


def grouped_feed(feed: dict[str, np.ndarray], groups: list[list[int]]) -> dict[str, np.ndarray]:
    """Caches of members concatenated along the head axis, under the first member's names."""
    result = {k: v for k, v in feed.items() if not k.startswith("past_key_values")}
    for group, kind in itertools.product(groups, ("key", "value")):
        names = [f"past_key_values.{i}.{kind}" for i in group]
        if names[0] in feed:
            result[names[0]] = np.concatenate([feed[n] for n in names], axis=1)
    return result


@pytest.mark.parametrize("bypass", BYPASSES)
@pytest.mark.parametrize("style", ["pre-norm", "parallel", "parallel-two-norms"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("bias", [False, True])
def test_group_follows_its_definition(
    bypass: fusion.Bypass, style: str, norm: str, bias: bool
) -> None:
    config = models.Config(layers=4, style=style, norm=norm, bias=bias)
    assert_follows_definition(config, [[0], [1, 2, 3]], bypass, padded=True)


@pytest.mark.parametrize("bypass", BYPASSES)
@pytest.mark.parametrize(
    "changes",
    [
        {"gated": False, "activation": "gelu"},
        {"activation": "quick-gelu"},
        {"gated": False, "activation": "relu", "rotary": False},
        {"kv_heads": 4},
        {"kv_heads": 1},
        {"mask": False},
        {"layer_scale": True},
        {"layer_scale": True, "bias": True, "style": "parallel"},
        {"ffn": (24, 8, 17, 5)},
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()),
)
def test_group_follows_its_definition_for(changes: dict[str, Any], bypass: fusion.Bypass) -> None:
    assert_follows_definition(models.Config(layers=4, **changes), [[0, 1], [2, 3]], bypass)


@pytest.mark.parametrize("bypass", ["symmetric", 0, 1])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[0], [1, 2], [3]], [[0, 1, 2, 3]]])
def test_decode_after_prefill_equals_the_definition(
    bypass: fusion.Bypass, kv_heads: int, groups: list[list[int]]
) -> None:
    config = models.Config(layers=4, kv_heads=kv_heads, kv_cache=True)
    model = fused(config, groups, bypass)
    whole = models.feed(config, sequence=7, past=0)
    definition = Definition(config, models.build(config), groups, bypass)
    expected = definition.run(whole)
    runner = OrtRunner(model)
    caches = {n: whole[n] for n in runner.input_names if n.startswith("past")}
    caches = {
        n: np.zeros((2, shape[1], 0, config.head_dim), np.float32)
        for n in caches
        for shape in [next(tuple(v.shape) for v in model.graph.inputs if v.name == n)]
    }
    done = 0
    for count in (4, 1, 2):  # prefill, one token, two tokens
        step = {
            "input_ids": whole["input_ids"][:, done : done + count],
            "attention_mask": whole["attention_mask"][:, : done + count],
            "position_ids": whole["position_ids"][:, done : done + count],
        }
        result = runner.run({**step, **caches})
        assert_close(result["logits"], expected[:, done : done + count])
        done += count
        caches = {n: result[n.replace("past_key_values", "present")] for n in caches}
    for group, (key, value) in zip(groups, _pairs(caches), strict=True):
        assert_close(key, np.concatenate([definition.present[i][0] for i in group], axis=1))
        assert_close(value, np.concatenate([definition.present[i][1] for i in group], axis=1))


def _pairs(caches: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    values = list(caches.values())
    return list(zip(values[::2], values[1::2], strict=True))


def test_cache_keeps_every_other_name_their_order_and_dynamic_dimensions() -> None:
    config = models.Config(layers=4, kv_cache=True)
    before = models.build(config)
    after = fused(config, [[0], [1, 2], [3]], "symmetric")
    gone = {f"{kind}.2.{part}" for kind in ("past_key_values", "present") for part in ("key", "value")}

    def names(values: Any) -> list[str]:
        return [v.name for v in values]

    assert names(after.graph.inputs) == [n for n in names(before.graph.inputs) if n not in gone]
    assert names(after.graph.outputs) == [n for n in names(before.graph.outputs) if n not in gone]
    shapes = {v.name: str(v.shape) for v in (*after.graph.inputs, *after.graph.outputs)}
    assert shapes["past_key_values.0.key"] == "[batch,2,past_sequence,8]"
    assert shapes["past_key_values.1.key"] == "[batch,4,past_sequence,8]"
    assert shapes["present.1.value"] == "[batch,4,total_sequence,8]"


def test_cache_metadata_says_which_heads_belong_to_which_layer() -> None:
    import json

    model = fused(models.Config(layers=4, kv_cache=True), [[0], [1, 2, 3]], "symmetric")
    groups = json.loads(model.metadata_props["optimize.kv_groups"])
    assert groups["past_key_values.1.key"] == {
        "layers": [1, 2, 3],
        "heads": [[0, 2], [2, 4], [4, 6]],
        "past": [f"past_key_values.{i}.key" for i in (1, 2, 3)],
        "present": [f"present.{i}.key" for i in (1, 2, 3)],
    }
    assert list(groups) == ["past_key_values.1.key", "past_key_values.1.value"]


def test_shape_of_a_cache_still_reports_the_heads_of_one_layer() -> None:
    config = models.Config(layers=2, kv_cache=True)
    model = models.build(config)
    past = next(v for v in model.graph.inputs if v.name == "past_key_values.1.value")
    node = ir.node("Shape", [past])
    node.outputs[0].name = "cache_shape"
    node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    node.outputs[0].shape = ir.Shape([4])
    first = next(iter(model.graph))
    model.graph.insert_before(first, node)
    model.graph.outputs.append(node.outputs[0])
    fusion.fuse_group(model, find_blocks(model).blocks, "symmetric")
    feed = grouped_feed(models.feed(config, batch=3, past=6), [[0, 1]])
    assert run(model, feed)["cache_shape"].tolist() == [3, 2, 6, 8]


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 3, 2, 1)])
def test_order_of_members_does_not_matter_to_the_symmetric_form(order: tuple[int, ...]) -> None:
    groups = [[0], [1, 2, 3]]
    plain, permuted = (models.Config(layers=4, order=o) for o in ((), order))
    feed = models.feed(plain)
    first, second = (run(fused(c, groups, "symmetric"), feed)["logits"] for c in (plain, permuted))
    # Twice the criterion: both are float32 results that differ in the order of their sums.
    assert np.abs(first - second).max() <= 2 * TOLERANCE * np.abs(first).max()


def test_order_of_members_matters_to_the_causal_form() -> None:
    groups = [[0], [1, 2, 3]]
    plain, permuted = (models.Config(layers=4, order=o) for o in ((), (0, 2, 1, 3)))
    feed = models.feed(plain)
    first, second = (run(fused(c, groups, 9), feed)["logits"] for c in (plain, permuted))
    assert np.abs(first - second).max() > 0.01 * np.abs(first).max()


# With distance 1 a member that adds nothing still takes a place among "the d members before".
@pytest.mark.parametrize("bypass", ["symmetric", 0, 3])
def test_member_without_output_weights_can_be_left_out(bypass: fusion.Bypass) -> None:
    config = models.Config(layers=4, zero_layers=(2,))
    feed = models.feed(config)
    whole = run(fused(config, [[0], [1, 2, 3]], bypass), feed)["logits"]
    smaller = models.Config(layers=3, order=(0, 1, 3))
    left_out = run(fused(smaller, [[0], [1, 2]], bypass), feed)["logits"]
    assert np.abs(whole - left_out).max() <= 2 * TOLERANCE * np.abs(whole).max()


@pytest.mark.parametrize("bypass", BYPASSES)
def test_parameters_are_conserved_up_to_the_norms(bypass: fusion.Bypass) -> None:
    config = models.Config(layers=4)
    before, after = models.build(config), fused(config, [[0, 1, 2, 3]], bypass)
    norms = 4 * 2 * config.hidden

    def matrices(model: ir.Model) -> int:
        values = model.graph.initializers.values()
        return sum(v.const_value.size for v in values if len(v.shape) == 2)

    assert matrices(after) == matrices(before)
    assert abs(size_bytes(after) - size_bytes(before)) <= 4 * norms + 200  # shape constants


def test_weights_are_not_computed_before_they_are_read() -> None:
    model = fused(models.Config(layers=2), [[0, 1]], "symmetric")
    wide = [v.const_value for v in model.graph.initializers.values() if "layers.0-1" in v.name]
    assert wide
    assert all(isinstance(t, ir.LazyTensor) for t in wide)


def test_symmetric_group_is_one_wide_block_again() -> None:
    model = fused(models.Config(layers=4), [[0], [1, 2], [3]], "symmetric")
    blocks = find_blocks(model).blocks
    assert [(b.attention.heads, b.attention.kv_heads) for b in blocks] == [(4, 2), (8, 4), (4, 2)]
    assert fusion.refusal(blocks[:2]) == "layer 1 is a group already"


def test_streams_keep_their_names() -> None:
    model = fused(models.Config(layers=4), [[0], [1, 2], [3]], "symmetric")
    assert [b.output.name for b in find_blocks(model).blocks] == ["stream.1", "stream.3", "stream.4"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_follows_the_definition(data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3))
    layers = data.draw(st.integers(2, 4))
    config = models.Config(
        layers=layers,
        hidden=data.draw(st.sampled_from([8, 12, 20])),
        heads=kv_heads * data.draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=2 * data.draw(st.integers(1, 5)),
        ffn=tuple(data.draw(st.integers(1, 40)) for _ in range(layers)),
        norm=data.draw(st.sampled_from(["rms", "layer"])),
        style=data.draw(st.sampled_from(["pre-norm", "parallel", "parallel-two-norms"])),
        bias=data.draw(st.booleans()),
        gated=data.draw(st.booleans()),
        rotary=data.draw(st.booleans()),
        mask=True,
        kv_cache=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 9)),
    )
    start = data.draw(st.integers(0, layers - 2))
    groups = [[i] for i in range(start)] + [list(range(start, layers))]
    assert_follows_definition(
        config,
        groups,
        data.draw(st.sampled_from(BYPASSES)),
        batch=data.draw(st.integers(1, 3)),
        sequence=data.draw(st.integers(1, 6)),
        past=data.draw(st.integers(0, 5)),
    )


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
    from optimizer.fusion.weights import overflows

    assert overflows(fusion.Affine(weight, scale=scale))
    assert not overflows(fusion.Affine(weight))


def test_float16_weights_are_folded_in_float64_and_rounded_once() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, 6)).astype(np.float16)
    scale = rng.uniform(0.5, 2, 8).astype(np.float16)
    part = fusion.Affine(*(ir.Value(name="w", const_value=ir.tensor(weight)), None), ir.Value(name="s", const_value=ir.tensor(scale)))  # fmt: skip
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
