"""Settings of every command: one frozen model for each stage. YAML files and `--dotted.flags` both end here.

The description of each field is its help text (`distillcache build --help`); its default's reason is beside it.
"""

import re
from datetime import date
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from distillcache.schemas.base import (
    BatchRows,
    Config,
    Index,
    Mebibytes,
    Natural,
    Positive,
    RowTokens,
    Seconds,
    Seed,
    Size,
    WholeSeconds,
)
from distillcache.schemas.config.storage import StorageConfig
from distillcache.schemas.config.teacher import TapConfig, TapsConfig, TeacherConfig, TeacherMeshConfig
from distillcache.schemas.config.train import SurgeryOp

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
OnError = Literal["stop", "skip"]
BenchName = Literal["feed", "build", "codec", "student", "kl", "recipes", "step", "routing", "load", "accelerator"]
RecipeWay = Literal[
    "ce",
    "online_kl",
    "online_features",
    "kl_int8",
    "blockwise_bf16",
    "blockwise_int8",
    "blockwise_int4",
    "blockwise_kl_bf16",
    "blockwise_kl_int8",
    "blockwise_kl_int4",
]
DataFormat = Literal["auto", "text", "jsonl", "chat", "parquet", "array_record"]


class DataConfig(Config):
    path: str | list[str] = Field(
        description=".txt, .jsonl (each also .gz), .parquet and .array_record files, directories and globs of them, "
        "local or at gs://, s3://; or prepared rows (a folder with rows.json)"
    )
    format: DataFormat = Field(
        default="auto",
        exclude_if=lambda value: value == "auto",
        description=(
            "format of the files; auto: by suffix; chat: lines (or parquet rows) with `messages`, formatted "
            "by the tokenizer's chat template, with only the assistant's turns as targets"
        ),
    )  # written down only where it is set: rows and plans from before it are the same bytes
    text_field: str = Field(
        default="text", description="the field, column or feature that holds the text"
    )  # the usual name
    chat_date: date | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="the date that a chat template inserts as today's date, such as 2025-01-31",
    )  # no default, since the same text must give the same rows on every day
    on_error: OnError = Field(
        default="stop",
        exclude_if=lambda value: value == "stop",
        description=(
            "stop at an unusable line, row or record, or skip it; skipped ones are counted, and listed in "
            "skipped.jsonl beside the rows"
        ),
    )  # stop: nobody finds out later that half of a text was left out
    tokenizer: str | None = Field(
        default=None,
        description="a tokenizer.json, an HF directory or a .gguf; default: the teacher's own (prepare needs one)",
    )
    eos_token: str | None = Field(
        default=None, description="the token that ends every document; default: from the tokenizer's files"
    )
    row_tokens: RowTokens = Field(default=1024, description="tokens in a row")  # long enough for real context
    eval_rows: Natural = Field(
        default=64, description="rows held out for evaluation, drawn from the whole corpus"
    )  # 64 x 1024 tokens: perplexity to about 1%
    max_document_mib: Mebibytes = Field(
        default=128,
        exclude_if=lambda value: value == 128,  # rows and plans from before it are the same bytes
        description="maximum size of a document, decompressed (of a .jsonl: of a line); a longer one is an error",
    )  # reading takes up to nine times a document's length in memory
    max_rows: Size | None = Field(default=None, description="maximum number of rows; default: the whole text")
    eval_seed: Seed = Field(default=0, description="seed of the rows drawn for evaluation")

    @field_validator("chat_date", mode="before")
    @classmethod
    def _is_a_day(cls, value: object) -> object:
        """Numbers are no dates: pydantic would take them for seconds since 1970."""
        if value is None or isinstance(value, date) or (isinstance(value, str) and _DAY.fullmatch(value)):
            return value
        raise ValueError("a date is written as 2025-01-31")


class Workers(Config):
    """Options of one of several processes that work on one thing; they decide nothing about the result.

    A number too high would have nothing to do.
    """

    process_id: Natural = Field(default=0, description="this process's number, if several share the work")
    num_processes: Positive = Field(
        default=1,
        description=("number of processes that share the work; with replica: job on a cluster, the cluster sets it"),
    )
    claim_expiry_s: Seconds = Field(
        default=60.0,
        description="time without a heartbeat after which a lease expires and another process may take it over",
    )  # four missed heartbeats
    storage: StorageConfig = Field(default=StorageConfig(), description="object-store client settings")

    @model_validator(mode="after")
    def _is_one_of_the_processes(self) -> Self:
        if self.process_id >= self.num_processes:
            raise ValueError(
                f"process_id is {self.process_id}, and num_processes {self.num_processes}: "
                f"numbers go from 0 to {self.num_processes - 1}"
            )
        return self


class PrepareConfig(Workers):
    """Turn text into packed rows. Options of Apache Beam after a bare double hyphen run it as a Beam pipeline."""

    usual: ClassVar = (
        "data.path",
        "data.format",
        "data.tokenizer",
        "out",
        "data.row_tokens",
        "data.eval_rows",
        "data.max_rows",
        "workers",
        "num_processes",
        "process_id",
    )

    out: str = Field(description="folder for the rows (<out>/rows/ and <out>/rows.json)")
    data: DataConfig
    workers: int = Field(
        default=1,
        ge=1,
        le=1024,  # each is a Python of 200 MB; more than any machine has cores is a typing error
        description="worker processes on this machine that share the input files; at most 1024",
    )  # one process tokenises on all cores already, as long as the text is plain


class ShardSizes(Config):
    """Sizes of shards and objects, which are part of a cache's identity."""

    object_mib: Mebibytes = Field(
        default=256, description="target size of a stored object"
    )  # few requests, far below the 5 GB limit of a single PUT
    shard_mib: Mebibytes = Field(
        default=1024, description="target size of a shard, the unit of commit"
    )  # a shard must fit in memory, and a crash loses one at most
    shard_rows: Positive | None = Field(default=None, description="rows in a shard; default: from shard_mib")


class ShardWorkers(Workers):
    """Options of a process that writes shards."""

    max_in_flight_mib: Mebibytes = Field(
        default=2048, description="maximum size of data that is recorded or read but not yet stored"
    )  # one shard being filled, one being written


class BuildSpec(ShardSizes):
    """Settings that determine what a build records. They go into the plan and are compared when it goes on."""

    data: DataConfig
    taps: TapsConfig = Field(default=TapsConfig(), description="what is recorded in every block")
    blocks: Literal["all"] | list[Index] = Field(default="all", description="the blocks to record, as a list, or all")
    batch_rows: BatchRows = Field(
        default=16, description="rows in one call of the teacher"
    )  # a few thousand tokens a call
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="the teacher's compute dtype; default: that of its checkpoint"
    )
    attention: Literal["auto", "xla", "splash", "cudnn"] = Field(
        default="auto",
        description=(
            "the teacher's attention kernel: splash on TPUs, cudnn on GPUs in 16 bits, xla anywhere; auto: "
            "the first that is supported"
        ),
    )  # without scores in memory, where there is a kernel for it
    mesh: TeacherMeshConfig = Field(
        default=TeacherMeshConfig(),
        exclude_if=lambda value: value == TeacherMeshConfig(),  # plans from before there were meshes are the same bytes
        description="devices of one replica of the teacher, by axis",
    )


class BuildOptions(ShardWorkers):
    """Settings of how a build runs. A build may go on with others."""

    replica: Literal["process", "job"] = Field(
        default="process",
        description=(
            "one teacher in each process (process), or one over the devices of all processes, which then work in "
            "lockstep (job)"
        ),
    )  # independent processes survive each other; a job is for teachers that are larger than a host
    coordinator: str | None = Field(
        default=None,
        description=(
            "with replica: job: HOST:PORT of process 0; default: as set by Cloud TPU, GKE, Slurm or Open MPI; none: "
            "a single process, even if they set one"
        ),
    )
    timeout_s: WholeSeconds = Field(
        default=60,
        description="with replica: job: heartbeat timeout; the job aborts when a process is silent for longer",
    )  # as in training
    accept_platform: bool = Field(
        default=False, description="continue although the platform or library versions differ from the plan's"
    )  # other versions may give other bits


class BuildPaths(Config):
    """Paths of a build's cache and teacher. The teacher is known by its weights, wherever they are."""

    cache: str = Field(description="where the cache goes: a folder, gs://bucket/prefix or s3://bucket/prefix")
    teacher: TeacherConfig


class BuildConfig(BuildOptions, BuildSpec, BuildPaths):
    """Run a teacher over text and record its activations in a cache."""

    usual: ClassVar = (
        "cache",
        "teacher",
        "data.path",
        "data.format",
        "data.row_tokens",
        "data.eval_rows",
        "data.max_rows",
        "taps.attn_out.codec",
        "taps.resid.codec",
        "taps.resid.delta",
        "blocks",
        "batch_rows",
        "dtype",
        "mesh",
        "extend",
        "repair",
        "abandon",
    )

    extend: bool = Field(
        default=False,
        description=("add to a finished cache what the config asks for: more rows, another tap, other blocks"),
    )  # otherwise another config in the same place is a mistake
    abandon: bool = Field(
        default=False, description="first delete an unfinished extension"
    )  # what was computed for it is lost
    repair: bool = Field(
        default=False,
        description=(
            "check every segment and recompute exactly what is damaged; needs only the cache, whose plans "
            "hold everything else"
        ),
    )  # reading everything back takes long


KeptTap = TapConfig | Literal["keep"] | None


class CopyTapsConfig(Config):
    """Choice for each tap: `keep` (as it is stored), null (left out), or the codec of the copy."""

    attn_out: KeptTap = Field(default="keep", description="what the attention sublayer adds to the residual stream")
    resid: KeptTap = Field(
        default="keep", description=("the residual stream entering each block, and leaving the last")
    )
    mlp_out: KeptTap = Field(default="keep", description="what the MLP sublayer adds to the residual stream")
    topk_logits: Literal["keep"] | None = Field(
        default="keep", description="every token's k largest logits: keep (as stored) or null (left out)"
    )


class CopyPaths(Config):
    """Paths of a copy and of its source."""

    src: str = Field(description="the finished cache to copy")
    dst: str = Field(description="where the copy goes: a folder, gs://bucket/prefix or s3://bucket/prefix")


class CopySpec(ShardSizes):
    """Settings that determine what a copy holds. They go into its plan."""

    taps: CopyTapsConfig = Field(
        default=CopyTapsConfig(),
        description=(
            "for every tap: keep, null or a codec; a tap that has to be re-encoded is reported, and is not bit-equal"
        ),
    )
    compress: Literal["keep", "none", "zstd", "blosc"] = Field(
        default="keep", description="lossless compression of every tap that does not set its own; keep: as stored"
    )  # codes are copied as they are, whatever compresses them
    blocks: Literal["all"] | list[Index] = Field(default="all", description="the blocks to copy, as a list, or all")
    rows: str = Field(
        default="all", pattern=r"^(all|train|eval|\d+:\d+)$", description="all, train, eval, or START:STOP"
    )
    batch_rows: BatchRows | None = Field(default=None, description="rows decoded at a time; default: as in the build")


class CopyConfig(ShardWorkers, CopySpec, CopyPaths):
    """Copy a cache into one of a single segment: to another path, in other codecs, or with fewer rows, blocks or taps.

    A tap is copied bit for bit unless a codec is given for it.
    """

    usual: ClassVar = (
        "src",
        "dst",
        "taps",
        "compress",
        "rows",
        "blocks",
        "repair",
    )

    repair: bool = Field(
        default=False, description="check the copy, and restore exactly what is damaged from the same source"
    )  # reading everything back takes long


class PlanConfig(BuildConfig):
    """Estimate the cost of a build before anything is written: size, objects, time, and the size with other codecs.

    `--simulate` estimates it for known teachers and up to 1T tokens, with fields of its own: `plan --simulate --help`.
    """

    usual: ClassVar = (*(name for name in BuildConfig.usual if name not in ("extend", "repair", "abandon")), "measure")

    measure: bool = Field(
        default=True,
        description="run the teacher on random tokens for about half a minute, to estimate the time",
    )  # without it there is nothing to expect a time from


class InspectConfig(Config):
    """Describe what a cache holds."""

    cache: str = Field(description="the cache, finished or not")
    storage: StorageConfig = Field(default=StorageConfig(), description="object-store client settings")


class VerifyConfig(Config):
    """Compare every byte of a cache with what was committed. Exit code: 0 if everything is intact, 2 if anything is
    damaged.
    """

    cache: str = Field(description="the cache, finished or not (then its committed shards are checked)")
    quick: bool = Field(
        default=False, description="check presence, lengths and shard indexes, without reading the data"
    )  # damage inside the data is what one looks for
    storage: StorageConfig = Field(default=StorageConfig(), description="object-store client settings")


class BenchConfig(Config):
    """Measure fixed work against this machine's own limits and against other systems' formats."""

    what: BenchName = Field(
        description="feed: reading, alone and beside a busy process; build: recording; codec: size, error and speed of "
        "each codec; step: a training step's time and memory; routing: experts balanced by biases, by an auxiliary "
        "loss, and not at all; load: the memory of one of eight processes that load a 30 GB checkpoint (takes 6 GB of "
        "memory; the files are sparse): each of these takes up to three minutes on two quiet cores. student: results "
        "of training from a bf16, an int8 and an int4 cache (twenty minutes); kl: students of half the blocks, trained "
        "with cross-entropy, the KL to the top k or the KL to the whole distribution (an hour); recipes: ways to train "
        "one student, compared by tokens and by time (hours); accelerator: kernels, memory, parity, and the other "
        "benches in small, in less than ten minutes on one accelerator, in tiny sizes where there is none"
    )
    job: Literal["fewer-heads", "narrower-mlps", "half-blocks", "experts", "balanced-experts"] | None = Field(
        default=None, description="recipes: how the student is cut from the teacher; default: half-blocks"
    )
    ways: Annotated[list[RecipeWay], Field(min_length=1)] | None = Field(
        default=None, description="recipes: the ways to train it that are compared; default: all"
    )
    text: str | None = Field(
        default=None,
        description="recipes: the text to train on, as data.path of a build; default: the demo's",
    )  # a recipe should hold on other texts too
    seed: Seed = Field(default=0, description="recipes: the first seed")
    dir: str | None = Field(
        default=None,
        description="folder for temporary data, about 3 GB (student: 7 GB; kl and recipes: 10 GB); default: the "
        "temporary folder",
    )  # it is removed afterwards
    rounds: Positive | None = Field(
        default=None,
        description=(
            "interleaved repetitions, of which the median counts; default: feed 5, build, step and accelerator 2 (in "
            "tiny sizes 1), kl and recipes 3 (seeds); the others measure once"
        ),
    )
    plot: str | None = Field(
        default=None,
        pattern=r"\.(svg|png)$",
        description="routing, kl and recipes: also plot the results to this file",
    )

    @model_validator(mode="after")
    def _has_a_picture(self) -> Self:
        if self.plot is not None and self.what not in ("routing", "kl", "recipes"):
            raise ValueError(f"plot is for routing, kl and recipes: {self.what} has no picture")
        return self

    @model_validator(mode="after")
    def _compares_recipes(self) -> Self:
        given = [name for name in ("job", "ways", "text", "seed") if name in self.model_fields_set]
        if given and "what" in self.model_fields_set and self.what != "recipes":
            raise ValueError(f"{', '.join(given)} is for recipes, not for {self.what}")
        if self.ways and len(set(self.ways)) < len(self.ways):
            raise ValueError(f"ways names one twice: {', '.join(self.ways)}")
        return self


class ExportConfig(Config):
    """Write a run's student as an HF directory, in MaxText's format, or as an adapter for peft."""

    run: str = Field(description="the run to export")
    out: str = Field(description="the folder to write: a local path, gs:// or s3://; for MaxText a local path")
    format: Literal["hf", "maxtext"] = Field(
        default="hf",
        description="hf: safetensors; maxtext: a scanned parameter checkpoint by Orbax (out/items is MaxText's "
        "load_parameters_path), and the HF files beside it, without weights; needs pip install -e '.[maxtext]'",
    )  # what most tools load
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None,
        description=("dtype of the weights; default: that of the checkpoint from which the student was made"),
    )
    adapter: bool = Field(
        default=False,
        description="for a run with student.lora: write only the adapters, in peft's format, and their base model "
        "to out/base; default: one model with the adapters merged",
    )
    step: Index | None = Field(default=None, description="which checkpoint; default: the newest")
    best: bool = Field(default=False, description="the checkpoint with the lowest held-out perplexity")
    storage: StorageConfig = Field(default=StorageConfig(), description="object-store client settings")

    @model_validator(mode="after")
    def _is_of_one_format(self) -> Self:
        if self.adapter and self.format != "hf":
            raise ValueError(f"adapter is for peft, and its model an HF directory: format: {self.format} has none")
        return self


class DemoConfig(Config):
    """Run the whole pipeline on a real teacher: text, cache, cut student, recovery, report."""

    out: str = Field(default="distillcache-demo", description="folder for rows, cache, run and report")
    teacher: TeacherConfig | None = Field(default=None, description="default: SmolLM2-135M-Instruct, fetched once")
    data: DataConfig | None = Field(
        default=None,
        description="default: the texts inside CPython's pydoc; at most 480 rows of 128 tokens, unless set otherwise",
    )
    surgery: list[SurgeryOp] | None = Field(
        default=None, description="default: keep two of the three query heads of every KV group"
    )
    steps: Positive = Field(default=60, description="training steps")  # closes nine tenths of the gap
    batch_rows: BatchRows = Field(
        default=8, description="rows in a teacher call and in a training batch"
    )  # 1,024 tokens
