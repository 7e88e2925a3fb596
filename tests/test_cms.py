"""Continuum Memory System: forward pass of each variant, memories per row, calendar of updates."""

import pytest
import torch
from torch.nn import functional as F

from cms import CMS, VARIANTS, Level

D = 6
LEVELS = [Level(2, 5), Level(6, 8), Level(12, 4), Level(None, 7)]


pytestmark = pytest.mark.usefixtures("float64")


def make(variant="sequential", levels=LEVELS):
    """A CMS whose norms and mixing weights are random too: no test passes because they are 1."""
    cms = CMS(D, levels, variant)
    with torch.no_grad():
        for name, p in cms.named_parameters():
            if "norm" in name or "mix" in name:
                p.copy_(torch.rand_like(p) + 0.5)
    return cms


def swiglu(x, norm, w_in, w_out):
    """The pre-normed SwiGLU network, written out for one vector x [d]."""
    z = x / torch.sqrt((x**2).mean() + 1e-6) * norm
    h = w_in.shape[0] // 2
    gate, up = w_in[:h] @ z, w_in[h:] @ z
    return w_out @ (gate * torch.sigmoid(gate) * up)


def by_hand(cms, x, weights):
    """y [B, T, d] from weights[level][row] = (w_in, w_out), vector by vector (NL 70, 74)."""
    y = torch.empty_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            z = x[b, t]
            for level, mlp in enumerate(cms.mlps):
                source = x[b, t] if cms.variant == "independent" else z
                step = swiglu(source, mlp.norm.weight, *weights[level][b])
                z = z + (cms.mix[level] * step if cms.variant == "independent" else step)
            y[b, t] = z
    return y


def starts(cms, batch):
    return [[(mlp.w_in, mlp.w_out)] * batch for mlp in cms.mlps]


def test_one_level_that_never_updates_is_the_ordinary_feed_forward_block():
    cms = make(levels=[Level(None, 9)])
    x = torch.randn(2, 3, D)
    mlp = cms.mlps[0]
    gate, up = F.linear(F.rms_norm(x, (D,), mlp.norm.weight, 1e-6), mlp.w_in).split(9, dim=-1)
    y, state = cms(x)
    torch.testing.assert_close(y, x + F.linear(F.silu(gate) * up, mlp.w_out), rtol=0, atol=1e-12)
    assert state is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_the_equation_written_out(variant):
    cms, x = make(variant), torch.randn(2, 3, D)
    torch.testing.assert_close(cms(x)[0], by_hand(cms, x, starts(cms, 2)), rtol=0, atol=1e-12)


def test_nested_and_sequential_share_the_forward_pass_and_independent_differs():
    sequential, nested, independent = (make(v) for v in VARIANTS)
    nested.load_state_dict(sequential.state_dict())
    independent.load_state_dict(sequential.state_dict(), strict=False)
    x = torch.randn(2, 3, D)
    assert torch.equal(sequential(x)[0], nested(x)[0])
    assert (sequential(x)[0] - independent(x)[0]).abs().max() > 1e-2


def test_independent_levels_start_with_equal_weights_that_are_learned():
    cms = CMS(D, LEVELS, "independent")
    assert torch.equal(cms.mix.detach(), torch.full((4,), 0.25))
    cms(torch.randn(2, 3, D))[0].square().sum().backward()
    assert (cms.mix.grad != 0).all()
    assert len(cms.mix.grad.unique()) == 4  # each weight has a gradient of its own


def test_out_scale_scales_only_the_output_weights():
    torch.manual_seed(1)
    a = CMS(D, LEVELS)
    torch.manual_seed(1)
    b = CMS(D, LEVELS, out_scale=0.1)
    for p, q in zip(a.mlps, b.mlps, strict=True):
        assert torch.equal(p.w_in, q.w_in)
        torch.testing.assert_close(q.w_out, 0.1 * p.w_out)


def test_initial_weights_keep_unit_variance():
    mlp = CMS(256, [Level(None, 512)]).mlps[0]
    assert mlp.w_in.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert mlp.w_out.std().item() == pytest.approx(512**-0.5, rel=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fast_weights_equal_to_the_starts_change_nothing(variant):
    cms, x = make(variant), torch.randn(3, 4, D)
    y, state = cms(x, cms.start_state(3))
    torch.testing.assert_close(y, cms(x)[0], rtol=0, atol=1e-12)
    assert state["position"] == 4
    assert [w is None for w in state["fast"]] == [False, False, False, True]
    _, state = cms(x[:, :1], state)
    assert state["position"] == 5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", range(3))
def test_each_row_uses_its_own_fast_weights(variant, level):
    cms, x = make(variant), torch.randn(3, 2, D)
    state, weights = cms.start_state(3), starts(cms, 3)
    own = {name: w + torch.randn_like(w) for name, w in state["fast"][level].items()}
    for name in own:
        own[name][[0, 2]] = state["fast"][level][name][[0, 2]]  # only row 1 has learned something
    state["fast"][level] = own
    weights[level] = [(own["w_in"][b], own["w_out"][b]) for b in range(3)]
    y, after = cms(x, state)
    torch.testing.assert_close(y, by_hand(cms, x, weights), rtol=0, atol=1e-12)
    change = (y - cms(x)[0]).abs().amax((1, 2))
    assert change[1] > 1e-3 and change[[0, 2]].max() < 1e-12
    assert after["fast"][level] is own  # a forward pass moves the position, never a weight
    assert state["position"] == 0


def test_gradient_through_fast_copies_is_the_gradient_of_the_starts():
    cms, x, target = make(), torch.randn(3, 4, D), torch.randn(3, 4, D)
    plain = torch.autograd.grad(((cms(x)[0] - target) ** 2).sum(), list(cms.parameters()))
    through = torch.autograd.grad(
        ((cms(x, cms.start_state(3))[0] - target) ** 2).sum(), list(cms.parameters())
    )
    for a, b in zip(plain, through, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradient_reaches_the_starts_through_an_update_of_the_fast_weights():
    """A step per row, then a later loss: its derivative along a start, by finite differences."""
    cms, x, target = make(levels=[Level(2, 5)]), torch.randn(2, 4, D), torch.randn(2, 4, D)
    mlp = cms.mlps[0]

    def later_loss(w_in):
        fast = {"w_in": w_in.expand(2, -1, -1), "w_out": mlp.w_out.expand(2, -1, -1)}
        y, state = cms(x[:, :2], {"position": 0, "fast": [fast]})
        loss = ((y - target[:, :2]) ** 2).sum()
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
        state["fast"] = [
            {name: w - 0.05 * g for (name, w), g in zip(fast.items(), grads, strict=True)}
        ]
        return ((cms(x[:, 2:], state)[0] - target[:, 2:]) ** 2).sum()

    assert torch.autograd.gradcheck(later_loss, mlp.w_in)


@pytest.mark.parametrize(
    "levels", [LEVELS, LEVELS[:-1], [Level(1, 2), Level(3, 2)], [Level(4, 2)], [Level(None, 2)]]
)
def test_levels_are_due_as_counters_say(levels):
    cms, counters = CMS(D, levels), [0] * len(levels)
    for tick in range(1, 40):
        due = []
        for number, level in enumerate(levels):
            counters[number] += 1
            if counters[number] == level.chunk:
                counters[number] = 0
                due.append(number)
        assert cms.due(tick) == due
        assert cms.resets(tick) == []


def test_a_nested_level_takes_the_same_number_of_steps_from_every_start():
    cms, steps, runs = CMS(D, LEVELS, "nested"), [0] * 4, [[], [], [], []]
    for tick in range(1, 73):
        resets = cms.resets(tick)
        for number in cms.due(tick):
            steps[number] += 1
        for number in range(3):
            next_is_due = (
                LEVELS[number + 1].chunk is not None and tick % LEVELS[number + 1].chunk == 0
            )
            assert (number in resets) == next_is_due
        for number in resets:
            runs[number].append(steps[number])
            steps[number] = 0
    assert runs == [
        [3] * 12,
        [2] * 6,
        [],
        [],
    ]  # 6 / 2 and 12 / 6 steps; nothing slower than level 2 ever updates
    assert steps == [0, 0, 6, 0]


def updated(rows=2, ticks=2, level=None):
    """One update after `ticks` ticks, with gradients of so many rows; `level` has none."""
    cms = CMS(D, LEVELS, step=0.1)
    _, state = cms(torch.randn(2, ticks, D), cms.start_state(2))
    grads = [mlp.start(rows) for mlp in cms.mlps]
    if level is not None:
        grads[level] = None
    return cms, grads, cms.update(state, grads)


def test_every_update_comes_at_the_end_of_the_next_chunk():
    cms, grads, state = updated()
    assert state["position"] == state["updated"] == 2
    _, late = cms(torch.randn(2, 4, D), state)
    for wrong in (state, late):
        with pytest.raises(ValueError, match="every 2 ticks, now at 4, got position"):
            cms.update(wrong, grads)
    old = {name: own for name, own in late.items() if name != "updated"}
    assert cms.update(old, grads)["updated"] == 6


@pytest.mark.parametrize(
    "make_it, message",
    [
        (lambda: updated(rows=1), r"gradients of level 0 .*\(2, 10, 6\).*got .*\(1, 10, 6\)"),
        (lambda: updated(level=1), r"gradients of level 1 must have shapes .*, got \{\}"),
        (lambda: updated(ticks=3), r"every 2 ticks, now at 2, got position 3"),
        (lambda: updated(ticks=4), r"every 2 ticks, now at 2, got position 4"),
        (lambda: Level(0, 4), r"chunk of a level must be .*at least 1.*got 0"),
        (lambda: Level(-3, 4), r"chunk of a level must be .*at least 1.*got -3"),
        (lambda: Level(4, 0), r"hidden of a level must be at least 1, got 0"),
        (lambda: Level(4, 2.5), r"hidden of a level must be an integer, got 2.5"),
        (lambda: Level(2.5, 4), r"chunk of a level must be an integer.*got 2.5"),
        (lambda: Level(True, 4), r"chunk of a level must be an integer.*got True"),
        (lambda: CMS(D, []), r"levels must have chunks.*got \[\]"),
        (
            lambda: CMS(D, LEVELS, "parallel"),
            r"variant 'parallel'.*sequential, nested, independent",
        ),
        (lambda: CMS(D, [Level(4, 2), Level(2, 2)]), r"grow from fast to slow.*\[4, 2\]"),
        (lambda: CMS(D, [Level(4, 2), Level(4, 2)]), r"\[4, 4\]"),
        (lambda: CMS(D, [Level(4, 2), Level(6, 2)]), r"multiple.*\[4, 6\]"),
        (lambda: CMS(D, [Level(None, 2), Level(6, 2)]), r"only as the last.*\[None, 6\]"),
        (lambda: CMS(D, [Level(None, 2), Level(None, 2)]), r"\[None, None\]"),
        (lambda: CMS(D, LEVELS).due(0), r"tick must be at least 1, got 0"),
        (lambda: CMS(D, LEVELS).resets(-1), r"tick must be at least 1, got -1"),
        (lambda: CMS(D, LEVELS).start_state(0), r"batch must be an integer of .*1 row, got 0"),
        (lambda: CMS(D, LEVELS).start_state("2"), r"batch must be an integer of .*, got '2'"),
        (lambda: CMS(D, LEVELS).steps("abc"), r"step must be a number .*, got abc"),
        (lambda: CMS(D, LEVELS).steps(["a"] * 3), r"step must be a number .*, got \['a'"),
        (lambda: CMS(D, LEVELS).update(CMS(D, LEVELS).start_state(2), None), r"a list of 4"),
        (lambda: CMS(D, LEVELS)(torch.randn(2, 3, D + 1)), r"width 6 .*, got 7"),
        (
            lambda: CMS(D, LEVELS)(torch.randn(2, 3, D), CMS(D, LEVELS).start_state(1)),
            r"fast weights of level 0 must have shapes .*\(2, 10, 6\).*got .*\(1, 10, 6\)",
        ),
        (
            lambda: CMS(D, LEVELS)(torch.randn(2, 3, D), CMS(D, LEVELS[:2]).start_state(2)),
            r"4 levels, got 2",
        ),
    ],
)
def test_bad_input_is_named_with_its_value_and_the_legal_range(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()
