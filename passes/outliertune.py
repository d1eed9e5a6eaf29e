"""Linear layers run in int8: activations scaled and shifted per channel, or scaled per token.

Rewrite:      y = x W + b   ->   y = DQ(Q(x')) DQ(W8) + b'
              after a norm: x' = (x - z) / s folded into the norm (an Add for the shift of an RMS
              norm; Mul and Add where the norm's output is read elsewhere too), W' = diag(s) W,
              b' = b + z W, one constant scale, one Q/DQ pair for all layers that read x;
              elsewhere: x' = x / r - c with r from each token's own range, times r after.
              W8 has one symmetric scale per output channel.
Applies when: 1. the layer is a float32 MatMul by a constant [K, N] that nothing else uses;
              2. no int32 sum can overflow: K <= 133 144;
              3. weights and calibrated activations are finite;
              4. in a transformer: the layer does not compute an output of the model, unless it
                 would cost more than 5 % of the time in float (a language model's logits).
Exactness:    approximate. Without the rounding the graph equals the original in real numbers; what
              rounding costs is in benchmarks/results/outliertune_accuracy.json.
Cost:         a quarter of the weight bytes; per site one Q, and per token one reduction and two
              elementwise steps where there is no norm.
Source:       OutlierTune (arXiv 2406.18832), symmetrization and pre-executed dequantization: that
              is alpha = 1 with shift. SmoothQuant (arXiv 2211.10438): alpha = 0.5 without shift.
              Outlier Suppression+ (arXiv 2304.09145): the shift. GPTQ (arXiv 2210.17323): weights.
              Unlike the first: alpha by expected error site by site, ranges wider than seen where
              held-out data ask for it, symmetric and compensated weights, and tokens of one-sided
              activations use all codes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field, field_validator

from optimizer import graph as graphs
from optimizer.calibration import Calibration
from optimizer.errors import CalibrationError, UnsupportedError
from optimizer.gate import LEFT_OUT, Gate
from optimizer.listener import Listener
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report, Skip
from optimizer.quantization.emit import Writer
from optimizer.quantization.scales import Policy, Scaling, Scheme, choose
from optimizer.quantization.sites import Choice, Kind, Site, find_sites
from optimizer.quantization.statistics import InputStatistics
from optimizer.targets import get_target

logger = logging.getLogger(__name__)

Activation = Literal["static", "per-token"]


class Options(PassOptions):
    """Options of ``outliertune``."""

    bits: int = Field(
        8, ge=2, le=8, description="Bits of weights and activations; below 8 simulated within int8."
    )
    alpha: float | Literal["auto", "off"] = Field(
        "auto",
        description="How much of the activations' range moves into the weights: 1 = OutlierTune, "
        "0.5 = SmoothQuant, 'off' = none, 'auto' = by expected error, site by site.",
    )
    shift: bool | Literal["auto"] = Field(
        "auto", description="Centre every channel's range (symmetrization); 'auto' where it pays."
    )
    after_norm: Activation = Field("static", description="Scales of activations after a norm.")
    after_attention: Activation = Field("per-token", description="The same, after attention.")
    in_mlp: Activation = Field("per-token", description="The same, after an MLP's activation.")
    elsewhere: Activation = Field("per-token", description="The same, for all other layers.")
    asymmetric: bool = Field(
        default=True,
        description="Per-token scales span from a token's lowest number, where that pays.",
    )
    compensate: bool = Field(
        default=True,
        description="Round weights so that their errors cancel on the calibration data.",
    )
    margin: bool = Field(
        default=True,
        description="Make constant ranges wider than seen where that pays on held-out data.",
    )
    heads: bool | Literal["auto"] = Field(
        "auto",
        description="Quantize layers that compute an output, such as logits; 'auto' where they "
        "would cost more than 5 % of the time in float.",
    )
    include: tuple[str, ...] = Field(
        (), description="Patterns of weights to quantize although they compute an output."
    )
    exclude: tuple[str, ...] = Field((), description="Patterns of weights to leave in float.")
    force: bool = Field(
        default=False, description="Also for a target that int8 makes slower, such as ort-cuda."
    )

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value

    @field_validator("alpha")
    @classmethod
    def _in_range(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 <= value <= 1:
            msg = "'auto', 'off' or a number from 0 to 1"
            raise ValueError(msg)
        return value

    def policy(self, kind: Kind) -> Policy:
        """What ``optimizer.quantization`` needs to know for one kind of site."""
        activation = {
            Kind.NORM: self.after_norm,
            Kind.ATTENTION: self.after_attention,
            Kind.MLP: self.in_mlp,
            Kind.OTHER: self.elsewhere,
        }[kind]
        return Policy(
            bits=self.bits,
            alpha=self.alpha,
            shift=self.shift,
            static=activation == "static",
            asymmetric=self.asymmetric,
            compensated=self.compensate,
            margin=self.margin,
        )


def _check_target(name: str, options: Options) -> None:
    """Raise where int8 would make the model slower."""
    if get_target(name).int8_products or options.force:
        return
    raise UnsupportedError(
        f"pass 'outliertune': target '{name}' has no int8 products: it makes floats of int8 "
        "weights at every run, which was measured to take 2 to 8 times as long as float16; use the "
        "pass fp16, or a target of TensorRT; outliertune.force=true writes it all the same"
    )


class OutlierTune(GraphPass[Options]):
    """See the module."""

    name = "outliertune"
    exactness = Exactness.APPROXIMATE
    Options = Options
    after = ("canonicalize", "cqil", "tome", "crossget", "prune-tokens", "sparsify")

    def needs_calibration(self) -> bool:
        """Always: scales come from activations."""
        return True

    def call(self, model: ir.Model, context: Context) -> Report:
        """Quantize, in place."""
        _check_target(context.target, self.options)
        heads = None if self.options.heads == "auto" else self.options.heads
        choice = Choice(self.options.include, self.options.exclude, heads)
        sites, skipped = find_sites(model, choice)
        if not sites:
            skipped = skipped or [Skip("model", "it has no MatMul by a constant")]
            return Report(modified=False, skipped=tuple(skipped))
        calibration = context.calibration
        if calibration is None:
            raise CalibrationError(
                "pass 'outliertune': scales come from activations, which needs sample data; add "
                "--calibration FILE.npz with one array per model input."
            )
        plans, refused = context.gate.decide(
            "plan", lambda: plan(model, sites, self.options, calibration)
        )
        plans, left_out = _let_through(plans, sites, context.gate)
        details = write(model, plans, self.options, listener=context.listener)
        return Report(
            modified=bool(plans),
            applied=len(plans),
            skipped=(*skipped, *refused, *left_out),
            sites=tuple(p.site.name for p in plans),
            details={"bits": self.options.bits, "sites": details},
        )


@dataclass(frozen=True)
class Plan:
    """One site and how it is scaled."""

    site: Site
    scaling: Scaling
    stats: InputStatistics


def plan(
    model: ir.Model, sites: list[Site], options: Options, calibration: Calibration
) -> tuple[list[Plan], list[Skip]]:
    """Observe all inputs in one run and choose the scaling of each site."""
    observers = [InputStatistics(site.input) for site in sites]
    calibration.observe(model, observers)
    plans, refused = [], []
    for number, (site, stats) in enumerate(zip(sites, observers, strict=True)):
        weights = [graphs.const(linear.weight) for linear in site.linears]
        arrays = [w for w in weights if w is not None]
        reason = _fault(arrays, stats)
        if reason is None:
            policy = options.policy(site.kind)
            plans.append(Plan(site, choose(site, stats, arrays, policy), stats))
            logger.debug("outliertune: site %d of %d: %s", number + 1, len(sites), site.name)
        else:
            refused.append(Skip(site.name, reason))
        for linear in site.linears:
            tensor = graphs.constant(linear.weight)
            if tensor is not None:
                graphs.release(tensor)
    return plans, refused


def _let_through(plans: list[Plan], sites: list[Site], gate: Gate) -> tuple[list[Plan], list[Skip]]:
    """The plans for ``sites``, which may be those of a copy, without what the gate refuses."""
    named = {site.name: site for site in sites}
    taken = [replace(p, site=named[p.site.name]) for p in plans if gate.allow(_label(p.site))]
    names = {p.site.name for p in taken}
    left_out = [Skip(_label(p.site), LEFT_OUT) for p in plans if p.site.name not in names]
    written = {linear.matmul for p in taken for linear in p.site.linears}
    for index, p in enumerate(taken):
        source = p.site.source
        if source is not None and source.matmul not in written:  # it cannot scale for this site
            taken[index] = replace(p, site=replace(p.site, source=None))
    return taken, left_out


def _label(site: Site) -> str:
    """The site by its weights, as ``exclude`` takes them."""
    first, *others = (str(linear.weight.name) for linear in site.linears)
    return f"{first} and {len(others)} more" if others else first


def _fault(weights: list[np.ndarray], stats: InputStatistics) -> str | None:
    if not all(np.isfinite(w).all() for w in weights):
        return "a weight is not finite"
    if not stats.tokens:
        return "no valid token of its input was seen"
    if not (np.isfinite(stats.minimum).all() and np.isfinite(stats.maximum).all()):
        return "its input is not finite on the calibration data"
    return None


def write(
    model: ir.Model,
    plans: list[Plan],
    options: Options,
    *,
    rounding: bool = True,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Rewrite all sites; ``rounding=False`` leaves a float graph that equals the original.

    Returns:
        JSON-compatible facts, one entry per site.
    """
    output_scales = {
        p.site.source.matmul: p.scaling.scale
        for p in plans
        if p.site.source is not None and p.scaling.scale is not None
    }
    writer = Writer(
        model.graph,
        bits=options.bits,
        compensated=options.compensate,
        rounding=rounding,
        output_scales=output_scales,
    )
    details = []
    for number, p in enumerate(plans):
        ratio = writer.write(p.site, p.scaling, p.stats)
        details.append(_facts(p, ratio))
        if listener is not None:
            listener.progress(number + 1, len(plans))
    if plans:
        graphs.remove_dead(model)
    return details


def _facts(p: Plan, ratio: float) -> dict[str, Any]:
    s, z = p.scaling.scale, p.scaling.shift
    facts: dict[str, Any] = {
        "site": p.site.name,
        "weights": [str(linear.weight.name) for linear in p.site.linears],
        "scheme": p.scaling.scheme.value,
        "alpha": p.scaling.alpha,
        "scale": None if s is None else [float(f"{v:.4g}") for v in (s.min(), s.max())],
        "shift": None if z is None else float(f"{np.abs(z).max():.4g}"),
        "weight_sqnr_db": None if np.isinf(ratio) else round(ratio, 2),
        "expected_error": float(f"{p.scaling.error:.3g}"),
        "tokens": p.stats.tokens,
    }
    if p.scaling.scheme is Scheme.STATIC:
        facts["step"] = float(f"{p.scaling.step:.4g}")
        facts["margin"] = p.scaling.margin
    if p.site.outside is not None:
        facts["scaled_by"] = f"Mul and Add: {p.site.outside}"
    return facts
