"""Vocabularies: bytes, GPT-2's, byte-level BPE trained here or brought along by a Llama checkpoint.

All are a tiktoken.Encoding, and all give every byte back. tokenizer.json holds one: its pattern, its special tokens, and
its tokens in order of rank.
"""

import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import tiktoken

from support.checkpoint import atomic_write

END = "<|endoftext|>"
TOKENIZER = "tokenizer.json"
# What BPE never merges across: contractions, words with the space before them, up to three digits, punctuation, line ends,
# white space but for its last character. The split of GPT-4's vocabulary.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# ByteLevel shows a byte as the character of that number, or, where that is none to be seen, as the next free above 255.
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE = {chr(b): b for b in SEEN} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in SEEN)}


@cache
def tokenizer(name: str = "bytes") -> tiktoken.Encoding:
    """The encoding of that name. ValueError for one that is unknown, damaged or cannot be had.

    "bytes": the 256 single bytes and <|endoftext|> = 256. "gpt2": GPT-2's, which tiktoken downloads once. Else a
    tokenizer.json, of a folder of shards or of a run, or of a byte-level BPE of Hugging Face's, as Llama 3's.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            name="bytes",
            pat_str=r"[\s\S]",  # one character a piece: tiktoken's merge loop has nothing to search
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={END: 256},
            explicit_n_vocab=257,
        )
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # of requests, of the disk, of a checksum
            raise ValueError(f"tokenizer 'gpt2' could not be downloaded ({type(error).__name__})") from None
    if not name.endswith(".json"):
        raise ValueError(f"unknown tokenizer {name!r}: legal is 'bytes', 'gpt2' or a tokenizer.json of shards or of a run")
    try:
        saved = json.loads(Path(name).read_text(encoding="utf-8"))
        if "model" in saved:
            return _hugging_face(name, saved)
        ranks = {base64.b64decode(token, validate=True): rank for rank, token in enumerate(saved["tokens"]) if token}
        special = saved["special_tokens"]
        n_vocab = len(ranks) + len(special)
        encoding = tiktoken.Encoding(
            saved["name"], pat_str=saved["pattern"], mergeable_ranks=ranks, special_tokens=special, explicit_n_vocab=n_vocab
        )
    except FileNotFoundError:
        raise ValueError(f"tokenizer {name!r} does not exist") from None
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"tokenizer {name!r} is damaged ({error!r})") from None
    return encoding


def _hugging_face(path: str, kept: dict) -> tiktoken.Encoding:
    """A byte-level BPE in Hugging Face's tokenizer.json (as of Llama 3 or GPT-2) as tiktoken's. The eos_token_id of the
    config.json beside it is <|endoftext|>. ValueError names the part that has no place here."""
    try:
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
    order = [vocab["".join(m.split(" ") if isinstance(m, str) else m)] for m in merges]
    if order != sorted(order):
        raise ValueError(f"{path} has merges in another order than its symbols")
    eos = eos[0] if isinstance(eos, list) else eos
    special = {content: i for i, content in added.items() if i != eos} | {END: eos}
    ranks = {bytes(map(BYTE.get, piece)): i for piece, i in vocab.items() if i not in added}
    return tiktoken.Encoding(path, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def tokenizer_text(encoding: tiktoken.Encoding) -> str:
    """The contents of tokenizer.json: all that the encoding is."""
    what = {"name": encoding.name, "pattern": encoding._pat_str, "special_tokens": encoding._special_tokens}
    token = {rank: base64.b64encode(token).decode() for token, rank in encoding._mergeable_ranks.items()}
    tokens = [token.get(rank, "") for rank in range(max(token) + 1)]  # special ones may stand between them
    return json.dumps(what | {"tokens": tokens}, indent=0) + "\n"


def save_tokenizer(encoding: tiktoken.Encoding, folder: Path) -> None:
    """Write tokenizer.json into a folder, for `tokenizer` to read."""
    atomic_write(folder / TOKENIZER, lambda beside: beside.write_text(tokenizer_text(encoding), encoding="utf-8"))


def tokenizer_of(folder: str | Path, name: str) -> str:
    """What `tokenizer` knows the tokenizer of a run by: its own tokenizer.json, or, where it has none, its name."""
    path = Path(folder) / TOKENIZER
    return str(path) if path.is_file() else name


@lru_cache(maxsize=8)
def tokenizer_hash(encoding: tiktoken.Encoding) -> str:
    """sha256 of what the encoding does; its name does not count."""
    what = json.loads(tokenizer_text(encoding)) | {"name": None}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def train_tokenizer(texts: Iterator[bytes], n_vocab: int) -> tiktoken.Encoding:
    """Byte-level BPE of n_vocab symbols, <|endoftext|> the last: trained by Hugging Face's tokenizers, read by tiktoken.

    Symbols 0 to 255 are the bytes, the others follow in the order of their merges. The same texts give the same symbols.
    ValueError where the library is missing, or the text has fewer pairs that occur twice than n_vocab needs.
    """
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError("training a vocabulary needs tokenizers: pip install tokenizers") from None
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), bytewise])
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - 1, min_frequency=2, initial_alphabet=bytewise.alphabet(), show_progress=sys.stderr.isatty()
    )
    model.train_from_iterator((text.decode("utf-8", errors="replace") for text in texts), trainer)
    vocabulary = model.get_vocab()
    tokens = [bytes(map(BYTE.get, token)) for token in sorted(vocabulary, key=vocabulary.get)]
    tokens = [bytes([b]) for b in range(256)] + [token for token in tokens if len(token) > 1]
    if len(tokens) < n_vocab - 1:
        raise ValueError(f"vocab {n_vocab} is more than the text gives: legal is 258 to {len(tokens) + 1}")
    checksum = hashlib.sha256(b"".join(len(token).to_bytes(4, "big") + token for token in tokens)).hexdigest()
    return tiktoken.Encoding(
        f"bpe-{n_vocab}-{checksum[:8]}", pat_str=PATTERN, mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={END: n_vocab - 1}, explicit_n_vocab=n_vocab,
    )  # fmt: skip


def kind_of(encoding: tiktoken.Encoding) -> type:
    """What a token id is stored as."""
    return np.uint16 if encoding.n_vocab <= 2**16 else np.uint32


def encode(text: bytes, encoding: tiktoken.Encoding) -> np.ndarray:
    """Token ids of any bytes (uint16, uint32 for more than 65,536 symbols; [tokens]), which decode to the same bytes.

    An "<|endoftext|>" written in the text is ordinary text. Bytes that are no UTF-8 are tokens of their own, one each.
    """
    if encoding.name == "bytes":
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)  # the same ids, without a loop over characters
    pieces, kind = [], kind_of(encoding)
    for i, piece in enumerate(re.split("([\udc80-\udcff]+)", text.decode("utf-8", errors="surrogateescape"))):
        if i % 2:
            ids = [encoding.encode_single_token(bytes([ord(c) & 0xFF])) for c in piece]
            pieces.append(np.array(ids, dtype=kind))
        else:
            pieces += (ids.astype(kind) for ids in _encode(piece, encoding))
    return np.concatenate(pieces)


def _encode(text: str, encoding: tiktoken.Encoding) -> list[np.ndarray]:
    try:
        return [encoding.encode_to_numpy(text, disallowed_special=())]
    except ValueError:  # the pattern needs a stack as deep as a run of white space is long: cut that
        if len(text) < 2**10:
            raise
        half = len(text) // 2
        return _encode(text[:half], encoding) + _encode(text[half:], encoding)


@lru_cache(maxsize=8)
def _token_lengths(encoding: tiktoken.Encoding) -> np.ndarray:
    """Bytes of every token [n_vocab]; special tokens stand for none."""
    lengths = np.zeros(encoding.n_vocab, dtype=np.int64)
    for token, rank in encoding._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


def n_bytes(tokens: np.ndarray, encoding: tiktoken.Encoding) -> int:
    """How many bytes of text the tokens stand for; special tokens stand for none."""
    lengths = _token_lengths(encoding)  # in blocks: a shard is larger than its index in int64 should be
    return sum(int(lengths[tokens[i : i + 2**22]].sum()) for i in range(0, len(tokens), 2**22))
