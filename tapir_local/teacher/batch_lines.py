"""What the Batch API writes and reads: requests as JSON lines in files that are not too large, replies and refusals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import orjson

from tapir_local.recipe.endpoints import Endpoint
from tapir_local.teacher.refusals import Trouble, trouble_of
from tapir_local.teacher.session import Job

if TYPE_CHECKING:
    from openai.types import Batch

URL: Final = "/v1/chat/completions"
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
NO_ROOM = "token_limit_exceeded"  # too many tokens of the account are waiting in batches already


def line_of(job: Job) -> bytes:
    """A request as a line of a batch's input, named by its key."""
    line = {"custom_id": job.key.hex(), "method": "POST", "url": URL, "body": dict(job.body)}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def divided(jobs: Sequence[Job], most: int, size: int) -> Iterator[list[Job]]:
    """The jobs in order, in parts of at most `most` requests and `size` bytes; a larger one is a part of its own."""
    part: list[Job] = []
    filled = 0
    for job in jobs:
        length = len(line_of(job))
        if part and (len(part) == most or filled + length > size):
            yield part
            part, filled = [], 0
        part.append(job)
        filled += length
    if part:
        yield part


def read_lines(raw: bytes) -> dict[bytes, Any]:
    """The lines of an output or error file by key; those that are no JSON or name no key are left out."""
    found: dict[bytes, Any] = {}
    for text in raw.split(b"\n"):
        try:
            line = orjson.loads(text)
            found[bytes.fromhex(line["custom_id"])] = line
        except (ValueError, KeyError, TypeError):
            continue
    return found


def body_in(line: Any) -> bytes | None:
    """The body of the reply in a line, as JSON; None where there is none or it is an error's."""
    response = line.get("response") if line else None
    if not isinstance(response, dict) or response.get("status_code") != 200:
        return None
    return orjson.dumps(response.get("body"))


def trouble_in(line: Any, endpoint: Endpoint, otherwise: str) -> Trouble:
    """Why a line holds no reply; `otherwise` where it does not say, or is None."""
    import httpx2

    response, error = (line.get("response"), line.get("error")) if line else (None, None)
    if isinstance(response, dict):
        status = response.get("status_code")
        content = orjson.dumps(response.get("body"))
        refusal = httpx2.Response(status if isinstance(status, int) else 500, content=content)
        return trouble_of(refusal, endpoint)
    if isinstance(error, dict):  # batch_expired, batch_cancelled, request_timeout
        return Trouble("again", f"{error.get('code')}: {error.get('message')}", orjson.dumps(error))
    return Trouble("again", otherwise)


def id_of(made: Any) -> str:
    """The id of what the server made or showed; ValueError for a reply that is no such thing, as a web page."""
    found = getattr(made, "id", None)
    if not isinstance(found, str) or not found:
        raise ValueError("the reply is not one of a Batch API")
    return found


def has_ended(made: Batch) -> bool:
    """Whether nothing more will come of a batch; not before the answers it counts can be fetched."""
    counts = made.request_counts
    pending = counts and counts.completed and not made.output_file_id
    return made.status == "failed" or (made.status in ENDED and not pending)


def found_no_room(made: Batch) -> bool:
    """Whether a batch failed only because too many tokens were waiting."""
    errors = made.errors.data if made.errors else None
    return made.status == "failed" and any(error.code == NO_ROOM for error in errors or [])


def words_of(made: Batch) -> str:
    """What the server says of a batch that failed."""
    errors = (made.errors.data if made.errors else None) or []
    words = [f"line {error.line}: {error.message}" if error.line else str(error.message) for error in errors]
    return "; ".join(words)[:1000] or "the endpoint does not say why"


def told(batches: Sequence[Batch]) -> str:
    """`2 batches (in_progress, validating): 120 of 1,000 answered`; while it validates, the server counts 0 of 0."""
    if not batches:
        return "waiting for answers that another run is asking for"
    many = "batch" if len(batches) == 1 else f"{len(batches)} batches"
    states = ", ".join(sorted({made.status for made in batches}))
    counts = [made.request_counts for made in batches if made.request_counts]
    completed, total = sum(count.completed for count in counts), sum(count.total for count in counts)
    return f"{many} ({states}): {completed:,} of {total:,} answered"
