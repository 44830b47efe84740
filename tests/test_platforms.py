"""python -m pytest tests/test_platforms.py   (systems and environments that are not this one, played)"""

import sys
import types

import pytest
import torch

import common
import train
from common import UserError
from toolbox import runs
from tests.test_commands import SMALL, few_pictures  # noqa: F401


@pytest.mark.parametrize("capability, amp", [((7, 5), "fp16"), ((8, 0), "bf16")])
def test_bf16_only_where_the_gpu_has_it(monkeypatch, capability, amp):
    def supported(including_emulation=True):  # torch's own answer: emulation counts unless it is asked not to
        return including_emulation or capability >= (8, 0)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert train.choose_amp("auto", torch.device("cuda:0")) == amp
    assert train.choose_amp("bf16", torch.device("cuda:0")) == "bf16"
    assert train.choose_amp("auto", torch.device("mps")) == train.choose_amp("auto", torch.device("cpu")) == "off"


def test_without_resource_and_fcntl_as_on_windows(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    train.main([*SMALL, "--out", str(tmp_path / "run")])
    assert "cannot be locked" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_peak_memory_in_the_units_of_the_system(monkeypatch):
    usage = types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: types.SimpleNamespace(ru_maxrss=2**30))
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert runs.peak_memory(torch.device("cpu")) == 1  # macOS counts bytes
    monkeypatch.setattr(sys, "platform", "linux")
    assert runs.peak_memory(torch.device("cpu")) == 1024


@pytest.mark.parametrize("name, value, message", [
    ("WORLD_SIZE", "2", "WORLD_SIZE=2 is set in the environment, but RANK is not: unset WORLD_SIZE"),
    ("WORLD_SIZE", "two", "WORLD_SIZE=two is set in the environment, and is no number"),
    ("RANK", "", "RANK= is set in the environment, and is no number")])
def test_what_torchrun_left_in_the_environment(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        common.start()


def test_a_group_that_cannot_be_joined(monkeypatch):
    for name, value in dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="none").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="2 processes cannot be joined at MASTER_ADDR=127.0.0.1, MASTER_PORT=none"):
        common.start()


def test_mps_where_torch_has_it(monkeypatch):
    with pytest.raises(UserError, match="--device mps: torch finds no Apple GPU here"):
        common.start(device="mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert common.start(device="mps").device.type == "mps"
