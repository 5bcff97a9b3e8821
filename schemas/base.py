"""Base classes of all configs and of everything on disk."""

import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

LONGEST_NAME = 255  # bytes of a file's name, on all file systems in use
# Numbers of settings. Programs hold whole numbers in 32 bits, rows in 64, and others in float32, in which a product of
# two of them is neither infinite nor 0.
MOST = 2**31 - 1
SMALLEST, GREATEST = 1e-18, 1e12
Positive = Annotated[int, Field(gt=0, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
Index = Natural  # of a block, a row or a step
Seed = Annotated[int, Field(ge=0, lt=2**63)]
RowTokens = Annotated[int, Field(gt=0, le=1 << 24)]  # the longest contexts have 10M
BatchRows = Annotated[int, Field(gt=0, le=1 << 20)]  # they are made in memory
Mebibytes = Annotated[int, Field(gt=0, le=1 << 20)]  # a tebibyte: beyond what any machine holds
Seconds = Annotated[float, Field(ge=1e-3, le=1e8)]  # three years
WholeSeconds = Annotated[int, Field(gt=0, le=10**6)]  # in milliseconds, 32 bits hold them


def not_vanishing(value: float) -> float:
    """Return a number that is 0, or large enough for float32; raise `ValueError` for others."""
    if 0 < abs(value) < SMALLEST:
        raise ValueError(f"input should be 0, or at least {SMALLEST:g}")
    return value


Rate = Annotated[float, Field(ge=SMALLEST, le=GREATEST)]
Amount = Annotated[float, Field(ge=0, le=GREATEST), AfterValidator(not_vanishing)]
Signed = Annotated[float, Field(ge=-GREATEST, le=GREATEST), AfterValidator(not_vanishing)]
Fraction = Annotated[float, Field(ge=0, le=1), AfterValidator(not_vanishing)]
Decay = Annotated[float, Field(ge=0, le=0.999999), AfterValidator(not_vanishing)]  # nearer to 1 is 1 in float32
# Numbers in files of ours: whoever reads them may multiply two of them, and none is ever so large.
LARGEST = 1 << 48
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Size = Annotated[int, Field(gt=0, le=LARGEST)]
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]  # an xxh3-128
# A name of a file or a folder, as files of ours hold them. Such files come from others: nothing in them leads outside
# the folder that they describe, so there is no `..`, no root, no other separator and nothing invisible.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
RelativeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$")]
SegmentName = Annotated[str, Field(pattern=r"^[0-9]{4,8}(-[0-9a-f]{16})?$")]


class Config(BaseModel):
    """Frozen and closed: a key that we do not know is an error.

    other_names: keys that files and flags may have beside the fields, and their types; a validator of the model
    replaces them.
    usual: the fields or sections (dotted) that `--help` explains, in this order; `--help-all` explains all of them.
    Empty: all but the section `storage`, which `--help` only names.
    """

    other_names: ClassVar[Mapping[str, Any]] = {}
    usual: ClassVar[tuple[str, ...]] = ()
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take `true` for 1, so that `steps: true` trained for one step."""
        truth = value if isinstance(value, bool) else _truth_in(value) if isinstance(value, list | tuple) else None
        if truth is not None and info.field_name and _is_numeric(cls.model_fields[info.field_name].annotation):
            raise ValueError(f"input should be a number, not {str(truth).lower()}")
        return value


def _truth_in(values: list[Any] | tuple[Any, ...]) -> bool | None:
    return next((value for value in values if isinstance(value, bool)), None)


@cache
def _is_numeric(annotation: Any) -> bool:
    """True for a type, or a list or union of types, that has numbers among its members and no bool."""
    leaves = _leaves(annotation)
    return bool not in leaves and bool({int, float} & leaves)


def _leaves(annotation: Any) -> set[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        return {type(word) for word in typing.get_args(annotation)}
    if typing.get_origin(annotation) is Annotated:
        return _leaves(typing.get_args(annotation)[0])
    inner = typing.get_args(annotation)
    return {annotation} if not inner else set[Any]().union(*map(_leaves, inner))


def is_name_inside(name: str) -> bool:
    """Return whether a file name read from another file stays inside its folder; for names that this program did
    not choose.
    """
    parts = name.split("/")
    possible = max(len(part.encode(errors="surrogatepass")) for part in parts) <= LONGEST_NAME
    return possible and not ({"", ".", ".."} & set(parts) or "\\" in name or "\0" in name)
