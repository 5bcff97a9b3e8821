"""Families whose blocks are not Llama's, through the whole system: build, train in both modes, export, load."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import load_pretrained, read_config, save_pretrained
from distillcache.models.config import (
    BlockInputs,
    BlockKind,
    ClampedGlu,
    DeltaConfig,
    IndexConfig,
    LatentConfig,
    MambaConfig,
    ModelConfig,
    MoeConfig,
    Multipliers,
    RopeConfig,
    ShortConvConfig,
    TemperatureConfig,
    WideHeads,
    plan_layers,
)
from distillcache.models.families.reading.latent import softmax_scale
from distillcache.schemas.config.teacher import TapConfig, TapsConfig
from distillcache.schemas.config.train import OptimizerConfig, StudentConfig
from distillcache.schemas.errors import ConfigError, InputError
from distillcache.tools.commands import export
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.run.folder import read_evaluations
from distillcache.trainer.run.metrics_log import read_metrics
from distillcache.trainer.train import train
from tests.conftest import TINY, build_config, save_teacher
from tests.models.conftest import randomized
from tests.trainer.test_train import config

LONG = RopeConfig(100.0, "longrope", 8.0, 8, fraction=0.5, short_factor=(1.0, 1.5), long_factor=(2.0, 7.0))
YARN = RopeConfig(100.0, "yarn", 4.0, 8, mscale=0.7, mscale_all_dim=0.9, interleaved=True)
CONFIGS: dict[str, ModelConfig] = {
    "olmo2": replace(TINY, family="olmo2", norms="post", norm_product="wide", qk_norm="full"),
    "granite": replace(
        TINY,
        family="granite",
        embed_scale=1.7,
        residual_scale=0.6,
        attention_scale=0.2,
        logits_divisor=3.0,
        tie_embeddings=True,
    ),
    "phi3": replace(TINY, family="phi3", num_heads=3, num_kv_heads=3, rope=LONG, max_positions=64),
}
GEMMA: dict[str, Any] = {
    "norms": "both",
    "norm_product": "offset",
    "embed_scale": 24**0.5,
    "embed_scale_rounded": True,
    "attention_scale": 5**-0.5,
    "logits_softcap": 3.0,
    "activation": "gelu_tanh",
    "tie_embeddings": True,
}
LOCAL, EVERYWHERE = BlockKind(5, local_rope=True), BlockKind()
CONFIGS |= {
    "gemma2": replace(
        TINY, family="gemma2", **GEMMA, attention_softcap=2.0, layers=plan_layers([BlockKind(5), BlockKind()] * 2)
    ),
    "gemma3_text": replace(
        TINY,
        family="gemma3_text",
        **GEMMA,
        qk_norm="head",
        rope=RopeConfig(100.0, "linear", 4.0),
        local_rope=RopeConfig(20.0),
        layers=plan_layers([LOCAL, EVERYWHERE] * 2),
    ),
    "gpt_oss": replace(
        TINY,
        family="gpt_oss",
        intermediate_size=14,
        qkv_bias=True,
        output_bias=True,
        norm_product="wide",
        sinks=True,
        rope=RopeConfig(100.0, "yarn", 4.0, 8, truncate=False),
        layers=plan_layers([BlockKind(5, moe=True), BlockKind(moe=True)] * 2),
        moe=MoeConfig(5, 2, 14, logit_bias=True, expert_bias=True, clamped=ClampedGlu(1.5, 1.3)),
    ),
    "deepseek_v3": replace(
        TINY,
        family="deepseek_v3",
        num_kv_heads=6,
        head_dim=9,
        latent=LatentConfig(11, 10, 5, 4, 7),
        attention_scale=softmax_scale(9, YARN),
        rope=YARN,
        layers=plan_layers([BlockKind(), BlockKind(moe=True), BlockKind(moe=True)]),
        moe=MoeConfig(6, 2, 14, 14, "sigmoid", True, 2.5, 3, 2, bias=True, native_bias=True, float32_router=True),
    ),
}
CONFIGS["deepseek_v32"] = replace(
    CONFIGS["deepseek_v3"], family="deepseek_v32", latent=LatentConfig(11, 10, 5, 4, 7, IndexConfig(8, 6, top_k=3))
)
CONFIGS["mistral4"] = replace(
    CONFIGS["deepseek_v3"],
    family="mistral4",
    temperature=TemperatureConfig(0.7, 8.0, first=0, everywhere=True),
    moe=MoeConfig(6, 2, 14, 14, scaling=2.5, groups=3, groups_kept=2),
)
CONFIGS["gemma4_text"] = replace(
    TINY,
    family="gemma4_text",
    **GEMMA | {"norm_product": "wide", "attention_scale": 1.0},
    qk_norm="head",
    value_norm=True,
    block_scale=True,
    rope=RopeConfig(100.0, "proportional", fraction=0.5),
    local_rope=RopeConfig(20.0),
    wide=WideHeads(3, 14, shared_values=True),
    layers=plan_layers([BlockKind(5, local_rope=True, moe=True), BlockKind(wide=True, moe=True)] * 2),
    moe=MoeConfig(5, 2, 14, TINY.intermediate_size, apart=True),
)
CONFIGS["qwen3_next"] = replace(
    TINY,
    family="qwen3_next",
    head_dim=16,
    rope=RopeConfig(100.0, fraction=0.25),
    norm_product="offset",
    qk_norm="head",
    output_gate=True,
    delta=DeltaConfig(key_heads=2, value_heads=4, key_dim=5, value_dim=7, taps=3),
    layers=plan_layers([BlockKind(mixer="gated_delta"), BlockKind(moe=True)]),
    moe=MoeConfig(5, 2, 14, 22, shared_gate=True),
)
CONFIGS["olmo_hybrid"] = replace(
    CONFIGS["olmo2"],
    family="olmo_hybrid",
    norms="by_mixer",
    delta=DeltaConfig(key_heads=2, value_heads=4, key_dim=5, value_dim=7, taps=3, doubled=True, norm_eps=1e-5),
    layers=plan_layers([BlockKind(mixer="gated_delta"), BlockKind(rotary=False)]),
)
CONFIGS["kimi_linear"] = replace(
    CONFIGS["deepseek_v3"],
    family="kimi_linear",
    attention_scale=9**-0.5,
    rope=RopeConfig(),
    delta=DeltaConfig(key_heads=4, value_heads=4, key_dim=5, value_dim=5, taps=3, by_channel=True),
    layers=plan_layers([BlockKind(mixer="gated_delta"), BlockKind(rotary=False, moe=True)]),
)
CONFIGS["lfm2_moe"] = replace(
    TINY,
    family="lfm2_moe",
    norm_eps=1e-5,
    qk_norm="head",
    short_conv=ShortConvConfig(TINY.hidden_size, 3, bias=True),
    layers=plan_layers([BlockKind(mixer="short_conv"), BlockKind(moe=True), BlockKind(mixer="short_conv", moe=True)]),
    moe=MoeConfig(5, 2, 14, scores="sigmoid", bias=True, native_bias=True, sum_eps=1e-6),
)
CONFIGS["nemotron_h"] = replace(
    TINY,
    family="nemotron_h",
    activation="relu2",
    mlp_gated=False,
    mamba=MambaConfig(heads=6, head_dim=7, groups=2, state=5, taps=3, least_step=0.1),
    layers=plan_layers(
        [
            BlockKind(mixer="none"),
            BlockKind(mixer="mamba2", mlp=False),
            BlockKind(mixer="none", moe=True),
            BlockKind(rotary=False, mlp=False),
        ]
    ),
    moe=MoeConfig(6, 2, 14, 22, "sigmoid", groups=3, groups_kept=2, bias=True, native_bias=True, float32_router=True),
)
CONFIGS["apertus"] = replace(
    TINY,
    family="apertus",
    norm_product="wide",
    qk_norm="head",
    activation="xielu",
    mlp_gated=False,
    tie_embeddings=True,
)
CONFIGS["falcon_h1"] = replace(
    TINY,
    family="falcon_h1",
    embed_scale=1.7,
    logits_divisor=3.0,
    mamba=MambaConfig(heads=6, head_dim=7, groups=2, state=5, taps=3, norm="first"),
    multipliers=Multipliers(0.9, 0.7, 0.6, 1.2, 0.5, (0.7, 0.5, 0.8, 1.1, 0.6), 0.8, 0.5),
    layers=plan_layers([BlockKind(mixer="attention_mamba2")] * 2),
)
CONFIGS["granitemoehybrid"] = replace(
    CONFIGS["granite"],
    family="granitemoehybrid",
    intermediate_size=14,  # of the experts, in a family that has no other word for it
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    mamba=MambaConfig(heads=6, head_dim=TINY.hidden_size // 3, groups=2, state=5, taps=3),
    layers=plan_layers([BlockKind(mixer="mamba2", moe=True), BlockKind(rotary=False, moe=True)]),
    moe=MoeConfig(5, 2, 14, 22),
)
CONFIGS["cohere2"] = replace(
    TINY,
    family="cohere2",
    norms="shared",
    norm_product="centred",
    rope=RopeConfig(100.0, interleaved=True),
    logits_divisor=2.0,
    tie_embeddings=True,
    layers=plan_layers([BlockKind(5), BlockKind(rotary=False)]),
)
EXACT = TapsConfig(attn_out=TapConfig(codec="f32"), resid=TapConfig(codec="f32"))


def teacher_of(family: str, folder: Path) -> Path:
    """A teacher whose norms and biases are not neutral."""
    save_teacher(folder, CONFIGS[family])
    save_pretrained(randomized(load_pretrained(folder), 3), folder / "out")
    (folder / "out" / "model.safetensors").replace(folder / "model.safetensors")
    return folder


@pytest.mark.slow  # builds and trainings, each with programs of its own
@pytest.mark.parametrize("family", CONFIGS)
def test_from_a_teacher_to_its_own_copy(family: str, tmp_path: Path, corpus: Path):
    """A student that is its teacher has nothing to learn: every loss on a lossless cache is zero, in both modes."""
    teacher, cache = teacher_of(family, tmp_path / "teacher"), tmp_path / "cache"
    assert read_config(teacher) == CONFIGS[family]
    taps = {"attn_out": {"codec": "f32"}, "resid": {"codec": "f32", "head": family == "cohere2"}}
    build_cache(build_config(cache, teacher, corpus, taps=taps))
    mlp: dict[str, Any] = {"mlp": {"weight": 0.5}}
    stages = [
        {"mode": "blockwise", "steps": 1, "loss": mlp},
        {"mode": "feature", "steps": 1},  # with cross-entropy, without which there would be nothing to train
    ]
    # Adam's first step is as long for gradients that are rounding alone, and heads in front of a norm would show it.
    still = OptimizerConfig(learning_rate=1e-9, warmup_steps=2)
    train(config(tmp_path / "run", cache, student=StudentConfig(), stages=stages, optimizer=still))
    blockwise, feature = (line for line in read_metrics(tmp_path / "run") if line["step"])
    losses = [blockwise["distill/total_loss"], feature["distill/out_proj_feature_loss"]]
    np.testing.assert_allclose(losses, 0, atol=1e-4)
    np.testing.assert_allclose(read_evaluations(tmp_path / "run")[0].cosine, 0, atol=1e-6)
    export.run([str(tmp_path / "run"), str(tmp_path / "out")], "export", False)
    assert load_pretrained(tmp_path / "out").config == CONFIGS[family]
    if family in ("olmo2", "olmo_hybrid", "cohere2"):
        with pytest.raises(InputError, match="no normed input to inject"):
            train(config(tmp_path / "other", cache, inject="attn_in"))
    if family == "cohere2":  # the norm before its head takes the mean away, of the teacher's last stream as well
        loss = {"alpha": 0.6, "feature": {"weight": 0.0}, "kl": {"targets": "head"}}
        train(config(tmp_path / "kl", cache, student=StudentConfig(), mode="feature", steps=1, loss=loss))
        found = [line["distill/kl_div_T1"] for line in read_metrics(tmp_path / "kl") if line["step"]]
        np.testing.assert_allclose(found, 0, atol=1e-6)
    if family == "gemma3_text":  # the teacher's norms are stored less one, and take the place of the student's
        stages = [{"mode": "blockwise", "steps": 1}, stages[-1]]
        train(config(tmp_path / "injected", cache, student=StudentConfig(), inject="attn_in", stages=stages))
        found = [line["distill/total_loss"] for line in read_metrics(tmp_path / "injected") if line["step"]]
        np.testing.assert_allclose(found[:1], 0, atol=1e-4)


def joined(family: str) -> ModelConfig:
    """A teacher with inputs made of the tokens and keys that are taken over, or with choices of keys that are."""
    if family == "glm_moe_dsa":
        latent = LatentConfig(11, 10, 5, 4, 7, IndexConfig(8, 6, top_k=3, interleaved=True))
        kinds = [BlockKind(moe=True), BlockKind(moe=True, taken_choice=True)]
        return replace(CONFIGS["deepseek_v3"], family=family, latent=latent, layers=plan_layers(kinds))
    kinds = [BlockKind(5, local_rope=True), BlockKind(wide=True)]
    kinds += [replace(kind, taken=True) for kind in kinds]
    return replace(
        CONFIGS["gemma4_text"],
        wide=WideHeads(2, 14),
        layers=plan_layers(kinds),
        moe=None,
        block_inputs=BlockInputs(TINY.vocab_size, 13),
        wider_taken=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma4_text", "glm_moe_dsa"])
def test_a_teacher_whose_blocks_need_more_than_the_stream(family: str, tmp_path: Path, corpus: Path):
    """It is recorded as it computes, and is no student."""
    whole = joined(family)
    teacher, cache = save_teacher(tmp_path / "teacher", whole), tmp_path / "cache"
    build_cache(build_config(cache, teacher, corpus, taps=EXACT))
    batch = CacheSource(str(cache))[[0]]
    rows = (jnp.asarray(batch[name]) for name in ("tokens", "positions", "segment_ids"))
    taps = load_pretrained(teacher)(*rows, taps=("resid", "attn_out"), logits=False).taps
    for name, expected in taps.items():
        found = np.asarray(batch[name]["codes"])
        real = np.asarray(batch["segment_ids"]) > 0
        np.testing.assert_allclose(found[:, real], np.asarray(expected)[:, real], rtol=0, atol=1e-4)
    other = save_teacher(tmp_path / "other", whole, seed=1)
    with pytest.raises(ConfigError, match="cannot be a student"):
        train(config(tmp_path / "run", cache, student=StudentConfig(init=str(other))))
