"""Programs of the modes: the parameters that they declare trained or frozen, and the one place that chooses them."""

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.models.config import ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.families import FAMILIES, config_from_hf
from distillcache.schemas.config import TrainConfig
from distillcache.schemas.config.train import LossConfig, OptimizerConfig
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.run.stages import resolve_stages
from distillcache.trainer.step.balance import make_balancing
from distillcache.trainer.step.modes import MODES
from distillcache.trainer.step.parameters import all_parameters, at_address, make_projectors, reached_by
from distillcache.trainer.step.program import Setting, StepProgram
from distillcache.trainer.step.stack import BlockRules, StudentStack
from tests.models.conftest import GOLDEN
from tests.trainer.conftest import MIXED, blockwise, random_batch

TRAINER = Path(__file__).parents[3] / "trainer"
CONFIGS = {path.parent.name: path for path in sorted(GOLDEN.glob("*/config.json"))}
ALL = {"mlp": {"weight": 1.0}, "load_balance": {"weight": 0.1}}


def program_of(decoder: Decoder, mode: str, **changes: Any) -> StepProgram:
    """The program of a run's only stage, on a cache of both taps."""
    config = TrainConfig.model_validate({"run": "run", "cache": "cache", "mode": mode, **changes})
    [stage] = resolve_stages(config, config.mesh)
    apart = stage.program.blocks_apart
    balancing = make_balancing(config, config.mesh, stage.loss, decoder.config, stage.name, blocks_apart=apart)
    given = (config, stage.loss, stage.optimizer, stage.steps, stage.name, StudentStack(decoder), nnx.graphdef(decoder))
    return stage.program(Setting(*given, balancing, "cache", frozenset(("resid", "attn_out"))))


def names_of(decoder: Decoder) -> list[str]:
    """Of all parameters, a router's bias and projectors among them."""
    places = StudentStack(decoder).places()
    width = decoder.config.hidden_size
    state = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
    return ["/".join(map(str, path)) for path, _ in state] + [*make_projectors(places, width, width, 0)]


def abstract(config: ModelConfig) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config))


def test_each_mode_has_a_learning_rate_of_its_own():
    stages = [{"mode": mode, "steps": 1} for mode in MODES]
    values = {"run": "run", "cache": "cache", "stages": [*stages, {**stages[0], "optimizer": {"learning_rate": 0.5}}]}

    def rates(**changes: Any) -> list[float | None]:
        config = TrainConfig.model_validate({**values, **changes})
        return [stage.optimizer.learning_rate for stage in resolve_stages(config, config.mesh)]

    assert rates() == [*(program.usual_rate for program in MODES.values()), 0.5]
    assert rates(optimizer={"learning_rate": 0.125}) == [0.125, 0.125, 0.5]
    described = OptimizerConfig.model_fields["learning_rate"].description or ""
    for mode, program in MODES.items():
        assert f"{program.usual_rate:.0e}".replace("e-0", "e-") + f" in {mode} mode" in described


def test_every_family_is_here():
    assert {config_from_hf(json.loads(path.read_text()), path).family for path in CONFIGS.values()} <= set(FAMILIES)
    assert len(CONFIGS) > 30


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_declared_trained_or_frozen(name):
    """And a loss of everything leaves out what computes logits in blockwise mode, and in both what a rule moves and
    what chooses keys."""
    decoder = abstract(config_from_hf(json.loads(CONFIGS[name].read_text()), CONFIGS[name]))
    loss = ALL if decoder.config.moe else {"mlp": {"weight": 1.0}}
    if decoder.config.has_joined_blocks:
        with pytest.raises(ConfigError, match="cannot be a student"):
            program_of(decoder, "blockwise", loss=loss)
        return
    names = names_of(decoder)
    trained = {
        "blockwise": reached_by(program_of(decoder, "blockwise", loss=loss).rules(), names),
        "feature": reached_by(program_of(decoder, "feature").rules(), names),
    }
    left = {mode: {each.split("/", 4)[-1] for each in set(names) - set(found)} for mode, found in trained.items()}
    short = {each.split("/", 4)[-1] for each in names}
    still = {each for each in short if each == "mlp/router_bias" or each.startswith("attention/index_")}
    assert left["blockwise"] - {"head"} == {"embed", "final_norm"} | still
    assert left["feature"] == {"projector/in"} | still


def test_a_parameter_that_nobody_declared_is_told():
    """As of a new kind of sublayer: in blockwise mode somebody has to say which loss reaches it."""
    program = program_of(abstract(MIXED), "blockwise")
    with pytest.raises(ValueError, match="groups/0/blocks/0/mixer/in is declared neither trained nor frozen"):
        reached_by(program.rules(), ["embed", "groups/0/blocks/0/mixer/in"])


@pytest.mark.parametrize(
    ("changes", "sublayers"),
    [
        ({}, ("attention",)),
        ({"loss": {"feature": {"weight": 0}, "mlp": {"weight": 1}}}, ("mlp",)),
        ({"loss": {"feature": {"weight": 0}, "mlp": {"weight": 1}}, "mlp_input": "student"}, ("attention", "mlp")),
        ({"loss": {"mlp": {"weight": 1}}}, ("attention", "mlp")),
    ],
    ids=["attention", "mlp", "mlp of student", "both"],
)
def test_what_is_declared_trained_has_a_gradient_and_nothing_else(changes, sublayers):
    """Against the gradients by all parameters of the blocks."""
    decoder = nnx.jit(lambda: Decoder(MIXED, rngs=nnx.Rngs(0)))()
    program, everything = program_of(decoder, "blockwise", **changes), all_parameters(decoder)
    declared = reached_by(program.rules(), everything)
    blocks = {name: value for name, value in everything.items() if name.startswith("groups/")}
    step, targets = step_of(decoder, **changes)
    batch = random_batch(MIXED)
    found = jax.jit(lambda trained: step.gradients(trained, {}, batch, targets, jnp.int32(0))[0])(blocks)
    moved = {name for name, value in found.items() if np.asarray(value).any()}
    assert set(declared) == moved
    assert {path.split("/")[0] for name in declared for path in at_address({name: 0}, place_of(name))} == set(sublayers)


def step_of(decoder: Decoder, loss: dict[str, Any] | None = None, mlp_input: str = "teacher") -> Any:
    rules = BlockRules(runs_mlp="mlp" in (loss or {}), mlp_input=mlp_input)
    return blockwise(decoder, LossConfig.model_validate(loss or {}), rules=rules)


def place_of(name: str) -> tuple[int, int]:
    parts = name.split("/")
    return int(parts[1]), int(parts[3])


def constants(node: ast.AST) -> Sequence[object]:
    return [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)]


def test_no_mode_is_asked_for_by_name():
    """A mode's name chooses its program, in modes.py, and decides nothing else."""
    asking = []
    for path in TRAINER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            asks = isinstance(node, ast.Compare | ast.Match) and set(MODES) & set(map(str, constants(node)))
            kinds = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
            if asks or (kinds and any(word in ast.unparse(node.args[1]) for word in ("Sums", "Step", "Program"))):
                asking.append(f"{path.relative_to(TRAINER)}:{node.lineno}")
    assert asking == []
