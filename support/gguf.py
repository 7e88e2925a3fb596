"""GGUF, the one-file checkpoints of llama.cpp, read as what transformers writes to a folder.

    "GGUF", version | metadata: name, type, value | tensors: name, shape, type, offset | their data

`config` is config.json, `tokenizer` tokenizer.json, `weights` the safetensors, dequantised to
float32 by the package gguf. What a header says is believed once it is found to fit into the file,
so that reading takes no more memory than the weights do that are there.
"""

import math
import mmap
import re
import struct
from functools import cache
from pathlib import Path

import numpy as np
import torch

from support.vocabulary import DIGITS, PATTERN

# Of metadata, by number: a code of struct, text, or an array of one of the others.
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
TEXT = 8
ARRAY = 9
PLAIN = {0: np.dtype("<f4"), 1: np.dtype("<f2")}  # kinds of tensors that are not quantised

# The pre-tokenizers of tokenizer.json by their names in llama.cpp.
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_SPLIT = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
_LLAMA3 = [_SPLIT, _BYTES | {"use_regex": False}]
SPLITS = {"gpt-2": [_BYTES], "smollm": [DIGITS, _BYTES]}
SPLITS |= dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3)

# Their names in transformers: of the model, and behind the block's number.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def paired(w: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * width, d] of q or k as llama.cpp and we have them, from transformers' order.

    RoPE there rotates channels i and i + width / 2 of a head together, here neighbours.
    """
    return w.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halved(w: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `paired`."""
    return w.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def files(path: str | Path) -> list[Path]:
    """The GGUF file at a path, or those in its folder, in order of their names; [] for neither."""
    path = Path(path)
    if path.suffix == ".gguf":
        return [path]
    return sorted(path.glob("*.gguf"))


# --------------------------------------------------------------------------------------------------
# The header


class _Header:
    """What is read from the front of a file; ValueError where that ends too early."""

    def __init__(self, data):
        self.data = data
        self.at = 0

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise ValueError(f"its header needs {n} bytes at {self.at}, it has {len(self.data)}")
        self.at += n
        return self.data[self.at - n : self.at]

    def numbers(self, code: str, n: int) -> tuple:
        return struct.unpack(f"<{n}{code}", self.take(n * struct.calcsize(f"<{code}")))

    def number(self, code: str):
        return self.numbers(code, 1)[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self):
        kind = self.number("I")
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            kind = self.number("I")
            n = self.number("Q")
            if kind in NUMBERS:
                return list(self.numbers(NUMBERS[kind], n))
            if kind == TEXT:
                return [self.text() for _ in range(n)]
        raise ValueError(f"metadata must be numbers, texts or lists of these, got type {kind}")

    def named(self, n: int, read) -> dict:
        """{name: read()} of the next n entries."""
        found = {}
        for _ in range(n):
            name = self.text()
            if name in found:
                raise ValueError(f"{name} is there twice")
            found[name] = read()
        return found

    def tensor(self) -> tuple:
        """(shape as in torch, kind, offset in the data)."""
        shape = self.numbers("Q", self.number("I"))[::-1]
        return shape, self.number("I"), self.number("Q")


def _read(path: Path) -> tuple[dict, dict]:
    """(metadata, {tensor: (shape, kind, first byte in the file, bytes)}). ValueError for damage."""
    try:
        return _read_whole(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no whole GGUF file: {error}") from None


def _read_whole(path: Path) -> tuple[dict, dict]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        front = _Header(data)
        if front.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = front.number("I")
        if version not in (2, 3):
            raise ValueError(f"its version must be 2 or 3, little-endian, got {version}")
        n_tensors = front.number("Q")
        metadata = front.named(front.number("Q"), front.value)
        tensors = front.named(n_tensors, front.tensor)
        size = len(data)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment must be an integer of at least 1, got {alignment!r}")
    start = -(-front.at // alignment) * alignment
    end = start
    placed = {}
    for name, (shape, kind, offset) in sorted(tensors.items(), key=lambda item: item[1][2]):
        n, n_bytes = _block(kind)
        if math.prod(shape) < 1 or shape[-1:] and shape[-1] % n:
            raise ValueError(f"{name} must have rows of a multiple of {n} weights, got {shape}")
        n_bytes *= math.prod(shape) // n
        if start + offset < end:
            raise ValueError(f"{name} begins within the tensor before it")
        end = start + offset + n_bytes
        if end > size:
            raise ValueError(f"{name} must end at byte {end}, but the file has {size}")
        placed[name] = (shape, kind, start + offset, n_bytes)
    return metadata, placed


@cache
def _block(kind: int) -> tuple[int, int]:
    """(weights, bytes) of a block of a kind of tensor. ValueError for one that cannot be read."""
    if kind in PLAIN:
        return 1, PLAIN[kind].itemsize
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise ValueError("its quantised weights need gguf: pip install gguf") from None
    try:
        quantised = GGMLQuantizationType(kind)
    except ValueError:
        raise ValueError(f"tensors of type {kind} are unknown to gguf") from None
    n, n_bytes = GGML_QUANT_SIZES[quantised]
    try:
        dequantize(np.zeros((1, n_bytes), np.uint8), quantised)
    except NotImplementedError:
        raise ValueError(f"tensors of type {quantised.name} cannot be dequantised") from None
    return n, n_bytes


def header(path: str | Path) -> tuple[dict, dict]:
    """(metadata, {tensor: (shape, kind, first byte, bytes, file)}) of all files of a checkpoint.

    ValueError for what is damaged, in parts that are not all there, or not of the Llama family.
    """
    found = files(path)
    metadata = {}
    tensors = {}
    for file in found:
        own, placed = _read(file)
        metadata = own | metadata
        tensors |= {name: (*where, file) for name, where in placed.items()}
    parts = metadata.get("split.count") or 1
    if parts != len(found):
        hint = "name one of them" if parts == 1 else "name the folder of all its parts"
        raise ValueError(f"{path} must be {parts} GGUF files, got {len(found)}: {hint}")
    family = metadata.get("general.architecture")
    if family != "llama":
        raise ValueError(f"general.architecture of {path} must be 'llama', got {family!r}")
    return metadata, tensors


# --------------------------------------------------------------------------------------------------
# What transformers has in files of their own


def config(path: str | Path) -> dict:
    """What config.json would say. ValueError names a part that has no place here."""
    metadata, tensors = header(path)

    def get(name, default=None):
        return metadata.get(f"llama.{name}", default)

    if get("expert_count"):
        raise ValueError(f"llama.expert_count of {path} must be 0, got {get('expert_count')}")
    shape, *_ = tensors.get("token_embd.weight", ((),))
    sizes = {
        "vocab_size": shape[0] if shape else None,
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "intermediate_size": get("feed_forward_length"),
        "head_dim": get("attention.key_length") or get("rope.dimension_count"),
        "max_position_embeddings": get("context_length"),
    }
    factor = get("rope.scaling.factor", get("rope.scale_linear"))  # the latter in old files
    rope = {"rope_type": get("rope.scaling.type", "linear" if factor else "default")}
    rope["factor"] = factor
    if rope["rope_type"] == "none":
        rope["rope_type"] = "default"
    if "rope_freqs.weight" in tensors:  # each pair's frequency is divided by one of these
        factors = _dequantised(*tensors["rope_freqs.weight"]).tolist()
        rope = {"rope_type": "longrope", "long_factor": factors, "short_factor": factors}
        rope["attention_factor"] = 1.0
    return sizes | {
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": rope,
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    """{name in transformers: float32 tensor}; what has no such name keeps its own."""
    metadata, tensors = header(path)
    n_heads = metadata["llama.attention.head_count"]
    heads = {"attn_q": n_heads, "attn_k": metadata.get("llama.attention.head_count_kv", n_heads)}
    found = {}
    for name, where in tensors.items():
        if name == "rope_freqs.weight":  # `config` has it
            continue
        w = _dequantised(*where)
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if layer and layer[2] in PARTS:
            name = f"model.layers.{layer[1]}.{PARTS[layer[2]]}.weight"
            if layer[2] in heads:
                w = halved(w, heads[layer[2]])
        found[NAMES.get(name, name)] = w
    return found


def _dequantised(shape, kind, first, n_bytes, file) -> torch.Tensor:
    data = np.fromfile(file, np.uint8, n_bytes, offset=first)
    if kind in PLAIN:
        return torch.from_numpy(data.view(PLAIN[kind]).astype(np.float32).reshape(shape))
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = data.reshape(math.prod(shape[:-1]), -1)
    return torch.from_numpy(dequantize(rows, GGMLQuantizationType(kind)).reshape(shape))


def tokenizer(path: str | Path) -> tuple[dict, int]:
    """(what tokenizer.json would say, eos_token_id). ValueError for other than byte-level BPE."""
    metadata, _ = _read(Path(path))  # of several parts the first has it

    def get(name):
        return metadata.get(f"tokenizer.ggml.{name}")

    for name, legal in (("model", ["gpt2"]), ("pre", SPLITS)):
        if get(name) not in legal:
            wanted = f"one of {', '.join(legal)}"
            raise ValueError(f"tokenizer.ggml.{name} must be {wanted}, got {get(name)!r}")
    tokens = get("tokens")
    kinds = get("token_type") or [1] * len(tokens)
    added = []
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind != 1:  # not normal: of control, of the user, unused
            added.append({"id": i, "content": token})
    return {
        "model": {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": get("merges")},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": SPLITS[get("pre")]},
        "added_tokens": added,
    }, get("eos_token_id")
