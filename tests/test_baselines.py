"""The baselines' mixers against textbook loops, and what every mixer owes its caller: causality and exact state."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from baselines import (
    TTT,
    Attention,
    DeltaNet,
    GatedDeltaNet,
    LinearAttention,
    Mamba,
    RetNet,
    TitansMAC,
    TitansMAG,
    TitansMAL,
    delta_net,
    gated_delta_net,
    rotate,
)
from learn import map_state
from memory import l2norm, read

D, H = 16, 2
MIXERS = {
    "attention": lambda: Attention(D, H),
    "attention_conv": lambda: Attention(D, H, conv=4),
    "linear_attention": lambda: LinearAttention(D, H),
    "retnet": lambda: RetNet(D, H),
    "deltanet": lambda: DeltaNet(D, H),
    "gated_deltanet": lambda: GatedDeltaNet(D, H),
    "gated_deltanet_wide": lambda: GatedDeltaNet(D, H, expand=2),
    "ttt_linear": lambda: TTT(D, H, chunk=4),
    "ttt_mlp": lambda: TTT(D, H, chunk=4, depth=2),
    "titans_mac": lambda: TitansMAC(D, H, chunk=4, segment=8),
    "titans_mac_one_length": lambda: TitansMAC(D, H, chunk=5, segment=5, depth=1, conv=0, persistent=1),
    "titans_mac_uneven": lambda: TitansMAC(D, H, chunk=7, segment=5),
    "titans_mag": lambda: TitansMAG(D, H, chunk=4, window=5),
    "titans_mal": lambda: TitansMAL(D, H, chunk=4, window=5),
    "mamba": lambda: Mamba(D, n=4, tile=8),
    "attention_window": lambda: Attention(D, H, window=5),
    "attention_window_one": lambda: Attention(D, H, window=1),
}
each_mixer = pytest.mark.parametrize("mixer", MIXERS, indirect=True)


pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def mixer(request):
    return MIXERS[request.param]()


def in_pieces(mixer, x, cuts):
    ys, state = [], None
    for start, stop in pairwise([0, *cuts, x.shape[1]]):
        y, state = mixer(x[:, start:stop], state)
        ys.append(y)
    return torch.cat(ys, dim=1), state


def tensors(state):
    out = []
    map_state(out.append, state)
    return out


def check_cuts(mixer, x, cuts):
    whole, final = mixer(x)
    pieces, state = in_pieces(mixer, x, cuts)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-9)
    assert state.keys() == final.keys() and state["position"] == x.shape[1]
    for a, b in zip(tensors(state), tensors(final), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def rope_by_hand(x, t, base):
    """x [dk] turned by the angles of position t, pair by pair."""
    out = torch.empty_like(x)
    for i in range(0, len(x), 2):
        angle = t * base ** (-i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + 1] * math.sin(angle)
        out[i + 1] = x[i] * math.sin(angle) + x[i + 1] * math.cos(angle)
    return out


def attention_by_hand(mixer, x, qkv, hidden=None):
    """Softmax attention with RoPE, query by query, from the projections qkv [B, T, 3 d]; hidden [T, T]: keys not to be seen."""
    B, T, d = x.shape
    w = d // mixer.n_heads
    y = torch.zeros(B, T, d)
    for b in range(B):
        for h in range(mixer.n_heads):
            q, k, v = (qkv[b, :, i * d + h * w : i * d + (h + 1) * w] for i in range(3))
            for t in range(T):
                query = rope_by_hand(q[t], t, mixer.rope_base)
                keys = torch.stack([rope_by_hand(k[s], s, mixer.rope_base) for s in range(t + 1)])
                scores = keys @ query / math.sqrt(w)
                if hidden is not None:
                    scores = scores.masked_fill(hidden[t, : t + 1], -math.inf)
                y[b, t, h * w : (h + 1) * w] = torch.softmax(scores, dim=0) @ v[: t + 1]
    return y @ mixer.out.weight.T


@pytest.mark.parametrize("base", [10000.0, 50.0])
def test_attention_is_softmax_over_the_past_with_rotated_keys(base):
    mixer, x = Attention(D, H, rope_base=base), torch.randn(2, 7, D)
    y, state = mixer(x)
    torch.testing.assert_close(y, attention_by_hand(mixer, x, x @ mixer.qkv.weight.T), rtol=0, atol=1e-10)
    assert state["position"] == 7 and state["k"].shape == state["v"].shape == (2, H, 7, D // H)


def test_convolution_of_attention_acts_on_queries_keys_and_values():
    mixer, x = Attention(D, H, conv=3), torch.randn(2, 7, D)
    qkv, _ = mixer.conv(x @ mixer.qkv.weight.T)
    torch.testing.assert_close(mixer(x)[0], attention_by_hand(mixer, x, qkv), rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [1, 3, 7, 50])
def test_attention_in_a_window_sees_only_the_last_tokens(window):
    mixer, x = Attention(D, H, window=window), torch.randn(2, 17, D)
    y, state = mixer(x)
    hidden = torch.ones(17, 17, dtype=torch.bool).tril(-window) | torch.ones(17, 17, dtype=torch.bool).triu(1)
    expected = attention_by_hand(mixer, x, x @ mixer.qkv.weight.T, hidden)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    assert state["k"].shape == state["v"].shape == (2, H, min(17, window - 1), D // H)


def core_by_hand(core, x, t, seen, extra=()):
    """What the attention core of MAC, MAG, MAL reads at token t of x [T, d]: softmax over the persistent tokens, which have no
    position, the tokens `seen` and, for MAC, the pairs (what memory said, position) of `extra`."""
    w, y = D // H, torch.zeros(D)
    Wq, Wk, Wv = core.qkv.weight.chunk(3)
    for h in range(H):
        head = slice(h * w, (h + 1) * w)
        q = (Wq @ x[t])[head]
        turned = rope_by_hand(q, t, 10000.0)
        scores = [q @ (Wk @ p)[head] for p in core.persistent]
        values = [(Wv @ p)[head] for p in core.persistent]
        for z, s in [*extra, *((x[s], s) for s in seen)]:
            scores.append(turned @ rope_by_hand((Wk @ z)[head], s, 10000.0))
            values.append((Wv @ z)[head])
        y[head] = torch.softmax(torch.stack(scores) / math.sqrt(w), dim=0) @ torch.stack(values)
    return core.out.weight @ y


def gated(norm, seen, learned):
    return seen / torch.sqrt(seen.square().mean() + 1e-6) * norm.weight * F.silu(learned)


@torch.no_grad()
def test_mag_and_mal_put_window_attention_beside_and_above_the_memory():
    x, window = torch.randn(1, 12, D), 5
    mag, mal = TitansMAG(D, H, chunk=4, window=window), TitansMAL(D, H, chunk=4, window=window)
    near = lambda t: range(max(0, t - window + 1), t + 1)  # noqa: E731
    learned = mag.memory(x)[0][0]
    expected = [gated(mag.norm, core_by_hand(mag.attention, x[0], t, near(t)), learned[t]) for t in range(12)]
    torch.testing.assert_close(mag(x)[0][0], torch.stack(expected) @ mag.out.weight.T, rtol=0, atol=1e-10)
    z = x[0] + mal.memory(x)[0][0]
    expected = [core_by_hand(mal.attention, z, t, near(t)) for t in range(12)]
    torch.testing.assert_close(mal(x)[0][0], torch.stack(expected), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("chunk, segment", [(4, 8), (5, 5), (3, 4)])
def test_mac_retrieves_then_attends_then_writes(chunk, segment):
    """Token by token: h from the memory of the last chunk boundary, attention within the segment, then the memory learns y."""
    mac, x = TitansMAC(D, H, chunk=chunk, segment=segment), torch.randn(1, 14, D)
    memory, told, expected = mac.memory.start_state(1), [], []
    Wq = mac.memory.in_proj.weight[:D]
    for t in range(14):
        if t % chunk == 0:
            boundary = memory["running"]
        q = F.silu(Wq @ x[0, t]).view(1, H, 1, D // H)
        h = read(boundary, l2norm(q))[0, :, 0]
        told.append(((h / torch.sqrt(h.square().mean(-1, keepdim=True) + 1e-6) * mac.memory.norm.weight).flatten(), t))
        start = t - t % segment
        seen = core_by_hand(mac.attention, x[0], t, range(start, t + 1), told[start:])
        learned, memory = mac.memory(seen.view(1, 1, D), memory)
        expected.append(gated(mac.norm, seen, learned[0, 0]))
    torch.testing.assert_close(mac(x)[0][0], torch.stack(expected) @ mac.out.weight.T, rtol=0, atol=1e-10)


def test_rope_scores_depend_on_relative_distance_only():
    q, k = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 8)
    score = lambda t, s: (rotate(q, t) * rotate(k, s)).sum(-1)  # noqa: E731
    torch.testing.assert_close(score(9, 4), score(1_000_005, 1_000_000), rtol=0, atol=1e-8)
    assert (score(9, 4) - score(9, 5)).abs().max() > 1e-3
    torch.testing.assert_close(rotate(q, 1234).norm(dim=-1), q.norm(dim=-1))


def test_rope_is_exact_far_from_the_start_in_float32():
    x = torch.randn(1, 1, 1, 64, dtype=torch.float32)
    far = 10_000_000
    torch.testing.assert_close(rotate(x, far).double(), rotate(x.double(), far), rtol=0, atol=1e-5)
    assert rotate(x.bfloat16(), far).dtype == torch.bfloat16


def test_rotations_first_used_in_inference_mode_serve_training():
    mixer, x = Attention(D, H, rope_base=123.0), torch.randn(1, 5, D)
    with torch.inference_mode():
        mixer(x)
    mixer(x)[0].sum().backward()
    assert mixer.qkv.weight.grad.abs().max() > 0


def unit(z):
    return z / torch.sqrt(z @ z + 1e-6)


def by_hand(mixer, x, step, normalize):
    """The output and the final memories of a recurrent baseline, one head and one token at a time.

    step(h, t, S, q, k, v, rates) -> S, and the read S q; q and k come as projected, rates are the token's, one per kind.
    """
    B, T, _ = x.shape
    dk, dv = D // H, mixer.out.in_features // H
    split = [D, D, H * dv, H * dv if mixer.gate else 0]
    z = x @ mixer.proj.weight.T
    qkv, gate, rates = z.split([2 * D + H * dv, split[3], z.shape[-1] - sum(split)], dim=-1)
    if mixer.conv is not None:
        qkv, _ = mixer.conv(qkv)
    q, k, v = qkv.split(split[:3], dim=-1)
    y, finals = torch.zeros(B, T, H * dv), torch.zeros(B, H, dv, dk)
    for b in range(B):
        for h in range(H):
            S, keys, values = torch.zeros(dv, dk), slice(h * dk, (h + 1) * dk), slice(h * dv, (h + 1) * dv)
            for t in range(T):
                S, read = step(h, t, S, q[b, t, keys], k[b, t, keys], v[b, t, values], rates[b, t, h::H])
                y[b, t, values] = normalize(read) * (F.silu(gate[b, t, values]) if mixer.gate else 1)
            finals[b, h] = S
    return y @ mixer.out.weight.T, finals


def test_linear_attention_is_a_weighted_mean_with_weights_of_elu_plus_one():
    mixer, x = LinearAttention(D, H), torch.randn(2, 9, D)
    q, k, v = (z.unflatten(-1, (H, -1)).transpose(1, 2) for z in (x @ mixer.proj.weight.T).chunk(3, -1))
    phi = lambda z: torch.where(z > 0, z + 1, z.exp())  # noqa: E731
    weights = (phi(q) @ phi(k).mT).tril()
    y = (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer(x)[0], y @ mixer.out.weight.T, rtol=0, atol=1e-10)


def retnet_by_hand(mixer, x):
    """As in the RetNet paper: S_n = gamma S_{n-1} + v_n (R_n k_n)^T / sqrt(d), group norm, swish gate."""

    def step(h, t, S, q, k, v, rates):
        S = (1 - 2 ** -(5 + h)) * S + torch.outer(v, rope_by_hand(k, t, 10000.0)) / math.sqrt(len(k))
        return S, S @ rope_by_hand(q, t, 10000.0)

    return by_hand(mixer, x, step, lambda read: (read - read.mean()) / torch.sqrt(read.var(correction=0) + 1e-6))


def rms(mixer):
    return lambda read: read / torch.sqrt((read**2).mean() + 1e-6) * mixer.norm.weight


def deltanet_by_hand(mixer, x):
    """As in the DeltaNet paper: S_t = S_{t-1} - beta (S_{t-1} k - v) k^T."""

    def step(h, t, S, q, k, v, rates):
        S = S - torch.sigmoid(rates[0]) * torch.outer(S @ unit(k) - v, unit(k))
        return S, S @ unit(q)

    return by_hand(mixer, x, step, rms(mixer))


def gated_deltanet_by_hand(mixer, x):
    """As in the Gated DeltaNet paper: S_t = S_{t-1} alpha (I - beta k k^T) + beta v k^T."""

    def step(h, t, S, q, k, v, rates):
        k, beta = unit(k), 1 / (1 + torch.exp(-rates[0]))
        alpha = torch.exp(-torch.exp(mixer.log_A[h]) * torch.log1p(torch.exp(rates[1] + mixer.dt_bias[h])))
        S = S @ (alpha * (torch.eye(len(k)) - beta * torch.outer(k, k))) + beta * torch.outer(v, k)
        return S, S @ unit(q)

    return by_hand(mixer, x, step, rms(mixer))


BY_HAND = [(RetNet, retnet_by_hand), (DeltaNet, deltanet_by_hand), (GatedDeltaNet, gated_deltanet_by_hand)]


@pytest.mark.parametrize("kind, recurrence", BY_HAND)
@pytest.mark.parametrize("T, conv, expand", [(1, 4, 1), (13, 4, 1), (13, 0, 2), (70, 3, 2)])
def test_recurrent_baselines_are_their_textbook_recurrences(kind, recurrence, T, conv, expand):
    mixer, x = kind(D, H, conv=conv, expand=expand), torch.randn(2, T, D)
    with torch.no_grad():
        if kind is not RetNet:
            mixer.norm.weight.uniform_(0.5, 1.5)
        y, state = mixer(x)
        expected, S = recurrence(mixer, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(state["W"], S, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [DeltaNet, GatedDeltaNet])
def test_delta_rules_equal_the_naive_references_of_flash_linear_attention(kind):
    naive = pytest.importorskip("fla.ops.delta_rule.naive", reason="flash-linear-attention is not installed")
    gated = pytest.importorskip("fla.ops.gated_delta_rule.naive", reason="flash-linear-attention is not installed")
    B, T, d = 2, 13, 8
    q, k, v = torch.randn(B, H, T, d), l2norm(torch.randn(B, H, T, d)), torch.randn(B, H, T, d)
    beta, alpha = torch.rand(B, H, T), torch.rand(B, H, T)
    if kind is DeltaNet:
        ours = delta_net(q * d**-0.5, k, v, beta)[0]
        theirs = naive.delta_rule_recurrence(q, k, v, beta)[0]
    else:
        ours = gated_delta_net(q * d**-0.5, k, v, beta, alpha)[0].transpose(1, 2)
        swapped = [z.transpose(1, 2) for z in (q, k, v, beta, alpha.log())]
        theirs = gated.naive_recurrent_gated_delta_rule(*swapped)[0]
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=1e-5)  # theirs computes in float32


def test_every_head_of_retnet_forgets_half_as_fast_as_the_one_before():
    mixer, x = RetNet(64, 4), torch.zeros(1, 2, 64)
    x[:, 0] = torch.randn(64)
    first, second = mixer(x[:, :1])[1]["W"], mixer(x)[1]["W"]
    forgotten = 1 - second.flatten(2).norm(dim=2) / first.flatten(2).norm(dim=2)
    torch.testing.assert_close(forgotten, torch.tensor([[2**-5, 2**-6, 2**-7, 2**-8]]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("T, chunk, depth", [(1, 4, 1), (13, 4, 1), (13, 16, 1), (13, 1, 2), (11, 4, 2)])
def test_ttt_descends_the_gradient_of_its_paper(T, chunk, depth):
    """W_t = W_{t-1} - eta_t grad |f(k_t; W_boundary) - v_t|^2 / 2 by autograd, and y_t = f(q_t; W_t), token by token."""
    mixer, x, w = TTT(D, H, chunk=chunk, depth=depth), torch.randn(2, T, D), D // H
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        y, state = mixer(x)
    qkv, gate, rates = (x @ mixer.proj.weight.T).split([3 * D, D, H], dim=-1)
    qkv, _ = mixer.conv(qkv)
    expected = torch.zeros(2, T, D)
    for b in range(2):
        for h in range(H):

            def f(z, layers):
                out = z
                for i, (W, bias) in enumerate(layers):
                    out = W @ (F.gelu(out) if i else out) + bias
                out = (out - out.mean()) / torch.sqrt(out.var(correction=0) + 1e-6)
                return z + out * mixer.scale[h, 0] + mixer.shift[h, 0]  # noqa: B023

            layers = [(W[h, :, :-1].detach(), W[h, :, -1].detach()) for W in mixer.start]
            for t in range(T):
                if t % chunk == 0:
                    boundary = [tuple(p.clone().requires_grad_() for p in layer) for layer in layers]
                q, k, v = (qkv[b, t, i * D + h * w : i * D + (h + 1) * w].detach() for i in range(3))
                flat = [p for layer in boundary for p in layer]
                gradient = iter(torch.autograd.grad((f(k, boundary) - v).square().sum() / 2, flat))
                inputs = [k, F.gelu(boundary[0][0] @ k + boundary[0][1])]
                eta = (1.0 if depth == 1 else 0.1) * torch.sigmoid(rates[b, t, h] + mixer.b_eta[h, 0]) / chunk
                steps = [eta / (z @ z + 1) for z in inputs[:depth]]
                layers = [tuple(p - s * next(gradient) for p in layer) for layer, s in zip(layers, steps, strict=True)]
                out = f(q, layers)
                out = out / torch.sqrt(out.square().mean() + 1e-6) * mixer.norm.weight
                expected[b, t, h * w : (h + 1) * w] = out * F.silu(gate[b, t, h * w : (h + 1) * w])
            for W, (matrix, bias) in zip(state["running"], layers, strict=True):
                torch.testing.assert_close(W[b, h], torch.cat([matrix, bias[:, None]], 1), rtol=0, atol=1e-10)
    torch.testing.assert_close(y, (expected @ mixer.out.weight.T).detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_memory_of_ttt_stays_bounded_on_a_repeated_token(depth):
    mixer = TTT(64, 1, depth=depth).float()
    x = torch.randn(1, 1, 64, dtype=torch.float32).repeat(1, 2000, 1) * 10
    with torch.no_grad():
        mixer.b_eta.fill_(10.0)  # the longest step
        y, state = mixer(x)
    assert y.isfinite().all() and y[:, 1000:].std(1).max() < 0.1 * y.std()  # it settles
    for W, start in zip(state["running"], mixer.start, strict=True):
        assert (W - start).norm() < 10 * start.norm()


@pytest.mark.parametrize("T, tile", [(1, 64), (13, 4), (20, 64)])
def test_mamba_is_its_textbook_recurrence(T, tile):
    """Channel by channel and state by state: h_t = exp(dt A) h_{t-1} + dt B x, y_t = C h_t + D x."""
    mixer, x = Mamba(D, n=3, tile=tile), torch.randn(2, T, D)
    with torch.no_grad():
        y, state = mixer(x)
        z, gate = (x @ mixer.proj.weight.T).chunk(2, dim=-1)
        z, _ = mixer.conv(z)
        low, b, c = (z @ mixer.rates.weight.T).split([1, 3, 3], dim=-1)
        dt = torch.log1p(torch.exp(low @ mixer.dt_proj.weight.T + mixer.dt_bias))
        expected, h = torch.zeros(2, T, 2 * D), torch.zeros(2, 2 * D, 3)
        for row in range(2):
            for channel in range(2 * D):
                for t in range(T):
                    now, step = z[row, t, channel], dt[row, t, channel]
                    for i in range(3):
                        decay = torch.exp(-step * torch.exp(mixer.log_A[channel, i]))
                        h[row, channel, i] = decay * h[row, channel, i] + step * b[row, t, i] * now
                    expected[row, t, channel] = c[row, t] @ h[row, channel] + mixer.D[channel] * now
        expected = (expected * F.silu(gate)) @ mixer.out.weight.T
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(state["h"], h, rtol=0, atol=1e-10)


def test_gated_deltanet_starts_with_retention_close_to_one():
    mixer = GatedDeltaNet(1024, 512)
    dt, A = F.softplus(mixer.dt_bias), mixer.log_A.exp()
    assert 1e-3 * 0.999 <= dt.min() and dt.max() <= 1e-1 * 1.001 and dt.log().std() > 1
    assert A.min() >= 1 and A.max() <= 16 and A.mean().item() == pytest.approx(8.5, abs=0.5)
    assert torch.exp(-A * dt).max() > 0.99


def test_gated_deltanet_survives_complete_forgetting():
    mixer, x = GatedDeltaNet(D, H).float(), torch.randn(1, 40, D, dtype=torch.float32)
    with torch.no_grad():
        mixer.dt_bias.fill_(1000.0)  # alpha underflows to 0 in float32
    y, state = mixer(x)
    y.sum().backward()
    assert y.isfinite().all() and state["W"].isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@each_mixer
def test_future_tokens_never_change_past_outputs(mixer):
    x = torch.randn(2, 21, D)
    y = mixer(x)[0]
    for t in (1, 8, 15, 20):
        changed = x.clone()
        changed[:, t] = torch.randn(2, D) * 10
        other = mixer(changed)[0]
        assert (y[:, :t] - other[:, :t]).abs().max() < 1e-12
        assert (y[:, t] - other[:, t]).abs().max() > 1e-6


@each_mixer
def test_outputs_have_no_gradient_from_the_future(mixer):
    x = torch.randn(1, 12, D, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer(x)[0][:, 6].sum(), x)
    first = 7 - (getattr(mixer, "window", None) or 7)
    assert (grad[:, 7:] == 0).all() and (grad[:, :first] == 0).all() and (grad[:, first:7].abs().amax(-1) > 0).all()


@each_mixer
def test_rows_of_a_batch_are_independent(mixer):
    x = torch.randn(3, 9, D)
    y = mixer(x)[0]
    for b in range(3):
        torch.testing.assert_close(mixer(x[b : b + 1])[0], y[b : b + 1], rtol=0, atol=1e-12)


@each_mixer
@pytest.mark.parametrize("seed", range(3))
def test_cutting_a_sequence_into_calls_changes_nothing(mixer, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 37, D)
    cuts = sorted(set(torch.randint(1, 37, (5,), generator=g).tolist()))
    check_cuts(mixer, x, cuts)


@each_mixer
def test_one_token_at_a_time_changes_nothing(mixer):
    check_cuts(mixer, torch.randn(2, 19, D), list(range(1, 19)))


@each_mixer
def test_a_state_is_a_value(mixer):
    """Continuing twice from one state gives the same answer twice: a call writes into nothing it was given."""
    x = torch.randn(2, 11, D)
    _, state = mixer(x[:, :5])
    before = [z.clone() for z in tensors(state)]
    first, second = mixer(x[:, 5:], state)[0], mixer(x[:, 5:], state)[0]
    assert torch.equal(first, second)
    assert all(map(torch.equal, tensors(state), before))


@each_mixer
def test_gradient_flows_through_the_state_into_the_first_piece(mixer):
    x = torch.randn(1, 10, D, requires_grad=True)
    whole = torch.autograd.grad(mixer(x)[0][:, 6:].square().sum(), x)[0]
    pieces = torch.autograd.grad(in_pieces(mixer, x, [6])[0][:, 6:].square().sum(), x)[0]
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-9)


@each_mixer
def test_every_parameter_is_trained(mixer):
    if getattr(mixer, "window", None) == 1:
        pytest.skip("a softmax over one token trains no queries and keys")
    mixer(torch.randn(2, 9, D))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in mixer.parameters())


def test_memory_of_attention_grows_and_that_of_gated_deltanet_does_not():
    def numbers(mixer, T):
        state = mixer(torch.randn(1, T, D))[1]
        return sum(z.untyped_storage().nbytes() // z.itemsize for z in state.values() if torch.is_tensor(z))

    attention, gated = Attention(D, H), GatedDeltaNet(D, H)
    assert [numbers(attention, T) for T in (8, 32)] == [2 * 8 * D, 2 * 32 * D]
    assert gated(torch.randn(1, 8, D))[1]["W"].numel() == gated(torch.randn(1, 32, D))[1]["W"].numel() == D * D // H


@pytest.mark.parametrize("kind", [Attention, GatedDeltaNet])
def test_out_scale_scales_only_the_output_projection(kind):
    mixer = kind(256, 4, out_scale=0.25)
    assert mixer.out.weight.std().item() == pytest.approx(0.25 / 16, rel=0.02)
    first = mixer.qkv if kind is Attention else mixer.proj
    assert first.weight.std().item() == pytest.approx(1 / 16, rel=0.02)


@pytest.mark.parametrize(
    "make_it, message",
    [
        (lambda: Attention(16, 3), r"d_model is 16, n_heads is 3"),
        (lambda: GatedDeltaNet(16, 0), r"n_heads is 0"),
        (lambda: Attention(15, 3), r"head width is 5 .*even"),
        (lambda: RetNet(16, 2, expand=0), r"expand is 0.*at least 1"),
        (lambda: Attention(16, 2, window=0), r"window is 0.*at least 1"),
        (lambda: TTT(16, 2, chunk=0), r"chunk is 0.*at least 1"),
        (lambda: TTT(16, 2, depth=3), r"depth is 3.*1 \(TTT-Linear\) or 2"),
        (lambda: TitansMAC(16, 2, segment=0), r"segment is 0.*at least 1"),
    ],
)
def test_bad_input_is_named_with_its_value_and_the_legal_range(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()
