"""A Llama checkpoint as Hope-Attention (NL 7.3)."""

import json
from pathlib import Path

import torch

from hope import Hope, HopeConfig
from support.checkpoint import first_line


def from_pretrained(folder, levels=(512, None), **changes):
    """A Llama-family checkpoint (config.json, *.safetensors) as Hope-Attention whose MLPs are CMS levels (NL 7.3).

    levels: chunk lengths from fast to slow. Each pre-trained MLP is shared out among them, hidden unit by hidden unit,
    as the independent variant with every mixing weight 1: a sum of narrower MLPs, so that at the start, and with step
    size 0 for ever, this *is* the pre-trained model. changes: further fields of HopeConfig, as cms_step. Weights are
    read to float32. Grouped keys and values are repeated for each of their heads.
    Deviation: NL gives every level pre-trained MLPs of its own; here every block has all levels.
    Raises ValueError for what is no such checkpoint, and for parts that have no place here.
    """
    try:
        from safetensors.torch import load_file as load_safetensors
    except ImportError:
        raise ValueError("reading a pre-trained checkpoint needs safetensors: pip install safetensors") from None
    folder = Path(folder)
    try:
        llama = json.loads((folder / "config.json").read_text())
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_safetensors(file)
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{folder} is no readable checkpoint: {first_line(error)}") from None
    rope = llama.get("rope_parameters") or llama.get("rope_scaling") or {}
    foreign = {
        "rope type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "hidden_act": (llama.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(llama.get("attention_bias")), False),
        "mlp_bias": (bool(llama.get("mlp_bias")), False),
    }
    for name, (value, legal) in foreign.items():
        if value != legal:
            raise ValueError(f"{folder} has {name} {value!r}; legal is {legal!r}")
    try:
        n, d, H = llama["num_hidden_layers"], llama["hidden_size"], llama["num_attention_heads"]
        groups, eps, tied = llama.get("num_key_value_heads") or H, llama["rms_norm_eps"], llama["tie_word_embeddings"]
        sizes = dict(vocab_size=llama["vocab_size"], d_model=d, n_layers=n, n_heads=H, hidden=llama["intermediate_size"])
        if (llama.get("head_dim") or d // H) * H != d:
            raise ValueError(f"{folder} has head_dim {llama['head_dim']}; legal is hidden_size / heads, {d // H}")
        base = float(rope.get("rope_theta") or llama.get("rope_theta", 10000.0))
        own = dict(model="hope_attention", levels=list(levels), variant="independent")
        model = Hope(HopeConfig(**(sizes | own | dict(norm_eps=eps, tied=tied, rope_base=base) | changes)))

        def heads(name, count):  # [count, head width, d], keys and values repeated for every head of their group
            return weights.pop(name).float().view(count, -1, d).repeat_interleave(H // count, 0)

        def paired(w):  # RoPE there turns channels i and i + width / 2 together, here neighbours
            return w.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

        new = {"embedding.weight": weights.pop("model.embed_tokens.weight")}
        new["norm.weight"] = weights.pop("model.norm.weight")
        if not tied:
            new["head.weight"] = weights["lm_head.weight"]
        weights.pop("lm_head.weight", None)
        for i in range(n):
            old, at = f"model.layers.{i}.", f"blocks.{i}."
            q, k, v = (heads(f"{old}self_attn.{x}_proj.weight", c) for x, c in (("q", H), ("k", groups), ("v", groups)))
            new[at + "norm.weight"] = weights.pop(old + "input_layernorm.weight")
            new[at + "mixer.qkv.weight"] = torch.cat([paired(q), paired(k), v]).flatten(0, 1)
            new[at + "mixer.out.weight"] = weights.pop(old + "self_attn.o_proj.weight")
            norm = weights.pop(old + "post_attention_layernorm.weight")
            gate, up, down = (weights.pop(f"{old}mlp.{x}_proj.weight") for x in ("gate", "up", "down"))
            parts = (gate.chunk(len(levels)), up.chunk(len(levels)), down.chunk(len(levels), 1))
            for level, (gate, up, down) in enumerate(zip(*parts, strict=True)):
                mlp = f"{at}cms.mlps.{level}."
                new |= {mlp + "norm.weight": norm, mlp + "w_in": torch.cat([gate, up]), mlp + "w_out": down}
            new[at + "cms.mix"] = torch.ones(len(levels))
            if model.config.cms_step is not None:
                new[at + "cms.log_step"] = model.blocks[i].cms.log_step.detach()
        model.load_state_dict(new)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{folder} is no checkpoint of the Llama family: {first_line(error)}") from None
    if left := [name for name in weights if not name.endswith("rotary_emb.inv_freq")]:
        raise ValueError(f"{folder} has {left[0]}, which has no place here; legal are plain Llama weights")
    return model.eval()
