"""Says which requests may be given a kept answer, and whose answers those may be.

A request says the same thing twice only where chance has no part in the answer, and where all that decides
it is in the request. Who shares answers is the operator's word: a tenant, or each key by itself. What callers
with an untrusted tag cause to be kept is given to them alone, while they may be given what the tenant's
others made. Tags also come from a header, and no tag makes anybody more trusted than none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from stockpot.caller import Caller
from stockpot.requests import ChatRequest, GenerationRequest, ImagePart, OpaquePart, Part
from stockpot.settings_recall import RecallSettings

_OUTSIDE = frozenset(("container", "mcp_servers", "plugins", "web_search_options"))
"""Fields of providers that let the answer depend on what they find elsewhere."""


@dataclass(frozen=True, slots=True)
class Scopes:
    """`write` is where the answer is kept; `read` where one is looked for, in this order."""

    write: str
    read: tuple[str, ...]


def exact_refusal(request: GenerationRequest, settings: RecallSettings) -> str:
    """Why no kept answer is looked for and none is kept; "": it may be.

    model: not one of those the operator chose. sampled: chance decides, and the operator does not say that
    any answer will do. remote: it rests on what only its address stands for (an image elsewhere, an upload,
    a search), which may be another tomorrow. no_key: its answer would be for its own key, and it has none.
    """
    generation = request.generation
    if settings.models is not None and generation.model not in settings.models:
        return "model"
    sampling = generation.sampling
    if not (sampling.temperature == 0 or sampling.seed is not None or settings.sampled):
        return "sampled"
    if _is_remote(request):
        return "remote"
    if not generation.caller.key_id and _is_alone(generation.caller, settings):
        return "no_key"
    return ""


def scopes_of(request: GenerationRequest, settings: RecallSettings) -> Scopes:
    """Whose answers a request may be given, and who may be given its answer.

    The same for every request of a tenant, or of a key: an answer found in one scope is compared with it
    once more (`Entry.scope`)."""
    generation = request.generation
    return _scopes(generation.tenant, generation.caller, settings)


def scopes_of_caller(caller: Caller, settings: RecallSettings) -> Scopes:
    """The same, of whoever asks, without a request."""
    return _scopes(caller.tenant, caller, settings)


def _scopes(tenant: str, caller: Caller, settings: RecallSettings) -> Scopes:
    # No tenant's name may end where another's key begins.
    tenant = tenant.replace("\0", "\0\0")
    if not _is_alone(caller, settings):
        return Scopes(tenant, (tenant,))
    own = f"{tenant}\0key:{caller.key_id}"
    return Scopes(own, (own,) if settings.scope == "key" else (own, tenant))


def _is_alone(caller: Caller, settings: RecallSettings) -> bool:
    """Whether what it causes to be kept is for its own key."""
    return settings.scope == "key" or not set(settings.untrusted_tags).isdisjoint(caller.tags)


def _is_remote(request: GenerationRequest) -> bool:
    if not _OUTSIDE.isdisjoint(request.generation.extras):
        return True
    if not isinstance(request, ChatRequest):
        return False
    return any(_points_elsewhere(part) for message in request.messages for part in message.parts)


def _points_elsewhere(part: Part) -> bool:
    match part:
        case ImagePart():
            return part.url is not None
        case OpaquePart():
            return _has_address(part.value)
        case _:
            return False


def _has_address(value: Mapping[str, Any]) -> bool:
    """Whether JSON holds the address of a file, or the id of one that was uploaded."""
    # Not by recursion: how deep it is nested is up to its sender.
    left: list[Any] = [value]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            item = cast(Mapping[str, Any], one)
            if any(name == "file_id" or name.endswith(("url", "uri")) for name in item):
                return True
            left.extend(item.values())
        elif isinstance(one, list | tuple):
            left.extend(cast(Sequence[Any], one))
    return False
