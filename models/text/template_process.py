"""A process that renders chat templates under limits of time and memory: the program of `template_worker.py`.

A template is a stranger's program. No list of dangerous filters is ever complete (`center`, `indent`, string formats,
nested loops, recursion), so the kernel holds the limits: processor time per request, and address space.

Requests and replies are lines of JSON, so this file imports nothing but Jinja and the standard library.
"""

import json
import re
import resource
import signal
import sys
from contextlib import suppress
from datetime import date
from functools import lru_cache
from typing import Any

# Noncharacters, which no text holds: they stand where a `{% generation %}` block begins and ends until the text is
# whole. Unlike positions taken while it is written, they stay right inside macros and captured blocks.
BEGIN, END = "\ufdd0", "\ufdd1"


class TemplateStop(Exception):
    """A render that ends early.

    kind: `date`: it asks for the day, and none is given; `chance`: it asks for random values; `size`: its text is too
    long.
    """

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(message)
        self.kind = kind


def serve() -> None:
    """Answer requests until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        try:
            text = json.dumps(_limited(line))
        except MemoryError:
            text = '{"error": "memory"}'
        except RecursionError:
            text = '{"error": "failure", "message": "the chat is nested too deep"}'
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _limited(line: bytes) -> dict[str, Any]:
    """The reply to a line, within the limits that it names."""
    request = json.loads(line)
    _limit(resource.RLIMIT_CPU, int(_cpu_seconds()) + 1 + request["cpu_s"])
    with suppress(ValueError, OSError):  # macOS has no such limit; the one of time holds there too
        _limit(resource.RLIMIT_AS, request["memory_bytes"])
    return answer(request)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request: `{"marks", "text"}`, or `{"error", "message"}` with the kind of error.

    Of a request with `prefixes`, pairs of (number of messages, whether the generation prompt follows): `{"texts"}`, one
    each, null where the template fails.
    """
    try:
        template, marks = compiled(request["source"])
    except MemoryError:
        raise
    except Exception as error:  # the parser and its optimizer run a stranger's constants
        line = getattr(error, "lineno", None)
        return {"error": "syntax", "message": _described(error), "line": line}
    if request.get("values") is None:
        return {"marks": marks}
    if request.get("prefixes") is None:
        return {"marks": marks, **_written(template, request)}
    messages, texts = request["values"]["messages"], []
    for count, prompted in request["prefixes"]:
        values = {**request["values"], "messages": messages[:count], "add_generation_prompt": prompted}
        texts.append(_written(template, {**request, "values": values}).get("text"))
    return {"texts": texts}


def _written(template: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The text of a request's values, or the kind of error."""
    try:
        return {"text": _rendered(template, request)}
    except MemoryError:
        raise
    except TemplateStop as stop:
        return {"error": stop.kind, "message": str(stop)}
    except Exception as error:  # a stranger's program may raise anything
        return {"error": "failure", "message": _described(error)}


def _rendered(template: Any, request: dict[str, Any]) -> str:
    today = request["today"]

    def strftime_now(format: str) -> str:
        if today is None:
            raise TemplateStop("date")
        return date.fromisoformat(today).strftime(format)

    chunks, length = [], 0
    for chunk in template.generate(**request["values"], strftime_now=strftime_now):
        length += len(chunk)
        if length > request["characters"]:
            raise TemplateStop("size", f"more than {request['characters']:,} characters")
        chunks.append(chunk)
    return "".join(chunks)


@lru_cache(maxsize=8)
def compiled(source: str) -> tuple[Any, bool]:
    """The template with the settings, extensions and functions that transformers has, and whether it marks turns."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    seen: list[int] = []

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}`: the text between, in marks."""

        tags = {"generation"}  # noqa: RUF012  (Jinja's own form)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            seen.append(line)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters |= {"tojson": _tojson, "random": _refuse_chance}
    environment.globals |= {"raise_exception": _raise_exception, "lipsum": _refuse_chance}
    return environment.from_string(source), bool(seen)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter writes `<` as an escape, for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse_chance(*_: Any, **__: Any) -> str:
    raise TemplateStop("chance")


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _described(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error))
    return f"{type(error).__name__}: {text[:500]}"


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    serve()
