"""The command ``doctor``: one screen, JSON, exit codes, and no need of anything but itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome
from fake_machine import Machine

from optimizer import environment

ROOT = Path(__file__).resolve().parent.parent
Command = Callable[..., Outcome]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine that ``doctor`` looks at."""
    made = Machine(tmp_path / "machine")
    monkeypatch.setattr(environment, "Probe", made.probe)
    return made


def test_a_good_machine_fits_on_one_screen(command: Command, machine: Machine) -> None:
    machine.onnxruntime()
    machine.install("onnx", "1.23.2")
    found = command("doctor")
    assert (found.code, found.err) == (0, "")
    lines = found.out.splitlines()
    assert len(lines) <= 30
    assert all(len(line) <= 110 or str(machine.base) in line for line in lines)
    for part in ("onnx 1.23.2", "ort-cpu       runs here", "usable here: ort-cpu"):
        assert part in found.out
    sections = ["libraries", "cpu", "memory", "ort", "tensorrt", "gpu", "targets", "findings"]
    assert [line.split()[0] for line in lines[1:-1] if not line.startswith(" ")] == sections


def test_an_empty_machine_lacks_the_default_target(command: Command, machine: Machine) -> None:
    found = command("doctor")
    assert found.code == 6
    assert "pip install optimize-onnx[cpu]" in found.out
    assert found.out.splitlines()[-1] == "not usable here: ort-cpu"


def test_the_wrong_major_version_of_tensorrt_is_found_in_the_files(
    command: Command, machine: Machine
) -> None:
    offers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    machine.onnxruntime("onnxruntime-gpu", "1.31.1", cuda="13.0", providers=offers)
    capi = "onnxruntime/capi/libonnxruntime_providers"
    machine.library(f"{capi}_cuda.so", ["libcudart.so.13", "libcuda.so.1"])
    machine.library(f"{capi}_tensorrt.so", ["libnvinfer.so.10", "libcudart.so.13"])
    machine.library("/usr/local/lib/libcuda.so.1")
    machine.library("nvidia/cu13/lib/libcudart.so.13")
    machine.library("tensorrt_libs/libnvinfer.so.11")
    machine.install("tensorrt", "11.4.0.106")
    machine.gpu()
    found = command("doctor", "--target", "ort-cuda", "--target", "tensorrt-11")
    assert found.code == 0
    text = " ".join(found.out.split())
    for part in (
        "offers Tensorrt, CUDA, CPU",
        "cuda provider: only in Python packages libcudart.so.13",
        "tensorrt provider: not found libnvinfer.so.10",
        "NVIDIA L4, compute capability 8.9, 24.2 GB driver 580.95",
        "ort-cuda runs here",
        "tensorrt-11 engines can be built and run here",
        "needs libnvinfer.so.10, installed is TensorRT 11.4.0.106 (libnvinfer.so.11): it cannot",
        '-> pip install "tensorrt-cu13==10.*" where you use that provider',
        "[tensorrt-provider-major]",
        "usable here: ort-cuda, tensorrt-11",
    ):
        assert part in text, part


def test_a_runtime_that_aborts_is_a_finding(command: Command, machine: Machine) -> None:
    machine.onnxruntime(code="import os; os.abort()")
    found = command("doctor")
    assert found.code == 6
    assert "the process was ended by SIGABRT" in " ".join(found.out.split())


def test_json_holds_facts_findings_and_the_exit_code(command: Command, machine: Machine) -> None:
    machine.onnxruntime()
    machine.program("nvidia-smi", "echo broken; exit 9")
    found = command("doctor", "--json", "--target", "ort-cuda")
    content = json.loads(found.out)
    assert found.code == content["exit_code"] == 6
    assert content["asked"] == ["ort-cuda"]
    assert content["facts"]["onnxruntime"]["offers"] == ["CPUExecutionProvider"]
    ids = {item["id"]: item["severity"] for item in content["findings"]}
    assert ids["nvidia-driver-error"] == "warning"
    usable = {item["target"]: item["usable"] for item in content["targets"]}
    assert usable == {name: name == "ort-cpu" for name in usable}


def test_an_unknown_target_is_wrong_usage(command: Command, machine: Machine) -> None:
    found = command("doctor", "--target", "ort-cudaa")
    assert (found.code, found.out) == (2, "")
    assert "did you mean 'ort-cuda'?" in found.err


def test_other_systems_say_what_was_not_looked_at(
    command: Command, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.onnxruntime()
    monkeypatch.setattr(environment, "Probe", lambda: machine.probe(system="win32"))
    found = command("doctor")
    assert found.code == 0
    assert "shared libraries: not looked at on this system" in found.out
    assert "instruction sets: not known on this system" in found.out


def test_it_runs_without_anything_but_click_and_loads_no_runtime(tmp_path: Path) -> None:
    """Everything else is made to fail on import, in the command and in what it starts."""
    for name in ("numpy", "onnx", "onnx_ir", "pydantic", "rich", "onnxruntime", "torch"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is broken')\n")
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "optimizer", "doctor"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"},
    )
    assert done.stderr == ""
    assert done.returncode == 6
    assert "cannot be imported: ImportError: numpy is broken" in " ".join(done.stdout.split())
    # Goal 1 s on an idle machine; a loaded one gets ten times that.
    assert time.perf_counter() - started < 10
