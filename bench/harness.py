"""EleutherAI's lm-eval, run on a model of this repository.

Published tables were made with lm-eval, so its tasks, prompts, windows and metrics are used as they
are (pip install -r requirements-eval.txt). What is ours is how a model is read: scorer.py.

With data_dir the harness's own tasks read released files instead of the network (lm_eval_tasks/).
"""

import difflib
import logging
import os
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from bench.scorer import Scorer, settings
from support.checkpoint import first_line

LOCAL_TASKS = Path(__file__).resolve().parent / "lm_eval_tasks"

# The folder of lm-eval that defines a task: reading it alone, not all 14,000 files, saves seconds.
FOLDERS = {
    "wikitext": "wikitext",
    "lambada_openai": "lambada",
    "piqa": "piqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "social_iqa": "siqa",
    "boolq": "super_glue/boolq",
    "swde": "swde",
    "nq_open": "nq_open",
    "drop": "drop",
    "fda": "fda",
    "squad_completion": "squad_completion",
    "triviaqa": "triviaqa",
}


def adapter(scorer: Scorer, window: int, tasks: list = ()):
    """The model as an lm-eval LM.

    window: of rolling perplexity in tokens, cut as the harness does. tasks: whose requests the
    progress bar shall count when the first come.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Adapter(TemplateLM):
        eot_token_id = scorer.encoding.eot_token
        uncounted = list(tasks)

        def count(self):
            if self.uncounted:
                scorer.bar.reset(sum(_size(task, scorer) for task in self.uncounted))
                self.uncounted = []

        def tok_encode(self, string, add_special_tokens=None, **_):
            return scorer.tokens(string)

        def loglikelihood(self, requests, disable_tqdm=True):
            self.count()
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests, **_):
            return scorer.loglikelihood([(context, end) for _, context, end in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm=True):
            self.count()
            pairs = []
            owner = []
            for i, request in enumerate(requests):
                tokens = self.tok_encode(request.args[0])
                begin = self.prefix_token_id
                for pair in get_rolling_token_windows(tokens, begin, window, context_len=1):
                    pairs.append(make_disjoint_window(pair))
                    owner.append(i)
            sums = np.zeros(len(requests))
            np.add.at(sums, owner, [nats for nats, _ in scorer.loglikelihood(pairs)])
            return sums.tolist()

        def generate_until(self, requests, disable_tqdm=True):
            self.count()
            alike = defaultdict(list)  # (tokens to write, stops): (number, tokens) of requests
            for i, request in enumerate(requests):
                context, options = request.args
                tokens = self.tok_encode(context) or [self.eot_token_id]
                alike[settings(options)].append((i, tokens))
            results = [None] * len(requests)
            for (n, until), items in alike.items():
                texts = scorer.generate([tokens for _, tokens in items], n, until)
                for (i, _), text in zip(items, texts, strict=True):
                    results[i] = text
            return results

    return Adapter()


def _size(task, scorer: Scorer) -> int:
    """Tokens of the requests of a task: every context once, every continuation."""
    texts = list({request.args[0] for request in task.instances})
    for request in task.instances:
        texts += [text for text in request.args[1:] if isinstance(text, str)]
    return sum(map(scorer.length, texts))


def check_there(data_dir: str | None) -> None:
    """ValueError where lm-eval or the folder of its data is missing."""
    if data_dir == "" or (data_dir and not Path(data_dir).is_dir()):
        raise ValueError(f"data_dir {data_dir!r} is not a folder")
    if find_spec("lm_eval") is None or find_spec("datasets") is None:
        raise ValueError("lm-eval is not installed: pip install -r requirements-eval.txt")


def harness(
    scorer: Scorer,
    names: list[str],
    window: int,
    data_dir: str | None = None,
    limit: int | None = None,
    optional: bool = False,
    model=None,
) -> dict[str, dict]:
    """{task: {metric: value, "n": items}} of tasks of lm-eval, by name; accuracies from 0 to 1.

    window: see adapter. data_dir: read the data from its files. limit: the first so many items of
    each. optional: leave out tasks whose files are not there. model: an lm-eval LM to ask instead
    of the scorer. ValueError where lm-eval or data is missing, and for an unknown name.
    """
    check_there(data_dir)
    if data_dir is not None:
        # before datasets is imported: no network at all
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        import datasets
        import lm_eval.api.task
        from lm_eval.evaluator import evaluate
    except ImportError as error:
        raise ValueError(f"lm-eval cannot be imported: {first_line(error)}") from None

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, **_: items  # ours is the one progress bar

    loaded = _load_tasks(names, data_dir, optional)
    model = model or adapter(scorer, window, loaded["tasks"].values())
    done = evaluate(model, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    results = {}
    for task in loaded["tasks"]:
        values = {}
        for key, value in done["results"][task].items():
            if "," in key and isinstance(value, (int, float)):
                values[key.split(",")[0]] = value
        results[task] = values | {"n": done["n-samples"][task]["effective"]}
    return results


def _load_tasks(names: list[str], data_dir: str | None, optional: bool) -> dict:
    """The tasks as lm-eval's evaluator takes them. Arguments and errors of `harness`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    local = data_dir is not None
    known = {path.stem for path in LOCAL_TASKS.glob("*.yaml")} if local else set(FOLDERS)
    if local or known >= set(names):
        root = Path(lm_eval.__file__).parent / "tasks"
        paths = sorted({str(root / FOLDERS[name]) for name in known})
        if local:
            paths.append(str(LOCAL_TASKS))
        about = {"data_dir": data_dir}
        manager = TaskManager(include_defaults=False, include_path=paths, metadata=about)
    else:
        manager = TaskManager()
        known = set(manager.all_tasks)
    wrong = set(names) - known
    if wrong and not optional:
        name = min(wrong)
        near = difflib.get_close_matches(name, known, 1)
        legal = ", ".join(sorted(known)) if local else "lm-eval's names (lm_eval ls tasks)"
        hint = f"did you mean {near[0]!r}?" if near else f"must be one of {legal}"
        raise ValueError(f"unknown task {name!r}{' with --data-dir' if local else ''}: {hint}")
    loaded = {"tasks": {}, "groups": {}, "group_map": {}}
    wanted = sorted(set(names) & known)
    for name in wanted:
        try:
            one = manager.load([f"local_{name}" if local else name])
        except OSError as error:  # no such file; no network
            if optional:
                continue
            why = first_line(error)
            raise ValueError(f"the data of task {name!r} could not be read: {why}") from None
        for part, entries in loaded.items():
            entries |= one.get(part, {})
    if not loaded["tasks"]:
        where = f"data_dir {data_dir!r}" if local else "the data sets' host"
        raise ValueError(f"{where} gives the data of none of the tasks {', '.join(wanted)}")
    return loaded
