"""The words in which a finished run is summed up."""

import pytest

from distillcache.trainer.__main__ import _lines
from distillcache.trainer.train import TrainResult


@pytest.mark.parametrize(("steps", "words"), [(1, "1 step, "), (1_200, "1,200 steps, ")])
def test_a_speed_says_what_it_counts(steps: int, words: str) -> None:
    """The progress line of a step, and the time of the whole run, gave others without a word."""
    result = TrainResult("runs/a", steps, 0, {"distill/total_loss": 0.5}, 17_441.2, None, None)
    first = _lines(result)[0]
    assert f"run runs/a: {words}" in first
    assert first.endswith("17,441 tokens/s in the median step, not counting evaluations and checkpoints")
