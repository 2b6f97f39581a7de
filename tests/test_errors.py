"""The vocabulary of failure."""

import multiprocessing

import pytest

from mtp_lightning import errors

FAULT = errors.Fault(path="run.steps", must_hold="must be >= 1", found="0", origin="x.yaml:3", remedy="Raise it.")
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MtpError)]


def fail(kind):
    raise kind([FAULT]) if kind is errors.RecipeError else kind("this must hold", "that", "Do this.")


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_in_a_worker_arrives_as_what_it_is(kind):
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(kind) as caught:
        pool.apply(fail, (kind,))
    assert type(caught.value) is kind
    if kind is errors.RecipeError:
        assert caught.value.faults == [FAULT]
    else:
        assert caught.value.args == kind("this must hold", "that", "Do this.").args
        assert caught.value.remedy == "Do this."


def test_exit_codes_tell_failures_apart():
    codes = {kind.__name__: kind.exit_code for kind in KINDS}
    assert codes["DataError"] == 87
    assert codes["NonFiniteError"] == 88
    assert len(set(codes.values())) == len(codes)
