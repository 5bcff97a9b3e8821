"""`plan --simulate`: its sizes are those of a cache that was built, its requests those that a server counts."""

import json

import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.config.simulate import SimulateConfig
from distillcache.schemas.store.store import Store
from distillcache.tools import cli
from distillcache.tools.plan import scale
from distillcache.tools.plan.fleet import Fleet, play
from distillcache.tools.plan.scale import Cache, describe_scale, forward_flops, teacher_shape
from distillcache.tools.plan.scale_report import duration, scaled, scarce
from distillcache.trainer.feed.cache_source import CacheSource
from tests.conftest import build_config
from tests.servers.fixtures import Bucket

TAPS = {
    "bf16": {"attn_out": {}, "resid": {}, "topk_logits": {"k": 4}},
    "int4": {"attn_out": {"codec": "int8"}, "resid": {"codec": "int4", "delta": True, "keyframe_every": 2}},
}


@pytest.mark.parametrize("taps", TAPS)
def test_bytes_and_objects_are_those_of_a_real_build(tmp_path, teacher, corpus, taps):
    config = build_config(tmp_path / "cache", teacher, corpus, taps=TAPS[taps])
    build_cache(config)
    segment = open_cache(Store(config.cache))[0]
    cache, folder = Cache(segment.plan, 1.0), tmp_path / "cache/segments/0000"
    objects = list(folder.glob("taps/*/c/*/*/*/*"))
    played = play(cache.work(), Fleet(hosts=3, tokens_per_s=1000.0, write_bytes_per_s=1e6, preemptions_per_s=0.01))
    assert played.puts == len(objects) + 2 * segment.plan.num_shards + cache.plan.num_units
    assert cache.objects == len(objects)
    assert cache.index_bytes == (folder / "index.bin").stat().st_size
    rows = segment.plan.rows.count * 16 * 13  # as `plan` counts them; their files have a frame around each row
    assert played.bytes - rows == sum(path.stat().st_size for path in objects) + cache.index_bytes


def test_the_teachers_are_what_their_names_say():
    # Parameters that a token meets; of the sparse one, 3.3e9 with embeddings and head.
    for name, parameters, flops in (
        ("llama-3.2-1b", 0.973e9, 2.01e9),
        ("llama-3.1-8b", 6.98e9, 14.2e9),
        ("llama-3.1-70b", 68.5e9, 138.2e9),
        ("qwen3-30b-a3b", 2.73e9, 5.86e9),
    ):
        model = teacher_shape(name)
        assert forward_flops(model, 0, head=False) / 2 == pytest.approx(parameters, rel=0.01)  # without embeddings
        assert forward_flops(model, 1024, head=False) == pytest.approx(flops, rel=0.02)
    head = forward_flops(teacher_shape("llama-3.1-8b"), 0, head=True) - forward_flops(
        teacher_shape("llama-3.1-8b"), 0, head=False
    )
    assert head == 2 * 4096 * 128256


def test_every_combination_is_described(capsys):
    words = ["plan", "--simulate", "--tokens", "[1e9, 1e12]", "--build.hosts", "[8, 64]", "--build.tokens-per-s", "1e4"]
    assert cli.main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["caches"]) == 2 * 2 * len(scale.CHOICES)
    for small in report["caches"]:
        if small["tokens"] == 1e9:
            (large,) = (
                each
                for each in report["caches"]
                if (each["teacher"], each["choice"], each["tokens"]) == (small["teacher"], small["choice"], 1e12)
            )
            assert large["bytes"] == pytest.approx(1000 * small["bytes"], rel=1e-3)
            assert large["gets_per_epoch"] >= 1000 * small["gets_per_epoch"] * 0.999
            assert large["builds"][1]["seconds"] == pytest.approx(1e12 / 64e4, rel=0.15)
            assert large["builds"][1]["seconds"] < large["builds"][0]["seconds"] / 7
            assert large["dollars_per_month"] == pytest.approx(large["bytes"] / 2**30 * 0.02)
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("topk_logits, k = 64") == 4 * 4
    assert "8 hosts" in printed
    assert cli.main(["plan", "--simulate", "--help"]) == 0
    assert "price_per_gib_month" in capsys.readouterr().out.replace("-", "_")


def test_sizes_that_do_not_fit_are_said(capsys):
    words = ["--tokens", "[1e11]", "--shard-mib", "8192", "--teachers", "[llama-3.1-8b]", "--build.hosts", "[64]"]
    assert cli.main(["plan", "--simulate", *words]) == 0
    printed = capsys.readouterr().out
    assert "not possible: 8b, 100B, topk_logits, k = 64: an object would be larger" in printed
    assert printed.count("attn_out, resid: bf16") == 4


@pytest.mark.parametrize(("row_tokens", "told"), [(131_072, 0), (131_073, 2)])  # Llama 3.1's max_position_embeddings
def test_rows_longer_than_the_teachers_context_are_warned_of(row_tokens, told, capsys):
    words = ["plan", "--simulate", "--row-tokens", str(row_tokens), "--tokens", "[1e9]", "--build.hosts", "[64]"]
    assert cli.main(words) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(printed) == told
    for line, teacher in zip(printed, ("llama-3.1-8b", "llama-3.1-70b"), strict=False):
        assert teacher in line
        assert "give --row-tokens 131072 or less" in line
    assert cli.main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["too_long"]) == told


def test_wrong_words_are_refused(capsys):
    assert cli.main(["plan", "--simulate", "--teachers", "[gpt]"]) == 2
    assert "teachers" in capsys.readouterr().err


def test_money_and_speed_follow_the_config():
    config = SimulateConfig(tokens=[1e9], teachers=["llama-3.1-8b"])
    bucket = config.bucket.model_copy(update={"price_per_gib_month": 0.04, "egress_gb_s": 50.0})
    train = config.train.model_copy(update={"step_s": 2.0})
    first = describe_scale(config)["caches"][0]
    second = describe_scale(config.model_copy(update={"bucket": bucket, "train": train}))["caches"][0]
    assert second["dollars_per_month"] == 2 * first["dollars_per_month"]
    assert second["read_gb_per_s_per_host"] == first["read_gb_per_s_per_host"] / 2
    assert second["limits"]["feed: bucket GB/s"] == first["limits"]["feed: bucket GB/s"] / 4


def test_what_is_scarce_is_named_first():
    limits = {"feed: a": 0.5, "feed: b": 3.0, "feed: c": 250.4, "build: d": 9.0}
    assert scarce(limits, "feed: ", "nothing") == "c 250x, b 3x"
    assert scarce({"feed: a": 0.5}, "feed: ", "nothing") == "nothing; next a 0.5x"
    assert [scaled(5), scaled(1234, "B"), scaled(2.64e18, "B")] == ["5", "1.23 kB", "2.64 EB"]
    assert [duration(90), duration(7200), duration(86400 * 9), duration(86400 * 900)] == [
        "2 min",
        "2.0 h",
        "9.0 days",
        "2.5 years",
    ]


@pytest.mark.slow
def test_requests_are_those_that_a_server_counts(gcs: Bucket, teacher, corpus):
    config = build_config(f"{gcs.url}/cache", teacher, corpus, taps=TAPS["int4"])
    build_cache(config)
    cache = Cache(open_cache(Store(config.cache))[0].plan, 1.0)
    folders = ("taps/attn_out/c", "taps/attn_out.scale/c", "taps/resid", "/0000/rows/", "/receipts/", "/claims/0")
    counted = {folder: gcs.server.count("write", folder) for folder in folders}
    arrays = len([part for part in cache.parts if part.array.startswith("resid")])
    objects = (
        counted["taps/attn_out/c"] + counted["taps/attn_out.scale/c"] + counted["taps/resid"] - arrays
    )  # zarr.json
    assert objects == cache.objects
    assert objects + counted["/0000/rows/"] + counted["/receipts/"] + counted["/claims/0"] == cache.puts
    source = CacheSource(config.cache, taps=("resid", "attn_out"))
    source[[0]]
    gcs.server.clear_requests()
    source[[9]]  # of another shard
    assert gcs.server.count("read") == cache.row_gets - 1  # an index as short as this one is read whole, once
