"""The model registry: versioned artefacts with their parents, options, data and figures, verified when they are read."""

from rlhf.registry.manifest import (
    IMPORTED,
    MANIFEST,
    STAGES,
    Artifact,
    Manifest,
    Reference,
    changed_inputs,
    code_commit,
    library_versions,
    parse_reference,
    read_manifest,
    recipe_hash,
)
from rlhf.registry.store import TAGS, Lineage, Registry
from rlhf.registry.verify import PICKLE_SUFFIXES, check_files
