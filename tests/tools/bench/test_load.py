"""`bench load` at a small size: a process of four holds its share of a checkpoint and one tensor, and no more."""

import dataclasses
from pathlib import Path

import pytest

from distillcache.models.checkpoint import read_config
from distillcache.models.config import BlockKind, LayerGroup
from distillcache.tools.bench.load import LARGE, LoadSizes, measure_load, write_sparse

SMALL = dataclasses.replace(
    LARGE,
    vocab_size=8000,
    hidden_size=1280,
    intermediate_size=3456,
    num_heads=10,
    num_kv_heads=10,
    layers=(LayerGroup((BlockKind(),), 10),),
)
PROCESS_BYTES = 40e6  # what a load costs beside its parameters: tracing the decoder, the headers' JSON


def test_a_sparse_checkpoint_is_one_and_takes_no_disk(tmp_path: Path):
    total = write_sparse(tmp_path / "model", SMALL, 150_000_000)
    assert read_config(tmp_path / "model").num_blocks == 10
    files = list((tmp_path / "model").glob("*.safetensors"))
    assert len(files) == 3
    assert total < sum(file.stat().st_size for file in files) < total + 100_000
    assert sum(file.stat().st_blocks for file in files) * 512 < 200_000


@pytest.mark.slow
def test_the_peak_is_the_share_and_one_tensor(tmp_path: Path):
    sizes = LoadSizes(SMALL, processes=4, loads=1, shard_bytes=150_000_000, axes=("fsdp",))
    found = measure_load(tmp_path, sizes).figures
    assert found["fsdp_share_gb"] == pytest.approx(found["checkpoint_gb"] / 4, rel=0.01)
    bound = found["fsdp_share_gb"] + found["fsdp_tensor_gb"] + PROCESS_BYTES / 1e9
    assert found["fsdp_share_gb"] < found["fsdp_peak_gb"] < bound < 0.4 * found["checkpoint_gb"]
