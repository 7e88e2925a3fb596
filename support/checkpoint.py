"""Checkpoints of a run: written whole or not at all, sharded, read by any number of processes.

    runs/x/checkpoints/step-200/
        .metadata, __0_0.distcp, __1_0.distcp, ...    tensors, by torch.distributed.checkpoint
        rest.pt    everything that is no tensor, and the size of each of those files

A checkpoint is written as step-200.tmp, flushed to the disk and renamed, so a kill or a full disk
leaves the earlier ones as they were. Reading takes the newest that is complete and warns of those
that it passes over. Several machines need a shared file system.
"""

import contextlib
import os
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from support import distributed
from support.distributed import agreed, gather, rank

# --------------------------------------------------------------------------------------------------
# One file


def first_line(error: BaseException) -> str:
    """What an error says, in one line; the name of its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all: write(a path beside it), flush, rename.

    OSError says why it failed and what is left.
    """
    beside = _beside(path)
    try:
        write(beside)
        _flush(beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save calls a full disk a RuntimeError
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        kept = f"the earlier {path.name} is intact" if path.exists() else "nothing is left behind"
        raise OSError(f"could not write {path} ({_reason(error, path)}); {kept}") from error


def load_file(path):
    """What torch.save wrote (plain data), on the CPU. ValueError where it is missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:  # torch has a different kind for every sort of damage
        raise ValueError(f"{path} is truncated or damaged ({first_line(error)})") from None


def save_state(state, path) -> None:
    """Write a model's state to a file, detached and on the CPU. OSError where that fails."""
    state = tree_map_only(torch.Tensor, lambda t: t.detach().cpu().clone(), state)
    atomic_write(Path(path), lambda beside: torch.save(state, beside))


def load_state(path, device="cpu"):
    """The state that `save_state` wrote. ValueError where the file is missing or damaged."""
    return tree_map_only(torch.Tensor, lambda t: t.to(device), load_file(path))


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _reason(error: BaseException, path: Path) -> str:
    """Why writing to path failed: the disk's error, which torch wraps into its own."""
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    free = shutil.disk_usage(path.parent).free / 2**20
    return f"{first_line(error)}; the disk has {free:,.1f} MiB free"


# --------------------------------------------------------------------------------------------------
# A tree of tensors and plain values = a flat dict of tensors + the tree without them


def flatten(tree, path: tuple = ()):
    """(tree with None for its tensors, {"a/b/0": tensor}). Single numbers stay in the tree."""
    if torch.is_tensor(tree) and tree.ndim:
        return None, {"/".join(path): tree.detach()}
    if not isinstance(tree, (dict, list)):
        return tree, {}
    rest = {}
    tensors = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        rest[key], below = flatten(value, (*path, str(key)))
        tensors |= below
    return rest if isinstance(tree, dict) else list(rest.values()), tensors


def unflatten(rest, tensors: dict, path: tuple = ()):
    """The inverse of `flatten`."""
    name = "/".join(path)
    if name in tensors:
        return tensors[name]
    if isinstance(rest, dict):
        return {key: unflatten(value, tensors, (*path, str(key))) for key, value in rest.items()}
    if isinstance(rest, list):
        return [unflatten(value, tensors, (*path, str(i))) for i, value in enumerate(rest)]
    return rest


def _parameters(optimizer, path: str = "optimizer") -> dict:
    """{path of a parameter's state in a checkpoint: the parameter}."""
    if hasattr(optimizer, "sums"):  # of a LevelOptimizer
        found = {f"{path}/sums/{name}": p for name, p in optimizer.parameters.items()}
        return found | _parameters(optimizer.optimizer, f"{path}/optimizer")
    parts = getattr(optimizer, "optimizers", None)
    if parts is None:
        parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        return {f"{path}/state/{i}": p for i, p in enumerate(parameters)}
    found = {}
    for i, part in enumerate(parts):
        found |= _parameters(part, f"{path}/optimizers/{i}")
    return found


# --------------------------------------------------------------------------------------------------
# Writing


def folder(run: Path, step: int) -> Path:
    return Path(run, "checkpoints", f"step-{step}")


def saved_steps(run: Path) -> list[int]:
    """Steps of the checkpoints of a run, complete or damaged, in order."""
    names = [path.name for path in Path(run, "checkpoints").glob("step-*")]
    found = [re.fullmatch(r"step-(\d+)", name) for name in names]
    return sorted(int(match[1]) for match in found if match)


def save(run: Path, model: nn.Module, optimizer, step: int, keep: int = 1) -> None:
    """Write the checkpoint of a step, then delete all but the `keep` newest.

    Called by all processes. OSError where it cannot be written; the earlier ones stay.
    """
    import torch.distributed.checkpoint as dcp  # takes as long to import as torch

    path = folder(run, step)
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    rest, tensors = flatten(whole)
    distributed.barrier(f"saving step {step}")
    try:
        with agreed():
            if rank() == 0:
                _clear(path.parent)
        with agreed():
            _call(dcp.save, tensors, checkpoint_id=_beside(path))
        with agreed():
            if rank() == 0:
                _finish(run, step, rest, keep)
    except (OSError, RuntimeError) as error:
        why = _reason(error, path.parent)  # before there is room again
        with agreed():
            if rank() == 0:
                _clear(path.parent)
        earlier = saved_steps(run)
        kept = "nothing is left behind"
        if earlier:
            kept = f"the earlier {folder(run, earlier[-1])} is intact"
        raise OSError(f"could not write {path} ({why}); {kept}") from error


def _clear(checkpoints: Path) -> None:
    """Remove what a killed run or a full disk has left."""
    for left in checkpoints.glob("*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def _finish(run: Path, step: int, rest, keep: int) -> None:
    """Add rest.pt to a checkpoint, give it its name, and delete the oldest ones."""
    path = folder(run, step)
    beside = _beside(path)
    sizes = {file.name: file.stat().st_size for file in beside.iterdir()}
    torch.save({"rest": rest, "sizes": sizes}, beside / "rest.pt")
    _flush(beside / "rest.pt")
    _flush(beside)
    if path.exists():  # damaged, or the run would have resumed from it
        shutil.rmtree(path)
    beside.rename(path)
    _flush(path.parent)
    for old in saved_steps(run)[:-keep]:
        gone = folder(run, old)
        shutil.rmtree(gone.rename(_beside(gone)))


def _call(work: Callable, tensors: dict, **options) -> None:
    """torch.distributed.checkpoint in all processes, or alone; an ordinary error for its own."""
    from torch.distributed.checkpoint.api import CheckpointException

    options |= {"no_dist": distributed.world() == 1, "process_group": distributed.control()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*single process.*")  # that is what is meant
            work(tensors, **options)
    except CheckpointException as error:  # no Exception
        cause = next(iter(error.failures.values()))[0]
        raise RuntimeError(first_line(cause)) from cause


# --------------------------------------------------------------------------------------------------
# Reading


class CorruptCheckpoint(RuntimeError):
    """A checkpoint that is incomplete or damaged."""


def load(run: Path, model: nn.Module, optimizer=None) -> int:
    """Fill a model (and an optimizer) from the newest complete checkpoint of a run -> its step.

    Called by all processes. ValueError where there is none, none that is complete, or where it is
    of another model.
    """
    found = gather(saved_steps(run))[0]  # as the first process sees the folder
    why = f"{Path(run, 'checkpoints')} has no checkpoint"
    for step in reversed(found):
        try:
            with agreed():
                return _read(folder(run, step), model, optimizer)
        except RuntimeError as error:  # CorruptCheckpoint, here or in another process
            why = first_line(error)
        if rank() == 0 and step != found[0]:
            print(f"warning: {why}: going back to the checkpoint before it", file=sys.stderr)
    raise ValueError(why)


def _read(path: Path, model, optimizer) -> int:
    """One checkpoint. CorruptCheckpoint, or ValueError where it is of another model."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(path)
    reader.read_metadata = lambda *_, **__: _metadata(path / ".metadata")
    try:
        kept = load_file(path / "rest.pt")
        for name, size in kept["sizes"].items():
            have = (path / name).stat().st_size
            if have != size:
                raise CorruptCheckpoint(f"{name} has {have} bytes of {size}")
        saved = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise CorruptCheckpoint(f"checkpoint {path} is damaged ({first_line(error)})") from None
    tensors = _tensors_of(model, saved, path)
    if optimizer is not None:
        tensors |= _room_for(optimizer, saved)
    try:
        _call(dcp.load, tensors, storage_reader=reader)  # into the tensors
    except (OSError, RuntimeError) as error:
        raise CorruptCheckpoint(f"checkpoint {path} is damaged ({first_line(error)})") from None
    if optimizer is not None:
        try:
            optimizer.load_state_dict(unflatten(kept["rest"], tensors)["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            why = f"is of another optimizer ({first_line(error)})"
            raise ValueError(f"checkpoint {path} {why}") from None
    return kept["rest"]["step"]


def _tensors_of(model: nn.Module, saved: dict, path: Path) -> dict:
    """{name in the checkpoint: tensor of the model to fill}. ValueError where shapes differ."""
    tensors = {}
    for name, tensor in flatten({"model": model.state_dict()})[1].items():
        tensors[_saved_name(name, saved)] = tensor
    ours = {name: tensor.shape for name, tensor in tensors.items()}
    theirs = {name: tensor.size for name, tensor in saved.items() if name.startswith("model/")}
    for name in sorted(ours | theirs):
        if ours.get(name) != theirs.get(name):
            have = tuple(theirs[name]) if name in theirs else "nothing"
            want = tuple(ours[name]) if name in ours else "nothing"
            what = f"{name.removeprefix('model/')} is {have}, not {want}"
            raise ValueError(f"checkpoint {path} is of another model than config.json's: {what}")
    return tensors


def _saved_name(name: str, saved: dict) -> str:
    """What a tensor is called in a checkpoint: some projections had other names once."""
    old = name.replace(".in_proj.", ".proj.").replace(".out_proj.", ".out.")
    return old if name not in saved and old in saved else name


def _room_for(optimizer, saved: dict) -> dict:
    """{name in the checkpoint: empty tensor} for the optimizer's state.

    A state of its parameter's shape is sharded as the parameter is.
    """
    parameters = _parameters(optimizer)
    tensors = {}
    for name, tensor in saved.items():
        if name.startswith("optimizer/"):
            dtype = tensor.properties.dtype
            p = parameters.get(name, parameters.get(name.rpartition("/")[0]))
            if p is not None and p.shape == tensor.size:
                tensors[name] = torch.empty_like(p, dtype=dtype)
            else:
                tensors[name] = torch.empty(tensor.size, dtype=dtype)
    return tensors


# What .metadata may be made of: it is a pickle, and a checkpoint may come from anywhere.
_DCP = "torch.distributed.checkpoint"
_CLASSES = "Metadata MetadataIndex TensorStorageMetadata TensorProperties ChunkStorageMetadata"
_DTYPES = "float32 float64 bfloat16 float16 int64 int32 bool uint8"
_ALLOWED = {(f"{_DCP}.metadata", name) for name in _CLASSES.split()}
_ALLOWED |= {(f"{_DCP}.metadata", name) for name in ("StorageMeta", "_MEM_FORMAT_ENCODING")}
_ALLOWED |= {(f"{_DCP}.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")}
_ALLOWED |= {("torch", "Size"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath")}
_ALLOWED |= {("torch", name) for name in _DTYPES.split()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


def _metadata(path: Path):
    with open(path, "rb") as file:
        metadata = _Unpickler(file).load()
    metadata.storage_meta = metadata.storage_meta or type(metadata.storage_meta)()
    return metadata
