"""Finds the pass, and the rewrite in it, that makes a model fail a check.

First over the states between the passes, then over the rewrites of the pass found: the first n of
them are made again from the state before it, the rest are refused (``optimizer.gate``). Both by
halving, so the check runs about log2(passes) + log2(rewrites) times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from optimizer.calibration import Calibration
from optimizer.divergence import Difference, first_difference
from optimizer.errors import OptimizerError, OptionError, PassContractError
from optimizer.fingerprint import fingerprint
from optimizer.gate import Choice, Rewrite, first, without
from optimizer.halving import narrow
from optimizer.judges import Candidate, Judge, Outcome, Verdict
from optimizer.listener import Listener, Silent
from optimizer.pass_base import Exactness
from optimizer.pipeline import Data
from optimizer.recipe import Recipe
from optimizer.shares import Share, measure_shares
from optimizer.stages import LOWERING, Stage, lowering_stage, run_stages


@dataclass(frozen=True)
class Question:
    """What the judge was asked, and its answer."""

    candidate: str
    verdict: Verdict


@dataclass
class Finding:
    """The answer.

    Attributes:
        check: What was checked.
        stage: The pass that breaks the numbers; None = nothing is broken.
        place: Its number in the run, from 1, and the number of stages.
        rewrite: The rewrite in it that does; None = the pass is named only.
        number: Of the rewrite in the pass, from 1.
        count: How many rewrites the pass makes.
        good: The verdict without it and all that follow in the pass.
        bad: The verdict with it, or with the whole pass.
        alone: The verdict on the whole pass without this rewrite.
        suspects: One of these does, where what lies between cannot be judged.
        change: What the rewrite turned into what.
        difference: The first value that an exact pass, or rewrite, changes.
        shares: What each rewrite of an approximate pass does alone, the worst first.
        remarks: What else there is to know.
        questions: All that were asked, in order.
    """

    check: str
    stage: str | None = None
    place: tuple[int, int] = (0, 0)
    rewrite: Rewrite | None = None
    number: int = 0
    count: int = 0
    good: Verdict | None = None
    bad: Verdict | None = None
    alone: Verdict | None = None
    suspects: tuple[str, ...] = ()
    change: str = ""
    difference: Difference | None = None
    shares: tuple[Share, ...] = ()
    remarks: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)

    @property
    def status(self) -> Literal["nothing broken", "rewrite", "pass", "range"]:
        """What was found: "range" where one of ``suspects`` is to blame."""
        if self.stage is None:
            return "nothing broken"
        if self.suspects:
            return "range"
        return "pass" if self.rewrite is None else "rewrite"


@dataclass
class Bisection:
    """One search; ``run`` does it.

    Attributes:
        model: The original; stays as it is.
        recipe: What is run.
        data: What passes may look at, and what drift is measured on.
        judges: Say which models are good; the first that finds something is the one.
        each: What to measure on what each rewrite of an approximate pass does alone; None = it is
            not asked for.
        custom_ops: Libraries of custom operators.
        threads: Threads of ONNX Runtime.
        listener: Is told every answer.
    """

    model: ir.Model
    recipe: Recipe
    data: Data
    judges: Sequence[Judge]
    each: Calibration | None = None
    custom_ops: tuple[Path, ...] = ()
    threads: int = 1
    listener: Listener = field(default_factory=Silent)

    def run(self) -> Finding:
        """Search.

        Raises:
            OptionError: The check fails on the original model, or cannot judge the result.
            OptimizerError: The recipe does not fit the model or the data.
        """
        self.finding = Finding("; ".join(judge.title for judge in self.judges))
        self.stages: list[Stage] = []
        stage = None
        for judge in self.judges:
            self.judge = judge
            self._ask_original()
            stage = self._find_stage()
            if stage is not None:
                self.finding.check = self.judge.title
                break
        if stage is not None and not self.finding.suspects:
            self._find_rewrite(stage)
        if self.each is not None:
            self._measure_shares(self.each, [stage] if stage is not None else self.stages)
        return self.finding

    def _run_stages(self) -> None:
        if not self.stages:
            lowering = not self.judge.lowered
            self.stages = run_stages(
                self.model, self.recipe, self.data, self.listener, lowering=lowering
            )

    def _ask_original(self) -> None:
        verdict = self.judge.original()
        if verdict is None or self._note("the original model", verdict).outcome is Outcome.GOOD:
            return
        msg = (
            f"the check fails on the original model ({verdict.reason}), so it cannot tell what "
            "breaks it; expected a check that the original passes"
        )
        error = OptionError(msg)
        for line in verdict.output[-2:]:
            error.add_note(line)
        raise error

    # The pass.

    def _find_stage(self) -> Stage | None:
        self._run_stages()
        changed = [stage for stage in self.stages if stage.modified]
        if self.judge.lowered and not changed:
            changed = self.stages[-1:]  # lowering alone may break it
        search = self._first_wrong if self.judge.stepwise else self._halve_stages
        stage = search(changed)
        if stage is None:
            return None
        finding = self.finding
        if self.judge.lowered and stage.after is not None and not finding.suspects:
            stage = self._or_lowering(stage, stage.after)
        names = [each.name for each in self.stages]
        if self.judge.lowered:
            names.append(LOWERING)
        finding.stage = stage.name
        number = self.stages.index(stage) if stage in self.stages else len(names) - 1
        finding.place = (number + 1, len(names))
        return stage

    def _first_wrong(self, stages: list[Stage]) -> Stage | None:
        for stage in stages:
            verdict = self._ask_stage(stage)
            if verdict.outcome is Outcome.BAD:
                self.finding.bad = verdict
                return stage
        if any(not stage.proven for stage in stages) and self.judge is self.judges[-1]:
            self.finding.remarks.append(
                "how far approximate passes move the numbers was not judged; add --budget, such as "
                "relative_l2<=0.05, to ask for that"
            )
        return None

    def _halve_stages(self, stages: list[Stage]) -> Stage | None:
        if not stages:
            return None
        last = self._ask_stage(stages[-1])
        if last.outcome is Outcome.GOOD:
            return None
        if last.outcome is Outcome.UNKNOWN:
            msg = (
                f"the check cannot judge the optimized model ({last.reason}); expected one that "
                "fails on it"
            )
            raise OptionError(msg)
        verdicts = {len(stages): last}

        def judge(number: int, left: int) -> bool | None:
            verdicts[number] = self._ask_stage(stages[number - 1], left)
            return verdicts[number].is_good()

        good, bad = narrow(0, len(stages), judge)
        self.finding.bad = verdicts[bad]
        if good + 1 < bad:
            self.finding.suspects = tuple(stage.name for stage in stages[good:bad])
        return stages[bad - 1]

    def _ask_stage(self, stage: Stage, left: int | None = None) -> Verdict:
        if stage.after is None:
            return self._note(f"after {stage.name}", Verdict(Outcome.BAD, str(stage.error)))
        after = stage.after
        return self._ask(f"after {stage.name}", stage, lambda: after, left)

    def _or_lowering(self, stage: Stage, after: ir.Model) -> Stage:
        """The pass, or the lowering of what it made where that alone is good."""
        lowering = lowering_stage(after, self.recipe.settings)
        lowering.run()
        if not lowering.modified:
            return stage
        candidate = Candidate(after, stage.before, stage.exactness)
        what = f"after {stage.name}, not lowered"
        verdict = self._note(what, self.judge.judge(candidate))
        if verdict.outcome is Outcome.GOOD:
            return lowering
        if verdict.outcome is Outcome.UNKNOWN:
            self.finding.remarks.append(
                f"it may be the lowering of what '{stage.name}' wrote: unlowered, that cannot be "
                "judged"
            )
        return stage

    # The rewrite.

    def _find_rewrite(self, stage: Stage) -> None:
        finding, total = self.finding, len(stage.rewrites)
        finding.count = total
        if not total:
            finding.remarks.append(
                f"pass '{stage.name}' does not offer its sites, so only the pass is named"
            )
            self._compare(stage, stage.before, stage.after)
            return
        verdicts = {0: self._ask_none(stage), total: finding.bad}
        if verdicts[0] is not None and verdicts[0].outcome is Outcome.BAD:
            finding.remarks.append(
                f"pass '{stage.name}' breaks it even where all {total} sites that it offers are "
                "left out, so only the pass is named"
            )
            self._compare(stage, stage.before, _made(stage, first(0)))
            return

        def judge(number: int, left: int) -> bool | None:
            what = f"{stage.name}, {number} of {total} rewrites"
            verdict = self._ask(what, stage, lambda: self._first(stage, number), left)
            verdicts[number] = verdict
            return verdict.is_good()

        good, bad = narrow(0, total, judge)
        finding.good, finding.bad = verdicts[good], verdicts[bad]
        if good + 1 < bad:
            finding.suspects = tuple(map(str, stage.rewrites[good:bad]))
            return
        rewrite = stage.rewrites[bad - 1]
        finding.rewrite, finding.number = rewrite, bad
        if total > 1:
            what = f"{stage.name} without {rewrite}"
            finding.alone = self._ask(what, stage, lambda: stage.repeat(without(rewrite))[0])
        before = _made(stage, first(good))
        self._compare(stage, before, stage.after if bad == total else _made(stage, first(bad)))

    def _ask_none(self, stage: Stage) -> Verdict | None:
        """Judge the pass with all its sites refused; None where that is the model before it."""
        model = _made(stage, first(0))
        unchanged = model is not None and (
            fingerprint(stage.before).difference(fingerprint(model)) is None
        )
        if unchanged:
            return None
        what = f"{stage.name}, 0 of {len(stage.rewrites)} rewrites"
        return self._ask(what, stage, lambda: stage.repeat(first(0))[0])

    def _first(self, stage: Stage, count: int) -> ir.Model:
        """The model after the first rewrites of a pass."""
        model, rewrites = stage.repeat(first(count))
        remark = f"pass '{stage.name}' took other sites when it ran again: this may be wrong"
        if rewrites != stage.rewrites[:count] and remark not in self.finding.remarks:
            self.finding.remarks.append(remark)
        return model

    def _compare(self, stage: Stage, before: ir.Model | None, after: ir.Model | None) -> None:
        """Say what was changed, and where the numbers of an exact pass part."""
        finding, data = self.finding, self.data.measuring
        if before is None or after is None:
            return
        if finding.rewrite is not None:
            finding.change = fingerprint(before).change(fingerprint(after))
        if stage.exactness is Exactness.APPROXIMATE:
            return
        self.listener.stage(f"{stage.name}: looking for the first value that differs")
        try:
            finding.difference = first_difference(
                before,
                after,
                samples=None if data is None else data.samples,
                custom_ops=self.custom_ops,
                threads=self.threads,
            )
        except OptimizerError as error:
            finding.remarks.append(str(error))
            return
        if finding.difference is None:
            finding.remarks.append(
                "on short feeds, outputs before and after differ by no more than rounding: the "
                "check may ask for more than float32 can keep"
            )

    # Questions.

    def _ask(
        self, what: str, stage: Stage, make: Callable[[], ir.Model], left: int | None = None
    ) -> Verdict:
        """Make a candidate and judge it; one that is no legal graph is bad."""
        self.listener.stage(f"bisect: {what}")
        try:
            model = make()
            if self.judge.lowered and stage.name != LOWERING:
                model, _ = lowering_stage(model, self.recipe.settings).repeat()
        except PassContractError as error:
            return self._note(what, Verdict(Outcome.BAD, str(error)), left)
        except OptimizerError as error:
            return self._note(what, Verdict(Outcome.UNKNOWN, str(error)), left)
        exactness = stage.exactness if stage.proven else Exactness.APPROXIMATE
        verdict = self.judge.judge(Candidate(model, stage.before, exactness))
        return self._note(what, verdict, left)

    def _note(self, what: str, verdict: Verdict, left: int | None = None) -> Verdict:
        self.finding.questions.append(Question(what, verdict))
        more = "" if not left else f" (at most {left} more)"
        self.listener.note(f"{what}: {verdict}{more}")
        return verdict

    def _measure_shares(self, data: Calibration, stages: list[Stage]) -> None:
        fitting = [s for s in stages if s.exactness is Exactness.APPROXIMATE and s.rewrites]
        if not fitting:
            self.finding.remarks.append(
                "what each rewrite does alone is measured for approximate passes that offer their "
                "sites: there is none here"
            )
        self.finding.shares = measure_shares(fitting, data, self.listener)


def _made(stage: Stage, choice: Choice) -> ir.Model | None:
    """The model after a part of the rewrites, or None where that fails."""
    try:
        return stage.repeat(choice)[0]
    except OptimizerError:
        return None
