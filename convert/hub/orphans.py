"""What killed downloads leave in the usual Hub cache, and when it may be deleted.

huggingface_hub downloads to `blobs/SHA256.RANDOM.incomplete` and never uses such a file again, so
each kill costs up to a whole shard of space. Other programs use the same cache at the same time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

from layerpack.convert.hub.download import usual_cache

_ABANDONED_S = 600.0
"""A download that gets no bytes for so long has failed: its client gives up much sooner."""


def clear_orphans(repo: str, digests: Iterable[str]) -> None:
    """Delete partial downloads of the files with these sha256 (hex) that no process writes.

    Does not wait. Two signs are asked for: huggingface_hub's own lock is free, and nothing has come
    for ten minutes, as network file systems may give a lock to everybody. What cannot be deleted
    stays.
    """
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    cache, folder = usual_cache(), repo_folder_name(repo_id=repo, repo_type="model")
    for digest in digests:
        orphans = list((cache / folder / "blobs").glob(f"{digest}.????????.incomplete"))
        lock = cache / ".locks" / folder / f"{digest}.lock"
        # OSError: a cache that may not be written to, or (TimeoutError) a lock that is taken.
        with contextlib.suppress(OSError):
            if orphans:
                lock.parent.mkdir(parents=True, exist_ok=True)
                with WeakFileLock(lock, timeout=0.01):
                    for orphan in orphans:
                        if time.time() - orphan.stat().st_mtime > _ABANDONED_S:
                            orphan.unlink()
