"""Prompt lines and sweeps: what they mean, and that nothing anyone types ends in a traceback."""

import random
from dataclasses import replace

import pytest

from options.errors import UserError
from options.fpack_request import FramePackRequestFlags
from options.line_options import options_help
from options.one_frame import KNOWN, OneFrameOptions
from options.prompt_line import PromptLine, numbered_lines
from options.sections import parse_sections
from options.sweep import Sweep, sweep_points

BASE = FramePackRequestFlags(prompt="base", video_size=(256, 320), seed=9, control_image_path=("base.png",))

GENERATION_OPTIONS = FramePackRequestFlags.line_options


def over(line: str, base: FramePackRequestFlags = BASE) -> FramePackRequestFlags:
    return PromptLine.parse(line, "line 1", GENERATION_OPTIONS).over(base)


# Prompt lines


def test_documented_lines_are_understood():
    line = "A beautiful sunset over mountains --w 832 --h 480 --f 5 --d 42 --s 20 --i path/to/start_image.jpg"
    flags = over(line)
    assert flags.prompt == "A beautiful sunset over mountains"
    assert (flags.video_size, flags.video_seconds, flags.seed, flags.infer_steps) == ((480, 832), 5.0, 42, 20)
    assert flags.image_path == "path/to/start_image.jpg"
    line = (
        "The girl wears a school uniform. --i start_with_alpha.png --ci ref_with_alpha.png --ci start_with_alpha.png "
        "--of no_post,no_2x,no_4x,target_index=5,control_index=0;10 --d 1111 --f 1 --s 10 --fs 7 --d 1234 "
        "--w 384 --h 576"
    )
    flags = over(line)
    assert flags.control_image_path == ("ref_with_alpha.png", "start_with_alpha.png")
    assert (flags.seed, flags.flow_shift, flags.video_size) == (1234, 7.0, (576, 384))
    assert OneFrameOptions.parse(flags.one_frame_inference).control_indices == (0, 10)


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("--w 640", "video_size", (256, 640)),
        ("--h 640", "video_size", (640, 320)),
        ("--f 2.5", "video_seconds", 2.5),
        ("--vs 3", "video_sections", 3),
        ("--g 2.5", "guidance_scale", 2.5),
        ("--l 3", "guidance_scale", 3.0),
        ("--fs 3", "flow_shift", 3.0),
        ("--i 写真 [x].png", "image_path", "写真 [x].png"),
        ("--im m.png", "image_mask_path", "m.png"),
        ("--ei e.png", "end_image_path", "e.png"),
        ("--n", "negative_prompt", ""),
        ("--n blurry, bad", "negative_prompt", "blurry, bad"),
        ("--cim a.png --cim b.png", "control_image_mask_path", ("a.png", "b.png")),
        ("--ci a.png", "control_image_path", ("a.png",)),
        ("--of default", "one_frame_inference", "default"),
        ("--d 1 --d 2", "seed", 2),
    ],
)
def test_inline_options_override_the_command_line(line, field, value):
    assert getattr(over(f"a cat {line}"), field) == value


@pytest.mark.parametrize("space", ["\u3000", "\t", " \u3000 "])
def test_any_white_space_begins_an_option(space):
    """Japanese keyboards type the full-width space; an option behind it must not become prompt text."""
    flags = over(f"猫{space}--d{space}42{space}--s 7")
    assert (flags.prompt, flags.seed, flags.infer_steps) == ("猫", 42, 7)


def test_what_a_line_leaves_out_comes_from_the_command_line():
    assert over("a cat") == replace(BASE, prompt="a cat")


def test_a_line_of_options_only_uses_the_command_lines_prompt():
    """Nothing may be read as prompt text because it stands first."""
    assert over("--d 3 --w 64") == replace(BASE, seed=3, video_size=(256, 64))


def test_prompts_that_look_like_options_are_prompts():
    """Other tools read "I am …" as the image option."""
    for prompt in ("I am a cat", "n dash", "a--b", "well-known d 5"):
        assert over(f"{prompt} --s 5") == replace(BASE, prompt=prompt, infer_steps=5)


def test_seconds_in_a_line_count_against_sections_of_the_command_line():
    base = replace(BASE, video_sections=2)
    assert over("a --f 5", base).video_sections is None
    assert over("a --f 5 --vs 1", base).video_sections == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --sd 1", "line 1: got --sd; expected a known option; did you mean --s?"),
        ("a --steps 3", "line 1: got --steps; expected a known option; did you mean --s?"),
        ("a --xyz 3", "choose one of --w --h"),
        ("a --seed 3", "here it is --d"),
        ("a --D 3", "line 1: got --D"),
        ("a --d", "line 1: got --d without a value"),
        ("a --d x", "line 1: got --d x; expected an integer"),
        ("a --f soon", "line 1: got --f soon; expected a number"),
        ("a -- ", "-- without a name"),
        ("a --mct 0.1", "not available yet"),
        ("a --lora", "line 1: got --lora without a value"),
    ],
)
def test_wrong_lines_are_errors_that_name_the_line(line, message):
    with pytest.raises(UserError) as error:
        PromptLine.parse(line, "line 1", GENERATION_OPTIONS)
    assert message in str(error.value)


def test_comments_and_blank_lines_keep_the_numbers_of_the_others():
    assert numbered_lines("# a\n\n b \n  # c\nd #1\r\n") == [(3, "b"), (5, "d #1")]


def test_help_lists_every_inline_option():
    assert all(f"--{name} " in options_help(GENERATION_OPTIONS) for name in GENERATION_OPTIONS)


# Sweeps


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("target_index=1..9", (1, 2, 3, 4, 5, 6, 7, 8, 9)),
        ("target_index=4,6,9", (4, 6, 9)),
        ("latent_window_size=1..40:13", (1, 14, 27, 40)),
        ("seed=1, 5..7", (1, 5, 6, 7)),
        ("guidance_scale=1..2:0.25", (1.0, 1.25, 1.5, 1.75, 2.0)),
        ("embedded_cfg_scale=0.1..0.3:0.1", (0.1, 0.2, 0.3)),
        ("control_index.1=10", (10,)),
    ],
)
def test_sweep_values(text, values):
    assert Sweep.parse(text).values == values


def labels_and(flags: FramePackRequestFlags, field: str, *sweeps: str) -> list[tuple[str, object]]:
    points = sweep_points(flags, [Sweep.parse(text) for text in sweeps])
    return [(point.label, getattr(point.flags, field)) for point in points]


def test_one_sweep_changes_one_setting():
    flags = replace(BASE, one_frame_inference="no_2x")
    assert labels_and(flags, "one_frame_inference", "target_index=1,13") == [
        ("target_index=1", "no_2x,target_index=1"),
        ("target_index=13", "no_2x,target_index=13"),
    ]
    assert labels_and(BASE, "seed", "seed=1234567890,2") == [("seed=1234567890", 1234567890), ("seed=2", 2)]


def test_two_sweeps_make_a_grid_with_the_last_one_running_fastest():
    flags = replace(BASE, one_frame_inference="control_index=0;10", control_image_path=("a", "b"))
    found = labels_and(flags, "one_frame_inference", "target_index=1,9", "control_index.1=4,13")
    assert [text for _, text in found] == [f"target_index={t},control_index=0;{c}" for t in (1, 9) for c in (4, 13)]


def test_an_open_seed_is_the_same_in_all_cells():
    points = sweep_points(replace(BASE, seed=None), [Sweep.parse("guidance_scale=1..3")])
    assert len({point.flags.seed for point in points}) == 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["target=1"], "did you mean target_index?"),
        (["control_index=1"], "name the control image: control_index.0"),
        (["control_index.x=1"], "expected name=values"),
        (["target_index.1=1"], "expected name=values"),
        (["seed"], "expected integers"),
        (["seed="], "expected integers"),
        (["seed=1..x"], "expected integers"),
        (["seed=1.5"], "expected integers"),
        (["seed=9..1"], "a rising range"),
        (["seed=1..9:0"], "a rising range"),
        (["seed=1..100000"], "a rising range of at most 1000"),
        (["seed=0..1" + "0" * 400], "expected integers"),
        (["seed=1,2,1"], "1 to 1000 different values"),
        (["seed=1", "seed=2"], "one or two different settings"),
        (["seed=1", "guidance_scale=1", "target_index=1"], "one or two different settings"),
        (["target_index=1"], "add --one_frame_inference default"),
    ],
)
def test_sweeps_that_cannot_be_are_errors(texts, message):
    with pytest.raises(UserError) as error:
        sweep_points(BASE, [Sweep.parse(text) for text in texts])
    assert message in str(error.value)


def test_a_sweep_over_a_control_image_that_is_not_there_is_an_error():
    flags = replace(BASE, one_frame_inference="default")
    with pytest.raises(UserError, match="control_index.0 to control_index.0"):
        sweep_points(flags, [Sweep.parse("control_index.1=4")])


# Fuzzing

PIECES = [
    *(f"--{name}" for name in GENERATION_OPTIONS),
    *KNOWN,
    *("=", ";", ";;;", ",", "..", ":", " ", " --", "--", "-1", "0", "9", "1e9", "nan", "inf", "0.5", "-", "１"),
    *("1" * 30, "9" * 400, "\ud83d"),
    *("a cat", "猫", "I am", "C:/絵 [x].png", "\t", "\u3000", "\x00", "%", "{}", "0:a;;;-1:b", "1-2:x", "#", '"', "'"),
]


def random_text(source: random.Random) -> str:
    return "".join(source.choice(PIECES) + source.choice(["", " "]) for _ in range(source.randint(0, 9)))


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_typed_is_understood_or_refused_in_one_line(seed):
    """Lines, one-frame options, sections and sweeps made of pieces that mean something somewhere."""
    source = random.Random(seed)

    def resolve(line: str) -> None:
        over(line).resolve(image_size=lambda path: (100, 100))

    attempts = (
        resolve,
        lambda text: resolve(f"a --of {text}"),
        lambda text: OneFrameOptions.parse(text).resolve(2),
        lambda text: parse_sections(text, "--prompt"),
        lambda text: sweep_points(replace(BASE, one_frame_inference="default"), [Sweep.parse(text)]),
        lambda text: sweep_points(BASE, [Sweep.parse(f"seed={text}")]),
    )
    for _ in range(150):
        text = random_text(source)
        for attempt in attempts:
            try:
                attempt(text)
            except UserError as error:
                assert "\n" not in str(error) and ": got " in str(error), repr(text)
