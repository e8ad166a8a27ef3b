"""Files of the Hugging Face hub, or of a mirror with its interface: resumed where they broke off, checked.

The hub answers HEAD with the size and the ETag of a file; of a large file that ETag is the SHA-256 of the
content, and GET is redirected to a storage host, which must not be given the token. Bytes are kept in a
`.part` file whose name holds the ETag, so bytes of two versions never meet in one file.

Source: https://huggingface.co/docs/hub/api and the client library huggingface_hub (`get_hf_file_metadata`).
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import httpx2 as httpx

from stockpot import __version__
from stockpot.errors import DownloadFailed, ModelError, ModelNotFound
from stockpot.models.progress import Progress
from stockpot.models.publish import CHUNK_BYTES, commit, exclusive, require_space

DEFAULT_ENDPOINT = "https://huggingface.co"
MAX_ATTEMPTS = 5
"""Failures in a row, without a single byte between them, before a download is given up."""
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
MAX_REDIRECTS = 5
_TIMEOUT = httpx.Timeout(30.0, connect=15.0)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository: `repo` is "organisation/name", `path` the file's path in it."""

    repo: str
    path: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.path} of {self.repo}"


@dataclass(frozen=True, slots=True)
class Hub:
    """Where the hub is, and who asks. The token is sent to `endpoint` alone and shown nowhere."""

    endpoint: str = DEFAULT_ENDPOINT
    token: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls) -> Hub:
        """`HF_ENDPOINT` and `HF_TOKEN`, which the hub's own tools read as well."""
        endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or DEFAULT_ENDPOINT
        if not endpoint.startswith(("http://", "https://")):
            raise DownloadFailed(f"HF_ENDPOINT is {endpoint!r}; it must begin with https:// or http://.")
        return cls(endpoint, os.environ.get("HF_TOKEN", "").strip() or None)

    def url(self, file: HubFile) -> str:
        return f"{self.endpoint}/{file.repo}/resolve/{quote(file.revision, safe='')}/{quote(file.path)}"

    def headers(self) -> dict[str, str]:
        """Headers for the endpoint itself; httpx drops `Authorization` when a redirect leaves its origin."""
        headers = {"User-Agent": f"stockpot/{__version__}", "Accept-Encoding": "identity"}
        return headers | ({"Authorization": f"Bearer {self.token}"} if self.token else {})


@dataclass(frozen=True, slots=True)
class _Version:
    """What the hub says about a file: its ETag without quotes, its size, its checksum where it is known."""

    etag: str
    size_bytes: int

    @property
    def sha256(self) -> str | None:
        return self.etag if _SHA256.fullmatch(self.etag) else None


class _Transient(Exception):
    """Worth another try. `retry_after_s` is the server's wish."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s


def download(
    file: HubFile,
    target: Path,
    *,
    progress: Progress,
    hub: Hub | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Make sure `target` is the hub's `file`; returns at once when it exists.

    A broken connection is taken up again, in this call and in later ones, as long as the file on the hub is
    the same. Raises ModelNotFound (no such repository or file), DownloadFailed (network, rights, disk,
    checksum; bytes with a wrong checksum are not kept).
    """
    hub = hub or Hub.from_environment()
    with exclusive(target, waiting=progress):
        if target.is_file():
            return
        transfer = _Transfer(hub, file, target, progress)
        failures = 0
        while True:
            before = transfer.received_bytes
            try:
                transfer.attempt()
            except _Transient as error:
                failures = 1 if transfer.received_bytes > before else failures + 1
                delay_s = error.retry_after_s or FIRST_DELAY_S * 2 ** (failures - 1)
                if failures >= MAX_ATTEMPTS or delay_s > MAX_DELAY_S:
                    raise DownloadFailed(
                        f"Downloading {file} from {hub.endpoint} failed {failures} times in a row, last: "
                        f"{error.reason}. What has arrived is kept; the same command goes on from there."
                    ) from error
                sleep(delay_s * random.uniform(0.8, 1.2))
            else:
                return


class _Transfer:
    """The attempts at one file. `received_bytes` counts what came over the network in all of them."""

    def __init__(self, hub: Hub, file: HubFile, target: Path, progress: Progress) -> None:
        self._hub = hub
        self._file = file
        self._target = target
        self._progress = progress
        self.received_bytes = 0

    def attempt(self) -> None:
        """Bring the file as far as this attempt goes; returns when `target` is in place."""
        try:
            with httpx.Client(timeout=_TIMEOUT, max_redirects=MAX_REDIRECTS) as client:
                version = self._describe(client)
                part = self._part(version)
                have = part.stat().st_size if part.is_file() else 0
                if have > version.size_bytes:
                    part.unlink()
                    have = 0
                require_space(part.parent, version.size_bytes - have, str(self._file))
                if have < version.size_bytes or not part.is_file():
                    self._receive(client, version, part, have)
        except httpx.TooManyRedirects as error:
            raise DownloadFailed(f"{self._hub.endpoint} redirects {self._file} in circles.") from error
        except httpx.UnsupportedProtocol as error:
            raise DownloadFailed(
                f"{self._hub.endpoint} redirects {self._file} to something other than http."
            ) from error
        except httpx.TransportError as error:
            raise _Transient(f"{type(error).__name__}: {error}") from error
        except httpx.InvalidURL as error:
            raise DownloadFailed(f"{self._hub.endpoint} is not a usable address: {error}.") from error
        self._verify(version, part)
        commit(part, self._target)

    def _describe(self, client: httpx.Client) -> _Version:
        """Ask for size and ETag. Redirects are followed within the endpoint (a renamed repository) only:
        a redirect to the storage host carries all that is asked for."""
        response = client.head(self._hub.url(self._file), headers=self._hub.headers())
        for _ in range(MAX_REDIRECTS):
            if not response.is_redirect or "x-linked-etag" in response.headers:
                break
            following = response.url.join(response.headers["location"])
            if following.origin != response.url.origin:
                break
            response = client.head(following, headers=self._hub.headers())
        if not response.is_redirect:
            self._check_status(response)
        headers = response.headers
        etag = headers.get("x-linked-etag") or headers.get("etag") or ""
        size = headers.get("x-linked-size") or (
            None if response.is_redirect else headers.get("content-length")
        )
        etag = etag.removeprefix("W/").strip('"')
        if not etag or size is None or not size.isdigit():
            raise DownloadFailed(
                f"{self._hub.endpoint} tells no size and ETag of {self._file}. "
                "Is HF_ENDPOINT a mirror of the hub?"
            )
        return _Version(etag, int(size))

    def _receive(self, client: httpx.Client, version: _Version, part: Path, have: int) -> None:
        """Append the bytes from `have` on to `part`."""
        headers = self._hub.headers()
        if have:
            headers["Range"] = f"bytes={have}-"
            if version.sha256 is None:
                # The storage host's ETags are not the hub's, so this is for files the hub serves itself;
                # large ones are judged by their checksum at the end.
                headers["If-Range"] = f'"{version.etag}"'
        url = self._hub.url(self._file)
        with client.stream("GET", url, headers=headers, follow_redirects=True) as response:
            if response.status_code == 416:
                part.unlink(missing_ok=True)
                raise _Transient("the server has fewer bytes than were kept")
            self._check_status(response)
            resumed = response.status_code == 206
            start = have if resumed else 0
            if resumed and not response.headers.get("content-range", "").startswith(f"bytes {have}-"):
                raise _Transient(
                    f"asked for bytes from {have} on, got {response.headers.get('content-range')}"
                )
            self._append(response, version, part, start)
        if part.stat().st_size < version.size_bytes:
            raise _Transient(f"the connection ended at {part.stat().st_size} of {version.size_bytes} bytes")

    def _append(self, response: httpx.Response, version: _Version, part: Path, start: int) -> None:
        description = f"Downloading {self._target.name}"
        done = start
        with part.open("ab" if start else "wb") as output:
            # As they come: gathered into larger chunks, the last ones would be lost with the connection.
            for chunk in response.iter_raw():
                done += len(chunk)
                if done > version.size_bytes:
                    break
                output.write(chunk)
                self.received_bytes += len(chunk)
                self._progress(description, done, version.size_bytes)
        if done > version.size_bytes:
            part.unlink()
            raise DownloadFailed(
                f"{self._hub.endpoint} sent more than the {version.size_bytes} bytes "
                f"it had promised of {self._file}; try again."
            )

    def _verify(self, version: _Version, part: Path) -> None:
        if version.sha256 is None:
            return
        digest = hashlib.sha256()
        done = 0
        with part.open("rb") as content:
            while chunk := content.read(CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                self._progress(f"Checking {self._target.name}", done, version.size_bytes)
        if digest.hexdigest() != version.sha256:
            part.unlink()
            raise DownloadFailed(
                f"{self._file} arrived with SHA-256 {digest.hexdigest()}, but the hub says {version.sha256}. "
                "The bytes were thrown away; try again, and look for a proxy that alters them."
            )

    def _part(self, version: _Version) -> Path:
        """The `.part` file of this version; those of other versions are removed."""
        tag = hashlib.sha256(version.etag.encode()).hexdigest()[:16]
        part = self._target.with_name(f".{self._target.name}.{tag}.part")
        for other in self._target.parent.glob(f".{_glob_escape(self._target.name)}.*.part"):
            if other != part:
                other.unlink()
        return part

    def _check_status(self, response: httpx.Response) -> None:
        """Raise what a status means; 2xx pass."""
        status = response.status_code
        if response.is_success:
            return
        if status in {408, 425, 429} or status >= 500:
            wish = response.headers.get("retry-after", "")
            raise _Transient(f"HTTP {status}", float(wish) if wish.isdigit() else None)
        raise _refusal(self._hub, self._file, status)


def _refusal(hub: Hub, file: HubFile, status: int) -> ModelError:
    """The sentence for a status that another try will not change."""
    if status == 404:
        return ModelNotFound(
            f"There is no {file} on {hub.endpoint} (HTTP 404). "
            f"Compare the spelling with {hub.endpoint}/{file.repo}."
        )
    if status == 401 and hub.token is None:
        return DownloadFailed(
            f"{hub.endpoint} gives {file} only to people it knows, or has no such repository (HTTP 401). "
            "Compare the spelling; for a private or gated model set HF_TOKEN to an access token."
        )
    if status == 401:
        return DownloadFailed(
            f"{hub.endpoint} does not accept the token in HF_TOKEN for {file} (HTTP 401); make a new one, "
            "with the right to read this repository."
        )
    if status == 403:
        return DownloadFailed(
            f"{hub.endpoint} refuses {file} (HTTP 403): its authors ask for consent first. "
            f"Accept the conditions on {hub.endpoint}/{file.repo}, "
            "and set HF_TOKEN to a token of that account."
        )
    return DownloadFailed(f"{hub.endpoint} answered HTTP {status} to the request for {file}.")


def _glob_escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
