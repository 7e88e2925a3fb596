"""README.md and docs/: snippets run, commands have these flags, numbers are those of results/."""

import ast
import contextlib
import importlib
import io
import re
import runpy
import shlex
import statistics
import string
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from bench import demos, report
from support.config import TrainConfig
from train import train

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What has a --help; other commands must be without flags
SCRIPTS = (
    "train.py", "eval.py", "sample.py", "data.py", "hope.py", "ctm.py", "bench", "bench.report",
)


def blocks(page, language):
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


# --------------------------------------------------------------------------------------------------
# Snippets

SNIPPETS = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in PAGES
    for number, text in enumerate(blocks(page, "python"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run in runs/hope-nano, trained for two steps."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("train.plot", lambda run: None)
        Path("text.txt").write_text("".join(f"def f{i}(x): return x * {i}\n" for i in range(999)))
        size = {"n_layers": 1, "d_model": 32, "n_heads": 1}
        train(TrainConfig(data="text.txt", tokens=256, seq_len=96, batch_size=2, set=size))
    return folder


@pytest.mark.parametrize("text", SNIPPETS)
def test_snippets_run(text, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(text, "snippet", "exec"), {"__name__": "snippet"})


def test_the_readme_has_snippets_for_a_layer_a_model_and_a_trained_run():
    text = "".join(blocks(ROOT / "README.md", "python"))
    assert all(name in text for name in ("SelfModifyingTitans(", "model.learn(", "Run.open("))


# --------------------------------------------------------------------------------------------------
# Commands


def command_lines(page):
    """The commands of a page, variables filled in: lines of plain blocks, `python ...` in text."""
    text = page.read_text()
    found = []
    for block in blocks(page, ""):
        variables = {}
        for line in block.splitlines():
            line = string.Template(line).safe_substitute(variables)
            if assigned := re.fullmatch(r"([A-Z]+)=(.*)", line):
                variables[assigned[1]] = "".join(shlex.split(assigned[2]))
            else:
                found.append(line)
    prose = BLOCK.sub("", text)
    found += re.findall(r"`((?:python|pytest|pip) [^`]+)`", prose.replace("\n", " "))
    return [line for line in found if line.strip()]


COMMANDS = sorted({line for page in PAGES for line in command_lines(page)})


@cache
def help_of(script, *words):
    """What `python SCRIPT WORDS --help` prints."""
    before = sys.argv
    sys.argv = [script, *words, "--help"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
    except SystemExit as done:
        assert not done.code, said.getvalue()
    finally:
        sys.argv = before
    return said.getvalue()


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist_with_these_flags(line):
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z]+=\S*", words[0]):  # environment variables
        words = words[1:]
    program = words[0]
    if program in ("pip", "pytest"):
        files = [word for word in words if word.endswith((".txt", ".py"))]
        assert all((ROOT / name).is_file() for name in files)
        return
    assert program in ("python", "torchrun")
    if program == "torchrun":
        words = words[words.index("train.py") - 1 :]
    module = words[1] == "-m"
    script = words[2] if module else words[1]
    assert module or script == "FILE.py" or (ROOT / script).is_file()
    words = words[3 if module else 2 :]
    flags = {word.split("=")[0] for word in words if word.startswith("--")} - {"--help"}
    assert "_" not in "".join(flags)  # as --help writes them
    if not flags and script != "bench":
        return
    assert script in SCRIPTS
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    text = help_of(script, *words[:first])
    assert all(re.search(rf"{flag}\b", text) for flag in flags), f"{flags} in\n{text}"


def test_train_py_accepts_the_values_of_the_documented_flags(monkeypatch):
    parse = importlib.import_module("support.config").parse
    resumed = lambda folder, **changes: TrainConfig(**changes)  # noqa: E731
    checked = 0
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        if "train.py" in words and "--dry-run" not in words and "--help" not in words:
            parse(words[words.index("train.py") + 1 :], "", resumed)
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("file", sorted(path.name for path in ROOT.glob("*.py")))
def test_every_file_of_the_top_level_shows_or_does_something(file):
    text = (ROOT / file).read_text()
    assert text.count('\nif __name__ == "__main__":') == 1
    named = re.search(r'run_module\("bench.demos", run_name="(\w+)"\)', text)
    assert not named or named[1] == file.removesuffix(".py") in demos.DEMOS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hope", "cms", "kernels", "tasks"])  # one demonstration for all
def test_what_shows_a_concept_has_a_help_and_refuses_other_flags(name):
    line = [sys.executable, ROOT / f"{name}.py"]
    done = subprocess.run([*line, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"{name}.py" in done.stdout.splitlines()[0]
    assert subprocess.run([*line, "--wrong"], capture_output=True).returncode == 2


def test_an_installation_has_every_module_and_no_folder_of_numbers():
    tomllib = pytest.importorskip("tomllib")
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert tables["py-modules"] == sorted(path.stem for path in ROOT.glob("*.py"))
    assert tables["packages"] == sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    (file,) = tables["dynamic"]["dependencies"]["file"]
    assert not any(line.startswith("-") for line in (ROOT / file).read_text().splitlines())


# --------------------------------------------------------------------------------------------------
# Names and files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_links_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if not link.startswith(("http", "#")):
            assert (page.parent / link).exists(), link
    made = ("checkpoints/", "babi/en/", "tinyshakespeare/", "clinc150/", "banking77/", "novels/")
    tops = {path.name for path in ROOT.iterdir()} | {"bench", "support", "docs", "results", "tests"}
    for name in re.findall(r"`([\w./-]+(?:\.py|\.json|\.jsonl|\.md|/))`", text):
        if name.split("/")[0] in tops and not name.startswith(("data/", "runs/", *made)):
            assert (ROOT / name).exists(), name


def test_names_in_the_table_of_equations_exist():
    text = (ROOT / "docs/paper.md").read_text()
    modules = "memory titans cms learn hope ctm fused optimizers baselines support".split()
    names = re.findall(r"`([a-z_]+(?:\.[A-Za-z_]+)+)`", text)
    names = [name for name in names if name.split(".")[0] in modules and not name.endswith(".py")]
    assert len(names) > 30
    for name in names:
        parts = name.split(".")
        depth = 2 if parts[0] == "support" else 1
        value = importlib.import_module(".".join(parts[:depth]))
        for part in parts[depth:]:
            value = getattr(value, part)


def test_the_tests_that_reproduce_printed_slips_exist():
    wanted = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/paper.md").read_text()))
    defined = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                defined.add(node.name)
    assert wanted and wanted <= defined, wanted - defined


def test_deviations_that_the_code_names_are_in_the_list():
    text = (ROOT / "docs/paper.md").read_text()
    listed = {int(number) for number in re.findall(r"^(\d+)\. ", text, re.MULTILINE)}
    code = [path for path in ROOT.glob("*.py")] + list((ROOT / "support").glob("*.py"))
    code += list((ROOT / "bench").glob("*.py"))
    named = set()
    for path in code:
        for numbers in re.findall(r"deviations? (\d+(?:(?:, | and )\d+)*)", path.read_text()):
            named |= {int(number) for number in re.findall(r"\d+", numbers)}
    assert named and named <= listed, named - listed


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# --------------------------------------------------------------------------------------------------
# Numbers


def test_tables_are_those_of_the_files_in_results():
    text = report.PAGE.read_text()
    assert set(report.TABLES) == {name for _, name, _ in report.MARKED.findall(text)}
    assert report.render(text) == text


def measured(key):
    return report.load("measured.json")[key]["value"]


def mean(file, spec):
    runs = report.quality_runs(file)
    return statistics.mean(report.bits(runs[spec]["long"]))


def seed_bits(file, spec, seed=0):
    return report.quality_runs(file)[spec]["long"][seed]["bits_per_byte"]


def ablated(spec):
    (row,) = [r for r in report.load("ablation.json")["equal_tokens"] if r["model"] == spec]
    return row["difference"]


def timed():
    runs = report.quality_runs("quality.jsonl")
    own = {spec: run["timed"] for spec, run in runs.items() if run["timed"]}
    return {spec: cell["bits_per_byte"] for spec, cell in own.items()}


def parted(spec):
    """Differences of a part's cells to Hope's of the same seed, with the CMS learning."""
    runs = report.quality_runs("ablation.jsonl")
    base = runs["hope"]["long"]
    cells = runs[spec]["long"].items()
    return [cell["bits_per_byte"] - base[seed]["bits_per_byte"] for seed, cell in cells]


LEARNED_Q = 'hope:adaptive=["k","v","q"]'
PYTHON = "quality.jsonl"
NOVELS = "quality_novels.jsonl"
OFF = "hope:levels=[512,null]:cms_updates=off"  # what was measured before the CMS learned
FROZEN = "hope:inner_step=0:levels=[512,null]:cms_updates=off"
SAMBA = mean(PYTHON, OFF) - mean(PYTHON, "samba")
SAMBA_NOVELS = seed_bits(NOVELS, OFF) - seed_bits(NOVELS, "samba")
LEARNING = mean(PYTHON, FROZEN) - mean(PYTHON, OFF)
LEARNING_NOVELS = seed_bits(NOVELS, FROZEN) - seed_bits(NOVELS, OFF)
LONG = "quality_novels_2048.jsonl"
LEVELS = ":levels=[64,null]:cms_blocks=3"
SAMBA_CMS = "samba" + LEVELS
AHEAD = mean(PYTHON, "samba") - mean(PYTHON, "hope")
E2E = seed_bits(PYTHON, "ttt_e2e") - seed_bits(PYTHON, "hope")
LEVEL = mean(PYTHON, "hope") - mean(PYTHON, SAMBA_CMS)
RIVALS = ("gated_deltanet", "titans", "transformer")
WITH_CMS = [seed_bits(PYTHON, model + LEVELS) for model in RIVALS]
AHEAD_NOVELS = seed_bits(NOVELS, "samba") - seed_bits(NOVELS, "hope")
AHEAD_LONG = seed_bits(LONG, "samba") - seed_bits(LONG, "hope")
CMS = mean(PYTHON, OFF), mean(PYTHON, "hope")
CMS_LONG = seed_bits(LONG, "hope:cms_updates=off"), seed_bits(LONG, "hope")
COUNTING = report.load("tasks_formal_quick.json")["rows"][0]["mean"]["a^n b^n"][1]
COUNTERS = report.load("tasks_formal_counters.json")["rows"][0]["mean"]["a^n b^n"][1]
CTM = report.load("ctm_parity_8.json")
PLACES = {Path(r["run"]).name: r["bits_per_byte"] for r in report.load("position.json")["runs"]}
FURTHER = [PLACES["hope-off"][i] - PLACES["hope-nano"][i] for i in (0, -1)]
READ = [report.quality_runs(PYTHON)[spec]["timed"]["tokens"] for spec in (OFF, "samba")]

README = [  # what the page must say, made from the files in results/
    f"{measured('main_job')} bits per byte",
    f"{measured('main_job_line')}, 00:00 left",
    f"ends at {measured('main_job')} instead of {measured('main_job_off')}",
    f"it took {measured('main_job_minutes')}",
    f"{AHEAD:.3f} bits per byte ahead of Samba (three seeds), {E2E:.3f} of TTT-E2E (one seed)",
    f"{AHEAD_NOVELS:.3f} ahead of Samba, in rows of 2,048 {AHEAD_LONG:.3f} (one seed)",
    f"but Samba is {LEVEL:.3f} ahead (three seeds)",
    f"take {CMS[0]:.3f} bits per byte to {CMS[1]:.3f} on Python (three seeds)",
    f"{CMS_LONG[0]:.3f} to {CMS_LONG[1]:.3f} on those novels (one seed)",
    f"{LEARNING:.3f} bits per byte worse on Python, {LEARNING_NOVELS:.3f} on novels (one seed)",
    f"they gain more: {FURTHER[1]:.3f} at 16 times",
    f"{COUNTING:.1f}% of longer words of a^n b^n",
    f"costs text {measured('counters_text').split()[0]} bits per byte at 0.15M tokens, one seed",
    f"it is {COUNTERS:.1f}% of longer words. |",
]
BETTER = {}  # by what a part is better than Hope's own, two seeds
for part in ("momentum=true", 'adaptive=["k"]', 'adaptive=["v"]'):
    BETTER[part] = -statistics.mean(parted(f"hope:{part}"))
RESULTS = [
    f"by {FURTHER[0]:.3f} bits per byte up to the training length and by {FURTHER[1]:.3f}",
    f"loses {statistics.mean(parted('hope:cms_updates=off')):.3f} bits per byte",
    f"without retention {statistics.mean(parted('hope:retention=false')):.3f}",
    f"without DGD {statistics.mean(parted('hope:dgd=false')):.3f}",
    "With momentum it is {:.3f} better, with a static v {:.3f}, with a static k {:.3f}".format(
        *BETTER.values()
    ),
    f"with a learned q {parted(LEARNED_Q)[0]:.3f} worse (one seed)",
    f"by {AHEAD:.3f} bits per byte of Samba (three seeds), by {E2E:.3f} of TTT-E2E (one seed)",
    f"steps in context are worth {CMS[0] - CMS[1]:.3f} bits per byte (three seeds)",
    f"in these short rows by {AHEAD_NOVELS:.3f} of Samba (one seed)",
    "has {:.3f}, Titans {:.3f}, the Transformer {:.3f} (one seed)".format(*WITH_CMS),
    f"ahead of the best of these by {min(WITH_CMS) - seed_bits(PYTHON, 'hope'):.3f}",
    f"ahead of Hope**: by {LEVEL:.3f}, the mean of three pairs of seeds",
    f"worth {CMS_LONG[0] - CMS_LONG[1]:.3f} bits per byte on novels, too",
    f"Hope is {AHEAD_LONG:.3f} ahead of Samba",
    f"by {SAMBA:.3f} bits per byte on Python (means of three seeds), by {SAMBA_NOVELS:.3f}",
    f"worth {LEARNING:.3f} bits per byte** on Python (three seeds) and {LEARNING_NOVELS:.3f}",
    f"reads {READ[0]:,} tokens, Samba {READ[1]:,}",
    f"**{measured('main_job')} bits per byte**",
    f"has {measured('position_kept')} bits per byte",
    f"and {measured('position_fresh')} with",
    f"that version had {measured('main_job_alpha_09').split()[0]}",
]
PAPER = [
    f"with {CTM['whole']:.1%} of rows right in {len(CTM['by_tick'])} ticks; stopped at certainty "
    f"0.99 they need {CTM['stop'][2]['ticks']:.1f} ticks, and at 0.8, where too few positions are "
    f"sure, {CTM['stop'][0]['whole']:.1%} are right",
    f"{ablated('hope:conv=0'):.3f} bits per byte worse without the convolution",
    f"{ablated('hope:gate=false'):.3f} without the gate",
    f"{ablated('hope:mode=boundary'):.3f} bits per byte worse at 0.5M tokens",
    f"MLPs are {-ablated('hope:memory=mlp'):.3f} better",
    f"momentum is worth {-ablated('hope:momentum=true'):.3f}",
    f"costs {ablated(LEARNED_Q):.3f}",
]


@pytest.mark.parametrize(
    "page, numbers", [("README.md", README), ("docs/results.md", RESULTS), ("docs/paper.md", PAPER)]
)
def test_numbers_in_prose_are_those_of_the_files_in_results(page, numbers):
    text = " ".join((ROOT / page).read_text().split())
    for said in numbers:
        assert said in text, said


def test_what_is_said_of_who_is_first_holds_in_the_files():
    at_time = timed()
    assert min(at_time, key=at_time.get) == OFF
    assert mean(PYTHON, "samba") < mean(PYTHON, OFF)
    assert abs(ablated("hope:inner_step=0")) < 0.02
    cells = {}
    for row in report.load("speed_lengths.json")["rows"]:
        cells.setdefault(row["seq_len"], {})[row["model"]] = row["tokens_per_s"]
    first = {length: max(own, key=own.get) for length, own in cells.items()}
    linear = "linear_attention"
    assert first == {512: "transformer", 1024: linear, 4096: linear, 16384: "hope"}
    faster = {model for model, speed in cells[4096].items() if speed > cells[4096]["transformer"]}
    assert faster == {"linear_attention", "retnet", "hope", "deltanet"}
    slower = {model for model, speed in cells[16384].items() if speed < cells[16384]["transformer"]}
    assert slower == {"titans_mac", "hope_attention", "ttt_linear", "ttt_mlp"}


def test_every_measurement_has_what_value_and_command():
    for key, own in report.load("measured.json").items():
        assert own["command"] and ("table" in own or (own["what"] and own["value"])), key
