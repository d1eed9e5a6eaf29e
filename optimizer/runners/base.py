"""The interface that calibration, verification and benchmarks see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias

import numpy as np

from optimizer.samples import InputSpec

#: Model inputs or outputs by name.
Feed: TypeAlias = Mapping[str, np.ndarray]


class Runner(Protocol):
    """Executes one model."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs that a feed must hold."""
        ...

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the model's order."""
        ...

    def run(self, feed: Feed) -> dict[str, np.ndarray]:
        """Run once and return every output by name."""
        ...


class SpecifiedRunner(Runner, Protocol):
    """A runner that knows what its inputs accept.

    Attributes:
        inputs: Names, types and shapes.
    """

    inputs: tuple[InputSpec, ...]
