"""The training step: the interface of a mode, the state, and the jitted function, on one device or on a mesh.

A step is `(state, frozen, batch, targets) -> (state, sums)`; steps donate their input state. With a mesh axis `block`
each group of devices holds a run of every layer group's repeats (padded to equal lengths with blocks that are not
trained) and works on them alone: `shard_map` over `block` around the whole step, and no collective along it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from distillcache.models.decoder import Decoder
from distillcache.models.routing import BalanceState
from distillcache.schemas.config.train import LossConfig, OptimizerConfig, TrainSpec
from distillcache.schemas.errors import InputError
from distillcache.trainer.mesh.sharding import state_shardings
from distillcache.trainer.step.balance import Balancing, BlockRouting
from distillcache.trainer.step.optimizer import PROGRAMS, init_blocks
from distillcache.trainer.step.parameters import Parameters, PathRules, address_prefix, at_address, outer
from distillcache.trainer.step.stack import StudentStack
from distillcache.trainer.step.targets import TapReading, Targets
from distillcache.trainer.terms import Terms

OUTER = "outer"  # the optimizer's unit of what belongs to no block
SumsSpecs = Callable[[Any, Any], Any]
StepFunction = Callable[["TrainState", Parameters, Mapping[str, Any], Targets], tuple["TrainState", Any]]


class TrainState(NamedTuple):
    """The state that a step changes; as a tree of shardings, its placement.

    moments: the optimizer's state by unit: `groups/<g>/blocks/<p>/`, stacked, and `outer`.
    step: how many were done in this stage, int32 `[]`.
    balance: biases of routers that move, by unit, `[repeats, groups, E]` (balance.py).
    """

    parameters: Any
    moments: Any
    step: Any
    balance: Any


class Update(Protocol):
    """A step on one device, or on one group of them."""

    def __call__(
        self, state: TrainState, frozen: Parameters, batch: Mapping[str, Any], targets: Targets
    ) -> tuple[TrainState, Any]: ...


@dataclass(frozen=True, eq=False)
class Setting:
    """The facts from which the program of a stage is made.

    loss, optimizer, steps: of the stage, which messages call `where`. cache: its address; recorded: the taps of
    which it has anything (of `resid`: of some block); last_stream: it has the stream that leaves the last of the
    teacher's blocks; keeps_head: also the teacher's last norm and head. groups: of devices that hold different
    blocks. teacher_norm_eps: of the teacher's norms. real_vocab: see losses.without_padding.
    """

    spec: TrainSpec
    loss: LossConfig
    optimizer: OptimizerConfig
    steps: int
    where: str
    stack: StudentStack
    graph: nnx.GraphDef[Decoder]
    balancing: Balancing | None
    cache: str
    recorded: frozenset[str]
    groups: int = 1
    last_stream: bool = False
    keeps_head: bool = False
    teacher_norm_eps: float = 1e-6
    real_vocab: int | None = None

    @property
    def adapter_alpha(self) -> float | None:
        """Return the `alpha` of the student's adapters; None without any."""
        return None if self.spec.student.lora is None else self.spec.student.lora.alpha

    @property
    def balances(self) -> bool:
        """Return whether a loss of routers may count."""
        return self.balancing is not None and self.balancing.with_loss


def check_attention(setting: Setting, needed: Mapping[str, bool], instead: str) -> None:
    """Check that attention outputs are recorded if something needs them.

    Args:
        needed: by the name of each setting, whether it needs them.
        instead: the advice for a cache that has streams.

    Raises:
        InputError: they are not.
    """
    asking = [name for name, asks in needed.items() if asks]
    if not asking or "attn_out" in setting.recorded:
        return
    add = "build a cache with taps.attn_out, or add it: distillcache build --extend (online: name it in online.taps)"
    raise InputError(
        "the cache lacks this tap",
        {
            "cache": setting.cache,
            "wanted": "attn_out",
            "needed for": ", ".join(asking),
            "found": ", ".join(sorted(setting.recorded)) or "none",
        },
        f"{instead}; or {add}" if "resid" in setting.recorded else add,
    )


class StepProgram(Protocol):
    """Interface of a mode to a stage; made from a `Setting` alone, which it checks.

    blocks_apart: each block is trained on the teacher's stream, and no block's loss depends on another block.
    usual_rate: its peak learning rate where a config names none. terms: those that the mode knows, whether they count
    or not. taps: that a step reads of compared blocks, but for `mlp_out`; needs_leaving: and of `resid` also the slots
    that leave them; reads_head: it needs the teacher's last stream, norm and head. row_fields: that it reads besides
    positions and segment_ids. compares_blocks: blocks have targets of their own. compares_streams: the student's own
    stream is compared, at `loss.stream.slots`. injects_norms: the teacher's attention norms take the place of the
    student's. optimizer: of one block's parameters.
    """

    blocks_apart: ClassVar[bool]
    usual_rate: ClassVar[float]
    terms: Terms
    taps: tuple[str, ...]
    needs_leaving: bool
    reads_head: bool
    row_fields: tuple[str, ...]
    compares_blocks: bool
    compares_streams: bool
    injects_norms: bool
    optimizer: optax.GradientTransformation

    def __init__(self, setting: Setting) -> None:
        """Raises `ConfigError` if the mode does not support the setting."""

    def rules(self) -> PathRules:
        """Declare for every parameter whether a loss has a gradient for it."""
        ...

    def holds(self, name: str) -> bool:
        """Return whether a step needs this parameter, if it is not trained."""
        ...

    def computes(self, name: str) -> bool:
        """Return whether a step computes with this parameter."""
        ...

    def update(self, reading: TapReading) -> "Update":
        """The step."""
        ...

    @staticmethod
    def sums_specs(split: Any, same: Any) -> Any:
        """The sums' placement over groups of devices."""
        ...

    def means(self, sums: Any) -> dict[str, Any]:
        """The terms' means by name, `[L]` by block or a number, of a step's sums on the host; the step has tokens."""
        ...

    def routing(self, sums: Any) -> BlockRouting | None:
        """The routing of a step on the host, stacked over the blocks with experts; None if nobody asks."""
        ...


def init_state(
    stack: StudentStack,
    trained: Parameters,
    optimizer: optax.GradientTransformation,
    balance: Mapping[str, BalanceState] | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """The state before the first step of a stage; with a mesh, the parameters are on it already."""
    return TrainState(
        trained, _init_moments(stack, trained, optimizer, mesh), jnp.zeros((), jnp.int32), dict(balance or {})
    )


def _init_moments(
    stack: StudentStack, trained: Parameters, optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> dict[str, Any]:
    """The optimizer's state, with the placement of the parameters."""

    def init(parameters: Parameters) -> dict[str, Any]:
        moments = {
            address_prefix(address): init_blocks(optimizer, at_address(parameters, address))
            for address in stack.places()
        }
        if rest := outer(parameters):
            moments[OUTER] = optimizer.init(rest)
        return moments

    if mesh is None:
        return init(trained)
    _, shardings = state_shardings(mesh, trained, jax.eval_shape(init, trained))
    return jax.jit(init, out_shardings=shardings)(trained)


def jit_step(update: Update, state: TrainState, mesh: Mesh | None, sums: SumsSpecs | None = None) -> StepFunction:
    """The compiled step.

    Args:
        state: of the shapes that it will be called with.
        sums: with a mesh axis `block`, the placement of what the step returns besides the state.
    """
    if mesh is None:
        return jax.jit(update, donate_argnums=0)
    whole = on_mesh(update, mesh) if sums is None else over_blocks(update, mesh, sums)
    return jax.jit(whole, donate_argnums=0, out_shardings=(shardings_of(mesh, state), None))


def shardings_of(mesh: Mesh, state: TrainState) -> Any:
    """Return the shardings of a state."""
    parameters, moments = state_shardings(mesh, state.parameters, state.moments)
    stacked, everywhere = NamedSharding(mesh, PartitionSpec("block")), NamedSharding(mesh, PartitionSpec())
    return TrainState(parameters, moments, everywhere, jax.tree.map(lambda _: stacked, state.balance))


@lru_cache(maxsize=PROGRAMS)
def on_mesh(update: Update, mesh: Mesh) -> Update:
    """The same step with the mesh as the ambient one: experts are split by it (models/layers/experts.py)."""

    def apply(state: TrainState, frozen: Parameters, batch: Mapping[str, Any], targets: Targets) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return update(state, frozen, batch, targets)

    return apply


@lru_cache(maxsize=PROGRAMS)
def over_blocks(update: Update, mesh: Mesh, sums: SumsSpecs) -> Update:
    """The same step, each group of devices on its own blocks; taps come as `[groups, S, B, T, W]`."""

    def local(state: TrainState, frozen: Parameters, batch: Mapping[str, Any], targets: Targets) -> Any:
        own = {name: {part: x[0] for part, x in value.items()} if isinstance(value, Mapping) else value
               for name, value in batch.items()}  # fmt: skip
        return update(state, frozen, own, targets)

    def apply(state: TrainState, frozen: Parameters, batch: Mapping[str, Any], targets: Targets) -> Any:
        split, same = PartitionSpec("block"), PartitionSpec()
        states = TrainState(split, split, same, split)
        rows = {name: split if isinstance(value, Mapping) else same for name, value in batch.items()}
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(states, split, rows, split),
            out_specs=(states, sums(split, same)),
            axis_names={"block"},
            check_vma=False,  # nothing is exchanged, so there is nothing whose sameness could be checked
        )(state, frozen, batch, targets)

    return apply


def padded(tree: Any, stack: StudentStack, groups: int) -> Any:
    """`tree` of stacked leaves, keyed by names that begin with an address's prefix, with repeats padded to a multiple
    of `groups`: the last block again, which is never trained there.
    """
    return _by_address(tree, stack, lambda leaf, repeats: _filled(leaf, -(-repeats // groups) * groups))


def unpadded(tree: Any, stack: StudentStack) -> Any:
    """The reverse."""
    return _by_address(tree, stack, lambda leaf, repeats: leaf[:repeats])


def _filled(leaf: Array, repeats: int) -> Array:
    missing = repeats - leaf.shape[0]
    return jnp.concatenate([leaf, *[leaf[-1:]] * missing]) if missing else leaf


def _by_address(tree: Any, stack: StudentStack, change: Callable[[Array, int], Array]) -> Any:
    sizes = {address_prefix(address): repeats for address, repeats in stack.places().items()}

    def one(name: str, value: Any) -> Any:
        repeats = next((size for prefix, size in sizes.items() if name.startswith(prefix)), None)
        return value if repeats is None else jax.tree.map(lambda leaf: change(leaf, repeats), value)

    return {name: one(name, value) for name, value in tree.items()}
