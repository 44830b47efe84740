"""python -m pytest tests/test_m2ist.py"""

import argparse
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel, DetrConfig, DetrModel, ResNetConfig

import common
import m2ist
from common import UserError, count, fingerprint, trained_state
from tests.test_common import two_steps
from toolbox import runs
from toolbox import weights as released
from toolbox.costs import saved_bytes
from toolbox.tokenizers import SEP

SENTENCES = ["the small red circle on the left", "square"]
SIDES = "paper", "public", "added"


def on_meta(**flags):
    with torch.device("meta"):
        return m2ist.M2IST(m2ist.config(**flags))


def tiny(seed=0, **flags):
    torch.manual_seed(seed)
    return m2ist.M2IST(m2ist.config("tiny", **flags))


def inputs(model, n=2, seed=0):
    """Pictures with padding at the right and below, tokens, boxes."""
    g, s = torch.Generator().manual_seed(seed), model.preprocess.size
    images = torch.randn(n, 4, s, s, generator=g)
    images[:, 3] = 0
    for k in range(n):
        cut = s - s // 8 * (1 + k % 2)
        images[k, :, :, cut:], images[k, 3, :, cut:] = 0, 1
    boxes = torch.rand(n, 4, generator=g) * 0.4 + 0.3
    return images, model.tokenize((SENTENCES * n)[:n]), boxes


# sizes


def test_sizes_of_the_paper():
    model = on_meta()
    assert {k: count(v) for k, v in model.parts().items()} == dict(backbone=140_761_536, adapter=2_962_944,
                                                                  head=8_393_732)
    assert count(model, trainable=True) == 2_962_944 + 8_393_732
    assert [count(m) for m in (model.detr.body, model.detr.input_proj, model.detr.layers)] == [23_454_912, 524_544,
                                                                                               7_890_432]
    assert count(model.bert) == 109_482_240 - 590_592  # without the pooler
    iea = [count(isa.mha) for isa in model.m3isa]
    assert iea == [230_400] * 6 and sum(iea) == 1_382_400
    for branch, size in ("vision", 395_520), ("text", 1_185_024):
        assert sum(count([isa.ffn.down[branch], isa.ffn.up[branch]]) for isa in model.m3isa) == size
    assert [count(m) for m in (model.vl_position, model.reg, model.visu_proj, model.text_proj, model.vl_encoder,
                               model.head)] == [107_776, 256, 65_792, 196_864, 7_890_432, 132_612]
    assert count(on_meta(dataset="refcocog_umd").parts()["head"]) == 8_393_732 + 5_120  # 20 more positions
    assert sum(b.numel() for n, b in model.detr.body.named_buffers()) == 106_240
    assert {count(on_meta(side=side).m3isa) for side in SIDES} == {2_962_944} and m2ist.config().side == "paper"


def test_full_tuning_is_transvgs():
    model = on_meta(tune="full")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n for n, _ in model.named_parameters()} - trained
    assert sum(model.get_parameter(n).numel() for n in trained if n.startswith(("detr", "bert"))) == 140_539_136
    assert {n.split(".")[2] for n in frozen} == {"conv1", "layer1"}


def test_recipes_follow_the_data_set():
    assert [(c.epochs, c.milestones, c.words) for c in (m2ist.config(dataset=d) for d in (
        "refcoco", "refcoco+", "refcocog_umd", "refcocog_google", "refclef"))] == [
        (90, (60,), 20), (180, (120,), 20), (90, (60,), 40), (90, (60,), 40), (90, (60,), 20)]
    c = m2ist.config(dataset="refcoco+", epochs=3)
    assert (c.epochs, c.lr, c.adapter_lr * c.lr, c.weight_decay, c.batch_size) == (3, 1e-4, pytest.approx(1e-5), 1e-4, 64)


@pytest.mark.parametrize("flags, name", [
    (dict(image_size=600), "image-size"), (dict(text_layers=(6, 7)), "text-layers"), (dict(vision_layers=(3, 1)), "vision"),
    (dict(vision_layers=(6,), text_layers=(6,)), "vision"), (dict(interaction_dim=257), "interaction-dim"),
    (dict(vl_heads=3), "vl-heads"), (dict(words=2), "words"), (dict(tune="frozen", mha_adapter="iea"), "tune"),
    (dict(insertion="inside"), "insertion"), (dict(ffn_adapter="lora"), "ffn-adapter"), (dict(side="none"), "side"),
    (dict(box_loss="l2"), "box-loss")])
def test_settings_that_cannot_be(flags, name):
    with pytest.raises(UserError, match=name):
        m2ist.config(**flags)


# encoders


def test_bert_is_transformers_own():
    model = tiny().eval()
    tokens = model.tokenize([*SENTENCES, "a b c d e f g h i j k l m n o p q r s t u v w"])
    with torch.no_grad():
        e, there = model.encode_text(tokens), tokens != 0
        other = model.bert(input_ids=tokens, attention_mask=there.long(), output_hidden_states=True)
    assert torch.allclose(e.output[there], other.last_hidden_state[there], atol=1e-6)
    assert torch.equal(e.tokens, other.hidden_states[0]) and torch.equal(e.pad, ~there)


def small_detr():
    """transformers' DETR over a ResNet-50, with random BatchNorms."""
    torch.manual_seed(0)
    detr = DetrModel(DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, decoder_layers=1,
                                backbone_config=ResNetConfig(out_features=["stage4"]))).eval()
    for name, b in detr.named_buffers():
        if "running" in name or "normalization" in name:
            b.data = torch.rand_like(b) * 0.5 + 0.5
    return detr


BERT = dict(num_hidden_layers=12, max_position_embeddings=512, hidden_size=48, num_attention_heads=4,
            intermediate_size=96)


@pytest.fixture
def published(published_files, monkeypatch):
    """Files that m2ist reads with its BERT made narrow, which leaves names, layers and vocabulary."""
    monkeypatch.setitem(m2ist.BACKBONES, "detr-resnet-50", m2ist.BACKBONES["detr-resnet-50"] | dict(bert=BERT))
    return published_files


@pytest.fixture(scope="module")
def published_files(tmp_path_factory):
    """(folder of files in the published layouts, their DETR, their BERT)"""
    folder, detr = tmp_path_factory.mktemp("published"), small_detr()
    torch.manual_seed(1)
    bert = BertModel(BertConfig(**BERT))
    state = {f"model.{k}": v.contiguous() for k, v in detr.state_dict().items()}
    state |= {"class_labels_classifier.weight": torch.zeros(92, 256), "bbox_predictor.layers.0.weight": torch.zeros(4, 4)}
    save_file(state, folder / "hf.safetensors")
    renames = [(r"^model\.backbone\.(conv_encoder\.)?model\.", "backbone.0.body."), (r"^model\.", ""),
               (r"body\.embedder\.embedder\.convolution", "body.conv1"),
               (r"body\.embedder\.embedder\.normalization", "body.bn1"),
               (r"encoder\.stages\.(\d)\.layers", lambda m: f"layer{int(m[1]) + 1}"),
               (r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}"),
               (r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}"),
               (r"shortcut\.convolution", "downsample.0"), (r"shortcut\.normalization", "downsample.1"),
               (r"^(encoder|decoder)\.", r"transformer.\1."), (r"\.o_proj", ".out_proj"), (r"(mlp\.)?fc", "linear"),
               (r"self_attn_layer_norm", "norm1"), (r"final_layer_norm", "norm2"), (r"input_projection", "input_proj"),
               (r"query_position_embeddings", "query_embed"), ("class_labels_classifier", "class_embed"),
               ("bbox_predictor", "bbox_embed")]
    own, timm = {}, {}
    for k, v in state.items():
        name = k
        for a, b in renames:
            name = re.sub(a, b, name)
        own[name] = v
        # as the hub has it: transformers' names, timm's ResNet
        timm["model.backbone.conv_encoder.model." + name.split("body.")[1] if "body." in name else
             k.replace(".o_proj", ".out_proj").replace("mlp.fc", "fc")] = v
    for k in [k for k in own if ".encoder." in k and ".q_proj." in k]:
        own[k.replace("q_proj.", "in_proj_")] = torch.cat([own.pop(k.replace("q_proj", f"{x}_proj")) for x in "qkv"])
    torch.save(dict(model=own, epoch=299, args=argparse.Namespace(lr=1e-4)), folder / "detr-r50-unc.pth")
    save_file(timm, folder / "timm.safetensors")
    assert "transformer.encoder.layers.5.self_attn.in_proj_weight" in own and "backbone.0.body.layer4.2.bn3.running_var" in own
    (folder / "bert").mkdir()
    names = [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]
    state = {"cls.predictions.bias": torch.zeros(30522), "cls.seq_relationship.bias": torch.zeros(2)}
    for k, v in bert.state_dict().items():
        for a, b in names:
            k = k.replace(a, b)
        state[f"bert.{k}"] = v.contiguous()
    save_file(state, folder / "bert" / "model.safetensors")
    words = ["[PAD]", *(f"[unused{k}]" for k in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "circle",
             "left", "##most", "!", "caf", "##e", "café"]
    (folder / "bert" / "vocab.txt").write_text("\n".join(words + [f"w{k}" for k in range(30522 - len(words))]) + "\n")
    return folder, detr, bert


def weights_of(folder, detr="detr-r50-unc.pth"):
    return f"{folder / detr},{folder / 'bert' / 'model.safetensors'}"


@pytest.mark.parametrize("file", ["detr-r50-unc.pth", "hf.safetensors", "timm.safetensors"])
def test_published_files_load_whole_and_compute_the_same(published, file):
    folder, detr, bert = published
    model = runs.build(m2ist, m2ist.config(), weights_of(folder, file), 0).eval()
    images = torch.randn(2, 4, 128, 160)
    images[:, 3] = 0
    images[1, 3, :, 96:] = 1
    images[1, :3, :, 96:] = 0
    with torch.no_grad():
        e = model.encode_image(images)
        other = detr(images[:, :3], pixel_mask=(images[:, 3] < 0.5).long())
    assert torch.allclose(e.output[~e.pad], other.encoder_last_hidden_state[~e.pad], atol=1e-4)
    state = bert.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.bert.state_dict().items() if k != "vocabulary")
    random = m2ist.M2IST(m2ist.config()).state_dict()
    same = {k for k, v in model.state_dict().items() if k.startswith(("detr.", "bert.")) and torch.equal(v, random[k])}
    assert same <= {k for k in same if "bias" in k or "LayerNorm" in k or "norm" in k}  # which start at 0 or 1 everywhere


def test_wordpieces(published):
    folder, _, _ = published
    model = m2ist.M2IST(m2ist.config(words=8), weights_of(folder))
    words = model.tokenize(["The RED circle, leftmost!", "Café zzz", "red " * 20]).tolist()
    assert words == [[101, 104, 105, 106, 100, 107, 108, 102],
                     [101, 110, 111, 100, 102, 0, 0, 0], [101, *[105] * 6, 102]]
    assert fingerprint(model) != fingerprint(m2ist.M2IST(m2ist.config(words=8), "random"))
    # trained towers take the vocabulary with them
    full = m2ist.M2IST(m2ist.config(words=8, tune="full"), weights_of(folder))
    again = m2ist.M2IST(m2ist.config(words=8, tune="full"))
    common.load_trained(again, trained_state(full), "here")
    assert again.tokenize(["The RED circle, leftmost!"]).tolist() == words[:1] and fingerprint(full) == ""


def test_files_that_do_not_fit(published, tmp_path):
    folder, detr, _ = published
    bert = folder / "bert" / "model.safetensors"
    wrong = torch.load(folder / "detr-r50-unc.pth", weights_only=False)["model"]
    lacking = {k: v for k, v in wrong.items() if "layers.3.linear1" not in k}
    torch.save(dict(model=lacking), tmp_path / "lacking.pth")
    with pytest.raises(UserError, match="2 missing: layers.3.linear1.bias"):
        m2ist.build_encoders("detr-resnet-50", f"{tmp_path / 'lacking.pth'},{bert}")
    torch.save(dict(model=wrong | {"backbone.0.body.layer5.weight": torch.zeros(1)}), tmp_path / "more.pth")
    with pytest.raises(UserError, match="1 unexpected: body.layer5.weight"):
        m2ist.build_encoders("detr-resnet-50", f"{tmp_path / 'more.pth'},{bert}")
    torch.save(dict(some=torch.zeros(3)), tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the encoder of DETR.*missing"):
        m2ist.build_encoders("detr-resnet-50", f"{tmp_path / 'other.pth'},{bert}")
    for weights in str(bert), str(folder / "detr-r50-unc.pth"):
        with pytest.raises(UserError, match="two files are needed"):
            m2ist.build_encoders("detr-resnet-50", weights)
    (tmp_path / "model.safetensors").write_bytes(bert.read_bytes())
    for text, said in (None, "vocab.txt beside its weights, cannot be read"), ("a\nb\n", "is not the vocabulary"):
        if text:
            (tmp_path / "vocab.txt").write_text(text)
        with pytest.raises(UserError, match=said):
            m2ist.build_encoders("detr-resnet-50", f"{folder / 'detr-r50-unc.pth'},{tmp_path / 'model.safetensors'}")
    with pytest.raises(UserError, match="tiny has no released weights"):
        m2ist.build_encoders("tiny", "pretrained")


def test_weights_that_have_seen_the_answers(tmp_path, monkeypatch):
    def leak(weights, dataset):
        return released.leak("m2ist", weights, dataset)

    for name in "detr-r50-unc.pth", "detr-r50-gref.pth", "detr-r50-e632da11.pth":
        (tmp_path / name).write_bytes(b"x")
    said = {(name, d): bool(leak(f"{tmp_path / name},bert.safetensors", d)) for name in (
        "detr-r50-unc.pth", "detr-r50-gref.pth", "detr-r50-e632da11.pth") for d in ("refcoco+", "refcocog_umd", "refclef")}
    assert {k for k, v in said.items() if not v} == {
        ("detr-r50-unc.pth", "refcoco+"), ("detr-r50-gref.pth", "refcocog_umd"), ("detr-r50-unc.pth", "refclef"),
        ("detr-r50-gref.pth", "refclef"), ("detr-r50-e632da11.pth", "refclef")}
    assert leak("pretrained", "refcoco") and not leak("random", "refcoco")
    assert not leak("pretrained", "shapes")
    assert not leak("/gone/detr-r50-unc.pth,/gone/bert/model.safetensors", "refcoco")  # judged by its name
    assert leak("/gone/detr.pth,/gone/bert/model.safetensors", "refcoco")
    monkeypatch.setattr(released, "sha256", lambda file: "e632da11" + 56 * "0")  # Facebook's file under another name
    assert leak(f"{tmp_path / 'detr-r50-unc.pth'},bert.safetensors", "refcoco")


def test_words_without_a_vocabulary():
    from toolbox.shapes import Shapes
    model = tiny()
    words = {w for split in ("train", "val") for i in range(400) for w in Shapes("shapes", split).sentences(i)[0].split()}
    ids = {w: model.tokenize([w])[0, 1].item() for w in words}
    assert len(set(ids.values())) == len(words) > 20 and min(ids.values()) > SEP  # no two share a number
    assert model.tokenize(["Red, RED"])[0, :6].tolist() == [101, ids["red"], model.tokenize([","])[0, 1], ids["red"], 102, 0]
    assert model.tokenize(["red " * 50]).shape == (1, 12) and model.tokenize(["red " * 50])[0, -1] == 102


# side networks, against a second implementation from the weights


def sublayer_outputs(model, images, tokens):
    """(raw attention and feed-forward outputs of all layers of both encoders, first tokens, outputs), by hooks"""
    seen = {b: dict(mha=[], ffn=[]) for b in ("vision", "text")}
    hooks = []
    for layer in model.detr.layers:
        hooks += [layer.self_attn.register_forward_hook(lambda m, x, y: seen["vision"]["mha"].append(y[0])),
                  layer.linear2.register_forward_hook(lambda m, x, y: seen["vision"]["ffn"].append(y))]
    for layer in model.bert.encoder.layer:
        hooks += [layer.attention.output.dense.register_forward_hook(lambda m, x, y: seen["text"]["mha"].append(y)),
                  layer.output.dense.register_forward_hook(lambda m, x, y: seen["text"]["ffn"].append(y))]
    vision, text = model.encode_image(images), model.encode_text(tokens)
    for h in hooks:
        h.remove()
    return seen, dict(vision=vision, text=text)


def randomize(model):
    for p in model.m3isa.parameters():
        p.data.uniform_(-0.5, 0.5)
    return model


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("flags", [
    {}, dict(mha_adapter="vea+lea", ffn_adapter="iea"), dict(interaction_dim=16), dict(interaction_dim=64),
    dict(mha_adapter="none", ffn_adapter="lea"), dict(ffn_adapter="vea", vision_layers=(1,), text_layers=(0,))])
def test_side_networks_are_the_docstrings_equations(flags, side):
    model = randomize(tiny(adapter_scale=0.3, side=side, **flags)).eval()
    images, tokens, _ = inputs(model)
    w = model.state_dict()
    with torch.no_grad():
        seen, encoded = sublayer_outputs(model, images, tokens)
        for branch in "vision", "text":
            e = encoded[branch]
            h, used = torch.zeros_like(e.tokens).double(), False
            layers = model.c.vision_layers if branch == "vision" else model.c.text_layers
            for n, layer in enumerate(layers):
                for place in "mha", "ffn":
                    key = f"m3isa.{n}.{place}"
                    if f"{key}.down.{branch}.weight" not in w:
                        continue
                    x, used = seen[branch][place][layer].double(), True
                    z = (x @ w[f"{key}.down.{branch}.weight"].double().T + w[f"{key}.down.{branch}.bias"]).clamp(min=0)
                    ups = [f"{key}.up.{branch}"] if f"{key}.up.{branch}.weight" in w else []
                    ups += [f"{key}.shared"] if f"{key}.shared.weight" in w else []
                    f = torch.cat([z @ w[f"{u}.weight"].double().T + w[f"{u}.bias"] for u in ups], -1)
                    assert f.shape == x.shape
                    h = h + 0.3 * f + (x if side == "paper" else 0)
            if side != "added":
                h = h + e.tokens
            if side == "paper":
                h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            want = e.output.double() + h if used else e.output.double()
            assert torch.allclose(model.side_network(e, branch).double(), want, atol=1e-5), branch
            assert used == any(f".down.{branch}." in k for k in w)


def test_the_vl_encoder_and_the_head():
    for position in "attention", "content":
        model = tiny(vl_position=position).eval()
        images, tokens, _ = inputs(model)
        w, c = model.state_dict(), model.c
        with torch.no_grad():
            vision, text = model.encode_image(images), model.encode_text(tokens)
            got = model(images, tokens)
            f_l, f_v = model.side_network(text, "text"), model.side_network(vision, "vision")
            x = torch.cat([w["reg.weight"].expand(2, 1, -1), F.linear(f_l, w["text_proj.weight"], w["text_proj.bias"]),
                           F.linear(f_v, w["visu_proj.weight"], w["visu_proj.bias"])], 1)
            pos = w["vl_position.weight"]
            x = x + pos if position == "content" else x
            pad = torch.cat([torch.zeros(2, 1, dtype=torch.bool), tokens == 0, vision.pad], 1)
            for n in range(c.vl_layers):
                p = {k.removeprefix(f"vl_encoder.{n}."): v for k, v in w.items() if k.startswith(f"vl_encoder.{n}.")}
                q, k, v = (F.linear(y, m, b) for y, m, b in zip((x + pos, x + pos, x), p["self_attn.in_proj_weight"].chunk(3),
                                                                p["self_attn.in_proj_bias"].chunk(3)))
                q, k, v = (y.unflatten(2, (c.vl_heads, -1)).transpose(1, 2) for y in (q, k, v))
                a = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(pad[:, None, None], -torch.inf).softmax(-1) @ v
                a = F.linear(a.transpose(1, 2).flatten(2), p["self_attn.out_proj.weight"], p["self_attn.out_proj.bias"])
                x = F.layer_norm(x + a, x.shape[-1:], p["norm1.weight"], p["norm1.bias"])
                m = F.linear(F.linear(x, p["linear1.weight"], p["linear1.bias"]).relu(), p["linear2.weight"], p["linear2.bias"])
                x = F.layer_norm(x + m, x.shape[-1:], p["norm2.weight"], p["norm2.bias"])
            x = x[:, 0]
            for n in 0, 2:
                x = F.linear(x, w[f"head.{n}.weight"], w[f"head.{n}.bias"]).relu()
            want = F.linear(x, w["head.4.weight"], w["head.4.bias"]).sigmoid()
        assert torch.allclose(got, want, atol=1e-5)


def test_marks_on_the_tokens_in_a_box():
    boxes = torch.tensor([[0.5, 0.25, 0.5, 0.5], [0.1, 0.9, 0.1, 0.1]])
    inside = m2ist.tokens_in_boxes(boxes, 16).view(2, 4, 4)
    assert inside[0].tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0] * 4, [0] * 4]
    assert inside[1].nonzero().tolist() == [[3, 0]]
    model = tiny().train()
    images, tokens, target = inputs(model)
    out = model(images, tokens)
    assert out.shape == (2, 4 + 64) and model.eval()(images, tokens).shape == (2, 4)
    plain = model.loss(out[:, :4], target)
    t, logits = m2ist.tokens_in_boxes(target, 64), out[:, 4:]
    bce = (logits.exp() + 1).log().mean() - (logits * t).mean()
    p = logits.sigmoid()
    dice = 1 - ((2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()
    assert model.loss(out, target).item() == pytest.approx((plain + bce + dice).item(), abs=1e-5)
    assert m2ist.config().token_loss == 0 and tiny(token_loss=0.0).train()(images, tokens).shape == (2, 4)


def test_insertions():
    images, tokens, _ = inputs(tiny())
    with torch.no_grad():
        outputs = {}
        for insertion in "side", "parallel", "sequential":
            model = randomize(tiny(insertion=insertion)).eval()
            e = model.encode_image(images)
            outputs[insertion] = e.output
            assert e.attention.shape[1] == (2 if insertion == "side" else 0)
            plain = tiny(tune="frozen").eval().encode_image(images).output
            assert torch.equal(e.output, plain) == (insertion == "side")
            # one layer by hand, with the adapters' own function
            layer, isa = model.detr.layers[0], model.m3isa[0]
            z, pos, pad = model.detr.tokens(images)
            a = layer.self_attn(z + pos, z + pos, z, key_padding_mask=pad, need_weights=False)[0]
            # Eq. 1, 4 and 5 without their x +
            mha, ffn = ((lambda x, m=m: m(x, "vision") - x) for m in (isa.mha, isa.ffn))
            a = a + {"side": 0, "parallel": mha(z), "sequential": mha(a)}[insertion]
            x = layer.norm1(z + a)
            m = layer.linear2(layer.linear1(x).relu())
            m = m + {"side": 0, "parallel": ffn(x), "sequential": ffn(m)}[insertion]
            one = model.encode(z, [layer.sublayers(pos, pad)], "vision", (0,), pad).output
            assert torch.allclose(one, layer.norm2(x + m), atol=2e-6)
        assert not torch.allclose(outputs["parallel"], outputs["sequential"], atol=1e-3)


def test_what_the_encoders_share():
    """A change of W_shared reaches both branches, one of a branch's own matrices only that branch."""
    model = randomize(tiny()).eval()
    images, tokens, _ = inputs(model)

    def both():
        with torch.no_grad():
            encoded = dict(vision=model.encode_image(images), text=model.encode_text(tokens))
            return [model.side_network(e, branch) for branch, e in encoded.items()]

    first = both()
    for name, moved in ("shared", [True, True]), ("down.vision", [True, False]), ("up.text", [False, True]):
        weight = model.m3isa[1].mha.get_parameter(f"{name}.weight")
        weight.data += 0.5
        assert [not torch.equal(a, b) for a, b in zip(first, both())] == moved, name
        weight.data -= 0.5
        first = both()
    assert all("shared" not in n or n.startswith("m3isa") for n, _ in model.named_parameters())


def test_every_way_to_tune_starts_from_the_same_head():
    models = [runs.build(m2ist, m2ist.config("tiny", tune=tune), "random", 0)
              for tune in ("method", "frozen", "full", "lora")]
    heads = [[p for m in model.parts()["head"] for p in m.parameters()] for model in models]
    assert all(torch.equal(a, b) for head in heads[1:] for a, b in zip(heads[0], head, strict=True))
    assert list(models[0].parts()) == ["backbone", "adapter", "head"]


def test_starts():
    model = tiny(side="paper", adapter_dim=64, iea_dim=64)
    for name, p in model.m3isa.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        else:  # Kaiming normal: variance 2 / fan-in
            assert p.std().item() == pytest.approx((2 / p.shape[1]) ** 0.5, rel=0.15), name


@pytest.mark.parametrize("insertion", ["side", "parallel", "sequential"])
def test_added_starts_exactly_as_frozen(insertion):
    frozen, method = (runs.build(m2ist, m2ist.config("tiny", **flags), "random", 0).train() for flags in (
        dict(tune="frozen"), dict(side="added", insertion=insertion)))
    images, tokens, boxes = inputs(frozen, 4)
    outputs = [model(images, tokens) for model in (frozen, method)]
    assert torch.equal(*outputs) and torch.equal(frozen.loss(outputs[0], boxes), method.loss(outputs[1], boxes))
    assert count(method.m3isa) == count(tiny(side="paper").m3isa) > 0


# what is trained


def owner(t):
    return t.untyped_storage().data_ptr()


@pytest.mark.parametrize("flags", [*(dict(side=side) for side in SIDES), dict(tune="frozen")])
def test_no_graph_through_the_encoders(flags):
    model = tiny(vl_dropout=0.1, **flags).train()
    assert not any(m.training for e in (model.detr, model.bert) for m in e.modules())
    images, tokens, boxes = inputs(model, 4)
    towers = {owner(t): n for e in (model.detr, model.bert) for n, t in [*e.named_parameters(), *e.named_buffers()]}
    graphs, inside, kept, hooks = set(), [], [], []  # all is held, so that no address is used twice
    ends = model.detr.layers[-1].norm2, model.bert.encoder.layer[-1].output.LayerNorm  # which the head may keep
    for m in [m for e in (model.detr, model.bert) for m in e.modules() if m not in ends]:
        hooks.append(m.register_forward_hook(lambda m, x, y: inside.extend(y if isinstance(y, tuple) else [y])))
        hooks.append(m.register_forward_hook(lambda m, x, y: graphs.add(torch.is_grad_enabled())))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = model.loss(model(images, tokens), boxes)
    for hook in hooks:
        hook.remove()
    inside = {owner(t) for t in inside if isinstance(t, torch.Tensor)}
    assert graphs == {False} and len(kept) > 20 and len(inside) > 20 and len(towers) > 80
    assert not [towers[owner(t)] for t in kept if owner(t) in towers] and not [t.shape for t in kept if owner(t) in inside]
    for e in model.encode_image(images), model.encode_text(tokens):
        assert not any(t.requires_grad for t in e)
    # and no node of the graph holds one of their parameters
    nodes, todo, leaves = set(), [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [n for n, _ in node.next_functions]
            if hasattr(node, "variable"):
                leaves.add(id(node.variable))
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[i] for i in leaves} == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.startswith(("detr.", "bert.")) for n in (names[i] for i in leaves))


@pytest.mark.parametrize("flags", [*(dict(side=side) for side in SIDES), dict(insertion="parallel"),
                                   dict(insertion="sequential"), dict(side="added", insertion="sequential"),
                                   dict(mha_adapter="vea", ffn_adapter="iea")])
def test_only_adapters_and_head_learn(flags):
    model = tiny(**flags).train()
    before, frozen = two_steps(model, *inputs(model, 4))
    for name, p in model.named_parameters():
        assert p.requires_grad == (not name.startswith(("detr.", "bert."))), name
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name
    assert fingerprint(model) == frozen != ""
    after, trained = model.state_dict(), trained_state(model)
    still = {k for k in before if k.startswith(("detr.", "bert."))}
    assert any("running_var" in k for k in still) and all(torch.equal(before[k], after[k]) for k in still)
    assert trained.keys() == before.keys() - still and not {k for k in trained if torch.equal(before[k], after[k])}


def test_full_tuning_reaches_every_parameter_and_is_saved_whole():
    model = tiny(tune="full").train()
    images, tokens, boxes = inputs(model)
    model.loss(model(images, tokens), boxes).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None] and fingerprint(model) == ""
    assert all(m.training for e in (model.detr, model.bert) for m in e.modules())
    assert trained_state(model).keys() == model.state_dict().keys()  # BatchNorms and vocabulary too
    assert on_meta(tune="frozen").features_key and not on_meta(insertion="parallel").features_key


def test_bytes_saved_for_backward_at_full_size():
    """The paper's point, at 640 x 640 and 20 tokens: MB of 10^6 bytes per image, in dropout as in training."""
    torch.manual_seed(0)
    model = m2ist.M2IST(m2ist.config())
    example = inputs(model, 1)
    sizes = {}
    for name in "side", "parallel", "sequential", "frozen", "full":
        model.c = dataclasses.replace(model.c, insertion=name if name in ("parallel", "sequential") else "side",
                                      tune=name if name in ("frozen", "full") else "method")
        model.encoders_need_grad = name not in ("side", "frozen")
        if name in ("frozen", "full"):
            model.m3isa = nn.ModuleList()
        if name == "full":
            for encoder in model.detr, model.bert:
                encoder.requires_grad_(True)
            for part in m2ist.BACKBONES["detr-resnet-50"]["frozen"]:
                getattr(model.detr.body, part).requires_grad_(False)
        sizes[name] = saved_bytes(model.train(), *example) / 1e6
    assert sizes["side"] < 0.2 * sizes["full"] and sizes["frozen"] < sizes["side"] <= sizes["frozen"] + 12
    assert sizes["side"] < sizes["parallel"] <= sizes["sequential"] < sizes["full"], sizes


# what a box depends on


def test_a_batch_is_its_samples_and_padding_does_not_matter():
    model = randomize(tiny()).eval()
    images, tokens, _ = inputs(model, 2)
    with torch.no_grad():
        both = model(images, tokens)
        one = torch.cat([model(images[k:k + 1], tokens[k:k + 1]) for k in (0, 1)])
        assert torch.allclose(both, one, atol=1e-5)
        # tokens of the picture's padding: positions count what is there, and nobody attends to the rest
        pad = images[:, 3, ::8, ::8].flatten(1) > 0.5
        e = model.encode_image(images)
        assert torch.equal(e.pad, pad) and pad.any()
        noise = e._replace(tokens=torch.where(pad[..., None], torch.randn_like(e.tokens), e.tokens),
                           output=torch.where(pad[..., None], torch.randn_like(e.output), e.output))
        assert torch.allclose(model(noise, tokens), both, atol=1e-5)
        assert not torch.allclose(model(images, tokens.flip(0)), both, atol=1e-4)
        # features in the place of pictures, once for several sentences
        assert torch.equal(model(model.image_features(images), tokens), both)
        three = model.tokenize(["red", "left circle", "the blue one"])
        repeated = model(model.image_features(images[:1]).repeat(3), three)
        assert torch.allclose(repeated, model(images[:1].expand(3, -1, -1, -1), three), atol=1e-5)


def test_sine_positions_by_hand():
    pad = torch.zeros(1, 4, 6, dtype=torch.bool)
    pad[:, :, 4:], pad[:, 3:] = True, True  # 3 rows and 4 columns are there
    got = m2ist.sine_positions(pad, 8).view(4, 6, 8)
    y, x = 2 * torch.pi * 2 / 3, 2 * torch.pi * 3 / 4  # the second row, the third column
    want = [f(v / 1e4 ** (i * 2 / 4)) for v in (y, x) for i in (0, 1) for f in (lambda t: torch.sin(torch.tensor(t)),
                                                                               lambda t: torch.cos(torch.tensor(t)))]
    assert torch.allclose(got[1, 2], torch.tensor([float(v) for v in want]), atol=1e-5)


def test_the_loss_by_hand():
    model = tiny()
    boxes, target = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.2, 0.2]]), torch.tensor([[0.6, 0.5, 0.4, 0.4],
                                                                                             [0.7, 0.7, 0.2, 0.2]])
    # IoU 3/5 in a hull without rest; no overlap, the hull 0.7 x 0.7 with 0.08 of it covered
    giou = [1 - 0.12 / 0.20, 1 - (0 - (0.49 - 0.08) / 0.49)]
    distances = {"l1": (0.1 + 1.0) / 2, "smooth-l1": 0.5 * (0.1 ** 2 + 2 * 0.5 ** 2) / 2}
    for box_loss, distance in distances.items():
        for weight in 1.0, 2.0:
            loss = tiny(box_loss=box_loss, giou=weight).loss(boxes, target).item()
            assert loss == pytest.approx(distance + weight * sum(giou) / 2, abs=1e-5)
    assert m2ist.config().box_loss == "l1" and m2ist.config().giou == 1  # as the public code, see the module docstring
    half = [model.loss(boxes[k:k + 1], target[k:k + 1]).item() for k in (0, 1)]
    assert sum(half) / 2 == pytest.approx(model.loss(boxes, target).item(), abs=1e-6)  # accumulation is the same batch
    none = model.loss(torch.zeros(1, 4), target[:1])
    assert torch.isfinite(none)
