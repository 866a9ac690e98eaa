"""A short fine-tuning run by us and by PEFT over bitsandbytes, on the same bytes, adapters and data."""

import copy

import pytest
import torch
from helpers import LEAVES, bnb_llama

import lora_kernels as lk
from lora_kernels.model import fused_layers
from lora_kernels.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

peft = pytest.importorskip("peft")

STEPS = 20


def train(model, batches):
    """Losses of AdamW steps over `batches`; 16-bit models keep their adapters in float32, as PEFT does."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def adapters(model):
    """The adapter weights by layer and part, of either kind of model."""
    return {
        n.removeprefix("base_model.model.").replace(".default", ""): p.detach()
        for n, p in model.named_parameters()
        if "lora_" in n
    }


@pytest.mark.parametrize(
    ("dtype", "quant_type", "tolerance"),
    [
        # float32: only the order of the sums differs, 2e-7 of the loss after 20 steps
        (torch.float32, "nf4", 1e-5),
        (torch.float32, "fp4", 1e-5),
        # bfloat16: PEFT rounds base and update to 8 bits one after the other, we round their float32 sum once; 20 steps apart
        # that is 1e-4 of the loss, far below the 8e-3 of one bfloat16 rounding
        (torch.bfloat16, "nf4", 1e-3),
    ],
    ids=["fp32-nf4", "fp32-fp4", "bf16-nf4"],
)
def test_losses_match_peft_over_bitsandbytes(backend, dtype, quant_type, tolerance):
    torch.manual_seed(0)
    base = bnb_llama(dtype=dtype, quant_type=quant_type, layers=3)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(LEAVES), task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = lk.apply_qlora(base, r=8, lora_alpha=16)
    assert len(fused_layers(ours)) == 21
    start = adapters(theirs)
    with torch.no_grad():
        for name, tensor in adapters(ours).items():
            assert tensor.dtype == start[name].dtype == torch.float32
            tensor.copy_(start[name])

    text = torch.randint(96, (16, 24))  # 16 sequences, learnt by heart
    batches = [text[i % 4 * 4 :][:4] for i in range(STEPS)]
    want, got = train(theirs, batches), train(ours, batches)
    assert want[-4:].mean() < want[:4].mean() - 0.05, "the run must learn something, or it compares nothing"
    assert ((got - want).abs() / want).max() <= tolerance, f"ours {got.tolist()}, PEFT {want.tolist()}"
    moved = {n: p for n, p in adapters(theirs).items() if relative_error(p, start[n]) > 0 or "lora_B" in n}
    assert moved
    if dtype == torch.float32:
        for name, tensor in adapters(ours).items():
            assert relative_error(tensor, adapters(theirs)[name]) < 0.01, name


def test_dropout_run_is_repeatable(backend):
    """With dropout, the same seed gives the same losses to the bit, another seed others."""
    text = torch.randint(96, (4, 24))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = lk.apply_qlora(bnb_llama(), r=4, lora_dropout=0.3)
        torch.manual_seed(seed)
        losses.append(train(model, [text] * 4).tolist())
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
