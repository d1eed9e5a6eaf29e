"""Models that come in half precision: everything works on them as on float32 ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import families
import half_types
import ml_dtypes
import models
import numpy as np
import onnx_ir as ir
import pytest
from exporters import Cell, export
from half_types import BFLOAT16, FLOAT16
from rule_case import graph

from optimizer import footprint, memory, verify
from optimizer.api import optimize
from optimizer.benchmark import Operand
from optimizer.blocks import find_blocks
from optimizer.checks import check_pass
from optimizer.errors import UnsupportedError, VerificationError
from optimizer.inspection import describe_model
from optimizer.legalize import legalize
from optimizer.model_io import load_model, save_model
from optimizer.pass_base import Context, Exactness
from optimizer.raising import value_info
from optimizer.runners.decode import DecodeSession
from optimizer.runners.ort import OrtRunner
from passes import get_pass
from passes.canonicalize import Canonicalize

BOTH = pytest.mark.parametrize("dtype", half_types.HALVES, ids=str)
#: Each exporter's spelling of norms, rotary embedding, attention and activations once.
CELLS = [
    Cell(families.FAMILIES[name], "dynamo-18", kv_cache)
    for name, kv_cache in (("llama", False), ("phi", True), ("bert", False))
]
GPU = "tensorrt-11"


def canonical(model: ir.Model, target: str = GPU) -> ir.Model:
    before = model.clone()
    graph_pass = Canonicalize()
    check_pass(before, model, graph_pass, graph_pass.call(model, Context(target=target)))
    return model


@BOTH
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_exports_are_raised_to_the_same_operators_as_in_float32(cell: Cell, dtype):
    path = export(cell)
    wanted = canonical(load_model(path))
    original = half_types.convert(load_model(path), dtype)
    model = canonical(original.clone())
    assert Counter(n.op_type for n in model.graph) == Counter(n.op_type for n in wanted.graph)
    assert len(find_blocks(model).blocks) == len(find_blocks(wanted).blocks) == 2
    found = verify.verify(original, model, Exactness.REASSOCIATED)
    assert found.status == "within bound"
    # In float64 both compute the same; what was folded was rounded once more.
    assert found.metrics["error"] < 2 * half_types.roundoff(dtype)


@BOTH
@pytest.mark.parametrize("name", ["cqil", "fuse-concurrent"])
def test_passes_rewrite_half_precision_models(name, dtype):
    model = half_types.convert(models.build(style="parallel", bias=True, norm="layer"), dtype)
    before = model.clone()
    pass_class = get_pass(name)
    options = {"first": 0} if name == "cqil" else {"pack": "always", "stack": "always"}
    graph_pass = pass_class(pass_class.Options(**options))
    report = graph_pass.call(model, Context(target=GPU))
    assert report.applied
    check_pass(before, model, graph_pass, report)
    if name != "cqil":
        assert verify.verify(before, model, Exactness.REASSOCIATED).status == "within bound"


@pytest.mark.parametrize(("target", "dtype"), [
    ("tensorrt-10", FLOAT16), ("jetson", FLOAT16), ("tensorrt-11", BFLOAT16),
    ("ort-cpu", FLOAT16), ("ort-cpu", BFLOAT16), ("ort-cuda", BFLOAT16),
])  # fmt: skip
def test_lowering_half_precision_is_exact(target, dtype):
    model = half_types.convert(models.build(layers=1), dtype)
    lowered = model.clone()
    legalize(lowered, target)
    found = verify.verify(model, lowered, Exactness.REASSOCIATED)
    assert found.metrics["error"] < half_types.roundoff(dtype)
    value_info.fill(lowered)
    inner = {v.dtype for n in lowered.graph for v in n.outputs if n.op_type == "MatMul"}
    assert inner == {half_types.FLOAT if target == "ort-cpu" else dtype}


@BOTH
def test_attention_spelled_out_keeps_rows_without_keys_finite(dtype):
    """Scores below zero added to the lowest number are minus infinity; a whole row of that has no
    maximum."""
    name = str(dtype).lower()
    model = graph(
        "n = Neg(x)  y = Attention<q_num_heads = 1, kv_num_heads = 1>(x, n, x, seen)",
        inputs=f"{name}[1,3,4] x, bool[3,3] seen", output=f"{name}[1,3,4] y",
    )  # fmt: skip
    # Twice the distance of the lowest number to its neighbour, and more: what rounds away from it.
    size = np.sqrt(float(ml_dtypes.finfo(dtype.numpy()).max) * 4 * half_types.roundoff(dtype))
    feed = {"x": np.full((1, 3, 4), size / 2, np.float32), "seen": np.eye(3, dtype=bool)}
    feed["seen"][1] = False
    legalize(model, "tensorrt-10")
    assert not any(node.op_type == "Attention" for node in model.graph)
    found = OrtRunner(model).run(half_types.narrowed(feed, dtype))["y"]
    assert np.isfinite(found.astype(np.float32)).all()


@BOTH
def test_targets_that_only_store_half_precision_get_float32_before_all_passes(tmp_path, dtype):
    config = models.Config()
    model = half_types.convert(models.build(config), dtype)
    feed = models.feed(config, 4, 12)
    del feed["attention_mask"], feed["position_ids"]
    data = tmp_path / "data.npz"
    np.savez(data, **feed)
    result = optimize(model, ["outliertune"], calibration=data, output=tmp_path / "int8.onnx")
    row = next(row for row in result.report.rows if row.name == "outliertune")
    assert row.applied == 4 * config.layers + 1  # sites of each layer, and the head
    assert not row.skipped
    assert any(node.op_type == "MatMulIntegerToFloat" for node in result.model.graph)


@BOTH
def test_a_fault_of_six_percent_in_a_half_precision_model_is_found(dtype):
    """Less than 16 roundings of a bfloat16 output: the model's own error is the measure."""
    before = half_types.convert(models.build(layers=1), dtype)
    after = before.clone()
    weight = after.graph.initializers["lm_head.weight"]
    array = weight.const_value.numpy().astype(np.float32) * 1.06
    weight.const_value = ir.tensor(array.astype(dtype.numpy()), name=weight.name)
    with pytest.raises(VerificationError, match="is off by"):
        verify.verify(before, after, Exactness.REASSOCIATED)


@BOTH
def test_parts_of_a_half_precision_model_are_verified_block_by_block(dtype, monkeypatch):
    before = half_types.convert(models.build(layers=3), dtype)
    monkeypatch.setattr(memory, "resident", lambda: 0)
    limit = int(2.5 * footprint.weight_bytes(before)) - 1
    found = verify.verify(before, before.clone(), Exactness.REASSOCIATED, max_memory=limit)
    assert "block by block (4 parts)" in found.method


@BOTH
def test_a_file_in_half_precision_comes_back_as_it_was(tmp_path: Path, dtype):
    """Stored for a target, raised, and stored again: the same weights, bit by bit."""
    model = half_types.convert(models.build(layers=1), dtype)
    save_model(model, tmp_path / "half.onnx")
    once = optimize(tmp_path / "half.onnx", [], output=tmp_path / "once.onnx")
    twice = optimize(tmp_path / "once.onnx", [], output=tmp_path / "twice.onnx")

    def weights(result: ir.Model) -> dict[str, bytes]:
        held = result.graph.initializers.items()
        return {k: v.const_value.tobytes() for k, v in held if v.dtype == dtype}

    assert len(weights(once.model)) > 8
    assert weights(twice.model) == weights(once.model)
    converted = optimize(
        tmp_path / "once.onnx",
        ["fp16" if dtype == FLOAT16 else "bf16"],
        target=GPU, output=tmp_path / "again.onnx",
    )  # fmt: skip
    original = {k: v.const_value.tobytes() for k, v in model.graph.initializers.items()}
    for name, data in weights(converted.model).items():
        assert data == original[name], name


@BOTH
def test_a_description_counts_the_bytes_of_the_file(tmp_path: Path, dtype):
    config = models.Config(layers=1)
    save_model(half_types.convert(models.build(config), dtype), tmp_path / "half.onnx")
    (block,) = describe_model(tmp_path / "half.onnx")["blocks"]
    assert block["bytes"] == 2 * block["parameters"]


@BOTH
def test_models_with_a_half_precision_interface_are_timed(dtype):
    config = models.Config(layers=1, kv_cache=True)
    model = half_types.convert(models.build(config), dtype)
    legalize(model, "ort-cpu")
    operand = Operand(model)
    assert operand.feed["past_key_values.0.key"].dtype == dtype.numpy()
    operand.run()


def test_generation_with_a_float16_cache_follows_the_float32_one():
    config = models.Config(layers=1, kv_cache=True)
    model = half_types.convert(models.build(config), FLOAT16)
    ids = np.array([[3, 5, 7, 9]])
    narrow, wide = DecodeSession(model), DecodeSession(models.build(config))
    expected, found = wide.prefill(ids), narrow.prefill(ids).astype(np.float32)
    expected, found = wide.step(ids[:, 0]), narrow.step(ids[:, 0]).astype(np.float32)
    assert narrow.cache()["present.0.key"].dtype == np.float16
    # Some twenty roundings of independent sign.
    assert np.abs(found - expected).max() < 10 * 2.0**-11 * np.abs(expected).max()


def test_generation_with_a_bfloat16_cache_is_refused_with_what_to_do():
    config = models.Config(layers=1, kv_cache=True)
    model = half_types.convert(models.build(config), BFLOAT16)
    legalize(model, "ort-cpu")
    with pytest.raises(UnsupportedError, match=r"'past_key_values\.0\.key' is tensor\(bfloat16\)"):
        DecodeSession(model)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_a_cache_filled_in_place_has_the_type_that_the_attention_computes_in(kind: str):
    config = models.Config(kv_cache=True)
    for io, fits in (("keep", True), ("cache", False)):
        model = models.build(config)
        pass_class = get_pass(kind)
        pass_class(pass_class.Options(io=io)).call(model, Context(target="ort-cpu"))
        if fits:
            legalize(model, "ort-cpu", kv_cache="in-place")
            assert [n.op_type for n in model.graph].count("GroupQueryAttention") == config.layers
        else:
            with pytest.raises(UnsupportedError, match="in another type than it is returned in"):
                legalize(model, "ort-cpu", kv_cache="in-place")
