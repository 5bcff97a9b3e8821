"""Settings of a training: the student, the losses, the optimizer, the mesh, and the run itself.

A *weight* is a number, or a ramp from one number to another over the stage's steps.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from distillcache.schemas.base import Config, Positive
from distillcache.schemas.config.feed import FeedConfig
from distillcache.schemas.config.storage import StorageConfig
from distillcache.schemas.config.student import Blocks
from distillcache.schemas.config.student import StudentConfig as StudentConfig
from distillcache.schemas.config.student import SurgeryOp as SurgeryOp
from distillcache.schemas.config.teacher import OnlineConfig, TeacherMeshConfig


class Ramp(Config):
    """A weight that changes with the step, from `start` at the first step of a stage to `end` at its last."""

    start: float = Field(ge=0, description="at the first step")
    end: float = Field(ge=0, description="at the last step")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="linear", description="the way between; constant: start throughout"
    )


class ShareRamp(Ramp):
    start: float = Field(ge=0, le=1, description="at the first step")
    end: float = Field(ge=0, le=1, description="at the last step")


Weight = Annotated[float, Field(ge=0)] | Ramp
Share = Annotated[float, Field(ge=0, le=1)] | ShareRamp


class FeatureLossConfig(Config):
    weight: Weight = Field(default=1.0, description="beta, the weight of the whole term")
    relative_l2: float = Field(
        default=1.0, ge=0, description="share of ||s - t||^2 / ||t||^2"
    )  # scale-free, and it sees the norm, which cosine does not
    cosine: float = Field(default=0.0, ge=0, description="share of 1 - cos(s, t)")
    l2: float = Field(default=0.0, ge=0, description="share of mean (s - t)^2, as MaxText computes it")
    blocks: Blocks = Field(default="all", description="the student's blocks that count")
    block_weights: list[float] | None = Field(
        default=None, description="one for every block that counts, in their order; default: 1 each"
    )


class MlpLossConfig(Config):
    weight: Weight = Field(default=0.0, description="gamma, the weight of the whole term")
    relative_l2: float = Field(default=1.0, ge=0, description="share of ||s - t||^2 / ||t||^2")
    cosine: float = Field(default=0.0, ge=0, description="share of 1 - cos(s, t)")
    l2: float = Field(default=0.0, ge=0, description="share of mean (s - t)^2")


class LoadBalanceConfig(Config):
    weight: Weight = Field(
        default=0.0,
        description="lambda; for students with routers; also as MaxText's load_balance_loss_weight",
    )
    scope: Literal["layer", "model", "sequence", "global_batch"] = Field(
        default="layer",
        description="over which the load is balanced: each block, all blocks together (feature mode), each row, or "
        "each block, its load counted over the step's micro-batches so far",
    )  # one block's imbalance cannot hide another's, as it can with model


class LossConfig(Config):
    """The sum of all terms:

    token_weight (alpha tau^2 KL + (1 - alpha) CE) + beta feature + gamma mlp + lambda load_balance + zeta router_z.
    """

    token_weight: Weight = Field(
        default=1.0, description="feature mode: of KL and CE together; 0: features alone, logits are not computed"
    )  # as MaxText sums them
    alpha: Share = Field(default=0.0, description="share of the KL, 0 to 1; the rest is CE's; feature mode")
    tau: Weight = Field(default=1.0, description="temperature of the KL")
    rest_bucket: bool = Field(
        default=False, description="KL: what lies outside the teacher's top k counts as one more class"
    )  # as MaxText and most others compute it: over the top k alone
    feature: FeatureLossConfig = Field(
        default=FeatureLossConfig(), description="attention output against the teacher's"
    )
    mlp: MlpLossConfig = Field(default=MlpLossConfig(), description="MLP output against the teacher's, blockwise mode")
    load_balance: LoadBalanceConfig = Field(
        default=LoadBalanceConfig(), description="loss that keeps experts evenly loaded"
    )
    router_z: Weight = Field(
        default=0.0, description="zeta, the weight of the router z-loss; for students with routers"
    )


class OptimizerConfig(Config):
    """AdamW with linear warm-up and cosine decay; state is per block, and in blockwise mode clipping as well."""

    learning_rate: float = Field(default=1e-3, gt=0, description="at its highest, after the warm-up")
    warmup_steps: int = Field(default=10, ge=0, description="steps of linear warm-up")  # Adam's moments need a few
    final_fraction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="of learning_rate, at the last step of a stage: it falls along half a cosine",
    )
    b1: float = Field(default=0.9, ge=0, lt=1, description="Adam's first decay")
    b2: float = Field(default=0.95, ge=0, lt=1, description="Adam's second decay")  # short runs: a shorter memory
    eps: float = Field(default=1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(
        default=0.0, ge=0, description="AdamW's decoupled weight decay"
    )  # students start near the answer
    clip_norm: float | None = Field(
        default=1.0, gt=0, description="clip each block's gradient (feature mode: the whole) to this norm; null: never"
    )  # one bad block must not slow the others
    inside_scan: bool = Field(
        default=True, description="blockwise mode: update a block as soon as its gradient is known"
    )  # the gradients of one block only are alive; the same numbers to rounding


class MeshConfig(TeacherMeshConfig):
    """Number of devices along each axis; their product is the number of devices used."""

    block: Positive = Field(default=1, description="groups of devices that hold different blocks, blockwise mode")


class StageConfig(Config):
    """One part of a run. What is not stated is as the run states it."""

    mode: Literal["blockwise", "feature"] = Field(description="as the run's")
    steps: Positive = Field(description="optimizer steps of this stage")
    loss: LossConfig | None = Field(default=None, description="as the run's")
    optimizer: OptimizerConfig | None = Field(default=None, description="as the run's")
    train_only: list[str] | None = Field(default=None, description="as the run's")


class TrainSpec(Config):
    """Settings that a training's numbers depend on. A run that goes on must have the same ones."""

    source: Literal["cache", "online"] = Field(
        default="cache", description="cache: its recorded taps; online: its rows, through the teacher in every step"
    )  # online is for comparison: it costs the teacher's memory and time
    online: OnlineConfig = Field(default=OnlineConfig(), description="source online: which teacher, on which rows")
    student: StudentConfig = Field(default=StudentConfig(), description="what is trained")
    mode: Literal["blockwise", "feature"] = Field(
        default="blockwise",
        description="blockwise: every block gets the teacher's stream; feature: the student runs as a whole; also as "
        "MaxText's blockwise_distill, true or false",
    )
    inject: Literal["resid", "attn_in"] = Field(
        default="resid",
        description="what a block is given in blockwise mode: the teacher's stream, or its normed attention input",
    )  # so the student's own norm is trained too
    mlp_input: Literal["teacher", "student"] = Field(
        default="teacher", description="the MLP's input: the teacher's stream, or the student's attention output on it"
    )  # then attention and MLP do not depend on each other
    loss: LossConfig = Field(default=LossConfig(), description="what is compared, with which weight")
    train_only: list[str] | None = Field(
        default=None,
        description="parameters that are trained, by parts of their paths: [attention], [mlp/down]; default: all that "
        "a loss reaches",
    )
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="AdamW")
    stages: list[StageConfig] | None = Field(
        default=None, description="parts of the run, one after the other; default: one, as the run states it"
    )
    moe_balance_type: Literal["gshard", "noaux_tc"] | None = Field(
        default=None,
        description="how experts are kept evenly loaded: gshard: by loss.load_balance; noaux_tc: by biases that move "
        "with the load, without a loss; default: loss.load_balance if it has a weight, biases stay as they are",
    )
    moe_update_rule: Literal["ema", "sign"] = Field(
        default="ema", description="noaux_tc: biases follow the smoothed load, or the sign of the step's (DeepSeek-V3)"
    )
    moe_update_rate: float = Field(default=0.01, gt=0, description="noaux_tc: how fast biases move")
    moe_update_momentum: float = Field(default=0.9, ge=0, lt=1, description="noaux_tc: of the smoothed load")
    moe_bias_cap: float | None = Field(
        default=2.0, description="noaux_tc: the largest magnitude of a bias; null or at most 0: none"
    )
    moe_afb_warmup_steps: int = Field(default=0, ge=0, description="noaux_tc: steps of a stage before biases move")
    moe_bias_sync_group: Literal["world", "ep"] = Field(
        default="world", description="noaux_tc: one bias for all devices, or one for each expert-parallel group"
    )
    expert_parallel_size: Positive = Field(
        default=1, description="devices in an expert-parallel group; divides mesh.data * mesh.fsdp * mesh.expert"
    )  # these eight under Axolotl's names, with its defaults
    steps: Positive = Field(default=1000, description="optimizer steps")
    batch_rows: Positive = Field(default=8, description="rows in the global batch")
    micro_batches: Positive = Field(
        default=1,
        description="parts that a batch is computed in, one after the other; loads are balanced within each, unless "
        "loss.load_balance.scope says otherwise",
    )  # for memory; all but load_balance has the whole batch's gradient
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the student's forward and backward; parameters stay float32"
    )  # CPUs have no fast bfloat16
    attention: Literal["auto", "xla", "splash", "cudnn"] = Field(
        default="auto",
        description="the student's attention kernel: splash on TPUs, cudnn on GPUs in 16 bits, xla anywhere; auto: the "
        "first that can be used",
    )  # without scores in memory, where there is a kernel for it
    remat: Literal["none", "block", "dots"] = Field(
        default="block",
        description="feature mode, what the backward pass computes again: nothing, whole blocks, or all but products",
    )  # the least memory
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the shuffle and of projectors")


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
        default=2, description="how many of the newest stay; so does the best"
    )  # one may be half-written
    eval_every: int = Field(
        default=0, ge=0, description="steps between evaluations on held-out rows; 0: at the end of a stage only"
    )  # an evaluation costs as much as many steps
    eval_batch_rows: Positive = Field(default=8, description="rows in one evaluation batch")
    log_every: Positive = Field(default=1, description="steps between lines of metrics")
    eval_teacher: bool = Field(
        default=True, description="measure the teacher's own perplexity on the held-out rows, once, before step 1"
    )  # costs loading it and one evaluation; the student's perplexity is judged by it
    prefetch_batches: Positive = Field(
        default=2, description="batches read ahead of use"
    )  # one being moved to the device, one being read
    partial: bool = Field(
        default=False, description="train on the committed shards of a cache that is still being built"
    )  # a run that goes on needs the same rows again, and a cache that grows has others
    profile: str | None = Field(
        default=None, pattern=r"^steps=\d+:\d+$", description="steps=10:13: write a trace of these steps to the run"
    )
    mesh: MeshConfig = Field(default=MeshConfig(), description="devices, by axis")
    feed: FeedConfig = Field(default=FeedConfig(), description="how the cache is read")
    storage: StorageConfig = Field(default=StorageConfig(), description="object-store client settings")
    coordinator: str | None = Field(
        default=None,
        description="HOST:PORT of process 0, where a run has several; default: as Cloud TPU, GKE, Slurm or Open MPI "
        "say; none: alone, whatever they say",
    )
    num_processes: Positive | None = Field(default=None, description="processes of the run; default: likewise")
    process_id: int | None = Field(default=None, ge=0, description="this process's number, from 0; default: likewise")
    timeout_s: Positive = Field(
        default=60, description="heartbeat timeout; the run aborts when a process is silent for longer"
    )  # longer than the pauses of a busy host, shorter than anybody waits


class TrainConfig(TrainOptions, TrainSpec, TrainPaths):
    """A cache in, a trained student out."""

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
        "eval_every",
        "checkpoint_every",
        "compute_dtype",
        "mesh",
        "seed",
    )

    @model_validator(mode="after")
    def _has_rows(self) -> Self:
        if not (self.cache or (self.source == "online" and self.online.rows)):
            raise ValueError("give cache; with source: online, online.rows will do")
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
