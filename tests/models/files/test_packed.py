"""Tensors that are stored under other names or in few bits: their numbers, and parts of them."""

from collections.abc import Sequence
from itertools import product

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from distillcache.models.files.packed import UnpackedSource, unpack_mxfp4, unpacked
from distillcache.models.files.tensors import Box, FusedExperts, Layout
from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import Location
from tests.models.conftest import GOLDEN


class Stored:
    """A checkpoint in memory, which notes what is read of it."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.where: Location = GOLDEN
        self.tensors, self.announced, self.got = tensors, [], []
        self.shapes = {name: value.shape for name, value in tensors.items()}
        kinds = {"uint8": "U8", "float32": "F32", "float8_e4m3fn": "F8_E4M3", "int32": "I32", "bfloat16": "BF16"}
        self.dtypes = {name: kinds[value.dtype.name] for name, value in tensors.items()}

    def announce(self, reads: Sequence[tuple[str, Box]]) -> None:
        self.announced = list(reads)

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        assert box is not None
        self.got.append((name, box))
        return self.tensors[name][box]

    def close(self) -> None:
        self.tensors = {}


def test_mxfp4_as_transformers_unpacks_it():
    golden = load_file(GOLDEN / "mxfp4.safetensors")
    found = unpack_mxfp4(golden["blocks"], golden["scales"])
    assert set(np.unique(golden["blocks"])) == set(range(256))
    np.testing.assert_array_equal(found.transpose(0, 2, 1), golden["values"].astype(np.float32))
    np.testing.assert_array_equal(found.astype(ml_dtypes.bfloat16).astype(np.float32), found)


LAYOUT = Layout(lambda kind: [], spellings=(("old.", "new."),))


def packed_source() -> tuple[Stored, dict[str, np.ndarray]]:
    """Of each form a tensor, and what it means."""
    rng, golden = np.random.default_rng(0), load_file(GOLDEN / "mxfp4.safetensors")
    codes = rng.normal(size=(9, 11)).astype(ml_dtypes.float8_e4m3fn)
    scales, plain = rng.random((3, 2)).astype(np.float32), rng.random((4, 5)).astype(np.float32)
    spread = np.kron(scales, np.ones((4, 6), np.float32))[:9, :11]
    source = Stored(
        {
            "old.up_blocks": golden["blocks"],
            "old.up_scales": golden["scales"],
            "fp8.weight": codes,
            "fp8.weight_scale_inv": scales,
            "old.plain": plain,
            "left": plain + 1,
        }
    )
    meant = {"new.up": golden["values"], "fp8.weight": codes.astype(np.float32) * spread, "new.plain": plain}
    return source, meant | {"left": plain + 1}


def test_every_form_under_the_names_of_the_layout():
    source, meant = packed_source()
    found = unpacked(source, LAYOUT, {"weight_block_size": [4, 6]})
    assert found.shapes == {name: value.shape for name, value in meant.items()}
    assert found.dtypes == {"new.up": "BF16", "fp8.weight": "F32", "new.plain": "F32", "left": "F32"}
    for name, value in meant.items():
        np.testing.assert_array_equal(found.read(name), value)
    found.close()
    assert not source.tensors


@pytest.mark.parametrize(
    ("name", "box", "read"),
    [
        ("new.up", (slice(1, 2), slice(40, 97), slice(1, 3)), 2 * 3 * 16 + 2 * 3),
        ("new.up", (slice(0, 2), slice(32, 64), slice(2, 3)), 2 * 16 + 2),
        ("fp8.weight", (slice(3, 9), slice(6, 8)), 6 * 2 + 3 * 1),
        ("new.plain", (slice(1, 3), slice(0, 5)), 10),
    ],
)
def test_of_a_part_only_its_own_is_read(name: str, box: Box, read: int):
    """And it is announced before, in the order in which it is read."""
    source, meant = packed_source()
    found = unpacked(source, LAYOUT, {"weight_block_size": [4, 6]})
    found.announce([(name, box), ("left", (slice(0, 1), slice(0, 1)))])
    np.testing.assert_array_equal(found.read(name, box), meant[name][box])
    found.read("left", (slice(0, 1), slice(0, 1)))
    assert source.announced == source.got
    assert sum(source.tensors[stored][part].size for stored, part in source.got[:-1]) == read


@pytest.mark.parametrize("inputs_first", [False, True])
def test_of_experts_stored_together_each_is_read_alone(inputs_first: bool):
    """Of 3 experts with D = 4, F = 5: gate above up, and down; as products take them, or with inputs first."""
    rng = np.random.default_rng(0)
    both, down = rng.normal(size=(3, 10, 4)).astype(np.float32), rng.normal(size=(3, 4, 5)).astype(np.float32)
    turn = (lambda value: np.ascontiguousarray(value.swapaxes(1, 2))) if inputs_first else (lambda value: value)
    stored = {"old.0.mlp.experts.gate_up_proj": turn(both), "old.0.mlp.experts.down_proj": turn(down)}
    source = Stored(stored)
    layout = Layout(lambda kind: [], spellings=(("old.", "new."),), fused=FusedExperts(4, 5, inputs_first=False))
    found = unpacked(source, layout, None)
    prefix = "new.0.mlp.experts."
    assert len(found.shapes) == 9
    assert {found.shapes[f"{prefix}2.{name}_proj.weight"] for name in ("gate", "up", "down")} == {(5, 4), (4, 5)}
    for expert in range(3):
        np.testing.assert_array_equal(found.read(f"{prefix}{expert}.gate_proj.weight"), both[expert, :5])
        np.testing.assert_array_equal(found.read(f"{prefix}{expert}.down_proj.weight"), down[expert])
    source.got.clear()
    box = (slice(1, 4), slice(2, 4))
    np.testing.assert_array_equal(found.read(f"{prefix}1.up_proj.weight", box), both[1, 5:][box])
    assert sum(source.tensors[name][part].size for name, part in source.got) == 6


def test_experts_stored_together_may_have_codes_of_8_bits():
    """With scales for squares of 4 x 2 of each expert, in bfloat16."""
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(3, 10, 4)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.random((3, 3, 2)).astype(ml_dtypes.bfloat16)
    name = "old.0.mlp.experts.gate_up_proj"
    source = Stored({name: codes, f"{name}_scale_inv": scales})
    layout = Layout(lambda kind: [], spellings=(("old.", "new."),), fused=FusedExperts(4, 5, inputs_first=False))
    found = unpacked(source, layout, {"weight_block_size": [4, 2]})
    assert len(found.shapes) == 6
    meant = codes.astype(np.float32) * np.kron(scales.astype(np.float32), np.ones((1, 4, 2)))[:, :10]
    for expert, (place, matrix) in product(range(3), enumerate(("gate", "up"))):
        read = found.read(f"new.0.mlp.experts.{expert}.{matrix}_proj.weight")
        np.testing.assert_array_equal(read, meant[expert, 5 * place : 5 * place + 5])
    box = (slice(1, 4), slice(2, 4))
    np.testing.assert_array_equal(found.read("new.0.mlp.experts.1.up_proj.weight", box), meant[1, 5:][box])
    with pytest.raises(CheckpointError, match="scales of a packed tensor"):
        unpacked(Stored({name: codes}), layout, {"weight_block_size": [4, 2]})


def test_experts_of_other_sizes_keep_their_name():
    """So that the error about tensors names them."""
    source = Stored({"0.mlp.experts.gate_up_proj": np.zeros((3, 11, 4), np.float32)})
    layout = Layout(lambda kind: [], fused=FusedExperts(4, 5, inputs_first=False))
    assert unpacked(source, layout, None) is source


def test_a_square_matrix_is_turned_as_the_family_has_it():
    down = np.arange(32.0, dtype=np.float32).reshape(2, 4, 4)
    for inputs_first in (False, True):
        layout = Layout(lambda kind: [], fused=FusedExperts(4, 4, inputs_first=inputs_first))
        found = unpacked(Stored({"mlp.experts.down_proj": down}), layout, None)
        read = found.read("mlp.experts.1.down_proj.weight")
        np.testing.assert_array_equal(read, down[1].T if inputs_first else down[1])


def test_a_checkpoint_of_plain_tensors_is_left_as_it_is():
    source = Stored({"new.plain": np.ones(3, np.float32)})
    assert unpacked(source, LAYOUT, None) is source
    assert isinstance(unpacked(Stored({"old.plain": np.ones(3, np.float32)}), LAYOUT, None), UnpackedSource)


def as_packed(values: np.ndarray) -> np.ndarray:
    """Integers from -8 to 7 `[O, I]`, eight to one, the first in the lowest bits."""
    padded = np.pad(values + 8, [(0, 0), (0, -values.shape[1] % 8)]).reshape(len(values), -1, 8).astype(np.uint32)
    return (padded << (4 * np.arange(8, dtype=np.uint32))).sum(axis=-1, dtype=np.uint32).view(np.int32)


INT4 = {"config_groups": {"group_0": {"weights": {"group_size": 12, "num_bits": 4}}}}


@pytest.mark.parametrize("box", [None, (slice(1, 4), slice(5, 20)), (slice(0, 1), slice(23, 24))], ids=str)
def test_integers_of_four_bits(box: Box | None):
    """All sixteen, in groups of 12; of a part its own words and factors alone. The tensor of sizes is left out."""
    rng = np.random.default_rng(0)
    values = np.concatenate([np.arange(-8, 8), rng.integers(-8, 8, 4 * 24 - 16)]).reshape(4, 24)
    scale = rng.random((4, 2)).astype(ml_dtypes.bfloat16)
    stored = {"old.w.weight_packed": as_packed(values), "old.w.weight_scale": scale}
    source = Stored(stored | {"old.w.weight_shape": np.array([4, 24], np.int32)})
    found = unpacked(source, LAYOUT, INT4)
    assert (found.shapes, found.dtypes) == ({"new.w.weight": (4, 24)}, {"new.w.weight": "F32"})
    meant = values.astype(np.float32) * np.repeat(scale.astype(np.float32), 12, axis=1)
    np.testing.assert_array_equal(found.read("new.w.weight", box), meant if box is None else meant[box])
    if box == (slice(0, 1), slice(23, 24)):
        assert [source.tensors[name][part].size for name, part in source.got] == [1, 1]


def test_integers_without_their_factors_are_refused():
    source = Stored({"w.weight_packed": as_packed(np.zeros((4, 24), int))})
    with pytest.raises(CheckpointError, match="scales of a packed tensor"):
        unpacked(source, LAYOUT, INT4)


@pytest.mark.parametrize("scales", [(), (1,), (3,), (3, 1, 1)], ids=str)
def test_fp8_with_a_factor_for_a_matrix(scales: tuple[int, ...]):
    """Or for each of the experts that are stored together; factors of activations are left out."""
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(3, 5, 4)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.random(scales).astype(np.float32) if scales else np.array(0.37, np.float32)
    stored = {"w": codes, "w_scale_inv": scale, "w_activation_scale": np.ones(3, np.float32)}
    found = unpacked(Stored(stored), LAYOUT, {"quant_method": "fp8", "weight_block_size": None})
    assert (found.shapes, found.dtypes) == ({"w": (3, 5, 4)}, {"w": "F32"})
    meant = codes.astype(np.float32) * scale.reshape(-1, 1, 1)
    np.testing.assert_array_equal(found.read("w"), meant)
    box = (slice(1, 3), slice(2, 4), slice(0, 1))
    np.testing.assert_array_equal(found.read("w", box), meant[box])


def test_factors_of_another_number_of_experts_are_refused():
    stored = {"w": np.zeros((3, 5, 4), ml_dtypes.float8_e4m3fn), "w_scale_inv": np.ones(2, np.float32)}
    with pytest.raises(CheckpointError, match="scales of a packed tensor"):
        unpacked(Stored(stored), LAYOUT, {"quant_method": "fp8", "weight_block_size": None})
