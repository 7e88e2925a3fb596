"""Checkpoints of a run: whole or not at all, written in shares by every process, read by any number of processes.

    runs/x/checkpoints/step-200/    .metadata, __0_0.distcp, __1_0.distcp, ...    tensors (torch.distributed.checkpoint)
                                    rest.pt     everything that is no tensor, and how long each of the files must be

One is written as step-200.tmp, flushed to the disk and renamed, so a kill or a full disk leaves the ones before it as they
were. Reading takes the newest that is whole and says which it passed over. Files of many machines: on a shared file system.
"""

import contextlib
import os
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from learn import map_state
from support import distributed
from support.distributed import on_all, on_first

# ---------------------------------------------------------------------------------------------------------------------
# One file


def first_line(error: BaseException) -> str:
    """What an error says, in one line; some say nothing but their kind."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def reason(error: BaseException, path: Path) -> str:
    """Why writing to path failed, in one line; torch wraps what the disk said into errors of its own."""
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return f"{first_line(error)}; the disk has {shutil.disk_usage(path.parent).free / 2**20:,.1f} MiB free"


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all: `write` to a name beside it, then rename. OSError says what stayed."""
    beside = path.with_name(path.name + ".tmp")
    try:
        write(beside)
        flush(beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save calls a full disk a RuntimeError
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        kept = f"the earlier {path.name} is intact" if path.exists() else "nothing is left behind"
        raise OSError(f"could not write {path} ({reason(error, path)}); {kept}") from error


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def load_file(path):
    """What torch.save wrote, on the CPU; only plain data. ValueError in one line for a missing or damaged file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:  # torch raises a different kind, some without a message, for every way a file can be damaged
        raise ValueError(f"{path} is truncated or damaged ({first_line(error)})") from None


# ---------------------------------------------------------------------------------------------------------------------
# A tree of tensors and plain values, as a flat dict of tensors and the tree without them


def _cut(tree, path=""):
    """(tree with None for its tensors, {"a/b/0": tensor}); single numbers stay in the tree."""
    if torch.is_tensor(tree) and tree.ndim:
        return None, {path: tree.detach()}
    if not isinstance(tree, (dict, list)):
        return tree, {}
    rest, tensors = [], {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        value, below = _cut(value, f"{path}/{key}" if path else str(key))
        rest.append((key, value))
        tensors |= below
    return dict(rest) if isinstance(tree, dict) else [value for _, value in rest], tensors


def _join(tree, tensors, path=""):
    """The inverse of `_cut`."""
    if path in tensors:
        return tensors[path]
    if isinstance(tree, (dict, list)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        joined = {key: _join(value, tensors, f"{path}/{key}" if path else str(key)) for key, value in items}
        return joined if isinstance(tree, dict) else list(joined.values())
    return tree


def _shares(optimizer):
    """{path of a parameter's state in the optimizer's state_dict: the parameter}."""
    parts = getattr(optimizer, "optimizers", None)
    if parts is not None:
        return {f"optimizers/{i}/{at}": p for i, part in enumerate(parts) for at, p in _shares(part).items()}
    return {f"state/{i}": p for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


class CorruptCheckpoint(RuntimeError):
    """A checkpoint that is not all there."""


def saved_steps(run: Path) -> list[int]:
    """Steps of the checkpoints of a run, whole or torn, in order."""
    named = (re.fullmatch(r"step-(\d+)", path.name) for path in Path(run, "checkpoints").glob("step-*"))
    return sorted(int(name[1]) for name in named if name)


def folder(run: Path, step: int) -> Path:
    return Path(run, "checkpoints", f"step-{step}")


def save(run: Path, model: nn.Module, optimizer, step: int, keep: int = 1) -> None:
    """Write the checkpoint of a step, then delete all but the `keep` newest. Called by all processes.

    OSError where it cannot be written; the earlier ones stay.
    """
    import torch.distributed.checkpoint as dcp  # takes as long to import as torch

    path = folder(run, step)
    beside = path.with_name(path.name + ".tmp")
    rest, tensors = _cut({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step})

    def clear():
        for left in path.parent.glob("*.tmp"):  # by a killed run, or by a full disk
            shutil.rmtree(left, ignore_errors=True)

    def finish():
        sizes = {file.name: file.stat().st_size for file in beside.iterdir()}
        torch.save({"rest": rest, "sizes": sizes}, beside / "rest.pt")
        flush(beside / "rest.pt")
        flush(beside)
        if path.exists():  # torn, or the run would have gone on from it
            shutil.rmtree(path)
        beside.rename(path)
        flush(path.parent)
        for old in saved_steps(run)[:-keep]:
            gone = folder(run, old)
            shutil.rmtree(gone.rename(gone.with_name(gone.name + ".tmp")))

    distributed.barrier(f"saving step {step}")
    try:
        on_first(clear)
        on_all(lambda: _call(dcp.save, tensors, checkpoint_id=beside))
        on_first(finish)
    except (OSError, RuntimeError) as error:
        why = reason(error, path.parent)  # before there is room again
        on_first(clear)
        earlier = saved_steps(run)
        kept = f"the earlier {folder(run, earlier[-1])} is intact" if earlier else "nothing is left behind"
        raise OSError(f"could not write {path} ({why}); {kept}") from error


def load(run: Path, model: nn.Module, optimizer=None) -> int:
    """Fill a model, and an optimizer, from the newest whole checkpoint of a run -> its step. Called by all processes.

    ValueError in one line: no checkpoint, none that is whole, or one of another model.
    """
    found, why = on_first(lambda: saved_steps(run)), f"{Path(run, 'checkpoints')} has no checkpoint"
    for step in reversed(found):
        try:
            return on_all(lambda step=step: _read(folder(run, step), model, optimizer))
        except RuntimeError as error:  # CorruptCheckpoint, here or in another process
            why = first_line(error)
        if distributed.rank() == 0 and step != found[0]:
            print(f"warning: {why}: going back to the checkpoint before it", file=sys.stderr)
    raise ValueError(why)


def _read(path, model, optimizer):
    """One checkpoint. CorruptCheckpoint, or ValueError where it is of another model."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(path)
    try:
        kept = load_file(path / "rest.pt")
        for name, size in kept["sizes"].items():
            if (there := (path / name).stat().st_size) != size:
                raise CorruptCheckpoint(f"{name} has {there} bytes of {size}")
        reader.read_metadata = lambda *_, **__: _metadata(path / ".metadata")
        saved = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise CorruptCheckpoint(f"checkpoint {path} is torn ({first_line(error)})") from None

    tensors = _cut({"model": model.state_dict()})[1]
    tensors = {_name_in(saved, name): tensor for name, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    theirs = {name: tensor.size for name, tensor in saved.items() if name.startswith("model/")}
    if wrong := sorted(name for name in {**shapes, **theirs} if shapes.get(name) != theirs.get(name)):
        have, want = (tuple(of[wrong[0]]) if wrong[0] in of else "nothing" for of in (theirs, shapes))
        name = wrong[0].removeprefix("model/")
        raise ValueError(f"checkpoint {path} is of another model than config.json's: {name} is {have}, not {want}")
    if optimizer is not None:
        shares = _shares(optimizer)
        for name, tensor in saved.items():
            if name.startswith("optimizer/"):  # a state is in shares as its parameter is, if it is of its shape
                p = shares.get(name.removeprefix("optimizer/").rpartition("/")[0])
                alike = p is not None and p.shape == tensor.size
                like = torch.empty_like(p, dtype=tensor.properties.dtype) if alike else None
                tensors[name] = torch.empty(tensor.size, dtype=tensor.properties.dtype) if like is None else like
    try:
        _call(dcp.load, tensors, storage_reader=reader)
    except (OSError, RuntimeError) as error:
        raise CorruptCheckpoint(f"checkpoint {path} is torn ({first_line(error)})") from None
    if optimizer is not None:
        try:
            optimizer.load_state_dict(_join(kept["rest"], tensors)["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"checkpoint {path} is of another optimizer ({first_line(error)})") from None
    return kept["rest"]["step"]


def _name_in(saved, name):
    """What a tensor is called in a checkpoint: projections had other names in some mixers once."""
    old = name.replace(".in_proj.", ".proj.").replace(".out_proj.", ".out.")
    return old if name not in saved and old in saved else name


def _call(work, tensors, **options):
    """torch.distributed.checkpoint in all processes, or alone; an ordinary error for its own."""
    from torch.distributed.checkpoint.api import CheckpointException

    alone = distributed.world() == 1
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*single process.*")  # that is what is meant
            work(tensors, no_dist=alone, process_group=distributed.CONTROL, **options)
    except CheckpointException as error:  # no Exception
        cause = next(iter(error.failures.values()))[0]
        raise RuntimeError(first_line(cause)) from cause


# What .metadata may be made of: it is a pickle, and a checkpoint may come from anywhere.
_PARTS = "Metadata MetadataIndex TensorStorageMetadata TensorProperties ChunkStorageMetadata StorageMeta _MEM_FORMAT_ENCODING"
_PLAIN = {("torch.distributed.checkpoint.metadata", name) for name in _PARTS.split()}
_PLAIN |= {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")}
_PLAIN |= {("torch", "Size"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath")}
_PLAIN |= {("torch", dtype) for dtype in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "bool", "uint8")}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


def _metadata(path):
    with open(path, "rb") as file:
        metadata = _Unpickler(file).load()
    metadata.storage_meta = metadata.storage_meta or type(metadata.storage_meta)()
    return metadata


def save_state(state, path):
    """Write a state to a file: cut from the graph, on the CPU. OSError where that fails; never half a file."""
    state = map_state(lambda t: t.detach().cpu().clone(), state)
    atomic_write(Path(path), lambda beside: torch.save(state, beside))


def load_state(path, device="cpu"):
    """The state `save_state` wrote. Raises ValueError where the file is torn or no such file."""
    return map_state(lambda t: t.to(device), load_file(path))
