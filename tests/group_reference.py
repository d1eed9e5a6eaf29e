"""The definition of a group of layers, written again in numpy float64.

Independent of the package: it reads the weights of a model of ``models.build`` by name and computes
what the model would compute if each group's layers all read the group's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import models
import numpy as np
import onnx_ir as ir


@dataclass
class Definition:
    """Evaluates a model of ``models.build`` with its layers in groups.

    ``groups`` lists the layers of each group in order; a layer alone is a group of one. ``bypass``
    is "symmetric" or the distance d.
    """

    config: models.Config
    model: ir.Model
    groups: Sequence[Sequence[int]]
    bypass: str | int
    present: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = {
            name: np.asarray(value.const_value.numpy(), np.float64)  # type: ignore[union-attr]
            for name, value in self.model.graph.initializers.items()
        }

    def run(self, feed: dict[str, np.ndarray]) -> np.ndarray:
        """Logits; ``present`` then holds keys and values [B, Hkv, T, c] per layer."""
        self.feed, self.present = feed, []
        x = self.weights["embedding.weight"][feed["input_ids"]]
        for group in self.groups:
            x = self.group(x, group)
        epsilon = self.config.epsilon
        return self.norm("final_norm", x, epsilon) @ self.weights["lm_head.weight"]

    def group(self, x: np.ndarray, group: Sequence[int]) -> np.ndarray:
        first = [self.attention(i, self.norm_of(i, "norm1", x)) for i in group]
        if self.config.style.startswith("parallel"):
            second = "norm1" if self.config.style == "parallel" else "norm2"
            return x + sum(
                a + self.mlp(i, self.norm_of(i, second, x))
                for i, a in zip(group, first, strict=True)
            )
        y = x + sum(first)
        for j, i in enumerate(group):
            if self.bypass == "symmetric":
                h = x + sum(first)
            else:
                h = x + sum(first[max(0, j - int(self.bypass)) : j + 1])
            y = y + self.mlp(i, self.norm_of(i, "norm2", h))
        return y

    def norm_of(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        epsilons = self.config.epsilons
        epsilon = epsilons[layer] if epsilons else self.config.epsilon
        return self.norm(f"layers.{layer}.{name}", x, epsilon)

    def norm(self, name: str, x: np.ndarray, epsilon: float) -> np.ndarray:
        scale = self.weights[f"{name}.weight"]
        if self.config.norm == "rms":
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * scale
            + self.weights[f"{name}.bias"]
        )

    def linear(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        y = x @ self.weights[f"layers.{layer}.{name}.weight"]
        return y + self.weights.get(f"layers.{layer}.{name}.bias", 0.0)

    def heads(self, x: np.ndarray, count: int) -> np.ndarray:
        batch, sequence, width = x.shape
        return x.reshape(batch, sequence, count, width // count).transpose(0, 2, 1, 3)

    def rotate(self, x: np.ndarray) -> np.ndarray:
        if not self.config.rotary:
            return x
        c = self.config.head_dim
        inverse = 10000.0 ** (-np.arange(0, c, 2) / c)
        angle = self.feed["position_ids"][:, None, :, None] * inverse
        a, b = x[..., : c // 2], x[..., c // 2 :]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
        )

    def attention(self, layer: int, n: np.ndarray) -> np.ndarray:
        c = self.config
        q = self.rotate(self.heads(self.linear(layer, "q", n), c.heads))
        k = self.rotate(self.heads(self.linear(layer, "k", n), c.kv_heads))
        v = self.heads(self.linear(layer, "v", n), c.kv_heads)
        if c.kv_cache:
            past = [self.feed[f"past_key_values.{layer}.{t}"] for t in ("key", "value")]
            k, v = (np.concatenate([p, t], 2) for p, t in zip(past, (k, v), strict=True))
            self.present.append((k, v))
        k, v = (np.repeat(t, c.heads // c.kv_heads, axis=1) for t in (k, v))
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(c.head_dim)
        if c.mask:
            scores = np.where(self.mask(q.shape[2], k.shape[2]), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        weights = scores / scores.sum(-1, keepdims=True)
        context = (weights @ v).transpose(0, 2, 1, 3)
        a = self.linear(layer, "o", context.reshape(*context.shape[:2], -1))
        return a * self.weights.get(f"layers.{layer}.attention.gain", 1.0)

    def mask(self, sequence: int, total: int) -> np.ndarray:
        causal = np.arange(total) <= np.arange(total - sequence, total)[:, None]
        return causal[None, None] & (self.feed["attention_mask"] != 0)[:, None, None, :]

    def mlp(self, layer: int, n: np.ndarray) -> np.ndarray:
        up = self.linear(layer, "up", n)
        inner = (
            activation(self.config.activation, self.linear(layer, "gate", n)) * up
            if self.config.gated
            else activation(self.config.activation, up)
        )
        return self.linear(layer, "down", inner) * self.weights.get(f"layers.{layer}.mlp.gain", 1.0)


def activation(name: str, x: np.ndarray) -> np.ndarray:
    match name:
        case "silu":
            return x / (1 + np.exp(-x))
        case "quick-gelu":
            return x / (1 + np.exp(-1.702 * x))
        case "gelu":
            return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        case "gelu-tanh":
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case _:
            return np.maximum(x, 0)
