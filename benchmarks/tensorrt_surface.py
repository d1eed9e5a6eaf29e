"""Records which names TensorRT's Python interface has in which version.

    python benchmarks/tensorrt_surface.py CLONE      # of github.com/NVIDIA/TensorRT, with its tags

Read from the sources of the bindings (python/src) at the tag of each release: classes, their bases,
and the names they define. Only classes that the program uses are kept.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "tests" / "engines" / "api_surface.json"
TAGS = ("v10.3.0", "v10.7.0", "v10.10.0", "v10.13.3", "v10.16", "v11.0", "v11.1")
CLASSES = (
    "Builder", "BuilderFlag", "DataType", "HardwareCompatibilityLevel", "IAttention",
    "IAttentionOutputLayer", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "ILayer",
    "ILogger", "INetworkDefinition", "IOptimizationProfile", "IOutputAllocator",
    "IPluginCreatorInterface", "IPluginCreatorV3One", "IPluginRegistry", "IProgressMonitor",
    "ITensor", "ITimingCache", "LayerType", "NetworkDefinitionCreationFlag", "OnnxParser",
    "ParserError", "Runtime", "TensorIOMode", "TensorLocation",
)  # fmt: skip
_START = re.compile(r'py::(?:class_|enum_)<\s*([\w:]+)([^"]*?)"(\w+)"', re.DOTALL)
#: Methods that Python may override, which are called and not defined: class and name.
_OVERRIDE = re.compile(
    r'(?:getOverride\(\s*static_cast<(\w+)\*>\(this\),|OVERL?OAD\w*_NAME\(\s*\w+,\s*(\w+),)\s*"(\w+)"'
)
_MEMBER = re.compile(r'\.(?:def\w*|value)\(\s*"(\w+)"')


def surface(source: str) -> dict[str, list[str]]:
    """Class -> names, those of its bases among them."""
    starts = list(_START.finditer(source))
    names: dict[str, set[str]] = {}
    bases: dict[str, list[str]] = {}
    python: dict[str, str] = {}
    for index, found in enumerate(starts):
        end = starts[index + 1].start() if index + 1 < len(starts) else len(source)
        name = found[3]
        python[found[1].split("::")[-1]] = name
        names.setdefault(name, set()).update(_MEMBER.findall(source[found.end() : end]))
        bases.setdefault(name, []).extend(re.findall(r"\b(\w+)\b", found[2]))

    for one, other, method in _OVERRIDE.findall(source):
        names.setdefault(python.get(one or other, one or other), set()).add(method)

    def all_of(name: str) -> set[str]:
        own = set(names.get(name, ()))
        for base in bases.get(name, ()):
            if python.get(base, name) != name:
                own |= all_of(python[base])
        return own

    return {name: sorted(all_of(name)) for name in CLASSES if name in names}


def main() -> None:
    """Write the record."""
    clone, content = sys.argv[1], {}
    for tag in TAGS:
        listed = subprocess.run(
            ["git", "-C", clone, "ls-tree", "-r", "--name-only", tag, "python/src"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        files = [item for item in listed.stdout.splitlines() if item.endswith(".cpp")]
        source = "\n".join(
            subprocess.run(
                ["git", "-C", clone, "show", f"{tag}:{item}"],
                capture_output=True, text=True, check=True,
            ).stdout
            for item in files
        )  # fmt: skip
        content[tag.removeprefix("v")] = surface(source)
    OUT.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
