"""One stage of a run: its sources and trained parameters (`plan_stage`), and its state and compiled step (`StageRun`).

A stage begins with a fresh optimizer, from the parameters that the one before it left. Its mode's part is a
`StepProgram` (step/program.py); nothing here asks which mode that is.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from distillcache.models.decoder import Decoder
from distillcache.models.head import OutputHead
from distillcache.models.routing import BalanceState, RouterSums
from distillcache.schemas.config.train import FeatureLossConfig, MeshConfig, StreamLossConfig, TrainSpec
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
from distillcache.trainer.run.metrics import router_metrics, term_metrics
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
from distillcache.trainer.step.heads import teacher_arrays, teacher_end
from distillcache.trainer.step.optimizer import learning_rate_schedule
from distillcache.trainer.step.parameters import ROUTER_BIAS, Parameters, address_prefix, choose_trained, reached_by
from distillcache.trainer.step.program import Setting, StepProgram, TrainState, init_state, jit_step, padded, unpadded
from distillcache.trainer.step.stack import StudentStack
from distillcache.trainer.step.targets import (
    BlockTargets,
    Span,
    TapReading,
    block_starts,
    block_targets,
    is_in_step,
    padded_targets,
    real_vocab,
    student_spans,
)
from distillcache.trainer.terms.parts import Means


class OpenSource(Protocol):
    """Opens the rows to train on (`Sources.open`)."""

    def __call__(
        self,
        taps: Sequence[str],
        blocks: Sequence[int] | None,
        slots: Mapping[str, Sequence[int]] | None = None,
        /,
    ) -> Source:
        """The rows with these taps of these of the teacher's blocks (None: all that are recorded).

        Args:
            slots: of these taps, the slots to read, whatever the blocks need.
        """
        ...


class StageSources(Protocol):
    """Everything that a stage takes from a cache or a teacher (`feed.open.Sources`)."""

    @property
    def open(self) -> OpenSource: ...

    def norms(self) -> np.ndarray:
        """The weights of the teacher's attention norms, `[L, D]`."""
        ...

    def head(self) -> OutputHead:
        """The teacher's last norm and head."""
        ...


@dataclass(frozen=True, eq=False)
class StagePlan:
    """A checked stage: its program, its open sources and the targets of its blocks.

    mesh: None for one device. weights: of the trained blocks. streams: the blocks whose own streams are compared, with
    the teacher's slots. sources: of each group of devices; source: of this process, all together. trained: names of the
    parameters that a gradient changes. head: the teacher's, where a loss needs it.
    """

    stage: Stage
    setting: Setting
    program: StepProgram
    mesh: Mesh | None
    spans: tuple[Span, ...]
    weights: Mapping[int, float]
    streams: Mapping[int, int]
    sources: tuple[Source, ...]
    source: Rows
    targets: tuple[BlockTargets, ...]
    trained: frozenset[str]
    head: OutputHead | None = None

    @property
    def schedule(self) -> Callable[[int], Any]:
        """The learning rate by step of the stage."""
        return learning_rate_schedule(self.stage.optimizer, self.stage.steps)

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """The positions of this process's rows in a batch."""
        return rows_held(self.mesh, self.setting.spec.batch_rows)

    def place(self, batch: Batch) -> Batch:
        """Put a host batch of `source` on the devices."""
        fields = ("positions", "segment_ids", *self.program.row_fields, *self.sources[0].reads)
        chosen = {name: batch[name] for name in fields}
        return place_batch(chosen, self.mesh, self.setting.groups, self.rows, self.setting.spec.batch_rows)

    def reading(self) -> TapReading:
        """The reading of a batch's stacks."""
        source = self.sources[0]
        places = {name: reads.at for name, reads in source.reads.items()}
        in_step = self.setting.groups == 1 and is_in_step(self.spans, places, sorted(self.weights))
        codecs = {name: source.codecs[name] for name in source.reads}
        teacher = source.plan.teacher
        end = None if self.head is None else teacher_end(self.head, places["resid"][teacher.num_blocks])
        return TapReading(codecs, teacher.hidden_size, in_step, end)


def plan_stage(
    spec: TrainSpec,
    mesh: MeshConfig,
    stage: Stage,
    decoder: Decoder,
    names: Collection[str],
    given: StageSources,
) -> StagePlan:
    """Open a stage's sources and check that it is possible.

    Args:
        decoder: the student; its structure alone counts.
        names: of all of the student's parameters, projectors included.

    Raises:
        ConfigError, InputError: what the stage asks for is not in the cache or the student.
    """
    setting = _setting(spec, mesh, stage, decoder, given.open((), None))
    program, model = stage.program(setting), setting.stack.config
    found = given.open(tuple(tap for tap in program.taps if tap != "resid"), None)
    teacher_blocks = found.plan.teacher.num_blocks
    spans = student_spans(model, teacher_blocks, block_starts(spec.student, teacher_blocks))
    weights = _block_weights(program, stage.loss.feature, spans, found) if program.compares_blocks else {}
    streams = _compared_streams(stage.loss.stream, spans, found) if program.compares_streams else {}
    reads_mlp = stage.compares_mlp and "mlp_out" in setting.recorded
    taps = (*program.taps, *(["mlp_out"] if reads_mlp else []), *(["resid"] if streams or program.reads_head else []))
    shares = blocks_of_groups(model, setting.groups)
    sources = tuple(
        given.open(taps, _teacher_blocks(share, spans, weights), _slots(program, share, spans, weights, streams))
        for share in shares
    )
    stacks = [{name: reads.at for name, reads in source.reads.items()} for source in sources]
    places = {block: stacks[group] for group, share in enumerate(shares) for block in share}
    targets = block_targets(
        model,
        spans,
        [places[block] for block in range(len(spans))],
        weights,
        needs_entering="resid" in program.taps,
        needs_leaving=program.needs_leaving,
        norms=given.norms() if program.injects_norms else None,
        compared=streams,
    )
    devices = make_mesh(mesh)
    return StagePlan(
        stage,
        setting,
        program,
        devices,
        spans,
        weights,
        streams,
        sources,
        _own_share(sources, devices, spec.batch_rows),
        padded_targets(targets, setting.groups),
        choose_trained(list(names), stage.train_only, reached_by(program.rules(), names)),
        given.head() if program.reads_head else None,
    )


def _setting(spec: TrainSpec, mesh: MeshConfig, stage: Stage, decoder: Decoder, source: Source) -> Setting:
    apart = stage.program.blocks_apart
    return Setting(
        spec,
        stage.loss,
        stage.optimizer,
        stage.steps,
        stage.name,
        StudentStack(decoder),
        nnx.graphdef(decoder),
        make_balancing(spec, mesh, stage.loss, decoder.config, stage.name, blocks_apart=apart),
        source.url,
        recorded_taps(source),
        mesh.block,
        source.holds("resid", source.plan.teacher.num_blocks),
        source.keeps_head,
        source.plan.teacher.norm_eps,
        real_vocab(decoder.config, source),
    )


def _own_share(sources: Sequence[Source], mesh: Mesh | None, batch_rows: int) -> Rows:
    """The source of what this process's devices need."""
    source: Rows = sources[0] if len(sources) == 1 else GroupedSource(sources, groups_held(mesh))
    places = rows_held(mesh, batch_rows)
    return HeldRows(source, places) if len(places) < batch_rows else source


def _trained_of(share: Sequence[int], weights: Mapping[int, float]) -> list[int]:
    """The trained student blocks among these; one of all if none of them is: a group reads something all the same."""
    return [at for at in share if at in weights] or [min(weights)]


def _teacher_blocks(share: Sequence[int], spans: Sequence[Span], weights: Mapping[int, float]) -> list[int] | None:
    """The teacher's blocks of the trained student blocks among these; None if no block is compared by itself."""
    if not weights:
        return None
    return [block for at in _trained_of(share, weights) for block in range(spans[at].first, spans[at].last)]


def _slots(
    program: StepProgram,
    share: Sequence[int],
    spans: Sequence[Span],
    weights: Mapping[int, float],
    streams: Mapping[int, int],
) -> dict[str, list[int]]:
    """The slots of the stream that a step reads: those at the ends of spans, nothing within them; for the teacher's
    logits the last."""
    found = {*streams.values(), *([spans[-1].last] if program.reads_head else [])}
    if "resid" in program.taps:
        for at in _trained_of(share, weights):
            found |= {spans[at].first, *([spans[at].last] if program.needs_leaving else [])}
    return {"resid": sorted(found)} if found else {}


def _whole_blocks(program: StepProgram, spans: Sequence[Span], source: Source) -> list[int]:
    """The student blocks for which everything is recorded that a step compares them with.

    Args:
        source: with the taps of every block; the stream's slots are looked for in its cache.
    """
    blocks, streams = set(source.blocks), set(source.stored("resid") if "resid" in program.taps else ())
    whole = []
    for at, span in enumerate(spans):
        ends = {span.first, *([span.last] if program.needs_leaving else [])} if "resid" in program.taps else set[int]()
        if set(range(span.first, span.last)) <= blocks and ends <= streams:
            whole.append(at)
    return whole


class StageRun:
    """A stage that steps. state: the only mutable part, changed by each step."""

    def __init__(
        self, plan: StagePlan, parameters: Mapping[str, Any], saved: SavedArrays | None = None, done: int = 0
    ) -> None:
        """Place the state on the devices, and make the step.

        Args:
            parameters: all of the student's, projectors included, as the stage finds them, on the host or not.
            saved: the checkpoint with which to go on after `done` steps of the stage.
        """
        self.plan, self.stage, self.mesh = plan, plan.stage, plan.mesh
        self._program, self._stack, self._groups = plan.program, plan.setting.stack, plan.setting.groups
        self._balancing = plan.setting.balancing
        self.state = self._first_state(parameters)
        if saved is not None:
            self.state = self._restored(saved, done)
        others = {n: v for n, v in parameters.items() if n not in plan.trained and self._program.holds(n)}
        others |= teacher_arrays(plan.head) if plan.head is not None else {}
        self._frozen = self._placed(others)
        rows = table_sharding(self.mesh) if self.mesh else None
        self._targets = jax.tree.map(lambda column: put(column, rows), plan.targets)
        update = self._program.update(plan.reading())
        specs = self._program.sums_specs if self._groups > 1 else None
        self._step = jit_step(update, self.state, self.mesh, specs)

    def _first_state(self, parameters: Mapping[str, Any]) -> TrainState:
        balance = {}
        if self._balancing is not None and self._balancing.update:
            of_routers = gathered({name: value for name, value in parameters.items() if name.endswith(ROUTER_BIAS)})
            balance = start_balance(of_routers, self._stack.places(), self._balancing.bias_groups)
        trained = self._placed({name: value for name, value in parameters.items() if name in self.plan.trained})
        optimizer, balance = self._program.optimizer, padded(balance, self._stack, self._groups)
        state = init_state(self._stack, trained, optimizer, balance, self.mesh)
        return TrainState(trained, state.moments, *self._placed_rest(state.step, state.balance))

    def _restored(self, saved: SavedArrays, done: int) -> TrainState:
        """The state after `done` steps, with the optimizer's state and the biases of a checkpoint."""

        def moment(path: Any, like: Any) -> Any:
            name = path_name(path)
            return restored(like, self._rows(name), lambda boxes: saved.boxes(OPTIMIZER, name, boxes))

        moments = jax.tree_util.tree_map_with_path(moment, self.state.moments)
        groups = self._balancing.bias_groups if self._balancing else 1
        states = restored_balance(saved) if self.state.balance else {}
        balance = padded({unit: regrouped(state, groups) for unit, state in states.items()}, self._stack, self._groups)
        step = jnp.asarray(done, jnp.int32)
        return TrainState(self.state.parameters, moments, *self._placed_rest(step, balance))

    def _placed(self, parameters: Mapping[str, Any]) -> Parameters:
        """Copies on the devices, filled up for a mesh: train steps donate their inputs."""
        there = {name: on_devices(value) for name, value in parameters.items()}
        filled = padded(there, self._stack, self._groups)
        if self.mesh is None:
            return {name: jnp.array(value) for name, value in filled.items()}
        return {n: moved(v, parameter_sharding(self.mesh, n, v.shape)) for n, v in filled.items()}

    def _placed_rest(self, step: Any, balance: dict[str, BalanceState]) -> tuple[Any, dict[str, BalanceState]]:
        """The number of steps and the state of biases, on the devices."""
        if self.mesh is None:
            return step, jax.tree.map(jnp.array, balance)
        stacked, everywhere = table_sharding(self.mesh), replicated(self.mesh)
        return put(step, everywhere), jax.tree.map(lambda leaf: put(leaf, stacked), balance)

    # Stepping.

    def advance(self, batch: Batch) -> Any:
        """One step; returns its sums before they are computed, on the devices."""
        self.state, sums = self._step(self.state, self._frozen, batch, self._targets)
        return sums

    def compiled(self, batch: Batch) -> Any:
        """The step compiled for such batches, for inspection."""
        return self._step.lower(self.state, self._frozen, batch, self._targets).compile()

    def losses(self, sums: Any) -> dict[str, Any]:
        """A step's means, `[L]` by block or a number, from its sums on the host.

        A mean over nothing is left out: over tokens if a batch is all padding, over targets if no token is one.
        """
        tokens = float(sums.tokens)
        if not tokens:
            return {}
        found = self._program.means(sums)
        routing = self.routing(sums)
        if routing is not None:  # of all blocks, so that one that is not finite is named
            for name, totals in (("load_balance", routing.balance), ("router_z", routing.sums.z)):
                found[name] = np.zeros(self._stack.config.num_blocks)
                found[name][list(self._stack.config.moe_blocks)] = totals / tokens
        return found

    def routing(self, sums: Any) -> BlockRouting | None:
        """The routing of a step on the host, stacked over the blocks with experts; None if not needed."""
        return self._program.routing(sums)

    def metrics(self, losses: dict[str, Any], sums: Any, teacher: RouterSums | None = None) -> dict[str, float]:
        """The means under the names of metrics.py.

        Args:
            teacher: the routing of the teacher that ran for this step, if it has experts, `[Lm, B, ...]`.
        """
        weights = {name: float(value) for name, value in sums.weights.items()}
        found = term_metrics(self._program.terms, Means(losses, self.plan.weights, weights, tuple(self.plan.streams)))
        routing = self.routing(sums)
        if routing is None:
            return found
        of_routers = router_metrics(losses, routing.sums, self._stack.config.moe_blocks, weights, self._bias_rows())
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
        found, kinds = mean_biases(self.balance()), self._stack.config.kinds
        return np.stack(
            [
                np.asarray(found[address_prefix((group, address)) + ROUTER_BIAS][repeat])
                for block, group, repeat, address in self._stack.config.places()
                if kinds[block].moe
            ]
        )

    # What it holds.

    @property
    def trained_names(self) -> frozenset[str]:
        """Names of the parameters that a step changes, biases of routers included."""
        return self.plan.trained.union(biases(self.state.balance))

    def used_parameters(self) -> Parameters:
        """All parameters that a step computes with."""
        found = {**self._frozen, **self.state.parameters}
        return {name: value for name, value in found.items() if self._program.computes(name)}

    def parameters(self) -> dict[str, Kept]:
        """Return the student's parameters that a step changes, without the mesh's padding, on the host."""
        found: dict[str, Any] = {}
        for name, value in self.state.parameters.items():
            rows = self._rows(name)
            found[name] = kept(value) if rows is None else kept_rows(name, value, rows)
        return found | to_host(mean_biases(self.balance()))

    def balance(self) -> dict[str, BalanceState]:
        """The state of the routers' biases on the host."""
        return unpadded(to_host(self.state.balance), self._stack)

    def held(self) -> dict[str, Held]:
        """Return the parts of parameters and optimizer state that this process keeps, by item and name."""
        found: dict[str, Held] = {}
        for name, value in self.state.parameters.items():
            found[f"{PARAMETERS}/{name}"] = held(value, self._rows(name))
        for name, value in named(self.state.moments).items():
            found[f"{OPTIMIZER}/{name}"] = held(value, self._rows(name))
        return found

    def _rows(self, name: str) -> int | None:
        """Return how many entries of a stack's first axis are real rather than padding; None for anything but a
        stack.
        """
        return next(
            (rows for address, rows in self._stack.places().items() if name.startswith(address_prefix(address))), None
        )


def _block_weights(
    program: StepProgram, loss: FeatureLossConfig, spans: Sequence[Span], source: Source
) -> dict[int, float]:
    """The trained student blocks, with their weights in the feature loss.

    Raises:
        ConfigError: blocks that the student has not, or that the cache lacks; weights that do not fit.
    """
    whole = _whole_blocks(program, spans, source)
    blocks = whole if loss.blocks == "all" else list(loss.blocks)
    if beyond := sorted(set(blocks) - set(range(len(spans)))):
        raise ConfigError(
            "the student has no such blocks",
            {"loss.feature.blocks": beyond, "expected": f"0 to {len(spans) - 1}"},
            "choose others",
        )
    streams = {"slots of resid": list(source.stored("resid"))} if "resid" in program.taps else {}
    if missing := sorted(set(blocks) - set(whole)):
        raise ConfigError(
            "the cache lacks the taps with which these blocks are compared",
            {"cache": source.url, "loss.feature.blocks": missing, "found": whole, **streams},
            "choose other blocks, or add them: distillcache build --extend "
            "(online: set online.taps, which records every block)",
        )
    if not blocks:
        raise ConfigError(
            "no block of the student can be compared with the cache",
            {"cache": source.url, "the cache's blocks": list(source.blocks), **streams},
            "choose another student.layer_map, or add blocks: distillcache build --extend "
            "(online: set online.taps, which records every block)",
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


def _compared_streams(loss: StreamLossConfig, spans: Sequence[Span], source: Source) -> dict[int, int]:
    """The student blocks whose own streams are compared, with the teacher's slots.

    Raises:
        ConfigError: a slot that the teacher has not, at which no block of the student ends, or that the cache lacks.
        InputError: no stream is recorded.
    """
    stored, ends = source.stored("resid"), {span.last: at for at, span in enumerate(spans)}
    facts = {"cache": source.url, "loss.stream.slots": loss.slots}
    if loss.slots == "all":
        chosen = [slot for slot in ends if slot in stored]
    else:
        chosen = sorted({spans[-1].last if slot == "last" else slot for slot in loss.slots})
    if apart := [slot for slot in chosen if slot not in ends]:
        raise ConfigError(
            "no block of the student ends at these slots",
            {**facts, "found": apart, "expected": f"some of {list(ends)}"},
            "name slots at which one ends: slot l is the stream that leaves the teacher's block l - 1",
        )
    if missing := [slot for slot in chosen if slot not in stored]:
        raise ConfigError(
            "the cache lacks slots of the stream",
            {**facts, "missing": missing, "recorded": list(stored)},
            "name others, or add them: distillcache build --extend (online: name them in online.taps)",
        )
    if not chosen:
        raise ConfigError(
            "the cache lacks every slot at which a block of the student ends",
            {**facts, "needed": list(ends), "recorded": list(stored)},
            "choose another student.layer_map, or add slots: distillcache build --extend "
            "(online: name them in online.taps)",
        )
    return {ends[slot]: slot for slot in chosen}


def recorded_taps(source: Source) -> frozenset[str]:
    """The taps that are recorded in any segment; `resid` only where that is more than the last slot: a stream that
    enters a block."""
    taps, last = [tap for segment in source.segments() for tap in segment.plan.taps], source.plan.teacher.num_blocks
    return frozenset(tap.name for tap in taps if tap.name != "resid" or tap.slots != (last,))
