"""Learning in context: the token clock of the Continuum Memory System (NL eq. 71).

The CMS levels of every row take gradient steps on the task's own loss while the row is read:

    tokens      | chunk 1: read, score, differentiate | chunk 2: read with what chunk 1 taught | ...
    level C     |                    w <- w - eta * (mean of the gradients of the last C tokens)

Gradients are taken once per chunk of the fastest level, over the whole chunk, with the mixers'
state at the start of the chunk held fixed, and clipped for each row (deviation 11). A loss term
belongs to the chunk of its target. The first target of a chunk was predicted in the chunk before,
so its term is dropped. Thus the result does not depend on how a stream is cut into calls.

The functions take the language model as an argument (`model.blocks`, `model.learners`,
`model.config`); hope.py calls them. `python learn.py` shows a phrase being learned.
"""

import contextlib
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from layers import computed_again, map_state, of_rows, tensors
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
    """Within, every mixer takes its readable path, through memory.scan in torch.

    No kernel, whose check would take longer than such a look at the memories.
    """
    return changed(model, fused=False, backend="torch")


@contextlib.contextmanager
def twice_differentiable(model):
    """Within, no path is taken whose hand-written backward has no second derivative."""
    how = {"fused": False, "backend": "torch", "recompute": False}
    with changed(model, **how), sdpa_kernel(SDPBackend.MATH):
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
    blocks = [{"mixer": None, "cms": None} for _ in model.blocks]
    for block, state in zip(model.learners, blocks[-len(model.learners) :], strict=True):
        state["cms"] = block.cms.start_state(batch)
    if not torch.is_grad_enabled():  # a state is apart from the weights; training needs the views
        blocks = map_state(torch.clone, blocks)
    weight = model.embedding.weight
    stream = {  # of the chunk so far, or of a whole one after which no token has come
        "mixers": [None] * (len(model.learners) - 1),  # of all learners but the first, at its start
        "tokens": torch.empty(batch, 0, dtype=torch.int64, device=weight.device),
        "x": weight.new_empty(batch, 0, weight.shape[1]),  # what the first CMS reads
        "logits": None,  # of the last token, [batch, vocab]
    }
    return {"blocks": blocks, "stream": stream}


def read_and_update(model, tokens, state, full, step):
    """Read tokens [B, T]; with the first token after a chunk the due levels take a step.

    What lies below the first CMS that learns depends on no step, so it reads all tokens at once.
    full: differentiate through the inner gradients too (second order). step: inner step sizes, see
    CMS.steps. Returns (logits [B, T, vocab], state). Raises ValueError for a state that was read
    with updates off, or is of other rows, and for a model made under torch.inference_mode().
    """
    chunk = model.config.levels[0]
    outer = torch.is_grad_enabled()
    given = [tokens, state]
    if torch.is_inference_mode_enabled() or any(t.is_inference() for t in tensors(given)):
        if model.embedding.weight.is_inference():
            made = "made outside of torch.inference_mode(), as learning in context differentiates"
            raise ValueError(f"a model that learns in context must be {made}")
        with torch.inference_mode(False), torch.set_grad_enabled(outer):
            return read_and_update(model, *map_state(torch.clone, given), full, step)
    if state is None:
        state = start_stream(model, len(tokens))
    if state.get("stream") is None:
        raise ValueError("state must come from a call with updates on, got one without")
    stream = state["stream"]
    stored = stream["tokens"].shape[1]
    for block in model.learners:
        block.cms.steps(step)  # raises for a bad one
    n_below = len(model.blocks) - len(model.learners)
    below = state["blocks"][:n_below]
    learners = state["blocks"][n_below:]
    mixers = stream["mixers"]
    outputs = []
    with twice_differentiable(model) if full and outer else contextlib.nullcontext():
        x, below = model.through(model.blocks[:n_below], model.embedding(tokens), below)
        x, first_mixer = model.learners[0].mix(x, learners[0]["mixer"])
        of_rows(stream, x)
        x = torch.cat([stream["x"], x], 1)  # from the start of the chunk on
        tokens = torch.cat([stream["tokens"], tokens], 1)
        T = tokens.shape[1]
        for begin in range(0, T, chunk):
            end = begin + chunk
            new = max(begin, stored)  # tokens before it were read by earlier calls
            if end >= T:  # no token follows (yet) that would see a step
                logits, learners = read_learners(model, x[:, new:], learners)
                outputs.append(logits)
                break
            # read the chunk, maybe again, from its start on
            starts = []
            for mixer, own in zip([None, *mixers], learners, strict=True):
                position = own["cms"]["position"] - (new - begin)
                starts.append({"mixer": mixer, "cms": own["cms"] | {"position": position}})
            of_chunk = tokens[:, begin:end]

            def learn_chunk(x, starts, of_chunk=of_chunk):
                return learn_from(model, x, of_chunk, starts, full, step)

            if outer and (full or model.learners[0].recompute):
                learn_chunk = partial(computed_again, learn_chunk, list(model.parameters()))
            logits, learners = learn_chunk(x[:, begin:end], starts)
            outputs.append(logits[:, new - begin :])
            mixers = [own["mixer"] for own in learners[1:]]
    learners[0]["mixer"] = first_mixer
    stream = {
        "mixers": mixers,
        "tokens": tokens[:, begin:].clone(),  # copies: the state does not keep what is done alive
        "x": x[:, begin:].clone(),
        "logits": outputs[-1][:, -1],
    }
    return torch.cat(outputs, 1), {"blocks": below + learners, "stream": stream}


def read_learners(model, x, states):
    """x [B, T, d_model] behind the first learner's mixer -> (logits, states of the learners)."""
    first, *others = model.learners
    x, cms = first.cms(x, states[0]["cms"])
    x, after = model.through(others, x, states[1:])
    return model.logits(x), [{"mixer": None, "cms": cms}, *after]


def learn_from(model, x, tokens, states, full, step):
    """Read a chunk x [B, C, d_model], differentiate, take the steps due -> (logits, states)."""
    outer = torch.is_grad_enabled()
    # who computes the chunk again does so for all its blocks at once
    with twice_differentiable(model) if full and outer else changed(model, recompute=False):
        logits, after, gradients = inner_gradients(model, x, tokens, states, outer, outer and full)
        for block, own, gradient in zip(model.learners, after, gradients, strict=True):
            own["cms"] = block.cms.update(own["cms"], gradient, step)
    return logits, after


class _Behind(torch.autograd.Function):
    """w itself, deeper in the graph than what made `held`.

    autograd looks for w in all that is as deep: else in all chunks that were read before.
    """

    @staticmethod
    def forward(ctx, w, *held):
        ctx.held = len(held)
        return w.view_as(w)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *[None] * ctx.held


@torch.enable_grad()
def inner_gradients(model, x, tokens, blocks, retain, create):
    """A chunk x [B, C, d_model] read from the states `blocks`, and gradients at the fast weights.

    Those of each row's mean loss, together clipped to the norm `cms_clip`. retain: keep the graph
    for an outer gradient; create: the graph of the gradients too. Returns (logits, states,
    gradients), the last a dict or None per block and level, as the fast weights.
    """

    held = [t for t in tensors([block["mixer"] for block in blocks]) if t.requires_grad]

    def alias(w):
        # A node of its own: the gradient is this chunk's alone, though the state depends on w too.
        return _Behind.apply(w, *held) if w.requires_grad else w.detach().requires_grad_()

    fast = [map_state(alias, block["cms"]["fast"]) for block in blocks]
    read_from = []
    for block, own in zip(blocks, fast, strict=True):
        read_from.append(block | {"cms": block["cms"] | {"fast": own}})
    logits, after = read_learners(model, x, read_from)
    predictions = full_precision(logits[:, :-1]).flatten(0, 1)  # [B * (C - 1), vocab]
    loss = F.cross_entropy(predictions, tokens[:, 1:].flatten(), reduction="sum")
    loss = loss / (tokens.shape[1] - 1)
    found = torch.autograd.grad(loss, tensors(fast), retain_graph=retain, create_graph=create)
    norms = torch.stack([torch.linalg.vector_norm(g, dim=(1, 2)) for g in found])  # [tensors, B]
    limit = model.config.cms_clip
    scale = limit / torch.linalg.vector_norm(norms, dim=0).clamp(min=limit)
    found = iter(found)
    gradients = map_state(lambda _: next(found) * scale[:, None, None], fast)
    for own, block in zip(after, blocks, strict=True):
        own["cms"] = own["cms"] | {"fast": block["cms"]["fast"]}
    if not retain:
        logits = logits.detach()
        after = map_state(torch.Tensor.detach, after)
    return logits, after, gradients


if __name__ == "__main__":
    from runpy import run_module

    run_module("bench.demos", run_name="learn")
