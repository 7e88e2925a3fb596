"""eval.py: the harness's own numbers whatever the batching, and memory that does not grow."""

import bz2
import json
import os
import re
import subprocess
import sys
from bisect import bisect_left
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_train import small

import eval as evaluation
from bench import harness as harness_module
from bench.harness import adapter, harness
from bench.long_context import needles, position
from bench.scorer import Scorer, settings
from bench.tables import published
from eval import TABLE2
from hope import Hope, HopeConfig
from support import checkpoint
from support.vocabulary import tokenizer
from tasks import needle
from train import train

ROOT = Path(__file__).resolve().parent.parent
DATA = os.environ.get("NESTED_DATA")
CHOICES = ["piqa", "hellaswag", "winogrande", "arc_easy", "boolq"]


def tiny(**changes):
    torch.manual_seed(0)
    options = {"d_model": 16, "n_layers": 2, "n_heads": 2, "chunk": 8} | changes
    return Hope(HopeConfig.preset("nano", **options)).double().eval()


def one_by_one(model, context, end):
    """The definition: a single row, read at once."""
    row = torch.tensor([[*context, *end]])
    with torch.no_grad():
        nats = model(row[:, :-1])[0].log_softmax(-1)[0, len(context) - 1 :]
    chosen = nats.gather(1, row[0, len(context) :, None]).squeeze(1)
    return chosen.sum().item(), bool((nats.argmax(-1) == row[0, len(context) :]).all())


def some_pairs(n=20, longest=60):
    """Contexts of all lengths, most with several ends, some with a single one."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(n):
        context = rng.integers(0, 256, rng.integers(1, longest)).tolist()
        for _ in range(rng.integers(1, 5)):
            pairs.append((context, rng.integers(0, 256, rng.integers(1, 12)).tolist()))
    return [pairs[i] for i in rng.permutation(len(pairs))]


# Batching changes nothing


@pytest.mark.parametrize("model", ["hope", "titans", "gated_deltanet", "transformer"])
@pytest.mark.parametrize("limit", [33, 4096])
def test_log_likelihoods_are_those_of_single_rows(model, limit):
    model = tiny(model=model)
    pairs = some_pairs()
    scorer = Scorer(model, tokenizer())
    scorer.limit = limit  # tokens in a call: rows are cut into pieces, too
    for (context, end), (nats, greedy) in zip(pairs, scorer.loglikelihood(pairs), strict=True):
        expected, argmax = one_by_one(model, context, end)
        assert nats == pytest.approx(expected, abs=1e-4)  # the loss is taken in float32
        assert greedy == argmax


def test_a_greedy_continuation_is_recognised():
    model = tiny()
    context = [10, 20, 30]
    written = [int(t) for t in model.generate(torch.tensor([context]), 5, temperature=0)]
    other = [*written[:-1], (written[-1] + 1) % 256]
    results = Scorer(model, tokenizer()).loglikelihood([(context, written), (context, other)])
    assert [greedy for _, greedy in results] == [True, False]


def test_a_shared_context_is_read_once():
    """Four answers to a context of 200 tokens: 200 tokens, and the answers."""
    model = tiny()
    read = []

    def counting(tokens, state=None):
        read.append(tokens.numel())
        return model(tokens, state)

    Scorer(counting, tokenizer()).loglikelihood([(list(range(200)), [i, i]) for i in range(4)])
    assert sum(read) == 199 + 4 * 2


def test_contexts_longer_than_max_length_lose_their_beginning():
    model = tiny()
    pairs = [(list(range(30)), [1, 2, 3]), (list(range(5)), [1, 2])]
    cut = Scorer(model, tokenizer(), max_length=10).loglikelihood(pairs)
    kept = list(range(22, 30))  # 10 tokens in, 11 with the last
    assert cut[0][0] == pytest.approx(one_by_one(model, kept, [1, 2, 3])[0], abs=1e-4)
    assert cut[1][0] == pytest.approx(one_by_one(model, *pairs[1])[0], abs=1e-4)
    with pytest.raises(ValueError, match="must have at most max_length, 10, tokens, got 11"):
        Scorer(model, tokenizer(), max_length=10).loglikelihood([([1], [0] * 11)])
    with pytest.raises(ValueError, match="max_length must be at least 1 token, got 0"):
        Scorer(model, tokenizer(), max_length=0)


@pytest.mark.parametrize("model", ["hope", "transformer"])
def test_texts_written_in_a_batch_are_those_written_alone(model):
    model = tiny(model=model)
    rng = np.random.default_rng(1)
    contexts = [rng.integers(0, 256, length).tolist() for length in (3, 30, 9, 9, 70, 1)]
    texts = Scorer(model, tokenizer()).generate(contexts, 20)
    for context, text in zip(contexts, texts, strict=True):
        alone = [int(t) for t in model.generate(torch.tensor([context]), 20, temperature=0)]
        alone = alone[: alone.index(256)] if 256 in alone else alone
        assert text == tokenizer().decode(alone, errors="replace")


def recites(text):
    """A model that writes `text`, letter by letter, whatever it reads; its state is where it is."""

    def model(tokens, state=None):
        begin = 0 if state is None else int(state["at"][0])
        at = begin + torch.arange(tokens.shape[1])
        wanted = torch.tensor([text.encode()[i % len(text)] for i in at])
        logits = torch.nn.functional.one_hot(wanted, 257).float().expand(len(tokens), -1, -1)
        return logits, {"at": at[-1:].repeat(len(tokens)) + 1}

    return model


def test_writing_ends_at_a_stop_string():
    scorer = Scorer(recites("abc. def\n"), tokenizer())
    assert scorer.generate([[0]], 9, until=("\n",)) == ["abc. def"]
    assert scorer.generate([[0]], 9, until=("\n", ". ")) == ["abc"]
    assert scorer.generate([[0]], 5) == ["abc. "]


SETTINGS = [
    ({}, 256),
    ({"max_gen_toks": 0, "max_new_tokens": 9}, 0),
    ({"max_new_tokens": 9, "max_tokens": 8, "max_completion_tokens": 7}, 9),
    ({"max_completion_tokens": 7, "max_tokens": 8}, 8),
    ({"max_completion_tokens": "7", "max_gen_toks": None}, 7),
    ({"do_sample": True, "temperature": 0}, 256),
    ({"do_sample": True, "temperature": "0.0", "top_p": 1}, 256),
    ({"do_sample": False, "temperature": 0.7}, 256),
]


def test_generation_settings_are_read_in_the_harness_s_order():
    for options, n in SETTINGS:
        assert settings(options | {"until": "\n"}) == (n, ("\n",))
    assert settings({"until": ["a", "b"]})[1] == ("a", "b") and settings({"until": None})[1] == ()
    for options in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(ValueError, match="do_sample false or temperature 0.*got {"):
            settings(options)


def test_the_adapter_writes_what_the_settings_of_a_task_say():
    pytest.importorskip("lm_eval", reason="pip install -r requirements-eval.txt")
    from lm_eval.api.instance import Instance
    from lm_eval.models.utils import normalize_gen_kwargs

    scorer = Scorer(tiny(model="transformer", n_layers=1), tokenizer())
    scorer.generate = lambda contexts, n, until: [(n, until)] * len(contexts)
    for options, n in SETTINGS:
        theirs = normalize_gen_kwargs(options | {"until": ["x"]})
        assert (theirs["max_gen_toks"], theirs["until"]) == (n, ["x"])
        asked = [Instance("generate_until", {}, ("a", options | {"until": ["x"]}), 0)]
        assert adapter(scorer, 64).generate_until(asked) == [(n, ("x",))]


def test_half_a_surrogate_pair_is_read_as_the_replacement_character():
    scorer = Scorer(tiny(model="transformer", n_layers=1), tokenizer())
    assert scorer.tokens("a\ud83db\ude00") == list("a\ufffdb\ufffd".encode())
    assert scorer.tokens("\ud83d\ude00\u00e9") == list("\U0001f600\u00e9".encode())
    assert scorer.length("\udcff") == 3


# The harness


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """(lm-eval's own wrapping, ours) of one tiny GPT-2: random weights, 256 positions."""
    if DATA is None:
        pytest.skip("NESTED_DATA, the folder of released data sets, is not set")
    pytest.importorskip("lm_eval", reason="pip install -r requirements-eval.txt")
    folder = tmp_path_factory.mktemp("gpt2")
    transformers = pytest.importorskip("transformers")
    import tiktoken
    from lm_eval.models.huggingface import HFLM
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    # the first 1,000 merges: logits of 50,257 symbols would be all the work
    merges = Path(DATA, "gpt2_bpe/vocab.bpe").read_text(encoding="utf-8")
    merges = merges.splitlines(keepends=True)[:1001]
    ids = json.loads(Path(DATA, "gpt2_bpe/encoder.json").read_text(encoding="utf-8"))
    files = str(folder / "vocab.bpe"), str(folder / "encoder.json")
    Path(files[0]).write_text("".join(merges), encoding="utf-8")
    ids = {text: i for text, i in ids.items() if i < 1256} | {"<|endoftext|>": 1256}
    Path(files[1]).write_text(json.dumps(ids), encoding="utf-8")
    torch.manual_seed(0)
    sizes = {"vocab_size": 1257, "n_positions": 256, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=1256, eos_token_id=1256)
    network = transformers.GPT2LMHeadModel(config).eval()
    for parameter in network.parameters():
        parameter.data *= 4  # far from uniform
    theirs = transformers.GPT2TokenizerFast(vocab=files[1], merges=files[0])
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ranks = data_gym_to_mergeable_bpe_ranks(*files)
    special = {"<|endoftext|>": 1256}
    ours = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def model(tokens, state=None):
        seen = tokens if state is None else torch.cat([state["seen"], tokens], 1)
        return network(seen).logits[:, -tokens.shape[1] :], {"seen": seen}

    own = {"batch_size": 8, "max_length": 256, "device": "cpu"}
    scorer = Scorer(model, ours, max_length=256)
    return HFLM(pretrained=network, tokenizer=theirs, **own), adapter(scorer, 256)


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """The beginnings of the released data sets, in the same files."""
    if DATA is None:
        pytest.skip("NESTED_DATA, the folder of released data sets, is not set")
    pytest.importorskip("lm_eval", reason="pip install -r requirements-eval.txt")
    folder = tmp_path_factory.mktemp("data")
    lengths = {
        "wikitext2/test.txt": 150,
        "lambada/lambada_test.jsonl": 100,
        "piqa/valid.jsonl": 100,
        "piqa/valid-labels.lst": 100,
        "winogrande/winogrande.jsonl": 100,
        "arc/arc_easy.jsonl": 100,
        "boolq/boolq.jsonl": 60,
        "hellaswag/hellaswag_val_full.txt": 6 * 60,
    }
    for name, lines in lengths.items():
        source = Path(DATA, name)
        packed = source.with_name(f"{source.name}.bz2")
        text = source.read_bytes() if source.exists() else bz2.decompress(packed.read_bytes())
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"".join(text.splitlines(keepends=True)[:lines]))
    return str(folder)


def uniform(tokens, state=None):
    return torch.zeros(*tokens.shape, 257), None


def requests_of(monkeypatch, task, data, limit=None):
    """The requests the harness makes of the documents of a local task."""
    seen = []

    def spy(scorer, window, tasks):
        seen.extend(tasks)
        return adapter(scorer, window, tasks)

    with monkeypatch.context() as patch:
        patch.setattr(harness_module, "adapter", spy)
        harness(Scorer(uniform, tokenizer()), [task], 64, data, limit)
    return sum((task.instances for task in seen), [])


def test_the_adapter_gives_the_log_likelihoods_of_the_harness_s_own(gpt2, few, monkeypatch):
    theirs, ours = gpt2
    # 100 + 60 + 60 items; boolq's are cut
    for task, limit in (("piqa", 50), ("lambada_openai", 60), ("boolq", 30)):
        requests = requests_of(monkeypatch, task, few, limit)
        expected = theirs.loglikelihood(requests, disable_tqdm=True)
        for (a, hit), (b, same) in zip(expected, ours.loglikelihood(requests), strict=True):
            assert a == pytest.approx(b, abs=1e-4) and hit == same


def test_the_adapter_agrees_where_text_meets_tokens(gpt2):
    from lm_eval.api.instance import Instance

    theirs, ours = gpt2
    cases = [
        ("", " begins from nothing"),
        ("a question", " an answer"),
        ("ends in space ", "word"),
        ("hel", "lo"),
        ("interna", "tionalization"),
        ("long " * 300, "end"),
        ("x", "long " * 100),
    ]
    requests = [Instance("loglikelihood", {}, case, 0) for case in cases]
    apart = ours.tok_encode("hel") + ours.tok_encode("lo")
    assert apart != ours.tok_encode("hello")  # it does merge
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for (a, _), (b, _) in zip(expected, ours.loglikelihood(requests), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_rolling_perplexity_and_generated_text_are_the_harness_s_own(gpt2, few, monkeypatch):
    theirs, ours = gpt2
    from lm_eval.api.instance import Instance

    pages = requests_of(monkeypatch, "wikitext", few)
    texts = [Instance("loglikelihood_rolling", {}, (page.args[0][:2000],), 0) for page in pages]
    texts.append(Instance("loglikelihood_rolling", {}, ("short",), 0))
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    for a, b in zip(expected, ours.loglikelihood_rolling(texts), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    options = {"until": ["\n"], "max_gen_toks": 16, "do_sample": False}
    prompts = ("The sky is", "Once upon a time there", "No")
    asked = [Instance("generate_until", {}, (text, options), 0) for text in prompts]
    alone = [theirs.generate_until([one], disable_tqdm=True)[0] for one in asked]  # without padding
    assert ours.generate_until(asked) == alone


@pytest.mark.parametrize("task", CHOICES)
def test_who_knows_the_answers_scores_100_percent(task, few, monkeypatch):
    """The right text of every question has the largest logits; the state is all that was read."""
    requests = requests_of(monkeypatch, task, few)
    gold = sorted({"".join(r.args).encode() for r in requests if r.idx == _gold(task, r.doc)})

    def knows(tokens, state=None):
        seen = tokens if state is None else torch.cat([state["seen"], tokens], 1)
        logits = torch.zeros(*tokens.shape, 257)
        first = seen.shape[1] - tokens.shape[1]
        for row, text in enumerate(seen.tolist()):
            text = bytes(text)
            for t in range(tokens.shape[1]):
                read = text[: first + t + 1]
                for right in gold[bisect_left(gold, read) :]:
                    if not right.startswith(read):
                        break
                    if len(right) > len(read):
                        logits[row, t, right[len(read)]] = 30.0
        return logits, {"seen": seen}

    values = harness(Scorer(knows, tokenizer()), [task], 512, few)[task]
    assert values["n"] >= 60 and values["acc"] == 1.0 and values.get("acc_norm", 1.0) == 1.0


def _gold(task, doc):
    """The number of the right answer."""
    if task == "winogrande":
        return int(doc["answer"]) - 1
    return "ABCD".index(doc["answerKey"]) if task == "arc_easy" else int(doc["label"])


@pytest.mark.parametrize("task", CHOICES)
def test_who_knows_nothing_scores_what_the_lengths_of_the_answers_say(task, few, monkeypatch):
    """Equal logits: acc chooses the shortest answer.

    acc_norm divides by the letters of the answer without the space before it, so it is not chance
    but the longest: (n + 1) / n is smallest there.
    """
    answers = {}
    gold = {}
    for r in requests_of(monkeypatch, task, few):
        answers.setdefault(r.doc_id, []).append(r.args[1])
        gold[r.doc_id] = _gold(task, r.doc)
    shortest = []
    longest = []
    for number, texts in answers.items():
        size = np.array([len(text.encode()) for text in texts])
        letters = np.array([len(text) - 1 for text in texts])
        shortest.append(size.argmin() == gold[number])
        longest.append((size / letters).argmin() == gold[number])
    values = harness(Scorer(uniform, tokenizer()), [task], 512, few)[task]
    assert values["acc"] == pytest.approx(np.mean(shortest), abs=1e-12)
    if "acc_norm" in values:
        assert values["acc_norm"] == pytest.approx(np.mean(longest), abs=1e-12)


def test_local_files_become_the_harness_s_prompts(few, monkeypatch):
    first = {task: requests_of(monkeypatch, task, few, 1) for task in (*CHOICES, "lambada_openai")}
    question = "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:"
    assert first["piqa"][0].args == (question, " " + first["piqa"][0].doc["sol1"])
    context = "Roof shingle removal: A man is sitting on a roof. He"
    assert first["hellaswag"][3].args == (context, " starts pulling up roofing on a roof.")
    context = "Sarah was a much better surgeon than Maria so Maria"
    assert first["winogrande"][1].args == (context, " always got the easier cases.")
    context = first["arc_easy"][0].args[0]
    assert context.startswith("Question: Which statement best explains")
    assert context.endswith("?\nAnswer:")
    context, answer = first["boolq"][1].args
    assert context.startswith("All biomass goes") and context.endswith("that produces?\nAnswer:")
    assert answer == " yes"
    context, answer = first["lambada_openai"][0].args
    assert context.endswith("I don't care about") and answer == " signs"


# Memory


POSITION = """
import sys
import numpy as np, torch
from support.vocabulary import tokenizer
from bench.long_context import position
from bench.scorer import Scorer
from hope import Hope, HopeConfig
torch.set_num_threads(1)
model = Hope(HopeConfig.preset("nano", sys.argv[1], d_model=32, n_layers=1)).eval()
tokens = np.random.default_rng(0).integers(0, 256, 60_000).astype(np.uint16)
scorer = Scorer(model, tokenizer())
scorer.limit = 1000
print(*position(scorer, tokens, 512, 60_000, rows=1)["peak_mib"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("model", "grows"), [("hope", False), ("transformer", True)])
def test_a_stream_is_read_at_constant_memory(model, grows):
    """In a process of its own. A cache that grows with every token shows that it would be seen."""
    code = POSITION.replace("60_000", "10_000") if grows else POSITION
    command = [sys.executable, "-c", code, model]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    half, end = map(float, done.stdout.split())
    assert (end > 1.01 * half) == grows


def test_a_stream_gives_the_losses_of_one_call():
    model = tiny()
    tokens = np.random.default_rng(0).integers(0, 256, 3 * 300).astype(np.uint16)
    scorer = Scorer(model, tokenizer())
    scorer.limit = 100  # three rows in pieces of 33 tokens
    made = position(scorer, tokens, seq_len=64, context=300)
    rows = torch.from_numpy(tokens.astype(np.int64)).view(3, 300)
    with torch.no_grad():
        logits, _ = model(torch.cat([torch.full((3, 1), 256), rows[:, :-1]], 1))
    nats = torch.nn.functional.cross_entropy(logits.mT, rows, reduction="none")
    assert np.abs(made["curve"] - nats.numpy()).max() < 1e-4 and made["to"] == [64, 128, 256, 300]
    nats = nats.mean(0)
    assert made["kept"][1] == pytest.approx(nats[64:128].mean().item() / np.log(2), abs=1e-5)
    assert made["kept"][0] == pytest.approx(made["fresh"][0], abs=1e-6)
    assert made["kept"][1] != made["fresh"][1]


# Needles, with a model that finds them


def finds(tokens, state=None):
    """Answers a needle question from all it has read: its state."""
    seen = tokens if state is None else torch.cat([state["seen"], tokens], 1)
    logits = torch.zeros(*tokens.shape, 257)
    for row, text in enumerate(seen.tolist()):
        text = bytes(text).decode("utf-8", "ignore")
        prompt, said, written = text.rpartition("mentioned in the provided text")
        verb = re.match(" (is|are)", written)
        if not (said and verb and "mentioned in the provided text" in prompt):
            continue
        asked = re.findall(r"[a-z]+-[a-z]+", prompt[prompt.rindex("magic") :])
        values = [v for key in asked for v in re.findall(rf"for {key} is: (\S+)\.(?=\s)", prompt)]
        answer = " " + ", ".join(values) + "\n" * 200
        logits[row, -1, ord(answer[len(written) - verb.end()])] = 1.0
    return logits, {"seen": seen}


SENTENCE = "The {} thing was said by {} people on day {}."
TEXT = " ".join(SENTENCE.format("abcde"[i % 5], "fghij"[i % 5], i) for i in range(200))
WORDS = ["amber", "basalt", "cedar", "dune", "ember"]


def test_who_finds_needles_scores_100_percent_and_who_does_not_0():
    for model, accuracy in ((finds, 100.0), (uniform, 0.0)):
        found = needles(Scorer(model, tokenizer()), TEXT, [800, 1200], samples=3, words=WORDS)
        assert found == [[accuracy, accuracy]] * 6


def test_a_length_without_room_for_a_question_is_refused_before_anything_is_read():
    scorer = Scorer(None, tokenizer())
    text = "no full stop and so a sentence of 400 characters " * 99
    with pytest.raises(ValueError, match="at least 7.. for .* question of S-NIAH-2, got 600"):
        needles(scorer, text, [2000, 600], samples=2, words=WORDS)


def test_a_stream_of_pieces_is_answered_as_the_whole_text():
    model = tiny(chunk=64)  # with short chunks a random model makes much of rounding
    text = needle("S-NIAH-2", TEXT, 900, words=WORDS)["prompt"]
    scorer = Scorer(model, tokenizer())
    whole = scorer.generate([list(text.encode())], 12)[0]
    scorer.limit = 50
    assert scorer.answer(iter(re.findall(r"\S+\s*", text)), 12) == whole


# The paper's rows


def test_published_averages_are_those_of_their_columns():
    for row in published("table2")["rows"]:
        if "note" not in row and row["model"] != "Transformer++":
            average = row["values"][-1]
            assert np.mean(row["values"][2:-1]) == pytest.approx(average, abs=0.07), row
    assert [c for c in published("table2")["columns"] if c != "Avg"] == list(TABLE2)


@pytest.mark.slow
def test_every_row_says_how_large_the_model_is_and_how_long_it_was_trained(tmp_path):
    facts = {
        "model": "hope (nano)",
        "parameters": 1_029_854,
        "training_tokens": 4_000_000,
        "trained_on": "novels",
        "cms_steps_in_context": "off",
    }
    run = SimpleNamespace(folder=tmp_path, facts=lambda: facts)
    text = evaluation.beside("table2", {"values": [None] * 11, "notes": []}, run)
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert lines[0][1:4] == ["parameters", "training tokens", "CMS steps in context"]
    assert lines[2][1:4] == ["1.03M", "4M (novels)", "off"]
    assert all(line[1] and line[2] for line in lines[2:])
    assert len({len(line) for line in lines}) == 1


def test_a_row_of_needles_says_at_which_lengths_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.tables.draw", lambda *_: None)
    facts = {"model": "hope (nano)", "parameters": 1, "training_tokens": 1, "trained_on": "novels"}
    run = SimpleNamespace(folder=tmp_path, facts=lambda: facts | {"cms_steps_in_context": "off"})
    made = {"values": [[1.0, 2.0]] * 6, "lengths": [1024, 2048], "notes": []}
    text = evaluation.beside("table1", made, run)
    assert "| **hope (nano) at 1,024 / 2,048 tokens, this run** |" in text
    assert text.startswith("Needle in a haystack, accuracy %; published rows at 4K / 8K / 16K")


# The command


def test_table2_of_a_run_offline(few, here, capsys):
    train(small(out="run"))
    assert evaluation.main(["run", "--device", "cpu"]) == 0
    capsys.readouterr()
    words = ["--tasks", "table2", "--data-dir", few, "--limit", "3", "--device", "cpu"]
    assert evaluation.main(["run", *words]) == 0
    out = capsys.readouterr().out
    ours = next(line for line in out.splitlines() if "this run" in line).split(" | ")
    without_files = ("ARC-c", "SIQA")
    assert [cell == "-" for cell in ours[4:-1]] == [c in without_files for c in TABLE2]
    for text in ("has <unk> in it", "Only the first 3 items", "Hope, published"):
        assert text in out
    written = json.loads(Path("run/eval.json").read_text())
    assert written["bits_per_byte"] and written["table2"]["parameters"]
    assert written["table2"]["training_tokens"] == 256
    assert Path("run/table2.png").stat().st_size > 1000


def test_position_of_a_run(here, capsys):
    train(small(out="run"))
    assert evaluation.main(["run", "--tasks", "position", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "| 65 to 128 | 8x |" in out and "MiB at the end" in out
    assert Path("run/position.png").is_file()


@pytest.mark.slow
def test_a_table_of_a_run_stands_beside_the_published_rows(here, capsys):
    train(small(out="run", tokens=64))
    Path("words.txt").write_text("Where they found it, some wondered. " * 200)
    words = "run --tasks table1 --lengths 1100 --samples 1 --data words.txt --device cpu"
    assert evaluation.main(words.split()) == 0
    out = capsys.readouterr().out
    assert "this run" in out and "Hope, published" in out
    written = json.loads(Path("run/eval.json").read_text())["table1"]
    assert np.shape(written["values"]) == (6, 1) and written["lengths"] == [1100]
    assert Path("run/table1.png").stat().st_size > 1000


def refused(capsys, cases):
    """Every command is an error of one line that says so."""
    for words, message in cases.items():
        assert evaluation.main(["run", "--device", "cpu", *words.split()]) == 2, words
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(lines) == 1 and message in lines[0], lines


def test_bad_input_is_one_line(here, capsys):
    train(small(out="run", tokens=64))
    Path("words.txt").write_text("Where they found it, some wondered. " * 50)
    capsys.readouterr()
    cases = {
        "--tasks ,": "--tasks must be table1, table2",
        "--tasks babilong": "babi/en",
        "--tasks table1 --lengths 4k": "argument --lengths: must be a whole number of at least 1",
        "--tasks tabel2": "unknown task 'tabel2': did you mean 'table2'?",
        "--tasks table1 --lengths 50 --data words.txt": "got 50",
        "--tasks position --context 1e9": "context must be 1 to",
        "--tasks piqa --data-dir nowhere": "data_dir 'nowhere' is not a folder",
    }
    refused(capsys, cases)
    assert not Path("run/eval.json").exists()


def test_bad_names_and_missing_files_are_one_line(here, capsys):
    pytest.importorskip("lm_eval", reason="pip install -r requirements-eval.txt")
    train(small(out="run", tokens=64))
    capsys.readouterr()
    none = "data_dir '.' gives the data of none of the tasks arc_easy, boolq"
    cases = {
        "--tasks piqq --data-dir .": "unknown task 'piqq' with --data-dir: did you mean 'piqa'?",
        "--tasks piqa --data-dir .": "piqa/valid-labels.lst does not exist",
        "--tasks table2 --data-dir .": none,
    }
    refused(capsys, cases)


def test_commands_that_moved_are_named(capsys):
    for command, moved in (("tasks", "suites"), ("continual", "continual")):
        assert evaluation.main([command, "--quick"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err == f"eval.py: error: this command is now `python -m bench {moved} ...`\n"


def test_a_missing_harness_is_one_line(here, capsys, monkeypatch):
    train(small(out="run", tokens=64))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
    capsys.readouterr()
    for tasks in ("piqa", "table2", "table1,table3"):
        assert evaluation.main(["run", "--tasks", tasks, "--data-dir", "."]) == 2
        out, err = capsys.readouterr()  # before anything is opened or measured
        assert out == "" and err.count("\n") == 1
        assert "pip install -r requirements-eval.txt" in err


def test_a_checkpoint_with_another_vocabulary_is_one_line(here, capsys):
    train(small(out="run", tokens=64))
    config = json.loads(Path("run/config.json").read_text())
    config["model"]["vocab_size"] = 300
    Path("run/config.json").write_text(json.dumps(config))
    model = Hope(HopeConfig(**config["model"]))
    checkpoint.save("run", model, torch.optim.SGD(model.parameters()), step=3)
    capsys.readouterr()
    assert evaluation.main(["run", "--tasks", "piqa", "--data-dir", ".", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "run has a vocabulary of 300 symbols" in err and "257" in err
