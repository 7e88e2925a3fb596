"""Vocabularies: bytes, GPT-2's, and byte-level BPE, trained here or that of a Llama checkpoint.

    encoding = tokenizer("bytes")               # or "gpt2", or the path of a tokenizer.json
    ids = encode(b"any bytes", encoding)        # [tokens] uint16
    encoding.decode_bytes(ids.tolist())         # the same bytes again

All are a tiktoken.Encoding. A tokenizer.json holds one: its name, its pattern, its special tokens
and all other tokens (base64) in order of rank. Hugging Face's format is read, too, and a GGUF file.
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

from support.checkpoint import atomic_write, parse_json

END = "<|endoftext|>"
UNKNOWN = "\ufffd".encode()
TOKENIZER = "tokenizer.json"
# What BPE never merges across: contractions, words with the space before them, up to three digits,
# punctuation, line ends, white space but for its last character.
PATTERN = (  # deviation 42: GPT-4's split
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Where digits stand alone first, which Hugging Face has as a step of its own, as in SmolLM.
DIGITS = {"type": "Digits", "individual_digits": True}
DIGITS_SPLIT = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)
# Hugging Face's ByteLevel writes a byte as the character of that number where that is printable,
# else as the next character from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}
# Characters of every kind, each beside a space: what a pattern drops, it drops of these.
PROBE = " ".join(chr(i) for i in [*range(0x3100), *range(0x3100, 0xD800, 97), 0xFFFD, 0x1F642])


# --------------------------------------------------------------------------------------------------
# Reading one


@cache
def tokenizer(name: str = "bytes") -> tiktoken.Encoding:
    """The encoding of that name. ValueError for one that is unknown, damaged or not to be had.

    "bytes": the 256 bytes, and <|endoftext|> = 256. "gpt2": GPT-2's, which tiktoken downloads once.
    Else the path of a tokenizer.json, of shards, of a run, or of a Llama checkpoint, or of a GGUF
    file.
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
            why = type(error).__name__
            raise ValueError(f"tokenizer 'gpt2' could not be downloaded ({why})") from None
    if not (isinstance(name, str) and name.endswith((".json", ".gguf"))):
        wanted = "'bytes', 'gpt2' or a tokenizer.json of shards or of a run"
        raise ValueError(f"tokenizer must be {wanted}, got {name!r}")
    try:
        if not Path(name).is_file():  # a named pipe would wait for ever
            raise FileNotFoundError
        if name.endswith(".gguf"):
            from support import gguf

            return _checked(_hugging_face(name, *gguf.tokenizer(name)))
        saved = parse_json(Path(name).read_text(encoding="utf-8"))
        if "model" not in saved:
            return _checked(_saved(saved))
        eos = parse_json(Path(name).with_name("config.json").read_text())["eos_token_id"]
        return _checked(_hugging_face(name, saved, eos[0] if isinstance(eos, list) else eos))
    except FileNotFoundError:
        raise ValueError(f"tokenizer {name!r} does not exist, or is no file") from None
    except Exception as error:  # of a dozen kinds
        raise ValueError(f"tokenizer {name!r} is damaged ({error!r})") from None


def _checked(encoding: tiktoken.Encoding) -> tiktoken.Encoding:
    """An encoding of all text. ValueError for one that lacks U+FFFD or drops characters."""
    lacking = _lacking(encoding)
    if not set(lacking).isdisjoint(UNKNOWN):
        raise ValueError(f"it has no token for {len(lacking)} of the 256 bytes, as {lacking[0]}")
    encode(PROBE.encode(), encoding)
    return encoding


def _saved(saved: dict) -> tiktoken.Encoding:
    """The encoding that `tokenizer_text` wrote."""
    tokens = {rank: token for rank, token in enumerate(saved["tokens"]) if token}
    ranks = {base64.b64decode(token, validate=True): rank for rank, token in tokens.items()}
    special = saved["special_tokens"]
    return tiktoken.Encoding(
        saved["name"],
        pat_str=saved["pattern"],
        mergeable_ranks=ranks,
        special_tokens=special,
        explicit_n_vocab=len(ranks) + len(special),
    )


def _hugging_face(path: str, saved: dict, eos: int) -> tiktoken.Encoding:
    """A byte-level BPE in Hugging Face's format, as of Llama 3 or GPT-2.

    eos, the eos_token_id of its config.json, is <|endoftext|>; another token of that name is called
    by its number. ValueError names the part that is not supported.
    """
    try:
        vocab = saved["model"]["vocab"]
        merges = saved["model"]["merges"]
        split = saved["pre_tokenizer"]
        added = {token["id"]: token["content"] for token in saved["added_tokens"]}
        # either ByteLevel with its own split, GPT-2's, or one split and a ByteLevel without
        *first, last = split["pretokenizers"] if split["type"] == "Sequence" else [split]
        pattern = GPT2_SPLIT
        if first == [DIGITS]:
            pattern = DIGITS_SPLIT
            first = []
        elif first:
            pattern = first[0]["pattern"]["Regex"]
        fits = len(first) == (not last.get("use_regex", True))
        fits = fits and all(step["behavior"] == "Isolated" for step in first)
        fits = fits and last["type"] == "ByteLevel" and not last["add_prefix_space"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no tokenizer of byte-level BPE: {error!r}") from None
    if saved.get("normalizer") or not fits:
        part = "normalizer" if saved.get("normalizer") else "pre_tokenizer"
        found = json.dumps(saved[part])[:80]
        raise ValueError(f"{path} has a {part} that has no place here: {found}")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    order = [vocab["".join(pair)] for pair in pairs]
    if order != sorted(order):  # tiktoken merges in the order of ranks
        raise ValueError(f"{path} has merges in another order than its symbols")
    special = {END: eos}
    for i, content in added.items():
        if i != eos:
            special[f"<|{i}|>" if content == END else content] = i
    ranks = {bytes(map(BYTE.get, piece)): i for piece, i in vocab.items() if i not in added}
    return tiktoken.Encoding(path, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


# --------------------------------------------------------------------------------------------------
# Text to tokens


def dtype_of(encoding: tiktoken.Encoding) -> type:
    """What a token id is stored as."""
    return np.uint16 if encoding.n_vocab <= 2**16 else np.uint32


def encode(text: bytes, encoding: tiktoken.Encoding) -> np.ndarray:
    """Token ids [tokens] (`dtype_of`) of any bytes, which decode to the same bytes.

    An "<|endoftext|>" written in the text is ordinary text. Each byte that is no UTF-8 is a token.
    One that a vocabulary lacks, as SmolLM's does some control characters, is read as U+FFFD.
    ValueError where the tokenizer's pattern drops some of the text.
    """
    if encoding.name == "bytes":  # the same ids, without a loop over characters
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    if lacking := _lacking(encoding):  # tiktoken would panic
        text = re.sub(b"[" + re.escape(lacking) + b"]", UNKNOWN, text)
    ids = []
    parts = re.split("([\udc80-\udcff]+)", text.decode("utf-8", errors="surrogateescape"))
    for i, part in enumerate(parts):
        if i % 2:  # what the split is at: bytes that are no UTF-8, as lone surrogates
            ids.append([encoding.encode_single_token(bytes([ord(c) & 0xFF])) for c in part])
        else:
            ids += _encode(part, encoding)
    ids = np.concatenate([np.asarray(some, dtype=dtype_of(encoding)) for some in ids])
    dropped = len(text) - n_bytes(ids, encoding)
    if dropped:
        raise ValueError(f"tokenizer {encoding.name!r}: its pattern drops {dropped} bytes of text")
    return ids


@lru_cache(maxsize=8)
def _lacking(encoding: tiktoken.Encoding) -> bytes:
    """The bytes that are no tokens."""
    return bytes(b for b in range(256) if bytes([b]) not in encoding._mergeable_ranks)


def _encode(text: str, encoding: tiktoken.Encoding) -> list[np.ndarray]:
    try:
        return [encoding.encode_to_numpy(text, disallowed_special=())]
    except ValueError:  # the regex needs a stack as deep as a run of white space is long: halve it
        if len(text) < 2**10:
            raise
        half = len(text) // 2
        return _encode(text[:half], encoding) + _encode(text[half:], encoding)


def blocks(tokens: np.ndarray, size: int = 2**22) -> Iterator[np.ndarray]:
    """A shard in parts: what is computed for every token takes up to eight bytes for each."""
    return (tokens[i : i + size] for i in range(0, len(tokens), size))


def n_bytes(tokens: np.ndarray, encoding: tiktoken.Encoding) -> int:
    """How many bytes of text the tokens [N] stand for; special tokens stand for none.

    ValueError for a token that is not in the vocabulary.
    """
    lengths = _token_lengths(encoding)
    try:
        return sum(int(lengths[block].sum()) for block in blocks(tokens))
    except IndexError:
        legal = f"from 0 to {len(lengths) - 1}, the vocabulary of {encoding.name!r}"
        raise ValueError(f"tokens must be {legal}, got {int(tokens.max())}") from None


@lru_cache(maxsize=8)
def _token_lengths(encoding: tiktoken.Encoding) -> np.ndarray:
    """Bytes of every token [n_vocab]."""
    lengths = np.zeros(encoding.n_vocab, dtype=np.int64)
    for token, rank in encoding._mergeable_ranks.items():
        lengths[rank] = len(token)
    return lengths


# --------------------------------------------------------------------------------------------------
# Training and keeping one


def train_tokenizer(texts: Iterator[bytes], n_vocab: int) -> tiktoken.Encoding:
    """Byte-level BPE of n_vocab symbols, trained by Hugging Face's tokenizers, read by tiktoken.

    Symbols 0 to 255 are the bytes, then come the merges in their order, last <|endoftext|>. The
    same texts give the same symbols. ValueError where the library is missing, or the text has fewer
    pairs that occur twice than n_vocab needs.
    """
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError("training a vocabulary needs tokenizers: pip install tokenizers") from None
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - 1,
        min_frequency=2,
        initial_alphabet=bytewise.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    model.train_from_iterator((text.decode("utf-8", errors="replace") for text in texts), trainer)
    vocab = model.get_vocab()
    learned = [bytes(map(BYTE.get, token)) for token in sorted(vocab, key=vocab.get)]
    tokens = [bytes([b]) for b in range(256)] + [token for token in learned if len(token) > 1]
    if len(tokens) < n_vocab - 1:
        most = len(tokens) + 1
        raise ValueError(f"vocab must be from 258 to {most}, all this text gives, got {n_vocab}")
    sized = b"".join(len(token).to_bytes(4, "big") + token for token in tokens)
    return tiktoken.Encoding(
        f"bpe-{n_vocab}-{hashlib.sha256(sized).hexdigest()[:8]}",
        pat_str=PATTERN,
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={END: n_vocab - 1},
        explicit_n_vocab=n_vocab,
    )


def tokenizer_text(encoding: tiktoken.Encoding) -> str:
    """The contents of tokenizer.json: all that the encoding is."""
    ranks = encoding._mergeable_ranks
    token = {rank: base64.b64encode(token).decode() for token, rank in ranks.items()}
    content = {
        "name": encoding.name,
        "pattern": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "tokens": [token.get(rank, "") for rank in range(max(token) + 1)],  # "": a special one
    }
    return json.dumps(content, indent=0) + "\n"


def hugging_face(encoding: tiktoken.Encoding) -> dict:
    """The same in Hugging Face's format, which `tokenizer` and transformers read."""
    character = {byte: char for char, byte in BYTE.items()}

    def text(token):
        return "".join(map(character.get, token))

    ranks = encoding._mergeable_ranks
    merges = []
    for token in sorted(ranks, key=ranks.get):
        for i in range(1, len(token)):  # tiktoken joins any two tokens that make a third
            pair = token[:i], token[i:]
            if ranks.keys() >= set(pair):
                merges.append([*map(text, pair)])
    added = []
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for content, i in sorted(encoding._special_tokens.items(), key=lambda item: item[1]):
        added.append({"id": i, "content": content, **plain, "special": True})
    split = {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated"}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [split | {"invert": False}, bytewise | {"use_regex": False}]
    vocab = {text(token): i for token, i in ranks.items()} | encoding._special_tokens
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": bytewise | {"use_regex": True},
        "model": model,
    }


@lru_cache(maxsize=8)
def tokenizer_hash(encoding: tiktoken.Encoding) -> str:
    """sha256 of what the encoding does; its name does not count."""
    content = json.loads(tokenizer_text(encoding)) | {"name": None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_tokenizer(encoding: tiktoken.Encoding, folder: Path) -> None:
    """Write tokenizer.json into a folder, for `tokenizer` to read."""
    text = tokenizer_text(encoding)
    atomic_write(folder / TOKENIZER, lambda beside: beside.write_text(text, encoding="utf-8"))


def tokenizer_of(folder: str | Path, name: str) -> str:
    """What `tokenizer` finds that of a run by: its own tokenizer.json, or else its name."""
    path = Path(folder) / TOKENIZER
    return str(path) if path.is_file() else name
