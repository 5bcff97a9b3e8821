"""Vision-language models: their config contains the text model's, which is the part that is read."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from distillcache.models.config import ModelConfig
from distillcache.models.families.reading.family import SIZES, Family
from distillcache.models.families.reading.values import ROPE_KEYS, Values, unknown_key
from distillcache.models.files.tensors import Layout

PREFIX = "model.language_model."
# Keys of Qwen's configs beside `text_config`, and parameters of its rotation: of three axes of positions, which are
# equal for text.
AROUND = frozenset(
    {"image_token_id", "language_model_only", "video_token_id", "vision_config"}
    | {f"vision_{end}_token_id" for end in ("start", "end")}
)
MROPE = ("mrope_section", "mrope_interleaved")
EYES = ("vision_tower", "multi_modal_projector", "mm_projector", "visual")


def multimodal_layout(inner: Layout) -> Layout:
    """Layout of the text model's tensors in such a checkpoint, by transformers 5 or 4. Other tensors are foreign."""
    old = "language_model.model."
    left_out = [prefix + name.removeprefix("model.") for name in inner.foreign for prefix in (PREFIX, old)]
    return replace(
        inner,
        embed=f"{PREFIX}embed_tokens.weight",
        block=f"{PREFIX}layers.{{block}}.",
        final_norm=f"{PREFIX}norm.weight",
        foreign=(*inner.foreign, *left_out, *(f"{prefix}{part}." for prefix in ("", "model.") for part in EYES)),
        spellings=((old, PREFIX), ("language_model.lm_head.", "lm_head.")),
        more=tuple((PREFIX + name.removeprefix("model."), *rest) for name, *rest in inner.more),
    )


def read_language_model(values: Values, text: Family) -> ModelConfig:
    """The decoder that `text_config` means.

    Args:
        text: the family of the language model.

    Raises:
        CheckpointError: there is none inside, it is of another family, or sizes are beside it.
    """
    for key in (*SIZES, *ROPE_KEYS):  # beside `text_config` transformers would not read them
        if values[key] is not None:
            raise unknown_key(values.file, key, values[key])
    inner = Values(text_config(values, text), text.defaults, values.file, text.aliases)
    inner.check_keys(text.understood, text.neutral)
    config = text.read(inner)
    inner.check_stated(config)
    return config


def read_vision_language(values: Values, text: Family, family: str) -> ModelConfig:
    """The same, as a decoder of the vision-language family. Its head is tied if the config around `text_config` says
    so, as in transformers, or where that is silent the one inside."""
    config = replace(read_language_model(values, text), family=family)
    if values["tie_word_embeddings"] is None:
        return config
    return replace(config, tie_embeddings=values.flag("tie_word_embeddings"))


def vision_language_family(
    name: str,
    architecture: str,
    text: Family,
    *,
    layout: Callable[[ModelConfig], Layout] | None = None,
    harmless: frozenset[str] = AROUND,
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
) -> Family:
    """The family of a vision-language model whose text model is read by `read_vision_language`, and exported.

    Args:
        layout: default: `multimodal_layout` of the text model's.
    """
    return Family(
        name=name,
        architecture=architecture,
        defaults={"text_config": None, "tie_word_embeddings": None},
        read=lambda values: read_vision_language(values, text, name),
        write=text.write,
        layout=layout or (lambda config: multimodal_layout(text.layout(config))),
        harmless=harmless,
        neutral=neutral or {},
    )


def text_config(values: Values, text: Family) -> Mapping[str, Any]:
    """`text_config`, an object of this family."""
    text_family(values, text)
    return values["text_config"]


def text_family(values: Values, *families: Family) -> Family:
    """The family of `text_config`, an object; the first one where it does not say. Some files name the family around it
    there, which transformers reads as the text model.

    Raises:
        CheckpointError: it is none of these.
    """
    found = values["text_config"]
    if isinstance(found, dict):
        for family in families:
            names = (family.name, family.name.removesuffix("_text"), *family.also)
            if found.get("model_type", families[0].name) in names:
                return family
    known = " or ".join(name for family in families for name in (family.name, *family.also))
    raise values.bad("text_config", f"an object: the config of a {known}")
