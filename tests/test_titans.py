"""Titans and self-modifying Titans against oracles that go token by token, row by row and memory by memory."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from hope import Hope, HopeConfig
from learn import map_state
from titans import NeuralMemory, SelfModifyingTitans, ShortConvolution

D, H, CHUNK = 8, 2, 5  # heads of width 4
EPS = 1e-6

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
    "mlp, momentum": dict(memory="mlp", momentum=True),
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
    "titans, depth 1": dict(depth=1),
    "titans, depth 2": dict(depth=2),
    "titans, depth 3": dict(depth=3),
    "titans, no convolution": dict(conv=0),
    "titans, chunk 1": dict(chunk=1),
}
SELF_MODIFYING = [name for name in VARIANTS if not name.startswith("titans")]
each_mixer = pytest.mark.parametrize("mixer", VARIANTS, indirect=True)


pytestmark = pytest.mark.usefixtures("float64")


def build(name, **changes):
    """A mixer with every parameter away from its (zero, one or equal) initial value, so that each one matters."""
    options = dict(d_model=D, n_heads=H, chunk=CHUNK) | VARIANTS[name] | changes
    mixer = (NeuralMemory if name.startswith("titans") else SelfModifyingTitans)(**options)
    if name == "matrix, readable":
        mixer.fused = False
    return spread(mixer)


def spread(mixer):
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p.add_(torch.randn_like(p) * (1.0 if name.startswith("b") else 0.3))
    return mixer


@pytest.fixture
def mixer(request):
    return build(request.param)


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def assert_same_state(a, b, atol=1e-9):
    assert a.keys() == b.keys() and a["position"] == b["position"]
    for name in ("boundary", "running", "momentum"):
        assert (a[name] is None) == (b[name] is None)
        for x, y in zip(a[name] or [], b[name] or [], strict=True):
            close(x, y, atol)
    if a["conv"] is not None:
        close(a["conv"], b["conv"], atol)


def in_pieces(mixer, x, cuts, state=None):
    ys = []
    for start, stop in pairwise([0, *cuts, x.shape[1]]):
        y, state = mixer(x[:, start:stop], state)
        ys.append(y)
    return torch.cat(ys, 1), state


# --------------------------------------------------------------------------------------------------
# Short convolution


def convolution_by_hand(x, weight):
    """[B, T, D] -> SiLU of the sum over the last `width` tokens; the last row of weight is the token's own."""
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
    conv, x = ShortConvolution(3, width), torch.randn(2, T, 3)
    close(conv(x)[0], convolution_by_hand(x, conv.weight), 1e-12)


@pytest.mark.parametrize("cuts", [[1], [2, 3], [6], list(range(1, 11))])
def test_short_convolution_carries_its_tail_from_call_to_call(cuts):
    conv, x = ShortConvolution(3, 4), torch.randn(2, 11, 3)
    tail, ys = None, []
    for start, stop in pairwise([0, *cuts, 11]):
        y, tail = conv(x[:, start:stop], tail)
        ys.append(y)
    close(torch.cat(ys, 1), convolution_by_hand(x, conv.weight), 1e-12)
    assert torch.equal(tail, x[:, -3:]) and tail.untyped_storage().nbytes() == tail.nbytes


def test_short_convolution_has_the_gradients_of_finite_differences():
    conv = ShortConvolution(3, 3)
    inputs = [torch.randn(2, 4, 3), torch.randn(2, 2, 3), torch.randn(3, 3)]

    def f(x, tail, weight):
        return torch.func.functional_call(conv, {"weight": weight}, (x, tail))

    inputs = [z.requires_grad_() for z in inputs]
    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


# --------------------------------------------------------------------------------------------------
# Oracles: one row, one head and one token at a time, one memory after the other


def unit(v):
    return v / (v @ v + EPS).sqrt()


def rms(v, weight):
    return weight * v / ((v @ v) / len(v) + EPS).sqrt()


class Memory:
    """One memory with its own weights: a matrix, an MLP (one more matrix) or a single row; stepwise.

    Its weights are the start plus what it has learned; only the latter is forgotten.
    """

    def __init__(self, *starts, residual=True):
        self.starts, self.residual = list(starts), residual
        self.learned = [torch.zeros_like(W) for W in starts]
        self.momentum = [torch.zeros_like(W) for W in starts]
        self.reach_boundary()

    @property
    def layers(self):
        return [W0 + W for W0, W in zip(self.starts, self.learned, strict=True)]

    def reach_boundary(self):
        self.boundary, self.boundary_learned = self.layers, self.learned

    def __call__(self, z, weights):
        h = z
        for W in weights[:-1]:
            h = F.silu(W @ h)
        return weights[-1] @ h + (z if self.residual else 0)

    def write(self, k, target, eta, alpha, theta, dgd=True):
        """W <- alpha W - eta (M(k) - target) k^T in the last layer; below it, the surprise at the boundary.

        Without dgd the last layer's M, too, is that of the boundary, and nothing but the gradient is taken off.
        """
        inputs, outputs = [k], []
        for W in self.boundary[:-1]:
            outputs.append((W @ inputs[-1]).detach().requires_grad_())
            inputs.append(F.silu(outputs[-1]))
        errors = [target - (k if self.residual else 0)]
        if outputs:  # d/d(output of the layer) of |M(k) - target|^2 / 2, by autograd
            loss = (self.boundary[-1] @ inputs[-1] + k - target).square().sum() / 2
            errors.insert(0, -torch.autograd.grad(loss, outputs[0])[0] / (1 + self.boundary[1].square().sum()))
        learned = []
        for i, (W, x, u) in enumerate(zip(self.learned, inputs, errors, strict=True)):
            x, last = x.detach(), i == len(errors) - 1
            step = eta if i == 0 else eta / (1 + eta * (x @ x))
            known = (self.starts[i] + W) @ x if last else W @ x
            if not dgd:
                known = self.boundary[i] @ x if last else 0
            self.momentum[i] = theta * self.momentum[i] + step * torch.outer(u - known, x)
            learned.append(alpha * W + self.momentum[i])
        self.learned = learned


def self_modifying_by_hand(m, x):
    """SelfModifyingTitans from its parameters -> (y [B, T, D], {memory: [B][H] Memory at the end})."""
    p = {name: value.detach() for name, value in (*m.named_parameters(), *m.named_buffers())}
    B, T, _ = x.shape
    d = D // H
    z = x @ p["in_proj.weight"].T
    if "conv.weight" in p:
        z = convolution_by_hand(z, p["conv.weight"])
    static = [name for name in ("k", "v", "q") if name not in m.adaptive]
    wide = ["memory", *[name for name in ("k", "v", "q") if name in m.adaptive]]
    gates = ["eta", "alpha", "theta"][: 3 if m.momentum else 2]
    y, ends = torch.zeros(B, T, D), []
    for b in range(B):
        for h in range(H):
            memories = {}
            for i, name in enumerate(wide):
                second = [p["start2"][h, i]] if "start2" in p else []
                memories[name] = Memory(p["start"][h, i * d : (i + 1) * d], *second)
            for i, name in enumerate(gates):
                memories[name] = Memory(p["start"][h, len(wide) * d + i : len(wide) * d + i + 1], residual=False)
            for t in range(T):
                if t % m.chunk == 0:
                    for memory in memories.values():
                        memory.reach_boundary()
                part = {name: z[b, t, i * D + h * d :][:d] for i, name in enumerate(["x", *static])}

                def of(name, at, memories=memories):
                    return memories[name](at, memories[name].boundary)

                k, v, q = (unit(of(name, part["x"]) if name in m.adaptive else part[name]) for name in "kvq")
                A, raw = p["log_A"][h].exp(), {name: of(name, part["x"])[0] + p[f"b_{name}"][h] for name in gates}
                alpha = torch.exp(-m.inner_step * A * torch.log1p(raw["alpha"].exp()))
                eta = m.inner_step * (1 + alpha if m.dgd else 1 / m.chunk) * torch.sigmoid(raw["eta"])
                theta = torch.zeros(())
                if m.momentum:
                    theta = torch.sigmoid(raw["theta"])
                    eta = eta * (1 - theta)
                targets = {name: of(name, v) for name in memories}
                for name, memory in memories.items():
                    memory.write(k, targets[name], eta, alpha, theta, m.dgd)
                reader = memories["memory"]
                out = reader(q, reader.layers if m.mode == "token" else reader.boundary)
                y[b, t, h * d : (h + 1) * d] = rms(out, p["norm.weight"])
            ends.append(memories)
    if "gate_proj.weight" in p:
        y = y * F.silu(x @ p["gate_proj.weight"].T)
    return y @ p["out_proj.weight"].T, ends


def assert_end_weights(m, state, ends, field, get):
    """The stacked weights of `state`, row by row, are those of the separate memories."""
    for i, memories in enumerate(ends):
        b, h = divmod(i, H)
        first = torch.cat([get(memory)[0] for memory in memories.values()])  # memory, k, v, q, eta, alpha, theta
        close(state[field][0][b, h], first)
        if len(state[field]) > 1:
            second = torch.stack([get(memory)[1] for memory in memories.values() if memory.residual])
            close(state[field][1][b, h], second)


@pytest.mark.parametrize("name", SELF_MODIFYING)
def test_self_modifying_titans_is_five_memories_token_by_token(name):
    m, x = build(name), torch.randn(2, 13, D)
    y, state = m(x)
    expected, ends = self_modifying_by_hand(m, x)
    close(y, expected)
    assert_end_weights(m, state, ends, "running", lambda memory: memory.learned)
    if m.momentum:
        assert_end_weights(m, state, ends, "momentum", lambda memory: memory.momentum)
    if 13 % m.chunk:
        assert_end_weights(m, state, ends, "boundary", lambda memory: memory.boundary_learned)


@pytest.mark.parametrize("name", ["matrix", "matrix, readable", "mlp", "momentum", "boundary"])
@pytest.mark.parametrize("chunk, T", [(1, 9), (5, 15), (5, 17), (64, 70)])
def test_self_modifying_titans_is_the_stepwise_rule_for_every_chunk(name, chunk, T):
    m, x = build(name, chunk=chunk), torch.randn(1, T, D)
    close(m(x)[0], self_modifying_by_hand(m, x)[0])


def titans_by_hand(m, x):
    """NeuralMemory from its parameters: the surprise is autograd's gradient at the weights of the chunk boundary."""
    p = {name: value.detach() for name, value in m.named_parameters()}
    B, T, _ = x.shape
    d = D // H
    qkv, gate, rates = (x @ p["in_proj.weight"].T).split([3 * D, D, 3 * H], -1)
    if "conv.weight" in p:
        qkv = convolution_by_hand(qkv, p["conv.weight"])
    y = torch.zeros(B, T, D)
    ends = []
    for b in range(B):
        for h in range(H):
            layers = [start.detach()[h] for start in m.start]
            S = [torch.zeros_like(W) for W in layers]
            for t in range(T):
                if t % m.chunk == 0:
                    boundary = [W.clone().requires_grad_() for W in layers]
                q, k, v = (unit(qkv[b, t, i * D + h * d :][:d]) for i in range(3))
                eta, theta, alpha = (rates[b, t, i * H + h] + p["bias"][i, h] for i in range(3))
                theta, alpha = torch.sigmoid(theta), torch.exp(-torch.log1p(alpha.exp()))
                eta = torch.sigmoid(eta) * (1 - theta) / m.chunk
                lengths, z = [0.0], k  # |x|^2 of the inner layers' inputs, whose step is eta / (1 + eta |x|^2)
                for W in boundary[:-1]:
                    z = F.silu(W @ z)
                    lengths.append((z @ z).detach())
                surprise = torch.autograd.grad((k + boundary[-1] @ z - v).square().sum() / 2, boundary)
                for i, (g, n) in enumerate(zip(surprise, lengths, strict=True)):
                    S[i] = theta * S[i] - eta / (1 + eta * n) * g
                    layers[i] = alpha * layers[i] + S[i]
                z = q
                for W in layers[:-1]:
                    z = F.silu(W @ z)
                y[b, t, h * d : (h + 1) * d] = rms(q + layers[-1] @ z, p["norm.weight"])
            ends.append((layers, S, boundary))
    return (y * F.silu(gate)) @ p["out_proj.weight"].T, ends


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("titans")])
@pytest.mark.parametrize("chunk, T", [(None, 13), (5, 10), (64, 66)])
def test_titans_takes_momentum_steps_of_the_gradient_at_the_boundary(name, chunk, T):
    m, x = build(name, **({"chunk": chunk} if chunk else {})), torch.randn(2 if T < 20 else 1, T, D)
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


def loss_and_gradients(m, x, fused, of_state, start=None):
    """y, state and the gradients of a random linear loss, which includes the state's weights where asked."""
    m.fused = fused
    m.zero_grad()
    x = x.clone().requires_grad_()
    y, state = m(x, start)
    torch.manual_seed(7)
    loss = (y * torch.randn_like(y)).sum()
    for name in ("running", "boundary") if of_state else ():
        loss = loss + (state[name][0] * torch.randn_like(state[name][0])).sum()
    loss.backward()
    return y, state, {name: p.grad.clone() for name, p in m.named_parameters()} | {"x": x.grad}


@pytest.mark.parametrize("of_state", [False, True], ids=["output", "output and state"])
@pytest.mark.parametrize("chunk, T", [(1, 5), (4, 3), (4, 12), (4, 14), (16, 48), (16, 33), (64, 100)])
def test_fused_chunk_step_equals_its_definition_with_every_gradient(chunk, T, of_state):
    m, x = build("matrix", chunk=chunk), torch.randn(2, T, D)
    assert m.fused
    y, state, gradients = loss_and_gradients(m, x, True, of_state)
    expected, expected_state, expected_gradients = loss_and_gradients(m, x, False, of_state)
    close(y, expected)
    assert_same_state(state, expected_state)
    for name, g in expected_gradients.items():
        assert g.abs().max() > 0, name
        close(gradients[name], g)


@pytest.mark.parametrize("inner_step", [0.0, 0.3])
def test_fused_chunk_step_equals_its_definition_at_any_inner_step(inner_step):
    m, x = build("matrix", inner_step=inner_step), torch.randn(2, 12, D)
    _, _, gradients = loss_and_gradients(m, x, True, True)
    for name, g in loss_and_gradients(m, x, False, True)[2].items():
        close(gradients[name], g)


def test_fused_chunk_step_continues_a_state_with_the_gradients_of_its_definition():
    m, x = build("matrix"), torch.randn(2, 19, D)
    gradients = []
    for fused in (True, False):
        m.fused = fused
        _, state = m(x[:, :7])  # a fused chunk, and two tokens of the next
        gradients.append(loss_and_gradients(m, x[:, 7:], fused, True, state)[2])
    for name, g in gradients[1].items():
        close(gradients[0][name], g)


def test_fused_chunk_step_equals_its_definition_in_float32_over_long_sequences():
    torch.set_default_dtype(torch.float32)
    m, x = SelfModifyingTitans(32, 2, chunk=64), torch.randn(2, 1024, 32)
    y, state, gradients = loss_and_gradients(m, x, True, True)
    expected, expected_state, expected_gradients = loss_and_gradients(m, x, False, True)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(state["running"][0], expected_state["running"][0], rtol=1e-3, atol=1e-3)
    for name, g in expected_gradients.items():
        assert (gradients[name] - g).norm() < 1e-3 * g.norm(), name


@pytest.mark.parametrize("n_heads, tokens", [(1, [100]), (2, [10, 1000]), (5, [10, 31.6228, 100, 316.228, 1000])])
def test_heads_start_with_memories_of_many_lengths(n_heads, tokens):
    layer = SelfModifyingTitans(4 * n_heads, n_heads).double()
    x = torch.zeros(1, 1, 4 * n_heads, dtype=torch.float64)  # gates are rows of the memory: at 0 the biases are left
    state = layer.start_state(1)
    state["running"] = state["boundary"] = [torch.ones_like(W) for W in state["running"]]
    kept = layer(x, state)[1]["running"][0][0, :, -1].mean(-1)  # one step of retention; nothing to write at a key of 0
    assert (1 / (1 - kept)).tolist() == pytest.approx(tokens, rel=1e-4)


# --------------------------------------------------------------------------------------------------
# Causality and state


@each_mixer
@pytest.mark.parametrize("t", [0, 4, 5, 7, 12])
def test_future_tokens_never_change_past_outputs(mixer, t):
    x = torch.randn(2, 13, D)
    changed = x.clone()
    changed[:, t:] += torch.randn(2, 13 - t, D)
    y, z = mixer(x)[0], mixer(changed)[0]
    close(z[:, :t], y[:, :t], 1e-12)
    assert (z[:, t] - y[:, t]).abs().min() > 0


@each_mixer
@pytest.mark.parametrize("cuts", [range(1, 23), [3], [5, 10], [1, 2, 12, 20], "random", "random"])
def test_any_way_of_cutting_a_sequence_into_calls_gives_the_same_output(mixer, cuts):
    x = torch.randn(2, 23, D)
    if cuts == "random":
        cuts = sorted(set(torch.randint(1, 23, (4,)).tolist()))
    y, final = mixer(x)
    pieces, state = in_pieces(mixer, x, cuts)
    close(pieces, y)
    assert_same_state(state, final)
    on, _ = in_pieces(mixer, x, [3, 9], final)  # whatever comes next is the same, too
    close(mixer(x, state)[0], on)


@each_mixer
@pytest.mark.parametrize("T", [3, 5, 12])
def test_a_state_is_a_value_that_can_be_continued_twice(mixer, T):
    x, on = torch.randn(2, T, D), torch.randn(2, 9, D)
    with torch.no_grad():
        _, state = mixer(x)
        before = map_state(torch.clone, state)
        first, second = mixer(on, state)[0], mixer(on, state)[0]
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(tensors(before), tensors(state), strict=True))
    assert (mixer(on)[0] - first).abs().max() > 1e-3  # and it matters


def tensors(state):
    out = []
    map_state(out.append, state)
    return out


@each_mixer
def test_rows_of_a_batch_never_share_a_memory(mixer):
    x = torch.randn(3, 13, D)
    y, state = mixer(x)
    for row in range(3):
        alone, own = mixer(x[row : row + 1])
        close(y[row : row + 1], alone, 1e-12)
        close(state["running"][0][row : row + 1], own["running"][0], 1e-12)
    assert (state["running"][0][0] - state["running"][0][1]).abs().max() > 1e-3
    again, swapped = mixer(x.flip(0), map_state(lambda t: t.flip(0), state))
    close(again.flip(0), mixer(x, state)[0], 1e-12)


@pytest.mark.parametrize("options", [dict(), dict(memory="mlp"), dict(momentum=True), dict(mode="boundary")], ids=str)
def test_memories_that_never_learn_stay_at_their_learned_start(options):
    m = build("matrix", inner_step=0.0, **options)
    state = None
    for n in (3, 12, 1, 6):
        _, state = m(torch.randn(2, n, D), state)
        for W in state["running"]:
            assert not W.any()
    _, learned = build("matrix", **options)(torch.randn(2, 3, D))
    assert (learned["running"][0][0] - learned["running"][0][1]).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------
# The outer gradient


@each_mixer
def test_outer_gradient_reaches_every_learned_start_and_every_other_parameter(mixer):
    mixer(torch.randn(2, 13, D))[0].square().sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
        if name.startswith("start"):  # every row of every memory of every head, but alpha's where it is fixed
            fixed = name == "start" and "log_A" in dict(mixer.named_buffers())
            assert (p.grad.abs().amax(-1) == 0).sum() == fixed * len(p), name


@each_mixer
def test_outer_gradient_through_the_writes_equals_finite_differences(mixer):
    x, step = torch.randn(2, 13, D), 1e-6
    weights = torch.randn(2, 13, D)

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
        assert slope == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-6), name


@each_mixer
def test_outer_gradient_is_the_same_however_the_sequence_is_cut(mixer):
    x, weights = torch.randn(2, 13, D), torch.randn(2, 13, D)
    gradients = []
    for cuts in ([], [3, 7, 10]):
        mixer.zero_grad()
        (in_pieces(mixer, x, cuts)[0] * weights).sum().backward()
        gradients.append([p.grad.clone() for p in mixer.parameters()])
    for a, b in zip(*gradients, strict=True):
        close(a, b)


# --------------------------------------------------------------------------------------------------
# Stability


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("model, memory", [("hope", "matrix"), ("hope", "mlp"), ("titans", "matrix")])
def test_training_at_a_high_learning_rate_stays_finite_and_learns(model, memory, chunk):
    torch.set_default_dtype(torch.float32)
    sizes = dict(vocab_size=16, d_model=32, n_layers=2, n_heads=2, hidden=64)
    m = Hope(HopeConfig(model=model, memory=memory, chunk=chunk, **sizes))
    optimizer = torch.optim.AdamW(m.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        period = (16 * torch.rand(4, 12) ** 3).long().repeat(1, 9)[:, :97]  # some tokens are more frequent than others
        loss = F.cross_entropy(m(period[:, :-1])[0].flatten(0, 1), period[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in m.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(p).all() for p in m.parameters())
    assert max(losses) < 1.5 * losses[0] and losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["matrix", "mlp", "momentum", "titans, depth 1", "titans, depth 2"])
def test_a_token_repeated_4096_times_stays_finite_with_its_gradients(name):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(1)
    options = dict(d_model=32, n_heads=2, chunk=64) | VARIANTS[name]
    m = (NeuralMemory if name.startswith("titans") else SelfModifyingTitans)(**options)
    x = torch.randn(1, 1, 32).repeat(1, 4096, 1).requires_grad_()
    y, state = m(x)
    y.square().mean().backward()
    assert all(torch.isfinite(t).all() for t in [y, x.grad, *tensors(state), *[p.grad for p in m.parameters()]])
    assert max(W.abs().max() for W in state["running"]) < 100


# --------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "make_it, message",
    [
        (lambda: SelfModifyingTitans(8, 2, chunk=0), r"chunk must be at least 1.*got 0"),
        (lambda: NeuralMemory(8, 2, chunk=-3), r"chunk must be at least 1.*got -3"),
        (lambda: SelfModifyingTitans(8, 2, memory="mpl"), r"'matrix' or 'mlp', got 'mpl'"),
        (lambda: SelfModifyingTitans(8, 2, mode="tokens"), r"'token' or 'boundary', got 'tokens'"),
        (lambda: SelfModifyingTitans(8, 2, adaptive=("k", "w")), r"subset of k, v, q, got \('k', 'w'\)"),
        (lambda: SelfModifyingTitans(8, 3), r"d_model is 8, n_heads is 3.*divisor"),
        (lambda: NeuralMemory(8, 0), r"n_heads is 0"),
        (lambda: NeuralMemory(8, 2, depth=0), r"depth.*at least 1.*got 0"),
        (lambda: ShortConvolution(8, 0), r"width.*at least 1.*got 0"),
        (lambda: SelfModifyingTitans(8, 2, conv=-1), r"width.*at least 1.*got -1"),
        (lambda: NeuralMemory(8, 2, conv=-1), r"width.*at least 1.*got -1"),
    ],
)
def test_bad_input_is_named_with_its_value_and_the_legal_range(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()
