"""Trainers of transformers and TRL: the losses of PEFT on bitsandbytes, with our layers in every position."""

import pytest
import torch
from helpers import TEXTS, assert_same_bits, tiny_llama

import lora_kernels as lk

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

FP32, BF16 = torch.float32, torch.bfloat16
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = tiny_llama(layers=1)
    for p in model.parameters():
        p.data *= 3  # losses move within a few steps
    model.save_pretrained(path)
    return path


def ours(path, dtype=FP32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=lk.QLoRAQuantConfig())


def stock(path, dtype=FP32):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config)


def arguments(tmp_path, **options):
    defaults = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "seed": 3}
    quiet = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": False}
    return {"output_dir": str(tmp_path)} | defaults | quiet | options


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def sft(model, tokenizer, tmp_path, messages=False, **options):
    if messages:
        rows = [[{"role": "user", "content": t[:9]}, {"role": "assistant", "content": t[9:]}] for t in TEXTS]
        data = Dataset.from_dict({"messages": rows})
    else:
        data = Dataset.from_dict({"text": TEXTS})
    args = trl.SFTConfig(**arguments(tmp_path, max_length=32, **options))
    torch.manual_seed(0)  # older versions of TRL make the adapter before they seed
    trainer = trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=peft.LoraConfig(**LORA))
    assert len(lk.verify(trainer.model).fused) == 7 or model.config.quantization_config.quant_method == "bitsandbytes"
    return trainer


def dpo(model, tokenizer, tmp_path, **options):
    columns = {"prompt": [t[:9] for t in TEXTS], "chosen": [t[9:] for t in TEXTS], "rejected": ["no." for _ in TEXTS]}
    args = trl.DPOConfig(**arguments(tmp_path, max_length=32, **options))
    data = Dataset.from_dict(columns)
    torch.manual_seed(0)  # older versions of TRL make the adapter before they seed
    return trl.DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=peft.LoraConfig(**LORA))


def plain(model, tokenizer, tmp_path, **options):
    """transformers' Trainer on a model prepared by PEFT's own function; LoRA in float32."""
    checkpointing = options.get("gradient_checkpointing", False)
    model = peft.prepare_model_for_kbit_training(
        model, checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    rows = tokenizer(TEXTS, padding="max_length", max_length=32, truncation=True)
    data = Dataset.from_dict({"input_ids": rows["input_ids"], "labels": rows["input_ids"]})
    return Trainer(model, TrainingArguments(**arguments(tmp_path, **options)), train_dataset=data)


@pytest.mark.parametrize("make", [sft, dpo, plain], ids=lambda f: f.__name__)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gc"])
def test_losses_are_those_of_stock(make, checkpointing, checkpoint, tokenizer, tmp_path):
    runs = []
    for load in (ours, stock):
        trainer = make(load(checkpoint), tokenizer, tmp_path, gradient_checkpointing=checkpointing)
        lora = {p.dtype for n, p in trainer.model.named_parameters() if "lora_" in n}
        assert lora == ({FP32} if make is plain else {BF16})  # TRL's choice for 4-bit models
        trainer.train()
        runs.append(losses(trainer))
    print(make.__name__, *runs)
    assert len(runs[0]) == 4 and runs[0][0] != runs[0][-1]
    assert torch.allclose(torch.tensor(runs[0]), torch.tensor(runs[1]), atol=2e-4 if make is plain else 5e-3), runs


def test_bf16_chat_with_autocast(checkpoint, tokenizer, tmp_path):
    runs = []
    for load in (ours, stock):
        trainer = sft(load(checkpoint, BF16), tokenizer, tmp_path, messages=True, bf16=True)
        trainer.train()
        runs.append(losses(trainer))
    assert torch.allclose(torch.tensor(runs[0]), torch.tensor(runs[1]), atol=3e-2), runs


def test_resume(checkpoint, tokenizer, tmp_path):
    """Steps 3 and 4 after a restart are those of the run that went on."""
    whole = plain(ours(checkpoint), tokenizer, tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    again = plain(ours(checkpoint), tokenizer, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again)[-2:] == losses(whole)[-2:]
    theirs = dict(whole.model.named_parameters())
    for name, p in again.model.named_parameters():
        assert_same_bits(p.data, theirs[name].data, name)


def test_base_without_adapters_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(ours(checkpoint), TrainingArguments(**arguments(tmp_path)))
