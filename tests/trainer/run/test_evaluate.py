"""Figures of held-out rows, and where there are none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from distillcache.models.checkpoint import load_pretrained
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.run import evaluate
from distillcache.trainer.run.evaluate import held_out_perplexity


def test_a_perplexity_without_targets_is_no_number(cache: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of chats in which the assistant never answers: the mean of nothing was 0, and its perplexity 1."""
    source, decoder = CacheSource(str(cache), taps=[], split="eval"), load_pretrained(teacher)
    assert (held_out_perplexity(decoder, source, 4) or 0) > 1
    real = evaluate._batches

    def without_targets(*args: Any) -> Iterator[tuple[dict[str, Any], int]]:
        for batch, rows in real(*args):
            yield {**batch, "loss_mask": jnp.zeros_like(batch["loss_mask"])}, rows

    monkeypatch.setattr(evaluate, "_batches", without_targets)
    assert held_out_perplexity(decoder, source, 4) is None
