"""Settings that no stage of a run uses are named; one that any stage uses, or that is the default, is not."""

from pathlib import Path
from typing import Any

import pytest

from distillcache.schemas.config.train import LossConfig, MeshConfig, OptimizerConfig, TrainConfig
from distillcache.trainer.run.idle_settings import _OF_LOSS, _OF_RUN, idle_settings
from distillcache.trainer.run.stages import resolve_stages
from distillcache.trainer.train import train

FEATURE, NOAUX = {"mode": "feature"}, {"moe_balance_type": "noaux_tc"}
RAMP = {"start": 0.0, "end": 1.0}


def notes(changes: dict[str, Any]) -> list[str]:
    spec = TrainConfig.model_validate({"run": "r", "cache": "c", **changes})
    return idle_settings(spec, spec.feed, resolve_stages(spec, MeshConfig()))


IDLE: list[tuple[str, dict[str, Any]]] = [
    ("loss.token_weight", {"loss": {"token_weight": 2.0}}),
    ("loss.alpha", {"loss": {"alpha": 0.5}}),
    ("loss.alpha", {"loss": {"alpha": RAMP}}),
    ("loss.alpha", FEATURE | {"loss": {"alpha": 0.5, "token_weight": 0.0}}),
    ("loss.tau", FEATURE | {"loss": {"tau": 2.0}}),
    ("loss.kl.direction", FEATURE | {"loss": {"kl": {"direction": "reverse"}}}),
    ("loss.kl.direction", {"loss": {"kl": {"direction": "jsd", "share": 0.2}}}),
    ("loss.feature.cosine", {"loss": {"feature": {"weight": 0, "cosine": 1}, "mlp": {"weight": 1}}}),
    ("loss.mlp.l2", {"loss": {"mlp": {"l2": 1}}}),
    ("loss.block.relative_l2", {"loss": {"block": {"relative_l2": 2}}}),
    ("loss.stream.slots", FEATURE | {"loss": {"stream": {"slots": ["last"]}}}),
    ("loss.stream.cosine", {"loss": {"stream": {"cosine": 1}}}),
    ("loss.feature.blocks", FEATURE | {"loss": {"feature": {"weight": 0, "blocks": [0]}}}),
    ("loss.feature.block_weights", {"loss": {"feature": {"weight": 0, "block_weights": [2]}, "mlp": {"weight": 1}}}),
    ("loss.load_balance.scope", {"loss": {"load_balance": {"scope": "sequence"}}}),
    ("optimizer.inside_scan", FEATURE | {"optimizer": {"inside_scan": False}}),
    ("remat", {"remat": "none"}),
    ("moe_update_rule", {"moe_update_rule": "sign"}),
    ("moe_update_rate", {"moe_update_rate": 0.5}),
    ("moe_bias_cap", {"moe_bias_cap": 1.0}),
    ("moe_afb_warmup_steps", {"moe_afb_warmup_steps": 5}),
    ("moe_update_momentum", NOAUX | {"moe_update_rule": "sign", "moe_update_momentum": 0.5}),
    ("moe_bias_sync_group", {"moe_bias_sync_group": "ep"}),
    ("expert_parallel_size", NOAUX | {"expert_parallel_size": 2}),
    ("student.importance_rows", {"student": {"importance_rows": 8}}),
    ("feed.local_cache.max_gib", {"feed": {"local_cache": {"max_gib": 1}}}),
    ("feed.local_cache.dir", {"source": "online", "feed": {"local_cache": {"dir": "/tmp/x"}}}),
    ("online.exact", {"online": {"exact": True}}),
    ("online.teacher.path", {"online": {"teacher": {"path": "x"}}}),
]


@pytest.mark.parametrize(("name", "changes"), IDLE, ids=str)
def test_what_does_nothing_is_named(name: str, changes: dict[str, Any]) -> None:
    assert any(note.startswith(f"{name} does nothing in this run: it needs ") for note in notes(changes))


def test_every_setting_of_the_list_is_tried() -> None:
    tried = {name for name, _ in IDLE}
    of_terms = {
        f"loss.{term}.{name}"
        for term in ("feature", "mlp", "block", "stream")
        for name in ("l2", "cosine", "relative_l2")
    }
    assert {*(f"loss.{name}" for name in _OF_LOSS), *_OF_RUN} - of_terms - {"loss.kl.share"} <= tried


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": {"alpha": 0.0, "token_weight": 0.0, "tau": 1.0, "mlp": {"cosine": 0.0, "relative_l2": 0.0}}},
        FEATURE | {"loss": {"alpha": 0.5, "tau": 2.0, "kl": {"direction": "reverse", "targets": "head"}}},
        FEATURE | {"loss": {"alpha": RAMP, "kl": {"direction": "jsd", "share": 0.2}}},
        FEATURE | {"loss": {"kl": {"targets": "head"}}},  # evaluations follow it
        {"loss": {"feature": {"weight": 0, "blocks": [0], "block_weights": [2]}, "block": {"weight": 1, "cosine": 1}}},
        FEATURE | {"loss": {"stream": {"weight": RAMP, "slots": ["last"], "cosine": 1}}},
        NOAUX | {"moe_update_momentum": 0.5, "loss": {"load_balance": {"weight": 0.1, "scope": "sequence"}}},
        NOAUX | {"moe_bias_sync_group": "ep", "expert_parallel_size": 2},
        {"moe_bias_cap": None, "remat": "block", "optimizer": {"inside_scan": False}},
        {"source": "online", "online": {"exact": True}},
        {"feed": {"local_cache": {"dir": "/tmp/x", "max_gib": 1}}},
        {
            "loss": {"alpha": 0.5, "tau": 2.0, "mlp": {"weight": 1.0, "cosine": 1}},
            "remat": "none",
            "optimizer": {"inside_scan": False},
            "stages": [{"mode": "blockwise", "steps": 1}, {"mode": "feature", "steps": 1}],
        },
    ],
    ids=str,
)
def test_what_a_stage_uses_is_not(changes: dict[str, Any]) -> None:
    assert notes(changes) == []


def test_configs_in_which_every_field_is_written_down_have_no_notes() -> None:
    spec = TrainConfig(run="r", cache="c", loss=LossConfig(), optimizer=OptimizerConfig())
    assert notes(TrainConfig.model_validate(spec.model_dump(mode="json")).model_dump(mode="json")) == []


def test_a_run_says_it_once_and_goes_on(tmp_path: Path, cache: Path, console: pytest.CaptureFixture[str]) -> None:
    values = {
        "run": str(tmp_path / "run"),
        "cache": str(cache),
        "loss": {"rest_bucket": True, "tau": 2.0},
        "steps": 1,
        "batch_rows": 4,
        "student": {"surgery": [{"op": "drop_blocks", "blocks": [1]}]},
    }
    spec = TrainConfig.model_validate(values)
    assert train(spec).steps == 1
    said = console.readouterr().err
    assert said.count("loss.tau does nothing in this run") == 1
    assert said.count("loss.rest_bucket does nothing in this run: it needs a KL over the top k") == 1
    train(spec)
    assert "does nothing" not in console.readouterr().err
