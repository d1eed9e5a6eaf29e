"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


def parse_size(text: str) -> int:
    """Bytes in ``8GB``, ``512MB`` or a plain number."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in units:
        msg = f"found '{text}', expected a size such as 8GB or 512MB"
        raise click.BadParameter(msg)
    return int(float(match[1]) * units[match[2].upper()])


def combine(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several decorators as one, in the order of the help."""

    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


model_options = combine(
    click.argument("model"),
    click.option(
        "-p",
        "--passes",
        multiple=True,
        metavar="LIST",
        help="Passes in order: name or name:option=value;option=value, separated by commas. "
        "Without it only the exact clean-up runs.",
    ),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="PASS.OPTION=VALUE",
        help="Set an option of a pass (repeatable).",
    ),
    click.option("--recipe", type=FILE, metavar="FILE", help="Passes and options from a file."),
    click.option("--target", metavar="NAME", help="Runtime the result is for.  [default: ort-cpu]"),
    click.option("--opset", type=int, metavar="N", help="Opset of the result."),
    click.option(
        "--kv-cache",
        type=click.Choice(["append", "in-place"]),
        help="Form of the KV cache of grouped layers.  [default: append]",
    ),
    click.option("--with-cache", is_flag=True, help="Export a hf: text decoder with its KV cache."),
    click.option("--task", metavar="NAME", help="Task or tower of a hf: model."),
    click.option(
        "--custom-ops",
        type=FILE,
        multiple=True,
        metavar="LIB",
        help="Library of custom operators in the model (repeatable).",
    ),
)

data_options = combine(
    click.option(
        "--calibration",
        metavar="DATA",
        help="Sample data: FILE.npz, a folder of .npz, module:function, or 'self' (a language "
        "model writes its own).  [default: MODEL.calibration.npz where it exists]",
    ),
    click.option(
        "--eval",
        "evaluation",
        metavar="DATA",
        help="Held-out data that drift is measured on.  [default: MODEL.eval.npz, else the "
        "calibration data]",
    ),
    click.option("--samples", type=int, metavar="N", help="Use the first N samples."),
    click.option("--batch", type=int, metavar="N", help="Samples per run."),
)

memory_option = click.option(
    "--max-memory",
    metavar="SIZE",
    callback=lambda _ctx, _param, text: None if text is None else parse_size(text),
    help="Prove exact passes within this much memory, such as 8GB.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1), default=1, help="Threads of every run.  [default: 1]"
)
