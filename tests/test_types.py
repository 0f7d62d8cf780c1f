"""That types and shapes are checked while tests run: without it, other tests would test less."""

from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from self_rewarding_lm.text import printable
from self_rewarding_lm.training.losses import sft_loss


@pytest.fixture(autouse=True)
def typed(pytestconfig):
    if pytestconfig.getoption("--untyped"):
        pytest.skip("types are not checked (--untyped)")


def test_an_argument_of_another_type_is_refused():
    number: Any = 3
    with pytest.raises(BeartypeCallHintViolation):
        printable(number)


def test_arguments_whose_shapes_do_not_fit_are_refused():
    with pytest.raises(TypeCheckError):
        sft_loss(torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool))
