"""The KV cache in front of attention: the same numbers, raised back, and nothing else touched."""

from __future__ import annotations

import models
import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from rtx_attention import CASES, case
from rule_case import feed

from optimizer.legalize import legalize
from optimizer.pass_base import Context
from passes import get_pass


def run(model: ir.Model, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    found: list[np.ndarray] = ReferenceEvaluator(ir.to_proto(model)).run(None, arrays)
    return found


def attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention"]


@pytest.mark.parametrize(
    ("causal", "softcap"), [(False, 0.0), (True, 0.0), (False, 5.0), (True, 5.0)]
)
def test_the_cache_leaves_attention_and_comes_back(causal: bool, softcap: float) -> None:
    config = models.Config(kv_cache=True)
    model = models.build(config)
    get_pass("canonicalize")().call(model, Context())
    for node in attentions(model):
        node.attributes["is_causal"] = ir.AttrInt64("is_causal", int(causal))
        node.attributes["softcap"] = ir.AttrFloat32("softcap", softcap)
    arrays = models.feed(config, past=3)
    before = run(model, arrays)
    names = [value.name for value in model.graph.outputs]
    report = legalize(model, "tensorrt-11")
    count = report.details["rewrites"]["attention"]
    assert count == 2
    for node in attentions(model):
        assert len(node.outputs) == 1
        assert len(node.inputs) <= 4
    assert len(attentions(model)) == (0 if causal or softcap else 2)
    assert [value.name for value in model.graph.outputs] == names
    for one, two in zip(before, run(model, arrays), strict=True):
        # The same sums in the same order but for those over heads, in float32.
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=32 * np.finfo(np.float32).eps)
    get_pass("canonicalize")().call(model, Context())
    assert [len(node.outputs) for node in attentions(model)] == [3, 3]
    assert [node.attributes.get_float("softcap", 0.0) for node in attentions(model)] == [
        softcap
    ] * 2


def test_a_softcap_without_a_cache_is_spelled_out() -> None:
    model = models.build()
    get_pass("canonicalize")().call(model, Context())
    for node in attentions(model):
        node.attributes["softcap"] = ir.AttrFloat32("softcap", 5.0)
    assert legalize(model, "tensorrt-rtx").details["rewrites"]["attention"] == 2
    assert not attentions(model)


def test_a_mask_besides_a_causal_one_is_spelled_out() -> None:
    """TensorRT's attention takes one of both."""
    config = models.Config()
    model = models.build(config)
    get_pass("canonicalize")().call(model, Context())
    for node in attentions(model):
        node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    arrays = models.feed(config)
    before = run(model, arrays)
    assert legalize(model, "tensorrt-rtx").details["rewrites"]["attention"] == 2
    assert not attentions(model)
    for one, two in zip(before, run(model, arrays), strict=True):
        # The same sums in the same order but for those over heads, in float32.
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=32 * np.finfo(np.float32).eps)


def test_a_model_without_a_cache_stays() -> None:
    model = models.build()
    get_pass("canonicalize")().call(model, Context())
    report = legalize(model, "tensorrt-11")
    assert "attention" not in report.details["rewrites"]
    assert attentions(model)


@pytest.mark.parametrize("name", CASES)
def test_what_tensorrt_for_rtx_runs_stays_and_the_rest_is_spelled_out(name: str) -> None:
    model, spelled = case(name), CASES[name][3]
    arrays = feed(model)
    before = run(model, arrays)[0].astype(np.float32)
    had = len(attentions(model))
    report = legalize(model, "tensorrt-rtx")
    assert report.details["rewrites"].get("attention", 0) == spelled
    assert len(attentions(model)) == had - spelled
    after = run(model, arrays)[0].astype(np.float32)
    # Some roundings of scores and probabilities, of numbers about 1, in the type of the graph.
    narrow = "float16" in CASES[name][2]
    eps = np.finfo(np.float16 if narrow else np.float32).eps
    np.testing.assert_allclose(before, after, rtol=8 * eps, atol=16 * eps)
    get_pass("canonicalize")().call(model, Context())
    assert len(attentions(model)) == had
