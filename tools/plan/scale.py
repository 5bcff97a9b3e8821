"""`distillcache plan --simulate`: bytes, objects, requests, time, money and bottlenecks of large caches.

    distillcache plan --simulate

Sizes come from the plan that a build of such a teacher would make, requests from the feed's own rule
(trainer/feed/readers/requests.py), times from a build that is played through (fleet.py). Nothing is read or written.

A *choice* is what is recorded, and in which codec. A *limit* is the need of a resource divided by its capacity:
above 1, it is a bottleneck.
"""

from dataclasses import dataclass
from typing import Any

from distillcache.models.config import BlockKind, LayerGroup, ModelConfig, MoeConfig, RopeConfig
from distillcache.models.layers.rope import context_length
from distillcache.schemas.cache.segment import RECORDS_KEPT
from distillcache.schemas.config import BuildConfig, DataConfig, TapsConfig, TeacherConfig
from distillcache.schemas.config.simulate import SimulateConfig
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.format.index import record_dtype
from distillcache.schemas.format.layout import ITEM_BYTES, MAX_PUT_BYTES
from distillcache.schemas.format.manifest import PartPlan, Plan, RowsPlan
from distillcache.schemas.format.rows import too_long_note
from distillcache.tools.plan.fleet import Fleet, Work, play, quiet_seconds, unit_seconds
from distillcache.tools.plan.sizes import ROW_BYTES_PER_TOKEN, plan_for, total_bytes
from distillcache.trainer.feed.readers.requests import split

# Sizes of the published models (their config.json).
_LLAMA = {"num_kv_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_positions": 131072, "theta": 500000.0}
TEACHERS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_LLAMA,
        "blocks": 16,
        "hidden_size": 2048,
        "num_heads": 32,
        "head_dim": 64,
        "intermediate_size": 8192,
    },
    "llama-3.1-8b": {**_LLAMA, "blocks": 32, "hidden_size": 4096, "num_heads": 32, "intermediate_size": 14336},
    "llama-3.1-70b": {**_LLAMA, "blocks": 80, "hidden_size": 8192, "num_heads": 64, "intermediate_size": 28672},
    "qwen3-30b-a3b": {
        "blocks": 48,
        "hidden_size": 2048,
        "num_heads": 32,
        "num_kv_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "vocab_size": 151936,
        "max_positions": 40960,
        "theta": 1000000.0,
        "moe": MoeConfig(num_experts=128, top_k=8, expert_size=768),
    },
}
# label -> (taps, every so many blocks)
CHOICES: dict[str, tuple[dict[str, Any], int]] = {
    "attn_out, resid: bf16": ({"attn_out": {}, "resid": {}}, 1),
    "attn_out, resid: int8": ({"attn_out": {"codec": "int8"}, "resid": {"codec": "int8", "delta": True}}, 1),
    "attn_out, resid: int4": ({"attn_out": {"codec": "int4"}, "resid": {"codec": "int4", "delta": True}}, 1),
    "int4, every 4th block": ({"attn_out": {"codec": "int4"}, "resid": {"codec": "int4", "delta": True}}, 4),
    "last stream: int8": ({"attn_out": None, "resid": {"codec": "int8", "slots": ["last"]}}, 1),
    "topk_logits, k = 64": ({"attn_out": None, "resid": None, "topk_logits": {"k": 64}}, 1),
}
UNIT_MEMORY = (
    500  # bytes that a building process holds for each work unit that is left: an entry with its set of shards
)
RECEIPT_MEMORY = 3  # times the index: receipts spell its digests in hexadecimal, and the index is made of them at once


@dataclass(frozen=True)
class Cache:
    """A cache that could be built. flops: of the teacher for one token."""

    plan: Plan
    flops: float

    @property
    def parts(self) -> list[PartPlan]:
        return [part for tap in self.plan.taps for part in tap.parts]

    @property
    def objects(self) -> int:
        return self.plan.num_shards * sum(len(part.object_ranges()) for part in self.parts)

    @property
    def index_bytes(self) -> int:
        return self.plan.num_shards * record_dtype(self.plan).itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the finished cache, with the objects' own chunk indexes."""
        chunks = sum(len(part.object_ranges()) * part.slots_per_object for part in self.parts) * self.plan.shard_rows
        return total_bytes(self.plan) + self.plan.num_shards * 16 * chunks + self.objects * 4

    @property
    def puts(self) -> int:
        """Writes of a build: objects, a rows file and a receipt for every shard, a lease for every work unit."""
        return self.objects + 2 * self.plan.num_shards + self.plan.num_units

    @property
    def row_gets(self) -> int:
        """Requests for one row, drawn at random: its runs of chunks, its shard's index record and rows file."""
        return sum(len(split(self._all(part), part, self._chunk_bytes(part))) for part in self.parts) + 2

    @property
    def epoch_gets(self) -> int:
        """Count the requests of reading all rows once; remembered records of a shard are requested once."""
        rows, shards = self.plan.rows.count, self.plan.num_shards
        return rows * (self.row_gets - 2) + 2 * (shards if shards <= RECORDS_KEPT else rows)

    @property
    def row_read_bytes(self) -> int:
        """For one row, drawn at random from many shards."""
        files = self.plan.shard_rows * ROW_BYTES_PER_TOKEN * self.plan.rows.row_tokens
        return self.plan.bytes_per_row + files + record_dtype(self.plan).itemsize

    def work(self) -> Work:
        """Return the work of its build; a work unit's last rows count like all others, since their batch is padded."""
        unit_tokens = self.plan.unit_rows * self.plan.rows.row_tokens
        return Work(units=self.plan.num_units, unit_tokens=unit_tokens, bytes=self.bytes, puts=self.puts)

    def _all(self, part: PartPlan) -> list[tuple[int, int]]:
        return [(slot, slot) for slot in range(part.slots)]

    def _chunk_bytes(self, part: PartPlan) -> int:
        return self.plan.rows.row_tokens * part.width * ITEM_BYTES[part.dtype]


def describe_scale(config: SimulateConfig) -> dict[str, Any]:
    """Every teacher, amount of text and choice, as plain values; sizes in bytes, times in seconds, money in dollars."""
    found = []
    for teacher in config.teachers:
        for tokens in config.tokens:
            for choice in CHOICES:
                entry = {"teacher": teacher, "tokens": tokens, "choice": choice}
                try:
                    found.append({**entry, **describe_cache(config, make_cache(config, teacher, tokens, choice))})
                except ConfigError as error:  # sizes that do not fit this one: said, since others may
                    found.append({**entry, "impossible": error.what})
    return {"assumed": config.model_dump(mode="json"), "too_long": too_long(config), "caches": found}


def too_long(config: SimulateConfig) -> list[str]:
    """Return a line for every teacher that is made for shorter rows."""
    contexts = {teacher: context_length(teacher_shape(teacher)) for teacher in config.teachers}
    notes = [
        too_long_note(config.row_tokens, context, teacher, f"give --row-tokens {context} or less")
        for teacher, context in contexts.items()
    ]
    return [note for note in notes if note]


def make_cache(config: SimulateConfig, teacher: str, tokens: float, choice: str) -> Cache:
    """The plan that a build of this teacher and text would make."""
    (taps, step), model = CHOICES[choice], teacher_shape(teacher)
    build = BuildConfig(
        cache="gs://planned",
        teacher=TeacherConfig(path=teacher),
        data=DataConfig(path="text", row_tokens=config.row_tokens),
        taps=TapsConfig.model_validate(taps),
        blocks=list(range(model.num_blocks))[step - 1 :: step],
        batch_rows=config.batch_rows,
        object_mib=config.object_mib,
        shard_mib=config.shard_mib,
        dtype="bfloat16",
    )
    rows = RowsPlan(
        count=-(-int(tokens) // config.row_tokens),
        eval_indices=(),
        row_tokens=config.row_tokens,
        tokens=int(tokens),
        content_digest="",
        text_digest="",
        tokenizer_digest="",
        vocab_size=model.vocab_size,
        eos_id=0,
    )
    return Cache(
        plan_for(build, model, rows), forward_flops(model, config.row_tokens, head=bool(taps.get("topk_logits")))
    )


def teacher_shape(name: str) -> ModelConfig:
    """The sizes of a known model."""
    sizes = dict(TEACHERS[name])
    kind = BlockKind(moe="moe" in sizes)
    layers, rope = (LayerGroup((kind,), sizes.pop("blocks")),), RopeConfig(theta=sizes.pop("theta"))
    return ModelConfig(layers=layers, rope=rope, **sizes)


def forward_flops(model: ModelConfig, row_tokens: int, *, head: bool) -> float:
    """FLOPs of one token's forward pass: its matrix products and its share of attention, as trainer/step/flops.py
    counts; of experts those that a token takes.

    Args:
        head: whether logits are computed, as `topk_logits` needs them.
    """
    width = model.num_heads * model.head_dim
    attention = 2 * model.hidden_size * (width + model.num_kv_heads * model.head_dim) + width * row_tokens
    mlp = 3 * model.hidden_size * model.intermediate_size
    if model.moe is not None:
        mlp = model.hidden_size * (3 * model.moe.top_k * model.moe.expert_size + model.moe.num_experts)
    return 2.0 * (model.num_blocks * (attention + mlp) + (model.hidden_size * model.vocab_size if head else 0))


def host_rate(config: SimulateConfig, cache: Cache) -> float:
    """Tokens a second of one host's teacher."""
    build = config.build
    return build.tokens_per_s or build.host_tflops * 1e12 * build.mfu / cache.flops


def make_fleet(config: SimulateConfig, cache: Cache, hosts: int) -> Fleet:
    """A fleet of this many hosts, as the config describes them."""
    build = config.build
    return Fleet(
        hosts=hosts,
        tokens_per_s=host_rate(config, cache),
        write_bytes_per_s=config.bucket.host_gb_s * 1e9,
        startup_s=build.startup_s,
        restart_s=build.restart_s,
        preemptions_per_s=build.preemptions_per_h / 3600,
        claim_expiry_s=build.claim_expiry_s,
        retry_share=build.retry_share,
        seed=build.seed,
    )


def describe_cache(config: SimulateConfig, cache: Cache) -> dict[str, Any]:
    """Describe what building, storing and reading this cache takes."""
    plan, bucket, train = cache.plan, config.bucket, config.train
    played = {hosts: play(cache.work(), make_fleet(config, cache, hosts)) for hosts in config.build.hosts}
    return {
        "rows": plan.rows.count,
        "bytes_per_token": plan.bytes_per_token,
        "bytes": cache.bytes,
        "shards": plan.num_shards,
        "objects": cache.objects,
        "index_bytes": cache.index_bytes,
        "puts": cache.puts,
        "gets_per_epoch": cache.epoch_gets,
        "read_gb_per_s_per_host": train.batch_rows * cache.row_read_bytes / train.step_s / train.hosts / 1e9,
        "steps_per_epoch": plan.rows.count / train.batch_rows,
        "host_tokens_per_s": host_rate(config, cache),
        "builds": [
            {
                "hosts": hosts,
                "seconds": each.wall_s,
                "preemptions": each.preemptions,
                "retries": each.retries,
                "over_quiet": each.wall_s / quiet_seconds(cache.work(), make_fleet(config, cache, hosts)) - 1,
                "write_gb_per_s_per_host": each.bytes / each.wall_s / hosts / 1e9,
            }
            for hosts, each in played.items()
        ],
        "dollars_per_month": cache.bytes / 2**30 * bucket.price_per_gib_month,
        "dollars_for_puts": cache.puts / 1000 * bucket.price_per_1000_puts,
        "dollars_for_gets_per_epoch": cache.epoch_gets / 1000 * bucket.price_per_1000_gets,
        "limits": limits(config, cache),
    }


def limits(config: SimulateConfig, cache: Cache) -> dict[str, float]:
    """Compute need over capacity of each resource. Building: with the most hosts of the config, at their teachers'
    speed.
    """
    bucket, train, build = config.bucket, config.train, config.build
    hosts = max(build.hosts)
    fleet, work = make_fleet(config, cache, hosts), cache.work()
    compute_s, write_s = unit_seconds(work, fleet)
    rows_per_s = train.batch_rows / train.step_s
    read = rows_per_s * cache.row_read_bytes / 1e9
    return {
        "build: host network": write_s / compute_s,
        "build: PUTs/s": hosts / max(compute_s, write_s) * work.puts / work.units / bucket.puts_per_s,
        "build: memory": (RECEIPT_MEMORY * cache.index_bytes + UNIT_MEMORY * cache.plan.num_units)
        / (build.host_ram_gib * 2**30),
        "build: index PUT": cache.index_bytes / MAX_PUT_BYTES,
        "feed: host network": read / train.hosts / bucket.host_gb_s,
        "feed: bucket GB/s": read / bucket.egress_gb_s,
        "feed: GETs/s": rows_per_s * cache.row_gets / bucket.gets_per_s,
    }
