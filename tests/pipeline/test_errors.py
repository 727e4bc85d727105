"""Every error crosses process boundaries whole."""

from __future__ import annotations

import inspect
import pickle

import pytest

from pipeline import errors
from pipeline.errors import PipelineError, TerminalError

CLASSES = [found for _, found in inspect.getmembers(errors, inspect.isclass) if issubclass(found, PipelineError)]


def make(kind: type[PipelineError]) -> PipelineError:
    return kind(*(f"{name} ü" for name in ("stage", "reason", "detail")) if kind is TerminalError else ("a sentence ü",))


@pytest.mark.parametrize("kind", CLASSES)
def test_error_survives_pickling(kind: type[PipelineError]) -> None:
    error = make(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.args, str(copy), vars(copy)) == (error.args, str(error), vars(error))


def test_terminal_error_says_where_what_and_why() -> None:
    error = TerminalError("decode", "corrupt", "a.mp4: frames are damaged")
    assert (error.stage, error.reason, error.detail) == ("decode", "corrupt", "a.mp4: frames are damaged")
    assert str(error) == "decode: corrupt: a.mp4: frames are damaged"


def test_drawing_of_the_hierarchy_names_every_class() -> None:
    assert errors.__doc__ is not None
    assert [kind.__name__ for kind in CLASSES if kind.__name__ not in errors.__doc__] == []
