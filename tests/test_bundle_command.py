"""``optimize build --target jetson``: from the command to a bundle that proves itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from conftest import Outcome

from optimizer.model_io import save_model


@pytest.mark.parametrize("kv_cache", [False, True])
@pytest.mark.parametrize(
    "passes", ["fp16", "sparsify:method=magnitude,fp16,sparse-matmul:force=true"]
)
def test_the_command_writes_a_bundle_whose_dry_run_passes(
    command: Callable[..., Outcome], tmp_path: Path, passes: str, kv_cache: bool
) -> None:
    save_model(models.build(kv_cache=kv_cache), tmp_path / "m.onnx")
    folder = tmp_path / "b"
    words: list[Any] = ["build", tmp_path / "m.onnx", "--target", "jetson", "-o", folder]
    done = command(*words, "--passes", passes, "--verify", "off")
    assert done.code == 0, done.err
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert manifest["jetpack"] == "6.2"
    assert bool(manifest["plugins"]) == ("sparse" in passes) == (folder / "plugins").is_dir()
    samples = np.load(folder / "samples.npz")
    assert all(np.isfinite(samples[name]).all() for name in samples.files)
    run = subprocess.run(
        [sys.executable, "build_engine.py", "--dry-run"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "trtexec" in run.stdout
    again = command(*words, "--passes", passes, "--verify", "off")
    assert again.code == 2
    assert "exists" in again.err
    assert command(*words, "--passes", passes, "--verify", "off", "--force").code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--target", "jetson", "--compute-capability", "87"], "--compute-capability: a bundle's"),
        (["--target", "jetson", "--jetpack", "5.1"], "5.1"),
        (["--target", "tensorrt-rtx", "--jetpack", "6.2"], "--jetpack is for --target jetson"),
        (["--target", "jetson", "--shapes", "input_ids:1x2x3"], "input_ids"),
    ],
)
def test_what_contradicts_a_bundle_is_refused(
    command: Callable[..., Outcome], tmp_path: Path, words: list[str], says: str
) -> None:
    save_model(models.build(), tmp_path / "m.onnx")
    done = command("build", tmp_path / "m.onnx", *words, "-o", tmp_path / "b", "--verify", "off")
    assert done.code == 2
    assert says in done.err
    assert not (tmp_path / "b").exists()
