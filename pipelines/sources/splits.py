"""Which split a file of many images belongs to, by its name, such as train-00000-of-00008.parquet or val/000.tar."""

import logging
import re
from collections.abc import Container, Iterable

from mae_core.errors import UserError
from pipelines.config import SourceConfig
from pipelines.sources.entry import SPLIT_WORDS
from pipelines.sources.labels import is_likely

log = logging.getLogger(__name__)

LIKE_A_SPLIT = re.compile(rf"({'|'.join(SPLIT_WORDS)})[-_ ]?(?:set|split|data|images?|imgs?|\d+|[-_ ])+", re.IGNORECASE)
"""Names such as train2017 and test_set, which are no split by the rule and hardly a class."""

# What follows the split in the names of shards: numbers, `of`, and the digest of the Hub's files.
_COUNTED = re.compile(r"\d+|of|lance|lmdb|mds|tfrecords?|[0-9a-f]{8,}|\{\d+\.*\d*\}")
# The split below which no folder may have the name of another one. `dev` and `training` name other things too.
_HELD_OUT = ("val", "valid", "validation", "test", "testing")


def splits_by_name(paths: Iterable[str], where: str) -> dict[str, str]:
    """Return the split of each file that names one; it may name none.

    A folder, or a file but for its number, names a split with its last word: `data/validation-00000.parquet`,
    `Val/0.tar`. A word within, as in `test_images_0.tar`, counts if every file has one and they name several splits.
    Raises UserError where a name could mean a split or not, or means two.
    """
    found = {path: _last_words(path) for path in paths}
    for path, words in found.items():
        if len(set(words)) > 1:
            raise UserError(f"{path} of {where} names the splits {' and '.join(sorted(set(words)))}; rename it")
    known = {path: words[0] for path, words in found.items() if words}
    within = {path: _words_within(path) for path in found if path not in known}
    unclear = {path: words for path, words in within.items() if words}
    if not unclear:
        return known
    splits = {word for words in unclear.values() for word in words} | set(known.values())
    if all(len(set(words)) == 1 for words in within.values()) and len(splits) > 1:
        return known | {path: words[0] for path, words in unclear.items()}
    if known or len(unclear) < len(found) or len(splits) > 1:
        path, words = next(iter(unclear.items()))
        raise UserError(
            f"{path} of {where} may be of split {words[0]} or only have the word in its name; put the files of a split "
            f"in a folder {words[0]}/, or rename it"
        )
    path, words = next(iter(unclear.items()))
    log.warning(
        "%s: the word in names such as %s is not taken as split %s; a folder %s/ is", where, path, *words[:1] * 2
    )
    return known


def refuse_partitions(paths: Iterable[str], where: str, columns: Container[str], config: SourceConfig) -> None:
    """Raise UserError for files in folders such as label=cat, which mean a column that the files do not have.

    A folder such as split=test names a split.
    """
    for path in paths:
        for part in path.split("/")[:-1]:
            name, _, value = part.partition("=")
            if value and name not in columns and is_likely(name) and config.labels != "none":
                raise UserError(
                    f"{path} of {where} lies in {part}/, whose name is the value of a column that the file lacks; "
                    "write the files with this column, or use --labels none"
                )


def refuse_inner_split(path: str, where: str) -> None:
    """Raise UserError if a folder below the top of the image's path has the name of a split that is held out."""
    parts = path.split("/")
    at = next((i for i, part in enumerate(parts[:-1]) if i and part.lower() in _HELD_OUT), 0)
    if at and SPLIT_WORDS.get(parts[0].lower()) != SPLIT_WORDS[parts[at].lower()]:
        above = "/".join(parts[:at])
        raise UserError(
            f"{path} of {where} is in a folder {parts[at]}/, but not at the top, where folders are splits: its images "
            f"would be used for training; prepare {above} by itself, move {parts[at]}/ to the top, or rename it"
        )


class ListedSplits:
    """Splits of the images of a list without a column of splits, by the folders in their paths."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._examples: dict[str, str] = {}

    def of(self, path: str) -> str:
        """Return the split that the top folder of a relative path names; empty for any other."""
        folders = [part.lower() for part in path.removeprefix("./").split("/")[:-1]]
        if folders and folders[0] in SPLIT_WORDS:
            return SPLIT_WORDS[folders[0]]
        clear = ("train", *_HELD_OUT)
        within = next((SPLIT_WORDS[folder] for folder in reversed(folders) if folder in clear), "")
        self._examples.setdefault(within, path)
        return ""

    def refuse_mixed(self) -> None:
        """Raise UserError if folders within paths name a split that is held out, and not all paths the same one."""
        held_out = next((split for split in ("test", "val") if split in self._examples), "")
        if held_out and len(self._examples) > 1:
            other = next(path for split, path in self._examples.items() if split != held_out)
            raise UserError(
                f"{self._uri} has no column of splits, and names {self._examples[held_out]} and {other}: images of "
                f"{held_out} would be used for training; add a column split, or name one by --split-column"
            )


def _last_words(path: str) -> list[str]:
    """Return the splits that folders and the file name with their last word."""
    found = []
    for part in _parts(path):
        words = [word for word in re.split(r"[-_.=]", part) if word]
        while len(words) > 1 and _COUNTED.fullmatch(words[-1]):
            words.pop()
        if words and words[-1] in SPLIT_WORDS:
            found.append(SPLIT_WORDS[words[-1]])
    return found


def _words_within(path: str) -> list[str]:
    found = [word for part in _parts(path) for word in re.split(r"[-_.=]", part)]
    return [SPLIT_WORDS[word] for word in map(_bare, found) if word in SPLIT_WORDS]


def _bare(word: str) -> str:
    """Return the word for a split without what is often written onto it, as in train2017 and testset."""
    found = LIKE_A_SPLIT.fullmatch(word)
    return found[1].lower() if found else word


def _parts(path: str) -> list[str]:
    """Return the folders and the name without its suffix, in lower case."""
    *folders, name = path.lower().split("/")
    return [*folders, name.rpartition(".")[0] or name]
