"Parity checks against golden/sine: the few-shot metric."
import numpy as np

from tests.parity import covers
from timet_nb.evaluate.fewshot import FewShotScore


def few_shot(classes, pred, gt, class_id, ignore=None):
    "The authors' score over episodes, from arrays (N, H, W); `ignore` marks pixels to leave out."
    gt = np.where(ignore > 0, 255, gt) if ignore is not None else gt
    score = FewShotScore(classes.tolist(), official=True)
    score.add(pred.astype(np.int64), gt.astype(np.int64), class_id)
    return score.result()


@covers("sine/fss_metric", inputs="in/*")
def fss_metric(z):
    ours = lambda: few_shot(z["in/class_ids_of_interest"], z["in/pred"], z["in/gt"], z["in/class_id"])
    yield "out/miou_percent", lambda: 100 * ours().miou, 1e-4
    yield "out/fb_iou_percent", lambda: 100 * ours().fb_iou, 1e-4
