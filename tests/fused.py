"""Fused models for tests, and how close they have to be to their definition."""

from __future__ import annotations

import itertools
from typing import Any

import models
import numpy as np
import onnx
import onnx_ir as ir
from group_reference import Definition

from optimizer import fusion
from optimizer.blocks import find_blocks
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
