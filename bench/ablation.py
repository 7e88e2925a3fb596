"""Quality of Hope with one part taken away or changed at a time, beside NL table 6.

    python -m bench ablation            # 1.5 hours of a core, half of it the MLP memories
    python -m bench ablation --lrs 3e-3 --tokens 5e5          # no search

The paper prints perplexities of models of 1.3B parameters. Hope of this repository has no momentum
and static queries by default, so there the paper's "without" is ours "with". Everything else is as
in `python -m bench quality`.
"""

from bench.cells import parse_spec, workers
from bench.quality import compare, training_flags
from bench.tables import markdown, published

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


def add_flags(parser) -> None:
    parser.add_argument("--model", default="hope", help="Hope, with fields that all have")
    training_flags(parser, "results/ablation.json", tokens=1_000_000, seeds="0")


def ablation(args) -> dict:
    """`compare` of Hope and what is left of it, and a table beside the paper's."""
    if parse_spec(args.model)[0] != "hope":
        raise ValueError(f"model must be hope, with fields, got {args.model!r}")
    specs = {}
    for fields, names in ABLATION.items():
        specs[f"{args.model}:{fields}" if fields else args.model] = names
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
