"""The KV cache of a group: names, shapes, metadata, prefill and decode."""

from __future__ import annotations

import json
from typing import Any

import models
import numpy as np
import onnx_ir as ir
import pytest
from fused import (
    assert_close,
    fused,
    grouped_feed,
    run,
)
from group_reference import Definition

from optimizer import fusion
from optimizer.blocks import find_blocks
from optimizer.runners.ort import OrtRunner


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
    gone = {
        f"{kind}.2.{part}" for kind in ("past_key_values", "present") for part in ("key", "value")
    }

    def names(values: Any) -> list[str]:
        return [v.name for v in values]

    assert names(after.graph.inputs) == [n for n in names(before.graph.inputs) if n not in gone]
    assert names(after.graph.outputs) == [n for n in names(before.graph.outputs) if n not in gone]
    shapes = {v.name: str(v.shape) for v in (*after.graph.inputs, *after.graph.outputs)}
    assert shapes["past_key_values.0.key"] == "[batch,2,past_sequence,8]"
    assert shapes["past_key_values.1.key"] == "[batch,4,past_sequence,8]"
    assert shapes["present.1.value"] == "[batch,4,total_sequence,8]"


def test_cache_metadata_says_which_heads_belong_to_which_layer() -> None:
    model = fused(models.Config(layers=4, kv_cache=True), [[0], [1, 2, 3]], "symmetric")
    groups = json.loads(model.metadata_props["optimize.kv_groups"])
    assert groups["past_key_values.1.key"] == {
        "layers": [1, 2, 3],
        "heads": [[0, 2], [2, 4], [4, 6]],
        "past": [f"past_key_values.{i}.key" for i in (1, 2, 3)],
        "present": [f"present.{i}.key" for i in (1, 2, 3)],
    }
    assert list(groups) == ["past_key_values.1.key", "past_key_values.1.value"]


def test_cache_metadata_of_a_group_of_groups_names_all_layers() -> None:
    config = models.Config(layers=4, kv_cache=True)
    model = fused(config, [[0, 1], [2, 3]], "symmetric")
    blocks = find_blocks(model).blocks
    for block in blocks:  # as if lowering and raising had lost the mark
        block.attention.node.metadata_props.clear()
    fusion.fuse_group(model, blocks, "symmetric", layers=[1, 3])
    groups = json.loads(model.metadata_props["optimize.kv_groups"])
    assert list(groups) == ["past_key_values.0.key", "past_key_values.0.value"]
    assert groups["past_key_values.0.key"]["layers"] == [0, 1, 2, 3]
    assert groups["past_key_values.0.key"]["heads"] == [[0, 2], [2, 4], [4, 6], [6, 8]]
    assert groups["past_key_values.0.value"]["present"] == [f"present.{i}.value" for i in range(4)]


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
