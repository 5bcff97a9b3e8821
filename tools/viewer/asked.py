"""Query parameters of a page: words and whole numbers, validated before use."""

from collections.abc import Mapping, Sequence

DIGITS = 12  # more than any row has


class NotThere(Exception):
    """No such page; the text gives the reason in a sentence."""


class NotUnderstood(Exception):
    """A request that makes no sense; the text gives the reason in a sentence."""


def whole(word: str, what: str) -> int:
    """A part of the path as a number.

    Raises:
        NotThere: it is not one.
    """
    if not (word.isascii() and word.isdigit() and len(word) <= DIGITS):
        raise NotThere(f"There is no such {what}: {what}s have numbers, from 0.")
    return int(word)


def one_of(word: str, known: Sequence[str], what: str) -> str:
    """A part of the path that must be among the known names.

    Raises:
        NotThere: it is not.
    """
    if word not in known:
        raise NotThere(f"There is no such {what}; the {what}s are {', '.join(known)}.")
    return known[known.index(word)]


def number_in(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    """A number of the query, from 0 to `most`.

    Raises:
        NotUnderstood: it is something else.
    """
    word = query.get(name, "").strip()
    if not word:
        return default
    if not (word.isascii() and word.isdigit() and len(word) <= DIGITS) or int(word) > most:
        raise NotUnderstood(f"{name} must be a whole number from 0 to {most:,}.")
    return int(word)


def choice_in(query: Mapping[str, str], name: str, known: Sequence[str], default: str) -> str:
    """A word of the query that must be among the known ones.

    Raises:
        NotUnderstood: it is not.
    """
    word = query.get(name, "") or default
    if word not in known:
        raise NotUnderstood(f"{name} must be one of {', '.join(known)}.")
    return known[known.index(word)]
