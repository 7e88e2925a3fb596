"""Titans and self-modifying Titans against oracles that go token by token, one memory at a time.

What they share with every mixer (causality, state, gradients) is in test_mixers.py.
"""

import os
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from textbook import close, rms, unit

from fused import at_most
from hope import PUBLISHED, Hope, HopeConfig
from layers import ShortConvolution, tensors
from titans import NeuralMemory, SelfModifyingTitans

D = 8
H = 2  # heads of width 4
CHUNK = 5

VARIANTS = {
    "matrix": dict(),
    "matrix, readable": dict(),  # built below with fused = False
    "mlp": dict(memory="mlp"),
    "adaptive none": dict(adaptive=()),
    "adaptive k": dict(adaptive=("k",)),
    "adaptive v": dict(adaptive=("v",)),
    "adaptive k, v, q": dict(adaptive=("k", "v", "q")),
    "mlp, adaptive v, q": dict(adaptive=("v", "q"), memory="mlp"),
    "momentum": dict(momentum=True),
    "momentum, adaptive k, v, q": dict(momentum=True, adaptive=("k", "v", "q")),
    "mlp, momentum": dict(memory="mlp", momentum=True),
    "mlp, momentum, adaptive k, v, q": dict(
        memory="mlp", momentum=True, adaptive=("k", "v", "q")
    ),
    "boundary": dict(mode="boundary"),
    "mlp, boundary, momentum": dict(memory="mlp", mode="boundary", momentum=True),
    "no convolution, no gate": dict(conv=0, gate=False),
    "mlp, no convolution, no gate": dict(memory="mlp", conv=0, gate=False),
    "convolution of 1": dict(conv=1),
    "half inner step": dict(inner_step=0.5),
    "plain gradient": dict(dgd=False),
    "mlp, plain gradient, momentum": dict(dgd=False, memory="mlp", momentum=True),
    "no retention": dict(retention=False),
    "mlp, no retention": dict(retention=False, memory="mlp"),
    "chunk 1": dict(chunk=1),
    "mlp, chunk 1": dict(chunk=1, memory="mlp"),
    "counters": dict(counters=1),
    "mlp, counters, windows, half step": dict(
        counters=1, memory="mlp", adaptive=("v",), window_reset=10, inner_step=0.5
    ),
    "windows": dict(window_reset=10),
    "windows, readable": dict(window_reset=10),
    "mlp, windows, momentum": dict(window_reset=10, memory="mlp", momentum=True),
    "titans, depth 1": dict(depth=1),
    "titans, depth 2": dict(depth=2),
    "titans, depth 3": dict(depth=3),
    "titans, no convolution": dict(conv=0),
    "titans, chunk 1": dict(chunk=1),
    "titans, windows": dict(window_reset=10),
}
FUSED = ["matrix", "adaptive k, v, q", "momentum", "momentum, adaptive k, v, q"]
FUSED += ["counters", "mlp", "mlp, momentum", "mlp, momentum, adaptive k, v, q"]
SELF_MODIFYING = [name for name in VARIANTS if not name.startswith("titans")]

pytestmark = pytest.mark.usefixtures("float64")


def kind(name):
    return NeuralMemory if name.startswith("titans") else SelfModifyingTitans


def build(name, **changes):
    """A mixer with every parameter away from its initial value, so that each one matters."""
    options = dict(d_model=D, n_heads=H, chunk=CHUNK) | VARIANTS[name] | changes
    mixer = kind(name)(**options)
    if name.endswith("readable"):
        mixer.fused = False
    with torch.no_grad():
        for label, p in mixer.named_parameters():
            p.add_(torch.randn_like(p) * (1.0 if label.startswith("b") else 0.3))
    return mixer


# --------------------------------------------------------------------------------------------------
# Short convolution


def convolution_by_hand(x, weight):
    """[B, T, D] -> SiLU of the sum over the last `width` tokens; the last weight is the token's."""
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(len(weight)):
            s = t - (len(weight) - 1) + j
            if s >= 0:
                y[:, t] += weight[j] * x[:, s]
    return y * torch.sigmoid(y)


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("T", [1, 3, 11])
def test_short_convolution_is_a_loop_over_the_last_tokens(width, T):
    conv = ShortConvolution(3, width)
    x = torch.randn(2, T, 3)
    close(conv(x)[0], convolution_by_hand(x, conv.weight), 1e-12)


@pytest.mark.parametrize("cuts", [[1], [2, 3], list(range(1, 11))])
def test_short_convolution_carries_its_tail_from_call_to_call(cuts):
    conv = ShortConvolution(3, 4)
    x = torch.randn(2, 11, 3)
    tail = None
    outputs = []
    for start, stop in pairwise([0, *cuts, 11]):
        y, tail = conv(x[:, start:stop], tail)
        outputs.append(y)
    close(torch.cat(outputs, 1), convolution_by_hand(x, conv.weight), 1e-12)
    assert torch.equal(tail, x[:, -3:]) and tail.untyped_storage().nbytes() == tail.nbytes


def test_short_convolution_has_the_gradients_of_finite_differences():
    conv = ShortConvolution(3, 3)
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((2, 4, 3), (2, 2, 3), (3, 3))]

    def f(x, tail, weight):
        return torch.func.functional_call(conv, {"weight": weight}, (x, tail))

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


# --------------------------------------------------------------------------------------------------
# Oracles: one row, one head and one token at a time, one memory after the other


def shortened(x, length):
    return x * min(1.0, (length / x.norm()).item())


class Memory:
    """One memory with its own weights: a matrix, an MLP (one more matrix) or a single row.

    Its weights are the initial ones plus what it has learned; only the latter is forgotten.
    """

    def __init__(self, *initial, residual=True):
        self.initial = initial
        self.residual = residual
        self.learned = [torch.zeros_like(W) for W in initial]
        self.momentum = [torch.zeros_like(W) for W in initial]
        self.reach_boundary()

    @property
    def layers(self):
        return [W0 + W for W0, W in zip(self.initial, self.learned, strict=True)]

    def reach_boundary(self):
        self.boundary = self.layers
        self.boundary_learned = self.learned

    def __call__(self, z, weights):
        h = z
        for W in weights[:-1]:
            h = F.silu(W @ h)
        return weights[-1] @ h + (z if self.residual else 0)

    def write(self, k, target, eta, alpha, theta, dgd=True):
        """W <- alpha W - eta (M(k) - target) k^T in the last layer; below, the boundary's surprise.

        Without dgd the last layer's M is the boundary's, and the gradient is all that is taken off.
        """
        inputs = [k]
        outputs = []
        for W in self.boundary[:-1]:
            outputs.append((W @ inputs[-1]).detach().requires_grad_())
            inputs.append(F.silu(outputs[-1]))
        errors = [target - (k if self.residual else 0)]
        if outputs:  # d/d(output of the layer) of |M(k) - target|^2 / 2, by autograd
            loss = (self.boundary[-1] @ inputs[-1] + k - target).square().sum() / 2
            (slope,) = torch.autograd.grad(loss, outputs[0])
            errors.insert(0, shortened(-slope / (1 + self.boundary[1].square().sum()), 1.0))
        learned = []
        for i, (W, x, u) in enumerate(zip(self.learned, inputs, errors, strict=True)):
            x = x.detach()
            last = i == len(errors) - 1
            step = eta if i == 0 else eta / (1 + eta * (x @ x))
            known = (self.initial[i] + W) @ x if last else W @ x
            if not dgd:
                known = self.boundary[i] @ x if last else 0
            self.momentum[i] = theta * self.momentum[i] + step * torch.outer(u - known, x)
            learned.append(alpha * W + self.momentum[i])
        self.learned = learned


def memories_of(p, h, wide, gates):
    """The memories of head h, from the parameters p: name -> Memory."""
    memories = {}
    d = D // H
    for i, name in enumerate(wide):
        second = [p["start2"][h, i]] if "start2" in p else []
        memories[name] = Memory(p["start"][h, i * d : (i + 1) * d], *second)
    for i, name in enumerate(gates, len(wide) * d):
        memories[name] = Memory(p["start"][h, i : i + 1], residual=False)
    return memories


def self_modifying_by_hand(m, x):
    """SelfModifyingTitans from its parameters.

    -> (y [B, T, D], memories of every row and head, [B, counters, d, d] learned by counters)
    """
    p = {name: value.detach() for name, value in (*m.named_parameters(), *m.named_buffers())}
    B, T, _ = x.shape
    d = D // H
    z = x @ p["in_proj.weight"].T
    if "conv.weight" in p:
        z = convolution_by_hand(z, p["conv.weight"])
    static = [name for name in ("k", "v", "q") if name not in m.adaptive]
    wide = ["memory", *[name for name in ("k", "v", "q") if name in m.adaptive]]
    gates = ["eta", "alpha", "theta"][: 3 if m.momentum else 2]
    y = torch.zeros(B, T, D)
    counted = torch.zeros(B, m.counters, d, d)
    ends = []
    for b, h in product(range(B), range(H)):
        if h >= H - m.counters:
            out, counted[b, h - H] = counter_by_hand(m, z[b], h)
            y[b, :, h * d : (h + 1) * d] = torch.stack([rms(o, p["norm.weight"]) for o in out])
            continue
        for t in range(T):
            if t % (m.window_reset or T) == 0:
                memories = memories_of(p, h, wide, gates)
            if t % m.chunk == 0:
                for memory in memories.values():
                    memory.reach_boundary()
            part = {}
            for i, name in enumerate(["x", *static]):
                part[name] = z[b, t, i * D + h * d :][:d]
            # everything is generated at the boundary
            made = {name: memory(part["x"], memory.boundary) for name, memory in memories.items()}
            k, v, q = (unit((made if name in m.adaptive else part)[name]) for name in "kvq")
            raw = {name: made[name][0] + p[f"b_{name}"][h] for name in gates}
            A = p["log_A"][h].exp()
            alpha = torch.exp(-m.inner_step * A * torch.log1p(raw["alpha"].exp()))
            eta = m.inner_step * (1 + alpha if m.dgd else 1 / m.chunk) * torch.sigmoid(raw["eta"])
            theta = torch.zeros(())
            if m.momentum:
                theta = torch.sigmoid(raw["theta"])
                eta = eta * (1 - theta) ** 2 / (1 + theta)
            # every memory writes the target it has chosen, then one is read
            for memory in memories.values():
                target = memory(v, memory.boundary)
                if "start2" in p:  # deviation 27
                    target = shortened(target, 2.0)
                memory.write(k, target, eta, alpha, theta, m.dgd)
            reader = memories["memory"]
            out = reader(q, reader.layers if m.mode == "token" else reader.boundary)
            y[b, t, h * d : (h + 1) * d] = rms(out, p["norm.weight"])
        ends.append(memories)
    if "gate_proj.weight" in p:
        y = y * F.silu(x @ p["gate_proj.weight"].T)
    return y @ p["out_proj.weight"].T, ends, counted


def counter_by_hand(m, z, h):
    """Head h, a counter, of a row z [T, streams] -> (its reads [T, d], what it has learned)."""
    p = {name: value.detach()[h - H] for name, value in m.counter.named_parameters()}
    d = D // H
    memory, to_k, to_v, to_eta = p["start"].split([d, d, d, 1])
    W = torch.zeros(d, d)
    y = []
    for t in range(len(z)):
        if t % (m.window_reset or len(z)) == 0:
            W = torch.zeros(d, d)
        x = z[t, h * d :][:d]
        q = unit(z[t, len(m.static) * D + h * d :][:d])  # the last stream
        k = unit(x + to_k @ x)
        v = unit(x + to_v @ x)
        eta = 2 * m.inner_step * torch.sigmoid(to_eta[0] @ x + p["b_eta"])
        W = W + eta * torch.outer(v + memory @ v, k)
        y.append(q + (memory + W) @ q)
    return torch.stack(y), W


def assert_end_weights(state, ends, field, get):
    """The stacked weights of `state`, row by row, are those of the separate memories."""
    for i, memories in enumerate(ends):
        b, h = divmod(i, state[field][0].shape[1])
        first = [get(memory)[0] for memory in memories.values()]
        close(state[field][0][b, h], torch.cat(first))
        if len(state[field]) > 1:
            second = [get(memory)[1] for memory in memories.values() if memory.residual]
            close(state[field][1][b, h], torch.stack(second))


CHUNKS = [("matrix", 5, 15), ("matrix", 64, 70), ("momentum", 64, 70), ("mlp", 64, 70)]


@pytest.mark.parametrize("name, chunk, T", [(name, None, 13) for name in SELF_MODIFYING] + CHUNKS)
def test_self_modifying_titans_is_five_memories_token_by_token(name, chunk, T):
    m = build(name, **({"chunk": chunk} if chunk else {}))
    x = torch.randn(2 if T < 20 else 1, T, D)
    y, state = m(x)
    expected, ends, counted = self_modifying_by_hand(m, x)
    close(y, expected)
    if m.counters:
        close(state["counted"], counted)
    assert_end_weights(state, ends, "running", lambda memory: memory.learned)
    if m.momentum:
        assert_end_weights(state, ends, "momentum", lambda memory: memory.momentum)
    if T % m.chunk:
        assert_end_weights(state, ends, "boundary", lambda memory: memory.boundary_learned)


@torch.no_grad()
def test_a_counter_holds_the_number_of_its_tokens_for_ever_and_a_modifying_head_does_not():
    m = build("counters", conv=0, chunk=64)
    x = torch.randn(1, 1, D).expand(1, 1000, D)
    state = None
    counted, learned = [], []
    for _ in range(4):  # 1,000 equal tokens each
        _, state = m(x, state)
        counted.append(state["counted"])
        learned.append(state["running"][0])
    for n, W in enumerate(counted, 1):
        close(W / n, counted[0])
    assert (learned[3] - learned[0]).abs().max() < 0.01 * learned[0].abs().max()


def titans_by_hand(m, x):
    """NeuralMemory from its parameters: the surprise is autograd's gradient at the boundary."""
    p = {name: value.detach() for name, value in m.named_parameters()}
    B, T, _ = x.shape
    d = D // H
    qkv, gate, rates = (x @ p["in_proj.weight"].T).split([3 * D, D, 3 * H], -1)
    if "conv.weight" in p:
        qkv = convolution_by_hand(qkv, p["conv.weight"])
    y = torch.zeros(B, T, D)
    ends = []
    for b, h in product(range(B), range(H)):
        for t in range(T):
            if t % (m.window_reset or T) == 0:
                layers = [W0.detach()[h] for W0 in m.start]
                S = [torch.zeros_like(W) for W in layers]
            if t % m.chunk == 0:
                boundary = [W.clone().requires_grad_() for W in layers]
            q, k, v = (unit(qkv[b, t, i * D + h * d :][:d]) for i in range(3))
            eta, theta, alpha = (rates[b, t, i * H + h] + p["bias"][i, h] for i in range(3))
            theta = torch.sigmoid(theta)
            alpha = torch.exp(-torch.log1p(alpha.exp()))
            eta = torch.sigmoid(eta) * (1 - theta) / m.chunk
            # write: inner layers, whose inputs have any length, take the step eta / (1 + eta |x|^2)
            z = k
            squares = [0.0]
            for W in boundary[:-1]:
                z = F.silu(W @ z)
                squares.append((z @ z).detach())
            loss = (k + boundary[-1] @ z - v).square().sum() / 2
            surprise = torch.autograd.grad(loss, boundary)
            for i, (g, n) in enumerate(zip(surprise, squares, strict=True)):
                S[i] = theta * S[i] - eta / (1 + eta * n) * g
                layers[i] = alpha * layers[i] + S[i]
            # read
            z = q
            for W in layers[:-1]:
                z = F.silu(W @ z)
            y[b, t, h * d : (h + 1) * d] = rms(q + layers[-1] @ z, p["norm.weight"])
        ends.append((layers, S, boundary))
    return (y * F.silu(gate)) @ p["out_proj.weight"].T, ends


TITANS = [name for name in VARIANTS if name.startswith("titans")]
CHUNKS = [(name, *sizes) for name in TITANS[:-1] for sizes in ((5, 10), (64, 66))]


@pytest.mark.parametrize("name, chunk, T", [(name, None, 13) for name in TITANS] + CHUNKS)
def test_titans_takes_momentum_steps_of_the_gradient_at_the_boundary(name, chunk, T):
    m = build(name, **({"chunk": chunk} if chunk else {}))
    x = torch.randn(2 if T < 20 else 1, T, D)
    y, state = m(x)
    expected, ends = titans_by_hand(m, x)
    close(y, expected)
    for i, (layers, S, boundary) in enumerate(ends):
        b, h = divmod(i, H)
        for n in range(len(layers)):
            close(state["running"][n][b, h], layers[n])
            close(state["momentum"][n][b, h], S[n])
            if T % m.chunk:
                close(state["boundary"][n][b, h], boundary[n])


# --------------------------------------------------------------------------------------------------
# The fused chunk step against its definition


def read_and_differentiate(m, x, fused, of_state, state=None, read=None):
    """y, state, and gradients of a random linear loss of y and, where asked, of the state."""
    m.fused = fused
    m.zero_grad()
    x = x.clone().requires_grad_()
    y, state = (read or m)(x, state)
    torch.manual_seed(7)
    loss = (y * torch.randn_like(y)).sum()
    for weights in tensors({**state, "conv": None}) if of_state else ():
        loss = loss + (weights * torch.randn_like(weights)).sum()
    loss.backward()
    return y, state, {name: p.grad.clone() for name, p in m.named_parameters()} | {"x": x.grad}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("chunk, T", [(1, 5), (4, 3), (4, 12), (4, 14), (16, 33), (64, 100)])
@pytest.mark.parametrize("of_state", [False, True], ids=["output", "output and state"])
def test_fused_chunk_step_equals_its_definition_with_every_gradient(name, chunk, T, of_state):
    m = build(name, chunk=chunk)
    assert m.fused
    x = torch.randn(2, T, D)
    y, state, gradients = read_and_differentiate(m, x, True, of_state)
    expected, expected_state, expected_gradients = read_and_differentiate(m, x, False, of_state)
    close(y, expected)
    assert state.keys() == expected_state.keys() and state["position"] == T
    for a, b in zip(tensors(state), tensors(expected_state), strict=True):
        close(a, b)
    for name, g in expected_gradients.items():
        assert g.abs().max() > 0, name
        close(gradients[name], g)


@pytest.mark.parametrize("name", [name for name in FUSED if name.startswith("mlp")])
@pytest.mark.parametrize("size", [3, 10])
def test_fused_chunk_step_equals_its_definition_where_targets_and_gradients_are_too_long(
    name, size, monkeypatch
):
    m = build(name)
    with torch.no_grad():
        m.start.mul_(size)
        m.start2.mul_(size)
        m.start[:, -3:].mul_(5)  # targets of gates, too
    found = {}  # length that was allowed -> whether it was needed, for each vector

    def watch(x, length):
        y, scale = at_most(x, length)
        found.setdefault(length, []).append(scale < 1)
        return y, scale

    monkeypatch.setattr("titans.at_most", watch)
    x = torch.randn(2, 12, D)
    y, state, gradients = read_and_differentiate(m, x, True, True)
    expected, expected_state, expected_gradients = read_and_differentiate(m, x, False, True)
    for a, b in zip([y, *tensors(state)], [expected, *tensors(expected_state)], strict=True):
        close(a / b.abs().max(), b / b.abs().max(), 1e-10)
    for label, g in expected_gradients.items():
        close(gradients[label] / g.abs().max(), g / g.abs().max(), 1e-10)
    assert torch.cat([t.flatten() for t in found[2.0]]).any()
    assert size == 3 or torch.cat([t.flatten() for t in found[1.0]]).any()


@pytest.mark.parametrize("name", [name for name in FUSED if "momentum" in name])
def test_fused_chunk_step_equals_its_definition_where_weights_are_too_long(name, monkeypatch):
    m = build(name)
    x = torch.randn(2, 19, D)
    _, state = m(x)
    monkeypatch.setattr("fused.LONGEST", 0.5 * state["running"][0].norm(dim=(2, 3)).min().item())
    y, state, gradients = read_and_differentiate(m, x, True, True)
    expected, expected_state, expected_gradients = read_and_differentiate(m, x, False, True)
    for a, b in zip([y, *tensors(state)], [expected, *tensors(expected_state)], strict=True):
        close(a, b)
    for label, g in expected_gradients.items():
        close(gradients[label], g)
    first, state = m(x[:, :7])
    rest, state = m(x[:, 7:], state)
    close(torch.cat([first, rest], 1), y)
    for a, b in zip(tensors(state), tensors(expected_state), strict=True):
        close(a, b)


def assert_gradients_are_those_of_the_definition(m):
    x = torch.randn(2, 12, D)
    _, _, gradients = read_and_differentiate(m, x, True, True)
    for name, g in read_and_differentiate(m, x, False, True)[2].items():
        close(gradients[name], g)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("inner_step", [0.0, 0.3])
def test_fused_chunk_step_equals_its_definition_at_any_inner_step(name, inner_step):
    assert_gradients_are_those_of_the_definition(build(name, inner_step=inner_step))


@pytest.mark.parametrize("name", FUSED)
def test_fused_chunk_step_continues_a_state_with_the_gradients_of_its_definition(name):
    m = build(name)
    x = torch.randn(2, 19, D)
    gradients = []
    for fused in (True, False):
        m.fused = fused
        _, state = m(x[:, :7])  # a fused chunk, and two tokens of the next
        gradients.append(read_and_differentiate(m, x[:, 7:], fused, True, state)[2])
    for name, g in gradients[1].items():
        close(gradients[0][name], g)


@pytest.mark.parametrize("bias, value", [("b_theta", -1e4), ("b_alpha", -1e4), ("b_alpha", 1e4)])
@pytest.mark.parametrize("name", [FUSED[3], FUSED[-1]])
def test_fused_chunk_step_has_exact_gradients_where_theta_is_0_and_alpha_is_0_or_1(
    name, bias, value
):
    m = build(name)
    with torch.no_grad():
        getattr(m, bias).fill_(value)
    assert_gradients_are_those_of_the_definition(m)


@pytest.mark.parametrize("name", FUSED)
def test_fused_chunk_step_equals_its_definition_in_float32_over_long_sequences(name):
    torch.set_default_dtype(torch.float32)
    m = SelfModifyingTitans(32, 2, chunk=64, **VARIANTS[name])
    x = torch.randn(2, 1024, 32)
    y, state, gradients = read_and_differentiate(m, x, True, True)
    expected, expected_state, expected_gradients = read_and_differentiate(m, x, False, True)
    W = expected_state["running"][0]
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(state["running"][0], W, rtol=1e-3, atol=1e-3)
    # with momentum the definition in float32, too, is up to 6e-3 from itself in float64
    tolerance = 1e-2 if m.momentum else 1e-3
    for name, g in expected_gradients.items():
        assert (gradients[name] - g).norm() < tolerance * g.norm(), name


# --------------------------------------------------------------------------------------------------
# Window resets

WINDOWED = [(name, True) for name in FUSED]
WINDOWED += [(name, False) for name in (FUSED[0], FUSED[-1], "boundary", "plain gradient")]
WINDOWED += [("titans, depth 1", False), ("titans, depth 2", False)]


def window_by_window(m, window, x):
    """m without resets, on one window after the other; only the convolution's tail goes on."""
    state = {"conv": None}
    outputs = []
    for now in x.split(window, 1):
        y, state = m(now, m.start_state(len(x)) | {"conv": state["conv"]})
        outputs.append(y)
    return torch.cat(outputs, 1), state | {"position": x.shape[1]}


@pytest.mark.parametrize("name, fused", WINDOWED)
@pytest.mark.parametrize("window", [5, 10, 30, 35])
def test_every_window_begins_at_the_start_with_every_gradient(name, fused, window, T=33):
    x = torch.randn(2, T, D)
    plain = build(name)
    m = build(name, window_reset=window)
    m.load_state_dict(plain.state_dict())

    def oracle(x, state):
        return window_by_window(plain, window, x)

    expected = read_and_differentiate(plain, x, fused, True, read=oracle)
    for cuts in ([], [7], [window - 3, window, window + 2]):
        ends = [end for end in cuts if end < T] + [T]

        def in_calls(x, state, ends=ends):
            outputs = []
            for start, stop in pairwise([0, *ends]):
                y, state = m(x[:, start:stop], state)
                outputs.append(y)
            return torch.cat(outputs, 1), state

        y, state, gradients = read_and_differentiate(m, x, fused, True, read=in_calls)
        close(y, expected[0], 1e-10)
        assert state.keys() == expected[1].keys() and state["position"] == T
        for a, b in zip(tensors(state), tensors(expected[1]), strict=True):
            close(a, b, 1e-10)
        for name, g in expected[2].items():
            size = g.abs().max().clamp(min=1)  # in long windows some are in the thousands
            close(gradients[name] / size, g / size, 1e-10)


@pytest.mark.parametrize("name", ["windows", "mlp, windows, momentum", "titans, windows"])
def test_the_state_at_the_end_of_a_window_is_the_start_again(name):
    m = build(name)
    for cuts in ([], [3], [5, 11]):
        state = None
        for start, stop in pairwise([0, *cuts, 20]):
            _, state = m(torch.randn(2, stop - start, D), state)
        for field, start in m.start_weights(2).items():
            assert all(map(torch.equal, tensors(state[field]), tensors(start)))
        assert state["position"] == 20 and state["conv"].any()


def test_whole_windows_of_a_call_are_rows_of_one_batch(monkeypatch):
    m = build("windows")  # of 10 tokens
    shapes = []
    all_chunks = m._all_chunks

    def record(streams, *weights):
        shapes.append(tuple(streams["x"].shape))
        return all_chunks(streams, *weights)

    monkeypatch.setattr(m, "_all_chunks", record)
    _, state = m(torch.randn(3, 5, D))
    m(torch.randn(3, 43, D), state)
    d = D // H
    assert shapes == [(3, H, 5, d), (3, H, 5, d), (3 * 3, H, 10, d), (3, H, 8, d)]


# --------------------------------------------------------------------------------------------------
# Retention and the control


@pytest.mark.parametrize(
    "n_heads, tokens", [(1, [100]), (2, [10, 1000]), (5, [10, 31.6228, 100, 316.228, 1000])]
)
def test_heads_start_with_memories_of_many_lengths(n_heads, tokens):
    layer = SelfModifyingTitans(4 * n_heads, n_heads).double()
    x = torch.zeros(1, 1, 4 * n_heads)  # gates are rows of the memory: at 0 the biases are left
    state = layer.start_state(1)
    state["running"] = state["boundary"] = [torch.ones_like(W) for W in state["running"]]
    # one step of retention; nothing is written at a key of 0
    kept = layer(x, state)[1]["running"][0][0, :, -1].mean(-1)
    assert (1 / (1 - kept)).tolist() == pytest.approx(tokens, rel=1e-4)


@pytest.mark.parametrize("name", ["matrix", "mlp", "momentum", "boundary"])
def test_memories_that_never_learn_stay_at_their_initial_weights(name):
    m = build(name, inner_step=0.0)
    state = None
    for n in (3, 12, 1, 6):
        _, state = m(torch.randn(2, n, D), state)
        for W in state["running"]:
            assert not W.any()
    _, learned = build(name)(torch.randn(2, 3, D))
    assert (learned["running"][0][0] - learned["running"][0][1]).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------
# Stability


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize(
    "model, memory", [("hope", "matrix"), ("hope", "mlp"), ("titans", "matrix")]
)
def test_training_at_a_high_learning_rate_stays_finite_and_learns(model, memory, chunk):
    torch.set_default_dtype(torch.float32)
    sizes = dict(vocab_size=16, d_model=32, n_layers=2, n_heads=2, hidden=64)
    m = Hope(HopeConfig(model=model, memory=memory, chunk=chunk, **sizes))
    optimizer = torch.optim.AdamW(m.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        words = (16 * torch.rand(4, 12) ** 3).long()  # some tokens are more frequent than others
        text = words.repeat(1, 9)[:, :97]
        loss = F.cross_entropy(m(text[:, :-1])[0].flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in m.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(p).all() for p in m.parameters())
    assert max(losses) < 1.5 * losses[0] and losses[-1] < 0.9 * losses[0]


def streams(T, vocabulary):
    """Eight rows: one symbol, three times; zeros; two by turns, three times; random ones."""
    symbols = torch.arange(1, 4) * (vocabulary // 5)
    one = symbols[:, None].expand(3, T)
    turns = torch.stack([symbols, symbols + 3], 1).repeat(1, T // 2)
    zeros = torch.zeros(1, T, dtype=torch.int64)
    return torch.cat([one, zeros, turns, torch.randint(vocabulary, (1, T))])


@pytest.mark.parametrize("path", ["fused", "readable"])
@pytest.mark.parametrize("seed", range(5))
def test_an_mlp_memory_of_any_weights_does_not_feed_its_own_targets(seed, path):
    """Twice the usual weights: with targets of any length they reach 1e11 in 1,024 tokens."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(seed)
    m = SelfModifyingTitans(16, 2, chunk=16, memory="mlp", conv=0)
    m.fused = path == "fused"
    with torch.no_grad():
        m.start.mul_(2)
        m.start2.mul_(2)
        x = torch.randn(20, 16)[streams(1024, 20)]
        y, state = m(x)
    assert y.isfinite().all() and max(W.abs().max() for W in state["running"]) < 20


@pytest.mark.parametrize("memory", ["matrix", "mlp"])
def test_momentum_that_resonates_with_returning_keys_stays_bounded(memory):
    """Harsh random gates, theta another for each token: by (1 - theta) eta 1e16 and more."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(1)
    m = SelfModifyingTitans(16, 2, 16, memory, ("k", "v", "q"), momentum=True, conv=0)
    with torch.no_grad():
        m.b_theta.fill_(1.0)
        m.b_alpha.fill_(-7.0)
        m.b_eta.fill_(4.0)
        m.start[:, -3:].normal_(std=0.5)
        y, state = m(torch.randn(20, 16)[streams(1024, 20)])
    weights = tensors(state["running"]) + tensors(state["momentum"])
    assert y.isfinite().all() and max(W.abs().max() for W in weights) < 1e6


# The whole check: TOKENS=200000 SEEDS=5 pytest -m slow tests/test_titans.py -k stay_bounded
TOKENS = int(os.environ.get("TOKENS", 20_000))
SEEDS = int(os.environ.get("SEEDS", 1))
MEMORIES = {"matrix": {"memory": "matrix"}, "mlp": {"memory": "mlp"}, "published": PUBLISHED}


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_trained_memories_stay_bounded_over_many_tokens(seed, memory):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(seed)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    sizes = dict(d_model=32, n_layers=2, n_heads=2, hidden=64, levels=[None])
    m = Hope(HopeConfig(**sizes, **MEMORIES[memory]))
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
    for _ in range(60):
        rows = torch.stack([text[i : i + 257] for i in torch.randint(len(text) - 257, (8,))])
        optimizer.zero_grad()
        m(rows[:, :-1], targets=rows[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        optimizer.step()
    state = None
    with torch.no_grad():
        for piece in streams(TOKENS, 256).split(4000, 1):
            logits, state = m(piece, state)
            largest = max(W.abs().max() for b in state["blocks"] for W in b["mixer"]["running"])
            assert logits.isfinite().all() and largest < 1000


@pytest.mark.parametrize(
    "name", ["matrix", "mlp", "momentum", "titans, depth 1", "titans, depth 2"]
)
@pytest.mark.slow
def test_a_token_repeated_4096_times_stays_finite_with_its_gradients(name):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(1)
    m = kind(name)(**dict(d_model=32, n_heads=2, chunk=64) | VARIANTS[name])
    x = torch.randn(1, 1, 32).repeat(1, 4096, 1).requires_grad_()
    y, state = m(x)
    y.square().mean().backward()
    gradients = [p.grad for p in m.parameters()]
    assert all(torch.isfinite(t).all() for t in [y, x.grad, *tensors(state), *gradients])
    assert max(W.abs().max() for W in state["running"]) < 100


# --------------------------------------------------------------------------------------------------
# Rows that end with their first chunk

SHORT = {
    "hope": {},
    "levels without a step": dict(cms_updates="first_order", levels=[8, 16, None]),
    "independent levels": dict(cms_updates="full", levels=[8, None], variant="independent"),
    "boundary": dict(mode="boundary"),
    "boundary, mlp, momentum, plain": dict(
        mode="boundary", memory="mlp", momentum=True, adaptive=["k", "v", "q"], dgd=False
    ),
    "boundary, windows, static": dict(mode="boundary", window_reset=8, adaptive=[]),
    "no retention": dict(mode="boundary", retention=False),
    "counters": dict(counters=1),
    **{model: dict(model=model) for model in ("titans", "titans_mac", "ttt_mlp", "ttt_e2e")},
}


@pytest.mark.parametrize("name", SHORT)
def test_rows_of_one_chunk_give_every_parameter_a_gradient(name):
    """DDP waits for all of them, and stops at the second step where one has none."""
    sizes = dict(vocab_size=17, d_model=8, n_layers=1, n_heads=2, hidden=24, chunk=8, window=8)
    options = {"cms_updates": "off", "levels": [None]} | SHORT[name]
    if name == "ttt_e2e":
        options |= {"cms_updates": None, "levels": [8, None]}
    m = Hope(HopeConfig(**sizes | options))
    for T in (1, 8):
        m.zero_grad()
        tokens = torch.zeros(1, T, dtype=torch.int64)
        m(tokens, targets=tokens).backward()
        without = {name.split(".")[-1] for name, p in m.named_parameters() if p.grad is None}
        assert without <= {"log_step"}  # training refuses rows in which no level takes a step


# --------------------------------------------------------------------------------------------------
# Bad input


def test_bad_input_is_named_with_its_value_and_the_legal_range():
    refused = [
        (lambda: SelfModifyingTitans(8, 2, chunk=0), r"chunk must be at least 1.*got 0"),
        (lambda: NeuralMemory(8, 2, chunk=-3), r"chunk must be at least 1.*got -3"),
        (lambda: SelfModifyingTitans(8, 2, memory="mpl"), r"memory 'mpl'.*mean 'mlp'"),
        (lambda: SelfModifyingTitans(8, 2, mode="tokens"), r"mode 'tokens'.*mean 'token'"),
        (lambda: SelfModifyingTitans(8, 2, adaptive=("k", "w")), r"'w': must be one of k, v, q"),
        (lambda: SelfModifyingTitans(8, 2, inner_step=1.5), r"inner_step.*\[0, 1\], got 1.5"),
        (lambda: SelfModifyingTitans(8, 3), r"d_model must be a multiple of n_heads, got 8 and 3"),
        (lambda: NeuralMemory(8, 0), r"d_model must be a multiple of n_heads, got 8 and 0"),
        (lambda: NeuralMemory(8, 2, depth=0), r"depth must be at least 1.*got 0"),
        (lambda: ShortConvolution(8, 0), r"width.*at least 1.*got 0"),
        (lambda: SelfModifyingTitans(8, 2, conv=-1), r"width.*at least 1.*got -1"),
        (lambda: NeuralMemory(8, 2, conv=-1), r"width.*at least 1.*got -1"),
        (lambda: SelfModifyingTitans(8, 2, window_reset=100), r"multiple of chunk.*64.*got 100"),
        (lambda: NeuralMemory(8, 2, window_reset=0), r"window_reset.*multiple of chunk.*got 0"),
        (lambda: NeuralMemory(8, 2, window_reset=64.0), r"window_reset.*multiple.*got 64.0"),
        (lambda: SelfModifyingTitans(8, 2, counters=2), r"below n_heads, 2, .*got 2"),
        (lambda: SelfModifyingTitans(8, 2, counters=-1), r"counters must be at least 0, got -1"),
        (
            lambda: SelfModifyingTitans(8, 2, counters=1, adaptive=("k", "v", "q")),
            r"counters must be .* 0 where q is adaptive, got 1 and \('k', 'v', 'q'\)",
        ),
        (lambda: SelfModifyingTitans(8, 2, chunk=2.5), r"chunk must be an integer, got 2.5"),
        (lambda: SelfModifyingTitans(8, 2, conv=2.5), r"width.*must be an integer, got 2.5"),
        (lambda: SelfModifyingTitans(8.0, 2), r"d_model must be a multiple.*got 8.0 and 2"),
    ]
    for make, message in refused:
        with pytest.raises(ValueError, match=message):
            make()
