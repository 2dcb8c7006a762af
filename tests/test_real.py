"Real video: every clip is decoded, time-tuning runs on clips without masks and is measured on others with them."
import pytest
import torch


@pytest.mark.data
def test_layouts_are_found(real_data):
    from timet_nb.data.layout import find_layout
    labelled, plain, pairs = (find_layout(real_data / n) for n in ("davis2016", "davis2016_train", "davis2016_pairs"))
    assert (labelled.kind, len(labelled)) == ("davis", 10) and all(c.n_masks() == len(c) for c in labelled)
    assert len(plain) == 26 and not any(c.n_masks() for c in plain)
    assert len(pairs) == 42 and sum(len(c) for c in pairs) == 126


@pytest.mark.data
@pytest.mark.slow
def test_every_frame_and_mask_is_decoded(real_data):
    from timet_nb.data.frames import ClipReader
    from timet_nb.data.layout import find_layout
    for clip in find_layout(real_data / "davis2016"):
        seen = 0
        for frame, mask in ClipReader(clip, size=120, masks=True):
            assert frame.shape[1:] == mask.shape and 0 <= frame.min() and frame.max() <= 1
            assert set(mask.unique().tolist()) <= {0, 1}, f"{clip.name}: {mask.unique()}"
            seen += 1
        assert seen == len(clip)


@pytest.mark.data
@pytest.mark.weights
@pytest.mark.slow
def test_tuning_on_real_video_and_measuring_on_other_clips(real_data, vit, tmp_path):
    from timet_nb.evaluate.measure import mean_row, measure
    from timet_nb.data.layout import find_layout
    from timet_nb.timet.tune import TimeTConfig, time_tune
    config = TimeTConfig.mini(views=1, max_frames=4, frame_step=4, batch=4, size=112, steps=6, prototypes=50)
    made = time_tune(find_layout(real_data / "davis2016_train"), config, out=tmp_path, device="cpu")
    losses = [h["loss"] for h in made.history]
    assert len(losses) == 6 and all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0]
    rows = measure(made.backbone, find_layout(real_data / "davis2016"), ["overcluster", "track"], size=112, every=4, frames=4, seeds=1)
    mean = mean_row(rows)
    assert len(rows) == 10 and .3 < mean["J"] < 1 and .3 < mean["OC10"] < 1
