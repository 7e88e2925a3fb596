"""The files of examples/ run and do what they say."""

import importlib

import pytest
import torch
from textbook import close

from examples import layer, rule
from hope import MIXERS, Hope, HopeConfig


@pytest.fixture
def mixer(monkeypatch):
    """The third example, whose mixer is known to this test alone."""
    monkeypatch.setitem(MIXERS, "averages", None)
    return importlib.reload(importlib.import_module("examples.mixer"))


def test_the_layer_in_a_model_of_its_own_learns_to_recall():
    assert layer.main(steps=80) > 0.6  # chance is 1/8


def test_the_rule_of_its_own_reads_best():
    errors = rule.main()
    assert min(errors, key=errors.get) == "averaging"


def test_averages_are_those_of_a_loop(mixer):
    torch.manual_seed(0)
    own = mixer.Averages(4).double()
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    z, gate = own.in_proj(x).chunk(2, -1)
    mean = torch.zeros(2, 4, dtype=torch.float64)
    expected = []
    for t in range(9):
        mean = own.rate.sigmoid() * mean + (1 - own.rate.sigmoid()) * z[:, t]
        expected.append(own.out_proj(torch.nn.functional.silu(gate[:, t]) * mean))
    y, _ = own(x)
    close(y, torch.stack(expected, 1))
    first, state = own(x[:, :5])
    close(torch.cat([first, own(x[:, 5:], state)[0]], 1), y)
    with pytest.raises(ValueError):
        own(x[:1], state)


def test_the_new_mixer_is_a_model_like_all_others(here, mixer):
    sizes = {"n_layers": 2, "d_model": 32, "n_heads": 1}
    small = {"data": "text.py", "tokens": 1024, "seq_len": 64, "batch_size": 2, "set": sizes}
    bits = mixer.main(models=("averages", "deltanet"), **small)
    assert list(bits) == ["averages", "deltanet"] and all(2 < x < 8.1 for x in bits.values())
    counts = {}
    for model in bits:
        made = Hope(HopeConfig(model=model, **sizes))
        counts[model] = sum(p.numel() for p in made.parameters())
        assert len(list(made.generate(torch.tensor([[1, 2]]), 3))) == 3 and made.levels()
    assert counts["averages"] == pytest.approx(counts["deltanet"], rel=0.02)
