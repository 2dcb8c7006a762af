"Shared fixtures. Real DAVIS clips come from TIMET_DATA, pip-shipped weights from the cache or the registry."
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("IN_TEST", "1")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")     # read once, when OpenCV is first imported
# the same examples every run; HYPOTHESIS_PROFILE=search draws new ones
settings.register_profile("fixed", derandomize=True)
settings.register_profile("search")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
ROOT = Path(__file__).resolve().parent.parent
# for measured memory: a freed buffer goes back to the system at once, so that the peak is what was held and not the heap's holes
STEADY_MALLOC = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture(autouse=True)
def one_thread():
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_numbers():
    """Every test begins with the same state of the three global generators, whatever ran before it on its worker.
    TIMET_SEED=n begins elsewhere: a test that then fails held by luck."""
    import random, numpy as np, torch
    seed = int(os.environ.get("TIMET_SEED", "0"))
    random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)


@pytest.fixture(scope="session")
def golden():
    return GOLDEN


@pytest.fixture(scope="session")
def real_data():
    "The folder with davis2016/, davis2016_train/ and evaluator/."
    where = os.environ.get("TIMET_DATA", "")
    if not where: pytest.skip("TIMET_DATA is not set: it names the folder with davis2016/, davis2016_train/, evaluator/")
    root = Path(where)
    if not (root / "davis2016").is_dir(): pytest.skip(f"TIMET_DATA={where} holds no davis2016/ folder")
    return root


@pytest.fixture(scope="session")
def vit():
    "The pip-shipped ViT-S/14, loaded once; skips when neither the cache nor the registry has it."
    from timet_nb.base.runtime import CheckpointError
    from timet_nb.features.backbone import create_backbone
    try: return create_backbone("dinov2-s14-imgfocus")
    except CheckpointError as e: pytest.skip(f"the pip-shipped ViT cannot be had: {str(e).splitlines()[0]}")
