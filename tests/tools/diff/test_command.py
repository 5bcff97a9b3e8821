"""`distillcache diff`: what is not the same in two caches or two runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillcache.cache_builder.grow.copy import copy_cache
from distillcache.schemas.config import CopyConfig
from distillcache.schemas.config.yaml_text import as_yaml
from distillcache.schemas.format.rows import Row
from distillcache.tools.cli import main
from distillcache.tools.diff.command import compare
from tests.tools.look.planting import Values, changed, in_every_row, plant, with_rows


def looked(a: Path, b: Path, rows: int = 6) -> dict[str, Any]:
    return compare(str(a), str(b), rows, 0)


def kinds(found: dict[str, Any]) -> list[str]:
    return [look["kind"] for look in found["findings"]]


def test_a_cache_and_itself(cache: Path) -> None:
    found = looked(cache, cache)
    assert found["same"]
    assert found["shards"] == {"compared": 5, "differing": {}}
    assert {entry["error"] for entry in found["taps"]} == {0.0}
    assert found["summary"] == ["the same codes in 5 of 5 compared shards"]


def test_a_copy_in_another_codec_is_what_that_codec_keeps(cache: Path, tmp_path: Path) -> None:
    taps = {"attn_out": {"codec": "int8", "group": 8}}
    copy_cache(CopyConfig.model_validate({"src": str(cache), "dst": str(tmp_path / "c"), "taps": taps}))
    for one, other in ((cache, tmp_path / "c"), (tmp_path / "c", cache)):
        found = looked(one, other)
        assert found["findings"] == []
        assert "taps.attn_out.codec" in found["plans"]
        assert {entry["error"] > 0 for entry in found["taps"] if entry["tap"] == "attn_out"} == {True}
        assert {entry["error"] for entry in found["taps"] if entry["tap"] == "resid"} == {0.0}


def test_planted_faults_have_their_names(cache: Path, tmp_path: Path) -> None:
    def roll(_: int, rows: list[Row], values: Values) -> tuple[list[Row], Values]:
        return rows, {tap: np.roll(each, 1, axis=2) for tap, each in values.items()}

    def stale(shard: int, rows: list[Row], values: Values) -> tuple[list[Row], Values]:
        return rows, {tap: each[::-1] if shard == 1 else each for tap, each in values.items()}

    plants = {
        "swapped-blocks": in_every_row("attn_out", lambda values: values[:, [1, 0, 2]]),
        "scaled-block": in_every_row("resid", lambda values: values * np.asarray([1, 1, 3, 1])[:, None, None]),
        "shifted-tokens": roll,
        "stale-shard": stale,
    }
    for name, change in plants.items():
        found = looked(cache, plant(cache, tmp_path / name, change))
        assert kinds(found) == [name]
        assert not found["same"]
    assert found["findings"][0]["where"]["shards"] == [["0000", 1]]
    assert found["shards"]["differing"] == {"0000/resid": [1], "0000/attn_out": [1]}


def test_rows_of_other_tokens(cache: Path, tmp_path: Path) -> None:
    other = plant(cache, tmp_path / "c", with_rows(lambda row: changed(row, tokens=row.tokens[::-1].copy())))
    found = looked(cache, other)
    assert found["rows"]["other_tokens"] == found["rows"]["compared"]
    assert found["taps"] == []
    assert any("6 of 6 sampled rows hold other tokens" in line for line in found["summary"])


def write_run(folder: Path, rate: float, losses: list[float]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"run: {folder}\noptimizer: {{learning_rate: {rate}}}\n")
    lines = [{"step": step, "distill/total_loss": loss, "perf/mfu": rate} for step, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "eval.json").write_text(json.dumps([{"step": 2, "perplexity": rate, "blocks": [0], "cosine": [rate]}]))
    return folder


def test_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a", 0.5, [4.0, 3.0, 2.0]), write_run(tmp_path / "b", 0.25, [4.0, 1.0, 2.5])
    assert main(["diff", str(a), str(b), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["config"] == {"optimizer.learning_rate": [0.5, 0.25]}
    assert found["curves"]["distill/total_loss"]["widest"] == {"step": 1, "a": 3.0, "b": 1.0}
    assert found["evaluations"] == [{"step": 2, "perplexity": [0.5, 0.25], "cosine": [0.5, 0.25]}]
    assert main(["diff", str(a), str(b)]) == 2
    assert "optimizer.learning_rate: 0.5 and 0.25" in capsys.readouterr().out
    assert main(["diff", str(a), str(a)]) == 0
    assert "all curves are the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([{"op": "kv_heads", "to": 2, "by": "index"}], "[{op: kv_heads, to: 2, by: index}]"),
        ({"a": None, "b": [True, 1.5]}, "{a: null, b: [true, 1.5]}"),
        (None, "null"),
        (False, "false"),
        (3, "3"),
        (0.003, "0.003"),
        ("all", "all"),
        ("null", "null"),
        (list(range(200)), f"[{', '.join(map(str, range(200)))}]"),
    ],
)
def test_values_of_a_config_are_spelled_as_in_its_file(value: Any, text: str) -> None:
    assert as_yaml(value) == text


def test_a_run_is_no_cache(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(cache), str(write_run(tmp_path / "a", 0.5, [1.0]))]) == 2
    assert "a cache and a run cannot be compared" in capsys.readouterr().err
    assert main(["diff", str(cache), str(tmp_path)]) == 2
    assert "neither a cache nor a run" in capsys.readouterr().err


def test_what_a_person_reads(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swapped = plant(cache, tmp_path / "c", in_every_row("attn_out", lambda values: values[:, [1, 0, 2]]))
    assert main(["diff", str(cache), str(swapped), "--rows", "3"]) == 2
    printed = capsys.readouterr().out
    assert "attn_out 0 holds A's 1" in printed
    assert "cosine distance" in printed
