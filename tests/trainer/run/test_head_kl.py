"""KL to the teacher's whole distribution in runs: from its last stream and head, against its recorded logits."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.schemas.config import DataConfig
from distillcache.schemas.config.train import LossConfig
from distillcache.schemas.errors import CheckpointError, ConfigError, InputError, Interrupted
from distillcache.schemas.runtime.signals import StopRequest
from distillcache.trainer import __main__, loop
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.feed.open import Sources
from distillcache.trainer.losses import counted_predictions
from distillcache.trainer.run.checkpoints import load_student
from distillcache.trainer.run.exact import Exact, exact_figures
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.step.parameters import all_parameters
from distillcache.trainer.terms.tokens import TokensTerm
from distillcache.trainer.train import train
from tests.conftest import TINY, build_config, save_teacher
from tests.trainer.test_train import config

GEMMA = replace(TINY, tie_embeddings=True, norm_product="offset", logits_softcap=4.0, embed_scale=3.0)
LAST = {"attn_out": None, "resid": {"codec": "f32", "slots": ["last"], "head": True}}
IDS = 257  # of the byte tokenizer; TINY has rows for 263


def trained_config(run: Path, cache: Path, kl: dict[str, object] | None = None, **changes: Any) -> Any:
    """Feature mode, KL and cross-entropy, no attention outputs; batches of uneven micro-batches."""
    loss = {"alpha": 0.6, "tau": 2.0, "feature": {"weight": 0.0}, "kl": kl or {}}
    values = {"mode": "feature", "steps": 3, "micro_batches": 2, "loss": loss}
    return config(run, cache, **{**values, **changes})


def timeless(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_metrics(str(run))]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "gemma", GEMMA, seed=2)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """A lossless cache of the last stream and of all logits."""
    folder = tmp_path_factory.mktemp("cache") / "both"
    taps = {**LAST, "topk_logits": {"k": IDS, "dtype": "f32"}}
    build_cache(build_config(folder, teacher, corpus, taps=taps))
    return folder


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """A lossless cache of the last stream alone, with the head."""
    folder = tmp_path_factory.mktemp("cache") / "last"
    build_cache(build_config(folder, teacher, corpus, taps=LAST))
    return folder


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


class Oracle(NamedTuple):
    """Means over the predictions that count, float64."""

    ce: float
    teacher: float
    kl: float
    agreement: float


def oracle(student: Decoder, teacher: Decoder, batch: dict[str, Any], ids: int) -> Oracle:
    """The figures from logits of whole decoders."""
    fields = [jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids")]
    s, t = (log_softmax(np.asarray(model(*fields).logits)[..., :ids]) for model in (student, teacher))
    counts = np.asarray(counted_predictions(fields[2], jnp.asarray(batch["loss_mask"])))
    nexts = np.pad(batch["tokens"][:, 1:], ((0, 0), (0, 1)))[..., None]
    each = [
        -np.take_along_axis(s, nexts, -1)[..., 0],
        -np.take_along_axis(t, nexts, -1)[..., 0],
        (np.exp(t) * (t - s)).sum(-1),
        s.argmax(-1) == t.argmax(-1),
    ]
    return Oracle(*(float(values[counts].mean()) for values in each))


@pytest.mark.parametrize(
    "direction", ["jsd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("forward", "reverse", "skew"))]
)
def test_a_run_is_that_from_all_recorded_logits(tmp_path: Path, both: Path, direction: str) -> None:
    """Two independent paths: streams and heads in tiles here, logits of a row at a time there."""
    for targets in ("head", "topk"):
        train(trained_config(tmp_path / targets, both, {"targets": targets, "direction": direction}))
    for head, topk in zip(timeless(tmp_path / "head"), timeless(tmp_path / "topk"), strict=True):
        same = head.keys() & topk.keys()
        assert head.keys() - same <= {"logits/agreement"}
        assert topk.keys() - same <= {"logits/targets_covered"}
        for name in same:
            assert head[name] == pytest.approx(topk[name], rel=2e-5, abs=1e-6), name
    heads, topks = (all_parameters(load_student(str(tmp_path / name)).decoder) for name in ("head", "topk"))
    for name, value in heads.items():
        np.testing.assert_allclose(value, topks[name], rtol=2e-3, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["tiny", "gemma"])
@pytest.mark.parametrize("rows", [IDS, 263, 280])
def test_figures_against_float64(
    tmp_path: Path, kind: str, rows: int, teacher: Path, gemma: Path, corpus: Path, last: Path
) -> None:
    """On packed rows; students with fewer, as many and more rows of padding than the teacher, tied or not."""
    path, cache = teacher, last
    if kind == "gemma":
        path, cache = gemma, tmp_path / "c"
        build_cache(build_config(cache, gemma, corpus, taps=LAST))
    model = load_pretrained(path, dtype="float32")
    student: ModelConfig = replace(model.config, vocab_size=rows, tie_embeddings=rows == 280)
    decoder = Decoder(student, rngs=nnx.Rngs(7))
    sources = Sources(trained_config(tmp_path / "r", cache))
    found = exact_figures(decoder, Exact.of(sources, student), 3)
    source = sources.held_out_last
    ids = 263 if rows == 263 else IDS  # of equal padding nothing is left out: it is trained as any other row
    expected = oracle(decoder, model, source[list(range(len(source)))], ids)
    assert found.whole.perplexity == pytest.approx(np.exp(expected.ce), rel=1e-5)
    assert found.teacher_perplexity == pytest.approx(np.exp(expected.teacher), rel=1e-5)
    assert found.kl == pytest.approx(expected.kl, rel=1e-5)
    assert found.agreement == pytest.approx(expected.agreement, abs=1e-9)


def test_a_teacher_as_its_own_student(tmp_path: Path, gemma: Path, corpus: Path) -> None:
    """On packed rows of a soft-capped and tied teacher the KL is zero to rounding, near it the loss stays."""
    build_cache(build_config(tmp_path / "c", gemma, corpus, taps=LAST))
    train(trained_config(tmp_path / "r", tmp_path / "c", student={"init": "teacher"}, steps=1))
    first = read_evaluations(str(tmp_path / "r"))[0]
    assert first.kl is not None
    assert 0 <= first.kl < 1e-9
    assert first.agreement == 1
    assert first.teacher_perplexity == pytest.approx(first.perplexity, rel=1e-6)
    (line,) = [line for line in timeless(tmp_path / "r") if line["step"] == 1]
    assert 0 <= line["distill/kl_div_at_T"] < 1e-9


def test_online_is_offline_to_the_bit(tmp_path: Path, both: Path, teacher: Path) -> None:
    rows = shutil.copytree(both, tmp_path / "rows", ignore=shutil.ignore_patterns("taps"))
    for source, cache in (("cache", both), ("online", rows)):
        train(trained_config(tmp_path / source, cache, {"targets": "head"}, source=source))
    assert timeless(tmp_path / "online") == timeless(tmp_path / "cache")
    assert read_evaluations(str(tmp_path / "online")) == read_evaluations(str(tmp_path / "cache"))


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, last: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(trained_config(tmp_path / "whole", last, steps=4))

    def asked(peers: object, stop: StopRequest, step: int) -> bool:
        return step == 2

    with monkeypatch.context() as patch:
        patch.setattr(loop.Peers, "should_stop", asked)
        with pytest.raises(Interrupted):
            train(trained_config(tmp_path / "stopped", last, steps=4))
    train(trained_config(tmp_path / "stopped", last, steps=4))
    assert timeless(tmp_path / "stopped") == timeless(tmp_path / "whole")
    assert read_evaluations(str(tmp_path / "stopped")) == read_evaluations(str(tmp_path / "whole"))


@pytest.mark.slow
def test_a_lossy_stream_is_near(tmp_path: Path, last: Path, teacher: Path, corpus: Path) -> None:
    """Of an int8 stream with deltas, among all slots: the head comes from the checkpoint."""
    taps = {"resid": {"codec": "int8", "delta": True, "keyframe_every": 3}}
    build_cache(build_config(tmp_path / "c", teacher, corpus, taps=taps))
    for name, cache in (("exact", last), ("near", tmp_path / "c")):
        train(trained_config(tmp_path / name, cache, {"targets": "head"}, steps=1))
    exact, near = (read_evaluations(str(tmp_path / name))[0] for name in ("exact", "near"))
    assert near.kl == pytest.approx(exact.kl, rel=0.02)
    assert near.kl != exact.kl
    assert near.teacher_perplexity == pytest.approx(exact.teacher_perplexity, rel=0.01)
    assert near.cosine
    assert not exact.cosine


@pytest.mark.slow
def test_features_and_kl_together(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    """Each keeps what it was alone, at the first step."""
    data = DataConfig(path=str(corpus), row_tokens=16, eval_rows=0)
    build_cache(build_config(tmp_path / "c", teacher, corpus, data=data, taps={"resid": {"codec": "f32"}}))
    losses = {
        "both": {"alpha": 0.5, "kl": {"targets": "head"}, "feature": {"weight": 0.7}},
        "kl": {"alpha": 0.5, "kl": {"targets": "head"}, "feature": {"weight": 0.0}},
        "feature": {"feature": {"weight": 0.7}},
    }
    found = {}
    for name, loss in losses.items():
        train(config(tmp_path / name, tmp_path / "c", mode="feature", steps=1, loss=loss))
        (found[name],) = [line for line in timeless(tmp_path / name) if line["step"] == 1]
    assert found["both"]["distill/soft_loss"] == found["kl"]["distill/soft_loss"] > 0
    assert found["both"]["feature/mean"] == found["feature"]["feature/mean"] > 0
    assert found["both"]["distill/total_loss"] == pytest.approx(
        found["kl"]["distill/total_loss"] + found["feature"]["distill/out_proj_feature_loss"], rel=1e-6
    )


def test_blockwise_runs_say_the_kl_if_asked(tmp_path: Path, cache: Path) -> None:
    result = train(config(tmp_path / "r", cache, steps=1, loss={"kl": {"targets": "head"}}))
    said = "\n".join(__main__._lines(result))
    assert "KL from the teacher" in said
    assert re.search(r"same first choice as the teacher: [\d.]+% of tokens before, [\d.]+% after", said)
    found = read_evaluations(str(tmp_path / "r"))
    assert all((entry.kl or 0) > 0 and entry.agreement is not None and entry.cosine for entry in found)
    train(config(tmp_path / "silent", cache, steps=1))
    assert all(entry.kl is None for entry in read_evaluations(str(tmp_path / "silent")))


class Cache(NamedTuple):
    recorded: frozenset[str]
    last_stream: bool
    keeps_head: bool
    cache: str = "here"


@pytest.mark.parametrize(
    ("wanted", "cache", "expected"),
    [
        ("auto", Cache(frozenset(["topk_logits"]), True, False), "topk"),
        ("auto", Cache(frozenset(["topk_logits"]), True, True), "head"),
        ("auto", Cache(frozenset(["resid"]), True, False), "head"),
        ("auto", Cache(frozenset(["topk_logits"]), False, False), "topk"),
        ("head", Cache(frozenset(["topk_logits"]), True, False), "head"),
        ("topk", Cache(frozenset(["topk_logits"]), True, True), "topk"),
    ],
)
def test_targets_are_chosen_by_what_is_recorded(wanted: str, cache: Cache, expected: str) -> None:
    loss = LossConfig.model_validate({"alpha": 0.5, "kl": {"targets": wanted}})
    assert TokensTerm().teacher_distribution(loss, cache) == expected
    assert TokensTerm().teacher_distribution(LossConfig.model_validate({"kl": {"targets": wanted}}), cache) is None


@pytest.mark.parametrize(
    ("wanted", "cache", "told"),
    [
        ("auto", Cache(frozenset(["attn_out"]), False, False), "taps.resid.slots: [last]"),
        ("head", Cache(frozenset(["topk_logits"]), False, False), "taps.resid.slots: [last]"),
        ("topk", Cache(frozenset(["resid"]), True, True), "with taps.topk_logits"),
    ],
)
def test_what_the_cache_lacks_is_said(wanted: str, cache: Cache, told: str) -> None:
    loss = LossConfig.model_validate({"alpha": 0.5, "kl": {"targets": wanted}})
    with pytest.raises(ConfigError) as caught:
        TokensTerm().teacher_distribution(loss, cache)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "kl", [{"share": 0.2}, {"direction": "jsd", "share": 0.0}, {"direction": "reverse", "share": 0}]
)
def test_shares_that_do_not_fit(tmp_path: Path, last: Path, kl: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="share of a mixture"):
        train(trained_config(tmp_path / "r", last, kl))
    assert not (tmp_path / "r").exists()


def test_without_head_and_checkpoint_the_run_is_not_begun(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    moved = shutil.copytree(teacher, tmp_path / "t")
    build_cache(build_config(tmp_path / "c", moved, corpus, taps={"resid": {"slots": ["last"]}}))
    save_pretrained(Decoder(TINY, rngs=nnx.Rngs(5)), tmp_path / "s")
    shutil.copy(moved / "tokenizer.json", tmp_path / "s")
    shutil.rmtree(moved)
    with pytest.raises(CheckpointError, match="needs the teacher's head"):
        train(trained_config(tmp_path / "r", tmp_path / "c", student={"init": str(tmp_path / "s")}))
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_a_cache_of_the_last_slot_trains_no_block(tmp_path: Path, last: Path) -> None:
    with pytest.raises(InputError, match="lacks this tap") as caught:
        train(config(tmp_path / "r", last))
    assert "build --extend" in str(caught.value)
    source = CacheSource(str(last), taps=("resid",), slots={"resid": [3]})
    assert source[[0]]["resid"]["codes"].shape[0] == 1


def test_a_finished_run_needs_no_teacher(
    tmp_path: Path, teacher: Path, corpus: Path, console: pytest.CaptureFixture[str]
) -> None:
    """Its head is read from the checkpoint while it trains."""
    own = tmp_path / "teacher"
    shutil.copytree(teacher, own)
    build_cache(build_config(tmp_path / "cache", own, corpus, taps={"attn_out": None, "resid": {"slots": ["last"]}}))
    settings = trained_config(tmp_path / "run", tmp_path / "cache", steps=1)
    first = train(settings)
    own.rename(tmp_path / "gone")
    again = train(settings)
    assert "is finished: nothing to do" in console.readouterr().err
    assert (again.steps, again.resumed_from, again.metrics) == (1, 1, first.metrics)
    longer = trained_config(tmp_path / "other", tmp_path / "cache", steps=1)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        train(longer)
