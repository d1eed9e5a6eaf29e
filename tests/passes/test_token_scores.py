"""Maps of attention that are outputs: each original token gets its share of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optimizer.conformance.encoders import Encoder, build_encoder, encoder_feed
from optimizer.pass_base import Context, Report
from optimizer.runners.ort import OrtRunner
from passes import get_pass

ENCODER = Encoder(patches=16)
RAW, MASKED, WEIGHTS = 0, 1, 3


def build(mode: int, encoder: Encoder = ENCODER) -> ir.Model:
    """All scores are outputs; the last ones are read once more."""
    model = build_encoder(encoder)
    for index, node in enumerate([n for n in model.graph if n.op_type == "Attention"]):
        node.attributes["qk_matmul_output_mode"] = ir.AttrInt64("qk_matmul_output_mode", mode)
        node.resize_outputs(4)
        for number, unused in enumerate(node.outputs[1:3]):
            unused.name = f"present.{index}.{number}"
        scores = node.outputs[3]
        scores.name, scores.type = f"scores.{index}", ir.TensorType(ir.DataType.FLOAT)
        scores.shape = ir.Shape(["batch", 4, encoder.count, encoder.count])
        model.graph.outputs.append(scores)
    read = ir.node("Neg", [scores], outputs=[ir.Value(name="negative", type=scores.type)])
    read.outputs[0].shape = scores.shape
    model.graph.append(read)
    model.graph.outputs.append(read.outputs[0])
    return model


def apply(name: str, model: ir.Model, **options: Any) -> Report:
    pass_class = get_pass(name)
    report = pass_class(pass_class.Options(**options)).call(model, Context())
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return report


@pytest.mark.parametrize("mode", [RAW, WEIGHTS])
@pytest.mark.parametrize("lowering", ["gather", "matrix"])
@pytest.mark.parametrize("name", ["tome", "crossget"])
def test_between_equal_tokens_scores_are_those_of_the_original(
    name: str, lowering: str, mode: int
) -> None:
    """Attention to a token of size s is attention to s equal ones, of which each has its share."""
    model = build(mode)
    position = model.graph.initializers["position"]
    position.const_value = ir.tensor(np.zeros(position.shape, np.float32), name="position")
    feed = encoder_feed(ENCODER)
    feed["patches"] = np.repeat(feed["patches"][:, :4], 4, axis=1)
    before = OrtRunner(model).run(feed)
    assert apply(name, model, r=(4, 2, 1), lowering=lowering).applied == 3
    after = OrtRunner(model).run(feed)
    for key, array in before.items():
        assert after[key].shape == array.shape
        assert np.abs(after[key] - array).max() <= 1e-5 * np.abs(array).max(), key


@pytest.mark.parametrize("name", ["tome", "crossget", "prune-tokens"])
@pytest.mark.parametrize("proportional", [True, False])
def test_each_token_attends_to_one_in_all(name: str, proportional: bool) -> None:
    model = build(WEIGHTS)
    apply(name, model, r=3, proportional=proportional)
    found = OrtRunner(model).run(encoder_feed(ENCODER))
    for index in range(3):
        sums = found[f"scores.{index}"].sum(axis=-1)
        assert np.allclose(sums, 1, atol=1e-5)
    assert np.array_equal(found["negative"], -found["scores.2"])


@pytest.mark.parametrize(
    ("mode", "encoder", "reason"),
    [
        (MASKED, ENCODER, "read after a mask was added to them"),
        (WEIGHTS, Encoder(patches=16, mask="padding"), "where there is padding"),
    ],
)
def test_scores_that_cannot_be_given_back(mode: int, encoder: Encoder, reason: str) -> None:
    report = apply("tome", build(mode, encoder), r=1)
    assert not report.modified
    assert reason in report.skipped[0].reason
