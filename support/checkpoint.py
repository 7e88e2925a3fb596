"""Checkpoints of a run: written whole or not at all, sharded, read by any number of processes.

    runs/x/checkpoints/step-200/
        .metadata, __0_0.distcp, __1_0.distcp, ...    tensors, by torch.distributed.checkpoint
        rest.pt    everything that is no tensor, the size of each of those files, and the CRC-32 of
                   .metadata; the others have one for each tensor, which torch writes as it saves

A checkpoint is written as step-200.tmp, flushed to the disk and renamed, so a kill or a full disk
leaves the earlier ones as they were. Reading takes the newest that is complete and unaltered, and
warns of those that it passes over. Several machines need a shared file system.
"""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

from support import distributed
from support.distributed import agreed, gather, rank, world

# --------------------------------------------------------------------------------------------------
# One file


def first_line(error: BaseException) -> str:
    """What an error says, in one line; the name of its class where it says nothing."""
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
        return "it holds more than plain data"  # torch advises to run the file's code
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


@contextlib.contextmanager
def warned():
    """Within, a disk that cannot be written is a warning: what was computed is not lost with it."""
    try:
        yield
    except OSError as error:
        print(f"warning: {first_line(error)}", file=sys.stderr)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False):
    """Within, no other process has this lock: a file with host and process, removed in the end.

    wait: until it is free; else ValueError names the owner. That of a dead process is free, because
    the lock is the system's, not the file; where a system has none, it is not locked.
    """
    if fcntl is None:
        yield
        return
    while True:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB * (not wait))
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "another process"
            file.close()
            raise ValueError(f"{path.parent} is written by {owner}: wait until it ends") from None
        except OSError as error:
            print(f"warning: {path} cannot be locked ({first_line(error)})", file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):  # else its owner has just removed it
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()
    with file:
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)


def parse_json(text: str | bytes):
    """The value of a JSON text. ValueError for any that is none, also for one nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def json_lines(path: Path, made: Callable) -> list:
    """made(value) of each line of a .jsonl; [] where there is no file.

    Lines that are torn, or for which it raises KeyError, TypeError or ValueError, are left out with
    a warning.
    """
    found = []
    lost = 0
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found += [made(parse_json(line))] if line.strip() else []
        except (KeyError, TypeError, ValueError):
            lost += 1
    if lost:
        why = "torn, foreign, or with settings that this version does not know"
        print(f"warning: {lost} lines of {path} do not count: {why}", file=sys.stderr)
    return found


def load_file(path):
    """What torch.save wrote (plain data), on the CPU. ValueError where it is missing or damaged."""
    if not Path(path).is_file():  # a named pipe would wait for ever
        raise ValueError(f"{path} does not exist, or is no file")
    try:
        _check(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has a different kind for every sort of damage
        raise ValueError(f"{path} is truncated or damaged ({first_line(error)})") from None


def _check(file) -> None:
    """ValueError where what torch.save wrote is not what its CRC-32s say: torch ignores them."""
    with zipfile.ZipFile(file) as parts:
        wrong = parts.testzip()
    if wrong:
        raise ValueError(f"the checksum of {wrong} differs")


def save_state(state, path) -> None:
    """Write a model's state to a file, detached and on the CPU. OSError where that fails."""
    state = tree_map_only(torch.Tensor, lambda t: t.detach().cpu().clone(), state)
    atomic_write(Path(path), lambda beside: torch.save(state, beside))


def load_state(path, device="cpu"):
    """The state that `save_state` wrote. ValueError where the file is missing or damaged."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be one of torch's, got {device!r}") from None
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
    names = [path.name for path in Path(run, "checkpoints").glob("step-*") if path.is_dir()]
    found = [re.fullmatch("step-(0|[1-9][0-9]*)", name) for name in names]
    return sorted(int(match[1]) for match in found if match)


def save(run: Path, model: nn.Module, optimizer, step: int, keep: int = 1) -> None:
    """Write the checkpoint of a step, then delete all but the `keep` newest that are complete.

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
    for left in checkpoints.glob("step-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def _finish(run: Path, step: int, rest, keep: int) -> None:
    """Add rest.pt to a checkpoint, give it its name, and delete the oldest ones."""
    path = folder(run, step)
    beside = _beside(path)
    sizes = {file.name: file.stat().st_size for file in beside.iterdir()}
    checksum = zlib.crc32((beside / ".metadata").read_bytes())
    kept = {"rest": rest, "sizes": sizes, "metadata_crc32": checksum}
    torch.save(kept, beside / "rest.pt")
    _flush(beside / "rest.pt")
    _flush(beside)
    if path.exists():  # damaged, or the run would have resumed from it
        shutil.rmtree(path)
    beside.rename(path)
    _flush(path.parent)
    # a later one did not load, or the run would have resumed from it
    earlier = [folder(run, old) for old in saved_steps(run) if old <= step]
    for gone in [old for old in earlier if _is_whole(old)][:-keep]:
        shutil.rmtree(gone.rename(_beside(gone)))


def _is_whole(path: Path) -> bool:
    with contextlib.suppress(CorruptCheckpoint):
        return bool(_rest(path))
    return False


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


OTHER = "of another model than config.json's"


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


def check_sizes(run: Path, config, made: Callable) -> None:
    """ValueError where a checkpoint of a run is of another model than made(config).

    Before that is allocated, which takes minutes or all memory where a size in a file is wrong.
    """
    for path in (folder(run, step) for step in reversed(saved_steps(run))):
        with contextlib.suppress(CorruptCheckpoint):
            with _damage(path):
                _rest(path)
                saved = _metadata(path / ".metadata").state_dict_metadata
            numbers = {name.split(".")[1] for name in saved if name.startswith("model/blocks.")}
            if len(numbers) != config.n_layers:
                what = f"n_layers is {len(numbers)}, not {config.n_layers}"
                raise ValueError(f"checkpoint {path} is {OTHER}: {what}")
            with torch.device("meta"):
                _tensors_of(made(config), saved, path)
            return


def _read(path: Path, model, optimizer) -> int:
    """One checkpoint. CorruptCheckpoint, or ValueError where it is of another model."""
    import torch.distributed.checkpoint as dcp

    kept = _rest(path)
    reader = dcp.FileSystemReader(path)
    reader.read_metadata = lambda *_, **__: _metadata(path / ".metadata")
    with _damage(path):
        metadata = reader.read_metadata()
        saved = metadata.state_dict_metadata
    tensors = _tensors_of(model, saved, path)
    if optimizer is not None:
        tensors |= _room_for(optimizer, saved)
    parts = [part for name, part in metadata.storage_data.items() if name.fqn in tensors]
    with agreed(), _damage(path):
        for part in parts[rank() % world() :: world()]:
            kept["sizes"][part.relative_path]  # raises for a file elsewhere
            with open(path / part.relative_path, "rb") as file:
                file.seek(part.offset)
                _check(io.BytesIO(file.read(part.length)))
    with _damage(path):
        _call(dcp.load, tensors, storage_reader=reader)  # into the tensors
    for name, number in model.state_dict().items():
        if not number.ndim and name in kept["rest"]["model"]:  # kept with the rest
            number.copy_(kept["rest"]["model"][name])
    if optimizer is not None:
        try:
            optimizer.load_state_dict(unflatten(kept["rest"], tensors)["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            why = f"is of another optimizer ({first_line(error)})"
            raise ValueError(f"checkpoint {path} {why}") from None
    return kept["rest"]["step"]


@contextlib.contextmanager
def _damage(path: Path):
    """Any error within is a CorruptCheckpoint: damage has many kinds."""
    try:
        yield
    except Exception as error:
        raise CorruptCheckpoint(f"checkpoint {path} is damaged ({first_line(error)})") from None


def _rest(path: Path) -> dict:
    """rest.pt of a checkpoint whose files are all there. CorruptCheckpoint where they are not."""
    with _damage(path):
        kept = load_file(path / "rest.pt")
        for name, size in {".metadata": 0, **kept["sizes"]}.items():
            have = (path / name).stat().st_size
            if have != size or Path(name).name != name:
                raise ValueError(f"{name} has {have} bytes of {size}")
        checksum = zlib.crc32((path / ".metadata").read_bytes())
        if kept.get("metadata_crc32", checksum) != checksum:  # older ones have none
            raise ValueError("the checksum of .metadata differs")
        if path.name != f"step-{kept['rest']['step']}":
            raise ValueError(f"rest.pt is of step {kept['rest']['step']}")
        return kept


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
            raise ValueError(f"checkpoint {path} is {OTHER}: {what}")
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
