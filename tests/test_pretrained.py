"""Ad-hoc level stacking (NL 7.3): a Llama checkpoint, written by transformers, becomes Hope-Attention with CMS levels."""

import json

import pytest
import torch

from hope import Hope

transformers = pytest.importorskip("transformers", reason="optional: pip install transformers")
pytest.importorskip("safetensors", reason="optional: pip install safetensors")

SMALL = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=4, rms_norm_eps=1e-5, max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
KINDS = {
    "plain": dict(),
    "grouped keys and values": dict(num_key_value_heads=2),
    "one key for all": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "another base and eps": dict(rope_theta=500.0, rms_norm_eps=1e-2),
}


def checkpoint(folder, **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(SMALL | dict(tie_word_embeddings=False) | changes))
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
    llama, x = checkpoint(tmp_path, **KINDS[kind]), torch.randint(61, (2, 21))
    model = Hope.from_pretrained(tmp_path, levels)
    with torch.no_grad():
        expected = llama(x).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-4)
        first, state = model(x[:, :9])
        torch.testing.assert_close(model(x[:, 9:], state)[0], expected[:, 9:], rtol=0, atol=1e-4)
        if levels != [None]:
            torch.testing.assert_close(model(x, updates="first_order", step=0.0)[0], expected, rtol=0, atol=1e-4)
            assert (model(x, updates="first_order", step=0.1)[0] - expected).abs().max() > 1e-2


def test_the_levels_of_a_pre_trained_model_are_trained_on_both_clocks(tmp_path):
    checkpoint(tmp_path, num_key_value_heads=2)
    model, x = Hope.from_pretrained(tmp_path, [4, 8, None], cms_step=0.01), torch.randint(61, (2, 21))
    before = model.learn(x, updates="full")[0].mean()
    before.backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    assert model.learn(x)[0].mean() < before


@pytest.mark.parametrize(
    "damage, message",
    [
        (dict(hidden_act="gelu"), "hidden_act 'gelu'; legal is 'silu'"),
        (dict(attention_bias=True), "attention_bias True; legal is False"),
        (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "rope type 'llama3'; legal is 'default'"),
        (dict(num_hidden_layers=2), "model.layers.2.* has no place"),
        (dict(num_hidden_layers=4), "model.layers.3"),
        (dict(vocab_size=62), "no checkpoint of the Llama family"),
    ],
)
def test_what_has_no_place_is_named(damage, message, tmp_path):
    checkpoint(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ValueError, match=message):
        Hope.from_pretrained(tmp_path)


def test_a_folder_without_a_checkpoint_and_levels_that_do_not_divide_are_named(tmp_path):
    with pytest.raises(ValueError, match="no readable checkpoint"):
        Hope.from_pretrained(tmp_path / "none")
    checkpoint(tmp_path)
    with pytest.raises(ValueError, match="multiple of the number of levels, got 48 for 5"):
        Hope.from_pretrained(tmp_path, [2, 4, 8, 16, None])
