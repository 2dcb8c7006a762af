"Parity checks against golden/dcsam: so far the video metric."
from tests.parity import covers
from timet_nb.evaluate.overlap import boundary_f, region_j


@covers("dcsam/metrics_jf", inputs="pred gt")
def metrics_jf(z):
    yield "J", lambda: region_j(z["gt"], z["pred"]), 1e-9
    yield "F", lambda: boundary_f(z["gt"], z["pred"]), 1e-9
