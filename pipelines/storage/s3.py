"""S3: one client per process and endpoint, with retries.

Small objects go through pyarrow, which takes 0.1 ms per request where boto3 takes 2 ms. Large byte ranges go through
boto3, which takes half of pyarrow's CPU time per byte. Listings by page and conditional puts also use boto3, because
pyarrow has neither. Sizes are known, so a truncated body is detected and requested again.
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
from pipelines.storage.listing import ListedFile, check_size
from pipelines.storage.ranges import RangeFile, check_length
from pipelines.storage.retries import retry

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
# Folder levels listed serially, to find enough folders to list in parallel.
_SERIAL_LEVELS = 2
_MULTIPART_BYTES = 16 * 2**20
# Range size at which pyarrow and boto3 take the same time.
_LARGE_BYTES = 4 * 2**20


def read(key: str, max_bytes: int | None = None) -> bytes:
    """Read all bytes of an object. Raises UserError if it is larger than `max_bytes`."""

    def act() -> bytes:
        with filesystem().open_input_file(key) as file:
            check_size(file.size(), max_bytes)
            return check_length(file.read(), file.size())

    return retry(act, f"s3://{key}")


def read_range(key: str, offset: int, num_bytes: int) -> bytes:
    """Read `num_bytes` bytes from `offset`; fewer only at the end of the object."""

    def act() -> bytes:
        with filesystem().open_input_file(key) as file:
            return check_length(file.read_at(num_bytes, offset), max(0, min(num_bytes, file.size() - offset)))

    return retry(act, f"s3://{key}")


def write(key: str, content: Any) -> None:
    """Write bytes, or a seekable file from its start, to an object."""

    def act() -> None:
        with filesystem().open_output_stream(key) as stream:
            if isinstance(content, bytes):
                stream.write(content)
                return
            content.seek(0)
            while part := content.read(_MULTIPART_BYTES):
                stream.write(part)

    retry(act, f"s3://{key}")


def write_new(key: str, content: bytes) -> bool:
    """Create the object if it does not exist (If-None-Match: *); return whether it now holds these bytes."""
    bucket, _, name = key.partition("/")
    try:
        _request("put_object", f"s3://{key}", Bucket=bucket, Key=name, Body=content, IfNoneMatch="*")
    except FileExistsError:
        # The object may be our own, if the response to an earlier attempt was lost.
        return read(key) == content
    return True


def delete(key: str) -> None:
    """Delete the object if it exists.

    Uses boto3: pyarrow's delete makes several requests, and a later one fails if an earlier one has already deleted the
    object.
    """
    bucket, _, name = key.partition("/")
    _request("delete_object", f"s3://{key}", Bucket=bucket, Key=name)


def open_input(key: str) -> pa.PythonFile:
    """Open a random-access file for pyarrow that survives outages of the store."""
    return pa.PythonFile(RangeFile(RetryingParts(key)), mode="r")


def stat(key: str) -> ListedFile:
    """Return the listing entry of one object."""
    bucket, _, name = key.partition("/")
    found = _request("head_object", f"s3://{key}", needs="ContentLength", Bucket=bucket, Key=name)
    return ListedFile(key, found["ContentLength"], found.get("ETag", "").strip('"'))


def walk(prefix: str) -> Iterator[ListedFile]:
    """Yield every object below a folder, by key (with its bucket), in no particular order.

    Folders are listed in parallel, page by page, so memory holds only a few pages.
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
        # In groups, because a requested page stays in memory until it is consumed.
        for start in range(0, len(bases), _LIST_THREADS):
            pages = [_pages(bucket, base) for base in bases[start : start + _LIST_THREADS]]
            while pages:
                fetched = list(pool.map(lambda page: next(page, None), pages))
                yield from (item for page in fetched for item in page or ())
                pages = [rest for rest, page in zip(pages, fetched) if page is not None]


def _pages(bucket: str, base: str) -> Iterator[list[ListedFile]]:
    for page in _responses(bucket, base, ""):
        yield _objects(bucket, page)


def _objects(bucket: str, page: dict[str, Any]) -> list[ListedFile]:
    return [
        ListedFile(f"{bucket}/{found['Key']}", found["Size"], found.get("ETag", "").strip('"'))
        for found in page.get("Contents", ())
        if not found["Key"].endswith("/")
    ]


def _responses(bucket: str, base: str, delimiter: str) -> Iterator[dict[str, Any]]:
    more: dict[str, Any] = {"Bucket": bucket, "Prefix": base, "Delimiter": delimiter}
    while True:
        page = _request("list_objects_v2", f"s3://{bucket}/{base}", needs="IsTruncated", **more)
        yield page
        if not page["IsTruncated"]:
            return
        more["ContinuationToken"] = page["NextContinuationToken"]


def _request(
    operation: str,
    what: str,
    needs: str = "",
    take: Callable[[dict[str, Any]], Any] = lambda response: response,
    **parameters: Any,
) -> Any:
    """Send a boto3 request with retries; return what `take` makes of its response.

    Errors of either become OSError with pyarrow's spelling of the code, which errors.py knows. boto3 parses an empty
    body as a response without fields, which would turn a truncated listing into an empty one: a response that lacks the
    field `needs` is requested again.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    def act() -> Any:
        response = getattr(client(), operation)(**parameters)
        if needs and needs not in response:
            raise OSError(f"short body: response to {operation} without {needs}")
        return take(response)

    try:
        return retry(act, what)
    except (ClientError, BotoCoreError) as error:
        code = error.response["Error"].get("Code", "") if isinstance(error, ClientError) else type(error).__name__
        if code in ("PreconditionFailed", "412"):
            raise FileExistsError(what) from None
        raise OSError(f"AWS Error {_ARROW_CODES.get(code, code)}: {error}") from None


class RetryingParts:
    """Byte ranges of an object, readable from any thread. Each range is one request, retried on connection errors."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._file = retry(lambda: filesystem().open_input_file(key), f"s3://{key}")

    def size(self) -> int:
        return self._file.size()

    def read_at(self, num_bytes: int, offset: int) -> bytes:
        if num_bytes >= _LARGE_BYTES:
            return _read_large(self._key, num_bytes, offset)
        return retry(lambda: check_length(self._file.read_at(num_bytes, offset), num_bytes), f"s3://{self._key}")


def _read_large(key: str, num_bytes: int, offset: int) -> bytes:
    bucket, _, name = key.partition("/")
    return _request(
        "get_object",
        f"s3://{key}",
        take=lambda response: check_length(response["Body"].read(), num_bytes),
        Bucket=bucket,
        Key=name,
        Range=f"bytes={offset}-{offset + num_bytes - 1}",
    )


def endpoint() -> str | None:
    """Return the store's URL, or None for AWS."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def filesystem() -> pafs.S3FileSystem:
    """Return this process's pyarrow client."""
    return _filesystem_at(endpoint(), os.getpid())


@lru_cache(maxsize=4)
def _filesystem_at(address: str | None, pid: int) -> pafs.S3FileSystem:
    """Create pyarrow's client. Retries are mostly left to `retry`.

    Delayed opening makes a small file one PUT instead of a multipart upload.
    """
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
    """Return this process's boto3 client."""
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
    # A new session, because the default one keeps the first credentials that it read.
    return boto3.Session().client("s3", endpoint_url=address, config=config, region_name=region)


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
