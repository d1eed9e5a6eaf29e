"""The commands that read models: bench, check, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from optimizer.errors import EXIT_BUDGET, EXIT_DONE, EXIT_VERIFICATION

_FILE = click.Path(path_type=Path)


def parse_shapes(
    _ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]
) -> dict[str, int]:
    """``NAME=N`` words as a mapping."""
    found = {}
    for word in values:
        name, _, size = word.partition("=")
        if not name or not size.isdecimal():
            msg = f"found '{word}', expected NAME=N, such as sequence=128"
            raise click.BadParameter(msg)
        found[name] = int(size)
    return found


shape_option = click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=N",
    callback=parse_shapes,
    help="Length of a dynamic axis when measuring latency: batch, sequence, past, or the axis's "
    "name (repeatable).",
)
_HELP = {"help_option_names": ["-h", "--help"]}
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
_data = click.option("--eval", "data", metavar="DATA", help="Sample data; see 'optimize --help'.")
_samples = click.option("--samples", type=int, metavar="N", help="Use the first N samples.")
_custom_ops = click.option(
    "--custom-ops", type=_FILE, multiple=True, metavar="LIB", help="Library of custom operators."
)
_plugins = click.option(
    "--plugin",
    "plugins",
    type=_FILE,
    multiple=True,
    metavar="LIB",
    help="Plugin library of an engine (repeatable); those it was built with are found by itself.",
)
_threads = click.option("--threads", type=click.IntRange(1), default=1, show_default=True)


@click.command("inspect", context_settings=_HELP)
@click.argument("model", type=_FILE)
@_custom_ops
@_json
@click.option(
    "--tokens",
    type=_FILE,
    metavar="DATA",
    help="Draw which patches of an image were merged, for a model with the output token_places.",
)
@click.option("--sample", type=click.IntRange(0), default=0, help="Which image of DATA.")
@click.option(
    "-o", "--output", type=_FILE, metavar="PNG", help="The picture; default MODEL.tokens.png."
)
def inspect_command(
    model: Path,
    custom_ops: tuple[Path, ...],
    as_json: bool,  # noqa: FBT001
    tokens: Path | None,
    sample: int,
    output: Path | None,
) -> int:
    """Show what is in MODEL: inputs, outputs, operators, blocks, sizes, provenance.

    Of a TensorRT engine: what it needs, and what this machine has.
    """
    from optimizer.cli import screen
    from optimizer.engines.plan import is_engine

    if is_engine(model):
        from optimizer.engine_inspection import describe_engine

        found = describe_engine(model)
        if as_json:
            screen.print_json(found)
        else:
            click.echo(f"{model}: {found['text']}")
        return EXIT_DONE
    from optimizer.inspection import describe_model

    if tokens is not None:
        from optimizer.token_picture import picture

        target = output or model.with_suffix(".tokens.png")
        found = {"picture": str(target), **picture(model, tokens, target, sample=sample)}
        if as_json:
            screen.print_json(found)
        else:
            screen.print_tokens(found)
        return EXIT_DONE
    content = describe_model(model, custom_ops)
    if as_json:
        screen.print_json(content)
    else:
        screen.print_description(content)
    return EXIT_DONE


@click.command("check", context_settings=_HELP)
@click.argument("first", metavar="A", type=_FILE)
@click.argument("second", metavar="B", type=_FILE)
@click.option(
    "--budget",
    metavar="LIMITS",
    default="relative_l2<=1e-4",
    show_default=True,
    help="Largest drift of B from A.",
)
@_data
@_samples
@_threads
@_custom_ops
@_plugins
@_json
def check_command(first: Path, second: Path, budget: str, as_json: bool, **options: Any) -> int:  # noqa: FBT001
    """Compare the outputs of A and B on sample data; exit 3 if B drifts further than LIMITS.

    Each is an ONNX model, which ONNX Runtime runs on the CPU, or a TensorRT engine, which
    needs a GPU. Without --eval, A.eval.npz or A.calibration.npz beside A is used, else random
    inputs.
    """
    from optimizer.budget import Budget
    from optimizer.cli import screen
    from optimizer.comparison import compare

    limits = Budget.parse(budget)
    result = compare(first, second, **options)
    failures = limits.failures(result.drift)
    if as_json:
        screen.print_json(
            {
                "drift": result.drift.as_dict(),
                "samples": result.samples,
                "data": result.source,
                "budget": budget,
                "failures": failures,
            }
        )
    else:
        click.echo(f"{result.samples} samples from {result.source}")
        click.echo(f"drift: {screen.drift_text(result.drift)}")
        click.echo("same within " + budget if not failures else "differs: " + "; ".join(failures))
    return EXIT_VERIFICATION if failures else EXIT_DONE


@click.command("bench", context_settings=_HELP)
@click.argument("models", metavar="A [B ...]", type=_FILE, nargs=-1, required=True)
@shape_option
@click.option(
    "--target",
    type=click.Choice(["ort-cpu", "ort-cuda"]),
    default="ort-cpu",
    show_default=True,
    help="What ONNX Runtime runs ONNX models on.",
)
@_threads
@click.option("--rounds", type=click.IntRange(3), default=30, show_default=True)
@click.option(
    "--require-speedup", type=float, metavar="X", help="Exit 4 unless the last is X times faster."
)
@_custom_ops
@_plugins
@_json
def bench_command(models: tuple[Path, ...], as_json: bool, **options: Any) -> int:  # noqa: FBT001
    """Measure the latency of models, taking turns, against that of the first.

    Each is an ONNX model or a TensorRT engine. Inputs and outputs are in the memory of the device:
    copies between a GPU and the host are not part of a latency.
    """
    from optimizer.benchmark import Setup, benchmark
    from optimizer.calibration import input_specs
    from optimizer.cli import screen
    from optimizer.engines.plan import is_engine
    from optimizer.feeds import Sizes
    from optimizer.model_io import load_model
    from optimizer.progress import start_listening
    from optimizer.targets import get_target

    required, rounds = options.pop("require_speedup"), options.pop("rounds")
    sizes = Sizes.parse(options.pop("shapes"))
    device = get_target(options.pop("target")).device
    with start_listening(quiet=as_json, verbose=False) as listener:
        loaded = [
            load_model(path, options["custom_ops"], check_numbers=False)
            for path in models
            if not is_engine(path)
        ]
        specs = [spec for model in loaded[:1] for spec in input_specs(model)]
        listener.stage("measuring latency")
        setup = Setup(
            sizes=sizes,
            vocabulary=next((s.vocab for s in specs if s.vocab is not None), None),
            axes={spec.name: spec.shape for spec in specs},
            device=device,
            **options,
        )
        result = benchmark(models, setup, rounds=rounds, progress=listener.progress)
    if as_json:
        screen.print_json(result.as_dict())
    else:
        screen.print_bench(result)
    if required is not None and result.speedup() < required:
        click.echo(
            f"optimize: {result.speedup():.3g} times as fast, {required:g} required", err=True
        )
        return EXIT_BUDGET
    return EXIT_DONE
