"""The routing bench at tiny sizes: both families learn, biases keep the load even, and every figure has its name."""

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from distillcache.schemas.command_line import parse
from distillcache.schemas.config import BenchConfig, TrainConfig
from distillcache.schemas.errors import ConfigError, DistillcacheError
from distillcache.tools.bench.command import make_report
from distillcache.tools.bench.students import routing
from distillcache.tools.bench.students.routing import (
    WAYS,
    RoutingSizes,
    Trained,
    _training_beside,
    summarise,
    train_all,
    train_config,
    write_plot,
)
from distillcache.trainer.run.evaluate import Evaluation

# With seeds 0 and 1 aux_free_over_aux was 0.996 and 1.006 (Mixtral), 0.996 and 0.999 (Qwen3-MoE), and
# aux_free_violation_over_none 0.35 and 0.39, 0.39 and 0.46; after 200 steps it was still 0.72 to 0.83.
TINY = RoutingSizes(
    blocks=2,
    hidden=32,
    experts=4,
    expert_size=32,
    row_tokens=32,
    rows=1216,
    eval_rows=16,
    batch_rows=4,
    steps=300,
    eval_every=300,
)
FAMILIES = ("mixtral", "qwen3_moe")


@pytest.mark.slow  # three runs of 300 steps, nearly all of the time to compile them
@pytest.mark.longest
@pytest.mark.parametrize("family", FAMILIES[1:])  # the first has no norms of queries and keys, and routes alike
def test_biases_balance_as_the_auxiliary_loss_does_and_cost_no_loss(tmp_path: Path, family: str) -> None:
    found = train_all(tmp_path, TINY, [family])
    report = make_report(summarise(found))
    figures = {name.removeprefix(f"{family}_"): value for name, value in report["figures"].items()}
    for way in WAYS:
        # 5.5 nats: the logarithm of the vocabulary.
        assert figures[f"{way}_loss"] < 3.3 < 5.5 < figures["start_loss"]
        assert abs(figures[f"{way}_train_loss"] - figures[f"{way}_loss"]) < 0.4
    assert figures["aux_free_max_violation"] < figures["none_max_violation"]
    assert figures["aux_max_violation"] < figures["none_max_violation"]
    assert figures["aux_free_loss"] <= 1.1 * figures["aux_loss"]
    # Its biases have moved, and the others have none.
    assert figures["aux_free_perplexity"] != figures["aux_free_perplexity_without_bias"]
    assert [found[family][way].evaluations[-1].perplexity_without_bias for way in ("none", "aux")] == [None, None]
    assert all(goal["met"] for goal in report["goals"])


@pytest.mark.slow  # three short runs, one of them in a process of its own
def test_a_family_that_trains_beside_another_gives_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "WAYS", {"aux_free": WAYS["aux_free"]})
    sizes = replace(TINY, rows=64, steps=6, eval_every=3)
    (both, alone) = (tmp_path / "both", tmp_path / "alone")
    for folder in (both, alone):
        folder.mkdir()
    found = train_all(both, sizes, FAMILIES)
    assert found.keys() == set(FAMILIES)
    assert found[FAMILIES[1]] == train_all(alone, sizes, FAMILIES[1:])[FAMILIES[1]]


@pytest.mark.slow  # a process that imports JAX
def test_a_training_that_fails_beside_another_is_an_error(tmp_path: Path) -> None:
    config = train_config(tmp_path / "run", str(tmp_path / "none"), tmp_path / "none", "none", TINY)
    with pytest.raises(DistillcacheError, match="a training of the bench failed"), ExitStack() as stack:
        stack.enter_context(_training_beside([config.model_dump_json()], tmp_path / "compiled"))()


def evaluation(step: int, loss: float, violation: float, without_bias: float | None = None) -> Evaluation:
    return Evaluation(
        step=step,
        perplexity=math.exp(loss),
        blocks=(),
        cosine=(),
        max_violation=violation,
        perplexity_without_bias=without_bias,
    )


def results() -> dict[str, dict[str, Trained]]:
    start = evaluation(0, 5.5, 1.0)
    runs = {
        "none": Trained((start, evaluation(8, 2.0, 2.0)), 2.1),
        "aux": Trained((start, evaluation(8, 1.6, 0.4)), 1.7),
        "aux_free": Trained((start, evaluation(8, 1.8, 0.5, 7.0)), 1.9),
    }
    return dict.fromkeys(FAMILIES, runs)


def test_figures_and_goals() -> None:
    report = make_report(summarise(results()))
    names = ["start_loss", "start_max_violation"]
    names += [f"{way}_{what}" for way in WAYS for what in ("loss", "train_loss", "max_violation")]
    names += ["aux_free_perplexity", "aux_free_perplexity_without_bias"]
    figures = report["figures"]
    assert list(figures) == [f"{family}_{name}" for family in FAMILIES for name in names]
    assert (figures["mixtral_start_loss"], figures["mixtral_aux_loss"], figures["mixtral_aux_train_loss"]) == (
        5.5,
        1.6,
        1.7,
    )
    assert figures["qwen3_moe_aux_free_perplexity_without_bias"] == 7.0
    assert [
        (goal["name"], goal["value"], goal["direction"], goal["goal"], goal["met"]) for goal in report["goals"]
    ] == [
        (f"{family}_{name}", pytest.approx(value), "at_most", limit, met)
        for family in FAMILIES
        for name, value, limit, met in (
            ("aux_free_over_aux", 1.125, 1.1, False),
            ("aux_free_violation_over_none", 0.25, 0.999, True),
        )
    ]


def test_runs_differ_in_balancing_alone() -> None:
    def config(way: str) -> TrainConfig:
        return train_config(Path("run"), "cache", Path("student"), way, TINY)

    none, aux, free = map(config, WAYS)
    assert aux.loss.load_balance.weight == 0.01
    assert aux.model_copy(update={"loss": none.loss}) == none
    assert free.model_copy(update={"moe_balance_type": None}) == none
    fields = {name: (getattr(free, name), field.default) for name, field in TrainConfig.model_fields.items()}
    assert all(
        value == default for name, (value, default) in fields.items() if name.startswith("moe_") and "type" not in name
    )


@pytest.mark.parametrize(("name", "beginning"), [("a.svg", b"<?xml"), ("a.png", b"\x89PNG")])
def test_the_picture_is_small_and_always_the_same(tmp_path: Path, name: str, beginning: bytes) -> None:
    write_plot(results(), tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert data.startswith(beginning)
    assert len(data) < 150_000
    write_plot(results(), tmp_path / name)
    assert (tmp_path / name).read_bytes() == data


def test_other_benches_have_no_picture() -> None:
    assert parse(BenchConfig, ["routing", "--plot", "a.svg"], "bench", positional=("what",)).plot == "a.svg"
    with pytest.raises(ConfigError, match="feed has no picture"):
        parse(BenchConfig, ["feed", "--plot", "a.svg"], "bench", positional=("what",))
    with pytest.raises(ConfigError, match="plot"):
        parse(BenchConfig, ["routing", "--plot", "a.pdf"], "bench", positional=("what",))
