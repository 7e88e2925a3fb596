"""`python -m bench`: specs mean what they say, cells are trained once, errors are one line."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import bench.ablation
from bench.__main__ import COMMANDS, main
from bench.ablation import ABLATION, FROM_PUBLISHED
from bench.cells import ROOT, Record, parse_spec, spec_config, split_specs
from bench.kernels import kernel_table, modify_work, scan_work
from bench.pretrained import losses
from bench.quality import cell_key, corpus_of, current_key
from bench.tables import published
from hope import Hope, HopeConfig
from support.config import TrainConfig
from support.run import Run
from train import train

TINY = ":d_model=32:n_layers=1:n_heads=2:conv=4"
MODELS = f"hope{TINY}:chunk=8,transformer{TINY}"
ROWS = "--batch 2 --seq-len 16 --eval-tokens 200 --jobs 2 --data text.py --out out/q.json".split()
ROWS += ["--device", "cpu"]
QUALITY = ["quality", "--models", MODELS, *"--tokens 256 --lr-tokens 64 --seeds 0,1".split()]
QUALITY += ["--lrs", "1e-3,3e-3", *ROWS]


def result_in(path):
    return json.loads(Path(path).read_text())


# --------------------------------------------------------------------------------------------------
# Commands, models and cells


def test_a_spec_is_a_name_and_fields():
    assert parse_spec("hope") == ("hope", {})
    fields = {"inner_step": 0, "memory": "mlp", "levels": [256, None]}
    assert parse_spec("hope:inner_step=0:memory=mlp:levels=[256,null]") == ("hope", fields)
    specs = split_specs("hope:levels=[256,null], transformer:conv=4")
    assert specs == ["hope:levels=[256,null]", "transformer:conv=4"]
    config = spec_config("transformer:conv=4:d_model=64", d_model=32, n_layers=2, n_heads=2)
    assert (config.model, config.conv, config.d_model, config.n_layers) == ("transformer", 4, 64, 2)


def test_no_argument_prints_the_commands_and_each_explains_its_flags(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f"python -m bench {command} " in shown
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        assert f"usage: python -m bench {command}" in capsys.readouterr().out


def test_bad_input_is_one_line_and_writes_nothing(here, capsys):
    refused = {
        "quallity": "did you mean 'quality'",
        "speed --models hopp": "did you mean 'hope'",
        "speed --models hope:chnk=8": "did you mean 'chunk'",
        "speed --seq-len 64,0": "at least 1",
        "quality --models hope:chunk": "'chunk' must be field=value",
        "quality --models hope:chunk=0": "at least 1, got 0",
        "quality --models hope,hope": "each once",
        "quality --models hope:vocab_size=9": "vocab_size",
        "quality --seeds 0,100": "not 100",
        "quality --lrs 0": "lr must be above 0, got 0.0",
        "quality --jobs 0": "at least 1",
        "quality --models hope@adam": "adamw, muon, m3",
        "quality --data nowhere": "'nowhere' does not exist",
        "ablation --model transformer": "model must be hope",
        "optimizers --optimizers m3,adam": "adamw, muon, m3",
        "digits --optimizers adam": "adamw, muon, m3",
        "digits --lrs 0": "lr must be above 0, got 0.0",
        "kernels --device cpu": "must be a CUDA GPU",
        "kernels --chunk 0": "at least 1",
    }
    before = sorted(here.rglob("*"))
    for line, told in refused.items():
        assert main(line.split()) == 2, line
        message = capsys.readouterr().err
        assert told in message, (line, message)
        assert message.count("\n") == 1 and message.startswith("bench: error: "), message
    assert sorted(here.rglob("*")) == before


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


@pytest.mark.parametrize("name", ["quality", "quality_novels", "ablation", "optimizers"])
def test_the_cells_of_results_are_cells_of_today(name):
    path = ROOT / "results" / f"{name}.jsonl"
    finished = Record(path, current_key).finished
    assert len(finished) == len(path.read_text().splitlines())
    for key, line in finished.items():
        assert json.loads(key)["train"]["lr"] == line["lr"]


# --------------------------------------------------------------------------------------------------
# Measurements


def test_position_reads_runs_on_the_text_of_the_first_one(here, capsys):
    small = {"d_model": 16, "n_layers": 1, "n_heads": 1, "chunk": 8}
    sizes = {"data": "text.py", "tokens": 128, "batch_size": 2, "seq_len": 32, "device": "cpu"}
    for out, seq_len, own in (("hope", 32, {"levels": [8, None]}), ("other", 16, {})):
        sizes["seq_len"] = seq_len
        train(TrainConfig(set=small | own, out=out, **sizes))
    assert main("position hope hope@off --context 128 --rows 4 --out out/p.json".split()) == 0
    made = result_in("out/p.json")
    assert made["to"] == [32, 64, 128] and made["rows"] == 4
    on, off = (np.array(row["bits_per_byte"]) for row in made["runs"])
    run = Run.open("hope", "cpu")
    rows = torch.from_numpy(run.text()[1][: 4 * 128].astype(np.int64)).view(4, 128)
    start = torch.full((4, 1), run.encoding.eot_token)
    with torch.no_grad():
        logits, _ = run.model(torch.cat([start, rows[:, :-1]], 1))
    nats = torch.nn.functional.cross_entropy(logits.mT, rows, reduction="none").mean(0)
    spans = [nats[a:b].mean().item() / math.log(2) for a, b in ((0, 32), (32, 64), (64, 128))]
    assert np.allclose(on, spans, atol=1e-5) and (np.abs(on - off) > 1e-4).any()
    assert Path("out/p.png").stat().st_size > 1000
    capsys.readouterr()
    for runs, told in (("hope other", "in rows of 32 tokens; other was not"), ("hope@on", "@off")):
        assert main(f"position {runs} --context 128".split()) == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_quality_compares_models_and_never_trains_a_cell_twice(here, capsys, monkeypatch):
    assert main([*QUALITY, "--minutes", "0.001"]) == 0
    shown = capsys.readouterr().out
    assert "after equal tokens" in shown and "after equal time" in shown
    first = result_in("out/q.json")
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
    # (Equal settings are one cell: runs at equal time may have the steps of other runs.)
    path = Path("out/q.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    assert len(lines) >= 8
    assert len(Record(path, current_key).finished) == len(lines) - 1
    capsys.readouterr()
    assert main([*QUALITY, "--minutes", "0.001"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("bits per byte, ") == 1
    assert f"1 lines of {path} do not count" in shown.err
    again = [c["bits_per_byte"] for c in result_in("out/q.json")["cells"]]
    assert again == pytest.approx([c["bits_per_byte"] for c in first["cells"]])
    assert len(Record(path, current_key).finished) == len(lines)

    # Nothing missing: nothing is trained.
    monkeypatch.setattr("bench.cells.ProcessPoolExecutor.submit", None)
    assert main([*QUALITY, "--minutes", "0.001"]) == 0


@pytest.mark.slow
def test_speed_gives_ratios_to_the_transformer(here, capsys):
    flags = "--batch 2 --seq-len 512,64 --d-model 32 --n-layers 1 --n-heads 2 --repeats 3".split()
    flags += "--device cpu --threads 1".split()
    assert main(["speed", "--models", f"hope{TINY}", *flags, "--out", "s.json"]) == 0
    rows = result_in("s.json")["rows"]
    assert [row["model"] for row in rows] == 2 * ["transformer", f"hope{TINY}"]
    assert [row["seq_len"] for row in rows] == [512, 512, 64, 64]
    assert rows[0]["ratio"] == 1 and len(rows[1]["rounds"]) == 3
    assert all(row["ratio"] > 0 and math.isfinite(row["tokens_per_s"]) for row in rows)
    assert "| peak MiB | 512 | 64 |" in capsys.readouterr().out
    assert Path("s.png").stat().st_size > 10_000
    assert main(["speed", "--profile", f"hope{TINY}", *flags]) == 0
    assert "aten::mm" in capsys.readouterr().out


@pytest.mark.slow
def test_optimizers_are_compared_on_every_model(here, capsys):
    flags = ["optimizers", "--models", MODELS, "--optimizers", "adamw,m3"]
    flags += "--seeds 0 --lrs 1e-3,3e-3 --tokens 128 --lr-tokens 64 --rounds 2".split()
    assert main([*flags, *ROWS]) == 0
    shown = capsys.readouterr().out
    assert shown.count("after equal tokens") == shown.count("time of an optimizer's step") == 2
    result = result_in("out/q.json")
    for model in MODELS.split(","):
        rows = result[model]["equal_tokens"]
        assert {row["model"] for row in rows} == {f"{model}@adamw", f"{model}@m3"}
        assert {len(rounds) for rounds in result[model]["step_seconds"].values()} == {2}
    keys = map(json.loads, Record(Path("out/q.jsonl"), current_key).finished)
    assert {key["train"]["optimizer"] for key in keys} == {"adamw", "m3"}


@pytest.mark.parametrize(
    "base, parts",
    [
        ("hope", ABLATION),
        ('hope:memory=mlp:adaptive=["k","v","q"]:momentum=true', FROM_PUBLISHED),
    ],
)
def test_the_ablation_changes_one_field_of_hope_at_a_time(base, parts):
    hope = spec_config(base).to_dict()
    assert parts is ABLATION or hope == HopeConfig.preset("nano", published=True).to_dict()
    published_rows = {line["model"] for line in published("table6")["rows"]}
    for fields, (_, row) in parts.items():
        other = spec_config(f"{base}:{fields}" if fields else base).to_dict()
        changed = {name for name, value in other.items() if value != hope[name]}
        assert changed - {"hidden"} == ({fields.partition("=")[0]} if fields else set())
        assert row is None or row in published_rows


@pytest.mark.slow
def test_the_ablation_stands_beside_the_paper(here, capsys, monkeypatch):
    few = {name: ABLATION[name] for name in ("", "dgd=false")}
    monkeypatch.setattr(bench.ablation, "ABLATION", few)
    flags = ["ablation", "--model", f"hope{TINY}:chunk=8"]
    assert main([*flags, *"--tokens 64 --lrs 1e-3 --lr-tokens 32".split(), *ROWS]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("| plain gradient")]
    assert f"`hope{TINY}:chunk=8:dgd=false`" in line and line.endswith("| 13.41 |")
    rows = result_in("out/q.json")["equal_tokens"]
    assert len(rows) == 2 and all(0 < row["mean"] < 16 for row in rows)


@pytest.mark.slow
def test_digits_are_learned_with_every_optimizer(here, capsys):
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    flags = "--optimizers adamw,m3 --steps 50 --batch 16 --seeds 0 --lrs 1e-2 --threads 1".split()
    assert main(["digits", *flags, "--out", "d.json"]) == 0
    result = result_in("d.json")
    rows = result["rows"]
    assert [row["optimizer"] for row in rows] == ["adamw", "m3"]
    assert all(row["test_accuracy"] > 0.3 for row in rows)  # chance: 0.1
    assert [row["test_loss"] for row in rows] == [cell["test_loss"] for cell in result["cells"]]


def test_the_table_of_kernels_shows_what_was_not_measured_as_a_dash():
    row = {"what": "scan", "heads": 128, "T": 2048, "chunk": None, "ms": 1.5, "tflops": 20.0}
    row["forward"] = 0.5
    row |= {"tbytes": 0.5, "of_tflops": 0.025, "of_tbytes": 0.12}
    row |= {"eager": 31.25, "fla": 0.8}
    missing = {name: None if type(x) is float else x for name, x in row.items()}
    head, first, second = kernel_table([row, missing]).splitlines()
    measured = "0.500 1.500 20.0 0.025 0.50 0.120 31.2 0.80"
    assert first.split() == ["scan", "128", "2048", "-", *measured.split()]
    assert second.split() == ["scan", "128", "2048", *"-" * 9]
    assert len(head) == len(first) == len(second)


def test_the_work_of_a_kernel_grows_with_its_tokens():
    assert scan_work(128, 4096)[0] == 2 * scan_work(128, 2048)[0] == 4 * scan_work(64, 2048)[0]
    assert modify_work(16, 64)[1] == 16 * 64 * (8 * 64 * 2 + 2 * 64 * 4)


# --------------------------------------------------------------------------------------------------
# bench pretrained


@pytest.mark.parametrize("step", [0.0, 0.1])
def test_losses_of_a_text_in_pieces_are_those_of_the_whole(step):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "hidden": 24}
    model = Hope(HopeConfig(model="hope_attention", levels=[512, None], **sizes)).double().eval()
    tokens = torch.randint(257, (1, 1300))
    with torch.no_grad():
        logits, _ = model(tokens, None, *(("first_order", step) if step else ("off",)))
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
    found = losses(model, tokens, step)
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-5, atol=1e-5)
