"""Text in, token arrays out: corpora, tokenizers, token shards, training batches, validation windows.

    python data.py                  # what the embedded corpus is: this Python's own standard library source
    python data.py notes.txt        # the same for a text file, a folder of text files, a folder of shards
    python data.py text PATHS... --vocab 32768 --out data/mine                      # shards of local text, or of 'stdlib'
    python data.py fineweb-edu --tokens 15e9 --vocab 32768 --out data/fineweb       # of FineWeb-Edu, streamed

A corpus is two token streams. The held-out one is 5% of the *files*, so nothing of a held-out file is ever trained on;
a single file gives its last 5% (cut at a line end). Documents are joined with <|endoftext|> between them:

    train:  doc_7 <|endoftext|> doc_2 <|endoftext|> doc_9 ...        val:  doc_4 <|endoftext|> doc_1 ...

Training batches are a function of (seed, step) and nothing else: a resumed run sees the same data, and so does one on
another number of processes. Validation windows lie side by side and score every held-out token exactly once, so that

    bits per byte = (sum of nats) / ln 2 / (true number of bytes)

compares models whatever their tokenizer; <|endoftext|> is a predicted token of zero bytes.

Shards are for text that does not fit into memory, or is worth a vocabulary of its own. A folder of shards:

    tokenizer.json     pattern, special tokens, tokens in order of rank: a byte-level BPE trained on the training text, or gpt2
    val-00000.npy, train-00000.npy, ...    uint16 (uint32 for vocabularies above 65,536), read by np.load(mmap_mode="r")
    manifest.json      source, tokenizer with sha256; tokens, bytes, documents and sha256 of every shard. Written last.

A shard is a function of its part of the text alone, so parts are encoded in parallel, in any order; a killed command that is
given again makes the missing shards, and the folder is the same byte for byte.
"""

import argparse
import codecs
import contextlib
import hashlib
import json
import math
import mmap
import multiprocessing
import os
import signal
import sys
import sysconfig
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from checkpoint import first_line, write_beside
from vocabulary import TOKENIZER, encode, kind_of, n_bytes, save_tokenizer, tokenizer, tokenizer_hash, train_tokenizer

HELD_OUT = 0.05  # fraction of the files (of the bytes, for a single file)
HELD_OUT_BYTES = 2**25  # and of a large corpus not much more than this: validation must end
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
MANIFEST, PLAN = "manifest.json", "plan.json"  # PLAN: of shards that are not finished


@dataclass(frozen=True)
class Corpus:
    """Two token streams (uint16 or uint32) and the text they come from. Sizes in bytes leave out the <|endoftext|> tokens."""

    name: str
    encoding: tiktoken.Encoding
    train: "np.ndarray | Shards"  # [tokens]
    val: np.ndarray  # [tokens], held out
    train_bytes: int
    val_bytes: int
    train_files: tuple[str, ...]
    val_files: tuple[str, ...]
    crc32: int | None = None  # of both streams where it is known

    def fingerprint(self) -> dict:
        """What identifies the data of a run: sizes and a checksum of both streams."""
        crc32 = zlib.crc32(self.val.tobytes(), zlib.crc32(self.train.tobytes())) if self.crc32 is None else self.crc32
        return {"name": self.name, "train_tokens": len(self.train), "val_tokens": len(self.val), "crc32": crc32}


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def _why_not_text(data: "bytes | mmap.mmap") -> str | None:
    if (nul := data.find(b"\0")) >= 0:
        return f"has a NUL byte at offset {nul}"
    decoder, block = codecs.getincrementaldecoder("utf-8")(), 2**24
    for i in range(0, len(data), block):
        now = data[i : i + block]
        try:
            decoder.decode(now, final=i + block >= len(data))
        except UnicodeDecodeError as error:
            at = i + error.start - (len(error.object) - len(now))  # its object begins with what the last block left over
            return f"is not UTF-8 at offset {at} (byte 0x{data[at]:02x})"
    return None


def _files(source: str) -> list[tuple[str, Path]]:
    """(name, path) of the files of a source that may be documents, in the order of their names; see `documents`."""
    root = Path(sysconfig.get_path("stdlib") if source == "stdlib" else source)
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        legal = "'stdlib', a text file, a folder of text, or of shards (python data.py --help)"
        raise ValueError(f"data {source!r} does not exist: legal are {legal}")
    for name in (PLAN, MANIFEST):
        if (root / name).is_file():
            raise ValueError(f"data {source!r} is a folder of {'unfinished ' * (name == PLAN)}token shards, not of text")
    found = []
    for path in root.rglob("*.py" if source == "stdlib" else "*"):
        parts = path.relative_to(root).parts
        skipped = SKIPPED_FOLDERS & set(parts[:-1]) if source == "stdlib" else any(p.startswith(".") for p in parts)
        if not skipped and path.is_file():
            found.append(("/".join(parts), path))
    return sorted(found)


@contextlib.contextmanager
def _mapped(path: str | Path):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _read_text(source: str) -> Iterator[tuple[str, Path, "mmap.mmap"]]:
    """(name, path, contents mapped into memory) of every document of a source. ValueError as in `documents`."""
    files, empty = _files(source), True
    alone = len(files) == 1 and Path(source).is_file()
    for name, path in files:
        if not path.stat().st_size:
            if alone:
                raise ValueError(f"data {source!r} is empty: text is needed")
            continue
        with _mapped(path) as data:
            if why := _why_not_text(data):
                if alone:
                    raise ValueError(f"data {source!r} {why}: only UTF-8 text is read")
                continue
            yield name, path, data
            empty = False
    if empty:
        raise ValueError(f"data {source!r} is empty: no UTF-8 text file in the folder")


def documents(source: str = "stdlib") -> list[tuple[str, bytes]]:
    """(name, text) of every document of a source, shuffled by a fixed seed: "stdlib", a text file, or a folder.

    Of a folder, every non-empty UTF-8 file counts; hidden and binary files are passed over. ValueError names what is
    missing, empty or binary.
    """
    found = [(name, data[:]) for name, _, data in _read_text(source)]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def join(texts: list[bytes], encoding: tiktoken.Encoding) -> np.ndarray:
    """One stream of tokens (as `encode`'s) with <|endoftext|> between the documents."""
    end = np.array([encoding.eot_token], dtype=kind_of(encoding))
    pieces = [piece for text in texts for piece in (end, encode(text, encoding))]
    return np.concatenate(pieces[1:])


def _cut(data: "bytes | mmap.mmap", low: int, mark: int) -> int:
    """Where to cut a text: after the last line end from low to mark, else between the characters at mark."""
    line_end = data.rfind(b"\n", low, mark)
    if line_end >= 0:
        return line_end + 1
    while mark > 0 and data[mark] & 0xC0 == 0x80:  # inside a UTF-8 character
        mark -= 1
    return mark


def _held_out(sizes: list[int]) -> int:
    """How many of the first documents are held out: 5%, at least one, and no more bytes than are needed."""
    wanted = max(1, round(HELD_OUT * len(sizes)))
    return min(wanted, 1 + int(np.searchsorted(np.cumsum(sizes), HELD_OUT_BYTES)))


def _held_out_part(data: "bytes | mmap.mmap") -> int:
    """Where the held-out part of a single document begins: its last 5%, from a line start if one is near."""
    part = min(HELD_OUT, HELD_OUT_BYTES / len(data))
    return _cut(data, int(len(data) * (1 - 2 * part)), int(len(data) * (1 - part)))


def is_shards(source: str) -> bool:
    return source != "stdlib" and (Path(source) / MANIFEST).is_file()


def load_corpus(source: str = "stdlib", encoding: tiktoken.Encoding | None = None) -> Corpus:
    """The corpus of a source: "stdlib", a text file, a folder of text, or a folder of shards, which stays on the disk.

    encoding: the run's; None: the shards' own, bytes for everything else. ValueError as in `documents`, for shards that are
    unfinished or damaged, and for shards of another encoding than the run's.
    """
    if is_shards(source):
        return _load_shards(Path(source), encoding)
    encoding = encoding or tokenizer()
    files = documents(source)
    if len(files) == 1:
        (name, data), cut = files[0], _held_out_part(files[0][1])
        train, val = [(name, data[:cut])], [(name, data[cut:])]
    else:
        held_out = _held_out([len(text) for _, text in files])
        train, val = files[held_out:], files[:held_out]
    return Corpus(
        name=_name([source]),
        encoding=encoding,
        train=join([text for _, text in train], encoding),
        val=join([text for _, text in val], encoding),
        train_bytes=sum(len(text) for _, text in train),
        val_bytes=sum(len(text) for _, text in val),
        train_files=tuple(name for name, _ in train),
        val_files=tuple(name for name, _ in val),
    )


def _name(sources: list[str]) -> str:
    stdlib = f"Python {sys.version.split()[0]} standard library"
    return " + ".join(stdlib if source == "stdlib" else Path(source).name for source in sources)


# ---------------------------------------------------------------------------------------------------------------------
# Shards: reading them


class Shards:
    """Arrays of tokens on the disk as one stream: len, and slices, which may reach across shards."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays, self.ends = arrays, np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        i, pieces = int(np.searchsorted(self.ends, start, side="right")), []
        while start < stop:
            begin = int(self.ends[i]) - len(self.arrays[i])
            pieces.append(self.arrays[i][start - begin : stop - begin])
            start, i = start + len(pieces[-1]), i + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([self.arrays[0][:0], *pieces])


def _open(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r").view(np.ndarray)  # slices of a plain array cost less than those of a memmap
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path.name} is missing, damaged or not whole ({first_line(error)})") from None


def _load_shards(folder: Path, encoding: tiktoken.Encoding | None) -> Corpus:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        own = tokenizer(str(folder / TOKENIZER))
        if tokenizer_hash(own) != manifest["tokenizer"]["sha256"]:
            raise ValueError(f"{TOKENIZER} is not the tokenizer of the manifest")
        arrays = {"train": [], "val": []}
        for shard in manifest["shards"]:
            arrays[shard["split"]].append(_open(folder / shard["file"]))
            if len(arrays[shard["split"]][-1]) != shard["tokens"]:
                raise ValueError(f"{shard['file']} does not have its {shard['tokens']:,} tokens")
        if encoding and tokenizer_hash(encoding) != tokenizer_hash(own):
            why = f"holds tokens of {own.name!r}, but the tokenizer of the run is {encoding.name!r}"
            raise ValueError(f"{why}: legal are shards made with it (data.py ... --vocab RUN/{TOKENIZER}), or text")
        names = {split: tuple(shard["file"] for shard in manifest["shards"] if shard["split"] == split) for split in arrays}
        return Corpus(
            name=manifest["source"]["name"],
            encoding=encoding or own,
            train=Shards(arrays["train"]),
            val=arrays["val"][0],
            train_bytes=manifest["train"]["bytes"],
            val_bytes=manifest["val"]["bytes"],
            train_files=names["train"],
            val_files=names["val"],
            crc32=zlib.crc32("".join(shard["sha256"] for shard in manifest["shards"]).encode()),
        )
    except (OSError, KeyError, TypeError, IndexError, ValueError) as error:
        why = str(error) if type(error) is ValueError else f"{MANIFEST} is damaged ({error!r})"
        raise ValueError(f"data {str(folder)!r}: {why}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Shards: making them. A plan says which part of the text goes into which shard, before anything is encoded

TOKENIZER_BYTES = 2**29  # of text that a vocabulary is trained on, at most
PIECE = 2**20  # bytes that are encoded at once; longer documents are cut, at a line end where there is one
LEAST, MOST = 2**22, 2**28  # bytes in a training shard: a 256th of the text within these limits
SHARE = 2**26  # training tokens that a file of FineWeb-Edu is worth opening for
# Samples of FineWeb-Edu (Lozhkov et al. 2024) and how many tokens of GPT-2 each has
FINEWEB = {"sample-10BT": 10e9, "sample-100BT": 100e9, "sample-350BT": 350e9, "default": math.inf}
HUB = {"path": "HuggingFaceFW/fineweb-edu"}


@dataclass(frozen=True)
class Part:
    """What one shard holds. texts: (path, begin, end, whether <|endoftext|> comes before), or of a data set on the hub
    (name of the sample, number of the file, number of files, held-out bytes at its start), up to `size` tokens."""

    split: str
    number: int
    size: int  # bytes of text, or tokens of a data set on the hub
    texts: tuple = ()
    hub: tuple = ()

    @property
    def file(self) -> str:
        return f"{self.split}-{self.number:05d}.npy"


def plan_text(sources: list[str]) -> tuple[dict, list[Part]]:
    """(what the source is, parts) of local text: files, folders, 'stdlib'; split as `load_corpus` does."""
    found = []
    for source in sources:
        for name, path, data in _read_text(source):
            found.append((name, str(path), len(data), zlib.crc32(data)))
    files = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    ranges = {"val": [], "train": []}
    if len(files) == 1:
        _, path, size, _ = files[0]
        with _mapped(path) as data:
            cut = _held_out_part(data)
        ranges["val"], ranges["train"] = [(path, cut, size)], [(path, 0, cut)]
    else:
        held_out = _held_out([size for _, _, size, _ in files])
        for i, (_, path, size, _) in enumerate(files):
            ranges["val" if i < held_out else "train"].append((path, 0, size))
    total = sum(size for _, _, size, _ in files)
    most = min(MOST, max(LEAST, total // 256))
    parts = []
    for split, where in ranges.items():
        texts, size, number = [], 0, 0
        for i, (path, begin, end) in enumerate(where):
            for a, b in _pieces(path, begin, end):
                if split == "train" and size and size + b - a > most:
                    parts.append(Part(split, number, size, tuple(texts)))
                    texts, size, number = [], 0, number + 1
                texts.append((path, a, b, a == begin and i > 0))
                size += b - a
        parts.append(Part(split, number, size, tuple(texts)))
    checksum = hashlib.sha256(json.dumps([(name, size, crc32) for name, _, size, crc32 in files]).encode()).hexdigest()
    return {"name": _name(sources), "documents": len(files), "bytes": total, "sha256": checksum}, parts


def _pieces(path: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    if end - begin <= PIECE:
        yield begin, end
        return
    with _mapped(path) as data:
        while begin < end:
            cut = end if end - begin <= PIECE else _cut(data, begin + PIECE // 2, begin + PIECE)
            yield begin, cut
            begin = cut


def plan_fineweb(tokens: int) -> tuple[dict, list[Part]]:
    """(what the source is, parts) of FineWeb-Edu: an equal share of training tokens from each file of a large enough sample.

    Held out are the first documents of the first file. ValueError where the library is missing; OSError without network.
    """
    sample = next(name for name, size in FINEWEB.items() if tokens <= 0.9 * size)
    n_files = _hub(sample).num_shards
    n = min(n_files, -(-tokens // SHARE))
    held_out = min(HELD_OUT_BYTES, max(1, int(HELD_OUT * 4 * tokens)))  # 4 bytes a token
    parts = [Part("val", 0, held_out // 4, hub=(sample, 0, n_files, held_out))]
    for i in range(n):
        share = tokens * (i + 1) // n - tokens * i // n
        parts.append(Part("train", i, share, hub=(sample, i * n_files // n, n_files, held_out if i == 0 else 0)))
    return {"name": "fineweb-edu", "sample": sample, "files": n_files, "tokens": tokens}, parts


@cache
def _hub(sample: str):
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("FineWeb-Edu is streamed by datasets: pip install datasets") from None
    with _hub_errors(sample):
        return load_dataset(**HUB, name=sample, split="train", streaming=True)


@contextlib.contextmanager
def _hub_errors(sample: str):
    try:
        yield
    except Exception as error:  # of a dozen kinds: network, hub, parquet
        raise OSError(f"{HUB['path']} ({sample}) could not be read ({first_line(error)})") from error


def _hub_texts(part: Part) -> Iterator[bytes]:
    sample, file, n_files, held_out = part.hub
    seen = 0
    with _hub_errors(sample):
        for row in _hub(sample).shard(n_files, file):
            text = row["text"].encode()
            if (seen < held_out) == (part.split == "val"):
                yield text
            elif part.split == "val":
                return
            seen += len(text)


def _texts(part: Part) -> Iterator[tuple[bytes, bool]]:
    """(text, whether <|endoftext|> comes before it) of a part, in order."""
    if part.hub:
        for i, text in enumerate(_hub_texts(part)):
            yield text, part.number > 0 or i > 0
    for path, begin, end, new in part.texts:
        with open(path, "rb") as file:
            file.seek(begin)
            yield file.read(end - begin), new


def _save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:  # by name, np.save would add a suffix
        np.save(file, array)


def _sha256(path: Path) -> str:
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            checksum.update(block)
    return checksum.hexdigest()


def _make(part: Part, out: Path, tick) -> dict:
    """Encode and write a shard, unless it is there; what the manifest says of it. tick: told how far it has come."""
    encoding, path = tokenizer(str(out / TOKENIZER)), out / part.file
    try:
        array = _open(path)
        tick(part.size)
    except ValueError:  # none, or one that a power cut has torn
        limit = part.size if part.hub and part.split == "train" else math.inf
        end = np.array([encoding.eot_token], dtype=kind_of(encoding))
        pieces, count = [end[:0]], 0
        for text, new in _texts(part):
            pieces += [end[:new], encode(text, encoding)]
            now = len(pieces[-1]) + new
            tick(max(0, min(now, part.size - count)) if part.hub else len(text))
            count += now
            if count >= limit:
                break
        array = np.concatenate(pieces)[: min(count, limit)]
        write_beside(path, lambda beside: _save_array(beside, array))
    ends = sum(int((array[i : i + 2**22] == encoding.eot_token).sum()) for i in range(0, len(array), 2**22))
    counts = {"tokens": len(array), "bytes": n_bytes(array, encoding), "documents": ends + (part.number == 0)}
    return {"file": part.file, "split": part.split} | counts | {"sha256": _sha256(path)}


_worker = {}


def _start_worker(out: Path, done) -> None:
    _worker.update(out=out, done=done)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # it may be killed


def _work(part: Part) -> dict:
    def tick(n):
        with _worker["done"].get_lock():
            _worker["done"].value += n

    return _make(part, _worker["out"], tick)


def _make_all(parts: list[Part], out: Path, jobs: int, unit: str) -> list[dict]:
    form = dict(total=sum(part.size for part in parts), unit=unit, unit_scale=True, dynamic_ncols=True)
    with tqdm(**form, mininterval=0.5 if sys.stderr.isatty() else 30, desc="encoding") as bar:
        if jobs == 1:
            return [_make(part, out, bar.update) for part in parts]
        context = multiprocessing.get_context("spawn")  # no threads of libraries are copied half-alive
        done = context.Value("q", 0)
        with ProcessPoolExecutor(jobs, context, _start_worker, (out, done)) as pool:
            try:
                futures = [pool.submit(_work, part) for part in parts]
                waiting = set(futures)
                while waiting:
                    finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                    bar.update(done.value - bar.n)
                    for future in finished:
                        future.result()
                return [future.result() for future in futures]
            except BaseException as error:
                for process in multiprocessing.active_children():
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                if isinstance(error, BrokenProcessPool):
                    raise OSError("a process was killed, maybe for its memory (fewer --jobs need less)") from None
                raise


def make_shards(source: dict, parts: list[Part], vocab: int | str, out: str, jobs: int = 0) -> dict:
    """Write the shards of a plan into the folder `out`, or those that are missing; returns the manifest.

    vocab: symbols of a vocabulary to train, or the name of a ready one, see `tokenizer`. jobs: processes; 0: one for each
    CPU. Raises ValueError, before any file is touched, for a folder of something else, and as `tokenizer` does.
    """
    out = Path(out)
    ready = None if isinstance(vocab, int) else tokenizer(vocab)
    plan = {"format": 1, "source": source, "vocab": tokenizer_hash(ready) if ready else vocab}
    begun = next((json.loads(path.read_text()) for path in (out / MANIFEST, out / PLAN) if path.is_file()), None)
    if begun is None and out.exists() and (not out.is_dir() or any(path.suffix != ".tmp" for path in out.iterdir())):
        raise ValueError(f"out {str(out)!r} exists and holds something else: name a new folder")
    if begun and any(begun.get(key) != value for key, value in plan.items()):
        key = next(key for key, value in plan.items() if begun.get(key) != value)
        raise ValueError(f"out {str(out)!r} was begun with {key} {begun.get(key)}, not {plan[key]}: name a new folder")
    if begun and "shards" in begun:
        (out / PLAN).unlink(missing_ok=True)
        return begun
    out.mkdir(parents=True, exist_ok=True)
    for torn in out.glob("*.tmp"):
        torn.unlink()
    if not (out / TOKENIZER).is_file():
        if not ready:
            print(f"training a vocabulary of {vocab:,} symbols ...", flush=True)
        encoding = ready or train_tokenizer(_training_text(parts), vocab)
        write_beside(out / PLAN, lambda beside: beside.write_text(json.dumps(plan)))
        save_tokenizer(encoding, out)
    encoding = tokenizer(str(out / TOKENIZER))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shards = _make_all(parts, out, min(jobs or cpus, len(parts)), "B" if parts[0].texts else " tokens")
    counts = ("tokens", "bytes", "documents")
    totals = {
        split: {count: sum(shard[count] for shard in shards if shard["split"] == split) for count in counts}
        for split in ("train", "val")
    }
    what = {"name": encoding.name, "sha256": tokenizer_hash(encoding), "n_vocab": encoding.n_vocab}
    manifest = plan | {"tokenizer": what} | totals | {"shards": shards}
    write_beside(out / MANIFEST, lambda beside: beside.write_text(json.dumps(manifest, indent=1) + "\n"))
    (out / PLAN).unlink()
    return manifest


def _training_text(parts: list[Part]) -> Iterator[bytes]:
    """Text for a vocabulary: the first of every training part in turn, so that no part is preferred."""
    train = [part for part in parts if part.split == "train"]
    each = TOKENIZER_BYTES // len(train)
    for part in train:
        size = 0
        for text, _ in _texts(part):
            yield text
            size += len(text)
            if size >= each:
                break


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def batch(
    tokens: "np.ndarray | Shards", batch_size: int, seq_len: int, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets), int64 [batch_size, seq_len] each, drawn by (seed, step) alone. ValueError if data is short.

    Rows of an array begin anywhere. Shards are read in passes: rows lie side by side, and every one comes once in a pass, in
    an order of its own.
    """
    if len(tokens) <= seq_len:
        legal = f"1 to {len(tokens) - 1}" if len(tokens) > 1 else "none, it needs at least 2 tokens"
        raise ValueError(f"seq_len {seq_len} is too long for {len(tokens)} training tokens: legal is {legal}")
    if isinstance(tokens, Shards):
        n = (len(tokens) - 1) // seq_len
        places = (divmod(step * batch_size + row, n) for row in range(batch_size))
        starts = [int(_order(n, seed, done)[i]) * seq_len for done, i in places]
    else:
        starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - seq_len, size=batch_size)
    rows = torch.from_numpy(np.stack([tokens[i : i + seq_len + 1] for i in starts]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


@lru_cache(maxsize=2)
def _order(n: int, seed: int, done: int) -> np.ndarray:
    """The rows 0 to n - 1 in the order of a pass, of which `done` are over."""
    return np.random.default_rng([seed, done]).permutation(np.arange(n, dtype=np.uint32))


def windows(
    tokens: np.ndarray, batch_size: int, seq_len: int, start: int = 256
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Validation batches (inputs, targets), int64 [<= batch_size, <= seq_len]: every token is a target exactly once.

    The first token is predicted from `start` (<|endoftext|>), the first of a later window from the token before it.
    """
    targets = torch.from_numpy(tokens.astype(np.int64))
    inputs = torch.cat([torch.tensor([start]), targets[:-1]])
    whole = len(targets) // seq_len * seq_len
    if whole:
        rows = (stream[:whole].view(-1, seq_len).split(batch_size) for stream in (inputs, targets))
        yield from zip(*rows, strict=True)
    if whole < len(targets):
        yield inputs[None, whole:], targets[None, whole:]


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def show(source: str = "stdlib") -> None:
    """Print what a corpus is; of shards, also whether they still are what the manifest says."""
    corpus = load_corpus(source)
    encoding, shards = corpus.encoding, isinstance(corpus.train, Shards)
    print(f"{corpus.name}, tokenizer {encoding.name!r} ({encoding.n_vocab:,} symbols)")
    parts = (("train", corpus.train, corpus.train_bytes, corpus.train_files),
             ("held out", corpus.val, corpus.val_bytes, corpus.val_files))  # fmt: skip
    for part, tokens, size, files in parts:
        shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        print(f"{part:>9}: {len(files):,} files, {size:,} bytes, {len(tokens):,} tokens ({shown})")
    if shards:
        text = encoding.decode_bytes([i for i in corpus.val[: 2**20].tolist() if i != encoding.eot_token])
        line = f"held out: {len(text) / len(encode(text, encoding)):.3f} bytes per token"
        try:
            line += f"; of GPT-2's vocabulary on the same text: {len(text) / len(encode(text, tokenizer('gpt2'))):.3f}"
        except ValueError as error:
            line += f"; GPT-2's for comparison: {error}"
        print(line)
        check(source)
    inputs, _ = batch(corpus.train, 3, min(240, len(corpus.train) - 1), seed=0, step=0)
    print("\na batch of 3 rows, seed 0, step 0:")
    for row in inputs:
        print("-" * 80 + "\n" + encoding.decode(row.tolist()))


def check(folder: str) -> None:
    """Compare every shard with the manifest. ValueError names the first that differs."""
    shards = json.loads((Path(folder) / MANIFEST).read_text())["shards"]
    for shard in tqdm(shards, desc="sha256", dynamic_ncols=True, leave=False, disable=None):
        if _sha256(Path(folder) / shard["file"]) != shard["sha256"]:
            raise ValueError(f"data {folder!r}: {shard['file']} is not the file of the manifest: its sha256 differs")
    print(f"sha256 of {len(shards)} shards: as the manifest says")


def _number(text: str) -> int:
    with contextlib.suppress(ValueError):
        if float(text).is_integer() and float(text) >= 1:
            return int(float(text))
    raise argparse.ArgumentTypeError(f"{text!r}: legal is a whole number of at least 1, as 8 or 15e9")


def _vocab(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in ("text", "fineweb-edu", "-h", "--help"):
        return show(argv[0])
    if not argv:
        return show()

    def refuse(message):
        raise ValueError(f"{message} (--help lists the flags)")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    commands = parser.add_subparsers(dest="command", metavar="[SOURCE | text | fineweb-edu]")
    text = commands.add_parser("text", help="token shards of local text")
    text.add_argument("paths", nargs="+", help="text files, folders of text files, 'stdlib'")
    web = commands.add_parser("fineweb-edu", help="token shards of FineWeb-Edu (pip install datasets)")
    web.add_argument("--tokens", type=_number, default=15 * 10**9, help="training tokens, as 15e9 (the default)")
    for command in (text, web):
        command.error = refuse
        command.add_argument("--out", required=True, help="folder of the shards; that of a killed command: goes on")
        command.add_argument("--vocab", type=_vocab, default=32768, help="symbols of a vocabulary to train (default 32768), "
                             "or a ready one: gpt2, bytes, a tokenizer.json")  # fmt: skip
        command.add_argument("--jobs", type=_number, default=0, help="processes (default: one for each CPU)")
    args = parser.parse_args(argv)
    if isinstance(args.vocab, int) and not 258 <= args.vocab <= 2**20:
        raise ValueError(f"vocab is {args.vocab}: legal is 258 to {2**20}, gpt2, bytes, or a tokenizer.json")
    source, parts = plan_text(args.paths) if args.command == "text" else plan_fineweb(args.tokens)
    manifest = make_shards(source, parts, args.vocab, args.out, args.jobs)
    for split in ("train", "val"):
        n = manifest[split]
        print(f"{split:>5}: {n['documents']:,} documents, {n['bytes']:,} bytes, {n['tokens']:,} tokens, "
              f"{n['bytes'] / max(1, n['tokens']):.3f} bytes per token")  # fmt: skip
    if args.command == "fineweb-edu" and manifest["train"]["tokens"] < args.tokens:
        print(f"note: the sample ended before {args.tokens:,} tokens")
    print(f"in {args.out}, tokenizer {manifest['tokenizer']['name']!r}; next: python train.py --data {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
