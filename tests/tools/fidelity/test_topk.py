"""Recorded logits against the teacher's: each planted fault is named, ties and rounding are not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.schemas.codecs import TopK
from distillcache.schemas.config import TapsConfig, TopKConfig
from distillcache.schemas.format.tap_plan import topk_plan
from distillcache.tools.diff.caches import compare_caches
from distillcache.tools.fidelity.command import compare_rows
from distillcache.tools.fidelity.live_teacher import LiveTeacher
from distillcache.tools.fidelity.topk import measure_topk
from distillcache.tools.look.stored_rows import StoredRows
from tests.conftest import TINY, build_config
from tests.tools.look.planting import Change, Values, plant

K, VOCAB = 6, 263


@pytest.fixture(scope="module")
def recorded(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of logits and one tap."""
    folder = tmp_path_factory.mktemp("logits") / "c"
    build_cache(build_config(folder, teacher, corpus, taps=TapsConfig(resid=None, topk_logits=TopKConfig(k=K))))
    return folder


@pytest.fixture(scope="module")
def live(teacher: Path) -> LiveTeacher:
    return LiveTeacher(str(teacher), "float32", ("attn_out",), topk_plan(TopKConfig(k=K), TINY.hidden_size, VOCAB, 257))


def looked(cache: Path, live: LiveTeacher) -> dict[str, Any]:
    rows = StoredRows(str(cache))
    return compare_rows(rows, live, rows.sample(6, seed=0))


def test_whole_logits_are_faithful(recorded: Path, live: LiveTeacher) -> None:
    found = looked(recorded, live)
    assert found["verdict"]["kind"] == "faithful", found["findings"]
    figures = found["topk_logits"]
    assert figures["wrong_rows"] == figures["impossible"] == 0
    assert figures["shared"] > 0.95
    assert figures["error"] == pytest.approx(figures["expected"], rel=0.1)
    assert figures["above"] == pytest.approx(0, abs=1e-4)


def with_part(name: str, change: Any) -> Change:
    """Another part of the logits, in every row."""

    def changed(_: int, rows: list, values: Values) -> tuple[list, Values]:
        return rows, {**values, name: change(values[name])}

    return changed


def rolled(_: int, rows: list, values: Values) -> tuple[list, Values]:
    names = [name for name in values if name.startswith("topk_logits")]
    return rows, {**values, **{name: np.roll(values[name], 1, axis=2) for name in names}}


FAULTS: dict[str, tuple[Change, str, str]] = {
    "ids": (with_part("topk_logits.ids", lambda ids: (ids + 1) % VOCAB), "other-logits", "of the ids are others"),
    "values": (with_part("topk_logits", lambda values: values * 0.5), "other-logits", "values are 0.5 times"),
    "logsumexp": (
        with_part("topk_logits.logsumexp", lambda sums: sums + 1),
        "other-logits",
        "logsumexp is off by +1 nats",
    ),
    "too small": (with_part("topk_logits.logsumexp", lambda sums: sums - 9), "other-logits", "add up to more than 1"),
    "shifted": (rolled, "shifted-tokens", "the ids at a token are those of 1 before it"),
    "nan": (with_part("topk_logits", lambda values: values * np.nan), "non-finite", "in topk_logits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(recorded: Path, live: LiveTeacher, tmp_path: Path, fault: str) -> None:
    change, kind, words = FAULTS[fault]
    found = looked(plant(recorded, tmp_path / "c", change), live)
    assert found["verdict"]["kind"] == kind, found["findings"]
    assert words in found["verdict"]["line"]


def test_ties_may_change_places() -> None:
    own = TopK(np.asarray([[5.0, 3.0, 3.0]]), np.asarray([[7, 1, 2]]), np.asarray([6.0]))  # type: ignore[arg-type]
    given = TopK(np.asarray([[5.0, 3.0, 3.0]]), np.asarray([[7, 9, 1]]), np.asarray([6.0]))  # type: ignore[arg-type]
    found = measure_topk(0, ("0000", 0), given, own, np.asarray(own.values), np.ones(1, bool), 1e-3, 2.0**-24)
    assert not found.wrong
    assert found.shared == pytest.approx(2 / 3)
    far = TopK(np.asarray([[5.0, 4.0, 3.0]]), np.asarray([[7, 9, 1]]), np.asarray([6.0]))  # type: ignore[arg-type]
    found = measure_topk(0, ("0000", 0), far, own, np.asarray(own.values), np.ones(1, bool), 1e-3, 2.0**-24)
    assert found.reasons() == ["33% of the ids are others"]


def test_two_caches_logits(recorded: Path, tmp_path: Path) -> None:
    a = StoredRows(str(recorded))
    same = compare_caches(a, StoredRows(str(recorded)), 4, 0)
    assert same["findings"] == []
    assert same["topk_logits"]["shared"] == 1
    other = StoredRows(str(plant(recorded, tmp_path / "c", FAULTS["ids"][0])))
    found = compare_caches(a, other, 4, 0)
    assert [each["kind"] for each in found["findings"]] == ["other-logits"]
    assert "the recorded logits are wrong: topk_logits against A" in found["summary"][0]


def test_rounded_values_beside_an_exact_sum_are_no_fault() -> None:
    """As two caches of one teacher have them: large logits in bfloat16, with probabilities that sum to over 1."""
    exact = np.asarray([[30.06, 29.94]])
    rounded = np.asarray([[30.125, 30.0]])  # to steps of 1/8, upwards
    total = np.asarray([float(np.log(np.exp(exact).sum()))])
    stored = TopK(rounded, np.asarray([[3, 4]]), total)  # type: ignore[arg-type]
    assert np.exp(rounded[0] - total[0]).sum() > 1.06
    of_bf16 = measure_topk(0, ("0000", 0), stored, stored, rounded, np.ones(1, bool), 1e-6, 2.0**-8)
    assert not of_bf16.wrong
    of_float32 = measure_topk(0, ("0000", 0), stored, stored, rounded, np.ones(1, bool), 1e-6, 2.0**-24)
    assert of_float32.reasons() == ["probabilities that add up to more than 1, of 1 token"]
