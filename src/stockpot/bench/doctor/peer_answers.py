"""Run by a peer's own Python: what it says of each conversation, given to it one by one, as it wants them.

`python peer_answers.py NAME FOLDER`: in it `conversations.json` (by name a list of requests: `at`,
`provider`, `body` as it was sent, `chat` the same in OpenAI's chat shape, `response`); `answers.json` (by
name what the peer named: codes of its own) is written. Imports nothing of Stockpot, which is not installed
there.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Conversation = list[dict[str, Any]]


def prefixguard(conversation: Conversation, folder: Path) -> list[str]:
    """`PrefixGuard.observe` for each request, as its README has it."""
    del folder
    guard = importlib.import_module("prefixguard").PrefixGuard()
    named: list[str] = []
    for request in conversation:
        chat = request["chat"]
        system = [message for message in chat["messages"] if message["role"] == "system"]
        report = guard.observe(
            [message for message in chat["messages"] if message["role"] != "system"],
            system=system[0]["content"] if system else None,
            tools=chat.get("tools"),
            session="one",
        )
        # What it says before anything broke is advice.
        named += [f"{'' if report.broken else 'LINT '}{finding.cause}" for finding in report.findings]
        if report.broken:
            named.append("BROKEN")
    return named


def promptcachelint(conversation: Conversation, folder: Path) -> list[str]:
    """`Recorder.record`, then `analyze`; findings for information alone are left out."""
    del folder
    package = importlib.import_module("promptcachelint")
    recorder = package.Recorder()
    for request in conversation:
        if request["provider"] not in ("anthropic", "openai"):
            continue
        recorder.record(
            request["provider"],
            request["body"],
            response=request["response"],
            session_id="one",
            at=request["at"],
        )
    report = package.analyze(recorder.records)
    return [finding.code for finding in report.findings if finding.severity != "info"]


def ctxdiff(conversation: Conversation, folder: Path) -> list[str]:
    """A client is wrapped, and its calls are replayed; then `analyze_cache`: kinds of blocks, and how they
    changed."""
    trace = importlib.import_module("ctxdiff").trace
    path = folder / "one.ctrace"
    path.unlink(missing_ok=True)
    tracer = trace.init("one", path=str(path))
    client = tracer.wrap(_client("openai"))
    for request in conversation:
        client.chat.completions.create(**request["chat"])
    tracer.close()
    stores = importlib.import_module("ctxdiff.store.sqlite")
    reader = stores.SQLiteStore(str(path)).open_reader()
    try:
        report = importlib.import_module("ctxdiff.analyze.cache").analyze_cache(reader)
    finally:
        reader.close()
    return [f"{one.culprit_kind}: {one.detail}"[:200] for one in report.breaks]


def kvlint(conversation: Conversation, folder: Path) -> list[str]:
    """`kvlint lint` on a log of the conversation. Parts that are no text it does not read."""
    models = importlib.import_module("kvlint.models")
    requests: list[Any] = []
    for number, request in enumerate(conversation):
        messages = [
            models.Message(role=message["role"], content=message["content"] or "")
            for message in request["chat"]["messages"]
            if isinstance(message["content"], str) or message["content"] is None
        ]
        tools = request["chat"].get("tools")
        requests.append(models.Request(request_id=str(number), messages=messages, tools=tools))
    render = importlib.import_module("kvlint.tokenize.renderer").tokenize_requests
    tokenized = render(_tokenizer(folder), requests)
    findings = importlib.import_module("kvlint.lint.engine").run(requests, tokenized)
    return [finding.rule_id for finding in findings]


def _client(module: str) -> Any:
    """What a wrapper takes for a client of that package; nothing is sent."""

    def create(self: Any, **arguments: Any) -> None:
        del self, arguments

    def made(name: str, **members: Any) -> Any:
        return type(name, (), {"__module__": module, **members})()

    return made("OpenAI", chat=made("Chat", completions=made("Completions", create=create)))


def _tokenizer(folder: Path) -> str:
    """A folder with a tokenizer of bytes and a plain chat template: places and causes do not depend on it."""
    made = folder / "tokenizer"
    if not made.is_dir():
        tokenizers: Any = importlib.import_module("tokenizers")
        transformers: Any = importlib.import_module("transformers")
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {sign: number for number, sign in enumerate(alphabet)}
        model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model)
        fast.chat_template = (
            "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
            "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"
        )
        fast.save_pretrained(str(made))
    return str(made)


PEERS: dict[str, Callable[[Conversation, Path], list[str]]] = {
    "prefixguard": prefixguard,
    "promptcachelint": promptcachelint,
    "ctxdiff": ctxdiff,
    "kvlint": kvlint,
}


def main(name: str, folder: Path) -> None:
    conversations = json.loads((folder / "conversations.json").read_text(encoding="utf-8"))
    answers: dict[str, list[str]] = {}
    for conversation, requests in conversations.items():
        try:
            answers[conversation] = PEERS[name](requests, folder)
        except Exception as error:  # noqa: BLE001  foreign code: what it cannot read, it has said nothing of
            answers[conversation] = [f"FAILED {type(error).__name__}: {error}"[:200]]
    (folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
