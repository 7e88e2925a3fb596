"""Several processes are as one: equal losses, checkpoints of any number of them, named errors.

The processes come from a fork server that has imported torch once; they meet as torchrun's do.
"""

import contextlib
import json
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
import zlib
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from small_runs import Stopped, flags, log, stop_after

import hope
import support.run
import train as training
from hope import Hope, HopeConfig
from support import checkpoint, distributed
from support.config import TrainConfig
from support.run import Run, read_config, resumed
from train import main, train

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "chunk": 8, "hidden": 32}
SMALL |= {"levels": [4, None]}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    """A fork server; its children start with everything imported."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), before or ""])
    context = multiprocessing.get_context("forkserver")
    late = ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"]
    context.set_forkserver_preload(["test_distributed", *late])
    yield context
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


def small(**changes) -> TrainConfig:
    """20 steps of 4 x 16 tokens of a tiny model."""
    options = {"data": "text.py", "tokens": 20 * 64, "batch_size": 4, "seq_len": 16, "set": SMALL}
    options |= {"eval_every": 10, "eval_tokens": 150, "save_every": 5, "device": "cpu"}
    return TrainConfig(**{**options, **changes})


def losses(run) -> list[float]:
    return [r.get("bits_per_byte", r.get("val_bits_per_byte")) for r in log(run)]


def child(rank, world, port, folder, work, args):
    """One process of a group, as torchrun would start it; what it prints goes to a file."""
    os.chdir(folder)
    if world:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    training.plot = lambda run: None
    with open(f"out{rank}", "w") as out:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            status = work(*args)
    sys.stdout.flush()
    os._exit(status or 0)  # without waiting for the other's sockets to close


def spawn(server, world, work, *args):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = []
    for rank in range(max(1, world)):
        each = (rank, world, port, os.getcwd(), work, args)
        group.append(server.Process(target=child, args=each))
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
    support.run.Hope = Double
    train(config)


SHORT = {"tokens": 6 * 64}
SETTINGS = {
    "ddp, micro-batches of 1": {"micro_batch": 1, "recompute": True},
    "ddp, no CMS step in context": {**SHORT, "set": SMALL | {"cms_updates": "off"}},
    "ddp, both clocks": {**SHORT, "cms_periods": "1,4", "cms_lrs": "1,0.5"},
    "ddp, second order": {**SHORT, "set": SMALL | {"cms_updates": "full"}},
    "fsdp, the last block learns": {**SHORT, "fsdp": True, "set": SMALL | {"cms_blocks": 1}},
    "fsdp, micro-batches of 1, m3": {
        "fsdp": True, "micro_batch": 1, "optimizer": "m3", "set": SMALL | {"cms_updates": "off"}
    },
    "fsdp, micro-batches of 1": {**SHORT, "fsdp": True, "micro_batch": 1},
    "fsdp, titans_mac": {**SHORT, "fsdp": True, "model": "titans_mac"},
}


@slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_two_processes_have_the_losses_of_one(here, server, setting):
    # At 3e-3 AdamW makes 1e-4 of differences in rounding: see the test in float64.
    config = small(**{"lr": 4e-4, **SETTINGS[setting]})
    train(replace(config, out="one", fsdp=False, micro_batch=0, recompute=False))
    processes(server, 2, run, replace(config, out="two"))
    assert len(losses("one")) == (22 if config.steps == 20 else 7)  # with validations
    assert losses("two") == pytest.approx(losses("one"), abs=1e-5)
    one, two = (log(each)[0]["grad_norm"] for each in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)
    assert Path("one/sample.txt").read_bytes() == Path("two/sample.txt").read_bytes()


@slow
def test_in_float64_two_processes_have_the_losses_of_one_at_any_learning_rate(
    here, server, monkeypatch
):
    monkeypatch.setattr(support.run, "Hope", Double)
    train(small(out="one", lr=1e-2))
    processes(server, 2, run_double, small(out="two", lr=1e-2, fsdp=True))
    assert losses("two") == pytest.approx(losses("one"), abs=1e-10)


# Checkpoints


@slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_checkpoints_of_two_processes_are_read_by_one_and_the_reverse(here, server, fsdp):
    settings = {"lr": 4e-4, "optimizer": "muon", "save_every": 4}
    settings["set"] = SMALL | {"cms_updates": "off"}  # FSDP2 with steps takes AdamW alone
    train(small(out="whole", **settings))
    processes(server, 2, run, small(out="of two", fsdp=fsdp, **settings), 10)
    run(small(out="of one", **settings), 10)
    assert checkpoint.saved_steps("of two") == checkpoint.saved_steps("of one") == [4, 8]
    assert list(checkpoint.folder("of two", 8).glob("*1_0.distcp"))  # process 1 wrote its shard
    model, other = (Run.open(each, "cpu").model for each in ("of two", "of one"))
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=1e-5)
    train(replace(resumed("of two"), fsdp=False))
    processes(server, 2, run, replace(resumed("of one"), fsdp=fsdp))
    for each in ("of two", "of one"):
        assert losses(each) == pytest.approx(losses("whole"), abs=1e-5)


@pytest.mark.parametrize(
    "damage", ["cut", pytest.param("rest", marks=slow), pytest.param("zeros", marks=slow)]
)
@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(here, capsys, damage):
    train(small(out="run"))
    expected = losses("run")
    newest = checkpoint.folder("run", 20)
    tensors = newest / "__0_0.distcp"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "zeros":
        tensors.write_bytes(bytes(tensors.stat().st_size))
    else:
        (newest / "rest.pt").write_bytes((newest / "rest.pt").read_bytes()[:100])
    capsys.readouterr()
    Run.open("run", "cpu")
    warning = "warning: checkpoint run/checkpoints/step-20 is damaged .*: going back"
    assert re.search(warning, capsys.readouterr().err)
    train(resumed("run"))
    assert losses("run") == expected
    assert re.search(warning, capsys.readouterr().err)
    Run.open("run", "cpu")
    assert not capsys.readouterr().err  # the one that was written since is complete


@pytest.mark.slow
def test_only_the_newest_checkpoints_are_kept(here):
    train(small(out="run", save_every=3, keep=3))
    assert checkpoint.saved_steps("run") == [15, 18, 20]
    names = [path.name for path in Path("run/checkpoints").iterdir()]
    assert sorted(names) == ["step-15", "step-18", "step-20"]


def test_metadata_of_a_checkpoint_cannot_run_code(here):
    train(small(out="run", tokens=64))
    for step in checkpoint.saved_steps("run"):
        path = checkpoint.folder("run", step) / ".metadata"
        path.write_bytes(pickle.dumps(os.system, 4).ljust(path.stat().st_size))
        kept = torch.load(path.with_name("rest.pt"), weights_only=True)
        kept["metadata_crc32"] = zlib.crc32(path.read_bytes())
        torch.save(kept, path.with_name("rest.pt"))
    with pytest.raises(ValueError, match="system has no place in a checkpoint"):
        Run.open("run", "cpu")


def limited_run(size, words):
    """A run whose files cannot grow beyond size bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return main(words)


@slow
def test_disk_that_is_full_gives_one_line_and_leaves_the_earlier_checkpoint(here, server):
    train(small(out="run", tokens=5 * 64))
    earlier = checkpoint.folder("run", 5)
    size = (earlier / "__0_0.distcp").stat().st_size
    before = {path: path.read_bytes() for path in earlier.iterdir()}
    words = ["--resume", "run", "--tokens", str(10 * 64)]
    assert finish(spawn(server, 0, limited_run, size // 2, words)) == [2]
    error = Path("out0").read_text().splitlines()[-1]
    assert "could not write run/checkpoints/step-10" in error
    assert "the earlier run/checkpoints/step-5 is intact" in error
    assert "File too large; the disk has" in error
    assert {path: path.read_bytes() for path in before} == before
    assert checkpoint.saved_steps("run") == [0, 5]
    assert not list(Path("run/checkpoints").glob("*.tmp"))
    assert train(replace(resumed("run"), tokens=10 * 64))["step"] == 10
    assert finish(spawn(server, 0, limited_run, size // 8, flags(small(out="new")))) == [2]
    assert "could not write new/checkpoints/step-0" in Path("out0").read_text()
    assert not Path("new").exists()


def whole_lines(run) -> list[dict]:
    """The lines of metrics.jsonl so far; the last may be about to be written."""
    path = Path(run, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def killed_and_resumed(server, kills, **settings):
    """A run killed so often, at random moments, up to 14 steps further each time.

    Returns how often that was amid a save.
    """
    chance = random.Random(0)
    amid_saves = 0
    for _ in range(kills):
        exists = Path("killed").exists()
        config = resumed("killed") if exists else small(out="killed", **settings)
        seen = last = len(whole_lines("killed"))
        (process,) = spawn(server, 0, run, config)
        until = seen + chance.randint(0 if seen else 1, 14)
        while last < until and process.is_alive():
            last = len(whole_lines("killed"))
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        amid_saves += bool(list(Path("killed/checkpoints").glob("*.tmp")))
        done = max((record["step"] for record in whole_lines("killed")), default=0)
        model = Hope(HopeConfig(**read_config("killed")["model"]))
        kept = checkpoint.load("killed", model)
        assert kept >= done - settings["save_every"]  # complete, and not long ago
    assert finish(spawn(server, 0, run, resumed("killed"))) == [0]
    assert "damaged" not in Path("out0").read_text()
    return amid_saves


KILLS = int(os.environ.get("KILLS", 3))


@slow
def test_a_run_killed_again_and_again_has_the_losses_of_an_undisturbed_one(here, server):
    settings = {"tokens": 64 * 16 * (KILLS + 1), "save_every": 3, "eval_every": 0}
    amid_saves = killed_and_resumed(server, KILLS, **settings)
    print(f"killed {KILLS} times, {amid_saves} of them amid a save")
    train(small(out="whole", **settings))
    assert losses("killed") == losses("whole")


# What goes wrong in one process


def fail_in_process_1(config):
    def no_disk(*_):
        raise OSError("no such disk here")

    if distributed.rank() == 1:
        support.run.load_corpus = no_disk
    return main(flags(config))


@slow
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


@slow
def test_a_barrier_names_who_does_not_come(here, server):
    first, _ = processes(server, 2, wait_for_nobody)
    assert "process 0 waited for the others before dinner, at most 2 s, in vain" in first
    assert re.search("[Rr]anks? 1", first)


def start_and_stop():
    before = distributed.started(), distributed.world(), distributed.control()
    distributed.start(torch.device("cpu"))
    ranks = distributed.gather(distributed.rank())
    sums = distributed.total([1.0, distributed.rank()])
    distributed.stop()
    print(before, ranks, sums, distributed.started(), distributed.world(), distributed.control())


@slow
def test_processes_meet_once_and_part(here, server):
    for out in processes(server, 2, start_and_stop):
        assert out == "(False, 1, None) [0, 1] [2.0, 1.0] False 1 None\n"


def poisoned(config):
    """A loss that is not a number, in process 1 alone, in two steps."""
    loss_fn = hope.loss_fn
    calls = iter(range(1, 1000))

    def poison(logits, targets, reduction="mean"):
        bad = logits.requires_grad and next(calls) in (7, 8) and distributed.rank() == 1
        return loss_fn(logits, targets, reduction) * (math.nan if bad else 1)

    hope.loss_fn = poison
    train(config)


@slow
def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(here, server):
    processes(server, 2, poisoned, small(out="run", fsdp=True, eval_every=0))
    lines = log("run")
    assert [(r["step"], r["skipped"]) for r in lines if "skipped" in r] == [(7, 1), (8, 2)]
    assert "step 7: " in lines[6]["why"] and "is not finite" in lines[6]["why"]
    assert [r["step"] for r in lines if "bits_per_byte" in r] == [*range(1, 7), *range(9, 21)]
    model = Run.open("run", "cpu").model
    assert model(torch.zeros(1, 3, dtype=torch.int64))[0].isfinite().all()


def bad_rows():
    return main(["--data", "text.py", "--batch_size", "3", "--device", "cpu"])


@slow
def test_rows_that_do_not_divide_among_the_processes_are_named(here, server):
    assert finish(spawn(server, 2, bad_rows)) == [2, 2]
    wanted = "batch_size must be a multiple of 2, the number of processes, got 3"
    assert wanted in Path("out0").read_text()
