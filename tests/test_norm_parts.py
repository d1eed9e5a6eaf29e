"""Dynamic tanh as a norm: what it is told from, and what the passes make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx_ir as ir
import pytest

from optimizer import graph as graphs
from optimizer.blocks import find_blocks
from optimizer.calibration import Calibration, input_specs
from optimizer.norm_parts import norm, norms_reading
from optimizer.pass_base import Context
from optimizer.quantization.sites import Choice, Kind, find_sites
from optimizer.runners.ort import OrtRunner
from optimizer.samples import load_samples
from optimizer.structure import NormKind, Style
from passes import cqil, fuse_concurrent
from passes.canonicalize import Canonicalize
from passes.outliertune import Options, OutlierTune, plan, write

ASSET = Path(__file__).parents[1] / "../shared/assets/vit/cct_xs_lpr/cct_xs_v1_global.onnx"
STYLES = ("pre-norm", "post-norm", "parallel", "parallel-two-norms")
CONFIG = models.Config(norm="tanh", bias=True)


def value(model: ir.Model, name: str) -> ir.Value:
    return next(v for n in model.graph for v in n.outputs if v.name == name)


def names(model: ir.Model) -> list[str]:
    return [str(v.name) for v in model.graph.initializers.values()]


def without_bias(model: ir.Model) -> ir.Model:
    """Drop the bias of every dynamic tanh."""
    for node in [
        n for n in model.graph if str(n.inputs[-1] and n.inputs[-1].name).endswith("bias")
    ]:
        if "norm" in str(node.inputs[-1].name):
            graphs.replace_value(node.outputs[0], node.inputs[0])
    graphs.remove_dead(model)
    return model


def without_alpha(model: ir.Model) -> ir.Model:
    """Let every dynamic tanh read its input as it is."""
    for node in [
        n for n in model.graph if str(n.inputs[-1] and n.inputs[-1].name).endswith("alpha")
    ]:
        graphs.replace_value(node.outputs[0], node.inputs[0])
    graphs.remove_dead(model)
    return model


def unchanged(model: ir.Model) -> ir.Model:
    return model


VARIANTS: tuple[Callable[[ir.Model], ir.Model], ...] = (unchanged, without_bias, without_alpha)


# --- what it is told from ------------------------------------------------------------------------


def test_norms_are_found_from_what_they_read() -> None:
    model = models.build(CONFIG)
    (found,) = norms_reading(value(model, "stream.1"))
    assert found == norm(value(model, "layers.1.norm1.out"))
    assert not list(norms_reading(value(model, "layers.1.norm1.out")))


def test_the_view_says_where_its_numbers_are_read() -> None:
    model = models.build(CONFIG)
    found = find_blocks(model).blocks[1].attention_norm
    assert found.kind is NormKind.TANH
    assert found.output.name == "layers.1.norm1.out"
    assert found.node.outputs[0].uses()[0].node.op_type == "Tanh"
    assert found.input is found.source is value(model, "stream.1")
    assert found.alpha == graphs.scalar(model.graph.initializers["layers.1.norm1.alpha"])
    assert found.epsilon == 0
    for slot, role in ((found.scale_slot, "weight"), (found.bias_slot, "bias")):
        assert slot.node.inputs[slot.position].name == f"layers.1.norm1.{role}"
    found.node.replace_input_with(0, value(model, "stream.0"))
    assert found.source is value(model, "stream.0")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_are_found_without_bias_and_without_alpha(
    variant: Callable[[ir.Model], ir.Model], style: str
) -> None:
    model = variant(models.build(style=style, norm="tanh"))
    structure = find_blocks(model)
    assert structure.misses == ()
    assert [b.style for b in structure.blocks] == [Style(style.removesuffix("-two-norms"))] * 2
    for block in structure.blocks:
        assert block.extras == ()
        assert block.attention_norm.kind is block.mlp_norm.kind is NormKind.TANH
        assert (block.attention_norm.bias is None) == (variant is without_bias)
        assert (block.attention_norm.alpha == 1) == (variant is without_alpha)


def _activated(model: ir.Model) -> None:
    """The norm before the attention of layer 0 becomes a plain Tanh."""
    old, stream = value(model, "layers.0.norm1.out"), value(model, "stream.0")
    graphs.replace_value(old, graphs.insert(model.graph, old.producer(), "Tanh", [stream]))


def _scaled_by_a_number(model: ir.Model) -> None:
    scale = norm(value(model, "layers.0.norm1.out")).scale_slot
    number = graphs.add_initializer(model.graph, "number", np.array([0.5], np.float32))
    scale.node.replace_input_with(scale.position, number)


def _scaled_by_the_data(model: ir.Model) -> None:
    scale = norm(value(model, "layers.0.norm1.out")).scale_slot
    scale.node.replace_input_with(scale.position, value(model, "stream.0"))


def _another_function(model: ir.Model) -> None:
    tanh = next(n for n in model.graph if n.op_type == "Tanh")
    wave = graphs.insert(model.graph, tanh, "Sin", [tanh.inputs[0]])
    graphs.replace_value(tanh.outputs[0], wave)


def _product_read_twice(model: ir.Model) -> None:
    scale = norm(value(model, "layers.0.norm1.out")).scale_slot
    model.graph.outputs.append(scale.node.outputs[0])


NO_NORMS = (
    _activated, _scaled_by_a_number, _scaled_by_the_data, _another_function, _product_read_twice,
)  # fmt: skip


@pytest.mark.parametrize("edit", NO_NORMS)
def test_what_only_looks_like_a_dynamic_tanh_is_none(edit: Callable[[ir.Model], None]) -> None:
    model = models.build(CONFIG)
    edit(model)
    attention = next(n for n in model.graph if n.op_type == "Attention")
    query = attention.inputs[0].producer().inputs[0].producer().inputs[0].producer()
    assert query.inputs[1].name == "layers.0.q.weight"
    assert norm(query.inputs[0]) is None
    structure = find_blocks(model)
    assert [block.index for block in structure.blocks] == [0]
    assert structure.blocks[0].input.name == "stream.1"
    ((_, reason),) = structure.misses
    assert reason == "no norm before the attention, and its input is not the residual stream"


def test_a_scaled_tanh_inside_the_mlp_is_its_activation() -> None:
    model = models.build(norm="tanh", gated=False, activation="relu")
    for relu in [n for n in model.graph if n.op_type == "Relu"]:
        scale = graphs.add_initializer(model.graph, "s", np.linspace(1, 2, 24, dtype=np.float32))
        tanh = graphs.insert(model.graph, relu, "Tanh", [relu.inputs[0]])
        new = graphs.insert(model.graph, relu, "Mul", [tanh, scale])
        graphs.replace_value(relu.outputs[0], new)
    graphs.remove_dead(model)
    blocks = find_blocks(model).blocks
    assert [b.mlp.activation for b in blocks] == ["tanh+mul"] * 2


# --- what the passes make of it ------------------------------------------------------------------


def calibration(model: ir.Model) -> Calibration:
    feed = models.feed(CONFIG, batch=4, sequence=12)
    return Calibration(load_samples(feed, input_specs(model)))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "shift": True}], ids=str)
def test_quantization_scales_it_exactly(
    variant: Callable[[ir.Model], ir.Model], style: str, options: dict[str, Any]
) -> None:
    before, after = (variant(models.build(norm="tanh", bias=True, style=style)) for _ in range(2))
    sites, _ = find_sites(after, Choice(heads=False))
    in_norm = [site for site in sites if site.norm is not None]
    # A norm's output that the residual reads too keeps its scale: Mul and Add come after it.
    assert len(in_norm) == {"post-norm": 0, "parallel": 2}.get(style, 4)
    assert all(site.kind is Kind.NORM for site in in_norm)
    chosen = Options(**options)
    plans, refused = plan(after, sites, chosen, calibration(after))
    assert not refused
    write(after, plans, chosen, rounding=False)
    feed = models.feed(CONFIG)
    expected, found = (OrtRunner(m).run(feed)["logits"] for m in (before, after))
    # Scaling a float32 number costs half a unit in the last place; sums of 32 terms stay below.
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_scales_and_shifts_are_in_it_and_not_beside_it() -> None:
    model = models.build(CONFIG)
    options = Options(alpha=1.0, shift=True)
    assert OutlierTune(options).call(model, Context(calibration=calibration(model))).modified
    for name in ("norm1", "norm2"):
        output = value(model, f"layers.1.{name}.out")
        assert norm(output).kind is NormKind.TANH
        assert [use.node.op_type for use in output.uses()] == ["QuantizeLinear"]


def test_layers_with_dynamic_tanh_are_not_fused() -> None:
    model = models.build(CONFIG)
    report = cqil.Cqil(cqil.Options(first=0, last=1)).call(model, Context())
    assert not report.modified
    ((reason),) = [skip.reason for skip in report.skipped]
    assert reason == "layer 0: a dynamic tanh, whose own alpha leaves no value to share"


def test_a_function_after_the_mlp_is_named_as_the_reason() -> None:
    model = models.build()
    add = find_blocks(model).blocks[0].mlp_add
    gelu = graphs.insert(model.graph, add, "Gelu", [add.inputs[1]])
    add.replace_input_with(1, gelu)
    report = cqil.Cqil(cqil.Options(first=0, last=1)).call(model, Context())
    assert [skip.reason for skip in report.skipped] == [
        "layer 0: Gelu after MLP, which is no constant gain"
    ]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packing_keeps_the_function(variant: Callable[[ir.Model], ir.Model], style: str) -> None:
    before, after = (variant(models.build(norm="tanh", bias=True, style=style)) for _ in range(2))
    options = fuse_concurrent.Options(pack="always", stack="always")
    assert fuse_concurrent.FuseConcurrent(options).call(after, Context()).modified
    assert len([n for n in after.graph if n.op_type == "Tanh"]) == len(
        [n for n in before.graph if n.op_type == "Tanh"]
    )
    feed = models.feed(CONFIG)
    expected, found = (OrtRunner(m).run(feed)["logits"] for m in (before, after))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_every_layer_of_a_trained_model_is_found() -> None:
    present = ASSET.is_file()
    model = ir.load(ASSET) if present else models.build(layers=4, norm="tanh")
    Canonicalize().call(model, Context())
    structure = find_blocks(model)
    assert structure.misses == ()
    assert [b.attention_norm.kind for b in structure.blocks] == [NormKind.TANH] * 4
    assert all(0 < b.attention_norm.alpha < 1 for b in structure.blocks)
