"Every notebook of the suite, executed by papermill at budget smoke, without network."
import time

import pytest

from tests.site import NBS, notebooks


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(NBS).as_posix())
def test_notebook_runs(path, tmp_path, monkeypatch):
    from timet_nb.cli import notebook_parameters, run_notebook
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TIMET_DATA", raising=False)
    start = time.perf_counter()
    given = {"budget": "smoke"} if "budget" in notebook_parameters(path) else {}
    run_notebook(str(path), given, out=tmp_path / "run", timeout=300)
    print(f"{path.name}: {time.perf_counter() - start:.1f} s")
