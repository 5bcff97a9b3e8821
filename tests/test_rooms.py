"""Folders that a newcomer can read: each lists its modules in reading order, none is long, and all are packaged."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = ("schemas", "models", "cache_builder", "trainer", "tools")
LONGEST = 16  # modules of one folder: about what a reader takes in at a glance
ROOMS = sorted(path.parent for top in TOP for path in (ROOT / top).rglob("__init__.py"))


def entries(folder: Path) -> set[str]:
    """Modules and subfolders that hold code."""
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
    return files | {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}


def listed(folder: Path) -> list[str]:
    """Names at the starts of the lines of a folder's docstring."""
    lines = (folder / "__init__.py").read_text().split('"""')[1].splitlines()
    words = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    return [word for word in words if word.endswith((".py", "/"))]


@pytest.mark.parametrize("folder", ROOMS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_lists_its_modules(folder: Path) -> None:
    names = listed(folder)
    assert len(set(names)) == len(names)
    assert set(names) == entries(folder)
    assert len([name for name in names if name.endswith(".py")]) <= LONGEST


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for top in TOP for path in (ROOT / top).rglob("*.py")}
    assert folders == set(ROOMS)


def test_the_wheel_holds_every_package() -> None:
    """`packages` of pyproject.toml is a list, since the folders lie beside `distillcache/` and not in it.

    Folders of data are in it, too: setuptools prints a screen of warnings for each one that is not.
    """
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = {path for top in TOP if top != "tests" for path in (ROOT / top).rglob("*") if path.is_file()}
    folders = {path.parent for path in files if path.parent.name != "__pycache__"}
    found = {"distillcache." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(declared) == sorted({"distillcache", *found})


def test_the_wheel_holds_what_is_no_python() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    declared = {
        path
        for package, patterns in data.items()
        for pattern in patterns
        for path in (ROOT / package.removeprefix("distillcache.").replace(".", "/")).glob(pattern)
    }
    tops = [ROOT / "distillcache", *(ROOT / top for top in TOP if top != "tests")]
    files = {path for top in tops for path in top.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert declared == files


def test_docstrings_begin_with_what_they_define() -> None:
    """With a verb, or the noun: not with a question."""
    questions = {"What", "Whether", "How", "Of", "Those", "Who", "Where"}
    asking = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for top in TOP
        for path in (ROOT / top).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and (text := ast.get_docstring(node))
        and text.split()[0] in questions
    ]
    assert asking == []


@pytest.mark.parametrize("path", ["trainer/losses.py", "tests/test_rooms.py"])
def test_a_name_that_nothing_defines_fails_the_check(path: str) -> None:
    """jaxtyping's axis names are no reason to turn the rule off: a single one begins with a space."""
    code = f"{(ROOT / path).read_text()}\n\ndef planted() -> int:\n    return nowhere\n"
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--output-format=concise",
        f"--stdin-filename={path}",
        "-",
    ]
    found = subprocess.run(command, input=code, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1
    assert [line.split(": ", 1)[1] for line in found.stdout.splitlines()[:-1]] == ["F821 Undefined name `nowhere`"]
