"""Titans and self-modifying Titans: memories that learn at test time, as sequence mixers.

`NeuralMemory` is the long-term memory module of Titans (LMM). Static projections make keys, values
and queries; a deep memory takes momentum steps of the l2 gradient, with step size, momentum and
retention read off the token.

`SelfModifyingTitans` (NL section 8) lets memories make all of that themselves. Per head there is
one memory for each of k, v, eta, alpha and for the content, M_t(z) = z + (W_0 + W_t) z: W_0, the
`start` parameters, is learned in training; W_t, which begins at 0, is what the text has taught. (Or
the MLP z + W1 silu(W2 z), NL eq. 89, both layers of that form; eta and alpha are single rows
without residual.) Everything is generated from the weights at the boundary of the chunk:

    k = l2norm(M_k(x))                              v = l2norm(M_v(x))
    alpha = exp(-A softplus(M_alpha(x) + b_alpha))  eta = (1 + alpha) sigmoid(M_eta(x) + b_eta)
    targets  v^_m = M_m(v)              for every memory m: its own choice            (NL eq. 83-85)
    write    W_m <- alpha W_m - eta (M_m(k) - v^_m) k^T    alpha forgets towards W_0 (NL eq. 88, 93)
    read     y = M_memory,t(q)          at the running weights of the token              (NL eq. 86)

All first layers share the key k, eta and alpha, so they are ONE memory with stacked rows
[memory | k | v | eta | alpha]: one read, one triangular system and one write per chunk, not five.

`SelfModifyingTitans._chunk` is the definition. By default a layer runs the same step in fused form,
which repeats it (fused.py; on a GPU kernels.py): whoever changes `_chunk` sets `self.fused = False`
in `__init__`, else training ignores the change. docs/paper.md explains the numbered deviations.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import fused
from fused import EPS, TARGET, at_most, kernels_for, settled, silu_derivative
from layers import (
    Recurrent,
    at_least,
    clock,
    component,
    convolution,
    count,
    deep_memory,
    head_width,
    heads,
    linear,
    map_state,
    of_rows,
    one_of,
    over_chunks,
    over_windows,
    recomputed,
    retention_of,
    scan_products,
    whole_chunks,
)
from memory import full_precision, l2norm, read, scan, write

# --------------------------------------------------------------------------------------------------
# Self-modifying Titans


class SelfModifyingTitans(nn.Module):
    """NL eq. 83-93, see the top of this file. (x [B, T, d_model], state) -> (y, state).

    chunk: tokens that share the weights everything is generated from (deviations 1 and 6).
    memory: "matrix", or "mlp" for M(z) = z + W1 silu(W2 z), hidden width = head width (NL eq. 89).
    adaptive: which of "k", "v", "q" have a memory of their own; the others are static projections.
    momentum: adds theta, one more self-generated row.
    inner_step: 1; 0 freezes every memory at its initial weights (the control).
    gate, conv: the output gate; the width of the short convolution (0: none).
    mode: "token" reads the running weights, "boundary" those of the chunk boundary (NL eq. 90).
    dgd: if True, the delta rule: each token's error uses the weights just before it. If False,
    every gradient uses the chunk-start weights, and eta is divided by the chunk for stability.
    retention: False fixes alpha = 1.
    counters: how many heads, the last ones, are a `Counter` (deviation 28); q must be static.
    window_reset: tokens, a multiple of chunk, after which W_t is 0 again (deviation 26), or None.

    State: "position"; "boundary" and "running" weights W_t, without W_0 (lists: first layers
    [B, H, rows, d], second layers [B, H, m, d, hidden], of the H heads that are no counters);
    "momentum" (like "running", or None); "conv", the convolution's tail; with counters "counted",
    their W_t [B, counters, d, d]. Raises ValueError for sizes and names that do not fit.
    """

    def __init__(self, d_model, n_heads, chunk=64, memory="matrix", adaptive=("k", "v"),
                 momentum=False, inner_step=1.0, conv=4, gate=True, mode="token", dgd=True,
                 retention=True, out_scale=1.0, window_reset=None, counters=0):
        super().__init__()
        d = head_width(d_model, n_heads)
        at_least(1, chunk=chunk)
        at_least(0, counters=counters)
        if counters and (counters >= n_heads or "q" in adaptive):
            wanted = f"below n_heads, {n_heads}, and 0 where q is adaptive"
            raise ValueError(f"counters must be {wanted}, got {counters} and {adaptive!r}")
        whole_chunks(window_reset, chunk)
        one_of("memory", memory, ("matrix", "mlp"))
        one_of("mode", mode, ("token", "boundary"))
        for name in adaptive:
            one_of("name in adaptive", name, ("k", "v", "q"))
        if not (isinstance(inner_step, (int, float)) and 0 <= inner_step <= 1):
            raise ValueError(f"inner_step must be in [0, 1], got {inner_step!r}")
        self.n_heads = n_heads
        self.counters = counters
        self.d = d
        self.chunk = chunk
        self.window_reset = window_reset
        self.momentum = momentum
        self.mode = mode
        self.inner_step = inner_step
        self.dgd = dgd
        self.backend = "auto"  # see fused.kernels_for
        self.adaptive = [name for name in ("k", "v", "q") if name in adaptive]
        self.static = [name for name in ("k", "v", "q") if name not in adaptive]
        n = 1 + len(self.adaptive)  # memories with an output of width d
        gates = 3 if momentum else 2  # single rows: eta, alpha, theta
        # False: `_chunk` computes everything
        self.fused = mode == "token" and dgd and {"k", "v"} <= set(adaptive)
        self.usual = memory == "matrix" and "q" in self.static and not momentum  # as in kernels.py

        streams = 1 + len(self.static)
        self.in_proj = linear(d_model, streams * d_model)  # deviation 10
        self.gate_proj = linear(d_model, d_model) if gate else None
        self.conv = convolution(streams * d_model, conv)
        n_heads -= counters
        self.start = nn.Parameter(torch.randn(n_heads, n * d + gates, d) * d**-0.5)  # W_0
        with torch.no_grad():
            self.start[:, n * d :] = 0.0  # the first step sizes are the biases
        self.start2 = None
        if memory == "mlp":
            self.start2 = nn.Parameter(torch.randn(n_heads, n, d, d) * d**-0.5)
        self.b_eta = nn.Parameter(torch.zeros(n_heads))
        # deviation 8: heads remember for 10 to 1,000 tokens at first. With 10 for all, what must be
        # kept over hundreds of tokens is not learned from some seeds.
        tokens = torch.logspace(1, 3, n_heads) if n_heads > 1 else torch.tensor([100.0])
        b_alpha = -torch.log(tokens - 1)
        log_A = torch.zeros(n_heads)
        if retention:
            self.b_alpha = nn.Parameter(b_alpha)
            self.log_A = nn.Parameter(log_A)
        else:  # exp(-0 softplus(.)) = 1, whatever else there is
            self.register_buffer("b_alpha", b_alpha)
            self.register_buffer("log_A", log_A - math.inf)
        self.b_theta = nn.Parameter(torch.zeros(n_heads)) if momentum else None
        self.counter = Counter(counters, d) if counters else None
        self.norm = nn.RMSNorm(d, eps=EPS)
        self.out_proj = linear(d_model, d_model, out_scale)

    def forward(self, x, state=None):
        state = of_rows(state, x, self.in_proj.weight) or self.start_state(len(x))
        # project, convolve, cut into heads: "x" and what is not self-generated, [B, H, T, d] each
        z = self.in_proj(x)
        tail = state["conv"]
        if self.conv is not None:
            z, tail = self.conv(z, tail)
        z = full_precision(z)
        names = ["x", *self.static]
        parts = [heads(part, self.n_heads) for part in z.chunk(len(names), -1)]
        streams = dict(zip(names, parts, strict=True))
        for name in self.static:
            streams[name] = l2norm(streams[name], EPS)
        # the fused kernels multiply in this type; torch's path stays in float32
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        operands = torch.bfloat16 if autocast == torch.bfloat16 else z.dtype

        def one_chunk(now, boundary, running, momentum):
            return recomputed(self._chunk, now, boundary, running, momentum)

        def all_chunks(now, running, momentum):
            return self._all_chunks(now, running, momentum, operands)

        def learn_and_read(streams, state):
            insisted = self.backend == "triton" and not self.usual  # on the kernels of `scan`
            at_once = all_chunks if self.fused and not insisted else None
            settle = (lambda W: settled(W)[0]) if self.momentum else None  # deviation 27
            n = self.n_heads - self.counters
            first = map_state(lambda t: t[:, :n], streams)
            y, after = over_chunks(one_chunk, first, state, self.chunk, at_once, settle)
            if self.counter is None:
                return y, after
            x, q = streams["x"][:, n:], streams["q"][:, n:]
            counted, W = self.counter(x, q, state["counted"], self.inner_step, self.backend)
            return torch.cat([y, counted], 1), after | {"counted": W}

        with torch.autocast(x.device.type, enabled=False):
            windows = (self.window_reset, self.start_weights)
            y, state = over_windows(learn_and_read, streams, state, *windows)
        # normalise per head, gate, project
        y = self.norm(y).to(x.dtype).transpose(1, 2).flatten(2)  # [B, T, d_model]
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(x))
        return self.out_proj(y), state | {"conv": tail}

    def start_state(self, batch):
        """The state before the first token."""
        return {"position": 0, "conv": None} | self.start_weights(batch)

    def start_weights(self, batch):
        """Weights of a state that has learned nothing yet, every row its own."""
        running = [W0.new_zeros(batch, *W0.shape) for W0 in self.initial_weights()]
        momentum = [torch.zeros_like(W) for W in running] if self.momentum else None
        weights = {"boundary": running, "running": running, "momentum": momentum}
        if self.counter is None:
            return weights
        counted = full_precision(self.counter.start).new_zeros(batch, self.counters, self.d, self.d)
        return weights | {"counted": counted}

    def initial_weights(self):
        """W_0 of the first layers, and of the second ones of MLPs."""
        return [full_precision(W0) for W0 in (self.start, self.start2) if W0 is not None]

    def _chunk(self, streams, boundary, running, momentum):
        """Tokens of one chunk, generated from `boundary`, read and written from `running` on.

        The definition. streams: x and static projections, [B, H, C, d] -> (y, running, momentum).
        """
        x = streams["x"]
        d = self.d
        n = 1 + len(self.adaptive)
        initial = self.initial_weights()
        boundary = [W0 + W for W0, W in zip(initial, boundary, strict=True)]
        # generate keys, values and rates from the boundary weights (deviation 1)
        blocks, gates = self._outputs(boundary, x, first=1)
        made = dict(zip(self.adaptive, l2norm(blocks, EPS).unbind(-3), strict=True)) | streams
        k = made["k"]
        v = made["v"]  # deviation 3: of unit length
        q = made["q"]
        z_alpha = gates[..., 1] + self.b_alpha[:, None]  # [B, H, C], as all rates
        alpha = retention_of(z_alpha, self.inner_step * self.log_A.exp()[:, None])
        eta = self.inner_step * torch.sigmoid(gates[..., 0] + self.b_eta[:, None])
        # deviation 5: along k the state is multiplied by alpha - eta, which must stay above -1
        eta = eta * (1 + alpha) if self.dgd else eta / self.chunk
        theta = None
        if self.momentum:
            z_theta = gates[..., 2] + self.b_theta[:, None]
            theta = torch.sigmoid(z_theta)
            # deviation 9: stable for any unit keys; 1 - theta, with all its digits
            eta = eta * torch.sigmoid(-z_theta).square() / (1 + theta)
        rates = {"eta": eta, "alpha": alpha, "theta": theta}
        rule = {"delta": float(self.dgd), "backend": self.backend}
        # every memory chooses its target
        targets, gate_targets = self._outputs(boundary, v)  # [B, H, n, C, d], [B, H, C, gates]
        mlp = len(running) > 1
        if mlp:  # deviation 27
            targets, _ = at_most(targets, TARGET)
            gate_targets = gate_targets.clamp(-TARGET, TARGET)
        u = targets - k.unsqueeze(-3)
        outside = initial if self.dgd else boundary  # the part of M(k) that the scan does not hold
        if mlp:  # the first layer is a memory from k to -gradient
            z = (k @ boundary[0][..., : n * d, :].mT).unflatten(-1, (n, d)).transpose(-3, -2)
            h = F.silu(z)  # [B, H, n, C, d]
            g = ((h @ boundary[1].mT - u) @ boundary[1]) * silu_derivative(z)
            u1 = -g / (1 + boundary[1].square().sum((-2, -1), keepdim=True))  # deviation 7
            u1, _ = at_most(u1, 1.0)  # deviation 27
        else:
            read_outside = (k @ outside[0][..., : n * d, :].mT).unflatten(-1, (n, d))
            u1 = u - read_outside.transpose(-3, -2)
        u1 = u1.transpose(-3, -2).flatten(-2)  # [B, H, C, n d]
        u1 = torch.cat([u1, gate_targets - k @ outside[0][..., n * d :, :].mT], -1)
        # Write, and read at the running weights. All rows are read at q though only memory's own
        # are needed: a second scan for the others would cost more.
        S = momentum[0] if momentum else None
        y, W, S = scan(running[0], k, u1, q=q, S=S, **rates, **rule)
        y = y[..., :d] + q @ initial[0][:, :d].mT
        running = [W, *running[1:]]
        momentum = momentum and [S, *momentum[1:]]
        if self.mode == "boundary":
            y = q @ boundary[0][..., :d, :].mT
        if mlp:  # a memory from h, which is not of unit length, to what is left (deviation 7)
            rates = {name: r if r is None else r.unsqueeze(-2) for name, r in rates.items()}
            rates["eta"] = rates["eta"] / (1 + rates["eta"] * h.square().sum(-1))
            S = momentum[1] if momentum else None
            hq = F.silu(y)
            read_at = hq.unsqueeze(-3).expand_as(h)
            y, W, S = scan(running[1], h, u - h @ outside[1].mT, q=read_at, S=S, **rates, **rule)
            y = y[..., 0, :, :] + hq @ initial[1][:, 0].mT
            running = [running[0], W]
            momentum = momentum and [momentum[0], S]
            if self.mode == "boundary":
                y = hq @ boundary[1][..., 0, :, :].mT
        if self.mode == "boundary":  # rates of the last chunk have a gradient too: DDP waits for it
            y = y + 0 * (eta + alpha).unsqueeze(-1)
        return q + y, running, momentum

    def _outputs(self, weights, z, first=0):
        """Memories first.. at z [B, H, C, d] -> (M(z) [B, H, m, C, d], rows [B, H, C, gates])."""
        d = self.d
        m = 1 + len(self.adaptive) - first
        out = z @ weights[0][..., first * d :, :].mT
        blocks = out[..., : m * d].unflatten(-1, (m, d)).transpose(-3, -2)
        if len(weights) > 1:
            blocks = F.silu(blocks) @ weights[1][..., first:, :, :].mT
        return z.unsqueeze(-3) + blocks, out[..., m * d :]

    def _all_chunks(self, streams, running, momentum, operands):
        """`_chunk` for all chunks from a boundary on, by kernels.py where it fits or fused.py."""
        x = streams["x"]
        gates = (self.b_eta, self.b_alpha, self.log_A.exp(), self.b_theta)
        gates = [full_precision(gate) for gate in gates]
        kernels = None
        if self.usual:
            like = x.new_empty(0, dtype=operands)
            kernels = kernels_for("self_modify", like, self.d, self.backend, chunk=self.chunk)
        args = (x, streams.get("q"), running, momentum, self.initial_weights(), gates)
        return fused.all_chunks(*args, self.chunk, self.inner_step, kernels, operands)

    def products(self, T):
        d = self.d
        n = 1 + len(self.adaptive)
        H, rows = self.start.shape[:2]
        counting = 3 * (5 * d + 1) * d + scan_products(d, d, T, delta=False)
        counting *= self.counters
        C = min(self.chunk, T)
        generate = (rows - d) * d + d * d  # and the read at the initial weights
        if self.fused:  # fused.self_modify, by its lines
            states = 1 + self.momentum
            per_chunk = rows * d + states * (2 * rows * d + d * d) + C * (3 * d + rows)
            triangular = C * C * (1 / 3 + 1 + 2 * self.momentum)
            if self.start2 is not None:  # targets and gradients too; the second layers
                per_chunk += rows * d + (5 * n + states * (2 * n + 1)) * d * d + C * d * (2 * n + 2)
                triangular += n * C * C / 3
            return H * (3 * (generate + per_chunk) + triangular) + counting
        rule = {"tile": self.chunk, "momentum": self.momentum, "decays": 1 + self.momentum}
        usual = 3 * (generate + 2 * rows * d) + scan_products(d, rows, T, **rule)
        if self.start2 is not None:
            usual += 3 * 5 * n * d * d + n * scan_products(d, d, T, **rule)
        return H * usual + counting

    def components(self):
        if not self.inner_step:  # frozen: as static as any projection
            return []
        size = sum(W0.numel() for W0 in self.initial_weights())
        made = ", ".join(["content", *self.adaptive, "eta", "alpha"])
        rows = [component(f"memories ({made})", clock(self), "own targets, in context", size)]
        if self.counter is not None:
            size = count(self.counter)
            rows.append(component("counters (content)", "every token", "targets, in context", size))
        return rows


class Counter(nn.Module):
    """Heads that count without end: self-modifying memories of which nothing is fed back.

    Not in the paper (deviation 28).

        W_t = W_{t-1} + eta M_0(v) k^T               y = M_t(q)

    k, v and eta are generated as above, from W_0 at all times, and alpha is 1. (x, q, W) -> (y, W):
    x, q [B, H, T, d], q of unit length; W [B, H, d, d], what was learned.
    """

    def __init__(self, n_heads, d):
        super().__init__()
        start = torch.randn(n_heads, 3 * d + 1, d) * d**-0.5  # rows memory | k | v | eta
        start[:, 3 * d :] = 0.0
        self.start = nn.Parameter(start)
        self.b_eta = nn.Parameter(torch.zeros(n_heads))

    def forward(self, x, q, W, inner_step=1.0, backend="auto"):
        d = x.shape[-1]
        start = full_precision(self.start)
        memory = start[:, :d].mT
        made = x @ start[:, d:].mT
        k = l2norm(x + made[..., :d], EPS)
        v = l2norm(x + made[..., d : 2 * d], EPS)
        eta = 2 * inner_step * torch.sigmoid(made[..., 2 * d] + self.b_eta[:, None])
        target = v + v @ memory
        rates = (eta, torch.ones_like(eta))
        y, W, _ = scan(W, k, target, *rates, q, delta=0.0, backend=backend)
        return q + q @ memory + y, W


# --------------------------------------------------------------------------------------------------
# Titans


class NeuralMemory(Recurrent):
    """The long-term memory module of Titans (LMM, Titans paper sec. 3): surprise with forgetting.

        S_t = theta_t S_{t-1} - eta_t grad |M(k_t) - v_t|^2 / 2
        W_t = alpha_t W_{t-1} + S_t                                     y_t = M_t(q_t)

    An MLP of `depth` residual layers (1: a matrix), gradients at the weights of the chunk boundary,
    reads at the running weights. eta, theta, alpha are read off the token. All writes of a chunk
    repeat the same gradient step for equal keys, so eta < (1 - theta) / chunk (deviation 34): one
    chunk can at most close the gap. Values have unit length (deviation 3).
    gate: the output gate and projection; without, y is the read alone (for MAC, MAG, MAL).
    window_reset: tokens, a multiple of chunk, after which M is M_0 again (deviation 26), or None.
    State: "position", "boundary", "running", "momentum" (see SelfModifyingTitans), "conv".
    Raises ValueError for sizes that do not fit.
    """

    def __init__(self, d_model, n_heads, chunk=64, depth=2, conv=4, window_reset=None,
                 out_scale=1.0, gate=True):
        at_least(1, chunk=chunk, depth=depth)
        whole_chunks(window_reset, chunk)
        self.depth = depth  # before the parameters that make_memory creates
        super().__init__(d_model, n_heads, conv, 1, 3, gate, project=gate, out_scale=out_scale)
        self.chunk = chunk
        self.window_reset = window_reset

    def make_memory(self):
        H, d = self.n_heads, self.width
        self.start = nn.ParameterList(torch.randn(H, d, d) * d**-0.5 for _ in range(self.depth))
        bias = torch.tensor([[0.0], [0.0], [-math.log(10_000 - 1)]])  # of eta, theta, alpha
        self.bias = nn.Parameter(bias.repeat(1, H))

    def start_state(self, batch):
        return {"position": 0, "conv": None} | self.start_weights(batch)

    def start_weights(self, batch):
        running = [full_precision(W0).expand(batch, *W0.shape).clone() for W0 in self.start]
        momentum = [torch.zeros_like(W) for W in running]
        return {"boundary": running, "running": running, "momentum": momentum}

    def remember(self, q, k, v, rates, state):
        q = l2norm(q, EPS)
        k = l2norm(k, EPS)
        v = l2norm(full_precision(v), EPS)
        eta, theta, alpha = rates + self.bias[:, None, :, None]  # [B, H, T] each
        eta = torch.sigmoid(eta) * torch.sigmoid(-theta) / self.chunk  # 1 - theta, all its digits
        theta = torch.sigmoid(theta)
        alpha = retention_of(alpha, 1.0)

        def one_chunk(now, boundary, running, momentum):
            return write(boundary, **now, delta=0.0, momentum=momentum, running=running,
                         backend=self.backend)

        def learn_and_read(streams, state):
            return over_chunks(one_chunk, streams, state, self.chunk)

        streams = {"k": k, "target": v, "eta": eta, "alpha": alpha, "q": q, "theta": theta}
        return over_windows(learn_and_read, streams, state, self.window_reset, self.start_weights)

    def retrieve(self, x, state):
        """What the memory of the last chunk boundary says to x [B, T, d_model]; nothing is written.

        Its queries pass no convolution, which would need the tokens before.
        """
        q = F.silu(F.linear(x, self.in_proj.weight[: x.shape[-1]]))
        with torch.autocast(x.device.type, enabled=False):
            y = read(state["boundary"], l2norm(heads(full_precision(q), self.n_heads), EPS))
        return self.norm(y).to(x.dtype).transpose(1, 2).flatten(2)

    def products(self, T):
        d = self.width
        scans = scan_products(d, d, T, self.chunk, delta=False, momentum=True, decays=2)
        surprise = 3 * (2 * self.depth - 1) * d * d  # at the boundary
        return self.n_heads * (surprise + self.depth * scans)

    def components(self):
        return deep_memory(self, self.start)


if __name__ == "__main__":
    from runpy import run_module

    run_module("bench.demos", run_name="titans")
