"""The sparse-matmul pass: what it replaces, when it holds back, and that nothing changes."""

from __future__ import annotations

from typing import Any

import models
import numpy as np
import onnx
import onnx_ir as ir
import outlier_cases
import pydantic
import pytest
from models import Config

from optimizer import graph as graphs
from optimizer import sparse_cost
from optimizer.custom_ops import library
from optimizer.pass_base import Context, Exactness, Report
from optimizer.runners.ort import OrtRunner
from optimizer.runners.reference import ReferenceRunner
from optimizer.sparse_cost import Figure
from passes.canonicalize import Canonicalize
from passes.sparse_matmul import Options, SparseMatMul
from passes.sparsify import Options as PruneOptions
from passes.sparsify import Sparsify

CONFIGS = [
    Config(layers=2),
    Config(layers=2, norm="layer", bias=True, gated=False, activation="gelu"),
    Config(layers=2, bias=True, gated=False, activation="relu"),
]


def sparse_model(config: Config = CONFIGS[0]) -> ir.Model:
    model = models.build(config)
    options = PruneOptions(pattern="unstructured", sparsity=0.7, method="magnitude")
    Sparsify(options).call(model, Context())
    return model


def apply(model: ir.Model, target: str = "ort-cpu", **options: Any) -> Report:
    return SparseMatMul(Options(**options)).call(model, Context(target=target))


def count(model: ir.Model, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph)


def measured(monkeypatch: pytest.MonkeyPatch, **kinds: list[tuple[float, ...]]):
    """Let the cost model of a class 'amx' hold these figures, of a weight of one element."""
    data = {
        "amx": {
            kind: tuple(Figure(*((1, 1, *row) if len(row) == 4 else row)) for row in rows)
            for kind, rows in kinds.items()
        }
    }
    monkeypatch.setattr(sparse_cost, "figures", lambda: data)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("registered", [False, True])
def test_float_layers_compute_the_same(config, registered, monkeypatch, tmp_path):
    if not registered:
        monkeypatch.setenv(library.VARIABLE, str(tmp_path / "none"))
    model = sparse_model(config)
    feed = models.feed(config)
    exact = ReferenceRunner(model).run(feed)["logits"]
    before = np.abs(OrtRunner(model).run(feed)["logits"] - exact).max()
    report = apply(model, force=True)
    assert report.applied == count(model, "SparseMatMul") > 6 * config.layers
    onnx.checker.check_model(ir.to_proto(model))
    after = np.abs(OrtRunner(model).run(feed)["logits"] - exact).max()
    # the tool's own bound for sums in another order
    assert after <= max(2 * before, 16 * np.finfo(np.float32).eps * np.abs(exact).max())


@pytest.mark.parametrize(
    ("config", "kind"), [(CONFIGS[0], "silu"), (CONFIGS[1], "gelu"), (CONFIGS[2], "relu")]
)
def test_activations_become_part_of_the_layer(config, kind):
    model = sparse_model(config)
    apply(model, force=True)
    nodes = [node for node in model.graph if node.op_type == "SparseMatMul"]
    kinds = [node.attributes["activation"].as_string() for node in nodes]
    assert kinds.count(kind) == config.layers
    assert count(model, "Sigmoid") + count(model, "Gelu") + count(model, "Relu") == 0


def test_int8_is_close_and_small():
    model = sparse_model()
    dense = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    feed = models.feed(CONFIGS[0])
    exact = ReferenceRunner(model).run(feed)["logits"]
    assert SparseMatMul(Options(precision="int8")).exactness is Exactness.APPROXIMATE
    apply(model, force=True, precision="int8")
    found = OrtRunner(model).run(feed)["logits"]
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-6 < error < 0.05  # int8 rounds, to within a few percent
    stored = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    assert stored < dense / 2


def test_our_own_output_is_raised_back():
    model = sparse_model()
    weights = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    feed = models.feed(CONFIGS[0])
    before = OrtRunner(model).run(feed)["logits"]
    apply(model, force=True)
    Canonicalize().call(model, Context())
    assert count(model, "SparseMatMul") == 0
    assert not model.functions
    found = [v.const_value.numpy() for v in model.graph.initializers.values()]
    query = weights["layers.0.q.weight"]
    assert any(a.shape == query.shape and np.array_equal(a, query) for a in found)
    np.testing.assert_allclose(OrtRunner(model).run(feed)["logits"], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_layers_of_outliertune_stay_int8_with_static_scales_and_with_those_of_tokens(config):
    model = sparse_model(config)
    outlier_cases.apply(model, outlier_cases.calibration(model, config), heads=True)
    before = ReferenceRunner(model).run(models.feed(config))["logits"]
    assert count(model, "Div") > 0  # tokens are scaled in the MLP and after attention
    layers = count(model, "MatMul")
    report = apply(model, force=True)
    assert report.applied == layers
    assert all(site["int8"] for site in report.details["sites"])
    assert count(model, "QuantizeLinear") == count(model, "MatMul") == 0
    after = ReferenceRunner(model).run(models.feed(config))["logits"]
    # The codes are the same; only the order of scales and sums differs.
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * np.abs(before).max())


@pytest.mark.native
def test_our_own_int8_output_comes_out_as_it_was():
    model = sparse_model()
    feed = models.feed(CONFIGS[0])
    first = apply(model, force=True, precision="int8")
    before = OrtRunner(model).run(feed)["logits"]
    Canonicalize().call(model, Context())
    assert count(model, "SparseMatMul") == 0
    # activations are operators of the standard now
    np.testing.assert_allclose(OrtRunner(model).run(feed)["logits"], before, rtol=1e-4, atol=1e-5)
    again = apply(model, force=True)  # layers that are int8 already stay int8
    assert again.applied == first.applied == count(model, "SparseMatMul")
    assert count(model, "MatMulInteger") == count(model, "Round") == 0
    np.testing.assert_array_equal(OrtRunner(model).run(feed)["logits"], before)


@pytest.mark.parametrize(
    ("op_type", "index", "number"),
    [("Clip", 1, -127.0), ("Div", 1, 128.0), ("Max", 1, 1e-6), ("ReduceMax", 1, 0)],
)
def test_other_int8_products_per_token_stay(op_type, index, number):
    model = sparse_model()
    layers = apply(model, force=True, precision="int8").applied
    Canonicalize().call(model, Context())
    for node in [n for n in model.graph if n.op_type == op_type and len(n.inputs) > index]:
        if (old := graphs.const(node.inputs[index])) is None:
            continue
        changed = np.full(old.shape, number, old.dtype)
        node.replace_input_with(index, graphs.add_initializer(model.graph, "changed", changed))
    assert count(model, "MatMulInteger") == layers > 0
    assert apply(model, force=True).applied == 0


def test_cost_model_decides_layer_by_layer(monkeypatch):
    measured(monkeypatch, fp32=[(1, 0.35, 2.0, 0.9), (128, 0.35, 1.2, 0.5)])
    model = sparse_model()
    report = apply(model, machine="amx", tokens="1,128")
    dense = {skip.site for skip in report.skipped}
    assert report.applied == 14
    assert "lm_head.weight" in dense  # not pruned
    assert all("not zero; measured up to 35%" in skip.reason for skip in report.skipped)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(1, 0.5, 2.0, 0.9)], "0.9"),
        ([(1, 0.5, 0.5, 2.0)], "as dense fp32"),
        ([(1, 0.5, 3.0, 3.0), (128, 0.5, 3.0, 0.8)], "128 tokens per run"),
    ],
)
def test_int8_must_beat_both_dense_forms(monkeypatch, rows, reason):
    measured(monkeypatch, int8=rows)
    refused = sparse_cost.refusal("amx", "int8", (64, 64), (1, 128), 0.3)
    assert refused is not None
    if reason != "0.9":
        assert reason in refused
    else:
        assert "1.11 times as long as dense int8" in refused
    measured(monkeypatch, int8=[(1, 0.5, 3.0, 1.5), (128, 0.5, 3.0, 1.2)])
    assert sparse_cost.refusal("amx", "int8", (64, 64), (1, 128), 0.3) is None
    assert sparse_cost.refusal("amx", "int8", (64, 64), (16,), 0.3) is None


def test_what_is_not_measured_is_refused(monkeypatch):
    measured(monkeypatch, fp32=[(1, 0.5, 9.0, 9.0)])
    assert "not measured" in str(sparse_cost.refusal("neon", "fp32", (64, 64), (1,), 0.1))
    assert "measured up to 50%" in str(sparse_cost.refusal("amx", "fp32", (64, 64), (1,), 0.9))


def test_sizes_are_judged_by_their_neighbours(monkeypatch):
    rows = [(64, 64, 1, 0.5, 3.0, 3.0), (64, 256, 1, 0.5, 1.0, 3.0), (512, 512, 1, 0.5, 3.0, 3.0)]
    measured(monkeypatch, fp32=rows)
    refused = {
        shape: sparse_cost.refusal("amx", "fp32", shape, (1,), 0.3) is not None
        for shape in [(64, 63), (64, 64), (128, 64), (256, 64), (256, 256), (512, 512), (9999, 512)]
    }
    assert list(refused.values()) == [True, False, True, True, True, False, False]
    assert "smallest that was measured has 4096" in str(
        sparse_cost.refusal("amx", "fp32", (64, 63), (1,), 0.3)
    )


@pytest.mark.parametrize(
    "options", [{"tokens": "0"}, {"machine": "486"}, {"precision": "int4"}, {"kernel": 1}]
)
def test_bad_options(options):
    with pytest.raises(pydantic.ValidationError):
        Options(**options)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("avx2 fma", "avx2"),
        ("avx2 fma avx512f", "other"),
        ("avx2 fma avx_vnni", "other"),
        ("avx2 fma avx512f avx512_vnni avx512_vbmi2 avx512bw avx512vl avx512dq", "other"),
        ("avx2 fma avx512_vnni avx512vbmi avx512_vbmi2 avx512bw avx512vl avx512dq", "avx512"),
        ("sse2", "other"),
    ],
)
def test_class_of_a_machine(tmp_path, monkeypatch, flags, name):
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor : 0\nflags\t\t: {flags}\n", "utf-8")
    monkeypatch.delenv("OPTIMIZE_ISA", raising=False)
    assert sparse_cost.machine_class(path) == name


@pytest.mark.parametrize(
    ("wanted", "name"), [("avx2", "other"), ("amx", "avx512"), ("neon", "avx512")]
)
def test_class_is_that_of_the_kernels_that_run(tmp_path, monkeypatch, wanted, name):
    path = tmp_path / "cpuinfo"
    path.write_text(
        f"flags : {' '.join(sparse_cost.CLASSES['avx512'])} avx512f avx2 fma\n", "utf-8"
    )
    monkeypatch.setenv("OPTIMIZE_ISA", wanted)
    assert sparse_cost.machine_class(path) == name
