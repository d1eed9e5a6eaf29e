"""Tokens are reduced in what exporters write, and in the model that ships."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import exporters
import families
import numpy as np
import onnx_ir as ir
import pytest
import tokens_accuracy
from rewriters import Cell

from optimizer.errors import OptionError
from optimizer.model_io import load_model
from optimizer.pass_base import Context, Report
from optimizer.runners.ort import OrtRunner
from passes import get_pass
from passes.canonicalize import Canonicalize

METHODS = ("tome", "crossget", "prune-tokens")
TOKENS = 12


def canonical(family: str, way: str, *, fixed: bool = True) -> ir.Model:
    """An export, with texts of ``TOKENS`` tokens if ``fixed``, else of any number."""
    model = load_model(exporters.export(Cell(families.FAMILIES[family], way)))
    for value in (*model.graph.inputs, *model.graph.outputs) if fixed else ():
        sizes = [TOKENS if str(d).startswith("sequence") else d for d in value.shape]
        value.shape = ir.Shape(sizes)
    Canonicalize().call(model, Context())
    return model


def apply(name: str, model: ir.Model, **options: Any) -> Report:
    pass_class = get_pass(name)
    return pass_class(pass_class.Options(**options)).call(model, Context())


def feed_of(model: ir.Model, batch: int) -> dict[str, np.ndarray]:
    """Random images or texts, the last of which is shorter."""
    rng, result = np.random.default_rng(0), {}
    for spec in OrtRunner(model).inputs:
        shape = (batch, *spec.shape[1:])
        if "mask" in spec.name:
            result[spec.name] = np.ones(shape, np.int64)
            result[spec.name][-1, 8:] = 0
        elif "ids" in spec.name:
            most = 2 if "type" in spec.name else families.VOCAB - 5
            result[spec.name] = rng.integers(0, most, shape)
        else:
            result[spec.name] = rng.normal(0, 1, shape).astype(np.float32)
    return result


@pytest.mark.parametrize(
    ("family", "way", "protected"),
    [
        ("vit", "torchscript-17", [0]),
        ("dinov2", "dynamo-18", [0]),
        ("siglip-vision", "dynamo-18", []),
        ("bert", "torchscript-17", [0]),
        ("bert", "dynamo-18", [0]),
    ],
)
def test_exports_are_reduced_alike_in_both_lowerings(
    family: str, way: str, protected: list[int]
) -> None:
    original = canonical(family, way)
    feed = feed_of(original, 3)
    before = OrtRunner(original).run(feed)
    for name in METHODS:
        results = []
        for lowering in ("gather", "matrix"):
            model = original.clone()
            report = apply(name, model, r=2, lowering=lowering)
            assert report.applied == 2
            assert report.details["towers"][0]["protected"] == protected
            results.append(OrtRunner(model).run(feed))
        for key, array in before.items():
            assert results[0][key].shape == array.shape
            # two roundings of float32 of the same numbers
            difference = np.abs(results[0][key] - results[1][key]).max()
            assert difference <= 1e-5 * np.abs(array).max(), (name, key)


@pytest.mark.parametrize("way", ["torchscript-17", "dynamo-18"])
def test_an_open_number_of_tokens_can_be_fixed(way: str) -> None:
    """A default export with tokens=12 is what an export with twelve tokens is."""
    fixed, model = canonical("bert", way), canonical("bert", way, fixed=False)
    report = apply("tome", model.clone(), r=2)
    assert not report.modified
    assert "option tokens=N makes it N for all" in report.skipped[0].reason
    assert apply("tome", model, r=2, tokens=TOKENS).applied == 2
    assert apply("tome", fixed, r=2).applied == 2
    for value in model.graph.inputs:
        assert value.shape[1] == TOKENS
    assert not isinstance(model.graph.outputs[0].shape[0], int)
    feed = feed_of(fixed, 3)
    results = [OrtRunner(m).run(feed) for m in (fixed, model)]
    for key, array in results[0].items():
        assert results[1][key].shape == array.shape
        assert np.abs(results[1][key] - array).max() <= 1e-5 * np.abs(array).max()


@pytest.mark.parametrize("way", ["torchscript-17", "dynamo-18"])
def test_a_causal_text_tower_keeps_its_order_and_its_end(way: str) -> None:
    """CLIP's, as it is exported by default, with an open number of tokens."""
    original = canonical("clip-text", way, fixed=False)
    feed = feed_of(canonical("clip-text", way), 3)
    feed["input_ids"][:, 9] = families._END
    before, results = OrtRunner(original).run(feed), []
    for lowering in ("gather", "matrix"):
        model = original.clone()
        report = apply("crossget", model, r=2, lowering=lowering, tokens=TOKENS)
        assert report.applied == 2
        assert report.details["towers"][0]["end_protected"]
        results.append(OrtRunner(model).run(feed))
    for key, array in before.items():
        assert results[0][key].shape == array.shape
        difference = np.abs(results[0][key] - results[1][key]).max()
        assert difference <= 1e-5 * np.abs(array).max()
        assert np.abs(results[0][key] - array).max() > 1e-3 * np.abs(array).max()


@pytest.mark.parametrize("family", ["bert", "clip-text"])
def test_more_tokens_than_there_are_positions_are_refused(family: str) -> None:
    model = canonical(family, "dynamo-18", fixed=False)
    with pytest.raises(OptionError, match=r"does not run with 4096 tokens .*or fewer"):
        apply("crossget", model, r=2, tokens=4096)


def test_a_model_left_alone_keeps_its_open_axes() -> None:
    model = canonical("llama", "dynamo-18", fixed=False)
    before = [value.shape for value in model.graph.inputs]
    report = apply("tome", model, r=2, tokens=TOKENS)
    assert not report.modified
    assert [value.shape for value in model.graph.inputs] == before


def test_windows_are_refused_with_their_reason() -> None:
    model = canonical("swin", "dynamo-18")
    report = apply("tome", model, r=1)
    assert not report.modified
    assert Counter("windows" in skip.reason for skip in report.skipped) == {True: 4}


def test_the_shipped_model_is_as_accurate_as_recorded() -> None:
    """On digits that training has not seen: at most one point less with a quarter of the tokens."""
    recorded = json.loads(tokens_accuracy.RESULTS.read_text("utf-8"))
    task = tokens_accuracy.digits_vit(recorded["copies"])
    rows = {(r["method"], r["keep"]): r for r in recorded["models"]["digits-vit"]["rows"]}
    # An image whose two best scores differ in the last bits may turn between machines.
    near = 2 / len(task.images)
    before = tokens_accuracy.accuracy(task, task.model)
    assert before == pytest.approx(rows["original", 1.0]["accuracy"], abs=near)
    for method, keep in (("tome", 0.75), ("crossget", 0.75), ("prune-tokens", 0.5)):
        model, row = tokens_accuracy.reduced(task, method, keep)
        assert row["removed"] == rows[method, keep]["removed"]
        found = tokens_accuracy.accuracy(task, model)
        assert found == pytest.approx(rows[method, keep]["accuracy"], abs=near)
        assert keep < 0.75 or found >= before - 0.01


@pytest.mark.skipif(not tokens_accuracy.ASSETS.is_dir(), reason="the shared assets are not here")
def test_a_model_made_by_others_is_as_accurate_as_recorded() -> None:
    recorded = json.loads(tokens_accuracy.RESULTS.read_text("utf-8"))["models"]["mnist-vit"]
    rows = {(r["method"], r["keep"]): r for r in recorded["rows"]}
    task = tokens_accuracy.mnist_vit(tokens_accuracy.ASSETS)
    model, row = tokens_accuracy.reduced(task, "crossget", 0.5)
    assert row["removed"] == rows["crossget", 0.5]["removed"]
    found = tokens_accuracy.accuracy(task, model)
    assert found == pytest.approx(rows["crossget", 0.5]["accuracy"], abs=2 / len(task.images))
