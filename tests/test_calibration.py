"""Statistics and drift measured while samples stream through a model."""

from __future__ import annotations

import tracemalloc

import models
import numpy as np
import onnx_ir as ir
import pytest

from optimizer import calibration as calibration_module
from optimizer.calibration import (
    Calibration,
    ChannelRange,
    ChannelSquareSum,
    RowMaximum,
    TokenCosine,
    input_specs,
    primary_output,
    targets_in,
    valid_rows,
)
from optimizer.errors import CalibrationError
from optimizer.generation import START_KEY, self_samples
from optimizer.metrics import log_softmax
from optimizer.runners.ort import OrtRunner
from optimizer.samples import Batch, load_samples

# Statistics are taken from float32 arrays computed in another batch size: roundings of values < 10.
FLOAT32 = 1e-5


def value(model: ir.Model, name: str) -> ir.Value:
    return next(v for n in model.graph for v in n.outputs if v.name == name)


def data(count: int = 6, length: int = 9, vocab: int = 50) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    mask = np.ones((count, length), np.int64)
    mask[1, -3:] = 0
    mask[4, -5:] = 0
    return {"input_ids": rng.integers(0, vocab, (count, length)), "attention_mask": mask}


def bound(model: ir.Model, arrays=None, **options) -> Calibration:
    return Calibration(load_samples(arrays or data(), input_specs(model)), **options)


def run_all(model: ir.Model, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All values of `name` and which of its tokens are valid."""
    runner = OrtRunner(model, extra_outputs=(value(model, name),))
    samples = load_samples(data(), input_specs(model))
    arrays = [runner.run(feed)[name] for feed in samples.batches(1)]
    return np.concatenate(arrays), data()["attention_mask"] != 0


class TestObservers:
    @pytest.fixture(scope="class")
    def model(self) -> ir.Model:
        return models.build(layers=3)

    def test_range_and_squares_equal_numpy_over_valid_tokens(self, model):
        x = value(model, "layers.1.norm1.out")
        ranges, squares, rows = ChannelRange(x), ChannelSquareSum(x), RowMaximum(x)
        bound(model, batch=4).observe(model, [ranges, squares, rows])
        array, valid = run_all(model, "layers.1.norm1.out")
        kept = array[valid]
        assert ranges.minimum == pytest.approx(kept.min(0), abs=FLOAT32)
        assert ranges.maximum == pytest.approx(kept.max(0), abs=FLOAT32)
        assert ranges.absolute == pytest.approx(np.abs(kept).max(0), abs=FLOAT32)
        assert squares.total == pytest.approx((kept.astype(np.float64) ** 2).sum(0), rel=FLOAT32)
        assert rows.maximum == pytest.approx(np.abs(kept).max(), abs=FLOAT32)
        assert rows.minimum == pytest.approx(np.abs(kept).max(1).min(), abs=FLOAT32)
        assert ranges.tokens == squares.tokens == rows.tokens == valid.sum()
        assert ranges.minimum.dtype == np.float32

    def test_cosine_between_layer_inputs_leaves_out_first_tokens(self, model):
        names = ["stream.0", "stream.1", "stream.2"]
        x = [value(model, name) for name in names]
        every = TokenCosine([(x[0], x[1]), (x[0], x[2]), (x[1], x[1])], skip_first=False)
        later = TokenCosine([(x[0], x[1]), (x[0], x[2]), (x[1], x[1])])
        bound(model).observe(model, [every, later])
        arrays = [run_all(model, name)[0].astype(np.float64) for name in names]
        valid = run_all(model, "stream.0")[1]
        for observer, first in ((every, 0), (later, 1)):
            kept = valid.copy()
            kept[:, :first] = False
            for found, (a, b) in zip(observer.cosine, [(0, 1), (0, 2), (1, 1)], strict=True):
                u, v = arrays[a][kept], arrays[b][kept]
                wanted = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
                assert found == pytest.approx(wanted.mean(), abs=FLOAT32)
            assert observer.tokens == kept.sum()
        assert later.cosine[2] == pytest.approx(1, abs=FLOAT32)

    def test_one_run_serves_all_observers(self, model, monkeypatch):
        runs = []
        original = OrtRunner.run
        monkeypatch.setattr(
            OrtRunner, "run", lambda self, feed: runs.append(1) or original(self, feed)
        )
        observers = [ChannelRange(value(model, f"stream.{i}")) for i in range(3)]
        bound(model, batch=3).observe(model, observers)
        assert len(runs) == 2

    def test_inputs_outputs_and_activations_can_be_observed(self, model):
        ids, logits = model.graph.inputs[0], model.graph.outputs[0]
        observers = [ChannelRange(ids), ChannelRange(logits)]
        bound(model).observe(model, observers)
        assert observers[1].minimum.shape == (50,)
        assert observers[0].tokens == 6

    def test_nothing_to_observe_is_no_run(self, model):
        bound(model).observe(model, [])

    def test_an_observer_that_saw_nothing_says_so(self, model):
        with pytest.raises(ValueError, match=r"stream\.0"):
            _ = ChannelRange(value(model, "stream.0")).minimum

    def test_memory_does_not_grow_with_the_number_of_samples(self, model):
        x = [value(model, f"stream.{i}") for i in range(3)]

        def peak(count: int) -> int:
            def make():
                rng = np.random.default_rng(0)
                for _ in range(count):
                    yield {"input_ids": rng.integers(0, 50, (1, 32))}

            calibration = Calibration(load_samples(make, input_specs(model)), batch=4)
            tracemalloc.start()
            calibration.observe(model, [ChannelRange(v) for v in x])
            result = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return result

        peak(8)
        assert peak(160) < 1.5 * peak(16)

    def test_progress_counts_samples(self, model):
        seen = []
        calibration = bound(model, batch=4, progress=lambda done, total: seen.append((done, total)))
        calibration.observe(model, [ChannelRange(value(model, "stream.0"))])
        assert seen == [(4, 6), (6, 6)]


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((2, 3, 5), 4),
        ((2, 3, 4, 5), 16),
        ((2, 7, 3, 5), 28),
        ((6, 5), 4),
        ((5,), 1),
        ((4, 5), 4),
        ((), 1),
    ],
    ids=str,
)
def test_valid_rows_find_the_token_axes(shape, rows):
    valid = np.array([[True, True, False], [True, False, True]])
    found = valid_rows(np.zeros(shape), valid)
    assert found.shape == (rows, shape[-1] if shape else 1)


class TestDrift:
    def test_the_reference_has_no_drift_from_itself(self):
        model = models.build()
        calibration = bound(model)
        drift = calibration.drift(calibration.reference(model), model)
        assert (drift.relative_l2, drift.top1, drift.kl, drift.perplexity_ratio) == (0, 1, 0, 1)
        assert drift.rows == (data()["attention_mask"] != 0).sum()

    def test_perplexity_predicts_the_next_token_where_both_are_valid(self):
        model = models.build()
        calibration = bound(model)
        reference = calibration.reference(model)
        assert reference.causal
        logits, valid = run_all(model, "logits")
        loss = -log_softmax(logits.astype(np.float64))
        ids = data()["input_ids"]
        terms = [
            loss[b, t, ids[b, t + 1]]
            for b in range(6)
            for t in range(8)
            if valid[b, t] and valid[b, t + 1]
        ]
        found = calibration.drift(reference, model).perplexity
        assert found == pytest.approx(np.exp(np.mean(terms)), rel=FLOAT32)

    def test_an_array_valid_says_which_predictions_count(self):
        model = models.build()
        ids = data()["input_ids"]
        counted = np.zeros(ids.shape, bool)
        counted[2, 3] = counted[5, 0] = True
        calibration = bound(model, {"input_ids": ids, "valid": counted})
        drift = calibration.drift(calibration.reference(model), model)
        feed = next(load_samples({"input_ids": ids}, input_specs(model)).batches(6))
        loss = -log_softmax(OrtRunner(model).run(feed)["logits"].astype(np.float64))
        terms = [loss[2, 3, ids[2, 4]], loss[5, 0, ids[5, 1]]]
        assert drift.perplexity == pytest.approx(np.exp(np.mean(terms)), rel=FLOAT32)
        assert drift.rows == 2

    def test_a_bidirectional_model_has_no_perplexity(self):
        model = models.build(style="post-norm", norm="layer", mask=False)
        calibration = bound(model, {"input_ids": data()["input_ids"]})
        reference = calibration.reference(model)
        assert not reference.causal
        drift = calibration.drift(reference, model)
        assert drift.perplexity is None
        assert drift.kl == 0

    def test_an_embedding_model_has_no_scores(self):
        model = models.build(hidden_output=1)
        del model.graph.outputs[0]
        calibration = bound(model)
        assert primary_output(model) == "stream.2"
        drift = calibration.drift(calibration.reference(model), model)
        assert (drift.cosine, drift.top1, drift.kl) == (pytest.approx(1), None, None)

    def test_later_changes_of_the_model_do_not_change_the_reference(self, monkeypatch):
        for limit in (1 << 28, 0, 4000):
            monkeypatch.setattr(calibration_module, "REFERENCE_BYTES", limit)
            model = models.build()
            calibration = bound(model, batch=2)
            reference = calibration.reference(model)
            head = model.graph.initializers["lm_head.weight"]
            head.const_value = ir.tensor(head.const_value.numpy() * np.float32(1.25))
            # logits scale by 1.25, so the difference is a quarter of the reference.
            assert calibration.drift(reference, model).relative_l2 == pytest.approx(
                0.25, rel=FLOAT32
            )

    def test_a_model_with_other_cache_inputs_can_be_compared(self):
        plain, cached = models.build(), models.build(kv_cache=True)
        calibration = bound(cached)
        # The same weights; only roundings differ between the two graphs.
        assert calibration.drift(calibration.reference(cached), plain).relative_l2 < 1e-6

    def test_a_lost_output_is_named(self):
        model = models.build()
        calibration = bound(model)
        reference = calibration.reference(model)
        model.graph.outputs[0].name = "other"
        with pytest.raises(CalibrationError, match="no output 'logits' any more"):
            calibration.drift(reference, model)

    def test_a_model_without_float_outputs_cannot_drift(self):
        model = ir.from_onnx_text(
            '<ir_version: 10, opset_import: ["" : 20]>'
            " g (int64[N] x) => (int64[N] y) { y = Abs(x) }"
        )
        with pytest.raises(CalibrationError, match="float"):
            primary_output(model)

    def test_limited_uses_the_first_samples(self):
        model = models.build()
        assert bound(model).limited(2).samples.count == 2

    def test_batches_hold_about_a_thousand_tokens(self):
        model = models.build()
        ids = np.zeros((40, 256), np.int64)
        assert bound(model, {"input_ids": ids}).batch == 4
        assert bound(model, {"input_ids": ids[:, :8]}).batch == 16


def test_targets_given_are_taken_as_they_are():
    targets = np.array([[4, -1, 2]])
    batch = Batch({"input_ids": np.array([[1, 2, 3]])}, {"targets": targets})
    assert targets_in(batch, (1, 3)) is targets


def test_the_vocabulary_is_the_length_of_the_table_looked_up():
    specs = {s.name: s for s in input_specs(models.build(kv_cache=True, vocab=37))}
    assert specs["input_ids"].vocab == 37
    assert specs["attention_mask"].vocab is None
    assert specs["past_key_values.0.key"].shape == ("batch", 2, "past_sequence", 8)
    assert specs["past_key_values.0.key"].dtype == np.float32


def test_a_table_behind_dequantize_and_cast_is_found():
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]> g (int32[N] input_ids) => (float[N,2] y)'
        " <int8[3,2] w = {1,2,3,4,5,6}, float s = {0.5}> {"
        " t = DequantizeLinear(w, s)  i = Cast<to = 7>(input_ids)  y = Gather(t, i) }"
    )
    assert input_specs(model)[0].vocab == 3


class TestSelfSamples:
    def test_the_same_text_with_and_without_cache_and_every_time(self):
        plain, cached = models.build(layers=1), models.build(layers=1, kv_cache=True)
        texts = [self_samples(m, 5, 12, start=1)["input_ids"] for m in (plain, cached, cached)]
        assert texts[0].shape == (5, 12)
        assert texts[0].tolist() == texts[1].tolist() == texts[2].tolist()
        assert (texts[0][:, 0] == 1).all()
        assert len({tuple(row) for row in texts[0].tolist()}) == 5
        assert texts[0].max() < 50

    def test_text_follows_the_distribution_of_the_model(self):
        # One layer's logits depend on the last token; after training-free noise, frequent
        # continuations must be those the model itself rates likely: mean log-probability of the
        # text lies near minus the model's entropy, far above that of random tokens.
        model = models.build(layers=1)
        text = self_samples(model, 16, 32, start=1)
        samples = load_samples(text, input_specs(model))
        calibration = Calibration(samples)
        own = calibration.drift(calibration.reference(model), model).perplexity
        noise = Calibration(load_samples(data(16, 32), input_specs(model)))
        other = noise.drift(noise.reference(model), model).perplexity
        assert own < 0.8 * other

    def test_the_start_token_comes_from_the_model_or_is_drawn(self):
        model = models.build(layers=1)
        assert len(set(self_samples(model, 8, 2)["input_ids"][:, 0].tolist())) > 3
        model.metadata_props[START_KEY] = "7"
        assert set(self_samples(model, 3, 2)["input_ids"][:, 0].tolist()) == {7}

    def test_a_model_that_is_not_a_language_model_is_refused(self):
        model = models.build()
        model.graph.outputs[0].name = "embedding"
        with pytest.raises(CalibrationError, match=r"--calibration self: .*'logits', found"):
            self_samples(model)

    def test_a_cache_input_without_next_value_is_refused(self):
        model = models.build(kv_cache=True, layers=1)
        model.graph.outputs[1].name = "cache_key"
        with pytest.raises(CalibrationError, match=r"'past_key_values\.0\.key'"):
            self_samples(model, 1, 3)
