"""Quality of Hope with one part taken away or changed at a time, beside NL table 6.

    python -m bench ablation            # 1.5 hours of a core, half of it the MLP memories
    python -m bench ablation --lrs 3e-3 --tokens 5e5          # no search
    python -m bench ablation --published --out results/ablation_published.json

The paper prints perplexities of models of 1.3B parameters. Hope of this repository has no momentum
and static queries by default, so there the paper's "without" is ours "with"; --published takes the
parts away from the model that has them all. Everything else is as in `python -m bench quality`.
"""

import json

from bench.cells import parse_spec, workers
from bench.quality import compare, training_flags
from bench.tables import markdown, published
from hope import PUBLISHED

ABLATION = {  # fields of hope: what it is, its row of NL table 6
    "": ("Hope", "Hope"),
    "dgd=false": (
        "plain gradient instead of DGD (delta 0)",
        "w/o DGD (plain GD inside self-modifying Titans)",
    ),
    "momentum=true": ("with momentum (published: Hope without)", "w/o momentum"),
    "retention=false": ("without retention", "w/o weight decay"),
    "cms_updates=off": ("without CMS: no step in context", "w/o CMS"),
    'adaptive=["v"]': ("static k", "w/o inner projection k"),
    'adaptive=["k"]': ("static v", "w/o inner projection v"),
    'adaptive=["k","v","q"]': (
        "learned q (published: Hope with static q)",
        "w/o inner projection q",
    ),
    "mode=boundary": ("reads of the boundary weights", None),
    "conv=0": ("without convolution", None),
    "gate=false": ("without output gate", None),
    "memory=mlp": ("MLP memories", None),
    "inner_step=0": ("memories that never learn", None),
}


FROM_PUBLISHED = {  # the same for hope with PUBLISHED
    "": ("Hope as published", "Hope"),
    "dgd=false": ABLATION["dgd=false"],
    "momentum=false": ("without momentum", "w/o momentum"),
    "retention=false": ABLATION["retention=false"],
    "cms_updates=off": ABLATION["cms_updates=off"],
    'adaptive=["v","q"]': ABLATION['adaptive=["v"]'],
    'adaptive=["k","q"]': ABLATION['adaptive=["k"]'],
    'adaptive=["k","v"]': ("static q", "w/o inner projection q"),
    "memory=matrix": ("matrix memories", None),
}


def add_flags(parser) -> None:
    parser.add_argument("--model", default="hope", help="Hope, with fields that all have")
    parser.add_argument("--published", action="store_true", help="begin at Hope as published")
    training_flags(parser, "results/ablation.json", tokens=1_000_000, seeds="0")


def ablation(args) -> dict:
    """`compare` of Hope and what is left of it, and a table beside the paper's."""
    if parse_spec(args.model)[0] != "hope":
        raise ValueError(f"model must be hope, with fields, got {args.model!r}")
    parts = ABLATION
    base = args.model
    if args.published:
        parts = FROM_PUBLISHED
        for name, value in PUBLISHED.items():
            base += f":{name}={json.dumps(value, separators=(',', ':'))}"
    specs = {}
    for fields, names in parts.items():  # what comes later in a spec wins
        specs[f"{base}:{fields}" if fields else base] = names
    args.models = ",".join(specs)
    with workers(args.jobs) as pool:
        result = compare(args, pool)
    paper = {row["model"]: row["values"][0] for row in published("table6")["rows"]}
    found = {row["model"]: row for row in result["equal_tokens"]}
    lines = []
    for spec, (what, row) in specs.items():
        mean = found[spec]["mean"]
        difference = found[spec]["difference"]
        bits = "-" if mean is None else f"{mean:.3f}"
        more = "-" if difference is None else f"{difference:+.3f}"
        lines.append([what, f"`{spec}`", bits, more, paper.get(row, "-")])
    head = ["Hope", "model", "bits per byte", "difference", "published, 1.3B: mean perplexity"]
    print("\n" + markdown(head, lines))
    return result
