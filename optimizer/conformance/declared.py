"""Checks of what a pass declares: its class, its documentation, its options."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from optimizer import external_passes
from optimizer.conformance.outcomes import Outcome, problems
from optimizer.errors import OptionError
from optimizer.pass_base import GraphPass, PassOptions
from optimizer.recipe import Recipe, Step, make_options, to_toml
from passes import RESERVED

_CLASS = "the class"


def check_class(pass_class: Any) -> Iterator[Outcome]:
    """Name, exactness and all else that a class must declare to be used as a pass."""
    built_in = str(getattr(pass_class, "__module__", "")).startswith("passes.")
    found = external_passes.problems(pass_class, () if built_in else RESERVED)
    yield from problems("class", _CLASS, ((text, "declare it as said") for text in found))


def check_documentation(pass_class: type[GraphPass[Any]]) -> Iterator[Outcome]:
    """The text that ``optimize passes NAME`` shows: what is rewritten, when, how exactly."""
    text = external_passes.documentation(pass_class)
    yield from problems("documentation", _CLASS, _problems_of_text(text))


def _problems_of_text(text: str) -> Iterator[tuple[str, str]]:
    first = text.partition("\n")[0]
    if not first.strip() or first.startswith(external_passes.HEADINGS):
        yield "no first line says what the pass does", "begin the docstring with one sentence"
    for heading in external_passes.HEADINGS:
        if not re.search(rf"^{heading}", text, re.MULTILINE):
            yield f"the docstring has no line '{heading} ...'", "add it, to the class or its module"


def check_options(
    pass_class: type[GraphPass[Any]], sets: Sequence[PassOptions]
) -> Iterator[Outcome]:
    """Every option is described and survives a recipe; no option set can be changed later."""
    fields = pass_class.Options.model_fields
    yield from problems(
        "options",
        _CLASS,
        (
            (f"option '{name}' has no description", 'Field(..., description="...")')
            for name, info in fields.items()
            if not (info.description or "").strip()
        ),
    )
    for options in sets:
        yield from problems("recipe", f"options {text_of(options)}", _lost(pass_class, options))


def _lost(pass_class: type[GraphPass[Any]], options: PassOptions) -> Iterator[tuple[str, str]]:
    try:
        json.dumps(options.model_dump(mode="json"))
        written = to_toml(Recipe((Step(pass_class, options, pass_class.name),)))
        (read,) = tomllib.loads(written)["passes"]
        read.pop("pass")
        again = make_options(pass_class, read)
    except (TypeError, ValueError, OptionError) as error:
        yield (
            f"they cannot be written to a recipe and read again: {error}",
            "use numbers, texts, booleans, None and lists or tables of these",
        )
        return
    if again != options:
        yield (
            f"a recipe turns them into {text_of(again)}",
            "an option that may be None needs None as default: recipes leave None out",
        )
    for name in list(type(options).model_fields)[:1]:
        try:
            setattr(options, name, getattr(options, name))
        except (ValidationError, AttributeError):
            continue
        yield f"option '{name}' can be changed in place", "leave model_config of PassOptions alone"


def text_of(options: PassOptions) -> str:
    """What differs from the defaults, as on the command line."""
    changed = options.model_dump(mode="json", exclude_defaults=True)
    return ";".join(f"{key}={value}" for key, value in changed.items()) or "default"
