"""What a person sees of a run: the progress line, loss.png, a sample, the rates of its memories."""

import contextlib
import signal
import threading
from collections import deque

import numpy as np
import torch
from torch import nn

from learn import plain
from memory import watch
from support.checkpoint import atomic_write
from support.distributed import rank
from support.flags import Progress
from support.plots import picture
from support.run import Run, precision


def say(text: str) -> None:
    """Print, in the first process."""
    if rank() == 0:
        print(text, flush=True)


class ProgressBar(Progress):
    """Steps done, mean loss and speed of the last 50, time left."""

    LINE = "{percentage:3.0f}%|{bar:20}| step {n_fmt}/{total_fmt}{postfix}, {remaining} left"

    def __init__(self, steps: int, start: int):
        super().__init__(
            total=steps,
            initial=start,
            disable=rank() > 0,
            bar_format=self.LINE,
        )
        self.recent = deque(maxlen=50)

    def show(self, record: dict, skipped: int) -> None:
        self.recent.append((record["bits_per_byte"], record["tokens_per_s"]))
        loss, speed = np.mean(self.recent, axis=0)
        note = f", {skipped} skipped" if skipped else ""
        text = f"{loss:.3f} bits per byte, {speed:,.0f} tokens/s{note}"
        self.set_postfix_str(text, refresh=False)


def counting(total: int, show: bool) -> Progress:
    """A bar of the tokens validated."""
    line = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} tokens, {remaining} left"
    hide = not show or rank() > 0
    return Progress(total=total, bar_format=line, disable=hide, unit_scale=True)


@contextlib.contextmanager
def interrupts():
    """A list that fills at Ctrl-C or SIGTERM, so that the step is finished; a second one kills."""
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handler(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, what in before.items():
            signal.signal(number, what)


@torch.no_grad()
def rates(model: nn.Module, tokens: torch.Tensor) -> dict:
    """{"eta": [...], "alpha": [...]}: per layer, mean step size and retention on tokens [B, T].

    By the plain path of every mixer. None for a layer without memories, {} for a model without.
    """
    found = {"eta": [], "alpha": []}
    with watch() as seen, plain(model), torch.compiler.set_stance("force_eager"):

        def collect(*_):  # after each mixer: the means of its memories, over all calls of `scan`
            for name, means in found.items():
                total = sum(call[name].mean() for call in seen)  # a GPU is asked once
                means.append(float(total) / len(seen) if seen else None)
            seen.clear()

        hooks = [block.mixer.register_forward_hook(collect) for block in model.blocks]
        model(tokens, updates="off")  # one call of each mixer
        for hook in hooks:
            hook.remove()
    return {name: means for name, means in found.items() if set(means) != {None}}


def trailing_mean(y: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values at every step: no step looks ahead."""
    ends = np.arange(1, len(y) + 1)
    begins = np.maximum(0, ends - window)
    sums = np.cumsum(np.concatenate([[0.0], y]))
    return (sums[1:] - sums[begins]) / (ends - begins)


def plot(run: Run) -> None:
    """loss.png from metrics.jsonl: the loss, and under it the learning rate."""
    records = run.metrics()
    train = [r for r in records if "bits_per_byte" in r]
    val = [(r["tokens"], r["val_bits_per_byte"]) for r in records if "val_bits_per_byte" in r]
    if not train:
        return
    x, y, lr = np.array([[r[key] for key in ("tokens", "bits_per_byte", "lr")] for r in train]).T
    window = min(len(y), max(20, len(y) // 50))
    smooth = trailing_mean(y, window)
    units = [(1e9, "billion"), (1e6, "million")]
    unit, name = next((unit for unit in units if x[-1] >= unit[0]), (1e3, "thousand"))
    at, held_out = np.array(val).reshape(-1, 2).T
    with picture(run.folder / "loss.png", 8, 5.4) as figure:
        loss, rate = figure.subplots(2, sharex=True, height_ratios=(4, 1))
        loss.plot(x / unit, y, color="C0", alpha=0.25, linewidth=0.8, label="training, each step")
        loss.plot(x / unit, smooth, color="C0", label=f"training, mean of {window} steps")
        loss.plot(at / unit, held_out, "o-", color="C1", label="held-out files")
        if val:
            style = {"ha": "right", "color": "C1", "fontweight": "bold"}
            offset = {"xytext": (0, 8), "textcoords": "offset points"}
            end = (at[-1] / unit, held_out[-1])
            loss.annotate(f"{held_out[-1]:.3f}", end, **offset, **style)
        # the first tenth falls from far above: it would leave no room for the rest
        shown = np.concatenate([smooth[len(smooth) // 10 :], held_out])
        loss.set_ylim(0.94 * shown.min(), 1.03 * shown.max())
        loss.set(ylabel="loss (bits per byte)", title=run.title)
        loss.legend()
        rate.plot(x / unit, lr, color="C7")
        rate.set(xlabel=f"training tokens ({name})", ylabel="learning rate", ylim=(0, None))


def write_sample(run: Run) -> str:
    """Print text from the model and write it to sample.txt; returns the prompt."""
    beginning = run.encoding.decode(run.corpus.val[:64].tolist(), errors="ignore").split("\n")[0]
    prompt = "def " if run.config.data == "stdlib" else beginning or "\n"
    tokens = torch.tensor([run.encoding.encode_ordinary(prompt)], device=run.device)
    run.model.eval()
    torch.manual_seed(run.config.seed)
    # eager: these lengths no other step has
    with precision(run.device), torch.compiler.set_stance("force_eager"):
        written = [int(token) for token in run.model.generate(tokens, 200, temperature=0.8)]
    sample = prompt + run.encoding.decode(written, errors="replace")
    if rank() == 0:
        text = sample + "\n"
        path = run.folder / "sample.txt"
        atomic_write(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    say(f"\na sample:\n{'-' * 80}\n{sample}\n{'-' * 80}")
    return prompt
