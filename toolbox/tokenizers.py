"""CLIP's, BERT's and BEiT-3's tokenizers, and words numbered by their checksum where there is no vocabulary."""

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



CLS, SEP = 101, 102  # in BERT's vocabulary

LONGEST_WORDPIECE = 32  # bytes


def bert_vocabulary(path: str, size: int) -> Tensor:
    """vocab.txt as a (size, LONGEST_WORDPIECE) uint8, so that it travels with the weights. Raises UserError for another
    model's."""
    try:
        words = [w.encode() for w in Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: BERT's vocabulary, a vocab.txt beside its weights, cannot be read ({e}).") from None
    if len(words) != size or words[CLS:SEP + 1] != [b"[CLS]", b"[SEP]"] or max(map(len, words)) > LONGEST_WORDPIECE:
        raise UserError(f"{path} is not the vocabulary of bert-base-uncased, {size:,} wordpieces.")
    padded = b"".join(w.ljust(LONGEST_WORDPIECE, b"\0") for w in words)
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(size, LONGEST_WORDPIECE)


def no_vocabulary(size: int) -> Tensor:
    """In the place of a vocabulary: all zeros (see numbered_words)."""
    return torch.zeros(size, LONGEST_WORDPIECE, dtype=torch.uint8)


def numbered_words(sentence: str, first: int, n: int) -> list[int]:
    """For want of a vocabulary: each lower-case word and sign has its checksum for a number, in first .. first + n - 1,
    which is enough to learn from."""
    return [first + zlib.crc32(w.encode()) % n for w in re.findall(r"\w+|[^\w\s]", sentence.lower())]


def bert_wordpieces(vocabulary: Tensor) -> Callable[[list[str]], list[list[int]]]:
    """Sentences -> ids of lower-case wordpieces; of numbered_words, with a vocabulary of zeros."""
    first, n = SEP + 2, len(vocabulary)
    if not vocabulary.any():
        return lambda sentences: [numbered_words(s, first, n - first) for s in sentences]
    from tokenizers import BertWordPieceTokenizer  # transformers needs it too

    words = [bytes(row).rstrip(b"\0").decode() for row in vocabulary.cpu().numpy()]
    tokenizer = BertWordPieceTokenizer({w: i for i, w in enumerate(words)}, lowercase=True)
    return lambda sentences: [e.ids for e in tokenizer.encode_batch(sentences, add_special_tokens=False)]


PAD = 1  # in BEiT-3's vocabulary, where 0 and 2 are start and end, 3 an unknown piece


class SentencePieces(nn.Module):
    """BEiT-3's tokenizer for a table of `rows` embeddings. Its model, the file beit3.spm, is a part of the state dict,
    so that it travels with the weights.

    Without a file it gives numbered_words. Raises UserError for a file that is missing, broken or another model's.
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
            # <mask> comes after the pieces, and eight rows are unused
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
                raise UserError(f"{path} is not BEiT-3's tokenizer, nor any sentencepiece model.") from None

    def get_extra_state(self) -> Tensor:
        return torch.from_numpy(np.frombuffer(self.model, dtype=np.uint8).copy())

    def set_extra_state(self, state: Tensor) -> None:
        self.load(state.cpu().numpy().tobytes(), "what this checkpoint holds")

    def tokenize(self, sentences: list[str], length: int) -> Tensor:
        """Start, pieces, end, PAD up to the longest sentence; cut to `length` with the end kept. -> (B, L)"""
        if self.processor:
            ids = [[i + 1 if i else 3 for i in row] for row in self.processor.encode(sentences)]
        else:  # the first four rows and the last nine are no words
            ids = [numbered_words(s, 4, self.rows - 13) for s in sentences]
        ids = [torch.tensor([0, *row[:length - 2], 2]) for row in ids]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD)


@lru_cache
def clip_tokenizer():
    import open_clip

    return open_clip.SimpleTokenizer()


def clip_tokens(sentences: list[str], length: int, rows: int = 49408) -> Tensor:
    """CLIP's BPE in lower case: start, words, end, zeros; cut to `length` with the end kept. -> (B, length)

    For a table of fewer `rows` than CLIP's, the last two are start and end, and rare words fold onto the others.
    """
    tokens = clip_tokenizer()(sentences, context_length=length)
    if rows < 49408:
        tokens = torch.where(tokens >= 49406, tokens - 49408 + rows,
                             torch.where(tokens < rows - 2, tokens, 1 + tokens % (rows - 3)))
    return tokens
