"""The bf16 pass: no range to look at, but few bits; what both passes share is in test_fp16."""

from __future__ import annotations

import golden_cases
import half_types
import models
import numpy as np
import pytest
from golden_cases import Case
from half_cases import calibration, check_case, computing, convert, error, kept, naive, outputs
from rule_case import graph, ops

from optimizer.legalize import legalize
from optimizer.pass_base import Context
from optimizer.runners.ort import OrtRunner
from passes.bf16 import Bf16

U = half_types.roundoff(half_types.BFLOAT16)

FIRES = {
    "products and what lies between": "h = MatMul(x, w)  a = Gelu(h)  y = MatMul(a, w)",
    "numbers beyond 65504": "h = Mul(x, big)  y = MatMul(h, w)",
    "numbers below 6e-5": "h = Mul(x, small)  y = MatMul(h, w)",
    "sums of few": "h = MatMul(x, w)  s = ReduceSum<keepdims = 1>(h, last)  y = Mul(h, s)",
    "a softmax over few": "h = MatMul(x, w)  p = Softmax(h)  y = MatMul(p, w)",
}
STAYS = {
    "a power": ("h = MatMul(x, w)  p = Pow(h, three)  y = MatMul(p, w)", "p",
                "errors of its input are multiplied by the size of it"),
    "an exponential": ("h = MatMul(x, w)  p = Exp(h)  y = MatMul(p, w)", "p",
                       "errors of its input are multiplied by the size of it"),
    "a sum over unknown many": (
        "h = MatMul(x, w)  p = ReduceMean<keepdims = 1>(h, first)  a = Add(h, p)  y = MatMul(a, w)",
        "p", "it adds up an unknown number of terms; bf16 holds 256"),
    "a sum of many": (
        "h = MatMul(x, v)  p = ReduceMean<keepdims = 1>(h, last)  a = Add(x, p)  y = MatMul(a, w)",
        "p", "it adds up 300 terms; bf16 holds 256"),
    "what picks a number": (
        "h = MatMul(x, w)  p = Floor(h)  y = MatMul(p, w)", "p",
        "which number it picks hangs on small differences"),
    "a running sum": (
        "h = MatMul(x, w)  p = CumSum(h, axis)  y = MatMul(p, w)", "p",
        "what it adds up grows along its axis"),
}  # fmt: skip
_CONSTANTS = (
    "float[4,4] w = {1, 2, 0, 1, -1, 1, 0, 2, 0.5, 0, 1, 1, 0, 1, -2, 1}, float big = {1e9}, "
    "float small = {1e-9}, float three = {3}, int64[1] last = {-1}, int64[1] first = {1}, "
    "int64 axis = {1}, float[4,300] v = {" + ", ".join(["0.25"] * 1200) + "}"
)


def build(nodes: str):
    return graph(nodes, inputs="float[B,S,4] x", output="float[B,S,4] y", constants=_CONSTANTS)


@pytest.mark.parametrize("name", FIRES)
def test_converts(name):
    model = build(FIRES[name])
    feed = {"x": np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)}
    expected = outputs(model, feed)["y"]
    report = convert(model, kind="bf16")
    assert not report.skipped
    assert not report.notes
    assert computing(model, half_types.FLOAT) == set()
    assert error(expected, outputs(model, feed)["y"]) < 16 * U  # at most eight roundings


@pytest.mark.parametrize("name", STAYS)
def test_leaves_alone_and_says_why(name):
    nodes, value, reason = STAYS[name]
    model = build(nodes)
    report = convert(model, kind="bf16")
    assert kept(report)[value] == reason
    assert value in computing(model, half_types.FLOAT)


def test_no_data_is_looked_at():
    """The range is that of float32."""
    model, counted = models.build(layers=1), models.build(layers=1)
    data = calibration(model, models.feed(models.Config(layers=1)))
    data.observe = None  # type: ignore[method-assign, assignment]
    Bf16().call(model, Context(target="tensorrt-11", calibration=data))
    Bf16().call(counted, Context(target="tensorrt-11"))
    assert golden_cases.text(model) == golden_cases.text(counted)
    assert not Bf16().needs_calibration()


def test_the_lowest_float32_becomes_no_infinity():
    model = graph(
        "z = Where(c, zero, low)  n = Mul(z, x)  s = Add(n, x)  y = Softmax(s)",
        inputs="float[B,2] x, bool[B,2] c", output="float[B,2] y",
        constants="float zero = {0}, float low = {-3.4028235e38}",
    )  # fmt: skip
    feed = {"x": np.array([[0, 1]], np.float32), "c": np.array([[False, True]])}
    expected = outputs(model, feed)["y"]
    assert np.isnan(naive(model, feed, "bf16")["y"]).all()  # minus infinity times 0
    convert(model, kind="bf16", io="half")
    assert error(expected, outputs(model, feed)["y"]) < 4 * U


def test_operators_that_the_target_s_opset_lacks_stay():
    nodes = "c = Conv(x, w)  y = Relu(c)"
    signature = {
        "inputs": "float[B,1,4,4] x", "output": "float[B,1,4,4] y",
        "constants": "float[1,1,1,1] w = {2}",
    }  # fmt: skip
    for target, stays in (("jetson", True), ("tensorrt-11", False)):
        model = graph(nodes, **signature)
        report = convert(model, kind="bf16", target=target)
        assert ("Conv takes no BFLOAT16 as 'X' in opset 20" in kept(report).values()) == stays
        legalize(model, target)


def test_a_target_that_only_stores_the_type_computes_in_float32():
    config = models.Config(layers=1)
    model = models.build(config)
    feed = models.feed(config)
    expected = OrtRunner(model).run(feed)["logits"]
    report = convert(model, kind="bf16", target="ort-cpu")
    assert "weights are stored in bfloat16 and computed with in float32" in report.notes[0]
    legalize(model, "ort-cpu")
    kinds = {v.dtype for v in model.graph.initializers.values() if v.const_value.nbytes > 512}
    assert kinds == {half_types.BFLOAT16}
    assert ops(model)["Cast"] > 8
    found = OrtRunner(model, rounding=False).run(feed)["logits"]  # as ONNX Runtime runs it
    # Only the weights are rounded: of nine products in a row, by u each at most.
    assert error(expected, found) < 9 * U


@pytest.mark.parametrize("case", golden_cases.cases("bf16"), ids=lambda case: case.name)
def test_golden_case(case: Case):
    model = case.model()
    report = convert(model, kind="bf16", **case.options)
    assert report.modified
    assert golden_cases.text(model) == golden_cases.text(case.after)
    check_case(case, "bf16")
    assert not convert(model, kind="bf16", **case.options).modified
