"""Read, write and compare state.json of a work folder: what its finished layers depend on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.files import canonical_json, read_json_object, replace_file

STATE_FILE, TEMPORARY_SUFFIX = "state.json", ".tmp"
BEGIN_AGAIN = "remove this folder to begin again, or choose another -o"

State = dict[str, Any]


class ChangedError(VilaDeployError):
    """Raised when the finished layers do not fit the run that would use them."""


def refuse_change(path: Path, before: State, after: State) -> None:
    """Raise ChangedError if the state that the work in `path` was begun with is another now."""
    for name in {**after, **before}:
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        values = f"was {short(old)} and is {short(new)} now"
        raise changed(path, f"{name} {'has changed' if name.startswith('the ') else values}")


def changed(path: Path, what: str) -> ChangedError:
    """Return the error that says `what` has changed since the work in `path` was begun."""
    fix = f"go back to what it was; or {BEGIN_AGAIN}"
    return ChangedError(f"{what} since this was begun", where=path, fix=fix)


def write_state(path: Path, state: State) -> None:
    """Write state.json into the work folder `path`."""
    temporary = path / f"{STATE_FILE}{TEMPORARY_SUFFIX}"
    temporary.write_text(canonical_json({**state, "sha256": _digest(state)}), "utf-8")
    replace_file(temporary, path / STATE_FILE)


def read_state(path: Path) -> State:
    """Return what is in state.json of the work folder `path`.

    Raises:
        VilaDeployError: it is missing or damaged.
    """
    try:
        state = read_json_object(path / STATE_FILE)
    except VilaDeployError as error:
        raise VilaDeployError(error.what, where=error.where, fix=BEGIN_AGAIN) from error
    if state.pop("sha256", None) != _digest(state):
        raise VilaDeployError("is damaged", where=path / STATE_FILE, fix=BEGIN_AGAIN)
    return state


def _digest(state: State) -> str:
    return hashlib.sha256(canonical_json(state).encode()).hexdigest()
