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
from torch.utils._pytree import tree_map_only

from hope import Hope, HopeConfig
from sample import Ending, main
from support import checkpoint
from support.checkpoint import load_state, save_state
from support.run import Run

ROOT = Path(__file__).resolve().parent.parent


def run_folder(path, model="hope", **sizes):
    """A tiny run folder as train.py writes it -> its model."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "hidden": 24, "chunk": 4} | sizes
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
    monkeypatch.setattr(
        Hope, "generate_with_state", lambda model, prompt, *a, **k: read.append(prompt) or []
    )
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


def written(capfdbinary, *words):
    """What a command of sample.py writes to stdout."""
    assert main([str(word) for word in words]) == 0
    return capfdbinary.readouterr().out


def type_in(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


def test_every_flag_of_the_drawing_reaches_the_sampler(tmp_path, monkeypatch, capfdbinary):
    run_folder(tmp_path / "x")
    how = []
    spy = lambda model, tokens, n, state, **given: how.append(given) or []  # noqa: E731
    monkeypatch.setattr(Hope, "generate_with_state", spy)
    words = "--repetition-penalty 1.3 --top-k 7 --temperature 0.5 --top-p 0.9 --min-p 0.05"
    for command in ("generate", "chat"):
        type_in(monkeypatch, b"ab\n")
        written(capfdbinary, command, tmp_path / "x", *words.split())
    wanted = {"repetition_penalty": 1.3, "top_k": 7, "temperature": 0.5, "top_p": 0.9}
    assert how == [wanted | {"min_p": 0.05}] * 2


def test_a_prompt_may_come_from_a_file_or_stdin(tmp_path, monkeypatch, capfdbinary):
    run_folder(tmp_path / "x")
    words = ["generate", tmp_path / "x", "--n", "5"]
    (tmp_path / "prompt").write_bytes("caf\u00e9\n".encode())
    expected = written(capfdbinary, *words, "--prompt", "caf\u00e9\n")
    assert written(capfdbinary, *words, "--prompt-file", tmp_path / "prompt") == expected
    type_in(monkeypatch, "caf\u00e9\n".encode())
    assert written(capfdbinary, *words, "--prompt-file", "-") == expected


def test_samples_are_the_rows_of_a_batch(tmp_path, capfdbinary):
    model = run_folder(tmp_path / "x")
    out = written(capfdbinary, "generate", tmp_path / "x", "--prompt=ab", "--n=6", "--samples=3")
    torch.manual_seed(0)
    tokens = list(model.generate(torch.tensor([list(b"ab")] * 3), 6, temperature=0.8))
    expected = b""
    for number, row in enumerate(torch.stack(tokens, 1).tolist(), 1):
        text = b"".join(bytes([t]) if t < 256 else b"<|endoftext|>" for t in row)
        expected += f"--- sample {number} of 3 ---\n".encode() + b"ab" + text + b"\n"
    assert out == expected


@pytest.mark.parametrize(
    "pieces, stops, shown",
    [
        ([b"ab", b"c", b"d"], [], [b"ab", b"c", b"d", b""]),
        ([b"ab", b"cd", b"e"], ["bc"], [b"a", b"", b"", b""]),  # the end of a piece begins a stop
        ([b"ab", b"de", b"f"], ["bc"], [b"a", b"bde", b"f", b""]),  # and proves to be none
        ([b"x\n", b"\n"], ["\n\n\n"], [b"x", b"", b"\n\n"]),  # kept to the end, then shown
        ([b"aab", b"c"], ["ab", "c"], [b"a", b"", b""]),
        ([b"\xc3", b"\xa9!"], ["\u00e9"], [b"", b"", b""]),  # in the middle of a character
    ],
)
def test_text_ends_before_a_stop_string_wherever_it_is_cut(pieces, stops, shown):
    ending = Ending(stops)
    assert [*map(ending.add, pieces), ending.kept] == shown


def test_a_stop_string_ends_the_writing(tmp_path, monkeypatch, capfdbinary):
    run_folder(tmp_path / "x")
    words = ["generate", tmp_path / "x", "--prompt=ab", "--n=30"]
    text = written(capfdbinary, *words)[2:-1]
    forwards = []
    generate = Hope.generate_with_state

    def spy(*args, **how):
        for drawn in generate(*args, **how):
            forwards.append(drawn)
            yield drawn

    monkeypatch.setattr(Hope, "generate_with_state", spy)
    stop = os.fsdecode(text[9:11])
    out = written(capfdbinary, *words, "--stop", stop, "--stop", "never, never")
    assert out == b"ab" + text[: text.index(text[9:11])] + b"\n"
    assert len(forwards) < 30


def test_chat_keeps_one_state_of_all_that_was_typed_and_written(tmp_path, monkeypatch, capfdbinary):
    model = run_folder(tmp_path / "x")
    lines = [b"def f(x):\n", b"    return\n", b"no line end"]
    type_in(monkeypatch, b"".join(lines))
    out = written(capfdbinary, "chat", tmp_path / "x", "--n=7", "--temperature=0")
    expected = b""
    read = b""
    for line in lines:
        read += line
        tokens = torch.tensor([list(read)])
        reply = bytes(int(token) for token in model.generate(tokens, 7, temperature=0))
        read += reply
        expected += reply + b"\n"
    assert out == expected


def test_a_saved_chat_goes_on_in_another_process_with_the_same_logits(tmp_path, monkeypatch):
    model = run_folder(tmp_path / "x", levels=[4, None])
    assert model.config.cms_updates == "first_order"  # it learns while it reads
    words = [sys.executable, ROOT / "sample.py", "chat", tmp_path / "x", "--n=9", "--temperature=0"]
    text = f"import os\nimport\n/save {tmp_path}/a state\n".encode()
    done = subprocess.run(words, input=text, capture_output=True)
    said = f"/save {tmp_path}/a state: the state after 35 tokens\n"
    assert done.returncode == 0 and done.stderr.decode() == said, done.stderr
    # what it read: both lines and both replies, without the line ends that chat adds
    first, second = done.stdout[:9], done.stdout[10:19]
    read = torch.tensor([list(b"import os\n" + first + b"import\n" + second)])
    state = load_state(tmp_path / "a state")
    more = torch.tensor([list(b"def")])
    with torch.no_grad():
        text = torch.cat([read, more], 1)
        whole = model(text)[0][:, -3:]
        # the text was cut otherwise: learning enlarges the rounding
        assert torch.allclose(model(more, state)[0], whole, atol=2e-3)
        assert not torch.allclose(model(more)[0], whole, atol=0.1)  # the state matters
        frozen = model(text, updates="off")[0][:, -3:]
        assert not torch.allclose(frozen, whole, atol=0.1)  # and what was learned, too
    out = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", out)
    type_in(monkeypatch, f"junk\n/load {tmp_path}/a state\ndef".encode())
    assert main(["chat", str(tmp_path / "x"), "--n=9", "--temperature=0"]) == 0
    out.flush()
    expected = bytes(int(t) for t in model.generate(more, 9, state, temperature=0))
    assert out.buffer.getvalue()[10:] == expected + b"\n"


def test_reset_forgets_everything(tmp_path, monkeypatch, capfdbinary):
    run_folder(tmp_path / "x")
    words = ["chat", tmp_path / "x", "--n=12", "--temperature=0"]
    type_in(monkeypatch, b"abc\n/reset\nabc\nabc\n")
    first, second, third = written(capfdbinary, *words).split(b"\n", 2)
    assert first == second != third.rstrip(b"\n")


def test_bad_lines_of_a_chat_end_it_on_a_pipe_and_not_on_a_terminal(tmp_path, monkeypatch, capsys):
    run_folder(tmp_path / "x")
    other = run_folder(tmp_path / "other", "transformer")
    save_state(other(torch.tensor([[1]]))[1], tmp_path / "state")
    own = Run.open(tmp_path / "x", "cpu").model(torch.tensor([[1]]))[1]
    save_state(own | {"blocks": None}, tmp_path / "empty")
    save_state(own | {"position": "1"}, tmp_path / "text")
    cut = tree_map_only(torch.Tensor, lambda t: t[..., 1:], own)
    save_state(cut, tmp_path / "cut")
    words = ["chat", str(tmp_path / "x"), "--n=3"]
    cases = {
        "/sav a": "must be /save FILE, /load FILE or /reset .*: /sav a",
        "/save": "must be /save FILE",
        f"/save {tmp_path}/a": "nothing was read yet",
        "/load nowhere": "nowhere",
        f"/load {tmp_path}/state": "state must be of a model whose model is 'hope'",
        f"/load {tmp_path}/x/config.json": "config.json",
        f"/load {tmp_path}/empty": "empty holds no state that this model can read",
        f"/load {tmp_path}/text": "text holds no state that this model can read",
        f"/load {tmp_path}/cut": "cut holds no state that this model can read",
    }
    monkeypatch.setattr("sample.show", lambda row, text: print(ascii(text), end=""))
    for line, message in cases.items():
        type_in(monkeypatch, f"{line}\n".encode())
        assert main(words) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1, error
    type_in(monkeypatch, "".join(f"{line}\n" for line in cases).encode() + b"ab\n")
    sys.stdin.isatty = lambda: True
    assert main([*words, "--temperature=0"]) == 0
    out, err = capsys.readouterr()
    assert err.count("error: ") == len(cases) and out.startswith("> " * (len(cases) + 1))
    assert len(out) > 2 * (len(cases) + 2)  # the last line was answered


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
        "generate x --n -3": "n: must be a whole number of at least 0.*got '-3'",
        "generate x --top-k 0": "top_k must be an integer of at least 1, got 0",
        "generate x --top-k many": "invalid int value",
        "generate torn": "step-1 is .*truncated",
        "generate other": "is of another model",
        "generate damaged": "damaged.config.json",
        "generate x --device cuda:99": "cuda",
        "generate x --device gpu": "gpu",
        "generate x --device mps": "device must be auto or cpu where torch sees no GPU of Apple",
        "generate x --temperature nan": "temperature must be a number of at least 0, got nan",
        "generate x --top-p 0": "top_p must be a number above 0 and at most 1, got 0.0",
        "generate x --min-p 1.5": "min_p must be a number from 0 to 1, got 1.5",
        "generate x --repetition-penalty 0": "repetition_penalty must be a number above 0, got 0.0",
        "generate x --samples 0": "whole number of at least 1, .* got '0'",
        "generate x --prompt a --prompt-file b": "not allowed with argument --prompt",
        "generate x --prompt-file nowhere": "nowhere",
        "generate x --stop=": "stop must be a text that is not empty, got ''",
        "chat": "arguments are required: run",
        "chat nowhere": "nowhere is not the folder of a run",
        "chat x --temperature -1": "temperature must be a number of at least 0, got -1",
    }
    for words, message in cases.items():
        assert main(words.split()) == 2, words
        out, error = capsys.readouterr()
        assert re.search(message, error) and not out, (out, error)
        assert error.count("\n") == 1 and error.startswith("sample.py: error: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_hope_py_names_the_command_that_generates_now():
    done = command("hope.py", "generate", "runs/x")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "hope.py: error: this command is now `python sample.py generate ...`\n"
    )
