"A model, data and a run that use every source of randomness: shared by the tests of the training loop."
import os
import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from timet_nb.base.train import constant, cosine, ema_update, fit, make_loader


class Noisy:
    "24 points, each drawn again in every epoch with torch, numpy and python randomness."
    def __init__(self, n=24, delay=0.): self.n, self.delay = n, delay
    def __len__(self): return self.n
    def __getitem__(self, i):
        x = torch.linspace(-1, 1, 4) * (int(i) + 1) / self.n
        x = x + .1 * torch.randn(4) + .1 * float(np.random.rand()) + .1 * random.random()
        if self.delay: import time; time.sleep(self.delay)
        return {"x": x, "y": x.sum()[None], "index": int(i)}


class Net(nn.Module):
    "A small net with dropout, a norm, a teacher and a queue of old outputs."
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(.2), nn.ReLU())
            self.head = nn.Linear(8, 1)
            self.teacher = nn.Linear(8, 1).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(6, 1))
    def forward(self, x): return self.head(self.body(x))


class Counter:
    "An extra object that belongs to the run."
    def __init__(self): self.seen, self.mean = 0, torch.zeros(1)
    def state_dict(self): return dict(seen=self.seen, mean=self.mean)
    def load_state_dict(self, s): self.seen, self.mean = s["seen"], s["mean"]


def loss_fn(model, batch):
    out = model(batch["x"])
    noise = random.random() * 1e-2 + float(np.random.rand()) * 1e-2     # the loop's own generators
    model.queue.copy_(torch.cat([out.detach()[:2], model.queue[:-2]]))
    return {"loss": F.mse_loss(out, batch["y"]) + noise * model.queue.mean() * out.mean(), "size": out.detach().abs().mean()}


def plans(net, steps=20):
    return [dict(name="head", params=net.head, lr=cosine(2e-2, 0, steps, warmup=3), weight_decay=cosine(.04, .4, steps)),
            dict(name="body", params=net.body, lr=constant(1e-2))]


def run(out, steps, workers=0, delay=0., groups=None, **options):
    "One call of fit on the toy; gives back the net, its counter and the result."
    net, counter = Net(), Counter()
    def after(model, i):
        ema_update(model.teacher, model.head, .9)
        counter.seen += 1; counter.mean = .9 * counter.mean + .1 * model.queue.mean()
        return {"probe": float(counter.mean)} if i % 5 == 4 else None
    options = dict(accumulate=2, clip=1., save_every=3, log_every=2, device="cpu", seed=5, after_step=after, state=[counter]) | options
    loader = options.pop("loader", None) or make_loader(Noisy(delay=delay), 4, workers=workers, seed=9)
    result = fit(net, loss_fn, loader, groups(net) if groups else plans(net), steps, out=out, **options)
    return net, counter, result


def same(a, b):
    "Equal to the last bit, however nested."
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def forked(job, *args):
    "Run `job` in a forked child; returns its pid."
    pid = os.fork()
    if pid: return pid
    code = 1
    try: job(*args); code = 0
    except KeyboardInterrupt: code = 130
    except SystemExit as e: code = e.code
    except BaseException:
        import traceback; traceback.print_exc()
    finally: os._exit(code)


def ended(pid):
    "Wait for a child: its exit code, or minus the signal that killed it."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
