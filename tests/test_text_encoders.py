"""The text encoders against transformers' whole models and diffusers' pipeline; with the real LLaMA-3 tokenizer too."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import HunyuanVideoFramepackPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_framepack import DEFAULT_PROMPT_TEMPLATE
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from common.weights import Checkpoint, TensorInfo, check_names_and_shapes, empty_module
from hunyuan_model import text_encoders as ours
from options.errors import UserError

PROMPT = "A girl dances gracefully, with {clear} movements, full of charm."
LLAMA_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
CLIP_TOKENS = ["<|startoftext|>", "<|endoftext|>"]
"""The end is the highest number, as in CLIP's own vocabulary: the pooled output is taken where it stands."""
NUM_BYTES = 256


def byte_tokenizer(specials: list[str], template: str) -> Tokenizer:
    """One token per byte, then the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    numbers = [(token, NUM_BYTES + i) for i, token in enumerate(specials)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbers)
    return tokenizer


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def llama_model(vocab_size: int = NUM_BYTES + 8, **changes) -> LlamaModel:
    published = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "head_dim": 128}
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=vocab_size, intermediate_size=48, **{**published, **sizes, **changes})
    return randomise(LlamaModel(config))


def clip_model(**changes) -> CLIPTextModel:
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96}
    published = {"hidden_act": "quick_gelu", "eos_token_id": 2, "layer_norm_eps": 1e-5}
    config = CLIPTextConfig(vocab_size=NUM_BYTES + len(CLIP_TOKENS), **{**published, **sizes, **changes})
    return randomise(CLIPTextModel(config))


@pytest.fixture(scope="module")
def llama() -> LlamaModel:
    return llama_model()


@pytest.fixture(scope="module")
def clip() -> CLIPTextModel:
    return clip_model()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tokenizer/` and `tokenizer_2/`."""
    folder = tmp_path_factory.mktemp("tokenizers")
    start, end = CLIP_TOKENS
    for name, specials, template, pad in (
        ("tokenizer", LLAMA_TOKENS, f"{LLAMA_TOKENS[0]} $A", LLAMA_TOKENS[-1]),
        ("tokenizer_2", CLIP_TOKENS, f"{start} $A {end}", end),
    ):
        tokenizer = byte_tokenizer(specials, template)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def llama_tokenizer(tokenizers: Path):
    return AutoTokenizer.from_pretrained(tokenizers / "tokenizer")


@pytest.fixture(scope="module")
def clip_tokenizer(tokenizers: Path):
    return AutoTokenizer.from_pretrained(tokenizers / "tokenizer_2")


def load_llama(path: Path, **options) -> LlamaModel:
    return ours.load_llama(ours.open_llama(path, **options), dtype=torch.float32, device="cpu")


def load_clip(path: Path, **options) -> CLIPTextModel:
    return ours.load_clip(ours.open_clip(path, **options), dtype=torch.float32, device="cpu")


def saved(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    return folder / name


def diffusers_llama(model: LlamaModel, tokenizer, prompt: str, template: dict) -> torch.Tensor:
    """The valid rows of diffusers' own encoding."""
    pipeline = SimpleNamespace(text_encoder=model, tokenizer=tokenizer)
    rows, mask = HunyuanVideoFramepackPipeline._get_llama_prompt_embeds(
        pipeline, prompt, template, device=torch.device("cpu"), dtype=model.dtype
    )
    return rows[0, : int(mask.sum())]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# The prompt's rows


@pytest.mark.parametrize("prompt", [PROMPT, "", "\n\n \u8e0a\u308b\u5c11\u5973", "long " * 100])
def test_llama_equals_diffusers(llama, llama_tokenizer, tmp_path: Path, prompt: str) -> None:
    template = DEFAULT_PROMPT_TEMPLATE["template"]
    num_prefix = len(llama_tokenizer(template.split("{}")[0])["input_ids"])
    wanted = diffusers_llama(llama, llama_tokenizer, prompt, {"template": template, "crop_start": num_prefix})
    found = ours.encode_llama(load_llama(saved(tmp_path, llama.state_dict())), llama_tokenizer, prompt)
    assert_close(found, wanted)
    assert len(found) == min(len(prompt.encode()) + 1, 256)
    assert not found.requires_grad


def test_a_prompt_that_is_too_long_is_reported(llama, llama_tokenizer, tmp_path: Path, caplog) -> None:
    model = load_llama(saved(tmp_path, llama.state_dict()))
    ours.encode_llama(model, llama_tokenizer, "x" * 255)
    assert not caplog.records
    ours.encode_llama(model, llama_tokenizer, "x" * 256)
    assert [record.getMessage() for record in caplog.records] == ["the prompt has 257 tokens; the first 256 are used"]


@pytest.mark.parametrize("system_prompt", ["Describe {this} briefly.", ""])
def test_another_system_prompt(llama, llama_tokenizer, tmp_path: Path, system_prompt: str) -> None:
    start = f"<|start_header_id|>system<|end_header_id|>\n\n{system_prompt}<|eot_id|>"
    start += "<|start_header_id|>user<|end_header_id|>\n\n"
    ids = llama_tokenizer(f"{start}{PROMPT}<|eot_id|>", return_tensors="pt")["input_ids"]
    hidden = llama(ids, output_hidden_states=True).hidden_states[-3]
    wanted = hidden[0, len(llama_tokenizer(start)["input_ids"]) :]
    model = load_llama(saved(tmp_path, llama.state_dict()))
    assert_close(ours.encode_llama(model, llama_tokenizer, PROMPT, system_prompt=system_prompt), wanted)


@pytest.mark.parametrize("prompt", [PROMPT, "", "long " * 40])
def test_clip_equals_diffusers(clip, clip_tokenizer, tmp_path: Path, prompt: str) -> None:
    pipeline = SimpleNamespace(text_encoder_2=clip, tokenizer_2=clip_tokenizer)
    wanted = HunyuanVideoFramepackPipeline._get_clip_prompt_embeds(pipeline, prompt, device=torch.device("cpu"))[0]
    found = ours.encode_clip(load_clip(saved(tmp_path, clip.state_dict())), clip_tokenizer, prompt)
    assert_close(found, wanted)
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types(llama, clip, llama_tokenizer, clip_tokenizer, tmp_path: Path, dtype: torch.dtype) -> None:
    llama_file, clip_file = saved(tmp_path, llama.state_dict()), saved(tmp_path, clip.state_dict(), "clip.safetensors")
    model = ours.load_llama(ours.open_llama(llama_file), dtype=dtype, device="cpu")
    assert ours.encode_llama(model, llama_tokenizer, PROMPT).dtype == dtype
    assert model.rotary_emb.inv_freq.dtype == torch.float32
    model = ours.load_clip(ours.open_clip(clip_file), dtype=dtype, device="cpu")
    assert ours.encode_clip(model, clip_tokenizer, PROMPT).dtype == dtype


# The real tokenizer


@pytest.fixture(scope="module")
def llama3_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """LLaMA-3's own vocabulary, as the file beside the published encoder describes it: with a BOS, byte-level."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    package = importlib.util.find_spec("llama_models")
    if package is None:
        pytest.skip("the package llama-models, which holds LLaMA-3's tokenizer.model, is not installed")
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    names += ["finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id"]
    names += ["python_tag", "image"]
    names += [f"reserved_special_token_{2 + i}" for i in range(256 - len(names))]
    specials = [f"<|{name}|>" for name in names]
    vocabulary = Path(package.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    tokenizer = TikTokenConverter(vocab_file=str(vocabulary), extra_special_tokens=specials).converted()
    bos = specials[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    folder = tmp_path_factory.mktemp("llama3")
    tokenizer.save(str(folder / "tokenizer.json"))
    # The class that the published folder names: the one that must not be taken at its word.
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": bos, "pad_token": "<|finetune_right_pad_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {"embed_tokens.weight": TensorInfo(file=folder, key="", dtype="F16", shape=(128320, 8))}
    checkpoint = Checkpoint(flag="--text_encoder1", path=folder, files=(folder,), tensors=tensors, config={})
    return ours.load_tokenizer("llama", given=str(folder), checkpoint=checkpoint)


def test_the_template_is_94_tokens_and_the_bos(llama3_tokenizer) -> None:
    prefix = ours.PREFIX.format(ours.SYSTEM_PROMPT)
    assert prefix == DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0]
    ids = llama3_tokenizer(prefix)["input_ids"]
    assert len(ids) == 95 and ids[0] == 128000
    assert len(llama3_tokenizer(prefix, add_special_tokens=False)["input_ids"]) == 94
    assert ids[1:6] == [128006, 9125, 128007, 271, 75885]  # header, system, end of header, two newlines, Describe


def test_the_real_tokenizer_equals_tiktoken(llama3_tokenizer) -> None:
    """Independent of the conversion: LLaMA-3's own description of its vocabulary, run by tiktoken."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    package = importlib.util.find_spec("llama_models")
    folder = Path(package.submodule_search_locations[0]) / "llama3"
    ranks = load_tiktoken_bpe(str(folder / "tokenizer.model"))
    source = (folder / "tokenizer.py").read_text(encoding="utf-8")
    pattern = source.split('pat_str = r"', 1)[1].split('"  # noqa', 1)[0]
    specials = {name: llama3_tokenizer.convert_tokens_to_ids(name) for name in ("<|eot_id|>", "<|start_header_id|>")}
    specials["<|end_header_id|>"] = 128007
    encoding = tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    for prompt in (PROMPT, "", "\n\n  \u8e0a\u308b\u5c11\u5973, 12345 caf\u00e9's"):
        text = ours.PREFIX.format(ours.SYSTEM_PROMPT) + prompt + ours.SUFFIX
        wanted = encoding.encode(text, allowed_special="all")
        assert llama3_tokenizer(text)["input_ids"] == [128000, *wanted]


def test_diffusers_default_template_with_the_real_tokenizer(llama3_tokenizer, tmp_path: Path) -> None:
    whole = llama_model(vocab_size=128320, hidden_size=16)
    wanted = diffusers_llama(whole, llama3_tokenizer, PROMPT, DEFAULT_PROMPT_TEMPLATE)
    model = load_llama(saved(tmp_path, whole.state_dict()))
    assert_close(ours.encode_llama(model, llama3_tokenizer, PROMPT), wanted)


# Every form of the files


def llama_shards(folder: Path, llama: LlamaModel) -> Path:
    llama.save_pretrained(folder / "text_encoder", max_shard_size="30KB")
    return next((folder / "text_encoder").glob("model-00001-of-*.safetensors"))


def llama_snapshot(folder: Path, llama: LlamaModel) -> Path:
    llama_shards(folder, llama)
    return folder


def llama_comfy(folder: Path, llama: LlamaModel) -> Path:
    tensors = {f"model.{name}": tensor for name, tensor in llama.state_dict().items()}
    extras = {"lm_head.weight": torch.zeros(4, 32), "tokenizer": torch.zeros(9, dtype=torch.uint8)}
    return saved(folder, tensors | extras, "\u91cd\u307f.safetensors")


def llama_with_head(folder: Path, llama: LlamaModel) -> Path:
    whole = LlamaForCausalLM(llama.config)
    whole.model.load_state_dict(llama.state_dict())
    whole.save_pretrained(folder)
    return folder


def llama_old(folder: Path, llama: LlamaModel) -> Path:
    return saved(folder, llama.state_dict() | {"layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(64)})


@pytest.mark.parametrize("memmap", [True, False])
@pytest.mark.parametrize("form", [llama_shards, llama_snapshot, llama_comfy, llama_with_head, llama_old])
def test_llama_forms(llama, llama_tokenizer, tmp_path: Path, form: Callable, memmap: bool) -> None:
    model = load_llama(form(tmp_path, llama), memmap=memmap)
    ids = llama_tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    assert_close(model(ids).last_hidden_state, llama(ids, output_hidden_states=True).hidden_states[-3])
    assert torch.equal(model.rotary_emb.inv_freq, llama.rotary_emb.inv_freq)
    assert len(model.layers) == 2


def clip_plain(folder: Path, clip: CLIPTextModel) -> Path:
    return saved(folder, clip.state_dict())


def clip_comfy(folder: Path, clip: CLIPTextModel) -> Path:
    tensors = {f"text_model.{name}": tensor for name, tensor in clip.state_dict().items()}
    tensors |= {"text_projection.weight": torch.zeros(4, 4), "logit_scale": torch.tensor(1.0)}
    tensors |= {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    return saved(folder, tensors, "\u91cd\u307f.safetensors")


def clip_snapshot(folder: Path, clip: CLIPTextModel) -> Path:
    clip.save_pretrained(folder / "text_encoder_2")
    return folder


@pytest.mark.parametrize("memmap", [True, False])
@pytest.mark.parametrize("form", [clip_plain, clip_comfy, clip_snapshot])
def test_clip_forms(clip, clip_tokenizer, tmp_path: Path, form: Callable, memmap: bool) -> None:
    model = load_clip(form(tmp_path, clip), memmap=memmap)
    assert model.state_dict().keys() == clip.state_dict().keys()
    ids = clip_tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    assert_close(model(ids).pooler_output, clip(ids).pooler_output)
    assert torch.equal(model.embeddings.position_ids, torch.arange(77)[None])


def test_what_shapes_do_not_tell_comes_from_the_config(llama_tokenizer, clip_tokenizer, tmp_path: Path) -> None:
    ids = llama_tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    whole = llama_model(head_dim=32, rope_theta=100.0, rms_norm_eps=0.1)
    whole.save_pretrained(tmp_path / "text_encoder")
    assert_close(load_llama(tmp_path)(ids).last_hidden_state, whole(ids, output_hidden_states=True).hidden_states[-3])
    # as transformers 4 wrote it
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    del config["rope_parameters"], config["head_dim"]
    config |= {"rope_theta": 100.0, "rope_scaling": None, "hidden_size": 64}
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert_close(load_llama(tmp_path)(ids).last_hidden_state, whole(ids, output_hidden_states=True).hidden_states[-3])

    ids = clip_tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    whole = clip_model(num_attention_heads=8, hidden_act="gelu", layer_norm_eps=0.1, eos_token_id=NUM_BYTES + 1)
    whole.save_pretrained(tmp_path / "text_encoder_2")
    assert_close(load_clip(tmp_path)(ids).pooler_output, whole(ids).pooler_output)


def test_another_models_config_beside_a_file_is_left_alone(llama, clip, tmp_path: Path) -> None:
    config = {"model_type": "other", "rope_theta": 1.0, "hidden_act": "relu", "num_attention_heads": 7}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = load_llama(saved(tmp_path, llama.state_dict()))
    assert model.config.rope_parameters["rope_theta"] == 500000.0 and model.config.head_dim == 128
    model = load_clip(saved(tmp_path, clip.state_dict()))
    assert model.config.hidden_act == "quick_gelu" and model.config.num_attention_heads == 2


def infos(model: torch.nn.Module, path: Path, flag: str) -> Checkpoint:
    tensors = {
        name: TensorInfo(file=path, key=name, dtype="F16", shape=tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    return Checkpoint(flag=flag, path=path, files=(), tensors=tensors, config={})


def test_the_published_sizes(tmp_path: Path) -> None:
    with torch.device("meta"):
        llama = LlamaConfig(vocab_size=128320, intermediate_size=14336, num_key_value_heads=8)
        whole = infos(LlamaModel(llama), tmp_path, "--text_encoder1")
        clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072)
        clip_l = infos(CLIPTextModel(clip), tmp_path, "--text_encoder2")
    model = empty_module(lambda: ours._build_llama(whole))
    check_names_and_shapes(model, whole)
    assert model.config.num_attention_heads == 32 and model.config.num_hidden_layers == 32
    model = empty_module(lambda: ours._build_clip(clip_l))
    check_names_and_shapes(model, clip_l)
    assert model.config.num_attention_heads == 12 and model.config.max_position_embeddings == 77


# Broken files


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.3.mlp.up_proj.weight", None, r"no layers\.3\.mlp\.up_proj\.weight \(1 missing of"),
        ("norm.weight", None, r"no norm\.weight \(1 missing of"),
        ("embed_tokens.weight", None, r"tensors without embed_tokens\.weight"),
        ("layers.0.self_attn.q_proj.bias", torch.zeros(256), r"1 unexpected tensors, layers\.0\.self_attn\.q_p"),
        ("layers.2.mlp.up_proj.weight", torch.zeros(48, 31), r"layers\.2\.mlp\.up_proj\.weight of shape \(48, 31\)"),
        ("layers.0.self_attn.q_proj.weight", torch.zeros(1, 32), "shapes that do not fit together"),
    ],
)
def test_broken_llama(llama, tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = {key: value for key, value in (llama.state_dict() | {name: tensor}).items() if value is not None}
    with pytest.raises(UserError, match=rf"--text_encoder1 .*model\.safetensors: got \d*\s?{message}"):
        load_llama(saved(tmp_path, tensors))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("final_layer_norm.bias", None, r"no final_layer_norm\.bias"),
        ("encoder.layers.3.mlp.fc1.weight", torch.zeros(2), r"1 unexpected tensors, encoder\.layers\.3\.mlp"),
        ("encoder.layers.1.mlp.fc1.bias", torch.zeros(95), r"encoder\.layers\.1\.mlp\.fc1\.bias of shape \(95,\)"),
    ],
)
def test_broken_clip(clip, tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = {key: value for key, value in (clip.state_dict() | {name: tensor}).items() if value is not None}
    with pytest.raises(UserError, match=rf"--text_encoder2 .*model\.safetensors: got {message}"):
        load_clip(saved(tmp_path, tensors))


def test_the_encoders_mixed_up(llama, clip, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a LLaMA text encoder; expected a CLIP-L .* belongs to --text_encoder1"):
        ours.open_clip(saved(tmp_path, llama.state_dict()))
    with pytest.raises(UserError, match="a CLIP-L text encoder; expected a LLaMA .* belongs to --text_encoder2"):
        ours.open_llama(saved(tmp_path, clip.state_dict()))


def test_a_missing_shard(llama, tmp_path: Path) -> None:
    first = llama_shards(tmp_path, llama)
    next(first.parent.glob("model-00002-of-*.safetensors")).unlink()
    for path in (first, tmp_path):
        with pytest.raises(UserError, match="--text_encoder1: .*shards beside it; add model-00002-of-"):
            ours.open_llama(path)


# Tokenizers


@pytest.fixture
def snapshot(llama, clip, tokenizers: Path, tmp_path: Path) -> Path:
    root = tmp_path / "\u30e2\u30c7\u30eb"
    llama.save_pretrained(root / "text_encoder")
    clip.save_pretrained(root / "text_encoder_2")
    shutil.copytree(tokenizers, root, dirs_exist_ok=True)
    return root


def test_tokenizers_from_the_snapshot(snapshot: Path) -> None:
    for path in (snapshot, snapshot / "text_encoder", snapshot / "text_encoder" / "model.safetensors"):
        checkpoint = ours.open_llama(path)
        assert Path(ours.find_tokenizer("llama", given=None, checkpoint=checkpoint)) == snapshot / "tokenizer"
    tokenizer = ours.load_tokenizer("llama", given=None, checkpoint=checkpoint)
    assert tokenizer("a<|eot_id|>")["input_ids"][0] == NUM_BYTES and len(tokenizer("a<|eot_id|>")["input_ids"]) == 3
    checkpoint = ours.open_clip(snapshot)
    assert Path(ours.find_tokenizer("clip", given=None, checkpoint=checkpoint)) == snapshot / "tokenizer_2"
    tokenizer = ours.load_tokenizer("clip", given=None, checkpoint=checkpoint)
    assert tokenizer("a")["input_ids"][-1] == NUM_BYTES + 1


def test_tokenizers_that_were_given_win(snapshot: Path, tokenizers: Path) -> None:
    checkpoint = ours.open_llama(snapshot)
    for given in (tokenizers, tokenizers / "tokenizer"):
        found = ours.find_tokenizer("llama", given=str(given), checkpoint=checkpoint)
        assert Path(found) == tokenizers / "tokenizer"
    assert ours.find_tokenizer("llama", given="owner/name", checkpoint=checkpoint) == "owner/name"


@pytest.mark.parametrize("given", ["./nothing", "/nothing/here", "C:\\models\\tokenizer", "two words", "", "~/x"])
def test_a_tokenizer_that_is_not_there(snapshot: Path, given: str) -> None:
    with pytest.raises(UserError, match="--tokenizer1: .*a folder with a tokenizer .* or a hub id"):
        ours.find_tokenizer("llama", given=given, checkpoint=ours.open_llama(snapshot))


def test_a_folder_without_a_tokenizer(snapshot: Path) -> None:
    with pytest.raises(UserError, match="--tokenizer2: .*text_encoder_2; expected a folder with a tokenizer"):
        ours.find_tokenizer("clip", given=str(snapshot / "text_encoder_2"), checkpoint=ours.open_clip(snapshot))


@pytest.mark.parametrize(
    ("given", "repository", "subfolder"),
    [
        (None, "hunyuanvideo-community/HunyuanVideo", "tokenizer"),
        ("owner/name", "owner/name", ""),
        ("owner/name/a/b", "owner/name", "a/b"),
        ("name", "name", ""),
    ],
)
def test_hub_ids(llama, tmp_path: Path, monkeypatch, given: str | None, repository: str, subfolder: str) -> None:
    asked = []

    def unreachable(name: str, **options):
        asked.append((name, options["subfolder"]))
        raise OSError("We couldn't connect.\nCheck your network. Thank you.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    checkpoint = ours.open_llama(saved(tmp_path, llama.state_dict()))
    with pytest.raises(UserError, match=r"^--tokenizer1: .*\(OSError: We couldn't connect\).*give --tok") as error:
        ours.load_tokenizer("llama", given=given, checkpoint=checkpoint)
    assert asked == [(repository, subfolder)] and "\n" not in str(error.value)


def test_a_damaged_tokenizer(snapshot: Path) -> None:
    (snapshot / "tokenizer" / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="^--tokenizer1: "):
        ours.load_tokenizer("llama", given=None, checkpoint=ours.open_llama(snapshot))


def test_a_tokenizer_with_more_tokens_than_the_encoder(snapshot: Path) -> None:
    with pytest.raises(UserError, match=r"--tokenizer2: .*, 261 tokens; expected at most the 258 of "):
        ours.load_tokenizer("clip", given=str(snapshot / "tokenizer"), checkpoint=ours.open_clip(snapshot))
