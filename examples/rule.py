"""A memory rule of your own, in ten lines under `scan`.

    python -m examples.rule           # a second

A rule says what is written (u), how strongly (eta), what is forgotten (alpha), and whether what the
memory already says of the key is taken off before (delta). `scan` then writes and reads all tokens
at once, with exact gradients. Two rules of the literature here, and one of our own. All read the
same stream of words, some far more frequent than others; each time a word comes, what it means
comes with noise. In the end they are asked what each word means.
"""

import torch

from memory import scan, scan_stepwise


def delta_rule(k, v):
    """DeltaNet (NL eq. 57): half of the error is taken off"""
    one = torch.ones_like(k[..., 0])  # [..., T]
    return {"u": v, "eta": 0.5 * one, "alpha": one, "delta": 1.0}


def forgetting(k, v):
    """DGD with retention (NL eq. 92): the same, and all is forgotten slowly"""
    one = torch.ones_like(k[..., 0])
    return {"u": v, "eta": 0.5 * one, "alpha": 0.99 * one, "delta": 1.0}


def averaging(k, v):
    """ours: the oftener a key came, the smaller the step"""
    like = (k @ k.mT).square().tril(-1)  # [..., T, T]: how much each earlier key is like this one
    eta = 1 / (1 + like.sum(-1)).sqrt()
    return {"u": v, "eta": eta, "alpha": torch.ones_like(eta), "delta": 1.0}


def stream(T=400, width=32, words=24):
    """(k, v [T, width]; keys, meanings [words that came, width])"""
    generator = torch.Generator().manual_seed(0)
    how = {"generator": generator, "dtype": torch.float64}
    keys = torch.nn.functional.normalize(torch.randn(words, width, **how), dim=-1)
    meanings = torch.randn(words, width, **how)
    chances = 1 / torch.arange(1, words + 1)  # Zipf's law
    word = torch.multinomial(chances, T, replacement=True, generator=generator)
    v = meanings[word] + torch.randn(T, width, **how)
    came = word.unique()
    return keys[word], v, keys[came], meanings[came]


def main():
    """Print and return the mean squared error of each rule."""
    k, v, keys, meanings = stream()
    W = torch.zeros(v.shape[-1], k.shape[-1], dtype=k.dtype)
    errors = {}
    for rule in (delta_rule, forgetting, averaging):
        how = rule(k, v)
        _, W_T, _ = scan(W, k, **how)
        _, expected, _ = scan_stepwise(W, k, **how)  # the definition, token by token
        torch.testing.assert_close(W_T, expected)
        error = (keys @ W_T.mT - meanings).square().mean().item()
        errors[rule.__name__] = error
        print(f"{error:.3f}  {rule.__name__}, {rule.__doc__}")
    return errors


if __name__ == "__main__":
    main()
