"""GGUF files of architectures whose keys become a config.json's, written here as llama.cpp's converter does, from
goldens, against the load of those.

Names are the `gguf` package's own, which the converter uses too; keys and what it does to tensors are stated here.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained, open_tensors, read_config
from distillcache.models.config import Multipliers
from distillcache.models.files.gguf.file import open_gguf
from distillcache.models.files.gguf.joined import gguf_source
from distillcache.models.files.tensors import WEIGHTS_NAME
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN
from tests.models.files.gguf.test_file import permuted

Raw = dict[str, Any]
Tensors = dict[str, np.ndarray]


def text_keys(raw: Raw) -> dict[str, Any]:
    """As `TextModel.set_gguf_parameters` writes them."""
    rope = raw.get("rope_parameters", {})
    names = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "expert_used_count": "num_experts_per_tok",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
    }
    found = {ours: raw[theirs] for ours, theirs in names.items() if raw.get(theirs) is not None}
    for name in ("num_local_experts", "num_experts"):
        found |= {"expert_count": raw[name]} if name in raw else {}
    if rope.get("rope_type") == "yarn":
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"]}
        found |= {"rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
    return found | ({"rope.freq_base": float(rope["rope_theta"])} if rope else {})


def partial_keys(raw: Raw) -> dict[str, Any]:
    return {"rope.dimension_count": int(raw["head_dim"] * raw["rope_parameters"].get("partial_rotary_factor", 1))}


def latent_keys(raw: Raw) -> dict[str, Any]:
    """Of DeepseekV2Model."""
    rank, turned = raw["kv_lora_rank"], raw["qk_rope_head_dim"]
    found = {"attention.q_lora_rank": raw["q_lora_rank"]} if raw["q_lora_rank"] else {}
    if all_dim := raw["rope_parameters"].get("mscale_all_dim"):
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * all_dim
    return found | {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + turned,
        "attention.value_length": rank,
        "attention.key_length_mla": raw["qk_nope_head_dim"] + turned,
        "attention.value_length_mla": raw["v_head_dim"],
        "rope.dimension_count": turned,
        **routed_keys(raw),
    }


def routed_keys(raw: Raw) -> dict[str, Any]:
    norm = {"expert_weights_norm": True} if raw["norm_topk_prob"] else {}
    return norm | {
        "leading_dense_block_count": raw.get("first_k_dense_replace", 0),
        "expert_feed_forward_length": raw["moe_intermediate_size"],
        "expert_count": raw["n_routed_experts"],
        "expert_shared_count": raw["n_shared_experts"],
        "expert_weights_scale": float(raw["routed_scaling_factor"]),
    }


def next_keys(raw: Raw) -> dict[str, Any]:
    values = raw["linear_num_value_heads"]
    return partial_keys(raw) | {
        "expert_feed_forward_length": raw["moe_intermediate_size"],
        "expert_shared_feed_forward_length": raw["shared_expert_intermediate_size"],
        "full_attention_interval": 4,
        "ssm.conv_kernel": raw["linear_conv_kernel_dim"],
        "ssm.state_size": raw["linear_key_head_dim"],
        "ssm.group_count": raw["linear_num_key_heads"],
        "ssm.time_step_rank": values,
        "ssm.inner_size": values * raw["linear_value_head_dim"],
    }


def mamba_keys(taps: int, state: int, groups: int, heads: int, width: int) -> dict[str, Any]:
    found = {"conv_kernel": taps, "state_size": state, "group_count": groups, "time_step_rank": heads}
    return {f"ssm.{key}": value for key, value in (found | {"inner_size": heads * width}).items()}


def granite_keys(raw: Raw) -> dict[str, Any]:
    kinds = raw["layer_types"]
    names = ("mamba_d_conv", "mamba_d_state", "mamba_n_groups", "mamba_n_heads", "mamba_d_head")
    found = mamba_keys(*(raw[name] for name in names))
    rotary = raw["position_embedding_type"] == "rope"
    return found | {
        "attention.scale": raw["attention_multiplier"],
        "embedding_scale": raw["embedding_multiplier"],
        "residual_scale": raw["residual_multiplier"],
        "logit_scale": raw["logits_scaling"],
        "expert_shared_feed_forward_length": raw["shared_intermediate_size"],
        "attention.head_count_kv": [raw["num_key_value_heads"] * (kind == "full_attention") for kind in kinds],
        "rope.dimension_count": raw["head_dim"],
        "rope.scaling.finetuned": rotary,
        **({} if rotary else {"context_length": 2**20}),
    }


def falcon_keys(raw: Raw) -> dict[str, Any]:
    names = ("mamba_d_conv", "mamba_d_state", "mamba_n_groups", "mamba_n_heads", "mamba_d_head")
    return mamba_keys(*(raw[name] for name in names))


def nemotron_keys(raw: Raw) -> dict[str, Any]:
    kinds = raw["layers_block_type"]
    names = ("conv_kernel", "ssm_state_size", "n_groups", "mamba_num_heads", "mamba_head_dim")
    found = mamba_keys(*(raw[name] for name in names))
    sparse = "moe" in kinds
    inner = raw["moe_intermediate_size" if sparse else "intermediate_size"]
    found |= {
        "block_count": len(kinds),
        "attention.layer_norm_epsilon": raw["layer_norm_epsilon"],
        "attention.layer_norm_rms_epsilon": raw["layer_norm_epsilon"],
        "attention.head_count_kv": [raw["num_key_value_heads"] * (kind == "full_attention") for kind in kinds],
        "feed_forward_length": [inner * (kind in ("mlp", "moe")) for kind in kinds],
    }
    if sparse:
        found |= {key: value for key, value in routed_keys(raw).items() if key != "leading_dense_block_count"}
        found["expert_shared_feed_forward_length"] = raw["moe_shared_expert_intermediate_size"]
        found["moe_latent_size"] = raw["moe_latent_size"]
    else:
        found |= dict.fromkeys(("expert_used_count", "expert_group_count", "expert_group_used_count"))
    return found | {"rope.scaling.finetuned": False}


def window_keys(raw: Raw) -> dict[str, Any]:
    slides = [kind == "sliding_attention" for kind in raw["layer_types"]]
    return {"attention.sliding_window": raw["sliding_window"], "attention.sliding_window_pattern": slides}


def kept(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    yield name, values


def split_latent(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    if not name.endswith("kv_b_proj.weight"):
        yield name, values
        return
    plain = raw["qk_nope_head_dim"]
    heads = values.reshape(raw["num_attention_heads"], plain + raw["v_head_dim"], -1)
    yield name.replace("kv_b", "k_b"), np.stack([head[:plain].T for head in heads])
    yield name.replace("kv_b", "v_b"), np.stack([head[plain:] for head in heads])


def next_tensors(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    """Norms have one added; what a key head has together is taken apart."""
    if name.endswith("in_proj_qkvz.weight"):
        keys, heads = raw["linear_key_head_dim"], raw["linear_num_key_heads"]
        served = raw["linear_num_value_heads"] // heads * raw["linear_value_head_dim"]
        runs = np.split(values, heads)
        cut = [np.split(run, [keys, 2 * keys, 2 * keys + served]) for run in runs]
        q, k, v, z = (np.concatenate([run[at] for run in cut]) for at in range(4))
        block = name.split(".")[2]
        yield f"blk.{block}.attn_qkv.weight", np.concatenate([q, k, v])
        yield f"blk.{block}.attn_gate.weight", z
        return
    for own, mine in mamba_tensors(name, values, raw):
        plain = own.endswith("norm.weight") and not own.endswith("linear_attn.norm.weight")
        yield own, mine + np.float32(1) if plain else mine.squeeze(-1) if own.endswith("A_log") else mine


def mamba_tensors(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    """Of Mamba2Model."""
    if name.endswith("A_log"):
        values = -np.exp(values)[:, None]
    elif name.endswith((".D", "conv1d.weight")):
        values = values[:, None] if values.ndim == 1 else values.squeeze(1)
    elif name.endswith(("mamba.norm.weight", "mixer.norm.weight")):
        values = values.reshape(raw["n_groups" if "n_groups" in raw else "mamba_n_groups"], -1)
    yield name.replace("dt_bias", "dt_proj.bias"), values


def granite_tensors(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    sparse = raw.get("num_local_experts")
    if name.endswith("input_linear.weight"):
        block = name.split(".")[2]
        ending = "_exps" if "block_sparse" in name else "_shexp" if sparse else ""
        for part, half in zip(("gate", "up"), np.split(values, 2, axis=-2), strict=True):
            yield f"blk.{block}.ffn_{part}{ending}.weight", half
        return
    if not sparse:
        name = name.replace("shared_mlp.output_linear", "mlp.down_proj")
    for key, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        values = permuted(values, raw[heads]) if f".{key}." in name else values
    yield from mamba_tensors(name, values, raw)


def falcon_tensors(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    """Factors are multiplied into matrices; biases are as they were."""
    attention, inner = raw["attention_in_multiplier"], raw["mamba_d_ssm"]
    states = raw["mamba_n_groups"] * raw["mamba_d_state"]
    runs = np.repeat(raw["ssm_multipliers"], [inner, inner, states, states, raw["mamba_n_heads"]])
    factors: dict[str, Any] = {
        "down_proj.weight": raw["mlp_multipliers"][1],
        "gate_proj.weight": raw["mlp_multipliers"][0],
        "k_proj.weight": raw["key_multiplier"] * attention,
        "q_proj.weight": attention,
        "v_proj.weight": attention,
        "o_proj.weight": raw["attention_out_multiplier"],
        "out_proj.weight": raw["ssm_out_multiplier"],
        "in_proj.weight": raw["ssm_in_multiplier"] * runs[:, None],
        "lm_head.weight": raw["lm_head_multiplier"],
        "embed_tokens.weight": raw["embedding_multiplier"],
    }
    factor = next((each for ending, each in factors.items() if name.endswith(ending)), 1.0)
    yield from mamba_tensors(name, (values * factor).astype(np.float32), raw)


@dataclass(frozen=True)
class Case:
    """A golden and its architecture. stated: keys of its config that files of the architecture can say. read: fields of
    the config that they cannot. scores: `expert_gating_func`."""

    golden: str
    architecture: str
    keys: Callable[[Raw], dict[str, Any]] = lambda raw: {}
    tensors: Callable[[str, np.ndarray, Raw], Iterator[tuple[str, np.ndarray]]] = kept
    stated: dict[str, Any] = field(default_factory=dict)
    read: dict[str, Any] = field(default_factory=dict)
    scores: int | None = None


NO_LIMIT, NO_LEAST = {"time_step_limit": None}, {"time_step_min": 0.0}
# Blocks of Qwen3-Next, of which the third is dense: llama.cpp has no such.
FIRST_TWO = {"num_hidden_layers": 2, "mlp_only_layers": [], "layer_types": ["linear_attention", "full_attention"]}
YARN = {"factor": 4.0, "mscale": 1.9, "mscale_all_dim": 1.9, "original_max_position_embeddings": 16}
YARN |= {"rope_theta": 100.0, "rope_type": "yarn"}
CASES = [
    Case("glm4", "glm4", partial_keys),
    Case("minimax_m2", "minimax-m2", partial_keys, scores=2),
    Case("deepseek_v2", "deepseek2", latent_keys, split_latent, {"rope_parameters": YARN}, scores=1),
    Case("deepseek_v3", "deepseek2", latent_keys, split_latent, {"rope_parameters": YARN}, scores=2),
    Case("deepseek_v3_plain", "deepseek2", latent_keys, split_latent, {"rope_interleave": True}, scores=2),
    Case("qwen3_next", "qwen3next", next_keys, next_tensors, {"norm_topk_prob": True} | FIRST_TWO),
    Case("granitemoehybrid", "granitehybrid", granite_keys, granite_tensors, NO_LIMIT, {"max_positions": 2**20}),
    Case("granitemoehybrid_dense", "granitehybrid", granite_keys, granite_tensors),
    Case("nemotron_h", "nemotron_h", nemotron_keys, granite_tensors, NO_LEAST),
    Case("nemotron_h_moe", "nemotron_h_moe", nemotron_keys, granite_tensors, NO_LEAST, {"intermediate_size": 9}),
    Case("exaone4", "exaone4", window_keys),
    Case("dots1", "dots1", routed_keys, stated={"sliding_window": None, "layer_types": None}, scores=2),
    Case("apertus", "apertus"),
]


def folder_of(case: Case, where: Path, more: Tensors | None = None) -> Path:
    """The golden's folder with what files of the architecture can say."""
    where.mkdir()
    raw = json.loads((GOLDEN / case.golden / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(raw | case.stated))
    stored = load_file(GOLDEN / case.golden / "model.safetensors")
    dropped = f"model.layers.{case.stated.get('num_hidden_layers')}."
    kept_here = {name: values for name, values in stored.items() if not name.startswith(dropped)}
    save_file(kept_here | (more or {}), where / WEIGHTS_NAME)
    return where


def written(case: Case, folder: Path, target: Path, extra: Tensors | None = None, **changes: Any) -> Path:
    """A folder as a file; a change of None removes a key. extra: more tensors."""
    raw = json.loads((folder / "config.json").read_text())
    keys = text_keys(raw) | case.keys(raw) | {"expert_gating_func": case.scores} | changes
    writer = gguf.GGUFWriter(target, case.architecture)
    add: dict[type, Callable[..., None]] = {int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
    for key, value in keys.items():
        if value is not None:
            add[type(value)](f"{case.architecture}.{key}", value)
    for name, values in (converted(case, folder, raw, writer) | (extra or {})).items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def converted(case: Case, folder: Path, raw: Raw, writer: gguf.GGUFWriter) -> Tensors:
    """The tensors of the file; numbers of an activation become metadata."""
    depth = raw.get("num_hidden_layers") or len(raw["layers_block_type"])
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[case.architecture]
    table, found = gguf.get_tensor_name_map(arch, depth), dict[str, Any]()
    stated: dict[str, list[float]] = {}
    for name, stored in sorted(load_file(folder / WEIGHTS_NAME).items()):
        if "act_fn" in name:
            stated.setdefault(name.rpartition(".")[2], []).append(float(stored.astype(np.float32).item()))
            continue
        for own, values in case.tensors(name, stored.astype(np.float32), raw):
            before, _, behind = own.partition(".experts.")
            number, _, rest = behind.partition(".")
            if number.isdigit():
                start = before.replace("backbone", "model").replace("mixer", "mlp")
                found.setdefault(gguf_name(f"{start}.experts.{rest}", table), {})[int(number)] = values
            else:
                found[gguf_name(own, table)] = values[0] if own.endswith("shared_expert_gate.weight") else values
    for name, numbers in stated.items():
        writer.add_array(f"xielu.{name}", numbers)
    stacked = {
        name: np.stack([each[at] for at in sorted(each)]) for name, each in found.items() if isinstance(each, dict)
    }
    return found | stacked


def gguf_name(name: str, table: gguf.TensorNameMap) -> str:
    if name.startswith("blk."):
        return name
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    for spelled in (name, name.replace("dt_proj.bias", "dt.bias")):
        if (own := table.get_name(spelled, (".weight", ".bias"))) is not None:
            return own
    raise AssertionError(name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.golden)
def test_equals_the_hf_directory(case: Case, tmp_path: Path):
    folder = folder_of(case, tmp_path / "hf")
    path = written(case, folder, tmp_path / "m.gguf")
    config, expected = read_config(path), read_config(folder)
    assert config == replace(expected, **case.read)
    assert_same_tensors(path, folder)


def assert_same_tensors(path: Path, folder: Path) -> None:
    """Adding one and taking it away rounds, and so do exponential and logarithm."""
    here, there = gguf_source(open_gguf(path), read_config(path), path), open_tensors(folder, read_config(folder))
    assert here.shapes == there.shapes
    for name in there.shapes:
        np.testing.assert_allclose(
            here.read(name), there.read(name).astype(np.float32), rtol=0, atol=2e-6, err_msg=name
        )


def test_factors_of_falcon_h1_are_in_its_weights(tmp_path: Path):
    """The decoder is another one that computes the same. Files with tied embeddings cannot say the output's factor."""
    case = Case("falcon_h1_plain", "falcon-h1", falcon_keys, falcon_tensors)
    head = {"lm_head.weight": load_file(GOLDEN / case.golden / WEIGHTS_NAME)["model.embed_tokens.weight"]}
    folder = folder_of(replace(case, stated={"tie_word_embeddings": False}), tmp_path / "hf", head)
    path = written(case, folder, tmp_path / "m.gguf")
    found, golden = load_pretrained(path), load_file(GOLDEN / case.golden / "expected.safetensors")
    plain = {"multipliers": Multipliers(), "embed_scale": 1.0, "logits_divisor": 1.0}
    assert found.config == replace(read_config(folder), **plain)
    logits = np.asarray(found(jnp.asarray(golden["tokens"])).logits)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=5e-6 * np.abs(golden["logits"]).max())
    tied = folder_of(case, tmp_path / "tied")
    with pytest.raises(CheckpointError, match="tied embeddings"):
        read_config(written(case, tied, tmp_path / "tied.gguf"))


CASE_OF = {case.golden: case for case in CASES}


def test_older_files_of_latent_attention(tmp_path: Path):
    """Before 2025 `kv_b` was one tensor, and a head's sizes stood under the usual keys."""
    case = replace(CASE_OF["deepseek_v3"], tensors=kept)
    folder = folder_of(case, tmp_path / "hf")
    sizes: dict[str, Any] = {"attention.key_length": 13, "attention.value_length": 7, "attention.head_count_kv": 6}
    sizes |= dict.fromkeys(("attention.key_length_mla", "attention.value_length_mla"))
    path = written(case, folder, tmp_path / "m.gguf", **sizes)
    assert read_config(path) == read_config(folder)
    assert_same_tensors(path, folder)


def test_layers_of_multi_token_prediction_are_left_out(tmp_path: Path):
    """They are counted among the blocks."""
    case = CASE_OF["deepseek_v3"]
    folder = folder_of(case, tmp_path / "hf")
    extra = {"blk.3.nextn.eh_proj.weight": np.ones((3, 5), np.float32)}
    path = written(case, folder, tmp_path / "m.gguf", extra, block_count=4, nextn_predict_layers=1)
    assert read_config(path) == replace(read_config(folder), mtp_layers=1)
    assert_same_tensors(path, folder)


@pytest.mark.parametrize(
    ("golden", "changes", "named"),
    [
        ("glm4", {"rope.dimension_sections": [8, 12, 12, 0]}, "glm4.rope.dimension_sections"),
        ("deepseek_v3", {"expert_gating_func": 3}, "deepseek2.expert_gating_func"),
        ("deepseek_v3", {"expert_count": None}, "deepseek2.expert_count"),
        ("deepseek_v3", {"attention.key_length_mla": 8}, "deepseek2.attention.key_length_mla"),
        ("deepseek_v3", {"attention.temperature_scale": 0.1}, "deepseek2.attention.temperature_scale"),
        ("nemotron_h", {"ssm.inner_size": 43}, "nemotron_h.ssm.inner_size"),
        ("nemotron_h", {"attention.head_count_kv": [0, 1, 2, 0]}, "nemotron_h.attention.head_count_kv"),
        ("granitemoehybrid", {"ssm.inner_size": 78}, "granitehybrid.ssm.inner_size"),
        ("exaone4", {"rope.dimension_count": 4}, "partial_rotary_factor"),
        ("dots1", {"attention.value_length": 6}, "dots1.attention.value_length"),
    ],
)
def test_refusals_name_the_key(golden: str, changes: dict[str, Any], named: str, tmp_path: Path):
    case = CASE_OF[golden]
    folder = folder_of(case, tmp_path / "hf")
    with pytest.raises(CheckpointError) as caught:
        read_config(written(case, folder, tmp_path / "m.gguf", **changes))
    assert named in str(caught.value)
    assert "m.gguf" in str(caught.value)
