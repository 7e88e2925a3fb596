"""What tests of runs share: the command line and the log of a run, and a way to stop it."""

import json
from pathlib import Path

from support.config import TrainConfig


def flags(config: TrainConfig) -> list[str]:
    """The command line of a config."""
    words = [f"--set={key}={json.dumps(value)}" for key, value in config.set.items()]
    names = "data tokens batch_size seq_len eval_every eval_tokens save_every device out"
    for name in names.split():
        value = getattr(config, name)
        if value is not None:
            words.append(f"--{name}={value}")
    return words


def log(run) -> list[dict]:
    """The lines of metrics.jsonl, all of them whole."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


class Stopped(Exception):
    """Thrown into a run in place of a kill."""


def stop_after(step):
    def on_step(record):
        if record["step"] == step and "bits_per_byte" in record:
            raise Stopped

    return on_step
