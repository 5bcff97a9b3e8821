"""The blockwise step: its gradients against an unrolled oracle, and what says that blocks are apart."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.models.config import BlockKind, LayerGroup
from distillcache.models.decoder import Decoder
from distillcache.models.layers.norm import rms_norm
from distillcache.schemas.codecs import get_codec, make_signs
from distillcache.schemas.config.train import FeatureLossConfig, LossConfig, MlpLossConfig, OptimizerConfig, Ramp
from distillcache.trainer.losses import feature_loss
from distillcache.trainer.step.blockwise_program import block_sums, blockwise_update
from distillcache.trainer.step.optimizer import make_optimizer
from distillcache.trainer.step.parameters import (
    address_prefix,
    all_parameters,
    at_address,
    install,
    make_projectors,
    sublayer,
)
from distillcache.trainer.step.program import init_state, jit_step
from distillcache.trainer.step.stack import BlockRules, StudentStack
from distillcache.trainer.step.targets import TapReading, block_targets, student_spans
from tests.trainer.conftest import EVEN, MIXED, blockwise, parameters_of, random_batch

FEATURE = FeatureLossConfig(weight=2.0, relative_l2=1.0, cosine=0.5, l2=0.25)
LOSS = LossConfig(feature=FEATURE)
BOTH = LossConfig(feature=FEATURE, mlp=MlpLossConfig(weight=0.5, relative_l2=1.0, l2=0.5))
# (place, repeat) of every block, in order.
ORDERS = {
    "mixed": [((0, 0), 0), ((0, 1), 0), ((0, 0), 1), ((0, 1), 1), ((1, 0), 0)],
    "student": [((0, 0), 0), ((0, 0), 1), ((0, 0), 2), ((0, 0), 3)],
}


@partial(jax.jit, static_argnums=0)
def jitted_gradients(step, trained, frozen, batch, targets, at):
    return step.gradients(trained, frozen, batch, targets, at)


def gradients_of(step, targets, trained, frozen, batch, at=0):
    """Gradients by name, and `[L]` sums by loss."""
    gradients, sums, _ = jitted_gradients(step, trained, frozen, batch, targets, jnp.int32(at))
    losses = {
        name: step.stack.in_block_order({p: s.terms[name] for p, s in sums.items()}) for name in ("feature", "mlp")
    }
    return gradients, {name: np.asarray(value) for name, value in losses.items()}


@partial(jax.jit, static_argnums=(0, 1, 2))
def block_gradient(attention, mlp, rules, own, fixed, given, context, mask, norm):
    """The gradient of one block's weighted mean losses, and their sums; attention and mlp: its graphs."""
    resid, target, after = given

    def total(own):
        both = {**fixed, **own}
        block = sublayer(attention, "attention", both)
        if norm is None:
            out = block(resid, context)
        else:
            out = block.attend(rms_norm(resid, norm, rules.teacher_norm_eps), context)
        feature = feature_loss(out, target, mask, relative_l2=1.0, cosine=0.5, l2=0.25)
        if not rules.runs_mlp:
            return 2.0 * feature.mean, (feature.total, 0.0)
        middle = resid + (out if rules.mlp_input == "student" else target)
        wanted = after - resid - target
        sums = feature_loss(sublayer(mlp, "mlp", both)(middle, context)[0], wanted, mask, relative_l2=1.0, l2=0.5)
        return 2.0 * feature.mean + 0.5 * sums.mean, (feature.total, sums.total)

    return jax.grad(total, has_aux=True)(own)


def unrolled(decoder, order, trained, frozen, batch, blocks, rules, norms=None):
    """Every block's gradient by itself, put into the stacks, and the losses' sums by block: no scan."""
    stack, expected, found = StudentStack(decoder), {name: np.zeros(leaf.shape) for name, leaf in trained.items()}, {}
    decode = get_codec("bf16").decode
    resid, target = (np.asarray(decode(batch[tap]), np.float32) for tap in ("resid", "attn_out"))
    mask, context = batch["segment_ids"] > 0, stack.context(batch)
    for block in blocks:
        address, repeat = order[block]
        own, fixed = (
            {name: leaf[repeat] for name, leaf in at_address(each, address).items()} for each in (trained, frozen)
        )
        given, norm = (resid[block], target[block], resid[block + 1]), None if norms is None else norms[block]
        graphs = stack.graphs[address]
        gradient, found[block] = block_gradient(
            graphs["attention"], graphs["mlp"], rules, own, fixed, given, context, mask, norm
        )
        for name, value in gradient.items():
            expected[address_prefix(address) + name][repeat] = value
    return expected, found


def assert_close(found, expected):
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "rules", "blocks", "inject"),
    [
        ("student", BlockRules(), (0, 1, 2, 3), "resid"),
        ("mixed", BlockRules(teacher_norm_eps=0.1), (1, 4), "attn_in"),  # the student's is 1e-6
        ("student", BlockRules(runs_mlp=True), (1, 3), "resid"),
        ("mixed", BlockRules(runs_mlp=True, mlp_input="student"), (0, 1, 2, 3, 4), "resid"),
    ],
    ids=["attention", "attn_in", "mlp", "mlp of student"],
)
def test_gradients_equal_the_unrolled_ones(request, kind, rules, blocks, inject):
    decoder = request.getfixturevalue(kind)
    config = decoder.config
    batch, loss = random_batch(config), BOTH if rules.runs_mlp else LOSS
    trained, frozen = parameters_of(decoder, "attention", *(["mlp"] if rules.runs_mlp else []))
    norms = None
    if inject == "attn_in":
        norms = np.random.default_rng(3).uniform(0.5, 2, (config.num_blocks, config.hidden_size)).astype(np.float32)
    step, targets = blockwise(decoder, loss, blocks=blocks, rules=rules, norms=norms)
    gradients, sums = gradients_of(step, targets, trained, frozen, batch)
    expected, found = unrolled(decoder, ORDERS[kind], trained, frozen, batch, blocks, rules, norms)
    assert_close(gradients, expected)
    for block in range(config.num_blocks):
        wanted = found.get(block, (0, 0))
        np.testing.assert_allclose((sums["feature"][block], sums["mlp"][block]), wanted, rtol=1e-5)


def test_the_blocks_are_those_of_the_decoder(mixed):
    """Fed with the student's own taps, every block reproduces its own outputs: zero loss, zero gradient, float32."""
    batch = random_batch(MIXED, codec="f32")
    rows = (batch[name] for name in ("tokens", "positions", "segment_ids"))
    out = nnx.jit(lambda model, *rows: model(*rows, taps=("resid", "attn_out"), logits=False))(mixed, *rows)
    batch |= {"resid": {"codes": out.taps["resid"]}, "attn_out": {"codes": out.taps["attn_out"]}}
    loss = LossConfig(feature=FeatureLossConfig(l2=1.0), mlp=MlpLossConfig(weight=1.0, l2=1.0))
    trained, frozen = parameters_of(mixed, "attention", "mlp")
    step, targets = blockwise(mixed, loss, codec="f32", rules=BlockRules(runs_mlp=True))
    gradients, sums = gradients_of(step, targets, trained, frozen, batch)
    assert max(np.abs(value).max() for value in sums.values()) < 1e-7
    assert max(float(jnp.abs(leaf).max()) for leaf in gradients.values()) < 1e-4


CHANGES = {
    "steps": 21,
    "micro_batches": 3,
    "inside_scan": False,
    "rules": BlockRules(runs_mlp=True),
    "loss": BOTH,
    "optimizer": make_optimizer(OptimizerConfig(learning_rate=1e-3, b1=0.5), 20),
    "reading": TapReading({"resid": get_codec("f32"), "attn_out": get_codec("bf16")}, EVEN.hidden_size, in_step=False),
    "stack": StudentStack(nnx.eval_shape(lambda: Decoder(replace(EVEN, norm_eps=0.5)))),
}


def test_steps_of_equal_values_share_their_program(student):
    one, other = (blockwise(nnx.clone(student), LOSS)[0] for _ in range(2))
    assert blockwise_update(one) is blockwise_update(other)
    for name, value in CHANGES.items():
        assert blockwise_update(replace(one, **{name: value})) is not blockwise_update(one), name


def test_codecs_are_compared_by_their_signs():
    signs = [make_signs(seed, 64) for seed in ("one", "one", "other")]
    one, same, other = (get_codec("int8", signs=each, delta=True) for each in signs)
    assert (one == same, hash(one) == hash(same), one == other) == (True, True, False)
    assert one != get_codec("int8", delta=True)
    assert get_codec("int8") != get_codec("int4")


@pytest.mark.parametrize("tap", ["resid", "attn_out"])
def test_changing_one_block_s_tensors_changes_that_block_alone(student, tap):
    batch = random_batch(EVEN)
    trained, frozen = parameters_of(student, "attention")
    step, targets = blockwise(student, LOSS)
    changed = {**batch, tap: {"codes": batch[tap]["codes"].at[2].set(get_codec("bf16").encode(jnp.ones(1))["codes"])}}
    (before, sums), (after, other) = (gradients_of(step, targets, trained, frozen, each) for each in (batch, changed))
    assert [bool(equal) for equal in sums["feature"] == other["feature"]] == [True, True, False, True]
    for name in before:
        assert [bool((left == right).all()) for left, right in zip(before[name], after[name], strict=True)] == [
            True,
            True,
            False,
            True,
        ]


def test_ce_and_kl_do_nothing(student):
    batch, other = random_batch(EVEN), LossConfig(feature=FEATURE, alpha=0.7, tau=3.0)
    trained, frozen = parameters_of(student, "attention")
    found = [gradients_of(*blockwise(student, loss), trained, frozen, batch) for loss in (LOSS, other)]
    for name in trained:
        np.testing.assert_array_equal(found[0][0][name], found[1][0][name])


def test_padding_alone_gives_zero(student):
    batch = random_batch(EVEN)
    batch["segment_ids"][:] = 0
    trained, frozen = parameters_of(student, "attention", "mlp")
    step, targets = blockwise(student, BOTH, rules=BlockRules(runs_mlp=True))
    gradients, sums = gradients_of(step, targets, trained, frozen, batch)
    assert not any(value.any() for value in sums.values())
    assert not any(np.asarray(leaf).any() for leaf in gradients.values())


def test_what_is_in_padding_changes_nothing(student):
    batch = random_batch(EVEN)
    padding = (batch["segment_ids"] == 0)[None, ..., None]
    other = {**batch, **{tap: {"codes": jnp.where(padding, 7, batch[tap]["codes"])} for tap in ("resid", "attn_out")}}
    trained, frozen = parameters_of(student, "attention")
    step, targets = blockwise(student, LOSS)
    found = [gradients_of(step, targets, trained, frozen, each) for each in (batch, other)]
    np.testing.assert_allclose(found[0][1]["feature"], found[1][1]["feature"], rtol=1e-6)
    assert_close(found[0][0], found[1][0])


def test_uneven_micro_batches_give_the_whole_batch_s_gradient(student):
    """Rows with few real tokens weigh as they do in the whole batch."""
    batch = random_batch(EVEN, rows=4)
    batch["segment_ids"][2, 1:] = 0
    batch["segment_ids"][3] = 0
    trained, frozen = parameters_of(student, "attention", "mlp")
    rules = BlockRules(runs_mlp=True)
    found = [
        gradients_of(*blockwise(student, BOTH, rules=rules, micro_batches=count), trained, frozen, batch)
        for count in (1, 4)
    ]
    for gradients, sums in found[1:]:
        assert_close(gradients, found[0][0])
        np.testing.assert_allclose(sums["mlp"], found[0][1]["mlp"], rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_compute_keeps_float32_masters(student):
    batch = random_batch(EVEN)
    trained, frozen = parameters_of(student, "attention")
    exact, _ = gradients_of(*blockwise(student, LOSS), trained, frozen, batch)
    rules = BlockRules(compute_dtype="bfloat16")
    found, _ = gradients_of(*blockwise(student, LOSS, rules=rules), trained, frozen, batch)
    for name, gradient in found.items():
        assert gradient.dtype == jnp.float32
        error = np.linalg.norm(gradient - exact[name]) / np.linalg.norm(exact[name])
        assert 0 < error < 0.05, name  # bfloat16 rounds to 0.4%; a few roundings in a row


def test_weights_follow_the_step(student):
    batch = random_batch(EVEN)
    ramp = LossConfig(feature=FeatureLossConfig(weight=Ramp(start=0.0, end=3.0)))
    trained, frozen = parameters_of(student, "attention")
    step, targets = blockwise(student, ramp, steps=11)
    base, _ = gradients_of(*blockwise(student, LossConfig()), trained, frozen, batch)
    for at, factor in ((0, 0.0), (5, 1.5), (10, 3.0)):
        found, _ = gradients_of(step, targets, trained, frozen, batch, at)
        for name in found:
            np.testing.assert_allclose(found[name], factor * base[name], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_spans_and_projectors_against_numpy(student):
    """A student of two blocks for a teacher of five, of another width: targets are the spans' sums."""
    config = replace(MIXED, layers=(LayerGroup((BlockKind(),), 2),))
    small, width = Decoder(config, rngs=nnx.Rngs(1)), 24
    batch = random_batch(replace(MIXED, hidden_size=width), codec="f32")
    spans = student_spans(config, 5, [0, 3])
    places = {"resid": {at: at for at in range(6)}, "attn_out": {at: at for at in range(5)}}
    targets = block_targets(config, spans, [places] * 2, {0: 1.0, 1: 2.0}, needs_leaving=True)
    loss = LossConfig(
        feature=FeatureLossConfig(relative_l2=0, l2=1.0), mlp=MlpLossConfig(weight=1, relative_l2=0, l2=1)
    )
    step, _ = blockwise(small, loss, codec="f32", rules=BlockRules(runs_mlp=True))
    step = replace(step, reading=replace(step.reading, hidden=width))
    trained, frozen = parameters_of(small, "attention", "mlp")
    trained |= make_projectors({(0, 0): 2}, 32, width, seed=0)
    gradients, sums = gradients_of(step, targets, trained, frozen, batch)
    resid, attn = np.asarray(batch["resid"]["codes"]), np.asarray(batch["attn_out"]["codes"])
    mask, stack = batch["segment_ids"] > 0, StudentStack(small)
    for block, (first, last) in enumerate(((0, 3), (3, 5))):
        own = {name: value[block] for name, value in at_address(trained, (0, 0)).items()}
        into, out = (np.asarray(own[f"projector/{side}"]) for side in ("in", "out"))
        attention = sublayer(stack.graphs[0, 0]["attention"], "attention", own)
        added = np.asarray(attention(jnp.asarray(resid[first] @ into), stack.context(batch))) @ out
        target = attn[first:last].sum(0)
        np.testing.assert_allclose(sums["feature"][block], (np.square(added - target).mean(-1) * mask).sum(), rtol=1e-4)
        mlp = sublayer(stack.graphs[0, 0]["mlp"], "mlp", own)
        made = np.asarray(mlp(jnp.asarray((resid[first] + target) @ into), stack.context(batch))[0]) @ out
        wanted = resid[last] - resid[first] - target
        np.testing.assert_allclose(sums["mlp"][block], (np.square(made - wanted).mean(-1) * mask).sum(), rtol=1e-4)
    assert all(np.asarray(gradients[name]).any() for name in gradients if "projector" in name)


@pytest.mark.parametrize("inside", [True, False], ids=["inside the scan", "after it"])
def test_steps_lower_the_loss_of_trained_blocks_only(student, inside):
    batch, blocks = random_batch(EVEN), [0, 2, 3]
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=0, weight_decay=0.1)
    step, targets = blockwise(student, LOSS, blocks=blocks, optimizer=optimizer, inside_scan=inside)
    trained, frozen = parameters_of(student, "attention")
    before = jax.tree.map(np.asarray, trained)
    state = init_state(step.stack, trained, step.optimizer)
    run, losses = jit_step(blockwise_update(step), state, None), []
    for _ in range(20):
        state, sums = run(state, frozen, batch, targets)
        losses.append(block_sums(sums, step.stack)["feature"])
    assert (losses[-1][blocks] < 0.8 * losses[0][blocks]).all()
    assert all(loss[1] == 0 for loss in losses)
    for name, value in before.items():
        np.testing.assert_array_equal(value[1], state.parameters[name][1])
    assert int(state.step) == 20
    assert run._cache_size() == 1


@pytest.mark.slow
def test_both_places_of_the_update_agree(student):
    batch, found = random_batch(EVEN), []
    for inside in (True, False):
        step, targets = blockwise(student, BOTH, rules=BlockRules(runs_mlp=True), inside_scan=inside)
        trained, frozen = parameters_of(student, "attention", "mlp")
        state = init_state(step.stack, trained, step.optimizer)
        run = jit_step(blockwise_update(step), state, None)
        for _ in range(3):
            state, _ = run(state, frozen, batch, targets)
        found.append(state)
    assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])
    for left, right in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


def test_training_leaves_the_decoder_alone_until_installed(student):
    student = nnx.clone(student)
    batch, (step, targets) = random_batch(EVEN), blockwise(student, LOSS)
    trained, frozen = parameters_of(student, "attention")
    state = init_state(step.stack, trained, step.optimizer)
    run, before = jit_step(blockwise_update(step), state, None), jax.tree.map(np.asarray, all_parameters(student))
    state, _ = run(state, frozen, batch, targets)
    assert_equal(before, all_parameters(student))
    install(student, state.parameters)
    state, _ = run(state, frozen, batch, targets)  # gives its memory away; the decoder has its own
    moved = {name for name, value in all_parameters(student).items() if not np.array_equal(value, before[name])}
    assert moved == set(state.parameters)


def assert_equal(left, right):
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "inside"), [("bf16", True), ("f32", False)])
def test_temporaries_do_not_grow_with_depth(codec, inside):
    """XLA's own memory analysis of the step, a stacked gradient subtracted where there is one: 24 blocks against 6."""
    rest = []
    for depth in (6, 24):
        config = replace(MIXED, hidden_size=64, layers=(LayerGroup((BlockKind(),), depth),))
        made = nnx.eval_shape(lambda config=config: Decoder(config, rngs=nnx.Rngs(0)))
        step, targets = blockwise(made, LOSS, codec=codec, inside_scan=inside)
        trained, frozen = jax.eval_shape(
            lambda config=config: parameters_of(Decoder(config, rngs=nnx.Rngs(0)), "attention")
        )
        state = jax.eval_shape(partial(init_state, step.stack, optimizer=step.optimizer), trained)
        batch = jax.eval_shape(partial(random_batch, config, rows=2, tokens=32, codec=codec))
        compiled = jit_step(blockwise_update(step), state, None).lower(state, frozen, batch, targets).compile()
        stacked = 0 if inside else sum(leaf.size * leaf.dtype.itemsize for leaf in trained.values())
        rest.append(compiled.memory_analysis().temp_size_in_bytes - stacked)
    assert rest[1] <= 1.25 * rest[0]


def test_without_a_recorded_stream_blocks_get_the_students_own(student):
    """The stream crosses blocks without gradient: each one's gradient is that of its own loss, all else constant."""
    batch = random_batch(EVEN, codec="f32")
    rules = BlockRules(own_stream=True)
    step, targets = blockwise(student, LOSS, blocks=[1, 3], codec="f32", rules=rules)
    reading = replace(step.reading, codecs={"attn_out": step.reading.codecs["attn_out"]})
    trained, frozen = parameters_of(student, "attention")
    frozen["embed"] = student.embed[...]
    gradients, sums = gradients_of(replace(step, reading=reading), targets, trained, frozen, batch)
    rows = (batch[name] for name in ("tokens", "positions", "segment_ids"))
    resid = student(*rows, taps=("resid",), logits=False).taps["resid"]
    given, full = {**batch, "resid": {"codes": resid}}, blockwise(student, LOSS, blocks=[1, 3], codec="f32")
    expected, others = gradients_of(*full, trained, frozen, given)
    np.testing.assert_allclose(sums["feature"], others["feature"], rtol=1e-5)
    assert_close(gradients, expected)
