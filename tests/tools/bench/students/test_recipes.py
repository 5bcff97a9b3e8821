"""The bench of recipes: costs and ratios from made-up runs, and every way of every job on a tiny teacher."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from distillcache.models.checkpoint import read_config
from distillcache.schemas.config import BenchConfig
from distillcache.schemas.config.stages import RecipeWay
from distillcache.tools.bench.students.compared import Compared, Point, Trained, Unit, place_of, summarise, value_at
from distillcache.tools.bench.students.jobs import JOBS, WAYS, stages
from distillcache.tools.bench.students.recipes import (
    RecipeSizes,
    TeacherWork,
    docstrings,
    run_config,
    step_tflop,
    teacher_work,
    train_all,
    write_plot,
)

SOME = ("ce", "online_kl", "online_features", "blockwise_bf16", "blockwise_kl_int4")
SIZES = RecipeSizes(row_tokens=32, eval_rows=4, batch_rows=4, steps=4, points=2, ways=SOME)
TINY = {"surgery": [{"op": "drop_blocks", "blocks": [1]}]}


def trained(perplexities: list[float], seconds: float) -> Trained:
    points = [
        Point(2 * number, {"perplexity": value, "kl": value / 10, "agreement": 1 / value})
        for number, value in enumerate(perplexities)
    ]
    other = {"perplexity": 9.0, "kl": 0.5, "agreement": 0.4, "teacher_perplexity": 3.0}
    steps = 2 * len(perplexities) - 2
    return Trained(points, {"seconds": [seconds] * steps, "tflop": [seconds / 8] * steps}, other, teacher=2.0)


def compared(offline: list[float]) -> Compared:
    runs = {"online_kl": [trained([64.0, 16.0, 8.0], 10.0)], "blockwise_kl_int8": [trained(offline, 2.0)]}
    builds: dict[Unit, dict[str, float]] = {"seconds": {"int8": 6.0}, "tflop": {"int8": 0.5}}
    return Compared(runs, builds, {"online_kl": [4], "blockwise_kl_int8": [1, 3]})


def test_a_build_is_paid_by_its_students():
    found = compared([64.0, 8.0, 4.0])
    assert found.spent("online_kl", 4) == 40.0
    assert found.spent("online_kl", 4, "tflop") == 5.0
    assert found.cost("online_kl", 4, 1) == 40.0  # reads rows alone
    assert [found.cost("blockwise_kl_int8", 2, students) for students in (1, 3)] == [10.0, 6.0]
    figures = summarise(found)
    ratios = {goal.name: (goal.value, goal.met) for goal in figures.goals}
    assert ratios["int8_first_seconds"] == (0.25, True)
    assert ratios["int8_third_seconds"] == (0.15, True)
    assert ratios["int8_first_tflop"] == (pytest.approx(1.0 / 5), True)
    assert len(ratios) == 4
    assert figures.figures["int8_tenth_seconds"] == pytest.approx(4.6 / 40)


def test_stages_have_their_own_median():
    run = trained([64.0, 8.0, 4.0], 2.0)
    found = replace(compared([]), runs={"blockwise_kl_int8": [replace(run, steps={"seconds": [7.0, 1.0, 1.0, 90.0]})]})
    assert [found.spent("blockwise_kl_int8", step) for step in (0, 1, 4)] == [0.0, 7.0, 10.0]


def test_a_quality_that_is_not_reached_has_no_ratio():
    measured = summarise(compared([64.0, 20.0, 9.0]))
    assert not measured.goals
    assert not any(name.startswith("int8_third") for name in measured.figures)


def test_equal_time_is_that_of_the_cheapest():
    figures = summarise(compared([64.0, 8.0, 4.0])).figures
    assert figures["seconds_in_time"] == 10.0  # 4 steps of 2 s and a third of 6 s
    assert figures["blockwise_kl_int8_perplexity_in_time"] == 4.0
    assert figures["online_kl_perplexity_in_time"] == pytest.approx(32.0)  # half of the way from 64 to 16, in logarithm


def test_curves_are_straight_in_the_logarithm():
    assert value_at([0, 10], [100.0, 1.0], 5) == pytest.approx(10.0)
    assert [value_at([2, 10], [100.0, 1.0], place) for place in (0, 20)] == [100.0, 1.0]
    assert place_of([0, 10], [100.0, 1.0], 10.0) == pytest.approx(5.0)
    assert place_of([0, 10, 20], [100.0, 10.0, 20.0], 5.0) is None
    assert place_of([3, 10], [100.0, 10.0], 100.0) == 3


def test_every_way_takes_all_steps():
    for job in JOBS.values():
        for way in WAYS.values():
            assert sum(stage["steps"] for stage in stages(job, way, 48)) == 48


@pytest.mark.parametrize("name", JOBS)
def test_every_config_is_valid(name: str, tmp_path: Path):
    for way_name, way in WAYS.items():
        config = run_config(tmp_path, way_name, JOBS[name], way, RecipeSizes(), 1)
        assert config.model_dump()["seed"] == 1
        assert BenchConfig(what="recipes", job=name)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"job": "experts"}, {"ways": ["ce"]}, {"text": "a.txt"}, {"seed": 1}])
def test_some_flags_are_for_recipes(given: dict[str, Any]):
    with pytest.raises(ValueError, match=f"{next(iter(given))} is for recipes"):
        BenchConfig(what="kl", **given)
    assert BenchConfig(what="recipes", **given)


def test_ways_are_those_that_there_are():
    assert get_args(RecipeWay) == tuple(WAYS)
    with pytest.raises(ValueError, match="twice"):
        BenchConfig(what="recipes", ways=["ce", "ce"])


def test_the_table_has_a_row_for_each_way():
    measured = summarise(compared([64.0, 8.0, 4.0]))
    titles, online, offline = measured.table
    assert {len(row) for row in measured.table} == {len(titles)}
    assert online[:4] == ["KL, teacher in the loop", "8", "0.800", "12.5%"]
    shares = [cell for title, cell in zip(titles, offline, strict=True) if title == "+ 1/3 build"]
    assert shares == ["0.03", "0.2"]  # a third of 6 s in minutes, and of 0.5 TFLOP


def test_the_report_has_the_curves():
    runs = summarise(compared([64.0, 8.0, 4.0])).details["runs"]
    assert runs["online_kl"]["seconds"] == [0.0, 20.0, 40.0]
    assert [point["perplexity"] for point in runs["blockwise_kl_int8"]["seeds"][0]] == [64.0, 8.0, 4.0]


def test_the_teachers_work_is_two_flops_a_weight_and_token(teacher: Path):
    """And the scores of keys and the mixing of values, of which half is masked."""
    config = read_config(str(teacher))
    size, tokens = config.hidden_size, SIZES.batch_rows * SIZES.row_tokens
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    block = size * (2 * heads + 2 * kv + 3 * config.intermediate_size) + 2 * heads / 2 * SIZES.row_tokens
    work = teacher_work(str(teacher), SIZES)
    assert work.step == pytest.approx(2 * tokens * config.num_blocks * block / 1e12)
    assert work.build == pytest.approx(work.step * SIZES.rows / SIZES.batch_rows)
    assert work.head == pytest.approx(2 * tokens * size * config.vocab_size / 1e12)


@pytest.mark.parametrize(
    ("way", "mode", "expected"),
    [
        ("ce", "feature", 100.0),
        ("online_kl", "feature", 111.0),
        ("kl_int8", "feature", 101.0),
        ("blockwise_kl_int8", "blockwise", 100.0),
        ("blockwise_kl_int8", "feature", 101.0),
    ],
)
def test_a_step_has_the_teachers_work_that_its_losses_need(way: str, mode: str, expected: float):
    assert step_tflop(WAYS[way], mode, 100.0, TeacherWork(1000.0, 10.0, 1.0)) == expected


def test_the_other_text_is_long_enough():
    assert sum(map(len, docstrings())) > 400_000


@pytest.mark.slow
def test_ways_train_the_same_student(tmp_path: Path, teacher: Path):
    job = replace(JOBS["half-blocks"], student=TINY)
    found = train_all(tmp_path, str(teacher), job, SIZES, seeds=1)
    figures = summarise(found).figures
    assert tuple(found.runs) == SOME
    starts = {run[0].points[0].figures["perplexity"] for run in found.runs.values()}
    assert max(starts) == pytest.approx(min(starts), rel=1e-6)  # one student
    assert [point.step for point in found.runs["ce"][0].points] == [0, 2, 4]
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["blockwise_bf16_kl"] != figures["blockwise_kl_int4_kl"]
    write_plot(found, job, tmp_path / "recipes.svg")
    assert (tmp_path / "recipes.svg").read_text().startswith("<?xml")
