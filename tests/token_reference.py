"""Token reduction in float64, written from the papers and not from the graph code.

ToMe: Bolya et al., arXiv 2210.09461, Section 3. CrossGET: Shi et al., arXiv 2305.17455.
EViT: Liang et al., arXiv 2202.07800. All of it in loops over tokens, for one row of
the batch at a time, and with groups of tokens kept as lists: sizes are their lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import erf

import numpy as np
import onnx_ir as ir

from optimizer.blocks import find_blocks
from optimizer.conformance.encoders import Encoder, build_encoder


@dataclass
class Tokens:
    """Tokens of one row: vectors, and which original tokens each stands for."""

    vectors: list[np.ndarray]
    members: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.vectors = [np.asarray(v, np.float64) for v in self.vectors]
        self.members = self.members or [[i] for i in range(len(self.vectors))]

    @property
    def sizes(self) -> np.ndarray:
        return np.array([len(m) for m in self.members], np.float64)

    def places(self) -> np.ndarray:
        where = {token: row for row, group in enumerate(self.members) for token in group}
        return np.array([where[token] for token in sorted(where)])


def bipartite(tokens: Tokens, metric: np.ndarray, protected: Sequence[int], r: int) -> Tokens:
    """ToMe's matching and merge of ``r`` tokens; ``metric`` [N, c]."""
    unit = np.asarray(metric, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    free = [i for i in range(len(tokens.vectors)) if i not in set(protected)]
    a, b = [i for i in free if i % 2 == 0], [i for i in free if i % 2 == 1]
    edges = []
    for i in a:
        scores = [float(unit[i] @ unit[j]) for j in b]
        j = int(np.argmax(scores))
        edges.append((scores[j], i, b[j]))
    edges.sort(key=lambda edge: -edge[0])
    into = {i: j for _, i, j in edges[:r]}
    rows = [*protected, *(i for i in a if i not in into), *b]
    groups = [[row, *(i for i, j in into.items() if j == row)] for row in rows]
    return joined(tokens, groups)


def joined(tokens: Tokens, groups: Sequence[Sequence[int]]) -> Tokens:
    """One token per group: the mean of all original tokens in it."""
    vectors, members = [], []
    for group in groups:
        weights = [len(tokens.members[i]) for i in group]
        total = sum(w * tokens.vectors[i] for w, i in zip(weights, group, strict=True))
        vectors.append(total / sum(weights))
        members.append([m for i in group for m in tokens.members[i]])
    return Tokens(vectors, members)


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, repeats: Sequence[int] | None = None
) -> np.ndarray:
    """[N, D] attention of one row; key j is there ``repeats[j]`` times."""
    if repeats is not None:
        index = np.repeat(np.arange(len(k)), np.asarray(repeats, int))
        k, v = k[index], v[index]
    size = q.shape[1] // heads
    result = np.empty((len(q), v.shape[1]))
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[:, part] @ k[:, part].T * size**-0.5
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        result[:, part] = weights / weights.sum(axis=1, keepdims=True) @ v[:, part]
    return result


def causal_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, repeats: Sequence[int] | None = None
) -> np.ndarray:
    """The same, of each token to itself and those before."""
    counts = np.ones(len(k), int) if repeats is None else np.asarray(repeats, int)
    rows = [
        attention(q[[i]], k[: i + 1], v[: i + 1], heads, counts[: i + 1])[0] for i in range(len(q))
    ]
    return np.stack(rows)


@dataclass
class Layer:
    """What a method sees of a layer: queries, keys [N, D], heads, and protected tokens."""

    q: np.ndarray
    k: np.ndarray
    heads: int
    protected: list[int]
    sizes: np.ndarray | None
    r: int


#: (tokens behind the attention, layer) -> (fewer tokens, where the protected ones are now)
Method = Callable[[Tokens, Layer], tuple[Tokens, list[int]]]


def tome(tokens: Tokens, layer: Layer) -> tuple[Tokens, list[int]]:
    metric = layer.k.reshape(len(layer.k), layer.heads, -1).mean(axis=1)
    merged = bipartite(tokens, metric, layer.protected, layer.r)
    return merged, list(range(len(layer.protected)))


def crossget(guide: int | None, *, ensemble: bool = False) -> Method:
    """Complete-graph soft matching; ``guide``: which protected token guides."""

    def choose(tokens: Tokens, layer: Layer) -> tuple[Tokens, list[int]]:
        unit = layer.k / np.linalg.norm(layer.k, axis=1, keepdims=True)
        free = [i for i in range(len(unit)) if i not in layer.protected]
        importance = np.zeros(len(unit))
        if guide is not None:
            query = layer.q[layer.protected[guide]]
            importance = unit @ query / np.linalg.norm(query)
        nearest = {i: max(unit[i] @ unit[j] for j in free if j != i) for i in free}
        ranked = sorted(free, key=lambda i: -nearest[i])
        rank = {token: number for number, token in enumerate(ranked)}
        edges = {
            i: max((unit[i] @ unit[j] for j in free if rank[j] > rank[i]), default=-4.0)
            for i in free
        }
        ordered = sorted(free, key=lambda i: importance[i] - edges[i])
        sources = set(ordered[: layer.r])
        others = [i for i in free if i not in sources]
        into = {i: max(others, key=lambda j, i=i: unit[i] @ unit[j]) for i in sources}
        rows = [i for i in range(len(unit)) if i not in sources]
        groups = [[row, *(i for i, j in into.items() if j == row)] for row in rows]
        merged = joined(tokens, groups)
        if ensemble:
            for number, (row, *others_in) in enumerate(groups):
                total = merged.sizes[number] * merged.vectors[number]
                for i in others_in:
                    w = np.exp([importance[i], importance[row]])
                    w /= w.sum()
                    total += (2 * w[0] - 1) * len(tokens.members[i]) * tokens.vectors[i]
                    total += (2 * w[1] - 1) * len(tokens.members[row]) * tokens.vectors[row]
                merged.vectors[number] = total / merged.sizes[number]
        return merged, [rows.index(i) for i in layer.protected]

    return choose


def evit(guide: int | None) -> Method:
    """Attention received, from one protected token or from all tokens; the rest becomes one."""

    def choose(tokens: Tokens, layer: Layer) -> tuple[Tokens, list[int]]:
        size = layer.q.shape[1] // layer.heads
        queries = layer.q if guide is None else layer.q[[layer.protected[guide]]]
        total = np.zeros(len(layer.k))
        for h in range(layer.heads):
            part = slice(h * size, (h + 1) * size)
            scores = queries[:, part] @ layer.k[:, part].T * size**-0.5
            weights = np.exp(scores)
            total += (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0) / layer.heads
        free = [i for i in range(len(total)) if i not in layer.protected]
        ordered = sorted(free, key=lambda i: -total[i])
        stay = len(free) - layer.r - 1
        kept, rest = sorted(ordered[:stay]), ordered[stay:]
        fused = sum(total[i] * tokens.vectors[i] for i in rest) / sum(total[i] for i in rest)
        rows = [*layer.protected, *kept]
        members = [tokens.members[i] for i in rows]
        members.append([m for i in rest for m in tokens.members[i]])
        vectors = [*(tokens.vectors[i] for i in rows), fused]
        return Tokens(vectors, members), list(range(len(layer.protected)))

    return choose


def run_encoder(
    encoder: Encoder,
    feed: dict[str, np.ndarray],
    removed: Sequence[int],
    protected: Sequence[int],
    method: Method,
    *,
    proportional: bool = True,
    cross: np.ndarray | None = None,
    causal: bool = False,
    taken: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """All values of ``build_encoder`` that a test looks at, one row of the batch at a time.

    ``cross`` [layers, D]: a copy of token 0 stands behind the others, and one row is added to it in
    front of each layer. ``causal``: tokens attend to themselves and to those before. ``taken``: a
    position that is protected in each row, in the place of ``protected``.
    """
    model = build_encoder(encoder)
    weights = {n: v.const_value.numpy().astype(float) for n, v in model.graph.initializers.items()}
    rows = [
        _run_row(encoder, patches.astype(np.float64), removed,
                 [taken[row]] if taken else list(protected), method, weights, _biases(model),
                 proportional, cross, causal)
        for row, patches in enumerate(feed["patches"])
    ]  # fmt: skip
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _run_row(
    encoder: Encoder,
    patches: np.ndarray,
    removed: Sequence[int],
    protected: list[int],
    method: Method,
    w: dict[str, np.ndarray],
    biases: dict[str, np.ndarray],
    proportional: bool,
    cross: np.ndarray | None,
    causal: bool,
) -> dict[str, np.ndarray]:
    x = patches @ w["embedding.weight"]
    if encoder.special:
        x = np.concatenate([w["special"][0], x])
    x = x + w["position"][0]
    tokens = Tokens(list(x if cross is None else np.concatenate([x, x[:1]])))
    first, result = list(protected), {}
    for layer, r in enumerate(removed):
        name = f"layers.{layer}"
        if cross is not None:
            tokens.vectors[-1] = tokens.vectors[-1] + cross[layer]
        x = np.stack(tokens.vectors)
        n1 = layer_norm(x, w, f"{name}.norm1")
        q, k, v = (_linear(n1, w, biases, f"{name}.{part}") for part in "qkv")
        sizes = tokens.sizes if proportional else None
        attend = causal_attention if causal else attention
        h = x + _linear(attend(q, k, v, 4, sizes), w, biases, f"{name}.o")
        seen = Layer(q, k, 4, protected, sizes, r)
        tokens, protected = method(Tokens(list(h), tokens.members), seen)
        h = np.stack(tokens.vectors)
        n2 = layer_norm(h, w, f"{name}.norm2")
        inner = gelu(_linear(n2, w, biases, f"{name}.up"))
        y = h + _linear(inner, w, biases, f"{name}.down")
        tokens = Tokens(list(y), tokens.members)
        result |= {f"{name}.norm2.out": n2, f"stream.{layer + 1}": y}
    assert tokens.sizes.sum() == encoder.count + (cross is not None)
    final = layer_norm(np.stack(tokens.vectors), w, "final_norm")
    read = first.index(0) if 0 in first else 0
    result["logits"] = final[protected[read]] @ w["head.weight"]
    result |= {"final": final, "sizes": tokens.sizes, "places": tokens.places()}
    # The token that others went into comes first in its group.
    result["origins"] = np.array([group[0] for group in tokens.members])
    return result


def _linear(
    x: np.ndarray, w: dict[str, np.ndarray], biases: dict[str, np.ndarray], name: str
) -> np.ndarray:
    return x @ w[f"{name}.weight"] + biases[f"{name}.weight"]


def _biases(model: ir.Model) -> dict[str, np.ndarray]:
    found = {}
    for block in find_blocks(model).blocks:
        a = block.attention
        for linear in (a.q, a.k, a.v, a.o, block.dense.up, block.dense.down):
            assert linear.bias is not None
            found[linear.weight.name] = linear.bias.const_value.numpy().astype(float)
    return found


def layer_norm(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return unit * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(erf)(x / 2**0.5))
