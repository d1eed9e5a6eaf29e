"""benchmarks/gpu.py on the emulated kernels: its probe and checks, which notice mistakes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_emulated
import gpu
import pytest
import torch

pytestmark = [pytest.mark.native, pytest.mark.slow]


def test_the_command_runs_without_a_gpu(tmp_path: Path) -> None:
    """And without onnx_ir, which GPU machines for benchmarks may lack."""
    cuda_emulated.compiler()
    (tmp_path / "onnx_ir.py").write_text("raise ImportError('hidden by the test')")
    command = [sys.executable, gpu.__file__, "--emulate", "--only", "check", "--tiny"]
    result = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for layout in gpu.LAYOUTS:
        assert f"probe {layout}: right" in result.stdout
        assert f"check {layout}: {{'cases'" in result.stdout
    assert "failed" not in result.stdout


class Disturbed:
    """The library, with a byte of the weight's values changed before each call."""

    def __init__(self) -> None:
        self.lib = cuda_emulated.library()
        self.optimize_cuda_workspace = self.lib.optimize_cuda_workspace

    def optimize_cuda_run(self, weight: Any, *rest: Any) -> bytes | None:
        (ctypes.c_uint8 * 2).from_address(weight._obj.values)[1] ^= 0x3F
        return self.lib.optimize_cuda_run(weight, *rest)


@pytest.mark.parametrize("layout", ["mma16", "mma8", "sp16", "sp8"])
def test_a_wrong_value_is_noticed(layout: str) -> None:
    lib = Disturbed()
    assert gpu.probe(lib, "cpu")[layout] != "right"
    torch.manual_seed(0)
    result = gpu.check(lib, "cpu", [layout], tiny=True)[layout]
    assert layout in result["failed"]


def test_bytes_that_are_read_are_counted() -> None:
    """At 50 % zeros: 2 bytes for half of the weights, and a bit for each."""
    weight = gpu.weight_for("mma16", (1024, 256), 0.5, torch.float16, 0)
    lib = cuda_emulated.library()
    sparse = gpu.Sparse.of(lib, weight, "mma16", torch.float16, "cpu", repeats=3)
    assert sparse.shape == (1024, 768)
    dense = 2 * 1024 * 768
    assert dense / sparse.nbytes == pytest.approx(16 / 9, rel=0.02)
