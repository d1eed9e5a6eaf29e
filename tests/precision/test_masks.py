"""Masks and limits beyond the range: which constants are that, and what they hold after."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rule_case import graph, only

from optimizer.precision.constants import look
from optimizer.precision.limits import BF16, FP16
from optimizer.precision.masks import Extremes, find_extremes, overflowing, reached

LOW = "float zero = {0}, float low = {-3.4028235e38}, float one = {1}"
SIGNATURE = {"inputs": "float[B,4,4] x, bool[B,4,4] c, int64[B,1,4] i", "constants": LOW}


def found(nodes: str, format_=FP16, **changes) -> tuple[ir.Model, Extremes]:
    model = graph(nodes, **{**SIGNATURE, "output": "float[B,4,4] y", **changes})
    held = model.graph.initializers.items()
    constants = {name: look(value.const_value, format_) for name, value in held}
    return model, find_extremes(model.graph, constants, format_)


MASKS = {
    "added to scores": "z = Where(c, zero, low)  a = Add(x, z)  y = Softmax(a)",
    "chosen instead of scores": "a = Where(c, x, low)  y = Softmax(a)",
    "times one minus the mask": "f = Cast<to = 1>(i)  n = Sub(one, f)  z = Mul(n, low)"
    "  a = Add(x, z)  y = Softmax(a)",
    "added twice": "z = Where(c, zero, low)  a = Add(x, z)  b = Add(a, z)  y = Softmax(b)",
    "moved around": "z = Where(c, zero, low)  t = Transpose<perm = [0, 2, 1]>(z)  a = Add(x, t)"
    "  y = Softmax(a)",
    "given to an attention": "z = Where(c, zero, low)"
    "  y = Attention<q_num_heads = 1, kv_num_heads = 1>(x, x, x, z)",
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("format_", [FP16, BF16], ids=["fp16", "bf16"])
def test_what_ends_in_a_softmax_is_a_mask(name, format_):
    inputs = SIGNATURE["inputs"].replace("bool[B,4,4]", "bool[4,4]") if "att" in name else None
    changes = {"inputs": inputs} if inputs else {}
    model, extremes = found(MASKS[name], format_, **changes)
    assert extremes.masks == {"low"}
    assert not extremes.limits
    extremes.fit(model.graph, format_)
    low = model.graph.initializers["low"].const_value.numpy()
    assert low.dtype == np.float32
    assert float(low) == -format_.largest / 4


NO_MASKS = {
    "it is an output as well": "z = Where(c, zero, low)  a = Add(x, z)  p = Softmax(a)"
    "  y = Add(p, z)",
    "it is compared": "z = Where(c, zero, low)  e = Equal(z, low)  a = Add(x, z)"
    "  s = Where(e, x, a)  y = Softmax(s)",
    "it goes through a tanh": "z = Where(c, zero, low)  t = Tanh(z)  a = Add(x, t)  y = Softmax(a)",
    "it is a weight": "y = Mul(x, low)",
    "its logarithm of the softmax is returned": "z = Where(c, x, low)  y = LogSoftmax(z)",
    "it is divided by": "z = Where(c, x, low)  d = Div(x, z)  y = Softmax(d)",
}


@pytest.mark.parametrize("name", NO_MASKS)
def test_what_gets_elsewhere_is_none(name):
    assert found(NO_MASKS[name])[1] == Extremes()


def test_minus_infinity_stays_and_numbers_that_fit_stay():
    constants = "float[4] low = {-3e38, -65504, -1e4, 0}"
    model, extremes = found("a = Add(x, low)  y = Softmax(a)", constants=constants)
    model.graph.initializers["low"].const_value = ir.tensor(
        np.array([-3e38, -np.inf, -65504, 1], np.float32), name="low"
    )
    extremes.fit(model.graph, FP16)
    held = model.graph.initializers["low"].const_value.numpy()
    assert held.tolist() == [-16376, -np.inf, -65504, 1]


LIMITS = {
    "clip": "y = Clip(x, low, high)",
    "the least": "y = Max(x, low)",
    "the most": "y = Min(x, high)",
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_bounds_other_numbers_is_a_limit(name):
    constants = "float low = {-3.4028235e38}, float high = {1e6}"
    model, extremes = found(LIMITS[name], constants=constants)
    assert not extremes.masks
    extremes.fit(model.graph, FP16)
    for limit in extremes.limits:
        number = float(model.graph.initializers[limit].const_value.numpy())
        assert number == (-65504 if limit == "low" else 65504)
    assert len(extremes.limits) == nodes_reading(model)


def nodes_reading(model: ir.Model) -> int:
    return sum(bool(value.uses()) for value in model.graph.initializers.values())


def test_arrays_filled_with_a_very_low_number_are_masks_too():
    model, extremes = found(
        "s = Shape(x)  z = ConstantOfShape<value = float[1] {-3e38}>(s)  t = Trilu<upper = 1>(z, k)"
        "  a = Add(x, t)  y = Softmax(a)",
        inputs="float[B,4,4] x", constants="int64 k = {1}",
    )  # fmt: skip
    assert extremes.masks == {"z"}
    assert {value.name for value in extremes.masked} == {"z", "t", "a"}
    extremes.fit(model.graph, FP16)
    node = only(model, "ConstantOfShape")
    assert node.attributes["value"].as_tensor().numpy().tolist() == [-16376]


def test_arrays_filled_with_a_number_that_gets_elsewhere_are_followed():
    model, extremes = found(
        "s = Shape(x)  z = ConstantOfShape<value = float[1] {-3e38}>(s)  y = Add(x, z)",
        inputs="float[B,4,4] x",
    )
    assert extremes == Extremes()
    ((source, numbers),) = overflowing(model.graph, {}, FP16)
    assert (source.name, numbers.overflowing) == ("z", 1)
    assert {v.name for v in reached(model.graph, source, selected=True)} == {"z", "y"}


def test_numbers_are_followed_to_all_values_that_may_hold_them():
    model, _ = found("z = Where(c, zero, low)  m = Mul(z, x)  t = Tanh(m)  y = Add(t, x)")
    low = model.graph.initializers["low"]
    names = {value.name for value in reached(model.graph, low, selected=True)}
    assert names == {"z", "m"}
    model, _ = found("y = MatMul(x, w)", constants=f"float[4,4] w = {{{'1e5, ' * 15}1e5}}")
    weight = model.graph.initializers["w"]
    assert not reached(model.graph, weight, selected=True)
    assert {v.name for v in reached(model.graph, weight, selected=False)} == {"y"}
