"""Configs from files and flags: what wins, how values are read, what is refused, and what help says."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from distillcache.schemas.command_line import (
    HelpRequested,
    dump_yaml,
    help_text,
    load_yaml,
    merge,
    parse,
    short_help_text,
    validate,
)
from distillcache.schemas.config import (
    BuildConfig,
    Config,
    CopyConfig,
    DemoConfig,
    ExportConfig,
    PlanConfig,
    PrepareConfig,
    TrainConfig,
    VerifyConfig,
)
from distillcache.schemas.config.look import FidelityConfig, StatsConfig
from distillcache.schemas.config.simulate import SimulateConfig
from distillcache.schemas.config.yaml_text import as_yaml
from distillcache.schemas.errors import ConfigError


class Inner(Config):
    size: int = Field(8, gt=0, description="how large")
    name: str | None = Field(None, description="what it is called")


class Sample(Config):
    """A sample of every kind of field."""

    path: str | list[str] = Field(description="where")
    blocks: Literal["all"] | list[int] = Field("all", description="which")
    rate: float = Field(0.5, description="how fast")
    row_tokens: int = Field(16, description="how long")
    accept_platform: bool = Field(False, description="whether")
    inner: Inner = Field(Inner(), description="inside")
    maybe: Inner | None = Field(None, description="inside, or null")
    items: list[Inner] = Field(default_factory=list, description="several")


def read(*argv: str, **options: Any) -> Sample:
    return parse(Sample, argv, "distillcache sample", **options)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "sample.yaml"
    path.write_text("path: corpus\nrow_tokens: 32\ninner: {size: 4, name: file}\nmaybe: {size: 2}\n")
    return str(path)


@pytest.mark.parametrize("flag", ["--row-tokens", "--row_tokens"])
def test_hyphen_and_underscore_are_the_same(flag: str) -> None:
    assert read("--path", "x", flag, "8").row_tokens == 8
    assert read("--path", "x", f"{flag}=8").row_tokens == 8
    assert read("--path", "x", "--accept-platform", flag, "8").accept_platform


def test_dotted_flags_reach_inside() -> None:
    config = read("--path", "x", "--inner.size", "3", "--inner.name=deep", "--maybe.name", "there")
    assert config.inner == Inner(size=3, name="deep")
    assert config.maybe == Inner(name="there")  # a null becomes a mapping


def test_flags_lie_on_the_file_wherever_they_stand(file: str) -> None:
    for argv in (["--config", file, "--inner.size", "5"], ["--inner.size=5", f"--config={file}"]):
        config = read(*argv)
        assert (config.path, config.row_tokens, config.inner) == ("corpus", 32, Inner(size=5, name="file"))
    assert read("--config", file, "--maybe", "null").maybe is None
    assert read("--config", file, "--inner", "{size: 1}").inner == Inner(size=1)


def test_a_second_file_lies_on_the_first(file: str, tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("inner: {size: 7}\nmaybe: null\n")
    config = read("--config", file, "--config", str(over))
    assert (config.row_tokens, config.inner, config.maybe) == (32, Inner(size=7, name="file"), None)


@pytest.mark.parametrize(
    "argv",
    [
        ["--rate", "1", "--rate", "2"],
        ["--row-tokens=1", "--row_tokens", "2"],
        ["--inner.size", "1", "--inner.size", "1"],
        ["--accept-platform", "--accept-platform"],
    ],
    ids=str,
)
def test_a_flag_that_is_given_twice_is_refused(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="given twice") as caught:
        read("--path", "x", *argv)
    assert argv[0].partition("=")[0] in str(caught.value)
    with pytest.raises(ConfigError, match="given twice"):
        read("here", "--path", "there", positional=("path",))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("data.path: x", "write data: {path: ...}"),
        ("optimizer.learning-rate: 1", "write optimizer: {learning_rate: ...}"),
        ("student: {surgery: [{op: drop_blocks, keep: [1]}]}", "op: drop_blocks takes blocks, not keep"),
        ("loss: 3", "should be a mapping"),
        ("student: {surgery: [5]}", "should be a mapping"),
        ("stages: [{mode: feature, steps: 1, step: 2}]", "did you mean steps?"),
        ("stages: [{mode: feature, steps: 1, qqqqq: 2}]", "use mode, steps, loss"),
    ],
)
def test_a_key_in_another_spelling_or_of_an_entry_is_answered(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(f"run: r\ncache: c\n{content}\n")
    model = PrepareConfig if "data" in content else TrainConfig
    with pytest.raises(ConfigError) as caught:
        parse(model, ["--config", str(path)], "distillcache")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "field", "expected"),
    [
        (["--rate", "1e-3"], "rate", 1e-3),  # YAML 1.1 takes this for text
        (["--rate", "-1"], "rate", -1.0),
        (["--blocks", "[3, 7]"], "blocks", [3, 7]),
        (["--blocks", "all"], "blocks", "all"),
        (["--path", "123"], "path", "123"),
        (["--path", "true"], "path", "true"),
        (["--path", "2024-01-01"], "path", "2024-01-01"),
        (["--path", "[a, b]"], "path", ["a", "b"]),
        (["--path", "data-[ab]*.txt"], "path", "data-[ab]*.txt"),
        (["--path=a=b: c"], "path", "a=b: c"),
        (["--inner.name", "null"], "inner", Inner(name="null")),
        (["--inner.name", "!"], "inner", Inner(name="!")),
        (["--inner.name", "~"], "inner", Inner(name="~")),
        (["--inner.name", "#"], "inner", Inner(name="#")),
        (["--inner.name", "[x"], "inner", Inner(name="[x")),
        (["--path", "2025-13-45"], "path", "2025-13-45"),
        (["--path", "!!int x"], "path", "!!int x"),
        (["--path", "!"], "path", "!"),
        (["--path", "~"], "path", "~"),
        (["--path", "007"], "path", "007"),
        (["--path", "1_0e"], "path", "1_0e"),
        (["--row-tokens", "010"], "row_tokens", 10),  # eight, to YAML 1.1
        (["--accept-platform", "false"], "accept_platform", False),
        (["--items", "[{size: 1}, {name: b}]"], "items", [Inner(size=1), Inner(name="b")]),
    ],
)
def test_values_are_read_by_the_fields_type(argv: list[str], field: str, expected: object) -> None:
    path = [] if field == "path" else ["--path", "x"]
    assert getattr(read(*path, *argv), field) == expected


def test_bare_words_fill_the_positional_fields() -> None:
    assert read("corpus", positional=("path",)).path == "corpus"
    with pytest.raises(ConfigError, match="unexpected word") as caught:
        read("corpus", "more", positional=("path",))
    assert caught.value.facts == {"found": "more"}


@pytest.mark.parametrize("argv", [["--accept-platform", "corpus"], ["corpus", "--accept-platform"]])
def test_a_switch_takes_no_word_that_is_not_true_or_false(argv: list[str]) -> None:
    config = read(*argv, positional=("path",))
    assert config.path == "corpus"
    assert config.accept_platform


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(ConfigError, match="not YAML") as caught:
        read("--path", "x", "--row-tokens", "9" * 5000)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--row-tokns", "8"], ["--row-tokns", "did you mean --row_tokens"]),
        (["--inner.sise", "8"], ["--inner.sise", "did you mean --inner.size"]),
        (["--row-tokens.size", "8"], ["--row-tokens.size"]),
        (["--xyzzy"], ["--xyzzy", "distillcache sample --help"]),
        (["--"], ["--"]),
        (["--row-tokens"], ["lacks its value", "--row-tokens"]),
        (["--path", "--rate", "1"], ["lacks its value", "--path"]),
        (["--path", ""], ["value is empty", "--path"]),
        (["--rate="], ["value is empty", "--rate"]),
        (["--config"], ["lacks its value", "--config"]),
        (["--rate", "[1"], ["not YAML", "--rate", "[1"]),
        (["--path", "x", "--rate", "fast"], ["rate", "'fast'", "number"]),
        (["--path", "x", "--inner.size", "0"], ["inner.size", "greater than 0", "found 0"]),
        (["--path", "x", "--blocks", "[1, x]"], ["blocks.1", "'x'"]),
        (["--path", "x", "--items", "[{size: 1}, {size: 0}]"], ["items.1.size", "found 0"]),
        (["--path", "x", "--inner", "3", "--inner.size", "4"], ["--inner.size", "not a mapping"]),
        (["--path", "{a: b}"], ["path", "{'a': 'b'}"]),
        ([], ["path", "is required: give --path (where)"]),
        (["--row-tokens", "#"], ["value is empty", "--row-tokens"]),
        (["--path", "x", "--row-tokens", "!!int x"], ["not YAML", "'x' is no !!int"]),
        (["--path", "caf\udce9"], ["not UTF-8", "caf\\udce9"]),
        (["--path", "x", "--row-tokens", "true"], ["row_tokens", "should be a number, not true"]),
        (["--path", "x", "--rate", "false"], ["rate", "should be a number, not false"]),
        (["--path", "x", "--blocks", "[1, true]"], ["blocks", "should be a number, not true"]),
        (["--path", "x", "--items", "[{size: true}]"], ["items.0.size", "should be a number, not true"]),
        (["--path", "x", "--accept-platform", "perhaps"], ["accept_platform", "valid boolean", "'perhaps'"]),
    ],
)
def test_what_is_wrong_is_named(argv: list[str], told: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*argv)
    for part in told:
        assert part in str(caught.value)


def test_what_is_required_is_asked_for_as_it_can_be_given() -> None:
    with pytest.raises(ConfigError) as caught:
        read(positional=("path",))
    assert caught.value.facts["path"] == "is required: give <path> or --path (where)"
    with pytest.raises(ConfigError) as caught:
        validate(BuildConfig, {"cache": "c", "data": {}}, "distillcache build")
    assert str(caught.value.facts["teacher"]).startswith("is required: give --teacher.path (an HF directory")
    assert str(caught.value.facts["data.path"]).startswith("is required: give --data.path (.txt")


@pytest.mark.parametrize("key", ["teacher", "taps", "data"])
def test_a_field_of_another_command_is_compared_with_each_name_once(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(TrainConfig, {"run": "r", key: {}}, "distillcache train")
    meant = str(caught.value.facts[key]).partition("did you mean ")[2].rstrip("?").split(" or ")
    assert len(meant) == len(set(meant))


def test_the_members_of_a_union_are_not_part_of_the_fields_name() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Sample, {"path": 3, "blocks": [1.5]}, "build.yaml")
    assert list(caught.value.facts) == ["in", "path", "blocks.0"]
    assert caught.value.facts["in"] == "build.yaml"


@pytest.mark.parametrize("model", [PrepareConfig, BuildConfig, TrainConfig, CopyConfig, DemoConfig, StatsConfig])
@pytest.mark.parametrize(
    "value", [object(), {"odd": 1}, [object()], [[{"odd": 1}]]], ids=["object", "map", "list", "lists"]
)
def test_a_wrong_value_of_any_field_is_told_by_the_fields_own_name(model: type[Config], value: object) -> None:
    """Whatever types a stage's config has, and however their unions are made of them."""
    for name in field_paths(model):
        values: Any = value
        for key in reversed(name.split(".")):
            values = {key: values}
        with pytest.raises(ConfigError) as caught:
            validate(model, values, "distillcache x")
        others = {
            "in",
            "config",
            *(told for told in caught.value.facts if "is required" in str(caught.value.facts[told])),
        }
        told = {re.sub(r"(\.(\d+|odd))+$", "", each) for each in caught.value.facts.keys() - others}
        near = {each for each in field_paths(model) if each.startswith(f"{name}.") or name.startswith(f"{each}.")}
        assert told <= {name, *near}, name


@pytest.mark.parametrize("key", ["row_tokns", "row-tokens", "row tokens"])
def test_an_unknown_key_of_a_file_is_named(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.yaml").write_text(f"path: x\n{key}: 3\n")
    with pytest.raises(ConfigError) as caught:
        read("--config", str(tmp_path / "a.yaml"))
    assert key in caught.value.facts


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("row_tokns: 3", "row_tokns  is no field: did you mean row_tokens?"),
        ("inner: {sise: 3}", "inner.sise  is no field: did you mean inner.size?"),
        ("size: 3", "size  is no field: did you mean inner.size or maybe.size"),
        ("inner: {row_tokens: 3}", "inner.row_tokens  is no field: did you mean row_tokens?"),
    ],
)
def test_an_unknown_key_of_a_file_is_answered_with_the_right_one(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "a.yaml").write_text(f"path: x\n{content}\n")
    with pytest.raises(ConfigError) as caught:
        read("--config", str(tmp_path / "a.yaml"))
    key, said = told.split("  ")
    assert str(caught.value.facts[key]).startswith(said)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"a: [1", "cannot be used as YAML"),
        (b"a: !!python/object:os.system x", "the tag !!python/object:os.system is not known here (line 1, column 4)"),
        (b"a: 1\n---\nb: 2\n", "a second document begins (line 2, column 1)"),
        (b"a: 1\na: 2\n", "the key a is given twice (line 2, column 1)"),
        (b"a: " + b"[" * 3000, "brackets inside each other"),
        (b"#" * (1 << 21), "characters, where"),
        (b"- a\n", "found  list"),
        (b"", "found  nothing"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_yaml(str(path))
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_merge_goes_into_mappings_and_changes_neither() -> None:
    base, over = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}, {"a": {"c": {"f": 3}}, "e": [2]}
    assert merge(base, over) == {"a": {"b": 1, "c": {"d": 2, "f": 3}}, "e": [2]}
    assert (base, over) == ({"a": {"b": 1, "c": {"d": 2}}, "e": [1]}, {"a": {"c": {"f": 3}}, "e": [2]})
    assert merge({"a": {"b": 1}}, {"a": None}) == {"a": None}


def test_a_dumped_config_reads_back(tmp_path: Path) -> None:
    config = read("--path", "[ü, b]", "--maybe.size", "3", "--items", "[{name: 'no'}]", "--rate", "1e-7")
    (tmp_path / "a.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert read("--config", str(tmp_path / "a.yaml")) == config


def field_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted name of every leaf and of every section that says what it is, found in another way than by help."""
    paths = []
    for name, field in model.model_fields.items():
        inner = [t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(t, type)]
        models = [t for t in inner if issubclass(t, BaseModel)] if "list" not in str(field.annotation) else []
        models = [] if "float" in str(field.annotation) else models  # a number, or a ramp: one flag
        paths += field_paths(models[0], f"{prefix}{name}.") if models else []
        paths += [prefix + name] if field.description or not models else []
    return paths


@pytest.mark.parametrize("model", [Sample, PrepareConfig, BuildConfig, TrainConfig, DemoConfig])
def test_help_lists_every_field_with_its_meaning(model: type[BaseModel]) -> None:
    lines = help_text(model, "distillcache x", ("path",)).split("\n")
    flags = {line.split()[0]: meaning.strip() for line, meaning in pairwise(lines) if "--" in line}
    assert {f"--{path.replace('_', '-')}" for path in field_paths(model)} == flags.keys() - {
        "usage:",
        "--config",
        "--json",
    }
    assert all(meaning for flag, meaning in flags.items() if flag != "usage:")


@pytest.mark.parametrize("model", [PrepareConfig, BuildConfig, TrainConfig])
def test_help_names_a_default_once(model: type[BaseModel]) -> None:
    pairs = [(flag, words) for flag, words in pairwise(help_text(model, "distillcache x").split("\n")) if "--" in flag]
    unnamed = [words for flag, words in pairs if flag.endswith("(default: none)")]
    assert unnamed
    assert not any("default:" in words for words in unnamed)


def test_help_states_types_and_defaults() -> None:
    with pytest.raises(HelpRequested) as caught:
        read("--row-tokens", "8", "--help")
    text = str(caught.value)
    assert text.startswith("usage: distillcache sample [--config FILE.yaml]")
    assert "A sample of every kind of field." in text
    for line in (
        "--path str or [str, ...]  (required)",
        "--blocks all or [int, ...]  (default: all)",
        "--row-tokens int  (default: 16)",
        "--inner.name str  (default: none)",
        "--items [{size: int, name: str}, ...]  (default: [])",
    ):
        assert line in text


@pytest.mark.parametrize("model", [BuildConfig, TrainConfig, PrepareConfig, CopyConfig, FidelityConfig])
def test_short_help_explains_the_usual_and_names_every_other_flag_or_its_section(model: type[BaseModel]) -> None:
    explained, _, rest = short_help_text(model, "distillcache x").partition("\nLess usual; distillcache x --help-all ")
    shown = re.findall("^  --([a-z0-9.-]+)", explained, re.MULTILINE)
    named = re.findall("^  --([a-z0-9.-]+)", rest, re.MULTILINE)
    assert not set(shown) & set(named)
    for usual in getattr(model, "usual", ()):
        assert any(f"{flag.replace('-', '_')}.".startswith(f"{usual}.") for flag in shown), usual
    for path in field_paths(model):
        flag = path.replace("_", "-")
        sections = {flag.rsplit(".", cut)[0] for cut in range(flag.count(".") + 1)}
        parts = [each for each in (*shown, *named) if each.startswith(f"{flag}.")]
        assert sections & {*shown, *named} or parts, f"{flag} cannot be found in the help"
    assert max(map(len, rest.split("\n"))) <= 120


@pytest.mark.parametrize(
    ("model", "first"),
    [(PrepareConfig, "data.path"), (CopyConfig, "src"), (FidelityConfig, "cache"), (ExportConfig, "run")],
)
def test_short_help_begins_with_what_is_needed_and_only_names_storage(model: type[BaseModel], first: str) -> None:
    text = short_help_text(model, "distillcache x")
    shown = re.findall("^  --([a-z0-9.-]+)", text, re.MULTILINE)
    assert shown[0] == first
    assert [flag for flag in shown if flag.startswith("storage")] == ["storage"]


@pytest.mark.parametrize("model", [VerifyConfig, PlanConfig, CopyConfig, FidelityConfig, SimulateConfig])
def test_help_begins_with_all_that_is_said_of_the_command(model: type[BaseModel]) -> None:
    text = short_help_text(model, "distillcache x")
    head = " ".join(text.partition("\n  --")[0].split())
    assert head.endswith(" ".join((model.__doc__ or "").split()))
    assert not re.search(r"[^\n]\n    [a-z]", text.partition("\n  --")[0])  # no line is cut in a sentence


def test_defaults_are_spelled_as_flags_take_them() -> None:
    assert "--extend bool  (default: false)" in help_text(BuildConfig, "distillcache build")
    assert "(default: [llama-3.1-8b, llama-3.1-70b])" in help_text(SimulateConfig, "distillcache plan --simulate")


def test_the_learning_rate_comes_before_what_few_need() -> None:
    lines = short_help_text(TrainConfig, "distillcache train").split("\n")
    (rate,) = (at for at, line in enumerate(lines) if "--optimizer.learning-rate" in line)
    (online,) = (at for at, line in enumerate(lines) if "--online" in line)
    assert rate < online
    assert len(lines) < 120
    assert any("cosine decay" in line for line in lines)


def test_help_all_explains_what_help_only_names() -> None:
    with pytest.raises(HelpRequested) as short:
        train_config("--help")
    with pytest.raises(HelpRequested) as whole:
        train_config("--help-all")
    assert "--online.taps.resid.codec" not in str(short.value)
    assert "--online.taps.resid.codec" in str(whole.value)
    with pytest.raises(HelpRequested) as small:
        read("--help")
    assert str(small.value) == help_text(Sample, "distillcache sample")


def test_help_of_weights_and_stages_is_one_line_each() -> None:
    lines = help_text(TrainConfig, "distillcache train").split("\n")
    ramp = "{start: float, end: float, schedule: constant|linear|cosine}"
    assert f"  --loss.alpha float or {ramp}  (default: 0.0)" in lines
    (stages,) = (line for line in lines if line.startswith("  --stages"))
    assert "loss: {...}, optimizer: {...}" in stages
    assert max(map(len, lines)) < 220


def train_config(*argv: str) -> TrainConfig:
    return parse(TrainConfig, ["--run", "r", "--cache", "c", *argv], "distillcache train")


def test_maxtexts_keys_are_flags_too(tmp_path: Path) -> None:
    assert train_config("--blockwise-distill").mode == "blockwise"
    assert train_config("--blockwise-distill", "false").mode == "feature"
    assert train_config("--load-balance-loss-weight", "1e-2").loss.load_balance.weight == 0.01
    same = ["--load-balance-loss-weight=0.5", "--loss.load-balance.weight", "0.5", "--loss.alpha", "0.5"]
    assert train_config(*same).loss.load_balance.weight == train_config(*same).loss.alpha == 0.5
    (tmp_path / "a.yaml").write_text("load_balance_loss_weight: 0.1\nblockwise_distill: true\nloss: {alpha: 0.5}\n")
    config = train_config("--config", str(tmp_path / "a.yaml"))
    assert (config.mode, config.loss.load_balance.weight, config.loss.alpha) == ("blockwise", 0.1, 0.5)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--blockwise-distill", "--mode", "feature"], "blockwise_distill: True and mode: feature do not agree"),
        (["--blockwise-distill", "maybe"], "blockwise_distill is true or false, not 'maybe'"),
        (
            ["--load-balance-loss-weight", "1", "--loss.load-balance.weight", "2"],
            "load_balance_loss_weight: 1 and loss.load_balance.weight: 2 do not agree",
        ),
        (["--load-balance-loss-weight", "1", "--loss", "3"], "loss, which is not a mapping"),
        (["--load-balance-loss-weight", "-1"], "loss.load_balance.weight"),
        (["--online.rows="], "value is empty"),
    ],
)
def test_maxtexts_keys_must_agree_with_ours(argv: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train_config(*argv)
    assert told in str(caught.value)
    assert "found {" not in str(caught.value)


def test_lists_and_endings_are_asked_for_in_plain_words() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(StatsConfig, {"cache": "c", "taps": "resid", "out": "d.npy"}, "stats")
    assert caught.value.facts["taps"] == "should be a list: write '[resid]' (found 'resid')"
    assert caught.value.facts["out"] == "should end in .npz (found 'd.npy')"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"loss": {"stream": {"slots": "last"}}}, {"loss.stream.slots": "should be all, or a list: write '[last]'"}),
        ({"loss": {"feature": {"blocks": 3}}}, {"loss.feature.blocks": "should be all, or a list: write '[3]'"}),
        (
            {"loss": {"feature": {"blocks": "al"}}},
            {"loss.feature.blocks": "should be all, or a list, such as '[1, 2]'"},
        ),
        ({"train_only": "attention"}, {"train_only": "should be a list: write '[attention]'"}),
        ({"student": {"layer_map": 3}}, {"student.layer_map": "should be a list: write '[3]'"}),
        ({"student": {"surgery": "x"}}, {"student.surgery": "should be a list of mappings, such as '[{op: ...}]'"}),
        ({"student": {"surgery": {"op": "x"}}}, {"student.surgery": "should be a list: put it in brackets, '[{...}]'"}),
        ({"student": {"lora": {"targets": "mlp"}}}, {"student.lora.targets": "should be a list: write '[mlp]'"}),
        ({"loss": {"alpha": {"start": 0, "end": 2}}}, {"loss.alpha.end": "input should be less than or equal to 1"}),
        ({"loss": {"tau": {"start": -1, "end": 2}}}, {"loss.tau.start": "input should be greater than or equal to 0"}),
        ({"loss": {"tau": {"start": 1}}}, {"loss.tau.end": "is required"}),
        ({"loss": {"tau": {"start:1": None}}}, {"loss.tau.start:1": "is no field: YAML needs a space after the colon"}),
        ({"loss": {"tau": "abc"}}, {"loss.tau": "input should be a valid number"}),
        ({"loss": {"feature": {"blocks": [0, "x"]}}}, {"loss.feature.blocks.1": "input should be a valid integer"}),
    ],
    ids=str,
)
def test_a_finding_is_told_once_and_shows_the_way(values: dict[str, Any], told: dict[str, str]) -> None:
    """By file and by flag: pydantic gives one for each type that a field may have."""
    flags = [word for path, value in leaves(values) for word in (f"--{path}", as_yaml(value))]
    given = {"run": "r", "cache": "c"}
    for read_it in (lambda: validate(TrainConfig, given | values, "x"), lambda: train_config(*flags)):
        with pytest.raises(ConfigError) as caught:
            read_it()
        found = {name: str(fact) for name, fact in caught.value.facts.items() if name != "in"}
        required = {name for name in found if found[name].startswith("is required")}
        assert found.keys() - required | told.keys() == told.keys()
        for name, start in told.items():
            assert found[name].startswith(start)


def leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted path and value of what is given to the fields that these lead to."""
    sections = {"loss", "student", "loss.feature", "loss.stream", "student.lora"}
    found = []
    for key, value in values.items():
        path = f"{prefix}{key}"
        found += leaves(value, f"{path}.") if path in sections else [(path, value)]
    return found


def test_a_config_is_found_in_the_home_folder(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(file).parent))
    assert read("--config=~/sample.yaml").row_tokens == 32


def test_forms_are_asked_for_in_plain_words() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(CopyConfig, ["a", "b", "--rows", "first"], "distillcache copy", positional=("src", "dst"))
    assert caught.value.facts["rows"] == "should be all, train, eval, or START:STOP (found 'first')"
    with pytest.raises(ConfigError) as caught:
        parse(TrainConfig, ["--run", "r", "--profile", "steps=3"], "distillcache train")
    assert caught.value.facts["profile"] == "should be steps=10:13 (found 'steps=3')"


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (PrepareConfig, {"out": "o", "data": {"path": "d"}}),
        (BuildConfig, {"cache": "c", "teacher": {"path": "t"}, "data": {"path": "d"}}),
        (CopyConfig, {"src": "a", "dst": "b"}),
    ],
)
def test_a_process_that_is_none_of_those_there_are_is_refused(model: type[Config], values: dict[str, Any]) -> None:
    """It would have nothing to do, and would look for what the others do."""
    assert validate(model, values | {"process_id": 1, "num_processes": 2}, "x").model_dump()["process_id"] == 1
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        validate(model, values | {"process_id": 3}, "x")
    assert caught.value.facts["config"] == "process_id is 3, and num_processes 1: numbers go from 0 to 0"


def test_workers_have_a_limit() -> None:
    """Each is a process of its own: a typing error filled a machine's memory."""
    values = {"out": "o", "data": {"path": "d"}}
    assert validate(PrepareConfig, values | {"workers": 64}, "x").workers == 64
    with pytest.raises(ConfigError, match="cannot be used"):
        validate(PrepareConfig, values | {"workers": 99_999}, "x")
