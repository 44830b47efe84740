"""python -m pytest tests/test_looks.py

What a model looks at, and the page of --serve.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import evaluate
from common import UserError
from toolbox import attention, draw, serve
from tests.test_commands import few_pictures  # noqa: F401
from tests.test_report import runs  # noqa: F401
from tests.test_tables import MODULES, SENTENCES


def look(name, backbone="tiny", **flags):
    """(model, its answer to two sentences, the same with maps asked for, the maps)"""
    torch.manual_seed(0)
    model = MODULES[name].Model(MODULES[name].config(backbone, tune="method", **flags)).eval()
    images = torch.randn(2, 4 if name == "m2ist" else 3, model.preprocess.size, model.preprocess.size)
    if name == "m2ist":
        images[:, 3] = 0
        images[:, 3, :8] = 1  # padding above
    tokens = model.tokenize(SENTENCES)
    with torch.no_grad():
        plain, maps = model(images, tokens), attention.attention_maps(model, images, tokens)
        return model, plain, model(images, tokens), maps


LEVELS, TOKEN = ["level 1", "level 2", "level 3"], "attention of the sentence's first token"
BRIDGED = {f"features, {level}": ["without Bridgers", "with Bridgers"] for level in LEVELS}
ADDED, PROBABILITY = {"what an adapter adds": ["block 2", "block 4"]}, ["of the model", "without text adapters"]


@pytest.mark.parametrize("name, flags, names", [
    ("dcris", {}, ADDED | dict(probability=[*PROBABILITY, "without DenseCross adapters"])),
    ("dcris", dict(visual_layers=()), dict(probability=PROBABILITY)),
    ("etris", {}, BRIDGED), ("m2ist", {}, {"attention of [REG]": ["V-L layer 1", "V-L layer 2"]}),
    ("shared_ris", {}, {TOKEN: ["encoder", "FPN", "decoder"]}),
    ("shared_ris", dict(fpn_fusion="cross", decoder_fusion="bi"), {TOKEN: ["encoder"]}),
    ("shared_ris", dict(stages=(), shared_layers=0), {TOKEN: ["encoder"]})])
def test_asking_does_not_change_the_answer(name, flags, names):
    model, plain, asked, groups = look(name, **flags)
    assert torch.equal(plain, asked) and {k: list(maps) for k, maps in groups.items()} == names
    for m in (m for maps in groups.values() for m in maps.values()):
        assert m.dim() == 3 and len(m) == 2 and m.shape[1] == m.shape[2] and m.isfinite().all() and (m >= 0).all()
        assert m.std() > 0
    assert not torch.equal(*list(next(iter(groups.values())).values())[0])  # two sentences, two pictures
    assert not any(m._forward_hooks for m in model.modules())


def test_attention_is_what_the_model_computes():
    """[REG]'s by its weights' sums; of BEiT-3's by the values that it mixes."""
    model, _, _, maps = look("m2ist")
    layer, given = model.vl_encoder[1], []
    layer.register_forward_pre_hook(lambda m, args: given.append(args))
    with torch.no_grad():
        again = attention.attention_maps(model, torch.zeros(2, 4, 64, 64), model.tokenize(SENTENCES))["attention of [REG]"]
        x, pos, pad = given[0]
        w, b = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
        q, k = ((x + pos) @ w[s].T + b[s] for s in (slice(64), slice(64, 128)))
        weights = []
        for head in slice(32), slice(32, 64):  # of [REG], the first
            scores = (k[..., head] @ q[:, 0, head, None])[..., 0] / 32**0.5
            weights.append(scores.masked_fill(pad, -torch.inf).softmax(1))
    expected = (weights[0] + weights[1]) / 2
    assert torch.allclose(again["V-L layer 2"].flatten(1), expected[:, 13:], atol=1e-6)  # behind [REG] and 12 words
    for m in maps["attention of [REG]"].values():
        assert (m.flatten(1).sum(1) < 1).all() and (m[:, :1] == 0).all()  # words have a share, padding has none
    model = look("shared_ris")[0]
    images, tokens = torch.randn(2, 3, 64, 64), model.tokenize(["a small red circle", "square"])
    layer = model.beit3.layers[-1].self_attn
    with torch.no_grad():
        seen = attention.attention_maps(model, images, tokens)[TOKEN]["encoder"].flatten(1)
        got = []
        layer.register_forward_hook(lambda m, args, out: got.append(out[1][:, 0]))  # of the first token
        # values of 1 for one place and 0 for the others: what the attention gives is this place's weight
        for part in layer.v_proj.A, layer.v_proj.B:
            part.weight.zero_()
            part.bias.zero_()
        for m in layer.inner_attn_ln.A, layer.inner_attn_ln.B, layer.out_proj.A, layer.out_proj.B:
            m.forward = lambda x: x
        for place in 0, 9, 63:
            layer.v_proj.A.forward = lambda v, place=place: (torch.arange(65) == place + 1).float()[
                None, :, None].expand(2, 65, 64)
            model(images, tokens)
            heads = got[-1].unflatten(1, (layer.heads, -1))[:, :, 0].mean(1)
            assert torch.allclose(seen[:, place], heads, atol=1e-6)


def test_figure_7_has_a_mean_over_the_fpn_and_the_last_layer_of_the_decoder():
    torch.manual_seed(0)
    model = MODULES["shared_ris"].Model(MODULES["shared_ris"].config("tiny", shared_layers=2)).eval()
    images, tokens, given = torch.randn(2, 3, 64, 64), model.tokenize(SENTENCES), []
    fusions = [*model.fpn.fusion, *(layer.fusion for layer in model.decoder.layers)]
    for fusion in fusions:
        fusion.register_forward_pre_hook(lambda fusion, args: given.append((fusion, *args)))
    maps = attention.attention_maps(model, images, tokens)[TOKEN]
    expected = []
    with torch.no_grad():
        for fusion, x, n, pad in given:
            y = fusion.norm(x)
            weights = torch.nn.MultiheadAttention.forward(
                fusion.attention, y, y, y, key_padding_mask=pad, average_attn_weights=False)[1].mean(1)
            expected.append(weights[:, n, 1:n].unflatten(1, (8, 8)))  # the first word's row, without [CLS]
    assert [fusion for fusion, *_ in given] == fusions and len(model.fpn.fusion) == 4
    assert torch.allclose(maps["FPN"], torch.stack(expected[:4]).mean(0), atol=1e-6)
    assert torch.allclose(maps["decoder"], expected[-1], atol=1e-6)
    assert not torch.allclose(expected[-1], expected[-2], atol=1e-6)


def test_figure_4_without_adapters_is_a_model_without_them():
    model, plain, _, _ = look("dcris")
    images, tokens = torch.randn(2, 3, model.preprocess.size, model.preprocess.size), model.tokenize(SENTENCES)
    with torch.no_grad():
        for p in [p for adapters in (model.visual_adapters, model.text_adapters) for a in adapters.values()
                  for p in a.up.parameters()]:
            p.normal_(generator=torch.Generator().manual_seed(len(p)))  # which begins with zeros
        maps = attention.attention_maps(model, images, tokens)["probability"]
        assert torch.equal(maps["of the model"], model(images, tokens)[:, 0].sigmoid())
        for name, adapters in ("without text adapters", model.text_adapters), (
                "without DenseCross adapters", model.visual_adapters):
            kept = dict(adapters)
            for i in kept:
                del adapters[i]
            assert torch.equal(maps[name], model(images, tokens)[:, 0].sigmoid())
            assert not torch.equal(maps[name], maps["of the model"])
            adapters.update(kept)


def test_which_letterbox_a_protocol_has():
    for name, fits in ("dcris", ("letterbox", "warp")), ("m2ist", ("letterbox",) * 2), ("shared_ris", ("stretch",) * 2):
        pre = look(name)[0].preprocess
        assert tuple(evaluate.with_protocol(pre, p).fit for p in ("default", "released")) == fits
        assert evaluate.with_protocol(evaluate.with_protocol(pre, "released"), "default") == pre


def test_features_without_bridgers_are_those_of_frozen_towers():
    model, _, _, maps = look("etris")
    images = torch.randn(2, 3, model.preprocess.size, model.preprocess.size)
    with torch.no_grad():
        maps = attention.attention_maps(model, images, model.tokenize(SENTENCES))
        model.bridgers = torch.nn.ModuleDict()
        levels = model.encode(images, model.tokenize(SENTENCES[::-1]))[0]
    for n, level in enumerate(levels, 1):  # whatever the sentence
        pair = maps[f"features, level {n}"]
        assert torch.allclose(pair["without Bridgers"], level.norm(dim=1), atol=1e-5)
        assert not torch.allclose(pair["with Bridgers"], level.norm(dim=1), atol=1e-3)


@pytest.fixture(autouse=True)
def photographs(runs):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 161, 3)).astype(np.uint8)).save(runs / "a.png")
    (runs / "broken.jpg").write_bytes((runs / "a.png").read_bytes()[:3000])


@pytest.mark.parametrize("method", ["dcris", "m2ist"])
def test_a_sheet_of_maps(runs, tmp_path, method, capsys):
    words = ["--ckpt", str(runs / method), "--image", str(runs / "a.png"), "--out", str(tmp_path / "b.png")]
    evaluate.main([*words, "--text", "left", "--attention", str(tmp_path / "c.png")])
    sheet, one = Image.open(tmp_path / "c.png"), 322  # the answer, and below it a row at least; dcris has no adapters here
    assert sheet.width >= (2 if method == "m2ist" else 1) * one and sheet.height > one
    evaluate.main([*words[:4], "--out", str(tmp_path / "d.png"), "--text", "left"])
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "d.png").read_bytes()
    for flags, message in [(["--attention", "c.png"], "--attention does not go with"),
                           (["--serve", "--draw", "a.png"], "--draw does not go with"),
                           (["--port", "3"], "--port does not go with"),
                           (["--serve", "--port", "99999"], "1 to 65535"), (["--image", "a", "--text", "b", "--text", "c",
                                                                            "--attention", "d.png"], "one --text")]:
        with pytest.raises(UserError, match=message):
            evaluate.main(["--ckpt", str(runs / method), *flags])
    with pytest.raises(UserError, match="--attention look.txt: a name that ends in"):
        evaluate.main([*words, "--text", "left", "--attention", "look.txt"])


def test_maps_of_a_group_have_one_scale():
    image, values = np.full((40, 50, 3), 100, dtype=np.uint8), np.zeros((40, 50))
    values[10:20, 30:40] = 7
    groups = dict(one={"high": values, "low": values / 7, "none": 0 * values}, two={"alone": values / 7})
    sheet = attention.heat_sheet(image, groups, np.zeros((40, 50), dtype=bool), "s")
    height, row = 280, sheet.height // 3  # a picture is drawn seven times as large, captions below
    high, low, none = (np.asarray(sheet)[row:row + height, x:x + 350].astype(int).sum(2) for x in (0, 350, 700))
    alone = np.asarray(sheet)[2 * row:2 * row + height, :350].astype(int).sum(2)
    y, x = np.argwhere(high == high.max()).mean(0) / 7
    assert sheet.width == 1050 and 10 < y < 20 and 30 < x < 40
    dark = none[5, 5]
    assert (none == dark).all() and (low[75:135, 215:275] - dark < 0.3 * (high[75:135, 215:275] - dark)).all()
    assert np.array_equal(alone, high)


def test_attention_writes_no_other_pictures(runs, tmp_path, monkeypatch, capsys):
    """Where one file was named, the current folder gets none that was not."""
    monkeypatch.chdir(tmp_path)
    words = ["--ckpt", str(runs / "dcris"), "--image", str(runs / "a.png"), "--text", "left", "--threshold", "0.01"]
    evaluate.main([*words, "--attention", "there/look.png", "--json", "a.json"])
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["overlay"] is None and found["mask"] is None and found["area"] > 0
    evaluate.main([*words, "--mask", "there/mask.png", "--json", "-"])
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")} == {"a.json", "there/look.png", "there/mask.png"}
    evaluate.main(words)  # none was named
    assert {p.name for p in tmp_path.glob("*.png")} == {"a_dcris.png", "a_dcris_mask.png"}
    assert "Drawn: there/look.png" in capsys.readouterr().out
    with pytest.raises(UserError, match="--mask a.jpg: a name that ends in .png is needed"):
        evaluate.main([*words, "--mask", "a.jpg"])


# Captions


def test_a_caption_has_a_font_with_its_letters(monkeypatch, capsys):
    if len(draw.fonts(14)) == 1:
        pytest.skip("this system has none of the fonts")
    own = draw.fonts(14)[0]
    greek = draw.font_for("a café, Ελλάδα", 14)
    assert greek != own and draw.has_letter(greek, "Ε") and not draw.has_letter(own, "Ε") and draw.font_for("dog", 14) == own
    assert capsys.readouterr().err == ""


def test_a_caption_without_a_font_is_noted_once(monkeypatch, capsys):
    monkeypatch.setattr(draw, "FONTS", ("no such font.ttf",))
    for cached in draw.fonts, draw.note_missing_letters:
        cached.cache_clear()
    image = np.zeros((30, 40, 3), dtype=np.uint8)
    for sentence in "左边的狗", "红色的圆" * 30:
        picture = draw.overlay(image, [None], [sentence])
    assert picture.height > 400 and capsys.readouterr().err.count("fonts-noto-cjk") == 1
    draw.fonts.cache_clear()


def test_words_are_broken_in_linear_time():
    font = draw.ImageFont.load_default(14)
    took = {}
    for n in 2000, 40_000:
        begin = time.perf_counter()
        lines = draw.wrapped("the " + "x" * n + " dog", font, 464)
        took[n] = time.perf_counter() - begin
        assert "".join(lines).replace(" ", "") == "the" + "x" * n + "dog" and all(font.getlength(t) <= 470 for t in lines)
    assert took[2000] < 0.5 and took[40_000] < 100 * took[2000]
    assert draw.wrapped("a dog and a cat", font, 50) == ["a dog", "and a", "cat"] and draw.wrapped("", font, 50) == [""]


def test_without_gradio_a_sentence_says_so(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    args = evaluate.parse(["--ckpt", str(runs / "dcris"), "--serve"])
    with pytest.raises(UserError, match='pip install "gradio>=6"'):
        serve.serve(args, common.start(device="cpu"))


@pytest.mark.parametrize("method", ["dcris", "m2ist"])
def test_the_page_answers(runs, monkeypatch, capsys, method):
    gradio, found = pytest.importorskip("gradio"), []

    def blocks(page):
        """In the place of a browser."""
        answer = page.fns[0].fn
        overlay, said, files = answer(str(runs / "a.png"), "left <b>\n\nright\n", 0.01)
        assert Image.open(overlay).size[0] == 483 and said.count("\n") == 1 and "left <b>" in said
        assert len(files) == (3 if method == "dcris" else 1) and all(Path(f).is_file() for f in files)
        for photograph, text, message in [(None, "left", "are needed"), (str(runs / "a.png"), " \n", "are needed"),
                                          (str(runs / "broken.jpg"), "left", "^.broken.jpg cannot be read")]:
            with pytest.raises(gradio.Error, match=message):
                answer(photograph, text, 0.5)
        found.append(Path(overlay).parents[1])

    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **flags: found.append(flags) or setattr(
        page, "local_url", "http://127.0.0.1:1/"))
    monkeypatch.setattr(gradio.Blocks, "block_thread", blocks)
    evaluate.main(["--ckpt", str(runs / method), "--serve", "--port", "7999"])
    assert found[0]["server_name"] == "127.0.0.1" and found[0]["server_port"] == 7999 and found[0]["share"] is False
    assert "http://127.0.0.1:1/" in capsys.readouterr().err and str(found[1]) == os.environ["GRADIO_TEMP_DIR"]
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **flags: (_ for _ in ()).throw(OSError("Cannot find")))
    with pytest.raises(UserError, match="--port 7999 is in use"):
        evaluate.main(["--ckpt", str(runs / method), "--serve", "--port", "7999"])
