"""Titans and self-modifying Titans: memories that learn at test time, as mixers of a sequence model.

`NeuralMemory` is the long-term memory module of Titans (LMM): static projections make keys, values and queries; a deep
memory takes momentum steps of the l2 gradient, with step size, momentum and retention read off the token.

`SelfModifyingTitans` (NL section 8) lets memories make all of that themselves. Per head there is one memory for each of
k, v, eta, alpha and for the content. With M_t(z) = z + (W_0 + W_t) z, W_0 the learned start and W_t what the text has
taught it (or the MLP z + W1 silu(W2 z), NL eq. 89, both layers of that form; eta and alpha are single rows without
residual), everything generated from the weights at the boundary of the chunk:

    k = l2norm(M_k(x))                   v = l2norm(M_v(x))
    alpha = exp(-A softplus(M_alpha(x) + b))      eta = (1 + alpha) sigmoid(M_eta(x) + b)
    targets   v^_m = M_m(v)             for every memory m: it chooses what it wants to learn          (NL eq. 83-85)
    write     W_m <- alpha W_m - eta (M_m(k) - v^_m) k^T        delta rule at the running weights      (NL eq. 88, 93)
    read      y = M_memory,t(q)         the running weights of the token                               (NL eq. 86)

All first layers share the key k, eta and alpha, so they are ONE memory with stacked rows [memory | k | v | eta | alpha]:
one read, one triangular system and one write per chunk instead of five.

Departures from the printed formulas, and why:

- the boundary is the end of the *previous* chunk (NL eq. 91 prints the end of the current one: the future would leak);
- v is normalised: self-generated targets are quadratic in the weights and otherwise diverge;
- retention acts on W_t and not on W_0: forgetting leads back to what training knew, not to nothing (measured: 0.045 bits
  per byte at 0.4M tokens of the nano run, one seed);
- the l2 gradient is taken once, at the running weights (see memory.write);
- eta stays below 1 + alpha: along a key the state is multiplied by alpha - eta, stable, yet negative where parity needs it;
- the gradient that an MLP's second layer W1 hands down is divided by 1 + |W1|^2, so that it stays shorter than the error
  (else chunks of 16 explode), and the first layer's delta term, too, acts on W_t alone;
- one chunk length for all memories (the paper has two), because the rows are stacked; eta and alpha are single rows also
  where the other memories are MLPs.

`python titans.py` trains one layer to look up pairs it has just been shown, with memories that learn and with frozen ones.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from memory import (
    decay_backward,
    decay_forward,
    full_precision,
    fused,
    l2norm,
    read,
    scan,
    silu_derivative,
    unit_lower_inverse,
    write,
)

EPS = 1e-6  # of l2norm

# ---------------------------------------------------------------------------------------------------------------------
# Short convolution


class _CausalConv(torch.autograd.Function):
    """SiLU of a depthwise convolution, as shifted multiply-adds: on a CPU faster than conv1d and its backward.

    The backward computes the convolution again, which is cheaper than keeping what SiLU was applied to.
    """

    @staticmethod
    def convolve(x, w):
        T = x.shape[1] - len(w) + 1
        y = x[:, :T] * w[0]
        for j in range(1, len(w)):
            y.addcmul_(x[:, j : j + T], w[j])
        return y

    @staticmethod
    def forward(ctx, x, w):  # x [B, width-1+T, D], w [width, D]
        ctx.save_for_backward(x, w)
        return F.silu(_CausalConv.convolve(x, w), inplace=True)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        T = grad.shape[1]
        y = _CausalConv.convolve(x, w)
        if torch.is_grad_enabled():  # a second derivative is wanted, which the fused form has not
            grad = grad * silu_derivative(y)
        else:
            grad = torch.ops.aten.silu_backward(grad, y)
        dx, dw = torch.zeros_like(x, dtype=grad.dtype), []
        for j in range(len(w)):
            dx[:, j : j + T].addcmul_(grad, w[j])
            dw.append((x[:, j : j + T] * grad).sum((0, 1)))
        return dx, torch.stack(dw)


class ShortConvolution(nn.Module):
    """SiLU of a causal depthwise convolution, which carries its last width-1 inputs from call to call.

    (x [B, T, D], tail [B, width-1, D] or None) -> (y [B, T, D], tail). Raises ValueError for width < 1.
    """

    def __init__(self, dim, width=4):
        super().__init__()
        if width < 1:
            raise ValueError(f"width of a convolution must be at least 1 token, got {width}")
        self.weight = nn.Parameter(torch.randn(width, dim) * width**-0.5)

    def forward(self, x, tail=None):
        width = len(self.weight)
        if tail is None:
            tail = x.new_zeros(x.shape[0], width - 1, x.shape[2])
        x = torch.cat([tail, x], 1)
        # a copy, or the state would keep the whole input alive
        return _CausalConv.apply(x, self.weight), x[:, x.shape[1] - width + 1 :].clone()


def linear(d_in, d_out, scale=1.0):
    """A projection without bias, std scale / sqrt(d_in): inputs of unit variance give outputs of variance scale^2."""
    layer = nn.Linear(d_in, d_out, bias=False)
    nn.init.normal_(layer.weight, std=scale * d_in**-0.5)
    return layer


def heads(x, n):
    """[B, T, n * d] -> [B, n, T, d]."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def head_width(d_model, n_heads):
    """d_model / n_heads. Raises ValueError where that is no positive integer."""
    if n_heads < 1 or d_model < 1 or d_model % n_heads:
        raise ValueError(f"d_model is {d_model}, n_heads is {n_heads}; n_heads must be a divisor of d_model")
    return d_model // n_heads


def by_chunk(position, T, chunk):
    """Cuts T tokens that begin at an absolute position where chunks end -> (slice, whether it begins a chunk), in order."""
    i = 0
    while i < T:
        left = chunk - (position + i) % chunk  # tokens of this chunk still to come
        yield slice(i, i + left), left == chunk
        i += left


def retention_of(z, A):
    """exp(-A softplus(z)): comes as close to 1 as float32 can hold, where a sigmoid's gradient has long vanished.

    With A = 1, z = -log(n - 1) gives 1 - 1/n: a memory of n tokens.
    """
    return torch.exp(-A * F.softplus(z))


# ---------------------------------------------------------------------------------------------------------------------
# Self-modifying Titans, the chunk step with matrix memories, fused


class _SelfModify(torch.autograd.Function):
    """All chunks of one layer with hand-derived backward; `SelfModifyingTitans._chunk` is its readable definition.

    x, q [N, T, d] (N = batch x heads, q of unit length), W, W0 [N, 3d + 2, d] rows [memory | k | v | eta | alpha],
    b_eta, b_alpha, A [N, 1], starting on a chunk boundary -> W_t q_t [N, T, d], W_T, and W at the last boundary.

    Symbols as at the top of memory.py. Backward walks the chunks in reverse with dW, the gradient at the chunk's end.
    """

    # What limits it now (`python bench.py speed --profile hope`: one training step, d 256, 4 x 1024 tokens, one CPU thread):
    # this function takes 36% of the step (forward 13%, backward 23%), the projections and MLPs around it 42%. Two thirds of
    # its time are batched products of 64 x 64 x 194, a third passes over the [C, C] decays and [C, rows] errors between
    # them. Not measured on a GPU, where we expect it bound by the launches of these small kernels, one chunk after the other.

    @staticmethod
    def forward(ctx, x, q, W, W0, b_eta, b_alpha, A, chunk, step):
        N, T, d = x.shape
        y, saved = torch.empty_like(x), []
        for i in range(0, T, chunk):
            xc, qc = x[:, i : i + chunk], q[:, i : i + chunk]
            C = xc.shape[1]
            boundary = W
            # generate from the boundary weights
            g = xc @ (W + W0)[:, d:].mT
            kv = g[..., : 2 * d].unflatten(-1, (2, d)) + xc.unsqueeze(2)
            norm = torch.rsqrt(torch.linalg.vecdot(kv, kv).add_(EPS)).unsqueeze(-1)
            kv.mul_(norm)
            k, v = kv.unbind(2)
            z_alpha = g[..., 2 * d + 1] + b_alpha
            alpha = torch.exp(-step * A * F.softplus(z_alpha))
            sig = torch.sigmoid(g[..., 2 * d] + b_eta)
            eta = step * (1 + alpha) * sig
            # solve for the errors r of all rows: targets - residual - a W k = v - k + W0 (v - k) + W (v - a k)
            P = decay_forward(alpha)
            a, ce = P[..., :1], P[..., 1:] * eta.unsqueeze(1)
            kq = torch.cat([k, qc], 1)
            S = kq @ k.mT
            Z = torch.addcmul(v, a[:, :C], k, value=-1)
            vk = v - k
            r = torch.baddbmm(vk @ W0.mT, Z, W.mT)
            r[..., : 3 * d].unflatten(-1, (3, d)).add_(vk.unsqueeze(2))
            X = unit_lower_inverse(ce[:, :C] * S[:, :C])
            r = X @ r
            # read at the running weights, then write
            y[:, i : i + chunk] = torch.baddbmm(a[:, 1:] * (qc @ W[:, :d].mT), ce[:, 1:] * S[:, C:], r[..., :d])
            W = torch.baddbmm(a[:, C:] * W, (ce[:, C].unsqueeze(-1) * r).mT, k)
            if any(ctx.needs_input_grad):
                saved += [boundary, kv, norm, X, r, P, alpha, sig, z_alpha]
        ctx.save_for_backward(x, q, W0, A, *saved)
        ctx.chunk, ctx.step = chunk, step
        return y, W, boundary.clone()  # a copy: the first one is an input

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dW, d_boundary):
        with torch.autocast(dy.device.type, enabled=False):
            return _SelfModify.gradients(ctx, dy, dW, d_boundary)

    @staticmethod
    def gradients(ctx, dy, dW, d_boundary):
        x, q, W0, A, *saved = ctx.saved_tensors
        N, T, d = x.shape
        chunk, step, per_chunk = ctx.chunk, ctx.step, 9
        dx, dq, dW0 = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(W0)
        dz_eta, dz_alpha, dA = x.new_empty(N, T), x.new_empty(N, T), torch.zeros_like(A)
        for i in range((T - 1) // chunk * chunk, -1, -chunk):
            j = i // chunk * per_chunk
            W, kv, norm, X, r, P, alpha, sig, z_alpha = saved[j : j + per_chunk]
            xc, qc, dyc = x[:, i : i + chunk], q[:, i : i + chunk], dy[:, i : i + chunk]
            C = xc.shape[1]
            k, v = kv.unbind(2)
            kq, one_alpha = torch.cat([k, qc], 1), 1 + alpha
            S = kq @ k.mT  # again: kept for all chunks it would be a seventh of what the function keeps
            eta = step * one_alpha * sig
            a, ce = P[..., :1], P[..., 1:] * eta.unsqueeze(1)
            last = ce[:, C].unsqueeze(-1)
            # through the write W_C = a_C W + (last * r)^T k
            dr = k @ dW.mT
            dk = (last * r) @ dW
            d_last = torch.linalg.vecdot(dr, r)
            dr.mul_(last)
            da_C = torch.linalg.vecdot(dW.flatten(1), W.flatten(1))
            dW = a[:, C:] * dW
            # through the read y = a qW + (ce S_q) r
            dr[..., :d].baddbmm_((ce[:, 1:] * S[:, C:]).mT, dyc)
            d_read = dyc @ r[..., :d].mT
            dyW = dyc @ W[:, :d]
            dW[:, :d].baddbmm_((a[:, 1:] * dyc).mT, qc)
            # through the solve (I + ce S_k) r = v - k + (v - k) W0^T + (v - a k) W^T
            dr = X.mT @ dr
            d_solve = (dr @ r.mT).neg_()
            dW.baddbmm_(dr.mT, torch.addcmul(v, a[:, :C], k, value=-1))
            dW0.baddbmm_(dr.mT, v - k)
            dZ = dr @ W
            d_res = dr[..., : 3 * d].unflatten(-1, (3, d)).sum(2).baddbmm_(dr, W0)
            dk.addcmul_(a[:, :C], dZ, value=-1).sub_(d_res)
            dv = dZ + d_res
            # through the products of keys and queries, S = [k; q] k^T
            dS = torch.cat([d_solve * ce[:, :C], d_read * ce[:, 1:]], 1)
            dk.baddbmm_(dS.mT, kq)
            dkq = dS @ k
            dk.add_(dkq[:, :C])
            dq[:, i : i + chunk] = dkq[:, C:].addcmul_(a[:, 1:], dyW)
            # through step sizes and retention
            dce = F.pad(d_solve.mul_(S[:, :C]), (0, 0, 0, 1))
            dce[:, 1:].addcmul_(d_read, S[:, C:])
            dce[:, C].add_(d_last)
            deta = (dce * P[..., 1:]).sum(1)
            da = F.pad(torch.linalg.vecdot(dyW, qc), (1, 0))
            da[:, :C].sub_(torch.linalg.vecdot(k, dZ))
            da[:, C].add_(da_C)
            dP = torch.cat([da.unsqueeze(-1), dce * eta.unsqueeze(1)], -1)
            d_alpha = decay_backward(P, dP).addcmul_(deta, sig, value=step).mul_(alpha)  # of log alpha
            dz_eta[:, i : i + chunk] = dze = step * deta * one_alpha * sig * (1 - sig)
            dz_alpha[:, i : i + chunk] = dza = -step * A * d_alpha * torch.sigmoid(z_alpha)
            dA.sub_((step * d_alpha * F.softplus(z_alpha)).sum(1, keepdim=True))
            # through the generation from the boundary weights
            dkv = torch.stack([dk, dv], 2)
            dkv.addcmul_(kv, torch.linalg.vecdot(kv, dkv).unsqueeze(-1), value=-1).mul_(norm)
            dg = torch.cat([dkv.flatten(2), dze.unsqueeze(-1), dza.unsqueeze(-1)], -1)
            dx[:, i : i + chunk] = torch.baddbmm(dkv.sum(2), dg, (W + W0)[:, d:])
            dWg = dg.mT @ xc
            dW[:, d:].add_(dWg)
            dW0[:, d:].add_(dWg)
            if i + chunk >= T:
                dW.add_(d_boundary)
        return dx, dq, dW, dW0, dz_eta.sum(1, keepdim=True), dz_alpha.sum(1, keepdim=True), dA, None, None


# ---------------------------------------------------------------------------------------------------------------------
# The mixers. (x [B, T, d_model], state) -> (y [B, T, d_model], state); state is a plain dict of tensors and ints


class SelfModifyingTitans(nn.Module):
    """NL eq. 83-93, see the top of this file.

    memory: "matrix", or "mlp" for M(z) = z + W1 silu(W2 z) with hidden width = head width (NL eq. 89).
    adaptive: which of "k", "v", "q" have a memory of their own; the others are static projections of the token.
    momentum: adds theta, one more self-generated row. chunk: tokens that share the weights everything is generated from.
    dgd: the delta rule at the running weights; False: plain gradient descent, all gradients at the boundary weights, with
    eta = sigmoid(.) / chunk, because all tokens of a chunk repeat the same step for equal keys.
    retention: False fixes alpha = 1.
    inner_step: 1; 0 freezes every memory at its learned start (the control: memories that never learn).
    gate, conv: the output gate; the width of the short convolution (0: none).

    Chunks sit at absolute positions, so any way of cutting a sequence into calls gives the same result. The state holds
    "position", "boundary" and "running" weights W_t, apart from the learned start (lists: first layers [B, H, rows, d],
    second layers [B, H, m, d, hidden]), "momentum" (list like "running", or None) and "conv", the convolution's tail.
    Raises ValueError for sizes that do not fit and for unknown names.
    """

    def __init__(self, d_model, n_heads, chunk=64, memory="matrix", adaptive=("k", "v"), momentum=False, inner_step=1.0,
                 conv=4, gate=True, mode="token", dgd=True, retention=True, out_scale=1.0):  # fmt: skip
        super().__init__()
        d = head_width(d_model, n_heads)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {chunk}")
        if memory not in ("matrix", "mlp"):
            raise ValueError(f"memory must be 'matrix' or 'mlp', got {memory!r}")
        if not set(adaptive) <= {"k", "v", "q"}:
            raise ValueError(f"adaptive must be a subset of k, v, q, got {adaptive!r}")
        if mode not in ("token", "boundary"):
            raise ValueError(f"mode must be 'token' or 'boundary', got {mode!r}")
        self.n_heads, self.d, self.chunk, self.momentum, self.mode = n_heads, d, chunk, momentum, mode
        self.inner_step, self.dgd, self.backend = inner_step, dgd, "auto"  # backend: see memory.scan
        self.adaptive = [name for name in ("k", "v", "q") if name in adaptive]
        self.static = [name for name in ("k", "v", "q") if name not in adaptive]
        n = 1 + len(self.adaptive)  # memories with an output of width d
        gates = 3 if momentum else 2
        self.fused = memory == "matrix" and self.adaptive == ["k", "v"] and not momentum and mode == "token" and dgd

        self.in_proj = linear(d_model, (1 + len(self.static)) * d_model)
        self.gate_proj = linear(d_model, d_model) if gate else None
        self.conv = ShortConvolution((1 + len(self.static)) * d_model, conv) if conv else None
        self.start = nn.Parameter(torch.randn(n_heads, n * d + gates, d) * d**-0.5)
        with torch.no_grad():
            self.start[:, n * d :] = 0.0  # the first step sizes are the biases
        self.start2 = nn.Parameter(torch.randn(n_heads, n, d, d) * d**-0.5) if memory == "mlp" else None
        self.b_eta = nn.Parameter(torch.zeros(n_heads))
        # At the start heads remember for 10 to 1,000 tokens, or 100 where there is one. With 10 for all, what must be kept
        # over hundreds of tokens is not learned from some seeds (selective copying, README); text is learned faster at
        # first (0.04 bits per byte at 0.4M tokens of the nano run, 0.003 at 1M).
        tokens = torch.logspace(1, 3, n_heads) if n_heads > 1 else torch.tensor([100.0])
        b_alpha, log_A = -torch.log(tokens - 1), torch.zeros(n_heads)
        if retention:
            self.b_alpha, self.log_A = nn.Parameter(b_alpha), nn.Parameter(log_A)
        else:  # exp(-0 softplus(.)) = 1, whatever else there is
            self.register_buffer("b_alpha", b_alpha)
            self.register_buffer("log_A", log_A - math.inf)
        self.b_theta = nn.Parameter(torch.zeros(n_heads)) if momentum else None
        self.norm = nn.RMSNorm(d, eps=EPS)
        self.out_proj = linear(d_model, d_model, out_scale)

    def forward(self, x, state=None):
        B, T, _ = x.shape
        state = state or self.start_state(B)
        z, tail = self.in_proj(x), state["conv"]
        if self.conv is not None:
            z, tail = self.conv(z, tail)
        names = ["x", *self.static]
        z = full_precision(z)
        streams = {name: heads(s, self.n_heads) for name, s in zip(names, z.chunk(len(names), -1), strict=True)}
        for name in self.static:
            streams[name] = l2norm(streams[name], EPS)

        position, boundary, running, momentum = (state[name] for name in ("position", "boundary", "running", "momentum"))
        y = []
        # what the fused kernels multiply in; torch's path stays in float32
        operands = torch.bfloat16 if x.is_cuda and torch.is_autocast_enabled("cuda") else z.dtype
        with torch.autocast(x.device.type, enabled=False):
            for piece, begins in by_chunk(position, T, self.chunk):
                boundary = running if begins else boundary
                whole = self.fused and begins and T - piece.start >= self.chunk
                now = {name: s[:, :, piece.start : T if whole else piece.stop] for name, s in streams.items()}
                if whole:
                    y_now, boundary, running = self._chunks(now["x"], now["q"], running, operands)
                else:  # computed again in the backward pass: an MLP's chunk otherwise keeps seven times the memory
                    args = (self._chunk, now, boundary, running, momentum)
                    y_now, running, momentum = checkpoint(*args, use_reentrant=False, preserve_rng_state=False)
                y.append(y_now)
                if whole:
                    break
        if (position + T) % self.chunk == 0:
            boundary = running
        y = self.norm(torch.cat(y, 2) if len(y) > 1 else y[0]).to(x.dtype).transpose(1, 2).flatten(2)
        if self.gate_proj is not None:
            y = y * F.silu(self.gate_proj(x))
        state = {"position": position + T, "boundary": boundary, "running": running, "momentum": momentum, "conv": tail}
        return self.out_proj(y), state

    def start_state(self, batch):
        """The state before the first token: nothing learned yet, every row its own."""
        running = [start.new_zeros(batch, *start.shape) for start in self._starts()]
        momentum = [torch.zeros_like(W) for W in running] if self.momentum else None
        return {"position": 0, "boundary": running, "running": running, "momentum": momentum, "conv": None}

    def _starts(self):
        return [full_precision(start) for start in (self.start, self.start2) if start is not None]

    def _chunks(self, x, q, running, operands):
        """All chunks at once, from a boundary on: by the kernels of kernels.py where they fit, else by `_SelfModify`."""
        B, H = x.shape[:2]
        (start,) = self._starts()
        gates = (full_precision(g) for g in (self.b_eta, self.b_alpha, self.log_A.exp()))
        gates = [g.expand(B, H).reshape(B * H, 1) for g in gates]
        kernels = fused("self-modifying Titans", x, self.d, self.chunk, self.backend)
        flat = [t.flatten(0, 1) for t in (x, q, running[0])]
        if kernels is not None:
            flat[:2] = (t.to(operands) for t in flat[:2])
            y, W, boundary = kernels.self_modify(*flat, start, *(g.squeeze(1) for g in gates), self.chunk, self.inner_step)
        else:
            starts = start.expand(B, *start.shape).flatten(0, 1)
            y, W, boundary = _SelfModify.apply(*flat, starts, *gates, self.chunk, self.inner_step)
        y = q + q @ start[:, : self.d].mT + y.unflatten(0, (B, H))
        return y, [boundary.unflatten(0, (B, H))], [W.unflatten(0, (B, H))]

    def _chunk(self, streams, boundary, running, momentum):
        """Tokens of one chunk, generated from `boundary`, read and written from `running` on: the definition.

        streams: x and the static projections, [B, H, C, d]. Returns (y [B, H, C, d], running, momentum).
        """
        x, d, n = streams["x"], self.d, 1 + len(self.adaptive)
        starts = self._starts()
        boundary = [W0 + W for W0, W in zip(starts, boundary, strict=True)]
        blocks, gates = self._outputs(boundary, x, first=1)
        made = dict(zip(self.adaptive, l2norm(blocks, EPS).unbind(-3), strict=True)) | streams
        k, v, q = made["k"], made["v"], made["q"]
        z_alpha = gates[..., 1] + self.b_alpha[:, None]
        alpha = retention_of(z_alpha, self.inner_step * self.log_A.exp()[:, None])
        eta = self.inner_step * torch.sigmoid(gates[..., 0] + self.b_eta[:, None])
        eta = eta * (1 + alpha) if self.dgd else eta / self.chunk
        theta = None
        if self.momentum:
            theta = torch.sigmoid(gates[..., 2] + self.b_theta[:, None])
            eta = eta * (1 - theta)  # so that a lasting surprise is written at the same rate
        rates = dict(eta=eta, alpha=alpha, theta=theta, delta=float(self.dgd), backend=self.backend)
        at = starts if self.dgd else boundary  # what the scan does not know of M(k)
        targets, gate_targets = self._outputs(boundary, v)
        u = targets - k.unsqueeze(-3)
        second = len(running) > 1
        if second:  # the first layer is a memory from k to -gradient, as steep as the layer above can make it
            z = (k @ boundary[0][..., : n * d, :].mT).unflatten(-1, (n, d)).transpose(-3, -2)
            h = F.silu(z)
            g = ((h @ boundary[1].mT - u) @ boundary[1]) * silu_derivative(z)
            u1 = -g / (1 + boundary[1].square().sum((-2, -1), keepdim=True))
        else:
            u1 = u - (k @ at[0][..., : n * d, :].mT).unflatten(-1, (n, d)).transpose(-3, -2)
        u1 = torch.cat([u1.transpose(-3, -2).flatten(-2), gate_targets - k @ at[0][..., n * d :, :].mT], -1)
        # all rows are read at q, though only memory's own are needed: a second scan for the others would cost more
        y, W, S = scan(running[0], k, u1, q=q, S=momentum[0] if momentum else None, **rates)
        y = y[..., :d] + q @ starts[0][:, :d].mT
        running, momentum = [W, *running[1:]], momentum and [S, *momentum[1:]]
        if self.mode == "boundary":
            y = q @ boundary[0][..., :d, :].mT
        if second:  # a memory from h to what is left of the targets; h is not of unit length, see memory.write
            rates = {name: rate.unsqueeze(-2) if torch.is_tensor(rate) else rate for name, rate in rates.items()}
            rates["eta"] = rates["eta"] / (1 + rates["eta"] * h.square().sum(-1))
            S = momentum[1] if momentum else None
            hq = F.silu(y)
            y, W, S = scan(running[1], h, u - h @ at[1].mT, q=hq.unsqueeze(-3).expand_as(h), S=S, **rates)
            y = y[..., 0, :, :] + hq @ starts[1][:, 0].mT
            running, momentum = [running[0], W], momentum and [momentum[0], S]
            if self.mode == "boundary":
                y = hq @ boundary[1][..., 0, :, :].mT
        return q + y, running, momentum

    def _outputs(self, weights, z, first=0):
        """Memories first.. at z [B, H, C, d] -> (M(z) [B, H, m, C, d], single rows [B, H, C, 2 or 3])."""
        d, m = self.d, 1 + len(self.adaptive) - first
        out = z @ weights[0][..., first * d :, :].mT
        blocks = out[..., : m * d].unflatten(-1, (m, d)).transpose(-3, -2)
        if len(weights) > 1:
            blocks = F.silu(blocks) @ weights[1][..., first:, :, :].mT
        return z.unsqueeze(-3) + blocks, out[..., m * d :]


# ---------------------------------------------------------------------------------------------------------------------
# Titans


class NeuralMemory(nn.Module):
    """The long-term memory module of Titans (LMM, Titans paper sec. 3): momentum of surprise, with forgetting.

        S_t = theta_t S_{t-1} - eta_t grad |M(k_t) - v_t|^2 / 2      W_t = alpha_t W_{t-1} + S_t      y_t = M_t(q_t)

    with static projections k, v, q, an MLP memory of `depth` layers (residual; 1: a matrix), gradients at the weights of
    the chunk boundary, reads at the running weights. eta, theta, alpha are read off the token. All writes of a chunk
    repeat the same gradient step for equal keys, so eta < (1 - theta) / chunk: then one chunk can at most close the gap.
    Values, too, have unit length (a deviation: free ones made gradients 1,000 times longer at chunk 16).
    gate: the output gate and projection; without, y is the read alone, normalised per head (for MAC, MAG, MAL).
    State as in SelfModifyingTitans. Raises ValueError for sizes that do not fit.
    """

    def __init__(self, d_model, n_heads, chunk=64, depth=2, conv=4, out_scale=1.0, gate=True):
        super().__init__()
        d = head_width(d_model, n_heads)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {chunk}")
        if depth < 1:
            raise ValueError(f"depth of a memory must be at least 1 layer, got {depth}")
        self.n_heads, self.chunk = n_heads, chunk
        self.sizes = (3 * d_model, d_model if gate else 0, 3 * n_heads)  # q, k, v | output gate | eta, theta, alpha
        self.in_proj = linear(d_model, sum(self.sizes))
        self.conv = ShortConvolution(3 * d_model, conv) if conv else None
        self.start = nn.ParameterList(torch.randn(n_heads, d, d) * d**-0.5 for _ in range(depth))
        self.bias = nn.Parameter(torch.tensor([[0.0], [0.0], [-math.log(10_000 - 1)]]).repeat(1, n_heads))
        self.norm = nn.RMSNorm(d, eps=EPS)
        self.out_proj = linear(d_model, d_model, out_scale) if gate else None

    def forward(self, x, state=None):
        """x [B, T, d_model] -> (y [B, T, d_model], state)."""
        B, T, _ = x.shape
        state = state or self.start_state(B)
        qkv, gate, rates = self.in_proj(x).split(self.sizes, -1)
        tail = state["conv"]
        if self.conv is not None:
            qkv, tail = self.conv(qkv, tail)
        q, k, v = (l2norm(heads(full_precision(z), self.n_heads), EPS) for z in qkv.chunk(3, -1))
        eta, theta, alpha = (full_precision(rates).unflatten(-1, (3, -1)) + self.bias).permute(2, 0, 3, 1)  # each [B, H, T]
        theta, alpha = torch.sigmoid(theta), retention_of(alpha, 1.0)
        eta = torch.sigmoid(eta) * (1 - theta) / self.chunk
        position, boundary, running, momentum = (state[name] for name in ("position", "boundary", "running", "momentum"))
        y = []
        with torch.autocast(x.device.type, enabled=False):
            for now, begins in by_chunk(position, T, self.chunk):
                boundary = running if begins else boundary
                y_now, running, momentum = write(
                    boundary, k[:, :, now], v[:, :, now], eta[..., now], alpha[..., now], q[:, :, now],
                    theta=theta[..., now], momentum=momentum, delta=0.0, running=running,
                )  # fmt: skip
                y.append(y_now)
        if (position + T) % self.chunk == 0:
            boundary = running
        y = self.norm(torch.cat(y, 2)).to(x.dtype).transpose(1, 2).flatten(2)
        if self.out_proj is not None:
            y = self.out_proj(y * F.silu(gate))
        return y, {"position": position + T, "boundary": boundary, "running": running, "momentum": momentum, "conv": tail}

    def retrieve(self, x, state):
        """What the memory of the last chunk boundary says to x [B, T, d_model]: nothing is written, q has no convolution."""
        q = F.silu(F.linear(x, self.in_proj.weight[: x.shape[-1]]))
        with torch.autocast(x.device.type, enabled=False):
            y = read(state["boundary"], l2norm(heads(full_precision(q), self.n_heads), EPS))
        return self.norm(y).to(x.dtype).transpose(1, 2).flatten(2)

    def start_state(self, batch):
        running = [full_precision(start).expand(batch, *start.shape).clone() for start in self.start]
        return {"position": 0, "boundary": running, "running": running, "conv": None,
                "momentum": [torch.zeros_like(W) for W in running]}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------


def demo(pairs=6, symbols=16, steps=300, batch=64, d_model=64):
    """Sequences k1 v1 k2 v2 ... kn vn k_i: which v followed k_i? New pairs in every row, so only memory can know."""

    def sequences():
        keys = torch.rand(batch, symbols).argsort(-1)[:, :pairs]
        values = torch.randint(symbols, (batch, pairs)) + symbols
        asked = torch.randint(pairs, (batch, 1))
        shown = torch.stack([keys, values], -1).flatten(1)
        return torch.cat([shown, keys.gather(1, asked)], 1), values.gather(1, asked).squeeze(1) - symbols

    print(f"one layer of self-modifying Titans: {pairs} new pairs a row, asked for one; chance is {1 / symbols:.0%}\n")
    print(f"{'training step':>24}{'memories learn':>18}{'memories frozen':>18}")
    contestants = []
    for inner_step in (1.0, 0.0):
        torch.manual_seed(0)
        layers = nn.ModuleList([nn.Embedding(2 * symbols, d_model), nn.Linear(d_model, symbols)])
        layers.append(SelfModifyingTitans(d_model, 1, chunk=8, inner_step=inner_step))
        contestants.append((layers, torch.optim.AdamW(layers.parameters(), lr=3e-3), []))
    for step in range(1, steps + 1):
        tokens, answers = sequences()
        for (embed, score, mixer), optimizer, hits in contestants:
            logits = score(mixer(embed(tokens))[0][:, -1])
            optimizer.zero_grad()
            F.cross_entropy(logits, answers).backward()
            optimizer.step()
            hits.append((logits.argmax(-1) == answers).float().mean().item())
        if step % (steps // 6) == 0:
            means = (sum(hits[-20:]) / 20 for _, _, hits in contestants)
            print(f"{step:>24}" + "".join(f"{mean:>18.0%}" for mean in means))


if __name__ == "__main__":
    demo()
