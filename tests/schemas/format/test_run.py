"""A run's folder: which of its checkpoints are whole."""

from pathlib import Path

from distillcache.schemas.format.checkpoint import RECORD
from distillcache.schemas.format.run import checkpoint_key, whole_steps
from distillcache.schemas.store.store import Store


def test_whole_checkpoints_are_those_with_a_record(tmp_path: Path) -> None:
    run = Store(str(tmp_path))
    assert whole_steps(run) == []
    for step in (100, 20, 3):
        run.write(f"{checkpoint_key(step)}/0.bin", b"")
    for step in (100, 3):
        run.write(f"{checkpoint_key(step)}/{RECORD}", b"{}")
    run.write(f"checkpoints/best/{RECORD}", b"{}")
    run.write(f"checkpoints/00000007/inside/{RECORD}", b"{}")
    assert whole_steps(run) == [3, 100]
