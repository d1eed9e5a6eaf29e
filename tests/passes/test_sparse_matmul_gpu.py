"""sparse-matmul for targets on GPUs: which layouts it takes, and nothing is lost."""

from __future__ import annotations

from typing import Any

import models
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import Config

from optimizer import sparse_cost
from optimizer.custom_ops.bodies import left_out, operators, plugins_of
from optimizer.custom_ops.declaration import declaration_hash
from optimizer.errors import UnsupportedError
from optimizer.legalize import legalize
from optimizer.model_io import load_model, save_model
from optimizer.pass_base import Context, Report
from optimizer.runners.ort import OrtRunner
from optimizer.sparse_cost import Figure
from passes.bf16 import Bf16
from passes.canonicalize import Canonicalize
from passes.fp16 import Fp16
from passes.sparse_matmul import Options, SparseMatMul
from passes.sparsify import Options as PruneOptions
from passes.sparsify import Sparsify

GPU = Context(target="tensorrt-10")
CONFIGS = [
    Config(layers=1),
    Config(layers=1, norm="layer", bias=True, gated=False, activation="gelu"),
]
PRUNED = {
    "unstructured": PruneOptions(pattern="unstructured", sparsity=0.7, method="magnitude"),
    "2:4": PruneOptions(pattern="2:4", method="magnitude"),
}
#: Of a sum of some ten layers, each rounded to 11 or 8 bits.
ROUNDING = {Fp16: 2e-3, Bf16: 2e-2}


def half_model(config: Config, pattern: str, precision: type = Fp16) -> ir.Model:
    model = models.build(config)
    Sparsify(PRUNED[pattern]).call(model, Context())
    precision().call(model, GPU)
    return model


def apply(model: ir.Model, context: Context = GPU, **options: Any) -> Report:
    return SparseMatMul(Options(**options)).call(model, context)


def logits(model: ir.Model, config: Config) -> np.ndarray:
    return OrtRunner(model).run(models.feed(config))["logits"].astype(np.float32)


def layouts(model: ir.Model) -> set[str]:
    return {node.attributes.get_string("layout", "") for node in operators(model)}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("pattern", PRUNED)
@pytest.mark.parametrize("half", [Fp16, Bf16])
def test_half_layers_compute_the_same_and_come_back(config, pattern, half):
    model = half_model(config, pattern, half)
    before, weights = logits(model, config), _weights(model)
    report = apply(model, force=True)
    assert layouts(model) == ({"mma16", "sp16"} if pattern == "2:4" else {"mma16"})  # dense head
    assert {node.outputs[0].dtype for node in operators(model)} == {model_type(half)}
    after = logits(model, config)
    assert np.abs(after - before).max() <= ROUNDING[half] * np.abs(before).max()
    Canonicalize().call(model, GPU)
    assert not operators(model)
    np.testing.assert_array_equal(logits(model, config), before)
    assert _weights(model) == weights
    assert apply(model, force=True).applied == report.applied
    np.testing.assert_array_equal(logits(model, config), after)


def model_type(half: type) -> ir.DataType:
    return ir.DataType.FLOAT16 if half is Fp16 else ir.DataType.BFLOAT16


def _weights(model: ir.Model) -> list[bytes]:
    values = model.graph.initializers.values()
    return sorted(v.const_value.tobytes() for v in values if len(v.shape) == 2)


@pytest.mark.parametrize("pattern", PRUNED)
@pytest.mark.parametrize("half", [Fp16, Bf16])
def test_int8_layers_are_close_and_come_back_as_they_were(pattern, half):
    config = CONFIGS[1]
    model = half_model(config, pattern, half)
    before = logits(model, config)
    report = apply(model, force=True, precision="int8")
    assert layouts(model) == ({"mma8", "sp8"} if pattern == "2:4" else {"mma8"})
    after = logits(model, config)
    # Codes of 8 bits: a hundredth, besides what the type itself rounds.
    assert np.abs(after - before).max() <= (2e-2 + ROUNDING[half]) * np.abs(before).max()
    Canonicalize().call(model, GPU)
    np.testing.assert_array_equal(logits(model, config), after)
    assert apply(model, force=True).applied == report.applied
    assert layouts(model) <= {"mma8", "sp8"}
    np.testing.assert_array_equal(logits(model, config), after)


def test_float32_layers_stay_and_say_how_they_would_not():
    model = models.build(CONFIGS[0])
    report = apply(model, force=True)
    assert not report.modified
    assert all("put fp16 or bf16 before" in skip.reason for skip in report.skipped)


def test_half_layers_stay_on_the_cpu():
    report = apply(half_model(CONFIGS[0], "2:4"), Context(target="ort-cpu"), force=True)
    assert not report.modified
    assert all("FLOAT16, expected FLOAT" in skip.reason for skip in report.skipped)


def test_a_gpu_that_is_not_named_is_not_known():
    report = apply(half_model(CONFIGS[0], "2:4"))
    assert not report.modified
    assert all("machine=" in skip.reason and "h100" in skip.reason for skip in report.skipped)


@pytest.mark.parametrize("tokens", ["1,128", "8"])
def test_where_it_was_measured_slower_it_has_to_be_forced(tokens):
    model = half_model(CONFIGS[0], "2:4")
    report = apply(model, Context(target="ort-cuda"), machine="h100", tokens=tokens)
    assert not report.modified
    assert all("give tokens=1" in skip.reason for skip in report.skipped)
    assert apply(model, Context(target="ort-cuda"), force=True).modified


def test_for_one_token_per_run_the_figures_of_its_kernels_decide(monkeypatch):
    monkeypatch.setattr(sparse_cost, "refusal", lambda *_: None)
    model = half_model(CONFIGS[0], "2:4")
    assert apply(model, Context(target="ort-cuda"), machine="h100", tokens="1").modified


@pytest.mark.parametrize(
    ("gains", "tokens", "applied"),
    [((1.5, 1.5), "1", True), ((1.5, 1.5), "1,128", False), ((0.9, 1.5), "1", False)],
)
def test_layouts_are_judged_by_their_own_figures(monkeypatch, gains, tokens, applied):
    kinds = {
        kind: (Figure(1, 1, 1, 1.0, *gains), Figure(1, 1, 64, 1.0, 0.5, 0.5))
        for kind in ("mma16", "sp16")
    }
    monkeypatch.setattr(sparse_cost, "figures", lambda: {"h100": kinds})
    report = apply(half_model(CONFIGS[0], "2:4"), machine="h100", tokens=tokens)
    assert report.modified is applied
    if not applied:
        assert any("as dense fp16" in skip.reason for skip in report.skipped)


def test_measured_figures_of_the_gpu_refuse_prompts_and_small_weights():
    for kind in ("mma16", "mma8", "sp16", "sp8"):
        assert sparse_cost.refusal("h100", kind, (4096, 14336), (128,), 0.5) is not None
        assert sparse_cost.refusal("h100", kind, (64, 64), (1,), 0.5) is not None
    assert sparse_cost.refusal("h100", "mma16", (8192, 8192), (1,), 0.3) is None


def test_rotary_embedding_after_the_operator_is_lowered():
    """Shapes go through the operator."""
    model = half_model(CONFIGS[0], "2:4")
    apply(model, force=True)
    before = logits(model, CONFIGS[0])
    assert not legalize(model, "tensorrt-10").skipped
    assert "RotaryEmbedding" not in {node.op_type for node in model.graph}
    found = logits(model, CONFIGS[0])
    assert np.abs(found - before).max() <= ROUNDING[Fp16] * np.abs(before).max()


def test_files_for_tensorrt_have_no_bodies_and_get_them_back(tmp_path):
    model = half_model(CONFIGS[0], "2:4")
    apply(model, force=True)
    before, names = logits(model, CONFIGS[0]), [node.overload for node in operators(model)]
    with left_out(model):
        save_model(model, tmp_path / "m.onnx")
    assert [node.overload for node in operators(model)] == names
    np.testing.assert_array_equal(logits(model, CONFIGS[0]), before)
    written = onnx.load(tmp_path / "m.onnx")
    assert not written.functions
    assert not any(node.overload for node in written.graph.node)
    np.testing.assert_array_equal(logits(load_model(tmp_path / "m.onnx"), CONFIGS[0]), before)


def test_the_manifest_names_what_has_to_be_loaded():
    model = half_model(CONFIGS[0], "2:4")
    assert plugins_of(model) == []
    report = apply(model, force=True)
    (plugin,) = plugins_of(model)
    assert plugin["operator"] == "optimize::SparseMatMul"
    assert plugin["nodes"] == report.applied
    assert plugin["declaration"] == declaration_hash()
    assert plugin["layouts"] == ["mma16", "sp16"]


def test_an_operator_of_another_declaration_gets_no_body(tmp_path):
    model = half_model(CONFIGS[0], "2:4")
    apply(model, force=True)
    for node in operators(model):
        node.attributes["declaration"] = ir.AttrInt64("declaration", 5)
    with left_out(model):
        save_model(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="declaration 5 of optimize"):
        load_model(tmp_path / "m.onnx")
