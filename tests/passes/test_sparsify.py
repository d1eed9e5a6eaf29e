"""The sparsify pass: which layers it takes, which it refuses and why, and what it writes."""

from __future__ import annotations

import json
from typing import Any

import golden_cases
import models
import numpy as np
import onnx_ir as ir
import pydantic
import pytest
from golden_cases import Case
from outlier_cases import CONFIGS, calibration, samples, small
from sparse_cases import TWO_OF_FOUR, apply, matrices

from optimizer import graph as graphs
from optimizer.calibration import Calibration, input_specs
from optimizer.errors import CalibrationError
from optimizer.gate import LEFT_OUT, Recorder, first
from optimizer.half_weights import Widened, widened
from optimizer.linear_layers import is_embedding, linear_at
from optimizer.pass_base import Context
from optimizer.pruning import planning
from optimizer.pruning.patterns import Pattern
from optimizer.runners.ort import OrtRunner
from optimizer.samples import load_samples
from optimizer.structure import Linear
from passes.outliertune import Options as TuneOptions
from passes.outliertune import OutlierTune
from passes.sparsify import Options, Sparsify

METHODS = ["magnitude", "wanda", "sparsegpt"]


def perceptron(channels: int = 8, *, seed: int = 0) -> ir.Model:
    """relu(x w0) w1 with K = ``channels`` and 12."""
    rng = np.random.default_rng(seed)
    w = models.Writer()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", channels]))
    arrays = [rng.normal(size=s).astype(np.float32) for s in ((channels, 12), (12, 5))]
    h = w.op("MatMul", [x, w.const("w0", arrays[0])], "h")
    y = w.op("MatMul", [w.op("Relu", [h], "r"), w.const("w1", arrays[1])], "y")
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", 5])
    graph = ir.Graph(
        [x], [y], nodes=w.nodes, initializers=list(w.initializers.values()), opset_imports={"": 23}
    )
    return ir.Model(graph, ir_version=10)


def rows(model: ir.Model, count: int = 64) -> Calibration:
    width = input_specs(model)[0].shape[1]
    assert isinstance(width, int)
    numbers = np.random.default_rng(1).normal(size=(count, width)).astype(np.float32)
    return samples(model, {"x": numbers})


# --- which layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_all_projections_of_all_blocks_get_the_pattern_and_nothing_else(
    name: str, method: str
) -> None:
    config = models.Config(**CONFIGS[name])
    model = models.build(config)
    before = matrices(model)
    others = {n: graphs.const(v) for n, v in model.graph.initializers.items() if n not in before}
    report = apply(model, calibration(model, config), method=method)
    after = matrices(model)
    assert list(after) == list(before)
    assert [s.site for s in report.skipped] == ["lm_head.weight"]
    assert report.applied == len(report.sites) == len(before) - 1
    for weight in report.sites:
        assert ((after[weight] == 0).reshape(-1, 4, after[weight].shape[1]).sum(axis=1) == 2).all()
        assert not np.signbit(after[weight][after[weight] == 0]).any()
        if method != "sparsegpt":
            kept = after[weight] != 0
            assert np.array_equal(after[weight][kept], before[weight][kept])
    assert np.array_equal(after["lm_head.weight"], before["lm_head.weight"])
    for other, array in others.items():
        assert np.array_equal(graphs.const(model.graph.initializers[other]), array)
    assert report.details["sparsity"] == 0.5
    assert json.loads(json.dumps(report.details)) == report.details


@pytest.mark.parametrize(
    ("options", "taken", "left"),
    [
        ({}, [], ["lm_head.weight"]),
        ({"heads": True}, ["lm_head.weight"], []),
        ({"include": "lm_*"}, ["lm_head.weight"], []),
        ({"include": "lm_*", "exclude": "*.up.weight,lm_*"}, [], ["lm_head.weight", "*up*"]),
        ({"exclude": ["*"]}, [], ["lm_head.weight", "*up*", "*.q.*"]),
    ],
)
def test_layers_are_chosen_by_name(
    options: dict[str, Any], taken: list[str], left: list[str]
) -> None:
    model = models.build(models.Config())
    report = apply(model, method="magnitude", **options)
    assert set(taken) <= set(report.sites)
    skipped = [s.site for s in report.skipped]
    for pattern in left:
        assert any(pattern.strip("*") in site for site in skipped)
    assert not set(skipped) & set(report.sites)


def test_without_blocks_every_product_by_a_constant_is_taken() -> None:
    model = perceptron()
    assert apply(model, rows(model)).sites == ("w0", "w1")


def vision() -> ir.Model:
    """A transformer whose token embedding is a product: patches [B, S, 16] times a matrix."""
    model = models.build(models.Config(layers=1, style="pre-norm"))
    graph = model.graph
    gather = next(node for node in graph if node.op_type == "Gather")
    width = gather.inputs[0].shape[1]
    patches = ir.Value(
        name="patches", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "s", 16])
    )
    graph.inputs.append(patches)
    table = np.random.default_rng(0).normal(size=(16, width)).astype(np.float32)
    weight = graphs.add_initializer(graph, "patch.weight", table)
    embedded = graphs.insert(graph, gather, "MatMul", [patches, weight], name="embedded")
    total = graphs.insert(graph, None, "Add", [embedded, gather.outputs[0]], name="sum")
    node = total.producer()
    assert node is not None
    graph.remove(node)
    graph.insert_after(gather, node)
    for use in list(gather.outputs[0].uses()):
        if use.node is not node:
            use.node.replace_input_with(use.idx, total)
    return model


@pytest.mark.parametrize(("options", "taken"), [({}, False), ({"embeddings": True}, True)])
def test_embeddings_stay_dense_unless_asked_for(options: dict[str, Any], taken: bool) -> None:
    model = vision()
    report = apply(model, method="magnitude", **options)
    assert ("patch.weight" in report.sites) == taken
    reasons = {s.site: s.reason for s in report.skipped}
    assert ("embeds an input" in reasons.get("patch.weight", "")) != taken
    assert "layers.0.q.weight" in report.sites


def test_first_layers_are_embeddings_and_those_behind_a_norm_are_not() -> None:
    model, _ = small()
    found = [linear_at(node) for node in model.graph]
    assert [is_embedding(x) for x in found if isinstance(x, Linear)] == [False, False]
    model = perceptron()
    found = [linear_at(node) for node in model.graph]
    assert [is_embedding(x) for x in found if isinstance(x, Linear)] == [True, False]


def test_experts_are_pruned_and_their_router_is_not() -> None:
    model = models.build(models.Config(layers=1, experts=3))
    report = apply(model, method="magnitude")
    experts = [name for name in report.sites if name.endswith(("up.weight", "gate.weight"))]
    assert len(experts) == 6
    assert {s.site for s in report.skipped} == {"layers.0.router.weight", "lm_head.weight"}
    model = models.build(models.Config(layers=1, experts=3))
    report = apply(model, method="magnitude", include="*.router.*")
    assert "layers.0.router.weight" in report.sites


def refusal(model: ir.Model, data: Calibration | None = None, **options: Any) -> dict[str, str]:
    report = apply(model, data, **options)
    return {skip.site: skip.reason for skip in report.skipped}


def test_a_k_that_would_cut_a_group_off_is_refused_with_its_size() -> None:
    model = perceptron(10)
    before = matrices(model)
    reasons = refusal(model, rows(model))
    assert reasons == {
        "w0": "its K = 10 is no multiple of 4, so that the last group of 2:4 would be cut off "
        "(pattern=unstructured takes it)"
    }
    assert np.array_equal(matrices(model)["w0"], before["w0"])
    assert TWO_OF_FOUR.holds(matrices(model)["w1"])
    assert apply(perceptron(10), method="magnitude", pattern="unstructured").applied == 2


def test_what_cannot_be_pruned_is_left_alone_with_the_reason() -> None:
    shared = models.build(models.Config(shared_weights=True, mask=False))
    reasons = set(refusal(shared, method="magnitude").values())
    assert "its weight is used elsewhere too" in reasons

    infinite = perceptron()
    weight = infinite.graph.initializers["w0"]
    weight.const_value = ir.Tensor(np.full((8, 12), np.inf, np.float32), name="w0")
    assert refusal(infinite, method="magnitude") == {"w0": "its weight is not finite"}

    quantized = perceptron()
    OutlierTune(TuneOptions()).call(quantized, Context(calibration=rows(perceptron())))
    assert set(refusal(quantized, method="magnitude").values()) == {"already quantized"}
    assert refusal(models.chain(2)) == {"model": "it has no MatMul by a constant"}
    few = refusal(perceptron(), method="magnitude", pattern="unstructured", sparsity=0.05)
    assert few["w0"] == "5 % zeros leaves no zero in a column of 8"


def test_inputs_that_are_not_finite_or_never_seen_are_reasons() -> None:
    model = perceptron()
    numbers = np.full((4, 8), 1e38, np.float32)
    reasons = refusal(model, samples(model, {"x": numbers}))
    assert "not finite" in reasons["w0"]
    config = models.Config(layers=1)
    model = models.build(config)
    feed = models.feed(config, batch=1, sequence=4)
    nothing = {**feed, "valid": np.zeros((1, 4), np.int64)}
    data = Calibration(load_samples(nothing, input_specs(model)))
    for method in ("wanda", "sparsegpt"):
        reasons = refusal(model, data, method=method)
        assert reasons["layers.0.q.weight"] == "no valid token of its input was seen"


def test_data_is_asked_for_where_it_is_looked_at() -> None:
    with pytest.raises(CalibrationError, match=r"method 'wanda'.*--calibration"):
        apply(perceptron(), method="wanda")
    needs = [
        ({}, True), ({"method": "magnitude"}, False),
        ({"method": "magnitude", "pattern": "unstructured", "allocation": "damage"}, True),
        ({"pattern": "unstructured", "sparsity": 0}, False),
    ]  # fmt: skip
    for options, expected in needs:
        assert Sparsify(Options(**options)).needs_calibration() == expected


# --- what is written ------------------------------------------------------------------------------


def test_a_sparsity_of_zero_changes_nothing() -> None:
    model = perceptron()
    before = golden_cases.text(model)
    report = apply(model, pattern="unstructured", sparsity=0)
    assert (report.modified, report.applied) == (False, 0)
    assert golden_cases.text(model) == before


@pytest.mark.parametrize("compare", ["layer", "output"])
@pytest.mark.parametrize("method", METHODS)
def test_unstructured_counts_are_exact(compare: str, method: str) -> None:
    model = perceptron(30)
    report = apply(
        model, rows(model), pattern="unstructured", sparsity=0.7, method=method, compare=compare
    )
    for weight in matrices(model).values():
        wanted = round(0.7 * len(weight))
        assert (weight == 0).sum() == wanted * weight.shape[1]
        if compare == "output":
            assert ((weight == 0).sum(axis=0) == wanted).all()
    sparsities = [site["sparsity"] for site in report.details["sites"]]
    assert sparsities == [round(21 / 30, 6), round(8 / 12, 6)]


@pytest.mark.parametrize("sequential", [False, True])
def test_outputs_are_nearest_with_sparsegpt(sequential: bool) -> None:
    config = models.Config(layers=2)
    expected = None
    errors = {}
    for method in METHODS:
        model = models.build(config)
        data = calibration(model, config, batch=8)
        feed = models.feed(config, batch=8, sequence=12)
        if expected is None:
            expected = OrtRunner(model).run(feed)["logits"]
        apply(model, data, method=method, sequential=sequential)
        found = OrtRunner(model).run(feed)["logits"]
        errors[method] = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    assert errors["sparsegpt"] < min(errors["wanda"], errors["magnitude"])


def test_sequential_calibration_sees_the_model_pruned_so_far() -> None:
    config = models.Config(layers=2)
    found = {}
    for sequential in (False, True):
        model = models.build(config)
        apply(model, calibration(model, config), method="sparsegpt", sequential=sequential)
        found[sequential] = matrices(model)
    same = {name for name in found[True] if np.array_equal(found[True][name], found[False][name])}
    assert {name for name in same if "layers.1" in name} == set()
    assert {name for name in found[True] if "layers.0" in name} <= same


def test_statistics_beyond_the_memory_limit_take_more_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = models.Config(layers=2)
    whole, parts = models.build(config), models.build(config)
    apply(whole, calibration(whole, config))
    monkeypatch.setattr(planning, "_HELD", 1)
    data = calibration(parts, config)
    runs: list[int] = []
    observe = data.observe
    monkeypatch.setattr(data, "observe", lambda m, o: (runs.append(len(o)), observe(m, o))[1])
    apply(parts, data)
    assert runs == [1] * 8  # four inputs of two layers
    for one, other in zip(matrices(whole).values(), matrices(parts).values(), strict=True):
        assert np.array_equal(one, other)


def test_shares_by_damage_keep_the_mean_and_spare_what_matters() -> None:
    config = models.Config(layers=3)
    options = {"pattern": "unstructured", "sparsity": 0.5, "method": "wanda"}
    drifts = {}
    for allocation in ("uniform", "damage"):
        model = models.build(config)
        data = calibration(model, config, batch=8)
        reference = data.reference(model)
        report = apply(model, data, allocation=allocation, **options)
        drifts[allocation] = data.drift(reference, model).relative_l2
        # Counts are rounded to whole rows of a column: half of one in 32 at most.
        assert report.details["sparsity"] == pytest.approx(0.5, abs=1 / 64)
        again = apply(model, data, allocation=allocation, **options)
        assert not again.modified
    shares = {site["sparsity"] for site in report.details["sites"]}
    assert len(shares) > 1
    assert drifts["damage"] < drifts["uniform"]


def test_a_second_run_has_nothing_to_do_and_a_stricter_one_adds_zeros() -> None:
    model = perceptron(24)
    data = rows(model)
    assert apply(model, data, pattern="4:8", exclude="w1").applied == 1
    before = matrices(model)
    report = apply(model, data, pattern="4:8", exclude="w1")
    assert not report.modified
    assert {s.site: s.reason for s in report.skipped}["w0"] == "it is 4:8 already"
    assert apply(model, data, pattern="2:8", exclude="w1").applied == 1
    after = matrices(model)
    assert (after["w0"][before["w0"] == 0] == 0).all()
    assert Pattern.parse("2:8").holds(after["w0"])


def test_half_precision_is_kept() -> None:
    model = perceptron()
    for name in ("w0", "w1"):
        value = model.graph.initializers[name]
        narrow = ir.Value(name=name, const_value=ir.Tensor(value.const_value.numpy().astype("f2")))
        value.const_value = widened(narrow)
    before = matrices(model)
    data = rows(model)
    for method in ("magnitude", "sparsegpt"):
        copy = model.clone()
        apply(copy, data, method=method)
        for name, weight in matrices(copy).items():
            tensor = copy.graph.initializers[name].const_value
            assert isinstance(tensor, Widened)
            assert tensor.stored.dtype == ir.DataType.FLOAT16
            assert np.array_equal(tensor.stored.numpy().astype(np.float32), weight)
            assert TWO_OF_FOUR.holds(weight)
            assert (np.abs(weight - before[name]) > 0).any()


def test_weights_are_made_when_they_are_read() -> None:
    model = perceptron()
    apply(model, rows(model))
    for name in ("w0", "w1"):
        tensor = model.graph.initializers[name].const_value
        assert isinstance(tensor, ir.LazyTensor)
        assert TWO_OF_FOUR.holds(tensor.numpy())


# --- one part of a run ----------------------------------------------------------------------------


def test_a_run_in_part_is_a_part_of_the_whole_run() -> None:
    model, config = models.build(models.Config(layers=2)), models.Config(layers=2)
    whole = model.clone()
    data = calibration(model, config)
    decisions: dict[str, Any] = {}
    Sparsify().call(whole, Context(calibration=data, gate=Recorder(None, decisions)))
    before, full = matrices(model), matrices(whole)
    part = model.clone()
    report = Sparsify().call(part, Context(calibration=data, gate=Recorder(first(3), decisions)))
    assert report.applied == 3
    left = [s.site for s in report.skipped if s.reason == LEFT_OUT]
    assert len(left) == len(full) - 4  # and the head
    for name, weight in matrices(part).items():
        assert np.array_equal(weight, (full if name in report.sites else before)[name])


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pattern": "2-4"}, "'unstructured', '2:4', another N:M"),
        ({"pattern": "4:4"}, "N < M"),
        ({"pattern": "2:4", "sparsity": 0.6}, "sparsity is 0.6, but pattern=2:4 has 0.5"),
        ({"sparsity": 0.7}, "add pattern=unstructured"),
        ({"pattern": "unstructured", "sparsity": 1}, "less than 1"),
        ({"pattern": "unstructured", "sparsity": -0.1}, "greater than or equal to 0"),
        ({"allocation": "damage"}, "every layer the same share"),
        ({"compare": "output"}, "counts in groups"),
        ({"method": "obs"}, "'magnitude', 'wanda' or 'sparsegpt'"),
        ({"damping": 0}, "greater than 0"),
        ({"block": 0}, "greater than or equal to 1"),
    ],
)
def test_rejects_bad_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(pydantic.ValidationError) as found:
        Options(**options)
    assert says in str(found.value)


def test_a_sparsity_that_agrees_with_the_pattern_is_accepted() -> None:
    assert Options(sparsity=0.5).zeros == TWO_OF_FOUR
    assert Options(pattern="1:4", sparsity=0.75).zeros == Pattern.parse("1:4")


# --- golden ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden_cases.cases("sparsify"), ids=lambda c: c.name)
def test_golden(case: Case) -> None:
    model = case.model()
    report = apply(model, **case.options)
    assert golden_cases.text(model) == golden_cases.text(case.after)
    assert report.modified == (golden_cases.text(case.before) != golden_cases.text(case.after))
