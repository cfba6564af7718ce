"""Loading, refusing and describing checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from workbench import bundled
from workbench.errors import InputError
from workbench.families import FAMILIES, families
from workbench.layers import Layer, find_layers
from workbench.models import describe, load
from workbench.recorder import Recorder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete OLMoE checkpoint in several files."""
    folder = tmp_path_factory.mktemp("olmoe")
    tiny.module("olmoe").save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "gpt_oss", "nemotron_h", "switch_transformers", "jetmoe"])
def test_a_folder_loads_as_it_was_saved(family: str, tmp_path: Path) -> None:
    original = tiny.module(family)
    original.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert (loaded.name, loaded.family, loaded.dtype, loaded.revision) == (str(tmp_path), family, "float32", None)
    assert not loaded.module.training and loaded.tokenizer is None
    inputs = tiny.inputs(original)
    with torch.inference_mode():
        # Not bit for bit: mapped weights lie elsewhere in memory, and other kernels are chosen.
        torch.testing.assert_close(loaded.module(**inputs)[0], original(**inputs)[0], rtol=1e-4, atol=1e-4)
    assert loaded.max_length in (256, None, 512)  # switch has no limit in its configuration


def test_dtype(checkpoint: Path) -> None:
    assert load(checkpoint, dtype="bfloat16").dtype == "bfloat16"
    assert load(checkpoint, dtype=torch.float16).dtype == "float16"
    for wrong in ("float3", "int64", "nn"):
        with pytest.raises(InputError, match=f"dtype '{wrong}': expected 'auto', 'float32'"):
            load(checkpoint, dtype=wrong)


def test_devices_that_there_are_not(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="device 'foo' can't be used: Expected one of cpu, .* Take cpu; cuda needs"):
        load(checkpoint, device="foo")

    def without_cuda(*_: Any, **__: Any) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "empty", without_cuda)
    with pytest.raises(InputError, match=r"device 'cuda' can't be used: Torch not compiled with CUDA enabled\. Take"):
        load(checkpoint, device="cuda")


def test_a_module_in_memory_is_used_as_it_is() -> None:
    module = tiny.module("olmoe").train()
    tokenizer = object()
    loaded = load(module, tokenizer=tokenizer)
    assert loaded.module is module and not module.training
    assert loaded.name == "OlmoeForCausalLM" and loaded.tokenizer is tokenizer
    assert loaded.device == torch.device("cpu")


@pytest.mark.parametrize("name", ["demo", "demo-early"])
def test_bundled_models(name: str) -> None:
    if not (bundled.path(f"models/{name}") / "model.safetensors").is_file():
        pytest.skip("the demonstration model isn't trained yet")
    loaded = load(name)
    assert loaded.name == name and loaded.family == "olmoe" and loaded.tokenizer is not None
    assert len(loaded.layers) == 6 and loaded.layers[0].n_experts == 32 and loaded.layers[0].top_k == 4
    told = describe(name)
    assert told["parameters"] == sum(p.numel() for p in loaded.module.parameters())


VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}


@pytest.mark.parametrize(
    ("config", "cls"),
    [
        (
            lambda: transformers.Qwen3VLMoeConfig(
                text_config=tiny.config("qwen3_vl_moe").to_dict(),
                vision_config=VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            ),
            "Qwen3VLMoeForConditionalGeneration",
        ),
        (
            lambda: transformers.AutoConfig.for_model(
                "qwen3_5_moe", text_config=tiny.config("qwen3_5_moe").to_dict(), vision_config=VISION
            ),
            "",
        ),
        (
            lambda: transformers.AutoConfig.for_model(
                "ernie4_5_vl_moe", text_config=tiny.config("ernie4_5_vl_moe").to_dict(), vision_config=VISION
            ),
            "Ernie4_5_VLMoeForConditionalGeneration",
        ),
    ],
    ids=["qwen3_vl_moe", "qwen3_5_moe", "ernie4_5_vl_moe"],
)
def test_the_text_part_of_multimodal_checkpoints(config: Any, cls: str, tmp_path: Path) -> None:
    made = config()
    torch.manual_seed(0)
    auto = next(a for a in (transformers.AutoModelForImageTextToText,) if type(made) in a._model_mapping)
    auto.from_config(made).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert cls in ("", type(loaded.module).__name__)
    assert loaded.layers and not any("vis" in layer.name for layer in loaded.layers)
    with torch.inference_mode(), Recorder(loaded) as recorder:
        loaded.module(input_ids=tiny.inputs(loaded.module)["input_ids"])
    (observed,) = recorder.take()
    assert all(seen.experts.shape == (2, 9, tiny.TOP_K) for seen in observed)


# -- refusing ----------------------------------------------------------------------------------------------------------


def test_dense_models_are_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    dense = transformers.LlamaForCausalLM(config)
    dense.save_pretrained(tmp_path)
    for given in (dense, tmp_path):
        with pytest.raises(InputError, match=r"LlamaForCausalLM\) is not a mixture of experts: no router found"):
            load(given)
    with pytest.raises(InputError, match="is not a mixture of experts"):
        describe(tmp_path)


def test_refused_families_say_why(tmp_path: Path) -> None:
    module = tiny.module("nllb_moe")
    with pytest.raises(InputError, match="nllb_moe can't be traced: .* runs only experts 0 and 1"):
        load(module)
    module.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="nllb_moe can't be traced"):
        load(tmp_path)


def test_unknown_families_are_refused() -> None:
    class NewRouter(nn.Linear):
        pass

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = NewRouter(4, 4)
            self.experts = nn.Identity()

    with pytest.raises(InputError, match="a family that isn't known"):
        load(nn.Sequential(Block()))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "", Path("nowhere"), "~/nowhere"])
def test_no_such_folder(name: str | Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load(name)


def test_no_such_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="nobody/nothing can't be loaded"):
        load("nobody/nothing")


def test_a_file_or_a_folder_without_config(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a file"):
        load(checkpoint / "config.json")
    with pytest.raises(InputError, match=r"has no config\.json"):
        load(tmp_path)


def test_broken_config(broken: Path) -> None:
    (broken / "config.json").write_text("{")
    with pytest.raises(InputError, match="can't be loaded"):
        load(broken)


def test_unknown_model_type(broken: Path) -> None:
    edit_config(broken, model_type="olmoe9")
    with pytest.raises(InputError, match="can't be loaded: .*olmoe9"):
        load(broken)


def test_missing_shard(broken: Path) -> None:
    sorted(broken.glob("*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match="can't be loaded: .*safetensors"):
        load(broken)


def test_no_weights_at_all(broken: Path) -> None:
    for path in broken.glob("*safetensors*"):
        path.unlink()
    with pytest.raises(InputError, match="can't be loaded: .*no file named model.safetensors"):
        load(broken)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(broken: Path, keep: int) -> None:
    path = sorted(broken.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="a weights file is truncated or broken"):
        load(broken)


def test_missing_weights(broken: Path) -> None:
    for path in sorted(broken.glob("*.safetensors")):
        tensors = load_file(path)
        kept = {name: t for name, t in tensors.items() if "layers.1.mlp.gate" not in name}
        save_file(kept, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights? .*missing .*model\.layers\.1\.mlp\.gate\.weight"):
        load(broken)


def test_weights_of_another_shape(broken: Path) -> None:
    edit_config(broken, hidden_size=32)
    with pytest.raises(InputError, match="can't be loaded"):
        load(broken)


def test_pickles_are_never_read(broken: Path) -> None:
    for path in broken.glob("*safetensors*"):
        path.unlink()
    torch.save(tiny.module("olmoe").state_dict(), broken / "pytorch_model.bin")
    with pytest.raises(InputError, match="can't be loaded"):
        load(broken)


def test_kernels_and_mxfp4_are_refused(broken: Path) -> None:
    module: Any = tiny.module("gpt_oss")
    module._use_kernels = True
    with pytest.raises(InputError, match="use_kernels=True, which bypasses"):
        load(module)

    class Mxfp4GptOssExperts(nn.Module):
        pass

    module = tiny.module("gpt_oss")
    module.model.layers[0].mlp.experts = Mxfp4GptOssExperts()
    with pytest.raises(InputError, match="MXFP4 .* load dequantised"):
        load(module)
    edit_config(broken, quantization_config={"quant_method": "mxfp4"})
    for call in (load, describe):
        with pytest.raises(InputError, match="MXFP4 .* load dequantised"):
            call(broken)


# -- layers ------------------------------------------------------------------------------------------------------------


def test_names_shapes_and_order() -> None:
    layers = find_layers(tiny.module("olmoe"))
    assert [layer.name for layer in layers] == [f"model.layers.{i}.mlp.gate" for i in range(3)]
    assert [layer.index for layer in layers] == [0, 1, 2]
    first = layers[0]
    assert (first.n_experts, first.top_k, first.n_shared, first.stack) == (8, 3, 0, "decoder")


def test_stacks_of_encoder_decoder_models() -> None:
    layers = find_layers(tiny.module("switch_transformers"))
    assert [layer.stack for layer in layers] == ["encoder"] + ["decoder"] * (len(layers) - 1)
    assert all(layer.name.startswith(layer.stack) for layer in layers)


@pytest.mark.parametrize(
    ("family", "changes", "gating"),
    [
        ("olmoe", {}, "softmax, top-k"),
        ("olmoe", {"norm_topk_prob": True}, "softmax, top-k, renormalised"),
        ("cohere2_moe", {}, "top-k, softmax"),
        ("cohere2_moe", {"expert_selection_fn": "sigmoid"}, "top-k, sigmoid, renormalised"),
        ("lfm2_moe", {"use_expert_bias": False}, "sigmoid, top-k, renormalised, scaled"),
        ("lfm2_moe", {}, "sigmoid + bias, top-k, renormalised, scaled"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "softmax, groups, top-k, scaled"),
        ("deepseek_v2", {"topk_method": "greedy"}, "softmax, top-k, scaled"),
        ("doge", {}, "product keys, top-k, softmax"),
    ],
)
def test_gating_follows_the_configuration(family: str, changes: dict[str, Any], gating: str) -> None:
    assert {layer.gating for layer in find_layers(tiny.module(family, **changes))} == {gating}


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.refused])
def test_gating_stays_in_its_vocabulary(family: str) -> None:
    steps = {
        *("softmax", "sigmoid", "sqrt-softplus", "logits", "groups", "top-k", "renormalised", "scaled"),
        *("hash", "product keys", "sparsemixer"),
    }
    for layer in find_layers(tiny.module(family)):
        assert set(layer.gating.removesuffix("?").replace(" + bias", "").split(", ")) <= steps


@pytest.mark.parametrize(
    ("family", "n_shared"),
    [("qwen2_moe", 1), ("qwen3_moe", 0), ("deepseek_v3", 2), ("granitemoeshared", 1), ("mixtral", 0), ("llama4", 1)],
)
def test_shared_experts(family: str, n_shared: int) -> None:
    changes = {"n_shared_experts": 2} if family == "deepseek_v3" else {}
    assert {layer.n_shared for layer in find_layers(tiny.module(family, **changes))} == {n_shared}


def test_families_table() -> None:
    table = families()
    assert list(table.columns) == ["family", "traced", "gating", "scoring", "layout", "note"]
    assert len(table) == 72 == table.family.nunique() and table.traced.sum() == 71
    assert (table.note[~table.traced] != "").all()


def test_every_moe_package_of_transformers_is_in_the_table() -> None:
    """A family that a new release adds shows here."""
    root = Path(transformers.__file__).parent / "models"
    found = set()
    for path in root.glob("*/modeling_*.py"):
        text = path.read_text()
        if "class " in text and ("Experts(nn.Module" in text or "CDMoE(" in text or "MoE(nn.Module" in text):
            found.add(path.parent.name)
    assert found - set(FAMILIES) <= {"vitpose_backbone"}  # its experts are chosen by the data set, not by a router


# -- parameters --------------------------------------------------------------------------------------------------------


def brute_force(module: nn.Module, is_expert: Any, k: int, e: int) -> tuple[int, int]:
    """(total, active) by going through every parameter by name."""
    total = active = 0
    for name, parameter in module.named_parameters():
        total += parameter.numel()
        active += parameter.numel() * k // e if is_expert(name) else parameter.numel()
    return total, active


@pytest.mark.parametrize(
    ("family", "part", "k", "e"),
    [
        ("olmoe", ".mlp.experts.", 3, 8),
        ("qwen3_moe", ".mlp.experts.", 3, 8),
        ("qwen2_moe", ".mlp.experts.", 3, 8),
        ("gpt_oss", ".mlp.experts.", 3, 8),
        ("dbrx", ".ffn.experts.", 3, 8),
        ("nemotron_h", ".mixer.experts.", 3, 8),
        ("deepseek_v3", ".mlp.experts.", 3, 8),
        ("switch_transformers", ".mlp.experts.", 1, 8),
        ("llama4", ".feed_forward.experts.", 2, 8),
        ("jetmoe", "put_linear.weight", 3, 8),
        ("doge", "_embed.", 4, 64),
    ],
)
def test_parameters_by_brute_force(family: str, part: str, k: int, e: int, tmp_path: Path) -> None:
    module = tiny.module(family)
    module.config.save_pretrained(tmp_path)
    told = describe(tmp_path)
    total, active = brute_force(module, lambda name: part in name, k, e)
    assert (told["parameters"], told["active_parameters"]) == (total, active)
    assert (told["family"], told["model"]) == (family, str(tmp_path))


def test_describe(checkpoint: Path) -> None:
    told = describe(checkpoint)
    assert told["experts"] == "8" and told["top_k"] == "3" and told["n_shared"] == "0"
    assert told["gating"] == "softmax, top-k" and told["caveat"] == ""
    assert [row["layer"] for row in told["layers"]] == [0, 1, 2]
    fields = set(Layer.__dataclass_fields__) | {"layer"}
    assert set(told["layers"][0]) <= fields


def test_describe_needs_no_weights(broken: Path) -> None:
    for path in broken.glob("*safetensors*"):
        path.unlink()
    assert describe(broken)["family"] == "olmoe"


def test_experts_in_a_form_that_isnt_known() -> None:
    module = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    module.config.n_routed_experts = 8
    with pytest.raises(InputError, match="names experts in its configuration, but has no router of a known form"):
        load(module)
