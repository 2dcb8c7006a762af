"A run for every core: the results of a loop, errors that name their job, and no process left behind."
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from timet_nb.base import cores as module
from timet_nb.base.cores import every_core
from timet_nb.base.runtime import ConfigError, run_context

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks")


@pytest.fixture(autouse=True)
def one_thread():
    "One torch thread, as forking needs; and no child may outlive its test."
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)
    assert multiprocessing.active_children() == []


def walk(s, steps=20):
    "A short training that seeds itself."
    with run_context(s):
        w = torch.randn(30, 30, requires_grad=True)
        for _ in range(steps):
            (grad,) = torch.autograd.grad((torch.randn(8, 30) @ w).tanh().square().mean(), w)
            w = (w - grad).detach().requires_grad_()
        return w.detach()


@linux
def test_each_job_has_a_process_of_its_own():
    pids = every_core(os.getpid, [()] * 5, 2)
    assert len(set(pids)) == 5 and os.getpid() not in pids
    assert set(every_core(os.getpid, [()] * 5, 1)) == {os.getpid()} == set(every_core(os.getpid, [()], 8))


@linux
def test_results_keep_the_order_of_the_jobs_however_the_children_end(tmp_path):
    "The first job waits for the file that the last one writes."
    def job(k):
        if k == 2: (tmp_path / "done").touch()
        while k == 0 and not (tmp_path / "done").exists(): pass
        return k
    assert every_core(job, [(0,), (1,), (2,)], 3) == [0, 1, 2]


@pytest.mark.parametrize("cores", [1, 2, 3, 7, None])
def test_equal_to_the_sequence_to_the_bit(cores):
    jobs = [(s,) for s in range(5)]
    for a, b in zip(every_core(walk, jobs, cores), [walk(*j) for j in jobs], strict=True): assert torch.equal(a, b)


@linux
def test_lambdas_closures_generators_and_objects():
    shift = 3
    def add(a): return a + shift
    class Adder:
        def __call__(self, a): return a + shift
    jobs = ((a,) for a in range(4))
    assert every_core(add, jobs, 2) == every_core(lambda a: a + shift, [(a,) for a in range(4)], 2) == [3, 4, 5, 6]
    assert every_core(Adder(), [(1,), (2,)], 2) == [4, 5]
    assert every_core(lambda f: f(2), [(lambda x: x + 1,), (lambda x: x * 5,)], 2) == [3, 10]       # arguments are not pickled either


@pytest.mark.parametrize("cores", [1, 2])
def test_error_names_the_job_and_keeps_the_cause(cores):
    def job(name, s):
        if s == 2: raise KeyError("gate")
        return s
    with pytest.raises(RuntimeError, match=r"job job\('no gate', 2\): got KeyError: 'gate'") as e:
        every_core(job, [("no gate", s) for s in range(4)], cores)
    assert type(e.value.__cause__) is KeyError and e.value.__cause__.args == ("gate",)
    if cores > 1: assert "in job" in e.value.__cause__.__notes__[0]                                # where, in the child


@linux
def test_others_are_stopped_and_nothing_new_begins_after_an_error(tmp_path):
    def job(k):
        (tmp_path / f"{k}-{os.getpid()}").touch()
        if k == 1:
            while not list(tmp_path.glob("0-*")): pass
            raise ValueError("no")
        while True: signal.pause()
    with pytest.raises(RuntimeError, match=r"job job\(1\)"): every_core(job, [(k,) for k in range(6)], 2)
    begun = sorted(p.name.split("-") for p in tmp_path.iterdir())
    assert [k for k, _ in begun] == ["0", "1"]
    for _, pid in begun:
        with pytest.raises(ProcessLookupError): os.kill(int(pid), 0)


@linux
@pytest.mark.parametrize("ends, code", [(lambda: os.kill(os.getpid(), signal.SIGKILL), "-9"), (lambda: os._exit(3), "3")])
def test_a_child_that_dies_is_an_error_and_not_a_wait(ends, code):
    with pytest.raises(RuntimeError, match=rf"\('b'\): got ChildProcessError: .* code {code} ") as e:
        every_core(lambda name: ends() if name == "b" else name, [("a",), ("b",), ("c",)], 2)
    assert type(e.value.__cause__) is ChildProcessError


@linux
def test_exit_inside_a_job_is_told():
    with pytest.raises(RuntimeError, match="SystemExit: 4"): every_core(sys.exit, [(4,), (4,)], 2)


class TwoWords(Exception):
    "An error that pickle writes and cannot read."
    def __init__(self, a, b): super().__init__(a)


@linux
def test_what_cannot_travel_is_told():
    with pytest.raises(RuntimeError, match="cannot be sent between processes"): every_core(lambda x: lambda: x, [(1,), (2,)], 2)
    def bad(x): raise TwoWords("a", "b")
    with pytest.raises(RuntimeError, match="TwoWords.*cannot be sent"): every_core(bad, [(1,), (2,)], 2)


INTERRUPTED = """
    import os, signal, sys, torch
    from timet_nb.base.cores import every_core
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell's background job inherits "ignore"
    def job(k):
        print(os.getpid(), flush=True)
        while True: signal.pause()
    try: every_core(job, [(k,) for k in range(5)], 2)
    except KeyboardInterrupt: print("stopped", flush=True)
"""


@linux
def test_ctrl_c_leaves_no_children():
    "SIGINT to the whole group of processes, as a terminal sends it: the parent stops, the children are gone and print no traceback."
    told = subprocess.Popen([sys.executable, "-c", textwrap.dedent(INTERRUPTED)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)
    pids = [int(told.stdout.readline()) for _ in range(2)]
    os.killpg(told.pid, signal.SIGINT)
    said, errors = told.communicate(timeout=60)
    assert said == "stopped\n" and "Traceback" not in errors and told.returncode == 0
    for pid in pids:
        with pytest.raises(ProcessLookupError): os.kill(pid, 0)


@linux
def test_keyboard_interrupt_in_the_parent(monkeypatch):
    def stop(pipes): raise KeyboardInterrupt
    monkeypatch.setattr(module, "wait", stop)
    with pytest.raises(KeyboardInterrupt): every_core(lambda k: signal.pause(), [(0,), (1,), (2,)], 2)
    assert multiprocessing.active_children() == []


@linux
def test_ctrl_c_between_a_fork_and_its_note(monkeypatch):
    "The moment at which a child is there and nobody knows it yet."
    begun, start = [], module._start
    def start_and_stop(run, job):
        pipe, child = start(run, job)
        begun.append(child.pid); os.kill(os.getpid(), signal.SIGINT)
        return pipe, child
    monkeypatch.setattr(module, "_start", start_and_stop)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): every_core(lambda k: signal.pause(), [(0,), (1,)], 2)
    assert len(begun) == 1 and signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ProcessLookupError): os.kill(begun[0], 0)


@linux
def test_what_a_job_loads_the_next_ones_have(tmp_path, monkeypatch):
    "A package that only its job imports: the parent has it afterwards, and the later child before it begins."
    (tmp_path / "lazy_for_cores").mkdir()
    (tmp_path / "lazy_for_cores" / "__init__.py").write_text("from . import inner")
    (tmp_path / "lazy_for_cores" / "inner.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    def job(k):
        there = "lazy_for_cores.inner" in sys.modules
        import lazy_for_cores                             # noqa: F401
        sys.modules["no such module"] = sys               # cannot be imported: passed over
        while k == 1 and not (tmp_path / "go").exists(): pass
        if k == 2: (tmp_path / "go").touch()
        return there
    assert every_core(job, [(0,), (1,), (2,)], 2) == [False, False, True]
    assert {"lazy_for_cores", "lazy_for_cores.inner"} <= set(sys.modules) and "no such module" not in sys.modules
    for name in ("lazy_for_cores", "lazy_for_cores.inner"): sys.modules.pop(name)


@linux
def test_from_a_thread_that_is_not_the_first():
    with ThreadPoolExecutor(1) as pool: assert pool.submit(every_core, lambda k: k + 1, [(0,), (1,)], 2).result(60) == [1, 2]


@linux
def test_beside_a_gpu_a_child_tries_a_backward_pass_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not in_this_process(cores=2)
    def refused(): raise RuntimeError("Unable to handle autograd's threading in combination with fork-based multiprocessing")
    monkeypatch.setattr(module, "_backward", refused)
    with pytest.warns(UserWarning, match="backward"): assert in_this_process(cores=2)


@linux
def test_big_results():
    "Far more than a pipe holds, from several children at once; no shared memory, no file left open."
    before = len(os.listdir("/proc/self/fd"))
    for k, x in enumerate(every_core(lambda k: torch.full((3_000_000,), float(k)), [(k,) for k in range(4)], 3)):
        assert x.shape == (3_000_000,) and (x == k).all()
    assert len(os.listdir("/proc/self/fd")) == before


@linux
def test_unseeded_jobs_draw_the_same_in_processes_and_not_in_line():
    def job(k): return torch.rand(()).item()
    with run_context(0): line = every_core(job, [(k,) for k in range(3)], 1)
    with run_context(0):
        forked = every_core(job, [(k,) for k in range(3)], 2)
        after = torch.rand(()).item()
    assert len(set(line)) == 3 and set(forked) == {line[0]} == {after}            # the parent's generator has not moved


def in_this_process(**how): return set(every_core(os.getpid, [()] * 3, **how)) == {os.getpid()}


def test_one_core_and_few_jobs_stay_here():
    assert in_this_process(cores=1) and every_core(abs, [], 4) == [] and every_core(abs, [(-1,)], 4) == [1]


@linux
@pytest.mark.parametrize("target, name, value, word", [(torch.cuda, "is_initialized", lambda: True, "CUDA"), (torch, "get_num_threads", lambda: 4, "threads"),
                                                       (sys, "platform", "darwin", "Linux"), (multiprocessing, "parent_process", lambda: 1, "already")])
def test_where_forking_is_not_safe_jobs_stay_here(monkeypatch, target, name, value, word):
    "Asked for processes, it says why there are none; not asked, it is silent."
    assert not in_this_process(cores=2)
    monkeypatch.setattr(target, name, value)
    with pytest.warns(UserWarning, match=word): assert in_this_process(cores=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert in_this_process() and in_this_process(cores=1)


@linux
def test_jobs_of_jobs_stay_in_their_process():
    def outer(k):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return set(every_core(os.getpid, [()] * 3)) == {os.getpid()}
    assert every_core(outer, [(0,), (1,)], 2) == [True, True]


@linux
def test_threads_that_worked_before_do_no_harm():
    "After sums with two threads, and one thread again, children compute."
    torch.set_num_threads(2)
    x = torch.ones(700, 700)
    want = (x @ x).exp().sum().item()
    torch.set_num_threads(1)
    assert every_core(lambda k: (x @ x).exp().sum().item(), [(0,), (1,)], 2) == [want] * 2


@pytest.mark.parametrize("cores", [0, -1, 1.5, "2"])
def test_refuses_a_count_that_is_none(cores):
    with pytest.raises(ConfigError, match="1 or more"): every_core(abs, [(1,)], cores)


def test_refuses_arguments_outside_a_tuple():
    with pytest.raises(ConfigError, match=r"\(x,\) for one"): every_core(abs, [(1,), 2])
    with pytest.raises(ConfigError, match="'ab'"): every_core(lambda a, b: a + b, ["ab"])
