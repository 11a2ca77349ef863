"""Prompt files of samples: what they mean, that prompts are never options, and that mistakes are named."""

import json
import logging
import random
from dataclasses import replace
from pathlib import Path

import pytest

from options.errors import UserError
from options.fpack_request import FramePackRequestFlags
from options.sample_prompts import each, sample_prompts
from training.sampling import sample_jobs

SAMPLE_OPTIONS = FramePackRequestFlags.sample_options
KEYS = [option.key for option in SAMPLE_OPTIONS.values()]
DEFAULTS = FramePackRequestFlags()
ONE_FRAME = FramePackRequestFlags(one_frame_inference="default")


def prompt_file(folder: Path, text: str, suffix: str = ".txt") -> str:
    path = folder / f"例 prompts{suffix}"
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(path: str, defaults: FramePackRequestFlags = DEFAULTS) -> list[FramePackRequestFlags]:
    """The prompts of a file over what a command line says."""
    return each(sample_prompts(path, SAMPLE_OPTIONS), lambda prompt: prompt.over(defaults))


def flags_of(
    folder: Path, text: str, suffix: str = ".txt", defaults: FramePackRequestFlags = DEFAULTS
) -> FramePackRequestFlags:
    (flags,) = read(prompt_file(folder, text, suffix), defaults)
    return flags


def of_table(folder: Path, table: object, defaults: FramePackRequestFlags = DEFAULTS) -> FramePackRequestFlags:
    return flags_of(folder, json.dumps([table]), ".json", defaults)


def complaints(folder: Path, text: str, suffix: str = ".txt", defaults: FramePackRequestFlags = DEFAULTS) -> list[str]:
    """What reading and checking complain about, line by line."""
    with pytest.raises(UserError) as error:
        sample_jobs(prompt_file(folder, text, suffix), defaults, seed=1)
    return str(error.value).splitlines()


# ---- what letters and keys mean ----

MEANINGS = [
    ("w", "width", 512, "video_size", (256, 512)),
    ("h", "height", 512, "video_size", (512, 256)),
    ("d", "seed", 42, "seed", 42),
    ("s", "sample_steps", 30, "infer_steps", 30),
    ("g", "guidance_scale", 7.5, "embedded_cfg_scale", 7.5),
    ("l", "cfg_scale", 3, "guidance_scale", 3.0),
    ("fs", "discrete_flow_shift", 5.5, "flow_shift", 5.5),
    ("n", "negative_prompt", "ぼけた, bad", "negative_prompt", "ぼけた, bad"),
    ("i", "image_path", "写真 [x].png", "image_path", "写真 [x].png"),
    ("im", "image_mask_path", "m.png", "image_mask_path", "m.png"),
    ("ei", "end_image_path", "e.png", "end_image_path", "e.png"),
    ("of", "one_frame", "no_2x,target_index=1", "one_frame_inference", "no_2x,target_index=1"),
    ("ci", "control_image_path", "a.png", "control_image_path", ("a.png",)),
    ("cim", "control_image_mask_path", "a.png", "control_image_mask_path", ("a.png",)),
]


@pytest.mark.parametrize(("letter", "key", "value", "field", "meaning"), MEANINGS)
def test_a_letter_and_its_key_mean_the_same(tmp_path, letter, key, value, field, meaning):
    assert getattr(flags_of(tmp_path, f"猫 --{letter} {value}"), field) == meaning
    assert getattr(of_table(tmp_path, {"prompt": "猫", key: value}), field) == meaning
    toml = f'[prompt]\n[[prompt.subset]]\nprompt = "猫"\n{key} = {json.dumps(value, ensure_ascii=False)}\n'
    assert getattr(flags_of(tmp_path, toml, ".toml"), field) == meaning


def test_every_letter_is_covered_by_the_table_above():
    covered = {letter for letter, *_ in MEANINGS} | {"f", "cn"}
    assert covered == set(SAMPLE_OPTIONS) and len(KEYS) == len(SAMPLE_OPTIONS)


@pytest.mark.parametrize(("frames", "sections"), [(1, 1), (37, 1), (73, 2), (145, 4), (60, 2)])
def test_frames_give_as_many_sections_as_generation_makes_of_as_many_seconds(tmp_path, frames, sections):
    """Source: round(seconds · 30 / (4 · window)), at least one."""
    flags = flags_of(tmp_path, f"a --f {frames}")
    assert flags.resolve(image_size=None).num_sections == sections
    assert of_table(tmp_path, {"prompt": "a", "frame_count": frames}) == flags


def test_what_a_prompt_leaves_open_is_as_in_generation(tmp_path):
    assert flags_of(tmp_path, "a cat") == replace(DEFAULTS, prompt="a cat")


@pytest.mark.parametrize(
    ("text", "is_one_frame"),
    [("a", True), ("a --f 1", True), ("a --of no_2x", True), ("a --f 37", False), ("a --f 2", False)],
)
def test_one_frame_training_samples_pictures_unless_a_prompt_asks_for_more_frames(tmp_path, text, is_one_frame):
    assert (flags_of(tmp_path, text, defaults=ONE_FRAME).one_frame_inference is not None) == is_one_frame


def test_one_frame_options_make_a_picture_without_the_command_lines_switch(tmp_path):
    assert flags_of(tmp_path, "a --f 1 --of default").one_frame_inference == "default"
    assert flags_of(tmp_path, "a --f 1").one_frame_inference is None


def test_repeated_controls_make_a_list(tmp_path):
    wanted = ("a.png", "b c.png")
    assert flags_of(tmp_path, "x --ci a.png --ci b c.png").control_image_path == wanted
    assert of_table(tmp_path, {"prompt": "x", "control_image_path": list(wanted)}).control_image_path == wanted


@pytest.mark.parametrize("prompt", ["I am a cat", "n dash", "I --love", "a well-known cat 5", "w 5", "写真--d 5"])
def test_a_prompt_is_never_an_option(tmp_path, prompt):
    """Other tools take "I am ..." for the start image and "n ..." for the negative prompt."""
    assert of_table(tmp_path, {"prompt": prompt}) == replace(DEFAULTS, prompt=prompt)
    if " --" not in prompt:
        assert flags_of(tmp_path, f"{prompt} --s 5") == replace(DEFAULTS, prompt=prompt, infer_steps=5)


# ---- files ----


def test_documented_lines_are_understood(tmp_path):
    line = (
        "The girl wears a school uniform. --i start.png --ci ref.png --ci start.png --of no_post,no_2x,no_4x,"
        "target_index=5,control_index=0;10 --d 1111 --f 1 --s 10 --fs 7 --d 1234 --w 384 --h 576"
    )
    flags = flags_of(tmp_path, line)
    assert flags.prompt == "The girl wears a school uniform."
    assert (flags.seed, flags.infer_steps, flags.flow_shift, flags.video_size) == (1234, 10, 7.0, (576, 384))
    assert flags.control_image_path == ("ref.png", "start.png")


def test_comments_also_behind_spaces_and_blank_lines_are_no_prompts(tmp_path):
    path = prompt_file(tmp_path, "# one\n\n  # two\n  猫 --d 3  \n\u3000\nb #1\r\n")
    assert [flags.prompt for flags in read(path)] == ["猫", "b #1"]
    assert [prompt.where for prompt in sample_prompts(path, SAMPLE_OPTIONS)] == [
        "例 prompts.txt line 4",
        "例 prompts.txt line 6",
    ]
    assert [prompt.number for prompt in sample_prompts(path, SAMPLE_OPTIONS)] == [0, 1]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_toml_subset_wins_over_what_all_share(tmp_path, bom):
    text = f"""{bom}
    [prompt]
    width = 512
    seed = 1
    [[prompt.subset]]
    prompt = "猫"
    [[prompt.subset]]
    prompt = "犬"
    seed = 2
    """
    first, second = read(prompt_file(tmp_path, text, ".toml"))
    assert [(f.prompt, f.seed, f.video_size[1]) for f in (first, second)] == [("猫", 1, 512), ("犬", 2, 512)]


def test_json_lists_hold_lines_and_tables(tmp_path):
    text = json.dumps(["猫 --d 3", {"prompt": "a --d 5", "seed": None, "sample_steps": "7"}])
    line, table = read(prompt_file(tmp_path, text, ".json"))
    assert (line.prompt, line.seed) == ("猫", 3)
    assert (table.prompt, table.seed, table.infer_steps) == ("a --d 5", None, 7)


def test_the_case_of_a_suffix_does_not_matter(tmp_path):
    assert flags_of(tmp_path, "a", ".TXT").prompt == "a"
    assert flags_of(tmp_path, '["a"]', ".Json").prompt == "a"


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".yaml", "a", "expected a .txt, .toml or .json file"),
        ("", "a", "expected a .txt, .toml or .json file"),
        (".txt", "# nothing\n", "expected at least one prompt"),
        (".json", "[]", "expected at least one prompt"),
        (".toml", "[prompt]", "expected at least one prompt"),
        (".json", '["a"', "expected valid JSON; mend it"),
        (".json", "[" * 100_000, "expected valid JSON; mend it"),
        (".toml", "[prompt", "expected valid TOML; mend it"),
        (".json", '{"prompt": "a"}', "expected a list of texts and tables"),
        (".json", "[3]", "例 prompts.json entry 1: got 3; expected a text, or a table"),
        (".toml", '[[subset]]\nprompt = "a"', "例 prompts.toml, subset: got an unknown table or key"),
        (".toml", "prompt = 3", "例 prompts.toml, prompt: got 3; expected a table"),
        (".toml", "[prompt]\nsubset = 3", "例 prompts.toml, prompt.subset: got 3; expected tables"),
    ],
)
def test_files_that_are_none_of_prompts_are_errors(tmp_path, suffix, text, message):
    (line,) = complaints(tmp_path, text, suffix)
    assert message in line


def test_files_that_cannot_be_read_are_errors(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for name in ("nothing.txt", "latin.txt"):
        with pytest.raises(UserError, match="--sample_prompts: got .*; expected a UTF-8 text file"):
            read(str(tmp_path / name))


# ---- mistakes ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a --sd 1", "got --sd; expected a known option; did you mean --s?"),
        ("a --seed 1", "got --seed; expected a known option; here it is --d"),
        ("a --sample_steps 1", "got --sample_steps; expected a known option; here it is --s"),
        ("a --guidance_scale 1", "got --guidance_scale; expected a known option; here it is --g"),
        ("a --vs 1", "got --vs; expected a known option"),
        ("a --d x", "got --d x; expected an integer"),
        ("a --d", "got --d without a value"),
        ("a --f 0", "got --f 0; expected 1 to 1000000 frames"),
        ("a --f 2.5", "got --f 2.5; expected an integer"),
        ("a --f 37 --of default", "got --f 37 with --of; expected 1 frame"),
        ("a --cn a.mp4", "got --cn; expected this option to be left out"),
        ("--d 5", "got no prompt; expected a prompt; write it in front of the options"),
        ("a --w 264", ", --h and --w: got 256 264; expected height and width that are multiples of 16"),
        ("a --s 0", ", --s: got 0; expected an integer from 1 to 10000"),
        ("a --g 5000", ", --g: got 5000.0"),
        ("a --l nan", ", --l: got nan"),
        ("a --d -1", ", --d: got -1"),
        ("a --ci b.png", ", --ci: got b.png; expected --of beside it; add --of default"),
        ("a --of target=1", ", --of: got target=1"),
        ("a --i 無い.png", ", --i: got 無い.png; expected an image; there is no such file"),
        ("0:a;;;1:b --f 1", "--prompt: got section 1; expected sections -1 to 0"),
    ],
)
def test_a_mistake_in_a_line_is_named_with_its_place_and_in_its_letters(tmp_path, text, message):
    (line,) = complaints(tmp_path, f"# comment\n{text}")
    assert line.startswith("例 prompts.txt line 2") and message in line


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sede": 1}, "got sede; expected a known key; did you mean seed?"),
        ({"d": 1}, "got d; expected a known key; here it is seed"),
        ({"infer_steps": 1}, "got infer_steps; expected a known key; here it is sample_steps"),
        ({"qqq": 1}, "choose one of prompt, width, height"),
        ({"seed": "x"}, "got seed x; expected an integer"),
        ({"seed": True}, "got seed = true; expected a seed"),
        ({"seed": 1.5}, "got seed 1.5; expected an integer"),
        ({"image_path": 3}, "got image_path = 3; expected a text"),
        ({"image_path": ""}, "got image_path without a value"),
        ({"control_image_path": ["a.png", 3]}, "got control_image_path = 3; expected a text"),
        ({"prompt": 3}, "got prompt = 3; expected a text"),
        ({"frame_count": 37, "one_frame": "default"}, "got frame_count 37 with one_frame"),
        ({"width": 264}, ", height and width: got 256 264"),
        ({"guidance_scale": 5000}, ", guidance_scale: got 5000.0"),
        ({"cfg_scale": 5000}, ", cfg_scale: got 5000.0"),
        ({"control_image_path": "b.png"}, ", control_image_path: got b.png; expected one_frame beside it"),
        ({"prompt": None}, 'got no prompt; expected a prompt; write prompt = "…"'),
    ],
)
def test_a_mistake_in_a_table_is_named_with_its_place_and_in_its_keys(tmp_path, table, message):
    (line,) = complaints(tmp_path, json.dumps(["a --of default", {"prompt": "猫", **table}]), ".json")
    assert line.startswith("例 prompts.json entry 2") and message in line


def test_an_unknown_key_that_all_toml_prompts_share_is_named_once(tmp_path):
    text = '[prompt]\nwidht = 3\n[[prompt.subset]]\nprompt = "a"\n[[prompt.subset]]\nprompt = "b"\n'
    assert complaints(tmp_path, text, ".toml") == [
        "例 prompts.toml, [prompt]: got widht; expected a known key; did you mean width?"
    ]


def test_all_mistakes_are_named_at_once(tmp_path):
    """Of every kind: what cannot be read, what cannot be, and an image that is not there."""
    lines = complaints(tmp_path, "a --x 1\nb\nc --w 3\nd --i 無い.png\n")
    assert [line.split(": got")[0] for line in lines] == [
        "例 prompts.txt line 1",
        "例 prompts.txt line 3, --h and --w",
        "例 prompts.txt line 4, --i",
    ]


# ---- jobs ----


def test_a_seed_that_is_not_given_depends_on_the_runs_and_the_prompts_number(tmp_path):
    path = prompt_file(tmp_path, "a\na\na --d 7\n")

    def seeds(seed: int) -> list[int]:
        return [job.request.seed for job in sample_jobs(path, DEFAULTS, seed=seed)]

    assert seeds(1) == seeds(1) and seeds(1)[2] == 7
    assert len({*seeds(1), *seeds(2)}) == 5


def test_advice_is_in_the_letters_of_the_prompt(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        sample_jobs(prompt_file(tmp_path, "a --f 1\nb --of default"), DEFAULTS, seed=1)
    messages = "\n".join(caplog.messages)
    assert "例 prompts.txt line 1: 1 frame makes a whole section; for a picture add --of or --one_frame" in messages
    assert "例 prompts.txt line 2: no --ci: the picture follows" in messages
    assert "--control_image_path" not in messages


PIECES = [
    *(f"--{name}" for name in SAMPLE_OPTIONS),
    *("=", ";;;", ",", ":", " ", " --", "-1", "0", "16", "1e9", "nan", "inf", "9" * 400, "１", "\ud83d", "\x00"),
    *("a cat", "猫", "I am", "C:/絵 [x].png", "\u3000", "0:a;;;-1:b", "#", '"', "default", "target_index=1"),
]


@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_written_is_understood_or_refused_in_one_line(tmp_path, seed):
    source = random.Random(seed)
    for number in range(60):
        text = " ".join(source.choices(PIECES, k=source.randint(0, 8)))
        table = {source.choice([*KEYS, "prompt", "x"]): source.choice([text, 3, 1.5, None, [text], {}, True])}
        path = prompt_file(tmp_path, json.dumps([text, table]), f"{number}.json")
        try:
            sample_jobs(path, DEFAULTS, seed=1)
        except UserError as error:
            lines = str(error).split("\n")
            assert 1 <= len(lines) <= 2 and all(": got " in line for line in lines), lines


def test_a_prompt_may_be_shared_by_all_subsets(tmp_path):
    file = tmp_path / "共有.toml"
    file.write_text(
        '[prompt]\nprompt = "a cat"\nwidth = 256\n[[prompt.subset]]\nseed = 1\n[[prompt.subset]]\n', "utf-8"
    )
    first, second = read(file)
    assert (first.prompt, first.seed, second.prompt, second.seed) == ("a cat", 1, "a cat", None)
    file.write_text('[prompt]\nprompt = "a dog"\n', "utf-8")
    (only,) = read(file)
    assert only.prompt == "a dog"
