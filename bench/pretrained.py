"""A pre-trained model that learns while it reads: nats a token of texts, with and without steps.

Every text is read from its start, the state kept, with the CMS levels off and then with each step
size. Texts that choose a step size must be others than those whose numbers are reported.

    python -m bench pretrained MODEL.gguf --texts a.txt,b.txt --steps 0.01,0.1

--tasks: scores of lm-eval with the levels off, beside those of lm-eval's own wrapping of the same
weights, which transformers reads (pip install transformers -r requirements-eval.txt).

    python -m bench pretrained MODEL.gguf --tasks piqa,arc_easy --limit 100 --data-dir DIR
"""

import json
import time
from pathlib import Path

import torch

from bench.cells import numbers
from bench.harness import check_there, harness
from bench.scorer import Scorer, token_losses
from support.corpus import sha256_of
from support.flags import whole_number
from support.pretrained import gguf_of
from support.run import Run
from support.vocabulary import END, encode, hugging_face


def names(text: str) -> list[str]:
    return text.split(",")


def add_flags(p) -> None:
    p.add_argument("path", help="a Llama checkpoint's folder, a GGUF file, or an export")
    p.add_argument("--texts", type=names, default=[], help="files, with commas")
    p.add_argument("--tokens", type=whole_number, default=4096, help="of each text")
    p.add_argument("--steps", help="inner step sizes; none: from_pretrained's own")
    p.add_argument("--tasks", type=names, default=[], help="of lm-eval, with commas")
    p.add_argument("--limit", type=whole_number, help="only so many items of each task")
    p.add_argument("--data-dir", help="folder of benchmark files: no network is used")
    p.add_argument("--out", default="results/pretrained.json", help="file to write")


def pretrained(args) -> dict:
    """The result of the command. ValueError for what cannot be read."""
    if args.tasks:
        check_there(args.data_dir)
    steps = numbers(args.steps, float) if args.steps else None
    run = Run.pretrained(args.path, "cpu", "first_order")
    files = gguf_of(args.path) or sorted(Path(args.path).glob("*.safetensors"))
    config = run.model.config
    result = {
        "model": run.config.preset,
        "sha256": {file.name: sha256_of(file) for file in files},
        "levels": config.levels,
        "cms_blocks": config.cms_blocks,
        "threads": torch.get_num_threads(),
        "texts": [],
    }
    for text in args.texts:
        result["texts"] += reading(run, Path(text), args.tokens, steps or [config.cms_step])
    if args.tasks:
        result |= beside_transformers(run, args)
    return result


def reading(run: Run, path: Path, n: int, steps: list) -> list[dict]:
    """A row for each way of reading the first n tokens of a text."""
    ids = encode(path.read_bytes(), run.encoding)[:n].tolist()
    if len(ids) < n:
        raise ValueError(f"{path} must have {n} tokens, got {len(ids)}")
    rows = []
    for step in [0.0, *steps]:
        began = time.perf_counter()
        nats = losses(run.model, torch.tensor([ids]), step)
        quarters = [part.mean().item() for part in nats.chunk(4)]
        row = {"text": path.name, "tokens": n, "step": step, "nats": nats.mean().item()}
        rows.append(row | {"quarters": quarters, "seconds": time.perf_counter() - began})
        gains = [off - on for off, on in zip(rows[0]["quarters"], quarters, strict=True)]
        print(f"{path.name:26} step {step:<6g} {row['nats']:.4f} nats a token, better by quarter:",
              *(f"{gain:.4f}" for gain in gains), flush=True)
    return rows


@torch.no_grad()
def losses(model, tokens, step: float) -> torch.Tensor:
    """Nats of tokens [1, T] but the first, [T - 1]; step 0: the levels are off."""
    found = []
    state = None
    how = ("first_order", step) if step else ("off",)
    pieces = (part.split(1024, 1) for part in (tokens[:, :-1], tokens[:, 1:]))
    for piece, targets in zip(*pieces, strict=True):
        logits, state = model(piece, state, *how)
        found.append(token_losses(logits, targets)[0])
    return torch.cat(found)


def beside_transformers(run: Run, args) -> dict:
    """Logits of both and a row for each task and metric: our score, theirs, and the items."""
    import transformers
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer

    files = gguf_of(args.path)
    where = {"pretrained_model_name_or_path": args.path}
    if files:
        where = {"pretrained_model_name_or_path": files[0].parent, "gguf_file": files[0].name}
    network = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    # of a GGUF file transformers guesses another split
    bpe = Tokenizer.from_str(json.dumps(hugging_face(run.encoding)))
    bpe = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)
    window = run.config.seq_len
    theirs = HFLM(pretrained=network, tokenizer=bpe, batch_size=8, max_length=window, device="cpu")
    run.model.config.cms_updates = "off"
    tokens = torch.arange(512)[None] * 37 % run.encoding.n_vocab
    with torch.no_grad():
        logits = network(tokens).logits
        apart = (run.model(tokens)[0] - logits).abs().max().item()
    print(f"logits of {logits.std():.2f}, largest difference {apart:.1e}", flush=True)
    scorer = Scorer(run.model, run.encoding)
    asked = (args.tasks, window, args.data_dir, args.limit)
    scores = [harness(scorer, *asked, model=model) for model in (None, theirs)]
    rows = []
    for task, ours in scores[0].items():
        for metric, value in ours.items():
            if metric != "n":
                other = scores[1][task][metric]
                rows.append({"task": task, "metric": metric, "items": ours["n"]})
                rows[-1] |= {"ours": value, "transformers": other}
                print(f"{task:16} {metric:16} {value:.4f}, transformers {other:.4f}", flush=True)
    return {"logits_std": logits.std().item(), "logits_largest_difference": apart, "tasks": rows}
