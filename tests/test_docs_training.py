"""`docs/training.md` and what the README says of training: commands, options and tables are the scripts' own."""

import logging
import re
from pathlib import Path

import pytest

from common.flag_options import options_of
from common.flags import parse
from networks.arguments import DEFAULT_DIM
from options.flags_fpack_cache import FramePackCacheLatentsFlags, FramePackCacheTextsFlags
from options.flags_fpack_generate import FramePackGenerateFlags
from options.flags_fpack_train import FramePackTrainFlags, check_framepack_train
from options.flags_optimizer import SCHEDULERS
from options.flags_timesteps import TimestepFlags, settings_read
from options.flags_wan_train import WanTrainFlags
from options.fpack_request import FramePackRequestFlags
from options.geometry import sections_from_seconds
from options.sample_prompts import sample_prompts
from options.wan_request import WanRequestFlags
from tests import guides
from tests.guides import in_backticks, script_and_arguments

DOCS = {name: guides.text_of(name) for name in ("README.md", "docs/training.md")}
TEXT = DOCS["docs/training.md"]
SCRIPTS = {
    "fpack_cache_latents.py": FramePackCacheLatentsFlags,
    "fpack_cache_text_encoder_outputs.py": FramePackCacheTextsFlags,
    "fpack_generate_video.py": FramePackGenerateFlags,
    "fpack_train_network.py": FramePackTrainFlags,
}
OPTIONS = {name: {n: o for o in options_of(flags) for n in o.names} for name, flags in SCRIPTS.items()}
TRAINING = OPTIONS["fpack_train_network.py"]

SAMPLE_OPTIONS = FramePackRequestFlags.sample_options


def commands(name: str) -> list[list[str]]:
    return guides.commands(DOCS[name], SCRIPTS)


ALL = [words for name in DOCS for words in commands(name)]
TRAININGS = [words for words in ALL if "fpack_train_network.py" in words]


def rows(first_header: str) -> list[list[str]]:
    return guides.rows(TEXT, first_header)


@pytest.mark.parametrize("words", ALL, ids=lambda words: words[1])
def test_every_command_is_one_that_its_script_understands(words: list[str]) -> None:
    script, arguments = script_and_arguments(words)
    parse(SCRIPTS[script], description="", argv=arguments)


@pytest.mark.parametrize("words", TRAININGS, ids=lambda words: words[-1])
def test_every_training_command_passes_the_checks_and_all_of_it_has_an_effect(
    words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = parse(FramePackTrainFlags, description="", argv=script_and_arguments(words)[1])
    with caplog.at_level(logging.WARNING):
        check_framepack_train(flags)
    assert caplog.messages == []


@pytest.mark.parametrize(("kind", "is_one_frame"), [("images", True), ("videos", False)])
def test_both_kinds_go_from_the_data_set_to_the_lora_in_three_commands(kind: str, is_one_frame: bool) -> None:
    of_kind = [words for words in commands("docs/training.md") if f"{kind}.toml" in words]
    latents, texts, training = (script_and_arguments(words) for words in of_kind)
    assert latents[0] == "fpack_cache_latents.py" and texts[0] == "fpack_cache_text_encoder_outputs.py"
    assert training[0] == "fpack_train_network.py" and ("--one_frame" in latents[1]) == is_one_frame


def test_the_readmes_training_is_from_the_caches_that_it_makes() -> None:
    generating, caching, training = (script_and_arguments(words) for words in commands("README.md"))
    assert generating[0] == "fpack_generate_video.py" and training[0] == "fpack_train_network.py"
    flags = [parse(SCRIPTS[script], description="", argv=arguments) for script, arguments in (caching, training)]
    assert flags[0].cache.dataset_config == flags[1].data.dataset_config


def test_every_option_that_is_named_exists() -> None:
    known = {f"--{name}" for options in OPTIONS.values() for name in options}
    known |= {f"--{name}" for option in options_of(WanTrainFlags) for name in option.names}
    known |= {f"--{letter}" for letter in (*SAMPLE_OPTIONS, *WanRequestFlags.sample_options)}
    known |= {"--num_processes", "--num_cpu_threads_per_process"}
    named = guides.options_named(TEXT)
    assert named - known == set() and len(named) > 90


def test_the_table_of_settings_has_the_codes_defaults_and_values_that_are_taken() -> None:
    words = {"none": None, "random": None, "accelerate's": None}
    for cell, default, start, _ in rows("option"):
        option = TRAINING[in_backticks(cell)[0].removeprefix("--")]
        actual = DEFAULT_DIM if option.name == "network_dim" else option.default
        assert actual == (words[default] if default in words else option.convert(default, cell))
        option.convert(start, cell)


def test_every_schedule_stands_with_what_it_heeds() -> None:
    heeded = {}
    for kinds, what, *_ in rows("`--lr_scheduler`"):
        for kind in in_backticks(kinds):
            heeded[kind] = {f"lr_{name}" for name in in_backticks(what) if re.fullmatch(r"[a-z_]+", name)}
    assert heeded.pop("piecewise_constant") == heeded["greedy"] == {"lr_scheduler_args"}
    heeded |= dict.fromkeys(("greedy", "reduce_lr_on_plateau", "piecewise_constant"), set())
    assert heeded == {kind: set(names) for kind, names in SCHEDULERS.items()}


def test_every_timestep_method_stands_with_what_it_reads() -> None:
    found = {kind: row for row in rows("`--timestep_sampling`") for kind in in_backticks(row[0])}
    choices = set(TRAINING["timestep_sampling"].choices) - {"ideogram4_shift"}
    assert found.keys() == choices
    shaping = {"discrete_flow_shift", "sigmoid_scale", "logit_mean", "logit_std", "mode_scale"}
    for kind, (_, _, reads) in found.items():
        schemes = ("none", "logit_normal", "mode") if kind == "sigma" else ("none",)
        flags = [TimestepFlags(timestep_sampling=kind, weighting_scheme=scheme) for scheme in schemes]
        expected = shaping & {name for each in flags for name in settings_read(each)}
        named = {name.removeprefix("--") for name in in_backticks(reads)}
        assert named - ({"logit_mean", "logit_std"} if kind == "qinglong_qwen" else set()) == expected


def test_the_table_of_sample_prompts_has_every_letter_with_its_key_and_default() -> None:
    found = {}
    for letters, keys, default, _ in rows("in a line"):
        pairs = zip(in_backticks(letters), in_backticks(keys), strict=True)
        found |= {letter.removeprefix("--"): (key, default.split(", ")) for letter, key in pairs}
    assert {letter: key for letter, (key, _) in found.items()} | {"cn": "control_video_path"} == {
        letter: option.key for letter, option in SAMPLE_OPTIONS.items()
    }
    left_out = FramePackRequestFlags()
    (size,) = set(left_out.video_size)
    numbers = {"w": size, "h": size, "s": left_out.infer_steps}
    numbers |= {"g": left_out.embedded_cfg_scale, "l": left_out.guidance_scale}
    for letter, number in numbers.items():
        assert f"{number:g}" == found[letter][1][letter == "l"]


def test_the_prompts_of_the_guide_can_be_sampled(tmp_path: Path) -> None:
    (prompts,) = guides.blocks(TEXT, "text")
    path = tmp_path / "サンプル.txt"
    path.write_text(prompts, encoding="utf-8")
    frame = FramePackRequestFlags(one_frame_inference="default", video_seconds=1 / 30)
    prompts = sample_prompts(str(path), SAMPLE_OPTIONS)
    requests = [prompt.over(frame).resolve(image_size=lambda path: (1, 1)) for prompt in prompts]
    assert [request.num_sections for request in requests] == [1, 1, 2]
    assert [request.one_frame is None for request in requests] == [False, False, True]
    kisekaeichi = requests[0].one_frame
    assert (kisekaeichi.target_index, kisekaeichi.control_indices) == (1, (0, 10))


def test_frames_of_a_sample_make_the_sections_that_the_guide_says() -> None:
    counts, sections = re.search(r"([\d, ]+) make ([\d, ]+) sections", TEXT).groups()
    made = [sections_from_seconds(int(count) / 30, 9) for count in counts.split(",")]
    assert made == [int(count) for count in sections.split(",")]


@pytest.mark.parametrize("name", guides.NAMES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    assert guides.broken_links(name) == []


def test_every_script_of_the_tree_is_there_and_named_in_the_readme() -> None:
    scripts = {path.name for path in guides.ROOT.glob("*.py")} - {"quickstart.py"}
    assert {name for name in scripts if f"`{name}`" in DOCS["README.md"]} == scripts


@pytest.mark.parametrize(
    "message",
    [
        "not available yet in this version",
        "latent and text caches",
        "a cache of the present sources and settings",
        "caches that were made alike",
        "the loss is not a number, with ",
        "1 frame makes a whole section",
        "no mask in any cache",
    ],
)
def test_messages_that_are_explained_are_in_the_code(message: str) -> None:
    explained = [line for line in TEXT.split("## Trouble")[1].splitlines() if message in line.split(" | ")[0]]
    sources = (
        path for room in ("options", "common", "dataset", "training") for path in (guides.ROOT / room).glob("*.py")
    )
    assert explained and any(message in path.read_text(encoding="utf-8") for path in sources)
