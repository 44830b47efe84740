"""python -m pytest tests/test_dcris.py"""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import data
import dcris
from common import Preprocess, UserError, count, fingerprint, trained_state
from tests.test_common import save_as_openai, two_steps

SENTENCES = ["the small red circle on the left", "square"]


def on_meta(backbone="dinov2-base", variant="dcris", **flags):
    with torch.device("meta"):
        return dcris.DCRIS(dcris.config(backbone, variant, **flags))


def tiny(seed=0, **flags):
    torch.manual_seed(seed)
    return dcris.DCRIS(dcris.config("tiny", **flags))


def inputs(model, n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 64, 64, generator=g)
    return images, model.tokenize((SENTENCES * n)[:n]), (torch.rand(n, 64, 64, generator=g) > 0.7).float()


@pytest.mark.parametrize("backbone, variant, adapter, head, total, backbone_total", [
    ("dinov2-base", "dcris", 2_694_048, 22_802_433, 25_496_481, 150_011_649),
    ("dinov2-base", "detris", 2_715_696, 22_802_433, 25_518_129, 150_011_649),
    ("dinov2-large", "dcris", 3_088_800, 23_195_649, 26_284_449, 367_800_833),
    ("dinov2-large", "detris", 3_110_448, 23_195_649, 26_306_097, 367_800_833)])
def test_sizes_of_the_four_models(backbone, variant, adapter, head, total, backbone_total):
    model = on_meta(backbone, variant)
    parts = {k: count(v) for k, v in model.parts().items()}
    assert parts == dict(backbone=backbone_total, adapter=adapter, head=head)
    assert count(model, trainable=True) == total
    assert count(model) == total + backbone_total


def test_the_rows_without_adapters():
    frozen, full = on_meta(tune="frozen"), on_meta(tune="full")
    assert count(frozen.parts()["adapter"]) == count(full.parts()["adapter"]) == 0
    assert count(frozen, trainable=True) == 22_802_433
    assert count(full, trainable=True) == 150_011_649 - 768 - 1 + 22_802_433  # mask token and logit scale: unused


def test_towers_run_as_their_libraries_run_them():
    model = tiny(tune="frozen").eval()
    images, tokens, _ = inputs(model)
    f_t, f_s, pad = model.encode_text(tokens)
    longer = F.pad(tokens, (0, 77 - tokens.shape[1]))
    assert torch.allclose(model.text.encode_text(longer), f_s, atol=1e-6)
    assert pad.sum(1).tolist() == [17 - 9, 17 - 3]
    maps = model.encode_image(images, f_t, pad)
    out = model.vision(images, output_hidden_states=True)
    for got, index in zip(maps, (2, 3)):
        assert torch.allclose(got.flatten(2).transpose(1, 2), out.hidden_states[index][:, 5:], atol=1e-6)
    assert torch.allclose(maps[2].flatten(2).transpose(1, 2), out.last_hidden_state[:, 5:], atol=1e-6)


def test_zero_init_starts_as_the_plain_towers():
    plain, adapted = tiny(tune="frozen").eval(), tiny(zero_init=True).eval()
    images, tokens, _ = inputs(plain)
    for a, b in zip(plain.encode_text(tokens), adapted.encode_text(tokens)):
        assert torch.equal(a, b)
    f_t, _, pad = plain.encode_text(tokens)
    for a, b in zip(plain.encode_image(images, f_t, pad), adapted.encode_image(images, f_t, pad)):
        assert torch.equal(a, b)
    assert not torch.equal(tiny().eval().encode_text(tokens)[0], f_t)  # without it they do differ


@pytest.mark.parametrize("variant", dcris.VARIANTS)
def test_only_adapters_and_head_learn(variant):
    model = tiny(variant=variant).train()
    before, frozen = two_steps(model, *inputs(model, 4))
    towers = ("vision.", "text.")
    for name, p in model.named_parameters():
        assert p.requires_grad == (not name.startswith(towers)), name
        assert (p.grad is not None) == p.requires_grad, name
    assert fingerprint(model) == frozen
    after, trained = model.state_dict(), trained_state(model)
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith(towers))
    assert {k for k in before if not k.startswith(towers)} == trained.keys()
    # dead: with a single key the softmax is 1, so the neck's queries and keys (and nothing else) get
    # nothing but rounding
    dead = {n for n, p in model.named_parameters() if p.requires_grad and "fusion" in n and "in_proj" in n}
    for name, p in model.named_parameters():
        if p.requires_grad and name in dead and variant == "detris":
            queries_and_keys, values = p.grad.split([len(p) // 3 * 2, len(p) // 3])
            assert queries_and_keys.abs().max() < 1e-5 * values.abs().max(), name
        elif p.requires_grad:
            assert p.grad.any(), name
    changed = {k for k in trained if not torch.equal(before[k], after[k])}
    assert trained.keys() - changed == set()


@pytest.mark.parametrize("flags", [dict(visual_layers=()), dict(text_layers=())])
def test_one_kind_of_adapter_alone(flags):
    """Table 3; Fig. 4 (d), with text adapters alone, and (e), with DenseCrossAdapters alone."""
    both, one = tiny().eval(), tiny(**flags).eval()
    images, tokens, _ = inputs(both)
    one.load_state_dict({k: v for k, v in both.state_dict().items() if k in one.state_dict()})
    assert 0 < count(one.parts()["adapter"]) < count(both.parts()["adapter"])
    with torch.no_grad():
        assert not torch.allclose(one(images, tokens), both(images, tokens), atol=1e-4)


def test_blocks_before_the_first_adapter_keep_no_graph():
    model = tiny(visual_layers=(1, 3), text_layers=(1, 3)).train()
    seen = {}
    for tower, blocks in ("vision", model.vision.encoder.layer), ("text", model.text.transformer.resblocks):
        for i in 0, 1, 2:
            name = f"{tower} {i}"
            blocks[i].mlp.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y.requires_grad}))
    images, tokens, _ = inputs(model)
    model(images, tokens)
    # the vision adapters read words that text adapters changed, but only from block 1 on
    assert seen == {"vision 0": False, "vision 1": False, "vision 2": True,
                    "text 0": False, "text 1": False, "text 2": True}


def test_full_tuning_reaches_every_parameter():
    model = tiny(tune="full").train()
    images, tokens, masks = inputs(model)
    model.loss(model(images, tokens), masks).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without == {"vision.embeddings.mask_token", "text.logit_scale"}
    assert not any(p.requires_grad for n, p in model.named_parameters() if n in without)


def test_frozen_towers_stay_in_eval_mode():
    model = tiny().train()
    assert not any(m.training for t in (model.vision, model.text) for m in t.modules())
    assert model.neck.training and model.visual_adapters.training
    assert all(m.training for m in tiny(tune="full").train().vision.modules())


@pytest.mark.parametrize("variant", dcris.VARIANTS)
def test_a_batch_of_two_is_two_of_one(variant):
    model = tiny(variant=variant).eval()
    images, tokens, _ = inputs(model)
    with torch.no_grad():
        both = model(images, tokens)
        one = torch.cat([model(images[i:i + 1], tokens[i:i + 1]) for i in range(2)])
    assert both.shape == (2, 1, 32, 32)
    assert torch.allclose(both, one, atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_more_padding_changes_nothing():
    short, long = tiny(words=17).eval(), tiny(words=30).eval()
    images, _, _ = inputs(short)
    with torch.no_grad():
        a, b = short(images, short.tokenize(SENTENCES)), long(images, long.tokenize(SENTENCES))
    assert torch.allclose(a, b, atol=1e-5)


def test_other_sizes_and_shapes_of_picture():
    model = tiny().eval()
    tokens = model.tokenize(SENTENCES[:1])
    with torch.no_grad():
        assert model(torch.randn(1, 3, 96, 128), tokens).shape == (1, 1, 48, 64)
    images, e = torch.randn(1, 3, 96, 128), model.vision.embeddings
    detris = dcris.detris_embeddings(e, images, (12, 16))
    assert detris.shape == e(images).shape == (1, 5 + 192, 64)
    assert torch.allclose(detris[:, :5], e(images)[:, :5])  # they differ by the patches' positions alone
    assert not torch.allclose(detris[:, 5:], e(images)[:, 5:], atol=1e-3)
    images = torch.randn(1, 3, 64, 64)  # the size that the positions were trained for: as they are, in both
    assert torch.equal(dcris.detris_embeddings(e, images, (8, 8)), e(images))


def test_tokens():
    model = on_meta()
    tokens = model.tokenize(["The RED car", "dog " * 50])
    assert tokens.tolist()[0] == [49406, 518, 736, 1615, 49407] + [0] * 12  # CLIP's published ids
    assert tokens[1, 0] == 49406 and tokens[1, -1] == 49407 and len(tokens[1]) == 17
    small = tiny().tokenize(["the red triangle", "!", "zyzzyva ünïcödé 犬"])
    assert small.max() == 4095 and (small == 4094).sum() == 3 and (small.argmax(1) > 0).all()


def test_densely_connected_branches_see_what_eq_1_says():
    block = dcris.DenselyConnected(32, 2).eval()
    shapes = [tuple(m.weight.shape) for m in block.modules() if isinstance(m, torch.nn.Conv2d)]
    assert shapes == [(16, 32, 1, 1), (2, 48, 1, 1), (8, 2, 3, 3), (2, 56, 1, 1), (8, 2, 5, 5)]
    x = torch.zeros(1, 32, 9, 9)
    reach = torch.zeros(9, 9, dtype=torch.bool)
    for m in block.modules():  # positive weights, so that no ReLU hides a path
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.constant_(m.weight, 0.1)
    y = x.clone()
    y[:, :, 4, 4] = 1
    reach = (block(y) != block(x)).any(1)[0]
    assert reach.nonzero().min(0).values.tolist() == [1, 1]  # 3x3 feeds 5x5: three pixels to each side
    assert reach.nonzero().max(0).values.tolist() == [7, 7]


def target_of(model, masks, size):
    """What the loss makes of masks (B, S, S): of Eq. 6 the gradient at logit 0 is (1/2 - target) / pixels."""
    logits = torch.zeros(len(masks), 1, size, size, requires_grad=True)
    model.loss(logits, masks).backward()
    return 0.5 - logits.grad[:, 0] * logits.numel()


@pytest.mark.parametrize("target", ["area", "nearest"])
def test_loss_is_eq_6(target):
    model = tiny(dice=0.0, target=target)
    logits, masks = torch.randn(2, 1, 4, 4), torch.zeros(2, 8, 8)
    masks[:, :4, :3] = 1
    p, cells = logits.sigmoid()[:, 0], masks.unflatten(1, (4, 2)).unflatten(3, (4, 2))
    t = cells.mean((2, 4)) if target == "area" else masks[:, ::2, ::2]
    by_hand = -(t * p.log() + (1 - t) * (1 - p).log()).sum() / 32
    assert torch.allclose(model.loss(logits, masks), by_hand, atol=1e-6)


@pytest.mark.parametrize("canvas, size, photo, least", [
    (448, 128, (480, 640), 98), (448, 128, (640, 427), 98), (64, 32, (64, 64), 97)])
def test_target_lies_where_the_answer_is_read(canvas, size, photo, least):
    """A prediction equal to its target comes back to the photograph where the object is."""
    pre, rng = Preprocess(canvas), np.random.default_rng(0)
    y, x = np.mgrid[:photo[0], :photo[1]]
    masks = []
    for share in rng.uniform(0.01, 0.08, 12) if canvas > 64 else rng.uniform(0.03, 0.1, 12):
        radius, flat = np.sqrt(share * x.size / np.pi), rng.uniform(0.7, 1.4)
        cy, cx = rng.uniform(0.3, 0.7, 2) * photo
        masks.append(((y - cy) / (radius * flat)) ** 2 + ((x - cx) / (radius / flat)) ** 2 < 1)
    model = tiny(dice=0.0)
    back = [data.from_canvas(t, photo, pre).numpy() > 0.5
            for t in target_of(model, torch.stack([data.mask_to_canvas(m, pre) for m in masks]), size)]
    shift = np.mean([np.mean(np.nonzero(b), 1) - np.mean(np.nonzero(m), 1) for b, m in zip(back, masks)], 0)
    assert np.abs(shift).max() < 0.2
    assert 100 * np.mean([(b & m).sum() / (b | m).sum() for b, m in zip(back, masks)]) > least


def test_settings_of_variants_and_backbones():
    c, d = dcris.config("dinov2-base"), dcris.config("dinov2-base", "detris")
    assert (d.epochs, d.milestones) == (65, (35, 55))
    assert dcris.config("dinov2-base", "detris", "refcocog_google").epochs == 50
    assert (c.epochs, c.milestones, c.lr, c.batch_size) == (50, (35,), 1e-4, 32)
    big, large = dcris.config("dinov2-large"), dcris.config("dinov2-large", "detris")
    assert (big.lr, big.batch_size, big.map_layers, big.visual_layers) == (2e-4, 64, (8, 16), (2, 6, 10, 14, 18, 22))
    assert (large.lr, large.batch_size, large.epochs, large.map_layers) == (1e-4, 32, 50, (8, 16))
    assert (c.target, d.target, tiny().c.target, tiny(variant="detris").c.target) == ("area", "nearest") * 2


@pytest.mark.parametrize("dataset, words", [("refcoco", (17, 17)), ("refcocog_google", (17, 17)),
                                            ("refcocog_umd", (22, 22)), ("mixed", (22, 17))])
def test_words_of_the_data_sets(dataset, words):
    """DETRIS's mixed configuration has 17. Its adapters read padding, so that its length matters."""
    assert tuple(dcris.config(variant=v, dataset=dataset).words for v in dcris.VARIANTS) == words


def test_pictures_come_to_the_canvas_as_each_variant_has_them():
    ours, theirs = tiny().preprocess, tiny(variant="detris").preprocess
    assert (ours.fit, ours.mean) == ("letterbox", dcris.IMAGENET[0])
    assert (theirs.fit, theirs.mean) == ("warp", dcris.CLIP[0])  # in training too


def test_detris_differs_from_dcris_where_it_says():
    """Words behind the end token reach DETRIS's adapters; CLS, registers and the start token come twice."""
    paper, detris = (dcris.DCRIS(dcris.config("tiny", v)).eval() for v in dcris.VARIANTS)
    a, b = paper.visual_adapters["1"], detris.visual_adapters["1"]
    b.load_state_dict(a.state_dict())
    x, f_t = torch.randn(1, 5 + 12, 64), torch.randn(1, 6, 64)
    pad = torch.arange(6)[None] > 3
    changed = torch.where(pad[..., None], f_t + 1, f_t)
    assert torch.equal(a(x, f_t, pad, (3, 4)), a(x, changed, pad, (3, 4)))
    assert not torch.equal(b(x, f_t, pad, (3, 4)), b(x, changed, pad, (3, 4)))
    none = torch.zeros_like(pad)
    ours, theirs = a(x, f_t, none, (3, 4)), b(x, f_t, none, (3, 4))
    assert torch.allclose(ours[:, 5:], theirs[:, 5:], atol=1e-6)
    assert torch.allclose(2 * ours[:, :5], theirs[:, :5], atol=1e-6)  # its bias is 0 at the start
    ta = detris.text_adapters["1"]
    start = 2 * F.relu(ta.down(f_t[:, 0])) @ ta.up.weight.T + ta.up.bias
    assert torch.allclose(ta(f_t)[:, 0], start, atol=1e-6)
    assert not torch.equal(ta(f_t)[:, 2], ta(changed)[:, 2])  # it reads neighbours
    plain = paper.text_adapters["1"]
    assert torch.allclose(plain(f_t)[:, :4], plain(changed)[:, :4], atol=1e-6)
    maps, f_s = [torch.randn(1, 64, 3, 4) for _ in range(3)], torch.randn(1, 1, 64)
    neck = detris.neck
    once = neck(maps, f_s, None)
    neck.fusion[0].in_proj_weight.data[:128] += 1  # queries and keys: one key, nothing to choose
    assert torch.allclose(neck(maps, f_s, None), once, atol=1e-5)


@pytest.mark.parametrize("variant", dcris.VARIANTS)
def test_each_tune_starts_from_the_same_towers_and_head(variant):
    method = tiny(variant=variant).state_dict()
    for tune in "frozen", "full", "method+lora":
        other = tiny(variant=variant, tune=tune).state_dict()
        shared = [k for k in other if k in method and "adapters" not in k]
        assert {k.split(".")[0] for k in shared} == {"vision", "text", "neck", "decoder", "proj"}
        assert all(torch.equal(method[k], other[k]) for k in shared)
        assert {k for k in method if k.startswith(("neck.", "decoder.", "proj."))} <= set(shared)


@pytest.mark.parametrize("flags, word", [
    (dict(visual_layers=(1, 99)), "visual-layers"), (dict(image_size=65), "image-size"), (dict(words=99), "words"),
    (dict(visual_dim=40), "visual-dim"), (dict(map_layers=(2, 1)), "map-layers"),
    (dict(map_layers=(1, 3)), "map-layers"), (dict(variant="detris", text_dim=40), "text-dim"),
    (dict(head_dim=32), "head-dim"),
    (dict(batch_size=0), "batch-size"), (dict(threshold=1.5), "threshold"),
    (dict(optimizer="sgd"), "optimizer"), (dict(cross_heads=0), "cross-heads"),
    (dict(head_heads=0), "head-heads"), (dict(cross_dropout=2.0), "cross-dropout"),
    (dict(decoder_ffn=0), "decoder-ffn"), (dict(tune="frozen", visual_layers=(1,)), "tune")])
def test_impossible_settings_are_named(flags, word):
    with pytest.raises(UserError, match=word):
        dcris.config("tiny", **flags)


# files in the released layouts, made here with random weights


def meta_layout(model):
    """A Dinov2WithRegistersModel's weights under the names of Meta's .pth files."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    out = {}
    for k, v in state.items():
        k = k.replace("embeddings.position_embeddings", "pos_embed")
        k = k.replace("embeddings.patch_embeddings.projection", "patch_embed.proj").replace("embeddings.", "")
        k = k.replace("encoder.layer.", "blocks.").replace("layer_scale1.lambda1", "ls1.gamma")
        k = k.replace("layer_scale2.lambda1", "ls2.gamma").replace("layernorm", "norm")
        k = k.replace("attention.o_proj", "attn.proj").replace("attention.output.dense", "attn.proj")
        out[k] = v
    for i in range(model.config.num_hidden_layers):
        names = [[k for k in out if k.startswith(f"blocks.{i}.") and any(s in k for s in (f".{q[0]}_proj", f".{q}."))
                  and k.endswith(end)] for end in ("weight", "bias") for q in ("query", "key", "value")]
        parts = [out.pop(n[0]) for n in names]
        out[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts[:3])
        out[f"blocks.{i}.attn.qkv.bias"] = torch.cat(parts[3:])
    return out


def hub_layout(model):
    """The names in the hub's model.safetensors, which transformers 5 renames as it loads."""
    names = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
             "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense"}
    out = {}
    for k, v in model.state_dict().items():
        for a, b in names.items():
            k = k.replace(a, b)
        out[k] = v.clone()
    return out


@pytest.fixture
def towers(tmp_path, monkeypatch):
    torch.manual_seed(5)
    names = dcris.BACKBONES["tiny"]
    monkeypatch.setitem(dcris.BACKBONES, "small", names | dict(hub="owner/small"))  # as tiny, but released
    vision = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**names["dino"]))
    clip = open_clip.CLIP(**names["clip"])
    for p in [*vision.parameters(), *clip.parameters()]:
        p.data.normal_(std=0.1)
    torch.save(meta_layout(vision), tmp_path / "dino.pth")
    save_file(hub_layout(vision), tmp_path / "dino.safetensors")
    save_file({k: v.clone() for k, v in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    save_as_openai(clip, tmp_path / "clip.pt")
    return tmp_path, vision, clip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dino, text", [("dino.pth", "clip.pt"), ("dino.safetensors", "clip.safetensors")])
def test_released_files_load_whole(towers, dino, text):
    folder, vision, clip = towers
    loaded_vision, loaded_text = dcris.build_towers("small", f"{folder / dino},{folder / text}")
    for k, v in vision.state_dict().items():
        assert torch.equal(loaded_vision.state_dict()[k], v), k
    for k, v in loaded_text.state_dict().items():
        assert torch.equal(clip.state_dict()[k], v), k


@pytest.mark.filterwarnings("ignore")
def test_wrong_weights_are_named(towers):
    folder, vision, _ = towers
    short = {k: v for k, v in meta_layout(vision).items() if k != "norm.weight"}
    torch.save(short, folder / "short.pth")
    (folder / "broken.pth").write_bytes((folder / "dino.pth").read_bytes()[:5000])
    for weights, word in [(f"{folder}/short.pth,{folder}/clip.pt", "1 missing: layernorm.weight"),
                          (f"{folder}/dino.pth", "found DINOv2"), (f"{folder}/none.pth", "no such weights file"),
                          (f"{folder}/broken.pth,{folder}/clip.pt", "broken.pth cannot be read")]:
        with pytest.raises(UserError, match=word):
            dcris.build_towers("small", weights)
    with pytest.raises(UserError, match="no released weights"):
        dcris.build_towers("tiny", "pretrained")
    with pytest.raises(UserError, match="dinov2-base"):
        dcris.DCRIS(dcris.config("dinov2-base"), f"{folder}/dino.pth,{folder}/clip.pt")
