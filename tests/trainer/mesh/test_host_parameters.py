"""What a process keeps of arrays on a mesh: copies of its devices' parts, which make the arrays again."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distillcache.models.mesh.sharding import parameter_sharding
from distillcache.schemas.config.train import MeshConfig
from distillcache.trainer.mesh.host_parameters import HostShards, gathered, kept, kept_rows, moved, on_devices
from distillcache.trainer.mesh.sharding import make_mesh

Q = "groups/0/blocks/0/attention/q"


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(block=2, fsdp=2, tensor=2))


def array(mesh, shape=(4, 6, 2, 3), name=Q):
    value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return value, jax.device_put(value, parameter_sharding(mesh, name, shape))


def test_parts_make_the_array_again(mesh):
    value, there = array(mesh)
    shards = HostShards.of(there)
    assert len(shards.boxes) == 8
    assert {part.shape for part in shards.values} == {(2, 3, 1, 3)}
    again = shards.placed()
    assert again.sharding == there.sharding
    np.testing.assert_array_equal(again, value)
    other = shards.read(lambda boxes: [2 * value[box] for box in boxes])
    np.testing.assert_array_equal(gathered({Q: other})[Q], 2 * value)


def test_what_devices_share_is_written_once(mesh):
    value = np.arange(12.0, dtype=np.float32).reshape(6, 2)
    shards = HostShards.of(jax.device_put(value, NamedSharding(mesh, PartitionSpec("fsdp"))))
    held = shards.held()
    assert held.info.shape == (6, 2)
    found = np.zeros((6, 2))
    for start, part in held.boxes:
        found[start[0] : start[0] + part.shape[0]] += part
    np.testing.assert_array_equal(found, value)


def test_of_one_process_arrays_are_kept_whole(mesh):
    value, there = array(mesh)
    assert isinstance(kept(there), np.ndarray)
    np.testing.assert_array_equal(kept_rows(Q, there, 3), value[:3])
    assert on_devices(value) is value
    np.testing.assert_array_equal(moved(value, there.sharding), value)


def test_repeats_that_a_mesh_does_not_divide_lie_everywhere(mesh):
    assert parameter_sharding(mesh, Q, (4, 6, 2, 3)).spec[0] == "block"
    assert parameter_sharding(mesh, Q, (3, 6, 2, 3)).spec[0] is None
