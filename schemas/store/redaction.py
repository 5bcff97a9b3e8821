"""Credentials in URLs: recognised, so that they are refused, and made unreadable in plans and configs of earlier
versions."""

import re
from typing import TypeVar, cast

Value = TypeVar("Value")

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"]+")
_QUERY = re.compile(
    r"(?i)([?&;](?:x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|awsaccesskeyid"
    r"|googleaccessid|signature|sig|se?cret|[a-z_-]*(?:token|key|secret|password))=)[^&#;\s]*"
)


def has_secret(text: str) -> bool:
    """Return whether a URL in the text carries a user name, a password or a signature."""
    return redacted(text) != text


def redacted(text: str) -> str:
    """The text with *** in place of every credential in a URL."""
    return _URL.sub(lambda match: _redacted_url(match[0]), text) if "://" in text else text


def shown(value: Value) -> Value:
    """The same nested mappings and lists with every text `redacted`: what is shown of a stored plan or config."""
    if isinstance(value, str):
        return cast(Value, redacted(value))
    if isinstance(value, dict):
        return cast(Value, {key: shown(inner) for key, inner in value.items()})
    if isinstance(value, list | tuple):
        return cast(Value, type(value)(map(shown, value)))
    return value


def _redacted_url(url: str) -> str:
    scheme, _, rest = url.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    port = authority.rpartition(":")[2]
    # A secret may hold a slash; then what stands before it is no host with a port.
    if "@" in authority:
        rest = f"***@{authority.rpartition('@')[2]}{rest[len(authority) :]}"
    elif ":" in authority and not port.isdigit() and "]" not in port and "@" in rest:
        rest = f"***@{rest.rpartition('@')[2]}"
    rest = _QUERY.sub(r"\g<1>***", rest) if "?" in rest else rest
    return f"{scheme}://{rest}"
