"""What train.py and eval.py promise: exact resumption, whole checkpoints, one-line errors that leave nothing behind."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train as training
from data import load_corpus, n_bytes, tokenizer
from hope import Hope, HopeConfig
from train import TrainConfig, learning_rate, loss_fn, main, optimizer_for, parse, resumed, train, validate

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"d_model": 32, "n_layers": 1, "n_heads": 2, "chunk": 8}
TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(300))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a small text file in it. No pictures: they take longer than these runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "plot", lambda folder, title: None)
    Path("text.py").write_text(TEXT)
    return tmp_path


def small(**changes) -> TrainConfig:
    """8 steps of 2 x 16 tokens of a tiny model."""
    options = {"data": "text.py", "tokens": 8 * 32, "batch_size": 2, "seq_len": 16, "eval_every": 3, "eval_tokens": 100,
               "save_every": 3, "device": "cpu", "set": SMALL}  # fmt: skip
    return TrainConfig(**{**options, **changes})


def flags(config: TrainConfig) -> list[str]:
    """The command line of a config."""
    words = [f"--set={key}={value}" for key, value in config.set.items()]
    names = ("data", "tokens", "batch_size", "seq_len", "eval_every", "eval_tokens", "save_every", "device", "out")
    return words + [f"--{name}={getattr(config, name)}" for name in names if getattr(config, name) is not None]


def log(run) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def losses(run) -> dict[int, float]:
    return {r["step"]: r["bits_per_byte"] for r in log(run) if "bits_per_byte" in r}


def everything_below(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}


class Stopped(Exception):
    """Thrown into a run in place of a kill."""


def killed_after(step):
    def on_step(record):
        if record["step"] == step and "bits_per_byte" in record:
            raise Stopped

    return on_step


# What a run is


def test_a_run_is_a_folder_with_everything_in_it(here, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(here)
    result = train(small())
    assert result["run"] == "runs/hope-nano"
    run = here / "runs/hope-nano"
    assert everything_below(run) == {"config.json", "metrics.jsonl", "loss.png", "checkpoint.pt", "sample.txt"}
    assert list(losses(run)) == list(range(1, 9))
    lines = log(run)
    assert set(lines[0]) == {"step", "tokens", "bits_per_byte", "lr", "grad_norm", "tokens_per_s"}
    assert [(r["step"], r["tokens"]) for r in lines if "val_bits_per_byte" in r] == [(3, 96), (6, 192), (8, 256)]
    assert lines[-1]["val_tokens"] == len(load_corpus("text.py").val)  # the last validation takes all held-out text
    assert lines[-1]["val_bits_per_byte"] == result["val_bits_per_byte"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 8
    printed = capsys.readouterr().out
    for command in ("python eval.py runs/hope-nano", "python train.py --resume runs/hope-nano --tokens",
                    "python hope.py generate runs/hope-nano --prompt"):  # fmt: skip
        assert command in printed
    assert (run / "sample.txt").read_text().rstrip("\n") in printed


def test_runs_never_overwrite_each_other(here):
    runs = [train(small(tokens=32))["run"] for _ in range(3)]
    assert runs == ["runs/hope-nano", "runs/hope-nano-2", "runs/hope-nano-3"]


def test_first_loss_of_a_run_is_near_that_of_a_uniform_guess(here):
    run = train(small(tokens=32))["run"]
    assert losses(run)[1] == pytest.approx(math.log2(257), rel=0.05)


def test_training_learns_the_text(here):
    run = train(small(tokens=100 * 32, lr=1e-2, eval_every=0))["run"]
    assert log(run)[-1]["val_bits_per_byte"] < 5  # 8 is a guess


def test_same_seed_same_losses_other_seed_other_losses(here):
    first, second, other = (losses(train(small(seed=s, tokens=96))["run"]) for s in (0, 0, 1))
    assert first == second != other


def test_logging_validation_and_saving_do_not_change_the_losses(here):
    often = losses(train(small(eval_every=1, save_every=1))["run"])
    assert often == losses(train(small(eval_every=0, save_every=100))["run"])


# Pieces


def test_learning_rate_rises_on_a_line_and_falls_on_a_cosine():
    config = TrainConfig(lr=2.0, warmup=0.1, min_lr_ratio=0.1)
    rates = [learning_rate(step, 101, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(rates) == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.1)  # half-way down
    assert rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_learning_rate_of_the_shortest_runs_is_legal(steps, warmup):
    config = TrainConfig(lr=1.0, warmup=warmup)
    assert all(0 < learning_rate(step, steps, config) <= 1 for step in range(steps))


def test_weight_decay_is_for_matrices_but_not_for_embeddings_and_starts():
    model = torch.nn.Module()
    model.embedding, model.linear = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4)
    model.start_W = torch.nn.Parameter(torch.zeros(2, 4, 4))
    optimizer = optimizer_for(model, TrainConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "start_W": 0.0,
        "embedding.weight": 0.0,
        "linear.weight": 0.3,
        "linear.bias": 0.0,
    }


def test_optimizer_takes_every_parameter_of_the_model_once():
    model = Hope(HopeConfig.preset("nano", model="hope", vocab_size=257, **SMALL))
    held = [id(p) for group in optimizer_for(model, TrainConfig()).param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_loss_of_equal_logits_is_the_log_of_the_vocabulary():
    loss = loss_fn(torch.zeros(2, 3, 257, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.int64))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log(257))


class Uniform(torch.nn.Module):
    def forward(self, tokens, state=None):
        return torch.zeros(*tokens.shape, 257), state


def test_validation_of_a_uniform_model_is_log2_of_257_bits_per_byte(here):
    tokens = load_corpus("text.py").val
    nats, count = validate(Uniform(), tokens, 4, 50, "cpu")
    assert count == len(tokens)
    assert nats / math.log(2) / n_bytes(tokens, tokenizer()) == pytest.approx(math.log2(257))


def test_validation_leaves_the_model_as_it_was(here):
    model = Uniform().train()
    validate(model, np.zeros(10, dtype=np.uint16), 2, 4, "cpu")
    assert model.training
    validate(model.eval(), np.zeros(10, dtype=np.uint16), 2, 4, "cpu")
    assert not model.training


def test_accumulated_steps_equal_steps_of_the_whole_batch(here):
    whole = losses(train(small(batch_size=6, tokens=5 * 96))["run"])
    parts = losses(train(small(batch_size=2, accumulate=3, tokens=5 * 96))["run"])
    assert list(whole) == list(parts) == [1, 2, 3, 4, 5]
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=1e-4)


# Stopping and going on


@pytest.mark.parametrize("optimizer, steps, cut", [("adamw", 8, 5), ("m3", 22, 17)])
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(here, optimizer, steps, cut):
    settings = {"optimizer": optimizer, "tokens": steps * 32}  # M3: saved between two steps of its slow memory
    expected = train(small(out="whole", **settings))
    with pytest.raises(Stopped):
        train(small(out="cut", **settings), killed_after(cut))
    assert set(losses("cut")) == set(range(1, cut + 1))
    result = train(resumed("cut"))
    assert losses("cut") == losses("whole")  # exactly, the last two of them computed a second time
    assert result["val_bits_per_byte"] == expected["val_bits_per_byte"]
    assert [r["step"] for r in log("cut")] == [r["step"] for r in log("whole")]  # and logged once
    ours, theirs = (torch.load(f"{run}/checkpoint.pt", weights_only=True)["model"] for run in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_line_of_the_log_torn_by_a_kill_is_left_out(here):
    with pytest.raises(Stopped):
        train(small(out="cut"), killed_after(5))
    with open("cut/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "tok')
    train(resumed("cut"))
    assert list(losses("cut")) == list(range(1, 9))


def test_run_stopped_before_its_first_interval_resumes_from_the_start(here):
    with pytest.raises(Stopped):
        train(small(out="cut", save_every=100), killed_after(2))
    train(resumed("cut"))
    assert losses("cut") == losses(train(small(out="whole"))["run"])


def test_finished_run_continues_with_more_tokens(here):
    first = losses(train(small(out="run"))["run"])
    assert main(["--resume", "run", "--tokens", str(12 * 32)]) == 0
    after = losses("run")
    assert list(after) == list(range(1, 13)) and {s: after[s] for s in first} == first
    assert TrainConfig(**training.read_config("run")["train"]).tokens == 12 * 32
    assert main(["--resume", "run"]) == 0  # nothing left to train: validates and samples once more
    assert losses("run") == after


def in_a_process(*words, **options):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([sys.executable, ROOT / "train.py", *words], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # fmt: skip


def wait_for_steps(process, run, steps):
    path = Path(run) / "metrics.jsonl"
    while not (path.is_file() and path.read_text().count("\n") >= steps):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_ctrl_c_finishes_the_step_and_saves(here):
    process = in_a_process(*flags(small(out="run", tokens=1e6, save_every=10**6, eval_every=0)))
    wait_for_steps(process, "run", 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "python train.py --resume run" in out
    last = max(losses("run"))
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == last
    assert f"after step {last} of" in out


def test_killed_process_resumes_to_the_same_losses(here):
    config = small(out="killed", tokens=1e6, save_every=2, eval_every=0)
    process = in_a_process(*flags(config))
    wait_for_steps(process, "killed", 6)
    process.kill()
    process.communicate()
    start = torch.load("killed/checkpoint.pt", weights_only=True)["step"]  # whole, whenever the kill came
    assert start >= 2
    stop = start + 4
    for run, go_on in (("killed", resumed("killed")), ("whole", small(out="whole", tokens=1e6, eval_every=0))):
        with pytest.raises(Stopped):
            train(go_on, killed_after(stop))
        assert max(losses(run)) == stop
    ours, expected = losses("killed"), losses("whole")
    assert [ours[step] for step in range(1, stop + 1)] == [expected[step] for step in range(1, stop + 1)]


def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(here, capsys):
    assert main([*flags(small(out="run", save_every=1)), "--lr", "1e30"]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    step = int(re.search(r"error: step (\d+): .* is not finite", err).group(1))
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == step - 1 == max(losses("run"), default=0)
    assert all(x.isfinite().all() for x in checkpoint["model"].values())


def test_first_parameter_with_a_non_finite_gradient_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    assert training.gradient_norm(model, 3, 1.0) > 0
    model[1].weight.grad[0, 0] = math.inf
    with pytest.raises(RuntimeError, match=r"step 3: the gradient of 1.weight is not finite"):
        training.gradient_norm(model, 3, 1.0)


def test_full_disk_gives_one_line_and_leaves_the_earlier_checkpoint(here, capsys, monkeypatch):
    save = torch.save

    def full_after_step_3(checkpoint, path):
        if checkpoint["step"] > 3:
            Path(path).write_bytes(b"torn")
            raise OSError(28, "No space left on device")
        save(checkpoint, path)

    monkeypatch.setattr(torch, "save", full_after_step_3)
    assert main(flags(small(out="run"))) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in err and "run/checkpoint.pt" in err and "is intact" in err
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 3
    assert "checkpoint.pt.tmp" not in everything_below("run")
    monkeypatch.setattr(torch, "save", save)
    assert train(resumed("run"))["step"] == 8


# Bad input: one line, exit status 2, nothing written


BAD = {
    "--tokens=0": "tokens is 0: legal is at least 1",
    "--tokens=2.5": "tokens is '2.5': legal is a whole number",
    "--tokens=many": "tokens is 'many'",
    "--tokens=inf": "tokens is 'inf'",
    "--batch_size=0": "batch_size is 0: legal is at least 1",
    "--seq_len=-4": "seq_len is -4: legal is at least 1",
    "--seq_len=1e6": "seq_len 1000000 is too long for",
    "--accumulate=0": "accumulate is 0",
    "--lr=0": "lr is 0.0: legal is above 0",
    "--lr=nan": "lr is nan: legal is above 0",
    "--min_lr_ratio=2": "min_lr_ratio is 2.0: legal is 0 to 1",
    "--warmup=-1": "warmup is -1.0: legal is 0 to 1",
    "--optimizer=adam": "optimizer is adam: legal is adamw, muon, m3",
    "--weight_decay=-1": "weight_decay is -1.0: legal is at least 0",
    "--beta2=1": "beta2 is 1.0: legal is 0 to below 1",
    "--grad_clip=0": "grad_clip is 0.0: legal is above 0",
    "--seed=-1": "seed is -1: legal is 0 to",
    "--eval_every=-1": "eval_every is -1",
    "--save_every=0": "save_every is 0",
    "--device=tpu": "device is 'tpu': legal are auto, cpu",
    "--device=cuda:99": "device is 'cuda:99', but torch sees",
    "--data=nowhere": "does not exist",
    "--data=empty.txt": "is empty",
    "--data=binary.txt": "NUL byte",
    "--model=hop": "hop",
    "--preset=gigantic": "gigantic",
    "--set=no_such_field=1": "no_such_field",
    "--set=novalue": "legal is field=value",
    "--set=vocab_size=100": "legal is all but model",
    "--set=levels=5": "levels must be a list",
    "--set=hidden=2.5": "hidden must be an integer",
    "--set=momentum=1": "momentum must be true or false",
    "--set=cms_step=0": "cms_step must be",
    "--cms-updates=second": "cms_updates is second: legal is off, first_order, full",
    "--cms-updates=full": "levels is [512, None]: no token of a row sees an update with seq_len 16",
    "--out=text.py": "exists: name a new folder",
    "--resume=runs/none": "not the folder of a run",
    "--resume=half": "no checkpoint|is damaged",
    "--no_such_flag": "no_such_flag",
}


@pytest.mark.parametrize(("bad", "message"), BAD.items(), ids=BAD)
def test_bad_input_is_named_in_one_line_and_nothing_is_written(here, capsys, bad, message):
    Path("empty.txt").touch()
    Path("binary.txt").write_bytes(b"ab\0cd")
    Path("half").mkdir()
    Path("half/config.json").write_text('{"model": {')
    before = everything_below(here)
    words = [bad] if bad.startswith("--resume") else [*flags(small()), bad]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and re.search(re.escape(message) if "|" not in message else message, err), err
    assert everything_below(here) == before


OTHER_RUN = "--model=transformer --optimizer=muon --seq_len=8 --batch_size=1 --seed=5 --set=d_model=64 --weight_decay=0"
OTHER_RUN += " --data=other.py"


@pytest.mark.parametrize("change", [*OTHER_RUN.split(), "--tokens=64"])
def test_resuming_refuses_what_would_be_another_run(here, capsys, change):
    train(small(out="run", tokens=96))
    Path("other.py").write_text(TEXT[1:])
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    capsys.readouterr()
    assert main(["--resume", "run", change]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and change.split("=")[0].strip("-") in err
    assert before == {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "other model"])
def test_damaged_checkpoint_gives_one_line(here, capsys, damage):
    train(small(out="run", tokens=64))
    path = Path("run/checkpoint.pt")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    else:
        torch.save({"model": {"x": torch.zeros(1)}, "optimizer": {}, "step": 1}, path)
    capsys.readouterr()
    for command, words in ((main, ["--resume", "run"]), (evaluation.main, ["run"])):
        assert command(words) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and "checkpoint" in err, err


# CMS levels that learn in context


IN_CONTEXT = {**SMALL, "levels": [4, 8]}


@pytest.mark.parametrize("updates", ["first_order", "full"])
def test_levels_that_learn_in_context_are_trained_and_resumed_to_the_same_losses(here, updates):
    config = small(cms_updates=updates, set=IN_CONTEXT, out="whole")
    train(config)
    train(small(cms_updates="off", set=IN_CONTEXT, out="off"))
    assert losses("whole") != losses("off")
    assert {r["cms_updates"] for r in log("whole") if "val_tokens" in r} == {updates}
    with pytest.raises(Stopped):
        train(small(cms_updates=updates, set=IN_CONTEXT, out="killed"), on_step=killed_after(5))
    train(resumed("killed"))
    assert losses("killed") == losses("whole")
    model, _ = Hope.load("whole")
    assert (model.blocks[0].cms.log_step != math.log(training.CMS_STEP)).all()  # the step sizes are trained


# The command line


def test_help_lists_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for f in fields(TrainConfig):
        assert f"--{f.name}" in shown and f.metadata["help"] in shown
    assert f"(default: {TrainConfig().tokens})" in shown


def test_flags_become_fields_of_their_types():
    words = "--tokens 2e6 --lr 1e-2 --compile --model titans --seed 9007199254740993"
    config = parse([*words.split(), "--set", "n_layers=2", "--set", "memory=mlp", "--set", "r=[1]"])
    assert (config.tokens, config.lr, config.compile, config.model) == (2_000_000, 0.01, True, "titans")
    assert config.seed == 9007199254740993  # a whole number stays exact
    assert config.set == {"n_layers": 2, "memory": "mlp", "r": [1]}
    assert isinstance(config.tokens, int) and parse([]) == TrainConfig()


# eval.py


def test_eval_gives_the_run_s_own_held_out_score(here, capsys):
    result = train(small(out="run"))
    capsys.readouterr()
    assert evaluation.main(["run", "--device", "cpu"]) == 0
    written = json.loads(Path("run/eval.json").read_text())
    assert written["bits_per_byte"] == pytest.approx(result["val_bits_per_byte"], rel=1e-6)
    assert written["byte_perplexity"] == pytest.approx(2 ** written["bits_per_byte"])
    assert f"{written['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out


def test_eval_scores_the_whole_of_another_text(here):
    train(small(out="run", tokens=64))
    Path("texts").mkdir()
    for name in "abc":
        Path(f"texts/{name}.txt").write_text(name * 30 + "é\n")
    result = evaluation.evaluate("run", data="texts", device="cpu")
    assert (result["bytes"], result["tokens"]) == (3 * 33, 3 * 33 + 2)  # two <|endoftext|> between three files


def test_eval_refuses_held_out_text_that_has_changed(here):
    train(small(out="run", tokens=64))
    Path("text.py").write_text(TEXT[40:])
    with pytest.raises(ValueError, match="has changed since run was trained"):
        evaluation.evaluate("run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "not the folder of a run"),
        (["run", "--data", "nowhere"], "does not exist"),
        (["run", "--device", "x"], "'x'"),
    ],
)
def test_eval_names_bad_input_in_one_line(here, capsys, words, message):
    train(small(out="run", tokens=64))
    capsys.readouterr()
    before = everything_below(here)
    assert evaluation.main(words) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and message in err
    assert everything_below(here) == before
