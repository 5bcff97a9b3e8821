"""README and docs do not rot: their YAML, command lines, Python and links are parsed by what a user would use."""

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from distillcache.schemas import command_line
from distillcache.schemas.config import BuildConfig
from distillcache.schemas.config.train import TrainConfig
from distillcache.schemas.config.yaml_text import parse_yaml
from distillcache.schemas.errors import ConfigError
from distillcache.tools import cli
from distillcache.tools.bench.students.jobs import JOBS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES_FOLDER = ROOT / "recipes"
RECIPES = sorted(RECIPES_FOLDER.glob("*.yaml"))
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
OTHER_PACKAGES = {"zarr", "xpk", "jax"}  # that the docs tell a user to install
OTHER_MODULES = {"zarr", "ml_dtypes"}  # of examples that read a cache without us
# Programs of others, whose flags are not ours to check.
OTHERS = {".", "cd", "curl", "exec", "export", "for", "do", "done", "gcloud", "kill", "srun", "until", "wait", "xpk"}
FLAGS_OF_OTHERS = {
    "--xla_force_host_platform_device_count",
    "--max-restarts",
    "--requeue",
    "--signal",
    "--spot",
    "--worker",
}
FLAGS_OF_ALL = {"--config", "--help", "--help-all", "--json", "--version", "--simulate"}
INDENTED = re.compile(r"(?m)(?<=\n\n)(?:^    .*\n)+")
# Config files that command lines name, where no block of the page shows them.
FILES = {
    "build": "cache: caches/mine\nteacher: {path: path/to/llama}\ndata: {path: corpus/*.txt}\n",
    "train": "run: runs/cut\ncache: caches/mine\nsteps: 10\n",
    "prepare": "out: rows\ndata: {path: corpus/*.txt, tokenizer: path/to/llama}\n",
}


def fenced(kinds: str) -> list[tuple[str, str]]:
    """Page and line, and text, of every fenced block of these kinds (a regular expression)."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer("^```(\\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if re.fullmatch(kinds, match[1]):
                found.append((f"{page.name}:{text[: match.start()].count(chr(10)) + 1}", match[2]))
    return found


def shell_texts(text: str) -> list[str]:
    """The shell code of a page: fenced blocks without a language, and indented blocks."""
    blocks = [body for kind, body in re.findall("^```(\\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if not kind]
    plain = re.sub("^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return blocks + [re.sub("(?m)^    ", "", block) for block in re.findall(INDENTED, plain)]


def logical_lines(code: str) -> Iterator[str]:
    """Lines of shell code, continued ones joined, here documents and what a command printed left out."""
    code = re.sub(r"(?ms)^(.*<<'(\w+)')$.*?^\2$", r"\1", code)
    lines = re.sub(r"\\\n\s*", " ", code).splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    yield from (line.strip() for line in lines if line.strip())


def words_of(line: str) -> list[str]:
    """The words of a line, `;`, `&` and `|` as words of their own; variables have a value that a number may have."""
    line = line.replace('"$@"', "build --config build.yaml")
    line = re.sub(r"\$\w*NTASKS", "4", line)
    line = re.sub(r"\$\([^()]*\)|\$\w+", "0", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def commands_in(line: str) -> Iterator[list[str]]:
    """The simple commands of a line, also those in quotes: `ssh --command='distillcache ...'`."""
    command: list[str] = []
    for word in [*words_of(line), ";"]:
        if word in (";", "&", "&&", "|", "||", "do"):
            if command:
                yield command
            command = []
            continue
        command.append(word)
        inner = word.partition("=")[2] if word.startswith("--command=") else word
        if " " in inner and re.match(r"(distillcache|pip|bash) ", inner):
            yield from commands_in(inner)


class Parsed(Exception):
    """What a command line gave, in the place of running it."""

    def __init__(self, config: Any) -> None:
        self.config = config


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Commands end when their config is validated. Returns the texts of config files by name, to be filled."""
    files: dict[str, str] = {}
    real = command_line.parse

    def parse(model: type[BaseModel], argv: Any, command: str, **more: Any) -> Any:
        if "--repair" in argv and model is BuildConfig:  # reads the rest of its settings from the cache's plans
            more["complete"] = lambda values: parse_yaml(FILES["build"]) | values
        raise Parsed(real(model, argv, command, **more))

    def read(path: str) -> bytes:
        kind = next((kind for kind in FILES if path.endswith(f"{kind}.yaml")), "build")
        return files.get(Path(path).name, FILES[kind]).encode()

    monkeypatch.setattr(command_line, "parse", parse)
    monkeypatch.setattr(command_line, "_config_bytes", read)
    return files


def check_command(words: list[str]) -> None:
    """Parse one simple command.

    Raises:
        ConfigError, AssertionError: it is not one that a user can run.
    """
    while (words and re.match(r"[A-Za-z_]+=", words[0])) or words[0] in ("exec", "srun", "until", "bash", "-c"):
        words = words[1:]
        if not words or " " in words[0]:  # `bash -c '...'`, whose inside is a command of its own
            return
    head = Path(words[0]).name
    if head == "distillcache":
        with pytest.raises(Parsed):
            cli._run([word for word in words[1:] if not re.match(r"[<>]|/tmp/", word)])
    elif head == "make":
        assert {word for word in words[1:] if "=" not in word} <= MAKE_TARGETS, words
    elif head == "pip":
        assert words[1] == "install", words
        for word in words[2:]:
            check_package(word)
    elif head == "python" and words[1] == "-m":
        assert importlib.util.find_spec(words[2]), words
    elif head == "python":
        assert words[1] in ("-", "-c"), words
    elif not re.search(r"\.(sh|yaml)$", words[0]):
        assert head in OTHERS, words


def check_package(word: str) -> None:
    ours = re.match(r"(?:\.|0|distillcache-\*\.whl)(?:\[([\w,]+)\])?$", word)  # 0: a wheel's name, from a variable
    if ours:
        assert set(ours[1].split(",") if ours[1] else ()) <= EXTRAS, word
    elif word != "-e":
        name = re.match(r"[\w-]+", word)
        assert name, word
        assert name[0] in OTHER_PACKAGES, word


def check_shell(text: str, files: dict[str, str]) -> int:
    """Check all commands of a page. Returns how many of ours there are."""
    for body in re.findall("```yaml\n(.*?)```", text, re.DOTALL):
        name = re.match(r"# ([\w.]+\.yaml)", body)
        files.update({name[1]: body} if name else {})
    ours = 0
    for code in shell_texts(text):
        for line in logical_lines(code):
            if not re.search(r"(^|[\s'\"=])(distillcache|make|pip|python3?|git) ", line.partition("  #")[0]):
                continue
            if re.match(r"(next|error|warning|note|#)", line):
                continue
            for words in commands_in(line):
                check_command(words)
                ours += words[0] == "distillcache"
    return ours


def test_pages_have_blocks_of_both_stages() -> None:
    texts = [text for _, text in fenced("yaml")]
    assert sum("teacher:" in text for text in texts) >= 2
    assert sum("run:" in text for text in texts) >= 15


@pytest.mark.parametrize(("place", "text"), fenced("yaml"))
def test_a_block_is_a_whole_config(place: str, text: str) -> None:
    values = parse_yaml(text)  # one document: a second one is refused
    assert isinstance(values, dict)
    model: type[BaseModel] = BuildConfig if "data" in values else TrainConfig
    command_line.validate(model, values, place)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_a_whole_config_of_a_known_job(path: Path) -> None:
    """It makes the cuts and reads the cache that `bench recipes` measured it with."""
    values = parse_yaml(path.read_text())
    if path.name == "build.yaml":
        build = command_line.validate(BuildConfig, values, path.name)
        assert build.taps.resid is not None
        assert build.taps.resid.head
    else:
        config = command_line.validate(TrainConfig, values, path.name)
        assert config.cache == parse_yaml((RECIPES_FOLDER / "build.yaml").read_text())["cache"]
        job = JOBS[path.stem]
        chosen = {"by": "importance"} if path.stem in ("fewer-heads", "narrower-mlps") else {}  # the default
        measured = [dict(op) | chosen for op in values["student"]["surgery"]]
        assert measured == job.student["surgery"]
        assert {name: values[name] for name in job.settings} == job.settings


@pytest.mark.usefixtures("parse_only")
def test_the_command_in_a_recipe_is_accepted() -> None:
    lines = [line for path in RECIPES for line in re.findall(r"(?m)^# +(distillcache .*)$", path.read_text())]
    assert lines
    for line in lines:
        for words in commands_in(line):
            check_command(words)


def test_every_job_has_a_recipe() -> None:
    assert {path.stem for path in RECIPES} == {"build", *JOBS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_are_accepted(page: Path, parse_only: dict[str, str]) -> None:
    check_shell(page.read_text(encoding="utf-8"), parse_only)


def test_pages_have_command_lines(parse_only: dict[str, str]) -> None:
    assert sum(check_shell(page.read_text(encoding="utf-8"), parse_only) for page in PAGES) >= 45


@pytest.mark.parametrize(
    "line",
    [
        "distillcache build --config build.yaml --extnd",
        "distillcache train --config train.yaml --mesh.rows 8",
        "distillcache train --config train.yaml --steps many",
        "distillcache export runs/cut",
        "distillcache transcode caches/a caches/b",
        "srun bash -c 'distillcache build --config build.yaml --proces-id 0'",
        "make tests",
        "pip install -e '.[viewer]'",
        "pip install left-pad",
        "python -m distillcache.no_such_stage --x 1",
        "A=1 distillcache inspect caches/a --qick && make test",
    ],
)
def test_a_planted_mistake_is_found(line: str, parse_only: dict[str, str]) -> None:
    for text in (f"```\n{line}\n```\n", f"Text:\n\n    {line}\n"):
        with pytest.raises((ConfigError, AssertionError, ModuleNotFoundError)):
            check_shell(text, parse_only)


def models_of_commands(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[type[BaseModel]]]:
    found: dict[str, list[type[BaseModel]]] = {}

    def parse(model: type[BaseModel], _argv: Any, command: str, **_more: Any) -> Any:
        found.setdefault(command.split()[1], []).append(model)
        raise Parsed(None)

    monkeypatch.setattr(command_line, "parse", parse)
    for name in cli.COMMANDS:
        for words in ([], ["--simulate"]):
            with pytest.raises(Parsed):
                cli._run([name, *words])
    return found


def test_flags_in_sentences_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `--flag` between backticks is a flag of some command, and of the command that it stands with."""
    models = models_of_commands(monkeypatch)
    checked = 0
    for page in PAGES:
        if page.name == "comparison.md":  # names flags of other projects
            continue
        text = re.sub("^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        text = INDENTED.sub("", text)
        for span in re.findall(r"`([^`]*?--[a-z][^`]*)`", text):
            words = re.sub(r"\s+", " ", span).split(" -- ")[0].split()
            command = words[1] if words[0] == "distillcache" else words[0]
            for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", " ".join(words)):
                if flag not in FLAGS_OF_ALL | FLAGS_OF_OTHERS:
                    of_command = models.get(command) or chain.from_iterable(models.values())
                    assert is_flag(flag, of_command), f"{page.name}: {span}"
                    checked += 1
    assert checked >= 60


def is_flag(flag: str, models: Iterable[type[BaseModel]]) -> bool:
    keys = flag[2:].replace("-", "_").split(".")
    for model in models:
        try:
            command_line._field_annotation(model, keys, flag, "docs")
        except ConfigError:
            continue
        return True
    return False


@pytest.mark.parametrize(("place", "code"), fenced("python"))
def test_python_compiles_and_its_imports_exist(place: str, code: str) -> None:
    check_python(code)


def test_python_in_here_documents() -> None:
    pattern = re.compile(r"python - <<'(\w+)'\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
    found = [match[2] for page in PAGES for match in pattern.finditer(page.read_text(encoding="utf-8"))]
    assert found
    for code in found:
        check_python(code)


def check_python(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for name in node.names:
                assert name.name in OTHER_MODULES or importlib.util.find_spec(name.name), name.name
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                assert anchor in anchors(file), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub("(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))  # whose comments look like headings
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_no_page_has_a_heading_twice() -> None:
    for page in PAGES:
        text = re.sub("(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert len(headings) == len(set(headings)), page.name


def test_where_names_what_exists() -> None:
    """Every file of docs/where.md is there, and defines the function or class that is named beside it."""
    text = (ROOT / "docs/where.md").read_text(encoding="utf-8")
    lines = re.findall(r"(?m)^\| .+ \| (`.+) \|$", text)
    assert len(lines) == text.count("\n| ") - 2 * text.count("\n## ")  # all rows but titles and the lines below them
    assert len(lines) > 30
    for line in lines:
        path, *names = re.findall("`([^`]+)`", line)
        assert (ROOT / path).exists(), line
        for name in names:
            defined = ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
            kinds = ast.FunctionDef | ast.ClassDef
            assert name in {node.name for node in defined if isinstance(node, kinds)}, line
