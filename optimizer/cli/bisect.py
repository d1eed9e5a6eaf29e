"""The command ``optimize bisect``: which pass, and which rewrite in it, breaks a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from optimizer.cli.options import combine, data_options, memory_option, model_options
from optimizer.cli.options import threads_option as threads
from optimizer.errors import EXIT_DONE

if TYPE_CHECKING:
    from optimizer.bisection import Finding
    from optimizer.judges import Verdict
    from optimizer.shares import Share

#: Rewrites whose own damage is printed.
_SHARES = 20

_question = combine(
    click.option(
        "--check",
        metavar="COMMAND",
        help="Judge a model by the exit status of this command: 0 = good, 125 = cannot be judged, "
        "other = bad. '{model}' in it is the path of the model; without it, the path comes last.",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(0, min_open=True),
        metavar="SECONDS",
        help="A command that takes longer cannot judge.  [default: no limit]",
    ),
    click.option(
        "--budget",
        metavar="LIMITS",
        help="Judge a model by its drift from the original, such as perplexity<=+2%.  [default: "
        "what a run proves after each pass, then the budget of the recipe]",
    ),
    click.option(
        "--each",
        is_flag=True,
        help="Also measure what each rewrite of an approximate pass does alone.",
    ),
)


@click.command("bisect", context_settings={"help_option_names": ["-h", "--help"]})
@model_options
@_question
@data_options
@memory_option
@threads
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
@click.option("-v", "--verbose", is_flag=True, help="Print details, and what the command prints.")
def bisect_command(model: str, **options: Any) -> int:
    """Find the pass that breaks MODEL, and the rewrite in it, by trying parts of the recipe.

    The original MODEL must pass the check. Exit code 0: the question is answered, also where
    nothing is broken; 2: the original fails, or the optimized model cannot be judged.
    """
    from optimizer.cli import screen
    from optimizer.progress import start_listening

    as_json, quiet, verbose = (options.pop(key) for key in ("as_json", "quiet", "verbose"))
    passes = ",".join(options.pop("passes"))
    given = {key: value for key, value in options.items() if value is not None}
    with start_listening(quiet=quiet or as_json, verbose=verbose) as listener:
        from optimizer.api import bisect

        echo = (lambda line: listener.note(f"  | {line}")) if verbose else None
        finding = bisect(model, passes, listener=listener, echo=echo, **given)
    if as_json:
        screen.print_json(as_dict(finding))
    else:
        for line in lines(finding):
            click.echo(line)
    return EXIT_DONE


def as_dict(finding: Finding) -> dict[str, Any]:
    """JSON-compatible form."""
    rewrite, difference = finding.rewrite, finding.difference
    return {
        "status": finding.status,
        "check": finding.check,
        "pass": finding.stage,
        "place": list(finding.place),
        "rewrite": None if rewrite is None else {"site": rewrite.site, "rule": rewrite.rule},
        "number": finding.number,
        "count": finding.count,
        "good": _verdict(finding.good),
        "bad": _verdict(finding.bad),
        "without_it": _verdict(finding.alone),
        "suspects": list(finding.suspects),
        "change": finding.change,
        "difference": None if difference is None else dict(vars(difference)),
        "each": [_share(share) for share in finding.shares],
        "remarks": finding.remarks,
        "questions": [
            {"candidate": item.candidate, **(_verdict(item.verdict) or {})}
            for item in finding.questions
        ],
    }


def _verdict(verdict: Verdict | None) -> dict[str, Any] | None:
    if verdict is None:
        return None
    return {
        "outcome": verdict.outcome.value,
        "reason": verdict.reason,
        "output": list(verdict.output),
    }


def _share(share: Share) -> dict[str, Any]:
    return {
        "pass": share.stage,
        "site": share.rewrite.site,
        "rule": share.rewrite.rule,
        "drift": None if share.drift is None else share.drift.as_dict(),
        "problem": share.problem,
    }


def lines(finding: Finding) -> list[str]:
    """The answer in words."""
    asked = len(finding.questions)
    found = [f"checked {asked} time{'' if asked == 1 else 's'}: {finding.check}"]
    if finding.stage is None:
        found.append("nothing is broken: the optimized model passes")
    else:
        found += _culprit(finding)
    found += [f"note: {remark}" for remark in finding.remarks]
    if finding.shares:
        measure = finding.shares[-1].measure
        found.append(f"each rewrite alone, by {measure} from the model before its pass:")
        found += [_share_line(share) for share in finding.shares[:_SHARES]]
    if len(finding.shares) > _SHARES:
        found.append(f"  and {len(finding.shares) - _SHARES} more, which --json lists")
    return found


def _culprit(finding: Finding) -> list[str]:
    number, count = finding.place
    found = [f"broken by pass {finding.stage}, stage {number} of {count}"]
    if finding.suspects:
        found.append("by one of these, which cannot be told apart:")
        found += [f"  {name}" for name in finding.suspects]
    if finding.rewrite is not None:
        found.append(f"at {finding.rewrite}, rewrite {finding.number} of {finding.count} in it")
        before = finding.good or "good, that is the model before the pass"
        found.append(f"  only those before it: {before}")
        found.append(f"  and this one: {finding.bad}")
    elif finding.bad is not None:
        found.append(f"  with it: {finding.bad}")
    if finding.alone is not None:
        found.append(f"  all others, without this one: {finding.alone}")
    if finding.change:
        found.append(f"what it did: {finding.change}")
    if finding.difference is not None:
        value = finding.difference
        found.append(
            f"first value that differs: '{value.value}' ({value.operator}) {value.text}; "
            f"{value.method}"
        )
    output = () if finding.bad is None else finding.bad.output
    if output:
        found.append("last lines of the command:")
        found += [f"  | {line}" for line in output]
    return found


def _share_line(share: Share) -> str:
    where = f"{share.stage}: {share.rewrite}"
    if share.drift is None:
        return f"  {where}: {share.problem}"
    ratio = share.drift.perplexity_ratio
    more = "" if ratio is None else f", perplexity {100 * (ratio - 1):+.3f} %"
    return f"  {share.damage:8.2e}  {where}{more}"
