"""The `StepProgram` of blockwise mode."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from distillcache.models.adapters import LORA
from distillcache.schemas.errors import ConfigError
from distillcache.trainer.step.balance import BlockRouting, biases
from distillcache.trainer.step.blockwise import MODE, BlockwiseStep, StepSums
from distillcache.trainer.step.optimizer import PROGRAMS, make_optimizer
from distillcache.trainer.step.parameters import (
    BEHIND_BLOCKS,
    IN_BLOCK,
    INDEXER,
    PROJECTOR,
    ROUTER_BIAS,
    ROUTING,
    Parameters,
    PathRules,
    address_prefix,
    sublayer_of,
)
from distillcache.trainer.step.program import Setting, TrainState, Update, check_attention
from distillcache.trainer.step.stack import BlockRules, StudentStack
from distillcache.trainer.step.targets import TapReading, Targets
from distillcache.trainer.terms import Terms


class BlockwiseProgram:
    """Independent blocks, each on the teacher's stream or, if none is recorded, on the student's own."""

    blocks_apart: ClassVar[bool] = True
    usual_rate: ClassVar[float] = 3e-3  # closed 93% of the gap of the demo by index; 2e-3 88%, 1e-3 83%

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.terms = Terms.of_mode(MODE)
        self.optimizer = make_optimizer(setting.optimizer, setting.steps)  # type: ignore[arg-type]
        counting = self.terms.counting(setting.loss)
        self._compares_attention, self._compares_mlp = counting.read("attn_out"), counting.read("mlp_out")
        self._compares_block = counting.read("stream")
        self._trains_mlp = self._compares_mlp or self._compares_block
        balancing = setting.balancing
        self._runs_mlp = self._trains_mlp or (balancing is not None and balancing.collects)
        self._own_stream = "resid" not in setting.recorded
        self.compares_blocks, self.compares_streams = True, False
        derives = self._compares_mlp and "mlp_out" not in setting.recorded
        self.needs_leaving = derives or self._compares_block
        self.taps: tuple[str, ...] = () if self._own_stream else ("resid",)
        on_teacher = self._runs_mlp and setting.spec.mlp_input == "teacher" and not self._own_stream
        needed = {"loss.feature.weight": self._compares_attention, "loss.mlp.weight": derives, "mlp_input": on_teacher}
        check_attention(setting, needed, "compare streams alone: loss.feature.weight: 0, loss.block.weight: 1")
        if any(needed.values()):
            self.taps = (*self.taps, "attn_out")
        self.reads_head = False
        self.row_fields: tuple[str, ...] = ("tokens", "loss_mask") if self._own_stream else ()
        self.injects_norms = setting.spec.inject == "attn_in"
        self._check_experts_run()
        self._check_own_stream()

    def rules(self) -> PathRules:
        on_student, balances = self._setting.spec.mlp_input == "student", self._setting.balances
        attention = self._compares_attention or self._compares_block
        attention |= on_student and (self._compares_mlp or balances)
        return (
            (f"{IN_BLOCK}{LORA}/attention/*", attention),
            (f"{IN_BLOCK}{LORA}/mlp/*", self._trains_mlp),
            (IN_BLOCK + ROUTER_BIAS, False),
            (IN_BLOCK + INDEXER, False),
            *((IN_BLOCK + name, self._trains_mlp or balances) for name in ROUTING),
            (IN_BLOCK + "mlp/*", self._trains_mlp),
            (IN_BLOCK + "attention/norm", attention and not self.injects_norms),
            (IN_BLOCK + "attention/*", attention),
            (f"{IN_BLOCK}{PROJECTOR}/*", True),
            *((name, False) for name in ("embed", *BEHIND_BLOCKS)),
        )

    def holds(self, name: str) -> bool:
        sublayer = sublayer_of(name)
        if sublayer is None:
            return self._own_stream and name == "embed"
        return self._own_stream or self._runs_mlp or sublayer != "mlp"

    def computes(self, name: str) -> bool:
        return name not in BEHIND_BLOCKS

    def update(self, reading: TapReading) -> Update:
        setting, spec = self._setting, self._setting.spec
        rules = BlockRules(
            spec.mlp_input,
            self._runs_mlp,
            spec.compute_dtype,
            self._own_stream,
            teacher_norm_eps=setting.teacher_norm_eps,
            adapter_alpha=setting.adapter_alpha,
        )
        step = BlockwiseStep(
            setting.stack,
            reading,
            rules,
            setting.loss,
            self.optimizer,
            setting.steps,
            spec.micro_batches,
            setting.optimizer.inside_scan,
            setting.balancing,
        )
        return blockwise_update(step)

    @staticmethod
    def sums_specs(split: Any, same: Any) -> Any:
        return StepSums(split, same, same)

    def means(self, sums: StepSums) -> dict[str, Any]:
        return {name: total / float(sums.tokens) for name, total in block_sums(sums, self._setting.stack).items()}

    def routing(self, sums: StepSums) -> BlockRouting | None:
        return block_routing(sums, self._setting.stack)

    def _check_experts_run(self) -> None:
        setting = self._setting
        if setting.balancing is not None and setting.balancing.update and not self._trains_mlp:
            raise ConfigError(
                "moe_balance_type: noaux_tc balances experts that are trained, and no loss of this stage trains them",
                {"stage": setting.where, "loss.mlp.weight": setting.loss.mlp.weight},
                "give loss.mlp or loss.block a weight, or leave moe_balance_type out",
            )

    def _check_own_stream(self) -> None:
        """Check settings that need a recorded stream: without one, each block receives the student's own."""
        if not self._own_stream:
            return
        setting = self._setting
        needed = {
            "mesh.block": setting.groups > 1,  # the stream would cross groups of devices
            "inject": self.injects_norms,
            "loss.mlp.weight": self._compares_mlp and "mlp_out" not in setting.recorded,
            "loss.block.weight": self._compares_block,
        }
        if asking := [name for name, asks in needed.items() if asks]:
            raise ConfigError(
                "the cache lacks the stream that enters the blocks, which this needs",
                {"cache": setting.cache, "needed for": ", ".join(asking)},
                "add it: distillcache build --extend with taps.resid "
                "(online: name it in online.taps), or leave these options at their defaults",
            )


@lru_cache(maxsize=PROGRAMS)
def blockwise_update(step: BlockwiseStep) -> Update:
    """The blockwise step on a state."""

    def update(
        state: TrainState, frozen: Parameters, batch: Mapping[str, Any], targets: Targets
    ) -> tuple[TrainState, StepSums]:
        moments = {address: state.moments[address_prefix(address)] for address in step.stack.places()}
        fixed = {**frozen, **biases(state.balance)}
        parameters, moments, sums, tokens = step.update(state.parameters, moments, fixed, batch, targets, state.step)
        groups = [range(len(layers.pattern)) for layers in step.stack.config.layers]
        arranged = tuple(
            jax.tree.map(lambda *columns: jnp.stack(columns, 1), *(sums[g, p] for p in places))
            for g, places in enumerate(groups)
        )
        named = {address_prefix(address): value for address, value in moments.items()}
        balance = state.balance
        if step.balancing is not None:
            loads = {address_prefix(address): found.routing.loads for address, found in sums.items() if found.routing}
            balance = step.balancing.after_step(balance, loads, state.step)
        new = TrainState(parameters, named, state.step + 1, balance)
        return new, StepSums(arranged, tokens, step.weights(state.step))

    return update


def block_sums(sums: StepSums, stack: StudentStack) -> dict[str, np.ndarray]:
    """A step's sums by name, float64 `[L]`, on the host."""
    return {name: _rows([group.terms[name] for group in sums.blocks], stack) for name in sums.blocks[0].terms}


def block_routing(sums: StepSums, stack: StudentStack) -> BlockRouting | None:
    """Fetch the routing of a step to the host in float64, stacked over the blocks with experts."""
    groups = [group.routing for group in sums.blocks]
    if groups[0] is None:
        return None
    blocks = list(stack.config.moe_blocks)
    return jax.tree.map(lambda *leaves: _rows(leaves, stack)[blocks], *groups)


def _rows(of_groups: Sequence[Any], stack: StudentStack) -> np.ndarray:
    """Values `[repeats, places, ...]` of every layer group, padding left out, as one `[L, ...]`."""
    found = [np.asarray(value, np.float64) for value in of_groups]
    return np.concatenate(
        [
            value[: layer.repeats].reshape(-1, *value.shape[2:])
            for value, layer in zip(found, stack.config.layers, strict=True)
        ]
    )
