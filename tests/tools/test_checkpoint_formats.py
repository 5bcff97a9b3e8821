"""The command line with checkpoints of other kinds: MaxText's in and out, and a run as the next one's teacher."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from distillcache.models.checkpoint import load_pretrained, weights_digest
from distillcache.models.files.maxtext.export import save_maxtext
from distillcache.tools import cli
from distillcache.trainer.run.checkpoints import load_student
from tests.models.test_checkpoint import assert_same_parameters


@pytest.mark.slow
def test_a_maxtext_teacher_a_maxtext_student_and_a_student_of_that(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("orbax.checkpoint", reason="Orbax writes the checkpoints: the extra `maxtext`")
    monkeypatch.chdir(tmp_path)
    save_maxtext(load_pretrained(teacher), "teacher", tokenizer_from=teacher)
    sizes = ["--data.path", str(corpus), "--data.row-tokens", "16", "--data.eval-rows", "4", "--batch-rows", "4"]
    assert cli.main(["build", "--cache", "cache", "--teacher.path", "teacher", *sizes]) == 0
    steps = ["--steps", "2", "--batch-rows", "4"]
    cut = ["--student.surgery", "[{op: query_heads, to: 2, by: index}]"]
    assert cli.main(["train", "--run", "run", "--cache", "cache", *steps, *cut]) == 0
    student = load_student("run").decoder
    assert cli.main(["export", "run", "out", "--format", "maxtext"]) == 0
    back = load_pretrained("out")
    for (path, ours), (_, value) in zip(*(nnx.to_flat_state(nnx.state(x)) for x in (back, student)), strict=True):
        np.testing.assert_allclose(ours.get_value(), value.get_value(), rtol=3e-7, err_msg=str(path))

    assert cli.main(["train", "--run", "again", "--cache", "cache", "--student.init", "run", *steps]) == 0
    assert_same_parameters(load_pretrained("again/student"), student)
    assert cli.main(["build", "--cache", "next", "--teacher.path", "run/checkpoints/2", *sizes]) == 0
    assert weights_digest("run/checkpoints/2") == weights_digest("run")
    assert cli.main(["fidelity", "next"]) == 0
