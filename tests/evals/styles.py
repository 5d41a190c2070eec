"""Tiny tokenizers of the three styles that models use, trained on a few lines each."""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXT = [
    "The answer is (A) or (B), not (C). The answer is (A).",
    "Q: what is 2+2?\nAnswer: four\n\nQ: is it able?\nAnswer: unable\n\nAnswer: (A) A) A) (A",
    "unable to play, playing; able. (A) (A) (A) def f(x): return (A) + 12",
    "one of\n(A) or\n(B): \n(A) or\n(B)",
] * 4
STYLES = ("byte-level", "sentencepiece", "wordpiece")

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def tokenizer_of(style: str) -> Any:
    """A tokenizer that writes BOS before a text; `wordpiece` writes `[SEP]` behind it, too."""
    if style == "wordpiece":
        return _wordpiece()
    bos, eos, unknown = (
        ("<|begin|>", "<|end|>", None) if style == "byte-level" else ("<s>", "</s>", "<unk>")
    )
    special = [bos, eos] + ([unknown] if unknown else [])
    if style == "byte-level":
        made = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(_LLAMA_3), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:  # as Llama 2: spaces are characters, nothing is split, so tokens may span words
        made = Tokenizer(models.BPE(unk_token=unknown, fuse_unk=True))
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = []
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, made.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=bos, eos_token=eos, unk_token=unknown
    )


def _wordpiece() -> Any:
    special = ["[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special)
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, made.token_to_id(token)) for token in special[1:]],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
