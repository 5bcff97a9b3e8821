"""Quality of a student on held-out rows: perplexity of the whole model, cosine distance of every block.

Host loops over batches of one shape (the last one is filled up with masked rows), so each jitted function compiles
once; sums travel from batch to batch, in Python's own double precision.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from pydantic import model_validator

from distillcache.models.adapters import merged
from distillcache.models.decoder import Decoder
from distillcache.models.routing import max_violation
from distillcache.schemas.base import Config
from distillcache.schemas.config.train import TrainSpec
from distillcache.schemas.errors import NonFiniteError
from distillcache.schemas.runtime.peers import ALONE, Peers
from distillcache.schemas.runtime.progress import Progress
from distillcache.trainer.feed.open import Sources
from distillcache.trainer.feed.source import Batch, Source
from distillcache.trainer.losses import (
    MaskedSum,
    blockwise_cosine_loss,
)
from distillcache.trainer.run.exact import Exact, evaluates_exactly, exact_figures
from distillcache.trainer.run.held_out import batches, held_out, teacher_divergence
from distillcache.trainer.step.modes import MODES
from distillcache.trainer.step.parameters import ROUTER_BIAS, Parameters, StackAddress, at_address, install
from distillcache.trainer.step.stack import BlockRules, Given, StudentStack, scan_blocks
from distillcache.trainer.step.targets import (
    BlockTargets,
    TapReading,
    Targets,
    block_starts,
    evaluation_targets,
    student_spans,
)


class Evaluation(Config):
    """Results of one evaluation.

    Figures are None where they are undefined: a mean of nothing is no number.

    perplexity: None where no held-out token is a target. blocks: the student's that can be compared with the cache;
    cosine: each one's mean distance, in their order. kl: from the teacher, nats a token: over the whole vocabulary
    where its head is at hand (then `agreement` is there too: the share of first choices that are the same), else
    over its recorded top k; None where there is neither, or no token is a target. max_violation: of a student with
    experts, the mean over its blocks (models/routing.py). perplexity_without_bias: where its routers have biases
    that other readers of its export will not know. teacher_perplexity: the teacher's on the same rows; None where
    it is not known, teacher_unknown says why. gap_closed: the share of the gap between the student's perplexity at
    step 0 and the teacher's that is closed.
    """

    step: int
    perplexity: float | None
    blocks: tuple[int, ...]
    cosine: tuple[float, ...]
    kl: float | None = None
    agreement: float | None = None
    max_violation: float | None = None
    perplexity_without_bias: float | None = None
    teacher_perplexity: float | None = None
    teacher_unknown: str | None = None
    gap_closed: float | None = None

    @model_validator(mode="after")
    def _same_blocks(self) -> "Evaluation":
        if len(self.blocks) != len(self.cosine):
            raise ValueError(f"{len(self.blocks)} blocks and {len(self.cosine)} distances")
        return self

    @property
    def mean_cosine(self) -> float | None:
        """The mean over the blocks; None where none is compared."""
        return sum(self.cosine) / len(self.cosine) if self.cosine else None


class Evaluator:
    """Evaluates a run's student on the cache's held-out rows."""

    def __init__(
        self, spec: TrainSpec, batch_rows: int, sources: Sources, decoder: Decoder, peers: Peers = ALONE
    ) -> None:
        self._batch_rows, self._rest_bucket = batch_rows, spec.loss.rest_bucket
        self._source, self._peers = sources.held_out, peers
        self._stack = StudentStack(decoder)
        self._alpha = None if spec.student.lora is None else spec.student.lora.alpha
        self._graph, state = nnx.split(decoder)
        self._like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        self._exact: Exact | None = None
        if not self._source:
            return
        if evaluates_exactly(spec, sources):
            self._exact = Exact.of(sources, decoder.config)
        teacher_blocks = self._source.plan.teacher.num_blocks
        spans = student_spans(decoder.config, teacher_blocks, block_starts(spec.student, teacher_blocks))
        self._blocks: tuple[int, ...] = ()
        # Where the student runs as a whole the maps of the teacher's stream are not trained: no block is judged alone.
        modes = (spec.mode, *(stage.mode for stage in spec.stages or []))
        apart = spec.student.projector == "none" or all(MODES[mode].blocks_apart for mode in modes)
        if "attn_out" in self._source.codecs and apart:
            norms = sources.norms() if spec.inject == "attn_in" else None
            self._targets, self._reading, self._blocks = evaluation_targets(decoder.config, spans, self._source, norms)
        eps = self._source.plan.teacher.norm_eps
        self._rules = BlockRules(compute_dtype=spec.compute_dtype, teacher_norm_eps=eps)

    @property
    def is_exact(self) -> bool:
        """Return whether evaluations know the teacher's own perplexity, its KL and the agreement with it."""
        return self._exact is not None

    def evaluate(self, step: int, parameters: Parameters) -> Evaluation:
        """Evaluate these parameters, all of the student's, after `step` steps. Processes share the rows.

        Raises:
            NonFiniteError: a figure is not finite.
        """
        rows, source, peers = self._batch_rows, self._source, self._peers
        whole_ones = parameters if self._alpha is None else merged(parameters, self._alpha)
        parameters = {name: jnp.asarray(value) for name, value in whole_ones.items()}
        decoder = self._with(parameters)
        exact = None if self._exact is None else exact_figures(decoder, self._exact, rows, peers)
        whole = exact.whole if exact is not None else held_out(decoder, source, rows, peers=peers)
        violation = None
        if whole.load is not None and (ran := whole.load.sum(axis=-1) > 0).any():
            violation = float(np.mean(max_violation(jnp.asarray(whole.load[ran]))))
        kl = None if exact is None else exact.kl
        if exact is None and "topk_logits" in source.codecs:
            kl = teacher_divergence(decoder, source, rows, rest_bucket=self._rest_bucket, peers=peers)
        cosine = None
        if self._blocks:
            cosine = blockwise_cosine(
                self._stack, parameters, source, self._targets, self._reading, self._rules, rows, peers
            )
        return _evaluation(
            step=step,
            perplexity=whole.perplexity,
            blocks=() if cosine is None else self._blocks,
            cosine=() if cosine is None else tuple(float(cosine[block]) for block in self._blocks),
            kl=kl,
            agreement=None if exact is None else exact.agreement,
            teacher_perplexity=None if exact is None else exact.teacher_perplexity,
            max_violation=violation,
            perplexity_without_bias=self._without_bias(decoder, parameters),
        )

    def _with(self, parameters: Parameters) -> Decoder:
        """The student with these parameters; between evaluations none of its own are kept on a device."""
        flat = nnx.to_flat_state(self._like)
        filled = [(path, value.replace(parameters["/".join(map(str, path))])) for path, value in flat]
        return nnx.merge(self._graph, nnx.from_flat_state(filled))

    def _without_bias(self, decoder: Decoder, parameters: Parameters) -> float | None:
        """The perplexity of the student as other readers of its export compute it: without biases of their own file."""
        moe = decoder.config.moe
        biases = {name: jnp.zeros_like(value) for name, value in parameters.items() if name.endswith(ROUTER_BIAS)}
        if moe is None or moe.native_bias or not any(np.asarray(parameters[name]).any() for name in biases):
            return None
        install(decoder, biases)
        title = "perplexity without router biases"
        return held_out(decoder, self._source, self._batch_rows, title, self._peers).perplexity


def _evaluation(**figures: Any) -> Evaluation:
    """The evaluation of these figures; raises `NonFiniteError` where one of them is no finite number."""
    given = {name: np.atleast_1d(np.asarray(value, np.float64)) for name, value in figures.items() if value is not None}
    bad = {name: numbers[~np.isfinite(numbers)][0] for name, numbers in given.items() if not np.isfinite(numbers).all()}
    if bad:
        raise NonFiniteError("figures on held-out rows are not finite", bad)
    return Evaluation(**figures)


def told_perplexity(value: float | None, form: str = ".2f") -> str:
    """A perplexity for people; in words where it is undefined."""
    return "undefined (no token is a target)" if value is None else format(value, form)


def gap_closed(teacher: float | None, start: float | None, now: float | None) -> float | None:
    """The share of the gap between the student's perplexity at the start and the teacher's that is gone by now.

    Below 0 it grew; above 1 the student is better than its teacher. None where there was no gap, or a perplexity is
    undefined or unknown.
    """
    if teacher is None or start is None or now is None or start <= teacher:
        return None
    return (start - now) / (start - teacher)


def blockwise_cosine(
    stack: StudentStack,
    parameters: Parameters,
    source: Source,
    targets: Targets,
    reading: TapReading,
    rules: BlockRules,
    batch_rows: int,
    peers: Peers = ALONE,
) -> np.ndarray | None:
    """The mean cosine distance of each block's attention output on the teacher's stream, float64 `[L]`; 0 where the
    targets train none. None where the rows are all padding."""
    total, weight = np.zeros(stack.config.num_blocks), 0.0
    with Progress("cosine", len(source), unit="rows", quiet=not peers.first) as bar:
        for batch, rows in batches(source, batch_rows, peers):
            sums = _block_cosines(stack, reading, rules, parameters, batch, targets)
            total, weight = total + np.asarray(sums.total, np.float64), weight + float(sums.weight)
            bar.advance(rows)
    *totals, weight = peers.sum(np.append(total, weight))
    return np.asarray(totals) / weight if weight else None


@partial(jax.jit, static_argnums=(0, 1, 2))
def _block_cosines(
    stack: StudentStack, reading: TapReading, rules: BlockRules, parameters: Parameters, batch: Batch, targets: Targets
) -> MaskedSum:
    mask, context, places = batch["segment_ids"] > 0, stack.context(batch), stack.places()

    def visit(address: StackAddress, mine: Any, kept: Any, given: Given, row: BlockTargets) -> tuple[Any, Array]:
        out = stack.run(address, kept, given, context, rules, row.norm)
        return mine, blockwise_cosine_loss(out.attn_out, given.attn_out, mask).total  # type: ignore[arg-type]

    taps = {name: batch[name] for name in reading.codecs}
    nothing, fixed = dict.fromkeys(places, ()), {address: at_address(parameters, address) for address in places}
    _, totals = scan_blocks(stack, targets, reading, taps, mask.shape, visit, nothing, fixed, needs_mlp=False)
    return MaskedSum(stack.in_block_order(totals), jnp.sum(mask, dtype=jnp.float32))
