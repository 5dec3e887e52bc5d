"""The shape and constants of a gpt-oss model, read from either published form of config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptoss_workbench.errors import CheckpointError

SLIDING, FULL = "sliding_attention", "full_attention"
_LARGEST = 2**31 - 1
_MISSING = object()

# What the published models have and neither form of config.json always repeats.
_EPS, _LIMIT, _ALPHA = 1e-5, 7.0, 1.702
_RETURN, _ENDOFTEXT = 200002, 199999


@dataclass(frozen=True)
class ModelConfig:
    """One gpt-oss architecture, under the field names of the Hugging Face configuration.

    Attributes:
        layer_types: for each layer "sliding_attention" or "full_attention".
        sliding_window: keys a query of a sliding layer sees, itself included.
        rope_original_context: tokens the model was first trained on; YaRN stretches it by ``rope_factor``.
        rope_truncate: whether YaRN rounds its two correction bounds to whole dimensions. False in the
            published models; a Hugging Face config that leaves the key out means True.
        swiglu_limit, swiglu_alpha: clamp and slope of the experts' activation.
        eos_token_ids: ids that end a generation.
    """

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    vocab_size: int
    sliding_window: int
    layer_types: tuple[str, ...]
    rope_theta: float
    rope_factor: float
    rope_beta_fast: float
    rope_beta_slow: float
    rope_original_context: int
    rope_truncate: bool
    max_position_embeddings: int
    rms_norm_eps: float = _EPS
    swiglu_limit: float = _LIMIT
    swiglu_alpha: float = _ALPHA
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def bands(self) -> tuple[str, ...]:
        """Each layer's reach in the workbench's words: "sliding" or "full"."""
        return tuple("sliding" if kind == SLIDING else "full" for kind in self.layer_types)

    @property
    def dimensions(self) -> dict[str, int]:
        """How long each fixed dimension of the sites is, by the name it has in captures."""
        return {
            "d_model": self.hidden_size, "head": self.num_attention_heads, "kv_head": self.num_key_value_heads,
            "d_head": self.head_dim, "expert": self.num_local_experts, "slot": self.num_experts_per_tok,
            "d_ff": self.intermediate_size, "vocab": self.vocab_size,
        }

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], file: str = "config.json") -> ModelConfig:
        """Read the Hugging Face form. Keys that are not needed are passed over.

        Both spellings of the rotary settings are read: ``rope_scaling`` with ``rope_theta`` beside it, and
        the single ``rope_parameters`` of transformers 5.

        Raises:
            CheckpointError: naming the field that is missing, of the wrong type, or not of gpt-oss.
        """
        read = _Reader(data, file)
        read.demand("model_type", "gpt_oss")
        read.demand("hidden_act", "silu", optional=True)
        read.demand("tie_word_embeddings", False, optional=True)
        read.demand("attention_bias", True, optional=True)
        layers = read.count("num_hidden_layers", most=10_000)
        rope = read.rope()
        rope.demand("rope_type", "yarn")
        factor = rope.number("factor")
        _plain_concentration(rope, factor)
        context = rope.count("original_max_position_embeddings")
        config = cls(
            num_hidden_layers=layers,
            hidden_size=read.count("hidden_size"),
            num_attention_heads=read.count("num_attention_heads"),
            num_key_value_heads=read.count("num_key_value_heads"),
            head_dim=read.count("head_dim"),
            num_local_experts=read.count("num_local_experts", "num_experts"),
            num_experts_per_tok=read.count("num_experts_per_tok", "experts_per_token"),
            intermediate_size=read.count("intermediate_size"),
            vocab_size=read.count("vocab_size"),
            sliding_window=read.count("sliding_window"),
            layer_types=read.layer_types(layers),
            rope_theta=rope.number("rope_theta"),
            rope_factor=factor,
            rope_beta_fast=rope.number("beta_fast", default=32.0),
            rope_beta_slow=rope.number("beta_slow", default=1.0),
            rope_original_context=context,
            rope_truncate=rope.flag("truncate", default=True),
            max_position_embeddings=read.count("max_position_embeddings", default=round(context * factor)),
            rms_norm_eps=read.number("rms_norm_eps", default=_EPS),
            swiglu_limit=read.number("swiglu_limit", default=_LIMIT),
            swiglu_alpha=read.number("swiglu_alpha", default=_ALPHA),
            eos_token_ids=read.ids("eos_token_id"),
            pad_token_id=next(iter(read.ids("pad_token_id")), None),
        )
        return _checked(config, file)

    @staticmethod
    def eos_ids(data: Mapping[str, Any], file: str) -> tuple[int, ...]:
        """The stop tokens of a config.json or generation_config.json; empty when it names none."""
        return _Reader(data, file).ids("eos_token_id")

    @classmethod
    def from_original(cls, data: Mapping[str, Any], file: str = "config.json") -> ModelConfig:
        """Read the form OpenAI publishes under ``original/``.

        It holds no layer types (the reference alternates, starting with a sliding layer), no epsilon, no
        slope and no special ids; YaRN's bounds are not rounded.

        Raises:
            CheckpointError: naming the field that is missing or of the wrong type.
        """
        read = _Reader(data, file)
        layers = read.count("num_hidden_layers", most=10_000)
        context, factor = read.count("initial_context_length"), read.number("rope_scaling_factor")
        vocab = read.count("vocab_size")
        config = cls(
            num_hidden_layers=layers,
            hidden_size=read.count("hidden_size"),
            num_attention_heads=read.count("num_attention_heads"),
            num_key_value_heads=read.count("num_key_value_heads"),
            head_dim=read.count("head_dim"),
            num_local_experts=read.count("num_experts"),
            num_experts_per_tok=read.count("experts_per_token"),
            intermediate_size=read.count("intermediate_size"),
            vocab_size=vocab,
            sliding_window=read.count("sliding_window"),
            layer_types=alternating(layers),
            rope_theta=read.number("rope_theta"),
            rope_factor=factor,
            rope_beta_fast=read.number("rope_ntk_beta", default=32.0),
            rope_beta_slow=read.number("rope_ntk_alpha", default=1.0),
            rope_original_context=context,
            rope_truncate=False,
            max_position_embeddings=round(context * factor),
            swiglu_limit=read.number("swiglu_limit", default=_LIMIT),
            eos_token_ids=(_RETURN,) if vocab > _RETURN else (),
            pad_token_id=_ENDOFTEXT if vocab > _ENDOFTEXT else None,
        )
        return _checked(config, file)


def alternating(layers: int) -> tuple[str, ...]:
    """The published pattern of bands: sliding, full, sliding, full, ..."""
    return tuple(FULL if index % 2 else SLIDING for index in range(layers))


class _Reader:
    """Typed access to one JSON object, with an error that names the field."""

    def __init__(self, data: Mapping[str, Any], file: str, prefix: str = "") -> None:
        self.data, self.file, self.prefix = data, file, prefix
        if not isinstance(data, Mapping):
            what = prefix.rstrip(".") or "the file"
            raise CheckpointError(f"{what} must be a JSON object", file=file, expected="{...}",
                                  got=type(data).__name__)

    def wrong(self, name: str, expected: object, got: object, hint: str | None = None) -> CheckpointError:
        return CheckpointError(
            f"the model's configuration has a bad {self.prefix}{name}",
            file=self.file, expected=expected, got=_short(got), hint=hint,
        )

    def value(self, names: tuple[str, ...], default: object) -> Any:
        for name in names:
            if self.data.get(name) is not None:
                return self.data[name]
        if default is not _MISSING:
            return default
        raise CheckpointError(
            f"the model's configuration lacks {self.prefix}{names[0]}", file=self.file,
            expected=" or ".join(names), got="no such key",
            hint="take config.json from the same place as the weights",
        )

    def count(self, *names: str, default: object = _MISSING, most: int = _LARGEST) -> int:
        value = self.value(names, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.wrong(names[0], f"a whole number from 1 to {most}", value)
        return value

    def number(self, name: str, default: object = _MISSING) -> float:
        value = self.value((name,), default)
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not right or not 0 < value <= 1e30 or not math.isfinite(value):
            raise self.wrong(name, "a positive number", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.value((name,), default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        value = self.value((name,), ())
        listed = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in listed):
            raise self.wrong(name, "a token id, or a list of them", value)
        return tuple(listed)

    def demand(self, name: str, wanted: object, optional: bool = False) -> None:
        value = self.value((name,), wanted if optional else _MISSING)
        if value != wanted:
            raise self.wrong(name, repr(wanted), value, "only the gpt-oss architecture is read")

    def layer_types(self, layers: int) -> tuple[str, ...]:
        value = self.value(("layer_types",), alternating(layers))
        right = isinstance(value, (list, tuple)) and all(kind in (SLIDING, FULL) for kind in value)
        if not right or len(value) != layers:
            raise self.wrong("layer_types", f'{layers} times "{SLIDING}" or "{FULL}"', value)
        return tuple(value)

    def rope(self) -> _Reader:
        """The rotary settings as one object, whichever way they are written."""
        name = "rope_parameters" if self.data.get("rope_parameters") is not None else "rope_scaling"
        inner = _Reader(self.value((name,), _MISSING), self.file, prefix=f"{name}.")
        merged = {"rope_theta": self.data.get("rope_theta"), **inner.data}
        if "type" in merged:  # the older spelling of rope_type
            merged.setdefault("rope_type", merged["type"])
        return _Reader(merged, self.file, prefix=f"{name}.")


def _plain_concentration(rope: _Reader, factor: float) -> None:
    """gpt-oss scales its rotary tables by 0.1 ln(factor) + 1; refuse a config that asks for another."""
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    asked = rope.data.get("attention_factor")
    if asked is not None and not math.isclose(rope.number("attention_factor"), usual, rel_tol=1e-6):
        raise rope.wrong("attention_factor", f"{usual:.6f}, or leave it out", asked)
    for name in ("mscale", "mscale_all_dim"):
        if rope.data.get(name):
            raise rope.wrong(name, "no such key", rope.data[name], "gpt-oss does not use it")


def _checked(config: ModelConfig, file: str) -> ModelConfig:
    """Refuse values that are each sound but do not fit together."""
    def refuse(problem: str, expected: str, got: str) -> CheckpointError:
        return CheckpointError(problem, file=file, expected=expected, got=got,
                               hint="take config.json from the same place as the weights")

    if config.num_attention_heads % config.num_key_value_heads:
        raise refuse("query heads cannot be shared out evenly over key-value heads",
                     "num_attention_heads a multiple of num_key_value_heads",
                     f"{config.num_attention_heads} and {config.num_key_value_heads}")
    if config.head_dim % 2:
        raise refuse("rotary embedding turns pairs of dimensions", "an even head_dim", str(config.head_dim))
    if config.num_experts_per_tok > config.num_local_experts:
        raise refuse("more experts are chosen than there are", f"at most {config.num_local_experts}",
                     f"num_experts_per_tok = {config.num_experts_per_tok}")
    if config.rope_factor < 1 or config.rope_theta <= 1:
        raise refuse("rotary settings out of range", "rope_theta above 1 and factor at least 1",
                     f"rope_theta = {config.rope_theta}, factor = {config.rope_factor}")
    return config


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
