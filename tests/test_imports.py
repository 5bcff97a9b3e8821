"""Import rules: which package may import which, every import under `distillcache`, and no circles of files."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST_WITH_CONFIG = 30  # functions: the commands, the stages, and the doors between them
ALLOWED = {
    "schemas": {"schemas"},
    "models": {"models", "schemas"},
    "cache_builder": {"cache_builder", "models", "schemas"},
    "trainer": {"trainer", "models", "schemas"},
    "tools": {"tools", "trainer", "cache_builder", "models", "schemas"},
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `distillcache.`; a package has its folder's name."""
    found = {}
    for folder in ALLOWED:
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path
    return found


@cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree, for all tests of this file."""
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> tuple[tuple[str, str], ...]:
    """Module and name of every import of a file, those inside functions included; the name of `import x` is empty."""
    return tuple(imports(path))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def own(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports."""
    found = set()
    for module, name in imported(path):
        inside = module.removeprefix("distillcache.")
        if module.startswith("distillcache."):
            found.add(f"{inside}.{name}" if f"{inside}.{name}" in known else inside)
    return found


def test_folders_import_only_what_they_may() -> None:
    known = modules()
    assert len(known) > 200
    wrong = {
        name: extra
        for name, path in known.items()
        if (extra := {other.split(".")[0] for other in own(path, known)} - ALLOWED[name.split(".")[0]])
    }
    assert wrong == {}


def test_imports_name_the_package() -> None:
    """`import models` would be a second copy of `distillcache.models`, found in a checkout alone."""
    files = [*modules().values(), *(ROOT / "tests").rglob("*.py")]
    wrong = {
        str(path.relative_to(ROOT)): module
        for path in files
        for module, _ in imported(path)
        if module.split(".")[0] in ALLOWED or (module.split(".")[0] == "tests" and path.is_relative_to(ROOT / "tools"))
    }
    assert wrong == {}


def test_no_circles_of_files() -> None:
    """Imports inside functions count: a circle is a circle, whenever it closes."""
    known = modules()
    edges = {name: own(path, known) - {name} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in edges[name] & known.keys():
                visit(other, (*way, name))
            done.add(name)

    for name in known:
        visit(name, ())


def test_few_functions_take_a_whole_config() -> None:
    """What lies below an entry point takes a spec, options, or the values that it needs."""
    whole = {"BuildConfig", "CopyConfig", "PrepareConfig", "TrainConfig"}
    taking = [
        f"{name}.{node.name}"
        for name, path in modules().items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef)
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if argument.annotation is not None and whole & set(re.findall(r"\w+", ast.unparse(argument.annotation)))
    ]
    assert len(taking) <= MOST_WITH_CONFIG, taking
