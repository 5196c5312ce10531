import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

from samething import errors
from samething.errors import FingerprintError, ImageError, InputError, MissingExtraError, SamethingError

KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SamethingError)
]
PLAIN_KINDS = [kind for kind in KINDS if kind is not MissingExtraError]


def fail_in_a_worker() -> None:
    raise ImageError("a.jpg is empty", expected="an image", next_step="remove it")


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_the_message_says_what_was_given_expected_and_next(kind):
    error = kind("x is 3", expected="x below 2", next_step="give a smaller x")
    assert str(error) == "x is 3\n  expected: x below 2\n  next: give a smaller x"


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_pickling_keeps_kind_and_parts(kind):
    error = pickle.loads(pickle.dumps(kind("given", expected="expected", next_step="next")))
    assert type(error) is kind
    assert (error.given, error.expected, error.next_step) == ("given", "expected", "next")
    assert str(error) == str(kind("given", expected="expected", next_step="next"))


def test_a_missing_extra_names_the_package_and_the_command():
    error = pickle.loads(pickle.dumps(MissingExtraError("torch", extra="train")))
    assert type(error) is MissingExtraError
    assert (error.module, error.extra) == ("torch", "train")
    assert "torch" in error.given
    assert error.next_step == "pip install 'samething[train]'"


def test_an_error_comes_home_from_a_worker_process():
    with ProcessPoolExecutor(1) as pool, pytest.raises(ImageError) as caught:
        pool.submit(fail_in_a_worker).result()
    assert caught.value.given == "a.jpg is empty"


def test_one_handler_catches_all_and_finer_ones_tell_them_apart():
    assert all(issubclass(kind, SamethingError) for kind in KINDS)
    assert issubclass(ImageError, InputError)
    assert issubclass(FingerprintError, errors.ArtefactError)
    assert not issubclass(errors.ArtefactError, InputError)
