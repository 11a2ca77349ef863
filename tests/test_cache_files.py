"""Cache files: the facts' names and keys in both directions, whole or absent, and never stale in silence."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dataset import fingerprints
from dataset.cache_files import (
    FINGERPRINT_KEY,
    MISSING,
    NO_FINGERPRINT,
    cache_header,
    latent_metadata,
    read_cache,
    staleness,
    text_metadata,
    write_cache,
    write_text_cache,
)
from dataset.cache_names import (
    DTYPE_NAMES,
    abandoned,
    content_name,
    image_latent_path,
    key_name,
    latent_files,
    parse_latent_name,
    prunable,
    source_stem,
    text_path,
    video_latent_path,
)
from dataset.fingerprints import source_identity
from options.errors import UserError

STEMS = ["im_0", "a_b__c_", "写真 [1]", "v1.5", "x_0001x0002_fp", "_", "(a) {b} 100%"]


def framepack_tensors(scale=1.0):
    """A section cache's content, with 28x36 latents and a small image embedding."""
    latents = (torch.arange(16 * 9 * 28 * 36).reshape(16, 9, 28, 36) % 97 * scale).half()
    return {
        "latents": latents,
        "latent_indices": torch.arange(1, 10),
        "clean_latent_indices": torch.tensor([0, 10]),
        "clean_latent_2x_indices": torch.tensor([11, 12]),
        "clean_latent_4x_indices": torch.arange(13, 29),
        "latents_clean": latents[:, :2],
        "latents_clean_2x": latents[:, 2:4],
        "latents_clean_4x": torch.zeros(16, 16, 28, 36).half(),
        "image_embeddings": torch.ones(7, 5).half(),
    }


FRAMEPACK_KEYS = {
    "latents_9x28x36_float16",
    "latent_indices_int64",
    "clean_latent_indices_int64",
    "clean_latent_2x_indices_int64",
    "clean_latent_4x_indices_int64",
    "latents_clean_9x28x36_float16",
    "latents_clean_2x_9x28x36_float16",
    "latents_clean_4x_9x28x36_float16",
    "image_embeddings_float16",
}
METADATA = latent_metadata("fp", (288, 224), {"f1": "no"}, frame_count=81)


def write_framepack(path, **changes):
    write_cache(path, framepack_tensors() | changes, main="latents", metadata=METADATA)


def keys_of(path):
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


# ---- file names ----


def test_names_are_the_facts_examples():
    assert image_latent_path("c", "d/im_0.png", (800, 600), "fp") == Path("c/im_0_0800x0600_fp.safetensors")
    video = video_latent_path("c", "d/v1.mp4", (288, 224), "wan", start=13, count=21)
    assert video == Path("c/v1_00013-021_0288x0224_wan.safetensors")
    section = video_latent_path("c", "d/v1.mp4", (288, 224), "fp", start=0, count=81, section=1)
    assert section == Path("c/v1_00000-081-0001_0288x0224_fp.safetensors")
    assert text_path("c", "d/im_0.png", "fp") == Path("c/im_0_fp_te.safetensors")


def test_names_grow_with_great_numbers():
    path = video_latent_path("c", "v.mp4", (12000, 16), "fp", start=123456, count=1001, section=0)
    assert path.name == "v_123456-1001-0000_12000x0016_fp.safetensors"
    parsed = parse_latent_name(path, "fp", video=True)
    assert (parsed.stem, parsed.crop, parsed.size, parsed.section) == ("v", (123456, 1001), (12000, 16), 0)


@pytest.mark.parametrize(
    ("source", "stem"), [("a/b.c.png", "b.c"), ("folder/", "folder"), (".png", ".png"), ("日本.語.mp4", "日本.語")]
)
def test_stem_loses_the_last_extension_only(source, stem):
    assert source_stem(source) == stem


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("arch", ["fp", "wan"])
def test_names_are_read_back(stem, arch):
    image = image_latent_path("c", f"{stem}.png", (17, 20000), arch)
    parsed = parse_latent_name(image, arch, video=False)
    assert (parsed.stem, parsed.size, parsed.crop, parsed.section) == (stem, (17, 20000), None, None)
    for section in (None, 0, 12):
        video = video_latent_path("c", f"{stem}.mp4", (288, 224), arch, start=5, count=9, section=section)
        parsed = parse_latent_name(video, arch, video=True)
        assert (parsed.stem, parsed.size, parsed.crop, parsed.section) == (stem, (288, 224), (5, 9), section)
        assert text_path("c", f"{parsed.stem}.mp4", arch) == text_path("c", f"{stem}.mp4", arch)


def test_picture_named_like_a_crop_stays_a_picture():
    path = image_latent_path("c", "v1_00000-081.png", (800, 600), "fp")
    assert parse_latent_name(path, "fp", video=False).stem == "v1_00000-081"


@pytest.mark.parametrize(
    "name",
    [
        "a_fp_te.safetensors",
        "a_0800x0600_wan.safetensors",
        "my_lora_fp.safetensors",
        "a_800x600_fp.safetensors",
        "a_0800x0600_fp.safetensors.txt",
        "a_0800x0600_xfp.safetensors",
        ".a_0800x0600_fp.0123abcd.tmp.safetensors",
    ],
)
def test_other_files_are_no_latent_caches(name):
    assert parse_latent_name(name, "fp", video=False) is None


def test_latent_files_are_listed_in_order_from_a_folder_with_brackets(tmp_path):
    folder = tmp_path / "cache [x]*"
    folder.mkdir()
    for name in ("b_0016x0016_fp", "a_0016x0016_fp", "a_0016x0016_wan", "a_fp_te", "v_00000-005_0016x0016_fp"):
        (folder / f"{name}.safetensors").touch()
    assert [file.stem for file in latent_files(folder, "fp", video=False)] == ["a", "b", "v_00000-005"]
    assert [file.crop for file in latent_files(folder, "fp", video=True)] == [(0, 5)]
    assert latent_files(tmp_path / "none", "fp", video=False) == ()


# ---- pruning ----


@pytest.fixture
def crowded(tmp_path):
    """A cache folder with everything that may stand in one."""
    folder = tmp_path / "キャッシュ [x]"
    folder.mkdir()
    for name in (
        *("a_0016x0016_fp", "b_0016x0016_fp", "写真 [1]_0016x0016_fp", "v_00000-005-0000_0016x0016_fp"),
        *("a_fp_te", "b_fp_te", "a_0016x0016_fp_te", "a_0016x0016_wan", "a_wan_te", "my_lora_fp", "my_lora"),
        ".a.0123abcd.tmp",
    ):
        (folder / f"{name}.safetensors").touch()
    (folder / "c_0016x0016_fp.safetensors").mkdir()
    return folder


def test_pruning_lists_only_this_architectures_latents_that_are_not_kept(crowded):
    kept = [crowded / "a_0016x0016_fp.safetensors", "elsewhere/写真 [1]_0016x0016_fp.safetensors"]
    found = [path.name for path in prunable(crowded, "fp", kept, text=False)]
    assert found == ["b_0016x0016_fp.safetensors", "v_00000-005-0000_0016x0016_fp.safetensors"]
    assert [p.name for p in prunable(crowded, "wan", [], text=False)] == ["a_0016x0016_wan.safetensors"]


def test_pruning_texts_never_lists_latents(crowded):
    found = [path.name for path in prunable(crowded, "fp", [text_path(crowded, "b.png", "fp")], text=True)]
    assert found == ["a_0016x0016_fp_te.safetensors", "a_fp_te.safetensors"]
    assert prunable(crowded / "none", "fp", [], text=True) == ()


def test_kept_name_in_another_unicode_form_is_kept(tmp_path):
    (tmp_path / "プ_0016x0016_fp.safetensors").touch()  # one character more when decomposed
    assert prunable(tmp_path, "fp", ["フ\u309a_0016x0016_fp.safetensors"], text=False) == ()


def test_temporary_files_of_killed_processes_are_found(crowded):
    assert [path.name for path in abandoned(crowded)] == [".a.0123abcd.tmp.safetensors"]


# ---- keys ----

FP_SHAPE = (9, 28, 36)
KEYS = [
    ("latents_9x28x36_float16", "latents", "float16", FP_SHAPE, False),
    ("latents_clean_4x_9x28x36_float16", "latents_clean_4x", "float16", FP_SHAPE, False),
    ("latents_loss_mask_1x68x120_float16", "latents_loss_mask", "float16", (1, 68, 120), False),
    ("latents_control_1x68x120_bfloat16", "latents_control", "bfloat16", (1, 68, 120), False),
    ("latents_image_21x60x104_float8_e4m3fn", "latents_image", "float8_e4m3fn", (21, 60, 104), False),
    ("clean_latent_4x_indices_int64", "clean_latent_4x_indices", "int64", FP_SHAPE, False),
    ("latent_indices_int64", "latent_indices", "int64", FP_SHAPE, False),
    ("image_embeddings_float16", "image_embeddings", "float16", FP_SHAPE, False),
    ("f_indices_int32", "f_indices", "int32", FP_SHAPE, False),
    ("clip_l_pooler_float16", "clip_l_pooler", "float16", None, False),
    ("llama_attention_mask", "llama_attention_mask", "bool", None, False),
    ("varlen_t5_bfloat16", "t5", "bfloat16", None, True),
    ("varlen_t5_mask", "t5_mask", "bool", None, True),
]


@pytest.mark.parametrize(("key", "content", "dtype", "main_shape", "varlen"), KEYS)
def test_keys_are_the_facts_in_both_directions(key, content, dtype, main_shape, varlen):
    assert key_name(content, dtype, main_shape=main_shape, varlen=varlen) == key
    assert content_name(key) == content


def test_every_type_that_a_file_can_hold_is_stripped_whole(tmp_path):
    storable = set()
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        try:
            save_file({"x": torch.zeros(1, dtype=torch.uint8).repeat(16).view(dtype)}, tmp_path / "x.safetensors")
        except Exception:  # torch has types that the format, or a view, does not know
            continue
        storable.add(str(dtype).removeprefix("torch."))
    assert {"float16", "bfloat16", "bool", "float8_e4m3fn", "int64"} <= storable
    for name in storable | set(DTYPE_NAMES):
        assert content_name(f"latents_image_1x2x3_{name}") == "latents_image" and content_name(f"clip_{name}") == "clip"


def test_latents_without_a_main_latent_have_no_key():
    with pytest.raises(ValueError, match="latents_clean"):
        key_name("latents_clean", "float16", main_shape=None)


# ---- interchange ----


def test_written_cache_has_exactly_the_facts_keys_and_metadata(tmp_path):
    path = tmp_path / "v1_00000-081-0001_0288x0224_fp.safetensors"
    write_framepack(path)
    assert keys_of(path) == FRAMEPACK_KEYS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata.pop(FINGERPRINT_KEY)) == {"f1": "no"}
    expected = {"architecture": "framepack", "width": "288", "height": "224", "format_version": "1.0.1"}
    assert metadata == expected | {"frame_count": "81"}
    stored = load_file(path)
    for content, tensor in framepack_tensors().items():
        key = next(key for key in stored if content_name(key) == content)
        assert torch.equal(stored[key], tensor) and stored[key].dtype == tensor.dtype


def test_type_in_wan_keys_is_the_main_latents_whatever_the_tensors_own(tmp_path):
    path = tmp_path / "im_0800x0600_wan.safetensors"
    tensors = {
        "latents": torch.zeros(16, 2, 6, 8, dtype=torch.bfloat16),
        "latents_image": torch.zeros(20, 2, 6, 8, dtype=torch.bfloat16),
        "clip": torch.zeros(1, 257, 4, dtype=torch.float16),
        "f_indices": torch.tensor([0, 1], dtype=torch.int32),
    }
    write_cache(path, tensors, main="latents", metadata=latent_metadata("wan", (800, 600), {}))
    expected = {"latents_2x6x8_bfloat16", "latents_image_2x6x8_bfloat16", "clip_bfloat16", "f_indices_int32"}
    assert keys_of(path) == expected
    header = cache_header(path)
    assert header.dtypes["clip"] == "float16" and header.shapes["clip"] == (1, 257, 4)
    assert header.metadata["architecture"] == "wan" and "frame_count" not in header.metadata
    assert read_cache(path)["clip"].dtype == torch.float16


def test_text_caches_have_the_facts_keys(tmp_path):
    fp, wan = tmp_path / "a_fp_te.safetensors", tmp_path / "a_wan_te.safetensors"
    llama = {
        "llama_vec": torch.zeros(512, 8).half(),
        "llama_attention_mask": torch.arange(512) < 9,
        "clip_l_pooler": torch.zeros(8).half(),
    }
    write_text_cache(fp, llama, metadata=text_metadata("fp", "a 猫", {}))
    assert keys_of(fp) == {"llama_vec_float16", "llama_attention_mask", "clip_l_pooler_float16"}
    assert torch.equal(read_cache(fp)["llama_attention_mask"], llama["llama_attention_mask"])
    assert cache_header(fp).metadata["caption1"] == "a 猫" and cache_header(fp).varlen == frozenset()
    t5 = {"t5": torch.zeros(5, 8, dtype=torch.bfloat16)}
    write_text_cache(wan, t5, metadata=text_metadata("wan", "a", {}), varlen={"t5"})
    assert keys_of(wan) == {"varlen_t5_bfloat16"} and cache_header(wan).varlen == {"t5"}


def test_cache_written_by_the_facts_alone_is_read(tmp_path):
    path = tmp_path / "im_0_0800x0600_fp.safetensors"
    tensors = {
        "latents_1x6x8_float16": torch.ones(16, 1, 6, 8).half(),
        "latent_indices_int64": torch.tensor([9]),
        "latents_clean_1x6x8_float16": torch.ones(16, 2, 6, 8).half(),
        "clean_latent_4x_indices_int64": torch.arange(13, 29),
        "image_embeddings_float16": torch.ones(3, 2).half(),
    }
    metadata = {"architecture": "framepack", "width": "800", "height": "600", "format_version": "1.0.1"}
    save_file(tensors, path, metadata)
    found = read_cache(path)
    assert set(found) == {
        *("latents", "latent_indices", "latents_clean", "clean_latent_4x_indices", "image_embeddings")
    }
    assert torch.equal(found["latents_clean"], tensors["latents_clean_1x6x8_float16"])
    header = cache_header(path)
    assert header.shapes["latents"] == (16, 1, 6, 8) and header.dtypes["latent_indices"] == "int64"
    assert header.metadata == metadata and header.fingerprint is None
    assert staleness(path, {"f1": "no"}) == NO_FINGERPRINT


def test_header_is_read_without_the_tensors(tmp_path, monkeypatch):
    write_framepack(tmp_path / "a.safetensors")
    monkeypatch.setattr("dataset.cache_files._read_keys", None)
    assert cache_header(tmp_path / "a.safetensors").shapes["latents"] == (16, 9, 28, 36)


def test_two_keys_for_one_content_are_an_error(tmp_path):
    save_file({"clip_float16": torch.zeros(1), "clip_bfloat16": torch.ones(1)}, tmp_path / "a.safetensors")
    for read in (read_cache, cache_header):
        with pytest.raises(UserError, match="clip_bfloat16 and clip_float16"):
            read(tmp_path / "a.safetensors")


# ---- writing ----


def test_equal_content_gives_equal_bytes_in_any_process(tmp_path):
    code = """
        import sys, torch
        from dataset.cache_files import latent_metadata, write_cache
        tensors = {"latents": torch.ones(16, 1, 4, 4).half(), "latent_indices": torch.tensor([1])}
        items = [("vae", "x"), ("f1", "no"), ("source", "写真 [1].png")]
        order = items if sys.argv[2] == "0" else items[::-1]
        tensors = tensors if sys.argv[2] == "0" else dict(reversed(tensors.items()))
        write_cache(sys.argv[1], tensors, main="latents", metadata=latent_metadata("fp", (8, 8), dict(order)))
    """
    for number in "01":
        run_python(code, str(tmp_path / number), number, PYTHONHASHSEED=number)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()


def run_python(code, *arguments, **environment):
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(
        command, cwd=root, env={**os.environ, **environment}, check=True, text=True, capture_output=True
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("content", ["latents", "image_embeddings"])
def test_value_that_is_no_number_is_an_error_and_nothing_is_written(tmp_path, value, content):
    spoilt = framepack_tensors()[content].clone()
    spoilt.view(-1)[5] = value
    path = tmp_path / "写真 [1]_fp.safetensors"
    with pytest.raises(UserError, match=rf"\[1\]_fp.*: got 1 of {spoilt.numel()} values of {content} not finite"):
        write_framepack(path, **{content: spoilt})
    assert names(tmp_path) == []


def test_float8_is_checked_and_written(tmp_path):
    path = tmp_path / "a.safetensors"
    write_text_cache(path, {"t5": torch.ones(2).to(torch.float8_e4m3fn)}, metadata=text_metadata("wan", "", {}))
    assert keys_of(path) == {"t5_float8_e4m3fn"} and cache_header(path).dtypes["t5"] == "float8_e4m3fn"
    with pytest.raises(UserError, match="not finite"):
        nan = torch.tensor([float("nan")]).to(torch.float8_e4m3fn)
        write_text_cache(path, {"t5": nan}, metadata=text_metadata("wan", "", {}))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no RLIMIT_FSIZE")
def test_full_disk_leaves_the_old_cache_and_nothing_else(tmp_path):
    code = """
        import resource, sys, torch
        from dataset.cache_files import latent_metadata, write_cache
        def write(value):
            tensors = {"latents": torch.full((16, 9, 28, 36), value)}
            write_cache(sys.argv[1], tensors, main="latents", metadata=latent_metadata("fp", (8, 8), {}))
        if sys.argv[2] == "old":
            write(1.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            write(2.0)
        except OSError as error:
            sys.stdout.write(type(error).__name__)
    """
    path = tmp_path / "a.safetensors"
    assert run_python(code, str(path), "new").stdout == "OSError"
    assert names(tmp_path) == []
    assert run_python(code, str(path), "old").stdout == "OSError"
    assert names(tmp_path) == ["a.safetensors"] and float(read_cache(path)["latents"].mean()) == 1


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("dataset.cache_files.sort_safetensors_metadata", fail)
    with pytest.raises(KeyboardInterrupt):
        write_framepack(tmp_path / "a.safetensors")
    assert names(tmp_path) == []


def test_folder_is_made(tmp_path):
    write_framepack(tmp_path / "新しい" / "[x]" / "a.safetensors")
    assert names(tmp_path / "新しい" / "[x]") == ["a.safetensors"]


# ---- texts that are there already ----


def write_text(path, caption, **tensors):
    write_text_cache(path, tensors, metadata=text_metadata("fp", caption, {"caption": caption}))


def test_other_tensors_of_the_same_caption_and_foreign_metadata_are_kept(tmp_path):
    path = tmp_path / "a_fp_te.safetensors"
    old = {"llama_vec_bfloat16": torch.zeros(2).bfloat16(), "extra_float32": torch.ones(3)}
    save_file(old, path, {"architecture": "framepack", "caption1": "x", "format_version": "1.0.1", "note": "kept"})
    write_text(path, "x", llama_vec=torch.ones(2).half())
    assert keys_of(path) == {"llama_vec_float16", "extra_float32"}
    assert torch.equal(read_cache(path)["extra"], torch.ones(3))
    header = cache_header(path)
    assert header.metadata["note"] == "kept" and header.fingerprint == {"caption": "x"}


def test_tensors_of_another_caption_are_dropped_with_a_warning(tmp_path, caplog):
    path = tmp_path / "a_fp_te.safetensors"
    write_text(path, "old", llama_vec=torch.zeros(2).half(), extra=torch.zeros(1))
    write_text(path, "new", llama_vec=torch.ones(2).half())
    assert keys_of(path) == {"llama_vec_float16"} and cache_header(path).metadata["caption1"] == "new"
    assert "caption changed" in caplog.text and "extra_float32" in caplog.text


def test_text_cache_of_another_architecture_is_refused_and_stays(tmp_path):
    path = tmp_path / "a_te.safetensors"
    write_text_cache(path, {"t5": torch.zeros(2)}, metadata=text_metadata("wan", "x", {}))
    before = path.read_bytes()
    with pytest.raises(UserError, match="got a cache of wan; expected one of framepack"):
        write_text(path, "x", llama_vec=torch.zeros(2))
    assert path.read_bytes() == before


def test_half_written_text_cache_is_replaced_with_a_warning(tmp_path, caplog):
    path = tmp_path / "a_fp_te.safetensors"
    write_text(path, "x", llama_vec=torch.zeros(200))
    path.write_bytes(path.read_bytes()[:-50])
    write_text(path, "x", llama_vec=torch.ones(2))
    assert "damaged" in caplog.text and torch.equal(read_cache(path)["llama_vec"], torch.ones(2))


# ---- staleness ----


def test_cache_of_the_same_settings_is_not_stale(tmp_path):
    settings = {"vae": "ab12", "source": "写真 [1].png", "source_sha256": "0f"}
    path = tmp_path / "a.safetensors"
    write_cache(
        path, {"latents": torch.zeros(1, 1, 2, 2)}, main="latents", metadata=latent_metadata("fp", (8, 8), settings)
    )
    assert staleness(path, dict(reversed(settings.items()))) is None
    # A source that went away is no reason: its settings are left out.
    assert staleness(path, {"vae": "ab12"}) is None


def test_first_differing_setting_is_named_with_both_values(tmp_path):
    path = tmp_path / "a.safetensors"
    metadata = latent_metadata("fp", (8, 8), {"f1": "no", "window": "9", "vae": "a"})
    write_cache(path, {"latents": torch.zeros(1, 1, 2, 2)}, main="latents", metadata=metadata)
    assert staleness(path, {"window": "4", "vae": "b", "f1": "no"}) == "vae is a in the cache, b now"
    assert staleness(path, {"f1": "no", "window": "4"}) == "window is 9 in the cache, 4 now"
    assert staleness(path, {"new": "1"}) == "new is not recorded in the cache, 1 now"


def test_missing_and_damaged_caches_are_stale(tmp_path):
    path = tmp_path / "a.safetensors"
    assert staleness(path, {}) == MISSING
    write_framepack(path)
    content = path.read_bytes()
    for part in (content[:-10], content[:20], b"", b"text"):
        path.write_bytes(part)
        assert "damaged" in staleness(path, {})
        for read in (read_cache, cache_header):
            with pytest.raises(UserError, match="damaged"):
                read(path)


def test_missing_cache_is_one_line_of_error(tmp_path):
    for read in (read_cache, cache_header):
        with pytest.raises(UserError, match="no such file"):
            read(tmp_path / "none.safetensors")


def test_identity_follows_the_content_and_not_the_time(tmp_path):
    path, copy = tmp_path / "a.png", tmp_path / "copy" / "a.png"
    path.write_bytes(b"one")
    copy.parent.mkdir()
    shutil.copyfile(path, copy)
    os.utime(copy, ns=(1, 1))
    before = source_identity(path)
    assert before == source_identity(copy) and before["source"] == "a.png" and before["source_bytes"] == "3"
    copy.write_bytes(b"two")
    assert source_identity(copy)["source_sha256"] != before["source_sha256"]
    assert set(source_identity(path, "control_0")) == {"control_0", "control_0_bytes", "control_0_sha256"}


def test_identity_of_a_folder_follows_every_file_and_name(tmp_path):
    found = set()
    for content in ({"0.png": b"a", "1.png": b"b"}, {"0.png": b"b", "1.png": b"a"}, {"0.png": b"a", "2.png": b"b"}):
        folder = tmp_path / str(len(found)) / "frames"
        folder.mkdir(parents=True)
        for name, data in content.items():
            (folder / name).write_bytes(data)
        found.add(source_identity(folder)["source_sha256"])
    assert len(found) == 3


def test_file_is_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    first = source_identity(path)
    monkeypatch.setattr(fingerprints.hashlib, "file_digest", None)
    assert source_identity(path) == first
