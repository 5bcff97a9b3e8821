"""A whole run in a bucket: the same numbers as on a disk, also where requests fail; stopped, gone on with, exported."""

from pathlib import Path

import jax
import numpy as np
import pytest

from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.schemas.config import TrainConfig
from distillcache.schemas.config.train import StudentConfig, SurgeryOp
from distillcache.schemas.errors import InputError, Interrupted
from distillcache.schemas.runtime.signals import StopRequest
from distillcache.schemas.store.store import Store
from distillcache.trainer import loop
from distillcache.trainer.run.checkpoints import Checkpoints, load_student
from distillcache.trainer.run.folder import only_one, read_evaluations
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.step.parameters import all_parameters
from distillcache.trainer.train import train


def config(run: str, cache: Path, **changes: object) -> TrainConfig:
    student = StudentConfig(surgery=[SurgeryOp(op="query_heads", to=2, by="index")])
    values = {"run": run, "cache": str(cache), "student": student, "steps": 4, "batch_rows": 4, "checkpoint_every": 2}
    values["eval_teacher"] = False  # tests/trainer/run/test_yardstick.py has it on
    return TrainConfig.model_validate({**values, **changes})


def timeless(run: str) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_metrics(run)]


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_a_disk(tmp_path, cache, gcs, monkeypatch):
    """With a tenth of all requests failing; stopped after a step and gone on with; bits, metrics and export."""
    local, remote = str(tmp_path / "run"), f"{gcs.url}/run"
    train(config(local, cache))

    def asked(peers, stop: StopRequest, step: int) -> bool:
        return step == 3

    with gcs.server.faults(share=0.1, seed=3, kinds=["503", "429", "reset", "cut", "short"]):
        with monkeypatch.context() as patch:
            patch.setattr(loop.Peers, "should_stop", asked)
            with pytest.raises(Interrupted, match="asked to stop"):
                train(config(remote, cache))
        assert Checkpoints(Store(remote)).steps() == [2, 3]
        assert train(config(remote, cache)).resumed_from == 3
        assert train(config(remote, cache)).resumed_from == 4
    assert timeless(remote) == timeless(local)
    assert read_evaluations(remote) == read_evaluations(local)
    found, expected = (all_parameters(load_student(run).decoder) for run in (remote, local))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    keys = Store(remote).keys()
    assert "claim.json" not in keys
    assert [key for key in keys if key.startswith("tensorboard/events.out.tfevents.")]
    student = load_student(remote)
    save_pretrained(student.decoder, f"{gcs.url}/out", tokenizer_from=student.tokenizer)
    np.testing.assert_array_equal(load_pretrained(f"{gcs.url}/out").embed[...], student.decoder.embed[...])


def test_one_job_at_a_time(gcs):
    store = Store(f"{gcs.url}/run")
    with only_one(store), pytest.raises(InputError, match="another process"), only_one(store):
        pass
    with only_one(store):  # given back
        pass


def test_logs_in_a_bucket_are_cut_where_a_run_goes_on(gcs):
    store = Store(f"{gcs.url}/run")
    log = loop.MetricsLog(store, -1)
    for step in range(1, 7):
        log.log(step, {"loss": float(step)})
        if step % 2 == 0:
            log.flush()
    log.close()
    log = loop.MetricsLog(store, 3)
    log.log(4, {"loss": -4.0})
    log.close()
    assert [line["loss"] for line in read_metrics(store.url)] == [1.0, 2.0, 3.0, -4.0]
