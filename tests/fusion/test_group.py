"""A group of layers computes what its definition says."""

from __future__ import annotations

from typing import Any

import models
import numpy as np
import onnx_ir as ir
import pytest
from fused import (
    BYPASSES,
    TOLERANCE,
    assert_follows_definition,
    fused,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer import fusion
from optimizer.blocks import find_blocks
from optimizer.graph import size_bytes


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
    assert [b.output.name for b in find_blocks(model).blocks] == [
        "stream.1",
        "stream.3",
        "stream.4",
    ]


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
