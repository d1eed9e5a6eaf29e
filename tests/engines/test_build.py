"""The build as a process of its own: every way it can end, with a module that stands in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import pytest
from conftest import Outcome

from optimizer.engines.plan import read_plan

FAKE = Path(__file__).resolve().parent / "fake"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """y = x W, x [batch, 4]."""
    value = oh.make_tensor_value_info
    graph = oh.make_graph(
        [oh.make_node("MatMul", ["x", "w"], ["y"], name="first")],
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["batch", 4])],
        [value("y", onnx.TensorProto.FLOAT, ["batch", 4])],
        [onh.from_array(np.eye(4, dtype=np.float32) * 3, "w")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)]), path)
    return path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the process that builds find the module that stands in."""
    monkeypatch.setenv("PYTHONPATH", f"{FAKE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def choose(mode: str, version: str = "10.3.0.30") -> None:
        monkeypatch.setenv("FAKE_TENSORRT", mode)
        monkeypatch.setenv("FAKE_TENSORRT_VERSION", version)

    return choose


def left(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}


def test_an_engine_and_its_manifest(command: Callable[..., Outcome], fake, model, tmp_path):
    fake("ok")
    cache = tmp_path / "timing"
    cache.write_bytes(b"known")
    words = ["build", model, "--target", "tensorrt", "--timing-cache", cache, "--force"]
    found = command(*words, "--shapes", "x:1x4,2x4,3x4", "--version-compatible", "--json")
    assert found.code == 0, found.err
    manifest = json.loads((tmp_path / "m.engine.manifest.json").read_text())
    assert manifest["target"] == "tensorrt-10"
    assert manifest["version"] == "10.3.0.30"
    assert manifest["profiles"] == [{"x": [[1, 4], [2, 4], [3, 4]]}]
    assert manifest["layers"] == [
        {"name": "layer_one", "type": "MATRIX_MULTIPLY", "precision": "float"}
    ]
    assert b"('x', (1, 4), (2, 4), (3, 4))" in (tmp_path / "m.engine").read_bytes()
    assert b"VERSION_COMPATIBLE" in (tmp_path / "m.engine").read_bytes()
    assert cache.read_bytes() == b"known+"
    plan = read_plan(tmp_path / "m.engine")
    assert (plan.flavour, plan.version) == ("tensorrt", "10.3.0.30")


@pytest.mark.parametrize("version", json.loads((FAKE.parent / "api_surface.json").read_text()))
def test_every_recorded_version_has_the_names_that_a_build_uses(
    command, fake, model, tmp_path, version
):
    """The module that stands in refuses to have what the release does not have."""
    fake("ok", version)
    found = command(
        "build", model, "--target", "tensorrt", "--timing-cache", tmp_path / "cache",
        "--version-compatible", "--hardware-compatible",
    )  # fmt: skip
    assert found.code == 0, found.err
    manifest = json.loads((tmp_path / "m.engine.manifest.json").read_text())
    assert manifest["target"] == f"tensorrt-{version.partition('.')[0]}"
    assert manifest["hardware_compatible"]
    newer = [int(part) for part in version.split(".")[:2]] >= [10, 16]
    assert len(manifest["layers"]) == (2 if newer else 1)


def test_the_form_follows_the_installed_version(command, fake, model, tmp_path):
    fake("ok", "11.1.0.2")
    assert command("build", model, "--target", "tensorrt").code == 0
    manifest = json.loads((tmp_path / "m.engine.manifest.json").read_text())
    assert manifest["target"] == "tensorrt-11"
    found = command("build", model, "--target", "tensorrt-10", "--force")
    assert found.code == 2
    assert "TensorRT 11.1.0.2 is installed here" in found.err


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("abort in parser", ("(SIGABRT)", "while it parsed node first [MatMul]")),
        ("abort in build", ("(SIGABRT)", "phase 'Building Engine'", "terminate called")),
        ("killed", ("not enough memory", "phase 'Building Engine'")),
        ("refuse in parser", ("node 'second' (ScatterND)", "reduction is not supported")),
        ("refuse in build", ("at 'layer_one'", "could not find any implementation")),
        ("no gpu", ("made no builder", "needs an NVIDIA GPU")),
        ("shape input", ("input 'x' decides shapes",)),
    ],
)
def test_a_build_that_fails_is_one_message_and_leaves_nothing(
    command, fake, model, tmp_path, mode, says
):
    fake(mode)
    found = command("build", model, "--target", "tensorrt")
    assert found.code == 7, found.err
    assert len(found.lines) <= 4
    for part in says:
        assert part in found.err
    assert left(tmp_path) == {"m.onnx"}


def test_memory_has_a_limit(command, fake, model, tmp_path):
    fake("memory")
    found = command("build", model, "--target", "tensorrt", "--max-memory", "2GB")
    assert found.code == 7
    assert "not enough memory" in found.err
    assert left(tmp_path) == {"m.onnx"}


def test_a_timing_cache_of_another_gpu(command, fake, model, tmp_path):
    fake("ok")
    (tmp_path / "cache").write_bytes(b"other GPU")
    found = command("build", model, "--target", "tensorrt", "--timing-cache", tmp_path / "cache")
    assert found.code == 2
    assert "of another GPU or version" in found.err
    assert (tmp_path / "cache").read_bytes() == b"other GPU"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--target", "ort-cpu"), 2, "'ort-cpu' has no engines"),
        (("--target", "jetson", "--plugin", "p.so"), 2, "built on the device"),
        (("--target", "tensorrt", "--compute-capability", 80), 2, "for the GPU of this machine"),
        (("--timing-cache", "c"), 2, "TensorRT for RTX does not have it"),
        (("--hardware-compatible",), 2, "TensorRT for RTX does not have it"),
        (("--version-compatible",), 2, "lean library"),
        (("--compute-capability", 90), 2, "found 90"),
        (("--shapes", "x"), 2, "--shapes: found 'x'"),
    ],
)
def test_options_without_effect_are_refused(command, model, tmp_path, words: Any, code, says):
    found = command("build", model, *words)
    assert found.code == code, found.err
    assert says in found.err
    assert left(tmp_path) == {"m.onnx"}


def test_ctrl_c_ends_a_build_at_once_and_leaves_nothing(
    fake, model, tmp_path, tmp_path_factory, monkeypatch
):
    fake("hang")
    log = tmp_path / "log"
    worker = tmp_path_factory.mktemp("worker") / "pid"
    monkeypatch.setenv("FAKE_TENSORRT_PID", str(worker))
    run = subprocess.Popen(
        [sys.executable, "-m", "optimizer", "build", str(model), "--target", "tensorrt", "-v"],
        stdout=subprocess.DEVNULL,
        stderr=log.open("w"),
        text=True,
        start_new_session=True,
    )
    limit = time.monotonic() + 60
    while not (worker.is_file() and worker.read_text()):
        assert run.poll() is None, log.read_text()
        assert time.monotonic() < limit
        time.sleep(0.02)
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    assert run.wait(30) == 130
    assert time.monotonic() - began < 2
    assert "interrupted" in log.read_text()
    assert left(tmp_path) == {"m.onnx", "log"}
    with pytest.raises(ProcessLookupError):  # the process that built is gone too
        os.kill(int(worker.read_text()), 0)
