"""Text in, token arrays out: corpora, the byte-level tokenizer, training batches, validation windows.

    python data.py                  # what the embedded corpus is: this Python's own standard library source
    python data.py notes.txt        # the same for a text file, or for a folder of text files

A corpus is two token streams. The held-out one is 5% of the *files*, so nothing of a held-out file is ever trained on;
a single file gives its last 5% (cut at a line end). Documents are joined with <|endoftext|> between them:

    train:  doc_7 <|endoftext|> doc_2 <|endoftext|> doc_9 ...        val:  doc_4 <|endoftext|> doc_1 ...

Training batches are rows cut at random places, a function of (seed, step) and nothing else: a resumed run sees the same
data. Validation windows lie side by side and score every held-out token exactly once, so that

    bits per byte = (sum of nats) / ln 2 / (true number of bytes)

compares models whatever their tokenizer; <|endoftext|> is a predicted token of zero bytes.
"""

import json
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import tiktoken
import torch

HELD_OUT = 0.05  # fraction of the files (of the bytes, for a single file)
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Two token streams (uint16) and the text they come from. Sizes in bytes leave out the <|endoftext|> tokens."""

    name: str
    train: np.ndarray  # [tokens]
    val: np.ndarray  # [tokens], held out
    train_bytes: int
    val_bytes: int
    train_files: tuple[str, ...]
    val_files: tuple[str, ...]

    def fingerprint(self) -> dict:
        """What identifies the data of a run: sizes and a checksum of both streams."""
        return {
            "name": self.name,
            "train_tokens": len(self.train),
            "val_tokens": len(self.val),
            "crc32": zlib.crc32(self.val.tobytes(), zlib.crc32(self.train.tobytes())),
        }


@cache
def tokenizer(name: str = "bytes") -> tiktoken.Encoding:
    """The encoding of that name: "bytes" is the 256 single bytes and <|endoftext|> = 256; or the path of a tokenizer.json."""
    if name.endswith("tokenizer.json"):
        return byte_level_bpe(name)
    if name != "bytes":
        raise ValueError(f"unknown tokenizer {name!r}: legal is 'bytes', or the path of a tokenizer.json")
    return tiktoken.Encoding(
        name="bytes",
        pat_str=r"[\s\S]",  # one character a piece: tiktoken's merge loop has nothing to search
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
        explicit_n_vocab=257,
    )


GPT2_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def byte_level_bpe(path: str) -> tiktoken.Encoding:
    """A byte-level BPE in Hugging Face's tokenizer.json (as of Llama 3 or GPT-2) as tiktoken's. The eos_token_id of the
    config.json beside it is <|endoftext|>. ValueError names the part that has no place here."""
    try:
        kept = json.loads(Path(path).read_text())
        eos = json.loads(Path(path).with_name("config.json").read_text())["eos_token_id"]
        vocab, merges, split = kept["model"]["vocab"], kept["model"]["merges"], kept["pre_tokenizer"]
        added = {token["id"]: token["content"] for token in kept["added_tokens"]}
        *first, last = split["pretokenizers"] if split["type"] == "Sequence" else [split]
        pattern = GPT2_SPLIT if not first else first[0]["pattern"]["Regex"]
        fits = len(first) == (not last.get("use_regex", True)) and all(f["behavior"] == "Isolated" for f in first)
        fits = fits and last["type"] == "ByteLevel" and not last["add_prefix_space"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no tokenizer of byte-level BPE: {error!r}") from None
    if kept.get("normalizer") or not fits:
        part = "normalizer" if kept.get("normalizer") else "pre_tokenizer"
        raise ValueError(f"{path} has a {part} that has no place here: {json.dumps(kept[part])[:80]}")
    # Its bytes are written as printable characters: themselves, or if they are not printable, 256, 257, ... in order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(b): b for b in printable}
    byte_of |= {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(printable)))}
    order = [vocab["".join(m.split(" ") if isinstance(m, str) else m)] for m in merges]
    size = max(max(vocab.values()), *added) + 1
    if order != sorted(order) or size > 2**16:
        why = f"{size} symbols, more than 65,536" if size > 2**16 else "merges in another order than its symbols"
        raise ValueError(f"{path} has {why}")
    eos = eos[0] if isinstance(eos, list) else eos
    special = {content: i for i, content in added.items() if i != eos} | {"<|endoftext|>": eos}
    ranks = {bytes(byte_of[c] for c in piece): i for piece, i in vocab.items() if i not in added}
    return tiktoken.Encoding(name=path, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def encode(text: bytes, encoding: tiktoken.Encoding) -> np.ndarray:
    """Token ids of a text (uint16 [tokens]); an "<|endoftext|>" written in the text is ordinary text."""
    if encoding.name == "bytes":
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)  # the same ids, without a loop over characters
    return np.array(encoding.encode_ordinary(text.decode("utf-8")), dtype=np.uint16)


def n_bytes(tokens: np.ndarray, encoding: tiktoken.Encoding) -> int:
    """How many bytes of text the tokens stand for; special tokens stand for none."""
    if encoding.name == "bytes":
        return int(np.count_nonzero(tokens < 256))
    special = {encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    counts = np.bincount(tokens)
    return sum(
        int(count) * len(encoding.decode_single_token_bytes(i))
        for i, count in enumerate(counts)
        if count and i not in special
    )


def _why_not_text(data: bytes) -> str | None:
    if b"\0" in data:
        return f"has a NUL byte at offset {data.index(0)}"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"is not UTF-8 at offset {error.start} (byte 0x{data[error.start]:02x})"
    return None


def documents(source: str = "stdlib") -> list[tuple[str, bytes]]:
    """(name, text) of every document of a source, shuffled by a fixed seed: "stdlib", a text file, or a folder.

    Of a folder, every non-empty UTF-8 file counts; hidden and binary files are passed over. ValueError names what is
    missing, empty or binary.
    """
    root = Path(sysconfig.get_path("stdlib") if source == "stdlib" else source)
    if root.is_file():
        data = root.read_bytes()
        if not data:
            raise ValueError(f"data {source!r} is empty: text is needed")
        if why := _why_not_text(data):
            raise ValueError(f"data {source!r} {why}: only UTF-8 text is read")
        return [(root.name, data)]
    if not root.is_dir():
        raise ValueError(f"data {source!r} does not exist: legal are 'stdlib', a text file, a folder of text files")
    found = []
    for path in sorted(root.rglob("*.py" if source == "stdlib" else "*"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        skipped = SKIPPED_FOLDERS & set(parts[:-1]) if source == "stdlib" else any(p.startswith(".") for p in parts)
        if skipped or not path.is_file():
            continue
        data = path.read_bytes()
        if data and _why_not_text(data) is None:
            found.append(("/".join(parts), data))
    if not found:
        raise ValueError(f"data {source!r} ({root}) is empty: no UTF-8 text file in the folder")
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def join(texts: list[bytes], encoding: tiktoken.Encoding) -> np.ndarray:
    """One stream of tokens (uint16 [tokens]) with <|endoftext|> between the documents."""
    end = np.array([encoding.eot_token], dtype=np.uint16)
    pieces = [piece for text in texts for piece in (end, encode(text, encoding))]
    return np.concatenate(pieces[1:])


def _cut(data: bytes) -> int:
    """Where the held-out part of a single file begins: a line end just before the last 5%, if one is near."""
    mark = int(len(data) * (1 - HELD_OUT))
    line_end = data.rfind(b"\n", int(len(data) * (1 - 2 * HELD_OUT)), mark)
    if line_end >= 0:
        return line_end + 1
    while mark > 0 and data[mark] & 0xC0 == 0x80:  # inside a UTF-8 character
        mark -= 1
    return mark


def load_corpus(source: str = "stdlib", encoding: tiktoken.Encoding | None = None) -> Corpus:
    """The corpus of a source: "stdlib", a text file or a folder. ValueError as in `documents`."""
    encoding = encoding or tokenizer()
    files = documents(source)
    if len(files) == 1:
        (name, data), cut = files[0], _cut(files[0][1])
        train, val = [(name, data[:cut])], [(name, data[cut:])]
    else:
        held_out = max(1, round(HELD_OUT * len(files)))
        train, val = files[held_out:], files[:held_out]
    return Corpus(
        name=f"Python {sys.version.split()[0]} standard library" if source == "stdlib" else Path(source).name,
        train=join([text for _, text in train], encoding),
        val=join([text for _, text in val], encoding),
        train_bytes=sum(len(text) for _, text in train),
        val_bytes=sum(len(text) for _, text in val),
        train_files=tuple(name for name, _ in train),
        val_files=tuple(name for name, _ in val),
    )


def batch(tokens: np.ndarray, batch_size: int, seq_len: int, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets), int64 [batch_size, seq_len] each, drawn by (seed, step) alone. ValueError if data is short."""
    if len(tokens) <= seq_len:
        legal = f"1 to {len(tokens) - 1}" if len(tokens) > 1 else "none, it needs at least 2 tokens"
        raise ValueError(f"seq_len {seq_len} is too long for {len(tokens)} training tokens: legal is {legal}")
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - seq_len, size=batch_size)
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


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


def main(source: str = "stdlib") -> None:
    encoding = tokenizer()
    corpus = load_corpus(source, encoding)
    print(f"{corpus.name}, tokenizer {encoding.name!r} ({encoding.n_vocab} symbols)")
    parts = (("train", corpus.train, corpus.train_bytes, corpus.train_files),
             ("held out", corpus.val, corpus.val_bytes, corpus.val_files))  # fmt: skip
    for part, tokens, size, files in parts:
        shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        print(f"{part:>9}: {len(files):,} files, {size:,} bytes, {len(tokens):,} tokens ({shown})")
    inputs, _ = batch(corpus.train, 3, min(240, len(corpus.train) - 1), seed=0, step=0)
    print("\na batch of 3 rows, seed 0, step 0:")
    for row in inputs:
        print("-" * 80 + "\n" + encoding.decode(row.tolist()))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except (ValueError, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(2)
