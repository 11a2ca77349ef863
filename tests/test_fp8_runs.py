"""fp8 in whole runs: pictures and what they say of themselves, trainings and their states, caches of captions."""

import json
import logging
from pathlib import Path

import pytest
import torch

import fpack_cache_text_encoder_outputs
import fpack_generate_video
from dataset.cache_files import read_cache
from demo.models import ModelPaths
from frame_pack.config import FAMILY
from generation.outputs import load_latents, read_settings
from generation.settings import recorded
from options.flags_fpack_generate import FramePackComputeFlags
from options.fpack_request import FramePackRequest
from tests.cache_builders import image_set
from tests.training_driver import NAME, Workshop, final_file, finite, metadata, train, trained, ups, write_workshop

NAMES = ("dit", "vae", "text_encoder1", "text_encoder2", "image_encoder")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return write_workshop(tmp_path_factory.mktemp("学習 8"))


def generate(models: ModelPaths, folder: Path, *more: object, dit: Path | None = None) -> Path:
    """The latent that is saved."""
    places = [part for name in NAMES for part in (f"--{name}", getattr(models, name))]
    argv = [*places, "--save_path", folder, "--output_type", "latent", "--device", "cpu", *more]
    argv += ["--dit", dit] if dit else []  # the last one wins
    assert fpack_generate_video.main([str(part) for part in argv]) == 0
    (path,) = folder.glob("*.safetensors")
    return path


@pytest.fixture
def asked(material) -> list[object]:
    one_frame = ["--image_path", material.chelsea, "--one_frame_inference", "default", "--infer_steps", "2"]
    return ["--prompt", "猫", "--video_size", "32", "32", "--seed", "1", *one_frame]


# ---- pictures ----


def test_a_result_in_fp8_says_so_and_is_repeated_so(demo_models, asked, material, tmp_path, caplog) -> None:
    first = generate(demo_models, tmp_path / "a", *asked, "--fp8_scaled", "--fp8_llm")
    plain = generate(demo_models, tmp_path / "plain", *asked)
    settings = read_settings(first, flag="x")
    compute = json.loads(settings)["compute"]
    assert (compute["fp8"], compute["fp8_scaled"], compute["fp8_llm"]) == (False, True, True)
    latent, wanted = load_latents(first, flag="x")[0], load_latents(plain, flag="x")[0]
    assert 1e-4 < float((latent - wanted).norm() / wanted.norm()) < 0.3
    repeat = ["--from_metadata", first, "--search_dir", material.chelsea.parent]
    assert generate(demo_models, tmp_path / "b", *repeat).read_bytes() == first.read_bytes()
    with caplog.at_level(logging.WARNING):
        generate(demo_models, tmp_path / "c", *repeat, "--fp8")
    assert "made with fp8_scaled True" in caplog.text, "what the command line says wins"

    older = json.loads(settings)
    for name in ("fp8", "fp8_scaled", "fp8_llm"):
        del older["compute"][name]
    types = {"request_type": FramePackRequest, "compute_type": FramePackComputeFlags}
    record = recorded(json.dumps(older), first, material.chelsea.parent, family=FAMILY, **types)
    assert record.compute["fp8_scaled"] is False


def test_a_saved_model_makes_the_same_picture(demo_models, asked, tmp_path, capsys) -> None:
    wanted = generate(demo_models, tmp_path / "a", *asked, "--fp8_scaled")
    ready = tmp_path / "八 [1].safetensors"
    argv = ["--dit", demo_models.dit, "--save_fp8_model", ready, "--device", "cpu"]
    assert fpack_generate_video.main([str(part) for part in argv]) == 0
    for number, more in enumerate(([], ["--fp8_scaled"])):
        found = generate(demo_models, tmp_path / str(number), *asked, *more, dit=ready)
        assert torch.equal(load_latents(found, flag="x")[0], load_latents(wanted, flag="x")[0])
    others = [part for name in NAMES[1:] for part in (f"--{name}", getattr(demo_models, name))]
    argv = ["--dit", ready, "--fp8", *others, *asked, "--save_path", tmp_path, "--check"]
    assert fpack_generate_video.main([str(part) for part in argv]) == 2
    assert "--fp8: got" in capsys.readouterr().err


# ---- training ----


@pytest.mark.parametrize("given", [("fp8_base",), ("fp8_scaled",)])
def test_a_lora_learns_on_fp8_and_says_so(workshop, tmp_path, given) -> None:
    flags = dict.fromkeys(given, True)
    command = workshop.command(tmp_path / "八", **flags, max_train_steps=2, gradient_checkpointing=True)
    tensors = trained(command)
    assert finite(tensors) and any(tensor.any() for tensor in ups(tensors).values())
    assert metadata(final_file(command))["ss_fp8_base"] == "True"


def test_a_state_goes_on_with_the_weights_that_it_was_trained_on(workshop, tmp_path, capsys) -> None:
    changes = {"fp8_scaled": True, "save_state": True}
    first = workshop.command(tmp_path / "八", **changes, max_train_steps=2)
    assert train(first) == 0
    state = tmp_path / "八" / f"{NAME}-state"
    capsys.readouterr()
    for other in ({"fp8_scaled": False}, {"fp8_scaled": False, "fp8_base": True}):
        assert train(workshop.command(tmp_path / "他", **changes | other, resume=state)) == 2
        said = capsys.readouterr().err
        assert "in fp8 (scaled)" in said and said.count("\n") == 1
    assert train(workshop.command(tmp_path / "続き", **changes, resume=state, max_train_steps=3)) == 0

    plain = workshop.command(tmp_path / "素", save_state=True, max_train_steps=1)
    assert train(plain) == 0
    assert train(workshop.command(tmp_path / "他", **changes, resume=tmp_path / "素" / f"{NAME}-state")) == 2


# ---- captions ----


def test_captions_are_encoded_anew_when_llama_changes_its_type(demo_models, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    config = image_set(tmp_path, ["猫"])
    places = ["--text_encoder1", demo_models.text_encoder1, "--text_encoder2", demo_models.text_encoder2]
    argv = ["--dataset_config", config, *places, "--skip_existing"]
    path, found = tmp_path / "cache" / "猫_fp_te.safetensors", []
    for more in ([], ["--fp8_llm"], ["--fp8_llm"], []):
        assert fpack_cache_text_encoder_outputs.main([str(part) for part in (*argv, *more)]) == 0
        found.append(read_cache(path)["llama_vec"].float())
    whole, fp8, kept, again = found
    assert torch.equal(whole, again) and torch.equal(fp8, kept)
    assert 1e-4 < float((fp8 - whole).norm() / whole.norm()) < 0.1
