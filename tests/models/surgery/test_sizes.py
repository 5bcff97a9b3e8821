"""What cannot be done is refused before any weight is looked at: what, found, expected, and the next step."""

from dataclasses import replace

import pytest

from distillcache.models.checkpoint import read_config
from distillcache.models.config import ModelConfig
from distillcache.models.surgery import changed_config
from distillcache.models.surgery.sizes import check_exportable
from distillcache.schemas.config.student import SurgeryOp
from distillcache.schemas.errors import ConfigError
from tests.models.conftest import GOLDEN


@pytest.mark.parametrize(
    ("name", "op", "named"),
    [
        ("llama_bias", {"op": "mlp_width", "to": 41}, "1 to 40"),
        ("llama_bias", {"op": "experts", "to": 2}, "op: upcycle"),
        ("llama_bias", {"op": "expert_width", "to": 2}, "op: mlp_width"),
        ("llama_bias", {"op": "hidden_size", "to": 37}, "1 to 36"),
        ("llama_bias", {"op": "drop_blocks", "blocks": [3]}, "the model has 3 blocks"),
        ("llama_bias", {"op": "drop_blocks", "blocks": "all"}, "at least one left"),
        ("llama_bias", {"op": "drop_blocks", "blocks": []}, "at least one"),
        ("llama_bias", {"op": "drop_blocks", "blocks": [1, 1]}, "none twice"),
        ("mixtral", {"op": "mlp_width", "to": 8}, "no block with a dense MLP"),
        ("mixtral", {"op": "experts", "to": 1}, "at least 2: a token takes 2 experts"),
        ("mixtral", {"op": "upcycle", "experts": 2}, "which has experts"),
        ("glm4_moe", {"op": "experts", "to": 6}, "a multiple of 4"),
        ("qwen3_moe", {"op": "drop_blocks", "blocks": [1, 5]}, "no block with experts"),
        ("mixtral", {"op": "expert_width", "to": 8, "by": "importance"}, "index or weight_norm"),
    ],
    ids=str,
)
def test_refusals(name: str, op: dict, named: str):
    with pytest.raises(ConfigError, match="cannot be done") as caught:
        changed_config(read_config(GOLDEN / name), [SurgeryOp.model_validate(op)])
    assert named in str(caught.value)
    assert caught.value.next


@pytest.mark.parametrize("name", sorted(path.parent.name for path in GOLDEN.glob("*/config.json")))
def test_every_family_is_exportable_as_it_is(name: str):
    check_exportable(read_config(GOLDEN / name))


def test_what_an_export_would_not_say_is_named(tiny_config: ModelConfig):
    """A Mixtral has no biases of queries: its config would silently leave them out."""
    op = SurgeryOp(op="upcycle", experts=2)
    mixtral = changed_config(tiny_config, [op])
    with pytest.raises(ConfigError, match="could not be exported") as caught:
        check_exportable(replace(mixtral, qkv_bias=True))
    assert "qkv_bias" in caught.value.facts
