"""`fpack_cache_text_encoder_outputs.py` from its command line to its files, against transformers' own encoders."""

import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load, save

import fpack_cache_text_encoder_outputs
from dataset.cache_files import cache_header, read_cache
from hunyuan_model.text_encoders import PREFIX, SUFFIX, SYSTEM_PROMPT
from tests.cache_builders import NAMES, files, image_set, video_set


@pytest.fixture(autouse=True)
def report(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions that LLaMA gets."""
    import hunyuan_model.text_encoders as module

    captions: list[str] = []
    original = module.encode_llama

    def encode_llama(model, tokenizer, caption, *rest):
        captions.append(caption)
        return original(model, tokenizer, caption, *rest)

    monkeypatch.setattr(module, "encode_llama", encode_llama)
    return captions


def cache(config: Path, models, *flags: object) -> int:
    places = ("--text_encoder1", models.text_encoder1, "--text_encoder2", models.text_encoder2)
    command = [str(flag) for flag in ("--dataset_config", config, *places, *flags)]
    return fpack_cache_text_encoder_outputs.main(command)


def caption(folder: Path, name: str, text: str) -> None:
    (folder / "images" / f"{name}.txt").write_text(text, encoding="utf-8")


def te_files(folder: Path) -> list[str]:
    return list(files(folder / "cache"))


def test_caches_hold_what_the_libraries_encode(tmp_path, demo_models) -> None:
    from transformers import AutoTokenizer, CLIPTextModel, LlamaModel

    text = "a girl walks, 猫"
    config = image_set(tmp_path, ["猫 [1]"])
    caption(tmp_path, "猫 [1]", f"{text}\n")
    assert cache(config, demo_models) == 0
    assert te_files(tmp_path) == ["猫 [1]_fp_te.safetensors"]
    path = tmp_path / "cache" / "猫 [1]_fp_te.safetensors"
    header, stored = cache_header(path), read_cache(path)
    assert set(header.keys.values()) == {"llama_vec_float16", "llama_attention_mask", "clip_l_pooler_float16"}
    assert header.metadata.items() >= {"architecture": "framepack", "caption1": text, "format_version": "1.0.1"}.items()

    root = demo_models.text_encoder1
    tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
    llama = LlamaModel.from_pretrained(root / "text_encoder", dtype=torch.float32)
    prefix = PREFIX.format(SYSTEM_PROMPT)
    skipped = tokenizer(prefix, return_tensors="pt").input_ids.shape[1]
    ids = tokenizer(f"{prefix}{text}{SUFFIX}", return_tensors="pt")
    clip_tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer_2")
    clip = CLIPTextModel.from_pretrained(root / "text_encoder_2", dtype=torch.float32)
    padded = clip_tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with torch.no_grad():
        rows = llama(**ids, output_hidden_states=True).hidden_states[-3][0, skipped:]
        pooled = clip(padded.input_ids).pooler_output[0]
    count = len(rows)
    assert stored["llama_vec"].shape == (512, 256) and stored["llama_vec"].dtype == torch.float16
    torch.testing.assert_close(stored["llama_vec"][:count].float(), rows, atol=2e-2, rtol=2e-3)
    assert not stored["llama_vec"][count:].any()
    assert stored["llama_attention_mask"].dtype == torch.bool
    assert stored["llama_attention_mask"].tolist() == [True] * count + [False] * (512 - count)
    torch.testing.assert_close(stored["clip_l_pooler"].float(), pooled, atol=2e-3, rtol=2e-3)


def test_equal_captions_are_encoded_once(tmp_path, demo_models, encoded) -> None:
    config = image_set(tmp_path, list("abcd"))
    for name in "abd":
        caption(tmp_path, name, "the same")
    assert cache(config, demo_models) == 0
    assert sorted(encoded) == ["caption of c", "the same"]
    stored = files(tmp_path / "cache")
    assert len(stored) == 4 and stored["a_fp_te.safetensors"] == stored["d_fp_te.safetensors"]


def test_a_video_has_one_text_cache_however_many_clips(tmp_path, demo_models) -> None:
    config = video_set(tmp_path, {"v": 20}, frame_extraction="chunk")
    assert cache(config, demo_models) == 0
    assert te_files(tmp_path) == ["v_fp_te.safetensors"]


def test_only_what_changed_is_encoded_again(tmp_path, demo_models, encoded, report) -> None:
    config = image_set(tmp_path)
    assert cache(config, demo_models) == 0
    before = files(tmp_path / "cache")
    (tmp_path / "images" / "猫.png").write_bytes(b"other pixels do not matter")
    caption(tmp_path, "two words", "something else")
    (tmp_path / "cache" / "a [1]_fp_te.safetensors").write_bytes(before["a [1]_fp_te.safetensors"][:-5])
    encoded.clear()
    assert cache(config, demo_models, "--skip_existing") == 0
    assert encoded == ["caption of a [1]", "something else"]
    after = files(tmp_path / "cache")
    assert after["猫_fp_te.safetensors"] == before["猫_fp_te.safetensors"]
    assert after["a [1]_fp_te.safetensors"] == before["a [1]_fp_te.safetensors"]
    assert cache_header(tmp_path / "cache" / "two words_fp_te.safetensors").metadata["caption1"] == "something else"
    assert "1 were cached already" in report.text and re.search(r"made anew \(1\): caption is ", report.text)


def test_other_weights_and_tokenizers_are_noticed(tmp_path, demo_models, encoded) -> None:
    config = image_set(tmp_path, ["a"])
    assert cache(config, demo_models) == 0
    other = tmp_path / "models"
    shutil.copytree(demo_models.text_encoder1, other)
    (weights,) = (other / "text_encoder_2").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    encoded.clear()
    assert cache(config, demo_models, "--skip_existing") == 0 and encoded == []
    assert cache(config, demo_models, "--skip_existing", "--text_encoder2", other) == 0
    assert encoded == ["caption of a"]


def test_the_incumbents_caches_are_kept_unless_the_caption_changed(tmp_path, demo_models, encoded, report) -> None:
    config = image_set(tmp_path)
    assert cache(config, demo_models) == 0
    for path in (tmp_path / "cache").iterdir():
        metadata = {
            "architecture": "framepack",
            "format_version": "1.0.1",
            "caption1": f"caption of {path.name.removesuffix('_fp_te.safetensors')}",
        }
        path.write_bytes(save(load(path.read_bytes()), metadata))
    before = files(tmp_path / "cache")
    caption(tmp_path, "猫", "another caption")
    encoded.clear()
    assert cache(config, demo_models, "--skip_existing") == 0
    assert encoded == ["another caption"]
    after = files(tmp_path / "cache")
    assert [name for name in before if before[name] != after[name]] == ["猫_fp_te.safetensors"]
    assert "2 of these have no fingerprint" in report.text


def test_only_text_caches_of_removed_sources_are_removed(tmp_path, demo_models) -> None:
    config = image_set(tmp_path)
    assert cache(config, demo_models) == 0
    others = ["gone_0040x0032_fp.safetensors", "gone_wan_te.safetensors", "lora_fp.safetensors"]
    for name in others:
        (tmp_path / "cache" / name).write_bytes(b"x")
    for kind in ("images", "controls"):
        (tmp_path / kind / "猫.png").unlink()
    assert cache(config, demo_models, "--skip_existing", "--keep_cache") == 0
    assert "猫_fp_te.safetensors" in te_files(tmp_path)
    assert cache(config, demo_models, "--skip_existing") == 0
    assert sorted(te_files(tmp_path)) == sorted([*others, "a [1]_fp_te.safetensors", "two words_fp_te.safetensors"])


def test_a_caption_that_fails_is_reported_and_the_others_are_cached(tmp_path, demo_models, monkeypatch, report) -> None:
    import hunyuan_model.text_encoders as module

    original = module.encode_llama

    def encode_llama(model, tokenizer, text):
        rows = original(model, tokenizer, text)
        return rows * float("nan") if text == "caption of 猫" else rows

    monkeypatch.setattr(module, "encode_llama", encode_llama)
    config = image_set(tmp_path)
    assert cache(config, demo_models) == 1
    assert te_files(tmp_path) == ["a [1]_fp_te.safetensors", "two words_fp_te.safetensors"]
    (message,) = [record.getMessage() for record in report.records if record.levelno >= logging.ERROR]
    assert "猫.png" in message and "not finite" in message
    assert "3 items, 2 used, 0 dropped, 1 failed" in report.text


def test_missing_captions_are_reported_and_strict_stops_there(tmp_path, demo_models, report, capsys) -> None:
    config = image_set(tmp_path)
    (tmp_path / "images" / "猫.txt").unlink()
    assert cache(config, demo_models, "--strict") == 2
    assert "no caption file 猫.txt" in capsys.readouterr().err and not (tmp_path / "cache").exists()
    assert cache(config, demo_models) == 1
    assert len(te_files(tmp_path)) == len(NAMES) - 1
    assert sum("no caption file 猫.txt" in r.getMessage() for r in report.records if r.levelno >= logging.ERROR) == 1


def test_another_architectures_text_cache_is_not_overwritten(tmp_path, demo_models, report) -> None:
    config = image_set(tmp_path, ["a", "b"])
    assert cache(config, demo_models) == 0
    path = tmp_path / "cache" / "a_fp_te.safetensors"
    path.write_bytes(save(load(path.read_bytes()), {"architecture": "wan", "caption1": "caption of a"}))
    before = path.read_bytes()
    assert cache(config, demo_models) == 1
    assert path.read_bytes() == before and "a cache of wan" in report.text


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--batch_size", 0], "--batch_size: got 0"),
        (["--text_encoder1", "nowhere"], "--text_encoder1: got nowhere"),
        (["--tokenizer2", "nowhere/at/all"], "--tokenizer2: got nowhere/at/all"),
    ],
    ids=str,
)
def test_the_door_says_what_is_wrong(tmp_path, demo_models, monkeypatch, capsys, flags, complaint) -> None:
    for name in ("load_llama", "load_clip"):
        monkeypatch.setattr(f"hunyuan_model.text_encoders.{name}", lambda *a, **k: pytest.fail("weights were loaded"))
    assert cache(image_set(tmp_path, ["a"]), demo_models, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
