"""What Wan is asked for, from flags and prompt lines to a request, and what is refused on the way."""

import json
from dataclasses import fields, replace

import pytest

from common.flag_options import options_of
from common.flags import parse
from options.errors import UserError
from options.flags_wan_generate import Wan22Flags, WanGenerateFlags
from options.guidance import GuidanceOptions, SkipLayers
from options.prompt_line import PromptLine
from options.wan_request import WanRequest, WanRequestFlags
from options.wan_tasks import NEGATIVE_PROMPT, TASKS, find_task

I2V = {"task": find_task("i2v-14B"), "image_path": "始.png"}
FLF2V = {"task": find_task("flf2v-14B"), "image_path": "始.png", "end_image_path": "終.png"}
CONTROL = {"task": find_task("t2v-1.3B-FC"), "control_path": "動.mp4"}
ONE_FRAME = {**I2V, "one_frame_inference": "target_index=1,control_index=0", "control_image_path": ("a.png",)}
FLAGS = WanRequestFlags(prompt="猫", seed=3)


def request(size: tuple[int, int] = (1000, 800), **changes) -> WanRequest:
    return replace(FLAGS, **changes).resolve(image_size=lambda path, flag: size)


@pytest.mark.parametrize(
    ("task", "size", "steps", "shift", "frames"),
    [
        ("t2v-14B", (480, 832), 50, 5.0, 81),
        ("t2v-1.3B", (832, 480), 50, 5.0, 81),
        ("t2i-14B", (480, 832), 50, 5.0, 1),
        ("i2v-14B", (480, 832), 40, 3.0, 81),
        ("i2v-14B", (832, 480), 40, 3.0, 81),
        ("i2v-14B", (720, 1280), 40, 5.0, 81),
        ("flf2v-14B", (480, 832), 40, 5.0, 81),
    ],
)
def test_what_is_left_open_is_the_tasks(task, size, steps, shift, frames):
    images = {name: path for name, path in FLF2V.items() if name != "task"} if task.startswith("flf2v") else {}
    images = {"image_path": "始.png"} if task.startswith("i2v") else images
    made = request(task=find_task(task), video_size=size, **images)
    assert (made.num_steps, made.flow_shift, made.num_frames, made.cfg_scale) == (steps, shift, frames, 5.0)
    assert made.negative_prompt.endswith(NEGATIVE_PROMPT) and made.fps == 16
    assert made.is_picture == (frames == 1)


def test_what_is_said_counts_also_an_empty_negative_prompt():
    made = request(infer_steps=7, flow_shift=2.5, guidance_scale=1.0, video_length=10, negative_prompt="")
    assert (made.num_steps, made.flow_shift, made.cfg_scale, made.negative_prompt) == (7, 2.5, 1.0, "")
    assert made.num_frames == 9 and made.num_latent_frames == 3, "frames that make no whole latent are left out"


def test_the_start_image_gives_the_aspect_ratio_and_the_size_the_area():
    assert (request(**I2V, video_size=(480, 832)).width, request(**I2V, video_size=(480, 832)).height) == (704, 560)
    assert not request(**I2V).crops_images
    exact = request(**I2V, video_size=(480, 832), exact_size=True)
    assert (exact.height, exact.width, exact.crops_images) == (480, 832, True)
    fitting = request((832, 480), **I2V, video_size=(480, 832))
    assert (fitting.height, fitting.width) == (480, 832), "nothing is taken from a picture of that size"
    text = request(video_size=(480, 832))
    assert (text.height, text.width) == (480, 832)


def test_the_size_of_one_frame_is_of_what_clip_sees():
    asked = []

    def image_size(path: str, *, flag: str) -> tuple[int, int]:
        asked.append((flag, path))
        return 100, 100

    replace(FLAGS, **ONE_FRAME).resolve(image_size=image_size)
    replace(FLAGS, **{**ONE_FRAME, "image_path": None}).resolve(image_size=image_size)
    assert asked == [("--image_path", "始.png"), ("--control_image_path", "a.png")]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**I2V, "lora": ("x.safetensors:0.5",), "sample_solver": "dpm++", "cpu_noise": True, "trim_tail_frames": 3},
        {**FLF2V, "slg_mode": "uncond", "slg_layers": "9,10", "cfg_skip_mode": "late", "cfg_apply_ratio": 0.5},
        CONTROL,
        {**ONE_FRAME, "control_image_mask_path": ("m.png",), "fps": 24},
    ],
)
def test_every_field_of_a_request_survives_the_way_through_json(changes):
    original = request(**changes)
    data = json.loads(json.dumps(original.to_json(refer=lambda path: f"#{path}")))
    assert WanRequest.from_json(data, find=lambda key: key.removeprefix("#")) == original
    assert set(data) == {field.name for field in fields(WanRequest)}
    original.check()


def test_paths_are_referred_to_wherever_they_stand():
    data = request(**CONTROL).to_json(refer=lambda path: "x")
    assert data["control_path"] == "x"
    data = request(**{**ONE_FRAME, "control_image_mask_path": ("m",), "end_image_path": "e"}).to_json(refer=len)
    assert (data["image_path"], data["end_image_path"]) == (5, 1)
    assert (data["control_image_paths"], data["control_mask_paths"]) == ([5], [1])


@pytest.mark.parametrize(("changes", "where", "words"), [
    ({"one_frame_inference": "target_index=1,control_index=0"}, "--one_frame_inference", "use --task i2v-14B"),
    ({"task": find_task("i2v-14B")}, "--image_path", "give --image_path"),
    ({**FLF2V, "end_image_path": None}, "--end_image_path", "last frame"),
    ({**FLF2V, "video_length": 4}, "--video_length", "5 frames or more"),
    ({"image_path": "a.png"}, "--image_path", "i2v-14B"),
    ({"end_image_path": "a.png"}, "--end_image_path", "starts from a text"),
    ({"task": find_task("t2v-14B-FC")}, "--control_path", "give --control_path"),
    ({**I2V, "control_path": "a.mp4"}, "--control_path", "Fun-Control task"),
    ({**I2V, "control_image_path": ("a",)}, "--control_image_path", "--one_frame_inference"),
    ({"task": find_task("t2i-14B"), "video_length": 5}, "--video_length", "t2v-14B"),
    ({"trim_tail_frames": 81}, "--trim_tail_frames", "less than 81"),
    ({"video_length": 80, "trim_tail_frames": 79}, "--trim_tail_frames", "less than 77"),
    ({**ONE_FRAME, "trim_tail_frames": 1}, "--trim_tail_frames", "0 for one frame"),
    ({"flow_shift": 0.0}, "--flow_shift", "0.001"),
    ({"infer_steps": 0}, "--infer_steps", "from 1"),
    ({"guidance_scale": float("nan")}, "--guidance_scale", "number"),
    ({"video_size": (250, 256)}, "--video_size", "256 256"),
    ({"prompt": None}, "--prompt", "give --prompt"),
    ({**ONE_FRAME, "one_frame_inference": "default"}, "--one_frame_inference", "target_index=1"),
    ({**ONE_FRAME, "one_frame_inference": "target_index=1024,control_index=0"}, "--one_frame_inference", "1023"),
    ({**ONE_FRAME, "one_frame_inference": "target_index=1,control_index=1024"}, "--one_frame_inference", "1023"),
    ({**ONE_FRAME, "one_frame_inference": "target_index=2,control_index=2"}, "--one_frame_inference", "its own"),
    ({**ONE_FRAME, "one_frame_inference": "target_index=1,control_index=0;2"}, "--one_frame_inference", "quoted"),
    ({**ONE_FRAME, "control_image_path": ()}, "--one_frame_inference", "--control_image_path"),
    ({**ONE_FRAME, "control_image_mask_path": ("a", "b")}, "--control_image_mask_path", "2 masks for 1"),
    ({"cfg_apply_ratio": 1.5}, "--cfg_apply_ratio", "0 to 1"),
    ({"slg_layers": "9;10"}, "--slg_layers", "9,10"),
])  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line_each(changes, where, words):
    with pytest.raises(UserError) as caught:
        request(**changes)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(where) for line in lines) and any(words in line for line in lines)


def test_one_frame_takes_any_number_of_controls_in_any_order_with_masks():
    made = request(**{
        **ONE_FRAME,
        "one_frame_inference": "control_index=9;0;4,target_index=2",
        "control_image_path": ("a", "b", "c"),
        "control_image_mask_path": ("m",),
    })  # fmt: skip
    assert made.one_frame.control_indices == (9, 0, 4) and made.control_image_paths == ("a", "b", "c")
    assert made.is_picture and made.num_frames == 1


def test_the_comma_list_of_one_frame_mode_is_read_as_control_images():
    changes = {**ONE_FRAME, "one_frame_inference": "control_index=0;2,target_index=1", "control_image_path": ()}
    made = request(**{**changes, "image_path": "first.png, last.png"})
    assert (made.image_path, made.control_image_paths) == ("first.png", ("first.png", "last.png"))


def test_an_end_image_for_a_model_without_one_makes_more_frames_and_a_remark():
    made = request(**I2V, end_image_path="終.png")
    assert made.appends_end and any("--trim_tail_frames" in remark for remark in made.remarks())
    assert not request(**FLF2V).appends_end
    assert not request(**ONE_FRAME, end_image_path="終.png").appends_end


def test_remarks_name_what_has_no_effect_or_may_not_be_meant():
    found = " ".join(request(**{**ONE_FRAME, "one_frame_inference": "no_2x,target_index=1,control_index=0"}).remarks())
    assert "no_2x" in found
    assert any("not trained" in remark for remark in request(video_size=(256, 256)).remarks())
    assert request(video_size=(480, 832)).remarks() == []
    assert any("--cfg_skip_mode" in r for r in request(
        video_size=(480, 832), guidance_scale=1.0, cfg_skip_mode="early", cfg_apply_ratio=0.5
    ).remarks())  # fmt: skip


def test_prompt_lines_count_frames_and_name_control_videos():
    made = PromptLine.parse("犬 --f 33 --cn 動 画.mp4 --g 3 --w 832 --h 480", "line 1", FLAGS.line_options).over(FLAGS)
    assert (made.prompt, made.video_length, made.control_path) == ("犬", 33, "動 画.mp4")
    assert (made.guidance_scale, made.video_size) == (3.0, (480, 832))
    with pytest.raises(UserError, match="--vs"):
        PromptLine.parse("a --vs 2", "line 1", FLAGS.line_options)


def test_sample_prompts_may_hold_distilled_guidance_without_effect():
    parsed = PromptLine.parse("a --g 6.0 --l 3 --f 5", "line 1", FLAGS.sample_options).over(FLAGS)
    assert (parsed.guidance_scale, parsed.num_frames) == (3.0, 5)


def test_guidance_options_reach_the_request():
    made = request(slg_mode="original", slg_layers="10,9", slg_scale=2.0, slg_end=0.5, cfg_skip_mode="early_late",
                   cfg_apply_ratio=0.4)  # fmt: skip
    slg = SkipLayers(blocks=(9, 10), mode="original", scale=2.0, start=0.0, end=0.5)
    assert made.guidance == GuidanceOptions(cfg_skip_mode="early_late", cfg_apply_ratio=0.4, skip_layers=slg)


@pytest.mark.parametrize("name", [field.name for field in fields(Wan22Flags)])
def test_options_of_wan22_are_refused_by_name(name):
    field = next(field for field in fields(Wan22Flags) if field.name == name)
    value = [] if field.default is False else ["1"]
    with pytest.raises(UserError, match=rf"^--{name}: .*Wan2\.1 only$"):
        parse(WanGenerateFlags, description="", argv=[f"--{name}", *value])


INCUMBENT_FLAGS = """
ckpt_dir task sample_solver dit disable_numpy_memmap vae vae_dtype vae_cache_cpu t5 clip lora_weight lora_multiplier
include_patterns exclude_patterns save_merged_model prompt negative_prompt video_size video_length fps infer_steps
save_path seed cpu_noise guidance_scale video_path image_path end_image_path control_path one_frame_inference
control_image_path control_image_mask_path trim_tail_frames cfg_skip_mode cfg_apply_ratio slg_layers slg_scale
slg_start slg_end slg_mode flow_shift fp8 fp8_scaled fp8_fast fp8_t5 device attn_mode blocks_to_swap
use_pinned_memory_for_block_swap output_type no_metadata latent_path lycoris compile_args compile compile_backend
compile_mode compile_dynamic compile_fullgraph compile_cache_size_limit from_file interactive dit_high_noise
force_v2_1_time_embedding offload_inactive_dit lazy_loading lora_weight_high_noise lora_multiplier_high_noise
timestep_boundary guidance_scale_high_noise
""".split()


def test_every_option_that_users_know_is_there():
    assert set(INCUMBENT_FLAGS) <= {option.name for option in options_of(WanGenerateFlags)}


def test_video_to_video_is_refused():
    with pytest.raises(UserError, match="^--video_path: got 動画.mp4; .*there is no video to video$"):
        parse(WanGenerateFlags, description="", argv=["--video_path", "動画.mp4"])


def test_every_task_of_the_table_can_be_asked_for():
    for task in TASKS:
        assert parse(WanGenerateFlags, description="", argv=["--task", task.name]).request.task is task
