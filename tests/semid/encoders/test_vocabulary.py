"""Texts to rows: the catalogue's own pieces, WordPiece as transformers has it, what is cut and what is absent."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from semid.encoders import PretrainedTokenizer, Vocabulary
from semid.errors import SemidError

GOLDEN = Path(__file__).parent / "golden" / "bert"
TEXTS = ["matte red lipstick", "red gloss, lips", "engine oil\nfor the motor", "oil filter für 7 motors", "", "  "]
# What BertTokenizer of transformers 5.23 says; printed by make_golden.py.
WORDPIECES = {
    "Matte red lipsticks": [2, 5, 9, 6, 7, 8, 3],
    "the engine, the oil.": [2, 15, 10, 12, 15, 11, 13, 3],
    "lip": [2, 6, 3],
    "matte matte matte unheard red red oil oil": [2, 5, 5, 5, 1, 9, 9, 11, 11, 3],
}


def _words(vocabulary: Vocabulary, text: str, *, max_length: int = 64) -> list[int]:
    rows = vocabulary.rows([text], max_length=max_length).rows
    return np.asarray(rows.tokens)[np.asarray(rows.mask)].tolist()


def test_the_same_texts_give_the_same_bytes():
    first, again = (Vocabulary.train(TEXTS * 5, size=60).model for _ in range(2))
    assert first == again
    assert first != Vocabulary.train(TEXTS[:3] * 5, size=60).model


def test_pieces_give_back_the_text_and_bytes_the_vocabulary():
    import sentencepiece

    vocabulary = Vocabulary.train(TEXTS * 5, size=60)
    decode = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model).decode
    assert [decode(_words(vocabulary, text)) for text in TEXTS] == [" ".join(text.split()) for text in TEXTS]
    again = Vocabulary(vocabulary.model)
    assert (again.size, _words(again, TEXTS[0])) == (vocabulary.size, _words(vocabulary, TEXTS[0]))
    assert 30 < vocabulary.size <= 60


def test_rows_are_padded_cut_and_counted():
    vocabulary = Vocabulary.train(TEXTS * 5, size=60)
    rows, cut = vocabulary.rows(TEXTS, max_length=64)
    lengths = [len(_words(vocabulary, text)) for text in TEXTS]
    assert cut == 0
    assert rows.tokens.shape == (6, 1 << (max(lengths) - 1).bit_length())
    assert rows.mask.sum(axis=1).tolist() == lengths
    assert lengths[4:] == [0, 0]
    assert (np.asarray(rows.tokens)[~np.asarray(rows.mask)] == Vocabulary.PAD).all()
    assert np.asarray(rows.tokens).max() < vocabulary.size
    short, cut = vocabulary.rows(TEXTS, max_length=5)
    assert cut == sum(length > 5 for length in lengths) > 0
    np.testing.assert_array_equal(short.tokens, rows.tokens[:, :5])


def test_texts_may_be_shorter_than_ten_bytes():
    vocabulary = Vocabulary.train(["hat", "coat", "靴"], size=60)
    assert len(_words(vocabulary, "hat coat")) > 1
    assert 1 not in _words(vocabulary, "靴")


def test_unknown_characters_are_a_token_too():
    vocabulary = Vocabulary.train(TEXTS * 5, size=60)
    assert 1 in _words(vocabulary, "red 漢")
    assert 1 not in _words(vocabulary, "red 7")


def test_no_texts_give_no_rows():
    rows, cut = Vocabulary.train(TEXTS, size=60).rows([], max_length=16)
    assert (rows.tokens.shape, rows.mask.shape, cut) == ((0, 8), (0, 8), 0)


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (["", " \n"], 60, "expected texts to train a vocabulary on, got none with words"),
        ([], 60, "got none with words; give a text column"),
        (TEXTS, 5, "no vocabulary of 5 pieces from 4 texts: .*; raise size"),
    ],
)
def test_what_no_vocabulary_comes_from_is_refused(texts, size, message):
    with pytest.raises(SemidError, match=message) as caught:
        Vocabulary.train(texts, size=size)
    assert "\n" not in str(caught.value)


def test_no_length_is_refused():
    with pytest.raises(SemidError, match="max_length of at least 1, got 0"):
        Vocabulary.train(TEXTS, size=60).rows(TEXTS, max_length=0)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt"])
def test_a_pretrained_tokenizer_says_what_transformers_says(tmp_path, file):
    """tokenizer.json asks for padding and cutting at 6 tokens: that is the caller's to say."""
    pytest.importorskip("tokenizers")
    shutil.copy(GOLDEN / file, tmp_path)
    tokenizer = PretrainedTokenizer(tmp_path)
    rows, cut = tokenizer.rows([*WORDPIECES, " "], max_length=32)
    real = [row[of].tolist() for row, of in zip(np.asarray(rows.tokens), np.asarray(rows.mask), strict=True)]
    assert real == [*WORDPIECES.values(), []]
    assert (tokenizer.size, rows.tokens.shape, cut) == (16, (5, 16), 0)
    rows, cut = tokenizer.rows(list(WORDPIECES), max_length=5)
    assert cut == 3
    assert rows.tokens[0].tolist() == [2, 5, 9, 6, 3]  # what ends a text stays
    for length in (2, 1, 0, -1):
        with pytest.raises(
            SemidError, match=f"more tokens for a text than the 2 that stand around each, got {length};"
        ):
            tokenizer.rows(list(WORDPIECES), max_length=length)
    assert tokenizer.rows(list(WORDPIECES), max_length=3).rows.tokens[0].tolist() == [2, 5, 3]  # control


def test_texts_are_tokenized_some_at_once(tmp_path, monkeypatch):
    """Objects of all texts of a large catalogue would take many times the rows' memory."""
    pytest.importorskip("tokenizers")
    shutil.copy(GOLDEN / "tokenizer.json", tmp_path)
    asked = []

    class Counting:
        def __init__(self, whole, name):
            self.whole, self.name = whole, name

        def __getattr__(self, name):
            found = getattr(self.whole, name)
            if name != self.name:
                return found
            return lambda texts, **options: asked.append(len(texts)) or found(texts, **options)

    for made, inner, name in (
        (Vocabulary.train(TEXTS * 5, size=60), "_processor", "encode"),
        (PretrainedTokenizer(tmp_path), "_tokenizer", "encode_batch"),
    ):
        monkeypatch.setattr(made, inner, Counting(getattr(made, inner), name))
        asked.clear()
        rows, cut = made.rows(TEXTS, max_length=5)
        with monkeypatch.context() as patch:
            patch.setattr("semid.encoders.vocabulary._AT_ONCE", 4)
            some, cut_of_some = made.rows(TEXTS, max_length=5)
        assert (asked, cut_of_some) == ([6, 4, 2], cut)
        for one, other in zip(rows, some, strict=True):
            np.testing.assert_array_equal(one, other)


def test_upper_case_is_kept_where_the_settings_say_so(tmp_path):
    pytest.importorskip("tokenizers")
    shutil.copy(GOLDEN / "vocab.txt", tmp_path)

    def first():
        return PretrainedTokenizer(tmp_path).rows(["Matte"], max_length=8).rows.tokens[0, :3].tolist()

    assert first() == [2, 5, 3]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert first() == [2, 1, 3]


def test_a_folder_without_tokenizer_files_is_refused(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(SemidError, match=r"expected tokenizer.json or vocab.txt in .*, found neither"):
        PretrainedTokenizer(tmp_path)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SemidError, match=r"need the package tokenizers; pip install 'semid\[encoders\]'"):
        PretrainedTokenizer(GOLDEN)
