"""Pictures, masks and videos, against Pillow, OpenCV and PyAV used directly."""

import io
import logging
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin, features

from common import media
from common.media import (
    check_image,
    fit,
    image_size,
    load_mask,
    load_picture,
    mask_to_latent,
    open_image,
    read_video,
    squeeze,
    to_model_range,
    write_video,
)
from options.errors import UserError

FLAG = "--image_path"


@pytest.fixture(scope="module")
def photo():
    """(300, 451, 3) uint8, a real photograph."""
    return pytest.importorskip("skimage.data").chelsea()


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---- opening ----


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_exif_orientation_turns_picture_and_size_alike(tmp_path, photo, kind, orientation):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image = Image.fromarray(photo[:40, :64])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"写真 [x].{kind.lower()}"
    path.write_bytes(encoded(image, kind, exif=exif))
    with Image.open(path) as stored:
        expected = ImageOps.exif_transpose(stored)
    opened = open_image(path, flag=FLAG)
    assert np.array_equal(np.asarray(opened), np.asarray(expected))
    assert image_size(path, flag=FLAG) == opened.size == ((40, 64) if orientation >= 5 else (64, 40))


def test_exif_behind_the_pixels_of_a_png_is_seen(tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    content = encoded(Image.fromarray(photo[:40, :64]), "PNG")
    path = tmp_path / "late.png"
    path.write_bytes(content[:-12] + chunk + content[-12:])
    assert image_size(path, flag=FLAG) == open_image(path, flag=FLAG).size == (40, 64)


def test_size_is_read_without_decoding_the_pixels(tmp_path, photo, monkeypatch):
    path = tmp_path / "a.png"
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "seed 1")
    Image.fromarray(photo).save(path, pnginfo=info)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert image_size(path, flag=FLAG) == (451, 300)


def test_sixteen_bit_grey_keeps_its_high_bytes(tmp_path):
    values = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    path = tmp_path / "depth.png"
    Image.fromarray(values).save(path)
    opened = open_image(path, flag=FLAG)
    assert opened.mode == "L" and np.array_equal(np.asarray(opened), values >> 8)
    picture = load_picture(path, width=64, height=48, flag=FLAG)
    assert np.array_equal(picture.rgb[..., 1], values >> 8) and picture.alpha is None
    assert np.array_equal(load_mask(path, width=64, height=48, flag=FLAG), values >> 8)


def test_sixteen_bit_colour_keeps_its_high_bytes(tmp_path):
    cv2 = pytest.importorskip("cv2")
    values = np.random.default_rng(0).integers(0, 65536, (16, 24, 3), np.uint16)
    path = tmp_path / "rgb16.png"
    path.write_bytes(cv2.imencode(".png", values[..., ::-1])[1].tobytes())
    assert np.array_equal(load_picture(path, width=24, height=16, flag=FLAG).rgb, values >> 8)


def test_floating_point_pixels_are_refused(tmp_path):
    path = tmp_path / "hdr.tiff"
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(path)
    with pytest.raises(UserError, match="expected an image of 8 or 16 bits per channel; .*floating-point"):
        open_image(path, flag=FLAG)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.97])
def test_truncated_image_is_one_line_of_error(tmp_path, photo, kind, share):
    content = encoded(Image.fromarray(photo), kind)
    path = tmp_path / "切れた [x].img"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError) as error:
        check_image(path, flag=FLAG)
    message = str(error.value)
    assert message.startswith(f"{FLAG}: got {path}; expected an image; ") and "\n" not in message
    assert message.count(str(path)) == 1
    assert ("the file is empty" in message) == (share == 0)


def test_missing_folder_and_foreign_files_are_told_apart(tmp_path):
    (tmp_path / "text.png").write_text("not a picture", encoding="utf-8")
    for name, reason in {"none.png": "no such file", ".": "a folder", "text.png": "damaged or of another kind"}.items():
        for look in (check_image, image_size):
            with pytest.raises(UserError, match=f"^{FLAG}: got .*; expected an image; .*{reason}"):
                look(tmp_path / name, flag=FLAG)


# ---- transparency ----


@pytest.fixture
def cutout(photo):
    """RGBA whose transparent pixels keep their colour."""
    alpha = np.zeros(photo.shape[:2], np.uint8)
    alpha[60:220, 100:300] = 255
    alpha[:, 300:380] = np.arange(80, dtype=np.uint8) * 3
    return np.dstack([photo, alpha])


def test_colour_under_transparency_is_kept_and_alpha_gets_the_same_fit(tmp_path, cutout):
    path = tmp_path / "人物.png"
    Image.fromarray(cutout).save(path)
    for width, height in [(451, 300), (160, 144), (640, 480), (128, 300)]:
        picture = load_picture(path, width=width, height=height, flag=FLAG)
        assert np.array_equal(picture.rgb, fit(cutout[..., :3], width, height))
        assert np.array_equal(picture.alpha, fit(cutout[..., 3], width, height))
        assert picture.rgb.shape == (height, width, 3)


def test_grey_with_alpha(tmp_path, cutout):
    grey = Image.fromarray(cutout).convert("LA")
    grey.save(tmp_path / "la.png")
    picture = load_picture(tmp_path / "la.png", width=451, height=300, flag=FLAG)
    assert np.array_equal(picture.rgb, np.repeat(np.asarray(grey)[..., :1], 3, axis=2))
    assert np.array_equal(picture.alpha, cutout[..., 3])


@pytest.mark.parametrize("transparency", [0, bytes([0, 90, 255])])
def test_palette_transparency(tmp_path, transparency):
    indices = np.arange(48, dtype=np.uint8).reshape(6, 8) % 3
    image = Image.fromarray(indices)
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "p.png", transparency=transparency)
    picture = load_picture(tmp_path / "p.png", width=8, height=6, flag=FLAG)
    alphas = [0, 255, 255] if transparency == 0 else [0, 90, 255]
    assert np.array_equal(picture.alpha, np.array(alphas, np.uint8)[indices])
    assert np.array_equal(picture.rgb[..., 0], np.array([10, 40, 70], np.uint8)[indices])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_mask(tmp_path / "p.png", width=8, height=6, flag=FLAG).shape == (6, 8)


def test_transparent_colour_of_an_rgb_png(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, 3:] = (9, 8, 7)
    Image.fromarray(pixels).save(tmp_path / "key.png", transparency=(9, 8, 7))
    picture = load_picture(tmp_path / "key.png", width=6, height=4, flag=FLAG)
    assert np.array_equal(picture.alpha, np.where(pixels[..., 0] == 9, 0, 255)) and np.array_equal(picture.rgb, pixels)


def test_picture_without_transparency_has_no_alpha(tmp_path, photo):
    Image.fromarray(photo).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert load_picture(tmp_path / "cmyk.jpg", width=64, height=64, flag=FLAG).alpha is None


def test_mask_is_the_brightness_with_the_same_fit(tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png", width=160, height=144, flag="--control_image_mask_path")
    assert np.array_equal(mask, fit(np.asarray(Image.fromarray(photo).convert("L")), 160, 144))


# ---- sizes ----


def covering_size(width, height, target_width, target_height):
    scale = max(target_width / width, target_height / height)
    return int(width * scale + 0.5), int(height * scale + 0.5), scale


def centre(array, width, height):
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    return array[top : top + height, left : left + width]


AREA_SIZES = [(225, 150), (224, 144), (208, 288), (451, 144), (64, 300), (160, 160), (17, 11), (1, 1), (450, 299)]


@pytest.mark.parametrize(("width", "height"), AREA_SIZES)
@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_reduction_agrees_with_opencv_area(photo, width, height, channels):
    cv2 = pytest.importorskip("cv2")
    source = np.dstack([photo, photo[..., 0]])[..., :channels] if channels else photo[..., 1]
    new_width, new_height, scale = covering_size(451, 300, width, height)
    assert scale <= 1
    resized = cv2.resize(source, (new_width, new_height), interpolation=cv2.INTER_AREA)
    expected = centre(resized.reshape(new_height, new_width, *source.shape[2:]), width, height)
    ours = fit(source, width, height)
    assert ours.dtype == np.uint8 and ours.shape == expected.shape
    assert np.abs(ours.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(451, 200), (200, 300)])
def test_scale_of_one_only_crops(photo, width, height):
    assert np.array_equal(fit(photo, width, height), centre(photo, width, height))


@pytest.mark.parametrize("size", [(600, 200), (101, 700)])
def test_area_with_one_axis_unchanged_agrees_with_opencv(size):
    cv2 = pytest.importorskip("cv2")
    source = np.random.default_rng(1).integers(0, 256, (700, 600, 3), np.uint8)
    expected = cv2.resize(source, size, interpolation=cv2.INTER_AREA)
    assert np.abs(media._area(source, *size).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(640, 480), (452, 304), (451, 301), (1000, 320)])
def test_enlargement_is_pillow_lanczos(photo, width, height):
    new_width, new_height, scale = covering_size(451, 300, width, height)
    assert scale > 1
    image = Image.fromarray(photo).resize((new_width, new_height), Image.Resampling.LANCZOS)
    assert np.array_equal(fit(photo, width, height), centre(np.asarray(image), width, height))
    grey = Image.fromarray(photo[..., 0]).resize((new_width, new_height), Image.Resampling.LANCZOS)
    assert np.array_equal(fit(photo[..., 0], width, height), centre(np.asarray(grey), width, height))


def test_matching_size_is_unchanged(photo):
    assert np.array_equal(fit(photo, 451, 300), photo)


@pytest.mark.parametrize(("width", "height"), [(640, 200), (200, 400), (452, 304), (451, 400)])
def test_squeezing_enlarges_by_lanczos_where_an_axis_grows(photo, width, height):
    """The mean over a pixel's area would repeat columns there."""
    image = Image.fromarray(photo).resize((width, height), Image.Resampling.LANCZOS)
    assert np.array_equal(squeeze(photo, width, height), np.asarray(image))


def test_squeezing_shows_the_whole_picture(photo):
    cut = photo[:300, :450]
    expected = cut.reshape(100, 3, 225, 2, 3).mean(axis=(1, 3))
    assert np.abs(squeeze(cut, 225, 100) - expected).max() <= 0.5 + 1e-3
    assert squeeze(photo, 451, 300) is photo


def test_mask_to_latent_is_lanczos_over_255(photo):
    mask = photo[:240, :320, 0]
    latent = mask_to_latent(mask, 40, 30)
    expected = np.asarray(Image.fromarray(mask).resize((40, 30), Image.Resampling.LANCZOS)).astype(np.float32) / 255
    assert latent.dtype == np.float32 and latent.shape == (30, 40) and np.array_equal(latent, expected)
    assert np.all(mask_to_latent(np.full((64, 64), 255, np.uint8), 8, 8) == 1)


def test_model_range_ends_at_minus_one_and_one():
    values = to_model_range(np.array([0, 255, 51], np.uint8))
    assert values.dtype == np.float32 and np.allclose(values, [-1, 1, -0.6], atol=1e-7)


# ---- videos ----


@pytest.fixture(scope="module")
def clip(photo):
    """Twelve (96, 128, 3) frames, panning."""
    return np.stack([fit(photo[:, i * 4 : i * 4 + 400], 128, 96) for i in range(12)])


@pytest.mark.parametrize("fps", [24, 29.97, 16])
def test_video_keeps_frames_rate_and_pixels(tmp_path, clip, fps):
    av = pytest.importorskip("av")
    path = tmp_path / "動画 [x].mp4.tmp"
    write_video(path, iter(clip), fps=fps)
    decoded = np.stack(list(read_video(path, flag="--video_path")))
    assert decoded.shape == clip.shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - clip).mean() < 3
    with path.open("rb") as file, av.open(file) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == pytest.approx(fps, abs=1e-9) and stream.frames == 12
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (90, 150, 40)])
def test_video_colours_come_back(tmp_path, colour):
    write_video(tmp_path / "c.mp4", [np.full((32, 48, 3), colour, np.uint8)] * 2, fps=30)
    frame = next(read_video(tmp_path / "c.mp4", flag="--video_path"))
    assert np.abs(frame.astype(int) - colour).max() <= 3


def test_equal_frames_give_equal_bytes(tmp_path, clip):
    contents = set()
    for name in ("a.mp4", "b.mp4.tmp"):
        write_video(tmp_path / name, clip, fps=30)
        contents.add((tmp_path / name).read_bytes())
    assert len(contents) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no colons in names")
def test_colon_in_a_video_name_is_no_protocol(tmp_path, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("a:b.mp4", clip[:2], fps=30)
    assert len(list(read_video("a:b.mp4", flag="--video_path"))) == 2


def test_impossible_frames_are_errors(tmp_path, clip):
    with pytest.raises(ValueError, match="at least one frame"):
        write_video(tmp_path / "a.mp4", [], fps=30)
    with pytest.raises(ValueError, match="127x96"):
        write_video(tmp_path / "a.mp4", clip[:, :, :127], fps=30)
    with pytest.raises(ValueError, match=r"shape \(48, 128, 3\)"):
        write_video(tmp_path / "a.mp4", [clip[0], clip[1, :48]], fps=30)


def test_bad_video_is_one_line_of_error(tmp_path, clip):
    write_video(tmp_path / "good.mp4", clip, fps=30)
    (tmp_path / "half.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:300])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video", encoding="utf-8")
    for name in ("half.mp4", "empty.mp4", "text.mp4", "none.mp4", "."):
        with pytest.raises(UserError, match="^--video_path: got .*; expected a video; ") as error:
            next(read_video(tmp_path / name, flag="--video_path"))
        assert "\n" not in str(error.value)


def test_frames_lost_at_a_cut_end_are_reported(tmp_path, clip, caplog):
    write_video(tmp_path / "good.mp4", clip, fps=30)
    content = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: int(len(content) * 0.8)])
    with caplog.at_level(logging.WARNING):
        try:
            count = len(list(read_video(tmp_path / "cut.mp4", flag="--video_path")))
        except UserError:
            return
    assert count < len(clip) and f"{count} of the {len(clip)} frames" in caplog.text
