"""Everything that needs a GPU, in one command (``make gpu``): is it right, is it fast.

On the GPU at hand: the kernels' tests, compute-sanitizer where it is installed, every kernel at the shapes of
gpt-oss-20b and -120b against the reference, recorded against plain decoding, tokens a second, peak memory, transformers
in the same run. Results go to ``tests/benchmarks/results/gpu_<name>.json``. Where something is wrong it exits with 1,
without a GPU it says so and exits with 2.

``--dry`` runs the same lines on the processor, in Triton's interpreter, at toy sizes: it measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
GOALS = {"H100": {"20b": 600, "120b": 450}, "H200": {"20b": 800, "120b": 600}}
"""Tokens a second at batch 1 that this project set itself."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="toy sizes on the processor")
    parser.add_argument("--models", nargs="+", choices=["20b", "120b"], default=["20b", "120b"])
    parser.add_argument("--tokens", type=int, help="how many to generate for each timing")
    parser.add_argument("--skip", nargs="*", choices=["specification", "sanitizer", "peer"], default=[])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import torch

    if not options.dry and not torch.cuda.is_available():
        print("make gpu: torch finds no NVIDIA GPU here; nothing was measured.", file=sys.stderr)
        return 2
    from tests.gpu.checks import Wrong

    try:
        return measure(options)
    except Wrong as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 1


def measure(options: argparse.Namespace) -> int:
    import torch

    from gptoss_kernels import triton as kernels
    from gptoss_workbench.model import graphs
    from gptoss_workbench.model.config import ModelConfig
    from gptoss_workbench.model.model import Model
    from tests.gpu import checks, shapes, speed
    from tests.model.recording import OpRecording

    dry = options.dry
    device = torch.device("cpu" if dry else "cuda")
    reason = kernels.missing(device, torch.bfloat16)
    if reason is not None:
        print(f"make gpu: the Triton kernels can't compute here: {reason}", file=sys.stderr)
        return 2
    if dry:
        graphs.RECORDERS["cpu"] = OpRecording
    tokens = options.tokens or (4 if dry else 256)
    lengths = (8,) if dry else (512, 2048)
    found = {"what": "gpt-oss shapes with random weights, batch 1, bfloat16, experts in MXFP4", "dry": dry,
             "machine": machine(device), "models": {}}

    def say(text: str) -> None:
        print(text, flush=True)

    if "specification" not in options.skip:
        found["specification"] = checks.specification(dry)
        say(f"specification: {found['specification']}")
    if "sanitizer" not in options.skip:
        found["sanitizer"] = checks.sanitizer(dry)
        say(f"sanitizer: {found['sanitizer']}")
    found["bandwidth_gb_s"] = speed.bandwidth(device, dry)
    say(f"bandwidth: {found['bandwidth_gb_s']} GB/s")
    fastest = max(found["bandwidth_gb_s"].values())
    for name in options.models:
        plain = shapes.config(name, dry)
        config = ModelConfig.from_hf(plain)
        speed.free(device)
        say(f"{name}: kernels")
        of_kernels = checks.kernels(config, kernels, device, dry)
        small = ModelConfig.from_hf(shapes.config(name, dry, num_hidden_layers=2))
        two = Model(small, shapes.Maker(device).weights(small), name=f"two layers of {name}", kernels=kernels)
        prompt = [(11 * i + 5) % config.vocab_size for i in range(6 if dry else 300)]
        of_layers = checks.layers(two, prompt)
        of_recordings = checks.recordings(two, prompt, 3 if dry else 24, dry)
        del two
        speed.free(device)
        say(f"{name}: speed")
        model = Model(config, shapes.Maker(device).weights(config), name=name, kernels=kernels)
        one = {"kernels_relative_l2": of_kernels, "sublayers_relative_l2": of_layers, "recordings": of_recordings,
               "weights_gib": round(model.weights.nbytes / 2**30, 2),
               "decode": speed.decode(model, prompt[:16], tokens, fastest, rounds=1 if dry else 3),
               "prefill_tokens_per_s": speed.prefill(model, lengths, rounds=1 if dry else 3), **speed.memory(device),
               "goal_tokens_per_s": goal(found["machine"]["gpu"], name)}
        found["models"][name] = one
        graphs.pool(model).clear()
        del model
        speed.free(device)
        if "peer" not in options.skip:
            try:
                one["transformers"] = speed.transformers(plain, prompt[:16], tokens, lengths, device)
            except torch.OutOfMemoryError as error:
                one["transformers"] = f"out of memory: {str(error).partition('.')[0]}"
        say(json.dumps(one, indent=2))
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"gpu_{file_name(found['machine']['gpu'])}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    say(f"written: {path}")
    return 0


def machine(device) -> dict[str, object]:
    import torch
    import triton

    gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if gpu else None
    return {"gpu": properties.name if properties else "dry run",
            "memory_gib": round(properties.total_memory / 2**30, 1) if properties else None,
            "processors": properties.multi_processor_count if properties else None,
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)) if gpu else None,
            "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__,
            "python": sys.version.split()[0]}


def goal(gpu: object, model: str) -> int | None:
    """What this project wants of such a GPU; None where it said nothing."""
    return next((goals[model] for name, goals in GOALS.items() if name in str(gpu)), None)


def file_name(gpu: object) -> str:
    return re.sub(r"[^a-z0-9]+", "_", str(gpu).lower()).strip("_")


if __name__ == "__main__":
    sys.exit(main())
