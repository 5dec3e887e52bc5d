"""Reading sparse autoencoders from files, strictly: what is missing, odd or not understood is refused, never guessed.

Two layouts are read, without the libraries that write them:

- that of SAELens: ``cfg.json`` and ``sae_weights.safetensors``.
- that of dictionary_learning, in which the SAEs for gpt-oss-20b (``andyrdt/saes-gpt-oss-20b``) are published:
  ``config.json`` and ``ae.pt``, of which only tensors are unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gptoss_workbench.errors import CheckpointError, ExperimentError, MissingShard, ModelNotFound, one_line
from gptoss_workbench.hooks.sae import SAE
from gptoss_workbench.hooks.sites import SITES

SAELENS = ("cfg.json", "sae_weights.safetensors")
DICTIONARY_LEARNING = ("config.json", "ae.pt")
ARCHITECTURES = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
}
NORMALIZE = ("none", "constant_norm_rescale", "layer_norm")

_HOOKS = {
    "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post",
    "hook_attn_out": "attn.out", "hook_mlp_out": "mlp.out", "attn.hook_z": "attn.z",
}
_MODULES = {
    "": "resid_post", "self_attn": "attn.out", "mlp": "mlp.out", "input_layernorm": "attn.norm",
    "post_attention_layernorm": "mlp.norm",
}


def load_sae(
    name: str | Path, *, revision: str | None = None, site: str | None = None, layer: int | None = None,
    device: str | torch.device = "cpu",
) -> SAE:
    """Read a sparse autoencoder.

    Args:
        name: a folder, or a folder of a repository on the Hugging Face Hub, e.g.
            ``"andyrdt/saes-gpt-oss-20b/resid_post_layer_11/trainer_0"``; only that folder is fetched.
        revision: branch, tag or commit on the Hub.
        site, layer: what it reads, where the files don't say; what they do say must agree.
        device: where to keep it. Everything is kept in float32: at width 2,880 and 131,072 features, 3 GB.

    Returns:
        SAE: ``encode``, ``decode``, ``error``, ``ablate``, ``steer``.

    Raises:
        ModelNotFound: no such folder or repository, or no network to reach it.
        CheckpointError: a file is missing or damaged, a tensor is missing, unknown, of another shape or dtype, or not
            finite, or the SAE is of a kind that is not understood.
        ExperimentError: it reads what is no site here, or another one than was asked for.
    """
    folder = _folder(name, revision)
    said = _read_saelens if (folder / SAELENS[0]).exists() else _read_dictionary_learning
    config, tensors = said(folder)
    hook = config["hook"]
    if hook is not None:
        found = site_of(hook)
        if (site not in (None, found[0])) or (layer not in (None, found[1])):
            raise ExperimentError("The SAE reads another place.", expected=f"{site}, layer {layer}",
                                  got=f"{hook}: {found[0]}, layer {found[1]}")
        site, layer = found
    if site is None or layer is None or site not in SITES:
        raise ExperimentError("The files don't say what the SAE reads.", expected="a hook name, or site= and layer=",
                              got=f"hook {hook!r}, site {site!r}, layer {layer!r}")
    _check(folder, config, tensors)
    on = {key: tensor.to(device=device, dtype=torch.float32).contiguous() for key, tensor in tensors.items()}
    return SAE(
        one_line("/".join(folder.parts[-2:])), config["architecture"], site, layer, on["W_enc"],
        on["b_mag" if config["architecture"] == "gated" else "b_enc"], on["W_dec"], on["b_dec"], on.get("threshold"),
        on.get("b_gate"), on.get("r_mag"), config["k"], config["subtract"], config["normalize"], config["model"],
        str(folder.resolve() if Path(name).expanduser().is_dir() else name),
    )


def site_of(hook: str) -> tuple[str, int]:
    """The site and layer that another library's hook name means.

    Names of TransformerLens (``blocks.11.hook_resid_post``), transformers (``model.layers.11``, a block's output, or
    ``model.layers.11.mlp``), interp-engine (``resid_post.11``) and dictionary_learning (``resid_post_layer_11``).

    Raises:
        ExperimentError: it is none of these, or no site here.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if match and match[2] in _HOOKS:
        return _HOOKS[match[2]], int(match[1])
    match = re.fullmatch(r"(?:model\.)?layers\.(\d+)(?:\.(\w+))?", hook)
    if match and (match[2] or "") in _MODULES:
        return _MODULES[match[2] or ""], int(match[1])
    match = re.fullmatch(r"([a-z_.]+?)(?:\.|_layer_)(\d+)", hook)
    if match and match[1] in SITES and SITES[match[1]].per_layer:
        return match[1], int(match[2])
    raise ExperimentError(
        "The SAE reads a place that is no site here.", got=one_line(hook)[:80],
        expected=f"blocks.N.[{', '.join(_HOOKS)}] or model.layers.N[{', '.join(_MODULES)}]"[:160],
        hint="For another name of the same place pass site= and layer= and take the name out of the file.")


def _folder(name: str | Path, revision: str | None) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    parts = str(name).strip("/").split("/")
    if isinstance(name, Path) or str(name)[:1] in "/.~" or len(parts) < 2:
        raise ModelNotFound("There is no such folder.", got=str(name),
                            expected='a folder, or "org/repository/folder"')
    import huggingface_hub

    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    wanted = [f"{inside}/{file}".lstrip("/") for file in (*SAELENS, *DICTIONARY_LEARNING)]
    try:
        root = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the client's errors differ from version to version
        raise ModelNotFound("The SAE can't be fetched.", where=str(name),
                            got=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200],
                            hint="Give a local folder, or check the name and the network.") from error
    if not (root / inside).is_dir():
        raise ModelNotFound("The repository has no such folder with an SAE.", where=repository, got=inside or "its top")
    return root / inside


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise MissingShard("The folder holds no SAE.", file=str(path),
                           expected=f"{' and '.join(SAELENS)}, or {' and '.join(DICTIONARY_LEARNING)}")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("The SAE's configuration can't be read.", file=str(path), got=str(error)[:120]) from error
    if not isinstance(said, dict):
        raise CheckpointError("The SAE's configuration can't be read.", file=str(path), expected="an object",
                              got=type(said).__name__)
    return said


def _read_saelens(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = folder / SAELENS[0]
    said = _json(path)
    about = {**said, **(said.get("meta") or {}), **(said.get("metadata") or {})}
    architecture = said.get("architecture", "standard")
    activation = said.get("activation_fn", said.get("activation_fn_str", "relu"))
    k = said.get("k", (said.get("activation_fn_kwargs") or {}).get("k"))
    if architecture == "standard" and activation == "topk":  # files written before version 6
        architecture = "topk"
    normalize = said.get("normalize_activations") or "none"
    if architecture not in ARCHITECTURES or activation not in ("relu", "topk"):
        raise _unknown(path, f"{', '.join(ARCHITECTURES)} with relu", f"{architecture!r} with {activation!r}")
    if normalize not in NORMALIZE:
        raise _unknown(path, f"activations normalised by {', '.join(NORMALIZE)}", repr(normalize),
                       "Fold the factor into the weights and save it again.")
    if said.get("rescale_acts_by_decoder_norm"):
        raise _unknown(path, "features in units of unit decoder rows, or not rescaled", "rescale_acts_by_decoder_norm",
                       "Fold the norms of W_dec into the weights and save it again.")
    if about.get("hook_head_index") is not None:
        raise _unknown(path, "an SAE of whole vectors", f"one of head {about['hook_head_index']}")
    if architecture != "topk":
        k = None
    elif isinstance(k, bool) or not isinstance(k, int):
        raise _unknown(path, "how many features are active (k)", repr(k))
    config: dict[str, Any] = {
        "architecture": architecture, "k": k, "normalize": normalize, "d_in": said.get("d_in"),
        "d_sae": said.get("d_sae"), "subtract": bool(said.get("apply_b_dec_to_input", True)),
        "hook": about.get("hook_name", about.get("hook_point")), "model": about.get("model_name"),
        "file": folder / SAELENS[1],
    }
    if not config["file"].exists():
        raise MissingShard("The SAE's weights are not there.", file=str(config["file"]))
    try:
        tensors = load_file(config["file"])
    except (SafetensorError, OSError) as error:
        raise CheckpointError("The SAE's weights can't be read.", file=str(config["file"]),
                              got=str(error)[:120]) from error
    scaling = tensors.pop("scaling_factor", None)  # of fine-tuning; one that is all ones was written for a while
    if scaling is not None and not bool((scaling == 1).all()):
        raise _unknown(config["file"], "no scaling_factor, or ones", "a scaling_factor that changes the features")
    return config, tensors


def _read_dictionary_learning(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path, weights = (folder / name for name in DICTIONARY_LEARNING)
    said = _json(path).get("trainer")
    if not isinstance(said, dict):
        raise CheckpointError("The SAE's configuration can't be read.", file=str(path), expected="a trainer entry",
                              got="none")
    kind = said.get("dict_class")
    if kind not in ("BatchTopKSAE", "AutoEncoderTopK"):
        raise _unknown(path, "BatchTopKSAE or AutoEncoderTopK", repr(kind))
    if not weights.exists():
        raise MissingShard("The SAE's weights are not there.", file=str(weights))
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file leads to
        raise CheckpointError("The SAE's weights can't be read.", file=str(weights),
                              got=str(error).partition("\n")[0][:120]) from error
    names = {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold"}
    if not isinstance(state, Mapping) or not {*state} <= names or not names - {"threshold"} <= {*state}:
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError("The SAE's weights are not those of its kind.", file=str(weights),
                              expected=", ".join(sorted(names)), got=str(got)[:160])
    tensors = {"W_enc": state["encoder.weight"].T, "b_enc": state["encoder.bias"], "W_dec": state["decoder.weight"].T,
               "b_dec": state["b_dec"]}
    batch = kind == "BatchTopKSAE"
    if batch:  # trained with the k best of a batch, used with the threshold that this came to
        threshold = state.get("threshold")
        if threshold is None or threshold.numel() != 1 or not float(threshold) >= 0:
            raise _unknown(weights, "the threshold that training came to", repr(threshold)[:60])
        tensors["threshold"] = threshold.float().reshape(1).expand(len(tensors["b_enc"])).clone()
    hook = said.get("submodule_name") or (f"resid_post_layer_{said['layer']}" if "layer" in said else None)
    return {
        "architecture": "jumprelu" if batch else "topk", "k": None if batch else int(state["k"]), "normalize": "none",
        "d_in": said.get("activation_dim"), "d_sae": said.get("dict_size"), "subtract": True, "hook": hook,
        "model": said.get("lm_name"), "file": weights,
    }, tensors


def _check(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Every tensor is there, none is left over, and each has the shape, dtype and values that it must have."""
    file, names = str(config["file"]), ARCHITECTURES[config["architecture"]]
    odd = sorted(set(tensors) ^ set(names))
    if odd:
        missing = odd[0] in names
        raise CheckpointError(f"The SAE {'lacks a tensor' if missing else 'has a tensor that is not understood'}.",
                              file=file, tensor=odd[0], expected=", ".join(names), got=", ".join(sorted(tensors))[:160])
    d_in, d_sae = config["d_in"], config["d_sae"]
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in (d_in, d_sae)):
        raise CheckpointError("The SAE's configuration has no sizes.", file=file, expected="d_in and d_sae, above 0",
                              got=f"{d_in!r} and {d_sae!r}")
    if config["k"] is not None and not 1 <= config["k"] <= d_sae:
        raise CheckpointError("More features are active than there are.", file=file, expected=f"k of 1 to {d_sae}",
                              got=config["k"])
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, tensor in tensors.items():
        want = shapes.get(name, (d_sae,))
        if tuple(tensor.shape) != want:
            raise CheckpointError("A tensor of the SAE has another shape.", file=file, tensor=name, expected=want,
                                  got=tuple(tensor.shape))
        if not tensor.is_floating_point():
            raise CheckpointError("A tensor of the SAE is of another kind.", file=file, tensor=name,
                                  expected="floats", got=tensor.dtype)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError("A tensor of the SAE holds what is no number.", file=file, tensor=name,
                                  expected="finite values", got=f"{int((~torch.isfinite(tensor)).sum())} others")


def _unknown(path: Path, expected: str, got: str, hint: str | None = None) -> CheckpointError:
    return CheckpointError("The SAE is of a kind that is not understood.", file=str(path), expected=expected, got=got,
                           hint=hint)
