"Parity checks against golden/timet: matching, protocols, clusters, J and F, retrieval, foreground, schedules, sampling, EMA."
import random
import re

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from tests.parity import Measured, compare_ids, covers
from timet_nb.base.train import cosine, ema_update
from timet_nb.data.clips import crop_box, sample_indices
from timet_nb.evaluate.cluster import cluster_maps, prototype_scores, score_maps
from timet_nb.evaluate.foreground import choose_threshold, cluster_precision, foreground, image_iou
from timet_nb.evaluate.overlap import boundary_f, contingency, jf_stats, region_j, score
from timet_nb.evaluate.retrieve import blend_labels, nearest_patches, patch_labels, rare_patches
from timet_nb.evaluate.track import accumulated_iou
from timet_nb.features.dense import pca_fit


def tensor(x): return torch.from_numpy(np.array(x))   # a copy: some checks write


def to_maps(x):
    "(..., N, D) tokens of a square grid as (..., D, S, S)."
    S = int(round(x.shape[-2] ** .5))
    return tensor(x).transpose(-1, -2).unflatten(-1, (S, S))


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


MODES = {"frame_wise": "frame", "sample_wise": "clip", "dataset_wise": "dataset"}


@covers("timet/protocols", inputs="gt pred gt_255_to_0")
def protocols(z):
    for name in z.like("*_wise_*"):
        protocol, wise, background, how = name.split("_")
        mode = MODES[f"{protocol}_{wise}"]
        result = score_maps(z["gt"], z["pred"], mode, HOW[how], background == "bg", official=True)
        yield name, result.miou, 1e-9
    clips = list(zip(z["gt_255_to_0"], z["pred"]))
    swapped = [v for g, p in clips for v in accumulated_iou(g, p, official=True).values()]
    yield "propagation_miou", np.mean(swapped), 1e-9
    yield "propagation_clip0_correct_order", np.array(list(accumulated_iou(*clips[0]).values())), 1e-9


MAP_TOL = .02   # share of pixels that may differ after matching: k-means starts and subsamples at random


@covers("timet/clustering", inputs="features labels_patch pca_dim k input_resolution prototypes")
def clustering(z):
    features, r = to_maps(z["features"]), z.scalar("input_resolution")
    x = tensor(z["features"]).flatten(0, -2)
    y = pca_fit(x, z.scalar("pca_dim")).transform(x).double()
    rows, size = len(z["pca_gram"]), float(np.abs(z["pca_gram"]).max())
    yield "pca_gram", lambda: (y @ y.T)[:rows, :rows], 2e-6 * size          # float32 golden: relative to its largest entry
    yield "pca_column_sq_norms", lambda: y.square().sum(0), 2e-6 * float(z["pca_column_sq_norms"].max())
    scores = prototype_scores(features.flatten(0, 1), tensor(z["prototypes"]), (r, r))
    yield "proto_map", lambda: compare_ids(z["proto_map"], scores.argmax(1), scores, eps=1e-6, axis=1), 0
    for name in z.like("map_*_wise"):
        mode = MODES[name.removeprefix("map_")]
        yield name, lambda m=mode, n=name: same_partition(z[n], our_maps(z, features, m, r), m), MAP_TOL


def our_maps(z, features, mode, r):
    return torch.stack(cluster_maps(features, z.scalar("k"), mode, z.scalar("pca_dim"), (r, r), official=True))


def same_partition(golden, ours, mode):
    "Share of pixels outside the best one-to-one naming of clusters, for each frame, clip or the data set."
    keep = {"frame": 2, "clip": 1, "dataset": 0}[mode]
    pairs = zip(golden.reshape(-1, *golden.shape[keep:]), ours.reshape(-1, *golden.shape[keep:]))
    shares = []
    for a, b in pairs:
        table = contingency(a, b, ignore=None).numpy()
        shares.append(1 - table[linear_sum_assignment(-table)].sum() / table.sum())
    return Measured(float(max(shares)), "up to a permutation of the clusters, worst of the group")


@covers("timet/cbfe", inputs="clusters attention_mask gt k")
def cbfe(z):
    clusters, gt = z["clusters"], z["gt"]
    p = cluster_precision(clusters, z["attention_mask"][:, 0], z.scalar("k"))
    threshold, table = choose_threshold(clusters, gt, p, void="foreground")
    found = foreground(clusters, p, threshold)
    yield "cluster_precisions", p, 1e-9
    yield "threshold_table", table, 1e-6        # the golden IoU is float32
    yield "threshold", threshold, 1e-9
    yield "foreground", found.to(torch.uint8), 0
    yield "jaccard_with_boundary", lambda: image_iou(gt, found, void="foreground"), 1e-6
    yield "jaccard_without_boundary", lambda: image_iou(gt, found, void="background"), 1e-6


@covers("timet/hummingbird", inputs="train_features train_masks queries n_neighbours beta patch_size "
                                    "num_sampled_per_image torch_seed_for_sampling")
def hummingbird(z):
    masks, n_classes, size = z["train_masks"][:, 0], z["patch_labels"].shape[-1], z["prediction"].shape[1:]
    grid = tuple(s // z.scalar("patch_size") for s in masks.shape[1:])
    labels = patch_labels(masks, grid, n_classes)
    yield "patch_labels", labels, 1e-6
    memory = torch.nn.functional.normalize(tensor(z["train_features"]).flatten(0, 1), dim=1)
    queries = tensor(z["queries"])
    cosine_, at = nearest_patches(queries.flatten(0, 1), memory, z.scalar("n_neighbours"))
    sim = torch.nn.functional.normalize(queries.flatten(0, 1), dim=1) @ memory.T
    every = sim[:, None].expand(-1, at.shape[1], -1)
    yield "neighbour_indices", lambda: compare_ids(z["neighbour_indices"], at, every, eps=1e-6), 0
    hat = blend_labels(cosine_, labels.flatten(0, 2)[at], z.scalar("beta")).reshape(*queries.shape[:2], n_classes)
    yield "label_hat", hat, 1e-5
    rows, cols = (round(queries.shape[1] ** .5),) * 2
    soft = torch.nn.functional.interpolate(hat.transpose(1, 2).unflatten(2, (rows, cols)), size=size, mode="bilinear")
    yield "prediction", lambda: compare_ids(z["prediction"], soft.argmax(1), soft, eps=1e-5, axis=1), 0
    torch.manual_seed(z.scalar("torch_seed_for_sampling"))
    chosen = [rare_patches(l, z.scalar("num_sampled_per_image")) for l in labels.flatten(1, 2)]
    yield "sampled_indices", torch.stack(chosen), 0


@covers("timet/schedules", inputs="epochs iters_per_epoch")
def schedules(z):
    steps = z.scalar("epochs") * z.scalar("iters_per_epoch")
    for name in ("weight_decay", "momentum"):
        golden = z[name]
        left = .5 * (1 + np.cos(np.pi * (len(golden) - 1) / steps))         # share of the start in the last entry
        start = float(golden[0])
        end = float((golden[-1] - left * start) / (1 - left)) if left < 1 else start   # the two ends are not stored
        yield name, np.array([cosine(start, end, steps)(i) for i in range(steps)]), 1e-9


@covers("timet/sampling", inputs="python_random_seed num_clips")
def sampling(z):
    for name in z.like("*_size*_n*_step*"):
        regime, size, n, step = re.fullmatch(r"(\w+?)_size(\d+)_n(\d+)_step(\d+)", name).groups()
        yield name, lambda r=regime, a=(int(size), int(n)), s=int(step): draw(z, r, a, s), 0
    for name in z.like("crop_w*_h*_ijhw"):
        w, h = map(int, re.findall(r"\d+", name))
        yield name, lambda n=name, h=h, w=w: boxes(z, h, w, len(z[n])), 0


def draw(z, regime, size_and_n, step):
    random.seed(z.scalar("python_random_seed"))
    gap = step if regime == "regular" else 1
    return np.array([sample_indices(*size_and_n, {"full": "all"}.get(regime, regime), gap, official=True)
                     for _ in range(z.scalar("num_clips"))])


def boxes(z, height, width, n):
    random.seed(z.scalar("python_random_seed"))
    return np.array([crop_box(height, width) for _ in range(n)])


@covers("timet/ema", inputs="student_* *_before momentum step")
def ema(z):
    def after(teacher, student, inverted):
        t, s = torch.nn.Module(), torch.nn.Module()
        t.w = torch.nn.Parameter(tensor(z[teacher])); s.w = torch.nn.Parameter(tensor(z[student]))
        ema_update(t, s, z.scalar("momentum"), inverted=inverted)
        return t.w.detach()
    yield "teacher_weight_after_training_script", lambda: after("teacher_weight_before", "student_weight", True), 1e-6
    yield "teacher_weight_after_eval_script_rule", lambda: after("teacher_weight_before", "student_weight", False), 1e-6
    yield ("teacher_prototypes_after_training_script", lambda: torch.nn.functional.normalize(
        after("teacher_prototypes_before", "student_prototypes", True), dim=1), 1e-6)
