"""The outliertune pass: which sites it takes, which it refuses and why, and what it writes."""

from __future__ import annotations

import json
import re
from typing import Any

import golden_cases
import models
import numpy as np
import onnx
import onnx_ir as ir
import pydantic
import pytest
from golden_cases import Case
from outlier_cases import (
    CONFIGS,
    PER_TOKEN,
    STATIC,
    apply,
    calibration,
    ops,
    samples,
    small,
)
from processor import Int8Runner

from optimizer import graph as graphs
from optimizer.calibration import Calibration, input_specs
from optimizer.errors import CalibrationError
from optimizer.quantization.sites import find_sites
from optimizer.runners.ort import OrtRunner
from optimizer.samples import load_samples
from passes.outliertune import Options, OutlierTune, plan

# --- which sites, and how -------------------------------------------------------------------------

SCHEMES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", {}, ["static", "per-token", "static", "per-token, both ends"]),
    ("opt", {}, ["static", "per-token", "static", "per-token, bounded below"]),
    ("bert", {}, ["per-token", "per-token", "static", "per-token, bounded below"]),
    ("phi", {}, ["static", "per-token", "per-token, bounded below"]),
    ("llama", PER_TOKEN, ["per-token"] * 3 + ["per-token, both ends"]),
    ("llama", {**PER_TOKEN, "asymmetric": False}, ["per-token"] * 4),
    ("llama", STATIC, ["static"] * 4),
    ("opt", {"exclude": "*.up.weight"}, ["static", "per-token", "per-token, bounded below"]),
]


@pytest.mark.parametrize(("name", "options", "schemes"), SCHEMES)
def test_sites_and_their_schemes(name: str, options: dict[str, Any], schemes: list[str]) -> None:
    config = models.Config(**CONFIGS[name])
    model = models.build(config)
    report = apply(model, calibration(model, config), **options)
    assert [s["scheme"] for s in report.details["sites"]][: len(schemes)] == schemes
    assert len(report.details["sites"][0]["weights"]) >= 3
    assert json.loads(json.dumps(report.details)) == report.details


def test_layers_that_share_a_norm_share_scales_and_one_quantization() -> None:
    config = models.Config(layers=1)
    model = models.build(config)
    report = apply(model, calibration(model, config))
    site = report.details["sites"][0]
    assert [w.split(".")[2] for w in site["weights"]] == ["q", "k", "v"]
    assert ops(model).count("QuantizeLinear") == 4


def test_a_norm_read_by_the_residual_too_keeps_its_output() -> None:
    config = models.Config(**CONFIGS["bert"], layers=1)
    model = models.build(config)
    norms = {n.name: [v.name for v in n.inputs] for n in model.graph if "Norm" in n.op_type}
    report = apply(model, calibration(model, config), alpha=1.0, shift=True)
    assert {n.name: [v.name for v in n.inputs] for n in model.graph if n.name in norms} == norms
    assert "read elsewhere" in report.details["sites"][2]["scaled_by"]


def test_scales_of_a_gated_mlp_move_into_the_layer_before() -> None:
    config = models.Config(layers=1)
    model = models.build(config)
    report = apply(model, calibration(model, config), alpha=0.5)
    assert report.details["sites"][3]["scale"] is not None
    muls = [n for n in model.graph if n.op_type == "Mul" and graphs.constant(n.inputs[1])]
    assert not [n for n in muls if n.inputs[1].shape and n.inputs[1].shape[-1] == 24]


def test_nothing_downstream_of_a_weight_that_is_not_finite_is_touched() -> None:
    config = models.Config()
    model = models.build(config)
    broken = np.full((32, 24), np.nan, np.float32)
    model.graph.initializers["layers.0.gate.weight"].const_value = ir.tensor(broken)
    report = apply(model, calibration(model, config))
    assert report.sites == ("layers.0.norm1.out", "attention.0")
    assert [s.reason for s in report.skipped if s.site == "layers.0.norm2.out"] == [
        "a weight is not finite"
    ]
    finite = "its input is not finite on the calibration data"
    assert [s.reason for s in report.skipped].count(finite) == 5


def test_a_model_without_blocks_is_quantized_throughout() -> None:
    model, data = small()
    report = apply(model, samples(model, data))
    assert report.details["sites"][0]["weights"] == ["w0", "w1"]


def test_padding_has_no_influence() -> None:
    config = models.Config()
    texts = []
    for garbage in (3, 44):
        model = models.build(config)
        feed = models.feed(config, 4, 12)
        feed["attention_mask"][:, 8:] = 0
        feed["input_ids"][:, 8:] = garbage
        apply(model, Calibration(load_samples(feed, input_specs(model))))
        texts.append(golden_cases.text(model))
    assert texts[0] == texts[1]


def test_two_runs_write_the_same_bytes() -> None:
    config = models.Config(**CONFIGS["bert"])
    protos = []
    for _ in range(2):
        model = models.build(config)
        apply(model, calibration(model, config))
        protos.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert protos[0] == protos[1]


# --- must not fire --------------------------------------------------------------------------------


def test_a_second_run_changes_nothing_and_says_why() -> None:
    config = models.Config()
    model = models.build(config)
    apply(model, calibration(model, config))
    text = golden_cases.text(model)
    report = apply(model, calibration(model, config))
    assert not report.modified
    assert {s.reason for s in report.skipped} == {
        "already quantized",
        "computes an output of the model (heads=true, or include it by name, to quantize it)",
    }
    assert golden_cases.text(model) == text


def test_needs_calibration() -> None:
    assert OutlierTune().needs_calibration()
    with pytest.raises(CalibrationError, match="--calibration"):
        apply(models.build(), None)


def _shared(model: ir.Model) -> None:
    """Layer 1 multiplies by layer 0's weight."""
    matmul = next(n for n in model.graph if n.inputs[1:2] and n.inputs[1].name == "w1")
    matmul.replace_input_with(1, model.graph.initializers["w0"])


def _set(name: str, change: Any) -> Any:
    def edit(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        array = change(np.array(graphs.const(value)))
        value.const_value = ir.tensor(array)
        value.dtype = value.const_value.dtype

    return edit


def _overridable(model: ir.Model) -> None:
    model.graph.inputs.append(model.graph.initializers["w1"])


def _infinite(array: np.ndarray) -> np.ndarray:
    array[0, 0] = np.inf
    return array


REFUSES: list[tuple[Any, str]] = [
    (_shared, "its weight is used elsewhere too"),
    (_set("w1", _infinite), "a weight is not finite"),
    (
        _set("w1", lambda a: a.astype(np.float64)),
        "its weight is DOUBLE, expected FLOAT, which a model written for ort-cpu has",
    ),
    (_set("w1", lambda a: a[None]), "its weight has 3 dimensions, expected a matrix"),
    (_overridable, "its weight is a graph input, which the caller may override"),
]


@pytest.mark.parametrize(("edit", "reason"), REFUSES)
def test_leaves_alone_and_says_why(edit: Any, reason: str) -> None:
    model, _ = small()
    edit(model)
    sites, skipped = find_sites(model)
    if "finite" in reason:
        data = Calibration(load_samples([{"x": np.ones((3, 6), np.float32)}], input_specs(model)))
        _, skipped = plan(model, sites, Options(), data)
    assert [s.reason for s in skipped][:1] == [reason]


def test_a_norm_whose_other_reader_is_refused_keeps_its_output() -> None:
    model, data = small()
    report = apply(model, samples(model, data), exclude="w1", alpha=1.0)
    assert report.applied == 1
    assert "scaled_by" in report.details["sites"][0]
    assert "Mul" in ops(model)


@pytest.mark.parametrize(
    ("vocab", "options", "quantized"),
    [
        (50, {"heads": "auto"}, True),  # 1 600 of 12 352 weights: dear in float
        (4, {"heads": "auto"}, False),  # 128 of 10 880
        (4, {"heads": True}, True),
        (50, {"heads": False}, False),
        (50, {"heads": False, "include": "lm_head*"}, True),
        (50, {"heads": "auto", "exclude": "lm_head*"}, False),
    ],
)
def test_heads_are_quantized_where_float_is_dear_or_on_demand(
    vocab: int, options: dict[str, Any], quantized: bool
) -> None:
    config = models.Config(vocab=vocab)
    model = models.build(config)
    report = apply(model, calibration(model, config), **options)
    assert ("final_norm.out" in report.sites) == quantized
    assert [s.site for s in report.skipped] == ([] if quantized else ["lm_head.weight"])


@pytest.mark.parametrize(
    "options",
    [{"bits": 9}, {"bits": 1}, {"alpha": 1.5}, {"alpha": "half"}, {"after_norm": "dynamic"}],
)
def test_rejects_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        Options(**options)


# --- golden ---------------------------------------------------------------------------------------


def rounded(model: ir.Model | onnx.ModelProto) -> str:
    """The text with numbers of three digits: norms differ in the last bits between machines."""
    number = r"(?<=[{,])-?[\d.]+(?:e[-+]?\d+)?(?=[,}])"
    return re.sub(number, lambda m: f"{float(m[0]):.3g}", golden_cases.text(model))


def golden_data(model: ir.Model) -> dict[str, np.ndarray]:
    """Numbers from -1 to 1 with a step of 1/16, so that no rounding depends on the machine."""
    shapes = [tuple(d if isinstance(d, int) else 4 for d in v.shape) for v in model.graph.inputs]
    rng = np.random.default_rng(0)
    return {
        str(v.name): (rng.integers(-16, 17, shape) / 16).astype(np.float32)
        for v, shape in zip(model.graph.inputs, shapes, strict=True)
    }


@pytest.mark.parametrize("case", golden_cases.cases("outliertune"), ids=lambda c: c.name)
def test_golden(case: Case) -> None:
    model = case.model()
    data = golden_data(model)
    before = OrtRunner(case.model()).run(data)
    report = apply(model, samples(model, data), **case.options)
    assert rounded(model) == rounded(case.after)
    assert report.modified == (rounded(case.before) != rounded(case.after))
    after = Int8Runner(ir.from_proto(case.after)).run(data)
    for name, expected in before.items():
        # 8 bits: half a step of 1/127 of the range for each of two factors.
        assert np.abs(after[name] - expected).max() <= 0.03 * np.abs(expected).max()
