"""The configurations of the published models, to hold a config.json to where no tensor can.

A window of 127 instead of 128 changes every number and no shape. A checkpoint with the sizes of a published
model is therefore expected to have its constants too.
"""

from __future__ import annotations

from collections.abc import Iterable

from gptoss_workbench.errors import ModifiedConfig
from gptoss_workbench.harmony.tokens import CALL, ENDOFTEXT, RETURN, SIZE
from gptoss_workbench.model.config import ModelConfig, alternating

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
         "num_local_experts", "intermediate_size", "vocab_size")
"""Fields that the tensors prove; together they tell which published model it is."""
CONSTANTS = ("num_experts_per_tok", "sliding_window", "layer_types", "rope_theta", "rope_factor", "rope_beta_fast",
             "rope_beta_slow", "rope_original_context", "rope_truncate", "rms_norm_eps", "swiglu_limit",
             "swiglu_alpha")
"""Fields that change the numbers and that no tensor proves."""
_STOPS = {RETURN, ENDOFTEXT, CALL}  # these end a generation whether a configuration names them or not


def _config(layers: int, experts: int, hidden: int = 2880, inner: int = 2880, heads: int = 64, kv_heads: int = 8,
            head_dim: int = 64, window: int = 128) -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, num_local_experts=experts, num_experts_per_tok=4, intermediate_size=inner,
        vocab_size=SIZE, sliding_window=window, layer_types=alternating(layers), rope_theta=150_000.0,
        rope_factor=32.0, rope_beta_fast=32.0, rope_beta_slow=1.0, rope_original_context=4096,
        rope_truncate=False, max_position_embeddings=131_072, rms_norm_eps=1e-5, swiglu_limit=7.0,
        swiglu_alpha=1.702, eos_token_ids=(RETURN,), pad_token_id=ENDOFTEXT,
    )


PUBLISHED = {
    "gpt-oss-20b": _config(layers=24, experts=32),
    "gpt-oss-120b": _config(layers=36, experts=128),
    "the embedded model": _config(layers=6, experts=16, hidden=128, inner=64, heads=4, kv_heads=2, head_dim=32,
                                  window=16),
}
"""By name. The safeguard models and most fine-tunes have the sizes, and the constants, of the first two."""


def published_name(config: ModelConfig) -> str | None:
    """The published model with the sizes of a configuration; None when none has them."""
    return next((name for name, known in PUBLISHED.items()
                 if all(getattr(known, field) == getattr(config, field) for field in SIZES)), None)


def differences(config: ModelConfig) -> dict[str, tuple[object, object]]:
    """Constants in which a configuration differs from the published model of its sizes.

    Returns:
        Field -> (published value, value here); empty when nothing differs or no published model has the sizes.
    """
    name = published_name(config)
    if name is None:
        return {}
    known = PUBLISHED[name]
    found = {field: (getattr(known, field), getattr(config, field)) for field in CONSTANTS
             if getattr(known, field) != getattr(config, field)}
    if not set(config.eos_token_ids) <= _STOPS:
        found["eos_token_ids"] = (tuple(sorted(_STOPS)), config.eos_token_ids)
    return found


def check_published(config: ModelConfig, file: str) -> None:
    """Refuse a configuration with the sizes of a published model and other constants.

    Raises:
        ModifiedConfig: naming each field that differs, with both values.
    """
    found = differences(config)
    if found:
        raise ModifiedConfig(
            f"the configuration differs from that of {published_name(config)}", file=file,
            expected=_listed((field, want) for field, (want, _) in found.items()),
            got=_listed((field, got) for field, (_, got) in found.items()),
            hint="take config.json from where the weights are from; allow_modified_config=True if it is meant so",
        )


def _listed(fields: Iterable[tuple[str, object]]) -> str:
    return ", ".join(f"{field} = {_short(value)}" for field, value in fields)


def _short(value: object) -> str:
    """A list of layer types by its first letters: sfsf..."""
    if isinstance(value, tuple) and value and isinstance(value[0], str):
        return "".join(str(kind)[0] for kind in value)
    return repr(value)[:60]
