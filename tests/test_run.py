"""One way to open a run: what is read from its folder, what is said where something is wrong."""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import threading

import numpy as np
import pytest
import torch
from torch import nn

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
    everything = {"model": model.config.to_dict(), "train": {}, "tokenizer": "bytes"}
    everything["corpus"] = {"name": "a text"}
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
    rest = run / "checkpoints/step-1/rest.pt"
    rest.unlink()
    with pytest.raises(ValueError, match="checkpoints/step-1 is .*rest.pt does not exist"):
        Run.open(run)
    os.mkfifo(rest)
    with pytest.raises(ValueError, match="checkpoints/step-1 is .*rest.pt .* is no file"):
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
        json.dumps(saved | {"tokenizer": 5}),
        json.dumps(saved | {"tokenizer": ["bytes"]}),
        json.dumps(saved | {"corpus": None}),
        json.dumps(saved | {"model": []}),
        "[" * 100_000,
        "5",
    ]
    for text in bad:
        (tmp_path / "x/config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json|vocabulary of 300") as caught:
            Run.open(tmp_path / "x")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", ["n_layers", "d_model", "hidden"])
def test_sizes_are_compared_with_the_checkpoint_before_anything_is_allocated(tmp_path, size):
    run_folder(tmp_path / "x")
    path = tmp_path / "x/config.json"
    saved = json.loads(path.read_text())
    saved["model"][size] = 10**6  # n_layers: minutes; d_model: 4 TB
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="step-1 is of another model than config.json's.*1000000"):
        Run.open(tmp_path / "x")


# What a disk, another process or a user does to a run folder


def flipped(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << at % 8
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "rest.pt"])
def test_no_flipped_byte_of_a_checkpoint_is_loaded(tmp_path, name):
    path = checkpoint.folder(tmp_path, 1) / name
    model = run_folder(tmp_path)
    optimizer = torch.optim.SGD(model.parameters())
    expected = [t.clone() for t in model.state_dict().values()], str(optimizer.state_dict())
    whole = path.read_bytes()
    refused = 0
    for at in np.random.default_rng(0).integers(len(whole), size=40):
        flipped(path, int(at))
        try:
            assert checkpoint.load(tmp_path, model, optimizer) == 1
            found = model.state_dict().values(), str(optimizer.state_dict())
            assert all(map(torch.equal, found[0], expected[0])) and found[1] == expected[1], at
        except ValueError as error:
            assert "checkpoints/step-1 is damaged" in str(error) and "\n" not in str(error)
            refused += 1
        path.write_bytes(whole)
    assert refused > 10  # the others are padding, and names that nothing reads


def test_no_flipped_byte_of_a_state_is_loaded(tmp_path):
    state = {"W": torch.randn(40, 40), "step": 7}
    path = tmp_path / "state.pt"
    checkpoint.save_state(state, path)
    whole = path.read_bytes()
    refused = 0
    for at in np.random.default_rng(0).integers(len(whole), size=60):
        flipped(path, int(at))
        try:
            found = checkpoint.load_state(path)
            assert torch.equal(found["W"], state["W"]) and found["step"] == 7, at
        except ValueError as error:
            assert "state.pt is truncated or damaged" in str(error) and "\n" not in str(error)
            refused += 1
        path.write_bytes(whole)
    assert refused > 40


def test_a_checkpoint_with_a_flipped_byte_is_passed_over(tmp_path, capsys):
    model = run_folder(tmp_path)
    with torch.no_grad():
        model.norm.weight.add_(1)
    save_weights(tmp_path, model, step=2)
    checkpoint.save(tmp_path, model, torch.optim.SGD(model.parameters()), 3, keep=3)
    flipped(checkpoint.folder(tmp_path, 3) / "__0_0.distcp", 3000)
    assert Run.open(tmp_path, "cpu").step == 2
    assert re.search("step-3 is damaged .the checksum of .* differs.", capsys.readouterr().err)


def test_a_refused_pickle_does_not_advise_to_run_it(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save(Evil(), tmp_path / "state.pt")
    message = r"state.pt is truncated or damaged \(it holds more than plain data\)$"
    with pytest.raises(ValueError, match=message):
        checkpoint.load_state(tmp_path / "state.pt")


def test_rest_of_another_step_or_with_files_elsewhere_is_damage(tmp_path):
    run_folder(tmp_path)
    path = checkpoint.folder(tmp_path, 1) / "rest.pt"
    kept = checkpoint.load_file(path)
    elsewhere = kept["sizes"] | {"../../config.json": (tmp_path / "config.json").stat().st_size}
    for damage, message in [
        ({"rest": kept["rest"] | {"step": 5}}, "rest.pt is of step 5"),
        ({"rest": kept["rest"] | {"step": None}}, "rest.pt is of step None"),
        ({"rest": []}, "is damaged"),
        ({"sizes": elsewhere}, "../../config.json has"),
        ({"sizes": {".metadata": kept["sizes"][".metadata"]}}, "is damaged .*__0_0.distcp"),
        ({"sizes": {}}, ".metadata has .* bytes of 0"),
    ]:
        torch.save(kept | damage, path)
        with pytest.raises(ValueError, match=message) as caught:
            Run.open(tmp_path, "cpu")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [1, 2])
def test_only_whole_checkpoints_count_as_kept_and_foreign_names_are_left_alone(tmp_path, keep):
    model = run_folder(tmp_path)

    def save(step, keep):
        checkpoint.save(tmp_path, model, torch.optim.SGD(model.parameters()), step, keep)

    for step in (2, 3, 4):
        save(step, keep=3)
    flipped(checkpoint.folder(tmp_path, 4) / "__0_0.distcp", 3000)  # of the right size
    (checkpoint.folder(tmp_path, 3) / "rest.pt").write_bytes(b"torn")
    foreign = ["step-999999", "step-x", "step-007", "notes", "notes.tmp"]
    for name in foreign:
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints/step-5").write_text("a file")
    assert checkpoint.load(tmp_path, model) == 2
    save(3, keep)  # of the run that went on from there
    assert checkpoint.load(tmp_path, model) == 3
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {*foreign, "step-5", "step-4", "step-3", *["step-2"] * (keep == 2)}


def test_a_torn_newest_checkpoint_never_costs_the_good_ones(tmp_path):
    model = run_folder(tmp_path)
    for step in (2, 3):
        checkpoint.save(tmp_path, model, torch.optim.SGD(model.parameters()), step, keep=2)
    (checkpoint.folder(tmp_path, 3) / "__0_0.distcp").write_bytes(b"torn")
    checkpoint.save(tmp_path, model, torch.optim.SGD(model.parameters()), 2, keep=1)
    assert checkpoint.load(tmp_path, model) == 2


def test_a_lock_names_its_owner_and_that_of_a_dead_process_is_free(tmp_path):
    path = tmp_path / "lock"
    ready, told = os.pipe()
    owner = os.fork()
    if not owner:
        with checkpoint.locked(path):
            os.write(told, b"held")
            signal.pause()
    os.read(ready, 4)
    message = f"{tmp_path} is written by process {owner} on {socket.gethostname()}: wait"
    with pytest.raises(ValueError, match=message), checkpoint.locked(path):
        pass
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    assert path.exists()
    with checkpoint.locked(path):
        assert f"process {os.getpid()} " in path.read_text()
    assert not path.exists()


def test_lines_of_the_log_that_are_torn_or_foreign_are_skipped_alone(tmp_path, capsys):
    run_folder(tmp_path)
    run = Run.open(tmp_path)
    good = [{"step": step, "tokens": 32 * step} for step in range(4)]
    lines = [json.dumps(record) for record in good]
    bad = ['{"step": 1, "tok', "5", "[]", '{"note": "mine"}', '{"step": "1", "tokens": "2"}']
    bad += ["[" * 100_000, "\xff"]
    text = "\n".join([*lines[:2], "", *bad, *lines[2:]])
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    assert run.metrics() == good
    warning = f"warning: 7 lines of {tmp_path / 'metrics.jsonl'} do not count: "
    assert capsys.readouterr().err.startswith(warning)


def test_results_of_several_evaluations_are_all_kept_and_name_the_tokens_of_the_checkpoint(
    tmp_path, capsys
):
    run_folder(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "tokens": 1855488}\n')
    run = Run.open(tmp_path)
    assert run.facts()["training_tokens"] == 1 * run.config.tokens_per_step
    threads = [threading.Thread(target=run.record, args=[{str(i): i}]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads((tmp_path / "eval.json").read_text()) == {str(i): i for i in range(8)}
    (tmp_path / "eval.json").write_text("torn")
    run.record({"a": 1})
    assert (tmp_path / "eval.json").read_text() == "torn"
    assert "eval.json is damaged and stays so" in capsys.readouterr().err
    shutil.rmtree(tmp_path)  # or a disk that is full
    run.record({"a": 1})
    assert re.match("warning: .*eval.lock'$", capsys.readouterr().err)


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


def test_parameters_that_are_single_numbers_are_in_the_checkpoint(tmp_path):
    saved, empty = nn.Module(), nn.Module()
    for module, value in ((saved, 1.0), (empty, 5.0)):
        module.number = nn.Parameter(torch.tensor(value))
        module.row = nn.Parameter(torch.full((2,), value))
    checkpoint.save(tmp_path, saved, torch.optim.AdamW(saved.parameters()), 3)
    assert checkpoint.load(tmp_path, empty) == 3
    assert empty.number == 1 and empty.row.tolist() == [1, 1]
