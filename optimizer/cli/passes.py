"""The command ``passes``: list them, explain one, start one of your own and test it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import click

from optimizer.errors import EXIT_DONE, EXIT_VERIFICATION, OptimizerError, OptionError


@click.command("passes", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--template", is_flag=True, help="Print a pass to start from: > my.py")
@click.option(
    "--conformance",
    is_flag=True,
    help="Run the test-suite for passes on NAME, such as ./my.py:MyPass; exit 3 if it fails.",
)
@click.option(
    "--set",
    "values",
    multiple=True,
    metavar="OPTION=VALUE",
    help="With --conformance: also with this option (repeatable).",
)
@click.option(
    "--model",
    "models",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="With --conformance: also on this model (repeatable).",
)
@click.option("-v", "--verbose", is_flag=True, help="Print tracebacks.")
def passes_command(
    name: str | None,
    as_json: bool,  # noqa: FBT001
    template: bool,  # noqa: FBT001
    conformance: bool,  # noqa: FBT001
    values: tuple[str, ...],
    models: tuple[Path, ...],
    verbose: bool,  # noqa: FBT001
) -> int:
    """List the passes in the order they belong in, or explain the pass NAME."""
    del verbose  # whoever prints errors looks for it
    if template:
        from optimizer import pass_template

        click.echo(inspect.getsource(pass_template), nl=False)
        return EXIT_DONE
    if (values or models) and not conformance:
        raise click.UsageError("--set and --model belong to --conformance")
    if conformance:
        if name is None:
            raise click.UsageError("--conformance needs a pass, such as ./my.py:MyPass")
        return _conformance(name, values, models, as_json=as_json)
    if name is not None:
        _explain(name, as_json=as_json)
    else:
        _list(as_json=as_json)
    return EXIT_DONE


def _explain(name: str, *, as_json: bool) -> None:
    from optimizer.cli import screen
    from passes import get_pass

    described = _describe(get_pass(name))
    if as_json:
        screen.print_json(described)
    else:
        _print_pass(described)


def _list(*, as_json: bool) -> None:
    """All that can be named without a path; what cannot be loaded says why."""
    from optimizer.cli import screen
    from optimizer.external_passes import entry_points
    from passes import PASS_NAMES, all_names, get_pass

    described: list[dict[str, Any]] = []
    for name in all_names():
        try:
            described.append(_describe(get_pass(name)))
        except OptimizerError as error:
            described.append({"name": name, "error": str(error)})
    for name in sorted(set(entry_points()) & set(PASS_NAMES)):
        text = "an installed distribution registers it too, which has no effect"
        described.append({"name": name, "error": text})
    if as_json:
        screen.print_json(described)
        return
    width = max(len(item["name"]) for item in described)
    for item in described:
        if "error" in item:
            click.echo(f"{item['name']:{width}}  cannot be used: {item['error']}")
            continue
        data = "sample data" if item["needs_calibration"] else "no data"
        click.echo(f"{item['name']:{width}}  {item['exactness']:12} {data:12} {item['summary']}")
    click.echo("explain one: optimize passes NAME")


def _describe(pass_class: Any) -> dict[str, Any]:
    from optimizer.external_passes import documentation

    text = documentation(pass_class)
    options = {}
    for key, info in pass_class.Options.model_fields.items():
        options[key] = {"default": info.default, "description": info.description or ""}
    return {
        "name": pass_class.name,
        "summary": text.partition("\n")[0],
        "text": text,
        "exactness": pass_class.exactness.value,
        "needs_calibration": pass_class().needs_calibration(),
        "after": list(pass_class.after),
        "options": options,
        "schema": pass_class.Options.model_json_schema(),
    }


def _print_pass(item: dict[str, Any]) -> None:
    click.echo(f"{item['name']}  ({item['exactness']})\n\n{item['text']}")
    if item["after"]:
        click.echo(f"\nComes after: {', '.join(item['after'])}")
    if not item["options"]:
        click.echo("\nNo options.")
        return
    click.echo(f"\nOptions (--set {item['name']}.OPTION=VALUE):")
    for key, info in item["options"].items():
        click.echo(f"  {key} = {info['default']}")
        if info["description"]:
            click.echo(f"      {info['description']}")


def _conformance(
    name: str, values: tuple[str, ...], models: tuple[Path, ...], *, as_json: bool
) -> int:
    from functools import partial

    from optimizer import conformance
    from optimizer.cli import screen
    from optimizer.model_io import load_model
    from passes import get_pass

    pass_class = get_pass(name)
    for path in models:
        load_model(path)  # a wrong file is refused before anything runs
    builders = {path.name: partial(load_model, path) for path in models}
    options = [_options(values)] if values else []
    outcomes = list(conformance.check(pass_class, options, builders))
    failed = any(item.status is conformance.Status.FAILED for item in outcomes)
    if as_json:
        screen.print_json(
            {
                "pass": pass_class.name,
                "passed": not failed,
                "checks": conformance.summary(outcomes),
                "outcomes": [
                    {**vars(item), "status": item.status.value}
                    for item in outcomes
                    if item.status is not conformance.Status.PASSED
                ],
            }
        )
    else:
        _print_outcomes(outcomes, failed=failed)
    return EXIT_VERIFICATION if failed else EXIT_DONE


def _options(values: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals:
            msg = f"--set: found '{text}', expected OPTION=VALUE"
            raise OptionError(msg)
        found[key.strip()] = value.strip()
    return found


def _print_outcomes(outcomes: list[Any], *, failed: bool) -> None:
    from optimizer import conformance

    for check, counts in conformance.summary(outcomes).items():
        numbers = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        click.echo(f"{check:14} {conformance.CHECKS[check]}: {numbers}")
    for item in outcomes:
        if item.status is not conformance.Status.PASSED:
            click.echo(str(item))
    click.echo("the pass does not conform" if failed else "the pass conforms")
