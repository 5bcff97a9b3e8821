"""What a run's student is made of: the teacher's own numbers, random ones or a checkpoint's; what is written down."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from distillcache.cache_builder.build import build_cache
from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.decoder import Decoder
from distillcache.models.surgery import operate
from distillcache.schemas.config import TrainConfig
from distillcache.schemas.config.student import StudentConfig, SurgeryOp
from distillcache.schemas.errors import CheckpointError, ConfigError, Interrupted
from distillcache.schemas.store.store import Store
from distillcache.tools import cli
from distillcache.tools.commands import export
from distillcache.trainer import loop
from distillcache.trainer import train as training
from distillcache.trainer.feed.cache_source import CacheSource
from distillcache.trainer.run.checkpoints import load_student
from distillcache.trainer.run.stages import idle_note, resolve_stages
from distillcache.trainer.run.student import open_student, start_parameters, surgery_done
from distillcache.trainer.step.parameters import all_parameters, install
from distillcache.trainer.step.targets import block_starts
from distillcache.trainer.train import train
from tests.conftest import build_config
from tests.models.surgery.test_operate import assert_blocks, blocks_of
from tests.trainer.test_train import Stop, assert_same_run, config


def opened(run: Path, cache: Path, seed: int = 0, *, must_differ: bool = False, **values: Any):
    def open_source(taps, blocks):
        return CacheSource(str(cache), taps, blocks, "train", leaving=False)

    student = StudentConfig.model_validate(values)
    return open_student(
        Store(str(run)),
        student,
        open_source((), None),
        seed=seed,
        open_source=open_source,
        must_differ=must_differ,
    )


@pytest.mark.parametrize(
    "values", [{"layer_map": [0, 2]}, {"surgery": [{"op": "drop_blocks", "blocks": [1]}]}], ids=str
)
def test_some_blocks_of_the_teacher(tmp_path: Path, cache: Path, teacher: Path, values: dict):
    student = opened(tmp_path, cache, **values)
    blocks = blocks_of(load_pretrained(teacher))
    assert_blocks(blocks_of(student), [blocks[0], blocks[2]])
    assert block_starts(StudentConfig.model_validate(values), 3) == [0, 2]
    (done,) = json.loads((tmp_path / "surgery.json").read_text())
    assert (done["op"], done["kept"]) == ("drop_blocks", [0, 2])
    assert_blocks(blocks_of(opened(tmp_path, cache, **values)), blocks_of(student))  # read back


def test_a_student_without_the_first_block_begins_with_the_teachers_stream():
    dropped = SurgeryOp(op="drop_blocks", blocks=[0, 2])
    assert block_starts(StudentConfig(surgery=[dropped]), 5) == [0, 3, 4]
    assert block_starts(StudentConfig(surgery=[dropped], layer_map=[1, 3, 4]), 5) == [1, 3, 4]
    assert block_starts(StudentConfig(surgery=[dropped], init="path/to/other"), 5) is None


def test_random_students_have_the_surgerys_sizes_and_the_runs_seed(tmp_path: Path, cache: Path, teacher: Path):
    values = {"init": "random", "layer_map": [0, 1], "surgery": [{"op": "mlp_width", "to": 16}]}
    first, again, other = (opened(tmp_path / str(at), cache, seed=seed, **values) for at, seed in enumerate((1, 1, 2)))
    assert (first.config.num_blocks, first.config.intermediate_size) == (2, 16)
    assert_blocks(blocks_of(again), blocks_of(first))
    for stranger in (blocks_of(other)[0], blocks_of(load_pretrained(teacher))[0]):
        assert not np.array_equal(blocks_of(first)[0]["attention/q"], stranger["attention/q"])


def test_what_the_default_chose_is_said_afterwards(tmp_path: Path, cache: Path):
    run, asked = Store(str(tmp_path)), [{"op": "query_heads", "to": 2, "by": None}, {"op": "mlp_width", "to": 16}]
    assert surgery_done(run, asked) == asked  # nothing is made yet
    opened(tmp_path, cache, surgery=asked)
    assert [op["by"] for op in surgery_done(run, asked)] == ["importance", "importance"]
    assert surgery_done(run, asked[1:]) == asked[1:]  # the record is of other operations
    (tmp_path / "surgery.json").write_text("[{")
    assert surgery_done(run, asked) == asked


def test_importance_decides_and_is_kept(tmp_path: Path, cache: Path):
    ops = [{"op": "mlp_width", "to": 16, "by": "importance"}, {"op": "hidden_size", "to": 20, "by": "importance"}]
    values = {"surgery": ops, "projector": "linear", "importance_rows": 6}
    student = opened(tmp_path, cache, **values)
    scores = safetensors.numpy.load((tmp_path / "importance.safetensors").read_bytes())
    neurons, stream = (op["kept"] for op in json.loads((tmp_path / "surgery.json").read_text()))
    for at, kept in enumerate(neurons):
        assert set(kept) == set(np.argsort(-scores[f"blocks/{at}/F"])[:16].tolist())
    assert set(stream) == set(np.argsort(-scores["stream"])[:20].tolist())
    parameters = start_parameters(student, StudentConfig.model_validate(values), 24, 0, Store(str(tmp_path)))
    given = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    into, out = (parameters[f"groups/0/blocks/0/projector/{side}"] for side in ("in", "out"))
    np.testing.assert_array_equal(given @ into[2], given[:, stream])
    np.testing.assert_array_equal((given[:, stream] @ out[1])[:, stream], given[:, stream])


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"layer_map": [0, 0, 2]}, "names a block twice"),
        ({"layer_map": [0, 3]}, "layer_map does not fit"),
        ({"surgery": [{"op": "hidden_size", "to": 20}]}, "projector: linear"),
        ({"surgery": [{"op": "drop_blocks", "blocks": [1]}], "layer_map": [0]}, "layer_map does not fit"),
        ({"surgery": [{"op": "mlp_width", "to": 41}]}, "1 to 40"),
    ],
    ids=str,
)
def test_refused_before_anything_is_written(tmp_path: Path, cache: Path, values: dict, named: str):
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path / "run", cache, **values)
    assert named in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_not_its_configs_is_refused_by_name(tmp_path: Path, cache: Path, teacher: Path):
    folder = tmp_path / "other"
    folder.mkdir()
    for file in teacher.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.numpy.load((folder / "model.safetensors").read_bytes())
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1]
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path / "run", cache, init=str(folder))
    assert "model.layers.0.mlp.up_proj.weight is [39, 24], expected [40, 24]" in str(caught.value)
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value.facts["missing"])
    assert "model.layers.9.mlp.up_proj.weight" in str(caught.value.facts["unknown"])


@pytest.mark.slow  # three calls of a run, with programs of its own
def test_every_operation_in_one_run(tmp_path: Path, all_rows: Path):
    """Measured, cut, upcycled, trained, stopped, gone on, exported: the same as without the stop."""
    ops = [
        {"op": "drop_blocks", "blocks": [1]},
        {"op": "query_heads", "to": 2, "by": "importance"},
        {"op": "mlp_width", "to": 24, "by": "importance"},
        {"op": "hidden_size", "to": 20, "by": "importance"},
        {"op": "upcycle", "experts": 4, "how": "partition"},
    ]
    student = {"surgery": ops, "projector": "linear", "importance_rows": 6}
    values = {"student": student, "loss": {"mlp": {"weight": 0.5}}, "steps": 3, "checkpoint_every": 1}
    train(config(tmp_path / "whole", all_rows, **values))
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, after=2)
        with pytest.raises(Interrupted):
            train(config(tmp_path / "cut", all_rows, **values))
    assert train(config(tmp_path / "cut", all_rows, **values)).resumed_from == 2
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    export.run([str(tmp_path / "whole"), str(tmp_path / "out")], "export", False)
    exported = load_pretrained(tmp_path / "out")
    assert (exported.config.family, exported.config.hidden_size, exported.config.num_blocks) == ("mixtral", 20, 2)
    assert_blocks(blocks_of(exported), blocks_of(load_student(str(tmp_path / "whole")).decoder))


# Students that are their teacher.


def changed(folder: Path, teacher: Path, of: Callable[[Decoder], Decoder] = lambda decoder: decoder, **options: Any):
    """The teacher as another checkpoint, changed by `of`."""
    save_pretrained(of(load_pretrained(teacher)), folder, tokenizer_from=teacher, **options)
    return str(folder)


def nudged(decoder: Decoder) -> Decoder:
    """One weight of the last block by its least bit."""
    down = decoder.groups[0].blocks[0].mlp.down  # type: ignore[union-attr]
    value = np.array(down.get_value())
    value[-1, -1, -1] = np.nextafter(value[-1, -1, -1], np.inf)
    down.set_value(jnp.asarray(value))
    return decoder


def padded(decoder: Decoder) -> Decoder:
    """With more rows of padding in its vocabulary."""
    wide = Decoder(replace(decoder.config, vocab_size=decoder.config.vocab_size + 9))
    parameters = all_parameters(decoder)
    widths = {"embed": ((0, 9), (0, 0)), "head": ((0, 0), (0, 9))}
    ragged = {name: jnp.pad(parameters[name], width) for name, width in widths.items()}
    install(wide, parameters | ragged)
    return wide


def stretched(decoder: Decoder) -> Decoder:
    """The same weights, another config."""
    other = Decoder(replace(decoder.config, rope=replace(decoder.config.rope, theta=5e5)))
    install(other, all_parameters(decoder))
    return other


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"surgery": [{"op": "query_heads", "to": 3}]},
        {"surgery": [{"op": "mlp_width", "to": 40, "by": "weight_norm"}, {"op": "kv_heads", "to": 2}]},
        {"layer_map": [0, 1, 2]},
        {"init": "as it is"},
        {"init": "in other files"},
        {"init": "padded"},
    ],
    ids=str,
)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(tmp_path, cache, teacher, values):
    make = {
        "as it is": lambda: str(teacher),
        "in other files": lambda: changed(tmp_path / "copy", teacher, shard_bytes=5000),
        "padded": lambda: changed(tmp_path / "padded", teacher, padded),
    }
    values = {**values, **({"init": make[values["init"]]()} if "init" in values else {})}
    with pytest.raises(ConfigError, match="the student is the teacher") as caught:
        opened(tmp_path / "run", cache, **values, must_differ=True)
    assert caught.value.facts["student.init"] == values.get("init", "teacher")
    assert not (tmp_path / "run" / "student").exists()
    assert opened(tmp_path / "run", cache, **values).config.num_blocks == 3  # where a loss teaches more
    assert opened(tmp_path / "run", cache, **values, must_differ=True)  # a run that has begun goes on


@pytest.mark.parametrize(
    "of",
    [nudged, stretched, {"surgery": [{"op": "query_heads", "to": 2}]}, {"init": "random"}, {"layer_map": [0, 1]}],
    ids=lambda of: getattr(of, "__name__", str(of)),
)
def test_a_student_that_differs_has_something_to_learn(tmp_path, cache, teacher, of):
    values: dict[str, Any] = of if isinstance(of, dict) else {"init": changed(tmp_path / "copy", teacher, of)}
    assert opened(tmp_path / "run", cache, **values, must_differ=True)


def test_the_teacher_need_not_be_there(tmp_path, cache, teacher, monkeypatch):
    """A copy is known by its digest."""
    copy, other = shutil.copytree(teacher, tmp_path / "copy"), changed(tmp_path / "other", teacher, nudged)
    monkeypatch.setattr("distillcache.trainer.run.student.is_same_model", gone)
    with pytest.raises(ConfigError, match="the student is the teacher"):
        opened(tmp_path / "run", cache, init=str(copy), must_differ=True)
    assert opened(tmp_path / "run", cache, init=other, must_differ=True)


def gone(*_: object) -> bool:
    raise CheckpointError("no such checkpoint", {"path": "nowhere"}, "name another")


@pytest.mark.parametrize(
    ("changes", "teaches"),
    [
        ({}, False),
        ({"loss": {"mlp": {"weight": 1}}}, False),
        ({"mode": "feature"}, True),
        ({"mode": "feature", "loss": {"token_weight": 0}}, False),
        ({"mode": "feature", "loss": {"alpha": 1.0}}, False),
        ({"mode": "feature", "loss": {"alpha": {"start": 1.0, "end": 0.5}}}, True),
        ({"loss": {"load_balance": {"weight": 0.1}}}, True),
        ({"loss": {"router_z": 0.1}}, True),
    ],
    ids=str,
)
def test_which_losses_teach_the_teacher(changes, teaches):
    values = TrainConfig.model_validate({"run": "r", "cache": "c", **changes})
    assert [stage.teaches_teacher for stage in resolve_stages(values, values.mesh)] == [teaches]


MLPS, HEADS = [{"op": "mlp_width", "to": 20}], [{"op": "query_heads", "to": 2}]
MLP_ALONE = {"feature": {"weight": 0}, "mlp": {"weight": 1}}
FEATURE: dict[str, Any] = {"mode": "feature", "loss": {"token_weight": 0}}
BLOCKWISE = {"mode": "blockwise", "steps": 5}


@pytest.mark.parametrize(
    ("surgery", "changes", "told"),
    [
        (MLPS, {}, "leaves attention as the teacher's"),
        ([{"op": "upcycle", "experts": 2}], {}, "leaves attention as the teacher's"),
        ([{"op": "experts", "to": 2}, {"op": "expert_width", "to": 8}], {}, "surgery (experts, expert_width)"),
        (MLPS, {"stages": [BLOCKWISE, FEATURE | {"steps": 5}]}, "stage 0, mode blockwise, has nothing"),
        (HEADS, {"loss": MLP_ALONE}, "leaves the MLPs as the teacher's"),
        (HEADS, {"loss": MLP_ALONE, "mlp_input": "student"}, None),
        (MLPS, {"loss": MLP_ALONE}, None),
        (HEADS, {}, None),
        ([*MLPS, *HEADS], {}, None),
        ([{"op": "drop_blocks", "blocks": [1]}, *MLPS], {}, None),
        (MLPS, {"loss": {"mlp": {"weight": 1}}}, None),
        (MLPS, {"loss": {"load_balance": {"weight": 0.1}}}, None),
        (MLPS, FEATURE, None),  # the stream that a block gets went through the MLPs before it
        (MLPS, {"stages": [FEATURE | {"steps": 5}, BLOCKWISE]}, None),
        ([], {}, None),
    ],
    ids=str,
)
def test_which_runs_begin_with_nothing_to_learn(surgery, changes, told):
    values = TrainConfig.model_validate({"run": "r", "cache": "c", "student": {"surgery": surgery}, **changes})
    note = idle_note(values, resolve_stages(values, values.mesh))
    assert note is None if told is None else told in note


class Ready(Exception):
    """The first step would come."""


@pytest.mark.parametrize(
    ("student", "taps", "warns"),
    [
        ({"surgery": MLPS}, None, True),
        ({"surgery": MLPS, "init": "its path"}, None, True),
        ({"surgery": MLPS, "init": "random"}, None, False),
        ({"surgery": MLPS, "layer_map": [0, 2]}, None, False),
        ({"surgery": MLPS}, {"attn_out": {}, "resid": None}, False),  # a block is given the student's own stream
    ],
    ids=["cut", "named", "random", "shallow", "own stream"],
)
def test_nothing_to_learn_is_said_before_the_first_step(
    student, taps, warns, tmp_path, cache, teacher, corpus, monkeypatch, console
):
    def ready(_: object) -> None:
        raise Ready

    monkeypatch.setattr(loop.RunLoop, "go", ready)
    if taps:
        build_cache(build_config(tmp_path / "cache", teacher, corpus, taps=taps))
    if student.get("init") == "its path":
        student = student | {"init": CacheSource(str(cache)).plan.teacher.path}
    with pytest.raises(Ready):
        train(config(tmp_path / "run", tmp_path / "cache" if taps else cache, student=student))
    said = [line for line in console.readouterr().err.splitlines() if "nothing to learn" in line]
    assert len(said) == warns
    if warns:
        assert said[0].startswith("warning: stage 0, mode blockwise, has nothing to learn: surgery (mlp_width)")


@pytest.mark.parametrize(
    ("ops", "changes", "warns"),
    [
        (MLPS, {}, "has attention as the teacher's"),
        ([{"op": "upcycle", "experts": 2}], {}, "has attention as the teacher's"),
        (HEADS, {"loss": MLP_ALONE}, "has the MLPs as the teacher's"),
        (HEADS, {}, ""),
        (MLPS, {"loss": MLP_ALONE}, ""),
        ([*MLPS, *HEADS], {}, ""),
        ("other attention", {}, ""),
    ],
    ids=str,
)
def test_an_exported_student_with_nothing_to_learn(ops, changes, warns, tmp_path, cache, console, monkeypatch):
    """Its weights tell, not the run's surgery: an export of a cut teacher was not known as one."""
    source = CacheSource(str(cache))
    student = load_pretrained(source.plan.teacher.path, dtype="float32")
    if ops == "other attention":  # as after a training

        def changed(path: Any, value: Any) -> Any:
            return value * 1.5 if "attention" in jax.tree_util.keystr(path) else value

        nnx.update(student, jax.tree_util.tree_map_with_path(changed, nnx.state(student, nnx.Param)))
    else:
        student = operate(student, [SurgeryOp.model_validate(op) for op in ops]).decoder
    save_pretrained(student, tmp_path / "exported", tokenizer_from=source.plan.teacher.path)

    def ready(_: object) -> None:
        raise Ready

    monkeypatch.setattr(loop.RunLoop, "go", ready)
    with pytest.raises(Ready):
        train(config(tmp_path / "run", cache, student={"init": str(tmp_path / "exported")}, **changes))
    said = [line for line in console.readouterr().err.splitlines() if "nothing to learn" in line]
    assert len(said) == bool(warns)
    assert not warns or warns in said[0]


@pytest.mark.parametrize("whole", [True, False], ids=["one process", "several"])
def test_the_first_of_several_processes_reads_the_student_to_compare_it(whole, tmp_path, cache, console):
    """Each of several processes has a part of the student; the first one warns as a single one does."""
    source = CacheSource(str(cache))
    run, changed = Store(str(tmp_path / "run")), [SurgeryOp.model_validate(op) for op in MLPS]
    student = operate(load_pretrained(source.plan.teacher.path, dtype="float32"), changed).decoder
    save_pretrained(student, run.where("student"))
    spec = config(tmp_path / "run", cache, student={"init": "exported"})
    stages = resolve_stages(spec, spec.mesh)
    training._warn_of_idleness(spec, stages, source, run, student if whole else None, True)
    assert "has attention as the teacher's" in console.readouterr().err
    training._warn_of_idleness(spec, stages, source, run, student if whole else None, False)
    assert not console.readouterr().err


def test_the_idle_loss_is_rounding_alone(tmp_path, cache):
    """The warning's own claim: the attention loss of a student with other MLPs is that of the teacher's own."""
    found = train(config(tmp_path / "run", cache, steps=1, student={"surgery": MLPS}))
    assert found.before is not None
    assert max(found.before.cosine) < 1e-3


def test_a_run_without_anything_to_learn_does_not_begin(tmp_path, cache, console):
    words = ["train", "--run", str(tmp_path / "run"), "--cache", str(cache), "--batch-rows", "4"]
    assert cli.main(words) == 2
    assert "error: the student is the teacher" in console.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_epoch(tmp_path, cache, console):
    source = CacheSource(str(cache), (), split="train")
    rows = len(source)
    with pytest.raises(ConfigError, match="a batch is larger than the epoch") as caught:
        train(config(tmp_path / "run", cache, batch_rows=rows + 1))
    assert (caught.value.facts["batch_rows"], caught.value.facts["rows to train on"]) == (str(rows + 1), str(rows))
    assert not (tmp_path / "run").exists()
    training._check_epoch(rows, source, True)
    # A run of the version before goes on.
    training._check_epoch(rows + 1, source, False)
    assert "warning: a batch contains rows twice" in console.readouterr().err
