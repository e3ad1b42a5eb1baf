"""pytest puts the folder of a conftest.py on the path. A folder named gguf would be found as the package of that name,
through the conftest.py above."""

from pathlib import Path

import pytest
from source_tokenizers import our_sentencepiece


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 ids, the mask is 5."""
    return our_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))
