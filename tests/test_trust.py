"""python -m pytest tests/test_trust.py

The same numbers however it is run, and nothing saved is lost. KILLS=30 in the environment kills a run so many times.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch

import common
import data
import evaluate
import train
from common import UserError
from toolbox import released, runs
from tests.test_commands import ROOT, SMALL, command, few_pictures, log_of  # noqa: F401
from tests.test_data import make_refer

QUICK = SMALL[2:]  # six steps of four
METHODS = evaluate.METHODS


def same_runs(a, b):
    """Two run folders with the same curve and the same weights, to the last bit."""
    states = [torch.load(run / "resume.pt", weights_only=True) for run in (a, b)]
    best = [common.read_checkpoint(str(run))[1] for run in (a, b)]
    return (log_of(a) == log_of(b) and all(torch.equal(x[k], y[k]) for x, y in [best, [s["model"] for s in states]]
                                           for k in x.keys() | y.keys())
            and all(torch.equal(p, q) for s, t in zip(*(s["optimizer"]["state"].values() for s in states))
                    for p, q in zip(s.values(), t.values()) if isinstance(p, torch.Tensor)))


# the same numbers


def test_two_processes_take_the_same_steps_as_one(tmp_path):
    """Gradients after one step and parameters after five, BatchNorm in eval mode."""
    flags = ["--batch-size", "8", "--steps", "5", "--val-every", "5", "--workers", "0", "--device", "cpu", "--weights",
             "random", "--tune", "full"]
    for world in 1, 2:
        (tmp_path / str(world)).mkdir()
        command("tests/still_batchnorm.py", tmp_path / str(world), ",".join(METHODS), *flags, world=world, check=0)
    for method in METHODS:
        one, two = (torch.cat([g.flatten() for g in torch.load(tmp_path / n / f"{method}.pt")]) for n in "12")
        assert one.norm() > 0 and (one - two).norm() < 1e-5 * one.norm(), method
        one, two = (torch.load(tmp_path / n / method / "resume.pt", weights_only=True)["model"] for n in "12")
        for k in one:
            if one[k].is_floating_point():
                assert torch.allclose(one[k], two[k], rtol=1e-4, atol=1e-4), (method, k)


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_does_not_depend_on_the_number_of_processes(tmp_path, method):
    train.main(["--method", method, *QUICK, "--steps", "2", "--val-every", "2", "--out", str(tmp_path / "run")])
    model, _ = evaluate.load_run(str(tmp_path / "run"), None, common.start(device="cpu"))
    source = data.open_dataset("shapes", "val")

    def answer(rank, world, parts):
        process = common.Process(rank, world, torch.device("cpu"))
        object.__setattr__(process, "gather", lambda thing: parts.append(thing) or parts)
        return evaluate.evaluate_split(model, source, process, batch_size=5, intervals=True, by_size=True)

    one = answer(0, 1, [])
    for world in 2, 3, 5:
        parts = []
        for rank in range(world - 1):
            with pytest.raises(AssertionError, match="not every sentence counted once"):  # others have not answered yet
                answer(rank, world, parts)
        assert answer(world - 1, world, parts) == one
    assert one["n"] == 24


def test_three_processes_and_one(tmp_path):
    train.main([*SMALL, "--out", str(tmp_path / "run")])
    make_refer(tmp_path)
    words = ["--ckpt", tmp_path / "run", "--dataset", "refcoco", "--data-root", tmp_path, "--split", "train",
             "--batch-size", 1, "--device", "cpu", "--json"]
    evaluate.main([*map(str, words), str(tmp_path / "one.json")])
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["n"] == 4 and json.loads(command("evaluate.py", *words, "-", world=3, check=0).stdout) == one


class StopAt(common.StopSignal):
    """As if a signal came when so many calls were counted, of what `count` names."""

    calls, at, number = 0, 0, property(lambda self: signal.SIGTERM if StopAt.calls >= StopAt.at else 0, lambda s, n: None)

    @classmethod
    def count(cls, monkeypatch, module, name):
        function = getattr(module, name)

        def counted(*args):
            cls.calls += 1
            return function(*args)

        monkeypatch.setattr(module, name, counted)
        monkeypatch.setattr(common, "StopSignal", cls)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_cut_five_times_is_the_unbroken_one(tmp_path, monkeypatch, method):
    flags = ["--method", method, *QUICK, "--steps", "12", "--val-every", "4"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    StopAt.count(monkeypatch, train, "learning_rate")
    cuts = sorted(random.Random(method).sample(range(1, 12), 5))
    for done, cut in zip([0, *cuts], cuts):
        StopAt.calls, StopAt.at = 0, cut - done
        assert train.main([*flags, "--out", str(tmp_path / "cut"), "--resume"]) == 128 + signal.SIGTERM
        assert torch.load(tmp_path / "cut" / "resume.pt", weights_only=True)["progress"]["step"] == cut
    StopAt.at = 1000
    assert train.main([*flags, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert same_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_signal_during_validation(tmp_path, monkeypatch):
    """It is left at once, and made up for after --resume."""
    train.main([*SMALL, "--out", str(tmp_path / "whole")])
    StopAt.count(monkeypatch, common, "intersection_union")
    for at in 5, 3, 10, 1000:  # of 12 sentences; the second resumed run is stopped in the same validation again
        StopAt.calls, StopAt.at = 0, at
        code = train.main([*SMALL, "--out", str(tmp_path / "cut"), "--resume"])
        assert code == (0 if at == 1000 else 128 + signal.SIGTERM)
        if at < 1000:
            step = torch.load(tmp_path / "cut" / "resume.pt", weights_only=True)["progress"]["step"]
            assert StopAt.calls <= at + 1 and not any(e["step"] == step and "val" in e for e in log_of(tmp_path / "cut"))
    assert same_runs(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("method", METHODS)
def test_answers_of_mixed_precision_are_not_in_16_bits(method):
    """Inside, products have 16 bits; logits and boxes, which are sums over many channels, have 32."""
    module = evaluate.load_method(method)
    model = module.Model(module.config("tiny", tune="full")).eval()
    images = torch.randn(2, 4 if model.preprocess.pad_channel else 3, *[model.preprocess.size] * 2)
    tokens = model.tokenize(["the red circle", "left"])
    with torch.no_grad():
        plain = model(images, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images, tokens)
    assert mixed.dtype == torch.float32 and not torch.equal(mixed, mixed.bfloat16().float())
    assert (mixed - plain).norm() < 0.1 * plain.norm()


# nothing saved is lost


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if not p.name.startswith(".")}


def test_a_run_that_is_killed_goes_on(tmp_path):
    """kill -9 at random moments of a run that saves after every step, then --resume, as often as it takes."""
    chance, steps, moments = random.Random(0), [], int(os.environ.get("KILLS", "3"))
    last = 30 if moments > 3 else 12
    flags = [*SMALL, "--steps", last, "--val-every", "1", "--batch-size", "2", "--log-every", "7"]
    for n in range(moments):
        process = subprocess.Popen([sys.executable, "train.py", *map(str, flags), "--out", tmp_path / "run", "--resume"], cwd=ROOT,
                                   stderr=subprocess.PIPE, text=True)
        until = time.time() + (chance.uniform(1, 9) if n % 3 == 0 else 60)  # any time, also while it starts
        savings, seen, before = chance.randrange(1, 5), len(steps) and steps[-1], set()
        while process.poll() is None and time.time() < until:  # or after some savings, or in the middle of one
            with suppress(OSError):
                before.add((tmp_path / "run" / "resume.pt").stat().st_mtime_ns)
            if len(before) > savings and (n % 3 == 1 or list((tmp_path / "run").glob(".*.*.*"))):
                break
        process.kill()
        _, said = process.communicate()
        assert "Traceback" not in said and "error:" not in said, said
        if (tmp_path / "run" / "resume.pt").exists():
            steps.append(runs.load_resume(tmp_path / "run" / "resume.pt")["progress"]["step"])
            assert steps[-1] >= seen
            if (tmp_path / "run" / "model.safetensors").exists():  # not before the end of the first validation
                common.read_checkpoint(str(tmp_path / "run"))  # whole
    command("train.py", *flags, "--out", tmp_path / "run", "--resume", check=0)
    assert runs.load_resume(tmp_path / "run" / "resume.pt")["progress"]["step"] == last
    assert not list((tmp_path / "run").glob(".*.*.*"))  # what the killed ones left is gone
    if moments > 3:
        print("killed at steps", steps)
    command("train.py", *flags, "--out", tmp_path / "whole", check=0)
    assert same_runs(tmp_path / "whole", tmp_path / "run")


def test_a_run_is_saved_between_validations(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_MINUTES", 0)
    monkeypatch.setattr(common, "StopSignal", StopAt)
    StopAt.calls, StopAt.at, saved = 0, 1000, []
    write = common.writing
    monkeypatch.setattr(common, "writing", lambda path: saved.append(path.name) or write(path))
    train.main([*SMALL, "--val-every", "6", "--out", str(tmp_path / "run")])
    assert saved.count("resume.pt") == 6 and saved.count("model.safetensors") == 1
    train.main([*SMALL, "--val-every", "6", "--out", str(tmp_path / "again")])
    assert same_runs(tmp_path / "run", tmp_path / "again")


def test_a_full_disk_leaves_what_was_saved(tmp_path):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(common, "StopSignal", StopAt)
        StopAt.calls, StopAt.at = 0, 0  # stopped after the first step
        train.main([*SMALL, "--out", str(out)])
    before = digests(out)
    for limit in 1000, 6_000_000:  # bytes that a file may have: too few for the log, or in the middle of resume.pt
        result = command("train.py", *SMALL, "--out", out, "--resume",
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith(f"error: {out}/")
        assert "cannot be written: File too large" in result.stderr
        after = digests(out)
        assert {k: after[k] for k in before if k != "log.jsonl"} == {k: before[k] for k in before if k != "log.jsonl"}
    train.main([*SMALL, "--out", str(out), "--resume"])
    train.main([*SMALL, "--out", str(tmp_path / "whole")])
    assert same_runs(tmp_path / "whole", out)


@pytest.mark.parametrize("place", ["/proc/nowhere", "{}/file/below"])
def test_a_place_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train.main([*SMALL, "--out", place.format(tmp_path)])


def test_a_run_folder_in_use(tmp_path):
    code = f"import pathlib; from toolbox import runs; f = runs.lock(pathlib.Path({str(tmp_path / 'run')!r}), False); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(UserError, match="in use by another process"):
        train.main([*SMALL, "--out", str(tmp_path / "run")])
    other.kill()
    other.wait()
    train.main([*SMALL, "--out", str(tmp_path / "run")])
    with pytest.raises(UserError, match="holds a run already"):
        train.main([*SMALL, "--out", str(tmp_path / "run")])


def test_a_refused_command_leaves_no_folder_behind(tmp_path):
    with pytest.raises(UserError, match="--data-root DATA"):
        train.main([*SMALL, "--dataset", "refcoco", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_lost_resume_file_costs_no_model(tmp_path):
    train.main([*SMALL, "--out", str(tmp_path / "run")])
    (tmp_path / "run" / "resume.pt").unlink()
    before = digests(tmp_path / "run")
    with pytest.raises(UserError, match="holds a model but no resume.pt"):
        train.main([*SMALL, "--out", str(tmp_path / "run"), "--resume"])
    assert digests(tmp_path / "run") == before


@pytest.mark.parametrize("line", [b"\xff\n", b"[1]\n", b'{"a": 1}\n', b'{"step": "x"}\n'])
def test_a_damaged_log_is_cut_where_it_is_damaged(tmp_path, line):
    file = tmp_path / "log.jsonl"
    lines = b'{"step": 1, "loss": 2}\n{"step": 2, "loss": 2}\n{"step": 2, "val": {}}\n'
    file.write_bytes(lines + line + b'{"step": 2}\n')
    assert runs.read_log(file, 2) == [json.loads(text) for text in lines.splitlines()]
    assert runs.read_log(file, 1) == [dict(step=1, loss=2)]  # what comes after the saved step will come again
    assert runs.read_log(tmp_path / "none", 2) == []


@pytest.mark.parametrize("name", ["model.safetensors", "resume.pt"])
def test_a_damaged_checkpoint_is_known(tmp_path, name):
    """Cut off, or a bit flipped: an error in one sentence, or the very same content (a bit that means nothing)."""
    train.main([*SMALL, "--steps", "1", "--val-every", "1", "--out", str(tmp_path / "run")])
    file, rng = tmp_path / "run" / name, np.random.default_rng(0)
    whole = file.read_bytes()

    def content():
        if name == "resume.pt":
            saved = runs.load_resume(file)
            return saved["model"], {k: saved[k] for k in ("progress", "identity")}
        info, state = common.read_checkpoint(str(file))
        return state, info

    state, info = content()
    header = [int(v) for v in rng.integers(0, 3000, 60)] + [len(whole) - int(v) for v in rng.integers(1, 9000, 60)]
    refused = 0
    for position in [*header, *(int(v) for v in rng.integers(0, len(whole), 60))]:
        broken = bytearray(whole)
        broken[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(broken)
        try:
            other, other_info = content()
        except UserError as e:
            refused += 1
            assert str(file) in str(e) and "\n" not in str(e)
        else:
            assert other_info == info and all(torch.equal(other[k], state[k]) for k in state), position
    assert refused > 100
    for length in [0, 1, 100, *(int(v) for v in rng.integers(0, len(whole), 20)), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(UserError):
            content()
    if name == "resume.pt":
        best = digests(tmp_path / "run")["model.safetensors"]
        with pytest.raises(UserError, match="resume.pt cannot be read"):
            train.main([*SMALL, "--steps", "1", "--val-every", "1", "--out", str(tmp_path / "run"), "--resume"])
        assert digests(tmp_path / "run")["model.safetensors"] == best
    else:
        with pytest.raises(UserError, match="not a whole safetensors file"):
            evaluate.main(["--ckpt", str(tmp_path / "run")])


def test_a_resume_file_of_another_run(tmp_path):
    for name, flags in ("a", []), ("b", ["--backbone", "tiny", "--variant", "detris"]), ("c", ["--image-size", "32"]):
        train.main([*SMALL, *flags, "--steps", "1", "--val-every", "1", "--out", str(tmp_path / name)])
    train.main(["--method", "etris", *QUICK, "--steps", "1", "--val-every", "1", "--out", str(tmp_path / "d")])
    for other, what in ("b", "variant = detris, not dcris"), ("c", "image_size = 32, not 64"), ("d", "= "):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(tmp_path / other, tmp_path / "x")
        with pytest.raises(UserError, match=f"--resume: .* was started with .*{what}"):
            train.main([*SMALL, "--steps", "1", "--val-every", "1", "--out", str(tmp_path / "x"), "--resume"])
    shutil.copy(tmp_path / "d" / "resume.pt", tmp_path / "a" / "resume.pt")
    with pytest.raises(UserError, match="resume.pt is of a run with other settings or towers"):
        train.main([*SMALL, "--steps", "1", "--val-every", "1", "--out", str(tmp_path / "a"), "--resume"])


def test_a_checkpoint_does_not_say_what_files_are_opened(tmp_path):
    train.main([*SMALL, "--steps", "1", "--val-every", "1", "--out", str(tmp_path / "run")])
    info, state = common.read_checkpoint(str(tmp_path / "run"))
    info |= dict(frozen="x", weights="/etc/passwd")
    info["config"]["tune"], state = "frozen", {k: v for k, v in state.items() if not k.startswith(("vision.", "text."))}
    data_ = common.save(state, {"refpapers": json.dumps(info | dict(sha256=common.checksum(info, state)))})
    (tmp_path / "x.safetensors").write_bytes(data_)
    with pytest.raises(UserError, match="'/etc/passwd', are no files of weights"):
        evaluate.main(["--ckpt", str(tmp_path / "x.safetensors")])


def test_names_that_are_too_long(tmp_path):
    name = "a" * 300
    for words in (["train.py", *SMALL, "--out", name], ["evaluate.py", "--ckpt", name],
                  ["data.py", "--check", "--data-root", name]):
        result = command(*words, check=2)
        assert result.stderr.startswith("error: ") and "File name too long" in result.stderr
        assert "Traceback" not in result.stderr


def test_figures_on_another_data_set_of_the_same_photographs_say_so(tmp_path, capsys):
    make_refer(tmp_path)
    shutil.copytree(tmp_path / "refcoco", tmp_path / "refcoco+")
    flags = ["--dataset", "refcoco", "--data-root", str(tmp_path), "--backbone", "tiny", "--steps", "1", "--batch-size", "2"]
    train.main([*SMALL, *flags, "--out", str(tmp_path / "run")])
    for name, said in ("refcoco", False), ("refcoco+", True):
        capsys.readouterr()
        evaluate.main(["--ckpt", str(tmp_path / "run"), "--dataset", name, "--data-root", str(tmp_path)])
        assert ("may show photographs of refcoco+'s" in capsys.readouterr().err) == said


# what stops a run


def test_too_little_memory_names_the_batch_and_the_flag(tmp_path, monkeypatch):
    import dcris
    errors = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
              RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you")]
    for n, error in enumerate(errors):
        def forward(*args):
            raise error
        monkeypatch.setattr(dcris.DCRIS, "forward", forward)
        with pytest.raises(UserError, match="memory is not enough for 3 pictures .* --accumulate 3 .*memory"):
            train.main([*SMALL, "--batch-size", "6", "--accumulate", "2", "--out", str(tmp_path / str(n))])


def test_a_gradient_that_is_no_number_stops_before_it_is_saved(tmp_path, monkeypatch):
    import dcris
    loss, calls = dcris.DCRIS.loss, []

    def poisoned(*args):
        calls.append(1)
        out = loss(*args)
        if len(calls) == 3:  # at the step of a validation
            out.register_hook(lambda g: g * float("nan"))
        return out

    monkeypatch.setattr(dcris.DCRIS, "loss", poisoned)
    with pytest.raises(UserError, match="the gradient's norm is nan at step 3, .*shapes/train picture"):
        train.main([*SMALL, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "resume.pt").exists()


def test_a_worker_that_dies_is_a_sentence(tmp_path, monkeypatch):
    read = data.TrainSet.__getitem__

    def dies(self, index):
        if torch.utils.data.get_worker_info() is not None and index[1] == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    c = train.parse(SMALL)[1]
    batches = list(train.micro_batches(80, c, 0, range(6), common.Process(0, 1, torch.device("cpu")), 1))
    wanted = batches[4][2][1]
    monkeypatch.setattr(data.TrainSet, "__getitem__", dies)
    with pytest.raises(UserError, match="DataLoader worker .* is killed .*--workers 0 reads in the process"):
        train.main([*SMALL, "--workers", "1", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "config.json").exists()


# metrics


def test_intervals_are_those_of_photographs():
    rng = np.random.default_rng(1)
    rows = [(int(i), int(u)) for u in rng.integers(50, 100, 300) for i in [rng.integers(0, u)]]
    pictures = [n // 3 for n in range(300)]
    found = common.mask_intervals(rows, pictures)
    iou = np.array([i / u for i, u in rows])
    by_hand = []
    for _ in range(4000):
        drawn = rng.integers(100, size=100)
        by_hand.append(100 * np.mean([iou[3 * d + k] for d in drawn for k in range(3)]))
    assert found["mIoU_95"] == pytest.approx(np.percentile(by_hand, [2.5, 97.5]), abs=0.5)
    metrics = common.mask_metrics(rows)
    for name in "oIoU", "mIoU":
        assert found[f"{name}_95"][0] < metrics[name] < found[f"{name}_95"][1]
    twice = common.mask_intervals(rows * 2, pictures * 2)  # the same expressions again are no new photographs
    assert twice == found and common.mask_intervals(rows, pictures) == found
    narrow = common.mask_intervals(rows, list(range(300)))["mIoU_95"]
    boxes = common.box_intervals(iou.tolist(), list(range(300)))
    assert boxes["mIoU_95"] == narrow and boxes["Acc@0.5_95"][0] < 100 * (iou >= 0.5).mean() < boxes["Acc@0.5_95"][1]
    assert common.mask_intervals([(3, 4)], [0])["mIoU_95"] == [75, 75]


def cubic(x, a=-0.75):
    x = np.abs(x)
    return np.where(x <= 1, (a + 2) * x**3 - (a + 3) * x**2 + 1,
                    np.where(x < 2, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a, 0))


@pytest.mark.parametrize("size", [(20, 50), (61, 33), (40, 40)])
def test_the_released_protocol_by_hand(size):
    """Pixel k of the logits lies at k * (S - 1) / (n - 1) of the canvas; a photograph's pixel x at s x + its margin."""
    pre, (h, w) = common.Preprocess(32), size
    p = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    at, k = np.arange(32) * 7 / 31, np.arange(-2, 11)  # repeated edges
    up = cubic(at[:, None] - k) @ np.eye(8)[np.clip(k, 0, 7)]
    canvas = up @ p.double().numpy() @ up.T
    s = min(32 / h, 32 / w)
    down = [cubic((np.arange(n) * s + (32 - n * s) / 2)[:, None] - np.arange(32)) for n in (h, w)]  # 0 outside
    expected = down[0] @ canvas @ down[1].T
    assert np.allclose(released.unwarped(p, size, pre).numpy(), expected, atol=1e-4)


def test_protocols(tmp_path, monkeypatch, capsys):
    rows = {}
    for method in METHODS:
        run = str(tmp_path / method)
        low = [] if method == "m2ist" else ["--threshold", "0.1"]  # after six steps hardly a pixel is above 0.35
        train.main(["--method", method, *QUICK, *low, "--out", run])
        for protocol in evaluate.PROTOCOLS:
            if method == "shared_ris" and protocol != "default":
                with pytest.raises(UserError, match="the authors of shared_ris released no code"):
                    evaluate.main(["--ckpt", run, "--protocol", protocol])
                continue
            evaluate.main(["--ckpt", run, "--protocol", protocol, "--json", str(tmp_path / "x.json")])
            row = rows[method, protocol] = json.loads((tmp_path / "x.json").read_text())
            assert row["protocol"] == protocol and row["n"] == 24
            assert protocol in capsys.readouterr().out
            main = evaluate.MAIN_METRIC["box" if method == "m2ist" else "mask"]
            low, high = row[f"{main}_95"]
            assert low <= row[main] <= high
    assert rows["dcris", "released"]["mIoU"] != rows["dcris", "default"]["mIoU"]
    source, pre = data.open_dataset("shapes", "val"), common.Preprocess(64)
    monkeypatch.setattr(source, "count", lambda i: 3)
    assert data.EvalSet(source, pre, first=True).pairs == [(i, 0) for i in range(24)]


def test_areas_after_the_way_back_are_pycocotools_own():
    """A polygon's mask, to the canvas and back with perfect logits, keeps its area."""
    from pycocotools import mask as coco
    rng = np.random.default_rng(0)
    for size in (333, 500), (480, 640), (427, 200):
        h, w = size
        for fit in "letterbox", "stretch":
            pre = common.Preprocess(416, fit)
            x, y, r = rng.uniform(0.4, 0.6) * w, rng.uniform(0.4, 0.6) * h, 0.3 * min(size)
            polygon = [float(v) for a in np.linspace(0, 2 * np.pi, 12, endpoint=False)
                       for v in (x + r * np.cos(a), y + r * np.sin(a))]
            rle = coco.frPyObjects([polygon], h, w)
            mask = coco.decode(coco.merge(rle)).astype(bool)
            logits = 20 * data.mask_to_canvas(mask, pre) - 10
            back = evaluate.predicted_mask(data.from_canvas(logits, size, pre), 0.5)
            assert int(back.sum()) == pytest.approx(float(coco.area(rle)[0]), rel=0.01)
            i, u = common.intersection_union(back, torch.from_numpy(mask))
            assert i / u > 0.98


def test_box_metrics_against_a_slow_count():
    rng, ious = np.random.default_rng(0), []
    for n in range(3000):
        a, b = (np.sort(rng.integers(0, 12, (2, 2)), 0).T for _ in range(2))
        cells = [{(x, y) for x in range(*box[0]) for y in range(*box[1])} for box in (a, b)]
        union = len(cells[0] | cells[1])
        slow = len(cells[0] & cells[1]) / union if cells[0] and cells[1] else 0.0
        fast = common.box_iou(*((box[0][0], box[1][0], box[0][1], box[1][1]) for box in (a, b)))
        assert fast == pytest.approx(slow, abs=1e-12)
        ious.append(fast)
    metrics = common.box_metrics(ious)
    assert metrics == {"n": 3000, "Acc@0.5": round(100 * sum(v >= 0.5 for v in ious) / 3000, 4),
                       "mIoU": round(100 * sum(ious) / 3000, 4)}
