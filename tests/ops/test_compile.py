"""torch.compile of whole PEFT models: one graph, few compilations, results and gradients of eager mode."""

import pytest
import torch
from helpers import as_bitsandbytes, tiny_llama
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_kernels as lk

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

IDS = torch.arange(96).reshape(2, 48) * 7 % 96
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def peft_model(kind, **lora):
    lk.enable_peft()
    model = lk.apply_qlora(tiny_llama(layers=1), r=0)
    if kind == "bitsandbytes":
        as_bitsandbytes(model)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", **lora))
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return tuned


def gradients(model, run, ids):
    model.zero_grad()
    loss = run(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_training(model, compiled, lengths):
    for n in lengths:
        loss, want = gradients(model, model, IDS[:, :n])
        got_loss, got = gradients(model, compiled, IDS[:, :n])
        assert torch.allclose(loss, got_loss, rtol=1e-5)
        assert got.keys() == want.keys() and got
        for name in want:
            assert (got[name] - want[name]).norm() <= 1e-4 * want[name].norm() + 1e-6, name


def check_inference(model, compiled, lengths):
    model.eval()
    with torch.no_grad():
        for n in lengths:
            want, got = (m(input_ids=IDS[:, :n]).logits for m in (model, compiled))
            assert (got - want).norm() < 1e-5 * want.norm()


def breaks():
    return sum(torch._dynamo.utils.counters["graph_break"].values())


@pytest.mark.parametrize("kind", ["bitsandbytes", "own"])
def test_five_lengths_take_two_compilations(kind):
    """Static, then dynamic; in training and in inference."""
    model, counter = peft_model(kind), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    check_training(model, compiled, (48, 17, 20, 33, 41))
    training = counter.frame_count
    check_inference(model, compiled, (48, 17, 20, 33, 41))
    inference = counter.frame_count - training
    print(f"graph breaks: {breaks()}; compilations: {training} in training, {inference} in inference")
    assert breaks() == 0
    assert training <= 2 and inference <= 2


def test_inductor():
    model = peft_model("bitsandbytes")
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    check_training(model, compiled, (48,))
    check_inference(model, compiled, (48,))
    assert breaks() == 0


def test_dora_traces():
    model = peft_model("bitsandbytes", use_dora=True)
    check_training(model, torch.compile(model, backend="aot_eager", fullgraph=True), (20,))


def test_dropout_traces():
    model = peft_model("own", lora_dropout=0.5).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = {gradients(model, compiled, IDS)[0].item() for _ in range(3)}
    assert len(losses) == 3  # a mask of its own each time
