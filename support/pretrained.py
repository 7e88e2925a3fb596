"""Ad-hoc level stacking (NL 7.3): a Llama checkpoint as Hope-Attention whose MLPs are CMS levels.

    model = from_pretrained("Llama-3.2-1B", levels=[512, 4096, None], cms_blocks=4)
    python train.py --pretrained Llama-3.2-1B --data notes.txt

The folder is one that transformers writes: config.json and *.safetensors. Each pre-trained MLP is a
sum over its hidden units. It is shared out among the levels, hidden unit by hidden unit, as the
independent variant (NL 74) with every mixing weight 1: a sum of narrower MLPs. So at the start, and
with step size 0 for ever, the model *is* the pre-trained one.
"""

import json
from pathlib import Path

import torch

from hope import Hope, HopeConfig
from support.checkpoint import first_line


def from_pretrained(folder, levels=(512, None), **changes) -> Hope:
    """A Llama-family checkpoint as Hope-Attention with CMS levels, in eval mode (NL 7.3).

    levels: chunk lengths from fast to slow. changes: further fields of HopeConfig, as cms_step,
    which is 0.01 here: weights that were not trained to learn in context bear small steps only.
    Weights are read to float32.
    ValueError for what is no such checkpoint, and for parts that have no place here.
    """
    folder = Path(folder)
    llama, weights = read_checkpoint(folder)
    check_parts(folder, llama)
    check_sizes(folder, llama, weights)
    try:
        own = {"model": "hope_attention", "levels": list(levels), "variant": "independent"}
        own["cms_step"] = 0.01
        model = Hope(HopeConfig(**(sizes_of(llama) | own | changes)))
        groups = llama.get("num_key_value_heads") or model.config.n_heads
        model.load_state_dict(taken_from(weights, model, groups))
    except (KeyError, RuntimeError) as error:
        what = f"{folder} is no checkpoint of the Llama family"
        raise ValueError(f"{what}: {first_line(error)}") from None
    left = [name for name in weights if not name.endswith("rotary_emb.inv_freq")]
    if left:
        what = f"{left[0]}, which has no place here"
        raise ValueError(f"{folder} must have plain Llama weights, got {what}")
    return model.eval()


def read_checkpoint(folder: Path) -> tuple[dict, dict]:
    """(config.json, {name: tensor} of all weights). ValueError where they cannot be read."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        install = "pip install safetensors"
        raise ValueError(f"reading a pre-trained checkpoint needs safetensors: {install}") from None
    weights = {}
    try:
        llama = json.loads((folder / "config.json").read_text())
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{folder} is no readable checkpoint: {first_line(error)}") from None
    if not isinstance(llama, dict):
        got = f"got a {type(llama).__name__}"
        raise ValueError(f"{folder / 'config.json'} must hold names with values, {got}")
    return llama, weights


def rope_of(llama: dict) -> dict:
    return llama.get("rope_parameters") or llama.get("rope_scaling") or {}


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("intermediate_size", "num_key_value_heads")


def check_parts(folder: Path, llama: dict) -> None:
    """ValueError for a part of the checkpoint that Hope-Attention does not have."""
    for name in SIZES:
        value = llama.get(name)
        missing = value is None and name == "num_key_value_heads"  # as many as heads
        if not missing and (type(value) is not int or value < 1):
            wanted = "an integer of at least 1"
            raise ValueError(f"{name} of {folder} must be {wanted}, got {value!r}")
    rope = rope_of(llama)
    theta = (rope if isinstance(rope, dict) else {}).get("rope_theta", llama.get("rope_theta", 1.0))
    if not isinstance(rope, dict) or type(theta) not in (int, float):
        raise ValueError(f"rope of {folder} must be names with values, rope_theta a number")
    width = llama["hidden_size"] // llama["num_attention_heads"]
    parts = {
        "rope type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "hidden_act": (llama.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(llama.get("attention_bias")), False),
        "mlp_bias": (bool(llama.get("mlp_bias")), False),
        "head_dim": (llama.get("head_dim") or width, width),
    }
    for name, (value, wanted) in parts.items():
        if value != wanted:
            raise ValueError(f"{name} of {folder} must be {wanted!r}, got {value!r}")


def check_sizes(folder: Path, llama: dict, weights: dict) -> None:
    """ValueError for sizes that the weights do not have, before a model is made of them."""
    d = llama["hidden_size"]
    mlp = [llama["intermediate_size"], d]
    wanted = {"model.embed_tokens.weight": [llama["vocab_size"], d]}
    wanted[f"model.layers.{llama['num_hidden_layers'] - 1}.mlp.gate_proj.weight"] = mlp
    for name, shape in wanted.items():
        have = [*weights[name].shape] if name in weights else "nothing"
        if have != shape:
            what = f"config.json says {name} is {shape}, the file has {have}"
            raise ValueError(f"{folder} is no checkpoint of the Llama family: {what}")


def sizes_of(llama: dict) -> dict:
    """The fields of HopeConfig that config.json of a Llama checkpoint says. KeyError."""
    return {
        "vocab_size": llama["vocab_size"],
        "d_model": llama["hidden_size"],
        "n_layers": llama["num_hidden_layers"],
        "n_heads": llama["num_attention_heads"],
        "hidden": llama["intermediate_size"],
        "norm_eps": llama["rms_norm_eps"],
        "tied": llama["tie_word_embeddings"],
        "rope_base": float(rope_of(llama).get("rope_theta") or llama.get("rope_theta", 10000.0)),
    }


def taken_from(weights: dict, model: Hope, groups: int) -> dict:
    """The state dict of `model` from Llama's weights, which are taken out of `weights`. KeyError.

    groups: heads of keys and values; each is repeated for the query heads that share it.
    """
    config = model.config

    def heads(name, count):  # [n_heads, head width, d_model]
        w = weights.pop(name).float().view(count, -1, config.d_model)
        return w.repeat_interleave(config.n_heads // count, 0)

    def paired(w):  # RoPE there rotates channels i and i + width / 2 together, here neighbours
        return w.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

    new = {
        "embedding.weight": weights.pop("model.embed_tokens.weight"),
        "norm.weight": weights.pop("model.norm.weight"),
    }
    head = weights.pop("lm_head.weight", None)
    if model.head is not None and head is not None:
        new["head.weight"] = head
    for i, block in enumerate(model.blocks):
        old = f"model.layers.{i}."
        at = f"blocks.{i}."
        # attention
        new[at + "norm.weight"] = weights.pop(old + "input_layernorm.weight")
        q = paired(heads(old + "self_attn.q_proj.weight", config.n_heads))
        k = paired(heads(old + "self_attn.k_proj.weight", groups))
        v = heads(old + "self_attn.v_proj.weight", groups)
        new[at + "mixer.qkv.weight"] = torch.cat([q, k, v]).flatten(0, 1)
        new[at + "mixer.out.weight"] = weights.pop(old + "self_attn.o_proj.weight")
        # deviation 13: the MLP is shared out among the levels
        levels = len(block.cms.mlps)
        norm = weights.pop(old + "post_attention_layernorm.weight")
        gate = weights.pop(old + "mlp.gate_proj.weight").chunk(levels)
        up = weights.pop(old + "mlp.up_proj.weight").chunk(levels)
        down = weights.pop(old + "mlp.down_proj.weight").chunk(levels, 1)
        for level in range(levels):
            mlp = f"{at}cms.mlps.{level}."
            new[mlp + "norm.weight"] = norm
            new[mlp + "w_in"] = torch.cat([gate[level], up[level]])
            new[mlp + "w_out"] = down[level]
        if block.cms.variant == "independent":
            new[at + "cms.mix"] = torch.ones(levels)
        if block.cms.log_step is not None:
            new[at + "cms.log_step"] = block.cms.log_step.detach()
            new[at + "cms.rise"] = block.cms.rise
    return new
