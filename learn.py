"""Learning in context: the token clock of the Continuum Memory System (NL eq. 71).

The CMS levels of every row take gradient steps on the task's own loss while the row is read:

    tokens      | chunk 1: read, score, differentiate | chunk 2: read with what chunk 1 taught | ...
    level C     |                     w <- w - eta * (sum of the gradients of the last C tokens)

Gradients are taken once per chunk of the fastest level, over the whole chunk, with the mixers'
state at the start of the chunk held fixed. A loss term belongs to the chunk of its target. The
first target of a chunk was predicted in the chunk before, so its term is dropped. Thus the result
does not depend on how a stream is cut into calls.

The functions take the language model as an argument (`model.blocks`, `model.read`,
`model.config.levels`); hope.py calls them.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from layers import by_chunk, map_state, tensors
from memory import full_precision

UPDATES = ("off", "first_order", "full")  # of the CMS levels on the token clock


# --------------------------------------------------------------------------------------------------
# Paths of the mixers that can be differentiated twice


@contextlib.contextmanager
def changed(model, **values):
    """Within, modules that have these attributes have these values."""
    before = []
    for module in model.modules():
        for name in values.keys() & vars(module).keys():
            before.append((module, name, getattr(module, name)))
            setattr(module, name, values[name])
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def plain(model):
    """Within, every mixer takes its readable path through memory.scan, not a fused one."""
    return changed(model, fused=False)


@contextlib.contextmanager
def twice_differentiable(model):
    """Within, no path is taken whose hand-written backward has no second derivative."""
    with changed(model, fused=False, backend="torch"), sdpa_kernel(SDPBackend.MATH):
        yield


# --------------------------------------------------------------------------------------------------
# Reading and learning


def start_stream(model, batch):
    """The state before the first token of `batch` rows whose CMS levels learn.

    Raises ValueError where no level updates, or the fastest one after every token.
    """
    chunk = model.config.levels[0]
    if chunk is None or chunk < 2:
        why = "to learn in context: one token has no loss term of its own"
        have = model.config.levels
        raise ValueError(f"levels must begin with a chunk of at least 2 tokens {why}, got {have}")
    blocks = [{"mixer": None, "cms": block.cms.start_state(batch)} for block in model.blocks]
    if not torch.is_grad_enabled():  # a state is apart from the weights; training needs the views
        blocks = map_state(torch.clone, blocks)
    device = model.embedding.weight.device
    stream = {
        "mixers": [None] * len(blocks),  # states of the mixers at the start of the chunk
        "tokens": torch.empty(batch, 0, dtype=torch.int64, device=device),  # of the chunk so far
        "logits": None,  # of the last token, [batch, vocab]
    }
    return {"blocks": blocks, "stream": stream}


def read_and_update(model, tokens, state, full, step):
    """Read tokens [B, T] chunk by chunk; after each whole chunk the due levels take a step.

    full: differentiate through the inner gradients too (second order). step: inner step sizes, see
    CMS.steps. Returns (logits [B, T, vocab], state). Raises ValueError for a state that was read
    with updates off, or is of other rows.
    """
    batch, T = tokens.shape
    chunk = model.config.levels[0]
    outer = torch.is_grad_enabled()
    if state is None:
        state = start_stream(model, batch)
    if state.get("stream") is None:
        raise ValueError("state must come from a call with updates on, got one without")
    rows = state["stream"]["tokens"].shape[0]
    if rows != batch:
        raise ValueError(f"state must have as many rows as tokens, {batch}, got {rows}")
    for block in model.blocks:
        block.cms.steps(step)  # raises for a bad one
    blocks = state["blocks"]
    mixers = state["stream"]["mixers"]
    so_far = state["stream"]["tokens"]
    outputs = []
    for piece, begins in by_chunk(so_far.shape[1], T, chunk):
        new = tokens[:, piece]
        so_far = torch.cat([so_far, new], 1)
        complete = so_far.shape[1] == chunk
        with twice_differentiable(model) if full else contextlib.nullcontext():
            if not (begins and complete):
                logits, after = model.read(new, {"blocks": blocks})
            if complete:  # read the whole chunk (again, if it came in pieces) and differentiate
                starts = []
                for mixer, block in zip(mixers, blocks, strict=True):
                    starts.append({"mixer": mixer, "cms": block["cms"]})
                read = inner_gradients(model, so_far, starts, retain=outer, create=outer and full)
                gradients = read[2]
                if begins:
                    logits, after = read[:2]
        blocks = after["blocks"]
        if complete:
            for block, own, gradient in zip(model.blocks, blocks, gradients, strict=True):
                own["cms"] = block.cms.update(own["cms"], gradient, step)
            mixers = [own["mixer"] for own in blocks]
            so_far = so_far[:, :0]
        outputs.append(logits)
    stream = {"mixers": mixers, "tokens": so_far, "logits": logits[:, -1]}
    return torch.cat(outputs, 1), {"blocks": blocks, "stream": stream}


@torch.enable_grad()
def inner_gradients(model, tokens, blocks, retain, create):
    """One chunk [B, C] read from `blocks`, and the gradient of its summed loss at the fast weights.

    retain: keep the graph for an outer gradient; create: the graph of the gradients too. Returns
    (logits, state, gradients), the last a dict or None per block and level, as the fast weights.
    """

    def alias(w):
        # A node of its own: the gradient is this chunk's alone, though the state depends on w too.
        return w.view_as(w) if w.requires_grad else w.detach().requires_grad_()

    fast = [map_state(alias, block["cms"]["fast"]) for block in blocks]
    read_from = []
    for block, own in zip(blocks, fast, strict=True):
        read_from.append(block | {"cms": block["cms"] | {"fast": own}})
    logits, state = model.read(tokens, {"blocks": read_from})
    predictions = full_precision(logits[:, :-1]).flatten(0, 1)  # [B * (C - 1), vocab]
    loss = F.cross_entropy(predictions, tokens[:, 1:].flatten(), reduction="sum")
    found = torch.autograd.grad(loss, tensors(fast), retain_graph=retain, create_graph=create)
    found = iter(found)
    gradients = map_state(lambda _: next(found), fast)
    for own, block in zip(state["blocks"], blocks, strict=True):
        own["cms"] = own["cms"] | {"fast": block["cms"]["fast"]}
    if not retain:
        logits = logits.detach()
        state = map_state(torch.Tensor.detach, state)
    return logits, state, gradients
