"""One way to open a run: what is read from its folder, what is said where something is wrong."""

import contextlib
import json
import logging
import shutil

import pytest
import torch

from hope import Hope, HopeConfig
from support import checkpoint, run
from support.run import Run, precision, product_type

TINY = {"vocab_size": 257, "d_model": 16, "n_layers": 2, "n_heads": 2, "hidden": 24, "chunk": 4}


def save_weights(folder, model, step=1):
    checkpoint.save(folder, model, torch.optim.SGD(model.parameters()), step)


def run_folder(path, **changes):
    """A tiny run folder as train.py writes it -> its model."""
    model = Hope(HopeConfig(**(TINY | changes)))
    path.mkdir(exist_ok=True)
    everything = {"model": model.config.to_dict(), "train": {}, "tokenizer": "bytes", "corpus": {}}
    (path / "config.json").write_text(json.dumps(everything))
    save_weights(path, model)
    return model


@pytest.mark.parametrize("name", ["hope", "titans", "gated_deltanet", "samba"])
def test_a_run_folder_opens_to_the_same_model(name, tmp_path):
    model = run_folder(tmp_path / "x", model=name)
    run = Run.open(tmp_path / "x")
    x = torch.randint(257, (1, 9), device=run.device)
    assert run.encoding.name == "bytes" and not run.model.training
    assert run.model.config == model.config
    assert torch.equal(run.model(x)[0].cpu(), model(x.cpu())[0])


def test_projections_of_old_checkpoints_are_found_under_their_old_names(tmp_path, monkeypatch):
    old = run_folder(tmp_path / "x", model="gated_deltanet")
    named = {}
    for name, tensor in old.state_dict().items():
        name = name.replace(".in_proj.", ".proj.").replace(".out_proj.", ".out.")
        named[name] = tensor
    monkeypatch.setattr(old, "state_dict", lambda: named)
    save_weights(tmp_path / "x", old, step=2)
    monkeypatch.undo()
    new = Run.open(tmp_path / "x").model.cpu()
    for name, tensor in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], tensor), name


def test_opening_names_what_is_wrong_with_a_run_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nowhere is not the folder of a run: it has no config"
    ):
        Run.open(tmp_path / "nowhere")
    run = tmp_path / "x"
    run_folder(run)
    wrong = "checkpoints/step-1 is of another model than config.json's: .* is .*, not"
    for changes in ({"d_model": 32}, {"n_layers": 3}, {"memory": "mlp"}, {"model": "transformer"}):
        save_weights(run, Hope(HopeConfig(**(TINY | changes))))
        with pytest.raises(ValueError, match=wrong):
            Run.open(run)
    (run / "checkpoints/step-1/rest.pt").unlink()
    with pytest.raises(ValueError, match="checkpoints/step-1 is .*rest.pt does not exist"):
        Run.open(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="x/checkpoints has no checkpoint"):
        Run.open(run)


def test_opening_names_a_damaged_config(tmp_path):
    run_folder(tmp_path / "x")
    saved = json.loads((tmp_path / "x/config.json").read_text())
    bad = [
        "{half",
        "{}",
        json.dumps(saved | {"model": {"no_such_field": 1}}),
        json.dumps(saved | {"model": {"chunk": 0}}),
        json.dumps(saved | {"train": {"no_such_field": 1}}),
        json.dumps(saved | {"model": TINY | {"vocab_size": 300}}),
    ]
    for text in bad:
        (tmp_path / "x/config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json|vocabulary of 300"):
            Run.open(tmp_path / "x")


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_products_are_in_bfloat16_only_where_the_gpu_has_it(monkeypatch, caplog):
    gpu = torch.device("cuda")
    asked = []

    def supported(including_emulation=True):
        asked.append(including_emulation)
        return including_emulation or has

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    for has, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        run._has_bfloat16.cache_clear()
        with caplog.at_level(logging.WARNING):
            for device in (gpu, torch.device("cuda:0"), gpu):
                assert product_type(device) == dtype
        kind = torch.autocast if has else contextlib.nullcontext
        assert isinstance(precision(gpu), kind)
        assert product_type(torch.device("cpu")) == torch.float32
    run._has_bfloat16.cache_clear()
    assert set(asked[:2]) == {False}  # later ones are torch's own
    assert [record.getMessage() for record in caplog.records] == [
        "Tesla T4 has no bfloat16, which would be emulated: matrix products are in float32"
    ]
