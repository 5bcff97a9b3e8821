"""A copy: the same codes where the codec stays, what a build would have given where it does not."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cache_builder.build import build_cache
from cache_builder.copy import copy_cache
from schemas import layout
from schemas.config import CopyConfig, DataConfig, TapConfig, TapsConfig
from schemas.errors import ConfigError, DamageError, InputError, PlanMismatchError, StorageError
from schemas.segment import read_manifest
from schemas.storage import Store
from tests.conftest import build_config, save_teacher
from tools.cli import main
from tools.verify import verify_cache
from trainer.feed import CacheSource

INT8 = {"codec": "int8", "group": 8}
CODED = {
    "int8": {"attn_out": INT8, "resid": INT8},
    "fp8": {"attn_out": {"codec": "fp8"}, "resid": {"codec": "fp8"}},
    "int4 delta": {"attn_out": {**INT8, "codec": "int4"}, "resid": {**INT8, "delta": True, "keyframe_every": 2}},
}


def copy(src: Path, dst: Path, **values: object) -> None:
    copy_cache(CopyConfig.model_validate({"src": str(src), "dst": str(dst), **values}))


def tree(cache: Path) -> dict[str, bytes]:
    """Every file but the plan, which says what the copy was made from, and what follows from the plan."""
    found = {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.endswith(("plan.json", "manifest.json"))}


def codes(cache: Path, tap: str, rows: list[int], blocks: list[int] | None = None) -> dict[str, np.ndarray]:
    return CacheSource(str(cache), (tap,), blocks)[rows][tap]


@pytest.fixture(scope="module")
def bf16_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16 stores what it computes as it is."""
    return save_teacher(tmp_path_factory.mktemp("bf16") / "teacher", dtype="bfloat16")


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory, bf16_teacher: Path, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("lossless") / "c"
    build_cache(build_config(folder, bf16_teacher, corpus))
    return folder


@pytest.mark.parametrize("name", CODED)
def test_transcoding_gives_what_a_build_gives(
    tmp_path: Path, lossless: Path, bf16_teacher: Path, corpus: Path, name: str
) -> None:
    copy(lossless, tmp_path / "copy", taps=CODED[name], shard_rows=8)
    build_cache(build_config(tmp_path / "built", bf16_teacher, corpus, taps=TapsConfig.model_validate(CODED[name])))
    rows = list(range(38))
    for tap in ("resid", "attn_out"):
        found, expected = codes(tmp_path / "copy", tap, rows), codes(tmp_path / "built", tap, rows)
        assert found.keys() == expected.keys()
        for part in expected:
            np.testing.assert_array_equal(found[part], expected[part])
    assert verify_cache(Store(str(tmp_path / "copy")))["findings"] == []


@pytest.mark.parametrize("name", [None, *CODED])
def test_an_unchanged_codec_keeps_the_codes(
    tmp_path: Path, cache: Path, teacher: Path, corpus: Path, name: str | None
) -> None:
    source = cache
    if name is not None:
        source = tmp_path / "coded"
        build_cache(build_config(source, teacher, corpus, taps=TapsConfig.model_validate(CODED[name])))
    copy(source, tmp_path / "copy", shard_rows=8)
    one, other = tree(tmp_path / "copy"), tree(source)
    for files in (one, other):
        files.pop("segments/0000/stats.json")  # of what is stored: not what was cast
    assert one == other


def test_rows_blocks_and_taps_can_be_chosen(tmp_path: Path, cache: Path) -> None:
    whole = CacheSource(str(cache))
    held_out = list(whole.plan.rows.eval_indices)
    train = [number for number in range(38) if number not in held_out]
    for rows, numbers in {"train": train, "eval": held_out, "5:20": list(range(5, 20))}.items():
        folder = tmp_path / rows.replace(":", "-")
        copy(cache, folder, rows=rows, blocks=[1], taps={"attn_out": None})
        source = CacheSource(str(folder), ("resid",))
        assert (source.blocks, source.slots["resid"]) == ((1,), (1, 2))
        batch, expected = source[range(len(source))], whole[numbers]
        np.testing.assert_array_equal(batch["tokens"], expected["tokens"])
        np.testing.assert_array_equal(batch["resid"]["codes"], expected["resid"]["codes"][1:3])
        assert len(CacheSource(str(folder), (), split="eval")) == len(set(numbers) & set(held_out))
        manifest = read_manifest(Store(str(folder)))
        assert manifest is not None
        assert manifest.tokens == np.count_nonzero(expected["segment_ids"])


def test_segments_become_one(tmp_path: Path, teacher: Path, corpus: Path, cache: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "some more text " * 12}) + "\n")
    folder = tmp_path / "c"
    delta = TapConfig.model_validate({**INT8, "delta": True, "keyframe_every": 2})
    for taps in (TapsConfig(), TapsConfig(attn_out=None, resid=None, mlp_out=TapConfig())):
        build_cache(build_config(folder, teacher, corpus, taps=taps, extend=folder.exists()))
    data = DataConfig(path=str(more), row_tokens=16, eval_rows=2)
    taps = TapsConfig(mlp_out=TapConfig())
    build_cache(build_config(folder, teacher, corpus, taps=taps, data=data, extend=True))
    copy(folder, tmp_path / "copy", taps={"resid": delta})
    copy(cache, tmp_path / "first", taps={"resid": delta, "attn_out": None})
    rows = list(range(38))
    for part, expected in codes(tmp_path / "first", "resid", rows).items():
        np.testing.assert_array_equal(codes(tmp_path / "copy", "resid", rows)[part], expected)
    names = ("attn_out", "mlp_out")
    one, other = CacheSource(str(tmp_path / "copy"), names), CacheSource(str(folder), names)
    assert len(one) == len(other) == 38 + 12
    for tap in names:
        np.testing.assert_array_equal(one[range(50)][tap]["codes"], other[range(50)][tap]["codes"])
    assert verify_cache(Store(str(tmp_path / "copy")))["findings"] == []


def test_delta_coded_segments_are_joined(tmp_path: Path, teacher: Path, corpus: Path, cache: Path) -> None:
    """Coded anew, since the second segment's slots cannot lean on the first one's; the error stays the codec's."""
    taps = TapsConfig.model_validate({"resid": {**INT8, "delta": True}, "attn_out": None})
    for blocks in ([0], [1, 2]):
        build_cache(build_config(tmp_path / "c", teacher, corpus, taps=taps, blocks=blocks, extend=blocks != [0]))
    copy(tmp_path / "c", tmp_path / "copy")
    source = CacheSource(str(tmp_path / "copy"), ("resid",))
    found = np.asarray(source.codecs["resid"].decode(source[range(38)]["resid"]))
    expected = codes(cache, "resid", list(range(38)))["codes"].view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_a_stopped_copy_goes_on(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"taps": CODED["int8"], "shard_rows": 8}
    copy(cache, tmp_path / "one", **values)
    real = Store.write

    def write(store: Store, key: str, value: bytes) -> None:
        if key.startswith("segments/0000/taps/resid/c/2/"):
            raise StorageError("an object cannot be written", {"object": key})
        real(store, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", write)
        with pytest.raises(StorageError, match=r"shard +2"):
            copy(cache, tmp_path / "two", **values)
    assert read_manifest(Store(str(tmp_path / "two"))) is None
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("taps/attn_out/c/0/**/0")}
    assert kept
    copy(cache, tmp_path / "two", **values)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    before = tree(tmp_path / "two")
    copy(cache, tmp_path / "two", **values)
    assert tree(tmp_path / "two") == before


def test_what_cannot_be_copied_is_refused(tmp_path: Path, cache: Path, lossless: Path) -> None:
    with pytest.raises(InputError, match="no cache here"):
        copy(tmp_path / "nothing", tmp_path / "c")
    with pytest.raises(ConfigError, match="onto itself"):
        copy(cache, cache)
    with pytest.raises(InputError, match="does not hold these rows"):
        copy(cache, tmp_path / "c", rows="30:99")
    with pytest.raises(InputError, match="does not hold these blocks"):
        copy(cache, tmp_path / "c", blocks=[7])
    with pytest.raises(InputError, match="does not hold this tap"):
        copy(cache, tmp_path / "c", taps={"mlp_out": {"codec": "bf16"}})
    assert not (tmp_path / "c").exists()
    copy(cache, tmp_path / "c")
    with pytest.raises(PlanMismatchError, match="copied_from"):
        copy(lossless, tmp_path / "c")


def test_a_damaged_source_is_not_copied(tmp_path: Path, lossless: Path) -> None:
    source = tmp_path / "source"
    copy(lossless, source)
    victim = source / layout.object_key("0000", "resid", 0, 0)
    victim.write_bytes(bytes([victim.read_bytes()[0] ^ 1]) + victim.read_bytes()[1:])
    with pytest.raises(DamageError, match="not what was committed"):
        copy(source, tmp_path / "c")
    victim.unlink()
    with pytest.raises(DamageError, match="cannot be read"):
        copy(source, tmp_path / "c")
    assert not (tmp_path / "c" / layout.MANIFEST).exists()


def test_the_command_line(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["copy", str(cache), str(tmp_path / "c"), "--taps.resid.codec", "fp8", "--taps.attn_out", "null", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 38
    assert CacheSource(str(tmp_path / "c"), ("resid",)).taps["resid"].codec == "fp8"
