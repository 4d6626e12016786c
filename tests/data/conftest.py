"""The config of the tests of sources."""

import pytest

from ddpm_jax.config import default_config


@pytest.fixture
def config(tmp_path):
    config = default_config()
    config.data.cache_dir = str(tmp_path / "cache")
    return config
