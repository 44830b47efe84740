"""python -m pytest tests/test_commands.py"""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import common
import data
import evaluate
import train
from toolbox import baselines, costs, runs, shapes
from toolbox.cli import config_from_json
from tests.test_data import make_refer

ROOT = Path(__file__).parents[1]
SMALL = ["--method", "dcris", "--steps", "6", "--val-every", "3", "--batch-size", "4", "--log-every", "1",
         "--workers", "0", "--device", "cpu", "--weights", "random", "--tune", "full"]  # no test needs a pretraining


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """The built-in sets with 40 training pictures and 12 of each other split; subprocesses have the whole sets."""
    make_few(monkeypatch)


def make_few(monkeypatch):
    whole = shapes.Shapes.__init__
    monkeypatch.setattr(shapes.Shapes, "__init__", lambda self, name="shapes", split="train", seed=0, size=64, images=None:
                        whole(self, name, split, seed, size, images or (40 if split == "train" else 12)))


def command(*words, check=None, world=1, **kwargs):
    """A command of the project, as a user runs it."""
    start = [sys.executable] if world == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world), "--standalone"]
    result = subprocess.run([*start, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=240,
                            stdin=subprocess.DEVNULL, **kwargs)
    if check is not None:
        assert result.returncode == check, result.stderr[-3000:]
    return result


def log_of(run):
    lines = [json.loads(s) for s in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in s.items() if k not in ("images_per_s", "seconds", "peak_gib")} for s in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of twenty steps."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_few(patch)
        train.main([*SMALL, "--steps", "20", "--val-every", "10", "--out", str(out)])
    return out


def test_a_run_folder_is_complete(run):
    assert sorted(p.name for p in run.iterdir() if p.name != ".lock") == [
        "config.json", "curves.png", "log.jsonl", "metrics.json", "model.safetensors", "resume.pt", "samples.png"]
    config = json.loads((run / "config.json").read_text())
    assert config["config"]["tune"] == "full" and config["config"]["steps"] == 20 and config["seed"] == 0
    assert config["versions"]["torch"] == torch.__version__
    lines = log_of(run)
    assert [s["step"] for s in lines if "loss" in s] == list(range(1, 21))
    vals = [s["val"] for s in lines if "val" in s]
    assert len(vals) == 2 and vals[0]["n"] == 24
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["mIoU"] == max(v["mIoU"] for v in vals) and metrics["split"] == "val"


def test_evaluation_repeats_validation_and_does_not_depend_on_processes(run, tmp_path, monkeypatch):
    best = json.loads((run / "metrics.json").read_text())
    flags = ["--batch-size", "4", "--device", "cpu", "--json"]
    evaluate.main(["--ckpt", str(run), *flags, str(tmp_path / "one.json")])
    one = json.loads((tmp_path / "one.json").read_text())
    assert {k: one[k] for k in one if k in best} == {k: best[k] for k in one if k in best}
    assert (one["method"], one["backbone"], one["dataset"], one["split"], one["n"]) == ("dcris", "tiny", "shapes", "val",
                                                                                   24)
    monkeypatch.undo()  # the whole set, as a command has it
    evaluate.main(["--ckpt", str(run), *flags, str(tmp_path / "one.json")])
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["n"] == 600
    two = command("evaluate.py", "--ckpt", run / "model.safetensors", *flags, "-", world=2, check=0)
    assert json.loads(two.stdout) == one


def test_several_sentences_about_one_picture(run, tmp_path, capsys):
    photo = np.random.default_rng(0).integers(0, 255, (90, 161, 3)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")
    words = ["--ckpt", str(run), "--image", str(tmp_path / "a.png"), "--threshold", "0.02", "--out", str(tmp_path / "b.png")]
    sentences = ["the left thing", "a circle " * 30, "the small red cross at the bottom"]
    evaluate.main([*words, *(w for s in sentences for w in ("--text", s)), "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    assert [a["text"] for a in found["answers"]] == [s.strip() for s in sentences] and found["width"] == 161
    for n, (sentence, answer) in enumerate(zip(sentences, found["answers"]), 1):
        assert answer["mask"] == str(tmp_path / f"b_mask_{n}.png")
        evaluate.main([*words, "--text", sentence, "--mask", str(tmp_path / "one.png"), "--json", "-"])
        alone = json.loads(capsys.readouterr().out)
        assert {k: v for k, v in answer.items() if k != "mask"} == {k: alone[k] for k in answer if k != "mask"}
        assert np.array_equal(np.asarray(Image.open(answer["mask"])), np.asarray(Image.open(tmp_path / "one.png")))


def test_shuffled_text_all_splits_and_drawing(run, tmp_path, capsys):
    evaluate.main(["--ckpt", str(run), "--split", "all", "--json", str(tmp_path / "all.json"), "--shuffle-text",
                   "--draw", str(tmp_path / "sheet.png"), "--draw-count", "3"])
    table = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "all.json").read_text())
    assert [r["split"] for r in rows] == ["val", "testA", "testB"] and rows[1]["n"] == 24
    assert len(table) == 4 and table[0].split()[-10:] == [
        "n", "oIoU", "mIoU", *(f"Pr@0.{x}" for x in range(5, 10)), "oIoU_95", "mIoU_95"]
    assert Image.open(tmp_path / "sheet.png").size[0] > 900
    given = [int(s) for s in evaluate.others_sentences([str(k) for k in range(24)])]
    assert sorted(given) == list(range(24)) and all(k != g for k, g in enumerate(given))


def test_one_picture_one_sentence(run, tmp_path, capsys):
    photo = np.random.default_rng(0).integers(0, 255, (90, 161, 3)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")
    evaluate.main(["--ckpt", str(run), "--image", str(tmp_path / "a.png"), "--text", "the left ünïcode thing",
                   "--out", str(tmp_path / "b.png"), "--json", "-", "--threshold", "0.02"])
    found = json.loads(capsys.readouterr().out)
    mask = np.asarray(Image.open(found["mask"]))
    assert mask.shape == (90, 161) and (found["width"], found["height"]) == (161, 90)
    assert (mask > 0).sum() == found["area"] > 0 and found["box"] == [int(v) for v in data.box_of(mask > 0)]
    assert 0.02 < found["confidence"] <= 1
    assert Image.open(tmp_path / "b.png").size[0] == 483  # three times the size, so that something can be seen


@pytest.mark.parametrize("words, sentence", [
    (["--image", "none.png", "--text", "dog"], "none.png: no such picture"),
    (["--image", "README.md", "--text", "dog"], "README.md is not a picture"),
    (["--image", "README.md", "--text", " "], "the sentence is empty"),
    (["--split", "test"], "no split 'test'"), (["--dataset", "refcoco"], "--data-root"),
    (["--dataset", "refcocog"], "refcocog_umd")])
def test_mistakes_get_one_sentence(run, words, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(common.UserError, match=sentence):
        evaluate.main(["--ckpt", str(run), *words])


def test_a_mistake_is_no_traceback(run, tmp_path):
    r = command("evaluate.py", "--ckpt", run, "--image", "none.png", "--text", "dog", check=2)
    assert r.stderr.strip() == "error: none.png: no such picture." and not r.stdout
    r = command("train.py", *SMALL, "--bridger-dimm", 3, check=2)
    assert "unrecognized arguments: --bridger-dimm 3" in r.stderr and "Traceback" not in r.stderr
    r = command("train.py", *SMALL, "--visual-layers", "1,9", "--out", tmp_path / "x", check=2)
    assert r.stderr.strip() == "error: --visual-layers 1,9: must be blocks from 0 to 3."
    make_refer(tmp_path)
    photo = next((tmp_path / "images" / "mscoco" / "images" / "train2014").iterdir())
    for p in photo.parent.iterdir():
        p.write_bytes(p.read_bytes()[:900])
    r = command("train.py", *SMALL, "--dataset", "refcoco", "--data-root", tmp_path, "--backbone", "tiny",
                "--batch-size", 2, "--workers", 1, "--out", tmp_path / "y", check=2)  # the last --workers counts
    last = r.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "COCO_train2014_" in last and "cannot be read" in last
    assert "Traceback" not in r.stderr


def test_the_same_command_twice_and_any_number_of_workers(tmp_path):
    for name, workers in ("a", "0"), ("b", "0"), ("c", "2"):
        train.main([*SMALL, "--out", str(tmp_path / name), "--workers", workers])
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b") == log_of(tmp_path / "c")
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ac")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("flags", [["--log-every", "6", "--val-every", "6"],
                                   ["--tune", "method", "--cross-dropout", "0.1", "--decoder-dropout", "0.1"]])
def test_resuming_gives_the_numbers_of_an_unbroken_run(tmp_path, flags, monkeypatch):
    train.main([*SMALL, *flags, "--out", str(tmp_path / "whole")])
    calls = []

    class Stop(common.StopSignal):  # the signal comes during the fourth step of the first call
        number = property(lambda self: signal.SIGTERM if len(calls) == 4 else 0, lambda self, n: None)

    monkeypatch.setattr(common, "StopSignal", Stop)
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda *a: calls.append(1) or rate(*a))
    assert train.main([*SMALL, *flags, "--out", str(tmp_path / "cut")]) == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "cut" / "resume.pt", weights_only=True)["progress"]["step"] == 4
    if "--tune" in flags:
        with open(tmp_path / "cut" / "log.jsonl", "a") as f:
            f.write('{"step": 4, "lo')  # the power failed
    assert train.main([*SMALL, *flags, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    for name in "model.safetensors",:
        a, b = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()
    a, b = (torch.load(tmp_path / n / "resume.pt", weights_only=True)["model"] for n in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_help_without_a_method(capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["--help"])
    assert e.value.code == 0 and "--resume" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        train.main(["--method", "dcris", "--help"])
    assert e.value.code == 0
    said = capsys.readouterr().out
    assert "--visual-layers" in said and "--no-every-sentence" in said and "MISSING" not in said and "default: <" not in said


def test_libraries_of_towers_are_imported_where_towers_are_built():
    """What --help and a refusal do without: seconds of a start."""
    code = """
import contextlib, io, sys
import evaluate, train
from common import METHODS, UserError
commands = [(train.main, ["--method", m, *words]) for m in METHODS for words in (["--help"], ["--lr", "-1"])]
for main, words in [*commands, (evaluate.main, ["--help"]), (evaluate.main, ["--ckpt", "no run"])]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit, UserError):
        main(words)
        raise AssertionError(words)
print(*sys.modules)
"""
    result = command("-c", code, check=0)
    slow = {"open_clip", "transformers", "torchvision", "timm", "matplotlib", "pyarrow", "huggingface_hub"}
    assert not slow & {*result.stdout.split()}


@pytest.mark.parametrize("cpus, processes, workers", [(1, 1, 1), (2, 1, 1), (8, 1, 7), (8, 2, 3), (256, 4, 16)])
def test_workers_follow_the_cpus_that_the_process_may_use(monkeypatch, cpus, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert train.parse(["--method", "m2ist"])[0].workers == workers


def test_epochs_count_where_a_preset_has_steps():
    assert train.parse(["--method", "m2ist", "--epochs", "3"])[1].steps == 0 < train.parse(["--method", "m2ist"])[1].steps
    assert train.parse(["--method", "m2ist", "--epochs", "3", "--steps", "5"])[1].steps == 5


def test_runs_are_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.main([*SMALL, "--steps", "1"])
    assert sorted(os.listdir("runs")) == ["dcris-shapes", "dcris-shapes-2"]
    with pytest.raises(common.UserError, match="holds a run already"):
        train.main([*SMALL, "--out", "runs/dcris-shapes"])
    with pytest.raises(common.UserError, match="val_split = val, not train"):
        train.main([*SMALL, "--steps", "1", "--out", "runs/dcris-shapes", "--resume", "--val-split", "train"])
    with pytest.raises(common.UserError, match="steps = 1, not 6"):
        train.main([*SMALL, "--out", "runs/dcris-shapes", "--resume"])
    train.main([*SMALL, "--steps", "1", "--out", "runs/none", "--resume"])  # killed before its first step, say
    with pytest.raises(common.UserError, match="cannot be written"):
        train.main([*SMALL, "--out", "runs/dcris-shapes/config.json/below"])
    (tmp_path / "runs/dcris-shapes/resume.pt").write_bytes(b"half")
    with pytest.raises(common.UserError, match="resume.pt cannot be read"):
        train.main([*SMALL, "--steps", "1", "--out", "runs/dcris-shapes", "--resume"])


def test_towers_of_one_run_for_another(run, tmp_path):
    out = tmp_path / "shift"
    train.main([*SMALL, "--tune", "method", "--dataset", "shapes-shift", "--weights", str(run), "--out", str(out)])
    info, state = common.read_checkpoint(str(out))
    assert info["config"]["tune"] == "method" and not any(k.startswith(("vision.", "text.")) for k in state)
    assert any(k.startswith("visual_adapters.") for k in state)
    process = common.start(device="cpu")
    model, _ = evaluate.load_run(str(out), None, process)
    _, first = common.read_checkpoint(str(run))
    for k, v in first.items():
        if k.startswith(("vision.", "text.")):
            assert torch.equal(model.state_dict()[k], v), k
    # reloaded onto fresh towers: the same logits to the bit
    again, _ = evaluate.load_run(str(out), str(run), process)
    images, tokens = torch.randn(2, 3, 64, 64), model.tokenize(["red circle", "left"])
    with torch.no_grad():
        assert torch.equal(model(images, tokens), again(images, tokens))
    with pytest.raises(common.UserError, match="trained no towers"):
        train.main([*SMALL, "--weights", str(out), "--out", str(tmp_path / "z")])
    with pytest.raises(common.UserError, match="are not the ones built here"):
        evaluate.load_run(str(out), "random", process)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    import dcris
    loss, calls = dcris.DCRIS.loss, []
    monkeypatch.setattr(dcris.DCRIS, "loss", lambda *a: calls.append(1) or loss(*a) * (float("nan") if len(calls) > 4
                                                                                      else 1))
    with pytest.raises(common.UserError, match="the loss is nan at step 5.*shapes/train picture"):
        train.main([*SMALL, "--out", str(tmp_path / "run")])
    assert torch.load(tmp_path / "run" / "resume.pt", weights_only=True)["progress"]["step"] == 3


def test_accumulation_is_the_same_batch(tmp_path):
    whole = train.micro_batches(30, train.parse(SMALL)[1], 0, range(9), common.Process(0, 1, torch.device("cpu")), 1)
    steps = list(whole)
    assert all(len(s) == 4 for s in steps) and len({i for s in steps[:7] for i in s}) == 28  # an epoch of 7 steps
    c = train.parse(SMALL)[1]
    for world, parts in (2, 1), (1, 2), (2, 2):
        dealt = [list(train.micro_batches(30, c, 0, range(9), common.Process(r, world, torch.device("cpu")), parts))
                 for r in range(world)]
        for n in range(9):
            mine = [i for part in range(parts) for d in dealt for i in d[n * parts + part]]
            assert mine == steps[n]


def test_schedules():
    c = train.parse([*SMALL, "--schedule", "step", "--milestones", "2,4", "--warmup", "0"])[1]
    assert [train.learning_rate(s, 100, 10, c) for s in (0, 19, 20, 39, 40)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    c = train.parse([*SMALL, "--warmup", "10"])[1]
    assert train.learning_rate(0, 100, 10, c) == pytest.approx(0.1)
    assert train.learning_rate(50, 100, 10, c) == pytest.approx(0.5)
    assert train.learning_rate(100, 100, 10, c) == pytest.approx(0)


@pytest.mark.parametrize("number, world", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_leaves(tmp_path, number, world):
    out = tmp_path / "run"
    start = [sys.executable] if world == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world), "--standalone"]
    process = subprocess.Popen([*start, "train.py", *SMALL, "--steps", "5000", "--val-every", "5000", "--workers", "1",
                                "--out", out], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.time() + 120
    while not (out / "log.jsonl").exists() and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)  # Ctrl-C reaches the group
    begin = time.time()
    _, said = process.communicate(timeout=60)
    assert time.time() - begin < 20
    assert process.returncode != 0 and "stopped at step" in said, said[-2000:]
    if world == 1:
        assert process.returncode == 130 and "Traceback" not in said
    step = torch.load(out / "resume.pt", weights_only=True)["progress"]["step"]
    assert step >= 1 and (out / "model.safetensors").exists()
    train.main([*SMALL, "--steps", str(step + 2), "--val-every", "5000", "--out", str(tmp_path / "other")])


def test_efficiency_prints_the_fields_and_the_paper(tmp_path, capsys):
    costs.main(["--method", "dcris", "--backbone", "tiny", "--tune", "method", "--json", "-"])
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 1 and {"method", "backbone", "image_size", "params_total", "params_trainable", "params_adapter",
                               "params_head", "params_backbone", "adapter_percent_of_backbone", "gflops_forward",
                               "saved_bytes_per_image", "step_seconds_per_image", "device", "paper"} <= rows[0].keys()
    with pytest.raises(common.UserError, match="--backbone resnet: must be one of dinov2-base"):
        costs.main(["--method", "dcris", "--backbone", "resnet"])


@pytest.mark.parametrize("backbone", ["tiny", "tiny-vit"])
def test_etris_from_training_to_a_prediction(tmp_path, backbone):
    flags = ["--method", "etris", "--backbone", backbone, *SMALL[2:], "--steps", "2", "--val-every", "2"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    info, state = common.read_checkpoint(str(tmp_path / "run"))
    assert info["config"]["tune"] == "full" and info["frozen"] == "" and "clip.ln_final.weight" in state
    evaluate.main(["--ckpt", str(tmp_path / "run"), "--json", str(tmp_path / "val.json")])
    assert json.loads((tmp_path / "val.json").read_text())["backbone"] == backbone
    # towers of one run for another, with Bridgers; the authors' way trains positions too
    for variant, kept in ("etris", set()), ("released", {"clip.positional_embedding"}):
        out = tmp_path / variant
        train.main([*flags, "--tune", "method", "--dataset", "shapes-shift", "--weights", str(tmp_path / "run"), "--variant", variant,
                    "--bridger-dropout", "0.1", "--adapter-lr", "0", "--out", str(out)])
        info, after = common.read_checkpoint(str(out))
        assert info["config"]["tune"] == "method" and info["frozen"]
        assert {k for k in after if k.startswith("clip.") and "visual" not in k} == kept
        process = common.start(device="cpu")
        (model, _), (again, _) = (evaluate.load_run(str(out), w, process) for w in (None, str(tmp_path / "run")))
        images = torch.randn(2, 3, model.preprocess.size, model.preprocess.size)
        tokens = model.tokenize(["red circle", "left"])
        with torch.no_grad():
            assert torch.equal(model(images, tokens), again(images, tokens))
        first = runs.build(__import__("etris"), model.c, str(tmp_path / "run"), 0).state_dict()
        still = {k for k in after if torch.equal(after[k], first[k])}
        parameters = {k for k, _ in model.named_parameters()}
        assert still & parameters == {k for k in parameters if k.startswith("bridgers.")}  # their rate was 0
        with pytest.raises(common.UserError, match="trained no towers"):
            train.main([*flags, "--weights", str(out), "--out", str(tmp_path / "never")])
    photo = np.random.default_rng(0).integers(0, 255, (90, 161, 3)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")
    evaluate.main(["--ckpt", str(out), "--image", str(tmp_path / "a.png"), "--text", "left", "--threshold", "0.01",
                   "--out", str(tmp_path / "b.png"), "--json", str(tmp_path / "b.json")])
    assert np.asarray(Image.open(json.loads((tmp_path / "b.json").read_text())["mask"])).shape == (90, 161)


def test_the_towers_of_another_method_or_backbone_are_refused(run, tmp_path):
    flags = ["--method", "etris", *SMALL[2:]]
    with pytest.raises(common.UserError, match="a run of dcris with tiny, not of etris with tiny"):
        train.main([*flags, "--weights", str(run), "--out", str(tmp_path / "x")])
    train.main([*flags, "--backbone", "tiny-vit", "--steps", "1", "--out", str(tmp_path / "vit")])
    with pytest.raises(common.UserError, match="a run of etris with tiny-vit, not of etris with tiny"):
        train.main([*flags, "--weights", str(tmp_path / "vit"), "--out", str(tmp_path / "x")])
    with pytest.raises(common.UserError, match="do not fit these settings: clip.visual.positional_embedding"):
        train.main([*flags, "--tune", "method", "--backbone", "tiny-vit", "--variant", "released", "--image-size",
                    "128", "--weights", str(tmp_path / "vit"), "--out", str(tmp_path / "x")])


BOX = ["--method", "m2ist", *SMALL[2:]]


def test_m2ist_from_training_to_a_prediction(tmp_path, capsys):
    train.main([*BOX, "--out", str(tmp_path / "run")])
    info, state = common.read_checkpoint(str(tmp_path / "run"))
    assert info["config"]["tune"] == "full" and info["frozen"] == "" and "bert.vocabulary" in state
    vals = [s["val"] for s in log_of(tmp_path / "run") if "val" in s]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert vals[0].keys() == {"n", "Acc@0.5", "mIoU"} and metrics["Acc@0.5"] == max(v["Acc@0.5"] for v in vals)
    assert "leak" not in metrics
    # frozen encoders of one run for another
    out = tmp_path / "shift"
    train.main([*BOX, "--tune", "method", "--dataset", "shapes-shift", "--weights", str(tmp_path / "run"), "--out",
                str(out)])
    info, state = common.read_checkpoint(str(out))
    assert info["config"]["tune"] == "method" and not any(k.startswith(("detr.", "bert.")) for k in state)
    evaluate.main(["--ckpt", str(out), "--json", str(tmp_path / "val.json"), "--draw", str(tmp_path / "sheet.png")])
    row = json.loads((tmp_path / "val.json").read_text())
    assert row.keys() == {"method", "backbone", "dataset", "split", "protocol", "n", "Acc@0.5", "mIoU", "Acc@0.5_95",
                          "mIoU_95"} and row["n"] == 24
    best = json.loads((out / "metrics.json").read_text())
    assert {k: row[k] for k in ("n", "Acc@0.5", "mIoU")} == {k: best[k] for k in ("n", "Acc@0.5", "mIoU")}
    assert Image.open(tmp_path / "sheet.png").size[0] > 900
    # a wide and a tall photograph: the box comes back in their own pixels
    model, _ = evaluate.load_run(str(out), None, common.start(device="cpu"))
    for w, h in (320, 100), (90, 300):
        photo = np.random.default_rng(0).integers(0, 255, (h, w, 3)).astype(np.uint8)
        Image.fromarray(photo).save(tmp_path / "a.png")
        evaluate.main(["--ckpt", str(out), "--image", str(tmp_path / "a.png"), "--text", "left", "--out",
                       str(tmp_path / "b.png"), "--json", str(tmp_path / "b.json")])
        found = json.loads((tmp_path / "b.json").read_text())
        with torch.no_grad():
            images = data.normalise(data.to_canvas(photo, model.preprocess)[None], model.preprocess)
            x, y, bw, bh = (64 * model(images, model.tokenize(["left"]))[0]).tolist()
        scale, left, top = (5, 0, 22) if w > h else (300 / 64, 22, 0)  # 64 x 20 and 19 x 64 on the canvas
        sx, sy = (scale, scale) if w > h else (90 / 19, scale)
        want = [(x - bw / 2 - left) * sx, (y - bh / 2 - top) * sy, (x + bw / 2 - left) * sx, (y + bh / 2 - top) * sy]
        want = [min(max(v, 0), side) for v, side in zip(want, (w, h, w, h))]
        assert found["box"] == pytest.approx(want, abs=0.02) and (found["width"], found["height"]) == (w, h)
        assert not {"mask", "area", "confidence", "threshold"} & found.keys() and found["overlay"] == str(tmp_path / "b.png")
    for flag in ["--mask", str(tmp_path / "m.png")], ["--threshold", "0.4"]:
        with pytest.raises(common.UserError, match=f"{flag[0]}: m2ist answers with a box"):
            evaluate.main(["--ckpt", str(out), "--image", str(tmp_path / "a.png"), "--text", "left", *flag])
    capsys.readouterr()


def test_sharing_pictures_changes_no_figure(tmp_path, capsys, monkeypatch):
    import m2ist
    make_refer(tmp_path)
    refs_file = tmp_path / "refcoco" / "refs(unc).p"
    refs = [dict(r, split="train" if r["split"] == "train" else "val") for r in pickle.loads(refs_file.read_bytes())]
    for n in range(3):  # objects of two of the pictures, far apart
        refs.append(dict(refs[1 + n % 2], ref_id=50 + n, sentences=[dict(sent=f"more {n} {k}") for k in range(n + 1)]))
    refs_file.write_bytes(pickle.dumps(refs))
    calls, encode, run = [], m2ist.M2IST.image_features, str(tmp_path / "run")
    monkeypatch.setattr(m2ist.M2IST, "image_features", lambda *a: calls.append(1) or encode(*a))
    train.main([*BOX, "--dataset", "refcoco", "--data-root", str(tmp_path), "--backbone", "tiny", "--batch-size", "2",
                "--steps", "2", "--out", run])
    rows = {}
    for size in "1", "3", "16":
        calls.clear()
        evaluate.main(["--ckpt", run, "--batch-size", size, "--json", str(tmp_path / "val.json")])
        rows[size] = json.loads((tmp_path / "val.json").read_text())
        assert len(calls) == 3  # pictures
    assert all(row == rows["1"] for row in rows.values()) and rows["1"]["n"] == 12
    # each with its own sentence and box
    process = common.start(device="cpu")
    model, info = evaluate.load_run(run, None, process)
    items = data.EvalSet(data.open_dataset("refcoco", "val", str(tmp_path)), model.preprocess)
    with torch.no_grad():
        found = list(evaluate.answers_by_picture(model, items, items.sentences(), process, 5, 0, "default"))
    assert len({iou for _, iou, _ in found}) > 3
    for k, iou, _ in found:
        i, j = items.pairs[k]
        record = items.source.read(i)
        box = evaluate.ask(model, record.image, record.sentences[j])["box"]
        assert common.box_iou(box, record.box) == pytest.approx(iou, abs=1e-3)
    two = json.loads(command("evaluate.py", "--ckpt", run, "--by-size", "--json", "-", "--device", "cpu", world=2,
                             check=0).stdout)
    assert sum(group["n"] for group in two.pop("by_size")) == 12 and two == rows["16"]


def test_training_from_kept_features(tmp_path, capsys):
    train.main([*BOX, "--out", str(tmp_path / "first")])
    flags = [*BOX, "--tune", "method", "--dataset", "shapes-shift", "--weights", str(tmp_path / "first")]
    for name, where in ("plain", None), ("memory", "memory"), ("folder", tmp_path / "cache"), ("again", tmp_path / "cache"):
        train.main([*flags, *(["--cache-features", str(where)] if where else []), "--out", str(tmp_path / name)])
    said = capsys.readouterr().err
    assert "features of 40 pictures, 0.0" in said and "GiB, go to memory" in said and "GiB, are in" in said
    plain, *others = (log_of(tmp_path / n) for n in ("plain", "memory", "folder", "again"))
    assert others[0] == others[1] == others[2]
    losses = [[s["loss"] for s in log if "loss" in s] for log in (plain, others[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # one picture at a time rounds otherwise than four do
    for extra, why in ((["--augment"], "--no-augment"), (["--tune", "full"], "while their encoder is trained"),
                       (["--insertion", "parallel"], "adapters inside")):
        with pytest.raises(common.UserError, match=why):
            train.main([*flags, *extra, "--cache-features", "memory", "--out", str(tmp_path / "no")])
    # other layers in the same folder are not these
    for layer in "0", "1":
        train.main([*flags, "--vision-layers", layer, "--text-layers", "0", "--steps", "1", "--val-every", "1",
                    "--cache-features", str(tmp_path / "cache"), "--out", str(tmp_path / f"layer {layer}")])
    assert "are in" not in capsys.readouterr().err and len(os.listdir(tmp_path / "cache")) == 3
    with pytest.raises(common.UserError, match="together with the sentence"):
        train.main([*SMALL, "--cache-features", "memory", "--out", str(tmp_path / "no")])


def test_shared_ris_from_training_to_a_prediction(tmp_path, capsys):
    flags = ["--method", "shared_ris", *SMALL[2:]]
    train.main([*flags, "--drop-path", "0.2", "--out", str(tmp_path / "run")])
    info, state = common.read_checkpoint(str(tmp_path / "run"))
    assert info["config"]["tune"] == "full" and info["frozen"] == "" and "beit3.mask_token" in state
    lines = log_of(tmp_path / "run")
    train.main([*flags, "--drop-path", "0.2", "--checkpointing", "--accumulate", "1", "--out", str(tmp_path / "less")])
    assert log_of(tmp_path / "less") == lines
    # its encoder for another run: the method trains it further, frozen leaves it alone
    first = runs.build(__import__("shared_ris"), config_from_json(
        evaluate.load_method("shared_ris").Config, info["config"], "x"), str(tmp_path / "run"), 0).state_dict()
    for tune in "method", "frozen":
        out = tmp_path / tune
        train.main([*flags, "--dataset", "shapes-shift", "--weights", str(tmp_path / "run"), "--out", str(out),
                    "--tune", tune])
        info, after = common.read_checkpoint(str(out))
        assert info["config"]["tune"] == tune and bool(info["frozen"]) == (tune == "frozen")
        moved = {k.split(".")[0] for k in after if not torch.equal(after[k], first[k])}
        assert moved == {"fpn", "decoder"} | ({"beit3"} if tune == "method" else set())
        evaluate.main(["--ckpt", str(out), "--json", str(tmp_path / "val.json")])
        best = json.loads((out / "metrics.json").read_text())
        row = json.loads((tmp_path / "val.json").read_text())
        assert row["method"] == "shared_ris" and row["mIoU"] == best["mIoU"]
    with pytest.raises(common.UserError, match="do not fit these settings: beit3.embed_positions.A.weight"):
        train.main([*flags, "--image-size", "128", "--weights", str(tmp_path / "run"), "--out", str(tmp_path / "no")])
    photo = np.random.default_rng(0).integers(0, 255, (90, 161, 3)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")
    evaluate.main(["--ckpt", str(out), "--image", str(tmp_path / "a.png"), "--text", "left", "--threshold", "0.01",
                   "--out", str(tmp_path / "b.png"), "--json", str(tmp_path / "b.json")])
    assert np.asarray(Image.open(json.loads((tmp_path / "b.json").read_text())["mask"])).shape == (90, 161)
    capsys.readouterr()
    costs.main(["--method", "shared_ris", "--backbone", "tiny", "--vary", "fpn-fusion"])
    said = capsys.readouterr().out
    assert "  row 3: " in said and " GFLOPs, decoder " in said and "the paper:" not in said


@pytest.mark.parametrize("method", ["shared_ris", "m2ist"])
def test_figures_by_the_size_of_the_object(tmp_path, capsys, method):
    """Against the same, collected by hand from single predictions."""
    run = str(tmp_path / "run")
    train.main(["--method", method, *SMALL[2:], "--out", run])
    flags = ["--ckpt", run, "--by-size", "--json"]
    evaluate.main(["--ckpt", run, "--json", str(tmp_path / "plain.json")])
    evaluate.main([*flags, str(tmp_path / "val.json")])
    plain, row = (json.loads((tmp_path / f).read_text()) for f in ("plain.json", "val.json"))
    groups = row.pop("by_size")
    assert row == plain and sum(g["n"] for g in groups) == row["n"]
    model, _ = evaluate.load_run(run, None, common.start(device="cpu"))
    items, wanted = data.EvalSet(data.open_dataset("shapes", "val"), model.preprocess), {}
    for i, j in items.pairs:
        record = items.source.read(i)
        answer = evaluate.ask(model, record.image, record.sentences[j])
        h, w = record.image.shape[:2]
        if method == "m2ist":
            x1, y1, x2, y2 = record.box
            share, score = (x2 - x1) * (y2 - y1) / (h * w), common.box_iou(answer["box"], record.box)
        else:
            share, mask = record.mask.sum() / (h * w), answer["mask"]
            score = int((mask & record.mask).sum()), int((mask | record.mask).sum())
        low = max(s for s in (0, 1, 2, 5, 10, 20, 50) if 100 * share >= s)
        wanted.setdefault(low, []).append(score)
    metrics = common.box_metrics if method == "m2ist" else common.mask_metrics
    assert len(wanted) > 1 and [int(g.pop("size").split("-")[0]) for g in groups] == sorted(wanted)
    for group, low in zip(groups, sorted(wanted)):
        assert group == pytest.approx(metrics(wanted[low]), abs=0.05)
    assert "by the object's share of the photograph" in capsys.readouterr().out


def test_an_object_on_the_border_of_two_sizes(tmp_path, monkeypatch):
    train.main([*SMALL, "--steps", "1", "--val-every", "1", "--out", str(tmp_path / "run")])
    process = common.start(device="cpu")
    model, _ = evaluate.load_run(str(tmp_path / "run"), None, process)
    sizes = [0.99, 1.0, 2.0, 4.99, 50.0, 100.0]
    monkeypatch.setattr(evaluate, "answers", lambda *a: [(k, (1, 2 + k), s) for k, s in enumerate(sizes)])
    row = evaluate.evaluate_split(model, data.open_dataset("shapes", "val"), process, most=6, by_size=True)
    assert [(g["size"], g["n"]) for g in row["by_size"]] == [("0-1 %", 1), ("1-2 %", 1), ("2-5 %", 2), ("50-100 %", 2)]


def test_the_leak_warning_reaches_every_result(tmp_path, monkeypatch, capsys):
    for program in train, evaluate:
        monkeypatch.setattr(program, "leak", lambda method, weights, dataset:
                            f"leak: {weights} {dataset}" if weights == "random" else "")
    run, after = str(tmp_path / "run"), str(tmp_path / "after")
    train.main([*BOX, "--out", run])
    train.main([*BOX, "--tune", "method", "--dataset", "shapes-shift", "--weights", run, "--out", after])  # its encoders' own weights count
    for out, name in (run, "shapes"), (after, "shapes-shift"):
        assert json.loads((Path(out) / "metrics.json").read_text())["leak"] == f"leak: random {name}"
    evaluate.main(["--ckpt", after, "--dataset", "shapes", "--json", str(tmp_path / "val.json")])
    assert json.loads((tmp_path / "val.json").read_text())["leak"] == "leak: random shapes"
    assert capsys.readouterr().err.count("leak: random shapes-shift") == 1
    os.rename(run, tmp_path / "moved")  # what a checkpoint's encoders came from, it says itself
    assert common.read_checkpoint(after)[0]["origin"] == "random"


def test_efficiency_of_each_value_of_a_setting(capsys):
    costs.main(["--method", "m2ist", "--backbone", "tiny", "--tune", "method", "--vary", "tune,insertion"])
    table = capsys.readouterr().out.splitlines()[1:]
    names = table[0].split()
    rows = [dict(zip(names, line.split())) for line in table[1:13]]
    assert [(r["tune"], r["insertion"]) for r in rows] == [
        *((t, "side") for t in ("method", "frozen", "full", *baselines.BASELINES)), ("method", "parallel"),
        ("method", "sequential")]
    saved = {r["tune"] if r["tune"] != "method" else r["insertion"]: int(r["saved_bytes_per_image"].replace(",", ""))
             for r in rows}
    assert saved["frozen"] < saved["side"] < saved["parallel"] <= saved["sequential"] < saved["full"]
    costs.main(["--method", "m2ist", "--backbone", "tiny", "--image-size", "40", "--vary", "vl-position"])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:4]] == ["content", "attention"]
    with pytest.raises(common.UserError, match="--vary lr"):
        costs.main(["--method", "m2ist", "--backbone", "tiny", "--vary", "lr"])
