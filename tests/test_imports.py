"""Who may import whom: walks every import of the source folders."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "schemas": {"schemas"},
    "models": {"models", "schemas"},
    "cache_builder": {"cache_builder", "models", "schemas"},
    "trainer": {"trainer", "models", "schemas"},
    "tools": {"tools", "trainer", "cache_builder", "models", "schemas"},
}


def imported(path: Path) -> set[str]:
    """The top-level names that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


def test_folders_import_only_what_they_may() -> None:
    files = [path for folder in ALLOWED for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 30
    wrong = {
        str(path.relative_to(ROOT)): extra
        for path in files
        if (extra := imported(path) & (ALLOWED.keys() | {"tests"}) - ALLOWED[path.relative_to(ROOT).parts[0]])
    }
    assert wrong == {}
