"""One word for each meaning, in the field's own words: names, docstrings, comments and messages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("cache_builder", "distillcache", "models", "schemas", "tools", "trainer")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What earlier versions wrote to disk, and settings that users have in their files.
ON_DISK = r"claims?/|/claims\b|[\"'`(|]claims[\"'`)|]|claim\.json|claim[_-]expiry[_-]s|called claims on disk"
PIECES = r"sentencepiece|wordpiece|spiece"
# Phrases that puzzled readers, each with the words that replaced it.
PUZZLING = {
    "talk to nobody": "no communication",
    "what every block made of each token": "per-token activation statistics for each block",
    "what goes wrong and how it is said": "failure modes and error messages",
    "gets scarce first": "becomes the bottleneck",
    "how buckets are asked": "object-store client settings",
    "what came garbled": "a corrupt response",
    "gives its state's memory away": "donates its inputs",
    "models with eyes": "vision-language models",
    "lock-step": "lockstep",
    "from where it came": "from its source",
    "gone on with": "resumed",
}


@pytest.mark.parametrize(
    ("word", "allowed"),
    [("claim", ON_DISK), ("piece", PIECES)],
)
def test_a_lease_is_a_lease_and_a_work_unit_a_work_unit(word: str, allowed: str) -> None:
    found = []
    for path in (*SOURCES, *PAGES):
        for line in path.read_text(encoding="utf-8").splitlines():
            rest = re.sub(allowed, "", line, flags=re.IGNORECASE)
            if re.search(word, rest, re.IGNORECASE) and not is_known_use(path, line):
                found.append(f"{path.relative_to(ROOT)}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def is_known_use(path: Path, line: str) -> bool:
    """The JSON key of a checkpoint's boxes, and a tokenizer's word pieces."""
    return (path.name == "checkpoint.py" and "pieces" in line) or path.match("text/*.py") or "gguf" in path.parts


@pytest.mark.parametrize("phrase", PUZZLING)
def test_puzzling_phrases_stay_away(phrase: str) -> None:
    pattern = re.compile(r"\s+".join(map(re.escape, phrase.split())), re.IGNORECASE)
    assert not [path.name for path in (*SOURCES, *PAGES) if pattern.search(path.read_text(encoding="utf-8"))]
