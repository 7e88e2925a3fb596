"""What a training run will cost, before anything is allocated: train.py with --dry-run.

    python train.py --preset 340m --dry-run                              # on 8 H100, at 40% of their peak
    python train.py --preset 1.3b --dry-run --gpus 64 --gpu A100 --utilisation 0.3 --fsdp

Parameters are counted, and FLOPs (hope.flops_per_token). Memory is measured without any: a forward and a backward pass, and
a step of the optimizer, of tensors that have shapes but no data (torch's FakeTensorMode), each allocation noted when it is
made and when it is freed. What the backward pass needs is bilinear in layers and rows, so one and two of each tell; what comes
on top for a while (logits, a block's gradients) is one layer's. It is the memory of torch's own path: fused kernels keep less.

Per GPU, with P parameters on n GPUs: weights and gradients 4 bytes each (8 for AdamW's moments), all of them with DDP, a
share with --fsdp, which also holds the embedding and two blocks whole while they work.
"""

import os
import re
import weakref
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import baselines
from hope import MIXERS, PRESETS, Hope, HopeConfig, loss_fn
from learn import tensors
from support.config import CMS_STEP, Parser, TrainConfig, parse
from support.corpus import is_shards, load_corpus
from support.run import optimizer_for
from support.vocabulary import tokenizer

GB = {"B200": 180, "H200": 141, "H100": 80, "A100": 80, "L40S": 48, "L4": 24, "A10": 24, "4090": 24, "3090": 24, "V100": 32,
      "T4": 16}  # fmt: skip
USABLE = 0.92  # of a GPU's memory: the rest is the driver's, the libraries' and lost between allocations


class Allocations(TorchDispatchMode):
    """Bytes alive: now, and the most since `mark`."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := (storage := t.untyped_storage())._cdata) not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
                weakref.finalize(storage, self.free, key)
        self.most = max(self.most, self.now)
        return out

    def free(self, key):
        self.now -= self.sizes.pop(key)

    def mark(self) -> int:
        """Begin to look for the most again; what is alive now."""
        self.most = self.now
        return self.now


def measure(model_config: HopeConfig, train: TrainConfig, rows: int, seq_len: int, fake: bool = True) -> dict:
    """Bytes "kept" for the backward pass beyond weights and gradients, "extra": most of the pass beyond that, "optimizer": its
    state, and "step": most of its step beyond that. Products in bfloat16, as on a GPU. fake: without memory."""
    baselines.rotations.cache_clear()  # a table of the other kind of tensor
    with FakeTensorMode() if fake else torch.enable_grad(), Allocations() as alive:
        model = Hope(model_config)
        for block in model.blocks:
            block.recompute = train.recompute or train.fsdp
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer = optimizer_for(model, train)
        tokens = torch.zeros(rows, seq_len, dtype=torch.int64)
        before = alive.mark()
        with torch.autocast("cpu", torch.bfloat16):
            logits, _ = model.read(tokens)
        del _
        kept = alive.now - before
        loss = loss_fn(logits, tokens)
        del logits
        loss.backward()
        del loss
        found = {"kept": kept, "extra": alive.most - before - kept}
        parts = getattr(optimizer, "optimizers", (optimizer,))
        for part in parts:
            part.check_gradients = lambda: None  # there are no numbers to look at
        before = alive.mark()
        optimizer.step()
        found["optimizer"] = sum(t.untyped_storage().nbytes() for t in tensors([list(part.state.values()) for part in parts]))
        found["step"] = alive.most - before - found["optimizer"]
    baselines.rotations.cache_clear()
    return found


def memory(c: HopeConfig, train: TrainConfig) -> tuple:
    """(activations of n rows as a function of n, optimizer, step), bytes, of all layers, by extrapolation."""
    kinds = len(MIXERS[c.model]) if isinstance(MIXERS[c.model], tuple) else 1
    # Shorter rows, the more of them: chunks are looked at one by one. A segment of MAC keeps more towards its end.
    length = min(train.seq_len, c.window if c.model == "titans_mac" else 512)
    times, many = -(-train.seq_len // length), c.n_layers / kinds
    one, two = (
        [measure(replace(c, n_layers=n * kinds), train, rows * times, length) for rows in (1, 2)] for n in (1, 2)
    )

    def layers(key, row):
        return one[row][key] + (many - 1) * (two[row][key] - one[row][key])

    def activations(rows):
        first, second = (layers("kept", row) + one[row]["extra"] for row in (0, 1))
        return first + (rows - 1) * (second - first)

    return activations, layers("optimizer", 0), layers("step", 0)


def per_gpu(size: int, largest: int, embedding: int, train: TrainConfig, gpus: int, rows: int, costs: tuple) -> dict:
    """Bytes on one GPU of weights, gradients, optimizer, activations (a step of the optimizer, where that is more), total."""
    activations, optimizer, step = costs
    share = gpus if train.fsdp else 1
    gathered = (4 + 4) * embedding + 2 * (2 + 4) * largest if train.fsdp else 0  # weights and gradients, before they are shared
    parts = {"weights": 4 * size / share, "gradients": 4 * size / share, "optimizer": optimizer / share}
    parts["activations"] = max(activations(rows) + gathered, step / share)
    return parts | {"total": sum(parts.values())}


def report(train: TrainConfig, gpus: int, gpu: str, memory_bytes: float, peak: float, utilisation: float) -> None:
    """Print the plan. ValueError where a GPU's memory does not suffice, with what would."""
    if train.batch_size % gpus:
        raise ValueError(f"batch_size is {train.batch_size}: legal is a multiple of {gpus}, the number of GPUs")
    vocab_size, data = vocabulary(train)
    step = {} if train.cms_updates == "off" else {"cms_step": CMS_STEP}
    c = HopeConfig.preset(train.preset, model=train.model, **({"vocab_size": vocab_size} | step | train.set))
    with torch.device("meta"):
        model = Hope(c)
    size = sum(p.numel() for p in model.parameters())
    largest = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    flops, tokens = flops_per_token(c, train.seq_len), train.steps * train.tokens_per_step
    print(f"{c.model}-{train.preset}: {size:,} parameters, {model.embedding.weight.numel():,} of them the embedding")
    print(f"{tokens:,} tokens: {train.steps:,} steps of {train.batch_size} rows of {train.seq_len:,}; {data}")
    print(f"{flops / 1e9:.3g} GFLOP a token (forward and backward), {flops * tokens:.3g} in all")
    print(f"on {gpu}, {memory_bytes / 1e9:.0f} GB, {peak / 1e12:.0f} TFLOP/s in bfloat16, {utilisation:.0%} of it used:\n")
    if train.cms_updates != "off":
        print(f"not counted: cms_updates {train.cms_updates}, their work and the rows' own weights\n")
    costs = memory(c, train)

    def need(n, rows):
        return per_gpu(size, largest, model.embedding.weight.numel(), train, n, rows, costs)

    names = ("weights", "gradients", "optimizer", "activations", "total")
    print(f"{'':>20}" + "GB per GPU".center(60) + f"\n{'GPUs':>6}{'rows at once':>14}" + "".join(f"{n:>12}" for n in names)
          + f"{'fits':>6}{'time':>14}")  # fmt: skip
    for n in sorted({1, 8, 64, gpus}):
        if train.batch_size % n == 0:
            rows = min(train.micro_batch or train.batch_size, train.batch_size // n)
            bytes_ = need(n, rows)
            fits = "yes" if bytes_["total"] <= USABLE * memory_bytes else "no"
            print(f"{n:>6}{rows:>14}" + "".join(f"{bytes_[name] / 1e9:>12.1f}" for name in names)
                  + f"{fits:>6}{duration(flops * tokens / (n * peak * utilisation)):>14}")  # fmt: skip
    rows = min(train.micro_batch or train.batch_size, train.batch_size // gpus)
    if (wanted := need(gpus, rows)["total"]) > USABLE * memory_bytes:
        fitting = [n for n in range(1, rows) if need(gpus, n)["total"] <= USABLE * memory_bytes]
        what = f"--micro-batch {fitting[-1]}" if fitting else "--recompute, or --fsdp on more GPUs"
        there = f"{USABLE * memory_bytes / 1e9:.1f} usable GB of {memory_bytes / 1e9:.0f}"
        raise ValueError(f"{rows} rows at once need {wanted / 1e9:.1f} GB: legal is up to {there}, as with {what}")


def vocabulary(train: TrainConfig) -> tuple[int, str]:
    """(symbols, a line on the data). Text is not read."""
    if is_shards(train.data):
        corpus = load_corpus(train.data)
        passes = train.tokens / len(corpus.train)
        return corpus.encoding.n_vocab, f"{train.data} holds {len(corpus.train):,} ({passes:.3g} passes)"
    if train.data != "stdlib" and not Path(train.data).exists():
        return PRESETS[train.preset][3], f"{train.data} is not there yet (python data.py --help)"
    return tokenizer().n_vocab, f"{train.data} is read as bytes"


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    units = [(86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")]
    size, name = next((unit for unit in units if seconds >= 2 * unit[0]), units[-1])
    return f"{seconds / size:.1f} {name}"


def main(argv: list[str]) -> None:
    """train.py's flags, and how many GPUs of which kind. ValueError as there, and where the run does not fit."""
    parser = Parser(prog="train.py --dry-run", add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", action="store_true")
    cuda = torch.cuda.is_available()
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--gpu")
    parser.add_argument("--utilisation", type=float, default=0.4)
    own, rest = parser.parse_known_args(argv)
    train = parse(rest)
    here = int(os.environ.get("WORLD_SIZE", torch.cuda.device_count() if cuda else 8))
    gpus = own.gpus if own.gpus is not None else 1 if train.batch_size % here else here
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}: legal is at least 1")
    if not 0 < own.utilisation <= 1:
        raise ValueError(f"utilisation is {own.utilisation}: legal is above 0, at most 1, of the peak")
    if own.gpu is None and cuda and peak_flops(torch.device("cuda")):
        properties = torch.cuda.get_device_properties(0)
        name, size, peak = properties.name, properties.total_memory, peak_flops(torch.device("cuda"))
    else:
        name = own.gpu or "H100"
        if name not in GB:
            raise ValueError(f"gpu is {name!r}: legal are {', '.join(GB)}")
        size, peak = GB[name] * 1e9, PEAK[name]
    report(train, gpus, name, size, peak, own.utilisation)


def flops_per_token(config: HopeConfig, seq_len: int) -> float:
    """FLOPs of training on one token of rows of seq_len: forward and backward, CMS updates off.

    Counted are products, 2 FLOPs per multiply-add: 6 per parameter of a matrix, once forward and
    twice backward, plus what the mixers multiply besides (their `products`). Not counted: elementwise
    work, and what a backward pass computes again to save memory. Attention counts the keys that its
    queries see, half of a causal square, as fused attention computes; scans count whole tiles.
    """
    with torch.device("meta"):  # counts only
        model = Hope(config)
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    for block in model.blocks:
        for mlp in block.cms.mlps:
            matrices += mlp.w_in.numel() + mlp.w_out.numel()
    if config.tied:
        matrices += config.vocab_size * config.d_model
    return 6.0 * matrices + 2.0 * sum(block.mixer.products(seq_len) for block in model.blocks)


# Peak of dense bfloat16 products, FLOPs per second, by a part of the GPU's name
PEAK = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
        "A10": 125e12, "4090": 165e12, "3090": 71e12, "V100": 125e12, "T4": 65e12}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """What one device can do at most, FLOPs per second; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK.items() if part in name), None)


def peak_memory(device) -> float | None:
    """Most memory held so far, in MiB: the GPU's, or this process's where Linux says (ru_maxrss may be the parent's)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10 if status.exists() else None
