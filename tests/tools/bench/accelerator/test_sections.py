"""The bench of an accelerator in tiny sizes: that all parts run, and that none stops the others."""

import json
from pathlib import Path

import pytest

from distillcache.models.checkpoint import read_config
from distillcache.schemas.config import BenchConfig
from distillcache.tools.bench.accelerator import parity, sections
from distillcache.tools.bench.accelerator.kernels import KernelSizes, measure_attention, measure_experts
from distillcache.tools.bench.accelerator.sections import TINY, make_parts, measure, run_parts
from distillcache.tools.bench.build import BuildSizes
from distillcache.tools.bench.command import make_report
from distillcache.tools.bench.figures import Goal, Measured
from distillcache.tools.bench.steps.step import StepSizes


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(folder: Path) -> Measured:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nwhile doing this")

    def works(folder: Path) -> Measured:
        assert list(folder.iterdir()) == []
        return Measured({"speed": 2.0}, [Goal("ratio", 1.0, 0.5, "at_least")])

    found = run_parts({"first": fails, "second": works}, tmp_path)
    assert found.figures["second.speed"] == 2.0
    assert [(goal.name, goal.value, goal.met) for goal in found.goals] == [
        ("second.ratio", 1.0, True),
        ("parts_failed", 1, False),
    ]
    assert make_report(found)["left_out"] == {"first": "RuntimeError: RESOURCE_EXHAUSTED: out of memory"}
    assert "while doing this" in capsys.readouterr().err


def test_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    parts = dict.fromkeys(["one", "two"], lambda folder: Measured({}, []))
    found = run_parts(parts, tmp_path, time_s=-1)
    assert found.figures == {}
    assert found.details["left_out"].keys() == parts.keys()
    assert found.goals == [Goal("parts_failed", 0, 0, "at_most")]


def test_parity_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    found = make_parts(TINY)["parity"](tmp_path)
    assert found.details == {"left_out": {"parity": "torch not installed (extra `parity`)"}}


@pytest.mark.slow
def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra `parity`)")
    pytest.importorskip("transformers", reason="transformers is not installed (extra `parity`)")
    figures, goals = parity.measure_parity(tmp_path)
    assert figures.keys() == {f"parity_{family}" for family in parity.FAMILIES}
    assert all(goal.met for goal in goals)


def test_ways_to_run_experts_agree() -> None:
    sizes = KernelSizes(2, 16, 2, heads=4, kv_heads=2, head_dim=8, experts=4, top_k=2, hidden=16, expert_size=8)
    found = measure_experts(sizes)
    assert found["experts_ragged_difference"] < 0.02  # bfloat16 rounds at 0.004
    assert found["experts_ragged_over_dense_both"] == pytest.approx(
        found["experts_ragged_both_ms"] / found["experts_dense_both_ms"]
    )
    # XLA's is the only attention of a CPU.
    assert measure_attention(sizes).keys() == {"attention_xla_forward_ms", "attention_xla_both_ms"}


def sizes_of(folder: Path, teacher: str, sizes: BuildSizes | StepSizes, rounds: int) -> Measured:
    """`measure_build` and `measure_step`, but for what they build and train."""
    assert list(folder.iterdir()) == [Path(teacher)]
    return Measured({"row_tokens": sizes.row_tokens, "blocks": read_config(teacher).num_blocks}, [])


@pytest.mark.slow
def test_all_parts_run_without_an_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The benches of builds and steps have tests of their own (test_command.py), which take most of the time."""
    monkeypatch.setattr(sections, "measure_build", sizes_of)
    monkeypatch.setattr(sections, "measure_step", sizes_of)
    report = make_report(measure(BenchConfig(what="accelerator", dir=str(tmp_path))))
    figures = report["figures"]
    assert set(report.get("left_out", {})) <= {"parity"}
    parts = set(make_parts(TINY)) - set(report.get("left_out", {}))
    assert {f"{part}.seconds" for part in parts} <= figures.keys()
    assert figures["memory.recorder_codes_gb"] * 1e9 >= 2 * 16 * 32 * 2 * (3 + 4)  # bf16 of both taps
    for part, sizes in (("build", TINY.build), ("step", TINY.step)):
        assert (figures[f"{part}.row_tokens"], figures[f"{part}.blocks"]) == (sizes.row_tokens, 3)
    assert figures["feed.feed_bf16_device_rows_per_s"] > 0
    assert figures["codec.int4_delta.encode_ms_per_million"] > 0
    assert {goal["name"]: goal["met"] for goal in report["goals"]}["parts_failed"]
    assert json.loads(json.dumps(report)) == report
    assert "no accelerator here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
