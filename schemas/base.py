"""What all configs and everything on disk are made of."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]


class Config(BaseModel):
    """Frozen and closed: a key that we do not know is an error.

    other_names: keys that files and flags may have beside the fields, and their types; a validator of the model
    replaces them.
    """

    other_names: ClassVar[Mapping[str, Any]] = {}
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
