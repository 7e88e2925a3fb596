"""The suites: the protocol they state, cells trained once, tables beside the paper's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.cells import ROOT, Record
from bench.small_tasks import Autoencoder, Cell, build, data_sets, protocol, score, train_cell
from bench.suites import COLUMNS
from tasks import IGNORE, LANGUAGES, MAD

TINY = {"d_model": 16, "n_layers": 1, "n_heads": 1, "chunk": 8}


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
    (x, y), valid, test = data_sets(Cell("formal", language, "hope", examples=300, tests=40))
    words = []
    for inputs, targets in ((x, y), valid[0], test[0]):
        asked = np.where(targets != IGNORE, inputs, -1)
        words.append({row.tobytes() for row in asked})
    lengths = ((2, 50), (2, 50), (51, 100), (2, 50), (51, 100))
    for (_, targets), (low, high) in zip(((x, y), *valid, *test), lengths, strict=True):
        length = (targets != IGNORE).sum(1)
        assert length.min() >= low and length.max() <= high
    if language in ("parity", "shuffle-2"):
        assert list(map(len, words)) == [300, 40, 40] and len(set.union(*words)) == 380
    else:
        assert words[0] == words[1] == words[2]
    assert y.max() < Cell("formal", language, "hope").vocab()


@pytest.mark.parametrize("suite, task", [*(("mad", task) for task in MAD), ("mqar", "4 pairs")])
def test_every_task_fits_the_vocabulary_of_its_model(suite, task):
    for one in protocol(suite, task, quick=False):
        cell = replace(Cell(suite, task, "hope", **one), examples=2, tests=2)
        train, (valid,), (test,) = data_sets(cell)
        for inputs, targets in (train, valid, test):
            assert inputs.max() < cell.vocab() and targets.max() < cell.vocab()
            assert inputs.shape == targets.shape


def test_the_full_protocol_of_mad_is_the_published_one():
    cells = {task: protocol("mad", task, quick=False) for task in MAD}
    assert {task: len(one) for task, one in cells.items()} == {
        "compression": 11,
        "recall": 11,
        "noisy recall": 14,
        "fuzzy recall": 11,
        "selective copying": 13,
        "memorization": 6,
    }
    assert cells["recall"][0]["steps"] == 200 * 12_800 / 128
    assert cells["memorization"][0]["steps"] == 200 * 256 / 128
    assert [one["examples"] for one in cells["recall"]][-4:] == [6400, 3200, 1600, 800]


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


def memorization(**changes) -> Cell:
    settings = {"vocab": 8, "length": 8}
    sizes = {"sizes": TINY, "batch": 16, "examples": 256, "tests": 20, "lr": 1e-2}
    return Cell("mad", "memorization", "hope", settings=settings, **(sizes | changes))


def test_a_cell_learns_and_follows_from_its_seed():
    cell = memorization(steps=80, check=0)
    result = train_cell(cell, "cpu", 1)
    assert result["test"] == result["valid"] == [1.0] and result["steps"] == 80
    assert result["test"] == train_cell(replace(cell, check=20), "cpu", 1)["test"]
    short = [train_cell(replace(cell, steps=2, seed=seed), "cpu", 1)["loss"] for seed in (0, 0, 1)]
    assert short[0] == short[1] != short[2]


def test_training_ends_when_all_validation_words_are_right():
    result = train_cell(memorization(steps=400, check=20), "cpu", 1)
    assert result["test"] == [1.0] and result["steps"] < 400 and result["steps"] % 20 == 0


def test_a_cell_that_diverges_is_a_result_without_scores():
    result = train_cell(memorization(steps=20, lr=1e30), "cpu", 1)
    assert result["test"] is None and result["steps"] < 20
    assert result["error"].startswith(f"step {result['steps']}: ")
    assert f"(loss {result['loss']})" in result["error"]


def test_the_cells_of_results_still_count():
    for path in sorted((ROOT / "results").glob("tasks_*.jsonl")):
        for key in Record(path).finished:
            assert Cell(**json.loads(key)["cell"]).key() == key


@pytest.mark.slow
def test_a_suite_trains_prints_draws_and_never_trains_a_cell_twice(here, capsys, monkeypatch):
    command = "suites --suite formal --models hope:d_model=16:n_layers=1:chunk=8,lstm".split()
    command += "--tasks (aa)* --quick --seeds 0,1 --lrs 1e-3,1e-2 --steps 3 --batch 4".split()
    command += "--examples 50 --tests 10 --jobs 1 --device cpu --out out/t.json".split()
    assert main(command) == 0
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
    assert main(command) == 0
    assert capsys.readouterr().out.count("4 of 4 cells are in") == 2
    assert json.loads(Path("out/t.json").read_text()) == result


@pytest.mark.parametrize("suite", COLUMNS)
@pytest.mark.slow
def test_a_suite_is_all_its_tasks_where_none_is_named(here, capsys, suite):
    command = ["suites", "--suite", suite, "--models", "hope:d_model=16:n_layers=1:n_heads=1"]
    command += "--quick --steps 1 --batch 2 --examples 4 --tests 2 --jobs 1 --device cpu".split()
    assert main([*command, "--out", "t.json"]) == 0
    assert set(json.loads(Path("t.json").read_text())["rows"][0]["mean"]) == set(COLUMNS[suite])
    assert Path("t.png").stat().st_size > 1000


def test_bad_input_is_one_line_and_writes_nothing(here, capsys):
    suites = "unknown suite 'formel': must be one of formal, mad, mqar; did you mean 'formal'?"
    refused = {
        "--suite formel": suites,
        "--suite mad --models lstm": "lstm is a reference on the formal languages only",
        "--suite mad --tasks recal": "unknown task 'recal'",
        "--suite formal --models hopp": "did you mean 'hope'",
        "--suite formal --seeds 100": "seeds must be at least 0 and not 100",
        "--suite formal --steps 0": "at least 1",
        "--suite mqar --lrs 0": "lr must be above 0, got 0.0",
    }
    before = sorted(here.rglob("*"))
    for flags, told in refused.items():
        assert main(["suites", *flags.split()]) == 2
        message = capsys.readouterr().err
        assert told in message and message.count("\n") == 1, flags
    assert sorted(here.rglob("*")) == before
