"""The contract of a running engine: key/value caches in slots, numpy in and out.

`Session` is what callers use. A backend whose engine holds one sequence implements
`SequenceSession`, and `OneSlot` makes a Session of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError


class Session(Protocol):
    """A running engine that holds the caches of several sequences, each in a slot of its own.

    Slots are numbered from 0 to `slots` - 1; all begin empty and are independent: what one holds
    changes no logits of another. A number out of that range, or a slot named twice in one call,
    raises ValueError. Calls come from one thread at a time.
    """

    @property
    def slots(self) -> int:
        """Sequences that the engine holds at once (--max-batch-size)."""
        ...

    @property
    def max_seq_len(self) -> int:
        """Tokens that fit into each slot."""
        ...

    @property
    def prefill_chunk(self) -> int:
        """Tokens that one pass of a prefill takes; more are several passes."""
        ...

    def length(self, slot: int) -> int:
        """Return how many tokens `slot` holds."""
        ...

    def keep(self, slot: int, tokens: int) -> None:
        """Forget all but the first `tokens` of `slot`; 0 frees it.

        Raises:
            ValueError: `tokens` is negative or more than `length(slot)`.
        """
        ...

    def prefill(
        self, slot: int, embeds: Floats, all_logits: bool = False, more: bool = False
    ) -> Floats:
        """Append [tokens, hidden] to `slot` and return the last token's logits [vocab].

        The whole prompt or any part of it; a scheduler hands it over in chunks to let other slots
        decode in between.

        Args:
            all_logits: return the logits of every token instead, [tokens, vocab].
            more: the prompt goes on, so that logits need not be computed; those returned mean
                nothing then.

        Raises:
            VilaDeployError: no tokens, or too many to fit; `slot` has not changed then.
        """
        ...

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Floats:
        """Append one token to each of `slots` and return their next logits [len(slots), vocab].

        Raises:
            VilaDeployError: one of them is full; none has changed then.
        """
        ...

    def stream(
        self, slot: int, stop_token_ids: Collection[int], sampling: SamplingParams
    ) -> Iterator[int] | None:
        """Return the tokens that follow the last prefill or decode, chosen on the device.

        None if the engine has no sampling of its own: then the caller samples and decodes. The
        iterator ends behind a stop token, `max_new_tokens` or a full slot. It appends every token
        but its last to `slot`, as a loop of `decode` would; close it before another call.
        """
        ...

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        """Return the projected features [images, tokens, hidden] of tiles [tiles, 3, size, size].

        Args:
            grid: None: every tile is an image of its own. (rows, columns): the tiles are one image
                at all its scales, and this is how those of the largest lie.
        """
        ...

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        """Return the embeddings [tokens, hidden] of token ids."""
        ...

    def close(self) -> None:
        """Free the engine; the session can't be used afterwards."""
        ...


class SequenceSession(Protocol):
    """A running engine that holds the cache of one sequence.

    `position` counts the cached tokens; `max_seq_len` is the most that fit. Callers give at least
    one token and no more than fit: `OneSlot` checks it.
    """

    @property
    def position(self) -> int: ...

    @property
    def max_seq_len(self) -> int: ...

    def truncate(self, tokens: int) -> None:
        """Forget all but the first `tokens`, at most `position`; the cache stays allocated."""
        ...

    def prefill(self, embeds: Floats) -> Floats:
        """Append [tokens, hidden] to the cache and return the last token's logits [vocab]."""
        ...

    def decode(self, token: int) -> Floats:
        """Append one token to the cache and return its logits [vocab]."""
        ...

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        """Do what `Session.encode_images` does."""
        ...

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        """Return the embeddings [tokens, hidden] of token ids."""
        ...

    def close(self) -> None:
        """Free the engine; the session can't be used afterwards."""
        ...


@runtime_checkable
class DeviceSampling(Protocol):
    """What a SequenceSession has beside the rest if it chooses tokens on the device."""

    def stream(self, stop_token_ids: Collection[int], sampling: SamplingParams) -> Iterator[int]:
        """Do what `Session.stream` does, for the only sequence."""
        ...


@runtime_checkable
class CopiesSlots(Protocol):
    """What a Session has beside the rest if one slot can take over what another holds."""

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Make `target` hold the first `tokens` of `source`, and nothing else.

        Raises:
            ValueError: they are no two slots, or `source` holds fewer tokens.
        """
        ...


@runtime_checkable
class ChoosesTokens(Protocol):
    """What a Session of several slots has beside the rest if it chooses tokens on the device.

    What a slot draws depends on its sampling and seed alone, not on the other slots.
    """

    def first_token(self, slot: int, sampling: SamplingParams) -> int:
        """Return the first token behind the prompt; the last call was `prefill` of `slot`.

        Later tokens of the slot are chosen by the same `sampling`, until its next prefill.
        """
        ...

    def next_tokens(
        self, slots: Sequence[int], tokens: Sequence[int], logits_of: Sequence[int] = ()
    ) -> tuple[list[int], Floats]:
        """Do what `decode` does, and return the token that each slot's sampling chooses.

        Greedy ones for a slot that had no `first_token`.

        Args:
            logits_of: rows of `slots` whose logits are returned too, [len(logits_of), vocab].
        """
        ...


class DeviceRows(Protocol):
    """Embeddings [tokens, hidden] in a session's own memory, which only that session can read."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> DeviceRows:
        """Return some of the rows."""
        ...


@runtime_checkable
class KeepsOnDevice(Protocol):
    """What a Session has beside the rest if embeddings need not go through host memory."""

    def encode_on_device(
        self, pixels: Floats, grid: tuple[int, int] | None = None
    ) -> DeviceRows:  # fmt: skip
        """Do what `encode_images` does; all images' features are one after another.

        It may return before they are computed: what takes them waits.
        """
        ...

    def embed_on_device(self, parts: Sequence[Sequence[int] | Floats | DeviceRows]) -> DeviceRows:
        """Return token ids, embeddings of the host and of the device, all as one prompt."""
        ...

    def prefill_on_device(self, slot: int, embeds: DeviceRows, more: bool = False) -> Floats:
        """Do what `prefill` does."""
        ...

    def to_host(self, features: DeviceRows) -> Floats:
        """Return a copy in host memory."""
        ...


@runtime_checkable
class EncodesTiles(Protocol):
    """What a Session has beside the rest if others may decode between two tiles of an image.

    `encode_images` is `merge_tiles` of what `encode_tiles` returns for all tiles.
    """

    def encode_tiles(self, pixels: Floats) -> Floats:
        """Return what the vision encoder makes of tiles [tiles, 3, size, size], each by itself."""
        ...

    def merge_tiles(self, features: Floats, grid: tuple[int, int] | None) -> Floats:
        """Return the projected features [images, tokens, hidden] of all tiles of an image."""
        ...


@runtime_checkable
class Decides(Protocol):
    """What any session has beside the rest if it decides something when it is opened."""

    @property
    def choices(self) -> Mapping[str, Mapping[str, Any]]:
        """What was decided with its reason, by what the engine left open; `choices_of` reads it."""
        ...


class OneSlot:
    """A Session with one slot over a SequenceSession, which stays reachable as `sequence`."""

    slots = 1

    def __init__(self, sequence: SequenceSession):
        self.sequence = sequence

    @property
    def max_seq_len(self) -> int:
        return self.sequence.max_seq_len

    @property
    def prefill_chunk(self) -> int:
        # Sequence sessions cut prompts themselves.
        return self.sequence.max_seq_len

    def length(self, slot: int) -> int:
        check_slots(self, [slot])
        return self.sequence.position

    def keep(self, slot: int, tokens: int) -> None:
        check_keep(self, slot, tokens)
        if tokens < self.sequence.position:
            self.sequence.truncate(tokens)

    def prefill(
        self, slot: int, embeds: Floats, all_logits: bool = False, more: bool = False
    ) -> Floats:
        check_room(self.length(slot), len(embeds), self.max_seq_len)
        if not all_logits:
            return self.sequence.prefill(embeds)
        return np.stack([self.sequence.prefill(embed[None]) for embed in embeds])

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Floats:
        check_slots(self, slots)
        (slot,), (token,) = slots, tokens
        check_room(self.length(slot), 1, self.max_seq_len)
        return self.sequence.decode(token)[None]

    def stream(
        self, slot: int, stop_token_ids: Collection[int], sampling: SamplingParams
    ) -> Iterator[int] | None:
        check_slots(self, [slot])
        if isinstance(self.sequence, DeviceSampling):
            return self.sequence.stream(stop_token_ids, sampling)
        return None

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        return self.sequence.encode_images(pixels, grid)

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        return self.sequence.embed_tokens(tokens)

    def close(self) -> None:
        self.sequence.close()


def choices_of(session: Session) -> Mapping[str, Mapping[str, Any]]:
    """Return what a session decided when it was opened, as `Decides` says it; empty if nothing."""
    inner = session.sequence if isinstance(session, OneSlot) else session
    return inner.choices if isinstance(inner, Decides) else {}


def chunk_size(tokens: int, most: int) -> int:
    """Return how many of `tokens` to prefill in the next chunk, without leaving a lone one.

    Kernels for one token add in another order than those for several: in which chunks a prompt is
    prefilled should change nothing.
    """
    count = min(tokens, max(most, 2))
    if tokens - count == 1:
        return count - 1 if count > 2 else tokens
    return count


def check_room(length: int, tokens: int, max_seq_len: int) -> None:
    """Raise VilaDeployError unless `tokens`, at least one, fit behind `length` cached ones."""
    if not tokens:
        raise VilaDeployError("the prompt is empty", fix="give at least one token")
    if length + tokens > max_seq_len:
        raise VilaDeployError(
            f"{length + tokens} tokens don't fit into the {max_seq_len} positions of this engine",
            fix="ask for less, or build it with a larger --max-seq-len",
        )


def check_slots(session: Session, slots: Sequence[int]) -> None:
    """Raise ValueError unless `slots` are different slots of `session`."""
    if len(set(slots)) < len(slots) or not all(0 <= slot < session.slots for slot in slots):
        raise ValueError(f"{list(slots)} are not different slots below {session.slots}")


def check_keep(session: Session, slot: int, tokens: int) -> None:
    """Raise ValueError unless `slot` holds at least `tokens` tokens."""
    if not 0 <= tokens <= session.length(slot):
        raise ValueError(f"slot {slot} holds {session.length(slot)} tokens, not {tokens}")
