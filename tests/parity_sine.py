"Parity checks against golden/sine: position map, decoder in its four forms with all intermediates, criterion."
import numpy as np
import torch

from tests.parity import covers
from timet_nb.sine.interact import sine_positions
from timet_nb.sine.matching import CriterionConfig, Truth, match_identities, sine_loss
from timet_nb.sine.mformer import MFormer, Stage, block_mask, config_of, from_official
from timet_nb.sine.prompts import Marks, Prompt, join_prompts, make_prompt

TOL, LOSS = 1e-4, 1e-5


def tensor(x): return torch.from_numpy(np.array(x))


def weights(z, prefix="sd/"):
    return {n.removeprefix(prefix): tensor(z[n]) for n in z if n.startswith(prefix)}


def decoder(z, state=None):
    "Our decoder with the weights of a file, in the authors' settings."
    state = from_official(weights(z) if state is None else state)
    config = config_of(state, z.scalar("cfg/num_heads"))
    assert config.depth == z.scalar("cfg/depth") and config.dim == z.scalar("cfg/embedding_dim")
    net = MFormer(config).eval()
    net.load_state_dict(state)
    return net


def run(net, prompt, target):
    trace = {}
    with torch.no_grad(): return net(prompt, tensor(target), deep=True, trace=trace), trace


def pair(z):
    "The prompt of the training form: every mask is an object of its own."
    marks = Marks(list(tensor(z["in/ref_mask"]) > 0), tensor(z["in/ref_label"]))
    return make_prompt(tensor(z["in/ref_feature"]), marks, empty="zero", official=True)


STAGE = {"pred_id_logits": "id_logits", "pred_ins_logits": "ins_logits", "pred_id_masks": "id_masks",
         "pred_ins_masks": "ins_masks", "id_hidden_states": "id_embed", "ins_hidden_states": "ins_embed"}


def stages(z, answers, prompt, out="out/"):
    "Every head output of every stage that the file holds."
    for name in z.like(out + "*"):
        *where, last = name.removeprefix(out).split("/")
        stage = answers.aux[int(where[0].removeprefix("aux"))] if where else answers
        if last in STAGE: yield name, getattr(stage, STAGE[last]), TOL
    yield out + "ref_sem_labels", prompt.sem_labels[None], 0
    if out + "ref_id_labels" in z: yield out + "ref_id_labels", prompt.id_labels[None], 0


@covers("sine/position_encoding")
def positions(z):
    for name in z.like("out/nf*"):
        n, h, w = (int(part[k:]) for part, k in zip(name.removeprefix("out/").split("_"), (2, 1, 1)))
        yield name, sine_positions(2 * n, (h, w))[None], 1e-5


@covers("sine/mformer_train")
def train(z):
    net, prompt = decoder(z), pair(z)
    answers, t = run(net, prompt, z["in/tar_feature"])
    yield from stages(z, answers, prompt)
    yield from inside(z, net, prompt, t)


def inside(z, net, prompt, t):
    "Intermediates of a run, in the authors' order of axes: queries first."
    scene, first = t["scene"], lambda x: x.transpose(0, 1)
    parts = lambda x: dict(zip(("id", "ins", "sem"), first(x).split(scene.split)))
    heads = net.config.heads
    yield "mid/tar_mask_feature", scene.masks, TOL
    yield "mid/mask_pooling/call0", prompt.id_tokens[None], TOL
    yield "mid/mask_pooling/call1", prompt.sem_tokens[None], TOL
    for name in z.like("mid/fusion*/call*"):
        block, call = name.removeprefix("mid/").split("/")
        yield name, lambda b=block, c=call: first(t[b][int(c[-1])]), TOL
    yield "mid/image_feat_fused", first(scene.image), TOL
    yield "mid/image_pe", scene.image_pos.T.reshape(z["mid/image_pe"].shape), 1e-5
    yield "mid/corr_raw", t["corr_raw"], TOL
    yield "mid/corr_gauss", t["corr_gauss"], TOL
    yield "mid/sa_attn_mask", ~block_mask(*scene.split), 0
    for name in z.like("mid/query_pos/*"): yield name, parts(scene.pos)[name.split("/")[-1]], TOL
    for name in z.like("mid/layer0_in/*"): yield name, parts(t["queries"])[name.split("/")[-1]], TOL
    for name in z.like("mid/layer[0-9]/*"):
        _, layer, part = name.split("/")
        yield name, lambda a=layer, p=part: parts(t[a])[p], TOL
    for name in z.like("mid/attn_mask_stage*"):
        k = int(name.removeprefix("mid/attn_mask_stage"))
        x = t["queries"] if not k else t[f"layer{k - 1}"]
        yield name, lambda x=x: blocked(net, x, scene, heads), 0


def blocked(net, x, scene, heads):
    with torch.no_grad(): return ~net._regions(x, scene).expand(heads, -1, -1)


@covers("sine/mformer_fullmask")
def fullmask(z):
    net, prompt = decoder(z), pair(z)
    answers, t = run(net, prompt, z["in/tar_feature"])
    yield from stages(z, answers, prompt)
    mask = blocked(net, t["queries"], t["scene"], net.config.heads)
    yield "mid/attn_mask_stage0", mask, 0
    yield "mid/num_fully_masked_queries", mask[0].all(-1).sum(), 0


@covers("sine/mformer_variants", inputs="*/in/*")
def variants(z):
    "n-shot, memory frames, and a bank; weights are those of mformer_train in the same folder."
    net = decoder(z, weights(sibling(z, "mformer_train")))
    for name, prompt in (("fss", shots(z)), ("vos", memory(z))):
        answers, _ = run(net, prompt, z[f"{name}/in/tar_feature"])
        yield from stages(z, answers, prompt, f"{name}/out/")
    for out, prompt in (("out_with_id", bank(z)), ("out_no_id", bank(z).without_ids())):
        answers, _ = run(net, prompt, z["fsod/in/tar_feature"])
        yield from stages(z, answers, prompt, f"fsod/{out}/")


def shots(z):
    "Every shot is an object of its own; its class is pooled over all shots."
    n = len(z["fss/in/ref_labels"])
    marks = Marks(list(tensor(z["fss/in/ref_masks"])[:, 0] > 0), tensor(z["fss/in/ref_labels"]), shots=range(n))
    return make_prompt(tensor(z["fss/in/ref_features"]), marks, empty="zero", official=True)


def memory(z):
    "Every object is a class of its own; one prompt a frame, joined: nothing is pooled twice."
    ids, frames = tensor(z["vos/in/ref_ids"]), zip(tensor(z["vos/in/ref_features"]), tensor(z["vos/in/ref_masks"]) > 0)
    each = [make_prompt([f], Marks(list(m), i[None], i[None]), empty="zero", official=True)
            for i, (f, m) in zip(ids, frames)]
    return join_prompts(each, same=True)


def bank(z):
    "Tokens that were stored. The objects of a bank have no area here, and the authors keep their order."
    ids, sem = tensor(z["fsod/in/id_queries"]), tensor(z["fsod/in/seg_queries"])
    return Prompt(ids, torch.ones(len(ids)), torch.arange(len(ids)), tensor(z["fsod/in/id_labels"]),
                  sem, torch.ones(len(sem)), tensor(z["fsod/in/seg_labels"]))


def sibling(z, stem):
    from tests.parity import Arrays
    return Arrays(z.path.with_name(stem + ".npz"))


@covers("sine/criterion*")
def criterion(z):
    "All stages of the loss, with the authors' random numbers; ids are paired as they pair them."
    batch = sorted({n.split("/")[1] for n in z.like("in/b*")})
    config = settings(z, "position")
    outputs = [stages_of(z, b) for b in batch]
    truths = [truth(z, b) for b in batch]
    trace = []
    got = sine_loss(outputs, truths, config, draw=Replay(z), trace=trace)
    for name in z.like("out/loss_*"): yield name, got[name.removeprefix("out/loss_")], LOSS
    yield "out/total_weighted", got["loss"], TOL
    for name in z.like("mid/match*/*"):
        _, where, what = name.split("/")
        stage, image = divmod(int(where.removeprefix("match")), len(batch))
        one = {"cost": lambda: trace[stage]["costs"][image], "row": lambda: trace[stage]["ins"][image][0],
               "col": lambda: trace[stage]["ins"][image][1]}
        yield name, one[what](), TOL if what == "cost" else 0
    for name in z.like("mid/idmatch*/*"):
        _, stage, b = name.split("/")
        yield name, torch.stack(trace[int(stage.removeprefix("idmatch"))]["ids"][batch.index(b)]), 0
    for name in z.like("mid/loss_points*"):
        yield name, trace[int(name.removeprefix("mid/loss_points"))]["points"][0], 1e-6
    if ordered(truths): yield from by_value(z, batch, got)


def by_value(z, batch, got):
    "Where ids stand in one order, pairing by value must agree as well."
    again = sine_loss([stages_of(z, b) for b in batch], [truth(z, b) for b in batch], settings(z, "value"), draw=Replay(z))
    gap = max(float((again[n] - got[n]).abs()) for n in got)
    if gap > LOSS: raise AssertionError(f"pairing by value differs by {gap:.1e} although the ids are in order")
    return ()


def ordered(truths):
    "Whether both ways of pairing give the same pairs."
    both = [[match_identities(t, CriterionConfig(pairing=by)) for t in truths] for by in ("value", "position")]
    return all(torch.equal(x, y) for a, b in zip(*both) for x, y in zip(a, b))


def settings(z, pairing):
    ce, mask, dice = z["cfg/weights_ce_mask_dice"].tolist()
    return CriterionConfig(ce, mask, dice, z.scalar("cfg/eos"), z.scalar("cfg/num_points"), pairing=pairing, gate=False)


class Replay:
    "Gives the recorded random numbers in the order of the calls."
    def __init__(self, z): self.z, self.at = z, 0

    def __call__(self, *shape):
        x = tensor(self.z[f"rng/rand{self.at}"]); self.at += 1
        if tuple(x.shape) != shape: raise ValueError(f"call {self.at - 1}: we ask for {shape}, they drew {tuple(x.shape)}")
        return x


def stages_of(z, b):
    from timet_nb.sine.mformer import Answers
    def fields(p):
        have = {v: tensor(z[f"in/{b}/{p}{k}"]) for k, v in STAGE.items() if f"in/{b}/{p}{k}" in z}
        return dict(id_embed=torch.zeros(0), ins_embed=torch.zeros(0), **have)
    return Answers(**fields(""), aux=tuple(Stage(**fields(f"aux{k}/")) for k in range(z.scalar("cfg/naux"))))


def truth(z, b):
    get = lambda n: tensor(z[f"in/{b}/{n}"])
    return Truth(get("tar_labels_t"), get("tar_masks"), get("tar_ids"), get("ref_ids"))
