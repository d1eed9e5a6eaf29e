"""What every rule of ``canonicalize`` returns, and the sweep that applies local rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeVar

import onnx_ir as ir

from optimizer.gate import in_force, rule_in_force
from optimizer.graph import remove_dead

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Miss:
    """A site a rule nearly matched and left alone.

    Attributes:
        site: Name of the node.
        reason: Why, as a sentence fragment a user understands.
    """

    site: str
    reason: str


@dataclass(frozen=True)
class RuleReport:
    """What one run of a rule did.

    Attributes:
        applied: Number of rewrites.
        skipped: Near matches left alone.
    """

    applied: int = 0
    skipped: tuple[Miss, ...] = ()

    @staticmethod
    def total(reports: Iterable[RuleReport]) -> RuleReport:
        """The sum of several reports, skips in order and without repetition."""
        reports = tuple(reports)
        skipped = dict.fromkeys(miss for report in reports for miss in report.skipped)
        return RuleReport(sum(report.applied for report in reports), tuple(skipped))


def allow(where: ir.Node | str, rule: str = "") -> bool:
    """Whether a rule may rewrite here; to be asked where nothing but the rewrite is left to do.

    A rule that is refused goes on as if it had not matched.
    """
    name = where if isinstance(where, str) else site(where)
    return in_force().allow(name, rule or rule_in_force())


def attempt(
    node: ir.Node, rule: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T | Literal[False]:
    """``rule(*args)``, for a rule that looks and rewrites in one, or False where that is refused.

    The rule returns how many rewrites it made (True = 1); any other outcome, such as a reason,
    means none.
    """
    if not allow(node):
        return False
    outcome = rule(*args, **kwargs)
    if not (isinstance(outcome, int) and outcome):
        in_force().withdraw()
    return outcome


#: Rewrites at one node and says whether it did, or why it nearly did.
LocalRule = Callable[[ir.Node], bool | Miss]


def sweep(model: ir.Model, rules: Mapping[str, LocalRule], domain: str = "") -> RuleReport:
    """Offer every node of a domain in the main graph, in order, to the rule for its operator.

    A rule leaves nodes without users behind; they are removed at the end.
    """
    applied, skipped = 0, []
    for node in model.graph:
        rule = rules.get(node.op_type) if node.domain == domain else None
        outcome = attempt(node, rule, node) if rule is not None else False
        if isinstance(outcome, Miss):
            skipped.append(outcome)
        else:
            applied += outcome
    if applied:
        remove_dead(model)
    return RuleReport(applied, tuple(skipped))


def opset_of(model: ir.Model) -> int:
    """Version of the standard operators the model imports."""
    return model.opset_imports.get("", 1)


def site(node: ir.Node) -> str:
    """What a report calls a node: its name, or that of its first output."""
    return node.name or (node.outputs[0].name if node.outputs else None) or node.op_type
