"""ONNX Runtime on the device that was asked for, or not at all."""

from __future__ import annotations

import types
from typing import Any

import models
import numpy as np
import onnxruntime
import pytest

from optimizer.errors import MissingDependencyError
from optimizer.operands import Operand, Setup
from optimizer.runners import ort_device
from optimizer.runners.ort import OrtRunner


def played(*names: str, **more: Any) -> Any:
    return types.SimpleNamespace(
        __version__="1.31.1", get_available_providers=lambda: list(names), **more
    )


def test_a_cpu_wheel_has_no_cuda():
    ort = played("AzureExecutionProvider", "CPUExecutionProvider")
    assert ort_device.providers(ort, "cpu") == ["CPUExecutionProvider"]
    with pytest.raises(
        MissingDependencyError, match=r"has no CUDAExecutionProvider \(it has Azure"
    ):
        ort_device.providers(ort, "cuda")


def test_libraries_that_pip_installed_are_loaded_quietly(capsys):
    def preload() -> None:
        print("Failed to load libcudnn.so.9")  # noqa: T201
        raise RuntimeError("no such folder")

    levels: list[int] = []
    names = ("CUDAExecutionProvider", "CPUExecutionProvider")
    for more in ({"preload_dlls": preload}, {}):  # older versions do not have it
        ort = played(*names, set_default_logger_severity=levels.append, **more)
        assert ort_device.providers(ort, "cuda") == list(names)
    assert levels == [4, 4]
    assert capsys.readouterr().out == ""


def test_a_provider_that_cannot_be_loaded_is_no_reason_to_take_the_cpu(monkeypatch):
    """ONNX Runtime logs a warning and runs on the CPU."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(MissingDependencyError) as error,
    ):
        OrtRunner(models.build(), device="cuda")
    assert "could not load its CUDAExecutionProvider and took CPU" in str(error.value)


@pytest.mark.parametrize(
    ("text", "device", "found"),
    [
        ("CUDA failure 35: CUDA driver version is insufficient", "cuda", True),
        ("CUDA failure 35: CUDA driver version is insufficient", "cpu", False),
        ("Type Error: Type 'tensor(int4)' is invalid", "cuda", False),
    ],
)
def test_what_the_gpu_is_to_blame_for(text, device, found):
    error = ort_device.device_error(RuntimeError(f"{text}\nmore"), device)
    assert (error is not None) == found
    assert error is None or ("35" in str(error) and "doctor --target ort-cuda" in str(error))


def test_types_that_numpy_lacks_stay_on_the_host():
    ort = played(OrtValue=types.SimpleNamespace(ortvalue_from_numpy=lambda *words: words))
    half = np.zeros(2, np.float16)
    assert ort_device.on_device(ort, "here", half, "cuda")[1:] == ("cuda", 0)
    assert ort_device.on_device(ort, "here", half, "cpu") == "here"
    brain = np.zeros(2, models.ir.DataType.BFLOAT16.numpy())
    assert ort_device.on_device(ort, "here", brain, "cuda") == "here"


@pytest.mark.gpu
def test_the_same_numbers_on_a_gpu():
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider: pip install optimize-onnx[gpu]")
    model = models.build()
    outputs = []
    for device in ("cpu", "cuda"):
        try:
            operand = Operand(model, Setup(device=device))
        except MissingDependencyError as error:
            pytest.skip(str(error))
        operand.run()
        outputs.append(operand.outputs()["logits"])
    # TF32 is off by default in ONNX Runtime's CUDA provider for MatMul of float32: rounding only.
    assert np.allclose(*outputs, atol=2e-2)
