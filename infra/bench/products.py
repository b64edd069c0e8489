"""Rows a second of an exported layer's products and of its sums, on the CPU with all cores and on a GPU.

    python -m infra.bench.products            # a minute; --rows 131072 --blocks 1024 32768

What `task.inference.precision` and `resources.inference.device` choose between: a shard's rows, so many of a call as a
block has, float32, which go to the device and come back with every call, as Spark's tasks have them. Features 384,
messages 512, embeddings 256. `alone` are the same products on tensors that are there already. Every result is compared
with the CPU's in float32; figures are medians. Then sums over 50 random neighbours each, of a layer of --items messages
as float16, that the GPU holds: the same to the last bit; `combined` with the layer's product after them. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import safetensors.torch
import torch

from infra.bench import measure
from model.export import BLOCK, GPU_BLOCK, load_exported
from model.pinsage import PinSage
from pipeline.contracts.config import Model
from pipeline.inference.network import in_blocks
from pipeline.inference.sums import add_rows, pooled, quantum

FEATURES, HIDDEN, OUTPUTS, NEIGHBOURS, ROUNDS = 384, 512, 256, 50, 7
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Of the largest value."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1 << 17, help="a shard's")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1 << 10, 1 << 13, 1 << 15, 1 << 17], help="of a call")
    parser.add_argument("--items", type=int, default=4_000_000, help="messages of the layer that is summed")
    rows, blocks = (given := parser.parse_args()).rows, given.blocks
    torch.set_num_threads(measure.num_cores())
    settings = Model(num_layers=1, hidden_dimensions=HIDDEN, output_dimensions=OUTPUTS)
    model = PinSage(FEATURES, settings, seed=1).eval()
    description = {"num_features": FEATURES, "num_items": rows, "model": settings.model_dump(mode="json")}
    weights, random = safetensors.torch.save(dict(model.state_dict())), np.random.default_rng(0)
    h, gathered = (random.standard_normal((rows, width), np.float32) for width in (FEATURES, HIDDEN))
    calls: dict[str, tuple[Any, ...]] = {"project": (h,), "combine": (h, gathered)}
    about, found, expected = measure.machine(), [], dict[str, Any]()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    names = [torch.cuda.get_device_name()] if devices[1:] else []
    print(f"{about['date']}, {about['cpu']}, {about['cores']} cores, {about['versions']['torch']}", *names)
    print(f"{'':28}{'rows a call':>14}{'rows/s':>14}{'alone':>16}{'difference':>14}")
    for device, block in product(devices, blocks):
        for precision, tolerance in TOLERANCE.items():
            network = load_exported(weights, description)
            network.set_place(precision, lambda device=device: device)  # type: ignore[misc]
            convolution: Any = model.to(device).convolutions[0]
            for name, arrays in calls.items():
                result = in_blocks(partial(call, getattr(network, name), arrays), rows, block)
                reference = expected.setdefault(name, result)
                difference = float(np.abs(result - reference).max() / np.abs(reference).max())
                assert difference <= tolerance, f"{name} on {device} in {precision} differs by {difference}"
                work = partial(in_blocks, partial(call, getattr(network, name), arrays), rows, block)
                speed = rows / seconds(device, work)
                there = [torch.from_numpy(array).to(device).split(block) for array in arrays]
                with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
                    each = partial(alone, getattr(convolution, name), there)
                    alone_speed = rows / seconds(device, each)
                told = {"call": name, "device": device, "precision": precision, "block": block, "rows_per_s": speed}
                found.append({**told, "rows_per_s_alone": alone_speed, "difference": difference})
                label = f"{name} {device} {precision}"
                print(f"{label:28}{block:14,}{speed:14,.0f}{alone_speed:16,.0f}{difference:14.1e}", flush=True)
    sums = [compare_sums(given.items, rows, device, weights, description, expected) for device in devices]
    print(json.dumps({"products": found, "sums": sums, "rows": rows, "machine": about, "gpu": names}))


def compare_sums(
    items: int, rows: int, device: str, weights: bytes, description: dict[str, Any], expected: dict[str, Any]
) -> dict[str, Any]:
    """Of `rows` lists: their sums on a device, all cores or the GPU at work, alone and with the product after them."""
    random, block = np.random.default_rng(1), GPU_BLOCK if device == "cuda" else BLOCK
    layer = np.empty((items, HIDDEN), np.float16)
    for first in range(0, items, 1 << 18):
        layer[first : first + (1 << 18)] = random.random((min(1 << 18, items - first), HIDDEN), np.float32)
    index = random.integers(0, items, (rows, NEIGHBOURS), np.int32)
    shares, h = np.full(index.shape, 1 / NEIGHBOURS, np.float32), random.random((rows, FEATURES), np.float32)
    unit, indptr = quantum(1, "float16"), np.arange(block + 1) * NEIGHBOURS
    network = load_exported(weights, description)
    network.set_place("float32", lambda: device, block)
    began = time.perf_counter()
    held = network.hold([layer])
    held_in = time.perf_counter() - began

    def summed(part: slice) -> Any:
        if held is not None:
            return network.sum_held(held, index[part], shares[part], unit)
        out = np.zeros((block, HIDDEN), np.int32)
        add_rows(layer, indptr, index[part].reshape(-1), shares[part].reshape(-1), unit, out)
        return out

    def combined(part: slice) -> Any:
        return network.combine(0, h[part], pooled(network, summed(part), unit))

    parts = [slice(first, first + block) for first in range(0, rows, block)]
    made = [summed(part) for part in parts[:8]]
    same = np.concatenate([one if held is None else network.fetch(one) for one in made])
    reference = expected.setdefault("sums", same)
    assert (same[: len(reference)] == reference[: len(same)]).all(), "sums differ"
    told: dict[str, Any] = {"device": device, "items": items, "seconds_to_hold": held_in}
    with ThreadPoolExecutor(measure.num_cores() if held is None else 1) as pool:
        for name, work in (("sums", summed), ("combined", combined)):
            torch.set_num_threads(1 if held is None else measure.num_cores())
            told[name] = rows / seconds(device, lambda work=work: list(pool.map(work, parts)))
    print(f"sums of {NEIGHBOURS} on {device}: {told['sums']:,.0f} rows/s; combined {told['combined']:,.0f}", flush=True)
    return told


def call(function: Any, arrays: tuple[Any, ...], part: slice) -> Any:
    """One block of an exported layer."""
    return function(0, *(array[part] for array in arrays))


def alone(function: Any, blocks: list[Any]) -> None:
    """All blocks of a layer, on the device."""
    for parts in zip(*blocks, strict=True):
        function(*parts)


def seconds(device: str, work: Any) -> float:
    """Median time of a call, the device's work included, after one that is not counted."""
    spent = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return float(np.median(spent[1:]))


if __name__ == "__main__":
    main()
