"""python -m pytest tests/test_memory.py

What backward computes again has the same bits as what it would have kept; what frozen towers compute otherwise is the
same to rounding. ALL_MEMORY=1 in the environment counts the bytes of all models at full size, not only of the smallest.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
from toolbox import costs

RECOMPUTING = [
    ("etris", "tiny", "etris", dict(bridger_dropout=0.3, decoder_dropout=0.3)),
    ("etris", "tiny-vit", "etris", dict(bridger_dropout=0.3, decoder_dropout=0.3, checkpointing=True)),
    ("etris", "tiny-vit", "released", dict(decoder_dropout=0.3, checkpointing=True)),
    ("etris", "tiny", "etris", dict(tune="full", checkpointing=True)),
    ("dcris", "tiny", "dcris", dict(cross_dropout=0.3, decoder_dropout=0.3)),
    ("dcris", "tiny", "detris", dict(cross_dropout=0.3, decoder_dropout=0.3, checkpointing=True)),
    ("dcris", "tiny", "dcris", dict(tune="method+adapter", checkpointing=True)),
    ("m2ist", "tiny", "m2ist", dict(vl_dropout=0.3)),
    ("m2ist", "tiny", "m2ist", dict(vl_dropout=0.3, insertion="parallel", checkpointing=True)),
    ("m2ist", "tiny", "m2ist", dict(vl_dropout=0.3, tune="full", checkpointing=True)),
    ("shared_ris", "tiny", "shared_ris", {}),
    ("shared_ris", "tiny", "shared_ris", dict(drop_path=0.3, checkpointing=True)),
]


def build(method, backbone, variant, flags, seed=0):
    module = common.load_method(method)
    torch.manual_seed(seed)
    return module.Model(module.config(backbone, variant, **flags)).train()


def inputs(model, n=3):
    images, tokens, target = costs.blank(model, n)
    return torch.randn(images.shape).clamp(-2, 2), tokens, target


def step(model, example, seed=1):
    """Loss, gradients, and the buffers that BatchNorm moves."""
    torch.manual_seed(seed)
    loss = model.loss(model(*example[:2]), example[2])
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | grads | {f"buffer {name}": b.clone() for name, b in model.named_buffers()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method, backbone, variant, flags", RECOMPUTING)
def test_what_is_computed_again_has_the_same_bits(method, backbone, variant, flags, monkeypatch):
    model = build(method, backbone, variant, flags)
    example = inputs(model)
    less, again = costs.saved_bytes(model, *example), step(build(method, backbone, variant, flags), example)
    monkeypatch.setattr(common, "checkpoint", lambda run, *args, use_reentrant, context_fn, **named:
                        run(*args, **named))
    plain = step(build(method, backbone, variant, flags), example)
    assert len(plain) > 30 and same(plain, again)
    assert less < costs.saved_bytes(model, *example)


@pytest.mark.parametrize("method, backbone, variant, flags", [r for r in RECOMPUTING if "checkpointing" in r[3]])
def test_checkpointing_keeps_less_and_changes_nothing(method, backbone, variant, flags):
    ours, without = (build(method, backbone, variant, flags | dict(checkpointing=x)) for x in (True, False))
    example = inputs(ours)
    assert same(step(ours, example), step(without, example))
    with torch.no_grad():
        assert torch.equal(ours.eval()(*example[:2]), without.eval()(*example[:2]))
    assert costs.saved_bytes(ours.train(), *example) < 0.95 * costs.saved_bytes(without.train(), *example)


def test_attention_is_that_of_pytorch():
    theirs = nn.MultiheadAttention(64, 4, dropout=0.5, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours = common.MultiheadAttention(64, 4, 0.5)
    ours.load_state_dict(theirs.state_dict())
    theirs.eval(), ours.eval()
    x, y, z = (torch.randn(2, n, 64, requires_grad=True) for n in (9, 5, 5))
    pad = torch.arange(5) > torch.tensor([[4], [2]])
    causal = torch.full((9, 9), -torch.inf).triu(1)
    for args, masks in [((x, x, x), {}), ((x, y, z), dict(key_padding_mask=pad)), ((x, x, x), dict(attn_mask=causal))]:
        a, b = (m(*args, need_weights=False, **masks)[0] for m in (theirs, ours))
        assert torch.allclose(a, b, atol=1e-6)
        weight = torch.randn_like(a)
        for g, h in zip(*(torch.autograd.grad((out * weight).sum(), [*set(args), *m.parameters()])
                          for out, m in ((a, theirs), (b, ours)))):
            assert torch.allclose(g, h, atol=1e-4)
    assert torch.equal(theirs(x, y, z, pad)[1], ours(x, y, z, pad, need_weights=True)[1])
    ours.train()
    fused = F.scaled_dot_product_attention(*(t[:, None] for t in (x, y, z)), mask := ~pad[:, None, None])
    assert torch.allclose(common.plain_attention(*(t[:, None] for t in (x, y, z)), mask, 0.0), fused, atol=1e-6)
    many = torch.stack([ours(x, y, z, pad)[0] for _ in range(2000)]).detach()  # dropout changes each, not their mean
    assert many.std(0).min() > 0.01 and (many.mean(0) - ours.eval()(x, y, z, pad)[0]).abs().max() < 0.1


def test_dropout_is_that_of_pytorch():
    x = torch.ones(100, 1000, requires_grad=True)
    layer = common.Dropout(0.3)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach()) and y.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert layer.eval()(x) is x and common.Dropout(0.0)(x) is x


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3)
        for t in self.bn.weight, self.bn.bias, self.bn.running_mean:
            nn.init.normal_(t)
        nn.init.uniform_(self.bn.running_var, 0.1, 3)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


def test_frozen_batchnorm_is_batchnorm_that_keeps_no_map():
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    plain, frozen = Tower().eval(), Tower()
    frozen.load_state_dict(plain.state_dict())
    common.freeze(frozen)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        a = frozen(x)
    b = plain(x)
    scale = b.abs().max()
    assert (a - b).abs().max() < 1e-5 * scale and kept.count(a.shape) == 1  # of ReLU
    g, h = (torch.autograd.grad((y * y).sum(), x)[0] for y in (a, b))
    assert (g - h).abs().max() < 1e-5 * h.abs().max()
    assert same(frozen.state_dict(), plain.state_dict())
    with torch.no_grad():
        assert (frozen(x) - b).abs().max() < 1e-5 * scale
    nn.init.constant_(frozen.bn.running_mean, 7)  # what is loaded later counts
    assert not torch.allclose(frozen(x), a)


def test_a_frozen_tower_stays_in_eval_mode_and_computes_the_same():
    import open_clip

    text = dict(context_length=9, vocab_size=99, width=32, heads=2, layers=2)
    vision = dict(layers=2, width=32, head_width=16, image_size=16, patch_size=8)
    tower = open_clip.CLIP(embed_dim=32, quick_gelu=True, text_cfg=text, vision_cfg=vision).eval()
    images, words = torch.randn(2, 3, 16, 16), torch.randint(99, (2, 9))
    before = tower.encode_image(images).detach(), tower.encode_text(words).detach()
    tensors = {k: v.clone() for k, v in tower.state_dict().items()}
    common.freeze(tower)
    assert not any(m.training for m in nn.Sequential(tower).train()[0].modules())
    assert not any(p.requires_grad for p in tower.parameters()) and same(tower.state_dict(), tensors)
    for a, b in zip((tower.encode_image(images), tower.encode_text(words)), before):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    kinds = {type(m) for m in tower.modules()}
    assert common.MultiheadAttention in kinds and common.QuickGELU in kinds


LIMITS = {  # MiB of an image, in fp32 on a CPU
    ("m2ist", "detr-resnet-50", "m2ist", "method"): 80, ("m2ist", "detr-resnet-50", "m2ist", "frozen"): 75}
if os.environ.get("ALL_MEMORY"):
    LIMITS |= {
        ("etris", "RN101", "etris", "method"): 386, ("etris", "RN101", "released", "method"): 386,
        ("etris", "ViT-B-16", "etris", "method"): 415, ("etris", "ViT-B-16", "released", "method"): 415,
        ("dcris", "dinov2-base", "dcris", "method"): 568, ("dcris", "dinov2-base", "detris", "method"): 568,
        ("shared_ris", "beit3-base", "shared_ris", "method"): 640,
        ("shared_ris", "beit3-base", "shared_ris", "frozen"): 226}


@pytest.mark.parametrize("method, backbone, variant, tune", LIMITS)
def test_bytes_kept_at_full_size(method, backbone, variant, tune):
    model = build(method, backbone, variant, dict(tune=tune))
    assert costs.saved_bytes(model, *costs.blank(model, 2)) / 2 <= LIMITS[method, backbone, variant, tune] * 2**20
