"""Models of this repository in lm-eval's own registry and command.

    python -m bench.lm_eval_model run --model hope --model_args path=runs/hope-nano --tasks piqa

path: a run, or what `eval.py --pretrained` takes. In code, importing this module registers "hope".
"""

import sys
from pathlib import Path

from bench.harness import adapter
from bench.scorer import Scorer
from support.run import Run

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    why = "lm-eval is not installed: pip install -r requirements-eval.txt"
    if __name__ != "__main__":
        raise ModuleNotFoundError(why, name=error.name) from None
    print(f"lm_eval_model: error: {why}", file=sys.stderr)
    sys.exit(2)


@register_model("hope")
class HopeLM(LM):
    def __new__(
        cls, path, device=None, cms_updates=None, max_length=None, batch_size=1, max_batch_size=None
    ):
        opened = Run.open if Path(path, "checkpoints").is_dir() else Run.pretrained
        run = opened(path, device or "auto", cms_updates)
        scorer = Scorer(run.model, run.encoding, run.device, max_length)
        return adapter(scorer, max_length or run.config.seq_len)


if __name__ == "__main__":
    cli_evaluate()
