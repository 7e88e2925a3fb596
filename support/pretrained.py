"""Ad-hoc level stacking (NL 7.3): a Llama checkpoint as Hope-Attention whose MLPs are CMS levels.

    model = from_pretrained("Llama-3.2-1B", levels=[512, 4096, None], cms_blocks=4)
    python train.py --pretrained Llama-3.2-1B --data notes.txt
    python eval.py --pretrained SmolLM2-135M.gguf --tasks piqa

A checkpoint is a folder that transformers writes (config.json and *.safetensors), a GGUF file or a
folder of its parts, or what export.py wrote. Each pre-trained MLP is a sum over its hidden units.
It is shared out among the levels, hidden unit by hidden unit, as the independent variant (NL 74)
with every mixing weight 1: a sum of narrower MLPs. So at the start, and with step size 0 for ever,
the model *is* the pre-trained one.
"""

import math
from pathlib import Path

import torch

from hope import Hope, HopeConfig
from support import gguf
from support.checkpoint import first_line, parse_json
from support.vocabulary import TOKENIZER


def from_pretrained(path, levels=None, **changes) -> Hope:
    """A Llama-family checkpoint as Hope-Attention with CMS levels, in eval mode (NL 7.3).

    levels: chunk lengths from fast to slow; None: 512 tokens and never. changes: further fields of
    HopeConfig, as cms_blocks, here the last quarter of the blocks, and cms_step, here 0.05: weights
    that were not trained to learn in context bear small steps only (docs/results.md). What
    export.py wrote is read as it was but for these. Weights become float32.
    ValueError for what is no such checkpoint, and for parts that have no place here.
    """
    config = read_config(path)
    if levels is not None:
        changes["levels"] = list(levels)
    if config.get("model_type") == "hope":
        return reopened(path, config, changes)
    check_parts(path, config)
    weights = read_weights(path)
    check_sizes(path, config, weights)
    try:
        own = {"model": "hope_attention", "variant": "independent", "cms_step": 0.05}
        own["levels"] = config.get("cms_levels", [512, None])  # an export says so
        own["cms_blocks"] = max(1, config["num_hidden_layers"] // 4)
        model = Hope(HopeConfig(**(own | sizes_of(config) | changes)))
        groups = config.get("num_key_value_heads") or model.config.n_heads
        model.load_state_dict(taken_from(weights, model, groups))
    except (KeyError, RuntimeError) as error:
        what = f"{path} is no checkpoint of the Llama family"
        raise ValueError(f"{what}: {first_line(error)}") from None
    left = [name for name in weights if not name.endswith("rotary_emb.inv_freq")]
    if left:
        what = f"{left[0]}, which has no place here"
        raise ValueError(f"{path} must have plain Llama weights, got {what}")
    return model.eval()


def reopened(path, config: dict, changes: dict) -> Hope:
    """What export.py wrote of a model that is no Llama. Errors of `from_pretrained`."""
    weights = read_weights(path)
    numbers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    try:
        own = HopeConfig(**(config["hope"] | changes))
        if len(numbers) != own.n_layers:
            raise ValueError(f"{path} must have {own.n_layers} blocks, got {len(numbers)}")
        with torch.device("meta"):  # nothing is allocated
            wanted = {name: [*w.shape] for name, w in Hope(own).state_dict().items()}
    except (KeyError, TypeError, RuntimeError) as error:  # the last: sizes beyond 64 bits
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"config.json of {path} is no export of Hope: {why}") from None
    check_shapes(path, weights, wanted | dict.fromkeys(weights.keys() - wanted, "nothing"))
    model = Hope(own)
    model.load_state_dict(weights)
    return model.eval()


# --------------------------------------------------------------------------------------------------
# Reading a checkpoint


def tokenizer_path(path) -> str:
    """What `tokenizer` finds that of a checkpoint by."""
    found = gguf_of(path)
    return str(found[0] if found else Path(path) / TOKENIZER)


def gguf_of(path) -> list:
    """The GGUF files that a checkpoint consists of; [] for one of transformers."""
    return [] if (Path(path) / "config.json").exists() else gguf.files(path)


def read_config(path) -> dict:
    """config.json, or what the header of a GGUF file says. ValueError where it cannot be read."""
    if gguf_of(path):
        return gguf.config(path)
    try:
        config = parse_json((Path(path) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable checkpoint: {first_line(error)}") from None
    if not isinstance(config, dict):
        got = f"got a {type(config).__name__}"
        raise ValueError(f"{Path(path) / 'config.json'} must hold names with values, {got}")
    return config


def read_weights(path) -> dict:
    """{name: tensor} of all weights. ValueError where they cannot be read."""
    weights = {}
    try:
        if gguf_of(path):
            return gguf.weights(path)
        from safetensors.torch import load_file

        for file in safetensors_of(Path(path)):
            weights |= load_file(file)
    except ImportError:
        install = "pip install safetensors"
        raise ValueError(f"reading a pre-trained checkpoint needs safetensors: {install}") from None
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{path} is no readable checkpoint: {first_line(error)}") from None
    for name, w in weights.items():
        if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            wanted = "float32, bfloat16 or float16"
            raise ValueError(f"{name} of {path} must be {wanted}, got {w.dtype}")
    return weights


def safetensors_of(folder: Path) -> list[Path]:
    """The files that the index names, where there is one: other files may be copies."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    names = parse_json(index.read_text())["weight_map"].values()
    return [folder / Path(name).name for name in sorted(set(names))]


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("intermediate_size", "num_key_value_heads")


def check_parts(path, config: dict) -> None:
    """ValueError for a part of the checkpoint that Hope-Attention does not have."""
    for name in SIZES:
        value = config.get(name)
        missing = value is None and name == "num_key_value_heads"  # as many as heads
        if not missing and (type(value) is not int or value < 1):
            wanted = "an integer of at least 1"
            raise ValueError(f"{name} of {path} must be {wanted}, got {value!r}")
    rope = rope_of(config)
    if not isinstance(rope, dict) or type(rope.get("rope_theta")) not in (int, float):
        raise ValueError(f"rope of {path} must be names with values, rope_theta a number")
    if rope["rope_type"] not in list(ROPES):  # it may be of any type
        wanted = f"one of {', '.join(ROPES)}"
        raise ValueError(f"rope type of {path} must be {wanted}, got {rope['rope_type']!r}")
    width = config["hidden_size"] // config["num_attention_heads"]
    family = config.get("model_type", "llama")
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1
    parts = {
        # others have the same names for weights, and other models; Mistral differs by its window
        "model_type": ("llama" if family == "mistral" else family, "llama"),
        "sliding_window": (config.get("sliding_window"), None),
        "partial_rotary_factor": (rotated, 1),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(config.get("attention_bias")), False),
        "mlp_bias": (bool(config.get("mlp_bias")), False),
        "head_dim": (config.get("head_dim") or width, width),
    }
    for name, (value, wanted) in parts.items():
        if value != wanted:
            raise ValueError(f"{name} of {path} must be {wanted!r}, got {value!r}")


def check_sizes(path, config: dict, weights: dict) -> None:
    """ValueError for sizes that the weights do not have, before a model is made of them."""
    d = config["hidden_size"]
    mlp = [config["intermediate_size"], d]
    wanted = {"model.embed_tokens.weight": [config["vocab_size"], d]}
    wanted[f"model.layers.{config['num_hidden_layers'] - 1}.mlp.gate_proj.weight"] = mlp
    check_shapes(path, weights, wanted)


def check_shapes(path, weights: dict, wanted: dict) -> None:
    for name, shape in wanted.items():
        have = [*weights[name].shape] if name in weights else "nothing"
        if have != shape:
            what = f"config.json says {name} is {shape}, the file has {have}"
            raise ValueError(f"{path} is no whole checkpoint: {what}")


def sizes_of(config: dict) -> dict:
    """The fields of HopeConfig that config.json of a Llama checkpoint says. KeyError."""
    rope = rope_of(config)
    width = config["hidden_size"] // config["num_attention_heads"]
    try:
        factors = ROPES[rope["rope_type"]](rope, width // 2)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"rope {rope} has no place here: {error!r}") from None
    return {
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "hidden": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"],
        "tied": config["tie_word_embeddings"],
        "rope_base": float(rope["rope_theta"]),
        "rope_factors": factors,
    }


def rope_of(config: dict) -> dict:
    """RoPE's settings, whose names and place differ between versions of transformers."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    return {"rope_theta": config.get("rope_theta", 10000.0)} | rope | {"rope_type": kind}


def llama3(rope: dict, pairs: int) -> list:
    """What Llama 3 divides each pair's frequency by: 1 where it turns often in the original length.

    By `factor` where it turns less than low_freq_factor times, in between by a mean of the two.
    """
    factors = []
    for j in range(pairs):
        length = rope["original_max_position_embeddings"]
        turns = length / (2 * math.pi) * rope["rope_theta"] ** (-j / pairs)
        low = rope["low_freq_factor"]
        share = (turns - low) / (rope["high_freq_factor"] - low)
        share = min(max(share, 0.0), 1.0)
        factors.append(1 / (share + (1 - share) / rope["factor"]))
    return factors


def listed(rope: dict, pairs: int) -> list:
    """Factors of their own. transformers has two lists, for short texts and for long ones."""
    if rope["short_factor"] != rope["long_factor"] or rope.get("attention_factor") != 1:
        raise ValueError("its short_factor must be its long_factor, and its attention_factor 1")
    return rope["long_factor"]


# What the frequencies are divided by, for each pair of channels.
ROPES = {
    "default": lambda rope, pairs: None,
    "linear": lambda rope, pairs: [float(rope["factor"])] * pairs,
    "llama3": llama3,
    "longrope": listed,
}


def taken_from(weights: dict, model: Hope, groups: int) -> dict:
    """The state dict of `model` from Llama's weights, which are taken out of `weights`. KeyError.

    groups: heads of keys and values; each is repeated for the query heads that share it.
    """
    config = model.config

    def heads(name, count):  # [n_heads, head width, d_model]
        w = weights.pop(name).float()
        if "v_proj" not in name:
            w = gguf.paired(w, count)
        return w.unflatten(0, (count, -1)).repeat_interleave(config.n_heads // count, 0)

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
        q = heads(old + "self_attn.q_proj.weight", config.n_heads)
        k = heads(old + "self_attn.k_proj.weight", groups)
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
