"Every notebook of the suite, executed by papermill at budget smoke, without network."
import os
import shutil
import tempfile
import time

import pytest

from tests import warm
from tests.site import NBS, notebooks


def can_fork_kernels():
    "Linux that tells when a process ends; some sandboxes do not."
    try: os.close(os.pidfd_open(os.getpid())); return True
    except (AttributeError, OSError): return False


@pytest.fixture(scope="session")
def warm_kernels():
    "A folder for JUPYTER_PATH whose kernels are forks of one process, see tests/warm.py; None where each gets its own interpreter."
    if not can_fork_kernels() or os.environ.get("TIMET_COLD"): yield None; return
    folder = tempfile.mkdtemp(prefix="warm")              # a socket's name must be short
    server = warm.start(folder)
    yield folder
    server.stdin.close(); server.wait(30); shutil.rmtree(folder)


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(NBS).as_posix())
def test_notebook_runs(path, tmp_path, monkeypatch, warm_kernels):
    "The pages at the top run as `timet run` runs them; the others share the imports of libraries, and leave no HTML."
    from timet_nb.cli import notebook_parameters, run_notebook
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TIMET_DATA", raising=False)
    top = path.parent == NBS
    if warm_kernels and not top: monkeypatch.setenv("JUPYTER_PATH", warm_kernels, prepend=os.pathsep)
    start = time.perf_counter()
    given = {"budget": "smoke"} if "budget" in notebook_parameters(path) else {}
    run_notebook(str(path), given, out=tmp_path / "run", timeout=300, html=top)
    print(f"{path.name}: {time.perf_counter() - start:.1f} s")


def test_warm_kernel_is_a_fresh_one(tmp_path, monkeypatch, warm_kernels):
    "Nothing of ours is loaded in it, folder and environment are those of the run, and it ends when it is killed or takes too long."
    if not warm_kernels: pytest.skip("warm kernels need Linux with pidfd_open, and are off with TIMET_COLD=1")
    import nbformat
    from timet_nb.cli import NotebookFailed, run_notebook
    monkeypatch.setenv("JUPYTER_PATH", warm_kernels, prepend=os.pathsep); monkeypatch.setenv("TIMET_WORD", "here")
    def said(*sources, **how):
        "What the last cell printed, or the error."
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
        nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
        nbformat.write(nb, tmp_path / "toy.ipynb")
        try: folder = run_notebook(str(tmp_path / "toy.ipynb"), out=tmp_path / "run", html=False, **how)
        except NotebookFailed as e: return str(e)
        return nbformat.read(folder / "toy.ipynb", 4).cells[-1].outputs[0].text.split()
    ours = "import os, sys\nleft = [m for m in sys.modules if m.split('.')[0] in ('timet_nb', 'tests')]"
    tell = "print(len(left), 'torch' in sys.modules, os.getcwd(), os.environ['TIMET_WORD'], os.environ['OMP_NUM_THREADS'], os.getpid())"
    empty, warmed, cwd, word, threads, first = said(ours, tell)
    assert (empty, warmed, cwd, word, threads) == ("0", "True", str(tmp_path), "here", "1")
    assert said(ours, tell)[-1] != first and not os.path.exists(f"/proc/{first}")
    assert "DeadKernelError" in said("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    pid = tmp_path / "pid"
    assert "CellTimeoutError" in said(f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)", timeout=2)
    assert not os.path.exists(f"/proc/{pid.read_text()}")
