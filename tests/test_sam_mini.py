"The small SAM: clicks played by a program, pictures with parts, hints, training, and the shipped file."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from timet_nb.base.record import read_json
from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.data.classes import class_set
from timet_nb.evaluate.boundary import mask_iou
from timet_nb.features.backbone import create_backbone
from timet_nb.features.checkpoints import load_header, load_state
from timet_nb.sam.clicks import (
    Click, FloodClicker, NearestClicker, SamClicker, depth_map, evaluate_clicks, first_click, next_click, play,
    stack_clicks, tune_clicker)
from timet_nb.sam.mini import HELD_OUT, held_out, listening, make_mini, surrounded, training_pictures
from timet_nb.sam.mini_asks import Asks, MiniTrainConfig, Turn, correct, draw_asks, fill_bank, keep, open_turn
from timet_nb.sam.mini_model import create_mini, mini_sam, save_mini, shipped_sam
from timet_nb.sam.mini_rounds import answer_costs, click_loss, halved, mask_costs, train_mini
from timet_nb.sam.prompt_decoder import Decoded
from timet_nb.sam.scenes import Shown, composed, generated, nested_scene, paired, varied, world_frame
from timet_nb.sam.segment import Sam, SamConfig
from timet_nb.data.casting import texture_world
from timet_nb.data.textures import write_textures

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(): return create_mini(SamConfig.mini_test(), seed=3)


@pytest.fixture(scope="module")
def bank(tiny): return fill_bank(tiny, generated(5, 3))


def block(h=30, w=50, rows=(8, 20), cols=(10, 40)):
    m = torch.zeros(h, w, dtype=torch.bool); m[slice(*rows), slice(*cols)] = True
    return m


# clicks
def test_depth_counts_the_border_of_the_picture_as_outside():
    full = torch.ones(9, 15, dtype=torch.bool)
    assert float(depth_map(full).max()) == 5 and float(depth_map(full)[0].max()) == 1


def test_first_click_is_x_then_y_and_inside():
    m = block(rows=(2, 5), cols=(30, 49))
    c = first_click(m)
    assert m[int(c.y), int(c.x)] and c.x > c.y and c.label == 1


@pytest.mark.parametrize("bad, words", [(torch.zeros(5, 5, dtype=torch.bool), "empty"), (torch.ones(5, 5).long(), "bool"),
                                        (torch.ones(1, 5, 5, dtype=torch.bool), "bool"), ("mask", "bool")])
def test_faults_of_a_truth(bad, words):
    with pytest.raises(DataError, match=words): first_click(bad)


def test_faults_of_a_round():
    m = block()
    with pytest.raises(DataError, match="as the truth"): next_click(m, m[:, :9])
    with pytest.raises(ConfigError, match="rng"): next_click(m, ~m, "random")
    with pytest.raises(ConfigError, match="middle or random"): first_click(m, "center")
    with pytest.raises(ConfigError, match="1 click"): play(lambda *_: m, m, 0)
    with pytest.raises(DataError, match="no target"): evaluate_clicks(FloodClicker(), [])


def test_next_click_goes_to_the_deepest_error_with_the_label_of_the_truth():
    truth, answer = block(), block(cols=(10, 30))          # missed: 10 wide
    answer[25:28, :3] = True                                # too much, but shallow
    c = next_click(truth, answer)
    assert c.label == 1 and 30 <= c.x < 40
    answer = truth.clone(); answer[:, 42:] = True
    assert next_click(truth, answer).label == 0
    assert next_click(truth, truth) is None
    assert next_click(~truth & truth, truth).label == 0     # nothing is wanted: every mark is too much


def test_round_stops_when_nothing_is_wrong_and_keeps_its_score():
    truth = block()
    r = play(lambda p, l: truth if len(p) > 1 else block(cols=(10, 20)), truth, 4)
    assert len(r.clicks) == 2 and r.iou[1:] == (1., 1., 1.) and r.iou[0] < .5
    assert mask_iou(truth & ~truth, truth & ~truth) == 1.
    from timet_nb.sam import clicks
    assert clicks.mask_iou is mask_iou                     # importable from the room that had it first


def test_random_clicks_depend_on_the_dice_alone():
    truth = block()
    a, b, c = (play(lambda p, l: block(cols=(10, 20)), truth, 4, "random", np.random.default_rng(s)).clicks for s in (1, 1, 2))
    assert a == b != c


def test_flood_fill_listens_to_both_labels():
    image = torch.zeros(3, 30, 50); image[:, block()] = .8; image[0, block(cols=(25, 40))] = .75
    one = FloodClicker(30.).start(image)(*stack_clicks([Click(12, 12, 1)]))
    two = FloodClicker(30.).start(image)(*stack_clicks([Click(12, 12, 1), Click(35, 12, 0)]))
    assert mask_iou(one, block()) == 1. and mask_iou(two, block(cols=(10, 25))) == 1.
    edge = FloodClicker(5.).start(image)(torch.tensor([[50., 30.]]), torch.tensor([1]))   # on the outer border
    assert edge[29, 49]


def test_nearest_feature_needs_a_cell_like_the_click():
    maps = torch.zeros(1, 2, 3, 5); maps[:, 0, :, :2], maps[:, 1, :, 2:] = 1, 1
    answer = NearestClicker(lambda x: maps, .5).start(torch.zeros(3, 30, 50))
    assert mask_iou(answer(*stack_clicks([Click(2, 2, 1)])), block(30, 50, (0, 30), (0, 20))) > .9
    swapped = answer(*stack_clicks([Click(45, 2, 1)]))
    assert not (swapped & answer(*stack_clicks([Click(2, 2, 1)]))).any()


def test_settings_are_chosen_by_the_best_mean():
    shown = [Shown("a", torch.zeros(3, 30, 50), block()[None])]
    class Paint:
        def __init__(self, right): self.right = right
        def start(self, image): return lambda p, l: block() if self.right else ~block()
    value, rows = tune_clicker(Paint, (False, True), shown, 2)
    assert value is True and [r["value"] for r in rows] == [False, True]


# pictures
def test_targets_must_fit_their_picture():
    with pytest.raises(DataError, match="targets of x"): Shown("x", torch.zeros(3, 9, 9), torch.zeros(1, 9, 8, dtype=torch.bool))
    with pytest.raises(DataError, match="bool"): Shown("x", torch.zeros(3, 9, 9), torch.zeros(1, 9, 9))


def test_parts_lie_in_their_wholes_and_seeds_fix_pictures():
    world = texture_world(area=(.03, .14))
    scenes = [nested_scene(world, k) for k in range(4)]
    assert any(int(s.targets.sum(0).max()) > 1 for s in scenes)
    again = nested_scene(world, 2)
    assert torch.equal(again.image, scenes[2].image) and torch.equal(again.targets, scenes[2].targets)


def test_varied_keeps_picture_and_masks_together():
    image = torch.zeros(3, 60, 80); image[1, 10:30, 5:45] = 1
    for k in range(6):
        v = varied(Shown("g", image, image[1:2] > .5), np.random.default_rng(k))
        assert all(torch.equal(v.image[1] > .3, t) for t in v.targets)
        assert v.image.shape[1:] == v.targets.shape[1:]


def test_held_out_clips_are_never_trained_on(real_data):
    pairs = Path(real_data) / "davis2016_pairs"
    assert set(HELD_OUT) & {i.group for i in class_set(pairs).items}            # they would be there
    groups = {s.group for s, _ in zip(training_pictures("smoke", 0, pairs), range(400))}
    assert len(groups) > 20 and not groups & set(HELD_OUT)


def test_labelled_pictures_of_a_folder(tmp_path):
    folder = write_textures(tmp_path / "w", 2, 0, n_novel=1)
    labelled = class_set(folder)
    real = list(paired(labelled, 1, 0))
    assert len([s for s in real if s.name.endswith("/0")]) == len(labelled)
    assert all(s.targets.any() for s in composed(labelled, 2, 0))


# the model
def test_hints_are_zero_without_a_click_and_do_not_mix_prompts(tiny):
    maps = tiny.look(torch.rand(3, 40, 60)).embedding
    nn.init.normal_(tiny.hint[2].weight, generator=torch.Generator().manual_seed(0))
    try:
        at = torch.tensor([[[20., 30.], [90., 90.]], [[70., 10.], [3., 4.]]])
        both = tiny.hints(maps, at, torch.tensor([[1, 0], [1, -1]]))
        assert torch.allclose(both[1:], tiny.hints(maps, at[1:, :1], torch.tensor([[1]])), atol=1e-5)
        assert not tiny.hints(maps, at, torch.tensor([[2, 3], [-1, -1]])).any()
        swapped = tiny.likeness(maps, at.flip(-1), torch.tensor([[1, 0], [1, -1]]))
        assert not torch.allclose(swapped, tiny.likeness(maps, at, torch.tensor([[1, 0], [1, -1]])))
    finally: nn.init.zeros_(tiny.hint[2].weight)


def test_answers_have_the_size_of_any_picture(tiny):
    for H, W in ((20, 200), (64, 31), (128, 128)):
        seen = tiny.look(torch.rand(3, H, W))
        a = tiny.ask(seen, points=[[W / 2, H / 2]])
        assert tuple(a.masks.shape) == (3, H, W) and tuple(a.low.shape) == (3, 64, 64)
        assert tuple(tiny.ask(seen, points=[[1., 1.], [2., 2.]], labels=[1, 0], mask=a.low[0]).masks.shape) == (1, H, W)
        assert tuple(tiny.ask(seen, box=[0, 0, W / 2, H / 2]).masks.shape) == (1, H, W)
        assert tuple(tiny.ask(seen, points=torch.rand(4, 1, 2) * 10).masks.shape) == (4, 3, H, W)


def test_faults_of_clicks_on_the_model(tiny):
    seen = tiny.look(torch.rand(3, 40, 60))
    with pytest.raises(DataError, match="no point"): tiny.ask(seen)
    with pytest.raises(DataError, match="swapped"): tiny.ask(seen, points=[[30., 55.]])
    with pytest.raises(DataError, match="both 1 and 0"): tiny.ask(seen, points=[[5., 5.], [5., 5.]], labels=[1, 0])
    with pytest.raises(DataError, match="empty mask"): tiny.ask(seen, mask=torch.zeros(40, 60, dtype=torch.bool))
    with pytest.raises(DataError, match="left < right"): tiny.ask(seen, box=[5, 5, 5, 9])
    full = tiny.ask(seen, mask=torch.ones(40, 60, dtype=torch.bool))
    assert torch.isfinite(full.masks).all()


def test_model_is_refused_with_settings_that_do_not_fit():
    with pytest.raises(ConfigError, match="stride"): create_mini(SamConfig.mini_test(stride=16))
    with pytest.raises(ConfigError, match="rising"): create_mini(SamConfig.mini_test(options=(("backbone", "test-vit"), ("blocks", (3, 1)))))


def test_clicker_gives_the_last_mask_back(tiny):
    r = play(SamClicker(tiny).start(torch.rand(3, 30, 50)), block(), 3)
    assert len(r.iou) == 3 and r.masks[0].shape == (30, 50)


# training
def test_kept_picture_is_what_the_eye_saw(tiny):
    shown = next(generated(1, 3))
    kept = keep(tiny, shown)
    x = kept.canvas[None].float() / 255
    assert torch.allclose(kept.raw.float(), tiny.image_encoder.raw(x)[0], atol=2e-2)
    speck = replace(shown, targets=torch.zeros_like(shown.targets[:1])); speck.targets[0, 3, 3] = True
    assert keep(tiny, speck) is None
    assert halved(kept).raw.shape[1] * 2 == kept.raw.shape[1]


def test_questions_depend_on_their_number_alone(bank):
    c = MiniTrainConfig(coarse=3)
    assert draw_asks(bank, c, 0, 7) == draw_asks(bank, c, 0, 7) != draw_asks(bank, c, 0, 8)
    assert draw_asks(bank, c, 0, 2).coarse and not draw_asks(bank, c, 0, 3).coarse


def test_words_of_a_turn():
    truth = torch.stack([block(64, 64, (8, 20), (10, 40))] * 3)
    turn = open_turn(truth, ("point", "box", "mask"), np.random.default_rng(0))
    assert turn.labels.tolist() == [[1, -1], [2, 3], [-1, -1]] and turn.has.tolist() == [False, False, True]
    x, y = turn.coords[0, 0].round().long().tolist()
    assert truth[0, y, x]
    assert mask_iou(turn.low[2, 0] > 0, truth[2]) > .4
    wrong = torch.where(truth, -5., 5.)[:, None]
    more = correct(turn, truth, wrong, np.random.default_rng(0))
    for k in range(3):
        x, y = more.coords[k, -1].round().long().tolist()
        assert more.labels[k, -1] == int(truth[k, y, x])


def test_losses_of_a_right_and_a_wrong_mask():
    y = block(16, 16, (4, 9), (2, 12))[None]
    logits = torch.where(y, 12., -12.)[:, None]
    cost, iou = mask_costs(torch.cat([logits, -logits], 1), y)
    assert cost[0, 0] < 1e-3 < 10 < cost[0, 1] and iou.tolist() == [[1., 0.]]
    huge, _ = mask_costs(logits * 1e4, y)
    assert torch.isfinite(huge).all()


def test_one_of_three_masks_is_taught():
    masks = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    said = Decoded(masks, torch.full((2, 4), .5), torch.zeros(2, 4, 8), torch.zeros(2, 1))
    loss, iou = answer_costs(said, torch.ones(2, 8, 8, dtype=torch.bool), torch.tensor([1., 0.]))
    loss.backward()
    push = masks.grad.flatten(2).norm(dim=2)
    cost = mask_costs(masks, torch.ones(2, 8, 8, dtype=torch.bool))[0]
    assert push[0].gt(0).nonzero().flatten().tolist() == [0, 1 + int(cost[0, 1:].argmin())] and not push[1].any()
    assert iou.shape == (2, 4)


def test_next_words_are_errors_with_the_label_of_the_truth():
    truth = block(6, 6, (1, 3), (1, 3)); slid = truth.roll(1, 1)
    turn = Turn(torch.zeros(1, 0, 2), torch.zeros(1, 0).long(), torch.zeros(1, 1, 6, 6), torch.ones(1).bool())
    said = {}
    for k in range(100):
        t = correct(turn, truth[None], torch.where(slid, 1., -1.)[None, None], np.random.default_rng(k))
        said[tuple(t.coords[0, 0].round().long().tolist())] = int(t.labels[0, 0])
    assert said == {(x, y): int(truth[y, x]) for y, x in (truth ^ slid).nonzero().tolist()}


def test_questions_losses_and_model_can_be_had_from_mini():
    from timet_nb.sam import mini, mini_asks, mini_model, mini_rounds
    homes = {mini_asks: "Asks Kept MiniTrainConfig Turn correct draw_asks fill_bank keep open_turn",
             mini_rounds: "answer_costs click_loss halved mask_costs say train_mini",
             mini_model: "MiniEyes MiniSam SHIPPED create_mini mini_sam save_mini shipped_sam SamConfig"}
    for home, names in homes.items():
        for n in names.split(): assert n in mini.__all__ and getattr(mini, n) is getattr(home, n)


def test_absent_things_teach_no_mask(tiny, bank):
    grads = {}
    for kind in ("absent", "mask"):
        tiny.zero_grad(set_to_none=True)
        click_loss(tiny, bank, Asks((0, 1), (0,), (0,), (kind,), 3), MiniTrainConfig(rounds=1))["loss"].backward()
        g = tiny.mask_decoder.output_hypernetworks_mlps[0].layers[0].weight.grad
        grads[kind] = 0. if g is None else float(g.abs().sum())
    assert grads["absent"] == 0 < grads["mask"]


def test_training_changes_all_but_the_eye(bank):
    sam = create_mini(SamConfig.mini_test(), seed=3)
    before = {k: v.clone() for k, v in sam.state_dict().items()}
    run = train_mini(sam, bank, MiniTrainConfig(steps=3, coarse=1, warmup=1, batch=2, prompts=1, rounds=2))
    moved = {k for k, v in sam.state_dict().items() if not torch.equal(v, before[k])}
    assert run.step == 3 and not any("backbone" in k or "gaussian" in k for k in moved)
    assert {k.split(".")[0] for k in moved} >= {"image_encoder", "mask_decoder", "prompt_encoder", "hint"}
    assert sam.prompt_encoder.grid == (16, 16)


def test_a_file_knows_its_eyes(tmp_path):
    sam = make_mini(tmp_path / "a.safetensors", "smoke", 0, config=SamConfig.mini_test(),
                    train=MiniTrainConfig(steps=1, coarse=0, warmup=0, batch=1, prompts=1, rounds=1))
    back = mini_sam(tmp_path / "a.safetensors")
    assert torch.allclose(back.key.weight, sam.key.weight, atol=1e-3)
    assert "generated" in load_header(tmp_path / "a.safetensors")["trained_on"]
    with pytest.raises(CheckpointError, match="other features"): mini_sam(tmp_path / "a.safetensors", create_backbone("test-vit", seed=9))
    Sam.save(sam, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="no small SAM"): mini_sam(tmp_path / "b.safetensors")
    state = load_state(tmp_path / "a.safetensors"); state.pop("key.weight")
    from timet_nb.features.checkpoints import save_state
    save_state(tmp_path / "c.safetensors", state, load_header(tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError): mini_sam(tmp_path / "c.safetensors")
    save_mini(sam, tmp_path / "d.safetensors", note="mine")
    assert load_header(tmp_path / "d.safetensors")["note"] == "mine"


def test_surroundings_are_targets_of_labelled_pictures_only(bank):
    photo = replace(bank[0], group="clip", targets=bank[0].targets[:1])
    both = surrounded(photo).targets
    assert len(both) == 2 and torch.equal(both[1], ~both[0])
    assert all(torch.equal(surrounded(k).targets, k.targets) for k in bank)               # generated
    assert len(surrounded(replace(photo, targets=torch.ones_like(photo.targets))).targets) == 1   # nothing around
    c = listening(MiniTrainConfig(steps=480, coarse=400, batch=2), 160)
    assert c == MiniTrainConfig(steps=160, coarse=115, batch=2, lr=5e-4, warmup=10)


def test_listening_is_a_second_phase_with_surroundings(tmp_path, monkeypatch):
    from timet_nb.sam import mini
    phases = []
    def spy(sam, bank, config, seed=0):
        before = sam.key.weight.clone()
        train_mini(sam, bank, config, seed=seed)
        phases.append((bank, config, seed, not torch.equal(before, sam.key.weight)))
    monkeypatch.setattr(mini, "train_mini", spy)
    folder = write_textures(tmp_path / "w", 2, 0, n_novel=1)
    first = MiniTrainConfig(steps=2, coarse=1, warmup=0, batch=1, prompts=1, rounds=1)
    made = {n: make_mini(tmp_path / f"{n}.safetensors", "smoke", 0, folder, SamConfig.mini_test(), first, n) for n in (0, 3)}
    (bank, c, seed, moved), again, (more, c2, seed2, moved2) = phases
    assert c == again[1] == first and seed == 0 and moved and moved2 and (c2.steps, c2.coarse, seed2) == (3, 2, 5)
    assert len(bank) == len(again[0]) == len(more) and any(k.group for k in bank) and any(not k.group for k in bank)
    for old, new in zip(again[0], more):
        extra = len(new.targets) - len(old.targets)
        assert torch.equal(new.targets[:len(old.targets)], old.targets) and extra == int(bool(old.group))
        assert not extra or not (new.targets[-1] & old.targets.any(0)).any()
    assert not torch.equal(made[0].key.weight, made[3].key.weight)
    assert [load_header(tmp_path / f"{n}.safetensors")["listen"] for n in (0, 3)] == [0, 3]
    with pytest.raises(ConfigError, match="labelled pictures"): make_mini(budget="smoke", config=SamConfig.mini_test(), listen=3)


def test_listen_is_a_word_of_the_command(tmp_path, monkeypatch):
    from timet_nb.sam import mini
    got = {}
    def fake(path, *a, **k): got.update(k, a=a); Path(path).write_bytes(b"x")
    monkeypatch.setattr(mini, "make_mini", fake)
    mini.main(["--out", str(tmp_path / "x"), "--budget", "cpu", "--data", "pairs", "--listen", "160"])
    assert got == dict(a=("cpu", 0, "pairs"), listen=160)


def test_budgets_are_named():
    with pytest.raises(ConfigError, match="smoke"): list(training_pictures("long"))


# what is shipped
@pytest.mark.skipif(shipped_sam() is None, reason="no shipped weights in this installation")
def test_shipped_file_is_small_and_says_what_it_saw():
    path = shipped_sam()
    notes = load_header(path)
    assert path.stat().st_size < 8_000_000 and notes["trained_on"] and notes["hints"] is True
    assert not any("backbone" in k for k in load_state(path))


def test_recorded_figures_beat_the_players_without_training():
    path = ROOT / "data" / "results" / "sam-mini.json"
    if not path.is_file(): pytest.skip("no recorded figures")
    known = read_json(path)
    rows = {r["player"]: r["iou"] for r in known["rows"]}
    ours = rows[known["shipped"]]
    for name, iou in rows.items():
        if not name.startswith("small SAM"): assert ours[0] > iou[0] and ours[2] > iou[2], name


@pytest.mark.weights
def test_shipped_model_follows_clicks(vit):
    if shipped_sam() is None: pytest.skip("no shipped weights in this installation")
    shown = list(generated(5, 4711))
    ours = evaluate_clicks(SamClicker(mini_sam()), shown, 3)
    fill = evaluate_clicks(FloodClicker(10., 2.), shown, 3)
    assert ours.iou[0] > fill.iou[0] and ours.iou[2] > fill.iou[2] and ours.iou[2] > .4


@pytest.mark.weights
def test_shipped_model_listens(vit):
    if shipped_sam() is None: pytest.skip("no shipped weights in this installation")
    sam, on, beside = mini_sam(), [], []
    for k in range(4):
        frame = world_frame(9_000_000 + k)
        goal = frame.targets[int(frame.targets.flatten(1).sum(1).argmax())]
        seen = sam.look(frame.image)
        for m, found in ((goal, on), (~goal, beside)):
            found.append(mask_iou(sam.ask(seen, *stack_clicks([first_click(m)])).mask, goal))
    assert min(on) > .6 and max(beside) < .1, (on, beside)


@pytest.mark.data
def test_held_out_frames_are_those_of_the_clips(real_data):
    shown = list(held_out(Path(real_data) / "davis2016", 1, HELD_OUT[:2]))
    assert [s.group for s in shown] == list(HELD_OUT[:2]) and all(s.targets.any() for s in shown)
