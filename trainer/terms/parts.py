"""A term of the loss: the interface of the modules beside this one.

A term says which key of the config weighs it, which modes compute it, what it reads, how it is computed and under which
names it is logged. Steps, stages and metrics ask for nothing else, so a new term is a module and its line in
`__init__.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from distillcache.models.routing import RouterOutput
from distillcache.schemas.config.train import (
    DistanceLossConfig,
    LossConfig,
    Weight,
)
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.head_losses import HeadSums, HeadWeights
from distillcache.trainer.step.schedules import may_count

SHARES = ("relative_l2", "cosine", "l2")


class Outputs(NamedTuple):
    """The additions of a block, or of a span of the teacher's, to the stream, in the teacher's width.

    stream: the one that leaves it. None: no term reads it. router: also None where the block has no experts.
    """

    attn_out: Float[Array, "B T D"] | None
    mlp_out: Float[Array, "B T D"] | None = None
    router: RouterOutput | None = None
    stream: Float[Array, "B T D"] | None = None


class LogitRow(NamedTuple):
    """Logits of one row and their targets; all with a batch axis of 1.

    fields: tokens, segment_ids and loss_mask. recorded: the teacher's top k, where a term reads it. real_vocab: see
    losses.without_padding.
    """

    logits: Float[Array, "1 T V"]
    fields: Mapping[str, Array]
    recorded: Any = None
    real_vocab: int | None = None


class Means(NamedTuple):
    """A step's means on the host, from which metrics are made.

    of: each term's; a mean over nothing is not there. blocks: the trained ones with their weights. weights: of the
    terms, at this step. streams: the blocks whose leaving streams are compared (`loss.stream`).
    """

    of: Mapping[str, Any]
    blocks: Mapping[int, float]
    weights: Mapping[str, float]
    streams: Sequence[int] = ()

    def of_blocks(self, name: str, blocks: Iterable[int] | None = None) -> dict[str, float]:
        """`feature/block_00` and so on; blocks: default: the trained ones."""
        chosen = self.blocks if blocks is None else blocks
        return {f"{name}/block_{block:02d}": float(self.of[name][block]) for block in chosen}


class Term(Protocol):
    """A term of the loss.

    name: of its weight and of its sums. setting: the key of its weight in a config. modes: those that compute it.
    """

    name: str
    setting: str
    modes: tuple[str, ...]

    def weights(self, loss: LossConfig) -> dict[str, Weight]:
        """The term's weight, first and under its name, and its other values that change with the step."""
        ...

    def check(self, loss: LossConfig, where: str) -> None:
        """Raise `ConfigError` if its settings make no sense; `where` names the stage."""
        ...

    def total(self, means: Means) -> float | None:
        """Its contribution to the loss as a step reports it; None if undefined."""
        ...

    def metrics(self, means: Means) -> dict[str, float]:
        """Everything that a step reports about it."""
        ...


class BlockTerm(Term, Protocol):
    """A distance between what a block gives and what the teacher's span gave: one number a block.

    reads: the fields of `Outputs` that are compared, most of them taps; a gradient reaches the sublayers that made
    them. `stream`: in feature mode the blocks that `loss.stream` chose are compared, elsewhere the trained ones.
    weighs_blocks: `loss.feature.block_weights` count.
    """

    reads: tuple[str, ...]
    weighs_blocks: bool

    def distance(self, loss: LossConfig, own: Outputs, teacher: Outputs, mask: Bool[Array, "B T"]) -> Float[Array, ""]:
        """The sum over the mask's tokens; everything that it reads must be present."""
        ...


class Recorded(Protocol):
    """The facts about a cache by which a term chooses its targets; `program.Setting` has them."""

    @property
    def cache(self) -> str: ...

    @property
    def recorded(self) -> frozenset[str]: ...

    @property
    def last_stream(self) -> bool: ...

    @property
    def keeps_head(self) -> bool: ...


class LogitTerm(Term, Protocol):
    """A loss on the student's logits, which exist for one row at a time; all sums are over next tokens that count."""

    def teacher_distribution(self, loss: LossConfig, recorded: Recorded) -> Literal["head", "topk"] | None:
        """The place from which it takes the teacher's distribution; None where it needs none.

        Raises:
            ConfigError: the config asks for what the cache lacks.
        """
        ...

    def teaches_teacher(self, loss: LossConfig) -> bool:
        """Return whether it can improve even a student that equals the teacher."""
        ...

    def sums(self, loss: LossConfig, row: LogitRow, weights: Mapping[str, Array]) -> dict[str, Array]:
        """The sums of one row, by name."""
        ...

    def head_weights(self, loss: LossConfig, weights: Mapping[str, Array], targets: Array) -> HeadWeights:
        """The factors in the objective of the sums that come from the teacher's head, as of `value`."""
        ...

    def head_sums(self, found: HeadSums) -> dict[str, Array]:
        """Name the sums that come from the teacher's head, as `sums` names those of rows."""
        ...

    def value(self, sums: Mapping[str, Array], weights: Mapping[str, Array], targets: Array) -> Array:
        """The objective.

        Args:
            sums: of a batch's part. targets: those of the whole batch.
        """
        ...


def counts(term: Term, loss: LossConfig) -> bool:
    """Return whether a term's weight is ever above zero."""
    return may_count(term.weights(loss)[term.name])


def distance(
    term: BlockTerm, loss: LossConfig, own: Outputs, teacher: Outputs, mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """A term's distance; zero if something that it reads is missing."""
    if any(getattr(side, tap) is None for side in (own, teacher) for tap in term.reads):
        return jnp.zeros(())
    return term.distance(loss, own, teacher, mask)


def shares(loss: DistanceLossConfig) -> dict[str, float]:
    """The arguments of `feature_loss`."""
    return {name: getattr(loss, name) for name in SHARES}


def check_shares(loss: DistanceLossConfig, name: str, where: str) -> None:
    """Raise `ConfigError` if a mixture of distances has a weight but compares nothing."""
    if may_count(loss.weight) and not any(shares(loss).values()):
        raise ConfigError(
            "a loss has a weight but compares nothing",
            {"stage": where, name: loss.model_dump()},
            "give one of relative_l2, cosine and l2 a value above zero",
        )


def mean_over_blocks(means: Means, name: str, *, weighted: bool = False) -> float:
    """The mean over the trained blocks, optionally weighted."""
    found = means.of[name][list(means.blocks)]
    return float(np.mean(found * np.asarray(list(means.blocks.values())) if weighted else found))
