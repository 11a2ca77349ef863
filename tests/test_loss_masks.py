"""Loss masks from their files to training: which belongs to which image, what is cached, and when it is stale."""

import json
import logging
import os
import re
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fpack_cache_latents
from common.media import Picture
from dataset.cache_files import cache_header, read_cache
from dataset.cached_items import CachingScripts
from dataset.config import ImageDataset, VideoDataset, load_dataset_config
from dataset.epochs import Position
from dataset.fingerprints import _content_hash
from dataset.jobs import Job, Sample, Unit
from dataset.loading import read_jobs
from dataset.loss_masks import latent_loss_mask
from dataset.planning import plan_latents
from dataset.sources import MediaItem, list_items
from dataset.training_dataset import BatchLoader, TrainingDataset
from frame_pack.caching import FramePackCacheRules
from frame_pack.training_rules import FramePackTrainingRules
from options.errors import UserError
from tests.cache_builders import PlainEncoder, files, image_keys, image_set, run_loop, write_config
from tests.train_caches import cache_text, collate_by_the_facts
from training.masks import check_masks

PLACE = "data.toml [datasets][1]"
MASK = "latents_loss_mask"
SCRIPTS = CachingScripts(latents="cache_latents.py", texts="cache_texts.py")


@pytest.fixture(autouse=True)
def report(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def write_mask(path: Path, *, white: float = 0.5, size: tuple[int, int] = (40, 32)) -> Path:
    """White on the left, black on the right."""
    width, height = size
    levels = np.zeros((height, width), np.uint8)
    levels[:, : round(white * width)] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path)
    return path


# ---- what a latent pixel counts ----


def test_a_latent_pixel_counts_as_much_as_its_square_is_bright_on_average(material) -> None:
    with Image.open(material.astronaut_mask) as image:
        soft = np.asarray(image)[100:340, 80:400]
    noise = np.random.default_rng(0).integers(0, 256, (48, 80), dtype=np.uint8)
    for mask in (soft, noise):
        height, width = mask.shape
        exact = Image.fromarray(mask.astype(np.float32)).resize((width // 8, height // 8), Image.Resampling.BOX)
        found = latent_loss_mask(mask)
        assert found.dtype == np.float16 and found.shape == (1, 1, height // 8, width // 8)
        np.testing.assert_allclose(found[0, 0], np.asarray(exact) / 255, atol=5e-4)
    assert latent_loss_mask(np.full((16, 16), 255, np.uint8)).tolist() == [[[[1.0, 1.0], [1.0, 1.0]]]]


# ---- in cache files ----


def cache(config: Path, models, *flags: object) -> int:
    places = ("--vae", models.vae, "--image_encoder", models.image_encoder, "--one_frame")
    given = ("--dataset_config", config, *places, *flags)
    return fpack_cache_latents.main([str(flag) for flag in given])


@pytest.fixture(scope="module")
def photographs(material, tmp_path_factory) -> Path:
    """The data set file of three photographs, of which the cat has no mask; the cup's mask is half its size."""
    folder = tmp_path_factory.mktemp("写真 [1]")
    keys = {"mask_directory": folder / "masks", "resolution": [64, 64], "batch_size": 3, "fp_1f_target_index": 1}
    (folder / "masks").mkdir()
    config = image_set(folder, ["猫", "顔", "cup"], **keys)
    for name, path in (("猫", material.chelsea), ("顔", material.astronaut), ("cup", material.coffee)):
        shutil.copy(path, folder / "images" / f"{name}.png")
    shutil.copy(material.astronaut_mask, folder / "masks" / "顔.png")
    with Image.open(material.coffee_mask) as image:
        image.resize((300, 200)).save(folder / "masks" / "cup.PNG")
    return config


NAMES = ("猫_0451x0300", "顔_0512x0512", "cup_0600x0400")


@pytest.fixture(scope="module")
def cached(photographs, demo_models) -> dict[str, Path]:
    """Stem -> latent cache."""
    assert cache(photographs, demo_models, "--num_workers", 0) == 0
    return {name.partition("_")[0]: photographs.parent / "cache" / f"{name}_fp.safetensors" for name in NAMES}


def opencv_mask(path: Path, size: tuple[int, int], left: int) -> np.ndarray:
    """(8, 8): shrunk to `size`, 64 columns from `left` on, the mean of squares, by OpenCV alone."""
    pixels = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_GRAYSCALE)
    shrunk = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)[:, left : left + 64]
    return cv2.resize(shrunk.astype(np.float32), (8, 8), interpolation=cv2.INTER_AREA) / 255


def test_masks_are_cached_as_their_images_are_cropped(photographs, cached) -> None:
    masks = photographs.parent / "masks"
    wanted = {
        "顔": opencv_mask(masks / "顔.png", (64, 64), 0),
        "cup": opencv_mask(masks / "cup.PNG", (96, 64), 16),
        "猫": np.ones((8, 8)),
    }
    for stem, mask in wanted.items():
        header, stored = cache_header(cached[stem]), read_cache(cached[stem])
        assert header.keys[MASK] == f"{MASK}_1x8x8_float16"
        assert stored[MASK].dtype == torch.float16 and stored[MASK].shape == (1, 1, 8, 8)
        np.testing.assert_allclose(stored[MASK][0, 0], mask, atol=1 / 255 + 5e-4)
    assert 0.1 < wanted["顔"].mean() < 0.9 and 0.1 < wanted["cup"].mean() < 0.9
    assert cache_header(cached["顔"]).fingerprint["loss_mask"] == "顔.png"
    assert cache_header(cached["猫"]).fingerprint["loss_mask"] == "whole"


def test_a_mask_changes_nothing_else_in_a_cache_and_other_tools_can_stack_it(
    photographs, cached, demo_models, tmp_path
) -> None:
    keys = {"cache_directory": tmp_path / "c", "resolution": [64, 64], "batch_size": 3, "fp_1f_target_index": 1}
    plain = write_config(tmp_path / "data.toml", image_keys(photographs.parent) | keys)
    assert cache(plain, demo_models, "--num_workers", 0) == 0
    for path in cached.values():
        with_mask, without = load_file(path), load_file(tmp_path / "c" / path.name)
        assert set(with_mask) - set(without) == {f"{MASK}_1x8x8_float16"} and not set(without) - set(with_mask)
        assert all(torch.equal(with_mask[key], without[key]) for key in without)
        assert not [name for name in cache_header(tmp_path / "c" / path.name).fingerprint if "mask" in name]
    batch = collate_by_the_facts([[path] for path in cached.values()])
    assert batch[MASK].shape == (3, 1, 1, 8, 8) and batch["latents"].shape == (3, 16, 1, 8, 8)


def test_two_workers_cache_the_same(photographs, cached, demo_models, tmp_path) -> None:
    text = photographs.read_text(encoding="utf-8")
    old, new = (json.dumps(str(folder), ensure_ascii=False) for folder in (photographs.parent / "cache", tmp_path))
    assert old in text
    config = photographs.with_name("workers.toml")
    config.write_text(text.replace(old, new), encoding="utf-8")
    assert cache(config, demo_models, "--num_workers", 2) == 0
    assert files(tmp_path) == files(photographs.parent / "cache")


def test_the_report_names_images_without_a_mask(photographs, cached, demo_models, report) -> None:
    stray = write_mask(photographs.parent / "masks" / "迷子.png")
    assert cache(photographs, demo_models, "--num_workers", 0, "--skip_existing") == 0
    stray.unlink()
    lines = [line.strip() for line in report.text.splitlines() if "note: " in line]
    assert [re.search("note: (.*)", line)[1] for line in lines] == [
        f"{photographs} [datasets][1] mask_directory: masks of no image: 迷子.png",
        f"{photographs.parent / 'images' / '猫.png'}: no mask, so its loss counts everywhere",
    ]
    assert "3 were cached already" in report.text


def test_debug_pictures_are_not_written_among_masks(tmp_path, capsys) -> None:
    config = masked_set(tmp_path, cache_directory=tmp_path / "masks")
    flags = ("--dataset_config", str(config), "--one_frame", "--debug_mode", "image")
    assert fpack_cache_latents.main(list(flags)) == 2
    assert "expected another folder than the sources'" in capsys.readouterr().err


# ---- which mask belongs to which image ----


def images(folder: Path, names=("猫", "犬.1"), **changes) -> ImageDataset:
    """Empty files in the place of images, captions and masks."""
    for name in names:
        for path in (folder / "images" / f"{name}.png", folder / "images" / f"{name}.txt"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    (folder / "masks [1]").mkdir(exist_ok=True)
    given = {"image_directory": folder / "images", "mask_directory": folder / "masks [1]", "caption_extension": ".txt"}
    return ImageDataset(where=PLACE, cache_directory=folder / "cache", **(given | changes))


def masks_of(dataset) -> dict[str, str | None]:
    listing = list_items(dataset)
    assert listing.problems == () and all(item.is_masked for item in listing.items)
    return {item.path.name: item.mask_path and item.mask_path.name for item in listing.items}


@pytest.mark.parametrize("mask", ["猫.png", "猫.JPG", "猫.webp", "猫.bmp"])
def test_a_mask_has_the_stem_of_its_image(tmp_path, mask) -> None:
    dataset = images(tmp_path)
    for name in (mask, "犬.1.png"):
        (dataset.mask_directory / name).touch()
    assert masks_of(dataset) == {"猫.png": mask, "犬.1.png": "犬.1.png"}
    assert list_items(dataset).notes == ()


def test_a_name_is_the_same_in_both_forms_of_unicode(tmp_path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "ガラス") for form in ("NFC", "NFD"))
    dataset = images(tmp_path, [composed])
    (dataset.mask_directory / f"{decomposed}.png").touch()
    (mask,) = masks_of(dataset).values()
    assert unicodedata.normalize("NFC", mask) == f"{composed}.png"


def test_what_is_missing_or_left_over_is_noted(tmp_path) -> None:
    dataset = images(tmp_path)
    for name in ("猫.png", "猫_0.png", "猫_mask.png", "犬.1.tif"):
        (dataset.mask_directory / name).touch()
    assert masks_of(dataset) == {"猫.png": "猫.png", "犬.1.png": None}
    assert list_items(dataset).notes == (
        f"{PLACE} mask_directory: files of kinds that are not read: 犬.1.tif",
        f"{PLACE} mask_directory: masks of no image: 猫_0.png, 猫_mask.png",
        f"{dataset.image_directory / '犬.1.png'}: no mask, so its loss counts everywhere",
    )


def test_two_masks_of_an_image_are_a_problem_of_this_image(tmp_path) -> None:
    dataset = images(tmp_path)
    for name in ("猫.png", "猫.jpg", "犬.1.png"):
        (dataset.mask_directory / name).touch()
    listing = list_items(dataset)
    assert [item.path.name for item in listing.items] == ["犬.1.png"]
    (problem,) = listing.problems
    got = f"got 猫.jpg, 猫.png in {dataset.mask_directory}; expected one mask for each image; remove or rename one"
    assert problem == f"{dataset.image_directory / '猫.png'}: {got}"


def test_a_folder_without_any_mask_is_a_mistake(tmp_path) -> None:
    dataset = images(tmp_path)
    (dataset.mask_directory / "bird.png").touch()
    listing = list_items(dataset)
    assert listing.items == ()
    (problem,) = listing.problems
    assert problem.startswith(f"{PLACE} mask_directory: got no mask of any image in {dataset.mask_directory}; expected")
    assert "犬.1.png" in problem and problem.endswith("correct it or leave it out")


def test_without_masks_no_item_is_masked(tmp_path) -> None:
    (first, second) = list_items(images(tmp_path, mask_directory=None)).items
    assert not first.is_masked and not second.is_masked and first.mask_path is None


def jsonl(folder: Path, *lines: dict, kind: str = "image"):
    path = folder / "行.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    make = ImageDataset if kind == "image" else VideoDataset
    return make(where=PLACE, cache_directory=folder / "cache", **{f"{kind}_jsonl_file": path})


@pytest.fixture
def in_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("猫.png", "犬.png", "mask, left.png", "v.mp4"):
        Path(name).touch()
    return tmp_path


def test_lines_name_their_masks(in_folder) -> None:
    lines = [
        {"image_path": "猫.png", "mask_path": "mask, left.png", "caption": ""},
        {"image_path": "犬.png", "caption": ""},
    ]
    dataset = jsonl(in_folder, *lines)
    assert masks_of(dataset) == {"猫.png": "mask, left.png", "犬.png": None}
    place = in_folder / "行.jsonl"
    assert list_items(dataset).notes == (f"{place} line 2: no mask, so its loss counts everywhere",)
    (unmasked, _) = list_items(jsonl(in_folder, {"image_path": "猫.png", "caption": ""}, lines[1])).items
    assert not unmasked.is_masked
    # A line that cannot be used tells all the same that there are masks.
    (item,) = list_items(jsonl(in_folder, {**lines[0], "image_path": "no.png"}, lines[1])).items
    assert item.is_masked


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"mask_path": "no.png"}, "line 2 mask_path: got no.png; expected an image; there is no such file"),
        ({"mask_path": 3}, "line 2 mask_path: got 3; expected a path in quotes"),
        ({"mask_path": None}, "line 2 mask_path: got null"),
        ({"mask_path": ""}, 'line 2 mask_path: got ""'),
        ({"mask_pth": "猫.png"}, "line 2: got the unknown key mask_pth;"),
        ({"mask": "猫.png"}, "did you mean mask_path?"),
        ({"Mask_Path": "猫.png"}, "did you mean mask_path?"),
        ({"mask_path_0": "猫.png"}, "did you mean mask_path?"),
    ],
)
def test_a_bad_mask_in_a_line_is_named(in_folder, line, words) -> None:
    good = {"image_path": "猫.png", "caption": ""}
    listing = list_items(jsonl(in_folder, good, {"image_path": "犬.png", "caption": ""} | line))
    (problem,) = listing.problems
    assert problem.startswith(f"{in_folder / '行.jsonl'} line 2") and words in problem
    assert [item.path.name for item in listing.items] == ["猫.png"]


def test_keys_of_other_tools_are_not_taken_for_masks(in_folder) -> None:
    line = {"image_path": "猫.png", "caption": "", "base_path": "x", "meta_path": "y", "unmasked_area": 3}
    listing = list_items(jsonl(in_folder, line))
    assert listing.problems == () and len(listing.items) == 1 and len(listing.notes) == 3


def test_videos_have_no_masks(in_folder) -> None:
    line = {"video_path": "v.mp4", "caption": "", "mask_path": "猫.png"}
    listing = list_items(jsonl(in_folder, line, kind="video"))
    (problem,) = listing.problems
    assert problem.endswith(
        "line 1 mask_path: got a mask; expected no mask in a line of videos; masks are for images: remove it"
    )


# ---- masks that cannot be used ----


def masked_set(folder: Path, names=("猫", "犬", "鳥"), *, masked=("猫", "犬"), **keys) -> Path:
    """Images of 40x32 with masks for some of them; returns the data set file."""
    for name in masked:
        write_mask(folder / "masks" / f"{name}.bmp")
    return image_set(folder, names, **({"mask_directory": folder / "masks"} | keys))


class MaskEncoder(PlainEncoder):
    """Stores one number of each mask: the share of it that is bright."""

    def tensors(self, sample: Sample) -> list[dict]:
        (tensors,) = super().tensors(sample)
        if sample.loss_mask is None:
            return [tensors]
        return [tensors | {MASK: torch.full((1, 1, 4, 4), float(sample.loss_mask.mean() / 255)).half()}]


def run(config: Path, **options) -> tuple[int, list[str]]:
    """(exit code, what was encoded), in a process that has hashed nothing yet."""
    _content_hash.cache_clear()
    encoder = MaskEncoder()
    code, _ = run_loop(config, encoder=encoder, **options)
    return code, sorted(encoder.encoded)


@pytest.mark.parametrize(
    ("size", "is_right"),
    [((40, 32), True), ((20, 16), True), ((400, 320), True), ((39, 31), True), ((32, 40), False), ((40, 40), False)],
)
def test_a_mask_has_the_proportions_of_its_image(tmp_path, report, size, is_right) -> None:
    config = masked_set(tmp_path, ["猫", "犬"])
    path = write_mask(tmp_path / "masks" / "猫.bmp", size=size)
    assert run(config) == ((0, ["犬", "猫"]) if is_right else (1, ["犬"]))
    width, height = size
    complaint = f"猫.png: got the mask {path} of {width}x{height}; expected the proportions of the image, 40x32;"
    assert (complaint in report.text) != is_right


def test_a_black_mask_would_teach_nothing_and_is_refused(tmp_path, report) -> None:
    config = masked_set(tmp_path, ["猫", "犬"])
    path = write_mask(tmp_path / "masks" / "猫.bmp", white=0)
    assert run(config) == (1, ["犬"])
    assert f"猫.png: got the mask {path}, black all over" in report.text


def test_a_mask_that_cannot_be_read_concerns_its_image_only(tmp_path, report) -> None:
    config = masked_set(tmp_path, ["猫", "犬"])
    (tmp_path / "masks" / "猫.bmp").write_bytes(b"no picture")
    assert run(config) == (1, ["犬"])
    assert re.search(r"猫\.png: got .*masks.*猫\.bmp; expected an image", report.text)


def test_a_turned_mask_is_set_upright(tmp_path, report) -> None:
    config = masked_set(tmp_path, ["猫"], masked=["猫"])
    with Image.open(tmp_path / "masks" / "猫.bmp") as mask:
        lying = mask.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned to the right by a quarter
    (tmp_path / "masks" / "猫.bmp").unlink()
    lying.save(tmp_path / "masks" / "猫.jpg", exif=exif, quality=100)
    rules = FramePackCacheRules(mode="one_frame")
    (dataset,) = load_dataset_config(config).datasets
    plan = plan_latents(dataset, rules, reuse=False)
    (sample,) = read_jobs(plan.jobs, 30)
    assert sample.loss_mask[:, :12].min() > 250 and sample.loss_mask[:, 20:].max() < 5
    assert any("turned upright by EXIF orientation: 猫.jpg" in note for note in plan.notes)


# ---- stale caches ----


def change_mask(folder: Path) -> None:
    """Other pixels, the same size and time."""
    path = folder / "masks" / "猫.bmp"
    before = path.stat()
    with Image.open(path) as mask:
        mirrored = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(path)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def keys_without_masks(folder: Path) -> Path:
    return write_config(folder / "data.toml", image_keys(folder))


CHANGES = {
    "changed": (change_mask, ["猫"], "loss_mask_sha256 is "),
    "vanished": (
        lambda folder: (folder / "masks" / "猫.bmp").unlink(),
        ["猫"],
        "loss_mask is 猫.bmp in the cache, whole now",
    ),
    "appeared": (
        lambda folder: write_mask(folder / "masks" / "鳥.png"),
        ["鳥"],
        "loss_mask is whole in the cache, 鳥.png now",
    ),
    "renamed": (
        lambda folder: (folder / "masks" / "犬.bmp").rename(folder / "masks" / "犬.png"),
        ["犬"],
        "loss_mask is 犬.bmp in the cache, 犬.png now",
    ),
    "left out": (keys_without_masks, ["犬", "猫", "鳥"], "loss_mask is ([猫犬].bmp|whole) in the cache, none now"),
    "nothing": (lambda folder: None, [], ""),
}


def training_set(*configs: Path) -> TrainingDataset:
    """With stand-ins for the text caches."""
    found = [dataset for config in configs for dataset in load_dataset_config(config).datasets]
    for dataset in found:
        for item in list_items(dataset).items:
            cache_text(dataset, item)
    config = replace(load_dataset_config(configs[0]), datasets=tuple(found))
    return TrainingDataset(config, FramePackTrainingRules(), SCRIPTS)


@pytest.mark.parametrize("name", CHANGES)
def test_other_masks_make_caches_stale_for_caching_and_training(tmp_path, report, name) -> None:
    change, affected, reason = CHANGES[name]
    config = masked_set(tmp_path)
    assert run(config) == (0, ["犬", "猫", "鳥"])
    change(tmp_path)
    _content_hash.cache_clear()
    if affected:
        with pytest.raises(UserError) as caught:
            training_set(config)
        lines = str(caught.value).splitlines()
        assert sorted(line[: line.index("_0040x")].rpartition("cache")[2][1:] for line in lines) == affected
        assert all("; run cache_latents.py --skip_existing" in line for line in lines)
        assert re.search(reason, lines[0])
    assert run(config, skip_existing=True) == (0, affected)
    assert not affected or re.search(rf"made anew \(\d\): {reason}", report.text)
    assert training_set(config).num_items == 3


def test_masks_are_added_to_caches_that_had_none(tmp_path, report) -> None:
    masked_set(tmp_path)
    config = keys_without_masks(tmp_path)
    assert run(config) == (0, ["犬", "猫", "鳥"])
    assert run(config, skip_existing=True) == (0, [])
    masked_set(tmp_path)
    with pytest.raises(UserError, match="loss_mask is not recorded in the cache, 犬.bmp now"):
        training_set(config)
    assert run(config, skip_existing=True) == (0, ["犬", "猫", "鳥"])
    assert MASK in read_cache(tmp_path / "cache" / "鳥_0040x0032_fp.safetensors")


def test_masks_are_added_to_caches_of_other_tools(tmp_path, report) -> None:
    masked_set(tmp_path)
    config = keys_without_masks(tmp_path)
    assert run(config)[0] == 0
    for path in (tmp_path / "cache").iterdir():
        save_file(load_file(path), path, metadata={"architecture": "framepack", "format_version": "1.0.1"})
    assert run(config, skip_existing=True) == (0, [])
    masked_set(tmp_path)
    assert run(config, skip_existing=True) == (0, ["犬", "猫", "鳥"])
    assert "made anew (3): no loss mask in a cache without a fingerprint" in report.text
    assert run(config, skip_existing=True) == (0, [])


# ---- what is looked at ----


def test_the_preview_dims_the_image_where_its_loss_does_not_count() -> None:
    mask = np.zeros((32, 48), np.uint8)
    mask[:, :24] = 255
    shown = {}
    for mask_path in (None, Path("masks/猫.png")):
        item = MediaItem(where="猫.png", path=Path("猫.png"), caption="", mask_path=mask_path, is_masked=True)
        dataset = ImageDataset(where=PLACE, cache_directory=Path("cache"), fp_1f_target_index=1)
        unit = Unit(paths=(Path("cache/猫.safetensors"),), crop=None, num_frames=1, settings={})
        flat = np.full((32, 48, 3), 200, np.uint8)
        sample = Sample(
            job=Job(item=item, dataset=dataset, size=(48, 32), source_size=(48, 32), units=(unit,)),
            unit=unit,
            frames=flat[None],
            controls=(Picture(rgb=flat, alpha=None),),
            identity={},
            loss_mask=mask if mask_path else np.full_like(mask, 255),
        )
        shown |= {label: np.asarray(cell) for label, cell in FramePackCacheRules(mode="one_frame").cells(sample)[1:2]}
    assert list(shown) == ["target @ 1", "target @ 1, loss masked"]
    whole, masked = shown.values()
    assert (whole == 200).all() and (masked[:, :24] == 200).all()
    hidden = masked[:, 24:]
    assert 0.1 < hidden.max() / 200 < 0.7 and (hidden[..., 2] > hidden[..., 0]).all()


# ---- training ----


def test_batches_hold_the_masks(tmp_path) -> None:
    config = masked_set(tmp_path, batch_size=3)
    write_mask(tmp_path / "masks" / "猫.bmp", white=0.8)
    assert run(config)[0] == 0
    (batch,) = BatchLoader(training_set(config), seed=1).epoch(Position())
    assert batch.contents[MASK].shape == (3, 1, 1, 4, 4)
    stems = [key.name.partition("_")[0] for key in batch.items]
    shares = dict(zip(stems, batch.contents[MASK].float().mean((1, 2, 3, 4)).tolist(), strict=True))
    # Of 40 pixels, 4 are cut off on both sides.
    assert shares == pytest.approx({"猫": 28 / 32, "犬": 16 / 32, "鳥": 1.0}, abs=1e-3)


def test_masked_loss_needs_masks_somewhere(tmp_path, report) -> None:
    masked, plain = masked_set(tmp_path / "一"), image_set(tmp_path / "二", ["猫"])
    for config in (masked, plain):
        assert run(config)[0] == 0
    report.clear()
    check_masks(training_set(masked), True)
    check_masks(training_set(plain), False)
    assert report.text == ""

    with pytest.raises(UserError) as caught:
        check_masks(training_set(plain), True)
    assert str(caught.value).startswith("--masked_loss: got no mask in any cache; expected masks in at least one")
    assert "mask_directory" in str(caught.value) and "\n" not in str(caught.value)

    both = training_set(masked, plain)
    check_masks(both, True)
    (warning,) = [record.getMessage() for record in report.records if record.levelno == logging.WARNING]
    assert f"no masks in the caches of {plain} [datasets][1]" in warning and str(masked) not in warning

    report.clear()
    check_masks(both, False)
    (warning,) = [record.getMessage() for record in report.records]
    assert f"the masks of {masked} [datasets][1] are not used" in warning
