"""Token merging in float64, written from the papers and not from the graph code.

ToMe: Bolya et al., arXiv 2210.09461, Appendix D. All of it in loops over tokens, for one row of the
batch at a time, and with groups of tokens kept as lists: sizes are their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


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
