"""The CUDA kernels compile for every architecture, and no kernel spills registers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import cuda_resources
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    for tool in ("nvcc", "cmake"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} to compile the CUDA kernels")
    folder = tmp_path_factory.mktemp("cuda")
    return folder, cuda_resources.build(folder)


@pytest.mark.native
@pytest.mark.slow
def test_every_architecture_compiles_without_warning_or_spill(built) -> None:
    """Warnings are errors; what is kept is what this compiler says, where it is the same one."""
    found = cuda_resources.parse(built[1])
    check(found)
    kept = json.loads(cuda_resources.REPORT.read_text())
    if kept["nvcc"] == cuda_resources.compiler():
        assert found == kept["kernels"], "run python benchmarks/cuda_resources.py"


@pytest.mark.native
@pytest.mark.slow
def test_the_library_exports_its_functions_alone(built) -> None:
    made = next(built[0].rglob("liboptimize_cuda.so"))
    assert (made.parent / "liboptimize_cuda_kernels.a").exists(), "what plugins link"
    if shutil.which("nm") is None:
        pytest.skip("needs nm to list a library's symbols")
    command = ["nm", "-D", "--defined-only", str(made)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.findall(r" T (\w+)", said) == [
        "optimize_cuda_read",
        "optimize_cuda_run",
        "optimize_cuda_splits",
        "optimize_cuda_validate",
        "optimize_cuda_workspace",
    ]


def test_the_report_that_is_kept() -> None:
    check(json.loads(cuda_resources.REPORT.read_text())["kernels"])


def check(kernels: dict[str, dict[str, dict[str, int]]]) -> None:
    assert sorted({name.split("<")[0] for name in kernels}) == cuda_resources.kernels()
    for name, of in kernels.items():
        assert tuple(of) == cuda_resources.ARCHITECTURES, name
        for architecture, resources in of.items():
            where = f"{name} for {architecture}: {resources}"
            assert resources["spilled_bytes"] == resources["stack_bytes"] == 0, where
            # Blocks have up to 256 threads, and two of them fit on a multiprocessor.
            assert resources["registers"] <= 128, where
            assert resources["static_shared_bytes"] == 0, where


@pytest.mark.native
def test_nothing_of_cuda_is_built_unless_asked_for(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake to configure the native libraries")
    command = ["cmake", "-S", str(ROOT / "plugins"), "-B", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    cache = (tmp_path / "CMakeCache.txt").read_text()
    assert "OPTIMIZE_CUDA:STRING=OFF" in cache
    assert not re.search(r"^CMAKE_CUDA_COMPILER:", cache, re.MULTILINE)


@pytest.mark.native
def test_a_missing_compiler_is_an_error_only_where_cuda_is_demanded(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake to configure the native libraries")
    command = ["cmake", "-S", str(ROOT / "plugins")]
    env = {**os.environ, "CUDACXX": "/nowhere/nvcc"}
    for wanted in ("AUTO", "ON"):
        arguments = [*command, "-B", str(tmp_path / wanted), f"-DOPTIMIZE_CUDA={wanted}"]
        result = subprocess.run(arguments, check=False, capture_output=True, text=True, env=env)
        said = result.stdout + result.stderr
        assert "nvcc" in said
        assert (result.returncode == 0) == (wanted == "AUTO"), said
