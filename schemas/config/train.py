"""Settings of a training: the student, the losses, the optimizer, the mesh, and the run itself.

A *weight* is a number, or a ramp from one number to another over the stage's steps.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from distillcache.schemas.base import (
    GREATEST,
    Amount,
    BatchRows,
    Config,
    Decay,
    Fraction,
    Index,
    Natural,
    Positive,
    Rate,
    Signed,
    WholeSeconds,
)
from distillcache.schemas.config.feed import FeedConfig
from distillcache.schemas.config.storage import StorageConfig
from distillcache.schemas.config.student import Blocks
from distillcache.schemas.config.student import StudentConfig as StudentConfig
from distillcache.schemas.config.student import SurgeryOp as SurgeryOp
from distillcache.schemas.config.teacher import OnlineConfig, TeacherMeshConfig


class Ramp(Config):
    """A weight that changes with the step, from `start` at the first step of a stage to `end` at its last."""

    start: Amount = Field(description="value at the first step")
    end: Amount = Field(description="value at the last step")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="linear", description="shape between the two; constant: start throughout"
    )


class ShareRamp(Ramp):
    start: Fraction = Field(description="value at the first step")
    end: Fraction = Field(description="value at the last step")


Weight = Amount | Ramp
Share = Fraction | ShareRamp


def may_count(weight: Weight) -> bool:
    """Return whether a weight is ever above zero."""
    return weight.start > 0 or weight.end > 0 if isinstance(weight, Ramp) else weight > 0


class DistanceLossConfig(Config):
    weight: Weight = Field(default=0.0, description="weight of the loss")
    relative_l2: Amount = Field(
        default=1.0, description="weight of ||s - t||^2 / ||t||^2"
    )  # scale-free, and it sees the norm, which cosine does not
    cosine: Amount = Field(default=0.0, description="weight of 1 - cos(s, t)")
    l2: Amount = Field(default=0.0, description="weight of mean (s - t)^2")


class FeatureLossConfig(DistanceLossConfig):
    weight: Weight = Field(default=1.0, description="beta: weight of the loss of attention outputs")
    l2: Amount = Field(default=0.0, description="weight of mean (s - t)^2, as MaxText computes it")
    blocks: Blocks = Field(default="all", description="the student's blocks that this loss compares")
    block_weights: list[Amount] | None = Field(
        default=None, description="one weight for each of these blocks, in order; default: 1 each"
    )

    @model_validator(mode="after")
    def _counts_a_block(self) -> Self:
        if self.blocks == []:
            raise ValueError("loss.feature.blocks is empty: name a block or more, or all; weight: 0 turns the term off")
        weights = self.block_weights
        if weights is not None and not any(weights):
            raise ValueError(f"loss.feature.block_weights {weights} weighs no block: weight: 0 turns the term off")
        return self


class MlpLossConfig(DistanceLossConfig):
    weight: Weight = Field(default=0.0, description="gamma: weight of the loss of MLP outputs")


class BlockLossConfig(DistanceLossConfig):
    weight: Weight = Field(
        default=0.0, description="delta: weight of the loss of the stream that leaves each block (blockwise mode)"
    )


class StreamLossConfig(DistanceLossConfig):
    weight: Weight = Field(
        default=0.0, description="epsilon: weight of the loss of the student's own stream (feature mode)"
    )
    slots: list[Index | Literal["last"]] | Literal["all"] = Field(
        default="all",
        description="the teacher's slots to compare with: l is the stream that leaves its block l - 1, last the one "
        "that leaves its last block; all: every one at which a block of the student ends and that is recorded",
    )


class KlConfig(Config):
    targets: Literal["auto", "head", "topk"] = Field(
        default="auto",
        description="the teacher's distribution: head: over the whole vocabulary, from resid's last slot, final "
        "norm and head; topk: over its recorded top k; auto: head if the cache keeps it, else topk if recorded, "
        "else head",
    )  # exact wherever it costs nothing that was not recorded for it
    direction: Literal["forward", "reverse", "jsd", "skew"] = Field(
        default="forward",
        description="forward: KL(teacher, student); reverse: KL(student, teacher); skew: KL(teacher, their "
        "mixture); jsd: KL of both to their mixture",
    )  # Hinton's; the others do not ask a small student to cover all that the teacher says
    share: Decay | None = Field(
        default=None,
        description="jsd and skew: the teacher's share of the mixture; default: 0.5 for jsd, 0.1 for skew",
    )  # Agarwal et al. 2306.13649 and Ko et al. 2402.03898 use these


class LoadBalanceConfig(Config):
    weight: Weight = Field(
        default=0.0,
        description="lambda: weight of this loss; for students with routers; MaxText's load_balance_loss_weight is "
        "accepted too",
    )
    scope: Literal["layer", "model", "sequence", "global_batch"] = Field(
        default="layer",
        description=(
            "the tokens over which the load is balanced: each block, all blocks together (feature mode), each"
            " row, or each block with its load counted over the step's micro-batches so far"
        ),
    )  # one block's imbalance cannot hide another's, as it can with model


class LossConfig(Config):
    """The sum of all terms:

    token_weight (alpha tau^2 KL + (1 - alpha) CE) + beta feature + gamma mlp + delta block + epsilon stream
    + lambda load_balance + zeta router_z.
    """

    token_weight: Weight = Field(
        default=1.0,
        description=("feature mode: weight of KL and CE together; 0: only features, logits are not computed"),
    )  # as MaxText sums them
    alpha: Share = Field(
        default=0.0, description=("feature mode: share of the KL, 0 to 1; the rest is the share of CE")
    )
    tau: Weight = Field(default=1.0, description="temperature of the KL")
    kl: KlConfig = Field(
        default=KlConfig(),
        exclude_if=lambda value: value == KlConfig(),  # so that runs of before there was any resume
        description="target and direction of the KL",
    )
    rest_bucket: bool = Field(
        default=False, description="KL over the top k: everything outside it counts as one more class"
    )  # as MaxText and most others compute it: over the top k alone
    feature: FeatureLossConfig = Field(
        default=FeatureLossConfig(), description="compares attention outputs with the teacher's"
    )
    mlp: MlpLossConfig = Field(
        default=MlpLossConfig(), description=("blockwise mode: compares MLP outputs with the teacher's")
    )
    block: BlockLossConfig = Field(
        default=BlockLossConfig(),
        exclude_if=lambda value: value == BlockLossConfig(),  # so that runs from before it resume
        description="blockwise mode: compares the stream that leaves each block with the teacher's",
    )
    stream: StreamLossConfig = Field(
        default=StreamLossConfig(),
        exclude_if=lambda value: value == StreamLossConfig(),
        description="feature mode: compares the student's own stream with the teacher's",
    )
    load_balance: LoadBalanceConfig = Field(
        default=LoadBalanceConfig(), description="auxiliary loss that balances the load of experts"
    )
    router_z: Weight = Field(default=0.0, description="zeta: weight of the router z-loss; for students with routers")


class OptimizerConfig(Config):
    """AdamW with linear warm-up and cosine decay; state is per block, and in blockwise mode clipping as well."""

    learning_rate: Rate | None = Field(
        default=None,
        description="peak learning rate, after the warm-up; default: 3e-3 in blockwise mode, 3e-4 in feature mode",
    )  # what measured best on a teacher of width 576 (docs/recipes.md): step/*_program.py
    warmup_steps: Natural = Field(default=10, description="steps of linear warm-up")  # Adam's moments need a few
    final_fraction: Fraction = Field(
        default=0.0,
        description="learning rate at the last step of a stage, as a fraction of the peak (cosine decay)",
    )
    b1: Decay = Field(default=0.9, description="Adam's first decay")
    b2: Decay = Field(default=0.95, description="Adam's second decay")  # short runs: a shorter memory
    eps: float = Field(default=1e-8, ge=1e-30, le=GREATEST, description="Adam's epsilon")
    weight_decay: Amount = Field(
        default=0.0, description="AdamW's decoupled weight decay"
    )  # students start near the answer
    clip_norm: Rate | None = Field(
        default=1.0,
        description=("clip each block's gradient (feature mode: the whole gradient) to this norm; null: never"),
    )  # one bad block must not slow the others
    inside_scan: bool = Field(
        default=True,
        description=("blockwise mode: update each block inside the scan, as soon as its gradient is known"),
    )  # the gradients of one block only are alive; the same numbers to rounding


class MeshConfig(TeacherMeshConfig):
    """Number of devices along each axis; their product is the number of devices used."""

    block: Positive = Field(default=1, description="blockwise mode: groups of devices that hold different blocks")


class StageConfig(Config):
    """One stage of a run. Unset fields are the run's."""

    mode: Literal["blockwise", "feature"] = Field(description="default: the run's")
    steps: Positive = Field(description="optimizer steps of this stage")
    loss: LossConfig | None = Field(default=None, description="default: the run's")
    optimizer: OptimizerConfig | None = Field(default=None, description="default: the run's")
    train_only: list[str] | None = Field(default=None, description="default: the run's")


class TrainSpec(Config):
    """Settings that a training's numbers depend on. A resumed run must have the same ones."""

    source: Literal["cache", "online"] = Field(
        default="cache",
        description="where targets come from: the taps of the cache, or (online) the teacher, which then runs on "
        "the rows in every step",
    )  # online is for comparison: it costs the teacher's memory and time
    online: OnlineConfig = Field(default=OnlineConfig(), description="with source online: the teacher and its rows")
    student: StudentConfig = Field(default=StudentConfig(), description="the student")
    mode: Literal["blockwise", "feature"] = Field(
        default="blockwise",
        description=(
            "blockwise: every block receives the teacher's stream; feature: the student runs as a whole; "
            "MaxText's blockwise_distill (true or false) is accepted too"
        ),
    )
    inject: Literal["resid", "attn_in"] = Field(
        default="resid",
        description="a block's input in blockwise mode: the teacher's stream, or its normed attention input",
    )  # so the student's own norm is trained too
    mlp_input: Literal["teacher", "student"] = Field(
        default="teacher",
        description=(
            "the MLP's input: the teacher's stream, or that stream with the student's attention output; with "
            "loss.block the default is student"
        ),
    )  # then attention and MLP do not depend on each other
    loss: LossConfig = Field(default=LossConfig(), description="the losses and their weights")
    train_only: list[str] | None = Field(
        default=None,
        description=(
            "patterns for the paths of trained parameters: [attention], [mlp/down]; default: all that a loss reaches"
        ),
    )
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="settings of AdamW")
    stages: list[StageConfig] | None = Field(
        default=None,
        description=("stages of the run, one after the other; default: one stage with the settings of the run"),
    )
    moe_balance_type: Literal["gshard", "noaux_tc"] | None = Field(
        default=None,
        description=(
            "how experts are balanced: by loss.load_balance (gshard), or without a loss by biases that follow the "
            "load (noaux_tc); default: loss.load_balance if it has a weight, with fixed biases"
        ),
    )
    moe_update_rule: Literal["ema", "sign"] = Field(
        default="ema", description="noaux_tc: biases follow the smoothed load, or the sign of the step's (DeepSeek-V3)"
    )
    moe_update_rate: Rate = Field(default=0.01, description="noaux_tc: update rate of the biases")
    moe_update_momentum: Decay = Field(default=0.9, description=("noaux_tc: momentum of the smoothed load"))
    moe_bias_cap: Signed | None = Field(
        default=2.0, description="noaux_tc: the largest magnitude of a bias; null or at most 0: none"
    )
    moe_afb_warmup_steps: Natural = Field(default=0, description="noaux_tc: steps of a stage before biases move")
    moe_bias_sync_group: Literal["world", "ep"] = Field(
        default="world", description="noaux_tc: one bias for all devices, or one for each expert-parallel group"
    )
    expert_parallel_size: Positive = Field(
        default=1, description="devices in an expert-parallel group; divides mesh.data * mesh.fsdp * mesh.expert"
    )  # these eight under Axolotl's names, with its defaults
    steps: Positive = Field(default=1000, description="optimizer steps")
    batch_rows: BatchRows = Field(default=8, description="rows in the global batch")
    micro_batches: Positive = Field(
        default=1,
        description=(
            "sequential micro-batches of a batch; loads are balanced within each, unless "
            "loss.load_balance.scope says otherwise"
        ),
    )  # for memory; all but load_balance has the whole batch's gradient
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype of the student's forward and backward pass; parameters stay float32"
    )  # CPUs have no fast bfloat16
    attention: Literal["auto", "xla", "splash", "cudnn"] = Field(
        default="auto",
        description=(
            "the student's attention kernel: splash on TPUs, cudnn on GPUs in 16 bits, xla anywhere; auto: "
            "the first that is supported"
        ),
    )  # without scores in memory, where there is a kernel for it
    remat: Literal["none", "block", "dots"] = Field(
        default="block",
        description=(
            "feature mode: what the backward pass recomputes: nothing, whole blocks, or everything but matrix products"
        ),
    )  # the least memory
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the shuffle, of projectors and of adapters")

    @model_validator(mode="after")
    def _give_the_mlp_the_students_attention(self) -> Self:
        """A whole block's MLP reads what its own attention added: where `loss.block` counts, that is the default."""
        stages = [(stage.mode, stage.loss or self.loss) for stage in self.stages or []] or [(self.mode, self.loss)]
        compares_block = any(mode == "blockwise" and may_count(loss.block.weight) for mode, loss in stages)
        if compares_block and "mlp_input" not in self.model_fields_set:
            object.__setattr__(self, "mlp_input", "student")  # the model is frozen for everybody else
            self.model_fields_set.add("mlp_input")
        return self


class TrainPaths(Config):
    """Paths that a training reads and writes."""

    run: str = Field(description="folder of the run: checkpoints, metrics, the student")
    cache: str = Field(default="", description="the cache to train from")


class TrainOptions(Config):
    """Settings of how a training runs, keeps and reports. A run may go on with others."""

    checkpoint_every: Positive = Field(
        default=100, description="steps between checkpoints"
    )  # minutes of work at most are lost
    keep_checkpoints: Positive = Field(
        default=2, description="number of newest checkpoints to keep, besides the best"
    )  # one may be half-written
    eval_every: Natural | None = Field(
        default=None,
        description="steps between evaluations on held-out rows; 0: only at the end of a stage; default: a tenth of "
        "the run's steps, at least 10",
    )  # a curve of ten points and a best checkpoint; an evaluation costs as much as many steps
    eval_batch_rows: BatchRows = Field(default=8, description="rows in one evaluation batch")
    log_every: Positive = Field(default=1, description="steps between lines of metrics")
    eval_teacher: bool = Field(
        default=True, description="measure the teacher's own perplexity on the held-out rows, once, before step 1"
    )  # costs loading it and one evaluation; the student's perplexity is judged by it
    prefetch_batches: Annotated[int, Field(gt=0, le=1024)] = Field(
        default=2, description="batches to prefetch"
    )  # one being moved to the device, one being read
    partial: bool = Field(
        default=False, description="train on the committed shards of a cache that is still being built"
    )  # a resumed run needs the same rows again, and a cache that grows has others
    profile: str | None = Field(
        default=None,
        pattern=r"^steps=\d+:\d+$",
        description="steps=10:13: write a profiler trace of these steps to the run",
    )
    mesh: MeshConfig = Field(default=MeshConfig(), description="devices, by axis")
    feed: FeedConfig = Field(default=FeedConfig(), description="how the cache is read")
    storage: StorageConfig = Field(default=StorageConfig(), description="object-store client settings")
    coordinator: str | None = Field(
        default=None,
        description=(
            "HOST:PORT of process 0, if the run has several processes; default: as set by Cloud TPU, GKE, Slurm or "
            "Open MPI; none: a single process, even if they set one"
        ),
    )
    num_processes: Positive | None = Field(
        default=None, description=("processes of the run; default: from the cluster")
    )
    process_id: Natural | None = Field(
        default=None, description=("this process's number, from 0; default: from the cluster")
    )
    timeout_s: WholeSeconds = Field(
        default=60, description="heartbeat timeout; the run aborts when a process is silent for longer"
    )  # longer than the pauses of a busy host, shorter than anybody waits


class TrainConfig(TrainOptions, TrainSpec, TrainPaths):
    """Train a student from a cache."""

    other_names: ClassVar = {"blockwise_distill": bool, "load_balance_loss_weight": Weight}  # MaxText's
    usual: ClassVar = (
        "run",
        "cache",
        "student.init",
        "student.surgery",
        "mode",
        "steps",
        "batch_rows",
        "micro_batches",
        "optimizer.learning_rate",
        "optimizer.warmup_steps",
        "optimizer.final_fraction",
        "loss.alpha",
        "loss.feature.weight",
        "loss.mlp.weight",
        "loss.block.weight",
        "eval_every",
        "checkpoint_every",
        "compute_dtype",
        "mesh",
        "seed",
    )

    @model_validator(mode="after")
    def _has_rows(self) -> Self:
        if not (self.cache or (self.source == "online" and self.online.rows)):
            raise ValueError("set cache; with source: online, online.rows is enough")
        return self

    @model_validator(mode="before")
    @classmethod
    def _understand_maxtext(cls, values: Any) -> Any:
        """MaxText's keys mean fields of ours; its `blockwise_distill: false` is what `mode: feature` is here."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if "blockwise_distill" in values:
            given = values.pop("blockwise_distill")
            if not isinstance(given, bool):
                raise ValueError(f"blockwise_distill is true or false, not {given!r}")
            values = _stated(values, ["mode"], "blockwise" if given else "feature", f"blockwise_distill: {given}")
        if "load_balance_loss_weight" in values:
            given = values.pop("load_balance_loss_weight")
            name = f"load_balance_loss_weight: {given}"
            values = _stated(values, ["loss", "load_balance", "weight"], given, name)
        return values


def _stated(values: dict[str, Any], keys: Sequence[str], value: Any, said: str, path: str = "") -> dict[str, Any]:
    """`values` with this value at the end of these keys, as `said`; another value that is there already is an error."""
    path, inner = f"{path}.{keys[0]}".lstrip("."), values.get(keys[0])
    if len(keys) > 1:
        if not isinstance(inner, dict | None):
            raise ValueError(f"{said} goes into {path}, which is not a mapping")
        return {**values, keys[0]: _stated(inner or {}, keys[1:], value, said, path)}
    if keys[0] in values and inner != value:
        raise ValueError(f"{said} and {path}: {inner} do not agree")
    return {**values, keys[0]: value}
