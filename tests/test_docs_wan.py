"""`docs/wan.md`: commands, options, tables and figures are the scripts' own."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from common.flag_options import Option, options_of
from common.flags import parse
from dataset.config import ImageDataset, load_dataset_config
from modules.guidance import cfg_steps
from options.flags_fpack_cache import FramePackCacheLatentsFlags
from options.flags_fpack_generate import FramePackGenerateFlags
from options.flags_fpack_train import FramePackTrainFlags
from options.flags_wan_cache import WanCacheLatentsFlags, WanCacheTextsFlags
from options.flags_wan_generate import WanGenerateFlags
from options.flags_wan_train import WanTrainFlags, check_wan_train
from options.prompt_line import PromptLine, numbered_lines
from options.sample_prompts import sample_prompts
from options.wan_request import WanRequestFlags
from options.wan_tasks import DEFAULT_TASK, SIZES_480P, SIZES_720P, TASKS, find_task
from tests import guides
from wan.cache_latents import rules_of
from wan.checkpoints import RELEASE
from wan.conditioning import clip_images
from wan.training_rules import needed_contents, trainable_modes

TEXT = guides.text_of("docs/wan.md")
SCRIPTS = {
    "wan_cache_latents.py": WanCacheLatentsFlags,
    "wan_cache_text_encoder_outputs.py": WanCacheTextsFlags,
    "wan_generate_video.py": WanGenerateFlags,
    "wan_train_network.py": WanTrainFlags,
}
COMMANDS = [guides.script_and_arguments(words) for words in guides.commands(TEXT, SCRIPTS)]
PARSED = [(script, parse(SCRIPTS[script], description="", argv=arguments)) for script, arguments in COMMANDS]
GENERATIONS, TRAININGS, CACHINGS = (
    [flags for script, flags in PARSED if script == name]
    for name in ("wan_generate_video.py", "wan_train_network.py", "wan_cache_latents.py")
)
LAST, FIRST = "最後.png", "最初.png"


def image_size(path: str, **_: object) -> tuple[int, int]:
    return 1000, 800


def cells(*headers: str) -> list[list[str]]:
    return guides.rows(TEXT, *headers)


def by_first(*headers: str) -> dict[str, list[str]]:
    """A table's rows by what stands in backticks in their first cells."""
    return {name: row[1:] for row in cells(*headers) for name in guides.in_backticks(row[0])}


def prompts(number: int) -> str:
    """The files of prompts, in the order of the guide."""
    texts = [block for block in guides.blocks(TEXT, "text") if re.search(r" --\w ", block)]
    return texts[number]


# ---- commands and options ----


def test_there_is_a_command_for_everything_that_can_be_made() -> None:
    asked = [flags.request for flags in GENERATIONS]
    assert {request.task.kind for request in asked} == {"t2v", "i2v", "flf2v", "fun_control"}
    assert [request.task.name for request in asked if request.one_frame_inference] == ["i2v-14B", "flf2v-14B"]
    assert {rules_of(flags).mode for flags in CACHINGS} == {"t2v", "i2v", "flf2v", "one_frame"}
    assert [flags.wan.task.name for flags in TRAININGS] == ["i2v-14B", "flf2v-14B"]


@pytest.mark.parametrize("flags", GENERATIONS, ids=lambda flags: flags.request.prompt)
def test_every_generation_can_be_made_as_it_is_written(flags: WanGenerateFlags) -> None:
    request = flags.request.resolve(image_size=image_size)
    assert not request.remarks() and not list(flags.request.guidance_hints()) and flags.output.save_path
    given = flags.models.ckpt_dir or all((flags.models.dit, flags.models.vae, flags.models.t5))
    assert given and (flags.models.clip or flags.models.ckpt_dir or not request.task.takes_image)


@pytest.mark.parametrize("flags", TRAININGS, ids=lambda flags: flags.saving.output_name)
def test_every_training_passes_the_checks_and_all_of_it_has_an_effect(flags: WanTrainFlags, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        check_wan_train(flags)
    assert caplog.messages == []
    caches = [found for found in CACHINGS if found.cache.dataset_config == flags.data.dataset_config]
    assert {rules_of(found).mode for found in caches} & set(trainable_modes(flags.wan.task))


def test_loras_are_generated_with_where_training_puts_them() -> None:
    (one_frame, _) = (flags for flags in GENERATIONS if flags.request.one_frame_inference)
    assert Path(one_frame.lora.lora_weight[0]).stem == TRAININGS[0].saving.output_name


def names_of(*flags: type) -> set[str]:
    return {name for each in flags for option in options_of(each) for name in option.names}


def test_every_option_that_is_named_exists() -> None:
    letters = {*WanRequestFlags.line_options, *WanRequestFlags.sample_options}
    known = names_of(*SCRIPTS.values(), FramePackGenerateFlags) | letters | {"num_cpu_threads_per_process"}
    named = {name.removeprefix("--") for name in guides.options_named(TEXT)}
    assert named - known == set() and len(named) > 80


def test_every_option_that_framepack_has_not_is_told_of() -> None:
    framepack = names_of(FramePackGenerateFlags, FramePackTrainFlags, FramePackCacheLatentsFlags)
    refused = {option.name for flags in SCRIPTS.values() for option in options_of(flags) if is_refused(option)}
    own = names_of(*SCRIPTS.values()) - framepack - refused
    assert {name for name in own if not re.search(rf"--{name}\b", TEXT)} == set() and len(own) > 20


def is_refused(option: Option) -> bool:
    return bool(option.metadata.get("refusal"))


def test_the_official_files_are_those_that_are_looked_for() -> None:
    (tree,) = (block for block in guides.blocks(TEXT, "text") if "--ckpt_dir" in block)
    official = tree.partition("ComfyUI/models/")[0]
    for names in RELEASE.values():
        assert all(name.partition("-of-")[0] in official for name in names)


# ---- tasks, sizes, letters ----


def test_the_table_of_tasks_is_true() -> None:
    table = by_first("`--task`", "makes")
    assert list(table) == [task.name for task in TASKS]
    sizes = {"480p": set(SIZES_480P), "720p": set(SIZES_720P), "1024×1024": {(1024, 1024)}}
    for task in TASKS:
        makes, of, steps, shift, frames, trained = table[task.name]
        assert (int(steps), int(frames)) == (task.num_steps, task.num_frames)
        assert [float(x) for x in re.findall(r"(?<!4)\b\d\b", shift)] == list(
            dict.fromkeys((task.flow_shift, task.flow_shift_480p))
        )
        assert set.union(*(sizes[name] for name in trained.split(", "))) == set(task.sizes)
        assert ("one frame" in makes) == (task.kind in ("i2v", "flf2v"))
        assert ("image" in of) == task.takes_image and ("control video" in of) == (task.kind == "fun_control")
    assert f"`{DEFAULT_TASK}` (default)" in TEXT
    assert {task.cfg_scale for task in TASKS} == {5.0} and WanRequestFlags().fps == 16


def test_transformers_that_are_said_to_be_the_same_are() -> None:
    for first, second in (("t2v-14B", "t2i-14B"), ("t2v-14B-FC", "i2v-14B-FC")):
        assert f"`{first}` and `{second}`" in TEXT
        assert len({(t.kind, t.in_channels, t.size) for t in map(find_task, (first, second))}) == 1


def test_sizes_and_lengths_are_those_of_the_text() -> None:
    width, height = re.search(r"an image of 1000×800 make a video of (\d+)×(\d+)", TEXT).groups()
    flags = WanRequestFlags(task=find_task("i2v-14B"), prompt="猫", image_path=FIRST, video_size=(480, 832))
    request = flags.resolve(image_size=image_size)
    assert (request.width, request.height) == (int(width), int(height)) and request.flow_shift == 3
    asked, made = re.search(r"so (\d+) makes (\d+)\.", TEXT).groups()
    assert replace(flags, video_length=int(asked)).resolve(image_size=image_size).num_frames == int(made)
    more, trimmed = re.search(r"makes (\w+) more frames; `--trim_tail_frames (\d)`", TEXT).groups()
    appended = replace(flags, end_image_path=LAST).resolve(image_size=image_size)
    assert appended.appends_end and {"four": 4}[more] == int(trimmed)


@pytest.mark.parametrize(
    ("task", "given", "seen"),
    [
        ("i2v-14B", {}, ["b.png"]),
        ("i2v-14B", {"image_path": FIRST}, [FIRST]),
        ("flf2v-14B", {}, ["a.png", "b.png"]),
        ("flf2v-14B", {"image_path": FIRST}, [FIRST, "b.png"]),
        ("flf2v-14B", {"image_path": FIRST, "end_image_path": LAST}, [FIRST, LAST]),
    ],
)
def test_clip_sees_what_the_table_says(task: str, given: dict[str, str], seen: list[str]) -> None:
    places = {"one_frame_inference": "target_index=3,control_index=9;0", "control_image_path": ("b.png", "a.png")}
    flags = WanRequestFlags(task=find_task(task), prompt="猫", **places, **given)
    assert clip_images(flags.resolve(image_size=image_size)) == seen


def test_the_table_of_inline_options_is_complete() -> None:
    found: dict[str, str] = {}
    for *pair, letters, meaning in cells("option", "", "option"):
        for names, means in (pair, (letters, meaning)):
            found |= {name.removeprefix("--"): means for name in guides.in_backticks(names)}
    options = WanRequestFlags.line_options
    assert found.keys() == options.keys()
    assert {name for name, means in found.items() if "repeatable" in means} == {
        n for n, o in options.items() if o.repeats
    }


def test_the_table_of_sample_prompts_has_every_letter_with_its_key_and_default() -> None:
    found = {}
    for letters, keys, default, _ in cells("in a line", "key in TOML and JSON"):
        pairs = zip(guides.in_backticks(letters), guides.in_backticks(keys), strict=True)
        found |= {letter.removeprefix("--"): (key, default) for letter, key in pairs}
    assert {n: key for n, (key, _) in found.items()} == {n: o.key for n, o in WanRequestFlags.sample_options.items()}
    assert {found[name][1] for name in "wh"} == {str(side) for side in WanRequestFlags().video_size}
    assert float(found["l"][1]) == find_task("i2v-14B").cfg_scale


# ---- prompts and data sets ----


def test_the_samples_of_the_guide_can_be_made(tmp_path: Path) -> None:
    path = tmp_path / "サンプル.txt"
    path.write_text(prompts(0), encoding="utf-8")
    defaults = WanRequestFlags(one_frame_inference="default", video_length=1, exact_size=True)
    found = sample_prompts(str(path), WanRequestFlags.sample_options)
    requests = [prompt.over(replace(defaults, task=find_task(task))).resolve(image_size=image_size)
                for prompt, task in zip(found, ("i2v-14B", "flf2v-14B", "i2v-14B"), strict=True)]  # fmt: skip
    assert [request.one_frame.control_indices for request in requests] == [(0,), (0, 2), (0, 10)]
    assert len(requests[2].control_mask_paths) == 2 and {request.seed for request in requests} == {1}


def test_the_prompt_lines_of_the_guide_can_be_made() -> None:
    tasks = (find_task("t2v-14B"), find_task("i2v-14B"), find_task("i2v-14B"))
    lines = [line for _, line in numbered_lines(prompts(1))]
    for line, task in zip(lines, tasks, strict=True):
        flags = PromptLine.parse(line, "line", WanRequestFlags.line_options).over(WanRequestFlags(task=task))
        flags.resolve(image_size=image_size)


def test_the_data_sets_of_the_guide_are_those_that_its_commands_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("after", "before", "videos"):
        (tmp_path / folder).mkdir()
    for text, modes in zip(guides.blocks(TEXT, "toml"), (("one_frame",), ("t2v", "i2v", "flf2v")), strict=True):
        (tmp_path / "データ.toml").write_text(text, encoding="utf-8")
        (dataset,) = load_dataset_config("データ.toml").datasets
        name = "images.toml" if isinstance(dataset, ImageDataset) else "videos.toml"
        caching = [rules_of(flags) for flags in CACHINGS if flags.cache.dataset_config == name]
        assert tuple(rules.mode for rules in caching) == modes
        for rules in caching:
            rules.check(dataset)


def test_every_task_is_trained_from_the_caches_that_the_table_names() -> None:
    found = set()
    for how, _, names in cells("caches made with", "the model is shown"):
        words = [word for text in guides.in_backticks(how) for word in text.split() if word.startswith("--")]
        values = " ".join(words).replace("--clip", "--clip 目.pth").split()
        mode = rules_of(parse(WanCacheLatentsFlags, description="", argv=["--dataset_config", "a", *values])).mode
        for task in map(find_task, guides.in_backticks(names)):
            assert mode in {trainable_modes(task)[0], "one_frame"} & set(trainable_modes(task))
            assert ("control_directory" in how) == ("latents_control" in needed_contents(task))
            found.add((task.name, mode))
    assert {name for name, mode in found if mode != "one_frame"} == {task.name for task in TASKS}
    assert {name for name, mode in found if mode == "one_frame"} == {
        task.name for task in TASKS if "one_frame" in trainable_modes(task)
    }


# ---- guidance ----


def test_steps_with_guidance_lie_where_they_are_drawn() -> None:
    steps, ratio = re.search(r"--infer_steps (\d+) --cfg_apply_ratio ([\d.]+)", TEXT).groups()
    drawn = dict(re.findall(r"^(\w+) +([.#]+)$", TEXT, re.MULTILINE))
    choices = next(o.choices for o in options_of(WanGenerateFlags) if o.name == "cfg_skip_mode")
    assert drawn == {
        mode: "".join(".#"[guided] for guided in cfg_steps(mode, float(ratio), int(steps))) for mode in choices
    }


def test_defaults_of_sampling_are_those_of_the_table() -> None:
    flags = WanRequestFlags()
    table = by_first("option", "default")
    assert table["--sample_solver"][0] == f"`{flags.sample_solver}`" and table["--fps"][0] == str(flags.fps)
    assert f"`--slg_scale` ({flags.slg_scale:g})" in TEXT
    assert f"`--slg_start` ({flags.slg_start:g}) to `--slg_end` ({flags.slg_end:g})" in TEXT


# ---- messages ----

ROOMS = ("options", "common", "dataset", "modules", "wan")
FILES = [path for room in ROOMS for path in sorted((guides.ROOT / room).glob("*.py"))]
SOURCES = "".join(path.read_text(encoding="utf-8") for path in FILES)
MESSAGES = [message for row in cells("message", "what to do") for message in guides.in_backticks(row[0])]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_that_are_explained_are_in_the_code(message: str) -> None:
    literal = message.removeprefix("expected ").replace("--task", "{FLAG}")
    assert literal.replace("mode is i2v in the cache, flf2v", "mode is {shown} in the cache, {expected}") in SOURCES
