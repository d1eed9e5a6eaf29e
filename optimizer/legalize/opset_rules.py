"""Lowers the operators of opset 23 to earlier opsets by rules of our own."""

from __future__ import annotations

import onnx_ir as ir

from optimizer.errors import UnsupportedError


def lower(model: ir.Model, opset: int) -> int:
    """Bring ``model`` to ``opset``; returns the number of nodes rewritten.

    Raises:
        UnsupportedError: There is no rule for something in the model.
    """
    own = model.graph.opset_imports.get("", opset)
    if own == opset:
        return 0
    msg = f"--opset {opset}: lowering from opset {own} is not implemented; leave --opset out"
    raise UnsupportedError(msg)
