"""Identity of a build: the settings that determine what is recorded, and the differences of two builds."""

from typing import Any

from distillcache.cache_builder.prepare import open_rows
from distillcache.cache_builder.text.digest import inputs_digest
from distillcache.models.checkpoint import weights_digest
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.cache.segment import read_plan
from distillcache.schemas.config import BuildSpec
from distillcache.schemas.config.differences import differing, told
from distillcache.schemas.errors import InputError, PlanMismatchError
from distillcache.schemas.format.manifest import Manifest, Plan
from distillcache.schemas.store.store import Store


def finished_plan(store: Store, spec: BuildSpec, teacher: str, tokenizer: TextTokenizer, manifest: Manifest) -> Plan:
    """The plan of a finished cache.

    Args:
        teacher: the current path of its checkpoint.

    Raises:
        PlanMismatchError: the cache belongs to another config.
    """
    plan = read_plan(store, manifest.segments[0].segment)
    if plan is None:
        raise InputError("the cache has a manifest but no plan", {"cache": store.url}, "build it elsewhere")
    rows = open_rows(spec.data)
    identities = {
        "weights": (plan.teacher.weights_digest, weights_digest(teacher)),
        "tokenizer": (plan.rows.tokenizer_digest, tokenizer.digest),
        "text": (plan.rows.text_digest, rows.index.text_digest if rows else inputs_digest(spec.data, tokenizer)),
    }
    differences = config_differences(plan, spec) | {
        name: (then, now) for name, (then, now) in identities.items() if then != now
    }
    if differences:
        raise PlanMismatchError(
            "the cache is finished and belongs to another config",
            {"cache": store.url, **told(differences)},
            "name another cache, or add to this one with --extend",
        )
    return plan


def config_differences(plan: Plan, spec: BuildSpec) -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (plan's config, this one), for fields that determine what is recorded; paths do not."""
    # Some fields are written only where they are set.
    there, here = plan.config, spec.model_dump(mode="json")
    known = (here.keys() | there.keys()) & BuildSpec.model_fields.keys()
    then, now = ({name: _compared(name, values.get(name)) for name in known} for values in (there, here))
    return differing(then, now)


def _compared(name: str, value: Any) -> Any:
    return row_settings(value or {}) if name == "data" else value


def row_settings(data: dict[str, Any]) -> dict[str, Any]:
    """Select the data settings that the rows depend on, besides the text and the tokenizer."""
    return {name: value for name, value in data.items() if name not in ("path", "tokenizer")}
