"""One call of ``optimize bisect``: open the model, find its data, choose the judge, search."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx_ir as ir

from optimizer.bisection import Bisection, Finding
from optimizer.budget import Budget
from optimizer.calibration import Calibration, input_specs
from optimizer.command_judge import CommandJudge, parse_command
from optimizer.errors import OptionError
from optimizer.job import Job, ModelSpec, Request
from optimizer.judges import DriftJudge, Judge, ProofJudge
from optimizer.probes import make_probes
from optimizer.recipe import Recipe
from optimizer.samples import load_samples


@dataclass(frozen=True)
class BisectRequest:
    """What ``optimize bisect`` was asked for besides model, recipe and data.

    Attributes:
        check: Command to run on every candidate; None = none.
        timeout: Seconds the command may take.
        budget: Limits on the drift. Without a command and a budget, candidates are judged as by a
            run: exact passes by proof, then the result by the budget of the recipe, if it has one.
        each: Also measure what each rewrite does alone.
        echo: Is given each line that the command prints.
    """

    check: str | None = None
    timeout: float | None = None
    budget: str | None = None
    each: bool = False
    echo: Callable[[str], None] | None = None


class BisectJob:
    """One call of ``optimize bisect``."""

    def __init__(
        self, spec: ModelSpec, recipe: Recipe, request: Request, wanted: BisectRequest
    ) -> None:
        self._wanted = wanted
        self._request = request
        limits = wanted.budget if wanted.budget is not None else recipe.settings.budget
        self._budget = Budget.parse(None if wanted.check is not None else limits)
        # Candidates are judged here, not by the run that makes them.
        free = {"budget": None, "require_speedup": None, "verify": "each"}
        self._recipe = replace(recipe, settings=recipe.settings.model_copy(update=free))
        self._job = Job(spec, self._recipe, request)

    def run(self) -> Finding:
        """Load and search.

        Raises:
            OptimizerError: See ``Bisection.run``.
        """
        self._check_wanted()
        job = self._job
        with contextlib.ExitStack() as stack:
            model, _ = job.open(stack)
            data = job.load_data(model)
            measuring = data.measuring
            if measuring is None and (self._budget.limits or self._wanted.each):
                measuring = self._made_up(model)
            search = Bisection(
                model,
                job.recipe,
                data,
                self._judges(model, data.measuring, measuring),
                each=measuring if self._wanted.each else None,
                custom_ops=self._request.custom_ops,
                threads=self._request.threads,
                listener=job.listener,
            )
            return search.run()

    def _check_wanted(self) -> None:
        wanted = self._wanted
        if wanted.check is not None:
            parse_command(wanted.check)
            if wanted.budget is not None:
                raise OptionError("candidates are judged by --check or by --budget, not by both")
        elif wanted.budget is not None and not self._budget.limits:
            raise OptionError("--budget: found no limit, expected one such as perplexity<=+2%")
        elif wanted.timeout is not None:
            raise OptionError("--timeout is for the command of --check, and there is none")

    def _judges(
        self, model: ir.Model, samples: Calibration | None, measuring: Calibration | None
    ) -> list[Judge]:
        """The one asked for; else those of a run, in its order.

        Args:
            model: The original.
            samples: The user's.
            measuring: The same, or made up.
        """
        wanted, request = self._wanted, self._request
        if wanted.check is not None:
            file = self._job.file
            return [CommandJudge(wanted.check, model, file, wanted.timeout, wanted.echo)]
        self._job.listener.stage("running the original model")
        judges: list[Judge] = []
        if wanted.budget is None:
            judges.append(
                ProofJudge(model, samples, request.custom_ops, request.threads, request.max_memory)
            )
        if self._budget.limits and measuring is not None:
            judges.append(DriftJudge(model, measuring, self._budget))
        return judges

    def _made_up(self, model: ir.Model) -> Calibration:
        specs = input_specs(model)
        self._job.listener.note("drift is measured on made-up inputs; add --eval for real ones")
        samples = load_samples([probe.feed for probe in make_probes(specs)], specs)
        return Calibration(
            samples, threads=self._request.threads, custom_ops=self._request.custom_ops
        )
