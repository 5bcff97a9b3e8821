"""A teacher on a mesh: what its compiled program exchanges, whoever owns the devices, and whose rows end up where."""

import math
import re
from typing import Any, cast

import jax
import numpy as np
import pytest

from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.mesh.recording import RecordingMesh, own_part
from distillcache.models.mesh.sharding import make_mesh, parameter_sharding, put, rows_sharding
from distillcache.models.recorder import make_recorder
from distillcache.schemas.config.teacher import TapConfig, TapsConfig, TeacherMeshConfig, TopKConfig
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.format.manifest import Plan
from distillcache.schemas.format.tap_codec import signs_of
from distillcache.schemas.format.tap_plan import choose_taps
from tests.conftest import TINY, save_teacher

TOKENS = 20  # no size of any parameter is a multiple of it
EVEN = ModelConfig(**{**TINY.__dict__, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 264})
TAPS = TapsConfig(
    attn_out=TapConfig(codec="int8"),
    resid=TapConfig(codec="int8", delta=True, keyframe_every=2),
    topk_logits=TopKConfig(k=5),
)
PLAIN = TapsConfig()  # compiled sooner
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter|ragged-all-to-all)(-start)?\("
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("even") / "teacher", EVEN)


def mesh_of(**sizes):
    mesh = make_mesh(TeacherMeshConfig(**sizes))
    assert mesh is not None
    return mesh


class _Signs:
    """What `signs_of` asks a plan for."""

    def __init__(self, taps, hidden):
        self.taps, self.teacher = taps, type("teacher", (), {"hidden_size": hidden})


def recorder(teacher, taps=TAPS, **sizes) -> tuple[Any, Any, Any]:
    mesh = make_mesh(TeacherMeshConfig(**sizes))
    plans = choose_taps(taps, tuple(range(EVEN.num_blocks)), EVEN.num_blocks, EVEN.hidden_size, EVEN.vocab_size)
    decoder, asked = load_pretrained(teacher, mesh=mesh), cast("Plan", _Signs(plans, EVEN.hidden_size))
    return (*make_recorder(decoder, plans, signs_of(asked), mesh), mesh)


def batch(rows):
    tokens = np.random.default_rng(0).integers(0, EVEN.vocab_size, (rows, TOKENS), np.int32)
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), tokens.shape)
    return [np.ascontiguousarray(each) for each in (tokens, positions, np.ones_like(tokens))]


def collectives(teacher, rows, taps=TAPS, **sizes):
    """(kind, shape, bytes on each device) of every collective of the compiled program, and the program's text."""
    record, parameters, mesh = recorder(teacher, taps, **sizes)
    arrays = [jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=rows_sharding(mesh)) for each in batch(rows)]
    text = record.lower(parameters, *arrays).compile().as_text()
    found = []
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            shapes = [
                (kind, tuple(map(int, dims.split(","))) if dims else ())
                for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", line[: match.start()].split("=", 1)[1])
            ]
            found += [(match[1], shape, 4 * math.prod(shape), line) for _, shape in shapes]  # all are 4 bytes wide
    return found


def moved(found):
    return sum(size for _, _, size, _ in found)


def test_rows_alone_need_no_collectives(teacher):
    """Eight processes of one device each, or any others: nothing is exchanged at all."""
    assert collectives(teacher, 8, data=8) == []


def test_weights_travel_and_activations_do_not(teacher):
    found = collectives(teacher, 8, fsdp=4)
    assert {kind for kind, *_ in found} == {"all-gather"}
    assert all(TOKENS not in shape for _, shape, _, _ in found)


@pytest.mark.slow
def test_traffic_does_not_grow_with_the_processes(teacher):
    """Two rows a process in a call: a process of one device (fsdp), or of two that split heads (tensor)."""
    by_fsdp = {count: moved(collectives(teacher, 2 * count, PLAIN, fsdp=count)) for count in (2, 4, 8)}
    assert len(set(by_fsdp.values())) == 1  # the weights of one block after the other, once
    by_tensor = {}
    for count in (2, 4):
        found = collectives(teacher, 2 * count, PLAIN, data=count, tensor=2)
        by_tensor[count] = moved(found)
        sums = [(shape, line) for kind, shape, _, line in found if kind == "all-reduce"]
        assert {shape for shape, _ in sums} == {(2, TOKENS, EVEN.hidden_size)}  # of this process's own rows
        assert len(sums) == 3  # the embedding; and in the scan's body attention and MLP
        gathered = [shape for kind, shape, _, _ in found if kind != "all-reduce"]
        assert all(TOKENS not in shape for shape in gathered)
    assert len(set(by_tensor.values())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 4}], ids=str)
def test_numbers_of_a_mesh_are_those_of_a_device(teacher, sizes):
    exact = TapsConfig(attn_out=TapConfig(codec="f32"), resid=TapConfig(codec="f32"), topk_logits=TopKConfig(k=5))
    record, parameters, mesh = recorder(teacher, exact, **sizes)
    found = record(parameters, *(put(each, rows_sharding(mesh)) for each in batch(8)))
    record, parameters, _ = recorder(teacher, exact)
    expected = record(parameters, *batch(8))
    for tap, parts in expected.codes.items():
        for name, part in parts.items():
            np.testing.assert_allclose(own_part(found.codes[tap][name]), part, rtol=2e-5, atol=2e-5)
    for tap, sums in expected.sums.items():
        np.testing.assert_allclose(found.sums[tap].square_sum, sums.square_sum, rtol=1e-5)


def test_each_device_records_rows_that_it_computes():
    """The cut of recorded rows refines the cut of the teacher's own, so that it takes no exchange."""
    mesh = mesh_of(data=2, tensor=4)
    assert RecordingMesh.of(mesh, 8, TOKENS).row_axes == ("data", "fsdp", "tensor", "expert")
    few = RecordingMesh.of(mesh, 2, TOKENS)
    assert (few.row_axes, few.token_axes, few.row_cuts) == (("data", "fsdp"), ("tensor", "expert"), 2)
    assert RecordingMesh.of(mesh, 2, 18).token_axes == ()  # 18 tokens do not divide by 4
    with pytest.raises(ConfigError, match="evenly"):
        RecordingMesh.of(mesh, 3, TOKENS)


def test_loading_puts_each_part_on_its_device(teacher):
    mesh = mesh_of(fsdp=2, tensor=2)
    decoder: Decoder = load_pretrained(teacher, mesh=mesh)
    q, whole = decoder.groups[0].blocks[0].attention.q[...], load_pretrained(teacher).groups[0].blocks[0].attention.q
    assert q.sharding == parameter_sharding(mesh, "groups/0/blocks/0/attention/q", q.shape)
    assert {shard.data.shape for shard in q.addressable_shards} == {(3, 16, 2, 8)}
    np.testing.assert_array_equal(np.asarray(q), whole[...])
