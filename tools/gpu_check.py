"""The package on one GPU: the 11 B shape with random weights, beside what the plan says; and toys.

python tools/gpu_check.py --plans plans.json --only-plans   # before, on any machine: CPU minutes
python tools/gpu_check.py --plans plans.json --out gpu.json
python tools/gpu_check.py --tiny --out /tmp/tiny.json        # the same path with a toy, on CPU
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from unittest import mock

import accelerate
import torch
import transformers
from accelerate import Accelerator
from transformers import AutoModelForImageTextToText, MllamaConfig

from llava_cot import data, loss, models, shapes, tiny, train
from llava_cot.families import example_batch, family_of
from llava_cot.loss import one_update
from llava_cot.memory import gradient_checkpointing
from llava_cot.plan import GPUS, plan
from llava_cot.schedule import PRESETS, Phase, Schedule
from llava_cot.settings import RunError, Settings

TOYS = [toy.__name__ for toy in tiny.TOYS]
PHASES = {p.name: p for name in ("two_phase", "lora") for p in PRESETS[name]}
BATCH, SUPERVISED = 4, 0.25  # rows of a micro-batch as in llava_cot_100k_1xH200; share of the text
# phase, tokens of a row, micro-batches of an update, updates to warm up, updates to time
CASES = (
    ("align", 1024, 2, 3, 8),
    ("align", 2048, 2, 3, 8),
    ("finetune", 1024, 2, 3, 8),
    ("finetune", 2048, 2, 3, 8),
    ("finetune", 4096, 1, 1, 3),
)
LORA = (("lora", 1024, 2, 3, 8), ("lora", 2048, 2, 3, 8))


def config_of(toy: bool):
    "Llama-3.2-11B-Vision's shape, or a toy's."
    return tiny.tiny_mllama()[0].config if toy else MllamaConfig(vision_config={"image_size": 560})


def key(phase: str, length: int) -> str:
    return f"{phase} T={length}"


def planned(toy: bool, cases) -> dict:
    "What the plan says of each case, in bytes and FLOPs."
    found = {}
    for name, length, accumulate, *_ in cases:
        how = dict(batch_size=BATCH, accumulate=accumulate, weights="bf16", precision="no")
        how |= dict(checkpointing="all", length=length, supervised=SUPERVISED)
        [p] = plan(config_of(toy), Schedule([PHASES[name]]), **how)
        found[key(name, length)] = dict(
            peak=p.peak, at_peak=p.at_peak, flops=p.flops, again=p.again, trainable=p.trainable
        )
        print(
            "plan", key(name, length), f"{p.peak / 2**30:.2f} GiB, {p.flops:.3e} FLOPs", flush=True
        )
    return found


def built(config, device):
    "The model with random weights in bf16, made on the device; gates open, so that images count."
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    family_of(model).prepare(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate" in name and p.shape == (1,):
                p.fill_(0.5)
    return model.eval()


def random_batch(config, rows: int, length: int, device, supervised: float = SUPERVISED) -> dict:
    "A batch in the shapes of a real one, of random words and pixels."
    batch = example_batch(config, rows, length, supervised=supervised)
    g = torch.Generator().manual_seed(length)
    image, top = config.image_token_id, min(config.get_text_config().vocab_size, 128_000) - 1
    words = torch.randint(1, top, batch["input_ids"].shape, generator=g)
    if words.eq(image).any():
        words[words == image] = 1
    words = torch.where(batch["input_ids"] == image, image, words)
    batch |= dict(input_ids=words, labels=torch.where(batch["labels"] == -100, -100, words))
    pixels = torch.randn(batch["pixel_values"].shape, generator=g)
    return {k: v.to(device) for k, v in (batch | dict(pixel_values=pixels)).items()}


class Card:
    "Time and memory of a device; of a CPU, time alone."

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.name = torch.cuda.get_device_name() if self.cuda else "CPU"
        self.total = torch.cuda.get_device_properties(0).total_memory if self.cuda else 0
        known = [g for name, g in GPUS.items() if name.split("-")[0] in self.name]
        self.flops = known[0].flops if known else None

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def memory(self) -> dict:
        if not self.cuda:
            return {}
        stats = torch.cuda.memory_stats()
        free, total = torch.cuda.mem_get_info()
        return dict(
            max_allocated=torch.cuda.max_memory_allocated(),
            max_reserved=torch.cuda.max_memory_reserved(),
            outside_torch=total - free - torch.cuda.memory_reserved(),  # the CUDA context, others
            alloc_retries=stats["num_alloc_retries"],
        )

    def clear(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def timed_updates(model, case, card: Card, seconds: float, rounded: bool) -> dict:
    "Updates of one phase by the package's own code: their times and the memory they took."
    name, length, accumulate, warm, n = case
    phase = PHASES[name]
    s = Settings(Schedule([phase]), weights="bf16_stochastic" if rounded else "bf16")
    s = replace(s, batch_size=BATCH, accumulate=accumulate, checkpointing="all", precision="no")
    accelerator = Accelerator(mixed_precision="no", cpu=not card.cuda)
    batches = [random_batch(model.config, BATCH, length, accelerator.device)] * accumulate
    batches = [{k: v.clone() for k, v in b.items()} for b in batches]
    prepared, optimizer, scheduler = train.prepare_phase(model, phase, warm + n, accelerator, s=s)
    times, lines, begun = [], [], card.now()
    with gradient_checkpointing(model, s.checkpointing):
        for i in range(warm + n):
            if i >= warm + 3 and card.now() - begun > seconds:
                break
            if i == warm:
                card.clear()
            start = card.now()
            lines.append(one_update(prepared, batches, optimizer, scheduler, phase, accelerator))
            times.append(card.now() - start)
    memory = card.memory()
    del prepared, optimizer, scheduler
    accelerator.free_memory()
    models.merge_adapters(model)
    model.zero_grad(set_to_none=True)
    card.clear()
    return dict(
        memory,
        seconds=times[warm:],
        warm_up=times[:warm],
        tokens=lines[-1]["tokens"],
        pictures=BATCH * accumulate,
        losses=[line["loss"] for line in lines],
        optimizer="torchao AdamW, stochastic rounding" if rounded else "AdamW, to the nearest",
    )


def compared(found: dict, said: dict, card: Card) -> dict:
    "Rates of the updates, and the plan's figures beside what was seen."
    each = statistics.median(found["seconds"])
    found |= dict(update_seconds=each, tokens_per_second=found["tokens"] / each)
    if card.flops:
        found["mfu_by_plan"] = said["flops"] / each / card.flops  # computed twice counts twice
        found["mfu"] = (said["flops"] - said["again"]) / each / card.flops
    if card.cuda:
        peak = found["max_allocated"]
        found["planned_peak"] = said["peak"]
        found["plan_is_off"] = said["peak"] / peak - 1
        found["slack"] = found["max_reserved"] / peak - 1
    return found


def toy_gradients(device: str) -> dict:
    "Relative error of the whole gradient against float64's on CPU, by family and precision."
    found = {}
    for name in TOYS:
        model, _ = getattr(tiny, name)()
        batch = random_batch(model.config, 2, 1200, "cpu", 0.5)
        exact = gradient(model.double(), batch, "cpu")
        errors = {}
        for how, weights, autocast in (
            ("float32", torch.float32, False),
            ("float32, convolutions too", torch.float32, False),
            ("bf16 autocast", torch.float32, True),
            ("bf16 weights", torch.bfloat16, False),
        ):
            toy, _ = getattr(tiny, name)()
            torch.backends.cudnn.allow_tf32 = how != "float32, convolutions too"
            if weights != torch.float32:
                tiny.in_type(toy, weights)
            got = gradient(toy, batch, device, autocast)
            errors[how] = ((got - exact).norm() / exact.norm()).item()
        found[name] = errors
        print(name, {k: f"{v:.1e}" for k, v in errors.items()}, flush=True)
    return found


def gradient(model, batch: dict, device: str, autocast: bool = False) -> torch.Tensor:
    "The gradient of the mean loss, all parameters in one row, in float64 on CPU."
    model.to(device).train()
    batch = {k: v.to(device) for k, v in batch.items()}
    kind = next(model.parameters()).dtype
    batch["pixel_values"] = batch["pixel_values"].to(kind)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        losses, _ = loss.token_losses(model, batch)
    losses.mean().backward()
    some = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([g.detach().double().flatten().cpu() for g in some])


def toy_run(device: str) -> dict:
    "Twenty updates in one go, and stopped after the thirteenth and resumed: how far apart?"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = data.load(shapes.write(folder / "rows", 24))
        names = dict(vision=1e-3, projector=1e-3, language=1e-3)
        schedule = Schedule([Phase("all", train=names, updates=20)])
        how = dict(batch_size=4, save_every=5, progress=False)
        begun = time.perf_counter()
        whole = train.fit(*tiny.tiny_llava(), rows, schedule, folder / "whole", **how)
        seconds = time.perf_counter() - begun
        calls = iter(range(13))

        def stopping(*args, **kwargs):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return one_update(*args, **kwargs)

        try:
            with mock.patch.object(train, "one_update", stopping):
                train.fit(*tiny.tiny_llava(), rows, schedule, folder / "again", **how)
        except KeyboardInterrupt:
            pass
        again = train.resume(folder / "again", rows, progress=False)
        pairs = list(zip(whole.model.parameters(), again.model.parameters()))
        apart = max((a - b).abs().max().item() for a, b in pairs)
        lines = (folder / "whole" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("loss") for line in lines]
    losses = [x for x in losses if x is not None]
    where = str(next(whole.model.parameters()).device)
    return dict(
        device=where, seconds=seconds, largest_difference=apart, equal=apart == 0.0, losses=losses
    )


class Report:
    "A JSON file, written after each section; an error is a section's result."

    def __init__(self, out: Path, facts: dict):
        self.out, self.found = out, dict(facts)

    def section(self, name: str, f, *args):
        begun = time.perf_counter()
        try:
            self.found[name] = f(*args)
        except Exception as e:
            traceback.print_exc()
            self.found[name] = dict(error=f"{type(e).__name__}: {e}"[:600])
        if isinstance(self.found[name], dict):
            self.found[name]["section_seconds"] = round(time.perf_counter() - begun, 2)
        self.out.write_text(json.dumps(self.found, indent=1))
        print(name, json.dumps(self.found[name])[:900], flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self.found[name]


def with_rounding() -> bool:
    try:
        train.memory.check_extras("bf16_stochastic", False)
    except RunError as e:
        print("stochastic rounding left out:", e, flush=True)
        return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=Path, default=Path("plans.json"))
    parser.add_argument("--only-plans", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--budget", type=float, default=280, help="seconds in all")
    parser.add_argument("--tiny", action="store_true")
    a = parser.parse_args()
    begun = time.perf_counter()
    cases = [*CASES, *LORA]
    if a.tiny:
        cases = [(name, 128, 2, 1, 3) for name in ("align", "finetune", "lora")]
    if a.only_plans:
        a.plans.write_text(json.dumps(planned(a.tiny, cases), indent=1))
        return
    said = planned(True, cases) if a.tiny else json.loads(a.plans.read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = Card(device)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, accelerate)}
    report = Report(a.out, dict(hardware=card.name, memory=card.total, versions=versions))
    rounded = with_rounding()
    if card.cuda and card.total < 100 * 2**30:  # all parameters take 80 GiB and more
        cases = [c for c in cases if c[0] != "finetune"]
    model = None

    def build():
        nonlocal model
        model = built(config_of(a.tiny), device)
        numbers = sum(p.numel() for p in model.parameters())
        return dict(parameters=numbers, dtype=str(model.dtype), **card.memory())

    def timed(case, rounded, seconds):
        its = timed_updates(model, case, card, seconds, rounded)
        return compared(its, said[key(case[0], case[1])], card)

    report.section("toy gradients", toy_gradients, device)
    report.section("toy run", toy_run, device)
    report.section("build", build)
    for i, case in enumerate(cases):
        left = a.budget - (time.perf_counter() - begun)
        if left < 8:
            report.section(key(*case[:2]), lambda: dict(left_out="no time left"))
            continue
        its = report.section(key(*case[:2]), timed, case, rounded, left / (len(cases) - i))
        if "error" in its and rounded:  # once more without torchao
            rounded = False
            report.section(key(*case[:2]) + ", again", timed, case, rounded, 20)
    print(f"{time.perf_counter() - begun:.0f} s in all; {a.out}")


if __name__ == "__main__":
    main()
