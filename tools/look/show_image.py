"""A row of a cache as a picture: documents and masks over heat maps of norms and of similarities between blocks."""

import io
from typing import Any

import numpy as np

from distillcache.schemas.store.whole_file import write_file
from distillcache.tools.look.row_facts import RowFacts, shown
from distillcache.tools.pages.pictures import METADATA

LABELLED_TOKENS = 80  # more would overlap
INCHES = (14, 2.2)  # width, and height of a panel


def draw(facts: RowFacts, path: str) -> None:
    """Write the picture in the format of the suffix.

    Raises:
        StorageError: it cannot be written there.
    """
    from matplotlib import rc_context  # here, since it takes a while to import
    from matplotlib.figure import Figure

    panels: list[tuple[str, Any]] = [("documents", None)]
    for tap in facts.taps:
        panels.append((f"{tap.tap}: log10 norm", (tap, np.log10(np.maximum(tap.norm, 1e-9)))))
        if tap.tap == "resid" and len(tap.cosine):
            panels.append(("resid: cosine to the next slot", (tap, tap.cosine)))
    heights = [0.5, *[1.0] * (len(panels) - 1)]
    # No dates and no random ids: the same row is the same picture.
    with rc_context({"svg.hashsalt": "row", "svg.fonttype": "none"}):
        figure = Figure(figsize=(INCHES[0], INCHES[1] * sum(heights) + 1), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        figure.suptitle(f"row {facts.number}, {facts.row.split}, shard {facts.shard[1]} of segment {facts.shard[0]}")
        _documents(axes[0], facts)
        for panel, (title, content) in zip(axes[1:], panels[1:], strict=True):
            _heat(figure, panel, title, content, facts)
        _label_tokens(axes[-1], facts)
        data = io.BytesIO()
        kind = path.rpartition(".")[2]
        figure.savefig(data, format=kind, dpi=110, metadata=METADATA[kind])
    write_file(path, data.getvalue(), says=True)


def _documents(panel: Any, facts: RowFacts) -> None:
    """A band for each document, numbered; beneath it what counts as a target."""
    for number, start, stop in facts.documents:
        color = ("#cfe0f3", "#f5d9b8")[number % 2]
        panel.axvspan(start - 0.5, stop - 0.5, ymin=0.5, color=color)
        panel.text((start + stop - 1) / 2, 0.75, str(number), ha="center", va="center", fontsize=8)
    counted = np.flatnonzero(facts.row.loss_mask)
    panel.bar(counted, 0.4, width=1.0, color="#4d7f57")
    panel.set_yticks([0.2, 0.75], ["targets", "documents"])
    panel.set_ylim(0, 1)


def _heat(figure: Any, panel: Any, title: str, content: Any, facts: RowFacts) -> None:
    tap, values = content
    masked = np.where(facts.real[None, :], values, np.nan)
    image = panel.imshow(masked, aspect="auto", interpolation="nearest", cmap="cividis", origin="lower")
    step = -(-len(values) // 8)
    places = range(0, len(values), step)
    panel.set_yticks(list(places), [str(tap.slots[at]) for at in places])
    panel.set_ylabel("slot")
    panel.set_title(title, loc="left", fontsize=10)
    figure.colorbar(image, ax=panel, pad=0.01)


def _label_tokens(panel: Any, facts: RowFacts) -> None:
    count = len(facts.token_texts)
    panel.set_xlim(-0.5, count - 0.5)
    if count > LABELLED_TOKENS:
        panel.set_xlabel("token")
        return
    # A dollar sign would begin a formula.
    labels = [
        shown(text).replace("$", r"\$")[:12] if real else ""
        for text, real in zip(facts.token_texts, facts.real, strict=True)
    ]
    panel.set_xticks(range(count), labels, rotation=90, fontsize=7)
