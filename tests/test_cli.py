"""The command: words in, tables or JSON out, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import demo_passes
import numpy as np
import pytest
from conftest import Outcome, token_samples

from optimizer import __version__, errors
from optimizer.cli import cli
from optimizer.cli.options import parse_size

Command = Callable[..., Outcome]
DEMO = Path(demo_passes.__file__)
ROOT = DEMO.parent.parent


def demo(*names: str) -> str:
    return ",".join(f"{DEMO}:{name}" for name in names)


def test_help_starts_with_examples_and_ends_with_exit_codes(command: Command) -> None:
    for words in (["--help"], ["-h"]):
        found = command(*words)
        assert found.code == 0
        assert "--passes" in found.out
        assert found.out.index("Examples") < found.out.index("Options") < found.out.index("Exit")
        for name in ("passes", "bench", "check", "inspect"):
            assert name in found.out


def test_every_option_of_every_command_has_a_help_text() -> None:
    context = click.Context(cli)
    for name in ("optimize", *cli.list_commands(context)):
        found = cli.get_command(context, name)
        assert found is not None
        assert found.help
        for parameter in found.params:
            if isinstance(parameter, click.Option) and parameter.name not in ("threads", "rounds"):
                assert parameter.help, f"{name} {parameter.opts}"


def test_the_version_is_printed(command: Command) -> None:
    assert __version__ in command("--version").out


def test_no_words_print_the_help_and_mean_wrong_usage(command: Command) -> None:
    found = command()
    assert found.code == 2
    assert "--passes" in found.out


def test_the_first_word_is_a_model_unless_it_is_a_command(command: Command, small: Path) -> None:
    assert command("passes").code == 0
    assert command(small, "-q").code == 0
    assert command("--verify", "off", "-q", "--force", small).code == 0
    assert command("./passes").code == 2


def test_a_run_prints_one_row_per_stage_and_what_comes_next(command: Command, small: Path) -> None:
    found = command(small, "--passes", demo("Scale", "Nothing"))
    assert found.code == 0
    lines = found.out.splitlines()
    assert lines[0].startswith(f"{small}  ")
    for name in ("canonicalize", "scale", "nothing", "legalize"):
        assert any(line.startswith(name) for line in lines)
    assert any("nothing left layer 0, layer 1 alone: it is not blue" in line for line in lines)
    assert any(line.startswith("drift on 6 samples") for line in lines)
    assert lines[-2].startswith(f"wrote {small.with_name('small.opt.onnx')}")
    assert lines[-1].startswith("next: optimize bench")
    assert "calibration data:" in found.err
    assert "\x1b" not in found.out + found.err


def test_quiet_says_nothing(command: Command, small: Path) -> None:
    found = command(small, "--passes", demo("Scale"), "--quiet")
    assert (found.code, found.out, found.err) == (0, "", "")


def test_json_is_one_object_on_stdout(command: Command, small: Path) -> None:
    found = command(small, "--passes", demo("Scale"), "--json")
    content = json.loads(found.out)
    assert content["output"] == str(small.with_name("small.opt.onnx"))
    assert content["report"]["passes"][1]["pass"] == "scale"
    assert found.err == ""


def test_set_and_inline_options_reach_the_pass(command: Command, small: Path) -> None:
    words = (small, "--json", "--force", "--verify", "off", "--passes")
    inline = json.loads(command(*words, demo("Scale") + ":factor=1.5").out)
    by_set = json.loads(command(*words, demo("Scale"), "--set", "scale.factor=1.5").out)
    for content in (inline, by_set):
        assert content["recipe"]["passes"][0]["factor"] == 1.5


def test_a_saved_recipe_gives_the_same_model(command: Command, small: Path, tmp_path: Path) -> None:
    recipe, first, second = (tmp_path / name for name in ("r.toml", "a.onnx", "b.onnx"))
    words = (small, "--passes", demo("Scale"), "--save-recipe", recipe, "-o", first, "-q")
    assert command(*words).code == 0
    assert command(small, "--recipe", recipe, "-o", second, "-q").code == 0
    assert first.read_bytes() == second.read_bytes()


def test_a_dry_run_says_what_would_match(command: Command, small: Path) -> None:
    found = command(small, "--passes", demo("Scale"), "--dry-run")
    assert found.code == 0
    assert "nothing was written" in found.out
    assert not small.with_name("small.opt.onnx").exists()


def test_explain_lists_every_site(command: Command, small: Path) -> None:
    found = command(small, "--passes", demo("Nothing"), "--explain", "--dry-run")
    assert "nothing left layer 0 alone: it is not blue" in found.out
    assert "nothing left layer 1 alone: it is not blue" in found.out


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--passes", demo("Wrong")], errors.EXIT_VERIFICATION),
        (["--passes", demo("Scale"), "--budget", "relative_l2<=1e-6"], errors.EXIT_BUDGET),
        (["--passes", demo("Scale"), "--require-speedup", "1000"], errors.EXIT_BUDGET),
        (["--passes", demo("Nothing"), "--fail-on-noop"], errors.EXIT_NOOP),
        (["--passes", demo("Crash")], errors.EXIT_INTERNAL),
        (["--passes", demo("Interrupted")], errors.EXIT_INTERRUPTED),
        (["--passes", demo("Swap", "Scale")], errors.EXIT_USAGE),
    ],
)
def test_each_way_to_fail_has_its_exit_code_and_leaves_nothing(
    command: Command, small: Path, words: list[str], code: int
) -> None:
    before = sorted(small.parent.iterdir())
    found = command(small, *words)
    assert found.code == code
    assert found.out == ""
    errors_only = [line for line in found.lines if "calibration data:" not in line]
    assert 1 <= len(errors_only) <= 4
    assert "Traceback" not in found.err
    assert sorted(small.parent.iterdir()) == before


def test_verbose_adds_the_traceback(command: Command, small: Path) -> None:
    found = command(small, "--passes", demo("Crash"), "-v")
    assert found.code == errors.EXIT_INTERNAL
    assert "Traceback" in found.err


def test_keep_writes_what_misses_the_budget(command: Command, small: Path) -> None:
    found = command(
        small, "--passes", demo("Scale"), "--budget", "relative_l2<=1e-6", "--keep", "-q"
    )
    assert found.code == errors.EXIT_BUDGET
    assert small.with_name("small.opt.onnx").exists()


def test_passes_are_listed_and_explained(command: Command) -> None:
    listed = command("passes")
    assert "canonicalize" in listed.out
    content = json.loads(command("passes", "--json").out)
    assert {"name", "exactness", "options", "schema", "needs_calibration"} <= set(content[0])
    explained = command("passes", demo("Scale"))
    assert "factor = 1.001" in explained.out
    found = command("passes", "canonicalise")
    assert found.code == 2
    assert "canonicalize" in found.err


def test_inspect_shows_blocks_and_provenance(command: Command, small: Path) -> None:
    content = json.loads(command("inspect", small, "--json").out)
    assert len(content["blocks"]) == 4
    assert content["blocks"][0]["heads"] == 4
    assert content["provenance"] is None
    text = command("inspect", small).out
    assert "blocks 0-3 (21.5 k parameters, 86 kB): pre-norm, rms norm, width 32, " in text
    assert "4 heads x 8 (2 KV)" in text
    command(small, "--passes", demo("Scale"), "-q")
    text = command("inspect", small.with_name("small.opt.onnx")).out
    assert "optimized for ort-cpu with: scale" in text


def test_check_is_a_verdict(command: Command, small: Path) -> None:
    output = small.with_name("small.opt.onnx")
    command(small, "--passes", demo("Scale"), "-q")
    assert command("check", small, small).code == 0
    found = command("check", small, output)
    assert found.code == errors.EXIT_VERIFICATION
    assert "relative_l2<=1e-4: measured 0.001" in found.out
    assert command("check", small, output, "--budget", "relative_l2<=0.01").code == 0
    content = json.loads(command("check", small, output, "--json").out)
    assert content["failures"]


def test_bench_compares_with_the_first(command: Command, small: Path) -> None:
    words = ("bench", small, small, "--rounds", 3, "--shape", "sequence=4")
    found = command(*words)
    assert found.code == 0
    assert "speed-up" in found.out
    content = json.loads(command(*words, "--json").out)
    assert len(content["timings"]) == 2
    assert content["shapes"]["input_ids"] == [1, 4]
    assert command(*words, "--require-speedup", "1000").code == errors.EXIT_BUDGET


@pytest.mark.parametrize(
    ("text", "count"), [("8GB", 8 * 10**9), ("512 MB", 512 * 10**6), ("1GiB", 2**30), ("17", 17)]
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_size(text) == count


def test_the_module_is_the_command() -> None:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "optimizer", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert __version__ in done.stdout
    # Goal 0.3 s on an idle machine; a loaded one gets ten times that.
    assert time.perf_counter() - started < 3


def test_a_signal_ends_a_real_run_with_130_and_no_output(small: Path) -> None:
    environment = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": "/usr/bin:/bin",
    }
    waiting = small.with_name("waiting.py")
    waiting.write_text(
        "import time\n"
        "from demo_passes import Nothing\n"
        "class Wait(Nothing):\n"
        "    name = 'wait'\n"
        "    def call(self, model, context):\n"
        "        print('here', flush=True)\n"
        "        time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "optimizer", str(small), "--passes", f"{waiting}:Wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell starts background jobs with the signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == errors.EXIT_INTERRUPTED
    assert "Traceback" not in err
    left = sorted(item.name for item in small.parent.iterdir())
    assert left == ["small.calibration.npz", "small.onnx", "waiting.py"]


def test_words_that_mean_nothing_are_refused_with_a_suggestion(
    command: Command, small: Path
) -> None:
    for words, part in (
        ([small, "--pases", "cqil"], "--passes"),
        ([small, "--passes", "cqill"], "cqil"),
        ([small, "--target", "ort-cpuu"], "ort-cpu"),
        ([small, "--verify", "never"], "each"),
        (["bench", small, "--shape", "sequence"], "NAME=N"),
        ([small, "--max-memory", "lots"], "8GB"),
        ([small, "extra"], "extra"),
    ):
        found = command(*words)
        assert found.code == 2, words
        assert part in found.err
        assert len(found.lines) <= 4


def test_a_function_can_feed_the_command(
    command: Command, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "data.npz", **token_samples(count=2))
    (tmp_path / "feed_two.py").write_text(
        "import numpy\n"
        "def rows():\n"
        f"    for row in numpy.load({str(tmp_path / 'data.npz')!r})['input_ids']:\n"
        "        yield {'input_ids': row[None]}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    words: tuple[Any, ...] = (small, "--passes", demo("Scale"), "--calibration", "feed_two:rows")
    content = json.loads(command(*words, "--json").out)
    assert content["report"]["samples"] == 2
