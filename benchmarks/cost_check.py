"""What is in a model, and what ONNX Runtime computes with it: one process per model.

    python benchmarks/cost_check.py MODEL OUTPUTS.npz

prints the numbers of nodes and attentions as JSON, and writes the outputs of a fixed feed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort


def facts(path: Path) -> dict[str, int]:
    """Numbers of nodes, and of those that are some operator for attention as a whole."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    # ORT and the standard call them Attention, MultiHeadAttention, GroupQueryAttention, ...
    return {"nodes": len(nodes), "attentions": sum("Attention" in n.op_type for n in nodes)}


def run(path: Path) -> dict[str, np.ndarray]:
    """Outputs by name for token ids of a fixed seed, the last eighth of them padding."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feed = {}
    for item in session.get_inputs():
        if item.name == "attention_mask":
            feed[item.name] = np.ones(item.shape, np.int64)
            feed[item.name][..., item.shape[-1] * 7 // 8 :] = 0
        else:
            feed[item.name] = random.integers(0, 1000, item.shape)
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def main() -> None:
    """Look at one model."""
    path = Path(sys.argv[1])
    print(json.dumps(facts(path)), flush=True)
    np.savez(sys.argv[2], **run(path))


if __name__ == "__main__":
    main()
