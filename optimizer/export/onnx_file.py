"""Writes an optimized model and the manifest that says how it was made."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from optimizer.model_io import hash_file, save_model
from optimizer.model_writer import ExternalData, complete_or_nothing
from optimizer.onnx_wire import Progress


def manifest_path(output: Path) -> Path:
    """Where the manifest of a model written to ``output`` goes."""
    return output.with_name(output.name + ".manifest.json")


def write_result(
    model: ir.Model,
    output: Path,
    describe: Callable[[Sequence[tuple[str, str]]], dict[str, Any]],
    *,
    external_data: ExternalData = "auto",
    force: bool = False,
    protected: Sequence[Path] = (),
    progress: Progress | None = None,
) -> tuple[tuple[Path, ...], dict[str, Any]]:
    """Write model, data and manifest: all of them or none.

    Args:
        model: Unchanged.
        output: The ``.onnx`` file.
        describe: Makes the manifest from (file name, SHA-256) of the files written.
        external_data: See ``model_writer.save_model``.
        force: Replace existing files.
        protected: Files that are never replaced.
        progress: Called with (bytes written, bytes in all).

    Returns:
        The files, the model first and the manifest last, and the manifest's content.

    Raises:
        OptionError: The output exists or is an input.
        ExportError: The system refused to write.
    """
    files = save_model(
        model, output, external_data, force=force, protected=protected, progress=progress
    )
    target = manifest_path(output)
    try:
        manifest = describe([(item.name, hash_file(item)) for item in files])
        write_text(target, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    except BaseException:
        for item in files:
            item.unlink(missing_ok=True)
        raise
    return (*files, target), manifest


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it.

    Raises:
        ExportError: The system refused to write.
    """
    content = text.encode()
    with complete_or_nothing((path,), len(content)) as (file,):
        file.write(content)
