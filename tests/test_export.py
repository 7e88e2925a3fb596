"""Runs as files for others, and files of others read as runs are: the same model, to the bit."""

import json
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
from hope import Hope, HopeConfig
from support import export as exporting
from support.config import TrainConfig
from support.pretrained import from_pretrained
from support.run import Run
from support.vocabulary import PROBE, encode, tokenizer, train_tokenizer

safetensors = pytest.importorskip("safetensors.torch", reason="optional: pip install safetensors")

SIZES = {"d_model": 32, "n_layers": 3, "n_heads": 2, "hidden": 48}
CONFIGS = {
    "Hope": {"model": "hope", "levels": [4, 8, None], "cms_blocks": 2},
    "Hope-Attention": {"model": "hope_attention", "levels": [4, None], "variant": "independent"},
    "its levels off": {"model": "hope_attention", "levels": [4, None], "cms_updates": "off"},
    "Samba": {"model": "samba"},
    "Transformer": {"model": "transformer"},
    "static Hope-Attention": {"model": "hope_attention", "levels": [None]},
}
PLAIN = ("Transformer", "static Hope-Attention")


def run_of(encoding=None, **fields):
    """An untrained run with weights that are all different."""
    torch.manual_seed(0)
    encoding = encoding or tokenizer("bytes")
    model = Hope(HopeConfig(**({"vocab_size": encoding.n_vocab} | SIZES | fields))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    config = TrainConfig(model=model.config.model, seq_len=64)
    saved = {"corpus": {"name": "a text"}}
    return Run(config, model, encoding, torch.device("cpu"), Path("x"), saved=saved)


def logits(model, x):
    with torch.no_grad():
        y = model(x)
    return y.logits if hasattr(y, "logits") else y[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_is_read_back_to_the_bit(name, tmp_path):
    run = run_of(**CONFIGS[name])
    exporting.export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == ("llama" if name in PLAIN else "hope")
    again = from_pretrained(tmp_path / "out")
    x = torch.randint(257, (2, 21))
    assert logits(again, x).equal(logits(run.model, x))
    if name not in PLAIN:
        assert again.config == run.model.config
        for key, w in run.model.state_dict().items():
            assert again.state_dict()[key].equal(w), key
    card = (tmp_path / "out/README.md").read_text()
    assert f"{sum(p.numel() for p in run.model.parameters()):,} parameters" in card


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "transformer"},
        {"model": "hope_attention", "levels": [None], "variant": "independent", "tied": False},
        {"model": "hope_attention", "levels": [None], "rope_base": 500.0, "norm_eps": 1e-3},
        {"model": "hope_attention", "levels": [None], "rope_factors": [1.0, 1, 1, 2, 3, 4, 8, 8]},
    ],
    ids=["Transformer", "mixing weights", "RoPE's base", "RoPE's factors"],
)
def test_without_learning_levels_it_is_a_llama_of_transformers(fields, tmp_path):
    transformers = pytest.importorskip("transformers", reason="optional: pip install transformers")
    run = run_of(**fields)
    exporting.export(run, tmp_path / "out")
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    x = torch.randint(257, (2, 64))
    expected = logits(run.model, x)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(llama, x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(from_pretrained(tmp_path / "out"), x), expected)
    bpe = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert bpe(PROBE)["input_ids"] == [*PROBE.encode()] and bpe.eos_token_id == 256


def test_its_tokenizer_is_the_same_there_and_here(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="optional: pip install tokenizers")
    text = Path(__file__).read_text() * 3
    run = run_of(train_tokenizer(iter([text.encode()]), 600), model="transformer")
    exporting.export(run, tmp_path / "out")
    path = str(tmp_path / "out/tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(path)
    ours = tokenizer(path)
    for said in (text, PROBE, "It's\t\t12345 \u00e9\u00e9 <x>\r\n\n  \U0001f600"):
        expected = encode(said.encode(), run.encoding).tolist()
        assert theirs.encode(said).ids == expected
        assert encode(said.encode(), ours).tolist() == expected
        assert theirs.decode(expected) == said
    assert (ours.n_vocab, ours.eot_token) == (600, run.encoding.eot_token)


LIES = {
    "layers": (lambda c: c["hope"].update(n_layers=10**7), "must have 10000000 blocks, got 3"),
    "endless": (lambda c: c["hope"].update(n_layers=10**12, hidden=None), "1000000000000 blocks"),
    "overflow": (lambda c: c["hope"].update(d_model=2**40), "no export of Hope: RuntimeError"),
    "vocabulary": (lambda c: c["hope"].update(vocab_size=2**62), "no export of Hope: RuntimeError"),
    "width": (lambda c: c["hope"].update(hidden=3 * 2**40), "the file has"),
    "field": (lambda c: c["hope"].update(wings=2), "no export of Hope: TypeError.*wings"),
    "model": (lambda c: c["hope"].update(model="bird"), "model must be|unknown model"),
    "nothing": (lambda c: c.pop("hope"), "no export of Hope: KeyError"),
    "a list": (lambda c: c.update(hope=[1]), "no export of Hope: TypeError"),
}


@pytest.mark.parametrize("name", LIES)
def test_an_export_that_lies_is_refused_before_a_model_is_made(name, tmp_path):
    exporting.export(run_of(**CONFIGS["Hope"]), tmp_path / "out")
    path = tmp_path / "out/config.json"
    config = json.loads(path.read_text())
    lie, message = LIES[name]
    lie(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_weights_of_an_export_that_are_lost_or_too_many_are_named(tmp_path):
    exporting.export(run_of(**CONFIGS["Hope"]), tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    weights = safetensors.load_file(file)
    safetensors.save_file(weights | {"wings": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="wings is nothing, the file has .2."):
        from_pretrained(tmp_path / "out")
    weights.pop("norm.weight")
    safetensors.save_file(weights, file)
    with pytest.raises(ValueError, match="norm.weight is .32., the file has nothing"):
        from_pretrained(tmp_path / "out")


def test_an_export_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = run_of(model="transformer")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="FOLDER must be new, .*taken' exists"):
        exporting.export(run, tmp_path / "taken")

    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "save_file", full)
        with pytest.raises(OSError, match="no space left"):
            exporting.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="export needs safetensors: pip install safetensors"):
        exporting.export(run, tmp_path / "out")


# --------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """(run, folder of its export), in a working folder of their own."""
    monkeypatch.chdir(tmp_path)
    run = run_of(model="hope_attention", levels=[16, None], cms_updates="first_order")
    exporting.export(run, "out")
    Path("text.txt").write_text("one two three four five six seven eight nine ten\n" * 8)
    return run


def test_the_command_exports_a_run(exported, monkeypatch, capsys):
    monkeypatch.setattr(Run, "open", lambda folder, device: exported)
    assert exporting.main(["run", "new"]) == 0
    assert "run is in new" in capsys.readouterr().out
    assert exporting.main(["run", "new"]) == 2
    assert "hope.py: error: FOLDER must be new" in capsys.readouterr().err
    assert exporting.main(["run"]) == 2
    monkeypatch.undo()
    assert exporting.main(["no/run", "other"]) == 2
    assert "no/run is not the folder of a run" in capsys.readouterr().err


def test_eval_reads_a_checkpoint_as_it_reads_a_run(exported, capsys):
    words = ["--pretrained", "out", "--device", "cpu", "--data", "text.txt"]
    assert evaluation.main(words) == 0
    bits = {}
    for updates in ("first_order", "full", "off"):
        assert evaluation.main([*words, "--cms-updates", updates]) == 0
        made = json.loads(Path("runs/pretrained-out/eval.json").read_text())
        assert made["cms_steps_in_context"] == updates
        exported.model.config.cms_updates = updates
        exported.config.batch_size = 1
        expected = evaluation.score(exported, "text.txt")
        bits[updates] = made["bits_per_byte"]
        assert bits[updates] == pytest.approx(expected["bits_per_byte"], abs=1e-6)
    assert bits["first_order"] == pytest.approx(bits["full"], abs=1e-6)
    assert abs(bits["first_order"] - bits["off"]) > 1e-4
    assert "CMS steps in context first_order" in capsys.readouterr().out
    assert not Path("runs/out").exists()  # it may be the run that was exported
    assert evaluation.main([*words, "--tasks", "position", "--context", "128"]) == 0
    assert "unknown training tokens of texts of others" in capsys.readouterr().out
    assert Path("runs/pretrained-out/position.png").exists()


def test_a_llama_of_others_learns_only_where_it_is_asked_to(exported, capsys):
    exporting.export(run_of(model="transformer"), "llama")
    config = json.loads(Path("llama/config.json").read_text())
    config.pop("cms_levels")
    Path("llama/config.json").write_text(json.dumps(config))
    run = Run.pretrained("llama", "cpu")
    assert (run.model.config.cms_updates, run.model.config.levels) == ("off", [512, None])
    assert Run.pretrained("llama", "cpu", "first_order").model.config.cms_updates == "first_order"
    assert run.facts()["model"] == "hope_attention (llama)"


def test_results_of_an_export_name_the_model_it_is(exported):
    exporting.export(run_of(model="samba"), "x")
    assert Run.pretrained("x", "cpu").facts()["model"] == "samba (x)"


def test_eval_names_what_it_lacks(exported, capsys):
    for words, message in (
        ([], "needs the folder of a run, or --pretrained PATH"),
        (["run", "--pretrained", "out"], "needs the folder of a run, or --pretrained PATH"),
        (["--pretrained", "out"], "no held-out text: name one with --data"),
        (["--pretrained", "none", "--data", "text.txt"], "none is no readable checkpoint"),
        (["--pretrained", "out", "--cms-updates", "on", "--data", "text.txt"], "cms_updates"),
    ):
        assert evaluation.main([*words, "--device", "cpu"]) == 2, words
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not Path("runs").exists()


def test_lm_eval_finds_the_model_in_its_own_registry(exported):
    pytest.importorskip("lm_eval", reason="pip install -r requirements-eval.txt")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from bench import lm_eval_model  # noqa: F401
    from bench.harness import adapter
    from bench.scorer import Scorer

    request = [Instance("loglikelihood", {}, ("one two three four five", " six seven"), 0)]
    found = {}
    made = get_model("hope").create_from_arg_obj
    config = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    with pytest.raises(TypeError, match="cms_update"):
        made({"path": "out", "cms_update": "off"}, config)
    for updates in ("off", "first_order"):
        model = made({"path": "out", "cms_updates": updates}, config)
        exported.model.config.cms_updates = updates
        own = adapter(Scorer(exported.model, exported.encoding), 64)
        found[updates] = model.loglikelihood(request)[0][0]
        assert found[updates] == pytest.approx(own.loglikelihood(request)[0][0], abs=1e-5)
    assert abs(found["off"] - found["first_order"]) > 1e-5
