"""Generates pictures and videos with FramePack.

One picture from a start image ("one-frame inference"):

    python fpack_generate_video.py --dit FramePackI2V_HY --vae hunyuan_vae.safetensors --text_encoder1 llama.safetensors
        --text_encoder2 clip_l.safetensors --image_encoder sigclip_vision.safetensors --prompt "The girl smiles."
        --image_path start.png --control_image_path start.png --one_frame_inference no_2x,no_4x,target_index=9
        --video_size 640 640 --output_type images --save_path out --seed 1

For a video, leave out --one_frame_inference and --control_image_path, and give --video_seconds or --video_sections.
With LoRAs: --lora_weight style.safetensors --lora_multiplier 0.8; a prompt line may name its own with --lora.
For many prompts: --from_file prompts.txt, --interactive, or --sweep target_index=1..9.
"""

import sys
from collections.abc import Sequence

from common.flags import run_script
from options.flags_compile import check_compile
from options.flags_fpack_generate import FramePackGenerateFlags
from options.generate_checks import check_saved_model, log_hints
from options.lora import lora_choices


def open_pipeline(flags: FramePackGenerateFlags):
    """The pipeline, with all models' headers checked and no weight read."""
    from frame_pack.compute import Compute
    from frame_pack.loading import open_models
    from frame_pack.pipeline import FramePackPipeline
    from networks.lora_merge import plan_merge

    check_compile(flags.compilation, swaps=bool(flags.compute.blocks_to_swap))
    choices = lora_choices(flags.lora)
    checkpoints = open_models(flags.models, fp8=flags.compute.fp8_mode)
    merge = plan_merge(choices, checkpoints.transformer)
    tokenizers = (flags.models.tokenizer1, flags.models.tokenizer2)
    compute, keep = Compute.from_flags(flags.compute, flags.compilation), flags.series.interactive
    if flags.series.plan is None:
        compute.check_execution()
    else:
        compute = compute.planned(flags.compute)  # perhaps for another machine's GPU
    pipeline = FramePackPipeline(checkpoints, compute, tokenizers=tokenizers, keep_loaded=keep, merge=merge)
    log_hints(flags.compilation.hints())
    return pipeline


def decode_saved(flags: FramePackGenerateFlags) -> int:
    from frame_pack.decode_saved import decode_saved

    return decode_saved(flags)


def save_model(flags: FramePackGenerateFlags) -> None:
    from frame_pack.loading import open_transformer, save_fp8_transformer
    from networks.saved_model import save_model

    check_saved_model(flags, flags.models.dit)
    memmap = not flags.models.disable_numpy_memmap
    save_model(flags, lambda: open_transformer(flags.models.dit, memmap=memmap), save_fp8_transformer)


def generate(flags: FramePackGenerateFlags) -> int:
    if flags.lora.saved_model is not None:
        return save_model(flags)
    from frame_pack.config import FAMILY
    from generation.session import run_session

    return run_session(flags, family=FAMILY, open_pipeline=open_pipeline, decode_saved=decode_saved)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(FramePackGenerateFlags, generate, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
