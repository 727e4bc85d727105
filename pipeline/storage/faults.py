"""Which faults of a store may pass, how long they are waited out, and what the last word of a store means.

Exceptions of the stores' clients are told by name and module, so that none of them is imported here.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pipeline.errors import ConfigError, StorageFullError, TransientError

logger = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 8
"""Tries of one request."""
PATIENCE_S = 180.0
"""After so long no further try is begun, but for requests that are slow by themselves: they get three."""
_FIRST_DELAY_S = 0.25
_LONGEST_DELAY_S = 15.0
_TRIES_OF_SLOW_REQUESTS = 3

# A store's answer that will be the same next time. EEXIST is how a lost race looks.
_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_FINAL_ERRNO = (errno.ENAMETOOLONG, errno.ENOSYS, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
# Requests that a server asks to repeat; every other 4xx is its last word.
_REPEATABLE_STATUS = (408, 409, 425, 429)
# 4xx that say that a request was damaged on its way.
_REPEATABLE_CODES = ("BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")
_CLIENT_MODULES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "azure", "requests", "urllib3")
_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
)
# What a client refuses by itself, whatever the store.
_FINAL_CLIENT_ERRORS = (*_NO_CREDENTIALS, "ParamValidationError", "InvalidRegionError", "NoRegionError")
_FULL_CODES = ("StorageFull", "QuotaExceeded", "InsufficientStorage")
_HINTS = {
    "ExpiredToken": "the credential has expired; renew it and run the same command, which resumes",
    "InvalidToken": "the session token is not valid; renew it and run the same command, which resumes",
    "InvalidAccessKeyId": "the store does not know this access key; check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret does not belong to the access key; check AWS_SECRET_ACCESS_KEY",
    "RequestTimeTooSkewed": "this machine's clock differs from the store's; set it (NTP), then run the same command",
    "NoSuchBucket": "create the bucket first",
}


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, _FINAL) or getattr(error, "errno", None) in _FINAL_ERRNO:
        return False
    if type(error).__name__ in _FINAL_CLIENT_ERRORS or _is_full(error):
        return False
    status = _http_status(error)
    if status is not None and 400 <= status < 500:
        return status in _REPEATABLE_STATUS or store_code(error) in _REPEATABLE_CODES
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, TimeoutError)) or module in _CLIENT_MODULES


def is_lost_race(error: BaseException) -> bool:
    """Whether a conditional request was refused because its condition does not hold.

    Stores name the condition differently: s3fs turns SeaweedFS's 412 into ``OSError(EINVAL)``.
    """
    return any(
        isinstance(link, FileExistsError) or "PreconditionFailed" in str(link) or "conditionNotMet" in str(link)
        for link in _chain(error)
    )


def store_code(error: BaseException) -> str:
    """The store's own name of an error, such as ``ExpiredToken``; empty if it gave none."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def retry(what: str, request: Callable[[], T], *, local: bool = False) -> T:
    """Make a request, again with backoff and full jitter while its faults are transient.

    Raises:
        TransientError: it fails still after eight tries, or after three minutes. Faults of a local disk are raised
            as they are.
        ConfigError: this machine has no credentials for the store.
    """
    started = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except Exception as error:
            if type(error).__name__ in _NO_CREDENTIALS:
                raise ConfigError(
                    f"{what}: no credentials: {error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; and "
                    "AWS_ENDPOINT_URL for a store that is not AWS's"
                ) from error
            if local or not is_transient(error) or is_lost_race(error):
                raise
            out_of_time = time.monotonic() - started > PATIENCE_S and attempt >= _TRIES_OF_SLOW_REQUESTS
            if attempt == ATTEMPTS or out_of_time:
                raise TransientError(f"{what}: failed {attempt} times, last by {_describe(error)}") from error
            delay = random.uniform(0, min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2**attempt))
            logger.warning("storage retry what=%s attempt=%d error=%s", what, attempt, type(error).__name__)
            time.sleep(delay)
    raise AssertionError("unreachable")


@contextmanager
def explained(uri: str, verb: str) -> Iterator[None]:
    """Say of a store's last word what it means for the run.

    Args:
        verb: what was tried, for the message: ``read`` or ``written``.

    Raises:
        ConfigError: credentials, permissions or the address are wrong.
        StorageFullError: there is no room left.
    """
    try:
        yield
    except PermissionError as error:
        raise ConfigError(f"{uri}: cannot be {verb}: {_refusal(error)}") from error
    except NotADirectoryError as error:
        raise ConfigError(f"{uri}: cannot be {verb}: {error}: it is not a folder") from error
    except (OSError, ValueError) as error:
        if isinstance(error, _FINAL):
            raise
        meaning = _meaning(error, uri, verb)
        if meaning is None:
            raise
        raise meaning from error


def _meaning(error: OSError | ValueError, uri: str, verb: str) -> ConfigError | StorageFullError | None:
    if _is_full(error):
        return StorageFullError(
            f"{uri}: cannot be {verb}: it is full ({error}). Make room and run the same command, which resumes"
        )
    if getattr(error, "errno", None) == errno.EROFS:
        return ConfigError(f"{uri}: cannot be {verb}: {error}; the disk is mounted read-only")
    if store_code(error) in _HINTS:
        return ConfigError(f"{uri}: cannot be {verb}: {_refusal(error)}")
    if isinstance(error, ValueError) and "endpoint" in str(error).lower():
        return ConfigError(f"{uri}: {error}; check AWS_ENDPOINT_URL or storage_options.endpoint_url")
    return None


def hint(error: BaseException) -> str:
    """What to do about a store's last word; empty where it says so itself."""
    return _HINTS.get(store_code(error), "")


def credential_problem(error: BaseException) -> str:
    """What to do where a refusal says something about this machine's credentials; empty where it is about the object."""
    return "" if store_code(error) == "NoSuchBucket" else hint(error)


def _refusal(error: BaseException) -> str:
    advice = hint(error) or "access refused: check the credentials, and what they may do here"
    return f"{error}; {advice}"


def _is_full(error: BaseException) -> bool:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(word in store_code(error) for word in _FULL_CODES)


def _http_status(error: BaseException) -> int | None:
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return found if isinstance(found, int) else None
        if isinstance(getattr(link, "status", None), int):
            return int(link.status)  # type: ignore[attr-defined]
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
