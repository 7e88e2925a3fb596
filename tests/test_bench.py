"""`python -m bench`: specs mean what they say, cells are trained once, errors are one line."""

import dataclasses
import importlib
import json
import math
from itertools import product
from pathlib import Path

import pytest

import bench.ablation
from bench.__main__ import COMMANDS, main
from bench.ablation import ABLATION
from bench.cells import ROOT, Record, parse_spec, spec_config, split_specs
from bench.kernels import kernel_table, modify_work, scan_work
from bench.quality import cell_key, corpus_of, current_key
from bench.tables import published
from support.config import TrainConfig

TINY = ":d_model=32:n_layers=1:n_heads=2:conv=4"
MODELS = f"hope{TINY}:chunk=8,transformer{TINY}"
# of quality, optimizers and ablation
SMALL = "--batch 2 --seq-len 16 --eval-tokens 200 --jobs 2 --data text.py --device cpu".split()
SMALL += ["--out", "out/q.json"]


def test_a_spec_is_a_name_and_fields():
    assert parse_spec("hope") == ("hope", {})
    fields = {"inner_step": 0, "memory": "mlp", "levels": [256, None]}
    assert parse_spec("hope:inner_step=0:memory=mlp:levels=[256,null]") == ("hope", fields)
    specs = ["hope:levels=[256,null]", "transformer:conv=4"]
    assert split_specs(", ".join(specs)) == specs
    config = spec_config("transformer:conv=4:d_model=64", d_model=32, n_layers=2, n_heads=2)
    assert (config.model, config.conv, config.d_model, config.n_layers) == ("transformer", 4, 64, 2)


def test_bad_input_is_one_line_and_writes_nothing(here, capsys):
    refused = {
        "speed --models hopp": "did you mean 'hope'",
        "speed --models hope:chnk=8": "did you mean 'chunk'",
        "quality --models hope:chunk": "'chunk' must be field=value",
        "quality --models hope:chunk=0": "at least 1, got 0",
        "quality --models hope,hope": "each once",
        "quality --models hope:vocab_size=9": "vocab_size",
        "quality --models hope@adam": "adamw, muon, m3",
        "quality --seeds 0,100": "not 100",
        "quality --lrs 0": "lr must be above 0, got 0.0",
        "quality --jobs 0": "at least 1",
        "quality --data nowhere": "'nowhere' does not exist",
        "qualty": "did you mean 'quality'",
        "optimizers --optimizers m3,adam": "adamw, muon, m3",
        "digits --optimizers adam": "adamw, muon, m3",
        "digits --lrs 0": "lr must be above 0, got 0.0",
        "ablation --model transformer": "model must be hope",
        "kernels --device cpu": "measured on a CUDA GPU",
        "kernels --chunk 0": "at least 1",
    }
    before = sorted(here.rglob("*"))
    for command, told in refused.items():
        assert main(command.split()) == 2
        message = capsys.readouterr().err
        assert told in message and message.count("\n") == 1, command
        assert message.startswith("bench: error: ")
    assert sorted(here.rglob("*")) == before


def test_help_names_every_command_and_says_what_each_measures(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for command, (module, _) in COMMANDS.items():
        assert f"python -m bench {command}" in shown
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert importlib.import_module(module).__doc__.strip() in capsys.readouterr().out


@pytest.mark.slow
def test_quality_compares_models_and_never_trains_a_cell_twice(here, capsys, monkeypatch):
    grid = "--tokens 256 --lr-tokens 64 --lrs 1e-3,3e-3 --seeds 0,1 --minutes 0.001".split()
    command = ["quality", "--models", MODELS, *grid, *SMALL]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "after equal tokens" in shown and "after equal time" in shown
    first = json.loads(Path("out/q.json").read_text())
    assert len(first["cells"]) == 4 + 4 + 4
    assert {row["tokens"] for row in first["equal_tokens"]} == {256}
    for row in first["equal_tokens"]:
        values = list(row["seeds"].values())
        assert row["mean"] == pytest.approx(sum(values) / 2) and 0 < row["mean"] < 16
        assert row["lr"] == first["best_lr"][row["model"]]
        own = [c for c in first["cells"] if c["seed"] == 100 and c["spec"] == row["model"]]
        searched = {c["lr"]: c["bits_per_byte"] for c in own}
        assert min(searched, key=searched.get) == row["lr"]

    # All cells are there, the last one torn as by a kill: it alone is trained again, equally.
    path = Path("out/q.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    # equal settings are one cell: runs at equal time may have the steps of other runs
    assert len(lines) >= 8
    assert len(Record(path, current_key).finished) == len(lines) - 1
    capsys.readouterr()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.count("bits per byte, ") == 1 and f"1 lines of {path} do not count" in shown
    again = json.loads(Path("out/q.json").read_text())
    bits = [cell["bits_per_byte"] for cell in first["cells"]]
    assert [cell["bits_per_byte"] for cell in again["cells"]] == pytest.approx(bits)
    assert len(Record(path, current_key).finished) == len(lines)

    # Nothing missing: nothing is trained.
    monkeypatch.setattr("bench.cells.ProcessPoolExecutor.submit", None)
    assert main(command) == 0


def test_other_settings_are_other_cells(here):
    corpus = corpus_of("text.py").fingerprint()
    config = TrainConfig(set={"n_layers": 1}, data="text.py")
    changes = {"lr": 1e-3}, {"seed": 1}, {"tokens": 10}, {"set": {"n_layers": 2}}, {"threads": 2}
    others = [dataclasses.replace(config, **change) for change in changes]
    keys = {cell_key(c, corpus) for c in [config, *others]}
    assert len(keys) == 6 and cell_key(config, corpus) in keys
    assert cell_key(config, {**corpus, "crc32": 0}) not in keys
    elsewhere = dataclasses.replace(config, data=str(here / "text.py"))
    assert cell_key(elsewhere, corpus) in keys


def test_the_cells_of_results_still_count(capsys):
    for path in sorted((ROOT / "results").glob("*.jsonl")):
        if path.name.startswith(("quality", "ablation", "optimizers")):
            finished = Record(path, current_key).finished
            assert len(finished) == len(path.read_text().splitlines()) > 0
    assert "do not count" not in capsys.readouterr().out


@pytest.mark.slow
def test_speed_gives_ratios_to_the_transformer(here, capsys):
    flags = "--batch 2 --seq-len 512,64 --d-model 32 --n-layers 1 --n-heads 2".split()
    flags += "--device cpu --repeats 3 --threads 1".split()
    assert main(["speed", "--models", f"hope{TINY}", *flags, "--out", "s.json"]) == 0
    rows = json.loads(Path("s.json").read_text())["rows"]
    measured = [(row["seq_len"], row["model"]) for row in rows]
    assert measured == list(product((512, 64), ("transformer", f"hope{TINY}")))
    assert Path("s.png").stat().st_size > 10_000
    assert "| peak MiB | 512 | 64 |" in capsys.readouterr().out
    assert rows[0]["ratio"] == 1 and len(rows[1]["rounds"]) == 3
    assert all(row["ratio"] > 0 and math.isfinite(row["tokens_per_s"]) for row in rows)
    assert main(["speed", "--profile", f"hope{TINY}", *flags]) == 0
    assert "aten::mm" in capsys.readouterr().out


@pytest.mark.slow
def test_optimizers_are_compared_on_every_model(here, capsys):
    flags = "--optimizers adamw,m3 --tokens 128 --lr-tokens 64 --lrs 1e-3,3e-3 --rounds 2".split()
    assert main(["optimizers", "--models", MODELS, *flags, *SMALL]) == 0
    shown = capsys.readouterr().out
    assert shown.count("after equal tokens") == shown.count("time of an optimizer's step") == 2
    result = json.loads(Path("out/q.json").read_text())
    for model in MODELS.split(","):
        rows = result[model]["equal_tokens"]
        assert {row["model"] for row in rows} == {f"{model}@adamw", f"{model}@m3"}
        assert {len(rounds) for rounds in result[model]["step_seconds"].values()} == {2}
    keys = Record(Path("out/q.jsonl"), current_key).finished
    assert {json.loads(key)["train"]["optimizer"] for key in keys} == {"adamw", "m3"}


@pytest.mark.slow
def test_the_ablation_takes_one_part_away_at_a_time(here, capsys, monkeypatch):
    def parts(fields):
        return spec_config(f"hope:{fields}" if fields else "hope").to_dict()

    full = parts("")
    for fields, (_, row) in ABLATION.items():
        changed = {name for name, value in parts(fields).items() if value != full[name]}
        assert changed - {"hidden"} == ({fields.partition("=")[0]} if fields else set())
        assert row is None or row in {line["model"] for line in published("table6")["rows"]}
    few = {name: ABLATION[name] for name in ("", "dgd=false")}
    monkeypatch.setattr(bench.ablation, "ABLATION", few)
    flags = ["--model", f"hope{TINY}:chunk=8", *"--tokens 64 --lrs 1e-3".split()]
    assert main(["ablation", *flags, *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("| plain gradient")]
    assert f"`hope{TINY}:chunk=8:dgd=false`" in line and line.endswith("| 13.41 |")
    rows = {row["model"]: row for row in json.loads(Path("out/q.json").read_text())["equal_tokens"]}
    assert len(rows) == 2 and all(0 < row["mean"] < 16 for row in rows.values())


@pytest.mark.slow
def test_digits_are_learned_with_every_optimizer(here, capsys):
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    flags = "--optimizers adamw,m3 --steps 50 --batch 16 --seeds 0 --lrs 1e-2 --threads 1".split()
    assert main(["digits", *flags, "--out", "d.json"]) == 0
    result = json.loads(Path("d.json").read_text())
    assert [row["optimizer"] for row in result["rows"]] == ["adamw", "m3"]
    assert all(row["test_accuracy"] > 0.3 for row in result["rows"])  # chance: 0.1
    losses = [cell["test_loss"] for cell in result["cells"]]
    assert [row["test_loss"] for row in result["rows"]] == losses


def test_the_table_of_kernels_shows_what_was_not_measured_as_a_dash():
    row = {"what": "scan", "heads": 128, "T": 2048, "chunk": None, "ms": 1.5}
    row |= {"tflops": 20.0, "tbytes": 0.5, "of_tflops": 0.025, "of_tbytes": 0.12}
    row |= {"eager": 31.25, "compiled": None, "fla": 0.8}
    missing = {name: None if type(x) is float else x for name, x in row.items()}
    head, first, second = kernel_table([row, missing]).splitlines()
    shown = "scan 128 2048 - 1.500 20.0 0.025 0.50 0.120 31.2 - 0.80"
    assert first.split() == shown.split()
    assert second.split() == ["scan", "128", "2048", *"-" * 9]
    assert len(head) == len(first) == len(second)


def test_the_work_of_a_kernel_grows_with_its_tokens():
    assert scan_work(128, 4096)[0] == 2 * scan_work(128, 2048)[0] == 4 * scan_work(64, 2048)[0]
    assert modify_work(16, 64)[1] == 16 * 64 * (8 * 64 * 2 + 2 * 64 * 4)
