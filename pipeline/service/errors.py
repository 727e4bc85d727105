"""Why a request is not answered with what it asked for."""

from __future__ import annotations

import re
from typing import Any

from pipeline.errors import PipelineError, TerminalError

_JOB_SETTING = re.compile(r"\binput\.(?=[a-z])")
"""``input.layout`` of the decode job is the parameter ``layout`` of a request."""


class RequestError(PipelineError):
    """A request that is refused or cannot be served, as HTTP says it.

    Args:
        status: of HTTP; 4xx where the request is to blame or may be repeated, 5xx where the service is.
        reason: a short code to count by, such as ``queue_full``.
        detail: one sentence for a person: what happened, what was expected, what to do.
        retry_after_s: when the same request may succeed; None: not at all, or nobody knows.
    """

    def __init__(self, status: int, reason: str, detail: str, retry_after_s: int | None = None) -> None:
        super().__init__(status, reason, detail, retry_after_s)
        self.status = status
        self.reason = reason
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.headers: dict[str, str] = {}
        """What HTTP says beside it."""

    @classmethod
    def unprocessable(cls, error: TerminalError) -> RequestError:
        """The request's own content cannot be decoded."""
        return cls(422, error.reason, _JOB_SETTING.sub("", error.detail))

    def to_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": {"reason": self.reason, "detail": self.detail}}

    def __str__(self) -> str:
        return f"{self.status} {self.reason}: {self.detail}"
