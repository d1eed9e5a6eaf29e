"""The sparsify pass among others: zeros survive fusion, rounding and files, in either order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx_ir as ir
import pytest
from outlier_cases import CONFIGS, calibration
from sparse_cases import TWO_OF_FOUR, apply, matrices

from optimizer import graph as graphs
from optimizer.api import optimize
from optimizer.errors import RecipeError
from optimizer.model_io import load_model
from optimizer.pass_base import Context
from optimizer.recipe import make_recipe
from passes.cqil import Cqil
from passes.cqil import Options as CqilOptions
from passes.fuse_concurrent import FuseConcurrent
from passes.fuse_concurrent import Options as FuseOptions
from passes.outliertune import Options as TuneOptions
from passes.outliertune import OutlierTune


def codes_of(model: ir.Model) -> dict[str, np.ndarray]:
    """Codes [K, N] of the int8 weights of a model."""
    found = {}
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            tensor = graphs.constant(node.inputs[0])
            if tensor is not None and len(tensor.shape) == 2:
                found[str(node.inputs[0].name).removesuffix("_int8")] = tensor.numpy()
    return found


@pytest.mark.parametrize("name", ["llama", "bert", "phi"])
@pytest.mark.parametrize("options", [{}, {"pattern": "unstructured", "sparsity": 0.6}])
def test_outliertune_keeps_every_zero(name: str, options: dict[str, Any]) -> None:
    config = models.Config(**CONFIGS[name])
    model = models.build(config)
    data = calibration(model, config)
    apply(model, data, **options)
    sparse = matrices(model)
    OutlierTune(TuneOptions(heads=False)).call(model, Context(calibration=data))
    codes = codes_of(model)
    assert len(codes) == len(sparse) - 1
    for weight, numbers in codes.items():
        assert (numbers[sparse[weight] == 0] == 0).all()
        # Rounding may add zeros, and does not do so to most.
        assert (numbers != 0).mean() > 0.8 * (sparse[weight] != 0).mean()


def projections(model: ir.Model) -> list[np.ndarray]:
    return [w for name, w in matrices(model).items() if "lm_head" not in name]


@pytest.mark.parametrize("bypass", ["symmetric", "0"])
@pytest.mark.parametrize("before", [True, False])
def test_cqil_keeps_the_pattern_in_either_order(bypass: str, before: bool) -> None:
    config = models.Config(layers=4)
    model = models.build(config)
    data = calibration(model, config)
    group = CqilOptions(first=0, last=3, group=2, bypass=0 if bypass == "0" else "symmetric")
    if before:
        Cqil(group).call(model, Context(calibration=data))
    apply(model, data)
    if not before:
        Cqil(group).call(model, Context(calibration=data))
    found = projections(model)
    assert len(found) < 4 * 7  # layers were fused
    for weight in found:
        assert TWO_OF_FOUR.holds(weight)
        assert (weight == 0).mean() == 0.5


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_packing_and_stacking_keep_the_pattern(name: str) -> None:
    config = models.Config(**CONFIGS[name])
    model = models.build(config)
    apply(model, calibration(model, config))
    count = len(matrices(model))
    FuseConcurrent(FuseOptions(pack="always", stack="always")).call(model, Context())
    assert len(matrices(model)) < count
    for weight in projections(model):
        assert TWO_OF_FOUR.holds(weight)


def test_it_belongs_before_outliertune() -> None:
    make_recipe(["cqil", "sparsify", "outliertune"])
    with pytest.raises(RecipeError, match="the right order is --passes sparsify,outliertune"):
        make_recipe(["outliertune", "sparsify"])


def int8_weights(model: ir.Model) -> dict[str, np.ndarray]:
    tensors = {n: v.const_value for n, v in model.graph.initializers.items()}
    return {
        name: tensor.numpy()
        for name, tensor in tensors.items()
        if tensor is not None
        and tensor.dtype in (ir.DataType.INT8, ir.DataType.UINT8)
        and len(tensor.shape) == 2
    }


def test_zeros_reach_the_file_that_is_written(tmp_path: Path) -> None:
    model = models.build(models.Config(layers=2))
    feed = models.feed(models.Config(layers=2), batch=4, sequence=12)
    result = optimize(
        model, "sparsify:pattern=2:4,outliertune", calibration=feed, output=tmp_path / "s.onnx"
    )
    shares = []
    for name, codes in int8_weights(load_model(result.path)).items():
        zero = 0 if codes.dtype == np.int8 else 128
        if "lm_head" not in name:
            zeros = (codes == zero).reshape(-1, 4, codes.shape[1]).sum(axis=1)
            shares.append((zeros >= 2).all())
    assert len(shares) == 14
    assert all(shares)
