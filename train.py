"""Train a language model of this repository on real text: one loop, read top to bottom.

    python train.py                                         # Hope (nano) on Python's own source
    python train.py --model transformer --tokens 1e6        # another model, the same data
    python train.py --data notes.txt --set n_layers=2 --set chunk=32
    python train.py --set cms_updates=off                   # CMS levels that never learn in context
    python train.py --pretrained LLAMA --data notes.txt     # from a Llama checkpoint (NL 7.3)
    python train.py --resume runs/hope-nano                 # go on after Ctrl-C or a kill
    python train.py --resume runs/hope-nano --tokens 4e6    # train longer
    python train.py --cms-periods 1,8                       # CMS levels on the clock of steps, too
    python train.py --preset 340m --dry-run                 # what it would cost (support/plan.py)
    torchrun --nproc_per_node=8 train.py --preset 340m      # on 8 GPUs; --fsdp shards the weights
    python train.py --config runs/hope-nano/config.json --seed 1    # or a TOML; flags override it
    python train.py --help                                  # every flag; --set help: the model's

A token's way: corpus.documents -> corpus.join -> corpus.batch -> micro_batches -> LossModule ->
Hope.loss -> learn.read_and_update -> update. A run is a folder (support/run.py). The presets from
30m up bring a training set-up (support/config.py). metrics.jsonl has, per step: step, tokens,
bits_per_byte, lr, grad_norm, tokens_per_s and mfu (of all processes; mfu: fraction of a known
GPU's peak), data_s (seconds spent on the batch), every 100 steps eta and alpha (per layer: mean
step size and retention of its memories), every --check-kernels steps kernel_gap; per validation:
val_bits_per_byte, val_tokens, cms_updates; for a step that was left out: skipped, why.

Resuming gives the losses of a run that was never stopped, bit for bit on CPU: a batch depends on
(seed, step) alone and the optimizer's state is saved. (More --tokens stretch the cosine.) Nor does
the number of processes change anything but rounding: batch_size is the rows of a step of them all.
"""

import contextlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice

# OpenMP threads wait for each other by spinning. Beside a second busy process on the machine they
# spin against it: training took a hundred times as long. A short spin cost nothing measurable.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import numpy as np
import torch
from torch import nn

from baselines import Attention, RetNet
from cms import CMS, MLP
from hope import loss_fn
from learn import changed
from support import distributed, plan
from support.checkpoint import first_line
from support.config import TrainConfig, parse
from support.corpus import batch, windows
from support.distributed import rank, total, world
from support.monitor import ProgressBar, counting, interrupts, plot, rates, say, write_sample
from support.run import Run, precision, product_type, resumed
from support.vocabulary import n_bytes

LOGITS = 2**30  # at most, of a batch of validation, about 10 bytes each
WATCH_EVERY = 100  # steps between two looks at eta and alpha, each a forward pass of one row


class NonFinite(RuntimeError):
    """A loss or gradient that is infinite or not a number."""


# --------------------------------------------------------------------------------------------------
# The pieces of the loop


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Of step 0 .. steps - 1: a line up to lr, then a cosine to lr * min_lr_ratio at the last."""
    rising = round(config.warmup * steps)
    if step < rising:
        return config.lr * (step + 1) / rising
    done = min(1.0, (step - rising) / max(1, steps - 1 - rising))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def schedule(model, step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of a step; also sets the rise of the CMS levels' inner steps.

    They rise at first, because the gradients of a model that knows nothing teach nothing.
    """
    for module in model.modules():
        if isinstance(module, CMS) and module.log_step is not None:
            module.rise.fill_(min(1.0, (step + 1) / max(1, config.cms_rise * steps)))
    return learning_rate(step, steps, config)


def update(model, optimizer, lr: float, losses, grad_clip: float = math.inf) -> tuple[float, float]:
    """One training step: backward of each part of the loss, clip, step -> (loss, gradient norm).

    losses: an iterable of scalars that sum to the loss; the next is asked for after the backward
    pass of the one before. `Graphed` has done its own. Raises NonFinite, which names the tensor,
    and then changes nothing.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
    loss = 0.0
    for part in losses:
        if part.requires_grad:
            part.backward()
        loss = loss + part.detach()
    loss = total([loss.item()])[0] / world()  # the same in all processes, and so is what follows
    try:
        norm = gradient_norm(model, loss)
    except NonFinite:
        optimizer.zero_grad(set_to_none=True)
        raise
    for part in distributed.alike(p for p in model.parameters() if p.grad is not None):
        torch.nn.utils.clip_grads_with_norm_(part, grad_clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm.item()


def gradient_norm(model: nn.Module, loss: float) -> torch.Tensor:
    """Norm of all gradients; NonFinite names the first tensor that is not finite."""
    grads = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = []
    for part in distributed.alike([grad for _, grad in grads]):
        norms.append(distributed.full_tensor(torch.nn.utils.get_total_norm(part)))
    norm = torch.nn.utils.get_total_norm(norms)
    if math.isfinite(loss) and math.isfinite(norm.item()):
        return norm
    wrong = "the norm of the gradient" if math.isfinite(loss) else "the loss"
    for name, grad in grads:
        if not torch.isfinite(distributed.full_tensor(grad)).all():
            wrong = f"the gradient of {name}"
            break
    raise NonFinite(f"{wrong} is not finite (loss {loss})")


def kernel_gap(model: nn.Module, inputs, targets) -> float:
    """|gradient as trained - gradient by torch alone| / |the latter|, of the loss of these rows."""
    found = []
    for how in ({}, {"backend": "torch"}):
        eager = torch.compiler.set_stance("force_eager")
        with eager, changed(model, **how), precision(inputs.device):
            loss = model(inputs, targets=targets)
        leaves = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        found.append(torch.cat([g.flatten() for g in grads if g is not None]))
    return ((found[0] - found[1]).norm() / found[1].norm()).item()


class LossModule(nn.Module):
    """(inputs, targets, share) -> share of the loss of a micro-batch: what DDP must see."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs, targets, share=1.0):
        with precision(inputs.device):
            return self.model(inputs, targets=targets) * share


class Graphed(nn.Module):
    """A LossModule that does its backward pass too, both in one CUDA graph -> share of the loss.

    Hope's step is thousands of kernels of microseconds each, which Python and autograd launch more
    slowly than a GPU runs them. Recorded once, they are launched as one: the same kernels in the
    same order, so the same numbers. The first two calls run as they are, as they compile; and so do
    rows of another shape than the first ones, and all where recording fails, which is said.
    """

    def __init__(self, module: LossModule):
        super().__init__()
        self.module = module
        self.calls = 0
        self.rows = None  # inputs and targets that the graph reads, [2, B, T]
        self.share = None  # that it has
        self.graph = None

    def forward(self, inputs, targets, share=1.0):
        rows = torch.stack([inputs, targets])
        if self.rows is None:
            self.rows, self.share = rows, share
        if rows.shape != self.rows.shape or share != self.share:
            with torch.compiler.set_stance("force_eager"):
                return self.run(inputs, targets, share)
        self.calls += 1
        if self.calls == 3:
            self.record()
        if self.graph is None:
            return self.run(inputs, targets, share)
        self.rows.copy_(rows)
        self.graph.replay()
        for p, grad in self.grads.items():
            if share == 1:  # nothing is added to it
                p.grad = grad
            else:  # the next replay overwrites it
                p.grad = grad.clone() if p.grad is None else p.grad.add_(grad)
        return self.loss.clone()

    def run(self, inputs, targets, share):
        loss = self.module(inputs, targets, share)
        loss.backward()
        return loss.detach()

    def record(self):
        before = {p: p.grad for p in self.parameters()}
        self.zero_grad()
        device = self.rows.device
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # the graph's memory is its own
        # a stream of its GPU, which need not be the current one; a failure leaves that stream set
        stream = torch.cuda.Stream(device)
        now = torch.cuda.stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.device(device), now, torch.cuda.graph(graph, stream=stream):
                self.loss = self.run(*self.rows, self.share)
        except RuntimeError as error:  # of the end of recording; what was wrong came before
            why = first_line(error.__context__ or error)
            say(f"not as one CUDA graph, so more slowly: {why}")
        else:
            self.graph = graph
            self.grads = {p: p.grad for p in self.parameters() if p.grad is not None}
        for p, grad in before.items():
            p.grad = grad


def rotates(mixer: nn.Module) -> bool:
    return any(isinstance(part, Attention | RetNet) for part in mixer.modules())


def parallel(run: Run) -> nn.Module:
    """Wrap the model for training (DDP, FSDP2, Graphed or neither): as LossModule.

    After backward(), gradients are averaged over the processes.
    """
    model = run.model
    config = run.config
    learns = model.config.cms_updates != "off"
    for block in model.blocks:
        block.recompute = config.recompute or config.fsdp
        if block.cms.log_step is not None and not learns:
            block.cms.log_step.requires_grad_(False)  # unused; DDP would wait for its gradient
    module = LossModule(model)
    compiled = plan.compiles(model, config, run.device)
    if compiled:
        from torch._functorch import config as functorch  # torch itself does not import it

        functorch.donated_buffer = not learns  # the inner gradients use a graph twice
        learners = model.learners if learns else []
        for block in model.blocks:  # alike, so that the first one's graphs serve them all
            pieces = block in learners[1:]  # which read chunk by chunk
            if not (pieces and rotates(block.mixer)):  # by tables: a graph for each position
                dynamic = None if pieces else False  # None: one graph for all positions
                block.mix = torch.compile(block.mix, fullgraph=True, dynamic=dynamic)
            if block not in learners:  # whose weights are views at first, later their own
                block.cms.compile(fullgraph=True, dynamic=False)
    if config.fsdp:
        units = (nn.Linear, MLP)
        whole = model.learners if learns else ()
        dtype = product_type(run.device)
        distributed.shard(model, dtype, units, whole, gather_blocks=compiled)
        return module
    if world() == 1:
        return Graphed(module) if compiled and run.device.type == "cuda" else module
    ids = [run.device] if run.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, ids, gradient_as_bucket_view=True)


def micro_batches(forward: nn.Module, inputs, targets, rows: int) -> Iterator[torch.Tensor]:
    """The losses of this rank's rows of a step, `rows` at a time, weighted to sum to the mean."""
    parts = list(zip(inputs.split(rows), targets.split(rows), strict=True))
    for number, (x, y) in enumerate(parts, 1):
        last = number == len(parts)  # DDP averages over the processes only once
        waits = not last and hasattr(forward, "no_sync")
        with forward.no_sync() if waits else contextlib.nullcontext():
            yield forward(x, y, len(x) / len(inputs))


@torch.no_grad()
def validate(model, tokens: np.ndarray, batch_size: int, seq_len: int, device, start=256,
             show=False) -> tuple[float, int]:
    """(nats, count) of a token stream [N]: every token scored once. Raises NonFinite.

    Memories and CMS levels start afresh every seq_len tokens. start: the tokenizer's <|endoftext|>.
    show: a progress bar.
    """
    device = torch.device(device)
    training = model.training
    model.eval()
    nats = 0.0
    count = 0
    pieces = windows(tokens, batch_size, seq_len, start)
    bar = counting(len(tokens), show)
    while turn := list(islice(pieces, world())):
        # No batch left for this rank: still run a forward, as FSDP's all-gathers need every rank.
        mine = rank() < len(turn)
        inputs, targets = turn[rank() if mine else 0]
        with precision(device):
            logits, _ = model(inputs.to(device))
        nats += mine * loss_fn(logits, targets.to(device), reduction="sum").item()
        count += mine * targets.numel()
        bar.update(sum(part[1].numel() for part in turn))
    bar.close()
    model.train(training)
    nats, count = total([nats, count])
    if not math.isfinite(nats):
        raise NonFinite(f"validation: the loss is {nats}")
    return nats, int(count)


# --------------------------------------------------------------------------------------------------
# The run


def train(config: TrainConfig, on_step: Callable[[dict], None] | None = None) -> dict:
    """Train, or continue, a run; returns what it came to. on_step gets each line of metrics.jsonl.

    Raises ValueError or OSError for bad input before any file is touched, NonFinite where loss or
    gradients stay not finite, OSError for a checkpoint that cannot be written; earlier ones stay.
    """
    run = Run.start(config)
    forward = parallel(run)
    optimizer = run.new_optimizer()
    start = run.restore(optimizer)
    steps = config.steps
    folder = shlex.quote(str(run.folder))  # for commands
    where = f"{run.device}" if world() == 1 else f"{world()} processes on {run.device.type}"
    say(f"{run.title} ({len(run.corpus.train):,} training tokens), {where}, in {run.folder}")
    if start == steps:
        done = steps * config.tokens_per_step
        say(f"nothing left to train: {done:,} tokens are done; --tokens asks for more")
    began = time.perf_counter()
    result = {"run": str(run.folder), "step": steps, "steps": steps, "interrupted": False}
    with run.logging(on_step) as report:
        done = train_steps(run, forward, optimizer, start, report)
        if done < steps:
            say(f"stopped and saved after step {done} of {steps}; go on with")
            say(f"  python train.py --resume {folder}")
            return result | {"step": done, "interrupted": True}
        say(f"validating on all {len(run.corpus.val):,} held-out tokens ...")
        bits = validation(run, report, steps, run.corpus.val, show=True)
    if rank() == 0:
        plot(run)
    prompt = write_sample(run)
    size = run.corpus.val_bytes
    say(f"{bits:.4f} bits per byte on the held-out files ({size:,} bytes), run in {run.folder}")
    say(f"  evaluate   python eval.py {folder}")
    say(f"  continue   python train.py --resume {folder} --tokens {2 * config.tokens}")
    say(f"  generate   python sample.py generate {folder} --prompt {shlex.quote(prompt)}")
    distributed.barrier("the end")
    parameters = sum(p.numel() for p in run.model.parameters())
    measured = {"parameters": parameters, "seconds": time.perf_counter() - began}
    return result | {"val_bits_per_byte": bits} | measured


def train_steps(run: Run, forward, optimizer, start: int, report) -> int:
    """Steps start + 1 to the last, with validations and checkpoints; the step at which it ended."""
    config = run.config
    steps = config.steps
    corpus = run.corpus
    rows_per_rank = config.batch_size // world()
    own = slice(rank() * rows_per_rank, (rank() + 1) * rows_per_rank)
    bits_per_nat = len(corpus.train) / corpus.train_bytes / math.log(2)  # per token -> per byte
    peak = plan.peak_flops(run.device)
    flops = plan.flops_per_token(run.model.config, config.seq_len) if peak else 0.0
    skipped = sum("skipped" in record for record in run.metrics())
    in_a_row = 0
    bar = ProgressBar(steps, start)
    run.model.train()
    with bar, interrupts() as interrupted:
        for step in range(start, steps):
            began = time.perf_counter()
            done = step + 1
            # One draw for the whole step: neither accumulating nor sharding changes the result.
            rows = batch(corpus.train, config.batch_size, config.seq_len, config.seed, step)
            inputs, targets = (part[own].to(run.device) for part in rows)
            waited = time.perf_counter() - began
            # forward, backward, clip, step
            lr = schedule(run.model, step, steps, config)
            micro_batch = config.micro_batch or rows_per_rank
            losses = micro_batches(forward, inputs, targets, micro_batch)
            record = {"step": done, "tokens": done * config.tokens_per_step}
            try:
                loss, norm = update(run.model, optimizer, lr, losses, config.grad_clip)
            except NonFinite as error:
                skipped += 1
                in_a_row += 1
                why = f"step {done}: {first_line(error)}"
                if in_a_row > config.max_skipped:
                    last = f"{in_a_row} steps in a row; the last checkpoint is kept"
                    raise NonFinite(f"{why}, {last}") from None
                report(record | {"skipped": skipped, "why": why})
            else:
                in_a_row = 0
                speed = config.tokens_per_step / (time.perf_counter() - began)
                record |= {"bits_per_byte": loss * bits_per_nat, "lr": lr, "grad_norm": norm}
                record |= {"tokens_per_s": speed, "data_s": waited}
                if peak:
                    record["mfu"] = flops * speed / (peak * world())
                if done % WATCH_EVERY == 0 or done == start + 1:
                    with precision(run.device):
                        record |= rates(run.model, inputs[:1])
                if config.check_kernels and done % config.check_kernels == 0:
                    record["kernel_gap"] = kernel_gap(run.model, inputs[:1], targets[:1])
                report(record)
                bar.show(record, skipped)
            bar.update()
            # validate and save
            stopping = total([float(bool(interrupted))])[0] > 0
            if config.eval_every and done % config.eval_every == 0 and done < steps:
                validation(run, report, done, corpus.val[: config.eval_tokens])
            if done % config.save_every == 0 or done == steps or stopping:
                run.save(optimizer, done)
                if rank() == 0:
                    plot(run)
            if stopping:
                return done
    return steps


def validation(run: Run, report, step: int, tokens: np.ndarray, show=False) -> float:
    """Bits per byte of held-out tokens, reported. show: a progress bar."""
    config = run.config
    rows = 4 * (config.micro_batch or config.batch_size // world())  # nothing is kept of them
    rows = min(rows, max(1, LOGITS // (config.seq_len * run.model.config.vocab_size)))
    start = run.encoding.eot_token
    with torch.compiler.set_stance("force_eager"):  # other rows than those that are compiled
        nats, count = validate(run.model, tokens, rows, config.seq_len, run.device, start, show)
    bits = nats / math.log(2) / n_bytes(tokens, run.encoding)
    record = {"step": step, "tokens": step * config.tokens_per_step, "val_bits_per_byte": bits}
    report(record | {"val_tokens": count, "cms_updates": run.model.config.cms_updates})
    return bits


def main(argv: list[str] | None = None) -> int:
    """The command; exit status 0: done, 2: bad input or a failed run, 130: stopped by Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if "--dry-run" in argv:
            plan.main(argv)
            return 0
        result = train(parse(argv, __doc__, resumed))
        distributed.stop()
        return 130 if result["interrupted"] else 0
    except (ValueError, OSError, NonFinite, torch.OutOfMemoryError) as error:
        same_in_all = isinstance(error, (ValueError, NonFinite)) or hasattr(error, "shared")
        if rank() == 0 or not same_in_all:
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
