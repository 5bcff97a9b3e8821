"""The tokenizer that a cache keeps, which made the tokens of its rows."""

from distillcache.models.text.tokenizer import TextTokenizer, tokenizer_from_json
from distillcache.schemas.cache.segment import read_tokenizer
from distillcache.schemas.errors import MEND_NEXT, DamageError
from distillcache.schemas.format.layout import TOKENIZER
from distillcache.schemas.format.manifest import Plan
from distillcache.schemas.store.store import Store


def cache_tokenizer(store: Store, plan: Plan) -> TextTokenizer:
    """The tokenizer of a cache with this plan.

    Raises:
        DamageError: it is missing, or is not what was committed.
    """
    data, facts = read_tokenizer(store), {"file": store.where(TOKENIZER)}
    try:
        found = tokenizer_from_json(data.decode(), plan.rows.eos_id)
        if found.digest != plan.rows.tokenizer_digest:  # tokenizer.json does not say so
            split = tokenizer_from_json(data.decode(), plan.rows.eos_id, splits_special=True)
            found = split if split.digest == plan.rows.tokenizer_digest else found
    except Exception as error:  # the tokenizers library raises bare ones; of a cache that is being built, any bytes
        raise DamageError("the cache's tokenizer cannot be read", {**facts, "cause": error}, MEND_NEXT) from error
    if found.digest != plan.rows.tokenizer_digest:  # nothing else vouches for it while the cache is being built
        facts |= {"found": f"digest {found.digest}", "expected": f"digest {plan.rows.tokenizer_digest}, the plan's"}
        raise DamageError("the cache's tokenizer is not the one that made its rows", facts, MEND_NEXT)
    return found
