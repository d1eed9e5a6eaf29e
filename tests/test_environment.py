"""Facts of machines that are a folder of files: packages, shared libraries, runtimes, devices."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from fake_machine import Machine
from hypothesis import given
from hypothesis import strategies as st

from optimizer.environment import collect
from optimizer.environment.facts import Gpu, TensorRt
from optimizer.environment.libraries import Libraries
from optimizer.environment.packages import distributions
from optimizer.environment.versions import Requirement, parse_requirement, release, satisfies

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


# Versions


@pytest.mark.parametrize(("version", "wanted", "expected"), [
    ("1.30", ">=1.30,<2", True), ("1.29.9", ">=1.30,<2", False), ("2.0", ">=1.30,<2", False),
    ("1.31.1", "", True), ("1.7.1.116", "~=1.7.1", True), ("1.8", "~=1.7.1", False),
    ("1.7.0", "~=1.7.1", False), ("2.0.0", "~=2.0.0", True), ("2.1", "~=2.0.0", False),
    ("2.13.0+cpu", "==2.13.0", True), ("2.13", "==2.13.0", True), ("10.3.0", "==10.*", True),
    ("11.4.0.106", "==10.*", False), ("3.0", "!=3.0.*", False), ("3.1", "!=3.0.*", True),
    ("3.0", "!=3.0", False), ("1.0rc1", ">=1.0", True), ("1.0.post1", ">1.0", False),
    ("0.9", "<=0.9.0", True), ("1.21.3", "~=1.21.0", True), ("1.23.2", "~=1.21.0", False),
])  # fmt: skip
def test_versions_are_compared_by_release(version: str, wanted: str, expected: bool) -> None:
    assert satisfies(version, wanted) is expected


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_zeros_at_the_end_of_a_version_mean_nothing(numbers: list[int]) -> None:
    version = ".".join(map(str, numbers))
    assert release(version) == release(f"v{version}.0") == release(f"{version}.0+local")
    assert satisfies(version, f"=={version}")
    assert not satisfies(version, f">{version}")


@pytest.mark.parametrize(("text", "expected"), [
    ("numpy", Requirement("numpy", "")),
    ("Ml_Dtypes >= 0.5, <1", Requirement("ml-dtypes", ">=0.5,<1")),
    ("onnxruntime<2,>=1.30; extra == 'cpu'", Requirement("onnxruntime", "<2,>=1.30", "cpu")),
    ("a[b]>=1; python_version < '3.12' and extra == \"x\"",
     Requirement("a", ">=1", "x", "python_version < '3.12'")),
    ("torch (>=2)", Requirement("torch", ">=2")),
    ("a @ https://example.org/a.whl", None),
    ("", None),
])  # fmt: skip
def test_requirements_are_read(text: str, expected: Requirement | None) -> None:
    assert parse_requirement(text) == expected


# Packages


def test_distributions_are_found_with_what_they_always_need(machine: Machine) -> None:
    machine.install("Onnx_IR", "1.1.0", requires=["numpy>=2", "x; extra == 'y'", "z; a == 'b'"])
    (machine.site / "broken-1.0.dist-info").mkdir()
    (machine.site / "old.egg-info").write_text("Name: old\nVersion: 3\n")
    found = {item.name: item for item in distributions(machine.probe(machine.base / "none"))}
    assert set(found) == {"onnx-ir", "old"}
    assert found["onnx-ir"].version == "1.1.0"
    assert found["onnx-ir"].requires == (Requirement("numpy", ">=2"),)


def test_the_first_of_two_installed_versions_counts(machine: Machine) -> None:
    user = machine.base / "user"
    machine.install("onnx", "1.23.0")
    machine.install("onnx", "1.19.0", site=user)
    facts = collect(machine.probe(user))
    assert facts.version_of("onnx") == "1.23.0"
    assert [(item.version, item.folder.parent) for item in facts.doubles] == [("1.19.0", user)]


def test_own_requirements_come_from_the_checkout_or_from_the_metadata(machine: Machine) -> None:
    assert collect(machine.probe()).requirements == ()
    machine.install("optimize-onnx", "9", requires=["onnx>=1.22", "torch>=2; extra == 'torch'"])
    facts = collect(machine.probe())
    assert facts.requirements == (
        Requirement("onnx", ">=1.22"),
        Requirement("torch", ">=2", "torch"),
    )
    assert facts.installed
    facts = collect(machine.probe(own=ROOT))
    ours = {(item.name, item.extra) for item in facts.requirements}
    assert {("onnx", None), ("onnxruntime", "cpu"), ("onnxruntime-gpu", "gpu")} <= ours
    machine.module("pyproject.toml", "[project]\nname = 'another'\n")
    assert len(collect(machine.probe()).requirements) == 2


def test_other_packages_under_our_names_are_found(machine: Machine) -> None:
    before, after = machine.base / "before", machine.base / "after"
    for folder in (before, after):
        folder.mkdir()
        (folder / "passes.py").touch()
    (machine.home / "optimizer").mkdir()
    (machine.home / "optimizer/__init__.py").touch()
    machine.install("keras-optimizer", "1.0", files=["optimizer/__init__.py", "optimizer/x.py"])
    machine.install("harmless", "1.0", files=["not_optimizer/__init__.py"])
    probe = machine.probe(search_path=(before, machine.site, after))
    found = {(item.path, item.name, item.first, item.owner) for item in collect(probe).foreign}
    assert found == {
        (before / "passes.py", "passes", True, None),
        (after / "passes.py", "passes", False, None),
        (machine.home / "optimizer/__init__.py", "optimizer", True, None),
        (machine.site / "optimizer/__init__.py", "optimizer", True, "keras-optimizer"),
    }


# Shared libraries


def needs(machine: Machine, path: Path, **changes: object) -> dict[str, tuple[str, str | None]]:
    """Name -> who finds it, and the folder where, relative to the machine."""
    described = Libraries(machine.probe(**changes)).describe(path)
    assert described.error == ""
    return {
        need.name: (
            need.finder,
            None if need.path is None else str(need.path.parent.relative_to(machine.base)),
        )
        for need in described.needs
    }


def test_libraries_are_looked_for_where_the_loader_looks(machine: Machine) -> None:
    machine.library("/usr/local/lib/libcached.so.1")
    machine.library("/usr/lib64/libdefault.so.2")
    machine.library("/opt/env/libenv.so.3")
    machine.library("pkg/liborigin.so.4")
    machine.library("nvidia/cu13/lib/libcudart.so.13")
    names = ["libcached.so.1", "libdefault.so.2", "libenv.so.3", "liborigin.so.4"]
    user = machine.library(
        "pkg/libuser.so", [*names, "libcudart.so.13", "libgone.so.1"], runpath="$ORIGIN"
    )
    found = needs(machine, user, environment={"LD_LIBRARY_PATH": "/opt/env:"})
    assert found == {
        "libcached.so.1": ("loader", "root/usr/local/lib"),
        "libdefault.so.2": ("loader", "root/usr/lib64"),
        "libenv.so.3": ("loader", "root/opt/env"),
        "liborigin.so.4": ("loader", "site/pkg"),
        "libcudart.so.13": ("python", "site/nvidia/cu13/lib"),
        "libgone.so.1": ("nobody", None),
    }
    assert needs(machine, user)["libenv.so.3"] == ("nobody", None)


def test_a_run_path_comes_after_the_environment_and_an_rpath_before(machine: Machine) -> None:
    machine.library("/opt/env/liba.so.1")
    machine.library("pkg/inner/liba.so.1")
    changes = {"environment": {"LD_LIBRARY_PATH": "/opt/env"}}
    new = machine.library("pkg/libnew.so", ["liba.so.1"], runpath="${ORIGIN}/inner")
    old = machine.library("pkg/libold.so", ["liba.so.1"], rpath="$ORIGIN/inner")
    both = machine.library("pkg/libboth.so", ["liba.so.1"], rpath="$ORIGIN/inner", runpath="/no")
    assert needs(machine, new, **changes)["liba.so.1"][1] == "root/opt/env"
    assert needs(machine, old, **changes)["liba.so.1"][1] == "site/pkg/inner"
    assert needs(machine, both, **changes)["liba.so.1"][1] == "root/opt/env"


def test_libraries_for_another_processor_are_passed_over(machine: Machine) -> None:
    machine.library("/usr/lib64/liba.so.1", machine=183)
    machine.library("/lib/liba.so.1", bits=32, machine=3)
    user = machine.library("pkg/libuser.so", ["liba.so.1"])
    assert needs(machine, user) == {"liba.so.1": ("nobody", None)}


def test_other_versions_of_a_missing_library_are_named(machine: Machine) -> None:
    other = machine.library("tensorrt_libs/libnvinfer.so.11")
    machine.library("tensorrt_libs/libnvinfer_plugin.so.11")
    user = machine.library("pkg/libuser.so", ["libnvinfer.so.10"])
    (need,) = Libraries(machine.probe()).describe(user).needs
    assert (need.finder, need.others) == ("nobody", (other,))


def test_a_damaged_library_is_described_by_its_damage(machine: Machine) -> None:
    path = machine.module("pkg/libuser.so", b"\x7fELF junk")
    assert "is no complete ELF library" in Libraries(machine.probe()).describe(path).error


# ONNX Runtime


def test_the_providers_and_the_libraries_behind_them_are_found(machine: Machine) -> None:
    offers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    machine.onnxruntime("onnxruntime-gpu", "1.31.1", cuda="13.0", providers=offers)
    machine.library("onnxruntime/capi/libonnxruntime_providers_cuda.so", ["libcudart.so.13"])
    machine.library("onnxruntime/capi/libonnxruntime_providers_shared.so")
    machine.library("onnxruntime/capi/libonnxruntime.so.1.31.1")
    found = collect(machine.probe()).onnxruntime
    assert (found.wheel, found.version, found.cuda) == ("onnxruntime-gpu", "1.31.1", "13.0")
    assert found.offers == tuple(offers)
    assert list(found.providers) == ["cuda"]
    assert [need.name for need in found.providers["cuda"].missing] == ["libcudart.so.13"]


def test_the_files_tell_which_of_two_wheels_came_last(machine: Machine) -> None:
    machine.onnxruntime("onnxruntime-gpu", "1.31.1", cuda="13.0")
    machine.onnxruntime("onnxruntime", "1.32.0")
    found = collect(machine.probe()).onnxruntime
    assert set(found.distributions) == {"onnxruntime", "onnxruntime-gpu"}
    assert (found.wheel, found.version, found.cuda) == ("onnxruntime", "1.32.0", None)


def test_a_wheel_in_another_folder_overwrites_nothing(machine: Machine) -> None:
    user = machine.base / "user"
    machine.onnxruntime("onnxruntime-gpu", "1.31.1", cuda="13.0")
    machine.install("onnxruntime", "1.32.0", files=["onnxruntime/__init__.py"], site=user)
    assert collect(machine.probe(user)).onnxruntime.distributions == ("onnxruntime-gpu",)


@pytest.mark.parametrize(("code", "error"), [
    ("raise ImportError('libfoo.so.1: cannot open')", "ImportError: libfoo.so.1: cannot open"),
    ("import os; os.abort()", "the process was ended by SIGABRT"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV"),
    ("import time; time.sleep(60)", "no answer within 0.5 s"),
    ("raise SystemExit(0)", "it printed nothing that can be read"),
    ("", "AttributeError: "),
])  # fmt: skip
def test_a_runtime_that_fails_on_import_is_reported_and_not_suffered(
    machine: Machine, code: str, error: str
) -> None:
    machine.onnxruntime(code=code or "pass")
    started = time.perf_counter()
    loaded = collect(machine.probe(time_limit=0.5 if "sleep" in code else 15.0)).onnxruntime.loaded
    assert loaded is not None
    assert loaded.facts is None
    assert error in loaded.error
    assert time.perf_counter() - started < 15  # and not the 60 s that it would sleep


def test_a_folder_of_the_users_own_is_not_taken_for_the_package(machine: Machine) -> None:
    own = machine.base / "project"
    (own / "onnxruntime").mkdir(parents=True)
    machine.onnxruntime()
    found = collect(machine.probe(search_path=(own, machine.site))).onnxruntime
    assert found.folder == machine.site / "onnxruntime"
    assert found.offers == ("CPUExecutionProvider",)


# TensorRT


def test_both_flavours_of_tensorrt_are_told_apart(machine: Machine) -> None:
    machine.install("tensorrt", "11.4.0.106")
    machine.install("tensorrt-cu13", "11.4.0.106")
    machine.install("tensorrt-rtx-cu13-libs", "1.7.1.116")
    core = machine.library("tensorrt_rtx_libs/libtensorrt_rtx.so.1")
    parser = machine.library("tensorrt_rtx_libs/libtensorrt_onnxparser_rtx.so.1")
    assert collect(machine.probe()).tensorrt == (
        TensorRt("tensorrt", "11.4.0.106", (), cuda=13),
        TensorRt("tensorrt-rtx", "1.7.1.116", (core, parser), python=False, cuda=13),
    )


def test_tensorrt_of_the_system_has_the_version_of_its_file(machine: Machine) -> None:
    real = machine.library("/usr/lib/libnvinfer.so.10.3.0")
    link = real.with_name("libnvinfer.so.10")
    link.symlink_to(real.name)
    (found,) = collect(machine.probe()).tensorrt
    assert (found.flavour, found.version, found.python, found.major) == (
        "tensorrt", "10.3.0", False, 10,
    )  # fmt: skip


# Devices


def test_gpus_are_those_of_nvidia_smi(machine: Machine) -> None:
    machine.program(
        "nvidia-smi",
        "echo 'NVIDIA L4, 8.9, 580.95.05, 23034'; echo 'NVIDIA T4, 7.5, 580.95.05, [N/A]'",
    )
    found = collect(machine.probe()).nvidia
    assert found.gpus == (Gpu("NVIDIA L4", "8.9", 23034 * 2**20), Gpu("NVIDIA T4", "7.5", None))
    assert (found.driver, found.error) == ("580.95.05", "")


@pytest.mark.parametrize(("script", "error"), [
    ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
     "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch"),
    ("echo 'No devices were found'", "nvidia-smi: No devices were found"),
    ("exec sleep 60", "nvidia-smi: no answer within 0.5 s"),
    ("exit 0", "nvidia-smi: it names no GPU"),
])  # fmt: skip
def test_a_driver_that_does_not_answer_is_reported(
    machine: Machine, script: str, error: str
) -> None:
    machine.program("nvidia-smi", script)
    limit = 0.5 if "sleep" in script else 15.0
    found = collect(machine.probe(time_limit=limit)).nvidia
    assert (found.gpus, found.error) == ((), error)


def test_the_driver_itself_is_asked_where_there_is_no_nvidia_smi(machine: Machine) -> None:
    machine.library("/usr/lib64/libcuda.so.1")
    answer = {"cuda": 12080, "gpus": [["Orin", "8.7", 8_000_000_000]]}
    python = machine.program("python", f"echo '{json.dumps(answer)}'")
    found = collect(machine.probe(python=str(python))).nvidia
    assert (found.gpus, found.cuda) == ((Gpu("Orin", "8.7", 8_000_000_000),), "12.8")
    failing = machine.program("failing", "echo 'cuInit failed with CUDA error 100' >&2; exit 1")
    found = collect(machine.probe(python=str(failing))).nvidia
    assert found.error == "libcuda.so.1: cuInit failed with CUDA error 100"


def test_an_unusable_driver_library_is_reported(machine: Machine) -> None:
    # This file is found here, and not by the loader of the process that asks it.
    machine.library("/usr/lib64/libcuda.so.1")
    machine.module("ctypes.py", "def CDLL(name):\n    raise OSError(name + ': no such file')\n")
    found = collect(machine.probe()).nvidia
    assert found.error == "libcuda.so.1: OSError: libcuda.so.1: no such file"


def test_the_toolkit_and_the_jetson_release_are_read_from_files(machine: Machine) -> None:
    machine.file("/usr/local/cuda/include/cuda.h", "/* x */\n#define CUDA_VERSION 12060\n")
    machine.file("/etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: x\n")
    found = collect(machine.probe()).nvidia
    assert (found.toolkit, found.jetpack) == ("12.6", "36.4")
    machine.file("/opt/cuda/version.json", json.dumps({"cuda": {"version": "13.0.1"}}))
    environment = {"CUDA_HOME": "/opt/cuda", "PATH": str(machine.programs)}
    assert collect(machine.probe(environment=environment)).nvidia.toolkit == "13.0.1"


@pytest.mark.parametrize(("text", "version"), [
    ("cuda: Optional[str] = '12.8'\n", "12.8"), ("cuda = '13.0'\n", "13.0"),
    ("cuda: Optional[str] = None\n", None), ("", None),
])  # fmt: skip
def test_the_cuda_of_torch_is_read_without_importing_it(
    machine: Machine, text: str, version: str | None
) -> None:
    machine.module("torch/version.py", text + "raise SystemExit\n")
    assert collect(machine.probe()).torch_cuda == version


# The whole


def test_an_empty_machine_has_facts_and_they_are_json(machine: Machine) -> None:
    content = json.loads(json.dumps(collect(machine.probe()).as_dict()))
    assert content["onnxruntime"]["folder"] is None
    assert content["tensorrt"] == []
    assert content["nvidia"]["gpus"] == []
    assert content["distributions"] == {}


def test_this_machine_is_described_without_loading_a_runtime() -> None:
    facts = collect()
    assert facts.core.error == ""
    assert (facts.core.facts or {})["opset"] >= 24
    assert "CPUExecutionProvider" in facts.onnxruntime.offers
    assert facts.version_of("numpy") is not None
    assert facts.python == ".".join(map(str, sys.version_info[:3]))
