"""Adapter files: PEFT reads ours, we read PEFT's, and nothing half-written is ever left."""

import json
import shutil

import pytest
import torch
from helpers import LEAVES, assert_same_bits, assert_same_state, bnb_llama, edit_json, model_bytes, snapshot, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn

import lora_kernels as lk
from lora_kernels import AdapterConfig
from lora_kernels.adapter_files import CONFIG, WEIGHTS
from lora_kernels.model import fused_layers
from lora_kernels.testing import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

peft = pytest.importorskip("peft")


def trained(model, std=0.05):
    """The model with adapters that have an effect."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=std)
    return model


def qlora_llama(seed=0, **options):
    return lk.apply_qlora(tiny_llama(seed), **({"r": 4, "lora_alpha": 8} | options))


IDS = torch.arange(18).view(2, 9) * 5


def logits(model):
    """Of a model in training mode (no dropout here): bitsandbytes repacks its weights in eval mode."""
    return model.train()(IDS).logits.detach()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3.5},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": r"model\.layers\.1\..*_proj"},
    ],
    ids=str,
)
def test_peft_loads_ours_over_bitsandbytes(options, tmp_path):
    """The same logits as ours over the same bytes, and strictly the same weights."""
    model = trained(qlora_llama(**options))
    lk.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(bnb_llama(), tmp_path)
    base = logits(qlora_llama())
    assert relative_error(logits(model), base) > 0.01
    assert relative_error(logits(model), logits(theirs)) < 1e-5
    loaded = peft.get_peft_model_state_dict(theirs)
    adapted = [n for n, layer in fused_layers(model).items() if layer.adapters]
    assert len(loaded) == 2 * len(adapted)
    for name in adapted:
        layer = model.get_submodule(name)
        for part in ("lora_A", "lora_B"):
            assert_same_bits(loaded[f"base_model.model.{name}.{part}.weight"], getattr(layer, part)["default"].weight.detach())


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": list(LEAVES),
            "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.up_proj": 2},
            "alpha_pattern": {"k_proj": 1, r".*layers\.0\..*v_proj": 64},
        },
        {"r": 2, "lora_alpha": 8, "target_modules": ["v_proj"], "layers_to_transform": [1]},
    ],
    ids=["all-linear", "rslora", "patterns", "one layer"],
)
def test_we_load_pefts_over_bitsandbytes(config, tmp_path):
    theirs = trained(peft.get_peft_model(bnb_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **config)))
    theirs.save_pretrained(tmp_path)
    model = lk.apply_qlora(bnb_llama(), r=0)
    lk.load_adapter(model, tmp_path)
    assert relative_error(logits(theirs), logits(qlora_llama())) > 0.01
    assert relative_error(logits(model), logits(theirs)) < 1e-5

    # and saved by us again, PEFT still computes the same
    lk.save_adapter(model, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(bnb_llama(), tmp_path / "again")
    assert relative_error(logits(again), logits(theirs)) < 1e-5
    for name, tensor in peft.get_peft_model_state_dict(theirs).items():
        assert_same_bits(peft.get_peft_model_state_dict(again)[name], tensor, name)


def test_layers_of_different_rank_and_alpha(tmp_path):
    model = qlora_llama(r=0)
    for i, (name, layer) in enumerate(fused_layers(model).items()):
        if "mlp" not in name:
            layer.add_adapter("default", AdapterConfig(2 + i % 3, 1.0 + i % 2))
    trained(model)
    lk.save_adapter(model, tmp_path)
    assert relative_error(logits(peft.PeftModel.from_pretrained(bnb_llama(), tmp_path)), logits(model)) < 1e-5
    other = qlora_llama(r=0)
    lk.load_adapter(other, tmp_path)
    assert_same_bits(logits(other), logits(model))


def test_round_trip_and_names(tmp_path):
    model = trained(qlora_llama(lora_dropout=0.1))
    lk.save_adapter(model, tmp_path / "new" / "dir")
    assert set(snapshot(tmp_path / "new" / "dir")) == {CONFIG, WEIGHTS}
    other = qlora_llama(seed=0, r=4)
    lk.load_adapter(other, tmp_path / "new" / "dir", adapter="second")
    for name, layer in fused_layers(other).items():
        assert layer.active_adapter == "second"
        assert layer.adapters["second"] == AdapterConfig(4, 8, 0.1)
        assert_same_bits(layer.lora_A["second"].weight, model.get_submodule(name).lora_A["default"].weight)
        assert layer.lora_A["second"].weight.requires_grad
        assert not layer.lora_A["default"].weight.requires_grad
    assert_same_bits(other.eval()(IDS).logits.detach(), model.eval()(IDS).logits.detach())
    lk.save_adapter(other, tmp_path / "second", adapter="second")
    assert snapshot(tmp_path / "second") == snapshot(tmp_path / "new" / "dir")
    lk.load_adapter(other, str(tmp_path / "second"))  # into the existing "default"
    assert {layer.active_adapter for layer in fused_layers(other).values()} == {"default"}
    lk.save_adapter(trained(model), tmp_path / "second")  # over an older one
    lk.load_adapter(other, tmp_path / "second")
    assert_same_bits(other.eval()(IDS).logits.detach(), model.eval()(IDS).logits.detach())


def test_config_is_pefts(tmp_path):
    lk.save_adapter(qlora_llama(r=4, lora_alpha=8, lora_dropout=0.05), tmp_path)
    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 8, 0.05, "none")
    assert config.target_modules == set(LEAVES)
    assert config.task_type == "CAUSAL_LM"
    assert not config.rank_pattern
    assert not config.alpha_pattern
    known = json.loads((tmp_path / CONFIG).read_text())
    assert set(known) <= set(config.to_dict()), "keys that PEFT does not know"


def test_adapters_in_bfloat16_keep_their_dtype(tmp_path):
    model = trained(qlora_llama()).to(torch.bfloat16)
    lk.save_adapter(model, tmp_path)
    other = qlora_llama().to(torch.bfloat16)
    lk.load_adapter(other, tmp_path)
    assert_same_bits(logits(other), logits(model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    lk.save_adapter(trained(qlora_llama()), directory)
    return directory


def edit_weights(file, **changes):
    """Rewrites the tensors of a file; None removes one."""
    prefix = "base_model.model.model.layers.0.self_attn."
    tensors = load_file(file) | {prefix + k.replace("__", ".") + ".weight": v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, file)


BAD_FILES = {
    "no directory": (lambda d: shutil.rmtree(d), FileNotFoundError, f"{CONFIG} does not exist"),
    "no config": (lambda d: (d / CONFIG).unlink(), FileNotFoundError, f"{CONFIG} does not exist.*{WEIGHTS}"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), FileNotFoundError, f"{WEIGHTS} does not exist"),
    "torn config": (lambda d: (d / CONFIG).write_text('{"r": 4,'), ValueError, f"{CONFIG} is damaged"),
    "config is no object": (lambda d: (d / CONFIG).write_text("[1]"), ValueError, CONFIG),
    "config is binary": (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe\x00"), ValueError, f"{CONFIG} is damaged"),
    "torn weights": (
        lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-100]),
        ValueError,
        f"{WEIGHTS} is damaged",
    ),
    "empty weights": (lambda d: (d / WEIGHTS).write_bytes(b""), ValueError, f"{WEIGHTS} is damaged"),
    "no tensors": (lambda d: save_file({}, d / WEIGHTS), ValueError, WEIGHTS),
    "no rank": (lambda d: edit_json(d / CONFIG, r=None), ValueError, "lacks r"),
    "not LoRA": (lambda d: edit_json(d / CONFIG, peft_type="IA3"), ValueError, "peft_type must be LORA, got 'IA3'"),
    "DoRA": (lambda d: edit_json(d / CONFIG, use_dora=True), ValueError, "use_dora must be unset"),
    "trained bias": (lambda d: edit_json(d / CONFIG, bias="lora_only"), ValueError, "bias must be 'none', got 'lora_only'"),
    "rank 0": (lambda d: edit_json(d / CONFIG, r=0), ValueError, "r must be an integer >= 1, got 0"),
    "rank is text": (lambda d: edit_json(d / CONFIG, r="four"), ValueError, "r must be an integer >= 1, got 'four'"),
    "alpha is text": (lambda d: edit_json(d / CONFIG, lora_alpha="much"), ValueError, "lora_alpha must be a finite number"),
    "another rank": (lambda d: edit_json(d / CONFIG, r=5), ValueError, r"lora_A must be \[5, \d+\] for rank 5, got \[4, \d+\]"),
    "another shape": (
        lambda d: edit_weights(d / WEIGHTS, q_proj__lora_B=torch.zeros(63, 4)),
        ValueError,
        r"q_proj.lora_B must be \[64, 4\] for rank 4, got \[63, 4\]",
    ),
    "only half": (lambda d: edit_weights(d / WEIGHTS, q_proj__lora_B=None), ValueError, "q_proj has lora_A only"),
    "unknown layer": (
        lambda d: edit_weights(d / WEIGHTS, x_proj__lora_A=torch.zeros(4, 64), x_proj__lora_B=torch.zeros(64, 4)),
        ValueError,
        "no FusedQLoRALinear called model.layers.0.self_attn.x_proj",
    ),
    "other tensors": (
        lambda d: edit_weights(d / WEIGHTS, q_proj__lora_magnitude_vector=torch.zeros(64)),
        ValueError,
        "lora_magnitude_vector.weight is not a LoRA matrix",
    ),
    "not a number": (
        lambda d: edit_weights(d / WEIGHTS, q_proj__lora_A=torch.full((4, 64), float("nan"))),
        ValueError,
        "q_proj.*NaN or infinity",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_change_nothing(name, saved, tmp_path):
    spoil, error, words = BAD_FILES[name]
    directory = tmp_path / "adapter"
    shutil.copytree(saved, directory)
    spoil(directory)
    model = qlora_llama()
    before, files = model_bytes(model), snapshot(tmp_path)
    with pytest.raises(error, match=words):
        lk.load_adapter(model, directory, adapter="other")
    assert_same_state(model_bytes(model), before)
    assert {layer.active_adapter for layer in fused_layers(model).values()} == {"default"}
    assert snapshot(tmp_path) == files


def test_bad_models(saved):
    with pytest.raises(ValueError, match=r"no FusedQLoRALinear: call apply_qlora first"):
        lk.load_adapter(tiny_llama(), saved)
    other_rank = qlora_llama(r=3)
    before = model_bytes(other_rank)
    with pytest.raises(ValueError, match=r"adapter 'default' of rank 3, the file one of rank 4"):
        lk.load_adapter(other_rank, saved)
    assert_same_state(model_bytes(other_rank), before)
    merged = qlora_llama()
    list(fused_layers(merged).values())[-1].merge()
    with pytest.raises(ValueError, match=r"merged into its weight.*unmerge"):
        lk.load_adapter(merged, saved, adapter="other")
    assert all(list(layer.adapters) == ["default"] for layer in fused_layers(merged).values())


def test_refused_saves_write_nothing(tmp_path):
    model = qlora_llama()
    with pytest.raises(ValueError, match="adapter 'third' is in no layer of the model; adapters: default"):
        lk.save_adapter(model, tmp_path / "a", adapter="third")
    with pytest.raises(ValueError, match="adapters: none"):
        lk.save_adapter(tiny_llama(), tmp_path / "a")
    layers = list(fused_layers(model).values())
    layers[3].adapters["default"] = AdapterConfig(4, 8, lora_dropout=0.5)
    with pytest.raises(ValueError, match="lora_dropout differs between layers"):
        lk.save_adapter(model, tmp_path / "a")
    layers[3].adapters["default"] = AdapterConfig(4, 8)
    layers[-1].lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj.lora_B.default.weight contains NaN"):
        lk.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_interrupted_save_keeps_the_old_files(saved, tmp_path, monkeypatch):
    """A full disk or Ctrl-C while the tensors are written: the older adapter is whole, and no temporary file stays."""
    directory = tmp_path / "adapter"
    shutil.copytree(saved, directory)
    before = snapshot(directory)

    def fail(tensors, file, **kwargs):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_kernels.adapter_files.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        lk.save_adapter(trained(qlora_llama()), directory)
    assert snapshot(directory) == before


@pytest.mark.parametrize("zero3", [True, False])
def test_matrices_in_parts(saved, tmp_path, zero3):
    """As DeepSpeed's ZeRO-3 and FSDP1 leave them outside of their gathering contexts."""
    model = qlora_llama()
    matrix = list(fused_layers(model).values())[2].lora_B["default"].weight
    matrix.data = matrix.data.new_empty(0)
    if zero3:
        matrix.ds_id = 7
    words = rf"v_proj.lora_B.default.weight is \[0\] here and \[32, 4\].*{'ZeRO-3.*FSDP2' if zero3 else 'summon_full_params'}"
    before = model_bytes(model)
    for call in (lambda: lk.save_adapter(model, tmp_path / "a"), lambda: lk.load_adapter(model, saved)):
        with pytest.raises(ValueError, match=words):
            call()
    assert not (tmp_path / "a").exists()
    assert_same_state(model_bytes(model), before)


def test_directory_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        lk.save_adapter(qlora_llama(), tmp_path / "file")
    assert snapshot(tmp_path) == {"file": b"mine"}
