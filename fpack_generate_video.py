"""Generates pictures and videos with FramePack.

One picture from a start image ("one-frame inference"):

    python fpack_generate_video.py --dit FramePackI2V_HY --vae hunyuan_vae.safetensors --text_encoder1 llama.safetensors
        --text_encoder2 clip_l.safetensors --image_encoder sigclip_vision.safetensors --prompt "The girl smiles."
        --image_path start.png --control_image_path start.png --one_frame_inference no_2x,no_4x,target_index=9
        --video_size 640 640 --output_type images --save_path out --seed 1

For a video, leave out --one_frame_inference and --control_image_path, and give --video_seconds or --video_sections.
"""

import sys
from collections.abc import Sequence

from common.flags import run_script
from options.flags_fpack_generate import FramePackGenerateFlags


def generate(flags: FramePackGenerateFlags) -> int:
    """Checks everything, then loads and generates. Returns the exit code."""
    from common.media import image_size
    from generation.check import check_output, check_request, check_vae_memory
    from options.request import resolve_request

    check_vae_memory(flags.compute)
    if flags.output.latent_path:
        from frame_pack.decode_saved import decode_saved

        return decode_saved(flags)
    request = resolve_request(flags.request, image_size=lambda path: image_size(path, flag="--control_image_path"))
    check_request(request)
    check_output(flags.output)

    from frame_pack.loading import open_models
    from frame_pack.pipeline import Compute, FramePackPipeline
    from generation.runner import run

    tokenizers = (flags.models.tokenizer1, flags.models.tokenizer2)
    checkpoints = open_models(flags.models)
    pipeline = FramePackPipeline(checkpoints, Compute.from_flags(flags.compute), tokenizers=tokenizers)
    return 1 if run(pipeline, [request], flags.output) else 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(FramePackGenerateFlags, generate, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
