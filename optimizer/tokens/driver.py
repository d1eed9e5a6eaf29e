"""What all passes that reduce tokens share: options, the number per layer, and the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import onnx_ir as ir
from pydantic import Field, field_validator, model_validator

from optimizer.blocks import find_blocks
from optimizer.errors import CalibrationError, OptionError
from optimizer.gate import LEFT_OUT
from optimizer.graph import remove_dead
from optimizer.pass_base import Context, Exactness, GraphPass, PassOptions, Report, Skip
from optimizer.structure import Block
from optimizer.targets import get_target
from optimizer.tokens import schedule
from optimizer.tokens.emit import NOTE
from optimizer.tokens.flow import Flow, Keeps
from optimizer.tokens.rewrite import Method, Settings, write
from optimizer.tokens.search import Costs, Search
from optimizer.tokens.towers import Tower, find_towers

#: Share of the tokens that is left behind the last layer, where nothing else is asked for.
_KEEP = 0.5


class TokenOptions(PassOptions):
    """Options that all passes have which reduce tokens."""

    r: tuple[int, ...] | None = Field(
        None,
        description="Tokens to remove per layer: one number for all layers, or a list with one per "
        "layer; default: as many as 'keep' asks for.",
    )
    slope: float = Field(
        0.0,
        ge=-1,
        le=1,
        description="r rises over the layers from r(1-slope) to r(1+slope); -1 removes most tokens "
        "first.",
    )
    keep: float | None = Field(
        None,
        gt=0,
        le=1,
        description=f"Share of the tokens left behind the last layer, in the place of r; default "
        f"{_KEEP}.",
    )
    search: bool = Field(
        default=False,
        description="Choose the numbers per layer on sample data: as cheap as what r or keep asks "
        "for, with less damage.",
    )
    drift: float | None = Field(
        None,
        gt=0,
        description="Search for the cheapest numbers that damage outputs by at most this (KL "
        "divergence of scores in nats, relative L2 of others).",
    )
    protect: tuple[int, ...] = Field(
        (),
        description="Positions of tokens to protect besides class, distillation and register "
        "tokens, which are found.",
    )
    dense: Literal["give-back", "refuse"] = Field(
        "give-back",
        description="Where something behind needs every token: give each the one it was merged "
        "into, or leave the model alone.",
    )
    lowering: Literal["auto", "gather", "matrix"] = Field(
        "auto",
        description="Move tokens by index (ONNX Runtime), or by a product with a matrix "
        "(TensorRT); 'auto' by target.",
    )
    proportional: bool = Field(
        default=True, description="Attention counts a token as often as it stands for."
    )
    places: bool = Field(
        default=False,
        description="Add an output that tells, for each original token, which token it is in now.",
    )

    @field_validator("r", "protect", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(filter(None, value.split(",")))
        return (value,) if isinstance(value, int) else value

    @field_validator("r")
    @classmethod
    def _not_negative(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or min(value) < 0):
            msg = "numbers of tokens, 0 or more, separated by commas"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenOptions:
        if self.r is not None and self.keep is not None:
            msg = "r and keep say the same thing in two ways; give one of them"
            raise ValueError(msg)
        if self.drift is not None and (self.r is not None or self.keep is not None):
            msg = "drift is a budget by itself; leave out r and keep"
            raise ValueError(msg)
        if self.slope and (self.r is None or len(self.r) > 1):
            msg = "slope needs r with one number"
            raise ValueError(msg)
        return self

    def by_index(self, target: str) -> bool:
        """Whether tokens are moved by index."""
        if self.lowering == "auto":
            return get_target(target).runtime == "onnxruntime"
        return self.lowering == "gather"

    def wanted(self, name: str, layers: int, free: int) -> list[int]:
        """Tokens to remove in each of ``layers`` layers, before anything is clipped.

        Args:
            name: Of the pass, for the message.
            layers: L.
            free: Tokens that are not protected.

        Raises:
            OptionError: ``r`` is a list of another length.
        """
        if self.r is None:
            share = _KEEP if self.keep is None else self.keep
            return schedule.keeping(share, free, layers)
        if len(self.r) == 1:
            return schedule.linear(self.r[0], self.slope, layers)
        if len(self.r) != layers:
            raise OptionError(
                f"pass '{name}': option r has {len(self.r)} numbers, but the model has {layers} "
                "layers in a row; give one number per layer, or one for all"
            )
        return list(self.r)


OptionsT = TypeVar("OptionsT", bound=TokenOptions)


class TokenPass(GraphPass[OptionsT]):
    """Base of passes that reduce tokens."""

    exactness = Exactness.APPROXIMATE
    Options: ClassVar[type[PassOptions]] = TokenOptions
    # Layers are recognised, and keys are read, before weights are quantized or packed.
    after = ("canonicalize", "cqil")

    def __init__(self, options: OptionsT | None = None) -> None:
        super().__init__(options)
        if self.options.places:
            self.breaks = frozenset({"outputs"})

    def needs_calibration(self) -> bool:
        """To search."""
        return self.options.search or self.options.drift is not None

    def reduce(
        self,
        model: ir.Model,
        context: Context,
        make: Callable[[Tower], Method],
        keeps: Keeps,
        *,
        protect: Sequence[int] = (),
    ) -> Report:
        """Reduce the tokens of every tower of ``model``, in place.

        Args:
            model: Canonical.
            context: Target and gate.
            make: The way to choose tokens of a tower.
            keeps: What that way keeps.
            protect: Positions that it needs protected.

        Raises:
            OptionError: ``r`` is a list of another length than the tower.
        """
        protected = (*self.options.protect, *protect)
        if NOTE in model.metadata_props:
            why = Skip("model", "its tokens are reduced already")
            return Report(modified=False, skipped=(why,))
        structure = find_blocks(model)
        missed = [Skip(site, reason) for site, reason in structure.misses]
        log = _Log([], missed, [], [], structure.blocks)
        towers, refused = find_towers(model, structure.blocks, protected, keeps)
        log.skipped.extend(refused)
        for tower in towers:
            _reduce_tower(model, tower, context, self.options, self.name, make(tower), log)
        if log.sites:
            remove_dead(model)
            model.metadata_props[NOTE] = self.name
        elif not structure.blocks and not structure.misses:
            log.skipped.append(Skip("model", "it has no transformer layers"))
        return log.report()


@dataclass
class _Log:
    """What was done, and what was not."""

    sites: list[str]
    skipped: list[Skip]
    notes: list[str]
    towers: list[dict[str, Any]]
    blocks: tuple[Block, ...]
    fewer: set[ir.Value] = field(default_factory=set)

    def report(self) -> Report:
        """As the pass returns it."""
        return Report(
            modified=bool(self.sites),
            applied=len(self.sites),
            skipped=tuple(self.skipped),
            sites=tuple(self.sites),
            details={"towers": self.towers},
            notes=tuple(self.notes),
        )

    def skip(self, blocks: Sequence[Block], reason: str) -> None:
        self.skipped.extend(Skip(_site(block), reason) for block in blocks)


def _site(block: Block) -> str:
    return f"layer {block.index}"


def _readers(flow: Flow, blocks: Sequence[Block]) -> list[int]:
    """Layers outside of the tower whose attention reads the tokens that are left."""
    nodes = {attend.node for attend in flow.attends}
    return [
        b.index
        for b in blocks
        if b.attention.node in nodes or (b.cross is not None and b.cross.node in nodes)
    ]


def _limit(method: Method, tower: Tower, count: int) -> int:
    """The most tokens that can be removed from ``count``; protected ones come first then."""
    first = tuple(range(len(tower.protected)))
    return method.limit(count, tower.protected if count == tower.count else first)


def _searched(
    model: ir.Model,
    tower: Tower,
    context: Context,
    options: TokenOptions,
    name: str,
    method: Method,
    wanted: list[int],
) -> list[int]:
    """Numbers per layer that were chosen on the calibration data."""
    calibration = context.calibration
    if calibration is None:
        raise CalibrationError(
            f"pass '{name}': a search measures the outputs on sample data; add --calibration "
            "FILE.npz with one array per model input."
        )
    reference = calibration.reference(model)
    first = tower.blocks[0].index

    def damage(removed: Sequence[int]) -> float:
        copy = model.clone()
        towers, _ = find_towers(copy, find_blocks(copy).blocks, tower.protected, tower.keeps)
        same = next(t for t in towers if t.blocks[0].index == first)
        write(copy, same, removed, method, Settings(options.proportional))
        remove_dead(copy)
        found = calibration.drift(reference, copy)
        return found.relative_l2 if found.kl is None else found.kl

    costs = Costs.of(tower.blocks, tower.count)
    search = Search(costs, lambda count: _limit(method, tower, count), damage)
    if options.drift is not None:
        return list(search.within_damage(options.drift))
    return list(search.within_cost(wanted))


def _reduce_tower(
    model: ir.Model,
    tower: Tower,
    context: Context,
    options: TokenOptions,
    name: str,
    method: Method,
    log: _Log,
) -> None:
    blocks, free = tower.blocks, tower.count - len(tower.protected)
    if any(block.hidden in log.fewer for block in blocks):
        log.skip(blocks, "it reads tokens that were reduced before")
        return
    if tower.dense and options.dense == "refuse":
        log.skip(blocks, f"{' and '.join(tower.dense)} needs every token")
        return
    if free < 2:
        log.skip(blocks, f"fewer than two of {tower.count} tokens are not protected")
        return
    fault = method.fault(tower.count, tower.protected)
    if fault is not None:
        log.skip(blocks, fault)
        return
    wanted = options.wanted(name, len(blocks), free)
    numbers, less = schedule.clipped(wanted, tower.count, lambda n: _limit(method, tower, n))
    if options.search or options.drift is not None:
        key = f"schedule {blocks[0].index}"
        numbers = context.gate.decide(
            key, lambda: _searched(model, tower, context, options, name, method, numbers)
        )
        less = []
    if less:
        layers = ", ".join(str(blocks[i].index) for i in less)
        log.notes.append(
            f"fewer tokens than asked for were removed in layer {layers}: too few were left"
        )
    for index, block in enumerate(blocks):
        if numbers[index] and not context.gate.allow(_site(block)):
            numbers[index] = 0
            log.skipped.append(Skip(_site(block), LEFT_OUT))
    taken = [_site(b) for b, r in zip(blocks, numbers, strict=True) if r]
    if not taken:
        return
    places = f"token_places{len(log.towers) or ''}" if options.places else None
    flow = write(model, tower, numbers, method, Settings(options.proportional, places))
    log.fewer.update(flow.rows)
    if tower.apart is not None:
        log.notes.append(f"all tokens are given back before others are joined: {tower.apart}")
    log.sites.extend(taken)
    log.towers.append(
        {
            "layers": [blocks[0].index, blocks[-1].index],
            "tokens": tower.count,
            "left": tower.count - sum(numbers),
            "removed": numbers,
            "protected": list(tower.protected),
            "given_back_to": list(tower.dense),
            "read_by": _readers(flow, log.blocks),
        }
    )
