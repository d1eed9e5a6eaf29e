"""Weights of linear layers become zeros, 2 of every 4 or any share, without training.

Rewrite:      y = x W + b   ->   y = x V + b, with V as large as W and exact zeros in a pattern:
              N:M: N weights are kept of every M consecutive ones along K, the reduction dimension;
              unstructured: a share of the layer, or of every column. Which are zeros is decided
              by |W| (magnitude), by |W_kn| ||X_k|| (wanda), or by what the output loses after the
              weights that are kept have made up for it (sparsegpt, which changes those too).
Applies when: 1. the layer is a MatMul by a constant [K, N], float32 or half precision, that nothing
              else uses; not one that is quantized already: sparsify comes before;
              2. N:M: K is a multiple of M;
              3. weights and calibrated inputs are finite;
              4. in a transformer: it is no output head, no embedding and no router of experts,
              unless asked for. Tables that are looked up are never pruned.
Exactness:    approximate: the function changes; by how much is in
              benchmarks/results/sparse_accuracy.json.
Cost:         the same bytes and FLOPs: zeros are stored, and only pay on a target that looks for
              them (sparse-matmul, 2:4 on a GPU).
Source:       Wanda (arXiv 2306.11695), SparseGPT (arXiv 2301.00774). Unlike the first, the weights
              of all output channels compete (compare=output: as published; which is better depends
              on the model). Unlike both, layers are calibrated on the dense model
              (sequential=true: as published, dearer and as often worse as better). SparseGPT's
              blocks of channels are small and have shares of their own, which was measured to be
              better. Weights that are zero already stay so. Shares by damage:
              optimizer.pruning.allocation.
"""

from __future__ import annotations

from typing import Any, Literal

import onnx_ir as ir
from pydantic import Field, field_validator, model_validator

from optimizer import graph as graphs
from optimizer.errors import CalibrationError
from optimizer.gate import LEFT_OUT
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report, Skip
from optimizer.pruning.layers import Choice, find_layers
from optimizer.pruning.patterns import Pattern
from optimizer.pruning.planning import Method, Pruned, Settings, plan

UNSTRUCTURED = "unstructured"
DEFAULT_SHARE = 0.5


class Options(PassOptions):
    """Options of ``sparsify``."""

    pattern: str = Field(
        "2:4",
        description="N:M = N weights are kept of every M consecutive ones along the reduction "
        "dimension; or 'unstructured'.",
    )
    sparsity: float | None = Field(
        None, ge=0, lt=1, description="Share of zeros, with pattern=unstructured; default 0.5."
    )
    method: Method = Field(
        "sparsegpt",
        description="What decides: 'magnitude' (no data), 'wanda' (weights and norms of inputs), "
        "'sparsegpt' (the weights kept make up for the others).",
    )
    allocation: Literal["uniform", "damage"] = Field(
        "uniform",
        description="Shares of layers: all the same, or by what each does to the model, with the "
        "same mean over all weights (unstructured only).",
    )
    compare: Literal["layer", "output"] = Field(
        "layer",
        description="Weights that compete for being kept: all of a layer, or those of one output "
        "channel, which then all have as many zeros (unstructured only).",
    )
    sequential: bool = Field(
        default=False,
        description="Calibrate each block on the model in which those before it are pruned, one "
        "run of the samples per block; false = all on one run of the dense model.",
    )
    damping: float = Field(
        0.01, gt=0, le=1, description="Added to the diagonal of X'X, times its mean (sparsegpt)."
    )
    block: int = Field(
        16, ge=1, description="Input channels whose zeros are chosen at a time (sparsegpt)."
    )
    heads: bool = Field(
        default=False, description="Prune layers that compute an output, such as logits."
    )
    embeddings: bool = Field(
        default=False,
        description="Prune the first layers that an input meets, such as patch embeddings.",
    )
    include: tuple[str, ...] = Field(
        (), description="Patterns of weights to prune although they are heads or embeddings."
    )
    exclude: tuple[str, ...] = Field((), description="Patterns of weights to leave dense.")

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value

    @field_validator("pattern")
    @classmethod
    def _readable(cls, value: str) -> str:
        if value != UNSTRUCTURED:
            try:
                Pattern.parse(value)
            except ValueError as error:
                msg = f"'{UNSTRUCTURED}', {error}"
                raise ValueError(msg) from None
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Options:
        if self.pattern == UNSTRUCTURED:
            return self
        given = self.sparsity
        if given is not None and abs(given - self.zeros.share) > 1e-6:
            msg = (
                f"sparsity is {given:g}, but pattern={self.pattern} has {self.zeros.share:g}; "
                f"leave sparsity out, or add pattern={UNSTRUCTURED}"
            )
            raise ValueError(msg)
        if self.compare != "layer":
            msg = (
                f"compare is '{self.compare}', but pattern={self.pattern} counts in groups of one "
                f"output channel anyway; leave it out, or add pattern={UNSTRUCTURED}"
            )
            raise ValueError(msg)
        if self.allocation != "uniform":
            msg = (
                f"allocation is '{self.allocation}', but pattern={self.pattern} gives every layer "
                f"the same share; leave it out, or add pattern={UNSTRUCTURED}"
            )
            raise ValueError(msg)
        return self

    @property
    def zeros(self) -> Pattern:
        """The pattern, or the mean share."""
        if self.pattern != UNSTRUCTURED:
            return Pattern.parse(self.pattern)
        share = DEFAULT_SHARE if self.sparsity is None else self.sparsity
        return Pattern(share, balanced=self.compare == "output")


class Sparsify(GraphPass[Options]):
    """See the module."""

    name = "sparsify"
    exactness = Exactness.APPROXIMATE
    Options = Options
    after = ("canonicalize",)

    def needs_calibration(self) -> bool:
        """All but magnitude with the same share everywhere."""
        options = self.options
        return options.zeros.share > 0 and (
            options.method != "magnitude" or options.allocation == "damage"
        )

    def call(self, model: ir.Model, context: Context) -> Report:
        """Prune, in place."""
        options = self.options
        if options.zeros.share == 0:
            return Report(modified=False, skipped=(Skip("model", "a sparsity of 0"),))
        choice = Choice(options.include, options.exclude, options.heads, options.embeddings)
        layers, skipped = find_layers(model, choice, options.zeros)
        if not layers:
            skipped = skipped or [Skip("model", "it has no MatMul by a constant")]
            return Report(modified=False, skipped=tuple(skipped))
        calibration = context.calibration
        if calibration is None and self.needs_calibration():
            raise CalibrationError(
                f"pass 'sparsify': method '{options.method}' with allocation "
                f"'{options.allocation}' looks at activations, which needs sample data; add "
                "--calibration FILE.npz with one array per model input, or method=magnitude."
            )
        plans, skipped = context.gate.decide(
            "plan", lambda: plan(model, choice, self._settings(), calibration, context.listener)
        )
        named = {layer.name: layer for layer in layers}
        taken, left_out = [], []
        for item in plans:
            name = item.weight.name
            if context.gate.allow(name):
                item.weight.put(model.graph, named[name])
                taken.append(item)
            else:
                left_out.append(Skip(name, LEFT_OUT))
        if taken:
            graphs.remove_dead(model)
        return Report(
            modified=bool(taken),
            applied=len(taken),
            skipped=(*skipped, *left_out),
            sites=tuple(item.weight.name for item in taken),
            details=self._facts(taken),
        )

    def _settings(self) -> Settings:
        options = self.options
        return Settings(
            options.method,
            options.zeros,
            by_damage=options.allocation == "damage",
            sequential=options.sequential,
            damping=options.damping,
            block=options.block,
        )

    def _facts(self, taken: list[Pruned]) -> dict[str, Any]:
        zeros = sum(item.weight.zeros for item in taken)
        size = sum(item.weight.shape[0] * item.weight.shape[1] for item in taken)
        return {
            "pattern": self.options.pattern,
            "method": self.options.method,
            "weights": size,
            "sparsity": round(zeros / size, 6) if size else 0.0,
            "sites": [_entry(item) for item in taken],
        }


def _entry(item: Pruned) -> dict[str, Any]:
    rows, columns = item.weight.shape
    return {
        "weight": item.weight.name,
        "shape": [rows, columns],
        "sparsity": round(item.weight.zeros / (rows * columns), 6),
        "damage": float(f"{item.damage:.3g}"),
        "tokens": item.tokens,
    }
