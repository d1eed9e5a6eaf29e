"""The command ``optimize``: reads words, calls ``optimizer.api``, prints, and sets the exit code.

The first word is MODEL unless it is the name of a command. Nothing heavy is imported until a
command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import difflib
import gc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from optimizer import __version__
from optimizer.errors import (
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    OptimizerError,
    printable,
)

__all__ = ["cli", "main"]

_DEFAULT = "optimize"
#: Command -> what it does. Its module is imported when it is used: ``tools`` unless named below.
_COMMANDS = {
    "passes": "List the passes, explain one, or test one of your own.",
    "bench": "Measure the latency of models against each other.",
    "check": "Compare the numbers of two models; the exit code is the verdict.",
    "inspect": "Show what is in a model: blocks, operators, sizes, provenance.",
    "build": "Build a TensorRT engine of a model, without a GPU for TensorRT for RTX.",
    "bisect": "Find the pass and the rewrite in it that break a model.",
    "doctor": "Show what is installed, which targets work here, and what does not fit together.",
}
_MODULES = {"bisect": "bisect", "build": "build", "doctor": "doctor", "passes": "passes"}


class ModelOrCommand(click.Group):
    """A group whose first word is the argument of the default command unless it names another."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names shown in the help."""
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command."""
        del ctx
        if cmd_name == _DEFAULT:
            from optimizer.cli.run import run

            return run
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"optimizer.cli.{_MODULES.get(cmd_name, 'tools')}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command in front where no command is named."""
        own = {"--help", "-h", "--version"}
        if args and args[0] not in _COMMANDS and args[0] not in own:
            _check_word(args[0])
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples, then the options of the default command, then the other commands."""
        run = self.get_command(ctx, _DEFAULT)
        assert run is not None  # noqa: S101 - the default command exists
        with click.Context(run, info_name=ctx.info_name, parent=None) as inner:
            formatter.write_text(self.help or "")
            formatter.write_paragraph()
            formatter.write_usage(str(ctx.info_name), "MODEL [OPTIONS]")
            formatter.write_usage(str(ctx.info_name), "COMMAND ...", prefix="       ")
            _format_examples(formatter, str(ctx.info_name))
            with formatter.section("Commands"):
                formatter.write_dl(list(_COMMANDS.items()))
            run.format_options(inner, formatter)
            with formatter.section("Exit codes"):
                formatter.write_text(
                    "0 done, 1 internal error or disk full, 2 wrong usage or input, 3 verification "
                    "failed, 4 budget or speed-up missed, 5 nothing matched (--fail-on-noop), 6 "
                    "missing dependency, 7 engine build failed, 130 interrupted"
                )


def _check_word(word: str) -> None:
    """A first word that is neither a file nor looks like a model may be a mistyped command."""
    close = difflib.get_close_matches(word, _COMMANDS, n=1)
    if close and not Path(word).exists():
        msg = f"there is no file '{word}'; did you mean the command '{close[0]}'?"
        raise click.UsageError(msg)


def _format_examples(formatter: click.HelpFormatter, name: str) -> None:
    with formatter.section("Examples"):
        formatter.write_dl(
            [
                (f"{name} model.onnx --passes cqil,outliertune", "writes model.opt.onnx"),
                (f"{name} model.onnx --passes cqil:group=4 --dry-run", "what would match where"),
                (f"{name} hf:FOLDER --passes outliertune", "export a Hugging Face model first"),
                (f"{name} bench model.onnx model.opt.onnx", "which is faster, and by how much"),
            ]
        )


@click.group(
    cls=ModelOrCommand,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="optimize-onnx")
def cli() -> None:
    """Optimize the graph of a transformer model, pass by pass, and prove what each pass did."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point; always ends with ``SystemExit``."""
    # Graphs are many small objects that live long: to look through them all, again and again, for
    # what could be freed takes a sixth of the time of a run, and finds nothing.
    gc.set_threshold(50_000, 20, 20)
    sys.exit(run_command(sys.argv[1:] if args is None else list(args)))


def run_command(args: list[str]) -> int:
    """Run the command line and return the exit code, printing at most four lines of error."""
    verbose = any(item in ("-v", "--verbose") for item in args)
    if not verbose:
        # Those of libraries; what the user should know comes as a note of the listener.
        warnings.simplefilter("ignore")
        logging.lastResort = logging.NullHandler()
    try:
        result: Any = cli.main(args, prog_name="optimize", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        return EXIT_USAGE
    except click.ClickException as error:
        _complain(error.format_message())
        return EXIT_USAGE
    except OptimizerError as error:
        if verbose and error.__cause__ is not None:
            _trace(error)
        _complain("\n".join((str(error), *getattr(error, "__notes__", ()))))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted; nothing was written")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone: stay silent, also when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_INTERNAL
    except MemoryError:
        _complain("out of memory; nothing was written; try --verify off or fewer --samples")
        return EXIT_INTERNAL
    except Exception as error:
        if verbose:
            _trace(error)
        text = str(error).strip().splitlines()
        _complain(
            f"internal error: {type(error).__name__}: {text[0][:300] if text else ''}\n"
            "this is a defect of optimize-onnx; run again with -v for the traceback and report it"
        )
        return EXIT_INTERNAL
    return result if isinstance(result, int) else 0


def _complain(text: str) -> None:
    lines = [printable(line) for line in text.strip().split("\n") if line.strip()]
    click.echo("optimize: " + "\n".join(lines[:4]), err=True)


def _trace(error: BaseException) -> None:
    import traceback

    click.echo("".join(traceback.format_exception(error)), err=True)
