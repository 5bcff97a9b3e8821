"""Keys of tokenizer_config.json that change which tokens a text has, beyond what tokenizer.json says.

As transformers 5.24 does it: `split_special_tokens` counts; `add_bos_token` and `add_eos_token` do not, where there is
a tokenizer.json. `add_prefix_space` counts for some classes alone (GPT-2, Qwen2), and for all in versions before 5.
`fix_mistral_regex` replaces how text is cut, for Mistral's large vocabularies.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from distillcache.models.files.gguf.tokenizer import TEKKEN_SPLIT
from distillcache.models.text.chat_files import TOKENIZER_CONFIG, read_settings
from distillcache.schemas.errors import InputError
from distillcache.schemas.store.path import Location

SPLITS_SPECIAL = "split_special_tokens"
CUT_ANEW = "fix_mistral_regex"
LARGE = 100_000  # tokens; transformers leaves smaller vocabularies as they are
MISTRALS = ("mistral", "mistral3", "voxtral", "ministral", "pixtral")  # of model_type


def splits_special(folder: Location, backend: Tokenizer) -> bool:
    """Return whether special tokens that a text spells are cut as any other text.

    Raises:
        InputError: a key asks for other tokens than tokenizer.json gives.
    """
    config = read_settings(folder / TOKENIZER_CONFIG)
    found = config.get(SPLITS_SPECIAL, False)
    if not isinstance(found, bool):
        raise _refused(folder, {SPLITS_SPECIAL: found, "expected": "true or false"}, "correct it, or remove the key")
    steps = list(_steps(json.loads(backend.to_str()).get("pre_tokenizer")))
    _check_prefix(folder, config.get("add_prefix_space"), steps)
    if config.get(CUT_ANEW) is True and backend.get_vocab_size() > LARGE and _is_mistral(folder):
        patterns = [step["pattern"].get("Regex") for step in steps if isinstance(step.get("pattern"), dict)]
        if TEKKEN_SPLIT not in patterns:
            raise _refused(
                folder,
                {CUT_ANEW: True, "tokenizer.json": "cuts text in the old way"},
                "load it with transformers (AutoTokenizer.from_pretrained(..., fix_mistral_regex=True)), save it with "
                "save_pretrained, and name that tokenizer",
            )
    return found


def _check_prefix(folder: Location, wanted: object, steps: list[Mapping[str, Any]]) -> None:
    """Raise where the files disagree whether a text begins with a space: versions of transformers differ in whom they
    believe.
    """
    own = [step.get("add_prefix_space") for step in steps if step.get("type") == "ByteLevel"]
    if isinstance(wanted, bool) and own and own[0] is not wanted:
        raise _refused(
            folder,
            {"add_prefix_space": str(wanted).lower(), "tokenizer.json": f"add_prefix_space: {str(own[0]).lower()}"},
            "give both files the value with which the model was trained",
        )


def _is_mistral(folder: Location) -> bool:
    return read_settings(folder / "config.json").get("model_type", "mistral") in MISTRALS


def _steps(value: object) -> Iterator[Mapping[str, Any]]:
    """A pre-tokenizer's steps, in order: itself, or those of its `Sequence`."""
    if isinstance(value, dict) and isinstance(value.get("pretokenizers"), list):
        for each in value["pretokenizers"]:
            yield from _steps(each)
    elif isinstance(value, dict):
        yield value


def _refused(folder: Location, facts: Mapping[str, object], next: str) -> InputError:
    what = f"{TOKENIZER_CONFIG} asks for other tokens than tokenizer.json gives"
    return InputError(what, {"file": folder / TOKENIZER_CONFIG, **facts}, next)
