"""Trains a LoRA, LoHa or LoKr for Wan2.1 on cached data sets.

    accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 wan_train_network.py --task i2v-14B
        --dit wan2.1_i2v_480p_14B_bf16.safetensors --dataset_config data.toml --network_module networks.lora_wan
        --network_dim 32 --mixed_precision bf16 --optimizer_type adamw8bit --learning_rate 2e-4 --gradient_checkpointing
        --timestep_sampling shift --weighting_scheme none --discrete_flow_shift 3.0 --max_train_epochs 16
        --save_every_n_epochs 1 --seed 42 --output_dir out --output_name my_lora

The caches are made before, by wan_cache_latents.py and wan_cache_text_encoder_outputs.py; those of one-frame training
with --one_frame, for --task i2v-14B or flf2v-14B. With --save_state, a run that was stopped goes on exactly with
--resume auto.
"""

import sys
from collections.abc import Sequence

from common.flags import run_script
from options.flags_wan_train import WanTrainFlags, check_wan_train


def train(flags: WanTrainFlags) -> int:
    check_wan_train(flags)
    from training.session import run_training

    return run_training(flags, open_architecture)


def open_architecture(flags: WanTrainFlags):
    from wan.architecture import WanArchitecture

    return WanArchitecture.open(flags)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(WanTrainFlags, train, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
