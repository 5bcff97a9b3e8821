"""JSON on disk: one model has exactly one spelling, and the spelling carries its own digest.

Keys are sorted and there is no white space, so equal models are equal bytes. The last key, `digest`, covers all
that stands before it. A reader accepts these bytes and no others: any flipped, lost or added byte is damage.
"""

import json
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.store.store import Store

ModelType = TypeVar("ModelType", bound=BaseModel)
Value = TypeVar("Value")

AGAIN = "copy it again from its source, or write it again"


def to_canonical(model: BaseModel) -> bytes:
    """The model's only spelling. The model has no field of its own named `digest`; NaN and infinity raise."""
    body = json.dumps(
        model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()
    return _with_digest(body)


def from_canonical(model_type: type[ModelType], data: bytes, where: str, next: str = AGAIN) -> ModelType:
    """The model that `to_canonical` wrote.

    Args:
        model_type: what the bytes should hold.
        data: the whole object.
        where: how messages name the object.
        next: what to do about damage.

    Raises:
        DamageError: the bytes are not what `to_canonical` writes, or belong to another version's model.
    """
    head, _, tail = data.rpartition(b',"digest":"')
    body = head + b"}"
    expected = digest_bytes(body)
    if _with_digest(body) != data:
        raise DamageError(
            "a JSON object is not what was committed",
            {
                "file": where,
                "found": f"{len(data):,} bytes, digest {tail[:32].decode(errors='replace') if head else 'absent'}",
                "expected": f"digest {expected}" if head else "a JSON object that ends in its digest",
            },
            next,
        )
    try:
        model = model_type.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(key) for key in first["loc"]) or "the whole object"
        raise DamageError(
            "a JSON object does not have the fields that this version writes",
            {"file": where, "field": place, "found": first["msg"]},
            "read it with the version that wrote it, or write it again",
        ) from error
    if not _is_spelled(model, data):
        raise DamageError(
            "a JSON object is not in canonical form",
            {"file": where, "expected": "sorted keys, no white space, every field present"},
            "do not edit it by hand: write it again",
        )
    return model


def _is_spelled(model: BaseModel, data: bytes) -> bool:
    """Return whether these bytes are the model's canonical form; a value that JSON cannot express has none."""
    try:
        return to_canonical(model) == data
    except ValueError:  # infinity, from a number such as 1e999; half a surrogate pair
        return False


def read_canonical(store: Store, key: str, model_type: type[ModelType], next: str = AGAIN) -> ModelType | None:
    """The model in a JSON object of a store; None where there is no such key.

    Raises:
        DamageError: as `from_canonical`, of what is stored, not of an answer that came short.
    """
    return store.read_checked(key, lambda data: from_canonical(model_type, data, store.where(key), next))


def from_plain(kind: TypeAdapter[Value], data: bytes, where: str, step: str) -> Value:
    """The value in JSON that has no digest, since people may read and write it.

    Args:
        kind: what the bytes should hold.
        where: how messages name the object.
        step: what to do where they hold something else.

    Raises:
        DamageError: the bytes are something else.
    """
    try:
        return kind.validate_python(json.loads(data.decode()))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(key) for key in first["loc"]) or "the whole file"
        found: dict[str, object] = {"field": place, "found": first["msg"]}
        cause: Exception = error
    except (ValueError, RecursionError) as error:
        found, cause = {"found": f"{counted(len(data), 'byte')} that are not JSON", "cause": error}, error
    raise DamageError("a JSON file does not have the expected content", {"object": where, **found}, step) from cause


def _with_digest(body: bytes) -> bytes:
    return body[:-1] + b',"digest":"' + digest_bytes(body).encode() + b'"}'
