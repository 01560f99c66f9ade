"""Addresses of services as "host:port": how they are read, and when they never leave this machine.

Nodes announce them on chain, operators listen on them. Promises the same reading on every side, since plaintext is
allowed on loopback only. Resolves no names.
"""

from __future__ import annotations

import ipaddress
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
