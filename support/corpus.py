"""Text in, token arrays out: corpora, token shards, training batches, validation windows.

    corpus = load_corpus("notes.txt")    # or "stdlib", a folder of text, of shards (data.py)
    inputs, targets = batch(corpus.train, batch_size=4, seq_len=512, seed=0, step=0)
    for inputs, targets in windows(corpus.val, batch_size=4, seq_len=512):
        ...

A document is a text file (UTF-8, also .txt.gz), or a row of a .jsonl, .jsonl.gz or .parquet. Each
file counts once, however many names, links and folders lead to it.

A corpus is two token streams. The held-out one is 5% of the documents, so nothing of a held-out one
is ever trained on; a single one gives its last 5%, cut at a line end. Documents are joined with
<|endoftext|> between them:

    train:  doc_7 <|endoftext|> doc_2 <|endoftext|> doc_9 ...
    val:    doc_4 <|endoftext|> doc_1 ...

Training batches are a function of (seed, step) and nothing else: a resumed run sees the same data,
and so does one on another number of processes. Validation windows lie side by side and score every
held-out token exactly once, so that

    bits per byte = (sum of nats) / ln 2 / (true number of bytes)

compares models whatever their tokenizer; <|endoftext|> is a predicted token of zero bytes.

Shards are token arrays on the disk, for text that does not fit into memory:

    tokenizer.json     pattern, special tokens, tokens in order of rank (support/vocabulary.py)
    val-00000.npy, train-00000.npy, ...    uint16, or uint32 for vocabularies above 65,536
    manifest.json      source and tokenizer, each with its sha256; tokens, bytes, documents, largest
                       token and sha256 of every shard. Written last.
"""

import codecs
import contextlib
import gzip
import hashlib
import mmap
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
import torch

from support.checkpoint import first_line, parse_json
from support.distributed import rank, world
from support.vocabulary import TOKENIZER, dtype_of, encode, n_bytes, tokenizer, tokenizer_hash

HELD_OUT = 0.05  # fraction of the files (of the bytes, for a single file)
HELD_OUT_BYTES = 2**25  # and of a large corpus not much more than this: validation must end
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
MANIFEST = "manifest.json"
PLAN = "plan.json"  # of shards that are not finished
AGAIN = "other names of a file"  # that is read under its first name


# --------------------------------------------------------------------------------------------------
# Documents


def documents(source: str = "stdlib") -> list[tuple[str, bytes]]:
    """(name, text) of every document of a source, shuffled by a fixed seed.

    source: "stdlib", a file, or a folder, of which every file with text counts; what else is in it
    is passed over and counted in one line. ValueError names what is missing, empty or binary.
    """
    return shuffled([(name, text[:]) for name, _, text in read_text(source)])


def read_text(
    source: str, field: str = "text", seen: set | None = None
) -> Iterator[tuple[str, Path, bytes | mmap.mmap]]:
    """(name, path, text) of every document; text that is a whole file is mapped into memory.

    field: what is read of a row. seen: files of earlier sources, to which those of this one are
    added. ValueError as in `documents`, and for rows without text in that field.
    """
    single = source != "stdlib" and Path(source).is_file()
    passed = Counter()
    empty = True
    seen = set() if seen is None else seen
    before = len(seen)
    for name, path in _files(source, passed, seen):
        for row, text in _contents(path, field):
            why = "is empty" if not len(text) else None if row else _why_not_text(text)
            if not why:
                yield name + row, path, text
                empty = False
            elif single:
                raise ValueError(f"data {source!r} {why}: only UTF-8 text is read")
            elif len(text):
                kind = path.suffix or "without suffix"
                passed[f"{kind} ({why.split(' at ')[0].removeprefix('has a ')})"] += 1
    if passed and rank() == 0:
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(passed.items()))
        print(f"note: data {source!r}: passed over {counts}", file=sys.stderr)
    if empty and (len(seen) > before or not passed[AGAIN]):  # none, and none read before
        raise ValueError(f"data {source!r} is empty: no UTF-8 text file in the folder")


def _files(source: str, passed: Counter, seen: set) -> list[tuple[str, Path]]:
    """(name, path) of the files that may be documents, in the order of their names.

    Each real file and folder once: links are followed last. seen: see `read_text`; passed: counts
    what is left out, by kind.
    """
    root = Path(sysconfig.get_path("stdlib") if source == "stdlib" else source)
    if not source or not (root.is_file() or root.is_dir()):
        wanted = "'stdlib', a text file, a folder of text, or of shards (python data.py --help)"
        raise ValueError(f"data {source!r} does not exist: it must be {wanted}")
    for name, shards in ((PLAN, "unfinished token shards"), (MANIFEST, "token shards")):
        if (root / name).is_file():
            raise ValueError(f"data {source!r} is a folder of {shards}, not of text")
    found = [(False, root.name, root)] if root.is_file() else []
    folders = [] if found else [("", root)]
    links = []
    read = set()
    while folders or links:
        inside, folder = folders.pop() if folders else links.pop(0)
        for path in sorted(folder.iterdir()) if is_new(folder, read) else ():
            name = inside + path.name
            is_link = path.is_symlink()
            if source == "stdlib" and path.name in SKIPPED_FOLDERS:
                continue
            if source != "stdlib" and path.name.startswith("."):
                passed["hidden"] += 1
            elif path.is_dir():
                (links if is_link else folders).append((f"{name}/", path))
            elif not path.is_file():
                passed["neither file nor folder"] += 1
            elif source != "stdlib" or path.suffix == ".py":
                found.append((is_link, name, path))
    files = []
    for _, name, path in sorted(found):
        if is_new(path, seen):
            files.append((name, path))
        else:
            passed[AGAIN] += 1
    return sorted(files)


def is_new(path: Path, seen: set) -> bool:
    """Whether a file or folder is not in `seen` yet, whatever its name; it is afterwards."""
    status = path.stat()
    before = len(seen)
    seen.add((status.st_dev, status.st_ino))
    return len(seen) > before


def _contents(path: Path, field: str) -> Iterator[tuple[str, bytes | mmap.mmap]]:
    """("", text) of a file, or (":1", text), (":2", text), ... of its rows."""
    number = 0
    try:
        if path.name.lower().endswith((".jsonl", ".jsonl.gz", ".parquet")):
            number = 1
            for row in _rows(path, field):
                if text := row[field].encode():
                    yield f":{number}", text
                number += 1
        elif path.name.lower().endswith(".txt.gz"):
            with gzip.open(path) as file:
                yield "", file.read()
        elif path.stat().st_size:
            with mapped(path) as text:
                yield "", text
        else:
            yield "", b""
    except Exception as error:  # of the disk, of gzip, JSON, parquet
        lacking = isinstance(error, (KeyError, TypeError, AttributeError))
        what = f"has no text {field!r}" if lacking else "could not be read"
        where = f"row {number} " if number else ""
        raise ValueError(f"data '{path}': {where}{what} ({error!r})") from None


def _rows(path: Path, field: str) -> Iterator[dict]:
    if path.suffix.lower() == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise ValueError("parquet is read by pyarrow: pip install pyarrow") from None
        for part in parquet.ParquetFile(path).iter_batches(columns=[field]):
            yield from part.to_pylist()
        return
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        for line in filter(bytes.strip, file):
            yield parse_json(line)


def _why_not_text(data: bytes | mmap.mmap) -> str | None:
    if (nul := data.find(b"\0")) >= 0:
        return f"has a NUL byte at offset {nul}"
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = 2**24
    for i in range(0, len(data), size):
        block = data[i : i + size]
        try:
            decoder.decode(block, final=i + size >= len(data))
        except UnicodeDecodeError as error:
            kept = len(error.object) - len(block)  # the decoder kept the end of the block before
            at = i + error.start - kept
            return f"is not UTF-8 at offset {at} (byte 0x{data[at]:02x})"
    return None


@contextlib.contextmanager
def mapped(path: str | Path):
    """The contents of a file that is not empty, mapped into memory."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def shuffled(items: list) -> list:
    """The items in the order of a fixed seed: of documents, the first are held out."""
    return [items[i] for i in np.random.default_rng(0).permutation(len(items))]


def source_name(sources: list[str]) -> str:
    """What a corpus of these sources is called."""
    stdlib = f"Python {sys.version.split()[0]} standard library"
    names = [stdlib if source == "stdlib" else Path(source).name for source in sources]
    return " + ".join(names)


# --------------------------------------------------------------------------------------------------
# The held-out part


def n_held_out(sizes: list[int]) -> int:
    """How many of the first documents are held out: 5%, at least 1, no more bytes than needed."""
    wanted = max(1, round(HELD_OUT * len(sizes)))
    enough = 1 + int(np.searchsorted(np.cumsum(sizes), HELD_OUT_BYTES))
    return min(wanted, enough)


def held_out_start(text: bytes | mmap.mmap) -> int:
    """Where the held-out part of a single document begins: its last 5%, at a line start if near."""
    part = min(HELD_OUT, HELD_OUT_BYTES / len(text))
    return place_to_cut(text, int(len(text) * (1 - 2 * part)), int(len(text) * (1 - part)))


def place_to_cut(text: bytes | mmap.mmap, low: int, high: int) -> int:
    """After the last line end from low to high, else between the characters at high."""
    line_end = text.rfind(b"\n", low, high)
    if line_end >= 0:
        return line_end + 1
    while high > 0 and text[high] & 0xC0 == 0x80:  # inside a UTF-8 character
        high -= 1
    return high


# --------------------------------------------------------------------------------------------------
# Token streams


def join(texts: list[bytes], encoding: tiktoken.Encoding) -> np.ndarray:
    """One stream of tokens [N] with <|endoftext|> between the documents."""
    end = np.array([encoding.eot_token], dtype=dtype_of(encoding))
    pieces = []
    for text in texts:
        pieces += [end, encode(text, encoding)]
    return np.concatenate(pieces[1:])


class Shards:
    """Token arrays on the disk as one stream: len, and slices, which may reach across shards."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        i = int(np.searchsorted(self.ends, start, side="right"))
        pieces = []
        while start < stop:
            begin = int(self.ends[i]) - len(self.arrays[i])
            pieces.append(self.arrays[i][start - begin : stop - begin])
            start += len(pieces[-1])
            i += 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([self.arrays[0][:0], *pieces])


def open_shard(path: Path, dtype: type) -> np.ndarray:
    """The tokens of a shard, mapped into memory. ValueError where it is none, or not whole."""
    try:
        if not path.is_file():
            raise ValueError("no such file")
        # slices of a plain array cost less than those of a memmap
        array = np.load(path, mmap_mode="r").view(np.ndarray)
    except (OSError, ValueError, EOFError, AttributeError) as error:
        why = first_line(error)
        raise ValueError(f"{path.name} is missing, damaged or not whole ({why})") from None
    if array.dtype != dtype or array.ndim != 1:
        kind = f"{array.dtype}, {array.ndim} dimensions"
        raise ValueError(f"{path.name} must be {np.dtype(dtype)}, 1 dimension, got {kind}")
    return array


@dataclass(frozen=True)
class Corpus:
    """Two token streams and the text they come from. <|endoftext|> has a size of zero bytes."""

    name: str
    encoding: tiktoken.Encoding
    train: np.ndarray | Shards  # [N] uint16 or uint32
    val: np.ndarray  # [M], held out
    train_bytes: int
    val_bytes: int
    train_files: tuple[str, ...]
    val_files: tuple[str, ...]
    crc32: int | None = None  # of the data; None: computed from both streams

    def fingerprint(self) -> dict:
        """What identifies the data of a run: sizes and a checksum of both streams."""
        crc32 = self.crc32
        if crc32 is None:
            crc32 = zlib.crc32(self.val.tobytes(), zlib.crc32(self.train.tobytes()))
        sizes = {"train_tokens": len(self.train), "val_tokens": len(self.val)}
        return {"name": self.name, **sizes, "crc32": crc32}


def load_corpus(source: str = "stdlib", encoding: tiktoken.Encoding | None = None) -> Corpus:
    """The corpus of a source: as in `documents`, or a folder of shards, which stays on the disk.

    encoding: the run's; None: the shards' own, bytes for everything else. ValueError as in
    `documents`, and for shards that are unfinished, damaged or of another encoding than the run's.
    """
    if is_shards(source):
        corpus = _load_shards(Path(source), encoding)
        check_shards(source, "val")  # train: where it is trained on, it takes a while
        return corpus
    encoding = encoding or tokenizer()
    files = documents(source)
    if len(files) == 1:
        name, text = files[0]
        end = held_out_start(text)
        train = [(name, text[:end])]
        val = [(name, text[end:])]
    else:
        n = n_held_out([len(text) for _, text in files])
        train = files[n:]
        val = files[:n]
    return Corpus(
        name=source_name([source]),
        encoding=encoding,
        train=join([text for _, text in train], encoding),
        val=join([text for _, text in val], encoding),
        train_bytes=sum(len(text) for _, text in train),
        val_bytes=sum(len(text) for _, text in val),
        train_files=tuple(name for name, _ in train),
        val_files=tuple(name for name, _ in val),
    )


def is_shards(source: str) -> bool:
    return source != "stdlib" and (Path(source) / MANIFEST).is_file()


def _load_shards(folder: Path, encoding: tiktoken.Encoding | None) -> Corpus:
    with manifest_of(folder) as manifest:
        own = tokenizer(str(folder / TOKENIZER))
        if tokenizer_hash(own) != manifest["tokenizer"]["sha256"]:
            raise ValueError(f"{TOKENIZER} is not the tokenizer of the manifest")
        arrays = {"train": [], "val": []}
        files = {"train": [], "val": []}
        size = {"train": 0, "val": 0}
        seen = set()
        for shard in manifest["shards"]:
            name = shard["file"]
            path = folder / name
            if Path(name).name != name:
                raise ValueError(f"{name!r} must be the name of a file in the folder")
            array = open_shard(path, dtype_of(own))
            if len(array) != shard["tokens"]:
                raise ValueError(f"{name} does not have its {shard['tokens']:,} tokens")
            if not is_new(path, seen):
                raise ValueError(f"{name} is in the manifest twice")
            if not 0 <= shard.get("largest", 0) < own.n_vocab:
                most = f"the largest of {own.name!r} is {own.n_vocab - 1}"
                raise ValueError(f"{name} has the token {shard['largest']}, but {most}")
            arrays[shard["split"]].append(array)
            files[shard["split"]].append(name)
            size[shard["split"]] += shard["bytes"]
        for split, theirs in size.items():
            if not arrays[split] or (split == "val" and len(arrays[split]) > 1):
                count = f"{len(arrays[split])} {split} shards"
                raise ValueError(f"{MANIFEST} has {count}: one val and some train are needed")
            if type(theirs) is not int or manifest[split]["bytes"] != theirs or theirs < 0:
                counts = f"{manifest[split]['bytes']} bytes, its shards {theirs}"
                raise ValueError(f"{MANIFEST} is damaged ({split} has {counts})")
        if encoding and tokenizer_hash(encoding) != tokenizer_hash(own):
            wrong = f"tokens of {own.name!r}, but the tokenizer of the run is {encoding.name!r}"
            how = f"make shards with it (data.py ... --vocab RUN/{TOKENIZER}), or name a text"
            raise ValueError(f"holds {wrong}: {how}")
        checksums = "".join(shard["sha256"] for shard in manifest["shards"])
        return Corpus(
            name=manifest["source"]["name"],
            encoding=encoding or own,
            train=Shards(arrays["train"]),
            val=arrays["val"][0],
            train_bytes=size["train"],
            val_bytes=size["val"],
            train_files=tuple(files["train"]),
            val_files=tuple(files["val"]),
            crc32=zlib.crc32(checksums.encode()),
        )


@contextlib.contextmanager
def manifest_of(folder: Path, name: str = MANIFEST):
    """manifest.json, or the plan. Any error within is a ValueError that names the folder."""
    try:
        yield parse_json((folder / name).read_text())
    except (OSError, KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        own_message = type(error) is ValueError  # not that of a subclass, as of json
        why = str(error) if own_message else f"{name} is damaged ({error!r})"
        raise ValueError(f"data {str(folder)!r}: {why}") from None


def check_shards(source: str, *splits: str) -> int:
    """Compare the shards of "train" or "val" with their manifest -> their number.

    Several processes share the work. ValueError names a shard whose sha256 or number of bytes
    differs, or that has tokens out of the vocabulary.
    """
    folder = Path(source)
    encoding = tokenizer(str(folder / TOKENIZER))

    def check(shard):
        name = shard["file"]
        if sha256_of(folder / name) != shard["sha256"]:
            raise ValueError(f"{name} is not the file of the manifest: its sha256 differs")
        try:
            size = n_bytes(open_shard(folder / name, dtype_of(encoding)), encoding)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if size != shard["bytes"]:
            wrong = f"has {size:,} bytes of text, not the {shard['bytes']:,} of the manifest"
            raise ValueError(f"{name} {wrong}")

    with manifest_of(folder) as manifest, ThreadPoolExecutor() as pool:
        shards = [shard for shard in manifest["shards"] if shard["split"] in splits]
        list(pool.map(check, shards[rank() % world() :: world()]))
    return len(shards)


def sha256_of(path: Path) -> str:
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            checksum.update(block)
    return checksum.hexdigest()


# --------------------------------------------------------------------------------------------------
# Rows of a stream


def batch(
    tokens: np.ndarray | Shards, batch_size: int, seq_len: int, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A training batch (inputs, targets), int64 [batch_size, seq_len], by (seed, step) alone.

    Rows of an array begin anywhere. Shards are read in passes: rows lie side by side, and each
    comes once in a pass, in the pass's own order. ValueError where the data is too short for a row.
    """
    sizes = {"batch_size": (batch_size, 1), "seq_len": (seq_len, 1), "seed": (seed, 0)}
    for name, (value, least) in (sizes | {"step": (step, 0)}).items():
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if len(tokens) < 2:
        raise ValueError(f"training needs at least 2 tokens, got {len(tokens)}")
    if len(tokens) <= seq_len:
        wanted = f"from 1 to {len(tokens) - 1} for {len(tokens)} training tokens"
        raise ValueError(f"seq_len must be {wanted}, got {seq_len}")
    if isinstance(tokens, Shards):
        n = (len(tokens) - 1) // seq_len  # rows in a pass
        starts = []
        for row in range(step * batch_size, (step + 1) * batch_size):
            passes, place = divmod(row, n)
            starts.append(int(_order(n, seed, passes)[place]) * seq_len)
    else:
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(0, len(tokens) - seq_len, size=batch_size)
    rows = np.stack([tokens[i : i + seq_len + 1] for i in starts])  # [batch_size, seq_len + 1]
    rows = torch.from_numpy(rows.astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


@lru_cache(maxsize=2)
def _order(n: int, seed: int, passes: int) -> np.ndarray:
    """The rows 0 to n - 1 in the order of the pass that comes after that many passes."""
    return np.random.default_rng([seed, passes]).permutation(np.arange(n, dtype=np.uint32))


def windows(
    tokens: np.ndarray, batch_size: int, seq_len: int, start: int = 256
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Validation batches (inputs, targets), int64 [<= batch_size, <= seq_len], of all tokens once.

    The first token is predicted from `start` (<|endoftext|>), the first of a later window from the
    token before it.
    """
    targets = torch.from_numpy(tokens.astype(np.int64))
    inputs = torch.cat([torch.tensor([start]), targets[:-1]])
    end = len(targets) // seq_len * seq_len  # of the last window of full length
    if end:
        rows = (stream[:end].view(-1, seq_len).split(batch_size) for stream in (inputs, targets))
        yield from zip(*rows, strict=True)
    if end < len(targets):
        yield inputs[None, end:], targets[None, end:]
