"""What the process that builds is asked for, as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.engines.profiles import Profile


@dataclass(frozen=True)
class BuildRequest:
    """One build.

    Attributes:
        flavour: Of ``engines.flavours``.
        model: The legalized ONNX file.
        output: Where the process writes the plan.
        profiles: See ``engines.profiles``.
        capabilities: Compute capabilities; empty = the GPU of this machine.
        plugins: Libraries to load, each once.
        custom: (node, domain, operator) of nodes that need a plugin.
        timing_cache: Read if it is there.
        new_timing_cache: Where the process writes the cache after the build.
        hardware_compatible: Ampere and later (full TensorRT).
        version_compatible: Later versions of the same major load it (full TensorRT).
        max_memory: Bytes of the host's memory that the process may allocate; None = no limit.
    """

    flavour: str
    model: str
    output: str
    profiles: list[Profile] = dataclasses.field(default_factory=list)
    capabilities: tuple[int, ...] = ()
    plugins: tuple[str, ...] = ()
    custom: tuple[tuple[str, str, str], ...] = ()
    timing_cache: str | None = None
    new_timing_cache: str | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    max_memory: int | None = None

    def write(self, path: Path) -> None:
        """For ``read``."""
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def read(path: Path) -> BuildRequest:
        """What ``write`` wrote."""
        content: dict[str, Any] = json.loads(path.read_text())
        return BuildRequest(**content)
