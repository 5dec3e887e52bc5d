"""What looking inside costs: a forward pass with every residual and every router logit kept, over a bare one.

One process, one thread, one random model of six layers at two widths. The calls take turns in a rotating order, and a
ratio is that of two calls of the same round, so that a machine that slows down slows both; given are medians and
quartiles of the processor's time. The goal is 1.05 at width 64, where what is left is the fixed price of a call, and
1.02 at width 512.

Beside it stand plain hooks on the same weights in transformers, and TransformerLens and nnsight where they are
installed (``make bench`` installs them; the result says which ran). Each has its own base: ours is the forward pass
with no tap at all, theirs the bare call of transformers' model. What they capture is compared with ours first: a fast
wrong answer would be no answer.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gptoss_workbench as wb
from tests.factories import tiny_model, write_hf
from tests.oracle import transformers_model
from tests.tolerances import STEP_F32

LAYERS, TOKENS, VOCAB, STEPS = 6, 64, 4096, 32
ROUNDS = {64: 150, 512: 40}
GOAL = {64: 1.05, 512: 1.02}
WATCHED = ["resid", "router.logits"]
PEERS = {"transformer_lens": "transformer-lens", "nnsight": "nnsight"}
Calls = dict[str, Callable[[], Any]]


def ours(folder: Path, ids: list[int]) -> Calls:
    model = wb.load(folder, dtype="float32", allow_modified_config=True)

    @torch.no_grad()
    def bare() -> Tensor:
        tokens, positions = model.pad_left([ids])
        return model.transformer.unembed(model.transformer(tokens, positions, model.new_cache(1)))

    def watched(capture: list[str]) -> Any:
        run = model.run(ids, capture=capture)
        return run.logits, run

    return {"bare forward": bare, "run, nothing kept": lambda: model.run(ids).logits,
            "run, residuals and router logits": lambda: watched(WATCHED),
            "run, every site": lambda: watched(list(wb.SITES))}


def generating(folder: Path, ids: list[int]) -> Calls:
    model = wb.load(folder, dtype="float32", allow_modified_config=True)

    def go(capture: list[str] | None) -> Any:
        return model.generate(ids, capture=capture, max_tokens=STEPS, stop=[]).finish().run()

    return {"generate, nothing kept": lambda: go(None), "generate, residuals and router logits": lambda: go(WATCHED)}


def plain_hooks(model: Any, ids: Tensor) -> Calls:
    def bare() -> Tensor:
        return model(ids).logits

    def watched() -> Any:
        kept: dict[str, list[Tensor]] = {"resid_pre": [], "resid_mid": [], "resid_post": [], "router.logits": []}
        handles = []
        for block in model.model.layers:
            norm = block.post_attention_layernorm
            handles += [
                block.register_forward_pre_hook(lambda module, given: kept["resid_pre"].append(given[0])),
                norm.register_forward_pre_hook(lambda module, given: kept["resid_mid"].append(given[0])),
                block.mlp.router.register_forward_hook(lambda module, given, got: kept["router.logits"].append(got[0])),
                block.register_forward_hook(lambda module, given, got: kept["resid_post"].append(got)),
            ]
        try:
            return model(ids).logits, kept
        finally:
            for handle in handles:
                handle.remove()

    return {"transformers, bare": bare, "transformers, plain hooks": watched}


def lens(model: Any, ids: Tensor, folder: Path) -> Calls:
    from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]

    bridge = TransformerBridge.boot_transformers("openai/gpt-oss-20b", hf_model=model, tokenizer=tokenizer(folder),
                                                 device="cpu", dtype=torch.float32)
    points = {"resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post",
              "router.logits": "mlp.router.hook_out"}
    names = [f"blocks.{layer}.{point}" for layer in range(LAYERS) for point in points.values()]

    def watched() -> Any:
        logits, cache = bridge.run_with_cache(ids, names_filter=names)
        return logits, {site: [cache[f"blocks.{layer}.{point}"] for layer in range(LAYERS)]
                        for site, point in points.items()}

    return {"TransformerLens, nothing kept": lambda: bridge(ids), "TransformerLens, run_with_cache": watched}


def nnsight(model: Any, ids: Tensor) -> Calls:
    import nnsight as nn  # type: ignore[import-not-found]

    wrapped = nn.NNsight(model)

    def bare() -> Any:
        with wrapped.trace(ids):
            out = wrapped.lm_head.output.save()
        return out

    def watched() -> Any:
        with wrapped.trace(ids):
            before, between, after, router = nn.save([]), nn.save([]), nn.save([]), nn.save([])
            for layer in wrapped.model.layers:
                before.append(layer.input)
                between.append(layer.post_attention_layernorm.input)
                router.append(layer.mlp.router.output[0])
                after.append(layer.output)
            out = wrapped.lm_head.output.save()
        return out, {"resid_pre": before, "resid_mid": between, "resid_post": after, "router.logits": router}

    return {"nnsight, nothing kept": bare, "nnsight, trace": watched}


def tokenizer(folder: Path) -> Any:
    """Words w0, w1, ...: TransformerLens will not start without a tokenizer from the disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({f"w{id}": id for id in range(VOCAB)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    words = dict.fromkeys(("pad_token", "eos_token", "bos_token", "unk_token"), "w0")
    PreTrainedTokenizerFast(tokenizer_object=raw, **words).save_pretrained(folder / "words")
    return AutoTokenizer.from_pretrained(folder / "words")


def check(got: Any, want: Any) -> None:
    """What a peer kept (logits, lists by site) is what we kept, whatever leading dimensions it has."""
    (logits, kept), (_, run) = got, want
    pairs = {"logits": (logits.view(run.logits.shape), run.logits)}
    for site, tensors in kept.items():
        pairs[site] = torch.stack([tensor.reshape(TOKENS, -1) for tensor in tensors]), run.tensor(site)
    for site, (theirs, own) in pairs.items():
        assert (theirs - own).norm() / own.norm() < STEP_F32, site


def rounds(calls: Calls, count: int, warm: int = 3) -> dict[str, list[tuple[float, float]]]:
    """(wall, processor) seconds of every call, one of each a round, in a rotating order."""
    spent: dict[str, list[tuple[float, float]]] = {label: [] for label in calls}
    labels = list(calls)
    for number in range(warm + count):
        gc.collect()
        gc.disable()
        for label in labels[number % len(labels):] + labels[:number % len(labels)]:
            wall, cpu = time.perf_counter(), time.process_time()
            kept = calls[label]()
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            del kept
            if number >= warm:
                spent[label].append(seconds)
        gc.enable()
    return spent


def summary(spent: dict[str, list[tuple[float, float]]], bases: dict[str, str]) -> dict[str, dict[str, Any]]:
    found = {}
    for label, times in spent.items():
        base = spent[bases[label]]
        by_wall, by_cpu = ([mine[i] / theirs[i] for mine, theirs in zip(times, base, strict=True)] for i in (0, 1))
        low, middle, high = statistics.quantiles(by_cpu, n=4)
        found[label] = {"ms": round(1e3 * statistics.median(cpu for _, cpu in times), 2), "base": bases[label],
                        "ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)],
                        "ratio_of_wall_time": round(statistics.median(by_wall), 3)}
    return found


def measure(width: int, folder: Path, peers: dict[str, str | None]) -> dict[str, dict[str, Any]]:
    write_hf(folder, tiny_model(num_hidden_layers=LAYERS, hidden_size=width, intermediate_size=width,
                                head_dim=width // 8, vocab_size=VOCAB, sliding_window=32))
    ids = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    calls = ours(folder, ids)
    want, bases = calls["run, residuals and router logits"](), dict.fromkeys(calls, "bare forward")

    def theirs() -> Any:  # one for each, for they change the model that they wrap
        model: Any = transformers_model(folder)
        model.set_experts_implementation("eager")
        return model

    batch = torch.tensor([ids])
    others = [lambda: plain_hooks(theirs(), batch)]
    others += [lambda: lens(theirs(), batch, folder)] if peers["transformer_lens"] else []
    others += [lambda: nnsight(theirs(), batch)] if peers["nnsight"] else []
    for make in others:
        made = make()
        check(list(made.values())[-1](), want)
        calls |= made
        bases |= dict.fromkeys(made, "transformers, bare")
    found = summary(rounds(calls, ROUNDS[width]), bases)
    if width == 64:
        steps = generating(folder, ids)
        found |= summary(rounds(steps, 20, warm=1), dict.fromkeys(steps, "generate, nothing kept"))
    return found


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def test_capture(machine: dict[str, Any], versions: dict[str, str], results: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    peers = {module: installed(package) if importlib.util.find_spec(module) else None
             for module, package in PEERS.items()}
    try:
        with torch.no_grad():
            widths = {width: measure(width, tmp_path / str(width), peers) for width in ROUNDS}
    finally:
        torch.set_num_threads(threads)
    ratios = {width: found["run, residuals and router logits"]["ratio"] for width, found in widths.items()}
    found = {
        "what": f"one forward pass of {TOKENS} tokens, {LAYERS} layers, 8 experts (top 4), float32, one thread: "
                "milliseconds of processor time (median), and the ratio to the base in the same round",
        "machine": machine, "versions": {"torch": versions["torch"], "transformers": version("transformers")},
        "peers": {name: number or "not installed, not measured" for name, number in peers.items()},
        "rounds": ROUNDS, "goal": GOAL, "met": {width: ratio <= GOAL[width] for width, ratio in ratios.items()},
        "width": widths,
    }
    (results / "capture.json").write_text(json.dumps(found, indent=2) + "\n")
    for width, rows in widths.items():
        for label, row in rows.items():
            print(f"{width:4} {label:40} {row['ms']:8.2f} ms  {row['ratio']:.3f} {row['quartiles']}")
    print("peers:", found["peers"], "goal met:", found["met"])
