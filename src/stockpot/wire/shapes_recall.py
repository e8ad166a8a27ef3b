"""The request bodies of /v1/feedback and /admin/recall/..., strictly typed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from stockpot.errors import RequestError
from stockpot.recall.entry import Selector
from stockpot.wire.shapes_cache import Tenant
from stockpot.wire.shapes_common import Shape

EntryId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=512)]


class FeedbackShape(Shape):
    """About the answer to a request (its id is the answer's `id`), or about an entry
    (`x-stockpot-recall-entry`): one of them."""

    request_id: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    entry: EntryId | None = None
    verdict: Literal["right", "wrong"]


class InvalidateAnswersShape(Shape):
    """Entries that fit all that is given; `everything` stands alone. `before` is a Unix time."""

    id: EntryId | None = None
    tag: Label | None = None
    model: Label | None = None
    tenant: Tenant | None = None
    writer: Label | None = None
    before: float | None = Field(default=None, ge=0)
    everything: bool = False

    def selector(self) -> Selector:
        """Raises RequestError: half of what was meant must never be done, nor all by accident."""
        given = [
            name
            for name in ("id", "tag", "model", "tenant", "writer", "before")
            if getattr(self, name) is not None
        ]
        if bool(given) == self.everything:
            raise RequestError(
                "Send at least one of 'id', 'tag', 'model', 'tenant', 'writer' and 'before', or 'everything':"
                " true alone.",
                param="everything",
            )
        return Selector(**{name: getattr(self, name) for name in given}, everything=self.everything)
