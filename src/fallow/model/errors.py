"""Everything that can go wrong, each under a public code that never changes."""

from typing import ClassVar, Literal

import msgspec

MESSAGE_MAX = 2_000
PARAM_MAX = 200
NAME_MAX = 200


def shortened(text: str, limit: int = NAME_MAX) -> str:
    """A text from outside, short enough to be said back, and on one line."""
    plain = text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text[: limit + 1])
    return plain if len(plain) <= limit else plain[:limit] + "…"


def leaf(error: BaseException) -> BaseException:
    """The first error that isn't a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A refusal or a fault as a value: it travels over the wire and becomes an HTTP error at the gateway.

    `code` is public and stable. `param` names the request's field that was wrong. `retry_after_ms` is a
    prediction of when trying again makes sense. `progress` is 0 to 1 while something loads.
    """

    code: str
    message: str
    param: str | None = None
    retry_after_ms: int | None = None
    progress: float | None = None


class FallowError(Exception):
    """The root of every error that Fallow raises on purpose. Its text is fit for a user to read."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_ms: int | None = None) -> None:
        message = shortened(message, MESSAGE_MAX)
        super().__init__(message)
        self.message = message
        self.param = None if param is None else shortened(param, PARAM_MAX)
        self.retry_after_ms = retry_after_ms

    def failure(self) -> Failure:
        """The same error as a value."""
        return Failure(code=self.code, message=self.message, param=self.param, retry_after_ms=self.retry_after_ms)


class InvalidRequest(FallowError):
    """The caller's request can't be understood or isn't allowed; trying it again won't help."""

    code = "invalid_request"


class InvalidApiKey(FallowError):
    """No API key, or one that nobody knows."""

    code = "invalid_api_key"


class BudgetSpent(FallowError):
    """What the API key may spend in all is spent, or set aside for calls that are under way."""

    code = "budget_spent"


class BodyTooLarge(FallowError):
    """The request's body is over the limit."""

    code = "body_too_large"


class BodyTimeout(FallowError):
    """The request's body took too long to come."""

    code = "body_timeout"


class EngineFailed(FallowError):
    """The engine died or answered nonsense."""

    code = "engine_failed"


class BodyLost(FallowError):
    """The rest of a request's body did not come to the node."""

    code = "body_lost"


class CallerTooSlow(FallowError):
    """The caller doesn't read the answer."""

    code = "caller_too_slow"


class CannotContinue(FallowError):
    """The node can't go on with an answer that another one began."""

    code = "cannot_continue"


class EngineStalled(FallowError):
    """The engine lives but made no progress for too long."""

    code = "engine_stalled"


class BrokerLost(FallowError):
    """The connection to the broker is down."""

    code = "broker_lost"


class WireError(FallowError):
    """Bytes from outside that aren't what the protocol says."""

    code = "wire_error"


UnopenedReason = Literal["altered", "replayed", "no_session", "no_key", "not_vouched"]
"""Why something sealed isn't taken: altered, or not for us; there before; of a session, or for a KEM key, that isn't known (any more);
from a gateway that nobody vouches for."""


class NotOpened(WireError):
    """Something sealed can't be opened."""

    code = "not_opened"

    def __init__(self, message: str, *, reason: UnopenedReason = "altered") -> None:
        super().__init__(message)
        self.reason: UnopenedReason = reason


class NodeUnreachable(FallowError):
    """Nobody listens at the node's subject."""

    code = "node_unreachable"


class NodeSilent(FallowError):
    """The node doesn't answer."""

    code = "node_silent"


class BadSetting(FallowError):
    """A value in the settings file or a flag is wrong; the text names file, line and what was expected."""

    code = "bad_setting"


class BadFlag(BadSetting):
    """A flag on the command line is wrong."""


class AlreadyRunning(FallowError):
    """Another Fallow process holds this data folder."""

    code = "already_running"


class StartFailed(FallowError):
    """A part of Fallow did not come up."""

    code = "start_failed"


class MissingExtra(FallowError):
    """An optional dependency is needed and not installed; the text names the extra."""

    code = "missing_extra"


class UnknownModel(FallowError):
    """No model of this name is in the catalogue."""

    code = "unknown_model"


class FetchFailed(FallowError):
    """A model could not be fetched."""

    code = "fetch_failed"


class DiskFull(FetchFailed):
    """There is not enough room on the disk."""

    code = "disk_full"


class BadChecksum(FetchFailed):
    """What came is not what the catalogue says it is."""

    code = "bad_checksum"


class NoNetwork(FetchFailed):
    """The source of a model can't be reached."""

    code = "no_network"


class BadModelFile(FetchFailed):
    """A model's file is damaged, or made to harm."""

    code = "bad_model_file"


class LicenceNotAccepted(FetchFailed):
    """The model's licence must be accepted before it is fetched."""

    code = "licence_not_accepted"


class AnswerIncomplete(FallowError):
    """What was asked for did not fit into the tokens that were allowed."""

    code = "answer_incomplete"


class SchemaNotMet(FallowError):
    """The model did not manage to write what fits the schema, however often it was asked."""

    code = "schema_not_met"


class NotAdmitted(FallowError):
    """Who asked to join may not: no invitation, a used-up or expired one, a ban, or too many tries."""

    code = "not_admitted"


class NameTaken(FallowError):
    """There is one of this name already."""

    code = "name_taken"


class UnknownName(FallowError):
    """There is none of this name: an organisation, a key, an invitation, a member."""

    code = "unknown_name"


class StoreFailed(FallowError):
    """The database can't be reached, or doesn't take what should be written."""

    code = "store_failed"
