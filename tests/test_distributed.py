"""Many processes are one: equal losses by DDP and FSDP2, checkpoints of any number of them, errors and waits that are named.

The processes come from a fork server that has imported torch once, and meet as those of torchrun do.
"""

import contextlib
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import socket
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from small_runs import Stopped, flags, log, stop_after

import train as training
from hope import Hope
from support import checkpoint, distributed
from support.config import TrainConfig
from support.run import resumed
from train import main, train

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "chunk": 8, "hidden": 32}


@pytest.fixture(scope="module")
def server():
    """A fork server; its children start with everything imported."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), before or ""])
    context = multiprocessing.get_context("forkserver")
    slow = ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"]
    context.set_forkserver_preload(["test_distributed", *slow])
    yield context
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def small(**changes) -> TrainConfig:
    """20 steps of 4 x 16 tokens of a tiny model."""
    options = {"data": "text.py", "tokens": 20 * 64, "batch_size": 4, "seq_len": 16, "eval_every": 10, "eval_tokens": 150,
               "save_every": 5, "device": "cpu", "set": SMALL}  # fmt: skip
    return TrainConfig(**{**options, **changes})


def losses(run) -> list[float]:
    return [r.get("bits_per_byte", r.get("val_bits_per_byte")) for r in log(run)]


def child(rank, world, port, folder, work, args):
    """One process of a group, as torchrun would start it; what it prints goes to a file."""
    os.chdir(folder)
    if world:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    training.plot = lambda folder, title: None
    with open(f"out{rank}", "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = work(*args)
    sys.stdout.flush()
    os._exit(status or 0)  # without waiting for the other's sockets to close


def spawn(server, world, work, *args):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(rank, world, port, os.getcwd(), work, args) for rank in range(max(1, world))]
    group = [server.Process(target=child, args=each) for each in arguments]
    for process in group:
        process.start()
    return group


def finish(group) -> list[int]:
    for process in group:
        process.join(timeout=100)
        assert process.exitcode is not None, "hangs"
    return [process.exitcode for process in group]


def processes(server, world, work, *args) -> list[str]:
    """Run work(*args) in `world` processes -> what each printed. Their exit statuses must be 0."""
    codes = finish(spawn(server, world, work, *args))
    out = [Path(f"out{rank}").read_text() for rank in range(world)]
    assert codes == [0] * world, out
    return out


def run(config, stop=0):
    with contextlib.suppress(Stopped):
        train(config, stop_after(stop))


# The same losses


class Double(Hope):
    """Weights in float64, where rounding cannot grow into differences."""

    def to(self, device=None, dtype=None):
        return super().to(device=device, dtype=torch.float64)


def run_double(config):
    training.Hope = Double
    train(config)


SETTINGS = {
    "ddp, micro-batches of 1": {"micro_batch": 1, "recompute": True},
    "ddp, CMS learns in context": {"tokens": 6 * 64, "cms_updates": "first_order", "set": SMALL | {"levels": [4, 8]}},
    "fsdp, micro-batches of 1, m3": {"fsdp": True, "micro_batch": 1, "optimizer": "m3"},
    "fsdp, titans_mac": {"tokens": 6 * 64, "fsdp": True, "model": "titans_mac"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_processes_have_the_losses_of_one(here, server, setting):
    config = small(**{"lr": 4e-4, **SETTINGS[setting]})  # at 3e-3 AdamW makes 1e-4 of differences in rounding: see below
    train(replace(config, out="one", fsdp=False, micro_batch=0, recompute=False))
    processes(server, 2, run, replace(config, out="two"))
    assert len(losses("one")) == (22 if config.steps == 20 else 7)  # with validations
    assert losses("two") == pytest.approx(losses("one"), abs=1e-5)
    assert log("two")[0]["grad_norm"] == pytest.approx(log("one")[0]["grad_norm"], rel=1e-5)
    assert Path("one/sample.txt").read_bytes() == Path("two/sample.txt").read_bytes()


def test_in_float64_two_processes_have_the_losses_of_one_at_any_learning_rate(here, server, monkeypatch):
    monkeypatch.setattr(training, "Hope", Double)
    train(small(out="one", lr=1e-2))
    processes(server, 2, run_double, small(out="two", lr=1e-2, fsdp=True))
    assert losses("two") == pytest.approx(losses("one"), abs=1e-10)


# Checkpoints


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_checkpoints_of_two_processes_are_read_by_one_and_the_reverse(here, server, fsdp):
    settings = {"lr": 4e-4, "optimizer": "muon", "save_every": 4}
    train(small(out="whole", **settings))
    processes(server, 2, run, small(out="of two", fsdp=fsdp, **settings), 10)
    run(small(out="of one", **settings), 10)
    assert checkpoint.saved_steps("of two") == checkpoint.saved_steps("of one") == [4, 8]
    assert [path.name for path in checkpoint.folder("of two", 8).glob("*1_0.distcp")]  # process 1 wrote its share
    model, other = (Hope.load(each)[0] for each in ("of two", "of one"))
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=1e-5)
    train(replace(resumed("of two"), fsdp=False))
    processes(server, 2, run, replace(resumed("of one"), fsdp=fsdp))
    for each in ("of two", "of one"):
        assert losses(each) == pytest.approx(losses("whole"), abs=1e-5)


@pytest.mark.parametrize("damage", ["cut", "rest", "flipped"])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(here, capsys, damage):
    train(small(out="run"))
    expected, newest = losses("run"), checkpoint.folder("run", 20)
    tensors = newest / "__0_0.distcp"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "flipped":
        tensors.write_bytes(bytes(tensors.stat().st_size))
    else:
        (newest / "rest.pt").write_bytes((newest / "rest.pt").read_bytes()[:100])
    capsys.readouterr()
    Hope.load("run")
    assert re.search("warning: checkpoint run/checkpoints/step-20 is torn .*: going back", capsys.readouterr().err)
    train(resumed("run"))
    assert losses("run") == expected
    Hope.load("run")
    assert "torn" in capsys.readouterr().err.splitlines()[0]  # of the resume; the one written since is whole


def test_only_the_newest_checkpoints_are_kept(here):
    train(small(out="run", save_every=3, keep=3))
    assert checkpoint.saved_steps("run") == [15, 18, 20]
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step-15", "step-18", "step-20"]


def test_metadata_of_a_checkpoint_cannot_run_code(here):
    train(small(out="run", tokens=64))
    for step in checkpoint.saved_steps("run"):
        path = checkpoint.folder("run", step) / ".metadata"
        path.write_bytes(pickle.dumps(os.system, 4).ljust(path.stat().st_size))
    with pytest.raises(ValueError, match="system has no place in a checkpoint"):
        Hope.load("run")


def limited_run(size, words):
    """A run whose files cannot grow beyond size bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return main(words)


def test_disk_that_is_full_gives_one_line_and_leaves_the_earlier_checkpoint(here, server):
    train(small(out="run", tokens=5 * 64))
    size = (checkpoint.folder("run", 5) / "__0_0.distcp").stat().st_size
    before = {path: path.read_bytes() for path in checkpoint.folder("run", 5).iterdir()}
    assert finish(spawn(server, 0, limited_run, size // 2, ["--resume", "run", "--tokens", str(10 * 64)])) == [2]
    error = Path("out0").read_text().splitlines()[-1]
    assert "could not write run/checkpoints/step-10" in error and "the earlier run/checkpoints/step-5 is intact" in error
    assert "File too large; the disk has" in error
    assert {path: path.read_bytes() for path in before} == before and checkpoint.saved_steps("run") == [0, 5]
    assert not list(Path("run/checkpoints").glob("*.tmp"))
    assert train(replace(resumed("run"), tokens=10 * 64))["step"] == 10
    assert finish(spawn(server, 0, limited_run, size // 8, flags(small(out="new")))) == [2]
    assert "could not write new/checkpoints/step-0" in Path("out0").read_text() and not Path("new").exists()


def killed_and_resumed(server, kills, **settings):
    """A run killed so often, at random moments, up to 14 steps further each time -> how often that was amid a save."""
    chance, amid_saves, run_folder = random.Random(0), 0, Path("killed")
    for _ in range(kills):
        config = resumed("killed") if run_folder.exists() else small(out="killed", **settings)
        seen = last = len(training.read_metrics(run_folder))
        (process,) = spawn(server, 0, run, config)
        until = seen + chance.randint(0 if seen else 1, 14)
        while last < until and process.is_alive():
            last = len(training.read_metrics(run_folder))
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        amid_saves += bool(list(Path("killed/checkpoints").glob("*.tmp")))
        done = max((record["step"] for record in training.read_metrics(run_folder)), default=0)
        assert checkpoint.load(run_folder, model_of(run_folder)) >= done - settings["save_every"]  # whole, and not long ago
    assert finish(spawn(server, 0, run, resumed("killed"))) == [0]
    assert "torn" not in Path("out0").read_text()
    return amid_saves


def model_of(run):
    return Hope(training.HopeConfig(**training.read_config(run)["model"]))


KILLS = int(os.environ.get("KILLS", 3))


def test_a_run_killed_again_and_again_has_the_losses_of_an_undisturbed_one(here, server):
    settings = {"tokens": 64 * 16 * (KILLS + 1), "save_every": 3, "eval_every": 0}
    amid_saves = killed_and_resumed(server, KILLS, **settings)
    print(f"killed {KILLS} times, {amid_saves} of them amid a save")
    train(small(out="whole", **settings))
    assert losses("killed") == losses("whole")


# What goes wrong in one process


def fail_in_process_1(config):
    if distributed.rank() == 1:
        training.load_corpus = lambda *_: (_ for _ in ()).throw(OSError("no such disk here"))
    return main(flags(config))


def test_an_error_in_one_process_is_an_error_in_all_and_nothing_is_written(here, server):
    assert finish(spawn(server, 2, fail_in_process_1, small(out="run"))) == [2, 2]
    assert "train.py: error: no such disk here" in Path("out0").read_text()
    assert not Path("out1").read_text() and not Path("run").exists()


def wait_for_nobody():
    distributed.TIMEOUT = timedelta(seconds=2)
    distributed.start(torch.device("cpu"))
    if distributed.rank() == 1:
        time.sleep(5)
        return 0
    try:
        distributed.barrier("dinner")
    except TimeoutError as error:
        print(error)
    return 0


def test_a_barrier_names_who_does_not_come(here, server):
    first, _ = processes(server, 2, wait_for_nobody)
    assert "process 0 waited for the others before dinner, at most 2 s, in vain" in first and re.search("[Rr]anks? 1", first)


def poisoned(config):
    """A loss that is not a number, in process 1 alone, in two steps."""
    loss_fn, calls = training.loss_fn, iter(range(1, 1000))

    def poison(logits, targets, reduction="mean"):
        bad = logits.requires_grad and next(calls) in (7, 8) and distributed.rank() == 1
        return loss_fn(logits, targets, reduction) * (math.nan if bad else 1)

    training.loss_fn = poison
    train(config)


def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(here, server):
    processes(server, 2, poisoned, small(out="run", fsdp=True, eval_every=0))
    lines = log("run")
    assert [(r["step"], r["skipped"]) for r in lines if "skipped" in r] == [(7, 1), (8, 2)]
    assert "step 7: " in lines[6]["why"] and "is not finite" in lines[6]["why"]
    assert [r["step"] for r in lines if "bits_per_byte" in r] == [*range(1, 7), *range(9, 21)]
    assert Hope.load("run")[0](torch.zeros(1, 3, dtype=torch.int64))[0].isfinite().all()


def test_rows_that_processes_cannot_share_evenly_are_named(here, server):
    assert finish(spawn(server, 2, bad_rows)) == [2, 2]
    assert "batch_size is 3: legal is a multiple of 2, the number of processes" in Path("out0").read_text()


def bad_rows():
    return main(["--data", "text.py", "--batch_size", "3", "--device", "cpu"])
