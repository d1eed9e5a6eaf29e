"""Fixtures for all tests: small models on disk, sample data, the command without a subprocess."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One thread each: test machines are small, and several workers share them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_COLOR", "1")

import hypothesis
import models
import numpy as np
import pytest

from optimizer import cli
from optimizer.model_io import save_model

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("tests")


@dataclass(frozen=True)
class Outcome:
    """What one run of the command did."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Lines on stderr."""
        return self.err.strip().splitlines()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command in this process."""

    def run(*words: Any) -> Outcome:
        capsys.readouterr()
        code = cli.run_command([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def token_samples(count: int = 6, length: int = 12, vocab: int = 50) -> dict[str, np.ndarray]:
    """Random token ids for ``models.build``."""
    rng = np.random.default_rng(7)
    return {"input_ids": rng.integers(0, vocab, (count, length))}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A four-layer LLaMA-like model with its calibration data beside it."""
    path = tmp_path / "small.onnx"
    save_model(models.build(layers=4), path)
    np.savez(tmp_path / "small.calibration.npz", **token_samples())
    return path
