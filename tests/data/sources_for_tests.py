"""What the tests of sources have in common."""

import numpy as np
import pytest

from ddpm_jax.config import RequestError
from ddpm_jax.data import open_source


def everything(source):
    return source.images(np.arange(len(source)))


def refusal(config, *args, **kwargs):
    """The message of the RequestError that opening raises, which must be one line."""
    with pytest.raises(RequestError) as caught:
        open_source(config, *args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message
