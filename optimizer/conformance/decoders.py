"""Builds small canonical transformer models: one function, every style.

The graphs are written node by node in the canonical dialect (optimizer/DESIGN.md), so that the
tests of a pass do not depend on the frontends or on ``canonicalize``. Numbers are random.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class Config:
    """Shape and style of a model; see ``build``."""

    layers: int = 2
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    ffn: tuple[int, ...] | int = 24
    vocab: int = 50
    style: str = "pre-norm"  # "pre-norm" | "post-norm" | "parallel" | "parallel-two-norms"
    norm: str = "rms"  # "rms" | "layer" | "tanh" (dynamic tanh)
    gated: bool = True
    activation: str = "silu"  # "silu" | "gelu" | "gelu-tanh" | "relu" | "quick-gelu"
    bias: bool = False
    rotary: bool = True
    kv_cache: bool = False
    mask: bool = True  # causal and padding mask from attention_mask; False: no mask
    layer_scale: bool = False
    experts: int = 0  # a router sends each token through two of so many MLPs; 0: one MLP for all
    shared_weights: bool = False  # every layer uses layer 0's q projection weight
    epsilon: float = 1e-5
    epsilons: tuple[float, ...] = ()  # per layer, overrides epsilon
    zero_layers: tuple[int, ...] = ()  # layers whose o and down projections are zero
    order: tuple[int, ...] = ()  # weights of position i come from layer order[i]
    hidden_output: int | None = None  # the stream after this layer is also a graph output
    seed: int = 0

    def width(self, layer: int) -> int:
        """FFN width of one layer."""
        return self.ffn if isinstance(self.ffn, int) else self.ffn[layer]


@dataclass
class Writer:
    """Appends nodes and initializers to a graph under construction.

    Attributes:
        nodes: In order.
        initializers: By name.
        count: Of the nodes, for names.
    """

    nodes: list[ir.Node] = field(default_factory=list)
    initializers: dict[str, ir.Value] = field(default_factory=dict)
    count: int = 0

    def const(self, name: str, array: np.ndarray) -> ir.Value:
        """The initializer of a name, made on first use."""
        if name not in self.initializers:
            tensor = ir.tensor(array, name=name)
            self.initializers[name] = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(array.shape),
                const_value=tensor,
            )
        return self.initializers[name]

    def op(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        name: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Append a node with one output, called ``name``."""
        return self.node(op_type, inputs, [name or f"v{self.count + 1}"], **attributes)[0]

    def node(
        self, op_type: str, inputs: list[ir.Value | None], names: list[str], **attributes: Any
    ) -> list[ir.Value]:
        """Append a node with outputs of the given names."""
        self.count += 1
        outputs = [ir.Value(name=n) for n in names]
        self.nodes.append(
            ir.node(
                op_type,
                inputs,
                attributes=attributes,
                outputs=outputs,
                name=f"n{self.count}_{op_type}",
            )
        )
        return outputs


def _input(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def build(config: Config | None = None, **changes: Any) -> ir.Model:
    """Build a canonical causal language model.

    Inputs: input_ids [batch, sequence] int64, attention_mask [batch, total_sequence] int64 (if
    ``mask``), position_ids [batch, sequence] int64 (if ``rotary``), past_key_values.N.key/value
    [batch, kv_heads, past_sequence, head_dim] (if ``kv_cache``).
    Outputs: logits [batch, sequence, vocab], present.N.key/value.
    """
    c = Config(**changes) if config is None else config
    w = Writer()
    cos = sin = mask = None
    inputs, pasts = _inputs(c)
    by_name = {v.name: v for v in inputs}
    outputs: list[ir.Value] = []

    rng = np.random.default_rng(c.seed)
    table = rng.normal(0, 1, (c.vocab, c.hidden)).astype(np.float32)
    x = w.op("Gather", [w.const("embedding.weight", table), inputs[0]], "stream.0", axis=0)
    if c.rotary:
        cos, sin = _rotary_tables(w, c, by_name["position_ids"])
    if c.mask:
        mask = _mask(w, c, by_name, pasts)
    for i in range(c.layers):
        source = c.order[i] if c.order else i
        layer = _Layer(w, c, i, source, cos, sin, mask, pasts[i] if pasts else None)
        x, present = layer.write(x)
        outputs.extend(present)
    final = write_norm(w, c, x)
    head = rng.normal(0, c.hidden**-0.5, (c.hidden, c.vocab)).astype(np.float32)
    logits = w.op("MatMul", [final, w.const("lm_head.weight", head)], "logits")
    logits.type, logits.shape = (
        ir.TensorType(ir.DataType.FLOAT),
        ir.Shape(["batch", "sequence", c.vocab]),
    )
    outputs.insert(0, logits)
    if c.hidden_output is not None:
        name = f"stream.{c.hidden_output + 1}"
        stream = next(v for n in w.nodes for v in n.outputs if v.name == name)
        stream.shape = ir.Shape(["batch", "sequence", c.hidden])
        outputs.append(stream)
    for value in outputs:
        if value.type is None:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=w.nodes,
        initializers=list(w.initializers.values()),
        opset_imports={"": 23},
        name="main_graph",
    )
    return ir.Model(graph, ir_version=10, producer_name="tests")


def _inputs(c: Config) -> tuple[list[ir.Value], list[list[ir.Value]]]:
    """All graph inputs, the token ids first, and per layer those of its cache."""
    inputs = [_input("input_ids", ir.DataType.INT64, ["batch", "sequence"])]
    total = "total_sequence" if c.kv_cache else "sequence"
    if c.mask:
        inputs.append(_input("attention_mask", ir.DataType.INT64, ["batch", total]))
    if c.rotary:
        inputs.append(_input("position_ids", ir.DataType.INT64, ["batch", "sequence"]))
    pasts = []
    for i in range(c.layers if c.kv_cache else 0):
        shape: list[int | str] = ["batch", c.kv_heads, "past_sequence", c.head_dim]
        pasts.append(
            [_input(f"past_key_values.{i}.{t}", ir.DataType.FLOAT, shape) for t in ("key", "value")]
        )
        inputs.extend(pasts[-1])
    return inputs, pasts


def _rotary_tables(w: Writer, c: Config, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
    inv = (10000.0 ** (-np.arange(0, c.head_dim, 2) / c.head_dim)).astype(np.float32)
    p = w.op("Cast", [positions], to=ir.DataType.FLOAT.value)
    p = w.op("Unsqueeze", [p, w.const("axis_last", np.array([-1], np.int64))])
    angle = w.op("Mul", [p, w.const("inv_freq", inv)])
    return w.op("Cos", [angle], "cos"), w.op("Sin", [angle], "sin")


def _mask(
    w: Writer, c: Config, inputs: dict[str | None, ir.Value], pasts: list[list[ir.Value]]
) -> ir.Value:
    """Bool [batch, 1, sequence, total]: causal (bottom-right aligned) and not padding."""
    zero, one = (w.const(n, np.array(v, np.int64)) for n, v in (("zero", 0), ("one", 1)))
    s = w.op("Squeeze", [w.op("Shape", [inputs["input_ids"]], start=1, end=2)])
    # The exporter reads the past length from whichever layer comes to hand; so do we (layer 1).
    past = zero
    if c.kv_cache:
        past = w.op("Squeeze", [w.op("Shape", [pasts[min(1, c.layers - 1)][0]], start=2, end=3)])
    total = w.op("Add", [s, past])
    query = w.op("Add", [w.op("Range", [zero, s, one]), past])
    query = w.op("Unsqueeze", [query, w.const("axis_last", np.array([-1], np.int64))])
    causal = w.op("LessOrEqual", [w.op("Range", [zero, total, one]), query])
    padding = w.op("Cast", [inputs["attention_mask"]], to=ir.DataType.BOOL.value)
    padding = w.op("Unsqueeze", [padding, w.const("axes_12", np.array([1, 2], np.int64))])
    return w.op("And", [causal, padding], "mask")


def _norm(
    w: Writer, c: Config, name: str, x: ir.Value, rng: np.random.Generator, epsilon: float
) -> ir.Value:
    scale = w.const(f"{name}.weight", rng.uniform(0.5, 1.5, c.hidden).astype(np.float32))
    if c.norm == "rms":
        return w.op("RMSNormalization", [x, scale], f"{name}.out", axis=-1, epsilon=epsilon)
    bias = w.const(f"{name}.bias", rng.normal(0, 0.2, c.hidden).astype(np.float32))
    if c.norm == "tanh":
        alpha = w.const(f"{name}.alpha", np.array(rng.uniform(0.2, 0.8), np.float32))
        y = w.op("Tanh", [w.op("Mul", [x, alpha])])
        return w.op("Add", [w.op("Mul", [y, scale]), bias], f"{name}.out")
    return w.op("LayerNormalization", [x, scale, bias], f"{name}.out", axis=-1, epsilon=epsilon)


class _Layer:
    """Writes one transformer layer; ``source`` decides its random weights."""

    def __init__(
        self,
        w: Writer,
        c: Config,
        index: int,
        source: int,
        cos: ir.Value | None,
        sin: ir.Value | None,
        mask: ir.Value | None,
        past: list[ir.Value] | None,
    ) -> None:
        self.w, self.c, self.index, self.source = w, c, index, source
        self.cos, self.sin, self.mask, self.past = cos, sin, mask, past
        self.rng = np.random.default_rng((c.seed, source))
        self.epsilon = c.epsilons[index] if c.epsilons else c.epsilon

    def write(self, x: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        c, w, i = self.c, self.w, self.index
        out = f"stream.{i + 1}"
        if c.style == "post-norm":
            a, present = self.attention(x)
            h = self.norm("norm1", w.op("Add", [x, a]))
            m = w.op("Add", [h, self.mlp(h)])
            y = self.norm("norm2", m)
            y.name = out
            return y, present
        n1 = self.norm("norm1", x)
        a, present = self.attention(n1)
        if c.style == "pre-norm":
            h = w.op("Add", [x, a], f"hidden.{i}")
            return w.op("Add", [h, self.mlp(self.norm("norm2", h))], out), present
        n2 = n1 if c.style == "parallel" else self.norm("norm2", x)
        m = self.mlp(n2)
        return w.op("Add", [w.op("Add", [x, a]), m], out), present

    def norm(self, name: str, x: ir.Value) -> ir.Value:
        return _norm(self.w, self.c, f"layers.{self.index}.{name}", x, self.rng, self.epsilon)

    def linear(self, name: str, x: ir.Value, k: int, n: int, *, zero: bool = False) -> ir.Value:
        w, full = self.w, f"layers.{self.index}.{name}"
        weight = self.rng.normal(0, k**-0.5, (k, n)).astype(np.float32)
        bias = self.rng.normal(0, 0.2, n).astype(np.float32)
        if zero:
            weight, bias = np.zeros_like(weight), np.zeros_like(bias)
        shared = self.c.shared_weights and name == "q"
        y = w.op("MatMul", [x, w.const("shared.q.weight" if shared else f"{full}.weight", weight)])
        return w.op("Add", [y, w.const(f"{full}.bias", bias)]) if self.c.bias else y

    def attention(self, x: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        c, w, i = self.c, self.w, self.index
        q = self.linear("q", x, c.hidden, c.heads * c.head_dim)
        k = self.linear("k", x, c.hidden, c.kv_heads * c.head_dim)
        v = self.linear("v", x, c.hidden, c.kv_heads * c.head_dim)
        if c.rotary:
            q = w.op("RotaryEmbedding", [q, self.cos, self.sin], num_heads=c.heads)
            k = w.op("RotaryEmbedding", [k, self.cos, self.sin], num_heads=c.kv_heads)
        inputs = [q, k, v, self.mask, *(self.past or [])]
        while inputs[-1] is None:
            inputs.pop()
        names = [f"attention.{i}"]
        if self.past:
            names += [f"present.{i}.key", f"present.{i}.value"]
        y, *present = w.node(
            "Attention",
            inputs,
            names,
            q_num_heads=c.heads,
            kv_num_heads=c.kv_heads,
            scale=float(c.head_dim**-0.5),
            is_causal=0,
        )
        for value in present:
            value.shape = ir.Shape(["batch", c.kv_heads, "total_sequence", c.head_dim])
        o = self.linear("o", y, c.heads * c.head_dim, c.hidden, zero=self.source in c.zero_layers)
        return self.scaled("attention", o), present

    def mlp(self, x: ir.Value) -> ir.Value:
        down = self.dense("", x) if not self.c.experts else self.experts(x)
        return self.scaled("mlp", down)

    def dense(self, prefix: str, x: ir.Value) -> ir.Value:
        c, w, f = self.c, self.w, self.c.width(self.source)
        up = self.linear(f"{prefix}up", x, c.hidden, f)
        gate = self.linear(f"{prefix}gate", x, c.hidden, f) if c.gated else up
        act = self.activation(gate)
        inner = w.op("Mul", [act, up]) if c.gated else act
        return self.linear(f"{prefix}down", inner, f, c.hidden, zero=self.source in c.zero_layers)

    def experts(self, x: ir.Value) -> ir.Value:
        """Every expert computes every token, weighted 0 where the router did not choose it."""
        c, w = self.c, self.w
        scores = w.op("Softmax", [self.linear("router", x, c.hidden, c.experts)], axis=-1)
        two = w.const("two", np.array([2], np.int64))
        number = w.count
        best, chosen = w.node("TopK", [scores, two], [f"best{number}", f"chosen{number}"])
        nothing = w.op("Sub", [scores, scores])
        weights = w.op("ScatterElements", [nothing, chosen, best], axis=-1)
        parts = []
        for index in range(c.experts):
            which = w.const(f"expert{index}", np.array([index], np.int64))
            share = w.op("Gather", [weights, which], axis=2)
            parts.append(w.op("Mul", [self.dense(f"{index}.", x), share]))
        total = parts[0]
        for part in parts[1:]:
            total = w.op("Add", [total, part])
        return total

    def activation(self, x: ir.Value) -> ir.Value:
        w = self.w
        match self.c.activation:
            case "silu":
                return w.op("Mul", [x, w.op("Sigmoid", [x])])
            case "quick-gelu":
                factor = w.const("quick_gelu", np.array(1.702, np.float32))
                return w.op("Mul", [x, w.op("Sigmoid", [w.op("Mul", [x, factor])])])
            case "gelu":
                return w.op("Gelu", [x], approximate="none")
            case "gelu-tanh":
                return w.op("Gelu", [x], approximate="tanh")
            case _:
                return w.op("Relu", [x])

    def scaled(self, name: str, x: ir.Value) -> ir.Value:
        if not self.c.layer_scale:
            return x
        gain = self.rng.uniform(0.5, 1.5, self.c.hidden).astype(np.float32)
        return self.w.op("Mul", [x, self.w.const(f"layers.{self.index}.{name}.gain", gain)])


def write_layer(w: Writer, c: Config, index: int, x: ir.Value, mask: ir.Value | None) -> ir.Value:
    """The stream behind one layer without cache or rotary embedding that reads ``x``."""
    return _Layer(w, c, index, index, None, None, mask, None).write(x)[0]


def write_norm(w: Writer, c: Config, x: ir.Value) -> ir.Value:
    """The norm behind the last layer."""
    return _norm(w, c, "final_norm", x, np.random.default_rng(c.seed + 999), c.epsilon)


def feed(
    config: Config,
    batch: int = 2,
    sequence: int = 5,
    past: int = 0,
    *,
    padded: bool = False,
    seed: int = 1,
) -> dict[str, np.ndarray]:
    """Random inputs for a model of ``build``; ``padded`` masks the last two tokens of row 0."""
    rng = np.random.default_rng(seed)
    result = {"input_ids": rng.integers(0, config.vocab, (batch, sequence))}
    total = sequence + (past if config.kv_cache else 0)
    if config.mask:
        result["attention_mask"] = np.ones((batch, total), np.int64)
        if padded:
            result["attention_mask"][0, -2:] = 0
    if config.rotary:
        positions = np.arange(total - sequence, total, dtype=np.int64)
        result["position_ids"] = np.tile(positions, (batch, 1))
    for i in range(config.layers if config.kv_cache else 0):
        for t in ("key", "value"):
            shape = (batch, config.kv_heads, past, config.head_dim)
            result[f"past_key_values.{i}.{t}"] = rng.normal(0, 1, shape).astype(np.float32)
    return result
