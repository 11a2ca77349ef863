"""`lora_post_hoc_ema.py`: the formulas, against hand-made sums and the power function itself; and what it refuses."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_post_hoc_ema
from networks.lora_metadata import write_lora
from networks.post_hoc_ema import decays, file_weights, gamma_of
from options.errors import UserError

MODULE = "lora_unet_transformer_blocks_0_attn_to_q"
GAMMAS = {0.05: 16.972, 0.1: 6.937, 0.15: 3.558, 0.2: 1.826, 0.25: 0.720, 0.28: 0.169}
Tensors = dict[str, Tensor]


def lora(number: int, dtype: torch.dtype = torch.float32) -> Tensors:
    torch.manual_seed(number)
    tensors = {"lora_down.weight": torch.randn(4, 8), "lora_up.weight": torch.randn(6, 4), "alpha": torch.tensor(2.0)}
    return {f"{MODULE}.{part}": tensor.to(dtype) for part, tensor in tensors.items()}


def saved(folder: Path, files: Mapping[str, Tensors]) -> list[Path]:
    """Written in this order, a minute apart."""
    paths = []
    for number, (name, tensors) in enumerate(files.items()):
        paths.append(folder / f"{name}.safetensors")
        write_lora(paths[-1], tensors, {"ss_epoch": name, "modelspec.title": "題"})
        os.utime(paths[-1], (1_700_000_000 + 60 * number,) * 2)
    return paths


@pytest.fixture
def five(tmp_path: Path) -> list[Path]:
    """Named against their order in time."""
    return saved(tmp_path, {f"学習 [v2]-{5 - number}": lora(number) for number in range(5)})


def run(*arguments: object) -> int:
    return lora_post_hoc_ema.main([str(argument) for argument in arguments])


def averaged(paths: list[Path], *options: object) -> Tensors:
    output = paths[0].parent / "結果" / "ema.safetensors"
    assert run(*paths, "--output_file", output, *options) == 0
    return load_file(output)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="np") as file:
        return file.metadata()


def weighted(paths: list[Path], weights: list[float]) -> Tensors:
    """The sum that a list of weights means, in float64."""
    files = [load_file(path) for path in paths]
    sums = {key: sum(w * f[key].double() for w, f in zip(weights, files, strict=True)) for key in files[0]}
    return {key: tensor.to(files[0][key].dtype) for key, tensor in sums.items()}


def assert_equal(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-6)


# ---- formulas ----


@pytest.mark.parametrize("sigma_rel", GAMMAS)
def test_gamma_is_the_published_one(sigma_rel: float) -> None:
    assert gamma_of(sigma_rel) == pytest.approx(GAMMAS[sigma_rel], abs=6e-4)


@pytest.mark.parametrize("sigma_rel", [0.001, 0.02, *GAMMAS, 12**-0.5])
def test_sigma_rel_is_the_width_of_the_profile(sigma_rel: float) -> None:
    """The standard deviation of a density that goes with t^gamma on [0, 1], by its moments."""
    gamma = gamma_of(sigma_rel)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.1, 0.2])
def test_files_weigh_by_the_power_function(sigma_rel: float) -> None:
    """With many files, the k-th of n has its share of the density: the file's part of t^(gamma + 1)."""
    num_files = 400
    betas = decays(num_files, beta=0.9, beta2=None, sigma_rel=sigma_rel)
    edges = (np.arange(num_files) / (num_files - 1)) ** (gamma_of(sigma_rel) + 1)
    np.testing.assert_allclose(file_weights(betas), [0, *np.diff(edges)], atol=1e-12)


def test_the_first_file_has_no_influence_on_a_power_function() -> None:
    betas = decays(3, beta=0.9, beta2=None, sigma_rel=0.2)
    assert betas == [0, pytest.approx(0.5**2.826, rel=1e-3)]


@pytest.mark.parametrize(
    ("num_files", "beta2", "expected"),
    [(2, None, [0.9]), (2, 0.5, [0.9]), (4, None, [0.9, 0.9, 0.9]), (4, 0.5, [0.9, 0.7, 0.5]), (3, 1.0, [0.9, 1.0])],
)
def test_beta_changes_to_beta2_in_equal_steps(num_files: int, beta2: float | None, expected: list[float]) -> None:
    assert decays(num_files, beta=0.9, beta2=beta2, sigma_rel=None) == pytest.approx(expected)


# ---- files ----

# (1 - beta) of what came, times all later betas
BY_HAND = {
    "default": ([], [0.95**4, 0.05 * 0.95**3, 0.05 * 0.95**2, 0.05 * 0.95, 0.05]),
    "beta": (["--beta", 0.5], [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]),
    "beta2": (["--beta", 0.8, "--beta2", 0.5], [0.8 * 0.7 * 0.6 * 0.5, 0.2 * 0.7 * 0.6 * 0.5, 0.3 * 0.3, 0.2, 0.5]),
    "widest": (["--sigma_rel", 12**-0.5], [0, 0.25, 0.25, 0.25, 0.25]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_average_is_the_weighted_sum_oldest_first(name: str, five: list[Path]) -> None:
    options, weights = BY_HAND[name]
    shuffled = [five[i] for i in (3, 0, 4, 2, 1)]
    expected = weighted(five, weights)
    expected[f"{MODULE}.alpha"] = torch.tensor(2.0)
    assert_equal(averaged(shuffled, *options), expected)


def test_no_sort_keeps_the_given_order(five: list[Path]) -> None:
    given = [five[i] for i in (4, 0, 3)]
    assert_equal(averaged(given, "--no_sort", "--beta", 0.8), weighted(given, [0.64, 0.16, 0.2]))


def test_the_log_names_each_file_with_its_weight_in_order(five: list[Path], caplog) -> None:
    caplog.set_level("INFO")
    averaged([five[i] for i in (2, 0, 1)], "--beta", 0.5)
    lines = [message for message in caplog.messages if "% of" in message]
    assert lines == [f"{w} % of {path}" for w, path in zip([" 25.000", " 25.000", " 50.000"], five[:3], strict=True)]


def test_options_may_stand_between_files(five: list[Path]) -> None:
    output = five[0].with_name("ema.safetensors")
    assert run(five[0], "--beta", "0.5", five[1], "--output_file", output, five[2]) == 0
    assert_equal(load_file(output), weighted(five[:3], [0.25, 0.25, 0.5]))


def test_patterns_are_expanded_where_the_shell_does_not(five: list[Path]) -> None:
    pattern = five[0].parent / "学習*.safetensors"
    assert_equal(averaged([pattern], "--beta", 0.5), weighted(five, [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]))


def test_a_file_that_is_named_like_a_pattern_is_taken_as_it_is(tmp_path: Path) -> None:
    paths = saved(tmp_path, {"a[1]": lora(0), "a1": lora(1), "b": lora(2)})
    assert_equal(averaged([paths[0], paths[2]], "--beta", 0.5), weighted([paths[0], paths[2]], [0.5, 0.5]))


def test_sums_are_in_float32_and_types_those_of_the_first_file(tmp_path: Path) -> None:
    """Steps of 1/256 are lost on a bfloat16 that starts at 1."""
    one, more = ({f"{MODULE}.lora_up.weight": torch.full((2, 2), value)} for value in (1.0, 2.0))
    first = {key: tensor.bfloat16() for key, tensor in one.items()}
    paths = saved(tmp_path, {"a": first, **{str(number): more for number in range(8)}})
    (result,) = averaged(paths, "--beta", 0.998).values()
    assert result.dtype == torch.bfloat16
    assert float(result[0, 0]) == float(torch.tensor(2 - 0.998**8).bfloat16()) != 1.0


def test_other_spellings_and_integers_go_by_their_own_keys(tmp_path: Path) -> None:
    name = "diffusion_model.blocks.0.attn.lora_A.weight"
    files = {
        c: {name: torch.full((2, 3), float(v)), "count": torch.tensor([v])} for c, v in zip("ab", (1, 3), strict=True)
    }
    result = averaged(saved(tmp_path, files), "--beta", 0.5)
    assert torch.equal(result[name], torch.full((2, 3), 2.0))
    assert result["count"].tolist() == [1]


def test_metadata_is_the_last_files_with_fresh_hashes(five: list[Path], tmp_path: Path) -> None:
    tensors = averaged(five)
    metadata = metadata_of(five[0].parent / "結果" / "ema.safetensors")
    assert (metadata["ss_epoch"], metadata["modelspec.title"]) == (five[-1].stem, "題")
    write_lora(tmp_path / "fresh.safetensors", tensors, {"ss_epoch": five[-1].stem, "modelspec.title": "題"})
    assert metadata == metadata_of(tmp_path / "fresh.safetensors")
    assert metadata["sshs_model_hash"] != metadata_of(five[-1])["sshs_model_hash"]


def test_inputs_stay_as_they_were_and_nothing_else_is_left(five: list[Path]) -> None:
    before = [path.read_bytes() for path in five]
    averaged(five)
    assert [path.read_bytes() for path in five] == before
    assert sorted(os.listdir(five[0].parent / "結果")) == ["ema.safetensors"]


# ---- what is refused ----


def complaint(capsys, *arguments: object) -> str:
    assert run(*arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "got" in line]
    return line


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (["--sigma_rel", 0.2887], "--sigma_rel"),
        (["--sigma_rel", 0], "--sigma_rel"),
        (["--sigma_rel", 1e-200], "--sigma_rel"),
        (["--sigma_rel", 0.0009], "--sigma_rel"),
        (["--sigma_rel", "nan"], "--sigma_rel"),
        (["--beta", 1.5], "--beta"),
        (["--beta", "-0.1"], "--beta"),
        (["--beta2", "nan"], "--beta2"),
    ],
)
def test_numbers_out_of_range_are_named(options: list, flag: str, five: list[Path], capsys) -> None:
    output = five[0].with_name("ema.safetensors")
    assert complaint(capsys, *five, "--output_file", output, *options).startswith(f"{flag}: got {options[1]}")
    assert not output.exists()


def changed(number: int, change) -> Tensors:
    tensors = lora(number)
    change(tensors)
    return tensors


BROKEN = {
    "alpha": (lambda t: t.update({f"{MODULE}.alpha": torch.tensor(4.0)}), f"{MODULE}.alpha of 4.0; expected 2.0"),
    "nan": (
        lambda t: t[f"{MODULE}.lora_up.weight"][2].fill_(float("nan")),
        f"got {MODULE}.lora_up.weight with infinite",
    ),
    "infinite": (
        lambda t: t[f"{MODULE}.lora_down.weight"][0].fill_(float("-inf")),
        f"got {MODULE}.lora_down.weight with infinite",
    ),
    "alpha nan": (lambda t: t[f"{MODULE}.alpha"].fill_(float("nan")), f"got {MODULE}.alpha with infinite"),
    "missing": (lambda t: t.pop(f"{MODULE}.lora_up.weight"), f"no {MODULE}.lora_up.weight"),
    "unknown": (lambda t: t.update({f"{MODULE}.lora_mid.weight": torch.ones(1)}), f"got {MODULE}.lora_mid.weight"),
    "shape": (
        lambda t: t.update({f"{MODULE}.lora_up.weight": torch.ones(6, 5)}),
        f"{MODULE}.lora_up.weight of shape (6, 5); expected (6, 4)",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_do_not_fit_are_named_with_the_first_key(name: str, tmp_path: Path, capsys) -> None:
    change, message = BROKEN[name]
    paths = saved(tmp_path, {"a": lora(0), "b": lora(1), "壊れた": changed(2, change)})
    line = complaint(capsys, *paths, "--output_file", tmp_path / "ema.safetensors")
    assert line.startswith(str(paths[2])) and message in line
    assert not (tmp_path / "ema.safetensors").exists()


def test_nan_in_the_first_file_is_named_too(tmp_path: Path, capsys) -> None:
    """With --sigma_rel it has no part in the average, and 0 times NaN would be NaN still."""
    paths = saved(tmp_path, {"壊れた": changed(0, BROKEN["nan"][0]), "b": lora(1)})
    line = complaint(capsys, *paths, "--output_file", tmp_path / "ema.safetensors", "--sigma_rel", 0.2)
    assert line.startswith(str(paths[0])) and f"{MODULE}.lora_up.weight" in line


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_full_disk_is_one_line(error: Exception, five: list[Path], capsys, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    line = complaint(capsys, *five, "--output_file", five[0].with_name("ema.safetensors"))
    assert line.startswith("--output_file: got ") and "ema.safetensors" in line and "No space left" in line
    assert sorted(five[0].parent.iterdir()) == sorted(five)


@pytest.mark.parametrize("key", ["lora_adapter_metadata", "oneframe_folded_scales"])
def test_scales_that_differ_in_the_metadata_are_refused(key: str, tmp_path: Path, capsys) -> None:
    name = "transformer.proj_out.lora_A.weight"
    for number in range(2):
        save_file({name: torch.ones(2, 2)}, tmp_path / f"{number}.safetensors", {key: f'{{"r": {number}}}'})
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    line = complaint(capsys, *paths, "--output_file", tmp_path / "ema.safetensors", "--no_sort")
    assert line.startswith(str(paths[1])) and key in line and "--target default" in line


def test_alphas_in_a_file_beside_are_not_lost_in_silence(tmp_path: Path, capsys) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file(
            {"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, tmp_path / folder / "adapter_model.safetensors"
        )
        (tmp_path / folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 1}', encoding="utf-8")
    paths = [tmp_path / folder / "adapter_model.safetensors" for folder in ("a", "b")]
    assert "adapter_config.json" in complaint(capsys, *paths, "--output_file", tmp_path / "ema.safetensors")


def test_an_input_is_not_overwritten(five: list[Path], capsys, monkeypatch) -> None:
    before = five[2].read_bytes()
    monkeypatch.chdir(five[0].parent)
    for name in (five[2], five[2].name):
        assert complaint(capsys, *five, "--output_file", name).startswith("--output_file: got")
    assert five[2].read_bytes() == before


def test_an_output_that_nobody_could_load_is_refused(five: list[Path], capsys) -> None:
    for name in ("ema.pt", "ema"):
        assert complaint(capsys, *five, "--output_file", five[0].with_name(name)).startswith("--output_file: got")


def test_one_file_is_not_enough_and_a_missing_one_is_named(five: list[Path], capsys) -> None:
    output = five[0].with_name("ema.safetensors")
    assert complaint(capsys, five[0], "--output_file", output).startswith("path: got 1 file")
    assert "none.safetensors" in complaint(capsys, five[0], "none.safetensors", "--output_file", output)
    assert complaint(capsys, "--output_file", output).startswith("path: got nothing")


def test_a_truncated_file_is_named(five: list[Path], capsys) -> None:
    five[3].write_bytes(five[3].read_bytes()[:-8])
    output = five[0].with_name("ema.safetensors")
    assert five[3].name in complaint(capsys, *five, "--output_file", output)
    assert not output.exists()


def test_no_decay_beside_sigma_rel_goes_unnoticed(five: list[Path], caplog) -> None:
    averaged(five, "--sigma_rel", 0.2)
    assert "no effect" not in caplog.text
    averaged(five, "--sigma_rel", 0.2, "--beta", 0.5)
    assert "--beta and --beta2 have no effect" in caplog.text


def test_gamma_refuses_what_has_no_root() -> None:
    with pytest.raises(UserError, match="0.2886"):
        gamma_of(0.3)
