"""What is installed here and what it runs on, collected in well under a second.

``collect`` looks; ``facts`` is what it returns; nothing here judges. Nothing foreign is loaded into
this process: versions come from metadata, needs of shared libraries from their files, and what has
to be imported or run gets a process of its own with a time limit.
"""

from __future__ import annotations

import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from optimizer import __version__
from optimizer.environment import devices, packages, runtimes
from optimizer.environment.facts import Facts
from optimizer.environment.libraries import Libraries
from optimizer.environment.probe import Probe, system_name
from optimizer.machine import describe_cpu, describe_memory

__all__ = ["Facts", "Probe", "collect"]

#: The libraries without which nothing here works; also tells the newest opset that onnx writes.
_ASK_CORE = """\
import json
import numpy, ml_dtypes, pydantic, onnx, onnx_ir
from onnx.defs import onnx_opset_version
print(json.dumps({"opset": onnx_opset_version(), "ir_version": int(onnx.IR_VERSION)}))
"""
_DRIVER = "libcuda.so"


def collect(probe: Probe | None = None) -> Facts:
    """Look at a machine, by default this one."""
    probe = probe or Probe()
    libraries = Libraries(probe)
    with ThreadPoolExecutor(max_workers=3) as pool:
        core = pool.submit(probe.import_module, _ASK_CORE)
        has_driver = bool(libraries.known_to_loader(_DRIVER))
        nvidia = pool.submit(devices.find_nvidia, probe, has_driver=has_driver)
        installed, doubles = packages.first_of_each(packages.distributions(probe))
        requirements, ours = packages.own_requirements(probe, installed)
        onnxruntime = pool.submit(runtimes.find_onnxruntime, probe, libraries, installed)
        return Facts(
            version=__version__,
            folder=probe.own,
            installed=ours,
            python=platform.python_version(),
            system=system_name(),
            platform=probe.system,
            cpu=describe_cpu(probe.root),
            memory=describe_memory(probe.root),
            requirements=requirements,
            distributions=installed,
            doubles=doubles,
            core=core.result(),
            foreign=packages.foreign_packages(probe, installed),
            free=_free(probe),
            onnxruntime=onnxruntime.result(),
            tensorrt=runtimes.find_tensorrt(libraries, installed),
            torch_cuda=runtimes.torch_cuda(probe),
            nvidia=nvidia.result(),
        )


def _free(probe: Probe) -> dict[str, int]:
    """Bytes free where results are written and where exports are kept meanwhile."""
    temporary = probe.environment.get("TMPDIR") or "/tmp"  # noqa: S108 - only asked for its size
    found = {}
    for folder in (str(probe.working), temporary):
        try:
            found[folder] = shutil.disk_usage(Path(folder)).free
        except OSError:
            continue
    return found
