"""Converts a model to half precision: looks at constants and at a run, plans, writes, reports."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, TypeVar

import onnx_ir as ir
from pydantic import Field, field_validator

from optimizer import graph as graphs
from optimizer.nodes import node_of
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report, Skip
from optimizer.precision import cast
from optimizer.precision.constants import Numbers, look
from optimizer.precision.limits import Format
from optimizer.precision.masks import Extremes, find_extremes
from optimizer.precision.plan import (
    Evidence,
    Plan,
    Planner,
    graph_values,
    is_cache,
    is_cast,
    is_float_cast,
)
from optimizer.precision.protected import protected_nodes
from optimizer.precision.ranges import Ranges, measure
from optimizer.precision.retyping import Retyper
from optimizer.raising import value_info
from optimizer.raising.base import site
from optimizer.targets import Quantization, get_target
from optimizer.widening import half_types

Interface = Literal["keep", "cache", "half"]


class ConversionOptions(PassOptions):
    """Options of both conversions."""

    keep: tuple[str, ...] = Field(
        (),
        description="Patterns of what stays as it is: names of nodes, values or weights, operator "
        "types, or layers (layers.0, layers.*.attention, layers.11.mlp).",
    )
    io: Interface = Field(
        "keep",
        description="Types of the model's inputs and outputs: 'keep' those of before, half "
        "precision for the KV 'cache', or 'half' precision for all that are float32.",
    )

    @field_validator("keep", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


ConversionT = TypeVar("ConversionT", bound=ConversionOptions)


class Conversion(GraphPass[ConversionT]):
    """What both conversions are as passes."""

    exactness = Exactness.APPROXIMATE
    # The others read and rewrite float32 weights: scales, sums and codes are computed from them.
    after = ("canonicalize", "cqil", "outliertune", "fuse-concurrent")

    def __init__(self, options: ConversionT | None = None) -> None:
        """Declare the types of inputs and outputs broken only where ``io`` asks for that."""
        super().__init__(options)
        if self.options.io != "keep":
            self.breaks = frozenset({"input types", "output types"})


def convert(
    model: ir.Model,
    format_: Format,
    options: ConversionOptions,
    context: Context,
    *,
    margin: float = 1.0,
) -> Report:
    """Convert ``model`` in place.

    Args:
        model: With types of its values, as far as known.
        format_: What float32, and the other 16-bit type, become.
        options: What the user wants.
        context: Of the pass; the samples, where there are any, decide what is in range.
        margin: Share of the format's largest number that values seen in a run may reach.

    Raises:
        OptionError: A pattern of ``options.keep`` matches nothing.
    """
    kept = {
        node: f"kept by option keep={pattern}"
        for node, pattern in protected_nodes(model, options.keep).items()
    }
    value_info.fill(model)
    if not any(_is_source(value, format_) for value in _values(model.graph)):
        done = any(value.dtype == format_.dtype for value in _values(model.graph))
        reason = f"it is {format_.dtype.name} already" if done else "it has no values in float32"
        return Report(modified=False, skipped=(Skip("model", reason),))
    twice = half_types(model) - {format_.dtype}
    gate = context.gate
    numbers = gate.decide("constants", lambda: _numbers(model, format_))
    extremes = find_extremes(model.graph, numbers, format_)
    ranges = gate.decide("ranges", lambda: _measured(model, format_, extremes, context))
    evidence = Evidence(
        protected={**_needed_by_target(model, context.target), **kept},
        numbers=numbers,
        fitted=extremes.masks | extremes.limits,
        masks=extremes.masked,
        ranges=ranges,
        margin=margin,
    )
    own = model.opset_imports.get("", 1)
    written = context.opset or get_target(context.target).opset_for(own)
    planner = Planner(model, format_, Retyper(model, format_, min(own, written)), evidence)
    plan = planner.plan(_wanted(model.graph, format_, options.io)).without(gate.allow)
    stored = _stored(plan, numbers)
    sites = [site(node) for node in model.graph if node in plan.retyping]
    sites += [str(value.name) for value in plan.interface]
    if sites:
        extremes.fit(model.graph, format_)
        cast.write(model, format_, plan)
    samples = None if ranges is None else ranges.samples
    return Report(
        modified=bool(sites),
        applied=len(sites),
        skipped=tuple(_skips(plan)),
        sites=tuple(sites),
        details={"margin": margin, **_details(model, format_, plan, stored, samples)},
        notes=tuple(_notes(format_, context.target, stored, samples, twice)) if sites else (),
    )


def _numbers(model: ir.Model, format_: Format) -> dict[str, Numbers]:
    """What becomes of every constant, by name."""
    sources = (v for v in model.graph.initializers.values() if _is_source(v, format_))
    constants = ((str(v.name), graphs.constant(v)) for v in sources)
    return {name: look(tensor, format_) for name, tensor in constants if tensor is not None}


def _is_source(value: ir.Value, format_: Format) -> bool:
    return value.dtype in format_.sources


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph_values(graph)
    yield from graph.initializers.values()


def _measured(
    model: ir.Model, format_: Format, extremes: Extremes, context: Context
) -> Ranges | None:
    """The numbers of a run with the masks and limits that the result will have."""
    if context.calibration is None or not format_.overflows:
        return None
    context.listener.stage(f"{format_.name}: observing ranges")
    twin = model.clone()
    extremes.fit(twin.graph, format_)
    return measure(twin, context.calibration)


def _wanted(graph: ir.Graph, format_: Format, io: Interface) -> list[ir.Value]:
    """Graph inputs and outputs that are to become half precision."""
    values = [v for v in (*graph.inputs, *graph.outputs) if _is_source(v, format_)]
    free = [v for v in values if not v.is_initializer()]
    if io == "keep":
        return []
    return [value for value in dict.fromkeys(free) if io == "half" or is_cache(value)]


def _needed_by_target(model: ir.Model, target: str) -> dict[ir.Node, str]:
    """Nodes of int8 products, where the target has a form of its own for them, in float32."""
    if get_target(target).quantization is not Quantization.U8S8_CONTRIB:
        return {}
    reason = f"int8 products of target '{target}' take and give float32"
    found: dict[ir.Node, str] = {}
    for node in model.graph:
        sides = [node_of(value, "DequantizeLinear") for value in node.inputs]
        if node.op_type != "MatMul" or node.domain != "" or None in sides:
            continue
        quantize = node_of(sides[0].inputs[0], "QuantizeLinear") if sides[0] is not None else None
        bias = graphs.only_user(node.outputs[0])
        added = bias if bias is not None and bias.op_type == "Add" else None
        found.update({n: reason for n in (*sides, quantize, node, added) if n is not None})
    return found


def _stored(plan: Plan, numbers: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """The constants that become half precision, by name."""
    read = (node.inputs[i] for node, change in plan.retyping.items() for i in change.inputs)
    names = (str(value.name) for value in read if graphs.constant(value) is not None)  # type: ignore[union-attr]
    return {name: numbers[name] for name in names if name in numbers}


def _skips(plan: Plan) -> Iterator[Skip]:
    for node, kept in plan.kept.items():
        yield Skip(site(node), kept.reason)
    for value, kept in plan.refused.items():
        yield Skip(str(value.name), kept.reason)


def _details(
    model: ir.Model,
    format_: Format,
    plan: Plan,
    stored: Mapping[str, Numbers],
    samples: int | None,
) -> dict[str, Any]:
    """JSON-compatible facts for the manifest."""
    casts = [node for node in model.graph if is_cast(node) and is_float_cast(node)]
    limited = [(site(node), kept) for node, kept in plan.kept.items() if kept.limit is not None]
    return {
        "type": format_.dtype.name,
        "samples": samples or 0,
        "nodes": {"half": len(plan.retyping), "kept": len(plan.kept), "casts": len(casts)},
        "interface": sorted(str(value.name) for value in plan.interface),
        "constants": {
            "tensors": len(stored),
            "numbers": sum(n.count for n in stored.values()),
            "vanishing": sum(n.vanishing for n in stored.values()),
            "shortened": sum(n.shortened for n in stored.values()),
        },
        "out_of_range": [
            {"node": name, "found": _short(kept.maximum), "limit": _short(kept.limit)}
            for name, kept in limited
        ],
    }


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.6g}")


def _notes(
    format_: Format,
    target: str,
    stored: Mapping[str, Numbers],
    samples: int | None,
    twice: Collection[ir.DataType],
) -> Iterator[str]:
    if format_.overflows and samples is None:
        yield (
            "no data was looked at: nodes whose numbers could be too large or too small stay in "
            "float32; with --calibration, what is seen decides"
        )
    vanishing, count = (sum(getattr(n, k) for n in stored.values()) for k in ("vanishing", "count"))
    if vanishing:
        yield (
            f"{vanishing} of {count} stored numbers became 0: they are below half of "
            f"{format_.smallest:.2g}"
        )
    name = format_.dtype.name.lower()
    for dtype in twice:
        yield f"what was {dtype.name.lower()} and becomes {name} is rounded a second time"
    if get_target(target).only_stores(name):
        yield (
            f"on target '{target}' weights are stored in {name} and computed with in float32: the "
            "file gets smaller, but nothing gets faster"
        )
