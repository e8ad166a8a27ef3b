"""Running several requests at once and failing as one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar, cast

T = TypeVar("T")


async def run_all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. The first failure cancels the rest and is raised itself, not in a group, so that
    it reaches the command line as what it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failures:
        raise _first(failures) from failures
    return [task.result() for task in tasks]


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    one = failures.exceptions[0]
    return (
        _first(cast(BaseExceptionGroup[BaseException], one)) if isinstance(one, BaseExceptionGroup) else one
    )
