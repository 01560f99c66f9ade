"""Errors of the node, one small tree.

    NodeError
    ├── Refusal                a call or frame is refused; carries the wire reason and the gRPC code
    ├── SettingsError          a setting or file of the operator cannot be used
    │   ├── KeystoreError      a key file is missing, damaged, readable by others, or the password is wrong
    │   └── PortInUseError     the listening address is taken
    ├── SigningRefusedError    the signing guard has a different digest for this duty
    └── StorageError           the evidence store or the signing guard cannot write
        └── StorageFullError   no space left, or the byte budget is used up

Every message says what its reader can do next. Errors of other packages (`bsns.chain.errors`, `bsns.runtime`) pass
through unchanged.
"""

from __future__ import annotations

from typing import Final

import grpc

from bsns.v1 import common_pb2

ErrorReason = common_pb2.ErrorReason
ERROR_DOMAIN: Final = "bsns"

_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
_CODES: Final[dict[int, grpc.StatusCode]] = {
    common_pb2.ERROR_REASON_MALFORMED_MESSAGE: _INVALID,
    common_pb2.ERROR_REASON_MALFORMED_TENSOR: _INVALID,
    common_pb2.ERROR_REASON_MESSAGE_TOO_LARGE: _INVALID,
    common_pb2.ERROR_REASON_UNKNOWN_SESSION: _PRECONDITION,
    common_pb2.ERROR_REASON_SESSION_TOKEN_INVALID: grpc.StatusCode.UNAUTHENTICATED,
    common_pb2.ERROR_REASON_SESSION_TOKEN_EXPIRED: grpc.StatusCode.UNAUTHENTICATED,
    common_pb2.ERROR_REASON_REQUEST_NOT_ROUTED: _PRECONDITION,
    common_pb2.ERROR_REASON_WRONG_PLAN: _PRECONDITION,
    common_pb2.ERROR_REASON_WRONG_STAGE: _PRECONDITION,
    common_pb2.ERROR_REASON_INPUT_COMMITMENT_MISMATCH: _INVALID,
    common_pb2.ERROR_REASON_CONTEXT_LIMIT: grpc.StatusCode.OUT_OF_RANGE,
    common_pb2.ERROR_REASON_STEP_OUT_OF_ORDER: grpc.StatusCode.OUT_OF_RANGE,
    common_pb2.ERROR_REASON_DIGEST_MISMATCH: grpc.StatusCode.DATA_LOSS,
    common_pb2.ERROR_REASON_SIGNATURE_INVALID: grpc.StatusCode.PERMISSION_DENIED,
    common_pb2.ERROR_REASON_CAPACITY_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    common_pb2.ERROR_REASON_NOT_SEATED: grpc.StatusCode.PERMISSION_DENIED,
    common_pb2.ERROR_REASON_EVIDENCE_UNAVAILABLE: _PRECONDITION,
    common_pb2.ERROR_REASON_NODE_NOT_ACTIVE: _PRECONDITION,
    common_pb2.ERROR_REASON_CHAIN_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    common_pb2.ERROR_REASON_WEIGHTS_UNAVAILABLE: _PRECONDITION,
    common_pb2.ERROR_REASON_PEER_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    common_pb2.ERROR_REASON_NOT_COVERED: _PRECONDITION,
    common_pb2.ERROR_REASON_TICKET_OUT_OF_ORDER: _PRECONDITION,
    common_pb2.ERROR_REASON_DRAINING: grpc.StatusCode.UNAVAILABLE,
    common_pb2.ERROR_REASON_INTERNAL: grpc.StatusCode.INTERNAL,
    common_pb2.ERROR_REASON_NODE_IN_PLACE: _PRECONDITION,
    common_pb2.ERROR_REASON_SESSION_ENDED: _PRECONDITION,
}


class NodeError(Exception):
    """Base of everything the node raises itself."""


class Refusal(NodeError):
    """A call, or one step of one session, is refused; nothing else is affected."""

    def __init__(self, reason: common_pb2.ErrorReason.ValueType, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail

    @property
    def code(self) -> grpc.StatusCode:
        return _CODES.get(int(self.reason), grpc.StatusCode.INTERNAL)

    @property
    def reason_name(self) -> str:
        """For `google.rpc.ErrorInfo.reason`: the name of the enum value, for example ERROR_REASON_WRONG_STAGE."""
        return common_pb2.ErrorReason.Name(self.reason)


class SettingsError(NodeError):
    """A setting or a file given by the operator cannot be used."""


class KeystoreError(SettingsError):
    """A key cannot be read: missing, damaged, readable by others, or the password is wrong."""


class PortInUseError(SettingsError):
    """Another program listens on the address."""


class SigningRefusedError(NodeError):
    """The signing guard holds a different digest for this duty: signing would be equivocation and cost the whole
    stake.
    """


class StorageError(NodeError):
    """A store on disk cannot be read or written."""


class StorageFullError(StorageError):
    """The disk is full, or the byte budget for evidence is used up."""
