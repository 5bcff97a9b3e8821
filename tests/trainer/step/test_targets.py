"""The places of the tensors that blocks are trained against."""

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.trainer.step.targets import (
    BlockTargets,
    Span,
    block_targets,
    in_block_order,
    padded_targets,
    student_spans,
)
from tests.trainer.conftest import MIXED

# Five blocks in two layer groups, of which the second holds one; stacks whose places are not the slots' numbers.
SPANS = student_spans(MIXED, 8, [0, 1, 3, 4, 7])
PLACES = {"resid": {slot: 20 + slot for slot in range(9)}, "attn_out": {slot: 40 + slot for slot in range(8)}}
WEIGHTS = {0: 1.0, 1: 0.5, 3: 2.0}


def rows_of(targets: tuple[BlockTargets, ...]) -> BlockTargets:
    return jax.tree.map(np.asarray, in_block_order(targets))


def test_every_block_finds_its_spans_slots():
    rows = rows_of(block_targets(MIXED, SPANS, [PLACES] * 5, WEIGHTS, needs_leaving=True))
    assert rows.block.tolist() == [0, 1, 2, 3, 4]
    assert rows.trained.tolist() == [True, True, False, True, False]
    assert rows.weight.tolist() == [1.0, 0.5, 0.0, 2.0, 0.0]
    assert rows.count.tolist() == [1, 2, 1, 3, 1]
    assert rows.resid.tolist() == [20, 21, 0, 24, 0]
    assert rows.leaving.tolist() == [21, 23, 0, 27, 0]
    assert rows.attn_out.tolist() == [[40, 0, 0], [41, 42, 0], [0, 0, 0], [44, 45, 46], [0, 0, 0]]


def test_what_is_not_read_is_not_there():
    """No column of zeros that a program could take for places."""
    targets = block_targets(MIXED, SPANS, [{"attn_out": PLACES["attn_out"]}] * 5, WEIGHTS)
    there = {field.name for field in fields(BlockTargets) if getattr(targets[0], field.name) is not None}
    assert there == {"block", "trained", "weight", "count", "attn_out"}
    assert len(jax.tree.leaves(targets[0])) == 5
    norms = np.arange(8 * 4, dtype=np.float32).reshape(8, 4)
    found = rows_of(block_targets(MIXED, SPANS, [PLACES] * 5, WEIGHTS, norms=norms))
    np.testing.assert_array_equal(found.norm, norms[[0, 1, 3, 4, 7]])


def test_each_block_reads_the_stack_of_its_own_devices():
    other = {"resid": {slot: slot for slot in range(9)}, "attn_out": {slot: slot for slot in range(8)}}
    rows = rows_of(block_targets(MIXED, SPANS, [PLACES, PLACES, PLACES, other, other], WEIGHTS))
    assert rows.resid.tolist() == [20, 21, 0, 4, 0]


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_padding_is_not_trained_and_all_groups_run_what_one_trains(groups):
    spans = tuple(Span(at, at + 1) for at in range(5))
    targets = block_targets(MIXED, spans, [PLACES] * 5, {0: 1.0, 3: 1.0})
    padded = padded_targets(targets, groups)
    for before, after in zip(targets, padded, strict=True):
        repeats = before.trained.shape[0]
        assert after.trained.shape[0] == -(-repeats // groups) * groups
        for name in ("block", "weight", "attn_out", "trained"):
            np.testing.assert_array_equal(getattr(after, name)[:repeats], getattr(before, name))
        assert not after.trained[repeats:].any()
        if groups == 1:
            assert after.runs is None
            continue
        turns = after.trained.reshape(groups, -1, after.trained.shape[1])
        for group in after.runs.reshape(turns.shape):
            np.testing.assert_array_equal(group, turns.any(axis=0))


def test_targets_pass_through_jit_as_data():
    """Other places need no other program; one block's are taken by a traced number."""
    compiled = []

    @jax.jit
    def taken(targets: tuple[BlockTargets, ...], repeat: jax.Array) -> jax.Array:
        compiled.append(True)
        row = targets[0].at(repeat, 1)
        assert row.trained.shape == ()
        assert row.mlp_out is None
        return row.resid

    targets = block_targets(MIXED, SPANS, [PLACES] * 5, WEIGHTS)
    moved = tuple(replace(group, resid=group.resid + 1) for group in targets)
    assert [int(taken(targets, jnp.int32(at))) for at in (0, 1)] == [21, 24]
    assert [int(taken(moved, jnp.int32(at))) for at in (0, 1)] == [22, 25]
    assert len(compiled) == 1
