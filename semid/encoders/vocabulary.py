"""Tokenizers of texts: a SentencePiece model of the catalogue's own texts, or a pretrained one."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from semid import artifacts
from semid.encoders.content import TextRows
from semid.encoders.weights import Settings
from semid.errors import SemidError

# Texts to tokenize at once: the objects of the package tokenizers take 130 bytes a token.
_AT_ONCE = 4096
# The least limit of bytes in a text that SentencePiece accepts.
_SHORTEST_LIMIT = 10


class Tokenized(NamedTuple):
    """Rows of tokens, and the number of texts that were longer than a row and cut."""

    rows: TextRows
    cut: int


@runtime_checkable
class Tokenizer(Protocol):
    """Turns texts into rows of tokens."""

    @property
    def size(self) -> int:
        """Tokens are less than this."""

    def rows(self, texts: Sequence[str], *, max_length: int) -> Tokenized:
        """One row per text, of at most `max_length` tokens; a text without words is absent: its mask is all False."""


class Vocabulary:
    """A SentencePiece unigram model (Kudo 2018). `model` is its serialized form, to be stored in an artifact."""

    PAD = 0

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def train(cls, texts: Iterable[str], *, size: int) -> Vocabulary:
        """A vocabulary of at most `size` pieces; the same texts in the same order give the same bytes.

        Raises SemidError if no text has words, or if `size` is less than the characters in use.
        """
        import sentencepiece

        lines = [" ".join(text.split()) for text in texts if text.strip()]
        if not lines:
            raise SemidError("expected texts to train a vocabulary on, got none with words; give a text column")
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=written,
                vocab_size=size,
                hard_vocab_limit=False,  # few texts have fewer pieces than asked for
                max_sentence_length=max(_SHORTEST_LIMIT, *(len(line.encode()) for line in lines)),
                pad_id=cls.PAD,
                unk_id=1,
                bos_id=-1,
                eos_id=-1,
                num_threads=1,  # several threads add up in any order
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise SemidError(f"no vocabulary of {size} pieces from {len(lines)} texts: {reason}; raise size") from None
        return cls(written.getvalue())

    @property
    def size(self) -> int:
        """Tokens are less than this."""
        return self._processor.vocab_size()

    def rows(self, texts: Sequence[str], *, max_length: int) -> Tokenized:
        """See `Tokenizer`."""
        tokens, cut = [], 0
        for block in _blocks(texts):
            encoded = self._processor.encode(block, num_threads=1)
            tokens += [np.asarray(ids[:max_length], np.int32) for ids in encoded]
            cut += sum(len(ids) > max_length for ids in encoded)
        return _padded(tokens, cut, max_length)


class PretrainedTokenizer:
    """The tokenizer of a folder in the Hugging Face layout."""

    def __init__(self, folder: str | Path) -> None:
        """Read tokenizer.json, or where it is missing a WordPiece vocab.txt. Raises SemidError if there is neither."""
        self._folder = Path(folder)
        with _naming(self._folder):
            self._tokenizer = _read_tokenizer(self._folder)
            self._tokenizer.no_padding()

    @property
    def size(self) -> int:
        """Tokens are less than this."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def rows(self, texts: Sequence[str], *, max_length: int) -> Tokenized:
        """See `Tokenizer`. Special tokens count, and are kept where a text is cut."""
        special = self._tokenizer.num_special_tokens_to_add(False)
        if max_length <= special:
            what = f"expected more tokens for a text than the {special} that stand around each, got {max_length}"
            raise SemidError(f"{self._folder}: {what}; raise max_length (`semid prepare --encoder-tokens`)")
        tokens, cut = [], 0
        with _naming(self._folder):
            self._tokenizer.enable_truncation(max_length)
            for block in _blocks(texts):
                for encoding, text in zip(self._tokenizer.encode_batch(block), block, strict=True):
                    tokens.append(np.asarray(encoding.ids if text.strip() else [], np.int32))
                    cut += bool(encoding.overflowing)
        return _padded(tokens, cut, max_length)


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Name the folder in errors of the package tokenizers, some of which are raised only when a token is needed."""
    try:
        yield
    except SemidError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise SemidError(f"{folder}: its tokenizer cannot be used ({error}); fetch the tokenizer's files") from None


def _read_tokenizer(folder: Path) -> Any:
    try:
        from tokenizers import Tokenizer as Loaded
        from tokenizers.implementations import BertWordPieceTokenizer
    except ImportError:
        raise SemidError("pretrained tokenizers need the package tokenizers; pip install 'semid[encoders]'") from None
    if (folder / "tokenizer.json").is_file():
        return Loaded.from_str(json.dumps(artifacts.read_json(folder / "tokenizer.json")))
    if not (folder / "vocab.txt").is_file():
        raise SemidError(
            f"expected tokenizer.json or vocab.txt in {folder}, found neither; fetch the tokenizer's files"
        )
    settings = folder / "tokenizer_config.json"
    lowercase = Settings.read(settings).get("do_lower_case", True) if settings.is_file() else True
    return BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=lowercase)


def _blocks(texts: Sequence[str]) -> Iterator[list[str]]:
    return (list(texts[start : start + _AT_ONCE]) for start in range(0, len(texts), _AT_ONCE))


def _padded(tokens: Sequence[Int[np.ndarray, " _"]], cut: int, max_length: int) -> Tokenized:
    """Rows as long as the longest text, rounded up to a power of two: catalogues that grow compile few programs."""
    if max_length < 1:
        raise SemidError(f"expected max_length of at least 1, got {max_length}")
    longest = max(map(len, tokens), default=0)
    length = min(max_length, max(8, 1 << (longest - 1).bit_length() if longest else 0))
    lengths = np.array([len(of) for of in tokens], np.int32)
    mask = np.arange(length)[None] < lengths[:, None]
    padded = np.full(mask.shape, Vocabulary.PAD, np.int32)
    padded[mask] = np.concatenate([np.zeros(0, np.int32), *tokens])
    return Tokenized(TextRows(jnp.asarray(padded), jnp.asarray(mask)), cut)
