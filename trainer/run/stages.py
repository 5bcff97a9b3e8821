"""The stages of a run, and checks that their configs make sense.

A run has one stage, or several, one after the other (`stages`): blockwise first and feature mode after it is the
usual recipe.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from distillcache.schemas.config.train import LossConfig, MeshConfig, OptimizerConfig, TrainSpec
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.step.modes import MODES
from distillcache.trainer.step.optimizer import learning_rate_schedule
from distillcache.trainer.step.program import StepProgram
from distillcache.trainer.step.schedules import may_count
from distillcache.trainer.terms import Terms
from distillcache.trainer.terms.parts import counts

# What an operation of surgery changes. The others change both, or the blocks.
CUTS_MLP = ("mlp_width", "experts", "expert_width", "upcycle")
CUTS_ATTENTION = ("query_heads", "kv_heads", "value_heads")  # or the mixer in its place
USUAL_EVALUATIONS, LEAST_INTERVAL = 10, 10  # by default: in a run, and steps between two


@dataclass(frozen=True)
class Stage:
    """A stage of a run. first: the run's step at which it begins."""

    number: int
    mode: str
    first: int
    steps: int
    loss: LossConfig
    optimizer: OptimizerConfig
    train_only: list[str] | None

    @property
    def last(self) -> int:
        """The run's step at which it ends."""
        return self.first + self.steps

    @property
    def name(self) -> str:
        """For messages."""
        return f"stage {self.number}, mode {self.mode}"

    @property
    def program(self) -> type[StepProgram]:
        return MODES[self.mode]

    @property
    def terms(self) -> Terms:
        """The terms of the loss that count."""
        return Terms.of_mode(self.mode).counting(self.loss)

    @property
    def compares_attention(self) -> bool:
        return self.terms.read("attn_out")

    @property
    def compares_mlp(self) -> bool:
        return self.terms.read("mlp_out")

    @property
    def compares_stream(self) -> bool:
        """Return whether streams that leave blocks are compared: each block's by itself, or the student's own."""
        return self.terms.read("stream")

    @property
    def trains_blocks_mlps(self) -> bool:
        """Return whether each block's MLP is trained by itself."""
        return self.program.blocks_apart and (self.compares_mlp or self.compares_stream)

    @property
    def compares_tokens(self) -> bool:
        return bool(self.terms.logits)

    @property
    def teaches_teacher(self) -> bool:
        """Return whether a loss has something to teach even to a student that is the teacher."""
        loss = self.loss
        from_data = any(term.teaches_teacher(loss) for term in self.terms.logits)
        return from_data or may_count(loss.load_balance.weight) or may_count(loss.router_z)


def evaluation_interval(eval_every: int | None, steps: int) -> int:
    """Return the steps between evaluations; 0: only at the end of a stage.

    Args:
        eval_every: as the config has it; None: about ten in a run.
        steps: of the whole run.
    """
    return max(steps // USUAL_EVALUATIONS, LEAST_INTERVAL) if eval_every is None else eval_every


def resolve_stages(spec: TrainSpec, mesh: MeshConfig) -> tuple[Stage, ...]:
    """The stages of a run, with inherited settings filled in.

    Raises:
        ConfigError: a stage has nothing to train on, or something is requested that no stage would do.
    """
    found: list[Stage] = []
    if spec.stages is None:
        optimizer = _with_rate(spec.optimizer, spec.mode)
        found = [Stage(0, spec.mode, 0, spec.steps, spec.loss, optimizer, spec.train_only)]
    for number, stage in enumerate(spec.stages or []):
        found.append(
            Stage(
                number,
                stage.mode,
                found[-1].last if found else 0,
                stage.steps,
                stage.loss or spec.loss,
                _with_rate(stage.optimizer or spec.optimizer, stage.mode),
                spec.train_only if stage.train_only is None else stage.train_only,
            )
        )
    if not found:
        raise ConfigError("stages is empty", {"stages": []}, "leave it out, or list at least one")
    for stage in found:
        _check_stage(stage, mesh)
    _check_use(found, spec)
    if spec.moe_balance_type == "noaux_tc":
        found = [replace(stage, loss=_without_balance_loss(stage.loss)) for stage in found]
    return tuple(found)


def _with_rate(optimizer: OptimizerConfig, mode: str) -> OptimizerConfig:
    """The settings with the mode's own learning rate where they name none."""
    if optimizer.learning_rate is not None:
        return optimizer
    return optimizer.model_copy(update={"learning_rate": MODES[mode].usual_rate})


def warm_up_note(stage: Stage) -> str | None:
    """A warning if the stage ends before its warm-up does; None if it reaches its learning rate."""
    config = stage.optimizer
    if stage.steps > config.warmup_steps:
        return None
    highest = float(np.asarray(learning_rate_schedule(config, stage.steps)(stage.steps - 1)))
    return (
        f"{stage.name}, ends within its warm-up: it has {counted(stage.steps, 'step')}, and optimizer.warmup_steps is "
        f"{config.warmup_steps:,}. Its learning rate reaches {highest:.2g} at most, not {config.learning_rate:g}; "
        "lower optimizer.warmup_steps, or take more steps"
    )


def idle_note(spec: TrainSpec, stages: Sequence[Stage]) -> str | None:
    """A warning if the first stage compares only what surgery left unchanged; None if it has something to learn.

    Later stages begin with what the first one trained, which the config does not tell.

    Args:
        spec: of a run whose student is the teacher cut, block for block, and whose blocks are given the teacher's
            recorded stream.
    """
    ops, part = [op.op for op in spec.student.surgery], only_part(spec, stages)
    if part is None or not ops or not all(op in (CUTS_MLP if part == "attention" else CUTS_ATTENTION) for op in ops):
        return None
    return part_note(stages[0], part, f"surgery ({', '.join(ops)}) leaves")


def only_part(spec: TrainSpec, stages: Sequence[Stage]) -> Literal["attention", "mlp"] | None:
    """The sublayer whose outputs alone the first stage compares, each block by itself; None where there is more."""
    stage = stages[0]
    if not stage.program.blocks_apart or stage.teaches_teacher or stage.compares_stream:
        return None
    if not stage.compares_mlp:
        return "attention"
    # `mlp_input: student` gives the MLP what a cut attention says, so then its loss has to learn from both.
    return "mlp" if not stage.compares_attention and spec.mlp_input == "teacher" else None


def part_note(stage: Stage, part: Literal["attention", "mlp"], lead: str) -> str:
    """The line about a stage that compares a sublayer which is the teacher's.

    Args:
        lead: the words before that sublayer.
    """
    left, compared, advice = {
        "attention": ("attention", "attention outputs", "give loss.mlp.weight a value"),
        "mlp": ("the MLPs", "outputs of MLPs", "give loss.feature.weight a value"),
    }[part]
    return (
        f"{stage.name}, has nothing to learn: {lead} {left} as the teacher's, and the loss compares {compared} alone; "
        f"{advice}, or use mode: feature"
    )


def _without_balance_loss(loss: LossConfig) -> LossConfig:
    """Biases stand in for the auxiliary loss: with both, each would hide what the other does."""
    return loss.model_copy(update={"load_balance": loss.load_balance.model_copy(update={"weight": 0.0})})


def _check_stage(stage: Stage, mesh: MeshConfig) -> None:
    loss, where, terms = stage.loss, stage.name, Terms.of_mode(stage.mode)
    for term in (*terms.logits, *Terms.registered().blocks):
        term.check(loss, where)
    blocks = loss.feature.blocks
    if blocks != "all" and len(set(blocks)) != len(blocks):
        raise ConfigError(
            "a block is named twice", {"stage": where, "loss.feature.blocks": blocks}, "name every block once"
        )
    if not stage.terms.all:
        raise ConfigError(
            "no loss has a weight, so nothing would be trained",
            {"stage": where, **{term.setting: term.weights(loss)[term.name] for term in terms.all}},
            "give one of them a value above zero",
        )
    if not stage.program.blocks_apart and mesh.block > 1:
        raise ConfigError(
            "in feature mode blocks depend on each other, so devices cannot hold different ones",
            {"stage": where, "mesh.block": mesh.block},
            "use the axes data, fsdp and tensor, or a run of its own for the blockwise stage",
        )


def _check_use(stages: Sequence[Stage], spec: TrainSpec) -> None:
    """Refuse what is requested and no stage of the run would do, or could do."""
    for stage in stages:
        if stage.program.blocks_apart and stage.compares_stream and spec.mlp_input != "student":
            raise ConfigError(
                "loss.block compares a whole block, whose MLP reads what the block's own attention added",
                {"stage": stage.name, "mlp_input": spec.mlp_input, "expected": "student"},
                "leave mlp_input out, or use loss.feature and loss.mlp instead of loss.block",
            )
    trains_mlp = any(stage.trains_blocks_mlps for stage in stages)
    asked_in_vain = {
        term.setting: " or ".join(f"a {mode} stage" for mode in term.modes)
        for term in Terms.registered().blocks
        if any(counts(term, stage.loss) for stage in stages) and not any(term in stage.terms.blocks for stage in stages)
    }
    if not trains_mlp and spec.mlp_input != "teacher":
        asked_in_vain["mlp_input"] = "a blockwise stage with loss.mlp.weight or loss.block.weight above zero"
    if spec.inject != "resid" and not any(stage.program.blocks_apart for stage in stages):
        asked_in_vain["inject"] = "a blockwise stage"
    for name, needed in asked_in_vain.items():
        raise ConfigError(
            f"{name} would do nothing in this run",
            {"stages": ", ".join(stage.mode for stage in stages), "needed": needed},
            f"leave {name} out, or add what it needs",
        )
