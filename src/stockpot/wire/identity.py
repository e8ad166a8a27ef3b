"""Who calls: the caller of a request by its key, and who may administer the server."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal

from pydantic import SecretStr
from starlette.requests import Request

from stockpot.caller import NOBODY, Caller, Limits
from stockpot.clock import Clock, SystemClock
from stockpot.errors import Forbidden, RequestError, Unauthenticated
from stockpot.identity.key import key_id_of
from stockpot.identity.rate import WrongKeys
from stockpot.identity.resolver import Resolver, TooManyKeys
from stockpot.settings import AccessSettings

_GOOD_MAX = 10_000

# What tells of a proxy in between: the peer's address is then the proxy's, and says nothing of the caller.
_FORWARDING = (
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
)


class TooManyWrongKeys(RequestError):
    """The client's address has sent so many wrong keys that no more are looked at for a while."""

    status = 429
    code = "too_many_wrong_keys"


class Identity:
    """Tells callers by their keys (`Authorization: Bearer KEY` or `x-api-key: KEY`): virtual ones, and those
    of the settings (`access.tenants`, `access.admin_key`).

    Digests are compared, with all that are configured: how long that takes says nothing about any. Each
    address may send twenty wrong keys a minute. Who shares an address with a sender of wrong keys (a proxy's,
    an office's) gets in all the same with a key that was good before.
    """

    def __init__(
        self,
        access: AccessSettings,
        keys: Resolver | None = None,
        *,
        teams: Mapping[str, Limits] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`keys` None: there are no virtual keys. `teams` are the limits of teams (a tenant is one)."""
        teams = teams or {}
        self._tenants = tuple(
            (
                _digest_of(tenant.key),
                Caller(name, name, name, name, team_limits=teams.get(name, NOBODY.team_limits)),
            )
            for name, tenant in access.tenants.items()
        )
        self._admin = None if access.admin_key is None else _digest_of(access.admin_key)
        self._is_required = access.keys == "required" or bool(self._tenants)
        self._keys = keys
        self._wrong = WrongKeys(clock or SystemClock())
        self._good: OrderedDict[tuple[str, str], None] = OrderedDict()

    async def caller(self, request: Request) -> Caller:
        """The caller of a route that is not for administrators. Where keys are asked for, raises
        Unauthenticated without one that is good, Forbidden for an administrator's, TooManyWrongKeys, and what
        `Resolver.resolve` raises."""
        if not self._is_required and not await self._are_there_keys():
            return await self._by_a_new_key(request)
        key = _presented(request, "an API key")
        address = _address(request)
        if self._keys is not None and key_id_of(key) is not None:
            return await self._virtual(self._keys, key, address)
        found = self._configured(key, address)
        if isinstance(found, Caller):
            return found
        raise Forbidden(
            "This is the admin key (access.admin_key): it administers and does nothing else. Use an API key."
        )

    async def administrator(self, request: Request) -> str:
        """The name, for the audit, of a caller that may administer: by the virtual key of an administrator,
        or by the settings.

        With an admin key: whoever has it. With other keys and none such: nobody by the settings. Without any:
        this machine alone, and nothing a proxy or a page in a browser may have sent from here. Raises
        Unauthenticated for keys that are wrong, Forbidden for those of others, TooManyWrongKeys, and what
        `Resolver.resolve_admin` raises.
        """
        key = _key_of(request)
        if self._keys is None or key_id_of(key) is None:
            return await self._by_the_settings(request)
        address = _address(request)
        if not self._keys.was_good(key):
            self._refuse_after_many(address)
        try:
            return await self._keys.resolve_admin(key)
        except Unauthenticated:
            self._wrong.count(address)
            raise

    async def _by_the_settings(self, request: Request) -> str:
        if self._admin is not None:
            key = _presented(request, "the admin key")
            if self._configured(key, _address(request)) == "admin":
                return "admin key"
            raise Forbidden("This key may not administer; use the admin key (access.admin_key).")
        if self._is_required or await self._are_there_keys():
            # What comes from this machine may be anybody's, through a proxy that does not say so.
            raise Forbidden(
                "This server has keys, and is administered with one too: set access.admin_key, or make"
                " one with 'stockpot keys create --admin', and send it as 'Authorization: Bearer KEY'."
            )
        if not _is_local(request):
            raise Forbidden(
                "Without an admin key the server is administered from its own machine only, directly. Set"
                " access.admin_key, or create a key with 'stockpot keys create --admin', and send it as"
                " 'Authorization: Bearer KEY'."
            )
        return "local"

    async def _are_there_keys(self) -> bool:
        """Whether there are virtual keys, so that everybody needs one."""
        if self._keys is None:
            return False
        known = self._keys.exist_now()
        return known if known is not None else await self._keys.keys_exist()

    async def _by_a_new_key(self, request: Request) -> Caller:
        """The caller where no keys are known, and nobody needs one: that there are some is learnt up to two
        seconds late, but the limits of a key hold from its first request on."""
        key = _key_of(request)
        if self._keys is None or key_id_of(key) is None:
            return NOBODY
        try:
            return await self._keys.resolve(key)
        except (Unauthenticated, TooManyKeys):
            return NOBODY

    async def _virtual(self, keys: Resolver, key: str, address: str) -> Caller:
        try:
            found = keys.resolve_now(key)
            if found is not None:
                return found
            if not keys.was_good(key):
                self._refuse_after_many(address)
            return await keys.resolve(key)
        except Unauthenticated:
            self._refuse_after_many(address)
            self._wrong.count(address)
            raise

    def _configured(self, key: str, address: str) -> Caller | Literal["admin"]:
        """Whose key of the settings it is. Raises Unauthenticated, TooManyWrongKeys.

        These keys may have been chosen by people, so an address that guesses is not told when it is right.
        """
        digest = _digest(key.encode("latin-1"))  # as header values are decoded
        found: Caller | Literal["admin"] | None = None
        for configured, caller in self._tenants:
            if hmac.compare_digest(digest, configured):
                found = caller
        if self._admin is not None and hmac.compare_digest(digest, self._admin):
            found = "admin"
        place = (address, found.tenant if isinstance(found, Caller) else "")
        if found is None or place not in self._good:
            self._refuse_after_many(address)
        if found is None:
            self._wrong.count(address)
            raise Unauthenticated(
                "The API key is not one of this server's; check it. Keys are made with 'stockpot keys create'"
                " or set in access.tenants."
            )
        if place not in self._good:
            self._good[place] = None
            if len(self._good) > _GOOD_MAX:
                self._good.popitem(last=False)
        return found

    def _refuse_after_many(self, address: str) -> None:
        wait_s = self._wrong.wait_s(address)
        if wait_s > 0:
            raise TooManyWrongKeys(
                f"Too many wrong keys came from {address or 'this address'}; no more are looked at for now."
                f" Try again in {math.ceil(wait_s)} s, with a key that is right.",
                retry_after_s=wait_s,
            )


def _presented(request: Request, wanted: str) -> str:
    """The key a request carries. Raises Unauthenticated where it has none."""
    key = _key_of(request)
    if not key:
        raise Unauthenticated(f"This needs {wanted}; send it as 'Authorization: Bearer KEY'.")
    return key


def _key_of(request: Request) -> str:
    """The key a request carries; "": none."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    key = key.strip() if scheme.lower() == "bearer" else ""
    return key or request.headers.get("x-api-key", "").strip()


def _address(request: Request) -> str:
    return "" if request.client is None else request.client.host


def _is_local(request: Request) -> bool:
    """Whether a program on this machine sent the request to this server itself.

    Browsers run here too, with pages from anywhere: an `Origin` tells of one, and so does a name in `Host`
    that somebody has pointed at this machine (DNS rebinding).
    """
    if request.client is None or not is_this_machine(request.client.host):
        return False
    if "origin" in request.headers or any(name in request.headers for name in _FORWARDING):
        return False
    host = request.headers.get("host", "")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return is_this_machine(name)


def is_this_machine(host: str) -> bool:
    """Whether a name or an address means the machine itself."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _digest_of(secret: SecretStr) -> bytes:
    return _digest(secret.get_secret_value().encode())


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
