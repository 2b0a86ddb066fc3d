"""Translate errors of a disk or an S3 store into messages with a remedy."""

from mae_core.errors import UserError

_MISSING = ("NoSuchKey", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "HTTP status 404")
_DENIED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "HTTP status 403", "INVALID_CLIENT")


def named_error(error: OSError, verb: str, where: str, is_local: bool) -> Exception:
    """Return an error that names the URI, the operation and the remedy, and no credential."""
    text = str(error)
    if isinstance(error, PermissionError) or any(sign in text for sign in _DENIED):
        remedy = "check the folder's owner and mode" if is_local else "check the credentials and their policy"
        return PermissionError(f"no permission to {verb} {where}; {remedy}")
    if isinstance(error, FileNotFoundError) or any(sign in text for sign in _MISSING):
        return FileNotFoundError(f"{where} does not exist; check the path")
    if "NO_SUCH_BUCKET" in text:
        return FileNotFoundError(f"the bucket of {where} does not exist; create it first")
    if isinstance(error, NotADirectoryError | IsADirectoryError | FileExistsError):
        return UserError(f"cannot {verb} {where}: a file stands where a folder should, or the reverse")
    return OSError(f"cannot {verb} {where}: {text.splitlines()[0] if text else type(error).__name__}")
