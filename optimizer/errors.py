"""Errors of the whole package: one root, children by whose fault it is.

Every message says where (pass, node, file), what was found, what was expected and what to
do about it. The command line prints the message and ends with ``exit_code``; a traceback is
only ever shown for errors that are not of these classes.
"""

from __future__ import annotations

import traceback
from pathlib import Path

EXIT_DONE = 0
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_VERIFICATION = 3
EXIT_BUDGET = 4
EXIT_NOOP = 5
EXIT_DEPENDENCY = 6
EXIT_ENGINE = 7
EXIT_INTERRUPTED = 130


#: Longer messages are cut in the middle: four lines of a wide terminal.
_LONGEST = 600


def printable(text: str) -> str:
    """``text`` on one line, without anything that a terminal would obey.

    Names in a model are the model's; printed as they are they could move the cursor, change the
    title, or hide what follows.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class OptimizerError(Exception):
    """Root of all errors raised on purpose.

    Args:
        message: One sentence; made printable, and cut where it is very long.
    """

    exit_code = EXIT_INTERNAL

    def __init__(self, message: str = "") -> None:
        text = printable(message)
        if len(text) > _LONGEST:
            half = _LONGEST // 2
            text = f"{text[:half]} ... {text[-half:]}"
        super().__init__(text)


class OptionError(OptimizerError):
    """A command-line or pass option that does not exist or has a wrong value."""

    exit_code = EXIT_USAGE


class RecipeError(OptionError):
    """A recipe file that cannot be read, or passes in an order that is not allowed."""


class ModelError(OptimizerError):
    """The input model is missing, damaged or not a valid model."""

    exit_code = EXIT_USAGE


class CalibrationError(OptimizerError):
    """Sample data is missing or does not fit the model."""

    exit_code = EXIT_USAGE


class UnsupportedError(OptimizerError):
    """The input is valid, but outside of what this tool can do."""

    exit_code = EXIT_USAGE


class PassContractError(OptimizerError):
    """A pass broke an invariant of the graph: a defect of the pass, not of the input."""

    exit_code = EXIT_INTERNAL


class ScriptError(OptimizerError):
    """A script of the user's failed, or broke the graph it was given."""

    exit_code = EXIT_USAGE


class VerificationError(OptimizerError):
    """A pass changed the numbers by more than its declared exactness allows."""

    exit_code = EXIT_VERIFICATION


class BudgetError(OptimizerError):
    """The result is valid but misses the drift budget or the required speed-up."""

    exit_code = EXIT_BUDGET


class NoopError(OptimizerError):
    """No pass matched anything and the user asked for that to be an error."""

    exit_code = EXIT_NOOP


class MissingDependencyError(OptimizerError):
    """A package or library is not installed, or its version does not fit."""

    exit_code = EXIT_DEPENDENCY


class EngineError(OptimizerError):
    """TensorRT made no engine of the model, or an engine cannot be used here."""

    exit_code = EXIT_ENGINE


class ExportError(OptimizerError):
    """The result could not be written (disk full, no permission, ...)."""

    exit_code = EXIT_INTERNAL


def place_of(error: BaseException, file: Path | None = None) -> str:
    """``file:line`` of the last step of a failure; of the last one in ``file`` where it is given.

    A failure that did not pass through ``file`` is placed at the file as a whole.
    """
    frames = list(traceback.extract_tb(error.__traceback__))
    if file is not None:
        frames = [f for f in frames if Path(f.filename).resolve() == file.resolve()]
    if not frames:
        return str(file)
    return f"{file or Path(frames[-1].filename).name}:{frames[-1].lineno}"
