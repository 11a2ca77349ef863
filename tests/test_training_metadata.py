"""What LoRA files say of their training, and that equal runs say the same."""

import json
import random
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
import torch
from safetensors import safe_open

from networks.lora_metadata import write_lora
from options.errors import UserError
from options.flags_saving import ModelspecFlags, check_modelspec
from training.metadata import ModelIdentity, Session, TrainingFacts, run_clock, run_metadata

MODEL = ModelIdentity(architecture="framepack", implementation="https://github.com/lllyasviel/FramePack")
NOON = datetime(2026, 1, 2, 12, 0, 5, 678000, tzinfo=timezone(timedelta(hours=9)))
SESSION = Session(id=123456, started_at=1.7e9 + 0.123456)
FACTS = TrainingFacts(
    output_name="桜",
    learning_rate=1e-4,
    num_train_items=24,
    num_batches_per_epoch=12,
    num_epochs=4,
    gradient_checkpointing=True,
    gradient_accumulation_steps=2,
    max_train_steps=24,
    lr_warmup_steps=0.1,
    lr_scheduler="constant_with_warmup",
    base_model_version="framepack",
    network_module="networks.lora_framepack",
    network_dim=16,
    network_alpha=8.0,
    network_dropout=None,
    mixed_precision="bf16",
    seed=42,
    training_comment="試し",
    optimizer="torch.optim.adamw.AdamW(betas=(0.9, 0.99))",
    max_grad_norm=1.0,
    weighting_scheme="none",
    logit_mean=0.0,
    logit_std=1.0,
    mode_scale=1.29,
    guidance_scale=10.0,
    timestep_sampling="shift",
    sigmoid_scale=1.0,
    discrete_flow_shift=3.0,
    datasets=[{"image_directory": "写真", "num_repeats": 2}],
    network_args={"conv_dim": "4"},
    sd_model_name="model.safetensors",
    vae_name="vae.safetensors",
)
# Source: the facts about saved files; what readers of LoRA files look for.
PUBLISHED = """session_id training_started_at output_name learning_rate num_train_items num_batches_per_epoch num_epochs
gradient_checkpointing gradient_checkpointing_cpu_offload gradient_accumulation_steps max_train_steps lr_warmup_steps
lr_scheduler base_model_version network_module network_dim network_alpha network_dropout mixed_precision seed
training_comment optimizer max_grad_norm fp8_base full_fp16 full_bf16 weighting_scheme logit_mean logit_std mode_scale
guidance_scale timestep_sampling sigmoid_scale discrete_flow_shift datasets network_args sd_model_name vae_name
training_finished_at steps epoch""".split()


def metadata(facts: TrainingFacts = FACTS, flags: ModelspecFlags | None = None, **changes: object) -> dict[str, str]:
    given = {"finished_at": NOON, "step": 24, "epoch": 4} | changes
    return run_metadata(facts, SESSION, MODEL, flags or ModelspecFlags(), **given)


def test_files_have_exactly_the_published_entries() -> None:
    found = metadata()
    assert {key for key in found if key.startswith("ss_")} == {f"ss_{name}" for name in PUBLISHED}
    assert all(isinstance(value, str) for value in found.values())
    assert {key for key in found if not key.startswith("ss_")} == {
        f"modelspec.{name}"
        for name in ("sai_model_spec", "architecture", "implementation", "title", "resolution", "date")
    }


def test_entries_hold_the_facts_as_python_writes_them() -> None:
    found = metadata()
    for field in fields(FACTS):
        if field.name not in ("datasets", "network_args"):
            assert found[f"ss_{field.name}"] == str(getattr(FACTS, field.name)), field.name
    assert json.loads(found["ss_datasets"]) == FACTS.datasets
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "4"}
    assert found["ss_network_dropout"] == "None" and found["ss_learning_rate"] == "0.0001"
    assert found["ss_steps"] == "24" and found["ss_epoch"] == "4" and found["ss_session_id"] == "123456"
    assert float(found["ss_training_finished_at"]) == NOON.timestamp()
    assert float(found["ss_training_started_at"]) == SESSION.started_at
    assert found["modelspec.date"] == "2026-01-02T12:00:05"


def test_entries_that_do_not_apply_are_left_out() -> None:
    found = metadata(replace(FACTS, network_args={}, sd_model_name=None, vae_name=None))
    assert not {"ss_network_args", "ss_sd_model_name", "ss_vae_name"} & found.keys()


def test_no_metadata_leaves_what_loaders_need_and_the_modelspec() -> None:
    whole, found = metadata(), metadata(flags=ModelspecFlags(no_metadata=True))
    needed = {"base_model_version", "network_module", "network_dim", "network_alpha", "network_args"}
    kept = {f"ss_{name}" for name in needed} | {key for key in whole if key.startswith("modelspec.")}
    assert found == {key: whole[key] for key in kept}


def test_modelspec_takes_what_the_user_gives() -> None:
    flags = ModelspecFlags(
        metadata_title="題",
        metadata_author="作者",
        metadata_description="d",
        metadata_license="MIT",
        metadata_tags="a,b",
        metadata_reso="640",
        metadata_arch="other",
    )
    found = metadata(flags=flags, timestep_range=(None, 500))
    expected = {"title": "題", "author": "作者", "description": "d", "license": "MIT", "tags": "a,b"}
    expected |= {"resolution": "640x640", "architecture": "other/lora", "timestep_range": "0,500"}
    assert {name: found[f"modelspec.{name}"] for name in expected} == expected
    assert metadata()["modelspec.title"] == "桜" and metadata()["modelspec.architecture"] == "framepack/lora"


@pytest.mark.parametrize(
    ("text", "expected"), [(None, "1280x720"), ("960", "960x960"), ("1280,720", "1280x720"), ("640, 960", "640x960")]
)
def test_resolutions_are_one_or_two_numbers(text: str | None, expected: str) -> None:
    flags = ModelspecFlags(metadata_reso=text)
    check_modelspec(flags)
    assert metadata(flags=flags)["modelspec.resolution"] == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1,2,3", "1,", "1.5", "1280x720", "１２"])
def test_other_resolutions_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--metadata_reso: got "):
        check_modelspec(ModelspecFlags(metadata_reso=text))


# ---- times ----


def test_a_set_clock_makes_equal_runs_end_with_equal_bytes(tmp_path) -> None:
    contents = set()
    for number in range(2):
        clock = run_clock({"SOURCE_DATE_EPOCH": "1700000000"})
        assert clock().tzinfo is UTC  # wherever the machine stands
        session = Session.start(clock(), seed=42)
        if number:
            session = Session.from_dict(json.loads(json.dumps(session.as_dict())))
        found = run_metadata(FACTS, session, MODEL, ModelspecFlags(), finished_at=clock(), step=1, epoch=1)
        write_lora(tmp_path / f"{number}.safetensors", {"w": torch.ones(3)}, found)
        contents.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        written = file.metadata()
    assert written["modelspec.date"] == "2023-11-14T22:13:20"
    assert written["ss_training_finished_at"] == written["ss_training_started_at"] == "1700000000.0"


def test_without_a_set_clock_only_times_differ() -> None:
    first, second = (Session.start(NOON + timedelta(seconds=late), seed=42) for late in (0, 1))
    found = [
        run_metadata(FACTS, session, MODEL, ModelspecFlags(), finished_at=NOON + timedelta(hours=late), step=1, epoch=1)
        for late, session in enumerate((first, second))
    ]
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {
        *("ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date")
    }


def test_the_clock_goes_and_knows_its_zone() -> None:
    clock = run_clock({})
    before = datetime.now(UTC)
    assert before <= clock() <= datetime.now(UTC)
    assert clock().utcoffset() == datetime.now().astimezone().utcoffset()


@pytest.mark.parametrize("text", ["", "soon", "1.5", "9" * 30])
def test_a_clock_that_is_set_wrongly_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="SOURCE_DATE_EPOCH: got "):
        run_clock({"SOURCE_DATE_EPOCH": text})


def test_sessions_are_told_apart_by_seed_and_time_and_draw_no_random_numbers() -> None:
    before = random.getstate(), torch.get_rng_state()
    ids = {Session.start(NOON + timedelta(microseconds=late), seed=seed).id for late in range(5) for seed in range(5)}
    assert len(ids) == 25 and all(0 <= number < 2**32 for number in ids)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    "saved", [{}, {"id": 1}, {"id": 1, "started_at": "x"}, {"id": 1, "started_at": 1.0, "more": 2}]
)
def test_what_is_no_session_is_refused(saved) -> None:
    with pytest.raises(ValueError, match="not a session"):
        Session.from_dict(saved)
