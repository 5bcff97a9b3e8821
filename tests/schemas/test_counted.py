"""Numbers of things in words: one has no `s`, wherever it is said."""

import re
from pathlib import Path

import pytest

from distillcache.schemas.counted import counted

ROOT = Path(__file__).parents[2]
# f-strings that say a number before such a word use `counted`.
SAID = re.compile(r"""f["'].*\{(len|sum|count)[^{}]*\} (rows|shards|documents|records|files|segments|slots|steps)\b""")


@pytest.mark.parametrize(("number", "words"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1_200, "1,200 rows")])
def test_one_thing_has_no_s(number: int, words: str) -> None:
    assert counted(number, "row") == words


def test_nothing_counts_on_its_own() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("schemas", "models", "cache_builder", "trainer", "tools")
        for path in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if SAID.search(line)
    ]
    assert found == []
