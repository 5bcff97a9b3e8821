"""Pictures that are drawn in a test."""

from typing import Any

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of what is drawn, from above, filled when it is saved."""
    found: list[Any] = []
    save = Figure.savefig

    def keep(figure: Figure, *words: Any, **settings: Any) -> None:
        save(figure, *words, **settings)
        found.extend(figure.axes)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found
