"""Raises operators of ``com.microsoft`` in graphs given as ONNX text, executed by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
from rule_case import SIZE, Rule, assert_equal_up_to, rewritten

from optimizer.raising import value_info
from optimizer.raising.base import RuleReport

Feed = dict[str, np.ndarray]
RNG = np.random.default_rng(5)


def build(
    nodes: str,
    *,
    inputs: str = "float[B,S,8] x",
    outputs: str = "float[B,S,8] y",
    constants: str = "",
    opset: int = 23,
) -> ir.Model:
    """A model with both domains."""
    held = f"<{constants}>" if constants else ""
    text = (
        f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
        f"g ({inputs}) => ({outputs}) {held} {{ {nodes} }}"
    )
    result = ir.from_proto(onnx.parser.parse_model(text))
    value_info.fill(result)
    return result


def constant(name: str, array: np.ndarray) -> str:
    """An initializer as text."""
    sizes = ",".join(map(str, array.shape))
    kind = {"float32": "float", "int64": "int64", "int32": "int32"}[str(array.dtype)]
    numbers = ", ".join(str(number) for number in array.reshape(-1).tolist())
    return f"{kind}[{sizes}] {name} = {{{numbers}}}"


def weights(**shapes: tuple[int, ...]) -> str:
    """Random initializers."""
    made = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return ", ".join(constant(name, array) for name, array in made.items())


def feed(case: ir.Model, given: Feed | None = None) -> Feed:
    """Random inputs but for those ``given``."""
    random, arrays = np.random.default_rng(0), {}
    for value in case.graph.inputs:
        shape = [dim if isinstance(dim, int) else SIZE for dim in value.shape or ()]
        numbers = random.normal(size=shape)
        arrays[str(value.name)] = numbers.astype(value.dtype.numpy())
    return {**arrays, **(given or {})}


def run(proto: onnx.ModelProto, arrays: Feed) -> list[np.ndarray]:
    """What ONNX Runtime computes of the graph as it is."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results: list[np.ndarray] = session.run(None, arrays)
    return results


def apply(case: ir.Model, rule: Rule, given: Feed | None = None) -> RuleReport:
    """Run the rule; it must ask the gate, and the graph must compute and be called the same."""
    arrays = feed(case, given)
    before, after, report = rewritten(case, rule)
    for node in case.graph:
        assert all(output.dtype is not None for output in node.outputs if output.uses())
    # Sums of at most 32 terms, a softmax and a norm in float32 (or the type of the model).
    assert_equal_up_to(32, run(before, arrays), run(after, arrays))
    assert not rule(case).applied, "a second run must change nothing"
    return report


def refuses(case: ir.Model, rule: Rule, reason: str) -> None:
    """The rule says why it leaves the graph as it is."""
    before = ir.to_proto(case).SerializeToString()
    report = rule(case)
    assert not report.applied
    assert reason in "; ".join(miss.reason for miss in report.skipped)
    assert ir.to_proto(case).SerializeToString() == before
