"""Consecutive layers read one input and run side by side, as one wide layer.

Rewrite:      x_{j+1} = layer_j(x_j), j = 0..p-1   ->   y = x + sum_j (a_j + m_j(h_j)), all a_j of x
              with a_j the attention and m_j the MLP of member j, each with its own norm, and
              h_j = x + sum_i a_i over all members (bypass "symmetric"), or over the members
              max(0, j - d) <= i <= j (bypass d; 0 = own attention only). Every a_i counts once.
Applies when: 1. the layers are pre-norm or parallel-residual blocks that follow each other;
              2. same norm kind and epsilon, head size, query/key head ratio, mask, rotary
                 embedding, soft-cap, activation and element type;
              3. no norm after attention or MLP, no experts, no quantized or shared weights;
              4. nothing inside the group is read outside of it or is a graph output;
              5. caches are graph inputs and outputs that only the attention (and Shape) reads.
Exactness:    approximate: the function changes. The graph written equals the definition above to
              1e-5 of the largest output in float32; what the definition costs in perplexity is
              in benchmarks/results/cqil_perplexity.json.
Cost:         the same weights and FLOPs in (p - 1) / p fewer nodes and dependent steps.
Source:       CQIL (arXiv 2404.06709) for bypass d; Layer Parallelism (arXiv 2502.02790) for
              "symmetric". Unlike the first's public code, the attention outputs that bypass are not
              added twice; unlike the second's, norm scales are folded, not averaged. Automatic
              partition: optimizer.fusion.partition.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import onnx_ir as ir
from pydantic import Field, model_validator

from optimizer.blocks import find_blocks
from optimizer.calibration import Calibration, TokenCosine
from optimizer.errors import CalibrationError, OptionError
from optimizer.fusion import Bypass, fuse_group, refusal
from optimizer.fusion.legality import GROUP_KEY
from optimizer.fusion.partition import Group, Partition, Search, Trial
from optimizer.gate import LEFT_OUT, Gate
from optimizer.listener import Listener
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report, Skip
from optimizer.structure import Block

logger = logging.getLogger(__name__)

Metric = Literal["kl", "relative_l2"]

#: Default drift budgets. 0.05 nats of KL per token raise the perplexity of text the model would
#: write itself by about 5 %.
DEFAULT_BUDGET: dict[Metric, float] = {"kl": 0.05, "relative_l2": 0.1}

#: Candidates of an automatic partition are screened on this fraction (1/n) of the samples.
SCREENED = 4


class Options(PassOptions):
    """Options of ``cqil``."""

    group: int = Field(2, ge=1, description="Layers per group of an explicit window.")
    first: int | None = Field(
        None, ge=0, description="First layer of the window, from 0; no window: automatic partition."
    )
    last: int | None = Field(None, ge=0, description="Last layer of the window, inclusive.")
    bypass: Literal["symmetric", "full"] | int = Field(
        "symmetric",
        description="What a member's MLP sees: 'symmetric' (all members' attention), a distance d "
        "(its own and the d members before; 0 = its own), or 'full' (all before).",
    )
    max_group: int = Field(4, ge=2, description="Largest group of an automatic partition.")
    metric: Metric | None = Field(
        None, description="What an automatic partition minimises; default 'kl' if there are logits."
    )
    budget: float | None = Field(
        None,
        gt=0,
        description="Damage an automatic partition may do, in the metric; default 0.05 nats (kl) "
        "or 0.1 (relative_l2), and no limit if a depth is given.",
    )
    depth: int | None = Field(
        None, ge=1, description="Stop an automatic partition at this many layers and groups."
    )
    samples: int = Field(
        32, ge=1, description="Samples that decide; a quarter of them screens the candidates."
    )
    trials: int = Field(6, ge=1, description="Partitions screened per layer saved.")
    similarity: float = Field(
        0.0,
        ge=-1,
        le=1,
        description="Least cosine between the inputs of a group's first and last layer.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Options:
        if self.first is not None and self.last is not None and self.first > self.last:
            msg = f"first ({self.first}) comes after last ({self.last}); last is inclusive"
            raise ValueError(msg)
        if isinstance(self.bypass, int) and self.bypass < 0:
            msg = f"bypass is {self.bypass}; expected 'symmetric', 'full' or a distance from 0"
            raise ValueError(msg)
        return self

    @property
    def windowed(self) -> bool:
        """Whether the user says which layers."""
        return self.first is not None or self.last is not None

    @property
    def variant(self) -> Bypass:
        """The bypass as ``optimizer.fusion`` takes it."""
        if isinstance(self.bypass, int):
            return self.bypass
        return "symmetric" if self.bypass == "symmetric" else 1 << 30


class Cqil(GraphPass[Options]):
    """See the module."""

    name = "cqil"
    exactness = Exactness.APPROXIMATE
    Options = Options
    after = ("canonicalize",)
    breaks = frozenset({"inputs", "outputs"})

    def needs_calibration(self) -> bool:
        """Only the automatic partition measures."""
        return self.options.group > 1 and not self.options.windowed

    def call(self, model: ir.Model, context: Context) -> Report:
        """Group layers, in place."""
        if self.options.group == 1:
            return Report(modified=False, skipped=(Skip("model", "groups of one layer"),))
        structure = find_blocks(model)
        if len(structure.blocks) < 2:
            skipped = tuple(_too_few(structure.blocks, structure.misses))
            return Report(modified=False, skipped=skipped)
        if self.options.windowed:
            plan = _window(structure.blocks, self.options)
        else:
            plan = context.gate.decide(
                "plan", lambda: _automatic(model, structure.blocks, self.options, context)
            )
        plan = _let_through(plan, context.gate)
        return _apply(model, structure.blocks, plan, self.options.variant)


@dataclass
class _Plan:
    """What to group, and what to tell the user."""

    groups: Partition = ()
    skipped: list[Skip] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def _too_few(blocks: Sequence[Block], misses: Sequence[tuple[str, str]]) -> Iterator[Skip]:
    yield Skip("model", f"{len(blocks)} transformer layers were recognised; a group needs two")
    for site, reason in misses:
        yield Skip(site, reason)


def _site(group: Group) -> str:
    return f"layers {group[0]}-{group[0] + group[1] - 1}"


def _members(blocks: Sequence[Block], group: Group) -> Sequence[Block]:
    return blocks[group[0] : group[0] + group[1]]


def _window(blocks: Sequence[Block], options: Options) -> _Plan:
    """Groups of equal size from ``first`` to ``last``; what remains stays sequential."""
    first = 0 if options.first is None else options.first
    last = len(blocks) - 1 if options.last is None else options.last
    for name, index in (("first", first), ("last", last)):
        if index >= len(blocks):
            raise OptionError(
                f"pass 'cqil': option '{name}' is {index}, but the model has {len(blocks)} layers; "
                f"expected 0 to {len(blocks) - 1}."
            )
    plan = _Plan()
    size = options.group
    whole = (last - first + 1) // size * size
    groups = []
    for start in range(first, first + whole, size):
        reason = refusal(_members(blocks, (start, size)))
        if reason is None:
            groups.append((start, size))
        else:
            plan.skipped.append(Skip(_site((start, size)), reason))
    if first + whole <= last:
        rest = (first + whole, last - first - whole + 1)
        plan.skipped.append(
            Skip(_site(rest), f"{rest[1]} left over from groups of {size}; sequential as before")
        )
    plan.groups = tuple(groups)
    return plan


def _let_through(plan: _Plan, gate: Gate) -> _Plan:
    """The plan without the groups that the gate refuses."""
    groups = tuple(group for group in plan.groups if gate.allow(_site(group)))
    left_out = [Skip(_site(g), LEFT_OUT) for g in plan.groups if g not in groups]
    return replace(plan, groups=groups, skipped=[*plan.skipped, *left_out])


def _apply(model: ir.Model, blocks: Sequence[Block], plan: _Plan, bypass: Bypass) -> Report:
    numbers = _numbers(blocks)
    sites = []
    for group in plan.groups:
        start, size = group
        fused = fuse_group(model, _members(blocks, group), bypass, numbers[start : start + size])
        sites.append(fused.name)
        logger.debug("cqil: grouped %s", fused.name)
    saved = sum(size - 1 for _, size in plan.groups)
    details = {
        "groups": [list(numbers[s : s + n]) for s, n in plan.groups],
        "bypass": bypass if bypass == "symmetric" or bypass < len(blocks) else "full",
        "depth": [len(blocks), len(blocks) - saved],
        **plan.details,
    }
    return Report(
        modified=bool(plan.groups),
        applied=len(plan.groups),
        skipped=tuple(plan.skipped),
        sites=tuple(sites),
        details=details,
    )


def _numbers(blocks: Sequence[Block]) -> list[int]:
    """Layer numbers as of the original model: a group made earlier counts as its members."""
    numbers: list[int] = []
    following = 0
    for block in blocks:
        members = block.attention.node.metadata_props.get(GROUP_KEY)
        number = following if members is None else int(members.split(",")[-1])
        numbers.append(number)
        following = number + 1
    return numbers


def _automatic(
    model: ir.Model, blocks: Sequence[Block], options: Options, context: Context
) -> _Plan:
    """The partition that does least measured damage, within budget or down to a depth."""
    data = context.calibration or context.evaluation
    if data is None:
        raise CalibrationError(
            "pass 'cqil': the automatic partition measures the damage of groups and needs sample "
            "data; add --calibration, or name the layers with cqil.first and cqil.last."
        )
    plan = _Plan()
    candidates = _candidates(blocks, options, plan)
    if not candidates:
        return plan
    data = data.limited(options.samples)
    few = data.limited(-(-options.samples // SCREENED))
    cosines = _similarity(model, blocks, candidates, few)
    candidates = [g for g in candidates if cosines[g] >= options.similarity]
    quick, meter = (_Meter(model, d, options.variant, options.metric) for d in (few, data))
    single: dict[Group, float] = {}
    context.listener.stage(f"cqil: measuring {len(candidates)} groups")
    for i, group in enumerate(candidates):
        single[group] = quick.damage((group,))
        context.listener.progress(i + 1, len(candidates))
        logger.info(
            "cqil: group %d of %d, %s alone: %s %.4g",
            i + 1, len(candidates), _site(group), meter.metric, single[group],
        )  # fmt: skip
    path, limit = _search(quick, meter, single, len(blocks), options, context.listener)
    chosen = [trial for trial in path if trial.damage <= limit]
    best = chosen[-1] if chosen else Trial(0.0, ())
    if path and not chosen:
        reason = f"the best group costs {path[0].damage:.4g} {meter.metric}, the budget is {limit}"
        plan.skipped.append(Skip("model", reason))
    elif options.depth is not None and len(blocks) - len(chosen) > options.depth:
        why = "legal group" if len(chosen) == len(path) else "group within the budget"
        reason = f"depth {options.depth} is not reached: no further {why}"
        plan.skipped.append(Skip("model", reason))
    plan.groups = best.groups
    plan.details = {
        "metric": meter.metric,
        "budget": None if limit == float("inf") else limit,
        "damage": _round(best.damage),
        "single": [
            {"layers": _layers(g), "damage": _round(single[g]), "cosine": _round(cosines[g])}
            for g in single
        ],
        "path": [
            {
                "depth": len(blocks) - trial.saved,
                "groups": [_layers(g) for g in trial.groups],
                "damage": _round(trial.damage),
            }
            for trial in path
        ],
    }
    return plan


def _candidates(blocks: Sequence[Block], options: Options, plan: _Plan) -> list[Group]:
    """Every legal group; an illegal pair is reported, a larger group only if all its pairs are."""
    legal: list[Group] = []
    for size in range(2, max(options.max_group, options.group) + 1):
        for start in range(len(blocks) - size + 1):
            inside = [(start, size - 1), (start + 1, size - 1)] if size > 2 else []
            if any(group not in legal for group in inside):
                continue
            reason = refusal(_members(blocks, (start, size)))
            if reason is None:
                legal.append((start, size))
            else:
                plan.skipped.append(Skip(_site((start, size)), reason))
    return legal


def _similarity(
    model: ir.Model, blocks: Sequence[Block], groups: Sequence[Group], data: Calibration
) -> dict[Group, float]:
    """Mean cosine between the streams that enter the first and the last layer of each group."""
    observer = TokenCosine([(blocks[s].input, blocks[s + n - 1].input) for s, n in groups])
    data.observe(model, [observer])
    return dict(zip(groups, (float(c) for c in observer.cosine), strict=True))


class _Meter:
    """Measures partitions against the model as it came.

    Attributes:
        metric: What is measured.
    """

    def __init__(
        self, model: ir.Model, data: Calibration, bypass: Bypass, metric: Metric | None
    ) -> None:
        self._model, self._data, self._bypass = model, data, bypass
        self._reference = data.reference(model)
        if metric == "kl" and not self._reference.scores:
            raise OptionError(
                "pass 'cqil': option 'metric' is 'kl', but the model's output "
                f"'{self._reference.output}' holds no logits; use 'relative_l2'."
            )
        self.metric: Metric = metric or ("kl" if self._reference.scores else "relative_l2")

    def damage(self, groups: Partition) -> float:
        """Drift of a copy of the model with ``groups`` applied."""
        copy = self._model.clone()
        blocks = find_blocks(copy).blocks
        for group in groups:
            fuse_group(copy, _members(blocks, group), self._bypass)
        drift = self._data.drift(self._reference, copy)
        return float(getattr(drift, self.metric))


def _search(
    quick: _Meter,
    meter: _Meter,
    single: dict[Group, float],
    layers: int,
    options: Options,
    listener: Listener,
) -> tuple[list[Trial], float]:
    """The best partition of every depth down to the wanted one, and the budget."""
    limit = options.budget
    if limit is None:
        limit = DEFAULT_BUDGET[meter.metric] if options.depth is None else float("inf")
    search = Search(single, quick.damage, meter.damage, trials=options.trials)
    path: list[Trial] = []
    while options.depth is None or layers - len(path) > options.depth:
        listener.stage(f"cqil: measuring partitions of depth {layers - len(path) - 1}")
        trial = search.level(len(path) + 1)
        if trial is None:
            break
        path.append(trial)
        logger.info(
            "cqil: %d layers as %s: %s %.4g",
            layers - trial.saved, _text(trial.groups), meter.metric, trial.damage,
        )  # fmt: skip
        if trial.damage > limit:
            break
    return path, limit


def _layers(group: Group) -> list[int]:
    return [group[0], group[0] + group[1] - 1]


def _text(groups: Partition) -> str:
    return ", ".join(f"{s}-{s + n - 1}" for s, n in groups)


def _round(value: float) -> float:
    """Six significant digits, so that a manifest does not carry float noise."""
    return float(f"{value:.6g}")
