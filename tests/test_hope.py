"""The language model: causality, state, sizes, generation, and what it says to bad input."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import layers
from baselines import delta_net, gated_delta_net, linear_attention, retention
from fused import linear_cross_entropy
from hope import LEARNING, MIXERS, PRESETS, Hope, HopeConfig, loss_fn
from layers import Sampler, map_state, tensors
from memory import l2norm, read, scan, scan_stepwise, surprise, write
from support.checkpoint import load_state, save_state
from support.plan import flops_per_token

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(vocab_size=11, d_model=16, n_layers=2, n_heads=2, hidden=24, chunk=4, window=8)
LEARNS = {"levels": [4, 8, None]}
RECURRENT = [name for name in MIXERS if name not in ("transformer", "hope_attention")]
VARIANTS = {
    **{name: dict(model=name) for name in MIXERS},
    "hope, mlp": dict(memory="mlp"),
    "hope, momentum": dict(momentum=True),
    "hope, k v q": dict(adaptive=["k", "v", "q"]),
    "hope, mlp, k v q, momentum": dict(adaptive=["k", "v", "q"], memory="mlp", momentum=True),
    "hope, nothing adaptive": dict(adaptive=[]),
    "hope, no convolution": dict(conv=0),
    "hope, one level": dict(levels=[None]),
    "hope, three levels": dict(levels=[4, 8, None]),
    "hope, nested": dict(levels=[4, 16, 64], variant="nested"),
    "hope, independent": dict(levels=[8, None], variant="independent"),
    "hope, never learns": dict(inner_step=0.0),
    "hope, counters": dict(counters=1),
    "hope, windows": dict(window_reset=8, chunk=4, levels=[6, None]),
    "hope, plain gradient": dict(dgd=False, retention=False, gate=False, mode="boundary"),
    "titans, depth 3": dict(model="titans", depth=3),
    "titans, windows": dict(model="titans", window_reset=8, chunk=4),
    "transformer, convolution": dict(model="transformer", conv=4),
}
each_variant = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def config(name, **changes):
    return HopeConfig(**(TINY | VARIANTS[name] | changes))


def build(name, **changes):
    """A float64 model whose every parameter is away from its start: the logits depend on each."""
    model = Hope(config(name, **changes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def tokens(B, T, vocab_size=11):
    return torch.randint(vocab_size, (B, T))


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def numbers(state):
    return sum(t.numel() for t in tensors(state))


def in_pieces(model, x, cuts, state=None):
    out = []
    for start, stop in pairwise([0, *cuts, x.shape[1]]):
        logits, state = model(x[:, start:stop], state)
        out.append(logits)
    return torch.cat(out, 1), state


# --------------------------------------------------------------------------------------------------
# Causality, state, parameters


@each_variant
def test_future_tokens_never_change_past_logits(name):
    model = build(name)
    x = tokens(2, 17)
    t = torch.randint(1, 17, ()).item()
    changed = x.clone()
    changed[:, t:] = (x[:, t:] + torch.randint(1, 11, x[:, t:].shape)) % 11
    with torch.no_grad():
        a, b = model(x)[0], model(changed)[0]
    close(a[:, :t], b[:, :t], 1e-11)
    assert (a[:, t] - b[:, t]).abs().amax(-1).min() > 1e-6


@each_variant
def test_any_way_of_cutting_a_text_into_calls_gives_the_same_logits(name):
    model = build(name)
    x = tokens(2, 21)
    on = tokens(2, 6)
    cuts = sorted(set(torch.randint(1, 21, (5,)).tolist()))
    with torch.no_grad():
        whole, final = model(x)
        pieces, state = in_pieces(model, x, cuts)
        close(pieces, whole)
        close(model(on, state)[0], model(on, final)[0])
        close(model(torch.cat([x, on], 1))[0][:, 21:], model(on, final)[0])
        assert (model(on)[0] - model(on, final)[0]).abs().max() > 1e-6  # the state matters


@each_variant
def test_rows_of_a_batch_never_see_each_other(name):
    model, x = build(name), tokens(3, 11)
    with torch.no_grad():
        whole, state = model(x)
        on = model(x, state)[0]
        for row in range(3):
            alone, own = model(x[row : row + 1])
            close(whole[row : row + 1], alone, 1e-11)
            close(on[row : row + 1], model(x[row : row + 1], own)[0], 1e-11)


@each_variant
def test_every_parameter_gets_a_gradient_and_owns_its_memory(name):
    levels = LEARNS if name.startswith(LEARNING) else {}
    model, x = Hope(config(name, **levels)), tokens(2, 13)
    model(x)[0].square().mean().backward()
    for label, p in model.named_parameters():
        assert all(
            stride > 0 for stride, size in zip(p.stride(), p.shape, strict=True) if size > 1
        ), label
        if name == "hope, never learns" and re.search(r"mixer\.(start$|b_|log_A|norm$)", label):
            continue  # what would make k, v, eta and alpha makes nothing
        assert p.grad is not None and p.grad.abs().max() > 0, label


@pytest.mark.parametrize("name", VARIANTS)
def test_initial_loss_of_nano_is_that_of_guessing(name):
    model = Hope(HopeConfig.preset("nano", **({"model": "hope"} | VARIANTS[name])))
    x = tokens(4, 193, 257)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(
            model(x[:, :-1])[0].flatten(0, 1), x[:, 1:].flatten()
        ).item()
    assert loss == pytest.approx(math.log(257), rel=0.05)


def count(model, preset, **changes):
    with torch.device("meta"):
        return sum(
            p.numel() for p in Hope(HopeConfig.preset(preset, model, **changes)).parameters()
        )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.slow
def test_all_models_of_a_preset_have_equal_parameter_counts(preset):
    sizes = {model: count(model, preset) for model in MIXERS}
    sizes |= {
        "mlp": count("hope", preset, memory="mlp"),
        "conv": count("transformer", preset, conv=4),
    }
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes
    if preset != "nano":
        c, named = HopeConfig.preset(preset), float(preset[:-1]) * {"m": 1e6, "b": 1e9}[preset[-1]]
        assert c.tied and c.vocab_size == 32768
        assert all(size == pytest.approx(named, rel=0.03) for size in sizes.values()), sizes


def test_meta_counts_are_those_of_the_real_model():
    real = sum(p.numel() for p in Hope(HopeConfig.preset("nano")).parameters())
    assert count("hope", "nano") == real and 0.8e6 < real < 1.3e6


# --------------------------------------------------------------------------------------------------
# State as a value


@each_variant
def test_a_saved_state_continues_to_the_same_logits(name, tmp_path):
    model = build(name)
    x = tokens(2, 14)
    on = tokens(2, 7)
    _, state = model(x)  # with gradients: the file must not need them
    save_state(state, tmp_path / "state.pt")
    loaded = load_state(tmp_path / "state.pt")
    assert not any(t.requires_grad for t in tensors(loaded))
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(loaded), strict=True))
    with torch.no_grad():
        assert torch.equal(model(on, loaded)[0], model(on, state)[0])
    assert os.listdir(tmp_path) == ["state.pt"]
    torch.load(tmp_path / "state.pt", weights_only=True)


@each_variant
def test_a_state_is_independent_of_the_weights(name):
    model = build(name)
    with torch.no_grad():
        _, state = model(tokens(2, 14))
        before = map_state(torch.clone, state)
        for p in model.parameters():
            p.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors(before), tensors(state), strict=True))


def as_of_an_earlier_version(state):
    """A state without what states have said since of the model, the position and the updates."""
    if not isinstance(state, dict):
        return [as_of_an_earlier_version(own) for own in state] if type(state) is list else state
    kept = {k: v for k, v in state.items() if k not in ("model", "updated")}
    if "blocks" in kept:
        del kept["position"]
    return {name: as_of_an_earlier_version(own) for name, own in kept.items()}


@each_variant
def test_a_state_of_other_rows_is_refused_by_the_model_and_by_its_mixers(name):
    model = build(name)
    with torch.no_grad():
        state = model(tokens(2, 9))[1]
        for own in (state, as_of_an_earlier_version(state)):
            with pytest.raises(ValueError, match="state must have 1 rows.*got 2"):
                model(tokens(1, 9), own)
        for block, own in zip(model.blocks, state["blocks"], strict=True):
            with pytest.raises(ValueError, match="state must have 1 rows.*got 2"):
                block.mixer(torch.randn(1, 3, 16).double(), own["mixer"])


@pytest.mark.parametrize("name", ["hope", "transformer", "titans_mac", "samba", "hope, one level"])
def test_a_state_goes_on_only_whole_and_at_one_position(name):
    model = build(name)
    x = tokens(2, 9)
    with torch.no_grad():
        state = model(x)[1]
        first, second = state["blocks"]
        assert state["position"] == 9 and model(x, state)[1]["position"] == 18
        later = model(x, state)[1]["blocks"][1]
        wrong = {
            "2 blocks, got 3": state | {"blocks": [first, second, second]},
            "2 blocks, got 1": state | {"blocks": [first]},
            "2 blocks, got 2, 1 of them None": state | {"blocks": [first, None]},
            r"one position in all parts, got \[9, 18\]": state | {"blocks": [first, later]},
            r"one position in all parts, got \[0, 9\]": state
            | {"blocks": [first, second | {"mixer": None}]},
            r"one position in all parts, got \[7, 9\]": state | {"position": 7},
            "state is Tensor, not dict": x,
        }
        for message, own in wrong.items():
            with pytest.raises(ValueError, match=message):
                model(x, own)
            if isinstance(own, dict) and "7" not in message:
                with pytest.raises(ValueError, match="state"):
                    model(x, as_of_an_earlier_version(own))


def test_a_state_of_another_model_is_refused_with_both_sides_named():
    models = {name: build(name) for name in VARIANTS}
    with torch.no_grad():
        states = {name: model(tokens(2, 9))[1] for name, model in models.items()}
        for model in models.values():
            for other, state in states.items():
                if models[other].config != model.config:
                    with pytest.raises(ValueError, match="state must be of a model whose .* is .*"):
                        model(tokens(2, 3), state)
        with pytest.raises(ValueError, match="model is 'deltanet', got one with 'gated_deltanet'"):
            build("deltanet")(tokens(2, 3), states["gated_deltanet"])
        with pytest.raises(ValueError, match="variant is 'nested', got one with 'sequential'"):
            nested = dict(levels=[4, 8, None], variant="nested")
            build("hope", **nested)(tokens(2, 3), states["hope, three levels"])
        with pytest.raises(ValueError, match=r"levels is \[4, 16, None\], got .* \[4, 8, None\]"):
            build("hope", levels=[4, 16, None])(tokens(2, 3), states["hope, three levels"])
        with pytest.raises(ValueError, match="this model, retnet: .*'W'.* has rows of shape"):
            build("retnet")(tokens(2, 3), as_of_an_earlier_version(states["linear_attention"]))
        old = as_of_an_earlier_version(states["ttt_mlp"])
        with pytest.raises(ValueError, match=r"this model, ttt_linear: .* has the parts \[0, 1\]"):
            build("ttt_linear")(tokens(2, 3), old)
        with pytest.raises(ValueError, match="this model, titans: .*'k', 'v'.*not .*'running'"):
            build("titans")(tokens(2, 3), as_of_an_earlier_version(states["transformer"]))
        with pytest.raises(ValueError, match="this model, hope: .*NoneType, not dict"):
            old = as_of_an_earlier_version(states["hope, three levels"])
            old["blocks"][1]["cms"] = None
            build("hope, three levels")(tokens(2, 3), old)


@each_variant
def test_a_state_of_an_earlier_version_goes_on_to_the_same_logits(name):
    model = build(name)
    on = tokens(2, 7)
    with torch.no_grad():
        for length in (1, 14):
            state = model(tokens(2, length))[1]
            expected, after = model(on, state)
            logits, now = model(on, as_of_an_earlier_version(state))
            assert torch.equal(logits, expected)
            assert now["model"] == after["model"] and now["position"] == length + 7


def test_map_state_applies_to_every_tensor_and_keeps_the_rest():
    state = {"a": torch.ones(2), "b": [torch.zeros(3), {"c": None, "d": 7}], "e": (torch.ones(1),)}
    twice = map_state(lambda t: t * 2, state)
    assert torch.equal(twice["a"], 2 * torch.ones(2)) and torch.equal(
        twice["e"][0], 2 * torch.ones(1)
    )
    assert twice["b"][1] == {"c": None, "d": 7} and torch.equal(state["a"], torch.ones(2))


def test_a_state_moves_to_another_dtype_with_map_state():
    model, x, on = build("hope"), tokens(1, 9), tokens(1, 6)
    with torch.no_grad():
        expected = model(on, model(x)[1])[0]
        state = map_state(lambda t: t.float(), model(x)[1])
        close(model.float()(on, state)[0].double(), expected, 1e-3)


def test_a_save_that_fails_half_way_leaves_the_old_state(tmp_path, monkeypatch):
    model, path = build("hope"), tmp_path / "state.pt"
    _, old = model(tokens(1, 5))
    _, new = model(tokens(1, 9))

    def full_disk(value, to):
        Path(to).write_bytes(b"half a fi")
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_state(new, path)
        assert not path.exists()
    save_state(old, path)
    with monkeypatch.context() as broken:
        broken.setattr(torch, "save", full_disk)
        with pytest.raises(OSError):
            save_state(new, path)
    assert all(
        torch.equal(a, b) for a, b in zip(tensors(load_state(path)), tensors(old), strict=True)
    )


def test_a_missing_torn_or_foreign_state_file_is_refused_by_name(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(ValueError, match="state.pt does not exist"):
        load_state(path)
    save_state(build("hope")(tokens(1, 5))[1], path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="state.pt.*truncated"):
        load_state(path)
    torch.save({"position": os.getcwd, "blocks": subprocess.Popen}, path)  # code, not tensors
    with pytest.raises(ValueError, match="state.pt.*truncated or damaged"):
        load_state(path)


# --------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("name", [*MIXERS, "hope, mlp", "hope, momentum", "hope, windows"])
def test_greedy_generation_takes_the_argmax_of_full_forwards(name):
    model, text = build(name), tokens(2, 6)
    streamed = torch.stack(list(model.generate(text, 12, temperature=0)), 1)
    for _ in range(12):
        with torch.no_grad():
            text = torch.cat([text, model(text)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(streamed, text[:, 6:])
    assert torch.equal(streamed, torch.stack(list(model.generate(text[:, :6], 12, top_k=1)), 1))


@pytest.mark.slow
def test_sampling_follows_temperature_and_top_k():
    model, text = build("hope"), tokens(1, 6).repeat(4000, 1)
    with torch.no_grad():
        logits = model(text[:1])[0][0, -1]

    def frequencies(**how):
        return next(model.generate(text, 1, **how)).bincount(minlength=11) / 4000

    close(frequencies(temperature=2.0).double(), (logits / 2).softmax(-1), 0.04)
    best = logits.topk(3)[1]
    expected = torch.zeros(11).double().index_put((best,), logits[best].softmax(-1))
    close(frequencies(top_k=3).double(), expected, 0.04)
    close(frequencies(top_k=100).double(), logits.softmax(-1), 0.04)


def drawn_from(logits, seen, temperature, top_k, top_p, min_p, repetition_penalty):
    """What Sampler draws from, [(token, probability)], by the words of its docstring."""
    logits = [
        (x / repetition_penalty if x > 0 else x * repetition_penalty) if again else x
        for x, again in zip(logits, seen, strict=True)
    ]
    ranked = sorted(enumerate(logits), key=lambda pair: -pair[1])[:top_k]
    p = [(token, math.exp((x - ranked[0][1]) / temperature)) for token, x in ranked]
    total = sum(x for _, x in p)
    kept = []
    for token, x in p:
        if sum(x for _, x in kept) / total < top_p and x >= min_p * p[0][1]:
            kept.append((token, x))
    total = sum(x for _, x in kept)
    return [(token, x / total) for token, x in kept]


def test_tokens_are_drawn_from_what_the_filters_leave(monkeypatch):
    seen_by = []
    draw = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, n: seen_by.append(p) or draw(p, n))
    generator = torch.Generator().manual_seed(0)
    cases = product(
        (0.5, 2.0), (None, 3, 99), (1.0, 0.7, 1e-300), (0.0, 0.2, 1.0), (1.0, 1.5, 0.5)
    )
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    for case in cases:
        logits = 2 * torch.randn(2, 11, generator=generator, dtype=torch.float64)
        seen = torch.rand(2, 11, generator=generator) < 0.5
        how = dict(zip(names, case, strict=True))
        tokens = Sampler(**how)(logits, seen)
        for row in range(2):
            expected = drawn_from(logits[row].tolist(), seen[row].tolist(), **how)
            p = seen_by[-1][row]
            whole = torch.zeros(11, dtype=torch.float64)
            for token, value in expected:
                whole[token] = value
            close(p / p.sum(), whole, 1e-12)
            assert whole[tokens[row]] > 0


def test_a_repetition_penalty_counts_the_prompt_and_what_was_written():
    model, text = build("hope"), tokens(1, 6)
    strong = {"temperature": 0, "repetition_penalty": 1e30}
    others = 11 - len(text.unique())
    written = [int(token) for token in model.generate(text, others, **strong)]
    assert sorted({*written, *text[0].tolist()}) == list(range(11))  # nothing comes twice


def test_a_long_prompt_is_read_in_pieces():
    model = build("linear_attention")
    text = tokens(1, 4100)
    seen = []
    model.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    token, state = next(model.generate_with_state(text, 1, temperature=0))
    with torch.no_grad():
        logits, whole = model(text)
    assert seen == [4096, 4, 4100] and torch.equal(token, logits[:, -1].argmax(-1))
    assert state["position"] == 4100
    close(model(text[:, :1], state)[0], model(text[:, :1], whole)[0])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_temperatures_at_their_extremes_are_greedy_and_uniform(scale):
    model = build("transformer", tied=False).float()
    with torch.no_grad():
        model.head.weight.mul_(scale)
    text = tokens(1, 6).repeat(500, 1)
    greedy = next(model.generate(text, 1, temperature=0))
    for temperature, top_k in ((5e-324, None), (1e-46, 5), (1e300, 1)):
        how = {"temperature": temperature, "top_k": top_k}
        assert scale < 1 or torch.equal(next(model.generate(text, 1, **how)), greedy)
    hot = next(model.generate(text, 1, temperature=1e300, top_k=2**70)).bincount(minlength=11)
    assert hot.min() > 15


def test_generation_streams_one_token_per_forward():
    model, seen = build("hope"), []
    model.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    stream = model.generate(tokens(2, 6), 1000)
    assert iter(stream) is stream and seen == []
    assert next(stream).shape == (2,) and seen == [(2, 6)]
    assert next(stream).dtype == torch.int64 and seen == [(2, 6), (2, 1)]
    assert list(model.generate(tokens(2, 6), 0)) == []


def test_a_seed_reproduces_a_sample():
    model, text = build("hope"), tokens(1, 4)

    def sample(seed):
        torch.manual_seed(seed)
        return torch.cat(list(model.generate(text, 30))).tolist()

    assert sample(3) == sample(3) != sample(4)


@pytest.mark.parametrize(
    "name", [*RECURRENT, "hope, mlp", "hope, momentum", "hope, k v q", "hope, windows"]
)
def test_generation_needs_constant_memory(name):
    model = build(name, **(LEARNS if name.startswith(LEARNING) else {}))
    with torch.no_grad():
        _, short = model(tokens(1, 9))
        _, long = model(tokens(1, 401))
        _, on = model(tokens(1, 8), long)  # MAC's grows within a segment of 8 and then starts again
    assert numbers(short) == numbers(long) == numbers(on)
    storage = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(on)}
    assert sum(storage.values()) <= 8 * numbers(
        on
    )  # and no tensor of the state keeps a longer one alive


@pytest.mark.parametrize("name", MIXERS)
def test_generation_continues_from_a_state(name):
    model, text = build(name), tokens(2, 9)
    with torch.no_grad():
        _, state = model(text[:, :-1])
    expected = list(model.generate(text, 8, temperature=0))
    for _ in range(2):  # a state is a value: it can be continued more than once
        assert all(
            map(torch.equal, model.generate(text[:, -1:], 8, state, temperature=0), expected)
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(n=-1), r"n must be an integer of at least 0.*got -1"),
        (dict(n=2.5), r"n must be an integer of at least 0.*got 2.5"),
        (dict(temperature=-0.5), r"temperature must be a number of at least 0, got -0.5"),
        (dict(temperature=math.nan), r"temperature must be a number of at least 0, got nan"),
        (dict(temperature=math.inf), r"temperature must be a number of at least 0, got inf"),
        (dict(temperature="1"), r"temperature must be a number of at least 0, got '1'"),
        (dict(top_k=0), r"top_k must be an integer of at least 1, got 0"),
        (dict(top_k=2.0), r"top_k must be an integer of at least 1, got 2.0"),
        (dict(top_p=0), r"top_p must be a number above 0 and at most 1, got 0"),
        (dict(top_p=1.5), r"top_p must be a number above 0 and at most 1, got 1.5"),
        (dict(min_p=-0.1), r"min_p must be a number from 0 to 1, got -0.1"),
        (dict(min_p=None), r"min_p must be a number from 0 to 1, got None"),
        (dict(repetition_penalty=0), r"repetition_penalty must be a number above 0, got 0"),
        (dict(tokens=torch.zeros(1, 0, dtype=torch.int64)), r"T >= 1, got shape \(1, 0\)"),
        (dict(tokens=torch.zeros(3, dtype=torch.int64)), r"\[B, T\].*got shape \(3,\)"),
    ],
)
def test_bad_generation_arguments_are_refused_at_the_call(arguments, message):
    with pytest.raises(ValueError, match=message):
        build("hope").generate(**({"tokens": tokens(1, 3), "n": 5} | arguments))


# --------------------------------------------------------------------------------------------------
# Configuration and bad input


@pytest.mark.parametrize(
    "make_it, message",
    [
        (
            lambda: HopeConfig.preset("nano", model="hoep"),
            r"unknown model 'hoep'.*did you mean 'hope'",
        ),
        (lambda: HopeConfig.preset("nano", model="gated_delta"), r"did you mean 'gated_deltanet'"),
        (
            lambda: HopeConfig.preset("12m"),
            r"unknown preset '12m'.*nano, 30m, 125m.*did you mean '125m'",
        ),
        (
            lambda: HopeConfig.preset("nano", chunks=8),
            r"unknown field of HopeConfig 'chunks'.*did you mean 'chunk'",
        ),
        (
            lambda: HopeConfig(memory="mpl"),
            r"unknown memory 'mpl'.*matrix, mlp.*did you mean 'mlp'",
        ),
        (
            lambda: HopeConfig(mode="tokens"),
            r"unknown mode 'tokens'.*token, boundary.*did you mean 'token'",
        ),
        (lambda: HopeConfig(dgd=0), r"dgd must be true or false, got 0"),
        (lambda: HopeConfig(variant="nestd"), r"unknown variant 'nestd'.*did you mean 'nested'"),
        (lambda: HopeConfig(chunk=0), r"chunk must be at least 1, got 0"),
        (lambda: HopeConfig(chunk=2.5), r"chunk must be an integer, got 2.5"),
        (lambda: HopeConfig(n_layers=True), r"n_layers must be an integer, got True"),
        (lambda: HopeConfig(model="titans", depth=0), r"depth must be at least 1, got 0"),
        (lambda: HopeConfig(vocab_size=-4), r"vocab_size must be an integer of at least 1, got -4"),
        (
            lambda: HopeConfig(d_model=100, n_heads=3),
            r"d_model must be a multiple of n_heads, got 100 and 3",
        ),
        (lambda: HopeConfig(inner_step=1.5), r"inner_step must be in \[0, 1\], got 1.5"),
        (lambda: HopeConfig(inner_step=math.nan), r"inner_step must be in \[0, 1\], got nan"),
        (lambda: HopeConfig(conv=-1), r"conv must be an integer of at least 0, got -1"),
        (
            lambda: HopeConfig(adaptive=["k", "w"]),
            r"unknown name in adaptive 'w': must be one of k, v, q",
        ),
        (
            lambda: HopeConfig(d_model=16, levels=[2**i for i in range(30)]),
            r"no parameters for 30 CMS",
        ),
        (
            lambda: HopeConfig(hidden=25, levels=[8, None]),
            r"hidden must be a multiple of 2, .*got 25",
        ),
        (
            lambda: HopeConfig(window_reset=96),
            r"window_reset must be a positive multiple of chunk, 64 tokens, or None, got 96",
        ),
        (lambda: HopeConfig(window_reset=0), r"window_reset must be a positive multiple.*got 0"),
        (lambda: HopeConfig(window_reset=2.5), r"window_reset must be an integer.*got 2.5"),
        (lambda: HopeConfig(model="titans_mag", window_reset=-64), r"multiple of chunk.*got -64"),
        (
            lambda: HopeConfig(model="gated_deltanet", window_reset=64),
            r"window_reset must be None for gated_deltanet.*got 64",
        ),
        (lambda: HopeConfig(levels=[16, 8]), r"grow.*\[16, 8\]"),
        (
            lambda: HopeConfig(levels=[0, None]),
            r"chunk of a level must be an integer of at least 1.*got 0",
        ),
    ],
)
def test_a_bad_config_is_named_with_its_value_and_the_legal_range(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.tensor([[3, 11]]), r"token ids must be in \[0, 11\), got 11"),
        (torch.tensor([[3, -2, 5]]), r"token ids must be in \[0, 11\), got -2"),
        (torch.tensor([[3.0, 2.0]]), r"int64.*torch.float32"),
        (torch.tensor([[3, 2]], dtype=torch.int32), r"int64.*torch.int32"),
        (torch.tensor([3, 2]), r"\[B, T\].*shape \(2,\)"),
        (torch.zeros(2, 0, dtype=torch.int64), r"\[B, T\].*shape \(2, 0\)"),
    ],
)
def test_bad_tokens_are_refused_with_value_and_range(x, message):
    with pytest.raises(ValueError, match=message):
        build("hope")(x)
    with pytest.raises(ValueError, match=message):
        build("hope")(tokens(1, 2), targets=x)


WRONG = {
    "None": None,
    "a list": [[1.0, 2.0]],
    "text": "x",
    "int32": torch.ones(1, 4, 16, dtype=torch.int32),
    "bool": torch.ones(1, 4, 16, dtype=torch.bool),
    "complex": torch.ones(1, 4, 16, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_tensor_of_the_right_kind_is_refused_by_name(kind):
    wrong = WRONG[kind]
    x = torch.ones(1, 4, 16)
    ids = tokens(1, 4)
    rate = torch.full((1, 4), 0.5)
    rule = {"W": torch.ones(16, 16), "k": x, "u": x, "eta": rate, "alpha": rate}
    rule |= {"q": x, "theta": rate, "S": torch.ones(16, 16), "delta": rate}
    net = {"layers": [torch.ones(16, 16)], "k": x, "target": x, "eta": rate, "alpha": rate}
    calls = {}
    for name in rule:
        if wrong is not None or name not in ("q", "theta", "S"):  # which may be None
            for rule_of in (scan, scan_stepwise):
                calls[rule_of, name] = lambda f=rule_of, name=name: f(**(rule | {name: wrong}))
    for name in ("k", "target", "eta", "alpha"):
        calls[write, name] = lambda name=name: write(**(net | {name: wrong}))
    calls[write, r"layers\[0\]"] = lambda: write(**(net | {"layers": [wrong]}))
    calls[read, "x"] = lambda: read(net["layers"], wrong)
    calls[l2norm, "x"] = lambda: l2norm(wrong)
    own = {"layers": net["layers"], "k": x, "target": x}
    for name in ("k", "target"):
        calls[surprise, name] = lambda name=name: surprise(**(own | {name: wrong}))
    for rule_of, rates in ((linear_attention, ()), (retention, ("alpha",)), (delta_net, ("beta",)),
                           (gated_delta_net, ("beta", "alpha"))):
        own_rates = dict.fromkeys(rates, rate)
        for name in ("k", "v", *rates, *("q",) * (wrong is not None)):
            given = {"q": x, "k": x, "v": x} | own_rates | {name: wrong}
            calls[rule_of, f"(eta|u|{name})"] = partial(rule_of, **given)
    model = build("hope").float()
    for name in MIXERS:
        for block in build(name).blocks:
            calls[block.mixer, "x"] = lambda mixer=block.mixer: mixer(wrong)
    calls["cms", "x"] = lambda: model.blocks[0].cms(wrong)
    calls["convolution", "x"] = lambda: layers.ShortConvolution(16)(wrong)
    calls["loss", "logits"] = lambda: loss_fn(wrong, ids)
    calls["loss", "targets"] = lambda: loss_fn(x, wrong)
    calls["model", "tokens"] = lambda: model(wrong)
    calls["learn", "tokens"] = lambda: model.learn(wrong)
    calls["generate", "tokens"] = lambda: model.generate(wrong, 1)
    if wrong is not None:
        calls["model", "targets"] = lambda: model(ids, targets=wrong)
    for (_, name), call in calls.items():
        with pytest.raises((TypeError, ValueError), match=rf"\b{name} .*must be .*(float|int64)"):
            call()


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_takes_whole_rows_only(name):
    mixer = build(name).float().blocks[0].mixer
    for shape in ((4, 16), (1, 0, 16), (16,)):
        with pytest.raises(ValueError, match=r"x must be \[B, T, d_model\] with T >= 1, got shape"):
            mixer(torch.ones(shape))


@each_variant
def test_a_config_survives_json(name):
    c = config(name)
    assert HopeConfig(**json.loads(json.dumps(c.to_dict()))) == c
    solved = HopeConfig.preset("nano", **({"model": "hope"} | VARIANTS[name]))
    assert (
        HopeConfig(**json.loads(json.dumps(solved.to_dict()))) == solved
        and solved.hidden % len(solved.levels) == 0
    )


# --------------------------------------------------------------------------------------------------
# The nested system


@each_variant
def test_levels_account_for_every_parameter_from_fast_to_slow(name):
    model = Hope(config(name))
    rows = model.levels()
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.parameters())
    levels = [row["level"] for row in rows]
    assert levels == sorted(levels) and set(levels) == set(range(1, max(levels) + 1))
    frozen = model.config.inner_step == 0
    assert rows[0]["level"] == 1 and rows[0]["updates"].startswith("every token") != frozen
    assert rows[-1]["updates"] == "every training step"
    assert {"component", "level", "updates", "context", "parameters", "period"} == set(rows[0])
    updating = [row["updates"] for row in rows if row["component"].startswith("CMS")]
    assert updating == [
        f"every {chunk} tokens" for chunk in model.config.levels if chunk is not None
    ]


def test_learned_starts_are_the_parameters_of_the_memory_level():
    model = Hope(config("hope, mlp"))
    mixer = model.blocks[0].mixer
    assert model.levels()[0]["parameters"] == 2 * (mixer.start.numel() + mixer.start2.numel())
    assert "content, k, v, eta, alpha" in model.levels()[0]["component"]
    assert Hope(config("transformer")).levels()[0]["parameters"] == 0


def shown(*words):
    """What `python hope.py WORDS` prints."""
    line = [sys.executable, ROOT / "hope.py", *words]
    return subprocess.run(line, capture_output=True, text=True)


@pytest.mark.slow
def test_hope_without_arguments_prints_the_nested_system_as_a_table():
    done = shown()
    total = count("hope", "nano")
    assert done.returncode == 0 and done.stderr == ""
    assert f"hope: {total:,} parameters" in done.stdout
    rows = [line for line in done.stdout.splitlines() if re.match(r"\s+\d ", line)]
    assert [line.split()[0] for line in rows] == ["1", "2", "3"] and "every 64 tokens" in rows[1]
    assert sum(int(line.split()[-1].replace(",", "")) for line in rows) == total
    assert shown("--model", "samba").stdout.startswith("samba: ")
    wrong = shown("--model", "hop")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "'hope'" in wrong.stderr


@pytest.mark.parametrize(
    "spec",
    [
        ("hope", {}),
        ("hope", {"memory": "mlp", "momentum": True}),
        ("titans", {}),
        ("gated_deltanet", {}),
        ("transformer", {}),
    ],
    ids=str,
)
def test_bfloat16_autocast_stays_near_float32_and_keeps_fast_weights_in_float32(spec):
    torch.manual_seed(0)
    name, options = spec
    if name == "hope":
        # a step of 1 makes much of rounding in a model that knows nothing, fused or not
        options = options | {"levels": [8, 16, None], "cms_blocks": 2, "cms_step": 0.1}
    model = Hope(
        HopeConfig.preset("nano", name, d_model=32, n_layers=2, n_heads=2, chunk=8, **options)
    ).float()
    tokens = torch.randint(257, (2, 40))
    exact, _ = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (logits - exact).norm() < 0.05 * exact.norm()
    if name != "transformer":
        for block in state["blocks"]:
            weights = block["mixer"].get("running") or [block["mixer"]["W"]]
            assert all(W.dtype == torch.float32 for W in weights)
            fast = tensors(block["cms"] and block["cms"]["fast"])
            assert len(fast) == (4 if name == "hope" else 0)
            assert all(w.dtype == torch.float32 for w in fast)


# FLOPs

IN_PLACE = {  # which torch's counter does not know
    torch.ops.aten.baddbmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * a[2] * b[2]
}


@pytest.mark.parametrize(
    ("model", "changes"),
    [(model, {}) for model in MIXERS]
    + [
        ("hope", {"memory": "mlp"}),
        ("hope", {"momentum": True}),
        ("hope", {"adaptive": ["k", "v", "q"]}),
    ]
    + [
        ("hope", {"chunk": 32}),
        ("titans", {"depth": 3}),
        ("gated_deltanet", {"expand": 2}),
        ("titans_mac", {"chunk": 16}),
    ],
    ids=str,
)
def test_counted_flops_are_those_of_torch_s_own_counter(model, changes, monkeypatch):
    """But for attention, where torch's counter takes the whole square: there pairs are counted."""
    pairs = 0

    def look(q, k, v, attn_mask=None, is_causal=False, scale=None):
        nonlocal pairs
        T, S = q.shape[2], k.shape[2]
        seen = (
            T * (T + 1) // 2
            if is_causal
            else T * S
            if attn_mask is None
            else attn_mask.sum().item()
        )
        pairs += seen * q.shape[0] * q.shape[1] * (q.shape[3] + v.shape[3])
        return q.mean(-1, keepdim=True) + k.mean((2, 3), keepdim=True) + v.mean(2, keepdim=True)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    # what a backward pass computes again is not counted
    monkeypatch.setattr(layers, "checkpoint", lambda f, *args, **_: f(*args))
    own = {"n_layers": 2, "window": 64, "cms_updates": "off"} | changes
    c = HopeConfig.preset("nano", model, **own)
    x = tokens(1, 256)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        Hope(c)(x)[0].square().mean().backward()
    counted = (counter.get_total_flops() + 6 * pairs) / x.numel()
    assert flops_per_token(c, x.numel()) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("cms_blocks", [1, 2, 3])
def test_a_second_backward_pass_is_counted_where_cms_levels_learn(cms_blocks, monkeypatch):
    monkeypatch.setattr(layers, "checkpoint", lambda f, *args, **_: f(*args))
    c = HopeConfig.preset("nano", n_layers=3, levels=[64, 128, None], cms_blocks=cms_blocks)
    x = tokens(1, 256)
    added = []
    for updates in ("off", "first_order"):
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            Hope(c)(x, updates=updates)[0].square().mean().backward()
        added.append(counter.get_total_flops() / x.numel())
    once = flops_per_token(dataclasses.replace(c, cms_updates="off"), x.numel())
    assert flops_per_token(c, x.numel()) - once == pytest.approx(added[1] - added[0], rel=0.1)


def test_flops_of_a_transformer_are_the_well_known_ones():
    c = HopeConfig.preset("125m", "transformer")
    matrices = 14 * (4 * 768 * 768 + 3 * 768 * c.hidden) + 768 * 32768
    assert flops_per_token(c, 4096) == pytest.approx(
        6 * matrices + 6 * 14 * 768 * 4097
    )  # half of 12 L d T


@pytest.mark.parametrize("at_once", [1, 50 * 7, 10**9])
def test_the_loss_in_parts_equals_the_loss_of_all_logits(at_once):
    torch.manual_seed(0)
    x = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    table = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (37,))
    whole = F.cross_entropy(x @ table.T, targets)
    parts = linear_cross_entropy(x, table, targets, at_once)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)
    expected = torch.autograd.grad(3 * whole, [x, table])
    torch.testing.assert_close(torch.autograd.grad(3 * parts, [x, table]), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_vocabulary_has_the_same_loss_and_gradients(tied):
    torch.manual_seed(0)
    config = HopeConfig(vocab_size=2**19, d_model=16, n_layers=1, chunk=8, tied=tied, levels=[None])
    model = Hope(config)
    tokens = torch.randint(2**19, (2, 41))
    found = []
    for loss in (
        model(tokens[:, :-1], targets=tokens[:, 1:]),
        loss_fn(model(tokens[:, :-1])[0], tokens[:, 1:]),
    ):
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
