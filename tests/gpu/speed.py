"""How fast is it, beside what the device's memory allows and beside transformers, all in one run."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

import gptoss_workbench as wb
from gptoss_workbench.model.model import Model
from gptoss_workbench.model.run import Run
from tests.gpu.shapes import active_bytes

RESIDUALS = ["resid_pre", "resid_mid", "resid_post", "router.logits"]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, best and worst in milliseconds."""
    return {name: round(1000 * how(seconds), 4) for name, how in
            (("median", statistics.median), ("min", min), ("max", max))}


def bandwidth(device: torch.device, dry: bool) -> dict[str, float]:
    """GB/s that reading, and copying (read and written bytes together), reach; the better one sets the floor."""
    values = torch.ones(1 << (16 if dry else 30), dtype=torch.float32, device=device)
    other = torch.empty_like(values)
    found = {}
    for name, work, times in (("read", values.sum, 1), ("copy", lambda: other.copy_(values), 2)):
        best = min(_timed(work, device) for _ in range(3 if dry else 20))
        found[name] = round(times * values.nbytes / best / 1e9, 1)
    return found


def _timed(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def decode(model: Model, prompt: list[int], tokens: int, floor_gb_s: float, rounds: int = 3) -> dict[str, Any]:
    """Milliseconds a token and tokens a second at batch 1, hooks off and on, and as a share of the floor.

    The first two tokens, in which the prompt is read and the step is recorded, do not count. The kinds take turns.
    """
    vector = torch.randn(model.config.hidden_size, device=model.device)
    kinds: dict[str, dict[str, Any]] = {
        "hooks off": {}, "residuals and router logits captured": {"capture": RESIDUALS},
        "steered": {"edits": wb.steer("resid_post", layer=model.config.num_hidden_layers // 2, vector=vector)},
        "hooks off, every kernel started by itself": {"graph": False},
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, options in kinds.items():
            count = min(tokens, 20) if options.get("graph") is False else tokens
            gen = model.generate(prompt, max_tokens=count, stop=[], **options)
            stamps = []
            for _ in gen:
                stamps.append(time.perf_counter())  # a token is on the host, so the device has done it
            assert gen.decoding == "recorded" or options.get("graph") is False, gen.decoding
            seconds[name] += [b - a for a, b in pairwise(stamps[1:])]
    bytes_ = active_bytes(model.weights, model.config)
    floor = bytes_ / floor_gb_s / 1e9
    plain = statistics.median(seconds["hooks off"])
    found: dict[str, Any] = {"bytes_per_token": bytes_, "floor_tokens_per_s": round(1 / floor, 1)}
    for name, each in seconds.items():
        median = statistics.median(each)
        found[name] = {"ms": spread(each), "tokens_per_s": round(1 / median, 1), "of_floor": round(floor / median, 3),
                       "times_hooks_off": round(median / plain, 3)}
    return found


def prefill(model: Model, lengths: tuple[int, ...], rounds: int = 3) -> dict[str, Any]:
    """Tokens a second of reading a prompt, logits of its last token included; the best of a few."""
    found = {}
    for length in lengths:
        ids = [(7 * i + 3) % model.config.vocab_size for i in range(length)]

        def read(ids: list[int] = ids) -> None:
            run: Run = model.run(ids)
            model.transformer.unembed(run.hidden[-1:])

        read()
        found[str(length)] = round(length / min(_timed(read, model.device) for _ in range(rounds)), 1)
    return found


def memory(device: torch.device) -> dict[str, float]:
    """GiB at most allocated by tensors, and taken from the device by torch, since the last reset."""
    if device.type != "cuda":
        return {}
    return {"allocated_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved(device) / 2**30, 2)}


def free(device: torch.device) -> None:
    """Give back what no tensor holds, and count the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@torch.no_grad()
def transformers(config: dict[str, Any], prompt: list[int], tokens: int, lengths: tuple[int, ...],
                 device: torch.device) -> dict[str, Any] | str:
    """The same shape in transformers, experts decoded to bfloat16 (its way without the Hub); or why not."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    from transformers import GptOssConfig, GptOssForCausalLM

    theirs = GptOssConfig(**{name: value for name, value in config.items()
                             if name not in ("quantization_config", "architectures", "model_type")})
    with torch.device("meta"):
        needed = 2 * sum(p.numel() for p in GptOssForCausalLM(theirs).parameters())
    if device.type == "cuda" and needed * 1.05 > torch.cuda.mem_get_info(device)[0]:
        return f"does not fit: {needed / 2**30:.0f} GiB in bfloat16"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = GptOssForCausalLM(theirs).eval()
    finally:
        torch.set_default_dtype(before)
    stamps, state, ids = [], None, torch.tensor([prompt], device=device)
    for _ in range(tokens):
        out = model(input_ids=ids, past_key_values=state, use_cache=True, logits_to_keep=1)
        state, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        int(ids)
        stamps.append(time.perf_counter())
    each = [b - a for a, b in pairwise(stamps[1:])]
    found: dict[str, Any] = {"version": __import__("transformers").__version__, "decode_ms": spread(each),
                             "decode_tokens_per_s": round(1 / statistics.median(each), 1), "prefill_tokens_per_s": {}}
    for length in lengths:
        row = (torch.arange(length, device=device) * 7 + 3)[None] % config["vocab_size"]

        def read(row: torch.Tensor = row) -> None:
            model(input_ids=row, logits_to_keep=1)

        read()
        found["prefill_tokens_per_s"][str(length)] = round(length / min(_timed(read, device) for _ in range(3)), 1)
    return {**found, **memory(device)}
