"""What is planned is what is built: sizes, objects and shards against a finished cache."""

import gzip
import json
import shutil
from collections import namedtuple

import jax
import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.text.files.inputs import input_files
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.config import BuildConfig, DataConfig, PlanConfig
from distillcache.schemas.store.store import Store
from distillcache.tools import cli
from distillcache.tools.plan import command
from distillcache.tools.plan.command import MEASURE_S, count_rows, describe_build, measured_shape, unpacked_bytes
from distillcache.tools.plan.printing import _measured
from tests.conftest import build_config

TAPS = {"attn_out": {"codec": "int8"}, "resid": {"codec": "int8", "delta": True, "keyframe_every": 2}}


def plan_config(config: BuildConfig, **changes: object) -> PlanConfig:
    return PlanConfig.model_validate({**config.model_dump(exclude_unset=True), "measure": False, **changes})


def test_the_plan_is_what_the_build_makes(tmp_path, teacher, corpus):
    config = build_config(tmp_path / "cache", teacher, corpus, taps=TAPS)
    report = describe_build(plan_config(config))
    assert not (tmp_path / "cache").exists()
    manifest = build_cache(config)
    segment = open_cache(Store(config.cache))[0]
    assert report["rows"] == {"count": manifest.rows, "row_tokens": 16, "tokens": manifest.tokens, "exact": True}
    assert report["shards"]["count"] == segment.plan.num_shards
    assert report["shards"]["rows"] == segment.plan.shard_rows
    assert report["bytes_per_token"] == segment.plan.bytes_per_token
    folder = tmp_path / "cache" / "segments" / "0000" / "taps"
    assert report["objects"] == len(list(folder.rglob("c/*/*/*/*")))
    for tap in report["taps"]:
        for array, facts in tap["arrays"].items():
            largest = max(path.stat().st_size for path in folder.glob(f"{array}/c/*/*/*/*"))
            chunks = segment.plan.shard_rows * facts["slots_per_object"]
            assert largest == facts["object_bytes"] + 16 * chunks + 4  # and the index of its chunks
    index = tmp_path / "cache" / "segments" / "0000" / "index.bin"
    taps = sum(tap["bytes"] for tap in report["taps"])
    assert report["bytes"] == taps + 13 * 16 * manifest.rows + index.stat().st_size


def test_other_choices_are_compared(tmp_path, teacher, corpus):
    config = build_config(tmp_path / "cache", teacher, corpus, taps={"attn_out": {"codec": "int8"}, "resid": {}})
    choices = describe_build(plan_config(config))["choices"]
    sizes = {(choice["codec"], choice["blocks"]): choice["bytes_per_token"] for choice in choices}
    assert sizes["bf16", 3] == (3 + 4) * 24 * 2
    assert sizes["bf16", 1] == (1 + 2) * 24 * 2
    assert sizes["int4", 3] < sizes["int8", 3] < sizes["bf16", 3]
    assert next(choice for choice in choices if choice["codec"] == "bf16")["of_bf16"] == 1.0


def test_a_measured_forward_gives_a_time(tmp_path, teacher, corpus):
    config = build_config(tmp_path / "cache", teacher, corpus)
    one = describe_build(plan_config(config, measure=True))
    assert one["tokens_per_s"] > 0
    assert one["seconds"] == pytest.approx(one["rows"]["count"] * 16 / one["tokens_per_s"])
    assert one["measured"] == {"calls": 2, "rows": 4, "row_tokens": 16}
    assert describe_build(plan_config(config))["seconds"] is None


@pytest.mark.parametrize(
    ("seconds_a_token", "shape"),
    [
        (1e-5, (16, 1024)),  # a batch takes a moment
        (MEASURE_S / (16 * 1024), (16, 1024)),
        (MEASURE_S / (5.5 * 1024), (5, 1024)),
        (MEASURE_S / 1024, (1, 1024)),
        (MEASURE_S / 700, (1, 700)),  # a row does not fit
        (10.0, (1, 64)),  # hardly anything does
    ],
)
def test_a_measurement_is_as_large_as_fits_into_its_time(seconds_a_token: float, shape: tuple[int, int]) -> None:
    assert measured_shape(seconds_a_token, batch_rows=16, row_tokens=1024) == shape


def test_calls_stop_in_time(monkeypatch):
    clock = iter(range(0, 1000, 5))  # a call takes five seconds, by this clock
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(clock))
    found = command._time_calls(jax.jit(lambda parameters, *arrays: arrays[0]), None, 10, (2, 4), 5)
    assert (found.calls, found.rows, found.row_tokens, found.tokens_per_s) == (2, 2, 4, 1.6)


def test_sizes_are_printed_before_the_teacher_is_measured(tmp_path, teacher, corpus, monkeypatch, capsys):
    printed = []

    def measure(*_: object) -> command.Speed:
        printed.append(capsys.readouterr())
        return command.Speed(8.0, 1, 3, 16)

    monkeypatch.setattr(command, "measure_speed", measure)
    words = ["plan", "--cache", str(tmp_path / "cache"), "--teacher.path", str(teacher), "--data.path", str(corpus)]
    words += ["--data.row-tokens", "16", "--data.eval-rows", "4", "--batch-rows", "4"]
    assert cli.main(words) == 0
    (before,), after = printed, capsys.readouterr()
    assert "bytes a token" in before.out
    assert "int8, resid as differences" in before.out
    assert "more accurate than the same codec" in " ".join(before.out.split())
    assert "`--measure false` leaves this out" in before.err
    assert "bytes a token" not in after.out
    assert "extrapolated from 3 rows of a batch's 4: 8 tokens/s" in after.out
    assert cli.main([*words, "--measure", "false"]) == 0
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ({"calls": 2, "rows": 4, "row_tokens": 16}, "2 whole batches"),
        ({"calls": 1, "rows": 4, "row_tokens": 16}, "1 whole batch"),
        ({"calls": 1, "rows": 1, "row_tokens": 16}, "1 row of a batch's 4"),
        ({"calls": 1, "rows": 1, "row_tokens": 9}, "9 of a row's 16 tokens"),
    ],
)
def test_what_a_time_is_extrapolated_from(measured: dict[str, int], words: str) -> None:
    assert _measured({"measured": measured, "batch_rows": 4, "rows": {"row_tokens": 16}}) == words


def test_a_large_text_is_sampled(tmp_path, teacher, monkeypatch):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        line = json.dumps({"text": f"Document {number}. " + "Some words of it. " * 60}) + "\n"
        (folder / f"{number:02d}.jsonl").write_text(line * 5)
    packed = folder / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress((folder / "00.jsonl").read_bytes() * 40))
    data = DataConfig(path=str(folder), row_tokens=64, eval_rows=4)
    tokenizer = command.load_tokenizer(str(teacher))
    exact = count_rows(data, tokenizer)
    monkeypatch.setattr(command, "SAMPLE_BYTES", 15_000)
    estimate = count_rows(data, tokenizer)
    assert (exact.exact, estimate.exact) == (True, False)
    assert exact.plan.count <= estimate.plan.count <= 1.05 * exact.plan.count
    assert count_rows(data.model_copy(update={"max_rows": 50}), tokenizer).plan.count == 50
    (file,) = input_files(DataConfig(path=str(packed)))
    assert unpacked_bytes(file) == 40 * (folder / "00.jsonl").stat().st_size


def test_too_little_room_is_said(tmp_path, teacher, corpus, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2000, 1000, 1000))
    words = ["plan", "--cache", str(tmp_path / "new" / "cache"), "--teacher.path", str(teacher), "--measure", "false"]
    words += ["--data.path", str(corpus), "--data.row-tokens", "16", "--data.eval-rows", "4", "--batch-rows", "4"]
    assert cli.main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["free_bytes"], report["enough_room"]) == (1000, False)
    assert cli.main(words) == 0
    assert "too little room" in capsys.readouterr().out
    assert command.free_bytes("gs://bucket/cache") is None
    assert not (tmp_path / "new").exists()


def test_what_a_build_refuses_is_refused(tmp_path, teacher, corpus, capsys):
    words = ["plan", "--cache", str(tmp_path / "cache"), "--teacher.path", str(teacher), "--data.path", str(corpus)]
    assert cli.main([*words, "--data.row-tokens", "16", "--data.eval-rows", "4", "--blocks", "[7]"]) == 2
    assert "blocks" in capsys.readouterr().err


def test_chosen_slots_and_the_head_have_their_size(tmp_path, teacher, corpus):
    """Also beside other codecs: 263 rows of 24 numbers in float32, and one slot."""
    taps = {"attn_out": None, "resid": {"slots": ["last"], "head": True}}
    report = describe_build(plan_config(build_config(tmp_path / "cache", teacher, corpus, taps=taps, dtype="float32")))
    without = {"attn_out": None, "resid": {"slots": ["last"]}}
    other = describe_build(
        plan_config(build_config(tmp_path / "cache", teacher, corpus, taps=without, dtype="float32"))
    )
    assert report["bytes"] - other["bytes"] == 263 * 24 * 4
    assert report["bytes_per_token"] == other["bytes_per_token"] == 24 * 2
    assert {choice["bytes_per_token"] for choice in report["choices"] if choice["codec"] == "bf16"} == {24 * 2}
