"""Parts of a Triton model's config.pbtxt.

Source: docs/user_guide/model_configuration.md of triton-inference-server/server.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Tensor:
    """An input or output, without the dimension of the batch; -1 is any number, () one number.

    Those of several requests whose lengths differ are batched as they are (`ragged`).
    """

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True
    ragged: bool = False

    def text(self) -> str:
        """Return it as config.pbtxt has it."""
        dims = ", ".join(map(str, self.dims or (1,)))
        fields = [f'name: "{self.name}" data_type: {self.data_type} dims: [ {dims} ]']
        fields += ["reshape: { shape: [ ] }"] if not self.dims else []
        fields += ["allow_ragged_batch: true"] if self.ragged else []
        fields += ["optional: true"] if self.optional else []
        return f"{{ {' '.join(fields)} }}"


def tensors_text(field: str, tensors: Iterable[Tensor]) -> str:
    """Return the field `input` or `output`."""
    return _list(field, (tensor.text() for tensor in tensors))


def parameters_text(parameters: Mapping[str, str]) -> str:
    """Return the field `parameters`."""
    return _list(
        "parameters",
        (
            f'{{ key: "{name}" value: {{ string_value: {json.dumps(value)} }} }}'
            for name, value in parameters.items()
        ),
    )


def _list(field: str, items: Iterable[str]) -> str:
    lines = ",\n".join(f"  {item}" for item in items)
    return f"{field} [\n{lines}\n]\n"
