"""What a source holds beside the images that are taken, counted by reason: found = images + passed over."""

import logging
import re
from dataclasses import dataclass

from mae_core.errors import UserError

log = logging.getLogger(__name__)

_DOCUMENT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|attribution|manifest)\b.*|(thumbs\.db|desktop\.ini|dicomdir)|.*\.md",
    re.IGNORECASE,
)
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9_]{0,11}")
_MAX_REASONS = 50
_NUM_SHOWN = 8
_OTHER = "other files"


@dataclass
class Group:
    """Files, members or rows that were passed over for one reason."""

    count: int
    example: str
    is_beside: bool
    """Whether they belong to images that are taken, as a caption does, or are documents."""


class PassedOver:
    """Counts by reason. Memory does not grow with the number of files."""

    def __init__(self) -> None:
        self.groups: dict[str, Group] = {}

    def add(self, reason: str, example: str, *, beside: bool = False, count: int = 1) -> None:
        """Count something that is not taken; `beside` says that it belongs to an image that is."""
        if reason not in self.groups and len(self.groups) >= _MAX_REASONS:
            reason, beside = _OTHER, False
        group = self.groups.setdefault(reason, Group(0, printable(example), beside))
        group.count += count
        group.is_beside &= beside

    def merge(self, other: "PassedOver") -> None:
        for reason, group in other.groups.items():
            self.add(reason, group.example, beside=group.is_beside, count=group.count)

    @property
    def total(self) -> int:
        return sum(group.count for group in self.groups.values())

    @property
    def counts(self) -> dict[str, int]:
        """Counts by reason, in a fixed order."""
        return {reason: self.groups[reason].count for reason in sorted(self.groups)}

    def shown(self, *, all_groups: bool = True) -> str:
        """Describe the largest groups, each with an example."""
        groups = [(r, g) for r, g in self.groups.items() if all_groups or not g.is_beside]
        groups.sort(key=lambda pair: (-pair[1].count, pair[0]))
        words = [f"{group.count} {reason}, such as {group.example}" for reason, group in groups[:_NUM_SHOWN]]
        return "; ".join([*words, *["..."] * (len(groups) > _NUM_SHOWN)])

    def report(self, uri: str) -> None:
        """Log one line with the counts, if anything was passed over."""
        if self.groups:
            log.warning("%s: passed over %d: %s", uri, self.total, self.shown())

    def refuse_many(self, uri: str, num_images: int, max_skipped: float) -> None:
        """Raise UserError if more is passed over than `max_skipped` allows, a share of all that is found."""
        num = sum(group.count for group in self.groups.values() if not group.is_beside)
        found = num_images + num
        if num > max_skipped * found:
            raise UserError(
                f"{num} of {found} in {uri} would be passed over, more than max_skipped {max_skipped:g} allows: "
                f"{self.shown(all_groups=False)}; move them out of the source, or rerun with a higher --max-skipped"
            )


def printable(name: str) -> str:
    """Return a name as it can be printed: names in a source may contain control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def is_document(path: str) -> bool:
    """Return whether a file describes the source: a README, a licence."""
    return _DOCUMENT.fullmatch(path.rpartition("/")[2]) is not None


def kind_of_name(path: str) -> str:
    """Return the reason for a file that is no image, by its suffix."""
    name = path.rpartition("/")[2]
    suffix = name[name.rfind(".") :] if "." in name[1:] else ""
    if is_document(path):
        return "documents"
    return f"no image (*{suffix.lower()})" if _SUFFIX.fullmatch(suffix) else "no image (no suffix)"
