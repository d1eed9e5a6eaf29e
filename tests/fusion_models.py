"""Small models of images and text in one graph, and what they compute, in float64.

The image tower is that of ``build_encoder``. "crossed": a text layer attends to the image tokens.
"joined": the image tokens, without the class token, pass a projector and stand before or inside of
a text that a causal layer with rotary embeddings reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import token_reference as reference

from optimizer.conformance.decoders import Writer
from optimizer.conformance.encoders import Encoder, build_encoder, encoder_feed

HIDDEN, HEADS, SIZE, ANSWERS = 32, 4, 8, 5
ENCODER = Encoder(patches=12, head="hidden")


@dataclass(frozen=True)
class Fusion:
    """A text part.

    Attributes:
        kind: "crossed" or "joined".
        prompt: Text stands in front of the image, too.
        causal: "mask": a bool mask; "flag": the attribute; for "joined".
        positions: "rotary", or "learned": a table is added.
        cached: The keys are an output.
    """

    kind: str
    prompt: bool = False
    causal: str = "mask"
    positions: str = "rotary"
    cached: bool = False


def build_fusion(fusion: Fusion) -> ir.Model:
    """The tower, and output ``answer`` [batch, rows, 5]."""
    model = build_encoder(ENCODER)
    graph = model.graph
    final = graph.outputs[1]
    del graph.outputs[1]
    final.shape = None
    w = Writer(count=1000)
    names = ["prompt", "text"] if fusion.prompt else ["text"]
    texts = [_input(name, ["batch", name, HIDDEN]) for name in names]
    graph.inputs.extend(texts)
    answer = _crossed(w, final, texts[-1]) if fusion.kind == "crossed" else None
    if answer is None:
        answer, keys = _joined(w, fusion, final, texts)
        if fusion.cached:
            graph.outputs.append(_typed(keys, 4))
    graph.extend(w.nodes)
    for value in w.initializers.values():
        graph.register_initializer(value)
    graph.outputs.insert(0, _typed(answer, 3))
    return model


def _typed(value: ir.Value, rank: int) -> ir.Value:
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None] * rank)
    return value


def _input(name: str, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def weights() -> dict[str, np.ndarray]:
    """Of the text part."""
    rng = np.random.default_rng(5)
    made = {
        name: rng.normal(0, HIDDEN**-0.5, (HIDDEN, HIDDEN))
        for name in ("project", "tq", "tk", "tv", "to")
    }
    made["answer"] = rng.normal(0, HIDDEN**-0.5, (HIDDEN, ANSWERS))
    made["places"] = rng.normal(0, 0.5, (64, HIDDEN))
    return {name: array.astype(np.float32) for name, array in made.items()}


def _linear(w: Writer, x: ir.Value, name: str) -> ir.Value:
    return w.op("MatMul", [x, w.const(f"text.{name}", weights()[name])])


def _ints(w: Writer, *numbers: int) -> ir.Value:
    return w.const("ints_" + "_".join(map(str, numbers)), np.array(numbers, np.int64))


def _attention(w: Writer, q: ir.Value, k: ir.Value, v: ir.Value, *mask: ir.Value, causal: int = 0,
               outputs: int = 1) -> list[ir.Value]:  # fmt: skip
    names = [f"text_attention.{i}" for i in range(outputs)]
    return w.node(
        "Attention", [q, k, v, *mask], names, q_num_heads=HEADS, kv_num_heads=HEADS,
        scale=SIZE**-0.5, is_causal=causal,
    )  # fmt: skip


def _crossed(w: Writer, image: ir.Value, text: ir.Value) -> ir.Value:
    q, k, v = _linear(w, text, "tq"), _linear(w, image, "tk"), _linear(w, image, "tv")
    a = _attention(w, q, k, v)[0]
    h = w.op("Add", [text, _linear(w, a, "to")])
    return w.op("MatMul", [h, w.const("text.answer", weights()["answer"])], "answer")


def _joined(
    w: Writer, fusion: Fusion, image: ir.Value, texts: list[ir.Value]
) -> tuple[ir.Value, ir.Value]:
    end = _ints(w, 2**63 - 1)
    patches = w.op("Slice", [image, _ints(w, 1), end, _ints(w, 1)])
    projected = w.op("Gelu", [_linear(w, patches, "project")])
    x = w.op("Concat", [*texts[:-1], projected, texts[-1]], "sequence", axis=1)
    count = _ints(w, ENCODER.patches)
    for text in texts:
        count = w.op("Add", [count, w.op("Shape", [text], start=1, end=2)])
    zero, one = (w.const(n, np.array(v, np.int64)) for n, v in (("zero_", 0), ("one_", 1)))
    places = w.op("Range", [zero, w.op("Squeeze", [count]), one])
    if fusion.positions == "learned":
        table = w.const("text.places", weights()["places"])
        x = w.op("Add", [x, w.op("Gather", [table, places], axis=0)])
    q, k, v = (_linear(w, x, name) for name in ("tq", "tk", "tv"))
    if fusion.positions == "rotary":
        tables = _rotary(w, places, texts[-1])
        q, k = (w.op("RotaryEmbedding", [a, *tables], num_heads=HEADS) for a in (q, k))
    column = w.op("Unsqueeze", [places, _ints(w, 1)])
    mask = [w.op("LessOrEqual", [places, column])] if fusion.causal == "mask" else []
    for value in mask:
        value.type = ir.TensorType(ir.DataType.BOOL)
    flag, outputs = int(fusion.causal == "flag"), 2 if fusion.cached else 1
    a, *keys = _attention(w, q, k, v, *mask, causal=flag, outputs=outputs)
    h = w.op("Add", [x, _linear(w, a, "to")])
    answer = w.op("MatMul", [h, w.const("text.answer", weights()["answer"])], "answer")
    return answer, keys[0] if keys else answer


def _rotary(w: Writer, places: ir.Value, text: ir.Value) -> list[ir.Value]:
    numbers = w.op("Cast", [places], to=ir.DataType.FLOAT.value)
    column = w.op("Unsqueeze", [numbers, _ints(w, 1)])
    inverse = (10000.0 ** (-np.arange(0, SIZE, 2) / SIZE)).astype(np.float32)
    angles = w.op("Mul", [column, w.const("inverse", inverse)])
    batch = w.op("Shape", [text], start=0, end=1)
    shape = w.op("Concat", [batch, _ints(w, 1, 1)], axis=0)
    return [w.op("Expand", [w.op(name, [angles]), shape]) for name in ("Cos", "Sin")]


def fusion_feed(fusion: Fusion, batch: int = 2) -> dict[str, np.ndarray]:
    """Random images and texts: a prompt of three tokens, a text of four."""
    rng, feed = np.random.default_rng(7), encoder_feed(ENCODER, batch)
    for name, size in (("prompt", 3), ("text", 4)):
        if name == "text" or fusion.prompt:
            feed[name] = rng.normal(0, 1, (batch, size, HIDDEN)).astype(np.float32)
    return feed


def answers(
    fusion: Fusion,
    feed: dict[str, np.ndarray],
    removed: tuple[int, ...],
    method: reference.Method,
    *,
    proportional: bool = True,
) -> np.ndarray:
    """``answer`` with fewer image tokens, every one of which is given back at the end."""
    found = reference.run_encoder(
        ENCODER, feed, removed, [0], method, proportional=proportional
    )  # fmt: skip
    w = {name: array.astype(np.float64) for name, array in weights().items()}
    rows = []
    for index in range(len(feed["text"])):
        row = {name: array[index].astype(np.float64) for name, array in found.items()}
        texts = [feed[n][index].astype(np.float64) for n in ("prompt", "text") if n in feed]
        sizes = row["sizes"] if proportional else np.ones_like(row["sizes"])
        compute = _crossed_row if fusion.kind == "crossed" else _joined_row
        rows.append(compute(fusion, w, row, sizes, texts))
    return np.stack(rows)


Row = dict[str, np.ndarray]


def _crossed_row(_: Fusion, w: Row, row: Row, sizes: np.ndarray, texts: list[Any]) -> np.ndarray:
    text, image = texts[-1], row["final"]
    a = reference.attention(text @ w["tq"], image @ w["tk"], image @ w["tv"], HEADS, sizes)
    return (text + a @ w["to"]) @ w["answer"]


def _joined_row(
    fusion: Fusion, w: Row, row: Row, sizes: np.ndarray, texts: list[Any]
) -> np.ndarray:
    kept = np.flatnonzero(row["origins"] != 0)  # all but the class token
    image = reference.gelu(row["final"][kept] @ w["project"])
    before, behind = (texts[0], texts[1]) if fusion.prompt else (texts[0][:0], texts[0])
    start, end = len(before), len(before) + ENCODER.patches
    places = np.concatenate(
        [np.arange(start), start + row["origins"][kept] - 1, end + np.arange(len(behind))]
    ).astype(int)
    counts = np.concatenate([np.ones(start), sizes[kept], np.ones(len(behind))])
    x = np.concatenate([before, image, behind])
    if fusion.positions == "learned":
        x = x + w["places"][places]
    q, k, v = (x @ w[name] for name in ("tq", "tk", "tv"))
    if fusion.positions == "rotary":
        q, k = _turned(q, places), _turned(k, places)
    a = np.empty_like(v)
    for i, place in enumerate(places):
        seen = places <= place
        a[i] = reference.attention(q[[i]], k[seen], v[seen], HEADS, counts[seen])[0]
    answer = (x + a @ w["to"]) @ w["answer"]
    # Every original token gets the answer of the one it is in.
    rows = {original: number for number, original in enumerate(kept)}
    inside = [start + rows[place] for place in row["places"][1:].astype(int)]
    ends = range(len(answer) - len(behind), len(answer))
    return answer[[*range(start), *inside, *ends]]


def _turned(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Rotary embedding, halves (Su et al., arXiv 2104.09864, eq. 34)."""
    angles = places[:, None, None] * 10000.0 ** (-np.arange(0, SIZE, 2) / SIZE)
    first, second = np.split(x.reshape(len(x), HEADS, SIZE), 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).reshape(x.shape)
