"""The tables of the README say what was judged and measured."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import cost_table
import engines
import families
import pytest
import tokens_accuracy
import zoo
from exporters import WAYS

ROOT = Path(__file__).resolve().parent.parent


def row(family: str, way: str, outcome: str, detail: str = "") -> dict[str, object]:
    return {"family": family, "way": way, "kv_cache": False, "outcome": outcome, "detail": detail}


ROWS = [
    row("bert", "dynamo-18", "right"),
    row("bert", "dynamo-19", "refused", "no norm; no MLP"),
    row("bert", "onnxsim", "not exported", "it crashed"),
    row("vit", "genai", "not exported", "decoders only"),
    row("deberta", "dynamo-18", "refused", "disentangled"),
    row("llama", "dynamo-18", "wrong", "scale: 1, expected 2"),
]


def test_every_way_is_in_one_column() -> None:
    ways = [way for column in zoo.GROUPS.values() for way in column]
    assert Counter(ways) == Counter(list(WAYS))


def test_what_cannot_be_made_is_not_counted_as_judged() -> None:
    found = zoo.summary(ROWS)
    assert found["cells"] == {"right": 1, "refused": 2, "wrong": 1, "not exported": 2}
    assert found["judged"] == 4
    assert found["right_share"] == 0.25


def test_the_table_counts_right_cells_and_tells_reasons() -> None:
    lines = zoo.table(ROWS).splitlines()
    assert next(line for line in lines if line.startswith("| bert")).startswith(
        "| bert | 1/2 | - |"
    )
    assert any(line.startswith("| deberta | refused | - |") for line in lines)
    assert "1 right, 2 refused with a reason, 1 wrong; 2 more" in "\n".join(lines)
    assert "| no norm | bert (dynamo-19) |" in lines


def test_details_name_no_folders_of_this_machine() -> None:
    text = "the file is not valid: model '/home/me/zoo/bert-1.onnx': Load of /tmp/x/y.onnx failed"
    assert zoo.without_folders(text) == (
        "the file is not valid: model 'bert-1.onnx': Load of y.onnx failed"
    )


def test_the_table_goes_between_its_marks(tmp_path: Path) -> None:
    results, readme = tmp_path / "zoo.json", tmp_path / "README.md"
    results.write_text(json.dumps({"rows": ROWS}))
    readme.write_text(f"before\n{zoo.BEGIN}\nold\n{zoo.END}\nafter\n")
    zoo.write_table(results, readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{zoo.BEGIN}\n| family |")
    assert text.endswith(f"{zoo.END}\nafter\n")
    assert "old" not in text
    readme.write_text("nothing")
    with pytest.raises(SystemExit, match="lacks the lines"):
        zoo.write_table(results, readme)


def test_the_readme_shows_the_recorded_results() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/zoo.json").read_text("utf-8"))["rows"]
    text = (ROOT / "README.md").read_text("utf-8")
    assert zoo.table(recorded) in text
    assert {row["family"] for row in recorded} == set(families.FAMILIES)


def test_the_readme_shows_the_recorded_accuracies_with_fewer_tokens() -> None:
    recorded = json.loads(tokens_accuracy.RESULTS.read_text("utf-8"))["models"]
    assert tokens_accuracy.markdown(recorded) in (ROOT / "README.md").read_text("utf-8")


def test_the_readme_shows_the_recorded_costs() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/cost.json").read_text("utf-8"))["models"]
    assert cost_table.summary(recorded) in (ROOT / "README.md").read_text("utf-8")


def test_the_readme_shows_the_recorded_engines() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/engines.json").read_text("utf-8"))["rows"]
    assert engines.table(recorded) in (ROOT / "README.md").read_text("utf-8")
    assert {engines.key(row) for row in recorded} == set(
        engines.wanted([*families.FAMILIES, *engines.LARGE])
    )
    outcomes = Counter(row["outcome"] for row in recorded)
    assert outcomes["failed"] == 0
    assert all(row["detail"] for row in recorded if row["outcome"] != "built")
