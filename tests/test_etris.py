"""python -m pytest tests/test_etris.py"""

import copy

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import data
import dcris
import etris
from common import UserError, count, fingerprint, trained_names, trained_state
from tests.test_common import attention, linear, norm, save_as_openai, shuffle, two_steps
from toolbox import clip_towers
from toolbox.costs import saved_bytes

SENTENCES = ["the small red circle on the left", "square"]
TINY = "tiny", "tiny-vit"
BOTH = [(b, v) for b in TINY for v in etris.VARIANTS]


def on_meta(backbone="RN101", variant="etris", **flags):
    with torch.device("meta"):
        return etris.ETRIS(etris.config(backbone, variant, **flags))


def tiny(backbone="tiny", variant="etris", seed=0, **flags):
    torch.manual_seed(seed)
    model = etris.ETRIS(etris.config(backbone, variant, **flags))
    for name, p in model.clip.named_parameters():
        if name.endswith("bn3.weight"):  # open_clip starts these at 0, and then a random ResNet's blocks do nothing
            torch.nn.init.constant_(p, 0.5)
    return model


def resnet(model):
    return hasattr(model.clip.visual, "attnpool")


def inputs(model, n=2, seed=0):
    g, s = torch.Generator().manual_seed(seed), model.preprocess.size
    images = torch.randn(n, 3, s, s, generator=g)
    return images, model.tokenize((SENTENCES * n)[:n]), (torch.rand(n, s, s, generator=g) > 0.7).float()


# sizes


def test_clip_is_that_of_open_clip():
    for backbone, name in ("RN101", "RN101"), ("RN50", "RN50"), ("ViT-B-16", "ViT-B-16"), ("dinov2-base", "ViT-B-16"):
        theirs = open_clip.get_model_config(f"{name}-quickgelu")
        theirs["vision_cfg"] = {k: v for k, v in theirs["vision_cfg"].items() if v is not None}
        assert etris.BACKBONES[backbone]["clip"] == theirs
    assert dcris.CLIP_B16 == etris.CLIP_B16


@pytest.mark.parametrize("backbone, variant, bridger, head, trained, tower", [
    ("RN101", "etris", 1_942_080, 23_981_569, 25_923_649, 119_688_033),
    ("RN50", "etris", 1_942_080, 26_735_105, 28_677_185, 102_007_137),
    ("ViT-B-16", "etris", 1_385_024, 22_408_705, 23_793_729, 149_620_737),
    ("RN101", "released", 1_942_080, 24_244_225, 26_328_129, 120_737_633),
    ("RN50", "released", 1_942_080, 26_735_105, 28_819_009, 104_106_337),
    ("ViT-B-16", "released", 598_592, 22_671_361, 23_829_313, 149_989_377)])
def test_sizes_of_the_six_models(backbone, variant, bridger, head, trained, tower):
    model = on_meta(backbone, variant)
    assert {k: count(v) for k, v in model.parts().items()} == dict(backbone=tower, adapter=bridger, head=head)
    assert count(model, trainable=True) == trained
    positions = dict(RN101=141_824, RN50=141_824)  # the public code's, which it does not count
    assert trained - bridger - head == (positions.get(backbone, 559_360) if variant == "released" else 0)
    parts = [count(m) for m in (model.neck, model.decoder, model.proj)]
    if variant == "released":
        assert parts == {"RN50": [12_867_072, 7_899_136, 5_968_897], "RN101": [11_556_352, 7_899_136, 4_788_737],
                         "ViT-B-16": [9_983_488, 7_899_136, 4_788_737]}[backbone]


def test_full_tuning_has_the_printed_size():
    assert count(on_meta(tune="full", connect=True).parts()["backbone"]) == 120_737_633


# the towers


@pytest.mark.parametrize("backbone", TINY)
def test_towers_run_as_open_clip_runs_them(backbone):
    model = tiny(backbone, tune="frozen").eval()
    images, tokens, _ = inputs(model)
    maps, f_t, f_s, pad = model.encode(images, tokens)
    assert torch.allclose(model.clip.encode_text(F.pad(tokens, (0, 77 - tokens.shape[1]))), f_s, atol=1e-5)
    assert pad.sum(1).tolist() == [17 - 9, 17 - 3] and f_t.shape == (2, 17, 64)
    visual, out = model.clip.visual, []
    stages = [visual.layer2, visual.layer3, visual.layer4] if resnet(model) else visual.transformer.resblocks[1:]
    hooks = [m.register_forward_hook(lambda m, x, y: out.append(y)) for m in stages]
    visual(images)
    for h in hooks:
        h.remove()
    out = out if resnet(model) else [y[:, 1:].transpose(1, 2).unflatten(2, (8, 8)) for y in out]
    for a, b in zip(maps[:2], out):
        assert torch.allclose(a, b, atol=1e-5)
    assert [tuple(m.shape[-2:]) for m in maps] == ([(16, 16), (8, 8), (4, 4)] if resnet(model) else [(8, 8)] * 3)
    if not resnet(model):  # the places' own vectors, projected as CLIP projects its class token
        top = model.clip.visual.ln_post(out[2].flatten(2).transpose(1, 2)) @ model.clip.visual.proj
        assert torch.allclose(maps[2].flatten(2).transpose(1, 2), top, atol=1e-5)
        return
    pool, x = model.clip.visual.attnpool, out[2].flatten(2).permute(2, 0, 1)
    x = x + pool.positional_embedding[1:, None]
    weights = dict(q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight)
    y = F.multi_head_attention_forward(
        x, x, x, x.shape[2], pool.num_heads, None, torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        None, None, False, 0.0, pool.c_proj.weight, pool.c_proj.bias, use_separate_proj_weight=True, **weights)[0]
    assert torch.allclose(maps[2].flatten(2).permute(2, 0, 1), y, atol=1e-5)


ZOOMS = [("tiny", "interpolate")] + [(b, z) for b in TINY for z in ("deconv", "linear", "mlp")]


@pytest.mark.parametrize("backbone, zoom", ZOOMS)
def test_zero_init_starts_as_plain_clip(backbone, zoom):
    plain, bridged = tiny(backbone, tune="frozen").eval(), tiny(backbone, zero_init=True, zoom=zoom).eval()
    images, tokens, masks = inputs(plain)
    with torch.no_grad():
        for a, b in zip(plain.encode(images, tokens), bridged.encode(images, tokens)):
            assert all(torch.equal(x, y) for x, y in zip(a, b))
        other = tiny(backbone, zoom=zoom).eval().encode(images, tokens)
        assert not torch.allclose(other[2], plain.encode(images, tokens)[2], atol=1e-3)  # without it they do differ
    bridged.loss(bridged(images, tokens), masks).backward()
    for b in bridged.bridgers.values():  # and it can leave the start
        zoom_out = [p for p in b.zoom_out.parameters() if p.dim() > 1][-1]
        assert b.linear2.weight.grad.any() and zoom_out.grad.any()


@pytest.mark.parametrize("backbone, side", [("tiny", 32), ("tiny-vit", 8)])
def test_other_sizes_and_shapes_of_picture(backbone, side):
    model = tiny(backbone).eval()
    tokens = model.tokenize(SENTENCES[:1])
    with torch.no_grad():
        for h, w in (32, 32), (96, 160), (192, 64):
            out = model(torch.randn(1, 3, h, w), tokens)
            assert out.shape == ((1, 1, h // 4, w // 4) if backbone == "tiny" else (1, 1, h // 2, w // 2))
    table = torch.randn(50, 6)
    assert clip_towers.resized(table, (7, 7)) is table
    wide = clip_towers.resized(table, (7, 14))
    assert wide.shape == (1 + 98, 6) and torch.equal(wide[0], table[0])
    assert torch.allclose(wide[1:].view(7, 14, 6).mean(1), table[1:].view(7, 7, 6).mean(1), atol=0.15)
    with pytest.raises(UserError, match="image-size"):
        etris.config(backbone, image_size=48)


# what is trained


@pytest.mark.parametrize("backbone, variant", BOTH)
def test_ways_to_tune_start_from_the_same_head(backbone, variant):
    frozen, method = (tiny(backbone, variant, tune=tune) for tune in ("frozen", "method"))
    for name in "clip", "neck", "decoder", "proj":
        a, b = getattr(frozen, name).state_dict(), getattr(method, name).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("backbone, variant", BOTH)
def test_only_bridgers_and_head_learn(backbone, variant):
    model = tiny(backbone, variant).train()
    before, frozen = two_steps(model, *inputs(model, 4))
    positions = {"clip.positional_embedding", "clip.visual.attnpool.positional_embedding" if resnet(model)
                 else "clip.visual.positional_embedding"} if variant == "released" else set()
    for name, p in model.named_parameters():
        assert p.requires_grad == (not name.startswith("clip.") or name in positions), name
        assert (p.grad is not None) == p.requires_grad, name
    assert fingerprint(model) == frozen != ""
    after, trained = model.state_dict(), trained_state(model)
    still = {k for k in before if k.startswith("clip.")} - positions
    assert any("running_mean" in k for k in still) == resnet(model)  # the public code lets these drift
    assert all(torch.equal(before[k], after[k]) for k in still)
    assert trained.keys() == before.keys() - still
    for name, p in model.named_parameters():
        if name.startswith("neck.fusion") and "in_proj" in name:  # one key: dead queries and keys
            dead, values = p.grad.split([len(p) // 3 * 2, len(p) // 3])
            assert dead.abs().max() < 1e-5 * values.abs().max(), name
        elif p.requires_grad:
            assert p.grad.any(), name
    assert not {k for k in trained if torch.equal(before[k], after[k])}
    if variant == "released":
        assert model.clip.positional_embedding.grad.any(1).sum() == 17  # padding too: nothing masks it there
        if resnet(model):
            assert model.clip.visual.attnpool.positional_embedding.grad.any(1).tolist() == [False] + [True] * 16


@pytest.mark.parametrize("backbone", TINY)
def test_no_graph_below_the_first_bridger(backbone):
    for stages in (2, 3, 4), (3,):
        model, seen = tiny(backbone, bridger_stages=stages).train(), {}
        watched = {f"text {i}": m for i, m in enumerate(model.clip.transformer.resblocks)}
        watched |= {f"layer{i}": getattr(model.clip.visual, f"layer{i}") for i in range(1, 5)} if resnet(model) else \
            {f"block {i}": m for i, m in enumerate(model.clip.visual.transformer.resblocks)}
        for name, m in watched.items():
            m.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y.requires_grad}))
        images, tokens, _ = inputs(model)
        model(images, tokens)
        assert list(seen.values()).count(False) == (4 if stages[0] == 2 else 6) and len(seen) == 8
        first = 2 if stages[0] == 2 else 3
        assert seen == {k: int(k[-1]) > (first if "layer" in k else first - 1) for k in seen}


def test_bytes_saved_for_backward():
    sizes = {}
    for name, flags in dict(frozen=dict(tune="frozen"), late=dict(bridger_stages=(4,)), method={},
                            full=dict(tune="full")).items():
        model = tiny("tiny-vit", **flags).train()
        sizes[name] = saved_bytes(model, *inputs(model))
    assert sizes["frozen"] < sizes["late"] < sizes["method"] and sizes["frozen"] < sizes["full"]
    # trained positions need the graph of the whole tower
    free, trained = (tiny("tiny-vit", "released", train_positions=t).train() for t in (False, True))
    assert saved_bytes(free, *inputs(free)) < 0.9 * saved_bytes(trained, *inputs(trained))


@pytest.mark.parametrize("backbone, flags", [("tiny", {}), ("tiny-vit", {}), ("tiny", dict(connect=True))])
def test_full_tuning_reaches_every_parameter(backbone, flags):
    model = tiny(backbone, tune="full", **flags).train()
    images, tokens, masks = inputs(model)
    model.loss(model(images, tokens), masks).backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {"clip.logit_scale"}
    assert not model.clip.logit_scale.requires_grad and fingerprint(model) == ""
    assert all(m.training for m in model.clip.modules())
    assert not any(m.training for m in tiny(backbone).train().clip.modules())


# the Bridger


def batch_norm(sd, name, x):
    return F.batch_norm(x, *(sd[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))


def zoom(sd, name, x, resnet, variant, up, middle):
    """The weights of Eq. 4 (by its cases), by hand."""
    if resnet:
        weight, stride = sd[name + ".weight"], 1 if middle else 2
        return (F.conv_transpose2d if up else F.conv2d)(x, weight, stride=stride)
    if variant == "released":
        weight = sd[name + ".0.weight"][..., 0, 0]
        y = torch.einsum("bchw,cd->bdhw" if up else "bchw,dc->bdhw", x, weight)  # a deconvolution's is (in, out)
        return batch_norm(sd, name + ".1", y).relu()
    if middle:
        return (F.conv_transpose2d if up else F.conv2d)(x, sd[name + ".weight"])
    return F.conv2d(F.pad(x, (1, 0, 1, 0) if up else (0, 1, 0, 1)), sd[name + ".1.weight"])


def independent_bridgers(model, variant, features, words, pad):
    """Eq. 1 to 5, or the public code, once more: residuals of all three stages for given features."""
    heads, last, results = model.c.bridger_heads, None, []
    product = variant == "released" and not resnet(model)
    pad = pad if variant == "etris" else None
    for i, (f_v, f_t) in enumerate(zip(features, words)):
        sd = model.bridgers[str(i + 2)].state_dict()
        v = zoom(sd, "zoom_in", f_v, resnet(model), variant, up=i == 2, middle=i == 1)
        grid = v.shape[-2:]
        v, t = v.flatten(2).transpose(1, 2), linear(sd, "linear1", f_t)
        if last:
            v, t = norm(sd, "ln_v", v + last[0]), norm(sd, "ln_t", t + last[1])
        if product:
            v2 = v * attention(sd, "ita_v.cross_attn", v, t, heads)
            t2 = t * attention(sd, "ita_t.cross_attn", t, v, heads)
        else:
            v1 = norm(sd, "ita_v.norm1", v + attention(sd, "ita_v.self_attn", v, v, heads))
            t1 = norm(sd, "ita_t.norm1", t + attention(sd, "ita_t.self_attn", t, t, heads, pad))
            to_v, to_t = (v1, t1) if variant == "etris" else (v, t)
            v2 = norm(sd, "ita_v.norm2", v1 + attention(sd, "ita_v.cross_attn", v1, to_t, heads, pad))
            t2 = norm(sd, "ita_t.norm2", t1 + attention(sd, "ita_t.cross_attn", t1, to_v, heads))
            v2 = norm(sd, "ita_v.norm3", v2 + linear(sd, "ita_v.ffn.3", linear(sd, "ita_v.ffn.0", v2).relu()))
            t2 = norm(sd, "ita_t.norm3", t2 + linear(sd, "ita_t.ffn.3", linear(sd, "ita_t.ffn.0", t2).relu()))
        last = (v2, t2) if variant == "etris" else (v, t)
        v2 = v2.transpose(1, 2).reshape(len(v), -1, *grid)
        f_v = zoom(sd, "zoom_out", v2, resnet(model), variant, up=i != 2, middle=i == 1)
        results.append((f_v, linear(sd, "linear2", t2)))
    return results


@pytest.mark.parametrize("backbone, variant", BOTH)
def test_bridgers_compute_eq_1_to_5_or_the_public_code(backbone, variant):
    model = tiny(backbone, variant).eval()
    shuffle(model.bridgers)
    shapes = [(64, 8, 8), (128, 4, 4), (256, 2, 2)] if resnet(model) else [(64, 4, 4)] * 3
    g = torch.Generator().manual_seed(1)
    features = [torch.randn(2, *s, generator=g) for s in shapes]
    words = [torch.randn(2, 5, 64, generator=g) for _ in range(3)]
    pad = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    memory, got = None, []
    with torch.no_grad():
        for b, f_v, f_t in zip(model.bridgers.values(), features, words):
            d_v, d_t, memory = b(f_v, f_t, memory, pad)
            got.append((d_v, d_t))
        for (v, t), (v_, t_), f_v in zip(got, independent_bridgers(model, variant, features, words, pad), features):
            assert v.shape == f_v.shape and torch.allclose(v, v_, atol=1e-4) and torch.allclose(t, t_, atol=1e-4)


@pytest.mark.parametrize("backbone, variant", BOTH)
def test_residuals_go_where_eq_3_says(backbone, variant):
    """Each stage reads its predecessor's output with the residual in it, in both towers, and so does the decoder."""
    model, seen = tiny(backbone, variant).eval(), {}
    for i, b in model.bridgers.items():
        b.register_forward_hook(lambda m, x, y, i=i: seen.update({i: (x[0], x[1], y[0], y[1])}))
    visual, blocks = model.clip.visual, model.clip.transformer.resblocks
    if not resnet(model):
        for i in 2, 3:
            block = visual.transformer.resblocks[i]
            block.register_forward_pre_hook(lambda m, x, i=i: seen.update({f"block {i}": x[0]}))
    images, tokens, _ = inputs(model)
    with torch.no_grad():
        maps, f_t, _, _ = model.encode(images, tokens)
        for i, last in (2, 2), (3, 3):
            v, t, d_v, d_t = seen[str(i)]
            assert torch.allclose(maps[i - 2], v + d_v)
            if resnet(model):
                assert torch.allclose(getattr(visual, f"layer{i + 1}")(v + d_v), seen[str(i + 1)][0], atol=1e-5)
            else:
                assert torch.allclose((v + d_v).flatten(2).transpose(1, 2), seen[f"block {i}"][:, 1:], atol=1e-5)
            n = tokens.shape[1]
            after = blocks[last](t + d_t, attn_mask=model.clip.attn_mask[:n, :n])
            assert torch.allclose(after, seen[str(i + 1)][1], atol=1e-5)
        v, t, d_v, d_t = seen["4"]
        assert torch.allclose(f_t, model.clip.ln_final(t + d_t), atol=1e-5)
        if resnet(model):
            assert torch.allclose(maps[2], clip_towers.attention_pool(visual.attnpool, v + d_v), atol=1e-5)
        else:
            top = visual.ln_post((v + d_v).flatten(2).transpose(1, 2)) @ visual.proj
            assert torch.allclose(maps[2].flatten(2).transpose(1, 2), top, atol=1e-5)


def test_the_class_token_gets_no_residual():
    model, seen = tiny("tiny-vit").eval(), []
    model.clip.visual.transformer.resblocks[2].register_forward_pre_hook(lambda m, x: seen.append(x[0][:, 0]))
    images, tokens, _ = inputs(model)
    for strength in 0.0, 3.0:
        torch.nn.init.constant_(model.bridgers["2"].zoom_out[1].weight, strength)
        model.encode(images, tokens)
    assert torch.equal(*seen)


def test_zoom_layers():
    x = torch.zeros(1, 3, 8, 8)
    x[0, :, 2, 5] = 1
    for kind, kernel, up, side in [("deconv", 2, False, 4), ("deconv", 2, True, 16), ("deconv", 2, True, 8),
                                   ("deconv", 1, False, 8), ("interpolate", 2, True, 16), ("interpolate", 2, False, 4),
                                   ("linear", 2, False, 4), ("mlp", 2, True, 16)]:
        layer = etris.zoom_layer(kind, 3, 5, kernel, up, 8, side).eval()
        assert layer(x).shape == (1, 5, side, side), kind
    # on a ViT a change of one place reaches its neighbours, and zooming out is centred on it again
    into, out = (etris.zoom_layer("deconv", 3, 3, 2, up, 8, 8) for up in (False, True))
    reach = out(into(x)).abs().sum((0, 1)).nonzero()
    assert reach.min(0).values.tolist() == [1, 4] and reach.max(0).values.tolist() == [3, 6]


def test_released_pool_adds_the_connecting_branch():
    model = tiny("tiny", "released").eval()
    pool, x = model.clip.visual.attnpool, torch.randn(2, 256, 4, 4)
    with torch.no_grad():
        y = clip_towers.attention_pool(pool, x)
        branch = pool.connect
        delattr(pool, "connect")
        assert torch.allclose(y, F.relu(clip_towers.attention_pool(pool, x) + branch(x)), atol=1e-6)
    assert sorted(branch.state_dict()) == ["0.weight", "1.bias", "1.num_batches_tracked", "1.running_mean",
                                           "1.running_var", "1.weight"]


def test_released_trains_a_table_of_the_inputs_grid():
    vit, resnet = on_meta("ViT-B-16", "released"), on_meta("RN50", "released")
    assert vit.clip.visual.positional_embedding.shape == (677, 768)
    assert {k for k in trained_names(vit) if k.startswith("clip.")} == {"clip.visual.positional_embedding",
                                                                        "clip.positional_embedding"}
    assert resnet.clip.visual.attnpool.positional_embedding.shape == (50, 2048)


# the head


@pytest.mark.parametrize("backbone", TINY)
@pytest.mark.parametrize("flags", [
    dict(hierarchical_alignment=False), dict(global_alignment=False), dict(bridger_stages=()),
    dict(hierarchical_alignment=False, global_alignment=False), dict(decoder_text="sentence"), dict(zoom="linear"),
    dict(zoom="mlp"), dict(bridger_stages=(2, 4)), dict(bridger_stages=(3,))])
def test_table_6_and_the_other_switches_train_and_predict(backbone, flags):
    model = tiny(backbone, **flags).train()
    images, tokens, masks = inputs(model)
    model.loss(model(images, tokens), masks).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    parts = model.parts()
    assert count(parts["adapter"]) + count(parts["head"]) == sum(p.numel() for p in trained.values())
    with torch.no_grad():
        out = model.eval()(images, tokens)
        assert out.shape == (2, 1, 32, 32)
        # the sentence matters in every one of them
        assert not torch.allclose(out, model(images, tokens.flip(0)), atol=1e-4)


def conv(sd, name, x, padding):
    return batch_norm(sd, name + ".1", F.conv2d(x, sd[name + ".0.weight"], padding=padding)).relu()


def sines(n, d):
    angle = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
    table = torch.empty(n, d)
    table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()
    return table


def independent_head(model, maps, f_t, f_s, pad):
    """HA, GA and projector as the public code has them, from the weights."""
    sd, dim, heads = model.state_dict(), model.c.head_dim, model.c.head_heads
    text = linear(sd, "neck.txt_proj", f_s) if model.c.text_proj else f_s
    levels = []
    for i, x in enumerate(maps):
        weight, stride = sd[f"neck.f_proj.{i}.0.weight"], 2 if resnet(model) and i != 1 else 1
        x = (F.conv_transpose2d if i == 2 else F.conv2d)(x, weight, stride=stride)
        x = batch_norm(sd, f"neck.f_proj.{i}.1", x).relu()
        a = attention(sd, f"neck.fusion.{i}", x.flatten(2).transpose(1, 2), text[:, None], heads)
        levels.append(x * a.transpose(1, 2).reshape(x.shape))
    x = conv(sd, "neck.aggr", torch.cat(levels, 1), 0)
    b, _, h, w = x.shape
    across, down = torch.linspace(-1, 1, w).repeat(h, 1), torch.linspace(-1, 1, h)[:, None].repeat(1, w)
    x = conv(sd, "neck.coordconv.0.conv", torch.cat([x, torch.stack([across, down]).expand(b, 2, h, w)], 1), 1)
    x = conv(sd, "neck.coordconv.1", x, 1).flatten(2).transpose(1, 2)
    places = torch.cat([sines(w, dim // 2).repeat(h, 1), sines(h, dim // 2).repeat_interleave(w, 0)], 1)
    words = f_t + sines(f_t.shape[1], dim)
    for i in range(model.c.decoder_layers):
        name = f"decoder.layers.{i}."
        y = norm(sd, name + "norm1", x)
        a = attention(sd, name + "self_attn", y + places, y + places, heads, None, y)
        x = x + norm(sd, name + "self_attn_norm", a)
        y = norm(sd, name + "norm2", x) + places
        x = x + norm(sd, name + "cross_attn_norm", attention(sd, name + "cross_attn", y, words, heads, pad, f_t))
        y = linear(sd, name + "ffn.0", norm(sd, name + "norm3", x)).relu()
        x = x + linear(sd, name + "ffn.4", norm(sd, name + "ffn.3", y))
    x = norm(sd, "decoder.norm", x).transpose(1, 2).reshape(b, dim, h, w)
    for k in 1, 3:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = conv(sd, f"proj.vis.{k}", x, 1)
    x = F.conv2d(x, sd["proj.vis.4.weight"], sd["proj.vis.4.bias"])
    kernels = linear(sd, "proj.txt", f_s)
    return torch.cat([F.conv2d(x[i:i + 1], k[:-1].view(1, -1, 3, 3), k[-1:], padding=1) for i, k in enumerate(kernels)])


@pytest.mark.parametrize("backbone, variant", BOTH)
def test_the_head_computes_eq_6_to_9(backbone, variant):
    model = tiny(backbone, variant, decoder_position="attention").eval()
    shuffle(model.neck), shuffle(model.decoder), shuffle(model.proj)
    images, tokens, _ = inputs(model)
    with torch.no_grad():
        maps, f_t, f_s, pad = model.encode(images, tokens)
        expected = independent_head(model, maps, f_t, f_s, pad)
        assert torch.allclose(model(images, tokens), expected, atol=1e-4 * float(expected.std()))


def test_bridgers_start_as_the_public_code_starts_them():
    torch.manual_seed(0)
    b = etris.Bridger(etris.config("RN101"), 3, 1024, 512, 26, 26)
    assert float(b.linear1.weight.detach().std()) == pytest.approx(0.02, rel=0.05) and not b.linear2.bias.any()
    assert float(b.ita_v.cross_attn.out_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(b.zoom_in.weight.detach().std()) == pytest.approx((2 / 64) ** 0.5, rel=0.05)  # He's, of the outputs
    dropouts = [m for m in b.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(dropouts) == 4 and all(m.p == b.ita_v.self_attn.dropout == 0.1 for m in dropouts)
    x = torch.randn(1, 9, 64)
    b.ita_v.self_attn.dropout = 0.0  # each place of dropout that is left still acts
    assert not torch.equal(b.ita_v.mhsa(x, None), b.ita_v.mhsa(x, None))


def test_loss_is_eq_10_and_11():
    logits, masks = torch.randn(2, 1, 4, 4), torch.zeros(2, 8, 8)
    masks[:, :3, :5] = 1  # edges within a logit's cell
    p = logits.sigmoid()[:, 0]
    for target, t in ("area", masks.view(2, 4, 2, 4, 2).mean((2, 4))), ("nearest", masks[:, ::2, ::2]):
        by_hand = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
        assert torch.allclose(tiny(dice=0.0, target=target).loss(logits, masks), by_hand, atol=1e-6)


@pytest.mark.parametrize("backbone, size, least", [("tiny", 416, 0.965), ("tiny-vit", 64, 0.91)])
def test_what_the_loss_teaches_comes_back_to_its_place(backbone, size, least):
    """A model that predicts exactly what its loss wants, through the one way back to the photograph."""
    model, rng, off, ious = tiny(backbone, image_size=size, dice=0.0), np.random.default_rng(0), [], []
    for _ in range(6):
        angles, radii = np.sort(rng.uniform(0, 2 * np.pi, 12)), size * rng.uniform(0.08, 0.16, 12)
        corners = size * rng.uniform(0.3, 0.7, 2) + (radii * [np.cos(angles), np.sin(angles)]).T
        picture = Image.new("1", (size, size))
        ImageDraw.Draw(picture).polygon(list(map(tuple, corners)), fill=1)
        mask = np.array(picture)
        side = size // 4 if backbone == "tiny" else size // 2
        logits = torch.zeros(1, 1, side, side, requires_grad=True)
        model.loss(logits, torch.from_numpy(mask).float()[None]).backward()
        wanted = 0.5 - logits.numel() * logits.grad[0, 0]  # the derivative at 0 is (0.5 - target) / n
        back = data.from_canvas(wanted.logit(1e-3), mask.shape, model.preprocess).sigmoid().numpy() > model.c.threshold
        ious.append((mask & back).sum() / (mask | back).sum())
        off.append(np.argwhere(back).mean(0) - np.argwhere(mask).mean(0))
    assert np.abs(off).max() < 0.25 and np.abs(np.mean(off, 0)).max() < 0.06 and np.mean(ious) > least


# invariances


@pytest.mark.parametrize("backbone, variant", BOTH)
def test_a_batch_of_two_is_two_of_one(backbone, variant):
    model = tiny(backbone, variant).eval()
    images, tokens, _ = inputs(model)
    with torch.no_grad():
        both = model(images, tokens)
        one = torch.cat([model(images[i:i + 1], tokens[i:i + 1]) for i in range(2)])
    assert torch.allclose(both, one, atol=1e-4) and not torch.allclose(both[0], both[1], atol=1e-2)


@pytest.mark.parametrize("backbone, variant", BOTH)
def test_more_padding_changes_nothing_but_in_the_public_model(backbone, variant):
    short, long = tiny(backbone, variant, words=17).eval(), tiny(backbone, variant, words=30).eval()
    images, _, _ = inputs(short)
    with torch.no_grad():
        a, b = short(images, short.tokenize(SENTENCES)), long(images, long.tokenize(SENTENCES))
    assert torch.allclose(a, b, atol=1e-4) == (variant == "etris")


@pytest.mark.parametrize("backbone", TINY)
def test_a_wide_photograph_is_the_same_within_a_square_of_mean_colour(backbone):
    model = tiny(backbone).eval()
    s = model.preprocess.size
    photo = np.random.default_rng(0).integers(0, 255, (s // 2, s, 3)).astype(np.uint8)
    square = np.empty((s, s, 3), np.uint8)
    square[:] = np.round(255 * np.array(clip_towers.CLIP[0]))
    square[s // 4:s // 4 * 3] = photo
    tokens = model.tokenize(SENTENCES[:1])
    with torch.no_grad():
        pre = model.preprocess
        images = data.normalise(torch.stack([data.to_canvas(p, pre) for p in (photo, square)]), pre)
        wide, whole = (model(i[None], tokens)[0, 0] for i in images)
    # but for the rounding of the mean colour to whole numbers
    assert (wide - whole).abs().mean() < 0.03 * whole.std()
    back = data.from_canvas(wide, (s // 2, s), model.preprocess)
    whole = data.from_canvas(whole, (s, s), model.preprocess)[s // 4:s // 4 * 3]
    assert (back - whole).abs().mean() < 0.03 * whole.std()


# settings


def test_settings_of_the_paper_and_of_the_public_code():
    c, v, r = etris.config(), etris.config("ViT-B-16"), etris.config("ViT-B-16", "released")
    assert (c.image_size, c.words, c.epochs, c.milestones, c.lr, c.batch_size) == (416, 17, 50, (35,), 1e-4, 32)
    assert (c.adapter_lr, v.adapter_lr, r.adapter_lr, c.bridger_heads, v.bridger_heads) == (1.0, 10.0, 1.0, 4, 8)
    assert (c.target, v.target, r.target) == ("area", "area", "nearest")
    assert [on_meta("ViT-B-16", v).preprocess.fit for v in etris.VARIANTS] == ["letterbox", "warp"]  # in training too
    assert etris.config(dataset="refcocog_umd").words == etris.config(dataset="refcocog_google").words == 22
    assert etris.ETRIS(etris.config("tiny")).preprocess.mean == (0.48145466, 0.4578275, 0.40821073)
    tokens = on_meta().tokenize(["The RED car", "dog " * 50])
    assert tokens.tolist()[0] == [49406, 518, 736, 1615, 49407] + [0] * 12 and tokens[1, -1] == 49407


@pytest.mark.parametrize("backbone, flags, word", [
    ("tiny", dict(bridger_stages=(1,)), "bridger-stages"), ("tiny", dict(image_size=100), "image-size"),
    ("tiny", dict(words=2), "words"), ("tiny", dict(bridger_heads=5), "bridger-heads"),
    ("tiny", dict(zoom="x"), "zoom"),
    ("tiny", dict(bridger_heads=0), "bridger-heads"), ("tiny", dict(zoom="pointwise"), "zoom"),
    ("tiny-vit", dict(connect=True), "connect"), ("tiny-vit", dict(blocks=(1, 2, 3)), "blocks"),
    ("tiny", dict(blocks=(2, 4)), "blocks"), ("tiny-vit", dict(zoom="interpolate"), "zoom"),
    ("tiny", dict(head_dim=32), "head-dim"),
    ("tiny-vit", dict(variant="released", zero_init=True), "zero-init"),
    ("tiny-vit", dict(variant="released", zoom="mlp"), "zoom"), ("tiny", dict(bridger_dropout=1.0), "bridger-dropout"),
    ("RN50", dict(decoder_text="sentence"), "decoder-text"), ("tiny", dict(tune="full", bridger_stages=(2,)), "tune")])
def test_impossible_settings_are_named(backbone, flags, word):
    with pytest.raises(UserError, match=f"--{word}.* must be "):
        etris.config(backbone, **flags)


@pytest.mark.parametrize("backbone, flags, values", [
    ("tiny", dict(zoom="pointwise"), "deconv, interpolate, linear, mlp"),
    ("tiny-vit", dict(zoom="interpolate"), "deconv, linear, mlp for a ViT"),
    ("tiny", dict(target="mean"), "area, nearest")])
def test_a_refusal_lists_all_that_is_allowed(backbone, flags, values):
    with pytest.raises(UserError, match=f"must be one of {values}"):
        etris.config(backbone, **flags)


# files in the released layouts, made here with random weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backbone", TINY)
def test_released_files_load_whole_and_wrong_ones_are_named(backbone, tmp_path):
    torch.manual_seed(5)
    clip = open_clip.CLIP(**etris.BACKBONES[backbone]["clip"])
    for t in clip.state_dict().values():
        if t.is_floating_point():
            t.normal_(std=0.1)
    save_as_openai(copy.deepcopy(clip).half(), tmp_path / "clip.pt")  # OpenAI publishes half precision
    save_file({k: v.clone() for k, v in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    for file, tolerance in ("clip.pt", 1e-3), ("clip.safetensors", 0):
        model = etris.ETRIS(etris.config(backbone), str(tmp_path / file))
        for k, v in model.clip.state_dict().items():
            assert torch.allclose(v, clip.state_dict()[k], atol=tolerance, rtol=tolerance), k
    state = {k: v.clone() for k, v in clip.state_dict().items() if k != "ln_final.weight"}
    save_file(state, tmp_path / "short.safetensors")
    for other, weights, word in [(backbone, "short.safetensors", "1 missing: ln_final.weight"),
                                 (TINY[backbone == "tiny"], "clip.safetensors", "does not hold CLIP tiny"),
                                 (backbone, "none.pt", "no such weights file")]:
        with pytest.raises(UserError, match=word):
            etris.ETRIS(etris.config(other), str(tmp_path / weights))
    with pytest.raises(UserError, match="no released weights"):
        etris.ETRIS(etris.config(backbone), "pretrained")


def test_positions_alone_do_not_make_trained_towers():
    model = tiny("tiny-vit", "released", image_size=1024)  # most of its numbers are positions
    assert count(model.clip, trainable=True) > count(model.clip) / 2 and fingerprint(model)
    frozen = tiny("tiny-vit", "released", tune="frozen")  # the head alone, also in the authors' variant
    assert count(frozen, trainable=True) == count(frozen.parts()["head"])


# DINOv2 in the place of CLIP's vision tower (DCRIS, Table 2)


def test_dinov2_runs_in_stages_as_it_runs_whole(tmp_path):
    flags = dict(image_size=56, variant="released", backbone="dinov2-base", tune="frozen")
    model = etris.ETRIS(etris.config(**flags)).eval()
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        maps, f_t, f_s, _ = model.encode(images, model.tokenize(SENTENCES[:1]))
        whole = model.clip.visual(images, output_hidden_states=True)
    places = whole.last_hidden_state[:, 5:].transpose(1, 2).unflatten(2, (4, 4))
    assert torch.allclose(maps[2], places, atol=1e-4) and maps[2].shape == (1, 768, 4, 4)
    for block, m in zip((4, 8), maps):  # hidden_states[0] is what goes into the first
        assert torch.allclose(m, whole.hidden_states[block][:, 5:].transpose(1, 2).unflatten(2, (4, 4)), atol=1e-4)
    assert model.preprocess.mean == clip_towers.IMAGENET[0]
    assert not model.clip.visual.embeddings.mask_token.requires_grad


def test_a_bridger_beside_dinov2_gives_nothing_to_the_tokens_without_a_place():
    model = etris.ETRIS(etris.config("dinov2-base", image_size=56)).eval()
    images, seen = torch.randn(1, 3, 56, 56), []
    model.clip.visual.encoder.layer[4].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model.encode(images, model.tokenize(SENTENCES[:1]))
        v = model.clip.visual.embeddings(images)
        for block in model.clip.visual.encoder.layer[:4]:
            v = block(v)
    assert torch.allclose(seen[0][:, :5], v[:, :5], atol=1e-5)
    assert (seen[0][:, 5:] - v[:, 5:]).abs().amax(2).min() > 1e-4


def test_dinov2_and_clip_are_loaded_together(tmp_path):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    dino = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(patch_size=14, image_size=518))
    clip = open_clip.CLIP(**etris.BACKBONES["dinov2-base"]["clip"])
    files = [str(tmp_path / f"{n}.safetensors") for n in ("dino", "clip")]
    for file, m in zip(files, (dino, clip)):
        save_file({k: v.contiguous() for k, v in m.state_dict().items()}, file)
    model = etris.ETRIS(etris.config("dinov2-base", tune="frozen"), ",".join(files[::-1]))
    assert all(torch.equal(v, model.clip.visual.state_dict()[k]) for k, v in dino.state_dict().items())
    own = model.clip.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in clip.state_dict().items() if not k.startswith("visual."))
    with torch.device("meta"), pytest.raises(UserError, match="two files are needed"):
        etris.ETRIS(etris.config("dinov2-base", tune="frozen"), files[0])
    with pytest.raises(UserError, match="train-positions"):
        etris.config("dinov2-base", "released", train_positions=True)
