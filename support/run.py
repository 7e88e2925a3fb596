"""One way to open a run: its config, model, tokenizer, corpus, folder and device, checked once.

    Run.start(config)            to train: a new run, or one that is continued (config.resume)
    Run.open("runs/hope-nano")   a trained run, to read it: evaluate, generate, look inside

A run is a folder; everything needed to continue is in it:

    config.json     {"model": HopeConfig, "train": TrainConfig, "tokenizer": name, "corpus": ...}
    metrics.jsonl   a line per step and validation, see train.py
    loss.png        the same as a picture
    checkpoints/    step-N: weights and optimizer, whole or not there (checkpoint.py)
    tokenizer.json  where the tokenizer is not bytes
    sample.txt      text generated at the end

Weights are float32. Everything that can be wrong is found before anything is written.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

import selfcheck
from hope import Hope, HopeConfig
from optimizers import LevelOptimizer, optimizer_by_name, scale_rates
from support import checkpoint, distributed
from support.checkpoint import (
    atomic_write,
    first_line,
    json_lines,
    locked,
    parse_json,
    warned,
)
from support.config import TrainConfig, listed
from support.corpus import Corpus, batch, check_shards, documents, is_shards, join, load_corpus
from support.distributed import agreed, gather, rank, world
from support.flags import DEVICES
from support.pretrained import from_pretrained, tokenizer_path
from support.pretrained import read_config as read_checkpoint
from support.vocabulary import save_tokenizer, tokenizer, tokenizer_of


@dataclass
class Run:
    """A run, opened. See the top of this file."""

    config: TrainConfig
    model: Hope
    encoding: object  # tiktoken.Encoding
    device: torch.device
    folder: Path | None = None  # None: a run that is not kept (bench)
    corpus: Corpus | None = None  # None: opened to read, see `text`
    saved: dict | None = None  # config.json of a run that exists, None: of a checkpoint of others
    begun: bool = False  # whether there is something to continue
    step: int = 0  # of the checkpoint that was read
    lock: contextlib.AbstractContextManager = contextlib.nullcontext()  # while it is written

    @classmethod
    def start(cls, config: TrainConfig, keep: bool = True) -> "Run":
        """A run to train, in all processes. keep: False makes no folder (a benchmark's cell).

        ValueError or OSError for whatever is wrong, before any file is touched.
        """
        with agreed():
            device = device_for(config.device)
        device = distributed.start(device)
        folder = Path(config.resume) if config.resume else None
        with agreed():
            if rank() == 0 and keep and not config.resume:
                folder = config.fresh_folder()
        folder = gather(folder)[0]
        with agreed():
            parts = _prepare(config, folder)
        fingerprints = gather(parts["corpus"].fingerprint())
        if len(set(map(str, fingerprints))) > 1:
            raise ValueError(f"data {config.data!r} differs between the processes: {fingerprints}")
        begun = parts["saved"] is not None and gather(_has_begun(parts["folder"]))[0]
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        model_config = parts.pop("model_config")
        if begun:
            with agreed():
                checkpoint.check_sizes(folder, model_config, Hope)
        model = parts.pop("model") or allocated(model_config)
        model = model.to(device=device, dtype=torch.float32).train()
        settle_kernels(model, device)
        selfcheck.agree(gather)
        return cls(config, model, device=device, begun=begun, **parts)

    @classmethod
    def open(cls, folder: str | Path, device: str = "auto", cms_updates=None) -> "Run":
        """A trained run, to read it: the model has the newest whole checkpoint, in eval mode.

        cms_updates: one of learn.UPDATES, to read otherwise than the run was trained.
        FileNotFoundError or ValueError says what is wrong with folder, checkpoint or device.
        """
        saved = read_config(folder)
        config = saved_train_config(folder, saved)
        encoding = tokenizer(tokenizer_of(folder, saved["tokenizer"]))
        model_config = saved_model_config(folder, saved)
        if cms_updates is not None:
            model_config = replace(model_config, cms_updates=cms_updates)
        check_vocabulary(f"{folder} has", model_config, encoding)
        checkpoint.check_sizes(folder, model_config, Hope)
        model = allocated(model_config)
        step = checkpoint.load(folder, model)
        device = device_for(device)
        model = model.to(device).eval()
        settle_kernels(model, device)
        return cls(config, model, encoding, device, Path(folder), saved=saved, step=step)

    @classmethod
    def pretrained(cls, path: str | Path, device: str = "auto", cms_updates=None) -> "Run":
        """A checkpoint that `from_pretrained` reads, as `open` does a run.

        Results go to runs/pretrained-NAME: a run may have the name that its export has.

        cms_updates: None is off for a checkpoint of others, which never learned in context.
        """
        theirs = read_checkpoint(path)
        if cms_updates is None and theirs.get("model_type") != "hope":
            cms_updates = "off"
        model = from_pretrained(path, **({"cms_updates": cms_updates} if cms_updates else {}))
        encoding = tokenizer(tokenizer_path(path))
        check_vocabulary(f"{path} has", model.config, encoding)
        longest = theirs.get("max_position_embeddings")
        seq_len = min(longest, 2048) if type(longest) is int else 2048
        config = TrainConfig(pretrained=str(path), batch_size=1, seq_len=seq_len)
        device = device_for(device)
        model = model.to(device)
        settle_kernels(model, device)
        return cls(config, model, encoding, device, Path(f"runs/pretrained-{config.preset}"))

    # What training does with a run

    def new_optimizer(self):
        return optimizer_for(self.model, self.config)

    def restore(self, optimizer) -> int:
        """Make the folder, or fill model and optimizer from its newest checkpoint -> its step.

        The folder is this process's until `logging` ends. ValueError where it is another's.
        """
        folder = self.folder
        start = 0
        made = rank() == 0 and self.saved is None
        with agreed(), contextlib.ExitStack() as lock:
            if made:
                folder.mkdir(parents=True)
            if rank() == 0:
                lock.enter_context(locked(folder / "lock"))
            self.lock = lock.pop_all()
        try:
            if self.begun:
                start = checkpoint.load(folder, self.model, optimizer)
                if self.config.steps < start:
                    done = start * self.config.tokens_per_step
                    wanted = f"more than the {done} that {folder} has trained on"
                    raise ValueError(f"tokens must be {wanted}, got {self.config.tokens}")
            elif self.saved and rank() == 0:
                print(f"{folder} has no checkpoint: starting over", flush=True)
            with agreed():
                if rank() == 0:
                    self._write_folder(start)
            if not self.begun:
                self.save(optimizer, 0)  # a full disk shows now, not after the first hour
        except BaseException:
            self.lock.close()
            if made:
                shutil.rmtree(folder)
            raise
        return start

    def _write_folder(self, start: int) -> None:
        everything = {
            "model": self.model.config.to_dict(),
            "train": {**asdict(self.config), "resume": None},
            "tokenizer": self.encoding.name,
            "corpus": self.corpus.fingerprint(),
        }
        write_json(self.folder / "config.json", everything)
        if self.encoding.name != "bytes":
            save_tokenizer(self.encoding, self.folder)  # the run outlives its shards
        # What a killed run logged after its last checkpoint is computed again.
        kept = [record for record in self.metrics() if record["step"] <= start]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        atomic_write(self.folder / "metrics.jsonl", lambda path: path.write_text(lines))

    def save(self, optimizer, step: int) -> None:
        """Write the checkpoint of a step. Called by all processes."""
        checkpoint.save(self.folder, self.model, optimizer, step, self.config.keep)

    @contextlib.contextmanager
    def logging(self, on_step: Callable[[dict], None] | None = None):
        """A function that appends a record to metrics.jsonl, shows it to on_step and to wandb."""
        first = rank() == 0
        path = self.folder / "metrics.jsonl"
        with self.lock, open(path, "a") if first else contextlib.nullcontext() as log:
            wandb = _wandb(self.folder, self.config) if self.config.wandb and first else None

            def report(record: dict) -> None:
                if log:
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                if wandb:
                    wandb.log(record, step=record["step"])
                if on_step:
                    on_step(record)

            yield report

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl, without those that are torn or no records."""

        def record(line):
            if not isinstance(line["step"] + line["tokens"], int):
                raise TypeError
            return line

        return json_lines(self.folder / "metrics.jsonl", record)

    @property
    def title(self) -> str:
        size = sum(p.numel() for p in self.model.parameters())
        name = f"{self.config.model}-{self.config.preset}"
        return f"{name}, {size / 1e6:.2f}M parameters, on {self.corpus.name}"

    # What evaluation does with a run

    def text(self, data: str | None = None):
        """(name, tokens [N], bytes) of `data`, or of the held-out part of the run's own corpus."""
        if data is None and self.saved is None:
            raise ValueError("a pre-trained checkpoint has no held-out text: name one with --data")
        if data is not None and not is_shards(data):
            files = [content for _, content in documents(data)]
            return data, join(files, self.encoding), sum(len(content) for content in files)
        try:
            corpus = load_corpus(data or self.config.data, self.encoding)
        except ValueError as error:
            hint = "" if data else "; --data names another text"
            raise ValueError(f"{error}{hint}") from None
        if data is None and corpus.fingerprint() != self.saved["corpus"]:
            raise ValueError(
                f"data {self.config.data!r} has changed since {self.folder} was trained, so its "
                "held-out part may have been trained on: name a text with --data"
            )
        return f"held-out part of {corpus.name}", corpus.val, corpus.val_bytes

    def facts(self) -> dict:
        """What must stand beside every number."""
        return {
            "model": f"{self.model.config.model} ({self.config.preset})",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "training_tokens": self.step * self.config.tokens_per_step if self.saved else None,
            "trained_on": self.saved["corpus"].get("name") if self.saved else "texts of others",
            "cms_steps_in_context": self.model.config.cms_updates,
        }

    def record(self, result: dict) -> None:
        """Add to eval.json, keeping what other commands wrote there; a warning where that fails."""
        path = self.folder / "eval.json"
        with warned():
            if self.saved is None:  # a pre-trained checkpoint, which has no folder before
                self.folder.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock"), wait=True):
                try:
                    kept = dict(parse_json(path.read_text()))
                except FileNotFoundError:
                    kept = {}
                except (TypeError, ValueError) as error:
                    raise OSError(f"{path} is damaged and stays so ({first_line(error)})") from None
                write_json(path, kept | result)


# --------------------------------------------------------------------------------------------------
# Opening


def _prepare(config: TrainConfig, folder: Path | None) -> dict:
    """The parts of a run to train. The model is None where it is to be made of model_config."""
    saved = None
    if config.resume:
        saved = read_config(folder)
        resumed(config.resume, **{**asdict(config), "resume": config.resume})
    if config.batch_size % world():
        wanted = f"a multiple of {world()}, the number of processes"
        raise ValueError(f"batch_size must be {wanted}, got {config.batch_size}")
    if config.fsdp and not distributed.started():
        how = "torchrun --nproc_per_node=8 train.py"
        raise ValueError(f"fsdp needs several processes: start it with {how}")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("wandb is on, but the package is not installed: pip install wandb")
    if saved:
        name = tokenizer_of(folder, saved["tokenizer"])
    else:
        name = config.pretrained and tokenizer_path(config.pretrained)
    corpus = load_corpus(config.data, name and tokenizer(name))
    encoding = corpus.encoding
    model, model_config = _model_of(config, folder, saved, encoding)
    short = (model_config.levels[0] or 0) >= config.seq_len
    if short and not saved and {"levels", "cms_updates"}.isdisjoint(config.set):
        model_config.cms_updates = "off"  # rows end before the default levels could take a step
    learns = model_config.cms_updates != "off"
    if learns and not 2 <= (model_config.levels[0] or 0) < config.seq_len:
        wanted = f"begin with a chunk from 2 to {config.seq_len - 1} tokens"
        why = f"else no token of a row of seq_len {config.seq_len} sees an update"
        hint = "or --set cms_updates=off"
        raise ValueError(f"levels must {wanted}, {why}, {hint}, got {model_config.levels}")
    if learns and config.fsdp and config.optimizer != "adamw":  # which takes no whole blocks
        use = "use adamw, or --set cms_updates=off"
        raise ValueError(f"fsdp with cms_updates cannot have optimizer {config.optimizer}; {use}")
    if model_config.cms_updates == "full" and config.compile:
        use = "use --no-compile or --set cms_updates=first_order"
        raise ValueError(f"compile cannot be combined with cms_updates 'full'; {use}")
    now = corpus.fingerprint()
    if saved and now != saved["corpus"]:
        was = saved["corpus"].items()
        differs = "; ".join(f"{k} {now.get(k)}, not {v}" for k, v in was if now.get(k) != v)
        raise ValueError(f"data {config.data!r} is not what {folder} was trained on: {differs}")
    if is_shards(config.data) and folder is not None:  # not for each cell of a benchmark
        check_shards(config.data, "train")
    batch(corpus.train, 1, config.seq_len, config.seed, 0)  # raises for rows that are too long
    parts = {"corpus": corpus, "encoding": encoding, "folder": folder, "saved": saved}
    return parts | {"model": model, "model_config": model_config}


def _has_begun(folder: Path) -> bool:
    """Whether a run has anything to continue; else it was killed at once."""
    metrics = folder / "metrics.jsonl"
    logged = metrics.is_file() and metrics.stat().st_size > 0
    return logged or bool(checkpoint.saved_steps(folder))


def _model_of(config: TrainConfig, folder, saved, encoding) -> tuple:
    """(model or None, its config)."""
    if saved:
        model_config = saved_model_config(folder, saved)
        check_vocabulary(f"{folder} has", model_config, encoding)
        return None, model_config
    own = {"vocab_size": encoding.n_vocab} | config.set
    try:
        if config.pretrained:
            model = from_pretrained(config.pretrained, **config.set)
            check_vocabulary(f"pretrained {config.pretrained!r} has", model.config, encoding)
            return model, model.config
        return None, HopeConfig.preset(config.preset, model=config.model, **own)
    except TypeError as error:  # a value of another kind than its field
        raise ValueError(f"set is {config.set}: {first_line(error)}") from None


def allocated(model_config: HopeConfig) -> Hope:
    """A new model. ValueError where it does not fit into memory."""
    try:
        return Hope(model_config)
    except RuntimeError as error:  # torch's allocator
        raise ValueError(f"the model does not fit into memory: {first_line(error)}") from None


def check_vocabulary(who: str, model_config: HopeConfig, encoding) -> None:
    """ValueError unless model and tokenizer have the same number of symbols."""
    if model_config.vocab_size != encoding.n_vocab:
        sizes = f"{model_config.vocab_size} symbols, but its tokenizer {encoding.n_vocab}"
        raise ValueError(f"{who} a vocabulary of {sizes}")


def read_config(folder: str | Path) -> dict:
    """config.json of a run. FileNotFoundError or ValueError in one line."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it has no config.json")
    try:
        config = parse_json(path.read_text())
        saved = {key: config[key] for key in ("model", "train", "tokenizer", "corpus")}
        train = dict(saved["train"])
        model = dict(saved["model"])
        for name, kind in {"train": dict, "model": dict, "tokenizer": str, "corpus": dict}.items():
            if not isinstance(saved[name], kind):
                raise TypeError(f"{name} is {saved[name]!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
    saved["train"], saved["model"] = as_of_today(train, model)
    return saved


def as_of_today(train: dict, model: dict) -> tuple[dict, dict]:
    """What was saved when cms_updates stood in TrainConfig, as TrainConfig and HopeConfig are now.

    ValueError for a model that learned in context then: steps were along sums of gradients.
    """
    if "cms_updates" not in train:
        return train, model
    if train["cms_updates"] != "off":
        raise ValueError(f"cms_updates {train['cms_updates']!r} had another rule: train it again")
    train = {name: value for name, value in train.items() if name != "cms_updates"}
    return train, {"cms_step": None} | model | {"cms_updates": "off"}


def saved_train_config(folder, saved: dict) -> TrainConfig:
    try:
        return TrainConfig(**saved["train"])
    except TypeError as error:
        raise ValueError(f"{folder}/config.json is of another version: {error}") from None


def saved_model_config(folder, saved: dict) -> HopeConfig:
    try:
        return HopeConfig(**saved["model"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}/config.json is damaged: {error!r}") from None


def resumed(folder: str, **changes) -> TrainConfig:
    """The config of a run to continue, with some fields changed.

    ValueError for a change that would make it another run.
    """
    saved = saved_train_config(folder, read_config(folder))
    config = TrainConfig(**{**asdict(saved), "resume": folder, **changes})
    free = [f.name for f in fields(config) if f.metadata["on_resume"]]
    for f in fields(config):
        was = getattr(saved, f.name)
        now = getattr(config, f.name)
        if was != now and f.name not in free:
            if isinstance(was, dict):
                pairs = ([f"{k}={v}" for k, v in settings.items()] for settings in (was, now))
                was, now = (" ".join(own) or "nothing" for own in pairs)
            names = ", ".join(name for name in free if name != "resume")
            what = f"{f.name} {was}, not {now}"
            raise ValueError(f"{folder} was trained with {what}: a resumed run may change {names}")
    return config


def optimizer_for(model, config: TrainConfig):
    """The optimizer that a config names, of all parameters of a model.

    ValueError where cms_periods or cms_lrs are not as many as the CMS has levels.
    """
    betas = (config.beta1, config.beta2)
    made = optimizer_by_name(model, config.optimizer, config.lr, config.weight_decay, betas)
    if not config.cms_periods and not config.cms_lrs:
        return made
    level_of = {}  # of parameters, by a part of their names
    for number, block in enumerate(model.blocks):
        for level in range(len(block.cms.mlps) if block in model.learners else 0):
            level_of[f"blocks.{number}.cms.mlps.{level}."] = level
    n = len(model.config.levels)
    for name in ("cms_lrs", "cms_periods"):
        have = getattr(config, name)
        if have and len(listed(have)) != n:
            raise ValueError(f"{name} must be {n} numbers, one for each CMS level, got {have!r}")
    if config.cms_lrs:
        scales = listed(config.cms_lrs)
        scale_rates(made, model, {part: scales[level] for part, level in level_of.items()})
    if config.cms_periods:
        periods = [int(period) for period in listed(config.cms_periods)]
        levels = {part: periods[level] for part, level in level_of.items()}
        made = LevelOptimizer(made, model, levels | {"": 1})
    return made


def device_for(name: str) -> torch.device:
    """The device of that name. ValueError where there is none.

    "auto": the CUDA GPU if there is one. Not "mps", on which nothing here was ever measured.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "mps", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"device must be {DEVICES}, got {name!r}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device must be auto or cpu where torch sees no GPU of Apple's, got 'mps'")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= gpus:
        wanted = f"auto, cpu or cuda:N with N < {gpus}, the GPUs that torch sees"
        raise ValueError(f"device must be {wanted}, got {name!r}")
    return torch.device(name)


def product_type(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it; float32 on a CPU and on a GPU that would emulate it."""
    return torch.bfloat16 if device.type == "cuda" and _has_bfloat16() else torch.float32


@functools.cache  # asked in every step, said once
def _has_bfloat16() -> bool:
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return True
    why = "has no bfloat16, which would be emulated: matrix products are in float32"
    logging.getLogger(__name__).warning(f"{torch.cuda.get_device_name()} {why}")
    return False


def precision(device: torch.device):
    """The context of a forward pass: matrix products in `product_type`."""
    dtype = product_type(device)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


@torch.no_grad()
def settle_kernels(model: Hope, device: torch.device) -> None:
    """On a GPU: have kernels.py checked as the mixers need it, before anything is compiled."""
    if device.type == "cuda":
        tokens = torch.zeros(1, model.config.chunk + 1, dtype=torch.int64, device=device)
        with precision(device):
            model(tokens, updates="off")


def write_json(path: Path, value) -> None:
    text = json.dumps(value, indent=2) + "\n"
    atomic_write(path, lambda beside: beside.write_text(text))


def _wandb(folder: Path, config: TrainConfig):
    """The run at Weights & Biases; the same one after a resume."""
    import wandb

    path = folder / "wandb.json"
    known = parse_json(path.read_text()) if path.is_file() else {}
    run = wandb.init(
        name=folder.name, dir=folder, config=asdict(config), resume="allow", **known
    )
    write_json(path, {"id": run.id})
    return run
