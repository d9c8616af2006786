"""Write a checkpoint whose llm/ is GGUF, with a Modelfile beside it: for llama.cpp and Ollama."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.checksums import write_checksums
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.folder_layout import llm_config_values
from vila_deploy.checkpoint.gguf_layout import hyperparameters, tensor_specs
from vila_deploy.checkpoint.hub import checkpoint_name, original_source
from vila_deploy.checkpoint.licence import original_licence
from vila_deploy.formats.base import QuantizedLinear, QuantScheme
from vila_deploy.formats.gguf import dtype, linear_types_of
from vila_deploy.formats.gguf_file import TENSOR_TYPES
from vila_deploy.formats.registry import Format
from vila_deploy.processing.chat_template import PROMPT_TEMPLATES, choose_template
from vila_deploy.processing.gguf_vocabulary import vocabulary_metadata
from vila_deploy.processing.jinja_template import jinja_template
from vila_deploy.processing.tokenizer import load_tokenizer
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.files import canonical_json
from vila_deploy.utils.version import __version__
from vila_deploy.writers.folder import Writer, copy_parts, file_stem, write_llm_config
from vila_deploy.writers.gguf_files import FILE_TYPES, GgufFiles, add_tensor
from vila_deploy.writers.modelfile import MODELFILE, modelfile


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
        self._tokenizer = load_tokenizer(checkpoint.layout.folder("llm"))
        self._template = PROMPT_TEMPLATES[choose_template(checkpoint.config, self._tokenizer)]
        metadata = self._metadata(checkpoint)
        copy_parts(checkpoint, folder)
        types = self._types(checkpoint)
        kind = types.linear
        metadata["general.file_type"] = FILE_TYPES[kind]
        name = f"{file_stem(checkpoint_name(checkpoint.root))}-{kind}"
        llm = checkpoint.config.llm
        types_of = linear_types_of(self._scheme) if self._quantized else {}
        specs = list(tensor_specs(llm, (types.table,), (kind,), types_of=types_of))
        self._files = GgufFiles(folder / "llm", name, metadata, specs)

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
        add_tensor(self._files, self._checkpoint.config.llm, name, value)

    def finish(self) -> None:
        self._files.finish()
        llm = self._folder / "llm"
        if not self._quantized:
            values = canonical_json(llm_config_values(self._checkpoint.layout))
            (llm / "config.json").write_text(values, "utf-8")
        else:
            write_llm_config(self._checkpoint, self._folder, self._packing, self._scheme)
        config = self._checkpoint.config
        text = modelfile(self._files.names[0], self._template, config.model_max_length)
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

    def _metadata(self, checkpoint: Checkpoint) -> dict[str, Any]:
        config = checkpoint.config
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
        values |= vocabulary_metadata(
            checkpoint.layout.folder("llm"), self._tokenizer, self._template, config.llm.vocab_size
        )
        values["tokenizer.chat_template"] = jinja_template(self._template)
        return values


class GgufQ8Writer(GgufWriter):
    """The same with embedding and head in 8 bits."""

    table_type = "Q8_0"


class GgufQ6Writer(GgufWriter):
    """The same with embedding and head in 6 bits."""

    table_type = "Q6_K"
