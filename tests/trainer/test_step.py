"""The blockwise step: its gradients against an unrolled oracle, and what says that blocks are apart."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import BlockKind, LayerGroup
from models.decoder import Decoder
from schemas.codecs import get_codec
from schemas.config import FeatureLossConfig, OptimizerConfig
from tests.trainer.conftest import MIXED, full_table, random_batch
from trainer.losses import feature_loss
from trainer.optimizer import make_optimizer
from trainer.step import AttentionStack, TapTable, init_state, make_step
from trainer.step import block_gradients as traced_block_gradients

block_gradients = jax.jit(traced_block_gradients, static_argnums=(0, 3, 4))

LOSS = FeatureLossConfig(weight=2.0, relative_l2=1.0, cosine=0.5, l2=0.25)


def unrolled(decoder, batch, blocks):
    """Sum over `blocks` of the mean losses, as a function of all attention parameters: no scan, stacked loss."""
    stack = AttentionStack(decoder)
    decode = get_codec("bf16").decode
    resid, target = (decode(batch[tap]).astype(jnp.float32) for tap in ("resid", "attn_out"))
    mask, context = batch["segment_ids"] > 0, stack.context(batch)
    order = sorted(
        (block, group, place, repeat)
        for group, places in enumerate(stack.numbers())
        for place, numbers in enumerate(places)
        for repeat, block in enumerate(numbers)
    )

    def loss(parameters):
        outputs = []
        for block, group, place, repeat in order:
            sliced = jax.tree.map(lambda x, r=repeat: x[r], parameters[group][place])
            outputs.append(nnx.merge(stack.graphs[group][place], sliced)(resid[block], context))
        sums = feature_loss(jnp.stack(outputs), target, mask, relative_l2=2.0, cosine=1.0, l2=0.5)
        return sum(sums.mean[block] for block in blocks), sums

    return loss


def leaves_close(found, expected):
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("blocks", [(0, 1, 2, 3, 4), (1, 4)])
def test_gradients_equal_the_unrolled_ones(student, blocks):
    batch, stack = random_batch(MIXED), AttentionStack(student)
    parameters = stack.parameters(student)
    table = replace(full_table(MIXED), trained=tuple(block in blocks for block in range(5)))
    gradients, sums = block_gradients(stack, parameters, batch, table, LOSS)
    expected, oracle = jax.jit(jax.grad(unrolled(student, batch, blocks), has_aux=True))(parameters)
    leaves_close(gradients, expected)
    for block in range(5):
        np.testing.assert_allclose(sums.total[block], oracle.total[block] if block in blocks else 0, rtol=1e-5)
    assert sums.weight == (batch["segment_ids"] > 0).sum()


def test_the_blocks_are_those_of_the_decoder(student):
    """Fed with the student's own taps, every block reproduces its own output: zero loss, zero gradient, float32."""
    batch = random_batch(MIXED, codec="f32")
    rows = (batch[name] for name in ("tokens", "positions", "segment_ids"))
    out = nnx.jit(lambda model, *rows: model(*rows, taps=("resid", "attn_out"), logits=False))(student, *rows)
    batch |= {"resid": {"codes": out.taps["resid"]}, "attn_out": {"codes": out.taps["attn_out"]}}
    stack = AttentionStack(student)
    loss = FeatureLossConfig(relative_l2=1.0, l2=1.0)
    gradients, sums = block_gradients(stack, stack.parameters(student), batch, full_table(MIXED, "f32"), loss)
    assert np.abs(sums.total).max() < 1e-9
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) < 1e-4


@pytest.mark.parametrize("tap", ["resid", "attn_out"])
def test_changing_one_block_s_tensors_changes_that_block_alone(student, tap):
    batch, stack, table = random_batch(MIXED), AttentionStack(student), full_table(MIXED)
    parameters = stack.parameters(student)
    changed = {**batch, tap: {"codes": batch[tap]["codes"].at[2].set(get_codec("bf16").encode(jnp.ones(1))["codes"])}}
    (before, sums), (after, other) = (
        block_gradients(stack, parameters, each, table, LOSS) for each in (batch, changed)
    )
    assert [bool(equal) for equal in sums.total == other.total] == [True, True, False, True, True]
    same = jax.tree.map(lambda x, y: np.asarray((x == y).reshape(len(x), -1).all(1)), before, after)
    for group, places in enumerate(stack.numbers()):
        for place, numbers in enumerate(places):
            for leaf in jax.tree.leaves(same[group][place]):
                assert [bool(value) for value in leaf] == [block != 2 for block in numbers]


def test_gradients_do_not_depend_on_the_depth(student):
    """The same block in a deeper student gets the same gradient: the objective is a sum over blocks."""
    batch, table = random_batch(MIXED), full_table(MIXED)
    stack = AttentionStack(student)
    alone = replace(table, trained=(False, False, False, False, True))
    gradients = [block_gradients(stack, stack.parameters(student), batch, each, LOSS)[0] for each in (table, alone)]
    for left, right in zip(jax.tree.leaves(gradients[0][1]), jax.tree.leaves(gradients[1][1]), strict=True):
        np.testing.assert_array_equal(left, right)


def test_padding_alone_gives_zero(student):
    batch = random_batch(MIXED)
    batch["segment_ids"][:] = 0
    stack = AttentionStack(student)
    gradients, sums = block_gradients(stack, stack.parameters(student), batch, full_table(MIXED), LOSS)
    assert not np.asarray(sums.mean).any()
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


def test_what_is_in_padding_changes_nothing(student):
    batch, stack, table = random_batch(MIXED), AttentionStack(student), full_table(MIXED)
    padding = batch["segment_ids"] == 0
    other = {
        **batch,
        **{
            tap: {"codes": jnp.where(padding[None, ..., None], 7, batch[tap]["codes"])} for tap in ("resid", "attn_out")
        },
    }
    found = [block_gradients(stack, stack.parameters(student), each, table, LOSS) for each in (batch, other)]
    np.testing.assert_allclose(found[0][1].total, found[1][1].total, rtol=1e-6)
    leaves_close(found[0][0], found[1][0])


def test_sparse_stacks_are_indexed_by_slot(student):
    """A cache of blocks 1 and 4: two slots, the same numbers as in the full stacks."""
    batch, stack = random_batch(MIXED), AttentionStack(student)
    few = {**batch, **{tap: {"codes": batch[tap]["codes"][jnp.array([1, 4])]} for tap in ("resid", "attn_out")}}
    trained = (False, True, False, False, True)
    sparse = TapTable((0, 0, 0, 0, 1), (0, 0, 0, 0, 1), trained, get_codec("bf16"), get_codec("bf16"))
    parameters = stack.parameters(student)
    found = block_gradients(stack, parameters, few, sparse, LOSS)
    expected = block_gradients(stack, parameters, batch, replace(full_table(MIXED), trained=trained), LOSS)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(left, right)


def test_steps_lower_the_loss_of_trained_blocks_only(student):
    batch, stack = random_batch(MIXED), AttentionStack(student)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=0, weight_decay=0.1), 20)
    table = replace(full_table(MIXED), trained=(True, False, True, True, True))
    state, step = init_state(stack, student, optimizer), make_step(stack, optimizer, LOSS, table)
    before = stack.parameters(student)
    losses = []
    for _ in range(20):
        state, sums = step(state, batch)
        losses.append(np.asarray(sums.mean))
    assert (losses[-1][[0, 2, 3, 4]] < 0.8 * losses[0][[0, 2, 3, 4]]).all()
    assert all(loss[1] == 0 for loss in losses)
    for old, new in zip(jax.tree.leaves(before[0][1]), jax.tree.leaves(state.parameters[0][1]), strict=True):
        np.testing.assert_array_equal(old[0], new[0])  # block 1: group 0, place 1, repeat 0
    assert step._cache_size() == 1


def test_training_leaves_the_decoder_alone_until_installed(student):
    student = nnx.clone(student)
    batch, stack = random_batch(MIXED), AttentionStack(student)
    optimizer = make_optimizer(OptimizerConfig(), 5)
    state, step = init_state(stack, student, optimizer), make_step(stack, optimizer, LOSS, full_table(MIXED))
    before = jax.tree.map(np.asarray, nnx.state(student))
    state, _ = step(state, batch)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(student)), strict=True):
        np.testing.assert_array_equal(old, new)
    stack.install(student, state.parameters)
    state, _ = step(state, batch)  # gives its memory away; the decoder has its own
    changed = jax.tree.map(lambda old, new: not np.array_equal(old, new), before, nnx.state(student))
    names = {jax.tree_util.keystr(path) for path, moved in jax.tree_util.tree_flatten_with_path(changed)[0] if moved}
    assert names
    assert all("attention" in name for name in names)


def test_temporaries_do_not_grow_with_depth():
    """XLA's own memory analysis of the step, one stacked gradient subtracted: 24 blocks against 6."""
    rest = []
    for depth in (6, 24):
        config = replace(MIXED, hidden_size=64, layers=(LayerGroup((BlockKind(),), depth),))
        decoder = Decoder(config, rngs=nnx.Rngs(0))
        stack, optimizer = AttentionStack(decoder), make_optimizer(OptimizerConfig(), 5)
        state = init_state(stack, decoder, optimizer)
        step = make_step(stack, optimizer, LOSS, full_table(config))
        compiled = step.lower(state, random_batch(config, rows=2, tokens=32)).compile()
        stacked = sum(leaf.nbytes for leaf in jax.tree.leaves(state.parameters))
        rest.append(compiled.memory_analysis().temp_size_in_bytes - stacked)
    assert rest[1] <= 1.25 * rest[0]
