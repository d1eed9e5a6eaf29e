"""What the user sees at the end: a table with a row per stage, and what to do next."""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optimizer.errors import printable
from optimizer.metrics import Drift
from optimizer.model_writer import size_text
from optimizer.pass_base import Exactness, Skip
from optimizer.report import Row, RunReport
from optimizer.targets import DEFAULT_TARGET, get_target

if TYPE_CHECKING:
    from optimizer.api import Result
    from optimizer.benchmark import BenchmarkResult

#: Reasons of one stage that are shown without --explain.
_MOST_REASONS = 8
_WIDE = 110  # columns where there is no terminal to ask


def console() -> Console:
    """Standard output; plain where it is no terminal or NO_COLOR is set."""
    terminal = sys.stdout.isatty()
    return Console(width=None if terminal else _WIDE, highlight=False, soft_wrap=not terminal)


def plain(text: str) -> Text:
    """Text to be printed as it is: no markup, and nothing that a terminal obeys."""
    parts = text.split("\n")
    return Text("\n".join(printable(part) for part in parts))


def print_json(content: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(content, indent=1, sort_keys=True, default=str) + "\n")


def result_as_dict(result: Result) -> dict[str, Any]:
    """JSON-compatible form of a result."""
    return {
        "output": None if result.path is None else str(result.path),
        "files": [str(item) for item in result.files],
        "recipe": result.recipe.as_dict(),
        "report": result.report.as_dict(),
    }


def print_result(result: Result, *, explain: bool, dry_run: bool, hint: bool = True) -> None:
    """Header, table, reasons, drift, files, and with ``hint`` the next step."""
    out, report = console(), result.report
    before = report.before
    out.print(
        plain(
            f"{report.source}  {size_text(before.bytes)}  opset {report.opset}  "
            f"{before.nodes} nodes  ->  {result.recipe.settings.target}"
        )
    )
    narrow = out.width < _WIDE
    out.print(_table(report, narrow=narrow))
    for row in report.rows if narrow else ():
        out.print(plain(f"  {row.name}: {_numbers(row)}"))
    for line in skip_lines(report.rows, every=explain):
        out.print(plain(line))
    for line in _facts(report):
        out.print(plain(line))
    if dry_run:
        out.print(plain("dry run: nothing was written"))
        return
    if result.path is not None:
        size = sum(item.stat().st_size for item in result.files[:-1])
        rest = "".join(f", {item.name}" for item in result.files[1:])
        out.print(plain(f"wrote {result.path}{rest} ({size_text(size)})"))
        if hint:
            out.print(plain(f"next: {_next_step(result, result.path)}"))


def _next_step(result: Result, path: Path) -> str:
    """What a file for its target is for."""
    name = result.recipe.settings.target
    target = get_target(name)
    if target.runtime == "onnxruntime":
        source = result.report.source
        against = f"{source} " if Path(source).is_file() else ""
        device = "" if name == DEFAULT_TARGET else f"--target {name} "
        return f"optimize bench {device}{against}{path}"
    made = "a folder for the device" if name == "jetson" else "an engine"
    where = f", where TensorRT {name.rpartition('-')[2]} and its GPU are" * name[-1].isdigit()
    return f"make {made} of it{where}: optimize build {path} --target {name}"


def _table(report: RunReport, *, narrow: bool) -> Table:
    table = Table(box=None, padding=(0, 1 if narrow else 2, 0, 0), header_style="bold")
    table.add_column("pass", no_wrap=True)
    for title in ("matched", "skipped", "nodes", "size", "drift", "time", "memory"):
        table.add_column(title, justify="right", no_wrap=True)
    if not narrow:
        table.add_column("numbers")
    for row in report.rows:
        cells = _cells(row)
        table.add_row(*(plain(cell) for cell in (cells[:-1] if narrow else cells)))
    return table


def _cells(row: Row) -> tuple[str, ...]:
    nodes = f"{row.before.nodes} -> {row.after.nodes}"
    return (
        row.name,
        str(row.applied) if row.applied or not row.modified else "yes",
        str(len(row.skipped)),
        nodes if row.before.nodes != row.after.nodes else str(row.after.nodes),
        size_text(row.after.bytes),
        "-" if row.drift is None else _percent(row.drift.relative_l2),
        f"{row.seconds + row.seconds_checking:.1f} s",
        size_text(row.peak_bytes),
        _numbers(row),
    )


def _numbers(row: Row) -> str:
    if not row.modified:
        return "unchanged"
    if row.verdict is not None:
        return row.verdict
    kind = "approximate" if row.exactness is Exactness.APPROXIMATE else "exact"
    if row.drift is None:
        return f"{kind}, not measured"
    return f"{kind}, cosine {row.drift.cosine:.4f}"


def _percent(part: float) -> str:
    if part == 0:
        return "0"
    if part < 1e-4:
        return f"{part:.1e}"
    return f"{100 * part:.2g} %" if part < 0.995 else f"{100 * part:.0f} %"


def skip_lines(rows: Sequence[Row], *, every: bool) -> list[str]:
    """Why sites were left alone: one line per reason, or per site."""
    lines = []
    for row in rows:
        if every:
            lines += [f"  {row.name} left {skip.site} alone: {skip.reason}" for skip in row.skipped]
            continue
        if row.name in ("canonicalize", "legalize") and row.applied:
            continue  # near misses of the clean-up matter to who asks with --explain
        grouped = list(_by_reason(row.skipped).items())
        lines += [
            f"  {row.name} left {_sites(sites)} alone: {reason}"
            for reason, sites in grouped[:_MOST_REASONS]
        ]
        rest = grouped[_MOST_REASONS:]
        if rest:
            count = sum(len(sites) for _, sites in rest)
            lines.append(
                f"  {row.name} left {count} more alone for {len(rest)} other reasons; --explain "
                "lists them"
            )
    return lines


def _by_reason(skips: Sequence[Skip]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = collections.defaultdict(list)
    for skip in skips:
        grouped[skip.reason].append(skip.site)
    return grouped


def _sites(sites: Sequence[str]) -> str:
    if len(sites) <= 2:
        return ", ".join(sites)
    return f"{sites[0]} and {len(sites) - 1} more"


def _facts(report: RunReport) -> list[str]:
    lines = [f"  {row.name}: {note}" for row in report.rows for note in row.notes]
    if report.drift is not None:
        lines.append(f"drift on {report.samples} samples: {drift_text(report.drift)}")
    if report.speedup is not None:
        lines.append(str(report.speedup["text"]))
    return lines


def drift_text(drift: Drift) -> str:
    """All metrics that have a meaning, on one line."""
    parts = [f"relative L2 {drift.relative_l2:.3g}", f"cosine {drift.cosine:.6f}"]
    if drift.top1 is not None:
        parts.append(f"top-1 {100 * drift.top1:.2f} %")
    if drift.kl is not None:
        parts.append(f"KL {drift.kl:.3g}")
    ratio = drift.perplexity_ratio
    if ratio is not None:
        parts.append(
            f"perplexity {drift.perplexity_reference:.4g} -> {drift.perplexity:.4g} "
            f"({100 * (ratio - 1):+.2f} %)"
        )
    return ", ".join(parts)


def drift_dict_text(drift: dict[str, float]) -> str:
    """The same of ``Drift.as_dict``."""
    known = {key: value for key, value in drift.items() if key != "perplexity_ratio"}
    return drift_text(Drift(**known))  # type: ignore[arg-type]


def print_bench(result: BenchmarkResult) -> None:
    """The answer of ``optimize bench``."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("model")
    for title in ("median", "fastest", "p95", "speed-up", "95 % interval", "load"):
        table.add_column(title, justify="right", no_wrap=True)
    for timing in result.timings:
        low, high = timing.interval
        table.add_row(
            plain(timing.label),
            *(f"{ms:.3f} ms" for ms in (timing.median_ms, timing.min_ms, timing.p95_ms)),
            f"{timing.speedup:.2f}",
            f"{low:.2f} - {high:.2f}",
            f"{timing.load_seconds:.2f} s",
        )
    out = console()
    out.print(table)
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in list(result.shapes.items())[:4])
    more = f", ... {len(result.shapes) - 4} more" if len(result.shapes) > 4 else ""
    gpus = sorted({timing.device for timing in result.timings} - {"cpu"})
    out.print(
        plain(
            f"{result.rounds} rounds, {result.threads} thread(s), {shapes}{more}\n"
            f"{', '.join((result.machine['cpu'], *gpus))}, "
            f"ONNX Runtime {result.machine['versions']['onnxruntime']}"
        )
    )


def print_tokens(found: dict[str, Any]) -> None:
    """The answer of ``optimize inspect --tokens``."""
    console().print(
        f"{found['picture']}: {found['left']} of {found['patches']} patches are still apart",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def print_description(content: dict[str, Any]) -> None:
    """The answer of ``optimize inspect``."""
    out = console()
    types = ", ".join(f"{size_text(n)} {kind}" for kind, n in content["bytes_by_type"].items())
    opsets = ", ".join(f"{name or 'ai.onnx'} {v}" for name, v in content["opsets"].items())
    lines = [
        f"{content['file']}  {_count(content['parameters'])} parameters  "
        f"{size_text(content['bytes'])} ({types})",
        f"made by {content['producer']}, IR version {content['ir_version']}, opsets {opsets}",
        f"sha256 {content['sha256']}",
    ]
    lines += [
        f"external data {item['file']} ({size_text(item['bytes'])})"
        for item in content["external_data"]
    ]
    if content["provenance"] is not None:
        recipe = content["provenance"]["recipe"] or {}
        steps = ", ".join(step["pass"] for step in recipe.get("passes", ()))
        lines.append(f"optimized for {recipe.get('target')} with: {steps or 'clean-up only'}")
    for kind in ("inputs", "outputs"):
        lines += [f"{kind[:-1]:6} {_described(item)}" for item in _abridged(content[kind])]
    operators = ", ".join(f"{n} {name}" for name, n in content["operators"].items())
    lines.append(f"{content['nodes']} nodes: {operators}")
    lines += _cache_lines(content)
    lines += _block_lines(content["blocks"])
    lines += _grouped("no block at {sites}: {reason}", content["misses"])
    if not content["blocks"] and not content["misses"]:
        lines += _grouped("not raised at {sites}: {reason}", content["not_raised"])
    for line in lines:
        out.print(plain(line))


def _grouped(text: str, items: Sequence[dict[str, str]]) -> list[str]:
    """One line per reason."""
    reasons = _by_reason([Skip(item["site"], item["reason"]) for item in items])
    return [text.format(sites=_sites(names), reason=reason) for reason, names in reasons.items()]


def _cache_lines(content: dict[str, Any]) -> list[str]:
    """The KV cache where it is not the appended one of every layer."""
    lines = []
    cache, groups = content["kv_cache"], content["kv_groups"]
    if cache is not None:
        lines.append(
            f"KV cache filled {cache.get('form')}, {len(cache.get('buffers', ()))} buffers "
            f"{cache.get('layout')}, padding {cache.get('padding')}"
        )
    if groups:
        members = dict.fromkeys(_joined(item["layers"]) for item in groups.values())
        lines.append(f"KV caches shared by the layers of a group: {', '.join(members)}")
    return lines


def _joined(layers: Sequence[int]) -> str:
    return "+".join(map(str, layers))


def _count(number: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return str(number)


def _abridged(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Many cache inputs say nothing new: the first ones, and a count."""
    if len(items) <= 6:
        return list(items)
    return [*items[:5], {"name": f"... and {len(items) - 5} more", "type": "", "shape": None}]


def _described(item: dict[str, Any]) -> str:
    shape = "" if item["shape"] is None else f"[{', '.join(item['shape'])}]"
    return f"{item['name']} {item['type'] or ''}{shape}".rstrip()


def _block_lines(blocks: Sequence[dict[str, Any]]) -> list[str]:
    """Equal neighbours share a line."""
    if not blocks:
        return ["no transformer blocks recognised"]
    runs: list[tuple[str, list[dict[str, Any]]]] = []
    for block in blocks:
        text = _block_text(block)
        if not runs or runs[-1][0] != text:
            runs.append((text, []))
        runs[-1][1].append(block)
    return [_run_text(text, run) for text, run in runs]


def _run_text(text: str, run: Sequence[dict[str, Any]]) -> str:
    """One line for blocks that look the same, with the layers that each stands for."""
    first, last = run[0]["index"], run[-1]["index"]
    numbers = f"blocks {first}-{last}" if first != last else f"block {first}"
    if run[0]["layers"] is not None:
        text += f": {', '.join(_joined(block['layers']) for block in run)}"
    parameters, size = (sum(block[key] for block in run) for key in ("parameters", "bytes"))
    return f"{numbers} ({_count(parameters)} parameters, {size_text(size)}): {text}"


def _block_text(block: dict[str, Any]) -> str:
    heads = f"{block['heads']} heads x {block['head_dim']}"
    if block["kv_heads"] != block["heads"]:
        heads += f" ({block['kv_heads']} KV)"
    traits = [
        f"{block['style']}, {block['norm']} norm, width {block['hidden']}, {heads}",
        "experts" if block["activation"] is None else f"{block['mlp']} {block['activation']} MLP",
    ]
    traits += [name for name in ("rotary", "kv_cache", "causal") if block[name]]
    traits += block["extras"]
    if block["layers"] is not None:
        traits.append(f"{len(block['layers'])} layers side by side")
    return ", ".join(traits).replace("kv_cache", "KV cache")
