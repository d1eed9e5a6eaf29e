"""Which engines TensorRT for RTX builds of every family, without a GPU; their sizes and times.

    python benchmarks/engines.py --workers 2            # all cells; goes on where it stopped
    python benchmarks/engines.py --table README.md      # writes the tables of the results

A cell is a family, with or without KV cache, and a pass set. *built*: an engine. *refused*: this
program says why there is none (no data, a pass that finds nothing to do). *failed*: TensorRT does
not take what this program wrote, whatever its reason. The same export, untouched, is built too, for
comparison, and so are a few larger models, whose engines are more than kernels. Engines with sparse
layers need the plugin library (``plugins/README.md``, ``OPTIMIZE_TENSORRT_LIBRARY``); without it
they are left out. Times of a build are those of the processor, which depend little on what else the
machine does.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import exporters  # noqa: E402
import families  # noqa: E402
import numpy as np  # noqa: E402
from readme import replace_between  # noqa: E402
from rewriters import Cell, NotExported  # noqa: E402

from optimizer.api import optimize  # noqa: E402
from optimizer.benchmark import write_result  # noqa: E402
from optimizer.custom_ops.declaration import DOMAIN  # noqa: E402
from optimizer.engine_job import EngineOptions, build_file  # noqa: E402
from optimizer.engines.library_path import find_plugins  # noqa: E402
from optimizer.errors import EngineError, OptimizerError  # noqa: E402

SPARSE = "sparse 2:4, fp16"
#: "untouched" is the comparison: the exporter's file as it is.
PASS_SETS = {
    "untouched": None,
    "fp32": "",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "outliertune",
    "int8, fp16": "outliertune,fp16",
    "cqil": "cqil:first=0;last=1;group=2",
    "tome, fp16": "tome:r=2,fp16",
    SPARSE: "sparsify:pattern=2:4,fp16,sparse-matmul:machine=h100;tokens=1;force=true",
}
#: The first that can export a cell; torch's new exporter cannot do MPT with a cache.
WAYS = ("dynamo-23", "torchscript-20")
BEGIN = "<!-- engines: benchmarks/engines.py --table README.md -->"
END = "<!-- end of engines -->"
CAPABILITY = 89


def small_model(name: str, cached: bool, folder: Path) -> tuple[Path, Path]:  # noqa: FBT001
    """The export of a family, and data for it.

    Raises:
        NotExported: No exporter can.
    """
    entry = families.FAMILIES[name]
    for way in WAYS:
        try:
            path = exporters.export(Cell(entry, way, cached))
            break
        except NotExported as error:
            reason = error
    else:
        raise reason
    # Samples are stacked along the first axis; one of a batch is one sample.
    np.savez(folder / "data.npz", **families.make_feeds(entry, cached, seed=1))
    return path, folder / "data.npz"


def stories(cached: bool, folder: Path) -> tuple[Path, Path]:  # noqa: FBT001, ARG001
    """The trained language model that ships with this repository."""
    path = ROOT / "benchmarks" / "models" / "stories12l"
    name = "stories12l-kv" if cached else "stories12l"
    return path / f"{name}.onnx", path / f"{name}.calibration.npz"


def wide_vit(cached: bool, folder: Path) -> tuple[Path, Path]:  # noqa: FBT001, ARG001
    """Four layers of ViT-Base with random weights."""
    import torch
    import transformers

    from optimizer.frontends import hugging_face, onnx_export

    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=4))
    model.config.architectures = [type(model).__name__]
    plan = hugging_face.detect(model.config)
    exported = hugging_face.export_loaded(model.eval(), plan, kv_cache=False, opset=23)
    onnx_export.write(exported, folder / "vit.onnx")
    images = np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32)
    np.savez(folder / "data.npz", pixel_values=images)
    return folder / "vit.onnx", folder / "data.npz"


#: Larger models, with and without a KV cache.
LARGE = {"stories12l": (stories, (False, True)), "4 layers of ViT-Base": (wide_vit, (False,))}


def build(name: str, cached: bool, pass_set: str) -> dict[str, Any]:  # noqa: FBT001
    """Build one cell."""
    row: dict[str, Any] = {"family": name, "kv_cache": cached, "passes": pass_set}
    with tempfile.TemporaryDirectory() as folder:
        try:
            if name in LARGE:
                path, data = LARGE[name][0](cached, Path(folder))
            else:
                path, data = small_model(name, cached, Path(folder))
            return row | _build(path, data, PASS_SETS[pass_set], Path(folder))
        except NotExported as error:
            return {**row, "outcome": "not exported", "detail": str(error)[:200]}
        except EngineError as error:
            return {**row, "outcome": "failed", "detail": str(error)[:300]}
        except OptimizerError as error:
            return {**row, "outcome": "refused", "detail": str(error)[:300]}
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"[:300]
            return {**row, "outcome": "failed", "detail": detail}


def _build(path: Path, data: Path, passes: str | None, folder: Path) -> dict[str, Any]:
    legal = path
    if passes is not None:
        legal = folder / "legal.onnx"
        result = optimize(
            str(path), passes, target="tensorrt-rtx", output=legal, calibration=str(data),
            verify="off",
        )  # fmt: skip
        for stage in result.report.rows:
            if stage.name not in ("canonicalize", "legalize") and not stage.applied:
                reason = next((skip.reason for skip in stage.skipped), "it found nothing to do")
                return {"outcome": "refused", "detail": f"{stage.name}: {reason}"[:300]}
    began, spent = time.perf_counter(), _spent()
    options = EngineOptions(folder / "x.engine", capabilities=(CAPABILITY,))
    made = build_file(legal, "tensorrt-rtx", options)
    weights = sum(file.stat().st_size for file in _files(legal))
    return {
        "outcome": "built",
        "bytes": made.manifest["engine"]["bytes"],
        "model_bytes": weights,
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(_spent() - spent, 2),
        "layers": made.manifest["precisions"],
        "plugin_layers": made.manifest["plugin_layers"],
    }


def _spent() -> float:
    """Processor time of the processes that this one started and that ended, as builds do."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _files(model: Path) -> set[Path]:
    """A model and its external data."""
    import onnx

    proto = onnx.load(model, load_external_data=False)
    places = {
        entry.value
        for tensor in proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return {model, *(model.parent / place for place in places)}


def wanted(names: Sequence[str]) -> list[tuple[str, bool, str]]:
    """All cells, one pass set after the other."""
    caches = {
        name: (False, True) if e.cached else (False,) for name, e in families.FAMILIES.items()
    }
    caches |= {name: forms for name, (_, forms) in LARGE.items()}
    return [(n, cached, s) for s in PASS_SETS for n in names for cached in caches[n]]


def key(row: dict[str, Any]) -> tuple[str, bool, str]:
    """What identifies a row."""
    return row["family"], row["kv_cache"], row["passes"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each pass set, the larger models, and the reasons of what was not built."""
    return "\n".join([*_summary(rows), "", *_larger(rows), "", *_reasons(rows)])


def _plain(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, bool], dict[str, Any]]:
    """The engines of untouched exports."""
    return {
        key(row)[:2]: row
        for row in rows
        if row["passes"] == "untouched" and row["outcome"] == "built"
    }


def _summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    plain = _plain(rows)
    lines = [
        "| pass set | built | refused | failed | engine size | build time |",
        "|---|---|---|---|---|---|",
    ]
    for pass_set in PASS_SETS:
        own = [row for row in rows if row["passes"] == pass_set and row["family"] not in LARGE]
        count = Counter(row["outcome"] for row in own)
        pairs = [
            (row, plain[key(row)[:2]])
            for row in own
            if row["outcome"] == "built" and key(row)[:2] in plain
        ]
        ratios = [
            f"{statistics.median(a[what] / b[what] for a, b in pairs):.2f}" if pairs else "-"
            for what in ("bytes", "cpu_seconds")
        ]
        numbers = [str(count[kind]) for kind in ("built", "refused", "failed")]
        lines.append(f"| {' | '.join([pass_set, *numbers, *ratios])} |")
    total = Counter(row["outcome"] for row in rows)
    sizes = [row["model_bytes"] / 1e6 for row in plain.values() if row["family"] not in LARGE]
    return [
        f"{total['built']} built, {total['refused']} refused with the reason, {total['failed']} "
        f"failed; {total['not exported']} more that no exporter can make.",
        "",
        *lines,
        "",
        "Size and time: medians of the ratios to the engine of the untouched export. These models "
        f"are files of {min(sizes):.1f} to {max(sizes):.1f} MB: their engines are kernels, of "
        "which int8 takes more, and say nothing about larger models:",
    ]


def _larger(rows: Sequence[dict[str, Any]]) -> list[str]:
    plain = _plain(rows)
    lines = [
        "| model | pass set | ONNX file | engine | of untouched | build | of untouched |",
        "|---|---|---|---|---|---|---|",
    ]
    for pass_set in PASS_SETS:
        for row in rows:
            if row["family"] not in LARGE or row["passes"] != pass_set:
                continue
            name = row["family"] + (", KV cache" if row["kv_cache"] else "")
            if row["outcome"] != "built":
                lines.append(f"| {name} | {pass_set} | {row['outcome']} | - | - | - | - |")
                continue
            other = plain[key(row)[:2]]
            lines.append(
                f"| {name} | {pass_set} | {row['model_bytes'] / 1e6:.1f} MB "
                f"| {row['bytes'] / 1e6:.1f} MB | {row['bytes'] / other['bytes']:.2f} "
                f"| {row['cpu_seconds']:.1f} s | {row['cpu_seconds'] / other['cpu_seconds']:.2f} |"
            )
    lines[2:] = sorted(lines[2:], key=lambda line: line.split("|")[1])
    return lines


def _reasons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was not built, by reason."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["outcome"] == "built":
            continue
        name = row["family"] + (" (KV cache)" if row["kv_cache"] else "")
        where = (row["outcome"], row["passes"], row["detail"].replace("|", "/"))
        found.setdefault(where, []).append(name)
    lines = ["| not built | pass set | reason | models |", "|---|---|---|---|"]
    for (outcome, pass_set, reason), names in sorted(found.items()):
        lines.append(f"| {outcome} | {pass_set} | {reason} | {', '.join(names)} |")
    return lines if found else []


def has_plugin() -> bool:
    """Whether the plugin library is here."""
    try:
        return bool(find_plugins((), (DOMAIN,)))
    except OptimizerError:
        return False


def main() -> None:
    """Read the words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", help="separated by commas; default: all, and larger models")
    parser.add_argument("--passes", help="pass sets, separated by semicolons; default: all")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--again", help="outcomes to try again, separated by commas")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "engines.json"
    )
    parser.add_argument("--table", type=Path, help="write the tables of --out into this file")
    words = parser.parse_args()
    if words.table is not None:
        content = json.loads(words.out.read_text("utf-8"))
        replace_between(words.table, BEGIN, END, table(content["rows"]))
        return
    names = words.families.split(",") if words.families else [*families.FAMILIES, *LARGE]
    chosen = words.passes.split(";") if words.passes else list(PASS_SETS)
    if SPARSE in chosen and not has_plugin():
        print("without the plugin library: no engines with sparse layers; see plugins/README.md")
        chosen.remove(SPARSE)
    rows = json.loads(words.out.read_text("utf-8"))["rows"] if words.out.exists() else []
    again = words.again.split(",") if words.again else []
    done = {key(row): row for row in rows if row["outcome"] not in again}
    todo = [cell for cell in wanted(names) if cell[2] in chosen and cell not in done]
    with concurrent.futures.ProcessPoolExecutor(words.workers) as pool:
        for future in concurrent.futures.as_completed([pool.submit(build, *c) for c in todo]):
            row = future.result()
            done[key(row)] = row
            print(*key(row), row["outcome"], row.get("detail", ""), flush=True)
            ordered = [done[k] for k in sorted(done)]
            write_result(words.out, {"rows": ordered}, capability=CAPABILITY)


if __name__ == "__main__":
    main()
