"""The default command: optimize one model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from optimizer.cli.tools import shape_option
from optimizer.errors import EXIT_BUDGET, EXIT_DONE

_Command = TypeVar("_Command", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path)


def parse_size(text: str) -> int:
    """Bytes in ``8GB``, ``512MB`` or a plain number."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in units:
        msg = f"found '{text}', expected a size such as 8GB or 512MB"
        raise click.BadParameter(msg)
    return int(float(match[1]) * units[match[2].upper()])


def _options(*decorators: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def apply(command: _Command) -> _Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


_what = _options(
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
    click.option("--recipe", type=_FILE, metavar="FILE", help="Passes and options from a file."),
    click.option(
        "--save-recipe", type=_FILE, metavar="FILE", help="Write the complete recipe to a file."
    ),
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
        type=_FILE,
        multiple=True,
        metavar="LIB",
        help="Library of custom operators in the model (repeatable).",
    ),
)

_data = _options(
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

_proof = _options(
    click.option(
        "--verify",
        type=click.Choice(["off", "final", "each"]),
        help="When the numbers are checked.  [default: each]",
    ),
    click.option(
        "--budget",
        metavar="LIMITS",
        help="Largest drift, such as top1>=0.98,perplexity<=+2%,relative_l2<=0.05,kl<=0.01; "
        "exit 4 if missed.",
    ),
    click.option(
        "--require-speedup",
        type=float,
        metavar="X",
        help="Measure, and exit 4 unless the result is X times as fast.",
    ),
    click.option("--bench", is_flag=True, help="Measure the latency before and after."),
    shape_option,
    click.option(
        "--keep", is_flag=True, help="Write the result although it misses budget or speed-up."
    ),
    click.option("--fail-on-noop", is_flag=True, help="Exit 5 if no named pass matched anything."),
    click.option(
        "--max-memory",
        metavar="SIZE",
        callback=lambda _ctx, _param, text: None if text is None else parse_size(text),
        help="Verify without exceeding this much memory, such as 8GB.",
    ),
    click.option(
        "--threads", type=click.IntRange(1), default=1, help="Threads of every run.  [default: 1]"
    ),
)

_out = _options(
    click.option(
        "-o", "--output", type=_FILE, metavar="FILE", help="[default: MODEL.opt.onnx beside MODEL]"
    ),
    click.option("--force", is_flag=True, help="Replace an existing output, never the input."),
    click.option(
        "--external-data",
        type=click.Choice(["auto", "always", "never"]),
        help="Write weights to a file of their own.  [default: auto, from 1.5 GB on]",
    ),
    click.option(
        "--dry-run", is_flag=True, help="Say which pass would match where; write nothing."
    ),
    click.option("--explain", is_flag=True, help="List every site left alone, with the reason."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
    click.option("-v", "--verbose", is_flag=True, help="Print details and tracebacks."),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@_what
@_data
@_proof
@_out
def run(model: str, **options: Any) -> int:
    """Optimize MODEL: FILE.onnx, hf:FOLDER-or-ID, or package.module:factory."""
    from optimizer.cli import screen
    from optimizer.progress import start_listening

    as_json, explain, quiet, verbose = (
        options.pop(key) for key in ("as_json", "explain", "quiet", "verbose")
    )
    passes = ",".join(options.pop("passes"))
    keep = options.pop("keep")
    # Only what was given: the rest comes from the recipe or from the defaults in one place.
    given = {key: value for key, value in options.items() if value is not None}
    with start_listening(quiet=quiet or as_json, verbose=verbose) as listener:
        from optimizer.api import optimize

        result = optimize(model, passes, keep_missed=keep, listener=listener, **given)
    if as_json:
        screen.print_json(screen.result_as_dict(result))
    elif not quiet:
        screen.print_result(result, explain=explain, dry_run=bool(options["dry_run"]))
    if result.report.missed is not None:
        click.echo(f"optimize: {result.report.missed}; written because of --keep", err=True)
        return EXIT_BUDGET
    return EXIT_DONE
