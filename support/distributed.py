"""Several processes train as one: start, agree, wait, add up; FSDP2. No-ops with one process.

    torchrun --nproc_per_node=8 train.py ...                        one machine
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d \
        --rdzv-endpoint=HOST:29500 train.py ...                     four machines

torchrun tells each process its rank. Small values, files and errors go through gloo (`control`),
gradients through nccl on GPUs. A process that fails makes all of them fail, with its message; one
that hangs is named after TIMEOUT.
"""

import contextlib
import functools
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

TIMEOUT = timedelta(minutes=10)  # longer than the slowest step or save


def started() -> bool:
    """Whether this process is one of a group, be it a group of one."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if started() else int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if started() else 1


@functools.cache
def control():
    """The gloo group of all processes, None where there is none. Made once, by `start`."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT) if started() else None


def start(device: torch.device) -> torch.device:
    """Meet the other processes, if torchrun started this one; returns this process's own device."""
    if "WORLD_SIZE" not in os.environ or started():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    control.cache_clear()
    control()
    return device


def stop() -> None:
    """Part from the other processes."""
    if started():
        control.cache_clear()
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# Agreement


def gather(value) -> list:
    """The small plain value of every process, in all of them."""
    if world() == 1:
        return [value]
    values = [None] * world()
    with _waiting("to hear from them"):
        dist.all_gather_object(values, value, group=control())
    return values


@contextlib.contextmanager
def agreed():
    """Within, an error in one process is raised in all of them, so that none waits for ever.

    The error is a ValueError, OSError or RuntimeError and has `shared` = True. What is the first
    process's work alone stands behind `if rank() == 0`.
    """
    if world() == 1:
        yield
        return
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    errors = [found for found in gather(error and (_kind(error), str(error))) if found]
    if errors:
        kind, message = errors[0]
        shared = kind(message)
        shared.shared = True
        raise shared from error


def _kind(error: Exception) -> type:
    for kind in (ValueError, OSError):
        if isinstance(error, kind):
            return kind
    return RuntimeError


def total(values: list[float]) -> list[float]:
    """Sums over all processes, the same in each to the last bit."""
    if world() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    with _waiting("to add up"):
        dist.all_reduce(sums, group=control())
    return sums.tolist()


def barrier(what: str) -> None:
    """Wait for all processes before `what`. TimeoutError, in process 0 with who is missing."""
    if world() > 1:
        with _waiting(f"before {what}"):
            dist.monitored_barrier(control(), TIMEOUT, wait_all_ranks=True)


@contextlib.contextmanager
def _waiting(what: str):
    try:
        yield
    except RuntimeError as error:  # gloo's kind for a process that is late or gone
        why = (str(error).splitlines() or [""])[0]
        limit = f"at most {TIMEOUT.total_seconds():.0f} s"
        late = f"process {rank()} waited for the others {what}, {limit}, in vain: {why}"
        raise TimeoutError(late) from None


# --------------------------------------------------------------------------------------------------
# FSDP2


def full_tensor(t: torch.Tensor) -> torch.Tensor:
    """t, gathered from all processes where it is sharded."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def alike(tensors) -> list[list]:
    """The tensors, those that are sharded apart from the others: torch takes no mixed lists."""
    parts = {}
    for t in tensors:
        parts.setdefault(hasattr(t, "full_tensor"), []).append(t)
    return list(parts.values())


def shard(
    model: nn.Module, dtype: torch.dtype, units: tuple[type, ...], whole=(), gather_blocks=False
) -> None:
    """FSDP2, in place: each process keeps a shard of weights, gradients and optimizer state.

    A block is gathered while it works. The matrices of `units` (classes of modules) are gathered as
    dtype, in which they multiply. Initial weights of memories, rates, norms and the
    embedding stay float32, and so do sums of gradients: fast weights add up many small steps.
    whole: blocks that every process keeps, because their CMS levels step between calls; their
    gradients are averaged. gather_blocks: a block is gathered at once, as float32, because hooks
    within it would break its compiled graph.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = None if dtype == torch.float32 else dtype
    sums = torch.float32 if half else None
    policy = MixedPrecisionPolicy(half, sums, cast_forward_inputs=False)
    # blocks return their states, some as views; nothing ever writes into a state
    warnings.filterwarnings("ignore", ".*returned a view tensor.*")
    kept = set()
    for block in whole:
        for p in block.parameters():
            kept.add(p)
            p.register_post_accumulate_grad_hook(_average)
    for block in model.blocks:
        if block in whole:
            continue
        if not gather_blocks:
            fully_shard([mlp.norm for mlp in block.cms.mlps])
            fully_shard([m for m in block.modules() if isinstance(m, units)], mp_policy=policy)
        fully_shard(block)
    fully_shard(model, ignored_params=kept)


def _average(p: torch.Tensor) -> None:
    """Make p.grad the mean over all processes; what was a mean before this backward stays."""
    dist.all_reduce(p.grad)
    p.grad.div_(world())
