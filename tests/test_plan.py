"""What a run will cost, said before it starts: sizes, memory, time; the set-ups of the presets."""

import contextlib
import re
from dataclasses import replace

import pytest
import torch

import train
from hope import PRESETS, Hope, HopeConfig
from support import plan
from support.config import SETUPS, TrainConfig, parse
from support.plan import flops_per_token, peak_memory
from support.run import resumed

TINY = {"n_layers": 2, "d_model": 64, "n_heads": 2, "vocab_size": 500}
MODELS = [pytest.param("hope", marks=pytest.mark.slow), "transformer"]


def parsed(words: str) -> TrainConfig:
    return parse(words.split(), "", resumed)


def on_meta(c: HopeConfig) -> Hope:
    """A model without memory."""
    with torch.device("meta"):
        return Hope(c)


# The set-ups of the presets


def test_a_preset_brings_the_paper_s_training_set_up():
    tokens = {"30m": 0.6e9, "125m": 2.5e9, "340m": 15e9, "760m": 30e9, "1.3b": 100e9}
    assert set(SETUPS) == set(tokens) == set(PRESETS) - {"nano"}
    for preset in SETUPS:
        config = parsed(f"--preset {preset}")
        assert config.tokens == tokens[preset]
        assert config.seq_len == 4096 and config.tokens_per_step == 2**19
        assert (config.lr, config.min_lr_ratio, config.optimizer) == (4e-4, 0.1, "adamw")
        assert (config.weight_decay, config.grad_clip) == (0.1, 1.0)
        assert 0 < config.warmup < 0.1 and config.batch_size % config.micro_batch == 0


@pytest.mark.slow
@pytest.mark.parametrize("preset", SETUPS)
def test_a_set_up_fills_a_gpu_of_80_gb_with_programs_of_the_kernels(preset):
    """One program for each row and head; twice the rows take a second turn, or do not fit."""
    pytest.importorskip("triton")
    config = parsed(f"--preset {preset}")
    c = HopeConfig.preset(preset)
    size = sum(p.numel() for p in on_meta(c).parameters())
    costs = plan.memory(c, config, kernels=True)
    rows = config.micro_batch

    def total(rows):
        return plan.per_gpu(size, 0, 0, config, 1, rows, costs)["total"]

    assert rows * c.n_heads <= 132 and total(rows) <= plan.USABLE * 80e9
    assert 2 * rows * c.n_heads > 132 or total(2 * rows) > plan.USABLE * 80e9


def test_flags_override_the_set_up_of_a_preset():
    config = parsed("--preset 340m --tokens 1e9 --lr 1e-3 --batch-size 64 --data stdlib")
    assert (config.tokens, config.lr, config.batch_size) == (10**9, 1e-3, 64)
    assert (config.data, config.seq_len) == ("stdlib", 4096)


def test_without_a_preset_nothing_is_set():
    assert parsed("") == TrainConfig() == parsed("--preset nano")


# Memory


@pytest.mark.parametrize("model", MODELS)
def test_memory_of_tensors_without_data_is_that_of_tensors_with_data(model):
    options = {} if model == "hope" else {"recompute": True, "optimizer": "muon"}
    config = TrainConfig(model=model, **options)
    c = HopeConfig.preset("nano", model, **TINY)
    fake, real = (plan.measure(c, config, 2, 128, fake) for fake in (True, False))
    for what in ("kept", "extra", "optimizer"):
        assert fake[what] == pytest.approx(real[what], rel=0.02), what
    assert not any(p.is_meta for p in Hope(c).parameters())  # nothing of it is left behind


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.slow
def test_memory_of_many_layers_and_rows_is_that_of_few(model):
    config = TrainConfig(model=model, seq_len=128)
    c = HopeConfig.preset("nano", model, **TINY | {"n_layers": 4})
    activations, optimizer, _ = plan.memory(c, config)
    direct = plan.measure(c, config, 3, 128)
    assert 0.99 < activations(3) / (direct["kept"] + direct["extra"]) < 1.05
    assert optimizer == pytest.approx(direct["optimizer"], rel=0.02)


def test_adamw_holds_sixteen_bytes_a_parameter_and_fsdp_shards_them_all():
    config = TrainConfig(batch_size=8)
    c = HopeConfig.preset("nano", "transformer", **TINY)
    size = sum(p.numel() for p in Hope(c).parameters())
    costs = plan.memory(c, config)
    assert costs[1] == pytest.approx(8 * size, rel=1e-3)
    for fsdp, bytes_each in ((False, 16), (True, 2)):
        cost = plan.per_gpu(size, 0, 0, replace(config, fsdp=fsdp), 8, 1, costs)
        assert cost["total"] - cost["activations"] == pytest.approx(bytes_each * size, rel=1e-3)


def test_the_kernels_keep_less_than_torch_s_chunks():
    pytest.importorskip("triton")
    config = TrainConfig(seq_len=512)
    c = HopeConfig.preset("nano", "hope", **TINY | {"levels": [None]})
    torch_s, fused = (plan.measure(c, config, 2, 512, kernels=kernels) for kernels in (False, True))
    assert 0.5 * torch_s["kept"] < fused["kept"] < 0.9 * torch_s["kept"]
    assert fused["optimizer"] == torch_s["optimizer"]


# What computes the mixers


def computed_by(capability, model, **own):
    made = on_meta(HopeConfig.preset("nano", model, n_layers=2, **own))
    return plan.computed_by(made, plan.on_gpu(capability))


def test_what_computes_the_mixers_follows_from_the_model_and_the_gpu():
    pytest.importorskip("triton")
    for model in ("hope", "retnet", "gated_deltanet"):
        for capability in ((8, 0), (9, 0), (12, 0)):
            assert computed_by(capability, model) == plan.KERNELS
        assert computed_by((7, 5), model) == plan.TORCH
    for model in ("titans", "ttt_mlp", "samba", "titans_mal"):
        assert computed_by((9, 0), model) == plan.TORCH
    for own in ({"published": True}, {"momentum": True}, {"chunk": 256}, {"n_heads": 1}):
        assert computed_by((9, 0), "hope", **own) == plan.TORCH  # heads of 128 do not fit
    for model in ("transformer", "hope_attention"):
        assert computed_by((7, 5), model) == plan.ATTENTION


def test_a_dry_run_assumes_what_the_backend_reaches_and_says_so(monkeypatch, capsys):
    pytest.importorskip("triton")
    asked = []

    def little(c, train, *how):
        asked.append(how)
        return (lambda rows: 1e6 * rows), 1e6, 1e6

    monkeypatch.setattr(plan, "memory", little)
    hours = {}
    for model, gpu, more in (
        ("hope", "H100", ""),
        ("hope", "T4", ""),
        ("transformer", "H100", ""),
        ("hope", "H100", "--utilisation 0.5"),
    ):
        words = f"--model {model} --gpu {gpu} --gpus 1 --tokens 1e9 --dry-run {more}"
        assert train.main(words.split()) == 0
        out = capsys.readouterr().out
        by, at = out.splitlines()[4:6]
        hours[model, gpu, more] = by, at
    hope, old, attention, told = hours.values()
    assert "989 TFLOP/s in bfloat16; mixers by fused kernels, where they pass" in hope[0]
    assert "8.1 TFLOP/s in float32; mixers by torch, chunk by chunk" in old[0]
    assert attention[0].endswith("mixers by attention")
    for line, path in ((hope, plan.KERNELS), (old, plan.TORCH), (attention, plan.ATTENTION)):
        assert f"at {plan.MFU[path]:.0%} of that peak, an assumption" in line[1]
    assert told[1] == "time: at 50% of that peak, as --utilisation says"
    assert asked == [(True, True), (False, False), (False, True), (True, True)]


# What --compile would unroll


def test_compile_is_refused_where_it_would_unroll_many_chunks(monkeypatch):
    """Unless fused kernels take all chunks at once; a loop around them stays one."""
    models = {name: Hope(HopeConfig.preset("nano", name, **TINY)) for name in
              ("hope", "retnet", "titans", "samba", "transformer")}
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    longest = 64 * plan.MOST_UNROLLED  # tokens
    for name, model in models.items():
        asked = TrainConfig(compile=True, seq_len=longest)
        assert plan.compiles(model, asked, cpu)
        if name != "transformer":
            wanted = f"17 steps of torch's loop, .*--no-compile, or rows of at most {longest} tok"
            with pytest.raises(ValueError, match=wanted):
                plan.compiles(model, replace(asked, seq_len=longest + 64), cpu)
            assert not plan.compiles(model, TrainConfig(seq_len=longest + 64), gpu)
    monkeypatch.setattr("selfcheck.taken", lambda kernel: True)
    for name, model in models.items():
        loops = name in ("titans", "samba")
        assert plan.compiles(model, TrainConfig(seq_len=10**6), gpu) != loops
        assert not plan.compiles(model, TrainConfig(seq_len=10**6), cpu)
        with pytest.raises(ValueError) if loops else contextlib.nullcontext():
            plan.compiles(model, TrainConfig(seq_len=10**6, compile=True), gpu)


# The command


@pytest.mark.slow
def test_dry_run_counts_and_allocates_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = peak_memory("cpu")
    words = "--preset 1.3b --model transformer --dry-run --gpus 64 --gpu H100 --utilisation 0.5"
    assert train.main([*words.split(), "--fsdp"]) == 0
    out = capsys.readouterr().out
    c = HopeConfig.preset("1.3b", "transformer")
    with torch.device("meta"):
        size = sum(p.numel() for p in Hope(c).parameters())
    assert f"{size:,} parameters" in out and "190,735 steps of 128 rows of 4,096" in out
    assert "H100, 80 GB" in out
    hours = flops_per_token(c, 4096) * 190_735 * 2**19 / (64 * 989e12 * 0.5) / 3600
    line = next(line for line in out.splitlines() if line.split()[:1] == ["64"])
    assert line.split()[-3:] == ["yes", f"{hours:.1f}", "hours"]
    assert not list(tmp_path.iterdir())
    if before is not None:
        assert peak_memory("cpu") - before < 500  # MiB; the weights alone would take 5,000


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_refused_with_one_that_does(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--preset 340m --model transformer --dry-run --gpus 8 --gpu A10".split()
    assert train.main([*words, "--micro-batch", "16"]) == 2
    error = capsys.readouterr().err
    wanted = r"16 rows needs [\d.]+ GB, more than the 22.1 usable .*--micro-batch (\d+)"
    assert train.main([*words, "--micro-batch", re.search(wanted, error)[1]]) == 0


def test_bad_flags_of_a_dry_run_are_named(capsys):
    bad = {
        "--gpus 3": "batch_size must be a multiple of 3, the number of GPUs, got 4",
        "--gpus 0": "gpus must be at least 1, got 0",
        "--gpu H1000": "unknown gpu 'H1000': must be one of B200",
        "--utilisation 40": "utilisation must be above 0 and at most 1, of the peak, got 40.0",
        "--model hoep": "did you mean 'hope'",
    }
    for words, message in bad.items():
        assert train.main(["--dry-run", *words.split()]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_dry_run_knows_the_vocabulary_and_the_passes_of_shards(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    import data
    from support.corpus import load_corpus

    text = tmp_path / "a.txt"
    shards = str(tmp_path / "out")
    text.write_text("".join(f"{i} and {i * i}\n" for i in range(3000)))
    data.main(["text", str(text), "--vocab", "400", "--out", shards, "--jobs", "1"])
    held = len(load_corpus(shards).train)
    words = ["--dry-run", "--model", "transformer", "--data", shards, "--tokens", str(2 * held)]
    assert train.main(words) == 0
    out = capsys.readouterr().out
    assert f"{held:,} (2 passes)" in out and f"{400 * 128:,} of them the embedding" in out
