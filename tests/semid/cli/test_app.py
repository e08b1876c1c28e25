"""The frame of all commands: how they end, how much they say, what they understand."""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest
from rich.table import Table

from semid import __version__, artifacts
from semid.caches import remove_oldest
from semid.catalog import CATALOG_FILE, SemanticCatalog
from semid.cli import app, log_lines, main
from semid.cli.cache import use_compilation_cache
from semid.cli.console import console
from semid.cli.options import as_typed
from semid.cli.recommend import Recommend, _events
from semid.cli.train import Train
from semid.data import GlobalTime, HeldOutItems
from semid.errors import SemidError
from semid.progress import show_progress
from semid.recommender import Recommendations, Recommender
from semid.tokenizers import RQKmeansConfig
from semid.training import SINKS
from seq_models import DenseConfig

RECOMMEND = "recommend --model m --history i1"
TRAIN = "train --dataset d --catalog c --out o"


def _ending(monkeypatch, capsys, action, line=RECOMMEND, command=Recommend):
    """Exit status and stderr of a command that does this."""
    monkeypatch.setattr(command, "run", lambda self: action())
    with pytest.raises(SystemExit) as exit:
        main(line.split())
    return exit.value.code, capsys.readouterr().err


def _raising(error):
    def action():
        raise error

    return action


def test_tables_have_ids_and_codes_whole_where_nothing_is_as_wide(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    table = Table("rank", "item id", "codes", title="two")
    ids = [f"01000000-0000-0000-0000-00000000000{last}" for last in (1, 2)]
    for item_id in ids:
        table.add_row("1", item_id, "<a_201><b_11><c_255><d_17>")
    console.print(table)
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines() if "0000" in line]
    assert [(line[3], line[5]) for line in lines] == [(item_id, "<a_201><b_11><c_255><d_17>") for item_id in ids]
    assert "\u2026" not in printed


@pytest.fixture(autouse=True)
def _heeds_ctrl_c():
    """Tests that run in a shell's background inherit that SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "status", "what"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_is_one_line_that_says_what_comes_next(monkeypatch, capsys, number, status, what):
    before = signal.getsignal(number)
    code, error = _ending(monkeypatch, capsys, lambda: signal.raise_signal(number))
    assert (code, error) == (status, f"semid: recommend {what}; the same command starts again\n")
    code, error = _ending(monkeypatch, capsys, lambda: signal.raise_signal(number), TRAIN, Train)
    assert (code, error) == (
        status,
        f"semid: train {what}; the same command goes on from what is finished and the last checkpoint, if there is"
        " any\n",
    )
    assert signal.getsignal(number) is before


def test_a_signal_that_a_library_answers_with_an_error_of_its_own(monkeypatch, capsys):
    def wrapped():
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException as error:
            raise RuntimeError("callback failed") from error

    assert _ending(monkeypatch, capsys, wrapped)[0] == 130


def test_a_signal_while_jax_is_imported():
    """In a process of its own: the import of jax sends the signal, as one that comes from outside would."""
    code = (
        "import os, signal, sys\n"
        "class Sender:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'jax': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Sender())\n"
        "from semid.cli import main\n"
        "main(['recommend', '--model', 'm', '--history', 'i1'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "semid: recommend interrupted; the same command starts again\n")


def test_an_error_is_one_line_and_a_traceback_on_request(monkeypatch, capsys):
    code, error = _ending(monkeypatch, capsys, _raising(SemidError("x: no such thing")))
    assert (code, error) == (1, "semid: x: no such thing\n")
    for line in (f"--debug {RECOMMEND}", f"{RECOMMEND} --debug"):
        code, error = _ending(monkeypatch, capsys, _raising(SemidError("x: no such thing")), line)
        assert (code, error.startswith("Traceback")) == (1, True)
        assert error.endswith("\nsemid: x: no such thing\n")


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "MemoryError"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no 9 bytes\nof HBM"), "RESOURCE_EXHAUSTED: no 9 bytes"),
    ],
)
def test_a_lack_of_memory_is_no_fault_and_says_what_to_make_smaller(monkeypatch, capsys, error, what):
    code, line = _ending(monkeypatch, capsys, _raising(error), TRAIN, Train)
    advice = "train with a smaller --batch-size or more --accumulate, search with a smaller --beam-size"
    assert (code, line) == (1, f"semid: out of memory ({what}); {advice}\n")


def test_an_error_that_nobody_foresaw_is_one_line_and_keeps_its_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, error = _ending(monkeypatch, capsys, _raising(KeyError("codes")))
    (kept,) = tmp_path.glob("semid-*.log")
    assert code == 1
    assert error == (
        f"semid: KeyError: 'codes' (unexpected; please report it with its traceback, {kept}; --debug prints it)\n"
    )
    assert kept.read_text().startswith("Traceback")


def _say():
    logger = logging.getLogger("semid.training")
    logger.debug("compiling")
    logger.info("step 1")
    warnings.simplefilter("always")  # the tests' own filter makes errors of them
    warnings.warn("three words", stacklevel=1)
    print("result")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("", ["step 1", "semid: three words"]),
        ("--quiet", ["semid: three words"]),
        ("--verbose", ["compiling", "step 1", "semid: three words"]),
        ("--debug", ["compiling", "step 1", "semid: three words"]),
    ],
)
def test_log_records_and_warnings_are_plain_lines_on_stderr(monkeypatch, capsys, option, said):
    monkeypatch.setattr(Recommend, "run", lambda self: _say())
    before = logging.getLogger("semid").handlers[:]
    main(f"{RECOMMEND} {option}".split())
    printed = capsys.readouterr()
    assert printed.err.splitlines() == said
    assert printed.out == "result\n"
    assert logging.getLogger("semid").handlers == before


def test_a_script_shows_progress_as_commands_do(capsys):
    for show, lines in ((contextlib.nullcontext, []), (log_lines, ["arms: 1/2 runs", "arms: 2/2 runs"])):
        with show(), show_progress("arms", total=2, unit="runs") as progress:
            progress.advance(1)
            progress.advance(2)
        assert [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()] == lines


def test_without_words_the_commands_are_listed(capsys):
    with pytest.raises(SystemExit) as exit:
        main([])
    printed = capsys.readouterr().out
    assert exit.value.code == 0
    assert [name for name in app.COMMANDS if f" {name} " not in printed] == []


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "semid", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{__version__}\n"


def test_a_choice_is_named_as_an_option_or_as_a_word():
    """Its options follow the word, or stand anywhere next to the option."""
    dense = DenseConfig().backbone
    for line in (
        "--model sasrec --model.dim 32",
        "sasrec --model.dim=32",
        "--model=sasrec --dim 32",
    ):
        model = app.parse(f"{TRAIN} {line}".split()).config.model
        assert (type(model), model.backbone.dim, model.backbone.layers) == (DenseConfig, 32, dense.layers)
    assert app.parse(f"train --model.dim 32 {TRAIN[6:]}".split()).config.model.backbone.dim == 32
    for line in ("--method rq-kmeans --method.level-sizes 4 4", "rq-kmeans --level-sizes 4 4"):
        method = app.parse(f"tokenize {line} --dataset d --out o".split()).config.method
        assert (type(method), method.level_sizes) == (RQKmeansConfig, (4, 4))
    for line in ("--split-rule global-time --split-rule.test 0.95 --out d", "--out d global-time --test 0.95"):
        assert app.parse(f"prepare simulated {line}".split()).source.split_rule == GlobalTime(test=0.95)
    assert as_typed("evaluate", ["--model", "m"]) == ["--model", "m"]  # an option like others there


def _helps(capsys, *words):
    """The help of these words and of every choice of subcommands after them, all options of the choice included."""
    with pytest.raises(SystemExit) as exit:
        app.parse([*words, "--help"])
    assert exit.value.code == 0
    yield words, (text := capsys.readouterr().out)
    usage = " ".join(text.partition("\n\n")[0].split())
    if choice := re.search(r"\{([^{}]+)\}\]?$", usage):
        for name in choice[1].split(","):
            yield from _helps(capsys, *words, name)


def test_options_of_every_choice_of_subcommands_have_names_of_their_own(capsys, monkeypatch):
    """Help builds the whole parser of the subcommands that are named."""
    monkeypatch.setenv("COLUMNS", "120")  # one column: text next to an option is its own
    helps = {words: text for name in app.COMMANDS for words, text in _helps(capsys, name)}
    for words, text in helps.items():
        options = re.findall(r"(?<=│ )--[\w.-]+|(?<=│ -k, )--[\w.-]+", text)
        assert sorted(set(options)) == sorted(options), words
    assert {("prepare", "simulated", "held-out-items"), ("tokenize", "rq-vae", "sinkhorn")} <= set(helps)
    assert "--split-seed" in helps["prepare", "simulated", "held-out-items"]  # the expression finds what is there
    empty = re.compile(r"--[\w.-]+ [A-Z|]+[\s│]+\((?:default|required).*")
    assert {words: found for words, text in helps.items() if (found := empty.findall(text))} == {}
    assert len(empty.findall("--epochs INT   (default: 10)\n--dim INT  │\n│  (default: 8)")) == 2  # control
    assert [words for words, text in helps.items() if re.search(r"[A-Z]\w+Config\b", text)] == []


def test_helps_are_broken_into_lines_by_the_width_of_the_terminal_alone(capsys, monkeypatch):
    """Not where the source breaks them: a line that ends early reads as the end of a sentence."""
    monkeypatch.setenv("COLUMNS", "160")
    ((_, text),) = _helps(capsys, "export")
    assert "None given: code tokens alone, with <pad>" in text  # the source breaks it after "tokens"
    with pytest.raises(SystemExit):
        app.parse(["--help"])
    assert "\n`semid COMMAND --help` explains" in capsys.readouterr().out


def test_a_simulated_world_and_the_draw_of_its_held_out_items_have_a_seed_each():
    for line in ("--split-rule held-out-items --split-rule.seed=3 --seed 5", "--seed 5 held-out-items --split-seed 3"):
        source = app.parse(f"prepare simulated --out d {line}".split()).source
        assert (source.seed, source.split_rule) == (5, HeldOutItems(seed=3))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{TRAIN} --batch-size 0", "semid train: --batch-size 0: expected batch_size of at least 1, got 0\n"),
        (f"{TRAIN} --model.dim 7", "semid train: --model.dim 7: dim 7 must divide into 2 heads"),
        ("tokenize --dataset d --out o --decay=1.5", "semid tokenize: --decay 1.5: expected decay in [0, 1)"),
        ("tokenize --dataset d --out o rq-vae --level-sizes 4 0", "semid tokenize: --level-sizes 4 0: expected lev"),
        (
            "prepare csv --items i.csv --interactions j.csv --out o --columns item_id",
            "semid prepare: --columns item_id: expected columns as NAME=COLUMN, such as item_id=asin, got 'item_id'\n",
        ),
        (
            "prepare csv --items i.csv --interactions j.csv --out o --vectors a x.npy b y.npy a z.npy",
            "semid prepare: expected every name once, got 'a' twice; keep one\n",
        ),
        (f"{TRAIN} --lr 0.1", "semid train: --lr is called --learning-rate here\n"),
        ("tokenise --dataset d", "semid: no command 'tokenise'; did you mean tokenize?\n"),
        ("xyz", "semid: no command 'xyz'; semid --help lists them\n"),
    ],
)
def test_what_does_not_fit_is_said_by_its_option(capsys, line, said):
    with pytest.raises(SystemExit) as exit:
        main(line.split())
    assert exit.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "tokenize --dataset d --out o --columns text --columns image",
        "prepare simulated --out o --num-items 80 --num_items=90",
        f"{TRAIN} --model.dim 64 --dim 128",
    ],
)
def test_an_option_given_twice_is_refused_as_the_parser_would_drop_the_first(capsys, line):
    with pytest.raises(SystemExit):
        main(line.split())
    assert " is given 2 times; give it once, with all of its values" in capsys.readouterr().err


class _Asked(Recommender):
    """A recommender that keeps what it is asked, and has no answer."""

    catalog = SemanticCatalog(pa.array(["a", "b", "c=d"]), np.array([[0], [1], [2]], np.int32), (3,))

    def __init__(self):
        pass

    def recommend(self, histories, *, boosts, graph_weight, **options):
        self.boosts, self.graph_weight = boosts, graph_weight
        return Recommendations([[]], np.zeros((1, 0), np.float32))


def test_a_demo_of_no_epochs_is_refused_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(app, "run", lambda name, command: command.run() if name == "demo" else pytest.fail(name))
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path / "demo"), "--epochs", "-1"])
    assert capsys.readouterr().err == "semid: expected epochs above 0, got -1.0\n"


def test_the_weight_of_the_graph_is_an_option(monkeypatch):
    asked = _Asked()
    monkeypatch.setattr(Recommender, "from_pretrained", lambda *_, **__: asked)
    for option, weight in (("--graph-weight 0.25", 0.25), ("--graph-weight 0", 0.0), ("", None)):
        main(f"recommend --model m --history a {option}".split())
        assert asked.graph_weight == weight


def test_boosts_are_options_or_a_table_and_the_option_counts_more(monkeypatch, capsys, tmp_path):
    asked = _Asked()
    monkeypatch.setattr(Recommender, "from_pretrained", lambda *_, **__: asked)
    (table := tmp_path / "boosts.csv").write_text("item_id,boost,why\na,2,new\nb,0.5,old\n")
    line = "recommend --model m --history a"
    for options, boosts in (
        ("--boost c=d=1.5 b=0", {"c=d": 1.5, "b": 0.0}),
        (f"--boosts {table}", {"a": 2.0, "b": 0.5}),
        (f"--boosts {table} --boost b=3", {"a": 2.0, "b": 3.0}),
        ("", {}),
    ):
        main(f"{line} {options}".split())
        assert asked.boosts == boosts
    for content, options, said in (
        ("", "--boost a", "--boost a: expected ID=FACTOR, a finite number of 0 or more after the =, such as i1=1.5"),
        ("", "--boost a=-1", "--boost a=-1: expected ID=FACTOR"),
        ("", "--boost a=nan", "--boost a=nan: expected ID=FACTOR"),
        ("", "--boost a=1 a=2", "--boost a=2: a is given already (1.0); give it once"),
        ("item_id,boost\na,x\n", "--boosts {t}", "{t}: column 'boost': expected numbers, got string"),
        ("item_id,boost\na,1\nb,\n", "--boosts {t}", "{t}: row 2, column 'boost': expected a finite number of 0"),
        ("item_id,boost\na,1\na,2\n", "--boosts {t}", "{t}: row 2, column 'item_id': 'a' is given twice"),
        ("item_id,weight\na,1\n", "--boosts {t}", "{t}: column 'boost': missing; found item_id, weight; rename one"),
        ("", "--boost zz=0", "--boost: item id 'zz'"),
        ("item_id,boost\nzz,1\n", "--boosts {t}", "{t}: item id 'zz'"),
    ):
        table.write_text(content)
        with pytest.raises(SystemExit):
            main(f"{line} {options.format(t=table)}".split())
        assert said.format(t=table) in capsys.readouterr().err
    main(f"{line} --boosts {table} --boost zz=0 --skip-unknown".split())
    said = capsys.readouterr().out
    assert all(f"dropped 1 unknown of 1 items of {of}" in said.replace("\n", "") for of in (table, "--boost"))


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("click, ,buy", ["click", None, "buy"]),
        ("click,", ["click", None]),
        ('["a,b", null, "", 3]', ["a,b", None, None, "3"]),
        (" ", []),
    ],
)
def test_an_event_that_is_left_empty_is_unknown(text, events):
    assert _events(text) == events


@pytest.mark.parametrize("text", ["[click]", "[[1]]", "[true]"])
def test_what_is_no_list_of_events_is_said_by_the_option(text):
    with pytest.raises(SemidError, match=rf"^--events: expected events, .* got {re.escape(repr(text))} "):
        _events(text)


def test_compiled_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    folder = tmp_path / "cache" / "semid" / "xla"
    for name in ("SEMID_CACHE", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    use_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("name", "value", "used"),
    [
        ("SEMID_CACHE", "off", None),
        ("JAX_COMPILATION_CACHE_DIR", "mine", "mine"),
        ("XDG_CACHE_HOME", "/dev/null", None),
    ],
)
def test_the_cache_is_switched_off_moved_or_left_where_it_cannot_be_written(monkeypatch, tmp_path, name, value, used):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv(name, value)
    use_compilation_cache()
    assert os.environ.get("JAX_COMPILATION_CACHE_DIR") == used
    assert list(tmp_path.iterdir()) == []


def test_the_cache_loses_what_was_not_read_for_longest(tmp_path):
    for age, name in enumerate("abc"):
        (tmp_path / name).write_bytes(b"123")
        os.utime(tmp_path / name, (100 - age, 1))
    remove_oldest(tmp_path, limit=9)
    assert len(list(tmp_path.iterdir())) == 3
    remove_oldest(tmp_path, limit=5)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_cache_may_lose_files_to_another_process_meanwhile(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_bytes(b"123")
    monkeypatch.setattr(Path, "rglob", lambda self, _: [tmp_path / "gone", tmp_path / "a", tmp_path / "b"])
    remove_oldest(tmp_path, limit=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["--version", "train --help", "catalog history --catalog {catalog}"])
def test_output_that_nobody_reads_to_its_end_is_no_error(words, tmp_path):
    catalog = SemanticCatalog(pa.array(["a", "b"]), np.array([[0], [1]], np.int32), (2,))
    with artifacts.write_artifact(tmp_path / "c", kind="catalog", config={}) as folder:
        catalog.write(folder / CATALOG_FILE)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "semid", *words.format(catalog=tmp_path / "c").split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_broken_pipe_elsewhere_is_an_error(monkeypatch, capfd):
    code, error = _ending(monkeypatch, capfd, _raising(BrokenPipeError(32, "Broken pipe")))
    assert (code, error) == (1, "semid: [Errno 32] Broken pipe\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --track mlfow --dataset d", "got mlfow; did you mean mlflow?"),
        ("train --dataset d --track", "expected some of tensorboard, wandb, mlflow, got none"),
        ("evaluate --track wandb", "--track: expected after the name of a command that trains (demo, "),
        ("evaluate --track=wandb", "--track: expected after the name of a command that trains"),
        ("--track wandb train --dataset d", "--track: expected after the name of a command that trains"),
        ("train --track=", "expected some of tensorboard, wandb, mlflow, got none"),
    ],
)
def test_trackers_are_named_after_commands_that_train(capsys, line, message):
    with pytest.raises(SystemExit):
        main(line.split())
    assert message in capsys.readouterr().err
    for words in (["--track", "wandb"], ["--track=wandb"]):
        assert app.trackers_of(["train", *words, "tensorboard", "sasrec", "-k", "3"]) == (
            ["wandb", "tensorboard"],
            ["train", "sasrec", "-k", "3"],
        )
    assert tuple(SINKS) == app.TRACKERS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --profile --dataset d", "--profile: expected a folder, got --dataset"),
        ("train --dataset d --profile", "--profile: expected a folder, got none"),
        ("train --profile= --dataset d", "--profile: expected a folder, got none"),
        ("evaluate --profile x", "--profile: expected after the name of a command that trains (demo, "),
        ("evaluate --profile=x", "--profile: expected after the name of a command that trains"),
    ],
)
def test_a_profile_has_a_folder_and_is_of_a_command_that_trains(capsys, line, message):
    with pytest.raises(SystemExit):
        main(line.split())
    assert message in capsys.readouterr().err
    assert app.profile_of(["train", "--profile", "x", "-k", "3"]) == ("x", ["train", "-k", "3"])
    assert app.profile_of(["train", "--profile=x", "-k", "3"]) == ("x", ["train", "-k", "3"])
    assert app.profile_of(["evaluate", "-k", "3"]) == (None, ["evaluate", "-k", "3"])
