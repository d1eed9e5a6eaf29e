"""One call of ``optimize``: open the model, find its data, run the pipeline, judge, write."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import onnx_ir as ir

from optimizer import frontends
from optimizer.benchmark import BenchmarkResult, Setup, benchmark
from optimizer.calibration import Calibration, input_specs
from optimizer.custom_ops.bodies import plugins_of
from optimizer.data_files import count_files
from optimizer.errors import BudgetError, OptionError
from optimizer.export.onnx_file import write_result, write_text
from optimizer.feeds import Sizes
from optimizer.generation import self_samples
from optimizer.listener import Listener, Silent
from optimizer.model_io import BackgroundHashes, external_files, load_model
from optimizer.model_tensors import belongs
from optimizer.model_writer import ExternalData, check_output, manifest_path
from optimizer.pipeline import Data, Run, require_data
from optimizer.recipe import Recipe, to_toml
from optimizer.report import RunReport, make_manifest
from optimizer.samples import SampleSpec, is_past, load_samples
from optimizer.targets import get_target

#: A path, ``hf:DIR-or-ID``, ``package.module:factory``, a model in memory, or a torch module.
ModelSpec: TypeAlias = Any

#: Data beside ``model.onnx`` that is used without being named: ``model.calibration.npz``, ...
_BESIDE = {"calibration": "calibration", "evaluation": "eval"}
#: As many samples of it, unless the user says how many: enough for a first answer in seconds.
_BESIDE_SAMPLES = 64
#: Samples a plan looks at: enough to see which sites match.
_PLAN_SAMPLES = 4
#: Metadata of the result that says which layers' caches live where.
_CACHE_KEYS = {"groups": "optimize.kv_groups", "layout": "optimize.kv_cache"}


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
    shapes: Mapping[str, int] = field(default_factory=dict)
    max_memory: int | None = None
    save_recipe: Path | None = None
    with_cache: bool = False
    task: str | None = None
    example_inputs: Any = None
    listener: Listener | None = None


class Job:
    """One call of ``optimize``."""

    def __init__(self, spec: ModelSpec, recipe: Recipe, request: Request) -> None:
        self.spec = spec
        self.recipe = recipe
        self.request = request
        self.listener: Listener = request.listener or Silent()
        #: The ONNX file that the model was read from, or exported to.
        self.file: Path | None = None
        self._data = Data()

    def run(self) -> Result:
        """Load, rewrite, judge, write."""
        with contextlib.ExitStack() as stack:
            source, path = self.open(stack)
            inputs = () if path is None else (path.resolve(), *external_files(source))
            output = self._output(path)
            hashes = BackgroundHashes(inputs if output is not None else ())
            if output is not None:
                check_output(
                    output,
                    force=self.request.force,
                    protected=inputs or external_files(source),
                    beside=(manifest_path(output),),
                    data_files=count_files(hashes.paths[1:]),
                )
            data = self.load_data(source)
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
            self._measure_speed(self.file, run.model, report)
            if output is None:
                return Result(run.model, report, {}, self.recipe, None)
            return self._write(run.model, report, output, hashes)

    def open(self, stack: contextlib.ExitStack) -> tuple[ir.Model, Path | None]:
        """Settle which data is used, refuse what can be refused early, and load the model.

        Returns:
            The model, and the file that must not be overwritten.
        """
        self._settle_data()
        self._check_early()
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
        return self._load(self._export(kind, text, folder)), None

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
                settings = self.recipe.settings
                samples = settings.samples or _BESIDE_SAMPLES
                update = {key: named, "samples": samples}
                self.recipe = replace(self.recipe, settings=settings.model_copy(update=update))
                self.listener.note(
                    f"{key} data: {named}, found beside the model (at most {samples} samples)"
                )
            setattr(self.request, key, named)

    def _beside(self, key: str) -> Path | None:
        if not isinstance(self.spec, str | Path):
            return None
        text = str(self.spec)
        if frontends.is_model_spec(text) != "onnx":
            return None
        path = Path(text)
        candidate = path.parent / f"{path.stem}.{_BESIDE[key]}.npz"
        if not candidate.is_file():
            return None
        if not belongs(candidate.resolve(), path):
            self.listener.note(
                f"{candidate} is a link out of the model's folder, so it is not read; to use it, "
                f"name it with --{_BESIDE[key]}"
            )
            return None
        return candidate

    def _check_early(self) -> None:
        """What can be refused, or should be said, before the model is read."""
        for step in self.recipe.steps:
            if step.recorded and step.recorded != step.origin:
                self.listener.note(
                    f"pass '{step.spec}' is not what the recipe was written with: the result may "
                    "differ"
                )
        if self.request.calibration is None:
            require_data(self.recipe, measured=self.request.evaluation is not None)
        output = self.request.output
        if output is not None and not self.request.dry_run:
            beside = (manifest_path(output),)
            check_output(output, force=self.request.force, beside=beside)
        target = self.request.save_recipe
        if target is not None and target.exists() and not self.request.force:
            msg = f"--save-recipe: {target} exists; choose another name, or replace it with --force"
            raise OptionError(msg)

    def _export(self, kind: str, text: str | None, folder: Path) -> Path:
        self.listener.stage(f"exporting {self.title}")
        if kind == "hf":
            return frontends.export_hugging_face(
                str(text).removeprefix("hf:"),
                folder,
                kv_cache=self.request.with_cache,
                task=self.request.task,
            )
        return frontends.export_torch(
            text if text is not None else self.spec,
            folder,
            example_inputs=self.request.example_inputs,
        )

    def _load(self, path: Path) -> ir.Model:
        self.file = path
        return load_model(path, self.request.custom_ops, check_numbers=self.request.check_numbers)

    def _output(self, path: Path | None) -> Path | None:
        if self.request.dry_run or not self.request.write:
            return None
        if self.request.output is not None:
            return self.request.output
        if path is not None:
            return path.parent / f"{path.stem}.opt.onnx"
        if isinstance(self.spec, str):
            name = self.spec.removeprefix("hf:").rstrip("/").rpartition("/")[2].rpartition(":")[2]
            return Path(f"{name}.opt.onnx")
        return None

    def load_data(self, model: ir.Model) -> Data:
        """Load the sample data, and note what it is in the recipe."""
        calibration = self._samples(model, self.request.calibration, "--calibration")
        evaluation = self._samples(model, self.request.evaluation, "--eval")
        self._data = Data(calibration, evaluation)
        self._note_digests(self._data)
        return self._data

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

    def _measure_speed(self, path: Path | None, model: ir.Model, report: RunReport) -> None:
        """Time original and result against each other, if asked to.

        Raises:
            BudgetError: The result is not as fast as required.
        """
        required = self.recipe.settings.require_speedup
        if self.request.dry_run or not (self.request.bench or required is not None):
            return
        self.listener.stage("measuring latency")
        original: ir.Model | Path = path if path is not None else self.spec
        setup = Setup(
            sizes=Sizes.parse(self.request.shapes),
            feed={} if self.request.shapes else self._first_feed(model),
            threads=self.request.threads,
            custom_ops=self.request.custom_ops,
        )
        result = benchmark(
            [original, model],
            setup,
            labels=["original", "optimized"],
            progress=self.listener.progress,
        )
        report.speedup = {"text": speed_text(result), **result.as_dict()}
        if required is not None and result.speedup() < required:
            report.missed = (
                f"the result is {result.speedup():.3g} times as fast as the original, "
                f"{required:g} required"
            )
            if not self.request.keep_missed:
                raise BudgetError(f"{report.missed}; nothing was written")

    def _first_feed(self, model: ir.Model) -> Mapping[str, Any]:
        """The first sample, without caches: their shapes may differ between the two models."""
        if self._data.measuring is None:
            return {}
        pasts = {spec.name for spec in input_specs(model) if is_past(spec)}
        feed = next(iter(self._data.measuring.samples)).feed
        return {name: array for name, array in feed.items() if name not in pasts}

    def _external_data(self, sources: Sequence[Path]) -> ExternalData:
        """``auto`` also keeps weights outside where the input had them outside."""
        chosen = self.recipe.settings.external_data
        outside = len({item.resolve() for item in sources}) > 1
        return "always" if chosen == "auto" and outside else chosen

    def _write(
        self, model: ir.Model, report: RunReport, output: Path, hashes: BackgroundHashes
    ) -> Result:
        self.listener.stage(f"writing {output}")
        settings = self.recipe.settings
        digests = {
            key: value
            for key, value in (
                ("calibration", settings.calibration_sha256),
                ("evaluation", settings.evaluation_sha256),
            )
            if value is not None
        }
        cache = {
            name: json.loads(model.metadata_props[key])
            for name, key in _CACHE_KEYS.items()
            if key in model.metadata_props
        }
        files, manifest = write_result(
            model,
            output,
            lambda outputs: make_manifest(
                report,
                self.recipe,
                inputs=[(path.name, digest) for path, digest in hashes.items()],
                outputs=outputs,
                data=digests,
                kv_cache=cache or None,
                plugins=plugins_of(model),
            ),
            external_data=self._external_data(hashes.paths),
            force=self.request.force,
            protected=hashes.paths,
            sources=hashes.paths[1:],
            progress=self.listener.progress,
            bodies=get_target(settings.target).runtime == "onnxruntime",
        )
        if self.request.save_recipe is not None:
            write_text(self.request.save_recipe, to_toml(self.recipe))
        return Result(model, report, manifest, self.recipe, output, files)


def speed_text(result: BenchmarkResult) -> str:
    """The latency of the last model against the first, on one line."""
    first, last = result.timings[0], result.timings[-1]
    low, high = last.interval
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    return (
        f"latency {first.median_ms:.3g} -> {last.median_ms:.3g} ms, {last.speedup:.2f} times as "
        f"fast (95 % interval {low:.2f} to {high:.2f}; {threads})"
    )
