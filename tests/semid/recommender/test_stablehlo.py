"""The exported program against the live recommender, and loaded where semid cannot be imported."""

import functools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import flatbuffers
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax import export
from safetensors.numpy import load_file

from semid import artifacts
from semid.artifacts import Kind
from semid.catalog import SemanticCatalog
from semid.data import Histories
from semid.errors import SemidError
from semid.recommender import ItemData, ModelSpec, Recommender, export_program
from semid.recommender.stablehlo import LOADER, USE, as_program
from semid.training import named_leaves
from seq_models import (
    DenseConfig,
    EncoderDecoderConfig,
    FlatDecoderConfig,
    HybridConfig,
    HybridTransformer,
    ItemNeighbors,
    Mixture,
    ParallelHeadsConfig,
    RQTransformerConfig,
    TransformerConfig,
)

pytestmark = pytest.mark.usefixtures("unchecked")
DOC = Path(__file__).parents[3] / "docs" / "stablehlo.md"
ITEMS, LENGTH, K, BEAM = 24, 4, 5, 4
IDS = [f"i{row}" for row in range(ITEMS)]
BACKBONE = TransformerConfig(dim=8, layers=1, heads=2, hidden=8, dropout=0.0)
MODELS = {
    "codes": (RQTransformerConfig(backbone=BACKBONE, id_embedding=True), 3),
    "encoder-decoder": (EncoderDecoderConfig(backbone=BACKBONE, decoder_layers=1), 0),
    "flat": (FlatDecoderConfig(backbone=BACKBONE), 0),
    "hybrid": (HybridConfig(backbone=BACKBONE), 3),
    "parallel-heads": (ParallelHeadsConfig(backbone=BACKBONE), 0),
    "dense": (DenseConfig(backbone=BACKBONE), 0),
}


def _recommender(name: str) -> Recommender:
    """Of 24 items, three of which share their codes; of two families, one of codes, mixed with an item graph."""
    rng = np.random.default_rng(0)
    chosen = rng.permutation(48)[:ITEMS]
    chosen[:3] = chosen[0]
    codes = np.stack(np.unravel_index(chosen, (4, 4, 3)), axis=1).astype(np.int32)
    catalog = SemanticCatalog(pa.array(IDS), codes, (5, 4, 3))
    config, width = MODELS[name]
    spec = ModelSpec(config, catalog.level_sizes, num_items=ITEMS, num_features=width, max_history=LENGTH)
    recommender = Recommender(
        spec.build(seed=5),
        catalog,
        spec=spec,
        items=ItemData(
            features=rng.normal(size=(ITEMS, width)).astype(np.float32) if width else None,
            train_counts=rng.permutation(ITEMS).astype(np.int32),
        ),
    )
    if name in ("flat", "dense"):
        edges = ItemNeighbors(jnp.asarray(rng.integers(-1, ITEMS, (ITEMS, 2))), jnp.asarray(rng.random((ITEMS, 2))))
        mixture = Mixture.from_numbers(edges, weight=0.7, decay=0.5, repeat_factor=0.5)
        recommender._scorer = replace(recommender.scorer, mixture=mixture)
    return recommender


def _histories(n: int) -> list[list[int]]:
    """Of 0 to 6 items, in turn: none, and more than the model reads."""
    rng = np.random.default_rng(n)
    return [rng.integers(0, ITEMS, (size + n) % 7).tolist() for size in range(n)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A live recommender and its program's folder, by the name of the model."""

    @functools.cache
    def make(name: str) -> tuple[Recommender, Path]:
        recommender, out = _recommender(name), tmp_path_factory.mktemp(name) / "program"
        export_program(recommender, out, k=K, beam_size=BEAM)
        return recommender, out

    return make


@pytest.fixture
def codes(written) -> tuple[Recommender, Path]:
    return written("codes")


def _load(folder: Path):
    """Only jax and safetensors, as whoever loads it."""
    return jax.jit(export.deserialize((folder / "program.stablehlo").read_bytes()).call), load_file(
        folder / "arrays.safetensors"
    )


def _live(recommender: Recommender, histories: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = [[IDS[row] for row in rows] for rows in histories]
    ranked = recommender.rank(Histories.from_lists(histories), k=K, exclude_seen=False, beam_size=BEAM)
    return ranked, recommender.recommend(ids, k=K, beam_size=BEAM).scores


def _asked(histories: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Padded with what must not be read."""
    history = np.full((len(histories), LENGTH), 7, np.int32)
    for row, items in zip(history, histories, strict=True):
        row[: len(items[-LENGTH:])] = items[-LENGTH:]
    return history, np.array([min(len(items), LENGTH) for items in histories], np.int32)


@pytest.mark.parametrize(("name", "sizes"), [("codes", (1, 3, 8)), *((name, (8,)) for name in [*MODELS][1:])])
def test_the_program_answers_as_the_live_recommender(written, name, sizes):
    recommender, folder = written(name)
    program, arrays = _load(folder)
    for n in sizes:
        histories = _histories(n)
        rows, scores = program(arrays, *_asked(histories))
        assert (rows.dtype, scores.dtype) == (np.int32, np.float32)
        live_rows, live_scores = _live(recommender, histories)
        np.testing.assert_array_equal(rows, live_rows)
        np.testing.assert_allclose(scores, live_scores, atol=1e-5)
    assert any(not items for items in histories)  # popularity took part
    assert len({tuple(row) for row in live_rows.tolist()}) > 3  # histories matter


def test_item_vectors_are_among_the_arrays(monkeypatch):
    """No call computes those of all items again."""
    arrays, program = as_program(_recommender("hybrid"), k=K, beam_size=BEAM)
    monkeypatch.delattr(HybridTransformer, "item_vectors")
    rows, _ = jax.eval_shape(program, arrays, *_asked(_histories(2)))
    assert rows.shape == (2, K)
    assert arrays["tables/item_vectors"].shape == (ITEMS, BACKBONE.dim)


def test_the_program_holds_no_parameters(codes):
    """With another model's arrays it answers as that one."""
    recommender, folder = codes
    program, arrays = _load(folder)
    other = recommender.with_model(recommender.spec.build(seed=6))
    leaves = named_leaves(other.scorer.params)
    assert {f"params/{name}" for name in leaves} == {name for name in arrays if name.startswith("params/")}
    theirs = arrays | {f"params/{name}": np.asarray(leaf) for name, leaf in leaves.items()}
    histories = _histories(3)
    rows, scores = program(theirs, *_asked(histories))
    live_rows, live_scores = _live(other, histories)
    np.testing.assert_array_equal(rows, live_rows)
    np.testing.assert_allclose(scores, live_scores, atol=1e-5)
    assert not np.array_equal(rows, program(arrays, *_asked(histories))[0])


def test_the_folder_is_an_artifact_that_says_what_it_holds(codes):
    recommender, folder = codes
    manifest = artifacts.read_artifact(folder, Kind.PROGRAM)
    data = {"program.stablehlo", "arrays.safetensors", "item_ids.parquet"}
    assert set(manifest.files) == data | {"program.json", "README.md"}
    facts = json.loads((folder / "program.json").read_text())
    assert facts["sha256"] == {name: manifest.files[name] for name in data}
    assert facts["catalog"] == recommender.catalog.digest
    assert (facts["k"], facts["max_history"], facts["platforms"]) == (K, LENGTH, ["cpu", "cuda", "tpu"])
    assert not facts["leaves_out_history"]
    assert pq.read_table(folder / "item_ids.parquet", page_checksum_verification=True)["item_id"].to_pylist() == IDS
    exported = export.deserialize((folder / "program.stablehlo").read_bytes())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert exported.out_avals[0].shape[1] == K


BLOCKED = """
import sys
sys.path += {paths}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("semid", "seq_models", "quantizers", "flax"):
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Blocker())
for name in ("semid", "seq_models", "flax"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + " can be imported")
"""


def test_the_documented_lines_load_it_where_semid_cannot_be_imported(codes):
    recommender, folder = codes
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    assert all(block in (folder / "README.md").read_text(encoding="utf-8") for block in blocks)
    histories = [[IDS[row] for row in items] for items in _histories(3)]
    ask = f"ids, scores = recommend({histories!r})\nprint(json.dumps([ids, scores.tolist()]))\n"
    paths = sorted({str(Path(package.__file__).parents[1]) for package in (jax, flatbuffers)})
    source = BLOCKED.format(paths=paths) + "".join(blocks) + ask
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", source], cwd=folder.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    ids, scores = json.loads(done.stdout)
    live = recommender.recommend(histories, k=K, beam_size=BEAM)
    assert ids == live.item_ids
    np.testing.assert_allclose(scores, live.scores, atol=1e-5)


@pytest.mark.parametrize("leaves_out", [True, False])
def test_the_documented_lines_leave_out_what_the_program_does_not_read(leaves_out):
    """The program answers with the first item of a history of which it reads the last two."""
    answer = np.tile(np.array([4, 0, 3, -1], np.int32), (2, 1)), np.tile([-1, -2, -3, -np.inf], (2, 1))
    settings = {"max_history": 2, "leaves_out_history": leaves_out, "inputs": {}}
    names = {"np": np, "item_ids": IDS, "settings": settings, "arrays": {}, "program": lambda *_: answer}
    exec(USE, names)
    ids, scores = names["recommend"]([["i0", "i1", "i2"], []])
    assert ids == [["i4", "i3"] if leaves_out else ["i4", "i0", "i3"], ["i4", "i0", "i3"]]
    np.testing.assert_array_equal(scores[0], [-1, -3, -np.inf, -np.inf] if leaves_out else answer[1][0])


@pytest.mark.parametrize("name", ["program.stablehlo", "arrays.safetensors", "item_ids.parquet", "program.json"])
def test_the_documented_lines_refuse_a_damaged_file(codes, tmp_path, monkeypatch, name):
    shutil.copytree(codes[1], tmp_path / "program")
    content = (tmp_path / "program" / name).read_bytes()
    (tmp_path / "program" / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"program/{name} is not what was written"):
        exec(LOADER, {})


@pytest.mark.parametrize("manifest", [b"{", b"\xff", b"[]", b"{}", b'{"files": 1}', b'{"files": "ab"}'])
def test_the_documented_lines_name_a_manifest_that_is_none(tmp_path, monkeypatch, manifest):
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "manifest.json").write_bytes(manifest)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^program/manifest\.json is not what was written; export the program again"):
        exec(LOADER, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "expected k and beam_size of at least 1, got 0 and 50"),
        ({"beam_size": 0}, "got 10 and 0"),
        ({"platforms": ()}, r"expected one or more platforms of cpu, cuda, rocm, tpu, got \[\]"),
        ({"platforms": ("cpu", "gpu")}, r"expected one or more .* got \['cpu', 'gpu'\]"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(codes, tmp_path, options, message):
    with pytest.raises(SemidError, match=message):
        export_program(codes[0], tmp_path / "program", **options)
    assert list(tmp_path.iterdir()) == []


def test_without_flatbuffers_it_says_what_to_install(codes, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SemidError, match=r"pip install .semid\[stablehlo\]"):
        export_program(codes[0], tmp_path / "program")
    assert list(tmp_path.iterdir()) == []
