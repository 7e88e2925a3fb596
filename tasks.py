"""Synthetic tasks: text made from a seed, with labels known exactly. Nothing here knows a model.

Needles in a haystack (RULER, Hsieh et al. 2024, arXiv 2404.06654; NL table 1): statements "... for KEY is: VALUE." hidden
between the sentences of any text, then asked for. The six kinds of the table, in RULER's wording, which belongs to the
benchmark (a prompt in other words is another task):

    S-NIAH-1     one number (a passkey) in a sentence repeated over and over        MK-NIAH-1   four keys, one asked for
    S-NIAH-2     one number in real text                                            MQ-NIAH     four keys, all asked for
    S-NIAH-3     one uuid in real text                                              MV-NIAH     one key with four values

BABILong (Kuratov et al. 2024, arXiv 2406.10149): the facts of a bAbI question scattered over a text of any length, which is
made piece by piece, so that ten million tokens need no memory.

Lengths are counted by `size`, a function of a string: len counts characters, and a caller counts its tokens.

    python tasks.py             an example of each, over this file's own text
"""

import itertools
import random
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

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


def main():
    text = Path(__file__).read_text(encoding="utf-8")
    for kind in NEEDLES:
        made = needle(kind, text, 1000)
        depths = ", ".join(f"{depth:.2f}" for depth in made["depths"])
        print(f"{kind}: {len(made['prompt'])} characters, answers {made['answers']}, at depths {depths}")
        print(made["prompt"][:200] + " [...] " + made["prompt"][-200:] + "\n")
    facts, question = ["Mary went to the kitchen.", "Mary went to the garden."], "Where is Mary?"
    print("BABILong:\n" + "".join(babilong(facts, question, text, 600)))


if __name__ == "__main__":
    main()
