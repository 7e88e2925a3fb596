"""A run as files that others read: config.json, model.safetensors, tokenizer.json and a card.

    python hope.py export runs/hope-nano FOLDER
    model = from_pretrained("FOLDER")          # support/pretrained.py: the same weights to the bit
    python eval.py --pretrained FOLDER --data book.txt

A Hope-Attention, or a Transformer, whose one level never learns is a Llama. It is written as one,
with transformers' names, so that transformers loads it; any other model has its own names.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from hope import Hope
from support import gguf
from support.flags import Parser
from support.run import Run, write_json
from support.vocabulary import END, TOKENIZER, hugging_face

CARD = """# {name}

{model}: {parameters:,} parameters, {training_tokens:,} training tokens of {trained_on}.
CMS steps in context: {cms_steps_in_context}. Made with Nested Learning and Hope (PyTorch).

{how}
"""
AS_HOPE = """    from support.pretrained import from_pretrained   # in that repository
    model = from_pretrained("{name}")"""
AS_LLAMA = """    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("{name}")
    tokenizer = AutoTokenizer.from_pretrained("{name}")"""


def export(run: Run, folder: str | Path) -> None:
    """Write a run to a new folder. ValueError where there is one; OSError, then nothing is left."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("export needs safetensors: pip install safetensors") from None
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"FOLDER must be new, {str(folder)!r} exists")
    plain = is_llama(run.model)
    config, weights = as_llama(run.model) if plain else as_hope(run.model)
    config |= {"eos_token_id": run.encoding.eot_token, "bos_token_id": run.encoding.eot_token}
    config |= {"max_position_embeddings": run.config.seq_len, "dtype": "float32"}
    facts = run.facts()
    how = (AS_LLAMA if plain else AS_HOPE).format(name=folder.name)
    special = {"tokenizer_class": "PreTrainedTokenizerFast"}
    special |= dict.fromkeys(("bos_token", "eos_token"), END)
    folder.mkdir(parents=True)
    try:
        write_json(folder / "config.json", config)
        # copies: safetensors takes no tensors that share memory
        weights = {name: w.cpu().clone().contiguous() for name, w in weights.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        write_json(folder / TOKENIZER, hugging_face(run.encoding))
        write_json(folder / "tokenizer_config.json", special)
        (folder / "README.md").write_text(CARD.format(name=folder.name, how=how, **facts))
    except BaseException:
        shutil.rmtree(folder)
        raise


def is_llama(model: Hope) -> bool:
    c = model.config
    attention = c.model in ("hope_attention", "transformer") and not c.conv_width
    return attention and len(c.levels) == 1 and c.cms_updates == "off"


def as_hope(model: Hope) -> tuple[dict, dict]:
    """(config.json, {name: tensor}) of any model."""
    config = {"architectures": ["Hope"], "model_type": "hope", "hope": model.config.to_dict()}
    return config, model.state_dict()


@torch.no_grad()
def as_llama(model: Hope) -> tuple[dict, dict]:
    """The same of a model that `is_llama`, as transformers has it."""
    c = model.config
    mixer = model.blocks[0].mixer
    rope = {"rope_type": "default", "rope_theta": mixer.rope_base}
    if mixer.rope_factors:  # transformers has factors for short texts and for long ones
        lists = dict.fromkeys(("short_factor", "long_factor"), list(mixer.rope_factors))
        rope |= {"rope_type": "longrope", **lists, "attention_factor": 1.0, "factor": 1.0}
        rope["original_max_position_embeddings"] = 2**20
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "cms_levels": c.levels,  # for from_pretrained
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_heads,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "rope_theta": mixer.rope_base,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    new = {"model.embed_tokens.weight": model.embedding.weight}
    new["model.norm.weight"] = model.norm.weight
    if model.head is not None:
        new["lm_head.weight"] = model.head.weight
    for i, block in enumerate(model.blocks):
        at = f"model.layers.{i}."
        (mlp,) = block.cms.mlps
        q, k, v = block.mixer.qkv.weight.chunk(3)
        gate, up = mlp.w_in.chunk(2)
        mix = block.cms.mix if block.cms.variant == "independent" else 1.0
        new |= {
            at + "input_layernorm.weight": block.norm.weight,
            at + "self_attn.q_proj.weight": gguf.halved(q, c.n_heads),
            at + "self_attn.k_proj.weight": gguf.halved(k, c.n_heads),
            at + "self_attn.v_proj.weight": v,
            at + "self_attn.o_proj.weight": block.mixer.out.weight,
            at + "post_attention_layernorm.weight": mlp.norm.weight,
            at + "mlp.gate_proj.weight": gate,
            at + "mlp.up_proj.weight": up,
            at + "mlp.down_proj.weight": mlp.w_out * mix,
        }
    return config, new


def main(argv: list[str]) -> int:
    """`python hope.py export`; the exit status: 0 done, 2 bad input."""
    p = Parser(prog="hope.py export", description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="folder of the run")
    p.add_argument("folder", help="folder to make")
    try:
        args = p.parse_args(argv)
        export(Run.open(args.run, "cpu"), args.folder)
    except (ValueError, OSError) as error:
        print(f"hope.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.run} is in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
