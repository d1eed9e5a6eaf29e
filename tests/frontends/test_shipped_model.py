"""The model that ships with the project is whole, and its data fits it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks import make_stories12l as maker

PLAIN, CACHED = maker.HOME / "stories12l.onnx", maker.HOME / "stories12l-kv.onnx"


def test_both_graphs_read_one_weight_file() -> None:
    used = [
        {v.const_value.location for v in ir.load(path).graph.initializers.values()
         if isinstance(v.const_value, ir.ExternalTensor)}
        for path in (PLAIN, CACHED)
    ]  # fmt: skip
    assert used == [{"stories12l.data"}] * 2
    assert sum(file.stat().st_size for file in maker.HOME.rglob("*")) < 25e6


def test_calibration_data_fits_both_graphs_and_shares_no_row_with_the_evaluation() -> None:
    evaluation = np.load(PLAIN.with_suffix(".eval.npz"))
    assert evaluation["input_ids"].shape == evaluation["valid"].shape == (400, 256)
    for path in (PLAIN, CACHED):
        data = np.load(path.with_suffix(".calibration.npz"))
        inputs = [value.name for value in ir.load(path).graph.inputs]
        assert set(data.files) == {name for name in inputs if not name.startswith("past")}
        ids = data["input_ids"]
        assert ids.shape == (64, 256)
        assert 0 <= ids.min() <= ids.max() < 512
        assert (ids[:, 0] == maker.BEGIN).all()
        both = {row.tobytes() for row in ids} & {row.tobytes() for row in evaluation["input_ids"]}
        assert not both


def test_cached_graph_continues_as_the_plain_one() -> None:
    feeds = maker.feeds_of(np.load(PLAIN.with_suffix(".eval.npz"))["input_ids"][:2, :40])
    (whole,) = maker.session(PLAIN).run(None, feeds)
    cached = maker.session(CACHED)
    names = [i.name for i in cached.get_inputs() if i.name.startswith("past_key_values.")]
    past = {name: np.zeros((2, 4, 0, 16), np.float32) for name in names}
    pieces = []
    for start, end in ((0, 30), (30, 31), (31, 40)):
        piece = {name: value[:, start:end] for name, value in feeds.items()}
        piece["attention_mask"] = feeds["attention_mask"][:, :end]
        logits, *present = cached.run(None, piece | past)
        pieces.append(logits)
        past = dict(zip(names, present, strict=True))
    # float32 reassociation in twelve layers; measured 5e-7 of the largest logit
    error = np.abs(np.concatenate(pieces, axis=1) - whole).max()
    assert error <= 1e-5 * np.abs(whole).max()


def test_perplexity_on_its_own_text_is_that_of_the_readme() -> None:
    data = np.load(PLAIN.with_suffix(".eval.npz"))
    np.testing.assert_array_equal(data["valid"], maker.valid_of(data["input_ids"]))
    found = maker.perplexity(maker.session(PLAIN), data["input_ids"][:48], data["valid"][:48])
    # 48 of the 400 rows: the spread over rows allows some percent around the whole set's 4.22
    assert found == pytest.approx(4.22, rel=0.06)
