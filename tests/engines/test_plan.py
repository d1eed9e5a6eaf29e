"""What a plan and its manifest tell, and which machines an engine fits."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import models
import pytest

from optimizer.engine_inspection import describe_engine
from optimizer.engines.manifest import fits_gpu, fits_version
from optimizer.engines.plan import Plan, is_engine, read_plan
from optimizer.environment.facts import Facts, Gpu, Nvidia, TensorRt
from optimizer.errors import EngineError
from optimizer.hashing import hash_file
from optimizer.machine import describe_cpu, describe_memory

VERSION = bytes((1, 7, 1, 116))


def rtx(bits: int, *, layout: int = 2, size: int = 200, inner: bytes = b"vtrt") -> bytes:
    head = b"vtrt" + bytes(4) + struct.pack("<QQ", layout, size) + VERSION + inner
    return (head + struct.pack("<Q", bits)).ljust(200, b"\0")


def write(folder: Path, content: bytes) -> Path:
    path = folder / "x.engine"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "capabilities", "later"),
    [
        (rtx(0b1), (75,), False),
        (rtx(0b1100), (86, 89), False),
        (rtx(0b111110), (80, 86, 89, 120, 121), False),
        (rtx(0b1111110), (80, 86, 89, 120, 121), True),
        (rtx(0), None, False),
        (rtx(1 << 7), None, False),  # a GPU that nobody here knows
        (rtx(0b1100, layout=3), None, False),
        (rtx(0b1100, inner=b"abcd"), None, False),
        (b"ftrt" + bytes(20) + bytes((10, 3, 0, 30)) + bytes(100), None, False),
    ],
)
def test_the_gpus_that_a_plan_names(tmp_path, content, capabilities, later):
    plan = read_plan(write(tmp_path, content))
    assert (plan.capabilities, plan.later) == (capabilities, later)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (rtx(8)[:100], "says that it has 200 bytes, the file has 100"),
        (rtx(8)[:20], "is no TensorRT engine"),
        (b"", "is no TensorRT engine"),
        (b"ftrt", "is no TensorRT engine"),
        (b"\x08\x07onnx" + bytes(100), "is no TensorRT engine"),
    ],
)
def test_no_plan_or_a_part_of_one(tmp_path, content, says):
    with pytest.raises(EngineError, match=says):
        read_plan(write(tmp_path, content))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(EngineError, match="No such file"):
        read_plan(tmp_path / "none.engine")
    with pytest.raises(EngineError, match="Is a directory"):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "is_one"),
    [
        ("x.engine", b"", True),
        ("x.plan", b"", True),
        ("x.trt", rtx(8), True),
        ("x", b"ftrt" + bytes(40), True),
        ("x.onnx", b"\x08\x07", False),
        ("x.onnx", b"", False),
    ],
)
def test_what_is_taken_for_an_engine(tmp_path, name, content, is_one):
    (tmp_path / name).write_bytes(content)
    assert is_engine(tmp_path / name) == is_one
    assert is_engine(str(tmp_path / name)) == is_one
    assert not is_engine(tmp_path / "none.onnx")
    assert not is_engine(tmp_path)
    assert not is_engine(models.build())


RTX = Plan("tensorrt-rtx", "1.7.1.116", 200, (86, 89))
ALL = Plan("tensorrt-rtx", "1.7.1.116", 200, (80, 86, 89, 120, 121), later=True)
FULL = Plan("tensorrt", "10.3.0.30", 200)
BUILT = {"compute_capabilities": None, "gpu": {"name": "L4", "capability": "8.9"}}


@pytest.mark.parametrize(
    ("plan", "manifest", "capability", "fits"),
    [
        (RTX, None, "8.6", True),
        (RTX, None, "8.9", True),
        (RTX, None, "8.0", False),
        (RTX, None, "8.7", False),  # between two that it has
        (RTX, None, "12.0", False),  # newer than both
        (RTX, {"compute_capabilities": [120]}, "12.0", False),  # the plan is right
        (ALL, None, "12.1", True),
        (ALL, None, "13.0", True),
        (ALL, None, "9.0", False),  # no kernels of TensorRT for RTX
        (ALL, None, "7.5", False),
        (FULL, None, "7.5", True),  # nobody knows
        (FULL, BUILT, "8.9", True),
        (FULL, BUILT, "8.6", False),
        (FULL, {**BUILT, "hardware_compatible": True}, "8.0", True),
        (FULL, {**BUILT, "hardware_compatible": True}, "12.0", True),
        (FULL, {**BUILT, "hardware_compatible": True}, "7.5", False),
    ],
)
def test_which_gpus_an_engine_runs_on(plan, manifest, capability, fits):
    assert fits_gpu(plan, manifest, capability) == fits


@pytest.mark.parametrize(
    ("version", "compatible", "fits"),
    [
        ("10.3.0.30", False, True),
        ("10.3.0.26", False, True),
        ("10.3.1", False, False),
        ("10.7.0", False, False),
        ("10.7.0", True, True),
        ("11.1.0.1", True, True),
        ("10.2.0", True, False),
    ],
)
def test_which_versions_load_an_engine(version, compatible, fits):
    assert fits_version(FULL, {"version_compatible": compatible}, version) == fits


def machine(*capabilities: str, version: str = "1.7.1.116") -> Facts:
    return Facts(
        "0", Path(), installed=False, python="3.11", system="", platform="linux",
        cpu=describe_cpu(), memory=describe_memory(),
        tensorrt=(TensorRt("tensorrt-rtx", version), TensorRt("tensorrt", "10.3.0.30")),
        nvidia=Nvidia(tuple(Gpu("a GPU", item) for item in capabilities)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "here", "says"),
    [
        (0b1000, machine("8.9"), "a GPU of 89; this machine has 1.7.1.116, 8.9: nothing against"),
        (0b1000, machine("8.6", "8.9"), "8.6, 8.9: nothing against it"),
        (0b0100, machine("8.9"), "it has no kernels for compute capability 8.9"),
        (0b1111110, machine("13.0"), "120 or 121 or later; this machine has 1.7.1.116, 13.0: noth"),
        (
            0b1000,
            machine(version="1.6.0.1"),
            "version 1.6.0.1 is installed; there is no NVIDIA GPU",
        ),
    ],
)
def test_inspect_in_one_line(tmp_path, bits, here, says):
    found = describe_engine(write(tmp_path, rtx(bits)), here)
    assert says in found["text"]
    assert "\n" not in found["text"]
    assert bool(found["problems"]) == ("nothing" not in says and "noth" not in says)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, "the kind of GPU it was built on (the plan does not tell which)"),
        ({"gpu": BUILT["gpu"]}, "a GPU like the L4 it was built on (8.9)"),
        ({"gpu": BUILT["gpu"], "hardware_compatible": True}, "a GPU of 80 or later"),
    ],
)
def test_what_only_the_manifest_of_full_tensorrt_tells(tmp_path, facts: dict[str, Any], says):
    path = write(tmp_path, b"ftrt" + bytes(20) + bytes((10, 3, 0, 30)) + bytes(100))
    content = {
        "engine": {"sha256": hash_file(path)}, "compute_capabilities": None, "profiles": [],
        "plugins": [{"file": "turn.so"}], "version_compatible": False, **facts,
    }  # fmt: skip
    path.with_name("x.engine.manifest.json").write_text(json.dumps(content))
    found = describe_engine(path, machine("8.6"))
    assert f"needs tensorrt 10.3.0.30, {says}, the plugins turn.so;" in found["text"]
