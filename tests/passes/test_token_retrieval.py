"""Image tokens are reduced in the image-text model that ships, and captions are still found."""

from __future__ import annotations

import json
from pathlib import Path

import digit_captions
import numpy as np
import onnx_ir as ir
import pytest
import tokens_retrieval
from tokens_accuracy import canonical

from optimizer.pass_base import Context
from optimizer.runners.ort import OrtRunner
from passes import get_pass

RECORDED = json.loads(tokens_retrieval.RESULTS.read_text("utf-8"))
COPIES = RECORDED["placements"]
# A query whose best two scores differ in the last bits may turn between machines: two of 1800.
NEAR = 2 / 1800


@pytest.fixture(scope="module")
def tower() -> ir.Model:
    return canonical(digit_captions.HOME / "image.onnx")


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images, embedded captions and captions."""
    images, names = digit_captions.load("test", COPIES)
    text = OrtRunner(canonical(digit_captions.HOME / "text.onnx"))
    return images, text.run(digit_captions.feed(names))["text_embeds"], names


@pytest.mark.parametrize("method", ["original", "tome", "crossget", "prune-tokens"])
def test_the_shipped_model_finds_what_is_recorded(
    tower: ir.Model, data: tuple[np.ndarray, np.ndarray, list[str]], method: str
) -> None:
    keep = 1.0 if method == "original" else 0.5
    row = next(r for r in RECORDED["rows"] if (r["method"], r["keep"]) == (method, keep))
    model = tower.clone()
    if method != "original":
        pass_class = get_pass(method)
        report = pass_class(pass_class.Options(keep=keep)).call(model, Context())
        assert report.applied == 6
        assert report.details["towers"][0]["removed"] == row["removed"]
        assert report.details["towers"][0]["protected"] == [0]
        assert not report.details["towers"][0]["given_back_to"]
    found = tokens_retrieval.recalls(model, *data, COPIES)
    for key, figure in found.items():
        assert figure == pytest.approx(row[key], abs=NEAR), key


def test_a_caption_is_found_by_its_own_embedding() -> None:
    """Two images with one caption both find it, and either is right for it."""
    names = ["b", "a", "b"]
    embedded = np.array([[0, 1], [1, 0], [0, 2]], np.float64)
    assert set(digit_captions.recalls(embedded, embedded, names).values()) == {1.0}
    turned = digit_captions.recalls(embedded[[1, 0, 1]], embedded, names)
    assert turned["image_to_text_1"] == 0
    assert turned["image_to_text_5"] == 1


def test_the_readme_shows_what_is_recorded() -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
    assert tokens_retrieval.markdown(RECORDED["rows"]) in text


def test_tome_gets_as_many_multiplications_as_crossget_where_that_is_said() -> None:
    rows = {(r["method"], r["keep"]): r for r in RECORDED["rows"]}
    for keep in (0.75, 0.5, 0.35):
        ours, dear = rows["crossget", keep], rows["tome, as dear as crossget", keep]
        assert (
            rows["tome", keep]["removed"]
            == ours["removed"]
            == rows["prune-tokens", keep]["removed"]
        )
        # one token of 65, from the first layer on
        assert ours["in_all"] - 1 / 65 <= dear["in_all"] <= ours["in_all"]
