"""`distillcache fidelity`: ten planted faults, each of which the first line must name."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.schemas.config import TapConfig, TapsConfig
from distillcache.schemas.errors import NonFiniteError
from distillcache.schemas.format.rows import Row
from distillcache.tools.cli import main
from distillcache.tools.fidelity.command import compare_rows
from distillcache.tools.fidelity.live_teacher import LiveTeacher
from distillcache.tools.look.stored_rows import StoredRows
from tests.conftest import build_config, byte_tokenizer, save_teacher
from tests.tools.look.planting import Values, changed, in_every_row, plant, with_rows

TAPS = ("resid", "attn_out")


@pytest.fixture(scope="module")
def live(teacher: Path) -> LiveTeacher:
    return LiveTeacher(str(teacher), "float32", TAPS)


@pytest.fixture(scope="module")
def stranger(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> LiveTeacher:
    """Another teacher of the same shape."""
    return LiveTeacher(str(save_teacher(tmp_path_factory.mktemp("other") / "t", seed=1)), "float32", TAPS)


def looked(cache: Path, live: LiveTeacher, count: int = 8) -> dict[str, Any]:
    rows = StoredRows(str(cache))
    return compare_rows(rows, live, rows.sample(count, seed=0))


def verdict(cache: Path, live: LiveTeacher, count: int = 8) -> tuple[str, str]:
    found = looked(cache, live, count)
    return found["verdict"]["kind"], found["verdict"]["line"]


def from_teacher(values: Values, rows: list[Row], taps_of: Any) -> Values:
    """The numbers that a teacher gives, in the place of those that are stored."""
    found = [taps_of(row) for row in rows]
    return {tap: np.stack([each[tap] for each in found]) for tap in values}


def test_a_whole_cache_is_faithful(cache: Path, live: LiveTeacher) -> None:
    found = looked(cache, live)
    assert found["verdict"]["kind"] == "faithful"
    assert [each["wrong_rows"] for each in found["taps"]] == [0] * 7
    figures = found["taps"][0]
    assert figures["error"] == pytest.approx(figures["codec_error"], rel=0.01)
    assert 1e-3 < figures["error"] < 2.0**-8  # half a unit in the last place of bfloat16, at most


@pytest.mark.parametrize("shift", [1, -2])
def test_shifted_numbers(cache: Path, live: LiveTeacher, tmp_path: Path, shift: int) -> None:
    def roll(_: int, rows: list[Row], values: Values) -> tuple[list[Row], Values]:
        return rows, {tap: np.roll(each, shift, axis=2) for tap, each in values.items()}

    found = looked(plant(cache, tmp_path / "c", roll), live)
    assert found["verdict"]["kind"] == "shifted-tokens"
    assert found["findings"][0]["where"]["shift"] == shift


def test_rows_shifted_behind_the_teacher(cache: Path, live: LiveTeacher, tmp_path: Path) -> None:
    """The teacher saw each token one place earlier than the rows have it."""

    def later(_: int, rows: list[Row], values: Values) -> tuple[list[Row], Values]:
        return rows, from_teacher(values, rows, lambda row: live.variant(row, "shifted +1"))

    kind, line = verdict(plant(cache, tmp_path / "c", later), live)
    assert kind == "shifted-tokens"
    assert "the teacher's" in line


def test_documents_that_saw_each_other(cache: Path, live: LiveTeacher, tmp_path: Path) -> None:
    def merged(_: int, rows: list[Row], values: Values) -> tuple[list[Row], Values]:
        return rows, from_teacher(values, rows, lambda row: live.variant(row, "one document"))

    kind, line = verdict(plant(cache, tmp_path / "c", merged), live, 16)
    assert kind == "wrong-masks"
    assert "crossed document boundaries" in line


@pytest.mark.parametrize("tap", TAPS)
def test_swapped_blocks(cache: Path, live: LiveTeacher, tmp_path: Path, tap: str) -> None:
    def swap(values: np.ndarray) -> np.ndarray:
        return values[:, [0, 2, 1, *range(3, values.shape[1])]]

    found = looked(plant(cache, tmp_path / "c", in_every_row(tap, swap)), live)
    assert found["verdict"]["kind"] == "swapped-blocks"
    assert found["findings"][0]["where"]["slots"] == [[tap, 1, 2], [tap, 2, 1]]
    assert len(found["findings"]) == 1


@pytest.mark.parametrize("factor", [2.0, 1.05, -1.0])
def test_a_scaled_block(cache: Path, live: LiveTeacher, tmp_path: Path, factor: float) -> None:
    scales = np.asarray([1, factor, 1])[None, :, None, None]
    found = looked(plant(cache, tmp_path / "c", in_every_row("attn_out", lambda values: values * scales)), live)
    assert found["verdict"]["kind"] == "scaled-block"
    ((tap, slot, measured),) = found["findings"][0]["where"]["factors"]
    assert (tap, slot) == ("attn_out", 1)
    assert measured == pytest.approx(factor, rel=1e-2)


def test_numbers_that_are_not_finite(cache: Path, live: LiveTeacher, tmp_path: Path) -> None:
    def spoil(values: np.ndarray) -> np.ndarray:
        values[:, 2, :, 5] = np.nan
        return values

    found = looked(plant(cache, tmp_path / "c", in_every_row("resid", spoil)), live)
    assert found["verdict"]["kind"] == "non-finite"
    assert found["findings"][0]["where"]["slots"] == [["resid", 2]]


def test_a_stale_shard(cache: Path, live: LiveTeacher, stranger: LiveTeacher, tmp_path: Path) -> None:
    def stale(shard: int, rows: list[Row], values: Values) -> tuple[list[Row], Values]:
        return rows, from_teacher(values, rows, stranger.taps) if shard == 2 else values

    found = looked(plant(cache, tmp_path / "c", stale), live)
    assert found["verdict"]["kind"] == "stale-shard"
    assert found["findings"][0]["where"]["shards"] == [["0000", 2]]


def test_an_object_left_by_another_build(cache: Path, live: LiveTeacher, tmp_path: Path) -> None:
    """Its receipt is the right one: the digests tell."""
    other = plant(cache, tmp_path / "other", in_every_row("resid", lambda values: values + 1))
    place = "segments/0000/taps/resid/c/1/0/0/0"
    copied = shutil.copytree(cache, tmp_path / "c")
    shutil.copy(other / place, copied / place)
    kind, line = verdict(copied, live)
    assert kind == "stale-shard"
    assert place in line


def test_another_teacher(cache: Path, stranger: LiveTeacher) -> None:
    kind, line = verdict(cache, stranger)
    assert kind == "other-teacher"
    assert "another digest" in line


def test_another_teachers_numbers_under_the_right_name(
    cache: Path, live: LiveTeacher, stranger: LiveTeacher, tmp_path: Path
) -> None:
    def other(_: int, rows: list[Row], values: Values) -> tuple[list[Row], Values]:
        return rows, from_teacher(values, rows, stranger.taps)

    kind, line = verdict(plant(cache, tmp_path / "c", other), live)
    assert kind == "other-teacher"
    assert "although" in line


def test_another_tokenizer(cache: Path, live: LiveTeacher, teacher: Path, tmp_path: Path) -> None:
    """The numbers are the teacher's; only the words are not."""
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    content = json.loads(byte_tokenizer().to_str())
    size = len(content["model"]["vocab"])
    content["model"]["vocab"] = {letter: (at + 32) % size for letter, at in content["model"]["vocab"].items()}
    Tokenizer.from_str(json.dumps(content)).save(str(folder / "tokenizer.json"))
    there = copy.copy(live)
    there.path = str(folder)
    found = looked(cache, there)
    assert found["verdict"]["kind"] == "wrong-tokenizer"
    assert "by the teacher's" in found["verdict"]["line"]
    assert [each["wrong_rows"] for each in found["taps"]] == [0] * 7


def test_rows_of_other_tokens(cache: Path, live: LiveTeacher, tmp_path: Path) -> None:
    rows = with_rows(lambda row: changed(row, tokens=(row.tokens + 32) % 200))
    kind, line = verdict(plant(cache, tmp_path / "c", rows), live)
    assert kind == "other-rows"
    assert "embeds tokens" in line


def masked(row: Row) -> Row:
    return changed(row, loss_mask=np.ones_like(row.loss_mask))


def as_text(row: Row) -> Row:
    real = np.ones_like(row.segment_ids)
    return changed(row, segment_ids=real, positions=np.arange(len(real), dtype=np.int32), loss_mask=real > 0)


@pytest.mark.parametrize("change", [masked, as_text])
def test_padding_counted_as_text(cache: Path, live: LiveTeacher, tmp_path: Path, change: Any) -> None:
    def last(shard: int, rows: list[Row], values: Values) -> tuple[list[Row], Values]:
        new = [change(row) for row in rows] if shard == 4 else rows
        return new, from_teacher(values, new, live.taps) if shard == 4 else values

    found = looked(plant(cache, tmp_path / "c", last), live)
    assert found["verdict"]["kind"] == "padding-as-text", found["findings"]


def test_a_truncated_object(cache: Path, live: LiveTeacher, tmp_path: Path) -> None:
    place = "segments/0000/taps/attn_out/c/3/0/0/0"
    copied = shutil.copytree(cache, tmp_path / "c")
    (copied / place).write_bytes((copied / place).read_bytes()[:-900])
    found = looked(copied, live)
    assert found["verdict"]["kind"] == "truncated-object"
    assert place in found["verdict"]["line"]
    assert len(found["findings"]) == 1
    assert found["rows"]  # the others were compared


def test_int4_on_outlier_dimensions(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    decoder = load_pretrained(str(teacher))
    decoder.embed.set_value(jnp.asarray(decoder.embed[...]).at[:, 5].multiply(40.0))
    save_pretrained(decoder, tmp_path / "t", tokenizer_from=str(teacher))
    tap = TapConfig(codec="int4", group=0, rotate=False)
    taps = TapsConfig(resid=tap, attn_out=tap.model_copy(update={"rotate": True}))
    build_cache(build_config(tmp_path / "c", tmp_path / "t", corpus, taps=taps))
    found = looked(tmp_path / "c", LiveTeacher(str(tmp_path / "t"), "float32", TAPS), 4)
    assert found["verdict"]["kind"] == "lossy-codec", found
    assert found["findings"][0]["where"]["tap"] == "resid"
    assert found["findings"][0]["where"]["outlier_dimensions"][0] == 5
    assert "rotate: true" in found["verdict"]["line"]


def test_a_teacher_whose_numbers_are_not_finite_is_named(cache: Path, teacher: Path, tmp_path: Path) -> None:
    decoder = load_pretrained(str(teacher))
    mlp = decoder.groups[0].blocks[0].mlp
    for matrix in (mlp.up, mlp.down):
        matrix[...] = matrix[...].at[1].set(1e30)
    save_pretrained(decoder, tmp_path / "t", tokenizer_from=str(teacher))
    with pytest.raises(NonFiniteError, match="not finite") as caught:
        looked(cache, LiveTeacher(str(tmp_path / "t"), "float32", TAPS), 2)
    assert caught.value.facts["teacher"] == str(tmp_path / "t")


@pytest.mark.parametrize("size", [1.0, 1e25, 1e37])
def test_the_nearest_embedding_of_any_size(size: float, teacher: Path, tmp_path: Path) -> None:
    decoder = load_pretrained(str(teacher))
    decoder.embed.set_value(jnp.asarray(decoder.embed[...]) * size)
    save_pretrained(decoder, tmp_path / "t", tokenizer_from=str(teacher))
    wanted = np.asarray(decoder.embed[...])[[3, 200, 41]]
    ids, distance = LiveTeacher(str(tmp_path / "t"), "float32", TAPS).seen_tokens(wanted)
    assert ids.tolist() == [3, 200, 41]
    assert (distance < 1e-6).all()


def test_a_cache_that_is_still_being_built(cache: Path, live: LiveTeacher, tmp_path: Path) -> None:
    building = plant(cache, tmp_path / "c", in_every_row("attn_out", lambda values: values[:, [0, 2, 1]]), tidy=False)
    for shard in (1, 3):
        (building / f"segments/0000/receipts/{shard:05d}.json").unlink()
    found = looked(building, live)
    assert not found["finished"]
    assert {row // 8 for row in found["rows"]} == {0, 2, 4}
    assert found["verdict"]["kind"] == "swapped-blocks"


@pytest.mark.slow  # another codec: the same verdicts beside larger errors of its own
def test_faults_in_int8_differences(teacher: Path, corpus: Path, live: LiveTeacher, tmp_path: Path) -> None:
    tap = TapConfig(codec="int8", group=8)
    taps = TapsConfig(attn_out=tap, resid=tap.model_copy(update={"delta": True, "keyframe_every": 2}))
    build_cache(build_config(tmp_path / "c", teacher, corpus, taps=taps))
    assert verdict(tmp_path / "c", live)[0] == "faithful"
    plants = {
        "swapped-blocks": in_every_row("resid", lambda values: values[:, [0, 2, 1, 3]]),
        "scaled-block": in_every_row("attn_out", lambda values: values * np.asarray([1, 1.2, 1])[:, None, None]),
        "shifted-tokens": lambda _, rows, values: (rows, {tap: np.roll(v, 1, 2) for tap, v in values.items()}),
    }
    for kind, change in plants.items():
        found = looked(plant(tmp_path / "c", tmp_path / kind, change), live)
        assert [look["kind"] for look in found["findings"]] == [kind]


def test_the_command(cache: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fidelity", str(cache), "--teacher", str(teacher), "--rows", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"]["kind"] == "faithful"


def test_the_command_with_a_teacher_of_another_shape(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from tests.conftest import TINY

    wider = save_teacher(tmp_path / "t", replace(TINY, hidden_size=32))
    assert main(["fidelity", str(cache), "--teacher", str(wider)]) == 2
    assert "hidden size 32, the cache's teacher had 24" in capsys.readouterr().out
