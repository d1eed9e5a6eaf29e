"""Weights of fused linears, computed when read and never held.

Everything is folded in float64 and rounded once to the element type of the first weight, so that
a fused model differs from the algebra by one rounding per weight, whatever was folded into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer.data_files import note_source
from optimizer.graph import add_initializer, const, constant, lazy, release
from optimizer.structure import Linear, Norm

_LARGEST = "optimizer.fusion.largest"


@dataclass(frozen=True)
class Affine:
    """One linear and what is folded into it: ``((x * scale + shift) W + b) * gain``.

    Attributes:
        weight: Constant W [K, N].
        bias: Constant b [N], or None.
        scale: Constant [K], the scale of the norm before the linear, or None.
        shift: Constant [K], the bias of that norm, or None.
        gain: [N] or one number that multiplies the output, or None.
    """

    weight: ir.Value
    bias: ir.Value | None = None
    scale: ir.Value | None = None
    shift: ir.Value | None = None
    gain: np.ndarray | float | None = None

    @classmethod
    def of(
        cls, linear: Linear, norm: Norm | None = None, gain: np.ndarray | float | None = None
    ) -> Affine:
        """``linear`` reading what ``norm`` reads (after the plain normalization)."""
        if norm is None:
            return cls(linear.weight, linear.bias, gain=gain)
        return cls(linear.weight, linear.bias, norm.scale, norm.bias, gain)

    @property
    def inputs(self) -> int:
        """K."""
        return _shape(self.weight)[0]

    @property
    def outputs(self) -> int:
        """N."""
        return _shape(self.weight)[1]

    @property
    def biased(self) -> bool:
        """Whether the folded linear needs a bias."""
        if self.bias is not None:
            return True
        shift = const(self.shift)
        return shift is not None and bool(np.any(shift))

    def folded_weight(self) -> np.ndarray:
        """[K, N] in float64, or as stored where nothing is folded into it."""
        weight = _read(self.weight)
        if self.scale is None and self.gain is None:
            return weight
        folded = weight.astype(np.float64)
        if self.scale is not None:
            folded *= _read(self.scale).astype(np.float64)[:, None]
        if self.gain is not None:
            folded *= self.gain
        return folded

    def folded_bias(self) -> np.ndarray:
        """[N] in float64: ``(b + shift W) * gain``, with W before its scaling."""
        bias = np.zeros(self.outputs)
        if self.bias is not None:
            bias += _read(self.bias).astype(np.float64)
        if self.shift is not None:
            bias += _read(self.shift).astype(np.float64) @ _read(self.weight).astype(np.float64)
        return bias if self.gain is None else bias * self.gain


def beside(parts: Sequence[Affine], name: str) -> tuple[ir.LazyTensor, ir.LazyTensor | None]:
    """Linears of one input as one: weights and biases concatenated along N.

    Returns:
        W [K, sum of N], and b [sum of N] where any part needs one.
    """
    outputs = sum(part.outputs for part in parts)

    def weight(out: np.ndarray) -> None:
        start = 0
        for part in parts:
            out[:, start : start + part.outputs] = part.folded_weight()
            start += part.outputs

    def bias(out: np.ndarray) -> None:
        np.concatenate([part.folded_bias() for part in parts], out=out, casting="same_kind")

    return (
        _tensor(parts, f"{name}.weight", (parts[0].inputs, outputs), weight),
        _tensor(parts, f"{name}.bias", (outputs,), bias) if _biased(parts) else None,
    )


def stacked(parts: Sequence[Affine], name: str) -> tuple[ir.LazyTensor, ir.LazyTensor | None]:
    """A sum of linears as one linear of the concatenated inputs: ``sum x_j W_j + b_j``.

    Returns:
        W [sum of K, N], and b [N], the sum of the biases, where any part needs one.
    """
    inputs, outputs = sum(part.inputs for part in parts), parts[0].outputs

    def weight(out: np.ndarray) -> None:
        start = 0
        for part in parts:
            out[start : start + part.inputs] = part.folded_weight()
            start += part.inputs

    def bias(out: np.ndarray) -> None:
        out[:] = np.sum([part.folded_bias() for part in parts], axis=0)

    return (
        _tensor(parts, f"{name}.weight", (inputs, outputs), weight),
        _tensor(parts, f"{name}.bias", (outputs,), bias) if _biased(parts) else None,
    )


def unit_scale(graph: ir.Graph, like: ir.Value) -> ir.Value:
    """The scale of a norm whose own scale was folded away: ones of the shape of ``like``."""
    tensor = constant(like)
    assert tensor is not None  # noqa: S101  (a norm's scale is an initializer)
    size = tensor.size
    name = f"unit_scale_{size}_{tensor.dtype.name.lower()}"
    return shared(graph, name, np.ones(size, tensor.dtype.numpy()))


def shared(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer ``name`` if it holds ``array`` already, else a new one."""
    found = graph.initializers.get(name)
    known = const(found)
    same = known is not None and known.dtype == array.dtype and np.array_equal(known, array)
    if found is not None and same:
        return found
    return add_initializer(graph, name, array)


def overflows(part: Affine) -> bool:
    """Whether folding leaves the range of the weight's element type.

    Only float16 weights are read and checked: products of sane float32 or bfloat16 numbers fit.
    Each weight is read once, however often it is asked about.
    """
    tensor = constant(part.weight)
    if tensor is None or tensor.dtype is not ir.DataType.FLOAT16:
        return False
    if _LARGEST not in part.weight.meta:
        part.weight.meta[_LARGEST] = float(np.abs(_read(part.weight)).max(initial=0))
    largest = float(part.weight.meta[_LARGEST])
    scale = 1.0 if part.scale is None else float(np.abs(_read(part.scale)).max(initial=0))
    shift = 0.0 if part.shift is None else float(np.abs(_read(part.shift)).sum(dtype=np.float64))
    bias = 0.0 if part.bias is None else float(np.abs(_read(part.bias)).max(initial=0))
    # Bounds of |scale W| and |b + shift W|.
    return max(largest * scale, bias + shift * largest) > float(np.finfo(np.float16).max)


def _biased(parts: Sequence[Affine]) -> bool:
    return any(part.biased for part in parts)


def _tensor(
    parts: Sequence[Affine],
    name: str,
    shape: tuple[int, ...],
    fill: Callable[[np.ndarray], None],
) -> ir.LazyTensor:
    tensor = constant(parts[0].weight)
    assert tensor is not None  # noqa: S101  (the caller refused anything but constants)
    dtype = tensor.dtype.numpy()

    def read() -> np.ndarray:
        out = np.empty(shape, dtype)  # filled part by part: nothing is ever held twice in float64
        fill(out)
        return out

    made = lazy(name, tensor.dtype, shape, read)
    note_source(made, tensor)
    return made


def _read(value: ir.Value) -> np.ndarray:
    tensor = constant(value)
    if tensor is None:
        msg = f"value '{value.name}' is not a constant"
        raise ValueError(msg)
    array = tensor.numpy()
    release(tensor)
    return array


def _shape(value: ir.Value) -> tuple[int, int]:
    tensor = constant(value)
    if tensor is None:
        msg = f"weight '{value.name}' is not a constant"
        raise ValueError(msg)
    rows, columns = tensor.shape.numpy()
    return rows, columns
