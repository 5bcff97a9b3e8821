"""A run of the trainer's as a checkpoint: the newest, a numbered one, the best; its tokenizer and its digest."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from distillcache.models.checkpoint import load_pretrained, read_config, save_pretrained, weights_digest
from distillcache.models.decoder import Decoder
from distillcache.models.mesh.sharding import make_mesh
from distillcache.models.text.tokenizer import load_tokenizer
from distillcache.schemas.config.teacher import TeacherMeshConfig
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.format.checkpoint import CheckpointRecord, commit, held_whole, write_arrays
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.store.store import Store
from tests.models.files.test_hf import tokenizer_folder
from tests.models.test_checkpoint import assert_same_parameters
from tests.servers.fixtures import Bucket

Q, EMBED = "groups/0/blocks/0/attention/q", "embed"


def flat(decoder: Decoder) -> dict[str, np.ndarray]:
    found = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(value.get_value()) for path, value in found}


def write_checkpoint(run: str, step: int, parameters: dict[str, np.ndarray]) -> None:
    store, folder = Store(run), f"checkpoints/{step:08d}"
    held = {f"parameters/{name}": held_whole(value) for name, value in parameters.items()}
    held["optimizer/mu"] = held_whole(np.zeros(3, np.float32))
    write_arrays(store, folder, 0, "a", held)
    digest = digest_bytes((store.read(f"{folder}/p0000.json")) or b"")
    commit(store, folder, CheckpointRecord(step=step, feed={}, parts=(digest,)))


def make_run(run: str, decoder: Decoder, tmp_path: Path) -> dict[int, dict[str, np.ndarray]]:
    """Two checkpoints, of which the first is the better; what was trained until each."""
    save_pretrained(decoder, f"{run}/student", tokenizer_from=tokenizer_folder(tmp_path))
    own = flat(decoder)
    trained = {3: {Q: own[Q] + 1}, 12: {Q: own[Q] + 2, EMBED: own[EMBED] * 2, "groups/0/blocks/0/projector/in": own[Q]}}
    for step, parameters in trained.items():
        write_checkpoint(run, step, parameters)
    scores = [{"step": 0, "perplexity": 1.0}, {"step": 3, "perplexity": 5.0}, {"step": 12, "perplexity": 6.0}]
    Store(run).write("eval.json", json.dumps(scores).encode())
    return trained


@pytest.fixture
def run(tiny: Decoder, tmp_path: Path) -> Path:
    make_run(str(tmp_path / "run"), tiny, tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize(("named", "step"), [("", 12), ("checkpoints/00000003", 3), ("checkpoints/best", 3)])
def test_what_was_trained_and_the_rest(named: str, step: int, tiny: Decoder, tmp_path: Path):
    trained = make_run(str(tmp_path / "run"), tiny, tmp_path)[step]
    path = tmp_path / "run" / named
    found = flat(load_pretrained(path))
    for name, value in flat(tiny).items():
        np.testing.assert_array_equal(found[name], trained.get(name, value))
    assert read_config(path) == tiny.config
    assert load_tokenizer(path).digest == load_tokenizer(tmp_path / "tokenizer").digest


def test_a_mesh_gets_the_parameters_of_one_device(run: Path):
    mesh = make_mesh(TeacherMeshConfig(fsdp=2, tensor=2))
    assert_same_parameters(load_pretrained(run, mesh=mesh), load_pretrained(run))


def test_each_checkpoint_has_a_digest_of_its_own(run: Path):
    digests = [weights_digest(run / name) for name in ("student", "checkpoints/3", "checkpoints/12", "")]
    assert len(set(digests)) == 3
    assert digests[2] == digests[3]


def test_what_is_not_there_is_named(run: Path):
    for path, texts in {
        run / "checkpoints" / "5": ("no such checkpoint", "3, 12"),
        run / "checkpoints" / "last": ("no such checkpoint", "last"),
    }.items():
        with pytest.raises(CheckpointError) as caught:
            load_pretrained(path)
        for text in texts:
            assert text in str(caught.value)
    file = next((run / "checkpoints" / "00000012").glob("*.safetensors"))
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="a checkpoint cannot be read"):
        load_pretrained(run)


@pytest.mark.slow
def test_in_a_bucket(gcs: Bucket, tiny: Decoder, tmp_path: Path):
    trained = make_run(f"{gcs.url}/run", tiny, tmp_path)[12]
    np.testing.assert_array_equal(flat(load_pretrained(f"{gcs.url}/run"))[Q], trained[Q])
    assert weights_digest(f"{gcs.url}/run") == weights_digest(f"{gcs.url}/run/checkpoints/12")
