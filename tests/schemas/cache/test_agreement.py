"""Files of a cache whose digests fit and whose values make no sense: one error, in whatever opens it."""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.errors import DamageError, DistillcacheError
from distillcache.schemas.format.checkpoint import CheckpointRecord, SavedArrays, commit, held_whole, write_arrays
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.store.store import Store
from distillcache.tools.look.inspect import describe_cache
from distillcache.tools.look.inspect_print import print_cache
from distillcache.tools.look.verify import verify_cache
from distillcache.trainer.feed.cache_source import CacheSource

PLAN, STATS, MANIFEST = "segments/0000/plan.json", "segments/0000/stats.json", "manifest.json"
WRONG = [None, -1, 0, 2**31, 2**63, 2**70, 1.5, 1e999, float("nan"), "x", "", "\ud800", [], {}, True, [1], "../x"]


def spelled(content: Any) -> bytes:
    """As canonical.py spells a model, with a digest that fits."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    body = text.encode("utf-8", "surrogatepass")
    return body[:-1] + b',"digest":"' + digest_bytes(body).encode() + b'"}'


def content(path: Path) -> Any:
    found = json.loads(path.read_bytes())
    del found["digest"]
    return found


def rewrite(cache: Path, name: str, changed: Any) -> None:
    """The file with other content, and a manifest that names its new digest."""
    (cache / name).write_bytes(spelled(changed))
    if name != MANIFEST:
        manifest = content(cache / MANIFEST)
        manifest["segments"][0]["files"][name.rpartition("/")[2]] = digest_bytes((cache / name).read_bytes())
        (cache / MANIFEST).write_bytes(spelled(manifest))


@pytest.fixture
def copied(cache: Path, tmp_path: Path) -> Path:
    return shutil.copytree(cache, tmp_path / "c")


CONTRADICTIONS: list[tuple[str, str, Any]] = [
    (PLAN, "rows.count", 39),
    (PLAN, "rows.row_tokens", 2**31),
    (PLAN, "rows.eval_indices", [3, 2]),
    (PLAN, "rows.eval_indices", [38]),
    (PLAN, "rows.tokens", 10**6),
    (PLAN, "shard_rows", 9),
    (PLAN, "shard_rows", 2**40),
    (PLAN, "batch_rows", 0),
    (PLAN, "blocks", [0, 0]),
    (PLAN, "blocks", [0, 1, 3]),
    (PLAN, "teacher.hidden_size", 25),
    (PLAN, "teacher.hidden_size", 2**45),
    (PLAN, "taps", []),
    (PLAN, "taps.0.codec", "int9"),
    (PLAN, "taps.0.name", "mlp_out"),
    (PLAN, "taps.0.slots", [0, 1]),
    (PLAN, "taps.0.slots", [0, 2, 1]),
    (PLAN, "taps.0.k", 4),
    (PLAN, "taps.0.group", 7),
    (PLAN, "taps.0.delta", True),
    (PLAN, "taps.0.parts", []),
    (PLAN, "taps.0.parts.0.dtype", "float16"),
    (PLAN, "taps.0.parts.0.width", 23),
    (PLAN, "taps.0.parts.0.every", 2),
    (PLAN, "taps.0.parts.0.slots", 2**30),
    (PLAN, "taps.0.parts.0.slots_per_object", 0),
    (PLAN, "taps.0.parts.0.bits_of", "float16"),
    (PLAN, "config", {}),
    (STATS, "taps", {}),
    (STATS, "taps.resid.square_sum", [1.0]),
    (STATS, "taps.resid.abs_max.0", -1.0),
    (STATS, "taps.resid.count", -1),
    (MANIFEST, "segments", []),
    (MANIFEST, "rows", 37),
    (MANIFEST, "segments.0.rows", 37),
    (MANIFEST, "segments.0.rows_of", "0000"),
    (MANIFEST, "segments.0.index_length", 1),
    (MANIFEST, "segments.0.segment", "0001"),
    (MANIFEST, "segments.0.files", {}),
]


@pytest.mark.parametrize(("name", "field", "value"), CONTRADICTIONS, ids=lambda each: str(each)[-30:])
def test_a_contradiction_is_damage(copied: Path, name: str, field: str, value: Any) -> None:
    changed = content(copied / name)
    *path, last = (int(key) if key.isdigit() else key for key in field.split("."))
    place = changed
    for key in path:
        place = place[key]
    place[last] = value
    rewrite(copied, name, changed)
    if name == STATS:
        assert any(STATS in warning for warning in describe_cache(Store(str(copied)))["warnings"])
        return
    with pytest.raises(DamageError):
        open_cache(Store(str(copied)))
    assert not verify_cache(Store(str(copied)), quick=True)["ok"]


def test_rows_of_another_length_than_the_plan_says(copied: Path) -> None:
    """Arrays of 15 tokens would fit into the chunks of 16, were it not for their digests."""
    for row_tokens in (15, 17):
        changed = content(copied / PLAN)
        changed["rows"]["row_tokens"], changed["rows"]["tokens"] = row_tokens, 300
        rewrite(copied, PLAN, changed)
        with pytest.raises(DamageError):
            CacheSource(str(copied))[[0]]
        assert not verify_cache(Store(str(copied)))["ok"]


def leaves(found: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(found, dict | list):
        keys = found if isinstance(found, dict) else range(min(len(found), 2))
        for key in keys:
            yield from leaves(found[key], (*path, key))


@pytest.mark.parametrize("name", [PLAN, STATS, MANIFEST, "segments/0000/times.json"])
def test_no_value_ends_in_a_traceback(copied: Path, name: str) -> None:
    """A sample, always the same; what is accepted is opened, described, verified and read."""
    drawn, store, before = random.Random(0), Store(str(copied)), content(copied / name)
    places = [path for path in leaves(before) if path[0] not in ("config", "created")]
    manifest = (copied / MANIFEST).read_bytes()
    for path in drawn.sample(places, min(len(places), 20)):
        changed = copy.deepcopy(before)
        place = changed
        for key in path[:-1]:
            place = place[key]
        value = drawn.choice([*WRONG, "lost"])
        if value == "lost":
            del place[path[-1]]
        else:
            place[path[-1]] = value
        rewrite(copied, name, changed)
        for use in (
            lambda: verify_cache(store, quick=True),
            lambda: print_cache(describe_cache(store)),
            lambda: CacheSource(str(copied))[[0, 1]],
        ):
            try:
                use()
            except DistillcacheError:
                pass
            except Exception as error:
                raise AssertionError(f"{name} {path} = {value!r}") from error
        (copied / MANIFEST).write_bytes(manifest)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("shape", value) for value in ([3, 5], [2**40, 2**40], [-1, 4])),
        *(("start", value) for value in ([1, 0], [0])),
        ("array", "parameters/b"),
        ("offset", -1),
        ("file", "../x"),
    ],
)
def test_a_checkpoint_whose_index_makes_no_sense(tmp_path: Path, field: str, value: Any) -> None:
    store, arrays = Store(str(tmp_path)), {"parameters/a": held_whole(np.zeros((3, 4), np.float32))}
    write_arrays(store, "c", 0, "", arrays)
    part = content(tmp_path / "c/p0000.json")
    part["pieces"][0][field] = value
    (tmp_path / "c/p0000.json").write_bytes(spelled(part))
    commit(store, "c", CheckpointRecord(step=1, feed={}, parts=(digest_bytes(spelled(part)),)))
    with pytest.raises(DamageError):
        SavedArrays(store, "c").whole("parameters", "a")
