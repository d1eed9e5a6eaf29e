"""The gate that every rewrite asks, so that a run can be repeated with some rewrites left out.

In a normal run it is open and costs nothing. ``optimizer.bisection`` closes it after the first n
rewrites, for one of them, or for all but one. A pass asks ``context.gate``; the rules of
``canonicalize`` and ``legalize``, which know no context, ask the gate in force (``using``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

#: Why a pass skipped a site that the gate refused.
LEFT_OUT = "left out by bisect"

T = TypeVar("T")


@dataclass(frozen=True)
class Rewrite:
    """One rewrite of a run.

    Attributes:
        site: Name of the node, block or group.
        rule: Which of the pass's rules; empty where it has only one.
    """

    site: str
    rule: str = ""

    def __str__(self) -> str:
        """For a message."""
        return f"{self.site} ({self.rule})" if self.rule else self.site


#: Whether a rewrite is let through, given how many were before it.
Choice: TypeAlias = Callable[[int, Rewrite], bool]


class Gate:
    """Lets everything through."""

    def allow(self, site: str, rule: str = "") -> bool:
        """Whether ``site`` may be rewritten; asked immediately before it is.

        A site that is refused stays as it is, and is a ``Skip(site, LEFT_OUT)`` of the report.
        """
        del site, rule
        return True

    def withdraw(self) -> None:
        """Take the last question back: what was allowed was not done after all."""

    def decide(self, key: str, make: Callable[[], T]) -> T:
        """``make()``, or what it returned in the run that this one repeats.

        For decisions over all sites at once (a search, statistics of activations), which must stay
        what they were when some sites are left out, and may be dear. The result must not be
        changed, and what it refers to in the model must be found again by name.
        """
        del key
        return make()


OPEN = Gate()


class Recorder(Gate):
    """Lets through what ``choose`` says.

    Attributes:
        taken: The rewrites let through, in order.
    """

    def __init__(
        self, choose: Choice | None = None, decisions: dict[str, Any] | None = None
    ) -> None:
        """See the class.

        Args:
            choose: None = everything.
            decisions: Of the run to repeat; is added to.
        """
        self.taken: list[Rewrite] = []
        self._choose = choose
        self._decisions: dict[str, Any] = {} if decisions is None else decisions

    def allow(self, site: str, rule: str = "") -> bool:
        """See ``Gate``."""
        rewrite = Rewrite(site, rule)
        if self._choose is not None and not self._choose(len(self.taken), rewrite):
            return False
        self.taken.append(rewrite)
        return True

    def withdraw(self) -> None:
        """See ``Gate``."""
        self.taken.pop()

    def decide(self, key: str, make: Callable[[], T]) -> T:
        """See ``Gate``."""
        if key not in self._decisions:
            self._decisions[key] = make()
        result: T = self._decisions[key]
        return result


def first(count: int) -> Choice:
    """The first ``count`` rewrites."""
    return lambda taken, _: taken < count


def without(left_out: Rewrite) -> Choice:
    """All but one."""
    return lambda _, rewrite: rewrite != left_out


def only(wanted: Rewrite) -> Choice:
    """One, and those of the same name."""
    return lambda _, rewrite: rewrite == wanted


_GATE: ContextVar[Gate] = ContextVar("gate", default=OPEN)
_RULE: ContextVar[str] = ContextVar("rule", default="")


@contextmanager
def using(gate: Gate) -> Iterator[None]:
    """Let the rules called inside ask ``gate``."""
    token = _GATE.set(gate)
    try:
        yield
    finally:
        _GATE.reset(token)


@contextmanager
def labelled(rule: str) -> Iterator[None]:
    """Rewrites inside belong to ``rule``; inside another one, to its part ``rule``."""
    outer = _RULE.get()
    token = _RULE.set(f"{outer}: {rule}" if outer else rule)
    try:
        yield
    finally:
        _RULE.reset(token)


def in_force() -> Gate:
    """The gate that a rule is to ask."""
    return _GATE.get()


def rule_in_force() -> str:
    """What rewrites belong to."""
    return _RULE.get()
