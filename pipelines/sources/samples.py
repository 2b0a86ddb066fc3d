"""WebDataset's samples: members of a tar with the same key, and which of their images is the picture.

A sample has one image. Where the key's rule makes one sample of many images, either names have dots that mean nothing,
or a sample has several images, such as a picture and its mask. Which of these is for the user to say.
"""

import re
from collections import Counter
from collections.abc import Sequence

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.sources.masks import picture_stems, stem_of
from pipelines.sources.passed_over import PassedOver

# The names of members: img.jpg, seg.png, jpg; not 05.01_3.jpg, of which a date is part.
_MEMBER = re.compile(r"(?:[A-Za-z_]\w*\.)?[A-Za-z]\w*")
_NUM_SHOWN = 4


class Samples:
    """The members of one tar file that belong together."""

    def __init__(self, uri: str, config: SourceConfig) -> None:
        self.others: list[str] = []
        """Names of the members that are no images."""
        self._uri, self._config = uri, config

    def note_other(self, name: str) -> None:
        self.others.append(name)

    def choose(self, images: Sequence[str]) -> tuple[list[bool], PassedOver]:
        """Return for each image whether it is taken, and what is passed over.

        Raises UserError if a name occurs twice, or if a sample has several images and the config does not say which.
        """
        self._refuse_repeated([*images, *self.others])
        member, passed = self._config.image_member.lower().lstrip("."), PassedOver()
        if member == "any":
            return [True] * len(images), passed
        if member:
            return self._members(images, member, passed), passed
        pictures = [picture_stems(name, in_tar=True) for name in images]
        stems = {stem_of(name) for name in images} if any(pictures) else set()
        taken = [stems.isdisjoint(names) for names in pictures]
        for name, is_taken in zip(images, taken):
            if not is_taken:
                passed.add("masks beside images (--image-member any takes them)", f"{self._uri}/{name}", beside=True)
        self._refuse_several([name for name, is_taken in zip(images, taken) if is_taken])
        return taken, passed

    def _members(self, images: Sequence[str], member: str, passed: PassedOver) -> list[bool]:
        taken = [suffix_of(name, self._config) == member for name in images]
        if images and not any(taken):
            there = Counter(suffix_of(name, self._config) for name in images)
            raise UserError(
                f"{self._uri} has no member {member}, but {', '.join(list(there)[:_NUM_SHOWN])}; choose one of these"
            )
        for name, is_taken in zip(images, taken):
            if not is_taken:
                passed.add(f"images that are not member {member}", f"{self._uri}/{name}", beside=True)
        return taken

    def _refuse_repeated(self, names: Sequence[str]) -> None:
        if len(set(names)) < len(names):
            name, count = Counter(names).most_common(1)[0]
            raise UserError(
                f"{self._uri} has {name} {count} times, as when tar files are appended to each other: which label "
                "belongs to which image is unknown; give the original files, or unpack and pack it again"
            )

    def _refuse_several(self, images: Sequence[str]) -> None:
        """Raise UserError if a key has several images that are members of a sample, or that others belong to."""
        keys = Counter(key_of(name, self._config) for name in images)
        several = {key for key, count in keys.items() if count > 1}
        if not several:
            return
        by_others = next((key for name in self.others if (key := key_of(name, self._config)) in several), "")
        by_names = [n for n in images if key_of(n, self._config) in several and _is_member(n, self._config)]
        if not by_others and not by_names:
            return
        key = by_others or key_of(by_names[0], self._config)
        names = [name for name in images if key_of(name, self._config) == key]
        suffix = suffix_of(names[0], self._config) if _is_member(names[0], self._config) else "img.jpg"
        shown = ", ".join(names[:_NUM_SHOWN]) + (", ..." if len(names) > _NUM_SHOWN else "")
        raise UserError(
            f"{self._uri}: {len(names)} images are one sample by the key {key}, which ends at the "
            f"{self._config.sample_key.replace('-', ' ')}: {shown}; if names have dots use --sample-key last-dot, if a "
            f"sample has several images choose one by --image-member {suffix}, or take all by --image-member any"
        )


def _is_member(name: str, config: SourceConfig) -> bool:
    return _MEMBER.fullmatch(suffix_of(name, config)) is not None


def key_of(name: str, config: SourceConfig) -> str:
    """Return the key of a member's sample."""
    if config.sample_key == "first-dot":
        folder, slash, file = name.rpartition("/")
        return folder + slash + file.partition(".")[0]
    suffix = suffix_of(name, config)
    return name[: -len(suffix) - 1] if "." in suffix else stem_of(name)


def suffix_of(name: str, config: SourceConfig) -> str:
    """Return what follows the key and its dot, in lower case: jpg, seg.png, cls.txt."""
    file = name.rpartition("/")[2].lower()
    if config.sample_key == "first-dot":
        return file.partition(".")[2]
    own = config.label_name.lower().lstrip("."), config.image_member.lower()
    for double in ("cls.txt", "class.txt", "nii.gz", *own):
        if "." in double and file.endswith(f".{double}"):
            return double
    return file.rpartition(".")[2] if "." in file else ""
