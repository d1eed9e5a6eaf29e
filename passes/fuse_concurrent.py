"""Linears that run side by side become one wide linear, where the target gains from it.

Rewrite:      y_i = x W_i + b_i   ->   y_1..y_n = Split(x [W_1|..|W_n] + [b_1|..|b_n])   ("pack")
              x + (u A + a) + (v B + b)   ->   x + [u|v] [A;B] + (a + b)                 ("stack")
              Two norms of one value with equal epsilon first give their scales to the weights.
Applies when: pack: two or more linears with constant weights of one type read one value (query,
              key and value; gate and up; all of these in parallel-residual blocks; keys and values
              of all cross-attentions). stack: output and down projection of a parallel block.
              Both: no weight is shared, and the cost model of the target predicts a gain, or the
              user asks for it with "always".
Exactness:    reassociated: the sums of "stack" are ordered differently; "pack" changes the shapes
              a runtime's kernels see.
Cost:         pack: n - 1 MatMul nodes and their Adds less, one Split more, which copies every
              output once. stack: one MatMul and one Add less, one Concat more. With ONNX Runtime
              on the CPU and one thread a MatMul node costs hardly more than one more output of
              Split, so only linears with biases gain: 2 to 17 % of their time at one token for
              three to five linears of 64 to 256 columns; at 128 tokens packing loses, because the
              copies cost more (benchmarks/results/fuse_concurrent.json).
Source:       block matrix multiplication; cost model fitted to benchmarks/cqil.py packing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir
from pydantic import Field

from optimizer.block_parts import linear_reading
from optimizer.blocks import find_blocks
from optimizer.fusion import fold_norm, pack_beside, pack_stacked
from optimizer.fusion.legality import linears
from optimizer.gate import LEFT_OUT, Gate
from optimizer.graph import constant, insert, only_user, remove_dead, replace_value
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report, Skip
from optimizer.structure import Block, Linear, Mlp, Style

Choice = Literal["auto", "always", "never"]


class Options(PassOptions):
    """Options of ``fuse-concurrent``."""

    pack: Choice = Field("auto", description="Make linears that read one value one linear.")
    stack: Choice = Field(
        "auto", description="Make output and down projection of parallel blocks one linear."
    )
    tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens per run (batch times sequence) that 'auto' decides for; default 1 for "
        "a model with a KV cache, 128 for one without.",
    )


@dataclass(frozen=True)
class CostModel:
    """What nodes cost on a target, in microseconds.

    Attributes:
        matmul: Fixed cost of a MatMul node.
        add: Fixed cost of an Add node.
        move: Fixed cost of a Split or Concat node.
        part: The same, per output or input of it.
        copy: Per byte that it copies.
        margin: Predicted gains below this are not believed.
    """

    matmul: float
    add: float
    move: float
    part: float
    copy: float
    margin: float

    def packing(self, parts: int, biases: int, copied: int) -> float:
        """Microseconds saved per run by packing; negative: lost."""
        nodes = (parts - 1) * self.matmul + max(biases - 1, 0) * self.add
        return nodes - self._moving(parts, copied)

    def stacking(self, parts: int, biases: int, copied: int) -> float:
        """Microseconds saved per run by stacking; negative: lost."""
        nodes = (parts - 1) * (self.matmul + self.add) + max(biases - 1, 0) * self.add
        return nodes - self._moving(parts, copied)

    def _moving(self, parts: int, copied: int) -> float:
        return self.move + parts * self.part + copied * self.copy


#: Fitted to benchmarks/results/fuse_concurrent.json. Targets that are not here have not been
#: measured, and nothing is packed for them unless asked for.
COSTS = {
    "ort-cpu": CostModel(matmul=0.4, add=0.4, move=0.1, part=0.3, copy=4.5e-5, margin=0.2),
}


class FuseConcurrent(GraphPass[Options]):
    """See the module."""

    name = "fuse-concurrent"
    exactness = Exactness.REASSOCIATED
    Options = Options
    # Packed projections are no longer blocks to the passes that look for them.
    after = ("canonicalize", "cqil", "tome", "crossget", "prune-tokens", "sparsify", "outliertune")

    def call(self, model: ir.Model, context: Context) -> Report:
        """Pack and stack, in place."""
        graph, blocks = model.graph, find_blocks(model).blocks
        tokens = self.options.tokens or _tokens(model, blocks)
        judge, log = _Judge(self.options, context.target, tokens), _Log(context.gate)
        for block in blocks:
            if block.style is Style.PARALLEL and isinstance(block.mlp, Mlp):
                _stack(graph, block, judge, log)
                _merge_norms(graph, block, judge, context.gate)
        order = {node: i for i, node in enumerate(graph)}
        for siblings in list(_siblings(graph)):
            name = siblings[0].input.name or "value"
            reason = _reason(siblings) or judge.packing(siblings)
            if log.takes(f"readers of {name}", reason):
                anchor = min((linear.matmul for linear in siblings), key=order.__getitem__)
                pack_beside(graph, siblings, anchor, f"{name}/packed")
        if log.sites:
            remove_dead(model)
        return Report(bool(log.sites), len(log.sites), tuple(log.skipped), tuple(log.sites))


@dataclass
class _Log:
    """What was done, and what was not."""

    gate: Gate
    sites: list[str] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    def takes(self, site: str, reason: str | None) -> bool:
        """Note a site; whether it is to be rewritten."""
        if reason is None and not self.gate.allow(site):
            reason = LEFT_OUT
        if reason is None:
            self.sites.append(site)
        else:
            self.skipped.append(Skip(site, reason))
        return reason is None


class _Judge:
    """Says whether a rewrite pays."""

    def __init__(self, options: Options, target: str, tokens: int) -> None:
        self._options, self._target, self._tokens = options, target, tokens
        self._costs = COSTS.get(target)

    def packing(self, siblings: Sequence[Linear]) -> str | None:
        """None, or why ``siblings`` stay apart."""
        copied = self._tokens * sum(_bytes(linear, 1) for linear in siblings)
        costs = self._costs
        saved = None if costs is None else costs.packing(len(siblings), _biases(siblings), copied)
        return self._verdict(self._options.pack, saved)

    def stacking(self, pair: Sequence[Linear]) -> str | None:
        """None, or why ``pair`` stays apart."""
        copied = self._tokens * sum(_bytes(linear, 0) for linear in pair)
        costs = self._costs
        saved = None if costs is None else costs.stacking(len(pair), _biases(pair), copied)
        return self._verdict(self._options.stack, saved)

    def _verdict(self, choice: Choice, saved: float | None) -> str | None:
        if choice == "always":
            return None
        if choice == "never":
            return "switched off"
        if saved is None or self._costs is None:
            return f"not measured on target '{self._target}'; 'always' does it nevertheless"
        if saved < self._costs.margin:
            return f"no gain predicted at {self._tokens} tokens per run ({saved:+.1f} us)"
        return None


def _tokens(model: ir.Model, blocks: Sequence[Block]) -> int:
    cached = any(block.attention.past_key is not None for block in blocks)
    names = (value.name or "" for value in model.graph.inputs)
    return 1 if cached or any(name.startswith("past") for name in names) else 128


def _biases(linears_: Sequence[Linear]) -> int:
    return sum(linear.bias is not None for linear in linears_)


def _bytes(linear: Linear, axis: int) -> int:
    """Bytes per token of the output (axis 1) or input (axis 0) of a linear."""
    tensor = constant(linear.weight)
    return 0 if tensor is None else int(tensor.shape.numpy()[axis] * tensor.dtype.itemsize)


def _siblings(graph: ir.Graph) -> Iterator[list[Linear]]:
    """Linears that read one value, for every value that two or more read, in graph order."""
    seen: set[ir.Value] = set()
    for node in graph:
        value = node.inputs[0] if node.op_type == "MatMul" and node.domain == "" else None
        if value is None or value in seen:
            continue
        seen.add(value)
        found = linear_reading(value)
        if len(found) > 1:
            yield found


def _reason(siblings: Sequence[Linear]) -> str | None:
    tensors = [constant(linear.weight) for linear in siblings]
    if any(tensor is None for tensor in tensors):
        return "quantized weights"
    if len({tensor.dtype for tensor in tensors if tensor is not None}) > 1:
        return "weights of different types"
    for linear in siblings:
        if len(linear.weight.uses()) > 1:
            return f"weight '{linear.weight.name}' is shared with another node"
    return None


def _stack(graph: ir.Graph, block: Block, judge: _Judge, log: _Log) -> None:
    """Output and down projection of a parallel block."""
    pair = (block.attention.o, block.dense.down)
    last = block.output.producer()
    if last is None:
        return
    plain = not block.extras and all(only_user(linear.output) for linear in pair)
    reason = None if plain else "something lies between the projections and the residual adds"
    if log.takes(f"layer {block.index}", reason or _reason(pair) or judge.stacking(pair)):
        name = f"layers.{block.index}"
        total = pack_stacked(graph, pair, last, name)
        x = block.attention_norm.source  # the block before may have been stacked
        y = insert(graph, last, "Add", [x, total], name=f"{name}/output", dtype=x.dtype)
        replace_value(block.output, y, keep_name=True)
        remove_dead(graph)


def _merge_norms(graph: ir.Graph, block: Block, judge: _Judge, gate: Gate) -> None:
    """Both norms of a parallel block as one without scale: all projections read one value."""
    first, second = block.attention_norm, block.mlp_norm
    q, k, v, _, *inner, _ = linears(block)
    same = (first.kind, first.epsilon) == (second.kind, second.epsilon)
    packs = _reason([q, k, v, *inner]) is None and judge.packing([q, k, v, *inner]) is None
    if first.node is second.node or not same or not packs:
        return
    if not gate.allow(f"layer {block.index}: norms"):
        return
    if fold_norm(graph, first, [q, k, v]) is None and fold_norm(graph, second, inner) is None:
        second.output.replace_all_uses_with(first.output)
