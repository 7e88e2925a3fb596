"""The suites: the protocol they state, cells trained once, tables beside the paper's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.cells import ROOT
from bench.small_tasks import Autoencoder, Cell, build, data_sets, protocol, score, train_cell
from bench.suites import BINS, COLUMNS, current_key, draw, summary
from tasks import IGNORE, LANGUAGES, MAD

TINY = {"d_model": 16, "n_layers": 1, "n_heads": 1, "chunk": 8}
EASY = {"settings": {"vocab": 8, "length": 8}, "examples": 256, "tests": 20}
EASY |= {"sizes": TINY, "batch": 16, "lr": 1e-2}


# --------------------------------------------------------------------------------------------------
# Scores and data


class Says(torch.nn.Module):
    """Writes what it is told to, whatever it reads."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = torch.as_tensor(tokens)

    def forward(self, inputs):
        return torch.nn.functional.one_hot(self.tokens[: len(inputs)]).float(), None


def test_accuracies_by_hand():
    targets = torch.tensor([[0, 1, IGNORE], [1, 1, 1], [IGNORE, 1, 2]])
    part = [torch.zeros_like(targets), targets]
    answers = Says([[0, 1, 2], [1, 1, 0], [0, 2, 2]])
    assert score(answers, part, "rows") == pytest.approx(1 / 3)
    assert score(answers, part, "tokens") == pytest.approx(5 / 7)
    assert score(answers, part, "classes") == pytest.approx((1 + 3 / 5 + 1) / 3)
    assert score(Says(targets.clamp(0)), part, "rows", batch=3) == 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_training_validation_and_test_words_are_apart_where_there_are_enough(language):
    cell = Cell("formal", language, "hope", examples=300, tests=40)
    train, valid, test = data_sets(cell)
    for near in (train, valid[0], test[0]):
        lengths = (near[1] != IGNORE).sum(1)
        assert lengths.min() >= 2 and lengths.max() <= 50
    for far in (valid[1], test[1]):
        lengths = (far[1] != IGNORE).sum(1)
        assert lengths.min() >= 51 and lengths.max() <= 100
    words = []
    for inputs, targets in (train, valid[0], test[0]):
        words.append({row.tobytes() for row in np.where(targets != IGNORE, inputs, -1)})
    if language in ("parity", "shuffle-2"):
        assert list(map(len, words)) == [300, 40, 40] and len(set.union(*words)) == 380
    else:
        assert words[0] == words[1] == words[2]
    assert train[1].max() < cell.vocab()


@pytest.mark.parametrize("suite, task", [*(("mad", task) for task in MAD), ("mqar", "4 pairs")])
def test_every_task_fits_the_vocabulary_of_its_model(suite, task):
    for one in protocol(suite, task, quick=False):
        cell = replace(Cell(suite, task, "hope", **one), examples=2, tests=2)
        train, (valid,), (test,) = data_sets(cell)
        for inputs, targets in (train, valid, test):
            assert inputs.shape == targets.shape
            assert inputs.max() < cell.vocab() and targets.max() < cell.vocab()


def test_the_full_protocol_of_mad_is_the_published_one():
    cells = {task: protocol("mad", task, quick=False) for task in MAD}
    variations = {"compression": 11, "recall": 11, "noisy recall": 14, "fuzzy recall": 11}
    variations |= {"selective copying": 13, "memorization": 6}
    assert {task: len(one) for task, one in cells.items()} == variations
    assert cells["recall"][0]["steps"] == 200 * 12_800 / 128
    assert cells["memorization"][0]["steps"] == 200 * 256 / 128
    assert [one["examples"] for one in cells["recall"]][-4:] == [6400, 3200, 1600, 800]


# --------------------------------------------------------------------------------------------------
# One cell


def test_the_decoder_of_compression_sees_the_last_token_s_state_alone():
    cell = Cell("mad", "compression", "hope", sizes=TINY, settings={"length": 12})
    model = build(cell)
    assert isinstance(model, Autoencoder)
    tokens = torch.randint(15, (2, 12))
    logits, _ = model(tokens)
    assert logits.shape == (2, 12, 16)
    other = tokens.clone()
    other[0, 0] = (tokens[0, 0] + 1) % 15
    changed = (model(other)[0] - logits).abs().amax(-1)
    assert (changed[0] > 0).all() and (changed[1] == 0).all()


def test_a_cell_learns_and_follows_from_its_seed():
    cell = Cell("mad", "memorization", "hope", steps=80, check=0, **EASY)
    result = train_cell(cell, "cpu", 1)
    assert result["test"] == result["valid"] == [1.0] and result["steps"] == 80
    assert result["test"] == train_cell(replace(cell, check=20), "cpu", 1)["test"]
    short = [train_cell(replace(cell, steps=2, seed=seed), "cpu", 1)["loss"] for seed in (0, 0, 1)]
    assert short[0] == short[1] != short[2]


def test_training_ends_when_all_validation_words_are_right():
    cell = Cell("mad", "memorization", "hope", steps=400, check=20, **EASY)
    result = train_cell(cell, "cpu", 1)
    assert result["test"] == [1.0] and result["steps"] < 400 and result["steps"] % 20 == 0


def test_a_cell_that_diverges_has_no_score_but_the_error():
    cell = Cell("formal", "parity", "lstm", steps=9, check=0, examples=50, tests=10, lr=1e38)
    result = train_cell(cell, "cpu", 1)
    assert result["valid"] is result["test"] is None and result["steps"] < 9
    assert result["error"].startswith(f"step {result['steps']}: ")


@pytest.mark.parametrize("name", ["formal_quick", "formal_parity", "mad_quick"])
def test_the_cells_of_results_are_cells_of_today(name):
    for line in (ROOT / "results" / f"tasks_{name}.jsonl").read_text().splitlines():
        old = json.loads(json.loads(line)["key"])
        now = json.loads(current_key(json.loads(line)["key"]))
        for name, value in (old["model"] or {}).items():
            assert name == "cms_step" or now["model"][name] == value
        assert now["model"] is None or now["model"]["cms_updates"] == "off"


# --------------------------------------------------------------------------------------------------
# A suite

RUN = "suites --suite formal --models hope:d_model=16:n_layers=1:chunk=8,lstm --tasks (aa)*".split()
RUN += "--quick --seeds 0,1 --steps 3 --batch 4 --examples 50 --tests 10 --lrs 1e-3,1e-2".split()
RUN += "--jobs 1 --device cpu --out out/t.json".split()


@pytest.mark.slow
def test_a_suite_trains_prints_draws_and_never_trains_a_cell_twice(here, capsys, monkeypatch):
    assert main(RUN) == 0
    shown = capsys.readouterr().out
    assert "| model | parameters | (aa)* |" in shown
    assert "| Hope, published | not stated | 100.00 / 100.00 |" in shown
    result = json.loads(Path("out/t.json").read_text())
    assert len(result["cells"]) == 2 * 2 + 2 * 2  # learning rates, then seeds, each of two models
    for row in result["rows"]:
        own = [c for c in result["cells"] if c["model"] == row["model"]]
        tests = np.array([c["test"] for c in own if c["seed"] != 100])
        assert row["mean"]["(aa)*"] == pytest.approx(100 * tests.mean(0))
        assert row["worst"]["(aa)*"] == pytest.approx(100 * tests.min(0))
        searched = {c["lr"]: (np.mean(c["valid"]), -c["steps"]) for c in own if c["seed"] == 100}
        assert {c["lr"] for c in own if c["seed"] != 100} == {max(searched, key=searched.get)}
    assert Path("out/t.png").stat().st_size > 1000
    monkeypatch.setattr("bench.cells.ProcessPoolExecutor.submit", None)
    assert main(RUN) == 0
    assert capsys.readouterr().out.count("4 of 4 cells are in") == 2
    assert json.loads(Path("out/t.json").read_text()) == result


@pytest.mark.parametrize("suite", COLUMNS)
def test_a_model_that_diverges_has_learned_nothing(tmp_path, suite):
    task = next(iter(COLUMNS[suite]))
    line = {"suite": suite, "task": task, "seed": 0, "test": None, "parameters": 9}
    nothing = summary("hope", [task], [line])
    assert nothing["mean"][task] == nothing["worst"][task] == [0.0] * BINS[suite]
    all_right = {**line, "seed": 1, "test": [1.0] * BINS[suite]}
    half = summary("lstm", [task], [line, all_right])
    assert half["mean"][task] == [50.0] * BINS[suite]
    draw(tmp_path / "t.png", suite, [task], [nothing, half])
    assert (tmp_path / "t.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("suite", COLUMNS)
def test_a_suite_is_all_its_tasks_where_none_is_named(here, capsys, suite):
    flags = ["suites", "--suite", suite, "--models", "hope:d_model=16:n_layers=1:n_heads=1"]
    flags += "--quick --steps 1 --batch 2 --examples 4 --tests 2 --seeds 0 --jobs 1".split()
    assert main([*flags, "--device", "cpu", "--out", "t.json"]) == 0
    rows = json.loads(Path("t.json").read_text())["rows"]
    assert set(rows[0]["mean"]) == set(COLUMNS[suite])
    assert Path("t.png").stat().st_size > 1000


def test_bad_input_is_one_line_and_writes_nothing(here, capsys):
    unknown = "unknown suite 'formel': must be one of formal, mad, mqar; did you mean 'formal'?"
    refused = {
        "--suite formel": unknown,
        "--suite mad --models lstm": "lstm is a reference on the formal languages only",
        "--suite mad --tasks recal": "unknown task 'recal'",
        "--suite formal --models hopp": "did you mean 'hope'",
        "--suite formal --seeds 100": "seeds must be at least 0 and not 100",
        "--suite formal --steps 0": "at least 1",
        "--suite mqar --lrs 0": "lr must be above 0, got 0.0",
    }
    before = sorted(here.rglob("*"))
    for flags, told in refused.items():
        assert main(["suites", *flags.split()]) == 2, flags
        message = capsys.readouterr().err
        assert told in message and message.count("\n") == 1, (flags, message)
    assert sorted(here.rglob("*")) == before
