"""Corpora, vocabularies, batches, shards (data.py, support/corpus.py, support/vocabulary.py).

Tokens give every byte back; the split is by files; batches follow from (seed, step); every held-out
token is scored; shards are the same whoever makes them, in one go or in many.
"""

import gzip
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
import torch.nn.functional as F
from small_runs import log

import data
import eval as evaluation
import sample
import train
from data import main
from support.checkpoint import locked
from support.corpus import Shards, batch, documents, join, load_corpus, sha256_of, windows
from support.run import Run
from support.vocabulary import END, encode, n_bytes, save_tokenizer, tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    "the memory of a river keeps what it was told and forgets slowly what nobody asks for again"
).split()


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


# --------------------------------------------------------------------------------------------------
# The tokenizer of single bytes


def test_bytes_have_257_symbols_and_give_random_bytes_back():
    encoding = tokenizer()
    assert encoding.n_vocab == 257 and encoding.eot_token == 256
    text = random.Random(0).randbytes(10_000)
    assert encoding.decode_bytes(encode(text, encoding).tolist()) == text
    with pytest.raises(ValueError, match="tokenizer must be 'bytes', .* got 'words'"):
        tokenizer("words")


def test_fast_path_gives_tiktoken_s_own_ids():
    text = 'def f(x):\n    return "ñ 漢字 🙂"  # <|endoftext|>\r\n' * 3
    assert encode(text.encode(), tokenizer()).tolist() == tokenizer().encode_ordinary(text)


def test_documents_are_joined_with_end_of_text_between():
    assert join([b"ab", b"c", b"d"], tokenizer()).tolist() == [97, 98, 256, 99, 256, 100]


# --------------------------------------------------------------------------------------------------
# The split


def test_folder_is_split_by_files(folder):
    corpus = load_corpus(str(folder))
    assert len(corpus.val_files) == 2 and len(corpus.train_files) == 38
    assert not set(corpus.val_files) & set(corpus.train_files)
    assert list(corpus.train_files) != sorted(corpus.train_files)
    for part in ("train", "val"):
        tokens = getattr(corpus, part)
        texts = [(folder / name).read_bytes() for name in getattr(corpus, f"{part}_files")]
        assert tokenizer().decode_bytes(tokens.tolist()) == b"<|endoftext|>".join(texts)
        size = getattr(corpus, f"{part}_bytes")
        assert size == sum(map(len, texts)) == n_bytes(tokens, tokenizer())


def test_split_is_the_same_every_time_and_its_fingerprint_sees_one_changed_byte(folder):
    first = load_corpus(str(folder))
    second = load_corpus(str(folder))
    assert first.fingerprint() == second.fingerprint()
    assert np.array_equal(first.train, second.train)
    path = folder / first.train_files[0]
    path.write_text(path.read_text().replace("file", "fike"))
    assert load_corpus(str(folder)).fingerprint() != first.fingerprint()


def test_single_file_holds_out_its_last_part_from_a_line_start(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    corpus = load_corpus(str(path))
    begin = tokenizer().decode_bytes(corpus.train.tolist())
    end = tokenizer().decode_bytes(corpus.val.tolist())
    assert begin + end == path.read_bytes()
    assert begin.endswith(b"\n") and 0.05 <= len(end) / path.stat().st_size < 0.06
    in_a_folder = load_corpus(str(tmp_path))  # a folder with one file is that file
    assert np.array_equal(in_a_folder.val, corpus.val)


@pytest.mark.parametrize("text", ["first line\n" + "x" * 1000, "é" * 501])
def test_single_long_line_is_cut_between_characters(tmp_path, text):
    (tmp_path / "one.txt").write_text(text)
    corpus = load_corpus(str(tmp_path / "one.txt"))
    begin = tokenizer().decode_bytes(corpus.train.tolist()).decode("utf-8")
    end = tokenizer().decode_bytes(corpus.val.tolist()).decode("utf-8")
    assert begin + end == text
    assert 0.04 < len(end) / len(text) < 0.06


def test_standard_library_corpus_is_source_without_tests():
    names = [name for name, _ in documents("stdlib")]
    assert "json/decoder.py" in names
    assert all(name.endswith(".py") for name in names)
    skipped = {"test", "tests", "site-packages"}
    assert not any(skipped & set(name.split("/")[:-1]) for name in names)


def test_what_is_no_text_is_refused_by_name(tmp_path):
    path = tmp_path / "input.bin"
    with pytest.raises(ValueError, match="input.bin.*does not exist"):
        load_corpus(str(path))
    contents = {
        b"": "input.bin.*is empty",
        b"text\0more": "input.bin.*NUL byte at offset 4",
        b"abc\xff": "input.bin.*not UTF-8 at offset 3",
    }
    for content, message in contents.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_corpus(str(path))
    with pytest.raises(ValueError, match="no UTF-8 text file"):
        load_corpus(str(tmp_path))


def test_each_file_is_read_once_whatever_the_number_of_its_names(folder, tmp_path, capsys):
    before = load_corpus(str(folder)).fingerprint()
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    (elsewhere / "new.txt").write_text("file 40: new\n")
    (folder / "0.txt").symlink_to(folder / "a/1.txt")
    (folder / "z.txt").hardlink_to(folder / "b/2.txt")
    (folder / "again").symlink_to(folder / "a")
    (folder / "loop").symlink_to(folder)
    (folder / "self").symlink_to("self")
    assert load_corpus(str(folder)).fingerprint() == before  # links to what is there change nothing
    (folder / "link").symlink_to(elsewhere)
    texts = dict(documents(str(folder)))
    assert len(texts) == len(set(texts.values())) == 41
    assert texts["link/new.txt"] == b"file 40: new\n"
    assert "2 other names of a file" in capsys.readouterr().err
    # nor are sources that overlap read twice
    paths = map(str, [folder, folder / "a", folder / "a/3.txt", elsewhere])
    out = str(tmp_path / "out")
    main(["text", *paths, "--vocab", "bytes", "--jobs", "1", "--out", out])
    corpus = load_corpus(out)
    both = tokenizer().decode([*corpus.train[:], 256, *corpus.val]).split(END)
    assert sorted(both) == sorted(text.decode() for text in texts.values())


def test_what_is_passed_over_is_counted_by_kind_in_one_line(folder, capsys):
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "a/other.txt").write_bytes(b"\xff")
    (folder / "novel.tar.gz").write_bytes(gzip.compress(bytes(100)))
    os.mkfifo(folder / "pipe")
    assert len(documents(str(folder))) == 40
    kinds = "1 .gz (NUL byte), 1 .png (NUL byte), 2 .txt (is not UTF-8), 1 hidden, "
    passed = f"note: data '{folder}': passed over {kinds}1 neither file nor folder\n"
    assert capsys.readouterr().err == passed
    documents(str(folder / "b"))
    assert not capsys.readouterr().err


def packed(folder, texts):
    """Files whose rows are documents, three of the texts in each, and one of a whole text."""
    folder.mkdir()
    lines = [json.dumps({"text": text, "title": f"{i}"}) for i, text in enumerate(texts)]
    (folder / "a.JSONL").write_text("\n\n".join(lines[:3]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[3:6]).encode()))
    (folder / "c.txt.gz").write_bytes(gzip.compress(texts[6].encode()))
    (folder / "d.txt").write_text(texts[7])


@pytest.mark.parametrize("parquet", [False, True])
def test_rows_of_jsonl_and_parquet_are_documents_and_gzip_is_read(tmp_path, small_shards, parquet):
    texts = [prose(i, 9).decode() + "é\x00"[: 1 + (i < 6)] for i in range(8)]
    packed(tmp_path / "in", texts)
    if parquet:
        table = pytest.importorskip("pyarrow").table({"text": texts[:3], "title": [*"012"]})
        pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "in/a.parquet")
        (tmp_path / "in/a.JSONL").unlink()
    source = str(tmp_path / "in")
    corpus = load_corpus(source)
    first = "a.parquet:1" if parquet else "a.JSONL:1"
    assert {first, "b.jsonl.gz:3", "c.txt.gz"} < {*corpus.train_files, *corpus.val_files}
    make(source, tmp_path / "out", vocab="bytes")  # in parts of 3,000 bytes
    shards = load_corpus(str(tmp_path / "out"))
    assert len(shards.train.arrays) > 1 and np.array_equal(shards.train[:], corpus.train)
    assert np.array_equal(shards.val, corpus.val)
    both = tokenizer().decode([*corpus.train, 256, *corpus.val]).split(END)
    assert sorted(both) == sorted(texts)
    words = ["--field", "title", "--vocab", "bytes", "--jobs", "1", "--out", str(tmp_path / "t")]
    (path,) = Path(source).glob("a.*")
    main(["text", str(path), *words])
    titles = load_corpus(str(tmp_path / "t"))
    assert sorted([*titles.train[:], *titles.val]) == [*b"012", 256]


def test_rows_that_have_no_text_are_refused_by_file_and_row(tmp_path, monkeypatch):
    refused = {
        b'{"text": "a"}\n{"content": "b"}': r"a.jsonl': row 2 has no text 'text' \(KeyError",
        b'{"text": "a"}\n{"text": "b': "row 2 could not be read .JSONDecodeError",
        b'{"text": 5}': "row 1 has no text 'text' .AttributeError",
        b'{"text": null}': "row 1 has no text 'text' .AttributeError",
        b'{"text": "\\ud800"}': "row 1 could not be read .UnicodeEncodeError",
        b'"text"': "row 1 has no text",
        b"[" * 100_000: "row 1 .*nested too deep",
        b"": "is empty",
        b'{"text": ""}': "is empty",
    }
    for content, message in refused.items():
        (tmp_path / "a.jsonl").write_bytes(content)
        for source in (tmp_path, tmp_path / "a.jsonl"):
            with pytest.raises(ValueError, match=message) as caught:
                documents(str(source))
            assert "\n" not in str(caught.value)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    with pytest.raises(ValueError, match="a.txt.gz': could not be read .EOFError"):
        documents(str(tmp_path / "a.txt.gz"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="pip install pyarrow"):
        documents(str(tmp_path / "a.parquet"))


def test_no_name_at_all_is_not_this_folder(here):
    for command in (main, lambda words: train.TrainConfig(data=words[0])):
        with pytest.raises(ValueError, match="data '' does not exist|must be a text .*, got ''"):
            command([""])


# --------------------------------------------------------------------------------------------------
# Batches and windows


def test_batches_depend_on_seed_and_step_only():
    tokens = np.arange(5000, dtype=np.uint16)
    inputs, targets = batch(tokens, 4, 16, seed=1, step=7)
    np.random.seed(5)
    torch.manual_seed(5)
    again, _ = batch(tokens, 4, 16, seed=1, step=7)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs, again)
    assert torch.equal(inputs + 1, targets)  # the next token
    assert not torch.equal(inputs, batch(tokens, 4, 16, seed=1, step=8)[0])
    assert not torch.equal(inputs, batch(tokens, 4, 16, seed=2, step=7)[0])


def test_batches_reach_the_first_and_the_last_token():
    tokens = np.arange(10, dtype=np.uint16)
    inputs, targets = batch(tokens, 500, 7, seed=0, step=0)
    assert set(inputs[:, 0].tolist()) == {0, 1, 2}
    assert targets.max() == 9


def test_data_too_short_for_a_row_is_refused():
    refused = {
        8: "seq_len must be from 1 to 7 for 8 training tokens, got 8",
        1: "training needs at least 2 tokens, got 1",
        0: "training needs at least 2 tokens, got 0",
    }
    for length, message in refused.items():
        with pytest.raises(ValueError, match=message):
            batch(np.zeros(length, dtype=np.uint16), 1, 8, seed=0, step=0)


@pytest.mark.parametrize("length", [1, 7, 8, 16, 40, 45])
def test_windows_score_every_token_exactly_once(length):
    tokens = np.arange(length, dtype=np.uint16)
    inputs = []
    targets = []
    shapes = []
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
    n_tokens = corpus.val_bytes + 1  # one <|endoftext|> between two files
    expected = math.log2(257) * n_tokens / corpus.val_bytes
    bits = nats / math.log(2) / n_bytes(corpus.val, tokenizer())
    assert bits == pytest.approx(expected, rel=1e-12)


def test_data_py_shows_what_the_corpus_is(folder, capsys):
    main([str(folder)])
    printed = capsys.readouterr().out
    assert "38 files" in printed and "2 files" in printed and "257 symbols" in printed


# --------------------------------------------------------------------------------------------------
# Vocabularies and shards


def prose(seed, n):
    """n lines of a few words each."""
    r = random.Random(seed)
    lines = []
    for _ in range(n):
        words = " ".join(r.choices(WORDS, k=8)).capitalize()
        lines.append(f"{words}, {r.randrange(3000)}.\n")
    return "".join(lines).encode()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """30 texts, one of them long, one with bytes beyond ASCII; all begin and end differently."""
    folder = tmp_path_factory.mktemp("library")
    for i in range(30):
        text = prose(i, 400 if i == 7 else 20) + ("ñ漢🙂" * (i == 3)).encode()
        (folder / f"{i}.txt").write_bytes(text)
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(data, "MIN_SHARD", 3000)
    monkeypatch.setattr(data, "PIECE", 1000)


def make(source, out, vocab="300", jobs="1"):
    main(["text", str(source), "--vocab", str(vocab), "--out", str(out), "--jobs", jobs])


@pytest.fixture
def shards(library, small_shards, tmp_path):
    pytest.importorskip("tokenizers")
    make(library, tmp_path / "shards")
    return tmp_path / "shards"


def contents(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def merge(parts, pair):
    """A word's parts after every occurrence of a pair, from the left, has become one."""
    merged = []
    i = 0
    while i < len(parts):
        both = tuple(parts[i : i + 2]) == pair
        merged.append(pair[0] + pair[1] if both else parts[i])
        i += 1 + both
    return merged


def test_each_merge_of_a_vocabulary_is_the_most_frequent_pair_of_its_time():
    pytest.importorskip("tokenizers")
    text = prose(0, 60)
    ranks = train_tokenizer([text], 320)._mergeable_ranks
    learned = sorted(ranks, key=ranks.get)
    assert learned[:256] == [bytes([b]) for b in range(256)]
    like_pattern = r" ?[a-z]+|[A-Z][a-z]*| |[0-9]{1,3}|[,.]+\n?"  # PATTERN, on such a text
    words = Counter(re.findall(like_pattern, text.decode()))
    assert sum(len(word) * count for word, count in words.items()) == len(text)
    parts = {word: [bytes([b]) for b in word.encode()] for word in words}
    for token in learned[256:]:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(parts[word]):
                pairs[pair] += count
        most = [pair for pair, count in pairs.items() if count == max(pairs.values())]
        found = [pair for pair in most if pair[0] + pair[1] == token]
        assert found, token
        parts = {word: merge(own, found[0]) for word, own in parts.items()}


def test_trained_vocabulary_gives_any_bytes_back(shards):
    encoding = tokenizer(str(shards / "tokenizer.json"))
    assert encoding.eot_token == encoding.n_vocab - 1 == 299
    texts = {
        "nothing": b"",
        "random bytes": random.Random(0).randbytes(5000),
        "half a character": b"abc\xc3",
        "a surrogate": b"\xed\xa0\x80",
        "a special token": b"<|endoftext|>\0",
        "a million spaces": b" " * 10**6 + b"x",
        "prose": prose(1, 9),
    }
    for name, text in texts.items():
        ids = encode(text, encoding)
        assert encoding.decode_bytes(ids.tolist()) == text, name
        assert n_bytes(ids, encoding) == len(text), name
        assert encoding.eot_token not in ids, name


def test_shards_hold_the_documents_of_the_corpus_in_its_order(library, shards):
    corpus = load_corpus(str(shards))
    plain = load_corpus(str(library))
    assert len(corpus.train.arrays) > 5 and corpus.train.arrays[0].dtype == np.uint16
    for part in ("train", "val"):
        tokens = getattr(corpus, part)[:]
        text = tokenizer().decode_bytes(getattr(plain, part).tolist())
        assert corpus.encoding.decode_bytes(tokens.tolist()) == text
        size = getattr(corpus, f"{part}_bytes")
        assert size == getattr(plain, f"{part}_bytes") == n_bytes(tokens, corpus.encoding)


def test_manifest_counts_what_is_there(shards):
    manifest = json.loads((shards / "manifest.json").read_text())
    own = manifest["shards"]
    assert sum(shard["documents"] for shard in own) == 30 == manifest["source"]["documents"]
    for shard in own:
        content = (shards / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert len(np.load(shards / shard["file"])) == shard["tokens"]
    files = {shard["file"] for shard in own}
    assert files | {"manifest.json", "tokenizer.json"} == set(contents(shards))


def test_single_file_is_split_like_its_corpus(tmp_path, small_shards):
    no_line_end = "漢".encode() * 3000  # the last part has nowhere to be cut at
    (tmp_path / "one.txt").write_bytes(prose(0, 300) + no_line_end)
    make(tmp_path / "one.txt", tmp_path / "out", vocab="bytes")
    corpus = load_corpus(str(tmp_path / "out"))
    plain = load_corpus(str(tmp_path / "one.txt"))
    assert len(corpus.train.arrays) > 3
    assert np.array_equal(corpus.train[:], plain.train)
    assert np.array_equal(corpus.val, plain.val)


def test_full_disk_leaves_shards_that_can_be_finished(library, shards, tmp_path, monkeypatch):
    real = data.atomic_write
    calls = []
    out = tmp_path / "again"

    def full(path, write):
        calls.append(path)
        if len(calls) % 3 == 0:
            raise OSError("No space left on device")
        real(path, write)

    monkeypatch.setattr(data, "atomic_write", full)
    for _ in range(20):
        try:
            make(library, out)
        except OSError:
            assert not (out / "manifest.json").exists()
            with pytest.raises(ValueError, match="unfinished"):
                load_corpus(str(out))
    assert contents(out) == contents(shards) and len(calls) > 10


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import data
data.MIN_SHARD = 3000
data.PIECE = 1000
real = data.encode
data.encode = lambda *args: (time.sleep(0.02), real(*args))[1]  # so that there is time to kill it
if __name__ == "__main__":
    data.main({words!r})
"""


@pytest.mark.slow
def test_killed_command_of_two_processes_given_again_to_one_writes_the_same_bytes(
    library, shards, tmp_path
):
    out = tmp_path / "killed"
    script = tmp_path / "slow.py"
    words = ["text", str(library), "--vocab", "300", "--out", str(out), "--jobs", "2"]
    script.write_text(SLOW.format(root=str(ROOT), words=words))
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    while len(list(out.glob("train-*.npy"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    assert 3 <= len(done) < len(contents(shards)) - 2 and not (out / "manifest.json").exists()
    make(library, out)
    assert contents(out) == contents(shards)
    assert done == {path: path.stat().st_mtime_ns for path in done}  # nothing is done twice


def test_rows_of_shards_come_once_in_every_pass(shards):
    train = load_corpus(str(shards)).train
    tokens = train[:]
    assert np.array_equal(tokens, np.concatenate(train.arrays))
    n = (len(train) - 1) // 32
    expected = sorted(tokens[i * 32 : i * 32 + 32].tolist() for i in range(n))
    for passes in (0, 1):
        rows = [batch(train, 1, 32, seed=5, step=passes * n + i) for i in range(n)]
        assert sorted(inputs[0].tolist() for inputs, _ in rows) == expected
        assert all(torch.equal(inputs[0, 1:], targets[0, :-1]) for inputs, targets in rows)
    first = batch(train, 4, 32, seed=0, step=3)[0]
    assert torch.equal(first, batch(train, 4, 32, seed=0, step=3)[0])
    assert not torch.equal(first, batch(train, 4, 32, seed=1, step=3)[0])
    one_by_one = [batch(train, 1, 32, seed=0, step=12 + i)[0] for i in range(4)]
    assert torch.equal(first, torch.cat(one_by_one))


def test_slices_reach_across_shards():
    tokens = np.arange(10, dtype=np.uint16)
    stream = Shards([tokens[:3], tokens[3:4], tokens[4:8], tokens[8:]])
    assert len(stream) == 10 and np.array_equal(stream[:], tokens)
    for start in range(11):
        for stop in range(start, 11):
            assert np.array_equal(stream[start:stop], tokens[start:stop])
        assert np.array_equal(stream[start:], tokens[start:])


def test_vocabularies_above_65536_take_four_bytes(tmp_path):
    ranks = {bytes([i]): i for i in range(256)} | {b"%05d" % i: 256 + i for i in range(70_000)}
    encoding = tiktoken.Encoding(
        "big", pat_str=r"\d+|\D", mergeable_ranks=ranks, special_tokens={END: 70_256}
    )
    save_tokenizer(encoding, tmp_path)
    text = "".join(f"{i:05d}\n" for i in range(0, 70_000, 7))
    (tmp_path / "one.txt").write_text(text)
    make(tmp_path / "one.txt", tmp_path / "out", vocab=tmp_path / "tokenizer.json")
    corpus = load_corpus(str(tmp_path / "out"))
    assert corpus.val.dtype == np.uint32 and max(corpus.val) > 65_536
    tokens = np.concatenate([corpus.train[:], corpus.val])
    assert corpus.encoding.decode(tokens.tolist()) == text


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
    make(library, tmp_path / "out", vocab="gpt2")
    encoding = load_corpus(str(tmp_path / "out")).encoding
    assert encoding.n_vocab == 50257 and encoding.eot_token == 50256
    assert encoding.encode("Hello world") == [15496, 995]
    text = random.Random(1).randbytes(3000) + "ñ 漢字 don't\n\n  x".encode()
    assert encoding.decode_bytes(encode(text, encoding).tolist()) == text


def test_fineweb_is_taken_in_equal_shares_from_its_files(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pytest.importorskip("tokenizers")
    texts = []
    for file in range(3):
        texts.append([prose(100 * file + i, 4).decode() for i in range(40)])
        rows = [json.dumps({"text": text}) + "\n" for text in texts[file]]
        (tmp_path / f"{file}.jsonl").write_text("".join(rows))
    files = [str(tmp_path / f"{file}.jsonl") for file in range(3)]
    monkeypatch.setattr(data, "HUB", {"path": "json", "data_files": files})
    monkeypatch.setattr(data, "TOKENS_PER_FILE", 3000)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    data._hub.cache_clear()
    out = str(tmp_path / "out")
    main(["fineweb-edu", "--tokens", "6001", "--vocab", "300", "--jobs", "1", "--out", out])
    corpus = load_corpus(out)
    assert [len(array) for array in corpus.train.arrays] == [2000, 2000, 2001]
    held_out = corpus.encoding.decode(corpus.val.tolist()).split(END)
    assert held_out == texts[0][: len(held_out)]
    assert 0.05 * 4 * 6001 <= corpus.val_bytes < 0.05 * 4 * 6001 + 300
    for file, array in enumerate(corpus.train.arrays):
        rest = texts[file][len(held_out) * (file == 0) :]
        after = END * (file > 0) + END.join(rest)
        assert after.startswith(corpus.encoding.decode(array.tolist()))


# --------------------------------------------------------------------------------------------------
# What is wrong with shards is said in one line, before anything is touched


def test_missing_libraries_are_named_with_their_command(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    data._hub.cache_clear()
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="pip install datasets"):
        main(["fineweb-edu", "--tokens", "1e6", "--out", str(out)])
    assert not out.exists()
    with pytest.raises(ValueError, match="pip install tokenizers"):
        make(library, out)
    assert not out.exists()
    make(library, out, vocab="bytes")  # a ready vocabulary needs no trainer


def test_bad_flags_are_refused(library, tmp_path):
    pytest.importorskip("tokenizers")
    out = tmp_path / "out"
    refused = {
        "--vocab 999999": "vocab must be from 258 to .*, got 999999",
        "--vocab 257": "--vocab: must be from 258 .*, got 257",
        "--vocab gpt3": "tokenizer must be .*, got 'gpt3'",
        "--vocab none/tokenizer.json": "tokenizer.json' does not exist",
        "--jobs 0": "--jobs: must be a whole number of at least 1, .*, got '0'",
        "--tokens 5": "--tokens",
    }
    for flags, message in refused.items():
        with pytest.raises(ValueError, match=message):
            main(["text", str(library), "--out", str(out), "--jobs", "1", *flags.split()])
        assert not out.exists()


def test_a_refused_command_leaves_no_folder_but_those_that_were_there(library, tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "mine").mkdir()
    for out in ("new/deep/er", "mine"):
        with pytest.raises(ValueError, match="vocab must be from 258 to"):
            make(library, tmp_path / out, vocab="999999")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not contents(tmp_path / "mine")


def test_folder_of_other_shards_or_of_something_else_is_refused(library, shards, tmp_path):
    before = contents(shards)
    with pytest.raises(ValueError, match="was begun with vocab 300, not 400"):
        make(library, shards, vocab="400")
    (library / "new.txt").write_text("one more")
    try:
        with pytest.raises(ValueError, match="was begun with source .*name a new folder"):
            make(library, shards)
    finally:
        (library / "new.txt").unlink()
    with pytest.raises(ValueError, match="exists and holds something else"):
        make(library, tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.tmp").write_text("not left by data.py")
    with pytest.raises(ValueError, match="exists and holds something else"):
        make(library, tmp_path / "mine")
    make(library, shards)  # finished already: nothing to do
    assert contents(shards) == before
    # what a kill at the very first file leaves is no reason to refuse
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "plan.json.tmp").write_text("{")
    make(library, tmp_path / "new")
    assert contents(tmp_path / "new") == before


def damages(folder):
    """What may have happened to a folder of shards, and what is said of it."""
    val = folder / "val-00000.npy"
    train = folder / "train-00001.npy"
    return {
        "train-00001.npy is missing, damaged or not whole": train.unlink,
        "train-00001.npy is missing, .*": lambda: train.write_bytes(b"NUMPY"),
        "val-00000.npy does not have its": lambda: np.save(val, np.zeros(3, np.uint16)),
        "val-00000.npy must be uint16, 1 dimension, got float64": lambda: cast(val, float),
        "val-00000.npy must be uint16, 1 dimension, got bool": lambda: cast(val, bool),
        "val-00000.npy must be .* got uint32": lambda: cast(val, np.uint32),
        "val-00000.npy must be .* 2 dimensions": lambda: np.save(val, np.load(val)[None]),
        "val-00000.npy is missing, .*NpzFile": lambda: save_npz(val),
        "val-00000.npy is missing, .*no such file": lambda: (val.unlink(), os.mkfifo(val)),
        "val-00000.npy is not the file of the manifest": lambda: flip(val),
        "manifest.json is damaged": lambda: (folder / "manifest.json").write_text("{"),
        "is nested too deep": lambda: (folder / "manifest.json").write_text("[" * 100_000),
        "is not the tokenizer of the manifest": lambda: save_tokenizer(tokenizer(), folder),
        "tokenizer.json' is damaged": lambda: (folder / "tokenizer.json").write_text("{}"),
        "manifest.json has 0 train shards": lambda: edit(folder, lambda m: m["shards"].__delitem__(
            slice(1, None)
        )),
        "has 0 val shards": lambda: edit(folder, lambda m: m["shards"].pop(0)),
        "train-00001.npy is in the manifest twice": lambda: edit(
            folder, lambda m: m["shards"].append(m["shards"][2])
        ),
        "link.npy is in the manifest twice": lambda: (
            (folder / "link.npy").hardlink_to(train),
            edit(folder, lambda m: m["shards"].append(m["shards"][2] | {"file": "link.npy"})),
        ),
        "'../train-00001.npy' must be the name of a file": lambda: edit(
            folder, lambda m: m["shards"][2].update(file="../train-00001.npy")
        ),
        "has the token 300, but the largest of .* is 299": lambda: edit(
            folder, lambda m: m["shards"][2].update(largest=300)
        ),
        **{
            f"train has {size} bytes": lambda size=size: edit(
                folder, lambda m: m["train"].update(bytes=size)
            )
            for size in (-1, 5, math.nan)
        },
        "train has -5 bytes, its shards -5": lambda: edit(folder, negative),
    }


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def negative(manifest):
    manifest["train"]["bytes"] = -5
    others = sum(shard["bytes"] for shard in manifest["shards"][2:])
    manifest["shards"][1]["bytes"] = -5 - others


def cast(path, dtype):
    np.save(path, np.load(path).astype(dtype))


def save_npz(path):
    np.savez(path.with_suffix(".npz"), np.load(path))
    path.with_suffix(".npz").rename(path)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damaged_shards_are_refused(shards):
    for number in range(len(damages(shards))):
        folder = shards.parent / f"damaged-{number}"  # by name, a tokenizer is read only once
        shutil.copytree(shards, folder)
        message, damage = list(damages(folder).items())[number]
        damage()
        with pytest.raises(ValueError, match=f"data .*damaged-[0-9]+'.*({message})") as caught:
            load_corpus(str(folder))
        assert "\n" not in str(caught.value)


def test_one_changed_token_is_found_by_the_checksums(here, shards, capsys):
    main([str(shards)])
    assert "as the manifest says" in capsys.readouterr().out
    array = np.load(shards / "train-00002.npy")
    array[5] ^= 1
    np.save(shards / "train-00002.npy", array)
    message = "train-00002.npy is not the file of the manifest"
    with pytest.raises(ValueError, match=message):
        main([str(shards)])
    assert train.main(["--data", str(shards), "--out", "run"]) == 2
    assert message in capsys.readouterr().err and not Path("run").exists()


def test_training_refuses_shards_of_other_bytes_or_tokens_than_the_manifest_s(here, shards, capsys):
    path = shards / "train-00002.npy"

    def ten_times(manifest):
        for part in [manifest["train"], *manifest["shards"][1:]]:
            part["bytes"] *= 10

    def of_another_vocabulary(manifest):
        array = np.load(path)
        array[-1] = 300
        np.save(path, array)
        manifest["shards"][3]["sha256"] = sha256_of(path)

    manifest = (shards / "manifest.json").read_text()
    for change, message in {
        ten_times: "train-0000..npy has .* bytes of text, not the .*0 of the manifest",
        of_another_vocabulary: "train-00002.npy: tokens must be from 0 to 299, .* got 300",
    }.items():
        (shards / "manifest.json").write_text(manifest)
        edit(shards, change)
        assert train.main(["--data", str(shards), "--out", "run"]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1


def test_a_folder_of_shards_has_one_writer(library, tmp_path):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / data.LOCK):
        with pytest.raises(ValueError, match=f"out is written by process {os.getpid()} on"):
            make(library, tmp_path / "out", vocab="bytes")
    make(library, tmp_path / "out", vocab="bytes")


def test_a_tokenizer_that_drops_text_is_refused(tmp_path):
    ranks = {bytes([i]): i for i in range(256)}
    lacks = {bytes([i]): i for i in range(256) if i != 0xBD} | {b"ab": 0xBD}
    special = {"special_tokens": {END: 256}}
    rare = tiktoken.Encoding("x", pat_str=r"[^🙃]", mergeable_ranks=ranks, **special)
    with pytest.raises(ValueError, match="tokenizer 'x': its pattern drops 4 bytes"):
        encode("a🙃b".encode(), rare)
    refused = {
        "words": (r"\w+", ranks, "drops [0-9]+ bytes"),
        "all but one": (r"[^\u1234]", ranks, "drops 3 bytes"),
        "ascii": (r"[\x00-\x7f]", ranks, "drops [0-9]+ bytes"),
        "255 bytes": (r"[\s\S]", lacks, "no token for 1 of the 256 bytes, as 189"),
    }
    for name, (pattern, own, message) in refused.items():
        made = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=own, **special)
        (tmp_path / name).mkdir()
        save_tokenizer(made, tmp_path / name)
        with pytest.raises(ValueError, match=f"is damaged .*{message}"):
            tokenizer(str(tmp_path / name / "tokenizer.json"))


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path):
    path = tmp_path / "tokenizer.json"
    for number, text in enumerate(["[" * 100_000, "5", "[]", '{"tokens": 5}', '"text"']):
        path = tmp_path / f"{number}.json"
        path.write_text(text)
        with pytest.raises(ValueError, match="json' is damaged") as caught:
            tokenizer(str(path))
        assert "\n" not in str(caught.value)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="pipe.json' does not exist, or is no file"):
        tokenizer(str(tmp_path / "pipe.json"))
    with pytest.raises(ValueError, match="tokenizer must be .*, got 5"):
        tokenizer(5)


def test_shards_of_another_tokenizer_than_the_run_s_are_refused(shards):
    own = tokenizer(str(shards / "tokenizer.json"))
    assert load_corpus(str(shards), own).encoding is own
    message = "holds tokens of 'bpe-300-.*', but the tokenizer of the run is 'bytes'"
    with pytest.raises(ValueError, match=message):
        load_corpus(str(shards), tokenizer())
    with pytest.raises(ValueError, match="is a folder of token shards, not of text"):
        documents(str(shards))


# --------------------------------------------------------------------------------------------------
# Training on shards


def tiny(run, source):
    """Twelve steps of a tiny model; the losses."""
    sizes = "--batch-size 2 --seq-len 16 --tokens 384 --set n_layers=1 --set d_model=32"
    words = ["--out", str(run), "--data", str(source), *sizes.split(), "--set", "n_heads=1"]
    assert train.main(words) == 0
    return losses(run)


def losses(run):
    return [record["bits_per_byte"] for record in log(run) if "lr" in record]


@pytest.mark.slow
def test_run_on_shards_outlives_them(here, shards, library, tmp_path, capfdbinary):
    run = tmp_path / "run"
    text = library / "0.txt"
    first = tiny(run, shards)
    bits_of_equal_logits = math.log2(300) * 21_172 / 44_227  # by tokens and bytes of training
    assert len(first) == 12 and first[0] == pytest.approx(bits_of_equal_logits, rel=0.05)
    # resumed wherever the shards are now
    moved = str(tmp_path / "moved")
    shutil.copytree(shards, moved)
    assert train.main(["--resume", str(run), "--data", moved, "--tokens", "448"]) == 0
    assert losses(run)[:12] == first
    # read without them
    shutil.rmtree(shards)
    shutil.rmtree(moved)
    opened = Run.open(run)
    assert opened.encoding.name == json.loads((run / "config.json").read_text())["tokenizer"]
    assert opened.encoding.n_vocab == opened.model.config.vocab_size == 300
    assert evaluation.main([str(run), "--data", str(text)]) == 0
    scored = json.loads((run / "eval.json").read_text())
    assert 0 < scored["bits_per_byte"] < 8 and scored["bytes"] == text.stat().st_size
    capfdbinary.readouterr()
    assert sample.main(["generate", str(run), "--prompt", "The river", "--n", "5"]) == 0
    assert capfdbinary.readouterr().out.startswith(b"The river")
    assert evaluation.main([str(run)]) == 2
    error = capfdbinary.readouterr().err.decode()
    assert re.search("moved' does not exist.*; --data names another text", error)


def test_held_out_score_of_a_run_on_shards_is_that_of_its_held_out_shard(here, shards, tmp_path):
    tiny(tmp_path / "run", shards)
    own = [record for record in log(tmp_path / "run") if "val_tokens" in record][-1]
    corpus = load_corpus(str(shards))
    assert own["val_tokens"] == len(corpus.val)
    model = Run.open(tmp_path / "run").model
    nats = 0.0
    with torch.no_grad():
        # the first token comes after this tokenizer's own <|endoftext|>
        for inputs, targets in windows(corpus.val, 1, 16, start=299):
            nats += F.cross_entropy(model(inputs)[0][0], targets[0], reduction="sum").item()
    bits = nats / math.log(2) / corpus.val_bytes
    assert own["val_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_training_goes_on_only_with_the_tokenizer_it_began_with(
    here, shards, library, tmp_path, capsys
):
    run = tmp_path / "run"
    other = tmp_path / "other"
    tiny(run, shards)
    make(library, other, vocab="310")
    before = contents(run)
    capsys.readouterr()
    assert train.main(["--resume", str(run), "--tokens", "448", "--data", str(other)]) == 2
    error = capsys.readouterr().err
    message = "holds tokens of 'bpe-310-.*but the tokenizer of the run is 'bpe-300-"
    assert re.search(message, error) and error.count("\n") == 1
    assert contents(run) == before
