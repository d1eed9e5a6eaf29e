"""Causal towers, such as CLIP's of text: order is kept, and the end of the text is protected."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import token_reference as reference
from causal_models import ENCODER, ENDS, build, feed_of

from optimizer.legalize import legalize
from optimizer.pass_base import Context, Report
from optimizer.runners.ort import OrtRunner
from passes import get_pass

REMOVED = (3, 2, 2)
NAMES = [n for i in range(3) for n in (f"layers.{i}.norm2.out", f"stream.{i + 1}")]


def apply(model: ir.Model, name: str = "crossget", **options: Any) -> Report:
    pass_class = get_pass(name)
    report = pass_class(pass_class.Options(**options)).call(model, Context())
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return report


def exposed(model: ir.Model) -> ir.Model:
    for value in [v for n in model.graph for v in n.outputs if v.name in NAMES]:
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), None
        model.graph.outputs.append(value)
    return model


@pytest.mark.parametrize("lowering", ["gather", "matrix"])
@pytest.mark.parametrize("guidance", ["auto", "none"])
@pytest.mark.parametrize("ensemble", [False, True])
def test_layers_equal_the_reference_in_float64(
    lowering: str, guidance: str, *, ensemble: bool
) -> None:
    """The token at the end of each row is never merged, nothing goes into it, and it guides."""
    model = build()
    options = {"guidance": guidance, "ensemble": ensemble, "lowering": lowering}
    report = apply(model, r=REMOVED, places=True, **options)
    assert report.applied == 3
    assert report.details["towers"][0]["removed"] == list(REMOVED)
    feed = feed_of(model)
    found = OrtRunner(exposed(model)).run(feed)
    guide = 0 if guidance == "auto" else None
    weighed = ensemble and guide is not None
    method = reference.crossget(guide, ensemble=weighed)
    expected = reference.run_encoder(
        ENCODER, feed, REMOVED, (), method, causal=True, taken=ENDS
    )  # fmt: skip
    for name in (*NAMES, "logits"):
        assert found[name].shape == expected[name].shape
        # float32 against float64
        assert np.abs(found[name] - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max()
    assert np.array_equal(found["token_places"], expected["places"])


def test_what_runs_fastest_computes_the_same() -> None:
    model = build(padding=True)
    apply(model, r=2)
    feed = feed_of(model)
    before = OrtRunner(model).run(feed)["logits"]
    legalize(model, "ort-cpu")
    after = OrtRunner(model).run(feed)["logits"]
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def test_padding_has_no_effect() -> None:
    model = build(padding=True)
    assert apply(model, r=1).applied == 3
    feed = feed_of(model)
    before = OrtRunner(model).run(feed)["logits"]
    feed["patches"][feed["attention_mask"] == 0] = 7.0
    after = OrtRunner(model).run(feed)["logits"]
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()


def test_one_token_less_can_go_than_without_an_end() -> None:
    assert apply(build(), r=9).details["towers"][0]["removed"] == [5, 3, 1]


@pytest.mark.parametrize("name", ["tome", "prune-tokens"])
def test_methods_that_change_the_order_are_refused(name: str) -> None:
    report = apply(build(), name, r=2)
    assert not report.modified
    assert "causal, and merging changes the order" in report.skipped[0].reason


def test_other_masks_are_refused() -> None:
    report = apply(build(future=False), r=2)
    assert not report.modified
    assert "hides more than padding and what comes later" in report.skipped[0].reason
