"""Read which format the tensors of a quantized llm/ are in."""

from __future__ import annotations

from vila_deploy.formats.base import QuantizationConfig
from vila_deploy.formats.registry import FORMATS
from vila_deploy.utils.fields import Fields


def load_quantization(fields: Fields) -> QuantizationConfig | None:
    """Return what llm/config.json says of a quantization; None if there is none.

    Raises:
        VilaDeployError: names the key whose value is none that this version reads.
    """
    if "quantization_config" not in fields:
        recognised = (row.recognise(fields) for row in FORMATS.values())
        return next((quantization for quantization in recognised if quantization), None)
    if "weights_file" in fields:
        raise fields.error(
            "weights_file", "stands beside a quantization_config of other weights", "remove one"
        )
    child = fields.child("quantization_config")
    # Of several rows with one method, the first, as in `format_of`.
    packings = [row.packing for row in FORMATS.values() if row.packing.quant_method]
    by_method = {packing.quant_method: packing for packing in reversed(packings)}
    return by_method[
        child.choice("quant_method", by_method, what="quantization method")
    ].read_config(child)
