"""Which files of a data set belong together: folders, captions, control images and videos, JSONL, and all mistakes."""

import json
import os
import random
from pathlib import Path

import pytest

from dataset.config import ImageDataset, VideoDataset
from dataset.sources import Listing, files_in, list_items

PLACE = "data.toml [datasets][1]"


@pytest.fixture(autouse=True)
def current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names, text=""):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")


def images(names, folder="images"):
    """Empty files in the place of images, each with a caption that is its stem."""
    for name in names:
        touch(f"{folder}/{name}")
        touch(f"{folder}/{os.path.splitext(name)[0]}.txt", text=f" {os.path.splitext(name)[0]}\n")


def image_set(folder="images", **changes):
    given = {"image_directory": Path(folder), "caption_extension": ".txt", "cache_directory": Path(folder)}
    return ImageDataset(where=PLACE, **(given | changes))


def controlled_set(**changes):
    return image_set(control_directory=Path("controls"), **changes)


def video_set(**changes):
    given = {"video_directory": Path("videos"), "caption_extension": ".txt", "cache_directory": Path("videos")}
    return VideoDataset(where=PLACE, **(given | changes))


def jsonl(*lines, kind="image", **changes):
    """A data set of a JSONL file with these lines: text, bytes, or an object."""
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    Path("d.jsonl").write_bytes(b"\n".join(encoded))
    make = ImageDataset if kind == "image" else VideoDataset
    return make(where=PLACE, cache_directory=Path("c"), **{f"{kind}_jsonl_file": Path("d.jsonl")}, **changes)


def only_problem(listing: Listing) -> str:
    (problem,) = listing.problems
    assert "\n" not in problem
    return problem


def names(listing: Listing) -> list[str]:
    assert listing.problems == ()
    return [item.path.name for item in listing.items]


def controls_of(listing: Listing) -> dict[str, list[str]]:
    assert listing.problems == ()
    return {item.path.name: [path.name for path in item.control_paths] for item in listing.items}


# ---- folders and captions ----


@pytest.mark.parametrize("folder", ["images", "写真 [x]", "a[!b]*c" if os.name != "nt" else "a[!b]c", "[0-9]"])
def test_folder_names_are_no_patterns(folder):
    images(["b 花.png", "a [1].jpg"], folder)
    listing = list_items(image_set(folder))
    assert names(listing) == ["a [1].jpg", "b 花.png"]
    assert [item.caption for item in listing.items] == ["a [1]", "b 花"]
    assert [item.stem for item in listing.items] == ["a [1]", "b 花"]


def test_images_are_known_by_suffix_in_any_case_and_sorted_by_name():
    known = ["a.png", "b.JPG", "c.jpeg", "d.webp", "e.BMP", "f.avif", "g.Png", "B.png"]
    images(known)
    touch("images/x.mp4", "images/x.png.bak", "images/.hidden.png", "images/._a.png", "images/sub/y.png")
    Path("images/folder.png").mkdir()
    assert names(list_items(image_set())) == sorted(known)


def test_videos_are_known_by_suffix():
    known = [f"{n}.{s}" for n, s in enumerate("mp4 webm avi mkv mov flv wmv m4v mpg MPEG".split())]
    images(known, "videos")
    touch("videos/x.png")
    assert names(list_items(video_set())) == known


def test_caption_goes_behind_the_stem_and_is_stripped():
    touch("images/a.b.png", "images/c.png")
    touch("images/a.b_ja.txt", text="\ufeff \n花、猫\n\n")
    touch("images/c_ja.txt")
    listing = list_items(image_set(caption_extension="_ja.txt"))
    assert [(item.path.name, item.caption) for item in listing.items] == [("a.b.png", "花、猫"), ("c.png", "")]


def test_image_without_a_caption_is_reported_and_the_rest_stays():
    images(["a.png", "b.png"])
    touch("images/c.png")
    listing = list_items(image_set())
    assert [item.path.name for item in listing.items] == ["a.png", "b.png"]
    path = Path("images/c.png")
    assert only_problem(listing).startswith(f"{path}: got no caption file c.txt; expected one beside it;")


def test_wrong_caption_extension_is_one_line():
    touch(*[f"images/{n}.png" for n in range(50)])
    assert only_problem(list_items(image_set())).startswith(f"{PLACE} caption_extension: got 50 images and no caption")


@pytest.mark.parametrize("make", [image_set, video_set])
def test_no_caption_extension_is_one_clear_line(make):
    images(["a.png", "b.png"])
    images(["a.mp4", "b.mp4"], "videos")
    listing = list_items(make(caption_extension=None))
    assert only_problem(listing).startswith(f"{PLACE}: got no caption_extension;") and listing.items == ()


def test_caption_that_is_not_utf8():
    images(["a.png", "b.png"])
    Path("images/b.txt").write_bytes("写真".encode("cp932"))
    listing = list_items(image_set())
    assert [item.path.name for item in listing.items] == ["a.png"]
    assert f"{Path('images/b.txt')}: got bytes that are not UTF-8" in only_problem(listing)


def test_empty_and_missing_folders():
    Path("images").mkdir()
    touch("images/sub/a.png", "images/readme.md")
    assert "subfolders are not searched" in only_problem(list_items(image_set()))
    assert f"{PLACE}: got nowhere; expected a file or folder that can be read" in only_problem(
        list_items(image_set("nowhere"))
    )


def test_pictures_of_other_kinds_are_noted():
    images(["a.png"])
    touch("images/b.gif", "images/c.TIFF")
    listing = list_items(image_set())
    assert names(listing) == ["a.png"]
    assert listing.notes == (f"{PLACE} image_directory: files of kinds that are not read: b.gif, c.TIFF",)


def test_two_sources_with_one_stem_are_both_named_and_left_out():
    images(["a.jpg", "a.png", "b.png"])
    listing = list_items(image_set())
    assert [item.path.name for item in listing.items] == ["b.png"]
    problem = only_problem(listing)
    assert str(Path("images/a.jpg")) in problem and str(Path("images/a.png")) in problem


# ---- control images of a folder ----


@pytest.mark.parametrize(
    ("targets", "controls", "count", "expected"),
    [
        (["im.png"], ["im.jpg"], 1, {"im.png": ["im.jpg"]}),
        (["im.png"], ["im_0.png"], 1, {"im.png": ["im_0.png"]}),
        (["im.png"], ["im_0.png", "im.png"], 2, {"im.png": ["im.png", "im_0.png"]}),
        (["im.png"], ["im_10.png", "im_2.webp"], 2, {"im.png": ["im_2.webp", "im_10.png"]}),
        (["im.png"], ["im_0002.png", "im_0001.png"], 2, {"im.png": ["im_0001.png", "im_0002.png"]}),
        (["im.png"], ["im_ref_1.png", "im_0.png"], 2, {"im.png": ["im_0.png", "im_ref_1.png"]}),
        (["im.png", "im_1.png"], ["im.png", "im_1.png"], 1, {"im.png": ["im.png"], "im_1.png": ["im_1.png"]}),
        (["im.png", "im_1.png"], ["im_0.png", "im_1_0.png"], 1, {"im.png": ["im_0.png"], "im_1.png": ["im_1_0.png"]}),
        (["a.b.png", "a.webp"], ["a.b.jpg", "a.jpg"], 1, {"a.b.png": ["a.b.jpg"], "a.webp": ["a.jpg"]}),
        (["猫 [1].png"], ["猫 [1]_0.png", "猫 [1]_1.png"], 2, {"猫 [1].png": ["猫 [1]_0.png", "猫 [1]_1.png"]}),
    ],
)
def test_controls_are_matched_by_name_and_ordered_by_number(targets, controls, count, expected):
    images(targets)
    touch(*[f"controls/{name}" for name in controls])
    assert controls_of(list_items(controlled_set(fp_1f_clean_indices=tuple(range(count))))) == expected


def test_without_indices_there_is_one_control():
    images(["a.png"])
    touch("controls/a.png")
    assert controls_of(list_items(controlled_set())) == {"a.png": ["a.png"]}


def test_without_a_control_folder_there_are_none():
    images(["a.png"])
    assert controls_of(list_items(image_set())) == {"a.png": []}


@pytest.mark.parametrize(
    ("controls", "indices", "words"),
    [
        ([], None, "got 0 control images; expected 1 (1 without fp_1f_clean_indices)"),
        (["imx.png"], None, "got 0 control images"),
        (["im.png"], (0, 10), "got 1 control images (im.png); expected 2 (one for each of fp_1f_clean_indices)"),
        (["im.png", "im_0.png"], None, "got 2 control images (im.png, im_0.png); expected 1"),
        (["im_0.png", "im_1.png", "im_2.png"], (0, 10), "got 3 control images"),
        (["im_back.png"], None, "im_back.png: got im_back.png; expected im or im_NUMBER before the suffix"),
        (["im_².png"], None, "rename it"),
        (["im.extra.png"], None, "rename it"),
        (["im_1.png", "im_1.jpg"], (0, 10), "got im_1.jpg, im_1.png"),
        (["im_1.png", "im_01.png"], (0, 10), "one control image for each number"),
    ],
)
def test_wrong_controls_keep_only_their_image_out(controls, indices, words):
    images(["im.png", "ok.png"])
    Path("controls").mkdir()
    touch(*[f"controls/{name}" for name in controls], *[f"controls/ok_{n}.png" for n in range(len(indices or [0]))])
    listing = list_items(controlled_set(fp_1f_clean_indices=indices))
    assert [item.path.name for item in listing.items] == ["ok.png"] and words in only_problem(listing)


def test_controls_without_an_image_are_noted():
    images(["a.png"])
    touch("controls/a.png", *[f"controls/z{n}.png" for n in range(7)])
    listing = list_items(controlled_set())
    assert names(listing) == ["a.png"]
    assert listing.notes == (
        f"{PLACE} control_directory: controls of no image: z0.png, z1.png, z2.png, z3.png, z4.png and 2 more",
    )


def test_all_problems_of_a_folder_at_once():
    images(["a.png", "b.png", "c.png", "c.jpg"])
    touch("images/d.png", "controls/a_x.png", "controls/c.png", "controls/d.png")
    listing = list_items(controlled_set())
    assert listing.items == () and len(listing.problems) == 4


# ---- control videos ----


def test_control_video_is_the_same_name_then_a_folder_then_another_suffix():
    images(["a.mp4", "b.mp4", "c.mp4", "d.MOV"], "videos")
    touch(
        "controls/a.mp4", "controls/a/0.png", "controls/b/0.png", "controls/b.mkv", "controls/c.WEBM", "controls/c.avi"
    )
    touch("controls/d.mov", "controls/d.MOV")
    listing = list_items(video_set(control_directory=Path("controls")))
    assert controls_of(listing) == {"a.mp4": ["a.mp4"], "b.mp4": ["b"], "c.mp4": ["c.WEBM"], "d.MOV": ["d.MOV"]}


def test_missing_control_videos_and_folders_without_frames():
    images(["a.mp4", "b.mp4", "c.mp4"], "videos")
    touch("controls/a.mp4", "controls/b/readme.txt")
    listing = list_items(video_set(control_directory=Path("controls")))
    assert [item.path.name for item in listing.items] == ["a.mp4"] and len(listing.problems) == 2
    assert "no images in the folder" in listing.problems[0] and "got no control video" in listing.problems[1]


# ---- JSONL ----


def test_lines_captions_and_order():
    touch("写真 [x]/b.png", "写真 [x]/a.png")
    caption = " 猫\u2028と\x85花 "
    lines = [
        {"image_path": "写真 [x]/b.png", "caption": caption},
        "",
        {"image_path": "写真 [x]/a.png", "caption": ""},
        " \r",
    ]
    raw = json.dumps(lines[0], ensure_ascii=False).encode()
    listing = list_items(jsonl(b"\xef\xbb\xbf" + raw, *lines[1:]))
    assert names(listing) == ["b.png", "a.png"]
    assert listing.items[0].caption == caption and listing.items[0].where == "d.jsonl line 1"
    assert listing.items[1].where == "d.jsonl line 3"


@pytest.mark.parametrize(
    ("entry", "count", "expected"),
    [
        ({}, None, []),
        ({"control_path": "x.png"}, None, ["x.png"]),
        ({"control_path_0": "x.png"}, None, ["x.png"]),
        ({"control_path_1": "y.png", "control_path_0": "x.png"}, 2, ["x.png", "y.png"]),
        ({"control_path_10": "y.png", "control_path_2": "x.png"}, 2, ["x.png", "y.png"]),
        ({"control_path_0000": "x.png", "control_path_0001": "y.png"}, 2, ["x.png", "y.png"]),
        ({"control_path_1": "y.png", "control_path": "x.png"}, 2, ["x.png", "y.png"]),
        ({"control_path": "x.png,y.png"}, 2, ["x.png", "y.png"]),
        ({"control_path": " y.png , x.png"}, 2, ["y.png", "x.png"]),
        ({"control_path": "p,q.png"}, 1, ["p,q.png"]),
        ({"control_path_0": "x.png,y.png"}, 2, ["x.png", "y.png"]),
    ],
)
def test_controls_of_a_line(entry, count, expected):
    touch("a.png", "x.png", "y.png", "p,q.png", "p", "q.png")
    if list(entry) == ["control_path_0"] and "," in entry["control_path_0"]:
        dataset = jsonl({"image_path": "a.png", "caption": ""} | entry, fp_1f_clean_indices=(0, 1))
        assert "got x.png,y.png; expected an image" in only_problem(list_items(dataset))
        return
    dataset = jsonl({"image_path": "a.png", "caption": ""} | entry, fp_1f_clean_indices=count and tuple(range(count)))
    assert controls_of(list_items(dataset)) == {"a.png": expected}


def test_image_path_0_and_several_targets():
    touch("a.png", "b.png")
    entry = {"image_path_0": "a.png", "image_path_1": "b.png", "caption": ""}
    assert names(list_items(jsonl({"image_path_0": "a.png", "caption": ""}))) == ["a.png"]
    (item,) = list_items(jsonl(entry, multiple_target=True)).items
    assert (item.path, item.more_target_paths) == (Path("a.png"), (Path("b.png"),))
    assert "set multiple_target = true" in only_problem(list_items(jsonl(entry)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "got no valid JSON"),
        ("nan", "got no valid JSON"),
        ("[" * 100_000, "got no valid JSON"),
        ('{"image_path": "C:\\data\\a.png", "caption": ""}', "write \\ in a path as / or twice"),
        ('{"caption": "", "caption": "x", "image_path": "a.png"}', "'caption' occurs twice"),
        ("写".encode("cp932"), "got bytes that are not UTF-8"),
        ("[]", "a JSON list"),
        ("3", "one object on each line"),
        ({"caption": ""}, "got no image_path"),
        ({"image_path": "a.png"}, "got no caption;"),
        ({"image_path": "a.png", "captoin": "x"}, "did you mean caption?"),
        ({"image": "a.png", "caption": "x"}, "did you mean image_path?"),
        ({"image_path": "a.png", "caption": 3}, "line 2 caption: got 3"),
        ({"image_path": "a.png", "caption": None}, "got null"),
        ({"image_path": "", "caption": ""}, "line 2 image_path: got"),
        ({"image_path": 3, "caption": ""}, "got 3; expected a path in quotes"),
        ({"image_path": "\0", "caption": ""}, "expected a path in quotes"),
        ({"image_path": "\ud800", "caption": ""}, "expected a path in quotes"),
        ({"image_path": "missing.png", "caption": ""}, "there is no such file"),
        ({"image_path": "folder", "caption": ""}, "it is a folder: give the file"),
        ({"image_path": "a.png", "image_path_0": "a.png", "caption": ""}, "got image_path and image_path_0"),
        ({"image_path": "a.png", "control_path": "nowhere.png", "caption": ""}, "line 2 control_path: got nowhere.png"),
        ({"image_path": "a.png", "control_path": "x.png,no.png", "caption": ""}, "line 2 control_path: got no.png"),
        ({"image_path": "a.png", "control_pth": "x.png", "caption": ""}, "did you mean control_path?"),
        (
            {"image_path": "a.png", "control_path_1": "x.png", "control_path_01": "x.png", "caption": ""},
            "each number once",
        ),
        ({"image_path": "a.png", "caption": ""}, "line 2: got 0 control images; expected 1"),
        ({"image_path": "a.png", "control_path": "x.png,x.png", "caption": ""}, "got 2 control images"),
    ],
)
def test_bad_line_is_named_and_the_rest_stays(line, words):
    touch("ok.png", "a.png", "x.png", "folder/y.png")
    good = {"image_path": "ok.png", "control_path": "x.png", "caption": "fine"}
    listing = list_items(jsonl(good, line))
    problem = only_problem(listing)
    assert problem.startswith("d.jsonl line 2") and words in problem
    assert [item.path.name for item in listing.items] == ["ok.png"]


def test_indices_ask_for_controls_even_when_no_line_has_any():
    touch("a.png")
    dataset = jsonl({"image_path": "a.png", "caption": ""}, fp_1f_clean_indices=(0, 10))
    assert "got 0 control images; expected 2" in only_problem(list_items(dataset))


def test_a_control_named_in_a_bad_line_still_asks_for_controls_in_the_others():
    touch("a.png")
    lines = [{"image_path": "a.png", "caption": ""}, {"image_path": "no.png", "control_path": "a.png", "caption": ""}]
    listing = list_items(jsonl(*lines))
    assert listing.items == () and len(listing.problems) == 2


def test_foreign_keys_are_noted_once():
    touch("a.png", "b.png")
    lines = [{"image_path": name, "caption": "", "caption_ja": "猫", "width": 3} for name in ("a.png", "b.png")]
    listing = list_items(jsonl(*lines))
    assert names(listing) == ["a.png", "b.png"]
    assert [note.partition(": ")[0] for note in listing.notes] == ["d.jsonl line 1", "d.jsonl line 1"]
    assert "caption_ja" in listing.notes[0] and "width" in listing.notes[1]


def test_path_beside_the_jsonl_file_is_hinted_at():
    touch("set/a.png", text="")
    touch("set/d.jsonl", text='{"image_path": "a.png", "caption": ""}')
    dataset = ImageDataset(where=PLACE, cache_directory=Path("c"), image_jsonl_file=Path("set/d.jsonl"))
    assert f"write {Path('set/a.png')}" in only_problem(list_items(dataset))


@pytest.mark.parametrize("spelling", ["one/a.png", "./one/../one/a.png"])
def test_one_image_in_two_lines(spelling):
    touch("one/a.png", "b.png")
    lines = [{"image_path": path, "caption": ""} for path in ("one/a.png", "b.png", spelling)]
    listing = list_items(jsonl(*lines))
    assert [item.path.name for item in listing.items] == ["b.png"]
    problem = only_problem(listing)
    assert "d.jsonl line 1" in problem and "d.jsonl line 3" in problem and "expected each file once" in problem


def test_one_name_in_two_folders():
    touch("one/a.png", "two/a.jpg")
    lines = [{"image_path": path, "caption": ""} for path in ("one/a.png", "two/a.jpg")]
    problem = only_problem(list_items(jsonl(*lines)))
    assert str(Path("one/a.png")) in problem and str(Path("two/a.jpg")) in problem and "rename one" in problem


def test_empty_jsonl():
    assert "image_jsonl_file: got no lines in d.jsonl" in only_problem(list_items(jsonl("", " ")))


def test_videos_folders_of_frames_and_their_controls():
    touch("a.mp4", "frames [1]/0.png", "control.mp4", "more, frames/0.png")
    lines = [
        {"video_path": "a.mp4", "control_path": "control.mp4", "caption": ""},
        {"video_path": "frames [1]", "control_path": "more, frames", "caption": ""},
    ]
    listing = list_items(jsonl(*lines, kind="video"))
    assert controls_of(listing) == {"a.mp4": ["control.mp4"], "frames [1]": ["more, frames"]}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"video_path": "b.mp4", "caption": ""}, "got no control_path"),
        ({"video_path": "empty", "control_path": "c.mp4", "caption": ""}, "no images in the folder"),
        ({"video_path": "b.mp4", "control_path": "empty", "caption": ""}, "no images in the folder"),
        ({"video_path": "no.mp4", "control_path": "c.mp4", "caption": ""}, "a video or a folder of frames"),
        ({"video_path_0": "b.mp4", "control_path": "c.mp4", "caption": ""}, "did you mean video_path?"),
        ({"image_path": "b.mp4", "control_path": "c.mp4", "caption": ""}, "did you mean video_path?"),
    ],
)
def test_bad_line_of_videos(entry, words):
    touch("a.mp4", "b.mp4", "c.mp4", "empty/readme.txt")
    good = {"video_path": "a.mp4", "control_path": "c.mp4", "caption": ""}
    listing = list_items(jsonl(good, entry, kind="video"))
    problem = only_problem(listing)
    assert problem.startswith("d.jsonl line 2") and words in problem and len(listing.items) == 1


# ---- anything at all ----


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_that_are_no_text():
    Path("images").mkdir()
    for name in (b"images/\xff.png", b"images/\xff.txt"):
        Path(os.fsdecode(name)).write_bytes(b"x")
    touch("images/new\nline.png")
    listing = list_items(image_set())
    assert not listing.items and listing.num_found == 2
    assert all("\n" not in problem and problem.encode() for problem in listing.problems)
    assert any("a name that is not UTF-8" in problem for problem in listing.problems)


def test_no_jsonl_ends_in_a_traceback():
    touch("a.png", "b.png", "x.png", "frames/0.png")
    values = [
        None,
        True,
        3,
        0.5,
        "",
        "a.png",
        "b.png",
        "x.png,a.png",
        ",",
        "\0",
        "\ud800",
        "frames",
        [],
        {},
        "x" * 5000,
    ]
    keys = [
        "image_path",
        "image_path_0",
        "image_path_1",
        "video_path",
        "control_path",
        "control_path_1",
        "mask_path",
        "caption",
        "x",
    ]
    rng = random.Random(0)
    good = 0
    for _ in range(1000):
        entries = [{"image_path": "a.png", "caption": ""}, {"video_path": "frames", "caption": ""}]
        for entry in entries:
            for _ in range(rng.randrange(3)):
                entry[rng.choice(keys)] = rng.choice(values)
        raw = bytearray("\n".join(map(json.dumps, entries)).encode())
        if rng.random() < 0.3:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        listing = list_items(jsonl(bytes(raw), kind=rng.choice(["image", "video"])))
        assert all(": got " in line and "\n" not in line for line in listing.problems)
        good += len(listing.items)
    assert good > 100


def test_files_in_takes_the_folder_as_it_is_named():
    touch("[a]/2.PNG", "[a]/10.png", "a/1.png", "[a]/3.txt")
    assert files_in("[a]", (".png",)) == [Path("[a]/10.png"), Path("[a]/2.PNG")]
