"""One tower, reduced as the options ask for: how many tokens, where, and what is reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer.blocks import find_blocks
from optimizer.calibration import primary_output
from optimizer.errors import CalibrationError
from optimizer.gate import LEFT_OUT
from optimizer.graph import remove_dead
from optimizer.nodes import ancestors
from optimizer.pass_base import Context, Report, Skip
from optimizer.structure import Block
from optimizer.tokens import schedule
from optimizer.tokens.cross_tokens import cross_fault, insert_cross, with_cross
from optimizer.tokens.flow import Flow
from optimizer.tokens.options import TokenOptions
from optimizer.tokens.rewrite import Method, Settings, write
from optimizer.tokens.search import Costs, Search
from optimizer.tokens.towers import Tower, find_towers


@dataclass
class Log:
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
        """Take note that layers were left alone."""
        self.skipped.extend(Skip(_site(block), reason) for block in blocks)

    def tell_readers(self) -> None:
        """Layers that are left alone may read fewer tokens all the same."""
        sites = {f"layer {index}" for tower in self.towers for index in tower["read_by"]}
        for number, skip in enumerate(self.skipped):
            if skip.site in sites:
                reason = (
                    f"it reads the tokens that are left, and none are merged in it: {skip.reason}"
                )
                self.skipped[number] = Skip(skip.site, reason)


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


def _measured(model: ir.Model, tower: Tower) -> str:
    """The output that tells what a schedule damages: the primary one, or one behind the tower."""
    primary, last = primary_output(model), tower.blocks[-1].mlp_add
    behind = [
        str(value.name)
        for value in model.graph.outputs
        if last in ancestors(value)[0] and value.dtype is not None
        and value.dtype.is_floating_point()
    ]  # fmt: skip
    return primary if primary in behind or not behind else behind[0]


@dataclass
class Reduction:
    """One tower and what is to be done with it.

    Attributes:
        model: Canonical; changed in place.
        tower: Of this model.
        context, options, name: Of the pass.
        make: The way to choose tokens of a tower.
        log: What was done with others.
        cross: Cross tokens [layers, D] to write into it, or None.
    """

    model: ir.Model
    tower: Tower
    context: Context
    options: TokenOptions
    name: str
    make: Callable[[Tower], Method]
    log: Log
    cross: np.ndarray | None = None

    def run(self) -> None:
        """Reduce it, or say why not."""
        plan = self.tower if self.cross is None else with_cross(self.tower)
        method = self.make(plan)
        fault = self._fault(plan, method)
        if fault is not None:
            self.log.skip(plan.blocks, fault)
            return
        numbers = self._allowed(plan, self._numbers(plan, method))
        if any(numbers):
            self._write(numbers, method)

    def _fault(self, plan: Tower, method: Method) -> str | None:
        """Why the tower is left alone."""
        tower = self.tower
        if any(block.hidden in self.log.fewer for block in tower.blocks):
            return "it reads tokens that were reduced before"
        if tower.dense and self.options.dense == "refuse":
            return f"{' and '.join(tower.dense)} needs every token"
        if tower.count - len(tower.protected) < 2:
            return f"fewer than two of {tower.count} tokens are not protected"
        return (cross_fault(tower) if self.cross is not None else None) or method.fault(
            plan.count, plan.protected
        )

    def _limit(self, plan: Tower, method: Method, count: int) -> int:
        """The most tokens that can be removed from ``count``; protected ones come first then."""
        first = tuple(range(len(plan.protected)))
        return method.limit(count, plan.protected if count == plan.count else first)

    def _numbers(self, plan: Tower, method: Method) -> list[int]:
        """How many tokens to remove in each layer."""
        blocks = plan.blocks
        wanted = self.options.wanted(self.name, len(blocks), plan.count - len(plan.protected))
        numbers, less = schedule.clipped(wanted, plan.count, lambda n: self._limit(plan, method, n))
        if self.options.search or self.options.drift is not None:
            return self.context.gate.decide(
                f"schedule {blocks[0].index}", lambda: self._searched(plan, method, numbers)
            )
        if less:
            layers = ", ".join(str(blocks[i].index) for i in less)
            self.log.notes.append(
                f"fewer tokens than asked for were removed in layer {layers}: too few were left"
            )
        return numbers

    def _allowed(self, plan: Tower, numbers: list[int]) -> list[int]:
        """``numbers`` with 0 where the gate is closed."""
        for index, block in enumerate(plan.blocks):
            if numbers[index] and not self.context.gate.allow(_site(block)):
                numbers[index] = 0
                self.log.skipped.append(Skip(_site(block), LEFT_OUT))
        return numbers

    def _ready(self, model: ir.Model, tower: Tower) -> Tower:
        """The tower with its cross tokens in place."""
        return tower if self.cross is None else insert_cross(model, tower, self.cross)

    def _searched(self, plan: Tower, method: Method, wanted: list[int]) -> list[int]:
        """Numbers per layer that were chosen on the calibration data."""
        calibration = self.context.calibration
        if calibration is None:
            raise CalibrationError(
                f"pass '{self.name}': a search measures the outputs on sample data; add "
                "--calibration FILE.npz with one array per model input."
            )
        model, tower = self.model, self.tower
        reference = calibration.reference(model, _measured(model, tower))

        def damage(removed: Sequence[int]) -> float:
            copy = model.clone()
            towers, _ = find_towers(copy, find_blocks(copy).blocks, tower.protected, tower.keeps)
            same = next(t for t in towers if t.blocks[0].index == tower.blocks[0].index)
            settings = Settings(self.options.proportional)
            write(copy, self._ready(copy, same), removed, method, settings)
            remove_dead(copy)
            found = calibration.drift(reference, copy)
            return found.relative_l2 if found.kl is None else found.kl

        costs = Costs.of(plan.blocks, plan.count)
        search = Search(costs, lambda count: self._limit(plan, method, count), damage)
        if self.options.drift is not None:
            return list(search.within_damage(self.options.drift))
        return list(search.within_cost(wanted))

    def _write(self, numbers: list[int], method: Method) -> None:
        log, count = self.log, self.tower.count
        places = f"token_places{len(log.towers) or ''}" if self.options.places else None
        tower = self._ready(self.model, self.tower)
        settings = Settings(self.options.proportional, places, count)
        flow = write(self.model, tower, numbers, method, settings)
        log.fewer.update(flow.rows)
        if tower.apart is not None:
            log.notes.append(f"all tokens are given back before others are joined: {tower.apart}")
        log.sites.extend(_site(b) for b, r in zip(tower.blocks, numbers, strict=True) if r)
        log.towers.append(
            {
                "layers": [tower.blocks[0].index, tower.blocks[-1].index],
                "tokens": tower.count,
                "left": tower.count - sum(numbers),
                "removed": numbers,
                "protected": list(tower.protected),
                "given_back_to": list(tower.dense),
                "read_by": _readers(flow, log.blocks),
                "cross_token": tower.cross,
                "end_protected": tower.taken is not None,
            }
        )
