"""A tiny teacher with a tokenizer, a tiny corpus, and caches made from them: what most tests start from."""

import gc
import json
import os
import re
from collections.abc import Generator, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Small shapes, each run a few times: threads only cost, and most of the time would go into making the code good. The
# emitters of fused loops that go through MLIR take three fifths of what is left, so the older ones do it; an extra
# option that XLA no longer knows is ignored, a flag would end the process.
# Eight devices, for the tests of meshes; all others use the first.
# The caller's flags come last, where they win: another instruction set is asked for with all the rest as it is. What a
# worker inherits has ours in it already.
os.environ["XLA_FLAGS"] = " ".join(
    dict.fromkeys(
        [
            "--xla_cpu_multi_thread_eigen=false",
            "--xla_backend_optimization_level=0",
            "--xla_force_host_platform_device_count=8",
            "--xla_cpu_parallel_codegen_split_count=1",
            "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
            *os.environ.get("XLA_FLAGS", "").split(),
        ]
    )
)

# Programs compiled once for all tests, workers and later runs: many tests train the same tiny students. A third of the
# time at the first run, two thirds at the next.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# What imports JAX is imported by the fixtures: the process that only hands tests to workers reads this file as well,
# and they start when it has.
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig
from distillcache.schemas.config import BuildConfig, DataConfig, TeacherConfig
from distillcache.schemas.runtime.console import shown_log
from tests.servers.fixtures import gcs, gcs_server, s3, s3_server

# Look for garbage less often: what is imported and collected stays, and tracing makes objects by the million.
gc.set_threshold(50_000, 20, 100)

__all__ = ["gcs", "gcs_server", "s3", "s3_server"]  # fixtures, found here by every test

EOS = "<|end|>"
FOUND = ("slow", "bits")  # marks whose tests are looked for in the files that name them


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, None, None]:
    """Check where marks are named; of the tests that are chosen, the longest come first at every worker.

    The Makefile finds the files of a mark by its word, so a test whose file lacks the word would be lost.
    """
    for path, mark in {(item.path, mark.name) for item in items for mark in item.iter_markers() if mark.name in FOUND}:
        if not re.search(rf"\b{mark}\b", path.read_text()):
            raise pytest.UsageError(f"{path}: a test of this file is marked {mark}; say so in the file")
    yield
    longest = [item for item in items if item.get_closest_marker("longest")]
    others = [item for item in items if not item.get_closest_marker("longest")]
    items[:] = dealt_out(longest, others, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def dealt_out(first: list[pytest.Item], others: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """One list whose equal parts, which workers begin with (`--dist worksteal`), have a share of `first` in front.

    So no worker has all of them, and none is left for the end, when the others would have nothing to do.
    """
    count, found = len(first) + len(others), []
    for worker in range(workers):
        share = first[worker::workers]
        end = count * (worker + 1) // workers - len(found) - len(share)
        found += [*share, *others[: max(end, 0)]]
        others = others[max(end, 0) :]
    return found + others


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of every search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def console(capsys: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    """What a program prints that shows the log, as the command line does."""
    with shown_log():
        yield capsys


TINY = ModelConfig(
    vocab_size=263,  # more than the tokenizer has: padded vocabularies are usual
    hidden_size=24,
    intermediate_size=40,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerGroup((BlockKind(),), 3),),
)


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and EOS: needs no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def save_teacher(folder: Path, config: ModelConfig = TINY, seed: int = 0, dtype: str = "float32") -> Path:
    """A random teacher of this config as an HF directory with a byte tokenizer."""
    from flax import nnx

    from distillcache.models.checkpoint import save_pretrained
    from distillcache.models.decoder import Decoder

    save_pretrained(Decoder(config, dtype=dtype, rngs=nnx.Rngs(seed)), folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven documents of uneven length, some 640 bytes in all: 41 rows of 16 tokens, the last one padded."""
    file = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    words = ["one", "two words", "three short words", "a", "longer text " * 30, "the end. " * 20, "last of all, a line"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    return file


def build_config(cache: Path | str, teacher: Path, corpus: Path, **changes: object) -> BuildConfig:
    """A build of the tiny teacher and corpus: four rows a call, eight a shard, so that the last of each is short."""
    values: dict[str, object] = {
        "cache": str(cache),
        "teacher": TeacherConfig(path=str(teacher)),
        "data": DataConfig(path=str(corpus), row_tokens=16, eval_rows=4),
        "batch_rows": 4,
        "shard_rows": 8,
    }
    return BuildConfig.model_validate({**values, **changes})


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """A finished cache of the tiny teacher. Read only: tests that damage a cache copy it."""
    from distillcache.cache_builder.build import build_cache

    folder = tmp_path_factory.mktemp("cache") / "tiny"
    build_cache(build_config(folder, teacher, corpus))
    return folder
