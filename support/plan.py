"""What a training run will cost, before anything is allocated: train.py with --dry-run.

    python train.py --preset 340m --dry-run                 # on 8 H100
    python train.py --preset 1.3b --dry-run --gpus 64 --gpu A100 --utilisation 0.3 --fsdp

Parameters and FLOPs are counted. Memory is measured without any: a forward pass, a backward pass
and an optimizer step on tensors that have shapes but no data (torch's FakeTensorMode), with each
allocation noted when it is made and when it is freed. What the backward pass keeps is bilinear in
layers and rows, so one and two of each determine it. What comes on top for a while (logits, the
gradients of a block) is that of one layer. The path is the one that the GPU will take, fused
kernels or torch's own. Time is FLOPs over an assumed part of the peak (MFU).

Per GPU, with P parameters on n GPUs: 4 P bytes of weights, 4 P of gradients, 8 P of AdamW's moments
with DDP; 1/n of that with --fsdp, which also gathers the embedding and two blocks while they work.
"""

import contextlib
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
import selfcheck
from hope import PRESETS, Hope, HopeConfig, layer_kinds, loss_fn
from layers import Recurrent, one_of, tensors
from support.config import TrainConfig, dry_run_flags, parse
from support.corpus import is_shards, load_corpus
from support.flags import Parser
from support.run import optimizer_for, resumed
from support.vocabulary import tokenizer
from titans import SelfModifyingTitans

# A part of a GPU's name: memory in GB, peak of dense products in FLOPs per second (in bfloat16;
# V100 and T4 have none and train in float32), compute capability
GPUS = {
    "B200": (180, 2250e12, (10, 0)),
    "H200": (141, 989e12, (9, 0)),
    "H100 PCIe": (80, 756e12, (9, 0)),
    "H100": (80, 989e12, (9, 0)),
    "A100": (80, 312e12, (8, 0)),
    "L40S": (48, 362e12, (8, 9)),
    "L4": (24, 121e12, (8, 9)),
    "A10": (24, 125e12, (8, 6)),
    "4090": (24, 165e12, (8, 9)),
    "3090": (24, 71e12, (8, 6)),
    "V100": (32, 15.7e12, (7, 0)),
    "T4": (16, 8.1e12, (7, 5)),
}
USABLE = 0.92  # of a GPU's memory: the driver, libraries and fragmentation take the rest

# What computes the mixers -> the part of a GPU's peak that a training step reaches, an assumption:
# as measured for 340m in 8 rows of 4,096 on an H200, Hope with updates, without a graph as several
# GPUs are (results/kernels_340m.json); torch's is an estimate.
MFU = {
    "attention": 0.37,
    "fused kernels": 0.16,
    "torch, chunk by chunk": 0.03,
}
ATTENTION, KERNELS, TORCH = MFU
MOST_UNROLLED = 16  # steps of a mixer in one compiled graph, about 500 operations each


# --------------------------------------------------------------------------------------------------
# What computes the mixers


def steps_in_torch(mixer: nn.Module, T: int, fits) -> int:
    """Steps that a mixer takes one after another in Python on rows of T tokens.

    1 where attention or a fused kernel takes them at once. fits(module, width, chunk): whether the
    kernel that a module has can run; chunk None: that of `memory.scan`.
    """
    most = 1
    for m in mixer.modules():
        own = isinstance(m, SelfModifyingTitans) and m.fused and m.usual
        scans = isinstance(m, Recurrent) and not hasattr(m, "chunk")  # all tokens at once
        if (own and fits(m, m.d, m.chunk)) or (scans and fits(m, m.width, None)):
            continue
        named = [getattr(m, name) for name in ("chunk", "tile", "segment") if hasattr(m, name)]
        most = max(most, -(-T // min(named or [64 if scans else T])))
    return most


def computed_by(model: Hope, fits) -> str:
    """The name in MFU of what computes a model's slowest mixer."""
    found = set()
    for block in model.blocks:
        if steps_in_torch(block.mixer, 2**20, fits) > 1:
            return TORCH
        found.add(steps_in_torch(block.mixer, 2**20, lambda *_: False) > 1)
    return KERNELS if True in found else ATTENTION


def on_gpu(capability: tuple):
    """`fits` of `steps_in_torch` for a GPU of this compute capability that is not here."""
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float32
    try:
        from kernels import unfit_on
    except ImportError:  # no Triton
        return lambda *_: False

    def fits(module, width, chunk):  # scans are in float32
        return unfit_on(capability, torch.float32 if chunk is None else dtype, width, chunk) is None

    return fits


def compiles(model: Hope, train: TrainConfig, device: torch.device) -> bool:
    """Whether a run compiles its blocks: as --compile says, else on a GPU, where that is short.

    ValueError where --compile would have torch unroll a long loop over chunks. Kernels count where
    selfcheck.py has settled that they are taken.
    """
    if train.compile is False or (train.compile is None and device.type != "cuda"):
        return False

    def fits(module, width, chunk):
        return selfcheck.taken("scan" if chunk is None else "self_modify")

    most = max(steps_in_torch(block.mixer, train.seq_len, fits) for block in model.blocks)
    short = most <= MOST_UNROLLED
    if train.compile and not short:
        why = f"a row of {train.seq_len} tokens is {most} steps of torch's loop, all in one graph"
        longest = train.seq_len * MOST_UNROLLED // most
        use = f"use --no-compile, or rows of at most {longest} tokens"
        raise ValueError(f"compile would take too long: {why}; {use}")
    return short and model.config.cms_updates != "full"


# --------------------------------------------------------------------------------------------------
# Counting


def flops_per_token(config: HopeConfig, seq_len: int) -> float:
    """FLOPs of training on one token of rows of seq_len: forward and backward.

    Counted are products, 2 FLOPs per multiply-add: 6 per parameter of a matrix, once forward and
    twice backward, plus what the mixers multiply besides (their `products`); where CMS levels learn
    in context, a second backward pass from the logits to the first of them. Not counted are
    elementwise work and what a backward pass recomputes to save memory. Attention counts the keys
    that its queries see, half of a causal square, as fused attention computes; scans count whole
    tiles.
    """
    with torch.device("meta"):  # counts only
        model = Hope(config)
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    for block in model.blocks:
        for mlp in block.cms.mlps:
            matrices += mlp.w_in.numel() + mlp.w_out.numel()
    if config.tied:
        matrices += config.vocab_size * config.d_model
    once = 6.0 * matrices + 2.0 * sum(block.mixer.products(seq_len) for block in model.blocks)
    return once + (inner_flops(model, seq_len) if config.cms_updates != "off" else 0.0)


def inner_flops(model: Hope, seq_len: int) -> float:
    """FLOPs per token of the backward passes by which the CMS levels learn in context."""
    config = model.config
    inputs = config.vocab_size * config.d_model  # parameters through which gradients pass
    products = 0.0
    fast = 0  # parameters that have gradients
    for number, block in enumerate(model.learners):
        for mlp, level in zip(block.cms.mlps, block.cms.levels, strict=True):
            size = mlp.w_in.numel() + mlp.w_out.numel()
            inputs += size
            fast += size if level.chunk else 0
            if number == 0 and mlp is block.cms.mlps[0]:
                inputs -= mlp.w_in.numel()  # below it nothing is fast
        if number:  # nor in the first learner's mixer
            linear = [m for m in block.mixer.modules() if isinstance(m, nn.Linear)]
            inputs += sum(m.weight.numel() for m in linear)
            products += 2 / 3 * block.mixer.products(seq_len)
    chunk = config.levels[0]
    differentiated = (-(-seq_len // chunk) - 1) * chunk / seq_len  # the last chunk is not
    return differentiated * 2 * (inputs + fast + products)


def peak_flops(device: torch.device) -> float | None:
    """The most FLOPs per second that a device can do; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, (_, peak, _) in GPUS.items() if part in name), None)


# --------------------------------------------------------------------------------------------------
# Memory


def peak_memory(device) -> float | None:
    """Most memory held so far, in MiB: the GPU's, or this process's; None where no one says."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # ru_maxrss may be the parent's
    if not status.exists():
        return None
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10


class Allocations(TorchDispatchMode):
    """Bytes alive: now, and the most since `mark`."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.most = 0
        self.sizes = {}  # of storages that are alive

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.note(t.untyped_storage())
        self.most = max(self.most, self.now)
        return out

    def note(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            weakref.finalize(storage, self.free, key)

    def free(self, key):
        self.now -= self.sizes.pop(key)

    def mark(self) -> int:
        """Begin to look for the most again; what is alive now."""
        self.most = self.now
        return self.now


@contextlib.contextmanager
def taking_kernels(model: Hope):
    """The mixers of a model without data take the fused kernels, whatever is here."""
    import kernels

    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "triton"
    unfit = kernels.unfit
    kernels.unfit = lambda *_: None
    try:
        yield
    finally:
        kernels.unfit = unfit


def measure(
    model_config: HopeConfig, train: TrainConfig, rows: int, seq_len: int, fake=True,
    kernels=False, bf16=True,
) -> dict:
    """Bytes of one training step, as on a GPU. fake: without memory. bf16: products in bfloat16.

    kernels: with those, whose backward passes hold for a while what is not counted, below 2 GB.

    "kept" for the backward pass beyond weights and gradients; "extra", the most of the pass beyond
    that; "optimizer", its state; "step", the most of its step beyond that.
    """
    baselines.rotations.cache_clear()  # a table of the other kind of tensor
    with FakeTensorMode() if fake else torch.enable_grad(), Allocations() as alive:
        model = Hope(model_config)
        for block in model.blocks:
            block.recompute = train.recompute or train.fsdp
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer = optimizer_for(model, train)
        tokens = torch.zeros(rows, seq_len, dtype=torch.int64)
        # forward, backward
        before = alive.mark()
        with taking_kernels(model) if kernels else contextlib.nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model.unchecked(tokens)[0]
            kept = alive.now - before
            loss = loss_fn(logits, tokens)
            del logits
            loss.backward()
            del loss
        found = {"kept": kept, "extra": alive.most - before - kept}
        # step
        inner = getattr(optimizer, "optimizer", optimizer)  # of a LevelOptimizer
        parts = getattr(inner, "optimizers", (inner,))
        for part in parts:
            part.check_gradients = lambda: None  # there are no numbers to look at
        before = alive.mark()
        optimizer.step()
        state = tensors([list(part.state.values()) for part in parts])
        state += list(getattr(optimizer, "sums", {}).values())
        found["optimizer"] = sum(t.untyped_storage().nbytes() for t in state)
        found["step"] = alive.most - before - found["optimizer"]
    baselines.rotations.cache_clear()
    return found


def memory(c: HopeConfig, train: TrainConfig, kernels=False, bf16=True) -> tuple:
    """(activations of n rows as a function of n, optimizer, step), bytes of all layers."""
    kinds = len(layer_kinds(c.model))
    learning = c.learners if c.cms_updates != "off" else 0
    # In torch shorter rows, the more of them: chunks are independent here. A segment of MAC keeps
    # more towards its end.
    longest = train.seq_len if kernels else c.window if c.model == "titans_mac" else 512
    length = min(train.seq_len, longest)
    times = -(-train.seq_len // length)
    still = replace(c, levels=[None], cms_updates="off", variant="sequential", cms_blocks=None)
    # (config, shape of a row, how many layers): blocks that do not learn in context, and those that
    # do, whose chunks depend on each other
    parts = [(still, (times, length), c.n_layers - learning)]
    parts.append((replace(c, cms_blocks=None), (1, train.seq_len), learning))
    parts = [part for part in parts if part[2]]
    found = []
    for config, (times, length), _ in parts:
        sizes = {}
        for n in (1, 2):  # layers of each kind
            made = replace(config, n_layers=n * kinds)
            how = {"kernels": kernels, "bf16": bf16}
            sizes[n] = [measure(made, train, rows * times, length, **how) for rows in (1, 2)]
        found.append(sizes)
    last = found[-1]  # with the logits

    def layers(key, rows):
        total = last[1][rows - 1][key]
        for sizes, (_, _, count) in zip(found, parts, strict=True):
            one = sizes[1][rows - 1][key]
            total += (count / kinds - (sizes is last)) * (sizes[2][rows - 1][key] - one)
        return total

    def activations(rows):
        first, second = (layers("kept", n) + last[1][n - 1]["extra"] for n in (1, 2))
        return first + (rows - 1) * (second - first)

    return activations, layers("optimizer", 1), layers("step", 1)


def per_gpu(
    size: int, largest: int, embedding: int, train: TrainConfig, gpus: int, rows: int, costs: tuple
) -> dict:
    """Bytes on one GPU: weights, gradients, optimizer, activations (or its step), total.

    On one GPU a step's graph (train.Graphed) keeps its memory, and the sums of micro-batches have
    their own.
    size, largest, embedding: parameters of the model, of its largest block, of its embedding.
    """
    activations, optimizer, step = costs
    shards = gpus if train.fsdp else 1
    gathered = 0
    if train.fsdp:  # weights and gradients before they are sharded
        gathered = (4 + 4) * embedding + 2 * (2 + 4) * largest
    parts = {"weights": 4 * size, "gradients": 4 * size, "optimizer": optimizer}
    parts = {name: amount / shards for name, amount in parts.items()}
    if gpus == 1:
        parts["gradients"] *= 1 + (rows < train.batch_size)
        parts["activations"] = activations(rows) + step
    else:
        parts["activations"] = max(activations(rows) + gathered, step / shards)
    return parts | {"total": sum(parts.values())}


# --------------------------------------------------------------------------------------------------
# The report


def report(
    train: TrainConfig, gpus: int, gpu: str, has: tuple, utilisation: float | None = None
) -> None:
    """Print the plan. ValueError where a GPU's memory does not suffice, with what would.

    has: memory in bytes, peak and compute capability of the GPU, as in GPUS. utilisation: part of
    the peak that is used, else as MFU has it.
    """
    memory_bytes, peak, capability = has
    if train.batch_size % gpus:
        wanted = f"a multiple of {gpus}, the number of GPUs"
        raise ValueError(f"batch_size must be {wanted}, got {train.batch_size}")
    vocab_size, data = vocabulary(train)
    own = {"vocab_size": vocab_size} | train.set
    c = HopeConfig.preset(train.preset, model=train.model, **own)
    with torch.device("meta"):
        model = Hope(c)
    size = sum(p.numel() for p in model.parameters())
    embedding = model.embedding.weight.numel()
    largest = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    flops = flops_per_token(c, train.seq_len)
    tokens = train.steps * train.tokens_per_step
    rows = f"{train.batch_size} rows of {train.seq_len:,}"
    print(f"{c.model}-{train.preset}: {size:,} parameters, {embedding:,} of them the embedding")
    print(f"{tokens:,} tokens: {train.steps:,} steps of {rows}; {data}")
    where = f" in {c.learners} of {c.n_layers} blocks" if c.cms_updates != "off" else ""
    print(f"CMS steps in context: {c.cms_updates}{where}")
    print(f"{flops / 1e9:.3g} GFLOP a token (forward and backward), {flops * tokens:.3g} in all")
    path = computed_by(model, on_gpu(capability))
    bf16 = capability >= (8, 0)
    speed = f"{peak / 1e12:.3g} TFLOP/s in {'bfloat16' if bf16 else 'float32'}"
    by = f"{path}, where they pass their check" if path == KERNELS else path
    print(f"on {gpu}, {memory_bytes / 1e9:.0f} GB, {speed}; mixers by {by}")
    why = "as --utilisation says" if utilisation else "an assumption, --utilisation for another"
    print(f"time: at {utilisation or MFU[path]:.0%} of that peak, {why}\n")
    utilisation = utilisation or MFU[path]
    costs = memory(c, train, path == KERNELS, bf16)
    usable = USABLE * memory_bytes

    def need(n, rows):
        return per_gpu(size, largest, embedding, train, n, rows, costs)

    def rows_of(n):
        return min(train.micro_batch or train.batch_size, train.batch_size // n)

    names = ("weights", "gradients", "optimizer", "activations", "total")
    print(f"{'':>20}" + "GB per GPU".center(60))
    columns = "".join(f"{name:>12}" for name in names)
    print(f"{'GPUs':>6}{'micro-batch':>14}{columns}{'fits':>6}{'time':>14}")
    for n in sorted({1, 8, 64, gpus}):
        if train.batch_size % n == 0:
            wanted = need(n, rows_of(n))
            columns = "".join(f"{wanted[name] / 1e9:>12.1f}" for name in names)
            fits = "yes" if wanted["total"] <= usable else "no"
            time = duration(flops * tokens / (n * peak * utilisation))
            print(f"{n:>6}{rows_of(n):>14}{columns}{fits:>6}{time:>14}")
    rows = rows_of(gpus)
    wanted = need(gpus, rows)["total"]
    if wanted > usable:
        fitting = [n for n in range(1, rows) if need(gpus, n)["total"] <= usable]
        what = f"--micro-batch {fitting[-1]}" if fitting else "--recompute, or --fsdp on more GPUs"
        there = f"the {usable / 1e9:.1f} usable GB of {memory_bytes / 1e9:.0f}"
        needs = f"a micro-batch of {rows} rows needs {wanted / 1e9:.1f} GB"
        raise ValueError(f"{needs}, more than {there}: use {what}")


def vocabulary(train: TrainConfig) -> tuple[int, str]:
    """(symbols, a line on the data). Text is not read."""
    if is_shards(train.data):
        corpus = load_corpus(train.data)
        size = len(corpus.train)
        passes = f"{train.tokens / size:.3g} passes"
        return corpus.encoding.n_vocab, f"{train.data} holds {size:,} ({passes})"
    if train.data != "stdlib" and not Path(train.data).exists():
        return PRESETS[train.preset][3], f"{train.data} is not there yet (python data.py --help)"
    return tokenizer().n_vocab, f"{train.data} is read as bytes"


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    units = [(86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")]
    size, name = next((unit for unit in units if seconds >= 2 * unit[0]), units[-1])
    return f"{seconds / size:.1f} {name}"


# --------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str]) -> None:
    """train.py's flags, and --gpus, --gpu, --utilisation.

    ValueError as from train.py, and where the run does not fit.
    """
    parser = Parser(prog="train.py --dry-run", add_help=False, allow_abbrev=False)
    dry_run_flags(parser)
    own, rest = parser.parse_known_args(argv)
    train = parse(rest, __doc__, resumed)
    cuda = torch.cuda.is_available()
    gpus = own.gpus
    if gpus is None:
        gpus = int(os.environ.get("WORLD_SIZE", torch.cuda.device_count() if cuda else 8))
        gpus = 1 if train.batch_size % gpus else gpus
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if own.utilisation is not None and not 0 < own.utilisation <= 1:
        wanted = "above 0 and at most 1, of the peak"
        raise ValueError(f"utilisation must be {wanted}, got {own.utilisation}")
    here = torch.device("cuda")
    if own.gpu is None and cuda and peak_flops(here):
        properties = torch.cuda.get_device_properties(0)
        name = properties.name
        capability = (properties.major, properties.minor)
        has = (properties.total_memory, peak_flops(here), capability)
    else:
        name = one_of("gpu", own.gpu or "H100", GPUS)
        size, *rest = GPUS[name]
        has = (size * 1e9, *rest)
    report(train, gpus, name, has, own.utilisation)
