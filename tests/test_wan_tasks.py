"""The tasks' defaults, and which transformers they take."""

from dataclasses import dataclass

import pytest

from common.flags import parse
from options.errors import UserError
from options.flag_fields import flag
from options.wan_tasks import DEFAULT_TASK, TASKS, WanTask, check_frames, check_transformer, find_task, width_hint

HD, SD = {(720, 1280), (1280, 720)}, {(480, 832), (832, 480)}
FACTS = {  # steps, flow shift, flow shift at 480p, frames, input channels, kind, image, sizes
    "t2v-14B": (50, 5.0, 5.0, 81, 16, "t2v", False, HD | SD),
    "t2v-1.3B": (50, 5.0, 5.0, 81, 16, "t2v", False, SD),
    "t2i-14B": (50, 5.0, 5.0, 1, 16, "t2v", False, HD | SD | {(1024, 1024)}),
    "i2v-14B": (40, 5.0, 3.0, 81, 36, "i2v", True, HD | SD),
    "flf2v-14B": (40, 5.0, 5.0, 81, 36, "flf2v", True, HD | SD),
    "t2v-1.3B-FC": (50, 5.0, 5.0, 81, 48, "fun_control", False, SD),
    "t2v-14B-FC": (50, 5.0, 5.0, 81, 48, "fun_control", False, HD | SD),
    "i2v-14B-FC": (40, 5.0, 3.0, 81, 48, "fun_control", True, HD | SD),
}


@dataclass(frozen=True, kw_only=True)
class TaskFlags:
    task: WanTask = flag("what is generated", default=DEFAULT_TASK)


def test_there_are_no_other_tasks():
    assert {task.name for task in TASKS} == set(FACTS)
    assert DEFAULT_TASK.name == "t2v-14B"


@pytest.mark.parametrize("name", FACTS)
def test_defaults_are_the_incumbents(name):
    task = find_task(name)
    shifts = (task.flow_shift_at(720, 1280), task.flow_shift_at(480, 832))
    shape = (task.num_frames, task.in_channels, task.kind, task.takes_image)
    assert (task.num_steps, *shifts, *shape, set(task.sizes)) == FACTS[name]
    assert task.cfg_scale == 5.0
    assert task.flow_shift_at(832, 480) == shifts[1]
    assert task.size in name


def test_negative_prompts_are_wans():
    usual = find_task("t2v-14B").negative_prompt
    assert usual.startswith("色调艳丽，过曝，静态，") and usual.endswith("，三条腿，背景人很多，倒着走")
    assert len(usual.split("，")) == 28
    assert find_task("flf2v-14B").negative_prompt == "镜头切换，" + usual
    assert {task.negative_prompt for task in TASKS if task.kind != "flf2v"} == {usual}


def test_a_task_is_the_value_of_a_flag():
    assert parse(TaskFlags, description="", argv=["--task", "i2v-14B"]).task is find_task("i2v-14B")
    assert parse(TaskFlags, description="", argv=[]).task.name == "t2v-14B"
    assert str(find_task("i2v-14B")) == "i2v-14B"


@pytest.mark.parametrize("name", ["i2v-A14B", "t2v-A14B"])
def test_tasks_of_wan22_are_not_supported(name):
    with pytest.raises(UserError, match=f"--task: got {name}; .*not supported: Wan2.1 only"):
        find_task(name)


def test_a_misspelt_task_suggests_the_nearest():
    with pytest.raises(UserError, match="--task: got i2v14B; .*did you mean i2v-14B?"):
        parse(TaskFlags, description="", argv=["--task", "i2v14B"])
    with pytest.raises(UserError, match="got 動画; .*t2v-1.3B-FC"):
        find_task("動画")


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_a_task_takes_the_transformers_of_its_kind_alone(task):
    for kind, in_channels in (("t2v", 16), ("i2v", 36), ("flf2v", 36), ("fun_control", 48)):
        if kind == task.kind:
            check_transformer(task, kind, in_channels)
        else:
            with pytest.raises(UserError, match=f"--dit: got .* with --task {task.name};"):
                check_transformer(task, kind, in_channels)


@pytest.mark.parametrize(
    ("task", "kind", "in_channels", "remedy"),
    [
        ("i2v-14B", "t2v", 16, "use --task t2v-14B or t2v-1.3B or t2i-14B, or another"),
        ("t2v-14B", "i2v", 36, "use --task i2v-14B, or another"),
        ("i2v-14B", "flf2v", 36, "use --task flf2v-14B, or another"),
        ("t2v-14B", "fun_control", 48, "use --task t2v-1.3B-FC or t2v-14B-FC or i2v-14B-FC, or another"),
        ("i2v-14B-FC", "fun_control", 52, "use another checkpoint"),
    ],
)
def test_a_wrong_transformer_is_answered_with_the_tasks_it_is_for(task, kind, in_channels, remedy):
    with pytest.raises(UserError, match=rf"^モデル: got .*\({in_channels} input channels\).*; {remedy}"):
        check_transformer(find_task(task), kind, in_channels, where="モデル")


def test_the_size_of_a_published_transformer_gets_a_hint():
    hint = width_hint(find_task("t2v-1.3B"), 5120)
    assert "--task t2v-1.3B is for 1.3B" in hint and "--task t2v-14B or t2i-14B is for it" in hint
    assert "t2v-1.3B-FC is for it" in width_hint(find_task("t2v-14B-FC"), 1536)
    assert " is for it" not in width_hint(find_task("i2v-14B"), 1536)


@pytest.mark.parametrize(("name", "width"), [("t2v-1.3B", 1536), ("t2v-14B", 5120), ("t2v-14B", 256), ("t2v-1.3B", 64)])
def test_transformers_of_the_right_size_and_small_ones_get_none(name, width):
    assert width_hint(find_task(name), width) is None


def test_sizes_that_the_transformer_is_not_trained_at_get_a_hint():
    assert find_task("t2v-1.3B").size_hint(480, 832) is None
    assert "but at 480 832, 832 480" in find_task("t2v-1.3B").size_hint(720, 1280)
    assert find_task("t2i-14B").size_hint(1024, 1024) is None
    assert "height 1024" in find_task("t2v-14B").size_hint(1024, 1024)


def test_pictures_have_one_frame():
    check_frames(find_task("t2i-14B"), 1)
    check_frames(find_task("i2v-14B"), 1)
    check_frames(find_task("i2v-14B"), 81)
    with pytest.raises(UserError, match="--video_length: got 81; expected 1"):
        check_frames(find_task("t2i-14B"), 81)
    with pytest.raises(UserError, match="--video_length: got 0; "):
        check_frames(find_task("t2v-14B"), 0)
