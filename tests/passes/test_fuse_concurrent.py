"""The fuse-concurrent pass: what it packs, when it holds back, and that nothing changes."""

from __future__ import annotations

from typing import Any

import golden_cases
import models
import numpy as np
import onnx
import onnx_ir as ir
import pydantic
import pytest
from golden_cases import Case
from group_reference import Definition
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.blocks import find_blocks
from optimizer.pass_base import Context, Report
from optimizer.runners.ort import OrtRunner
from passes.fuse_concurrent import COSTS, FuseConcurrent, Options


def apply(model: ir.Model, target: str = "ort-cpu", **options: Any) -> Report:
    return FuseConcurrent(Options(**options)).call(model, Context(target=target))


def count(model: ir.Model, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph)


def assert_unchanged_function(config: models.Config, model: ir.Model, **shape: Any) -> None:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    feed = models.feed(config, **shape)
    groups = [[i] for i in range(config.layers)]
    expected = Definition(config, models.build(config), groups, 0).run(feed)
    runner = OrtRunner(model)
    actual = runner.run({k: feed[k] for k in runner.input_names})["logits"]
    # float32 against float64: the figure required of fused graphs.
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


#: config, MatMul nodes per layer after packing, after packing and stacking
FIRES: list[tuple[dict[str, Any], int, int]] = [
    ({}, 4, 4),
    ({"gated": False, "activation": "gelu"}, 4, 4),
    ({"bias": True, "norm": "layer"}, 4, 4),
    ({"kv_cache": True}, 4, 4),
    ({"style": "parallel"}, 3, 2),
    ({"style": "parallel", "bias": True, "gated": False, "activation": "relu"}, 3, 2),
    ({"style": "parallel-two-norms", "norm": "layer", "bias": True}, 3, 2),
    ({"style": "post-norm", "norm": "layer", "bias": True}, 4, 4),
]


@pytest.mark.parametrize(("config", "packed", "stacked"), FIRES)
def test_packs_on_request_and_computes_the_same(
    config: dict[str, Any], packed: int, stacked: int
) -> None:
    c = models.Config(**config)
    for stack, expected in (("never", packed), ("always", stacked)):
        model = models.build(c)
        report = apply(model, pack="always", stack=stack)
        assert report.modified
        assert count(model, "MatMul") == expected * c.layers + 1
        if c.style != "post-norm":  # the reference knows no post-norm layers
            assert_unchanged_function(c, model, past=2)


def test_packs_the_wide_blocks_that_cqil_made() -> None:
    from passes.cqil import Cqil
    from passes.cqil import Options as CqilOptions

    model = models.build(layers=4)
    Cqil(CqilOptions(first=0)).call(model, Context())
    report = apply(model, pack="always")
    assert report.applied == 4
    assert count(model, "MatMul") == 2 * 4 + 1


def test_keys_and_values_of_all_readers_of_one_value_are_packed() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 4]))
    rng = np.random.default_rng(0)
    weights = [
        ir.Value(
            name=f"w{i}",
            const_value=ir.tensor(rng.normal(size=(4, 3)).astype(np.float32)),
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([4, 3]),
        )
        for i in range(5)
    ]
    nodes = [ir.node("MatMul", [x, w]) for w in weights]
    for i, node in enumerate(nodes):
        node.outputs[0].name = f"y{i}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(["n", 3])
    graph = ir.Graph(
        [x], [n.outputs[0] for n in nodes], nodes=nodes, initializers=weights,
        opset_imports={"": 23}, name="g",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    assert apply(model, pack="always").applied == 1
    assert [n.op_type for n in model.graph] == ["MatMul", "Split"]
    feed = rng.normal(size=(2, 4)).astype(np.float32)
    result = OrtRunner(model).run({"x": feed})
    assert list(result) == [f"y{i}" for i in range(5)]
    for i, weight in enumerate(weights):
        expected = feed @ weight.const_value.numpy()  # type: ignore[union-attr]
        # One float32 product of length 4 in another order: a few units in the last place.
        np.testing.assert_allclose(result[f"y{i}"], expected, rtol=1e-5, atol=1e-6)


def _before(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


@pytest.mark.parametrize("style", ["pre-norm", "parallel"])
@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_default_changes_nothing_where_it_would_not_be_faster(style: str, tokens: int) -> None:
    model = models.build(style=style, hidden=64, heads=8, kv_heads=8, ffn=170)
    before = _before(model)
    report = apply(model, tokens=tokens)
    assert not report.modified
    expected = f"no gain predicted at {tokens} tokens per run ("
    assert all(s.reason.startswith(expected) for s in report.skipped)
    assert _before(model) == before


@pytest.mark.parametrize(("cached", "packed"), [(True, 2), (False, 0)])
def test_default_packs_biased_projections_of_decoders_with_a_cache(
    cached: bool, packed: int
) -> None:
    config = models.Config(
        hidden=64, heads=8, kv_heads=8, ffn=170, bias=True, norm="layer", gated=False,
        activation="gelu", kv_cache=cached,
    )  # fmt: skip
    model = models.build(config)
    report = apply(model)
    assert report.applied == packed
    assert_unchanged_function(config, model, past=3)


REFUSES: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({}, {"pack": "never"}, "ort-cpu", "switched off"),
    (
        {}, {}, "tensorrt-10",
        "not measured on target 'tensorrt-10'; 'always' does it nevertheless",
    ),
    (
        {"shared_weights": True}, {"pack": "always"}, "ort-cpu",
        "weight 'shared.q.weight' is shared with another node",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "options", "target", "reason"), REFUSES)
def test_leaves_alone_and_says_why(
    config: dict[str, Any], options: dict[str, Any], target: str, reason: str
) -> None:
    model = models.build(**config)
    report = apply(model, target, **options)
    assert report.skipped[0].reason == reason


def test_layer_scale_keeps_parallel_projections_apart() -> None:
    model = models.build(style="parallel", layer_scale=True)
    report = apply(model, pack="never", stack="always")
    assert not report.modified
    assert report.skipped[0].reason == (
        "something lies between the projections and the residual adds"
    )


def test_norms_with_different_epsilons_stay_two() -> None:
    model = models.build(style="parallel-two-norms")
    block = find_blocks(model).blocks[0]
    block.mlp_norm.node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)
    apply(model, pack="always")
    first = find_blocks(model).misses
    assert count(model, "RMSNormalization") == 2 + 1 + 1, first


def test_second_run_changes_nothing() -> None:
    model = models.build(style="parallel-two-norms")
    assert apply(model, pack="always", stack="always").modified
    before = _before(model)
    assert not apply(model, pack="always", stack="always").modified
    assert _before(model) == before


@pytest.mark.parametrize("options", [{"pack": "sometimes"}, {"tokens": 0}, {"qkv": True}])
def test_rejects_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        Options(**options)


def test_cost_model_counts_what_a_split_copies() -> None:
    costs = COSTS["ort-cpu"]
    assert costs.packing(3, 0, 0) > costs.packing(3, 0, 10_000)
    assert costs.packing(3, 3, 0) == pytest.approx(costs.packing(3, 0, 0) + 2 * costs.add)
    assert costs.stacking(2, 0, 0) > costs.stacking(2, 0, 10_000)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_computes_the_same(data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 3))
    config = models.Config(
        hidden=data.draw(st.sampled_from([8, 20])),
        heads=kv_heads * data.draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        head_dim=2 * data.draw(st.integers(1, 4)),
        ffn=data.draw(st.integers(1, 20)),
        norm=data.draw(st.sampled_from(["rms", "layer"])),
        style=data.draw(st.sampled_from(["pre-norm", "parallel", "parallel-two-norms"])),
        bias=data.draw(st.booleans()),
        gated=data.draw(st.booleans()),
        kv_cache=data.draw(st.booleans()),
    )
    model = models.build(config)
    assert apply(model, pack="always", stack="always").modified
    assert_unchanged_function(config, model, sequence=data.draw(st.integers(1, 4)), past=1)


@pytest.mark.parametrize("case", golden_cases.cases("fuse-concurrent"), ids=lambda case: case.name)
def test_golden_case(case: Case) -> None:
    model = case.model()
    apply(model, **case.options)
    assert golden_cases.text(model) == golden_cases.text(case.after)
    feed = {"input_ids": np.array([[2, 0, 1]])}
    before, after = (
        OrtRunner(ir.from_proto(proto)).run(feed)["logits"] for proto in (case.before, case.after)
    )
    # Reassociated sums of a handful of float32 numbers of size one.
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
