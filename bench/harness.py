"""A model as EleutherAI's lm-eval sees it: log-likelihoods and greedy text, in batches; and the harness's tasks run on it.

Published tables were made with lm-eval, so its tasks, prompts, windows and metrics are used as they are (pip install -r
requirements-eval.txt). What is ours is `Scorer`, which needs nothing but a model (tokens, state) -> (logits, state):

    a question with several answers is read once: the state after it, a value, is copied for every answer;
    rows of different lengths share a batch: what pads the end of a row cannot change what came before;
    nothing is cut by default, the state carries any length.

With data_dir the harness's own tasks read released files instead of the network (tests/lm_eval_tasks).
"""

import difflib
import logging
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from learn import map_state
from support.checkpoint import first_line
from support.run import precision
from support.vocabulary import encode

LOCAL_TASKS = Path(__file__).resolve().parent / "tests" / "lm_eval_tasks"

# The folder of lm-eval that defines a task: reading it alone, not all 14,000 task files, saves seconds.
FOLDERS = {"wikitext": "wikitext", "lambada_openai": "lambada", "piqa": "piqa", "hellaswag": "hellaswag",
           "winogrande": "winogrande", "arc_easy": "arc", "arc_challenge": "arc", "social_iqa": "siqa",
           "boolq": "super_glue/boolq", "swde": "swde", "nq_open": "nq_open", "drop": "drop", "fda": "fda",
           "squad_completion": "squad_completion", "triviaqa": "triviaqa"}  # fmt: skip


def token_losses(logits, targets):
    """Cross-entropy in nats of every token, in float32 on the CPU. logits [B, T, vocab], targets [B, T] -> [B, T]."""
    flat = logits.float().flatten(0, 1)  # with the classes last: five times faster than as the middle dimension
    return F.cross_entropy(flat, targets.to(logits.device).flatten(), reduction="none").view(targets.shape).cpu()


class Scorer:
    """Log-likelihoods and greedy text of a model, (tokens [B, T], state) -> (logits [B, T, vocab], state), in batches.

    max_length: the longest input in tokens, longer ones lose their beginning, as in the harness; None: nothing is cut.
    `bar` counts tokens. ValueError for max_length < 1.
    """

    def __init__(self, model, encoding, device="cpu", max_length: int | None = None, bar: tqdm | None = None):
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}: legal is at least 1 token")
        self.model, self.encoding, self.device, self.max_length = model, encoding, torch.device(device), max_length
        self.bar, self.lock = bar if bar is not None else tqdm(disable=True), Lock()
        # tokens in a call and rows in a batch: on a CPU as fast as larger ones; 256 MB of float32 logits at most
        self.limit, self.rows = min(4096 if self.device.type == "cpu" else 2**18, 2**26 // encoding.n_vocab), 64

    def tokens(self, text: str) -> list[int]:
        return encode(text.encode("utf-8"), self.encoding).tolist()

    def call(self, tokens, state=None):
        with precision(self.device):
            return self.model(tokens.to(self.device), state)

    @torch.inference_mode()
    def read(self, tokens, state=None):
        """(logits of the last token [B, vocab], state) after tokens [B, T], which may be longer than one call bears."""
        for piece in tokens.split(max(1, self.limit // len(tokens)), 1):
            logits, state = self.call(piece, state)
            self.count(piece.numel())
        return logits[:, -1], state

    def loglikelihood(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding would write it) of each (context, continuation); a context has at least one token.

        ValueError for a continuation longer than max_length.
        """
        if self.max_length is not None:
            longest = max((len(end) for _, end in pairs), default=0)
            if longest > self.max_length:
                raise ValueError(f"a continuation has {longest} tokens: legal is at most max_length, {self.max_length}")
            pairs = [(context[-(self.max_length + 1 - len(end)) :], end) for context, end in pairs]
        answers, results = defaultdict(list), [(0.0, True)] * len(pairs)
        for i, (context, end) in enumerate(pairs):
            if end:  # a tokenizer may have merged all of it into the context
                answers[tuple(context)].append(i)
        several = {context: len(which) > 1 for context, which in answers.items()}
        order = sorted(answers, key=lambda context: (several[context], len(context)), reverse=True)
        batches = []
        while order:
            first = order[0]
            fit = order[: min(self.rows, max(1, self.limit // len(first)))]
            near = 16 if several[first] else len(first)  # what is longer than the shortest is read again for every answer
            batches.append([c for c in fit if several[c] == several[first] and len(first) - len(c) <= near])
            order = order[len(batches[-1]) :]

        @torch.inference_mode()
        def score(batch):
            state, cut = None, 0
            if several[batch[0]] and len(batch[-1]) > 1:
                cut = len(batch[-1]) - 1  # every row keeps a token to predict its answer from
                _, state = self.read(torch.tensor([c[:cut] for c in batch]))
            rows = [(len(c) - cut + len(pairs[i][1]) - 1, n, i) for n, c in enumerate(batch) for i in answers[c]]
            rows.sort(reverse=True)
            while rows:
                part = rows[: min(self.rows, max(1, self.limit // rows[0][0]))]
                rows = rows[len(part) :]
                scores = self._score([[*pairs[i][0][cut:], *pairs[i][1]] for _, _, i in part], [n for _, n, _ in part], state)
                for (_, _, i), nats, hit in zip(part, *scores, strict=True):
                    its = slice(len(pairs[i][0]) - cut - 1, len(pairs[i][0]) - cut - 1 + len(pairs[i][1]))
                    results[i] = (-nats[its].double().sum().item(), bool(hit[its].all()))
                self.count(sum(len(pairs[i][1]) for _, _, i in part))
            self.count(sum(len(c) - cut for c in batch))

        self.side_by_side(score, batches)
        return results

    def side_by_side(self, f, batches):
        """f of every batch; on a CPU one thread for each, 1.4 times as fast on two cores as all threads for one batch."""
        threads = torch.get_num_threads()
        if self.device.type != "cpu" or threads == 1:
            return [f(batch) for batch in batches]
        pool = ThreadPoolExecutor(threads)
        torch.set_num_threads(1)
        try:
            return list(pool.map(f, batches))
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for what has not begun
            torch.set_num_threads(threads)

    def count(self, n):
        with self.lock:
            self.bar.update(n)

    def _score(self, rows, which, state):
        """Per token: (nats, whether it had the largest logit) [B, longest - 1] of rows of tokens, each going on from row
        `which` of state; meaningless beyond the end of a row."""
        width = max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        which = torch.tensor(which, device=self.device)
        state = state and map_state(lambda t: t[which], state)
        nats, hit = torch.empty(len(rows), width - 1), torch.empty(len(rows), width - 1, dtype=torch.bool)
        step = max(1, self.limit // len(rows))
        for at in range(0, width - 1, step):
            to = min(at + step, width - 1)
            logits, state = self.call(tokens[:, at:to], state)
            wanted = tokens[:, at + 1 : to + 1]
            nats[:, at:to] = token_losses(logits, wanted)
            hit[:, at:to] = logits.argmax(-1).cpu() == wanted
        return nats, hit

    @torch.inference_mode()
    def generate(self, contexts: list[list[int]], n: int, until: tuple = (), state=None) -> list[str]:
        """What the model writes greedily after each context: at most n tokens, up to a string of `until` or the end of text.

        A batch holds contexts of different lengths: the longer ones go on being read while the shorter ones write. state:
        of one row, all contexts go on from there.
        """
        results, order = [""] * len(contexts), sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
        while order:
            longest = len(contexts[order[0]])
            batch = [i for i in order[: self.rows] if longest - len(contexts[i]) <= n]
            order = order[len(batch) :]
            keep = self.max_length and max(1, self.max_length - n)  # as the harness: room for what is written
            rows = [contexts[i][-keep:] if keep else contexts[i] for i in batch]
            cut = min(map(len, rows))
            many = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
            logits, s = self.read(torch.tensor([row[:cut] for row in rows]), state and map_state(lambda t, m=many: t[m], state))
            written, writing = [[] for _ in rows], set(range(len(rows)))
            for t in range(cut, max(map(len, rows)) + n):
                best, step = logits.argmax(-1).tolist(), []
                for r, row in enumerate(rows):
                    step.append(row[t] if t < len(row) else best[r])
                    if t >= len(row) and r in writing:
                        written[r].append(best[r])
                        results[batch[r]], ended = self._text(written[r], until)
                        if ended or len(written[r]) == n:
                            writing.discard(r)
                if not writing:
                    break
                logits, s = self.call(torch.tensor(step)[:, None], s)
                logits = logits[:, -1]
            self.count(sum(len(row) - cut for row in rows))
        return results

    def _text(self, tokens, until):
        """(text up to the first stop, whether there was one)."""
        ended = tokens[-1] == self.encoding.eot_token
        text = self.encoding.decode(tokens[: len(tokens) - ended], errors="replace")
        for stop in until:
            if stop and stop in text:
                text, ended = text[: text.index(stop)], True
        return text, ended

    def answer(self, pieces, n: int) -> str:
        """What is written after a text that comes in pieces: read in calls of `limit` tokens, at constant memory."""
        state, held = None, []
        for piece in pieces:
            held += self.tokens(piece)
            if len(held) > self.limit:
                _, state = self.read(torch.tensor([held[: self.limit]]), state)
                held = held[self.limit :]
        return self.generate([held], n, state=state)[0]


def adapter(scorer: Scorer, window: int, tasks: list = ()):
    """The model as an lm-eval LM. window: of rolling perplexity in tokens, cut as the harness does. tasks: whose requests
    the progress bar shall count when the first come."""
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
            pairs, owner = [], []
            for i, request in enumerate(requests):
                tokens = self.tok_encode(request.args[0])
                for pair in get_rolling_token_windows(tokens, self.prefix_token_id, window, context_len=1):
                    pairs.append(make_disjoint_window(pair))
                    owner.append(i)
            sums = np.zeros(len(requests))
            np.add.at(sums, owner, [nats for nats, _ in scorer.loglikelihood(pairs)])
            return sums.tolist()

        def generate_until(self, requests, disable_tqdm=True):
            self.count()
            results, alike = [None] * len(requests), defaultdict(list)
            for i, request in enumerate(requests):
                context, options = request.args
                if options.get("do_sample"):
                    raise ValueError("the task wants sampled answers: only greedy ones are supported")
                until = options.get("until") or []
                until = (until,) if isinstance(until, str) else tuple(until)
                alike[options.get("max_gen_toks", 256), until].append((i, self.tok_encode(context) or [self.eot_token_id]))
            for (n, until), items in alike.items():
                for (i, _), text in zip(items, scorer.generate([tokens for _, tokens in items], n, until), strict=True):
                    results[i] = text
            return results

    return Adapter()


def harness(scorer: Scorer, names: list[str], window: int, data_dir: str | None = None, limit: int | None = None,
            optional: bool = False) -> dict[str, dict]:  # fmt: skip
    """{task: {metric: value, "n": items}} of tasks of lm-eval, by name; accuracies from 0 to 1.

    window: see adapter. data_dir: read the data from its files. optional: leave out tasks whose files are not there.
    limit: the first so many items of each. ValueError where lm-eval or data is missing, and for an unknown name.
    """
    if data_dir is not None:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before datasets is imported: no network at all
        if not Path(data_dir).is_dir():
            raise ValueError(f"data_dir {data_dir!r} is not a folder")
    try:
        import datasets
        import lm_eval.api.task
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"lm-eval is not installed ({error}): pip install -r requirements-eval.txt") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, **_: items  # ours is the one progress bar

    local = data_dir is not None
    known = {path.stem for path in LOCAL_TASKS.glob("*.yaml")} if local else set(FOLDERS)
    if local or known >= set(names):
        paths = {str(Path(lm_eval.tasks.__file__).parent / FOLDERS[name]) for name in known}
        manager = TaskManager(include_defaults=False, include_path=[*sorted(paths), *[str(LOCAL_TASKS)] * local],
                              metadata={"data_dir": data_dir})  # fmt: skip
    else:
        manager = TaskManager()
        known = set(manager.all_tasks)
    if not optional and (wrong := set(names) - known):
        name = min(wrong)
        near = difflib.get_close_matches(name, known, 1)
        legal = ", ".join(sorted(known)) if local else "lm-eval's names (lm_eval ls tasks)"
        hint = f"did you mean {near[0]!r}?" if near else f"legal are {legal}"
        raise ValueError(f"unknown task {name!r}{' with --data-dir' if local else ''}: {hint}")
    loaded = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in sorted(set(names) & known):
        try:
            one = manager.load([f"local_{name}" if local else name])
        except OSError as error:  # no such file; no network
            if not optional:
                raise ValueError(f"the data of task {name!r} could not be read: {first_line(error)}") from None
            continue
        for part, entries in loaded.items():
            entries |= one.get(part, {})
    if not loaded["tasks"]:
        where = f"data_dir {data_dir!r}" if local else "the data sets' host"
        raise ValueError(f"{where} gives the data of none of the tasks {', '.join(sorted(set(names) & known))}")

    model = adapter(scorer, window, loaded["tasks"].values())
    done = evaluate(model, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    results = {}
    for task in loaded["tasks"]:
        values = {key.split(",")[0]: value for key, value in done["results"][task].items() if "," in key}
        values = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        results[task] = values | {"n": done["n-samples"][task]["effective"]}
    return results


def _size(task, scorer) -> int:
    """Tokens of the requests of a task: every context once, every continuation."""
    contexts = {request.args[0] for request in task.instances}
    ends = [text for request in task.instances for text in request.args[1:] if isinstance(text, str)]
    return sum(len(scorer.tokens(text)) for text in [*contexts, *ends])
