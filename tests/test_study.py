"""python -m pytest tests/test_study.py: the papers in miniature, their rows, and the intervals of their differences."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import dcris
import m2ist
import shared_ris
from common import METHODS, UserError
from toolbox import pretrain
from tests.test_commands import few_pictures  # noqa: F401

spec = importlib.util.spec_from_file_location("study", Path(__file__).parents[1] / "docs" / "study.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


class InTurn:
    """A pool whose work is done in the main thread, which alone receives signals."""

    def __init__(self, jobs):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What the study starts, which runs in this process. Pretraining takes one step of each stage."""
    words, make = [], pretrain.make

    def start(program, *what):
        words.append(list(map(str, what)))
        assert program == study.__file__
        study.main(words[-1])

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrain, "make", lambda *which: make(*which, steps=1))
    monkeypatch.setattr(study, "start", start)
    monkeypatch.setattr(study, "ThreadPoolExecutor", InTurn)
    monkeypatch.setattr(dcris, "Model", dcris.Model)  # others-words puts another one there
    return words


def test_the_study_from_towers_to_a_plot(started, few_pictures, tmp_path, capsys):  # noqa: F811
    flags = ["--method", "dcris", "--rows", "frozen,method,others-words", "--seeds", "3", "--steps", "2",
             "--dataset", "shapes-shift", "--pictures", "4", "--out", str(tmp_path)]
    study.main(flags)
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "study.json").read_text())
    assert [(row["row"], row["base"]) for row in rows] == [
        ("frozen", ""), ("method", "frozen"), ("others-words", "method")]
    frozen, method, others = rows
    assert frozen["trained"] < method["trained"] == others["trained"]
    assert frozen["saved_bytes_per_image"] < method["saved_bytes_per_image"] <= others["saved_bytes_per_image"]
    assert method["difference"] == pytest.approx(method["mean"] - frozen["mean"]) and method["paper_difference"] == 1.5
    assert others["paper_difference"] is None and others["verdict"] == ""
    runs = [common.read_checkpoint(str(tmp_path / f"dcris-shapes-shift-2steps-{row['row']}-3")) for row in rows]
    assert {info["weights"] for info, _ in runs} == {"pretrained"}
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1  # the same towers for all rows
    assert not torch.equal(runs[1][1]["neck.txt_proj.weight"], runs[2][1]["neck.txt_proj.weight"])  # others' words
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert [row[0] for row in cells[2:]] == ["frozen", "method", "others-words"]
    assert cells[3][1] == f"{method['trained']:,}" and cells[3][3] == cells[3][4] == f"{method['mean']:.1f}"
    assert (tmp_path / "dcris.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    assert len(started) == 3
    study.main(flags)  # what is there is neither trained nor measured again
    assert len(started) == 3 and json.loads((tmp_path / "study.json").read_text()) == rows


def test_the_words_of_another_picture():
    torch.manual_seed(0)
    c = dcris.config("tiny")
    model = dcris.Model(c).eval()
    sentences = ["the red circle", "the left cross", "the small square", "the top triangle"]
    images, tokens = torch.randn(4, 3, 64, 64), model.tokenize(sentences)
    f_t, f_s, pad = model.encode_text(tokens)
    exchanged = model.encode_image(images, f_t.roll(2, 0), pad.roll(2, 0))
    expected = model.proj(model.decoder(model.neck(exchanged, f_t, pad), f_t, pad), f_s)
    assert not torch.allclose(model(images, tokens), expected)
    study.others_words(model)
    assert torch.allclose(model(images, tokens), expected, atol=1e-5)


def test_without_the_dense_module():
    model = study.changed(dcris.Model, study.without_dense)(dcris.config("tiny"))
    whole, adapter = dcris.Model(model.c), model.visual_adapters["1"]
    dense = sum(common.count(a.dense) for a in whole.visual_adapters.values())
    assert common.count(whole) - common.count(model) == dense > 0
    F_v = torch.randn(2, 5 + 64, 32)
    f_t, pad = torch.randn(2, 6, 64), torch.zeros(2, 6, dtype=torch.bool)
    words = adapter.text_proj(f_t)
    expected = adapter.back_proj(adapter.attention(adapter.image_proj(F_v[:, 5:]), words, words)[0]) + F_v[:, 5:]
    assert torch.allclose(adapter.cross(F_v, f_t, pad, (8, 8))[:, 5:], expected, atol=1e-5)


def test_the_head_reads_tokens_too():
    torch.manual_seed(0)
    method = m2ist.Model(m2ist.config("tiny", side="public")).eval()
    plain = study.changed(m2ist.Model, study.tokens_too)(m2ist.config("tiny", tune="frozen")).eval()
    plain.load_state_dict({k: v for k, v in method.state_dict().items() if "m3isa" not in k})
    for name, p in method.m3isa.named_parameters():  # adapters that change nothing
        p.data *= ".up." not in name and ".shared." not in name
    images, tokens = torch.randn(2, 4, 64, 64), method.tokenize(["the red circle", "the left cross"])
    with torch.no_grad():
        assert torch.allclose(method(images, tokens), plain(images, tokens), atol=1e-6)


def test_two_encoders_read_apart():
    torch.manual_seed(0)
    model = study.changed(shared_ris.Model, study.dual_encoder)(shared_ris.config("tiny")).eval()
    images, tokens = torch.randn(2, 3, 64, 64), model.tokenize(["the red circle", "the square on the left"])
    with torch.no_grad():
        pairs = model.beit3(images, tokens)
        other_words = model.beit3(images, tokens.flip(0))
        other_pictures = model.beit3(images.flip(0), tokens)
        together = shared_ris.BEiT3.encode(model.beit3, *model.beit3.embed(images, tokens), tokens)
    for (v, t), (same_v, _), (_, same_t) in zip(pairs, other_words, other_pictures, strict=True):
        assert torch.allclose(v, same_v, atol=1e-5) and torch.allclose(t, same_t, atol=1e-5)
    assert not torch.allclose(pairs[-1][0], together[-1][0], atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_every_row_is_a_configuration_and_in_the_paper(method):
    rows, configs = {row.name: row for row in study.ROWS[method]}, set()
    for row in rows.values():
        words = [word for name, value in row.flags.items() for word in (f"--{name.replace('_', '-')}", value)]
        c = study.train.parse(["--method", method, "--weights", "pretrained", *words])[1]
        assert row.base in ("", *rows) and (row.name in study.CHANGES or c not in configs)
        configs.add(c)
        assert study.paper_figure(method, row) is None or 0 < study.paper_figure(method, row) < 100


def test_intervals_by_hand():
    rng = np.random.default_rng(1)
    assert study.bootstrap({0: np.full(10, 2.5), 1: np.full(10, 2.5)}) == (2.5, 2.5)
    # two seeds, 0 and 1 everywhere: both are drawn half of the time, one of them twice a quarter each
    assert study.bootstrap({0: np.zeros(10), 1: np.ones(10)}) == (0, 1)
    # one seed of two pictures, 0 and 1: likewise
    assert study.bootstrap({5: np.array([0.0, 1.0])}) == (0, 1)
    scores = {seed: rng.normal(seed, 1, 400) for seed in range(3)}
    low, high = study.bootstrap(scores)
    assert study.bootstrap(dict(reversed(scores.items()))) == (low, high) and low < 1 < high
    noise = rng.normal(0, 1, (3, 200))
    low, high = study.bootstrap({seed: np.concatenate([noise[seed], -noise[seed]]) for seed in range(3)})
    assert low < 0 < high  # a difference of nothing
    # one seed: the normal interval of a mean
    low, high = study.bootstrap({0: (values := rng.normal(3, 2, 2000))})
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 2000**0.5, rel=0.08)


@pytest.mark.parametrize("paper, low, high, said", [
    (1.3, 0.2, 2.0, "seen"), (1.3, -0.2, 2.0, "not seen at this size"), (1.3, -2.0, -0.2, "the opposite, at this size"),
    (-1.3, -2.0, -0.2, "seen"), (-1.3, 0.2, 2.0, "the opposite, at this size"), (None, 0.2, 2.0, ""), (0.0, 1, 2, "")])
def test_what_an_interval_says_of_the_paper(paper, low, high, said):
    assert study.verdict(paper, low, high) == said


@pytest.mark.parametrize("flags, message", [
    (["--rows", "frozen"], "--rows needs --method"), (["--method", "etris", "--rows", "lea"], "etris has frozen"),
    (["--seeds", "1,1"], "different numbers"), (["--jobs", "0"], "must be positive"),
    (["--steps", "-1"], "not negative")])
def test_a_study_that_cannot_be(flags, message):
    with pytest.raises(UserError, match=message):
        study.parse(flags)


def test_what_fails_is_said_in_a_sentence():
    with pytest.raises(UserError, match="nothing.py 3 ended with 2: .*nothing.py"):
        study.start("nothing.py", 3)
