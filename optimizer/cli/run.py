"""The default command: optimize one model."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from optimizer.cli.build import print_engine
from optimizer.cli.options import (
    FILE,
    combine,
    data_options,
    memory_option,
    model_options,
    threads_option,
)
from optimizer.cli.tools import shape_option
from optimizer.errors import EXIT_BUDGET, EXIT_DONE, OptionError, VerificationError
from optimizer.targets import DEFAULT_TARGET

if TYPE_CHECKING:
    from optimizer.engine_job import EngineOptions, EngineResult
    from optimizer.job import Result
    from optimizer.listener import Listener

_proof = combine(
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
    memory_option,
    threads_option,
)

_out = combine(
    click.option(
        "--save-recipe", type=FILE, metavar="FILE", help="Write the complete recipe to a file."
    ),
    click.option(
        "-o", "--output", type=FILE, metavar="FILE", help="[default: MODEL.opt.onnx beside MODEL]"
    ),
    click.option("--force", is_flag=True, help="Replace an existing output, never the input."),
    click.option(
        "--external-data",
        type=click.Choice(["auto", "always", "never"]),
        help="Write weights to a file of their own.  [default: auto, from 1.5 GB on]",
    ),
    click.option(
        "--engine",
        type=FILE,
        metavar="FILE",
        help="As the last step, build a TensorRT engine of the result; see 'optimize build'.",
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
@model_options
@data_options
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
    engine = _engine_options(options)
    # Only what was given: the rest comes from the recipe or from the defaults in one place.
    given = {key: value for key, value in options.items() if value is not None}
    with start_listening(quiet=quiet or as_json, verbose=verbose) as listener:
        from optimizer.api import optimize

        try:
            result = optimize(model, passes, keep_missed=keep, listener=listener, **given)
        except VerificationError as error:
            error.add_note(f"next: {bisect_words()}")
            raise
        made = None if engine is None else _build(result, engine, listener, keep=keep, **given)
    if as_json:
        extra = {} if made is None else {"engine": made.manifest}
        screen.print_json({**screen.result_as_dict(result), **extra})
    elif not quiet:
        dry_run = bool(options["dry_run"])
        screen.print_result(result, explain=explain, dry_run=dry_run, hint=made is None)
        if made is not None:
            print_engine(model, made.manifest, made.files)
    missed = None if made is None else made.manifest["checked"].get("missed")
    if missed:
        click.echo(f"optimize: {missed}; written because of --keep", err=True)
        return EXIT_BUDGET
    if result.report.missed is not None:
        click.echo(f"optimize: {result.report.missed}; written because of --keep", err=True)
        return EXIT_BUDGET
    return EXIT_DONE


def _engine_options(options: dict[str, Any]) -> EngineOptions | None:
    """What ``--engine`` asks for, refused here where it cannot be had."""
    output = options.pop("engine")
    if output is None:
        return None
    if options["dry_run"]:
        raise OptionError("--engine: nothing is built with --dry-run; drop one of the two")
    from optimizer.engine_job import EngineOptions, check_engine

    engine = EngineOptions(output, force=options["force"], max_memory=options["max_memory"])
    check_engine(options["target"] or DEFAULT_TARGET, engine)
    return engine


def _build(
    result: Result, engine: EngineOptions, listener: Listener, *, keep: bool, **given: Any
) -> EngineResult:
    from optimizer.engine_job import build_result

    return build_result(result, engine, listener, keep_missed=keep, **given)


def bisect_words() -> str:
    """The command line that finds out which rewrite of the current command is wrong."""
    from optimizer.cli.bisect import bisect_command

    given = click.get_current_context().params
    words = ["optimize", "bisect", str(given["model"])]
    for option in bisect_command.params:
        value = given.get(str(option.name))
        if not isinstance(option, click.Option) or value in (None, False, ()):
            continue
        if option.name in ("budget", "as_json", "quiet", "verbose") or value == option.default:
            continue
        if option.is_flag:
            words.append(option.opts[-1])
            continue
        for item in value if option.multiple else (value,):
            words += [option.opts[-1], str(item)]
    return shlex.join(words)
