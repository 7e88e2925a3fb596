"""What data.py promises: lossless tokens, a split by files, batches from (seed, step), every held-out token scored."""

import math
import random

import numpy as np
import pytest
import torch

from data import batch, documents, encode, join, load_corpus, main, n_bytes, tokenizer, windows


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
