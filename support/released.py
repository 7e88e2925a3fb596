"""Released data sets that the benchmarks read: from where, under which licence, in which layout.

`python data.py get NAME` fetches them through `datasets`, file by file. Each is compared with the
sha256 of the one that the numbers in results/ were measured with. docs/data.md has the table.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from layers import one_of
from support.checkpoint import atomic_write, first_line
from support.corpus import sha256_of

GITHUB = "https://raw.githubusercontent.com"
FOUNDRY = f"{GITHUB}/mosaicml/llm-foundry"
LOCAL_DATA = f"{FOUNDRY}/f01dc6dd4f3f7007b79f9a52fb38ef3833d0e4d5/llmfoundry/eval/local_data"
BABILONG = f"{GITHUB}/booydar/babilong/7a6efee29f5cac03c3c410e6799c80fd2ffe3610"


@dataclass(frozen=True)
class Released:
    what: str
    licence: str
    folder: str  # an address; after # a folder in an archive
    files: dict[str, str]  # name below DIR/SET -> sha256


SETS = {
    "wikitext2": Released(
        "WikiText-2, tokenised: validation, test",
        "CC BY-SA 3.0",
        f"{GITHUB}/pytorch/examples/main/word_language_model/data/wikitext-2",
        {
            "valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            "test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        },
    ),
    "lambada": Released(
        "LAMBADA test, OpenAI's form",
        "CC BY 4.0",
        "https://openaipublic.blob.core.windows.net/gpt-2/data",
        {"lambada_test.jsonl": "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"},
    ),
    "piqa": Released(
        "PIQA validation",
        "AFL 3.0",
        "https://yonatanbisk.com/piqa/data",
        {
            "valid.jsonl": "93503cc97c679e459b065c3d13e848282e44b2a25213985bed3e5d458abef72d",
            "valid-labels.lst": "b4192dc3a2a0363d9d60ccf79800cbbe2f32ebb17726efdde6970e0b8131bceb",
        },
    ),
    "hellaswag": Released(
        "HellaSwag validation, as text",
        "MIT",
        f"{GITHUB}/klosax/hellaswag_text_data/main",
        {
            "hellaswag_val_full.txt": (
                "d572539320eb2050e858ca34b495bbe2103e3b3f1391a9c3bcdf215b0bb93bd1"
            ),
        },
    ),
    "winogrande": Released(
        "WinoGrande validation, as partial contexts",
        "CC BY",
        f"{LOCAL_DATA}/language_understanding",
        {"winogrande.jsonl": "ea1592526f3bfdd0948ed3acb1b4dfa3f83d23698917118688ee1df7f8d4b8d7"},
    ),
    "arc": Released(
        "ARC-Easy test",
        "CC BY-SA 4.0",
        f"{LOCAL_DATA}/world_knowledge",
        {"arc_easy.jsonl": "d2d12e59543acf9a5ef6079634a72b30215e36c2fd4236fff3bc855d287b87f5"},
    ),
    "boolq": Released(
        "BoolQ validation",
        "CC BY-SA 3.0",
        f"{FOUNDRY}/284c9e2a2460c17975343ef475f6f926a1a751d1"
        "/scripts/eval/local_data/reading_comprehension",
        {"boolq.jsonl": "454ff101e614370bb1807fe7ebbda6fdb57e794b9662cc1ccae211bf1ff626c8"},
    ),
    "babi": Released(
        "bAbI v1-2: test of tasks 1 to 5",
        "CC BY 3.0",
        f"{BABILONG}/data/tasks_1-20_v1-2.zip#tasks_1-20_v1-2",
        {
            "en/qa1_single-supporting-fact_test.txt": (
                "55acf66cef2f6d798e2aa1d056e1ec8f24e910ea9215b639450574321132959b"
            ),
            "en/qa2_two-supporting-facts_test.txt": (
                "eff93fb9cd81ba02eb765772cf7cc269769ed44ec71cbbbc19cfb16ee5eba0f6"
            ),
            "en/qa3_three-supporting-facts_test.txt": (
                "17795c977100baf8188f386522ae301b62d6c1a13efc01b3aea781e588b4d57f"
            ),
            "en/qa4_two-arg-relations_test.txt": (
                "07f0ca18ddeea9eed4ba6d59e162adcb0ce44815721114b3540d92825509331e"
            ),
            "en/qa5_three-arg-relations_test.txt": (
                "ec825c1c8a76e63a31f0d7a7763cd63740e98332fa9bdf246a19068949bd5f97"
            ),
        },
    ),
    "tinyshakespeare": Released(
        "plays of Shakespeare",
        "public domain",
        f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare",
        {"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
    ),
    "clinc150": Released(
        "CLINC150",
        "CC BY 3.0",
        f"{GITHUB}/clinc/oos-eval/master/data",
        {
            "data_full.json": "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0",
            "domains.json": "b947b579d3b8e74b06f93b01083d8efaff2888b43a3e362533bd88a6e1211b3a",
        },
    ),
    "banking77": Released(
        "Banking77",
        "CC BY 4.0",
        f"{GITHUB}/PolyAI-LDN/task-specific-datasets/master/banking_data",
        {
            "train.csv": "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
            "test.csv": "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
        },
    ),
}


def get(name: str, folder: str | Path) -> list[Path]:
    """Fetch the files of a set that folder/name lacks; all of them, checked.

    ValueError for an unknown set, a file there that is another, and where `datasets` is missing;
    OSError where a file cannot be fetched, or is not the one that was released. What differs is
    never written over, and never written.
    """
    released = SETS[one_of("data set", name, SETS)]
    paths = []
    for file, sha256 in released.files.items():
        path = Path(folder, name, file)
        if not path.exists():
            fetched = _fetch(released.folder, file)
            if (found := sha256_of(fetched)) != sha256:
                changed = f"{released.folder}/{file} has changed"
                raise OSError(f"{changed}: its sha256 is {found}, not {sha256}")
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda beside, fetched=fetched: shutil.copyfile(fetched, beside))
        elif (found := sha256_of(path)) != sha256:
            raise ValueError(f"{path} is another file: its sha256 is {found}, not {sha256}")
        paths.append(path)
    return paths


def _fetch(folder: str, file: str) -> Path:
    try:
        from datasets import DownloadManager
    except ImportError:
        how = "pip install -r requirements-data.txt"
        raise ValueError(f"data sets are fetched by datasets: {how}") from None
    archive, _, inside = folder.partition("#")
    try:
        if inside:
            return Path(DownloadManager().download_and_extract(archive), inside, file)
        return Path(DownloadManager().download(f"{folder}/{file}"))
    except Exception as error:  # of the network, of several kinds
        why = first_line(error.__cause__ or error)  # fsspec's own error is the address, no reason
        raise OSError(f"{folder}/{file} could not be fetched ({why})") from error


def table() -> str:
    """All sets as a Markdown table."""
    lines = ["| set | what | licence | files below `DIR` | from |", "|---|---|---|---|---|"]
    for name, own in SETS.items():
        files = " ".join(f"`{name}/{file}`" for file in own.files)
        source = own.folder.split("#")[0].replace(GITHUB, "https://github.com").split("/")
        source = "/".join(source[: 5 if "github.com" in source else 3])
        lines.append(f"| `{name}` | {own.what} | {own.licence} | {files} | {source} |")
    return "\n".join(lines)
