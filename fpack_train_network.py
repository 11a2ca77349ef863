"""Trains a LoRA, LoHa or LoKr for FramePack on cached data sets.

    accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 fpack_train_network.py
        --dit FramePackI2V_HY_bf16.safetensors --dataset_config data.toml --network_module networks.lora_framepack
        --network_dim 32 --mixed_precision bf16 --optimizer_type adamw8bit --learning_rate 2e-4 --gradient_checkpointing
        --timestep_sampling shift --weighting_scheme none --discrete_flow_shift 3.0 --max_train_epochs 16
        --save_every_n_epochs 1 --seed 42 --output_dir out --output_name my_lora

The caches are made before, by fpack_cache_latents.py and fpack_cache_text_encoder_outputs.py. With --save_state, a run
that was stopped goes on exactly with --resume auto.
"""

import sys
from collections.abc import Sequence

from common.flags import run_script
from options.flags_fpack_train import FramePackTrainFlags, check_framepack_train


def train(flags: FramePackTrainFlags) -> int:
    check_framepack_train(flags)
    from training.session import run_training

    return run_training(flags, open_architecture)


def open_architecture(flags: FramePackTrainFlags):
    from frame_pack.architecture import FramePackArchitecture

    return FramePackArchitecture.open(flags)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(FramePackTrainFlags, train, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
