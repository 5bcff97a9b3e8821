"""The terms of the loss, one module each. A new one is registered here, and its settings lie in `LossConfig`.

parts.py      interface of a term
attention.py  outputs of attention
mlp.py        outputs of MLPs
block.py      streams that leave blocks, each by itself
stream.py     the student's own stream
tokens.py     cross-entropy and KL on next tokens
"""

from collections.abc import Callable
from dataclasses import dataclass

from distillcache.schemas.config.train import LossConfig, Weight
from distillcache.trainer.terms.attention import AttentionTerm
from distillcache.trainer.terms.block import WholeBlockTerm
from distillcache.trainer.terms.mlp import MlpTerm
from distillcache.trainer.terms.parts import BlockTerm, LogitTerm, Term, counts
from distillcache.trainer.terms.stream import StreamTerm
from distillcache.trainer.terms.tokens import TokensTerm

BLOCK_TERMS: tuple[BlockTerm, ...] = (AttentionTerm(), MlpTerm(), WholeBlockTerm(), StreamTerm())
LOGIT_TERMS: tuple[LogitTerm, ...] = (TokensTerm(),)


@dataclass(frozen=True)
class Terms:
    """Terms of the loss; those of routers are step/balance.py's."""

    blocks: tuple[BlockTerm, ...]
    logits: tuple[LogitTerm, ...]

    @classmethod
    def registered(cls) -> "Terms":
        """The terms of all modes."""
        return cls(BLOCK_TERMS, LOGIT_TERMS)

    @classmethod
    def of_mode(cls, mode: str) -> "Terms":
        """The terms that a mode computes."""
        return cls.registered()._that(lambda term: mode in term.modes)

    def counting(self, loss: LossConfig) -> "Terms":
        """The terms with a weight that is ever above zero."""
        return self._that(lambda term: counts(term, loss))

    def _that(self, chosen: Callable[[Term], bool]) -> "Terms":
        return Terms(tuple(filter(chosen, self.blocks)), tuple(filter(chosen, self.logits)))

    @property
    def all(self) -> tuple[Term, ...]:
        return (*self.blocks, *self.logits)

    def weights(self, loss: LossConfig) -> dict[str, Weight]:
        """Everything that changes with the step, by name."""
        return {name: weight for term in self.all for name, weight in term.weights(loss).items()}

    @property
    def reads(self) -> frozenset[str]:
        """The outputs of blocks (fields of `Outputs`) that are compared."""
        return frozenset(output for term in self.blocks for output in term.reads)

    def read(self, output: str) -> bool:
        """Return whether a term compares this output of blocks (a field of `Outputs`)."""
        return output in self.reads
