"Runs that are killed, interrupted or terminated, and then end with the same bytes as if nothing had happened."
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.train_toys import ended, forked, run, same
from timet_nb.base import store as S
from timet_nb.base import train as T
from timet_nb.base.train import CheckpointStore, load_history

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    before = torch.get_num_threads(); torch.set_num_threads(1)
    run(out, 20)
    torch.set_num_threads(before)
    return out


def check_same(whole, out):
    "Same weights, optimiser, random states, teacher, counters, log."
    a, b = (CheckpointStore(p / "checkpoints").load() for p in (whole, out))
    assert a.step == b.step == 20 and same(a.tensors, b.tensors) and same(a.state, b.state)
    name = "checkpoints/step-00000020/model.safetensors"
    for file in (name, "log.csv"): assert (whole / file).read_bytes() == (out / file).read_bytes()
    assert not [p for p in (out / "checkpoints").iterdir() if not p.name.startswith("step-")]


def die_at(owner, name, call, before):
    "Make this process SIGKILL itself at one call of a function, before or after it."
    real, calls = getattr(owner, name), [0]
    def dying(*args, **kwargs):
        calls[0] += 1
        if before and calls[0] == call: os.kill(os.getpid(), signal.SIGKILL)
        out = real(*args, **kwargs)
        if calls[0] == call: os.kill(os.getpid(), signal.SIGKILL)
        return out
    setattr(owner, name, dying)


def half_write(call):
    "Make this process die in the middle of writing a file."
    real, calls = S._write_bytes, [0]
    def dying(path, data):
        calls[0] += 1
        if calls[0] == call:
            with open(path, "wb") as f: f.write(data[: len(data) // 2]); f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, data)
    S._write_bytes = dying


SPOTS = [lambda n: half_write(n),                                  # a file of a checkpoint, half written
         lambda n: die_at(S, "_sync_folder", n, True),             # all files there, not yet renamed
         lambda n: die_at(os, "rename", n, True), lambda n: die_at(os, "rename", n, False),
         lambda n: die_at(S.shutil, "rmtree", n, True),            # the new one there, the old ones not yet removed
         lambda n: die_at(S, "_write_log", 1, True),               # the log about to be written again
         lambda n: die_at(T._Run, "_one", 3 * n, False),            # between two steps
         lambda n: die_at(T._Run, "gradients", 3 * n, False)]      # within one


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments_and_resumed(whole, tmp_path, seed):
    rng, killed = random.Random(seed), 0
    for _ in range(60):
        spot, n = rng.choice(SPOTS), rng.randint(1, 3)
        def job(): spot(n); run(tmp_path, 20)
        code = ended(forked(job))
        if code == 0: break
        assert code == -signal.SIGKILL
        killed += 1
        if killed == 8: run(tmp_path, 20); break
    assert killed >= 2
    check_same(whole, tmp_path)


@pytest.mark.parametrize("spot", range(len(SPOTS)))
def test_killed_once_at_every_spot(whole, tmp_path, spot):
    run(tmp_path, 4)
    assert ended(forked(lambda: (SPOTS[spot](2), run(tmp_path, 20)))) == -signal.SIGKILL
    run(tmp_path, 20)
    check_same(whole, tmp_path)


def test_killed_from_outside_with_workers(whole, tmp_path):
    "A real process, its loading workers, and SIGKILL at moments that nobody chose."
    code = f"import torch; torch.set_num_threads(1); from tests.train_toys import run; run({str(tmp_path)!r}, 20, workers=2, delay=.01)"
    root, rng, killed = Path(__file__).resolve().parent.parent, random.Random(0), 0
    for attempt in range(12):
        child = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.PIPE)
        log, begun = tmp_path / "log.csv", time.time()
        if attempt < 2:
            size = log.stat().st_size if log.exists() else 0
            while child.poll() is None and time.time() - begun < 60 and not (log.exists() and log.stat().st_size > size): time.sleep(.005)
            time.sleep(rng.random() * .15); child.kill()
        error = child.communicate()[1].decode()
        if child.returncode == 0: break
        assert child.returncode == -signal.SIGKILL, error
        killed += 1
    assert killed >= 2
    check_same(whole, tmp_path)


@pytest.mark.parametrize("workers, asked, code", [(0, signal.SIGINT, 130), (2, signal.SIGINT, 130), (0, signal.SIGTERM, 143)])
def test_ctrl_c_saves_and_ends(whole, tmp_path, workers, asked, code):
    pid = forked(lambda: (os.setpgid(0, 0), signal.signal(signal.SIGINT, signal.default_int_handler), run(tmp_path, 20, workers=workers, delay=.02)))
    log, begun = tmp_path / "log.csv", time.time()
    while time.time() - begun < 30 and not log.exists(): time.sleep(.01)
    if asked == signal.SIGINT: os.killpg(pid, asked)          # as a terminal does: to the workers as well
    else: os.kill(pid, asked)
    assert ended(pid) == code
    done = CheckpointStore(tmp_path / "checkpoints").load().step
    assert 0 < done < 20 and load_history(tmp_path)[-1]["step"] in (done, done - 1)
    run(tmp_path, 20)
    check_same(whole, tmp_path)


def test_second_ctrl_c_does_not_wait(tmp_path):
    def stuck(model, i): time.sleep(30)
    pid = forked(lambda: (signal.signal(signal.SIGINT, signal.default_int_handler), run(tmp_path, 20, after_step=stuck)))
    while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text(): time.sleep(.01)
    time.sleep(.7)
    begun = time.time(); os.kill(pid, signal.SIGINT); time.sleep(.2); os.kill(pid, signal.SIGINT)
    assert ended(pid) == 130 and time.time() - begun < 20       # the step lasts thirty
    assert CheckpointStore(tmp_path / "checkpoints").steps() == []       # nothing half-done was saved


def test_handlers_come_back(tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    run(tmp_path, 2)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
