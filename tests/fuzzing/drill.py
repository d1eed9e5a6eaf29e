"""Faults on purpose, one per number: what the fuzzer must see, or its zeros mean nothing."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import onnx.parser
import onnx_ir as ir
from fuzzing import oracle
from fuzzing.engines import judged, made_up
from fuzzing.sandbox import Sandbox
from fuzzing.verdicts import Verdict

from optimizer.errors import ModelError
from optimizer.legalize import legalize
from optimizer.model_io import load_model

_MODEL = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[N,2] x) => (float[N,2] y) <float[2] w = {1, 2}> { h = Mul(x, w)  y = Tanh(h) }
""")


def _nothing(box: Sandbox) -> None:
    del box


def _die(box: Sandbox) -> None:
    del box
    os.kill(os.getpid(), signal.SIGSEGV)


def _sleep(box: Sandbox) -> None:
    del box
    time.sleep(3600)


def _fill(box: Sandbox) -> None:
    del box
    bytearray(1 << 40)


def _look(box: Sandbox) -> None:
    (box.outside / "secret.bin").read_bytes()


def _look_natively(box: Sandbox) -> None:
    libc = ctypes.CDLL(None)
    libc.close(libc.open(os.fsencode(box.outside / "secret.bin"), os.O_RDONLY))


def _write(box: Sandbox) -> None:
    (box.root / "written").write_text("x")


def _write_beside(box: Sandbox) -> None:
    (box.inside / "written").write_text("x")


def _leave(box: Sandbox) -> None:
    (box.out / ".model.1.tmp").write_text("x")


def _raise(box: Sandbox) -> None:
    del box
    raise IndexError("list index out of range")


def _whisper(box: Sandbox) -> None:
    del box
    raise ModelError("no name of a file")


def _refuse(box: Sandbox) -> None:
    raise ModelError(f"{box.inside / 'model.onnx'}: not today")


def _mistake(model: ir.Model) -> None:
    model.graph.initializers["w"].const_value = ir.tensor([1.0, 2.001])


#: What goes wrong while the model is loaded, and the verdict that must follow.
FAULTS: tuple[tuple[Callable[[Sandbox], None], str], ...] = (
    (_nothing, "agrees"),
    (_look, "trespass"),
    (_look_natively, "trespass"),
    (_write, "trespass"),
    (_write_beside, "trespass"),
    (_leave, "trespass"),
    (_fill, "memory"),
    (_raise, "crash"),
    (_whisper, "message"),
    (_refuse, "strict"),
    (_die, "died"),
    (_sleep, "hang"),
)
#: The number after them: nothing while it is loaded, but a wrong weight afterwards.
MISTAKE = len(FAULTS)


def drill(number: int, sandbox: Sandbox, begin: Callable[[str], None]) -> Verdict:
    """The engine: a model that is sound, and a program that is not."""

    def load(path: Path) -> ir.Model:
        if number < MISTAKE:
            FAULTS[number][0](sandbox)
        return load_model(path)

    def lower(model: ir.Model, target: str) -> None:
        legalize(model, target)
        if number == MISTAKE:
            _mistake(model)

    path = sandbox.place(_MODEL.SerializeToString(), {})
    with (
        mock.patch.object(oracle, "load_model", load),
        mock.patch.object(oracle, "legalize", lower),
    ):
        return judged(sandbox, path, begin, lambda runner: made_up(runner, random.Random(number)))
