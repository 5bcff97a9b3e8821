"""A new term of the loss is a module and its line in the registry: it is trained, weighed, checked and logged."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.schemas.config.train import FeatureLossConfig, LossConfig
from distillcache.trainer import terms
from distillcache.trainer.losses import blockwise_l2_loss
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.step.parameters import at_address
from distillcache.trainer.step.stack import BlockRules, StudentStack
from distillcache.trainer.terms.parts import LogitRow, Means, Outputs, mean_over_blocks
from distillcache.trainer.train import train
from tests.trainer.conftest import EVEN, blockwise, parameters_of, random_batch
from tests.trainer.test_train import config

NOTHING = LossConfig(feature=FeatureLossConfig(weight=0.0), token_weight=0.0)


class WholeBlock:
    """The whole addition of a block, against the teacher's."""

    name = "whole"
    setting = "loss.whole.weight"
    modes = ("blockwise",)
    reads = ("attn_out", "mlp_out")
    weighs_blocks = False
    checked: ClassVar[list[str]] = []

    def weights(self, loss: LossConfig) -> dict[str, Any]:
        return {"whole": 0.5}

    def check(self, loss: LossConfig, where: str) -> None:
        self.checked.append(where)

    def distance(self, loss: LossConfig, own: Outputs, teacher: Outputs, mask: jax.Array) -> jax.Array:
        return blockwise_l2_loss(own.attn_out + own.mlp_out, teacher.attn_out + teacher.mlp_out, mask).total

    def total(self, means: Means) -> float:
        return means.weights["whole"] * mean_over_blocks(means, "whole")

    def metrics(self, means: Means) -> dict[str, float]:
        return {"distill/whole_loss": self.total(means), **means.of_blocks("whole")}


class LogitSize:
    """The mean square of the logits."""

    name = "size"
    setting = "loss.size"
    modes = ("feature",)

    def weights(self, loss: LossConfig) -> dict[str, Any]:
        return {"size": 2.0}

    def check(self, loss: LossConfig, where: str) -> None:
        return

    def teacher_distribution(self, loss: LossConfig, recorded: Any) -> None:
        return None

    def teaches_teacher(self, loss: LossConfig) -> bool:
        return True

    def sums(self, loss: LossConfig, row: LogitRow, weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        return {"size": jnp.sum(jnp.mean(jnp.square(row.logits), axis=-1))}

    def value(self, sums: Mapping, weights: Mapping, targets: jax.Array) -> jax.Array:
        return weights["size"] * sums["size"] / targets

    def total(self, means: Means) -> float:
        return means.weights["size"] * means.of["size"]

    def metrics(self, means: Means) -> dict[str, float]:
        return {"distill/size_loss": self.total(means)}


def test_a_new_term_of_blocks_has_the_gradient_of_its_formula(student, monkeypatch):
    monkeypatch.setattr(terms, "BLOCK_TERMS", (*terms.BLOCK_TERMS, WholeBlock()))
    batch = random_batch(EVEN, codec="f32")
    step, targets = blockwise(student, NOTHING, codec="f32", rules=BlockRules(runs_mlp=True))
    trained, frozen = parameters_of(student, "attention", "mlp")
    gradients, sums, _ = jax.jit(lambda t: step.gradients(t, frozen, batch, targets, jnp.int32(0)))(trained)
    stack, mask = StudentStack(student), batch["segment_ids"] > 0
    resid, attn_out = (jnp.asarray(batch[tap]["codes"]) for tap in ("resid", "attn_out"))
    context = stack.context(batch)

    def by_hand(parameters: dict) -> jax.Array:
        total = jnp.zeros(())
        for block in range(4):
            own = {name: value[block] for name, value in at_address(parameters, (0, 0)).items()}
            given = type("Given", (), {"resid": resid[block], "attn_out": attn_out[block]})
            out = stack.run((0, 0), own, given, context, BlockRules(runs_mlp=True))  # type: ignore[arg-type]
            off = out.attn_out + out.mlp_out - (resid[block + 1] - resid[block])
            total += 0.5 * jnp.sum(jnp.where(mask, jnp.mean(jnp.square(off), -1), 0.0)) / jnp.sum(mask)
        return total

    expected = jax.jit(jax.grad(by_hand))(trained)
    for name in trained:
        np.testing.assert_allclose(gradients[name], expected[name], rtol=2e-4, atol=2e-6, err_msg=name)
    assert set(sums[0, 0].terms) == {"feature", "mlp", "block", "whole"}


def test_a_run_trains_with_a_new_term_and_logs_it(tmp_path, cache, monkeypatch):
    """It alone has a weight, and the MLPs that it reads are trained."""
    term = WholeBlock()
    monkeypatch.setattr(terms, "BLOCK_TERMS", (*terms.BLOCK_TERMS, term))
    train(config(tmp_path / "run", cache, loss=NOTHING, steps=2, eval_batch_rows=3))
    lines = [line for line in read_metrics(tmp_path / "run") if line["step"]]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        of_blocks = [line[f"whole/block_{block:02d}"] for block in range(3)]
        assert min(of_blocks) > 0
        assert line["distill/total_loss"] == line["distill/whole_loss"] == pytest.approx(0.5 * np.mean(of_blocks))
    assert term.checked == ["stage 0, mode blockwise"]


@pytest.mark.slow
def test_a_new_term_on_logits(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(terms, "LOGIT_TERMS", (*terms.LOGIT_TERMS, LogitSize()))
    train(config(tmp_path / "run", cache, mode="feature", steps=1))
    line = read_metrics(tmp_path / "run")[-1]
    assert line["distill/size_loss"] > 0
    assert line["distill/total_loss"] == pytest.approx(
        line["distill/hard_loss"] + line["distill/size_loss"] + line["distill/out_proj_feature_loss"]
    )
