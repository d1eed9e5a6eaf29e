"""check, bench and build with engines: on a played GPU, and without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import models
import numpy as np
import onnxruntime
import pytest
from conftest import token_samples
from played_cuda import PlayedDriver, stage

from optimizer import cli
from optimizer.model_io import load_model, save_model
from optimizer.runners.ort import OrtRunner
from optimizer.runners.tensorrt import TensorRTRunner

#: One profile, for eight rows alone; and two profiles.
EIGHT = ("--shapes", "input_ids:8x12")
TWO = ("--shapes", "input_ids:1x1,1x1,4x1", "--shapes", "input_ids:1x2,1x16,1x64")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> PlayedDriver:
    return stage(monkeypatch)


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A small language model with data beside it."""
    save_model(models.build(), tmp_path / "m.onnx")
    np.savez(tmp_path / "m.calibration.npz", **token_samples())
    return tmp_path / "m.onnx"


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """The same with a KV cache, without data."""
    save_model(models.build(kv_cache=True), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of the two models, with its engine."""
    folder = tmp_path_factory.mktemp("engines")
    for name, has_cache in (("decoder", False), ("cached", True)):
        (folder / name).mkdir()
        save_model(models.build(kv_cache=has_cache), folder / name / "m.onnx")
        words = ["build", str(folder / name / "m.onnx"), "--target", "tensorrt", "-q"]
        with pytest.MonkeyPatch.context() as patch:
            stage(patch)
            assert cli.run_command([*words, "--verify", "off"]) == 0
    np.savez(folder / "decoder" / "m.calibration.npz", **token_samples())
    return folder


def copied(engines: Path, name: str, folder: Path) -> tuple[Path, Path]:
    """The model and its engine."""
    shutil.copytree(engines / name, folder, dirs_exist_ok=True)
    return folder / "m.onnx", folder / "m.engine"


def build(command, model: Path, *words):
    return command("build", model, "--target", "tensorrt", *words)


class TestBuild:
    def test_the_engine_is_run_on_the_samples(self, command, driver, decoder, tmp_path):
        found = build(command, decoder)
        assert found.code == 0, found.err
        checked = json.loads((tmp_path / "m.engine.manifest.json").read_text())["checked"]
        assert checked["samples"] == 6
        assert checked["data"].endswith("m.calibration.npz")
        assert checked["drift"]["relative_l2"] <= 1e-5 < checked["allowed"]
        assert checked["drift"]["rows"] == 72
        assert "engine on 6 samples from" in found.out
        assert f"next: optimize bench {decoder} {tmp_path / 'm.engine'}" in found.out

    def test_its_drift_is_that_of_the_passes(self, command, driver, decoder, tmp_path):
        assert build(command, decoder, "--passes", "outliertune", "--json").code == 0
        checked = json.loads((tmp_path / "m.engine.manifest.json").read_text())["checked"]
        assert checked["onnx"] > 1e-3
        assert checked["drift"]["relative_l2"] == pytest.approx(checked["onnx"], rel=1e-2)

    def test_a_wrong_engine_is_not_written(self, command, driver, decoder, tmp_path, monkeypatch):
        monkeypatch.setenv("FAKE_TENSORRT", "wrong engine")
        found = build(command, decoder)
        assert found.code == 3, found.err
        assert len(found.lines) <= 4
        assert "the engine's output 'logits' differs from the original's" in found.err
        assert "no engine was written" in found.err
        assert not list(tmp_path.glob("m.engine*"))

    def test_a_budget_holds_for_the_engine_too(self, command, driver, decoder, tmp_path):
        words = ["--target", "tensorrt-10", "--engine", tmp_path / "m.engine", "--passes", "fp16"]
        words += ["-o", tmp_path / "o.onnx", "--budget", "relative_l2<=1"]
        assert command(decoder, *words).code == 0
        manifest = json.loads((tmp_path / "m.engine.manifest.json").read_text())
        assert manifest["checked"]["missed"] is None
        assert 1e-5 < manifest["checked"]["drift"]["relative_l2"] < 1e-2

    @pytest.mark.parametrize(("keep", "written"), [(False, False), (True, True)])
    def test_a_budget_that_only_the_engine_misses(
        self, command, driver, decoder, tmp_path, monkeypatch, keep, written
    ):
        """Worse than the model, within what rounding explains, and not good enough."""
        monkeypatch.setenv("FAKE_TENSORRT", "coarse engine")
        words = ["--target", "tensorrt-10", "--engine", tmp_path / "m.engine"]
        words += ["-o", tmp_path / "o.onnx", "--budget", "relative_l2<=1e-5"]
        found = command(decoder, *words, *(["--keep"] if keep else []))
        assert found.code == 4, found.err
        assert "the engine misses the budget: " in found.err
        assert (tmp_path / "m.engine").is_file() == written

    def test_no_gpu_is_said_once(self, command, driver, decoder, tmp_path):
        driver.gpus.clear()
        found = build(command, decoder)
        assert found.code == 0, found.err
        lines = [line for line in found.out.splitlines() if line.startswith("engine not run")]
        assert len(lines) == 1
        assert lines[0].endswith("no GPU here: the NVIDIA driver shows no GPU")
        assert f"optimize check {decoder} m.engine" in found.out
        checked = json.loads((tmp_path / "m.engine.manifest.json").read_text())["checked"]
        assert checked["skipped"].startswith("no GPU here")

    def test_verification_can_be_left_out(self, command, driver, decoder, tmp_path):
        found = build(command, decoder, "--verify", "off")
        assert found.code == 0, found.err
        assert "engine not run: verification is off" in found.out

    def test_data_that_no_profile_takes(self, command, driver, decoder, tmp_path):
        found = build(command, decoder, "--shapes", "input_ids:1x1,1x4,2x8")
        assert found.code == 0, found.err
        assert "made-up inputs, as the data is in the range of no optimization profile" in found.out

    @pytest.mark.parametrize("words", [EIGHT, (*EIGHT, "--shapes", "input_ids:1x1,1x16,1x64")])
    def test_profiles_that_do_not_take_every_number_of_rows(
        self, command, driver, decoder, tmp_path, words
    ):
        """Six samples, a profile for eight: one by one where another takes them."""
        found = build(command, decoder, *words)
        assert found.code == 0, found.err
        assert ("made-up inputs" in found.out) == (words == EIGHT)

    def test_the_gpu_that_it_was_built_on(self, command, driver, decoder, tmp_path, monkeypatch):
        """The process that builds has no played driver, so the manifest does not know."""
        assert build(command, decoder).code == 0
        manifest = json.loads((tmp_path / "m.engine.manifest.json").read_text())
        assert manifest["gpu"] is None


class TestCheck:
    def test_an_engine_against_its_model(self, command, driver, engines, tmp_path):
        model, engine = copied(engines, "decoder", tmp_path)
        found = command("check", model, engine, "--json")
        assert found.code == 0, found.err
        assert json.loads(found.out)["samples"] == 6
        back = command("check", engine, model)
        assert back.code == 0, back.err
        assert "6 samples from" in back.out

    def test_another_model(self, command, driver, engines, tmp_path):
        _, engine = copied(engines, "decoder", tmp_path)
        save_model(models.build(seed=5), tmp_path / "other.onnx")
        found = command("check", tmp_path / "other.onnx", engine)
        assert found.code == 3
        assert "differs: relative_l2" in found.out

    @pytest.mark.parametrize("words", [(), ("--shapes", "input_ids:2x1"), TWO])
    def test_made_up_inputs_fit_the_profiles(self, command, driver, cached, tmp_path, words):
        assert build(command, cached, *words).code == 0
        found = command("check", cached, tmp_path / "m.engine", "--json")
        assert found.code == 0, found.err
        assert json.loads(found.out)["data"] == "made-up inputs"
        assert json.loads(found.out)["samples"] == (2 if words == TWO else 1)

    def test_without_a_gpu(self, command, driver, engines, tmp_path):
        model, engine = copied(engines, "decoder", tmp_path)
        driver.gpus.clear()
        for word in ("check", "bench"):
            found = command(word, model, engine)
            assert found.code == 6
            assert len(found.lines) == 1
            assert "m.engine: cannot be run here: the NVIDIA driver shows no GPU" in found.err


class TestBench:
    def test_models_and_engines_take_turns(self, command, driver, engines, tmp_path):
        model, engine = copied(engines, "decoder", tmp_path)
        found = command("bench", model, engine, "--rounds", 3, "--json")
        assert found.code == 0, found.err
        content = json.loads(found.out)
        assert [Path(item["label"]).name for item in content["timings"]] == ["m.onnx", "m.engine"]
        assert content["shapes"]["input_ids"] == [1, 8]
        assert [item["device"] for item in content["timings"]] == ["cpu", "Played GPU"]
        assert driver.calls.count("cuMemcpyHtoDAsync_v2") == 3, "inputs are copied once"

    def test_the_table_names_the_gpu(self, command, driver, engines, tmp_path):
        _, engine = copied(engines, "decoder", tmp_path)
        found = command("bench", engine, "--rounds", 3)
        assert found.code == 0, found.err
        assert ", Played GPU, ONNX Runtime" in found.out

    def test_axes_have_the_names_of_the_model(self, command, driver, engines, tmp_path):
        words = ["bench", *copied(engines, "cached", tmp_path), "--rounds", 3, "--json"]
        found = command(*words, "--shape", "sequence=1", "--shape", "past=16")
        assert found.code == 0, found.err
        assert json.loads(found.out)["shapes"]["input_ids"] == [1, 1]

    def test_a_shape_that_no_profile_takes(self, command, driver, engines, tmp_path):
        _, engine = copied(engines, "decoder", tmp_path)
        found = command("bench", engine, "--shape", "sequence=4000")
        assert found.code == 2
        assert "no optimization profile fits" in found.err

    def test_cuda_where_onnx_runtime_has_none(self, command, decoder, monkeypatch):
        only = ["CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: only)
        found = command("bench", decoder, "--target", "ort-cuda")
        assert found.code == 6
        assert "has no CUDAExecutionProvider" in found.err
        assert "optimize-onnx[gpu]" in found.err


def test_engines_compute_what_the_original_computes(driver, engines):
    """Every output, with and without a past."""
    folder = engines / "cached"
    engine = TensorRTRunner(folder / "m.engine")
    original = OrtRunner(load_model(folder / "m.onnx"))
    for past in (0, 5):
        feed = models.feed(models.Config(kv_cache=True), past=past)
        expected = original.run(feed)
        found = engine.run(feed)
        assert set(found) == set(expected)
        for name, array in expected.items():
            assert found[name].shape == array.shape
            assert np.allclose(found[name], array, atol=1e-4)


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("ort-cpu", "next: optimize bench {source} {made}"),
        ("ort-cuda", "next: optimize bench --target ort-cuda {source} {made}"),
        ("tensorrt-rtx", "next: make an engine of it: optimize build {made} --target tensorrt-rtx"),
        (
            "tensorrt-10",
            "next: make an engine of it, where TensorRT 10 and its GPU are: "
            "optimize build {made} --target tensorrt-10",
        ),
        (
            "jetson",
            "next: make a folder for the device of it: optimize build {made} --target jetson",
        ),
    ],
)
def test_the_next_step_is_that_of_the_target(command, decoder, tmp_path, target, hint):
    made = tmp_path / "o.onnx"
    found = command(decoder, "--target", target, "-o", made, "--verify", "off")
    assert found.code == 0, found.err
    assert found.out.splitlines()[-1] == hint.format(source=decoder, made=made)


def test_what_was_written_for_a_target_can_be_built(command, driver, decoder, tmp_path):
    """The hint of the target, followed."""
    made = tmp_path / "o.onnx"
    words = ["--target", "tensorrt-10", "-o", made, "--passes", "outliertune,fp16"]
    assert command(decoder, *words).code == 0
    found = command("build", made, "--target", "tensorrt-10")
    assert found.code == 0, found.err
    assert (tmp_path / "o.engine").is_file()


def test_one_hint_where_an_engine_is_built_too(command, driver, decoder, tmp_path):
    words = ["--target", "tensorrt-10", "-o", tmp_path / "o.onnx", "--verify", "final"]
    found = command(decoder, *words, "--engine", tmp_path / "e.engine")
    assert found.code == 0, found.err
    hints = [line for line in found.out.splitlines() if line.startswith("next: ")]
    assert hints == [f"next: optimize bench {decoder} {tmp_path / 'e.engine'}"]
