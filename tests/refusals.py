"""Small models on disk, and the sentence with which one is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from fuzzing import files

from optimizer.errors import ModelError, OptimizerError
from optimizer.model_io import load_model


def model_of(nodes: list[onnx.NodeProto], **held: np.ndarray) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(files.model_of(nodes, held, dims=["N"]))


def written(tmp_path: Path, model: onnx.ModelProto) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refusal(path: Path, kind: type[OptimizerError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        load_model(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert text.isprintable()
    return text
