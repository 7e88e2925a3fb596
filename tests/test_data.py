"""What data.py promises: lossless tokens, a split by files, batches from (seed, step), every held-out token scored; shards
that are the same whoever makes them, in one go or in many."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import data
import eval as eval_py
import hope
import train
from data import main
from support.corpus import Shards, batch, documents, join, load_corpus, windows
from support.vocabulary import END, encode, n_bytes, tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the memory of a river keeps what it was told and forgets slowly what nobody asks for again".split()


@pytest.fixture
def folder(tmp_path):
    """40 small text files in two folders, and files that are no text."""
    for i in range(40):
        path = tmp_path / ("a" if i % 2 else "b") / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"file {i}: " + "é" * i + "\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_text("hidden")
    return tmp_path


def test_tokenizer_gives_random_bytes_back():
    data = random.Random(0).randbytes(10_000)
    assert tokenizer().decode_bytes(encode(data, tokenizer()).tolist()) == data


def test_fast_path_gives_tiktoken_s_own_ids():
    text = 'def f(x):\n    return "ñ 漢字 🙂"  # <|endoftext|>\r\n' * 3
    assert encode(text.encode(), tokenizer()).tolist() == tokenizer().encode_ordinary(text)


def test_tokenizer_has_257_symbols_and_end_of_text_is_256():
    assert tokenizer().n_vocab == 257
    assert tokenizer().eot_token == 256
    with pytest.raises(ValueError, match="'words'.*legal is 'bytes'"):
        tokenizer("words")


def test_documents_are_joined_with_end_of_text_between():
    assert join([b"ab", b"c", b"d"], tokenizer()).tolist() == [97, 98, 256, 99, 256, 100]


def test_folder_is_split_by_files(folder):
    corpus = load_corpus(str(folder))
    assert len(corpus.val_files) == 2 and len(corpus.train_files) == 38
    assert not set(corpus.val_files) & set(corpus.train_files)
    for tokens, files, size in (
        (corpus.train, corpus.train_files, corpus.train_bytes),
        (corpus.val, corpus.val_files, corpus.val_bytes),
    ):
        texts = [(folder / name).read_bytes() for name in files]
        assert tokenizer().decode_bytes(tokens.tolist()) == b"<|endoftext|>".join(texts)
        assert size == sum(map(len, texts)) == n_bytes(tokens, tokenizer())


def test_split_is_the_same_every_time_and_shuffled(folder):
    first, second = load_corpus(str(folder)), load_corpus(str(folder))
    assert first.fingerprint() == second.fingerprint()
    assert np.array_equal(first.train, second.train)
    assert list(first.train_files) != sorted(first.train_files)


def test_fingerprint_sees_one_changed_byte(folder):
    before = load_corpus(str(folder)).fingerprint()
    path = folder / load_corpus(str(folder)).train_files[0]
    path.write_text(path.read_text().replace("file", "fike"))
    assert load_corpus(str(folder)).fingerprint() != before


def test_single_file_holds_out_its_last_part_from_a_line_start(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    corpus = load_corpus(str(path))
    whole = path.read_bytes()
    train, val = (tokenizer().decode_bytes(part.tolist()) for part in (corpus.train, corpus.val))
    assert train + val == whole
    assert train.endswith(b"\n") and 0.05 <= len(val) / len(whole) < 0.06
    in_a_folder = load_corpus(str(tmp_path))  # a folder with one file is that file
    assert np.array_equal(in_a_folder.val, corpus.val)


@pytest.mark.parametrize("text", ["first line\n" + "x" * 1000, "é" * 501])
def test_single_long_line_is_cut_between_characters(tmp_path, text):
    (tmp_path / "one.txt").write_text(text)
    corpus = load_corpus(str(tmp_path / "one.txt"))
    train, val = (tokenizer().decode_bytes(part.tolist()).decode("utf-8") for part in (corpus.train, corpus.val))
    assert train + val == text
    assert 0.04 < len(val) / len(text) < 0.06


def test_standard_library_corpus_is_source_without_tests():
    names = [name for name, _ in documents("stdlib")]
    assert "json/decoder.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")[:-1]) for name in names)


def test_batches_depend_on_seed_and_step_only():
    tokens = np.arange(5000, dtype=np.uint16)
    inputs, targets = batch(tokens, 4, 16, seed=1, step=7)
    np.random.seed(5)
    torch.manual_seed(5)
    again, _ = batch(tokens, 4, 16, seed=1, step=7)
    assert inputs.shape == targets.shape == (4, 16) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs, again)
    assert torch.equal(inputs + 1, targets)  # the next token
    assert not torch.equal(inputs, batch(tokens, 4, 16, seed=1, step=8)[0])
    assert not torch.equal(inputs, batch(tokens, 4, 16, seed=2, step=7)[0])


def test_batches_reach_the_first_and_the_last_token():
    tokens = np.arange(10, dtype=np.uint16)
    inputs, targets = batch(tokens, 500, 7, seed=0, step=0)
    assert set(inputs[:, 0].tolist()) == {0, 1, 2}
    assert targets.max() == 9


@pytest.mark.parametrize(("length", "legal"), [(8, "1 to 7"), (1, "at least 2 tokens"), (0, "at least 2 tokens")])
def test_data_too_short_for_a_row_is_refused(length, legal):
    with pytest.raises(ValueError, match=f"seq_len 8 .* {length} training tokens.*{legal}"):
        batch(np.zeros(length, dtype=np.uint16), 1, 8, seed=0, step=0)


@pytest.mark.parametrize("length", [1, 7, 8, 16, 40, 45])
def test_windows_score_every_token_exactly_once(length):
    tokens = np.arange(length, dtype=np.uint16)
    inputs, targets, shapes = [], [], []
    for x, y in windows(tokens, batch_size=2, seq_len=8):
        assert x.shape == y.shape and x.shape[0] <= 2 and x.shape[1] <= 8
        inputs += x.flatten().tolist()
        targets += y.flatten().tolist()
        shapes.append(tuple(x.shape))
    assert targets == list(range(length))
    assert inputs == [256, *range(length - 1)]  # each predicted from the token before it
    assert shapes.count((1, length % 8)) == (length % 8 > 0)


def test_uniform_model_has_log2_of_257_bits_per_token(folder):
    corpus = load_corpus(str(folder))
    nats = sum(y.numel() * math.log(257) for _, y in windows(corpus.val, 3, 16))
    expected = math.log2(257) * (corpus.val_bytes + 1) / corpus.val_bytes  # one <|endoftext|> between two files
    assert nats / math.log(2) / n_bytes(corpus.val, tokenizer()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"text\0more", "NUL byte at offset 4"),
        (b"abc\xff", "not UTF-8 at offset 3"),
    ],
)
def test_bad_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "input.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"input.bin.*{message}"):
        load_corpus(str(path))


def test_folder_without_text_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match="no UTF-8 text file"):
        load_corpus(str(tmp_path))


def test_data_py_shows_what_the_corpus_is(folder, capsys):
    main([str(folder)])
    printed = capsys.readouterr().out
    assert "38 files" in printed and "2 files" in printed and "257 symbols" in printed


# Vocabularies and shards


def prose(seed, n):
    """n lines of a few words each."""
    r = random.Random(seed)
    return "".join(" ".join(r.choices(WORDS, k=8)).capitalize() + f", {r.randrange(3000)}.\n" for _ in range(n)).encode()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder of 30 texts, one of them long, one with bytes beyond ASCII; no text among them ends like another begins."""
    folder = tmp_path_factory.mktemp("library")
    for i in range(30):
        (folder / f"{i}.txt").write_bytes(prose(i, 400 if i == 7 else 20) + ("ñ漢🙂" * (i == 3)).encode())
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(data, "LEAST", 3000)
    monkeypatch.setattr(data, "PIECE", 1000)


@pytest.fixture
def shards(library, small_shards, tmp_path):
    pytest.importorskip("tokenizers")
    main(["text", str(library), "--vocab", "300", "--out", str(tmp_path / "shards"), "--jobs", "1"])
    return tmp_path / "shards"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_each_merge_of_a_vocabulary_is_the_most_frequent_pair_of_its_time():
    pytest.importorskip("tokenizers")
    text = prose(0, 60)
    learned = [token for token, _ in sorted(train_tokenizer([text], 320)._mergeable_ranks.items(), key=lambda x: x[1])]
    assert learned[:256] == [bytes([b]) for b in range(256)]
    words = Counter(re.findall(r" ?[a-z]+|[A-Z][a-z]*| |[0-9]{1,3}|[,.]+\n?", text.decode()))  # PATTERN, on such text
    assert sum(len(word) * count for word, count in words.items()) == len(text)
    cut = {word: [bytes([b]) for b in word.encode()] for word in words}
    for token in learned[256:]:
        pairs = Counter()
        for word, parts in cut.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        most = [pair for pair, count in pairs.items() if count == max(pairs.values())]
        assert (pair := next((p for p in most if p[0] + p[1] == token), None)), token
        for word, parts in cut.items():
            i, merged = 0, []
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == pair
                merged.append(token if both else parts[i])
                i += 1 + both
            cut[word] = merged


@pytest.mark.parametrize(
    "text",
    [b"", random.Random(0).randbytes(5000), b"abc\xc3", b"\xed\xa0\x80", b"<|endoftext|>\0", b" " * 10**6 + b"x", prose(1, 9)],
    ids=["nothing", "random bytes", "half a character", "surrogate", "special", "a million spaces", "prose"],
)
def test_trained_vocabulary_gives_any_bytes_back(shards, text):
    encoding = tokenizer(str(shards / "tokenizer.json"))
    ids = encode(text, encoding)
    assert encoding.decode_bytes(ids.tolist()) == text and n_bytes(ids, encoding) == len(text)
    assert encoding.eot_token == encoding.n_vocab - 1 == 299 and encoding.eot_token not in ids


def test_shards_hold_the_documents_of_the_corpus_in_its_order(library, shards):
    corpus, plain = load_corpus(str(shards)), load_corpus(str(library))
    assert len(corpus.train.arrays) > 5 and corpus.train.arrays[0].dtype == np.uint16
    for part in ("train", "val"):
        tokens = getattr(corpus, part)[:]
        assert corpus.encoding.decode_bytes(tokens.tolist()) == tokenizer().decode_bytes(getattr(plain, part).tolist())
        size = getattr(corpus, f"{part}_bytes")
        assert size == getattr(plain, f"{part}_bytes") == n_bytes(tokens, corpus.encoding)


def test_manifest_counts_what_is_there(shards):
    manifest = json.loads((shards / "manifest.json").read_text())
    assert sum(shard["documents"] for shard in manifest["shards"]) == 30 == manifest["source"]["documents"]
    for shard in manifest["shards"]:
        assert hashlib.sha256((shards / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
        assert len(np.load(shards / shard["file"])) == shard["tokens"]
    assert {shard["file"] for shard in manifest["shards"]} | {"manifest.json", "tokenizer.json"} == set(contents(shards))


def test_single_file_is_split_like_its_corpus(tmp_path, small_shards):
    (tmp_path / "one.txt").write_bytes(prose(0, 300) + "漢".encode() * 3000)  # the last part has no line end to cut at
    main(["text", str(tmp_path / "one.txt"), "--vocab", "bytes", "--out", str(tmp_path / "out"), "--jobs", "1"])
    corpus, plain = load_corpus(str(tmp_path / "out")), load_corpus(str(tmp_path / "one.txt"))
    assert len(corpus.train.arrays) > 3
    assert np.array_equal(corpus.train[:], plain.train) and np.array_equal(corpus.val, plain.val)


def test_full_disk_leaves_shards_that_can_be_finished(library, shards, tmp_path, monkeypatch):
    real, calls, out = data.atomic_write, [], tmp_path / "again"
    words = ["text", str(library), "--vocab", "300", "--out", str(out), "--jobs", "1"]

    def full(path, write):
        calls.append(path)
        if len(calls) % 3 == 0:
            raise OSError("No space left on device")
        real(path, write)

    monkeypatch.setattr(data, "atomic_write", full)
    for _ in range(20):
        try:
            main(words)
        except OSError:
            assert not (out / "manifest.json").exists()
            with pytest.raises(ValueError, match="unfinished"):
                load_corpus(str(out))
    assert contents(out) == contents(shards) and len(calls) > 10


def test_killed_command_of_two_processes_given_again_to_one_writes_the_same_bytes(library, shards, tmp_path):
    out, slow = tmp_path / "killed", tmp_path / "slow.py"
    words = ["text", str(library), "--vocab", "300", "--out", str(out), "--jobs", "2"]
    slow.write_text(  # so that there is something to interrupt, whatever the machine
        f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport data\ndata.LEAST, data.PIECE = 3000, 1000\n"
        "real = data.encode\ndata.encode = lambda *args: (time.sleep(0.02), real(*args))[1]\n"
        f"if __name__ == '__main__':\n    data.main({words!r})\n"
    )
    process = subprocess.Popen([sys.executable, str(slow)], stderr=subprocess.DEVNULL)
    while len(list(out.glob("train-*.npy"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = set(path.name for path in out.glob("*.npy"))
    assert 3 <= len(done) < len(contents(shards)) - 2 and not (out / "manifest.json").exists()
    before = {name: (out / name).stat().st_mtime_ns for name in done}
    main([*words[:-1], "1"])
    assert contents(out) == contents(shards)
    assert before == {name: (out / name).stat().st_mtime_ns for name in done}  # what was done is not done again


def test_rows_of_shards_come_once_in_every_pass(shards):
    corpus = load_corpus(str(shards))
    n = (len(corpus.train) - 1) // 32
    whole = corpus.train[:]
    assert np.array_equal(whole, np.concatenate(corpus.train.arrays))
    for done in (0, 1):
        rows = [batch(corpus.train, 1, 32, seed=5, step=done * n + i) for i in range(n)]
        seen = sorted(inputs[0].tolist() for inputs, _ in rows)
        assert seen == sorted(whole[i * 32 : i * 32 + 32].tolist() for i in range(n))
        assert all(torch.equal(inputs[0, 1:], targets[0, :-1]) for inputs, targets in rows)
    first, again, other = (batch(corpus.train, 4, 32, seed, 3)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first, torch.cat([batch(corpus.train, 1, 32, 0, 12 + i)[0] for i in range(4)]))


@pytest.mark.parametrize("part", [slice(0, 5), slice(3, 4), slice(2, 9), slice(9, 9), slice(7, None), slice(None)])
def test_slices_reach_across_shards(part):
    whole = np.arange(10, dtype=np.uint16)
    stream = Shards([whole[:3], whole[3:4], whole[4:8], whole[8:]])
    assert len(stream) == 10 and np.array_equal(stream[part], whole[part])


def test_vocabularies_above_65536_take_four_bytes(tmp_path):
    ranks = {bytes([i]): i for i in range(256)} | {b"%05d" % i: 256 + i for i in range(70_000)}
    encoding = tiktoken.Encoding("big", pat_str=r"\d+|\D", mergeable_ranks=ranks, special_tokens={END: 70_256})
    data.save_tokenizer(encoding, tmp_path)
    (tmp_path / "one.txt").write_text("".join(f"{i:05d}\n" for i in range(0, 70_000, 7)))
    words = ["text", str(tmp_path / "one.txt"), "--vocab", str(tmp_path / "tokenizer.json"), "--jobs", "1"]
    main([*words, "--out", str(tmp_path / "out")])
    corpus = load_corpus(str(tmp_path / "out"))
    assert corpus.val.dtype == np.uint32 and max(corpus.val) > 65_536
    text = corpus.encoding.decode(np.concatenate([corpus.train[:], corpus.val]).tolist())
    assert text == (tmp_path / "one.txt").read_text()


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """GPT-2's vocabulary where tiktoken looks for what it has downloaded."""
    folder = Path(os.environ.get("NESTED_DATA", "")) / "gpt2_bpe"
    if not os.environ.get("NESTED_DATA") or not folder.is_dir():
        pytest.skip("NESTED_DATA is not set, or has no gpt2_bpe")
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        shutil.copy(folder / name, tmp_path / hashlib.sha1(url.encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))


def test_gpt2_vocabulary_is_ready(gpt2, library, tmp_path, small_shards):
    main(["text", str(library), "--vocab", "gpt2", "--out", str(tmp_path / "out"), "--jobs", "1"])
    corpus = load_corpus(str(tmp_path / "out"))
    assert corpus.encoding.n_vocab == 50257 and corpus.encoding.eot_token == 50256
    assert corpus.encoding.encode("Hello world") == [15496, 995]
    text = random.Random(1).randbytes(3000) + "ñ 漢字 don't\n\n  x".encode()
    assert corpus.encoding.decode_bytes(encode(text, corpus.encoding).tolist()) == text


def test_fineweb_is_taken_in_equal_shares_from_its_files(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pytest.importorskip("tokenizers")
    texts = [[prose(100 * file + i, 4).decode() for i in range(40)] for file in range(3)]
    for file, rows in enumerate(texts):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    monkeypatch.setattr(data, "HUB", {"path": "json", "data_files": [str(tmp_path / f"{i}.jsonl") for i in range(3)]})
    monkeypatch.setattr(data, "SHARE", 3000)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    data._hub.cache_clear()
    words = ["fineweb-edu", "--tokens", "6001", "--vocab", "300", "--jobs", "1", "--out"]
    main([*words, str(tmp_path / "out")])
    corpus = load_corpus(str(tmp_path / "out"))
    assert [len(array) for array in corpus.train.arrays] == [2000, 2000, 2001]
    held_out = corpus.encoding.decode(corpus.val.tolist()).split(END)
    assert held_out == texts[0][: len(held_out)] and 0.05 * 4 * 6001 <= corpus.val_bytes < 0.05 * 4 * 6001 + 300
    for file, array in enumerate(corpus.train.arrays):
        after = END * (file > 0) + END.join(texts[file][len(held_out) * (file == 0) :])
        assert after.startswith(corpus.encoding.decode(array.tolist()))


def test_missing_datasets_library_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    data._hub.cache_clear()
    with pytest.raises(ValueError, match="pip install datasets"):
        main(["fineweb-edu", "--tokens", "1e6", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# What is wrong with shards is said in one line, before anything is touched


def test_missing_trainer_is_named_with_its_command(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    words = ["text", str(library), "--vocab", "300", "--out", str(tmp_path / "out"), "--jobs", "1"]
    with pytest.raises(ValueError, match="pip install tokenizers"):
        main(words)
    assert not contents(tmp_path / "out")
    main([*words[:2], "--vocab", "bytes", *words[4:]])  # a ready vocabulary needs no trainer


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vocab", "999999"], "vocab 999999 is more than the text gives: legal is 258 to"),
        (["--vocab", "257"], "vocab is 257: legal is 258"),
        (["--vocab", "gpt3"], "unknown tokenizer 'gpt3'"),
        (["--vocab", "none/tokenizer.json"], "tokenizer.json' does not exist"),
        (["--jobs", "0"], "jobs.*'0'"),
        (["--tokens", "5"], "--tokens"),
    ],
)
def test_bad_flag_is_refused(library, tmp_path, words, message):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match=message):
        main(["text", str(library), "--out", str(tmp_path / "out"), "--jobs", "1", *words])
    assert not (tmp_path / "out").exists() or not contents(tmp_path / "out")


def test_folder_of_other_shards_or_of_something_else_is_refused(library, shards, tmp_path):
    words = ["text", str(library), "--out", str(shards), "--jobs", "1"]
    before = contents(shards)
    with pytest.raises(ValueError, match="was begun with vocab 300, not 400"):
        main([*words, "--vocab", "400"])
    (library / "new.txt").write_text("one more")
    try:
        with pytest.raises(ValueError, match="was begun with source .*name a new folder"):
            main([*words, "--vocab", "300"])
    finally:
        (library / "new.txt").unlink()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "plan.json.tmp").write_text("{")  # what a kill at the very first file leaves is no reason to refuse
    main(["text", str(library), "--vocab", "300", "--out", str(tmp_path / "new"), "--jobs", "1"])
    assert contents(tmp_path / "new") == before
    with pytest.raises(ValueError, match="exists and holds something else"):
        main(["text", str(library), "--vocab", "300", "--out", str(tmp_path)])
    assert contents(shards) == before
    main([*words, "--vocab", "300"])  # finished already: nothing to do
    assert contents(shards) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train-00001.npy").unlink(), "train-00001.npy is missing, damaged or not whole"),
        (lambda folder: (folder / "train-00001.npy").write_bytes(b"NUMPY"), "train-00001.npy is missing, damaged or not whole"),
        (lambda folder: np.save(folder / "val-00000.npy", np.zeros(3, np.uint16)), "val-00000.npy does not have its"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda folder: data.save_tokenizer(tokenizer(), folder), "is not the tokenizer of the manifest"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json' is damaged"),
    ],
    ids=["missing", "garbage", "shorter", "manifest", "other tokenizer", "damaged tokenizer"],
)
def test_damaged_shards_are_refused(shards, damage, message):
    shutil.copytree(shards, shards.parent / "damaged")  # under another name: tokenizers are read once
    damage(shards.parent / "damaged")
    with pytest.raises(ValueError, match=f"data .*damaged'.*({message})") as caught:
        load_corpus(str(shards.parent / "damaged"))
    assert "\n" not in str(caught.value)


def test_one_changed_token_is_found_by_the_checksums(shards, capsys):
    main([str(shards)])
    assert "as the manifest says" in capsys.readouterr().out
    array = np.load(shards / "train-00002.npy")
    array[5] ^= 1
    np.save(shards / "train-00002.npy", array)
    with pytest.raises(ValueError, match="train-00002.npy is not the file of the manifest"):
        main([str(shards)])


def test_shards_of_another_tokenizer_than_the_run_s_are_refused(shards):
    own = tokenizer(str(shards / "tokenizer.json"))
    assert load_corpus(str(shards), own).encoding is own
    with pytest.raises(ValueError, match="holds tokens of 'bpe-300-.*', but the tokenizer of the run is 'bytes'"):
        load_corpus(str(shards), tokenizer())
    with pytest.raises(ValueError, match="is a folder of token shards, not of text"):
        documents(str(shards))


# Training on shards


def tiny(run, data, *words):
    """Twelve steps of a tiny model; the losses."""
    sizes = "--batch-size 2 --seq-len 16 --set n_layers=1 --set d_model=32 --set n_heads=1 --tokens 384".split()
    begin = ["--out", str(run), *sizes] if words == () else ["--resume", str(run), *words]
    assert train.main([*begin, "--data", str(data)]) == 0
    return [r["bits_per_byte"] for r in train.read_metrics(run) if "lr" in r]


def test_run_on_shards_outlives_them(shards, library, tmp_path, capfdbinary, monkeypatch):
    losses = tiny(tmp_path / "run", shards)
    assert len(losses) == 12 and losses[0] == pytest.approx(math.log2(300) * 21_172 / 44_227, rel=0.05)
    shutil.copytree(shards, tmp_path / "moved")
    assert tiny(tmp_path / "run", tmp_path / "moved", "--tokens", "448")[:12] == losses  # wherever the shards are now
    name = json.loads((tmp_path / "run" / "config.json").read_text())["tokenizer"]
    shutil.rmtree(shards)
    shutil.rmtree(tmp_path / "moved")
    model, known = hope.Hope.load(tmp_path / "run")
    encoding = tokenizer(known)
    assert encoding.name == name and encoding.n_vocab == model.config.vocab_size == 300
    assert eval_py.main([str(tmp_path / "run"), "--data", str(library / "0.txt")]) == 0
    scored = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert 0 < scored["bits_per_byte"] < 8 and scored["bytes"] == (library / "0.txt").stat().st_size
    capfdbinary.readouterr()
    monkeypatch.setattr(sys, "argv", ["hope.py", "generate", str(tmp_path / "run"), "--prompt", "The river", "--n", "5"])
    hope.main()
    assert capfdbinary.readouterr().out.startswith(b"The river")
    assert eval_py.main([str(tmp_path / "run")]) == 2
    assert re.search("moved' does not exist.*; --data names another text", capfdbinary.readouterr().err.decode())


def test_held_out_score_of_a_run_on_shards_is_that_of_its_held_out_shard(shards, tmp_path):
    tiny(tmp_path / "run", shards)
    own = [r for r in train.read_metrics(tmp_path / "run") if "val_tokens" in r][-1]
    corpus = load_corpus(str(shards))
    assert own["val_tokens"] == len(corpus.val)
    model, _ = hope.Hope.load(tmp_path / "run")
    with torch.no_grad():
        nats = 0.0
        for inputs, targets in windows(corpus.val, 1, 16, start=299):  # the first token after this tokenizer's own end
            nats += torch.nn.functional.cross_entropy(model(inputs)[0][0], targets[0], reduction="sum").item()
    assert own["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / corpus.val_bytes, rel=1e-5)


def test_training_goes_on_only_with_the_tokenizer_it_began_with(shards, library, tmp_path, capsys):
    tiny(tmp_path / "run", shards)
    words = ["text", str(library), "--jobs", "1", "--out"]
    main([*words, str(tmp_path / "other"), "--vocab", "310"])
    before = contents(tmp_path / "run")
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "run"), "--tokens", "448", "--data", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert re.search("holds tokens of 'bpe-310-.*but the tokenizer of the run is 'bpe-300-", error) and error.count("\n") == 1
    assert contents(tmp_path / "run") == before
