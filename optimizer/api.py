"""The Python interface: ``optimize`` does all that the command does.

from optimizer.api import optimize

result = optimize("model.onnx", ["cqil:group=4", "outliertune"], calibration="samples.npz")
result.path            # model.opt.onnx
result.report.drift    # relative L2, cosine, top-1 agreement, KL, perplexity
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from optimizer.bisect_job import BisectJob, BisectRequest
from optimizer.bisection import Finding
from optimizer.comparison import Comparison, compare
from optimizer.errors import OptionError
from optimizer.job import Job, ModelSpec, Request, Result
from optimizer.recipe import Recipe, load_recipe, make_recipe, split_passes
from optimizer.samples import SampleSpec

__all__ = ["Comparison", "Finding", "Result", "bisect", "compare", "optimize"]

#: A pass by name, by name and options, or as text ``name:option=value``.
PassSpec: TypeAlias = str | tuple[str, Mapping[str, Any]]


def optimize(
    model: ModelSpec,
    passes: str | Sequence[PassSpec] | None = None,
    *,
    output: str | Path | None = None,
    recipe: str | Path | Recipe | None = None,
    overrides: Iterable[str] = (),
    calibration: SampleSpec | None = None,
    evaluation: SampleSpec | None = None,
    custom_ops: Sequence[str | Path] = (),
    **options: Any,
) -> Result:
    """Optimize a model.

    Args:
        model: See ``ModelSpec``.
        passes: In order; ``canonicalize`` always runs first, and alone where none is named. Also as
            one text, as for ``--passes``.
        output: Where to write. A model that is a file is written to ``<name>.opt.onnx`` beside it
            by default; a model in memory is only returned.
        recipe: Instead of ``passes``.
        overrides: ``pass.option=value``.
        calibration: See ``samples.load_samples``; ``self`` lets a language model write its own.
            Without it, ``<name>.calibration.npz`` beside the model file is used.
        evaluation: The same for drift; by default ``<name>.eval.npz``, else the calibration.
        custom_ops: Libraries of custom operators.
        options: Fields of ``recipe.Settings`` (target, verify, budget, samples, ...) and of
            ``Request`` (force, dry_run, fail_on_noop, example_inputs, listener, ...).

    Returns:
        The model and everything known about it.

    Raises:
        OptimizerError: See ``optimizer.errors``; nothing is written then.
    """
    options["output"] = None if output is None else Path(output)
    request, settings = _sorted_options(calibration, evaluation, custom_ops, options)
    return Job(model, _resolve(passes or (), recipe, overrides, settings), request).run()


def bisect(
    model: ModelSpec,
    passes: str | Sequence[PassSpec] | None = None,
    *,
    check: str | None = None,
    budget: str | None = None,
    recipe: str | Path | Recipe | None = None,
    overrides: Iterable[str] = (),
    calibration: SampleSpec | None = None,
    evaluation: SampleSpec | None = None,
    custom_ops: Sequence[str | Path] = (),
    **options: Any,
) -> Finding:
    """Find the pass, and the rewrite in it, that makes a model fail a check.

    Args:
        model: See ``ModelSpec``.
        passes: As for ``optimize``.
        check: A command; ``{model}`` in it is the path of a candidate. Exit status 0 = good, 125 =
            cannot be judged, any other = bad.
        budget: Instead: limits on the drift from the original, such as ``perplexity<=+2%``. Without
            either, the recipe's budget, else what a run proves after each pass.
        recipe: Instead of ``passes``.
        overrides: ``pass.option=value``.
        calibration: As for ``optimize``.
        evaluation: As for ``optimize``.
        custom_ops: Libraries of custom operators.
        options: Fields of ``BisectRequest`` (timeout, each, echo), and as for ``optimize``.

    Raises:
        OptionError: The check fails on the original model, or cannot judge the optimized one.
        OptimizerError: See ``optimizer.errors``.
    """
    own = {key: options.pop(key) for key in ("timeout", "each", "echo") if key in options}
    wanted = BisectRequest(check=check, budget=budget, **own)
    request, settings = _sorted_options(calibration, evaluation, custom_ops, options)
    resolved = _resolve(passes or (), recipe, overrides, settings)
    return BisectJob(model, resolved, request, wanted).run()


def _sorted_options(
    calibration: SampleSpec | None,
    evaluation: SampleSpec | None,
    custom_ops: Sequence[str | Path],
    options: dict[str, Any],
) -> tuple[Request, dict[str, Any]]:
    """What belongs to the call, and what belongs to the recipe's settings."""
    known = set(Request.__dataclass_fields__)
    request = Request(
        calibration=calibration,
        evaluation=evaluation,
        custom_ops=tuple(Path(item) for item in custom_ops),
        **{key: value for key, value in options.items() if key in known},
    )
    settings = {key: value for key, value in options.items() if key not in known}
    for key, spec in (("calibration", calibration), ("evaluation", evaluation)):
        if isinstance(spec, str | Path):
            settings[key] = str(spec)
    return request, settings


def _resolve(
    passes: str | Sequence[PassSpec],
    recipe: str | Path | Recipe | None,
    overrides: Iterable[str],
    settings: dict[str, Any],
) -> Recipe:
    if recipe is not None and passes:
        raise OptionError("passes come either from --passes or from --recipe, not from both")
    if isinstance(recipe, Recipe):
        if settings or overrides:
            pairs = [
                (step.spec, {**step.recorded, **step.options.model_dump()}) for step in recipe.steps
            ]
            return make_recipe(
                pairs, overrides=overrides, **{**recipe.settings.model_dump(), **settings}
            )
        return recipe
    if recipe is not None:
        return load_recipe(Path(recipe), overrides=overrides, **settings)
    items = split_passes(passes) if isinstance(passes, str) else list(passes)
    return make_recipe(items, overrides=overrides, **settings)
