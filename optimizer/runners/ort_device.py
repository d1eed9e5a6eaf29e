"""On which device ONNX Runtime runs a model, refused where it would quietly take another."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np

from optimizer.errors import MissingDependencyError

CPU, CUDA = "cpu", "cuda"
_PROVIDERS = {CPU: "CPUExecutionProvider", CUDA: "CUDAExecutionProvider"}
_DOCTOR = "'optimize doctor --target ort-cuda' says what is missing"


def providers(ort: Any, device: str) -> list[str]:
    """The execution providers to ask for; operators that CUDA does not have run on the CPU.

    Args:
        ort: The module.
        device: "cpu" or "cuda".

    Raises:
        MissingDependencyError: This ONNX Runtime has none for the device.
    """
    wanted = _PROVIDERS[device]
    offered = ort.get_available_providers()
    if wanted not in offered:
        msg = (
            f"ONNX Runtime {ort.__version__} here has no {wanted} (it has {', '.join(offered)}); "
            "install optimize-onnx[gpu] instead of optimize-onnx[cpu]"
        )
        raise MissingDependencyError(msg)
    if device == CPU:
        return [wanted]
    _prepare(ort)
    return [wanted, _PROVIDERS[CPU]]


def _prepare(ort: Any) -> None:
    """Load CUDA's libraries from the folders of pip, where only a program that asks finds them."""
    ort.set_default_logger_severity(4)  # what it prints is one line of ours
    quiet = contextlib.redirect_stdout(io.StringIO())
    with contextlib.suppress(AttributeError, OSError, RuntimeError), quiet:
        ort.preload_dlls()


def check_device(session: Any, device: str) -> None:
    """ONNX Runtime goes on with the CPU where a provider cannot be loaded; this does not.

    Raises:
        MissingDependencyError: The session is not on the device.
    """
    used = session.get_providers()
    if _PROVIDERS[device] not in used:
        msg = f"ONNX Runtime could not load its {_PROVIDERS[device]} and took {', '.join(used)}; "
        raise MissingDependencyError(msg + _DOCTOR)


def device_error(error: Exception, device: str) -> MissingDependencyError | None:
    """What to say where a session failed because of the GPU, and not because of the model."""
    text = str(error)
    if device == CPU or not any(word in text for word in ("CUDA failure", "cudaError", "cudnn")):
        return None
    line = text.strip().splitlines()[0][:200]
    return MissingDependencyError(f"ONNX Runtime cannot use a GPU here: {line}; {_DOCTOR}")


def on_device(ort: Any, value: Any, array: np.ndarray, device: str) -> Any:
    """``value`` of ``array`` in the device's memory; types that numpy lacks stay in the host's."""
    if device == CPU or array.dtype.isbuiltin != 1:
        return value
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)
