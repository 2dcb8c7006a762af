"""Compare the library with arrays made by the authors' own code.

Usage: python -m tests.parity [DIR] [--only system/file] [--inputs]

DIR (default tests/golden) holds one folder a system and .npz files in it. Any folder of the same shape works: other seeds,
sizes and settings, since everything is read from the arrays. One line an output array:

    system/file:array  max|err|  tol  ok | FAIL (why) | not covered (why)

The last line is `parity: A agree, B differ, C not covered`; the exit status is 1 when B > 0 and 2 when DIR is no such folder.

How a check is written (tests/parity_<system>.py, imported by `load_checks`):

    @covers("timet/sinkhorn", inputs="features prototypes epsilon iters")
    def sinkhorn_(z):                              # z: the arrays of one file, by name; also z.scalar("epsilon")
        yield "scores", z["features"] @ z["prototypes"].T, 1e-5
        yield "q", lambda: compute_q(z), 1e-5      # a function is called by the runner: if it raises, only this array fails
        yield "map_frame_wise", NotCovered("k-means start is random")

What a check yields is (array, ours, tolerance). ours: an array, a tensor, a number, a function giving one of these, `NotCovered(why)`, or
`Measured(error, note)` when two arrays cannot be compared entry by entry (a permutation of clusters, ids that may differ at ties).
Tolerance None means exact for integers and 1e-5 for floats. An array that is neither input nor yielded is listed as not covered.
"""
import argparse
import fnmatch
import importlib
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden"
CHECKS = ("tests.parity_timet", "tests.parity_timet_loss", "tests.parity_dcsam", "tests.parity_dcsam_prompts", "tests.parity_tube",
          "tests.parity_sam", "tests.parity_sam2", "tests.parity_sine", "tests.parity_sine_segment", "tests.parity_sine_metrics", "tests.parity_tau", "tests.parity_stcr")
ALWAYS_INPUT = "sd/* in/* cfg/* rng/* config_json seed"


@dataclass(frozen=True)
class NotCovered:
    "Says why an output array is not compared."
    why: str


@dataclass(frozen=True)
class Measured:
    "An error measured by the check itself, with a note on how."
    error: float
    note: str = ""


@dataclass(frozen=True)
class Line:
    "One line of the ledger."
    name: str
    verdict: str           # ok | FAIL | not covered
    error: float | None = None
    tol: float | None = None
    why: str = ""

    def __str__(self):
        err = "-" if self.error is None else f"{self.error:.1e}"
        tol = "-" if self.tol is None else f"{self.tol:.0e}"
        return f"{self.name:<58}  {err:>8}  {tol:>6}  {self.verdict}{f' ({self.why})' if self.why else ''}"


@dataclass(frozen=True)
class Check:
    pattern: str           # system/file without .npz, globs allowed
    inputs: tuple[str, ...]
    run: Callable | None   # None: the system is not built yet


REGISTRY: list[Check] = []


def covers(pattern: str, inputs: str = ""):
    "Register a check for every golden file whose `system/file` fits `pattern`; `inputs` are globs of its input arrays."
    def add(run):
        REGISTRY.append(Check(pattern, tuple((inputs + " " + ALWAYS_INPUT).split()), run))
        return run
    return add


def planned(pattern: str, inputs: str = ""):
    "Tell inputs from outputs for a system that is not built yet."
    REGISTRY.append(Check(pattern, tuple((inputs + " " + ALWAYS_INPUT).split()), None))


class Arrays(dict):
    "The arrays of one file by name; arrays that cannot be read are missing here and listed in `.broken`."
    def __init__(self, path: Path):
        super().__init__()
        self.path, self.broken = path, {}      # broken: {name: why it cannot be read}
        with zipfile.ZipFile(path) as z: names = [n.removesuffix(".npy") for n in z.namelist()]
        with np.load(path, allow_pickle=False) as z:
            for n in names:
                try: self[n] = z[n]
                except Exception as e: self.broken[n] = f"{type(e).__name__}: {e}"

    def __missing__(self, name):
        if name in self.broken: raise KeyError(f"input array {name!r} cannot be read: {self.broken[name]}")
        raise KeyError(f"input array {name!r} is missing")

    def scalar(self, name):
        "A 0-d array as int or float."
        return self[name].item()

    def like(self, pattern) -> list[str]:
        "Names that fit a glob, in file order."
        return [n for n in self if fnmatch.fnmatchcase(n, pattern)]


def to_numpy(x: Any) -> np.ndarray:
    if hasattr(x, "detach"): x = x.detach().cpu().numpy()
    return np.asarray(x)


def compare(name: str, golden: np.ndarray, ours: Any, tol: float | None) -> Line:
    "One line for one output array."
    if callable(ours):
        try: ours = ours()
        except Exception as e: return Line(name, "FAIL", tol=tol, why=f"{type(e).__name__}: {first_line(e)}")
    if isinstance(ours, NotCovered): return Line(name, "not covered", why=ours.why)
    exact = golden.dtype.kind in "iub"
    if tol is None: tol = 0. if exact else 1e-5
    if isinstance(ours, Measured):
        good = ours.error <= tol
        return Line(name, "ok" if good else "FAIL", ours.error, tol, ours.note)
    ours = to_numpy(ours)
    if ours.dtype.kind not in "iubf": return Line(name, "FAIL", tol=tol, why=f"we give dtype {ours.dtype}")
    if ours.shape != golden.shape:
        return Line(name, "FAIL", tol=tol, why=f"shape {ours.shape}, golden {golden.shape}")
    a, b = golden.astype(np.float64), ours.astype(np.float64)
    both_nan = np.isnan(a) & np.isnan(b)
    with np.errstate(invalid="ignore"):
        gap = np.where(both_nan | (a == b), 0., np.abs(a - b))
    gap = np.where(np.isnan(gap), np.inf, gap)
    error = float(gap.max()) if gap.size else 0.
    why = "" if error <= tol else f"{int((gap > tol).sum())} of {gap.size} entries"
    return Line(name, "ok" if error <= tol else "FAIL", error, tol, why)


def first_line(e: BaseException) -> str:
    text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
    return (text.splitlines() or [""])[0][:160]


def compare_ids(golden, ours, scores, eps=1e-5, axis=-1) -> Measured:
    "Share of ids that differ where the two candidates' `scores` (ids along `axis`) are more than `eps` apart."
    golden, ours, scores = (to_numpy(a) for a in (golden, ours, scores))
    if golden.shape != ours.shape: raise ValueError(f"shape {ours.shape}, golden {golden.shape}")
    at = lambda ids: np.take_along_axis(scores, np.expand_dims(ids.astype(np.int64), axis), axis).squeeze(axis)
    differ = golden != ours
    real = differ & (np.abs(at(golden) - at(ours)) > eps)
    ties = int(differ.sum() - real.sum())
    return Measured(float(real.mean()) if real.size else 0., f"{ties} ties within {eps:g}" if ties else "")


def find_check(name: str) -> Check | None:
    "The check for system/file: built ones before planned ones, the longest pattern first."
    fits = [c for c in REGISTRY if fnmatch.fnmatchcase(name, c.pattern)]
    return max(fits, key=lambda c: (c.run is not None, len(c.pattern)), default=None)


def check_file(path: Path, name: str, show_inputs: bool = False) -> Iterator[Line]:
    "All lines of one file."
    try: z = Arrays(path)
    except Exception as e:
        yield Line(f"{name}:*", "FAIL", why=f"{path} cannot be read as .npz: {type(e).__name__}: {first_line(e)}")
        return
    check = find_check(name)
    patterns = check.inputs if check else tuple(ALWAYS_INPUT.split())
    is_input = lambda n: any(fnmatch.fnmatchcase(n, p) for p in patterns)
    if show_inputs: yield from (Line(f"{name}:{n}", "input") for n in z if is_input(n))
    for n, why in z.broken.items():
        yield Line(f"{name}:{n}", "FAIL", why=f"cannot be read: {why}")
    outputs = [n for n in z if not is_input(n)]
    if check is None or check.run is None:
        why = "no check yet" if check is None and name.split("/")[0] in BUILT else "system not built yet"
        yield from (Line(f"{name}:{n}", "not covered", why=why) for n in outputs)
        return
    seen, trouble = set(), None
    try:
        for n, ours, *tol in check.run(z):
            if n in seen: raise RuntimeError(f"the check gives {n!r} twice")
            seen.add(n)
            if n in z: yield compare(f"{name}:{n}", z[n], ours, tol[0] if tol else None)
    except Exception as e: trouble = f"{type(e).__name__}: {first_line(e)}"
    for n in outputs:
        if n in seen: continue
        if trouble: yield Line(f"{name}:{n}", "FAIL", why=trouble)
        else: yield Line(f"{name}:{n}", "not covered", why="no check for this array")


BUILT = {"timet", "sine", "dcsam", "tau", "stcr"}


def missing(root: Path) -> Iterator[Line]:
    "Files of built systems that the folder lacks."
    for c in REGISTRY:
        system, stem = c.pattern.split("/", 1)
        if c.run and not any(root.glob(f"{system}/{stem}.npz")):
            yield Line(f"{c.pattern}:*", "not covered", why=f"no file {c.pattern}.npz in the folder")


def load_checks() -> list[Line]:
    "Import every module of checks; a module that cannot be imported becomes a line, not a crash."
    troubles = []
    for module in CHECKS:
        try: importlib.import_module(module)
        except Exception as e:
            troubles.append(Line(f"{module}:*", "FAIL", why=f"cannot be imported: {type(e).__name__}: {first_line(e)}"))
    return troubles


def run(root: Path, only: str = "*", show_inputs: bool = False) -> Iterator[Line]:
    "Every line of the ledger for the folder `root`."
    yield from load_checks()
    for path in sorted(root.glob("*/*.npz")):
        name = f"{path.parent.name}/{path.stem}"
        if fnmatch.fnmatchcase(name, only): yield from check_file(path, name, show_inputs)
    if only == "*": yield from missing(root)


def main(argv: list[str] | None = None) -> int:
    ap = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.splitlines()[0])
    ap.add_argument("dir", nargs="?", default=GOLDEN, type=Path, help="folder of golden arrays (tests/golden)")
    ap.add_argument("--only", default="*", help="system/file to check, globs allowed")
    ap.add_argument("--inputs", action="store_true", help="list the input arrays too")
    args = ap.parse_args(argv)
    if not args.dir.is_dir():
        print(f"{args.dir}: no such folder; expected system/file.npz below it, as in {GOLDEN}"); return 2
    import torch
    torch.set_num_threads(1)
    count = dict.fromkeys(("ok", "FAIL", "not covered", "input"), 0)
    for line in run(args.dir, args.only, args.inputs):
        print(line, flush=True); count[line.verdict] += 1
    if not sum(count.values()): print(f"{args.dir}: no system/file.npz in it"); return 2
    print(f"parity: {count['ok']} agree, {count['FAIL']} differ, {count['not covered']} not covered")
    return 1 if count["FAIL"] else 0


# Systems to come: which arrays are inputs. A later `covers` for the same file takes over.
planned("dcsam/cyc_attention_*", "query key value mask")
planned("dcsam/transformer_decoder_*", "x x_s support_mask query_mask pos")
planned("dcsam/dcsam_full_v1", "query_img support_img support_mask gt query_sam support_sam prior_*")
planned("dcsam/dcsam_full_v2", "query_img support_img support_mask *_embed *_hr0 *_hr1 prior_* pre_mask")
planned("dcsam/sam1_prompt_mask_decoder", "image_embedding point_coords point_labels box mask_input")
planned("dcsam/sam*_image_encoder", "x")
planned("dcsam/sam2_memory_attention", "curr curr_pos memory memory_pos")
planned("dcsam/sam2_memory_encoder", "pix_feat mask_logits")
planned("dcsam/sam2_track", "frames point_coords point_labels mask_input")
planned("dcsam/dcsam2_fork_track", "frames proto_pos proto_neg")
planned("dcsam/metrics_fss", "*_pred *_gt *_class_id *_class_ids_of_fold *_ignore")
planned("dcsam/mask_tube", "image mask")
planned("sam2long/tree_*", "ious object_score_logits uncertainty num_pathway")
planned("sam2long/memory_selection_*", "ious object_score_logits slot_of_frame iou_thre num_frames query_frames")
planned("sam2long/attention_modulation", "w_low w_high *_scores")
planned("davsn/davsn_iteration", "logits_* src_label *_flow_int16_x10 disc_*")
planned("davsn/accel_fusion", "cf kf flow_px w5 b5 w6 b6")
planned("davsn/advent_helpers", "prob ce_logits ce_target hist lr_poly_iters")
planned("tps/resample2d", "input flow")
planned("tps/tps_iteration_*", "flip num_classes target_hw flow_*_int16_x10 weak_logits_* student_logits_main "
        "student_logits_aux student_input_hw src_logits src_logits_aux src_label lambda_*")

if __name__ == "__main__":
    sys.modules["tests.parity"] = sys.modules["__main__"]      # checks register here, not in a second copy
    sys.exit(main())
