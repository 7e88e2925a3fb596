"""What a newcomer sees of commands: on a pipe, on an ASCII terminal, in a folder with blanks."""

import functools
import io
import json
import re
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import baselines
import train
from hope import Hope, HopeConfig
from support.config import TrainConfig, parse
from support.flags import Progress
from support.run import device_for, resumed


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


# --------------------------------------------------------------------------------------------------
# Files of settings, and what is listed


def settings_of(run):
    train = json.loads(Path(run, "config.json").read_text())["train"]
    return {name: value for name, value in train.items() if name != "out"}


def test_a_run_s_config_json_makes_the_same_run_and_flags_override_it(here, capsys):
    assert train.main(small("--data=text.py", "--out=a", "--lr=1e-3")) == 0
    assert train.main(["--config=a/config.json", "--out=b"]) == 0
    assert settings_of("a") == settings_of("b")
    bits = [re.findall(r"[\d.]+ bits per byte on", capsys.readouterr().out)]
    assert len(bits[0]) == 2 and len(set(bits[0])) == 1
    words = "--config=a/config.json --lr=2e-3 --set=levels=[4,null] --set=conv=0".split()
    own = {"n_layers": 1, "d_model": 16, "levels": [4, None], "conv": 0}
    assert asdict(parse(words, "", resumed)) == settings_of("a") | {
        "out": None, "lr": 2e-3, "set": own
    }
    # with --resume: nothing differs, so nothing is refused
    assert parse(["--resume=a", "--config=a/config.json"], "", resumed).resume == "a"


TOML = """
data = "text.py"
tokens = 64
batch-size = 1
seq_len = 32
out = "a"
eval_every = 0
[set]
n_layers = 1
d_model = 16
levels = "[8, null]"
adaptive = ["k"]
mode = "token"
"""


def test_a_toml_file_says_what_flags_say(here, monkeypatch):
    pytest.importorskip("tomllib")
    Path("my.toml").write_text(TOML)
    assert train.main(["--config=my.toml", "--set=mode=boundary"]) == 0
    found = settings_of("a")
    assert (found["batch_size"], found["seq_len"], found["eval_every"]) == (1, 32, 0)
    own = {"n_layers": 1, "d_model": 16, "levels": [8, None], "adaptive": ["k"], "mode": "boundary"}
    assert found["set"] == own
    planned = []
    monkeypatch.setattr("support.plan.report", lambda config, *rest: planned.append(config))
    assert train.main(["--config=my.toml", "--out=b", "--dry-run"]) == 0
    assert planned[0].set["levels"] == [8, None] and planned[0].out == "b"


def test_a_bad_file_of_settings_is_named_in_one_line(here, capsys):
    pytest.importorskip("tomllib")
    before = sorted(here.rglob("*"))
    cases = {
        "": (None, "config 'c.toml' must be .*No such file"),
        "lr = ": ("c.toml", "config 'c.toml' must be TOML or a run's config.json: Invalid value"),
        "learning_rate = 1": ("c.toml", "unknown field of TrainConfig 'learning_rate': .* lr,"),
        "batch_size = 0": ("c.toml", "batch_size must be at least 1, got 0"),
        "fsdp = 'yes'": ("c.toml", "fsdp must be true or false, got 'yes'"),
        "set = 3": ("c.toml", "config 'c.toml' must be"),
        "set.depth = 2024-01-01": ("c.toml", "config 'c.toml' must be .* not JSON serializable"),
        "set = " + "[" * 9_999: ("c.toml", "config 'c.toml' must be .* recursion"),
        "preset = ['nano']": ("c.toml", "preset must be a text that is not empty, got .'nano'."),
        "[set]\nlayers = 1": ("c.toml", "unknown field of HopeConfig 'layers'"),
        "[1]": ("c.json", "config 'c.json' must be"),
        '{"corpus": 1}': ("c.json", "config 'c.json' must be"),
    }
    for text, (file, message) in cases.items():
        if file:
            Path(file).write_text(text)
        assert train.main([f"--config={file or 'c.toml'}"]) == 2, text
        err = capsys.readouterr().err
        assert re.search(message, err) and err.count("\n") == 1, err
        if file:
            Path(file).unlink()
    assert sorted(here.rglob("*")) == before


def test_a_python_without_toml_says_what_would_read_it(here, capsys, monkeypatch):
    Path("c.toml").write_text("lr = -1")
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    assert train.main(["--config=c.toml"]) == 2
    assert "this Python reads no TOML before: pip install tomli" in capsys.readouterr().err
    tomli = SimpleNamespace(loads=lambda text: {"lr": -1})
    monkeypatch.setitem(sys.modules, "tomli", tomli)
    assert train.main(["--config=c.toml"]) == 2
    assert "lr must be above 0, got -1" in capsys.readouterr().err


def listing(capsys, *words):
    with pytest.raises(SystemExit) as end:
        train.main(list(words))
    assert end.value.code == 0
    return capsys.readouterr().out


def test_set_help_lists_every_field_of_the_model_with_a_line(capsys):
    lines = listing(capsys, "--lr=1", "--set=help").splitlines()[1:]
    found = dict(re.match(r"  (\w+)=\S+ +(\S.*)", line).groups() for line in lines)
    names = [f.name for f in fields(HopeConfig) if f.name not in ("model", "vocab_size")]
    assert list(found) == names and len(set(found.values())) == len(names)
    for line in lines:  # the defaults are those of the model
        name, default = line.split()[0].split("=")
        assert HopeConfig(**{name: json.loads(default)}) == HopeConfig(), line


def test_help_has_groups_and_each_flag_once_with_its_legal_values(capsys):
    text = listing(capsys, "--help")
    for title in ("the model", "optimization", "machine"):
        assert f"\n{title}:\n" in text
    flags = re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", text, re.MULTILINE)
    assert len(flags) == len(set(flags)) > 35 and "_" not in "".join(flags)
    flat = " ".join(text.split())
    for f in fields(TrainConfig):
        assert f.metadata["wanted"].split(",")[0].removeprefix("one of ") in flat, f.name


# --------------------------------------------------------------------------------------------------
# Apple's GPUs


def test_an_apple_gpu_is_taken_where_torch_has_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_for("mps") == torch.device("mps") and device_for("auto").type != "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="must be auto or cpu where torch sees .*, got 'mps'"):
        device_for("mps")
    with pytest.raises(ValueError, match="must be auto, cpu, mps, cuda or cuda:N, got 'mps:1'"):
        device_for("mps:1")


class NoFloat64(TorchDispatchMode):
    """What Apple's GPUs lack."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            lacks = torch.is_tensor(tensor) and tensor.dtype in (torch.float64, torch.complex128)
            assert not lacks, func
        return found


@pytest.mark.parametrize("model", ["hope", "hope_attention", "titans", "samba"])
def test_training_and_generation_need_no_float64(model, monkeypatch):
    on_cpu = functools.cache(baselines.rotations.__wrapped__)  # whatever the device
    monkeypatch.setattr(baselines, "rotations", on_cpu)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "hidden": 24, "chunk": 4, "vocab_size": 11}
    hope = Hope(HopeConfig(model=model, levels=[4, None], **sizes))
    tokens = torch.randint(11, (2, 17))
    optimizer = torch.optim.AdamW(hope.parameters(), foreach=False)

    def once():
        loss = hope(tokens[:, :-1], targets=tokens[:, 1:])
        train.update(hope, optimizer, 1e-3, [loss], 1.0)
        list(hope.generate(tokens, 3, top_p=0.9, min_p=0.1, repetition_penalty=1.1))

    once()  # makes all rotations
    with NoFloat64():
        once()
