from __future__ import annotations

import models
import numpy as np
import pytest

from optimizer.errors import CalibrationError, ModelError
from optimizer.legalize import legalize
from optimizer.model_writer import save_model
from optimizer.runners.decode import DecodeSession
from optimizer.runners.ort import OrtRunner


def test_steps_give_what_one_run_over_all_tokens_gives():
    config = models.Config(kv_cache=True)
    model = models.build(config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab, (2, 7))
    feed = models.feed(config, sequence=7)
    feed["input_ids"] = tokens
    expected = OrtRunner(model).run(feed)["logits"]
    session = DecodeSession(model)
    np.testing.assert_allclose(session.prefill(tokens[:, :4]), expected[:, :4], atol=1e-5)
    for i in range(4, 7):
        np.testing.assert_allclose(session.step(tokens[:, i]), expected[:, i], atol=1e-5)
    assert session.total == 7
    assert session.lengths.tolist() == [7, 7]
    assert session.cache()["present.0.key"].shape == (2, config.kv_heads, 7, config.head_dim)


def test_a_new_prompt_forgets_the_last_one():
    model = models.build(kv_cache=True)
    legalize(model, "ort-cpu", kv_cache="in-place")
    session = DecodeSession(model, max_length=8)
    prompt = np.arange(5)[None]
    first = session.prefill(prompt)
    session.step(np.array([3]))
    np.testing.assert_array_equal(session.prefill(prompt), first)


def test_the_form_of_the_cache_is_read_from_the_file(tmp_path):
    model = models.build(kv_cache=True)
    legalize(model, "ort-cpu", kv_cache="in-place")
    save_model(model, tmp_path / "model.onnx")
    assert DecodeSession(tmp_path / "model.onnx").form == "in-place"


def test_padding_on_the_left_is_refused():
    session = DecodeSession(models.build(kv_cache=True))
    with pytest.raises(CalibrationError, match="padded on the right"):
        session.prefill(np.ones((1, 3), np.int64), np.array([[0, 1, 1]]))


def test_more_tokens_than_the_buffers_hold_are_refused():
    model = models.build(kv_cache=True)
    legalize(model, "ort-cpu", kv_cache="in-place")
    session = DecodeSession(model, max_length=4)
    session.prefill(np.ones((1, 4), np.int64))
    with pytest.raises(CalibrationError, match="5 tokens do not fit into buffers of 4"):
        session.step(np.array([1]))


def test_a_model_without_cache_is_refused():
    with pytest.raises(ModelError, match="has 0 inputs"):
        DecodeSession(models.build())
