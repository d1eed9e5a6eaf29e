"""``optimize bisect``: commands that judge, what is printed, the hint of a failed run."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo_passes
import models
import onnx_ir as ir
import pytest
from conftest import Outcome

from optimizer import errors
from optimizer.api import bisect
from optimizer.command_judge import parse_command
from optimizer.legalize import ort_cpu as lowering
from optimizer.model_io import save_model
from optimizer.pass_base import Context
from passes.canonicalize import Canonicalize

Command = Callable[..., Outcome]
DEMO = Path(demo_passes.__file__)
ROOT = DEMO.parent.parent
#: The demo pass leaves a constant of this name where it is wrong.
IS_WRONG = 'grep -q wrong "$1" && exit 1'


def factors(wrong: str, kind: str = "Factors") -> str:
    return f"{DEMO}:{kind}:wrong={wrong}"


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    path = tmp_path / "chain.onnx"
    save_model(models.chain(32), path)
    return path


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where candidates are written: a path with a space."""
    folder = tmp_path / "some where"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """A command that runs a shell script, which knows the number of its run as ``$run``."""

    def write(body: str, name: str = "check.sh") -> str:
        path = tmp_path / name
        log = tmp_path / "runs"
        path.write_text(
            f"echo run >> {shlex.quote(str(log))}\n"
            f"run=$(wc -l < {shlex.quote(str(log))})\n{body}\nexit 0\n"
        )
        return f"sh {shlex.quote(str(path))}"

    return write


@pytest.fixture
def runs(tmp_path: Path) -> Callable[[], int]:
    return lambda: len((tmp_path / "runs").read_text().splitlines())


def test_the_exit_status_of_a_command_finds_the_site(
    command: Command, chain: Path, script: Any, runs: Any, temporary: Path
) -> None:
    check = script(f'echo "looking at it"; {IS_WRONG}')
    found = command("bisect", chain, "--passes", factors("19:2"), "--check", check)
    assert found.code == errors.EXIT_DONE
    lines = found.out.splitlines()
    assert lines[0] == f"checked {runs()} times: exit status of: {check}"
    assert lines[1] == "broken by pass factors, stage 2 of 3"
    assert lines[2] == "at p19, rewrite 20 of 32 in it"
    assert lines[3] == "  only those before it: good: exit status 0"
    assert lines[4] == "  and this one: bad: exit status 1"
    assert lines[5] == "  all others, without this one: good: exit status 0"
    assert lines[-2:] == ["last lines of the command:", "  | looking at it"]
    assert runs() <= 2 + 5 + 1, "both ends, log2(32), and without it"
    assert list(temporary.iterdir()) == []
    assert "factors, 16 of 32 rewrites: good: exit status 0 (at most 4 more)" in found.err
    assert "looking at it" not in found.err


def test_verbose_shows_what_the_command_prints(
    command: Command, chain: Path, script: Any, runs: Any
) -> None:
    check = script(f'echo "looking at it"; {IS_WRONG}')
    found = command("bisect", chain, "--passes", factors("1:2"), "--check", check, "-v")
    assert found.err.count("  | looking at it\n") == runs()


def test_the_path_takes_the_place_of_the_placeholder(
    command: Command, chain: Path, tmp_path: Path, temporary: Path
) -> None:
    folder = tmp_path / "my checks"
    folder.mkdir()
    path = folder / "check it.sh"
    path.write_text('echo "$#,$1,$2" >> "$2.log"\ngrep -q wrong "$1" && exit 1\nexit 0\n')
    log = folder / "calls.log"
    words = shlex.join(["sh", str(path), "{model}", str(log.with_suffix(""))])
    found = command("bisect", chain, "--passes", factors("3:2"), "--check", words, "--json")
    assert json.loads(found.out)["rewrite"] == {"site": "p3", "rule": ""}
    calls = log.read_text().splitlines()
    assert calls[0].startswith(f"2,{chain.resolve()},")
    assert all(call.startswith(f"2,{temporary}/optimize-bisect-") for call in calls[1:])


def test_words_of_a_shell_are_words(command: Command, chain: Path, tmp_path: Path) -> None:
    check = f"echo {{model}}; touch {tmp_path}/made $(touch {tmp_path}/made) > {tmp_path}/made"
    found = command("bisect", chain, "--passes", factors("3:2"), "--check", check)
    assert found.code == errors.EXIT_DONE
    assert "nothing is broken: the optimized model passes" in found.out
    assert not (tmp_path / "made").exists()
    assert parse_command("python check.py --model={model} -x") == [
        *("python", "check.py", "--model={model}", "-x")
    ]
    assert parse_command("python 'a b.py'") == ["python", "a b.py", "{model}"]


def test_a_candidate_that_cannot_be_judged_is_gone_around(
    command: Command, chain: Path, script: Any
) -> None:
    check = script(f'[ "$run" = 3 ] && exit 125\n{IS_WRONG}')
    found = command("bisect", chain, "--passes", factors("21:2"), "--check", check, "--json")
    content = json.loads(found.out)
    assert content["rewrite"]["site"] == "p21"
    outcomes = [item["outcome"] for item in content["questions"]]
    assert outcomes[:3] == ["good", "bad", "cannot be judged"]


def test_where_nothing_between_can_be_judged_the_suspects_are_named(
    command: Command, chain: Path, script: Any, runs: Any
) -> None:
    check = script('[ "$run" -gt 2 ] && exit 125\n' + IS_WRONG)
    found = command("bisect", chain, "--passes", factors("21:2"), "--check", check)
    assert found.code == errors.EXIT_DONE
    assert "by one of these, which cannot be told apart:" in found.out
    assert found.out.count("\n  p") == 32
    assert runs() == 2 + 9, "it does not try all"


def test_a_command_that_crashes_says_bad(command: Command, chain: Path, script: Any) -> None:
    check = script('grep -q wrong "$1" && kill -SEGV $$')
    found = command("bisect", chain, "--passes", factors("5:2"), "--check", check, "--json")
    content = json.loads(found.out)
    assert content["rewrite"]["site"] == "p5"
    assert content["bad"]["reason"] == "the command was ended by SIGSEGV"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo no data >&2; exit 3", ["exit status 3", "no data"]),
        ("exit 125", ["exit status 125"]),
        ("exec sleep 20", ["took longer than 0.2 s"]),
    ],
)
def test_a_check_that_fails_on_the_original_is_of_no_use(
    command: Command, chain: Path, script: Any, body: str, said: list[str]
) -> None:
    words = ("bisect", chain, "--passes", factors("5:2"), "--timeout", "0.2")
    found = command(*words, "--check", script(body))
    assert found.code == errors.EXIT_USAGE
    assert "fails on the original model" in found.err
    assert all(text in found.err for text in said)
    complaint = found.err[found.err.index("optimize: ") :]
    assert len(complaint.splitlines()) <= 4
    assert "Traceback" not in found.err


def test_a_command_that_takes_too_long_is_ended_with_all_it_started(
    command: Command, chain: Path, script: Any, tmp_path: Path, temporary: Path
) -> None:
    body = f'[ "$run" = 1 ] && exit 0\nsleep 50 &\necho $$ $! > {tmp_path}/pids\nwait'
    started = time.perf_counter()
    words = ("bisect", chain, "--passes", factors("5:2"), "--timeout", "0.5")
    found = command(*words, "--check", script(body))
    assert time.perf_counter() - started < 20
    assert found.code == errors.EXIT_USAGE
    assert "cannot judge the optimized model (the command took longer than 0.5 s)" in found.err
    assert_ended(tmp_path / "pids")
    assert list(temporary.iterdir()) == []


def assert_ended(pids: Path) -> None:
    for pid in pids.read_text().split():
        deadline = time.perf_counter() + 5
        while is_running(int(pid)):
            assert time.perf_counter() < deadline, f"process {pid} is still there"
            time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"


@pytest.mark.parametrize("check", ["no-such-program {model}", "/etc/passwd {model}", "' x"])
def test_a_command_that_cannot_be_started_is_wrong_use(
    command: Command, chain: Path, check: str
) -> None:
    found = command("bisect", chain, "--passes", factors("5:2"), "--check", check)
    assert found.code == errors.EXIT_USAGE
    assert "--check: " in found.err
    assert len(found.lines) == 1


def test_ctrl_c_ends_the_command_and_leaves_nothing(
    chain: Path, script: Any, tmp_path: Path, temporary: Path
) -> None:
    body = f'[ "$run" = 1 ] && exit 0\nsleep 50 &\necho $$ $! > {tmp_path}/pids\nwait'
    environment = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": "/usr/bin:/bin",
        "TMPDIR": str(temporary),
    }
    words = ["bisect", str(chain), "--passes", factors("5:2"), "--check", script(body)]
    with subprocess.Popen(
        [sys.executable, "-m", "optimizer", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell starts background jobs with the signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    ) as process:
        deadline = time.perf_counter() + 60
        while not (tmp_path / "pids").exists() and time.perf_counter() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # until the numbers are in it
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == errors.EXIT_INTERRUPTED
    assert out == ""
    assert "Traceback" not in err
    assert_ended(tmp_path / "pids")
    assert list(temporary.iterdir()) == []


def broken_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowering of the second attention leaves a mark."""
    rule, calls = lowering.decompose.attention, []

    def wrong(pen: Any) -> None:
        calls.append(pen)
        rule(pen)
        if str(pen.node.name) == attentions[1]:
            value = pen.graph.initializers.pop(next(iter(pen.graph.initializers)))
            value.name = "wrong"
            pen.graph.initializers.add(value)

    attentions = [str(n.name) for n in models.build().graph if n.op_type == "Attention"]
    monkeypatch.setattr(lowering.decompose, "attention", wrong)


def test_the_lowering_is_told_from_the_pass_whose_result_it_lowers(
    command: Command, small: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_lowering(monkeypatch)
    words = ("bisect", small, "--passes", f"{DEMO}:Swap", "--json", "--check")
    content = json.loads(command(*words, script(IS_WRONG)).out)
    assert (content["pass"], content["place"]) == ("legalize", [3, 3])
    assert content["rewrite"]["rule"] == "causal attention"
    assert content["number"] == 2
    only_lowered = f'[ "$run" != 1 ] && grep -q Attention "$1" && exit 125\n{IS_WRONG}'
    (small.parent / "runs").unlink()
    content = json.loads(command(*words, script(only_lowered)).out)
    assert any("may be the lowering" in remark for remark in content["remarks"])


def test_the_lowering_is_judged_where_no_pass_changed_anything(
    command: Command, tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = models.build(), tmp_path / "canonical.onnx"
    Canonicalize().call(model, Context())
    save_model(model, path)
    broken_lowering(monkeypatch)
    content = json.loads(command("bisect", path, "--check", script(IS_WRONG), "--json").out)
    assert (content["pass"], content["place"], content["number"]) == ("legalize", [2, 2], 2)


def test_a_model_in_memory_is_written_for_the_command_too(script: Any, temporary: Path) -> None:
    model: ir.Model = models.chain(8)
    finding = bisect(model, factors("2:2"), check=script(f'[ -f "$1" ] || exit 2\n{IS_WRONG}'))
    assert finding.rewrite is not None
    assert finding.rewrite.site == "p2"
    assert list(temporary.iterdir()) == []


def test_json_holds_everything(command: Command, chain: Path) -> None:
    passes = factors("7:2", "RoughFactors")
    words = ("bisect", chain, "--passes", passes, "--budget", "relative_l2<=0.1", "--each")
    found = command(*words, "--json")
    assert (found.code, found.err) == (0, "")
    content = json.loads(found.out)
    assert content["status"] == "rewrite"
    assert content["pass"] == "rough-factors"
    assert content["rewrite"] == {"site": "p7", "rule": ""}
    assert (content["number"], content["count"]) == (8, 32)
    assert content["without_it"]["outcome"] == "good"
    assert len(content["each"]) == 32
    assert content["each"][0]["site"] == "p7"
    assert content["each"][0]["drift"]["relative_l2"] == pytest.approx(1)
    assert content["questions"][0]["candidate"] == "the original model"
    text = command(*words, "-q")
    assert text.err == ""
    lines = text.out.splitlines()
    start = lines.index("each rewrite alone, by relative L2 from the model before its pass:")
    assert lines[start + 1] == "  1.00e+00  rough-factors: p7"
    assert lines[-1] == "  and 12 more, which --json lists"


def test_a_recipe_file_is_searched_with_its_budget(
    command: Command, small: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.toml"
    words = ("--passes", f"{DEMO}:Scale,{DEMO}:Swap", "--budget", "relative_l2<=1e-4", "--keep")
    command(small, *words, "--save-recipe", recipe, "-q")
    content = json.loads(command("bisect", small, "--recipe", recipe, "--json").out)
    assert (content["status"], content["pass"]) == ("pass", "scale")
    assert content["check"] == "relative_l2<=1e-4 on 6 samples"


def test_a_failed_run_ends_with_the_line_that_finds_the_reason(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("a chain.onnx")
    save_model(models.chain(32), path)
    options = ("--target", "ort-cuda", "--set", "factors.wrong=13:2", "--threads", 2)
    found = command(path, "--passes", f"{DEMO}:Factors", *options, "--verify", "each", "-q")
    assert found.code == errors.EXIT_VERIFICATION
    assert len(found.lines) == 2
    assert "pass 'factors': output" in found.lines[0]
    first, *words = shlex.split(found.lines[1])
    assert [first, *words[:2]] == ["next:", "optimize", "bisect"]
    assert {"ort-cuda", "factors.wrong=13:2"} <= set(words)
    assert "--samples" not in words
    answer = command(*words[1:])
    assert answer.code == errors.EXIT_DONE
    assert "at p13, rewrite 14 of 32 in it" in answer.out
    assert "first value that differs: 'y13' (Mul) is off by" in answer.out
