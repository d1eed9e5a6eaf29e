"""How large numbers get: measured inside of the model, against numpy on all values."""

from __future__ import annotations

import models
import numpy as np
import onnx_ir as ir
import pytest
from half_types import BFLOAT16, FLOAT16, convert, narrowed
from rule_case import graph

from optimizer.calibration import Calibration, input_specs
from optimizer.precision.ranges import Ranges, measure
from optimizer.raising import value_info
from optimizer.runners.ort import OrtRunner
from optimizer.samples import load_samples


def ranges(model: ir.Model, *feeds: dict[str, np.ndarray]) -> Ranges:
    samples = load_samples(list(feeds), input_specs(model))
    return measure(model.clone(), Calibration(samples))


def test_the_largest_number_of_every_floating_value_is_found():
    config = models.Config(kv_cache=True)
    model = models.build(config)
    value_info.fill(model)
    text = ir.to_proto(model).SerializeToString()
    feeds = [models.feed(config, 1, 4, past, seed=past) for past in (0, 2, 5)]
    found = ranges(model, *feeds)
    assert ir.to_proto(model).SerializeToString() == text
    assert found.samples == 3
    values = [v for n in model.graph for v in n.outputs if v.dtype == ir.DataType.FLOAT]
    runner = OrtRunner(model, extra_outputs=values)
    expected: dict[str, float] = {}
    for feed in feeds:
        arrays = {**runner.run(feed), **{k: a for k, a in feed.items() if a.dtype == np.float32}}
        for name, array in arrays.items():
            expected[name] = max(expected.get(name, 0), float(np.abs(array).max(initial=0)))
    assert found.largest.keys() == expected.keys()
    for name, number in found.largest.items():
        assert number == pytest.approx(expected[name], rel=1e-6), name  # float32, printed once


def test_infinities_and_what_is_not_a_number_do_not_count():
    model = graph("y = Log(x)", inputs="float[B,S] x", output="float[B,S] y")
    found = ranges(model, {"x": np.array([[0, -20, 8, 1]], np.float32)})
    assert found.largest == pytest.approx({"x": 20, "y": np.log(8)})


def test_padding_counts():
    """Unlike elsewhere: infinity in a padded row times a probability of 0 is not a number."""
    model = models.build(layers=1)
    value_info.fill(model)
    feed = models.feed(models.Config(layers=1), 1, 6)
    masked = {**feed, "attention_mask": np.array([[1, 1, 1, 0, 0, 0]])}
    (table,) = [n for n in model.graph if n.op_type == "Gather"]
    rows = np.abs(table.inputs[0].const_value.numpy())
    found = ranges(model, masked).largest["stream.0"]
    assert found == rows[feed["input_ids"]].max()
    assert found > rows[feed["input_ids"][:, :3]].max()


def test_an_empty_array_has_no_largest_number():
    model = graph("y = Add(x, x)", inputs="float[B,S] x", output="float[B,S] y")
    assert ranges(model, {"x": np.zeros((1, 0), np.float32)}).largest == {}


INSIDE = {
    "product": (
        "y = MatMul(x, w)", "float[2,3] w = {3, 0, 1, 4, 0, 1}",
        lambda x: np.linalg.norm(x, axis=-1).max() * 5,
    ),
    "sum": (
        "s = ReduceSum<keepdims = 1>(x, a)  y = Add(s, x)", "int64[1] a = {-1}",
        lambda x: np.abs(x).sum(axis=-1).max(),
    ),
    "mean": (
        "s = ReduceMean<keepdims = 1>(x, a)  y = Add(s, x)", "int64[1] a = {1}",
        lambda x: np.abs(x).sum(axis=1).max(),
    ),
    "norm": (
        "s = ReduceL2<keepdims = 1>(x, a)  y = Add(s, x)", "int64[1] a = {-1}",
        lambda x: np.square(x).sum(axis=-1).max(),
    ),
    "two products of activations": (
        "t = Transpose<perm = [0, 2, 1]>(x)  y = MatMul(x, t)", "",
        lambda x: np.square(np.linalg.norm(x, axis=-1).max()),
    ),
    "attention": (
        "y = Attention<q_num_heads = 2, kv_num_heads = 1, scale = 0.001>(x, k, k)",
        "float[1,2,1] k = {3, -4}",
        lambda x: np.abs(x).max() * 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_partial_sums_are_bounded_in_any_order(name):
    nodes, constants, expected = INSIDE[name]
    model = graph(nodes, inputs="float[1,2,2] x", output="float y", constants=constants)
    model.graph.outputs[0].shape = None
    x = np.array([[[1, -30], [20, 5]]], np.float32)
    (bound,) = ranges(model, {"x": x}).inside.values()
    assert bound == pytest.approx(float(expected(x)), rel=1e-6)


def test_cached_keys_count_as_much_as_new_ones():
    model = graph(
        "y, k, v = Attention<q_num_heads = 1, kv_num_heads = 1>(x, x, x, , pk, pv)",
        inputs="float[1,1,2] x, float[1,1,P,2] pk, float[1,1,P,2] pv",
        output="float[1,1,2] y, float[1,1,T,2] k, float[1,1,T,2] v",
    )  # fmt: skip
    x, past = np.array([[[3, 4]]], np.float32), np.array([[[[60, 80], [0, 1]]]], np.float32)
    (bound,) = ranges(model, {"x": x, "pk": past, "pv": past}).inside.values()
    assert bound == pytest.approx(5 * 100, rel=1e-6)
    (bound,) = ranges(model, {"x": x, "pk": past[:, :, :0], "pv": past[:, :, :0]}).inside.values()
    assert bound == pytest.approx(5 * 5, rel=1e-6)


def test_small_numbers_are_looked_for_where_they_are_divided_by():
    model = graph(
        "s = Sqrt(x)  d = Div(x, s)  r = Reciprocal(d)  l = Log(x)  p = Pow(l, two)  q = Pow(x, m)"
        "  a = Add(r, p)  y = Add(a, q)",
        inputs="float[B,3] x", output="float[B,3] y", constants="float two = {2}, float m = {-1}",
    )  # fmt: skip
    found = ranges(model, {"x": np.array([[0, 4e-6, 100]], np.float32)})
    assert found.smallest == pytest.approx({"x": 4e-6, "s": 2e-3, "d": 2e-3}, rel=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_half_precision_models_are_measured_with_room_for_squares(dtype):
    model = convert(
        graph("y = MatMul(x, w)", inputs="float[1,2] x", output="float[1,2] y",
              constants="float[2,2] w = {300, 0, 400, 1}"),
        dtype,
    )  # fmt: skip
    found = ranges(model, narrowed({"x": np.array([[60, -80]], np.float32)}, dtype))
    assert found.inside == pytest.approx({"y": 100 * 500}, rel=1e-6)
    assert found.largest["x"] == 80
