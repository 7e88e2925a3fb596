"""Evaluate a trained run: bits per byte and perplexity of text it has not seen.

    python eval.py runs/hope-nano                   # on the held-out part of the run's own corpus
    python eval.py runs/hope-nano --data book.txt   # on the whole of another text, or of a folder of texts
    python eval.py continual domains --quick        # the same as python continual.py

Every token is scored exactly once, in windows as long as the training rows, memories starting afresh in each. Bits per
byte divides by the true number of bytes of the text, so models with different tokenizers compare. The result is printed
and written to eval.json in the folder of the run.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

from data import documents, join, load_corpus, tokenizer
from hope import Hope, device_for
from train import NonFinite, TrainConfig, read_config, validate, write_json


def evaluate(run: str, data: str | None = None, device: str = "auto") -> dict:
    """Scores of a run on its held-out text, or on all of `data`; also written to eval.json.

    Returns bits_per_byte, byte_perplexity, token_perplexity, bytes, tokens and on what. Raises FileNotFoundError or
    ValueError for a folder that is no run, a damaged checkpoint, bad data, or a device that is not there.
    """
    config, where = read_config(run), device_for(device)
    try:
        train = TrainConfig(**config["train"])
    except TypeError as error:
        raise ValueError(f"{run}/config.json is of another version: {error}") from None
    model, name = Hope.load(run)
    encoding = tokenizer(name)
    if data is None:
        corpus = load_corpus(train.data, encoding)
        if corpus.fingerprint() != config["corpus"]:
            raise ValueError(
                f"data {train.data!r} has changed since {run} was trained, so its held-out part may have "
                "been trained on: name a text with --data"
            )
        text, tokens, size = f"held-out part of {corpus.name}", corpus.val, corpus.val_bytes
    else:
        files = [content for _, content in documents(data)]
        text, tokens, size = data, join(files, encoding), sum(len(content) for content in files)
    nats, count = validate(model.to(where), tokens, train.batch_size, train.seq_len, where)
    bits = nats / math.log(2) / size
    result = {
        "text": text,
        "bits_per_byte": bits,
        "byte_perplexity": 2**bits,
        "token_perplexity": math.exp(nats / count),
        "bytes": size,
        "tokens": count,
        "seq_len": train.seq_len,
    }
    write_json(Path(run) / "eval.json", result)
    return result


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["continual"]:
        import continual

        return continual.main(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--data", help="a text file or a folder, scored whole (default: the run's held-out text)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    args = parser.parse_args(argv)
    try:
        result = evaluate(args.run, args.data, args.device)
    except (ValueError, OSError, NonFinite, torch.OutOfMemoryError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.run} on {result['text']} ({result['bytes']:,} bytes, {result['tokens']:,} tokens)")
    for key, unit in (("bits_per_byte", "bits per byte"), ("byte_perplexity", "perplexity per byte"),
                      ("token_perplexity", "perplexity per token")):  # fmt: skip
        print(f"{result[key]:>10.4f} {unit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
