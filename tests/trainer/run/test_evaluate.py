"""Figures of held-out rows, and where there are none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from distillcache.models.checkpoint import load_pretrained
from distillcache.schemas.config import TrainConfig
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.run import held_out as held_out_rows
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.run.held_out import held_out
from distillcache.trainer.run.stages import evaluation_interval
from distillcache.trainer.train import train


def test_a_perplexity_without_targets_is_no_number(cache: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of chats in which the assistant never answers: the mean of nothing was 0, and its perplexity 1."""
    source, decoder = CacheSource(str(cache), taps=[], split="eval"), load_pretrained(teacher)
    assert (held_out(decoder, source, 4).perplexity or 0) > 1
    real = held_out_rows.batches

    def without_targets(*args: Any) -> Iterator[tuple[dict[str, Any], int]]:
        for batch, rows in real(*args):
            yield {**batch, "loss_mask": jnp.zeros_like(batch["loss_mask"])}, rows

    monkeypatch.setattr(held_out_rows, "batches", without_targets)
    assert held_out(decoder, source, 4).perplexity is None


@pytest.mark.parametrize(("asked", "steps", "found"), [(None, 1000, 100), (None, 60, 10), (0, 1000, 0), (7, 1000, 7)])
def test_a_run_is_evaluated_about_ten_times(asked: int | None, steps: int, found: int) -> None:
    assert evaluation_interval(asked, steps) == found


def test_evaluations_by_default(cache: Path, tmp_path: Path) -> None:
    cut = {"surgery": [{"op": "drop_blocks", "blocks": [1]}]}
    values = {"run": str(tmp_path / "run"), "cache": str(cache), "student": cut, "steps": 12, "batch_rows": 2}
    train(TrainConfig.model_validate(values))
    assert [each.step for each in read_evaluations(values["run"])] == [0, 10, 12]
