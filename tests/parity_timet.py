"Parity checks against golden/timet: matching, protocols, J and F, schedules, sampling, masks."
import re

import numpy as np

from tests.parity import Measured, NotCovered, compare_ids, covers
from timet_nb.evaluate.overlap import boundary_f, jf_stats, region_j, score

HOW = {"hung": "hungarian", "m2o": "many_to_one", "m2oprec": "precision", "linear": "none"}


@covers("timet/miou", inputs="gt gt_* pred_*")
def miou(z):
    for name in z.like("*"):
        part = name.split("_")
        if part[0] not in ("miou", "reordered", "matchedbg", "tp", "fp", "fn"): continue
        kind, variant, *rest = part
        how = HOW[variant if variant == "linear" else rest[0]]
        gt = z["gt_" + variant] if "gt_" + variant in z else z["gt"]
        pred = z["pred_more" if variant == "nobgclass" else "pred_" + variant]
        m = score(gt, pred, how, background="nobg" not in rest)
        ours = {"miou": m.miou, "reordered": m.relabel(pred), "matchedbg": m.background_share,
                "tp": m.tp, "fp": m.fp, "fn": m.fn}[kind]
        yield name, ours, 0 if kind in ("reordered", "tp", "fp", "fn") else 1e-9


@covers("timet/davis_jf", inputs="gt pred bound_th")
def davis_jf(z):
    J = region_j(z["gt"], z["pred"])
    F = boundary_f(z["gt"], z["pred"], z.scalar("bound_th"))
    yield "J", J, 1e-9
    yield "F", F, 1e-9
    yield "J_stats_mean_recall_decay", np.array([jf_stats(r) for r in J]), 1e-9
    yield "F_stats_mean_recall_decay", np.array([jf_stats(r) for r in F]), 1e-9
