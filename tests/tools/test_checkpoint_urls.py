"""The command line with its config, its teacher and its export in a bucket."""

import shutil
from pathlib import Path

import pytest

from distillcache.models.checkpoint import load_pretrained, weights_digest
from distillcache.schemas.command_line import dump_yaml
from distillcache.schemas.config import TrainConfig
from distillcache.schemas.config.train import StudentConfig, SurgeryOp
from distillcache.schemas.store.store import Store
from distillcache.tools import cli
from tests.conftest import build_config
from tests.models.conftest import upload
from tests.models.test_checkpoint import assert_same_parameters
from tests.servers.fixtures import Bucket


def shards(cache: Path) -> dict[str, bytes]:
    files = [file for folder in ("rows", "taps") for file in (cache / "segments/0000" / folder).rglob("*")]
    return {str(file.relative_to(cache)): file.read_bytes() for file in files if file.is_file()}


@pytest.mark.slow
def test_build_train_export(gcs: Bucket, teacher: Path, corpus: Path, tmp_path: Path):
    """The same cache as with a local teacher, and an export that is the local one."""
    url = upload(teacher, f"{gcs.url}/teacher")
    local = build_config(tmp_path / "local", teacher, corpus)
    store = Store(gcs.url)
    store.write("build.yaml", dump_yaml(local).encode())
    assert cli.main(["build", "--config", f"{gcs.url}/build.yaml"]) == 0
    remote = ["--teacher.path", url, "--cache", str(tmp_path / "remote")]
    assert cli.main(["build", "--config", f"{gcs.url}/build.yaml", *remote]) == 0
    assert shards(tmp_path / "local") == shards(tmp_path / "remote")

    shutil.move(teacher, tmp_path / "moved")  # the remote cache needs no local teacher
    try:
        cut = StudentConfig(surgery=[SurgeryOp(op="query_heads", to=2, by="index")])
        run, cache = str(tmp_path / "run"), str(tmp_path / "remote")
        train = TrainConfig(run=run, cache=cache, student=cut, steps=2, batch_rows=2)
        store.write("train.yaml", dump_yaml(train).encode())
        assert cli.main(["train", "--config", f"{gcs.url}/train.yaml"]) == 0
    finally:
        shutil.move(tmp_path / "moved", teacher)
    assert cli.main(["export", str(tmp_path / "run"), f"{gcs.url}/out"]) == 0
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert weights_digest(f"{gcs.url}/out") == weights_digest(tmp_path / "out")
    assert_same_parameters(load_pretrained(f"{gcs.url}/out"), load_pretrained(tmp_path / "out"))


def test_a_demo_in_a_bucket_is_refused(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["demo", "--out", "gs://bucket/demo"]) == 2
    assert "must be on a local disk" in capsys.readouterr().err
