"""The sizes of a model, from its `config.json` alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.run import ModelConfig
from learner.run.errors import InputError


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides over memory and time. `parameters`: a tied head counts once.

    `multiplied`: those that each token is multiplied with, so that a token's forward pass takes twice as many
    floating-point operations; the rest is an input embedding, of which a token reads one row. `norms_heads`: whether
    queries and keys are normalised, as in Qwen3.
    """

    parameters: int
    multiplied: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    norms_heads: bool = False

    @property
    def head_parameters(self) -> int:
        """Of the output layer, which only positions that predict something go through."""
        return self.hidden * self.vocabulary

    def kv_bytes_per_token(self, size: int) -> int:
        """Keys and values of one token in all layers, `size` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * size


def read_shape(model: ModelConfig, source: Path | None = None) -> ModelShape:
    """The shape of the model that `model` names, or of the `config.json` at `source`, a file or a directory.

    Raises InputError if there is none, or if it can't be read.
    """
    from transformers import AutoConfig

    name = str(source or model.path)
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if source is not None:
        file = source / "config.json" if source.is_dir() else source
        if not file.is_file():
            raise InputError(f"--model-config: there is no file {file}")
        try:
            values = json.loads(file.read_text())
            settings = AutoConfig.for_model(**values) if isinstance(values, dict) else None
        except Exception as error:
            # transformers raises many kinds for a file of an unknown model or with values of the wrong type.
            raise InputError(f"--model-config: {file} can't be read: {_line(error)}") from error
        if settings is None:
            raise InputError(f"--model-config: {file} holds no model's configuration")
    else:
        if model.revision is not None:
            options["revision"] = model.revision
        try:
            settings = AutoConfig.from_pretrained(name, **options)
        except Exception as error:
            raise InputError(
                f"model.path: the configuration of {name} can't be read here: {_line(error)}. --model-config FILE "
                "takes a config.json from elsewhere"
            ) from error
    return shape_of(settings, name, trust_remote_code=model.trust_remote_code)


def shape_of(settings: Any, name: str, *, trust_remote_code: bool = False) -> ModelShape:
    """The shape of the model that `settings`, of transformers, describe. Its parameters are counted without memory.

    Raises InputError if transformers can't build it, or if it is none whose attention is the usual one.
    """
    import torch
    from transformers import AutoModelForCausalLM

    text = settings.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(f"{name}: transformers can't build this model: {_line(error)}") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embedding.weight is head.weight
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:
        raise InputError(f"{name}: its configuration names no attention heads, so that nothing can be planned")
    return ModelShape(
        parameters=parameters,
        multiplied=parameters if tied else parameters - embedding.weight.numel(),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        norms_heads=any(module.rpartition(".")[2] == "q_norm" for module, _ in model.named_modules()),
    )


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
