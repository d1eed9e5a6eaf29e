"""Make everything in benchmarks/models/stories12l from its Hugging Face folder, in one command.

    python benchmarks/make_stories12l.py [--out FOLDER]

Writes the two ONNX exports (without and with key/value cache, one shared weight file) and token
ids that the model itself generated: 64 rows for calibration, 400 rows for evaluation. Sampling is
plain: temperature 1, all 512 tokens allowed, fixed seed. Needs the extras ``torch`` and ``cpu``.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from optimizer.frontends import export_hugging_face

HOME = Path(__file__).resolve().parent / "models" / "stories12l"
OPSET = 23
SEQUENCE = 256
CALIBRATION_ROWS, EVALUATION_ROWS = 64, 400
BATCH = 116
SEED = 20
BEGIN, END = 1, 2
INLINE_BYTES = 1024
ALIGNMENT = 4096


def export(out: Path) -> tuple[Path, Path]:
    """Export without and with cache; weights of both go once into ``stories12l.data``."""
    data = bytearray()
    places: dict[bytes, tuple[int, int]] = {}
    paths = []
    for kv_cache, name in ((False, "stories12l"), (True, "stories12l-kv")):
        made = export_hugging_face(str(HOME / "hf"), out / "tmp", kv_cache=kv_cache, opset=OPSET)
        model = ir.load(made)
        model.graph.name = name
        for value in model.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes < INLINE_BYTES:
                continue
            content = tensor.tobytes()
            digest = hashlib.sha256(content).digest()
            if digest not in places:
                data.extend(bytes(-len(data) % ALIGNMENT))
                places[digest] = (len(data), len(content))
                data.extend(content)
            offset, length = places[digest]
            value.const_value = ir.ExternalTensor(
                location="stories12l.data",
                offset=offset,
                length=length,
                dtype=tensor.dtype,
                shape=ir.Shape(tensor.shape),
                name=value.name or "",
                base_dir=out,
            )
        (out / "stories12l.data").write_bytes(data)
        path = out / f"{name}.onnx"
        ir.save(model, path)
        made.unlink()
        paths.append(path)
    (out / "tmp").rmdir()
    return paths[0], paths[1]


def session(path: Path) -> ort.InferenceSession:
    """A runner on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def sample(model: ort.InferenceSession, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Draw token ids [rows, SEQUENCE] from the model's own distribution, each row from BEGIN on.

    A story's end is a token like any other: the model puts BEGIN there and goes on with another
    story, as in its training text, so rows are full and nothing is padded.
    """
    past_inputs = [i for i in model.get_inputs() if i.name.startswith("past_key_values.")]
    past = {
        i.name: np.zeros((rows, int(i.shape[1]), 0, int(i.shape[3])), np.float32)
        for i in past_inputs
    }
    ids = np.full((rows, 1), BEGIN, np.int64)
    for position in range(SEQUENCE - 1):
        feeds = {
            "input_ids": ids[:, -1:],
            "attention_mask": np.ones((rows, position + 1), np.int64),
            "position_ids": np.full((rows, 1), position, np.int64),
        }
        logits, *present = model.run(None, feeds | past)
        past = dict(zip(past, present, strict=True))
        # argmax(logits + Gumbel noise) is a draw from softmax(logits), for any number of rows.
        noise = rng.gumbel(size=logits[:, -1].shape)
        token = np.argmax(logits[:, -1].astype(np.float64) + noise, axis=-1)
        ids = np.concatenate([ids, token[:, None]], axis=1)
    return ids


def feeds_of(ids: np.ndarray) -> dict[str, np.ndarray]:
    """Model inputs for full rows of token ids."""
    positions = np.tile(np.arange(ids.shape[1], dtype=np.int64), (len(ids), 1))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}


def valid_of(ids: np.ndarray) -> np.ndarray:
    """Where predicting the next token counts: not past the row's end, not across stories."""
    following = np.full_like(ids, BEGIN)
    following[:, :-1] = ids[:, 1:]
    return (following != BEGIN) & (following != END)


def perplexity(model: ort.InferenceSession, ids: np.ndarray, valid: np.ndarray) -> float:
    """Return exp of the mean negative log-likelihood over the valid positions."""
    total = 0.0
    for start in range(0, len(ids), 16):
        rows = ids[start : start + 16]
        (logits,) = model.run(["logits"], feeds_of(rows))
        scores = logits[:, :-1].astype(np.float64)
        top = scores.max(axis=-1, keepdims=True)
        normalizer = np.log(np.exp(scores - top).sum(axis=-1)) + top[..., 0]
        chosen = np.take_along_axis(scores, rows[:, 1:, None], axis=-1)[..., 0]
        total += float(((normalizer - chosen) * valid[start : start + 16, :-1]).sum())
    return math.exp(total / int(valid.sum()))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HOME)
    out: Path = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    plain_path, cached_path = export(out)
    print(f"exported {plain_path.name}, {cached_path.name}", flush=True)
    plain, cached = session(plain_path), session(cached_path)
    rng = np.random.default_rng(SEED)
    rows = CALIBRATION_ROWS + EVALUATION_ROWS
    ids = np.concatenate([sample(cached, BATCH, rng) for _ in range(math.ceil(rows / BATCH))])
    calibration, evaluation = ids[:CALIBRATION_ROWS], ids[CALIBRATION_ROWS:rows]
    for path in (plain_path, cached_path):
        np.savez_compressed(path.with_suffix(".calibration.npz"), **feeds_of(calibration))
    valid = valid_of(evaluation)
    np.savez_compressed(plain_path.with_suffix(".eval.npz"), valid=valid, **feeds_of(evaluation))
    print(f"stories begun per row: {(ids == BEGIN).sum() / len(ids):.3f}")
    print(f"perplexity on its own text: {perplexity(plain, evaluation, valid):.4f}")


if __name__ == "__main__":
    main()
