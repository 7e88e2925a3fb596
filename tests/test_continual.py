"""continual.py: what its numbers mean, and that its learners differ only in what they should."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
from bench import continual
from bench.continual import (
    EWC,
    Domain,
    banking77,
    build,
    clinc150,
    domains,
    gains,
    joined,
    level_optimizer,
    main,
    metrics,
    run,
    steps,
    texts,
)
from hope import Hope, HopeConfig
from optimizers import split_parameters

DATA = os.environ.get("NESTED_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="NESTED_DATA names no folder of data sets")


def test_metrics_of_a_matrix_by_hand():
    matrix = [[0.1, 0.2, 0.0], [0.9, 0.3, 0.1], [0.6, 0.8, 0.2], [0.5, 0.7, 1.0]]  # accuracy; row 0: before learning
    found = metrics(matrix, higher_is_better=True)
    expected = {
        "average": (0.5 + 0.7 + 1.0) / 3,
        "last": 1.0,
        "forgetting": ((0.9 - 0.5) + (0.8 - 0.7)) / 2,
        "first forgotten": 0.4,
        "backward": ((0.5 - 0.9) + (0.7 - 0.8)) / 2,
        "forward": ((0.3 - 0.2) + (0.2 - 0.0)) / 2,
    }
    assert found == pytest.approx(expected)
    bits = metrics((5 - np.array(matrix)).tolist(), higher_is_better=False)  # the same as bits per byte: only levels differ
    assert {key: bits[key] for key in ("forgetting", "first forgotten", "backward", "forward")} == pytest.approx(
        {key: expected[key] for key in ("forgetting", "first forgotten", "backward", "forward")}
    )


def small_domains():
    texts = [b"abcabcabd" * 200, b"xyzzyx, " * 200, b"0110100110010110" * 100]
    return [Domain(str(i), np.frombuffer(t, np.uint8).astype(np.uint16), np.frombuffer(t[:512], np.uint8).astype(np.uint16))
            for i, t in enumerate(texts)]  # fmt: skip


@pytest.mark.parametrize("learner", ["transformer none", "transformer ewc", "hope 3 levels"])
def test_a_learner_runs_through_all_stages(learner, monkeypatch):
    monkeypatch.setattr(continual, "SIZE", dict(d_model=16, n_layers=1, n_heads=1))
    monkeypatch.setattr(continual, "FIRST_LR", 5e-3)
    first = {}
    result = run(learner, small_domains(), 0, 5e-3, 10.0, True, first)
    again = run(learner, small_domains(), 0, 5e-3, 10.0, True, first)  # from the first stage that is kept
    assert again["matrix"] == result["matrix"] and again["updates"] == result["updates"] and len(first) == 1
    matrix = np.array(result["matrix"])
    assert matrix.shape == (4, 3) and np.isfinite(matrix).all()
    assert matrix[0].min() > 5 and matrix[1, 0] < matrix[0, 0]  # before learning, and after the first stage
    assert (matrix[1] == matrix[3]).all() == (learner == "transformer none")
    assert result["updates"] > 0 and result["flops"] > 0


def test_levels_of_the_step_clock_are_the_mlps_and_everything_else_is_slow():
    model = build("hope", 3, 0, classes=5)
    optimizer = level_optimizer(model, (1, 3, 9))
    assert list(optimizer.parameters) and set(optimizer.parameters) == {name for name, _ in model.named_parameters()}
    for name, level in optimizer.level.items():
        fast = {"head": 1, "mlps.0": 1, "mlps.1": 3}
        assert optimizer.levels[level] == next((fast[part] for part in fast if part in name), 9), name


def test_weight_decay_is_train_py_s_in_every_level():
    model = build("hope", 2, 0)
    _, _, plain = split_parameters(model)
    found = {id(p): group["weight_decay"] for group in level_optimizer(model, (1, 3)).param_groups for p in group["params"]}
    assert found == {id(p): 0.1 for p in model.parameters()} | {id(p): 0.0 for p in plain}
    assert any("start" in name for name, p in model.named_parameters() if found[id(p)] == 0)


def test_ewc_is_the_quadratic_of_the_fisher_around_every_finished_stage():
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ewc = EWC(SimpleNamespace(parameters=lambda: iter([w])), strength=3.0)
    assert ewc.penalty() == 0
    x = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    ewc.finish(w @ row for row in x)  # the gradient of each example is its row
    with torch.no_grad():
        w += torch.tensor([0.1, -0.2])
    fisher = x.square().mean(0)
    assert ewc.penalty().item() == pytest.approx(1.5 * (fisher * torch.tensor([0.01, 0.04])).sum().item())


def test_slower_levels_step_less_far():
    assert steps(1e-3, [128, 512, 2048]) == pytest.approx([1e-3, 5e-4, 2.5e-4])


def test_a_level_that_learned_alone_holds_all_of_the_gain():
    torch.manual_seed(0)
    model = Hope(HopeConfig(d_model=16, n_layers=2, n_heads=1, hidden=24, levels=[4, 8, 16]))
    tokens = torch.randint(97, 123, (1, 8)).repeat(1, 16)
    with torch.no_grad():
        found = gains(model, tokens, model.learn(tokens, step=[0.0, 0.05, 0.0])[1])
        assert found["all"] == found["2"] > 0.05 and found["1"] == found["3"] == 0
        assert set(gains(model, tokens, model.learn(tokens, step=0.0)[1]).values()) == {0.0}


@needs_data
def test_texts_of_the_stream_are_all_different_and_none_is_trained_on(tmp_path):
    parts = texts(DATA, tmp_path / "texts", 2, 4096)
    rows = [row for part in parts for tokens in part.values() for row in tokens]
    assert len({row.numpy().tobytes() for row in rows}) == len(rows) == 12 and {len(row) for row in rows} == {4096}
    trained_on = b"|".join(path.read_bytes() for path in (tmp_path / "texts").iterdir())
    assert not any(bytes(row[:200].tolist()) in trained_on for row in rows)


@needs_data
def test_a_stream_is_measured_once_and_then_only_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(continual, "SIZE", dict(d_model=16, n_layers=1, n_heads=1))
    monkeypatch.chdir(tmp_path)
    assert main(["stream", "--quick", "--seeds", "1"]) == 0
    records = (tmp_path / "runs/quick/continual_stream.jsonl").read_text()
    first = capsys.readouterr().out.split("\n\n")[-2]
    assert first.count("alone |") == 4 and records.count("\n") == 2 * len(continual.STREAM)
    (tmp_path / "runs/quick/continual_stream.png").unlink()
    monkeypatch.setattr(Hope, "learn", None)
    assert main(["stream", "--quick", "--seeds", "1"]) == 0
    assert (tmp_path / "runs/quick/continual_stream.jsonl").read_text() == records
    assert first in capsys.readouterr().out and (tmp_path / "runs/quick/continual_stream.png").exists()


@needs_data
def test_intents_are_split_into_stages_that_share_no_class():
    (clinc_val, clinc), (banking_val, banking) = clinc150(DATA), banking77(DATA)
    sizes = [(clinc, 10, 150, 4500), (clinc_val, 10, 150, 3000), (banking, 7, 77, 3080), (banking_val, 7, 77, 1001)]
    for stages, count, classes, tests in sizes:
        assert len(stages) == count and sorted(c for s in stages for c in s.classes) == list(range(classes))
        assert sum(len(s.ty) for s in stages) == tests
        assert all(set(s.y.tolist()) == set(s.ty.tolist()) == set(s.classes) for s in stages)
    before = joined(banking, 150)  # what comes before the stages of the other set shares no class with them
    assert len(before.y) == sum(len(s.y) for s in banking)
    assert set(before.y.tolist()) == set(before.classes) == set(range(150, 227))


@needs_data
def test_domains_hold_out_text_that_is_not_trained_on_nor_chosen_on():
    to_choose, stages = domains(DATA)
    assert [stage.name for stage in stages] == ["code", "Shakespeare", "novels", "WikiText"]
    for stage, other in zip(stages, to_choose, strict=True):
        assert len(stage.held_out) == len(other.held_out) == 9216 and len(stage.train) > 100_000
        assert np.array_equal(stage.train, other.train)
        for held_out in (stage.held_out, other.held_out):
            assert held_out[:200].tobytes() not in stage.train.tobytes(), stage.name
        assert other.held_out[:200].tobytes() not in stage.held_out.tobytes()


@pytest.mark.parametrize(
    "words, message",
    [
        ("domain", "did you mean 'domains'"),
        ("domains --data nowhere", "nowhere/novels does not exist"),
        ("domains --data x --seeds 0", "seeds is 0"),
        ("domains --data x --learners hope", "unknown learner 'hope'"),
        ("classes --data x --set clinc", "did you mean 'clinc150'"),
    ],
)
def test_bad_input_is_named_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in (main, lambda argv: evaluation.main(["continual", *argv])):
        assert command(words.split()) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1
    assert not os.listdir(tmp_path)
