"stub until 0_base/01_runtime is exported"
import contextlib, importlib, os, random, sys, tempfile
from pathlib import Path
import torch
class DataError(ValueError): pass
class CheckpointError(ValueError): pass
class ConfigError(ValueError): pass
_LIBS = []
def repair_torchvision(max_tries=8):
    import re
    done = []
    for _ in range(max_tries):
        try: importlib.import_module("torchvision"); return done
        except RuntimeError as e:
            m = re.search(r"operator torchvision::(\w+) does not exist", str(e))
            if not m: raise
            lib = torch.library.Library("torchvision", "FRAGMENT"); lib.define(f"{m[1]}(Tensor a) -> Tensor"); _LIBS.append(lib); done.append(m[1])
            for k in [k for k in sys.modules if k.split(".")[0] == "torchvision"]: del sys.modules[k]
    return done
def import_timm(): repair_torchvision(); return importlib.import_module("timm")
def need(module, extra=None): return importlib.import_module(module)
def pick_device(device="auto"): return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
def quiet(): return True
def progress(it, desc="", total=None): return it
def cache_dir(*parts):
    p = Path(os.environ.get("TIMET_CACHE", Path.home()/".cache/timet_nb")).joinpath(*parts); p.mkdir(parents=True, exist_ok=True); return p
@contextlib.contextmanager
def run_context(seed=0, threads=None, deterministic=False):
    torch.manual_seed(seed); random.seed(seed); yield
@contextlib.contextmanager
def atomic_write(path):
    path = Path(path); tmp = path.with_name(path.name + ".tmp"); yield tmp; os.replace(tmp, path)
def environment(): return {"torch": torch.__version__}
def expect(x, shape, name="array", dtype=None, low=None, high=None): return x
