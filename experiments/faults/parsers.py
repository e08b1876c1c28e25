"""Parsers of files that come from elsewhere, each with a small file as it should be."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv

from semid.artifacts import load_tensors, read_manifest
from semid.bulk.encoding import UNSTEADY
from semid.catalog.changes import read_change
from semid.catalog.export import read_tokens
from semid.data import Dataset, VectorFile, read_id_file
from semid.errors import SemidError
from semid.evaluation.held_out import examples_from_table
from semid.report import write_report
from semid.training import read_history

_ITEMS = b'item_id,title,price\na,Red shoe,1.5\nb,"Blue, big",2\nc,Green,3\n'
_INTERACTIONS = b"user_id,item_id,timestamp\n" + b"".join(
    b"u%d,%s,%d\n" % (user, item, 1_600_000_000 + user) for user in range(3) for item in (b"a", b"b", b"c")
)
_HELD_OUT = b'history,target\n"a,b",c\n"[""a"", ""c""]",b\n'
_REVIEWS = b"".join(
    b'{"reviewerID": "U%d", "asin": "B%d", "overall": 5.0, "reviewText": "fine", "unixReviewTime": 14000000%d}\n'
    % (user, item, item)
    for user, item in ((1, 1), (1, 2), (2, 1))
)
_RATINGS = b"user_id,parent_asin,rating,timestamp\nU1,B1,5.0,1400000000000\nU2,B1,3.0,1400000000001\n"
_METADATA = {
    2014: b"{'asin': 'B1', 'title': 'Soap &amp; more', 'price': 3.5, 'categories': [['Beauty', 'Bath']]}\n",
    2018: b'{"asin": "B1", "title": "Soap", "brand": "Q", "price": "$3.50", "category": ["Bath"], "feature": ["x"]}\n',
    2023: b'{"parent_asin": "B1", "title": "Soap", "store": "Q", "price": 3.5, "categories": [], "features": ["x"]}\n',
}
_VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "shoe", "##s", "blue")


class Parser(NamedTuple):
    """A file as it should be, its suffix, and what reads it."""

    content: bytes
    suffix: str
    read: Callable[[Path], Any]


def parsers(world: Path) -> Mapping[str, Parser]:
    """All parsers by name; some files are those of a world (see `make_world`)."""
    model, new_items = world / "model", world / "new_items.parquet"
    change = world / "grown" / "changes" / "000001.parquet"
    vectors = io.BytesIO()
    np.save(vectors, np.eye(3, 4, dtype=np.float32))
    return {
        **{name: Parser(_as(suffix, _ITEMS), suffix, _import) for name, suffix in _TABLES.items()},
        **{f"held-out {name}": Parser(_as(suffix, _HELD_OUT), suffix, _held_out) for name, suffix in _TABLES.items()},
        ".npy": Parser(vectors.getvalue(), ".npy", _import_vectors),
        "Parquet of vectors": Parser(new_items.read_bytes(), ".parquet", _blocks),
        "index.json": Parser(b'{"a": ["<a_1>", "<b_2>"], "b": ["<a_0>", "<b_3>"]}', ".json", read_tokens),
        "codes as TSV": Parser(b"a\t1 2\nb\t0 3\n", ".tsv", read_tokens),
        "change": Parser(change.read_bytes(), ".parquet", lambda path: read_change(path, None)),
        "weights": Parser((model / "model.safetensors").read_bytes(), ".safetensors", load_tensors),
        "manifest.json": Parser((model / "manifest.json").read_bytes(), ".json", _manifest),
        "history.jsonl": Parser((model / "history.jsonl").read_bytes(), ".jsonl", read_history),
        "metrics.json": Parser(_metrics(world), ".json", partial(_report, world, "metrics.json")),
        "examples.json": Parser(
            (world / "examples.json").read_bytes(), ".json", partial(_report, world, "examples.json")
        ),
        "unfinished log": Parser(
            (model / "history.jsonl").read_bytes(), ".jsonl", partial(_report, world, "model.checkpoints/history.jsonl")
        ),
        "ids": Parser(b"a\nb\nc d\n", ".txt", read_id_file),
        "vocab.txt": Parser("\n".join(_VOCABULARY).encode(), ".txt", partial(_tokenizer, "vocab.txt")),
        "tokenizer.json": Parser(_tokenizer_json(), ".json", partial(_tokenizer, "tokenizer.json")),
        **{
            name: Parser(content, ".json", partial(_encoder, name)) for name, content in _settings_of_encoders().items()
        },
        "Amazon reviews": Parser(_REVIEWS, ".json", _reviews),
        "Amazon reviews, compressed": Parser(gzip.compress(_REVIEWS, mtime=0), ".json.gz", _reviews),
        "Amazon ratings": Parser(_RATINGS, ".csv", _ratings),
        **{f"Amazon metadata {year}": Parser(_METADATA[year], ".json", partial(_metadata, year)) for year in _METADATA},
        "MovieLens ratings": Parser(b"1::10::5::978300760\n2::10::3::978300761\n", ".dat", _movie_ratings),
        "MovieLens movies": Parser(b"10::Toy Story (1995)::Animation|Comedy\n", ".dat", _movies),
    }


_TABLES = {"CSV": ".csv", "TSV": ".tsv", "JSONL": ".jsonl"}


def _as(suffix: str, table: bytes) -> bytes:
    """A table in CSV as another kind of file."""
    if suffix == ".csv":
        return table
    read = csv.read_csv(io.BytesIO(table))
    if suffix == ".jsonl":
        return b"".join(json.dumps(row).encode() + b"\n" for row in read.to_pylist())
    rows = [read.column_names, *zip(*(column.to_pylist() for column in read.columns), strict=True)]
    return "".join("\t".join(map(str, row)) + "\n" for row in rows).encode()


def _interactions(path: Path) -> Path:
    """Interactions as they should be, next to a mutated file."""
    other = path.with_name(f"interactions{path.suffix if path.suffix in _TABLES.values() else '.csv'}")
    if not other.exists():
        other.write_bytes(_as(other.suffix, _INTERACTIONS))
    return other


def _import(path: Path) -> Any:
    return Dataset.from_tables(path, _interactions(path), name="fuzz")


def _import_vectors(path: Path) -> Any:
    items = pa.table({"item_id": ["a", "b", "c"]})
    return Dataset.from_tables(items, _interactions(path), name="fuzz", vectors={"content": path})


@dataclass(frozen=True)
class _Ranker:
    item_ids: pa.Array


def _held_out(path: Path) -> Any:
    return examples_from_table(_Ranker(pa.array(["a", "b", "c"])), path, drop_unknown=True)


def _blocks(path: Path) -> Any:
    try:
        return list(VectorFile.open(str(path), dim=32, id_column="item_id", columns=("content",)).blocks(64))
    except UNSTEADY as error:  # whoever reads vectors tries again, and then names the file
        raise SemidError(f"{path}: {error}") from None


def _manifest(path: Path) -> Any:
    return read_manifest(path.rename(path.with_name("manifest.json")).parent)


def _metrics(world: Path) -> bytes:
    """Metrics without digests, as users write them."""
    metrics = json.loads((world / "metrics.json").read_bytes())
    return json.dumps({name: metrics[name] for name in ("split", "rows", "provenance")}).encode()


def _report(world: Path, name: str, path: Path) -> Any:
    """Report of a run with a mutated file."""
    run = path.with_name("run")
    shutil.rmtree(run, ignore_errors=True)
    (run / "model.checkpoints").mkdir(parents=True)
    (run / "model.checkpoints" / "request.json").write_text("{}", encoding="utf-8")
    (run / "metrics.json").write_bytes(_metrics(world))
    path.rename(run / name)
    return write_report([run], run / "report.html")


def _tokenizer(name: str, path: Path) -> Any:
    from semid.encoders import PretrainedTokenizer

    path.rename(path.with_name(name))
    return PretrainedTokenizer(path.parent).rows(["red shoes", "", "a long blue shoe"], max_length=4)


def _tokenizer_json() -> bytes:
    from tokenizers.implementations import BertWordPieceTokenizer

    return BertWordPieceTokenizer({token: row for row, token in enumerate(_VOCABULARY)}).to_str().encode()


# A layer of BERT or ViT on vectors of 4 numbers, whose matrices are all square.
_SHARED: dict[str, Any] = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
_SHARED |= {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1}
_BERT = {**_SHARED, "model_type": "bert", "vocab_size": 9, "max_position_embeddings": 8, "type_vocab_size": 2}
_VIT = {**_SHARED, "model_type": "vit", "image_size": 4, "patch_size": 2}
_PREPROCESSING = {"size": {"height": 4, "width": 4}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_DENSE = ("attention.output.dense", "intermediate.dense", "output.dense")
_MATRICES = {
    "bert": ("attention.self.query", "attention.self.key", "attention.self.value", *_DENSE),
    "vit": ("attention.attention.query", "attention.attention.key", "attention.attention.value", *_DENSE),
}
_NORMS = {
    "bert": ("embeddings.LayerNorm", "encoder.layer.0.attention.output.LayerNorm", "encoder.layer.0.output.LayerNorm"),
    "vit": ("layernorm", "encoder.layer.0.layernorm_before", "encoder.layer.0.layernorm_after"),
}
_TABLES_OF: dict[str, dict[str, tuple[int, ...]]] = {
    "bert": {
        "embeddings.word_embeddings.weight": (9, 4),
        "embeddings.position_embeddings.weight": (8, 4),
        "embeddings.token_type_embeddings.weight": (2, 4),
    },
    "vit": {
        "embeddings.patch_embeddings.projection.weight": (4, 3, 2, 2),
        "embeddings.patch_embeddings.projection.bias": (4,),
        "embeddings.cls_token": (1, 1, 4),
        "embeddings.position_embeddings": (1, 5, 4),
    },
}


def _weights(kind: str) -> dict[str, np.ndarray]:
    """Tensors of a model, by their names in the Hugging Face layout."""
    shapes = dict(_TABLES_OF[kind])
    for layer in _MATRICES[kind]:
        shapes |= {f"encoder.layer.0.{layer}.weight": (4, 4), f"encoder.layer.0.{layer}.bias": (4,)}
    for norm in _NORMS[kind]:
        shapes |= {f"{norm}.weight": (4,), f"{norm}.bias": (4,)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


def _settings_of_encoders() -> dict[str, bytes]:
    """Contents of the JSON files of encoders' folders, by `kind/name`."""
    index = {"weight_map": dict.fromkeys(_weights("bert"), "part.safetensors")}
    files: dict[str, Any] = {
        "bert/config.json": _BERT,
        "bert/1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
        "bert/modules.json": [{"type": "sentence_transformers.models.Transformer", "path": ""}],
        "bert/sentence_bert_config.json": {"max_seq_length": 4},
        "bert/tokenizer_config.json": {"do_lower_case": True},
        "bert/model.safetensors.index.json": index,
        "vit/config.json": _VIT,
        "vit/preprocessor_config.json": _PREPROCESSING,
    }
    return {name: json.dumps(value).encode() for name, value in files.items()}


def _encoder(name: str, path: Path) -> Any:
    """The encoder of a folder with a mutated file."""
    from safetensors.numpy import save_file

    from semid.encoders import PretrainedVectorsConfig

    kind = name.partition("/")[0]
    folder = path.with_name(kind)
    for file, content in _settings_of_encoders().items():
        if file.startswith(f"{kind}/"):
            (path.parent / file).parent.mkdir(parents=True, exist_ok=True)
            (path.parent / file).write_bytes(content)
    if kind == "bert":
        (folder / "vocab.txt").write_text("\n".join(_VOCABULARY), encoding="utf-8")
    weights = folder / ("part.safetensors" if kind == "bert" else "model.safetensors")
    if not weights.exists():
        save_file(_weights(kind), weights)
    path.rename(folder.parent / name)
    return PretrainedVectorsConfig(str(folder)).resolved()


def _reviews(path: Path) -> Any:
    from semid.data.builders import amazon_reviews, raw

    return list(raw.read_interactions(raw.parse_lines(path, amazon_reviews._review), path).histories())


def _ratings(path: Path) -> Any:
    from semid.data.builders import amazon_reviews, raw

    header = _RATINGS.split(b"\n", 1)[0].decode()
    return list(raw.read_interactions(raw.parse_lines(path, amazon_reviews._rating, header=header), path).histories())


def _metadata(year: int, path: Path) -> Any:
    from semid.data.builders import amazon_reviews, raw

    found = list(raw.parse_lines(path, partial(amazon_reviews._METADATA[year], wanted={"B1"})))
    return pa.Table.from_pylist([item for one in found if one for item in one[1:]])


def _movie_ratings(path: Path) -> Any:
    from semid.data.builders import movielens, raw

    return list(raw.read_interactions(raw.parse_lines(path, movielens._rating), path).histories())


def _movies(path: Path) -> Any:
    from semid.data.builders import movielens, raw

    found = raw.parse_lines(path, movielens._movie, encoding="latin-1")
    return pa.Table.from_pylist([movie for _, movie in found])
