"""What a user can set: one frozen model for each stage. YAML files and `--dotted.flags` both end here.

The description of each field is its help text (`distillcache build --help`); its default's reason is beside it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]


class Config(BaseModel):
    """Frozen and closed: a key that we do not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Config):
    path: str | list[str] = Field(
        description=".txt and .jsonl files (each also .gz), directories and globs of them; or prepared rows "
        "(a folder with rows.json)"
    )
    text_field: str = Field(
        default="text", description="the field of a .jsonl line that holds the text"
    )  # the usual name
    tokenizer: str | None = Field(
        default=None,
        description="a tokenizer.json, an HF directory or a .gguf; default: the teacher's own (prepare needs one)",
    )
    eos_token: str | None = Field(
        default=None, description="ends every document; default: what the tokenizer's own files name"
    )
    row_tokens: Positive = Field(default=1024, description="T, tokens in a row")  # long enough for real context
    eval_rows: int = Field(
        default=64, ge=0, description="rows held out for evaluation, drawn from the whole corpus"
    )  # 64 x 1024 tokens: perplexity to about 1%
    max_rows: Positive | None = Field(default=None, description="stop after so many rows; default: the whole text")
    eval_seed: int = Field(default=0, ge=0, description="which rows are drawn for evaluation")


class PrepareConfig(Config):
    """Text in, packed rows out."""

    out: str = Field(description="folder for the rows: <out>/rows/ and <out>/rows.json")
    data: DataConfig


class TeacherConfig(Config):
    path: str = Field(description="an HF directory (config.json, safetensors) or a .gguf file")


class TapConfig(Config):
    codec: Literal["bf16", "f32", "fp8", "int8", "int4"] = Field(
        default="bf16", description="how the numbers are stored"
    )  # lossless for the usual bf16 teacher
    group: int | None = Field(
        default=None, ge=0, description="numbers that share a scale, int8 and int4; 0: the whole token; default: 32"
    )  # measured: finer groups gain more than their scales cost
    rotate: bool = Field(
        default=True, description="int8 and int4: spread outliers by a random rotation first"
    )  # measured: an outlier would take the scale of its whole group
    delta: bool = Field(
        default=False, description="resid in int8 or int4: code the difference from block to block"
    )  # six times closer, but one block is read with up to keyframe_every - 1 others
    keyframe_every: int = Field(
        default=8, ge=0, description="with delta: slots from one that needs no other to the next; 0: none"
    )  # adds 7% of bf16's size; half a dozen reads at most for one block


class TapsConfig(Config):
    attn_out: TapConfig | None = Field(
        default=TapConfig(), description="what the attention sublayer adds to the stream; null: not recorded"
    )  # the target of the feature loss
    resid: TapConfig | None = Field(
        default=TapConfig(), description="the stream entering each block, and leaving the last; null: not recorded"
    )  # the input of a block in blockwise mode
    mlp_out: TapConfig | None = Field(
        default=None, description="what the MLP sublayer adds to the stream"
    )  # off: it follows from resid and attn_out


class BuildConfig(Config):
    """A teacher and text in, a cache out."""

    cache: str = Field(description="where the cache goes: a folder, gs://bucket/prefix or s3://bucket/prefix")
    teacher: TeacherConfig
    data: DataConfig
    taps: TapsConfig = Field(default=TapsConfig(), description="what is recorded in every block")
    blocks: Literal["all"] | list[int] = Field(default="all", description="the blocks to record, as a list, or all")
    batch_rows: Positive = Field(
        default=16, description="rows in one call of the teacher"
    )  # a few thousand tokens a call
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="what the teacher computes in; default: its checkpoint's own"
    )
    object_mib: Positive = Field(
        default=256, description="target size of a stored object"
    )  # few requests, far below the 5 GB limit of a single PUT
    shard_mib: Positive = Field(
        default=1024, description="target size of a shard, the unit of commit"
    )  # a shard must fit in memory, and a crash loses one at most
    shard_rows: Positive | None = Field(default=None, description="rows in a shard; default: from shard_mib")
    max_in_flight_mib: Positive = Field(
        default=2048, description="bytes recorded and not yet stored, at most"
    )  # one shard being filled, one being written
    claim_expiry_s: float = Field(
        default=60.0, gt=0, description="a claim without a heartbeat for so long is taken over"
    )  # four missed heartbeats
    process_id: int = Field(default=0, ge=0, description="this process's number, where several build one cache")
    num_processes: Positive = Field(default=1, description="how many processes build this cache")
    accept_platform: bool = Field(
        default=False, description="go on although the platform or library versions differ from the plan's"
    )  # other versions may give other bits
    extend: bool = Field(
        default=False, description="add what is asked for to a finished cache: more rows, another tap, other blocks"
    )  # otherwise another config in the same place is a mistake
    repair: bool = Field(
        default=False, description="check what is there, and compute again exactly what is damaged"
    )  # reading everything back takes long


KeptTap = TapConfig | Literal["keep"] | None


class CopyTapsConfig(Config):
    """Of each tap: `keep` (as it is stored), null (left out), or the codec of the copy."""

    attn_out: KeptTap = Field(default="keep", description="what the attention sublayer adds to the stream")
    resid: KeptTap = Field(default="keep", description="the stream entering each block, and leaving the last")
    mlp_out: KeptTap = Field(default="keep", description="what the MLP sublayer adds to the stream")


class CopyConfig(Config):
    """A cache in, a cache of one segment out: in other codecs, of some rows, blocks or taps, or in another place."""

    src: str = Field(description="the finished cache to copy")
    dst: str = Field(description="where the copy goes: a folder, gs://bucket/prefix or s3://bucket/prefix")
    taps: CopyTapsConfig = Field(default=CopyTapsConfig(), description="keep, null or a codec, for every tap")
    blocks: Literal["all"] | list[int] = Field(default="all", description="the blocks to copy, as a list, or all")
    rows: str = Field(
        default="all", pattern=r"^(all|train|eval|\d+:\d+)$", description="all, train, eval, or START:STOP"
    )
    batch_rows: Positive | None = Field(
        default=None, description="rows decoded at a time; default: as the cache was built"
    )
    object_mib: Positive = Field(default=256, description="target size of a stored object")  # as in a build
    shard_mib: Positive = Field(default=1024, description="target size of a shard, the unit of commit")  # likewise
    shard_rows: Positive | None = Field(default=None, description="rows in a shard; default: from shard_mib")
    max_in_flight_mib: Positive = Field(
        default=2048, description="bytes read and not yet stored, at most"
    )  # one shard being filled, one being written
    claim_expiry_s: float = Field(
        default=60.0, gt=0, description="a claim without a heartbeat for so long is taken over"
    )  # four missed heartbeats
    process_id: int = Field(default=0, ge=0, description="this process's number, where several copy one cache")
    num_processes: Positive = Field(default=1, description="how many processes copy this cache")


class PlanConfig(BuildConfig):
    """What a build would take, before anything is written: sizes, objects, time, and what other choices would cost."""

    measure: bool = Field(
        default=True, description="run the teacher on a few batches of random tokens, to expect a time"
    )  # without it there is nothing to expect a time from


class SurgeryOp(Config):
    op: Literal["query_heads", "kv_heads"] = Field(description="what is cut")
    to: Positive = Field(description="how many stay: query heads in each KV group, or KV heads in all")
    by: Literal["index", "weight_norm"] = Field(
        default="index", description="which ones stay: the first, or those of the largest output weights"
    )  # needs no data and is easy to compare


class StudentConfig(Config):
    init: str = Field(
        default="teacher", description="teacher, or the path of a checkpoint to start from"
    )  # the usual start: the teacher itself, cut
    surgery: list[SurgeryOp] = Field(
        default_factory=list, description="cuts, in order: [{op: query_heads, to: 2, by: index}]"
    )


class FeatureLossConfig(Config):
    weight: float = Field(default=1.0, ge=0, description="beta, the weight of the whole term")
    relative_l2: float = Field(
        default=1.0, ge=0, description="share of ||s - t||^2 / ||t||^2"
    )  # scale-free, and it sees the norm, which cosine does not
    cosine: float = Field(default=0.0, ge=0, description="share of 1 - cos(s, t)")
    l2: float = Field(default=0.0, ge=0, description="share of mean (s - t)^2, as MaxText computes it")
    blocks: Literal["all"] | list[int] = Field(default="all", description="the blocks that count")


class LossConfig(Config):
    feature: FeatureLossConfig = Field(
        default=FeatureLossConfig(), description="attention output against the teacher's"
    )


class OptimizerConfig(Config):
    """AdamW with linear warm-up and cosine decay; state and clipping are per block."""

    learning_rate: float = Field(default=1e-3, gt=0, description="at its highest")
    warmup_steps: int = Field(default=10, ge=0, description="steps of linear warm-up")  # Adam's moments need a few
    final_fraction: float = Field(default=0.0, ge=0, le=1, description="of learning_rate, at the last step")
    b1: float = Field(default=0.9, ge=0, lt=1, description="Adam's first decay")
    b2: float = Field(default=0.95, ge=0, lt=1, description="Adam's second decay")  # short runs: a shorter memory
    eps: float = Field(default=1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled")  # students start near the answer
    clip_norm: float | None = Field(
        default=1.0, gt=0, description="clip each block's gradient to this norm; null: never"
    )  # one bad block must not slow the others


class TrainConfig(Config):
    """A cache in, a trained student out."""

    run: str = Field(description="folder of the run: checkpoints, metrics, the student")
    cache: str = Field(description="the cache to train from")
    student: StudentConfig = Field(default=StudentConfig(), description="what is trained")
    mode: Literal["blockwise"] = Field(
        default="blockwise", description="every block gets the teacher's stream as its input"
    )
    loss: LossConfig = Field(default=LossConfig(), description="what is compared, with which weight")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="AdamW")
    steps: Positive = Field(default=1000, description="optimizer steps")
    batch_rows: Positive = Field(default=8, description="rows in the global batch")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the shuffle")
    checkpoint_every: Positive = Field(
        default=100, description="steps between checkpoints"
    )  # minutes of work at most are lost
    keep_checkpoints: Positive = Field(default=2, description="how many stay")  # one may be half-written
    eval_every: int = Field(
        default=0, ge=0, description="steps between evaluations on held-out rows; 0: at the end only"
    )  # an evaluation costs as much as many steps
    eval_batch_rows: Positive = Field(default=8, description="rows in one evaluation batch")
    log_every: Positive = Field(default=1, description="steps between lines of metrics")
    partial: bool = Field(
        default=False, description="train on the committed shards of a cache that is still being built"
    )  # a run that goes on needs the same rows again, and a cache that grows has others
    prefetch_batches: Positive = Field(
        default=2, description="batches read ahead of use"
    )  # one being moved to the device, one being read

    @model_validator(mode="before")
    @classmethod
    def _understand_maxtext(cls, values: Any) -> Any:
        """MaxText's `blockwise_distill: true` means `mode: blockwise`."""
        if isinstance(values, dict) and "blockwise_distill" in values:
            values = dict(values)
            if values.pop("blockwise_distill"):
                values["mode"] = "blockwise"
        return values


class InspectConfig(Config):
    """Print what a cache holds."""

    cache: str = Field(description="the cache, finished or not")


class VerifyConfig(Config):
    """Compare every byte of a cache with what was committed. Exit code: 0 if all is well, 2 if anything is wrong."""

    cache: str = Field(description="the cache, finished or not (then its committed shards are checked)")
    quick: bool = Field(
        default=False, description="check presence, lengths and shard indexes, without reading the data"
    )  # damage inside the data is what one looks for


class BenchConfig(Config):
    """Measure fixed work against this machine's own limits and against other systems' formats."""

    what: Literal["feed", "build", "codec"] = Field(description="feed, build or codec")
    dir: str | None = Field(
        default=None, description="where the data goes meanwhile, about 3 GB; default: the temporary folder"
    )  # it is removed afterwards
    rounds: Positive | None = Field(
        default=None, description="how often everything is measured, by turns; medians count; default: feed 5, build 2"
    )


class ExportConfig(Config):
    """Write a run's student as an HF directory."""

    run: str = Field(description="the run, as trained")
    out: str = Field(description="the HF directory to write")
    step: int | None = Field(default=None, description="which checkpoint; default: the newest")


class DemoConfig(Config):
    """The whole job on a real teacher: text, cache, cut student, recovery, report."""

    out: str = Field(default="distillcache-demo", description="folder for rows, cache, run and report")
    teacher: TeacherConfig | None = Field(default=None, description="default: SmolLM2-135M-Instruct, fetched once")
    data: DataConfig | None = Field(
        default=None,
        description="default: the texts inside CPython's pydoc; at most 480 rows of 128 tokens, unless stated",
    )
    surgery: list[SurgeryOp] | None = Field(
        default=None, description="default: two of three query heads of every KV group"
    )
    steps: Positive = Field(default=60, description="training steps")  # closes nine tenths of the gap
    batch_rows: Positive = Field(
        default=8, description="rows in a teacher call and in a training batch"
    )  # 1,024 tokens
