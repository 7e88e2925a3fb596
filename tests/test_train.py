"""What train.py and eval.py promise: exact resumption, complete checkpoints, one-line errors."""

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import Stopped, flags, log, stop_after
from torch._functorch import config as functorch

import eval as evaluation
import hope
import train as training
from hope import MIXERS, PRESETS, Hope, HopeConfig, loss_fn
from layers import tensors
from support import checkpoint
from support.config import GROUPS, TrainConfig, parse
from support.corpus import load_corpus
from support.monitor import rates
from support.plan import flops_per_token
from support.run import Run, optimizer_for, read_config, resumed
from support.vocabulary import n_bytes, tokenizer
from train import learning_rate, main, train, validate

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"d_model": 32, "n_layers": 1, "n_heads": 2, "chunk": 8, "levels": [4, 8, None]}


def small(**changes) -> TrainConfig:
    """8 steps of 2 x 16 tokens of a tiny model."""
    options = {"data": "text.py", "tokens": 8 * 32, "batch_size": 2, "seq_len": 16, "set": SMALL}
    options |= {"eval_every": 3, "eval_tokens": 100, "save_every": 3, "device": "cpu"}
    return TrainConfig(**{**options, **changes})


def losses(run) -> dict[int, float]:
    return {r["step"]: r["bits_per_byte"] for r in log(run) if "bits_per_byte" in r}


def model_of(run) -> Hope:
    return Run.open(run, "cpu").model


def everything_below(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}


# What a run is


@pytest.mark.slow
def test_a_run_is_a_folder_with_everything_in_it(here, capsys, monkeypatch):
    monkeypatch.undo()  # with its plot
    monkeypatch.chdir(here)
    result = train(small())
    assert result["run"] == "runs/hope-nano"
    run = here / "runs/hope-nano"
    files = {"config.json", "metrics.jsonl", "loss.png", "checkpoints", "sample.txt"}
    assert {path.name for path in run.iterdir()} == files
    assert list(losses(run)) == list(range(1, 9))
    lines = log(run)
    every = {"step", "tokens", "bits_per_byte", "lr", "grad_norm", "tokens_per_s", "data_s"}
    assert set(lines[1]) == every and set(lines[0]) == every | {"eta", "alpha"}
    validations = [r for r in lines if "val_bits_per_byte" in r]
    assert [(r["step"], r["tokens"]) for r in validations] == [(3, 96), (6, 192), (8, 256)]
    assert lines[-1]["val_tokens"] == len(load_corpus("text.py").val)  # the last takes all
    assert lines[-1]["val_bits_per_byte"] == result["val_bits_per_byte"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert checkpoint.saved_steps(run) == [6, 8]
    printed = capsys.readouterr().out
    assert "python eval.py runs/hope-nano" in printed
    assert "python train.py --resume runs/hope-nano --tokens" in printed
    assert "python sample.py generate runs/hope-nano --prompt" in printed
    assert (run / "sample.txt").read_text().rstrip("\n") in printed


@pytest.mark.slow
def test_runs_never_overwrite_each_other(here):
    runs = [train(small(tokens=32))["run"] for _ in range(3)]
    assert runs == ["runs/hope-nano", "runs/hope-nano-2", "runs/hope-nano-3"]


def test_first_loss_of_a_run_is_near_that_of_a_uniform_guess(here):
    run = train(small(tokens=32))["run"]
    assert losses(run)[1] == pytest.approx(math.log2(257), rel=0.05)


@pytest.mark.slow
def test_training_learns_the_text(here):
    run = train(small(tokens=100 * 32, lr=1e-2, eval_every=0))["run"]
    assert log(run)[-1]["val_bits_per_byte"] < 5  # 8 is a guess


@pytest.mark.slow
def test_same_seed_same_losses_other_seed_other_losses(here):
    first, second, other = (losses(train(small(seed=s, tokens=96))["run"]) for s in (0, 0, 1))
    assert first == second != other


@pytest.mark.slow
def test_logging_validation_and_saving_do_not_change_the_losses(here):
    often = losses(train(small(eval_every=1, save_every=1))["run"])
    assert often == losses(train(small(eval_every=0, save_every=100))["run"])


# A mixer of one's own


class Average(torch.nn.Module):
    """The mean of all tokens so far, through one projection."""

    def __init__(self, d_model):
        super().__init__()
        self.proj = torch.nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, state):  # x [B, T, d_model]
        state = state or {"count": 0, "total": 0.0}
        sums = state["total"] + x.cumsum(1)
        counts = state["count"] + torch.arange(1, x.shape[1] + 1)[:, None]
        after = {"count": state["count"] + x.shape[1], "total": sums[:, -1:]}
        return self.proj(sums / counts), after

    def products(self, T):
        return 0

    def components(self):
        row = {"component": "average", "updates": "every token", "context": "none"}
        return [row | {"parameters": 0, "period": 1}]


def test_a_new_mixer_is_a_class_and_a_line_trains_is_counted_and_listed(here, monkeypatch):
    monkeypatch.setitem(hope.MIXERS, "mine", lambda c: Average(c.d_model))
    result = train(small(model="mine", tokens=40 * 32, lr=1e-2))
    assert losses(result["run"])[40] < losses(result["run"])[1] - 1
    opened = Run.open(result["run"], "cpu")
    model = opened.model
    _, tokens, size = opened.text()
    nats, _ = validate(model, tokens, 2, 16, "cpu")
    assert nats / math.log(2) / size == pytest.approx(result["val_bits_per_byte"], rel=1e-6)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)  # the tied table is one
    assert flops_per_token(replace(model.config, cms_updates="off"), 16) == 6 * matrices
    assert [row["component"] for row in model.levels()][0] == "average"
    tokens = torch.randint(257, (2, 9))
    first, state = model(tokens[:, :4])
    both = torch.cat([first, model(tokens[:, 4:], state)[0]], 1)
    torch.testing.assert_close(both, model(tokens)[0])


def test_a_mixer_without_products_is_named(monkeypatch):
    monkeypatch.setitem(hope.MIXERS, "mine", lambda c: Average(c.d_model))
    monkeypatch.delattr(Average, "products")
    with pytest.raises(AttributeError, match="'Average' object has no attribute 'products'"):
        flops_per_token(HopeConfig(model="mine", **SMALL), 16)


# Pieces


def test_learning_rate_rises_on_a_line_and_falls_on_a_cosine():
    config = TrainConfig(lr=2.0, warmup=0.1, min_lr_ratio=0.1)
    lrs = [learning_rate(step, 101, config) for step in range(101)]
    assert lrs[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(lrs) == lrs[10] == 2.0
    assert lrs[55] == pytest.approx(1.1)  # half-way down
    assert lrs[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(lrs[10:], lrs[11:], strict=False))


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_learning_rate_of_the_shortest_runs_is_legal(warmup):
    config = TrainConfig(lr=1.0, warmup=warmup)
    for steps in (1, 2, 3):
        assert all(0 < learning_rate(step, steps, config) <= 1 for step in range(steps))


def test_weight_decay_is_for_matrices_but_not_for_embeddings_and_initial_weights():
    model = torch.nn.Module()
    model.embedding = torch.nn.Embedding(5, 4)
    model.linear = torch.nn.Linear(4, 4)
    model.start_W = torch.nn.Parameter(torch.zeros(2, 4, 4))
    optimizer = optimizer_for(model, TrainConfig(weight_decay=0.3))
    decay = {}
    for group in optimizer.param_groups:
        decay |= {p: group["weight_decay"] for p in group["params"]}
    assert {name: decay[p] for name, p in model.named_parameters()} == {
        "start_W": 0.0,
        "embedding.weight": 0.0,
        "linear.weight": 0.3,
        "linear.bias": 0.0,
    }


def test_optimizer_takes_every_parameter_of_the_model_once():
    model = Hope(HopeConfig.preset("nano", model="hope", vocab_size=257, **SMALL))
    held = []
    for group in optimizer_for(model, TrainConfig()).param_groups:
        held += [id(p) for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_loss_of_equal_logits_is_the_log_of_the_vocabulary():
    targets = torch.zeros(2, 3, dtype=torch.int64)
    loss = loss_fn(torch.zeros(2, 3, 257, dtype=torch.bfloat16), targets)
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


@pytest.mark.slow
def test_accumulated_steps_equal_steps_of_the_whole_batch(here):
    config = {"batch_size": 6, "tokens": 5 * 96}
    whole = losses(train(small(**config))["run"])
    parts = losses(train(small(**config, micro_batch=4))["run"])  # 4 rows, then 2
    assert list(whole) == list(parts) == [1, 2, 3, 4, 5]
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=1e-4)


# Stopping and resuming


@pytest.mark.parametrize(
    "optimizer, steps, cut",
    [("adamw", 8, 5), pytest.param("m3", 22, 17, marks=pytest.mark.slow)],
)
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(here, optimizer, steps, cut):
    # M3 is cut between two steps of its slow memory.
    settings = {"optimizer": optimizer, "tokens": steps * 32}
    expected = train(small(out="whole", **settings))
    with pytest.raises(Stopped):
        train(small(out="cut", **settings), stop_after(cut))
    assert set(losses("cut")) == set(range(1, cut + 1))
    result = train(resumed("cut"))
    assert losses("cut") == losses("whole")  # exactly, the last two of them computed a second time
    assert result["val_bits_per_byte"] == expected["val_bits_per_byte"]
    assert [r["step"] for r in log("cut")] == [r["step"] for r in log("whole")]  # and logged once
    ours, theirs = (model_of(run).state_dict() for run in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_lines_of_the_log_that_are_torn_or_foreign_are_left_out_alone(here, capsys):
    with pytest.raises(Stopped):
        train(small(out="cut"), stop_after(5))
    lines = Path("cut/metrics.jsonl").read_text().splitlines()
    text = "\n".join([lines[0], '{"step": 2, "tok', "", "a note", *lines[1:], '{"step": 6, "tok'])
    Path("cut/metrics.jsonl").write_text(text)
    train(resumed("cut"))
    assert list(losses("cut")) == list(range(1, 9))
    assert capsys.readouterr().err.count("3 lines of cut/metrics.jsonl do not count") == 1


def test_a_run_without_a_checkpoint_starts_over_and_says_so_and_keeps_what_is_not_its_own(
    here, capsys, monkeypatch
):
    with pytest.raises(Stopped):
        train(small(out="run"), stop_after(1))
    shutil.rmtree("run/checkpoints")
    Path("run/metrics.jsonl").write_text("")
    Path("run/notes.txt").write_text("mine")
    before = everything_below("run")

    def full(*_):
        raise OSError("No space left on device")

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        assert main(["--resume", "run"]) == 2
        assert capsys.readouterr().err == "train.py: error: No space left on device\n"
        assert everything_below("run") == before
        assert main(flags(small(out="new"))) == 2
        assert not Path("new").exists()
    with pytest.raises(Stopped):
        train(resumed("run"), stop_after(1))
    assert "run has no checkpoint: starting over\n" in capsys.readouterr().out
    assert Path("run/notes.txt").read_text() == "mine"


def test_a_run_has_one_process_at_a_time(here, capsys):
    with pytest.raises(Stopped):
        train(small(out="run"), stop_after(1))
    before = everything_below("run")
    with checkpoint.locked(Path("run/lock")):
        capsys.readouterr()
        assert main(["--resume", "run"]) == 2
        error = capsys.readouterr().err
        assert re.match(f"train.py: error: run is written by process {os.getpid()} on", error)
        assert error.count("\n") == 1
        assert evaluation.main(["run"]) == 0  # which reads it
    assert everything_below("run") == before | {"eval.json"}
    with pytest.raises(Stopped):
        train(resumed("run"), stop_after(1))


@pytest.mark.slow
def test_run_stopped_before_its_first_interval_resumes_from_the_start(here):
    with pytest.raises(Stopped):
        train(small(out="cut", save_every=100), stop_after(2))
    train(resumed("cut"))
    assert losses("cut") == losses(train(small(out="whole"))["run"])


@pytest.mark.slow
def test_finished_run_continues_with_more_tokens(here):
    first = losses(train(small(out="run"))["run"])
    assert main(["--resume", "run", "--tokens", str(12 * 32)]) == 0
    after = losses("run")
    assert list(after) == list(range(1, 13)) and {s: after[s] for s in first} == first
    assert TrainConfig(**read_config("run")["train"]).tokens == 12 * 32
    assert main(["--resume", "run"]) == 0  # nothing left to train: validates and samples once more
    assert losses("run") == after


def in_a_process(*words):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, ROOT / "train.py", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=pipe)


def wait_for_steps(process, run, steps):
    path = Path(run) / "metrics.jsonl"
    while not (path.is_file() and path.read_text().count("\n") >= steps):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_and_saves(here):
    config = small(out="run", tokens=1e6, save_every=10**6, eval_every=0)
    process = in_a_process(*flags(config))
    wait_for_steps(process, "run", 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "python train.py --resume run" in out
    last = max(losses("run"))
    assert checkpoint.saved_steps("run")[-1] == last
    assert f"after step {last} of" in out


@pytest.mark.slow
def test_kill_in_the_first_moment_of_a_run_starts_it_again(here):
    with pytest.raises(Stopped):
        train(small(out="run"), stop_after(1))
    shutil.rmtree("run/checkpoints")
    Path("run/metrics.jsonl").write_text("")  # config.json stands, nothing else yet
    train(resumed("run"))
    assert losses("run") == losses(train(small(out="whole"))["run"])


# Steps that are not finite


def poisoned(monkeypatch, *steps):
    """The loss is not a number in those steps."""
    calls = iter(range(1, 1000))

    def loss(logits, targets, reduction="mean"):
        value = loss_fn(logits, targets, reduction)
        return value * math.nan if logits.requires_grad and next(calls) in steps else value

    monkeypatch.setattr("hope.loss_fn", loss)


@pytest.mark.parametrize("optimizer", ["adamw", "m3"])
def test_step_that_is_not_finite_is_skipped_named_counted_and_changes_nothing(
    here, monkeypatch, optimizer
):
    poisoned(monkeypatch, 4, 5)
    with pytest.raises(Stopped):
        train(small(out="run", optimizer=optimizer, save_every=1, keep=9), stop_after(6))
    lines = [r for r in log("run") if "val_tokens" not in r]
    assert [r["step"] for r in lines if "bits_per_byte" in r] == [1, 2, 3, 6]
    skipped = [r for r in lines if "skipped" in r]
    assert [(r["step"], r["tokens"], r["skipped"]) for r in skipped] == [(4, 128, 1), (5, 160, 2)]
    for r in skipped:
        assert "is not finite" in r["why"] and f"step {r['step']}" in r["why"]
    saved = []
    for step in (5, 4, 3):
        model = Hope(HopeConfig(**read_config("run")["model"]))
        made = optimizer_for(model, TrainConfig(optimizer=optimizer))
        assert checkpoint.load("run", model, made) == step
        for group in made.param_groups:
            group["lr"] = 0.0  # set before every step, whatever comes of it
        saved.append((model.state_dict(), made.state_dict()))
        shutil.rmtree(checkpoint.folder("run", step))
    assert str(saved[0]) == str(saved[1]) == str(saved[2])
    for one in saved[:2]:
        pairs = zip(tensors(list(one)), tensors(list(saved[2])), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_too_many_steps_that_are_not_finite_stop_the_run_and_keep_the_checkpoint(
    here, capsys, monkeypatch
):
    poisoned(monkeypatch, 2, 4, 5, 6)
    assert main([*flags(small(out="run", save_every=1)), "--max_skipped=2"]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    kept = "3 steps in a row; the last checkpoint is kept"
    assert re.search(f"error: step 6: .* is not finite .*, {kept}", err)
    assert checkpoint.saved_steps("run") == [4, 5]
    assert all(x.isfinite().all() for x in model_of("run").state_dict().values())


def test_run_that_explodes_stops(here, capsys):
    assert main([*flags(small(out="run", save_every=1)), "--lr", "1e30", "--max_skipped=0"]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    step = int(re.search(r"error: step (\d+): .* is not finite", err).group(1))
    assert checkpoint.saved_steps("run")[-1] == step - 1 == max(losses("run"), default=0)


def test_first_parameter_with_a_non_finite_gradient_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    assert training.gradient_norm(model, 1.0) > 0
    model[1].weight.grad[0, 0] = math.inf
    with pytest.raises(training.NonFinite, match=r"the gradient of 1.weight is not finite"):
        training.gradient_norm(model, 1.0)


# What is logged


def test_logged_step_sizes_and_retentions_are_those_of_the_definition(here):
    torch.manual_seed(0)
    model = Hope(HopeConfig(**SMALL | {"n_layers": 2}))
    tokens = torch.randint(257, (1, 8))
    found = rates(model, tokens)
    seen = []
    for block in model.blocks:  # one chunk: all is generated from the initial weights
        block.mixer.register_forward_pre_hook(
            lambda mixer, args: seen.append(step_and_retention(mixer, args[0]))
        )
    model.read(tokens)
    before = model(tokens)[0]
    assert found["eta"] == pytest.approx([eta for eta, _ in seen[:2]], rel=1e-5)
    assert found["alpha"] == pytest.approx([alpha for _, alpha in seen[:2]], rel=1e-5)
    assert torch.equal(model(tokens)[0], before)  # looking changes nothing


def step_and_retention(mixer, x):
    z, _ = mixer.conv(mixer.in_proj(x))
    x = z.chunk(2, -1)[0].unflatten(-1, (mixer.n_heads, -1)).transpose(1, 2)
    gates = x @ mixer.start[:, -2:].mT
    rate = torch.nn.functional.softplus(gates[..., 1] + mixer.b_alpha[:, None])
    alpha = torch.exp(-mixer.log_A.exp()[:, None] * rate)
    eta = (1 + alpha) * torch.sigmoid(gates[..., 0] + mixer.b_eta[:, None])
    return eta.mean().item(), alpha.mean().item()


def test_models_without_memories_have_no_step_sizes():
    logged = {"transformer": set(), "gated_deltanet": {"eta", "alpha"}, "samba": set()}
    for name, keys in logged.items():
        model = Hope(HopeConfig(model=name, d_model=32, n_heads=2, n_layers=2, hidden=32))
        assert set(rates(model, torch.zeros(1, 4, dtype=torch.int64))) == keys


def test_utilisation_is_counted_flops_over_the_peak_of_a_known_gpu(here, monkeypatch):
    monkeypatch.setattr("support.plan.peak_flops", lambda device: 1e12)
    (line,) = (r for r in log(train(small(tokens=32))["run"]) if "mfu" in r)
    model = HopeConfig(**read_config("runs/hope-nano")["model"])
    flops = flops_per_token(model, 16)
    assert line["mfu"] == pytest.approx(flops * line["tokens_per_s"] / 1e12)


@pytest.mark.slow
def test_weights_and_biases_gets_every_line_and_the_same_run_after_a_resume(here, monkeypatch):
    calls = []

    class Fake(types.ModuleType):
        id = "abc"

        def init(self, **options):
            calls.append(options)
            return self

        def log(self, record, step):
            calls.append(record | {"step": step})

    monkeypatch.setitem(sys.modules, "wandb", Fake("wandb"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    train(small(out="run", wandb=True))
    assert calls[1:] == log("run")
    assert calls[0]["config"]["tokens"] == 256 and "id" not in calls[0]
    calls.clear()
    train(resumed("run"))
    assert calls[0]["id"] == "abc"


def test_missing_package_of_a_logger_is_one_line(here, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*flags(small(out="run")), "--wandb"]) == 2
    why = "wandb is on, but the package is not installed: pip install wandb"
    assert capsys.readouterr().err == f"train.py: error: {why}\n"
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize(
    "model, updates",
    [
        ("hope", "off"),
        ("hope", "first_order"),
        ("transformer", "off"),
        ("transformer", "first_order"),
        ("retnet", "first_order"),
    ],
)
def test_step_compiles_without_a_graph_break_to_the_same_gradients(model, updates, monkeypatch):
    compile_ = torch.compile  # of which nn.Module.compile makes use
    monkeypatch.setattr(torch, "compile", partial(compile_, backend="aot_eager"))
    torch.compiler.reset()  # graphs of other models count
    torch.manual_seed(0)
    own = {"model": model, "hidden": 36, "n_layers": 3, "levels": [8, None]}
    own |= {"cms_blocks": 2, "cms_updates": updates}
    model = Hope(HopeConfig(**SMALL | own))
    rows = torch.randint(257, (2, 25))
    grads = []
    with functorch.patch("donated_buffer", functorch.donated_buffer):  # and back
        for compiled in (False, True):
            config = TrainConfig(compile=compiled, seq_len=24)
            device = torch.device("cpu")
            run = types.SimpleNamespace(model=model, config=config, device=device)
            step = training.parallel(run)
            step(rows[:, :-1], rows[:, 1:]).backward()
            grads.append([p.grad for p in model.parameters()])
            model.zero_grad()
    torch.testing.assert_close(grads[1], grads[0])


class Recording:
    """What torch.cuda has for graphs, on a CPU: a replay runs the same calls on the same rows."""

    def __init__(self, monkeypatch, module, fails=False):
        self.fails = fails
        self.replays = 0
        self.module = module
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.recording)
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
        for name in ("Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda device: None)

    @contextlib.contextmanager
    def recording(self, graph, stream):
        try:
            yield
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing\nand more")
        except RuntimeError:  # as torch.cuda.graph does at the end
            raise RuntimeError("operation failed due to a previous error in capture") from None

    def replay(self):
        self.replays += 1
        outer = {p: p.grad for p in self.module.parameters()}
        self.module.zero_grad()
        self.module.loss.copy_(self.module.run(*self.module.rows, self.share))
        for p, grad in self.module.grads.items():
            grad.copy_(p.grad)
        for p, grad in outer.items():
            p.grad = grad


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
@pytest.mark.parametrize("fails", [False, True])
def test_steps_from_a_graph_are_those_of_the_loop(micro_batch, fails, monkeypatch, capsys):
    found = []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = Hope(HopeConfig(**SMALL | {"levels": [8, None], "cms_updates": "first_order"}))
        optimizer = torch.optim.AdamW(model.parameters())
        forward = training.LossModule(model)
        if graphed:
            forward = training.Graphed(forward)
            graph = Recording(monkeypatch, forward, fails)
            graph.share = micro_batch / 4
        losses = []
        for step in range(4):
            torch.manual_seed(step)
            rows = torch.randint(257, (4, 25))
            parts = training.micro_batches(forward, rows[:, :-1], rows[:, 1:], micro_batch)
            losses.append(training.update(model, optimizer, 1e-3, parts, 1.0))
        found.append((losses, list(model.parameters())))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    of_first_shape = {1: 16, 2: 8, 3: 4, 4: 4}[micro_batch]
    assert graph.replays == (0 if fails else of_first_shape - 2)
    said = "not as one CUDA graph, so more slowly: operation not permitted when stream is capturing"
    assert (said in capsys.readouterr().out) == fails


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("updates", ["off", "first_order"])
def test_a_graph_of_a_step_gives_its_losses_on_the_device(here, updates, monkeypatch, capsys):
    found = []
    for graphed in (True, False):
        if not graphed:
            monkeypatch.setattr(training, "Graphed", lambda module: module)
        own = {"device": "cuda", "compile": True, "set": SMALL | {"cms_updates": updates}}
        run = f"graphed-{graphed}"
        train(small(out=run, **own))
        found.append(losses(run))
    assert "graph" not in capsys.readouterr().out.replace("graphed-", "")
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# Bad input: one line, exit status 2, nothing written


BAD = {
    "--tokens=0": "tokens must be at least 1, got 0",
    "--tokens=2.5": "tokens must be a whole number, as 2000000 or 2e6, got '2.5'",
    "--tokens=many": "got 'many'",
    "--tokens=inf": "got 'inf'",
    "--batch_size=0": "batch_size must be at least 1, got 0",
    "--seq_len=-4": "seq_len must be at least 1, got -4",
    "--seq_len=1e6": "seq_len 1000000 is too long for|seq_len must be .*, got 1000000",
    "--micro_batch=-1": "micro_batch must be at least 0, got -1",
    "--keep=0": "keep must be at least 1, got 0",
    "--max_skipped=-1": "max_skipped must be at least 0, got -1",
    "--fsdp": "fsdp needs several processes: start it with torchrun",
    "--compile --seq_len=136": "136 tokens is 17 steps of torch's loop, .* rows of at most 128",
    "--compile --set=cms_updates=full": "compile cannot be combined with cms_updates 'full'; use",
    "--fsdp --optimizer=dmgd": "fsdp cannot be combined with optimizer dmgd; use another",
    "--lr=0": "lr must be above 0, got 0.0",
    "--cms_periods=4,1": "cms_periods must be whole numbers of at least 1 with commas, that do not",
    "--cms_periods=1.5": "cms_periods must be whole numbers of at least 1",
    "--cms_periods=1,8": "cms_periods must be 3 numbers, one for each CMS level, got '1,8'",
    "--cms_lrs=1,0": "cms_lrs must be numbers above 0 with commas, got 1,0",
    "--cms_lrs=fast": "cms_lrs must be numbers above 0 with commas, got fast",
    "--lr=nan": "lr must be above 0, got nan",
    "--min_lr_ratio=2": "min_lr_ratio must be from 0 to 1, got 2.0",
    "--warmup=-1": "warmup must be from 0 to 1, got -1.0",
    "--optimizer=adam": "optimizer must be one of adamw, muon, m3",
    "--weight_decay=-1": "weight_decay must be at least 0, got -1.0",
    "--beta2=1": "beta2 must be from 0 to below 1, got 1.0",
    "--grad_clip=0": "grad_clip must be above 0, got 0.0",
    "--seed=-1": "seed must be from 0 to",
    "--eval_every=-1": "eval_every must be at least 0, got -1",
    "--save_every=0": "save_every must be at least 1, got 0",
    "--device=tpu": "device must be auto, cpu, mps, cuda or cuda:N, got 'tpu'",
    "--device=cuda:99": "device must be auto, cpu or cuda:N with N <",
    "--data=": "data must be a text that is not empty, got ''",
    "--resume=": "resume must be a text that is not empty, got ''",
    f"--set=levels={'[' * 2000}": "levels must be a list",
    "--set=hidden=300000000000000": "the model does not fit into memory: .*can't allocate memory",
    "--data=nowhere": "does not exist",
    "--data=empty.txt": "is empty",
    "--data=binary.txt": "NUL byte",
    "--model=hop": "unknown model 'hop': must be one of .*; did you mean 'hope'",
    "--preset=gigantic": "unknown preset 'gigantic': must be one of nano, 30m",
    "--set=no_such_field=1": "unknown field of HopeConfig 'no_such_field'",
    "--set=novalue": "set must be field=value, got",
    "--set=vocab_size=100": "set must be without model and vocab_size, got",
    "--set=levels=5": "levels must be a list",
    "--set=hidden=2.5": "hidden must be an integer",
    "--set=momentum=1": "momentum must be true or false",
    "--set=cms_step=0": "step must be above 0 where it is learned, got 0",
    "--set=cms_updates=second": "unknown cms_updates 'second': must be one of off, first_order",
    "--set=levels=[16,null]": "levels must begin with a chunk from 2 to 15 tokens, else no token",
    "--out=text.py": "exists: name a new folder",
    "--resume=runs/none": "not the folder of a run",
    "--resume=half": "no checkpoint|is damaged",
    "--no_such_flag": "no_such_flag",
}


def test_bad_input_is_named_in_one_line_and_nothing_is_written(here, capsys):
    Path("empty.txt").touch()
    Path("binary.txt").write_bytes(b"ab\0cd")
    Path("half").mkdir()
    Path("half/config.json").write_text('{"model": {')
    before = everything_below(here)
    for bad, message in BAD.items():
        words = [bad] if bad.startswith("--resume") else [*flags(small()), *bad.split(" ")]
        assert main(words) == 2, bad
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and re.search(message, err), (bad, err)
        assert everything_below(here) == before, bad


def test_resuming_refuses_what_would_be_another_run(here, capsys):
    train(small(out="run", tokens=96))
    Path("other.py").write_text(Path("text.py").read_text()[1:])
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    other = "--model=transformer --optimizer=muon --seq_len=8 --batch_size=1 --seed=5"
    other += " --set=d_model=64 --weight_decay=0 --data=other.py --tokens=64"
    capsys.readouterr()
    for change in other.split():
        assert main(["--resume", "run", change]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and change.split("=")[0].strip("-") in err
        assert before == {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}


@pytest.mark.parametrize("damage", ["damaged", "missing", "other model"])
def test_damaged_checkpoints_give_one_line(here, capsys, damage):
    train(small(out="run", tokens=64))
    for step in checkpoint.saved_steps("run"):
        (checkpoint.folder("run", step) / ".metadata").write_bytes(b"no pickle")
    if damage != "damaged":
        shutil.rmtree("run/checkpoints")
    if damage == "other model":
        model = Hope(HopeConfig(**SMALL | {"d_model": 64}))
        checkpoint.save("run", model, torch.optim.SGD(model.parameters()), step=1)
    for command, words in ((main, ["--resume", "run"]), (evaluation.main, ["run"])):
        capsys.readouterr()
        assert command(words) == 2
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1 and "checkpoint" in lines[0], err


# CMS levels that learn in context


@pytest.mark.slow
@pytest.mark.parametrize("updates", ["first_order", "full"])
def test_levels_that_learn_in_context_are_trained_and_resumed_to_the_same_losses(here, updates):
    learning = {**SMALL, "cms_updates": updates}
    train(small(set=learning, out="whole"))
    train(small(set={**SMALL, "cms_updates": "off"}, out="off"))
    assert losses("whole") != losses("off")
    assert {r["cms_updates"] for r in log("whole") if "val_tokens" in r} == {updates}
    with pytest.raises(Stopped):
        train(small(set=learning, out="killed"), on_step=stop_after(5))
    train(resumed("killed"))
    assert losses("killed") == losses("whole")
    model = model_of("whole")
    assert model.config.cms_updates == updates
    assert (model.blocks[0].cms.steps() != model.config.cms_step).all()  # they are trained


# CMS levels on the clock of training steps


def weights_by_step(monkeypatch, config) -> list[dict]:
    """The model's weights after every step of a run."""
    seen = []

    def look(record):
        if "bits_per_byte" in record:
            seen.append({name: p.detach().clone() for name, p in kept[0].named_parameters()})

    kept = []
    parallel = training.parallel
    monkeypatch.setattr(training, "parallel", lambda run: kept.append(run.model) or parallel(run))
    train(config, look)
    return seen


def test_levels_step_every_so_many_training_steps_and_all_else_every_time(here, monkeypatch):
    seen = weights_by_step(monkeypatch, small(cms_periods="1,2,4"))
    for number, (before, after) in enumerate(zip(seen, seen[1:], strict=False), 2):
        for name, p in after.items():
            period = next((2**i for i in range(3) if f"mlps.{i}." in name), 1)
            assert torch.equal(p, before[name]) == (number % period != 0), (number, name)


def test_a_run_stopped_within_a_period_goes_on_to_the_same_losses(here):
    clocks = {"cms_periods": "1,2,4", "cms_lrs": "1,0.5,0.25"}
    train(small(**clocks, out="whole"))
    with pytest.raises(Stopped):
        train(small(**clocks, out="killed"), on_step=stop_after(5))  # saved after step 3
    train(resumed("killed"))
    assert losses("killed") == losses("whole")
    train(small(cms_periods="1,2,4", out="equal rates"))
    assert losses("equal rates") != losses("whole")


def test_a_level_has_its_own_learning_rate(here, monkeypatch):
    options = {"lr": 1e-3, "weight_decay": 0.0, "warmup": 0.0, "tokens": 32}
    start, moved = small(**options), small(**options, cms_lrs="1,0.5,0.25")
    (plain,) = weights_by_step(monkeypatch, start)
    (scaled,) = weights_by_step(monkeypatch, moved)
    torch.manual_seed(0)
    first = dict(Hope(HopeConfig(**SMALL)).named_parameters())
    for name, p in plain.items():
        scale = next((0.5**i for i in range(3) if f"mlps.{i}." in name), 1.0)
        torch.testing.assert_close(scaled[name] - first[name], scale * (p - first[name]))


# The command line


def parsed(words: str) -> TrainConfig:
    return parse(words.split(), "", resumed)


def test_help_lists_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out.partition("\noptions:")[2]
    shown = " ".join(out.split())
    for f in fields(TrainConfig):
        flag = f"--{f.name.replace('_', '-')}"
        assert len(re.findall(rf"^  {flag}\b", out, re.MULTILINE)) == 1
        assert f.metadata["help"] in shown
    for text in ("--dry-run", "--gpus N", "--gpu NAME", "--utilisation X", *MIXERS, *PRESETS):
        assert text in shown
    assert "_" not in "".join(re.findall(r"^  --\S+", out, re.MULTILINE))
    assert list(GROUPS.values()) == re.findall(r"^(\S[^:(]*):$", out, re.MULTILINE)
    for words in (["--gpus", "8"], ["--utilisation=0.3"]):
        assert main(words) == 2
        assert "must come with --dry-run" in capsys.readouterr().err
    assert f"default: {TrainConfig().tokens})" in shown


def test_flags_become_fields_of_their_types():
    words = "--tokens 2e6 --lr 1e-2 --compile --model titans --seed 9007199254740993"
    config = parsed(f"{words} --set n_layers=2 --set memory=mlp --set r=[1]")
    assert (config.tokens, config.lr) == (2_000_000, 0.01)
    assert (config.compile, config.model) == (True, "titans")
    assert config.seed == 9007199254740993  # a whole number stays exact
    assert config.set == {"n_layers": 2, "memory": "mlp", "r": [1]}
    assert isinstance(config.tokens, int) and parsed("") == TrainConfig()


@pytest.mark.parametrize("value", ["x", 1, "true"])
def test_a_switch_is_true_or_false(value):
    for name in ("fsdp", "wandb", "compile", "recompute"):
        with pytest.raises(ValueError, match=f"{name} must be true or false, got {value!r}"):
            TrainConfig(**{name: value})
    with pytest.raises(ValueError, match="model must be a text that is not empty, got 5"):
        TrainConfig(model=5)


# eval.py


def test_results_are_printed_where_they_cannot_be_saved(here, capsys):
    with pytest.raises(Stopped):
        train(small(out="run"), stop_after(1))
    for name in ("eval.json", "position.png"):
        (Path("run") / name).mkdir()  # as good as a full disk
    capsys.readouterr()
    assert evaluation.main(["run"]) == 0
    shown = capsys.readouterr()
    assert "bits per byte" in shown.out and shown.err.count("\nwarning: ") == 1
    assert evaluation.main(["run", "--tasks", "position", "--context", "32"]) == 0
    shown = capsys.readouterr()
    assert "Bits per byte by position" in shown.out + shown.err
    assert shown.err.count("warning: could not write run/position.png") == 1
    assert shown.err.count("warning: ") == 2


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
    sizes = (3 * 33, 3 * 33 + 2)  # two <|endoftext|> between three files
    assert (result["bytes"], result["tokens"]) == sizes


def test_eval_refuses_held_out_text_that_has_changed(here):
    train(small(out="run", tokens=64))
    Path("text.py").write_text(Path("text.py").read_text()[40:])
    with pytest.raises(ValueError, match="has changed since run was trained"):
        evaluation.evaluate("run")


def test_eval_names_bad_input_in_one_line(here, capsys):
    train(small(out="run", tokens=64))
    capsys.readouterr()
    before = everything_below(here)
    bad = {
        "nowhere": "not the folder of a run",
        "run --data nowhere": "does not exist",
        "run --device x": "'x'",
    }
    for words, message in bad.items():
        assert evaluation.main(words.split()) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and message in err
        assert everything_below(here) == before
