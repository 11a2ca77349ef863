"""The command line of Wan's training: names and defaults that users know, and the rules that are Wan's own."""

import logging
import shlex

import pytest

from common.flag_options import options_of, values_of
from common.flags import parse
from options.errors import UserError
from options.flags_wan_train import WanTrainFlags, check_wan_train
from options.wan_tasks import TASKS, find_task
from tests.test_train_flags import INCUMBENT_DEFAULTS, NEEDED

FRAMEPACK_ALONE = """
text_encoder1 text_encoder2 image_encoder vae_tiling vae_chunk_size vae_spatial_tile_sample_min_size latent_window_size
bulk_decode f1 fp8_llm
""".split()
COMMON = {name: value for name, value in INCUMBENT_DEFAULTS.items() if name not in FRAMEPACK_ALONE}
DEFAULTS = COMMON | {
    "task": find_task("t2v-14B"),
    "t5": None,
    "clip": None,
    "vae_dtype": None,
    "fp8_t5": False,
    "vae_cache_cpu": False,
    "one_frame": False,
}
OURS = {"ckpt_dir": None, "t5_tokenizer": None, "one_frame_target_loss_only": False}
WAN22 = ("force_v2_1_time_embedding", "dit_high_noise f", "timestep_boundary 900", "offload_inactive_dit")
REFERENCE = """
    --task i2v-14B --dit path/to/dit --vae path/to/vae --t5 path/to/t5 --clip path/to/clip --vae_dtype bfloat16
    --dataset_config path/to/toml --sdpa --mixed_precision bf16 --fp8_base --fp8_scaled --fp8_t5 --vae_cache_cpu
    --optimizer_type adamw8bit --learning_rate 2e-4 --gradient_checkpointing --blocks_to_swap 39
    --timestep_sampling shift --weighting_scheme none --discrete_flow_shift 3.0
    --max_data_loader_n_workers 2 --persistent_data_loader_workers
    --network_module networks.lora_wan --network_dim 32 --one_frame --sample_prompts 例.txt --sample_every_n_epochs 1
    --max_train_epochs 16 --save_every_n_epochs 1 --seed 42 --output_dir path/to/output_dir --output_name name-of-lora
"""


def train_flags(*argv: str) -> WanTrainFlags:
    return parse(WanTrainFlags, description="", argv=argv)


def check(*argv: str, without: str = "") -> None:
    needed = [part for name, value in NEEDED.items() if name != without for part in (name, value)]
    check_wan_train(train_flags(*needed, *argv))


def complaint(*argv: str, without: str = "") -> str:
    with pytest.raises(UserError) as error:
        check(*argv, without=without)
    return str(error.value)


def test_every_option_of_the_incumbent_has_its_default() -> None:
    values = dict(values_of(train_flags()))
    assert {name: values.get(name, "missing") for name in DEFAULTS | OURS} == DEFAULTS | OURS
    assert len(DEFAULTS) == 125  # all of them but --optimizer_type
    assert not set(FRAMEPACK_ALONE) & values.keys()


def test_no_name_is_taken_twice() -> None:
    names = [name for option in options_of(WanTrainFlags) for name in option.names]
    assert len(names) == len(set(names))


def test_a_whole_command_is_taken_as_it_is_written(caplog) -> None:
    flags = train_flags(*shlex.split(REFERENCE))
    check_wan_train(flags)
    assert flags.wan.task.name == "i2v-14B" and flags.models.clip == "path/to/clip" and flags.wan.one_frame
    assert (flags.memory.fp8_mode, flags.memory.blocks_to_swap.value, flags.wan.vae_dtype) == ("scaled", 39, "bfloat16")
    assert caplog.records == []


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_every_task_of_the_family_is_known(task) -> None:
    assert train_flags("--task", task.name).wan.task is task


@pytest.mark.parametrize("option", WAN22)
def test_options_of_the_next_version_are_answered(option: str) -> None:
    with pytest.raises(UserError, match=rf"--{option.split()[0]}: .*not supported: Wan2\.1 only"):
        train_flags(*f"--{option}".split())


@pytest.mark.parametrize("task", ["t2v-A14B", "i2v-A14B"])
def test_tasks_of_the_next_version_are_answered(task: str) -> None:
    with pytest.raises(UserError, match=rf"--task: got {task}; .*not supported: Wan2\.1 only"):
        train_flags("--task", task)


def test_what_every_training_needs_is_missed_at_the_start() -> None:
    for name in NEEDED:
        assert complaint(without=name).startswith(f"{name}: got nothing; expected ")
    assert "give --network_module networks.lora_wan" in complaint(without="--network_module")
    check("--ckpt_dir", "release", without="--dit")


@pytest.mark.parametrize("flag", ["--one_frame", "--one_frame_target_loss_only"])
@pytest.mark.parametrize("task", TASKS, ids=str)
def test_one_frame_options_are_for_models_that_see_pictures(flag: str, task) -> None:
    if task.name in ("i2v-14B", "flf2v-14B"):
        check(flag, "--task", task.name)
        return
    message = complaint(flag, "--task", task.name)
    assert message.startswith(f"{flag}: got --task {task.name}; expected an image-to-video task; use --task i2v-14B or")
    assert "\n" not in message


@pytest.mark.parametrize("task", ["t2v-1.3B", "i2v-14B", "i2v-14B-FC", "t2v-14B-FC"])
def test_samples_need_the_models_of_their_task(task: str) -> None:
    names = ["vae", "t5", *(["clip"] if task.startswith("i2v") else [])]
    argv = ["--task", task, "--sample_at_first", "--sample_prompts", "例.txt"]
    given = [part for name in names for part in (f"--{name}", "模型")]
    check(*argv, *given)
    lines = complaint(*argv).splitlines()
    assert [line.split(":")[0] for line in lines] == [f"--{name}" for name in names]
    assert all("which --sample_at_first needs" in line for line in lines)
    check(*argv, "--ckpt_dir", "release")


@pytest.mark.parametrize(
    ("argv", "warning"),
    [
        ("--guidance_scale 3", "--guidance_scale has no effect"),
        ("--img_in_txt_in_offloading", "--img_in_txt_in_offloading has no effect"),
    ],
)
def test_what_has_no_effect_is_logged(argv: str, warning: str, caplog) -> None:
    check(*argv.split())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.message.startswith(warning)


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", "float16", "fp16", "float32", "fp32"])
def test_the_vae_computes_in_what_it_is_told(dtype: str, caplog) -> None:
    check("--vae_dtype", dtype)
    assert caplog.records == []
    with pytest.raises(UserError, match="--vae_dtype: got fp8"):
        train_flags("--vae_dtype", "fp8")
