"""Many processes as one: start, agree, wait, add up; DDP and FSDP2 around a model. With one process everything is a no-op.

    torchrun --nproc_per_node=8 train.py ...            one machine; torchrun tells each process its number
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py ...      four machines

What processes say to each other about files and errors goes through gloo (CONTROL), gradients through nccl on GPUs. A
process that fails makes all of them fail, with its message; one that hangs is named after TIMEOUT.
"""

import contextlib
import os
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from cms import MLP

TIMEOUT = timedelta(minutes=10)  # longer than the slowest honest step or save
CONTROL = None  # the gloo group of all processes


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0)) if CONTROL is None else dist.get_rank()


def world() -> int:
    """How many processes train together."""
    return 1 if CONTROL is None else dist.get_world_size()


def started() -> bool:
    """Whether this process is one of a group, be it a group of one."""
    return CONTROL is not None


def start(device: torch.device) -> torch.device:
    """Meet the other processes, if torchrun started this one; the device that is this process's own."""
    global CONTROL
    if "WORLD_SIZE" not in os.environ or CONTROL is not None:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    CONTROL = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return device


def stop() -> None:
    """Part from the other processes."""
    global CONTROL
    if CONTROL is not None:
        CONTROL = None
        dist.destroy_process_group()


def on_all(work: Callable):
    """work() in every process; what goes wrong in one is raised in all, so that none waits for another for ever.

    The error is a ValueError, OSError or RuntimeError; `shared` is True where process 0 raises the same.
    """
    result = error = None
    try:
        result = work()
    except Exception as caught:
        if world() == 1:
            raise
        error = caught
    if world() > 1:
        errors = gather(error and (_kind(error), str(error)))
        if any(errors):
            kind, message = next(filter(None, errors))
            shared = kind(message)
            shared.shared = True
            raise shared from error
    return result


def _kind(error):
    return next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)


def on_first(work: Callable):
    """work() in process 0 alone; its result, or its error, in all. The result must be small and plain."""
    if world() == 1:
        return work()
    result = on_all(lambda: work() if rank() == 0 else None)
    return gather(result)[0]


def gather(value) -> list:
    """The small plain value of every process, in all."""
    if world() == 1:
        return [value]
    values = [None] * world()
    with _waiting("to hear from them"):
        dist.all_gather_object(values, value, group=CONTROL)
    return values


def total(values: list[float]) -> list[float]:
    """Sums over all processes, the same in each to the last bit."""
    if world() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    with _waiting("to add up"):
        dist.all_reduce(sums, group=CONTROL)
    return sums.tolist()


def barrier(what: str) -> None:
    """Wait for all processes before `what`. TimeoutError after TIMEOUT, which in process 0 says who is missing."""
    if world() > 1:
        with _waiting(f"before {what}"):
            dist.monitored_barrier(CONTROL, TIMEOUT, wait_all_ranks=True)


@contextlib.contextmanager
def _waiting(what):
    try:
        yield
    except RuntimeError as error:  # gloo's word for a process that is late or gone
        limit, why = f"{TIMEOUT.total_seconds():.0f} s", (str(error).splitlines() or [""])[0]
        raise TimeoutError(f"process {rank()} waited for the others {what}, at most {limit}, in vain: {why}") from None


def full_tensor(t: torch.Tensor) -> torch.Tensor:
    """t, gathered from its shares if it lies in shares."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def shard(model: nn.Module, device: torch.device, whole_blocks: bool = False) -> None:
    """FSDP2, in place: every process keeps a share of all weights, gradients and moments; a block is gathered while it works.

    On a GPU matrices travel as bfloat16, in which they multiply. What fast weights start from, their rates, norms and the
    embedding stay float32, and so do sums of gradients: fast weights add up many small steps. whole_blocks: all of a block
    travels together, as float32, because hooks within a block would break its compiled graph.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = torch.bfloat16 if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(half, torch.float32 if half else None, cast_forward_inputs=False)
    # blocks return their states, some as views; nothing ever writes into a state
    warnings.filterwarnings("ignore", ".*returned a view tensor.*")
    for block in model.blocks:
        if not whole_blocks:
            fully_shard([mlp.norm for mlp in block.cms.mlps])
            fully_shard([m for m in block.modules() if isinstance(m, (nn.Linear, MLP))], mp_policy=policy)
        fully_shard(block)
    fully_shard(model)
