"""A student against its teacher's whole distribution on held-out rows: perplexities, KL and agreement in one pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.schemas.config.train import TrainSpec
from distillcache.schemas.format.manifest import TOPK_LOGITS
from distillcache.schemas.runtime.peers import ALONE, Peers
from distillcache.schemas.runtime.progress import Progress
from distillcache.trainer.feed.open import Sources
from distillcache.trainer.feed.source import Source
from distillcache.trainer.head_losses import Divergence, HeadLosses, HeadSums, HeadWeights
from distillcache.trainer.losses import perplexity_of
from distillcache.trainer.run.held_out import ROW_FIELDS, HeldOut, batches, run_stream
from distillcache.trainer.step.heads import head_losses, student_side, teacher_arrays, teacher_end, teacher_side
from distillcache.trainer.step.schedules import may_count
from distillcache.trainer.step.targets import TapReading, real_vocab
from distillcache.trainer.terms.tokens import chosen_targets


def evaluates_exactly(spec: TrainSpec, sources: Sources) -> bool:
    """Return whether evaluations take the teacher's logits from its last stream and head.

    They do where a KL is computed so, where `loss.kl.targets: head` asks for it, and where the cache keeps the head:
    the config and the cache decide, not whether the teacher's checkpoint happens to be there.
    """
    rows = sources.rows
    if not rows.holds("resid", rows.plan.teacher.num_blocks):
        return False
    has_topk = any(tap.name == TOPK_LOGITS for segment in rows.segments() for tap in segment.plan.taps)
    losses = [spec.loss, *(stage.loss for stage in spec.stages or [] if stage.loss)]
    asking = (loss.kl for loss in losses if loss.kl.targets == "head" or may_count(loss.alpha))
    return rows.keeps_head or any(chosen_targets(kl, has_topk=has_topk, keeps_head=False) == "head" for kl in asking)


@dataclass(frozen=True, eq=False)
class Exact:
    """Held-out rows with the teacher's last stream, and its head on a device."""

    source: Source
    reading: TapReading
    arrays: Mapping[str, Array]
    losses: HeadLosses

    @classmethod
    def of(cls, sources: Sources, student: ModelConfig) -> "Exact":
        """Open them.

        Raises:
            CheckpointError: the cache does not keep the head, and the teacher's checkpoint is not there.
        """
        source, head = sources.held_out_last, sources.head()
        teacher = source.plan.teacher
        end = teacher_end(head, source.reads["resid"].at[teacher.num_blocks])
        reading = TapReading({"resid": source.codecs["resid"]}, teacher.hidden_size, in_step=False, end=end)
        arrays = {name: jnp.asarray(value) for name, value in teacher_arrays(head).items()}
        return cls(source, reading, arrays, head_losses(Divergence(), reading, student, real_vocab(student, source)))


class ExactFigures(NamedTuple):
    """Figures over the whole vocabulary; None where no token is a target.

    teacher_perplexity: as its recorded last stream gives it, so with the codec's error.
    """

    whole: HeldOut
    teacher_perplexity: float | None
    kl: float | None
    agreement: float | None


def exact_figures(decoder: Decoder, exact: Exact, batch_rows: int, peers: Peers = ALONE) -> ExactFigures:
    """Evaluate a student against its teacher's logits, in one pass over the rows."""
    graph, parameters = nnx.split(decoder)
    model, total = decoder.config, np.zeros(len(HeadSums._fields))
    load = np.zeros((len(model.moe_blocks), model.moe.num_experts)) if model.moe is not None else None
    static = (graph, exact.losses, exact.reading)
    with Progress("student's perplexity and KL", len(exact.source), unit="rows", quiet=not peers.first) as bar:
        for batch, rows in batches(exact.source, batch_rows, peers):
            fields = (batch[name] for name in ROW_FIELDS)
            sums, loads = _exact_sums(*static, parameters, exact.arrays, batch["resid"], *fields)
            total = total + np.asarray(sums, np.float64)
            if load is not None:
                load = load + np.asarray(loads, np.float64)
            bar.advance(rows)
    sums, load = HeadSums(*peers.sum(total)), None if load is None else peers.sum(load)
    if not sums.targets:
        return ExactFigures(HeldOut(None, load), None, None, None)
    student, teacher = (
        perplexity_of(float(s / sums.targets)) for s in (sums.cross_entropy, sums.teacher_cross_entropy)
    )
    return ExactFigures(
        HeldOut(student, load), teacher, float(sums.kl / sums.targets), float(sums.agreement / sums.targets)
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _exact_sums(
    graph: Any,
    losses: HeadLosses,
    reading: TapReading,
    parameters: Any,
    teacher: Mapping[str, Array],
    resid: Mapping[str, Array],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
) -> tuple[HeadSums, Array | None]:
    """The sums of a batch, and the load of every expert, `[Lm, E]`."""
    decoder = nnx.merge(graph, parameters)
    stream, load = run_stream(decoder, tokens, positions, segment_ids)
    side = teacher_side(reading, teacher, {"resid": resid}, (tokens.shape[0], tokens.shape[1]))
    none = HeadWeights(0.0, 0.0, 1.0)
    return losses(student_side(decoder, stream), side, none, tokens, segment_ids, loss_mask)[1], load
