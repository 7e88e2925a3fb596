"""What a training run is told: TrainConfig, the set-ups of the presets, and the command line.

Every field of TrainConfig is a flag of train.py, with its help, its legal range in words and as a
test, and whether a resumed run may change it.
"""

import argparse
import inspect
import json
import math
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from hope import MIXERS, PRESETS, HopeConfig
from layers import one_of
from optimizers import OPTIMIZERS
from support.checkpoint import first_line, parse_json
from support.flags import DEVICES, Help, Parser


def flag(default, help, wanted="", check=lambda value: True, on_resume=False):
    """A field that is also a flag. wanted: the legal range in words; on_resume: may be changed."""
    metadata = {"help": help, "wanted": wanted, "check": check, "on_resume": on_resume}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


AT_LEAST_1 = ("at least 1", lambda value: value >= 1)
AT_LEAST_0 = ("at least 0", lambda value: value >= 0)
POSITIVE = ("above 0", lambda value: 0 < value < math.inf)
FRACTION = ("from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_1 = ("from 0 to below 1", lambda value: 0 <= value < 1)
SEED = ("from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
AN_OPTIMIZER = ("one of " + ", ".join(OPTIMIZERS), OPTIMIZERS.__contains__)
# model is a flag of its own, vocab_size is the tokenizer's
FREE = ("without model and vocab_size", {"model", "vocab_size"}.isdisjoint)


def listed(text: str) -> list[float]:
    """The numbers of "1,0.5"; [0] where they are no numbers, which no field allows."""
    try:
        return [float(part) for part in str(text).split(",")]
    except ValueError:
        return [0.0]


def rising(text: str) -> bool:
    """Whether a text lists whole numbers from 1 on that do not fall."""
    numbers = listed(text)
    return numbers == sorted(numbers) and all(n >= 1 and n == int(n) for n in numbers)


@dataclass
class TrainConfig:
    """One run. Values are checked on creation; ValueError names field, value and legal range."""

    model: str = flag("hope", "one of " + ", ".join(MIXERS))
    preset: str = flag("nano", "size of the model, one of " + ", ".join(PRESETS))
    set: dict = flag(
        {}, "a field of HopeConfig, as --set n_layers=2 (repeatable; --set help lists them)", *FREE
    )
    pretrained: str | None = flag(
        None, "Llama checkpoint to start from, folder or GGUF file (support/pretrained.py)"
    )
    data: str = flag(
        "stdlib",
        "'stdlib' (this Python's own source), a text file, a folder of text or of shards (data.py)",
        on_resume=True,
    )
    out: str | None = flag(
        None, "folder of the run; without it runs/<model>-<preset>, numbered if taken"
    )
    resume: str | None = flag(None, "folder of a run to continue", on_resume=True)
    tokens: int = flag(
        850_000, "tokens to train on, rounded up to whole steps", *AT_LEAST_1, on_resume=True
    )
    batch_size: int = flag(4, "rows in a step, of all processes together", *AT_LEAST_1)
    micro_batch: int = flag(
        0,
        "rows a process reads at once, to fit its memory; 0: all its rows",
        *AT_LEAST_0,
        on_resume=True,
    )
    seq_len: int = flag(512, "tokens in a row", *AT_LEAST_1)
    optimizer: str = flag(
        "adamw", "adamw, or for the matrices: " + ", ".join(OPTIMIZERS[1:]), *AN_OPTIMIZER
    )
    lr: float = flag(6e-3, "highest learning rate", *POSITIVE, on_resume=True)
    min_lr_ratio: float = flag(
        0.1, "learning rate of the last step, as a fraction of lr", *FRACTION, on_resume=True
    )
    warmup: float = flag(
        0.05, "fraction of the steps in which the learning rate rises", *FRACTION, on_resume=True
    )
    cms_periods: str | None = flag(
        None,
        "training steps between updates of each CMS level, fast to slow, as 1,8 (NL 71 over "
        "steps); all else steps every time",
        "whole numbers of at least 1 with commas, that do not fall",
        lambda value: value is None or rising(value),
    )
    cms_lrs: str | None = flag(
        None,
        "learning rate of each CMS level in training, as a fraction of lr: 1,0.5",
        "numbers above 0 with commas",
        lambda value: value is None or all(number > 0 for number in listed(value)),
    )
    cms_rise: float = flag(
        0.2, "fraction of the steps in which the inner steps of the CMS levels rise", *FRACTION
    )
    weight_decay: float = flag(0.1, "on matrices", *AT_LEAST_0)
    beta1: float = flag(0.9, "AdamW's", *BELOW_1)
    beta2: float = flag(0.95, "AdamW's", *BELOW_1)
    grad_clip: float = flag(
        1.0, "longest gradient norm; a longer gradient is scaled to it", *POSITIVE, on_resume=True
    )
    seed: int = flag(0, "of the weights and the batches", *SEED)
    eval_every: int = flag(
        200, "steps between validations; 0: only at the end", *AT_LEAST_0, on_resume=True
    )
    eval_tokens: int = flag(
        32_768, "held-out tokens of those; at the end, all", *AT_LEAST_1, on_resume=True
    )
    save_every: int = flag(200, "steps between checkpoints", *AT_LEAST_1, on_resume=True)
    keep: int = flag(2, "newest checkpoints to keep", *AT_LEAST_1, on_resume=True)
    max_skipped: int = flag(
        10,
        "steps in a row left out, for a loss or gradient that is not finite, before the run stops",
        *AT_LEAST_0,
        on_resume=True,
    )
    device: str = flag("auto", DEVICES, on_resume=True)
    threads: int = flag(0, "CPU threads; 0: torch's own choice", *AT_LEAST_0, on_resume=True)
    compile: bool | None = flag(
        None,
        "torch.compile the blocks; if not said: on a GPU, where fused kernels take all chunks",
        on_resume=True,
    )
    fsdp: bool = flag(
        False, "shard weights and optimizer (FSDP2, with recompute); needs torchrun", on_resume=True
    )
    recompute: bool = flag(
        False,
        "keep only the inputs of blocks for the backward pass: less memory, a third more work",
        on_resume=True,
    )
    check_kernels: int = flag(
        0,
        "steps between two computations of one row's gradient by kernels.py and by torch, whose "
        "relative difference is logged as kernel_gap; 0: never",
        *AT_LEAST_0,
        on_resume=True,
    )
    wandb: bool = flag(False, "log to Weights & Biases too (pip install wandb)", on_resume=True)

    def __post_init__(self):
        for f in fields(self):
            value = _convert(f.name, f.type, getattr(self, f.name))
            if not f.metadata["check"](value):
                raise ValueError(f"{f.name} must be {f.metadata['wanted']}, got {value}")
            setattr(self, f.name, value)
        if self.fsdp and self.optimizer == "dmgd":  # its memories are networks on whole gradients
            raise ValueError("fsdp cannot be combined with optimizer dmgd; use another optimizer")
        if self.fsdp and self.check_kernels:
            raise ValueError("check_kernels reads whole gradients, which fsdp does not have; use 0")
        if self.pretrained:
            if self.model not in ("hope", "hope_attention"):
                wanted = "hope_attention, which pretrained makes of it"
                raise ValueError(f"model must be {wanted}, got {self.model!r}")
            self.pretrained = os.path.abspath(self.pretrained)
            self.model = "hope_attention"
            self.preset = Path(self.pretrained).name
        if self.data != "stdlib":
            self.data = os.path.abspath(self.data)  # a run can be resumed from another folder

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.tokens // self.tokens_per_step)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    def fresh_folder(self) -> Path:
        """The folder a new run will make. ValueError if `out` is taken."""
        if self.out:
            if Path(self.out).exists():
                use = f"name a new folder, or continue it with --resume {shlex.quote(self.out)}"
                raise ValueError(f"out {self.out!r} exists: {use}")
            return Path(self.out)
        path = Path(f"runs/{self.model}-{self.preset}")
        number = 2
        while path.exists():
            path = Path(f"runs/{self.model}-{self.preset}-{number}")
            number += 1
        return path


def _convert(name: str, kind: type, value):
    """`value`, maybe the text of a flag, as the field's type; 2e6 is an int."""
    wanted = {int: "a whole number, as 2000000 or 2e6", float: "a number", dict: "field=value"}
    for known, what in {str: "a text that is not empty", bool: "true or false"}.items():
        if kind in (known, known | None) and (not isinstance(value, kind) or value == ""):
            raise ValueError(f"{name} must be {what}, got {value!r}")
    try:
        if kind is int:
            return _whole(value)
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is float:
            raise TypeError
        if kind is dict and not isinstance(value, dict):
            pairs = dict(item.split("=", 1) for item in value)
            return {key: json_or_text(text) for key, text in pairs.items()}
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{name} must be {wanted[kind]}, got {value!r}") from None
    return value


def _whole(value) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, str) and value.lstrip("-").isdigit():
        return int(value)
    if isinstance(value, int):
        return value
    if not float(value).is_integer():
        raise ValueError
    return int(float(value))


def json_or_text(text: str):
    """The value that a text is as JSON, else the text itself."""
    try:
        return parse_json(text)
    except ValueError:
        return text


# --------------------------------------------------------------------------------------------------
# Set-ups that presets bring along

# How the Titans and Gated DeltaNet papers train: 340M on 15B, 760M on 30B, 1.3B on 100B tokens of
# FineWeb-Edu. The two smaller presets, which they lack: 20 tokens a parameter. Warm-up: 1% of the
# steps, as in Gated DeltaNet's code. micro_batch: a fused kernel has a program for each row and
# head, one at a time on each of the 108 to 132 multiprocessors of a GPU of 80 GB, so rows x heads
# comes as near to these as the memory allows (support/plan.py): 96, 96, 64, 48, 64.
PAPER = {
    "data": "data/fineweb",
    "batch_size": 128,
    "seq_len": 4096,
    "lr": 4e-4,
    "min_lr_ratio": 0.1,
    "warmup": 0.01,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "eval_every": 1000,
    "eval_tokens": 2**20,
    "save_every": 1000,
}
SETUPS = {
    "30m": PAPER | {"tokens": 600_000_000, "micro_batch": 16},
    "125m": PAPER | {"tokens": 2_500_000_000, "micro_batch": 8},
    "340m": PAPER | {"tokens": 15_000_000_000, "micro_batch": 4},
    "760m": PAPER | {"tokens": 30_000_000_000, "micro_batch": 2},
    "1.3b": PAPER | {"tokens": 100_000_000_000, "micro_batch": 2},
}


# --------------------------------------------------------------------------------------------------
# The command line

# The field that begins a group of --help: its title.
GROUPS = {
    "model": "the model",
    "data": "data, folder, length",
    "optimizer": "optimization",
    "seed": "course of the run",
    "device": "machine",
}


def dry_run_flags(parser) -> None:
    """What stands beside train.py's flags for what it would cost, without training."""
    group = parser.add_argument_group("what it would cost (support/plan.py)")
    group.add_argument("--dry-run", action="store_true", help="count and do not train")
    group.add_argument("--gpus", type=int, metavar="N", help="GPUs (default: those here, or 8)")
    group.add_argument("--gpu", metavar="NAME", help="kind of GPU (default: that here, or H100)")
    what = "part of the GPU's peak that is reached, from 0 to 1 (default: by what computes)"
    group.add_argument("--utilisation", type=float, metavar="X", help=what)


def settings() -> str:
    """The fields of --set, a line each: the default, and what hope.py says of it."""
    source = inspect.getsource(HopeConfig)
    lines = ["fields of --set with the defaults of HopeConfig (presets have some of their own):"]
    for f in fields(HopeConfig):
        if f.name not in ("model", "vocab_size"):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            text = f"{f.name}={json.dumps(default, separators=(',', ':'))}"
            said = re.search(rf"^    {f.name}: .*  # (.*)", source, re.MULTILINE)[1]
            lines.append(f"  {text:<23} {said.replace('None', 'null')}")
    return "\n".join(lines)


def from_file(path: str) -> dict:
    """Fields of TrainConfig from a TOML file or a run's config.json. ValueError for all else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = _toml(text) if path.endswith(".toml") else parse_json(text)
        if isinstance(found, dict) and "corpus" in found:  # of a run: not where that one went
            found = {key: found["train"][key] for key in found["train"].keys() - {"out", "resume"}}
        found = {key.replace("-", "_"): value for key, value in found.items()}
        for name in found:
            one_of("field of TrainConfig", name, [f.name for f in fields(TrainConfig)])
        if "set" in found:  # as texts of flags: TOML lacks null, but has levels = "[64, null]"
            pairs = found["set"].items()
            found["set"] = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in pairs]
        return found
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        wanted = "TOML or a run's config.json"
        raise ValueError(f"config {path!r} must be {wanted}: {first_line(error)}") from None


def _toml(text: str) -> dict:
    try:
        import tomllib
    except ImportError:  # before Python 3.11
        try:
            import tomli as tomllib
        except ImportError:
            raise ValueError("this Python reads no TOML before: pip install tomli") from None
    return tomllib.loads(text)


def parse(argv: list[str] | None, description: str, resumed: Callable) -> TrainConfig:
    """TrainConfig from flags; resumed(folder, **changes) makes that of a run to continue.

    ValueError for a bad flag.
    """
    parser = Parser(
        description=description,
        formatter_class=Help,
        usage="python train.py [--flag value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for f in fields(TrainConfig):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        default = "none" if f.default is MISSING or f.default is None else f.default
        wanted = f.metadata["wanted"]
        legal = "" if wanted.startswith("one of") else wanted + "; " * bool(wanted)
        text = f"{f.metadata['help']} ({legal}default: {default})"
        names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))
        if f.type in (bool, bool | None):
            group.add_argument(*names, help=text, action=argparse.BooleanOptionalAction)
        elif f.type is dict:
            group.add_argument(*names, help=text, action="append", metavar="FIELD=VALUE")
        else:
            metavar = {int: "N", float: "X"}.get(f.type, "NAME")
            group.add_argument(*names, help=text, metavar=metavar)
        if f.name == "set":
            what = "MLP memories, adaptive q, momentum; short for --set published=true"
            group.add_argument("--published", help=what, action="store_true")
            what = "TOML, or config.json of a run, with values of these flags; flags override it"
            group.add_argument("--config", help=what, metavar="FILE")
    dry_run_flags(parser)
    given = vars(parser.parse_args(argv))
    for name in ("gpus", "gpu", "utilisation"):
        if name in given:
            raise ValueError(f"--{name} must come with --dry-run, which trains nothing")
    if "help" in given.get("set", []):
        print(settings())
        raise SystemExit(0)
    if given.pop("published", False):
        given["set"] = ["published=true", *given.get("set", [])]
    if "config" in given:
        for name, value in from_file(given.pop("config")).items():
            given[name] = value + given.get(name, []) if name == "set" else given.get(name, value)
    if given.get("resume"):
        return resumed(given.pop("resume"), **given)
    return TrainConfig(**SETUPS.get(str(given.get("preset")), {}) | given)
