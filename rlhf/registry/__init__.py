"""The model registry: versioned artefacts with their parents, options, data and figures, checked whenever they are read."""

from rlhf.registry.manifest import (
    LIBRARIES,
    MANIFEST,
    STAGES,
    Artifact,
    Manifest,
    Parent,
    Reference,
    code_commit,
    library_versions,
    parse_reference,
    read_manifest,
    recipe_hash,
)
from rlhf.registry.store import STALE_SECONDS, TAGS, Lineage, Registry
from rlhf.registry.verify import ALLOWED_SUFFIXES, PICKLE_SUFFIXES, check_files

__all__ = [
    "ALLOWED_SUFFIXES",
    "LIBRARIES",
    "MANIFEST",
    "PICKLE_SUFFIXES",
    "STAGES",
    "STALE_SECONDS",
    "TAGS",
    "Artifact",
    "Lineage",
    "Manifest",
    "Parent",
    "Reference",
    "Registry",
    "check_files",
    "code_commit",
    "library_versions",
    "parse_reference",
    "read_manifest",
    "recipe_hash",
]
