"""Operators in numpy, in whatever precision their inputs have.

These replace implementations of ``onnx.reference`` that are slow (Conv, Erf), wrong for some
padding (MaxPool) or rounded to single precision somewhere (Attention's scale, the norms' and
quantizers' casts), so that a model whose
tensors are float64 is computed in float64 throughout. Formulas: the ONNX operator specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray
Arrays: TypeAlias = Sequence[Any]
Attributes: TypeAlias = Mapping[str, Any]
Operator: TypeAlias = Callable[[Arrays, Attributes], tuple[Array, ...]]


def optional_input(inputs: Arrays, index: int) -> Array | None:
    """An input that may be left out."""
    return inputs[index] if index < len(inputs) else None


def matmul(inputs: Arrays, _: Attributes) -> tuple[Array, ...]:
    """Y = A @ B."""
    return (np.matmul(inputs[0], inputs[1]),)


_erf = np.frompyfunc(math.erf, 1, 1)


def erf(x: Array) -> Array:
    """Error function, accurate to the last bits of float64."""
    return np.asarray(_erf(x.astype(np.float64))).astype(x.dtype)


def erf_op(inputs: Arrays, _: Attributes) -> tuple[Array, ...]:
    """Y = erf(X)."""
    return (erf(inputs[0]),)


def gelu(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """x/2 (1 + erf(x/sqrt 2)), or its tanh approximation."""
    x = inputs[0]
    if attributes.get("approximate", "none") == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return ((0.5 * x * (1 + np.tanh(inner))).astype(x.dtype),)
    return ((0.5 * x * (1 + erf(x / math.sqrt(2)))).astype(x.dtype),)


def _normalized_axes(x: Array, attributes: Attributes) -> tuple[int, ...]:
    return tuple(range(int(attributes.get("axis", -1)) % x.ndim, x.ndim))


def layer_normalization(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """(x - mean) / sqrt(var + eps) * scale + bias; also the mean and 1/sqrt(var + eps)."""
    x, scale, bias = inputs[0], inputs[1], optional_input(inputs, 2)
    axes = _normalized_axes(x, attributes)
    mean = x.mean(axis=axes, keepdims=True)
    centred = x - mean
    variance = np.square(centred).mean(axis=axes, keepdims=True)
    inverse = 1 / np.sqrt(variance + float(attributes.get("epsilon", 1e-5)))
    y = centred * inverse * scale
    if bias is not None:
        y = y + bias
    return y.astype(x.dtype), mean, inverse


def rms_normalization(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Y = x / sqrt(mean(x^2) + eps) * scale."""
    x, scale = inputs[0], inputs[1]
    square = np.square(x).mean(axis=_normalized_axes(x, attributes), keepdims=True)
    return ((x / np.sqrt(square + float(attributes.get("epsilon", 1e-5))) * scale).astype(x.dtype),)


def rotary_embedding(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Rotates pairs of channels by the angle of the position.

    x: [B, H, S, c] or [B, S, H*c]; cos, sin: [B, S, r/2], or tables indexed by position_ids.
    """
    x, cos, sin = inputs[:3]
    positions = optional_input(inputs, 3)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    flat = x.ndim == 3
    heads = int(attributes.get("num_heads", 0))
    view = x.reshape(x.shape[0], x.shape[1], heads, -1) if flat else x.transpose(0, 2, 1, 3)
    rotated = int(attributes.get("rotary_embedding_dim", 0)) or view.shape[-1]
    part, rest = view[..., :rotated], view[..., rotated:]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    if attributes.get("interleaved", 0):
        a, b = part[..., 0::2], part[..., 1::2]
        turned = np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(part.shape)
    else:
        a, b = np.split(part, 2, axis=-1)
        turned = np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    y = np.concatenate([turned, rest], axis=-1).astype(x.dtype)
    return (y.reshape(x.shape) if flat else y.transpose(0, 2, 1, 3),)


def attention(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """softmax(softcap(scale Q K^T) + mask) V, with grouped heads and a cache.

    Query head h reads key/value head h // (H / Hkv). Rows in which everything is masked give 0.
    """
    q, k, v = inputs[:3]
    mask, past_key, past_value = (optional_input(inputs, i) for i in (3, 4, 5))
    flat = q.ndim == 3
    if flat:
        heads, kv_heads = int(attributes["q_num_heads"]), int(attributes["kv_num_heads"])
        q, k, v = _split_heads(q, heads), _split_heads(k, kv_heads), _split_heads(v, kv_heads)
    if past_key is not None and past_value is not None:
        k = np.concatenate([past_key, k], axis=2)
        v = np.concatenate([past_value, v], axis=2)
    batch, heads, length, width = q.shape
    kv_heads, total = k.shape[1], k.shape[2]
    scale = float(attributes.get("scale") or 1 / math.sqrt(width))
    grouped = (q * scale).reshape(batch, kv_heads, heads // kv_heads, length, width)
    scores = np.matmul(grouped, k[:, :, None].swapaxes(-1, -2))
    scores = scores.reshape(batch, heads, length, total)
    cap = float(attributes.get("softcap") or 0)
    if cap > 0:
        scores = cap * np.tanh(scores / cap)
    past = 0 if past_key is None else past_key.shape[2]
    causal = bool(attributes.get("is_causal", 0))
    weights = _masked_softmax(scores, _bias(mask, length, total, past, causal=causal))
    weights = weights.reshape(batch, kv_heads, heads // kv_heads, length, total)
    y = np.matmul(weights, v[:, :, None]).reshape(batch, heads, length, -1)
    if flat:
        y = y.transpose(0, 2, 1, 3).reshape(batch, length, -1)
    return y.astype(q.dtype), k, v


def _split_heads(x: Array, heads: int) -> Array:
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(0, 2, 1, 3)


def _bias(mask: Array | None, length: int, total: int, past: int, *, causal: bool) -> Array:
    """What is added to the scores: 0 or the mask's value where attended, -inf where not."""
    bias = np.zeros((length, total))
    if causal:
        reachable = np.arange(total)[None, :] <= np.arange(length)[:, None] + past
        bias = np.where(reachable, 0.0, -np.inf)
    if mask is not None:
        added = np.where(mask, 0.0, -np.inf) if mask.dtype == np.bool_ else mask
        short = total - added.shape[-1]
        if short > 0:
            widths = [(0, 0)] * (added.ndim - 1) + [(0, short)]
            added = np.pad(added, widths, constant_values=-np.inf)
        bias = bias + added
    return bias


def _masked_softmax(scores: Array, bias: Array) -> Array:
    scores = scores + bias.astype(scores.dtype)
    peak = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    masked = np.isneginf(peak)
    powers = np.exp(scores - np.where(masked, 0, peak))
    total = powers.sum(axis=-1, keepdims=True)
    result: Array = (powers / np.where(masked, 1, total)).astype(scores.dtype)
    return result


def _along(parameter: Array, x: Array, axis: int) -> Array:
    """A per-axis scale or zero point, shaped to broadcast against x."""
    if parameter.ndim == 0 or parameter.size == 1:
        return parameter.reshape(())
    if parameter.ndim != 1:
        repeats = [-(-n // m) for n, m in zip(x.shape, parameter.shape, strict=True)]
        for dim, count in enumerate(repeats):
            parameter = np.repeat(parameter, count, axis=dim)
        return parameter[tuple(slice(n) for n in x.shape)]
    shape = [1] * x.ndim
    shape[axis % x.ndim] = -1
    return parameter.reshape(shape)


def quantize_linear(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """saturate(round-half-to-even(x / scale) + zero point), for 8- and 16-bit integers."""
    x, zero = inputs[0], optional_input(inputs, 2)
    axis = int(attributes.get("axis", 1))
    dtype = zero.dtype if zero is not None else np.dtype(np.uint8)
    limits = np.iinfo(dtype)
    y = np.rint(x / _along(inputs[1], x, axis))
    if zero is not None:
        y = y + _along(zero, x, axis).astype(y.dtype)
    return (np.clip(y, limits.min, limits.max).astype(dtype),)


def dequantize_linear(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """(x - zero point) * scale, in the precision of the scale."""
    x, scale, zero = inputs[0], inputs[1], optional_input(inputs, 2)
    axis = int(attributes.get("axis", 1))
    y = x.astype(scale.dtype)
    if zero is not None:
        y = y - _along(zero, x, axis).astype(scale.dtype)
    return (y * _along(scale, x, axis),)


def matmul_integer_to_float(inputs: Arrays, _: Attributes) -> tuple[Array, ...]:
    """(A - a_zero) a_scale @ (B - b_zero) b_scale + bias, scales per tensor or column of B."""
    a, b, a_scale, b_scale = inputs[:4]
    a_zero, b_zero, bias = (optional_input(inputs, i) for i in (4, 5, 6))
    # Exact in float64: integers of 8 bits, up to 2^37 products of them.
    left, right = a.astype(np.float64), b.astype(np.float64)
    left = left if a_zero is None else left - a_zero
    right = right if b_zero is None else right - b_zero
    y = np.matmul(left, right).astype(a_scale.dtype) * a_scale * b_scale
    return (y if bias is None else y + bias,)


def conv(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Convolution over any number of axes, as a tensor contraction over sliding windows."""
    x, w, b = inputs[0], inputs[1], optional_input(inputs, 2)
    axes = w.ndim - 2
    windows = _windows(x, w.shape[2:], attributes, 0)
    groups = int(attributes.get("group", 1))
    contracted = [1, *range(2 + axes, 2 + 2 * axes)]
    parts = []
    for g in range(groups):
        channels = slice(g * w.shape[1], (g + 1) * w.shape[1])
        per = w.shape[0] // groups
        kernel = w[g * per : (g + 1) * per]
        y = np.tensordot(windows[:, channels], kernel, (contracted, list(range(1, w.ndim))))
        parts.append(np.moveaxis(y, -1, 1))
    result = np.concatenate(parts, axis=1)
    return (result if b is None else result + b.reshape(1, -1, *[1] * axes),)


def _windows(x: Array, kernel: Sequence[int], attributes: Attributes, fill: Any) -> Array:
    """[N, C, outputs..., kernel...]: what each output of a convolution or pooling looks at."""
    axes = len(kernel)
    strides = list(attributes.get("strides") or [1] * axes)
    dilations = list(attributes.get("dilations") or [1] * axes)
    extent = [(n - 1) * d + 1 for n, d in zip(kernel, dilations, strict=True)]
    pads = _padding(x, extent, strides, attributes)
    x = np.pad(x, [(0, 0), (0, 0), *pads], constant_values=fill)
    spatial = tuple(range(2, 2 + axes))
    windows = np.lib.stride_tricks.sliding_window_view(x, extent, axis=spatial)
    index = [slice(None)] * 2 + [slice(None, None, s) for s in strides]
    return windows[tuple(index + [slice(None, None, d) for d in dilations])]


def max_pool(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Largest value of each window; padding does not count."""
    x, kernel = inputs[0], list(attributes["kernel_shape"])
    least = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    windows = _windows(x, kernel, attributes, least)
    return (windows.max(axis=tuple(range(-len(kernel), 0))),)


def average_pool(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Mean of each window, with or without the padding in it."""
    x, kernel = inputs[0], list(attributes["kernel_shape"])
    over = tuple(range(-len(kernel), 0))
    total = _windows(x, kernel, attributes, 0).sum(axis=over)
    if attributes.get("count_include_pad", 0):
        return (total / math.prod(kernel),)
    return ((total / _windows(np.ones_like(x), kernel, attributes, 0).sum(axis=over)),)


def _padding(
    x: Array, extent: Sequence[int], strides: Sequence[int], attributes: Attributes
) -> list[tuple[int, int]]:
    mode = attributes.get("auto_pad", "NOTSET")
    axes = len(extent)
    if mode in {"NOTSET", "VALID"}:
        pads = list(attributes.get("pads") or [0] * (2 * axes)) if mode == "NOTSET" else None
        return [(pads[i], pads[i + axes]) if pads else (0, 0) for i in range(axes)]
    result = []
    for n, e, s in zip(x.shape[2:], extent, strides, strict=True):
        total = max((-(-n // s) - 1) * s + e - n, 0)
        small, large = total // 2, total - total // 2
        result.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return result


def gather_elements(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Y[i, j] = X[index[i, j], j] for axis 0, and so on (``onnx.reference`` fails on axis 1)."""
    x, index = inputs[0], inputs[1]
    axis = int(attributes.get("axis", 0)) % x.ndim
    corner = tuple(slice(None if a == axis else n) for a, n in enumerate(index.shape))
    return (np.take_along_axis(x[corner], np.where(index < 0, index + x.shape[axis], index), axis),)


def slice_op(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """X[start:end:step] along some axes, with the bounds of ONNX Slice-13.

    Going backwards, ONNX starts at the first element where ``start`` lies before it; numpy, and
    ``onnx.reference`` with it, gives nothing then.
    """
    x = inputs[0]
    if len(inputs) == 1:  # attributes, before opset 10
        starts, ends = attributes["starts"], attributes["ends"]
        axes, steps = attributes.get("axes", range(len(starts))), [1] * len(starts)
    else:
        starts, ends = (np.reshape(value, -1).tolist() for value in inputs[1:3])
        given = [optional_input(inputs, index) for index in (3, 4)]
        axes = range(len(starts)) if given[0] is None else np.reshape(given[0], -1).tolist()
        steps = [1] * len(starts) if given[1] is None else np.reshape(given[1], -1).tolist()
    key = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        outside = step < 0 and start < -x.shape[axis] < 0
        key[axis] = slice(0 if outside else start, end, step)
    return (x[tuple(key)],)


#: Operators of the default domain; all opset versions in which they exist mean the same.
OPERATORS: dict[str, Operator] = {
    "Attention": attention,
    "AveragePool": average_pool,
    "Conv": conv,
    "DequantizeLinear": dequantize_linear,
    "Erf": erf_op,
    "GatherElements": gather_elements,
    "Gelu": gelu,
    "LayerNormalization": layer_normalization,
    "MatMul": matmul,
    "MaxPool": max_pool,
    "QuantizeLinear": quantize_linear,
    "RMSNormalization": rms_normalization,
    "RotaryEmbedding": rotary_embedding,
    "Slice": slice_op,
}
