"""The official OpenAI client, for any server of these tests."""

from __future__ import annotations

from openai import AsyncOpenAI


def official(url: str) -> AsyncOpenAI:
    """A client that tries nothing again by itself."""
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
