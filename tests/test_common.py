"""python -m pytest tests/test_common.py"""

import copy
import gc
import json
import os
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import dcris
import etris
from common import UserError
from toolbox import costs, draw


def save_as_openai(clip, file):
    """CLIP's weights as OpenAI publishes them: a TorchScript archive with three notes among them."""
    class Archive(nn.Module):
        def __init__(self):
            super().__init__()
            for name, m in clip.named_children():
                setattr(self, name, m)
            for name, p in clip.named_parameters(recurse=False):
                setattr(self, name, p)
            for name in "input_resolution", "context_length", "vocab_size":
                self.register_buffer(name, torch.tensor(7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.trace(Archive(), torch.zeros(1)).save(str(file))


def two_steps(model, images, tokens, target):
    """Trains for two steps. -> (the state before, the fingerprint before)"""
    before, frozen = copy.deepcopy(model.state_dict()), common.fingerprint(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(model(images, tokens), target).backward()
        optimizer.step()
    return before, frozen


def attention(sd, name, q, k, heads, pad=None, v=None):
    """Multi-head attention written out, from a state dict."""
    w, b = sd[name + ".in_proj_weight"].chunk(3), sd[name + ".in_proj_bias"].chunk(3)
    q, k, v = (x @ w[i].T + b[i] for i, x in enumerate((q, k, k if v is None else v)))
    d = q.shape[2] // heads
    out = torch.empty_like(q)
    for h in range(heads):
        s = slice(h * d, (h + 1) * d)
        score = q[..., s] @ k[..., s].transpose(1, 2) / d**0.5
        if pad is not None:
            score = score.masked_fill(pad[:, None], -torch.inf)
        out[..., s] = score.softmax(-1) @ v[..., s]
    return out @ sd[name + ".out_proj.weight"].T + sd[name + ".out_proj.bias"]


def linear(sd, name, x):
    return x @ sd[name + ".weight"].T + sd[name + ".bias"]


def norm(sd, name, x):
    return F.layer_norm(x, x.shape[-1:], sd[name + ".weight"], sd[name + ".bias"])


def shuffle(module):
    """Other values for every parameter and statistic, so that none is hidden by a start at 0 or 1."""
    for name, t in module.state_dict().items():
        if t.is_floating_point():
            t.uniform_(0.5, 1.5) if "running_var" in name else t.normal_(std=0.2)


def test_metrics_by_hand():
    # IoU 1, 0.5, 0.25, 0 and two empty masks
    rows = [(10, 10), (5, 10), (25, 100), (0, 7), (0, 0)]
    m = common.mask_metrics(rows)
    assert m == {"n": 5, "oIoU": round(100 * 40 / 127, 4), "mIoU": round(100 * (1 + 0.5 + 0.25 + 0 + 1) / 5, 4),
                 "Pr@0.5": 40.0, "Pr@0.6": 40.0, "Pr@0.7": 40.0, "Pr@0.8": 40.0, "Pr@0.9": 40.0}  # 0.5 is not > 0.5


def test_box_metrics_by_hand():
    whole, half, apart = (0, 0, 10, 10), (0, 0, 10, 5), (20, 20, 30, 30)
    ious = [common.box_iou(whole, b) for b in (whole, half, apart, (5, 5, 15, 15), (10, 0, 20, 10), (3, 3, 3, 9))]
    assert ious == pytest.approx([1, 0.5, 0, 25 / 175, 0, 0])
    assert common.box_iou((3, 3, 3, 3), (3, 3, 3, 3)) == 0
    # IoU 0.5 counts
    assert common.box_metrics(ious) == {"n": 6, "Acc@0.5": round(200 / 6, 4), "mIoU": round(100 * (1.5 + 25 / 175) / 6, 4)}
    assert common.box_metrics([]) == {"n": 0, "Acc@0.5": 0, "mIoU": 0}


def test_metrics_against_a_slow_count():
    rng = np.random.default_rng(0)
    rows, ious, inter, union = [], [], 0, 0
    for _ in range(300):
        a, b = rng.random((2, 9, 7)) < rng.random((2, 1, 1))
        i = sum(bool(p and q) for p, q in zip(a.flat, b.flat))
        u = sum(bool(p or q) for p, q in zip(a.flat, b.flat))
        rows.append(common.intersection_union(torch.from_numpy(a), torch.from_numpy(b)))
        assert rows[-1] == (i, u)
        ious.append(i / u if u else 1.0)
        inter, union = inter + i, union + u
    m = common.mask_metrics(rows)
    assert m["oIoU"] == pytest.approx(100 * inter / union, abs=1e-4)
    assert m["mIoU"] == pytest.approx(100 * sum(ious) / 300, abs=1e-4)
    for x in 0.5, 0.7, 0.9:
        assert m[f"Pr@{x}"] == pytest.approx(100 * sum(v > x for v in ious) / 300, abs=1e-4)


class Small(nn.Module):
    """A frozen and a trained half, each with a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.c = dcris.config("tiny")
        self.tower = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).requires_grad_(False).eval()
        self.head = nn.Sequential(nn.Conv2d(4, 1, 1), nn.BatchNorm2d(1))

    def parts(self):
        return dict(backbone=[self.tower], adapter=[], head=[self.head])


def test_a_checkpoint_holds_what_was_trained_with_its_buffers(tmp_path):
    model = Small()
    assert common.trained_state(model).keys() == {
        "head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias", "head.1.running_mean", "head.1.running_var",
        "head.1.num_batches_tracked"}
    model.head(model.tower(torch.randn(2, 3, 5, 5)))
    info = dict(method="dcris", config={}, weights="random", seed=0, frozen="", dataset="shapes", data_root=None)
    common.write_tensors(tmp_path / "model.safetensors", common.trained_state(model), info)
    read, state = common.read_checkpoint(str(tmp_path))
    other = Small()
    common.load_trained(other, state, "here")
    assert read == info and torch.equal(other.head[1].running_mean, model.head[1].running_mean)
    with pytest.raises(UserError, match="1 tensors differ, such as head.0.bias"):
        common.load_trained(other, {k: v for k, v in state.items() if k != "head.0.bias"}, "here")


def test_the_fingerprint_is_of_what_is_frozen():
    model = Small()
    before = common.fingerprint(model)
    model.head[0].weight.data += 1
    assert common.fingerprint(model) == before
    model.tower[1].running_mean += 1  # a buffer counts
    assert common.fingerprint(model) != before
    for p in model.parameters():
        p.requires_grad_(True)
    assert common.fingerprint(model) == ""  # nothing is frozen


def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        common.read_checkpoint(str(tmp_path))
    from safetensors.torch import save_file
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="was not written by this project"):
        common.read_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match="no checkpoint here"):
        common.read_checkpoint(str(tmp_path / "none"))


def test_nothing_half_written_is_left_behind(tmp_path):
    target = tmp_path / "file.json"
    common.write_json(target, [1])
    with pytest.raises(ZeroDivisionError):
        with common.writing(target) as temporary:
            temporary.write_text("half")
            1 / 0
    assert json.loads(target.read_text()) == [1] and os.listdir(tmp_path) == ["file.json"]
    with pytest.raises(UserError, match="cannot be written"):
        common.write_json("/proc/none/file.json", [1])
    with pytest.raises(UserError, match="cannot be written"):
        common.write_json(target / "below a file.json", [1])


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = common.StopSignal()
    stop.received(15, None)
    stop.received(15, None)
    assert stop.number == 15 and not ended
    stop.since -= 3
    stop.received(2, None)
    assert ended == [130] and stop.number == 15


def test_counting():
    model = Small()
    assert common.count(model) == 3 * 4 + 4 + 8 + 4 + 1 + 2
    assert common.count(model, trainable=True) == 4 + 1 + 2
    assert common.count([model.head, model.head]) == 7  # each once


def test_saved_bytes_are_what_autograd_keeps():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)

        def forward(self, images, tokens):
            return self.b(self.a(images).relu())

        def loss(self, out, masks):
            return out.sum()

    x = torch.randn(5, 8)
    # the input (5 x 8) and the ReLU's output (5 x 16), once each, in float32; the weights do not count
    assert costs.saved_bytes(Twice(), x, None, None) == 4 * (5 * 8 + 5 * 16)
    frozen = Twice()
    frozen.a.requires_grad_(False)
    assert costs.saved_bytes(frozen, x, None, None) == 4 * (5 * 16)


def test_what_was_counted_is_freed():
    class Exp(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x, _):
            y = (self.w * x).exp()  # which is saved for its own backward
            self.seen = weakref.ref(y)
            return y

        def loss(self, y, _):
            return y.sum()

    model = Exp()
    assert costs.saved_bytes(model, torch.ones(3), None, None) == 2 * 3 * 4
    gc.collect()
    assert model.seen() is None


def test_efficiency_of_tiny():
    torch.manual_seed(0)
    rows = {t: costs.efficiency(dcris.DCRIS(dcris.config("tiny", tune=t))) for t in ("method", "frozen", "full")}
    assert rows["method"]["params_adapter"] == 36_344 and rows["frozen"]["params_adapter"] == 0
    assert rows["frozen"]["saved_bytes_per_image"] < rows["method"]["saved_bytes_per_image"]
    assert rows["frozen"]["params_trainable"] == rows["frozen"]["params_head"]
    assert rows["full"]["gflops_forward"] == rows["frozen"]["gflops_forward"] < rows["method"]["gflops_forward"]


def test_drawing():
    image, mask = np.zeros((30, 40, 3), dtype=np.uint8), np.zeros((30, 40), dtype=bool)
    mask[10:20, 0:10] = True
    picture = draw.overlay(image, [mask], ["a sentence " * 20])
    assert picture.width == 480 and picture.height > 360  # drawn larger, with lines of text below
    pixels = np.asarray(picture)
    assert pixels[180, 60, 0] > 80 and (pixels[180, 300] == 0).all()  # tinted inside, untouched outside
    assert draw.overlay(image, [~mask & mask], ["犬 \U0001f415 " + "x" * 300]).width == 480
    assert draw.grid([picture] * 5, 2).size == (960, 3 * picture.height)


def test_answers_in_colours_of_their_own():
    image = np.zeros((48, 60, 3), dtype=np.uint8)
    masks = [np.zeros((48, 60), dtype=bool) for _ in range(2)]
    masks[0][5:20, 5:20] = masks[1][25:40, 25:40] = True
    pixels = np.asarray(draw.overlay(image, masks, ["one", "two"], least=48))
    for n, at in enumerate([(10, 10), (30, 30)]):
        assert np.abs(pixels[at] - 0.45 * draw.COLORS[n]).max() < 1
        assert (pixels[48:] == draw.COLORS[n]).all(2).sum() > 20  # its mark in the legend
    boxes = np.asarray(draw.overlay(image, [(5, 5, 20, 20), (25, 25, 40, 40)], least=48))
    assert tuple(boxes[5, 10]) == tuple(draw.COLORS[0]) and tuple(boxes[25, 30]) == tuple(draw.COLORS[1])
    assert draw.overlay(image, [None], ["nothing"], least=48).size[0] == 60


# what two method files have in common


@pytest.mark.parametrize("method", [dcris, etris])
def test_the_dynamic_kernel_is_a_convolution(method):
    proj = method.Projector(16, 8)
    proj.vis = nn.Identity()
    f_c, f_s = torch.randn(3, 8, 5, 7), torch.randn(3, 8)
    weights = proj.txt(f_s)
    expected = torch.cat([F.conv2d(f_c[i:i + 1], weights[i, :-1].view(1, 8, 3, 3), weights[i, -1:], padding=1)
                          for i in range(3)])
    assert torch.allclose(proj(f_c, f_s), expected, atol=1e-5)


@pytest.mark.parametrize("method, command", [
    (dcris, "hf download facebook/dinov2-with-registers-base model.safetensors"),
    (etris, "hf download timm/resnet101_clip.openai open_clip_model.safetensors")])
def test_without_a_network_one_sentence_says_what_to_fetch(monkeypatch, method, command):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nonexistent")
    with torch.device("meta"), pytest.raises(UserError, match=command + ".*random"):
        method.Model(method.config(), "pretrained")
