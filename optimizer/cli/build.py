"""The command that builds TensorRT engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from optimizer.cli.options import (
    FILE,
    combine,
    data_options,
    memory_option,
    model_options,
)
from optimizer.errors import EXIT_DONE

engine_options = combine(
    click.option(
        "--shapes",
        multiple=True,
        metavar="NAME:MIN,OPT,MAX",
        help="Shapes of an input, such as input_ids:1x1,1x128,8x512; the n-th mention of an input "
        "is for the n-th profile (repeatable).  [default: from the names of the axes]",
    ),
    click.option(
        "--compute-capability",
        "capabilities",
        type=int,
        multiple=True,
        metavar="N",
        help="GPUs to build for without one: 75, 80, 86, 89, 120, 121 (repeatable; TensorRT for "
        "RTX).  [default: all but 75]",
    ),
    click.option(
        "--plugin",
        "plugins",
        type=FILE,
        multiple=True,
        metavar="LIB",
        help="Plugin library (repeatable); ours is found by itself.",
    ),
    click.option(
        "--timing-cache", type=FILE, metavar="FILE", help="Read and written (full TensorRT)."
    ),
    click.option(
        "--hardware-compatible", is_flag=True, help="For Ampere and later GPUs (full TensorRT)."
    ),
    click.option(
        "--version-compatible", is_flag=True, help="For later versions too (full TensorRT)."
    ),
    click.option("--log", type=FILE, metavar="FILE", help="Write the library's whole log."),
)


@click.command("build", context_settings={"help_option_names": ["-h", "--help"]})
@model_options
@data_options
@click.option(
    "--verify",
    type=click.Choice(["off", "final", "each"]),
    help="When the numbers of the rewritten model are checked.  [default: each]",
)
@engine_options
@memory_option
@click.option(
    "--jetpack",
    metavar="VERSION",
    help="Of the Jetson that --target jetson is for.  [default: 6.2]",
)
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="FILE",
    help="[default: MODEL.engine beside MODEL; for a Jetson the folder MODEL.bundle]",
)
@click.option("--force", is_flag=True, help="Replace an existing output, never the input.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Print details and tracebacks.")
def build_command(model: str, **options: Any) -> int:
    """Optimize MODEL for --target (tensorrt-rtx, tensorrt) and build an engine of it.

    For --target jetson: write a folder that has all it takes to build the engine on the device.
    """
    from optimizer.cli import screen
    from optimizer.engine_job import EngineOptions, build_model
    from optimizer.progress import start_listening

    as_json, quiet, verbose = (options.pop(key) for key in ("as_json", "quiet", "verbose"))
    passes = ",".join(options.pop("passes"))
    target = options.pop("target") or "tensorrt-rtx"
    own = pop_engine_options(options)
    jetpack = options.pop("jetpack")
    if target == "jetson":
        return _bundle(model, passes, jetpack, own, options, quiet=quiet, as_json=as_json)
    if jetpack is not None:
        raise click.UsageError("--jetpack is for --target jetson; leave it out")
    output = options.pop("output") or default_output(model)
    engine = EngineOptions(
        output, force=options.pop("force"), max_memory=options["max_memory"], **own
    )
    given = {key: value for key, value in options.items() if value is not None}
    with start_listening(quiet=quiet or as_json, verbose=verbose) as listener:
        made = build_model(model, passes, target, engine, listener=listener, **given)
    if as_json:
        screen.print_json({"files": [str(item) for item in made.files], **made.manifest})
    elif not quiet:
        print_engine(model, made.manifest, made.files)
    return EXIT_DONE


def _bundle(
    model: str, passes: str, jetpack: str | None, own: dict[str, Any], options: dict[str, Any], *,
    quiet: bool, as_json: bool,
) -> int:  # fmt: skip
    from optimizer.bundle_job import build_bundle
    from optimizer.cli import screen
    from optimizer.progress import start_listening

    useless = [key for key, value in own.items() if value and key != "shapes"]
    if useless:
        name = {"capabilities": "compute-capability", "plugins": "plugin"}.get(
            useless[0], useless[0]
        )
        msg = f"--{name.replace('_', '-')}: a bundle's engine is built on the device; leave it out"
        raise click.UsageError(msg)
    folder = options.pop("output") or default_output(model).with_suffix(".bundle")
    force = options.pop("force")
    given = {key: value for key, value in options.items() if value is not None}
    with start_listening(quiet=quiet or as_json, verbose=False) as listener:
        made = build_bundle(
            model, passes, folder, jetpack=jetpack or "6.2", shapes=own["shapes"], force=force,
            listener=listener, **given,
        )  # fmt: skip
    if as_json:
        screen.print_json({"bundle": str(folder), "files": [str(path) for path in made.files]})
    elif not quiet:
        click.echo(f"wrote {folder} ({len(made.files)} files)")
        click.echo(
            f"next: copy it to the device, and there: cd {folder.name} && python3 build_engine.py"
        )
    return EXIT_DONE


def pop_engine_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of ``engine_options`` out of those of a command."""
    names = (
        "shapes", "capabilities", "plugins", "timing_cache", "hardware_compatible",
        "version_compatible", "log",
    )  # fmt: skip
    return {name: options.pop(name) for name in names}


def default_output(model: str) -> Path:
    """Beside a file, else in the current folder."""
    path = Path(model)
    if path.suffix == ".onnx":
        return path.with_suffix(".engine")
    name = model.removeprefix("hf:").rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return Path(f"{name}.engine")


def print_engine(model: str, manifest: dict[str, Any], files: tuple[Path, ...]) -> None:
    """What was built, in a few lines, and what to do with it."""
    from optimizer.cli.screen import drift_dict_text
    from optimizer.model_writer import size_text

    gpus = manifest["compute_capabilities"]
    where = f"compute capability {', '.join(map(str, gpus))}" if gpus else "the GPU of this machine"
    click.echo(f"{manifest['flavour']} {manifest['version']} engine for {where}")
    counted = sorted(manifest["precisions"].items(), key=lambda item: -item[1])
    click.echo("layers by type: " + ", ".join(f"{name} {count}" for name, count in counted))
    if manifest["plugin_layers"]:
        click.echo(f"plugin layers: {manifest['plugin_layers']}")
    for index, profile in enumerate(manifest["profiles"]):
        shapes = "; ".join(
            f"{name} {', '.join('x'.join(map(str, shape)) for shape in three)}"
            for name, three in profile.items()
        )
        click.echo(f"profile {index}: {shapes}")
    checked = manifest["checked"]
    if "skipped" in checked:
        click.echo(f"engine not run: {checked['skipped']}")
    else:
        drift = drift_dict_text(checked["drift"])
        click.echo(f"engine on {checked['samples']} samples from {checked['data']}: {drift}")
    size = size_text(manifest["engine"]["bytes"])
    click.echo(f"wrote {', '.join(str(item) for item in files)} ({size})")
    against = f"{model} " if Path(model).is_file() else "MODEL.onnx "
    if "skipped" not in checked:
        click.echo(f"next: optimize bench {against}{files[0]}")
        return
    needed = [str(item) for item in files[:2]] + [item["file"] for item in manifest["plugins"]]
    click.echo(
        f"next: copy {', '.join(needed)} to a machine with such a GPU, and there: "
        f"optimize check {against}{files[0].name}"
    )
