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
import gpu_bench
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


def test_what_a_benchmark_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part but the clock: each contender is called once, and took as long as it reads."""

    def in_turns(**contenders: list[Any]) -> dict[str, list[float]]:
        for calls in contenders.values():
            for call in calls:
                call()
        return {name: [10.0 if name == "sparse" else 20.0] * 3 for name in contenders}

    monkeypatch.setattr(gpu_bench, "in_turns", in_turns)
    monkeypatch.setattr(gpu_bench, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_bench, "SHAPES", ((128, 512),))
    monkeypatch.setattr(gpu_bench, "CACHE", 1.0)
    monkeypatch.setattr(gpu_bench, "PREFILL", (64,))
    monkeypatch.setattr(gpu_bench, "read_rate", lambda lib: 1000.0)
    monkeypatch.setattr(gpu_bench, "semi_structured", lambda dense, x: "not here")
    results: dict[str, Any] = {}
    saved: list[int] = []
    lib = cuda_emulated.library()
    gpu_bench.bench(lib, list(gpu.LAYOUTS), results, lambda: saved.append(1), float("inf"))
    rows = results["rows"]
    assert len(rows) == 2 * 4 * 5 + 2 * 6
    assert len(saved) == 2 * 4 + 2
    for row in rows:
        assert row["speedup"] == 2
        assert row["of_read"] == row["GBps"] / 1000
        assert row["GBps"] * row["sparse_us"] * 1e3 == pytest.approx(
            2 * 128 * 512 / row["byte_ratio"]
        )
        assert (row.get("semi_structured") == "not here") == (row["layout"] == "sp16")


def test_a_benchmark_ends_at_its_deadline() -> None:
    results: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_bench, "read_rate", lambda lib: 1.0)
        gpu_bench.bench(None, ["mma16"], results, lambda: None, 0.0)
    assert results == {"rows": [], "read_GBps": 1.0, "stopped": "time limit"}


def test_speed_is_not_emulated() -> None:
    command = [sys.executable, gpu.__file__, "--emulate"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert "--emulate says nothing about speed" in result.stderr
