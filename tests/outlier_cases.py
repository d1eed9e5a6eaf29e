"""Small models and shortcuts for the tests of the outliertune pass."""

from __future__ import annotations

from typing import Any

import models
import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.calibration import Calibration, input_specs
from optimizer.pass_base import Context, Report
from optimizer.quantization.sites import Choice, find_sites
from optimizer.runners.ort import OrtRunner
from optimizer.samples import load_samples
from passes.outliertune import Options, OutlierTune, plan, write

LITERATURE = {"asymmetric": False, "compensate": False, "margin": False}
STATIC = dict.fromkeys(("after_norm", "after_attention", "in_mlp", "elsewhere"), "static")
PER_TOKEN = dict.fromkeys(STATIC, "per-token")
GELU = {"norm": "layer", "bias": True, "gated": False, "activation": "gelu"}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "opt": {"norm": "layer", "bias": True, "gated": False, "activation": "relu"},
    "bert": {**GELU, "style": "post-norm"},
    "phi": {**GELU, "style": "parallel"},
    "neox": {**GELU, "style": "parallel-two-norms"},
    "cached": {"kv_cache": True},
}


def calibration(model: ir.Model, config: models.Config, **how: Any) -> Calibration:
    feed = models.feed(config, **{"batch": 4, "sequence": 12, **how})
    return Calibration(load_samples(feed, input_specs(model)))


def apply(
    model: ir.Model, data: Calibration | None, *, rounding: bool = True, **options: Any
) -> Report:
    """The pass, or without rounding only its float part; heads stay in float unless asked for."""
    options.setdefault("heads", False)
    if rounding:
        return OutlierTune(Options(**options)).call(model, Context(calibration=data))
    chosen = Options(**options)
    sites, _ = find_sites(model, Choice(chosen.include, chosen.exclude, heads=False))
    assert data is not None
    write(model, plan(model, sites, chosen, data)[0], chosen, rounding=False)
    return Report(modified=True)


def small(
    norm: str = "layer", width: int = 6, outputs: int = 5, *, seed: int = 0
) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A norm and two linear layers, y0 and y1, that read one-sided channels of all sizes."""
    rng = np.random.default_rng(seed)
    w = models.Writer()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", width]))
    gain = (3.0 ** np.arange(width) / 8).astype(np.float32)
    inputs: list[ir.Value | None] = [x, w.const("gamma", gain)]
    if norm == "layer":
        inputs.append(w.const("beta", (gain * 3 * rng.normal(size=width)).astype(np.float32)))
    op = "LayerNormalization" if norm == "layer" else "RMSNormalization"
    h = w.op(op, inputs, "h", axis=-1, epsilon=1e-5)
    outs = []
    for i in range(2):
        weight = rng.normal(size=(width, outputs)).astype(np.float32)
        y = w.op("MatMul", [h, w.const(f"w{i}", weight)], f"y{i}")
        y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", outputs])
        outs.append(y)
    graph = ir.Graph(
        [x], outs, nodes=w.nodes, initializers=list(w.initializers.values()), opset_imports={"": 23}
    )
    data = {"x": rng.normal(size=(64, width)).astype(np.float32) + 1}
    return ir.Model(graph, ir_version=10), data


def observed(model: ir.Model, data: dict[str, np.ndarray], op_type: str) -> list[np.ndarray]:
    """What every node of a type reads first."""
    values = [n.inputs[0] for n in model.graph if n.op_type == op_type]
    found = OrtRunner(model, extra_outputs=values, optimize=False).run(data)
    return [found[str(v.name)] for v in values]


def samples(model: ir.Model, data: dict[str, np.ndarray]) -> Calibration:
    return Calibration(load_samples([data], input_specs(model)))


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def constants(model: ir.Model, text: str) -> dict[str, np.ndarray]:
    found = {n: graphs.const(v) for n, v in model.graph.initializers.items() if text in n}
    return {name: array for name, array in found.items() if array is not None}
