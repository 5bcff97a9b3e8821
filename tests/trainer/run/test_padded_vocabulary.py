"""Teacher and student that differ in rows of the vocabulary that no token has."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.models.checkpoint import read_config, save_pretrained
from distillcache.models.config import BlockKind, LayerGroup
from distillcache.models.decoder import Decoder
from distillcache.schemas.config.student import StudentConfig
from distillcache.schemas.config.train import LossConfig
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.format.manifest import TapPlan
from distillcache.trainer.losses import next_token_loss, topk_kl_loss, without_padding
from distillcache.trainer.step.targets import real_vocab
from distillcache.trainer.train import train
from tests.trainer.test_train import config

REAL = 11


def numpy_losses(logits: np.ndarray, values: np.ndarray, ids: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Cross-entropy, and KL over the recorded ids that are tokens, float64, of one row whose every token counts."""
    wide = logits[:-1, :REAL].astype(np.float64)
    log_p = wide - np.log(np.sum(np.exp(wide), axis=-1, keepdims=True))
    ce = -sum(log_p[t, tokens[t + 1]] for t in range(len(tokens) - 1))
    kl = 0.0
    for t in range(len(tokens) - 1):
        known = ids[t] < REAL
        teacher, student = np.exp(values[t, known].astype(np.float64)), np.exp(wide[t, ids[t, known]])
        p, q = teacher / teacher.sum(), student / student.sum()
        kl += np.sum(p * np.log(p / q))
    return ce, kl


@pytest.mark.parametrize("rows", [REAL, 13, 20])
def test_losses_leave_padding_out(rows: int):
    rng = np.random.default_rng(rows)
    logits, tokens = rng.normal(size=(6, rows)).astype(np.float32), rng.integers(0, REAL, 6)
    logits[:, REAL:] = 50.0  # were they not masked, nothing else would count
    ids = np.stack([rng.permutation(16)[:5] for _ in range(6)])  # of a teacher of 16 rows
    values = rng.normal(size=(6, 5)).astype(np.float32)
    ones = jnp.ones((1, 6), jnp.int32)
    row = (jnp.asarray(tokens)[None], ones, ones > 0)

    def losses(logits: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        kl = topk_kl_loss(
            logits,
            jnp.asarray(values)[None],
            jnp.asarray(ids)[None],
            jnp.full((1, 6), 9.0),
            *row,
            tau=1.0,
            rest_bucket=False,
            real_vocab=REAL,
        ).total
        ce = next_token_loss(without_padding(logits, REAL), *row).total
        return ce + kl, (ce, kl)

    (_, found), slope = jax.jit(jax.value_and_grad(losses, has_aux=True))(jnp.asarray(logits)[None])
    np.testing.assert_allclose(found, numpy_losses(logits, values, ids, tokens), rtol=1e-5)
    assert np.all(np.isfinite(slope))
    assert not np.any(np.asarray(slope)[..., REAL:])


@pytest.mark.parametrize(
    ("student", "recorded", "expected"),
    [(16, None, None), (13, None, REAL), (16, REAL, REAL), (13, REAL, REAL)],
    ids=["as many rows", "fewer rows", "a record without padding", "both"],
)
def test_padding_is_masked_where_it_is_not_recorded(student: int, recorded: int | None, expected: int | None):
    tap = TapPlan(name="topk_logits", codec="f32", k=4, vocab_size=recorded, slots=(0,), parts=())
    plan = SimpleNamespace(teacher=SimpleNamespace(vocab_size=16), rows=SimpleNamespace(vocab_size=REAL), taps=(tap,))
    source: Any = SimpleNamespace(plan=plan, segments=lambda: [SimpleNamespace(plan=plan)])
    model: Any = SimpleNamespace(vocab_size=student)
    assert real_vocab(model, source) == expected


def test_equal_vocabularies_are_not_masked():
    logits = jnp.ones((1, 2, 5))
    assert without_padding(logits, None) is logits


def test_a_student_of_more_rows_trains_on_tokens(tmp_path, cache, teacher, console):
    save_pretrained(Decoder(replace(read_config(teacher), vocab_size=320)), tmp_path / "padded")
    student = StudentConfig(init=str(tmp_path / "padded"))
    changes = {"student": student, "mode": "feature", "steps": 2, "loss": LossConfig(alpha=0.0)}
    found = [train(config(tmp_path / f"run{n}", cache, micro_batches=n, **changes)) for n in (1, 2)]
    assert (
        "the teacher's vocabulary has 263 rows, the student's 320; the tokenizer uses 257" in console.readouterr().err
    )
    assert [each.steps for each in found] == [2, 2]
    assert read_config(tmp_path / "run1" / "student").vocab_size == 320


@pytest.mark.parametrize("rows", [200, 263, 1000])
def test_a_student_of_another_depth_is_told_of_the_vocabularies_too(rows: int, tmp_path, cache, teacher):
    other = replace(read_config(teacher), vocab_size=rows, layers=(LayerGroup((BlockKind(),), 2),))
    save_pretrained(Decoder(other), tmp_path / "other")
    with pytest.raises(ConfigError, match="number of blocks") as caught:
        train(config(tmp_path / "run", cache, student=StudentConfig(init=str(tmp_path / "other"))))
    told = str(caught.value)
    assert ("263 rows, 257 of them tokens; student" in told) == (rows != 263)
    assert ("and on the vocabulary" in told) == (rows == 200)


def test_a_student_with_too_few_rows_is_refused(tmp_path, cache, teacher):
    save_pretrained(Decoder(replace(read_config(teacher), vocab_size=256)), tmp_path / "short")
    with pytest.raises(ConfigError, match="disagree on the vocabulary") as caught:
        train(config(tmp_path / "run", cache, student=StudentConfig(init=str(tmp_path / "short"))))
    assert "ids up to 256" in str(caught.value.facts["cache"])
    assert not (tmp_path / "run").exists()
