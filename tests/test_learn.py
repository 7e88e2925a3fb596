"""The token clock: CMS levels that learn in context, per row, exactly (NL 70-74), in float64."""

import copy
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import learn
from hope import Hope, HopeConfig
from layers import computed_again, map_state, tensors
from support.checkpoint import load_state, save_state

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    vocab_size=11,
    d_model=8,
    n_layers=2,
    n_heads=2,
    hidden=12,
    chunk=4,
    levels=[4, 8, None],
    cms_step=0.3,
)
VARIANTS = {
    "hope": dict(),
    "hope_attention": dict(model="hope_attention"),
    "nested": dict(variant="nested", levels=[3, 6, 12]),
    "independent": dict(variant="independent", levels=[4, 8], n_layers=1),
    "one level": dict(levels=[5]),
    "four levels": dict(
        levels=[2, 4, 8, 16], hidden=8, chunk=3, n_layers=1
    ),  # the mixer's chunks are not those of the levels
    "mlp": dict(memory="mlp", n_layers=1),
    "gated_deltanet": dict(model="gated_deltanet", n_layers=1),
    "last block": dict(cms_blocks=1),
    "last two of three": dict(cms_blocks=2, n_layers=3, levels=[4, 12, None]),
    "windows": dict(window_reset=8),
    "clipped": dict(cms_clip=0.05, cms_step=1.0),
    "clipped, last block": dict(cms_clip=0.05, cms_step=1.0, cms_blocks=1),
}
each_variant = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(name, **changes):
    """A model whose every parameter is away from its initial value, but for the step sizes."""
    model = Hope(HopeConfig(**(TINY | VARIANTS[name] | changes))).double()
    with torch.no_grad():
        for label, p in model.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if "log_step" in label else 0.2))
    return model


def stream(B, T):
    return torch.randint(11, (B, T))


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def same(a, b, atol=1e-9):
    for x, y in zip(tensors(a), tensors(b), strict=True):
        close(x, y, atol)


def in_pieces(model, x, cuts, state=None):
    losses = []
    for start, stop in pairwise([0, *cuts, x.shape[1]]):
        loss, state = model.learn(x[:, start:stop], state)
        losses.append(loss)
    return torch.cat(losses, 1), state


def oracle(model, x):
    """Losses of `learn` and the last weights, per row: an ordinary model, SGD by hand (NL 71)."""
    chunk, losses, learned = model.config.levels[0], [], []
    window = model.config.window_reset  # which the oracle sees to itself
    for row in x:
        m, mixers, last, out = copy.deepcopy(model), [None] * len(model.blocks), None, []
        for block in m.blocks if window else ():
            block.mixer.window_reset = None
        sums = {
            p: torch.zeros_like(p)
            for b in m.blocks
            for mlp, level in zip(b.cms.mlps, b.cms.levels, strict=True)
            for p in (mlp.w_in, mlp.w_out)
            if level.chunk
        }
        for tick in range(chunk, len(row) + chunk, chunk):
            tokens = row[None, tick - chunk : tick]
            state = {"blocks": [{"mixer": s, "cms": None} for s in mixers]}
            logits, state = m.read(
                tokens, map_state(torch.Tensor.detach, state) if last is not None else None
            )
            loss = F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
            crossing = [] if last is None else [F.cross_entropy(last, tokens[0, 0])[None]]
            out += [*crossing, loss]
            mixers, last = [s["mixer"] for s in state["blocks"]], logits[0, -1]
            if window and tick % window == 0:
                starts = [block.mixer.start_state(1) for block in m.blocks]
                mixers = [a | {"conv": s["conv"]} for a, s in zip(starts, mixers, strict=True)]
            if tick >= len(row):  # no token follows that would see a step
                break
            m.zero_grad()
            loss.mean().backward()
            norm = sum(p.grad.square().sum() for p in sums).sqrt()
            clip = min(1.0, model.config.cms_clip / norm)
            for block, first in zip(m.blocks, model.blocks, strict=True):
                etas = iter(() if block.cms.log_step is None else block.cms.log_step.exp())
                for number, level in enumerate(block.cms.levels):
                    if level.chunk is None:
                        continue
                    eta = next(etas)
                    for name in ("w_in", "w_out"):
                        p = getattr(block.cms.mlps[number], name)
                        sums[p] += clip * p.grad
                        if tick % level.chunk == 0:
                            with torch.no_grad():
                                p -= eta * sums[p] / (level.chunk // chunk)
                                if number in block.cms.resets(tick):
                                    p.copy_(getattr(first.cms.mlps[number], name))
                            sums[p].zero_()
        losses.append(torch.cat(out).detach())
        learned.append(
            [
                {n: getattr(mlp, n).detach() for n in ("w_in", "w_out")}
                for b in m.learners
                for mlp in b.cms.mlps
            ]
        )
    return torch.stack(losses), learned


# --------------------------------------------------------------------------------------------------
# What is learned


@each_variant
def test_every_row_learns_as_if_it_were_an_ordinary_model_trained_alone(name, T=27):
    model, x = build(name), stream(2, T)
    expected, weights = oracle(model, x)
    for updates in ("first_order", "full"):
        loss, state = model.learn(x, updates=updates)
        close(loss, expected)
        learned = state["blocks"][-len(model.learners) :]
        fast = [w for block in learned for w in block["cms"]["fast"]]
        for row in range(2):
            for w, alone in zip(fast, weights[row], strict=True):
                for key in w or ():
                    close(w[key][row], alone[key])
    with torch.no_grad():
        close(model.learn(x)[0], expected)
    plain = F.cross_entropy(model.read(x)[0][:, :-1].mT, x[:, 1:], reduction="none")
    assert (expected - plain).abs().max() > 1e-4  # something was learned


@each_variant
@pytest.mark.parametrize("cuts", [range(1, 29), [4, 8, 12], "random"], ids=str)
def test_any_way_of_cutting_a_stream_into_calls_learns_the_same(name, cuts):
    model, x = build(name), stream(2, 29)
    if cuts == "random":
        cuts = sorted(set(torch.randint(1, 29, (5,)).tolist()))
    with torch.no_grad():
        whole, final = model.learn(x)
        pieces, state = in_pieces(model, x, cuts)
    assert whole.shape == (2, 28)
    close(pieces, whole)
    same(state, final)


@pytest.mark.parametrize("updates", ["first_order", "full"])
def test_cutting_a_stream_leaves_the_outer_gradient_as_it_was(updates):
    model, x = build("hope"), stream(2, 22)
    whole = torch.autograd.grad(model.learn(x, updates=updates)[0].sum(), list(model.parameters()))
    first, state = model.learn(x[:, :10], updates=updates)
    second, _ = model.learn(x[:, 10:], state, updates=updates)
    parts = torch.autograd.grad(first.sum() + second.sum(), list(model.parameters()))
    for a, b in zip(whole, parts, strict=True):
        close(a, b)


@each_variant
def test_rows_never_share_fast_weights(name):
    model, x = build(name), stream(3, 26)
    with torch.no_grad():
        whole, state = model.learn(x)
        for row in range(3):
            alone, own = model.learn(x[row : row + 1])
            close(whole[row : row + 1], alone, 1e-11)
            same(map_state(lambda t, row=row: t[row : row + 1], state), own, 1e-11)
        other = x.clone()
        other[1] = (x[1] + 1) % 11
        close(model.learn(other)[0][[0, 2]], whole[[0, 2]], 1e-11)


@each_variant
def test_what_is_learned_never_changes_the_loss_of_earlier_tokens(name):
    model, x = build(name), stream(2, 26)
    for t in (4, 9, 24):
        changed = x.clone()
        changed[:, t:] = (x[:, t:] + 1) % 11
        with torch.no_grad():
            close(model.learn(x)[0][:, : t - 1], model.learn(changed)[0][:, : t - 1], 1e-11)


@pytest.mark.slow
def test_a_saved_stream_goes_on_in_another_process(tmp_path):
    whole, x = {}, stream(2, 31)
    for name in ("hope", "hope_attention", "nested"):
        model = build(name)
        with torch.no_grad():
            whole[name] = model.learn(x)
            _, state = model.learn(x[:, :14])  # in the middle of a chunk, with sums outstanding
        save_state(state, tmp_path / name)
        torch.save(
            {"config": model.config.to_dict(), "weights": model.state_dict(), "x": x[:, 14:]},
            tmp_path / f"{name}.pt",
        )
    code = """
import torch
from pathlib import Path
from hope import Hope, HopeConfig
from support.checkpoint import load_state, save_state
for name in ("hope", "hope_attention", "nested"):
    saved = torch.load(f"{name}.pt", weights_only=True)
    model = Hope(HopeConfig(**saved["config"])).double()
    model.load_state_dict(saved["weights"])
    with torch.no_grad():
        loss, state = model.learn(saved["x"], load_state(name))
    save_state([loss, state], Path(name))
"""
    run = dict(
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    done = subprocess.run([sys.executable, "-c", code], **run)
    assert done.returncode == 0, done.stderr
    for name, (loss, state) in whole.items():
        rest, final = load_state(tmp_path / name)
        close(rest, loss[:, 13:])
        same(final, state)


@each_variant
def test_a_level_changes_with_the_first_token_after_its_chunk_and_at_no_other(name):
    model, x = build(name), stream(2, 25)
    state, before = None, None
    with torch.no_grad():
        for tick in range(1, 26):
            if tick in (7, 18):  # resumed from a copy
                state = map_state(torch.clone, state)
            _, state = model.learn(x[:, tick - 1 : tick], state)
            fast = [block["cms"]["fast"] for block in state["blocks"][-len(model.learners) :]]
            for block, was in zip(fast, before or fast, strict=True):
                for level, now, then in zip(model.learners[0].cms.levels, block, was, strict=True):
                    assert (now is None) == (level.chunk is None)
                    moved = now is not None and not torch.equal(now["w_in"], then["w_in"])
                    due = level.chunk and tick > 1 and (tick - 1) % level.chunk == 0
                    assert moved == bool(due), (tick, level)
            before = fast


@pytest.mark.parametrize(
    "T, away", [(4, [True, False, False]), (10, [True, True, False]), (13, [False, False, True])]
)
def test_nested_levels_return_to_their_start_when_the_next_slower_one_updates(T, away):
    model = build("nested")  # chunks 3, 6, 12
    with torch.no_grad():
        _, state = model.learn(stream(2, T))
    for block, s in zip(model.blocks, state["blocks"], strict=True):
        found = [
            not torch.equal(w["w_in"][0], mlp.w_in)
            for mlp, w in zip(block.cms.mlps, s["cms"]["fast"], strict=True)
        ]
        assert found == away


# --------------------------------------------------------------------------------------------------
# Gradients of the outer loss


PARTS = (
    "embedding",
    "norm",
    "w_",
    "log_step",
    "mixer",
)  # of a model, by what the name of a parameter holds


def check_by_finite_differences(f, model, grads, h=1e-5):
    """f() along a random direction of each part, from four points (error h^4): the gradients."""
    origin = [p.detach().clone() for p in model.parameters()]
    for part in PARTS:
        own = [
            next((part for part in PARTS if part in name), "mixer") == part
            for name, _ in model.named_parameters()
        ]
        direction = [
            torch.randn_like(p) / p.numel() ** 0.5 * mine
            for p, mine in zip(origin, own, strict=True)
        ]
        values = {}
        for n in (-2, -1, 1, 2):
            with torch.no_grad():
                for p, start, v in zip(model.parameters(), origin, direction, strict=True):
                    p.copy_(start + n * h * v)
            values[n] = f()
        expected = (values[-2] - 8 * values[-1] + 8 * values[1] - values[2]) / (12 * h)
        with torch.no_grad():
            for p, start in zip(model.parameters(), origin, strict=True):
                p.copy_(start)
        found = sum((g * v).sum().item() for g, v in zip(grads, direction, strict=True))
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-7), part


@each_variant
@pytest.mark.slow
def test_full_gradients_are_finite_differences_of_the_loss_that_learn_returns(name):
    model, x = build(name, cms_step=0.01), stream(2, 14)

    def loss():
        with torch.no_grad():
            return model.learn(x)[0].sum().item()

    grads = torch.autograd.grad(model.learn(x, updates="full")[0].sum(), list(model.parameters()))
    check_by_finite_differences(loss, model, grads)


@pytest.mark.parametrize("name", ["hope", "hope_attention", "nested", "independent"])
@pytest.mark.slow
def test_first_order_gradients_hold_the_inner_gradients_constant(name, monkeypatch):
    """The definition: the same loss as a function of the parameters, with the inner gradients fixed
    at the numbers they have at this point; its finite differences."""
    model, x, errors = build(name, cms_step=0.01), stream(2, 14), learn.inner_gradients
    full = torch.autograd.grad(model.learn(x, updates="full")[0].sum(), list(model.parameters()))
    inner = []

    def record(*args, **kwargs):
        inner.append(errors(*args, **kwargs)[2])
        return *errors(*args, **kwargs)[:2], inner[-1]

    monkeypatch.setattr(learn, "inner_gradients", record)
    grads = torch.autograd.grad(
        model.learn(x, updates="first_order")[0].sum(), list(model.parameters())
    )

    def loss():
        constants = iter(inner)

        def with_constants(*args, **kwargs):
            return *errors(*args, **kwargs)[:2], next(constants)

        monkeypatch.setattr(learn, "inner_gradients", with_constants)
        with torch.no_grad():
            return model.learn(x)[0].sum().item()

    check_by_finite_differences(loss, model, grads)
    assert (
        max((a - b).abs().max().item() for a, b in zip(grads, full, strict=True)) > 1e-4
    )  # the two are told apart


def test_full_training_restores_the_fused_path():
    model = build("hope")
    model.learn(stream(1, 9), updates="full")
    assert all(block.mixer.fused for block in model.blocks)


@pytest.mark.parametrize("name", ["hope", "hope_attention"])
def test_the_start_weights_and_the_step_sizes_are_trained_by_what_is_read_later(name):
    model, x = Hope(HopeConfig(**(TINY | VARIANTS[name]))), stream(2, 17)
    loss, _ = model.learn(x)
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


# --------------------------------------------------------------------------------------------------
# Step sizes, reading, errors


@each_variant
def test_with_step_0_learning_is_reading(name):
    model, x = build(name), stream(2, 26)
    with torch.no_grad():
        loss, _ = model.learn(x, step=0.0)
        close(loss, F.cross_entropy(model.read(x)[0][:, :-1].mT, x[:, 1:], reduction="none"))


def bare_names(weights):
    return [(name, p) for name, p in weights.items() if not name.endswith(("log_step", "rise"))]


def test_a_step_that_is_given_takes_the_place_of_the_learned_one():
    model, x = build("hope"), stream(2, 26)
    bare = Hope(HopeConfig(**(TINY | dict(cms_step=None)))).double()
    bare.load_state_dict(
        dict(bare_names(model.state_dict()))
    )
    with torch.no_grad():
        for block in model.blocks:
            block.cms.log_step.copy_(torch.tensor([0.02, 0.3], dtype=torch.float64).log())
        close(model.learn(x)[0], bare.learn(x, step=[0.02, 0.3])[0])


def test_what_was_learned_can_be_read_without_learning_more():
    model, x, on = build("hope"), stream(2, 18), stream(2, 9)
    with torch.no_grad():
        _, state = model.learn(x)
        logits, after = model(on, state, updates="off")
        close(logits[:, 0], model.learn(on[:, :1], state)[1]["stream"]["logits"])
        same(
            [b["cms"]["fast"] for b in after["blocks"]], [b["cms"]["fast"] for b in state["blocks"]]
        )
        with pytest.raises(ValueError, match="a call with updates on"):
            model.learn(on, after)


@each_variant
def test_a_model_learns_from_what_it_writes_exactly_as_from_what_it_is_given(name):
    model, x = build(name), stream(2, 10)
    with torch.no_grad():
        _, state = model.learn(x)
        last = state["stream"]["logits"].argmax(-1)[:, None]
        written = torch.stack([last[:, 0], *model.generate(last, 20, state, temperature=0)], 1)
        logits, whole = model(torch.cat([x, written], 1))
        assert torch.equal(logits[:, 9:-1].argmax(-1), written)
        pieces, state = model(written[:, :13], state)
        rest, state = model(written[:, 13:], state)
        close(torch.cat([pieces, rest], 1), logits[:, 10:])
        same(state, whole)
        still = model(torch.cat([x, written], 1), updates="off")[0]
        assert (still - logits).abs().max() > 1e-4  # something was learned


def test_the_config_says_whether_a_model_learns():
    assert HopeConfig().cms_updates == "first_order"
    assert HopeConfig(model="transformer").cms_updates == "off"  # has no level that updates
    assert HopeConfig(model="transformer", levels=[64, None]).cms_updates == "first_order"
    model, x = build("hope", cms_updates="off"), stream(2, 18)
    with torch.no_grad():
        assert torch.equal(model(x)[0], model.read(x)[0])
        close(model(x, updates="first_order")[0], build_like(model)(x)[0])


def build_like(model):
    """The same weights, told to learn."""
    other = Hope(HopeConfig(**(model.config.to_dict() | {"cms_updates": "first_order"}))).double()
    other.load_state_dict(model.state_dict())
    return other


def test_blocks_below_the_learners_are_ordinary_and_read_all_tokens_in_one_call():
    model, x = build("last two of three"), stream(2, 27)
    assert [len(block.cms.levels) for block in model.blocks] == [1, 3, 3]
    parts = {"mixer": [0] * 3, "cms": [0] * 3}
    for i, block in enumerate(model.blocks):
        for name, calls in parts.items():

            def count(*_, calls=calls, i=i):
                calls[i] += 1

            getattr(block, name).register_forward_hook(count)
    with torch.no_grad():
        model(x)
    assert parts == {"mixer": [1, 1, 7], "cms": [1, 7, 7]}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.slow
def test_a_stream_that_repeats_is_learned(seed):
    """Only the CMS levels of a random model of 8 channels learn, yet a fifth of the loss goes."""
    torch.manual_seed(seed)
    model, phrase = build("hope"), stream(1, 16)
    with torch.no_grad():
        (learned, _), (still, _) = (
            model.learn(phrase.repeat(1, 40), step=step) for step in (0.3, 0.0)
        )
    assert learned[:, -16:].mean() < 0.8 * still[:, -16:].mean()


@pytest.mark.parametrize(
    "make_it, message",
    [
        (
            lambda x: build("hope", levels=[None]).learn(x, updates="first_order"),
            r"chunk of at least 2 tokens.*got \[None\]",
        ),
        (
            lambda x: build("hope", levels=[1, None]).learn(x),
            r"chunk of at least 2 tokens.*got \[1, None\]",
        ),
        (lambda x: build("hope", cms_step=None).learn(x), r"step must be given.*without cms_step"),
        (
            lambda x: build("hope").learn(x, step=-1.0),
            r"step must be a number of at least 0.*got -1",
        ),
        (
            lambda x: build("hope").learn(x, step=[0.1]),
            r"each of the 2 levels that update, got \[0.1\]",
        ),
        (lambda x: build("hope", cms_step=0.0), r"step must be above 0.*got 0.0"),
        (lambda x: build("hope", cms_clip=0.0), r"cms_clip must be a number above 0, got 0.0"),
        (lambda x: build("hope", cms_blocks=3), r"cms_blocks must be at most n_layers, 2, got 3"),
        (lambda x: build("hope", cms_blocks=0), r"cms_blocks must be an integer of at least 1"),
        (lambda x: build("hope", cms_updates="on"), r"cms_updates 'on'.*off, first_order, full"),
        (lambda x: build("hope", cms_step=[0.1] * 3), r"step must be .*each of the 2.*got"),
        (lambda x: build("hope").learn(x, updates="off"), r"'first_order' or 'full'.*got 'off'"),
        (lambda x: build("hope")(x, updates="second"), r"'second'.*off, first_order, full"),
        (
            lambda x: build("hope").learn(x, build("hope").learn(x[:1])[1]),
            r"state must have 2 rows, as its input, got 1",
        ),
        (lambda x: build("hope").learn(x + 11), r"token ids must be in \[0, 11\)"),
    ],
)
def test_bad_input_is_named_with_its_value_and_the_legal_range(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it(stream(2, 5))


def test_under_inference_mode_a_model_learns_and_writes_as_without_gradients():
    model, x, on = build("hope"), stream(2, 19), stream(2, 9)
    with torch.no_grad():
        first, state = model.learn(x)
        second, _ = model.learn(on, state)
        written = list(model.generate(on, 6, state, temperature=0))
    with torch.inference_mode():
        loss, own = model.learn(x)
        assert torch.equal(loss, first) and torch.equal(model.learn(on, own)[0], second)
        assert all(map(torch.equal, model.generate(on.clone(), 6, own, temperature=0), written))
        kept = map_state(torch.clone, state)  # tensors that can never be differentiated
        made_inside = build("hope")
        with pytest.raises(ValueError, match="must be made outside of torch.inference_mode"):
            made_inside.learn(x)
    loss, _ = model.learn(on, kept)
    assert torch.equal(loss, second) and loss.requires_grad


def test_steps_rise_with_the_buffer_that_training_sets():
    model, x = build("hope"), stream(2, 26)
    for block in model.learners:
        block.cms.rise.fill_(0.25)
    steps = (0.25 * model.learners[0].cms.log_step.exp()).tolist()
    assert model.learners[0].cms.steps().tolist() == pytest.approx(steps)
    again = Hope(model.config).double()
    again.load_state_dict(model.state_dict())  # a checkpoint of a half trained model is that model
    with torch.no_grad():
        assert torch.equal(again(x)[0], model(x)[0])


def test_what_is_computed_again_has_the_precision_of_the_first_time():
    weight = torch.nn.Parameter(torch.randn(3, 3))
    types = []

    def product(x):
        types.append((x @ weight).dtype)
        return x @ weight

    with torch.autocast("cpu", torch.bfloat16):
        y = computed_again(product, [weight], torch.randn(2, 3))
    y.sum().backward()
    assert types == [torch.bfloat16, torch.bfloat16]
