"""python -m pytest tests/test_shared_ris.py"""

import functools
import math
import re
import threading
from dataclasses import fields
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import common
import data
import evaluate
import shared_ris
import train
from common import UserError, count, fingerprint, recomputed, trained_names, trained_state
from tests.test_common import attention, linear, norm, shuffle, two_steps
from tests.test_data import make_refer
from toolbox import weights
from toolbox.cli import field_help
from toolbox.costs import saved_bytes
from toolbox.tokenizers import PAD, SentencePieces

SENTENCES = ["the small red circle on the left", "square"]


def on_meta(backbone="beit3-base", **flags):
    with torch.device("meta"):
        return shared_ris.SharedRIS(shared_ris.config(backbone, **flags))


def tiny(seed=0, **flags):
    torch.manual_seed(seed)
    return shared_ris.SharedRIS(shared_ris.config("tiny", **flags))


def inputs(model, n=2, seed=0):
    g, s = torch.Generator().manual_seed(seed), model.preprocess.size
    images = torch.randn(n, 3, s, s, generator=g)
    return images, model.tokenize((SENTENCES * n)[:n]), (torch.rand(n, s, s, generator=g) > 0.7).float()


# sizes


@pytest.mark.parametrize("backbone, size, total, vision, text", [
    ("beit3-base", 224, 220_987_392, 85_893_120, 135_094_272),
    ("beit3-base", 480, 221_528_064, 86_433_792, 135_094_272),
    ("beit3-large", 224, 672_702_464, 303_550_464, 369_152_000),
    ("beit3-large", 480, 673_423_360, 304_271_360, 369_152_000)])
def test_sizes_of_beit3(backbone, size, total, vision, text):
    model = on_meta(backbone, image_size=size)
    assert count(model.beit3) == total
    words = [p for n, p in model.beit3.named_parameters() if ".B." in n or n == "text_embed.weight"]
    assert sum(p.numel() for p in words) == text and total - text == vision
    assert {k: count(m) for k, m in model.parts().items()} == dict(
        backbone=total, adapter=0, head=15_491_584 if backbone == "beit3-base" else 16_015_872)
    unread = 5 * (768 if backbone == "beit3-base" else 1024)  # the mask token, and the last LayerNorm of each modality
    assert count(model, trainable=True) == count(model) - unread
    frozen = on_meta(backbone, image_size=size, tune="frozen")
    assert count(frozen, trainable=True) == count([frozen.fpn, frozen.decoder])


def test_the_parts_of_the_head():
    model = on_meta()
    assert [count(m) for m in (model.fpn.w[0], model.fpn.fusion[0], model.fpn.w_f)] == [393_728, 1_051_648, 1_049_088]
    assert [count(m) for m in (model.decoder.layers[0], model.decoder.conv, model.decoder.mlp)] == [
        3_152_384, 4_983_296, 525_312]


def test_flops_of_the_parts():
    from torch.utils.flop_counter import FlopCounterMode
    model = on_meta().eval()
    images, tokens = torch.zeros(1, 3, 480, 480, device="meta"), torch.zeros(1, 20, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        logits = model(images, tokens)
    gmacs = {n: sum(v.values()) / 2e9 for n, v in flops.get_flop_counts().items()}
    assert logits.shape == (1, 1, 120, 120)
    n, d, w = 921, 768, 512
    encoder = 12 * (12 * n * d * d + 2 * n * n * d) + 900 * 3 * 256 * d
    fpn = 4 * (n * d * w + 4 * n * w * w + 2 * n * n * w) + n * 4 * w * w
    decoder = 12 * n * w * w + 2 * n * n * w + 9 * w * w * (60**2 + 120**2) + 120**2 * (w * w + w) + 2 * w * w
    for name, wanted, fact in ("beit3", encoder, 94.39), ("fpn", fpn, 9.76), ("decoder", decoder, 50.0):
        assert gmacs[f"SharedRIS.{name}"] == pytest.approx(wanted / 1e9, rel=1e-3)
        assert gmacs[f"SharedRIS.{name}"] == pytest.approx(fact, rel=2e-3)


@pytest.mark.parametrize("flags, name", [
    (dict(stages=(3, 13)), "stages"), (dict(stages=(12, 3, 12)), "stages"), (dict(stages=(3, 6)), "stages"),
    (dict(stages=(), fpn_fusion="bi"), "fpn-fusion"), (dict(shared_layers=0, decoder_fusion="cross"), "decoder-fusion"),
    (dict(fpn_fusion="bi", head_dim=448, head_heads=7), "head-heads"), (dict(image_size=490), "image-size"),
    (dict(words=2), "words"), (dict(words=1023), "words"), (dict(head_heads=7), "head-heads"),
    (dict(drop_path=1.0), "drop-path"), (dict(beta2=1.0), "beta2"), (dict(threshold=0.0), "threshold"),
    (dict(fpn_fusion="sum"), "fpn-fusion")])
def test_impossible_settings_are_named(flags, name):
    with pytest.raises(UserError, match=f"--{name} .*must be"):
        shared_ris.config(**flags)


def test_the_recipe():
    c = shared_ris.config()
    assert (c.lr, c.weight_decay, c.beta2, c.schedule, c.clip_norm, c.epochs, c.batch_size, c.drop_path) == (
        1e-4, 5e-4, 0.98, "cosine", 1.0, 35, 14 * 8, 0.1)
    assert (c.bce, c.dice, c.threshold, c.image_size, c.head_dim, c.upsamplings) == (2.0, 0.5, 0.35, 480, 512, 2)
    assert shared_ris.config("beit3-large").stages == (6, 12, 18, 24)


# BEiT-3


SIZE = dict(layers=3, dim=32, heads=4, ffn=48, patch=16, rows=50, words=70, std=0.02)  # stands for the base size


def released_names(layers):
    """Every name and shape of a released file, with `layers` of them: d = dim, f = ffn, r = rows, w = words."""
    names = {"text_embed.weight": "r d", "vision_embed.mask_token": "1 1 d", "vision_embed.cls_token": "1 1 d",
             "vision_embed.proj.weight": "d 3 p p", "vision_embed.proj.bias": "d",
             "encoder.embed_positions.A.weight": "199 d", "encoder.embed_positions.B.weight": "w d"}
    for m in "AB":
        for i in range(layers):
            at = f"encoder.layers.{i}."
            for x in "kvqo":
                x = dict(o="out").get(x, x)
                names |= {at + f"self_attn.{x}_proj.{m}.weight": "d d", at + f"self_attn.{x}_proj.{m}.bias": "d"}
            names |= {at + f"ffn.{m}.fc1.weight": "f d", at + f"ffn.{m}.fc1.bias": "f",
                      at + f"ffn.{m}.fc2.weight": "d f", at + f"ffn.{m}.fc2.bias": "d"}
            for k in "weight", "bias":
                names |= {at + f"self_attn.inner_attn_ln.{m}.{k}": "d", at + f"self_attn_layer_norm.{m}.{k}": "d",
                          at + f"ffn.{m}.ffn_layernorm.{k}": "f", at + f"final_layer_norm.{m}.{k}": "d"}
        names |= {f"encoder.layer_norm.{m}.{k}": "d" for k in ("weight", "bias")}
    return names


def released_state(size, seed=0, device=None):
    """A file's content, the two heads of pretraining among it."""
    g = torch.Generator().manual_seed(seed)
    letters = dict(d=size["dim"], f=size["ffn"], r=size["rows"], w=size["words"] + 2, p=size["patch"])
    shapes = {f"beit3.{name}": [int(letters.get(x, x)) for x in shape.split()]
              for name, shape in released_names(size["layers"]).items()}
    shapes |= {"mlm_head.weight": [5, size["dim"]], "mlm_head.bias": [5], "mim_head.weight": [7, size["dim"]],
               "mim_head.bias": [7]}
    if device:
        return {k: torch.empty(s, device=device) for k, s in shapes.items()}
    return {k: 0.2 * torch.randn(s, generator=g) + (0.7 if re.search("n(orm)?\\.([AB]\\.)?weight", k) else 0)
            for k, s in shapes.items()}


@pytest.fixture
def small(monkeypatch):
    """beit3-base with three narrow layers, so that a file of it is small."""
    preset = dict(stages=(1, 3), head_dim=32, head_heads=4)
    monkeypatch.setitem(shared_ris.BACKBONES, "beit3-base", SIZE)
    monkeypatch.setitem(shared_ris.PRESETS, "beit3-base", preset)  # the defaults that the commands show
    return preset


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Two toy models of the kinds that sentencepiece has."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("the girl in green\nleft dog on the couch\na man with a red hat, sitting\n"
                                 "greener gardens and redder roses\nlefthanded women withstanding mankind\n" * 20)
    for kind in "unigram", "bpe":
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text"), model_prefix=str(folder / kind), vocab_size=40, model_type=kind,
            minloglevel=2)
    return {kind: (folder / f"{kind}.model").read_bytes() for kind in ("unigram", "bpe")}


@pytest.fixture
def file(tmp_path, pieces):
    state = released_state(SIZE)
    torch.save({"model": state}, tmp_path / "beit3_base_patch16_224.pth")
    (tmp_path / "beit3.spm").write_bytes(pieces["unigram"])
    return tmp_path / "beit3_base_patch16_224.pth"


def reference(state, images, tokens, positions):
    """BEiT-3 written out for one picture and one sentence without padding, by the released names. -> (1 + N + L, d)"""
    state = {k.removeprefix("beit3."): v for k, v in state.items()}
    d = SIZE["dim"]

    def linear(name, x):
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[name + ".weight"] + state[name + ".bias"]

    patches = images.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    patches = patches @ state["vision_embed.proj.weight"].flatten(1).T + state["vision_embed.proj.bias"]
    v = torch.cat([state["vision_embed.cls_token"][0], patches]) + positions
    t = state["text_embed.weight"][tokens] + state["encoder.embed_positions.B.weight"][2:2 + len(tokens)]
    x, way = torch.cat([v, t]), ["A"] * len(v) + ["B"] * len(t)

    def multiway(name, function, x, after=""):
        return torch.stack([function(name.replace("*", m), row) for row, m in zip(x, way)])

    for i in range(SIZE["layers"]):
        at = f"encoder.layers.{i}."
        y = multiway(at + "self_attn_layer_norm.*", norm, x)
        q, k, value = (multiway(at + f"self_attn.{n}_proj.*", linear, y) for n in "qkv")
        heads = [((q[:, s] @ k[:, s].T) / math.sqrt(d / 4)).softmax(1) @ value[:, s]
                 for s in (slice(h * 8, h * 8 + 8) for h in range(4))]
        y = multiway(at + "self_attn.inner_attn_ln.*", norm, torch.cat(heads, 1))
        x = x + multiway(at + "self_attn.out_proj.*", linear, y)
        y = multiway(at + "ffn.*.fc1", linear, multiway(at + "final_layer_norm.*", norm, x))
        y = multiway(at + "ffn.*.ffn_layernorm", norm, 0.5 * y * (1 + torch.erf(y / math.sqrt(2))))
        x = x + multiway(at + "ffn.*.fc2", linear, y)
    return multiway("encoder.layer_norm.*", norm, x)


def bicubic(n, m):
    """The matrix (m, n) of a cubic convolution with a = -0.75, half-pixel centres, no antialiasing, edges repeated."""
    def weight(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0
    out = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        at = (i + 0.5) * n / m - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            out[i, min(max(j, 0), n - 1)] += weight(at - j)
    return out


@pytest.mark.parametrize("image_size", [224, 480])
def test_a_released_file_loads_whole_and_computes_beit3(small, file, image_size):
    model = shared_ris.SharedRIS(shared_ris.config(image_size=image_size, **small), str(file)).eval()
    state, g = released_state(SIZE), torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, image_size, image_size, generator=g)
    tokens = torch.tensor([[0, 40, 41, 42, 43, 2], [0, 45, 2, PAD, PAD, PAD]])
    with torch.no_grad():
        v, t = model.beit3.layer_norm(*model.beit3(images, tokens)[-1])
    grid = image_size // 16
    assert v.shape == (2, 1 + grid**2, 32) and t.shape == (2, 6, 32)
    table, m = state["beit3.encoder.embed_positions.A.weight"], bicubic(14, grid)
    square = torch.einsum("ai,bj,ijd->abd", m, m, table[3:].view(14, 14, -1).double()).flatten(0, 1).float()
    positions = torch.cat([table[2:3], square])
    for b, n in (0, 6), (1, 3):  # the padded one as without its padding
        expected = reference(state, images[b], tokens[b, :n], positions)
        assert torch.allclose(torch.cat([v[b], t[b, :n]]), expected, atol=1e-4)


@pytest.mark.parametrize("backbone, tensors", [("beit3-base", 491), ("beit3-large", 971)])
def test_names_and_shapes_of_the_released_files(backbone, tensors):
    size = shared_ris.BACKBONES[backbone]
    state = released_state(size, device="meta")
    assert len(state) == tensors + 4
    model = on_meta(backbone)
    del model.beit3.pieces
    weights.load_exactly(model.beit3, weights.beit3_state(state, "file", 30), "file", backbone)


@pytest.mark.parametrize("change", ["another grid", "bare", "module", "retrieval", "half"])
def test_other_released_forms(small, file, tmp_path, change):
    state = released_state(SIZE)
    other = tmp_path / "beit3_base_indomain_patch16_224.pth"
    if change == "another grid":  # a fine-tuned file for 480 x 480 pixels
        state["beit3.encoder.embed_positions.A.weight"] = torch.randn(903, 32)
    if change == "bare":
        state = {k.removeprefix("beit3."): v for k, v in state.items()}
    if change == "retrieval":
        state = {k: v for k, v in state.items() if k.startswith("beit3.")}
        state |= {"language_head.weight": torch.zeros(3, 3), "vision_head.weight": torch.zeros(3, 3),
                  "logit_scale": torch.zeros(())}
    if change == "half":
        state = {k: v.half() for k, v in state.items()}
    wrapper = dict(bare=None, module="module").get(change, "model")
    torch.save({wrapper: state} if wrapper else state, other)
    model = shared_ris.SharedRIS(shared_ris.config(**small), str(other))
    rows = model.beit3.embed_positions.A.weight
    assert rows.dtype == torch.float32 and len(rows) == 903
    if change == "another grid":
        assert torch.equal(rows, state["beit3.encoder.embed_positions.A.weight"])
    weight = model.beit3.layers[2].ffn.B.fc2.weight
    assert torch.allclose(weight, released_state(SIZE)["beit3.encoder.layers.2.ffn.B.fc2.weight"], atol=1e-3)


def test_files_that_do_not_fit(small, file, tmp_path, pieces):
    def load(state, words="beit3.spm"):
        torch.save({"model": state}, tmp_path / "x.pth")
        return shared_ris.SharedRIS(shared_ris.config(**small), f"{tmp_path / 'x.pth'},{tmp_path / words}")

    (tmp_path / "words").write_text("the girl in green\nleft dog on the couch\na man with a red hat\n" * 20)
    state = released_state(SIZE)
    load(state)
    del state["beit3.encoder.layers.1.self_attn.q_proj.B.weight"]
    with pytest.raises(UserError, match="1 missing: layers.1.self_attn.q_proj.B.weight"):
        load(state)
    with pytest.raises(UserError, match="1 unexpected: extra.weight"):
        load(released_state(SIZE) | {"beit3.extra.weight": torch.zeros(1)})
    for rows in 200, 3:
        with pytest.raises(UserError, match="not those of a square"):
            load(released_state(SIZE) | {"beit3.encoder.embed_positions.A.weight": torch.zeros(rows, 32)})
    with pytest.raises(UserError, match="does not hold beit3-base: 40 unexpected: layers.3"):
        load(released_state(SIZE | dict(layers=4)))
    with pytest.raises(UserError, match="does not hold beit3-base: .* is .*64.*, not .*32"):
        load(released_state(SIZE | dict(dim=64)))
    with pytest.raises(UserError, match="does not hold BEiT-3"):
        load({"a": torch.zeros(1)})
    with pytest.raises(UserError, match="nothing.spm: BEiT-3's tokenizer.*cannot be read.*No such file"):
        load(released_state(SIZE), "nothing.spm")
    # what an interrupted download leaves, and another model's tokenizer
    for broken in [b"", b"nothing", *(pieces["bpe"][:n] for n in (*range(10, 420), 10_000))]:
        (tmp_path / "broken.spm").write_bytes(broken)
        with pytest.raises(UserError, match="broken.spm is not BEiT-3's tokenizer"):
            SentencePieces(str(tmp_path / "broken.spm"), 50)
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "words"), model_prefix=str(tmp_path / "other"),
                                             vocab_size=20, minloglevel=2)
    with pytest.raises(UserError, match="other.model is not BEiT-3's tokenizer, beit3.spm with its 40 pieces"):
        load(released_state(SIZE), "other.model")
    with pytest.raises(UserError, match="beit3.spm cannot be read as weights: it is neither a safetensors nor"):
        shared_ris.SharedRIS(shared_ris.config(**small), str(file.parent / "beit3.spm"))
    with pytest.raises(UserError, match="tiny has no released weights"):
        shared_ris.SharedRIS(shared_ris.config("tiny"), "pretrained")
    with pytest.raises(UserError, match="does not hold tiny"):
        shared_ris.SharedRIS(shared_ris.config("tiny"), str(file))


@pytest.mark.parametrize("names", ["ours", "released"])
def test_a_file_of_tiny_towers_loads(tmp_path, names):
    """It needs no tokenizer: tiny reads hashed words."""
    state = {k: v for k, v in tiny().beit3.state_dict().items() if not k.startswith("pieces.")}
    if names == "released":
        prefix = dict(layers="encoder.", layer_norm="encoder.", embed_positions="encoder.", text_embed="")
        state = {f"beit3.{prefix.get(k.split('.')[0], 'vision_embed.')}{k}": v for k, v in state.items()}
    torch.save(state, tmp_path / "towers.pth")
    model = shared_ris.SharedRIS(shared_ris.config("tiny", tune="frozen"), str(tmp_path / "towers.pth"))
    assert fingerprint(model) == fingerprint(tiny(tune="frozen"))
    assert torch.equal(model.tokenize(SENTENCES), tiny().tokenize(SENTENCES))


def test_released_files_are_downloaded_once_and_whole(monkeypatch, tmp_path, small, file):
    class Handler(SimpleHTTPRequestHandler):
        extra = 0

        def send_header(self, name, value):  # a HEAD that promises more than comes
            promised = name == "Content-Length" and self.command == "HEAD"
            super().send_header(name, str(int(value) + self.extra) if promised else value)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(file.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(weights, "BEIT3", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    cache, c = tmp_path / "hub" / "hub" / "checkpoints", shared_ris.config(**small)
    Handler.extra = 5
    with pytest.raises(UserError, match="cannot be downloaded .* bytes came"):
        shared_ris.SharedRIS(c, "pretrained")
    assert not (cache / file.name).exists()
    Handler.extra = 0
    for _ in range(2):
        model = shared_ris.SharedRIS(c, "pretrained")
        assert torch.equal(model.beit3.text_embed.weight, released_state(SIZE)["beit3.text_embed.weight"])
        if server.socket.fileno() >= 0:
            server.shutdown()
            server.server_close()  # the second time there is no network
    assert {f.name for f in cache.iterdir() if not f.name.endswith(".lock")} == {file.name, "beit3.spm"}
    (cache / file.name).unlink()
    with pytest.raises(UserError, match="curl -fL -o .*beit3_base_patch16_224.pth http://.*random"):
        shared_ris.SharedRIS(c, "pretrained")


def test_weights_that_have_seen_the_captions():
    for name in "a/beit3_base_indomain_patch16_224.pth", "beit3_large_patch16_480_coco_captioning.pth":
        assert weights.leak("shared_ris", name, "refcocog_umd").startswith("leak: beit3_")
        assert weights.leak("shared_ris", name, "shapes") == ""
    for name in "pretrained", "random", "a/beit3_base_patch16_224.pth,beit3.spm":
        assert weights.leak("shared_ris", name, "refcoco") == ""


# tokens


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_tokens_of_sentencepiece(kind, pieces, tmp_path):
    (tmp_path / "beit3.spm").write_bytes(pieces[kind])
    tokenizer, sp = SentencePieces(str(tmp_path / "beit3.spm"), 50), sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "beit3.spm"))
    sentences = ["the girl in green", "Zebra </s> <unk>", "a man with a red hat sitting on the couch left dog"]
    rows = [[0] + [i + 1 if i else 3 for i in sp.encode(s)] + [2] for s in sentences]
    assert 3 in rows[1] and not {0, 1, 2} & set(rows[1][1:-1])  # unknown letters, and no special ids from text
    longest = max(map(len, rows))
    assert tokenizer.tokenize(sentences, 64).tolist() == [r + [PAD] * (longest - len(r)) for r in rows]
    assert tokenizer.tokenize(sentences[2:], 8).tolist() == [rows[2][:7] + [2]]


def test_words_without_a_vocabulary():
    model = tiny()
    tokens = model.tokenize(["The RED circle.", "circle"])
    assert tokens.shape == (2, 6) and tokens[:, 0].tolist() == [0, 0] and tokens[0, 5] == 2
    assert tokens[1, 2:].tolist() == [2, PAD, PAD, PAD] and tokens[0, 3] == tokens[1, 1] >= 4
    assert torch.equal(tokens[:1], model.tokenize(["the red circle ."]))
    assert model.tokenize(["x " * 100]).shape == (1, 64) and model.tokenize(["x " * 100])[0, -1] == 2
    ids = SentencePieces("", 64010).tokenize([" ".join(f"w{i}" for i in range(3000))], 3002)[0, 1:-1]
    assert ids.min() >= 4 and ids.max() <= 64000 and len(ids.unique()) > 2900


def test_the_tokenizer_travels_with_the_weights(small, file, tmp_path):
    model = shared_ris.SharedRIS(shared_ris.config(**small), str(file))
    info = dict(method="shared_ris", config={}, weights=str(file), seed=0, frozen="", dataset="", data_root="")
    common.write_tensors(tmp_path / "model.safetensors", common.trained_state(model), info)
    _, state = common.read_checkpoint(str(tmp_path))
    again = shared_ris.SharedRIS(shared_ris.config(**small), "random")
    assert not torch.equal(again.tokenize(SENTENCES)[:, :4], model.tokenize(SENTENCES)[:, :4])
    common.load_trained(again, state, "x")
    assert torch.equal(again.tokenize(SENTENCES), model.tokenize(SENTENCES)) and fingerprint(again) == ""
    frozen = [shared_ris.SharedRIS(shared_ris.config(tune="frozen", **small), w) for w in (str(file), "random")]
    assert "beit3.pieces._extra_state" not in trained_state(frozen[0])
    frozen[1].beit3.load_state_dict({k: v for k, v in frozen[0].beit3.state_dict().items() if "pieces" not in k},
                                    strict=False)
    assert fingerprint(frozen[0]) != fingerprint(frozen[1])  # the same weights, another tokenizer


@pytest.mark.parametrize("tune", ["method", "frozen"])
def test_a_released_file_through_the_commands(small, file, tmp_path, tune, monkeypatch):
    """Training, an interruption, evaluation, a prediction; then without the file, or with it elsewhere."""
    make_refer(tmp_path)
    out, photo = tmp_path / "run", next((tmp_path / "images").rglob("*.jpg"))
    flags = ["--method", "shared_ris", "--dataset", "refcoco", "--data-root", str(tmp_path), "--weights", str(file),
             "--tune", tune, "--image-size", "64", "--stages", "1,3", "--head-dim", "32", "--head-heads", "4",
             "--batch-size", "2", "--steps", "4", "--val-every", "2", "--workers", "0", "--device", "cpu", "--out"]
    train.main([*flags, str(out)])
    stop = common.StopSignal.__init__
    with monkeypatch.context() as m:  # as if Ctrl-C came before the first step
        m.setattr(common.StopSignal, "__init__", lambda self: stop(self) or setattr(self, "number", 2))
        assert train.main([*flags, str(tmp_path / "cut")]) == 130
    train.main([*flags, str(tmp_path / "cut"), "--resume"])
    (info, whole), (_, cut) = (common.read_checkpoint(str(tmp_path / f)) for f in ("run", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)
    assert ("beit3.pieces._extra_state" in whole) == (tune == "method") != bool(info["frozen"])
    ask = ["--ckpt", str(out), "--image", str(photo), "--text", "the girl in green", "--out", str(tmp_path / "x.png"),
           "--json", str(tmp_path / "x.json")]
    evaluate.main(ask)
    first = (tmp_path / "x.json").read_text()
    (tmp_path / "elsewhere").mkdir()
    for f in file, file.parent / "beit3.spm":
        f.rename(tmp_path / "elsewhere" / f.name)
    if tune == "frozen":
        with pytest.raises(UserError, match="no such weights file"):
            evaluate.main(ask)
        ask += ["--weights", str(tmp_path / "elsewhere" / file.name)]
    evaluate.main(ask)
    assert (tmp_path / "x.json").read_text() == first
    again = [*flags, str(tmp_path / "again")]
    if tune == "method":  # that run's encoder, its tokenizer with it, for another
        again[again.index("--weights") + 1] = str(out)
        train.main(again)
        after = common.read_checkpoint(str(tmp_path / "again"))[1]
        assert torch.equal(after["beit3.pieces._extra_state"], whole["beit3.pieces._extra_state"])


def test_without_sentencepiece_one_sentence_says_what_to_install(monkeypatch, file):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        SentencePieces(str(file.parent / "beit3.spm"), 50)


# the head


def enhancer(sd, at, v, t, pad, heads):
    """A feature enhancer layer, by hand: the two attentions are one matrix of products, read both ways."""
    v, t = norm(sd, at + "norm_v", v), norm(sd, at + "norm_t", t)
    names = "ask_v", "value_v", "ask_t", "value_t"
    parts = [linear(sd, at + n, x).unflatten(2, (heads // 2, -1)).transpose(1, 2) for n, x in zip(names, (v, v, t, t))]
    score = parts[0] @ parts[2].transpose(2, 3) / parts[0].shape[3]**0.5  # (B, h, n, L)
    to_v = score.masked_fill(pad[:, None, None], -torch.inf).softmax(3) @ parts[3]
    to_t = score.transpose(2, 3).softmax(3) @ parts[1]
    v = v + sd[at + "gamma_v"] * linear(sd, at + "out_v", to_v.transpose(1, 2).flatten(2))
    t = t + sd[at + "gamma_t"] * linear(sd, at + "out_t", to_t.transpose(1, 2).flatten(2))
    out = []
    for name, x, mask, h in ("image.", v, None, heads), ("text.", t, pad, heads // 2):
        x = norm(sd, at + name + "norm1", x + attention(sd, at + name + "self_attn", x, x, h, mask))
        y = linear(sd, at + name + "linear2", linear(sd, at + name + "linear1", x).relu())
        out.append(norm(sd, at + name + "norm2", x + y))
    return torch.cat(out, 1)


def fused(sd, at, x, n, pad, heads, kind):
    if kind == "bi":
        return enhancer(sd, at, x[:, :n], x[:, n:], pad[:, n:], heads)
    y = norm(sd, at + "norm", x)
    if kind == "self":
        return attention(sd, at + "attention", y, y, heads, pad) + x
    v = attention(sd, at + "attention", y[:, :n], y[:, n:], heads, pad[:, n:]) + x[:, :n]
    return torch.cat([v, x[:, n:]], 1)


@pytest.mark.parametrize("flags", [
    {}, dict(stages=()), dict(stages=(1, 4), fpn_fusion="cross", decoder_fusion="cross"), dict(shared_layers=0),
    dict(fpn_fusion="bi", decoder_fusion="bi"), dict(shared_layers=2, upsamplings=1)])
def test_the_head_computes_eq_6_to_11(flags):
    model = tiny(**flags).eval()
    shuffle(model.fpn), shuffle(model.decoder)
    c, g = model.c, torch.Generator().manual_seed(2)
    h = [(torch.randn(2, 65, 64, generator=g), torch.randn(2, 7, 64, generator=g)) for _ in range(4)]
    pad = torch.zeros(2, 72, dtype=torch.bool)
    pad[1, -3:] = True
    sd = model.fpn.state_dict()
    if c.stages:
        z = []
        for k, j in enumerate(c.stages):
            x = linear(sd, f"w.{k}", torch.cat(h[j - 1], 1))
            z.append(fused(sd, f"fusion.{k}.", x, 65, pad, 2, c.fpn_fusion))            # Eq. 6
        z = linear(sd, "w_f", torch.cat(z, 2))                                          # Eq. 7
    else:
        z = linear(sd, "w.0", torch.cat(h[3], 1))
    with torch.no_grad():
        got = model.fpn(h, pad)
    assert torch.allclose(got, z, atol=1e-4)
    sd = model.decoder.state_dict()
    for k in range(c.shared_layers):
        z = fused(sd, f"layers.{k}.fusion.", z, 65, pad, 2, c.decoder_fusion)           # Eq. 8
        if c.decoder_fusion != "bi":
            y = linear(sd, f"layers.{k}.mlp.1", norm(sd, f"layers.{k}.mlp.0", z))
            z = z + linear(sd, f"layers.{k}.mlp.3", F.gelu(y))                          # Eq. 9
    f = z[:, 1:65].reshape(2, 8, 8, -1).permute(0, 3, 1, 2)
    for k in range(c.upsamplings):
        f = F.conv2d(F.interpolate(f, scale_factor=2, mode="bilinear"), sd[f"conv.{k}.1.weight"], padding=1)
        f = F.batch_norm(f, *(sd[f"conv.{k}.2.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))).relu()
    f = F.conv2d(f, sd[f"conv.{c.upsamplings}.weight"], sd[f"conv.{c.upsamplings}.bias"])
    t = z[:, 65]
    if c.shared_layers:
        t = linear(sd, "mlp.2", linear(sd, "mlp.0", t).relu())
    with torch.no_grad():
        logits = model.decoder(got, 65, pad)
    assert torch.allclose(logits, torch.einsum("bchw,bc->bhw", f, t)[:, None], atol=1e-3, rtol=1e-3)  # Eq. 11


def test_the_loss_by_hand():
    logits = torch.tensor([[[[0.0, 0.0], [0.0, 0.0]]]])
    masks = torch.zeros(1, 64, 64)
    masks[:, :32, :32], masks[:, 40:, 32:] = 1, 1                # targets 1, 0, 0 and 3/4; of their nearest pixels, 0
    for flags, dot, size, target in [
            (dict(), 0.875, 4 * 0.25 + 1 + 0.75**2, (1, 0, 0, 0.75)),
            (dict(dice_squared=False), 0.875, 4 * 0.5 + 1.75, (1, 0, 0, 0.75)),
            (dict(target="nearest"), 0.5, 4 * 0.25 + 1, (1, 0, 0, 0)),
            (dict(target="nearest", dice_squared=False), 0.5, 4 * 0.5 + 1, (1, 0, 0, 0))]:
        dice = 1 - (2 * dot + 1) / (size + 1)
        assert float(tiny(**flags).loss(logits, masks)) == pytest.approx(2 * math.log(2) + 0.5 * dice, abs=1e-6)
        assert float(tiny(bce=0.0, dice=3.0, **flags).loss(logits, masks)) == pytest.approx(3 * dice, abs=1e-6)
        some = torch.tensor([[[[1.0, 0.0], [0.0, -2.0]]]])       # bce is a mean over pixels
        bce = sum(math.log(1 + math.exp(x)) - x * t for x, t in zip((1, 0, 0, -2), target)) / 4
        assert float(tiny(dice=0.0, **flags).loss(some, masks)) == pytest.approx(2 * bce, abs=1e-6)


def test_dice_is_least_where_the_prediction_equals_the_target():
    """V-Net's is, also for the values between 0 and 1 of a mean over a cell; with sums it is not."""
    masks = torch.zeros(1, 64, 64)
    masks[:, 5:40, 9:30] = 1
    for squared in True, False:
        model = tiny(bce=0.0, dice=1.0, dice_squared=squared)
        target = F.interpolate(masks[:, None], (32, 32), mode="area")
        logits = target.clamp(1e-6, 1 - 1e-6).logit().requires_grad_()
        loss = model.loss(logits, masks)
        loss.backward()
        assert (loss.item() < 1e-5 and logits.grad.abs().max() < 1e-6) == squared


@pytest.mark.parametrize("target, least", [("area", 98.0), ("nearest", 0.0)])
def test_what_the_loss_asks_for_comes_back_as_the_mask(target, least):
    """Logits that minimise the loss, resized to the photograph as evaluation does it."""
    model = tiny(target=target)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    masks = torch.stack([(x - 20) ** 2 + (y - 30) ** 2 < 100, (x - 40).abs() + (y - 25).abs() < 15]).float()
    logits = torch.zeros(2, 1, 32, 32, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.5)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(logits, masks).backward()
        optimizer.step()
    found = [evaluate.predicted_mask(data.from_canvas(one, (64, 64), model.preprocess), 0.5)
             for one in logits.detach()[:, 0]]
    ious = [float(100 * (m & t).sum() / (m | t).sum()) for m, t in zip(found, masks.bool())]
    assert least <= min(ious) and (max(ious) < 95) == (target == "nearest"), ious


# training


UNREAD = {"beit3.mask_token"} | {f"beit3.layer_norm.{m}.{k}" for m in "AB" for k in ("weight", "bias")}


@pytest.mark.parametrize("flags", [{}, dict(stages=()), dict(shared_layers=0, stages=()), dict(fpn_fusion="bi"),
                                   dict(fpn_fusion="cross", decoder_fusion="cross"), dict(decoder_fusion="bi"),
                                   dict(stages=(4,)), dict(tune="frozen")])
def test_what_is_trained_gets_a_gradient_and_nothing_else(flags):
    """So that DistributedDataParallel never waits for one."""
    model = tiny(drop_path=0.1, **flags).train()
    images, tokens, masks = inputs(model)
    torch.manual_seed(0)
    model.loss(model(images, tokens), masks).backward()
    with_grad = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_grad == {n for n, p in model.named_parameters() if p.requires_grad}
    without = {n for n, _ in model.named_parameters()} - with_grad
    if "tune" in flags:
        assert without == {n for n, _ in model.named_parameters() if n.startswith("beit3.")}
    else:
        assert without == UNREAD
        assert trained_names(model) == set(model.state_dict()) and fingerprint(model) == ""


def test_the_head_starts_the_same_for_every_way_to_tune():
    method = tiny(tune="method").state_dict()
    for tune in "frozen", "full", "lora", "adapter":
        head = {k: v for k, v in tiny(tune=tune).state_dict().items() if k.startswith(("fpn.", "decoder."))}
        assert head and all(torch.equal(v, method[k]) for k, v in head.items())


def test_every_setting_has_a_line_of_help():
    described = field_help(shared_ris.Config)
    assert {f.name for f in fields(shared_ris.Config)} == described.keys()


def test_frozen_is_frozen():
    model = tiny(tune="frozen", drop_path=0.5).train()
    assert not any(m.training for m in model.beit3.modules()) and model.fpn.training
    images, tokens, masks = inputs(model)
    before, frozen = two_steps(model, images, tokens, masks)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("beit3."))
    assert fingerprint(model) == frozen != ""
    assert trained_state(model).keys() == {k for k in after if not k.startswith("beit3.")}
    assert all(not torch.equal(before[k], after[k]) for k, p in model.named_parameters() if p.requires_grad)


def test_the_method_moves_what_is_read_and_leaves_the_rest():
    model = tiny().train()
    images, tokens, masks = inputs(model)
    before, _ = two_steps(model, images, tokens, masks)
    after = model.state_dict()
    assert {k for k, p in model.named_parameters() if torch.equal(before[k], after[k])} == UNREAD


def test_stochastic_depth_leaves_out_whole_samples_of_both_modalities():
    torch.manual_seed(0)
    layer = shared_ris.Layer(64, 2, 128, 0.25).train()
    n, ones = 4000, torch.ones(1)
    v, t = layer.add((torch.zeros(n, 1, 1), torch.zeros(n, 2, 1)), (torch.ones(n, 1, 1), torch.ones(n, 2, 1)))
    assert torch.equal(v.expand(n, 2, 1), t) and v.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert abs(v.mean() - 1) < 0.03
    assert torch.equal(layer.eval().add((ones, ones), (ones, ones))[0], 2 * ones)
    drops = [x.drop for x in on_meta().beit3.layers]
    assert drops == pytest.approx([0.1 * i / 11 for i in range(12)])


def test_a_batch_is_its_samples_and_padding_does_not_matter():
    model = tiny().eval()
    shuffle(model)
    images, tokens, _ = inputs(model)
    assert (tokens[1] == PAD).sum() == 6
    longer = F.pad(tokens, (0, 9), value=PAD)
    with torch.no_grad():
        both, more = model(images, tokens), model(images, longer)
        alone = [model(images[i:i + 1], model.tokenize(SENTENCES[i:i + 1])) for i in range(2)]
        other = model(images, tokens.flip(0))
    assert model.tokenize(SENTENCES[1:]).shape == (1, 3)
    scale = both.abs().max()
    for x in torch.cat(alone), more:
        assert (both - x).abs().max() < 1e-5 * scale
    assert (both - other).abs().max() > 1e-2 * scale


def encoder_bytes(layers, checkpointing=False):
    """Bytes that base's encoder keeps for backward with fewer layers, for one image of 480 pixels and 20 tokens."""
    size = shared_ris.BACKBONES["beit3-base"] | dict(layers=layers, rows=100)
    beit3 = shared_ris.BEiT3(**size, image_size=480, drop_path=0.1).train()
    if checkpointing:
        recomputed(*beit3.layers)
    beit3.loss = lambda h, target: h[-1][0].sum() + h[-1][1].sum()
    tokens = torch.tensor([[0, *range(4, 19), 2, PAD, PAD, PAD]])
    return saved_bytes(beit3, torch.zeros(1, 3, 480, 480), tokens, None)


def test_bytes_saved_for_backward_at_full_size():
    one, two = encoder_bytes(1), encoder_bytes(2)
    whole = one + 11 * (two - one)  # all layers are alike
    assert 400 * 2**20 < whole <= 440 * 2**20
    one, two = encoder_bytes(1, True), encoder_bytes(2, True)
    assert one + 11 * (two - one) < 50 * 2**20


@pytest.mark.parametrize("flags", [{}, dict(checkpointing=True, drop_path=0.5),
                                   dict(fpn_fusion="cross", decoder_fusion="bi", image_size=96)])
def test_mixed_precision(flags):
    model = tiny(**flags).train()
    images, tokens, masks = inputs(model)
    losses = []
    for enabled in False, True:
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(model.loss(model(images, tokens), masks))
        losses[-1].backward()
    assert losses[1].dtype == torch.float32 and losses[1].item() == pytest.approx(losses[0].item(), rel=0.03)
