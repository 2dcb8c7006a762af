"0_base/01_errors and 01_runtime: checks, messages, seeds, devices, packages, files, settings."
import errno, json, os, random, signal, subprocess, sys, textwrap, time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from timet_nb.base import runtime
from timet_nb.base.errors import one_of
from timet_nb.base.runtime import (
    CheckpointError, ConfigError, DataError, atomic_write, cache_dir, check_config, environment, expect, explain,
    get_rng_state, need, pick_device, progress, quiet, run_context, set_rng_state)

ROOT = Path(__file__).resolve().parent.parent


def python(code, *args, check=True, **env):
    "Run code in a fresh interpreter."
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, **env})
    if check: assert done.returncode == 0, done.stderr
    return done


# ---- errors ----------------------------------------------------------------------------------------------------------

def test_errors_are_value_errors_with_three_parts():
    for cls in (DataError, CheckpointError, ConfigError):
        assert issubclass(cls, ValueError) and getattr(runtime, cls.__name__) is cls
    lines = explain("frame 7", "an empty file", "a JPEG", "copy it again").splitlines()
    assert lines == ["frame 7: got an empty file", "  expected: a JPEG", "  what to do: copy it again"]
    assert "what to do" not in explain("a", 1, 2)


@pytest.mark.parametrize("pattern, shape, fits", [
    ("T 3 H W", (2, 3, 5, 6), True), ("T 3 H W", (2, 4, 5, 6), False), ("N N", (3, 3), True), ("N N", (3, 4), False),
    ("... D h w", (4, 5, 6), True), ("... D h w", (1, 2, 4, 5, 6), True), ("... D h w", (5, 6), False),
    ("B ... B", (2, 7, 7, 2), True), ("B ... B", (2, 7, 7, 3), False), ("_ _", (1, 2), True), ("", (), True), ("...", (), True)])
def test_expect_shapes(pattern, shape, fits):
    x = torch.zeros(shape)
    if fits: assert expect(x, pattern) is x and expect(x.numpy(), pattern).shape == shape
    else:
        with pytest.raises(DataError, match="got shape"): expect(x, pattern, "x")


@pytest.mark.parametrize("x, kwargs, hint", [
    (torch.zeros(2, 5, 6, 3), {}, "movedim\\(-1, -3\\)"), (torch.zeros(3, 5, 6), {}, "the T axis is missing"),
    (torch.zeros(5, 6, 3), {}, "colour is last and the T axis"), (torch.zeros(2, 5, 6), {}, "grey"),
    (torch.zeros(2, 4, 5, 6), {}, "alpha"), (torch.zeros(1, 2, 3, 5, 6), {}, "too many in front"),
    (torch.full((2, 3, 5, 6), 200.), dict(low=0, high=1), "0..255: divide by 255"),
    (torch.zeros(2, 3, 5, 6, dtype=torch.uint8), dict(dtype="float"), "0..255: divide by 255"),
    (torch.zeros(2, 3, 5, 6), dict(dtype="int"), "x.long"), (torch.full((2, 3, 5, 6), -3.), dict(low=0), r"values in \[-3, -3\]"),
    (torch.zeros(2, 3, 5, 6).double(), dict(dtype=torch.float32), "dtype float64"),
    (np.zeros((2, 3, 5, 6), np.float16), dict(dtype=("float32", "float64")), "dtype float16"),
    ([[1, 2]], {}, "got list"), ("text", {}, "got str"), (None, {}, "got NoneType")])
def test_expect_says_got_expected_and_what_to_do(x, kwargs, hint):
    with pytest.raises(DataError, match=hint) as error: expect(x, "T 3 H W", "frames", **kwargs)
    assert str(error.value).startswith("frames: got") and "expected" in str(error.value)


def test_expect_hints_the_other_way_round():
    with pytest.raises(DataError, match=r"colour is first \(CHW\)"): expect(torch.zeros(3, 5, 6), "H W 3")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.numpy(), lambda x: x.half(), lambda x: x.bfloat16(),
                                  lambda x: x.clone().requires_grad_(), lambda x: x.numpy()[::1]], ids=range(6))
def test_expect_names_the_first_bad_value(bad, make):
    x = torch.rand(3, 4, 5); x[1, 2, 3] = bad; x[2, 0, 0] = bad
    with pytest.raises(DataError, match=rf"features: got {bad} at index \(1, 2, 3\)"): expect(make(x), "A B C", "features")
    assert expect(make(x), "A B C", finite=False) is not None


def test_expect_takes_views_empty_scalars_and_bools():
    assert expect(np.zeros((4, 6))[::-1, ::2], "a b", low=0, high=1).shape == (4, 3)
    with pytest.raises(DataError, match=r"\(0, 2\)"): expect(np.array([[1, 2, np.nan]])[:, ::1][::-1], "a b")
    assert expect(torch.zeros(0, 3), "N 3", low=0, high=1).shape == (0, 3)
    assert expect(torch.tensor(1.), "") == 1 and expect(torch.ones(2, dtype=torch.bool), "N", dtype="bool").all()
    assert expect(torch.zeros(2, dtype=torch.bfloat16), "N", dtype="float").dtype == torch.bfloat16


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["A", "B", "_", "...", "1", "2", "3"]), max_size=5), st.lists(st.integers(0, 3), max_size=5))
def test_expect_agrees_with_brute_force(words, shape):
    "A pattern fits when some assignment of axes to words does; `...` may take any number of axes."
    if words.count("...") > 1: return
    n = len(shape) - (len(words) - 1) if "..." in words else 0
    spelt = [v for w in words for v in (["_"] * n if w == "..." else [w])]
    fits = n >= 0 and len(spelt) == len(shape) and all(
        (not w.isdigit() or int(w) == s) and all(w != v or w == "_" or s == t for v, t in zip(spelt, shape))
        for w, s in zip(spelt, shape))
    x = torch.zeros(shape)
    if fits: assert expect(x, " ".join(words)) is x
    else:
        with pytest.raises(DataError): expect(x, " ".join(words))


# ---- settings --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Toy:
    steps: int = 100
    learning_rate: float = 1e-4
    use_queue: bool = False
    name: str = "toy"
    betas: tuple = (.9, .95)
    limit: int | None = None


def test_check_config():
    given_ = dict(steps=3, learning_rate=1, use_queue=True, name="x", betas=[1, 2], limit=None)
    assert check_config(Toy, given_) == given_ and check_config(Toy, given_) is not given_
    for bad, hint in [({"learning_rte": 1}, "did you mean 'learning_rate'"), ({"zzz": 1}, "choose one of these"),
                      ({"use_queue": "False"}, "type bool"), ({"use_queue": 1}, "type bool"), ({"steps": True}, "type int"),
                      ({"steps": 1.5}, "type int"), ({"learning_rate": "1e-4"}, "type float"), ({"name": 3}, "type str")]:
        with pytest.raises(ConfigError, match=hint): check_config(Toy, bad)


def test_one_of():
    for value, known in (("b", ("a", "b")), ("b", dict(a=1, b=2)), (2, range(3)), (None, (None, "x"))):
        assert one_of("x", value, known) is value
    with pytest.raises(ConfigError) as told: one_of("how", "dwon", dict(down=1, up=2))
    assert str(told.value) == "how: got 'dwon'\n  expected: down, up"
    with pytest.raises(ConfigError, match="0, 1, 2"): one_of("block", 3, range(3))


# ---- seeds and threads -----------------------------------------------------------------------------------------------

def draw(): return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random(), random.gauss(0, 1), np.random.randn()


def test_rng_round_trip_through_a_weights_only_file(tmp_path):
    random.gauss(0, 1); np.random.randn()               # leave half a Gaussian pair in both
    state = get_rng_state(); first = draw()
    torch.save(state, tmp_path / "s.pt"); draw()
    set_rng_state(torch.load(tmp_path / "s.pt", weights_only=True))
    assert draw() == first
    for bad in ({}, {"torch": 1}, None, [1]):
        with pytest.raises(CheckpointError, match="random state"): set_rng_state(bad)


def test_rng_state_of_other_gpus_is_not_dropped_silently():
    state = get_rng_state(); state["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 7
    with pytest.warns(UserWarning, match="7 GPUs not restored"): set_rng_state(state)


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_run_context_leaves_no_trace(crash, deterministic, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.manual_seed(5); np.random.seed(5); random.seed(5); expected = draw()
    torch.manual_seed(5); np.random.seed(5); random.seed(5)
    threads = torch.get_num_threads()
    try:
        with run_context(3, threads=2, deterministic=deterministic):
            assert torch.get_num_threads() == 2 and torch.are_deterministic_algorithms_enabled() == deterministic
            draw()
            if crash: raise KeyboardInterrupt
    except KeyboardInterrupt: assert crash
    assert draw() == expected and torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_run_context_repeats_and_nests():
    with run_context(1): a = draw()
    with run_context(1): b = draw()
    with run_context(2): c = draw()
    assert a == b != c
    with run_context(1):
        x = torch.rand(1)
        with run_context(2): torch.rand(9)
        assert torch.cat([x, torch.rand(1)]).tolist() == a[0]
    with pytest.raises(ConfigError, match="threads"), run_context(threads=0): pass


def test_run_context_keeps_the_users_cublas_setting(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with run_context(deterministic=True): assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


class Seeded(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        with run_context(i): return torch.rand(2)


def test_run_context_works_in_workers():
    here = torch.stack([Seeded()[i] for i in range(4)])
    there = torch.cat(list(torch.utils.data.DataLoader(Seeded(), 2, num_workers=2)))
    assert torch.equal(here, there)


# ---- devices and packages --------------------------------------------------------------------------------------------

def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu") == pick_device(torch.device("cpu"))
    assert pick_device().type in ("cpu", "cuda")
    for bad in ("cuda:77", "toaster", ""):
        with pytest.raises(ConfigError, match="device='auto'"): pick_device(bad)


def test_a_visible_gpu_that_does_not_work_is_not_picked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime, "_trouble", lambda device: "RuntimeError: no kernel image" if "cuda" in str(device) else None)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no kernel image"): pick_device("cuda")
    monkeypatch.setattr(runtime, "_trouble", lambda device: None)
    assert pick_device("auto") == torch.device("cuda")


def test_need(tmp_path, monkeypatch):
    assert need("json") is json
    with pytest.raises(ConfigError, match=r'pip install "timet_nb\[worlds\]"'): need("no_such_thing", "worlds")
    monkeypatch.setitem(sys.modules, "cv2", None)                 # how Python marks an import that must fail
    with pytest.raises(ConfigError, match="pip install opencv-python-headless"): need("cv2")
    (tmp_path / "broken_thing.py").write_text("raise OSError('libGL.so.1: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="libGL.so.1"): need("broken_thing")


FAKE = """
    import sys, torch; sys.path.insert(0, sys.argv[1])
    from timet_nb.base.runtime import repair_torchvision, ConfigError
    try: print(repair_torchvision())
    except Exception as e: print(type(e).__name__, str(e).splitlines()[0])
    import builtins; print(getattr(builtins, "imports", 0), len(__import__("timet_nb.base.runtime").base.runtime._LIBRARIES))
"""
COUNT = "import builtins; builtins.imports = getattr(builtins, 'imports', 0) + 1\n"
BROKEN = COUNT + """import torch
for name in ("toy_a", "toy_b", "toy_c"): torch.library.register_fake("torchvision::" + name, lambda *a: a[0]) \\
    if hasattr(torch.ops.torchvision, name) else (_ for _ in ()).throw(RuntimeError(f"operator torchvision::{name} does not exist"))
"""


def fake(tmp_path, code):
    (tmp_path / "torchvision").mkdir(); (tmp_path / "torchvision" / "__init__.py").write_text(code)
    return python(FAKE, tmp_path).stdout.splitlines()


def test_repair_leaves_a_healthy_torchvision_alone(tmp_path):
    assert fake(tmp_path, COUNT) == ["[]", "1 0"]                 # imported once, no operator declared


def test_repair_declares_what_is_missing(tmp_path):
    assert fake(tmp_path, BROKEN) == ["['toy_a', 'toy_b', 'toy_c']", "4 3"]


@pytest.mark.parametrize("code, message", [
    ("raise RuntimeError('CUDA driver too old')", "RuntimeError CUDA driver too old"),
    ("raise RuntimeError('operator elsewhere::nms does not exist')", "RuntimeError operator elsewhere::nms does not exist"),
    ("raise RuntimeError('operator torchvision::nms does not exist, nor does your GPU')", "RuntimeError operator torchvision::nms"),
    ("raise OSError('libjpeg.so.8')", "OSError libjpeg.so.8"), ("import no_such_dependency", "ModuleNotFoundError No module"),
    ("raise RuntimeError('operator torchvision::toy does not exist')", "RuntimeError operator torchvision::toy")])
def test_repair_lets_other_errors_through(tmp_path, code, message):
    "The last case never heals: it must end, with the original error."
    first, second = fake(tmp_path, COUNT + code)
    assert first.startswith(message) and second in ("1 0", "2 1")


def test_repair_gives_up_after_max_tries(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        COUNT + "raise RuntimeError(f'operator torchvision::toy{builtins.imports} does not exist')")
    out = python(FAKE.replace("repair_torchvision()", "repair_torchvision(max_tries=3)"), tmp_path).stdout.splitlines()
    assert out == ["RuntimeError operator torchvision::toy4 does not exist", "4 3"]


def test_torchvision_missing_is_said_plainly():
    out = python("""
        import sys; sys.modules["torchvision"] = None
        from timet_nb.base.runtime import repair_torchvision, ConfigError
        try: repair_torchvision()
        except ConfigError as e: print(e)""").stdout
    assert "package torchvision: got it is not installed" in out and "pip install torchvision" in out


def test_the_real_pair_imports_timm():
    "Whatever torchvision is installed here, healthy or not, timm imports after the repair, and a second call does nothing."
    out = python("""
        import importlib, sys
        try: importlib.import_module("torchvision"); healthy = True
        except RuntimeError: healthy = False
        for m in [m for m in sys.modules if m.split(".")[0] == "torchvision"]: del sys.modules[m]
        from timet_nb.base.runtime import import_timm, repair_torchvision, _LIBRARIES
        first = repair_torchvision(); timm = import_timm()
        assert (first == []) == healthy, (first, healthy)
        assert repair_torchvision() == [] and len(_LIBRARIES) == len(first)
        import torch, torchvision.transforms.v2 as v2
        assert v2.functional.resize(torch.rand(1, 3, 8, 8), [4, 4]).shape == (1, 3, 4, 4)
        print(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)(torch.rand(1, 3, 32, 32)).shape[-1])""").stdout
    assert out.strip() == "1000"


# ---- files -----------------------------------------------------------------------------------------------------------

def test_atomic_write(tmp_path):
    path = tmp_path / "new" / "a.png"
    with atomic_write(path) as temp:
        assert temp.parent == path.parent and temp.suffix == ".png" and temp.name.startswith(".") and not path.exists()
        temp.write_bytes(b"one")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temp: temp.write_bytes(b"tw"); 1 / 0
    assert path.read_bytes() == b"one" and os.listdir(path.parent) == ["a.png"]
    with pytest.raises(DataError, match="nothing written"), atomic_write(path): pass
    assert path.read_bytes() == b"one"


def test_atomic_write_obeys_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a") as temp: temp.write_text("x")
    finally: os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_atomic_write_says_what_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x"); (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.txt", tmp_path / "folder"):
        with pytest.raises(DataError, match="cannot write"), atomic_write(path) as temp: temp.write_text("x")
    with pytest.raises(DataError, match="No space left.*\n.*space"), atomic_write(tmp_path / "b") as temp:
        temp.write_text("x"); raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConnectionError), atomic_write(tmp_path / "b"): raise ConnectionError("not about files")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(os.name != "posix", reason="kill -9 needs POSIX signals")
def test_atomic_write_survives_kill_9(tmp_path):
    "A writer in an endless loop is killed at random moments: the file always reads as one whole version."
    path, rng = tmp_path / "a.json", random.Random(0)
    code = """
        import json, sys; from timet_nb.base.runtime import atomic_write
        print("go", flush=True); i = 0
        while True:
            with atomic_write(sys.argv[1]) as temp: temp.write_text(json.dumps([i] * 200_000))
            i += 1"""
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(path)], stdout=subprocess.PIPE, cwd=ROOT)
        writer.stdout.readline(); time.sleep(.3 + .5 * rng.random()); writer.send_signal(signal.SIGKILL); writer.wait()
        writer.stdout.close()
        values = json.loads(path.read_text())
        assert len(values) == 200_000 and len(set(values)) == 1


def test_cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TIMET_CACHE", str(tmp_path / "c"))
    assert cache_dir("w", "v") == tmp_path / "c" / "w" / "v" and cache_dir("w", "v").is_dir()
    monkeypatch.setenv("TIMET_CACHE", "~/there"); monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "there"
    monkeypatch.delenv("TIMET_CACHE"); monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_dir("a") == tmp_path / "x" / "timet_nb" / "a"
    (tmp_path / "f").write_text(""); monkeypatch.setenv("TIMET_CACHE", str(tmp_path / "f"))
    with pytest.raises(ConfigError, match="TIMET_CACHE"): cache_dir("w")


# ---- environment, bars, imports --------------------------------------------------------------------------------------

def test_environment_tells_the_circumstances_and_no_names():
    import getpass, platform
    facts = environment("cpu"); text = json.dumps(facts)
    assert facts["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert facts["threads"] == torch.get_num_threads() and facts["device"] == "cpu" and facts["device_name"]
    assert set(facts) == {"python", "platform", "packages", "commit", "device", "device_name", "cpu", "cores", "threads", "load"}
    for secret in (platform.node(), str(Path.home()), str(ROOT), os.getcwd()): assert secret not in text
    user = getpass.getuser()
    assert not any(user == str(v) for v in facts.values())


def test_commit_is_none_in_somebody_elses_repository(tmp_path, monkeypatch):
    git = lambda *a: subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *a], check=True, capture_output=True)
    try: git("init")
    except (OSError, subprocess.CalledProcessError): pytest.skip("no git here")
    monkeypatch.setattr(runtime, "_HERE", tmp_path)
    (tmp_path / "runtime.py").write_text("x"); assert environment("cpu")["commit"] is None      # there, but not tracked
    git("add", "runtime.py"); git("commit", "-m", "x"); commit = environment("cpu")["commit"]
    assert len(commit) == 40 and git("rev-parse", "HEAD").stdout.decode().strip() == commit
    (tmp_path / "runtime.py").write_text("y"); assert environment("cpu")["commit"] == commit + "-dirty"
    monkeypatch.setenv("PATH", ""); assert environment("cpu")["commit"] is None                  # no git at all


def test_quiet(monkeypatch):
    for name in ("TIMET_QUIET", "IN_TEST", "CI", "PYTEST_CURRENT_TEST", *runtime._LIVE): monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    class Terminal:
        def isatty(self): return True
    monkeypatch.setattr(sys, "stderr", Terminal()); assert not quiet()
    monkeypatch.setenv("CI", "1"); assert quiet()
    monkeypatch.setenv("TIMET_QUIET", "0"); assert not quiet()
    monkeypatch.setenv("TIMET_QUIET", "1"); assert quiet()
    monkeypatch.delenv("TIMET_QUIET"); monkeypatch.delenv("CI")
    monkeypatch.setitem(sys.modules, "ipykernel", sys); assert quiet()                # a notebook run by a program
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb"); assert not quiet()             # one that somebody looks at


def test_progress_is_silent_and_complete(capsys, monkeypatch):
    monkeypatch.setenv("TIMET_QUIET", "1")
    assert list(progress(iter(range(4)), "walk", total=4)) == [0, 1, 2, 3]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("TIMET_QUIET", "0")
    assert list(progress(range(3), "walk")) == [0, 1, 2] and "walk" in capsys.readouterr().err


def test_import_is_cheap():
    "`import timet_nb` brings no torch; the base modules bring no heavy library."
    assert python("import sys, timet_nb; print('torch' in sys.modules)").stdout.strip() == "False"
    heavy = ["matplotlib", "cv2", "faiss", "IPython", "accelerate", "timm", "torchvision", "skimage", "PIL"]
    code = f"""
        import sys, timet_nb.base.runtime, timet_nb.base.record, timet_nb.base.show
        print([m for m in {heavy} if m in sys.modules])"""
    assert python(code).stdout.strip() == "[]"


def test_cuda_generators_are_restored():
    if not torch.cuda.is_available(): pytest.skip("no CUDA GPU here")
    torch.cuda.manual_seed(3); expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(3)
    with run_context(1): a = torch.rand(3, device="cuda")
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    with run_context(1): assert torch.equal(torch.rand(3, device="cuda"), a)
