"""The Python interface: ``optimize`` does all that the command does.

from optimizer.api import optimize

result = optimize("model.onnx", ["cqil:group=4", "outliertune"], calibration="samples.npz")
result.path            # model.opt.onnx
result.report.drift    # relative L2, cosine, top-1 agreement, KL, perplexity
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import onnx_ir as ir

from optimizer import frontends
from optimizer.calibration import Calibration, input_specs
from optimizer.errors import OptionError
from optimizer.export.onnx_file import write_result, write_text
from optimizer.generation import self_samples
from optimizer.listener import Listener, Silent
from optimizer.model_io import external_files, hash_file, load_model
from optimizer.model_writer import check_output
from optimizer.pipeline import Data, Run, require_data
from optimizer.recipe import Recipe, load_recipe, make_recipe, split_passes, to_toml
from optimizer.report import RunReport, make_manifest
from optimizer.samples import SampleSpec, load_samples

__all__ = ["Result", "optimize"]

#: A pass by name, by name and options, or as text ``name:option=value``.
PassSpec: TypeAlias = str | tuple[str, Mapping[str, Any]]
#: A path, ``hf:DIR-or-ID``, ``package.module:factory``, a model in memory, or a torch module.
ModelSpec: TypeAlias = Any

#: Samples a plan looks at: enough to see which sites match.
_PLAN_SAMPLES = 4


@dataclass(frozen=True)
class Result:
    """What ``optimize`` gives back.

    Attributes:
        model: The optimized model, in the form of the target.
        report: What each pass did, and the drift.
        manifest: What was written beside the output; empty without an output.
        recipe: With all options resolved; fed back it gives the same bytes.
        path: Of the model written, or None.
        files: All files written.
    """

    model: ir.Model
    report: RunReport
    manifest: dict[str, Any]
    recipe: Recipe
    path: Path | None
    files: tuple[Path, ...] = ()


@dataclass
class Request:
    """Everything ``optimize`` was asked for besides model and recipe."""

    output: Path | None = None
    write: bool = True
    calibration: SampleSpec | None = None
    evaluation: SampleSpec | None = None
    custom_ops: tuple[Path, ...] = ()
    force: bool = False
    fail_on_noop: bool = False
    keep_missed: bool = False
    dry_run: bool = False
    check_numbers: bool = True
    threads: int = 1
    bench: bool = False
    max_memory: int | None = None
    save_recipe: Path | None = None
    with_cache: bool = False
    task: str | None = None
    example_inputs: Any = None
    listener: Listener | None = None


def optimize(
    model: ModelSpec,
    passes: str | Sequence[PassSpec] = (),
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
        passes: In order; ``canonicalize`` always runs first. Also as one text, as for ``--passes``.
        output: Where to write. A model that is a file is written to ``<name>.opt.onnx`` beside it
            by default; a model in memory is only returned.
        recipe: Instead of ``passes``.
        overrides: ``pass.option=value``.
        calibration: See ``samples.load_samples``; ``self`` lets a language model write its own.
            Without it, ``<name>.calibration.npz`` beside the model file is used.
        evaluation: The same for drift; by default ``<name>.evaluation.npz``, else the calibration.
        custom_ops: Libraries of custom operators.
        options: Fields of ``recipe.Settings`` (target, verify, budget, samples, ...) and of
            ``Request`` (force, dry_run, fail_on_noop, example_inputs, listener, ...).

    Returns:
        The model and everything known about it.

    Raises:
        OptimizerError: See ``optimizer.errors``; nothing is written then.
    """
    known = set(Request.__dataclass_fields__)
    request = Request(
        output=None if output is None else Path(output),
        calibration=calibration,
        evaluation=evaluation,
        custom_ops=tuple(Path(item) for item in custom_ops),
        **{key: value for key, value in options.items() if key in known},
    )
    settings = {key: value for key, value in options.items() if key not in known}
    for key, spec in (("calibration", calibration), ("evaluation", evaluation)):
        if isinstance(spec, str | Path):
            settings[key] = str(spec)
    resolved = _resolve(passes, recipe, overrides, settings)
    return _Job(model, resolved, request).run()


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
            pairs = [(step.spec, step.options.model_dump()) for step in recipe.steps]
            return make_recipe(
                pairs, overrides=overrides, **{**recipe.settings.model_dump(), **settings}
            )
        return recipe
    if recipe is not None:
        return load_recipe(Path(recipe), overrides=overrides, **settings)
    items = split_passes(passes) if isinstance(passes, str) else list(passes)
    return make_recipe(items, overrides=overrides, **settings)


class _Job:
    """One call of ``optimize``."""

    def __init__(self, spec: ModelSpec, recipe: Recipe, request: Request) -> None:
        self.spec = spec
        self.recipe = recipe
        self.request = request
        self.listener: Listener = request.listener or Silent()

    def run(self) -> Result:
        """Load, rewrite, judge, write."""
        self._settle_data()
        self._check_early()
        with contextlib.ExitStack() as stack:
            source, path = self._open(stack)
            protected = () if path is None else (path, *external_files(source))
            output = self._output(path)
            if output is not None:
                check_output(output, force=self.request.force, protected=protected)
            data = self._load_data(source)
            self._note_digests(data)
            run = Run(
                source,
                self.recipe,
                data,
                listener=self.listener,
                source=self.title,
                custom_ops=self.request.custom_ops,
                threads=self.request.threads,
                max_memory=self.request.max_memory,
                fail_on_noop=self.request.fail_on_noop,
                plan_only=self.request.dry_run,
                keep_missed=self.request.keep_missed,
            )
            report = run.execute()
            if output is None:
                return Result(run.model, report, {}, self.recipe, None)
            return self._write(run.model, report, output, protected)

    @property
    def title(self) -> str:
        """The model as the user named it."""
        if isinstance(self.spec, str | Path):
            return str(self.spec)
        return type(self.spec).__name__

    def _settle_data(self) -> None:
        """Data given, named in the recipe, or lying beside the model: fix which."""
        for key in ("calibration", "evaluation"):
            if getattr(self.request, key) is not None:
                continue
            named = getattr(self.recipe.settings, key)
            beside = self._beside(key)
            if named is None and beside is not None:
                named = str(beside)
                settings = self.recipe.settings.model_copy(update={key: named})
                self.recipe = replace(self.recipe, settings=settings)
                self.listener.note(f"{key} data: {named} (beside the model)")
            setattr(self.request, key, named)

    def _beside(self, key: str) -> Path | None:
        if not isinstance(self.spec, str | Path):
            return None
        text = str(self.spec)
        if frontends.is_model_spec(text) != "onnx":
            return None
        path = Path(text)
        candidate = path.with_name(f"{path.stem}.{key}.npz")
        return candidate if candidate.is_file() else None

    def _check_early(self) -> None:
        """What can be refused before the model is read."""
        if self.request.calibration is None:
            require_data(self.recipe, measured=self.request.evaluation is not None)
        output = self.request.output
        if output is not None and not self.request.dry_run:
            check_output(output, force=self.request.force)
        target = self.request.save_recipe
        if target is not None and target.exists() and not self.request.force:
            msg = f"--save-recipe: {target} exists; choose another name, or replace it with --force"
            raise OptionError(msg)

    def _open(self, stack: contextlib.ExitStack) -> tuple[ir.Model, Path | None]:
        """The model, and the file that must not be overwritten."""
        self.listener.stage(f"loading {self.title}")
        if isinstance(self.spec, ir.Model):
            return self.spec.clone(), None
        if isinstance(self.spec, onnx.ModelProto):
            return ir.from_proto(self.spec), None
        text = str(self.spec) if isinstance(self.spec, str | Path) else None
        kind = "torch" if text is None else frontends.is_model_spec(text)
        if kind == "onnx":
            path = Path(str(text))
            return self._load(path), path
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="optimize-")))
        self.listener.stage(f"exporting {self.title}")
        if kind == "hf":
            exported = frontends.export_hugging_face(
                str(text).removeprefix("hf:"),
                folder,
                kv_cache=self.request.with_cache,
                task=self.request.task,
            )
        else:
            exported = frontends.export_torch(
                text if text is not None else self.spec,
                folder,
                example_inputs=self.request.example_inputs,
            )
        return self._load(exported), None

    def _load(self, path: Path) -> ir.Model:
        return load_model(path, self.request.custom_ops, check_numbers=self.request.check_numbers)

    def _output(self, path: Path | None) -> Path | None:
        if self.request.dry_run or not self.request.write:
            return None
        if self.request.output is not None:
            return self.request.output
        if path is not None:
            return path.with_name(f"{path.stem}.opt.onnx")
        if isinstance(self.spec, str):
            name = self.spec.removeprefix("hf:").rstrip("/").rpartition("/")[2].rpartition(":")[2]
            return Path(f"{name}.opt.onnx")
        return None

    def _load_data(self, model: ir.Model) -> Data:
        calibration = self._samples(model, self.request.calibration, "--calibration")
        evaluation = self._samples(model, self.request.evaluation, "--eval")
        return Data(calibration, evaluation)

    def _samples(self, model: ir.Model, spec: SampleSpec | None, option: str) -> Calibration | None:
        if spec is None:
            return None
        settings, request = self.recipe.settings, self.request
        limit = settings.samples
        if request.dry_run:
            limit = min(limit or _PLAN_SAMPLES, _PLAN_SAMPLES)
        if isinstance(spec, str) and spec == "self":
            self.listener.stage("sampling text from the model")
            counts = {} if limit is None else {"samples": limit}
            spec = self_samples(
                model, threads=request.threads, custom_ops=request.custom_ops, **counts
            )
        samples = load_samples(spec, input_specs(model), limit=limit, option=option)
        return Calibration(
            samples,
            batch=settings.batch,
            threads=request.threads,
            custom_ops=request.custom_ops,
            progress=self.listener.progress,
        )

    def _note_digests(self, data: Data) -> None:
        """Put the digests of the data into the recipe; say so where they changed."""
        update = {}
        for key, used in (("calibration", data.calibration), ("evaluation", data.evaluation)):
            digest = None if used is None else used.samples.digest()
            before = getattr(self.recipe.settings, f"{key}_sha256")
            if before is not None and digest != before:
                self.listener.note(
                    f"{key} data is not what the recipe was written with: the result differs"
                )
            update[f"{key}_sha256"] = digest
        settings = self.recipe.settings.model_copy(update=update)
        self.recipe = replace(self.recipe, settings=settings)

    def _write(
        self, model: ir.Model, report: RunReport, output: Path, protected: Sequence[Path]
    ) -> Result:
        self.listener.stage(f"writing {output}")
        sources = [(item.name, hash_file(item)) for item in dict.fromkeys(protected)]
        settings = self.recipe.settings
        digests = {
            key: value
            for key, value in (
                ("calibration", settings.calibration_sha256),
                ("evaluation", settings.evaluation_sha256),
            )
            if value is not None
        }
        layout = model.metadata_props.get("optimize.kv_groups")
        files, manifest = write_result(
            model,
            output,
            lambda outputs: make_manifest(
                report,
                self.recipe,
                inputs=sources,
                outputs=outputs,
                data=digests,
                kv_cache=None if layout is None else json.loads(layout),
            ),
            external_data=settings.external_data,
            force=self.request.force,
            protected=protected,
            progress=self.listener.progress,
        )
        if self.request.save_recipe is not None:
            write_text(self.request.save_recipe, to_toml(self.recipe))
        return Result(model, report, manifest, self.recipe, output, files)
