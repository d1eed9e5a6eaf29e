"""What to do with a model: passes with their options, target, data and limits, as one value.

A recipe comes from the command line, from a TOML file or from Python, and is complete and checked
before any model is opened. Written out with ``to_toml`` it holds every option, so that feeding it
back gives the same bytes.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from optimizer.budget import Budget
from optimizer.errors import OptionError, RecipeError
from optimizer.external_passes import DISTRIBUTION, FILE_DIGEST, origin
from optimizer.pass_base import GraphPass, PassOptions
from optimizer.targets import get_target
from passes import get_pass

VERSION = 1
#: The exact pass that the pipeline runs first whether it is named or not.
FIRST_PASS = "canonicalize"

Verify: TypeAlias = Literal["off", "final", "each"]
KvCache: TypeAlias = Literal["append", "in-place"]
ExternalData: TypeAlias = Literal["auto", "always", "never"]

_STEP = re.compile(r"(?P<name>.*?\.py:\w+|[^:]*)(?::(?P<options>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One pass with its complete options."""

    pass_class: type[GraphPass[Any]]
    options: PassOptions
    #: How the pass was asked for: its name, or ``./file.py:NAME``.
    spec: str
    #: What identifies its code, for a pass from elsewhere; see ``external_passes.origin``.
    origin: Mapping[str, str] = field(default_factory=dict)
    #: The same when the recipe was written.
    recorded: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the pass."""
        return self.pass_class.name

    def create(self) -> GraphPass[Any]:
        """A new instance of the pass."""
        return self.pass_class(self.options)


class Settings(BaseModel):
    """Everything in a recipe besides the passes.

    Attributes:
        target: What the result is meant for (``optimizer.targets``).
        kv_cache: Form of the KV cache of grouped layers.
        opset: Of the result; None = the target's best.
        verify: After each pass, once at the end, or never.
        budget: Largest drift allowed, see ``optimizer.budget``.
        require_speedup: Smallest measured ratio of original to new latency.
        calibration: Where the calibration data is.
        calibration_sha256: Its digest when the recipe was written.
        evaluation: Held-out data for measured decisions; None = the calibration data.
        evaluation_sha256: Its digest when the recipe was written.
        samples: Use only the first samples of either data set; None = all.
        batch: Samples per run; None = as many as suit the sequence length.
        external_data: Whether weights go to a file of their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str = "ort-cpu"
    kv_cache: KvCache = "append"
    opset: int | None = Field(default=None, ge=7)
    verify: Verify = "each"
    budget: str | None = None
    require_speedup: float | None = Field(default=None, gt=0)
    calibration: str | None = None
    calibration_sha256: str | None = None
    evaluation: str | None = None
    evaluation_sha256: str | None = None
    samples: int | None = Field(default=None, ge=1)
    batch: int | None = Field(default=None, ge=1)
    external_data: ExternalData = "auto"


@dataclass(frozen=True)
class Recipe:
    """A complete, valid recipe."""

    steps: tuple[Step, ...] = ()
    settings: Settings = field(default_factory=Settings)

    def limits(self) -> Budget:
        """The budget, parsed."""
        return Budget.parse(self.settings.budget)

    def as_dict(self) -> dict[str, Any]:
        """JSON-compatible form, all options resolved."""
        return {
            "version": VERSION,
            **self.settings.model_dump(),
            "passes": [
                {"pass": step.spec, **step.origin, **step.options.model_dump(mode="json")}
                for step in self.steps
            ],
        }


def make_recipe(
    passes: Sequence[str | tuple[str, Mapping[str, Any]]] = (),
    *,
    overrides: Iterable[str] = (),
    **settings: Any,
) -> Recipe:
    """Check everything and build a recipe.

    Args:
        passes: Names in order, each ``name``, ``name:option=value;option=value`` or a pair of
            name and options. ``canonicalize`` may be left out.
        overrides: ``pass.option=value``, as given to ``--set``.
        settings: Fields of ``Settings``.

    Raises:
        OptionError: An unknown pass, option or value.
        RecipeError: Passes in an order that is not allowed.
    """
    raw = [_parse_step(item) if isinstance(item, str) else item for item in passes]
    named = [(spec, dict(options), get_pass(spec)) for spec, options in raw]
    _apply_overrides(named, overrides)
    steps = tuple(_make_step(spec, options, cls) for spec, options, cls in named)
    if steps and steps[0].name == FIRST_PASS:
        steps = steps[1:]
    _check_names(steps)
    check_order(steps)
    try:
        checked = Settings(**settings)
    except ValidationError as error:
        raise OptionError(_explain(error, "", list(Settings.model_fields))) from error
    _check_target(checked)
    Budget.parse(checked.budget)
    return Recipe(steps, checked)


def _make_step(spec: str, given: dict[str, Any], pass_class: type[GraphPass[Any]]) -> Step:
    recorded = {key: str(given.pop(key)) for key in (FILE_DIGEST, DISTRIBUTION) if key in given}
    options = make_options(pass_class, given)
    return Step(pass_class, options, spec, origin(spec), recorded)


def _check_names(steps: Sequence[Step]) -> None:
    """Two passes of one name could not be told apart in options, order and report."""
    known: dict[str, Step] = {}
    for step in steps:
        other = known.setdefault(step.name, step)
        if other.pass_class is not step.pass_class:
            msg = (
                f"'{other.spec}' and '{step.spec}' are both called '{step.name}'; rename one of "
                "the two passes"
            )
            raise RecipeError(msg)


def _check_target(settings: Settings) -> None:
    target = get_target(settings.target)
    if settings.kv_cache not in target.kv_cache:
        msg = (
            f"--kv-cache: found '{settings.kv_cache}', target '{target.name}' takes "
            f"{' or '.join(target.kv_cache)}"
        )
        raise OptionError(msg)
    if settings.opset is not None and not target.min_opset <= settings.opset <= target.max_opset:
        msg = (
            f"--opset: found {settings.opset}, target '{target.name}' takes {target.min_opset} to "
            f"{target.max_opset}"
        )
        raise OptionError(msg)


def split_passes(text: str) -> list[str]:
    """The items of a ``--passes`` list: commas within brackets separate nothing."""
    items, depth, current = [], 0, ""
    for char in text:
        depth += (char in "[({") - (char in "])}")
        if char == "," and depth <= 0:
            items.append(current.strip())
            current = ""
        else:
            current += char
    return [item for item in (*items, current.strip()) if item]


def _parse_step(text: str) -> tuple[str, dict[str, Any]]:
    match = _STEP.fullmatch(text)
    name = match["name"].strip() if match else ""
    if match is None or not name:
        msg = f"--passes: '{text}' names no pass; expected NAME or NAME:option=value;option=value"
        raise OptionError(msg)
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in (match["options"] or "").split(";"))):
        key, equals, value = item.partition("=")
        if not equals:
            msg = f"--passes: '{item}' of pass '{name}' is no option; expected option=value"
            raise OptionError(msg)
        options[key.strip()] = value.strip()
    return name, options


def _apply_overrides(
    named: Sequence[tuple[str, dict[str, Any], type[GraphPass[Any]]]], overrides: Iterable[str]
) -> None:
    for text in overrides:
        left, equals, value = text.partition("=")
        name, dot, option = left.strip().rpartition(".")
        if not equals or not dot:
            msg = f"--set: found '{text}', expected PASS.OPTION=VALUE"
            raise OptionError(msg)
        targets = [options for spec, options, cls in named if name in (cls.name, spec)]
        if not targets:
            known = [cls.name for _, _, cls in named]
            msg = f"--set {text}: pass '{name}' is not in --passes; {_suggest(name, known)}"
            raise OptionError(msg)
        for options in targets:
            options[option.strip()] = value.strip()


def make_options(pass_class: type[GraphPass[Any]], given: Mapping[str, Any]) -> PassOptions:
    """Options of a pass from text or Python values.

    Raises:
        OptionError: Names the option, what was found and what was expected.
    """
    fields = pass_class.Options.model_fields
    values = {
        key.replace("-", "_"): _from_text(value, fields.get(key.replace("-", "_")))
        for key, value in given.items()
    }
    try:
        return pass_class.Options.model_validate(values)
    except ValidationError as error:
        raise OptionError(_explain(error, f"pass '{pass_class.name}': ", list(fields))) from error


def _from_text(value: Any, info: Any) -> Any:
    """Text as written on the command line; lists and tables are JSON, ``none`` is None."""
    if not isinstance(value, str) or info is None:
        return value
    if value.lower() == "none" and type(None) in get_args(info.annotation):
        return None
    if value[:1] in "[{" and value:
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _explain(error: ValidationError, where: str, known: list[str]) -> str:
    """The first problem as one line, whatever pydantic found."""
    problems = error.errors()
    first = problems[0]
    option = str(first["loc"][0]) if first["loc"] else ""
    if not option:  # of several options together: the pass says what is wrong
        return where + first["msg"].removeprefix("Value error, ")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}there is no option '{option}'; {_suggest(option, known)}"
    same = [item for item in problems if item["loc"] and str(item["loc"][0]) == option]
    wanted = " or ".join(dict.fromkeys(_wanted(item["msg"]) for item in same))
    return f"{where}option '{option}': found {first['input']!r}, expected: {wanted}"


def _wanted(message: str) -> str:
    text = message.removeprefix("Value error, ").removeprefix("Input should be ")
    return text.removeprefix("a valid ").split(", unable to parse")[0]


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(known)}" if known else "there are none"


def check_order(steps: Sequence[Step]) -> None:
    """Every pass comes after those it declares in ``after``.

    Raises:
        RecipeError: With the right order.
    """
    for index, step in enumerate(steps):
        late = [item.name for item in steps[index + 1 :] if item.name in step.pass_class.after]
        early = next((item for item in steps[:index] if item.pass_class.canonical), None)
        if step.name == FIRST_PASS and early is not None:
            msg = (
                f"pass '{FIRST_PASS}' is number {index + 1}; it always runs first, so leave it out "
                f"('{early.name}' reads what it makes)"
            )
            raise RecipeError(msg)
        if late:
            right = ",".join(_sorted_names(steps))
            msg = (
                f"pass '{late[0]}' comes after '{step.name}' but must come before it; "
                f"the right order is --passes {right}"
            )
            raise RecipeError(msg)


def _sorted_names(steps: Sequence[Step]) -> list[str]:
    """The given order, changed only where ``after`` demands it."""
    left, result = list(steps), []
    while left:
        free = next(
            (s for s in left if not any(o is not s and o.name in s.pass_class.after for o in left)),
            left[0],
        )
        left.remove(free)
        result.append(free.name)
    return result


def load_recipe(path: Path, *, overrides: Iterable[str] = (), **settings: Any) -> Recipe:
    """Read a recipe file.

    Args:
        path: TOML, see ``to_toml``.
        overrides: ``pass.option=value``.
        settings: Fields of ``Settings`` that replace those of the file.

    Raises:
        RecipeError: The file cannot be read or is not a recipe; names file and line or key.
    """
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        msg = f"--recipe: {path}: cannot be read: {error.strerror}"
        raise RecipeError(msg) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"--recipe: {path}: is not TOML: {error}"
        raise RecipeError(msg) from error
    version = data.pop("version", None)
    if version != VERSION:
        msg = f"--recipe: {path}: version is {version!r}, expected {VERSION}"
        raise RecipeError(msg)
    steps = data.pop("passes", [])
    if not isinstance(steps, list) or not all(
        isinstance(item, dict) and isinstance(item.get("pass"), str) for item in steps
    ):
        msg = f"--recipe: {path}: 'passes' must be [[passes]] tables, each with a 'pass'"
        raise RecipeError(msg)
    pairs = [(item["pass"], {k: v for k, v in item.items() if k != "pass"}) for item in steps]
    for key in ("calibration", "evaluation"):
        if key in settings:  # new data: the digest of the old does not hold for it
            data.pop(f"{key}_sha256", None)
    try:
        return make_recipe(pairs, overrides=overrides, **{**data, **settings})
    except OptionError as error:
        msg = f"--recipe: {path}: {error}"
        raise RecipeError(msg) from error


def to_toml(recipe: Recipe) -> str:
    """The recipe as a file that ``load_recipe`` reads; options that are None are left out."""
    content = recipe.as_dict()
    steps = content.pop("passes")
    lines = [f"{key} = {_toml(value)}" for key, value in content.items() if value is not None]
    for step in steps:
        lines += ["", "[[passes]]"]
        lines += [f"{key} = {_toml(value)}" for key, value in step.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items())
        return "{" + inner + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    # JSON strings, integers and booleans are TOML as they stand, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
