"""What all configs and everything on disk are made of."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
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
    Empty: so does `--help`.
    """

    other_names: ClassVar[Mapping[str, Any]] = {}
    usual: ClassVar[tuple[str, ...]] = ()
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def is_name_inside(name: str) -> bool:
    """Whether a file's name out of another's file stays in its folder; for names that are not ours to choose."""
    parts = name.split("/")
    return not ({"", ".", ".."} & set(parts) or "\\" in name or "\0" in name)
