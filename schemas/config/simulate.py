"""Settings of `distillcache plan --simulate`: amount of text, teachers, machines.

The defaults describe hosts of Cloud TPU v5p (4 chips of 459 bfloat16 TFLOP/s and 50 Gbit/s of data centre network each:
Google's page on v5p) and one bucket of Google Cloud Storage.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from distillcache.schemas.base import BatchRows, Config, Decay, Mebibytes, Positive, Seed, not_vanishing

# Within these a simulation ends in seconds, and its figures stay finite.
TextTokens = Annotated[float, Field(ge=1, le=1e14)]
RowTokens = Annotated[int, Field(gt=0, le=1 << 20)]
Rate = Annotated[float, Field(ge=1e-3, le=1e9)]
Amount = Annotated[float, Field(ge=0, le=1e7), AfterValidator(not_vanishing)]
Preemptions = Annotated[float, Field(ge=0, le=10), AfterValidator(not_vanishing)]
Hosts = Annotated[int, Field(gt=0, le=10**5)]
TeacherShape = Literal["llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b", "qwen3-30b-a3b"]


class BuildFleetConfig(Config):
    """The machines that run the teacher."""

    hosts: list[Hosts] = Field(
        default=[16, 64, 256, 1024], min_length=1, description=("numbers of hosts, one column each")
    )
    tokens_per_s: Rate | None = Field(
        default=None,
        description=(
            "tokens a second of one host's teacher; default: from host_tflops, mfu and the teacher's matrix products"
        ),
    )  # `plan` without --simulate measures it
    host_tflops: Rate = Field(default=1836.0, description="bfloat16 peak of one host, TFLOP/s")  # 4 chips of v5p
    mfu: float = Field(default=0.4, ge=1e-6, le=1, description="share of the peak that a forward pass reaches")
    host_ram_gib: Rate = Field(default=448.0, description="memory of one host")  # of v5p's 4-chip machines
    startup_s: Amount = Field(
        default=300.0, description="time from the start of a host to its first batch (weights, compilation)"
    )
    preemptions_per_h: Preemptions = Field(
        default=0.05, description="preemptions of one host an hour"
    )  # one in 20 hours; spot machines in a busy region see more
    restart_s: Amount = Field(default=600.0, description="time from a preemption to the first batch on a new host")
    claim_expiry_s: Amount = Field(default=60.0, description="time after which a dead host's work is taken over")
    retry_share: Decay = Field(default=0.001, description="share of writes that are retried")
    seed: Seed = Field(default=0, description="seed of preemptions and retries")


class TrainFleetConfig(Config):
    """The machines that read the cache."""

    hosts: Hosts = Field(default=64, description="number of hosts; each reads its share of every batch")
    batch_rows: BatchRows = Field(default=256, description="rows in a step's global batch")
    step_s: Rate = Field(default=1.0, description="seconds of a step")


class BucketConfig(Config):
    """The bucket that holds the cache."""

    host_gb_s: Rate = Field(default=25.0, description="GB/s between one host and the bucket")  # 200 Gbit/s of v5p
    egress_gb_s: Rate = Field(
        default=25.0, description="GB/s that the bucket serves to all hosts together"
    )  # 200 Gbit/s, a project's usual quota in a region; more on request
    puts_per_s: Rate = Field(
        default=1000.0, description="writes a second that a new bucket accepts"
    )  # Cloud Storage's quotas page; it grows with use, doubling in some 20 minutes
    gets_per_s: Rate = Field(default=5000.0, description="reads a second that a new bucket accepts")  # likewise
    price_per_gib_month: Amount = Field(
        default=0.020, description="US dollars"
    )  # Standard storage in us-central1, Google's price list of 2025
    price_per_1000_puts: Amount = Field(default=0.005, description="US dollars, class A operations")  # likewise
    price_per_1000_gets: Amount = Field(default=0.0004, description="US dollars, class B operations")  # likewise


class StudentsConfig(Config):
    """Students that are trained from one teacher, one after the other."""

    counts: list[Positive] = Field(default=[1, 2, 4, 8, 16], min_length=1, description="numbers of students to compare")
    size: Rate = Field(default=0.25, description="parameters of a student, as a fraction of the teacher's")
    hosts: Hosts = Field(default=1, description="hosts that build the cache and train each student")


class SimulateConfig(Config):
    """Estimate the cost of caches for large amounts of text: bytes, objects, requests, time, money, and which
    resource becomes the bottleneck.
    """

    tokens: list[TextTokens] = Field(default=[1e9, 1e11, 1e12], min_length=1, description="tokens of text")
    teachers: list[TeacherShape] = Field(
        default=["llama-3.1-8b", "llama-3.1-70b"],
        min_length=1,
        description="teachers to compare; qwen3-30b-a3b has 128 experts in each block, of which a token takes 8",
    )
    row_tokens: RowTokens = Field(default=1024, description="tokens in a row")  # as in a build
    batch_rows: BatchRows = Field(default=16, description="rows in one call of the teacher")  # likewise
    object_mib: Mebibytes = Field(default=256, description="target size of a stored object")  # likewise
    shard_mib: Mebibytes = Field(default=1024, description="target size of a shard, the unit of commit")  # likewise
    build: BuildFleetConfig = Field(default=BuildFleetConfig(), description="the machines that run the teacher")
    train: TrainFleetConfig = Field(default=TrainFleetConfig(), description="the machines that read the cache")
    bucket: BucketConfig = Field(default=BucketConfig(), description="the bucket that holds the cache")
    students: StudentsConfig = Field(
        default=StudentsConfig(), description="training time from a cache and with the teacher in the loop"
    )
    plot: str | None = Field(
        default=None,
        pattern=r"\.(svg|png)$",
        description="also plot hours by number of students, for the first teacher and text, to this file",
    )
