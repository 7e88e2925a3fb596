"""Seeded wrong calls of the public functions and commands: does each say what is wrong?

    python tests/fuzz.py --calls 10000 --seed 0        # a report; exit status 1 where it fails
    python tests/fuzz.py --one 4711                    # one call again, with its traceback

A call is a legal one in which one argument is another, out of `SCALARS` or of what `spoiled` makes
of a tensor or state. Of every argument it is known which values are legal (True), which are not
(False), and where either answer is right (None). So the answer can be judged:

    right       a legal value works; an illegal one gives a ValueError or TypeError of one line
    unnamed     the same, but the message names neither the argument nor its value
    traceback   another exception
    silent      an illegal value is taken
    refused     a legal value is not
    hang        no answer in 20 seconds
    crash       the process died

Calls run in a process of their own with bounded memory; one that dies is begun again behind the
call that killed it.
"""

import argparse
import collections
import contextlib
import functools
import io
import math
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import baselines
import data
import eval as evaluation
import memory
import optimizers
import sample
import tasks
import train
from bench import thinking
from bench.__main__ import main as bench_main
from cms import CMS, Level
from hope import MIXERS, PRESETS, Hope, HopeConfig
from layers import map_state
from support.checkpoint import load_state, save_state
from support.config import TrainConfig
from support.corpus import batch, load_corpus
from support.run import Run
from support.vocabulary import tokenizer
from titans import NeuralMemory, SelfModifyingTitans

SECONDS = 20
CLEAN = (ValueError, TypeError)
OUTCOMES = ("right", "unnamed", "traceback", "silent", "refused", "hang", "crash")
SCALARS = [None, True, False, 0, 1, -1, 2, 3, 0.5, 2.5, -0.5, math.nan, math.inf, -math.inf]
SCALARS += [1e300, 10**30, "", "x", "hope", [], [1], [None], {}, (1, 2), b"x", object()]

# --------------------------------------------------------------------------------------------------
# Which values are legal


def a_number(value):
    return type(value) in (int, float)


def whole(low, high=math.inf, none=False):
    """An integer; what is huge, or a bool, may be taken or not. Above a finite `high` the call is
    not made: it would take as long as it was told to."""

    def legal(value):
        if value is None:
            return none
        if type(value) is bool or (type(value) is int and value > 10**6):
            return "not made" if high < math.inf else None
        return type(value) is int and low <= value <= high

    return legal


def number(check, none=False):
    def legal(value):
        if value is None:
            return none
        if type(value) is bool or (a_number(value) and abs(value) > 1e6 and check(value)):
            return None
        return a_number(value) and bool(check(value))

    return legal


positive = number(lambda v: 0 < v < math.inf)
at_least_0 = number(lambda v: 0 <= v < math.inf)
fraction = number(lambda v: 0 <= v < 1)


def one(*names):
    return lambda value: isinstance(value, str) and value in names


def maybe(*names):
    return lambda value: value is None or one(*names)(value)


def switch(value):
    return type(value) is bool


def either(value):
    return None


# --------------------------------------------------------------------------------------------------
# Tensors and states, spoiled


def spoiled(kind, value, rng):
    """(a value in place of a tensor or state, whether it is legal)."""
    if kind == "state":
        return rng.choice([
            ("x", False), (1, False), (torch.zeros(2), False), ({}, False), ([], False),
            ({"blocks": []}, False), ({"blocks": value["blocks"][:1]}, False),
            ({**value, "blocks": value["blocks"] * 2}, False),
            ({**value, "blocks": [None, *value["blocks"][1:]]}, False),
            (map_state(lambda t: torch.cat([t, t]), value), False),
            (map_state(lambda t: t.double(), value), None),
            (OTHER_STATE, False),
        ])
    choices = [
        (None, False), ("x", False), (value.tolist(), False), (value.numpy(), False),
        (1.0, False), (value.bool(), False),
        (value[..., None], None if "any rank" in kind else False),
        (value[0] if value.ndim > 1 else value.sum(), None if "any rank" in kind else False),
    ]
    if "ids" in kind:
        choices += [(value.float(), False), (value.int(), None), (value - 1000, False)]
        choices += [(value + 1000, False), (value[:, :0], None)]
    else:
        choices += [(value.long(), False), (value.to(torch.complex64), False)]
        choices += [(value.double(), None), (value.half(), None), (value[:0], None)]
        if "width" in kind:
            choices += [(value[..., :-1], False)]
    return rng.choice(choices)


# --------------------------------------------------------------------------------------------------
# What is called


@dataclass
class Target:
    """A legal call, and what is legal for its arguments: a predicate, or a kind of `spoiled`."""

    name: str
    call: object
    legal: dict
    args: dict
    clean: tuple = CLEAN
    command: bool = False  # its args are flags with values that are illegal already


TARGETS = []


def target(name, call, legal, clean=CLEAN, /, **args):
    TARGETS.append(Target(name, call, legal, args, clean))


def fixed(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TINY = dict(d_model=16, n_layers=2, n_heads=2, vocab_size=50, chunk=4, window=8)
IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


@functools.cache
def model_of(name):
    torch.manual_seed(0)
    levels = {"levels": [4, 8, None]} if name == "hope" else {}
    return Hope(HopeConfig(model=name, **TINY, **levels)).eval()


def state_of(name):
    with torch.no_grad():
        return model_of(name)(IDS)[1]


OTHER_STATE = state_of("deltanet")


def declare(folder):
    """Fill TARGETS. folder: for the files of those that read or write."""
    x = fixed(1, 2, 9, 16)
    W = fixed(2, 2, 8, 8)
    k = memory.l2norm(fixed(3, 2, 9, 8))
    u = fixed(4, 2, 9, 8)
    rate = torch.full((2, 9), 0.5)
    # leading dimensions broadcast, so that a rank less or more may be right
    wide = "width, any rank"
    rule = {"W": wide, "k": wide, "u": wide, "eta": "any rank", "alpha": "any rank", "q": wide}
    target(
        "memory.scan", memory.scan, rule | {
            "tile": whole(1), "backend": one("auto", "torch"), "delta": either,
        }, W=W, k=k, u=u, eta=rate, alpha=rate, q=k, tile=4, backend="auto", delta=1.0,
    )
    target(
        "memory.write", memory.write, {
            "k": wide, "target": wide, "eta": "any rank", "alpha": "any rank",
            "objective": one("l2", "dot"), "mode": one("token", "boundary"), "residual": either,
        }, layers=[fixed(5, 8, 8)], k=k, target=u, eta=rate, alpha=rate, objective="l2",
        mode="token", residual=True,
    )
    target("memory.read", memory.read, {"x": wide}, layers=[fixed(5, 8, 8)], x=k)
    target("optimizers.newton_schulz", optimizers.newton_schulz, {
        "G": "any rank", "steps": whole(0, 100),
    }, G=fixed(6, 4, 8), steps=5)

    # layers: how they are built, and what they read
    sizes = {"d_model": lambda v: whole(1)(v) and (v % 2 == 0 and None), "n_heads": one_or_two}
    target("SelfModifyingTitans", SelfModifyingTitans, sizes | {
        "chunk": whole(1), "memory": one("matrix", "mlp"), "inner_step": number(unit_interval),
        "conv": whole(0), "mode": one("token", "boundary"), "adaptive": either,
        "window_reset": lambda v: v is None or (whole(1)(v) and False),
        "momentum": either, "gate": either, "dgd": either, "retention": either,
        "counters": whole(0, 1),
    }, d_model=16, n_heads=2, chunk=4, memory="matrix", inner_step=1.0, conv=4, mode="token",
        adaptive=("k", "v"), window_reset=None, momentum=False, gate=True, dgd=True,
        retention=True, counters=0)
    target("NeuralMemory", NeuralMemory, sizes | {
        "chunk": whole(1), "depth": whole(1, 100), "conv": whole(0),
    }, d_model=16, n_heads=2, chunk=4, depth=2, conv=4)
    for name in ("LinearAttention", "RetNet", "DeltaNet", "GatedDeltaNet", "Comba", "Mamba2", "DLA",
                 "TTT", "Memora", "Attention"):
        target(f"baselines.{name}", getattr(baselines, name), sizes | {"conv": whole(0)},
               d_model=16, n_heads=2, conv=4)
    for name in MIXERS:
        layer = model_of(name).blocks[0].mixer
        target(f"{name}'s mixer reads", layer, {"x": "width"}, x=x)
    target("Level", Level, {"chunk": whole(1, none=True), "hidden": whole(1)}, chunk=4, hidden=8)
    target("CMS", CMS, {
        "d_model": whole(1), "levels": lambda v: False,
        "variant": one("sequential", "nested", "independent"), "step": either,
    }, d_model=16, levels=[Level(4, 8), Level(None, 8)], variant="sequential", step=1.0)
    target("CMS reads", model_of("transformer").blocks[0].cms, {"x": "width"}, x=x)

    # the model
    config = {
        "vocab_size": whole(1), "d_model": lambda v: whole(1)(v) and None,
        "n_layers": whole(1), "n_heads": one_or_two, "hidden": lambda v: v is None or (
            whole(1)(v) and None), "levels": either, "chunk": whole(1),
        "variant": one("sequential", "nested", "independent"), "memory": one("matrix", "mlp"),
        "cms_updates": maybe("off", "first_order", "full"),
        "cms_blocks": whole(1, 2, none=True), "cms_clip": positive, "cms_step": either,
        "conv": whole(0, none=True), "momentum": switch, "inner_step": number(unit_interval),
        "mode": one("token", "boundary"), "dgd": switch, "retention": switch, "gate": switch,
        "depth": either, "expand": whole(1, none=True), "window": either,
        "norm_eps": positive, "tied": switch, "rope_base": positive, "model": one(*MIXERS),
        "window_reset": lambda v: v is None, "adaptive": either, "counters": whole(0, 1),
    }
    plain = {f.name: getattr(HopeConfig(**TINY), f.name) for f in fields(HopeConfig)}
    plain |= {"hidden": None, "cms_updates": None, "levels": [4, None]}
    target("HopeConfig", HopeConfig, config, **plain)
    target("HopeConfig.preset", HopeConfig.preset, {"name": one(*PRESETS), "model": one(*MIXERS)},
           name="nano", model="hope")
    hope = model_of("hope")
    updates = maybe("off", "first_order", "full")
    target("Hope", in_eval(hope), {"tokens": "ids", "updates": updates}, tokens=IDS, updates=None)
    target("Hope.learn", in_eval(hope.learn), {
        "tokens": "ids", "step": either,
        "updates": maybe("first_order", "full"),
    }, tokens=IDS, step=None, updates=None)
    for name in ("hope", "transformer", "gated_deltanet", "linear_attention", "samba", "titans",
                 "rwkv7", "srwm"):
        target(f"{name} goes on", in_eval(model_of(name)), {"state": "state", "tokens": "ids"},
               tokens=IDS, state=state_of(name))

    def written(**args):
        return list(hope.generate(**args))

    target("Hope.generate", in_eval(written), {
        "tokens": "ids", "n": whole(0, 10), "temperature": at_least_0,
        "top_k": whole(1, none=True), "top_p": number(lambda v: 0 < v <= 1),
        "min_p": number(lambda v: 0 <= v <= 1), "repetition_penalty": positive,
    }, tokens=IDS, n=2, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=2.0)

    # optimizers: one step
    def stepped(kind):
        def step(**args):
            p = torch.nn.Parameter(fixed(7, 4, 4))
            optimizer = kind([p], **args)
            p.grad = fixed(8, 4, 4)
            optimizer.step()

        return step

    rates = {"lr": positive, "weight_decay": at_least_0}
    common = {"lr": 0.01, "weight_decay": 0.1}
    for name in ("Momentum", "DeltaMomentum", "Muon"):
        kind = getattr(optimizers, name)
        target(f"optimizers.{name}", stepped(kind), rates | {"momentum": fraction}, **common,
               momentum=0.9)
    target("optimizers.M3", stepped(optimizers.M3), rates | {
        "frequency": whole(1), "alpha": at_least_0, "eps": at_least_0, "steps": whole(1, 100),
    }, **common, frequency=2, alpha=0.3, eps=1e-8, steps=5)
    target("optimizers.AdamMemory", stepped(optimizers.AdamMemory), rates | {
        "eps": at_least_0, "betas": lambda v: isinstance(v, tuple) and None,
    }, **common, eps=1e-8, betas=(0.9, 0.99))
    names = one("adamw", "muon", "m3", "delta_momentum", "dmgd")
    target("optimizer_by_name", functools.partial(optimizers.optimizer_by_name, hope), {
        "name": names, "lr": positive, "weight_decay": at_least_0,
    }, name="muon", lr=0.01, weight_decay=0.1)

    # data and tasks
    tokens = np.arange(1000, dtype=np.uint16) % 257
    target("corpus.batch", batch, {
        "batch_size": whole(1, 10**4), "seq_len": whole(1, 999), "seed": whole(0),
        "step": whole(0),
    }, tokens=tokens, batch_size=2, seq_len=8, seed=0, step=3)
    words = {"n": whole(1), "vocab": either, "length": either, "seed": whole(0)}
    for name in ("recall", "fuzzy_recall", "selective_copying", "compression", "memorization"):
        sizes_of = {"selective_copying": {"length": 64}}.get(name, {"length": 32})
        target(f"tasks.{name}", getattr(tasks, name), words, n=2, vocab=16, seed=0, **sizes_of)
    target("tasks.formal", tasks.formal, {
        "language": one(*tasks.LANGUAGES), "n": whole(1), "shortest": either, "longest": either,
        "seed": whole(0),
    }, language="parity", n=3, shortest=4, longest=8, seed=0)
    text = folder / "text.txt"
    text.write_bytes(b"A line of text, and another one.\n" * 400)
    files = CLEAN + (OSError,)
    target("load_corpus", load_corpus, {"source": lambda v: False}, files, source=str(text))
    target("tokenizer", tokenizer, {"name": lambda v: False}, name="bytes")
    target("Run.open", Run.open, {"folder": lambda v: False}, files, folder=str(folder / "none"))
    saved = folder / "state.pt"
    save_state(state_of("hope"), saved)
    target("load_state", load_state, {
        "path": lambda v: None if isinstance(v, str) else False, "device": lambda v: v == "cpu",
    }, files, path=str(saved), device="cpu")
    target("save_state", save_state, {
        "path": lambda v: None if isinstance(v, str) and v else False,
    }, files, state=state_of("hope"), path=str(folder / "saved.pt"))
    checks = {
        int: lambda value: None if type(value) in (int, str, float) else False,
        float: lambda value: None if type(value) in (int, str, float) else False,
        bool: lambda value: switch(value) or (None if isinstance(value, str) else False),
    }
    wrong = {f.name: checks[f.type] for f in fields(TrainConfig) if f.type in checks}
    fine = {f.name: f.default for f in fields(TrainConfig) if f.name in wrong}
    target("TrainConfig", TrainConfig, wrong, **fine)

    # commands, with values that no flag of theirs may have
    def command(name, main, argv, **flags):
        out = folder / "out"

        def call(**values):
            line = list(map(str, argv))
            for flag, value in values.items():
                line += [f"--{flag.replace('_', '-')}", str(value)]
            said = io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                try:
                    code = main(line)
                except SystemExit as end:
                    code = end.code
            if out.exists():
                raise RuntimeError(f"{line} left files behind")
            if code:
                raise ValueError(said.getvalue().strip().splitlines()[-1])

        TARGETS.append(Target(name, call, dict.fromkeys(flags), flags, command=True))

    small = ["--data", text, "--out", folder / "out"]
    command(
        "train.py", train.main, small, tokens="many", batch_size="0", seq_len="-1", lr="nan",
        warmup="2", optimizer="sgd", model="hop", preset="350m", seed="-1", device="gpu",
        set="d_model", cms_periods="0", keep="0", eval_every="-1", threads="-2", grad_clip="0",
    )
    command("eval.py", evaluation.main, [folder / "none"], tasks="table9", cms_updates="on",
            device="gpu")
    command("sample.py", sample.main, ["generate", folder / "none"], n="-1", temperature="-1",
            top_k="0", seed="x", cms_updates="on")
    command("ctm.py", thinking.main, ["--out", folder / "out"], length="0", ticks="-1", steps="x",
            history="0", set="d_model=0", control="gru", batch_size="0", lr="nan", seed="-1",
            images=folder / "missing", test_length="4", device="gpu", resume=folder / "none")
    command("data.py", returning(data.main), ["text", text, "--out", folder / "out"], vocab="-5")
    command("bench quality", bench_main, ["quality", "--out", folder / "out" / "q.json"],
            models="hop", seeds="a", lrs="x", tokens="-1", minutes="-1", jobs="0", preset="x",
            data=folder / "missing")
    command("bench speed", bench_main, ["speed", "--out", folder / "out" / "s.json"],
            models="hop", seq_len="0", batch="0", repeats="0", threads="-1")


def one_or_two(value):
    """n_heads, at a width of 16."""
    return whole(1)(value) and (value in (1, 2, 4, 8) or None)


def unit_interval(value):
    return 0 <= value <= 1


def in_eval(function):
    """Without a graph."""

    @functools.wraps(function if hasattr(function, "__name__") else in_eval)
    def call(**args):
        with torch.no_grad():
            return function(**args)

    return call


def returning(main):
    """A main that ends with SystemExit where something is wrong, as one with an exit status."""

    def call(argv):
        main(argv)
        return 0

    return call


# --------------------------------------------------------------------------------------------------
# Calls


def drawn(seed, number):
    """(target, argument, value, legal) of a call."""
    rng = random.Random(f"{seed} {number}")
    chosen = rng.choice(TARGETS)
    name = rng.choice(sorted(chosen.legal))
    kind = chosen.legal[name]
    if isinstance(kind, str):
        value, legal = spoiled(kind, chosen.args[name], rng)
        if name == "q" and value is None:
            legal = True
        if name == "state" and value is None:
            legal = True
    elif chosen.command:
        value, legal = chosen.args[name], False
    else:
        value = rng.choice(SCALARS)
        try:
            legal = kind(value)
        except TypeError:  # not to be compared, so neither legal
            legal = False
    return chosen, name, value, legal


def answer(seed, number):
    """(outcome, what was called, error or None) of a call."""
    chosen, name, value, legal = drawn(seed, number)
    args = {name: value} if chosen.command else {**chosen.args, name: value}
    shown = f"tensor {tuple(value.shape)} {value.dtype}" if torch.is_tensor(value) else repr(value)
    what = f"{chosen.name}({name}={shown[:60]})"
    if legal == "not made":
        return "right", what, None
    try:
        chosen.call(**args)
    except TimeoutError:
        return "hang", what, None
    except chosen.clean as error:
        if legal:
            return "refused", what, error
        said = str(error)
        named = name.replace("_", "-") in said or name in said or (
            not torch.is_tensor(value) and str(value) and str(value) in said
        )
        clear = named and said.count("\n") == 0
        return "right" if clear else "unnamed", what, error
    except Exception as error:
        return "traceback", what, error
    return "silent" if legal is False else "right", what, None


def late(*_):
    raise TimeoutError


def work(seed, begin, end, folder, pipe):
    """In a process of its own: the calls begin .. end - 1."""
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
    signal.signal(signal.SIGALRM, late)
    torch.set_num_threads(1)
    os.chdir(folder)
    declare(Path(folder))
    pipe.send(None)  # from here on a death is a call's
    for number in range(begin, end):
        pipe.send((number, None))
        signal.alarm(SECONDS)
        outcome, what, error = answer(seed, number)
        signal.alarm(0)
        said = "" if error is None else f"{type(error).__name__}: {error}"
        pipe.send((number, (outcome, what, said)))


def every_answer(seed, calls, folder):
    """Yields (number, outcome, what, error) of all calls, whatever happens to the process."""
    context = multiprocessing.get_context("spawn")
    begin = 0
    while begin < calls:
        ours, theirs = context.Pipe(False)
        process = context.Process(target=work, args=(seed, begin, calls, folder, theirs))
        process.start()
        theirs.close()
        if ours.recv() is not None:
            raise RuntimeError("a worker did not begin")
        try:
            while True:
                number, result = ours.recv()
                if result is not None:
                    begin = number + 1
                    yield number, *result
        except EOFError:
            process.join()
        if begin < calls:
            yield begin, "crash", f"call {begin}", f"exit status {process.exitcode}"
            begin += 1


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--calls", type=int, default=10_000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--one", type=int, default=None, help="a call's number: make it again")
    p.add_argument("--show", type=int, default=20, help="examples of each bad outcome")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.one is not None:
            declare(Path(folder))
            outcome, what, error = answer(args.seed, args.one)
            print(outcome, what)
            if error is not None:
                traceback.print_exception(error)
            return 0
        found = collections.defaultdict(dict)
        counts = collections.Counter()
        for number, outcome, what, error in every_answer(args.seed, args.calls, folder):
            counts[outcome] += 1
            found[outcome].setdefault(what, (number, error))
    for outcome in OUTCOMES[1:]:
        for what, (number, error) in list(found[outcome].items())[: args.show]:
            print(f"{outcome:<10}{number:>6}  {what}  {error[:160]}")
    print(", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES))
    worst = counts["silent"] + counts["refused"] + counts["hang"] + counts["crash"]
    return int(worst > 0 or counts["traceback"] >= 0.02 * args.calls)


if __name__ == "__main__":
    sys.exit(main())
