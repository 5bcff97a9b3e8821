"""A report's sections about held-out rows: curves beside what they are compared with, shares in percent."""

from collections.abc import Sequence
from typing import Any

import pytest

from distillcache.tools.pages.figures import Line
from distillcache.tools.report import evaluations
from distillcache.tools.report.evaluations import block_fragments, evaluation_figure, evaluation_fragments
from distillcache.trainer.run.evaluate import Evaluation
from tests.tools.report.report_reading import ReadPage


def evaluation(step: int, perplexity: float | None, closed: float | None = None, **others: Any) -> Evaluation:
    return Evaluation(
        step=step,
        perplexity=perplexity,
        **{"blocks": (0,), "cosine": (0.1,), "teacher_perplexity": 10.0, "gap_closed": closed} | others,
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each chart was given: its lines by name, and its settings; nothing is drawn."""
    found: list[dict[str, Any]] = []

    def keep(lines: Sequence[Line], x: str, y: str, **settings: Any) -> str:
        found.append({"lines": {line.name: line.y.tolist() for line in lines}, "x": x, "y": y, **settings})
        return '<svg viewBox="0 0 1 1"></svg>'

    monkeypatch.setattr(evaluations, "draw_lines", keep)
    return found


CURVE = [evaluation(0, 90.0), evaluation(20, 30.0, 0.75), evaluation(40, 14.0, 0.95), evaluation(60, 18.0, 0.9)]


def test_perplexity_runs_between_the_cut_students_and_the_teachers(drawn: list[dict[str, Any]]) -> None:
    figure = evaluation_figure(CURVE, "perplexity")
    assert figure is not None
    (chart,) = drawn
    assert chart["lines"] == {
        "student": [90.0, 30.0, 14.0, 18.0],
        "before training: 90": [90.0, 90.0],
        "teacher: 10": [10.0, 10.0],
    }
    assert figure.alt.endswith("; teacher: 10.")


@pytest.mark.parametrize(
    ("found", "names"),
    [
        ([evaluation(20, 30.0), evaluation(40, 14.0)], ["student", "teacher: 10"]),  # nothing is known of the start
        (
            [evaluation(0, 90.0, teacher_perplexity=None), evaluation(40, 14.0, teacher_perplexity=None)],
            ["student", "before training: 90"],
        ),
        (
            [
                evaluation(0, 90.0),
                evaluation(20, 30.0, perplexity_without_bias=31.0),
                evaluation(40, 14.0, perplexity_without_bias=16.0),
            ],
            ["student", "student without biases", "before training: 90", "teacher: 10"],
        ),
    ],
    ids=["no start", "no teacher", "biases"],
)
def test_what_is_not_known_has_no_line(found: list[Evaluation], names: list[str], drawn: list[dict[str, Any]]) -> None:
    evaluation_figure(found, "perplexity")
    assert list(drawn[0]["lines"]) == names


def test_shares_are_drawn_in_percent_from_nothing_to_all(drawn: list[dict[str, Any]]) -> None:
    found = [replace_in(each, agreement=share) for each, share in zip(CURVE, (0.1, 0.5, 0.625, 0.6), strict=True)]
    page = ReadPage("".join(evaluation_fragments(found)))
    charts = {chart["y"]: chart for chart in drawn}
    for name in ("share of the gap closed", "same first choice as the teacher"):
        assert charts[name]["percent"]
        assert charts[name]["covers"] == [0, 1]
    assert not charts["perplexity"]["percent"]
    assert page.tables["Evaluations on held-out rows"].row("40 (best)")[1:] == ["95.0%", "0.1", "62.5%"]
    assert "10.0% before training, 60.0% at step 60; highest 62.5% at step 40." in page.words


def replace_in(found: Evaluation, **changes: Any) -> Evaluation:
    return found.model_copy(update=changes)


def test_no_gap_has_no_share(drawn: list[dict[str, Any]]) -> None:
    """A student that begins no worse than its teacher has no gap to close, not one of which nothing is closed."""
    found = [evaluation(0, 9.0), evaluation(20, 8.0)]
    assert evaluation_figure(found, "share of the gap closed") is None
    page = ReadPage("".join(evaluation_fragments(found)))
    assert page.tables["Evaluations on held-out rows"].rows[0] == ["step", "perplexity", "mean cosine distance"]


def test_the_violation_of_held_out_rows_is_in_the_table_alone() -> None:
    page = ReadPage("".join(evaluation_fragments([replace_in(each, max_violation=0.5) for each in CURVE])))
    assert not [title for title in page.figures if "iolation" in title]
    assert page.tables["Evaluations on held-out rows"].row("20")[-1] == "0.5"


def test_a_run_that_diverged_is_drawn_with_all_its_figures() -> None:
    found = [evaluation(0, 90.0), evaluation(20, 3e9, -3.75e7), evaluation(40, 6e30, -7.5e28)]
    page = ReadPage("".join(evaluation_fragments(found)))
    assert page.tables["Evaluations on held-out rows"].row("20")[1] == "-3,750,000,000.0%"
    assert "90 before training, 6e+30 at step 40; teacher: 10." in page.words


def test_without_targets_there_is_no_perplexity_to_draw() -> None:
    found = [evaluation(step, None, cosine=(0.5 / (step + 1),)) for step in (0, 20)]
    assert evaluation_figure(found, "perplexity") is None
    page = ReadPage("".join(evaluation_fragments(found)))
    assert page.figures.keys() == {"Mean cosine distance to the teacher's blocks by step"}


def test_a_single_evaluation_is_a_line_of_the_table_and_no_figure() -> None:
    (drawn, listed) = (ReadPage(each) for each in (evaluation_fragments([evaluation(0, 90.0)])[:2]))
    assert drawn.figures == {}
    assert listed.tables["Evaluations on held-out rows"].row("0 (best)") == ["90", "0.1"]
    blocks = ReadPage("".join(block_fragments([evaluation(0, 90.0)])))
    assert blocks.tables["Cosine distance in numbers"].rows == [["block", "before training"], ["0", "0.1"]]


def test_a_share_is_a_percentage() -> None:
    found = [evaluation(0, 90.0), evaluation(20, 30.0, 0.75), evaluation(40, 14.0, 0.95), evaluation(60, 18.0, 0.9)]
    page = ReadPage("".join(evaluation_fragments(found)))
    assert page.tables["Evaluations on held-out rows"].row("20")[1] == "75.0%"
    assert "0.0% before training, 90.0% at step 60; highest 95.0% at step 40." in page.words
    assert "90 before training, 18 at step 60; lowest 14 at step 40; teacher: 10." in page.words
