"""Image tokens are reduced where text reads them, too: in one graph with the text part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fusion_exports
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import token_reference as reference
from fusion_models import ENCODER, Fusion, answers, build_fusion, fusion_feed
from tokens_accuracy import canonical

from optimizer.conformance.encoders import Encoder, build_encoder, encoder_feed
from optimizer.frontends.onnx_export import quiet
from optimizer.pass_base import Context, Report
from optimizer.runners.ort import OrtRunner
from passes import get_pass

LOWERINGS = ("gather", "matrix")
REMOVED = (3, 2, 2)
METHODS: dict[str, reference.Method] = {
    "tome": reference.tome,
    "crossget": reference.crossget(0),
    "prune-tokens": reference.evit(0),
}
CROSSED = Fusion("crossed")
JOINED = {
    "behind": Fusion("joined"),
    "between": Fusion("joined", prompt=True),
    "learned positions": Fusion("joined", prompt=True, positions="learned"),
}
FLAG = Fusion("joined", causal="flag")


def apply(name: str, model: ir.Model, **options: Any) -> Report:
    pass_class = get_pass(name)
    report = pass_class(pass_class.Options(r=REMOVED, **options)).call(model, Context())
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return report


def agrees(model: ir.Model, fusion: Fusion, name: str, **options: Any) -> None:
    """In every number, to float32 of the largest against float64."""
    feed = fusion_feed(fusion)
    found = OrtRunner(model).run(feed)["answer"]
    expected = answers(fusion, feed, REMOVED, METHODS[name], **options)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def widths(model: ir.Model, fusion: Fusion) -> tuple[int, int]:
    """Queries and keys that the text's attention gets."""
    node = next(n for n in model.graph if n.outputs[0].name == "text_attention.0")
    for value in node.inputs[:2]:
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), None
        model.graph.outputs.append(value)
    found = OrtRunner(model).run(fusion_feed(fusion))
    q, k = (found[value.name].shape[1] for value in node.inputs[:2])
    return q, k


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", METHODS)
def test_cross_attention_reads_the_tokens_that_are_left(lowering: str, name: str) -> None:
    """Fewer keys; each counts as often as it stands for; nothing is given back."""
    model = build_fusion(CROSSED)
    report = apply(name, model, lowering=lowering)
    assert report.applied == 3
    assert not report.details["towers"][0]["given_back_to"]
    agrees(model, CROSSED, name, proportional=name != "prune-tokens")
    assert widths(model, CROSSED) == (4, 13 - sum(REMOVED))


def test_without_proportional_attention_text_counts_each_token_once() -> None:
    model = build_fusion(CROSSED)
    apply("tome", model, proportional=False)
    agrees(model, CROSSED, "tome", proportional=False)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", ["tome", "crossget"])
@pytest.mark.parametrize("case", JOINED)
def test_a_joined_sequence_is_shorter_and_text_keeps_its_positions(
    lowering: str, name: str, case: str
) -> None:
    fusion = JOINED[case]
    model = build_fusion(fusion)
    report = apply(name, model, lowering=lowering)
    assert report.applied == 3
    assert not report.notes
    assert report.details["towers"][0]["given_back_to"] == ["output 'answer'"]
    agrees(model, fusion, name)
    texts = 7 if fusion.prompt else 4
    assert widths(model, fusion) == (12 - sum(REMOVED) + texts,) * 2


def test_the_causal_flag_needs_tokens_in_their_order() -> None:
    model = build_fusion(FLAG)
    assert not apply("crossget", model).notes
    agrees(model, FLAG, "crossget")
    assert widths(model, FLAG)[1] == 12 - sum(REMOVED) + 4
    model = build_fusion(FLAG)
    report = apply("tome", model)
    assert report.applied == 3
    assert "given back before others are joined: it is causal" in report.notes[0]
    assert report.details["towers"][0]["given_back_to"] == ["Concat"]
    assert widths(model, FLAG)[1] == 12 + 4


@pytest.mark.parametrize(
    ("name", "fusion", "reason"),
    [
        ("crossget", Fusion("joined", cached=True), "its keys and values are cached"),
        ("prune-tokens", JOINED["behind"], "several have become one"),
    ],
)
def test_all_tokens_are_given_back_before_what_cannot_take_fewer(
    name: str, fusion: Fusion, reason: str
) -> None:
    model = build_fusion(fusion)
    report = apply(name, model)
    assert report.applied == 3
    assert reason in report.notes[0]
    assert widths(model, fusion)[1] == 12 + 4


def test_data_with_a_row_per_token_is_added_to_all_tokens() -> None:
    """A shortcut from in front of the layers is no table of positions: tokens are given back."""
    model = build_encoder(Encoder(head="hidden"))
    graph, final = model.graph, model.graph.outputs[1]
    shortcut = next(v for n in graph for v in n.outputs if v.name == "stream.0")
    added = ir.node("Add", [final, shortcut], outputs=[ir.Value(name="sum", type=final.type)])
    added.outputs[0].shape = final.shape
    graph.append(added)
    graph.outputs[1] = added.outputs[0]
    report = apply("tome", model)
    assert report.applied == 3
    assert report.details["towers"][0]["given_back_to"] == ["Add"]


def test_a_text_layer_without_tokens_less_is_unchanged() -> None:
    model = build_fusion(JOINED["between"])
    pass_class = get_pass("crossget")
    assert not pass_class(pass_class.Options(keep=1.0)).call(model, Context()).modified


def test_tokens_read_inside_of_a_branch_are_refused() -> None:
    model = build_encoder(Encoder(head="hidden"))
    graph, stream = model.graph, model.graph.outputs[1]
    branches = []
    for name in ("then", "else"):
        inner = ir.node("Identity", [stream], outputs=[ir.Value(name=f"{name}_out")])
        inner.outputs[0].type, inner.outputs[0].shape = stream.type, stream.shape
        branches.append(ir.Graph([], inner.outputs, nodes=[inner], name=name))
    flag = ir.Value(
        name="flag", const_value=ir.tensor(np.array(True), name="flag"),
        type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]),
    )  # fmt: skip
    graph.register_initializer(flag)
    node = ir.node(
        "If", [flag], {"then_branch": branches[0], "else_branch": branches[1]},
        outputs=[ir.Value(name="chosen", type=stream.type, shape=stream.shape)],
    )  # fmt: skip
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    report = apply("tome", model)
    assert not report.modified
    assert "inside of a branch or loop reads the tokens" in report.skipped[0].reason


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("blip", 3), ("llava", 2)])
def test_exports_are_reduced_on_the_side_of_the_text_too(
    name: str, layers: int, tmp_path: Path
) -> None:
    """Text layers read 17 - 2 per layer tokens; both lowerings agree; of equal ones it is exact."""
    pytest.importorskip("transformers")
    path = tmp_path / "model.onnx"
    with quiet():
        getattr(fusion_exports, name)(path)
    original = canonical(path)
    feed = fusion_exports.feed_of([v.name for v in original.graph.inputs])
    before = OrtRunner(original).run(feed)
    for method in ("tome", "crossget"):
        results = []
        for lowering in LOWERINGS:
            model, pass_class = original.clone(), get_pass(method)
            chosen = pass_class.Options(r=2, lowering=lowering)
            report = pass_class(chosen).call(model, Context())
            assert report.applied == layers
            assert not report.notes
            assert report.details["towers"][0]["read_by"] == [layers, layers + 1]
            assert all("reads the tokens that are left" in s.reason for s in report.skipped)
            results.append((model, OrtRunner(model).run(feed)))
        for key, array in before.items():
            found = [result[key] for _, result in results]
            assert found[0].shape == array.shape
            assert np.abs(found[0] - found[1]).max() <= 1e-5 * np.abs(array).max()
            assert np.abs(found[0] - array).max() > 1e-4 * np.abs(array).max()
        if name == "blip":  # without positions, and all patches alike
            flat = feed | {"pixel_values": np.full_like(feed["pixel_values"], 0.3)}
            exact = OrtRunner(original).run(flat)["match"]
            found = OrtRunner(results[0][0]).run(flat)["match"]
            assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("name", METHODS)
def test_patches_without_the_class_token_are_given_back(name: str) -> None:
    """A Slice that leaves the class token out is followed; each patch gets the token it is in."""
    model = build_encoder(ENCODER)
    graph, final = model.graph, model.graph.outputs.pop()
    values = []
    for number in (1, 2**63 - 1, 1):
        tensor = ir.tensor(np.array([number], np.int64), name=f"bound.{len(values)}")
        values.append(
            ir.Value(
                name=tensor.name,
                const_value=tensor,
                type=ir.TensorType(ir.DataType.INT64),
                shape=ir.Shape([1]),
            )
        )
        graph.register_initializer(values[-1])
    part = ir.node("Slice", [final, *values], outputs=[ir.Value(name="patches_out")])
    doubled = ir.node("Add", [part.outputs[0]] * 2, outputs=[ir.Value(name="doubled")])
    doubled.outputs[0].type, doubled.outputs[0].shape = final.type, ir.Shape(["batch", 12, 32])
    final.shape = None
    graph.extend([part, doubled])
    graph.outputs.append(doubled.outputs[0])
    assert apply(name, model).details["towers"][0]["given_back_to"] == ["output 'doubled'"]
    feed = encoder_feed(ENCODER)
    found = OrtRunner(model).run(feed)["doubled"]
    rows = reference.run_encoder(
        ENCODER, feed, REMOVED, [0], METHODS[name], proportional=name != "prune-tokens"
    )  # fmt: skip
    expected = np.stack([2 * f[p[1:]] for f, p in zip(rows["final"], rows["places"], strict=True)])
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
