"""Settings of the teacher: the checkpoint, the recorded taps, and how it runs inside a training."""

from typing import Literal

from pydantic import Field, field_validator

from distillcache.schemas.base import BatchRows, Config, Index, Natural, Positive


class TeacherConfig(Config):
    path: str = Field(
        description="an HF directory (config.json, safetensors), a folder with a MaxText checkpoint and the model's "
        "config.json, a run of `train` or one of its checkpoints, or a .gguf file: a local path, gs:// or s3://"
    )


class TeacherMeshConfig(Config):
    """Number of devices along each axis; their product is the number of devices used."""

    data: Positive = Field(default=1, description="data parallelism: replicas that work on different rows")
    fsdp: Positive = Field(default=1, description="shards rows and parameters")
    tensor: Positive = Field(default=1, description="shards heads and MLP widths")
    expert: Positive = Field(default=1, description="shards experts; for models with routers")

    @property
    def teacher_axes(self) -> tuple[int, ...]:
        """Sizes along data, fsdp, tensor and expert, which pin a teacher's bits; (1,) for a single device."""
        sizes = (self.data, self.fsdp, self.tensor, self.expert)
        return sizes if max(sizes) > 1 else (1,)

    @classmethod
    def of_axes(cls, sizes: tuple[int, ...]) -> "TeacherMeshConfig":
        """The reverse of `teacher_axes`."""
        return cls(**dict(zip(("data", "fsdp", "tensor", "expert"), sizes, strict=False)))


class TapConfig(Config):
    codec: Literal["bf16", "f32", "fp8", "int8", "int4"] = Field(
        default="bf16", description="codec in which the tap is stored"
    )  # lossless for the usual bf16 teacher
    group: Natural | None = Field(
        default=None, description="int8 and int4: numbers that share a scale; 0: the whole token; default: 32"
    )  # measured: finer groups gain more than their scales cost
    rotate: bool = Field(
        default=True, description="int8 and int4: spread outliers by a random rotation before quantising"
    )  # measured: an outlier would take the scale of its whole group
    delta: bool = Field(
        default=False,
        description="resid in int8 or int4: encode differences from block to block: more accurate, "
        "but keyframes take space",
    )  # six times closer, but one block is read with up to keyframe_every - 1 others
    keyframe_every: Natural = Field(
        default=8, description="with delta: distance between keyframes, in slots; 0: no keyframes"
    )  # adds 7% of bf16's size; eight reads at most for one block
    compress: Literal["none", "zstd", "blosc"] = Field(
        default="none",
        exclude_if=lambda value: value == "none",  # so that plans without it compare with those of before there was any
        description="lossless compression: zstd is smaller, blosc faster to read",
    )  # measured: bf16 shrinks by a fifth, int8 and int4 hardly, and a local disk is read several times faster without


class ResidConfig(TapConfig):
    slots: list[Index | Literal["last"]] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,  # so that plans without it compare with those of before there was any
        description="the slots to record: l is the stream entering block l, last the one leaving the last block; "
        "default: those on both sides of every recorded block",
    )  # [last] is enough for the teacher's logits, at the cost of one slot
    head: bool = Field(
        default=False,
        exclude_if=lambda value: not value,
        description="keep the teacher's final norm and LM head in the cache: with the last slot they give all its "
        "logits, without its checkpoint",
    )  # off: as long as the checkpoint stays where it is, training reads them from there


class TopKConfig(Config):
    k: Positive = Field(
        default=64, description="number of logits; at most the vocabulary size"
    )  # measured: nine tenths of the mass; another doubling would gain three hundredths
    dtype: Literal["bf16", "f32"] = Field(
        default="bf16", description="dtype of the stored logits; their logsumexp is always float32"
    )  # lossless for the usual bf16 teacher
    compress: Literal["none", "zstd", "blosc"] = Field(
        default="none",
        exclude_if=lambda value: value == "none",  # as in TapConfig
        description="lossless compression",
    )  # as in TapConfig


class TapsConfig(Config):
    attn_out: TapConfig | None = Field(
        default=TapConfig(), description=("what the attention sublayer adds to the residual stream; null: not recorded")
    )  # the target of the feature loss
    resid: ResidConfig | None = Field(
        default=ResidConfig(),
        description=("the residual stream entering each block, and leaving the last; null: not recorded"),
    )  # the input of a block in blockwise mode
    mlp_out: TapConfig | None = Field(
        default=None, description="what the MLP sublayer adds to the residual stream"
    )  # off: it follows from resid and attn_out
    topk_logits: TopKConfig | None = Field(
        default=None,
        exclude_if=lambda value: value is None,  # so that plans without it compare with those of before there was any
        description="every token's k largest logits: values, vocabulary ids, and the logsumexp over the vocabulary",
    )  # off: only a KL loss needs it, and it costs a pass through the LM head

    @field_validator("resid", mode="before")
    @classmethod
    def _codec_alone(cls, value: object) -> object:
        """A `TapConfig`, as the other taps have it, is enough."""
        if isinstance(value, TapConfig) and not isinstance(value, ResidConfig):
            return ResidConfig(**value.model_dump(exclude_unset=True))
        return value


class OnlineConfig(Config):
    """The teacher in the loop: where its rows come from, and how they are run.

    Unset fields are as in the cache's build; the numbers are then those of a run from the cache.
    """

    rows: str | None = Field(
        default=None,
        description="a finished cache (its taps are not read) or prepared rows; default: the run's cache",
    )  # to compare with training from that cache
    teacher: TeacherConfig | None = Field(
        default=None,
        description=("the teacher; default: the checkpoint that the cache names; required for prepared rows"),
    )  # it must be the cache's own teacher, wherever it lies now
    taps: TapsConfig | None = Field(
        default=None,
        description="what is recorded; default: as in the cache; for prepared rows, attn_out and resid in a "
        "lossless codec",
    )  # an online run has no need to save bytes
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description=(
            "the teacher's compute dtype; default: as in the cache; for prepared rows, that of its checkpoint"
        ),
    )  # other dtypes give other numbers
    batch_rows: BatchRows | None = Field(
        default=None,
        description="rows in a call of the teacher; default: as in the cache; for prepared rows, 16",
    )  # other shapes give other bits
    exact: bool = Field(
        default=False,
        description=(
            "run every row in the batch in which a build runs it: gives the same bits even if they depend on the "
            "other rows, at up to batch_rows times the work"
        ),
    )  # measured on CPUs: they do not
