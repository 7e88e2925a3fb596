"""sample.py look: what is read off a model's memories, and the page, in a browser where one is."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from test_sample import run_folder

from bench.look import page, planted, report, shown, surprise, trace, watched
from hope import Hope, HopeConfig
from memory import scan_stepwise
from sample import main
from support.vocabulary import tokenizer

SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "hidden": 24, "chunk": 4}
MODELS = {
    "hope": {"levels": [8, None]},
    "hope, mlp": {"memory": "mlp", "levels": [8, 16, None], "momentum": True},
    "hope, counters": {"counters": 1, "levels": [8, None]},
    "hope, mlp and counters": {"memory": "mlp", "counters": 1, "levels": [8, None]},
    "titans": {},
    "gated_deltanet": {},
    "deltanet": {"levels": [8, None]},
    "retnet": {},
    "ttt_mlp": {},
    "titans_mac": {"window": 8},
}
WITHOUT = {"hope_attention": {"levels": [8, None]}, "samba": {}}  # memories of `scan`


def a_model(name, **fields):
    torch.manual_seed(0)
    config = HopeConfig(model=name.split(",")[0], **SMALL | (MODELS | WITHOUT)[name] | fields)
    return Hope(config).eval()


def a_call(T=9, dv=3, dk=4, lead=(2,), **changes):
    """Arguments of `scan` in float64."""
    rate = {"eta": torch.rand(*lead, T), "alpha": 0.8 + 0.2 * torch.rand(*lead, T)}
    k = torch.nn.functional.normalize(torch.randn(*lead, T, dk), dim=-1)
    call = {"W": torch.randn(*lead, dv, dk), "k": k, "u": torch.randn(*lead, T, dv)}
    return call | rate | {"theta": None, "S": None, "delta": 1.0} | changes


def document():
    return torch.randint(257, (22,))


# --------------------------------------------------------------------------------------------------
# What is measured


@pytest.mark.parametrize("kind", ["delta", "series", "momentum"])
def test_surprise_is_what_each_token_writes(float64, kind):
    call = a_call()
    if kind == "series":
        call["delta"] = call["alpha"]
    if kind == "momentum":
        call |= {"theta": torch.rand(2, 9), "S": torch.randn(2, 3, 4), "delta": 0.0}
    e = surprise(call)
    states = trace(call, range(10))
    for t in range(9):
        W, S = states[t]
        written = states[t + 1][0] - call["alpha"][:, t, None, None] * W
        if kind == "momentum":
            written = written - call["theta"][:, t, None, None] * S
        expected = e[:, t, :, None] * call["k"][:, t, None, :]
        torch.testing.assert_close(written, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("delta", [1.0, 0.0])
def test_planted_pairs_fade_as_retention_says_where_nothing_is_written(float64, delta):
    call = a_call(T=40, eta=torch.zeros(2, 40), delta=delta)
    call["W"] = 0 * call["W"]
    error, forgotten = planted(call, [1, 4, 16])
    starts = torch.linspace(0, 24, 8).int().tolist()
    for i, lag in enumerate([1, 4, 16]):
        kept = [call["alpha"][:, t : t + lag].prod(-1) for t in starts]
        torch.testing.assert_close(error[i], 1 - torch.stack(kept).mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(error, forgotten, rtol=0, atol=1e-12)


def test_a_planted_pair_is_one_more_token_of_the_text(float64):
    """One write with eta 1, alpha 1, at its place, by the definition of the rule."""
    call = a_call(T=12)
    error, forgotten = planted(call, [1, 3], starts=2, pairs=1)
    rng = torch.Generator().manual_seed(0)
    length = call["u"].norm(dim=-1).mean(-1)[:, None]
    found = torch.zeros(2, 2, 2)  # starts, lags, heads
    for n, start in enumerate((0, 9)):
        k, v = (torch.randn(1, 2, d, 1, generator=rng)[0, :, :, 0].double() for d in (4, 3))
        k = k / k.norm(dim=-1, keepdim=True)
        v = v / v.norm(dim=-1, keepdim=True) * length
        pair = {"k": k, "u": v, "eta": torch.ones(2), "alpha": torch.ones(2)}
        for i, lag in enumerate([1, 3]):
            text = {}
            for name, now in pair.items():
                x = call[name][:, : start + lag]
                text[name] = torch.cat([x[:, :start], now[:, None], x[:, start:]], 1)
            W = scan_stepwise(call["W"], **text)[1]
            found[n, i] = ((W @ k[..., None])[..., 0] - v).norm(dim=-1) / length[:, 0]
    torch.testing.assert_close(error, found.mean(0), rtol=0, atol=1e-12)
    assert (forgotten > 0).all() and not torch.allclose(error, forgotten, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_watched_writes_what_the_model_then_holds(name):
    model = a_model(name)
    tokens = document()[None]
    logits, state, found = watched(model, tokens)
    with torch.no_grad():
        expected, after = model(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert list(found) == [0, 1]
    for number, layers in found.items():
        own = after["blocks"][number]["mixer"]
        own = own.get("memory", own)
        held = own["running"] if "running" in own else [own["W"]]
        held = [*held, own["counted"]] if "counted" in own else held
        for call, W in zip(layers, held, strict=True):
            torch.testing.assert_close(trace(call, [0, 22])[-1][0], W[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*MODELS, *WITHOUT])
def test_a_report_has_what_the_model_has_and_says_what_it_lacks(name):
    model = a_model(name)
    tokens = document()
    made = report(model, tokens, [str(token) for token in tokens[1:]])
    lacks = "; ".join(made["lacks"])
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(tokens[None])[0][0, :-1], tokens[1:])
    assert sum(made["loss"]) / 21 == pytest.approx(nats.item() / 0.693147, rel=5e-3)
    learns = model.config.cms_updates != "off"
    assert (made["gain"] is not None) == learns == ("CMS" not in lacks)
    if learns:  # the first step comes after a chunk
        chunk = model.config.levels[0]
        gain = torch.tensor(made["gain"])
        assert gain[: chunk - 1].abs().max() < 1e-4 < gain[chunk:].abs().max()
        (level,) = [row for row in made["levels"] if row["component"] == "CMS level 1"]
        assert level["moved"] > 0 and level["period"] == 8
    assert bool(made["memories"]) == (name in MODELS)
    assert ("memories in blocks 1, 2" in lacks) == (name not in MODELS)
    assert ("retention" in lacks) == (name in ("deltanet", "ttt_mlp"))
    counters = sum(own["name"].endswith(", counters") for own in made["memories"])
    assert counters == 2 * ("counters" in name)
    for own in made["memories"]:
        rows = sum(n for _, n in own["rows"])
        for head in own["heads"]:
            assert len(head["surprise"]) == len(head["eta"]) == len(head["half_life"]) == 21
            assert len(head["norm"]) == len(made["points"]) and head["norm"][0] == 0
            assert len(head["pictures"]) == len(made["moments"])
            assert len(head["error"]) == len(made["lags"]) > 3
            assert len(head["pictures"][0]) * 3 // 4 // rows in (8, 9, 16, 17, 32, 33)
    json.dumps(made, allow_nan=False)


def test_texts_in_which_memories_begin_anew_are_refused():
    model = a_model("titans", window_reset=8)
    symbols = ["a"] * 8
    with pytest.raises(ValueError, match="begin anew every 8 tokens, got 8"):
        report(model, document()[:9], symbols)
    assert report(model, document()[:8], symbols[:7])["memories"]


def test_a_character_stands_at_its_last_token():
    ids = [*"aé".encode(), 256, 0xFF]
    assert shown(ids, tokenizer("bytes")) == ["a", "", "é", "<|endoftext|>", "\ufffd"]


# --------------------------------------------------------------------------------------------------
# The command and the page


def data_of(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1))


def test_the_command_writes_a_page_of_a_file_or_a_prompt(tmp_path, capsys):
    run_folder(tmp_path / "x")
    wicked = "</script><script>alert(1)</script> é\n" * 3
    (tmp_path / "text.txt").write_text(wicked, "utf-8")
    out = tmp_path / "look.html"
    look = ["look", str(tmp_path / "x"), "--out", str(out)]
    assert main([*look, "--text", str(tmp_path / "text.txt")]) == 0
    assert "bits each, in" in capsys.readouterr().out
    html = out.read_text("utf-8")
    assert "<script>alert" not in html and html.count("<script") == 2
    assert "http" not in html.replace(json.dumps(data_of(html)), "")  # nothing from a network
    made = data_of(html)
    assert "".join(made["tokens"]).startswith(wicked)
    assert main([*look, "--prompt", "def f", "--cms-updates", "off"]) == 0
    made = data_of(out.read_text("utf-8"))
    assert made["tokens"] == [*"def f"] and made["gain"] is None
    assert main([*look, "--prompt", "a\udcff"]) == 0  # a byte that is no UTF-8, as it is typed
    assert len(data_of(out.read_text("utf-8"))["tokens"]) == 2


def test_bad_input_is_one_line_and_no_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "x")
    cases = {
        "look": "arguments are required: run",
        "look nowhere": "nowhere is not the folder of a run",
        "look x --text nothing.txt": "nothing.txt",
        "look x --text a --prompt b": "--prompt: not allowed with argument --text",
        "look x --prompt b": "text must have at least 2 tokens, got 1",
        "look x --prompt abc --cms-updates on": "cms_updates 'on': must be one of off, first_order",
        "look x --out no/where.html": "--out must be a file in a folder that exists, got 'no/where",
    }
    for words, message in cases.items():
        assert main(words.split()) == 2, words
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1, error
    assert not list(tmp_path.rglob("*.html"))


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

USE = """<script>
const clicked = {};
const marked = [...document.querySelectorAll("#text span")];
const colours = () => marked.map(span => span.style.backgroundColor).join();
const picture = () => document.getElementById("matrix")?.toDataURL();
for (const input of document.querySelectorAll("#switch input")) {
  input.click();
  clicked[input.value] = input.disabled ? null : colours();
}
const slider = document.getElementById("slider");
const pictures = [];
for (let i = 0; slider && i <= slider.max; i++) {
  slider.value = i;
  slider.dispatchEvent(new Event("input"));
  pictures.push(picture());
}
const lists = [];
for (const id of ["layer", "head"]) {
  const list = document.getElementById(id);
  if (!list) continue;
  list.value = list.value === "0" ? "1" : "0";
  list.dispatchEvent(new Event("change"));
  lists.push(picture());
}
marked[0].dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
document.body.dataset.seen = JSON.stringify({ clicked, pictures, lists,
  tip: document.getElementById("tip").textContent, wide: document.documentElement.scrollWidth });
</script>"""


@pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: one of {', '.join(BROWSERS)}")
@pytest.mark.parametrize("name", ["hope", "deltanet", "hope_attention"])
def test_switch_slider_and_lists_change_the_page_in_a_browser(tmp_path, name):
    model = a_model(name)
    tokens = document()
    made = report(model, tokens, [f"<{token}>" for token in tokens[1:]])
    facts = {"model": name, "text": "t", "parameters": 1, "training_tokens": 1}
    facts |= {"trained_on": "s", "cms_steps_in_context": "off"}
    path = tmp_path / "look.html"
    path.write_text(page(facts | made) + USE, "utf-8")
    flags = ["--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=700,900"]
    words = [BROWSER, "--headless", *flags, "--dump-dom", path.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr, done.stderr
    body = re.search(r'data-seen="(.*?)"', done.stdout, re.DOTALL).group(1)
    seen = json.loads(body.replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">"))
    colours = [own for own in seen["clicked"].values() if own is not None]
    assert len(set(colours)) == len(colours) > 1
    off = {kind for kind, own in seen["clicked"].items() if own is None}
    assert off == {"hope": set(), "deltanet": {"half"}}.get(name, {"surprise", "eta", "half"})
    assert "loss" in seen["tip"] and f"<{tokens[1]}>" in seen["tip"]
    assert seen["wide"] <= 700  # nothing is cut off
    if name != "hope_attention":
        assert len(set(seen["pictures"])) == len(made["moments"]) == 9
        assert len({seen["pictures"][-1], *seen["lists"]}) == 3
