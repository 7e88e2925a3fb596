"""selfcheck.py: planted faults are found, verdicts are kept, and a process that dies is one too."""

import json
import logging
import subprocess
from types import SimpleNamespace

import pytest
import torch

import fused
import selfcheck
from hope import Hope, HopeConfig
from selfcheck import Case, compare
from support import run as runs
from train import kernel_gap

CPU = torch.device("cpu")
MODIFY = Case("self_modify", "float32", 16, chunk=8)
SCAN = Case("scan", "float32", 16, delta="series")


def planted(monkeypatch, fault):
    """`compare` takes torch, in float32 and with a fault, for the kernels: fault(f, args)."""
    functions = selfcheck.functions

    def with_fault(case):
        _, torchs = functions(case)

        def by_rows(*args):  # a batched product does not round alike in all of its rows
            parts = []
            for i in range(len(args[0])):
                row = []
                for x in args:
                    first = i % len(x) if torch.is_tensor(x) else 0
                    row.append(x[first : first + 1] if torch.is_tensor(x) else x)
                parts.append([y for y in torchs(*row) if y is not None])
            return [torch.cat(ys) for ys in zip(*parts, strict=True)]

        return lambda *args: fault(by_rows, args), torchs

    monkeypatch.setattr(selfcheck, "functions", with_fault)


def test_what_is_right_passes(monkeypatch):
    planted(monkeypatch, lambda f, args: f(*args))
    for case in (MODIFY, SCAN):
        error, wrong = compare(case, CPU, 3, 37)
        assert wrong == []
        assert 0 < error < 1e-5


def test_one_wrong_program_out_of_all_is_found(monkeypatch):
    def fault(f, args):
        y, *rest = f(*args)
        off = torch.zeros(y.shape)
        off[13, 5, 3] = 1e-6
        return y + off, *rest

    planted(monkeypatch, fault)
    assert "output 0 differs between programs with equal inputs" in compare(MODIFY, CPU, 3, 37)[1]


def test_a_tail_that_is_not_written_is_found(monkeypatch):
    def fault(f, args):
        y, *rest = f(*args)
        out = y.new_empty(y.shape)
        whole = torch.arange(y.shape[1]) < 36
        return torch.where(whole[:, None], y, out), *rest

    planted(monkeypatch, fault)
    wrong = compare(SCAN, CPU, 3, 37)[1]
    assert "output 0 changes from run to run, or is not written" in wrong


def test_a_race_is_found(monkeypatch):
    """As without a barrier: sometimes a tile reads what the one before has not yet written."""
    calls = []

    def fault(f, args):
        calls.append(1)
        y, *rest = f(*args)
        if len(calls) == 2:
            y = torch.cat([y[:, :16], y[:, 15:-1]], 1)
        return y, *rest

    planted(monkeypatch, fault)
    assert "output 0 changes from run to run, or is not written" in compare(SCAN, CPU, 3, 37)[1]


@pytest.mark.parametrize("case, gates", [(MODIFY, (4, 5)), (SCAN, (3, 4))], ids=["modify", "scan"])
def test_swapped_gates_are_found(case, gates, monkeypatch):
    def fault(f, args):
        args = list(args)
        i, j = gates
        args[i], args[j] = args[j], args[i]
        return f(*args)

    planted(monkeypatch, fault)
    wrong = compare(case, CPU, 3, 37)[1]
    assert any(message.startswith("output 0 differs from torch") for message in wrong)


def test_a_wrong_gradient_is_found_by_itself(monkeypatch):
    def fault(f, args):
        x, *rest = args
        return f(x.detach() + 0.999 * (x - x.detach()), *rest)

    planted(monkeypatch, fault)
    assert compare(MODIFY, CPU, 3, 37)[1] == ["gradient 0 differs from torch by 0.001, relatively"]


@pytest.mark.slow
def test_the_interpreted_kernel_passes():
    assert compare(Case("scan", "float32", 16, momentum=True, delta=0.0), CPU, 2, 21)[1] == []


# --------------------------------------------------------------------------------------------------
# Verdicts


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU of which only the name is known; returns what the comparisons are to say, in turn."""
    properties = SimpleNamespace(name="Card", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Card")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("TRITON_PTXAS_PATH", "DISABLE_MMA_V3"):  # set and deleted: restored at the end
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(selfcheck, "VERDICTS", {})
    monkeypatch.setattr(selfcheck.shutil, "which", lambda name, path=None: "/cuda/bin/ptxas")
    answers = []

    def answered(command, env, **options):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(subprocess, "run", answered)
    monkeypatch.setattr(selfcheck, "driver", lambda: "580")
    return answers


def says(wrong=(), error=1e-3):
    line = json.dumps({"error": error, "wrong": list(wrong), "seconds": 3.1})
    return SimpleNamespace(stdout=f"noise\n{line}\n", stderr="", returncode=0)


class Like:
    """As much of a tensor as `kernels_for` asks for."""

    is_cuda = True
    dtype = torch.bfloat16

    def get_device(self):
        return 0


def asked():
    return selfcheck.why_not("self_modify", Like(), 64, chunk=64)


def test_a_verdict_is_asked_for_once_and_kept_for_other_processes(gpu, caplog):
    gpu.append(says())
    with caplog.at_level(logging.WARNING):
        assert asked() is None
        assert asked() is None
    text = "kernels: self_modify (bfloat16, width 64) passed on Card (3 s), in use"
    assert caplog.messages[-1] == text
    selfcheck.VERDICTS.clear()  # as in another process
    assert asked() is None


def test_a_change_of_the_kernels_the_chunk_or_the_driver_asks_again(gpu, monkeypatch, tmp_path):
    gpu += [says(), says(), says(), says()]
    assert asked() is None
    selfcheck.VERDICTS.clear()
    monkeypatch.setattr(selfcheck, "driver", lambda: "590")
    assert asked() is None
    assert selfcheck.why_not("self_modify", Like(), 64, chunk=32) is None
    for name in ("kernels.py", "selfcheck.py"):
        (tmp_path / name).write_text("changed")
    monkeypatch.setattr(selfcheck, "ROOT", tmp_path)
    selfcheck.VERDICTS.clear()
    assert asked() is None
    assert gpu == []


def test_a_process_that_dies_is_followed_by_another_compiler(gpu, caplog, monkeypatch):
    gpu.append(SimpleNamespace(stdout="", stderr="x\nCUDA error: illegal access\n", returncode=1))
    gpu.append(says())
    with caplog.at_level(logging.WARNING):
        assert asked() is None
    found = "\n".join(caplog.messages)
    assert "failed on Card: CUDA error: illegal access" in found
    assert "in use, with TRITON_PTXAS_PATH=/cuda/bin/ptxas" in found
    assert selfcheck.os.environ["TRITON_PTXAS_PATH"] == "/cuda/bin/ptxas"


def test_where_nothing_passes_torch_computes_and_says_so(gpu, caplog, monkeypatch):
    import kernels

    monkeypatch.setattr(kernels, "unfit", lambda *args: None)
    fused._log_once.cache_clear()
    gpu += [subprocess.TimeoutExpired("python", 600), says(["output 0 differs"]), says(["y"])]
    with caplog.at_level(logging.WARNING):
        assert fused.kernels_for("self_modify", Like(), 64, chunk=64) is None
    assert "not done after 600 s" in caplog.text
    assert "with DISABLE_MMA_V3=1: y" in caplog.text
    assert caplog.messages[-1].endswith("they failed the comparison with torch on this GPU")
    assert "DISABLE_MMA_V3" not in selfcheck.os.environ


def test_a_compiled_graph_takes_only_what_was_settled_before(gpu, monkeypatch):
    gpu.append(says())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "before the model was compiled" in asked()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    assert asked() is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert asked() is None


def test_what_one_process_refuses_none_takes(monkeypatch):
    one, two = (("self_modify", torch.bfloat16, 64, n, False, 1.0) for n in (64, 32))
    monkeypatch.setattr(selfcheck, "VERDICTS", {one: None, two: None})
    assert selfcheck.taken("self_modify")
    selfcheck.agree(lambda mine: [mine, {one: "failed", two: None}])
    assert selfcheck.VERDICTS == {one: "failed", two: None}
    assert not selfcheck.taken("self_modify")
    assert not selfcheck.taken("scan")


def test_a_verdict_is_read_within_a_compiled_graph(monkeypatch):
    key = ("self_modify", torch.float32, 64, 64, False, 1.0)
    monkeypatch.setattr(selfcheck, "VERDICTS", {key: None})

    def f(x):
        return x + 1 if selfcheck.why_not("self_modify", x, 64, chunk=64) is None else x

    assert torch.compile(f, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 1


def test_opening_a_run_on_a_gpu_asks_for_what_its_mixers_need(monkeypatch):
    asked_for = []

    def spy(kernel, x, width, backend, **case):
        asked_for.append((kernel, width, case))

    monkeypatch.setattr("titans.kernels_for", spy)
    monkeypatch.setattr("memory.kernels_for", spy)
    monkeypatch.setattr(runs, "precision", lambda device: torch.autocast("cpu", enabled=False))
    model = runs.Hope(HopeConfig(d_model=32, n_layers=1, n_heads=2, chunk=8))
    gpu = SimpleNamespace(type="cuda")
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **kw: zeros(*shape, **kw))
    runs.settle_kernels(model, gpu)
    assert asked_for == [("self_modify", 16, {"chunk": 8})]


def test_the_gap_between_kernels_and_torch_is_that_of_their_gradients():
    """On a CPU both are torch; of a mixer that insists on the kernels it is rounding."""
    torch.manual_seed(0)
    model = Hope(HopeConfig(d_model=32, n_layers=1, n_heads=2, chunk=8, levels=[None]))
    tokens = torch.randint(257, (1, 18))
    assert kernel_gap(model, tokens[:, :-1], tokens[:, 1:]) == 0
    model.blocks[0].mixer.backend = "triton"
    assert 0 < kernel_gap(model, tokens[:, :-1], tokens[:, 1:]) < 1e-4
    assert model.blocks[0].mixer.backend == "triton"
    assert all(p.grad is None for p in model.parameters())
