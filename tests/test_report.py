"""python -m pytest tests/test_report.py"""

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import evaluate
import train
from toolbox import draw, features, report, shapes
from tests.test_commands import SMALL, few_pictures  # noqa: F401

HOSTILE = '</article><script>alert("x")</script><!--CARDS--> & \'quoted\' "text" <img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """Tags with their attributes, and the visible text of each article."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.articles, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "article":
            self.articles.append("")

    def handle_data(self, text):
        if self.articles:
            self.articles[-1] += text


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out, whole = tmp_path_factory.mktemp("runs"), shapes.Shapes.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes.Shapes, "__init__", lambda self, name="shapes", split="train", seed=0, size=64, images=None:
                      whole(self, name, split, seed, size, images or (40 if split == "train" else 12)))
        for method in "dcris", "m2ist":
            train.main(["--method", method, *SMALL[2:], "--out", str(out / method)])
    return out


@pytest.mark.parametrize("method", ["dcris", "m2ist"])
def test_a_page_that_opens_from_disk(runs, tmp_path, monkeypatch, method):
    sentences = shapes.Shapes.sentences
    monkeypatch.setattr(shapes.Shapes, "sentences", lambda self, i: [HOSTILE, *sentences(self, i)[1:]] if i == 3 else
                        sentences(self, i))
    evaluate.main(["--ckpt", str(runs / method), "--split", "all", "--report", str(tmp_path / "a.html"), "--json",
                   str(tmp_path / "a.json")])
    text, rows = (tmp_path / "a.html").read_text(), json.loads((tmp_path / "a.json").read_text())
    page = Page(text)
    assert [t for t, _ in page.tags].count("script") == 1 and "onerror" not in str([a for _, a in page.tags if "src" in a])
    assert not re.search(r"(src|href)=.?https?:|url\(|@import", text)  # nothing is fetched
    *curves, = (a["src"] for t, a in page.tags if t == "img" and a["src"].startswith("data:image/png;base64,"))
    pictures = [a["src"] for t, a in page.tags if t == "img" and a["src"] not in curves]
    cards = [a for t, a in page.tags if t == "article"]
    n = min(60, rows[0]["n"])
    assert len(cards) == n and len(pictures) == 2 * n and all(p.startswith("data:image/jpeg;base64,") for p in pictures)
    assert any(HOSTILE in a for a in page.articles) and any(HOSTILE.lower() == a["data-text"] for a in cards)
    metric = "mIoU" if method == "dcris" else "Acc@0.5"
    for row in rows:
        assert f"<td>{row[metric]:.2f}</td>" in text and f"<td>{row['split']}</td>" in text
    if n == rows[0]["n"]:  # then all expressions are there
        assert np.isclose(100 * np.mean([float(a["data-iou"]) for a in cards]), rows[0]["mIoU"], atol=0.01)
    assert len(curves) == 1 and "mean IoU by words of place" in text and '"torch"' in text.replace("&quot;", '"')


def test_what_is_shown():
    ious = [0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6, 0.0]
    groups = report.chosen(ious, 6)
    assert {k: sorted(ious[i] for i, g in groups.items() if g == k) for k in ("best", "median", "worst")} == dict(
        best=[0.8, 0.9], median=[0.4, 0.5], worst=[0.0, 0.1])
    for count in range(1, 12):
        groups = list(report.chosen(ious, count).values())
        assert len(groups) == min(count, 10) and groups.count("worst") >= groups.count("best") >= groups.count("median")
    assert report.chosen([0.4], 3) == {0: "worst"}


def test_charts_by_hand():
    svg = report.by_group("a <title>", ["x", "y", "x"], ["z", "y", "x"], [0.2, 0.5, 0.4])
    assert "a &lt;title&gt;" in svg and re.findall(r"<text x=[^>]*>([^<]*)</text>", svg) == ["50", "y", "30", "x"]
    assert re.findall("n (\\d)<", svg) == ["1", "2"]
    text = report.charts([0.05, 0.95, 1.0], [0.5, 3, 60], ["a b", "a left c", "left " * 12])
    counts = re.findall("n (\\d+)<", text)[:10]
    assert counts == ["1", *"0" * 8, "2"]
    edges = report.charts([0.3, 0.6, 0.7, 3 / 10], [1] * 4, ["a"] * 4)
    assert re.findall("n (\\d+)<", edges)[:10] == list("0002001100")
    assert re.findall(r">(\d+–\d+ %)<", text) == ["0–1 %", "2–5 %", "50–100 %"] and ">10+<" in text


def test_pictures_of_a_run_as_it_learns(runs, tmp_path):
    for name, size in ("curves.png", (920, 220)), ("samples.png", None):
        picture = Image.open(runs / "dcris" / name)
        assert picture.size == (size or picture.size) and len(picture.convert("L").getcolors(256)) > 10
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "val": {"mIoU": 5.0}}\n{"step": 3, "lo')
    assert draw.read_curves(log, "mIoU") == {"loss in training": [(1, 2.0)], "val mIoU": [(2, 5.0)]}
    draw.draw_curves(log, "mIoU", tmp_path / "a.png")  # of one point each
    draw.draw_curves(tmp_path / "none", "mIoU", tmp_path / "b.png")
    assert Image.open(tmp_path / "a.png").size == Image.open(tmp_path / "b.png").size


def test_a_page_that_cannot_be(runs, capsys):
    for words, message in [(["--image", "a.png", "--text", "b"], "--report does not go with one picture"),
                           (["--draw-count", "0"], "--draw-count must be positive")]:
        with pytest.raises(common.UserError, match=message):
            evaluate.main(["--ckpt", str(runs / "dcris"), "--report", "a.html", *words])


def test_the_page_shows_what_was_scored(runs, tmp_path):
    """With the released protocol, and for boxes."""
    for method, flags in ("dcris", ["--protocol", "released", "--shuffle-text"]), ("m2ist", []):
        evaluate.main(["--ckpt", str(runs / method), "--report", str(tmp_path / f"{method}.html"), *flags])
        text = (tmp_path / f"{method}.html").read_text()
        assert text.count("<article") == 24 or text.count("<article") == 60
        assert ("(sentences shuffled)" in text) == (method == "dcris")
    model, _ = evaluate.load_run(str(runs / "dcris"), None, common.start(device="cpu"))
    source = data.open_dataset("shapes", "val")
    for protocol in "default", "released":
        details = []
        evaluate.evaluate_split(model, source, common.start(device="cpu"), most=6, protocol=protocol, details=details)
        items = data.EvalSet(source, model.preprocess)
        for k, score, _ in details:
            record = items.record(k)
            mask = evaluate.ask(model, record.image, items.sentences()[k], protocol=protocol)["mask"]
            pair = torch.from_numpy(mask), torch.from_numpy(record.mask)
            assert common.intersection_union(*pair) == score


def test_a_place_where_no_page_can_be_is_known_before(runs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate, "load_run", lambda *args: pytest.fail("too late"))
    for place in tmp_path, tmp_path / "file" / "a.html":
        for flag in "--report", "--json", "--draw":
            with pytest.raises(common.UserError, match="cannot be written"):
                evaluate.main(["--ckpt", str(runs / "dcris"), flag, str(place)])


@pytest.mark.parametrize("method", ["dcris", "m2ist"])
def test_a_validation_draws_nothing_from_the_global_generator(runs, method):
    """So that dropout is the same however often a run is validated."""
    model, _ = evaluate.load_run(str(runs / method), None, common.start(device="cpu"))
    before = torch.get_rng_state()
    assert evaluate.evaluate_split(model, data.open_dataset("shapes", "val"), common.start(device="cpu"), most=6)["n"] == 6
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_trained_as_released_is_measured_as_released(runs, tmp_path, capsys):
    """Unless --protocol says otherwise; in a validation while training too."""
    process, source = common.start(device="cpu"), data.open_dataset("shapes", "val")
    model, _ = evaluate.load_run(str(runs / "dcris"), None, process)
    model.c = dataclasses.replace(model.c, threshold=0.1)  # after six steps hardly a pixel is above 0.35
    rows = {p: evaluate.evaluate_split(model, source, process, most=24, protocol=p) for p in ("default", "released")}
    assert rows["default"] != rows["released"] and evaluate.evaluate_split(model, source, process) == rows["default"]
    model.preprocess = dataclasses.replace(model.preprocess, fit="warp")
    assert evaluate.evaluate_split(model, source, process) == rows["released"]
    assert evaluate.evaluate_split(model, source, process, protocol="default") == rows["default"]
    assert evaluate.expressions(model, source, evaluate.protocol_of(model))[0].preprocess.fit == "warp"


class OneBox(torch.nn.Module):
    """Answers with one box, whatever it is asked."""

    task, image_features = "box", None

    def __init__(self, box):
        super().__init__()
        self.box, self.preprocess = torch.nn.Parameter(torch.tensor([box])), common.Preprocess(640, pad_channel=True)
        self.image_features = lambda images: torch.zeros(1)

    def tokenize(self, sentences):
        return torch.zeros(len(sentences), 1, dtype=torch.long)

    def forward(self, features, tokens):
        return self.box.expand(len(tokens), 4)


class OnePhotograph:
    """320 x 640 pixels, which are on a canvas of 640 between 160 and 480 from the left."""

    name, split = "one", "val"
    __len__ = lambda self: 1
    count, picture = (lambda self, i: 2), (lambda self, i: 0)
    sentences, describe = (lambda self, i: ("a", "b")), (lambda self, i: "")
    box = lambda self, i: (0.0, 0.0, 200.9, 320.9)
    read = lambda self, i: data.Record(np.zeros((640, 320, 3), np.uint8), None, self.box(i), ("a", "b"), 0, 0, "")


def test_boxes_of_the_released_protocol_are_cut_at_the_canvas():
    """TransVG and M2IST: the prediction is clamped to 0..1 of the canvas, padding and all, the annotation cut to whole
    pixels, and every sentence counts, while training too."""
    # x from 80 to 360 of the canvas, 80 before the photograph's left border; y from -160 to 320, above the canvas
    model, process = OneBox([220 / 640, 80 / 640, 280 / 640, 480 / 640]), common.start(device="cpu")
    rows = {p: evaluate.evaluate_split(model, OnePhotograph(), process, protocol=p) for p in evaluate.PROTOCOLS}
    # as released: x -80 to 200, y 0 to 320, truth 200 x 320
    assert rows["released"] == rows["released-val"] == pytest.approx({"n": 2, "Acc@0.5": 100.0, "mIoU": 100 * 200 / 280},
                                                                     abs=1e-3)
    # by default cut at the photograph: x 0 to 200, y 0 to 320
    assert rows["default"]["mIoU"] == pytest.approx(100 * 200 * 320 / (200.9 * 320.9), abs=1e-3)
    assert rows["default"]["n"] == 2


@pytest.mark.parametrize("sysconf", [None, lambda name: (_ for _ in ()).throw(ValueError("unrecognized name"))])
def test_features_are_kept_where_the_system_does_not_say_what_is_free(monkeypatch, sysconf):
    """Windows has no os.sysconf, macOS has no SC_AVPHYS_PAGES; neither has /proc."""
    assert 0 < features.free_memory() < 2**50
    monkeypatch.setattr(features.Path, "read_text", lambda self: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.delattr(features.os, "sysconf") if sysconf is None else monkeypatch.setattr(features.os, "sysconf", sysconf)
    assert features.free_memory() == float("inf")


def test_a_run_goes_on_without_its_pictures(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise common.UserError("samples.png cannot be written: No space left on device.")

    monkeypatch.setattr(draw, "draw_curves", full)
    train.main(["--method", "dcris", *SMALL[2:], "--out", str(tmp_path / "run")])
    assert "no pictures of this validation: samples.png cannot be written" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.json").exists()
