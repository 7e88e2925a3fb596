"""Reading text: corpora, token shards, training batches, validation windows."""

import codecs
import contextlib
import json
import mmap
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
import torch

from support.checkpoint import first_line
from support.vocabulary import TOKENIZER, encode, kind_of, tokenizer, tokenizer_hash

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
