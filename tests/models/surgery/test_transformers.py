"""Students of every operation, exported and computed by transformers: the same logits."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.decoder import Decoder
from distillcache.models.surgery import Scores, apply_surgery
from distillcache.schemas.config.student import SurgeryOp
from tests.models.conftest import GOLDEN, transformers_model
from tests.models.test_parity import assert_close

DENSE = [
    [{"op": "query_heads", "to": 2, "by": "weight_norm"}],
    [{"op": "kv_heads", "to": 1, "by": "importance"}],
    [{"op": "mlp_width", "to": 17, "by": "importance"}],
    [{"op": "drop_blocks", "blocks": [1]}],
    [{"op": "hidden_size", "to": 30, "by": "importance"}],
    [{"op": "upcycle", "experts": 3, "noise": 0.1}],
    [{"op": "mlp_width", "to": 36}, {"op": "upcycle", "experts": 4, "how": "partition", "top_k": 3}],
]
CASES = [("llama_yarn", ops) for ops in DENSE]
CASES += [("llama_tied", [{"op": "hidden_size", "to": 24}]), ("mistral_window", DENSE[5])]
CASES += [
    (name, [op])
    for name in ("mixtral", "qwen2_moe", "qwen3_moe")
    for op in (
        {"op": "experts", "to": 4, "by": "importance"},
        {"op": "expert_width", "to": 9},
        {"op": "hidden_size", "to": 24, "by": "weight_norm"},
        {"op": "drop_blocks", "blocks": [0]},
    )
]
CASES += [(name, [{"op": "mlp_width", "to": 11}]) for name in ("qwen2_moe", "qwen3_moe")]
CASES += [("glm4_moe", [{"op": "experts", "to": 8}, {"op": "drop_blocks", "blocks": [2]}])]
CASES += [
    ("deepseek_v3", [{"op": "kv_heads", "to": 4, "by": "weight_norm"}, {"op": "experts", "to": 8}]),
    ("deepseek_v3", [{"op": "hidden_size", "to": 32}]),
    ("gpt_oss", [{"op": "query_heads", "to": 2, "by": "importance"}, {"op": "experts", "to": 3, "by": "importance"}]),
    ("gemma3_text", [{"op": "mlp_width", "to": 16}, {"op": "drop_blocks", "blocks": [0]}]),
    ("olmo2", [{"op": "hidden_size", "to": 36}]),
    ("qwen2", [{"op": "upcycle", "experts": 3, "noise": 0.1}]),
    ("qwen3_next", [{"op": "query_heads", "to": 2, "by": "importance"}, {"op": "experts", "to": 4}]),
    ("qwen3_next", [{"op": "value_heads", "to": 1, "by": "weight_norm"}]),
    ("qwen3_next", [{"op": "drop_blocks", "blocks": [0]}, {"op": "hidden_size", "to": 24}]),
    ("qwen3_5_text", [{"op": "kv_heads", "to": 1, "by": "weight_norm"}, {"op": "mlp_width", "to": 17}]),
    ("mistral4", [{"op": "kv_heads", "to": 4, "by": "weight_norm"}, {"op": "experts", "to": 8}]),
    ("mistral4", [{"op": "expert_width", "to": 7}, {"op": "hidden_size", "to": 30}, {"op": "mlp_width", "to": 17}]),
    ("ministral3", [{"op": "kv_heads", "to": 1}, {"op": "drop_blocks", "blocks": [1]}]),
    ("gemma4_text", [{"op": "mlp_width", "to": 17}, {"op": "drop_blocks", "blocks": [1]}]),
    ("gemma4_text_moe", [{"op": "experts", "to": 4}, {"op": "expert_width", "to": 9}]),
    ("seed_oss", [{"op": "query_heads", "to": 2, "by": "weight_norm"}, {"op": "mlp_width", "to": 17}]),
    ("ernie4_5", [{"op": "query_heads", "to": 2, "by": "importance"}, {"op": "hidden_size", "to": 30}]),
    (
        "ernie4_5_moe",
        [{"op": "experts", "to": 4}, {"op": "expert_width", "to": 7}, {"op": "drop_blocks", "blocks": [0]}],
    ),
    ("hunyuan_v1_dense", [{"op": "query_heads", "to": 2, "by": "importance"}, {"op": "hidden_size", "to": 30}]),
    ("hunyuan_v1_moe", [{"op": "experts", "to": 4, "by": "importance"}, {"op": "kv_heads", "to": 1}]),
    ("exaone4", [{"op": "mlp_width", "to": 17}, {"op": "drop_blocks", "blocks": [1]}]),
    ("apertus", [{"op": "mlp_width", "to": 17, "by": "importance"}, {"op": "hidden_size", "to": 30}]),
    ("apertus", [{"op": "query_heads", "to": 2, "by": "weight_norm"}, {"op": "drop_blocks", "blocks": [0]}]),
    ("cohere2", [{"op": "query_heads", "to": 2, "by": "importance"}, {"op": "mlp_width", "to": 17}]),
    ("cohere2", [{"op": "hidden_size", "to": 36}, {"op": "drop_blocks", "blocks": [1]}]),
    ("dots1", [{"op": "expert_width", "to": 5}, {"op": "mlp_width", "to": 17}, {"op": "drop_blocks", "blocks": [1]}]),
    ("solar_open", [{"op": "hidden_size", "to": 30}, {"op": "query_heads", "to": 2, "by": "weight_norm"}]),
    ("flex_olmo", [{"op": "hidden_size", "to": 36}, {"op": "experts", "to": 4}]),
    ("gemma", [{"op": "mlp_width", "to": 30}, {"op": "query_heads", "to": 2, "by": "weight_norm"}]),
    ("qwen3", [{"op": "drop_blocks", "blocks": [0]}, {"op": "kv_heads", "to": 1}]),
    ("glm4", [{"op": "query_heads", "to": 2}, {"op": "mlp_width", "to": 17}, {"op": "hidden_size", "to": 30}]),
    ("minimax_m2", [{"op": "kv_heads", "to": 1}, {"op": "experts", "to": 5}, {"op": "expert_width", "to": 9}]),
    ("deepseek_v2", [{"op": "kv_heads", "to": 4, "by": "weight_norm"}, {"op": "experts", "to": 8}]),
    ("deepseek_v32", [{"op": "kv_heads", "to": 4}, {"op": "hidden_size", "to": 30}, {"op": "mlp_width", "to": 17}]),
    ("glm4_moe_lite", [{"op": "drop_blocks", "blocks": [1]}, {"op": "experts", "to": 4}]),
]


def scores_of(decoder: Decoder) -> Scores:
    rng, config = np.random.default_rng(0), decoder.config
    sizes = {"H": config.num_heads, "F": config.intermediate_size, "E": config.moe.num_experts if config.moe else 1}
    blocks = tuple({letter: rng.random(size) for letter, size in sizes.items()} for _ in config.kinds)
    return Scores(blocks, rng.random(config.hidden_size))


@pytest.mark.parametrize(("name", "ops"), CASES, ids=str)
def test_the_same_logits(name: str, ops: list[dict[str, Any]], tmp_path: Path):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `parity`)")
    teacher = load_pretrained(GOLDEN / name, jnp.float32)
    student = apply_surgery(teacher, [SurgeryOp.model_validate(op) for op in ops], scores_of(teacher))
    save_pretrained(student, tmp_path / "export")
    model, info = transformers_model(
        tmp_path / "export", dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = np.random.default_rng(1).integers(0, student.config.vocab_size, (2, 13))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    assert_close(student(jnp.asarray(tokens)).logits, theirs)
