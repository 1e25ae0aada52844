"""Small tokenizers of every kind that a GGUF file can hold."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPACE = "▁"
PIECES = (
    "th",
    "the",
    f"{SPACE}the",
    "in",
    f"{SPACE}in",
    "er",
    "an",
    "and",
    f"{SPACE}and",
    f"{SPACE}a",
    f"{SPACE}o",
    "of",
)
LETTERS = "abcdefghijklmnopqrstuvwxyzTCFWI.,():0123456789"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def split_tokenizer(pattern: str, **ends: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits text by a regular expression."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "i")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **ends)


def sentencepiece_merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens whose union is one of the pieces, in the order of the pieces."""
    return [
        (piece[:middle], piece[middle:])
        for piece in PIECES
        for middle in range(1, len(piece))
        if piece[:middle] in vocabulary and piece[middle:] in vocabulary
    ]


def sentencepiece_tokenizer(prefix: bool, **ends: str) -> PreTrainedTokenizerFast:
    """BPE with a token for every byte: with a space before a text as Llama 2's, or without as Gemma's."""
    symbols = ["<unk>", "<s>", "</s>", *BYTES, SPACE, *LETTERS, *PIECES]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    merges = sentencepiece_merges(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    escape = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if prefix else escape
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **ends
    )


def unigram_tokenizer(byte_fallback: bool = False, **ends: str) -> PreTrainedTokenizerFast:
    """Pieces with their log-probabilities."""
    special = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    letters = [(letter, -6.0 - i / 100) for i, letter in enumerate([SPACE, *LETTERS])]
    pieces = [(piece, -3.0 - i / 7) for i, piece in enumerate(PIECES)]
    tokenizer = Tokenizer(models.Unigram([*special, *letters, *pieces], unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **ends
    )
