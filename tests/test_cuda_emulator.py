"""What the emulation of CUDA kernels must notice: small kernels with one mistake each."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cuda_emulated
import pytest

pytestmark = pytest.mark.native

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include "ptx.h"
using namespace optimize::sparse_matmul::cuda;

alignas(16) static float source[256];
static float result[64];

// Each thread's number goes to its neighbour, through shared memory.
static void neighbours(int mistake) {
  OPTIMIZE_SHARED(memory);
  float* numbers = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  numbers[i] = source[i];
  if (mistake != 1) __syncthreads();
  result[i] = numbers[(i + 1) % 64];
}
// The same with copies that arrive later, after which the place is used again.
static void copies(int mistake) {
  OPTIMIZE_SHARED(memory);
  const int i = threadIdx.x;
  if (i < 16) copy_async(memory + 16 * i, source + 4 * i);
  commit_copies();
  if (mistake != 1) wait_copies<0>();
  __syncthreads();
  result[i] = reinterpret_cast<float*>(memory)[(i + 1) % 64];
  if (mistake != 2) __syncthreads();
  if (i < 16) copy_async(memory + 16 * i, source + 128 + 4 * i);
  commit_copies();
  wait_copies<0>();
}
static void beyond(int mistake) {
  OPTIMIZE_SHARED(memory);
  const int i = threadIdx.x;
  result[i] = reinterpret_cast<float*>(memory)[mistake == 1 ? 64 + i : i];
}
static void unwritten(int mistake) {
  OPTIMIZE_SHARED(memory);
  float* numbers = reinterpret_cast<float*>(memory);
  if (mistake != 1) numbers[threadIdx.x] = 0;
  result[threadIdx.x] = numbers[threadIdx.x] == 0 ? source[(threadIdx.x + 1) % 64] : -1;
}
static void apart(int mistake) {
  const int i = threadIdx.x;
  if (mistake == 1 && i < 5) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  result[i] = source[(i + 1) % 64];
}
static void mixed(int mistake) {
  const int i = threadIdx.x;
  if (mistake == 1 && i % 2) {
    __shfl_xor_sync(~0u, i, 1);
  } else {
    __syncwarp();
  }
  result[i] = source[(i + 1) % 64];
}

int main(int, char** arguments) {
  for (int i = 0; i < 256; ++i) source[i] = static_cast<float>(i);
  void (*const kernels[])(int) = {neighbours, copies, beyond, unwritten, apart, mixed};
  const int which = std::atoi(arguments[1]), mistake = std::atoi(arguments[2]);
  if (launch(kernels[which], dim3(1), 64, 256, nullptr, mistake) != cudaSuccess) return 4;
  for (int i = 0; i < 64; ++i)
    if (which != 2 && result[i] != static_cast<float>((i + 1) % 64)) return 3;
  return 0;
}
"""
NAMES = ("neighbours", "copies", "beyond", "unwritten", "apart", "mixed")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cuda_emulated.program(PROGRAM, tmp_path_factory.mktemp("emulator"))


def ran(program: Path, name: str, mistake: int, order: str, copies: str) -> int:
    settings = {"OPTIMIZE_EMULATE_ORDER": order, "OPTIMIZE_EMULATE_COPIES": copies}
    command = [str(program), str(NAMES.index(name)), str(mistake)]
    return subprocess.run(command, check=False, env=settings, stderr=subprocess.DEVNULL).returncode


@pytest.mark.parametrize("order", ["up", "down", "mixed"])
@pytest.mark.parametrize("copies", ["late", "early"])
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_without_mistake_passes(program, name, order, copies) -> None:
    if name != "beyond":  # which reads what nobody wrote
        assert ran(program, name, 0, order, copies) == 0


@pytest.mark.parametrize(
    ("name", "mistake", "order", "copies", "code"),
    [
        ("neighbours", 1, "up", "late", 3),  # no barrier before others' numbers are read
        ("copies", 1, "up", "late", 3),  # copies are not waited for
        ("copies", 2, "up", "early", 3),  # a place is filled again that others still read
        ("beyond", 1, "up", "late", -11),  # outside of shared memory
        ("unwritten", 1, "up", "late", 3),  # shared memory is not zero
        ("apart", 1, "up", "late", -6),  # some wait at another barrier
        ("mixed", 1, "up", "late", -6),  # lanes of a warp are at different instructions
    ],
)
def test_a_mistake_is_noticed(program, name, mistake, order, copies, code) -> None:
    assert ran(program, name, mistake, order, copies) == code
