"""Path patching: what one component tells another directly, and what the answer owes to that edge.

Methods: Wang et al. 2023, "Interpretability in the Wild" (arXiv 2211.00593), section 3; Goldowsky-Dill et al. 2023,
"Localizing Model Behavior with Path Patching" (arXiv 2304.05969).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from gptoss_kernels import reference
from gptoss_workbench.errors import ExperimentError
from gptoss_workbench.experiments.metrics import Metric
from gptoss_workbench.experiments.parts import head_outputs, slot_outputs
from gptoss_workbench.experiments.patching import _pairs
from gptoss_workbench.experiments.sweeps.engine import Case, Engine, SweepPlan
from gptoss_workbench.experiments.sweeps.fill import fill
from gptoss_workbench.experiments.watch import MEMORY, Watch, completeness, identity, resumed
from gptoss_workbench.hooks.edits import Edit, add, set, zero
from gptoss_workbench.model.model import Model, Prompt
from gptoss_workbench.model.provenance import with_method
from gptoss_workbench.model.run import Run
from gptoss_workbench.model.transformer import no_tap

KINDS = {"embed": "", "head": "layer, head", "expert": "layer, expert", "attn": "layer", "mlp": "layer",
         "q": "layer, head", "k": "layer, kv_head", "v": "layer, kv_head", "router": "layer", "logits": ""}
_SENDERS, _RECEIVERS = ("embed", "head", "expert", "attn", "mlp"), ("q", "k", "v", "expert", "router", "mlp", "logits")


@dataclass(frozen=True)
class Node:
    """One end of an edge, written ``("head", layer, head)``, ``("expert", layer, expert)``, ``("mlp", layer)``, ...

    What it reads or writes stands in the residual stream at ``depth``: two for each layer, attention and experts.
    """

    kind: str
    layer: int
    index: int

    def depth(self, layers: int) -> int:
        if self.kind in ("embed", "logits"):
            return -1 if self.kind == "embed" else 2 * layers
        return 2 * self.layer + (self.kind in ("expert", "mlp", "router"))

    def __str__(self) -> str:
        return " ".join([self.kind, *(str(part) for part in (self.layer, self.index) if part >= 0)])


def _node(model: Model, given: str | Sequence[object], allowed: Sequence[str]) -> Node:
    parts = [given] if isinstance(given, str) else list(given)
    kind, numbers = str(parts[0]) if parts else "", parts[1:]
    wanted = [name for name in KINDS.get(kind, "?").split(", ") if name]
    sizes = {**model.config.dimensions, "layer": model.config.num_hidden_layers}
    if kind not in allowed or len(numbers) != len(wanted) or not all(
            isinstance(at, int) and 0 <= at < sizes[name] for at, name in zip(numbers, wanted, strict=True)):
        raise ExperimentError("There is no such end of an edge.", got=repr(given), expected="; ".join(
            f"({', '.join([repr(one), *KINDS[one].split(', ')]).rstrip(', ')})" for one in allowed))
    return Node(kind, *(int(number) for number in (*numbers, -1, -1)[:2]))  # type: ignore[call-overload]


@torch.no_grad()
def path_patching(
    model: Model, clean: Prompt, corrupt: Prompt, senders: Sequence[str | Sequence[object]],
    receivers: Sequence[str | Sequence[object]], *, metric: Metric, normalize: bool = True,
    resume: xr.DataArray | None = None, on_plan: Callable[[SweepPlan], object] | None = None,
    on_progress: Callable[[int, int], object] | None = None, should_stop: Callable[[], bool] | None = None,
    memory: int = MEMORY,
) -> xr.DataArray:
    """For each edge, the metric of the corrupt run when the receiver alone hears the clean run's sender.

    An edge is direct: what the sender writes into the residual stream is replaced, at every token, in what the receiver
    reads and nowhere else; all that lies between sends what it sends in the corrupt run. What the receiver makes of it
    then goes on through the model as usual.

    Args:
        clean, corrupt: two prompts of equally many tokens; the metric is read after the last one.
        senders: ``"embed"``, ``("head", layer, head)``, ``("expert", layer, expert)``, ``("attn", layer)``,
            ``("mlp", layer)``.
        receivers: ``("q", layer, head)``, ``("k", layer, kv_head)``, ``("v", layer, kv_head)`` of the attention;
            ``("expert", layer, expert)``, what that expert computes where it serves; ``("router", layer)``, who is
            chosen and how much each counts; ``("mlp", layer)``, both together; ``"logits"``, the direct effect.
        normalize: give the fraction recovered, 0 = as corrupt, 1 = as clean; False gives raw metric values.
        resume, on_plan, on_progress, should_stop, memory: as for ``wb.patching``.

    Returns:
        (sender, receiver) float32, NaN where the receiver reads before the sender writes, or an expert receives that
        serves no token of the corrupt run. attrs as for
        ``wb.patching``.

    Raises:
        ExperimentError: no such node, prompts that differ in length, or a metric that is the same for both.

    Pitfalls: edges don't add up, since receivers are not linear. A kv head speaks to all the query heads that share it.
    An expert's share counts its weight and is nothing where it does not serve, so its edge also holds that the clean
    run may have sent other tokens there. Wang et al. let the MLPs in between react; here they are held, as the
    attention is. How often it names the right path where that is known: docs/truth.md.
    """
    (pair,) = _pairs(model, clean, corrupt)
    layers = model.config.num_hidden_layers
    sends, hears = ([_node(model, one, allowed) for one in some]
                    for some, allowed in ((senders, _SENDERS), (receivers, _RECEIVERS)))
    capture = ["embed", "attn.z", "attn.out", "mlp.out", "resid_pre", "resid_mid", "resid_post", "router.experts",
               "router.weights", "expert.out"]
    edges = [(row, column) for row, sender in enumerate(sends) for column, receiver in enumerate(hears)
             if receiver.depth(layers) > sender.depth(layers)]
    question = identity(model, "path patching", pair, [*map(str, sends)], [*map(str, hears)], metric.name, normalize)
    earlier = resumed(resume, question, (len(sends), len(hears)))
    watch = Watch(on_plan, on_progress, should_stop, memory)

    def engine(at: Sequence[tuple[int, int]], edits: Sequence[Sequence[Edit]]) -> Engine:
        wanted = np.array([np.isnan(earlier[edge]) for edge in at], dtype=bool)
        return Engine(model, [pair[1]], [Case(0, tuple(some)) for some in edits], memory=memory, wanted=wanted)

    if on_plan is not None:
        plan = engine(edges, [_outline(hears[column], layers) for _, column in edges]).plan
        watch.plan(plan.beside([len(ids) for ids in pair]))
    runs = [model.run(ids, capture=capture) for ids in pair]
    metric = metric.given(runs[0].logits[-1])
    ends = [float(metric.of(model, run.logits[-1:])) for run in runs]
    if normalize and ends[0] == ends[1]:
        raise ExperimentError("The metric is the same for both prompts, so nothing can be recovered.",
                              expected="prompts that differ in the metric", got=f"{ends[0]:.4g} for both")
    scale, base = (ends[0] - ends[1], ends[1]) if normalize else (1.0, 0.0)
    written = [_written(model, runs[0], sender) - _written(model, runs[1], sender) for sender in sends]
    heard = {(row, column): edits for row, column in edges
             if (edits := _hear(model, runs[1], hears[column], written[row]))}
    rows, columns = [row for row, _ in heard], [column for _, column in heard]
    found = np.where(np.isnan(earlier[rows, columns]), np.nan, 0).astype(np.float32)[None]
    fill(model, engine([*heard], [*heard.values()]), [[metric]], found, watch)
    values = earlier.copy()
    values[rows, columns] = np.where(np.isnan(values[rows, columns]), (found[0] - base) / scale, values[rows, columns])
    return xr.DataArray(
        values, dims=("sender", "receiver"), name="recovered" if normalize else metric.name,
        coords={"sender": _names(sends), "receiver": _names(hears)},
        attrs={"metric": metric.name, "clean": ends[0], "corrupt": ends[1], "model": model.name, "question": question,
               **completeness(int((~np.isnan(found)).sum()), found.size, "edges"),
               "provenance": with_method(runs[1].provenance, "path_patching", clean=pair[0], metric=metric.name,
                                         senders=[*map(str, sends)], receivers=[*map(str, hears)],
                                         normalize=normalize)},
    )


def _names(nodes: Sequence[Node]) -> np.ndarray:
    names = np.empty(len(nodes), dtype=object)
    names[:] = [str(node) for node in nodes]
    return names


def _written(model: Model, run: Run, node: Node) -> Tensor:
    """What a sender adds to the residual stream, (token, d_model) float32."""
    if node.kind == "head":
        return head_outputs(model, node.layer, run.tensor("attn.z", node.layer))[:, node.index]
    if node.kind == "expert":
        shares, served = slot_outputs(model, run, node.layer, list(range(len(run))))
        return (shares * (served == node.index).unsqueeze(-1)).sum(1)
    site = {"embed": "embed", "attn": "attn.out", "mlp": "mlp.out"}[node.kind]
    return run.tensor(site, None if node.kind == "embed" else node.layer).float()


def _outline(node: Node, layers: int) -> list[Edit]:
    """Edits where those of ``_hear`` act, at most."""
    if node.kind == "logits":
        return [zero("resid_post", layer=layers - 1)]
    if node.kind in ("q", "k", "v"):
        return [zero(f"attn.{node.kind}", layer=node.layer, **{"head" if node.kind == "q" else "kv_head": node.index})]
    if node.kind == "expert":
        return [zero("expert.gate", layer=node.layer, expert=node.index)]
    return [zero("mlp.norm" if node.kind == "mlp" else "router.logits", layer=node.layer)]


def _hear(model: Model, run: Run, node: Node, delta: Tensor) -> list[Edit]:
    """The edits that make a receiver read the stream with ``delta`` (token, d_model) on top, and nobody else."""
    config, transformer = model.config, model.transformer
    if node.kind == "logits":
        return [add("resid_post", delta, layer=config.num_hidden_layers - 1)]
    w, layer = transformer.weights.layers[node.layer], node.layer
    if node.kind in ("q", "k", "v"):
        x = run.tensor("resid_pre", layer)
        positions = torch.arange(len(run), device=model.device)[None]
        turns = transformer.frequencies, transformer.concentration, x.dtype
        cos, sin = transformer.kernels.rope_tables(positions, *turns)
        norm = transformer.norm((x + delta.to(x.dtype))[None], w.attn_norm)
        made = transformer.project(norm, layer, cos, sin, no_tap)
        value = made["qkv".index(node.kind)][0, :, node.index, None]
        return [set(f"attn.{node.kind}", value, layer=layer,
                    **{"head" if node.kind == "q" else "kv_head": node.index})]  # type: ignore[arg-type]
    x = run.tensor("resid_mid", layer)
    heard = transformer.norm(x + delta.to(x.dtype), w.mlp_norm)
    if node.kind == "mlp":
        return [set("mlp.norm", heard, layer=layer)]
    if node.kind == "router":
        return [set("router.logits", F.linear(heard, w.router_weight, w.router_bias), layer=layer)]
    token = (run.tensor("router.experts", layer) == node.index).nonzero()[:, 0]
    if not len(token):
        return []
    only = torch.full((len(token), 1), node.index, device=model.device)
    gate_up = reference.expert_linear(heard[token], only, w.gate_up, w.gate_up_bias)[:, 0]
    gate, up = reference.split_gate_up(gate_up)
    tokens = token.tolist()
    return [set("expert.gate", gate, layer=layer, tokens=tokens, expert=node.index),
            set("expert.up", up, layer=layer, tokens=tokens, expert=node.index)]
