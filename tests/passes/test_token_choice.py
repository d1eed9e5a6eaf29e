"""CrossGET's matching and token pruning equal their references; what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import token_reference as reference

from optimizer.conformance.encoders import Encoder, build_encoder, encoder_feed
from optimizer.pass_base import Context, Report
from optimizer.runners.ort import OrtRunner
from passes import get_pass

LOWERINGS = ("gather", "matrix")
REMOVED = (3, 2, 2)


def apply(name: str, model: ir.Model, **options: Any) -> Report:
    pass_class = get_pass(name)
    report = pass_class(pass_class.Options(**options)).call(model, Context())
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return report


def exposed(model: ir.Model, names: list[str]) -> ir.Model:
    for value in [v for n in model.graph for v in n.outputs if v.name in names]:
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), None
        model.graph.outputs.append(value)
    return model


CASES: dict[str, tuple[str, dict[str, Any], reference.Method, tuple[int, ...]]] = {
    "crossget": ("crossget", {"guidance": "none"}, reference.crossget(None), (0,)),
    "crossget guided": ("crossget", {}, reference.crossget(0), (0,)),
    "crossget ensemble": (
        "crossget", {"ensemble": True}, reference.crossget(0, ensemble=True), (0,),
    ),
    "crossget guided from behind": (
        "crossget", {"guidance": -1}, reference.crossget(1), (0, -1),
    ),
    "pruning": ("prune-tokens", {}, reference.evit(0), (0,)),
    "pruning by all": ("prune-tokens", {"guidance": "all"}, reference.evit(None), (0,)),
    "pruning by the last": ("prune-tokens", {"guidance": -1}, reference.evit(1), (0, -1)),
}  # fmt: skip


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("patches", [13, 14])
def test_layers_equal_the_reference_in_float64(lowering: str, case: str, patches: int) -> None:
    name, options, method, protected = CASES[case]
    encoder = Encoder(patches=patches)
    feed = encoder_feed(encoder, batch=2)
    positions = [p % encoder.count for p in protected]
    model = build_encoder(encoder)
    report = apply(name, model, r=REMOVED, lowering=lowering, places=True, **options)
    assert report.details["towers"][0]["removed"] == list(REMOVED)
    assert report.details["towers"][0]["protected"] == positions
    names = [n for i in range(3) for n in (f"layers.{i}.norm2.out", f"stream.{i + 1}")]
    found = OrtRunner(exposed(model, names)).run(feed)
    expected = reference.run_encoder(
        encoder, feed, REMOVED, positions, method, proportional=name == "crossget"
    )
    for key in (*names, "logits"):
        assert found[key].shape == expected[key].shape
        # float32 against float64
        assert np.abs(found[key] - expected[key]).max() <= 1e-5 * np.abs(expected[key]).max()
    assert np.array_equal(found["token_places"], expected["places"])


@pytest.mark.parametrize("name", ["crossget", "prune-tokens"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_equal_tokens_are_reduced_without_any_change(name: str, lowering: str) -> None:
    model = build_encoder(Encoder(patches=16))
    position = model.graph.initializers["position"]
    position.const_value = ir.tensor(np.zeros(position.shape, np.float32), name="position")
    feed = encoder_feed(Encoder(patches=16))
    feed["patches"] = np.repeat(feed["patches"][:, :1], 16, axis=1)
    before = OrtRunner(model).run(feed)["logits"]
    apply(name, model, r=(4, 2, 1), lowering=lowering, proportional=True)
    after = OrtRunner(model).run(feed)["logits"]
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


@pytest.mark.parametrize("name", ["crossget", "prune-tokens"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_padding_has_no_effect(name: str, lowering: str) -> None:
    encoder = Encoder(patches=12, mask="padding")
    feed = encoder_feed(encoder)
    model = build_encoder(encoder)
    assert apply(name, model, r=1, lowering=lowering).applied == 3
    before = OrtRunner(model).run(feed)["logits"]
    feed["patches"][feed["attention_mask"][:, 1:] == 0] = 7.0
    after = OrtRunner(model).run(feed)["logits"]
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()


@pytest.mark.parametrize("name", ["crossget", "prune-tokens"])
def test_all_that_can_go_may_go(name: str) -> None:
    model = build_encoder()
    report = apply(name, model, r=50)
    assert report.details["towers"][0]["left"] == (2 if name == "prune-tokens" else 3)
    assert "too few were left" in report.notes[0]
    assert np.isfinite(OrtRunner(model).run(encoder_feed(Encoder()))["logits"]).all()


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_without_protected_tokens_all_may_become_one(lowering: str) -> None:
    """The mean of all tokens, weighted by attention, in the place of each."""
    encoder = Encoder(special=0, head="mean")
    model = build_encoder(encoder)
    report = apply("prune-tokens", model, r=(0, 0, 50), lowering=lowering)
    assert report.details["towers"][0]["left"] == 1
    found = OrtRunner(exposed(model, ["layers.2.norm2.out"])).run(encoder_feed(encoder))
    assert found["layers.2.norm2.out"].shape[1] == 1
    assert np.isfinite(found["logits"]).all()


def test_a_protected_token_between_others_would_move() -> None:
    report = apply("crossget", build_encoder(), r=1, protect="5")
    assert not report.modified
    assert "others on both sides" in report.skipped[0].reason
