"""Similar tokens are merged between attention and MLP of each layer.

Rewrite:      x [B, N, D] -> x' [B, N - r, D]: of all tokens with even index, the r that are most
              similar to one with odd index (cosine of the keys' mean over heads) go into it,
              x'_j = sum s_i x_i / sum s_i; later attentions add log s_j to the scores of key j.
              Where all tokens are needed behind, each gets the one it was merged into.
Applies when: 1. a layer with attention before the MLP and the same number of tokens for every
              input; 2. no rotary embedding, position bias, causal mask, cache or window; 3. two or
              more tokens are not protected (class, distillation and register tokens are).
Exactness:    approximate: tokens that are merged are no longer told apart. Of equal tokens it is
              exact: attention to one of size s is attention to s equal ones.
Cost:         matching compares N^2/4 pairs of c numbers. What is saved is r of N tokens per layer,
              and all of the layers behind (benchmarks/results/tokens.json).
Source:       ToMe (arXiv 2210.09461). Protected tokens are left out of both sets, which is what its
              scores of minus infinity do. Padding has size 0: it is merged first, and adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from optimizer.pass_base import Context, Report
from optimizer.structure import Block
from optimizer.tokens.driver import TokenPass
from optimizer.tokens.emit import Emitter, State
from optimizer.tokens.flow import Keeps
from optimizer.tokens.matching import Sides, gathered, head_mean, padding_of, positioned
from optimizer.tokens.merging import merge
from optimizer.tokens.options import TokenOptions
from optimizer.tokens.rewrite import Method


class Options(TokenOptions):
    """Options of ``tome``."""


@dataclass(frozen=True)
class Bipartite(Method):
    """Bipartite soft matching.

    Attributes:
        by_index: Whether tokens are moved by index, or by a matrix.
    """

    keeps: ClassVar[Keeps] = Keeps()

    by_index: bool

    def limit(self, count: int, protected: tuple[int, ...]) -> int:
        """The most tokens that one reduction can take from ``count``."""
        return Sides(count, protected).limit

    def reduce(
        self, pen: Emitter, block: Block, x: ir.Value, state: State, r: int
    ) -> tuple[ir.Value, State]:
        """``x`` [B, N, D] with ``r`` tokens less, and what is known about them."""
        key = block.attention.node.inputs[1]
        assert key is not None  # noqa: S101 - an Attention has keys
        metric = head_mean(pen, block.attention, key)
        sides, padded = Sides(state.count, state.protected), padding_of(pen, state)
        choose = gathered if self.by_index else positioned
        return merge(pen, x, state, choose(pen, metric, sides, r, padded), r)


class ToMe(TokenPass[Options]):
    """See the module."""

    name = "tome"
    Options = Options

    def call(self, model: ir.Model, context: Context) -> Report:
        """Merge tokens, in place."""
        by_index = self.options.by_index(context.target)
        return self.reduce(model, context, lambda _: Bipartite(by_index), Bipartite.keeps)
