"""bench continual: what its numbers mean, and that its learners differ only in what they should."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import continual, learners
from bench.continual import main
from bench.learners import (
    EWC,
    STREAM,
    build,
    gains,
    level_optimizer,
    metrics,
    run,
    train_stage,
)
from bench.streams import Domain, banking77, clinc150, code_lines, domains, joined, texts
from hope import Hope, HopeConfig
from optimizers import split_parameters

ROOT = Path(__file__).resolve().parent.parent
DATA = os.environ.get("NESTED_DATA")
TINY = {"d_model": 16, "n_layers": 1, "n_heads": 1}
needs_data = pytest.mark.skipif(not DATA, reason="NESTED_DATA names no folder of data sets")

# Scores


def test_metrics_of_a_matrix_by_hand():
    matrix = [  # accuracy; row 0: before learning
        [0.1, 0.2, 0.0],
        [0.9, 0.3, 0.1],
        [0.6, 0.8, 0.2],
        [0.5, 0.7, 1.0],
    ]
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
    # the same as bits per byte: what does not depend on the level does not change
    bits = metrics((5 - np.array(matrix)).tolist(), higher_is_better=False)
    for key in ("forgetting", "first forgotten", "backward", "forward"):
        assert bits[key] == pytest.approx(expected[key])


# The step clock


def tokens(text):
    return np.frombuffer(text, np.uint8).astype(np.uint16)


def small_domains():
    texts = [b"abcabcabd" * 200, b"xyzzyx, " * 200, b"0110100110010110" * 100]
    return [Domain(str(i), tokens(text), tokens(text[:512])) for i, text in enumerate(texts)]


@pytest.mark.parametrize("learner", ["transformer none", "transformer ewc", "hope 3 levels"])
def test_a_learner_runs_through_all_stages(learner, monkeypatch):
    monkeypatch.setattr(learners, "SIZE", TINY)
    monkeypatch.setattr(learners, "FIRST_LR", 5e-3)
    first = {}
    result = run(learner, small_domains(), 0, 5e-3, 10.0, True, first)
    again = run(learner, small_domains(), 0, 5e-3, 10.0, True, first)  # from the kept stage 1
    assert again["matrix"] == result["matrix"] and again["updates"] == result["updates"]
    assert len(first) == 1
    matrix = np.array(result["matrix"])
    assert matrix.shape == (4, 3) and np.isfinite(matrix).all()
    assert matrix[0].min() > 5  # before learning
    assert matrix[1, 0] < matrix[0, 0]  # after the first stage
    assert (matrix[1] == matrix[3]).all() == (learner == "transformer none")
    assert result["updates"] > 0 and result["flops"] > 0


def test_a_stage_is_trained_by_ordinary_steps_in_which_slow_levels_wait(monkeypatch):
    """Against a loop of backward, clipped to norm 1, and step; updates are counted by hand."""
    monkeypatch.setattr(learners, "SIZE", TINY)
    stage = small_domains()[0]
    model = build("hope", 2, 0)
    cost = train_stage(model, level_optimizer(model, (1, 3)), stage, 1e-2, seed=7, quick=True)
    expected = build("hope", 2, 0)
    optimizer = level_optimizer(expected, (1, 3))
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / 10
        stage.loss(expected, 7, step)[0].backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)
    size = sum(p.numel() for p in model.parameters())
    fast = sum(p.numel() for name, p in model.named_parameters() if "mlps.0" in name)
    assert cost["updates"] == 4 * fast + size and cost["tokens"] == 5 * 4 * 128


def test_levels_of_the_step_clock_are_the_mlps_and_everything_else_is_slow():
    model = build("hope", 3, 0, classes=5)
    optimizer = level_optimizer(model, (1, 3, 9))
    assert set(optimizer.parameters) == {name for name, _ in model.named_parameters()}
    for name, level in optimizer.level.items():
        fast = {"head": 1, "mlps.0": 1, "mlps.1": 3}
        period = next((fast[part] for part in fast if part in name), 9)
        assert optimizer.levels[level] == period, name


def test_weight_decay_is_train_py_s_in_every_level():
    model = build("hope", 2, 0)
    _, _, plain = split_parameters(model)
    found = {}
    for group in level_optimizer(model, (1, 3)).param_groups:
        found |= {id(p): group["weight_decay"] for p in group["params"]}
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
    expected = 1.5 * (fisher * torch.tensor([0.01, 0.04])).sum().item()
    assert ewc.penalty().item() == pytest.approx(expected)


# The token clock


def test_a_level_that_learned_alone_holds_all_of_the_gain():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 1, "hidden": 24}
    model = Hope(HopeConfig(levels=[4, 8, 16], cms_updates="off", **sizes))
    tokens = torch.randint(97, 123, (1, 8)).repeat(1, 16)
    with torch.no_grad():
        only = model.learn(tokens, updates="first_order", step=[0.0, 0.3, 0.0])[1]
        found = gains(model, tokens, only)
        assert found["all"] == found["2"] > 0.05 and found["1"] == found["3"] == 0
        nothing = gains(model, tokens, model.learn(tokens, updates="first_order", step=0.0)[1])
        assert set(nothing.values()) == {0.0}


# Data


@needs_data
def test_texts_of_the_stream_are_all_different_and_none_is_trained_on(tmp_path):
    parts = texts(DATA, tmp_path / "texts", 2, 4096)
    rows = []
    for part in parts:
        for tokens in part.values():
            rows += list(tokens)
    assert len({row.numpy().tobytes() for row in rows}) == len(rows) == 12
    assert {len(row) for row in rows} == {4096}
    trained_on = b"|".join(path.read_bytes() for path in (tmp_path / "texts").iterdir())
    assert not any(bytes(row[:200].tolist()) in trained_on for row in rows)


@needs_data
def test_intents_are_split_into_stages_that_share_no_class():
    clinc_val, clinc = clinc150(DATA)
    banking_val, banking = banking77(DATA)
    sizes = [(clinc, 10, 150, 4500), (clinc_val, 10, 150, 3000)]
    sizes += [(banking, 7, 77, 3080), (banking_val, 7, 77, 1001)]
    for stages, count, classes, tests in sizes:
        assert len(stages) == count and sum(len(s.ty) for s in stages) == tests
        assert sorted(sum((s.classes for s in stages), [])) == list(range(classes))
        for stage in stages:
            assert set(stage.y.tolist()) == set(stage.ty.tolist()) == set(stage.classes)
    before = joined(banking, 150)  # shares no class with the stages of the other set
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


# The command


@pytest.fixture
def novels(tmp_path):
    """As many short books as `stream --quick` reads and trains on, all of them different."""
    (tmp_path / "novels").mkdir()
    words = [f"word{i}" for i in range(500)]
    for i in range(44):
        chosen = np.random.default_rng(i).choice(words, 6_000)
        (tmp_path / f"novels/{i}.txt").write_text(" ".join(chosen))
    return str(tmp_path)


@pytest.mark.slow
def test_a_stream_is_measured_once_and_then_only_drawn(novels, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learners, "SIZE", TINY | {"n_layers": 2})
    monkeypatch.chdir(tmp_path)
    command = ["stream", "--quick", "--seeds", "1", "--data", novels]
    assert main(command) == 0
    results = tmp_path / "runs/quick/continual_stream.jsonl"
    picture = results.with_suffix(".png")
    lines = results.read_text()
    first = capsys.readouterr().out.split("\n\n")[-2]
    assert first.count("alone |") == 6 and "nan" not in first and lines.count("\n") == len(STREAM)
    picture.unlink()
    monkeypatch.setattr(Hope, "learn", None)
    assert main(command) == 0
    assert results.read_text() == lines and picture.exists()
    assert first in capsys.readouterr().out


@pytest.mark.parametrize("command", ["domains", "classes", "classes --set banking77"])
def test_quick_needs_no_data_but_the_standard_library(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learners, "SIZE", TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NESTED_DATA", "nowhere")  # it is not even asked
    words = [*command.split(), "--quick", "--seeds=1", "--learners=hope 3 levels"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("hope 3 levels") == 4  # two rates to choose from, the seed, the table
    (results,) = tmp_path.glob("runs/quick/*.jsonl")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(lines) == 3 and all(np.isfinite(line["matrix"]).all() for line in lines)


def test_domains_and_lines_of_the_standard_library_share_nothing():
    to_choose, to_report = domains(None)
    for a, b in zip(to_choose, to_report, strict=True):
        assert a.name == b.name and len(a.train) > 100_000
        assert len(a.held_out) == len(b.held_out) == 9_216
        text = a.train.astype(np.uint8).tobytes()
        for held_out in (a.held_out, b.held_out):
            assert held_out.astype(np.uint8).tobytes() not in text
        assert not np.array_equal(a.held_out, b.held_out)
    assert [len(stage.held_out) for stage in domains(None, quick=True)[1]] == [1_024] * 4
    first, second = code_lines(0)[1], code_lines(1)[1]
    assert [len(stage.classes) for stage in (*first, *second)] == [4] * 6
    assert all(set(stage.y.tolist()) == set(stage.classes) for stage in first)


def test_a_stream_of_the_standard_library_reads_each_file_once(tmp_path):
    parts = texts(None, tmp_path / "texts", 2, 4096)
    rows = torch.cat([tokens for part in parts for tokens in part.values()])
    assert len(rows.unique(dim=0)) == len(rows) == 12
    read = [bytes(row.tolist()) for row in rows]
    for path in (tmp_path / "texts").iterdir():
        text = path.read_bytes()
        assert text and not any(row[:1000] in text or text[:1000] in row for row in read)


@pytest.mark.parametrize("name", ["domains", "classes_clinc150", "stream"])
def test_committed_results_are_finished_cells_of_the_commands_that_made_them(name, tmp_path):
    """Every line is found by the settings it holds, so the recorded command trains nothing."""
    command = name.partition("_")[0]
    record = continual.Record(ROOT / f"results/continual_{name}.jsonl")
    args = SimpleNamespace(command=command, quick=False, set="clinc150", data="")
    own = ("learner", "seed") if command == "stream" else ("learner", "seed", "lr", "ewc")
    lines = list(record.finished.values())
    assert len(lines) == {"domains": 38, "classes_clinc150": 38, "stream": 9}[name]
    for line in lines:
        settings = {key: line[key] for key in own}
        assert continual.cell(args, record, settings, measure=None) is line


def test_a_setting_that_diverges_is_not_chosen(monkeypatch, tmp_path):
    def fake_run(learner, stages, seed, lr, *_, **__):
        if lr == continual.LRS[-1]:
            raise continual.NonFinite("the loss is not finite")
        return {"matrix": [[8.0, 8.0], [5.0, 8.0], [6.0 - 100 * lr, 5.0]]}

    stages = [SimpleNamespace(name="a"), SimpleNamespace(name="b")]
    monkeypatch.setattr(continual, "domains", lambda data, quick: (stages, stages))
    monkeypatch.setattr(continual, "run", fake_run)
    monkeypatch.setattr(continual, "staged_table", lambda lines: [])
    learner = "transformer finetune"
    args = SimpleNamespace(command="domains", data="", quick=False, learners=[learner], seeds=1)
    record = continual.Record(tmp_path / "cells.jsonl")
    continual.staged(args, record)
    chosen = [line["lr"] for line in record.finished.values() if line["seed"] == 0]
    assert chosen == [continual.LRS[-2]] and len(record.finished) == len(continual.LRS)


def test_bad_input_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NESTED_DATA", raising=False)
    cases = {
        "domains": "no data: name its folder with --data or $NESTED_DATA",
        "domain": "did you mean 'domains'",
        "domains --data nowhere": "nowhere/novels does not exist",
        "domains --data x --seeds 0": "seeds must be 1 to 100, got 0",
        "domains --data x --seeds many": "invalid int value: 'many'",
        "domains --data x --learners hope": "unknown learner 'hope'",
        "classes --data x --set clinc": "did you mean 'clinc150'",
        "domains --data x --rate 3": "unrecognized arguments: --rate 3",
    }
    for words, message in cases.items():
        assert main(words.split()) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert not os.listdir(tmp_path)
