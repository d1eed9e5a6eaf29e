"""Tokens that little attention goes to become one token.

Rewrite:      x [B, N, D] -> x' [B, N - r, D]: of the tokens that are not protected, the r + 1 with
              the smallest attention a_i (softmax of the guidance token's query and all keys,
              averaged over heads) become one, sum a_i x_i / sum a_i, behind the others, which keep
              their order.
Applies when: 1. a layer with attention before the MLP and the same number of tokens for every
              input; 2. no rotary embedding, position bias, causal mask, cache or window; 3. two or
              more tokens are not protected.
Exactness:    approximate: what the tokens that become one had to say is averaged.
Cost:         one row of attention per layer (with query = all: a second product of all queries and
              keys); no comparison of tokens with each other.
Source:       EViT (arXiv 2202.07800), and FastV (arXiv 2403.06764) for other tokens
              than the class token. Unlike EViT's code, which adds a_i x_i without dividing, the
              fused token is a mean, as the model was not trained with anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from optimizer.pass_base import Context, Report
from optimizer.structure import Block
from optimizer.tokens.driver import TokenPass
from optimizer.tokens.emit import Emitter, State
from optimizer.tokens.flow import Keeps
from optimizer.tokens.fusing import fuse_by_index, fused_rows, received
from optimizer.tokens.merging import merge
from optimizer.tokens.options import TokenOptions
from optimizer.tokens.rewrite import Method
from optimizer.tokens.towers import Tower


class Options(TokenOptions):
    """Options of ``prune-tokens``."""

    proportional: bool = Field(
        default=False, description="Attention counts the fused token as often as it stands for."
    )
    guidance: Literal["auto", "all"] | int = Field(
        "auto",
        description="The token whose attention counts: a position, 'all', or the first protected "
        "one, and all where there is none.",
    )


@dataclass(frozen=True)
class Received(Method):
    """Choice by attention received.

    Attributes:
        by_index: Whether tokens are moved by index, or by a matrix.
        guide: Which of the protected tokens' attention counts; None: that of all tokens.
    """

    keeps: ClassVar[Keeps] = Keeps(placed=False)

    by_index: bool
    guide: int | None

    def limit(self, count: int, protected: tuple[int, ...]) -> int:
        """The most tokens that one reduction can take from ``count``: all become one."""
        return max(count - len(protected) - 1, 0)

    def reduce(
        self, pen: Emitter, block: Block, x: ir.Value, state: State, r: int
    ) -> tuple[ir.Value, State]:
        """``x`` [B, N, D] with ``r`` tokens less, and what is known about them."""
        query = None if self.guide is None else state.protected[self.guide]
        weight = received(pen, block, state, query)
        if self.by_index:
            return fuse_by_index(pen, x, state, weight, r)
        return merge(pen, x, state, fused_rows(pen, state, weight, r), r)


class PruneTokens(TokenPass[Options]):
    """See the module."""

    name = "prune-tokens"
    Options = Options

    def call(self, model: ir.Model, context: Context) -> Report:
        """Prune tokens, in place."""
        by_index, guidance = self.options.by_index(context.target), self.options.guidance
        more = (guidance,) if isinstance(guidance, int) else ()

        def make(tower: Tower) -> Received:
            return Received(by_index, tower.guide(guidance))

        return self.reduce(model, context, make, Received.keeps, protect=more)
