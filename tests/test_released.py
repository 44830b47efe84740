"""python -m pytest tests/test_released.py

Checkpoints as the authors of DETRIS and ETRIS released them: their layout is written down here, with random weights.
ALL_RELEASED=1 in the environment runs two more of the five models: RN101, as RN50 with more blocks, and the largest,
which needs 8 GB.
"""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import common
import data
import dcris
import etris
import evaluate
from common import UserError
from toolbox.released import from_detris, from_etris

CONVERT = {dcris: from_detris, etris: from_etris}
MODELS = {  # sizes of the released files, tensors and trained parameters of their adapters
    "DETRIS-B": (994, 2_715_696), "DETRIS-L": (1162, 3_110_448),
    "RN50": (769, 1_942_080), "RN101": (1075, 1_942_080), "ViT-B-16": (522, 598_592)}


def norm(name, n):
    return {f"{name}.weight": (n,), f"{name}.bias": (n,)}


def batch_norm(name, n):
    return norm(name, n) | {f"{name}.running_mean": (n,), f"{name}.running_var": (n,), f"{name}.num_batches_tracked": ()}


def linear(name, n_in, n_out):
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def mha(name, n):
    return {f"{name}.in_proj_weight": (3 * n, n), f"{name}.in_proj_bias": (3 * n,)} | linear(f"{name}.out_proj", n, n)


def conv_bn(name, n_in, n_out, *kernel):
    return {f"{name}.0.weight": (n_out, n_in, *kernel)} | batch_norm(f"{name}.1", n_out)


def deconv_bn(name, n_in, n_out, k):
    return {f"{name}.0.weight": (n_in, n_out, k, k)} | batch_norm(f"{name}.1", n_out)


def merged(*parts):
    return {k: v for part in parts for k, v in part.items()}


def head(widths, sentence, first, last):
    """CRIS's neck, decoder and projector; `first`, `last`: the strides of its first and last level."""
    layers = [merged(norm(f"{p}.self_attn_norm", 512), norm(f"{p}.cross_attn_norm", 512), mha(f"{p}.self_attn", 512),
                     mha(f"{p}.multihead_attn", 512), linear(f"{p}.ffn.0", 512, 512), norm(f"{p}.ffn.3", 512),
                     linear(f"{p}.ffn.4", 512, 512), *(norm(f"{p}.norm{i}", 512) for i in (1, 2, 3)))
              for p in (f"decoder.layers.{i}" for i in range(3))]
    return merged(
        linear("neck.txt_proj", sentence, 512), *(mha(f"neck.fusion{i}.multihead_attn", 512) for i in (3, 4, 5)),
        conv_bn("neck.f3_proj", widths[0], 512, first, first), conv_bn("neck.f4_proj", widths[1], 512, 1, 1),
        deconv_bn("neck.f5_proj", widths[2], 512, last), conv_bn("neck.aggr", 1536, 512, 1, 1),
        conv_bn("neck.coordconv.0.conv1", 514, 512, 3, 3), conv_bn("neck.coordconv.1", 512, 512, 3, 3), *layers,
        norm("decoder.norm", 512), conv_bn("proj.vis.1", 512, 512, 3, 3), conv_bn("proj.vis.3", 512, 256, 3, 3),
        {"proj.vis.4.weight": (256, 256, 1, 1), "proj.vis.4.bias": (256,)}, linear("proj.txt", sentence, 2305))


def dense(name, d, *one):
    """Three branches of convolutions with bias; `one` is () over words and (1,) over a map."""
    def conv(p, n_in, n_out, k):
        size = (k,) * (1 + len(one))
        return {f"{p}.conv.weight": (n_out, n_in, *size), f"{p}.conv.bias": (n_out,)} | batch_norm(f"{p}.bn", n_out)
    return merged(conv(f"{name}.dense_branch1", d, d // 2, 1), conv(f"{name}.dense_branch2.0", d + d // 2, d // 16, 1),
                  conv(f"{name}.dense_branch2.1", d // 16, d // 4, 3),
                  conv(f"{name}.dense_branch3.0", d + d // 2 + d // 4, d // 16, 1),
                  conv(f"{name}.dense_branch3.1", d // 16, d // 4, 5))


def clip_shapes(name, prefix, visual=True):
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config(f"{name}-quickgelu"))
    return {prefix + k: tuple(v.shape) for k, v in clip.state_dict().items() if visual or not k.startswith("visual.")}


def detris(large):
    n, depth, places = (1024, 24, (2, 6, 10, 14, 18, 22)) if large else (768, 12, (1, 3, 5, 7, 9, 11))
    out = {"dinov2.cls_token": (1, 1, n), "dinov2.pos_embed": (1, 1370, n), "dinov2.register_tokens": (1, 4, n),
           "dinov2.mask_token": (1, n), "dinov2.patch_embed.proj.weight": (n, 3, 14, 14),
           "dinov2.patch_embed.proj.bias": (n,)} | norm("dinov2.norm", n) | clip_shapes("ViT-B-16", "txt_backbone.", False)
    for i in range(depth):
        p = f"dinov2.blocks.{i}"
        out |= merged(norm(f"{p}.norm1", n), linear(f"{p}.attn.qkv", n, 3 * n), linear(f"{p}.attn.proj", n, n),
                      {f"{p}.ls1.gamma": (n,), f"{p}.ls2.gamma": (n,)}, norm(f"{p}.norm2", n),
                      linear(f"{p}.mlp.fc1", n, 4 * n), linear(f"{p}.mlp.fc2", 4 * n, n))
        if i in places:
            out |= merged(dense(f"{p}.adapter", 128, 1), linear(f"{p}.adapter.D_fc1", n, 128),
                          linear(f"{p}.adapter.D_fc2", 128, n), mha(f"{p}.adapter.cross.multihead_attn", 128),
                          linear(f"{p}.adapter.cross.image_proj", 128, 128),
                          linear(f"{p}.adapter.cross.text_proj", 512, 128),
                          linear(f"{p}.adapter.cross.back_proj", 128, 128))
    for i in 1, 3, 5, 7, 9, 11:
        p = f"txt_backbone.transformer.resblocks.{i}.adapter"
        out |= merged(dense(p, 64), linear(f"{p}.D_fc1", 512, 64), linear(f"{p}.D_fc2", 64, 512))
    return out | head((n, n, n), 512, 1, 1)


def etris_layout(backbone):
    sentence = 1024 if backbone == "RN50" else 512
    out = clip_shapes(backbone, "backbone.")
    if backbone == "ViT-B-16":
        out["backbone.visual.positional_embedding"] = (677, 768)
        for i in range(3):
            ways = [(f"bridger.zoom_in.{i}", (64, 768, 1, 1) if i < 2 else (768, 64, 1, 1), 64),
                    (f"bridger.zoom_out.{i}", (64, 768, 1, 1) if i < 2 else (768, 64, 1, 1), 768)]
            for name, shape, n in ways:
                out |= {f"{name}.0.weight": shape} | batch_norm(f"{name}.1", n)
            out |= merged(*(mha(f"bridger.fusion_{x}.{i}.multihead_attn", 64) for x in "vt"))
        widths, strides = (768, 768, 512), (1, 1)
    else:
        out |= {"backbone.visual.attnpool.connect.0.weight": (sentence, 2048, 1, 1)} | batch_norm(
            "backbone.visual.attnpool.connect.1", sentence)
        shapes = [((64, 512, 2, 2), (64, 512, 2, 2)), ((64, 1024, 1, 1), (64, 1024, 1, 1)), ((2048, 64, 2, 2),) * 2]
        for i, (zoom_in, zoom_out) in enumerate(shapes):
            out |= {f"bridger.zoom_in.{i}.weight": zoom_in, f"bridger.zoom_out.{i}.weight": zoom_out}
            for x in "vt":
                p = f"bridger.fusion_{x}.{i}"
                out |= merged(mha(f"{p}.self_attn", 64), mha(f"{p}.multihead_attn", 64), linear(f"{p}.linear1", 64, 128),
                              linear(f"{p}.linear2", 128, 64), *(norm(f"{p}.norm{k}", 64) for k in (1, 2, 3)))
        widths, strides = (512, 1024, sentence), (2, 2)
    for i in range(3):
        out |= merged(linear(f"bridger.linear1.{i}", 512, 64), linear(f"bridger.linear2.{i}", 64, 512))
    out |= merged(*(norm(f"bridger.ln_{x}.{i}", 64) for x in "vt" for i in (0, 1)))
    return out | head(widths, sentence, *strides)


def layout(name):
    return detris(name == "DETRIS-L") if name.startswith("DETRIS") else etris_layout(name)


def random_state(name):
    g, out, shapes = torch.Generator().manual_seed(0), {}, layout(name)
    for k, shape in shapes.items():
        if k.endswith("num_batches_tracked"):
            out[k] = torch.tensor(len(out))
        elif len(shape) == 1 and (not k.endswith("bias") or k[:-4] + "running_var" in shapes):
            out[k] = 0.5 + torch.rand(shape, generator=g)  # norms, scales and variances, and what keeps a ReLU alive
        else:
            fan = shape[1] * int(np.prod(shape[2:])) if len(shape) > 1 else 4
            out[k] = torch.randn(shape, generator=g) * fan**-0.5
    return out


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_lands(name):
    shapes = layout(name)
    assert len(shapes) == MODELS[name][0]
    method = dcris if name.startswith("DETRIS") else etris
    with torch.device("meta"):
        state = {k: torch.empty(s) for k, s in shapes.items()}
        c, out = CONVERT[method](state, "refcoco")
        model = method.Model(c)
    own = model.state_dict()
    assert {k: v.shape for k, v in out.items()} == {k: v.shape for k, v in own.items()}
    assert common.count(model.parts()["adapter"]) == MODELS[name][1]
    assert c.image_size == (448 if method is dcris else 416) and model.preprocess.mean == dcris.CLIP[0]
    assert c.backbone == {"DETRIS-B": "dinov2-base", "DETRIS-L": "dinov2-large"}.get(name, name)
    assert c == method.config(c.backbone, "detris" if method is dcris else "released")
    other = etris if method is dcris else dcris
    assert CONVERT[other](state, "refcoco") is None


def test_a_mixed_model_and_fewer_stages():
    """The large model trained on a mixture has wider adapters in 23 and 11 blocks; ETRIS's public code can keep its last
    stages alone."""
    wide = {}
    for k, shape in layout("DETRIS-L").items():
        if ".adapter." not in k:
            wide[k] = shape
    for i in range(1, 24):
        p = f"dinov2.blocks.{i}.adapter"
        wide |= merged(dense(p, 384, 1), linear(f"{p}.D_fc1", 1024, 384), linear(f"{p}.D_fc2", 384, 1024),
                       mha(f"{p}.cross.multihead_attn", 128), linear(f"{p}.cross.image_proj", 384, 128),
                       linear(f"{p}.cross.text_proj", 512, 128), linear(f"{p}.cross.back_proj", 128, 384))
    for i in range(1, 12):
        p = f"txt_backbone.transformer.resblocks.{i}.adapter"
        wide |= merged(dense(p, 384), linear(f"{p}.D_fc1", 512, 384), linear(f"{p}.D_fc2", 384, 512))
    last = {k: v for k, v in layout("RN101").items() if not any(
        k.startswith(f"bridger.{m}.{i}.") for m in ("zoom_in", "zoom_out", "linear1", "linear2", "fusion_v", "fusion_t")
        for i in (0,)) and not k.startswith(("bridger.ln_v.0", "bridger.ln_t.0"))}
    for method, shapes, size in (dcris, wide, 27_638_640 + 5_692_720), (etris, last, 1_513_088):
        with torch.device("meta"):
            c, out = CONVERT[method]({k: torch.empty(s) for k, s in shapes.items()}, "mixed")
            model = method.Model(c)
        assert {k: v.shape for k, v in out.items()} == {k: v.shape for k, v in model.state_dict().items()}
        assert common.count(model.parts()["adapter"]) == size and c == method.config(
            c.backbone, c.variant, "mixed", **{f: getattr(c, f) for f in (
                ("visual_layers", "text_layers", "visual_dim", "text_dim") if method is dcris else
                ("bridger_stages", "bridger_dim"))})


HEAD = {  # a tensor of theirs: the one of ours that it is; of these others have the same shape
    "neck.fusion3.multihead_attn.in_proj_weight": "neck.fusion.0.in_proj_weight",
    "neck.fusion5.multihead_attn.out_proj.bias": "neck.fusion.2.out_proj.bias",
    "neck.f4_proj.1.running_var": "neck.f_proj.1.1.running_var", "neck.coordconv.1.0.weight": "neck.coordconv.1.0.weight",
    "decoder.layers.1.multihead_attn.in_proj_weight": "decoder.layers.1.cross_attn.in_proj_weight",
    "decoder.layers.2.self_attn_norm.weight": "decoder.layers.2.self_attn_norm.weight",
    "decoder.layers.0.norm2.bias": "decoder.layers.0.norm2.bias", "decoder.layers.0.ffn.4.weight": "decoder.layers.0.ffn.4.weight",
    "proj.vis.1.1.running_mean": "proj.vis.1.1.running_mean"}
PAIRS = {
    "DE": HEAD | {
        "dinov2.blocks.3.adapter.dense_branch3.1.conv.weight": "visual_adapters.3.dense.branch3.1.0.weight",
        "dinov2.blocks.3.adapter.dense_branch2.0.bn.running_mean": "visual_adapters.3.dense.branch2.0.1.running_mean",
        "dinov2.blocks.5.adapter.D_fc2.weight": "visual_adapters.5.up.weight",
        "dinov2.blocks.5.adapter.cross.image_proj.weight": "visual_adapters.5.image_proj.weight",
        "dinov2.blocks.5.adapter.cross.back_proj.weight": "visual_adapters.5.back_proj.weight",
        "txt_backbone.transformer.resblocks.9.adapter.dense_branch2.0.conv.weight":
            "text_adapters.9.dense.branch2.0.0.weight",
        "txt_backbone.transformer.resblocks.9.ln_2.weight": "text.transformer.resblocks.9.ln_2.weight",
        "txt_backbone.text_projection": "text.text_projection"},
    "Vi": HEAD | {
        "bridger.fusion_v.1.multihead_attn.in_proj_weight": "bridgers.3.ita_v.cross_attn.in_proj_weight",
        "bridger.fusion_t.2.multihead_attn.in_proj_weight": "bridgers.4.ita_t.cross_attn.in_proj_weight",
        "bridger.zoom_in.1.0.weight": "bridgers.3.zoom_in.0.weight", "bridger.ln_t.1.weight": "bridgers.4.ln_t.weight",
        "bridger.zoom_out.0.1.running_var": "bridgers.2.zoom_out.1.running_var"},
    "RN": HEAD | {
        "bridger.fusion_v.0.self_attn.in_proj_weight": "bridgers.2.ita_v.self_attn.in_proj_weight",
        "bridger.fusion_t.1.multihead_attn.in_proj_weight": "bridgers.3.ita_t.cross_attn.in_proj_weight",
        "bridger.fusion_t.1.linear2.weight": "bridgers.3.ita_t.ffn.3.weight", "bridger.linear1.2.bias": "bridgers.4.linear1.bias",
        "bridger.fusion_v.2.norm3.weight": "bridgers.4.ita_v.norm3.weight", "bridger.ln_v.0.bias": "bridgers.3.ln_v.bias",
        "backbone.visual.attnpool.connect.1.running_mean": "clip.visual.attnpool.connect.1.running_mean"}}


@pytest.fixture(scope="module", params=MODELS if os.environ.get("ALL_RELEASED") else ["DETRIS-B", "RN50", "ViT-B-16"])
def released(request, tmp_path_factory):
    """A file as the authors' training writes it: (its name, path, tensors)"""
    state = random_state(request.param)
    file = tmp_path_factory.mktemp("released") / "best_model.pth"
    torch.save(dict(epoch=50, cur_iou=np.float64(0.7), best_iou=np.float32(0.69), prec={"Pr@50": 0.8},
                    state_dict={f"module.{k}": v for k, v in state.items()},
                    optimizer=dict(state={0: dict(step=torch.tensor(1.0))}, param_groups=[dict(lr=1e-5, params=[0])]),
                    scheduler=dict(milestones=Counter({35: 1}), gamma=0.1, last_epoch=50)), file)
    return request.param, str(file), state


def test_a_released_file_answers(released, tmp_path, capsys, monkeypatch):
    """Loaded, every tensor has its values, the answer depends on each but those the facts call dead, and the command
    draws it."""
    name, file, state = released
    model, info = evaluate.load_run(file, None, common.start(device="cpu"))
    values = {round(v.double().sum().item(), 6) for k, v in model.state_dict().items() if v.dim()}
    lost = [k for k, v in state.items() if v.dim() and not k.endswith("attn.qkv.weight") and not k.endswith("attn.qkv.bias")
            and round(v.double().sum().item(), 6) not in values and "f5_proj.0" not in k]
    own = model.state_dict()
    for theirs, ours in PAIRS[name[:2]].items():
        if name == "DETRIS-L":  # whose adapters are in other blocks
            for a, b in ("3", "6"), ("5", "10"):
                theirs, ours = theirs.replace(f"v2.blocks.{a}.", f"v2.blocks.{b}."), ours.replace(f"l_adapters.{a}.", f"l_adapters.{b}.")
        assert torch.equal(state[theirs], own[ours]), theirs
    f5 = state["neck.f5_proj.0.weight"]
    assert torch.equal(f5.transpose(0, 1) if name.startswith("DETRIS") else f5, own["neck.f_proj.2.0.weight"])
    if name.startswith("DETRIS"):
        layer = model.vision.encoder.layer[7].attention
        projections = dict(layer.named_modules())
        for chunk, names in zip(state["dinov2.blocks.7.attn.qkv.weight"].chunk(3), (
                ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))):
            module = next(m for n, m in projections.items() if n.split(".")[-1] in names)
            assert torch.equal(module.weight, chunk)
    assert not lost and info["method"] == ("dcris" if name.startswith("DETRIS") else "etris") and model.preprocess.fit == "warp"
    model.requires_grad_(True)
    for p in model.parameters():
        p.grad = None
    g = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, 224, 224, generator=g)  # smaller than theirs, which takes longer
    model(images, model.tokenize(["the left dog"])).square().mean().backward()
    still = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    unread = {"vision.embeddings.mask_token", "text.logit_scale"} if name.startswith("DETRIS") else {"clip.logit_scale"}
    assert still == unread
    for i in range(3):  # over one key the softmax is 1: two thirds of these are dead
        grad = model.neck.fusion[i].in_proj_weight.grad
        assert grad[:1024].abs().max() < 1e-4 * grad[1024:].abs().max()  # differences of equal sums, rounded
    photo = np.random.default_rng(0).integers(0, 255, (60, 81, 3)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")
    monkeypatch.setattr(evaluate, "load_run", lambda *args: (model, info))  # which took longest, and is the same again
    evaluate.main(["--ckpt", file, "--image", str(tmp_path / "a.png"), "--text", "left dog", "--threshold", "0.001",
                   "--out", str(tmp_path / "b.png"), "--json", str(tmp_path / "b.json")])
    assert json.loads((tmp_path / "b.json").read_text())["width"] == 81
    assert "released weights of" in capsys.readouterr().err


def test_files_that_are_no_released_models(tmp_path, capsys):
    state = {k: torch.zeros(s) for k, s in layout("RN50").items() if "bridger" in k or k == "proj.txt.weight"}
    torch.save(dict(state_dict=state), tmp_path / "part.pth")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 no")
    process = common.start(device="cpu")
    for file, message in [("part.pth", "does not hold the released ETRIS with RN50: .* missing"), ("broken.pth", "cannot be read"),
                          ("other.pth", "neither a run of train.py .* nor a checkpoint that the authors of DETRIS or ETRIS")]:
        with pytest.raises(UserError, match=message):
            evaluate.load_run(str(tmp_path / file), None, process)
    for name in "hf:thuteam", "hf:thuteam/DETRIS", "hf:":
        with pytest.raises(UserError, match="hf:OWNER/REPOSITORY/FILE is needed"):
            evaluate.load_run(name, None, process)
    for name in "hf:a b/c/d", "hf:a/b/../../c":
        with pytest.raises(UserError, match=" of a"):
            evaluate.load_run(name, None, process)
    for n, damaged in enumerate([{"dinov2.pos_embed": torch.zeros(3)}, {"bridger.linear1.0.weight": torch.tensor(0.0)},
                                 {k: torch.zeros(s) for k, s in layout("DETRIS-B").items() if "D_fc1" not in k and (
                                     "adapter" in k or "pos_embed" in k)}]):
        torch.save(damaged, tmp_path / f"{n}.pth")
        with pytest.raises(UserError, match="is not whole, or not as the authors"):
            evaluate.load_run(str(tmp_path / f"{n}.pth"), None, process)
    with pytest.raises(UserError, match="--weights: .* has its own"):
        evaluate.load_run(str(tmp_path / "part.pth"), "random", process)


def test_the_hub_is_asked_for_the_file(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    asked = []
    monkeypatch.setattr("toolbox.released.fetch", lambda repo, name, else_: asked.append((repo, name)) or str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match="hf:thuteam/DETRIS/base/refcoco.pth is neither"):
        evaluate.load_run("hf:thuteam/DETRIS/base/refcoco.pth", None, common.start(device="cpu"))
    assert asked == [("thuteam/DETRIS", "base/refcoco.pth")]


def test_without_a_network_one_sentence_says_how_to_fetch_it(monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(UserError, match="hf download thuteam/DETRIS a.pth. Without one, --ckpt takes the file itself"):
        evaluate.load_run("hf:thuteam/DETRIS/a.pth", None, common.start(device="cpu"))


@pytest.mark.parametrize("path, dataset, trained", [
    ("base/refcoco.pth", None, "refcoco"), ("refcocog_u/best_model.pth", None, "refcocog_umd"), ("a.pth", None, "refcoco"),
    ("a.pth", "refcocog_umd", "refcocog_umd"), ("refcocog_g/best_model.pth", None, "refcocog_google"),
    ("refcocog_g/best_model.pth", "refcoco", "refcoco"), ("refcoco+.pth", "refcocog_umd", "refcocog_umd"),
    ("large_mix.pth", None, "mixed"), ("large_mix.pth", "refcocog_umd", "mixed"), ("gref_umd.pth", None, "refcocog_umd"),
    ("refcoco+_best.pth", None, "refcoco+"), ("Google Drive/refcoco/a.pth", None, "refcoco"),
    ("Google Drive/a.pth", "refcoco", "refcoco"), ("Google Drive/a.pth", None, "refcoco"), ("mixer/a.pth", None, "refcoco"),
    ("refcocog/refcoco/best/a.pth", None, "refcoco"), ("umd-plus/a.pth", None, "refcoco")])
def test_what_a_released_file_was_trained_on(path, dataset, trained, tmp_path, monkeypatch):
    """What the user says, or else whole words in the names of the file and of its own folder."""
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"a": torch.zeros(3)}, tmp_path / path)
    found = []
    for name in "from_detris", "from_etris":
        monkeypatch.setattr(f"toolbox.released.{name}", lambda state, name: found.append(name))
    monkeypatch.chdir((tmp_path / path).parent)  # the folder counts where it is not spelt out too
    for file in str(tmp_path / path), Path(path).name:
        with pytest.raises(UserError, match="is neither"):
            evaluate.load_run(file, None, common.start(device="cpu"), dataset)
    assert found == [trained] * 4


def test_what_is_no_checkpoint_at_all(tmp_path):
    for content, message in [("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
                             ("\n<!DOCTYPE html><title>Download</title>", "is a web page")]:
        (tmp_path / "a.pth").write_text(content)
        with pytest.raises(UserError, match=message):
            evaluate.main(["--ckpt", str(tmp_path / "a.pth")])


@pytest.mark.parametrize("size", [(60, 81), (500, 333), (448, 448), (1, 50)])
def test_pictures_are_brought_to_the_canvas_as_the_released_code_does(size):
    """Cubic interpolation (a = -0.75) written out, at places without a shift by half a pixel, mean colour outside."""
    image = np.random.default_rng(0).integers(0, 255, (*size, 3)).astype(np.uint8)
    pre = common.Preprocess(112, "warp", "bicubic", *dcris.CLIP)
    got = data.normalise(data.to_canvas(image, pre)[None], pre)[0]
    mean, std = (np.array(v) for v in dcris.CLIP)
    scale = min(112 / n for n in size)

    def weight(t):
        t, a = abs(t), -0.75
        return (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    assert got.isfinite().all()
    for y, x in [(0, 0), (56, 56), (111, 111), (20, 90), (1, 3)]:
        at = [round((v - (112 - n * scale) / 2) / scale * 32) / 32 for v, n in ((y, size[0]), (x, size[1]))]
        total = np.zeros(3)
        for j in range(int(np.floor(at[0])) - 1, int(np.floor(at[0])) + 3):
            for i in range(int(np.floor(at[1])) - 1, int(np.floor(at[1])) + 3):
                inside = 0 <= j < size[0] and 0 <= i < size[1]
                total += weight(at[0] - j) * weight(at[1] - i) * (image[j, i] if inside else 255 * mean)
        expected = (np.clip(np.round(total), 0, 255) / 255 - mean) / std
        assert np.abs(got[:, y, x].numpy() - expected).max() < 1.1 / 255 / std.min(), (y, x)
