"""Features of images that came lately, so that a second question costs no vision encoder."""

from __future__ import annotations

from collections import OrderedDict

from vila_deploy.utils.arrays import Floats

DEFAULT_IMAGE_CACHE_BYTES = 256 << 20


class ImageCache:
    """Keep the features of the images used last, by digest, in at most `max_bytes`.

    `queries` and `hits` count look-ups, `size_bytes` what is held now. 0 bytes keep nothing.
    """

    def __init__(self, max_bytes: int = DEFAULT_IMAGE_CACHE_BYTES):
        self.max_bytes, self.size_bytes = max_bytes, 0
        self.queries = self.hits = 0
        self._features: OrderedDict[bytes, Floats] = OrderedDict()

    def get(self, digest: bytes) -> Floats | None:
        """Return the features [tokens, hidden] of an image, or None if they aren't held."""
        self.queries += 1
        features = self._features.get(digest)
        if features is not None:
            self.hits += 1
            self._features.move_to_end(digest)
        return features

    def put(self, digest: bytes, features: Floats) -> None:
        """Hold `features` [tokens, hidden], and forget those that were used longest ago."""
        if digest in self._features or features.nbytes > self.max_bytes:
            return
        self._features[digest] = features
        self.size_bytes += features.nbytes
        while self.size_bytes > self.max_bytes:
            _, oldest = self._features.popitem(last=False)
            self.size_bytes -= oldest.nbytes

    def clear(self) -> None:
        """Forget all features."""
        self._features.clear()
        self.size_bytes = 0
