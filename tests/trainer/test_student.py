"""What a run's student is made of: the teacher's own numbers, random ones or a checkpoint's; what is written down."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from models.checkpoint import load_pretrained
from schemas.errors import CheckpointError, ConfigError, Interrupted
from schemas.storage import Store
from schemas.student_config import StudentConfig, SurgeryOp
from tests.models.surgery.test_operate import assert_blocks, blocks_of
from tests.trainer.test_train import Stop, assert_same_run, config
from tools import export
from trainer.checkpoints import load_student
from trainer.feed import CacheSource
from trainer.student import open_student, start_parameters
from trainer.tables import block_starts
from trainer.train import train


def opened(run: Path, cache: Path, seed: int = 0, **values: Any):
    def open_source(taps, blocks, leaving):
        return CacheSource(str(cache), taps, blocks, "train", leaving=leaving)

    student = StudentConfig.model_validate(values)
    return open_student(Store(str(run)), student, open_source((), None, False), seed=seed, open_source=open_source)


@pytest.mark.parametrize(
    "values", [{"layer_map": [0, 2]}, {"surgery": [{"op": "drop_blocks", "blocks": [1]}]}], ids=str
)
def test_some_blocks_of_the_teacher(tmp_path: Path, cache: Path, teacher: Path, values: dict):
    student = opened(tmp_path, cache, **values)
    blocks = blocks_of(load_pretrained(teacher))
    assert_blocks(blocks_of(student), [blocks[0], blocks[2]])
    assert block_starts(StudentConfig.model_validate(values), 3) == [0, 2]
    (done,) = json.loads((tmp_path / "surgery.json").read_text())
    assert (done["op"], done["kept"]) == ("drop_blocks", [0, 2])
    assert_blocks(blocks_of(opened(tmp_path, cache, **values)), blocks_of(student))  # read back


def test_a_student_without_the_first_block_begins_with_the_teachers_stream():
    dropped = SurgeryOp(op="drop_blocks", blocks=[0, 2])
    assert block_starts(StudentConfig(surgery=[dropped]), 5) == [0, 3, 4]
    assert block_starts(StudentConfig(surgery=[dropped], layer_map=[1, 3, 4]), 5) == [1, 3, 4]
    assert block_starts(StudentConfig(surgery=[dropped], init="path/to/other"), 5) is None


def test_random_students_have_the_surgerys_sizes_and_the_runs_seed(tmp_path: Path, cache: Path, teacher: Path):
    values = {"init": "random", "layer_map": [0, 1], "surgery": [{"op": "mlp_width", "to": 16}]}
    first, again, other = (opened(tmp_path / str(at), cache, seed=seed, **values) for at, seed in enumerate((1, 1, 2)))
    assert (first.config.num_blocks, first.config.intermediate_size) == (2, 16)
    assert_blocks(blocks_of(again), blocks_of(first))
    for stranger in (blocks_of(other)[0], blocks_of(load_pretrained(teacher))[0]):
        assert not np.array_equal(blocks_of(first)[0]["attention/q"], stranger["attention/q"])


def test_importance_decides_and_is_kept(tmp_path: Path, cache: Path):
    ops = [{"op": "mlp_width", "to": 16, "by": "importance"}, {"op": "hidden_size", "to": 20, "by": "importance"}]
    values = {"surgery": ops, "projector": "linear", "importance_rows": 6}
    student = opened(tmp_path, cache, **values)
    scores = safetensors.numpy.load((tmp_path / "importance.safetensors").read_bytes())
    neurons, stream = (op["kept"] for op in json.loads((tmp_path / "surgery.json").read_text()))
    for at, kept in enumerate(neurons):
        assert set(kept) == set(np.argsort(-scores[f"blocks/{at}/F"])[:16].tolist())
    assert set(stream) == set(np.argsort(-scores["stream"])[:20].tolist())
    parameters = start_parameters(student, StudentConfig.model_validate(values), 24, 0, Store(str(tmp_path)))
    given = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    into, out = (parameters[f"groups/0/blocks/0/projector/{side}"] for side in ("in", "out"))
    np.testing.assert_array_equal(given @ into[2], given[:, stream])
    np.testing.assert_array_equal((given[:, stream] @ out[1])[:, stream], given[:, stream])


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"layer_map": [0, 0, 2]}, "names a block twice"),
        ({"layer_map": [0, 3]}, "layer_map does not fit"),
        ({"surgery": [{"op": "hidden_size", "to": 20}]}, "projector: linear"),
        ({"surgery": [{"op": "drop_blocks", "blocks": [1]}], "layer_map": [0]}, "layer_map does not fit"),
        ({"surgery": [{"op": "mlp_width", "to": 41}]}, "1 to 40"),
    ],
    ids=str,
)
def test_refused_before_anything_is_written(tmp_path: Path, cache: Path, values: dict, named: str):
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path / "run", cache, **values)
    assert named in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_not_its_configs_is_refused_by_name(tmp_path: Path, cache: Path, teacher: Path):
    folder = tmp_path / "other"
    folder.mkdir()
    for file in teacher.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.numpy.load((folder / "model.safetensors").read_bytes())
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1]
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path / "run", cache, init=str(folder))
    assert "model.layers.0.mlp.up_proj.weight is [39, 24], expected [40, 24]" in str(caught.value)
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value.facts["missing"])
    assert "model.layers.9.mlp.up_proj.weight" in str(caught.value.facts["unknown"])


@pytest.mark.slow  # three calls of a run, with programs of its own
def test_every_operation_in_one_run(tmp_path: Path, cache: Path):
    """Measured, cut, upcycled, trained, stopped, gone on, exported: the same as without the stop."""
    ops = [
        {"op": "drop_blocks", "blocks": [1]},
        {"op": "query_heads", "to": 2, "by": "importance"},
        {"op": "mlp_width", "to": 24, "by": "importance"},
        {"op": "hidden_size", "to": 20, "by": "importance"},
        {"op": "upcycle", "experts": 4, "how": "partition"},
    ]
    student = {"surgery": ops, "projector": "linear", "importance_rows": 6}
    values = {"student": student, "loss": {"mlp": {"weight": 0.5}}, "steps": 3, "checkpoint_every": 1}
    train(config(tmp_path / "whole", cache, **values))
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, after=2)
        with pytest.raises(Interrupted):
            train(config(tmp_path / "cut", cache, **values))
    assert train(config(tmp_path / "cut", cache, **values)).resumed_from == 2
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    export.run([str(tmp_path / "whole"), str(tmp_path / "out")], "export", False)
    exported = load_pretrained(tmp_path / "out")
    assert (exported.config.family, exported.config.hidden_size, exported.config.num_blocks) == ("mixtral", 20, 2)
    assert_blocks(blocks_of(exported), blocks_of(load_student(str(tmp_path / "whole")).decoder))
