"""Processor and memory of machines that are described by their files alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimizer.machine import Memory, describe_cpu, describe_machine, describe_memory


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_the_first_processor_and_its_instructions_are_read(tmp_path: Path) -> None:
    put(
        tmp_path,
        "proc/cpuinfo",
        "processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz\nflags\t\t: fpu avx avx2 fma avx512_vnni\n"
        "\nprocessor\t: 1\nmodel name\t: Another\nflags\t\t: fpu\n",
    )
    cpu = describe_cpu(tmp_path)
    assert cpu.model == "Some CPU @ 2.0GHz"
    assert cpu.instructions == ("avx", "fma", "avx2", "avx512_vnni")


def test_arm_spells_its_flags_as_features(tmp_path: Path) -> None:
    put(tmp_path, "proc/cpuinfo", "processor : 0\nFeatures : fp asimd asimddp i8mm\n")
    assert describe_cpu(tmp_path).instructions == ("asimd", "asimddp", "i8mm")


def test_a_system_that_says_nothing_leaves_everything_open(tmp_path: Path) -> None:
    cpu = describe_cpu(tmp_path)
    assert (cpu.instructions, cpu.quota) == (None, None)
    assert cpu.model
    assert describe_memory(tmp_path) == Memory(None, None, None)


#: the group of this process, files of limits, cores' worth of time, bytes
GROUPS = {
    "version 2, limit of an outer group": (
        "0::/a/b\n",
        {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000", "a/memory.max": "1000000"},
        1.5,
        1_000_000,
    ),
    "version 2, the smaller of two limits": (
        "0::/a/b\n",
        {"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000", "a/b/memory.max": "max"},
        2.0,
        None,
    ),
    "version 2, a namespace of its own": ("0::/\n", {"cpu.max": "50000 100000"}, 0.5, None),
    "version 1, controllers mounted together": (
        "4:memory:/c\n3:cpu,cpuacct:/c\n",
        {
            "cpu,cpuacct/c/cpu.cfs_quota_us": "300000",
            "cpu,cpuacct/c/cpu.cfs_period_us": "100000",
            "memory/c/memory.limit_in_bytes": "2000000",
        },
        3.0,
        2_000_000,
    ),
    "version 1, no limit": (
        "4:memory:/\n3:cpu:/\n",
        {
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": "9223372036854771712",
        },
        None,
        None,
    ),
    "version 1, a group that is not visible in the container": (
        "3:cpu:/docker/0123\n",
        {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"},
        1.0,
        None,
    ),
    "no limits at all": ("0::/a\n", {}, None, None),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_limits_of_control_groups_are_found(tmp_path: Path, kind: str) -> None:
    own, files, quota, limit = GROUPS[kind]
    put(tmp_path, "proc/self/cgroup", own)
    for name, text in files.items():
        put(tmp_path, f"sys/fs/cgroup/{name}", text + "\n")
    assert describe_cpu(tmp_path).quota == quota
    assert describe_memory(tmp_path).limit == limit


def test_memory_is_in_bytes(tmp_path: Path) -> None:
    put(tmp_path, "proc/meminfo", "MemTotal:  2000 kB\nMemFree: 1 kB\nMemAvailable: 1500 kB\n")
    assert describe_memory(tmp_path) == Memory(2000 * 1024, 1500 * 1024, None)


def test_measurements_are_labelled_with_the_machine_and_the_versions() -> None:
    found = describe_machine()
    assert {"cpu", "cores", "cores_usable", "instructions", "system", "python", "date"} < set(found)
    assert found["cores_usable"] <= found["cores"]
    assert "numpy" in found["versions"]
