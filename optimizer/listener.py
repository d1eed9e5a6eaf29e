"""Who is told how far a run is."""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    """Who is told how far a run is."""

    def stage(self, title: str) -> None:
        """A new stage begins."""

    def progress(self, done: int, total: int) -> None:
        """Part of the stage is done."""

    def note(self, text: str) -> None:
        """Something the user should know."""


class Silent:
    """A listener that ignores everything."""

    def stage(self, title: str) -> None:
        """Ignore."""

    def progress(self, done: int, total: int) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""
