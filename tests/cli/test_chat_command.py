"""`stockpot chat` over a fake model: in this process, over HTTP, and through a pipe."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, contextmanager

import pytest
import typer
from typer.testing import CliRunner

from stockpot.backends.fake import FakeBackend, FakeBehaviour
from stockpot.cli import chat
from stockpot.cli.conversation import (
    BackendSource,
    ChatOptions,
    ChatSource,
    Conversation,
    HttpSource,
    TurnFigures,
)
from stockpot.errors import EngineFailed, RequestError, ServerUnreachable
from stockpot.requests import Message
from stockpot.settings import Settings
from stockpot.telemetry.metrics import Metrics
from stockpot.wire.app import create_app
from stockpot.wire.server import Server, listen

pytestmark = pytest.mark.anyio

_OPTIONS = ChatOptions(max_tokens=6, temperature=0)


@contextmanager
def _served(backend: FakeBackend) -> Generator[str]:
    """The address of a server in a thread."""
    server = Server(create_app(backend, Settings(), Metrics(backend.engine_stats)), backend, drain_s=1)
    listener = listen("127.0.0.1", 0)
    loop = asyncio.new_event_loop()

    async def run() -> None:
        await backend.start()
        await server.serve([listener])

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()
        loop.close()


@pytest.fixture(scope="module")
def url() -> Generator[str]:
    """A server that answers at once."""
    with _served(FakeBackend()) as address:
        yield address


@pytest.fixture(params=["backend", "http"])
async def source(request: pytest.FixtureRequest, url: str) -> AsyncGenerator[ChatSource]:
    """Both places a model can be."""
    if request.param == "http":
        yield HttpSource(url, "fake")
        return
    backend = FakeBackend()
    await backend.start()
    yield BackendSource(backend)
    await backend.stop(drain=False)


async def _ask(conversation: Conversation, question: str) -> str:
    async with aclosing(conversation.ask(question)) as pieces:
        return "".join([piece async for piece in pieces])


async def test_a_conversation_grows_and_counts(source: ChatSource) -> None:
    conversation = Conversation(source, _OPTIONS, system="Be brief.")
    first = await _ask(conversation, "one two three four five six seven")
    second = await _ask(conversation, "eight nine")
    roles = [message.role for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [message.content for message in conversation.messages][2::2] == [first, second]
    one, two = conversation.turns
    assert one.completion_tokens == 6
    assert one.ttft_s is not None
    assert one.ttft_s <= one.total_s
    assert two.cached_tokens > 0
    assert two.computed_tokens == two.prompt_tokens - two.cached_tokens
    conversation.clear()
    assert conversation.messages == (Message("system", "Be brief."),)
    assert not conversation.turns


async def test_a_stopped_answer_keeps_what_was_shown(source: ChatSource) -> None:
    conversation = Conversation(source, _OPTIONS)
    async with aclosing(conversation.ask("one two three four")) as pieces:
        shown = await anext(pieces)
    assert conversation.messages == (Message("user", "one two three four"), Message("assistant", shown))
    assert not conversation.turns


async def test_a_refused_question_is_taken_back(source: ChatSource) -> None:
    conversation = Conversation(source, _OPTIONS)
    with pytest.raises(RequestError, match="context"):
        await _ask(conversation, "x" * 5000)
    assert not conversation.messages
    assert await _ask(conversation, "short enough now")


async def test_an_answer_that_fails_midway_is_said() -> None:
    backend = FakeBackend(FakeBehaviour(error_after_tokens=1))
    await backend.start()
    conversation = Conversation(BackendSource(backend), _OPTIONS)
    with pytest.raises(EngineFailed, match="as it was told to"):
        await _ask(conversation, "one two three")
    assert [message.role for message in conversation.messages] == ["user", "assistant"]
    await backend.stop(drain=False)


async def test_nobody_at_the_address(unused_url: str) -> None:
    conversation = Conversation(HttpSource(unused_url, "fake"), _OPTIONS)
    with pytest.raises(ServerUnreachable, match="Is the server still running"):
        await _ask(conversation, "hello")
    assert not conversation.messages


@pytest.fixture
def unused_url() -> str:
    with listen("127.0.0.1", 0) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_rate_counts_the_tokens_after_the_first() -> None:
    assert TurnFigures(10, 4, 11, ttft_s=1.0, total_s=2.0).tokens_per_s == pytest.approx(10)
    assert TurnFigures(10, 4, 1, ttft_s=1.0, total_s=1.0).tokens_per_s is None
    assert TurnFigures(10, 4, 0, ttft_s=None, total_s=1.0).tokens_per_s is None


def _run(arguments: Sequence[str], lines: Sequence[str]) -> tuple[int, str]:
    app = typer.Typer()
    chat.register(app)
    result = CliRunner().invoke(app, list(arguments), input="\n".join(lines) + "\n", env={"COLUMNS": "120"})
    return result.exit_code, result.output


def test_a_pipe_of_questions(url: str) -> None:
    lines = [
        "one two three",
        "",
        "four five",
        "/stats",
        "/nonsense",
        "/new",
        "/stats",
        "/help",
        "/quit",
        "never",
    ]
    code, output = _run(["--url", url, "--max-tokens", "3"], lines)
    assert code == 0, output
    assert output.count("tokens cached") == 2
    assert "computed; TTFT" in output
    assert "There is no command /nonsense" in output
    assert "Nothing asked yet." in output
    assert "forget the conversation" in output
    assert "never" not in output


def test_the_url_may_end_in_v1(url: str) -> None:
    code, output = _run(["--url", f"{url}/v1/", "--model", "fake"], ["hello there"])
    assert code == 0, output
    assert "tokens cached" in output


def test_an_error_in_a_pipe_is_an_exit_code(url: str) -> None:
    app = typer.Typer()
    chat.register(app)
    result = CliRunner().invoke(app, ["--url", url, "--model", "another"], input="hello\n")
    assert isinstance(result.exception, RequestError)
    assert "another" in result.output


def test_no_server_at_a_given_address(unused_url: str) -> None:
    app = typer.Typer()
    chat.register(app)
    result = CliRunner().invoke(app, ["--url", unused_url], input="hello\n")
    assert isinstance(result.exception, ServerUnreachable)
    assert "stockpot serve" in str(result.exception)


# Ctrl-C reaches the processes of the session whose terminal this is.
_PROGRAM = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)

import typer
from stockpot.cli import chat

app = typer.Typer()
chat.register(app)
app()
"""


class _Terminal:
    """A program at a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._seen = ""

    def expect(self, text: str) -> str:
        """What came until `text` did; it counts as read."""
        while text not in self._seen:
            ready, _, _ = select.select([self._ours], [], [], 20)
            assert ready, f"waited for {text!r}, saw {self._seen!r}"
            self._seen += os.read(self._ours, 4096).decode()
        before, _, self._seen = self._seen.partition(text)
        return before

    def interrupt_until(self, text: str) -> None:
        """Ctrl-C until `text` comes: `input` notices one that falls between writing its prompt and reading
        only at the next key."""
        for _ in range(20):
            self.type("\x03")
            while select.select([self._ours], [], [], 1)[0] and text not in self._seen:
                self._seen += os.read(self._ours, 4096).decode()
            if text in self._seen:
                break
        self.expect(text)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def close(self) -> int:
        """The exit code."""
        code = self.process.wait(20)
        os.close(self._ours)
        return code


def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    backend = FakeBackend(FakeBehaviour(token_delay_s=0.05))
    with _served(backend) as address:
        terminal = _Terminal("--url", address)
        terminal.expect("/help lists commands")
        terminal.expect("> ")
        terminal.type("one " * 200 + "\r")
        terminal.expect("\n")
        terminal.expect("one")
        terminal.type("\x03")
        terminal.expect("(stopped)")
        terminal.expect("> ")
        terminal.type("half a line")
        terminal.interrupt_until("Ctrl-D leaves")
        terminal.type("hello\r")
        terminal.expect("tokens cached")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.close() == 0
        assert backend.cancelled == 1
