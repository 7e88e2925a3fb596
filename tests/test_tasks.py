"""What tasks.py promises: labels that are exact, lengths that are kept, everything from the seed."""

import itertools
import re

import numpy as np
import pytest

from tasks import (
    IGNORE,
    LANGUAGES,
    MAD,
    NEEDLES,
    babi,
    babilong,
    compression,
    formal,
    fuzzy_recall,
    memorization,
    mqar,
    needle,
    recall,
    selective_copying,
    sentences,
)

TEXT = " ".join(f"On day {i} the {a} thing was said to be {b}.\nNobody minded!" for i, (a, b) in
                enumerate(itertools.product(("red", "blue", "green"), ("old", "new", "lost", "found"))))  # fmt: skip
WORDS = ["amber", "basalt", "cedar", "dune", "ember"]


def test_sentences_are_those_of_the_text_again_and_again():
    text = 'He said "No." Then he left.  A third\none… ends? Yes'
    once = list(itertools.islice(sentences(text), 5))
    assert once == ['He said "No."', "Then he left.", "A third one… ends?", "Yes", 'He said "No."']
    assert next(sentences(text, text.index("said"))) == "Then he left."
    assert max(map(len, itertools.islice(sentences("no end " * 1000), 20))) <= 401
    with pytest.raises(ValueError, match="the haystack is empty"):
        next(sentences(" \n"))


@pytest.mark.parametrize("kind", NEEDLES)
@pytest.mark.parametrize("length", [900, 4000])
def test_every_answer_stands_once_in_the_text_and_is_asked_for(kind, length):
    what, repeated, n_keys, n_asked, n_values = NEEDLES[kind]
    for seed in range(5):
        made = needle(kind, TEXT, length, seed, WORDS)
        text, question = made["prompt"].rsplit("\nWhat ", 1)
        stated = set(re.findall(r"for (\S+) is: (\S+)\.(?=\s|$)", text))
        assert len(stated) == n_keys * n_values and len(made["answers"]) == n_asked * n_values
        for value in made["answers"]:
            assert text.count(value) == 1 and value not in question
        assert [value for key in made["keys"] for value in made["answers"] if (key, value) in stated] == made["answers"]
        assert all(question.count(key) == 2 for key in made["keys"])
        assert all(re.fullmatch(r"\d{7}" if what == "number" else r"[0-9a-f-]{36}", value) for value in made["answers"])
        assert ("The grass is green." in text) == repeated


@pytest.mark.parametrize("kind", NEEDLES)
def test_a_prompt_fills_its_length_and_never_exceeds_it(kind):
    for length in range(900, 1100, 7):
        made = needle(kind, TEXT, length, 0, WORDS)
        size = len(made["prompt"] + " " + ", ".join(made["answers"]))
        assert length - 100 < size <= length  # a sentence less at most
    words = lambda text: len(text.split())  # noqa: E731  another measure of length
    assert words(needle(kind, TEXT, 300, 0, WORDS, size=words)["prompt"]) <= 300


def test_needles_lie_at_all_depths():
    depths = [needle("S-NIAH-2", TEXT, 2000, seed, WORDS)["depths"][0] for seed in range(40)]
    assert min(depths) < 0.2 and max(depths) > 0.8
    made = needle("MK-NIAH-1", TEXT, 2000, 0, WORDS)
    assert len(made["depths"]) == 4 and made["depths"] == sorted(made["depths"])


def test_a_needle_follows_from_its_seed():
    assert needle("MQ-NIAH", TEXT, 1500, 3, WORDS) == needle("MQ-NIAH", TEXT, 1500, 3, WORDS)
    assert needle("MQ-NIAH", TEXT, 1500, 3, WORDS) != needle("MQ-NIAH", TEXT, 1500, 4, WORDS)


def test_a_value_that_the_text_says_by_itself_is_not_hidden_in_it():
    value = needle("S-NIAH-2", TEXT, 900, 0, WORDS)["answers"][0]
    again = needle("S-NIAH-2", f"It was {value}, they say. Or so it was told to us.", 900, 0, WORDS)
    assert again["answers"] != [value] and again["prompt"].count(again["answers"][0]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("S-NIAH-9", TEXT, 900), "unknown kind of needle 'S-NIAH-9': legal are S-NIAH-1, "),
        (("S-NIAH-2", TEXT, 300), "length 300 has no room for a sentence around the question: S-NIAH-2 needs at least"),
        (("S-NIAH-2", "  ", 900, 0, WORDS), "the haystack is empty"),
        (("S-NIAH-2", "a b c.", 900), "there are only 0: at least 4 are needed"),
    ],
)
def test_bad_needles_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        needle(*arguments)


def test_the_questions_of_babi_know_the_facts_before_them(tmp_path):
    path = tmp_path / "qa1_test.txt"
    path.write_text("1 Mary went out.\n2 Where is Mary?\tout\t1\n3 She came in.\n4 Where is Mary? \tin\t3\n"
                    "1 New.\n2 What?\tyes\t1\n")  # fmt: skip
    questions = babi(path)
    assert [q["answer"] for q in questions] == ["out", "in", "yes"]
    assert [q["facts"] for q in questions] == [["Mary went out."], ["Mary went out.", "She came in."], ["New."]]
    assert questions[1]["question"] == "Where is Mary?"
    path.write_text("Mary went out.\n")
    with pytest.raises(ValueError, match="line 1 is no line of bAbI: 'Mary went out.'"):
        babi(path)


def test_facts_keep_their_order_in_a_text_of_the_length_asked_for():
    facts = [f"Fact number {i}." for i in range(12)]
    for seed in range(10):
        text = "".join(babilong(facts, "Which?", TEXT, 5000, seed))
        places = [text.index(fact) for fact in facts]
        assert places == sorted(places) and text.endswith("\nQuestion: Which?\nAnswer:") and 4900 < len(text) <= 5000
    assert "".join(babilong(facts, "Which?", TEXT, 260, 0)).count("Fact number") == 12
    with pytest.raises(ValueError, match="length 100 has no room for the facts and the question: at least"):
        babilong(facts, "Which?", TEXT, 100)


def test_ten_million_characters_come_one_sentence_at_a_time():
    longest = total = 0
    for piece in babilong(["One fact."] * 3, "Which?", TEXT, 10_000_000):
        longest, total = max(longest, len(piece)), total + len(piece)
    assert longest < 100 and 10_000_000 - 100 < total <= 10_000_000


# --------------------------------------------------------------------------------------------------
# Formal languages, against membership tests of another kind


def reduced(word, pair):
    """What is left of one kind of brackets when matching ones are struck out."""
    rest = "".join(symbol for symbol in word if symbol in pair)
    while pair in rest:
        rest = rest.replace(pair, "")
    return rest


MEMBERS = {
    "parity": lambda w: w.count("1") % 2 == 0,
    "(aa)*": lambda w: re.fullmatch("(aa)*", w),
    "(abab)*": lambda w: re.fullmatch("(abab)*", w),
    "a^n b^n": lambda w: w in {"a" * n + "b" * n for n in range(1, 51)},
    "a^n b^n c^n": lambda w: w in {"a" * n + "b" * n + "c" * n for n in range(1, 34)},
    "shuffle-2": lambda w: not reduced(w, "()") and not reduced(w, "[]"),
}


def completable(language, prefix):
    """Can the prefix become a word (of the lengths used here)?"""
    if language == "shuffle-2":
        return not any(closing in reduced(prefix, pair) for pair, closing in (("()", ")"), ("[]", "]")))
    letters = "abc" if "c" in language else "ab"
    return any("".join(letter * n for letter in letters).startswith(prefix) for n in range(1, 120))


def said(language, prefix):
    """The label of a prefix: whether it is a word, or which symbols may come next."""
    if language in ("parity", "(aa)*", "(abab)*"):
        return int(bool(MEMBERS[language](prefix)))
    following = {symbol for symbol in LANGUAGES[language][0] if completable(language, prefix + symbol)}
    if language == "shuffle-2":
        return (")" in following) + 2 * ("]" in following)
    return [{"a", "b"}, {"b"}, {"c"}, set()].index(following) - (language == "a^n b^n" and not following)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("shortest, longest", [(2, 50), (51, 100)])
def test_every_label_of_a_formal_language_is_what_a_membership_test_says(language, shortest, longest):
    inputs, targets = formal(language, 60, shortest, longest, seed=1)
    symbols, labels = LANGUAGES[language]
    words = ["".join(symbols[t] for t in row[asked]) for row, asked in zip(inputs, targets != IGNORE, strict=True)]
    assert len(set(words)) == len(words)
    for word, row in zip(words, targets, strict=True):
        assert MEMBERS[language](word) and shortest <= len(word) <= longest and (row[len(word) :] == IGNORE).all()
        prefixes = range(1, len(word) + 1, 1 if len(word) < 30 else 7)
        assert [row[i - 1] - len(symbols) for i in prefixes] == [said(language, word[:i]) for i in prefixes]
    assert set(np.unique(targets)) - {IGNORE} == set(range(len(symbols), len(symbols) + len(labels)))


def test_languages_with_few_words_give_all_of_them_and_others_as_many_as_asked():
    counts = {language: [len(formal(language, 1000, *bin)[0]) for bin in ((2, 50), (51, 100))] for language in LANGUAGES}
    assert counts == {"parity": [1000, 1000], "(aa)*": [25, 25], "(abab)*": [12, 13], "a^n b^n": [25, 25],
                      "a^n b^n c^n": [16, 17], "shuffle-2": [1000, 1000]}  # fmt: skip
    assert len(formal("parity", 1000, 2, 3)[0]) == 6  # 00 11 000 011 101 110
    inputs, _ = formal("shuffle-2", 300, 2, 50)
    words = ["".join("()[]"[t] for t in row) for row in inputs]
    assert any(re.match(r"\(\[\)|\[\(\]", word) for word in words)  # crossing, as no nested word does


def test_a_formal_language_follows_from_its_seed():
    assert all((a == b).all() for a, b in zip(formal("parity", 9, 2, 50, 3), formal("parity", 9, 2, 50, 3), strict=True))
    assert (formal("parity", 9, 2, 50, 3)[0] != formal("parity", 9, 2, 50, 4)[0]).any()


@pytest.mark.parametrize("arguments, message", [
    (("Parity", 9, 2, 50), "unknown language 'Parity': legal are parity, (aa)*"),
    (("(abab)*", 9, 5, 7), "(abab)* has no word of length 5 to 7"),
    (("parity", 9, 5, 4), "9 words of length 5 to 4: legal are n >= 1 and 1 <= shortest <= longest"),
    (("shuffle-2", 9, 1, 1), "shuffle-2 has no word of length 1 to 1"),
])  # fmt: skip
def test_lengths_without_words_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        formal(*arguments)


# --------------------------------------------------------------------------------------------------
# MAD and MQAR, against labels found row by row with a dictionary


def walked(tokens, keys, motif=None):
    """Reads key value key value ... with a dictionary -> {place in tokens: value token} of the keys seen before."""
    known, answers, i = {}, {}, 0
    while i < len(tokens):
        if tokens[i] >= keys + motif if motif else tokens[i] >= 2 * keys:
            i += 2 if motif is None else 1  # noise comes in the place of pairs, padding alone
            continue
        j = i
        while tokens[j] < keys and (motif or j == i):
            j += 1
        k = j
        while k < len(tokens) and keys <= tokens[k] and (motif or k == j) and (not motif or tokens[k] < keys + motif):
            k += 1
        key, value = tuple(tokens[i:j]), tuple(tokens[j:k])
        if key in known:
            assert known[key] == value  # one map in a row
            answers |= dict(enumerate(value, j))
        known[key], i = value, k
    return answers


@pytest.mark.parametrize("settings", [{}, {"vocab": 32, "noise_vocab": 16, "noise": 0.4}, {"vocab": 8, "length": 32}])
def test_in_context_recall_asks_for_the_values_of_keys_seen_before(settings):
    inputs, targets = recall(40, **settings, seed=2)
    _, following = recall(40, **settings, seed=2, train=True)
    assert inputs.shape == targets.shape == (40, settings.get("length", 128) - 1)
    for read, asked in zip(inputs, targets, strict=True):
        last = asked[-1]
        assert last != IGNORE  # the last pair is known
        answers = walked([*read, last], (settings.get("vocab", 16) - settings.get("noise_vocab", 0)) // 2)
        assert {i + 1: token for i, token in enumerate(asked) if token != IGNORE} == answers
    assert (recall(40, **settings, seed=2, train=True)[0][:, 1:] == following[:, :-1]).all()
    noise = (inputs >= settings.get("vocab", 16) - settings.get("noise_vocab", 0)).mean()
    assert abs(noise - settings.get("noise", 0)) < 0.05


def test_fuzzy_recall_asks_for_the_values_of_motifs_seen_before():
    inputs, targets = fuzzy_recall(40, seed=2)
    lengths = set()
    for read, asked in zip(inputs, targets, strict=True):
        last = asked[-1]
        assert last != IGNORE and len(read) == 128
        answers = walked([*read, last], keys=7, motif=8)
        assert {i + 1: token for i, token in enumerate(asked) if token != IGNORE} == answers
        runs = re.findall("k+", "".join("k" if token < 7 else "v" for token in read))
        lengths |= set(map(len, runs))
    assert lengths == {3}
    inputs, targets = fuzzy_recall(40, seed=2, train=True)
    known = targets != IGNORE
    assert (inputs[:, 1:][known[:, :-1]] == targets[:, :-1][known[:, :-1]]).all() and known[:, -60:].all()


def test_selective_copying_repeats_what_stood_among_the_blanks():
    inputs, targets = selective_copying(30, vocab=16, length=64, copy=6)
    for read, asked in zip(inputs, targets, strict=True):
        sign = list(read).index(15)
        assert sign == 64 - 6 - 1 and (read[sign + 1 :] == 14).all() and (asked[: sign + 1] == IGNORE).all()
        assert list(asked[sign + 1 :]) == [token for token in read[:sign] if token != 14]
    assert len({tuple(np.flatnonzero(read[:57] != 14)) for read in inputs}) > 25


def test_compression_and_memorization():
    inputs, targets = compression(30)
    assert (inputs == targets).all() and (inputs[:, -1] == 15).all() and (inputs[:, :-1] < 15).all()
    maps = {}
    for seed, train in ((0, True), (0, False), (1, False)):  # one map for all
        inputs, targets = memorization(256, seed=seed, train=train)
        assert (inputs[:, 1::2] == 255).all() and (targets[:, ::2] == IGNORE).all()
        for key, value in zip(inputs[:, ::2].flat, targets[:, 1::2].flat, strict=True):
            assert maps.setdefault(key, value) == value and key < 127 <= value < 255
    assert len(maps) == len(set(maps.values())) == 127


def test_multi_query_recall_asks_for_every_key_once():
    inputs, targets = mqar(50, vocab=64, length=96, pairs=8)
    distances = []
    for read, asked in zip(inputs, targets, strict=True):
        known = dict(zip(read[:16:2], read[1:16:2], strict=True))
        places = np.flatnonzero(asked != IGNORE)
        assert len(known) == 8 and sorted(read[places]) == sorted(known) and places[0] >= 16
        assert [known[key] for key in read[places]] == list(asked[places])
        assert max(known) < 32 <= min(known.values())
        distances += list(places - 16)
    assert np.mean(np.array(distances) < 40) > 0.6  # rather soon: uniform would be half


@pytest.mark.parametrize("name", MAD)
def test_training_and_test_rows_differ_and_follow_from_the_seed(name):
    generate, settings, variations = MAD[name]
    settings = {k: v for k, v in settings.items() if k != "examples"}
    rows = {(seed, train): generate(20, **settings, seed=seed, train=train)[0] for seed in (0, 1) for train in (True, False)}
    assert (rows[0, False] == generate(20, **settings, seed=0)[0]).all()
    assert len({array.tobytes() for array in rows.values()}) == 4
    for what, values in variations:
        if what != "examples":
            inputs, targets = generate(2, **settings | {what: values[0]})
            assert inputs.shape == targets.shape


@pytest.mark.parametrize("call, message", [
    (lambda: recall(0), "0 rows of 128 tokens out of 16: legal are at least 1, 4 and 4"),
    (lambda: fuzzy_recall(1, length=8), "need a length of at least 12 and a vocab of at least 7, got 8 and 16"),
    (lambda: selective_copying(1, length=20), "copy is 16 tokens in a row of 20: legal is 1 to less than half"),
    (lambda: mqar(1, vocab=16, pairs=8), "pairs is 8 with vocab 16 and length 256: legal is 1 to 7"),
])  # fmt: skip
def test_sizes_without_room_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
