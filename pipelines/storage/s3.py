"""S3 under `storage.py`: one client a process and endpoint, asked with patience.

Small bodies go through pyarrow, which takes a tenth of a millisecond a request where boto3 takes two; large parts of
files through boto3, which takes half of pyarrow's CPU time a byte; so do pages of a listing and conditional puts, which
pyarrow does not have. A body that ends early is noticed, since sizes are known, and asked for again.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from mae_core.errors import UserError
from pipelines.storage.listing import Found, check_size
from pipelines.storage.patience import patiently
from pipelines.storage.ranges import RangeFile, whole

_ARROW_CODES = {
    "NoSuchBucket": "NO_SUCH_BUCKET",
    "AccessDenied": "ACCESS_DENIED",
    "403": "ACCESS_DENIED",
    "404": "NO_SUCH_KEY",
    "InvalidAccessKeyId": "INVALID_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "SIGNATURE_DOES_NOT_MATCH",
    "NoCredentialsError": "ACCESS_DENIED",
}
_LIST_THREADS = 16
# Levels of folders opened one after the other, so that what lies below them can be listed in parallel.
_SERIAL_LEVELS = 2
_MULTIPART_BYTES = 16 * 2**20
# Where the two take the same time.
_LARGE_BYTES = 4 * 2**20


def read(key: str, max_bytes: int | None = None) -> bytes:
    """All bytes of an object. Raises UserError for more than `max_bytes`."""

    def act() -> bytes:
        with filesystem().open_input_file(key) as file:
            check_size(file.size(), max_bytes)
            return whole(file.read(), file.size())

    return patiently(act, f"s3://{key}")


def read_range(key: str, offset: int, num_bytes: int) -> bytes:
    """So many bytes from `offset` on, fewer only where the object ends."""

    def act() -> bytes:
        with filesystem().open_input_file(key) as file:
            return whole(file.read_at(num_bytes, offset), max(0, min(num_bytes, file.size() - offset)))

    return patiently(act, f"s3://{key}")


def write(key: str, content: Any) -> None:
    """The object holds the bytes, or what a seekable file holds from its start on."""

    def act() -> None:
        with filesystem().open_output_stream(key) as stream:
            if isinstance(content, bytes):
                stream.write(content)
                return
            content.seek(0)
            while part := content.read(_MULTIPART_BYTES):
                stream.write(part)

    patiently(act, f"s3://{key}")


def write_new(key: str, content: bytes) -> bool:
    """Whether the object holds these bytes; one that was there already is left as it is (If-None-Match: *)."""
    bucket, _, name = key.partition("/")
    try:
        _ask("put_object", f"s3://{key}", Bucket=bucket, Key=name, Body=content, IfNoneMatch="*")
    except FileExistsError:
        # Ours, if an answer to an earlier attempt was lost on the way.
        return read(key) == content
    return True


def delete(key: str) -> None:
    """The object is gone, whether or not it was there.

    By boto3: pyarrow's own is several requests, of which a later one fails where an earlier one has done its work.
    """
    bucket, _, name = key.partition("/")
    _ask("delete_object", f"s3://{key}", Bucket=bucket, Key=name)


def open_input(key: str) -> pa.PythonFile:
    """A random-access file for pyarrow that outlives a store's absence."""
    return pa.PythonFile(RangeFile(PatientParts(key)), mode="r")


def look(key: str) -> Found:
    """What a listing says of one object."""
    bucket, _, name = key.partition("/")
    found = _ask("head_object", f"s3://{key}", needs="ContentLength", Bucket=bucket, Key=name)
    return Found(key, found["ContentLength"], found.get("ETag", "").strip('"'))


def walk(prefix: str) -> Iterator[Found]:
    """Every object below a folder by its key (with its bucket), in no particular order.

    Folders are listed in parallel, page by page, so that memory is that of a few pages.
    """
    bucket, _, folder = prefix.partition("/")
    bases = [f"{folder}/" if folder else ""]
    for _ in range(_SERIAL_LEVELS):
        below: list[str] = []
        for page in (page for base in bases for page in _responses(bucket, base, "/")):
            yield from _objects(bucket, page)
            below += [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
        bases = below
        if len(bases) >= _LIST_THREADS:
            break
    with ThreadPoolExecutor(_LIST_THREADS) as pool:
        # In groups, since a page that was asked for is held until it is taken.
        for start in range(0, len(bases), _LIST_THREADS):
            pages = [_pages(bucket, base) for base in bases[start : start + _LIST_THREADS]]
            while pages:
                taken = list(pool.map(lambda page: next(page, None), pages))
                yield from (item for page in taken for item in page or ())
                pages = [rest for rest, page in zip(pages, taken) if page is not None]


def _pages(bucket: str, base: str) -> Iterator[list[Found]]:
    for page in _responses(bucket, base, ""):
        yield _objects(bucket, page)


def _objects(bucket: str, page: dict[str, Any]) -> list[Found]:
    return [
        Found(f"{bucket}/{found['Key']}", found["Size"], found.get("ETag", "").strip('"'))
        for found in page.get("Contents", ())
        if not found["Key"].endswith("/")
    ]


def _responses(bucket: str, base: str, delimiter: str) -> Iterator[dict[str, Any]]:
    more: dict[str, Any] = {"Bucket": bucket, "Prefix": base, "Delimiter": delimiter}
    while True:
        page = _ask("list_objects_v2", f"s3://{bucket}/{base}", needs="IsTruncated", **more)
        yield page
        if not page["IsTruncated"]:
            return
        more["ContinuationToken"] = page["NextContinuationToken"]


def _ask(
    operation: str,
    what: str,
    needs: str = "",
    take: Callable[[dict[str, Any]], Any] = lambda answer: answer,
    **parameters: Any,
) -> Any:
    """What `take` makes of boto3's answer; without one the answer.

    What either raises becomes OSError, its code spelled as pyarrow does, which storage.py knows. boto3 takes a body
    that never came for an answer that says nothing, so that a listing would be empty: an answer without what every
    whole one has is asked for again.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    def act() -> Any:
        answer = getattr(client(), operation)(**parameters)
        if needs and needs not in answer:
            raise OSError(f"short body: an answer to {operation} without {needs}")
        return take(answer)

    try:
        return patiently(act, what)
    except (ClientError, BotoCoreError) as error:
        code = error.response["Error"].get("Code", "") if isinstance(error, ClientError) else type(error).__name__
        if code in ("PreconditionFailed", "412"):
            raise FileExistsError(what) from None
        raise OSError(f"AWS Error {_ARROW_CODES.get(code, code)}: {error}") from None


class PatientParts:
    """Parts of an object, from any thread; each is one request, asked again whatever happened to the connection."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._file = patiently(lambda: filesystem().open_input_file(key), f"s3://{key}")

    def size(self) -> int:
        return self._file.size()

    def read_at(self, num_bytes: int, offset: int) -> bytes:
        if num_bytes >= _LARGE_BYTES:
            return _read_large(self._key, num_bytes, offset)
        return patiently(lambda: whole(self._file.read_at(num_bytes, offset), num_bytes), f"s3://{self._key}")


def _read_large(key: str, num_bytes: int, offset: int) -> bytes:
    bucket, _, name = key.partition("/")
    return _ask(
        "get_object",
        f"s3://{key}",
        take=lambda answer: whole(answer["Body"].read(), num_bytes),
        Bucket=bucket,
        Key=name,
        Range=f"bytes={offset}-{offset + num_bytes - 1}",
    )


def endpoint() -> str | None:
    """The store's address where it is not AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def filesystem() -> pafs.S3FileSystem:
    """pyarrow's client of this process."""
    return _filesystem_at(endpoint(), os.getpid())


@lru_cache(maxsize=4)
def _filesystem_at(address: str | None, pid: int) -> pafs.S3FileSystem:
    """Small files are one PUT, since the stream opens only when it is written. Retries are ours: see `patiently`."""
    options: dict[str, Any] = {
        "allow_delayed_open": True,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=3),
        "connect_timeout": 10,
        "request_timeout": 60,
    }
    if address:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.username:
            raise UserError("AWS_ENDPOINT_URL is not http(s)://host:port; try http://127.0.0.1:9000")
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc, "region": _region()}
    return pafs.S3FileSystem(**options)


def client() -> Any:
    """boto3's client of this process."""
    return _client_at(endpoint(), os.getpid())


@lru_cache(maxsize=4)
def _client_at(address: str | None, pid: int) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "max_attempts": 3},
        max_pool_connections=2 * _LIST_THREADS,
        connect_timeout=10,
        read_timeout=60,
    )
    region = _region() if address else None
    # A session of its own: the default one keeps the credentials that it first saw.
    return boto3.Session().client("s3", endpoint_url=address, config=config, region_name=region)


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
