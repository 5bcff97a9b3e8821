"""The bench of losses on tokens: every run of it, on a tiny teacher; its figures and its picture."""

from pathlib import Path

import pytest

from distillcache.tools.bench.students.kl import LOSSES, KlSizes, summarise, train_all, write_plot
from distillcache.trainer.run.evaluate import Evaluation

SIZES = KlSizes(
    row_tokens=32, rows=24, eval_rows=4, batch_rows=4, blockwise_steps=2, steps=2, eval_every=2, dropped=(1,)
)


def evaluation(step: int, kl: float) -> Evaluation:
    return Evaluation(
        step=step, perplexity=10 * kl, blocks=(), cosine=(), kl=kl, agreement=1 - kl, teacher_perplexity=2.0
    )


def runs(*kls: float) -> list[list[Evaluation]]:
    return [[evaluation(0, 0.9), evaluation(5, kl)] for kl in kls]


def test_figures_are_over_the_seeds(tmp_path: Path) -> None:
    found = {"ce": runs(0.6, 0.8), "topk": runs(0.4, 0.5), "head": runs(0.2, 0.4)}
    measured = summarise(found)
    assert measured.figures["head_kl"] == pytest.approx(0.3)
    assert (measured.figures["topk_kl_low"], measured.figures["topk_kl_high"]) == (0.4, 0.5)
    assert measured.figures["ce_perplexity"] == pytest.approx(7.0)
    assert (measured.figures["teacher_perplexity"], measured.figures["cut_perplexity"]) == (2.0, 9.0)
    (goal,) = measured.goals
    assert (goal.value, goal.met) == (pytest.approx((0.2 / 0.4 + 0.4 / 0.5) / 2), True)
    write_plot(found, tmp_path / "kl.svg")
    drawn = (tmp_path / "kl.svg").read_text()
    assert drawn.startswith("<?xml")
    assert "distillcache" in drawn
    write_plot(found, tmp_path / "again" / "kl.svg")
    assert (tmp_path / "again" / "kl.svg").read_text() == drawn


@pytest.mark.slow
def test_every_loss_trains_the_same_student(tmp_path: Path, teacher: Path) -> None:
    found = train_all(tmp_path, str(teacher), SIZES, seeds=1)
    assert found.keys() == LOSSES.keys()
    ((ce,), (topk,), (head,)) = found.values()
    assert [entry.step for entry in head] == [0, 2, 4]
    for other in (ce, topk):  # one start, and one blockwise stage, for all
        assert other[:2] == head[:2]
        assert other[2].perplexity != head[2].perplexity
    assert all(entry.kl is not None and entry.teacher_perplexity is not None for entry in head)
