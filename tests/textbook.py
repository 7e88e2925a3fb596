"""Published models as settings of the rule that only tests use."""

import torch

from baselines import _zeros
from memory import write


def titans_linear(q, k, v, eta, theta, alpha, chunk, W=None, S=None):
    """Titans with a matrix memory: momentum of l2 gradients taken at the weights of the chunk boundary (`chunk` in tokens)."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    for name, rate in {"eta": eta, "theta": theta, "alpha": alpha}.items():
        if rate.shape[-1:] != k.shape[-2:-1]:
            raise ValueError(f"{name} must be [..., T] with T = {k.shape[-2]}, got shape {tuple(rate.shape)}")
    W = _zeros(v, k) if W is None else W
    layers, momentum, y = [W], None if S is None else [S], []
    for i in range(0, k.shape[-2], chunk):
        now = slice(i, i + chunk)
        y_chunk, layers, momentum = write(
            layers, k[..., now, :], v[..., now, :], eta[..., now], alpha[..., now], q[..., now, :],
            theta=theta[..., now], momentum=momentum, delta=0.0, residual=False,
        )  # fmt: skip
        y.append(y_chunk)
    return torch.cat(y, -2), layers[0], momentum[0]
