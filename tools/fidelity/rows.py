"""Checks of a row's text: impossible masks, positions and padding, and tokens that decode to other text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distillcache.models.text.cache_tokenizer import cache_tokenizer
from distillcache.models.text.tokenizer import TextTokenizer, load_tokenizer
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DistillcacheError
from distillcache.schemas.format.manifest import Plan, Stats
from distillcache.schemas.format.rows import Row
from distillcache.schemas.store.store import Store

LONGEST_RUN = 8  # of one and the same padding token at a row's end, as text would hardly have it
SHOWN_TOKENS = 24


@dataclass(frozen=True)
class Texts:
    """The tokenizer that made a cache's tokens, and the teacher's own (None: it has none there, or the same)."""

    of_cache: TextTokenizer
    of_teacher: TextTokenizer | None


def open_texts(store: Store, plan: Plan, teacher: str) -> Texts:
    """Both tokenizers.

    Raises:
        InputError: the cache's is missing.
    """
    of_cache = cache_tokenizer(store, plan)
    try:
        found = load_tokenizer(teacher)
    except DistillcacheError:  # a checkpoint without one: nothing to compare
        return Texts(of_cache, None)
    same = found.digest == plan.rows.tokenizer_digest
    return Texts(of_cache, None if same else found)


def row_faults(row: Row, padding: Sequence[int]) -> Iterator[tuple[str, str]]:
    """(kind, evidence) of impossible values in a row's masks.

    Args:
        padding: ids that fill rows up: 0, the tokenizer's padding token and its EOS.
    """
    real = row.segment_ids > 0
    counted = int(np.count_nonzero(row.loss_mask & ~real))
    if counted:
        yield "padding", f"the loss mask includes {counted} tokens that are padding"
    if not real.any():
        yield "padding", "the row is all padding: there is no token to compare"
    last = int(row.tokens[-1])
    run = len(row.tokens) - int(np.flatnonzero(np.append(-1, row.tokens) != last)[-1])
    if last in padding and run >= min(LONGEST_RUN, len(row.tokens)) and real[-run:].all():
        yield "padding", f"the last {run} tokens are all id {last}, and marked as text"
    follows = real[1:] & (row.segment_ids[1:] == row.segment_ids[:-1])
    broken = np.flatnonzero(follows & (row.positions[1:] != row.positions[:-1] + 1))
    if len(broken):
        found = row.positions[broken[0] : broken[0] + 2].tolist()
        yield "positions", f"positions do not count up inside a document: {found} at token {int(broken[0])}"


def padding_ids(tokenizer: TextTokenizer) -> set[int]:
    """Ids that usually fill rows up."""
    backend = tokenizer.backend
    names = [name for name in tokenizer.special_tokens if "pad" in name.lower()]
    return {0, tokenizer.eos_id, *(number for name in names if (number := backend.token_to_id(name)) is not None)}


def counted_padding(plan: Plan, stats: Stats) -> str:
    """Return the evidence in the statistics that padding was counted as text; empty if there is none."""
    for tap in plan.taps:
        numbers = tap.numbers_per_token(plan.teacher.hidden_size)
        found = stats.taps[tap.name].count // numbers if tap.name in stats.taps else plan.rows.tokens
        if found != plan.rows.tokens:
            return f"the statistics of {tap.name} count {counted(found, 'token')}, the rows hold {plan.rows.tokens:,}"
    return ""


def other_words(texts: Texts, row: Row) -> dict[str, Any] | None:
    """Return the row's text by either tokenizer if its tokens mean other words; otherwise None."""
    if texts.of_teacher is None:
        return None
    ids = row.tokens[row.segment_ids > 0]
    spelled = [(texts.of_cache.backend.id_to_token(int(i)), texts.of_teacher.backend.id_to_token(int(i))) for i in ids]
    same = sum(a == b for a, b in spelled) / max(len(spelled), 1)
    if same > 0.9:  # a few special tokens may have other names
        return None
    shown = ids[:SHOWN_TOKENS].tolist()
    return {
        "same_tokens": round(same, 3),
        "by_the_cache": texts.of_cache.decode(shown),
        "by_the_teacher": texts.of_teacher.decode(shown),
    }
