"Parity checks against golden/dcsam: the few-shot and the video metric."
import numpy as np

from tests.parity import covers
from tests.parity_sine_metrics import few_shot
from timet_nb.evaluate.overlap import boundary_f, region_j


@covers("dcsam/metrics_jf", inputs="pred gt")
def metrics_jf(z):
    yield "J", lambda: region_j(z["gt"], z["pred"]), 1e-9
    yield "F", lambda: boundary_f(z["gt"], z["pred"]), 1e-9


@covers("dcsam/metrics_fss", inputs="*_pred *_gt *_class_id *_class_ids_of_fold *_ignore")
def metrics_fss(z):
    for data in sorted(n.removesuffix("_pred") for n in z.like("*_pred")):
        result = few_shot(z[f"{data}_class_ids_of_fold"], z[f"{data}_pred"], z[f"{data}_gt"],
                          z[f"{data}_class_id"], z.get(f"{data}_ignore"))
        inter, union = (np.zeros(z[f"{data}_inter"].shape) for _ in range(2))
        for c, (right, extra, missed, found) in result.counts.items():
            inter[:, c] = right, found
            union[:, c] = right + extra + missed, found + extra + missed
        yield f"{data}_inter", inter, 0.
        yield f"{data}_union", union, 0.
        yield f"{data}_miou", 100 * result.miou, 1e-4
        yield f"{data}_fbiou", 100 * result.fb_iou, 1e-4
