"""The manifest of a small pack, as an object and as the JSON that a test may damage."""

from __future__ import annotations

import json

import pytest
from support.packs.manifest_damage import Document
from support.packs.small import write_small_pack

from layerpack.formats.manifest.document import dump_manifest
from layerpack.formats.manifest.facts import Manifest


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_small_pack(tmp_path_factory.mktemp("small") / "pack")


@pytest.fixture
def document(small: Manifest) -> Document:
    fields: Document = json.loads(dump_manifest(small))
    return fields
