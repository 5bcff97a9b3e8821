"""Figures of held-out rows, and where there are none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from distillcache.models.checkpoint import load_pretrained
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.run import held_out as held_out_rows
from distillcache.trainer.run.held_out import held_out


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
