"""What a plan says of the machine and of the decoder's own roundings."""

from pathlib import Path

import pytest

from distillcache.cache_builder.record.plan import settle_plan
from distillcache.models.describe import FORWARD, FORWARD_REVISION, describe_numerics
from distillcache.schemas.cache.segment import read_plan
from distillcache.schemas.errors import PlanMismatchError
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.layout import plan_key
from distillcache.schemas.store.store import Store


def test_float32_plans_name_no_revision_of_the_forward():
    """Its bits are those of the first revision, so builds that began with that go on."""
    assert FORWARD not in describe_numerics("float32", ()).versions
    assert describe_numerics("bfloat16", ()).versions[FORWARD] == FORWARD_REVISION


def test_a_bfloat16_build_of_the_first_revision_is_not_gone_on_with(tmp_path: Path, cache: Path):
    plan = read_plan(Store(str(cache)), "0000")
    assert plan is not None
    now = plan.model_copy(update={"numerics": describe_numerics("bfloat16", ())})
    kept = {name: value for name, value in now.numerics.versions.items() if name != FORWARD}
    before = now.model_copy(update={"numerics": now.numerics.model_copy(update={"versions": kept})})
    store = Store(str(tmp_path / "begun"))
    store.write(plan_key("0000"), to_canonical(before))
    with pytest.raises(PlanMismatchError, match=r'numerics\.versions\.forward +there null, here "2"'):
        settle_plan(store, now, accept_platform=False)
    assert settle_plan(store, now, accept_platform=True) == before
