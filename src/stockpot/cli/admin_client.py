"""A running server's /admin/cache/... and /admin/recall, as commands call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, cast
from urllib.parse import quote

import msgspec
import typer

from stockpot.errors import ServerUnreachable, StockpotError

if TYPE_CHECKING:
    import httpx2

_CONNECT_S = 5.0
_ANSWER_S = 20.0
_LONG_ANSWER_S = 3_600.0

Url = Annotated[str, typer.Option(help="Address of the server.")]
AdminKey = Annotated[
    str | None,
    typer.Option(
        "--admin-key",
        envvar="STOCKPOT_ADMIN_KEY",
        show_default=False,
        help="The server's access.admin_key, where it has one; better given in the environment.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]

DEFAULT_URL = "http://127.0.0.1:8000"


class AdminRefused(StockpotError):
    """The server answered, and did not do it; in its own words. `status` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        # As `cli.main` has them: not there 1, wrong usage 2, something needed is not available 69.
        self.exit_code = 1 if status == 404 else 2 if status < 500 and status != 429 else 69


class AdminClient:
    """Calls one server. Raises ServerUnreachable where there is no Stockpot at `url`, AdminRefused where it
    does not do what it is asked."""

    def __init__(
        self, url: str, key: str | None, *, root: str = "/admin/cache/", key_hint: str = "--admin-key"
    ) -> None:
        """Paths stand below `root`; `key_hint` is how the key is given here."""
        self._url = url
        self._key_hint = key_hint
        self._root = url.rstrip("/").removesuffix("/v1") + root
        if key and not all("!" <= character <= "~" for character in key):
            raise typer.BadParameter("a key is printable ASCII without spaces", param_hint=key_hint)
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def get(self, path: str, **query: str | int | None) -> dict[str, Any]:
        """The figures at a path; parameters that are None are left out."""
        given = {name: value for name, value in query.items() if value is not None}
        return self._call("GET", path, params=given)

    def lines(self, path: str, name: str, **query: str | int | None) -> list[bytes]:
        """The members of a list at a path, each in JSON as the server wrote it."""
        given = {key: value for key, value in query.items() if value is not None}
        content = self._response("GET", path, answer_s=_LONG_ANSWER_S, params=given).content
        return [bytes(each) for each in msgspec.json.decode(content, type=dict[str, list[msgspec.Raw]])[name]]

    def post(self, path: str, body: Mapping[str, Any], *, long: bool = False) -> dict[str, Any]:
        """What came of an order; `long` where the answer may take minutes."""
        return self._call("POST", path, json=body, answer_s=_LONG_ANSWER_S if long else _ANSWER_S)

    def delete(self, path: str) -> dict[str, Any]:
        return self._call("DELETE", path)

    def _call(self, method: str, path: str, *, answer_s: float = _ANSWER_S, **content: Any) -> dict[str, Any]:
        return cast(dict[str, Any], self._response(method, path, answer_s=answer_s, **content).json())

    def _response(self, method: str, path: str, *, answer_s: float, **content: Any) -> httpx2.Response:
        """A good answer, whose body is a JSON object."""
        import httpx2

        address = self._root + path
        try:
            response = httpx2.request(
                method,
                address,
                headers=self._headers,
                timeout=httpx2.Timeout(answer_s, connect=_CONNECT_S),
                **content,
            )
        except httpx2.ReadTimeout as error:
            raise ServerUnreachable(
                f"{address} has not answered for {answer_s:g} s; what was asked may still be done."
            ) from error
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise ServerUnreachable(
                f"No server answers at {self._url} ({error}). Start one with 'stockpot serve',"
                " or give its address with --url."
            ) from error
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.is_success and isinstance(answer, dict):
            return response
        raise self._refusal(address, response.status_code, answer)

    def _refusal(self, address: str, status: int, answer: Any) -> StockpotError:
        error: Any = cast(dict[str, Any], answer).get("error") if isinstance(answer, dict) else None
        detail = cast(dict[str, Any], error) if isinstance(error, dict) else {}
        message, code = detail.get("message"), detail.get("code")
        if not isinstance(message, str) or code in ("not_found", "method_not_allowed"):
            return ServerUnreachable(
                f"{address} answers {status}, not as Stockpot does: is it a Stockpot server of this version?"
                " Give its address with --url."
            )
        if status in (401, 403):
            variable = self._key_hint.removeprefix("--").replace("-", "_").upper()
            message += f" Here: in the environment as STOCKPOT_{variable}, or with {self._key_hint}."
        return AdminRefused(message, status)


def escaped(part: str) -> str:
    """One part of a path, whatever is in it."""
    return quote(part, safe="")
