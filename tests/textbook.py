"""What tests of memories and mixers share: small formulas as textbooks write them, one model."""

import torch

from memory import write

EPS = 1e-6


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def unit(v):
    """v [d] at unit length."""
    return v / (v @ v + EPS).sqrt()


def rms(v, weight):
    """RMSNorm of v [d]."""
    return weight * v / ((v @ v) / len(v) + EPS).sqrt()


def titans_linear(q, k, v, eta, theta, alpha, chunk, W=None, S=None):
    """Titans with a matrix memory: momentum of l2 gradients at the weights of the chunk boundary.

    q, k [..., T, dk], v [..., T, dv], eta, theta, alpha [..., T] -> (y [..., T, dv], W_T, S_T).
    """
    if W is None:
        W = _zeros(v, k)
    layers = [W]
    momentum = None if S is None else [S]
    outputs = []
    for i in range(0, k.shape[-2], chunk):
        now = slice(i, i + chunk)
        rates = (eta[..., now], alpha[..., now])
        rule = {"theta": theta[..., now], "momentum": momentum, "delta": 0.0, "residual": False}
        pairs = (k[..., now, :], v[..., now, :])
        y, layers, momentum = write(layers, *pairs, *rates, q[..., now, :], **rule)
        outputs.append(y)
    return torch.cat(outputs, -2), layers[0], momentum[0]


def _zeros(v, k):
    lead = torch.broadcast_shapes(v.shape[:-2], k.shape[:-2])
    return v.new_zeros(*lead, v.shape[-1], k.shape[-1])
