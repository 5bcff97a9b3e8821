"""Proofs about bits once more, in programs as XLA makes them for users: the other tests do without optimisation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROOFS = (
    "tests/schemas/codecs/test_codecs.py::test_same_bits_every_time_and_decoding_in_every_program[fp8-None]",
    "tests/schemas/codecs/test_codecs.py::test_same_bits_every_time_and_decoding_in_every_program[int4-None-rotated]",
    "tests/schemas/codecs/test_delta.py::test_encoder_and_decoder_carry_the_same_bits[8-int8]",
    "tests/trainer/feed/test_online.py::test_the_bits_are_the_cache_s[delta_cache-False]",
)


@pytest.mark.slow
def test_optimised_programs_give_the_same_bits(tmp_path: Path) -> None:
    """A process of its own, since XLA reads its flags once."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--basetemp", tmp_path / "inside", *PROOFS],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
