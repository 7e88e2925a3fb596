"""continual.py: what its numbers mean, and that its learners differ only in what they should."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import continual
import eval as evaluation
from continual import EWC, Domain, banking77, build, clinc150, domains, main, metrics, optimizer_for, run

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
    result = run(learner, small_domains(), 0, 5e-3, 10.0, quick=True)
    matrix = np.array(result["matrix"])
    assert matrix.shape == (4, 3) and np.isfinite(matrix).all()
    assert matrix[0].min() > 5 and matrix[1, 0] < matrix[0, 0]  # before learning, and after the first stage
    assert (matrix[1] == matrix[3]).all() == (learner == "transformer none")
    assert result["updates"] > 0 and result["flops"] > 0


def test_levels_of_the_step_clock_are_the_mlps_and_everything_else_is_slow():
    model = build("hope", 3, 0)
    optimizer = optimizer_for(model, 3, 1e-3)
    assert list(optimizer.parameters) and set(optimizer.parameters) == {name for name, _ in model.named_parameters()}
    for name, level in optimizer.level.items():
        period = optimizer.levels[level]
        assert period == next((continual.PERIODS[i] for i in range(3) if f"mlps.{i}." in name), continual.PERIODS[2]), name


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


@needs_data
def test_intents_are_split_into_stages_that_share_no_class():
    for stages, count, classes, tests in ((clinc150(DATA), 10, 150, 4500), (banking77(DATA), 7, 77, 3080)):
        assert len(stages) == count and sorted(c for s in stages for c in s.classes) == list(range(classes))
        assert sum(len(s.ty) for s in stages) == tests
        assert all(set(s.y.tolist()) == set(s.ty.tolist()) == set(s.classes) for s in stages)


@needs_data
def test_domains_hold_out_text_that_is_not_trained_on():
    stages = domains(DATA)
    assert [stage.name for stage in stages] == ["code", "Shakespeare", "novels", "WikiText"]
    for stage in stages:
        assert len(stage.val) == 8192 and len(stage.train) > 100_000
        assert stage.val[:200].tobytes() not in stage.train.tobytes(), stage.name


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
