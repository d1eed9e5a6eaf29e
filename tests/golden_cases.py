"""Golden cases: graphs before and after a pass as ONNX text, compared and executed.

A file ``tests/golden/<pass>/<case>.onnxtxt`` holds comment lines (a title and why the case exists,
and ``# options: {json}``), the model before, a line ``=====``, and the model after. Both sides are
parsed and printed by one printer, so white space never matters. ``pytest --update-golden`` is not
needed: ``python tests/golden_cases.py FILE`` prints what the pass makes of a file today.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import onnx.printer
import onnx_ir as ir

SEPARATOR = "====="
FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    """One file."""

    name: str
    title: str
    options: dict[str, Any]
    before: onnx.ModelProto
    after: onnx.ModelProto

    def model(self) -> ir.Model:
        """The graph before, to be rewritten."""
        return ir.from_proto(self.before)


def cases(pass_name: str) -> list[Case]:
    """All cases of a pass."""
    return [read(path) for path in sorted((FOLDER / pass_name).glob("*.onnxtxt"))]


def read(path: Path) -> Case:
    """Parse a case.

    Raises:
        ValueError: A half is missing.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line[1:].strip() for line in lines if line.startswith("#")]
    body = "\n".join(line for line in lines if not line.startswith("#"))
    halves = body.split(f"\n{SEPARATOR}\n")
    if len(halves) != 2 or not all(half.strip() for half in halves):
        msg = f"{path.name}: expected two models with a line {SEPARATOR} between them"
        raise ValueError(msg)
    options = next((c[8:] for c in comments if c.startswith("options:")), "{}")
    before, after = (onnx.parser.parse_model(half) for half in halves)
    return Case(path.stem, comments[0], json.loads(options), before, after)


def text(model: ir.Model | onnx.ModelProto) -> str:
    """One spelling for both sides: what the ONNX printer writes, without names of nodes."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.value_info[:]
    del copy.metadata_props[:]
    copy.producer_name = ""
    for node in copy.graph.node:
        node.name = ""
        del node.metadata_props[:]
    return onnx.printer.to_text(copy)


def main(path: Path) -> None:
    """Print what the pass makes of the first half of a file."""
    from optimizer.pass_base import Context
    from passes import get_pass

    head, _, _ = path.read_text(encoding="utf-8").partition(f"\n{SEPARATOR}\n")
    body = "\n".join(line for line in head.splitlines() if not line.startswith("#"))
    options = [line for line in head.splitlines() if line.startswith("# options:")]
    model = ir.from_proto(onnx.parser.parse_model(body))
    kind = get_pass(path.parent.name)
    kind(kind.Options(**json.loads(options[0][10:] if options else "{}"))).call(model, Context())
    sys.stdout.write(text(model) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
