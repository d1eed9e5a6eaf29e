"""What ONNX Runtime's own tools make of a model: the int8 forms a user gets today."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

#: A peer gets model, data and output path, and writes the model it makes.
Peer = Callable[[Path, list[Mapping[str, np.ndarray]], Path], None]
_LINEAR = ["MatMul", "Gemm"]
Feeds = list[Mapping[str, np.ndarray]]


class _Reader:
    """What ONNX Runtime calls a CalibrationDataReader."""

    def __init__(self, feeds: Iterable[Mapping[str, np.ndarray]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        return next(self._feeds, None)


def _tools() -> Any:
    # Its import makes a module called "optimizer" of its own importable: not before ours.
    import onnxruntime.quantization

    return onnxruntime.quantization


def fold(source: Path, target: Path) -> Path:
    """Constant folding and the other basic rewrites of ONNX Runtime, written to a file."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 4
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return target


def strip(source: Path, target: Path) -> Path:
    """Without the recorded shapes, which ``quantize_dynamic`` finds contradictory."""
    model = onnx.load(source)
    del model.graph.value_info[:]
    onnx.save(model, target)
    return target


def dynamic_raw(source: Path, feeds: Feeds, target: Path) -> None:
    """``quantize_dynamic`` on the export itself."""
    del feeds
    _quantize_dynamic(source, target)


def dynamic_folded(source: Path, feeds: Feeds, target: Path) -> None:
    """``quantize_dynamic`` after folding, so that it sees every weight as a constant."""
    del feeds
    _quantize_dynamic(fold(source, target.with_suffix(".folded.onnx")), target)


def _quantize_dynamic(source: Path, target: Path) -> None:
    stripped = strip(source, target.with_suffix(".stripped.onnx"))
    tools = _tools()
    tools.quantize_dynamic(
        stripped,
        target,
        weight_type=tools.QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=_LINEAR,  # by default it also turns Attention into an invalid node
    )
    stripped.unlink()


def static(source: Path, feeds: Feeds, target: Path) -> None:
    """``quantize_static`` in QDQ form after folding: linear layers, int8 weights per channel."""
    folded = fold(source, target.with_suffix(".folded.onnx"))
    stripped = strip(folded, target.with_suffix(".stripped.onnx"))
    tools = _tools()
    tools.quantize_static(
        stripped,
        target,
        _Reader(feeds),
        quant_format=tools.QuantFormat.QDQ,
        per_channel=True,
        activation_type=tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt8,
        op_types_to_quantize=_LINEAR,
    )
    stripped.unlink()


PEERS: dict[str, Peer] = {
    "ORT quantize_dynamic, raw": dynamic_raw,
    "ORT quantize_dynamic, folded": dynamic_folded,
    "ORT static QDQ, folded": static,
}


def make(name: str, source: Path, feeds: Feeds, target: Path) -> str | None:
    """Let a peer write ``target``; returns why it could not, if so."""
    logging.getLogger().setLevel(logging.ERROR)
    try:
        PEERS[name](source, feeds, target)
    except Exception as error:  # a peer may fail in any way; that is a result too
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        target.with_suffix(".folded.onnx").unlink(missing_ok=True)
    return None
