"""YAML that README and docs print is what the commands take: each block is one whole config."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from distillcache.schemas.command_line import validate
from distillcache.schemas.config import BuildConfig
from distillcache.schemas.config.train import TrainConfig
from distillcache.schemas.config.yaml_text import parse_yaml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks() -> list[tuple[str, str]]:
    """Page and line, and text, of every YAML block."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer("^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            found.append((f"{page.name}:{text[: match.start()].count(chr(10)) + 1}", match.group(1)))
    return found


def test_pages_have_blocks_of_both_stages() -> None:
    texts = [text for _, text in blocks()]
    assert sum("teacher:" in text for text in texts) >= 2
    assert sum("run:" in text for text in texts) >= 15


@pytest.mark.parametrize(("place", "text"), blocks())
def test_a_block_is_a_whole_config(place: str, text: str) -> None:
    values = parse_yaml(text)  # one document: a second one is refused
    assert isinstance(values, dict)
    model: type[BaseModel] = BuildConfig if "data" in values else TrainConfig
    validate(model, values, place)
