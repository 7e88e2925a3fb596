"""One cell of a suite: a small model trained and scored on one synthetic task (see suites.py)."""

import inspect
import json
import statistics
import time
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import nn

from bench.cells import spec_config
from hope import Hope, HopeConfig, loss_fn
from layers import count
from support.config import TrainConfig
from support.run import optimizer_for
from tasks import IGNORE, LANGUAGES, MAD, formal, mqar
from train import NonFinite, schedule, update

LONGEST = 50  # symbols of a word of a formal language in training


@dataclass(frozen=True)
class Cell:
    """One training run."""

    suite: str
    task: str
    model: str  # a spec, see cells.py
    seed: int = 0
    settings: dict = field(default_factory=dict)  # of the task's generator
    sizes: dict = field(  # of the model, where its spec does not say otherwise
        default_factory=lambda: {"d_model": 32, "n_layers": 2, "n_heads": 1, "chunk": 16}
    )
    lr: float = 1.5e-2
    weight_decay: float = 0.0
    steps: int = 2000
    batch: int = 64
    check: int = 200  # steps between validations that may end the training; 0: none
    examples: int = 10_000
    tests: int = 500

    def config(self) -> HopeConfig | None:
        """The model; None for the LSTM. ValueError for what cannot be built."""
        if self.model == "lstm":
            return None
        config = spec_config(self.model, vocab_size=self.vocab(), **self.sizes)
        if self.suite == "formal" and (config.levels[0] or 0) >= LONGEST:
            config.cms_updates = "off"  # no step would be taken in training, but in longer words
        return config

    def vocab(self) -> int:
        if self.suite == "formal":
            return sum(map(len, LANGUAGES[self.task]))
        function, settings = self.generator()
        default = inspect.signature(function).parameters["vocab"].default
        return settings.get("vocab", default)

    def generator(self) -> tuple:
        """(function, its settings)."""
        if self.suite == "mqar":
            return mqar, {"pairs": int(self.task.split()[0])} | self.settings
        function, settings, _ = MAD[self.task]
        own = settings | self.settings
        return function, {name: value for name, value in own.items() if name != "examples"}

    def key(self) -> str:
        config = self.config()
        model = config and config.to_dict()
        return json.dumps({"cell": asdict(self), "model": model}, sort_keys=True)


def sizes(d_model: int) -> dict:
    return {"d_model": d_model, "n_layers": 2, "n_heads": d_model // 64, "chunk": 16}


_QUICK = {
    "sizes": sizes(64),
    "lr": 3e-3,
    "steps": 500,
    "batch": 16,
    "check": 0,
    "examples": 12_800,
    "tests": 320,
}
_FULL = {"sizes": sizes(128), "batch": 128, "check": 0}
QUICK = {
    "formal": {"batch": 32, "check": 100, "tests": 300},
    "mad": _QUICK,
    "mqar": _QUICK | {"settings": {"vocab": 256}},
}
FULL = {
    "formal": {"steps": 300 * 10_000 // 64, "tests": 2000},
    "mad": _FULL | {"examples": 12_800, "tests": 1280},
    "mqar": _FULL | {"examples": 100_000, "tests": 3000, "steps": 64 * 100_000 // 128},
}
GRIDS = {  # learning rates, weight decays
    "formal": ((1.5e-3, 5e-3, 1.5e-2), (0.0,)),
    "mad": ((1e-4, 5e-4, 1e-3), (0.0, 0.1)),
    "mqar": ((1e-4, 5e-4, 1e-3, 2e-3), (0.1,)),
}


def protocol(suite: str, task: str, quick: bool) -> list[dict]:
    """Settings of a task's cells: one dict, or one for each variation of the benchmark."""
    if quick or suite != "mad":
        base = (QUICK if quick else FULL)[suite]
        return [base | {"examples": 256} if task == "memorization" else base]
    _, settings, variations = MAD[task]
    own = FULL["mad"] | {"examples": settings.get("examples", 12_800)}
    varied = [own]
    for name, values in variations:
        for value in values:
            change = {"examples": value} if name == "examples" else {"settings": {name: value}}
            varied.append(own | change)
    return [one | {"steps": -(-200 * one["examples"] // one["batch"])} for one in varied]


# --------------------------------------------------------------------------------------------------
# One cell


def data_sets(cell: Cell) -> tuple:
    """(training, validation sets, test sets): inputs and targets [n, T]; formal has two bins."""
    if cell.suite == "formal":
        count = cell.examples + 2 * cell.tests
        near = split(formal(cell.task, count, 2, LONGEST, cell.seed), cell)
        far = split(formal(cell.task, 2 * cell.tests + 1, 51, 100, cell.seed), cell)
        return near[2], [near[1], far[1]], [near[0], far[0]]
    generate, settings = cell.generator()
    seed = 2 * cell.seed
    train = generate(cell.examples, **settings, seed=seed, train=True)
    valid = generate(cell.tests, **settings, seed=seed + 1, train=False)
    test = generate(cell.tests, **settings, seed=seed, train=False)
    return train, [valid], [test]


def split(words, cell: Cell) -> list:
    """[test, validation, training]; a language with few words has nothing to keep apart."""
    cuts = [0, None, None, None]
    if len(words[0]) > 2 * cell.tests:
        cuts = [0, cell.tests, 2 * cell.tests, None]
    return [[array[a:b] for array in words] for a, b in zip(cuts, cuts[1:], strict=False)]


class LSTM(nn.Module):
    """Embedding, torch's LSTM, a map to the vocabulary: (tokens [B, T]) -> (logits, state)."""

    def __init__(self, vocab, d, layers):
        super().__init__()
        self.embedding = nn.Embedding(vocab, d)
        self.out = nn.Linear(d, vocab)
        self.lstm = nn.LSTM(d, d, layers, batch_first=True)

    def forward(self, tokens):
        y, state = self.lstm(self.embedding(tokens))
        return self.out(y), state


class Autoencoder(nn.Module):
    """A model's state at the last token, plus sines of a place, through an MLP: the token there."""

    def __init__(self, model: Hope):
        super().__init__()
        self.model = model
        d = model.config.d_model
        hidden = [nn.RMSNorm(d), nn.Linear(d, d), nn.GELU()]
        more = [nn.RMSNorm(d), nn.Linear(d, d), nn.GELU()]
        out = [nn.RMSNorm(d), nn.Linear(d, model.config.vocab_size)]
        self.decoder = nn.Sequential(*hidden, *more, *out)

    def forward(self, tokens):
        x = self.model.embedding(tokens)
        for block in self.model.blocks:
            x, _ = block(x, None)
        d = self.model.config.d_model
        rates = 10_000.0 ** (-torch.arange(0, d, 2) / d)
        angle = torch.outer(torch.arange(tokens.shape[1]), rates).to(x)
        places = torch.cat([angle.sin(), angle.cos()], 1)  # [T, d]
        return self.decoder(x[:, -1:] + places), None


def build(cell: Cell) -> nn.Module:
    config = cell.config()
    if config is None:  # as many parameters as the others
        return LSTM(cell.vocab(), round(1.25 * cell.sizes["d_model"]), cell.sizes["n_layers"])
    return Autoencoder(Hope(config)) if cell.task == "compression" else Hope(config)


@torch.no_grad()
def score(model: nn.Module, part: list, how: str, batch: int = 128) -> float:
    """Accuracy in [0, 1] of whole "rows", of "tokens", or the mean over "classes" of tokens'."""
    right = []
    for inputs, targets in zip(*(array.split(batch) for array in part), strict=True):
        right.append(model(inputs)[0].argmax(-1) == targets)
    right = torch.cat(right)
    targets = part[1]
    asked = targets != IGNORE
    if how == "rows":
        return (right | ~asked).all(1).double().mean().item()
    right = right[asked].double()
    if how == "tokens":
        return right.mean().item()
    targets = targets[asked]
    return statistics.mean(right[targets == one].mean().item() for one in targets.unique())


def train_cell(cell: Cell, device: str, threads: int) -> dict:
    """Train and score one model. Divergence is a result too: scores None, and the error."""
    torch.set_num_threads(threads)

    def load(part):
        return [torch.from_numpy(array).to(device) for array in part]

    train, valid, test = data_sets(cell)
    x, y = load(train)
    valid = [load(part) for part in valid]
    test = [load(part) for part in test]
    how = {"formal": "rows", "mad": "classes", "mqar": "tokens"}[cell.suite]
    config = TrainConfig(lr=cell.lr, weight_decay=cell.weight_decay, seed=cell.seed)
    torch.manual_seed(cell.seed)
    model = build(cell).to(device)
    optimizer = optimizer_for(model, config)
    rng = np.random.default_rng(cell.seed)
    began = time.perf_counter()
    best = -1.0
    kept = None
    result = {"valid": None, "test": None}
    try:
        for step in range(cell.steps):
            # a batch, without the tokens behind the last that is asked for
            rows = torch.from_numpy(rng.integers(0, len(x), cell.batch)).to(device)
            length = 1 + int((y[rows] != IGNORE).any(0).nonzero().max())
            inputs = x[rows][:, :length]
            targets = y[rows][:, :length]
            lr = schedule(model, step, cell.steps, config)
            loss = loss_fn(model(inputs)[0], targets)
            update(model, optimizer, lr, [loss], config.grad_clip)
            # validate; the best weights so far count
            if step + 1 == cell.steps or (cell.check and (step + 1) % cell.check == 0):
                scores = [score(model, part, how) for part in valid]
                if statistics.mean(scores) >= best:
                    best = statistics.mean(scores)
                    result["valid"] = scores
                    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                if best == 1:
                    break
        model.load_state_dict(kept)
        result["test"] = [score(model, part, how) for part in test]
    except NonFinite as error:
        result["error"] = f"step {step + 1}: {error}"
    seconds = time.perf_counter() - began
    more = {"steps": step + 1, "loss": loss.item(), "seconds": seconds}
    return result | more | {"parameters": count(model)}
