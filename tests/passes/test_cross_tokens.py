"""Learned cross tokens: given in a file, or by the model, they guide as the reference says."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import token_reference as reference

from optimizer.conformance.encoders import Encoder, build_encoder, encoder_feed
from optimizer.errors import OptionError
from optimizer.fingerprint import fingerprint
from optimizer.pass_base import Context, Report
from optimizer.runners.ort import OrtRunner
from optimizer.tokens.cross_tokens import insert_cross
from optimizer.tokens.flow import Keeps
from optimizer.tokens.towers import find_towers
from passes.crossget import CrossGet, Options

REMOVED = (3, 2, 2)
ENCODER = Encoder(patches=13)
TOKENS = np.random.default_rng(9).normal(0, 0.6, (3, 32))
NAMES = [n for i in range(3) for n in (f"layers.{i}.norm2.out", f"stream.{i + 1}")]


def apply(model: ir.Model, **options: Any) -> Report:
    report = CrossGet(Options(**options)).call(model, Context())
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return report


def stored(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "cross.npz", **arrays)
    return str(folder / "cross.npz")


def exposed(model: ir.Model) -> ir.Model:
    for value in [v for n in model.graph for v in n.outputs if v.name in NAMES]:
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), None
        model.graph.outputs.append(value)
    return model


def agrees(model: ir.Model, *, ensemble: bool = True) -> None:
    """In every layer, to float32 of the largest number against float64."""
    feed = encoder_feed(ENCODER)
    found = OrtRunner(exposed(model)).run(feed)
    method = reference.crossget(1, ensemble=ensemble)  # the second of two protected tokens
    expected = reference.run_encoder(
        ENCODER, feed, REMOVED, [0, 14], method, cross=TOKENS.astype(np.float32).astype(float)
    )
    for name in (*NAMES, "logits"):
        assert found[name].shape == expected[name].shape
        assert np.abs(found[name] - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max()


@pytest.mark.parametrize("lowering", ["gather", "matrix"])
def test_tokens_of_a_file_guide_as_in_the_reference(lowering: str, tmp_path: Path) -> None:
    """The last token becomes itself + e_l, is never merged, and its query tells importance."""
    model = build_encoder(ENCODER)
    path = stored(tmp_path, **{"layers.0": TOKENS})
    report = apply(model, r=REMOVED, lowering=lowering, cross_tokens=path)
    tower = report.details["towers"][0]
    assert (tower["tokens"], tower["left"]) == (15, 8)
    assert report.details["cross_tokens_sha256"] == sha256(Path(path).read_bytes()).hexdigest()
    assert (tower["protected"], tower["cross_token"]) == ([0, 14], 14)
    agrees(model)


def test_without_ensemble(tmp_path: Path) -> None:
    model = build_encoder(ENCODER)
    apply(model, r=REMOVED, ensemble=False, cross_tokens=stored(tmp_path, image=TOKENS))
    agrees(model, ensemble=False)


def test_a_model_that_has_them_is_recognised() -> None:
    """As a model trained with cross tokens is exported: the last token changes between layers."""
    model = with_cross()
    report = apply(model, r=REMOVED)
    tower = report.details["towers"][0]
    assert (tower["protected"], tower["cross_token"]) == ([0, 14], 14)
    agrees(model)


def with_cross() -> ir.Model:
    model = build_encoder(ENCODER)
    from optimizer.blocks import find_blocks

    towers, _ = find_towers(model, find_blocks(model).blocks, (), Keeps(ordered=True))
    insert_cross(model, towers[0], TOKENS)
    return model


@pytest.mark.parametrize("head", ["mean", "dense", "hidden"])
def test_nobody_else_sees_the_cross_token(head: str, tmp_path: Path) -> None:
    """Readers, outputs and places are those of the tokens that the model had before."""
    encoder = Encoder(head=head)
    feed = encoder_feed(encoder)
    before = OrtRunner(build_encoder(encoder)).run(feed)
    model = build_encoder(encoder)
    path = stored(tmp_path, **{"layers.0": TOKENS})
    apply(model, r=2, cross_tokens=path, protect="0", places=True)
    after = OrtRunner(model).run(feed)
    for name, array in before.items():
        assert after[name].shape == array.shape
        assert 1e-3 < np.abs(after[name] - array).max() < 3 * np.abs(array).max()
    assert after["token_places"].shape == (2, encoder.count)


def test_nothing_to_remove_leaves_the_graph_unchanged(tmp_path: Path) -> None:
    model = build_encoder(ENCODER)
    before = fingerprint(model)
    assert not apply(model, r=0, cross_tokens=stored(tmp_path, image=TOKENS)).modified
    assert before.difference(fingerprint(model)) is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": TOKENS[:2]}, r"shape \[2, 32\].*needs \[3, 32\]"),
        ({"image": TOKENS.astype(int)}, "expected an .npz file with one floating-point array"),
        ({"image": np.full((3, 32), np.nan)}, "not finite"),
        ({"layers.4": TOKENS}, "expected 'layers.0'"),
        ({}, "is empty"),
    ],
)
def test_files_that_do_not_fit(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        apply(build_encoder(ENCODER), cross_tokens=stored(tmp_path, **arrays))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "cross.npz").write_bytes(b"no archive")
    for path in ("cross.npz", "missing.npz"):
        with pytest.raises(OptionError, match="cannot be read"):
            apply(build_encoder(ENCODER), cross_tokens=str(tmp_path / path))


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        (Encoder(patches=13, mask="padding"), "without padding"),
        (Encoder(patches=13, special=0, head="mean"), "no token is protected"),
    ],
)
def test_towers_that_are_given_none(encoder: Encoder, reason: str, tmp_path: Path) -> None:
    model = build_encoder(encoder)
    before = fingerprint(model)
    report = apply(model, cross_tokens=stored(tmp_path, image=TOKENS))
    assert reason in report.skipped[0].reason
    assert before.difference(fingerprint(model)) is None
