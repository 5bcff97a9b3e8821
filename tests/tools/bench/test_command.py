"""The benches at tiny sizes: that every figure and goal is there and means what it says; never how fast anything is."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from distillcache.models.checkpoint import load_pretrained
from distillcache.schemas.config import DemoConfig, TrainConfig
from distillcache.schemas.errors import StorageError
from distillcache.tools import cli
from distillcache.tools.bench import build as bench_build
from distillcache.tools.bench import feed as bench_feed
from distillcache.tools.bench.build import BuildSizes, Commits, between_forwards, measure_build
from distillcache.tools.bench.command import by_turns, make_report
from distillcache.tools.bench.feed import FeedSizes, batch_order, measure_feed, speed_goals, subset_bytes
from distillcache.tools.bench.figures import Goal, Measured
from distillcache.tools.bench.steps.head_kl import HeadSizes
from distillcache.tools.bench.steps.mixers import TINY_MIXERS
from distillcache.tools.bench.steps.step import StepSizes, measure_memory, measure_step, summarise
from distillcache.tools.bench.students import room
from distillcache.tools.bench.students.codecs import StudentSizes, make_builds, measure_student
from distillcache.tools.bench.synthetic_cache import random_codes, synthetic_plan, write_cache
from distillcache.tools.demo import command
from distillcache.trainer.feed.cache_source import CacheSource, make_feed
from distillcache.trainer.feed.open import Sources
from distillcache.trainer.run.stage import StageRun, plan_stage
from distillcache.trainer.run.stages import resolve_stages
from distillcache.trainer.step.parameters import all_parameters

SIZES = FeedSizes(
    shape=(5, 16, 64), rows=12, distinct=6, batch_rows=2, batches=5, shard_rows=2, tf_rows=2, million=1000
)


def test_a_goal_has_a_direction():
    assert Goal("x", 0.9, 0.9, "at_least").met
    assert not Goal("x", 0.89, 0.9, "at_least").met
    assert Goal("x", 1.0, 1.0, "at_most").met
    assert not Goal("x", 1.1, 1.0, "at_most").met


def test_paths_take_turns():
    calls = []
    rates = by_turns({"a": lambda n: calls.append(("a", n)) or n, "b": lambda n: calls.append(("b", n)) or 10 * n}, 3)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert rates == {"a": 1, "b": 10}


def test_a_build_is_compared_with_the_forwards_around_it():
    forwards, builds = iter([10.0, 20.0, 40.0]), {"a": lambda: 15.0, "b": lambda: 60.0}
    rates, ratios = between_forwards(lambda: next(forwards), builds, 1)
    assert rates == {"forward": 30.0, "a": 15.0, "b": 60.0}
    assert ratios == {"a": 1.0, "b": 2.0}


def test_goals_beside_a_busy_process_are_of_rates_beside_it():
    rates = {"feed_bf16_unchecked": 9.0, "feed_bf16": 6.0, "memcpy": 10.0, "raw_mmap": 9.0, "feed_int8": 18.0}
    goals = speed_goals(
        rates | {f"busy_{name}": rate / 2 for name, rate in rates.items()} | {"busy_memcpy": 10.0}, "busy_"
    )
    assert [(goal.name, goal.value) for goal in goals] == [
        ("busy_bf16_unchecked_over_memcpy", 0.45),
        ("busy_bf16_over_memcpy", 0.3),
        ("busy_bf16_unchecked_over_raw_mmap", 1.0),
        ("busy_int8_over_raw_mmap", 2.0),
    ]


@pytest.mark.slow
def test_the_feed_bench_has_all_figures_and_goals(tmp_path):
    report = make_report(measure_feed(tmp_path, SIZES, rounds=1))
    readers = ["memcpy", "memcpy_2_threads", "raw_mmap", "raw_mmap_2_threads", "safetensors", "tf_example"]
    ours = ["feed_bf16", "feed_bf16_unchecked", "feed_bf16_device", "feed_int8", "feed_int4"]
    assert all(report["figures"][f"{name}_rows_per_s"] > 0 for name in [*readers, *ours])
    assert all(report["figures"][f"busy_{name}_rows_per_s"] > 0 for name in ["memcpy", "raw_mmap", *ours[:2]])
    speeds = {
        "bf16_unchecked_over_memcpy": ("at_least", 0.9),
        "bf16_over_memcpy": ("at_least", 0.6),
        "bf16_unchecked_over_raw_mmap": ("at_least", 1.0),
        "int8_over_raw_mmap": ("at_least", 1.6),
    }
    assert {goal["name"]: (goal["direction"], goal["goal"]) for goal in report["goals"]} == {
        **speeds,
        **{f"busy_{name}": goal for name, goal in speeds.items()},
        "bf16_over_tf_example": ("at_least", 15),
        "subset_bytes_read_over_own": ("at_most", 1.01),
        "open_million_rows_s": ("at_most", 1.0),
        "open_million_rows_mb": ("at_most", 300),
    }
    assert report["figures"]["open_million_rows_shards"] == 500
    assert json.loads(json.dumps(report)) == report


def test_every_reader_gets_the_feeds_batches(tmp_path):
    plan = synthetic_plan(SIZES.rows, SIZES.shape, {"attn_out": "int8"}, SIZES.shard_rows)
    write_cache(tmp_path / "cache", plan, distinct=3)
    source = CacheSource(str(tmp_path / "cache"), ("attn_out",))
    with make_feed(source, global_batch_rows=SIZES.batch_rows, seed=3) as feed:
        for numbers in batch_order(SIZES, 3):
            batch = next(feed)["attn_out"]
            for place, number in enumerate(numbers):
                shard, row = divmod(number, SIZES.shard_rows)
                stored = random_codes(plan, shard)
                np.testing.assert_array_equal(batch["codes"][:, place], stored["attn_out"][row])
                np.testing.assert_array_equal(batch["scale"][:, place], stored["attn_out.scale"][row])


def test_some_blocks_cost_their_own_bytes(tmp_path):
    sizes = FeedSizes(shape=(5, 64, 64), rows=4, distinct=4, batch_rows=2, batches=1, shard_rows=2)
    write_cache(tmp_path, synthetic_plan(sizes.rows, sizes.shape, {"attn_out": "bf16"}, sizes.shard_rows))
    index = (5 * 2 * 16 + 4) / (2 * 64 * 64 * 2)  # of a shard: 16 bytes a chunk and a checksum
    # The two rows lie in one shard or in two, and reads of one shard that meet take its index once.
    assert 1 + index - 1e-6 <= subset_bytes(tmp_path, sizes) <= 1 + 2 * index + 1e-6


def test_a_builds_rate_is_that_between_its_first_and_last_commit(monkeypatch: pytest.MonkeyPatch):
    times, commits = iter([100.0, 102.0, 108.0]), Commits()
    monkeypatch.setattr(bench_build.time, "perf_counter", lambda: next(times))
    for shard in range(3):
        commits.add(shard)
    assert commits.rate(tokens=40) == 2 * 40 / 8


@pytest.mark.slow
def test_the_build_bench_has_all_figures_and_goals(tmp_path, teacher):
    choices = {"bf16": ("bf16", False), "int8_delta": ("int8", True), "int4": ("int4", False)}
    sizes = BuildSizes(batch_rows=2, row_tokens=16, batches=3, forwards=2, choices=choices, hybrid=TINY_MIXERS.config)
    report = make_report(measure_build(tmp_path, str(teacher), sizes, rounds=1))
    names = ["forward", *choices, "hybrid_forward", "hybrid_int8_delta"]
    assert all(report["figures"][f"{name}_tokens_per_s"] > 0 for name in names)
    assert {goal["name"]: goal["goal"] for goal in report["goals"]} == {
        "bf16_over_forward": 1.0,
        "int8_delta_over_forward": 0.9,
        "int4_over_forward": 0.9,
        "hybrid_int8_delta_over_forward": 0.9,
    }
    assert not (tmp_path / "cache").exists()


STUDENT = StudentSizes(row_tokens=16, rows=24, eval_rows=8, steps=3, batch_rows=4)


@pytest.mark.slow  # three builds and three runs
def test_the_student_bench_has_all_figures_and_goals(tmp_path, teacher):
    report = make_report(measure_student(tmp_path, str(teacher), STUDENT))
    names = ["teacher_perplexity", "cut_perplexity"]
    names += [f"{name}_{what}" for name in ("bf16", "int8", "int4") for what in ("perplexity", "bytes_per_token")]
    figures, goals = report["figures"], {goal["name"]: goal for goal in report["goals"]}
    assert list(figures) == names
    # attn_out in 3 slots and resid in 4, of 24 bf16 numbers each
    assert figures["bf16_bytes_per_token"] == (3 + 4) * 24 * 2
    assert figures["bf16_bytes_per_token"] > figures["int8_bytes_per_token"] > figures["int4_bytes_per_token"]
    assert figures["teacher_perplexity"] != figures["cut_perplexity"] != figures["bf16_perplexity"]
    assert {name: (goal["direction"], goal["goal"]) for name, goal in goals.items()} == {
        "int8_worse_than_bf16": ("at_most", 0.005),
        "int4_worse_than_bf16": ("at_most", 0.04),
    }
    for name in ("int8", "int4"):
        worse = figures[f"{name}_perplexity"] / figures["bf16_perplexity"] - 1
        assert goals[f"{name}_worse_than_bf16"]["value"] == pytest.approx(worse, abs=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"corpus"}


def test_the_student_bench_does_the_demos_work(tmp_path, teacher):
    builds = make_builds(tmp_path, str(teacher), StudentSizes())
    datas = [build.data for build in builds.values()]
    assert all(data == command.default_data(tmp_path) for data in datas)
    assert builds["bf16"] == command.build_config(tmp_path / "cache", str(teacher), datas[0], DemoConfig().batch_rows)
    resid = {name: (build.taps.resid.codec, build.taps.resid.delta) for name, build in builds.items()}
    assert resid == {"bf16": ("bf16", False), "int8": ("int8", True), "int4": ("int4", True)}
    assert [build.taps.attn_out.codec for build in builds.values()] == ["bf16", "int8", "int4"]


def test_the_student_bench_looks_at_the_free_room_first(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"too little room[\s\S]*--dir"):
        measure_student(tmp_path, str(teacher), STUDENT)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_step_bench_has_all_figures_and_goals_of_time(tmp_path, teacher):
    heads = HeadSizes(vocab=4099, hidden=16, memory_tokens=512, timed_tokens=64)
    sizes = StepSizes(batch_rows=2, row_tokens=16, rows=4, steps=1, dtypes=(), heads=heads, mixers=TINY_MIXERS)
    report = make_report(measure_step(tmp_path, str(teacher), sizes, rounds=1))
    figures, goals = report["figures"], {goal["name"]: goal for goal in report["goals"]}
    paths = ["offline", "online", "teacher", "student", "student_two_micro_batches", "feature", "feature_no_remat"]
    assert all(figures[f"{name}_s"] > 0 for name in paths)
    assert all(figures[f"{name}_first_step_s"] > 0 for name in paths[3:])
    assert figures["blockwise_tokens_per_s"] == pytest.approx(2 * 16 / figures["offline_s"], rel=1e-4)
    assert {name: (goal["direction"], goal["goal"]) for name, goal in goals.items()} == {
        "wait_share": ("at_most", 0.02),
        "speedup_of_ideal": ("at_least", 0.9),
        "blockwise_over_feature": ("at_most", 1.05),
        "head_kl_temporaries_over_plain": ("at_most", 0.125),
        "head_kl_time_over_plain": ("at_most", 1.3),
        "gated_delta_over_attention": ("at_most", 2.0),
        "mamba2_over_attention": ("at_most", 2.0),
        "hybrid_compile_many_over_few": ("at_most", 1.25),
    }
    assert all(figures[f"mixer_{name}_s"] > 0 for name in ("attention", "gated_delta", "mamba2"))
    assert figures["head_kl_plain_temporaries_mb"] > 4099 * 512 * 4 / 1e6
    assert 0 <= goals["wait_share"]["value"] <= 1
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "cache"}


@pytest.mark.slow
def test_the_step_benchs_temporaries_are_those_of_the_trainers_own_step(cache, tmp_path):
    """Compiled from shapes alone there, and by a stage of a run here."""
    source = CacheSource(str(cache), leaving=False)
    decoder, depth = load_pretrained(source.plan.teacher.path, dtype="float32"), source.plan.teacher.num_blocks
    sizes = StepSizes(
        batch_rows=4, row_tokens=16, depths=(2, depth), dtypes=("float32",), codecs={"bf16": ("bf16", False)}
    )
    found = measure_memory(decoder.config, sizes)
    for mode, name in (("blockwise", "bf16_inside"), ("feature", "feature_mode")):
        config = TrainConfig.model_validate({"run": str(tmp_path), "cache": str(cache), "batch_rows": 4, "mode": mode})
        [stage] = resolve_stages(config, config.mesh)
        parameters = all_parameters(decoder)
        given = (config, config.mesh, stage, decoder, parameters, Sources(config))
        run = StageRun(plan_stage(*given), parameters)
        compiled = run.compiled(run.plan.place(run.plan.source[range(4)]))
        temporaries = found.figures[f"temporaries_float32_{name}_mb"]
        assert temporaries == compiled.memory_analysis().temp_size_in_bytes / 1e6
    growth = [found.figures[f"temporaries_{depth}_over_2_float32_bf16_{place}"] for place in ("inside", "after")]
    assert found.goals == [Goal(f"temporaries_{depth}_over_2_float32", max(growth), 1.25, "at_most")]
    assert found.goals[0].met


def test_ratios_of_steps_are_taken_in_each_round():
    names = ["offline", "online", "teacher", "student", "student_two_micro_batches", "feature", "feature_no_remat"]
    rounds = [dict(zip(names, seconds, strict=True)) for seconds in ([2, 3, 1, 2, 4, 4, 3], [4, 6, 2, 4, 8, 8, 6])]
    found = summarise(rounds, [(0.0, 2.0), (0.2, 4.0)], tokens=12)
    assert found.figures["offline_s"] == 3
    assert found.figures["blockwise_tokens_per_s"] == (12 / 2 + 12 / 4) / 2
    assert (found.figures["speedup"], found.figures["speedup_ideal"]) == (1.5, 1.5)
    assert found.figures["two_micro_batches_over_one"] == 2
    assert [goal.value for goal in found.goals] == [pytest.approx(0.2 / 6), 1.0, 0.5]


def test_the_command_prints_one_json_object(capsys, monkeypatch):
    found = Measured({"a_rows_per_s": 2.0}, [Goal("a_over_b", 0.5, 1.0, "at_least")])
    monkeypatch.setattr(bench_feed, "measure", lambda config: found)
    assert cli.main(["bench", "feed", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["figures"] == {"a_rows_per_s": 2.0}
    assert report["goals"] == [
        {"name": "a_over_b", "value": 0.5, "goal": 1.0, "direction": "at_least", "met": False},
    ]
    assert report["machine"]["cores"] > 0
    assert cli.main(["bench", "feed"]) == 0
    assert "not met" in capsys.readouterr().out
    assert cli.main(["bench", "nothing"]) == 2
