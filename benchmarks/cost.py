"""What the clean-up costs: time, peak memory, nodes and attentions found, in one command.

    python benchmarks/cost.py [--rounds 3] [--work FOLDER] [--out FILE.json]

BERT-base (110 million random weights, 438 MB) as torch's dynamo exporter writes it at opset 18
without its own optimizations, static [1, 128], with weights beside the file and inside it, without
and with verification. Every run is a process of its own, the whole command from start to exit; time
is wall time, memory is the process's peak resident set. Needs the extras ``torch`` and ``cpu``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from optimizer.benchmark import write_result
from optimizer.machine import describe_machine
from optimizer.model_io import load_model

HOME = Path(__file__).resolve().parent
LAYERS = 12


def export(folder: Path) -> dict[str, Path]:
    """Write both files, unless they are there."""
    paths = {form: folder / f"bert-{form}.onnx" for form in ("external", "inline")}
    if all(path.exists() for path in paths.values()):
        return paths
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(), add_pooling_layer=False).eval()
    ids = torch.randint(0, 1000, (1, 128))
    program = torch.onnx.export(
        model,
        (ids, torch.ones_like(ids)),
        dynamo=True,
        optimize=False,
        opset_version=18,
        input_names=["input_ids", "attention_mask"],
        verbose=False,
    )
    for form, path in paths.items():
        program.save(path, external_data=form == "external")
    return paths


#: A small process in between: what a process is forked from counts towards its peak.
_TIMER = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status))
"""


def measure(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak bytes of one process."""
    timer = [sys.executable, "-c", _TIMER, *command]
    seconds, kilobytes, code = subprocess.check_output(timer, text=True).split()
    if int(code):
        sys.exit(f"failed with {code}: {' '.join(command)}")
    return float(seconds), int(kilobytes) * 1024


def row(path: Path, verify: str, rounds: int, folder: Path) -> dict[str, Any]:
    """One configuration, ``rounds`` times."""
    output = folder / "out.onnx"
    command = [sys.executable, "-m", "optimizer", str(path), "-o", str(output), "--force"]
    runs = [measure([*command, "--verify", verify]) for _ in range(rounds)]
    seconds, peaks = [r[0] for r in runs], [r[1] for r in runs]
    result = load_model(output)
    # The form of the target has Attention too; one per layer, or it was not recognised.
    attentions = sum(node.op_type == "Attention" for node in result.graph)
    return {
        "model": path.name,
        "bytes": sum(f.stat().st_size for f in path.parent.glob(f"{path.name}*")),
        "verify": verify,
        "seconds_median": round(statistics.median(seconds), 2),
        "seconds": [round(s, 2) for s in seconds],
        "peak_bytes": max(peaks),
        "nodes": [len(load_model(path).graph), len(result.graph)],
        "attentions": attentions,
    }


def main() -> None:
    """Run all configurations and print a table."""
    parser = argparse.ArgumentParser(description="Time and memory of the clean-up of BERT-base.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keep the exports here")
    parser.add_argument("--out", type=Path, default=HOME / "results" / "cost.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for form, path in export(folder).items():
            for verify in ("off", "each"):
                rows.append(row(path, verify, arguments.rounds, folder))
                print(
                    f"{form:9s} --verify {verify:5s} {rows[-1]['seconds_median']:6.2f} s"
                    f"  {rows[-1]['peak_bytes'] / 1e6:6.0f} MB"
                    f"  {rows[-1]['nodes'][0]} -> {rows[-1]['nodes'][1]} nodes"
                    f"  {rows[-1]['attentions']} of {LAYERS} attentions"
                )
        write_result(arguments.out, {"rows": rows}, machine=describe_machine())
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
