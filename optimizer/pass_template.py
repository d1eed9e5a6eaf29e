"""Products with a constant 1 are removed.

Rewrite:      y = x * 1   ->   x
Applies when: 1. one factor is a constant of one element, 1 or as close to it as ``tolerance`` says;
              2. it has no more axes than the other factor, which it would otherwise reshape;
              3. the product is no output of the model, whose name must stay.
Exactness:    bitwise: x * 1 is x for every number, also for infinities and NaN. Approximate with a
              tolerance: every site changes its numbers by that part.
Cost:         one node less per site.
Source:       IEEE 754-2019, section 6.3: multiplication by one.

A pass to start from. Try it: optimize passes ./my.py:RemoveOnes --conformance
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from pydantic import Field

from optimizer.gate import LEFT_OUT
from optimizer.graph import constant, remove_dead, replace_value, scalar
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report, Skip


class RemoveOnesOptions(PassOptions):
    """Options of ``remove-ones``."""

    tolerance: float = Field(
        0.0, ge=0, lt=1, description="Largest distance from 1 of a factor that is removed."
    )


class RemoveOnes(GraphPass[RemoveOnesOptions]):
    """Three steps: find sites, refuse a site with a reason, rewrite the rest."""

    name = "remove-ones"
    exactness = Exactness.BITWISE
    Options = RemoveOnesOptions

    def __init__(self, options: RemoveOnesOptions | None = None) -> None:
        super().__init__(options)
        if self.options.tolerance:
            self.exactness = Exactness.APPROXIMATE

    def call(self, model: ir.Model, context: Context) -> Report:
        """Rewrite the model in place, and say what was done."""
        sites: list[str] = []
        skipped: list[Skip] = []
        for site in _find_sites(model.graph, self.options.tolerance):
            reason = _reason_to_skip(site)
            # Asked last: ``optimize bisect`` leaves sites out to find the one that breaks a model.
            if reason is None and not context.gate.allow(site.name):
                reason = LEFT_OUT
            if reason is None:
                replace_value(site.product, site.factor)
                sites.append(site.name)
            else:
                skipped.append(Skip(site.name, reason))
        if sites:  # else the graph must stay as it is, whatever is dead in it
            remove_dead(model)
        return Report(
            modified=bool(sites), applied=len(sites), skipped=tuple(skipped), sites=tuple(sites)
        )


@dataclass(frozen=True)
class _Site:
    """A product with a factor near 1."""

    node: ir.Node
    factor: ir.Value
    one: ir.TensorProtocol | None

    @property
    def name(self) -> str:
        return self.node.name or str(self.product.name)

    @property
    def product(self) -> ir.Value:
        return self.node.outputs[0]


def _find_sites(graph: ir.Graph, tolerance: float) -> Iterator[_Site]:
    for node in list(graph):  # a list, because nodes are removed meanwhile
        if node.op_type != "Mul" or node.domain not in ("", "ai.onnx"):
            continue
        for factor, one in (node.inputs, reversed(node.inputs)):
            # ``constant`` reads nothing; ``scalar`` reads one number.
            number = scalar(one)
            if factor is None or number is None or constant(factor) is not None:
                continue
            if abs(number - 1) <= tolerance:
                yield _Site(node, factor, constant(one))
                break


def _reason_to_skip(site: _Site) -> str | None:
    """None = the site may be rewritten."""
    if site.product.is_graph_output():
        return "its name is that of an output of the model"
    if site.factor.shape is None or site.one is None:
        return "the number of axes is not known"
    if len(site.one.shape) > len(site.factor.shape):
        return "the constant adds axes"
    return None
