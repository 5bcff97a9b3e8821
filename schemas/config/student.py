"""Settings of the student: the source of its weights, and the operations before the first step."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distillcache.schemas.base import Amount, Config, Index, Positive, Rate, Seed

Blocks = Literal["all"] | list[Index]


def _unset(value: object) -> bool:
    return value is None


class SurgeryOp(Config):
    """One operation on the model that a student is made of. Fields that an operation does not take stay unset."""

    op: Literal[
        "query_heads",
        "kv_heads",
        "value_heads",
        "mlp_width",
        "experts",
        "expert_width",
        "hidden_size",
        "drop_blocks",
        "upcycle",
    ] = Field(description="the operation")
    to: Positive | None = Field(
        default=None,
        exclude_if=_unset,
        description=(
            "how many stay: query heads in each KV group, KV heads, value heads of each key head in recurrent blocks "
            "(value_heads), neurons of an MLP (mlp_width) or of an "
            "expert (expert_width), experts in a block, dimensions of the residual stream (hidden_size)"
        ),
    )
    by: Literal["index", "weight_norm", "importance"] | None = Field(
        default=None,
        exclude_if=_unset,
        description=(
            "which ones stay: the first, those with the largest output weights, or the most important on rows"
            " of the cache; default: importance where it can be measured (a student of the cache's teacher, and resid "
            "and attn_out of every block), else index"
        ),
    )  # importance left the lowest perplexity after every operation (docs/surgery.md)
    blocks: Blocks | None = Field(
        default=None,
        exclude_if=_unset,
        description="drop_blocks: the blocks to remove; upcycle: the blocks whose MLP becomes experts, default: all",
    )
    experts: Annotated[int, Field(gt=0, le=1 << 16)] | None = Field(
        default=None, exclude_if=_unset, description="upcycle: number of experts"
    )
    top_k: Positive | None = Field(
        default=None, exclude_if=_unset, description="upcycle: number of experts for each token; default: 2"
    )
    how: Literal["copy", "partition"] | None = Field(
        default=None,
        exclude_if=_unset,
        description="upcycle: every expert copies the whole MLP (default), or gets a share of its neurons",
    )
    noise: Amount | None = Field(
        default=None,
        exclude_if=_unset,
        description="upcycle, how: copy: noise on each copy, as a fraction of its standard deviation; default: 0",
    )
    router_std: Amount | None = Field(
        default=None,
        exclude_if=_unset,
        description=("upcycle: standard deviation of the new router's random weights; default: 0.02"),
    )
    seed: Seed | None = Field(
        default=None, exclude_if=_unset, description="upcycle: seed of router and noise; default: 0"
    )

    @property
    def chosen_by(self) -> Literal["index", "weight_norm", "importance"]:
        """By what it chooses where nobody measures anything."""
        return self.by or "index"

    @property
    def spelled(self) -> str:
        """As a config has it."""
        taken = {name: getattr(self, name) for name in ("op", *_FIELDS_OF_OP.get(self.op, ("to", "by")))}
        return "{" + ", ".join(f"{name}: {value}" for name, value in taken.items() if value is not None) + "}"

    @model_validator(mode="before")
    @classmethod
    def _knows_its_fields(cls, values: Any) -> Any:
        """Answer a field that no operation has with those of this one."""
        op = values.get("op") if isinstance(values, dict) else None
        takes = _FIELDS_OF_OP.get(op, ("to", "by")) if isinstance(op, str) else ()
        extra = [str(name) for name in values if name not in cls.model_fields] if takes else []
        if extra:
            raise ValueError(f"op: {op} takes {', '.join(takes)}, not {', '.join(extra)}")
        return values

    @model_validator(mode="after")
    def _takes_its_fields(self) -> Self:
        """`{op: experts, experts: 4}` would otherwise be read as one thing and meant as another."""
        takes = _FIELDS_OF_OP.get(self.op, ("to", "by"))
        given = [name for name, value in self if value is not None and name in self.model_fields_set and name != "op"]
        if extra := [name for name in given if name not in takes]:
            raise ValueError(f"op: {self.op} takes {', '.join(takes)}, not {', '.join(extra)}")
        needs = {"drop_blocks": "blocks", "upcycle": "experts"}.get(self.op, "to")
        if getattr(self, needs) is None:
            raise ValueError(f"op: {self.op} needs {needs}")
        if self.how == "partition" and self.noise:
            raise ValueError("noise is for how: copy; the parts of a partition differ anyway")
        if self.op == "upcycle" and self.how != "partition" and self.chosen_by != "index":
            raise ValueError("by is for how: partition; every copy has all neurons")
        return self


_FIELDS_OF_OP = {
    "drop_blocks": ("blocks",),
    "upcycle": ("experts", "top_k", "how", "noise", "router_std", "seed", "blocks", "by"),
}


class LoraConfig(Config):
    """Adapters on a student's matrices, which alone are trained."""

    rank: Positive = Field(default=8, description="rank of each adapter")  # peft's default
    alpha: Rate = Field(
        default=16.0, description="an adapter's product is scaled by alpha / rank"
    )  # twice the rank, as is usual
    targets: Annotated[list[str], Field(min_length=1)] = Field(
        default=["attention"],
        description="patterns for the paths of the matrices that get an adapter, as in train_only: [attention/q, "
        "attention/v], [mlp]; default: all matrices of attention",
    )


class StudentConfig(Config):
    init: str = Field(
        default="teacher",
        description="teacher; random: the teacher's config with random weights; or the path or URL of a checkpoint or "
        "run to start from",
    )  # the usual start: the teacher itself, cut
    surgery: list[SurgeryOp] = Field(
        default_factory=list,
        description="operations on it, in order: [{op: query_heads, to: 2, by: importance|weight_norm|index}, "
        "{op: drop_blocks, blocks: [1]}, {op: upcycle, experts: 4, top_k: 2, how: copy|partition}]: docs/surgery.md",
    )
    importance_rows: Positive = Field(
        default=64,
        exclude_if=lambda value: value == 64,  # runs from before there was importance are the same
        description="for by: importance: number of training rows on which it is measured, counted from the first",
    )  # as long as a few training steps; twice as many changed at most 3% of the choices
    layer_map: list[Index] | None = Field(
        default=None,
        description=(
            "the teacher's blocks at which the student's begin, ascending; student block i is made from block "
            "layer_map[i] and stands for those up to the next entry; default: block for block, or what drop_blocks "
            "leaves"
        ),
    )
    projector: Literal["none", "linear"] = Field(
        default="none", description="linear: learned maps between the student's width and the teacher's, in each block"
    )  # widths are usually equal; projectors are left out of the export

    lora: LoraConfig | None = Field(
        default=None,
        exclude_if=_unset,  # runs from before there were adapters are the same
        description="train only low-rank adapters on matrices: {rank: 8, alpha: 16, targets: [attention/q, "
        "attention/v]}",
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        names = [op.op for op in self.surgery]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"surgery names {', '.join(twice)} twice: name it once, with its final value")
        chosen = [op.spelled for op in self.surgery if op.chosen_by != "index"]
        if self.init == "random" and chosen:
            raise ValueError(f"init: random has no weights to choose by, but surgery has {', '.join(chosen)}")
        measured = [op.spelled for op in self.surgery if op.by == "importance"]
        if self.init != "teacher" and measured:
            raise ValueError(f"importance is the teacher's, for init: teacher, but surgery has {', '.join(measured)}")
        return self
