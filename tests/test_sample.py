"""sample.py: text from a run, token by token, and what it says to bad input."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hope import Hope, HopeConfig
from sample import main
from support import checkpoint

ROOT = Path(__file__).resolve().parent.parent


def run_folder(path, model="hope"):
    """A tiny run folder as train.py writes it -> its model."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "hidden": 24, "chunk": 4}
    model = Hope(HopeConfig(model=model, **sizes))
    path.mkdir()
    everything = {"model": model.config.to_dict(), "train": {}, "tokenizer": "bytes", "corpus": {}}
    (path / "config.json").write_text(json.dumps(everything))
    checkpoint.save(path, model, torch.optim.SGD(model.parameters()), 1)
    return model


def command(file, *words):
    line = [sys.executable, ROOT / file, *words]
    return subprocess.run(line, capture_output=True, text=True, errors="backslashreplace")


@pytest.mark.slow
def test_the_command_streams_text_from_a_run(tmp_path):
    run_folder(tmp_path / "x")
    words = ["generate", tmp_path / "x", "--prompt", "ab", "--n", "20", "--temperature", "0"]
    first = command("sample.py", *words)
    second = command("sample.py", *words)
    assert first.returncode == 0 and first.stderr == "", first.stderr
    assert first.stdout.startswith("ab") and len(first.stdout) > 3
    assert first.stdout == second.stdout


def test_the_command_prints_what_the_model_generates(tmp_path, capfdbinary):
    model = run_folder(tmp_path / "x")
    words = ["generate", str(tmp_path / "x"), "--prompt", "def", "--n", "9", "--seed", "5"]
    assert main(words) == 0
    torch.manual_seed(5)
    prompt = torch.tensor([list(b"def")])
    tokens = torch.cat(list(model.generate(prompt, 9, temperature=0.8))).tolist()
    text = b"".join(bytes([t]) if t < 256 else b"<|endoftext|>" for t in tokens)
    assert capfdbinary.readouterr().out == b"def" + text + os.linesep.encode()


def test_a_prompt_is_the_bytes_that_were_typed(tmp_path, monkeypatch):
    run_folder(tmp_path / "x")
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    read = []
    monkeypatch.setattr(Hope, "generate", lambda model, prompt, *a, **k: read.append(prompt) or [])
    # what Python makes of these bytes of a command line under an ASCII locale
    assert main(["generate", str(tmp_path / "x"), "--prompt", "caf\udcc3\udca9 \udcff"]) == 0
    assert read[0].tolist() == [[*"caf\u00e9 \ufffd".encode()]]
    out.flush()
    assert out.buffer.getvalue() == b"caf\xc3\xa9 \xff\n"


def test_tokens_are_drawn_in_the_precision_of_the_device(tmp_path, monkeypatch, capfdbinary):
    run_folder(tmp_path / "x")
    seen = []
    forward = Hope.forward

    def spy(*args, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(*args, **options)

    monkeypatch.setattr(Hope, "forward", spy)
    monkeypatch.setattr("sample.precision", lambda device: torch.autocast("cpu", torch.bfloat16))
    assert main(["generate", str(tmp_path / "x"), "--n", "3"]) == 0
    assert seen == [True] * 3 and not torch.is_autocast_enabled("cpu")


def test_bad_input_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("x", "torn", "other", "damaged"):
        run_folder(tmp_path / folder)
    (tmp_path / "torn/checkpoints/step-1/rest.pt").write_bytes(b"PK\x03\x04")
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "hidden": 24}
    other = Hope(HopeConfig(model="transformer", **sizes))
    checkpoint.save("other", other, torch.optim.SGD(other.parameters()), 1)
    (tmp_path / "damaged/config.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    cases = {
        "generate": "arguments are required: run",
        "generate nowhere": "nowhere is not the folder of a run",
        "generate x --temperature -1": "temperature must be a number of at least 0, got -1",
        "generate x --n -3": "n must be an integer of at least 0.*got -3",
        "generate x --top-k 0": "top_k must be an integer of at least 1, got 0",
        "generate x --top-k many": "invalid int value",
        "generate torn": "step-1 is .*truncated",
        "generate other": "is of another model",
        "generate damaged": "damaged.config.json",
        "generate x --device cuda:99": "cuda",
        "generate x --device gpu": "gpu",
        "generate x --device mps": "device mps is not supported: .*; use cpu",
        "generate x --temperature nan": "temperature must be a number of at least 0, got nan",
    }
    for words, message in cases.items():
        assert main(words.split()) == 2, words
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert error.count("\n") == 1 and error.startswith("sample.py: error: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_hope_py_names_the_command_that_generates_now():
    done = command("hope.py", "generate", "runs/x")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "hope.py: error: this command is now `python sample.py generate ...`\n"
    )
