"""Builds small canonical encoders with a fixed number of tokens, as vision models have it.

The layers are those of ``decoders``; only the way in, the mask and the head are others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer.conformance.decoders import Config, Writer, write_layer, write_norm

_STYLE: dict[str, Any] = {
    "kv_heads": 4, "rotary": False, "gated": False, "activation": "gelu", "norm": "layer",
    "bias": True, "layers": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Encoder:
    """Way in and head of an encoder.

    Attributes:
        patches: Tokens of data: input ``patches`` [batch, patches, 12].
        special: Learned tokens in front of them.
        head: "class": a linear layer on the first token; "mean": on the mean of all tokens;
            "dense": on each token; "hidden": the class head, and the stream itself as an output.
        mask: None; "open": a mask computed from shapes that hides nothing; "padding": from the
            input ``attention_mask`` [batch, patches + special].
        classes: Outputs of the head.
    """

    patches: int = 12
    special: int = 1
    head: str = "class"
    mask: str | None = None
    classes: int = 5

    @property
    def count(self) -> int:
        """Tokens in all."""
        return self.patches + self.special


def build_encoder(encoder: Encoder | None = None, **style: Any) -> ir.Model:
    """Build a canonical encoder with output ``logits``; ``style`` as in ``decoders.Config``."""
    e, c = encoder or Encoder(), Config(**(_STYLE | style))
    w, rng = Writer(), np.random.default_rng(c.seed)
    patches = _input("patches", ir.DataType.FLOAT, ["batch", e.patches, 12])
    inputs = [patches]
    if e.mask == "padding":
        inputs.append(_input("attention_mask", ir.DataType.INT64, ["batch", e.count]))
    weight = rng.normal(0, 12**-0.5, (12, c.hidden)).astype(np.float32)
    x = w.op("MatMul", [patches, w.const("embedding.weight", weight)])
    x = _with_special(w, e, c, x, patches, rng)
    place = rng.normal(0, 0.3, (1, e.count, c.hidden)).astype(np.float32)
    x = w.op("Add", [x, w.const("position", place)], "stream.0")
    mask = _mask(w, e, inputs)
    for index in range(c.layers):
        x = write_layer(w, c, index, x, mask)
    outputs = _head(w, e, c, x, rng)
    graph = ir.Graph(
        inputs, outputs, nodes=w.nodes, initializers=list(w.initializers.values()),
        opset_imports={"": 23}, name="main_graph",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10, producer_name="tests")


def encoder_feed(encoder: Encoder, batch: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    """Random inputs; where there is a padding mask, row i hides its last 2i + 1 tokens."""
    rng = np.random.default_rng(seed)
    result: dict[str, np.ndarray] = {}
    result["patches"] = rng.normal(0, 1, (batch, encoder.patches, 12)).astype(np.float32)
    if encoder.mask == "padding":
        valid = np.ones((batch, encoder.count), np.int64)
        for row in range(batch):
            valid[row, encoder.count - 2 * row - 1 :] = 0
        result["attention_mask"] = valid
    return result


def _input(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _with_special(
    w: Writer, e: Encoder, c: Config, x: ir.Value, patches: ir.Value, rng: np.random.Generator
) -> ir.Value:
    if not e.special:
        return x
    tokens = rng.normal(0, 1, (1, e.special, c.hidden)).astype(np.float32)
    batch = w.op("Shape", [patches], start=0, end=1)
    ones = w.const("one_one", np.array([1, 1], np.int64))
    shape = w.op("Concat", [batch, ones], axis=0)
    expanded = w.op("Expand", [w.const("special", tokens), shape])
    return w.op("Concat", [expanded, x], axis=1)


def _mask(w: Writer, e: Encoder, inputs: list[ir.Value]) -> ir.Value | None:
    if e.mask is None:
        return None
    if e.mask == "padding":
        valid = w.op("Cast", [inputs[1]], to=ir.DataType.BOOL.value)
        return w.op("Unsqueeze", [valid, w.const("axes_12", np.array([1, 2], np.int64))], "mask")
    batch = w.op("Shape", [inputs[0]], start=0, end=1)
    sizes = w.const("mask_sizes", np.array([1, e.count, e.count], np.int64))
    shape = w.op("Concat", [batch, sizes], axis=0)
    return w.op("Expand", [w.const("true", np.array(1, np.bool_)), shape], "mask")


def _head(
    w: Writer, e: Encoder, c: Config, x: ir.Value, rng: np.random.Generator
) -> list[ir.Value]:
    final = write_norm(w, c, x)
    outputs = [final] if e.head == "hidden" else []
    if e.head in ("class", "hidden"):
        taken = w.op("Gather", [final, w.const("first", np.array(0, np.int64))], axis=1)
    elif e.head == "mean":
        axes = w.const("axes_1", np.array([1], np.int64))
        taken = w.op("ReduceMean", [final, axes], keepdims=0)
    else:
        taken = final
    weight = rng.normal(0, c.hidden**-0.5, (c.hidden, e.classes)).astype(np.float32)
    logits = w.op("MatMul", [taken, w.const("head.weight", weight)], "logits")
    outputs.insert(0, logits)
    for value, size in zip(outputs, (e.classes, c.hidden), strict=False):
        tokens = [] if value is logits and e.head != "dense" else [e.count]
        value.type, value.shape = (
            ir.TensorType(ir.DataType.FLOAT),
            ir.Shape(["batch", *tokens, size]),
        )
    return outputs
