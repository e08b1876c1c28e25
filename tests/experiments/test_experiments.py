"""Experiments: names, folders, budgets, what is skipped and what refused; their pulse is in `test_smoke.py`."""

import dataclasses
import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import configs
from experiments.__main__ import main
from experiments.budgets import Budget, within
from experiments.command import Options, parsed, run_all
from experiments.data import WORLD, stored_dataset, world_of
from experiments.experiment import TEACHER, Experiment, TeacherVectors, chosen, experiments
from experiments.layout import read_layout
from experiments.measurement import measured
from experiments.runner import Runner, _settings, item_numbers
from semid.config import difference
from semid.data import Dataset, HeldOutItems, ShuffledTies, SourceOrder
from semid.data.simulated import SimulatedConfig
from semid.encoders import PretrainedImage, PretrainedText
from semid.errors import SemidError
from semid.generators import GeneratorConfig
from semid.training import TrainingConfig

SMOKE = {"budget": Budget.SMOKE, "ties": SourceOrder()}


def test_what_is_finished_is_skipped_and_test_is_read_once(tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level("INFO", "semid")
    options = Options(out=tmp_path / "run", **SMOKE)
    first = run_all(["popularity", "item-graph"], options, experiments())
    caplog.clear()
    monkeypatch.setattr("experiments.measurement.compare", lambda *_, **__: pytest.fail("measured again"))
    assert run_all(["popularity", "item-graph"], options, experiments()) == first
    assert caplog.text.count("skipped") == 2  # the dataset and the graph
    assert not any("users" in result for result in first)  # each has one target
    assert "item-graph, test, seen items included: R@5 ." in capsys.readouterr().out
    changed = dict(experiments()) | {"popularity": dataclasses.replace(experiments()["popularity"], beam_size=9)}
    options = dataclasses.replace(options, budget=Budget.FULL, seeds=(0,))
    with pytest.raises(SemidError, match=r"dataset_0: in use by a dataset of other settings \(num_interactions|"):
        run_all(["popularity"], options, changed)
    again = Runner(changed, Dataset.load(tmp_path / "run" / "dataset_0"), tmp_path / "run", seed=0)
    when = re.escape(first[0]["provenance"]["measured"])
    with pytest.raises(SemidError, match=rf"test was read on {when} by another request \(beam_size: 10 -> 9\), and is"):
        measured(again.run("popularity"), again.data, budget="full")


def test_results_say_whose_an_example_is_where_users_have_several(layout, tmp_path):
    read_layout(layout, split_rule=HeldOutItems(fraction=0.4)).save(tmp_path / "dataset")
    (result,) = run_all(["popularity"], Options(tmp_path / "dataset", tmp_path / "run", **SMOKE), experiments())
    users = Dataset.load(tmp_path / "dataset").splits.test.histories.users
    assert result["users"] == users.tolist()
    assert len(set(result["users"])) < len(users) == len(result["rows"]["popularity"]["recall@10"])


def test_another_dataset_or_other_settings_in_the_same_folder_are_refused(layout, tmp_path):
    options = Options(layout, tmp_path / "run", **SMOKE)
    run_all(["item-graph"], options, experiments())
    changed = dict(experiments())
    graph = changed["item-graph"]
    changed["item-graph"] = dataclasses.replace(graph, model=dataclasses.replace(graph.model, decay=0.5))
    with pytest.raises(SemidError, match=r"in use by a graph of other settings \(graph.decay: 0.65 -> 0.5"):
        run_all(["item-graph"], options, changed)
    other = shutil.copytree(layout, tmp_path / "other" / layout.name)
    table = pq.read_table(other / "interactions.parquet")
    pq.write_table(table.slice(0, 120), other / "interactions.parquet")
    with pytest.raises(SemidError, match=r"in use by a dataset of other settings \(source.sha256.interactions.parquet"):
        run_all(["item-graph"], dataclasses.replace(options, dataset=other), experiments())


def test_datasets_of_two_tie_rules_do_not_meet(layout, tmp_path):
    def stored(source, name, ties=SourceOrder()):
        return stored_dataset(source, tmp_path / name, world=SimulatedConfig(images=False), ties=ties)

    path = layout / "interactions.parquet"
    pq.write_table(pq.read_table(path).append_column("rel_time", [[0] * 240]), path)
    plain, shuffled = stored(layout, "plain"), stored(layout, "shuffled", ShuffledTies(2))
    assert sorted(plain.item.tolist()) == sorted(shuffled.item.tolist())
    assert plain.digest != shuffled.digest
    with pytest.raises(SemidError, match=r"plain: in use by a dataset of other settings \(ties: None -> "):
        stored(layout, "plain", ShuffledTies(2))
    prepared = tmp_path / "shuffled"
    assert stored(prepared, "copy").ties == stored(prepared, "copy", ShuffledTies(2)).ties == ShuffledTies(2)
    with pytest.raises(SemidError, match="shuffled: ties are shuffled by seed 2; prepare it with --ties"):
        stored(prepared, "other", ShuffledTies(3))
    with pytest.raises(SemidError, match="simulated: ties are in source order; prepare it with --ties"):
        stored(None, "world", ShuffledTies())


def test_results_are_named_after_dataset_ties_and_budget(layout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Options().folder == tmp_path / "runs" / "simulated"
    assert Options(layout).folder == tmp_path / "runs" / "tiny"
    assert Options(layout, ties=ShuffledTies(2)).folder.name == "tiny_shuffled_by_seed_2"
    assert Options(layout, budget=Budget.CPU).folder.name == "tiny_cpu"
    assert Options(layout, tmp_path / "else").folder == tmp_path / "else"


def test_any_field_of_a_config_is_an_option_and_none_changes_by_itself(monkeypatch):
    monkeypatch.delattr(TrainingConfig, "__tyro_markers__", raising=False)  # set where `semid tokenize` was imported
    for name, experiment in experiments().items():
        assert parsed(name, experiment, []) == (Options(), experiment)
    words = ["--seeds", "0", "1", "--budget", "cpu", "--model.training.batch-size", "8", "--teacher", "None"]
    options, tiger = parsed("tiger", experiments()["tiger"], [*words, "--tokenizer.method.latent", "16"])
    assert (options.seeds, options.budget) == ((0, 1), Budget.CPU)
    assert (tiger.model.training.batch_size, tiger.tokenizer.method.latent, tiger.teacher) == (8, 16, None)
    words = ["--model.joint.0.step.objective.contrast.value", "0.1"]
    assert (
        parsed("x", experiments()["end-to-end.together"], words)[1].model.joint[0].step.objective.contrast.value == 0.1
    )


def test_the_cpu_budget_is_a_share_of_all_epochs(tmp_path):
    data = stored_dataset(None, tmp_path / "dataset", world=world_of(0, small=True), ties=SourceOrder())
    cpu, full = (Runner(experiments(), data, tmp_path, seed=0, budget=budget) for budget in (Budget.CPU, Budget.FULL))
    assert full.resolved("tiger").model.training.epochs == 390
    assert cpu.resolved("tiger").model.training.epochs == pytest.approx(6)
    assert cpu.resolved("tiger").tokenizer.method.training.epochs == pytest.approx(3000 * 6 / 390)
    tiny = within(experiments()["mscgrec.both-text"], Budget.SMOKE, interactions=100)
    assert max(max(one.method.level_sizes) for one in tiny.sequences.values()) == max(tiny.tokenizer.method.level_sizes)
    assert cpu.resolved("recipe.semid-hybrid") == full.resolved("recipe.semid-hybrid")


def test_what_the_dataset_lacks_is_said_before_any_experiment_is_trained(layout, tmp_path, monkeypatch):
    (layout / "text_minilm_f16.npy").unlink()
    monkeypatch.setattr(Runner, "_train", lambda *_: pytest.fail("trained"))
    for names, message in (
        (["popularity", "content-knn"], "dataset 'tiny' has no vector columns, which is all that content kNN reads"),
        (["popularity", "pictures.image"], "dataset 'tiny' has no pictures, which is all that this experiment"),
        (["popularity", "tiger"], "dataset 'tiny' has no vector columns to tokenize; add one"),
        (["popularity", "etegrec"], "dataset 'tiny' has no vector columns for an end-to-end model to read"),
        (["popularity", "oracle"], "dataset 'tiny' has no oracle: only simulated ones have it"),
    ):
        with pytest.raises(SemidError, match=message):
            run_all(names, Options(layout, tmp_path / "run"), experiments())
    data = read_layout(layout)
    Runner(experiments(), data, tmp_path, seed=0).check("end-to-end.together")
    bare = dataclasses.replace(data, items=data.items.select(["item_id"]))
    with pytest.raises(SemidError, match="dataset 'tiny' has no texts, which this experiment reads"):
        Runner(experiments(), bare, tmp_path, seed=0).check("end-to-end.together")


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ({"distilled.sasrec": "nosuch"}, "distilled.sasrec needs 'nosuch', which is no experiment; did you mean '"),
        ({"distilled.sasrec": "recipe"}, "needs 'recipe', which is no experiment; did you mean 'recipe.semid-text'"),
        ({"distilled.sasrec": "distilled.sasrec"}, "^distilled.sasrec needs distilled.sasrec; name another teacher"),
        ({"distilled.sasrec": "sasrec", "sasrec": "distilled.sasrec"}, "^distilled.sasrec needs sasrec needs dist"),
    ],
)
def test_a_need_that_is_no_experiment_or_needs_itself_is_said_before_any_is_trained(
    teachers, message, layout, tmp_path
):
    known = dict(experiments())
    known |= {name: dataclasses.replace(known[name], teacher=teacher) for name, teacher in teachers.items()}
    with pytest.raises(SemidError, match=message):
        Runner(known, read_layout(layout), tmp_path, seed=0).check("distilled.sasrec")


def test_the_minutes_of_a_warm_up_are_those_of_every_run_that_reads_it(layout, tmp_path):
    runner, shared = Runner(experiments(), read_layout(layout), tmp_path, seed=0), tmp_path / "shared" / "warm-up"

    def train(warm_up, *, minutes, others):
        """A run that began so long ago, its warm-up's last checkpoint written just now if it trained one."""
        started, now = time.time() - 60 * (minutes + others), time.time()
        if warm_up:
            (shared / "generator" / "7").mkdir(parents=True)
            os.utime(shared / "generator" / "7", (0, now - 60 * others))
        with pytest.MonkeyPatch.context() as patch:
            times = iter([started, now])
            patch.setattr("experiments.runner.time", SimpleNamespace(time=lambda: next(times)))
            (tmp_path / "run").mkdir(exist_ok=True)
            runner._stage("model", tmp_path / "run" / f"model_{minutes}", lambda: None, warm_up=shared)
        return {role: made["minutes"] for role, made in runner._made.items()}

    assert train(True, minutes=5, others=3) == pytest.approx({"warm-up": 5, "model": 3})
    (shared / "generator" / "history.jsonl").touch()  # as whoever reads it does
    assert train(False, minutes=0, others=2) == pytest.approx({"warm-up": 5, "model": 2})
    shared.with_name("warm-up.made.json").unlink()  # made before minutes of warm-ups were kept
    assert train(False, minutes=1, others=1)["warm-up"] is None


def test_each_tokenization_of_a_run_is_a_stage_of_its_own(layout, tmp_path, monkeypatch):
    data = stored_dataset(layout, tmp_path / "dataset", world=SimulatedConfig(images=False), ties=SourceOrder())
    runner, roles = Runner(experiments(), data, tmp_path, seed=0), []
    monkeypatch.setattr(runner, "_taught", lambda experiment: data)
    monkeypatch.setattr(runner, "_stage", lambda role, out, work: roles.append(role))
    experiment = dataclasses.replace(experiments()["mscgrec.both-text"], graph=None)
    runner._generator(experiment, experiment.model, tmp_path / "model")
    assert roles == ["codes", "codes of behavior", "model"]


def test_items_without_a_picture_have_no_codes_of_pictures_to_read(tmp_path, monkeypatch):
    data = stored_dataset(None, tmp_path / "dataset", world=world_of(0, small=True), ties=SourceOrder())
    images = pa.array([None, *data.items["image"].to_pylist()[1:]], pa.binary())
    items = data.items.set_column(data.items.column_names.index("image"), "image", images)
    runner = Runner(experiments(), dataclasses.replace(data, items=items), tmp_path, seed=0)
    monkeypatch.setattr(runner, "_codes", lambda *_: item_numbers(data))
    monkeypatch.setattr(runner, "_with_columns", lambda *_: data)
    monkeypatch.setattr("experiments.runner.train", lambda *_, sequences, **__: sequences)
    monkeypatch.setattr(runner, "_stage", lambda role, out, work: work())
    experiment = dataclasses.replace(runner.resolved("pictures.three-behavior"), graph=None)
    read = runner._generator(experiment, experiment.model, tmp_path / "model")
    assert read["text"].item_ids.equals(data.item_ids)
    assert read["image"].item_ids.equals(data.item_ids[1:])


def test_weights_are_of_texts_or_where_these_alone_are_read_of_pictures(tmp_path):
    data = stored_dataset(None, tmp_path / "dataset", world=world_of(0, small=True), ties=SourceOrder())

    def sources(name):
        given = {name: dataclasses.replace(experiments()[name], weights="here")}
        return Runner(given, data, tmp_path, seed=0).resolved(name).encoders.sources

    assert sources("pictures.encoder") == {"image": PretrainedImage("here")}
    assert sources("end-to-end.together")["text"] == PretrainedText("here")
    tuned = experiments()["tuned.low-rank"].encoders.text
    assert sources("tuned.low-rank")["text"] == dataclasses.replace(tuned, folder="here")
    with pytest.raises(SemidError, match="frozen encoder: it reads vectors, no weights of an encoder; leave --weights"):
        sources("encoders.frozen")


def test_a_folder_of_weights_is_told_by_its_name_by_what_reads_it(tmp_path):
    known = {name: dataclasses.replace(experiments()[name], weights="models/bert") for name in ("popularity", "lemur")}
    data = stored_dataset(None, tmp_path / "dataset", world=world_of(0, small=True), ties=SourceOrder())
    assert Runner(known, data, tmp_path, seed=0).run("popularity").changed == ""
    assert difference(_settings(experiments()["lemur"]), _settings(known["lemur"])) == "weights: None -> 'bert'"


def test_arms_read_what_their_names_say():
    arms = {name.partition(".")[2]: experiments()[name] for name in chosen(["alignment"])}
    content = {name: arm.tokenizer.columns for name, arm in arms.items() if arm.tokenizer.columns}
    both = ("content", TEACHER)
    wide = {"concatenation": both, "joint": both, "collaborative": (TEACHER,)}
    assert {name: columns for name, columns in content.items() if columns != ("content",)} == wide
    aligned = {name for name, arm in arms.items() if arm.tokenizer.alignment}
    assert aligned == {"distill", "das", "joint", "letter", "random", "shuffled"}
    controls = {name: arm.vectors for name, arm in arms.items() if arm.vectors is not TeacherVectors.OWN}
    assert controls == {"random": TeacherVectors.NOISE, "shuffled": TeacherVectors.SHUFFLED}


def test_end_to_end_variants_have_as_many_epochs():
    given = {
        name: one.model.finetune.epochs
        + sum(phase.training.epochs for phase in one.model.joint)
        + bool(one.model.codes.refits and one.model.joint) * one.model.generator.training.epochs
        for name, one in experiments().items()
        if name.startswith(("end-to-end.", "encoders."))
    }
    assert len(given) == 11
    assert {name.partition(".")[0]: epochs for name, epochs in given.items()} == {"encoders": 24, "end-to-end": 42}
    assert len(set(given.values())) == 2


def test_a_name_of_a_file_stands_for_its_variants_and_a_wrong_one_is_answered():
    assert chosen(["recipe"]) == ["recipe.sasrec-text", "recipe.semid-text", "recipe.semid-hybrid"]
    assert chosen(["recipe.semid-text", "item-graph", "recipe.semid-text"]) == ["recipe.semid-text", "item-graph"]
    with pytest.raises(SemidError, match=r"no experiment 'recipes'; did you mean recipe\?"):
        chosen(["recipes"])


def test_every_experiment_says_what_it_needs_and_how_to_run_it():
    for name, experiment in experiments().items():
        assert isinstance(experiment, Experiment)
        assert all(need in experiments() for need in experiment.needs), name
        taught = isinstance(experiment.model, GeneratorConfig) and experiment.model.objective.distillation
        assert not taught or experiment.teacher, name
    for file in sorted(Path(configs.__file__).parent.glob("[a-z]*.py")):
        lines = file.read_text().splitlines()
        assert 10 <= len(lines) <= 125, file
        stem = file.stem.replace("_", "-")
        assert any(line.startswith(f"    python -m experiments {stem}") or f" {stem} " in line for line in lines), file


def test_the_command_line(tmp_path, capsys):
    main(["list"])
    listed = capsys.readouterr().out
    assert all(f"\n{name} " in listed or f"\n{name}\n" in listed for name in experiments())
    main([])
    assert "python -m experiments list" in capsys.readouterr().out
    main(["bigram", "--budget", "smoke", "--out", str(tmp_path), "--quiet"])
    shown = capsys.readouterr().out
    assert "bigram, test, seen items included: R@5 ." in shown
    assert "seen items excluded" not in shown  # nothing repeats, so that the history is left out
    with pytest.raises(SystemExit):
        main(["table", str(tmp_path / "nothing")])
    assert "no results of experiments" in capsys.readouterr().err
    main(["table", str(tmp_path), "--json", str(tmp_path / "rows.json")])
    assert "| item bigram (budget smoke) |" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["experiment"] == "bigram"
    assert WORLD.num_items == 1000
