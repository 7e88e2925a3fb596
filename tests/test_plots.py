"""support/plots.py and the pictures drawn with it: what they show, found on their axes."""

import contextlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from bench import continual, speed, suites, tables
from bench.report import load
from support import monitor
from support.plots import COLORS, heat_map, label_ends, picture

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def drawn(monkeypatch):
    """Figures in place of files."""
    figures = []

    @contextlib.contextmanager
    def kept(path, width, height, dpi=100):
        figures.append(Figure((width, height)))
        yield figures[-1]

    for module in (continual, speed, suites, tables, monitor):
        monkeypatch.setattr(module, "picture", kept)
    return figures


def test_a_picture_is_a_whole_file_in_the_one_style(tmp_path):
    path = tmp_path / "new" / "a.png"
    with picture(path, 3, 2, dpi=50) as figure:
        axes = figure.add_subplot()
        (line,) = axes.plot([1, 2])
        assert line.get_color() == COLORS[0] and not axes.spines["top"].get_visible()
        assert not path.exists()
    assert path.read_bytes().startswith(b"\x89PNG")
    after = Figure().add_subplot()
    assert after.spines["top"].get_visible()  # the style of others' pictures is left alone


def test_no_file_makes_pictures_in_a_style_of_its_own():
    files = [path for folder in (".", "support", "bench") for path in (ROOT / folder).glob("*.py")]
    makers = [p.name for p in files if re.search("import Figure|pyplot", p.read_text("utf-8"))]
    assert makers == ["plots.py"] and len(files) > 40


def test_labels_of_lines_that_end_together_do_not_touch():
    axes = Figure((6, 4)).add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    heights = {"low": 0.1, "b": 0.5, "a": 0.52, "c": 0.5, "high": 0.9}
    label_ends(axes, [(name, 1, y, "black") for name, y in heights.items()], fontsize=8)
    places = {label.get_text(): label.xyann[1] for label in axes.texts}
    assert places["low"] == pytest.approx(0.1) and places["high"] == pytest.approx(0.9)
    gap = 8 / 72 / axes.get_window_extent().height * axes.figure.dpi
    between = sorted(places[name] for name in "abc")
    assert min(np.diff(between)) > gap and places["a"] == between[-1]
    assert np.mean(between) == pytest.approx(0.51, abs=0.02)


def test_a_heat_map_has_the_numbers_in_it():
    axes = Figure().add_subplot()
    image = heat_map(axes, np.array([[0.0, 1.0], [np.nan, 0.25]]), ["r", "s"], ["c", "d"])
    assert [text.get_text() for text in axes.texts] == ["0.00", "1.00", "0.25"]
    assert [text.get_color() for text in axes.texts][:2] == ["white", "#222222"]
    assert image.get_clim() == (0, 1)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["r", "s"]


def test_loss_is_shown_from_where_it_matters_with_the_learning_rate_under_it(drawn):
    losses = [8.0, 6, 4, *np.linspace(3, 2, 97)]
    records = [
        {"step": i, "tokens": 1000 * i, "bits_per_byte": loss, "lr": 1e-3 / i}
        for i, loss in enumerate(losses, 1)
    ]
    records.append({"step": 100, "tokens": 100_000, "val_bits_per_byte": 2.1})
    run = SimpleNamespace(metrics=lambda: records, folder=Path("x"), title="t")
    monitor.plot(run)
    loss, rate = drawn[0].axes
    assert 1.8 < loss.get_ylim()[0] < 2 < 3 < loss.get_ylim()[1] < 5
    assert rate.lines[0].get_ydata()[1] == 5e-4 and rate.get_ylabel() == "learning rate"
    assert [text.get_text() for text in loss.texts] == ["2.100"]


@pytest.mark.parametrize("rows", [1, 3])
def test_positions_begin_at_32_with_the_spread_of_the_rows(drawn, rows):
    curve = np.ones((rows, 512)) * np.log(2) * (1 + np.arange(rows)[:, None])
    curve[:, :32] = 99
    config = SimpleNamespace(seq_len=256)
    facts = {"model": "m", "parameters": 1, "training_tokens": 1}
    run = SimpleNamespace(config=config, facts=lambda: facts, folder=Path("x"))
    made = {"curve": curve, "to": [256, 512], "kept": [2, 2], "fresh": [2, 3]}
    tables.draw_position(run, made)
    top, _ = drawn[0].axes
    x, y = top.lines[0].get_data()
    assert x[0] >= 32 and y == pytest.approx(np.full(len(y), (rows + 1) / 2))
    bands = [band.get_paths()[0].vertices[:, 1] for band in top.collections]
    assert len(bands) == (rows > 1)
    for band in bands:  # the standard deviation of 1, 2, 3
        assert {*band.round(9)} == {1.0, 3.0}


def test_speed_is_drawn_as_multiples_with_a_name_at_each_end(drawn):
    rows = load("speed_lengths.json")["rows"]
    specs = list(dict.fromkeys(row["model"] for row in rows))
    speed.draw(Path("x"), specs, [512, 1024, 4096, 16384], rows)
    for axes, name in zip(drawn[0].axes, ("ratio", "memory_ratio"), strict=True):
        assert {text.get_text() for text in axes.texts} == {*specs}
        assert [*axes.lines[0].get_ydata()] == [1, 1, 1, 1]  # the Transformer
        hope = [row[name] for row in rows if row["model"] == "hope"]
        assert [*axes.lines[specs.index("hope")].get_ydata()] == hope
        looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
        assert len(looks) == len(specs)


def test_heat_maps_have_a_legend(drawn):
    for name, command, legend in (("domains", "domains", "bits per byte"),
                                  ("classes_clinc150", "classes", "accuracy")):
        continual.plot(load(f"continual_{name}.jsonl"), command, Path("x"))
        assert legend in [axes.get_ylabel() for axes in drawn[-1].axes]
    rows = json.loads((ROOT / "results/tasks_mad_quick.json").read_text())["rows"]
    suites.draw(Path("x"), "mad", list(rows[0]["mean"]), rows)
    assert "accuracy %" in [axes.get_ylabel() for axes in drawn[-1].axes]
