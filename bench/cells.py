"""Measure models against each other: speed and memory of a training step, and what they learn from the same data.

    python bench.py speed                                              # hope and its control against the Transformer
    python bench.py speed --models hope,hope:memory=mlp,gated_deltanet --batch 1 --seq-len 1024,4096,16384
    python bench.py speed --profile hope                               # where the time of one training step goes
    python bench.py quality                                            # bits per byte after equal tokens: 36 runs
    python bench.py quality --models hope,transformer --seeds 0 --minutes 5      # and after equal time
    python bench.py optimizers                                         # optimizers on hope and on the transformer
    python bench.py ablation                                           # Hope without its parts (NL table 6)
    python bench.py digits                                             # and on a small vision transformer (scikit-learn)
    python bench.py kernels                                            # the fused kernels on a GPU: 15 minutes

A model is NAME[:field=value ...] with fields of HopeConfig: `hope`, `hope:inner_step=0` (memories that never learn),
`transformer:conv=4`, `hope:chunk=128:levels=[256,null]`. MODEL@OPTIMIZER (in quality) is trained with that optimizer.

speed: one process. A training step is forward + loss + backward; the optimizer, the same for all, is left out. Models
take turns, A B C A B C ..., so that whatever disturbs the machine disturbs all of them; the first round is a warm-up.
Shown are medians over the rounds; the ratio to `transformer` is the median of each round's ratio. Memory is the peak of
one training step in MiB above a process that holds only the model and the optimizer's state: allocations on a GPU,
resident memory of a fresh process on a CPU (Linux).

quality: the pieces of train.py on the same batches. For each model the learning rate of the grid that is best on a
shorter run with seed 100 (no other run uses it); then a run for each seed. "After equal time" are runs of their own,
each with a schedule that ends after the tokens the model gets through in --minutes of training, at the median speed of
its learning-rate runs. Cells run in --jobs processes that share the cores; a finished cell is a line in the .jsonl
beside --out, and the same command goes on where an earlier one was stopped.

optimizers: quality of every model with every optimizer, each with its best learning rate of the same grid, and the time of
an optimizer's step: ten steps of one, then of the next, round after round.

ablation: quality of Hope with one part taken away or changed at a time, beside the perplexities of NL table 6. Hope of this
repository has no momentum and static queries by default, so there the paper's "without" is ours "with". 22 million tokens of
training with the defaults: 1.5 hours of one CPU core, half of them for the MLP memories.

digits: 8 x 8 images of scikit-learn, a ViT of patches of 2 x 2; the learning rate is chosen on a tenth of the training
images with seed 100, and every optimizer takes the same number of steps on the same batches.

kernels: forward + backward of the kernels of kernels.py on one GPU, heads of 64, bfloat16, medians of CUDA events after a
warm-up, against the same in torch (eager, and with each tile compiled) and, where flash-linear-attention is installed,
against its chunk_gated_delta_rule on the same tensors. FLOPs are those of the matrix products the kernels do, bytes are
those of inputs and gradients read or written once; both also as a fraction of the device's ceilings, a large matrix
product and a large copy measured in the same process. Then training steps of the 340m preset against Transformer++.
"""

import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from hope import Hope, HopeConfig, loss_fn
from support.checkpoint import first_line
from support.config import TrainConfig
from support.corpus import batch, load_corpus
from support.run import device_for, optimizer_for, precision, write_json
from support.vocabulary import n_bytes
from train import NonFinite, gradient_norm, learning_rate, validate

HERE = Path(__file__).resolve().parent
SEARCH_SEED = 100  # of the learning-rate runs
load_corpus = cache(load_corpus)  # a worker trains many cells on one corpus

# ---------------------------------------------------------------------------------------------------------------------
# Models by name


def split_specs(text: str) -> list[str]:
    """Model specs of a comma-separated list; commas inside [...] are a value's. ValueError for none or a repeat."""
    specs = [spec.strip() for spec in re.split(r",(?![^\[]*\])", text) if spec.strip()]
    if not specs or len(set(specs)) < len(specs):
        raise ValueError(f"models is {text!r}: needs at least one, each once")
    return specs


def parse_spec(spec: str) -> tuple[str, dict]:
    """"hope:chunk=128:memory=mlp" -> ("hope", {"chunk": 128, "memory": "mlp"}). ValueError for a part without '='."""
    name, *parts = spec.split(":")
    fields = {}
    for part in parts:
        field, equals, value = part.partition("=")
        if not equals or field == "model":
            raise ValueError(f"model {spec!r}: {part!r} must be field=value, a field of HopeConfig but model")
        try:
            fields[field] = json.loads(value)
        except json.JSONDecodeError:
            fields[field] = value
    return name, fields


def spec_config(spec: str, preset: str = "nano", **sizes) -> HopeConfig:
    """The model of a spec; its own fields win over `sizes`. ValueError in one line for what cannot be built."""
    name, fields = parse_spec(spec)
    try:
        config = HopeConfig.preset(preset, model=name, **(sizes | fields))
        parameters(config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"model {spec!r}: {first_line(error)}") from None
    return config


def parameters(config: HopeConfig) -> int:
    with torch.device("meta"):  # counts only
        return sum(p.numel() for p in Hope(config).parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory


# ---------------------------------------------------------------------------------------------------------------------
# Quality. A cell is one training run: its settings are a TrainConfig, its result a line of the .jsonl.


def train_cell(cell: tuple[str, TrainConfig]) -> dict:
    """Train and validate one model. A loss that is not finite is a result too: bits_per_byte None, and the error."""
    _, config = cell
    torch.set_num_threads(config.threads)
    corpus, device = load_corpus(config.data), device_for(config.device)
    encoding = corpus.encoding
    torch.manual_seed(config.seed)
    model = Hope(cell_model(config)).to(device).train()
    optimizer = optimizer_for(model, config)
    seconds, result = [], {"bits_per_byte": None}
    try:
        for step in range(config.steps):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.steps, config)
            rows = batch(corpus.train, config.batch_size, config.seq_len, config.seed, step)
            inputs, targets = (part.to(device) for part in rows)
            with precision(device):
                logits, _ = model(inputs)
            loss = loss_fn(logits, targets)
            loss.backward()
            norm = gradient_norm(model, step + 1, loss.item())
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - began)
        held_out = corpus.val[: config.eval_tokens]
        nats, _ = validate(model, held_out, config.batch_size, config.seq_len, device, start=encoding.eot_token)
        result["bits_per_byte"] = nats / math.log(2) / n_bytes(held_out, encoding)
    except NonFinite as error:
        result["error"] = str(error).split(";")[0]
    speed = config.tokens_per_step / statistics.median(seconds) if seconds else None
    return result | {"train_seconds": sum(seconds), "tokens_per_s": speed, "code": code_version()}


def cell_model(config: TrainConfig) -> HopeConfig:
    own = {"vocab_size": load_corpus(config.data).encoding.n_vocab}
    return HopeConfig.preset(config.preset, model=config.model, **(own | config.set))


@cache
def code_version() -> str:
    """Checksum of the code that a result depends on."""
    names = ("memory", "titans", "cms", "baselines", "hope", "kernels", "data", "optimizers", "train")
    sources = [path.read_bytes() for path in (HERE / f"{name}.py" for name in names) if path.exists()]
    return f"{zlib.crc32(b''.join(sources)):08x}"


def cell_key(config: TrainConfig, corpus: dict, model: HopeConfig | None = None) -> str:
    """All settings of a cell, defaults of the model included, and its data by name and checksum, wherever it lies."""
    train, model = asdict(config) | {"data": corpus["name"]}, model or cell_model(config)
    return json.dumps({"train": train, "model": model.to_dict(), "corpus": corpus}, sort_keys=True)


def current_key(key: str) -> str:
    """A finished cell's key with the defaults of settings that came later: a new field's default changes no model."""
    old = json.loads(key)
    return cell_key(TrainConfig(**old["train"]), old["corpus"], HopeConfig(**old["model"]))


def read_cells(path: Path, key=current_key) -> dict[str, dict]:
    """{key: line} of the finished cells. Lines torn by a kill, or with settings that are gone, do not count and are told."""
    cells, lines = {}, path.read_text().splitlines() if path.exists() else []
    lost = 0
    for line in filter(None, lines):
        try:
            cell = json.loads(line)
            cells[key(cell["key"])] = cell
        except (ValueError, KeyError, TypeError):
            lost += 1
    if lost:
        print(f"note: {lost} lines of {path} do not count: torn, or with settings that this version does not know")
    return cells


def leave_with_parent() -> None:
    """In a worker: no training goes on after the benchmark was killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def workers(jobs: int):
    """Processes that train cells; they start when there is a cell to train, and end with the benchmark."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), leave_with_parent)
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_cells(wanted: dict[str, object], train, facts, told, path: Path, finished: dict[str, dict], pool) -> dict[str, dict]:
    """{key: result} of {key: cell}: those in `finished`, and the rest, trained by the pool, each at once a line of `path`.

    train: cell -> result; facts: cell -> what stands before it in the line; told: line -> what is printed.
    """
    missing = {key: cell for key, cell in wanted.items() if key not in finished}
    if len(missing) < len(wanted):
        print(f"{len(wanted) - len(missing)} of {len(wanted)} cells are in {path} already", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as log:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            log.write("\n")  # after the line torn by a kill
        futures = {pool.submit(train, cell): key for key, cell in missing.items()}
        for done, future in enumerate(as_completed(futures), 1):
            key = futures[future]
            line = finished[key] = {**facts(missing[key]), **future.result(), "key": key}
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(f"[{done}/{len(missing)}] {told(line)}", flush=True)
    return {key: finished[key] for key in wanted}


# ---------------------------------------------------------------------------------------------------------------------
# Ablation


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers


# Fused kernels. What does not fit into the device's memory, or fails, is None, and said; the rest goes on.


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    with suppress(OSError, TypeError):
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    return platform.processor() or platform.machine()


def where(device: str, threads: int) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{processor()} ({cores()} cores, {threads} thread{'s' * (threads > 1)} each process)"


def commit() -> str | None:
    """The commit of this code, with "+" if files were changed since."""
    with suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(HERE)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
        return head + "+" * bool(changed)


def numbers(text: str, kind) -> list:
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is no comma-separated list of {'whole ' * (kind is int)}numbers") from None
    if len(set(values)) < len(values):
        raise ValueError(f"{text!r} has a number twice")
    return values


def write_result(args, result: dict) -> None:
    """--out: the result, and with what and where it was measured."""
    machine = {"cpu": processor(), "cores": cores(), "torch": torch.__version__, "python": platform.python_version(),
               "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}  # fmt: skip
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(args.out), {"command": args.line, "machine": machine, "commit": commit(), **result})

