"""What single tensor names in a LoRA file say: which module, which factor, in whose spelling; and whose LoRA it is not.

lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight         native
lycoris_transformer_blocks_0_attn_to_q.lokr_w1                    LyCORIS
transformer.transformer_blocks.0.attn.to_q.lora_A.weight          diffusers
diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight        ComfyUI, diffusion-pipe
base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight     PEFT
double_blocks.0.img_attn_qkv.lora_A.weight                        no prefix
diffusion_model.blocks.0.self_attn.q.diff_b                       a whole difference, of a bias
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from networks.deltas import ALPHA, DIFF, DOWN, UP

FLAT_PREFIXES = {"lora_unet_": "native", "lycoris_": "LyCORIS", "lora_transformer_": "flat"}
DOTTED_PREFIXES = {
    "base_model.model.": "PEFT",
    "model.diffusion_model.": "ComfyUI",
    "diffusion_model.": "ComfyUI",
    "transformer.": "diffusers",
    "unet.": "diffusers",
    "module.": "dotted",
    "model.": "dotted",
}
TEXT_ENCODERS = re.compile(r"((lora|lycoris)_te\d*_|text_encoder|text_model|clip_|te\d?[._]|t5)")
ADAPTER = r"(?:\.(?!(?:alpha|bias)$)[^.]+)?(?:\.weight)?"
"""What PEFT may put behind a factor's name: the adapter's name (`default`), `weight`, or both."""
PARTS = tuple(
    (re.compile(rf"(.+?){ending}"), part)
    for ending, part in (
        (r"\.lora_down(?:\.weight)?", DOWN),
        (r"\.lora_up(?:\.weight)?", UP),
        (rf"\.lora_A{ADAPTER}", DOWN),
        (rf"\.lora_B{ADAPTER}", UP),
        (r"[._]lora\.down\.weight", DOWN),
        (r"[._]lora\.up\.weight", UP),
        (r"\.lora_linear_layer\.down\.weight", DOWN),
        (r"\.lora_linear_layer\.up\.weight", UP),
        (rf"\.(hada_w[12]_[ab]){ADAPTER}", None),
        (rf"\.(lokr_w[12](?:_[ab])?){ADAPTER}", None),
        (r"\.alpha", ALPHA),
    )
)
DIFFERENCES = {".diff": "", ".diff_b": ".bias", ".diff_m": ".modulation"}
"""How keys of whole differences end -> what the changed tensor has behind the module's name; nothing for a weight."""
CHANGES_THE_RESULT = (
    (re.compile(r"\.(dora_scale|lora_magnitude_vector)\b"), "DoRA"),
    (re.compile(r"\.(lora_mid|hada_t[12]|lokr_t2)\b"), "a Tucker decomposition"),
    (re.compile(r"\.lora_(A|B|up|down)(\.[^.]+)?\.bias$"), "a bias"),
    (re.compile(r"\.(set_weight|w_norm|b_norm)$"), "a whole weight or bias"),
    (re.compile(r"\.reshape_weight$"), "a weight of another shape"),
)
"""Tensors without which the others would give something else than what was trained."""
FOREIGN = (
    (re.compile(r"transformer_blocks_\d+_(img|txt)_(mlp|mod)"), "Qwen-Image"),
    (re.compile(r"transformer_blocks_\d+_attn[12]_"), "LTX-Video or CogVideoX"),
    (re.compile(r"joint_(transformer_)?blocks_\d+_"), "Stable Diffusion 3"),
    (re.compile(r"layers_\d+_(attention|feed_forward)_"), "Z-Image or Lumina"),
    (re.compile(r"(unet_)?(down|up|input|middle|output|mid)_blocks?_"), "Stable Diffusion"),
)
"""How flat module names begin that only this family has."""
FOREIGN_BASES = {
    **{"sdxl": "Stable Diffusion XL", "stable-diffusion-xl": "Stable Diffusion XL", "sd3": "Stable Diffusion 3"},
    **{"stable-diffusion": "Stable Diffusion", "sd_v": "Stable Diffusion", "flux": "Flux", "qwen": "Qwen-Image"},
    **{"wan": "Wan", "z-image": "Z-Image", "ltx": "LTX-Video"},
}
"""Parts of what trainers write into the metadata about the base model."""
SAME_NAMES = {(19, 38): "Flux", (60, 0): "Qwen-Image"}
"""Numbers of double and single blocks of models whose modules carry HunyuanVideo's names and sizes."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One tensor name, taken apart."""

    text: str
    """As the file has it."""
    module: str
    """What stands before the factor's name, prefix included; of a difference that is no weight's, the tensor's name."""
    part: str
    """The factor's native name, `alpha` or `diff`."""
    ending: str
    """The part as the file spells it."""


def parse_key(text: str) -> Key | None:
    """None for a name that is no factor's, no alpha and no difference."""
    for ending, leaf in DIFFERENCES.items():
        if text.endswith(ending):
            return Key(text=text, module=text.removesuffix(ending) + leaf, part=DIFF, ending=ending)
    for pattern, part in PARTS:
        if found := pattern.fullmatch(text):
            return Key(text=text, module=found[1], part=part or found[2], ending=text[found.end(1) :])
    return None


def is_text_encoder(text: str) -> bool:
    return TEXT_ENCODERS.match(text) is not None


def unsupported(text: str) -> str | None:
    """What this tensor would ask for, when it changes what the module does and we cannot do it."""
    return next((name for pattern, name in CHANGES_THE_RESULT if pattern.search(text)), None)


def spelling(module: str) -> str:
    """Whose prefix `module` carries."""
    prefixes = FLAT_PREFIXES | DOTTED_PREFIXES
    return next((name for prefix, name in prefixes.items() if module.startswith(prefix)), "dotted")


def without_prefixes(module: str) -> Iterator[str]:
    """`module` with no, one, two … known prefixes taken off, in its own spelling.

    More than one candidate, because `transformer.blocks.…` may be a prefix with `blocks`, or FramePack's
    `transformer_blocks` as older converters wrote it.
    """
    for prefix in FLAT_PREFIXES:
        if module.startswith(prefix):
            yield module.removeprefix(prefix)
            return
    rest: str | None = module
    while rest is not None:
        yield rest
        rest = next((rest.removeprefix(p) for p in DOTTED_PREFIXES if rest.startswith(p)), None)


def foreign_family(flat_names: Iterable[str]) -> str | None:
    """The family whose module names these are, if they give it away."""
    return next((family for name in flat_names for mark, family in FOREIGN if mark.match(name)), None)


def foreign_twin(dotted_names: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """The family whose LoRA this is though its names and sizes are HunyuanVideo's, told from metadata or block counts.

    Args:
        dotted_names: FramePack's.
    """
    base = " ".join(metadata.get(key, "") for key in ("modelspec.architecture", "ss_base_model_version")).lower()
    if "hunyuan" in base or "framepack" in base:
        return None
    if family := next((family for mark, family in FOREIGN_BASES.items() if mark in base), None):
        return family
    names = list(dotted_names)
    counts = (_num_blocks(names, "transformer_blocks"), _num_blocks(names, "single_transformer_blocks"))
    return SAME_NAMES.get(counts)


def _num_blocks(names: list[str], stack: str) -> int:
    """The highest number of a block of this stack, plus one."""
    numbers = (re.match(rf"{stack}\.(\d+)\.", name) for name in names)
    return max((int(number[1]) + 1 for number in numbers if number), default=0)
