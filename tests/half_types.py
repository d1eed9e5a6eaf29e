"""Half-precision models for tests, made from float32 ones without looking at any number."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from optimizer.raising import value_info

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
HALVES = (FLOAT16, BFLOAT16)


def convert(model: ir.Model, dtype: ir.DataType) -> ir.Model:
    """Give every float32 value, input and constant of ``model`` the type ``dtype``."""
    value_info.fill(model)
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype == FLOAT:
            with np.errstate(over="ignore"):
                array = value.const_value.numpy().astype(dtype.numpy())
            value.const_value = ir.tensor(array, name=value.name)
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", dtype.value)
    produced = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *produced):
        if value.dtype == FLOAT:
            value.type = ir.TensorType(dtype)
    return model


def narrowed(feed: dict[str, np.ndarray], dtype: ir.DataType) -> dict[str, np.ndarray]:
    """A feed for a converted model."""
    return {k: a.astype(dtype.numpy()) if a.dtype == np.float32 else a for k, a in feed.items()}


def roundoff(dtype: ir.DataType) -> float:
    """Largest relative error of rounding to ``dtype``."""
    return float(ml_dtypes.finfo(dtype.numpy()).eps) / 2
