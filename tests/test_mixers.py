"""What every mixer owes its caller: causality, exact states, rows of their own, true gradients."""

from itertools import pairwise

import pytest
import torch
from test_titans import VARIANTS, build
from textbook import close

import baselines
from baselines import (
    DLA,
    RWKV7,
    SRWM,
    TTT,
    Attention,
    Comba,
    DeltaNet,
    GatedDeltaNet,
    LinearAttention,
    Mamba,
    Mamba2,
    Memora,
    RetNet,
    TitansMAC,
    TitansMAG,
    TitansMAL,
)
from layers import map_state, tensors
from memory import scan

D = 8
SIZES = (D, 2)  # two heads of width 4
T = 23

MIXERS = {
    "attention": lambda: Attention(*SIZES),
    "attention, convolution": lambda: Attention(*SIZES, conv=4),
    "attention, window 5": lambda: Attention(*SIZES, window=5),
    "attention, window 1": lambda: Attention(*SIZES, window=1),
    "linear attention": lambda: LinearAttention(*SIZES),
    "retnet": lambda: RetNet(*SIZES),
    "deltanet": lambda: DeltaNet(*SIZES),
    "gated deltanet": lambda: GatedDeltaNet(*SIZES),
    "gated deltanet, wide": lambda: GatedDeltaNet(*SIZES, expand=2),
    "comba": lambda: Comba(*SIZES),
    "mamba-2": lambda: Mamba2(*SIZES),
    "rwkv-7": lambda: RWKV7(*SIZES, tile=4),
    "srwm": lambda: SRWM(*SIZES, tile=4),
    "dla": lambda: DLA(*SIZES, chunk=4),
    "memora": lambda: Memora(*SIZES, chunk=4),
    "ttt-linear": lambda: TTT(*SIZES, chunk=4),
    "ttt-mlp": lambda: TTT(*SIZES, chunk=4, depth=2),
    "mamba": lambda: Mamba(D, n=4, tile=8),
    "mac": lambda: TitansMAC(*SIZES, chunk=4, segment=8),
    "mac, one length": lambda: TitansMAC(*SIZES, chunk=5, segment=5, depth=1, conv=0, persistent=1),
    "mac, uneven": lambda: TitansMAC(*SIZES, chunk=7, segment=5),
    "mag": lambda: TitansMAG(*SIZES, chunk=4, window=5),
    "mal": lambda: TitansMAL(*SIZES, chunk=4, window=5),
    "mac, windows": lambda: TitansMAC(*SIZES, chunk=4, segment=6, window_reset=8),
    "mag, windows": lambda: TitansMAG(*SIZES, chunk=4, window=5, window_reset=8),
    "mal, windows": lambda: TitansMAL(*SIZES, chunk=4, window=5, window_reset=8),
}
each_mixer = pytest.mark.parametrize("mixer", [*MIXERS, *VARIANTS], indirect=True)

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def mixer(request):
    name = request.param
    return MIXERS[name]() if name in MIXERS else build(name)


def in_pieces(mixer, x, cuts, state=None):
    outputs = []
    for start, stop in pairwise([0, *cuts, x.shape[1]]):
        y, state = mixer(x[:, start:stop], state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def assert_same_state(a, b, atol=1e-9):
    """Equal trees: keys, numbers, and tensors up to rounding."""
    assert map_state(lambda t: t.shape, a) == map_state(lambda t: t.shape, b)
    for x, y in zip(tensors(a), tensors(b), strict=True):
        close(x, y, atol)


@each_mixer
def test_outputs_depend_on_the_past_and_never_on_the_future(mixer):
    x = torch.randn(2, T, D, requires_grad=True)
    y = mixer(x)[0]
    for t in (0, 1, 4, 5, 8, 15, 20):
        changed = x.detach().clone()
        changed[:, t:] = torch.randn(2, T - t, D) * 10
        other = mixer(changed)[0]
        close(other[:, :t], y[:, :t], 1e-12)
        assert (other[:, t] - y[:, t]).abs().amax(-1).min() > 1e-6  # in both rows
    (gradient,) = torch.autograd.grad(y[:, 6].sum(), x)
    first = 7 - (getattr(mixer, "window", None) or 7)
    assert not gradient[:, :first].any() and not gradient[:, 7:].any()
    assert (gradient[:, first:7].abs().amax(-1) > 0).all()


@each_mixer
def test_cutting_a_sequence_into_calls_changes_no_output_state_or_gradient(mixer):
    x = torch.randn(2, T, D, requires_grad=True)
    weights = torch.randn(2, T, D)
    random_cuts = sorted(set(torch.randint(1, T, (5,)).tolist()))
    found = []
    for cuts in ([], random_cuts, range(1, T)):
        mixer.zero_grad()
        x.grad = None
        y, state = in_pieces(mixer, x, cuts)
        (y * weights).sum().backward()
        found.append((y, state, [x.grad, *[p.grad.clone() for p in mixer.parameters()]]))
    (y, final, gradients), *others = found
    assert final["position"] == T
    on = in_pieces(mixer, x, [3, 9], final)[0]
    for other_y, other_state, other_gradients in others:
        close(other_y, y)
        assert_same_state(other_state, final)
        for a, b in zip(other_gradients, gradients, strict=True):
            close(a, b)
        close(mixer(x, other_state)[0], on)


@each_mixer
def test_a_state_is_a_value_that_can_be_continued_twice(mixer):
    on = torch.randn(2, 9, D)
    for n in (3, 5, 12):
        with torch.no_grad():
            _, state = mixer(torch.randn(2, n, D))
            before = map_state(torch.clone, state)
            first = mixer(on, state)[0]
            second = mixer(on, state)[0]
        assert torch.equal(first, second)
        assert all(map(torch.equal, tensors(before), tensors(state)))
        if getattr(mixer, "window", None) != 1:  # such attention remembers nothing
            assert (mixer(on)[0] - first).abs().max() > 1e-3


@each_mixer
def test_rows_of_a_batch_never_share_a_memory(mixer):
    x = torch.randn(3, 13, D)
    y, state = mixer(x)
    on = mixer(x, state)[0]
    for row in range(3):
        alone, own = mixer(x[row : row + 1])
        close(y[row : row + 1], alone, 1e-12)
        close(on[row : row + 1], mixer(x[row : row + 1], own)[0], 1e-12)
    swapped = map_state(lambda t: t.flip(0), state)
    close(mixer(x.flip(0), swapped)[0].flip(0), on, 1e-12)


@each_mixer
@pytest.mark.slow
def test_gradients_through_the_writes_equal_finite_differences(mixer):
    x = torch.randn(2, 13, D)
    weights = torch.randn(2, 13, D)
    step = 1e-6

    def loss():
        return (mixer(x)[0] * weights).sum()

    loss().backward()
    for name, p in mixer.named_parameters():
        direction = torch.randn_like(p)
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(direction, alpha=sign * step)
                sides.append(loss().item())
                p.sub_(direction, alpha=sign * step)
        slope = (p.grad * direction).sum().item()
        expected = (sides[0] - sides[1]) / (2 * step)
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-6), name


@each_mixer
def test_every_parameter_is_trained_and_every_row_of_every_initial_memory(mixer):
    if getattr(mixer, "window", None) == 1:
        pytest.skip("a softmax over one token trains no queries and keys")
    mixer(torch.randn(2, 13, D))[0].square().sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
        if name.startswith("start"):  # every row but alpha's where it is fixed
            fixed = name == "start" and "log_A" in dict(mixer.named_buffers())
            assert (p.grad.abs().amax(-1) == 0).sum() == fixed * len(p), name


@pytest.mark.parametrize("kind", [DeltaNet, GatedDeltaNet, Comba, Mamba2, RetNet])
def test_matrix_memories_multiply_in_bfloat16_under_autocast(kind, monkeypatch):
    """In float32 their kernels take several times as long."""
    seen = []

    def watched(W, k, u, eta, alpha, q, **options):
        seen.append((W.dtype, k.dtype, u.dtype, q.dtype, eta.dtype, alpha.dtype))
        return scan(W, k, u, eta, alpha, q, **options)

    monkeypatch.setattr(baselines, "scan", watched)
    torch.manual_seed(0)
    mixer = kind(64, 2).float()
    x = torch.randn(2, 40, 64).float()
    exact, _ = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
    wide, narrow = torch.float32, torch.bfloat16
    assert seen == [(wide,) * 6, (wide, narrow, narrow, narrow, wide, wide)]
    assert state["W"].dtype == wide
    assert (y - exact).norm() < 0.02 * exact.norm()
