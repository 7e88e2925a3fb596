"""Worked examples: what `python memory.py`, `titans.py`, `cms.py`, `learn.py` ... `hope.py` show.

Each file runs this module under its own name; the functions below have the files' names.
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from support.flags import Help, Parser


def memory():
    """Pairs written into a matrix, some keys again with new values; what each rule then reads."""
    from memory import l2norm, scan

    torch.manual_seed(0)
    d = 32
    n = 8
    again = 4
    k = l2norm(torch.randn(n, d))
    v = torch.randn(n + again, d)
    k = torch.cat([k, k[:again]])
    one = torch.ones(n + again)
    zero = torch.zeros(d, d)
    print(f"{n} random pairs written into a {d} x {d} memory, then {again} of the keys once more")
    print("with new values; relative error when read back:\n")
    print(f"{'':34}{'rewritten keys':>16}{'other keys':>12}")
    rules = {
        "Hebbian        (delta 0)": scan(zero, k, v, one, one, delta=0.0),
        "  with retention 0.9 ": scan(zero, k, v, one, 0.9 * one, delta=0.0),
        "delta rule     (delta 1)": scan(zero, k, v, one, one),
        "  with retention 0.9": scan(zero, k, v, one, 0.9 * one),
        "  with momentum 0.3, step 0.7": scan(zero, k, v, 0.7 * one, one, theta=0.3 * one),
    }
    for name, (_, W, _) in rules.items():
        error = (k[again:] @ W.mT - v[again:]).norm(dim=-1) / v[again:].norm(dim=-1)
        print(f"{name:34}{error[-again:].mean():16.3f}{error[:-again].mean():12.3f}")


def titans(pairs=6, symbols=16, steps=300, batch=64, d_model=64):
    """Rows k1 v1 k2 v2 ... kn vn k_i: which v followed k_i? New pairs in every row."""
    from titans import SelfModifyingTitans

    print(f"one layer: {pairs} new pairs a row, asked for one; chance is {1 / symbols:.0%}\n")
    print(f"{'training step':>24}{'memories learn':>18}{'memories frozen':>18}")
    models = []
    for inner_step in (1.0, 0.0):
        torch.manual_seed(0)
        embed = nn.Embedding(2 * symbols, d_model)
        score = nn.Linear(d_model, symbols)
        mixer = SelfModifyingTitans(d_model, 1, chunk=8, inner_step=inner_step)
        layers = nn.ModuleList([embed, score, mixer])
        models.append((layers, torch.optim.AdamW(layers.parameters(), lr=3e-3), []))
    for step in range(1, steps + 1):
        keys = torch.rand(batch, symbols).argsort(-1)[:, :pairs]
        values = torch.randint(symbols, (batch, pairs))
        asked = torch.randint(pairs, (batch, 1))
        shown = torch.stack([keys, values + symbols], -1).flatten(1)  # [batch, 2 pairs]
        tokens = torch.cat([shown, keys.gather(1, asked)], 1)
        answers = values.gather(1, asked).squeeze(1)
        for (embed, score, mixer), optimizer, hits in models:
            logits = score(mixer(embed(tokens))[0][:, -1])
            optimizer.zero_grad()
            F.cross_entropy(logits, answers).backward()
            optimizer.step()
            hits.append((logits.argmax(-1) == answers).float().mean().item())
        if step % (steps // 6) == 0:
            means = [sum(hits[-20:]) / 20 for _, _, hits in models]
            print(f"{step:>24}" + "".join(f"{mean:>18.0%}" for mean in means))


def cms():
    """The calendar of each variant, and what an update costs."""
    from cms import CMS, VARIANTS, Level

    levels = [Level(2, 64), Level(4, 128), Level(12, 256), Level(None, 512)]
    print("Updates (u) and updates followed by a return to the start (R), tick by tick\n")
    for variant in VARIANTS:
        system = CMS(64, levels, variant)
        print(f"{variant:<14}" + "".join(f"{tick:>3}" for tick in range(1, 25)))
        for number, level in enumerate(levels):
            line = f"  chunk {level.chunk or 'never':<6}"
            for tick in range(1, 25):
                mark = "u" if number in system.due(tick) else "."
                line += f"{'R' if number in system.resets(tick) else mark:>3}"
            print(line)
        print()
    print("What it costs (d_model 64): a slow memory is large and cheap, it seldom updates\n")
    print("  chunk   hidden  parameters  updated per tick")
    for level, mlp in zip(system.levels, system.mlps, strict=True):
        count = sum(w.numel() for w in mlp.parameters())
        rate = (mlp.w_in.numel() + mlp.w_out.numel()) / level.chunk if level.chunk else 0
        print(f"  {level.chunk or 'never':<6}{level.hidden:>8}{count:>12,}{rate:>18,.0f}")
    y, state = system(torch.randn(3, 10, 64), system.start_state(batch=3))
    shapes = [tuple(w["w_in"].shape) if w else None for w in state["fast"]]
    print(f"\nafter {state['position']} tokens of 3 rows: y {tuple(y.shape)}, fast w_in {shapes}")


def learn():
    """A phrase that comes again and again, read by a model that has never been trained."""
    from hope import Hope, HopeConfig

    torch.manual_seed(0)
    config = HopeConfig(model="hope_attention", d_model=64, n_layers=2, levels=[16, 64, None])
    model = Hope(config)
    phrase = torch.randint(256, (8, 16))  # 8 rows, each with a phrase of its own
    print("bits per byte of a phrase of 16 random bytes that repeats, model never trained;")
    print("the CMS levels take steps every 16 and 64 tokens, at each row's own weights\n")
    print(f"{'time it is read':>18}{'no steps':>14}{'steps of 0.1':>14}{'steps of 1':>14}")
    losses = []
    for step in (0.0, 0.1, 1.0):
        with torch.no_grad():
            loss, _ = model.learn(phrase.repeat(1, 32), step=step)
        losses.append(loss / math.log(2))
    for time in (2, 4, 8, 16, 32):
        own = slice(16 * (time - 1), 16 * time - 1)
        print(f"{time:>18}" + "".join(f"{loss[:, own].mean():>14.2f}" for loss in losses))


def baselines(d_model=128, n_heads=2, lengths=(64, 4096)):
    """Parameters of each mixer, and how its state grows with the text."""
    import baselines
    from layers import tensors

    sizes = (d_model, n_heads)
    mixers = {
        "Attention": baselines.Attention(*sizes),
        "Attention, conv 4": baselines.Attention(*sizes, conv=4),
        "Attention, window 128": baselines.Attention(*sizes, window=128),
        "Mamba": baselines.Mamba(d_model),
        "LinearAttention": baselines.LinearAttention(*sizes),
        "RetNet": baselines.RetNet(*sizes),
        "DeltaNet": baselines.DeltaNet(*sizes),
        "GatedDeltaNet": baselines.GatedDeltaNet(*sizes),
        "Comba": baselines.Comba(*sizes),
        "Mamba2": baselines.Mamba2(*sizes),
        "RWKV7": baselines.RWKV7(*sizes),
        "SRWM": baselines.SRWM(*sizes),
        "DLA": baselines.DLA(*sizes),
        "Memora": baselines.Memora(*sizes),
        "TTT-Linear": baselines.TTT(*sizes),
        "TTT-MLP": baselines.TTT(*sizes, depth=2),
        "TitansMAC": baselines.TitansMAC(*sizes),
        "TitansMAG": baselines.TitansMAG(*sizes),
        "TitansMAL": baselines.TitansMAL(*sizes),
    }
    print(f"d_model {d_model}, {n_heads} heads, one row, float32\n")
    columns = "".join(f"   state after {T:>5}" for T in lengths)
    print(f"{'mixer':<24}{'parameters':>10}{columns}")
    for name, mixer in mixers.items():
        line = f"{name:<24}{sum(p.numel() for p in mixer.parameters()):>10,}"
        for T in lengths:
            with torch.no_grad():
                _, state = mixer(torch.randn(1, T, d_model))
            size = sum(t.nbytes for t in tensors(state))
            line += f"{size / 1024:>12,.1f} KiB  "
        print(line)
    print("\nOnly attention without a window grows with the text, every other state is bounded.")


def hope():
    """A model as a nested system: who learns when, from what."""
    from hope import Hope, HopeConfig
    from hope import __doc__ as about

    parser = Parser(prog="hope.py", description=about, formatter_class=Help)
    parser.add_argument("--preset", default="nano", help="size of the model (default: nano)")
    parser.add_argument("--model", default="hope", help="(default: hope)")
    if sys.argv[1:2] == ["generate"]:
        raise ValueError("this command is now `python sample.py generate ...`")
    args = parser.parse_args()
    config = HopeConfig.preset(args.preset, args.model)
    with torch.device("meta"):  # counts only
        model = Hope(config)
    total = sum(p.numel() for p in model.parameters())
    sizes = f"d_model {config.d_model}, {config.n_layers} layers, {config.n_heads} heads"
    print(f"{config.model}: {total:,} parameters, {sizes}\n")
    form = "{level:>5}  {component:<44}{updates:<38}{context:<42}{parameters:>12}"
    names = ("level", "component", "updates", "context", "parameters")
    print(form.format(**{name: name for name in names}))
    for row in model.levels():
        print(form.format(**row | {"parameters": f"{row['parameters']:,}"}))
    print("\nLevel 1 updates most often. A level that learns in context shows its initial weights.")


def optimizers():
    """NL figure 4, and what each memory keeps of old gradients."""
    from bench.toy import demo

    demo()


DEMOS = {
    "memory": memory,
    "titans": titans,
    "cms": cms,
    "learn": learn,
    "optimizers": optimizers,
    "baselines": baselines,
    "hope": hope,
}
if __name__ in DEMOS:
    try:
        if __name__ != "hope":  # which alone has flags
            Parser(prog=f"{__name__}.py", description=DEMOS[__name__].__doc__).parse_args()
        DEMOS[__name__]()
    except ValueError as error:
        print(f"{__name__}.py: error: {error}", file=sys.stderr)
        sys.exit(2)
