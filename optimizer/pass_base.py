"""What a pass is: a name, options, an exactness, and a rewrite that reports what it did.

A pass finds its sites, refuses a site with a reason, rewrites the rest. It reads structure from
``optimizer.blocks``, data through ``Context``, and never imports another pass.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from optimizer.gate import OPEN, Gate
from optimizer.listener import Listener, Silent

if TYPE_CHECKING:
    from optimizer.calibration import Calibration


class Exactness(enum.Enum):
    """How far a pass may move the outputs of the model.

    BITWISE: outputs are equal bit by bit.
    REASSOCIATED: equal in exact arithmetic; floating-point sums may be ordered differently.
    APPROXIMATE: the function itself changes; the drift is measured and reported.
    """

    BITWISE = "bitwise"
    REASSOCIATED = "reassociated"
    APPROXIMATE = "approximate"


class PassOptions(BaseModel):
    """Base of every pass's ``Options``: frozen, unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


OptionsT = TypeVar("OptionsT", bound=PassOptions)


@dataclass(frozen=True)
class Skip:
    """One site that a pass left alone.

    Attributes:
        site: Name of the node, block or group.
        reason: Why, as a sentence fragment a user understands.
    """

    site: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What one run of a pass did.

    Attributes:
        modified: Whether the graph changed at all.
        applied: Number of sites rewritten.
        skipped: Sites left alone, each with its reason.
        sites: Names of the rewritten sites, in graph order.
        details: JSON-compatible facts for the manifest (chosen groups, scales' range, ...).
        notes: What the user should know about the result as a whole, as sentences without a dot.
    """

    modified: bool
    applied: int = 0
    skipped: tuple[Skip, ...] = ()
    sites: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass
class Context:
    """What the pipeline gives a pass besides the model.

    Attributes:
        target: Name of the target the result is meant for (``optimizer.targets``).
        opset: Of the result, where the user asks for one.
        calibration: Sample data bound to a runner, or None where the user gave none.
        evaluation: Held-out data that drift is reported on; a pass decides on it only where there
            is no calibration data.
        listener: Is told how far long work is.
        gate: Is to be asked before each site is rewritten, so that ``optimize bisect`` can leave
            some out: ``if not context.gate.allow(name)``, it is a ``Skip(name, LEFT_OUT)``.
    """

    target: str = "ort-cpu"
    opset: int | None = None
    calibration: Calibration | None = None
    evaluation: Calibration | None = None
    listener: Listener = field(default_factory=Silent)
    gate: Gate = OPEN


class GraphPass(Generic[OptionsT]):
    """Base class of every pass.

    Class attributes are readable without running anything; ``Options`` is the only definition of
    the options for command line, recipe files and Python. What is no ``ClassVar`` an instance may
    state anew for its own options.
    """

    name: ClassVar[str]
    exactness: Exactness
    Options: ClassVar[type[PassOptions]] = PassOptions
    #: Passes that must not come later in a recipe than this one.
    after: ClassVar[tuple[str, ...]] = ()
    #: Operators of other domains that this pass may emit, as (domain, op type).
    emits: tuple[tuple[str, str], ...] = ()
    #: Invariants this pass may change: "inputs", "outputs" (names, types and shapes of graph inputs
    #: and outputs), "input types", "output types" (their element types alone).
    breaks: frozenset[str] = frozenset()
    #: Whether it reads the canonical dialect; otherwise it may also stand before ``canonicalize``.
    canonical: ClassVar[bool] = True
    #: Whether a second run right after the first changes nothing.
    idempotent: ClassVar[bool] = True

    def __init__(self, options: OptionsT | None = None) -> None:
        self.options: OptionsT = options if options is not None else self.Options()  # type: ignore[assignment]

    def needs_calibration(self) -> bool:
        """Whether these options require sample data."""
        return False

    def call(self, model: ir.Model, context: Context) -> Report:
        """Rewrite ``model`` in place.

        Raises:
            OptimizerError: Only for faults of the user's data or options; a site that cannot be
                rewritten is a ``Skip``.
        """
        raise NotImplementedError
