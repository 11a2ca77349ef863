"""The settings that a saved latent carries, under the names that users' files have, and what decoding reads of them."""

from __future__ import annotations

from collections.abc import Mapping

from options.request import GenerationRequest


def latent_metadata(request: GenerationRequest) -> dict[str, str]:
    """Strings for the safetensors header. Source: the incumbent's latent files."""
    sections = ";;;".join(f"{index}:{prompt}" for index, prompt in request.prompts.items())
    values = {
        "seeds": request.seed,
        "prompt": request.prompts[0] if len(request.prompts) == 1 else sections,
        "height": request.height,
        "width": request.width,
        "video_seconds": request.num_sections * request.latent_window_size * 4 / 30,
        "infer_steps": request.num_steps,
        "guidance_scale": request.cfg_scale,
        "latent_window_size": request.latent_window_size,
        "embedded_cfg_scale": request.distilled_guidance,
        "guidance_rescale": request.cfg_rescale,
        "sample_solver": "unipc",
        "fps": request.fps,
    }
    if request.negative_prompt:
        values["negative_prompt"] = request.negative_prompt
    return {name: str(value) for name, value in values.items()}


def stored_integer(metadata: Mapping[str, str], name: str, default: int) -> int:
    """An integer from a file's metadata; `default` when it is missing or not one."""
    text = metadata.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else default
