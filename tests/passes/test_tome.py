"""Token merging: equal to a float64 reference in both lowerings, and what it refuses."""

from __future__ import annotations

from typing import Any

import models
import numpy as np
import onnx
import onnx_ir as ir
import pydantic
import pytest
import token_reference as reference

from optimizer.blocks import find_blocks
from optimizer.conformance.encoders import Encoder, build_encoder, encoder_feed
from optimizer.errors import OptionError
from optimizer.fingerprint import fingerprint
from optimizer.pass_base import Context, Report
from optimizer.runners.ort import OrtRunner
from passes.tome import Options, ToMe

LOWERINGS = ("gather", "matrix")


def apply(model: ir.Model, target: str = "ort-cpu", **options: Any) -> Report:
    report = ToMe(Options(**options)).call(model, Context(target=target))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return report


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return OrtRunner(model).run(feed)


def exposed(model: ir.Model, *names: str) -> ir.Model:
    """The model with intermediate values as outputs."""
    for node in model.graph:
        for value in node.outputs:
            if value.name in names:
                value.type = ir.TensorType(ir.DataType.FLOAT)
                value.shape = None
                model.graph.outputs.append(value)
    return model


# Against the reference


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("special", [0, 1, 2])
@pytest.mark.parametrize("removed", [(3, 2, 2), (6, 3, 1)], ids=["some", "all-that-may-go"])
def test_layers_equal_the_reference_in_float64(
    lowering: str, batch: int, special: int, removed: tuple[int, ...]
) -> None:
    """Every layer is followed: merge, sizes, and attention to as many copies as a token stands for.

    Tolerance 1e-5 of the largest number: float32 against float64, as the issue asks.
    """
    encoder = Encoder(patches=13, special=special)
    model = build_encoder(encoder)
    feed = encoder_feed(encoder, batch)
    report = apply(model, r=removed, lowering=lowering, places=True)
    assert report.applied == 3
    protected = list(range(special)) if special else [0]  # the head reads token 0
    assert report.details["towers"][0]["protected"] == protected
    blocks = find_blocks(build_encoder(encoder)).blocks
    names = [n for b in blocks for n in (f"layers.{b.index}.norm2.out", f"stream.{b.index + 1}")]
    found = run(exposed(model, *names), feed)
    expected = reference.run_encoder(encoder, feed, removed, protected, reference.tome)
    for name in names:
        scale = np.abs(expected[name]).max()
        assert found[name].shape == expected[name].shape
        assert np.abs(found[name] - expected[name]).max() <= 1e-5 * scale
    assert np.array_equal(found["token_places"], expected["places"])
    assert np.abs(found["logits"] - expected["logits"]).max() <= 1e-5 * scale


# Invariants


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_equal_tokens_are_merged_without_any_change(lowering: str) -> None:
    """Attention to one token of size s is attention to s equal ones (ToMe, eq. 1)."""
    encoder = Encoder(patches=16)
    model = build_encoder(encoder)
    position = model.graph.initializers["position"]
    position.const_value = ir.tensor(np.zeros(position.shape, np.float32), name="position")
    feed = encoder_feed(encoder)
    feed["patches"] = np.repeat(feed["patches"][:, :4], 4, axis=1)
    before = run(model, feed)["logits"]
    apply(model, r=(4, 2, 1), lowering=lowering)
    after = run(model, feed)["logits"]
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


@pytest.mark.parametrize("options", [{"r": 0}, {"keep": 1.0}, {"r": (0, 0, 0)}])
def test_nothing_to_remove_leaves_the_graph_unchanged(options: dict[str, Any]) -> None:
    model = build_encoder()
    before = fingerprint(model)
    report = apply(model, **options)
    assert not report.modified
    assert before.difference(fingerprint(model)) is None


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("head", ["class", "mean", "dense", "hidden"])
@pytest.mark.parametrize("style", ["pre-norm", "post-norm"])
def test_heads_get_the_tokens_they_need(lowering: str, head: str, style: str) -> None:
    """Both lowerings agree, shapes stay, and a class head is given protected tokens only."""
    encoder = Encoder(head=head)
    feed = encoder_feed(encoder)
    before = run(build_encoder(encoder, style=style), feed)
    results = []
    for chosen in (lowering, "gather"):
        model = build_encoder(encoder, style=style)
        report = apply(model, r=2, lowering=chosen)
        assert report.applied == 3
        assert bool(report.details["towers"][0]["given_back_to"]) == (head != "class")
        results.append(run(model, feed))
    for name, array in before.items():
        assert results[0][name].shape == array.shape
        assert np.abs(results[0][name] - results[1][name]).max() <= 1e-5 * np.abs(array).max()
        assert 1e-3 < np.abs(results[0][name] - array).max() < 2 * np.abs(array).max()


def test_a_mask_that_hides_nothing_is_left_out() -> None:
    plain, masked = build_encoder(), build_encoder(Encoder(mask="open"))
    for model in (plain, masked):
        assert apply(model, r=2).applied == 3
    feed = encoder_feed(Encoder())
    assert np.array_equal(run(plain, feed)["logits"], run(masked, feed)["logits"])


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_padding_goes_first_and_changes_no_real_token(lowering: str) -> None:
    """With as many tokens removed as there is padding in A, the result is that without any."""
    encoder = Encoder(patches=12, mask="padding")
    feed = encoder_feed(encoder, batch=1)
    padded = [8, 11, 12]
    feed["attention_mask"][0, padded] = 0
    before = run(build_encoder(encoder), feed)["logits"]
    model = build_encoder(encoder)
    assert apply(model, r=(2, 0, 0), lowering=lowering).applied == 1
    after = run(model, feed)["logits"]
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    feed["patches"][0, np.array(padded) - 1] = 7.0
    assert np.abs(run(model, feed)["logits"] - after).max() <= 1e-5 * np.abs(after).max()


def test_without_proportional_attention_padding_stays_hidden() -> None:
    encoder = Encoder(patches=12, mask="padding")
    feed = encoder_feed(encoder)
    model = build_encoder(encoder)
    apply(model, r=1, proportional=False)
    before = run(model, feed)["logits"]
    feed["patches"][feed["attention_mask"][:, 1:] == 0] = 7.0
    assert np.abs(run(model, feed)["logits"] - before).max() <= 1e-5 * np.abs(before).max()


# How many


@pytest.mark.parametrize(
    ("options", "removed"),
    [
        ({"r": 2}, [2, 2, 2]),
        ({"r": "2"}, [2, 2, 2]),
        ({"r": "3,0,1"}, [3, 0, 1]),
        ({"r": 2, "slope": -1}, [4, 2, 0]),
        ({"r": 2, "slope": 0.5}, [1, 2, 3]),
        ({"keep": 0.5}, [2, 2, 2]),
        ({}, [2, 2, 2]),
        ({"keep": 0.6}, [1, 2, 2]),
    ],
)
def test_schedules(options: dict[str, Any], removed: list[int]) -> None:
    report = apply(build_encoder(), **options)
    assert report.details["towers"][0]["removed"] == removed
    assert report.details["towers"][0]["left"] == 13 - sum(removed)


def test_more_than_there_are_is_clipped_and_said() -> None:
    model = build_encoder()
    report = apply(model, r=5)
    assert report.details["towers"][0]["removed"] == [5, 3, 2]
    assert report.notes == (
        "fewer tokens than asked for were removed in layer 1, 2: too few were left",
    )
    assert run(model, encoder_feed(Encoder()))["logits"].shape == (2, 5)


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(OptionError, match="r has 2 numbers, but the model has 3 layers"):
        apply(build_encoder(), r=(1, 2))


@pytest.mark.parametrize(
    "options", [{"r": -1}, {"r": 2, "keep": 0.5}, {"slope": 0.5}, {"keep": 0}, {"r": ""}]
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        Options(**options)


def test_more_tokens_can_be_protected() -> None:
    report = apply(build_encoder(), r=1, protect="-1,3")
    assert report.details["towers"][0]["protected"] == [0, 3, 12]


# Refusals


def test_fewer_than_two_tokens_are_left_alone() -> None:
    report = apply(build_encoder(Encoder(patches=1)), r=1)
    assert not report.modified
    assert "fewer than two of 2 tokens" in report.skipped[0].reason


def test_dense_heads_can_be_refused() -> None:
    report = apply(build_encoder(Encoder(head="dense")), r=1, dense="refuse")
    assert not report.modified
    assert "needs every token" in report.skipped[0].reason


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "rotary embeddings"),
        ({"rotary": False}, "the number of tokens is not the same for every input"),
        ({"kv_cache": True}, "keys and values are cached"),
        ({"style": "parallel"}, "side by side"),
    ],
)
def test_what_cannot_be_merged_is_left_alone_with_a_reason(
    config: dict[str, Any], reason: str
) -> None:
    model = models.build(**config)
    before = fingerprint(model)
    report = apply(model, r=1)
    assert not report.modified
    assert reason in report.skipped[0].reason
    assert before.difference(fingerprint(model)) is None


def test_a_second_run_changes_nothing() -> None:
    model = build_encoder()
    apply(model, r=1)
    report = apply(model, r=1)
    assert not report.modified
    assert report.skipped[0].reason == "its tokens are reduced already"
