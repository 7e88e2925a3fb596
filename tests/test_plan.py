"""What a run is said to cost before it is started: sizes, memory, time; and the set-ups that presets bring along."""

import re
from dataclasses import replace

import pytest
import torch

import train
from hope import PRESETS, Hope, HopeConfig
from support import plan
from support.config import TrainConfig, parse
from support.plan import flops_per_token

TINY = dict(n_layers=2, d_model=64, n_heads=2, vocab_size=500)


@pytest.mark.parametrize(
    ("preset", "tokens"), [("30m", 0.6e9), ("125m", 2.5e9), ("340m", 15e9), ("760m", 30e9), ("1.3b", 100e9)]
)
def test_a_preset_brings_the_paper_s_training_set_up(preset, tokens):
    config = parse(["--preset", preset])
    assert config.tokens == tokens and config.seq_len == 4096 and config.tokens_per_step == 2**19
    assert (config.lr, config.weight_decay, config.grad_clip, config.min_lr_ratio) == (4e-4, 0.1, 1.0, 0.1)
    assert 0 < config.warmup < 0.1 and config.optimizer == "adamw" and config.batch_size % config.micro_batch == 0


def test_flags_override_the_set_up_of_a_preset():
    config = parse("--preset 340m --tokens 1e9 --lr 1e-3 --batch-size 64 --data stdlib".split())
    assert (config.tokens, config.lr, config.batch_size, config.data, config.seq_len) == (10**9, 1e-3, 64, "stdlib", 4096)


def test_without_a_preset_nothing_is_set():
    assert parse([]) == TrainConfig() == parse(["--preset", "nano"])
    assert set(train.SETUPS) == set(PRESETS) - {"nano"}


@pytest.mark.parametrize("options", [{}, {"model": "transformer", "recompute": True, "optimizer": "muon"}], ids=str)
def test_memory_of_tensors_without_data_is_that_of_tensors_with_data(options):
    config = TrainConfig(**options)
    c = HopeConfig.preset("nano", config.model, **TINY)
    fake, real = (plan.measure(c, config, 2, 128, fake) for fake in (True, False))
    for what in ("kept", "extra", "optimizer"):
        assert fake[what] == pytest.approx(real[what], rel=0.02), what
    assert all(p.is_meta is False for p in Hope(c).parameters())  # nothing of it is left behind


@pytest.mark.parametrize("model", ["hope", "transformer"])
def test_memory_of_many_layers_and_rows_is_that_of_few(model):
    config = TrainConfig(model=model, seq_len=128)
    c = HopeConfig.preset("nano", model, **TINY | dict(n_layers=4))
    activations, optimizer, _ = plan.memory(c, config)
    direct = plan.measure(c, config, 3, 128)
    assert 0.99 < activations(3) / (direct["kept"] + direct["extra"]) < 1.05
    assert optimizer == pytest.approx(direct["optimizer"], rel=0.02)


def test_adamw_holds_sixteen_bytes_a_parameter_of_which_fsdp_shares_all():
    config = TrainConfig(batch_size=8)
    c = HopeConfig.preset("nano", "transformer", **TINY)
    size = sum(p.numel() for p in Hope(c).parameters())
    costs = plan.memory(c, config)
    assert costs[1] == pytest.approx(8 * size, rel=1e-3)
    alone, shared = (plan.per_gpu(size, 0, 0, replace(config, fsdp=fsdp), 8, 1, costs) for fsdp in (False, True))
    assert alone["total"] - alone["activations"] == pytest.approx(16 * size, rel=1e-3)
    assert shared["total"] - shared["activations"] == pytest.approx(2 * size, rel=1e-3)


def peak_rss():
    return train.peak_memory("cpu")


def test_dry_run_counts_and_allocates_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = peak_rss()
    words = "--preset 1.3b --model transformer --dry-run --gpus 64 --gpu H100 --utilisation 0.5 --fsdp".split()
    assert train.main(words) == 0
    out = capsys.readouterr().out
    c = HopeConfig.preset("1.3b", "transformer")
    with torch.device("meta"):
        size = sum(p.numel() for p in Hope(c).parameters())
    assert f"{size:,} parameters" in out and "190,735 steps of 128 rows of 4,096" in out and "H100, 80 GB" in out
    hours = flops_per_token(c, 4096) * 190_735 * 2**19 / (64 * 989e12 * 0.5) / 3600
    line = next(line for line in out.splitlines() if line.split()[:1] == ["64"])
    assert line.split()[-3:] == ["yes", f"{hours:.1f}", "hours"]
    assert not list(tmp_path.iterdir())
    if before is not None:
        assert peak_rss() - before < 500  # MiB; the weights alone would take 5,000


def test_a_run_that_does_not_fit_is_refused_with_one_that_does(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--preset 340m --model transformer --dry-run --gpus 8 --gpu A10".split()
    assert train.main([*words, "--micro-batch", "16"]) == 2
    error = capsys.readouterr().err
    legal = re.search(r"16 rows at once need [\d.]+ GB: legal is up to 22.1 usable .*, as with --micro-batch (\d+)", error)
    assert train.main([*words, "--micro-batch", legal[1]]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpus 3", "batch_size is 4: legal is a multiple of 3"),
        ("--gpus 0", "gpus is 0"),
        ("--gpu H1000", "gpu is 'H1000': legal are B200"),
        ("--utilisation 40", "utilisation is 40.0"),
        ("--model hoep", "did you mean 'hope'"),
    ],
)
def test_bad_flags_of_a_dry_run_are_named(words, message, capsys):
    assert train.main(["--dry-run", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_dry_run_knows_the_vocabulary_and_the_passes_of_shards(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    import data

    (tmp_path / "a.txt").write_text("".join(f"{i} and {i * i}\n" for i in range(3000)))
    data.main(["text", str(tmp_path / "a.txt"), "--vocab", "400", "--out", str(tmp_path / "out"), "--jobs", "1"])
    held = len(data.load_corpus(str(tmp_path / "out")).train)
    assert train.main(["--dry-run", "--model", "transformer", "--data", str(tmp_path / "out"), "--tokens", str(2 * held)]) == 0
    assert f"{held:,} (2 passes)" in (out := capsys.readouterr().out) and f"{400 * 128:,} of them the embedding" in out
