"""Write a checkpoint whose llm/ is GGUF, with a Modelfile beside it: for llama.cpp and Ollama."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch
from torch import Tensor

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.checksums import write_checksums
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.folder_layout import llm_config_values
from vila_deploy.checkpoint.gguf_layout import GgufSpec, hyperparameters, row_order, tensor_specs
from vila_deploy.checkpoint.gguf_reader import shard_name
from vila_deploy.checkpoint.hub import checkpoint_name, original_source
from vila_deploy.checkpoint.licence import original_licence
from vila_deploy.formats.base import QuantizedLinear, QuantScheme
from vila_deploy.formats.gguf import GGUF_BLOCKS, dtype
from vila_deploy.formats.gguf_blocks import quantize_table
from vila_deploy.formats.gguf_file import (
    INT32,
    TENSOR_TYPES,
    UINT16,
    GgufTensor,
    Typed,
    header_bytes,
    place,
)
from vila_deploy.formats.registry import Format
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, choose_template
from vila_deploy.processing.gguf_vocabulary import vocabulary_metadata
from vila_deploy.processing.jinja_template import jinja_template
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import canonical_json
from vila_deploy.utils.version import __version__
from vila_deploy.writers.folder import Writer, copy_parts, write_llm_config
from vila_deploy.writers.modelfile import MODELFILE, modelfile

# Of one file; more are several, as llama.cpp splits them. The hub takes up to 50 GB.
MAX_FILE_BYTES = 40 * 10**9
# general.file_type, what most tensors are (llama.h's LLAMA_FTYPE_*).
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "BF16": 32}
FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


class _Types(NamedTuple):
    """How embedding and head, and linears, are stored."""

    table: str
    linear: str


class GgufWriter(Writer):
    """VILA layout with GGUF in llm/; embedding and head as they come.

    Attributes:
        table_type: of the embedding and the head; empty keeps their values exactly.
    """

    takes_unquantized = True
    table_type: ClassVar[str] = ""

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, row: Format, scheme: QuantScheme | None
    ):
        super().__init__(checkpoint, folder, row, scheme)
        metadata = self._metadata(checkpoint)
        copy_parts(checkpoint, folder)
        types = self._types(checkpoint)
        kind = types.linear
        metadata["general.file_type"] = FILE_TYPES[kind]
        name = f"{checkpoint_name(checkpoint.root) or 'model'}-{kind}"
        specs = tensor_specs(checkpoint.config.llm, (types.table,), (kind,))
        self._files = GgufFiles(folder / "llm", name, metadata, list(specs))

    @classmethod
    def check_model(cls, config: VilaConfig) -> None:
        block = TENSOR_TYPES[cls.table_type].block if cls.table_type else 1
        if config.llm.hidden_size % block:
            raise VilaDeployError(
                f"{cls.table_type} has blocks of {block}, the embedding has rows of "
                f"{config.llm.hidden_size}",
                fix="use format gguf, which keeps the embedding as it is, or gguf-q8_0",
            )

    def add(self, name: str, value: Tensor | QuantizedLinear) -> None:
        order = row_order(self._checkpoint.config.llm, name)
        if isinstance(value, QuantizedLinear):
            packed = GGUF_BLOCKS.pack(value, not self._scheme.symmetric)
            blocks = packed["blocks"].flatten(1)
            self._files.write(f"{name}.weight", [blocks if order is None else blocks[order]])
            if "bias" in packed:
                self.add(f"{name}.bias", packed["bias"])
            return
        tensor = value if order is None else value[order]
        stored = self._files.type_of(name)
        if stored in FLOATS.values():
            target = next(kind for kind, label in FLOATS.items() if label == stored)
            rows = tensor.split(1 << 12) if tensor.ndim > 1 else [tensor]
            self._files.write(name, (part.to(target) for part in rows))
        else:
            self._files.write(name, quantize_table(tensor, stored))

    def finish(self) -> None:
        self._files.finish()
        llm = self._folder / "llm"
        if not self._quantized:
            values = canonical_json(llm_config_values(self._checkpoint.layout))
            (llm / "config.json").write_text(values, "utf-8")
        else:
            write_llm_config(self._checkpoint, self._folder, self._packing, self._scheme)
        config = self._checkpoint.config
        tokenizer = load_tokenizer(self._checkpoint.layout.folder("llm"))
        template = PROMPT_TEMPLATES[choose_template(config, tokenizer)]
        text = modelfile(self._files.names[0], template, config.model_max_length)
        (llm / MODELFILE).write_text(text, "utf-8")
        write_checksums(self._folder)

    def _types(self, checkpoint: Checkpoint) -> _Types:
        """Return how tables and linears are stored."""
        if self._quantized:
            return _Types(self.table_type or "F16", dtype(not self._scheme.symmetric))
        kinds = {
            checkpoint.llm.info(name).dtype
            for name in checkpoint.llm.names()
            if len(checkpoint.llm.info(name).shape) == 2
        }
        # Several types in one checkpoint: the one that holds all values.
        kind = kinds.pop() if len(kinds) == 1 and kinds <= FILE_TYPES.keys() else "F32"
        return _Types(self.table_type or kind, kind)

    @classmethod
    def _metadata(cls, checkpoint: Checkpoint) -> dict[str, Any]:
        config = checkpoint.config
        folder = checkpoint.layout.folder("llm")
        tokenizer = load_tokenizer(folder)
        template = PROMPT_TEMPLATES[choose_template(config, tokenizer)]
        values = hyperparameters(config.llm)
        family = config.llm.family.name
        values |= {
            f"{family}.context_length": config.model_max_length,
            "general.name": checkpoint_name(checkpoint.root) or "model",
            "general.quantization_version": 2,
            "general.quantized_by": f"vila-deploy {__version__}",
        }
        licence = original_licence(checkpoint.root)
        keys = {
            "license": "license",
            "license_name": "license.name",
            "license_link": "license.link",
        }
        values |= {f"general.{keys[key]}": value for key, value in licence.items()}
        source = original_source(checkpoint.root)
        if source is not None:
            url = f"https://huggingface.co/{source.repository}/tree/{source.commit}"
            values["general.source.url"] = url
        values |= vocabulary_metadata(folder, tokenizer, template, config.llm.vocab_size)
        values["tokenizer.chat_template"] = jinja_template(template)
        return values


class GgufQ8Writer(GgufWriter):
    """The same with embedding and head in 8 bits."""

    table_type = "Q8_0"


class GgufQ6Writer(GgufWriter):
    """The same with embedding and head in 6 bits."""

    table_type = "Q6_K"


class GgufFiles:
    """The GGUF files of one model, whose tensors are known beforehand and come in any order.

    Args:
        name: of the files, without their ending.
        specs: of all tensors, with one type each.
    """

    def __init__(
        self, folder: Path, name: str, metadata: dict[str, Any], specs: Sequence[GgufSpec]
    ):
        shards = list(_shards(specs))
        self._pending: dict[str, tuple[BinaryIO, int, GgufTensor]] = {}
        self._opened: list[BinaryIO] = []
        self.names = [shard_name(name, number, len(shards)) for number in range(1, len(shards) + 1)]
        for number, shard in enumerate(shards):
            values = dict(metadata) if number == 0 else {}
            if len(shards) > 1:
                values["split.no"] = Typed(UINT16, number)
                values["split.count"] = Typed(UINT16, len(shards))
                values["split.tensors.count"] = Typed(INT32, len(specs))
            tensors = place([(spec.name, spec.shape, spec.types[0]) for spec in shard])
            header = header_bytes(values, tensors)
            file = (folder / self.names[number]).open("xb")
            self._opened.append(file)
            file.write(header)
            file.truncate(len(header) + tensors[-1].begin + tensors[-1].bytes)
            for spec, tensor in zip(shard, tensors, strict=True):
                self._pending[spec.source] = (file, len(header) + tensor.begin, tensor)

    def __enter__(self) -> GgufFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._opened:
            file.close()

    def type_of(self, name: str) -> str:
        """Return how the tensor that we call `name` is stored."""
        return self._pending[name][2].dtype

    def write(self, name: str, parts: Iterator[Tensor] | Sequence[Tensor]) -> None:
        """Write the tensor that we call `name`, once, from its first row on."""
        file, begin, tensor = self._pending.pop(name)
        file.seek(begin)
        written = 0
        for part in parts:
            content = part.contiguous().view(torch.uint8).numpy()
            written += file.write(content.data)
        assert written == tensor.bytes, (name, written, tensor)

    def finish(self) -> None:
        """Close the files; every tensor must have been written."""
        assert not self._pending, sorted(self._pending)[:3]
        for file in self._opened:
            file.close()


def _shards(specs: Sequence[GgufSpec]) -> Iterator[list[GgufSpec]]:
    shard: list[GgufSpec] = []
    for spec in specs:
        whole = place([(s.name, s.shape, s.types[0]) for s in [*shard, spec]])
        if shard and whole[-1].begin + whole[-1].bytes > MAX_FILE_BYTES:
            yield shard
            shard = []
        shard.append(spec)
    yield shard
