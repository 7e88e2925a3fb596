"""Files of released data sets as the documents that lm-eval's own tasks expect.

So prompts and metrics stay lm-eval's. A task file here names one of these functions as
`custom_dataset`; harness.py passes data_dir, the folder, as metadata. Missing files raise
FileNotFoundError.
"""

import bz2
import json
import re
from pathlib import Path

from datasets import Dataset


def _lines(data_dir, *names):
    """Lines of the first of these files that is there."""
    paths = [Path(data_dir) / name for name in names]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{paths[0]} does not exist")
    opened = bz2.open if path.suffix == ".bz2" else open
    with opened(path, "rt", encoding="utf-8", newline="\n") as file:
        return file.read().split("\n")


def _json(data_dir, name):
    return [json.loads(line) for line in _lines(data_dir, name) if line.strip()]


def wikitext(data_dir, **_):
    """WikiText-2 test, cut before every title (" = Title = ")."""
    text = "\n".join(_lines(data_dir, "wikitext2/test.txt"))
    pages = re.split(r"(?m)^(?= = [^=\n]+ = ?$)", text)
    return {"test": Dataset.from_list([{"page": page} for page in pages if page.strip()])}


def lambada(data_dir, **_):
    return {"test": Dataset.from_list(_json(data_dir, "lambada/lambada_test.jsonl"))}


def hellaswag(data_dir, **_):
    """Six lines an item: "label: context", number of the right ending, four endings.

    The file holds the context in one piece. The harness capitalises its last part (ctx_b), a
    beginning of a sentence: it is taken to be what follows the last full stop, where that starts
    with a lower-case letter.
    """
    name = "hellaswag/hellaswag_val_full.txt"
    lines = _lines(data_dir, f"{name}.bz2", name)
    items = []
    for i in range(0, len(lines) - 5, 6):
        label, _, context = lines[i].partition(": ")
        last = re.search(r"(?<=[.!?]) ([a-z][^.!?]*)$", context)
        item = {"activity_label": label, "ctx_a": context, "ctx_b": ""}
        if last:
            item |= {"ctx_a": context[: last.start()], "ctx_b": last[1]}
        items.append(item | {"label": lines[i + 1], "endings": lines[i + 2 : i + 6]})
    return {"validation": Dataset.from_list(items)}


def piqa(data_dir, **_):
    labels = [int(line) for line in _lines(data_dir, "piqa/valid-labels.lst") if line]
    items = []
    for item, label in zip(_json(data_dir, "piqa/valid.jsonl"), labels, strict=True):
        items.append(item | {"label": label})
    return {"validation": Dataset.from_list(items)}


def winogrande(data_dir, **_):
    """Two contexts and what follows them: as a sentence with a gap that the whole contexts fill."""
    items = []
    for item in _json(data_dir, "winogrande/winogrande.jsonl"):
        first, second = item["context_options"]
        one = {"sentence": "_ " + item["continuation"], "option1": first, "option2": second}
        items.append(one | {"answer": str(item["gold"] + 1)})
    return {"validation": Dataset.from_list(items)}


def arc_easy(data_dir, **_):
    items = []
    for item in _json(data_dir, "arc/arc_easy.jsonl"):
        question = item["query"].removeprefix("Question: ")
        labels = list("ABCDE"[: len(item["choices"])])
        choices = {"text": item["choices"], "label": labels}
        answer = "ABCDE"[item["gold"]]
        items.append({"question": question, "answerKey": answer, "choices": choices})
    return {"test": Dataset.from_list(items)}


def boolq(data_dir, **_):
    items = []
    for item in _json(data_dir, "boolq/boolq.jsonl"):
        text = item["query"].removeprefix("Passage: ")
        passage, question = text.rsplit("\nQuestion: ", 1)
        question = question.removesuffix("?")
        items.append({"passage": passage, "question": question, "label": item["gold"]})
    return {"validation": Dataset.from_list(items)}
