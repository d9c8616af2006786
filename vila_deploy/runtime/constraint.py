"""The contract of what restricts an answer to a grammar, such as JSON of some schema."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TokenConstraint(Protocol):
    """A grammar and the answer so far; one request has it for itself.

    Both methods are called by the engine's thread, in turn: `allowed` before each token is chosen,
    `accept` behind it. What they raise ends the request alone.
    """

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens may come next, [tokens]; ids behind the last one may not.

        A stop token of the model is allowed where the answer may end; at least one token is.
        """
        ...

    def accept(self, token: int) -> None:
        """Append `token`, an allowed one, to the answer."""
        ...
