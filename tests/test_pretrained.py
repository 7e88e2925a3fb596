"""Ad-hoc level stacking (NL 7.3): a Llama checkpoint as Hope-Attention with CMS levels."""

import json

import pytest
import torch

from support.config import TrainConfig
from support.pretrained import from_pretrained
from support.run import Run, resumed
from support.vocabulary import tokenizer
from train import train

transformers = pytest.importorskip("transformers", reason="optional: pip install transformers")
pytest.importorskip("safetensors", reason="optional: pip install safetensors")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "plain": {},
    "Llama 3's RoPE": {"rope_parameters": LLAMA3},
    "linear RoPE": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 3.0}},
    "grouped keys and values": {"num_key_value_heads": 2},
    "one key for all": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "another base and eps": {"rope_theta": 500.0, "rms_norm_eps": 1e-2},
}


def checkpoint(folder, **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(SMALL | changes))
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(torch.rand_like(p) + 0.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [[None], [4, None], [4, 8, 16]], ids=str)
def test_at_the_start_and_with_step_0_it_is_the_pre_trained_model(kind, levels, tmp_path):
    llama = checkpoint(tmp_path, **KINDS[kind])
    x = torch.randint(61, (2, 21))
    model = from_pretrained(tmp_path, levels, cms_blocks=3)
    with torch.no_grad():
        expected = llama(x).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(model(x, updates="off")[0], expected, rtol=0, atol=1e-4)
        first, state = model(x[:, :9], updates="off")
        both = torch.cat([first, model(x[:, 9:], state, updates="off")[0]], 1)
        torch.testing.assert_close(both, expected, rtol=0, atol=1e-4)
        if levels != [None]:
            still = model(x, updates="first_order", step=0.0)[0]
            torch.testing.assert_close(still, expected, rtol=0, atol=1e-4)
            moved = model(x, updates="first_order", step=0.1)[0]
            assert (moved - expected).abs().max() > 1e-2


def test_the_levels_of_a_pre_trained_model_are_trained_on_both_clocks(tmp_path):
    checkpoint(tmp_path, num_key_value_heads=2)
    model = from_pretrained(tmp_path, [4, 8, None], cms_step=0.1, cms_blocks=3)
    x = torch.randint(61, (2, 21))
    before = model.learn(x, updates="full")[0].mean()
    before.backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    assert model.learn(x)[0].mean() < before


def test_only_the_last_blocks_become_levels(tmp_path):
    checkpoint(tmp_path, num_hidden_layers=8)
    learners = [len(block.cms.mlps) for block in from_pretrained(tmp_path).blocks]
    assert learners == [1, 1, 1, 1, 1, 1, 2, 2]
    learners = [len(block.cms.mlps) for block in from_pretrained(tmp_path, cms_blocks=3).blocks]
    assert learners == [1, 1, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_in_several_files_are_read_exactly(dtype, tmp_path):
    llama = checkpoint(tmp_path / "whole").to(dtype)
    llama.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len([*(tmp_path / "parts").glob("*.safetensors")]) > 2
    llama.float().save_pretrained(tmp_path / "float")
    ours = from_pretrained(tmp_path / "parts").state_dict()
    for name, w in from_pretrained(tmp_path / "float").state_dict().items():
        assert ours[name].dtype == torch.float32 and ours[name].equal(w)
    # a copy that the index does not name, as some repositories have one, is not read
    (tmp_path / "parts" / "consolidated.safetensors").write_bytes(b"no weights")
    from_pretrained(tmp_path / "parts")
    next((tmp_path / "parts").glob("model-*.safetensors")).write_bytes(b"damage")
    with pytest.raises(ValueError, match="no readable checkpoint"):
        from_pretrained(tmp_path / "parts")


def test_weights_that_are_no_numbers_of_16_or_32_bits_are_refused(tmp_path):
    checkpoint(tmp_path)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, file)
    with pytest.raises(ValueError, match="model.norm.weight .* float32, .* got torch.int8"):
        from_pretrained(tmp_path)


def test_what_has_no_place_is_named(tmp_path):
    checkpoint(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    yarn = {"rope_type": "yarn", "rope_theta": 1e4}
    torn = {"rope_type": "llama3", "rope_theta": 1e4}
    two = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    zero = {"rope_type": "linear", "factor": 0}
    for damage, message in (
        ({"hidden_act": "gelu"}, "hidden_act of .* must be 'silu', got 'gelu'"),
        ({"attention_bias": True}, "attention_bias of .* must be False, got True"),
        ({"rope_parameters": yarn}, "rope type of .* must be one of default, .* got 'yarn'"),
        ({"rope_parameters": {"rope_type": [1]}}, "rope type of .* got .1."),
        ({"rope_parameters": torn}, "no place here: KeyError.'original_max_position_embeddings'"),
        ({"rope_parameters": two}, "no place here: .* short_factor must be its long_factor"),
        ({"rope_parameters": zero}, "rope_factors must be 4 numbers above 0, got .0.0, 0.0"),
        ({"model_type": "granite"}, "model_type of .* must be 'llama', got 'granite'"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window .* must be None, got 8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor of .* must be 1, got 0.5"),
        ({"head_dim": 16}, "head_dim of .* must be 8, got 16"),
        ({"num_hidden_layers": 2}, "got model.layers.2.* has no place"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
        ({"vocab_size": 62}, "no whole checkpoint: config.json says .*embed_tokens"),
        # what would be allocated first and then found not to fit
        ({"num_hidden_layers": 10**7}, "layers.9999999.* is .48, 32., the file has nothing"),
        ({"vocab_size": 10**12}, "embed_tokens.weight is .1000000000000, 32., .* has .61, 32."),
        ({"intermediate_size": 10**12}, "gate_proj.weight is .1000000000000, 32., .*48, 32"),
        ({"num_attention_heads": 0}, "num_attention_heads of .* integer of at least 1, got 0"),
        ({"num_key_value_heads": "4"}, "num_key_value_heads of .* at least 1, got '4'"),
        ({"num_key_value_heads": 3}, "no checkpoint of the Llama family"),
        ({"hidden_size": None}, "hidden_size of .* at least 1, got None"),
        ({"vocab_size": True}, "vocab_size of .* at least 1, got True"),
        ({"num_attention_heads": 5, "head_dim": None}, "multiple of n_heads, got 32 and 5"),
        ({"rope_scaling": "x", "rope_parameters": None}, "rope of .* must be names with values"),
        ({"rope_theta": "x", "rope_parameters": {}}, "rope of .* rope_theta a number"),
        ({"rms_norm_eps": "x"}, "norm_eps must be a number, got 'x'"),
        ({"tie_word_embeddings": 2}, "tied must be true or false, got 2"),
    ):
        path.write_text(json.dumps(config | damage))
        with pytest.raises(ValueError, match=message):
            from_pretrained(tmp_path)
    path.write_text(json.dumps(config | {"model_type": "mistral", "sliding_window": None}))
    from_pretrained(tmp_path)
    for text in ("[1, 2]", '"x"', "null", "7"):
        path.write_text(text)
        with pytest.raises(ValueError, match="config.json must hold names with values, got a "):
            from_pretrained(tmp_path)


def test_a_folder_without_a_checkpoint_and_levels_that_do_not_divide_are_named(tmp_path):
    with pytest.raises(ValueError, match="no readable checkpoint"):
        from_pretrained(tmp_path / "none")
    checkpoint(tmp_path)
    with pytest.raises(ValueError, match="hidden must be a multiple of 5, the CMS levels, got 48"):
        from_pretrained(tmp_path, [2, 4, 8, 16, None])


TEXT = "\u201cIt's 1877; they'll be ca\u00f1on-fodder\u201d.\n\n"
TEXT += "    x_1 = f(2048)\t# \u00e9 \U0001f600 <|end|>\r\n"
TEXT *= 40
DIGITS = [{"type": "Digits", "individual_digits": True}]
DIGITS.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True})
SPLITS = {
    "GPT-2": None,
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def save_tokenizer(folder, split=None, **changes):
    tokenizers = pytest.importorskip("tokenizers", reason="optional: pip install tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    bpe.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    if split:
        own = pre.Split(tokenizers.Regex(split), "isolated")
        bytes_alone = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre.Sequence([own, bytes_alone])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([TEXT], trainer)
    path = folder / "tokenizer.json"
    bpe.save(str(path))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return bpe


@pytest.mark.parametrize("split", SPLITS)
def test_its_tokenizer_is_read(split, tmp_path):
    bpe = save_tokenizer(tmp_path, SPLITS[split])
    end = bpe.token_to_id("<|end|>")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [end]}))
    own = tokenizer(str(tmp_path / "tokenizer.json"))
    plain = TEXT.replace("<|end|>", "")
    assert own.encode_ordinary(plain) == bpe.encode(plain).ids
    assert len(own.encode_ordinary(plain)) < 0.6 * len(plain.encode())
    assert own.decode(own.encode_ordinary(TEXT)) == TEXT
    assert own.n_vocab == bpe.get_vocab_size() and own.eot_token == end


def test_digits_that_stand_alone_are_split_as_by_hugging_face(tmp_path):
    """SmolLM's pre-tokenizer: two steps there, one pattern here."""
    tokenizers = pytest.importorskip("tokenizers", reason="optional: pip install tokenizers")
    own = {"type": "Sequence", "pretokenizers": DIGITS}
    save_tokenizer(tmp_path, pre_tokenizer=own)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = TEXT.replace("<|end|>", "")
    text += "a1 b22  3 \n 4\t\t5 \u00b2\u0968x's 'll7  z\n\n8 .9. \u2167"
    ours = tokenizer(str(tmp_path / "tokenizer.json"))
    assert ours.encode_ordinary(text) == theirs.encode(text).ids


@pytest.mark.slow
def test_continual_pre_training_begins_at_the_pre_trained_model_and_resumes(tmp_path):
    bpe = save_tokenizer(tmp_path)
    symbols = bpe.get_vocab_size()
    folder = tmp_path / "llama"
    text = tmp_path / "text.txt"
    out = tmp_path / "run"
    llama = checkpoint(folder, vocab_size=symbols, eos_token_id=bpe.token_to_id("<|end|>"))
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    text.write_text(TEXT)
    files = {"pretrained": str(folder), "data": str(text), "out": str(out)}
    learning = {"set": {"levels": [4, 8, None]}}
    train(TrainConfig(**files, **learning, seq_len=16, threads=1, tokens=64, lr=1e-12))
    run = Run.open(out, "cpu")
    x = torch.randint(300, (2, 21))
    with torch.no_grad():
        still = run.model(x, updates="off")[0]
        torch.testing.assert_close(still, llama(x).logits, rtol=0, atol=1e-4)
    assert run.encoding.n_vocab == symbols and len(run.model.blocks[-1].cms.steps()) == 2
    done = train(resumed(str(out), tokens=640, lr=1e-2))
    assert done["step"] == 10 and done["val_bits_per_byte"] < 8


@pytest.mark.parametrize(
    "damage, message",
    [
        ({"normalizer": {"type": "NFC"}}, 'normalizer.*{"type": "NFC"}'),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace|pre_tokenizer"),
        ({"model": {"type": "Unigram"}}, "byte-level BPE"),
        ({}, "vocabulary of 61 symbols, but its tokenizer 300"),
    ],
)
def test_what_training_cannot_start_from_is_named_before_anything_is_written(
    damage, message, tmp_path
):
    checkpoint(tmp_path / "llama", eos_token_id=0)
    save_tokenizer(tmp_path / "llama", **damage)
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(pretrained=str(tmp_path / "llama"), out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_only_hope_attention_begins_at_a_pre_trained_model(tmp_path):
    with pytest.raises(ValueError, match="model must be hope_attention, .*, got 'transformer'"):
        TrainConfig(model="transformer", pretrained=str(tmp_path))
