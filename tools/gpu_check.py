"""The package on one GPU: two real shapes with random weights, beside what the plan says; and toys.

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
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import accelerate
import torch
import transformers
from accelerate import Accelerator
from transformers import AutoModelForImageTextToText, MllamaConfig, Qwen3VLConfig

from llava_cot import data, loss, models, shapes, tiny, train
from llava_cot.engine import Engine, Sampling, Write, left_as_found
from llava_cot.families import example_batch, family_of
from llava_cot.loss import one_update
from llava_cot.memory import gradient_checkpointing, prepare_weights
from llava_cot.node import on_card
from llava_cot.plan import GPUS, plan
from llava_cot.schedule import PRESETS, Phase, Schedule
from llava_cot.settings import RunError, Settings
from llava_cot.tokens import encode

PHASES = {p.name: p for name in ("two_phase", "lora") for p in PRESETS[name]}
SUPERVISED = 0.25  # share of the text


@dataclass(frozen=True)
class Case:
    "What is trained, and for how long."

    shape: str  # of `SHAPES`
    phase: str
    length: int  # tokens of a row
    batch_size: int
    accumulate: int  # micro-batches of an update
    warm: int  # updates before those that are timed
    timed: int
    weights: str = "bf16_stochastic"
    max_pixels: int | None = None

    @property
    def name(self) -> str:
        four = ", nf4" * (self.weights == "nf4")
        return f"{self.shape} {self.phase}{four} T={self.length}"

    def pictures(self) -> dict:
        return dict(max_pixels=self.max_pixels) if self.max_pixels else {}


CASES = (  # nf4 last of its model: it changes the weights for good
    Case("mllama-11B", "align", 2048, 4, 2, 2, 4),
    Case("mllama-11B", "finetune", 2048, 4, 2, 2, 4),
    Case("mllama-11B", "finetune", 4096, 4, 1, 1, 3),
    Case("mllama-11B", "lora", 2048, 4, 2, 2, 4),
    Case("mllama-11B", "lora", 1536, 2, 2, 2, 4, "nf4"),  # as the recipe qlora_24gb
    Case("qwen3-vl-8B", "align", 2048, 4, 2, 2, 4, max_pixels=1024**2),
    Case("qwen3-vl-8B", "finetune", 2048, 4, 2, 2, 4, max_pixels=1024**2),
    Case("qwen3-vl-8B", "lora", 1536, 1, 2, 2, 4, "bf16", 768**2),  # as qwen3_vl_8b_lora_24gb
)
TOY_CASES = tuple(
    replace(case, length=128, warm=1, timed=2, max_pixels=case.max_pixels and 96**2)
    for case in CASES
    if case.length == 2048 or case.weights != "bf16_stochastic"
)


def eight() -> Qwen3VLConfig:
    "Qwen3-VL-8B's shape, with the ids of a toy's words: it answers with the toy's processor."
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    text = dict(intermediate_size=12288, num_hidden_layers=36, num_key_value_heads=8)
    text |= dict(max_position_embeddings=262144, rope_parameters=rope | {"mrope_interleaved": True})
    own = tiny.tiny_qwen3_vl()[0].config
    marks = ("image", "video", "vision_start", "vision_end")
    ids = {f"{mark}_token_id": getattr(own, f"{mark}_token_id") for mark in marks}
    return Qwen3VLConfig(vision_config={"out_hidden_size": 4096}, text_config=text, **ids)


SHAPES = {  # name -> config as published, and a toy's
    "mllama-11B": (
        lambda: MllamaConfig(vision_config={"image_size": 560}),
        lambda: tiny.tiny_mllama(hidden=64)[0].config,
    ),
    "qwen3-vl-8B": (eight, lambda: tiny.tiny_qwen3_vl()[0].config),
}


def config_of(shape: str, toy: bool):
    return SHAPES[shape][toy]()


def planned(toy: bool, cases) -> dict:
    "What the plan says of each case, in bytes and FLOPs."
    found = {}
    for case in cases:
        how = dict(batch_size=case.batch_size, accumulate=case.accumulate, weights=case.weights)
        how |= dict(precision="no", checkpointing="all", length=case.length, supervised=SUPERVISED)
        schedule = Schedule([PHASES[case.phase]])
        [p] = plan(config_of(case.shape, toy), schedule, **how, **case.pictures())
        found[case.name] = dict(
            peak=p.peak, at_peak=p.at_peak, flops=p.flops, again=p.again, trainable=p.trainable
        )
        print("plan", case.name, f"{p.peak / 2**30:.2f} GiB, {p.flops:.3e} FLOPs", flush=True)
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


def random_batch(
    config, rows: int, length: int, device, supervised: float = SUPERVISED, **budget
) -> dict:
    "A batch in the shapes of a real one, of random words and pixels."
    batch = example_batch(config, rows, length, supervised=supervised, **budget)
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


def timed_updates(model, case: Case, card: Card, seconds: float) -> dict:
    "Updates of one phase by the package's own code: their times and the memory they took."
    phase, warm = PHASES[case.phase], case.warm
    s = Settings(Schedule([phase]), weights=case.weights)
    s = replace(s, batch_size=case.batch_size, accumulate=case.accumulate, checkpointing="all")
    s = replace(s, precision="no")
    accelerator = Accelerator(mixed_precision="no", cpu=not card.cuda)
    device, config = accelerator.device, model.config
    prepare_weights(model, case.weights)
    card.clear()
    batch = random_batch(config, case.batch_size, case.length, device, **case.pictures())
    batches = [{k: v.clone() for k, v in batch.items()} for _ in range(case.accumulate)]
    updates = warm + case.timed
    prepared, optimizer, scheduler = train.prepare_phase(model, phase, updates, accelerator, s=s)
    times, lines, begun = [], [], card.now()
    with gradient_checkpointing(model, s.checkpointing):
        for i in range(updates):
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
        pictures=case.batch_size * case.accumulate,
        losses=[line["loss"] for line in lines],
        weights=case.weights,
    )


def asked(n: int, side: int) -> list[dict]:
    "Rows of the shapes, their pictures made larger."
    rows = [row for _, row in shapes.examples(n)]
    for row in rows:
        row["images"] = [picture.resize((side, side)) for picture in row["images"]]
    return rows


def answers(model, card: Card, toy: bool) -> dict:
    "The engine beside `generate`, in 16 bits: the same words, and how many a second."
    tokens, patch = (16, 12) if toy else (576, 16)
    processor = tiny._qwen_processor(tiny.Qwen3VLProcessor, tiny._QWEN3_TEMPLATE, patch, tokens)
    prompts = [encode(row, processor, prompt_only=True) for row in asked(16, 48 if toy else 768)]
    limit, found = (8 if toy else 64), dict(prompt_tokens=len(prompts[0]["input_ids"]))

    def timed(name, way):
        card.clear()
        held, start = card.memory().get("max_allocated", 0), card.now()
        given = way()
        found[name] = dict(seconds=card.now() - start)
        found[name]["bytes"] = card.memory().get("max_allocated", 0) - held
        return given

    with left_as_found(model):
        engine = Engine(model, processor)
        never = dict(suppress_tokens=engine.never.tolist(), pad_token_id=0)
        how = dict(max_new_tokens=limit, eos_token_id=engine.ends)
        warm = Sampling(temperature=1.0)

        def theirs(chosen, **more):
            batch = {k: v.to(model.device) for k, v in engine.collate(chosen).items()}
            batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
            out = model.generate(**batch, **how, **never, **more)
            return out[:, batch["input_ids"].shape[1] :].tolist()

        def ours(chosen, draws=1, sampling=Sampling(temperature=0.0)):
            roots = engine.look(chosen, [str(i) for i in range(len(chosen))])
            writes = [
                Write(root, i, (), limit, sampling, last=True)
                for root in roots
                for i in range(draws)
            ]
            return [list(piece.ids) for piece in engine.write(writes)]

        ours(prompts[:1])  # to warm up
        theirs(prompts[:1])
        at_once = timed("16 questions at once", lambda: ours(prompts))
        one_each = timed("16 questions, one after another", lambda: [ours([p])[0] for p in prompts])
        said = timed("16 questions, generate", lambda: theirs(prompts, do_sample=False))
        sampled = dict(do_sample=True, temperature=1.0, top_k=0, num_return_sequences=8)
        timed("best of 8", lambda: ours(prompts[:1], 8, warm))
        timed("best of 8, generate", lambda: theirs(prompts[:1], **sampled))
        timed("best of 8, alone", lambda: [ours(prompts[:1], 1, warm) for _ in range(8)])
    said = [ids[: len(mine)] for ids, mine in zip(said, at_once)]
    found["first words as generate's"] = sum(a[:1] == b[:1] for a, b in zip(at_once, said))
    found["answers as generate's"] = sum(a == b for a, b in zip(at_once, said))
    found["answers alone as at once"] = sum(a == b for a, b in zip(at_once, one_each))
    return found


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
    for make in tiny.TOYS:
        model, _ = make()
        batch = random_batch(model.config, 2, 1200, "cpu", 0.5)
        exact = gradient(model.double(), batch, "cpu")
        errors = {}
        for how, weights, autocast in (
            ("float32", torch.float32, False),
            ("float32, convolutions too", torch.float32, False),
            ("bf16 autocast", torch.float32, True),
            ("bf16 weights", torch.bfloat16, False),
        ):
            toy, _ = make()
            torch.backends.cudnn.allow_tf32 = how != "float32, convolutions too"
            if weights != torch.float32:
                tiny.in_type(toy, weights)
            got = gradient(toy, batch, device, autocast)
            errors[how] = ((got - exact).norm() / exact.norm()).item()
        found[make.__name__] = errors
        print(make.__name__, {k: f"{v:.1e}" for k, v in errors.items()}, flush=True)
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
    cases = list(TOY_CASES if a.tiny else CASES)
    if a.only_plans:
        a.plans.write_text(json.dumps(planned(a.tiny, cases), indent=1))
        return
    said = planned(True, cases) if a.tiny else json.loads(a.plans.read_text())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = Card(device)
    versions = {m.__name__: m.__version__ for m in (torch, transformers, accelerate)}
    report = Report(a.out, dict(hardware=card.name, memory=card.total, versions=versions))
    if not with_rounding():
        cases = [replace(c, weights=c.weights.removesuffix("_stochastic")) for c in cases]
    if card.cuda:  # what the plan says does not fit is left out
        cases = [c for c in cases if on_card(said[c.name]["peak"]) < card.total]
    model = None

    def build(shape):
        nonlocal model
        model = None
        gc.collect()
        card.clear()
        model = built(config_of(shape, a.tiny), device)
        numbers = sum(p.numel() for p in model.parameters())
        return dict(parameters=numbers, dtype=str(model.dtype), **card.memory())

    def timed(case, seconds):
        return compared(timed_updates(model, case, card, seconds), said[case.name], card)

    report.section("toy gradients", toy_gradients, device)
    report.section("toy run", toy_run, device)
    shape = None
    for i, case in enumerate(cases):
        left = a.budget - (time.perf_counter() - begun)
        if left < 8:
            report.section(case.name, lambda: dict(left_out="no time left"))
            continue
        if case.shape != shape:
            shape = case.shape
            report.section(f"{shape} built", build, shape)
            if shape == "qwen3-vl-8B":
                report.section("answers", answers, model, card, a.tiny)
        report.section(case.name, timed, case, left / (len(cases) - i))
    print(f"{time.perf_counter() - begun:.0f} s in all; {a.out}")


if __name__ == "__main__":
    main()
