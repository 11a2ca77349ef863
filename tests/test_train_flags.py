"""The command line of training: names and defaults that users know, and rules between options."""

import logging
import shlex

import pytest

from common.flag_options import options_of, values_of
from common.flags import parse
from options.errors import UserError
from options.flags_fpack_train import FramePackTrainFlags, check_framepack_train
from options.step_count import StepCount

REFERENCE = """
    --dit path/to/dit_model --vae path/to/vae_model.safetensors --text_encoder1 path/to/text_encoder1
    --text_encoder2 path/to/text_encoder2 --image_encoder path/to/image_encoder_model.safetensors
    --dataset_config path/to/toml --sdpa --mixed_precision bf16
    --optimizer_type adamw8bit --learning_rate 2e-4 --gradient_checkpointing
    --timestep_sampling shift --weighting_scheme none --discrete_flow_shift 3.0
    --max_data_loader_n_workers 2 --persistent_data_loader_workers
    --network_module networks.lora_framepack --network_dim 32
    --max_train_epochs 16 --save_every_n_epochs 1 --seed 42
    --output_dir path/to/output_dir --output_name name-of-lora
"""
"""The command that the incumbent's guide to FramePack shows."""

NONE = """
config_file dataset_config compile_dynamic compile_cache_size_limit dynamo_mode max_train_epochs seed mixed_precision
save_precision logging_dir log_with log_prefix log_tracker_name wandb_run_name log_tracker_config wandb_api_key
ddp_timeout sample_every_n_steps sample_every_n_epochs sample_prompts lr_scheduler_timescale lr_scheduler_min_lr_ratio
blocks_to_swap min_timestep max_timestep num_timestep_buckets show_timesteps network_weights network_module network_dim
network_dropout training_comment scale_weight_norms output_dir output_name resume save_every_n_epochs save_every_n_steps
save_last_n_epochs save_last_n_epochs_state save_last_n_steps save_last_n_steps_state metadata_title metadata_author
metadata_description metadata_license metadata_tags metadata_reso metadata_arch huggingface_repo_id
huggingface_repo_type huggingface_path_in_repo huggingface_token huggingface_repo_visibility dit vae vae_dtype
text_encoder1 text_encoder2 vae_chunk_size vae_spatial_tile_sample_min_size image_encoder
""".split()
EMPTY = "optimizer_args lr_scheduler_args network_args base_weights base_weights_multiplier".split()
OFF = """
sdpa flash_attn sage_attn xformers flash3 split_attn compile compile_fullgraph cuda_allow_tf32 cuda_cudnn_benchmark
dynamo_fullgraph dynamo_dynamic persistent_data_loader_workers gradient_checkpointing gradient_checkpointing_cpu_offload
log_config ddp_gradient_as_bucket_view ddp_static_graph sample_at_first fp8_base use_pinned_memory_for_block_swap
block_swap_h2d_only img_in_txt_in_offloading disable_numpy_memmap preserve_distribution_shape no_metadata
dim_from_weights save_state save_state_on_train_end save_state_to_huggingface resume_from_huggingface async_upload
fp8_scaled fp8_llm vae_tiling bulk_decode f1 one_frame
""".split()
INCUMBENT_DEFAULTS = {
    **dict.fromkeys(NONE),
    **dict.fromkeys(EMPTY, ()),
    **dict.fromkeys(OFF, False),
    "compile_backend": "inductor",
    "compile_mode": "default",
    "dynamo_backend": "NO",
    "max_train_steps": 1600,
    "max_data_loader_n_workers": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_num_cycles": 1,
    "lr_scheduler_power": 1.0,
    "network_alpha": 1.0,
    "lr_scheduler_type": "",
    "learning_rate": 2e-6,
    "max_grad_norm": 1.0,
    "guidance_scale": 1.0,
    "discrete_flow_shift": 1.0,
    "sigmoid_scale": 1.0,
    "logit_std": 1.0,
    "lr_scheduler": "constant",
    "lr_warmup_steps": StepCount(value=0),
    "lr_decay_steps": StepCount(value=0),
    "block_swap_ring_size": 2,
    "timestep_sampling": "sigma",
    "weighting_scheme": "none",
    "logit_mean": 0.0,
    "mode_scale": 1.29,
    "latent_window_size": 9,
}
OUR_DEFAULTS = {"optimizer_type": "AdamW", "on_nan": "stop", "masked_loss": False, "checkpoint_blocks": None}


def train_flags(*argv: str) -> FramePackTrainFlags:
    return parse(FramePackTrainFlags, description="", argv=argv)


NEEDED = {
    "--dit": "dit.safetensors",
    "--dataset_config": "学習.toml",
    "--network_module": "networks.lora_framepack",
    "--output_dir": "出力",
    "--output_name": "猫",
}


def check(*argv: str, without: str = "") -> None:
    """Checks a command that has what every training needs, but for one flag."""
    needed = [part for name, value in NEEDED.items() if name != without for part in (name, value)]
    check_framepack_train(train_flags(*needed, *argv))


def complaint(*argv: str, without: str = "") -> str:
    with pytest.raises(UserError) as error:
        check(*argv, without=without)
    return str(error.value)


def test_the_reference_command_runs_as_written():
    flags = train_flags(*shlex.split(REFERENCE))
    check_framepack_train(flags)
    assert flags.models.image_encoder == "path/to/image_encoder_model.safetensors"
    assert (flags.optimizer.optimizer_type, flags.optimizer.learning_rate) == ("adamw8bit", 2e-4)
    assert (flags.timesteps.timestep_sampling, flags.timesteps.discrete_flow_shift) == ("shift", 3.0)
    assert (flags.network.network_dim, flags.run.max_train_epochs, flags.run.seed) == (32, 16, 42)
    assert (flags.run.mixed_precision, flags.data.max_data_loader_n_workers) == ("bf16", 2)
    assert flags.memory.gradient_checkpointing and flags.data.persistent_data_loader_workers and flags.attention.sdpa
    assert (flags.saving.save_every_n_epochs, flags.saving.output_name) == (1, "name-of-lora")


@pytest.mark.parametrize(
    "more",
    [
        *("--f1", "--one_frame", "--fp8", "--fp8_base --fp8_scaled", "--fp8_scaled", "--fp8_llm"),
        *("--split_attn", "--flash_attn", "--xformers --split_attn", "--blocks_to_swap 36"),
        "--latent_window_size 9 --vae_chunk_size 32 --vae_spatial_tile_sample_min_size 128",
    ],
)
def test_what_the_guide_adds_to_the_reference_command_runs_too(more):
    check_framepack_train(train_flags(*shlex.split(REFERENCE + more)))


def test_every_option_of_the_incumbent_has_its_default():
    values = dict(values_of(train_flags()))
    assert {name: values.get(name, "missing") for name in INCUMBENT_DEFAULTS} == INCUMBENT_DEFAULTS
    assert len(INCUMBENT_DEFAULTS) == 130  # all of them but --optimizer_type


def test_our_own_options_have_their_defaults():
    values = dict(values_of(train_flags()))
    assert {name: values[name] for name in OUR_DEFAULTS} == OUR_DEFAULTS


def test_no_name_is_taken_twice():
    names = [name for option in options_of(FramePackTrainFlags) for name in option.names]
    assert len(names) == len(set(names))


def test_no_option_is_for_later():
    assert [option.name for option in options_of(FramePackTrainFlags) if option.is_refused] == []


@pytest.mark.parametrize("name", NEEDED)
def test_what_every_training_needs_is_missed_at_the_start(name):
    check()
    message = complaint(without=name)
    assert message.startswith(f"{name}: got nothing; expected ") and "\n" not in message


def test_the_kind_of_lora_is_proposed():
    assert "give --network_module networks.lora_framepack" in complaint(without="--network_module")


def test_several_things_wrong_are_said_at_once():
    argv = ["--max_train_steps", "0", "--min_timestep", "1000", "--learning_rate", "0", "--metadata_reso", "x"]
    with pytest.raises(UserError) as error:
        check_framepack_train(train_flags(*argv))
    places = [line.split(":")[0] for line in str(error.value).splitlines()]
    assert set(places) == {
        *("--dit", "--dataset_config", "--network_module", "--output_dir"),
        *("--max_train_steps", "--min_timestep", "--learning_rate", "--metadata_reso"),
    }


def test_timesteps_can_be_shown_without_models_and_output():
    check_framepack_train(train_flags("--show_timesteps", "console"))
    with pytest.raises(UserError, match="--max_timestep"):
        check_framepack_train(train_flags("--show_timesteps", "console", "--max_timestep", "2000"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--max_train_steps 0", "--max_train_steps: got 0; expected 1 or more"),
        ("--max_train_epochs -1", "--max_train_epochs: got -1; expected 1 or more"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps: got 0"),
        ("--checkpoint_blocks 0", "--checkpoint_blocks: got 0"),
        ("--ddp_timeout 0", "--ddp_timeout: got 0"),
        ("--sample_every_n_steps 0", "--sample_every_n_steps: got 0; expected 1 or more"),
        ("--sample_every_n_epochs 0", "--sample_every_n_epochs: got 0; expected 1 or more"),
        ("--validation_dataset_config v.toml --validate_every_n_steps 0", "--validate_every_n_steps: got 0"),
        ("--validation_dataset_config v.toml --validate_every_n_epochs 0", "--validate_every_n_epochs: got 0"),
        ("--max_data_loader_n_workers -1", "--max_data_loader_n_workers: got -1; expected 0 or more"),
        ("--seed -1", "--seed: got -1; expected 0 to 9223372036854775807"),
        ("--seed 9223372036854775808", "--seed: got 9223372036854775808"),
        ("--guidance_scale nan", "--guidance_scale: got nan; expected a number from 0"),
        ("--guidance_scale inf", "--guidance_scale: got inf"),
        ("--guidance_scale -1", "--guidance_scale: got -1.0"),
        ("--scale_weight_norms 0", "--scale_weight_norms: got 0.0; expected a number above 0"),
        ("--scale_weight_norms nan", "--scale_weight_norms: got nan"),
        ("--base_weights a --base_weights_multiplier 1 2", "got 2 numbers; expected at most 1, as many as"),
        ("--base_weights_multiplier 1", "got 1 numbers; expected at most 0, as many as --base_weights"),
        ("--dim_from_weights", "--dim_from_weights: got no --network_weights"),
        ("--validate_every_n_steps 9", "--validation_dataset_config: got nothing"),
        ("--validate_every_n_epochs 1", "--validation_dataset_config: got nothing"),
        ("--latent_window_size 0", "--latent_window_size: got 0; expected 1 or more"),
        ("--vae_spatial_tile_sample_min_size 100", "--vae_spatial_tile_sample_min_size: got 100"),
        ("--vae_dtype bfloat16", "--vae_dtype: got bfloat16; expected one of float16"),
        ("--on_nan ignore", "--on_nan: got ignore; expected one of skip, stop"),
        ("--mixed_precision fp8", "--mixed_precision: got fp8; expected one of no, fp16, bf16"),
        ("--sage_attn", "--sage_attn: got SageAttention; expected an attention that has gradients; use --flash_attn"),
        ("--compile --compile_cache_size_limit 0", "--compile_cache_size_limit: got 0; expected 1 or more"),
        ("--compile --compile_mode fast", "--compile_mode: got fast; expected one of default, reduce-overhead"),
        ("--output_name a/b", "--output_name: got 'a/b'"),
        ("--lr_scheduler cosin", "--lr_scheduler: got cosin"),
        ("--async_upload", "--async_upload: got no repository"),
        ("--log_with tensorboard", "--log_with: got tensorboard"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(argv, message):
    found = complaint(*shlex.split(argv))
    assert message in found and "\n" not in found


TRIGGERS = ["--sample_at_first", "--sample_every_n_steps 100", "--sample_every_n_epochs 1"]
SAMPLE_MODELS = ["--vae", "--text_encoder1", "--text_encoder2", "--image_encoder"]


@pytest.mark.parametrize("trigger", TRIGGERS)
def test_samples_need_prompts_and_all_models(trigger):
    models = [part for name in SAMPLE_MODELS for part in (name, "模型")]
    argv = [*trigger.split(), "--sample_prompts", "プロンプト.txt", *models]
    check(*argv)
    flag = trigger.split()[0]
    assert complaint(*trigger.split(), *models).startswith(
        "--sample_prompts: got nothing; expected a file with prompts"
    )
    for name in SAMPLE_MODELS:
        place = argv.index(name)
        message = complaint(*argv[:place], *argv[place + 2 :])
        assert message == f"{name}: got nothing; expected a model, which {flag} needs; give {name} FILE"


def test_without_samples_only_the_transformer_is_needed():
    check("--max_train_steps", "10")


@pytest.mark.parametrize(
    ("argv", "warning"),
    [
        ("--img_in_txt_in_offloading", "--img_in_txt_in_offloading has no effect"),
        ("--ddp_static_graph", "--ddp_static_graph has no effect"),
        ("--ddp_gradient_as_bucket_view", "--ddp_gradient_as_bucket_view has no effect"),
        ("--persistent_data_loader_workers --max_data_loader_n_workers 0", "--persistent_data_loader_workers has no"),
        ("--sample_prompts a.txt", "--sample_prompts has no effect"),
        ("--network_weights a --dim_from_weights --network_dim 4", "--network_dim has no effect"),
        ("--save_last_n_epochs 3", "--save_last_n_epochs has no effect without --save_every_n_epochs"),
        ("--save_last_n_epochs_state 3", "--save_last_n_epochs_state has no effect without --save_every_n_epochs"),
        ("--save_last_n_steps 3", "--save_last_n_steps has no effect without --save_every_n_steps"),
        ("--save_last_n_steps_state 3", "--save_last_n_steps_state has no effect without --save_every_n_steps"),
        ("--lr_scheduler_power 2", "--lr_scheduler_power has no effect"),
        ("--timestep_sampling uniform --sigmoid_scale 2", "--sigmoid_scale 2.0 has no effect"),
        ("--sdpa --xformers", "--xformers has no effect beside --sdpa"),
        ("--flash3 --flash_attn", "--flash3 has no effect beside --flash_attn"),
        ("--compile_backend eager", "--compile_backend has no effect without --compile"),
        ("--block_swap_h2d_only", "--block_swap_h2d_only has no effect without --blocks_to_swap"),
        ("--use_pinned_memory_for_block_swap", "--use_pinned_memory_for_block_swap has no effect without --blocks_to"),
        ("--blocks_to_swap 0 --block_swap_h2d_only", "--block_swap_h2d_only has no effect without --blocks_to_swap"),
        ("--gradient_checkpointing_cpu_offload", "--gradient_checkpointing_cpu_offload has no effect without --grad"),
        ("--f1 --one_frame", "--one_frame is not expected to work with --f1"),
    ],
)
def test_what_has_no_effect_is_logged(argv, warning, caplog):
    check(*shlex.split(argv))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.message.startswith(warning)


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--sdpa",
        "--flash_attn --split_attn --compile --compile_mode max-autotune",
        "--dynamo_backend INDUCTOR --dynamo_mode reduce-overhead",
        "--blocks_to_swap 36 --use_pinned_memory_for_block_swap --block_swap_h2d_only --block_swap_ring_size 1",
        "--blocks_to_swap auto --gradient_checkpointing_cpu_offload",
        "--checkpoint_blocks 3 --gradient_checkpointing_cpu_offload",
        "--persistent_data_loader_workers --max_data_loader_n_workers 2",
        "--save_every_n_epochs 1 --save_last_n_epochs 3 --save_every_n_steps 10 --save_last_n_steps 20",
        "--base_weights a b --base_weights_multiplier 0.5",
        "--validation_dataset_config v.toml",
        "--network_weights a --dim_from_weights",
        "--f1 --sample_at_first --sample_prompts a --vae b --text_encoder1 c --text_encoder2 d --image_encoder e",
        "--one_frame",
        "--seed 9223372036854775807 --vae_dtype float16 --resume auto",
    ],
)
def test_what_works_is_not_complained_about(argv, caplog):
    check(*shlex.split(argv))
    assert caplog.records == []


def test_only_so_many_blocks_are_checkpointed():
    cases = {"": 0, "--gradient_checkpointing": 60, "--checkpoint_blocks 7": 7, "--checkpoint_blocks 60": 60}
    cases["--gradient_checkpointing --checkpoint_blocks 7"] = 7
    for argv, expected in cases.items():
        assert train_flags(*argv.split()).memory.num_checkpointed(60) == expected
    with pytest.raises(UserError, match="--checkpoint_blocks: got 61; expected at most 60"):
        train_flags("--checkpoint_blocks", "61").memory.num_checkpointed(60)


@pytest.mark.parametrize(
    ("argv", "backend", "flag"),
    [
        ("", "sdpa", "--sdpa"),
        ("--sdpa", "sdpa", "--sdpa"),
        ("--flash_attn", "flash", "--flash_attn"),
        ("--flash3", "flash3", "--flash3"),
        ("--xformers", "xformers", "--xformers"),
        ("--flash3 --xformers", "xformers", "--xformers"),
    ],
)
def test_the_first_kind_of_attention_counts(argv, backend, flag):
    attention = train_flags(*argv.split()).attention
    assert (attention.backend, attention.backend_flag) == (backend, flag)


def test_validation_is_done_each_epoch_unless_something_else_is_said():
    cases = {
        "": (None, None),
        "--validation_dataset_config v": (1, None),
        "--validation_dataset_config v --validate_every_n_epochs 3": (3, None),
        "--validation_dataset_config v --validate_every_n_steps 50": (None, 50),
        "--validation_dataset_config v --validate_every_n_steps 50 --validate_every_n_epochs 2": (2, 50),
    }
    for argv, expected in cases.items():
        validation = train_flags(*argv.split()).validation
        assert (validation.every_n_epochs, validation.validate_every_n_steps) == expected


def test_there_are_not_more_workers_than_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert [train_flags("--max_data_loader_n_workers", n).data.workers for n in ("0", "1", "8")] == [0, 1, 2]
