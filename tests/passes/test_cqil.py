"""The cqil pass: which groups it makes, which it refuses and why, and what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import golden_cases
import models
import numpy as np
import onnx
import onnx_ir as ir
import pydantic
import pytest
from golden_cases import Case
from group_reference import Definition

from optimizer.blocks import find_blocks
from optimizer.calibration import Calibration, input_specs
from optimizer.errors import CalibrationError, OptionError
from optimizer.pass_base import Context, Report
from optimizer.runners.ort import OrtRunner
from optimizer.samples import load_samples
from passes.cqil import Cqil, Options

WINDOW = {"first": 0, "last": 1}


def apply(model: ir.Model, context: Context | None = None, **options: Any) -> Report:
    return Cqil(Options(**options)).call(model, context or Context())


def calibration(model: ir.Model, vocab: int = 50) -> Calibration:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab, (8, 16))
    arrays = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(16), (8, 1)),
    }
    return Calibration(load_samples(arrays, input_specs(model)))


def groups_of(report: Report) -> list[list[int]]:
    return [list(group) for group in report.details.get("groups", [])]


# --- must fire -----------------------------------------------------------------------------------

FIRES: list[tuple[dict[str, Any], dict[str, Any], list[list[int]]]] = [
    ({"layers": 4}, {"first": 0}, [[0, 1], [2, 3]]),
    ({"layers": 4}, {"last": 2}, [[0, 1]]),
    ({"layers": 5}, {"first": 1, "last": 4, "group": 4}, [[1, 2, 3, 4]]),
    ({"layers": 7}, {"first": 0, "last": 6, "group": 3}, [[0, 1, 2], [3, 4, 5]]),
    ({"layers": 2, "style": "parallel"}, {**WINDOW, "bypass": 0}, [[0, 1]]),
    ({"layers": 2, "style": "parallel-two-norms", "norm": "layer"}, WINDOW, [[0, 1]]),
    ({"layers": 2, "layer_scale": True}, WINDOW, [[0, 1]]),
    ({"layers": 2, "ffn": (24, 7)}, WINDOW, [[0, 1]]),
    ({"layers": 2, "kv_cache": True, "bias": True}, {**WINDOW, "bypass": "full"}, [[0, 1]]),
]


@pytest.mark.parametrize(("config", "options", "groups"), FIRES)
def test_groups_the_window(
    config: dict[str, Any], options: dict[str, Any], groups: list[list[int]]
) -> None:
    model = models.build(**config)
    report = apply(model, **options)
    assert groups_of(report) == groups
    assert report.modified
    assert report.applied == len(groups)
    assert list(report.sites) == [f"layers.{g[0]}-{g[-1]}" for g in groups]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_remainder_of_the_window_stays_sequential_and_is_reported() -> None:
    model = models.build(layers=5)
    report = apply(model, first=0, last=4)
    assert groups_of(report) == [[0, 1], [2, 3]]
    assert [(s.site, s.reason) for s in report.skipped] == [
        ("layers 4-4", "1 left over from groups of 2; sequential as before")
    ]
    assert report.details["depth"] == [5, 3]


# --- must not fire -------------------------------------------------------------------------------


def _change(attribute: str, value: float, layer: int = 1) -> Callable[[ir.Model], None]:
    def edit(model: ir.Model) -> None:
        node = find_blocks(model).blocks[layer].attention.node
        kind = ir.AttrFloat32 if isinstance(value, float) else ir.AttrInt64
        node.attributes[attribute] = kind(attribute, value)

    return edit


def _change_rotary(model: ir.Model) -> None:
    rotary = find_blocks(model).blocks[1].attention.q_rotary
    assert rotary is not None
    rotary.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def _other_mask(model: ir.Model) -> None:
    node = find_blocks(model).blocks[1].attention.node
    copy = ir.node("And", [node.inputs[3], node.inputs[3]])
    copy.outputs[0].name = "other_mask"
    model.graph.insert_before(node, copy)
    node.replace_input_with(3, copy.outputs[0])


def _read_inside(model: ir.Model) -> None:
    block = find_blocks(model).blocks[0]
    assert block.hidden is not None
    node = ir.node("Relu", [block.hidden], name="spy")
    node.outputs[0].name = "spied"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["batch", "sequence", 32])
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])


def _norm_after(where: str) -> Callable[[ir.Model], None]:
    def edit(model: ir.Model) -> None:
        block = find_blocks(model).blocks[1]
        add = block.attention_add if where == "attention" else block.mlp_add
        linear = block.attention.o if where == "attention" else block.mlp.down
        scale = ir.Value(
            name=f"{where}.post",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([32]),
            const_value=ir.tensor(np.ones(32, np.float32)),
        )
        model.graph.initializers.add(scale)
        norm = ir.node("RMSNormalization", [linear.output, scale], attributes={"axis": -1})
        norm.outputs[0].name = f"{where}.post.out"
        model.graph.insert_before(add, norm)
        add.replace_input_with(list(add.inputs).index(linear.output), norm.outputs[0])

    return edit


def _quantize(model: ir.Model) -> None:
    linear = find_blocks(model).blocks[1].mlp.up
    shape = linear.weight.shape
    assert shape is not None
    parts = {
        "up.q": np.zeros(tuple(shape), np.int8),
        "up.s": np.ones(int(shape[1]), np.float32),  # type: ignore[arg-type]
    }
    values = [
        ir.Value(name=n, const_value=ir.tensor(a), shape=ir.Shape(a.shape))
        for n, a in parts.items()
    ]
    for value in values:
        model.graph.initializers.add(value)
    node = ir.node("DequantizeLinear", values, attributes={"axis": 1})
    node.outputs[0].name = "up.dq"
    model.graph.insert_before(linear.matmul, node)
    linear.matmul.replace_input_with(1, node.outputs[0])


def _share_cache(model: ir.Model) -> None:
    past = next(v for v in model.graph.inputs if v.name == "past_key_values.1.key")
    node = ir.node("Neg", [past], name="spy")
    node.outputs[0].name = "spied"
    node.outputs[0].type = past.type
    node.outputs[0].shape = ir.Shape(["batch", 2, "past_sequence", 8])
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])


def _half_weights(model: ir.Model) -> None:
    linear = find_blocks(model).blocks[0].mlp.down
    array = linear.weight.const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    linear.weight.const_value = ir.tensor(array)


def _between(model: ir.Model) -> None:
    blocks = find_blocks(model).blocks
    node = ir.node("Tanh", [blocks[0].output])
    node.outputs[0].name = "between"
    first = blocks[1].attention_norm.node
    model.graph.insert_before(first, node)
    first.replace_input_with(0, node.outputs[0])
    blocks[1].attention_add.replace_input_with(0, node.outputs[0])


REFUSES: list[tuple[str, dict[str, Any], Callable[[ir.Model], None] | None, str]] = [
    (
        "post-norm", {"style": "post-norm"}, None,
        "post-norm: each layer normalizes the residual stream itself, so layers that run side by "
        "side cannot be added up exactly",
    ),
    ("dynamic tanh", {"norm": "tanh"}, None,
     "layer 0: a dynamic tanh, whose own alpha leaves no value to share"),
    ("epsilon", {"epsilons": (1e-5, 1e-6)}, None, "layers 0 and 1 have different norm epsilons"),
    ("shared weight", {"shared_weights": True}, None,
     "weight 'shared.q.weight' is shared with another node"),
    ("graph output", {"hidden_output": 0}, None, "the stream after layer 0 is a graph output"),
    ("read inside", {}, _read_inside,
     "the stream between attention and MLP of layer 0 is also read by node 'spy'"),
    ("softcap", {}, _change("softcap", 30.0), "layers 0 and 1 have different logit soft-caps"),
    ("causal", {}, _change("is_causal", 1), "layers 0 and 1 have different causal flags"),
    ("attributes", {}, _change("softmax_precision", 1),
     "layers 0 and 1 have different attention attributes"),
    ("rotary", {}, _change_rotary, "layers 0 and 1 have different rotary embeddings"),
    ("mask", {}, _other_mask, "layers 0 and 1 have different attention masks"),
    ("sandwich attention", {}, _norm_after("attention"),
     "layer 1: a norm between the attention and its residual add (sandwich norm)"),
    ("sandwich MLP", {}, _norm_after("MLP"),
     "layer 1: a norm between the MLP and its residual add (sandwich norm)"),
    ("quantized", {}, _quantize, "layer 1: quantized weights; group before quantization"),
    ("cache read", {"kv_cache": True}, _share_cache,
     "the past of layer 1 ('past_key_values.1.key') is also read by node 'spy'"),
    ("types", {}, _half_weights, "layers 0 and 1 have different weight types"),
    ("between", {}, _between,
     "layer 1 does not read the output of layer 0: something lies between them"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "edit", "reason"), [case[1:] for case in REFUSES], ids=[case[0] for case in REFUSES]
)
def test_leaves_alone_and_says_why(
    config: dict[str, Any], edit: Callable[[ir.Model], None] | None, reason: str
) -> None:
    model = models.build(layers=2, **config)
    if edit is not None:
        edit(model)
    before = ir.to_proto(model).SerializeToString()
    report = apply(model, **WINDOW)
    assert [(s.site, s.reason) for s in report.skipped] == [("layers 0-1", reason)]
    assert not report.modified
    assert report.applied == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_other_layers_are_grouped_when_one_group_is_refused() -> None:
    model = models.build(layers=4, epsilons=(1e-5, 1e-6, 1e-5, 1e-5))
    report = apply(model, first=0)
    assert groups_of(report) == [[2, 3]]
    assert report.skipped[0].site == "layers 0-1"


def test_mixed_styles_are_refused() -> None:
    model = models.build(layers=2)
    parallel = models.build(layers=2, style="parallel")
    blocks = (find_blocks(model).blocks[0], find_blocks(parallel).blocks[1])
    from optimizer.fusion import refusal

    assert refusal(blocks) is not None


def test_model_without_layers_is_skipped() -> None:
    model = models.build(layers=1)
    report = apply(model, **WINDOW)
    assert [s.reason for s in report.skipped] == [
        "1 transformer layers were recognised; a group needs two"
    ]


@pytest.mark.parametrize("options", [{"group": 1}, {"group": 1, "first": 0, "last": 1}])
def test_groups_of_one_change_nothing(options: dict[str, Any]) -> None:
    model = models.build()
    before = ir.to_proto(model).SerializeToString()
    pass_ = Cqil(Options(**options))
    assert not pass_.needs_calibration()
    report = pass_.call(model, Context())
    assert not report.modified
    assert ir.to_proto(model).SerializeToString() == before


def test_second_run_changes_nothing() -> None:
    model = models.build(layers=4)
    assert apply(model, first=0).modified
    before = ir.to_proto(model).SerializeToString()
    report = apply(model, first=0)
    assert not report.modified
    assert [s.reason for s in report.skipped] == ["layer 0 is a group already"]
    assert ir.to_proto(model).SerializeToString() == before


def test_same_input_gives_the_same_bytes() -> None:
    written = []
    for _ in range(2):
        model = models.build(layers=4, kv_cache=True)
        apply(model, first=0, bypass=0)
        written.append(ir.to_proto(model).SerializeToString())
    assert written[0] == written[1]


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 0}, "greater than or equal to 1"),
        ({"first": 3, "last": 2}, "first (3) comes after last (2); last is inclusive"),
        ({"bypass": -1}, "expected 'symmetric', 'full' or a distance from 0"),
        ({"bypass": "sideways"}, "bypass"),
        ({"budget": 0}, "greater than 0"),
        ({"groups": 2}, "Extra inputs are not permitted"),
    ],
)
def test_rejects_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError) as error:
        Options(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("bypass", ["0", "2", "symmetric", "full"])
def test_bypass_is_read_from_text(bypass: str) -> None:
    expected = int(bypass) if bypass.isdigit() else bypass
    assert Options.model_validate({"bypass": bypass}).bypass == expected


def test_window_beyond_the_model_is_an_error_of_the_option() -> None:
    with pytest.raises(OptionError, match="option 'last' is 9, but the model has 2 layers"):
        apply(models.build(), first=0, last=9)


def test_automatic_partition_without_data_says_what_to_add() -> None:
    assert Cqil(Options()).needs_calibration()
    with pytest.raises(CalibrationError, match="add --calibration, or name the layers"):
        apply(models.build())


# --- automatic partition -------------------------------------------------------------------------


def test_automatic_partition_stays_within_the_budget() -> None:
    model = models.build(layers=5)
    data = calibration(model)
    reference = data.reference(model)
    report = apply(model, Context(calibration=data), budget=2.0)
    measured = data.drift(reference, model).kl
    assert measured is not None
    assert measured <= 2.0
    assert report.details["damage"] == pytest.approx(measured, rel=1e-4)  # printed to 6 digits
    assert report.details["metric"] == "kl"
    assert report.details["depth"][1] == 5 - sum(len(g) - 1 for g in groups_of(report))


def test_tiny_budget_groups_nothing_and_says_so() -> None:
    model = models.build(layers=3)
    report = apply(model, Context(calibration=calibration(model)), budget=1e-9)
    assert not report.modified
    assert report.skipped[-1].reason.startswith("the best group costs ")
    assert report.skipped[-1].reason.endswith(" kl, the budget is 1e-09")


def test_layers_that_do_nothing_are_grouped_first() -> None:
    # Layers 2 and 4 add nothing to the stream: grouping them with a neighbour is exact.
    model = models.build(layers=6, zero_layers=(2, 4))
    report = apply(model, Context(calibration=calibration(model)), budget=1e-6)
    grouped = {layer for group in groups_of(report) for layer in group}
    assert {2, 4} <= grouped
    assert report.details["depth"][1] <= 4


def test_depth_is_reached_whatever_the_damage() -> None:
    model = models.build(layers=5)
    report = apply(model, Context(calibration=calibration(model)), depth=2)
    assert report.details["depth"] == [5, 2]
    assert report.details["budget"] is None
    assert len(find_blocks(model).blocks) == 2


def test_depth_that_cannot_be_reached_is_reported() -> None:
    model = models.build(layers=4, epsilons=(1e-5, 1e-5, 1e-6, 1e-6))
    report = apply(model, Context(calibration=calibration(model)), depth=1)
    assert report.details["depth"] == [4, 2]
    assert report.skipped[-1].reason == "depth 1 is not reached: no further legal group"


def test_automatic_partition_is_no_worse_than_any_window_of_equal_depth() -> None:
    model = models.build(layers=5)
    data = calibration(model)
    reference = data.reference(model)
    best = apply(model, Context(calibration=data), depth=3).details["damage"]
    for first, last, group in ((0, 3, 2), (1, 4, 2), (0, 2, 3), (1, 3, 3), (2, 4, 3)):
        other = models.build(layers=5)
        apply(other, first=first, last=last, group=group)
        kl = data.drift(reference, other).kl
        assert kl is not None
        assert best <= kl * (1 + 1e-5)  # damage is printed to 6 digits


def test_automatic_partition_skips_illegal_groups_with_their_reason() -> None:
    model = models.build(layers=4, epsilons=(1e-5, 1e-5, 1e-6, 1e-6))
    report = apply(model, Context(calibration=calibration(model)), depth=1)
    assert groups_of(report) == [[0, 1], [2, 3]]
    assert (report.skipped[0].site, report.skipped[0].reason) == (
        "layers 1-2",
        "layers 1 and 2 have different norm epsilons",
    )


def test_automatic_partition_reports_similarity_and_path() -> None:
    model = models.build(layers=4)
    report = apply(model, Context(calibration=calibration(model)), depth=2)
    assert {"layers", "damage", "cosine"} == set(report.details["single"][0])
    assert [step["depth"] for step in report.details["path"]] == [3, 2]
    json.dumps(report.details)


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden_cases.cases("cqil"), ids=lambda case: case.name)
def test_golden_case(case: Case) -> None:
    model = case.model()
    config = _config(case)
    definition = Definition(config, case.model(), [[0, 1]], case.options.get("bypass", "symmetric"))
    apply(model, **case.options)
    assert golden_cases.text(model) == golden_cases.text(case.after)
    feed = models.feed(config, past=3)
    expected = definition.run(feed)
    if config.kv_cache:
        for kind in ("key", "value"):
            first, second = (feed.pop(f"past_key_values.{i}.{kind}") for i in (0, 1))
            feed[f"past_key_values.0.{kind}"] = np.concatenate([first, second], axis=1)
    runner = OrtRunner(ir.from_proto(case.after))
    actual = runner.run({k: feed[k] for k in runner.input_names})["logits"]
    # The figure required of the method: 1e-5 of the largest output, in float32.
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def _config(case: Case) -> models.Config:
    """The small configuration all golden cases share, with what the file's graph tells."""
    ops = {node.op_type for node in case.before.graph.node}
    names = {i.name for i in case.before.graph.initializer}
    adds = sum(node.op_type == "Add" for node in case.before.graph.node)
    return models.Config(
        hidden=2, heads=1, kv_heads=1, head_dim=2, ffn=1, vocab=3, rotary=False, mask=False,
        norm="layer" if "LayerNormalization" in ops else "rms",
        gated="layers.0.gate.weight" in names,
        activation="gelu" if "Gelu" in ops else "relu" if "Relu" in ops else "silu",
        bias=adds > 4,
        style="pre-norm" if "layers.0.norm2.weight" in names else "parallel",
        kv_cache=len(case.before.graph.input) > 1,
    )  # fmt: skip
