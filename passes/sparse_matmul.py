"""Linear layers whose weights are mostly zeros run on the stored weights only.

Rewrite:      y = act(x W + b)  ->  y = SparseMatMul(x, bitmap, values, offsets, b), the operator of
              optimizer.custom_ops, with its body in standard operators as a function of the model
Applies when: 1. the layer is a MatMul by a constant [K, N], or an int8 one with one static scale
              for its input; in float32 for ort-cpu, in 16 bits for targets on GPUs;
              2. the measured cost model of the machine's class says that it is faster than the
              dense layer, for every number of tokens that is asked for.
Exactness:    reassociated with precision=fp32. With precision=int8 a float layer is rounded: one
              symmetric scale per output channel and per token.
Cost:         bytes: 1 bit per weight, and 4 (fp32), 2 (16 bits) or 1 (int8) per weight that is not
              zero; on GPUs weights of 2:4 sparsity are stored as pairs and metadata for mma.sp.
Source:       ours; figures in benchmarks/results/sparse_{avx2,avx512,amx}.json and gpu.json.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from pydantic import Field, field_validator

from optimizer import sparse_cost
from optimizer.custom_ops.declaration import DOMAIN, OP_TYPE
from optimizer.gate import LEFT_OUT
from optimizer.graph import remove_dead
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report, Skip
from optimizer.sparse_layers import Layer, find_layers, measured_density, shape_of
from optimizer.sparse_replacement import replace
from optimizer.targets import get_target

#: Decoder of one layer of LLaMA-3-8B's sizes on an H100 (benchmarks/results/gpu_models.json).
_SLOW_THERE = (
    "in ONNX Runtime's CUDA provider it was measured to be faster than dense float16 for one token "
    "per run (a whole decoder 1.1 to 1.2 times), and not for 8 or more: give tokens=1 for a model "
    "that only decodes one row, or force=true"
)
#: Tokens per run that a layer is judged by: decoding and a prompt, or one run of all tokens.
DECODER, ENCODER = (1, 128), (128,)


class Options(PassOptions):
    """Options of ``sparse-matmul``."""

    precision: sparse_cost.Precision = Field(
        "fp32",
        description="Of the products: 'fp32' (on GPUs the layer's own float16 or bfloat16), or "
        "'int8' (weights with a scale per output channel, activations per token). Layers that are "
        "int8 already stay int8.",
    )
    tokens: tuple[int, ...] = Field(
        (),
        description="Tokens per run at which a layer must be faster; default 1 and 128 for a model "
        "with a KV cache, 128 for others.",
    )
    machine: str = Field(
        "this",
        description="Class of the machine that will run it: 'this' (a CPU), "
        + ", ".join(f"'{name}'" for name in (*sparse_cost.CLASSES, *sparse_cost.GPUS))
        + ".",
    )
    force: bool = Field(
        default=False, description="Rewrite every layer that can be, faster or not."
    )
    exclude: tuple[str, ...] = Field((), description="Patterns of weights to leave dense.")

    @field_validator("tokens", "exclude", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(filter(None, value.split(","))) if isinstance(value, str) else value

    @field_validator("tokens")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(count < 1 for count in value):
            msg = "expected numbers of at least 1"
            raise ValueError(msg)
        return value

    @field_validator("machine")
    @classmethod
    def _known(cls, value: str) -> str:
        known = ("this", *sparse_cost.CLASSES, *sparse_cost.GPUS)
        if value not in known:
            msg = f"expected one of {', '.join(known)}"
            raise ValueError(msg)
        return value


class SparseMatMul(GraphPass[Options]):
    """See the module."""

    name = "sparse-matmul"
    exactness = Exactness.REASSOCIATED
    Options = Options
    after = (
        "canonicalize",
        "cqil",
        "tome",
        "crossget",
        "prune-tokens",
        "sparsify",
        "outliertune",
        "fuse-concurrent",
    )
    emits = ((DOMAIN, OP_TYPE),)

    def __init__(self, options: PassOptions | None = None) -> None:
        super().__init__(options)  # type: ignore[arg-type]
        if self.options.precision == "int8":
            self.exactness = Exactness.APPROXIMATE

    def call(self, model: ir.Model, context: Context) -> Report:
        """Replace layers, in place."""
        device = get_target(context.target).device
        layers, skipped = find_layers(model, self.options.precision, self.options.exclude, device)
        machine = self.options.machine
        if machine == "this" and device == "cpu":
            machine = sparse_cost.machine_class()
        tokens = self.options.tokens or _tokens(model)
        sites: list[dict[str, Any]] = []
        for layer in layers:
            density = measured_density(layer)
            reason = self._refusal(layer, context, machine, tokens, density)
            if reason is None and not context.gate.allow(layer.name):
                reason = LEFT_OUT
            if reason is not None:
                skipped.append(Skip(layer.name, reason))
                continue
            nbytes = replace(model, layer)
            sites.append(
                {
                    "weight": layer.name,
                    "density": density,
                    "bytes": nbytes,
                    "int8": layer.int8,
                    "layout": layer.layout,
                }
            )
        if sites:
            remove_dead(model)
        return Report(
            bool(sites),
            len(sites),
            tuple(skipped),
            tuple(site["weight"] for site in sites),
            {"machine": machine, "tokens": list(tokens), "sites": sites},
        )

    def _refusal(
        self, layer: Layer, context: Context, machine: str, tokens: tuple[int, ...], density: float
    ) -> str | None:
        if self.options.force:
            return None
        if context.target == "ort-cuda" and max(tokens) > 1:
            return _SLOW_THERE
        if machine == "this":
            return (
                "whether it is faster depends on the GPU that will run it: name it with machine= "
                f"(measured: {', '.join(sparse_cost.GPUS)}), or give force=true"
            )
        kind = sparse_cost.KINDS[layer.layout]
        return sparse_cost.refusal(machine, kind, shape_of(layer), tokens, density)


def _tokens(model: ir.Model) -> tuple[int, ...]:
    cached = any(str(value.name).startswith("past") for value in model.graph.inputs)
    return DECODER if cached else ENCODER
