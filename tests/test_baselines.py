"""The rivals' mixers against the loops of their own papers, one row, head and token at a time.

What they share with every mixer (causality, state, gradients) is in test_mixers.py.
"""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from textbook import close, rms, unit

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
    delta_net,
    gated_delta_net,
    rotate,
    scan_by_channel,
)
from layers import tensors
from memory import l2norm, read

D = 16
H = 2
W = D // H  # head width

pytestmark = pytest.mark.usefixtures("float64")

# --------------------------------------------------------------------------------------------------
# Attention


def rope_by_hand(x, t, base=10000.0):
    """x [dk] turned by the angles of position t, pair by pair."""
    out = torch.empty_like(x)
    for i in range(0, len(x), 2):
        angle = t * base ** (-i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + 1] * math.sin(angle)
        out[i + 1] = x[i] * math.sin(angle) + x[i + 1] * math.cos(angle)
    return out


def attention_by_hand(mixer, qkv, window=math.inf):
    """Softmax attention with RoPE, query by query, from the projections qkv [B, T, 3 d]."""
    B, T, _ = qkv.shape
    base = mixer.rope_base
    y = torch.zeros(B, T, D)
    for b, h, t in product(range(B), range(H), range(T)):
        q, k, v = (qkv[b, :, i * D + h * W :][:, :W] for i in range(3))
        seen = [s for s in range(t + 1) if t - s < window]
        keys = torch.stack([rope_by_hand(k[s], s, base) for s in seen])
        scores = keys @ rope_by_hand(q[t], t, base) / math.sqrt(W)
        y[b, t, h * W : (h + 1) * W] = torch.softmax(scores, 0) @ v[seen]
    return y @ mixer.out.weight.T


@pytest.mark.parametrize("base", [10000.0, 50.0])
def test_attention_is_softmax_over_the_past_with_rotated_keys(base):
    mixer = Attention(D, H, rope_base=base)
    x = torch.randn(2, 7, D)
    y, state = mixer(x)
    close(y, attention_by_hand(mixer, x @ mixer.qkv.weight.T), 1e-10)
    assert state["position"] == 7 and state["k"].shape == state["v"].shape == (2, H, 7, W)


def test_convolution_of_attention_acts_on_queries_keys_and_values():
    mixer = Attention(D, H, conv=3)
    x = torch.randn(2, 7, D)
    qkv, _ = mixer.conv(x @ mixer.qkv.weight.T)
    close(mixer(x)[0], attention_by_hand(mixer, qkv), 1e-10)


@pytest.mark.parametrize("window", [1, 3, 7, 50])
def test_attention_in_a_window_sees_only_the_last_tokens(window):
    mixer = Attention(D, H, window=window)
    x = torch.randn(2, 17, D)
    y, state = mixer(x)
    close(y, attention_by_hand(mixer, x @ mixer.qkv.weight.T, window), 1e-10)
    assert state["k"].shape == state["v"].shape == (2, H, min(17, window - 1), W)


def test_rope_scores_depend_on_relative_distance_only():
    q = torch.randn(1, 1, 3, 8)
    k = torch.randn(1, 1, 3, 8)

    def score(t, s):
        return (rotate(q, t) * rotate(k, s)).sum(-1)

    close(score(9, 4), score(1_000_005, 1_000_000), 1e-8)
    assert (score(9, 4) - score(9, 5)).abs().max() > 1e-3
    torch.testing.assert_close(rotate(q, 1234).norm(dim=-1), q.norm(dim=-1))


def test_rope_is_exact_far_from_the_start_in_float32():
    x = torch.randn(1, 1, 1, 64, dtype=torch.float32)
    far = 10_000_000
    close(rotate(x, far).double(), rotate(x.double(), far), 1e-5)
    assert rotate(x.bfloat16(), far).dtype == torch.bfloat16


def test_rotations_first_used_in_inference_mode_serve_training():
    mixer = Attention(D, H, rope_base=123.0)
    x = torch.randn(1, 5, D)
    with torch.inference_mode():
        mixer(x)
    mixer(x)[0].sum().backward()
    assert mixer.qkv.weight.grad.abs().max() > 0


def test_memory_of_attention_grows_and_that_of_gated_deltanet_does_not():
    def numbers(mixer, T):
        state = tensors(mixer(torch.randn(1, T, D))[1])
        return sum(t.untyped_storage().nbytes() // t.itemsize for t in state)

    assert [numbers(Attention(D, H), T) for T in (8, 32)] == [2 * 8 * D, 2 * 32 * D]
    gated = GatedDeltaNet(D, H)
    assert numbers(gated, 8) == numbers(gated, 32)
    assert gated(torch.randn(1, 8, D))[1]["W"].numel() == H * W * W


# --------------------------------------------------------------------------------------------------
# Titans MAC, MAG, MAL


def core_by_hand(core, x, t, seen, extra=()):
    """What the attention core of MAC, MAG, MAL reads at token t of x [T, d].

    Softmax over the persistent tokens, which have no position, the tokens `seen` and, for MAC, the
    pairs (what memory said, position) of `extra`.
    """
    y = torch.zeros(D)
    Wq, Wk, Wv = core.qkv.weight.chunk(3)
    for h in range(H):
        head = slice(h * W, (h + 1) * W)
        q = (Wq @ x[t])[head]
        turned = rope_by_hand(q, t)
        scores = [q @ (Wk @ p)[head] for p in core.persistent]
        values = [(Wv @ p)[head] for p in core.persistent]
        for z, s in [*extra, *((x[s], s) for s in seen)]:
            scores.append(turned @ rope_by_hand((Wk @ z)[head], s))
            values.append((Wv @ z)[head])
        y[head] = torch.softmax(torch.stack(scores) / math.sqrt(W), 0) @ torch.stack(values)
    return core.out.weight @ y


@torch.no_grad()
def test_mag_gates_attention_in_a_window_with_the_memory():
    mag = TitansMAG(D, H, chunk=4, window=5)
    x = torch.randn(1, 12, D)
    learned = mag.memory(x)[0][0]
    expected = []
    for t in range(12):
        seen = core_by_hand(mag.attention, x[0], t, range(max(0, t - 4), t + 1))
        expected.append(rms(seen, mag.norm.weight) * F.silu(learned[t]))
    close(mag(x)[0][0], torch.stack(expected) @ mag.out.weight.T, 1e-10)


@torch.no_grad()
def test_mal_attends_in_a_window_to_tokens_with_what_the_memory_said():
    mal = TitansMAL(D, H, chunk=4, window=5)
    x = torch.randn(1, 12, D)
    z = x[0] + mal.memory(x)[0][0]
    expected = []
    for t in range(12):
        expected.append(core_by_hand(mal.attention, z, t, range(max(0, t - 4), t + 1)))
    close(mal(x)[0][0], torch.stack(expected), 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("chunk, segment", [(4, 8), (5, 5), (3, 4)])
def test_mac_retrieves_then_attends_then_writes(chunk, segment):
    """h is of the memory's last chunk boundary, attention of the segment; then memory learns y."""
    mac = TitansMAC(D, H, chunk=chunk, segment=segment)
    x = torch.randn(1, 14, D)
    memory = mac.memory.start_state(1)
    Wq = mac.memory.in_proj.weight[:D]
    said = []
    expected = []
    for t in range(14):
        if t % chunk == 0:
            boundary = memory["running"]
        q = F.silu(Wq @ x[0, t]).view(1, H, 1, W)
        h = read(boundary, l2norm(q))[0, :, 0]  # [H, W]
        h = torch.cat([rms(head, mac.memory.norm.weight) for head in h])
        said.append((h, t))
        start = t - t % segment
        seen = core_by_hand(mac.attention, x[0], t, range(start, t + 1), said[start:])
        learned, memory = mac.memory(seen.view(1, 1, D), memory)
        expected.append(rms(seen, mac.norm.weight) * F.silu(learned[0, 0]))
    close(mac(x)[0][0], torch.stack(expected) @ mac.out.weight.T, 1e-10)


# --------------------------------------------------------------------------------------------------
# Matrix memories


def by_hand(mixer, x, step, normalize, squash=F.silu):
    """Output and final memories of a matrix memory.

    step(h, t, S, q, k, v, rates) -> (S, the read S q); q, k, v [d] as projected, rates the token's,
    one per kind.
    """
    B, T, _ = x.shape
    dv = mixer.out_proj.in_features // H
    gated = mixer.sizes[3] > 0
    qkv, gate, rates = (x @ mixer.in_proj.weight.T).split(
        [2 * D + H * dv, H * dv if gated else 0, mixer.sizes[4]], -1
    )
    if mixer.conv is not None:
        qkv, _ = mixer.conv(qkv)
    q, k, v = qkv.split([D, D, H * dv], -1)
    y = torch.zeros(B, T, H * dv)
    finals = torch.zeros(B, H, dv, W)
    for b, h in product(range(B), range(H)):
        S = torch.zeros(dv, W)
        key = slice(h * W, (h + 1) * W)
        value = slice(h * dv, (h + 1) * dv)
        for t in range(T):
            now = (q[b, t, key], k[b, t, key], v[b, t, value], rates[b, t, h::H])
            S, out = step(h, t, S, *now)
            y[b, t, value] = normalize(out) * (squash(gate[b, t, value]) if gated else 1)
        finals[b, h] = S
    return y @ mixer.out_proj.weight.T, finals


def test_linear_attention_is_a_weighted_mean_with_weights_of_elu_plus_one():
    mixer = LinearAttention(D, H)
    x = torch.randn(2, 9, D)
    qkv = (x @ mixer.in_proj.weight.T).chunk(3, -1)
    q, k, v = (z.unflatten(-1, (H, -1)).transpose(1, 2) for z in qkv)

    def phi(z):
        return torch.where(z > 0, z + 1, z.exp())

    weights = (phi(q) @ phi(k).mT).tril()
    y = (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)
    close(mixer(x)[0], y @ mixer.out_proj.weight.T, 1e-10)


def retnet_by_hand(mixer, x):
    """The RetNet paper: S_n = gamma S_{n-1} + v_n (R_n k_n)^T / sqrt(d), group norm, swish gate."""

    def step(h, t, S, q, k, v, rates):
        S = (1 - 2 ** -(5 + h)) * S + torch.outer(v, rope_by_hand(k, t)) / math.sqrt(W)
        return S, S @ rope_by_hand(q, t)

    def group_norm(out):
        return (out - out.mean()) / torch.sqrt(out.var(correction=0) + 1e-6)

    return by_hand(mixer, x, step, group_norm)


def deltanet_by_hand(mixer, x):
    """The DeltaNet paper: S_t = S_{t-1} - beta (S_{t-1} k - v) k^T."""

    def step(h, t, S, q, k, v, rates):
        S = S - torch.sigmoid(rates[0]) * torch.outer(S @ unit(k) - v, unit(k))
        return S, S @ unit(q)

    return by_hand(mixer, x, step, lambda out: rms(out, mixer.norm.weight))


def dt_and_alpha(mixer, h, rate):
    """Mamba-2: the step softplus(x w + bias), the retention exp(-A step)."""
    dt = torch.log1p(torch.exp(rate + mixer.dt_bias[h]))
    return dt, torch.exp(-torch.exp(mixer.log_A[h]) * dt)


def gated_deltanet_by_hand(mixer, x):
    """The Gated DeltaNet paper: S_t = S_{t-1} alpha (I - beta k k^T) + beta v k^T."""

    def step(h, t, S, q, k, v, rates):
        k = unit(k)
        beta = 1 / (1 + torch.exp(-rates[0]))
        _, alpha = dt_and_alpha(mixer, h, rates[1])
        kept = alpha * (torch.eye(W) - beta * torch.outer(k, k))
        S = S @ kept + beta * torch.outer(v, k)
        return S, S @ unit(q)

    return by_hand(mixer, x, step, lambda out: rms(out, mixer.norm.weight))


def comba_by_hand(mixer, x):
    """The Comba paper: S_t = alpha S_{t-1} + beta (v - alpha S_{t-1} p) k^T, p = b k."""

    def step(h, t, S, q, k, v, rates):
        k = unit(k)
        p = torch.sigmoid(mixer.b[h]) * k
        _, alpha = dt_and_alpha(mixer, h, rates[1])
        S = alpha * S + torch.sigmoid(rates[0]) * torch.outer(v - alpha * S @ p, k)
        return S, S @ (unit(q) - mixer.D[h, 0] * p)

    return by_hand(mixer, x, step, lambda out: rms(out, mixer.norm.weight), torch.sigmoid)


def mamba2_by_hand(mixer, x):
    """The Mamba-2 paper: h_t = exp(-A dt) h_{t-1} + dt x B^T, y_t = h_t C + D x."""

    def step(h, t, S, q, k, v, rates):
        dt, alpha = dt_and_alpha(mixer, h, rates[0])
        S = alpha * S + dt * torch.outer(v, k)
        return S, S @ q + mixer.D[h, 0] * v

    return by_hand(mixer, x, step, lambda out: rms(out, mixer.norm.weight))


BY_HAND = [
    (RetNet, retnet_by_hand),
    (DeltaNet, deltanet_by_hand),
    (GatedDeltaNet, gated_deltanet_by_hand),
    (Comba, comba_by_hand),
    (Mamba2, mamba2_by_hand),
]


@pytest.mark.parametrize("kind, recurrence", BY_HAND)
@pytest.mark.parametrize("T, conv, expand", [(1, 4, 1), (13, 4, 1), (13, 0, 2), (70, 3, 2)])
def test_matrix_memories_are_their_textbook_recurrences(kind, recurrence, T, conv, expand):
    mixer = kind(D, H, conv=conv, expand=expand)
    x = torch.randn(2, T, D)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        y, state = mixer(x)
        expected, S = recurrence(mixer, x)
    close(y, expected, 1e-10)
    close(state["W"], S, 1e-10)


def test_delta_rules_equal_the_naive_references_of_flash_linear_attention():
    missing = "flash-linear-attention is not installed"
    naive = pytest.importorskip("fla.ops.delta_rule.naive", reason=missing)
    naive_gated = pytest.importorskip("fla.ops.gated_delta_rule.naive", reason=missing)
    B, T, d = 2, 13, 8
    q = torch.randn(B, H, T, d)
    k = l2norm(torch.randn(B, H, T, d))
    v = torch.randn(B, H, T, d)
    beta = torch.rand(B, H, T)
    alpha = torch.rand(B, H, T)
    scaled = q * d**-0.5
    plain = naive.delta_rule_recurrence(q, k, v, beta)[0]
    close(delta_net(scaled, k, v, beta)[0], plain.double(), 1e-5)  # theirs computes in float32
    swapped = [z.transpose(1, 2) for z in (q, k, v, beta, alpha.log())]
    gated = naive_gated.naive_recurrent_gated_delta_rule(*swapped)[0].transpose(1, 2)
    close(gated_delta_net(scaled, k, v, beta, alpha)[0], gated.double(), 1e-5)


def test_comba_and_rwkv7_equal_the_naive_references_of_flash_linear_attention():
    missing = "flash-linear-attention is not installed"
    comba = pytest.importorskip("fla.ops.comba.naive", reason=missing)
    low_rank = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive", reason=missing)
    B, T = 2, 37
    q, k, v, r = (torch.randn(B, H, T, W) for _ in range(4))
    beta, alpha = torch.rand(2, B, H, T)
    k = l2norm(k)
    mixer = Comba(D, H)
    with torch.no_grad():
        mixer.b.normal_()
        mixer.D.normal_()
        p = mixer.b.sigmoid()[..., None] * k
        args = [z.transpose(1, 2) for z in (q - mixer.D * p, k, v, p, beta, alpha.log())]
        theirs = comba.naive_recurrent_comba(*args, scale=1.0)[0].transpose(1, 2)
        close(mixer.rule(q, k, v, beta, alpha, None, "auto")[0], theirs.double(), 1e-5)
    log_w = -0.6 * torch.rand(B, H, T, W)
    step = torch.rand(B, H, T, W) * k
    args = (q * W**-0.5, r, v, k, step, log_w)
    ours, S = scan_by_channel(torch.zeros(B, H, W, W), *args, tile=16)
    args = [z.float() for z in (q, r, v, -k, step, log_w)]
    theirs, theirs_S = low_rank.dplr_recurrence(*args)
    close(ours, theirs.double(), 1e-5)
    close(S, theirs_S.mT.double(), 1e-5)


def test_every_head_of_retnet_forgets_half_as_fast_as_the_one_before():
    mixer = RetNet(64, 4)
    x = torch.zeros(1, 2, 64)
    x[:, 0] = torch.randn(64)
    first = mixer(x[:, :1])[1]["W"].flatten(2).norm(dim=2)
    second = mixer(x)[1]["W"].flatten(2).norm(dim=2)
    rates = torch.tensor([[2**-5, 2**-6, 2**-7, 2**-8]])
    torch.testing.assert_close(1 - second / first, rates, rtol=1e-9, atol=0)


def test_gated_deltanet_starts_with_retention_close_to_one():
    mixer = GatedDeltaNet(1024, 512)
    dt = F.softplus(mixer.dt_bias)
    A = mixer.log_A.exp()
    assert 1e-3 * 0.999 <= dt.min() and dt.max() <= 1e-1 * 1.001 and dt.log().std() > 1
    assert A.min() >= 1 and A.max() <= 16 and A.mean().item() == pytest.approx(8.5, abs=0.5)
    assert torch.exp(-A * dt).max() > 0.99


def test_gated_deltanet_survives_complete_forgetting():
    mixer = GatedDeltaNet(D, H).float()
    with torch.no_grad():
        mixer.dt_bias.fill_(1000.0)  # alpha underflows to 0 in float32
    y, state = mixer(torch.randn(1, 40, D, dtype=torch.float32))
    y.sum().backward()
    assert y.isfinite().all() and state["W"].isfinite().all()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


# --------------------------------------------------------------------------------------------------
# Networks as memories: DLA, TTT, Memora


def assert_learns_by(rule, mixer, T, kept=lambda p: p):
    """rule(h, layers, boundary, q, k, v, rates) -> (layers, what is read at q), a token in head h.

    kept: from what the mixer holds of a layer to what the rule does.
    """
    x = torch.randn(2, T, D)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        y, state = mixer(x)
        sizes = [3 * D, D, mixer.sizes[4]]
        qkv, gate, rates = (x @ mixer.in_proj.weight.T).split(sizes, -1)
        qkv, _ = mixer.conv(qkv)
    expected = torch.zeros(2, T, D)
    for b, h in product(range(2), range(H)):
        layers = [kept(p[h].detach()) for p in mixer.start]
        for t in range(T):
            if t % mixer.chunk == 0:
                boundary = [p.clone().requires_grad_() for p in layers]
            q, k, v = (qkv[b, t, i * D + h * W :][:W] for i in range(3))
            layers, out = rule(h, layers, boundary, q, k, v, rates[b, t, h::H])
            layers = [p.detach() for p in layers]
            head = slice(h * W, (h + 1) * W)
            expected[b, t, head] = rms(out, mixer.norm.weight).detach() * F.silu(gate[b, t, head])
        for ours, theirs in zip(state["running"], layers, strict=True):
            close(kept(ours[b, h]), theirs, 1e-10)
    close(y, (expected @ mixer.out_proj.weight.T).detach(), 1e-10)


def ttt_memory(mixer, h, layers, z):
    """f(z) of the TTT paper in head h: z + LN(MLP(z)), layers a list of (W | b)."""
    out = z
    for i, layer in enumerate(layers):
        out = layer[:, :-1] @ (F.gelu(out) if i else out) + layer[:, -1]
    out = (out - out.mean()) / torch.sqrt(out.var(correction=0) + 1e-6)
    return z + out * mixer.scale[h, 0] + mixer.shift[h, 0]


def ttt_steps(mixer, h, layers, k, v, rate):
    """Of each layer, the gradient of |f(k) - v|^2 / 2 times eta over its input's length squared."""
    loss = (ttt_memory(mixer, h, layers, k) - v).square().sum() / 2
    eta = mixer.base * torch.sigmoid(rate + mixer.b_eta[h, 0]) / mixer.chunk
    inputs = [k, F.gelu(layers[0][:, :-1] @ k + layers[0][:, -1])]
    slopes = torch.autograd.grad(loss, layers, retain_graph=True)
    return [eta / (z @ z + 1) * g for z, g in zip(inputs, slopes, strict=False)]


@pytest.mark.parametrize(
    "T, chunk, depth", [(1, 4, 1), (13, 4, 1), (13, 16, 1), (13, 1, 2), (11, 4, 2)]
)
def test_ttt_descends_the_gradient_of_its_paper(T, chunk, depth):
    """W_t = W_{t-1} - eta_t grad |f(k_t; W_boundary) - v_t|^2 / 2 and y_t = f(q_t; W_t)."""

    def rule(h, layers, boundary, q, k, v, rates):
        steps = ttt_steps(mixer, h, boundary, k, v, rates[0])
        layers = [p - step for p, step in zip(layers, steps, strict=True)]
        return layers, ttt_memory(mixer, h, layers, q)

    mixer = TTT(D, H, chunk=chunk, depth=depth)
    assert_learns_by(rule, mixer, T)


@pytest.mark.parametrize("T, chunk", [(1, 4), (13, 1), (11, 4)])
def test_memora_takes_the_softmax_of_the_kl_divergence(T, chunk):
    """W_t = c softmax(alpha_t log W_{t-1} - eta_t grad), on the weights themselves."""

    def rule(h, layers, boundary, q, k, v, rates):
        weights = [(p.shape[1] ** 0.5 * p).detach().requires_grad_() for p in boundary]
        steps = ttt_steps(mixer, h, weights, k, v, rates[0])
        alpha = 1 / (1 + torch.exp(rates[1] + mixer.b_alpha[h, 0]))
        new = []
        for p, step in zip(layers, steps, strict=True):
            new.append(torch.softmax(alpha * p.log() - p.shape[1] ** 0.5 * step, 1))
        return new, ttt_memory(mixer, h, weights, q)

    mixer = Memora(D, H, chunk=chunk)
    assert_learns_by(rule, mixer, T, kept=lambda p: p.softmax(-1))


@pytest.mark.parametrize("T, chunk, depth", [(1, 4, 2), (13, 4, 1), (13, 1, 2), (11, 4, 2)])
def test_dla_climbs_the_inner_product(T, chunk, depth):
    """W_t = alpha_t W_{t-1} + eta_t grad <f(k_t; W_boundary), v_t> and y_t = f(q_t; W_t)."""

    def inputs(layers, z):
        """Of each layer, and f(z)."""
        found = [z]
        for i, p in enumerate(layers):
            out = p @ found[-1]
            found.append(z + out if i == len(layers) - 1 else F.silu(out))
        return found

    def rule(h, layers, boundary, q, k, v, rates):
        *z, said = inputs(boundary, unit(k))
        eta = torch.sigmoid(rates[0] + mixer.b_eta[h, 0]) / chunk
        alpha = 1 / (1 + torch.exp(rates[1] + mixer.b_alpha[h, 0]))
        new = []
        for i, g in enumerate(torch.autograd.grad(said @ unit(v), boundary)):
            step = eta / (1 + eta * z[i] @ z[i]) if i else eta  # deviation 7
            new.append(alpha * layers[i] + step * g)
        return new, inputs(new, unit(q))[-1]

    mixer = DLA(D, H, chunk=chunk, depth=depth)
    assert_learns_by(rule, mixer, T)


def test_dla_without_an_error_stays_finite_on_a_repeated_token():
    mixer = DLA(64, 1).float()
    x = torch.randn(1, 1, 64, dtype=torch.float32).repeat(1, 2000, 1) * 10
    with torch.no_grad():
        mixer.b_eta.fill_(10.0)  # the longest step
    y, state = mixer(x)
    y.square().mean().backward()
    assert all(W.isfinite().all() and W.norm() < 1e4 for W in state["running"])
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.slow
def test_the_memory_of_ttt_stays_bounded_on_a_repeated_token(depth):
    mixer = TTT(64, 1, depth=depth).float()
    x = torch.randn(1, 1, 64, dtype=torch.float32).repeat(1, 2000, 1) * 10
    with torch.no_grad():
        mixer.b_eta.fill_(10.0)  # the longest step
        y, state = mixer(x)
    assert y.isfinite().all() and y[:, 1000:].std(1).max() < 0.1 * y.std()  # it settles
    for running, initial in zip(state["running"], mixer.start, strict=True):
        assert (running - initial).norm() < 10 * initial.norm()


# --------------------------------------------------------------------------------------------------
# RWKV-7, SRWM


@pytest.mark.parametrize("T, tile", [(1, 16), (13, 4), (37, 16)])
def test_rwkv7_is_its_textbook_recurrence(T, tile):
    """S_t = S_{t-1} (diag(w) - kap (a kap)^T) + v k^T of mixtures of a token and the last."""
    mixer = RWKV7(D, H, tile)
    x = torch.randn(2, T, D)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        y, state = mixer(x)
        expected = torch.zeros(2, T, D)
        for b in range(2):
            S = torch.zeros(H, W, W)
            for t in range(T):
                last = x[b, t - 1] if t else torch.zeros(D)
                now = [x[b, t] * (1 - mu) + last * mu for mu in mixer.mix]
                r, key, v = (m.weight @ z for m, z in zip((mixer.r, mixer.k, mixer.v),
                                                          (now[0], now[2], now[3]), strict=True))
                w = mixer.w[2].weight @ torch.tanh(mixer.w[0].weight @ now[1]) + mixer.b_w
                w = torch.exp(-torch.sigmoid(w) / math.sqrt(math.e))
                a = torch.sigmoid(mixer.a[2].weight @ mixer.a[0].weight @ now[4] + mixer.b_a)
                g = mixer.gate[2].weight @ torch.sigmoid(mixer.gate[0].weight @ now[5])
                k = key * (1 + (a - 1) * mixer.k_a)
                for h in range(H):
                    head = slice(h * W, (h + 1) * W)
                    kap = unit((key * mixer.k_k)[head])
                    kept = w[head].diag() - torch.outer(kap, a[head] * kap)
                    S[h] = S[h] @ kept + torch.outer(v[head], k[head])
                    out = S[h] @ r[head]
                    out = (out - out.mean()) / torch.sqrt(out.var(correction=0) + 1e-5 * W)
                    out = out * mixer.scale[h, 0] + mixer.shift[h, 0]
                    out = out + (r[head] * mixer.r_k[h, 0] * k[head]).sum() * v[head]
                    expected[b, t, head] = out * g[head]
            close(state["W"][b], S, 1e-10)
        expected = expected @ mixer.out.weight.T
    close(y, expected, 1e-10)
    assert torch.equal(state["last"], x[:, -1:])


def test_tiles_of_rwkv7_are_exact_in_float32_where_it_forgets_most():
    """w = exp(-e^-1/2) = 0.545 at every channel and token: 16 tokens leave 6e-5."""
    mixer = RWKV7(128, 2)
    with torch.no_grad():
        mixer.b_w.fill_(30.0)
        x = torch.randn(1, 200, 128)
        exact = mixer(x)[0]
        y = mixer.float()(x.float())[0].double()
    assert (y - exact).norm() < 2e-6 * exact.norm()


@pytest.mark.parametrize("T, tile", [(1, 16), (13, 4), (20, 64)])
def test_srwm_is_its_textbook_recurrence(T, tile):
    """Four matrices of a head, each moved from what it says of softmax(k) to that of softmax(q)."""
    mixer = SRWM(D, H, tile=tile)
    x = torch.randn(2, T, D)
    with torch.no_grad():
        mixer.start.add_(torch.randn_like(mixer.start))
        y, state = mixer(x)
        expected = torch.zeros(2, T, D)
        for b, h in product(range(2), range(H)):
            head = slice(h * W, (h + 1) * W)
            weights = list(mixer.start[h].split([W, W, W, 4]))
            for t in range(T):
                z = torch.softmax(x[b, t, head], 0)
                out, q, k, beta = (M @ z for M in weights)
                q = torch.softmax(q, 0)
                k = torch.softmax(k, 0)
                for i, M in enumerate(weights):
                    weights[i] = M + torch.sigmoid(beta[i]) * torch.outer(M @ q - M @ k, k)
                expected[b, t, head] = out
            close(state["W"][b, h], torch.cat(weights), 1e-10)
    close(y, expected @ mixer.out.weight.T, 1e-10)


# --------------------------------------------------------------------------------------------------
# Mamba


@pytest.mark.parametrize("T, tile", [(1, 64), (13, 4), (20, 64)])
def test_mamba_is_its_textbook_recurrence(T, tile):
    """One state of one channel at a time: h_t = exp(dt A) h_{t-1} + dt B x, y_t = C h_t + D x."""
    mixer = Mamba(D, n=3, tile=tile)
    x = torch.randn(2, T, D)
    with torch.no_grad():
        y, state = mixer(x)
        z, gate = (x @ mixer.proj.weight.T).chunk(2, -1)
        z, _ = mixer.conv(z)
        low, b, c = (z @ mixer.rates.weight.T).split([1, 3, 3], -1)
        dt = torch.log1p(torch.exp(low @ mixer.dt_proj.weight.T + mixer.dt_bias))
        A = -torch.exp(mixer.log_A)
        expected = torch.zeros(2, T, 2 * D)
        h = torch.zeros(2, 2 * D, 3)
        for row, channel, t in product(range(2), range(2 * D), range(T)):
            now = z[row, t, channel]
            step = dt[row, t, channel]
            for i in range(3):
                decay = torch.exp(step * A[channel, i])
                h[row, channel, i] = decay * h[row, channel, i] + step * b[row, t, i] * now
            expected[row, t, channel] = c[row, t] @ h[row, channel] + mixer.D[channel] * now
        expected = (expected * F.silu(gate)) @ mixer.out.weight.T
    close(y, expected, 1e-10)
    close(state["h"], h, 1e-10)


# --------------------------------------------------------------------------------------------------
# Initial values and bad input


@pytest.mark.parametrize(
    "kind, first, last", [(Attention, "qkv", "out"), (GatedDeltaNet, "in_proj", "out_proj")]
)
def test_out_scale_scales_only_the_output_projection(kind, first, last):
    mixer = kind(256, 4, out_scale=0.25)
    assert getattr(mixer, first).weight.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert getattr(mixer, last).weight.std().item() == pytest.approx(0.25 / 16, rel=0.02)


def test_bad_input_is_named_with_its_value_and_the_legal_range():
    refused = [
        (lambda: Attention(16, 3), r"d_model must be a multiple of n_heads, got 16 and 3"),
        (lambda: GatedDeltaNet(16, 0), r"d_model must be a multiple of n_heads, got 16 and 0"),
        (lambda: Attention(15, 3), r"must be even for RoPE, got 5"),
        (lambda: RetNet(16, 2, expand=0), r"expand must be at least 1, got 0"),
        (lambda: Attention(16, 2, window=0), r"window must be at least 1, got 0"),
        (lambda: TTT(16, 2, chunk=0), r"chunk must be at least 1, got 0"),
        (lambda: TTT(16, 2, depth=3), r"depth must be 1 \(TTT-Linear\) or 2 \(TTT-MLP\), got 3"),
        (lambda: DLA(16, 2, chunk=0), r"chunk must be at least 1, got 0"),
        (lambda: DLA(16, 2, depth=0), r"depth must be at least 1, got 0"),
        (lambda: SRWM(16, 3), r"d_model must be a multiple of n_heads, got 16 and 3"),
        (lambda: RWKV7(16, 3), r"d_model must be a multiple of n_heads, got 16 and 3"),
        (lambda: TitansMAC(16, 2, segment=0), r"segment must be at least 1, got 0"),
    ]
    for make, message in refused:
        with pytest.raises(ValueError, match=message):
            make()
