"""What keeps the tests short."""

import os

# for subprocesses too: threads of several workers of pytest-xdist would wait for one another; torch reads it once
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

import train  # noqa: E402


@pytest.fixture(autouse=True)
def one_sample(monkeypatch):
    """One expression on samples.png: twelve take almost half the time of a short run."""
    sheet = train.draw_examples
    monkeypatch.setattr(train, "draw_examples", lambda file, model, source, count, **flags:
                        sheet(file, model, source, 1, **flags))
