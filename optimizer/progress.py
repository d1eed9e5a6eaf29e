"""Tells the user on stderr how far a run is; silent bars where there is no terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from optimizer.errors import printable
from optimizer.listener import Listener, Silent


class _Lines:
    """Without a terminal: one line per note, one per stage in verbose mode."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose

    def stage(self, title: str) -> None:
        """Print the stage in verbose mode."""
        if self._verbose:
            _say(title)

    def progress(self, done: int, total: int) -> None:
        """Nothing: a log needs no bar."""

    def note(self, text: str) -> None:
        """Print the note."""
        _say(text)


class _Bar:
    """With a terminal: one bar that says what is going on, and vanishes at the end."""

    def __init__(self, bar: Any, *, verbose: bool) -> None:
        self._bar = bar
        self._verbose = verbose
        self._task = bar.add_task("starting", total=None)
        self._started = time.perf_counter()

    def stage(self, title: str) -> None:
        """Show the stage with a fresh bar."""
        if self._verbose:
            line = f"{time.perf_counter() - self._started:7.1f} s  {printable(title)}"
            self._bar.console.print(line, style="dim", markup=False)
        self._bar.reset(self._task, description=printable(title), total=None)

    def progress(self, done: int, total: int) -> None:
        """Fill the bar."""
        self._bar.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        """Print above the bar."""
        self._bar.console.print(printable(text), highlight=False, markup=False)


class _Printable(logging.Formatter):
    """Messages that hold names of a model, on one line each."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Format without anything that a terminal obeys."""
        return printable(super().formatMessage(record))


def _say(text: str) -> None:
    sys.stderr.write(f"{printable(text)}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def start_listening(*, quiet: bool, verbose: bool) -> Iterator[Listener]:
    """A listener for the time of a run.

    Args:
        quiet: Say nothing.
        verbose: Say every stage, and let the library's log through.
    """
    if verbose:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Printable("%(name)s: %(message)s"))
        logging.basicConfig(handlers=[handler])
        for package in ("optimizer", "passes"):
            logging.getLogger(package).setLevel(logging.DEBUG)
    if quiet:
        yield Silent()
        return
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield _Lines(verbose=verbose)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    title = TextColumn("{task.description}", markup=False)  # it may hold a name with brackets
    columns = (SpinnerColumn(), title, BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, verbose=verbose)
