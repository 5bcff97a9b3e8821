"""Credentials inside URLs: they would be written into plans and messages, so they are refused, and never repeated."""

from distillcache.schemas.errors import ConfigError
from distillcache.schemas.store.redaction import has_secret, redacted

BELONGS = (
    "leave them out of the URL: s3:// takes AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY from the "
    "environment; gs:// takes GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default login`"
)


def refuse_secret(text: str, where: str) -> None:
    """Raise `ConfigError` where a URL carries credentials.

    Args:
        where: the field or flag that holds it.
    """
    if has_secret(text):
        raise ConfigError(
            "a URL contains credentials, which would be stored and printed", {where: redacted(text)}, BELONGS
        )


def refuse_secrets(value: object, where: str = "") -> None:
    """`refuse_secret` for every text in nested mappings and lists, by its dotted name."""
    if isinstance(value, str):
        refuse_secret(value, where or "value")
    elif isinstance(value, dict):
        for key, inner in value.items():
            refuse_secrets(inner, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_secrets(inner, where)
