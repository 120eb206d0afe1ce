"""The manifest of a small pack, as an object and as the JSON that a test may damage."""

from __future__ import annotations

import json

import pytest
from manifest_damage import Document
from small_pack import write_small_pack

from layerpack.formats.manifest import Manifest
from layerpack.formats.manifest_json import dump_manifest


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_small_pack(tmp_path_factory.mktemp("small") / "pack")


@pytest.fixture
def document(small: Manifest) -> Document:
    fields: Document = json.loads(dump_manifest(small))
    return fields
