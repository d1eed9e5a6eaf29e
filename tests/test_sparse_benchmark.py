"""benchmarks/sparse.py measures what it says: all kinds compute the same product."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sparse
import without_amx
from processor import SATURATES

from optimizer.custom_ops import library_path
from optimizer.errors import MissingDependencyError

pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def _installed():
    try:
        library_path()
    except MissingDependencyError as error:
        pytest.skip(str(error))


def test_every_kind_computes_the_chain():
    layers = sparse.weights((64, 96), 0.3, 2)
    x = np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)
    exact = x @ layers[0] @ layers[1]
    errors = {}
    for kind in (*sparse.DENSE, *sparse.SPARSE):
        y = sparse.session(kind, layers).run(None, {"y0": x})[0]
        errors[kind] = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    assert errors["fp32"] < 1e-6
    assert errors["sparse fp32"] < 1e-6
    # steps of 1/127 of the largest number of a token, of all tokens, and of 1/7 of 32 weights
    assert errors["int8"] < (0.06 if SATURATES else 0.02)
    assert errors["sparse int8"] < 0.02
    assert errors["qdq"] < 0.06
    assert errors["int4"] < 0.25


def test_a_run_writes_rows_rooflines_and_a_summary(tmp_path):
    out = tmp_path / "sparse.json"
    arguments = [
        "--shapes",
        "64x64,768x768",
        "--tokens",
        "1,16",
        "--zeros",
        "70",
        "--seconds",
        "0.01",
    ]
    sparse.main([*arguments, "--out", str(out)])
    facts = json.loads(out.read_text("utf-8"))
    assert [row["tokens"] for row in facts["rows"]] == [1, 16, 1, 16]
    for row in facts["rows"]:
        assert row["turns"] >= 7
        assert set(row["us"]) == {*sparse.DENSE, *sparse.SPARSE}
        for base in sparse.DENSE:
            middle, low, high = row["sparse int8"][base]
            assert 0 < low <= middle <= high
        assert row["sparse int8"]["bytes"] > 0
        assert row["sparse int8"]["products"] > 0
    assert facts["read_GBps"] > 0
    assert len(facts["summary"]) == 1  # 768 x 768 with 16 tokens


def test_calibration_keeps_other_classes(tmp_path, monkeypatch):
    figures = tmp_path / "figures.json"
    figures.write_text('{"classes": {"other": {"fp32": []}}}', "utf-8")
    monkeypatch.setattr(sparse, "FIGURES", figures)
    row = {
        "shape": [64, 64], "tokens": 1, "zeros": 70,
        "sparse fp32": {"fp32": [2.0, 1, 3], "int8": [0.5, 0, 1]},
        "sparse int8": {"fp32": [5.0, 4, 6], "int8": [1.5, 1, 2]},
    }  # fmt: skip
    sparse.calibrate([row, {**row, "from memory": True}], "here")
    classes = json.loads(figures.read_text("utf-8"))["classes"]
    assert classes["here"] == {
        "fp32": [[64, 64, 1, 0.3, 2.0, 0.5]],
        "int8": [[64, 64, 1, 0.3, 5.0, 1.5]],
    }
    assert "other" in classes


def test_amx_is_not_denied_too_late():
    with pytest.raises(RuntimeError, match=r"imported before|needs Linux on x86-64"):
        without_amx.deny_amx()
