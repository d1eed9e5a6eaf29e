"""A test-suite for passes: run it on a pass of your own.

In a test file, with pytest (one test per model and set of options):

from optimizer.conformance import conformance_tests
from my_package.my_pass import MyPass

test_my_pass = conformance_tests(MyPass, options=[{"factor": 2}])

On the command line: ``optimize passes ./my_pass.py:MyPass --conformance``.

What is checked is listed in ``CHECKS``; the models are ``MODELS``. The built-in passes pass it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir

from optimizer.conformance import declared
from optimizer.conformance.behaviour import Subject
from optimizer.conformance.elsewhere import check_elsewhere
from optimizer.conformance.models import MODELS, Sample
from optimizer.conformance.outcomes import Outcome, Status, summary
from optimizer.pass_base import PassOptions
from optimizer.recipe import make_options

__all__ = ["CHECKS", "MODELS", "Outcome", "Status", "check", "conformance_tests", "summary"]

CHECKS: dict[str, str] = {
    "class": "name, exactness, options and call are declared as they must be",
    "documentation": "the docstring has its first line and headings",
    "options": "every option is described",
    "recipe": "options survive being written to a recipe, and are frozen",
    "runs": "no model makes it fail",
    "invariants": "the graph stays legal, keeps its interface, and 'modified' is true",
    "report": "every skip has a reason, the report is JSON",
    "symbols": "dynamic axes of inputs and outputs stay dynamic",
    "exactness": "the outputs move no further than declared",
    "deterministic": "same bytes on a copy, and by an object that was used before",
    "weights": "weights are not read in vain (a note)",
    "gate": "no site is rewritten that context.gate refuses",
    "second-run": "a second run changes nothing",
    "sites": "some model is rewritten (a note)",
    "import": "importing it loads no runtime",
    "files": "it touches no file and reaches out to nothing",
    "process": "same bytes in another process",
}

#: Options of a pass: an object, or values by name as in a recipe.
OptionSet: TypeAlias = PassOptions | Mapping[str, Any]
Case: TypeAlias = tuple[str, Callable[[], Iterable[Outcome]]]


def check(
    pass_class: Any,
    options: Sequence[OptionSet] = (),
    models: Mapping[str, Callable[[], ir.Model]] | None = None,
) -> Iterator[Outcome]:
    """Run the whole suite.

    Args:
        pass_class: The class.
        options: Sets to try besides the defaults.
        models: Functions that make further models, by name; only there the pass's own sites are.

    Yields:
        What each check found, in order.
    """
    suite = _Suite(pass_class, options, models or {})
    for _, case in suite.cases():
        yield from case()
    yield from suite.sites()


def conformance_tests(
    pass_class: Any,
    options: Sequence[OptionSet] = (),
    models: Mapping[str, Callable[[], ir.Model]] | None = None,
) -> Callable[..., None]:
    """A test function that runs the suite; see ``check`` for the arguments.

    With pytest installed, it is one test per model and set of options; without, one in all.
    """
    cases = dict(_Suite(pass_class, options, models or {}).cases())

    def test(case: str) -> None:
        _assert_passed(cases[case]())

    def test_all() -> None:
        _assert_passed(outcome for case in cases.values() for outcome in case())

    try:
        import pytest
    except ImportError:
        return test_all
    parametrized: Callable[..., None] = pytest.mark.parametrize("case", list(cases))(test)
    return parametrized


def _assert_passed(outcomes: Iterable[Outcome]) -> None:
    failed = [str(outcome) for outcome in outcomes if outcome.status is Status.FAILED]
    if failed:
        raise AssertionError("\n".join(failed))


class _Suite:
    """The cases for one pass."""

    def __init__(
        self,
        pass_class: Any,
        options: Sequence[OptionSet],
        models: Mapping[str, Callable[[], ir.Model]],
    ) -> None:
        self._class = pass_class
        self._class_outcomes = list(declared.check_class(pass_class))
        self._samples = (*MODELS, *(Sample(name, build) for name, build in models.items()))
        self._sets: list[PassOptions] = []
        if all(outcome.status is Status.PASSED for outcome in self._class_outcomes):
            self._sets = [make_options(pass_class, {})]
            for given in options:
                made = given if isinstance(given, PassOptions) else make_options(pass_class, given)
                if made not in self._sets:
                    self._sets.append(made)
        self._subjects = [Subject(pass_class, chosen) for chosen in self._sets]

    def cases(self) -> Iterator[Case]:
        """(name, what yields its outcomes); only the class itself where that is not usable."""
        yield "class", lambda: self._class_outcomes
        if not self._sets:
            return
        yield "documentation", lambda: declared.check_documentation(self._class)
        yield "options", lambda: declared.check_options(self._class, self._sets)
        for subject in self._subjects:
            for sample in self._samples:
                name = f"{declared.text_of(subject.options)}-{sample.name}"
                yield name, self._trial(subject, sample)
        yield "elsewhere", lambda: check_elsewhere(self._class, self._sets)

    def _trial(self, subject: Subject, sample: Sample) -> Callable[[], Iterable[Outcome]]:
        return lambda: subject.on(sample)

    def sites(self) -> Iterator[Outcome]:
        """After all others: whether the pass found anything to do."""
        for subject in self._subjects:
            where = f"options {declared.text_of(subject.options)}"
            names = ", ".join(subject.rewritten)
            if names:
                yield Outcome("sites", where, Status.PASSED, f"rewrites {names}")
            else:
                yield Outcome(
                    "sites",
                    where,
                    Status.NOTE,
                    "it rewrites no model of the suite, so little was tried",
                    "give models that it does: models={name: function}, or --model FILE",
                )
