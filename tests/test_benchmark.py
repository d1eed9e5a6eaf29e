"""Timing: who is faster, how sure that is, and what was run."""

from __future__ import annotations

import json
import os
import stat

import models
import numpy as np
import onnx_ir as ir
import pytest

from optimizer import benchmark as benchmark_module
from optimizer.benchmark import Operand, Setup, benchmark, compare, write_result
from optimizer.errors import CalibrationError, ExportError, OptionError
from optimizer.feeds import Sizes, synthesize
from optimizer.legalize import legalize
from optimizer.runners.ort import OrtRunner
from optimizer.samples import InputSpec

INT64, FLOAT = np.dtype(np.int64), np.dtype(np.float32)


class Clock:
    """Time that passes only while a fake operand runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(benchmark_module.time, "perf_counter", lambda: self.now)

    def operand(self, label: str, latency, order: list[str] | None = None):
        clock = self

        class Fake:
            load_seconds = 0.0

            def __init__(self) -> None:
                self.label = label
                self.feed: dict[str, np.ndarray] = {}

            def run(self) -> None:
                clock.now += latency() if callable(latency) else latency
                if order is not None:
                    order.append(label)

        return Fake()


class TestStatistics:
    def test_a_constant_ratio_is_found_exactly_and_early(self, monkeypatch):
        clock = Clock(monkeypatch)
        result = compare([clock.operand("a", 0.03), clock.operand("b", 0.02)], rounds=50)
        assert result.speedup() == pytest.approx(1.5)
        assert result.timings[1].interval == pytest.approx((1.5, 1.5))
        assert result.timings[0].median_ms == pytest.approx(30)
        assert result.rounds == 5

    def test_slow_phases_of_the_machine_cancel(self, monkeypatch):
        clock = Clock(monkeypatch)

        def phase() -> float:
            return 3.0 if int(clock.now / 2) % 2 else 1.0

        pair = [
            clock.operand("a", lambda: 0.03 * phase()),
            clock.operand("b", lambda: 0.02 * phase()),
        ]
        result = compare(pair, rounds=40, seconds=1e9)
        assert result.speedup() == pytest.approx(1.5, rel=0.02)

    def test_interruptions_of_single_runs_do_not_count(self, monkeypatch):
        clock = Clock(monkeypatch)
        rng = np.random.default_rng(0)
        noisy = [lambda x=x: x + (0.01 if rng.random() < 0.3 else 0) for x in (0.003, 0.002)]
        pair = [clock.operand(n, f) for n, f in zip("ab", noisy, strict=True)]
        result = compare(pair, rounds=30, seconds=1e9)
        assert result.speedup() == pytest.approx(1.5, rel=0.02)
        assert result.timings[1].p95_ms > 10

    def test_the_interval_covers_the_true_ratio_of_noisy_turns(self, monkeypatch):
        clock = Clock(monkeypatch)
        rng = np.random.default_rng(1)
        pair = [
            clock.operand(n, lambda x=x: x * rng.uniform(0.8, 1.2))
            for n, x in (("a", 0.5), ("b", 0.5))
        ]
        low, high = compare(pair, rounds=60, seconds=1e9).timings[1].interval
        assert low < 1 < high
        assert high - low < 0.3

    def test_models_take_turns_and_change_places(self, monkeypatch):
        clock, order = Clock(monkeypatch), []
        compare([clock.operand(n, 1.0, order) for n in "abc"], rounds=5)
        turns = order[9:]  # after the warm-up
        assert "".join(turns[::2])[:9] == "bca" + "cab" + "abc"

    def test_time_runs_out(self, monkeypatch):
        clock = Clock(monkeypatch)
        rng = np.random.default_rng(0)
        pair = [clock.operand(n, lambda: rng.uniform(1, 2)) for n in "ab"]
        assert compare(pair, rounds=1000, seconds=40).rounds < 15

    def test_progress_is_reported(self, monkeypatch):
        clock, seen = Clock(monkeypatch), []
        compare([clock.operand("a", 1.0)], rounds=3, progress=lambda *x: seen.append(x))
        assert seen == [(1, 3), (2, 3), (3, 3)]

    def test_nothing_to_measure_is_refused(self):
        with pytest.raises(OptionError, match="no model"):
            compare([])


class TestModels:
    def test_a_result_says_what_was_run_on_what(self, tmp_path):
        path = tmp_path / "m.onnx"
        model = models.build(kv_cache=True)
        ir.save(model, path)
        sizes = Sizes.parse({"batch": 2, "sequence": 3, "past_sequence": 4})
        result = benchmark([path, model], Setup(sizes=sizes), rounds=3, seconds=5)
        content = json.loads(json.dumps(result.as_dict()))
        assert content["shapes"]["input_ids"] == [2, 3]
        assert content["shapes"]["attention_mask"] == [2, 7]
        assert content["shapes"]["past_key_values.0.key"] == [2, 2, 4, 8]
        assert [t["label"] for t in content["timings"]] == [str(path), "model 1"]
        assert content["machine"]["cpu"]
        assert "onnxruntime" in content["machine"]["versions"]
        assert content["threads"] == 1

    def test_ten_times_the_work_takes_longer(self):
        text = (
            '<ir_version: 10, opset_import: ["" : 20]>'
            " g (float[N,256] x) => (float[N,256] y) {{ {0} }}"
        )
        steps = [
            f"{'y' if i == 9 else f'h{i}'} = MatMul({f'h{i - 1}' if i else 'x'}, x)"
            for i in range(10)
        ]
        one, ten = text.format("y = MatMul(x, x)"), text.format(" ".join(steps))
        setup = Setup(sizes=Sizes(batch=256))
        result = benchmark([ir.from_onnx_text(t) for t in (ten, one)], setup, rounds=8, seconds=10)
        assert result.speedup() > 2

    def test_past_and_present_share_memory_where_the_model_says_so(self):
        config = models.Config(kv_cache=True)
        model = models.build(config)
        legalize(model, "ort-cpu", kv_cache="in-place")
        operand = Operand(model, Setup(sizes=Sizes(batch=1, sequence=1, past=6)))
        before = operand.feed["past_key_values.0.key"].copy()
        operand.run()
        present = operand.outputs()["present.0.key"]
        buffer = operand.feed["past_key_values.0.key"]
        assert buffer.shape == (1, 2, 7, 8)
        assert np.array_equal(present, buffer)
        # The past stays, the new token's key is written behind it.
        assert np.array_equal(buffer[:, :, :6], before[:, :, :6])
        assert not np.array_equal(buffer[:, :, 6], before[:, :, 6])

    def test_the_sixth_and_the_first_run_give_the_same(self):
        model = models.build(kv_cache=True)
        legalize(model, "ort-cpu", kv_cache="in-place")
        operand = Operand(model, Setup(sizes=Sizes(past=5, sequence=1)))
        operand.run()
        first = operand.outputs()["logits"].copy()
        for _ in range(5):
            operand.run()
        assert np.array_equal(operand.outputs()["logits"], first)

    def test_a_bound_run_gives_what_an_ordinary_run_gives(self):
        model = models.build(kv_cache=True)
        operand = Operand(model, Setup(sizes=Sizes(batch=2, sequence=3, past=2)))
        operand.run()
        expected = OrtRunner(model).run(operand.feed)
        for name, array in operand.outputs().items():
            assert np.array_equal(array, expected[name]), name

    def test_values_given_are_used(self):
        ids = np.array([[3, 1, 4]])
        operand = Operand(models.build(), Setup(sizes=Sizes(sequence=3), feed={"input_ids": ids}))
        assert operand.feed["input_ids"].tolist() == ids.tolist()

    def test_equal_inputs_of_several_models_have_equal_values(self):
        setup = Setup(sizes=Sizes(sequence=6), vocabulary=50)
        a, b = (Operand(models.build(layers=n), setup) for n in (1, 2))
        assert a.feed["input_ids"].tolist() == b.feed["input_ids"].tolist()
        assert a.feed["input_ids"].max() > 31 or a.feed["input_ids"].size < 12


class TestFeeds:
    def spec(self, name, shape, dtype=INT64, vocab=None):
        return InputSpec(name, dtype, shape, vocab)

    def made(self, *specs, **sizes):
        return synthesize(specs, Sizes.parse(sizes), np.random.default_rng(0))

    def test_axes_are_known_by_role_whatever_an_exporter_calls_them(self):
        feed = self.made(
            self.spec("input_ids", ("s10", "s70"), vocab=9),
            self.spec("attention_mask", ("s43", "s53")),
            self.spec("position_ids", ("s10", "s70")),
            self.spec("past_key_values.0.key", ("s10", 4, "s15", 16), FLOAT),
            batch=3, sequence=2, past_sequence=5,
        )  # fmt: skip
        assert {n: a.shape for n, a in feed.items()} == {
            "input_ids": (3, 2),
            "attention_mask": (3, 7),
            "position_ids": (3, 2),
            "past_key_values.0.key": (3, 4, 5, 16),
        }
        assert feed["position_ids"].tolist() == [[5, 6]] * 3
        assert feed["attention_mask"].all()
        assert feed["input_ids"].max() < 9

    def test_every_mask_of_tokens_shows_all_of_them(self):
        feed = self.made(
            self.spec("encoder_attention_mask", (2, 5)), self.spec("token_type_ids", (2, 5))
        )
        assert feed["encoder_attention_mask"].all()
        assert not feed["token_type_ids"].any()

    def test_names_given_win_over_roles(self):
        feed = self.made(self.spec("input_ids", ("b", "tokens")), tokens=11, sequence=3)
        assert feed["input_ids"].shape == (1, 11)

    def test_a_model_without_cache_has_no_past(self):
        feed = self.made(
            self.spec("input_ids", ("b", "s")), self.spec("attention_mask", ("b", "s2")),
            sequence=4, past_sequence=9,
        )  # fmt: skip
        assert feed["attention_mask"].shape == (1, 4)

    def test_fixed_axes_stay(self):
        assert self.made(self.spec("pixel_values", (2, 3, 8, 8), FLOAT))["pixel_values"].shape == (
            2,
            3,
            8,
            8,
        )

    def test_an_axis_without_length_names_the_option(self):
        with pytest.raises(
            CalibrationError, match=r"'pixel_values' has an axis 2 \('height'\).*height=8"
        ):
            self.made(self.spec("pixel_values", ("b", 3, "height", 8), FLOAT))


class TestWriting:
    def result(self, monkeypatch):
        clock = Clock(monkeypatch)
        result = compare([clock.operand("a", 1.0)], rounds=3)
        monkeypatch.undo()
        return result

    def test_a_result_is_written_with_its_context(self, tmp_path, monkeypatch):
        path = tmp_path / "results" / "r.json"
        write_result(path, self.result(monkeypatch), model="m.onnx")
        content = json.loads(path.read_text())
        assert content["model"] == "m.onnx"
        assert content["timings"][0]["median_ms"] == pytest.approx(1000)
        assert [p.name for p in path.parent.iterdir()] == ["r.json"]

    @pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
    def test_a_result_may_be_read_by_whom_the_umask_says(self, tmp_path, monkeypatch, mask, mode):
        result, before = self.result(monkeypatch), os.umask(mask)
        try:
            write_result(tmp_path / "r.json", result)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "r.json").stat().st_mode) == mode

    def test_a_folder_in_the_way_is_an_export_error(self, tmp_path, monkeypatch):
        path = tmp_path / "r.json"
        path.mkdir()
        with pytest.raises(ExportError, match=r"r\.json cannot be written"):
            write_result(path, self.result(monkeypatch))
        assert not list(tmp_path.glob(".r.json*"))
