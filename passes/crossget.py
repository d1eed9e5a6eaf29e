"""Similar tokens are merged wherever they are, in their order, guided by a class or end token.

Rewrite:      x [B, N, D] -> x' [B, N - r, D]: r tokens go into the nearest of the others (cosine of
              whole keys), x'_j = sum s_i x_i / sum s_i; the others keep their order, and later
              attentions add log s_j to the scores of key j. Which r: those of highest
              max_j D'_ij - I_i, where D' are the similarities to tokens of later rank (by their
              own nearest similarity, so that edges have no cycle) and I_i = cos(k_i, q) the
              similarity to the query of the guidance token, a cross token or the class token.
              With ensemble, a merged token i and the token j it goes into weigh
              2 softmax(I_i, I_j) beside their sizes.
Applies when: 1. a layer with attention before the MLP and the same number of tokens for every
              input; 2. no rotary embedding, position bias, cache or window; a causal mask is kept
              by the order; 3. protected tokens (class, distillation, register, cross) are at the
              ends, with two or more between, of which the end of a text may be one.
Exactness:    approximate: tokens that are merged are no longer told apart. Of equal tokens it is
              exact.
Cost:         matching compares all N^2 pairs of whole keys: four times as many as tome, of
              H times as many numbers.
Source:       CrossGET (arXiv 2305.17455): complete-graph soft matching,
              with importance by a guidance token. Its cross tokens are learned: a model that has
              them is recognised (the last token becomes another in front of each layer), or they
              are written in from a file. Without them the class token takes their place, or none.
              Measured without training, the matching is about as good as that of tome; see
              benchmarks/results/tokens_accuracy.json.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir
from pydantic import Field

from optimizer.hashing import hash_file
from optimizer.pass_base import Context, Report
from optimizer.structure import Block
from optimizer.tokens import graph_matching as matching
from optimizer.tokens.cross_tokens import read_cross_tokens
from optimizer.tokens.driver import TokenPass
from optimizer.tokens.emit import Emitter, State
from optimizer.tokens.flow import Keeps
from optimizer.tokens.graph_matching import Line
from optimizer.tokens.matching import normalized, padding_of
from optimizer.tokens.merging import merge
from optimizer.tokens.options import TokenOptions
from optimizer.tokens.rewrite import Method
from optimizer.tokens.towers import Tower


class Options(TokenOptions):
    """Options of ``crossget``."""

    guidance: Literal["auto", "none"] | int = Field(
        "auto",
        description="The token whose query tells which tokens are important and stay: a position, "
        "'none', or the first protected one.",
    )

    ensemble: bool | None = Field(
        None,
        description="Merged tokens weigh by importance beside their size; default: with cross "
        "tokens, which are trained for it.",
    )

    cross_tokens: str | None = Field(
        None,
        description="An .npz file with learned cross tokens, one array [layers, D] per tower, "
        "called 'layers.N' after its first layer.",
    )


@dataclass(frozen=True)
class Complete(Method):
    """Complete-graph soft matching.

    Attributes:
        by_index: Whether tokens are moved by index, or by a matrix.
        guide: Which of the protected tokens guides, or None.
        ensemble: Whether merged tokens weigh by importance.
        guided: Whether without ``guide`` the token guides that is protected in each row by itself.
        taken: How many of these there are: 0 or 1.
    """

    keeps: ClassVar[Keeps] = Keeps(ordered=True)

    by_index: bool
    guide: int | None
    ensemble: bool
    guided: bool = True
    taken: int = 0

    def limit(self, count: int, protected: tuple[int, ...]) -> int:
        """The most tokens that one reduction can take from ``count``."""
        line = Line.of(count, protected)
        free = line.free if line is not None else count - len(protected)
        return max(free - self.taken, 0) // 2

    def fault(self, count: int, protected: tuple[int, ...]) -> str | None:
        """Why a tower with these protected tokens is left alone."""
        if Line.of(count, protected) is None:
            return "a protected token has others on both sides, and would change its place"
        return None

    def reduce(
        self, pen: Emitter, block: Block, x: ir.Value, state: State, r: int
    ) -> tuple[ir.Value, State]:
        """``x`` [B, N, D] with ``r`` tokens less, and what is known about them."""
        line = Line.of(state.count, state.protected)
        key = block.attention.node.inputs[1]
        assert line is not None  # noqa: S101 - see ``fault``
        assert key is not None  # noqa: S101 - an Attention has keys
        unit = normalized(pen, key)
        importance = self._importance(pen, block, unit, state)
        padded = padding_of(pen, state)
        found = matching.scores(pen, unit, line, importance, padded, state.taken)
        choose = matching.gathered if self.by_index else matching.positioned
        weighing = importance if self.ensemble else None
        merged, after = merge(pen, x, state, choose(pen, found, line, r, weighing), r)
        return merged, replace(after, protected=line.protected(after.count))

    def _importance(
        self, pen: Emitter, block: Block, unit: ir.Value, state: State
    ) -> ir.Value | None:
        """[B, N, 1]: the cosine of each key and the guidance token's query; None for none."""
        attention = block.attention
        if attention.heads != attention.kv_heads or not self.guided:
            return None
        queries = attention.node.inputs[0]
        if self.guide is not None:
            position = pen.integers([state.protected[self.guide]], "guide")
            query = pen.put("Gather", queries, position, as_="query", axis=1)
        elif state.taken is not None:
            chosen = pen.put("Transpose", state.taken, perm=(0, 2, 1))
            query = pen.put("MatMul", chosen, queries, as_="query")
        else:
            return None
        turned = pen.put("Transpose", normalized(pen, query), perm=(0, 2, 1))
        return pen.put("MatMul", unit, turned, as_="importance")


class CrossGet(TokenPass[Options]):
    """See the module."""

    name = "crossget"
    Options = Options

    def call(self, model: ir.Model, context: Context) -> Report:
        """Merge tokens, in place."""
        by_index, guidance = self.options.by_index(context.target), self.options.guidance
        ensemble, path = self.options.ensemble, self.options.cross_tokens
        more = (guidance,) if isinstance(guidance, int) else ()

        def make(tower: Tower) -> Complete:
            weigh = tower.cross is not None if ensemble is None else ensemble
            guided, taken = guidance != "none", int(tower.taken is not None)
            return Complete(by_index, tower.guide(guidance), weigh, guided, taken)

        cross = None if path is None else read_cross_tokens(path)
        report = self.reduce(model, context, make, Complete.keeps, protect=more, cross=cross)
        if path is None:
            return report
        details = {**report.details, "cross_tokens_sha256": hash_file(Path(path))}
        return replace(report, details=details)
