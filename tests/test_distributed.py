"""Many processes are one: equal losses by DDP and FSDP2, checkpoints of any number of them, errors and waits that are named.

The processes come from a fork server that has imported torch once, and meet as those of torchrun do.
"""

import contextlib
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import checkpoint
import distributed
import train as training
from hope import Hope
from train import TrainConfig, main, resumed, train

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i % 7}\n" for i in range(300))
SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "chunk": 8, "hidden": 32}


@pytest.fixture(scope="module")
def server():
    """A fork server; its children start with everything imported."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), before or ""])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_distributed", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"])
    yield context
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "plot", lambda folder, title: None)
    Path("text.py").write_text(TEXT)
    return tmp_path


def small(**changes) -> TrainConfig:
    """20 steps of 4 x 16 tokens of a tiny model."""
    options = {"data": "text.py", "tokens": 20 * 64, "batch_size": 4, "seq_len": 16, "eval_every": 10, "eval_tokens": 150,
               "save_every": 5, "device": "cpu", "set": SMALL, "lr": 4e-4}  # fmt: skip
    return TrainConfig(**{**options, **changes})


def log(run) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def losses(run) -> list[float]:
    return [r.get("bits_per_byte", r.get("val_bits_per_byte")) for r in log(run)]


class Stopped(Exception):
    """Thrown into a run in place of a kill."""


def stop_after(step):
    def on_step(record):
        if record["step"] == step and "bits_per_byte" in record:
            raise Stopped

    return on_step


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


SETTINGS = {
    "ddp": {},
    "ddp, micro-batches of 1": {"micro_batch": 1, "recompute": True},
    "ddp, CMS learns in context": {"cms_updates": "first_order", "set": SMALL | {"levels": [4, 8]}},
    "fsdp": {"fsdp": True},
    "fsdp, micro-batches of 1": {"fsdp": True, "micro_batch": 1},
    "fsdp, muon": {"fsdp": True, "optimizer": "muon"},
    "fsdp, m3": {"fsdp": True, "optimizer": "m3"},
    "fsdp, titans_mac": {"fsdp": True, "model": "titans_mac"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_two_processes_have_the_losses_of_one(here, server, setting):
    config = small(**SETTINGS[setting])
    one = {**vars(config), "fsdp": False, "micro_batch": 0, "recompute": False}
    train(TrainConfig(**{**one, "out": "one"}))
    processes(server, 2, run, TrainConfig(**{**vars(config), "out": "two"}))
    assert len(losses("one")) == 22
    assert losses("two") == pytest.approx(losses("one"), abs=1e-5)
    assert Path("one/sample.txt").read_bytes() == Path("two/sample.txt").read_bytes()
    Hope.load("two")
