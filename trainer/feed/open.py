"""Source of a run's batches: the cache, or the teacher in the loop on the cache's rows."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from distillcache.models.checkpoint import load_head
from distillcache.models.decoder import Decoder
from distillcache.models.head import OutputHead, head_of_decoder, read_head
from distillcache.schemas.config import TrainConfig
from distillcache.schemas.errors import CheckpointError
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.feed.disk_cache import open_local_cache
from distillcache.trainer.feed.online import OnlineSource
from distillcache.trainer.feed.source import Source, SplitName
from distillcache.trainer.feed.teacher import OnlineTeacher, check_teacher, open_teacher
from distillcache.trainer.step.targets import FROM_TEACHER


class Sources:
    """The sources of a run. rows: all training rows, without taps."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._kept = open_local_cache(config.feed.local_cache, config.cache) if config.source == "cache" else None
        self.rows = self._open((), None, "train")

    @cached_property
    def held_out(self) -> Source:
        """The rows for evaluation, with all recorded taps that it compares."""
        recorded = {tap.name for segment in self.rows.segments() for tap in segment.plan.taps}
        entering = self._entering
        compared = ("resid", "attn_out") if entering else ()
        taps = (*compared, *(["topk_logits"] if "topk_logits" in recorded else []))
        return self._open(taps, None, "eval", {"resid": entering} if entering else None)

    @property
    def _entering(self) -> tuple[int, ...]:
        """The slots of the stream that enter blocks whose attention is recorded: a build may choose its slots."""
        blocks = range(self.rows.plan.teacher.num_blocks)
        return tuple(at for at in blocks if self.rows.holds("resid", at) and self.rows.holds("attn_out", at))

    @cached_property
    def held_out_last(self) -> Source:
        """The rows for evaluation, with the stream that leaves the teacher's last block."""
        return self._open(("resid",), None, "eval", {"resid": (self.rows.plan.teacher.num_blocks,)})

    @property
    def held_out_rows(self) -> Source:
        """The rows for evaluation, without taps."""
        return self._open((), None, "eval")

    @cached_property
    def _teacher(self) -> OnlineTeacher:
        config, online = self._config, self._config.online
        return open_teacher(
            online.rows or config.cache,
            path=online.teacher.path if online.teacher else None,
            taps=online.taps,
            dtype=online.dtype,
            batch_rows=online.batch_rows,
            exact=online.exact,
        )

    @property
    def looping_teacher(self) -> Decoder | None:
        """The teacher in the loop; None where taps are read from a cache."""
        return self._teacher.decoder if self._config.source == "online" else None

    def find_teacher(self) -> str:
        """The path of the cache's teacher: as its plan has it, or else `student.init`, if that is the teacher.

        Raises:
            CheckpointError: its checkpoint is at neither.
        """
        plans, init = [segment.plan for segment in self.rows.segments()], self._config.student.init
        advice = "put the teacher's checkpoint back to where the cache was built from"
        path = plans[0].teacher.path
        try:
            check_teacher(path, self.rows.url, plans, advice)
        except CheckpointError:
            if init in FROM_TEACHER:
                raise
            check_teacher(init, self.rows.url, plans, advice)
            return init
        return path

    def open(
        self,
        taps: Sequence[str],
        blocks: Sequence[int] | None,
        slots: Mapping[str, Sequence[int]] | None = None,
    ) -> Source:
        """The rows to train on, with these taps of these of the teacher's blocks (None: all that are recorded).

        Args:
            slots: of these taps, the slots to read, whatever the blocks need.
        """
        return self._open(taps, blocks, "train", slots)

    def norms(self) -> np.ndarray:
        """The weights of the teacher's attention norms, float32 `[L, D]`."""
        return self.rows.attention_norms()

    def head(self) -> OutputHead:
        """The teacher's last norm and head: of the teacher in the loop, or as the cache keeps them, or from the
        teacher's checkpoint, in the dtype that it computed in.

        Raises:
            CheckpointError: the cache does not keep them, and the checkpoint is not there.
        """
        return self._head

    @cached_property
    def _head(self) -> OutputHead:
        if self._config.source == "online":
            return head_of_decoder(self._teacher.decoder)
        for segment in self.rows.segments():
            if segment.plan.keeps_head:
                return read_head(segment)
        plan = self.rows.plan
        try:
            path = self.find_teacher()
        except CheckpointError as error:
            raise CheckpointError(
                "the KL over the whole vocabulary needs the teacher's head, which the cache does not keep",
                {"cache": self.rows.url, "its teacher": plan.teacher.path, "cause": error.what},
                "put the teacher's checkpoint back, or build the cache with taps.resid.head: true",
            ) from error
        return load_head(path, plan.numerics.dtype)

    def _open(
        self,
        taps: Sequence[str],
        blocks: Sequence[int] | None,
        split: SplitName,
        slots: Mapping[str, Sequence[int]] | None = None,
    ) -> Source:
        if self._config.source == "online":
            return OnlineSource(self._teacher, taps, blocks, split, leaving=False, slots=slots)
        return CacheSource(
            self._config.cache,
            taps,
            blocks,
            split,
            leaving=False,
            partial=self._config.partial,
            kept=self._kept,
            slots=slots,
        )
