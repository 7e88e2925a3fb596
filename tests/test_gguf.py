"""GGUF files: weights, RoPE and tokenizer as the same checkpoint in transformers' format gives."""

import struct
import sys

import numpy as np
import pytest
import torch

from support import gguf
from support.config import TrainConfig
from support.pretrained import from_pretrained, tokenizer_path
from support.run import Run
from support.vocabulary import BYTE, encode, tokenizer
from train import train

ALL_BYTES = [*BYTE]  # the characters that stand for the 256 bytes
WIDTHS = {"d": 64, "hidden": 96, "heads": 4, "groups": 2, "layers": 2}
F32 = 0
F16 = 1
MERGES = ["h e", "l l", "he ll", "hell o"]
TOKENS = ["<|end|>", "<|endoftext|>", *ALL_BYTES, *(merge.replace(" ", "") for merge in MERGES)]
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": WIDTHS["layers"],
    "llama.context_length": 128,
    "llama.embedding_length": WIDTHS["d"],
    "llama.feed_forward_length": WIDTHS["hidden"],
    "llama.attention.head_count": WIDTHS["heads"],
    "llama.attention.head_count_kv": WIDTHS["groups"],
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.eos_token_id": 0,
}


def text(s):
    s = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(s)) + s


def value(v):
    if isinstance(v, list):
        kind, _ = value(v[0])
        return 9, struct.pack("<IQ", kind, len(v)) + b"".join(value(one)[1] for one in v)
    if isinstance(v, str):
        return 8, text(v)
    return (4, struct.pack("<I", v)) if isinstance(v, int) else (6, struct.pack("<f", v))


def packed(metadata, tensors, version=3, counts=None):
    """The bytes of a file; tensors {name: (shape, kind, bytes)}. A writer of its own, an oracle."""
    out = [b"GGUF", struct.pack("<IQQ", version, *(counts or (len(tensors), len(metadata))))]
    for name, v in metadata.items():
        kind, content = value(v)
        out += [text(name), struct.pack("<I", kind), content]
    data = b""
    for name, (shape, kind, content) in tensors.items():
        out += [text(name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])]
        out.append(struct.pack("<IQ", kind, len(data)))
        data += content + bytes(-len(content) % 32)
    front = b"".join(out)
    return front + bytes(-len(front) % 32) + data


def llama_weights(seed=0):
    """{name in llama.cpp: float32 array} of a small model, its embedding tied."""
    d, hidden, heads, groups, layers = WIDTHS.values()
    random = np.random.default_rng(seed)
    narrow = d // heads * groups
    shapes = {"token_embd": (len(TOKENS), d), "output_norm": (d,)}
    for i in range(layers):
        own = {"attn_norm": (d,), "ffn_norm": (d,), "attn_q": (d, d), "attn_k": (narrow, d)}
        own |= {"attn_v": (narrow, d), "attn_output": (d, d), "ffn_gate": (hidden, d)}
        own |= {"ffn_up": (hidden, d), "ffn_down": (d, hidden)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in own.items()}
    made = {}
    for name, shape in shapes.items():
        made[f"{name}.weight"] = random.normal(0, 0.2, shape).astype(np.float32)
    return made


def tensors(weights, kind=F32):
    dtype = {F32: "<f4", F16: "<f2"}[kind]
    return {name: (w.shape, kind, w.astype(dtype).tobytes()) for name, w in weights.items()}


def write(path, metadata=None, made=None, **changes):
    own = METADATA | (metadata or {})
    own = {name: v for name, v in own.items() if v is not None}
    path.write_bytes(packed(own, tensors(llama_weights()) if made is None else made, **changes))
    return path


def by_transformers(weights, **changes):
    """The same model in transformers, by its own rules: q and k in halves, not in neighbours."""
    transformers = pytest.importorskip("transformers", reason="optional: pip install transformers")
    d, hidden, heads, groups, layers = WIDTHS.values()
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=d,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **{"rope_theta": 1000.0, "max_position_embeddings": 128} | changes,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    parts = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    new = {"model.embed_tokens.weight": weights["token_embd.weight"]}
    new |= {"model.norm.weight": weights["output_norm.weight"]}
    new["lm_head.weight"] = new["model.embed_tokens.weight"]
    width = d // heads
    halves = [*range(0, width, 2), *range(1, width, 2)]  # even channels first, then odd ones
    for i in range(layers):
        for short, long in parts.items():
            w = weights[f"blk.{i}.{short}.weight"]
            if short in ("attn_q", "attn_k"):
                rows = [h * width + c for h in range(len(w) // width) for c in halves]
                w = w[rows]
            new[f"model.layers.{i}.{long}.weight"] = w
    model.load_state_dict({name: torch.from_numpy(w) for name, w in new.items()})
    return model


def logits(model, x):
    with torch.no_grad():
        y = model(x)
    return y.logits if hasattr(y, "logits") else y[0]


@pytest.mark.parametrize("scaled", [False, True], ids=["plain RoPE", "Llama 3's RoPE"])
def test_a_gguf_file_gives_the_logits_of_transformers(scaled, tmp_path):
    weights = llama_weights()
    made = tensors(weights)
    llama = by_transformers(weights)
    if scaled:
        rope = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        plain = llama.model.rotary_emb.inv_freq
        llama = by_transformers(weights, rope_parameters=rope)
        factors = (plain / llama.model.rotary_emb.inv_freq).numpy()
        assert factors.max() > 7.9 and factors.min() == 1
        made |= tensors({"rope_freqs.weight": factors})
    path = write(tmp_path / "m.gguf", made=made)
    x = torch.randint(len(TOKENS), (2, 40))
    expected = logits(llama, x)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(from_pretrained(path), x), expected, rtol=0, atol=1e-4)
    learned = from_pretrained(path, [8, None], cms_blocks=1).learn(x, step=0.1)[0]
    still = from_pretrained(path, [8, None], cms_blocks=1).learn(x, step=0.0)[0]
    assert (learned - still).abs().max() > 1e-3


@pytest.mark.parametrize("said", ["scaling.type", "scaling.factor", "scale_linear"])
def test_a_factor_of_rope_counts_whether_or_not_its_kind_is_said(said, tmp_path):
    changes = {"scaling.factor": 4.0, "scaling.type": "linear"}
    if said != "scaling.type":
        changes = {said: 4.0}
    changes = {f"llama.rope.{name}": v for name, v in changes.items()}
    assert from_pretrained(write(tmp_path / "m.gguf", changes)).config.rope_factors == [4.0] * 8
    changes["llama.rope.scaling.type"] = "none"
    assert from_pretrained(write(tmp_path / "n.gguf", changes)).config.rope_factors is None


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q4_K"])
def test_every_tensor_is_what_gguf_itself_makes_of_it(kind, tmp_path):
    """The file is written by the package's own writer."""
    package = pytest.importorskip("gguf", reason="optional: pip install gguf")
    weights = llama_weights()
    type_ = package.GGMLQuantizationType[kind]
    path = tmp_path / "m.gguf"
    writer = package.GGUFWriter(path, "llama")
    for name, v in METADATA.items():
        if name != "general.architecture":
            writer.add_key_value(name, v, *kinds_of(package, v))
    expected = {}
    for name, w in weights.items():
        small = w.ndim == 1 or w.shape[-1] % package.GGML_QUANT_SIZES[type_][0]
        own = package.GGMLQuantizationType.F32 if small else type_
        try:
            data = package.quants.quantize(w, own)
        except NotImplementedError:  # it has no such writer: any bytes are some weights
            block, n_bytes = package.GGML_QUANT_SIZES[type_]
            data = np.zeros((len(w), w.shape[1] // block * n_bytes), np.uint8)
        writer.add_tensor(name, data, raw_dtype=own)
        expected[name] = torch.from_numpy(package.quants.dequantize(data, own).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = gguf.weights(path)
    assert len(ours) == len(expected)
    for name in expected:
        own = ours[new_name(name)]
        heads = {"attn_q": WIDTHS["heads"], "attn_k": WIDTHS["groups"]}.get(name.split(".")[-2])
        assert (gguf.paired(own, heads) if heads else own).equal(expected[name]), name
    assert from_pretrained(path).config.n_heads == WIDTHS["heads"]
    assert tokenizer(str(path)).encode_ordinary("hello") == [TOKENS.index("hello")]


def kinds_of(package, v):
    kinds = package.GGUFValueType
    one = v[0] if isinstance(v, list) else v
    kind = {str: kinds.STRING, int: kinds.UINT32, float: kinds.FLOAT32}[type(one)]
    return (kinds.ARRAY, kind) if isinstance(v, list) else (kind,)


def new_name(name):
    part = name.split(".")[-2]
    if part not in gguf.PARTS:
        return gguf.NAMES[name]
    return f"model.layers.{name.split('.')[1]}.{gguf.PARTS[part]}.weight"


def test_a_checkpoint_in_several_files_is_read_from_its_folder(tmp_path):
    whole = from_pretrained(write(tmp_path / "whole.gguf")).state_dict()
    made = [*tensors(llama_weights()).items()]
    parts = tmp_path / "parts"
    parts.mkdir()
    for i, own in enumerate((made[:5], made[5:11], made[11:])):
        metadata = {"split.count": 3, "split.no": i}
        if i:  # as llama.cpp writes the others
            metadata |= dict.fromkeys(METADATA) | {"general.architecture": "llama"}
        write(parts / f"m-0000{i + 1}-of-00003.gguf", metadata, dict(own))
    for name, w in from_pretrained(parts).state_dict().items():
        assert w.equal(whole[name])
    assert tokenizer(tokenizer_path(parts)).n_vocab == len(TOKENS)
    with pytest.raises(ValueError, match="must be 3 GGUF files, got 1: name the folder of all"):
        from_pretrained(parts / "m-00001-of-00003.gguf")
    write(tmp_path / "another.gguf")
    with pytest.raises(ValueError, match="must be 1 GGUF files, got 2: name one of them"):
        from_pretrained(tmp_path)


@pytest.mark.slow
def test_training_begins_at_a_gguf_file_and_keeps_its_tokenizer(tmp_path):
    path = write(tmp_path / "m.gguf")
    (tmp_path / "text.txt").write_text("hello shell, 2024\n" * 60)
    files = {"data": str(tmp_path / "text.txt"), "out": str(tmp_path / "run")}
    small = {"seq_len": 16, "tokens": 64, "threads": 1, "lr": 1e-12}
    train(TrainConfig(pretrained=str(path), set={"levels": [4, None]}, **files, **small))
    run = Run.open(tmp_path / "run", "cpu")
    said = "hello 7"
    assert run.encoding.encode_ordinary(said) == tokenizer(str(path)).encode_ordinary(said)
    x = torch.randint(len(TOKENS), (2, 20))
    model = from_pretrained(path, [4, None])
    torch.testing.assert_close(logits(run.model, x), logits(model, x), rtol=0, atol=1e-4)


def test_its_tokenizer_is_that_of_hugging_face(tmp_path):
    """Also for a byte that the vocabulary lacks: Hugging Face drops it, here it is U+FFFD."""
    tokenizers = pytest.importorskip("tokenizers", reason="optional: pip install tokenizers")
    path = write(tmp_path / "m.gguf")
    ours = tokenizer(str(path))
    vocab = {token: i for i, token in enumerate(TOKENS)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [tuple(m.split()) for m in MERGES]))
    pre = tokenizers.pre_tokenizers
    bpe.pre_tokenizer = pre.Sequence([pre.Digits(True), pre.ByteLevel(add_prefix_space=False)])
    said = "hello shell, 2024\u00e9 \U0001f600\n"
    assert ours.encode_ordinary(said) == bpe.encode(said).ids
    assert TOKENS.index("hello") in ours.encode_ordinary(said)
    assert ours.eot_token == 0 and ours.decode([1]) == "<|1|>"  # eos is called <|endoftext|>
    lacks = [token if token != BELL else "<|bell|>" for token in TOKENS]
    lacking = tokenizer(str(write(tmp_path / "l.gguf", {"tokenizer.ggml.tokens": lacks})))
    assert lacking.decode(encode(b"a\x07b", lacking).tolist()) == "a\ufffdb"


BELL = next(char for char, byte in BYTE.items() if byte == 7)
BAD = {  # metadata: the message
    "family": ({"general.architecture": "gemma"}, "general.architecture .* 'llama', got 'gemma'"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count of .* must be 0, got 8"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "rope type .* one of default, .* got 'yarn'"),
    "head width": ({"llama.attention.key_length": 32}, "head_dim of .* must be 16, got 32"),
    "a lie": ({"llama.block_count": 10**9}, "layers.999999999.* the file has nothing"),
    "a wide lie": ({"llama.feed_forward_length": 2**31}, "is .2147483648, 64., .* has .96, 64."),
    "no heads": ({"llama.attention.head_count": None}, "KeyError|num_attention_heads"),
    "heads by layer": ({"llama.attention.head_count": [4, 4]}, "integer of at least 1, got .4, 4."),
    "parts": ({"split.count": "2"}, "must be 2 GGUF files, got 1"),
    "alignment": ({"general.alignment": 0}, "general.alignment must be .* got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_of_another_kind_is_refused_by_what_it_has(name, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(write(tmp_path / "m.gguf", changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer.ggml.model": "llama"}, "ggml.model must be one of gpt2, got 'llama'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre must be one of gpt-2, .* 'qwen2'"),
        ({"tokenizer.ggml.tokens": None}, "damaged"),
        ({"tokenizer.ggml.merges": None}, "damaged"),
        ({"tokenizer.ggml.eos_token_id": None}, "damaged"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused_by_what_it_is(changes, message, tmp_path):
    path = write(tmp_path / "m.gguf", changes)
    assert from_pretrained(path).config.vocab_size == len(TOKENS)
    with pytest.raises(ValueError, match=message):
        tokenizer(str(path))


ROW = (8, 64)
ZEROS = bytes(4 * 8 * 64)
LIES = {  # tensors beside those of the model: the message
    "beyond the end": ({"x": ((10**6, 10**6), F32, b"")}, "x must end at byte .* but the file has"),
    "overflow": ({"x": ((2**40, 2**40), F32, b"")}, "x must end at byte .* but the file has"),
    "unknown": ({"x": (ROW, 4321, ZEROS)}, "type 4321 .* unknown to gguf|need gguf"),
    "integers": ({"x": (ROW, 24, ZEROS)}, "type I8 cannot be dequantised|need gguf"),
    "half a block": ({"x": ((8, 63), 8, ZEROS)}, "x must have rows of a multiple of 32|need gguf"),
    "nothing": ({"x": ((8, 0), F32, b"")}, "x must have rows"),
    "a bias": ({"blk.0.attn_q.bias": ((64,), F32, ZEROS[:256])}, "blk.0.attn_q.bias, .* no place"),
    "a number": ({"token_embd.weight": ((), F32, bytes(4))}, "vocab_size .* at least 1, got None"),
    "another rope": ({"rope_freqs.weight": ((3,), F32, bytes(12))}, "rope_factors must be 8"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_tensor_that_does_not_fit_is_refused(name, tmp_path):
    extra, message = LIES[name]
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(write(tmp_path / "m.gguf", made=tensors(llama_weights()) | extra))
    assert "\n" not in str(caught.value)


def test_a_damaged_header_is_refused_before_anything_is_allocated(tmp_path):
    path = tmp_path / "m.gguf"
    whole = write(path).read_bytes()
    begin = whole.index(text("tokenizer.ggml.tokens"))
    long = begin + len(text("tokenizer.ggml.tokens")) + 8  # where the length of that list stands
    damaged = {
        "empty": (b"", "empty"),
        "foreign": (b"PK" + whole[2:], "does not begin with GGUF"),
        "version": (packed({}, {}, version=1), "version must be 2 or 3, little-endian, got 1"),
        "big-endian": (packed({}, {}, version=3 << 24), "little-endian, got 50331648"),
        "counts": (packed(METADATA, {}, counts=(2**60, 2**60)), "its header needs"),
        "list": (whole[:long] + struct.pack("<Q", 2**60) + whole[long + 8 :], "its header needs"),
    }
    damaged |= {n: (whole[:n], "no whole GGUF file") for n in range(5, begin, 97)}
    damaged["cut"] = (whole[:-1], "must end at byte")
    for content, message in damaged.values():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            from_pretrained(path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match="m.gguf is no whole GGUF file: .*No such file"):
        from_pretrained(path)


def test_tensors_that_overlap_are_refused(tmp_path):
    made = tensors({"a": np.ones(64, np.float32), "b": np.ones(64, np.float32)})
    content = packed(METADATA, made)
    second = content.rindex(text("b")) + len(text("b")) + 4 + 8 + 4
    path = tmp_path / "m.gguf"
    path.write_bytes(content[:second] + struct.pack("<Q", 32) + content[second + 8 :])
    with pytest.raises(ValueError, match="b begins within the tensor before it"):
        from_pretrained(path)


def test_quantised_weights_name_the_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf._block.cache_clear()
    path = write(tmp_path / "m.gguf", made={"x": ((8, 64), 8, bytes(8 * 68))})
    with pytest.raises(ValueError, match="quantised weights need gguf: pip install gguf"):
        from_pretrained(path)
