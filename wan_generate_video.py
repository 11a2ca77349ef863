"""Generates videos and pictures with Wan2.1.

A video from a start image:

    python wan_generate_video.py --task i2v-14B --dit wan2.1_i2v_480p_14B_bf16.safetensors --vae Wan2.1_VAE.pth
        --t5 models_t5_umt5-xxl-enc-bf16.pth --clip models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth
        --prompt "The girl smiles." --image_path start.png --video_size 480 832 --save_path out --seed 1

One picture ("one-frame inference"), with a LoRA that was trained for it: add --lora_weight edit.safetensors
--control_image_path start.png --one_frame_inference target_index=1,control_index=0 --output_type images.
From a text alone: --task t2v-14B, without --clip and --image_path.
For many prompts: --from_file prompts.txt, --interactive, or --sweep target_index=1..9.
"""

import sys
from collections.abc import Sequence

from common.flags import run_script
from options.flags_compile import check_compile
from options.flags_wan_generate import WanGenerateFlags
from options.generate_checks import check_saved_model, log_hints
from options.lora import lora_choices
from options.wan_tasks import width_hint


def open_pipeline(flags: WanGenerateFlags):
    """The pipeline, with all models' headers checked and no weight read."""
    from networks.lora_merge import plan_merge
    from wan.checkpoints import from_release, open_models
    from wan.compute import Compute
    from wan.config import WanConfig
    from wan.pipeline import WanPipeline

    check_compile(flags.compilation, swaps=bool(flags.compute.blocks_to_swap))
    models, task = from_release(flags.models), flags.request.task
    checkpoints = open_models(models, task, fp8=flags.compute.fp8_mode)
    merge = plan_merge(lora_choices(flags.lora), checkpoints.transformer)
    compute, keep = Compute.from_flags(flags.compute, flags.compilation), flags.series.interactive
    if flags.series.plan is None:
        compute.check_execution()
    else:
        compute = compute.planned(flags.compute)  # perhaps for another machine's GPU
    pipeline = WanPipeline(checkpoints, compute, tokenizer=models.t5_tokenizer, keep_loaded=keep, merge=merge)
    width = WanConfig.from_checkpoint(checkpoints.transformer).width
    log_hints([*flags.compilation.hints(), *flags.request.guidance_hints(), width_hint(task, width)])
    return pipeline


def decode_saved(flags: WanGenerateFlags) -> int:
    from wan.decode_saved import decode_saved

    return decode_saved(flags)


def save_model(flags: WanGenerateFlags) -> None:
    from networks.saved_model import save_model
    from wan.checkpoints import from_release, open_task_transformer
    from wan.loading import save_fp8_transformer

    models = from_release(flags.models)
    check_saved_model(flags, models.dit)
    save_model(flags, lambda: open_task_transformer(models, flags.request.task), save_fp8_transformer)


def generate(flags: WanGenerateFlags) -> int:
    if flags.lora.saved_model is not None:
        return save_model(flags)
    from generation.session import run_session
    from wan.family import FAMILY

    return run_session(flags, family=FAMILY, open_pipeline=open_pipeline, decode_saved=decode_saved)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(WanGenerateFlags, generate, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
