"""Files of a run that are damaged, lost, or another run's: one right answer for whoever reads them, and a way on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from distillcache.models.checkpoint import load_pretrained, read_config
from distillcache.models.text.tokenizer import load_tokenizer
from distillcache.schemas.config import TrainConfig
from distillcache.schemas.config.train import StudentConfig, SurgeryOp
from distillcache.schemas.errors import CheckpointError, DamageError, DistillcacheError, PlanMismatchError
from distillcache.schemas.format.checkpoint import CheckpointRecord, commit, read_record
from distillcache.schemas.format.run import checkpoint_key, digest_evaluations, whole_steps
from distillcache.schemas.format.run_identity import file_digest
from distillcache.schemas.store.store import Store
from distillcache.tools import cli
from distillcache.tools.report.run import lost_warnings
from distillcache.trainer.run.checkpoints import load_student
from distillcache.trainer.run.folder import best_evaluation, read_ending, read_evaluations, shown_config
from distillcache.trainer.run.metrics_log import find_lost_lines, read_metrics
from distillcache.trainer.train import train

Console = pytest.CaptureFixture[str]


def config(run: Path, cache: Path, **changes: object) -> TrainConfig:
    """Checkpoints and evaluations after 2 and 4 steps."""
    values: dict[str, object] = {
        "run": str(run),
        "cache": str(cache),
        "student": StudentConfig(surgery=[SurgeryOp(op="query_heads", to=2, by="index")]),
        "train_only": ["attention/o"],  # so that most of the student is frozen, and read from its folder alone
        "steps": 4,
        "batch_rows": 4,
        "checkpoint_every": 2,
        "eval_every": 2,
        "eval_batch_rows": 4,
        "eval_teacher": False,
    }
    return TrainConfig.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Read only."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    train(config(run, cache))
    return run


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Another run: of another seed. Read only."""
    run = tmp_path_factory.mktemp("runs") / "foreign"
    train(config(run, cache, seed=1))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def flip(file: Path) -> None:
    """Change a digit of a text, or a bit in the middle: it still parses."""
    data = bytearray(file.read_bytes())
    texts = file.suffix in (".json", ".jsonl", ".yaml")
    digits = [at for at, byte in enumerate(data) if chr(byte).isdigit()] if texts else []
    # A number's last digits may be beyond a double, and mean nothing: the first after a point counts.
    digits = [at for at in digits if data[at - 1] == ord(".")] or digits
    data[digits[len(digits) // 2] if digits else len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def into_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def into_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


CHANGED: list[Callable[[Path], None]] = [flip, truncate, empty, Path.unlink, into_folder, into_loop]
damages = pytest.mark.parametrize("damage", CHANGED, ids=lambda each: each.__name__)


def values(run: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(load_student(str(run)).decoder))]


@damages
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_the_student_is_not_used_where_a_file_of_it_changed(run: Path, cache: Path, name: str, damage) -> None:
    damage(run / "student" / name)
    readers: list[Callable[[], object]] = [
        lambda: load_student(str(run)),  # export
        lambda: load_pretrained(run / "checkpoints/best"),  # student.init, teacher.path
    ]
    if damage in (flip, Path.unlink):
        readers.append(lambda: train(config(run, cache)))  # resumes
    if name != "config.json" or damage is flip:
        readers.append(lambda: load_pretrained(run / "student"))
    for read in readers:
        with pytest.raises(DistillcacheError) as caught:
            read()
        assert name in str(caught.value)


@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=lambda each: each.__name__)
def test_its_tokenizer_is_not_read_where_it_changed(run: Path, damage) -> None:
    """By those who read no weights: a run may be the source of a tokenizer alone."""
    damage(run / "student/tokenizer.json")
    for read in (load_tokenizer, read_config):
        with pytest.raises(CheckpointError) as caught:
            read(run)
        assert "student/tokenizer.json" in str(caught.value)


def test_a_weight_file_that_the_run_did_not_write_is_not_read(run: Path) -> None:
    shutil.copy(run / "student/model.safetensors", run / "student/router_bias.safetensors")
    with pytest.raises(CheckpointError, match="not what was written") as caught:
        load_student(str(run))
    assert "remove it" in str(caught.value)
    (run / "student/router_bias.safetensors").unlink()
    (run / "student/README.md").write_text("mine")
    load_student(str(run))


def as_version_before(run: Path) -> None:
    """Take away what versions before this one did not write."""
    found = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(
        json.dumps({k: v for k, v in found.items() if k not in ("files", "digest")}, indent=1)
    )
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if k not in ("of_run", "digest")}))
    store = Store(str(run))
    for step in whole_steps(store):
        data = json.loads((run / checkpoint_key(step) / "checkpoint.json").read_text())
        parts = {name: data[name] for name in ("step", "feed", "parts")}
        commit(store, checkpoint_key(step), CheckpointRecord.model_validate(parts))


def test_a_run_of_the_version_before_is_read_resumed_and_not_blamed(run: Path, cache: Path, console: Console) -> None:
    expected = values(run)
    as_version_before(run)
    assert "figures" not in (run / checkpoint_key(4) / "checkpoint.json").read_text()
    flip(run / "metrics.jsonl")
    assert read_evaluations(run)[-1].step == 4
    assert read_ending(Store(str(run))) is not None
    shutil.rmtree(run / checkpoint_key(4))
    train(config(run, cache))
    assert "lines are" not in console.readouterr().err
    for found, value in zip(values(run), expected, strict=True):
        np.testing.assert_array_equal(found, value)


@damages
@pytest.mark.parametrize("name", ["checkpoint.json", "p0000.json", "p0000-000.safetensors"])
def test_a_damaged_checkpoint_is_named_with_what_helps(run: Path, cache: Path, name: str, damage, console: Console):
    file = run / checkpoint_key(4) / name
    damage(file)
    if name == "checkpoint.json" and damage in (Path.unlink, into_folder):  # as if it were not finished
        assert not cli.main(["export", str(run), str(run.parent / "out")])
        assert "ended at step 4, whose checkpoint is gone" in console.readouterr().err
        return
    if name.endswith("safetensors") and damage in (flip, truncate):
        shutil.copy(run / checkpoint_key(2) / name, file)  # the optimizer's part is of no interest to an export
    with pytest.raises(DistillcacheError) as caught:
        load_student(str(run))
    assert str(file.parent) in str(caught.value)
    assert f"delete {file.parent}: the run resumes from the checkpoint before it" in str(caught.value)


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(run: Path, cache: Path, console: Console) -> None:
    expected = values(run)
    truncate(run / checkpoint_key(4) / "p0000-000.safetensors")
    empty(run / checkpoint_key(4) / "p0000.json")
    with pytest.raises(CheckpointError) as caught:
        train(config(run, cache))
    assert str(run / checkpoint_key(4)) in str(caught.value)
    shutil.rmtree(run / checkpoint_key(4))  # as the message says
    assert train(config(run, cache)).resumed_from == 2
    assert (
        "the run had ended at step 4; its checkpoint is gone, so it continues from step 2" in console.readouterr().err
    )
    for found, value in zip(values(run), expected, strict=True):
        np.testing.assert_array_equal(found, value)


def test_a_checkpoint_of_another_run_is_not_taken(run: Path, foreign: Path) -> None:
    shutil.copytree(foreign / checkpoint_key(4), run / checkpoint_key(4), dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_student(str(run))
    assert "of run" in str(caught.value)
    assert load_student(str(run), 2).step == 2


@pytest.mark.parametrize("lost", [[2], [0, 1], [1, 2]])
def test_a_resumed_run_says_which_lines_of_metrics_are_lost(run: Path, cache: Path, console: Console, lost: list[int]):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] not in lost]
    (run / "metrics.jsonl").write_text("".join(kept))
    (run / "summary.json").unlink()
    shutil.rmtree(run / checkpoint_key(4))
    train(config(run, cache))
    told = [line for line in console.readouterr().err.splitlines() if "metrics.jsonl" in line]
    steps = ", ".join(map(str, lost))
    assert len(told) == 1
    assert str(run / "metrics.jsonl") in told[0]
    assert f"{len(lost)} of 3 lines are missing; steps without a line: {steps}" in told[0]
    assert [line["step"] for line in read_metrics(run)] == [step for step in range(5) if step not in lost]
    assert not find_lost_lines(Store(str(run)))  # the new checkpoint counts on the lines that there are


@pytest.mark.parametrize("damage", [flip, truncate, empty, Path.unlink], ids=lambda each: each.__name__)
def test_report_and_viewer_say_that_metrics_are_not_what_was_written(run: Path, damage) -> None:
    damage(run / "metrics.jsonl")
    (said,) = lost_warnings(Store(str(run)))
    assert "metrics.jsonl: up to step 4" in said


def test_a_changed_record_of_surgery_is_said(run: Path, cache: Path, console: Console) -> None:
    for damage, said in ((flip, "not what was written"), (Path.unlink, "missing")):
        damage(run / "surgery.json")
        assert lost_warnings(Store(str(run))) == [f"{run}/surgery.json is {said}."]
    assert train(config(run, cache)).resumed_from == 4
    assert f"warning: {run}/surgery.json is missing" in console.readouterr().err


def test_metrics_as_written_are_not_blamed(run: Path) -> None:
    assert not find_lost_lines(Store(str(run)))
    with (run / "metrics.jsonl").open("a") as stream:  # a resumed run's next steps, which no checkpoint counts on yet
        stream.write('{"step": 5, "distill/total_loss": 1.0}\n{"step": 6, "dist')
    assert not find_lost_lines(Store(str(run)))


def test_evaluations_of_another_run_and_changed_ones_are_refused(run: Path, foreign: Path, cache: Path) -> None:
    for damage in (flip, truncate, empty, lambda file: shutil.copy(foreign / "eval.json", file)):
        shutil.copy(run / "eval.json", run / "kept")
        damage(run / "eval.json")
        for read in (
            lambda: read_evaluations(run),
            lambda: best_evaluation(str(run)),
            lambda: load_pretrained(run / "checkpoints/best"),
            lambda: train(config(run, cache)),
        ):
            with pytest.raises(DistillcacheError) as caught:
                read()
            assert "eval.json" in str(caught.value)
            assert "delete it" in str(caught.value)
        shutil.move(run / "kept", run / "eval.json")


def test_without_evaluations_the_best_is_not_known_and_the_rest_works(run: Path, cache: Path, console: Console) -> None:
    (run / "eval.json").unlink()
    with pytest.raises(CheckpointError, match="evaluations are missing"):
        best_evaluation(str(run))
    assert train(config(run, cache)).steps == 4
    assert "eval.json is missing: 3 evaluations up to step 4" in console.readouterr().err
    assert load_student(str(run)).step == 4


def test_a_kept_best_checkpoint_that_is_gone_is_said(run: Path, tmp_path: Path, console: Console) -> None:
    store, found = Store(str(run)), read_evaluations(run)
    better = found[1].model_copy(update={"perplexity": 1.0, "step": 2})
    told = [entry.model_dump(mode="json") for entry in (found[0], better, found[2])]
    (run / "eval.json").write_text(json.dumps(told))
    record = read_record(store, checkpoint_key(4))
    assert record is not None
    assert record.figures is not None
    figures = record.figures | {"eval.json": digest_evaluations(told)}
    commit(store, checkpoint_key(4), record.model_copy(update={"figures": figures}))
    shutil.rmtree(run / checkpoint_key(2))
    assert not cli.main(["export", str(run), str(tmp_path / "out"), "--best"])
    assert "warning: the best evaluation is that of step 2, whose checkpoint is gone" in console.readouterr().err


@pytest.mark.parametrize("damage", [flip, truncate, empty, into_folder, into_loop], ids=lambda each: each.__name__)
def test_a_damaged_identity_is_one_error_that_names_what_is_left(run: Path, cache: Path, damage) -> None:
    damage(run / "run.json")
    for read in (
        lambda: train(config(run, cache)),
        lambda: load_student(str(run)),
        lambda: shown_config(Store(str(run))),
    ):
        with pytest.raises(DistillcacheError) as caught:
            read()
        assert "run.json" in str(caught.value)


def test_a_run_that_lost_its_identity_can_be_exported_and_begun_with(run: Path, cache: Path, console: Console) -> None:
    (run / "run.json").unlink()
    with pytest.raises(DamageError, match="a file of the run is missing") as caught:
        train(config(run, cache))
    assert f"--student.init {run}" in str(caught.value)
    out = run.parent / "out"
    assert not cli.main(["export", str(run), str(out)])
    assert "run.json is missing" in console.readouterr().err
    assert not cli.main(["report", str(run), "--out", str(out / "r.html")])
    assert "run.json is missing" in console.readouterr().out
    student = StudentConfig(init=str(run))
    assert train(config(run.parent / "new", cache, student=student, steps=1)).steps == 1


def test_the_identity_of_another_run_is_refused(run: Path, foreign: Path, cache: Path) -> None:
    shutil.copy(foreign / "run.json", run / "run.json")
    with pytest.raises(PlanMismatchError):
        train(config(run, cache))
    with pytest.raises(CheckpointError) as caught:
        load_student(str(run))
    assert "put back the run.json that belongs to the checkpoints" in str(caught.value)


def test_the_summary_is_that_of_this_run(run: Path, foreign: Path, cache: Path, console: Console) -> None:
    for damage in (flip, truncate, empty, lambda file: shutil.copy(foreign / "summary.json", file)):
        damage(run / "summary.json")
        with pytest.raises(DamageError) as caught:
            read_ending(Store(str(run)))
        assert "delete it" in str(caught.value)
    assert not cli.main(["export", str(run), str(run.parent / "out")])  # does not need it
    assert "summary.json does not say" in console.readouterr().err
    (run / "summary.json").unlink()  # as the message says
    train(config(run, cache))
    ending = read_ending(Store(str(run)))
    assert ending is not None
    assert ending.steps == 4


def test_the_config_shown_is_that_of_this_run(run: Path, foreign: Path) -> None:
    for damage in (flip_steps, truncate, empty, lambda file: shutil.copy(foreign / "config.yaml", file)):
        shutil.copy(run / "config.yaml", run / "kept")
        damage(run / "config.yaml")
        with pytest.raises(DamageError) as caught:
            shown_config(Store(str(run)))
        assert "config.yaml" in str(caught.value)
        shutil.move(run / "kept", run / "config.yaml")
    (run / "config.yaml").unlink()  # as the message says
    assert shown_config(Store(str(run)))[1]["steps"] == 4


def flip_steps(file: Path) -> None:
    file.write_text(file.read_text().replace("steps: 4", "steps: 5"))


def test_a_student_that_lost_its_config_is_not_taken_for_a_strange_folder(run: Path, cache: Path) -> None:
    (run / "student/config.json").unlink()
    for read in (lambda: train(config(run, cache)), lambda: load_student(str(run))):
        with pytest.raises(DistillcacheError, match="a file of the run is missing"):
            read()
    assert (run / checkpoint_key(4)).is_dir()


def test_the_digest_of_a_file_covers_all_its_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).bytes(1000)
    (tmp_path / "file").write_bytes(data)
    whole = file_digest(Store(str(tmp_path)), "file")
    for chunk in (1, 250, 333, 999, 1000, 1001):
        monkeypatch.setattr("distillcache.schemas.format.run_identity.CHUNK_BYTES", chunk)
        assert file_digest(Store(str(tmp_path)), "file") == whole
    assert file_digest(Store(str(tmp_path)), "none") is None
    (tmp_path / "empty").write_bytes(b"")
    assert file_digest(Store(str(tmp_path)), "empty") is not None


@pytest.mark.parametrize("of", ["run", "foreign", "link"])
def test_an_export_does_not_replace_the_student_of_a_run(
    of: str, run: Path, foreign: Path, tmp_path: Path, console: Console
) -> None:
    """It has an export's mark in its config, and without it no checkpoint can be read."""
    other = tmp_path / "other"
    shutil.copytree(foreign, other)
    (tmp_path / "link").symlink_to(run / "student")
    target = {"run": run / "student", "foreign": other / "student", "link": tmp_path / "link"}[of]
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert cli.main(["export", str(run), str(target)]) == 2
    assert "the student with which a run began" in console.readouterr().err
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
