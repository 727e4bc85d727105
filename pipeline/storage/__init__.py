"""The one door to files and object stores, through fsspec.

Everything that the pipeline keeps is either immutable and *put if absent*, which is how work is committed,
or small and replaced whole (``status.json``). Nothing specific to one store stands outside this package.

    faults.py   which faults may pass, how often and how long a call is repeated, what the last word means
    client.py   one request on a clock: S3's own calls where the store is S3, fsspec's elsewhere
    local.py    durable files on a local disk
    folder.py   ``Storage``: the folder that everybody else sees
"""

from pipeline.storage.client import (
    LISTING_TIMEOUT_S,
    ObjectChangedError,
    StoredObject,
    call,
    client_options,
    fetch_object,
    list_objects,
    object_version,
    open_filesystem,
    read_object,
    read_span,
    stat_object,
)
from pipeline.storage.faults import credential_problem, is_lost_race, is_transient, retry
from pipeline.storage.folder import PROBE_PREFIX, Storage
from pipeline.storage.local import TEMPORARY_FOLDER

__all__ = [
    "LISTING_TIMEOUT_S",
    "PROBE_PREFIX",
    "TEMPORARY_FOLDER",
    "ObjectChangedError",
    "Storage",
    "StoredObject",
    "call",
    "client_options",
    "credential_problem",
    "fetch_object",
    "is_lost_race",
    "is_transient",
    "list_objects",
    "object_version",
    "open_filesystem",
    "read_object",
    "read_span",
    "retry",
    "stat_object",
]
