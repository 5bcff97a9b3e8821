"""A run's metrics, read back: lines, and TensorBoard's scalars and images of routers."""

from pathlib import Path

import numpy as np

from schemas.storage import Store
from tests.trainer.events import logged_images, logged_scalars
from trainer.metrics_log import PIXELS, MetricsLog, read_loads, read_metrics


def test_lines_and_events_say_the_same(tmp_path: Path) -> None:
    log = MetricsLog(Store(str(tmp_path)), -1)
    for step in range(3):
        log.log(step, {"distill/total_loss": 0.5 / (step + 1), "perf/tokens_per_s": 1e6 + step})
    log.close()
    lines = read_metrics(tmp_path)
    assert len(lines) == 3
    scalars = logged_scalars(tmp_path / "tensorboard")
    assert len(scalars) == 6
    for line in lines:
        step = line.pop("step")
        assert {name: np.float32(value) for name, value in line.items()} == {
            name: np.float32(scalars[name, step]) for name in line
        }


def test_what_a_killed_run_repeats_is_plotted_once(tmp_path: Path) -> None:
    """A run that goes on from step 1 purges what the one before it wrote from step 2 on."""
    store = Store(str(tmp_path))
    for last, value in ((-1, 1.0), (1, 2.0)):
        log = MetricsLog(store, last)
        for step in range(last + 1, 4):
            log.log(step, {"distill/total_loss": value})
        log.close()
    expected = {("distill/total_loss", step): 1.0 if step < 2 else 2.0 for step in range(4)}
    assert logged_scalars(tmp_path / "tensorboard") == expected
    assert [line["distill/total_loss"] for line in read_metrics(tmp_path)] == [1.0, 1.0, 2.0, 2.0]


def test_images_of_routers(tmp_path: Path) -> None:
    """A row of squares is a block, a column an expert: black without tokens, grey at the mean, white at twice it."""
    log = MetricsLog(Store(str(tmp_path)), -1)
    load = np.asarray([[5.0, 5.0, 5.0, 5.0], [0.0, 10.0, 10.0, 20.0]], np.float32)
    log.log_load(7, [2, 3], load)
    log.close()
    ((tag, step, image),) = logged_images(tmp_path / "tensorboard")
    assert (tag, step, image.shape[:2]) == ("router/load", 7, (2 * PIXELS, 4 * PIXELS))
    grey = image[PIXELS // 2 :: PIXELS, PIXELS // 2 :: PIXELS]
    grey = grey[..., 0] if grey.ndim == 3 else grey
    np.testing.assert_allclose(grey, [[0.5] * 4, [0, 0.5, 0.5, 1]], atol=1 / 250)
    assert read_loads(tmp_path) == [{"step": 7, "blocks": [2, 3], "share": [[0.25] * 4, [0, 0.25, 0.25, 0.5]]}]
