"""Runs one rule of ``canonicalize`` on a graph given as ONNX text, executes both graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from optimizer import gate
from optimizer.fingerprint import fingerprint
from optimizer.raising import value_info
from optimizer.raising.base import RuleReport

SIZE = 3  # of every named dimension


def model(body: str, *, opset: int = 23, domains: str = "") -> ir.Model:
    """A model of the graph ``body``, checked, with the types of its values."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}{domains}]>\n'
    proto = onnx.parser.parse_model(header + body)
    onnx.checker.check_model(proto)
    result = ir.from_proto(proto)
    value_info.fill(result)  # as ``canonicalize`` does before any rule
    return result


def graph(
    nodes: str,
    *,
    inputs: str = "float[B,S,4] x",
    output: str = "float[B,S,4] y",
    constants: str = "",
    opset: int = 23,
) -> ir.Model:
    """A model from a list of nodes, with initializers ``constants``."""
    held = f"<{constants}>" if constants else ""
    return model(f"g ({inputs}) => ({output}) {held} {{ {nodes} }}", opset=opset)


def ops(result: ir.Model) -> Counter[str]:
    """How many nodes of each operator the main graph has."""
    return Counter(node.op_type for node in result.graph)


def only(result: ir.Model, op_type: str) -> ir.Node:
    """The one node of an operator."""
    (node,) = [node for node in result.graph if node.op_type == op_type]
    return node


def feed(case: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs."""
    random = np.random.default_rng(seed)
    arrays = {}
    for value in case.graph.inputs:
        if value.is_initializer():
            continue
        shape = [dim if isinstance(dim, int) else SIZE for dim in value.shape or ()]
        numbers = random.normal(size=shape) if value.dtype.is_floating_point() else None
        drawn = random.integers(0, 3, size=shape) if numbers is None else numbers
        arrays[value.name] = drawn.astype(value.dtype.numpy())
    return arrays


Rule = Callable[[ir.Model], RuleReport]


def rewritten(case: ir.Model, rule: Rule) -> tuple[onnx.ModelProto, onnx.ModelProto, RuleReport]:
    """The graph before and after the rule, and its report; the result is valid and called the same.

    The rule must ask the gate: refused, it changes nothing.
    """
    before = ir.to_proto(case)
    closed = ir.from_proto(before)
    value_info.fill(closed)
    with gate.using(gate.Recorder(gate.first(0))):
        assert not rule(closed).applied, "the rule rewrites without asking raising.base.allow"
    assert fingerprint(case).difference(fingerprint(closed)) is None
    asked = gate.Recorder()
    with gate.using(asked):
        report = rule(case)
    assert len(asked.taken) == report.applied, "a rule asks once for every rewrite that it counts"
    after = ir.to_proto(case)
    onnx.checker.check_model(after, full_check=True)
    assert [v.name for v in after.graph.input] == [v.name for v in before.graph.input]
    assert [v.name for v in after.graph.output] == [v.name for v in before.graph.output]
    return before, after, report


def assert_equal_up_to(roundings: int, wanted: list[np.ndarray], got: list[np.ndarray]) -> None:
    """Types, shapes and, up to that many roundings of the largest number, values are the same."""
    for old, new in zip(wanted, got, strict=True):
        assert old.dtype == new.dtype
        assert old.shape == new.shape
        unit = np.finfo(old.dtype).eps if np.issubdtype(old.dtype, np.floating) else 0
        bound = roundings * unit * max(1.0, float(np.max(np.abs(old), initial=0)))
        assert float(np.max(np.abs(old.astype(float) - new.astype(float)), initial=0)) <= bound


def apply(case: ir.Model, rule: Rule) -> RuleReport:
    """Run the rule; the graph must stay valid, and compute and be called the same."""
    arrays = feed(case)
    before, after, report = rewritten(case, rule)
    wanted = ReferenceEvaluator(before).run(None, arrays)
    got = ReferenceEvaluator(after).run(None, arrays)
    # Exact algebra in another order: the bound that the pipeline holds exact passes to.
    assert_equal_up_to(16, wanted, got)
    assert not rule(case).applied, "a second run must change nothing"
    return report


def refuses(case: ir.Model, rule: Rule, reason: str | None) -> None:
    """The rule must leave the graph as it is; ``reason`` is part of what it says, None: nothing."""
    before = ir.to_proto(case).SerializeToString()
    report = rule(case)
    assert report.applied == 0
    assert ir.to_proto(case).SerializeToString() == before
    said = "; ".join(miss.reason for miss in report.skipped)
    assert (reason in said) if reason is not None else not said, said
