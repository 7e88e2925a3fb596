"""The Continuous Thought Machine is what its equations say, tick by tick; mazes have one route."""

import contextlib
import itertools
import json
from collections import deque
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.thinking import (
    CONTROLS,
    answers,
    build,
    curriculum,
    evaluate,
    last_ticks,
    main,
    reached,
    walked,
)
from ctm import CTM, PAIRINGS, CTMConfig, NeuronModels, Synapses, Synchronisation, loss_fn
from layers import count, map_state, tensors
from support import checkpoint
from tasks import IGNORE, MOVES, WAIT, image_folder, mazes, read_image
from train import update

SMALL = CTMConfig(
    d_input=6, positions=3, classes=4, d_model=20, width=8, n_heads=2, ticks=5, history=3, hidden=2,
    pairs_out=5, pairs_action=4,
)
KINDS = list(itertools.product(PAIRINGS, (1, 3)))


def thinking(config=SMALL, rows=4, seed=0):
    """A model with no parameter where it starts, and features."""
    torch.manual_seed(seed)
    model = CTM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    for part in (model.action, model.output):
        nn.init.uniform_(part.decay, 0.1, 1.0)
    return model, torch.randn(rows, 7, config.d_input)


def same(one, other, tolerance=1e-12):
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    assert pairs and all(a.shape == b.shape for a, b in pairs)
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in pairs)


# --------------------------------------------------------------------------------------------------
# Synchronisation


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_synchronisation_is_its_definition_over_the_whole_history(float64, pairing):
    sync = Synchronisation(12, 5, pairing, self_pairs=2)
    nn.init.uniform_(sync.decay, 0, 2)
    z = torch.randn(9, 3, 12)  # [t, B, D]
    sums = sync.start(3)
    for t in range(9):
        S, sums = sync(z[t], sums)
        for k, (i, j) in enumerate(zip(sync.left, sync.right, strict=True)):
            r = [torch.exp(-sync.decay[k] * (t - s)) for s in range(t + 1)]
            products = sum(r[s] * z[s, :, i] * z[s, :, j] for s in range(t + 1))
            assert torch.allclose(S[:, k], products / sum(r) ** 0.5, rtol=0, atol=1e-12)


def test_the_gradient_of_decays_is_that_of_finite_differences(float64):
    sync = Synchronisation(8, 4)
    z = torch.randn(6, 2, 8)

    def last(decay):
        sums = sync.start(2)
        for now in z:
            S, sums = torch.func.functional_call(sync, {"decay": decay}, (now, sums))
        return S

    assert torch.autograd.gradcheck(last, torch.rand(4, requires_grad=True))


def test_pairs_are_those_that_their_names_say():
    drawn = Synchronisation(1000, 6, "random-pairing", self_pairs=4)
    assert torch.equal(drawn.left[:4], drawn.right[:4])
    assert len(drawn.left) == 6 and not torch.equal(drawn.left, drawn.right)
    all_pairs = Synchronisation(1000, 6, "random")
    assert len(all_pairs.left) == 21 and len(set(all_pairs.left.tolist())) <= 6
    assert not set(all_pairs.left.tolist()) & set(all_pairs.right.tolist())
    first = Synchronisation(10, 3, "first-last")
    last = Synchronisation(10, 3, "first-last", last=True)
    pairs = list(itertools.combinations_with_replacement(range(3), 2))
    assert list(zip(first.left.tolist(), first.right.tolist(), strict=True)) == pairs
    pairs = list(itertools.combinations_with_replacement(range(7, 10), 2))
    assert list(zip(last.left.tolist(), last.right.tolist(), strict=True)) == pairs


def test_decays_keep_a_gradient_at_their_bounds_and_are_brought_back_from_outside(float64):
    model, x = thinking()
    decay = model.output.decay
    with torch.no_grad():
        decay.copy_(torch.tensor([0.0, -1.0, 20.0, 15.0, 0.5]))
    model.project()
    assert decay.tolist() == [0.0, 0.0, 15.0, 15.0, 0.5]
    model(x)[0].square().sum().backward()
    assert (decay.grad != 0).all()


def test_the_pairs_are_in_the_checkpoint(float64, tmp_path):
    model, x = thinking()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(tmp_path, model, optimizer, 7)
    other, _ = thinking(seed=1)
    assert not torch.equal(other.output.left, model.output.left)
    assert checkpoint.load(tmp_path, other) == 7
    assert same(other(x), model(x))


# --------------------------------------------------------------------------------------------------
# A tick


def test_a_neuron_depends_on_its_own_history_alone(float64):
    for hidden in (0, 3):
        neurons = NeuronModels(6, 4, hidden)
        A = torch.randn(2, 6, 4)
        slopes = torch.autograd.functional.jacobian(neurons, A)  # [B, D, B, D, M]
        for (b, i), (c, j) in itertools.product(itertools.product(range(2), range(6)), repeat=2):
            assert bool(slopes[b, i, c, j].any()) == ((b, i) == (c, j))


def test_neuron_models_are_one_small_mlp_for_each_neuron(float64):
    neurons = NeuronModels(5, 4, hidden=3)
    for p in neurons.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    A = torch.randn(2, 5, 4)
    z = neurons(A)
    for i in range(5):
        x = A[:, i]  # [B, M]
        for layer in range(2):
            x = x @ neurons.weights[layer][i] + neurons.biases[layer][i]
            left, right = (x / neurons.temperatures[layer]).chunk(2, -1)
            x = left * torch.sigmoid(right)
        assert torch.allclose(z[:, i], x[:, 0], rtol=0, atol=1e-12)


def test_the_unet_has_equally_spaced_widths_and_adds_what_it_passed(float64):
    net = Synapses(10, 40, depth=4)
    x = torch.randn(3, 10)
    assert [down[1].out_features for down in net.down] == [32, 24, 16]
    h = net.entry(x)
    downs = [h]
    for down in net.down:
        downs.append(down(downs[-1]))
    y = downs[3]
    for i in (2, 1, 0):
        y = F.layer_norm(net.up[i](y) + downs[i], downs[i].shape[1:])
    assert torch.allclose(net(x), y, rtol=0, atol=1e-12) and y.shape == (3, 40)


@pytest.mark.parametrize("pairing, depth", KINDS)
def test_a_thought_is_its_definition_written_out(float64, pairing, depth):
    """Attention by torch's own layer, S by its sum over all ticks, nothing carried along."""
    model, x = thinking(replace(SMALL, pairing=pairing, depth=depth))
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    parts = (model.in_q, model.in_k, model.in_v)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        for part in (*parts, model.out):
            nn.init.normal_(part.bias)
        attention.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    attention.out_proj.load_state_dict(model.out.state_dict())

    def S(sync, z):
        t = len(z) - 1
        r = [torch.exp(-sync.decay * (t - s)) for s in range(t + 1)]
        products = [z[s][:, sync.left] * z[s][:, sync.right] for s in range(t + 1)]
        return sum(a * b for a, b in zip(r, products, strict=True)) / sum(r) ** 0.5

    kv = model.embed(x)
    z = [model.z0.expand(4, -1)]
    A = list(model.A0.expand(4, -1, -1).unbind(2))
    logits, certainty, state = model(x)
    for t in range(5):
        q = model.query(S(model.action, z))[:, None]
        o, weights = attention(q, kv, kv)
        A.append(model.synapses(torch.cat([o[:, 0], z[-1]], 1)))
        z.append(model.neurons(torch.stack(A[-3:], 2)))
        y = model.head(S(model.output, z)).view(4, 3, 4)
        assert torch.allclose(logits[:, t], y, rtol=0, atol=1e-12)
        p = y.softmax(-1)
        entropy = -(p * p.log()).sum(-1).mean(-1)
        assert torch.allclose(certainty[:, t], 1 - entropy / np.log(4), rtol=0, atol=1e-12)
    assert torch.allclose(state["attention"].mean(1), weights[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("pairing, depth", KINDS)
def test_ticks_in_one_call_are_as_many_calls_and_rows_are_independent(float64, pairing, depth):
    model, x = thinking(replace(SMALL, pairing=pairing, depth=depth))
    logits, certainty, state = model(x)
    after = None
    for t in range(5):
        y, c, after = model(x, after, ticks=1)
        assert same([y[:, 0], c[:, 0]], [logits[:, t], certainty[:, t]])
    assert same(after, state) and after["ticks"].tolist() == [5] * 4
    alone = model(x[2:3])
    assert same(alone[:2], [logits[2:3], certainty[2:3]])


@pytest.mark.parametrize("reader, data", [("pixels", (3, 9, 9)), ("bits", (7,))])
def test_readers_keep_rows_apart(float64, reader, data):
    torch.manual_seed(0)
    model = CTM(replace(SMALL, reader=reader, scale=4))
    x = torch.randn(3, *data) if reader == "pixels" else torch.randint(2, (3, *data))
    logits, _, state = model(x)
    assert state["attention"].shape[2] == (9 if reader == "pixels" else 7)
    assert same(model(x[1:2])[0], logits[1:2])


def test_a_state_is_saved_and_continued(float64, tmp_path):
    model, x = thinking()
    state = model(x, ticks=3)[2]
    checkpoint.save_state(state, tmp_path / "state.pt")
    loaded = checkpoint.load_state(tmp_path / "state.pt")
    assert same(model(x, loaded, ticks=2), model(x, state, ticks=2))


# --------------------------------------------------------------------------------------------------
# Adaptive compute


def test_a_row_that_is_certain_costs_nothing_more_and_has_what_it_had_then(float64):
    model, x = thinking(rows=10, seed=5)
    logits, certainty, _ = model(x, ticks=8)

    def ends(stop):
        return [next((t for t in range(8) if row[t] >= stop), 7) for row in certainty]

    # the certainty at which rows stop at the most different ticks
    stop = max(certainty.flatten().tolist(), key=lambda stop: len(set(ends(stop))))
    first = ends(stop)
    assert last_ticks(certainty.clone(), stop).tolist() == first
    assert len(set(first)) > 2
    worked = []
    hook = model.synapses.register_forward_hook(lambda part, x, y: worked.append(len(y)))
    early, sure, state = model(x, ticks=8, stop=stop)
    hook.remove()
    assert worked == [sum(t <= last for last in first) for t in range(max(first) + 1)]
    assert state["ticks"].tolist() == [last + 1 for last in first]
    assert early.shape[1] == sure.shape[1] == max(first) + 1
    for row, last in enumerate(first):
        assert same(early[row, :last], logits[row, :last])
        assert same(early[row, last:], logits[row, last].expand_as(early[row, last:]))
        assert same(sure[row, last:], certainty[row, last].expand_as(sure[row, last:]))
        alone = model(x[row : row + 1], ticks=last + 1)[2]
        assert same(map_state(lambda t, row=row: t[row : row + 1], state), alone)


def test_certainty_is_0_for_no_preference_and_1_for_a_single_answer(float64):
    model, x = thinking()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    assert model(x)[1].abs().max() < 1e-12
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([100.0, 0, 0, 0]).repeat(3))
    assert (model(x)[1] - 1).abs().max() < 1e-12


# --------------------------------------------------------------------------------------------------
# Loss


def test_the_loss_of_one_tick_is_cross_entropy(float64):
    logits = torch.randn(5, 1, 3, 4)
    targets = torch.randint(4, (5, 3))
    wanted = F.cross_entropy(logits[:, 0].mT, targets)
    assert torch.allclose(loss_fn(logits, torch.rand(5, 1), targets), wanted, rtol=0, atol=1e-12)


def test_the_loss_is_of_the_best_and_of_the_most_certain_tick_of_each_row(float64):
    logits = torch.randn(5, 6, 3, 4, requires_grad=True)
    certainty = torch.rand(5, 6, requires_grad=True)
    targets = torch.randint(4, (5, 3))
    targets[0, 1] = IGNORE
    total = 0
    chosen = set()
    for b in range(5):
        counted = targets[b] != IGNORE
        L = [F.cross_entropy(logits[b, t][counted], targets[b][counted]) for t in range(6)]
        best = min(range(6), key=lambda t: L[t])
        surest = max(range(6), key=lambda t: certainty[b, t])
        total = total + (L[best] + L[surest]) / 10
        chosen |= {(b, best), (b, surest)}
    loss = loss_fn(logits, certainty, targets)
    assert torch.allclose(loss, total, rtol=0, atol=1e-12)
    loss.backward()
    touched = {tuple(place) for place in logits.grad.abs().sum((2, 3)).nonzero().tolist()}
    assert touched == chosen and certainty.grad is None


def test_the_curriculum_asks_five_moves_beyond_the_longest_right_beginning():
    targets = torch.zeros(2, 10, dtype=torch.int64)
    logits = torch.zeros(2, 3, 10, 5)
    logits[..., 1] = 1.0  # wrong everywhere
    logits[0, 1, :2, 0] = 2.0  # row 0: two moves right at tick 1
    logits[0, 2, 5:, 0] = 2.0  # a later stretch does not count
    asked = curriculum(logits, targets) != IGNORE
    assert asked.sum(1).tolist() == [7, 5] and asked[0, :7].all() and asked[1, :5].all()


# --------------------------------------------------------------------------------------------------
# What it says about itself, and what it refuses


def test_levels_are_ticks_data_and_training_steps():
    model = CTM(SMALL)
    rows = model.levels()
    assert [row["level"] for row in rows] == [1, 1, 2, 3]
    assert sum(row["parameters"] for row in rows) == count(model)
    assert set(rows[0]) == {"component", "level", "updates", "context", "parameters"}


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"pairing": "all"}, "must be one of random-pairing"),
        ({"reader": "bit"}, "did you mean 'bits'"),
        ({"ticks": 0}, "ticks must be at least 1, got 0"),
        ({"classes": 1}, "classes must be at least 2, got 1"),
        ({"n_heads": 3}, "must be a multiple of n_heads, got 8 and 3"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1, got 1.0"),
        ({"self_pairs": 5}, "self_pairs must be from 0 to 4, the pairs, got 5"),
        ({"pairing": "first-last", "d_model": 8}, "d_model must be at least 9, got 8"),
        ({"depth": 2, "d_model": 15}, "d_model must be at least 16, got 15"),
        ({"scale": 3}, "scale must be a power of 2, got 3"),
        ({"d_model": 2.5}, "d_model must be a whole number, got 2.5"),
        ({"pairing": None}, "pairing must be a name, got None"),
    ],
)
def test_a_config_that_is_not_legal_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        replace(SMALL, **wrong)


@pytest.mark.parametrize(
    "call, said",
    [
        ({"ticks": 0}, "ticks must be at least 1, got 0"),
        ({"stop": 0}, "stop must be a certainty above 0 and up to 1, got 0"),
        ({"features": torch.zeros(2, 7, 5)}, r"must be \[B, N, 6\], got shape \(2, 7, 5\)"),
        ({"features": torch.zeros(2, 7, 6)}, "state must have 2 rows, as the data, got 4"),
    ],
)
def test_a_call_that_is_not_legal_is_refused(call, said):
    model, x = thinking()
    state = model(x, ticks=1)[2]
    with pytest.raises(ValueError, match=said):
        model(**{"features": x, "state": state} | call)


def test_a_tick_compiles_without_a_graph_break(float64):
    model, x = thinking(replace(SMALL, depth=2))
    wanted = model(x)
    model.tick = torch.compile(model.tick, fullgraph=True, backend="eager")
    assert same(model(x), wanted)


# --------------------------------------------------------------------------------------------------
# Rivals


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_rivals_have_as_many_parameters_and_carry_their_state(control, pairing):
    config = CTMConfig(pairing=pairing, positions=8, d_input=64, pairs_out=16, pairs_action=16)
    torch.manual_seed(0)
    model = build(config, control)
    assert abs(count(model) / count(CTM(config)) - 1) < 0.02
    x = torch.randn(2, 8, 64)
    logits, certainty, state = model(x, ticks=3)
    after = model(x, model(x, ticks=2)[2], ticks=1)
    assert same(after, [logits[:, 2:], certainty[:, 2:], state], 1e-5)


def test_the_rival_that_reads_z_reads_every_neuron_in_the_place_of_synchronisation(float64):
    model = build(replace(SMALL, pairing="random", pairs_out=7), "read-z")
    logits, _, state = model(torch.randn(2, 7, 6), ticks=2)
    z = state["z"][:, [k % 20 for k in range(28)]]
    assert same(logits[:, 1], model.head(z).view(2, 3, 4))


# --------------------------------------------------------------------------------------------------
# Tasks


def solve(image):
    """The shortest route through a maze, by breadth-first search over pixels -> (moves, open)."""
    open_ = image.max(0) > 0
    start = tuple(np.argwhere((image[0] > 0) & (image[1] < 0))[0])
    goal = tuple(np.argwhere((image[0] < 0) & (image[1] > 0))[0])
    routes = {start: []}
    todo = deque([start])
    while todo:
        here = todo.popleft()
        for move, way in enumerate(MOVES[:WAIT]):
            there = here[0] + way[0], here[1] + way[1]
            if open_[there] and there not in routes:
                routes[there] = [*routes[here], move]
                todo.append(there)
    assert len(routes) == open_.sum(), "every open pixel is reached"
    return routes[goal], open_


@pytest.mark.parametrize("size", [5, 9, 11])
def test_mazes_are_perfect_and_routes_are_those_of_another_solver(size):
    moves = 2 * ((size // 2) ** 2 - 1)
    images, routes = mazes(20, size, moves, np.random.default_rng(0))
    for image, route in zip(images, routes, strict=True):
        found, open_ = solve(image)
        assert route.tolist() == found + [WAIT] * (moves - len(found))
        # a tree over all cells: connected, with a way less than cells, so there is one route
        cells = (size // 2) ** 2
        assert open_[1::2, 1::2].all() and open_.sum() == 2 * cells - 1
        assert not open_[::2, ::2].any() and set(np.unique(image)) == {-1, 1}
    assert len(np.unique(images.reshape(20, -1), axis=0)) > 10
    again = mazes(20, size, moves, np.random.default_rng(0))
    assert all(np.array_equal(a, b) for a, b in zip(again, (images, routes), strict=True))


def test_a_route_that_is_too_long_is_cut_and_even_sizes_are_refused():
    long = mazes(20, 9, 30, np.random.default_rng(0))[1]
    assert np.array_equal(mazes(20, 9, 4, np.random.default_rng(0))[1], long[:, :4])
    for size in (3, 8):
        with pytest.raises(ValueError, match=f"odd and at least 5 pixels, got {size}"):
            mazes(1, size, 4, np.random.default_rng(0))


def test_mazes_are_walked_to_the_first_wall_and_asked_again():
    images, routes = mazes(6, 11, 48, np.random.default_rng(0))
    images = torch.from_numpy(images)

    class Guide:
        """Knows the first four moves from wherever it is put."""

        def eval(self):
            pass

        def parameters(self):
            return iter([images])

        def __call__(self, asked):
            found = [(solve(image.numpy())[0] + [WAIT] * 4)[:4] for image in asked]
            return F.one_hot(torch.tensor(found), 5).float()[:, None], torch.ones(len(asked), 1), 0

    lengths = torch.from_numpy((routes != WAIT).sum(1))
    for times in (1, 3, 12):
        wanted = (lengths <= 4 * times).float().mean().item()
        assert reached(Guide(), [(images, None)], times) == pytest.approx(wanted)
    wall = next(m for m in range(4) if walked_into(images[0], m))
    assert torch.equal(walked(images[0], [wall, *routes[0]]), images[0])
    assert walked(images[0], routes[0].tolist()) is None


def walked_into(image, move):
    """Whether a move from the start goes into a wall."""
    row, column = ((image[0] > 0) & (image[1] < 0)).nonzero()[0].tolist()
    return image[:, row + MOVES[move][0], column + MOVES[move][1]].max() < 0


def test_images_are_read_from_a_folder_for_each_class(tmp_path):
    from PIL import Image

    for name, color in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (30, 20 + i), color).save(tmp_path / name / f"{i}.png")
    classes, train, held_out = image_folder(tmp_path)
    assert classes == ["a", "b"] and (len(train), len(held_out)) == (18, 2)
    for path, label in train + held_out:
        for rng in (None, np.random.default_rng(0)):
            pixels = read_image(path, 16, rng)
            assert pixels.shape == (3, 16, 16) and pixels.dtype == np.float32
            assert classes[label] == path.parent.name and (pixels[2 * label] == 1).all()
    for part in ("train", "val"):
        (tmp_path / "c" / part / "x").mkdir(parents=True)
        (tmp_path / "c" / part / "y").mkdir()
        for name in "xy":
            Image.new("RGB", (8, 8)).save(tmp_path / "c" / part / name / f"{part}.JPEG")
    classes, train, held_out = image_folder(tmp_path / "c")
    assert {p.name for p, _ in train} == {"train.JPEG"} and len(held_out) == 2
    with pytest.raises(ValueError, match="must have two folders of images or more"):
        image_folder(tmp_path / "a")


def test_accuracies_and_calibration_are_those_of_a_model_that_is_known():
    class Known:
        """Certain and right from tick 1 on in even rows, wrong with p = 0.6 in odd ones."""

        def eval(self):
            pass

        def parameters(self):
            return iter([torch.zeros(1)])

        def __call__(self, targets):
            odd = torch.arange(len(targets)) % 2 == 1
            p = torch.where(odd, 0.4, 1.0)[:, None]
            right = F.one_hot(targets, 2) * p[..., None]
            logits = (right + F.one_hot(1 - targets, 2) * (1 - p[..., None])).log()
            certainty = torch.where(odd, 0.1, 1.0)[:, None].expand(-1, 3)
            return logits[:, None].expand(-1, 3, -1, -1), certainty, {}

    targets = torch.randint(2, (8, 5))
    result = evaluate(Known(), [(targets, targets), (targets, targets)])
    assert result["rows"] == 16 and result["right"] == result["whole"] == 0.5
    assert result["by_tick"] == [0.5] * 3 and result["by_position"] == [0.5] * 5
    assert result["ece"] == pytest.approx(0.3)
    assert [stop["ticks"] for stop in result["stop"]] == [2, 2, 2]
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 1, 0, 2] = 1
    assert answers(logits, torch.tensor([[0.1, 0.2]])).tolist() == [[2]]


# --------------------------------------------------------------------------------------------------
# The command

TINY = "--batch-size 4 --ticks 2 --history 2 --set d_model=16 --set width=8 --set d_input=8"
FEW = [*TINY.split(), "--set", "pairs_out=4", "--set", "pairs_action=4"]


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """No pictures, small tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bench.thinking.draw", lambda *args: None)
    return tmp_path


def weights(folder, steps):
    saved = json.loads((folder / "config.json").read_text())
    model = build(CTMConfig(**saved["model"]))
    assert checkpoint.load(folder, model) == steps
    return list(model.state_dict().values())


def test_a_run_that_is_resumed_is_the_run_that_was_not_stopped(quick, capsys, monkeypatch):
    flags = [*FEW, "--length", "5", "--lr", "1e-2", "--steps", "4"]
    assert main([*flags, "--out", "whole"]) == 0
    received = []
    losses = []

    def stop_after_two(*args):
        losses.append(update(*args))
        if len(losses) == 2:
            received.append("Ctrl-C")
        return losses[-1]

    monkeypatch.setattr("bench.thinking.interrupts", lambda: contextlib.nullcontext(received))
    monkeypatch.setattr("bench.thinking.update", stop_after_two)
    assert main([*flags, "--out", "cut"]) == 130
    assert "python ctm.py --resume cut goes on" in capsys.readouterr().out
    received.clear()
    assert main(["--resume", "cut"]) == 0
    said = capsys.readouterr().out
    assert "at the most certain tick" in said and "stopped at certainty 0.99" in said
    assert len(losses) == 4 and same(weights(quick / "whole", 4), weights(quick / "cut", 4), 0)


def test_the_picture_and_the_result_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*FEW, "maze", "--length", "5", "--steps", "1"]) == 0
    folder = tmp_path / "runs/ctm-maze"
    assert (folder / "ctm.png").stat().st_size > 10_000
    result = json.loads((folder / "result.json").read_text())
    assert sum(row[1] for row in result["by_moves"]) == result["rows"] == 1024
    assert len(result["by_tick"]) == 2 and len(result["by_position"]) == 6
    assert main(["--resume", str(folder), "--test-length", "7"]) == 0
    assert json.loads((folder / "result-7.json").read_text())["reached"] < 1


def test_digits_and_folders_of_images_are_learned_from(quick):
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    from PIL import Image

    assert main([*FEW, "digits", "--steps", "1", "--control", "lstm"]) == 0
    assert json.loads((quick / "runs/ctm-digits/result.json").read_text())["rows"] == 360
    for name in "ab":
        (quick / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (20, 20), (90 * i, 0, 0)).save(quick / "images" / name / f"{i}.png")
    flags = [*FEW, "digits", "--images", "images", "--length", "16", "--steps", "1"]
    assert main([*flags, "--out", "folder"]) == 0


@pytest.mark.parametrize(
    "flags, said",
    [
        ("sudoku", "unknown task 'sudoku'"),
        ("--control gru", "unknown control 'gru'"),
        ("--ticks 0", "must be a whole number of at least 1"),
        ("--lr 0", "lr must be above 0, got 0.0"),
        ("--set tick=3", "did you mean 'ticks'"),
        ("--set positions=3", "that no task decides 'positions'"),
        ("--set d_model=wide", "d_model must be a whole number, got 'wide'"),
        ("maze --length 8", "odd and at least 5 pixels, got 8"),
        ("--images x", "images is for the task digits, got parity"),
        ("digits --images nowhere", "images 'nowhere'"),
        ("digits --length 9", "length of digits must be 8, as they are, got 9"),
        ("--resume nowhere", "nowhere is no run of ctm.py"),
        ("--device gpu", "device must be auto"),
    ],
)
def test_a_wrong_flag_is_one_line_and_leaves_no_folder(quick, capsys, flags, said):
    assert main(flags.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (quick / "runs").exists()


def test_a_resumed_run_is_the_one_that_was_begun(quick, capsys):
    assert main([*FEW, "--length", "3", "--steps", "2", "--out", "run"]) == 0
    for flags, said in {
        "--ticks 3": "was trained with ticks 2, not 3",
        "--set d_model=32": "was trained with set",
        "--seed 1": "was trained with seed 0, not 1",
        "--steps 1": "steps must be at least 2, which are done, got 1",
        "--test-length 9": "test_length is for the task maze, got parity",
    }.items():
        assert main(["--resume", "run", *flags.split()]) == 2
        assert said in capsys.readouterr().err
    assert main(["--out", "run"]) == 2
    assert "exists: name a new folder, or continue it with --resume run" in capsys.readouterr().err
    saved = json.loads((quick / "run/config.json").read_text())
    assert CTMConfig(**saved["model"]) == replace(CTMConfig(**saved["model"]))
    assert asdict(CTMConfig(**saved["model"])) == saved["model"]
