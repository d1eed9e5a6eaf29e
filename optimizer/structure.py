"""Read-only views of the transformer structure of a canonical graph.

``optimizer.blocks.find_blocks`` builds them. Views hold references to live ``onnx_ir`` nodes and
values: after a rewrite, ask again.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir


class NormKind(enum.Enum):
    """What stands in the place of a norm.

    LAYER, RMS: LayerNormalization or RMSNormalization over the last axis.
    TANH: dynamic tanh, ``scale * tanh(alpha * x) + bias`` (Zhu et al., 2025, arXiv 2503.10622,
        eq. 1): no statistics, so it works element by element.
    """

    LAYER = "layer"
    RMS = "rms"
    TANH = "dynamic tanh"


class Style(enum.Enum):
    """Where the norms and residual adds of a block sit.

    PRE_NORM:  h = x + attn(n1(x)); y = h + mlp(n2(h))
    POST_NORM: h = n1(x + attn(x)); y = n2(h + mlp(h))
    PARALLEL:  y = x + attn(n1(x)) + mlp(n2(x)), n2 may be n1
    """

    PRE_NORM = "pre-norm"
    POST_NORM = "post-norm"
    PARALLEL = "parallel"


@dataclass(frozen=True)
class Linear:
    """``output = input @ weight (+ bias)`` with a constant weight.

    An int8 layer reaches further than its product: ``input`` is what is read before anything is
    scaled, shifted or rounded, ``output`` is what has been multiplied back, with the bias (see
    ``optimizer.quantized_parts``). Its numbers are not those of the equation above: ``weight`` and
    ``bias`` go with the scaled input, not with ``input``. Blocks with such layers carry the extra
    "quantized weights"; who rewrites weights must refuse them.

    Attributes:
        matmul: The MatMul node.
        add: The Add node of the bias, or None.
        input: [..., K]; the MatMul's first operand unless the layer is an int8 one.
        weight: Initializer [K, N], or a DequantizeLinear's result for one.
        bias: Initializer [N], or None.
        output: [..., N]; the Add's output where there is a bias.
    """

    matmul: ir.Node
    add: ir.Node | None
    input: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    output: ir.Value


class Slot(NamedTuple):
    """One input of one node: where a value is read and may be replaced."""

    node: ir.Node
    position: int


@dataclass(frozen=True)
class Norm:
    """A normalization over the last axis, of one node or (dynamic tanh) of several.

    Attributes:
        node: The normalization itself; of a dynamic tanh the Mul by alpha, or the Tanh where alpha
            is 1 and the Mul is left out.
        scale: Initializer [D] (gamma).
        bias: Initializer [D] (beta), or None (always None for RMS).
        epsilon: Added to the variance or mean square; 0 for a dynamic tanh, which has neither.
        reads: Where ``input`` is read: by ``node``, or by the Cast before a norm in a wider type,
            whose ``output`` then is that of the Cast back.
        scale_slot: Where ``scale`` is read; nothing but this norm's output depends on it.
        bias_slot: The same for ``bias``. The slot of a LayerNormalization without bias lies past
            its inputs. None: the norm cannot take a bias without one more node.
        alpha: What a dynamic tanh multiplies its input by; 1 for the others.
    """

    node: ir.Node
    kind: NormKind
    input: ir.Value
    scale: ir.Value
    bias: ir.Value | None
    output: ir.Value
    epsilon: float
    reads: Slot
    scale_slot: Slot
    bias_slot: Slot | None
    alpha: float = 1.0

    @property
    def source(self) -> ir.Value:
        """What the norm reads now: another value than ``input`` where a rewrite has replaced it."""
        value = self.reads.node.inputs[self.reads.position]
        assert value is not None  # noqa: S101  (a norm has an input)
        return value


@dataclass(frozen=True)
class Attention:
    """One canonical Attention node, or one GroupQueryAttention, with its projections.

    Attributes:
        node: Attention (opset 23, 3-D form): Q [B,S,H*c], K/V [B,S,Hkv*c], optional mask,
            optional past key/value [B,Hkv,P,c]; outputs Y [B,S,H*c], optional present key/value.
        q, k, v, o: The projections; ``o.input`` is the node's output.
        q_rotary, k_rotary: RotaryEmbedding nodes between projection and Attention, or None; a
            GroupQueryAttention that turns them itself.
        q_norm, k_norm: Per-head norms on query and key (QK-norm), or None.
        heads, kv_heads, head_dim: H, Hkv, c.
        mask: Attention mask value, or None.
        is_causal: The node's own causal flag.
        past_key, past_value, present_key, present_value: KV cache, or None.
        repeats: How often an exporter repeats each head of keys and values before they are cached;
            ``kv_heads`` counts them after that.
    """

    node: ir.Node
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_rotary: ir.Node | None
    k_rotary: ir.Node | None
    q_norm: Norm | None
    k_norm: Norm | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    mask: ir.Value | None
    is_causal: bool
    past_key: ir.Value | None
    past_value: ir.Value | None
    present_key: ir.Value | None
    present_value: ir.Value | None
    repeats: int = 1


@dataclass(frozen=True)
class Mlp:
    """A plain or gated MLP.

    plain: down(act(up(x))); gated: down(act(gate(x)) * up(x)).

    Attributes:
        activation: "gelu", "gelu-tanh", "silu", "quick-gelu", "relu", "tanh", ... (op type in
            lower case for anything else).
        inner: The nodes between the first projections' outputs and ``down.input``, in order.
    """

    up: Linear
    gate: Linear | None
    down: Linear
    activation: str
    inner: tuple[ir.Node, ...]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the place of an MLP: a router chooses, per token, what computes it.

    Attributes:
        input: What router and experts read: the output of a norm.
        output: Their weighted sum, before the residual add.
        nodes: Everything between the two, unordered.
    """

    input: ir.Value
    output: ir.Value
    nodes: frozenset[ir.Node]


@dataclass(frozen=True)
class CrossAttention:
    """The attention of a decoder layer to what an encoder gave.

    Attributes:
        node: Attention in 3-D form.
        norm: Before the query (pre-norm), or after the sum (post-norm).
        q, o: The projections of query and result.
        k, v: The projections of keys and values; None where a complete cache holds them.
        heads, kv_heads, head_dim: H, Hkv, c.
        add: The residual add.
        output: The stream after it, and after the norm in a post-norm layer.
    """

    node: ir.Node
    norm: Norm
    q: Linear
    k: Linear | None
    v: Linear | None
    o: Linear
    heads: int
    kv_heads: int
    head_dim: int
    add: ir.Node
    output: ir.Value


@dataclass(frozen=True)
class Block:
    """One transformer layer.

    Attributes:
        index: 0-based, in residual-stream order.
        input: The residual stream [B, S, D] entering the block.
        hidden: The stream between attention and MLP (the value the MLP's norm reads for pre-norm,
            the first norm's output for post-norm), None for parallel blocks.
        output: The stream leaving the block.
        attention_norm, mlp_norm: The norms n1 and n2 of ``Style``; equal for one-norm parallel
            blocks.
        attention_add, mlp_add: The add that the attention's and the MLP's result reaches first; one
            and the same for a parallel block x + (attn + mlp).
        cross: The attention to an encoder's output between attention and MLP, or None.
        extras: Anything not plain, as reasons a pass can print: "norm after attention",
            "layer scale", "mixture of experts", "cross-attention", "residual scale", ...
    """

    index: int
    style: Style
    input: ir.Value
    hidden: ir.Value | None
    output: ir.Value
    attention_norm: Norm
    mlp_norm: Norm
    attention: Attention
    mlp: Mlp | Experts
    attention_add: ir.Node
    mlp_add: ir.Node
    cross: CrossAttention | None = None
    extras: tuple[str, ...] = ()

    @property
    def dense(self) -> Mlp:
        """The MLP of a block without experts; who asks has looked at ``mlp`` or ``extras``.

        Raises:
            ValueError: The block has experts.
        """
        if isinstance(self.mlp, Experts):
            msg = f"layer {self.index} is a mixture of experts"
            raise ValueError(msg)  # noqa: TRY004 - not a matter of the argument's type
        return self.mlp

    @property
    def hidden_size(self) -> int:
        """D, the width of the residual stream."""
        weight = self.attention.o.weight
        node = weight.producer()
        stored = weight if node is None else node.inputs[0]  # dequantized weights
        return int(stored.shape[1])  # type: ignore[union-attr,index,arg-type]


@dataclass(frozen=True)
class Structure:
    """What was found in a model.

    Attributes:
        blocks: In residual-stream order; empty for a model without recognised blocks.
        misses: Attention or MLP candidates that did not become a block: (node name, reason).
    """

    blocks: tuple[Block, ...]
    misses: tuple[tuple[str, str], ...] = ()
