"""What models learn from the same data."""

import math
import statistics
from pathlib import Path

from bench.cells import (
    SEARCH_SEED,
    cell_key,
    cell_model,
    cores,
    load_corpus,
    numbers,
    parameters,
    parse_spec,
    read_cells,
    run_cells,
    spec_config,
    split_specs,
    train_cell,
    where,
    workers,
)
from bench.tables import markdown, published
from support.config import TrainConfig
from support.corpus import batch
from support.run import device_for


def quality_cells(wanted: list[tuple[str, TrainConfig]], path: Path, corpus: dict, pool) -> list[dict]:
    """Results of (spec, settings), in order."""
    def facts(cell):
        spec, config = cell
        return {"spec": spec, "lr": config.lr, "seed": config.seed, "threads": config.threads,
                "tokens": config.steps * config.tokens_per_step, "parameters": parameters(cell_model(config))}  # fmt: skip

    def told(cell):
        return (f"{cell['spec']}  lr {cell['lr']:g}  seed {cell['seed']}  {cell['tokens']:,} tokens: "
                f"{bits(cell)} bits per byte, {cell['train_seconds']:.0f} s")  # fmt: skip

    keys = [cell_key(config, corpus) for _, config in wanted]
    done = run_cells(dict(zip(keys, wanted, strict=True)), train_cell, facts, told, path, read_cells(path), pool)
    return [{**done[key], "spec": spec} for key, (spec, _) in zip(keys, wanted, strict=True)]


def bits(cell: dict) -> str:
    return f"{cell['bits_per_byte']:.4f}" if cell["bits_per_byte"] is not None else f"none ({cell['error']})"


def summary(title: str, cells: list[dict]) -> list[dict]:
    """Prints one row a model, best mean first; differences to hope are of runs on the same batches (same seed)."""
    runs = {}
    for cell in cells:
        runs.setdefault(cell["spec"], {})[cell["seed"]] = cell
    base = "hope" if "hope" in runs else next(iter(runs))

    def spread(values):  # mean, and standard deviation over seeds where there are several
        if any(v is None for v in values):
            return None, None
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None

    rows = []
    for spec, seeds in runs.items():
        own = {seed: cell["bits_per_byte"] for seed, cell in seeds.items()}
        pairs = [(value, runs[base][seed]["bits_per_byte"]) for seed, value in own.items()]
        mean, std = spread(list(own.values()))
        above, above_std = spread([None if None in pair else pair[0] - pair[1] for pair in pairs])
        first = next(iter(seeds.values()))
        speeds = [cell["tokens_per_s"] for cell in seeds.values() if cell["tokens_per_s"]]
        rows.append({"model": spec, "parameters": first["parameters"], "lr": first["lr"], "tokens": first["tokens"],
                     "tokens_per_s": statistics.median(speeds) if speeds else None, "mean": mean, "std": std,
                     "minutes": statistics.median(cell["train_seconds"] for cell in seeds.values()) / 60,
                     "difference": above, "difference_std": above_std, "seeds": own})  # fmt: skip
    rows.sort(key=lambda row: math.inf if row["mean"] is None else row["mean"])

    def shown(mean, std, sign=""):
        return "-" if mean is None else f"{mean:{sign}.4f}" + ("" if std is None else f" ± {std:.4f}")

    width = max(len(spec) for spec in runs) + 2
    print(f"\n{title}: bits per byte of held-out text, mean ± std of seeds; difference to {base}\n")
    print(f"{'model':<{width}}{'bits per byte':>17}{'difference':>19}{'parameters':>12}{'lr':>9}{'tokens':>12}"
          f"{'tokens/s':>10}{'minutes':>9}  each seed")  # fmt: skip
    for r in rows:
        each = ", ".join(f"{seed}: " + ("none" if v is None else f"{v:.4f}") for seed, v in r["seeds"].items())
        difference = shown(r["difference"], r["difference_std"], "+")
        print(f"{r['model']:<{width}}{shown(r['mean'], r['std']):>17}{difference:>19}{r['parameters']:>12,}"
              f"{r['lr']:>9g}{r['tokens']:>12,}"
              f"{r['tokens_per_s'] or 0:>10,.0f}{r['minutes']:>9.2f}  {each}")  # fmt: skip
    return rows


def quality(args) -> dict:
    with workers(args.jobs) as pool:
        return compare(args, pool)


def compare(args, pool) -> dict:
    """Learning rates, runs at equal tokens, runs at equal time (with --minutes); prints the tables and returns all."""
    specs, seeds, lrs = split_specs(args.models), numbers(args.seeds, int), numbers(args.lrs, float)
    if SEARCH_SEED in seeds:
        raise ValueError(f"seeds has {SEARCH_SEED}, which chooses the learning rates: legal are others")
    device = str(device_for(args.device))
    threads = args.threads or max(1, cores() // args.jobs)

    def cell(spec, lr, seed, tokens):
        model, _, optimizer = spec.partition("@")
        name, fields = parse_spec(model)
        return spec, TrainConfig(
            model=name, preset=args.preset, set=fields, data=args.data, optimizer=optimizer or "adamw", tokens=tokens,
            batch_size=args.batch, seq_len=args.seq_len, lr=lr, seed=seed, eval_every=0, eval_tokens=args.eval_tokens,
            device=device, threads=threads,
        )  # fmt: skip

    # Everything that can be wrong is found here, before anything is written.
    search = [cell(spec, lr, SEARCH_SEED, args.lr_tokens) for lr in lrs for spec in specs if len(lrs) > 1]
    [cell(spec, lrs[0], seed, args.tokens) for seed in seeds for spec in specs]
    corpus = load_corpus(args.data)
    n_vocab = corpus.encoding.n_vocab
    models = {spec: spec_config(spec.partition("@")[0], args.preset, vocab_size=n_vocab) for spec in specs}
    sizes = {spec: parameters(config) for spec, config in models.items()}
    batch(corpus.train, 1, args.seq_len, 0, 0)
    if max(sizes.values()) > 1.02 * min(sizes.values()):
        print(f"note: parameters differ by more than 2%: {', '.join(f'{s} {n:,}' for s, n in sizes.items())}")

    path, fingerprint = Path(args.out).with_suffix(".jsonl"), corpus.fingerprint()
    print(f"{len(search)} learning-rate runs, {len(specs) * len(seeds) * (2 if args.minutes else 1)} others, in "
          f"{args.jobs} processes on {where(device, threads)}", flush=True)  # fmt: skip
    searched = quality_cells(search, path, fingerprint, pool)
    best = dict.fromkeys(specs, lrs[0])
    for spec in specs if search else ():
        own = [c for c in searched if c["spec"] == spec and c["bits_per_byte"] is not None]
        if not own:
            raise ValueError(f"model {spec!r} diverged at every learning rate of {args.lrs}: add smaller ones to --lrs")
        best[spec] = min(own, key=lambda c: c["bits_per_byte"])["lr"]
    # Seed by seed, so that a benchmark stopped half way has compared all models.
    at_tokens = [cell(spec, best[spec], seed, args.tokens) for seed in seeds for spec in specs]
    cells = quality_cells(at_tokens, path, fingerprint, pool)
    result = {"best_lr": best, "equal_tokens": summary("after equal tokens", cells)}
    if args.minutes:
        tokens = {}
        for spec in specs:
            rate = statistics.median(c["tokens_per_s"] for c in searched or cells if c["spec"] == spec and c["tokens_per_s"])
            steps = max(1, round(rate * 60 * args.minutes / (args.batch * args.seq_len)))
            tokens[spec] = steps * args.batch * args.seq_len
        at_time = [cell(spec, best[spec], seed, tokens[spec]) for seed in seeds for spec in specs]
        timed = quality_cells(at_time, path, fingerprint, pool)
        cells = cells + timed
        result["equal_time"] = summary(f"after equal time ({args.minutes:g} minutes)", timed)
    edges = [f"{spec} {lr:g}" for spec, lr in best.items() if len(lrs) > 1 and lr in (min(lrs), max(lrs))]
    if edges:
        print(f"\nnote: the best learning rate is at the edge of the grid for {', '.join(edges)}")
    versions = {c["code"] for c in searched + cells}
    if len(versions) > 1:
        print(f"\nnote: cells of {len(versions)} versions of the code; a fresh --out trains all again")
    return result | {"cells": [{k: v for k, v in c.items() if k != "key"} for c in searched + cells]}


ABLATION = {  # fields of hope: what it is, the row of NL table 6
    "": ("Hope", "Hope"),
    "dgd=false": ("plain gradient instead of DGD (delta 0)", "w/o DGD (plain GD inside self-modifying Titans)"),
    "momentum=true": ("with momentum (published: Hope without)", "w/o momentum"),
    "retention=false": ("without retention", "w/o weight decay"),
    "levels=[null]": ("without CMS: one level", "w/o CMS"),
    'adaptive=["v"]': ("static k", "w/o inner projection k"),
    'adaptive=["k"]': ("static v", "w/o inner projection v"),
    'adaptive=["k","v","q"]': ("learned q (published: Hope with static q)", "w/o inner projection q"),
    "mode=boundary": ("reads of the boundary weights", None),
    "conv=0": ("without convolution", None),
    "gate=false": ("without output gate", None),
    "memory=mlp": ("MLP memories", None),
    "inner_step=0": ("memories that never learn", None),
}


def ablation(args) -> dict:
    """`compare` of Hope and what is left of it, and a table beside the paper's; returns all."""
    if parse_spec(args.model)[0] != "hope":
        raise ValueError(f"model is {args.model!r}: legal is hope, with fields")
    specs = {":".join(filter(None, (args.model, fields))): names for fields, names in ABLATION.items()}
    args.models = ",".join(specs)
    with workers(args.jobs) as pool:
        result = compare(args, pool)
    paper = {row["model"]: row["values"][0] for row in published("table6")["rows"]}
    found, lines = {row["model"]: row for row in result["equal_tokens"]}, []
    for spec, (what, row) in specs.items():
        own = found[spec]
        values = (f"{x:{sign}.3f}" if x is not None else "-" for x, sign in ((own["mean"], ""), (own["difference"], "+")))
        lines.append([what, f"`{spec}`", *values, paper.get(row, "-")])
    print("\n" + markdown(["Hope", "model", "bits per byte", "difference", "published, 1.3B: mean perplexity"], lines))
    return result


load_corpus = cache(load_corpus)  # a worker trains many cells on one corpus


def train_cell(cell: tuple[str, TrainConfig]) -> dict:
    """Train and validate one model. A loss that is not finite is a result too: bits_per_byte None, and the error."""
    _, config = cell
    torch.set_num_threads(config.threads)
    corpus, device = load_corpus(config.data), device_for(config.device)
    encoding = corpus.encoding
    torch.manual_seed(config.seed)
    model = Hope(cell_model(config)).to(device).train()
    optimizer = optimizer_for(model, config)
    seconds, result = [], {"bits_per_byte": None}
    try:
        for step in range(config.steps):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.steps, config)
            rows = batch(corpus.train, config.batch_size, config.seq_len, config.seed, step)
            inputs, targets = (part.to(device) for part in rows)
            with precision(device):
                logits, _ = model(inputs)
            loss = loss_fn(logits, targets)
            loss.backward()
            norm = gradient_norm(model, step + 1, loss.item())
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - began)
        held_out = corpus.val[: config.eval_tokens]
        nats, _ = validate(model, held_out, config.batch_size, config.seq_len, device, start=encoding.eot_token)
        result["bits_per_byte"] = nats / math.log(2) / n_bytes(held_out, encoding)
    except NonFinite as error:
        result["error"] = str(error).split(";")[0]
    speed = config.tokens_per_step / statistics.median(seconds) if seconds else None
    return result | {"train_seconds": sum(seconds), "tokens_per_s": speed, "code": code_version()}


def cell_model(config: TrainConfig) -> HopeConfig:
    own = {"vocab_size": load_corpus(config.data).encoding.n_vocab}
    return HopeConfig.preset(config.preset, model=config.model, **(own | config.set))


def cell_key(config: TrainConfig, corpus: dict, model: HopeConfig | None = None) -> str:
    """All settings of a cell, defaults of the model included, and its data by name and checksum, wherever it lies."""
    train, model = asdict(config) | {"data": corpus["name"]}, model or cell_model(config)
    return json.dumps({"train": train, "model": model.to_dict(), "corpus": corpus}, sort_keys=True)


def current_key(key: str) -> str:
    """A finished cell's key with the defaults of settings that came later: a new field's default changes no model."""
    old = json.loads(key)
    return cell_key(TrainConfig(**old["train"]), old["corpus"], HopeConfig(**old["model"]))
