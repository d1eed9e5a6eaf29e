"""Operators of ONNX Runtime's own domain in numpy, in whatever precision their inputs have.

They are the oracle for models that ONNX Runtime's tools have fused. Formulas: its operator
documentation (``ContribOperators``), checked against ONNX Runtime's CPU kernels.
"""

from __future__ import annotations

import numpy as np

from optimizer.runners.numpy_ops import (
    Array,
    Arrays,
    Attributes,
    Operator,
    attention,
    conv,
    gelu,
    layer_normalization,
    matmul_integer_to_float,
    optional_input,
    rms_normalization,
    rotary_embedding,
)

#: What a masked score gets added where a node does not say.
_FILTER = -10000.0


def bias_gelu(inputs: Arrays, _: Attributes) -> tuple[Array, ...]:
    """GELU of A + B."""
    return gelu([inputs[0] + inputs[1]], {})


def fast_gelu(inputs: Arrays, _: Attributes) -> tuple[Array, ...]:
    """GELU of X + bias by its tanh approximation."""
    bias = optional_input(inputs, 1)
    x = inputs[0] if bias is None else inputs[0] + bias
    return gelu([x], {"approximate": "tanh"})


def quick_gelu(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """X * sigmoid(alpha X)."""
    x, alpha = inputs[0], float(attributes.get("alpha", 1.702))
    return ((x / (1 + np.exp(-alpha * x))).astype(x.dtype),)


def skip_layer_normalization(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Layer norm of input + skip + bias; also mean, inverse deviation and the sum."""
    total = _skip_sum(inputs, 4)
    beta = optional_input(inputs, 3)
    given = {"epsilon": float(attributes.get("epsilon", 1e-12))}
    return *layer_normalization([total, inputs[2], beta], given), total


def skip_simplified(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """RMS norm of input + skip + bias; the fourth output is the sum."""
    total = _skip_sum(inputs, 3)
    given = {"epsilon": float(attributes.get("epsilon", 1e-12))}
    y = rms_normalization([total, inputs[2]], given)[0]
    return y, np.zeros(0), np.zeros(0), total


def _skip_sum(inputs: Arrays, bias_index: int) -> Array:
    bias = optional_input(inputs, bias_index)
    total: Array = inputs[0] + inputs[1]
    return total if bias is None else total + bias


def fused_matmul(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Alpha * A' @ B' with either transposed, also by bringing its first axis before its last."""
    sides = [
        _turned(
            inputs[index],
            last=bool(attributes.get(f"trans{name}", 0)),
            batch=bool(attributes.get(f"transBatch{name}", 0)),
        )
        for index, name in enumerate("AB")
    ]
    y = np.matmul(*sides) * float(attributes.get("alpha", 1.0))
    return (y.astype(inputs[0].dtype),)


def _turned(x: Array, *, last: bool, batch: bool) -> Array:
    order = list(range(x.ndim))
    if batch and x.ndim > 2:
        order = [*range(1, x.ndim - 1), 0, x.ndim - 1]
    if last and x.ndim > 1:
        order[-2:] = order[:-3:-1]
    return x.transpose(order)


def fused_gemm(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Activation of alpha A' B' + beta C."""
    a, b, c = inputs[0], inputs[1], optional_input(inputs, 2)
    a = a.T if attributes.get("transA", 0) else a
    b = b.T if attributes.get("transB", 0) else b
    y = float(attributes.get("alpha", 1.0)) * (a @ b)
    if c is not None:
        y = y + float(attributes.get("beta", 1.0)) * c
    return (_activated(y, attributes).astype(a.dtype),)


def fused_conv(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Activation of conv(X, W) + B + Z."""
    y, added = conv(inputs, attributes)[0], optional_input(inputs, 3)
    return (_activated(y if added is None else y + added, attributes),)


def _activated(x: Array, attributes: Attributes) -> Array:
    """The function named by ``activation``.

    Raises:
        NotImplementedError: It is none of those that ONNX Runtime fuses.
    """
    name = attributes.get("activation", "") or "Identity"
    numbers = [float(n) for n in attributes.get("activation_params", None) or ()]
    single = float(attributes.get("activation_alpha", numbers[0] if numbers else 0.01))
    match name:
        case "Identity":
            return x
        case "Relu":
            return np.asarray(np.maximum(x, 0))
        case "Tanh":
            return np.asarray(np.tanh(x))
        case "Sigmoid":
            return np.asarray(1 / (1 + np.exp(-x)))
        case "LeakyRelu":
            return np.where(x < 0, single * x, x)
        case "Clip" if len(numbers) == 2:
            return np.asarray(np.minimum(np.maximum(x, numbers[0]), numbers[1]))
    msg = f"the activation {name} of a fused operator"
    raise NotImplementedError(msg)


def microsoft_rotary(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Rotary embedding with tables [max, r/2] looked up by position.

    position_ids: [B, S], or [1]: the position of the first token of every row.
    """
    x, positions, cos, sin = inputs[:4]
    length = x.shape[1] if x.ndim == 3 else x.shape[2]
    if positions.ndim == 1:
        positions = np.broadcast_to(positions[0] + np.arange(length), (x.shape[0], length))
    given = dict(attributes)
    if x.ndim == 3 and not given.get("num_heads", 0):
        given["num_heads"] = x.shape[2] // (2 * cos.shape[1])
    return rotary_embedding([x, cos, sin, positions], given)


def multi_head_attention(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Attention over [B, S, H*c] with the biases of its projections; also keys and values."""
    padded = [optional_input(inputs, index) for index in range(8)]
    q, k, v, bias, mask, added, past_key, past_value = padded
    if q is None or k is None or v is None or q.ndim != 3:
        msg = "packed queries, keys and values"
        raise NotImplementedError(msg)
    heads = int(attributes["num_heads"])
    if bias is not None:
        width = q.shape[-1]
        q = q + bias[:width]
        if k.ndim == 3:
            k, v = k + bias[width : 2 * width], v + bias[2 * width :]
    if k.ndim == 4:  # [B, H, T, c], complete
        k, v = (side.transpose(0, 2, 1, 3).reshape(*side.shape[::2], -1) for side in (k, v))
    past = (past_key, past_value)
    return _attend((q, k, v), heads, mask, added, past, attributes)


def microsoft_attention(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Self-attention with the projections of queries, keys and values in one matrix."""
    x, weights, bias = inputs[0], inputs[1], optional_input(inputs, 2)
    mask, past, added = (optional_input(inputs, index) for index in (3, 4, 5))
    heads = int(attributes["num_heads"])
    sizes = list(attributes.get("qkv_hidden_sizes") or [weights.shape[1] // 3] * 3)
    y = x @ weights
    y = y if bias is None else y + bias
    sides = np.split(y, np.cumsum(sizes)[:2], axis=-1)
    caches = (None, None) if past is None else (past[0], past[1])
    y, k, v = _attend((sides[0], sides[1], sides[2]), heads, mask, added, caches, attributes)
    return y, np.stack([k, v])


def _attend(
    sides: tuple[Array, Array, Array],
    heads: int,
    mask: Array | None,
    added: Array | None,
    past: tuple[Array | None, Array | None],
    attributes: Attributes,
) -> tuple[Array, ...]:
    q, k, v = sides
    before = 0 if past[0] is None else past[0].shape[2]
    length, total = q.shape[1], before + k.shape[1]
    bias = np.zeros((1, 1, length, total), q.dtype) if added is None else added
    hidden = float(attributes.get("mask_filter_value", _FILTER))
    if mask is not None:
        bias = bias + np.where(_kept(mask, q.shape[0], length, total), 0.0, hidden)
    if attributes.get("unidirectional", 0):
        seen = np.arange(total)[None] <= np.arange(length)[:, None] + before
        bias = np.where(seen, bias, np.finfo(np.float32).min)
    given = {
        "q_num_heads": heads,
        "kv_num_heads": heads,
        "scale": float(attributes.get("scale", 0.0)) or None,
    }
    return attention([q, k, v, bias, *past], given)


def _kept(mask: Array, batch: int, length: int, total: int) -> Array:
    """True where a key counts, broadcastable to [B, 1, S, T].

    Raises:
        NotImplementedError: The mask is neither of flags nor of lengths per row.
    """
    if mask.shape == (batch, total):
        return mask.astype(bool)[:, None, None]
    if mask.shape == (batch, length, total):
        return mask.astype(bool)[:, None]
    if mask.shape == (batch,):
        kept: Array = np.arange(total)[None] < mask[:, None]
        return kept[:, None, None]
    msg = f"an attention mask of shape {list(mask.shape)}"
    raise NotImplementedError(msg)


def group_query_attention(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Causal attention with grouped heads, whose cache is filled row by row.

    Row b has seqlens_k[b] + 1 tokens in all, those of this step included; they are put after the
    others of their row, wherever the rows of the cache end.

    Raises:
        NotImplementedError: An option beyond rotary embedding, local window and soft cap.
    """
    padded = [optional_input(inputs, index) for index in range(17)]
    options = ("sliding_window_cache", "smooth_softmax", "qk_output", "kv_cache_bit_width")
    if any(v is not None for v in padded[9:]) or any(attributes.get(o, 0) for o in options):
        msg = "positions, biases, or caches of another kind of GroupQueryAttention"
        raise NotImplementedError(msg)
    heads, kv_heads = int(attributes["num_heads"]), int(attributes["kv_num_heads"])
    q, k, v = _grouped_sides(padded[:3], heads, kv_heads)
    lengths = np.asarray(padded[5]).reshape(-1).astype(int) + 1
    total = int(np.asarray(padded[6]).reshape(-1)[0])
    batch, _, step, _ = q.shape
    starts = np.zeros(batch, int) if step == total else lengths - step
    cos, sin = padded[7:9]
    if attributes.get("do_rotary", 0) and cos is not None and sin is not None:
        positions = starts[:, None] + np.arange(step)
        given = {"interleaved": attributes.get("rotary_interleaved", 0)}
        given["rotary_embedding_dim"] = 2 * cos.shape[1]
        q, k = (rotary_embedding([s, cos, sin, positions], given)[0] for s in (q, k))
    rows = [
        _grouped_row(side, old, starts, total) for side, old in ((k, padded[3]), (v, padded[4]))
    ]
    scores = np.arange(total)[None, None]
    here = (starts[:, None] + np.arange(step))[:, :, None]
    window = int(attributes.get("local_window_size", -1))
    seen = scores <= here
    if window > 0:
        seen &= scores > here - window
    bias = np.where(seen, 0.0, -np.inf)[:, None]
    kept = {"scale": attributes.get("scale"), "softcap": attributes.get("softcap")}
    sizes = {"q_num_heads": heads, "kv_num_heads": kv_heads}
    flat = [s.transpose(0, 2, 1, 3).reshape(batch, s.shape[2], -1) for s in (q, *rows)]
    y = attention([*(s[:, :total] for s in flat), bias], {**sizes, **kept})[0]
    return y, *rows


def _grouped_sides(sides: Arrays, heads: int, kv_heads: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values [B, H, S, c], packed in one value or apart."""
    q, k, v = sides
    if k is None or v is None:
        width = q.shape[-1] // (heads + 2 * kv_heads)
        q, k, v = np.split(q, [heads * width, (heads + kv_heads) * width], axis=-1)
    pairs = ((q, heads), (k, kv_heads), (v, kv_heads))
    first, second, third = (
        x.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3) for x, count in pairs
    )
    return first, second, third


def _grouped_row(new: Array, old: Array | None, starts: Array, total: int) -> Array:
    """The cache after this step, [B, Hkv, max(P, T), c]."""
    batch, heads, step, width = new.shape
    held = 0 if old is None else old.shape[2]
    result = np.zeros((batch, heads, max(held, total), width), new.dtype)
    for row, start in enumerate(starts):
        if old is not None:
            result[row, :, :start] = old[row, :, :start]
        result[row, :, start : start + step] = new[row, :, : max(0, result.shape[2] - start)]
    return result


def embed_layer_normalization(inputs: Arrays, attributes: Attributes) -> tuple[Array, ...]:
    """Layer norm of the sum of word, position and segment embeddings; lengths of a mask; sum."""
    ids, segments, words, places, kinds, gamma, beta = inputs[:7]
    mask, positions = optional_input(inputs, 7), optional_input(inputs, 8)
    rows = places[: ids.shape[1]] if positions is None else places[positions]
    total = words[ids] + rows
    if segments is not None:
        total = total + kinds[segments]
    given = {"epsilon": float(attributes.get("epsilon", 1e-12))}
    y = layer_normalization([total, gamma, beta], given)[0]
    lengths = np.zeros(ids.shape[0], np.int32)
    if mask is not None:
        lengths = mask.sum(axis=1).astype(np.int32)
    return y, lengths, total


def dynamic_quantize_matmul(inputs: Arrays, _: Attributes) -> tuple[Array, ...]:
    """(A rounded to 8 bits by its own range) @ (B - b_zero) b_scale + bias."""
    a, b, b_scale = inputs[:3]
    b_zero, bias = optional_input(inputs, 3), optional_input(inputs, 4)
    low, high = min(0.0, float(a.min(initial=0))), max(0.0, float(a.max(initial=0)))
    scale = np.asarray((high - low) / 255 or 1.0, a.dtype)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    codes = np.clip(np.rint(a / scale) + zero, 0, 255)
    return matmul_integer_to_float([codes, b, scale, b_scale, zero, b_zero, bias], {})


#: Operators of the domain ``com.microsoft``.
CONTRIB_OPERATORS: dict[str, Operator] = {
    "Attention": microsoft_attention,
    "BiasGelu": bias_gelu,
    "DynamicQuantizeMatMul": dynamic_quantize_matmul,
    "EmbedLayerNormalization": embed_layer_normalization,
    "FastGelu": fast_gelu,
    "FusedConv": fused_conv,
    "FusedGemm": fused_gemm,
    "FusedMatMul": fused_matmul,
    "Gelu": gelu,
    "GroupQueryAttention": group_query_attention,
    "MatMulIntegerToFloat": matmul_integer_to_float,
    "MultiHeadAttention": multi_head_attention,
    "QuickGelu": quick_gelu,
    "RotaryEmbedding": microsoft_rotary,
    "SkipLayerNormalization": skip_layer_normalization,
    "SkipSimplifiedLayerNormalization": skip_simplified,
}
#: Operators that ONNX Runtime adds to the standard domain.
RUNTIME_OPERATORS: dict[str, Operator] = {"SimplifiedLayerNormalization": rms_normalization}
