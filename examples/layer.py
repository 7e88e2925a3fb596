"""A layer of this repository in a model of your own: recall of pairs that were read once.

    python -m examples.layer          # ten seconds

A row holds 4 pairs "key value", and then the same pairs in another order: after a key, which value
comes? The weights learn the task in training; the memory, of which every row has its own, learns
the pairs while it reads.
"""

import torch
import torch.nn.functional as F
from torch import nn

from titans import SelfModifyingTitans


class Recall(nn.Module):
    """tokens [B, T] int64, state -> (logits [B, T, symbols], state)."""

    def __init__(self, symbols=16, width=32):
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.norm = nn.RMSNorm(width)
        self.mixer = SelfModifyingTitans(d_model=width, n_heads=1)  # where attention would stand
        self.head = nn.Linear(width, symbols)

    def forward(self, tokens, state=None):
        x = self.embedding(tokens)  # [B, T, width]
        y, state = self.mixer(self.norm(x), state)
        return self.head(x + y), state


def rows(batch, pairs=4, half=8):
    """tokens [B, 4 pairs]: keys are 0 to half - 1, values half to 2 half - 1."""
    keys = torch.rand(batch, half).argsort(1)[:, :pairs]  # all different
    values = torch.randint(half, 2 * half, (batch, pairs))
    again = torch.rand(batch, pairs).argsort(1)
    order = torch.cat([torch.arange(pairs).expand(batch, -1), again], 1)
    return torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)


def asked(tokens, logits):
    """(logits after each key of the second half, the values that follow), a row for each."""
    half = tokens.shape[1] // 2
    return logits[:, half::2].flatten(0, 1), tokens[:, half + 1 :: 2].flatten()


def main(steps=100):
    """Train, print and return the part of the values in new rows that is predicted rightly."""
    torch.manual_seed(0)
    model = Recall()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, steps + 1):
        tokens = rows(64)
        loss = F.cross_entropy(*asked(tokens, model(tokens)[0]))
        optimizer.zero_grad()
        loss.backward()  # through all that the memory wrote
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    tokens = rows(100)
    state = None
    logits = []
    with torch.no_grad():
        for token in tokens.split(1, 1):  # as a stream: the state goes on exactly where it was
            now, state = model(token, state)
            logits.append(now)
    predicted, values = asked(tokens, torch.cat(logits, 1))
    right = (predicted.argmax(-1) == values).double().mean().item()
    print(f"{right:.1%} of the values in 100 new rows, read token by token; chance is 12.5%")
    return right


if __name__ == "__main__":
    main()
