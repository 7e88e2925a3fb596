"""Train a language model of this repository on real text: one loop, read top to bottom.

    python train.py                                         # Hope (nano) on the standard library's source
    python train.py --model transformer --tokens 1e6        # another model, the same data
    python train.py --data notes.txt --set n_layers=2 --set chunk=32
    python train.py --cms-updates first_order --set levels=[128,256]   # CMS levels learn in context while being trained
    python train.py --pretrained LLAMA --data notes.txt     # from a Llama checkpoint, made Hope-Attention (NL 7.3)
    python train.py --resume runs/hope-nano                 # go on after Ctrl-C, a kill, a power cut
    python train.py --resume runs/hope-nano --tokens 4e6    # train longer
    python train.py --help                                  # every field of TrainConfig, with its default
    python train.py --preset 340m --dry-run                 # what it would cost: parameters, FLOPs, memory, time (plan.py)
    torchrun --nproc_per_node=8 train.py --preset 340m ...  # the same run on 8 GPUs; --fsdp: weights in shares

The presets from 30m up bring a training set-up with them (SETUPS), which flags override: tokens, 0.5M to a step in rows of
4,096, AdamW at 4e-4 on a cosine, and shards in data/fineweb (python data.py fineweb-edu --out data/fineweb).

A run is a folder; everything needed to continue is in it:

    config.json     {"model": HopeConfig, "train": TrainConfig, "tokenizer": name, "corpus": its sizes and checksum}
    metrics.jsonl   a line per step {"step", "tokens", "bits_per_byte", "lr", "grad_norm", "tokens_per_s", "data_s", "mfu"},
                    every WATCH_EVERY steps with {"eta", "alpha"}, and lines of validation {"step", "tokens",
                    "val_bits_per_byte", "val_tokens", "cms_updates"}; of a step left out {"step", "tokens", "skipped", "why"}
    loss.png        the same as a picture
    checkpoints/    step-N: weights and optimizer, whole or not there (checkpoint.py); the --keep newest
    sample.txt      text generated at the end

    tokens_per_s, mfu   of all processes; mfu: counted FLOPs (hope.flops_per_token) over the GPUs' peak, on a known GPU
    data_s              seconds of the step that went into making its batch
    eta, alpha          per layer, the mean step size and retention of its memories: how fast they learn and forget

Resuming gives the losses of a run that was never stopped, bit for bit on CPU: a batch depends on (seed, step) alone and
the optimizer's state is saved. (More --tokens stretch the cosine: then the learning rate differs from there on.) Nor does
the number of processes change anything but rounding: batch_size is the rows of a step, of all processes together.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path

# OpenMP threads wait for each other by spinning, as long as they like: with a second busy process on the machine they
# spin against it: training here took a hundred times as long. A short spin cost single operations nothing measurable.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import checkpoint
import distributed
from checkpoint import first_line, write_beside
from data import batch, load_corpus, windows
from distributed import gather, on_all, on_first, rank, total, world
from hope import UPDATES, Hope, HopeConfig, device_for, flops_per_token, plain
from memory import full_precision, watch
from optimizers import OPTIMIZERS, optimizer_by_name
from vocabulary import TOKENIZER, n_bytes, save_tokenizer, tokenizer, tokenizer_of


def flag(default, help, legal="", check=lambda value: True, on_resume=False):
    """A field that is also a flag: help, legal range in words and as a test, whether a resumed run may change it."""
    metadata = {"help": help, "legal": legal, "check": check, "on_resume": on_resume}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


AT_LEAST_1 = ("at least 1", lambda value: value >= 1)
AT_LEAST_0 = ("at least 0", lambda value: value >= 0)
POSITIVE = ("above 0", lambda value: 0 < value < math.inf)
FRACTION = ("0 to 1", lambda value: 0 <= value <= 1)
BELOW_1 = ("0 to below 1", lambda value: 0 <= value < 1)
AN_OPTIMIZER = (", ".join(OPTIMIZERS), OPTIMIZERS.__contains__)
CMS_STEP = 1e-3  # initial inner step size of the CMS levels where they learn in context
# How the Titans and Gated DeltaNet papers train: 340M on 15B, 760M on 30B, 1.3B on 100B tokens of FineWeb-Edu. The two smaller
# presets, which they do not have: 20 tokens a parameter. Warm-up: 1% of the steps, as in Gated DeltaNet's code. micro_batch:
# what Hope can do without recompute on a GPU of 80 GB.
PAPER = dict(data="data/fineweb", batch_size=128, seq_len=4096, lr=4e-4, min_lr_ratio=0.1, warmup=0.01, weight_decay=0.1,
             beta1=0.9, beta2=0.95, grad_clip=1.0, eval_every=1000, eval_tokens=2**20, save_every=1000)  # fmt: skip
SETUPS = {
    "30m": PAPER | dict(tokens=600_000_000, micro_batch=16),
    "125m": PAPER | dict(tokens=2_500_000_000, micro_batch=8),
    "340m": PAPER | dict(tokens=15_000_000_000, micro_batch=4),
    "760m": PAPER | dict(tokens=30_000_000_000, micro_batch=2),
    "1.3b": PAPER | dict(tokens=100_000_000_000, micro_batch=1),
}
NOT_SET = ("all but model, a flag, and vocab_size, the tokenizer's", {"model", "vocab_size"}.isdisjoint)


@dataclass
class TrainConfig:
    """One run. Values are checked on creation; ValueError names the field, the value and the legal range."""

    model: str = flag("hope", "hope, hope_attention, titans, transformer, gated_deltanet, ...")
    preset: str = flag("nano", "size of the model")
    set: dict = flag({}, "set a field of HopeConfig, as in --set n_layers=2 (repeatable)", *NOT_SET)
    pretrained: str | None = flag(None, "folder of a Llama checkpoint to start from (Hope.from_pretrained; --set levels=...)")
    data: str = flag("stdlib", "'stdlib' (this Python's own source), a text file, a folder of text or of shards (data.py)",
                     on_resume=True)  # fmt: skip
    out: str | None = flag(None, "folder of the run; without it runs/<model>-<preset>, numbered if taken")
    resume: str | None = flag(None, "folder of a run to continue", on_resume=True)
    tokens: int = flag(2_000_000, "tokens to train on, rounded up to whole steps", *AT_LEAST_1, on_resume=True)
    batch_size: int = flag(4, "rows in a step, of all processes together", *AT_LEAST_1)
    micro_batch: int = flag(0, "rows a process reads at once, to fit its memory; 0: all its rows", *AT_LEAST_0, on_resume=True)
    seq_len: int = flag(512, "tokens in a row", *AT_LEAST_1)
    optimizer: str = flag("adamw", "adamw, or of the matrices, beside AdamW: " + ", ".join(OPTIMIZERS[1:]), *AN_OPTIMIZER)
    lr: float = flag(3e-3, "highest learning rate", *POSITIVE, on_resume=True)
    min_lr_ratio: float = flag(0.1, "learning rate of the last step, as a fraction of lr", *FRACTION, on_resume=True)
    warmup: float = flag(0.05, "fraction of the steps in which the learning rate rises", *FRACTION, on_resume=True)
    weight_decay: float = flag(0.1, "on matrices", *AT_LEAST_0)
    beta1: float = flag(0.9, "AdamW's", *BELOW_1)
    beta2: float = flag(0.95, "AdamW's", *BELOW_1)
    grad_clip: float = flag(1.0, "longest gradient norm; a longer gradient is scaled to it", *POSITIVE, on_resume=True)
    seed: int = flag(0, "of the weights and the batches", "0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
    eval_every: int = flag(200, "steps between validations; 0: only at the end", *AT_LEAST_0, on_resume=True)
    eval_tokens: int = flag(32_768, "held-out tokens of those; at the end, all", *AT_LEAST_1, on_resume=True)
    save_every: int = flag(200, "steps between checkpoints", *AT_LEAST_1, on_resume=True)
    keep: int = flag(2, "newest checkpoints to keep", *AT_LEAST_1, on_resume=True)
    max_skipped: int = flag(10, "steps in a row left out, for a loss or gradient that is not finite, before the run stops",
                            *AT_LEAST_0, on_resume=True)  # fmt: skip
    device: str = flag("auto", "auto, cpu, cuda or cuda:N", on_resume=True)
    threads: int = flag(0, "CPU threads; 0: torch's own choice", *AT_LEAST_0, on_resume=True)
    cms_updates: str = flag("off", "steps of the CMS levels in context: off, first_order or full; also in validation",
                            ", ".join(UPDATES), lambda value: value in UPDATES)  # fmt: skip
    compile: bool = flag(False, "torch.compile the model", on_resume=True)
    fsdp: bool = flag(False, "weights and optimizer in shares (FSDP2, with recompute); needs torchrun", on_resume=True)
    recompute: bool = flag(False, "keep only the inputs of blocks for the backward pass: less memory, a third more work",
                           on_resume=True)  # fmt: skip
    wandb: bool = flag(False, "log to Weights & Biases too (pip install wandb)", on_resume=True)

    def __post_init__(self):
        for f in fields(self):
            value = _convert(f.name, f.type, getattr(self, f.name))
            if not f.metadata["check"](value):
                raise ValueError(f"{f.name} is {value}: legal is {f.metadata['legal']}")
            setattr(self, f.name, value)
        if self.compile and self.cms_updates != "off":
            raise ValueError(f"compile is on and cms_updates {self.cms_updates!r}: legal is one of them")
        if self.fsdp and self.cms_updates != "off":  # levels take their steps outside the block that is gathered
            raise ValueError(f"fsdp is on and cms_updates {self.cms_updates!r}: legal is one of them")
        if self.pretrained:
            if self.model not in ("hope", "hope_attention"):
                raise ValueError(f"pretrained is given and model {self.model!r}: it becomes hope_attention, legal is no other")
            self.pretrained = os.path.abspath(self.pretrained)
            self.model, self.preset = "hope_attention", Path(self.pretrained).name
        if self.fsdp and self.optimizer == "dmgd":  # its memories are networks that read whole gradients
            raise ValueError("fsdp is on and optimizer dmgd: legal is one of them")
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
                raise ValueError(f"out {self.out!r} exists: name a new folder, or continue it with --resume {self.out}")
            return Path(self.out)
        names = (f"runs/{self.model}-{self.preset}" + (f"-{k}" if k > 1 else "") for k in range(1, 10**6))
        return next(Path(name) for name in names if not Path(name).exists())


def _convert(name: str, kind: type, value):
    """`value`, maybe the text of a flag, as the field's type; 2e6 is an int."""
    try:
        if kind is int:
            whole = int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else value
            if isinstance(whole, int) and not isinstance(whole, bool):
                return whole
            if not float(value).is_integer():
                raise ValueError
            return int(float(value))
        if kind is float:
            return float(value)
        if kind is dict and not isinstance(value, dict):
            pairs = dict(item.split("=", 1) for item in value)
            return {key: _json_or_text(text) for key, text in pairs.items()}
    except (ValueError, TypeError):
        legal = {int: "a whole number, as 2000000 or 2e6", float: "a number", dict: "field=value"}[kind]
        raise ValueError(f"{name} is {value!r}: legal is {legal}") from None
    return value


def _json_or_text(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


# The pieces of the loop


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Learning rate of step 0 .. steps - 1: a line up to lr, then a cosine down to lr * min_lr_ratio at the last."""
    rising = round(config.warmup * steps)
    if step < rising:
        return config.lr * (step + 1) / rising
    done = min(1.0, (step - rising) / max(1, steps - 1 - rising))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def optimizer_for(model: nn.Module, config: TrainConfig):
    """The optimizer that a config names, of all parameters of a model."""
    betas = (config.beta1, config.beta2)
    return optimizer_by_name(model, config.optimizer, config.lr, config.weight_decay, betas)


def loss_fn(logits: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats, in float32 or float64. logits: [B, T, vocab], targets: [B, T] int64 -> a scalar (mean or sum)."""
    return F.cross_entropy(full_precision(logits).flatten(0, -2), targets.flatten(), reduction=reduction)


def precision(device: torch.device):
    """bfloat16 matrix products on a GPU, plain float32 on a CPU, which has no fast bfloat16."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


class Step(nn.Module):
    """The loss of a micro-batch: all that DDP must see, and torch.compile as one graph. Weights are the model's own."""

    def __init__(self, model: nn.Module, updates: str):
        super().__init__()
        self.model, self.updates = model, updates

    def forward(self, inputs, targets):
        logits, _ = self.model(inputs, updates=self.updates)
        return loss_fn(logits, targets)


def parallel(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """(inputs, targets) -> loss, whose backward leaves in every process the gradient of all of them."""
    for block in model.blocks:
        block.recompute = config.recompute or config.fsdp
        if block.cms.log_step is not None and config.cms_updates == "off":
            block.cms.log_step.requires_grad_(False)  # unused; DDP waits for the gradient of everything that wants one
    step = Step(model, config.cms_updates)
    if config.fsdp:
        if config.compile:  # block by block: around a block weights are gathered, and outside of the graph
            for block in model.blocks:
                block._forward = torch.compile(block._forward, fullgraph=True)
        distributed.shard(model, device, blocks_whole=config.compile)
        return step
    if config.compile:
        step.compile(fullgraph=True)
    if world() == 1:
        return step
    ids = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(step, ids, gradient_as_bucket_view=True)


@torch.no_grad()
def rates(model: nn.Module, tokens: torch.Tensor) -> dict:
    """{"eta": [...], "alpha": [...]}: per layer, the mean step size and retention with which its memories read tokens [B, T].

    By the plain path of every mixer; None for a layer without memories, {} for a model without.
    """
    found = {"eta": [], "alpha": []}
    with watch() as seen, plain(model), torch.compiler.set_stance("force_eager"):

        def hook(*_):
            for i, means in enumerate(found.values()):
                means.append(float(sum(rate[i] for rate in seen)) / len(seen) if seen else None)
            seen.clear()

        hooks = [block.mixer.register_forward_hook(hook) for block in model.blocks]
        model(tokens)
        for handle in hooks:
            handle.remove()
    return {name: means for name, means in found.items() if set(means) != {None}}


@torch.no_grad()
def validate(
    model: nn.Module, tokens: np.ndarray, batch_size: int, seq_len: int, device, updates="off", start=256
) -> tuple[float, int]:
    """(nats, count) of a token stream [N]: every token scored once, memories starting afresh every seq_len tokens.

    updates: whether the CMS levels take steps in context, see Hope.forward. start: the tokenizer's <|endoftext|>.
    """
    device, training = torch.device(device), model.training
    model.eval()
    nats, count, pieces = 0.0, 0, windows(tokens, batch_size, seq_len, start)
    while turn := list(islice(pieces, world())):
        mine = rank() < len(turn)  # else read along, for the sake of the others: weights in shares are gathered by all
        inputs, targets = turn[rank() if mine else 0]
        with precision(device):
            logits, _ = model(inputs.to(device)) if updates == "off" else model(inputs.to(device), updates=updates)
        nats += mine * loss_fn(logits, targets.to(device), reduction="sum").item()
        count += mine * targets.numel()
    model.train(training)
    nats, count = total([nats, count])
    if not math.isfinite(nats):
        raise NonFinite(f"validation: the loss is {nats}")
    return nats, int(count)


# Peak of dense bfloat16 products, FLOPs per second, by a part of the GPU's name
PEAK = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
        "A10": 125e12, "4090": 165e12, "3090": 71e12, "V100": 125e12, "T4": 65e12}  # fmt: skip
WATCH_EVERY = 100  # steps between two looks at eta and alpha, each a forward pass of one row


def peak_flops(device: torch.device) -> float | None:
    """What one device can do at most, FLOPs per second; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK.items() if part in name), None)


class NonFinite(RuntimeError):
    """A loss or gradient that is not a number or infinite."""


def peak_memory(device) -> float | None:
    """Most memory held so far, in MiB: the GPU's, or this process's where Linux says (ru_maxrss may be the parent's)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10 if status.exists() else None


def gradient_norm(model: nn.Module, step: int, loss: float) -> torch.Tensor:
    """Norm of all gradients; NonFinite names the step and the first tensor that is not finite."""
    grads = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norm = distributed.whole(torch.nn.utils.get_total_norm([grad for _, grad in grads]))
    if math.isfinite(loss) and math.isfinite(norm.item()):
        return norm
    bad = [name for name, grad in grads if not torch.isfinite(distributed.whole(grad)).all()]
    tensor = f"the gradient of {bad[0]}" if bad else "the norm of the gradient" if math.isfinite(loss) else "the loss"
    raise NonFinite(f"step {step}: {tensor} is not finite (loss {loss})")


# The folder of a run


def write_json(path: Path, value) -> None:
    write_beside(path, lambda beside: beside.write_text(json.dumps(value, indent=2) + "\n"))


def read_config(folder: str | Path) -> dict:
    """config.json of a run. FileNotFoundError or ValueError in one line."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no config.json")
    try:
        config = json.loads(path.read_text())
        return {key: config[key] for key in ("model", "train", "tokenizer", "corpus")}
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl; a last line torn by a kill is left out."""
    records = []
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            records.append(json.loads(line))
    return records


def resumed(folder: str, **changes) -> TrainConfig:
    """The config of a run to continue, with some fields changed. ValueError for one that would make it another run."""
    try:
        saved = TrainConfig(**read_config(folder)["train"])
    except TypeError as error:
        raise ValueError(f"{folder}/config.json is of another version: {error}") from None
    config = TrainConfig(**{**asdict(saved), "resume": folder, **changes})
    for f in fields(config):
        was, now = getattr(saved, f.name), getattr(config, f.name)
        if was != now and not f.metadata["on_resume"]:
            legal = ", ".join(g.name for g in fields(config) if g.metadata["on_resume"] and g.name != "resume")
            raise ValueError(f"{folder} was trained with {f.name} {was}, not {now}: a resumed run may change {legal}")
    return config


def plot(folder: Path, title: str) -> None:
    """loss.png from metrics.jsonl."""
    from matplotlib.figure import Figure  # slow to import; a Figure of its own needs no display

    records = read_metrics(folder)
    x, y = np.array([(r["tokens"], r["bits_per_byte"]) for r in records if "bits_per_byte" in r]).reshape(-1, 2).T
    val = np.array([(r["tokens"], r["val_bits_per_byte"]) for r in records if "val_bits_per_byte" in r]).reshape(-1, 2)
    if not len(x):
        return
    window = min(len(y), max(20, len(y) // 50))
    total = np.cumsum(np.concatenate([[0.0], y]))
    low = np.maximum(0, np.arange(1, len(y) + 1) - window)  # a trailing mean: no step looks ahead
    smooth = (total[1:] - total[low]) / (np.arange(1, len(y) + 1) - low)

    unit, name = (1e9, "billion") if x[-1] >= 1e9 else (1e6, "million") if x[-1] >= 1e6 else (1e3, "thousand")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(x / unit, y, color="tab:blue", alpha=0.2, linewidth=0.8, label="training, each step")
    axes.plot(x / unit, smooth, color="tab:blue", linewidth=1.8, label=f"training, mean of {window} steps")
    if len(val):
        axes.plot(val[:, 0] / unit, val[:, 1], "o-", color="tab:orange", markersize=5, label="held-out files")
        axes.annotate(f"{val[-1, 1]:.3f}", (val[-1, 0] / unit, val[-1, 1]), xytext=(0, 8), textcoords="offset points",
                      ha="right", color="tab:orange", fontweight="bold")  # fmt: skip
    axes.set(xlabel=f"training tokens ({name})", ylabel="loss (bits per byte)", title=title)
    shown = np.concatenate([smooth, val[:, 1]])
    axes.set_ylim(0.95 * shown.min(), 1.02 * shown.max())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_beside(folder / "loss.png", lambda beside: figure.savefig(beside, dpi=150, format="png"))


@contextlib.contextmanager
def ctrl_c():
    """A list that fills at Ctrl-C or a polite kill, so that the step can be finished; the second one kills."""
    pressed = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def handler(number, frame):
        pressed.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pressed
    finally:
        for number, what in before.items():
            signal.signal(number, what)


def logger(folder: Path, config: TrainConfig):
    """The run at Weights & Biases; the same one after a resume. Project and account are set as ever with wandb."""
    import wandb

    path = folder / "wandb.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    run = wandb.init(name=folder.name, dir=folder, config=asdict(config), resume="allow", **known)
    write_json(path, {"id": run.id})
    return run


# The run


def prepare(config: TrainConfig) -> tuple:
    """Everything that can be wrong is found here, before anything is written. The model is None where it is to be made."""
    saved = None
    if config.resume:
        folder, saved = Path(config.resume), read_config(config.resume)
        resumed(config.resume, **{**asdict(config), "resume": config.resume})
    else:
        folder = on_first(config.fresh_folder)
    if config.batch_size % world():
        legal = f"a multiple of {world()}, the number of processes"
        raise ValueError(f"batch_size is {config.batch_size}: legal is {legal}")
    if config.fsdp and not distributed.started():
        raise ValueError("fsdp is on in a process of its own: legal is under torchrun, as torchrun --nproc_per_node=8 train.py")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb is on, but the package is not installed: pip install wandb")
    own = tokenizer_of(folder, saved["tokenizer"]) if saved else config.pretrained and f"{config.pretrained}/{TOKENIZER}"
    corpus = load_corpus(config.data, own and tokenizer(own))
    encoding, model = corpus.encoding, None
    step = {} if config.cms_updates == "off" else {"cms_step": CMS_STEP}
    try:
        if saved:
            model_config = HopeConfig(**saved["model"])
        elif config.pretrained:
            model = Hope.from_pretrained(config.pretrained, **{**step, **config.set}).train()
            model_config = model.config
            if model_config.vocab_size != encoding.n_vocab:
                sizes = f"{model_config.vocab_size} symbols, but its tokenizer.json {encoding.n_vocab}"
                raise ValueError(f"pretrained {config.pretrained!r} has {sizes}: legal is the same number")
        else:
            fields_set = {"vocab_size": encoding.n_vocab, **step, **config.set}
            model_config = HopeConfig.preset(config.preset, model=config.model, **fields_set)
    except TypeError as error:  # a value of another kind than its field
        raise ValueError(f"set is {config.set}: {first_line(error)}") from None
    if config.cms_updates != "off" and not 2 <= (model_config.levels[0] or 0) < config.seq_len:
        why = f"no token of a row sees an update with seq_len {config.seq_len}"
        raise ValueError(f"levels is {model_config.levels}: {why}; legal is a first chunk from 2 to {config.seq_len - 1}")
    fingerprint = corpus.fingerprint()
    if saved and fingerprint != saved["corpus"]:
        raise ValueError(f"data {config.data!r} is {fingerprint}, but {folder} was trained on {saved['corpus']}")
    batch(corpus.train, 1, config.seq_len, config.seed, 0)
    return folder, bool(saved), model, model_config, corpus, encoding, fingerprint


def train(config: TrainConfig, on_step: Callable[[dict], None] | None = None) -> dict:
    """Train, or continue, one run and return what it came to; `on_step` is given every line of metrics.jsonl.

    Raises ValueError or OSError for bad input before any file is touched, NonFinite (a RuntimeError) where the loss or a
    gradient stays not finite, OSError for a checkpoint that cannot be written; the earlier checkpoint stays.
    """
    device = distributed.start(on_all(lambda: device_for(config.device)))
    folder, going_on, model, model_config, corpus, encoding, fingerprint = on_all(lambda: prepare(config))
    if len(set(map(str, gather(fingerprint)))) > 1:
        raise ValueError(f"data {config.data!r} differs between the processes: {gather(fingerprint)}")
    first = rank() == 0

    def say(text: str) -> None:
        if first:
            print(text, flush=True)

    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    model = (model or Hope(model_config)).to(device=device, dtype=torch.float32)
    forward = parallel(model, config, device)
    optimizer = optimizer_for(model, config)
    start, steps = 0, config.steps
    begun = going_on and on_first(lambda: bool(checkpoint.steps(folder) or read_metrics(folder)))  # else killed at once
    if begun:
        start = checkpoint.load(folder, model, optimizer)
        if steps < start:
            done = start * config.tokens_per_step
            raise ValueError(f"tokens is {config.tokens}, but {folder} has trained on {done} already: legal is more")

    def set_up() -> None:
        own = {**asdict(config), "resume": None}
        everything = {"model": model_config.to_dict(), "train": own, "tokenizer": encoding.name, "corpus": fingerprint}
        write_json(folder / "config.json", everything)
        if encoding.name != "bytes":
            save_tokenizer(encoding, folder)  # the run outlives its shards
        # What a killed run logged after its last checkpoint is computed again.
        lines = [json.dumps(record) + "\n" for record in read_metrics(folder) if record["step"] <= start]
        write_beside(folder / "metrics.jsonl", lambda beside: beside.write_text("".join(lines)))

    def save(step: int) -> None:
        checkpoint.save(folder, model, optimizer, step, config.keep)

    if not going_on:
        on_first(lambda: folder.mkdir(parents=True))
    try:
        on_first(set_up)
        if not begun:
            save(0)  # a full disk shows now, not after the first hour
    except OSError:
        if not begun:
            on_first(lambda: shutil.rmtree(folder))
        raise

    size = sum(p.numel() for p in model.parameters())
    title = f"{config.model}-{config.preset}, {size / 1e6:.2f}M parameters, on {corpus.name}"
    where = f"{device}" if world() == 1 else f"{world()} processes on {device.type}"
    say(f"{title} ({len(corpus.train):,} training tokens), {where}, in {folder}")
    if start == steps:
        say(f"nothing left to train: {steps * config.tokens_per_step:,} tokens are done; --tokens asks for more")

    wandb = logger(folder, config) if config.wandb and first else None

    share = config.batch_size // world()  # rows of a step in this process, at_once of them in a forward pass
    own_rows, at_once = slice(rank() * share, (rank() + 1) * share), config.micro_batch or share

    def report(record: dict) -> None:
        if first:
            log.write(json.dumps(record) + "\n")
            log.flush()
        if wandb:
            wandb.log(record, step=record["step"])
        if on_step:
            on_step(record)

    def validation(step: int, tokens: np.ndarray) -> float:
        start = encoding.eot_token
        nats, count = validate(model, tokens, at_once, config.seq_len, device, config.cms_updates, start)
        bits = nats / math.log(2) / n_bytes(tokens, encoding)
        report({"step": step, "tokens": step * config.tokens_per_step, "val_bits_per_byte": bits, "val_tokens": count,
                "cms_updates": config.cms_updates})  # fmt: skip
        return bits

    bits_per_nat = len(corpus.train) / corpus.train_bytes / math.log(2)  # nats per token -> bits per byte
    peak = peak_flops(device)
    flops = flops_per_token(model_config, config.seq_len) if peak else 0.0
    skipped = sum("skipped" in record for record in read_metrics(folder))
    in_a_row = 0
    recent = deque(maxlen=50)  # lines of the last steps, for the progress line
    began_run = time.perf_counter()
    bar = tqdm(
        total=steps, initial=start, mininterval=0.5 if sys.stderr.isatty() else 30, dynamic_ncols=True, disable=not first,
        bar_format="{percentage:3.0f}%|{bar:20}| step {n_fmt}/{total_fmt}{postfix}, {remaining} left",
    )  # fmt: skip
    with open(folder / "metrics.jsonl" if first else os.devnull, "a") as log, bar:
        with ctrl_c() as stop:
            model.train()
            for step in range(start, steps):
                began = time.perf_counter()
                lr = learning_rate(step, steps, config)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                # One draw for the whole step: neither accumulating nor sharing it out changes the result.
                rows = batch(corpus.train, config.batch_size, config.seq_len, config.seed, step)
                parts = [part[own_rows].to(device).split(at_once) for part in rows]
                waited = time.perf_counter() - began
                loss = 0.0
                for n, (inputs, targets) in enumerate(zip(*parts, strict=True), 1):
                    last = n == len(parts[0])  # DDP adds up over processes only once
                    with contextlib.nullcontext() if last or not hasattr(forward, "no_sync") else forward.no_sync():
                        with precision(device):
                            part = forward(inputs, targets) * (len(inputs) / share)
                        part.backward()
                    loss = loss + part.detach()
                loss, stopping = (x / world() for x in total([loss.item(), float(bool(stop))]))

                done = step + 1
                record = {"step": done, "tokens": done * config.tokens_per_step}
                try:  # loss and norm are the same in all processes, and so is what follows from them
                    norm = gradient_norm(model, done, loss)
                except NonFinite as error:
                    skipped, in_a_row = skipped + 1, in_a_row + 1
                    if in_a_row > config.max_skipped:
                        raise NonFinite(f"{error}, {in_a_row} steps in a row; the last checkpoint is kept") from None
                    report(record | {"skipped": skipped, "why": first_line(error)})
                    optimizer.zero_grad(set_to_none=True)
                else:
                    in_a_row = 0
                    torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    norm = norm.item()
                    speed = config.tokens_per_step / (time.perf_counter() - began)
                    record |= {"bits_per_byte": loss * bits_per_nat, "lr": lr, "grad_norm": norm, "tokens_per_s": speed,
                               "data_s": waited}  # fmt: skip
                    if peak:
                        record["mfu"] = flops * speed / (peak * world())
                    if done % WATCH_EVERY == 0 or done == start + 1:
                        with precision(device):
                            record |= rates(model, parts[0][0][:1])
                    report(record)
                    recent.append((record["bits_per_byte"], speed))
                    loss_now, speed = np.mean(recent, axis=0)
                    note = f", {skipped} skipped" if skipped else ""
                    bar.set_postfix_str(f"{loss_now:.3f} bits per byte, {speed:,.0f} tokens/s{note}", refresh=False)
                bar.update()
                if config.eval_every and done % config.eval_every == 0 and done < steps:
                    validation(done, corpus.val[: config.eval_tokens])
                if done % config.save_every == 0 or done == steps or stopping:
                    save(done)
                    if first:
                        plot(folder, title)
                if stopping and done < steps:
                    bar.close()  # else it draws over the message
                    say(f"stopped and saved after step {done} of {steps}; go on with")
                    say(f"  python train.py --resume {folder}")
                    return {"run": str(folder), "step": done, "steps": steps, "interrupted": True}
        bar.close()

        say(f"validating on all {len(corpus.val):,} held-out tokens ...")
        bits = validation(steps, corpus.val)
    if first:
        plot(folder, title)

    beginning = encoding.decode(corpus.val[:64].tolist(), errors="ignore").split("\n")[0]
    prompt = "def " if config.data == "stdlib" else beginning or "\n"
    tokens = torch.tensor([encoding.encode_ordinary(prompt)], device=device)
    model.eval()
    torch.manual_seed(config.seed)
    with precision(device), torch.compiler.set_stance("force_eager"):  # lengths that no other step has
        written = [int(token) for token in model.generate(tokens, 200, temperature=0.8)]
    sample = prompt + encoding.decode(written, errors="replace")
    if first:
        write_beside(folder / "sample.txt", lambda beside: beside.write_text(sample + "\n", encoding="utf-8"))
    say(f"\na sample:\n{'-' * 80}\n{sample}\n{'-' * 80}")
    say(f"{bits:.4f} bits per byte on the held-out files ({corpus.val_bytes:,} bytes), run in {folder}")
    say(f"  evaluate   python eval.py {folder}")
    say(f"  continue   python train.py --resume {folder} --tokens {2 * config.tokens:.3g}")
    say(f"  generate   python hope.py generate {folder} --prompt {shlex.quote(prompt)}")
    distributed.barrier("the end")
    return {"run": str(folder), "step": steps, "steps": steps, "interrupted": False, "val_bits_per_byte": bits,
            "parameters": size, "seconds": time.perf_counter() - began_run}  # fmt: skip


# The command line; its pieces serve eval.py and bench.py too


class Parser(argparse.ArgumentParser):
    """A bad flag is a ValueError, one line like every other message."""

    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")


def whole(text: str, least: int = 1) -> int:
    """A flag: a whole number, as 1000000 or 1e6."""
    with contextlib.suppress(ValueError, OverflowError):
        if float(text).is_integer() and float(text) >= least:
            return int(float(text))
    raise argparse.ArgumentTypeError(f"{text!r}: legal is a whole number of at least {least}, as 4096 or 1e6")


def parse(argv: list[str] | None) -> TrainConfig:
    """TrainConfig from flags. ValueError for a bad one."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python train.py [--flag value ...]", allow_abbrev=False, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    for f in fields(TrainConfig):
        default = "none" if f.type is dict or f.default is None else f.default
        text = f"{f.metadata['help']} (default: {default})"
        names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))
        if f.type is bool:
            parser.add_argument(*names, help=text, action=argparse.BooleanOptionalAction)
        elif f.type is dict:
            parser.add_argument(*names, help=text, action="append", metavar="FIELD=VALUE")
        else:
            parser.add_argument(*names, help=text, metavar={int: "N", float: "X"}.get(f.type, "NAME"))

    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        return resumed(given.pop("resume"), **given)
    return TrainConfig(**SETUPS.get(given.get("preset"), {}) | given)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input or a failed run, 130 stopped by Ctrl-C."""
    try:
        if "--dry-run" in (sys.argv if argv is None else argv):
            import plan

            plan.main(sys.argv[1:] if argv is None else argv)
            return 0
        result = train(parse(argv))
        distributed.stop()
        return 130 if result["interrupted"] else 0
    except (ValueError, OSError, NonFinite, torch.OutOfMemoryError) as error:
        same = isinstance(error, (ValueError, NonFinite)) or hasattr(error, "shared")  # in all processes
        if rank() == 0 or not same:
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
