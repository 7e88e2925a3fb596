"""What a newcomer sees of commands: on a pipe, on an ASCII terminal, in a folder with blanks."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest

import train
from hope import HopeConfig
from support.flags import Progress
from support.run import device_for


def ascii_pipes(monkeypatch):
    """Make stdout and stderr ASCII and no terminal -> what they get, as a function."""
    pipes = [io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", pipes[0])
    monkeypatch.setattr(sys, "stderr", pipes[1])

    def read():
        for pipe in pipes:
            pipe.flush()
        return [pipe.buffer.getvalue() for pipe in pipes]

    return read


def small(*words):
    sizes = "--set=n_layers=1 --set=d_model=16 --set=levels=[8,null] --seq-len=32 --tokens=64"
    return [*sizes.split(), "--batch-size=1", *words]


def test_a_run_on_an_ascii_pipe_ends_well_with_commands_to_paste(here, monkeypatch):
    Path("notes.txt").write_text("caf\u00e9 \u201cna\u00efve\u201d\n" * 400, encoding="utf-8")
    read = ascii_pipes(monkeypatch)
    assert train.main(small("--data=notes.txt", "--out=my run")) == 0
    out, err = (got.decode("ascii") for got in read())
    assert r"caf\xe9" in out  # the prompt and the sample, escaped
    commands = [shlex.split(line)[1:] for line in out.splitlines() if " python " in line]
    assert [words[1:3] for words in commands] == [
        ["eval.py", "my run"],
        ["train.py", "--resume"],
        ["sample.py", "generate"],
    ]
    assert commands[1][3:] == ["my run", "--tokens", "128"]
    # progress: whole lines, of the steps and of the last validation
    assert "\r" not in err and err.endswith("\n")
    lines = err.splitlines()
    assert any("step 2/2" in line for line in lines)
    assert re.search(r"100%.* tokens, 00:00 left", lines[-1])
    assert all(line.count("left") == 1 for line in lines if "%" in line)


def test_a_stopped_run_prints_how_it_goes_on(here, capsys, monkeypatch):
    monkeypatch.setattr(train, "train_steps", lambda *_: 1)
    train.main(small("--data=text.py", "--out=my run", "--tokens=96"))
    assert "  python train.py --resume 'my run'\n" in capsys.readouterr().out
    assert train.main(small("--data=text.py", "--out=my run")) == 2
    assert "continue it with --resume 'my run'\n" in capsys.readouterr().err.replace("/", "")


def test_a_refused_resume_says_what_differs(here, capsys):
    train.main(small("--data=text.py", "--out=run"))
    Path("other.py").write_text(Path("text.py").read_text()[:-9])
    capsys.readouterr()
    assert train.main(["--resume=run", "--data=other.py"]) == 2
    err = capsys.readouterr().err
    assert re.search(r"other.py' is not what run was trained on: .*; val_tokens \d+, not \d+", err)
    assert "{" not in err and "train_tokens" not in err
    assert train.main(["--resume=run", "--set=n_layers=2", "--set=chunk=4"]) == 2
    err = capsys.readouterr().err
    assert "set n_layers=1 d_model=16 levels=[8, None], not n_layers=2 chunk=4: a resumed" in err


def test_a_bar_on_a_terminal_is_one_line_that_is_written_over(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(total=3, mininterval=0) as bar:
        for _ in range(3):
            bar.update()
    assert stream.getvalue().count("\r") >= 4 and stream.getvalue().count("\n") == 1


def test_a_near_name_is_one_of_the_same_length_first():
    for wrong, right in (("350m", "340m"), ("35m", "30m"), ("70m", "30m"), ("1.5b", "1.3b")):
        with pytest.raises(ValueError, match=f"did you mean '{right}'"):
            HopeConfig.preset(wrong)


def test_apple_s_gpus_are_refused_in_one_line():
    with pytest.raises(ValueError, match="device mps is not supported: .* use cpu"):
        device_for("mps")
