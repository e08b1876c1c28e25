import abc
import dataclasses
import enum
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from semid.config import check_range, choices, difference, from_dict, to_dict
from semid.errors import SemidError
from seq_models import Remat, TransformerConfig


class Pooling(enum.Enum):
    MEAN = "mean"
    LAST = "last"


@dataclass(frozen=True)
class Adam:
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Sgd:
    rate: float
    momentum: float | None = None


@dataclass(frozen=True)
class Train:
    name: str
    optimizer: Adam | Sgd = Adam()
    epochs: int = 3
    widths: tuple[int, ...] = (8, 4)
    pooling: Pooling = Pooling.MEAN
    resume: bool = False
    source: dict = dataclasses.field(default_factory=dict)
    teacher: Adam | None = None
    stages: tuple[Adam | Sgd, ...] = ()
    extra: Any = None


@pytest.mark.parametrize(
    "config",
    [
        Train("a"),
        Train("a", Sgd(0.1, momentum=0.5), 7, (), Pooling.LAST, True, {"type": "x", "n": {"m": [1]}}, Adam(0.5)),
        Train("a", stages=(Sgd(1.0), Adam(2.0, (0.0, 1.0)), Sgd(3.0, 4.0)), extra=[1, "x", None]),
    ],
)
def test_round_trip_through_json(config):
    assert from_dict(Train, json.loads(json.dumps(to_dict(config)))) == config


def test_json_form_by_hand():
    assert to_dict(Train("a", Sgd(0.1), widths=(2,), pooling=Pooling.LAST)) == {
        "type": "Train",
        "name": "a",
        "optimizer": {"type": "Sgd", "rate": 0.1, "momentum": None},
        "epochs": 3,
        "widths": [2],
        "pooling": "last",
        "resume": False,
        "source": {},
        "teacher": None,
        "stages": [],
        "extra": None,
    }


def test_missing_keys_take_their_defaults_and_whole_floats_may_be_integers():
    assert from_dict(Train, {"name": "a", "optimizer": {"type": "Sgd", "rate": 1}}) == Train("a", Sgd(1.0))
    assert type(from_dict(Sgd, {"rate": 1}).rate) is float


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"epoch": 3}, "^run: unknown key 'epoch'; did you mean 'epochs'[?]$"),
        ({"pooled": 3}, "^run: unknown key 'pooled'; did you mean 'pooling'[?]$"),
        ({"optimizer": {"type": "Adam", "beta": []}}, "run.optimizer: unknown key 'beta'; did you mean 'betas'"),
        ({"optimizer": {"type": "Adamw"}}, "^run.optimizer.type: expected one of Adam, Sgd, got 'Adamw'$"),
        ({"optimizer": {"rate": 0.1}}, "run.optimizer.type: expected one of Adam, Sgd, got None"),
        ({"optimizer": {"type": "Sgd"}}, "run.optimizer: key 'rate' is missing"),
        ({"optimizer": {"type": "Adam", "betas": [0.5]}}, "run.optimizer.betas: expected 2 values, got 1"),
        ({"optimizer": {"type": "Adam", "betas": ["x", 1]}}, r"run.optimizer.betas\[0\]: expected float, got 'x'"),
        ({"optimizer": 3}, "run.optimizer: expected the keys of Adam, got 3"),
        ({"type": "Other"}, "run: expected type Train, got 'Other'"),
        ({"epochs": 3.5}, "run.epochs: expected int, got 3.5"),
        ({"epochs": True}, "run.epochs: expected int, got True"),
        ({"epochs": None}, "run.epochs: expected int, got None"),
        ({"resume": 1}, "run.resume: expected bool, got 1"),
        ({"name": None}, "run.name: expected str, got None"),
        ({"widths": 8}, "run.widths: expected a list, got 8"),
        ({"widths": [8, "x"]}, r"run.widths\[1\]: expected int, got 'x'"),
        ({"pooling": "max"}, "run.pooling: expected one of mean, last, got 'max'"),
        ({"stages": [{"type": "Sgd", "rate": "x"}]}, r"run.stages\[0\].rate: expected float, got 'x'"),
    ],
)
def test_faults_are_named_with_their_place(change, expected):
    good = to_dict(Train("a"))
    assert from_dict(Train, good, where="run") == Train("a")
    with pytest.raises(SemidError, match=expected) as caught:
        from_dict(Train, good | change, where="run")
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Rates:
    first: float = 36
    optional: float | None = 1
    pair: tuple[float, int] = (1, 2)
    many: tuple[float, ...] | None = (3,)
    either: int | float = 4
    count: int = 5
    flag: bool = True
    untyped: Any = 6


def test_a_float_given_as_an_integer_is_the_same_setting():
    whole = Rates(36.0, 1.0, (1.0, 2), (3.0,))
    assert json.dumps(to_dict(Rates())) == json.dumps(to_dict(whole))
    assert json.dumps(to_dict(Rates(37))) != json.dumps(to_dict(whole))
    kinds = {name: type(value) for name, value in to_dict(Rates()).items()}
    assert kinds["first"] is kinds["optional"] is float
    assert [type(value) for value in to_dict(Rates())["pair"]] == [float, int]
    assert kinds["either"] is kinds["count"] is kinds["untyped"] is int
    assert kinds["flag"] is bool
    assert from_dict(Rates, to_dict(Rates())) == Rates() == whole
    assert to_dict(Rates(optional=None, many=None))["many"] is None


class Shape(abc.ABC):
    name: ClassVar[str]

    @abc.abstractmethod
    def area(self) -> float: ...


@dataclass(frozen=True)
class Rectangle(Shape, abc.ABC):  # what some shapes share: no choice, for it has no name
    width: float = 1.0


@dataclass(frozen=True)
class Square(Rectangle):
    name = "square"

    def area(self) -> float:
        return self.width**2


@dataclass(frozen=True)
class Disc(Shape):
    radius: float
    name = "disc"

    def area(self) -> float:
        return 3 * self.radius**2


@dataclass(frozen=True)
class FramedSquare(Square):
    name = "framed square"
    frame: int = 1


@dataclass(frozen=True)
class Nameless(Disc):  # inherits its name, so it is no choice either, but is read where it was written
    pass


@dataclass(frozen=True)
class Drawing:
    shape: Shape = Square()
    frame: Shape | None = None


class Source(abc.ABC):
    @abc.abstractmethod
    def read(self) -> str: ...


@dataclass(frozen=True)
class Column(Source):
    name: str  # a field, so that the choice goes by the class

    def read(self) -> str:
        return self.name


@dataclass(frozen=True)
class Reading:
    source: Source


def test_a_choice_whose_name_is_a_field_goes_by_its_class():
    assert choices(Source) == {"Column": Column}
    assert from_dict(Reading, to_dict(Reading(Column("age")))) == Reading(Column("age"))


def test_the_choices_of_an_abstract_base_are_its_named_dataclasses():
    assert choices(Shape) == {"disc": Disc, "framed square": FramedSquare, "square": Square}
    assert choices(Rectangle) == {"framed square": FramedSquare, "square": Square}


@pytest.mark.parametrize("drawing", [Drawing(), Drawing(Disc(2.0), FramedSquare(3.0, 4)), Drawing(Nameless(1.0))])
def test_a_field_of_an_abstract_base_is_read_by_its_type(drawing):
    assert from_dict(Drawing, json.loads(json.dumps(to_dict(drawing)))) == drawing
    assert to_dict(Drawing(Disc(2)))["shape"] == {"type": "Disc", "radius": 2.0}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"type": "Disk"}, "^config.shape.type: expected one of Disc, FramedSquare, Square, got 'Disk'; did you mean"),
        ({"type": "Rectangle"}, "one of Disc, FramedSquare, Square, got 'Rectangle'; a class of your own is known"),
        ({"radius": 1}, "^config.shape.type: expected one of Disc, FramedSquare, Square, got None$"),
        ({"type": "Disc"}, "^config.shape: key 'radius' is missing$"),
        ({"type": "Square", "witdh": 1}, "^config.shape: unknown key 'witdh'; did you mean 'width'[?]$"),
        ("Disc", "^config.shape: expected the keys of a Shape, got 'Disc'$"),
    ],
)
def test_an_unknown_choice_is_named_with_its_place(shape, expected):
    with pytest.raises(SemidError, match=expected):
        from_dict(Drawing, {"shape": shape})


def test_a_missing_key_without_default_is_named():
    with pytest.raises(SemidError, match=r"^config: key 'name' is missing$"):
        from_dict(Train, {})


@pytest.mark.parametrize("value", [np.float32(1), np.zeros(2), {1, 2}, Adam, b"x"])
def test_values_that_json_cannot_hold_are_refused(value):
    with pytest.raises(SemidError, match=f"a config holds plain values and dataclasses; got {type(value).__name__}"):
        to_dict(Train("a", extra=value))


def test_difference_names_what_differs():
    old = to_dict(Train("a"))
    assert difference(old, old) == ""
    assert difference(old, to_dict(Train("a", Adam(0.5), epochs=4))) == "epochs: 3 -> 4, optimizer.rate: 0.001 -> 0.5"
    assert difference({"a": 1}, {"b": None, "c": 2}) == "a: 1 -> None, c: None -> 2"
    kinds = ({"of": {"type": kind, f"size_{kind}": 8}, "seed": seed} for kind, seed in (("A", 0), ("B", 1)))
    assert difference(*kinds) == "of.type: 'A' -> 'B', seed: 0 -> 1"
    assert difference({"type": {"choices": ["a"]}}, {"type": "a"}).startswith("type: {'choices'")
    assert difference(dict.fromkeys("abcdef", 1), {}).count("->") == 4


def test_an_enum_in_place_of_another_type_is_stored_as_before():
    for remat, stored in ((Remat.NOTHING, False), (Remat.FULL, True), (Remat.DOTS, "dots")):
        config = TransformerConfig(remat=remat)
        assert to_dict(config)["remat"] == stored
        assert from_dict(TransformerConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("value", "range_", "message"),
    [
        (0, {"at_least": 1}, "of at least 1, got 0"),
        (0.0, {"above": 0}, r"above 0, got 0\.0"),
        (float("nan"), {"at_least": 0}, "of at least 0, got nan"),
        (float("inf"), {"above": 0}, "above 0 and finite, got inf"),
        (1.0, {"at_least": 0, "below": 1}, r"in \[0, 1\), got 1\.0"),
        (1.5, {"above": 0, "at_most": 1}, r"in \(0, 1\], got 1\.5"),
        ((4, 0), {"at_least": 1}, r"of at least 1, got \(4, 0\)"),
    ],
)
def test_a_number_out_of_range_is_named(value, range_, message):
    with pytest.raises(SemidError, match=f"^expected extra {message}$"):
        check_range(Train("a", extra=value), "extra", **range_)


def test_bounds_are_in_the_range_or_not_as_they_say_and_none_is_left_alone():
    for value, range_ in [
        (1, {"at_least": 1}),
        (1.0, {"above": 0, "at_most": 1}),
        ((4, 1), {"at_least": 1}),
        (None, {"above": 0}),
    ]:
        check_range(Train("a", extra=value), "extra", **range_)
