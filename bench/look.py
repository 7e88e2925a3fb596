"""Look inside a trained model: what its memories do while they read a text, as a page.

    python sample.py look RUN                       # the beginning of the run's held-out text
    python sample.py look RUN --text FILE           # of a file; --prompt: a text that is typed
    python sample.py look RUN --out look.html       # one file, for a browser; needs no network

A model is watched while it reads: the arguments of every `memory.scan` are kept, and from them
follows what a memory held and did at each token. `look.html` draws it.
"""

import base64
import codecs
import json
import math
import os
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from baselines import Recurrent
from learn import plain
from memory import full_precision, scan, watch
from support.checkpoint import atomic_write
from support.flags import DEVICES, updates_flag
from support.run import Run, precision
from support.vocabulary import encode
from titans import SelfModifyingTitans

LONGEST = 4096  # tokens of a text that are looked at
LAGS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # tokens between a planted pair and its reading
AXES = {"k": -2, "u": -2, "eta": -1, "alpha": -1, "theta": -1, "delta": -1}  # of time
TEMPLATE = Path(__file__).with_name("look.html")


# --------------------------------------------------------------------------------------------------
# A memory that is watched: the arguments of one `scan` over the text, all in `call`


@torch.no_grad()
def watched(model, tokens):
    """Read tokens [1, T] as the model's config says, and see what its memories write.

    Returns (logits [1, T, vocab], state, {block: [call, ...]}): for every block that has memories
    of `scan`, the arguments of the one call that would write all T tokens into each layer, and
    into its counters.
    """
    made = {}
    hooks = []
    with precision(tokens.device), watch() as seen, plain(model):

        def collect(own, memory, args, output):
            layers = len(output[1].get("running", [None]))
            counted = [seen.pop()] if "counted" in output[1] else []
            for i, call in enumerate(seen):
                own.setdefault(i % layers, []).append(call)
            for call in counted:
                own.setdefault(layers, []).append(call)
            seen.clear()

        for number, block in enumerate(model.blocks):
            kinds = (Recurrent, SelfModifyingTitans)
            memory = next((m for m in block.mixer.modules() if isinstance(m, kinds)), None)
            if memory is not None:
                own = made[number] = {}
                # what learning computes again, backward, is no new write
                hooks.append(memory.register_forward_pre_hook(lambda *_: seen.clear()))
                hooks.append(memory.register_forward_hook(partial(collect, own)))
        try:
            logits, state = model(tokens)
        finally:
            for hook in hooks:
                hook.remove()
    found = {number: [joined(calls) for calls in own.values()] for number, own in made.items()}
    return logits, state, {number: layers for number, layers in found.items() if layers}


def joined(calls):
    """Calls of `scan` that continue each other for one row, as one call without that dimension."""
    whole = dict(calls[0])
    for name, axis in AXES.items():
        if torch.is_tensor(whole[name]):
            whole[name] = torch.cat([call[name] for call in calls], axis)
    own = {name: -2 if name in ("W", "S", "k", "u") else -1 for name in whole}  # dimensions
    given = {name: x.detach() for name, x in whole.items() if torch.is_tensor(x)}
    lead = torch.broadcast_shapes(*(x.shape[: own[name]] for name, x in given.items()))
    return whole | {
        name: x.expand(*lead, *x.shape[own[name] :])[0] for name, x in given.items()
    }


def part(call, begin, end, W, S):
    """Tokens begin .. end - 1 of a call, from W and S on."""
    now = {"W": W, "S": S}
    for name, axis in AXES.items():
        x = call[name]
        now[name] = x.narrow(axis, begin, end - begin) if torch.is_tensor(x) else x
    return now


def trace(call, points):
    """[(W, S), ...] after so many tokens each; points rise from 0 on."""
    W, S = call["W"], call["S"]
    states = [(W, S)]
    for begin, end in pairwise(points):
        _, W, S = scan(**part(call, begin, end, W, S), backend="torch")
        states.append((W, S))
    return states


def surprise(call):
    """e_t [..., T, dv] = eta_t (u_t - delta_t W_{t-1} k_t) of every token."""
    W, k, delta = call["W"], call["k"], call["delta"]
    ahead, _, _ = scan(**call, q=k.roll(-1, -2), backend="torch")  # W_t k_{t+1}
    before = torch.cat([k[..., :1, :] @ W.mT, ahead[..., :-1, :]], -2)
    delta = delta.unsqueeze(-1) if torch.is_tensor(delta) else delta
    return call["eta"].unsqueeze(-1) * (call["u"] - delta * before)


def planted(call, lags, starts=8, pairs=4):
    """How well pairs that were written once are read after `lags` tokens of the text.

    At `starts` places of the text, `pairs` random pairs are written, each into a copy of the memory
    of its own and completely: W + (v - W k) k^T, with |k| = 1 and |v| the mean of the text's |u|.
    The copy goes on with the text's own writes. Returns (error [lags, ...], forgotten [lags, ...]):
    the mean of |W k - v| / |v|, and of 1 - the product of alpha, which is what the error would be
    if no key of the text came near to k. [...]: leading dimensions of W.
    """
    T = call["k"].shape[-2]
    points = torch.linspace(0, T - lags[-1], starts).int().unique().tolist()
    log_alpha = F.pad(call["alpha"].log().cumsum(-1), (1, 0))
    length = call["u"].norm(dim=-1).mean(-1)  # [...]
    rng = torch.Generator().manual_seed(0)
    errors = []
    forgotten = []
    for start, (W, S) in zip(points, trace(call, points), strict=True):
        *lead, dv, dk = W.shape
        k, v = (torch.randn(pairs, *lead, d, 1, generator=rng).to(W) for d in (dk, dv))
        k = k / k.norm(dim=-2, keepdim=True)
        v = v / v.norm(dim=-2, keepdim=True) * length[..., None, None]
        W = W + (v - W @ k) @ k.mT  # [pairs, ..., dv, dk]
        for now, then in pairwise([0, *lags]):
            _, W, S = scan(**part(call, start + now, start + then, W, S), backend="torch")
            errors.append(((W @ k - v).norm(dim=(-2, -1)) / length).mean(0))
            kept = log_alpha[..., start + then] - log_alpha[..., start]
            forgotten.append(-kept.expm1())
    shape = (len(points), len(lags))
    return tuple(torch.stack(x).unflatten(0, shape).mean(0) for x in (errors, forgotten))


# --------------------------------------------------------------------------------------------------
# What the page shows


@torch.no_grad()
def report(model, tokens, symbols):
    """Everything on the page, of tokens [T + 1] of which the first only begins the text.

    symbols: the T others as they are shown. Numbers per token are lists of T, losses in bits.
    ValueError for a text during which memories would begin anew.
    """
    window = model.config.window_reset
    if window is not None and len(tokens) > window:
        why = f"whose memories begin anew every {window} tokens"
        raise ValueError(f"text must be shorter for a model {why}, got {len(tokens) - 1} tokens")
    logits, state, found = watched(model, tokens[None])
    loss = bits(logits, tokens)
    made = {"tokens": symbols, "loss": numbers(loss), "gain": None, "memories": [], "lacks": []}
    points = torch.linspace(0, len(tokens), 129).int().unique().tolist()
    lags = [lag for lag in LAGS if lag <= len(tokens) // 2]
    moments = torch.tensor(points)[torch.linspace(0, len(points) - 1, 9).int().unique()].tolist()
    made |= {"points": points, "moments": moments, "lags": lags}
    for number, layers in found.items():
        mixer = model.blocks[number].mixer
        for i, call in enumerate(layers):
            name = f"block {number + 1}"
            if counting(mixer, i):
                name += ", counters"
            elif layers[1:] and not counting(mixer, 1):
                name += f", layer {i + 1}"
            heads = of_heads(call, points, moments, lags)
            rows = stacked(mixer, i, call)
            made["memories"].append({"name": name, "rows": rows, "heads": heads})
    if len(found) < len(model.blocks):
        without = ", ".join(str(i + 1) for i in range(len(model.blocks)) if i not in found)
        why = f"{model.config.model} has no fast weights there that memory.scan writes"
        made["lacks"].append(f"memories in blocks {without}: {why}")
    elif all(head["life"] is None for own in made["memories"] for head in own["heads"]):
        made["lacks"].append("retention: nothing fades, a memory forgets by overwriting alone")
    if model.config.cms_updates == "off":
        made["lacks"].append("steps of CMS levels in context: off, so there is no gain of theirs")
    else:
        with precision(tokens.device):
            without, _ = model(tokens[None], updates="off")
        made["gain"] = numbers(bits(without, tokens) - loss)
    made["levels"] = levels(model, state)
    return made


def bits(logits, tokens):
    """The loss [T] in bits of tokens[1:], from logits [1, T + 1, vocab]."""
    nats = F.cross_entropy(full_precision(logits[0, :-1]), tokens[1:], reduction="none")
    return nats / math.log(2)


def of_heads(call, points, moments, lags):
    """What is drawn of every head of a memory; series of tokens begin with the text's first."""
    W = torch.stack([W for W, _ in trace(call, points)])
    W = (W - W[0]).flatten(2, -2)  # [points, H, rows, dk]: what the text has taught
    H = W.shape[1]
    norm = W.flatten(2).norm(dim=-1)  # [points, H]
    drawn = W[[points.index(moment) for moment in moments]]
    # full colour: where one in a thousand is larger
    sizes = drawn.abs().transpose(0, 1).flatten(1)  # [H, n]
    full = sizes.kthvalue(-(-999 * sizes.shape[1] // 1000), 1)[0]
    drawn = (127 * drawn / full.clamp(min=1e-30)[:, None, None]).clamp(-127, 127)
    drawn = drawn.round().char().cpu().numpy()
    e = surprise(call).square().sum(-1).reshape(H, -1, points[-1]).sum(1).sqrt()
    eta, alpha = (call[name].reshape(H, -1, points[-1]).mean(1) for name in ("eta", "alpha"))
    rate = -alpha.log()  # of forgetting
    error, forgotten = (x.reshape(len(lags), H, -1).mean(-1) for x in planted(call, lags))
    heads = []
    for h in range(H):
        pictures = [base64.b64encode(own[h].tobytes()).decode() for own in drawn]
        heads.append({
            "surprise": numbers(e[h, 1:]),
            "eta": numbers(eta[h, 1:]),
            "half_life": numbers(math.log(2) / rate[h, 1:]),
            "life": numbers(math.log(2) / rate[h].mean()),
            "step": numbers(eta[h].mean()),
            "norm": numbers(norm[:, h]),
            "error": numbers(error[:, h]),
            "forgotten": numbers(forgotten[:, h]),
            "full": numbers(full[h]),
            "pictures": pictures,  # int8 [rows, dk], 127 is `full`
        })
    return heads


def counting(mixer, layer):
    """Whether what is watched as a layer are the counters, which come after the layers."""
    return isinstance(mixer, SelfModifyingTitans) and layer == len(mixer.initial_weights())


def stacked(mixer, layer, call):
    """[[name, rows], ...] of a head's matrix: memories that share their keys are stacked."""
    *_, rows, _ = call["W"].shape
    if counting(mixer, layer):
        return [["content", rows]]
    if not isinstance(mixer, SelfModifyingTitans):
        return [["values", call["W"][0].numel() // call["W"].shape[-1]]]
    blocks = [[name, mixer.d] for name in ("content", *mixer.adaptive)]
    return blocks if layer else [*blocks, ["rates", rows - mixer.d * len(blocks)]]


def levels(model, state):
    """`Hope.levels()`, and of CMS levels how far the text has moved them from their start."""
    rows = model.levels()
    moved = {}
    for block, own in zip(model.blocks, state["blocks"], strict=True):
        fast = own["cms"]["fast"] if own["cms"] else []
        for i, w in enumerate(fast):
            if w is not None:
                start = torch.cat([t.flatten() for t in block.cms.mlps[i].start(1).values()])
                now = torch.cat([t.flatten() for t in w.values()])
                far = ((now - start).norm() / start.norm()).item()
                moved.setdefault(f"CMS level {i + 1}", []).append(far)
    for row in rows:
        own = moved.get(row["component"])
        row["moved"] = sum(own) / len(own) if own else None
        row["period"] = row["period"] if row["period"] < math.inf else None
    return rows


def numbers(x):
    """A tensor as numbers for JSON, with three digits; None for one that is not finite."""
    def short(value):
        return float(f"{value:.3g}") if math.isfinite(value) else None

    values = x.tolist()
    return [short(value) for value in values] if x.ndim else short(values)


# --------------------------------------------------------------------------------------------------
# The page


def shown(ids, encoding):
    """What each token adds to the text: a character of several tokens stands at its last one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(encoding.decode_bytes([token])) for token in ids]


def page(made):
    """The HTML file of a report; works without a network."""
    data = json.dumps(made, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return TEMPLATE.read_text("utf-8").replace("DATA", data.replace("<", "\\u003c"), 1)


def look(args):
    """The command: write the page and say what is on it."""
    path = Path(args.out)
    if not path.parent.is_dir():
        raise ValueError(f"--out must be a file in a folder that exists, got {args.out!r}")
    run = Run.open(args.run, args.device, args.cms_updates)
    if args.prompt is not None:
        name, ids = "the prompt", encode(os.fsencode(args.prompt), run.encoding)
    else:
        name, ids, _ = run.text(args.text)
    ids = [run.encoding.eot_token, *map(int, ids[:LONGEST])]
    if len(ids) < 3:
        raise ValueError(f"text must have at least 2 tokens, got {len(ids) - 1}")
    tokens = torch.tensor(ids, device=run.device)
    made = report(run.model, tokens, shown(ids[1:], run.encoding))
    html = page({"text": name} | run.facts() | made)
    atomic_write(path, lambda beside: beside.write_text(html, "utf-8"))
    mean = sum(made["loss"]) / len(made["loss"])
    size = f"{len(html.encode()) / 1e6:.1f} MB"
    print(f"{len(ids) - 1:,} tokens of {name}, {mean:.3f} bits each, in {path} ({size})")


def command(commands):
    """Add `look` to the commands of sample.py."""
    p = commands.add_parser("look", help="a page on what the memories of a run do with a text")
    p.add_argument("run", help="run folder of train.py")
    what = p.add_mutually_exclusive_group()
    beginning = f"its first {LONGEST:,} tokens are read"
    what.add_argument("--text", help=f"file to read (default: the held-out text); {beginning}")
    what.add_argument("--prompt", help="text to read")
    p.add_argument("--out", default="look.html", help="the page (default: look.html)")
    p.add_argument("--device", default="auto", help=DEVICES)
    updates_flag(p)
    p.set_defaults(do=look)
