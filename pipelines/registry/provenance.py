"""Where weights outside the registry come from: a file beside them that keeps what the registry knew."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mae_core.errors import UserError
from pipelines.registry.versions import LICENCE_TAG, ORIGIN_TAG, ModelRef

PROVENANCE = "provenance.json"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is known about weights beside which this stands as provenance.json. Empty values are unknown."""

    model: str = ""
    """The version or run that they were copied from."""
    parent: str = ""
    """URI of the version that they were trained from."""
    dataset: str = ""
    """Digest of the dataset that they were trained on."""
    licence: str = ""
    origin: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Hex digests of the files of weights, by name. Without any, this is about all files of the folder."""

    @classmethod
    def trained_from(cls, parent: ModelRef | None, *, model: str, dataset: str) -> "Provenance":
        """Return the provenance of weights that a run trained from a version, or from none."""
        tags = parent.tags if parent else {}
        return cls(
            model=model,
            parent=parent.uri if parent else "",
            dataset=dataset,
            licence=tags.get(LICENCE_TAG, ""),
            origin=tags.get(ORIGIN_TAG, ""),
        )

    @classmethod
    def parse(cls, content: bytes, where: str) -> "Provenance":
        """Parse the file's content. Raises UserError if it is not what `to_json` writes."""
        try:
            values: Any = json.loads(content)
            texts = {name: values[name] for name in ("model", "parent", "dataset", "licence", "origin")}
            found = cls(**texts, sha256=dict(values["sha256"]))
            is_text = all(isinstance(text, str) for text in (*texts.values(), *found.sha256.values()))
        except (ValueError, KeyError, TypeError):
            is_text, found = False, cls()
        if not is_text:
            raise UserError(
                f"{where} is damaged, so the licence of the weights beside it is unknown; export or copy them again"
            )
        return found

    @property
    def licence_tags(self) -> dict[str, str]:
        """Return licence and origin as tags of a model version."""
        tags = {LICENCE_TAG: self.licence, ORIGIN_TAG: self.origin}
        return {tag: value for tag, value in tags.items() if value}

    def to_json(self) -> bytes:
        """Serialize for the file."""
        values = {name: getattr(self, name) for name in ("model", "parent", "dataset", "licence", "origin")}
        return json.dumps(values | {"sha256": dict(self.sha256)}, indent=1).encode()
