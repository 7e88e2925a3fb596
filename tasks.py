"""Synthetic tasks: text and tokens made from a seed, with labels known exactly. Nothing here knows a model.

Needles in a haystack (RULER, Hsieh et al. 2024, arXiv 2404.06654; NL table 1): statements "... for KEY is: VALUE." hidden
between the sentences of any text, then asked for. The six kinds of the table, in RULER's wording, which belongs to the
benchmark (a prompt in other words is another task):

    S-NIAH-1     one number (a passkey) in a sentence repeated over and over        MK-NIAH-1   four keys, one asked for
    S-NIAH-2     one number in real text                                            MQ-NIAH     four keys, all asked for
    S-NIAH-3     one uuid in real text                                              MV-NIAH     one key with four values

BABILong (Kuratov et al. 2024, arXiv 2406.10149): the facts of a bAbI question scattered over a text of any length, which is
made piece by piece, so that ten million tokens need no memory.

Lengths are counted by `size`, a function of a string: len counts characters, and a caller counts its tokens.

The others are arrays of token ids, (inputs [n, T], targets [n, T]): targets[i, t] is what a model should say after reading
inputs[i, : t + 1], or IGNORE where it may say anything.

    formal languages (Bhattamishra et al. 2020; Irie et al. 2023, arXiv 2310.16076; NL table 5): after every symbol, is this
        prefix in the language, or which symbols may come next
    MAD (Poli et al. 2024, arXiv 2403.17844; NL table 4): recall, copying, compression, memorization
    multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): pairs first, then all keys are asked for

    python tasks.py             an example of each, over this file's own text
"""

import itertools
import random
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

IGNORE = -100  # a target that is neither learned nor scored

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {what}s for {key} is: {value}."

# what is hidden, in repeated filler instead of text, keys, keys asked for, values of a key
NEEDLES = {
    "S-NIAH-1": ("number", True, 1, 1, 1),
    "S-NIAH-2": ("number", False, 1, 1, 1),
    "S-NIAH-3": ("uuid", False, 1, 1, 1),
    "MK-NIAH-1": ("number", False, 4, 1, 1),
    "MQ-NIAH": ("number", False, 4, 4, 1),
    "MV-NIAH": ("number", False, 1, 1, 4),
}

# Up to a full stop (and closing quotes), or 400 characters of a text that has none.
SENTENCE = re.compile(r"\S(?:.{0,400}?[.!?]+[\"'’”)\]]*(?=\s)|.{0,400})", re.DOTALL)


def sentences(text: str, start: int = 0) -> Iterator[str]:
    """The sentences of a text from the first that begins after character `start` on, then from the top, without end.

    Runs of white space become single spaces. ValueError for a text of white space.
    """
    if not text.strip():
        raise ValueError("the haystack is empty: a text is needed to hide things in")
    first = SENTENCE.search(text, start) if start else None
    start = first.end() if first else 0
    for begin in itertools.chain([start], itertools.repeat(0)):
        for match in SENTENCE.finditer(text, begin):
            yield " ".join(match.group().split())


def needle(kind: str, haystack: str, length: int, seed: int = 0, words: list[str] | None = None,
           size: Callable[[str], int] = len) -> dict:  # fmt: skip
    """One question: {"prompt", "answers" (each must appear in what a model writes next), "keys", "depths"}.

    length: prompt and answers together, at most, in units of `size`; as many whole sentences of the haystack as fit.
    words: keys are made of two of them; by default words of the haystack. depths: of the needles, 0 (first) to 1 (last).
    Everything follows from (kind, length, seed). ValueError for an unknown kind, a length without room for one sentence,
    too few words. RULER sec. 3.
    """
    if kind not in NEEDLES:
        raise ValueError(f"unknown kind of needle {kind!r}: legal are {', '.join(NEEDLES)}")
    what, repeated, n_keys, n_asked, n_values = NEEDLES[kind]
    rng = random.Random(f"{kind} {length} {seed}")
    words = words or sorted(set(re.findall(r"\b[a-z]{4,}\b", haystack[:200_000])))
    if len(words) < 4:
        raise ValueError(f"keys are made of words, and there are only {len(words)}: at least 4 are needed")
    keys = set()
    while len(keys) < n_keys:
        keys.add("-".join(rng.sample(words, 2)))
    keys = sorted(keys, key=lambda key: rng.random())
    values = {key: [_value(what, rng) for _ in range(n_values)] for key in keys}
    hidden = [(key, value) for key in keys for value in values[key]]
    rng.shuffle(hidden)
    asked = keys[:n_asked]
    answers = [value for key in asked for value in values[key]]

    # RULER speaks of one thing in the singular
    whom = asked[0] if n_asked == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    if len(answers) == 1:
        some, noun, hides, verb = f"A special magic {what}", what, "is", "is"
    else:
        some, noun, hides, verb = f"Some special magic {what}s", f"{what}s", "are", "are all"
    head = f"{some} {hides} hidden within the following text. Make sure to memorize it. "
    head += f"I will quiz you about the {noun} afterwards.\n"
    mentioned = f"the special magic {noun} for {whom} mentioned in the provided text"
    ask = f"\nWhat {verb} {mentioned}? T{mentioned[1:]} {hides}"
    statements = [NEEDLE.format(what=what, key=key, value=value) for key, value in hidden]

    room = length - size(head + " ".join(statements) + ask + " " + ", ".join(answers))
    source, hay = sentences(FILLER if repeated else haystack, 0 if repeated else rng.randrange(len(haystack))), []
    for sentence in source:
        room -= size(" " + sentence)
        if room < 0:
            break
        hay.append(sentence)
    text = "\n" + " ".join(hay)
    if any(value in text for _, value in hidden):
        return needle(kind, haystack, length, seed + 2**32, words, size)  # the text itself says a value: draw again
    while hay:
        gaps = sorted(rng.randrange(len(hay) + 1) for _ in statements)
        parts = list(hay)
        for gap, statement in zip(reversed(gaps), reversed(statements), strict=True):
            parts.insert(gap, statement)
        prompt = head + " ".join(parts) + ask
        if size(prompt + " " + ", ".join(answers)) <= length:
            return {"prompt": prompt, "answers": answers, "keys": asked, "depths": [gap / len(hay) for gap in gaps]}
        hay.pop()  # a tokenizer may count a whole longer than its parts
    least = length - room
    raise ValueError(f"length {length} has no room for a sentence around the question: {kind} needs at least {least}")


def _value(what: str, rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4)) if what == "uuid" else str(rng.randrange(10**6, 10**7))


def babi(path: str | Path) -> list[dict]:
    """The questions of a bAbI file: {"facts" told up to there, "question", "answer"}. ValueError names a bad line."""
    questions, facts = [], []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        index, _, rest = line.partition(" ")
        if not index.isdigit():
            raise ValueError(f"{path} line {number} is no line of bAbI: {line[:60]!r}")
        if index == "1":
            facts = []
        question, *label = rest.split("\t")
        if label:
            questions.append({"facts": list(facts), "question": question.strip(), "answer": label[0].strip()})
        else:
            facts.append(rest.strip())
    return questions


def babilong(facts: list[str], question: str, haystack: str, length: int, seed: int = 0,
             size: Callable[[str], int] = len) -> Iterator[str]:  # fmt: skip
    """The pieces of a prompt of at most `length`, one sentence at a time: text with the facts, in order, at random places.

    The last piece is the question. The haystack is read from a random place on and, where it is too short, again from the
    top. ValueError for a length in which facts and question have no room.
    """
    ask = f"\nQuestion: {question}\nAnswer:"
    room = length - size(ask) - sum(size(fact + " ") for fact in facts)
    if room < 0:
        raise ValueError(f"length {length} has no room for the facts and the question: at least {length - room} is needed")
    rng = random.Random(f"babilong {length} {seed}")
    places = sorted(rng.random() * room for _ in facts)
    return _babilong(list(zip(places, facts, strict=True)), ask, sentences(haystack, rng.randrange(len(haystack))), room, size)


def _babilong(facts, ask, source, room, size):
    used = 0
    for sentence in source:
        while facts and facts[0][0] <= used:
            yield facts.pop(0)[1] + " "
        used += size(sentence + " ")
        if used > room:
            break
        yield sentence + " "
    yield from (fact + " " for _, fact in facts)
    yield ask


# ---------------------------------------------------------------------------------------------------------------------
# Formal languages. Symbols are the token ids 0, 1, ...; the labels, which only a model writes, are the ids after them.

LANGUAGES = {  # its symbols and what the labels say, in order
    "parity": ("01", ("an odd number of ones", "an even number: in the language")),
    "(aa)*": ("a", ("not in the language", "in the language")),
    "(abab)*": ("ab", ("not in the language", "in the language")),
    "a^n b^n": ("ab", ("next is a or b", "next is b", "complete")),
    "a^n b^n c^n": ("abc", ("next is a or b", "next is b", "next is c", "complete")),
    "shuffle-2": ("()[]", ("next is an opening one or the end", "also )", "also ], not )", "both")),
}


def formal(language: str, n: int, shortest: int, longest: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Up to n different words of a language -> (inputs, targets) [m, longest], in random order, padded on the right.

    Lengths are in [shortest, longest]. Languages with few words give all they have. Parity: every symbol follows with
    probability L / (1 + L), L the middle of the lengths; an odd word gets one more 1. Shuffle-2: two words of brackets from
    the grammar S -> (S) 0.5 | SS 0.25 | nothing, interleaved at random (Irie et al. draw nested words only).
    ValueError for an unknown language, or lengths without a word.
    """
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}: legal are {', '.join(LANGUAGES)}")
    if n < 1 or not 1 <= shortest <= longest:
        raise ValueError(f"{n} words of length {shortest} to {longest}: legal are n >= 1 and 1 <= shortest <= longest")
    rng = np.random.default_rng([seed, shortest, longest, *language.encode()])
    if language in ("parity", "shuffle-2"):
        if longest < 2:
            raise ValueError(f"{language} has no word of length {shortest} to {longest}")
        draw, words = (_parity if language == "parity" else _shuffle), np.empty((0, longest), np.int64)
        for _ in range(50):  # a short range has few words: then those found so far
            words = np.unique(np.concatenate([words, draw(n, shortest, longest, rng)]), axis=0)
            if len(words) >= n:
                break
    else:
        step = {"(aa)*": 2, "(abab)*": 4, "a^n b^n": 2, "a^n b^n c^n": 3}[language]
        length = np.arange(step, longest + 1, step)
        length, at = length[length >= shortest, None], np.arange(longest)
        symbol = {"(aa)*": 0 * at, "(abab)*": at % 2}.get(language, at * step // np.maximum(length, 1))
        words = np.where(at < length, symbol, -1)
    if not len(words):
        raise ValueError(f"{language} has no word of length {shortest} to {longest}")
    words = words[rng.permutation(len(words))[:n]]
    labels = len(LANGUAGES[language][0]) + prefix_labels(language, words)
    return np.maximum(words, 0), np.where(words >= 0, labels, IGNORE)


def prefix_labels(language: str, words: np.ndarray) -> np.ndarray:
    """The label, from 0, of every prefix of words [n, T] (symbols; -1 after the end)."""
    a, b, c, d = (np.cumsum(words == symbol, 1) for symbol in range(4))
    if language == "parity":
        return 1 - b % 2
    if language in ("(aa)*", "(abab)*"):
        return ((a + b) % (2 if language == "(aa)*" else 4) == 0).astype(int)
    if language == "shuffle-2":
        return (a > b) + 2 * (c > d)
    if language == "a^n b^n":
        return np.where(b == 0, 0, np.where(b < a, 1, 2))
    return np.where(b == 0, 0, np.where(b < a, 1, np.where(c < a, 2, 3)))


def _parity(n, shortest, longest, rng):
    L, lengths = (shortest + longest) // 2, np.arange(shortest, longest + 1)
    p = (L / (1 + L)) ** lengths
    length, at = rng.choice(lengths, (n, 1), p=p / p.sum()), np.arange(longest)
    words = np.where(at < length, rng.integers(0, 2, (n, longest)), -1)
    odd = (words == 1).sum(1) % 2 == 1
    words[odd[:, None] & (at == length)] = 1
    return words[(words == 1).sum(1) % 2 == 0]  # no room was left for the repair


def _shuffle(n, shortest, longest, rng):
    def brackets():  # a word of the grammar, or None for one that is too long
        todo, word = ["S"], []
        while todo:
            if len(word) > longest:
                return None
            if (now := todo.pop()) != "S":
                word.append(now)
                continue
            chance = rng.random()
            if chance < 0.5:
                word.append(0)
                todo += [1, "S"]
            elif chance < 0.75:
                todo += ["S", "S"]
        return word

    words = np.full((n, longest), -1)
    for row in words:
        pair = None
        while pair is None or None in pair or not shortest <= len(pair[0]) + len(pair[1]) <= longest:
            pair = brackets(), brackets()
        length, first = len(pair[0]) + len(pair[1]), len(pair[0])
        places = rng.permutation(length) < first
        row[:length][places], row[:length][~places] = pair[0], np.array(pair[1], int) + 2
    return words


# ---------------------------------------------------------------------------------------------------------------------
# MAD. In training a model predicts the next token everywhere, in testing it is asked only for what it can know.


def recall(n: int, vocab: int = 16, length: int = 128, noise: float = 0.0, noise_vocab: int = 0, seed: int = 0, train=False):
    """In-context recall: key value key value ..., every row with a map of its own; the values of keys seen before are asked.

    Keys are the ids below half of vocab - noise_vocab, values those up to it, and noise, which stands in the place of whole
    pairs with probability `noise`, the rest. The last pair is one seen before. -> (inputs, targets) [n, length - 1].
    """
    _check(n=n, vocab=vocab - noise_vocab, length=length)
    rng, slots, K = np.random.default_rng([seed, train]), length // 2, (vocab - noise_vocab) // 2
    values = rng.integers(K, vocab - noise_vocab, (n, K))
    keys, rows = rng.integers(0, K, (n, slots)), np.arange(n)
    noisy = rng.random((n, slots)) < noise
    shown = np.argmax(rng.random((n, slots - 1)), 1)  # one pair is no noise, and it is asked for if the others are
    noisy[rows, shown] = noisy[:, -1] = False
    keys[:, -1] = keys[rows, np.argmax(rng.random((n, slots - 1)) * ~noisy[:, :-1], 1)]
    seen, asked = np.zeros((n, K), bool), np.zeros((n, slots), bool)
    for slot in range(slots):
        here = rows[~noisy[:, slot]]
        asked[here, slot] = seen[here, keys[here, slot]]
        seen[here, keys[here, slot]] = True
    pairs = np.stack([keys, values[rows[:, None], keys]], -1)
    if noise:
        pairs = np.where(noisy[..., None], rng.integers(vocab - noise_vocab, vocab, pairs.shape), pairs)
    asked = np.stack([np.zeros_like(asked), asked], -1)
    return _shifted(pairs.reshape(n, -1), asked.reshape(n, -1), train)


def fuzzy_recall(n: int, vocab: int = 16, length: int = 128, motif: int = 3, seed: int = 0, train=False):
    """The same with keys and values of 1 to `motif` different tokens; in testing every key has `motif`.

    The last id of the vocabulary pads on the left. -> (inputs, targets) [n, length].
    """
    _check(n=n, vocab=vocab, length=length)
    rng, K = random.Random(f"fuzzy {seed} {train}"), (vocab - 1) // 2
    if length < 4 * motif or K < motif:
        raise ValueError(f"motifs of {motif} tokens need a length of at least {4 * motif} and a vocab of at least "
                         f"{2 * motif + 1}, got {length} and {vocab}")  # fmt: skip
    rows, asked = np.full((n, length + 1), vocab - 1), np.zeros((n, length + 1), bool)
    for row, ask in zip(rows, asked, strict=True):
        values, pairs, used = {}, [], 0
        while True:
            key = tuple(rng.sample(range(K), rng.randint(1, motif) if train else motif))
            value = values.get(key) or tuple(rng.sample(range(K, vocab - 1), rng.randint(1, motif)))
            if used + len(key + value) > length + 1 - 2 * motif and pairs:  # room for the last pair, one of these
                break
            pairs.append((key, value, key in values))
            values[key], used = value, used + len(key + value)
        key, value, _ = rng.choice(pairs)
        tokens = [token for key, value, _ in [*pairs, (key, value, True)] for token in key + value]
        known = [flag for key, value, old in [*pairs, (key, value, True)] for flag in [False] * len(key) + [old] * len(value)]
        row[-len(tokens) :], ask[-len(tokens) :] = tokens, known
    inputs, targets = _shifted(rows, asked, train)
    return inputs, np.where(rows[:, 1:] == vocab - 1, IGNORE, targets)


def selective_copying(n: int, vocab: int = 16, length: int = 256, copy: int = 16, seed: int = 0, train=False):
    """`copy` tokens among blanks, a sign (the last id), and then as many blanks (the id before): say them in order."""
    _check(n=n, vocab=vocab - 1, length=length)
    if not 1 <= copy < length / 2:
        raise ValueError(f"copy is {copy} tokens in a row of {length}: legal is 1 to less than half")
    rng, room = np.random.default_rng([seed, train]), length - copy - 1
    tokens = rng.integers(0, vocab - 2, (n, copy))
    inputs, targets = np.full((n, length), vocab - 2), np.full((n, length), IGNORE)
    places = np.sort(np.argsort(rng.random((n, room)), 1)[:, :copy], 1)
    np.put_along_axis(inputs, places, tokens, 1)
    inputs[:, room], targets[:, room + 1 :] = vocab - 1, tokens
    return inputs, targets


def compression(n: int, vocab: int = 16, length: int = 32, seed: int = 0, train=False):
    """Random tokens and a sign (the last id): a decoder must say the whole row from the state at the sign."""
    _check(n=n, vocab=vocab, length=length)
    inputs = np.random.default_rng([seed, train]).integers(0, vocab - 1, (n, length))
    inputs[:, -1] = vocab - 1
    return inputs, inputs


def memorization(n: int, vocab: int = 256, length: int = 32, seed: int = 0, train=False):
    """key sign key sign ...: at the sign (the last id) say the key's value. One map for all rows, training and testing."""
    _check(n=n, vocab=vocab, length=length)
    K, rng = (vocab - 1) // 2, np.random.default_rng([seed, train])
    values = K + np.random.default_rng(vocab).permutation(vocab - 1 - K)[:K]
    keys = rng.integers(0, K, (n, length // 2))
    inputs, targets = np.full((n, length // 2 * 2), vocab - 1), np.full((n, length // 2 * 2), IGNORE)
    inputs[:, ::2], targets[:, 1::2] = keys, values[keys]
    return inputs, targets


# Task: generator, training examples, and what is varied, one setting at a time (the score is the mean over all)
_LESS = ("examples", (6400, 3200, 1600, 800))
MAD = {
    "compression": (compression, {}, (("vocab", (32, 64, 128)), ("length", (64, 128, 256)), _LESS)),
    "recall": (recall, {}, (("vocab", (32, 64, 128)), ("length", (256, 512, 1024)), _LESS)),
    "noisy recall": (recall, {"vocab": 32, "noise_vocab": 16, "noise": 0.2},
                     (("vocab", (48, 80, 144)), ("length", (256, 512, 1024)), _LESS, ("noise", (0.4, 0.6, 0.8)))),
    "fuzzy recall": (fuzzy_recall, {}, (("vocab", (32, 64, 128)), ("length", (256, 512, 1024)), _LESS)),
    "selective copying": (selective_copying, {}, (("vocab", (32, 64, 128)), ("length", (512, 1024)), _LESS,
                                                  ("copy", (32, 64, 96)))),
    "memorization": (memorization, {"examples": 256}, (("vocab", (512, 1024, 2048, 4096, 8192)),)),
}  # fmt: skip


def mqar(n: int, vocab: int = 8192, length: int = 256, pairs: int = 16, power: float = 0.01, seed: int = 0, train=False):
    """Multi-query associative recall: `pairs` keys with their values, then every key once, soon rather than late.

    Keys are ids of the first half of the vocabulary (but 0), values of the second; a key comes back after g places of two
    tokens with probability ~ g^(power - 1); between them stand random tokens. -> (inputs, targets) [n, length].
    """
    _check(n=n, vocab=vocab, length=length)
    if pairs < 1 or vocab // 2 - 1 < pairs or length < 4 * pairs:
        raise ValueError(f"pairs is {pairs} with vocab {vocab} and length {length}: legal is 1 to {vocab // 2 - 1}, "
                         f"and 4 tokens for each")  # fmt: skip
    rng, places = np.random.default_rng([seed, train]), (length - 2 * pairs) // 2

    def different(size):  # numbers below size; a thousand rows at once, or 100,000 would fill the memory
        draws = (rng.random((min(1000, n - i), size)) for i in range(0, n, 1000))
        return np.concatenate([np.argsort(draw, 1)[:, :pairs] for draw in draws])

    keys, values = 1 + different(vocab // 2 - 1), vocab // 2 + different(vocab - vocab // 2)
    chance = np.arange(1, places + 1) ** (power - 1.0)
    # the largest of log p + Gumbel noise are a draw without repeats
    gaps = np.argsort(-(np.log(chance) + rng.gumbel(size=(n, places))), 1)[:, :pairs]
    inputs, targets = rng.integers(0, vocab, (n, length)), np.full((n, length), IGNORE)
    inputs[:, : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(inputs, 2 * pairs + 2 * gaps, keys, 1)
    np.put_along_axis(targets, 2 * pairs + 2 * gaps, values, 1)
    return inputs, targets


def _shifted(rows, asked, train):
    """Rows of tokens -> inputs and the tokens that follow them: all of them in training, else only those asked for."""
    return rows[:, :-1], rows[:, 1:] if train else np.where(asked, rows, IGNORE)[:, 1:]


def _check(n, vocab, length):
    if n < 1 or vocab < 4 or length < 4:
        raise ValueError(f"{n} rows of {length} tokens out of {vocab}: legal are at least 1, 4 and 4")


def main():
    text = Path(__file__).read_text(encoding="utf-8")
    for kind in NEEDLES:
        made = needle(kind, text, 1500)
        depths = ", ".join(f"{depth:.2f}" for depth in made["depths"])
        print(f"{kind}: {len(made['prompt'])} characters, answers {made['answers']}, at depths {depths}")
        print(made["prompt"][:200] + " [...] " + made["prompt"][-200:] + "\n")
    facts, question = ["Mary went to the kitchen.", "Mary went to the garden."], "Where is Mary?"
    print("BABILong:\n" + "".join(babilong(facts, question, text, 600)))
    for language, (symbols, labels) in LANGUAGES.items():
        inputs, targets = formal(language, 1, 12, 16)
        word = "".join(symbols[token] for token in inputs[0][targets[0] != IGNORE])
        said = "".join(str(label - len(symbols)) for label in targets[0][targets[0] != IGNORE])
        print(f"\n{language}\n  read {word}\n  say  {said}   {', '.join(f'{i}: {label}' for i, label in enumerate(labels))}")
    for name, (generate, settings, _) in (MAD | {"multi-query recall": (mqar, {"vocab": 64, "pairs": 4}, ())}).items():
        inputs, targets = generate(1, length=32, **{k: v for k, v in settings.items() if k != "examples"} |
                                   ({"copy": 4} if generate is selective_copying else {}))  # fmt: skip
        print(f"\n{name}\n  read {' '.join(f'{token:>3}' for token in inputs[0])}")
        print(f"  say  {' '.join('  .' if token == IGNORE else f'{token:>3}' for token in targets[0])}")


if __name__ == "__main__":
    main()
