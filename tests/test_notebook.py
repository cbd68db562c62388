"""The notebooks run on a tiny run, and are kept without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from toy_run import ToyRun, toy_run

__all__ = ["toy_run"]
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


# jupyter_client warns about its own defaults, zmq about sockets that the kernel's end closes.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, toy_run: ToyRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FTW_RUN", str(toy_run.run))
    monkeypatch.setenv("FTW_HOME", str(toy_run.home))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows pictures
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(toy_run.folder / name))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert any("correlation" in output.get("text", "") for output in outputs)
