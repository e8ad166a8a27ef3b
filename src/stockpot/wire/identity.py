"""Who calls: the tenant of a request by its key, and who may administer the server."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass

from pydantic import SecretStr
from starlette.requests import Request

from stockpot.errors import Forbidden, Unauthenticated
from stockpot.settings import AccessSettings

# What tells of a proxy in between: the peer's address is then the proxy's, and says nothing of the caller.
_FORWARDING = (
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `tenant` is "" where no tenants are configured."""

    tenant: str


class Identity:
    """Tells callers by their keys (`Authorization: Bearer KEY` or `x-api-key: KEY`).

    Digests of keys are compared, with all that are configured: how long that takes says nothing about any.
    """

    def __init__(self, access: AccessSettings) -> None:
        self._tenants = tuple((_digest_of(tenant.key), name) for name, tenant in access.tenants.items())
        self._admin = None if access.admin_key is None else _digest_of(access.admin_key)

    def caller(self, request: Request) -> Caller:
        """The caller of a route for tenants. Raises Unauthenticated where tenants are configured and the
        request has the key of none of them."""
        if not self._tenants:
            return Caller("")
        key = _digest(_presented(request, "an API key"))
        found = None
        for configured, name in self._tenants:
            if hmac.compare_digest(key, configured):
                found = name
        if found is None:
            raise Unauthenticated("The API key is not one of this server's (access.tenants); check it.")
        return Caller(found)

    def require_admin(self, request: Request) -> str:
        """The name, for the audit, of a caller that may administer.

        With an admin key: whoever has it; raises Unauthenticated for others. Without one: this machine alone;
        raises Forbidden for others, and for what a proxy or a page in a browser may have sent from here.
        """
        if self._admin is not None:
            if not hmac.compare_digest(_digest(_presented(request, "the admin key")), self._admin):
                raise Unauthenticated("The key is not this server's admin key (access.admin_key); check it.")
            return "admin key"
        if not _is_local(request):
            raise Forbidden(
                "Without an admin key the server is administered from its own machine only, directly. Set"
                " access.admin_key and send it as 'Authorization: Bearer KEY'."
            )
        return "local"


def _presented(request: Request, wanted: str) -> bytes:
    """The key a request carries."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    key = key.strip() if scheme.lower() == "bearer" else ""
    key = key or request.headers.get("x-api-key", "").strip()
    if not key:
        raise Unauthenticated(f"This needs {wanted}; send it as 'Authorization: Bearer KEY'.")
    return key.encode("latin-1")  # as header values are decoded


def _is_local(request: Request) -> bool:
    """Whether a program on this machine sent the request to this server itself.

    Browsers run here too, with pages from anywhere: an `Origin` tells of one, and so does a name in `Host`
    that somebody has pointed at this machine (DNS rebinding).
    """
    if request.client is None or not _is_loopback(request.client.host):
        return False
    if "origin" in request.headers or any(name in request.headers for name in _FORWARDING):
        return False
    host = request.headers.get("host", "")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower() == "localhost" or _is_loopback(name)


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _digest_of(secret: SecretStr) -> bytes:
    return _digest(secret.get_secret_value().encode())


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
