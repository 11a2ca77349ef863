"""Wan's module names, as in the official checkpoints and, with a prefix, in ComfyUI's; and what diffusers calls them.

Source: the published checkpoints; diffusers' `convert_wan_transformer_to_diffusers`.
"""

from networks.module_names import NameTable, Renaming

BLOCK, EMBEDDER = "blocks.{}", "condition_embedder"
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
OF_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj"}
DIFFUSERS = {
    **{f"{BLOCK}.self_attn.{ours}": f"{BLOCK}.attn1.{theirs}" for ours, theirs in PROJECTIONS.items()},
    **{f"{BLOCK}.cross_attn.{ours}": f"{BLOCK}.attn2.{theirs}" for ours, theirs in (PROJECTIONS | OF_IMAGE).items()},
    f"{BLOCK}.ffn.0": f"{BLOCK}.ffn.net.0.proj",
    f"{BLOCK}.ffn.2": f"{BLOCK}.ffn.net.2",
    "text_embedding.0": f"{EMBEDDER}.text_embedder.linear_1",
    "text_embedding.2": f"{EMBEDDER}.text_embedder.linear_2",
    "time_embedding.0": f"{EMBEDDER}.time_embedder.linear_1",
    "time_embedding.2": f"{EMBEDDER}.time_embedder.linear_2",
    "time_projection.1": f"{EMBEDDER}.time_proj",
    "img_emb.proj.1": f"{EMBEDDER}.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": f"{EMBEDDER}.image_embedder.ff.net.2",
    "head.head": "proj_out",
}
"""Modules that have a matrix."""
DIFFUSERS_OTHERS = {
    f"{BLOCK}.modulation": f"{BLOCK}.scale_shift_table",
    f"{BLOCK}.norm3": f"{BLOCK}.norm2",
    **{f"{BLOCK}.self_attn.{norm}": f"{BLOCK}.attn1.{norm}" for norm in ("norm_q", "norm_k")},
    **{f"{BLOCK}.cross_attn.{norm}": f"{BLOCK}.attn2.{norm}" for norm in ("norm_q", "norm_k")},
    f"{BLOCK}.cross_attn.norm_k_img": f"{BLOCK}.attn2.norm_added_k",
    "img_emb.proj.0": f"{EMBEDDER}.image_embedder.norm1",
    "img_emb.proj.4": f"{EMBEDDER}.image_embedder.norm2",
    "img_emb.emb_pos": f"{EMBEDDER}.image_embedder.pos_embed",
    "head.modulation": "scale_shift_table",
}
"""Norms, and tensors that belong to no layer."""
IGNORED = f"{BLOCK}.attn2.norm_added_q"
"""In some of diffusers' files, and in none of its models."""

WAN_NAMES = NameTable(
    architecture="Wan",
    takes=("Wan",),
    modules=("patch_embedding", *DIFFUSERS),
    aliases={theirs: (ours,) for ours, theirs in DIFFUSERS.items()},
    aliases_of="diffusers'",
    others={theirs: ours for ours, theirs in DIFFUSERS_OTHERS.items()},
    to_diffusers=Renaming(DIFFUSERS),
    from_diffusers=Renaming({theirs: ours for ours, theirs in (DIFFUSERS | DIFFUSERS_OTHERS).items()}),
)
