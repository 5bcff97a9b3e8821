"""Parameters filled by parts: every box of every kind of slot, checkpoints on meshes, and what is read for them."""

import dataclasses
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.families import layout_of
from distillcache.models.files import fill
from distillcache.models.files.fill import plan_fill
from distillcache.models.files.hf import SafetensorsSource
from distillcache.models.files.tensors import Box, TensorSlice, TensorSlot, merged, tensor_slots
from distillcache.models.mesh.sharding import make_mesh
from distillcache.schemas.config.teacher import TeacherMeshConfig
from tests.models.conftest import GOLDEN, randomized
from tests.models.test_checkpoint import assert_same_parameters


@st.composite
def boxed(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    """A shape, and a box of it."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    box = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        box.append(slice(start, draw(st.integers(start + 1, size))))
    return shape, tuple(box)


@given(boxed())
def test_a_run_of_merged_axes_is_the_box(given_box: tuple[tuple[int, ...], Box]):
    shape, box = given_box
    numbers = np.arange(prod(shape)).reshape(shape)
    run = merged(box, shape)
    wanted = numbers[box].reshape(-1)
    if run is None:
        assert (np.diff(wanted) > 1).any()
    else:
        np.testing.assert_array_equal(numbers.reshape(-1)[run], wanted)


@given(boxed(), st.integers(0, 2), st.booleans(), st.sampled_from(["alone", "behind", "in turns", "by heads"]))
def test_a_part_that_was_read_is_the_part_of_the_whole(
    given_box: tuple[tuple[int, ...], Box], in_axes: int, as_stored: bool, fused: str
):
    shape, box = given_box
    slot = TensorSlot("w", ("w",), in_axes=None if as_stored else min(in_axes, len(shape)))
    own = slot.stored_shape(shape)
    if fused == "behind":  # the last rows of a tensor that holds another parameter too
        slot = dataclasses.replace(slot, part=TensorSlice(0, 2, 2 + own[0], 2 + own[0]))
    if fused == "in turns":  # every other column, from the second on
        axis, total = len(own) - 1, 2 * own[-1]
        slot = dataclasses.replace(slot, part=TensorSlice(axis, 1, total, total, step=2))
    if fused == "by heads" and own[0] % shape[-1] == 0:  # of every run the middle entries
        groups, width = shape[-1], own[0] // shape[-1]
        part = TensorSlice(0, 1, 1 + width, groups * (width + 2), groups=groups)
        slot = dataclasses.replace(slot, part=part)
    stored = np.arange(prod(slot.stored_shape(shape)), dtype=np.float32).reshape(slot.stored_shape(shape))
    everything = slot.stored_box(tuple(slice(0, size) for size in shape), shape)
    assert everything is not None
    parameter = slot.load(stored[everything], shape)
    found = slot.stored_box(box, shape)
    if found is not None:
        target = np.zeros([axis.stop - axis.start for axis in box], np.float32)
        slot.load_into(stored[found], target)
        np.testing.assert_array_equal(target, parameter[box])


@given(boxed())
def test_a_part_of_a_convolution_is_the_part_of_the_whole(given_box: tuple[tuple[int, ...], Box]):
    """Channels of the parameter are one axis of the tensor, which has another one of a single entry."""
    shape, box = given_box
    channels = prod(shape[:-1])
    slot = TensorSlot("w", ("w",), part=TensorSlice(0, 2, 2 + channels, 5 + channels), depthwise=True)
    assert slot.stored_shape(shape) == (5 + channels, 1, shape[-1])
    stored = np.arange(prod(slot.stored_shape(shape)), dtype=np.float32).reshape(slot.stored_shape(shape))
    parameter = stored[2 : 2 + channels, 0].reshape(shape)
    found = slot.stored_box(box, shape)
    if found is not None:
        target = np.zeros([axis.stop - axis.start for axis in box], np.float32)
        slot.load_into(stored[found], target)
        np.testing.assert_array_equal(target, parameter[box])
    np.testing.assert_array_equal(slot.store(parameter), stored[2 : 2 + channels])


@given(boxed())
def test_a_part_of_turned_matrices_is_the_part_of_the_whole(given_box: tuple[tuple[int, ...], Box]):
    """Outputs of both parameters of a tensor come behind each other, as gate and up of experts."""
    shape, box = given_box
    if len(shape) < 3:
        shape, box = (*(1,) * (3 - len(shape)), *shape), (*(slice(0, 1),) * (3 - len(shape)), *box)
    experts, inputs, outputs = shape
    slot = TensorSlot("w", ("w",), part=TensorSlice(1, 2, 2 + outputs, 3 + outputs), turned=True)
    assert slot.stored_shape(shape) == (experts, 3 + outputs, inputs)
    stored = np.arange(prod(slot.stored_shape(shape)), dtype=np.float32).reshape(slot.stored_shape(shape))
    parameter = stored[:, 2 : 2 + outputs].transpose(0, 2, 1)
    found = slot.stored_box(box, shape)
    assert found is not None
    target = np.zeros([axis.stop - axis.start for axis in box], np.float32)
    slot.load_into(stored[found], target)
    np.testing.assert_array_equal(target, parameter[box])
    np.testing.assert_array_equal(slot.load(stored[found], target.shape), parameter[box])
    np.testing.assert_array_equal(slot.store(parameter), stored[:, 2 : 2 + outputs])


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_entries_of_a_part_are_what_is_loaded_from_it(groups: int):
    """Of each of several runs the same places, such as a head's gate behind its queries."""
    part = TensorSlice(0, 2, 5, 7 * groups, groups=groups)
    stored = np.arange(7 * groups * 4.0).reshape(-1, 4)
    slot = TensorSlot("w", ("w",), in_axes=1, part=part)
    found = slot.load(stored, (4, groups, 3)) if groups > 1 else slot.load(stored[part.entries], (4, groups, 3))
    np.testing.assert_array_equal(found, stored.reshape(groups, 7, 4)[:, 2:5].transpose(2, 0, 1))
    whole = np.zeros_like(stored)
    whole[part.entries] = slot.store(found)
    np.testing.assert_array_equal(whole[part.entries], stored[part.entries])
    assert (whole != 0).sum() == groups * 3 * 4


@pytest.mark.parametrize(
    "name",
    [
        *("llama_bias", "mixtral", "llama4", "glm4_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "qwen3_5_moe"),
        "mistral4",
    ],
)
@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"tensor": 2, "expert": 2}], ids=str)
def test_a_mesh_gets_the_parameters_of_one_device(name: str, sizes: dict[str, int]):
    mesh = make_mesh(TeacherMeshConfig(**sizes))
    assert_same_parameters(load_pretrained(GOLDEN / name, mesh=mesh), load_pretrained(GOLDEN / name))


class Counted(SafetensorsSource):
    """Counts the numbers that are read."""

    read_numbers = 0

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        found = super().read(name, box)
        self.read_numbers += found.size
        return found


def only(devices: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had these devices of the mesh alone."""

    def held(name, shape, mesh):
        if mesh is None:
            return [fill.whole(shape)]
        sharding = fill.parameter_sharding(mesh, name, shape)
        found = sharding.devices_indices_map(shape)
        mine = [index for device, index in found.items() if device.id in devices]
        return [*{str(box): box for box in (fill.box_of(index, shape) for index in mine)}.values()]

    monkeypatch.setattr(fill, "held_boxes", held)


def test_a_process_reads_its_share(tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = dataclasses.replace(tiny_config, hidden_size=32, intermediate_size=40, vocab_size=64, num_heads=8)
    save_pretrained(randomized(Decoder(config)), tmp_path / "model")
    mesh = make_mesh(TeacherMeshConfig(tensor=2, fsdp=2))
    only([2, 3], monkeypatch)
    source = Counted(tmp_path / "model")
    total = held = 0
    for path, like in nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Decoder(config)))):
        slots = [slot for slot in tensor_slots(config, layout_of(config)) if slot.path == path]
        plan = plan_fill(path, like, slots, mesh)
        parts = sum(prod(axis.stop - axis.start for axis in box) for box in plan.boxes)
        before = source.read_numbers
        for read in plan.reads:
            source.read(read.slot.name, read.box)
        assert source.read_numbers - before == parts, path
        total, held = total + prod(like.shape), held + parts
    assert held < 0.52 * total
