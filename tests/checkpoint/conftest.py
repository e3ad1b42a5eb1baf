"""Shared fixtures of tests that load exports with transformers."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies a directory's code to: one place, as Python imports `transformers_modules` once."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("modules")
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
        yield
