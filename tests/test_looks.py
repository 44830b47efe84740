"""python -m pytest tests/test_looks.py

What a model looks at, and the page of --serve.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import evaluate
from common import UserError
from toolbox import draw, serve
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
        plain, maps = model(images, tokens), draw.attention_maps(model, images, tokens)
        return model, plain, model(images, tokens), maps


@pytest.mark.parametrize("name, flags, names", [
    ("dcris", {}, ["adapter of block 2", "adapter of block 4", *(f"features, level {n}" for n in (1, 2, 3))]),
    ("etris", {}, [f"features, level {n}" for n in (1, 2, 3)] + [f"level {n} without Bridgers" for n in (1, 2, 3)]),
    ("m2ist", {}, ["[REG], V-L layer 1", "[REG], V-L layer 2"]),
    ("shared_ris", {}, ["encoder", *(f"FPN, stage {n}" for n in (1, 2, 3, 4)), "decoder"]),
    ("shared_ris", dict(fpn_fusion="cross", decoder_fusion="bi"), ["encoder"]),
    ("shared_ris", dict(stages=(), shared_layers=0), ["encoder"])])
def test_asking_does_not_change_the_answer(name, flags, names):
    model, plain, asked, maps = look(name, **flags)
    assert torch.equal(plain, asked) and list(maps) == names
    for m in maps.values():
        assert m.dim() == 3 and len(m) == 2 and m.shape[1] == m.shape[2] and m.isfinite().all() and (m >= 0).all()
        assert m.std() > 0
    assert not torch.equal(*(list(maps.values())[0]))  # two sentences, two pictures


def test_attention_is_what_the_model_computes():
    """[REG]'s by its weights' sums; of BEiT-3's by the values that it mixes."""
    model, _, _, maps = look("m2ist")
    layer, given = model.vl_encoder[1], []
    layer.register_forward_pre_hook(lambda m, args: given.append(args))
    with torch.no_grad():
        again = draw.attention_maps(model, torch.zeros(2, 4, 64, 64), model.tokenize(SENTENCES))
        x, pos, pad = given[0]
        w, b = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
        q, k = ((x + pos) @ w[s].T + b[s] for s in (slice(64), slice(64, 128)))
        weights = []
        for head in slice(32), slice(32, 64):  # of [REG], the first
            scores = (k[..., head] @ q[:, 0, head, None])[..., 0] / 32**0.5
            weights.append(scores.masked_fill(pad, -torch.inf).softmax(1))
    expected = (weights[0] + weights[1]) / 2
    assert torch.allclose(again["[REG], V-L layer 2"].flatten(1), expected[:, 13:], atol=1e-6)  # behind [REG] and 12 words
    for m in maps.values():
        assert (m.flatten(1).sum(1) < 1).all() and (m[:, :1] == 0).all()  # words have a share, padding has none
    model = look("shared_ris")[0]
    images, tokens = torch.randn(2, 3, 64, 64), model.tokenize(["a small red circle", "square"])
    attention = model.beit3.layers[-1].self_attn
    with torch.no_grad():
        seen = draw.attention_maps(model, images, tokens)["encoder"].flatten(1)
        got = []
        attention.register_forward_hook(lambda m, args, out: got.append(out[1][:, 0]))  # of the first token
        # values of 1 for one place and 0 for the others: what the attention gives is this place's weight
        for part in attention.v_proj.A, attention.v_proj.B:
            part.weight.zero_()
            part.bias.zero_()
        for m in attention.inner_attn_ln.A, attention.inner_attn_ln.B, attention.out_proj.A, attention.out_proj.B:
            m.forward = lambda x: x
        for place in 0, 9, 63:
            attention.v_proj.A.forward = lambda v, place=place: (torch.arange(65) == place + 1).float()[
                None, :, None].expand(2, 65, 64)
            model(images, tokens)
            heads = got[-1].unflatten(1, (attention.heads, -1))[:, :, 0].mean(1)
            assert torch.allclose(seen[:, place], heads, atol=1e-6)


def test_which_letterbox_a_protocol_has():
    for name, fits in ("dcris", ("letterbox", "warp")), ("m2ist", ("letterbox",) * 2), ("shared_ris", ("stretch",) * 2):
        pre = look(name)[0].preprocess
        assert tuple(evaluate.with_protocol(pre, p).fit for p in ("default", "released")) == fits
        assert evaluate.with_protocol(evaluate.with_protocol(pre, "released"), "default") == pre


def test_features_without_bridgers_are_those_of_frozen_towers():
    model, _, _, maps = look("etris")
    images = torch.randn(2, 3, model.preprocess.size, model.preprocess.size)
    with torch.no_grad():
        maps = draw.attention_maps(model, images, model.tokenize(SENTENCES))
        model.bridgers = torch.nn.ModuleDict()
        levels = model.encode(images, model.tokenize(SENTENCES[::-1]))[0]
    for n, level in enumerate(levels, 1):  # whatever the sentence
        assert torch.allclose(maps[f"level {n} without Bridgers"], level.norm(dim=1), atol=1e-5)
        assert not torch.allclose(maps[f"features, level {n}"], level.norm(dim=1), atol=1e-3)


@pytest.fixture(autouse=True)
def photographs(runs):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 161, 3)).astype(np.uint8)).save(runs / "a.png")
    (runs / "broken.jpg").write_bytes((runs / "a.png").read_bytes()[:3000])


@pytest.mark.parametrize("method", ["dcris", "m2ist"])
def test_a_sheet_of_maps(runs, tmp_path, method, capsys):
    words = ["--ckpt", str(runs / method), "--image", str(runs / "a.png"), "--out", str(tmp_path / "b.png")]
    evaluate.main([*words, "--text", "left", "--attention", str(tmp_path / "c.png")])
    assert Image.open(tmp_path / "c.png").width > 900
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


def test_heat_is_brightest_where_a_map_is_highest():
    image, values = np.full((40, 50, 3), 100, dtype=np.uint8), np.zeros((40, 50))
    values[10:20, 30:40] = 7
    sheet = np.asarray(draw.heat_sheet(image, dict(one=values, none=0 * values), np.zeros((40, 50), dtype=bool), "s"))
    second = sheet[:280, 350:700].astype(int).sum(2)  # each seven times as large
    y, x = np.argwhere(second == second.max()).mean(0) / 7
    assert sheet.shape[1] == 1050 and 10 < y < 20 and 30 < x < 40


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
