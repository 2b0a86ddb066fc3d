"""Hold out split `val` by class and by group, from the listing alone: no patient, slide or scene is in two splits.

1. Order the groups by a hash of their names. Without groups, each image is one.
2. Take a group if at most half of it exceeds the share of its classes, and if it leaves each some to train on.
3. For each class without any, take its smallest group that leaves some of every class.
The price is memory for the names of all groups.
"""

import dataclasses
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from mae_core.errors import UserError
from pipelines.config import PrepareConfig
from pipelines.sources import Entry
from pipelines.sources.labels import members

log = logging.getLogger(__name__)

_Group = Counter[str]
"""Number of images by label."""


def bundled(entries: Iterable[Entry], config: PrepareConfig) -> Iterator[Entry]:
    """Yield the entries with the groups that `group_by` finds. Raises UserError for one without a group."""
    if not config.group_by:
        yield from entries
        return
    pattern = None if config.group_column else re.compile(config.group_by)
    for entry in entries:
        bundle = entry.bundle
        if pattern and (found := pattern.search(entry.name)):
            bundle = found[1] if pattern.groups else found[0]
        if not bundle:
            raise UserError(
                f"{entry.name} has no group by --group-by {config.group_by}; give an expression that finds one in "
                "every name, such as '(patient[0-9]+)', or a column that has no empty fields"
            )
        yield dataclasses.replace(entry, bundle=bundle)


def with_held_out(entries: Iterable[Entry], config: PrepareConfig) -> Iterator[Entry]:
    """Yield the sorted entries, those of the groups to hold out with split `val` and the others of theirs with `train`.

    `entries` is read twice. Raises UserError if images of one group are in two splits.
    """
    groups: dict[str, _Group] = {}
    split_of: dict[str, str] = {}
    has_val = False
    for entry in entries:
        has_val |= entry.split == "val"
        if entry.bundle and split_of.setdefault(entry.bundle, entry.split) != entry.split:
            raise UserError(
                f"group {entry.bundle} has images in {split_of[entry.bundle]} and in {entry.split}, such as "
                f"{entry.name}; move them to one split, or group by something else"
            )
        if entry.split in ("", "train"):
            groups.setdefault(entry.bundle or entry.name, Counter()).update(members(entry.label) or [""])
    chosen = frozenset() if has_val else chosen_groups(groups, config.val_fraction, config.seed)
    if not has_val and config.val_fraction and not chosen:
        log.warning("no group is held out as val: there are %d", len(groups))
    for entry in entries:
        if entry.split not in ("", "train"):
            yield entry
        else:
            is_held_out = (entry.bundle or entry.name) in chosen
            yield dataclasses.replace(entry, split="val" if is_held_out else "train")


def chosen_groups(groups: Mapping[str, _Group], fraction: float, seed: int) -> frozenset[str]:
    """Return the groups to hold out, so that of every class about this fraction is, and some of it is not."""
    totals = sum(groups.values(), Counter())
    wanted = Counter({label: round(fraction * count) for label, count in totals.items()})
    held, chosen = Counter[str](), set[str]()
    ordered = sorted(groups, key=lambda name: _hash(name, seed))

    def leaves_some(group: _Group) -> bool:
        return all(held[label] + count < totals[label] for label, count in group.items())

    for name in ordered if fraction else ():
        group = groups[name]
        gain = sum(min(count, max(0, wanted[label] - held[label])) for label, count in group.items())
        if 2 * gain >= group.total() and gain and leaves_some(group):
            chosen.add(name)
            held += group
    for label in sorted(totals) if fraction else ():
        if held[label]:
            continue
        mine = [name for name in ordered if groups[name][label] and name not in chosen and leaves_some(groups[name])]
        if mine:
            name = min(mine, key=lambda name: groups[name].total())
            chosen.add(name)
            held += groups[name]
    return frozenset(chosen)


def _hash(name: str, seed: int) -> bytes:
    return hashlib.blake2b(
        name.encode("utf-8", "surrogateescape"), digest_size=8, salt=seed.to_bytes(8, "big")
    ).digest()
