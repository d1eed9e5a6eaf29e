"""The outliertune pass: exact around the rounding, which sites it takes, and what it writes."""

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
from hypothesis import given
from hypothesis import strategies as st

from optimizer import graph as graphs
from optimizer.calibration import Calibration, input_specs
from optimizer.errors import CalibrationError
from optimizer.legalize import legalize
from optimizer.pass_base import Context, Report
from optimizer.quantization.sites import Choice, find_sites
from optimizer.runners.ort import OrtRunner
from optimizer.samples import load_samples
from passes.outliertune import Options, OutlierTune, plan, write

LITERATURE = {"asymmetric": False, "compensate": False, "margin": False}
STATIC = dict.fromkeys(("after_norm", "after_attention", "in_mlp", "elsewhere"), "static")
PER_TOKEN = dict.fromkeys(STATIC, "per-token")
GELU = {"norm": "layer", "bias": True, "gated": False, "activation": "gelu"}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "opt": {"norm": "layer", "bias": True, "gated": False, "activation": "relu"},
    "bert": {**GELU, "style": "post-norm"},
    "phi": {**GELU, "style": "parallel"},
    "neox": {**GELU, "style": "parallel-two-norms"},
    "cached": {"kv_cache": True},
}


def calibration(model: ir.Model, config: models.Config, **how: Any) -> Calibration:
    feed = models.feed(config, **{"batch": 4, "sequence": 12, **how})
    return Calibration(load_samples(feed, input_specs(model)))


def apply(
    model: ir.Model, data: Calibration | None, *, rounding: bool = True, **options: Any
) -> Report:
    """The pass, or without rounding only its float part."""
    if rounding:
        return OutlierTune(Options(**options)).call(model, Context(calibration=data))
    chosen = Options(**options)
    sites, _ = find_sites(model, Choice(chosen.include, chosen.exclude))
    assert data is not None
    write(model, plan(model, sites, chosen, data)[0], chosen, rounding=False)
    return Report(modified=True)


def small(
    norm: str = "layer", width: int = 6, outputs: int = 5, *, seed: int = 0
) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A norm and two linear layers, y0 and y1, that read one-sided channels of all sizes."""
    rng = np.random.default_rng(seed)
    w = models._Writer()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", width]))
    gain = (3.0 ** np.arange(width) / 8).astype(np.float32)
    inputs: list[ir.Value | None] = [x, w.const("gamma", gain)]
    if norm == "layer":
        inputs.append(w.const("beta", (gain * 3 * rng.normal(size=width)).astype(np.float32)))
    op = "LayerNormalization" if norm == "layer" else "RMSNormalization"
    h = w.op(op, inputs, "h", axis=-1, epsilon=1e-5)
    outs = []
    for i in range(2):
        weight = rng.normal(size=(width, outputs)).astype(np.float32)
        y = w.op("MatMul", [h, w.const(f"w{i}", weight)], f"y{i}")
        y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", outputs])
        outs.append(y)
    graph = ir.Graph(
        [x], outs, nodes=w.nodes, initializers=list(w.initializers.values()), opset_imports={"": 23}
    )
    data = {"x": rng.normal(size=(64, width)).astype(np.float32) + 1}
    return ir.Model(graph, ir_version=10), data


def observed(model: ir.Model, data: dict[str, np.ndarray], op_type: str) -> list[np.ndarray]:
    """What every node of a type reads first."""
    values = [n.inputs[0] for n in model.graph if n.op_type == op_type]
    found = OrtRunner(model, extra_outputs=values, optimize=False).run(data)
    return [found[str(v.name)] for v in values]


def samples(model: ir.Model, data: dict[str, np.ndarray]) -> Calibration:
    return Calibration(load_samples([data], input_specs(model)))


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def constants(model: ir.Model, text: str) -> dict[str, np.ndarray]:
    found = {n: graphs.const(v) for n, v in model.graph.initializers.items() if text in n}
    return {name: array for name, array in found.items() if array is not None}


# --- exact around the rounding -------------------------------------------------------------------

ROUTES = [
    {"alpha": 1.0, "shift": True},
    {"alpha": 0.5, "shift": False, **PER_TOKEN},
    {"alpha": 0.7, "shift": True, **STATIC},
    {},
]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("options", ROUTES, ids=str)
def test_without_rounding_the_function_stays_the_same(name: str, options: dict[str, Any]) -> None:
    config = models.Config(**CONFIGS[name])
    before, after = models.build(config), models.build(config)
    apply(after, calibration(after, config), rounding=False, **options)
    feed = models.feed(config)
    expected, found = (OrtRunner(m).run(feed)["logits"] for m in (before, after))
    # Scaling a float32 number costs half a unit in the last place; sums of 32 terms stay below.
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_symmetrization_centres_every_channel(norm: str) -> None:
    model, data = small(norm)
    apply(model, samples(model, data), rounding=False, alpha="off", shift=True)
    (y, _) = observed(model, data, "MatMul")
    assert np.abs(y.max(axis=0) + y.min(axis=0)).max() < 1e-5 * np.abs(y).max()


@pytest.mark.parametrize("bits", [8, 6])
def test_every_channel_spans_all_codes(bits: int) -> None:
    model, data = small()
    options = {"alpha": 1.0, "shift": True, "bits": bits, **LITERATURE}
    apply(model, samples(model, data), **options)
    (y,) = observed(model, data, "QuantizeLinear")
    top = 2 ** (bits - 1) - 1
    np.testing.assert_allclose(np.abs(y).max(axis=0), top, rtol=1e-5)
    codes = observed(model, data, "DequantizeLinear")[0]
    assert np.abs(codes.astype(int)).max() == top
    assert all(
        np.abs(w.astype(int)).max() == top for w in constants(model, "_int8").values() if w.ndim
    )


def test_an_input_that_is_symmetric_already_is_not_shifted() -> None:
    model, data = small("rms")
    symmetric = {"x": np.concatenate([data["x"], -data["x"]])}
    apply(model, samples(model, symmetric), alpha="off", shift=True)
    assert "Add" not in ops(model)


def test_a_layer_without_bias_gets_one_for_the_shift() -> None:
    model, data = small()
    apply(model, samples(model, data), rounding=False, alpha=1.0, shift=True)
    assert ops(model).count("Add") == 2
    assert len(constants(model, "bias")) == 2


def test_silent_channels_do_not_saturate_at_their_first_number() -> None:
    model, data = small()
    gamma = np.array(graphs.const(model.graph.initializers["gamma"]))
    gamma[2] = 0
    model.graph.initializers["gamma"].const_value = ir.tensor(gamma)
    model.graph.initializers["beta"].const_value = ir.tensor(np.zeros(6, np.float32))
    report = apply(model, samples(model, data), alpha=1.0)
    low, high = report.details["sites"][0]["scale"]
    assert low >= 0.9e-3 * high


# --- the same pass is SmoothQuant and Outlier Suppression+ ---------------------------------------


def test_outliertune_is_a_shift_then_smoothquant_1_then_one_static_scale() -> None:
    one, data = small()
    three, _ = small()
    apply(one, samples(one, data), alpha=1.0, shift=True, **LITERATURE)
    base = {**LITERATURE, **STATIC}
    apply(three, samples(three, data), rounding=False, alpha="off", shift=True, **base)
    apply(three, samples(three, data), rounding=False, alpha=1.0, shift=False, **base)
    apply(three, samples(three, data), alpha="off", shift=False, **base)
    codes = [observed(m, data, "DequantizeLinear")[0] for m in (one, three)]
    np.testing.assert_array_equal(*codes)
    weights = [constants(m, "_int8") for m in (one, three)]
    for a, b in zip(*(w.values() for w in weights), strict=True):
        np.testing.assert_array_equal(a, b)
    outputs = [OrtRunner(m).run(data)["y0"] for m in (one, three)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5 * np.abs(outputs[0]).max())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_scales_are_those_of_smoothquant(alpha: float) -> None:
    model, data = small("rms")
    gamma = np.array(graphs.const(model.graph.initializers["gamma"]), np.float64)
    (h, _) = observed(model, data, "MatMul")
    w = np.concatenate([graphs.const(model.graph.initializers[f"w{i}"]) for i in range(2)], axis=1)
    wanted = np.abs(h).max(axis=0) ** alpha / np.abs(w).max(axis=1) ** (1 - alpha)
    apply(model, samples(model, data), alpha=alpha, shift=False, **LITERATURE)
    found = gamma / next(iter(constants(model, "gamma").values()))
    np.testing.assert_allclose(found / found[0], wanted / wanted[0], rtol=1e-5)


# --- the integers ---------------------------------------------------------------------------------


def test_int8_products_equal_integer_arithmetic_bit_by_bit() -> None:
    model, data = small("rms")
    apply(model, samples(model, data), alpha=1.0, shift=False)
    weights, scales = constants(model, "w0_int8"), constants(model, "w0_scale")
    (y,) = observed(model, data, "QuantizeLinear")
    assert legalize(model, "ort-cpu").modified
    found = OrtRunner(model).run(data)["y0"]
    codes = np.clip(np.rint(y), -128, 127).astype(np.int32)  # the scale is 1
    total = codes @ weights["w0_int8"].astype(np.int32)
    np.testing.assert_array_equal(found, total.astype(np.float32) * scales["w0_scale"])


def test_codes_of_fewer_bits_stay_within_them_on_unseen_data() -> None:
    model, data = small()
    apply(model, samples(model, data), bits=5)
    codes = observed(model, {"x": data["x"] * 3 - 7}, "DequantizeLinear")[0]
    assert np.abs(codes.astype(int)).max() <= 15


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "cached"])
def test_every_site_is_lowered_for_the_cpu(name: str) -> None:
    config = models.Config(**CONFIGS[name])
    model = models.build(config)
    report = apply(model, calibration(model, config))
    assert report.applied == 4 * config.layers
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    lowered = legalize(model, "ort-cpu")
    assert not lowered.skipped
    assert ops(model).count("QuantizeLinear") == report.applied
    layers = 7 if config.gated else 6
    assert ops(model).count("MatMulIntegerToFloat") == layers * config.layers


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
        "computes an output of the model (include it by name to quantize it)",
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
    (_set("w1", lambda a: a.astype(np.float64)), "its weight is DOUBLE, expected FLOAT"),
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


def test_tied_and_output_layers_stay_in_float_unless_named() -> None:
    config = models.Config()
    model = models.build(config)
    report = apply(model, calibration(model, config))
    assert [s.site for s in report.skipped] == ["lm_head.weight"]
    model = models.build(config)
    report = apply(model, calibration(model, config), include="lm_head*")
    assert report.skipped == ()
    assert report.sites[-1] == "final_norm.out"


@pytest.mark.parametrize(
    "options",
    [{"bits": 9}, {"bits": 1}, {"alpha": 1.5}, {"alpha": "half"}, {"after_norm": "dynamic"}],
)
def test_rejects_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        Options(**options)


# --- how large the error is ----------------------------------------------------------------------


@given(
    norm=st.sampled_from(["layer", "rms"]),
    width=st.integers(2, 12),
    outputs=st.integers(1, 9),
    seed=st.integers(0, 1000),
    alpha=st.sampled_from(["auto", "off", 0.0, 0.5, 1.0]),
    shift=st.sampled_from(["auto", True, False]),
    after_norm=st.sampled_from(["static", "per-token"]),
    bits=st.integers(4, 8),
)
def test_error_is_what_the_search_expects(seed: int, **choices: Any) -> None:
    sizes = {name: choices.pop(name) for name in ("norm", "width", "outputs")}
    model, data = small(**sizes, seed=seed)
    before = OrtRunner(model).run(data)
    report = apply(model, samples(model, data), **choices, compensate=False)
    after = OrtRunner(model).run(data)
    lost = sum(float(np.square(after[n] - before[n], dtype=np.float64).sum()) for n in before)
    total = sum(float(np.square(before[n], dtype=np.float64).sum()) for n in before)
    # Rounding errors are at most half a step, three times the variance that is expected of them,
    # and those of weights and activations may add up: 6 times; margins make them smaller.
    expected = report.details["sites"][0]["expected_error"]
    assert lost / total <= 6 * expected + 1e-9


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_error_on_unseen_data_is_below_that_of_the_literature(name: str) -> None:
    config = models.Config(**CONFIGS[name], hidden=64, head_dim=16, ffn=160)
    feed = models.feed(config, 8, 32, seed=5)
    expected = OrtRunner(models.build(config)).run(feed)["logits"]
    error = {}
    for label, options in {
        "ours": {},
        "per-tensor": {"alpha": "off", "shift": False, **STATIC, **LITERATURE},
        "published": {"alpha": 1.0, "shift": True, **LITERATURE},
    }.items():
        model = models.build(config)
        apply(model, calibration(model, config, batch=16, sequence=32), **options)
        found = OrtRunner(model).run(feed)["logits"]
        error[label] = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error["ours"] < min(error["per-tensor"], error["published"])


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
    after = OrtRunner(ir.from_proto(case.after)).run(data)
    for name, expected in before.items():
        # 8 bits: half a step of 1/127 of the range for each of two factors.
        assert np.abs(after[name] - expected).max() <= 0.03 * np.abs(expected).max()
