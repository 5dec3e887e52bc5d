"""The tuned lens: for each layer an affine map, trained so that the stream says early what the model says in the end.

Belrose et al. 2023 (arXiv 2303.08112). Each map begins as nothing, so an untrained tuned lens is the logit lens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptoss_kernels import reference
from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.lens import logit_lens
from gptoss_workbench.experiments.rows import log_probs
from gptoss_workbench.experiments.watch import Cost, Watch, completeness, identity, resumed
from gptoss_workbench.model.model import Model, Prompt
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run

_STATE = ("weight", "bias", "weight_mean", "bias_mean", "weight_square", "bias_square")
_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True, eq=False)
class TunedLens:
    """Maps h -> h + W h + b, one for each layer but the last, and where their training stands.

    Attributes:
        weight: (layer, d_model, d_model) float32, W.
        bias: (layer, d_model) float32, b.
        state: the optimiser's running means, so that training can go on.
        history: (step,) float32, the loss of each step: KL(what the model says || lens) in nats, mean over layers.
        settings: what training was told (``steps``, ``rate``, ``batch``, ``positions``, ``seed``), and
            digests of its texts and its model.
        provenance: the model and how the lens was made, as JSON.
    """

    weight: Tensor
    bias: Tensor
    state: tuple[Tensor, ...]
    history: xr.DataArray
    settings: dict[str, object]
    provenance: str

    def __repr__(self) -> str:
        return f"<TunedLens of {len(self.bias)} layers after {len(self.history)} of {self.settings['steps']} steps>"

    @property
    def digest(self) -> str:
        """sha256 of the maps."""
        parts = [tensor.cpu().contiguous().numpy().tobytes() for tensor in (self.weight, self.bias)]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def translated(self, states: Tensor, layer: int) -> Tensor:
        """states (..., d_model) of ``resid_post`` of a layer -> what stands for the last layer's, in their dtype."""
        if layer >= len(self.bias):
            return states
        x = states.float()
        return (x + x @ self.weight[layer].T + self.bias[layer]).to(states.dtype)

    def lens(self, run: Run, token: int = -1, top: int = 5) -> xr.Dataset:
        """As ``wb.logit_lens``, read through the maps: Dataset over (layer, rank). The last layer is the model's."""
        return logit_lens(run.model, run, token, top, lens=self)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with all that is needed to train on."""
        tensors: dict[str, Tensor] = dict(zip(_STATE, (self.weight, self.bias, *self.state), strict=True))
        tensors["history"] = torch.from_numpy(np.ascontiguousarray(self.history.values))
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(path),
                  metadata={"kind": "tuned lens", "settings": json.dumps(self.settings), "provenance": self.provenance})

    @classmethod
    def load(cls, path: str | Path, model: Model) -> TunedLens:
        """Read what ``save`` wrote, for the model it was trained on.

        Raises:
            ExperimentError: the file is no tuned lens, or of another model.
        """
        try:
            with safe_open(str(path), "pt") as file:
                said = file.metadata() or {}
                read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError) as error:
            raise ExperimentError("This is no tuned lens.", expected="a file that TunedLens.save wrote", got=str(path),
                                  hint=str(error).partition("\n")[0][:150]) from error
        if said.get("kind") != "tuned lens" or set(read) != {*_STATE, "history"}:
            raise ExperimentError("This is no tuned lens.", expected="a file that TunedLens.save wrote", got=str(path))
        settings = json.loads(said["settings"])
        if settings["model"] != _model_digest(model):
            raise ExperimentError("The lens was trained on another model.", got=f"{model.name} with other weights",
                                  expected=json.loads(said["provenance"])["model"])
        tensors = [read[name].to(model.device) for name in _STATE]
        return cls(tensors[0], tensors[1], tuple(tensors[2:]), _history(read["history"].tolist(), settings["steps"]),
                   settings, said["provenance"])


def tuned_lens(
    model: Model, texts: Sequence[Prompt], *, steps: int = 200, rate: float = 1e-3, batch: int = 8,
    positions: int = 256, seed: int = 0, resume: TunedLens | None = None,
    on_plan: Callable[[Cost], object] | None = None, on_progress: Callable[[int, int], object] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TunedLens:
    """Train a tuned lens on given texts.

    Each step runs ``batch`` of the texts, draws ``positions`` of their tokens, and moves every layer's map (Adam, rate
    falling linearly to zero) towards what the model says at those tokens: the loss is KL(model || lens). A step's draw
    depends on the seed and its number alone, so a training that was stopped and resumed ends bit for bit as one that
    was not.

    Args:
        texts: prompts of the kind that the lens shall read; hold some back for ``tuned_lens_kl``.
        steps, rate: how many, and Adam's rate at the first.
        resume: what an earlier call gave back, stopped or loaded; the other arguments must be as they were.
        on_plan: told the ``Cost`` before anything runs: one pass for each text of each step.
        on_progress: called with (steps done, steps in all).
        should_stop: asked before each step; True gives back the lens as it is.

    Returns:
        TunedLens; ``.lens(run)`` reads a run, ``.save(path)`` keeps it, ``.history`` is the loss of each step. Its
        attrs say whether that is ``complete``, else what is ``missing``.

    Raises:
        ExperimentError: no texts, numbers out of range, a model of one layer, or ``resume`` of another training.

    Memory: 12 bytes a weight of the maps, d_model squared a layer: 2.3 GB for the 20b, and the logits of ``positions``
    tokens three times over.

    Pitfalls: the lens knows the texts it was trained on; elsewhere it may be worse than the logit lens. And it may find
    in the stream what the model itself never uses: a lens shows what can be read, not what is read.
    """
    rows = [model.encode(text) for text in texts]
    layers, width = model.config.num_hidden_layers - 1, model.config.hidden_size
    if not rows or min(steps, batch, positions) < 1 or not rate > 0 or layers < 1:
        raise ExperimentError("A tuned lens can't be trained so.",
                              expected="texts, two layers or more, and numbers above zero",
                              got=f"{len(rows)} texts, steps={steps}, rate={rate}, batch={batch}, "
                                  f"positions={positions}, {layers + 1} layers")
    settings = {"steps": steps, "rate": rate, "batch": batch, "positions": positions, "seed": seed,
                "texts": hashlib.sha256(repr(rows).encode()).hexdigest(), "model": _model_digest(model)}
    losses: list[float] = []
    if resume is None:
        shapes = [(layers, width, width), (layers, width)] * 3
        tensors = [torch.zeros(shape, device=model.device) for shape in shapes]
    elif resume.settings != settings or resume.weight.shape != (layers, width, width):
        different = [name for name, value in settings.items() if resume.settings.get(name) != value]
        raise ExperimentError("This lens was trained otherwise, so training can't go on.",
                              expected="the same arguments", got="other " + (", ".join(different) or "sizes"),
                              hint="Leave out resume= to begin anew.")
    else:
        tensors = [tensor.clone() for tensor in (resume.weight, resume.bias, *resume.state)]
        losses = resume.history.values.tolist()
    watch = Watch(on_plan, on_progress, should_stop)
    left = range(len(losses), steps)
    drawn = [rows[i] for step in left for i in _draw(rows, batch, seed, step)]
    watch.plan(Cost(len(drawn), sum(map(len, drawn))))
    for step in left:
        if watch.stopped():
            break
        losses.append(_step(model, rows, tensors, step, settings))
        watch.done(step + 1, steps)
    record = with_method(model.provenance, "tuned_lens", done=len(losses), **settings)
    return TunedLens(tensors[0], tensors[1], tuple(tensors[2:]), _history(losses, steps), settings, record)


@torch.no_grad()
def tuned_lens_kl(
    model: Model, texts: Sequence[Prompt], lens: TunedLens, *, resume: xr.DataArray | None = None,
    on_plan: Callable[[Cost], object] | None = None, on_progress: Callable[[int, int], object] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> xr.DataArray:
    """How far each lens is from what the model says, on texts that should not have been trained on.

    Args:
        resume: an earlier result of the same lens and texts: only what is NaN in it is computed.
        on_plan: told the ``Cost`` before anything runs: one pass a text.
        on_progress: called with (texts done, texts in all).
        should_stop: asked before each text; True leaves NaN for the rest.

    Returns:
        (text, lens, layer) float32: KL(model || lens) in nats, mean over the tokens of a text; ``lens`` is "logit" or
        "tuned". ``.mean("text")`` and ``.std("text")`` give the mean and its spread. attrs say whether it is
        ``complete``, else what is ``missing``.

    Raises:
        ExperimentError: ``resume`` is of another lens or of other texts.
    """
    rows, count = [model.encode(text) for text in texts], model.config.num_hidden_layers
    watch = Watch(on_plan, on_progress, should_stop)
    question = identity(model, "tuned lens kl", rows, lens.digest)
    values = resumed(resume, question, (len(rows), 2, count))
    left = np.flatnonzero(np.any(np.isnan(values), axis=(1, 2))).tolist()
    watch.plan(Cost(len(left), sum(len(rows[number]) for number in left)))
    for number in left:
        if watch.stopped():
            break
        run = model.run(rows[number], capture="resid_post")
        final = log_probs(model, run.hidden)
        for layer in range(count):
            states = run.tensor("resid_post", layer)
            for which, seen in enumerate((states, lens.translated(states, layer))):
                values[number, which, layer] = float(_kl(model, final, seen).mean())
        watch.done(number + 1, len(rows))
    done = int((~np.isnan(values)).all(axis=(1, 2)).sum())
    return xr.DataArray(
        values, dims=("text", "lens", "layer"), name="KL(model || lens)",
        coords={"text": range(len(rows)), "lens": ["logit", "tuned"], "layer": range(count),
                "band": ("layer", list(model.config.bands))},
        attrs={"model": model.name, "units": "nats", "lens": repr(lens), "question": question,
               **completeness(done, len(rows), "texts"),
               "provenance": with_method(model.provenance, "tuned_lens_kl", texts=rows, lens=lens.digest)},
    )


def _step(model: Model, rows: list[list[int]], tensors: list[Tensor], step: int, settings: dict) -> float:
    """One step of Adam on all layers, in place; the loss before it."""
    run = model.run([rows[i] for i in _draw(rows, settings["batch"], settings["seed"], step)], capture="resid_post")
    hidden = torch.cat([one.hidden for one in run])
    generator = torch.Generator().manual_seed((settings["seed"] << 32) + 2 * step + 1)
    chosen = torch.randperm(len(hidden), generator=generator)[:settings["positions"]].to(model.device)
    with torch.no_grad():
        final = log_probs(model, hidden[chosen])
    rate = settings["rate"] * (1 - step / settings["steps"])
    total = 0.0
    for layer in range(len(tensors[0])):
        states = torch.cat([one.tensor("resid_post", layer) for one in run])[chosen].float()
        weight, bias = (tensors[i][layer].detach().requires_grad_() for i in (0, 1))
        with torch.inference_mode(False), torch.enable_grad():
            loss = _kl(model, final, states + states @ weight.T + bias).mean()
            slopes = torch.autograd.grad(loss, (weight, bias))
        total += float(loss.detach())
        for part, slope in enumerate(slopes):
            _adam(tensors[part][layer], tensors[2 + part][layer], tensors[4 + part][layer], slope, rate, step + 1)
    return total / len(tensors[0])


@torch.no_grad()
def _adam(value: Tensor, mean: Tensor, square: Tensor, slope: Tensor, rate: float, count: int) -> None:
    """Kingma & Ba 2015 (arXiv 1412.6980), in place; plain tensors, so that they can be kept beside the maps."""
    mean.lerp_(slope, 1 - _BETAS[0])
    square.mul_(_BETAS[1]).addcmul_(slope, slope, value=1 - _BETAS[1])
    away = (square / (1 - _BETAS[1] ** count)).sqrt_().add_(_EPS)
    value.addcdiv_(mean, away, value=-rate / (1 - _BETAS[0] ** count))


def _kl(model: Model, final: Tensor, states: Tensor) -> Tensor:
    """KL of the final distribution (token, row) from what states (token, d_model) say: (token,) nats."""
    normed = reference.rms_norm(states, model.weights.final_norm, model.config.rms_norm_eps)
    log_p = log_probs(model, normed.to(model.weights.unembed.dtype))
    return (final.exp() * (final - log_p)).sum(-1)


def _draw(rows: list[list[int]], batch: int, seed: int, step: int) -> list[int]:
    """The texts of a step."""
    generator = torch.Generator().manual_seed((seed << 32) + 2 * step)
    return torch.randint(len(rows), (min(batch, len(rows)),), generator=generator).tolist()


def _model_digest(model: Model) -> str:
    """Of the configuration, and of the weights that a lens ends in."""
    ends = [model.weights.final_norm, model.weights.unembed[:64]]
    values = b"".join(tensor.detach().float().cpu().contiguous().numpy().tobytes() for tensor in ends)
    return hashlib.sha256(str(model.provenance.config).encode() + values).hexdigest()


def _history(losses: list[float], steps: int) -> xr.DataArray:
    return xr.DataArray(np.array(losses, dtype=np.float32), dims="step", name="loss",
                        attrs={"units": "nats", "long_name": "KL(model || lens), mean over layers",
                               **completeness(len(losses), steps, "steps")})
