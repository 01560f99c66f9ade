"""Addresses of services: how "host:port" is read, when it never leaves this machine, and how a URL is shown.

Nodes announce endpoints on chain, operators listen on them. Promises the same reading on every side, since plaintext
is allowed on loopback only. Resolves no names.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

MAXIMUM_PORT: Final = 65_535


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port"; ValueError otherwise."""
    host, separator, port = endpoint.rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > MAXIMUM_PORT:
        raise ValueError(f"{endpoint!r} is not host:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not host or any(character.isspace() or character in "/@?#" for character in host):
        raise ValueError(f"{endpoint!r} is not host:port")
    return host, int(port)


def is_loopback(endpoint: str) -> bool:
    """Whether an endpoint never leaves this machine: only then is plaintext allowed. ValueError if it is none."""
    host = split_endpoint(endpoint)[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def masked_url(url: str) -> str:
    """`url` for people: without the password in it, and without a query or, over HTTP, a long path segment, where
    providers of chain endpoints put keys.
    """
    masked = re.sub(r"(://[^/@:]*):[^/]*@", r"\1:**********@", url)
    masked = re.sub(r"\?.*", "?**********", masked)
    if masked.startswith(("http://", "https://")):
        masked = re.sub(r"(?<=/)[A-Za-z0-9_-]{20,}(?=[/?]|$)", "**********", masked)
    return masked
