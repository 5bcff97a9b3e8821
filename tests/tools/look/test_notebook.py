"""The example notebook and the page about Python, run on a cache as it stands."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"
NOTEBOOK = DOCS / "examples" / "look_at_a_cache.ipynb"
KERNEL = ("nbclient", "ipykernel")


def test_the_page_about_python(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call on it, in its order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "caches").mkdir()
    (tmp_path / "caches" / "mine").symlink_to(cache)
    (tmp_path / "caches" / "other").symlink_to(cache)
    text = (DOCS / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert len(blocks) > 5
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["row.svg", "sample.npz"]


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    assert len({cell["id"] for cell in cells}) == len(cells)


@pytest.mark.slow  # a kernel takes seconds to start
def test_the_notebook_runs(cache: Path, tmp_path: Path) -> None:
    missing = [name for name in KERNEL if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"a notebook is run by {', '.join(missing)}: pip install -e '.[notebook]'")
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (settings,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    settings.source = f"cache, out = {str(cache)!r}, {str(tmp_path / 'sample.safetensors')!r}"
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    said = "".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        for cell in notebook.cells
        for output in cell.get("outputs", ())
    )
    assert "34 train + 4 eval of 16 tokens" in said
    assert "nothing odd in these rows" in said
    assert said.count("<Figure") == 2
    assert (tmp_path / "sample.safetensors").exists()
