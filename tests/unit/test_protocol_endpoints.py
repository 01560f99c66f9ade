"""Endpoints and URLs: what is one, what is on loopback, and that nothing secret is shown."""

from __future__ import annotations

import pytest

from bsns.protocol.endpoints import is_loopback, masked_url, split_endpoint


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [("[::1]:80", ("::1", 80)), ("host.example:65535", ("host.example", 65_535)), ("127.0.0.1:0", ("127.0.0.1", 0))],
)
def test_split_endpoint_gives_host_and_port(endpoint: str, expected: tuple[str, int]) -> None:
    assert split_endpoint(endpoint) == expected


@pytest.mark.parametrize(
    "endpoint", ["", "host", ":1", "[]:1", "host:65536", "host:-1", "host:\u0661", "a b:1", "u@h:1"]
)
def test_split_endpoint_of_something_else_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="not host:port"):
        split_endpoint(endpoint)


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("127.0.0.1:1", True),
        ("127.3.2.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("192.0.2.1:1", False),
        ("localhost.example:1", False),
        ("127.0.0.1.example:1", False),
    ],
)
def test_is_loopback_is_not_taken_in_by_names(endpoint: str, expected: bool) -> None:
    assert is_loopback(endpoint) is expected


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1:8545", "http://127.0.0.1:8545"),
        ("sqlite:///a-folder-with-a-long-name/c.sqlite", "sqlite:///a-folder-with-a-long-name/c.sqlite"),
        ("postgresql://bsns:hunter2@db/bsns", "postgresql://bsns:**********@db/bsns"),
        ("https://rpc.example/?key=hunter2", "https://rpc.example/?**********"),
        ("https://rpc.example/v3/0123456789abcdef0123", "https://rpc.example/v3/**********"),
    ],
)
def test_masked_url_shows_no_password_query_or_key(url: str, shown: str) -> None:
    assert masked_url(url) == shown
