"""The data set file: every key, what is inherited, and every kind of mistake with its place and its remedy."""

import json
import logging
import random
import re
from dataclasses import fields
from pathlib import Path

import pytest

from dataset.config import COMMON_KEYS, READERS, Dataset, ImageDataset, VideoDataset, load_dataset_config
from options.errors import UserError, UserErrors


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """The current folder, with everything that the files below name."""
    monkeypatch.chdir(tmp_path)
    for name in ("images", "videos", "controls", "写真 [x]"):
        (tmp_path / name).mkdir()
    for name in ("images.jsonl", "videos.jsonl"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def load(text, name="data.toml"):
    Path(name).write_text(text, encoding="utf-8")
    return load_dataset_config(name).datasets


def image_set(lines=""):
    return f'[[datasets]]\nimage_directory = "images"\n{lines}\n'


def video_set(lines=""):
    return f'[[datasets]]\nvideo_directory = "videos"\n{lines}\n'


def problems(text, name="data.toml"):
    with pytest.raises(UserError) as caught:
        load(text, name)
    return str(caught.value).split("\n")


def problem(text, name="data.toml"):
    (line,) = problems(text, name)
    return line


# ---- what a valid file means ----


def test_defaults_of_an_image_data_set():
    assert load(image_set()) == (
        ImageDataset(
            where="data.toml [datasets][1]",
            cache_directory=Path("images"),
            image_directory=Path("images"),
            image_jsonl_file=None,
            mask_directory=None,
            control_directory=None,
            resolution=(960, 544),
            caption_extension=None,
            batch_size=1,
            num_repeats=1,
            enable_bucket=False,
            bucket_no_upscale=False,
            fp_latent_window_size=9,
            multiple_target=False,
            fp_1f_clean_indices=None,
            fp_1f_target_index=None,
            fp_1f_no_post=False,
            fp_1f_image_embedding_source="control",
            no_resize_control=False,
            control_resolution=None,
        ),
    )


def test_defaults_of_a_video_data_set():
    assert load(video_set()) == (
        VideoDataset(
            where="data.toml [datasets][1]",
            cache_directory=Path("videos"),
            video_directory=Path("videos"),
            video_jsonl_file=None,
            control_directory=None,
            resolution=(960, 544),
            caption_extension=None,
            batch_size=1,
            num_repeats=1,
            enable_bucket=False,
            bucket_no_upscale=False,
            fp_latent_window_size=9,
            target_frames=(1,),
            frame_extraction="head",
            frame_stride=1,
            frame_sample=1,
            max_frames=129,
            source_fps=None,
        ),
    )


@pytest.mark.parametrize(
    ("kind", "key", "written", "value"),
    [
        ("image", "resolution", "640", (640, 640)),
        ("image", "resolution", "[832, 480]", (832, 480)),
        ("image", "caption_extension", '"_ja.txt"', "_ja.txt"),
        ("image", "batch_size", "4", 4),
        ("image", "num_repeats", "10", 10),
        ("image", "enable_bucket", "true", True),
        ("image", "bucket_no_upscale", "true\nenable_bucket = true", True),
        ("image", "bucket_no_upscale", "true", False),
        ("image", "cache_directory", '"写真 [x]/cache"', Path("写真 [x]/cache")),
        ("image", "control_directory", '"controls"', Path("controls")),
        ("image", "mask_directory", '"controls"', Path("controls")),
        ("image", "multiple_target", "true", True),
        ("image", "fp_latent_window_size", "16", 16),
        ("image", "fp_1f_clean_indices", '[0, 10]\ncontrol_directory = "controls"', (0, 10)),
        ("image", "fp_1f_clean_indices", '[10, 0]\ncontrol_directory = "controls"', (10, 0)),
        ("image", "fp_1f_target_index", "13", 13),
        ("image", "fp_1f_target_index", "0", 0),
        ("image", "fp_1f_no_post", "true", True),
        ("image", "fp_1f_image_embedding_source", '"target"', "target"),
        ("image", "fp_1f_image_embedding_source", "0", 0),
        (
            "image",
            "fp_1f_image_embedding_source",
            '1\nfp_1f_clean_indices = [0, 10]\ncontrol_directory = "controls"',
            1,
        ),
        ("image", "no_resize_control", "true", True),
        ("image", "control_resolution", "1024", (1024, 1024)),
        ("video", "target_frames", "[1, 25, 45]", (1, 25, 45)),
        ("video", "target_frames", "[45, 26, 25, 4]", (1, 25, 45)),
        *[("video", "frame_extraction", f'"{x}"', x) for x in ("head", "chunk", "slide", "uniform", "full")],
        ("video", "frame_stride", "10", 10),
        ("video", "frame_sample", "4", 4),
        ("video", "max_frames", "500", 500),
        ("video", "source_fps", "30", 30.0),
        ("video", "source_fps", "23.976", 23.976),
    ],
)
def test_every_key(kind, key, written, value):
    (dataset,) = load((image_set if kind == "image" else video_set)(f"{key} = {written}"))
    assert getattr(dataset, key) == value and type(getattr(dataset, key)) is type(value)


def test_keys_and_fields_are_the_same():
    all_fields = {field.name for kind in (ImageDataset, VideoDataset) for field in fields(kind)}
    assert set(READERS) == all_fields - {"where"}
    assert {field.name for field in fields(Dataset)} > COMMON_KEYS


def test_general_counts_where_the_data_set_is_silent():
    general = '[general]\nresolution = 640\ncaption_extension = ".txt"\nbatch_size = 2\nenable_bucket = true\n'
    first, second = load(general + image_set("batch_size = 3\nenable_bucket = false") + video_set("resolution = 320"))
    assert (first.resolution, first.batch_size, first.enable_bucket) == ((640, 640), 3, False)
    assert (second.resolution, second.batch_size, second.enable_bucket) == ((320, 320), 2, True)
    assert first.caption_extension == second.caption_extension == ".txt"


def test_json_and_toml_mean_the_same():
    table = {"image_directory": "images", "caption_extension": ".txt", "resolution": [832, 480], "batch_size": 2}
    text = json.dumps({"general": {"num_repeats": 3}, "datasets": [table]})
    (from_json,) = load(text, "data.JSON")
    (from_toml,) = load(
        '[general]\nnum_repeats = 3\n[[datasets]]\nimage_directory = "images"\n'
        'caption_extension = ".txt"\nresolution = [832, 480]\nbatch_size = 2',
        "data.TOML",
    )
    assert vars(from_json) | {"where": ""} == vars(from_toml) | {"where": ""}


def test_byte_order_mark_and_windows_line_breaks():
    Path("data.toml").write_bytes(b"\xef\xbb\xbf" + image_set("batch_size = 2").replace("\n", "\r\n").encode())
    assert load_dataset_config("data.toml").datasets[0].batch_size == 2


def test_japanese_and_bracketed_folders():
    (dataset,) = load('[[datasets]]\nimage_directory = "写真 [x]"')
    assert dataset.image_directory == dataset.cache_directory == Path("写真 [x]")


@pytest.mark.parametrize("key", ["control_directory", "mask_directory"])
def test_jsonl_ignores_other_folders_aloud(caplog, key):
    text = f'[[datasets]]\nimage_jsonl_file = "images.jsonl"\ncache_directory = "c"\n{key} = "nowhere"'
    (dataset,) = load(text)
    assert getattr(dataset, key) is None and dataset.cache_directory == Path("c")
    assert f"data.toml [datasets][1] {key}: not used" in caplog.text


@pytest.mark.parametrize(
    ("old", "new", "written", "value"),
    [
        ("flux_kontext_no_resize_control", "no_resize_control", "true", True),
        ("qwen_image_edit_no_resize_control", "no_resize_control", "true", True),
        ("qwen_image_edit_control_resolution", "control_resolution", "[640, 480]", (640, 480)),
    ],
)
def test_old_keys_are_renamed_and_the_new_one_counts(caplog, old, new, written, value):
    (dataset,) = load(image_set(f"{old} = {written}"))
    assert getattr(dataset, new) == value and f"{old}: this key is now called {new}" in caplog.text
    default = getattr(ImageDataset(where="", cache_directory=Path()), new)
    other = "false" if new == "no_resize_control" else "320"
    (dataset,) = load(image_set(f"{old} = {written}\n{new} = {other}"))
    assert getattr(dataset, new) == (default if other == "false" else (320, 320))


def test_old_key_in_general_is_refused_as_the_new_one_would_be():
    line = problem("[general]\nflux_kontext_no_resize_control = true\n" + image_set())
    assert "data.toml [general] no_resize_control: got a key of single data sets" in line
    assert "move it below [[datasets]]" in line


@pytest.mark.parametrize(("written", "is_noted"), [("[45, 1, 25]", False), ("[26]", True)])
def test_only_a_changed_clip_length_is_noted(caplog, written, is_noted):
    caplog.set_level(logging.INFO)
    load(video_set(f"target_frames = {written}"))
    assert ("4n + 1" in caplog.text) == is_noted


# ---- mistakes: the place, the value and the remedy ----


@pytest.mark.parametrize(
    ("kind", "lines", "place", "words"),
    [
        ("image", "resolutoin = 640", "resolutoin", "did you mean resolution?"),
        ("image", "Batch_Size = 2", "Batch_Size", "did you mean batch_size?"),
        ("image", "zzz = 2", "zzz", "remove it"),
        ("image", "target_frames = [1]", "target_frames", "got a key of video data sets"),
        ("image", "source_fps = 30.0", "source_fps", "got a key of video data sets"),
        ("video", "fp_1f_target_index = 1", "fp_1f_target_index", "got a key of image data sets"),
        ("video", "no_resize_control = true", "no_resize_control", "got a key of image data sets"),
        ("video", "flux_kontext_no_resize_control = true", "no_resize_control", "got a key of image data sets"),
        ("image", "resolution = 0", "resolution", "got 0;"),
        ("image", "resolution = [0, 640]", "resolution", "got [0, 640]"),
        ("image", "resolution = -640", "resolution", "from 1 to 16384"),
        ("image", "resolution = [640]", "resolution", "[width, height]"),
        ("image", "resolution = [640, 640, 640]", "resolution", "[width, height]"),
        ("image", "resolution = []", "resolution", "[width, height]"),
        ("image", "resolution = 640.0", "resolution", "got 640.0"),
        ("image", "resolution = true", "resolution", "got true"),
        ("image", "resolution = 99999", "resolution", "from 1 to 16384"),
        ("image", "resolution = [648, 640]", "resolution", "multiples of 16"),
        ("image", "resolution = 15\nenable_bucket = true", "resolution", "an area of at least 16 x 16"),
        ("image", "batch_size = 0", "batch_size", "an integer from 1"),
        ("image", "batch_size = true", "batch_size", "got true"),
        ("image", "batch_size = 2.0", "batch_size", "got 2.0"),
        ("image", 'batch_size = "2"', "batch_size", 'got "2"'),
        ("image", "num_repeats = 0", "num_repeats", "an integer from 1"),
        ("image", "num_repeats = -1", "num_repeats", "an integer from 1"),
        ("image", "enable_bucket = 1", "enable_bucket", "true or false"),
        ("image", 'enable_bucket = "true"', "enable_bucket", "true or false"),
        ("image", 'caption_extension = "txt"', "caption_extension", "write .txt"),
        ("image", 'caption_extension = ""', "caption_extension", "write .txt"),
        ("image", 'caption_extension = "/x.txt"', "caption_extension", "write .txt"),
        ("image", "fp_latent_window_size = 0", "fp_latent_window_size", "from 1"),
        ("image", "fp_1f_target_index = -1", "fp_1f_target_index", "from 0"),
        ("image", "fp_1f_target_index = [1]", "fp_1f_target_index", "got [1]"),
        ("image", "fp_1f_clean_indices = []", "fp_1f_clean_indices", "not empty"),
        ("image", "fp_1f_clean_indices = 0", "fp_1f_clean_indices", "a list of integers"),
        ("image", "fp_1f_clean_indices = [0, -1]", "fp_1f_clean_indices", "from 0"),
        ("image", "fp_1f_clean_indices = [0, true]", "fp_1f_clean_indices", "a list of integers"),
        ("image", "fp_1f_clean_indices = [0]", "fp_1f_clean_indices", "add control_directory"),
        ("image", 'fp_1f_image_embedding_source = "contrl"', "fp_1f_image_embedding_source", "did you mean control?"),
        ("image", "fp_1f_image_embedding_source = 1", "fp_1f_image_embedding_source", "0 to 0"),
        ("image", "fp_1f_image_embedding_source = -1", "fp_1f_image_embedding_source", "from 0"),
        ("image", "fp_1f_image_embedding_source = true", "fp_1f_image_embedding_source", "got true"),
        ("image", "control_resolution = 0", "control_resolution", "got 0;"),
        ("image", "cache_directory = 3", "cache_directory", "a path in quotes"),
        ("image", 'cache_directory = ""', "cache_directory", "a path in quotes"),
        ("image", 'cache_directory = "a\\u0000b"', "cache_directory", "a path in quotes"),
        ("image", 'cache_directory = "images.jsonl"', "cache_directory", "rename it"),
        ("image", 'control_directory = "nowhere"', "control_directory", "an existing folder"),
        ("image", 'control_directory = "images.jsonl"', "control_directory", "is no folder"),
        ("image", 'mask_directory = "nowhere"', "mask_directory", "an existing folder"),
        ("image", "mask_directory = true", "mask_directory", "a path in quotes"),
        ("image", 'mask_directry = "controls"', "mask_directry", "did you mean mask_directory?"),
        ("image", 'mask_directory = "写真 [x]/../images"', "mask_directory", "the folder of image_directory"),
        (
            "image",
            'mask_directory = "controls"\ncontrol_directory = "controls"',
            "mask_directory",
            "the folder of control_directory",
        ),
        ("video", 'mask_directory = "controls"', "mask_directory", "masks are for images"),
        ("video", "target_frames = []", "target_frames", "not empty"),
        ("video", "target_frames = [0]", "target_frames", "integers from 1"),
        ("video", "target_frames = [25, -3]", "target_frames", "integers from 1"),
        ("video", "target_frames = 25", "target_frames", "write [1, 25, 45]"),
        ("video", 'frame_extraction = "sliding"', "frame_extraction", "did you mean slide?"),
        ("video", "frame_extraction = 1", "frame_extraction", "one of head, chunk"),
        ("video", "frame_stride = 0", "frame_stride", "from 1"),
        ("video", "frame_sample = 0", "frame_sample", "from 1"),
        ("video", "max_frames = 0", "max_frames", "from 1"),
        ("video", "source_fps = 0", "source_fps", "above 0"),
        ("video", "source_fps = nan", "source_fps", "above 0"),
        ("video", "source_fps = inf", "source_fps", "above 0"),
        ("video", "source_fps = true", "source_fps", "got true"),
        ("video", "batch_size = 1979-05-27", "batch_size", "got"),
        ("video", f"batch_size = 0x{'f' * 5000}", "batch_size", "too long to show"),
    ],
)
def test_mistake_is_one_line_with_its_place(kind, lines, place, words):
    line = problem((image_set if kind == "image" else video_set)(lines))
    assert line.startswith(f"data.toml [datasets][1] {place}: got ") and words in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "data.toml [datasets]: got nothing"),
        ("[general]\nbatch_size = 2", "data.toml [datasets]: got nothing"),
        ('[datasets]\nimage_directory = "images"', "two brackets"),
        ("datasets = [1]", "data.toml [datasets][1]: got 1; expected a table"),
        ("general = 1\n" + image_set(), "data.toml [general]: got 1; expected a table"),
        ("resolution = 640\n" + image_set(), "data.toml resolution: got an unknown key"),
        ("resolution = 640\n" + image_set(), "put it below [general]"),
        ("[generl]\nbatch_size = 2\n" + image_set(), "did you mean general?"),
        ("[general]\ntarget_frames = [1]\n" + video_set(), "move it below [[datasets]]"),
        ("[general]\nbatchsize = 1\n" + video_set(), "data.toml [general] batchsize: got an unknown key"),
        ("[general]\nbatch_size = 0\n" + image_set() + video_set(), "data.toml [general] batch_size: got 0"),
        ("[[datasets]]\nbatch_size = 1", "data.toml [datasets][1]: got none of them"),
        (image_set('video_directory = "videos"'), "got image_directory and video_directory"),
        (image_set('image_jsonl_file = "images.jsonl"'), "got image_directory and image_jsonl_file"),
        ('[[datasets]]\nimage_jsonl_file = "images.jsonl"', "got no cache_directory"),
        ('[[datasets]]\nvideo_jsonl_file = "videos.jsonl"', "add cache_directory"),
        ('[[datasets]]\nimage_directory = "nowhere"', "image_directory: got nowhere; expected an existing folder"),
        ('[[datasets]]\nimage_directory = "images.jsonl"', "is no folder"),
        ('[[datasets]]\nimage_jsonl_file = "images"\ncache_directory = "c"', "expected an existing file"),
        (image_set() + image_set(), "data.toml [datasets][2] cache_directory: got images"),
        (image_set() + video_set('cache_directory = "videos/../images"'), "that of data.toml [datasets][1]"),
        (image_set("a = [1, 2"), "expected valid TOML"),
        (image_set("batch_size = 1\nbatch_size = 2"), "expected valid TOML"),
        ('[[datasets]]\nimage_directory = "C:\\data"', "write \\ in a path as /"),
        (f"a = {'[' * 100_000}", "expected valid TOML"),
    ],
)
def test_mistake_in_the_whole(text, words):
    assert words in problem(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "a JSON object"),
        ("{", "valid JSON"),
        ('{"datasets": [], "datasets": []}', "'datasets' occurs twice"),
        ('{"datasets": [{"image_directory": "\\ud800"}]}', "a path in quotes"),
        ('{"datasets": [{"image_directory": null}]}', "got null"),
        ("[" * 100_000, "valid JSON"),
    ],
)
def test_mistake_in_json(text, words):
    assert words in problem(text, "data.json")


def test_a_shared_cache_folder_is_seen_through_a_link(folders):
    try:
        (folders / "link").symlink_to(folders / "images", target_is_directory=True)
    except OSError:
        pytest.skip("this system does not let us make links")
    assert "cache_directory: got link" in problem(image_set() + video_set('cache_directory = "link"'))


def test_all_problems_are_reported_at_once():
    text = "[general]\nresolution = 0\n" + image_set("batch_sise = 1\nnum_repeats = 0\ncontrol_directory = 'nowhere'")
    text += video_set("frame_extraction = 'haed'\nfp_1f_no_post = true") + "[[datasets]]\nbatch_size = '1'"
    found = problems(text)
    places = [line.partition(": got ")[0].removeprefix("data.toml ") for line in found]
    assert sorted(places) == [
        "[datasets][1] batch_sise",
        "[datasets][1] control_directory",
        "[datasets][1] num_repeats",
        "[datasets][2] fp_1f_no_post",
        "[datasets][2] frame_extraction",
        "[datasets][3]",
        "[datasets][3] batch_size",
        "[general] resolution",
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.yaml", b"", "ends in .toml or .json"),
        ("data", b"", "ends in .toml or .json"),
        ("data.toml", "a = '写'".encode("cp932"), "save it as UTF-8"),
        ("missing.toml", None, "there is no such file"),
        ("images", None, "it is a folder"),
        ("a\0b.toml", None, "there is no such file"),
    ],
)
def test_files_that_are_no_data_set_files(name, content, words):
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UserError, match="--config: got") as caught:
        load_dataset_config(name, flag="--config")
    assert words in str(caught.value)


# ---- anything at all ----

VALUES = (None, True, 0, -1, 3, 2**70, 0.5, float("nan"), "", "x", "images", "\0", "\ud800", [], [1], ["a"], {}, [{}])


def mutated(rng, content):
    """`content` with one value or key replaced or removed somewhere."""
    if isinstance(content, dict) and content and rng.random() < 0.9:
        key = rng.choice(list(content))
        changed = dict(content)
        value = changed.pop(key)
        if rng.random() < 0.8:
            new_key = key if rng.random() < 0.8 else rng.choice([*READERS, key[1:], "general"])
            changed[new_key] = mutated(rng, value)
        return changed
    if isinstance(content, list) and content and rng.random() < 0.7:
        at = rng.randrange(len(content))
        return [*content[:at], mutated(rng, content[at]), *content[at + 1 :]]
    return rng.choice(VALUES)


def test_no_mutation_ends_in_a_traceback():
    valid = {
        "general": {"resolution": 640, "caption_extension": ".txt", "enable_bucket": True},
        "datasets": [
            {"image_directory": "images", "control_directory": "controls", "fp_1f_clean_indices": [0, 10]},
            {"video_jsonl_file": "videos.jsonl", "cache_directory": "c", "target_frames": [1, 25], "source_fps": 30},
        ],
    }
    load(json.dumps(valid), "data.json")
    rng = random.Random(0)
    outcomes = {"valid": 0, "refused": 0}
    for _ in range(1500):
        content = valid
        for _ in range(rng.randint(1, 4)):
            content = mutated(rng, content)
        try:
            load(json.dumps(content), "data.json")
            outcomes["valid"] += 1
        except UserError as error:
            outcomes["refused"] += 1
            if isinstance(error, UserErrors):
                assert all(": got " in line for line in str(error).split("\n"))
    assert min(outcomes.values()) > 50


def test_no_broken_text_ends_in_a_traceback():
    valid = (image_set('caption_extension = ".txt"') + video_set("target_frames = [1, 25]")).encode()
    rng = random.Random(0)
    for _ in range(500):
        text = bytearray(valid)
        for _ in range(rng.randint(1, 5)):
            text[rng.randrange(len(text))] = rng.randrange(256)
        Path("data.toml").write_bytes(text)
        try:
            load_dataset_config("data.toml")
        except UserError as error:
            assert str(error)


# ---- the guide ----


def test_examples_of_the_guide_are_valid_and_name_what_they_say(repository):
    text = (repository / "docs" / "dataset.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    for folder in re.findall(r'^(?:\w+_directory) = "(.*?)"', "\n".join(blocks), flags=re.MULTILINE):
        Path(folder).mkdir(parents=True, exist_ok=True)
    Path("change.jsonl").write_bytes(b"")
    found = [load(block)[0] for block in blocks]
    assert [getattr(dataset, "fp_1f_clean_indices", "video") for dataset in found] == [
        "video",
        (0,),
        (0, 10),
        (0, 10),
        (0, 1),
        (0, 10),
        None,
    ]
    assert found[3].fp_1f_no_post and found[3].fp_1f_target_index == 1
    assert [dataset.mask_directory for dataset in found[3:6]] == [None, None, Path("clothes_only")]


def test_guide_names_every_key_with_its_default(repository):
    text = (repository / "docs" / "dataset.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, flags=re.MULTILINE))
    assert set(READERS) <= set(table)
    defaults = {field.name: field.default for kind in (ImageDataset, VideoDataset) for field in fields(kind)}
    for key, written in table.items():
        if key in READERS and written.startswith("`"):
            value = json.loads(written.strip("`"))
            assert (tuple(value) if isinstance(value, list) else value) == defaults[key], key
