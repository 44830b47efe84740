"""python -m pytest tests/test_rehearsal.py"""

import importlib.util
import json
from pathlib import Path

import pytest

from data import open_dataset
from toolbox import check

spec = importlib.util.spec_from_file_location("rehearsal", Path(__file__).parents[1] / "docs" / "rehearsal.py")
rehearsal = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rehearsal)


def test_the_folder_is_whole_and_has_the_share_of_each_split(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "made"
    rehearsal.main([str(folder), "--share", "0.002"])
    assert check.main(["--check", "--data-root", str(folder), "--json", "-"]) == 0
    found, = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert {r["split"]: (r["images"], r["objects"], r["sentences"]) for r in found["splits"]} == dict(
        train=(33, 84, 241), val=(3, 7, 21), testA=(1, 3, 11), testB=(1, 3, 10))
    record = open_dataset("refcoco", "val", str(folder)).read(0)
    assert record.image.shape == (480, 640, 3) and record.mask.any() and len(record.sentences) == 3


def test_the_whole_has_the_published_sizes():
    sizes = {split: row[1:] for split, row in rehearsal.SPLITS.items()}
    assert sizes == check.PUBLISHED["refcoco"] and sum(row[0] for row in rehearsal.SPLITS.values()) == 19994


def test_results_that_must_be_the_same():
    rehearsal.must_be_same("runs", [1.0], [1.0])
    with pytest.raises(SystemExit, match="the two runs differ"):
        rehearsal.must_be_same("the two runs", [1.0], [1.5])


@pytest.mark.parametrize("words", [["--share", "0.5"], ["--share", "0"], ["--measure", "opening"]])
def test_what_cannot_be_made_or_measured_is_refused(tmp_path, words, capsys):
    with pytest.raises(SystemExit):
        rehearsal.main([str(tmp_path / "made"), *words])
    assert "must be at most 0.1, or 1" in capsys.readouterr().err and not (tmp_path / "made").exists()
