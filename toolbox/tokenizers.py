"""Tokenizers: those of CLIP, BERT and BEiT-3, and hashed words for models that have no vocabulary."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common import UserError


def hashed_words(sentence: str, first: int, n: int) -> list[int]:
    """Token ids without a vocabulary: a hash of each lower-case word and sign, in first .. first + n - 1. Two words may
    share an id."""
    return [first + zlib.crc32(w.encode()) % n for w in re.findall(r"\w+|[^\w\s]", sentence.lower())]


# CLIP (dcris, etris)


@lru_cache
def clip_tokenizer():
    import open_clip

    return open_clip.SimpleTokenizer()


def clip_tokens(sentences: list[str], length: int, rows: int = 49408) -> Tensor:
    """CLIP's BPE in lower case: start, words, end, then zeros; cut to `length` with the end kept. -> (B, length)

    For a table with fewer `rows` than CLIP's, start and end are the last two, and rare words share ids with others.
    """
    tokens = clip_tokenizer()(sentences, context_length=length)
    if rows < 49408:
        tokens = torch.where(tokens >= 49406, tokens - 49408 + rows,
                             torch.where(tokens < rows - 2, tokens, 1 + tokens % (rows - 3)))
    return tokens


# BERT (m2ist)

CLS, SEP = 101, 102  # in BERT's vocabulary
LONGEST_WORDPIECE = 32  # bytes


def bert_vocabulary(path: str, size: int) -> Tensor:
    """vocab.txt as a tensor, (size, LONGEST_WORDPIECE) uint8, so that checkpoints can hold it. Raises UserError for the
    vocabulary of another model."""
    try:
        words = [w.encode() for w in Path(path).read_text(encoding="utf-8-sig").rstrip("\n").split("\n")]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: BERT's vocabulary, a vocab.txt beside its weights, cannot be read ({e}).") from None
    if len(words) != size or words[CLS:SEP + 1] != [b"[CLS]", b"[SEP]"] or max(map(len, words)) > LONGEST_WORDPIECE:
        raise UserError(f"{path} is not the vocabulary of bert-base-uncased, {size:,} wordpieces.")
    padded = b"".join(w.ljust(LONGEST_WORDPIECE, b"\0") for w in words)
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(size, LONGEST_WORDPIECE)


def no_vocabulary(size: int) -> Tensor:
    """Zeros in the place of a vocabulary; bert_wordpieces then hashes words."""
    return torch.zeros(size, LONGEST_WORDPIECE, dtype=torch.uint8)


def bert_wordpieces(vocabulary: Tensor) -> Callable[[list[str]], list[list[int]]]:
    """A function from sentences to the ids of their lower-case wordpieces, or of hashed_words for no_vocabulary()."""
    first, n = SEP + 2, len(vocabulary)
    if not vocabulary.any():
        return lambda sentences: [hashed_words(s, first, n - first) for s in sentences]
    from tokenizers import BertWordPieceTokenizer  # a requirement of transformers

    words = [bytes(row).rstrip(b"\0").decode() for row in vocabulary.cpu().numpy()]
    tokenizer = BertWordPieceTokenizer({w: i for i, w in enumerate(words)}, lowercase=True)
    return lambda sentences: [e.ids for e in tokenizer.encode_batch(sentences, add_special_tokens=False)]


# BEiT-3 (shared_ris)

PAD = 1  # in BEiT-3's vocabulary; 0: start, 2: end, 3: unknown piece


class SentencePieces(nn.Module):
    """BEiT-3's tokenizer for a table of `rows` embeddings. Its model, the file beit3.spm, is part of the state dict, so
    that a checkpoint holds it.

    Without a file it gives hashed_words. Raises UserError for a file that is missing, damaged or of another model.
    """

    def __init__(self, path: str, rows: int):
        super().__init__()
        self.rows, self.model, self.processor = rows, b"", None
        if path:
            try:
                model = Path(path).read_bytes()
            except OSError as e:
                raise UserError(f"{path}: BEiT-3's tokenizer, the file beit3.spm released with its weights, cannot be "
                                f"read ({e.strerror}).") from None
            self.load(model, path)
            # the table has ten rows more: one for the shift by 1, <mask>, and eight unused
            if not self.processor or self.processor.get_piece_size() != rows - 10 or self.processor.unk_id() != 0:
                raise UserError(f"{path} is not BEiT-3's tokenizer, beit3.spm with its {rows - 10:,} pieces.")

    def load(self, model: bytes, path: str) -> None:
        self.model, self.processor = model, None
        if model:
            try:
                from sentencepiece import SentencePieceProcessor
            except ImportError:
                raise UserError("BEiT-3's tokenizer needs sentencepiece: pip install sentencepiece.") from None
            try:
                self.processor = SentencePieceProcessor(model_proto=model)
            except RuntimeError:
                raise UserError(f"{path} is not BEiT-3's tokenizer: it is not a sentencepiece model.") from None

    def get_extra_state(self) -> Tensor:
        return torch.from_numpy(np.frombuffer(self.model, dtype=np.uint8).copy())

    def set_extra_state(self, state: Tensor) -> None:
        self.load(state.cpu().numpy().tobytes(), "the tokenizer in this checkpoint")

    def tokenize(self, sentences: list[str], length: int) -> Tensor:
        """Start, pieces, end, then PAD up to the longest sentence; cut to `length` with the end kept. -> (B, L)"""
        if self.processor:
            ids = [[i + 1 if i else 3 for i in row] for row in self.processor.encode(sentences)]
        else:  # the first four rows and the last nine are not for words
            ids = [hashed_words(s, 4, self.rows - 13) for s in sentences]
        ids = [torch.tensor([0, *row[:length - 2], 2]) for row in ids]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)
