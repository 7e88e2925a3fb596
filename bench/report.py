"""The tables of docs/results.md, made from the files in results/.

    python -m bench.report            # rewrites the tables
    python -m bench.report --check    # exit status 1 where a table differs from its files

A table stands between two comment lines and is never edited by hand; the prose around it is:

    <!-- table NAME -->
    <!-- end -->

Standard deviations are those of the sample. Numbers that no benchmark writes are in
results/measured.json, each with the command that made it.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

from bench import position
from bench.ablation import ABLATION
from bench.continual import again
from bench.tables import markdown, published
from support.checkpoint import atomic_write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
PAGE = ROOT / "docs" / "results.md"
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
SEARCH_SEED = 100  # of runs that choose settings and are not reported
LONG = 1_001_472  # tokens of a run of `quality`


def load(name: str):
    """A file of results/: a JSON value, or the list of the lines of a .jsonl."""
    text = (RESULTS / name).read_text()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def spread(values: list[float], digits: int = 3) -> str:
    """The mean; of several values also the standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def of_seeds(records: list[dict], *keys: str) -> list[float]:
    """record[key1][key2]... of every record."""
    values = []
    for record in records:
        for key in keys:
            record = record[key]
        values.append(record)
    return values


# --------------------------------------------------------------------------------------------------
# Quality


def quality_runs(name: str) -> dict[str, dict]:
    """spec -> {"long": {seed: cell}, "timed": cell or None} of a quality*.jsonl."""
    runs = {}
    for cell in load(name):
        if cell["seed"] == SEARCH_SEED:
            continue
        own = runs.setdefault(cell["spec"], {"long": {}, "timed": None})
        if cell["tokens"] == LONG:
            own["long"][cell["seed"]] = cell
        else:
            own["timed"] = cell
    return runs


def bits(cells: dict[int, dict]) -> list[float]:
    return [cell["bits_per_byte"] for cell in cells.values()]


def quality() -> str:
    """A row a model, best on Python first."""
    python = quality_runs("quality.jsonl")
    novels = quality_runs("quality_novels.jsonl")
    head = ["model", "parameters", "state, numbers a row", "Python: rate", "seed 0", "mean (seeds)"]
    head += ["2 minutes: tokens", "seed 0", "novels: rate", "seed 0", "mean (seeds)"]
    rows = []
    for spec in sorted(python, key=lambda spec: python[spec]["long"][0]["bits_per_byte"]):
        first = python[spec]["long"][0]
        row = [f"`{spec}`", f"{first['parameters']:,}", f"{first['state_numbers']:,}"]
        row += quality_columns(python[spec]["long"])
        timed = python[spec]["timed"]
        row += [f"{timed['tokens']:,}", f"{timed['bits_per_byte']:.3f}"] if timed else ["", ""]
        row += quality_columns(novels[spec]["long"]) if spec in novels else ["", "", ""]
        rows.append(row)
    return markdown(head, rows)


def quality_2048() -> str:
    """Novels in rows of 2,048 tokens: a row a model, the best first."""
    runs = quality_runs("quality_novels_2048.jsonl")
    rows = []
    for spec in sorted(runs, key=lambda spec: bits(runs[spec]["long"])):
        rate, first, _ = quality_columns(runs[spec]["long"])
        rows.append([f"`{spec}`", f"{runs[spec]['long'][0]['parameters']:,}", rate, first])
    return markdown(["model", "parameters", "rate", "seed 0"], rows)


def quality_columns(cells: dict[int, dict]) -> list[str]:
    several = f"{spread(bits(cells))} ({len(cells)})" if len(cells) > 1 else ""
    return [f"{cells[0]['lr']:g}", f"{cells[0]['bits_per_byte']:.3f}", several]


def ablation() -> str:
    """A row a part of Hope after 1M tokens, the paper's mean perplexity beside it."""
    paper = {row["model"]: row["values"][0] for row in published("table6")["rows"]}
    runs = quality_runs("ablation.jsonl")
    base = runs["hope"]["long"]
    rows = []
    for fields, (what, row) in ABLATION.items():
        spec = f"hope:{fields}" if fields else "hope"
        cells = runs.get(spec, {"long": {}})["long"]
        if not cells:  # not measured
            continue
        above = [cells[s]["bits_per_byte"] - base[s]["bits_per_byte"] for s in cells]
        more = f"{statistics.mean(above):+.3f}" if fields else ""
        numbers = [str(len(cells)), spread(bits(cells)), more]
        rows.append([what, f"`{spec}`", *numbers, paper.get(row, "")])
    head = ["Hope", "model", "seeds", "bits per byte", "difference, same seeds"]
    return markdown([*head, "published, 1.3B: mean perplexity"], rows)


def ablation_off() -> str:
    """The same after 0.5M tokens, updates off, one seed."""
    found = {row["model"]: row for row in load("ablation.json")["equal_tokens"]}
    rows = []
    for fields, (what, _) in ABLATION.items():
        spec = f"hope:{fields}" if fields else "hope"
        if spec in found:  # this file is older than the others
            numbers = [f"{found[spec]['mean']:.3f}", f"{found[spec]['difference']:+.3f}"]
            rows.append([what, f"`{spec}`", *numbers])
    return markdown(["Hope", "model", "bits per byte", "difference"], rows)


def levels() -> str:
    """A row a choice of levels, the best first."""
    cells = sorted(load("levels.jsonl"), key=lambda cell: cell["bits_per_byte"])
    rows = []
    for cell in cells:
        model = json.loads(cell["key"])["model"]
        shown = f"{model['levels']}".replace("None", "null")
        numbers = [f"{cell['parameters']:,}", f"{cell['state_numbers']:,}"]
        rows.append([shown, model["cms_blocks"], *numbers, f"{cell['bits_per_byte']:.3f}"])
    head = ["levels", "blocks that have them", "parameters", "state, numbers a row"]
    return markdown([*head, "bits per byte"], rows)


# --------------------------------------------------------------------------------------------------
# Speed, optimizers, kernels


def speed() -> str:
    head = ["model", "4 x 1024: tokens/s ratio", "peak memory ratio"]
    head += ["1 x 4096: tokens/s ratio", "peak memory ratio"]
    short = load("speed_1024.json")["rows"]
    long = load("speed_4096.json")["rows"]
    rows = []
    for a, b in zip(short, long, strict=True):
        ratios = [a["ratio"], a["memory_ratio"], b["ratio"], b["memory_ratio"]]
        rows.append([f"`{a['model']}`", *(f"{ratio:.2f}" for ratio in ratios)])
    return markdown(head, rows)


def speed_lengths(file="speed_lengths.json") -> str:
    """Fastest on the longest rows first."""
    cells = {}
    for row in load(file)["rows"]:
        cells.setdefault(row["model"], {})[row["seq_len"]] = row
    lengths = list(cells["transformer"])
    order = sorted(cells, key=lambda model: -cells[model][lengths[-1]]["tokens_per_s"])
    rows = []
    for model in order:
        own = cells[model].values()
        row = [f"{cell['tokens_per_s']:,.0f}" for cell in own]
        row += [f"{cell['memory_mib']:,.0f}" for cell in own]
        rows.append([f"`{model}`", *row])
    head = ["model", *(f"{length:,}" for length in lengths), *(f"MiB, {n:,}" for n in lengths)]
    return markdown(head, rows)


def optimizers() -> str:
    names = {
        "adamw": "AdamW",
        "muon": "Muon",
        "m3": "M3",
        "delta_momentum": "delta momentum",
        "dmgd": "DMGD",
    }
    result = load("optimizers.json")
    rows = []
    for name, title in names.items():
        row = [title]
        for model in ("hope", "transformer"):
            found = {own["model"]: own for own in result[model]["equal_tokens"]}
            seconds = result[model]["step_seconds"]
            pairs = zip(seconds[name], seconds["muon"], strict=True)
            ratio = statistics.median(own / base for own, base in pairs)
            own = found[f"{model}@{name}"]
            row += [f"{own['lr']:g}", f"{own['mean']:.3f}", f"{ratio:.2f}"]
        rows.append(row)
    head = ["optimizer"]
    for model in ("hope", "transformer"):
        head += [f"`{model}`: rate", "bits per byte", "step time / Muon's"]
    return markdown(head, rows)


def digits() -> str:
    names = {"adamw": "AdamW", "muon": "Muon", "m3": "M3"}
    rows = []
    for row in load("digits.json")["rows"]:
        loss = f"{row['test_loss']:.3f} ± {row['test_loss_std']:.3f}"
        accuracy = f"{row['test_accuracy']:.3f}"
        rows.append([names[row["optimizer"]], f"{row['lr']:g}", loss, accuracy])
    return markdown(["optimizer", "rate", "test loss", "test accuracy"], rows)


def training_steps() -> str:
    columns = {
        "tokens_per_s": ("tokens/s", ",.0f"),
        "ratio": ("Transformer's x", ".2f"),
        "mfu": ("of the peak", ".1%"),
        "gb": ("GB", ".0f"),
        "launches": ("launches", ","),
    }
    rows = []
    for row in load("kernels_340m.json")["training"]:
        cells = [f"`{row['model']}`", f"{row['rows']} x {row['T']:,}"]
        for key, (_, form) in columns.items():
            value = row.get(key)  # what failed has none
            cells.append("-" if value is None else format(value, form))
        rows.append(cells)
    return markdown(["model", "rows x tokens", *(title for title, _ in columns.values())], rows)


def kernels() -> str:
    """Registers a thread, bytes of its spill stack, KiB of shared memory of a program."""
    cells = {}
    for row in load("kernels_compiled.jsonl"):
        cells.setdefault(row["kernel"], {})[row["target"]] = row
    rows = []
    for kernel, targets in cells.items():
        row = [kernel, max(cell["warps"] for cell in targets.values())]
        for cell in targets.values():
            shared = cell["shared"] / 2**10
            row.append(f"{cell['registers']} / {cell['stack']:,} / {shared:.3g}")
        rows.append(row)
    return markdown(["kernel", "warps", *(f"sm_{target}" for target in targets)], rows)


# --------------------------------------------------------------------------------------------------
# Small tasks


def formal() -> str:
    """Means of three seeds, in brackets the worst where it differs; bin 0 / bin 1."""
    rows = []
    ours = load("tasks_formal_quick.json")["rows"]
    languages = list(ours[0]["mean"])
    counters = load("tasks_formal_counters.json")["rows"]
    for row in ours + counters + load("tasks_formal_parity.json")["rows"]:
        line = [f"`{row['model']}`", f"{row['parameters'] / 1000:.1f}K"]
        for language in languages:
            bins = []
            means = row["mean"].get(language, ())
            worsts = row["worst"].get(language, ())
            for mean, worst in zip(means, worsts, strict=True):
                same = round(mean, 1) == round(worst, 1)
                bins.append(f"{mean:.1f}" if same else f"{mean:.1f} ({worst:.1f})")
            line.append(" / ".join(bins))
        rows.append(line)
    for row in published("table5")["rows"]:
        if row["model"] == "Hope":
            values = [" / ".join(map(str, pair)) for pair in row["values"][-len(languages) :]]
            rows.append(["Hope, published", "", *values])
    return markdown(["model", "parameters", *languages], rows)


def mad() -> str:
    ours = load("tasks_mad_quick.json")["rows"]
    tasks = list(ours[0]["mean"])
    rows = []
    for row in ours:
        values = [f"{row['mean'][task][0]:.1f}" for task in tasks]
        rows.append([f"`{row['model']}`", f"{row['parameters'] / 1000:.0f}K", *values])
    (paper,) = [row for row in published("table4")["rows"] if row["model"] == "Hope"]
    values = list(paper["values"])
    values.insert(tasks.index("noisy recall"), "")  # which the paper leaves out
    rows.append(["Hope, published", "", *values])
    return markdown(["model", "parameters", *tasks], rows)


# --------------------------------------------------------------------------------------------------
# Continual learning


def by_learner(name: str) -> dict[str, list[dict]]:
    """The records of a continual_*.jsonl that are reported."""
    found = {}
    for record in load(name):
        if record["seed"] != SEARCH_SEED:
            found.setdefault(record["learner"], []).append(record)
    return found


def stream() -> str:
    head = ["levels", "second half: without", "with updates", "held by", "gain right after"]
    head += ["after another novel", "after code", "read again: after another novel", "after code"]
    rows = []
    for learner, own in by_learner("continual_stream.jsonl").items():
        first = own[0]
        nested = " nested" * (first["variant"] == "nested")
        line = [f"{first['levels']}{nested}"]
        for which in ("without", "with"):
            line.append(spread(of_seeds(own, "second half", which)))
        for level in holders(learner, first):
            line += ["all" if level == "all" else f"{level} alone"]
            line.append(spread(of_seeds(own, "gain", "novel", level)))
            for text in ("another novel", "code"):
                alone = statistics.mean(of_seeds(own, "gain of the other alone", text, level))
                line.append(f"{spread(of_seeds(own, 'gain', text, level))} ({alone:.3f})")
            if line[0]:
                line += [again(own, text) for text in ("another novel", "code")]
            rows.append(line + [""] * (len(head) - len(line)))
            line = ["", "", ""]
    return markdown(head, rows)


def pretrained() -> str:
    """Nats a token of every text, and by how much each quarter is better with steps."""
    head = ["text", "step", "nats a token", "better by", "first quarter", "second", "third", "last"]
    rows = []
    off = None
    for name in ("pretrained_steps.json", "pretrained.json"):
        for row in load(name)["texts"]:
            line = [row["text"], f"{row['step']:g}", f"{row['nats']:.4f}"]
            if row["step"]:
                line.append(f"{off['nats'] - row['nats']:.4f}")
                for without, own in zip(off["quarters"], row["quarters"], strict=True):
                    line.append(f"{without - own:.4f}")
            else:
                off = row
            rows.append([*line, *[""] * (len(head) - len(line))])
    return markdown(head, rows)


def pretrained_tasks() -> str:
    head = ["task", "metric", "items", "ours", "lm-eval's own, on transformers"]
    rows = []
    for row in load("pretrained.json")["tasks"]:
        scores = [f"{row[who]:.4f}" for who in ("ours", "transformers")]
        rows.append([row["task"], row["metric"], row["items"], *scores])
    return markdown(head, rows)


def holders(learner: str, record: dict) -> list[str]:
    """"all" and, where several levels hold something at the end, each of them."""
    gains = record["gain"]["novel"]
    several = record["variant"] == "sequential" and len(record["levels"]) > 1
    return [level for level in gains if gains[level]] if several else ["all"]


LEARNERS = {
    "transformer finetune": "Transformer, fine-tuned",
    "transformer ewc": "Transformer, EWC",
    "hope 1 level": "1 level",
    "hope 2 levels": "2 levels",
    "hope 3 levels": "3 levels",
    "hope 4 levels": "4 levels",
}


def staged(name: str, hope: str, columns: dict[str, str], costs: dict[str, tuple]) -> str:
    """A row a learner. columns: key -> title; costs: title -> (key, unit, digits)."""
    found = by_learner(name)
    rows = []
    for learner, title in LEARNERS.items():
        own = found[learner]
        strength = f" ({own[0]['ewc']:g})" if own[0]["ewc"] else ""
        row = [title if "Transformer" in title else f"{hope}, {title}"]
        row += [f"{own[0]['lr']:g}{strength}"]
        row += [spread(of_seeds(own, key)) for key in columns]
        for key, unit, digits in costs.values():
            row.append(f"{statistics.mean(of_seeds(own, key)) / unit:.{digits}f}")
        rows.append(row)
    return markdown(["learner", "rate (EWC)", *columns.values(), *costs], rows)


def domains() -> str:
    columns = {"average": "mean of the four at the end", "last": "last domain"}
    columns |= {"first forgotten": "first domain forgotten", "forgetting": "forgetting"}
    costs = {"M parameter updates": ("updates", 1e6, 1), "TFLOP": ("flops", 1e12, 2)}
    costs |= {"s": ("seconds", 1, 0)}
    return staged("continual_domains.jsonl", "Hope", columns, costs)


def classes() -> str:
    columns = {"average": "average accuracy at the end", "last": "last domain"}
    columns |= {"forgetting": "forgetting"}
    costs = {"M parameter updates": ("updates", 1e6, 0), "s": ("seconds", 1, 0)}
    return staged("continual_classes_clinc150.jsonl", "Hope-Attention", columns, costs)


# --------------------------------------------------------------------------------------------------
# What results/measured.json holds


def measured() -> str:
    """A row a measurement: what, its values, the command."""
    rows = []
    for own in load("measured.json").values():
        if "table" not in own:
            rows.append([own["what"], own["value"], f"`{own['command']}`"])
    return markdown(["what", "measured", "command"], rows)


def measured_table(name: str):
    """A function that makes a table of measured.json."""

    def make() -> str:
        own = load("measured.json")[name]["table"]
        return markdown(own["head"], own["rows"])

    return make


TABLES = {
    "quality": quality,
    "quality_2048": quality_2048,
    "ablation": ablation,
    "ablation_off": ablation_off,
    "levels": levels,
    "position": lambda: position.table(load("position.json")),
    "speed": speed,
    "speed_lengths": speed_lengths,
    "speed_updates": lambda: speed_lengths("speed_updates.json"),
    "optimizers": optimizers,
    "digits": digits,
    "training_steps": training_steps,
    "kernels": kernels,
    "formal": formal,
    "mad": mad,
    "stream": stream,
    "pretrained": pretrained,
    "pretrained_tasks": pretrained_tasks,
    "domains": domains,
    "classes": classes,
    "measured": measured,
    "figure4": measured_table("figure4"),
    "guessing": measured_table("guessing"),
    "in_context": measured_table("in_context"),
    "in_context_today": measured_table("in_context_today"),
    "bytes_a_token": measured_table("bytes_a_token"),
}


def render(text: str) -> str:
    """The page with every table made anew. ValueError for a name that is not in TABLES."""

    def fill(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"table must be one of {', '.join(TABLES)}, got {match[2]!r}")
        return match[1] + TABLES[match[2]]() + "\n" + match[3]

    return MARKED.sub(fill, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, change nothing")
    args = parser.parse_args(argv)
    text = PAGE.read_text()
    new = render(text)
    if args.check:
        print(f"{PAGE.name}: {'as the files say' if text == new else 'differs from its files'}")
        return int(text != new)
    atomic_write(PAGE, lambda beside: beside.write_text(new))
    print(f"{len(MARKED.findall(new))} tables in {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
