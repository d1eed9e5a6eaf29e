"""Which implementation runs a node in numpy."""

from __future__ import annotations

from optimizer.runners.contrib_ops import CONTRIB_OPERATORS, RUNTIME_OPERATORS
from optimizer.runners.numpy_ops import OPERATORS, Attributes, Operator


def find_operator(
    domain: str, op_type: str, attributes: Attributes, inputs: int, outputs: int
) -> Operator | None:
    """The operator, or None where it (or an option of it) is left to ``onnx.reference``."""
    if domain == "com.microsoft":
        return CONTRIB_OPERATORS.get(op_type)
    if domain not in {"", "ai.onnx"}:
        return None
    if op_type in RUNTIME_OPERATORS:
        return RUNTIME_OPERATORS[op_type]
    special = {
        # Scores as an output, lengths of an external cache, sliding windows.
        "Attention": outputs > 3
        or inputs > 6
        or attributes.get("left_window_size", -1) >= 0
        or attributes.get("right_window_size", -1) >= 0,
        # Where the last window may be cut off; indices as a second output.
        "AveragePool": bool(attributes.get("ceil_mode")),
        "MaxPool": bool(attributes.get("ceil_mode")) or outputs > 1,
        # 4-bit and 8-bit float targets.
        "QuantizeLinear": bool(attributes.get("output_dtype"))
        or bool(attributes.get("block_size")),
    }
    return None if special.get(op_type) else OPERATORS.get(op_type)
