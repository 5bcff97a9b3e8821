"""How long a document a model is made for, as its config states it, and who says so where rows are longer."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.record.plan import plan_differences
from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.decoder import Decoder
from distillcache.models.describe import teacher_context
from distillcache.models.families import config_from_hf
from distillcache.models.layers.rope import context_length
from distillcache.schemas.cache.segment import named_by_plan, open_cache
from distillcache.schemas.config import BuildConfig
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.rows import too_long_note
from distillcache.schemas.store.store import Store
from distillcache.tools import cli
from distillcache.trainer import train as training
from distillcache.trainer.train import train
from tests.conftest import TINY, build_config, save_teacher
from tests.trainer.test_train import config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024, "factor": 32.0}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"type": "dynamic", "factor": 2.0}, 8192),
        ({"rope_type": "llama3", **LLAMA3}, 4096),  # Llama 3.1 states the stretched length
        ({"rope_type": "yarn", "factor": 4.0}, 16384),  # Qwen's advice: the config keeps the trained length
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),  # DeepSeek's
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024}, 8192),
    ],
    ids=str,
)
def test_scaling_stretches_what_a_config_states(scaling, expected):
    found = config_from_hf({**LLAMA, "rope_scaling": scaling}, Path("config.json"))
    assert context_length(found) == expected


def test_gemma_states_the_stretched_length():
    stretched = replace(TINY.rope, kind="linear", factor=8.0)
    assert context_length(replace(TINY, rope=stretched, max_positions=512)) == 4096
    assert context_length(replace(TINY, rope=stretched, max_positions=512, local_rope=TINY.rope)) == 512


@pytest.mark.parametrize(("rows", "context", "says"), [(16, 16, False), (17, 16, True), (10**6, None, False)])
def test_rows_of_the_very_length_are_fine(rows, context, says):
    found = too_long_note(rows, context, "the teacher", "use shorter ones")
    assert (found is not None) == says
    assert not says or (found and f"rows of {rows} tokens are longer than the {context} that the teacher is" in found)


@pytest.fixture(scope="module")
def short_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher, made for documents of 12 tokens."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "short", replace(TINY, max_positions=12))


@pytest.fixture(scope="module")
def short_cache(tmp_path_factory: pytest.TempPathFactory, short_teacher: Path, corpus: Path) -> Path:
    """Rows of 16 tokens through it. Read only."""
    folder = tmp_path_factory.mktemp("cache") / "short"
    build_cache(build_config(folder, short_teacher, corpus))
    return folder


SAID = "rows of 16 tokens are longer than the 12 that the teacher is made for"


def said_once(text: str) -> bool:
    return " ".join(text.split()).count(SAID) == 1


def words(teacher: Path, corpus: Path, place: Path, command: str) -> list[str]:
    """A command line with rows of 16 tokens."""
    data = ["--data.path", str(corpus), "--data.row-tokens", "16", "--data.eval-rows", "4"]
    if command == "prepare":
        return [command, "--out", str(place), *data, "--data.tokenizer", str(teacher)]
    return [command, "--cache", str(place), *data, "--teacher.path", str(teacher), "--batch-rows", "4"]


@pytest.mark.parametrize("command", ["prepare", "plan", "build"])
def test_who_is_about_to_make_such_rows_says_so(tmp_path, short_teacher, teacher, corpus, console, command):
    assert cli.main(words(short_teacher, corpus, tmp_path / "short", command)) == 0
    said = console.readouterr()
    assert said_once(said.err + said.out)
    assert "set data.row_tokens to 12 or less" in " ".join((said.err + said.out).split())
    if command == "prepare":  # of a tokenizer alone nobody knows what it is for
        assert cli.main(words(short_teacher / "tokenizer.json", corpus, tmp_path / "none", command)) == 0
    else:
        assert cli.main(words(teacher, corpus, tmp_path / "long", command)) == 0
    assert "longer than" not in console.readouterr().err


def test_extensions_say_it(tmp_path, short_cache, short_teacher, corpus, console):
    cache = shutil.copytree(short_cache, tmp_path / "cache")
    changed = build_config(cache, short_teacher, corpus, taps={"mlp_out": {"codec": "bf16"}}, extend=True)
    assert len(build_cache(BuildConfig.model_validate(changed)).segments) == 2
    assert said_once(console.readouterr().err)


def test_inspect_says_it(short_cache, cache, console):
    assert cli.main(["inspect", str(short_cache), "--json"]) == 0
    (warning,) = json.loads(console.readouterr().out)["warnings"]
    assert SAID in warning
    assert cli.main(["inspect", str(cache), "--json"]) == 0
    assert json.loads(console.readouterr().out)["warnings"] == []


@pytest.mark.parametrize("source", ["cache", "online"])
def test_training_says_it(tmp_path, short_cache, console, source):
    train(config(tmp_path / "run", short_cache, source=source, steps=1))
    said = " ".join(console.readouterr().err.split())
    assert said.count("rows of 16 tokens are longer than the 12 that teacher and student are made for") == 1


def test_a_student_may_have_a_context_of_its_own(console, cache, short_cache):
    (plan, short) = (open_cache(Store(str(each)))[0].plan for each in (cache, short_cache))
    for student, its_plan, expected in (
        (replace(TINY, max_positions=8), plan, ["the 8 that the student is"]),
        (replace(TINY, max_positions=8), short, ["the 12 that the teacher is", "the 8 that the student is"]),
        (TINY, short, ["the 12 that the teacher is"]),
        (TINY, plan, []),
    ):
        training._warn_of_length(student, its_plan)
        lines = console.readouterr().err.splitlines()
        assert len(lines) == len(expected)
        assert all(words in line for words, line in zip(expected, lines, strict=True))


def test_plans_of_the_version_before(tmp_path, short_cache, short_teacher):
    """They do not state a context, are the same plans, and the checkpoint tells."""
    now = open_cache(Store(str(short_cache)))[0].plan
    before = now.model_copy(update={"teacher": now.teacher.model_copy(update={"context": None})})
    assert b"context" not in to_canonical(before)
    assert plan_differences(before, now) == {}
    later = {"segment": "0001"}
    assert named_by_plan(before.model_copy(update=later)).segment == named_by_plan(now.model_copy(update=later)).segment
    assert teacher_context(before.teacher) == teacher_context(now.teacher) == 12
    gone = before.teacher.model_copy(update={"path": str(tmp_path / "gone")})
    assert teacher_context(gone) is None
    other = Decoder(replace(load_pretrained(short_teacher).config, hidden_size=32, max_positions=7))
    save_pretrained(other, tmp_path / "gone")
    assert teacher_context(gone) is None  # another model lies there by now
