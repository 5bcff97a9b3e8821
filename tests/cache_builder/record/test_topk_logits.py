"""The tap `topk_logits` through the commands that plan, build, extend, copy, check and show a cache."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import zarr

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.grow.copy import copy_cache
from distillcache.models.checkpoint import load_pretrained
from distillcache.schemas import command_line
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.config import BuildConfig, CopyConfig, PlanConfig, TapsConfig
from distillcache.schemas.errors import ConfigError, NonFiniteError, StorageError
from distillcache.schemas.format.canonical import from_canonical
from distillcache.schemas.format.manifest import Stats
from distillcache.schemas.format.tap_plan import topk_plan
from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main
from distillcache.tools.diff.caches import compare_caches
from distillcache.tools.fidelity.command import check_fidelity
from distillcache.tools.look.inspect import describe_cache
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.tools.look.verify import verify_cache
from distillcache.tools.plan.command import describe_build
from distillcache.trainer.feed.cache_source import CacheSource
from tests.conftest import build_config, save_teacher
from tests.rounding import assert_rounded

ARRAYS = ("topk_logits", "topk_logits.ids", "topk_logits.logsumexp")
K = 5
TOPK = {"k": K, "dtype": "f32"}
DOCS = Path(__file__).parents[3] / "docs" / "cache.md"
ROWS = 38  # of the tiny corpus
IDS = 257  # of the byte tokenizer: the teacher's vocabulary has six more rows


def config_of(folder: Path, teacher: Path, corpus: Path, **changes: object) -> BuildConfig:
    taps = changes.pop("taps", {"topk_logits": TOPK})
    return build_config(folder, teacher, corpus, taps=TapsConfig.model_validate(taps), **changes)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """A cache of the usual taps and the logits. Read only."""
    folder = tmp_path_factory.mktemp("recorded") / "c"
    build_cache(config_of(folder, teacher, corpus))
    return folder


@pytest.fixture(scope="module")
def logits(recorded: Path, teacher: Path) -> np.ndarray:
    """The teacher's own of the tokenizer's ids, float32 `[N, T, IDS]`."""
    batch = CacheSource(str(recorded), ())[range(ROWS)]
    return np.asarray(load_pretrained(teacher)(*(jnp.asarray(batch[name]) for name in FIELDS)).logits)[..., :IDS]


FIELDS = ("tokens", "positions", "segment_ids")


def objects(cache: Path, segment: str = "0000") -> dict[str, bytes]:
    """The stored objects of the logits."""
    folder = cache / "segments" / segment / "taps"
    paths = [path for array in ARRAYS for path in (folder / array / "c").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def read(cache: Path, **options: object) -> dict[str, np.ndarray]:
    return CacheSource(str(cache), ("topk_logits",), **options)[range(ROWS)]["topk_logits"]  # type: ignore[arg-type]


def assert_same_ids(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Of a program that records something else: all but logits that nearly tie are in the same order."""
    assert np.mean(found["ids"] != expected["ids"]) < 0.001


def assert_same_logits(found: Path, expected: Path) -> None:
    """Of builds that record other taps beside them, which are other programs."""
    ours, theirs = read(found), read(expected)
    assert_same_ids(ours, theirs)
    for part in ("codes", "logsumexp"):
        assert_rounded(ours[part], theirs[part])


def test_they_are_the_decoders_own(recorded: Path, logits: np.ndarray) -> None:
    source = CacheSource(str(recorded), ("attn_out", "topk_logits"), blocks=[1])
    parts = source[range(ROWS)]["topk_logits"]
    assert {name: (part.shape, str(part.dtype)) for name, part in parts.items()} == {
        "codes": ((1, ROWS, 16, K), "float32"),
        "ids": ((1, ROWS, 16, K), "int32"),
        "logsumexp": ((1, ROWS, 16, 1), "float32"),
    }
    values, ids, logsumexp = (np.asarray(part)[0] for part in source.codecs["topk_logits"].decode(parts))
    assert (np.diff(values, axis=-1) <= 0).all()
    assert all(len(set(token)) == K for token in ids.reshape(-1, K).tolist())
    np.testing.assert_allclose(values, np.sort(logits, axis=-1)[..., : -K - 1 : -1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(logits, ids, -1), values, rtol=1e-5, atol=1e-5)
    total = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(logsumexp, total, rtol=1e-6)


@pytest.mark.bits
def test_sixteen_bits_by_default(tmp_path: Path, teacher: Path, corpus: Path, recorded: Path) -> None:
    build_cache(config_of(tmp_path / "c", teacher, corpus, taps={"topk_logits": {"k": K}}))
    found, expected = read(tmp_path / "c"), read(recorded)
    assert found["codes"].dtype == np.uint16
    assert_rounded(found["codes"].view(ml_dtypes.bfloat16), expected["codes"].astype(ml_dtypes.bfloat16), "bf16")
    assert_same_ids(found, expected)
    assert_rounded(found["logsumexp"], expected["logsumexp"])


@pytest.mark.bits
def test_the_largest_of_a_bfloat16_teacher_are_kept_as_they_are(tmp_path: Path, corpus: Path) -> None:
    low = save_teacher(tmp_path / "low", dtype="bfloat16")
    caches = {dtype: tmp_path / dtype for dtype in ("bf16", "f32")}
    for dtype, folder in caches.items():
        build_cache(config_of(folder, low, corpus, taps={"topk_logits": {"k": K, "dtype": dtype}}))
    exact = read(caches["f32"])["codes"]
    np.testing.assert_array_equal(exact, exact.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert_rounded(read(caches["bf16"])["codes"].view(ml_dtypes.bfloat16), exact, "bf16")


def test_any_reader_opens_the_arrays(recorded: Path) -> None:
    parts = read(recorded)
    for array, part in zip(ARRAYS, ("codes", "ids", "logsumexp"), strict=True):
        opened = zarr.open_array(recorded / "segments/0000/taps" / array, mode="r")
        assert opened.shape == (ROWS, 1, 16, parts[part].shape[-1])
        np.testing.assert_array_equal(opened[:], np.moveaxis(parts[part], 0, 1))
    for part, expected in read(recorded, direct=False).items():  # through TensorStore, as a bucket is read
        np.testing.assert_array_equal(expected, parts[part])


def test_the_lines_of_the_docs(tmp_path: Path, teacher: Path, corpus: Path, logits: np.ndarray) -> None:
    build_cache(config_of(tmp_path / "c", teacher, corpus, taps={"topk_logits": {"k": K}}))
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict[str, np.ndarray] = {}
    exec(next(block for block in blocks if "topk_logits" in block).replace("caches/mine", str(tmp_path / "c")), names)
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[17], -1)), names["ids"], -1)
    np.testing.assert_allclose(names["log_probabilities"], expected, atol=0.02)  # bfloat16 of values up to 4


@pytest.mark.bits
def test_alone_and_without_leaving_streams(tmp_path: Path, teacher: Path, corpus: Path, recorded: Path) -> None:
    taps = {"attn_out": None, "resid": None, "topk_logits": TOPK}
    build_cache(config_of(tmp_path / "c", teacher, corpus, taps=taps))
    assert_same_logits(tmp_path / "c", recorded)  # the last block's MLP runs for the logits
    source = CacheSource(str(recorded), ("resid", "topk_logits"), blocks=[2], leaving=False)
    assert source.slots == {"resid": (2,), "topk_logits": (0,)}


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["all", [0]])
def test_a_cache_is_extended_by_them(
    tmp_path: Path, cache: Path, recorded: Path, teacher: Path, corpus: Path, blocks: str | list[int]
) -> None:
    folder = shutil.copytree(cache, tmp_path / "c")
    config = config_of(folder, teacher, corpus, extend=True, blocks=blocks)
    manifest = build_cache(config)
    assert [(entry.segment[:4], entry.rows_of) for entry in manifest.segments] == [("0000", None), ("0001", "0000")]
    assert [tap.name for tap in open_cache(Store(str(folder)))[1].plan.taps] == ["topk_logits"]
    source = CacheSource(str(folder), ("attn_out", "topk_logits"), blocks=[2])
    in_first = CacheSource(str(cache), ("attn_out",), blocks=[2])[range(ROWS)]
    np.testing.assert_array_equal(source[range(ROWS)]["attn_out"]["codes"], in_first["attn_out"]["codes"])
    assert_same_logits(folder, recorded)
    assert verify_cache(Store(str(folder)))["findings"] == []
    assert build_cache(config) == manifest
    with pytest.raises(ConfigError, match=r"another codec[\s\S]*taps.topk_logits.k +there 5, here 6"):
        build_cache(config_of(folder, teacher, corpus, extend=True, taps={"topk_logits": {**TOPK, "k": 6}}))


def interrupt(monkeypatch: pytest.MonkeyPatch, config: BuildConfig) -> None:
    """Begin a build that ends with its third shard."""
    real = Store.write

    def write(store: Store, key: str, value: bytes) -> None:
        if key.endswith("taps/topk_logits.ids/c/2/0/0/0"):
            raise StorageError("an object cannot be written", {"object": key})
        real(store, key, value)

    monkeypatch.setattr(Store, "write", write)
    with pytest.raises(StorageError, match=r"shard +2"):
        build_cache(config)


@pytest.mark.slow
def test_an_interrupted_build_ends_in_the_same_bytes(
    tmp_path: Path, teacher: Path, corpus: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    with monkeypatch.context() as patch:
        interrupt(patch, config_of(tmp_path / "c", teacher, corpus))
    build_cache(config_of(tmp_path / "c", teacher, corpus))
    assert objects(tmp_path / "c") == objects(recorded)


def test_a_flipped_byte_is_found(tmp_path: Path, recorded: Path) -> None:
    folder = shutil.copytree(recorded, tmp_path / "c")
    for array in ARRAYS:
        path = folder / "segments/0000/taps" / array / "c/1/0/0/0"
        width = 4 * 16 * (1 if array == "topk_logits.logsumexp" else K)
        data = bytearray(path.read_bytes())
        data[2 * width + 7] ^= 1  # the third row of shard 1
        path.write_bytes(data)
        (found,) = verify_cache(Store(str(folder)))["findings"]
        assert (found["what"], found["object"]) == ("damaged", f"segments/0000/taps/{array}/c/1/0/0/0")
        assert (found["shard"], found["rows"], found["tap"]) == (1, [10, 11], "topk_logits")
        data[2 * width + 7] ^= 1
        path.write_bytes(data)
    assert verify_cache(Store(str(folder)))["findings"] == []


@pytest.mark.slow
def test_a_damaged_object_is_computed_again(tmp_path: Path, recorded: Path, teacher: Path, corpus: Path) -> None:
    folder = shutil.copytree(recorded, tmp_path / "c")
    (folder / "segments/0000/taps/topk_logits.ids/c/3/0/0/0").unlink()
    build_cache(config_of(folder, teacher, corpus, repair=True))
    assert objects(folder) == objects(recorded)


def test_what_is_planned_is_what_is_built(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    taps = {"attn_out": {"codec": "int8"}, "topk_logits": {"k": K}}
    config = config_of(tmp_path / "c", teacher, corpus, taps=taps)
    report = describe_build(PlanConfig.model_validate({**config.model_dump(exclude_unset=True), "measure": False}))
    build_cache(config)
    (tap,) = (tap for tap in report["taps"] if tap["name"] == "topk_logits")
    assert tap["bytes_per_token"] == K * (2 + 4) + 4
    assert (tap["codec"], tap["slots"], sorted(tap["arrays"])) == ("bf16, the largest 5 of 257 ids", 1, sorted(ARRAYS))
    folder = tmp_path / "c" / "segments/0000/taps"
    for array, facts in tap["arrays"].items():
        paths = list((folder / array).glob("c/*/*/*/*"))
        assert len(paths) == facts["objects"] == 5
        assert max(path.stat().st_size for path in paths) == facts["object_bytes"] + 16 * 8 + 4  # and the chunks' index
    index = tmp_path / "c" / "segments/0000/index.bin"
    assert report["bytes"] == sum(each["bytes"] for each in report["taps"]) + 13 * 16 * ROWS + index.stat().st_size
    sizes = {(choice["codec"], choice["blocks"]): choice["bytes_per_token"] for choice in report["choices"]}
    assert sizes["bf16", 3] == (3 + 4) * 24 * 2 + K * 6 + 4  # as they are, whatever the other taps' codec


def test_more_than_the_vocabulary_is_refused(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"fewer logits[\s\S]*258[\s\S]*257 ids, 6 rows of padding"):
        build_cache(config_of(tmp_path / "c", teacher, corpus, taps={"topk_logits": {"k": IDS + 1}}))
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_copy_keeps_or_drops_them(tmp_path: Path, recorded: Path) -> None:
    def copy(name: str, **values: object) -> Path:
        copy_cache(CopyConfig.model_validate({"src": str(recorded), "dst": str(tmp_path / name), **values}))
        assert verify_cache(Store(str(tmp_path / name)))["findings"] == []
        return tmp_path / name

    kept = copy("kept", blocks=[1], taps={"resid": {"codec": "int8", "group": 8}}, shard_rows=8)
    assert objects(kept) == objects(recorded)
    stats = [from_canonical(Stats, (c / "segments/0000/stats.json").read_bytes(), "") for c in (kept, recorded)]
    np.testing.assert_allclose(*(each.taps["topk_logits"].square_sum for each in stats), rtol=1e-6)
    assert stats[0].taps["topk_logits"].count == stats[1].taps["topk_logits"].count
    dropped = copy("dropped", taps={"topk_logits": None})
    assert not objects(dropped)
    assert "topk_logits" not in open_cache(Store(str(dropped)))[0].plan.config["taps"]
    alone = copy("alone", rows="eval", taps={"attn_out": None, "resid": None})
    assert len(CacheSource(str(alone), ("topk_logits",))) == 4
    packed = copy("packed", compress="blosc")
    np.testing.assert_array_equal(read(packed)["ids"], read(recorded)["ids"])
    plan = open_cache(Store(str(kept)))[0].plan
    assert plan.config["taps"]["topk_logits"] == TOPK  # as a build would name them


def test_statistics_are_of_the_values(recorded: Path, logits: np.ndarray) -> None:
    batch = CacheSource(str(recorded), ())[range(ROWS)]
    real = np.sort(logits, axis=-1)[..., -K:][batch["segment_ids"] > 0]
    stats = from_canonical(Stats, (recorded / "segments/0000/stats.json").read_bytes(), "").taps["topk_logits"]
    np.testing.assert_allclose(stats.square_sum, [np.square(real).sum()], rtol=1e-4)
    np.testing.assert_allclose(stats.abs_max, [np.abs(real).max()], rtol=1e-5)
    assert stats.count == real.size
    (tap,) = (tap for tap in describe_cache(Store(str(recorded)))["taps"] if tap["name"] == "topk_logits")
    np.testing.assert_allclose(tap["rms"], [np.sqrt(np.square(real).mean())], rtol=1e-4)


def test_inspect_shows_them(
    recorded: Path, console: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(recorded)]) == 0
    shown = console.readouterr().out
    assert "f32, the largest 5" in shown
    assert all(array in shown for array in ARRAYS)
    assert main(["inspect", str(recorded), "--json"]) == 0
    (tap,) = (tap for tap in json.loads(console.readouterr().out)["taps"] if tap["name"] == "topk_logits")
    assert (tap["slots"], tap["bytes_per_token"], tap["objects_per_shard"]) == ([0], K * 8 + 4, 3)


def test_logits_that_are_not_finite_stop_the_build(tmp_path: Path, corpus: Path) -> None:
    broken = save_teacher(tmp_path / "teacher")
    tensors = safetensors.numpy.load_file(broken / "model.safetensors")
    tensors["lm_head.weight"][7] = 3e38  # finite, but its products are not
    safetensors.numpy.save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    build_cache(build_config(tmp_path / "without", broken, corpus))  # nothing else passes through the head
    with pytest.raises(NonFiniteError, match=r"topk_logits") as caught:
        build_cache(config_of(tmp_path / "c", broken, corpus))
    assert "block" not in caught.value.facts


def without_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan logits of every row of the vocabulary, as versions before did."""
    monkeypatch.setattr(
        "distillcache.schemas.format.tap_plan.topk_plan",
        lambda config, hidden, vocab, _: topk_plan(config, hidden, vocab),
    )


def counted_ids(cache: Path) -> list[int | None]:
    plans = [segment.plan for segment in open_cache(Store(str(cache)))]
    return [tap.vocab_size for plan in plans for tap in plan.taps if tap.k is not None]


def test_padding_is_left_out_and_an_older_cache_keeps_its_meaning(
    tmp_path: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built, gone on with, extended and repaired: an older plan's logits stay those of all 263 rows."""
    padded = save_teacher(tmp_path / "padded")
    tensors = safetensors.numpy.load_file(padded / "model.safetensors")
    head = tensors["lm_head.weight"].copy()
    head[IDS] = 40 * head[7]  # a row of padding that would be the largest wherever that of id 7 is positive
    safetensors.numpy.save_file({**tensors, "lm_head.weight": head}, padded / "model.safetensors", {"format": "pt"})
    taps = {"attn_out": None, "resid": None, "topk_logits": TOPK}
    new, old = (config_of(tmp_path / name, padded, corpus, taps=taps) for name in ("new", "old"))
    build_cache(new)
    with monkeypatch.context() as patch:
        without_ids(patch)
        interrupt(patch, old)
    assert (
        json.loads((tmp_path / "old/segments/0000/plan.json").read_text())["taps"][0].keys().isdisjoint(["vocab_size"])
    )
    build_cache(old)  # goes on as it was begun
    assert (read(tmp_path / "new")["ids"] < IDS).all()
    assert (read(tmp_path / "old")["ids"] == IDS).any()
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "another text " * 9}) + "\n")
    for config in (new, old):
        build_cache(
            config.model_copy(update={"extend": True, "data": config.data.model_copy(update={"path": str(more)})})
        )
    assert counted_ids(tmp_path / "new") == [IDS, IDS]
    assert counted_ids(tmp_path / "old") == [None, None]
    whole = objects(tmp_path / "old")
    victim = next((tmp_path / "old/segments/0000/taps/topk_logits/c").rglob("[0-9]"))
    while victim.is_dir():
        victim = sorted(victim.iterdir())[0]
    victim.write_bytes(b"")
    build_cache(old.model_copy(update={"repair": True}))
    assert objects(tmp_path / "old") == whole
    for name in ("new", "old"):
        found = check_fidelity(StoredRows(str(tmp_path / name)), None, 4, 0)
        assert (found["verdict"]["kind"], found["topk_logits"]["wrong_rows"]) == ("faithful", 0)
        assert main(["show", str(tmp_path / name)]) == 0  # a row of padding has no text, and no traceback
    lines = compare_caches(StoredRows(str(tmp_path / "old")), StoredRows(str(tmp_path / "new")), 4, 0)["summary"]
    assert "0000.taps.topk_logits.vocab_size None and 257" in lines


def test_a_cache_without_them_is_what_it_was(cache: Path, teacher: Path, corpus: Path) -> None:
    """Plans and configs do not name what is not recorded, so caches of before compare as equal."""
    plan = json.loads((cache / "segments/0000/plan.json").read_bytes())
    assert "topk_logits" not in plan["config"]["taps"]
    assert all("k" not in tap for tap in plan["taps"])


def test_help_names_them() -> None:
    text = command_line.help_text(BuildConfig, "distillcache build")
    assert "--taps.topk-logits.k int" in text
    assert "--taps.topk-logits.dtype bf16|f32" in text
    assert "--taps.topk-logits keep" in command_line.help_text(CopyConfig, "distillcache copy")
    config = command_line.parse(
        BuildConfig,
        ["--cache", "c", "--teacher.path", "t", "--data.path", "d", "--taps.topk-logits.k", "16"],
        "distillcache build",
    )
    assert config.taps.topk_logits is not None
    assert (config.taps.topk_logits.k, config.taps.topk_logits.dtype) == (16, "bf16")
