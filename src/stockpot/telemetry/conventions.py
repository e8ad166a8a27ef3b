"""All names that spans carry: those of OpenTelemetry's GenAI conventions, and our own.

The conventions are those of semantic-conventions 1.44, the state in which they moved to a repository of their
own (open-telemetry/semantic-conventions-genai); their stability is "development". They know no gateway: the
span of a request is of kind SERVER here, each attempt below it is the inference span (CLIENT) they describe.
They know no caches of answers either: `stockpot.recall.*` is on the span of the request, which has no
attempts below it where an answer was kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from stockpot.records import Operation
from stockpot.requests import AnyRequest, ChatRequest, CompletionRequest
from stockpot.settings_gateway import BackendSettings

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"

OPERATION_NAME = "gen_ai.operation.name"
PROVIDER_NAME = "gen_ai.provider.name"
CONVERSATION_ID = "gen_ai.conversation.id"
OUTPUT_TYPE = "gen_ai.output.type"
INPUT_MESSAGES = "gen_ai.input.messages"
REQUEST_MODEL = "gen_ai.request.model"
REQUEST_STREAM = "gen_ai.request.stream"
REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
REQUEST_CHOICE_COUNT = "gen_ai.request.choice.count"
REQUEST_TEMPERATURE = "gen_ai.request.temperature"
REQUEST_TOP_P = "gen_ai.request.top_p"
REQUEST_SEED = "gen_ai.request.seed"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_FINISH_REASONS = "gen_ai.response.finish_reasons"
RESPONSE_TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
USAGE_INPUT_TOKENS = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
USAGE_CACHE_READ = "gen_ai.usage.cache_read.input_tokens"
USAGE_CACHE_CREATION = "gen_ai.usage.cache_creation.input_tokens"
ERROR_TYPE = "error.type"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"
SERVICE_NAME = "service.name"
SERVICE_VERSION = "service.version"

REQUEST_ID = "stockpot.request.id"
CLIENT_REQUEST_ID = "stockpot.request.client_id"
PRIORITY = "stockpot.request.priority"
KEY_ID = "stockpot.key.id"
TEAM = "stockpot.team"
TAGS = "stockpot.tags"
TASK = "stockpot.task"
BACKEND = "stockpot.backend"
ATTEMPTS = "stockpot.attempts"
HEDGE = "stockpot.hedge"
SHARED = "stockpot.shared"
NOTICES = "stockpot.notices"
CACHE_OUTCOME = "stockpot.cache.outcome"
TOKENS_ESTIMATED = "stockpot.usage.estimated"
COST_USD = "stockpot.cost.usd"
COST_SOURCE = "stockpot.cost.source"
QUEUE_S = "stockpot.queue_s"
RECALL_OUTCOME = "stockpot.recall.outcome"
RECALL_REASON = "stockpot.recall.reason"
RECALL_ENTRY = "stockpot.recall.entry"
RECALL_AGE_S = "stockpot.recall.age_s"
RECALL_SIMILARITY = "stockpot.recall.similarity"
RECALL_ERROR_UPPER = "stockpot.recall.error_upper"
RECALL_WOULD = "stockpot.recall.would"
RECALL_SAVED_PROMPT_TOKENS = "stockpot.recall.saved_prompt_tokens"
RECALL_SAVED_OUTPUT_TOKENS = "stockpot.recall.saved_output_tokens"
RECALL_SAVED_USD = "stockpot.recall.saved_usd"
RECALL_SAVED_S = "stockpot.recall.saved_s"
TTFT_S = "stockpot.ttft_s"
TPOT_S = "stockpot.tpot_s"

OPERATIONS: Mapping[Operation, str] = {
    "chat": "chat",
    "completion": "text_completion",
    "embedding": "embeddings",
}

_PROVIDERS = {
    "aws": "aws.bedrock",
    "azure": "azure.ai.openai",
    "google": "gcp.gemini",
    "mistral": "mistral_ai",
    "x-ai": "x_ai",
}
"""Where genai-prices, whose names `backends.NAME.provider` has, calls a provider otherwise."""


def operation_of(request: AnyRequest) -> str:
    """The value of `gen_ai.operation.name`."""
    if isinstance(request, ChatRequest):
        return OPERATIONS["chat"]
    return OPERATIONS["completion" if isinstance(request, CompletionRequest) else "embedding"]


def provider_of(settings: BackendSettings) -> str:
    """The value of `gen_ai.provider.name`: whose prices apply, else the server, else whose API it speaks."""
    if settings.provider is not None:
        return _PROVIDERS.get(settings.provider, settings.provider)
    return settings.kind if settings.server == "generic" else settings.server


def address_of(settings: BackendSettings) -> dict[str, str | int]:
    """Host and port of a backend; nothing else of its URL, which may hold secrets."""
    url = urlsplit(settings.url)
    port = url.port or (443 if url.scheme == "https" else 80)
    return {SERVER_ADDRESS: url.hostname or "", SERVER_PORT: port}
