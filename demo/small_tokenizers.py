"""Small byte-level BPE tokenizers with the manners of LLaMA-3's, CLIP's and T5's: any UTF-8 text goes in."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "Describe the video by detailing the following aspects: 1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:",
    "system user a photograph of a cat, the cat looks up and blinks, soft light from the window",
    "an astronaut in an orange suit smiles and turns the head slowly toward the camera",
    "a red cup of coffee on a wooden table, steam rises, the camera moves closer",
    "the girl wears a school uniform, masterpiece, high quality, she walks and waves her hand",
    "猫がこちらを見ています。女の子が制服を着ています。カメラがゆっくり近づきます。",
)
LLAMA_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", *LLAMA_HEADERS, "<pad>")
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
T5_SPECIALS = ("<pad>", "</s>", "<unk>")
LLAMA_VOCABULARY = 768
CLIP_VOCABULARY = 512
T5_VOCABULARY = 768


def save_llama_tokenizer(folder: Path, corpus: Iterable[str] = CORPUS) -> int:
    """Writes a tokenizer that puts `<|begin_of_text|>` in front, and returns the size of its vocabulary."""
    tokenizer = _trained(corpus, LLAMA_VOCABULARY, LLAMA_SPECIALS)
    begin = LLAMA_SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B",
        special_tokens=[(begin, tokenizer.token_to_id(begin))],
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token="<|end_of_text|>",
        pad_token="<pad>",
        additional_special_tokens=list(LLAMA_HEADERS),
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
        padding_side="right",
    )
    wrapped.save_pretrained(str(folder))
    return tokenizer.get_vocab_size()


def save_clip_tokenizer(folder: Path, corpus: Iterable[str] = CORPUS) -> int:
    """Writes a tokenizer that lower-cases, frames the text with its specials and stops at 77 tokens.

    The end token has the highest id, as in CLIP: its text model pools where the id is highest.
    """
    tokenizer = _trained(corpus, CLIP_VOCABULARY, CLIP_SPECIALS)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    begin, end = CLIP_SPECIALS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B {end}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in CLIP_SPECIALS],
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        unk_token=end,
        clean_up_tokenization_spaces=False,
        model_max_length=77,
        padding_side="right",
    )
    wrapped.save_pretrained(str(folder))
    return tokenizer.get_vocab_size()


def save_t5_tokenizer(folder: Path, corpus: Iterable[str] = CORPUS) -> int:
    """Writes a tokenizer that puts `</s>` behind the text; padding is token 0, as in T5."""
    tokenizer = _trained(corpus, T5_VOCABULARY, first=T5_SPECIALS)
    padding, end, unknown = T5_SPECIALS
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}",
        pair=f"$A {end} $B {end}",
        special_tokens=[(end, tokenizer.token_to_id(end))],
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=padding,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="right",
    )
    wrapped.save_pretrained(str(folder))
    return tokenizer.get_vocab_size()


def _trained(
    corpus: Iterable[str], vocabulary: int, specials: tuple[str, ...] = (), *, first: tuple[str, ...] = ()
) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` tokens from the corpus, `first` among them, with the specials after."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(first), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return tokenizer
