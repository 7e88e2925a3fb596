"""Synthetic tasks: text and tokens made from a seed, with exact labels. Nothing here knows a model.

Needles in a haystack (RULER, Hsieh et al. 2024, arXiv 2404.06654; NL table 1): statements "... for
KEY is: VALUE." hidden between the sentences of a text, then asked for. The six kinds of the table:

    S-NIAH-1     one number (a passkey) in a sentence repeated over and over
    S-NIAH-2     one number in real text
    S-NIAH-3     one uuid in real text
    MK-NIAH-1    four keys, one asked for
    MQ-NIAH      four keys, all asked for
    MV-NIAH      one key with four values

BABILong (Kuratov et al. 2024, arXiv 2406.10149): the facts of a bAbI question scattered over a text
of any length, which is made piece by piece, so that ten million tokens need no memory.

Lengths of text are counted by `size`, a function of a string: len counts characters, and a caller
may count its tokens.

The other tasks are arrays of token ids, (inputs [n, T], targets [n, T]): targets[i, t] is what a
model should say after reading inputs[i, : t + 1], or IGNORE where it may say anything.

    formal languages    after every symbol: is this prefix in the language, or what may come next
                        (Bhattamishra et al. 2020; Irie et al. 2023, arXiv 2310.16076; NL table 5)
    MAD                 recall, copying, compression, memorization
                        (Poli et al. 2024, arXiv 2403.17844; NL table 4)
    multi-query recall  pairs first, then all keys are asked for
                        (Arora et al. 2023, arXiv 2312.04927)

Images, for ctm.py: perfect mazes, made and solved here, and pictures in a folder for each class.

    python tasks.py     an example of each, over this file's own text
"""

import itertools
import random
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

IGNORE = -100  # a target that is neither learned nor scored
Size = Callable[[str], int]

# --------------------------------------------------------------------------------------------------
# Text

# Up to a full stop (and closing quotes), or 400 characters of a text that has none.
SENTENCE = re.compile(r"\S(?:.{0,400}?[.!?]+[\"'’”)\]]*(?=\s)|.{0,400})", re.DOTALL)


def sentences(text: str, start: int = 0) -> Iterator[str]:
    """The sentences of a text, without end: from the first after `start` on, then from the top.

    Runs of white space become single spaces. ValueError for a text of white space.
    """
    if not text.strip():
        raise ValueError("the haystack is empty: a text is needed to hide things in")
    first = SENTENCE.search(text, start) if start else None
    start = first.end() if first else 0
    for begin in itertools.chain([start], itertools.repeat(0)):
        for match in SENTENCE.finditer(text, begin):
            yield " ".join(match.group().split())


# --------------------------------------------------------------------------------------------------
# Needles in a haystack. deviation 53: RULER's wording, which belongs to the benchmark (a prompt in
# other words is another task), but any text as haystack and any measure of length

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


def needle(
    kind: str, haystack: str, length: int, seed=0, words: list[str] | None = None, size: Size = len
) -> dict:
    """One question, random by (kind, length, seed). RULER sec. 3.

    -> {"prompt", "answers": each must be in what a model writes next, "keys": those asked for,
    "depths": of the needles, 0 (first) to 1 (last)}. length: of prompt and answers together, at
    most; as many whole sentences as fit. words: keys are made of two of them; None: words of the
    haystack. ValueError for an unknown kind, too few words, or no room for a sentence.
    """
    if kind not in NEEDLES:
        raise ValueError(f"kind of needle must be one of {', '.join(NEEDLES)}, got {kind!r}")
    what, repeated, n_keys, n_asked, n_values = NEEDLES[kind]
    rng = random.Random(f"{kind} {length} {seed}")
    words = words or sorted(set(re.findall(r"\b[a-z]{4,}\b", haystack[:200_000])))
    if len(words) < 4:
        raise ValueError(f"words for keys must be at least 4, got {len(words)}")
    # what is hidden, and in which order
    keys = set()
    while len(keys) < n_keys:
        keys.add("-".join(rng.sample(words, 2)))
    keys = sorted(keys, key=lambda key: rng.random())
    hidden = []
    for key in keys:
        hidden += [(key, _value(what, rng)) for _ in range(n_values)]
    asked = keys[:n_asked]
    answers = [value for key, value in hidden if key in asked]
    rng.shuffle(hidden)
    statements = [NEEDLE.format(what=what, key=key, value=value) for key, value in hidden]
    head, ask = _wording(what, asked, len(answers))
    said = " " + ", ".join(answers)
    # as many sentences as there is room for
    start = 0 if repeated else rng.randrange(len(haystack))
    room = length - size(head + " ".join(statements) + ask + said)
    hay = []
    for sentence in sentences(FILLER if repeated else haystack, start):
        room -= size(" " + sentence)
        if room < 0:
            break
        hay.append(sentence)
    text = "\n" + " ".join(hay)
    if any(value in text for _, value in hidden):  # the text itself says a value: draw again
        return needle(kind, haystack, length, seed + 2**32, words, size)
    while hay:
        gaps = sorted(rng.randrange(len(hay) + 1) for _ in statements)
        parts = list(hay)
        for gap, statement in zip(reversed(gaps), reversed(statements), strict=True):
            parts.insert(gap, statement)
        prompt = head + " ".join(parts) + ask
        if size(prompt + said) <= length:
            depths = [gap / len(hay) for gap in gaps]
            return {"prompt": prompt, "answers": answers, "keys": asked, "depths": depths}
        hay.pop()  # a tokenizer may count a whole longer than its parts
    wanted = f"at least {length - room} for a sentence around the question of {kind}"
    raise ValueError(f"length must be {wanted}, got {length}")


def _value(what: str, rng: random.Random) -> str:
    if what == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return str(rng.randrange(10**6, 10**7))


def _wording(what: str, asked: list[str], n_answers: int) -> tuple[str, str]:
    """What stands before the text, and the question after it; of one thing in the singular."""
    one = n_answers == 1
    some = "A" if one else "Some"
    noun = what if one else f"{what}s"
    hides = "is" if one else "are"
    verb = "is" if one else "are all"
    *others, last = asked
    keys = ", ".join(others) + ", and " + last if others else last
    head = (
        f"{some} special magic {noun} {hides} hidden within the following text. "
        f"Make sure to memorize it. I will quiz you about the {noun} afterwards.\n"
    )
    mentioned = f"he special magic {noun} for {keys} mentioned in the provided text"
    return head, f"\nWhat {verb} t{mentioned}? T{mentioned} {hides}"


# --------------------------------------------------------------------------------------------------
# BABILong


def babi(path: str | Path) -> list[dict]:
    """The questions of a bAbI file, each {"facts" told up to there, "question", "answer"}.

    ValueError names a bad line.
    """
    questions = []
    facts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        index, _, rest = line.partition(" ")
        if not index.isdigit():
            raise ValueError(f"{path} line {number} is no line of bAbI: {line[:60]!r}")
        if index == "1":
            facts = []
        told, *label = (part.strip() for part in rest.split("\t"))
        if label:
            questions.append({"facts": list(facts), "question": told, "answer": label[0]})
        else:
            facts.append(told)
    return questions


def babilong(
    facts: list[str], question: str, haystack: str, length: int, seed=0, size: Size = len
) -> Iterator[str]:
    """The pieces of a prompt of at most `length`: sentences of a text, with the facts among them.

    Facts are at random places, in order; the last piece is the question. The haystack is read from
    a random place on and, where it is too short, again from the top. ValueError for a length in
    which facts and question have no room.
    """
    ask = f"\nQuestion: {question}\nAnswer:"
    room = length - size(ask) - sum(size(fact + " ") for fact in facts)
    if room < 0:
        wanted = f"at least {length - room} for the facts and the question"
        raise ValueError(f"length must be {wanted}, got {length}")
    rng = random.Random(f"babilong {length} {seed}")
    places = sorted(rng.random() * room for _ in facts)
    source = sentences(haystack, rng.randrange(len(haystack)))

    def pieces():
        left = list(zip(places, facts, strict=True))
        used = 0
        for sentence in source:
            while left and left[0][0] <= used:
                yield left.pop(0)[1] + " "
            used += size(sentence + " ")
            if used > room:
                break
            yield sentence + " "
        yield from (fact + " " for _, fact in left)
        yield ask

    return pieces()


# --------------------------------------------------------------------------------------------------
# Formal languages. Symbols are the token ids 0, 1, ...; the labels, which only a model writes, are
# the ids after them

# The symbols and what the labels say, in order. deviation 43: of the counters, the end of a word is
# a label of its own
LANGUAGES = {
    "parity": ("01", ("an odd number of ones", "an even number: in the language")),
    "(aa)*": ("a", ("not in the language", "in the language")),
    "(abab)*": ("ab", ("not in the language", "in the language")),
    "a^n b^n": ("ab", ("next is a or b", "next is b", "complete")),
    "a^n b^n c^n": ("abc", ("next is a or b", "next is b", "next is c", "complete")),
    "shuffle-2": (
        "()[]",
        ("next is an opening one or the end", "also )", "also ], not )", "both"),
    ),
}
STEP = {"(aa)*": 2, "(abab)*": 4, "a^n b^n": 2, "a^n b^n c^n": 3}  # one word for each multiple


def _at_least(**numbers: tuple[int, int]) -> None:
    """ValueError for a (value, least) whose value is no integer or below, by its name."""
    for name, (value, least) in numbers.items():
        if type(value) is not int:
            raise ValueError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def formal(language: str, n: int, shortest: int, longest: int, seed: int = 0):
    """Up to n different words of a language -> (inputs, targets) [m, longest], padded on the right.

    Lengths are from shortest to longest, in random order. Languages with few words give all they
    have. ValueError for an unknown language, or lengths without a word.
    """
    if not isinstance(language, str) or language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}")
    _at_least(n=(n, 1), seed=(seed, 0))
    if not 1 <= shortest <= longest:
        raise ValueError(f"lengths must be 1 <= shortest <= longest, got {shortest} to {longest}")
    rng = np.random.default_rng([seed, shortest, longest, *language.encode()])
    if language in STEP:
        words = _counted(language, shortest, longest)
    elif longest < 2 or (language == "shuffle-2" and longest // 2 * 2 < shortest):
        words = []
    else:
        draw = _parity if language == "parity" else _shuffle
        words = np.empty((0, longest), np.int64)
        for _ in range(50):  # a short range has few words: then those found so far
            words = np.unique(np.concatenate([words, draw(n, shortest, longest, rng)]), axis=0)
            if len(words) >= n:
                break
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
        return ((a + b) % STEP[language] == 0).astype(int)
    if language == "shuffle-2":
        return (a > b) + 2 * (c > d)
    if language == "a^n b^n":
        return np.select([b == 0, b < a], [0, 1], 2)
    return np.select([b == 0, b < a, c < a], [0, 1, 2], 3)


def _counted(language: str, shortest: int, longest: int) -> np.ndarray:
    """All words [m, longest] of a language with one word for each multiple of its step."""
    step = STEP[language]
    lengths = np.arange(step, longest + 1, step)
    length = lengths[lengths >= shortest, None]  # [m, 1]
    place = np.arange(longest)
    if language == "(aa)*":
        symbol = 0 * place
    elif language == "(abab)*":
        symbol = place % 2
    else:
        symbol = place * step // np.maximum(length, 1)
    return np.where(place < length, symbol, -1)


def _parity(n: int, shortest: int, longest: int, rng) -> np.ndarray:
    """Words of ones and zeros; an odd one gets one more 1.

    Every symbol follows with probability L / (1 + L), L the middle of the lengths.
    """
    L = (shortest + longest) // 2
    lengths = np.arange(shortest, longest + 1)
    p = (L / (1 + L)) ** lengths
    length = rng.choice(lengths, (n, 1), p=p / p.sum())
    place = np.arange(longest)
    words = np.where(place < length, rng.integers(0, 2, (n, longest)), -1)
    odd = (words == 1).sum(1) % 2 == 1
    words[odd[:, None] & (place == length)] = 1
    return words[(words == 1).sum(1) % 2 == 0]  # no room was left for one more


def _shuffle(n: int, shortest: int, longest: int, rng) -> np.ndarray:
    """Two words of brackets, interleaved at random. deviation 43: published, only nested ones."""
    words = np.full((n, longest), -1)
    for row in words:
        length = 0
        while not shortest <= length <= longest:
            round_ones = _brackets(longest, rng)
            square_ones = _brackets(longest, rng)
            if round_ones is not None and square_ones is not None:
                length = len(round_ones) + len(square_ones)
        places = rng.permutation(length) < len(round_ones)
        row[:length][places] = round_ones
        row[:length][~places] = np.array(square_ones, int) + 2
    return words


def _brackets(longest: int, rng) -> list[int] | None:
    """A word of S -> (S) with chance 0.5 | SS 0.25 | nothing; None for one that is too long."""
    todo = ["S"]
    word = []
    while todo:
        if len(word) > longest:
            return None
        symbol = todo.pop()
        if symbol != "S":
            word.append(symbol)
            continue
        chance = rng.random()
        if chance < 0.5:
            word.append(0)
            todo += [1, "S"]
        elif chance < 0.75:
            todo += ["S", "S"]
    return word


# --------------------------------------------------------------------------------------------------
# MAD. In training a model predicts the next token everywhere, in testing it is asked only for what
# it can know


def _shifted(rows, asked, train: bool):
    """Rows of tokens -> inputs, and the next tokens: all in training, else those asked for."""
    targets = rows if train else np.where(asked, rows, IGNORE)
    return rows[:, :-1], targets[:, 1:]


def _check(n: int, vocab: int, length: int, seed: int, reserved: int = 0) -> None:
    """ValueError for too few rows, ids (besides the reserved ones) or tokens in a row."""
    _at_least(n=(n, 1), vocab=(vocab, 4 + reserved), length=(length, 4), seed=(seed, 0))


def recall(n, vocab=16, length=128, noise=0.0, noise_vocab=0, seed=0, train=False):
    """In-context recall: key value key value ..., every row with a map of its own.

    The values of keys seen before are asked; the last pair is one of those. Keys are the ids below
    half of vocab - noise_vocab, values those up to it, and noise, which stands in the place of
    whole pairs with probability `noise`, the rest. -> (inputs, targets) [n, length - 1].
    """
    _check(n, vocab, length, seed, reserved=noise_vocab)
    rng = np.random.default_rng([seed, train])
    rows = np.arange(n)
    slots = length // 2
    quiet_vocab = vocab - noise_vocab
    K = quiet_vocab // 2
    values = rng.integers(K, quiet_vocab, (n, K))
    keys = rng.integers(0, K, (n, slots))
    # noise, but not in the last pair, nor in one before: asked for if all the others are noise
    noisy = rng.random((n, slots)) < noise
    shown = np.argmax(rng.random((n, slots - 1)), 1)
    noisy[rows, shown] = False
    noisy[:, -1] = False
    keys[:, -1] = keys[rows, np.argmax(rng.random((n, slots - 1)) * ~noisy[:, :-1], 1)]
    # which pairs have a key seen before
    seen = np.zeros((n, K), bool)
    asked = np.zeros((n, slots), bool)
    for slot in range(slots):
        here = rows[~noisy[:, slot]]
        key = keys[here, slot]
        asked[here, slot] = seen[here, key]
        seen[here, key] = True
    pairs = np.stack([keys, values[rows[:, None], keys]], -1)  # [n, slots, 2]
    if noise:
        pairs = np.where(noisy[..., None], rng.integers(quiet_vocab, vocab, pairs.shape), pairs)
    asked = np.stack([np.zeros_like(asked), asked], -1)
    return _shifted(pairs.reshape(n, -1), asked.reshape(n, -1), train)


def fuzzy_recall(n, vocab=16, length=128, motif=3, seed=0, train=False):
    """Recall with keys and values of 1 to `motif` different tokens; in testing, keys of `motif`.

    The last id of the vocabulary pads on the left. -> (inputs, targets) [n, length].
    """
    _check(n, vocab, length, seed)
    if length < 4 * motif:
        raise ValueError(f"length must be at least {4 * motif} with motif {motif}, got {length}")
    K = (vocab - 1) // 2
    if K < motif:
        raise ValueError(f"vocab must be at least {2 * motif + 1} with motif {motif}, got {vocab}")
    rng = random.Random(f"fuzzy {seed} {train}")
    room = length + 1 - 2 * motif  # without the last pair
    rows = np.full((n, length + 1), vocab - 1)
    asked = np.zeros((n, length + 1), bool)
    for row, ask in zip(rows, asked, strict=True):
        values = {}
        pairs = []  # (key, value, whether the key was seen before)
        used = 0
        while True:
            key = tuple(rng.sample(range(K), rng.randint(1, motif) if train else motif))
            value = values.get(key) or tuple(rng.sample(range(K, vocab - 1), rng.randint(1, motif)))
            used += len(key + value)
            if pairs and used > room:
                break
            pairs.append((key, value, key in values))
            values[key] = value
        last_key, last_value, _ = rng.choice(pairs)
        pairs.append((last_key, last_value, True))
        tokens = []
        known = []
        for key, value, old in pairs:
            tokens += key + value
            known += [False] * len(key) + [old] * len(value)
        row[-len(tokens) :] = tokens
        ask[-len(tokens) :] = known
    inputs, targets = _shifted(rows, asked, train)
    return inputs, np.where(rows[:, 1:] == vocab - 1, IGNORE, targets)


def selective_copying(n, vocab=16, length=256, copy=16, seed=0, train=False):
    """`copy` tokens among blanks, a sign, and as many blanks: say the tokens in order.

    The sign is the last id, the blank the one before. -> (inputs, targets) [n, length].
    """
    _check(n, vocab, length, seed, reserved=1)
    if not 1 <= copy < length / 2:
        raise ValueError(f"copy must be from 1 to less than half of length {length}, got {copy}")
    rng = np.random.default_rng([seed, train])
    room = length - copy - 1
    tokens = rng.integers(0, vocab - 2, (n, copy))
    places = np.sort(np.argsort(rng.random((n, room)), 1)[:, :copy], 1)
    inputs = np.full((n, length), vocab - 2)
    targets = np.full((n, length), IGNORE)
    np.put_along_axis(inputs, places, tokens, 1)
    inputs[:, room] = vocab - 1
    targets[:, room + 1 :] = tokens
    return inputs, targets


def compression(n, vocab=16, length=32, seed=0, train=False):
    """Random tokens and a sign (the last id): a decoder says the row from the state at the sign."""
    _check(n, vocab, length, seed)
    inputs = np.random.default_rng([seed, train]).integers(0, vocab - 1, (n, length))
    inputs[:, -1] = vocab - 1
    return inputs, inputs


def memorization(n, vocab=256, length=32, seed=0, train=False):
    """key sign key sign ...: at the sign (the last id) say the key's value.

    One map for all rows, in training and testing. -> (inputs, targets) [n, length].
    """
    _check(n, vocab, length, seed)
    K = (vocab - 1) // 2
    values = K + np.random.default_rng(vocab).permutation(vocab - 1 - K)[:K]
    keys = np.random.default_rng([seed, train]).integers(0, K, (n, length // 2))
    inputs = np.full((n, length // 2 * 2), vocab - 1)
    targets = np.full((n, length // 2 * 2), IGNORE)
    inputs[:, ::2] = keys
    targets[:, 1::2] = values[keys]
    return inputs, targets


# What is varied, one setting at a time (the score is the mean over all)
_VOCAB = ("vocab", (32, 64, 128))
_LENGTH = ("length", (256, 512, 1024))
_EXAMPLES = ("examples", (6400, 3200, 1600, 800))
# Task: generator, training examples and settings, variations
MAD = {
    "compression": (compression, {}, (_VOCAB, ("length", (64, 128, 256)), _EXAMPLES)),
    "recall": (recall, {}, (_VOCAB, _LENGTH, _EXAMPLES)),
    "noisy recall": (
        recall,
        {"vocab": 32, "noise_vocab": 16, "noise": 0.2},
        (("vocab", (48, 80, 144)), _LENGTH, _EXAMPLES, ("noise", (0.4, 0.6, 0.8))),
    ),
    "fuzzy recall": (fuzzy_recall, {}, (_VOCAB, _LENGTH, _EXAMPLES)),
    "selective copying": (
        selective_copying,
        {},
        (_VOCAB, ("length", (512, 1024)), _EXAMPLES, ("copy", (32, 64, 96))),
    ),
    "memorization": (
        memorization,
        {"examples": 256},
        (("vocab", (512, 1024, 2048, 4096, 8192)),),
    ),
}


# --------------------------------------------------------------------------------------------------
# Multi-query associative recall


def mqar(n, vocab=8192, length=256, pairs=16, power=0.01, seed=0, train=False):
    """`pairs` keys with their values, then every key once, soon rather than late.

    Keys are ids of the first half of the vocabulary (but 0), values of the second. A key comes back
    after g places of two tokens with probability ~ g^(power - 1); between them stand random tokens.
    -> (inputs, targets) [n, length].
    """
    _check(n, vocab, length, seed)
    most = min(vocab // 2 - 1, length // 4)
    if not 1 <= pairs <= most:
        wanted = f"from 1 to {most} with vocab {vocab} and length {length}"
        raise ValueError(f"pairs must be {wanted}, got {pairs}")
    rng = np.random.default_rng([seed, train])
    keys = 1 + _different(n, pairs, vocab // 2 - 1, rng)
    values = vocab // 2 + _different(n, pairs, vocab - vocab // 2, rng)
    places = (length - 2 * pairs) // 2
    chance = np.arange(1, places + 1) ** (power - 1.0)
    # the largest of log p + Gumbel noise are a draw without repeats
    gaps = np.argsort(-(np.log(chance) + rng.gumbel(size=(n, places))), 1)[:, :pairs]
    inputs = rng.integers(0, vocab, (n, length))
    targets = np.full((n, length), IGNORE)
    inputs[:, : 2 * pairs : 2] = keys
    inputs[:, 1 : 2 * pairs : 2] = values
    np.put_along_axis(inputs, 2 * pairs + 2 * gaps, keys, 1)
    np.put_along_axis(targets, 2 * pairs + 2 * gaps, values, 1)
    return inputs, targets


def _different(n: int, count: int, below: int, rng) -> np.ndarray:
    """Rows [n, count] of different numbers from 0 to below - 1."""
    # a thousand rows at once: 100,000 would fill the memory
    draws = (rng.random((min(1000, n - i), below)) for i in range(0, n, 1000))
    return np.concatenate([np.argsort(draw, 1)[:, :count] for draw in draws])


# --------------------------------------------------------------------------------------------------
# Images, [3, height, width] float32 in -1 .. 1

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))  # up, down, left, right, wait: ids 0 .. 4
WAIT = 4


def mazes(n: int, size: int, moves: int, rng):
    """Perfect mazes -> (images [n, 3, size, size], routes [n, moves] int64: ids of MOVES).

    Walls are black, ways white, the start red, the goal green. A route is cut after `moves`, and
    waits where it has arrived. deviation 63: no files. ValueError for a size that is none.
    """
    if size < 5 or size % 2 == 0:
        raise ValueError(f"size of a maze must be odd and at least 5 pixels, got {size}")
    images = np.full((n, 3, size, size), -1.0, np.float32)
    routes = np.full((n, moves), WAIT)
    for image, route in zip(images, routes, strict=True):
        start, came_by = _dig(size, rng)
        image[:, start[0], start[1]] = 1, -1, -1
        for (row, column), move in came_by.items():
            way = MOVES[move]
            image[:, row, column] = 1
            image[:, row - way[0], column - way[1]] = 1  # the wall that was taken away
        goal = list(came_by)[rng.integers(len(came_by))]
        image[:, goal[0], goal[1]] = -1, 1, -1
        found = []
        while goal != start:
            move = came_by[goal]
            found += [move, move]
            goal = goal[0] - 2 * MOVES[move][0], goal[1] - 2 * MOVES[move][1]
        found = found[::-1][:moves]
        route[: len(found)] = found
    return images, routes


def _dig(size: int, rng):
    """Depth-first search over all cells -> (its start, {cell: move by which it was reached}).

    Cells are at odd places, a wall between every two; the start is in no dictionary.
    """
    start = tuple(2 * rng.integers(0, size // 2, 2) + 1)
    came_by = {}
    path = [start]
    while path:
        row, column = path[-1]
        free = []
        for move, (down, right) in enumerate(MOVES[:WAIT]):
            cell = row + 2 * down, column + 2 * right
            inside = 0 < cell[0] < size and 0 < cell[1] < size
            if inside and cell != start and cell not in came_by:
                free.append((cell, move))
        if not free:
            path.pop()
            continue
        cell, move = free[rng.integers(len(free))]
        came_by[cell] = move
        path.append(cell)
    return start, came_by


def image_folder(folder: str | Path):
    """Images in a folder for each class -> (names of classes, training files, held-out files).

    Files are [(path, class id)]. folder/train and folder/val, as ImageNet-1K has them, or, without
    these, every tenth image is held out. ValueError for fewer than two classes.
    """
    folder = Path(folder)
    val = folder / "val"
    patterns = ("train/*/*", "val/*/*") if val.is_dir() else ("*/*",)
    found = itertools.chain.from_iterable(folder.glob(pattern) for pattern in patterns)
    kinds = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
    paths = sorted(path for path in found if path.suffix.lower() in kinds)
    ids = {name: i for i, name in enumerate(sorted({path.parent.name for path in paths}))}
    train, held_out = [], []
    for number, path in enumerate(paths):
        out = val in path.parents if val.is_dir() else number % 10 == 0
        (held_out if out else train).append((path, ids[path.parent.name]))
    if len(ids) < 2 or not train or not held_out:
        raise ValueError(f"images {str(folder)!r} must have two folders of images or more")
    return list(ids), train, held_out


def read_image(path: str | Path, size: int, rng=None) -> np.ndarray:
    """[3, size, size]: the middle; with rng a random part, mirrored or not. OSError if damaged."""
    from PIL import Image  # comes with matplotlib

    with Image.open(path) as image:
        image = image.convert("RGB")
    side = min(image.size) * (rng.uniform(0.6, 1) if rng else 1)
    left, top = (gap * (rng.random() if rng else 0.5) for gap in np.array(image.size) - side)
    box = (left, top, min(left + side, image.width), min(top + side, image.height))
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))
    pixels = pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
    return pixels[:, :, ::-1].copy() if rng and rng.random() < 0.5 else pixels


def main() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for kind in NEEDLES:
        made = needle(kind, text, 1500)
        prompt = made["prompt"]
        depths = ", ".join(f"{depth:.2f}" for depth in made["depths"])
        print(f"{kind}: {len(prompt)} characters, answers {made['answers']}, at depths {depths}")
        print(prompt[:200] + " [...] " + prompt[-200:] + "\n")
    facts = ["Mary went to the kitchen.", "Mary went to the garden."]
    print("BABILong:\n" + "".join(babilong(facts, "Where is Mary?", text, 600)))
    for language, (symbols, labels) in LANGUAGES.items():
        inputs, targets = formal(language, 1, 12, 16)
        asked = targets[0] != IGNORE
        word = "".join(symbols[token] for token in inputs[0][asked])
        said = "".join(str(label - len(symbols)) for label in targets[0][asked])
        legend = ", ".join(f"{i}: {label}" for i, label in enumerate(labels))
        print(f"\n{language}\n  read {word}\n  say  {said}   {legend}")
    others = MAD | {"multi-query recall": (mqar, {"vocab": 64, "pairs": 4}, ())}
    for name, (generate, settings, _) in others.items():
        settings = {key: value for key, value in settings.items() if key != "examples"}
        if generate is selective_copying:
            settings["copy"] = 4
        inputs, targets = generate(1, length=32, **settings)
        said = ["  ." if token == IGNORE else f"{token:>3}" for token in targets[0]]
        print(f"\n{name}\n  read {' '.join(f'{token:>3}' for token in inputs[0])}")
        print(f"  say  {' '.join(said)}")
    (image,), _ = mazes(1, 11, 48, np.random.default_rng(0))
    print("\nmaze, from S to G")
    for row in (image > 0).transpose(1, 2, 0) @ (1, 2, 4):
        print("  " + "".join("#SG     "[number] for number in row))


if __name__ == "__main__":
    if sys.argv[1:]:
        print("python tasks.py: an example of every task, over its own text; no flags")
        sys.exit(0 if sys.argv[1] in ("-h", "--help") else 2)
    main()
