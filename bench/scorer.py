"""What a model says about texts, in batches: log-likelihoods of continuations, and greedy text.

`Scorer` needs nothing but a model (tokens, state) -> (logits, state):

    a question with several answers is read once: the state after it is copied for every answer;
    rows of different lengths share a batch: padding at the end of a row cannot change what came
    before it;
    nothing is cut by default, the state carries any length.
"""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch
import torch.nn.functional as F
from tqdm import tqdm

from layers import map_state
from support.run import precision
from support.vocabulary import encode


def token_losses(logits, targets):
    """Cross-entropy in nats of every token, in float32 on the CPU.

    logits [B, T, vocab], targets [B, T] -> [B, T].
    """
    # with the classes last: five times faster than as the middle dimension
    flat = logits.float().flatten(0, 1)  # [B T, vocab]
    targets = targets.to(logits.device)
    return F.cross_entropy(flat, targets.flatten(), reduction="none").view(targets.shape).cpu()


# What a task may call the most tokens to write; the first of these that is given counts.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def settings(options: dict) -> tuple[int, tuple]:
    """(most tokens, stops) of a task's generation settings, read as lm-eval reads them.

    ValueError where they ask for sampled text: temperature 0 is greedy, whatever do_sample says.
    """
    sampled = options.get("do_sample")
    temperature = options.get("temperature")
    temperature = bool(sampled) if temperature is None else float(temperature)
    if sampled is not False and temperature > 0:
        wanted = "do_sample false or temperature 0, as only greedy answers are written"
        raise ValueError(f"a task must have {wanted}, got {options}")
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else until
    lengths = (options.get(name) for name in LENGTHS)
    return int(next((n for n in lengths if n is not None), 256)), tuple(until)


class Scorer:
    """Log-likelihoods and greedy text of a model (tokens [B, T], state) -> (logits, state).

    max_length: the longest input in tokens; longer ones lose their beginning, as in lm-eval. None:
    nothing is cut. `bar` counts tokens. ValueError for max_length < 1.
    """

    rows = 64  # in a batch

    def __init__(self, model, encoding, device="cpu", max_length: int | None = None, bar=None):
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, got {max_length}")
        self.model = model
        self.encoding = encoding
        self.device = torch.device(device)
        self.max_length = max_length
        self.bar = bar if bar is not None else tqdm(disable=True)
        self.lock = Lock()
        # Tokens in a call: on a CPU as fast as more; 256 MB of float32 logits at most.
        most = 4096 if self.device.type == "cpu" else 2**18
        self.limit = min(most, 2**26 // encoding.n_vocab)

    def tokens(self, text: str) -> list[int]:
        """Half a surrogate pair, which no UTF-8 has, is read as U+FFFD."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return encode(text.encode("utf-8"), self.encoding).tolist()

    def length(self, text: str) -> int:
        return len(self.tokens(text))

    def count(self, n: int) -> None:
        with self.lock:
            self.bar.update(n)

    def call(self, tokens, state=None):
        with precision(self.device):
            return self.model(tokens.to(self.device), state)

    @torch.no_grad()
    def read(self, tokens, state=None):
        """(logits of the last token [B, vocab], state) of tokens [B, T], of any length."""
        for piece in tokens.split(max(1, self.limit // len(tokens)), 1):
            logits, state = self.call(piece, state)
            self.count(piece.numel())
        return logits[:, -1], state

    # Log-likelihoods

    def loglikelihood(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding would write it) of each (context, continuation).

        A context has at least one token. ValueError for a continuation longer than max_length.
        """
        if self.max_length is not None:
            longest = max((len(end) for _, end in pairs), default=0)
            if longest > self.max_length:
                limit = f"at most max_length, {self.max_length}, tokens"
                raise ValueError(f"a continuation must have {limit}, got {longest}")
            pairs = [(context[-(self.max_length + 1 - len(end)) :], end) for context, end in pairs]
        answers = defaultdict(list)  # context: which pairs begin with it
        for i, (context, end) in enumerate(pairs):
            if end:  # a tokenizer may have merged all of it into the context
                answers[tuple(context)].append(i)
        results = [(0.0, True)] * len(pairs)

        def score(batch):
            for i, result in self._score_answers(batch, answers, pairs):
                results[i] = result

        self._in_threads(score, self._batches(answers))
        return results

    def _batches(self, answers: dict) -> list[list[tuple]]:
        """Contexts in batches, those with several answers apart, the long ones first."""
        several = {context: len(which) > 1 for context, which in answers.items()}
        order = sorted(answers, key=lambda context: (several[context], len(context)), reverse=True)
        batches = []
        while order:
            first = order[0]
            # What is longer than the shortest is read again for every answer.
            shortest = len(first) - 16 if several[first] else 0
            batch = []
            for c in order[: min(self.rows, max(1, self.limit // len(first)))]:
                if several[c] == several[first] and len(c) >= shortest:
                    batch.append(c)
            batches.append(batch)
            order = order[len(batch) :]
        return batches

    @torch.no_grad()
    def _score_answers(self, batch, answers, pairs) -> list[tuple[int, tuple[float, bool]]]:
        """(number of a pair, its result) of all answers to the contexts of a batch."""
        # read what is shared: every row keeps a token to predict its answer from
        state = None
        cut = 0
        if len(answers[batch[0]]) > 1 and len(batch[-1]) > 1:
            cut = len(batch[-1]) - 1
            _, state = self.read(torch.tensor([context[:cut] for context in batch]))
        rows = []  # (tokens to read, row of the state, pair), the longest first
        for n, context in enumerate(batch):
            for i in answers[context]:
                rows.append((len(context) - cut + len(pairs[i][1]) - 1, n, i))
        rows.sort(reverse=True)
        results = []
        while rows:
            part = rows[: min(self.rows, max(1, self.limit // rows[0][0]))]
            rows = rows[len(part) :]
            texts = [[*pairs[i][0][cut:], *pairs[i][1]] for _, _, i in part]
            scores = self._score(texts, [n for _, n, _ in part], state)
            for (_, _, i), nats, hit in zip(part, *scores, strict=True):
                context, end = pairs[i]
                begin = len(context) - cut - 1
                own = slice(begin, begin + len(end))
                results.append((i, (-nats[own].double().sum().item(), bool(hit[own].all()))))
                self.count(len(end))
        self.count(sum(len(context) - cut for context in batch))
        return results

    def _score(self, rows, which, state):
        """Per token (nats, whether it had the largest logit), [B, longest - 1], of rows of tokens.

        Each row goes on from row `which` of state. Meaningless beyond the end of a row.
        """
        width = max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        which = torch.tensor(which, device=self.device)
        state = state and map_state(lambda t: t[which], state)
        nats = torch.empty(len(rows), width - 1)
        hit = torch.empty(len(rows), width - 1, dtype=torch.bool)
        step = max(1, self.limit // len(rows))
        for at in range(0, width - 1, step):
            to = min(at + step, width - 1)
            logits, state = self.call(tokens[:, at:to], state)
            wanted = tokens[:, at + 1 : to + 1]
            nats[:, at:to] = token_losses(logits, wanted)
            hit[:, at:to] = logits.argmax(-1).cpu() == wanted
        return nats, hit

    def _in_threads(self, f, batches) -> None:
        """f of every batch; on a CPU one thread each.

        That is 1.4 times as fast on two cores as all threads for one batch.
        """
        threads = torch.get_num_threads()
        if self.device.type != "cpu" or threads == 1:
            for batch in batches:
                f(batch)
            return
        pool = ThreadPoolExecutor(threads)
        torch.set_num_threads(1)
        try:
            list(pool.map(f, batches))
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for what has not begun
            torch.set_num_threads(threads)

    # Greedy text

    @torch.no_grad()
    def generate(self, contexts, n: int, until: tuple = (), state=None) -> list[str]:
        """What the model writes greedily after each context, a list of tokens.

        At most n tokens, up to a string of `until` or the end of text. state: of one row; all
        contexts go on from there. ValueError for n < 0.
        """
        if n < 0:
            raise ValueError(f"at least 0 tokens must be asked for, got {n}")
        results = [""] * len(contexts)
        order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
        while order:
            longest = len(contexts[order[0]])
            batch = [i for i in order[: self.rows] if longest - len(contexts[i]) <= n]
            order = order[len(batch) :]
            keep = len(contexts[batch[0]])
            if self.max_length:
                keep = max(1, self.max_length - n)  # as the harness: room for what is written
            texts = self._write([contexts[i][-keep:] for i in batch], n, until, state)
            for i, text in zip(batch, texts, strict=True):
                results[i] = text
        return results

    def _write(self, rows, n, until, state) -> list[str]:
        """`generate` of a batch: the longer rows go on being read while the shorter ones write."""
        cut = min(map(len, rows))
        first = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
        state = state and map_state(lambda t: t[first], state)
        logits, state = self.read(torch.tensor([row[:cut] for row in rows]), state)
        texts = [""] * len(rows)
        written = [[] for _ in rows]
        writing = set(range(len(rows)))
        for t in range(cut, max(map(len, rows)) + n):
            best = logits.argmax(-1).tolist()
            step = []
            for r, row in enumerate(rows):
                if t < len(row):
                    step.append(row[t])
                    continue
                step.append(best[r])
                if r in writing:
                    written[r].append(best[r])
                    texts[r], ended = self._text(written[r], until)
                    if ended or len(written[r]) == n:
                        writing.discard(r)
            if not writing:
                break
            logits, state = self.call(torch.tensor(step)[:, None], state)
            logits = logits[:, -1]
        self.count(sum(len(row) - cut for row in rows))
        return texts

    def _text(self, tokens, until):
        """(text up to the first stop, whether there was one)."""
        ended = tokens[-1] == self.encoding.eot_token
        text = self.encoding.decode(tokens[: len(tokens) - ended], errors="replace")
        for stop in until:
            if stop and stop in text:
                text = text[: text.index(stop)]
                ended = True
        return text, ended

    def answer(self, pieces, n: int) -> str:
        """What is written after a text that comes in pieces, read at constant memory."""
        state = None
        held = []
        for piece in pieces:
            held += self.tokens(piece)
            if len(held) > self.limit:
                _, state = self.read(torch.tensor([held[: self.limit]]), state)
                held = held[self.limit :]
        return self.generate([held], n, state=state)[0]
