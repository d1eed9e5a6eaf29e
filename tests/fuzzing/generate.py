"""One random model: inputs, a mix of motifs, outputs."""

from __future__ import annotations

import random
from collections.abc import Callable

import onnx
from fuzzing import attention, contrib, layers, layouts, others
from fuzzing.graphs import Writer
from fuzzing.values import BOOL, EMPTY, FLOAT, INT64, ORDINARY, Case

#: Motif -> how often it is drawn, relative to the others.
MOTIFS: dict[Callable[[Writer], None], int] = {
    layers.binary: 10,
    layers.unary: 6,
    layers.linear: 8,
    layers.norm: 8,
    layers.activation: 7,
    layers.residual: 5,
    layers.dynamic_tanh: 3,
    layers.packed: 6,
    attention.attention: 14,
    attention.rotary: 3,
    layouts.transpose: 6,
    layouts.reshape: 10,
    layouts.arithmetic: 6,
    layouts.dims: 4,
    layouts.part: 6,
    layouts.expand: 4,
    layouts.casts: 3,
    layouts.grid: 2,
    others.reduction: 3,
    others.selection: 4,
    others.quantized: 4,
    others.integer_product: 3,
    others.branch: 3,
    others.loop: 2,
    contrib.fused: 8,
    contrib.embeddings: 2,
    contrib.taken_apart: 2,
    others.lookup: 3,
    others.twice: 5,
    others.constants: 5,
    others.attribute_constant: 2,
    others.ordered: 2,
    others.stack: 4,
}
_OPSETS = (7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24)
_COMMON = (13, 17, 18, 20, 23)


def make_case(r: random.Random) -> Case:
    """A random valid model with a feed for each assignment of its dimensions."""
    opset = _COMMON[r.randrange(5)] if r.randrange(100) < 60 else _OPSETS[r.randrange(18)]
    kinds = [FLOAT] * 17 + [onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16]
    if opset >= 13:
        kinds.append(onnx.TensorProto.BFLOAT16)
    w = Writer(
        r,
        opset,
        kinds[r.randrange(len(kinds))],
        dict(EMPTY if r.randrange(100) < 25 else ORDINARY),
        rng_seed=r.randrange(2**31),
    )
    width = w.pick([4, 4, 6, 8, 1, 3, 2])
    w.input(["B", "S", width])
    if w.chance(50):
        w.input(
            w.pick(
                [
                    ["B", width],
                    [width],
                    ["S", width],
                    ["B", 2, "S", 4],
                    ["B", 1, width],
                    [1, "S", width],
                ]
            )
        )
    if w.chance(40):
        w.input(["B", "S"], INT64, "input_ids")
    if w.chance(20):
        w.input(w.pick([["B", "S", 1], ["S", "S"], []]), BOOL)
    motifs, weights = zip(*MOTIFS.items(), strict=True)
    for _ in range(w.r.randrange(1, 7)):
        total = w.r.randrange(sum(weights))
        for motif, weight in zip(motifs, weights, strict=True):
            total -= weight
            if total < 0:
                motif(w)
                break
    outputs = w.graph_outputs(w.r.randrange(3))
    if not outputs:
        outputs = [w.op("Identity", w.scope[0])]
    model = w.model(outputs, declare=85)
    return Case(model, [w.feed(n) for n in range(w.feeds) if n not in w.degenerate])
