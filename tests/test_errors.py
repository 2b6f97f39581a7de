"""The vocabulary of failure."""

import multiprocessing

import pytest

from mtp_lightning import errors

FAULT = errors.Fault(path="run.steps", expected="must be >= 1", found="0", origin="x.yaml:3", hint="Raise it.")
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MtpError)]


def fail(kind):
    raise kind([FAULT]) if kind is errors.RecipeError else kind("this must hold", "that", "Do this.")


@pytest.fixture(scope="module")
def worker():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_in_a_worker_arrives_as_what_it_is(kind, worker):
    with pytest.raises(kind) as caught:
        worker.apply(fail, (kind,))
    assert type(caught.value) is kind
    if kind is errors.RecipeError:
        assert caught.value.faults == [FAULT]
    else:
        assert caught.value.args == kind("this must hold", "that", "Do this.").args
        assert caught.value.hint == "Do this."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain: é ß 漢 🙂", "plain: é ß 漢 🙂"),
        ("two\n\tlines", "two\n\tlines"),
        ("\x1b[2J\x07\x00\x7f", r"\x1b[2J\x07\x00\x7f"),
        ("a\rb\x9b31m\x85", r"a\rb\x9b31m\x85"),
        ("\u202egnp.exe\u2066\u200f", r"\u202egnp.exe\u2066\u200f"),
        ("a\u2028b", r"a\u2028b"),
        ("\udcff\ud800", r"\udcff\ud800"),
    ],
)
def test_what_would_change_the_screen_is_shown(text, expected):
    assert errors.visible(text) == expected
    error = errors.DataError(f"must {text}", f"found {text}", f"do {text}")
    assert (error.expected, error.found, error.hint) == (f"must {expected}", f"found {expected}", f"do {expected}")
    assert str(error).count(expected) == 3
    fault = errors.Fault(path=text, expected=text, found=text, origin=text, nearest=text, hint=text)
    assert {*vars(fault).values()} == {expected}
    assert expected in str(errors.RecipeError([fault]))


def test_lines_are_shown_where_there_is_room_for_one():
    assert errors.visible("a\nb\tc", kept="") == r"a\nb\tc"


def test_exit_codes_tell_failures_apart():
    codes = {kind.__name__: kind.exit_code for kind in KINDS}
    assert codes["DataError"] == 87
    assert codes["NonFiniteError"] == 88
    assert len(set(codes.values())) == len(codes)
