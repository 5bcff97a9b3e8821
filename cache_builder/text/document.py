"""A document: text or tokens, and where it was found."""

from dataclasses import dataclass

from jaxtyping import Bool, Int32
from numpy import ndarray

from distillcache.cache_builder.text.skipped import Skipped


@dataclass(frozen=True)
class Document:
    """A text, its origin for messages, and the number of input bytes read so far.

    spans: of a chat, the characters `(start, end)` whose tokens are targets; None: a plain text, all of it.
    """

    text: str
    where: str
    read_bytes: int = 0
    spans: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """Tokens that were made elsewhere, and which of them are targets. They are taken as they are: no BOS, no EOS."""

    tokens: Int32[ndarray, " n"]
    counted: Bool[ndarray, " n"]
    where: str
    read_bytes: int = 0


FoundDocument = Document | TokenDocument | Skipped
