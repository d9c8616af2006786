"""Turn what can go wrong between here and the hub into one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vila_deploy.checkpoint.hub.name import HubName
from vila_deploy.utils.errors import VilaDeployError, short

# Answers of a busy hub.
PASSING = (408, 429, 500, 502, 503, 504)
AGAIN = "the same command goes on where this one ended"


@contextmanager
def one_line(name: HubName) -> Iterator[None]:
    """Raise VilaDeployError for every problem with the hub, its cache and the connection."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except VilaDeployError:
        raise
    except HfHubHTTPError as error:
        raise _refused(name, error) from error
    except (transport_error(), OSError, EOFError, HFValidationError) as error:
        raise _unreachable(name, error) from error


def transport_error() -> type[Exception]:
    """Return the base class of httpx's errors, of whichever httpx huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def is_passing(error: Exception) -> bool:
    """Return whether the same request may well succeed in a second."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    return isinstance(error, (transport_error(), EOFError))


def _refused(name: HubName, error: Exception) -> VilaDeployError:
    """Return the error for an answer of the hub that is no success."""
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{_endpoint()}/{name.repository}"
    if isinstance(error, GatedRepoError):
        what, fix = "is gated", f"accept its conditions on {page}, then run 'hf auth login'"
    elif isinstance(error, RepositoryNotFoundError):
        what = "is neither a folder here nor a repository of the hub that you may read"
        fix = "check the spelling; for a private one run 'hf auth login' first"
    elif isinstance(error, RevisionNotFoundError):
        what, fix = f"has no revision {short(name.revision)}", f"{page}/tree/main lists them"
    elif isinstance(error, RemoteEntryNotFoundError):
        what, fix = "has changed while it was fetched", AGAIN
    elif isinstance(error, DisabledRepoError):
        what, fix = "was disabled by the hub", "use another copy of this checkpoint"
    else:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        what = f"cannot be fetched, the hub answers {status}"
        fix = {
            401: "the token is not valid: run 'hf auth login'",
            403: f"your token may not read it: see {page}",
            429: "too many requests: wait some minutes",
        }.get(status or 0, f"try again later; {AGAIN}")
    return VilaDeployError(what, where=str(name), fix=fix)


def _unreachable(name: HubName, error: Exception) -> VilaDeployError:
    """Return the error for a connection that fails, a cache that lacks files, or a disk."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, HFValidationError):
        what, fix = "is no name of a repository", "give OWNER/NAME or OWNER/NAME@REVISION"
    elif constants.HF_HUB_OFFLINE and isinstance(
        error, LocalEntryNotFoundError | OfflineModeIsEnabled
    ):
        what = "is no folder here, and not or not whole in the hub's cache; HF_HUB_OFFLINE is set"
        fix = "unset it, or fetch it where there is a connection and copy the cache"
    elif isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return VilaDeployError(
            f"cannot write: {error.strerror}",
            where=error.filename,
            fix="free some space, or set HF_HOME to a folder on another disk",
        )
    else:
        reason = type(error.__cause__ or error).__name__
        what = f"is no folder here, and {_endpoint()} cannot be reached ({reason})"
        fix = "check the spelling and the connection; what was fetched before is kept"
    return VilaDeployError(what, where=str(name), fix=fix)


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
