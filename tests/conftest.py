"""Fixtures of all tests.

Where there is no GPU, kernels.py runs under Triton's interpreter, which Triton must be told before
it is imported.
"""

import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in train.py, before torch is imported

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a small text in it. No plots: they take longer than the runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.plot", lambda run: None)
    functions = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(300)]
    Path("text.py").write_text("".join(functions))
    return tmp_path


@pytest.fixture
def float64():
    """Seed 0, and float64 wherever nothing else is said."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
