"""Writes an optimized model and the manifest that says how it was made."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from optimizer.custom_ops.bodies import left_out
from optimizer.model_writer import (
    Companion,
    ExternalData,
    complete_or_nothing,
    manifest_path,
    save_model,
)
from optimizer.onnx_wire import Progress


def write_result(
    model: ir.Model,
    output: Path,
    describe: Callable[[Sequence[tuple[str, str]]], dict[str, Any]],
    *,
    external_data: ExternalData = "auto",
    force: bool = False,
    protected: Sequence[Path] = (),
    sources: Sequence[Path] = (),
    progress: Progress | None = None,
    bodies: bool = True,
) -> tuple[tuple[Path, ...], dict[str, Any]]:
    """Write model, data and manifest: all of them or none.

    Args:
        model: Unchanged.
        output: The ``.onnx`` file.
        describe: Makes the manifest from (file name, SHA-256) of the files written.
        external_data: See ``model_writer.save_model``.
        force: Replace existing files.
        protected: Files that are never replaced.
        sources: Data files of the input.
        progress: Called with (bytes written, bytes in all).
        bodies: Write the bodies of our own operators too.

    Returns:
        The files, the model first and the manifest last, and the manifest's content.

    Raises:
        OptionError: The output exists or is an input.
        ExportError: The system refused to write.
    """
    manifest: dict[str, Any] = {}

    def content(outputs: Sequence[tuple[str, str]]) -> bytes:
        manifest.update(describe(outputs))
        return f"{json.dumps(manifest, indent=1, sort_keys=True)}\n".encode()

    with contextlib.nullcontext() if bodies else left_out(model):
        files = save_model(
            model,
            output,
            external_data,
            force=force,
            protected=protected,
            sources=sources,
            companion=Companion(manifest_path(output), content),
            progress=progress,
        )
    return files, manifest


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it.

    Raises:
        ExportError: The system refused to write.
    """
    content = text.encode()
    with complete_or_nothing((path,), len(content)) as (file,):
        file.write(content)
