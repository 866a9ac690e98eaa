"""Ours beside PEFT on bitsandbytes, on a real model: run one comparison and see its numbers.

    python tests/hf/show_huggingface.py sft demo/SmolLM2-135M-Instruct --steps 30
    python tests/hf/show_huggingface.py accelerate demo/SmolLM2-135M-Instruct
    python tests/hf/show_huggingface.py checkpoint demo/SmolLM2-135M-Instruct
    python tests/hf/show_huggingface.py compile demo/SmolLM2-135M-Instruct --layers 3

The same comparisons on tiny models are tests: test_trainers.py, test_bitsandbytes.py, test_quantizer.py, test_compile.py.
"""

import argparse
import inspect
import statistics
import tempfile
import time
import warnings

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

import lora_kernels as lk

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
STOCK = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)


def load(args, quantization_config=None, path=None, **options):
    config = AutoConfig.from_pretrained(path or args.model)
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    return AutoModelForCausalLM.from_pretrained(path or args.model, config=config, dtype=torch.bfloat16, **options)


def texts(n=64):
    """Real text of this machine: the docstrings of torch.nn.functional."""
    functions = vars(torch.nn.functional).values()
    found = [inspect.getdoc(f) for f in functions if callable(f) and len(inspect.getdoc(f) or "") > 300]
    return (found * (n // len(found) + 1))[:n]


class Clock(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.steps.append(time.perf_counter() - self.began)


def sft(args):
    """SFTTrainer, ours and stock: both loss lists."""
    runs = {}
    for name, config in {"ours": lk.QLoRAQuantConfig(), "stock": STOCK}.items():
        if args.only not in (None, name):
            continue
        torch.manual_seed(0)
        clock = Clock()
        with tempfile.TemporaryDirectory() as out:
            options = SFTConfig(
                out,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch,
                max_length=args.length,
                learning_rate=5e-4,
                logging_steps=1,
                gradient_checkpointing=False,
                use_cpu=True,
                bf16=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                seed=0,
            )
            trainer = SFTTrainer(
                load(args, config),
                options,
                train_dataset=Dataset.from_dict({"text": texts()}),
                processing_class=AutoTokenizer.from_pretrained(args.model),
                peft_config=LoraConfig(**LORA),
                callbacks=[clock],
            )
            trainer.train()
        runs[name] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        print(f"{name:5}  median step {statistics.median(clock.steps):.2f} s  losses", *(f"{x:.3f}" for x in runs[name]))
    if len(runs) == 2:
        apart = [abs(a - b) for a, b in zip(*runs.values(), strict=True)]
        print(f"apart: mean {statistics.fmean(apart):.4f}, most {max(apart):.4f}")


def accelerate(args):
    """A stock PEFT + bitsandbytes run in whose middle one copy is accelerated: the next losses, and the step time ratio."""
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(get_peft_model(load(args, STOCK), LoraConfig(**LORA)).train())
        optimizers.append(torch.optim.AdamW([p for p in models[-1].parameters() if p.requires_grad], lr=5e-4))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    batches = [tokenizer([t[:2000]], return_tensors="pt", truncation=True, max_length=args.length) for t in texts()]

    def step(i, n):
        began = time.perf_counter()
        loss = models[i](**batches[n], labels=batches[n]["input_ids"]).loss
        loss.backward()
        optimizers[i].step()
        optimizers[i].zero_grad()
        return loss.item(), time.perf_counter() - began

    for n in range(args.steps):
        if n == args.steps // 2:
            lk.accelerate(models[0])
            print(f"accelerated: {len(lk.verify(models[0], strict=True).fused)} layers fused, optimizer and parameters kept")
            ratios = []
        (ours, seconds), (stock, theirs) = step(0, n), step(1, n)
        print(f"step {n:2}  {ours:.4f}  stock {stock:.4f}")
        if n >= args.steps // 2:
            ratios.append(theirs / seconds)
    print(f"step time: stock / accelerated {statistics.median(ratios):.2f}")


def checkpoint(args):
    """A double-quantized checkpoint of bitsandbytes through us and back: logits against its training path."""
    ids = torch.arange(48).view(1, 48) * 7 + 300

    @torch.no_grad()
    def logits(model):
        return model.train()(input_ids=ids).logits.float()

    with tempfile.TemporaryDirectory() as theirs, tempfile.TemporaryDirectory() as back:
        load(args, STOCK).save_pretrained(theirs)
        want = logits(load(args, path=theirs))
        ours = load(args, lk.QLoRAQuantConfig(), theirs)
        exact = logits(lk.merge_dense(load(args, lk.QLoRAQuantConfig(), theirs), torch.float32))
        got = logits(ours)
        for name, a in (("bitsandbytes", want), ("ours", got)):
            print(f"{name} against the dequantized model in float32: {((a - exact).norm() / exact.norm()).item():.2e}")
        ours.save_pretrained(back)
        again = load(args, path=back)
        print(f"saved by us, loaded by bitsandbytes ({type(again.model.layers[0].mlp.up_proj).__name__}):", end=" ")
        print("the same logits" if torch.equal(logits(again), want) else "OTHER LOGITS")


def compiled(args):
    """torch.compile(fullgraph=True) of the PEFT model: graph breaks, and compilations over five lengths."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    model = get_peft_model(load(args, lk.QLoRAQuantConfig()), LoraConfig(**LORA)).train()
    counter = CompileCounterWithBackend(args.backend)
    run = torch.compile(model, backend=counter, fullgraph=True)
    for n in (64, 17, 30, 41, 57):
        ids = torch.arange(n).view(1, n) * 11 + 300
        losses = [m(input_ids=ids, labels=ids).loss for m in (run, model)]
        losses[0].backward()
        print(f"length {n}: loss {losses[0].item():.4f}, eager {losses[1].item():.4f}, compilations {counter.frame_count}")
    print(f"graph breaks {sum(counters['graph_break'].values())}, recompilations {counter.frame_count - 1}")


def main():
    commands = {"sft": sft, "accelerate": accelerate, "checkpoint": checkpoint, "compile": compiled}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=commands)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=64, help="tokens a record")
    parser.add_argument("--layers", type=int, help="only the first ones")
    parser.add_argument("--only", choices=["ours", "stock"])
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    commands[args.what](args)


if __name__ == "__main__":
    main()
