"""Templates that take too much end within limits, and this process keeps its memory."""

import subprocess
import sys
import textwrap
from datetime import date
from pathlib import Path

import pytest

import distillcache
from distillcache.models.text import template_worker
from distillcache.models.text.chat_template import ChatTemplate, TemplateFailure, TemplateLimit
from distillcache.schemas.errors import InputError

USER = [{"role": "user", "content": "x"}]

# Each took gigabytes or for ever.
MEMORY = {
    "multiplied": "{{ ('x' * 10**11) | length }}",
    "centred": "{{ 'x' | center(10**12) }}",
    "a constant": "{{ 'x' * 100000000000 }}",
    "joined": "{{ ('y' * 100000).join(['a'] * 100000) }}",
    "replaced": "{{ ('x' * 1000000) | replace('x', 'y' * 10000) }}",
    "a list": "{{ ([1] * 10**9) | length }}",
    "filled": "{{ [1] | batch(10**9, 'x') | list | length }}",
    "doubled": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "as bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "a format's width": "{{ '%10000000000d' % 1 }}",
    "a field's width": "{{ '{:10000000000d}'.format(1) }}",
    "indented": "{{ [[1]] | tojson(indent=10**10) }}",
}
TIME = {
    "nested loops": "{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3,
    "a power": "{{ 2 ** (2 ** 30) % 7 }}",
}
TEXT = {"many pieces": "{% for i in range(9999) %}{% for j in range(9999) %}" + "x" * 99 + "{% endfor %}{% endfor %}"}


@pytest.mark.parametrize("name", [*MEMORY, *TIME, *TEXT])
def test_a_template_that_takes_too_much_is_ended(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_worker, "CPU_S", 0)  # the kernel counts from the next whole second
    monkeypatch.setattr(template_worker, "MEMORY_BYTES", 1 << 28)
    monkeypatch.setattr(template_worker, "CHARACTERS", 1 << 20)
    with pytest.raises(TemplateLimit, match="takes more than a chat may"):
        ChatTemplate({**MEMORY, **TIME, **TEXT}[name]).render(USER)
    monkeypatch.undo()
    assert ChatTemplate("{{ messages[0].content }}").render(USER) == ("x", [])  # the next chat is written


@pytest.mark.parametrize("template", ["{{ lipsum() }}", "{{ [1, 2] | random }}"])
def test_chance_is_refused(template: str) -> None:
    with pytest.raises(TemplateLimit, match="random"):
        ChatTemplate(template).render(USER)


def test_recursion_is_the_templates_failure() -> None:
    with pytest.raises(TemplateFailure, match="RecursionError"):
        ChatTemplate("{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}").render(USER)


@pytest.mark.parametrize(
    "template",
    [
        "{% if 1 %}" * 500 + "{% endif %}" * 500,
        "{{" + "(" * 500 + "1" + ")" * 500 + "}}",
        "{{ " + "-" * 5000 + "1 }}",
        "{% for i in [1] %}" * 500 + "{% endfor %}" * 500,
        "{{ 10**5000 }}",
    ],
)
def test_a_template_that_cannot_be_compiled_is_named(template: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        ChatTemplate(template).render(USER)


def test_what_json_lacks_is_shown_as_its_type() -> None:
    messages = [{"role": "user", "content": date(2025, 1, 31), "more": b"x"}]
    assert ChatTemplate("{{ messages[0].content }}{{ messages[0].more }}").render(messages)[0] == "<date><bytes>"


def test_the_other_process_imports_nothing_of_the_working_folder(tmp_path: Path) -> None:
    for name in ("jinja2", "json", "resource", "runpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit(4)\n")
    root = Path(distillcache.__file__).parent.parent
    program = f"""
        import sys
        sys.path[:] = [{str(root)!r}] + [p for p in sys.path if p not in ('', {str(tmp_path)!r})]
        from distillcache.models.text.chat_template import ChatTemplate
        print(ChatTemplate("{{{{ messages[0].content }}}}").render([{{"role": "user", "content": "fine"}}])[0])
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(program)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "fine\n"


def test_beginnings_of_a_chat_by_one_request() -> None:
    """What `render` gives for each; None where it raises."""
    template = ChatTemplate(
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}[{{ m.content }}]"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}{{ tools }}"
    )
    chat = [{"role": "user", "content": text} for text in ("a", "b", "no")]
    prefixes = [(0, True), (1, False), (1, True), (3, False), (2, True)]
    found = template.render_prefixes(chat, prefixes, tools=[{"name": "f"}])
    assert found[3] is None
    for (count, prompted), text in zip(prefixes, found, strict=True):
        if count < 3:
            assert text == template.render(chat[:count], tools=[{"name": "f"}], add_generation_prompt=prompted)[0]


def test_beginnings_that_take_too_much_together_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_worker, "CPU_S", 1)
    template = ChatTemplate("{% for i in range(99999999) %}{{ i }}{% endfor %}")
    assert template.render_prefixes([], [(0, True), (0, False)]) == [None, None]
