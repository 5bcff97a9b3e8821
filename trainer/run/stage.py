"""One stage of a run, ready to step: its source, its trained parameters, and its compiled step.

A stage begins with a fresh optimizer, from the parameters that the one before it left.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distillcache.models.decoder import Decoder
from distillcache.models.routing import BalanceState, RouterSums
from distillcache.schemas.config.train import MeshConfig, TrainSpec
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.format.checkpoint import Held, SavedArrays
from distillcache.schemas.format.run import PARAMETERS
from distillcache.trainer.feed.block_groups import GroupedSource, HeldRows, blocks_of_groups, place_batch
from distillcache.trainer.feed.source import Batch, Rows, Source
from distillcache.trainer.mesh.host_parameters import Kept, gathered, kept, kept_rows, moved, on_devices
from distillcache.trainer.mesh.placement import groups_held, held, put, restored, rows_held, to_host
from distillcache.trainer.mesh.sharding import make_mesh, parameter_sharding, replicated, table_sharding
from distillcache.trainer.run.checkpoints import OPTIMIZER, named, path_name, restored_balance
from distillcache.trainer.run.metrics import blockwise_metrics, feature_metrics, router_metrics
from distillcache.trainer.run.stages import Stage
from distillcache.trainer.step.balance import (
    BlockRouting,
    biases,
    make_balancing,
    mean_balance,
    mean_biases,
    regrouped,
    start_balance,
)
from distillcache.trainer.step.blockwise import BlockwiseStep, StepSums
from distillcache.trainer.step.feature import FeatureStep, feature_update
from distillcache.trainer.step.optimizer import learning_rate_schedule, make_optimizer
from distillcache.trainer.step.parameters import ROUTER_BIAS, Parameters, choose_trained, place_prefix
from distillcache.trainer.step.program import (
    TrainState,
    block_routing,
    block_sums,
    blockwise_update,
    init_state,
    jit_step,
    padded,
    padded_table,
    unpadded,
)
from distillcache.trainer.step.stack import BlockRules, StudentStack
from distillcache.trainer.step.targets import (
    Span,
    Table,
    TapReading,
    block_starts,
    is_in_step,
    make_table,
    real_vocab,
    student_spans,
    with_column,
)

BEHIND_BLOCKS = ("final_norm", "head")  # what computes logits, and nothing else
# `open_source(taps, blocks, leaving)`: the rows to train on, with these taps of these of the teacher's blocks (None:
# all that are recorded).
OpenSource = Callable[[Sequence[str], Sequence[int] | None, bool], Source]


class StageRun:
    """A stage with its source, its state and its compiled step."""

    def __init__(
        self,
        spec: TrainSpec,
        mesh: MeshConfig,
        stage: Stage,
        decoder: Decoder,
        parameters: Parameters,
        open_source: OpenSource,
        norms: Callable[[], np.ndarray],
    ) -> None:
        """Open its source and see that it is possible; `prepare` makes it ready to step.

        Args:
            decoder: the student; its structure alone counts here.
            parameters: all of the student's, projectors included; their names alone count here.
            norms: the weights of the teacher's attention norms, `[L, D]`.

        Raises:
            ConfigError, InputError: what the stage asks for is not in the cache or the student.
        """
        self.stage, self.stack, self.mesh = stage, StudentStack(decoder), make_mesh(mesh)
        self.groups = mesh.block
        self._spec, self._norms, self._graph = spec, norms, nnx.graphdef(decoder)
        self._balancing = make_balancing(spec, mesh, stage.loss, stage.mode, decoder.config, stage.name)
        self._check_experts_run()
        self._select(open_source)
        self._trained = choose_trained(parameters, stage.train_only, self._reached(parameters))

    @property
    def schedule(self) -> Callable[[int], Any]:
        """The learning rate by step of the stage."""
        return learning_rate_schedule(self.stage.optimizer, self.stage.steps)

    def used_parameters(self) -> Parameters:
        """All that a step computes with."""
        found = {**self._frozen, **self.state.parameters}
        return {name: v for name, v in found.items() if self.stage.compares_tokens or name not in BEHIND_BLOCKS}

    def losses(self, sums: Any) -> dict[str, Any]:
        """A step's means, `[L]` by block, or a number, of its sums on the host. A mean of nothing is left out: there is
        none over tokens of a batch that is all padding, and none over targets where no token is one."""
        tokens, found = float(sums.tokens), dict[str, Any]()
        if not tokens:
            return found
        if isinstance(sums, StepSums):
            found = {name: total / tokens for name, total in block_sums(sums, self.stack).items()}
        else:
            found = {"feature": np.asarray(sums.feature, np.float64) / tokens}
            if targets := float(sums.targets):
                found |= {name: float(total) / targets for name, total in sums.token_losses.items()}
        routing = self.routing(sums)
        if routing is not None:  # of all blocks, so that one that is not finite is named
            for name, totals in (("load_balance", routing.balance), ("router_z", routing.sums.z)):
                found[name] = np.zeros(self.stack.config.num_blocks)
                found[name][list(self.stack.config.moe_blocks)] = totals / tokens
        return found

    def routing(self, sums: Any) -> BlockRouting | None:
        """Fetch the routing of a step to the host, stacked over the blocks with experts; None if not needed."""
        if isinstance(sums, StepSums):
            return block_routing(sums, self.stack)
        return sums.routing

    def metrics(self, losses: dict[str, Any], sums: Any, teacher: RouterSums | None = None) -> dict[str, float]:
        """The same under the names of metrics.py.

        Args:
            teacher: the routing of the teacher that ran for this step, if it has experts, `[Lm, B, ...]`.
        """
        weights = {name: float(value) for name, value in sums.weights.items()}
        blockwise = isinstance(sums, StepSums)
        found = (blockwise_metrics if blockwise else feature_metrics)(losses, self.weights, weights)
        routing = self.routing(sums)
        if routing is None:
            return found
        of_routers = router_metrics(losses, routing.sums, self.stack.config.moe_blocks, weights, self._bias_rows())
        for name in ("distill/moe_lb_loss", "distill/router_z_loss"):
            if name in of_routers:
                found["distill/total_loss"] = found.get("distill/total_loss", 0.0) + of_routers[name]
        if teacher is not None and self._balancing is not None and "load_balance" in weights:
            balance = mean_balance(teacher, self._balancing.moe, self._balancing.scope)
            if balance is not None:
                of_routers["distill/teacher_moe_lb_loss"] = weights["load_balance"] * balance
        return found | of_routers

    def _bias_rows(self) -> np.ndarray | None:
        """The biases of every block with experts, `[Lm, E]`; None where they do not move."""
        if not self.state.balance:
            return None
        found, kinds = mean_biases(self.balance()), self.stack.config.kinds
        return np.stack(
            [
                np.asarray(found[place_prefix((group, place)) + ROUTER_BIAS][repeat])
                for block, group, repeat, place in self.stack.config.places()
                if kinds[block].moe
            ]
        )

    @property
    def trained_names(self) -> frozenset[str]:
        """Names of the parameters that a step changes, biases of routers included."""
        return self._trained.union(biases(self.state.balance))

    def place(self, batch: Batch) -> Batch:
        """A host batch of `self.source`, on its way to the devices."""
        fields = {name: batch[name] for name in self._fields}
        return place_batch(fields, self.mesh, self.groups, self._places, self._spec.batch_rows)

    def advance(self, batch: Batch) -> Any:
        """One step; returns its sums before they are computed, on the devices."""
        self.state, sums = self._step(self.state, self._frozen, batch, self._table)
        return sums

    def compiled(self, batch: Batch) -> Any:
        """The step compiled for such batches, to look at."""
        return self._step.lower(self.state, self._frozen, batch, self._table).compile()

    def parameters(self) -> dict[str, Kept]:
        """Return the student's parameters that a step changes, without the mesh's padding, on the host."""
        found: dict[str, Any] = {}
        for name, value in self.state.parameters.items():
            rows = self._rows(name)
            found[name] = kept(value) if rows is None else kept_rows(name, value, rows)
        return found | to_host(mean_biases(self.balance()))

    def balance(self) -> dict[str, BalanceState]:
        """The state of the routers' biases, likewise."""
        return unpadded(to_host(self.state.balance), self.stack)

    def held(self) -> dict[str, Held]:
        """Return the parts of parameters and optimizer state that this process keeps, by item and name."""
        found: dict[str, Held] = {}
        for name, value in self.state.parameters.items():
            found[f"{PARAMETERS}/{name}"] = held(value, self._rows(name))
        for name, value in named(self.state.moments).items():
            found[f"{OPTIMIZER}/{name}"] = held(value, self._rows(name))
        return found

    def restore(self, saved: SavedArrays, done: int) -> None:
        """Go on after `done` steps of the stage, with the optimizer's state and the biases of a checkpoint."""

        def moment(path: Any, like: Any) -> Any:
            name = path_name(path)
            return restored(like, self._rows(name), lambda boxes: saved.boxes(OPTIMIZER, name, boxes))

        moments = jax.tree_util.tree_map_with_path(moment, self.state.moments)
        groups = self._balancing.bias_groups if self._balancing else 1
        states = restored_balance(saved) if self.state.balance else {}
        balance = padded({unit: regrouped(state, groups) for unit, state in states.items()}, self.stack, self.groups)
        step = jnp.asarray(done, jnp.int32)
        self.state = TrainState(self.state.parameters, moments, *self._placed_rest(step, balance))

    def _rows(self, name: str) -> int | None:
        """Return how many entries of a stack's first axis are real rather than padding; None for anything but a
        stack.
        """
        return next((rows for place, rows in self.stack.places().items() if name.startswith(place_prefix(place))), None)

    # How it is made ready.

    @property
    def _runs_mlp(self) -> bool:
        """Blockwise mode: whether MLPs run at all."""
        return self.stage.compares_mlp or (self._balancing is not None and self._balancing.collects)

    def _check_experts_run(self) -> None:
        moves = self._balancing is not None and self._balancing.update
        if moves and self.stage.mode == "blockwise" and not self.stage.compares_mlp:
            raise ConfigError(
                "moe_balance_type: noaux_tc balances experts that are trained, and no loss of this stage trains them",
                {"stage": self.stage.name, "loss.mlp.weight": self.stage.loss.mlp.weight},
                "give loss.mlp a weight, or leave moe_balance_type out",
            )

    def _select(self, open_source: OpenSource) -> None:
        """The blocks that are trained, and the source of what they are trained with."""
        stage, spec = self.stage, self._spec
        recorded = open_source((), None, False)
        self._own_stream = stage.mode == "blockwise" and not records(recorded, "resid")
        self._check_own_stream(recorded)
        taps = self._taps()
        recorded = open_source(taps, None, False)
        teacher_blocks = recorded.plan.teacher.num_blocks
        starts = block_starts(spec.student, teacher_blocks)
        self.spans = student_spans(self.stack.config, teacher_blocks, starts)
        self.weights = _block_weights(stage, self.spans, recorded)
        derives = stage.compares_mlp and not records(recorded, "mlp_out")
        if stage.compares_mlp and not derives:
            taps = (*taps, "mlp_out")
        shares = blocks_of_groups(self.stack.config, self.groups)
        self._sources = [open_source(taps, self._teacher_blocks(share), derives) for share in shares]
        self.source: Rows = (
            self._sources[0] if self.groups == 1 else GroupedSource(self._sources, groups_held(self.mesh))
        )
        rows = spec.batch_rows
        self._places = rows_held(self.mesh, rows)
        if len(self._places) < rows:
            self.source = HeldRows(self.source, self._places)
        self._fields: tuple[str, ...] = ("tokens", "loss_mask") if stage.mode == "feature" or self._own_stream else ()
        self._fields = ("positions", "segment_ids", *self._fields, *taps)
        self._derives = derives
        self._table = self._make_table(shares)

    def _check_own_stream(self, source: Source) -> None:
        """Check settings that need a recorded stream: without one, each block receives the student's own."""
        if not self._own_stream:
            return
        stage, spec = self.stage, self._spec
        needed = {
            "mesh.block": self.groups > 1,  # the stream would cross groups of devices
            "inject": spec.inject == "attn_in",
            "loss.mlp.weight": stage.compares_mlp and not records(source, "mlp_out"),
        }
        if asking := [name for name, asks in needed.items() if asks]:
            raise ConfigError(
                "the cache has no residual stream, which this needs",
                {"cache": source.url, "needed for": ", ".join(asking)},
                "add it: distillcache build --extend with taps.resid, or leave these options at their defaults",
            )

    def _taps(self) -> tuple[str, ...]:
        if self.stage.mode == "blockwise":
            return ("attn_out",) if self._own_stream else ("resid", "attn_out")
        wanted = {"attn_out": self.stage.compares_attention, "topk_logits": self.stage.uses_logits}
        return tuple(name for name, needed in wanted.items() if needed)

    def _teacher_blocks(self, share: Sequence[int]) -> list[int]:
        """The teacher's blocks behind the trained ones of these student blocks; of a share without any, one."""
        found = [
            block for at in share if at in self.weights for block in range(self.spans[at].first, self.spans[at].last)
        ]
        if not found:
            anyone = self.spans[min(self.weights)] if self.weights else Span(0, 1)
            return list(range(anyone.first, anyone.last))
        return found

    def _make_table(self, shares: Sequence[Sequence[int]]) -> Table:
        tables = []
        for share, source in zip(shares, self._sources, strict=True):
            places = {name: source.reads[name].at for name in source.reads}
            mine = {block: self.weights[block] for block in share if block in self.weights}
            tables.append(make_table(self.stack.config, self.spans, places, mine, needs_leaving=self._derives))
        table = _joined(tables, shares, self.stack)
        if self.stage.mode == "blockwise" and self._spec.inject == "attn_in":
            norms = self._norms()[[span.first for span in self.spans]]
            table = with_column(table, "norm", norms)
        return padded_table(table, self.groups)

    def _reached(self, parameters: Parameters) -> list[str]:
        """Patterns of the parameters that a loss has a gradient for."""
        stage, student = self.stage, self._spec.mlp_input == "student"
        if stage.mode == "feature":
            outside = () if stage.compares_tokens else BEHIND_BLOCKS
            return sorted(name for name in parameters if not name.endswith("projector/in") and name not in outside)
        attention = stage.compares_attention or (stage.compares_mlp and student)
        balances = self._balancing is not None and self._balancing.with_loss
        through_mlp = (
            ["mlp"] if stage.compares_mlp else ["mlp/router", "mlp/logit_bias", "mlp/norm"] if balances else []
        )
        attention |= balances and student
        found = [*(["attention"] if attention else []), *through_mlp]
        if stage.mode == "blockwise" and self._spec.inject == "attn_in":  # the teacher's norm is used
            own = [name for name in parameters if "/attention/" in name and not name.endswith("/attention/norm")]
            found = own + found[1:] if attention else found
        return [*found, "projector"]

    def prepare(self, parameters: Mapping[str, Any]) -> Self:
        """Make the state, what stays as it is, and the step.

        Args:
            parameters: all of the student's, projectors included, as the stage finds them, on the host or not.
        """
        spec, stage = self._spec, self.stage
        trained = {name: on_devices(value) for name, value in parameters.items() if name in self._trained}
        blocks_only = stage.mode == "blockwise"
        others = {name: value for name, value in parameters.items() if name not in self._trained and self._needs(name)}
        frozen = {name: on_devices(value) for name, value in others.items()}
        source = self._sources[0]
        codecs = {name: source.codecs[name] for name in source.reads}
        places = {name: source.reads[name].at for name in source.reads}
        reading = TapReading(
            codecs,
            source.plan.teacher.hidden_size,
            in_step=self.groups == 1 and is_in_step(self.spans, places, sorted(self.weights)),
        )
        optimizer = make_optimizer(stage.optimizer, stage.steps, clips=blocks_only)
        if blocks_only:
            eps = source.plan.teacher.norm_eps
            rules = BlockRules(
                spec.mlp_input, self._runs_mlp, spec.compute_dtype, self._own_stream, teacher_norm_eps=eps
            )
            step = BlockwiseStep(
                self.stack, reading, rules, stage.loss, optimizer, stage.steps, spec.micro_batches,
                stage.optimizer.inside_scan, self._balancing,
            )  # fmt: skip
            update = blockwise_update(step)
        else:
            update = feature_update(
                FeatureStep(
                    self._graph,
                    self.stack,
                    reading,
                    stage.loss,
                    optimizer,
                    stage.optimizer.clip_norm,
                    stage.steps,
                    spec.micro_batches,
                    spec.remat,
                    spec.compute_dtype,
                    self._balancing,
                    real_vocab(self.stack.config, source),
                )
            )
        balance = {}
        if self._balancing is not None and self._balancing.update:
            of_routers = gathered({name: value for name, value in parameters.items() if name.endswith(ROUTER_BIAS)})
            balance = start_balance(of_routers, self.stack.places(), self._balancing.bias_groups)
        placed = self._placed(padded(trained, self.stack, self.groups))
        state = init_state(self.stack, placed, optimizer, padded(balance, self.stack, self.groups), self.mesh)
        self.state = TrainState(placed, state.moments, *self._placed_rest(state.step, state.balance))
        self._frozen = self._placed(padded(frozen, self.stack, self.groups))
        rows = table_sharding(self.mesh) if self.mesh else None
        self._table = jax.tree.map(lambda column: put(column, rows), self._table)
        self._step = jit_step(update, self.state, self.mesh, self.groups)
        return self

    def _needs(self, name: str) -> bool:
        """Return whether the step uses a parameter at all: in blockwise mode nothing outside the blocks, and no MLP
        without a loss on it, unless the student's own stream is run.
        """
        if self.stage.mode == "feature":
            return True
        if not name.startswith("groups/"):
            return self._own_stream and name == "embed"
        return self._own_stream or self._runs_mlp or "/mlp/" not in name

    def _placed(self, parameters: Parameters) -> Parameters:
        """Copies on the devices: train steps donate their inputs."""
        if self.mesh is None:
            return {name: jnp.array(value) for name, value in parameters.items()}
        return {n: moved(v, parameter_sharding(self.mesh, n, v.shape)) for n, v in parameters.items()}

    def _placed_rest(self, step: Any, balance: dict[str, BalanceState]) -> tuple[Any, dict[str, BalanceState]]:
        """The number of steps and the state of biases, on the devices."""
        if self.mesh is None:
            return step, jax.tree.map(jnp.array, balance)
        stacked, everywhere = table_sharding(self.mesh), replicated(self.mesh)
        return put(step, everywhere), jax.tree.map(lambda leaf: put(leaf, stacked), balance)


def _block_weights(stage: Stage, spans: Sequence[Span], source: Source) -> dict[int, float]:
    """The student blocks that are trained, with their weights in the feature loss.

    Raises:
        ConfigError: blocks that the student has not, or that the cache lacks; weights that do not fit.
    """
    loss, there = stage.loss.feature, set(source.blocks)
    uses = stage.mode == "blockwise" or stage.compares_attention
    if not uses:
        return {}
    whole = [at for at, span in enumerate(spans) if set(range(span.first, span.last)) <= there]
    blocks = whole if loss.blocks == "all" else list(loss.blocks)
    if beyond := sorted(set(blocks) - set(range(len(spans)))):
        raise ConfigError(
            "the student has no such blocks",
            {"loss.feature.blocks": beyond, "expected": f"0 to {len(spans) - 1}"},
            "choose others",
        )
    if missing := sorted(set(blocks) - set(whole)):
        raise ConfigError(
            "the cache lacks the taps with which these blocks are compared",
            {"cache": source.url, "loss.feature.blocks": missing, "found": whole},
            "choose other blocks, or add them: distillcache build --extend",
        )
    if not blocks:
        raise ConfigError(
            "no block of the student can be compared with the cache",
            {"cache": source.url, "the cache's blocks": sorted(there)},
            "choose another student.layer_map, or add blocks: distillcache build --extend",
        )
    given = loss.block_weights
    if given is not None and (len(given) != len(blocks) or min(given) < 0):
        raise ConfigError(
            "loss.feature.block_weights does not fit",
            {
                "found": given,
                "expected": f"{counted(len(blocks), 'number')}, none below 0, one for each of blocks {blocks}",
            },
            "leave it out to weigh all blocks equally",
        )
    return dict(zip(blocks, given or [1.0] * len(blocks), strict=True))


def records(source: Source, name: str) -> bool:
    """Return whether the tap is recorded, in whichever segment."""
    return any(tap.name == name for segment in source.segments() for tap in segment.plan.taps)


def _joined(tables: Sequence[Table], shares: Sequence[Sequence[int]], stack: StudentStack) -> Table:
    """Each group's own rows out of its own table: a row is its group's whose blocks it is."""
    if len(tables) == 1:
        return tables[0]
    owner = {block: number for number, share in enumerate(shares) for block in share}
    joined = []
    for g in range(len(stack.config.layers)):
        numbers = tables[0][g]["block"][:, 0]
        joined.append(
            {
                name: np.stack([tables[owner[int(block)]][g][name][at] for at, block in enumerate(numbers)])
                for name in tables[0][g]
            }
        )
    return tuple(joined)
