"""What generation leaves on disk: names, contents, and nothing after a failure."""

from datetime import datetime

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from common.media import read_video  # noqa: E402
from generation import outputs  # noqa: E402
from generation.outputs import (  # noqa: E402
    check_latents,
    load_latents,
    save_latents,
    save_pictures,
    save_video,
    to_uint8,
    unused_stem,
)
from options.errors import UserError  # noqa: E402

NOW = datetime(2025, 3, 9, 8, 7, 6, 999_999)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def latents():
    return torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), np.uint8)


# ---- names ----


def test_stem_is_local_time_to_the_millisecond_and_seed(tmp_path):
    assert unused_stem(tmp_path / "not there yet", 42, now=NOW) == "20250309-080706-999_42"
    today = unused_stem(tmp_path, 1)[:8]
    assert today in {f"{datetime.now():%Y%m%d}", f"{datetime.fromtimestamp(datetime.now().timestamp() - 60):%Y%m%d}"}


@pytest.mark.parametrize("suffix", [".png", ".mp4", "_latent.safetensors", ""])
def test_stem_of_any_kind_of_output_is_not_used_again(tmp_path, suffix):
    folder = tmp_path / "出力 [x]"
    (folder / f"20250309-080706-999_42{suffix}").mkdir(parents=True)
    assert unused_stem(folder, 42, now=NOW) == "20250309-080707-000_42"
    assert unused_stem(folder, 4, now=NOW) == "20250309-080706-999_4"


# ---- latents ----


def test_latents_come_back_with_their_metadata(tmp_path, latents):
    folder = tmp_path / "出力 [x]"
    metadata = {"seeds": "42", "prompt": "猫が\n座る", "height": "32"}
    path = save_latents(latents, folder, "stem", metadata=metadata)
    assert path == folder / "stem_latent.safetensors" and names(folder) == [path.name]
    loaded, found = load_latents(path)
    assert torch.equal(loaded, latents) and found == metadata
    assert check_latents(path) == (16, 3, 4, 6)


def test_latents_are_stored_contiguous_in_float32(tmp_path, latents):
    path = save_latents(latents.to(torch.bfloat16).transpose(2, 3), tmp_path, "a", metadata={})
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["latent"]
        stored = file.get_tensor("latent")
    assert stored.dtype == torch.float32 and torch.equal(stored, latents.to(torch.bfloat16).transpose(2, 3).float())


def test_equal_latents_give_equal_bytes(tmp_path, latents):
    metadata = {key: key for key in "qwertyuiop"}
    contents = {save_latents(latents, tmp_path, f"{n}", metadata=metadata).read_bytes() for n in range(4)}
    assert len(contents) == 1


def test_latents_of_another_shape_are_not_saved(tmp_path, latents):
    for wrong in (latents[None], latents[0], latents[:4]):
        with pytest.raises(ValueError, match="latents of shape"):
            save_latents(wrong, tmp_path, "a", metadata={})
    assert names(tmp_path) == []


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("key", ["latent", "latents_3x4x6_float32", "latent_model_input"])
def test_latents_of_other_tools_load(tmp_path, latents, batch, key):
    tensors = {"a_mask": torch.ones(1), key: latents[None] if batch else latents}
    if key != "latent":
        tensors["latent_1d"] = torch.ones(3)  # starts with the word but has too few dimensions
    path = tmp_path / "潜在 [x].safetensors"
    save_file({name: tensor.to(torch.float16) for name, tensor in tensors.items()}, path)
    assert check_latents(path) == (16, 3, 4, 6)
    loaded, metadata = load_latents(path)
    assert torch.equal(loaded, latents.half().float()) and metadata == {}


def test_key_named_latent_wins_over_an_earlier_one(tmp_path, latents):
    path = tmp_path / "a.safetensors"
    save_file({"latent": latents, "latent_0": torch.zeros(16, 1, 2, 2)}, path)
    assert torch.equal(load_latents(path)[0], latents)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: t[None], lambda t: {"latent": t}, lambda t: {"latents": t}])
def test_torch_files_load(tmp_path, latents, wrap):
    path = tmp_path / "latent [x].pt"
    torch.save(wrap(latents), path)
    assert check_latents(path) == (16, 3, 4, 6) and torch.equal(load_latents(path)[0], latents)


class Unsafe:
    """Something that only an unrestricted pickle would bring back."""


def test_bad_latent_files_are_one_line_of_error(tmp_path, latents):
    good = save_latents(latents, tmp_path, "good", metadata={}).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("text", encoding="utf-8")
    torch.save({"latent": latents, "extra": Unsafe()}, tmp_path / "unsafe.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(torch.ones(4, 4), tmp_path / "flat.pt")
    save_file({"weight": latents}, tmp_path / "other.safetensors")
    save_file({"latent": torch.ones(2, 16, 1, 2, 2)}, tmp_path / "batch.safetensors")
    save_file({"latent": torch.ones(4, 1, 2, 2)}, tmp_path / "channels.safetensors")
    (tmp_path / "good_latent.safetensors").unlink()
    for path in [*tmp_path.iterdir(), tmp_path / "none.safetensors", tmp_path]:
        for look in (check_latents, load_latents):
            with pytest.raises(UserError, match="^--latent_path: got .*; expected .*; ") as error:
                look(path)
            assert "\n" not in str(error.value)


def test_nan_in_loaded_latents_is_an_error(tmp_path, latents):
    latents[3, 1, 2, 2] = float("nan")
    path = save_latents(latents, tmp_path, "a", metadata={})
    with pytest.raises(UserError, match="NaN"):
        load_latents(path)


# ---- pixels ----


def test_pixels_are_clamped_and_truncated():
    values = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 0.999, 1.0, 7.0])
    pixels = values.expand(3, 2, 5, 8)
    frames = to_uint8(pixels)
    assert frames.shape == (2, 5, 8, 3) and frames.dtype == np.uint8
    assert frames[1, 4, :, 2].tolist() == [0, 0, 63, 127, 191, 254, 255, 255]
    assert to_uint8(pixels.to(torch.bfloat16)).shape == (2, 5, 8, 3)


def test_axes_are_not_mixed_up():
    pixels = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames = to_uint8(pixels)
    for c, f, y, x in [(0, 0, 0, 0), (2, 1, 3, 4), (1, 0, 2, 4)]:
        assert frames[f, y, x, c] == int((pixels[c, f, y, x] + 1) / 2 * 255)


@pytest.mark.parametrize(("value", "name"), [("nan", "NaN"), ("inf", "infinity")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_in_the_pixels_is_never_turned_into_black(value, name, dtype):
    pixels = torch.zeros(3, 4, 5, 6, dtype=dtype)
    pixels[1, 2, 3, 4] = float(value)
    with pytest.raises(ValueError, match=f"{name}, first in frame 2 of 4"):
        to_uint8(pixels)


# ---- pictures and videos ----


def test_one_frame_is_one_png(tmp_path, frames):
    folder = tmp_path / "出力 [x]" / "deep"
    paths = save_pictures(frames[:1], folder, "stem")
    assert paths == [folder / "stem.png"] and names(folder) == ["stem.png"]
    with Image.open(paths[0]) as image:
        assert image.format == "PNG" and np.array_equal(np.asarray(image), frames[0])


def test_many_frames_are_a_folder(tmp_path, frames):
    paths = save_pictures(frames, tmp_path, "stem")
    assert paths == [tmp_path / "stem" / f"{index:03d}.png" for index in range(4)]
    assert names(tmp_path) == ["stem"] and names(tmp_path / "stem") == [path.name for path in paths]
    for path, frame in zip(paths, frames, strict=True):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), frame)


def test_video_is_saved_under_the_stem(tmp_path, frames):
    path = save_video(frames, tmp_path / "動画 [x]", "stem", fps=30)
    assert path == tmp_path / "動画 [x]" / "stem.mp4" and names(path.parent) == ["stem.mp4"]
    assert len(list(read_video(path, flag="--video"))) == 4


def test_no_frames_are_an_error(tmp_path, frames):
    with pytest.raises(ValueError, match="no frames"):
        save_pictures(frames[:0], tmp_path, "stem")
    with pytest.raises(ValueError, match="at least one frame"):
        save_video(frames[:0], tmp_path, "stem", fps=30)
    assert names(tmp_path) == []


def failing_on(count, function, error):
    """`function`, but the call number `count` does its work and then raises."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(args)
        result = function(*args, **kwargs)
        if len(calls) == count:
            raise error
        return result

    return wrapped


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize(("num_frames", "failing_call"), [(1, 1), (4, 3)])
def test_failing_picture_leaves_nothing(tmp_path, frames, monkeypatch, error, num_frames, failing_call):
    monkeypatch.setattr(Image.Image, "save", failing_on(failing_call, Image.Image.save, error))
    with pytest.raises(type(error)):
        save_pictures(frames[:num_frames], tmp_path, "stem")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failing_video_leaves_nothing(tmp_path, frames, monkeypatch, error):
    from common import media

    monkeypatch.setattr(media, "_to_yuv", failing_on(3, media._to_yuv, error))
    with pytest.raises(type(error)):
        save_video(frames, tmp_path, "stem", fps=30)
    assert names(tmp_path) == []


def test_failing_latents_leave_nothing(tmp_path, latents, monkeypatch):
    monkeypatch.setattr(outputs, "sort_safetensors_metadata", failing_on(1, lambda path: None, OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_latents(latents, tmp_path, "stem", metadata={})
    assert names(tmp_path) == []
