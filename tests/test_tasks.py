"""Synthetic tasks: labels are exact, lengths are kept, everything follows from the seed."""

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

PAIRS = list(itertools.product(("red", "blue", "green"), ("old", "new", "lost", "found")))
STORY = "On day {} the {} thing was said to be {}.\nNobody minded!"
TEXT = " ".join(STORY.format(day, *pair) for day, pair in enumerate(PAIRS))
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
def test_every_answer_stands_once_in_the_text_and_is_asked_for(kind):
    what, repeated, n_keys, n_asked, n_values = NEEDLES[kind]
    form = r"\d{7}" if what == "number" else r"[0-9a-f-]{36}"
    for length, seed in itertools.product((900, 4000), range(5)):
        made = needle(kind, TEXT, length, seed, WORDS)
        answers = made["answers"]
        text, question = made["prompt"].rsplit("\nWhat ", 1)
        stated = set(re.findall(r"for (\S+) is: (\S+)\.(?=\s|$)", text))
        assert len(stated) == n_keys * n_values and len(answers) == n_asked * n_values
        for value in answers:
            assert text.count(value) == 1 and value not in question
            assert re.fullmatch(form, value)
        asked = itertools.product(made["keys"], answers)
        assert [value for key, value in asked if (key, value) in stated] == answers
        assert all(question.count(key) == 2 for key in made["keys"])
        assert ("The grass is green." in text) == repeated


@pytest.mark.parametrize("kind", NEEDLES)
def test_a_prompt_fills_its_length_and_never_exceeds_it(kind):
    for length in range(900, 1100, 7):
        made = needle(kind, TEXT, length, 0, WORDS)
        size = len(made["prompt"] + " " + ", ".join(made["answers"]))
        assert length - 100 < size <= length  # a sentence less at most
    count_words = lambda text: len(text.split())  # noqa: E731  another measure of length
    made = needle(kind, TEXT, 300, 0, WORDS, size=count_words)
    assert count_words(made["prompt"]) <= 300


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
    haystack = f"It was {value}, they say. Or so it was told to us."
    again = needle("S-NIAH-2", haystack, 900, 0, WORDS)
    assert again["answers"] != [value]
    assert again["prompt"].count(again["answers"][0]) == 1


def refuses(calls):
    """Every call raises a ValueError that has the message."""
    for message, call in calls.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_bad_needles_are_refused():
    refuses(
        {
            "must be one of S-NIAH-1, ": lambda: needle("S-NIAH-9", TEXT, 900),
            "for a sentence around the question of S-NIAH-2, got 300": (
                lambda: needle("S-NIAH-2", TEXT, 300)
            ),
            "the haystack is empty": lambda: needle("S-NIAH-2", "  ", 900, 0, WORDS),
            "must be at least 4, got 0": lambda: needle("S-NIAH-2", "a b c.", 900),
        }
    )


def test_the_questions_of_babi_know_the_facts_before_them(tmp_path):
    path = tmp_path / "qa1_test.txt"
    path.write_text(
        "1 Mary went out.\n2 Where is Mary?\tout\t1\n"
        "3 She came in.\n4 Where is Mary? \tin\t3\n"
        "1 New.\n2 What?\tyes\t1\n"
    )
    first, second, third = babi(path)
    assert first == {"facts": ["Mary went out."], "question": "Where is Mary?", "answer": "out"}
    assert second["facts"] == ["Mary went out.", "She came in."]
    assert second["question"] == "Where is Mary?" and second["answer"] == "in"
    assert third == {"facts": ["New."], "question": "What?", "answer": "yes"}
    path.write_text("Mary went out.\n")
    with pytest.raises(ValueError, match="line 1 is no line of bAbI: 'Mary went out.'"):
        babi(path)


def test_facts_keep_their_order_in_a_text_of_the_length_asked_for():
    facts = [f"Fact number {i}." for i in range(12)]
    for seed in range(10):
        text = "".join(babilong(facts, "Which?", TEXT, 5000, seed))
        places = [text.index(fact) for fact in facts]
        assert places == sorted(places) and 4900 < len(text) <= 5000
        assert text.endswith("\nQuestion: Which?\nAnswer:")
    assert "".join(babilong(facts, "Which?", TEXT, 260, 0)).count("Fact number") == 12
    message = "length must be at least .* for the facts and the question, got 100"
    with pytest.raises(ValueError, match=message):
        babilong(facts, "Which?", TEXT, 100)


@pytest.mark.slow
def test_ten_million_characters_come_one_sentence_at_a_time():
    longest = 0
    total = 0
    for piece in babilong(["One fact."] * 3, "Which?", TEXT, 10_000_000):
        longest = max(longest, len(piece))
        total += len(piece)
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
        return ")" not in reduced(prefix, "()") and "]" not in reduced(prefix, "[]")
    words = ("a" * n + "b" * n + "c" * n * ("c" in language) for n in range(1, 120))
    return any(word.startswith(prefix) for word in words)


def said(language, prefix):
    """The label of a prefix: whether it is a word, or which symbols may come next."""
    if language in ("parity", "(aa)*", "(abab)*"):
        return int(bool(MEMBERS[language](prefix)))
    symbols = LANGUAGES[language][0]
    following = {symbol for symbol in symbols if completable(language, prefix + symbol)}
    if language == "shuffle-2":
        return (")" in following) + 2 * ("]" in following)
    labels = [{"a", "b"}, {"b"}, {"c"}, set()] if "c" in language else [{"a", "b"}, {"b"}, set()]
    return labels.index(following)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("shortest, longest", [(2, 50), (51, 100)])
def test_every_label_of_a_language_is_what_a_membership_test_says(language, shortest, longest):
    inputs, targets = formal(language, 60, shortest, longest, seed=1)
    symbols, names = LANGUAGES[language]
    words = set()
    for read, labels in zip(inputs, targets, strict=True):
        length = int((labels != IGNORE).sum())
        word = "".join(symbols[token] for token in read[:length])
        words.add(word)
        assert MEMBERS[language](word) and shortest <= length <= longest
        assert (labels[length:] == IGNORE).all()
        prefixes = range(1, length + 1, 1 if length < 30 else 7)
        expected = [len(symbols) + said(language, word[:i]) for i in prefixes]
        assert [labels[i - 1] for i in prefixes] == expected
    assert len(words) == len(inputs)
    used = set(range(len(symbols), len(symbols) + len(names)))
    assert set(np.unique(targets)) - {IGNORE} == used


@pytest.mark.slow
def test_languages_with_few_words_give_all_of_them_and_others_as_many_as_asked():
    counts = {}
    for language in LANGUAGES:
        short, _ = formal(language, 1000, 2, 50)
        long, _ = formal(language, 1000, 51, 100)
        counts[language] = (len(short), len(long))
    assert counts == {
        "parity": (1000, 1000),
        "(aa)*": (25, 25),
        "(abab)*": (12, 13),
        "a^n b^n": (25, 25),
        "a^n b^n c^n": (16, 17),
        "shuffle-2": (1000, 1000),
    }
    assert len(formal("parity", 1000, 2, 3)[0]) == 6  # 00 11 000 011 101 110


def test_words_of_shuffle_2_cross_as_no_nested_word_does():
    inputs, _ = formal("shuffle-2", 300, 2, 50)
    words = ["".join("()[]"[token] for token in row) for row in inputs]
    assert any(re.match(r"\(\[\)|\[\(\]", word) for word in words)


def test_a_formal_language_follows_from_its_seed():
    first = formal("parity", 9, 2, 50, 3)
    again = formal("parity", 9, 2, 50, 3)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[0] != formal("parity", 9, 2, 50, 4)[0]).any()


def test_lengths_without_words_are_refused():
    refuses(
        {
            "language must be one of parity, (aa)*, ": lambda: formal("Parity", 9, 2, 50),
            "n must be at least 1, got 0": lambda: formal("parity", 0, 2, 50),
            "1 <= shortest <= longest, got 5 to 4": lambda: formal("parity", 9, 5, 4),
            "(abab)* has no word of length 5 to 7": lambda: formal("(abab)*", 9, 5, 7),
            "parity has no word of length 1 to 1": lambda: formal("parity", 9, 1, 1),
            "shuffle-2 has no word of length 13 to 13": lambda: formal("shuffle-2", 9, 13, 13),
        }
    )


# --------------------------------------------------------------------------------------------------
# MAD and MQAR, against labels found row by row with a dictionary


def answers_of(read, asked):
    """{place of the token after: token} of what is asked for."""
    return {i + 1: token for i, token in enumerate(asked) if token != IGNORE}


def values_of_known_keys(tokens, is_key, is_value, longest=1):
    """Read key value key value ... with a dictionary -> {place: token} of the values of keys seen.

    Keys and values have up to `longest` tokens. Noise and padding are passed over.
    """
    known = {}
    answers = {}
    i = 0
    while i < len(tokens):
        if not is_key(tokens[i]):  # noise or padding
            assert not is_value(tokens[i])
            i += 1
            continue
        j = i
        while j < min(i + longest, len(tokens)) and is_key(tokens[j]):
            j += 1
        k = j
        while k < min(j + longest, len(tokens)) and is_value(tokens[k]):
            k += 1
        key = tuple(tokens[i:j])
        value = tuple(tokens[j:k])
        assert value
        if key in known:
            assert known[key] == value  # one map in a row
            answers |= dict(enumerate(value, j))
        known[key] = value
        i = k
    return answers


NOISY = {"vocab": 32, "noise_vocab": 16, "noise": 0.4}


@pytest.mark.parametrize("settings", [{}, NOISY, {"vocab": 8, "length": 32}])
def test_in_context_recall_asks_for_the_values_of_keys_seen_before(settings):
    inputs, targets = recall(40, **settings, seed=2)
    assert inputs.shape == targets.shape == (40, settings.get("length", 128) - 1)
    quiet_vocab = settings.get("vocab", 16) - settings.get("noise_vocab", 0)
    K = quiet_vocab // 2
    for read, asked in zip(inputs, targets, strict=True):
        assert asked[-1] != IGNORE  # the last pair is known
        tokens = [*read, asked[-1]]
        expected = values_of_known_keys(tokens, lambda t: t < K, lambda t: K <= t < quiet_vocab)
        assert answers_of(read, asked) == expected
    assert abs((inputs >= quiet_vocab).mean() - settings.get("noise", 0)) < 0.05
    inputs, targets = recall(40, **settings, seed=2, train=True)
    assert (inputs[:, 1:] == targets[:, :-1]).all()


def test_fuzzy_recall_asks_for_the_values_of_motifs_seen_before():
    inputs, targets = fuzzy_recall(40, seed=2)
    lengths = set()
    for read, asked in zip(inputs, targets, strict=True):
        assert asked[-1] != IGNORE and len(read) == 128
        tokens = [*read, asked[-1]]
        expected = values_of_known_keys(tokens, lambda t: t < 7, lambda t: 7 <= t < 15, longest=128)
        assert answers_of(read, asked) == expected
        runs = re.findall("k+", "".join("k" if token < 7 else "v" for token in read))
        lengths |= set(map(len, runs))
    assert lengths == {3}
    inputs, targets = fuzzy_recall(40, seed=2, train=True)
    known = targets != IGNORE
    assert (inputs[:, 1:][known[:, :-1]] == targets[:, :-1][known[:, :-1]]).all()
    assert known[:, -60:].all()


def test_selective_copying_repeats_what_stood_among_the_blanks():
    inputs, targets = selective_copying(30, vocab=16, length=64, copy=6)
    for read, asked in zip(inputs, targets, strict=True):
        sign = list(read).index(15)
        assert sign == 64 - 6 - 1
        assert (read[sign + 1 :] == 14).all() and (asked[: sign + 1] == IGNORE).all()
        assert list(asked[sign + 1 :]) == [token for token in read[:sign] if token != 14]
    assert len({tuple(np.flatnonzero(read[:57] != 14)) for read in inputs}) > 25


def test_compression_asks_for_the_whole_row_after_a_sign():
    inputs, targets = compression(30)
    assert (inputs == targets).all()
    assert (inputs[:, -1] == 15).all() and (inputs[:, :-1] < 15).all()


def test_memorization_has_one_map_for_all_rows_in_training_and_testing():
    known = {}
    for seed, train in ((0, True), (0, False), (1, False)):
        inputs, targets = memorization(256, seed=seed, train=train)
        assert (inputs[:, 1::2] == 255).all() and (targets[:, ::2] == IGNORE).all()
        for key, value in zip(inputs[:, ::2].flat, targets[:, 1::2].flat, strict=True):
            assert known.setdefault(key, value) == value and key < 127 <= value < 255
    assert len(known) == len(set(known.values())) == 127


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
    settings = {key: value for key, value in settings.items() if key != "examples"}
    rows = {}
    for seed, train in itertools.product((0, 1), (True, False)):
        rows[seed, train] = generate(20, **settings, seed=seed, train=train)[0]
    assert (rows[0, False] == generate(20, **settings, seed=0)[0]).all()
    assert len({array.tobytes() for array in rows.values()}) == 4
    for what, values in variations:
        if what != "examples":
            inputs, targets = generate(2, **settings | {what: values[0]})
            assert inputs.shape == targets.shape


def test_sizes_without_room_are_refused():
    refuses(
        {
            "n must be at least 1, got 0": lambda: recall(0),
            "vocab must be at least 5, got 4": lambda: selective_copying(1, vocab=4),
            "length must be at least 4, got 3": lambda: compression(1, length=3),
            "length must be at least 12 with motif 3, got 8": lambda: fuzzy_recall(1, length=8),
            "vocab must be at least 7 with motif 3, got 6": lambda: fuzzy_recall(1, vocab=6),
            "copy must be from 1 to less than half of length 20, got 16": (
                lambda: selective_copying(1, length=20)
            ),
            "pairs must be from 1 to 7 with vocab 16 and length 256, got 8": (
                lambda: mqar(1, vocab=16, pairs=8)
            ),
        }
    )
