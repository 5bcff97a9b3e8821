"""`distillcache report`: its numbers are those of the cache and of the run, and its pages stand by themselves."""

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.config.report import ReportConfig
from distillcache.schemas.errors import ConfigError, DamageError, DivergedError, InputError
from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.tools.pages import figures
from distillcache.tools.pages.figures import HeatMap, Line, draw_maps
from distillcache.tools.pages.html import page_title
from distillcache.tools.pages.pictures import pooled
from distillcache.tools.report.cache import _stats_figure, low_and_high
from distillcache.tools.report.command import write_report
from distillcache.tools.report.curves import POINTS, block_curves, curve
from distillcache.tools.report.rows import Sample, row_warnings, sample_rows
from distillcache.tools.report.run import (
    TERMS,
    _schedule,
    divergence_warnings,
    loss_fragments,
    optimizer_words,
    speed_fragments,
)
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.run.divergence import BestCheckpoint, Measure, diverged_error
from distillcache.trainer.run.folder import read_ending
from distillcache.trainer.train import divergence_summary
from tests.conftest import build_config, byte_tokenizer
from tests.servers.fixtures import Bucket
from tests.tools.report.report_reading import ReadPage, check_page
from tests.trainer.feed.test_segments import half_built

NASTY = "<script>alert('1')</script> & \"so on\""


def report(target: object, out: Path, **changes: object) -> tuple[ReadPage, dict]:
    said = write_report(ReportConfig.model_validate({"target": str(target), "out": str(out), **changes}))
    assert out.stat().st_size == said["bytes"]
    page = ReadPage(out.read_text())
    check_page(page)
    assert len(page.figures) == said["figures"]
    return page, said


@pytest.fixture(scope="module")
def of_cache(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[ReadPage, dict]:
    return report(cache, tmp_path_factory.mktemp("report") / "cache.html", rows=2, seed=1)


def write_run(folder: Path, steps: int = 40, name: str = "runs/a") -> Path:
    """A run of known numbers, made by hand: the loss is 1 / step, block 1's a tenth of block 0's."""
    folder.mkdir(parents=True)
    lines = [{"step": 0, "eval/student_perplexity": 90.0}]
    for step in range(1, steps + 1):
        line = {"step": step, "distill/total_loss": 1 / step, "distill/out_proj_feature_loss": 0.75 / step}
        line |= {"distill/mlp_loss": 0.25 / step, "feature/block_00": 1 / step, "feature/block_01": 0.1 / step}
        line |= {"perf/tokens_per_second": 1000.0 + step, "perf/data_wait_share": 0.5, "perf/step_time_seconds": 0.25}
        line |= {
            "learning/current_learning_rate": 2e-3 * min(step, 20 - step / 2),
            "router/max_violation_block_01": 0.5,
        }
        lines.append(line)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99')  # a killed run's last line
    loads = [
        {"step": 1, "blocks": [1], "share": [[0.25] * 4]},
        {"step": 40, "blocks": [1], "share": [[0.6, 0.3, 0.1, 0]]},
    ]
    (folder / "router.jsonl").write_text("".join(json.dumps(line) + "\n" for line in loads))
    found = [(0, 90.0, [0.5, 0.4]), (20, 30.0, [0.05, 0.02]), (40, 36.0, [0.025, 0.5])]
    keys = ("step", "perplexity", "cosine")
    (folder / "eval.json").write_text(
        json.dumps([dict(zip(keys, each, strict=True), blocks=[0, 1], max_violation=0.5) for each in found])
    )
    (folder / "config.yaml").write_text(
        f"run: {name}\ncache: {json.dumps(NASTY)}\nmode: blockwise\nsteps: 50\nbatch_rows: 4\n"
        "student: {init: teacher, surgery: [{op: query_heads, to: 2, by: null}, {op: drop_blocks, blocks: [1]}]}\n"
        "loss: {alpha: 0.0, feature: {weight: 1.0}, mlp: {weight: 0.5}}\n"
    )
    (folder / "surgery.json").write_text(
        '[{"op": "query_heads", "by": "index", "kept": []}, {"op": "drop_blocks", "by": null, "kept": [0]}]'
    )
    (folder / "run.json").write_text("{}")
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events.out.tfevents.1795344841.host").write_text("")
    return folder


def test_a_caches_page_says_what_the_cache_is(cache: Path, of_cache: tuple[ReadPage, dict]) -> None:
    page, said = of_cache
    plan = open_cache(Store(str(cache)))[0].plan
    facts = page.tables["The cache"]
    assert facts.row("Weights") == [plan.teacher.weights_digest]
    assert facts.row("Made")[0].startswith(f"{plan.created['at']} on {plan.created['host']}")
    assert facts.row("Rows")[0].startswith(f"{plan.rows.count - 4} for training, 4 held out, 16 tokens")
    storage = page.tables["Bytes by tap"]
    assert storage.row("attn_out")[:3] == ["bf16", "3", str(3 * 24 * 2)]
    assert storage.row("resid")[2:] == ["192", "117 kB", "117 kB", "1"]
    assert page.tables["Config of the build"].row("data.row_tokens") == ["16"]
    assert said["of"] == "cache"
    assert said["sections"] == ["What it is", "Storage", "Blocks", "Rows", "Similarity of slots"]


def test_statistics_are_those_that_the_build_recorded(cache: Path, of_cache: tuple[ReadPage, dict]) -> None:
    page, _ = of_cache
    stats = json.loads((cache / "segments/0000/stats.json").read_text())["taps"]["resid"]
    for slot in range(4):
        rms = (stats["square_sum"][slot] / stats["count"]) ** 0.5
        found = [float(cell) for cell in page.tables["Statistics of resid"].row(str(slot))]
        np.testing.assert_allclose(found[:2], [rms, stats["abs_max"][slot]], rtol=1e-3)


def test_norms_and_similarity_are_those_of_the_numbers(cache: Path, of_cache: tuple[ReadPage, dict]) -> None:
    """Against NumPy on what the feed reads."""
    page, said = of_cache
    batch = CacheSource(str(cache))[said["rows"]]
    real = batch["segment_ids"] > 0
    values = (batch["resid"]["codes"].astype(np.uint32) << 16).view(np.float32)  # [S, B, T, D]
    norms = np.where(real, np.linalg.norm(values, axis=-1), 0)
    for place, row in enumerate(said["rows"]):
        slot, token = np.unravel_index(norms[:, place].argmax(), norms[:, place].shape)
        words = f"largest {norms[slot, place, token]:.4g} at token {token} of slot {slot}, median"
        (alt,) = (alt for title, alt in page.figures.items() if "residual stream in rows" in title)
        assert f"Row {row}: {words}" in alt
    unit = values / np.linalg.norm(values, axis=-1, keepdims=True)
    for slot in range(3):
        expected = (unit[slot] * unit[slot + 1]).sum(-1)[real].mean()
        (found,) = page.tables["Neighbouring slots of resid"].row(f"{slot} and {slot + 1}")
        np.testing.assert_allclose(float(found), expected, rtol=1e-3)


def figures_of(page: ReadPage) -> dict[str, str]:
    """The source of each figure, by its title."""
    parts = [part.partition("</figure>")[0] for part in page.source.split("<figure>")[1:]]
    return {title: part for title in page.figures for part in parts if f">{title}</figcaption>" in part}


def test_three_rows_stand_on_one_scale_by_default(cache: Path, tmp_path: Path) -> None:
    page, said = report(cache, tmp_path / "r.html")
    assert len(said["rows"]) == 3
    rows = "{}, {} and {}".format(*said["rows"])
    for words in ("residual stream", "attention output"):
        drawing = figures_of(page)[f"Token norms of the {words} in rows {rows}"]
        assert drawing.count("<image") == 3 + 1  # a map for each row, and one scale of colours
    assert page.tables["The rows that are shown"].scopes[:5] == ["col"] * 5
    assert [cells[0] for cells in page.tables["The rows that are shown"].rows[1:]] == list(map(str, said["rows"]))


def test_more_rows_are_several_figures_on_the_same_scale(cache: Path, tmp_path: Path) -> None:
    page, _ = report(cache, tmp_path / "r.html", rows=5)
    found = [part for title, part in figures_of(page).items() if title.startswith("Token norms of the residual stream")]
    assert [part.count("<image") for part in found] == [4, 3]
    ticks = [re.findall(r"<text[^>]*>([^<]*)</text>", part) for part in found]
    bars = [words[words.index("norm") - 4 : words.index("norm")] for words in ticks]
    assert bars[0] == bars[1]


def test_a_row_that_is_shown_alone_has_its_tokens_along_the_axis(cache: Path, tmp_path: Path) -> None:
    page, said = report(cache, tmp_path / "r.html", rows=1)
    (row,) = said["rows"]
    tokens = CacheSource(str(cache))[[row]]["tokens"][0]
    letters = [byte_tokenizer().decode([token], skip_special_tokens=False) for token in tokens.tolist()]
    drawing = html.unescape(figures_of(page)[f"Token norms of the residual stream in row {row}"])
    words = re.findall(r"<text[^>]*>([^<]*)</text>", drawing)
    expected = [f"{at} {letter}" for at, letter in enumerate(letters) if letter.isalpha()]
    assert len(expected) > 4
    assert [each for each in words if re.fullmatch(r"\d+ [a-zA-Z]", each)] == expected


def test_a_row_that_is_left_over_has_its_tokens_along_the_axis(cache: Path, tmp_path: Path) -> None:
    """Four rows are a figure of three and one of one, on the same scale."""
    page, said = report(cache, tmp_path / "r.html", rows=4)
    three, one = (f"Token norms of the residual stream in row{words}" for words in _told(said["rows"]))
    drawn = figures_of(page)
    assert not re.findall(r"<text[^>]*>\d+ [a-zA-Z]</text>", drawn[three])
    assert re.findall(r"<text[^>]*>\d+ [a-zA-Z]</text>", drawn[one])


def _told(rows: list[int]) -> tuple[str, str]:
    return "s {}, {} and {}".format(*rows[:3]), f" {rows[3]}"


def test_more_lines_than_can_be_told_apart_are_in_the_tables() -> None:
    taps = [{"name": "resid", "segment": f"{at:04d}", "slots": [0, 1], "rms": [1.0, 2.0]} for at in range(9)]
    figure = _stats_figure({"segments": taps}, taps, "rms", "Root mean square of each tap")
    assert figure is not None
    assert figure.svg.count(">resid") == 6
    assert "3 more taps of later segments: see below." in figure.caption


def test_only_the_stream_has_a_similarity_of_slots(of_cache: tuple[ReadPage, dict]) -> None:
    """What two blocks add has no reason to be alike."""
    page, _ = of_cache
    assert [title for title in page.figures if "imilarity" in title] == [
        "Similarity of the residual stream in two slots"
    ]
    assert "Neighbouring slots of attn_out" not in page.tables


def test_a_cache_that_is_being_built(
    tmp_path: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config(tmp_path / "cache", teacher, corpus)
    half_built(config, monkeypatch, 2)
    page, said = report(config.cache, tmp_path / "r.html", rows=0)
    assert "Progress" in said["sections"]
    assert "Shards of segment 0000: 2 of 5 (40.0%)" in page.words
    assert page.tables["Segments"].row("0000") == ["brings its own", "38", "2", "5", "no"]
    assert said["warnings"][0].startswith("The cache is not finished")
    assert "up to 64 committed shards" in page.words
    receipts = [json.loads(path.read_text()) for path in Path(config.cache).glob("segments/0000/receipts/*.json")]
    stats = [receipt["stats"]["resid"] for receipt in receipts]
    rms = (sum(each["square_sum"][0] for each in stats) / sum(each["count"] for each in stats)) ** 0.5
    np.testing.assert_allclose(float(page.tables["Statistics of resid"].row("0")[0]), rms, rtol=1e-3)


def test_equal_figures_are_equal_bytes() -> None:
    values = np.arange(12.0).reshape(3, 4) + 1
    first, second = (draw_maps([HeatMap(values, "a", "x", "y", "unit", log=True)]) for _ in range(2))
    assert first == second
    assert "var(--ink)" in first


def test_a_damaged_row_is_told_not_fatal(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(cache, folder)
    file = folder / "segments/0000/taps/resid/c/0/0/0/0"  # of the first of five shards
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    sample = sample_rows(StoredRows(str(folder)), 40, seed=0)
    assert [row.number for row in sample.rows] == list(range(1, 38))
    (told,) = row_warnings(sample)
    assert told.startswith("Row 0: a stored object is not what was committed")
    assert "segments/0000/taps/resid/c/0/0/0/0" in told


def test_what_is_not_finite_or_nothing_is_told(cache: Path) -> None:
    (row,) = sample_rows(StoredRows(str(cache)), 1, seed=0).rows
    norms = row.norms["resid"].copy()
    norms[1, 3], norms[2] = np.nan, 0
    sample = Sample((replace(row, norms={"resid": norms}),), None, ())
    assert row_warnings(sample) == [
        f"resid: 1 vector not finite, in rows {row.number}.",
        f"resid: only zeros in slots 2 of rows {row.number}.",
    ]


@pytest.fixture(scope="module")
def of_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReadPage, dict]:
    folder = tmp_path_factory.mktemp("report")
    return report(write_run(folder / "run"), folder / "run.html")


def test_a_runs_page_has_its_numbers(of_run: tuple[ReadPage, dict]) -> None:
    page, said = of_run
    assert said["steps"] == {"done": 40, "of": 50}
    facts = page.tables["The run"]
    assert facts.row("Begun") == ["2026-11-22 10:54:01 UTC on host"]
    assert facts.row("Best held-out perplexity") == ["30 at step 20"]
    assert facts.row("Loss settings") == ["feature 1.0, mlp 0.5"]
    assert facts.row("Student") == ["the teacher, after query_heads (to 2, by index), drop_blocks (blocks [1])"]
    assert page.tables["Terms of the loss"].row("attention output") == ["0.75", "0.01875", "0.01875"]
    assert page.tables["Loss of the attention output by block"].row("1") == ["0.1", "0.0025", "0.0025"]
    assert page.tables["Evaluations on held-out rows"].row("20 (best)") == ["30", "0.035", "0.5"]
    assert page.tables["Cosine distance in numbers"].row("0") == ["0.5", "0.025", "-95.0%"]
    assert page.tables["Load of the experts"].row("1") == ["1", "2.4", "0", "1"]
    assert page.tables["Speed in numbers"].row("tokens a second")[1] == "1,020.5"
    assert page.tables["Speed in numbers"].row("Waiting for data") == ["50.00%"] * 4
    assert "evaluations and checkpoints between the steps are not counted" in page.words
    assert "Starts at 0.002, peaks at 0.026 in step 13, ends at 0." in page.words
    assert "90 before training, 36 at step 40; lowest 30 at step 20." in page.words
    assert "0.45 before training, 0.2625 at step 40; lowest 0.035 at step 20." in page.words
    assert "Median 50.00% of a step." in page.words
    drawn = {"Loss by term and step", "Learning rate by step", "Load of the experts over time in every block"}
    assert {*drawn, "Throughput by step", "Held-out perplexity by step"} <= page.figures.keys()


def test_a_runs_page_points_at_what_is_wrong(of_run: tuple[ReadPage, dict]) -> None:
    page, said = of_run
    expected = (
        "step 40 of 50",
        "spends 50% of the time waiting for data",
        "best at step 20",
        "rose in blocks 1",
        "1 expert had no token",
        "expert 0 of block 1 had 2.4",
    )
    for words, warning in zip(expected, said["warnings"], strict=True):
        assert words in warning
        assert warning in page.words


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ([0.1, 0.3, 0.2], "starts at 0.1, peaks at 0.3 in step 2, ends at 0.2"),
        ([0.3, 0.2, 0.1], "starts at 0.3, ends at 0.1"),
        ([0.1, 0.2, 0.3], "starts at 0.1, ends at 0.3"),
    ],
)
def test_a_schedule_in_words(rates: list[float], words: str) -> None:
    found = curve([{"step": step, "rate": rate} for step, rate in enumerate(rates, 1)], "rate")
    assert found is not None
    assert _schedule(found) == words


def test_a_single_step_is_in_the_tables_and_has_no_figure() -> None:
    line = {"step": 1, "distill/total_loss": 0.5, "feature/block_00": 0.25, "learning/current_learning_rate": 0.1}
    line |= {"perf/tokens_per_second": 9.0, "perf/data_wait_share": 0.5, "perf/step_time_seconds": 1.0}
    page = ReadPage("".join([*loss_fragments([line]), *speed_fragments([line])]))
    assert page.figures == {}
    assert page.tables["Terms of the loss"].row("total") == ["0.5", "0.5", "0.5"]
    assert page.tables["Speed in numbers"].row("tokens a second")[1] == "9"
    two = [line, {**line, "step": 2, "distill/total_loss": 0.25}, {**line, "step": 3}]
    drawn = ReadPage("".join([*loss_fragments(two), *speed_fragments(two)])).figures
    # The rate stays as it is: no figure of it.
    # Of a single block there is none either: the terms have its loss.
    expected = {"Loss by term and step", "Throughput by step", "Waiting for data by step"}
    assert drawn.keys() == expected


def test_a_run_that_hardly_waits_has_no_figure_of_it() -> None:
    figures = {"perf/data_wait_share": 1e-4, "perf/tokens_per_second": 9.0, "perf/step_time_seconds": 1.0}
    lines = [{"step": step, **figures} for step in range(1, 9)]
    page = ReadPage("".join(speed_fragments(lines)))
    assert page.figures.keys() == {"Throughput by step"}
    assert page.tables["Speed in numbers"].row("Waiting for data") == ["0.01%"] * 4


def test_mfu_is_the_throughput_in_another_unit_and_has_no_figure() -> None:
    found = {"perf/mfu": 0.25, "perf/tokens_per_second": 9.0, "perf/step_time_seconds": 1.0}
    page = ReadPage("".join(speed_fragments([{"step": step, **found} for step in range(1, 9)])))
    assert page.figures.keys() == {"Throughput by step"}
    assert page.tables["Speed in numbers"].row("Share of the peak FLOP/s (MFU)") == ["25.00%"] * 4


def test_a_term_that_is_not_drawn_is_named() -> None:
    terms = {name: 1.0 + place for place, name in enumerate(TERMS)}
    page = ReadPage("".join(loss_fragments([{"step": step, **terms} for step in (1, 2)])))
    words = list(TERMS.values())
    assert f"In the table alone: {', '.join(words[6:])}." in page.words
    assert set(words) <= {cells[0] for cells in page.tables["Terms of the loss"].rows}


def test_the_loss_of_few_blocks_is_lines_and_of_many_a_map() -> None:
    def drawn(blocks: int) -> str:
        line = {f"feature/block_{block:02d}": 0.5 for block in range(blocks)}
        (fragment, *_) = loss_fragments([{"step": step, **line} for step in (1, 2)])
        return ReadPage(fragment).figures["Loss of the attention output by block"]

    assert drawn(2).startswith("Line chart of the loss")
    assert drawn(4).startswith("Line chart of the loss")
    assert drawn(5).startswith("Heat map of the loss")


def summarise(run: Path, error: DivergedError | None) -> None:
    (run / "summary.json").write_text(json.dumps({"run": str(run), "steps": 40} | divergence_summary(error)))


DIVERGED = diverged_error(
    "the training ended worse than it began",
    "runs/a",
    {"steps": 40, "loss": "0.3 at the start, 6e+08 at the end"},
    BestCheckpoint(20, Measure("cosine distance", 0.035), "--step 20"),
)
DIVERGED_WORDS = [
    "The run diverged: the training ended worse than it began (steps 40; loss 0.3 at the start, 6e+08 at the end).",
    "Best checkpoint: step 20: cosine distance 0.035.",
]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DIVERGED, DIVERGED_WORDS),
        (
            diverged_error("the training has diverged: the loss is not finite", "runs/a", {"step": 3}, None),
            [
                "The run diverged: the training has diverged: the loss is not finite (step 3).",
                "Best checkpoint: none was kept.",
            ],
        ),
        (None, []),
    ],
    ids=["worse", "not finite", "healthy"],
)
def test_a_runs_page_begins_with_how_it_diverged(
    error: DivergedError | None, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "_svg", lambda canvas: '<svg viewBox="0 0 1 1"></svg>')  # the words count here
    summarise(run := write_run(tmp_path / "run"), error)
    page, said = report(run, tmp_path / "r.html")
    assert said["diverged"] is (error is not None)
    assert said["warnings"][: len(words)] == words
    assert said["warnings"][len(words)].startswith("The run is at step 40")
    places = [page.words.index(each) for each in [*words, "Last total loss"]]
    assert places == sorted(places)


def test_without_a_summary_nothing_is_said_of_divergence(of_run: tuple[ReadPage, dict]) -> None:
    page, said = of_run
    assert said["diverged"] is None
    assert "diverged" not in page.words


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        ({"steps": 40}, []),  # of a version that did not judge
        ({"diverged": True}, ["The run diverged: no reason is given.", "Best checkpoint: none was kept."]),
        (
            {"diverged": True, "best_checkpoint": 8, "error": "error: gone\n  cache  s3://key:secret@bucket/x\n  odd"},
            ["The run diverged: gone (cache s3://***@bucket/x; odd).", "Best checkpoint: step 8."],
        ),
    ],
    ids=["older", "bare", "secret"],
)
def test_summaries_of_other_programs(summary: dict, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert divergence_warnings(read_ending(Store(str(tmp_path)))) == words


@pytest.mark.parametrize("data", ["", "[]", '{"diverged": "perhaps"}', '{"best_checkpoint": [1]}'])
def test_a_damaged_summary_is_named(data: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(data)
    with pytest.raises(DamageError, match="does not have the expected content") as caught:
        read_ending(Store(str(tmp_path)))
    assert "summary.json" in str(caught.value)


def test_what_a_run_holds_is_escaped(of_run: tuple[ReadPage, dict]) -> None:
    page, _ = of_run
    assert page.tags.count("script") == 1
    assert page.tables["The run"].row("Cache") == [NASTY]
    assert "<script>alert" not in page.source


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    page, said = report(folder, tmp_path / "r.html")
    assert said["steps"] == {"done": 0, "of": 0}
    assert "None yet" in page.words


def test_the_command_writes_and_tells(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sub" / "r.html"
    assert main(["report", str(cache), "--rows", "0", "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["report"], said["of"], said["rows"]) == (str(out), "cache", [])
    assert out.exists()


def test_neither_a_cache_nor_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a cache nor a run"):
        write_report(ReportConfig(target=str(tmp_path), out=str(tmp_path / "r.html")))
    with pytest.raises(ConfigError, match="names a folder"):
        write_report(ReportConfig(target=str(tmp_path), out=f"{tmp_path}/"))
    assert list(tmp_path.iterdir()) == []


def test_long_curves_are_thinned_and_keep_their_spikes() -> None:
    lines = [{"step": step, "loss": 1.0 if step != 777 else 9.0, "feature/block_01": 2.0} for step in range(10_000)]
    found = curve(lines, "loss")
    assert found is not None
    assert len(found.step) == POINTS
    assert found.high.max() == 9.0
    assert found.mean.max() < 1.2
    blocks = block_curves([*lines[:1], {"step": 1}, *lines[2:]], "feature/")
    assert blocks is not None
    assert blocks.blocks == (1,)
    np.testing.assert_array_equal(blocks.values, 2.0)
    assert curve(lines, "other") is None


def test_pooling_keeps_the_largest_and_the_blanks() -> None:
    values = np.asarray([[1.0, 5.0, 2.0, np.nan, np.nan, np.nan, np.nan]])
    np.testing.assert_array_equal(pooled(values, 4), [[5.0, 2.0, np.nan, np.nan]])
    assert pooled(values, 7) is values


@pytest.mark.slow
def test_reports_of_and_in_a_bucket(gcs: Bucket, tmp_path: Path, cache: Path) -> None:
    """The page of a cache and of a run in a bucket is that of the ones on a disk.

    Other kinds of buckets answer a store alike (tests/schemas/store).
    """
    run, bucket = write_run(tmp_path / "run"), Store(gcs.url)
    for folder in (cache, run):
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            bucket.write(f"{folder.name}/{file.relative_to(folder)}", file.read_bytes())
    for name in ("metrics", "router"):  # which a bucket's run has in parts
        bucket.write(f"run/{name}/00000000.jsonl", (run / f"{name}.jsonl").read_bytes())
    for folder in (cache, run):
        pages = []
        for place, target in ((gcs.url, f"{gcs.url}/{folder.name}"), (str(tmp_path), str(folder))):
            write_report(ReportConfig(target=target, out=f"{place}/report.html", rows=1))
            html = (Store(place).read("report.html") or b"").decode()
            assert "</html>" in html
            pages.append(html.partition("<footer>")[0].replace(target, "URL").replace(str(folder), "URL"))
            pages[-1] = pages[-1].replace("/".join(target.split("/")[-2:]), "NAME")
        assert pages[0] == pages[1]


def test_titles_name_the_thing_and_not_only_its_kind() -> None:
    assert page_title("Cache", "demo/cache/") == "Cache demo/cache"
    assert page_title("Run", "gs://bucket/runs/cut") == "Run runs/cut"


def test_a_caption_gives_the_smallest_and_the_largest_value() -> None:
    line = Line("resid", np.array([0.0, 1.0, 2.0, 3.0]), np.array([2.0, 1.0, 9.0, 4.0]))
    assert low_and_high(line) == "resid: lowest 1 (slot 1), highest 9 (slot 2)"


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        ({"mode": "feature", "optimizer": {"learning_rate": None}}, "0.0003 (feature mode)"),
        ({"mode": "feature", "optimizer": {"learning_rate": 0.5}}, "0.5"),
        (
            {"stages": [{"mode": "blockwise"}, {"mode": "feature"}], "optimizer": {"learning_rate": None}},
            "0.003 (blockwise mode) and 0.0003 (feature mode)",
        ),
    ],
)
def test_a_learning_rate_that_was_left_to_the_mode_is_shown(config: dict[str, Any], rate: str) -> None:
    assert optimizer_words(config)["learning_rate"] == rate
    assert optimizer_words({}) == {}
