"""Writes quantized sites into a graph: the canonical symmetric int8 form.

Static:     y = (x - z) / s, in the norm where it can be, else Mul and Add;
            MatMul(DQ(Q(y, t)), DQ(W8, w)) + b + z W
Per token:  r = max(reduce(x), floor); MatMul(DQ(Q(x / r - c, 1 / n)), DQ(W8, w)) + c colsum, times
            r, + b. A constant c is a whole number of steps, so that a target with unsigned codes
            can take it as zero point; c of both ends is (max + min) / 2 / r of the token.

All folding is done in float64 and cast to float32 once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.data_files import note_source
from optimizer.nodes import operand
from optimizer.quantization.scales import Scaling, Scheme
from optimizer.quantization.sites import Site
from optimizer.quantization.statistics import InputStatistics
from optimizer.quantization.weights import (
    Compensation,
    QuantizedWeight,
    round_nearest,
    signal_to_noise,
    top_code,
)
from optimizer.structure import Linear

_FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class _Input:
    """The prepared input of a site.

    Attributes:
        value: Feeds the MatMul.
        gain: r [..., 1], or None.
        offset: c as a constant.
        middle: r * c [..., 1] of the token, or None.
    """

    value: ir.Value
    gain: ir.Value | None = None
    offset: float = 0.0
    middle: ir.Value | None = None


class Writer:
    """Writes sites into one graph.

    Args:
        bits: Of the codes; those of fewer than 8 bits lie in int8 as well.
        compensated: How weights are rounded (see ``weights``).
        rounding: False leaves out every rounding step: the same scales, shifts and float weights,
            to prove that the graph around the rounding is exact.
        output_scales: Divides the outputs of the layer of a MatMul, channel by channel.
    """

    def __init__(
        self,
        graph: ir.Graph,
        *,
        bits: int = 8,
        compensated: bool = True,
        rounding: bool = True,
        output_scales: Mapping[ir.Node, np.ndarray] | None = None,
    ) -> None:
        self.graph = graph
        self.bits = bits
        self.compensated = compensated
        self.rounding = rounding
        self.output_scales = output_scales or {}
        self._constants: dict[tuple[str, bytes], ir.Value] = {}

    def write(self, site: Site, scaling: Scaling, stats: InputStatistics) -> float:
        """Rewrite all layers of a site; returns the signal-to-noise ratio of its weights in dB."""
        prepared = self._input(site, scaling)
        rows = scaling.apply(stats.rows)
        compensation = Compensation(rows) if self.compensated and self.rounding else None
        mean = scaling.apply(stats.mean)
        ratios = []
        for linear in site.linears:
            weight, bias = self._fold(linear, scaling)
            if not self.rounding:
                self._plain(linear, prepared, weight, bias)
                continue
            if compensation is None:
                rounded = round_nearest(weight, self.bits)
            else:
                rounded = compensation.round(weight, self.bits)
            if bias is not None:
                bias = bias + mean @ (weight - rounded.dequantized())
            ratios.append(signal_to_noise(weight, rounded))
            self._quantized(linear, prepared, rounded, bias)
        return min(ratios, default=float("inf"))

    def _fold(self, linear: Linear, scaling: Scaling) -> tuple[np.ndarray, np.ndarray | None]:
        """W' [K, N] and b' [N] in float64; None where there is no bias and none is needed."""
        tensor = graphs.constant(linear.weight)
        assert tensor is not None  # noqa: S101 - a site's weights are constants
        weight = tensor.numpy().astype(np.float64)
        graphs.release(tensor)
        bias = None
        if linear.bias is not None:
            stored = np.asarray(graphs.const(linear.bias), np.float64)
            bias = np.broadcast_to(stored, weight.shape[1:])
        if scaling.shift is not None:
            bias = scaling.shift @ weight + (0.0 if bias is None else bias)
        if scaling.scale is not None:
            weight *= scaling.scale[:, None]
        divisor = self.output_scales.get(linear.matmul)
        if divisor is not None:
            weight /= divisor
            bias = None if bias is None else bias / divisor
        return weight, bias

    # The input.

    def _input(self, site: Site, scaling: Scaling) -> _Input:
        """The input scaled, shifted and rounded; before the first layer that reads it."""
        anchor = site.linears[0].matmul
        x = operand(anchor)
        if site.norm is not None:
            x = self._in_norm(site, scaling, x)
        else:
            x = self._explicit(site, scaling, x, anchor)
        if scaling.scheme is not Scheme.STATIC:
            return self._per_token(site, scaling, x, anchor)
        if self.rounding and self.bits < 8:  # int8 would saturate at more than the code's range
            top = scaling.step * top_code(self.bits)
            limits = [self._number(f"limit_{n}", v) for n, v in (("low", -top), ("high", top))]
            x = self._insert(anchor, "Clip", [x, *limits], f"{site.name}_clipped", x)
        return _Input(self._rounded(x, scaling.step, anchor, site.name))

    def _in_norm(self, site: Site, scaling: Scaling, x: ir.Value) -> ir.Value:
        """Fold gamma / s and (beta - z) / s; a norm that takes no bias gets its shift as an Add."""
        norm = site.norm
        assert norm is not None  # noqa: S101 - the caller's condition
        s = 1.0 if scaling.scale is None else scaling.scale
        gamma = np.asarray(graphs.const(norm.scale), np.float64) / s
        if scaling.scale is not None:
            node, index = norm.scale_slot
            node.replace_input_with(index, self._vector(str(norm.scale.name), gamma))
        beta = None if norm.bias is None else np.asarray(graphs.const(norm.bias), np.float64)
        if norm.bias_slot is None:
            if scaling.shift is None:
                return x
            moved = self._vector(f"{site.name}_shift", -scaling.shift / s)
            return self._insert(
                site.linears[0].matmul, "Add", [x, moved], f"{site.name}_shifted", x
            )
        if scaling.shift is None and (beta is None or scaling.scale is None):
            return x
        shifted = np.zeros(len(gamma)) if beta is None else beta
        if scaling.shift is not None:
            shifted = shifted - scaling.shift
        name = f"{norm.scale.name}_bias" if norm.bias is None else str(norm.bias.name)
        node, index = norm.bias_slot
        node.resize_inputs(max(index + 1, len(node.inputs)))
        node.replace_input_with(index, self._vector(name, shifted / s))
        return x

    def _explicit(self, site: Site, scaling: Scaling, x: ir.Value, anchor: ir.Node) -> ir.Value:
        """Mul and Add on the way into this site only; a source layer has scaled already."""
        name, source = x.name, x
        if scaling.scale is not None and site.source is None:
            factor = self._vector(f"{name}_inverse_scale", 1 / scaling.scale)
            x = self._insert(anchor, "Mul", [x, factor], f"{name}_scaled", source)
        if scaling.shift is not None:
            s = 1.0 if scaling.scale is None else scaling.scale
            moved = self._vector(f"{name}_shift", -scaling.shift / s)
            x = self._insert(anchor, "Add", [x, moved], f"{name}_shifted", source)
        return x

    def _per_token(self, site: Site, scaling: Scaling, x: ir.Value, anchor: ir.Node) -> _Input:
        """Rows divided by their reach, and the reach to multiply back."""
        name = site.name
        middle = None
        reach = [self._reduce(anchor, "Max", x)]
        if scaling.scheme is Scheme.TOKEN:
            low = self._reduce(anchor, "Min", x)
            reach.append(self._insert(anchor, "Neg", [low], f"{name}_depth", low))
        elif scaling.scheme is Scheme.TOKEN_RANGE:
            low, half = self._reduce(anchor, "Min", x), self._number("half", 0.5)
            total = self._insert(anchor, "Add", [reach[0], low], f"{name}_sum", low)
            middle = self._insert(anchor, "Mul", [total, half], f"{name}_middle", low)
            reach = [self._insert(anchor, "Sub", [reach[0], middle], f"{name}_reach", low)]
        reach.append(self._number("token_floor", scaling.floor))
        gain = self._insert(anchor, "Max", reach, f"{name}_gain", reach[0])
        source = x
        if middle is not None:
            x = self._insert(anchor, "Sub", [x, middle], f"{name}_centred", source)
        x = self._insert(anchor, "Div", [x, gain], f"{name}_normalized", source)
        offset = scaling.offset * scaling.step
        if scaling.offset:
            moved = self._number("token_offset", offset)
            x = self._insert(anchor, "Sub", [x, moved], f"{name}_offset", source)
        return _Input(self._rounded(x, scaling.step, anchor, name), gain, offset, middle)

    def _rounded(self, x: ir.Value, step: float, anchor: ir.Node, name: str) -> ir.Value:
        if not self.rounding:
            return x
        scale = self._number("activation_scale", step)
        pair = [scale, self._constant("int8_zero", np.array(0, np.int8))]
        codes = graphs.insert(
            self.graph, anchor, "QuantizeLinear", [x, *pair],
            name=f"{name}_int8", dtype=ir.DataType.INT8, shape=x.shape,
        )  # fmt: skip
        return self._insert(anchor, "DequantizeLinear", [codes, *pair], f"{name}_rounded", x)

    # The layers.

    def _quantized(
        self, linear: Linear, source: _Input, weight: QuantizedWeight, bias: np.ndarray | None
    ) -> None:
        name = str(linear.weight.name)
        numbers = ir.Tensor(weight.codes)
        note_source(numbers, graphs.constant(linear.weight))
        codes = graphs.add_initializer(self.graph, f"{name}_int8", numbers)
        scale = graphs.add_initializer(self.graph, f"{name}_scale", weight.scale)
        wide = graphs.insert(
            self.graph, linear.matmul, "DequantizeLinear", [codes, scale], {"axis": 1},
            name=f"{name}_rounded", dtype=_FLOAT, shape=weight.codes.shape,
        )  # fmt: skip
        self._product(linear, source, wide, weight.column_sums, bias)

    def _plain(
        self, linear: Linear, source: _Input, weight: np.ndarray, bias: np.ndarray | None
    ) -> None:
        wide = self._vector(str(linear.weight.name), weight)
        self._product(linear, source, wide, weight.sum(axis=0), bias)

    def _product(
        self,
        linear: Linear,
        source: _Input,
        weight: ir.Value,
        column_sums: np.ndarray,
        bias: np.ndarray | None,
    ) -> None:
        """The product, what the offset took from it, the gain and the bias, in this order."""
        last, old = linear.add or linear.matmul, linear.output
        name = str(linear.weight.name).removesuffix(".weight")
        y = self._insert(last, "MatMul", [source.value, weight], f"{name}_product", old)
        if source.offset:
            lost = self._vector(f"{name}_offset", source.offset * column_sums)
            y = self._insert(last, "Add", [y, lost], f"{name}_restored", old)
        if source.gain is not None:
            y = self._insert(last, "Mul", [y, source.gain], f"{name}_unscaled", old)
        if source.middle is not None:
            sums = self._vector(f"{name}_column_sums", column_sums)
            part = self._insert(last, "Mul", [source.middle, sums], f"{name}_middle", old)
            y = self._insert(last, "Add", [y, part], f"{name}_restored", old)
        if bias is not None:
            stored = linear.bias.name if linear.bias is not None else f"{name}.bias"
            y = self._insert(last, "Add", [y, self._vector(str(stored), bias)], f"{name}_out", old)
        graphs.replace_value(old, y, keep_name=True)

    # Small helpers.

    def _insert(
        self, anchor: ir.Node, op_type: str, inputs: list[ir.Value], name: str, like: ir.Value
    ) -> ir.Value:
        """A float node whose result has the shape of ``like``."""
        return graphs.insert(
            self.graph, anchor, op_type, inputs, name=name, dtype=_FLOAT, shape=like.shape
        )

    def _reduce(self, anchor: ir.Node, which: str, x: ir.Value) -> ir.Value:
        shape = None if x.shape is None else ir.Shape([*list(x.shape)[:-1], 1])
        last = self._constant("last_axis", np.array([-1], np.int64))
        return graphs.insert(
            self.graph, anchor, f"Reduce{which}", [x, last], {"keepdims": 1},
            name=f"{x.name}_{which.lower()}", dtype=_FLOAT, shape=shape,
        )  # fmt: skip

    def _vector(self, name: str, numbers: np.ndarray) -> ir.Value:
        return graphs.add_initializer(self.graph, name, np.asarray(numbers, np.float32))

    def _number(self, name: str, number: float) -> ir.Value:
        return self._constant(name, np.array(number, np.float32))

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant shared by all sites that need the same."""
        key = (name, array.tobytes())
        if key not in self._constants:
            self._constants[key] = graphs.add_initializer(self.graph, name, array)
        return self._constants[key]
