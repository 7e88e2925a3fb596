"""A mixer of your own, registered and trained against the rest.

    python -m examples.mixer          # four small models, 65,536 bytes of Python each: a minute

A line of MIXERS makes it a model like all others: train.py, generation, states, `levels()`, FLOPs
and benchmarks know it by its name as soon as this module is imported, and its feed-forward width is
chosen so that it has as many parameters as they have.
"""

import asyncio
import contextlib
import io
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hope import MIXERS
from layers import component, linear, of_rows, scan_products
from memory import scan
from support.config import TrainConfig
from train import train


class Averages(nn.Module):
    """Each channel is averaged over the past, which it forgets at a learned rate; then a gate.

    (x [B, T, d_model], state) -> (y [B, T, d_model], state {"W": [B, d_model, 1, 1]}).
    """

    def __init__(self, d_model, out_scale=1.0):
        super().__init__()
        self.in_proj = linear(d_model, 2 * d_model)
        self.out_proj = linear(d_model, d_model, out_scale)
        self.rate = nn.Parameter(torch.linspace(-2.0, 5.0, d_model))  # half-lives of 0.3 to 100

    def forward(self, x, state=None):
        z, gate = self.in_proj(x).chunk(2, -1)
        u = z.mT.unsqueeze(-1)  # [B, d_model, T, 1]: a memory of one weight for each channel
        W = u.new_zeros(*u.shape[:2], 1, 1) if of_rows(state, x) is None else state["W"]
        alpha = self.rate.sigmoid()[:, None].expand(u.shape[:3])
        one = torch.ones_like(u)
        y, W, _ = scan(W, one, u, 1 - alpha, alpha, one, delta=0.0, tile=16)
        return self.out_proj(F.silu(gate) * y.squeeze(-1).mT), {"W": W}

    def products(self, T):
        """Multiply-adds per token beyond those of the projections; see layers.py."""
        return len(self.rate) * scan_products(1, 1, T, tile=16, delta=False)

    def components(self):
        """Rows of `Hope.levels()`."""
        return [component("averages", "every token", "inputs, in context")]


MIXERS["averages"] = lambda config: Averages(config.d_model, config.out_scale)


def main(models=("averages", "linear_attention", "deltanet", "hope"), **how):
    """Train all on the same batches; print and return bits per byte. how: fields of TrainConfig."""
    package = str(Path(asyncio.__file__).parent)  # half a million bytes of Python
    small = {"n_layers": 2, "d_model": 64, "n_heads": 1}
    how = {"data": package, "tokens": 65_536, "seq_len": 256, "eval_every": 0, "set": small} | how
    bits = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            config = TrainConfig(model=model, out=str(Path(folder, model)), **how)
            print(f"{model} ...", flush=True)
            with contextlib.redirect_stdout(io.StringIO()):  # it names a folder that will not stay
                result = train(config)
            if result["interrupted"]:
                break
            bits[model] = result["val_bits_per_byte"]
    for model in sorted(bits, key=bits.get):
        print(f"{bits[model]:.3f} bits per byte  {model}")
    return bits


if __name__ == "__main__":
    main()
