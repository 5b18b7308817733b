"""Prototypes are kept only as long as they are right, whatever PyTorch and other packages do to the head."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from conftest import count_text_passes, tiny_clip
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import ordinal_prompt as op

OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6)
FEATURES = torch.linspace(-1, 1, 36).reshape(3, 12)


def computed_anew(head: op.OrdinalPromptHead) -> Tensor:
    """The slow and obvious way: nothing is kept."""
    with torch.no_grad():
        features = head.text_encoder.encode(head.prompt())
    return nn.functional.normalize(features, dim=-1)


def in_place(head: op.OrdinalPromptHead) -> None:
    with torch.no_grad():
        head.prompt.context_embeddings.normal_()


def through_data(head: op.OrdinalPromptHead) -> None:
    head.prompt.rank_embeddings.data.mul_(-3)


def by_assigning_data(head: op.OrdinalPromptHead) -> None:
    head.prompt.rank_embeddings.data = torch.randn_like(head.prompt.rank_embeddings)


def by_an_optimizer(head: op.OrdinalPromptHead) -> None:
    parameter = head.prompt.rank_embeddings
    parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW([parameter], lr=1).step()


def by_loading(head: op.OrdinalPromptHead) -> None:
    state = {name: torch.randn_like(value) for name, value in head.state_dict().items() if "embeddings" in name}
    head.load_state_dict({**head.state_dict(), **state})


def by_assigning_what_is_loaded(head: op.OrdinalPromptHead) -> None:
    state = {name: torch.randn_like(value) for name, value in head.state_dict().items() if "embeddings" in name}
    head.load_state_dict({**head.state_dict(), **state}, assign=True)


def by_a_new_parameter(head: op.OrdinalPromptHead) -> None:
    head.prompt.rank_embeddings = nn.Parameter(torch.randn_like(head.prompt.rank_embeddings))


def by_pruning(head: op.OrdinalPromptHead) -> None:
    prune.l1_unstructured(head.prompt, "rank_embeddings", 0.5)


class _Twisted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(-1)


def by_a_parametrization(head: op.OrdinalPromptHead) -> None:
    parametrize.register_parametrization(head.prompt, "rank_embeddings", _Twisted())


def of_the_text_encoder(head: op.OrdinalPromptHead) -> None:
    with torch.no_grad():
        head.text_encoder.tower.ln_final.weight.mul_(torch.linspace(-1, 1, 16))


CHANGES: list[Callable[[op.OrdinalPromptHead], None]] = [
    in_place, through_data, by_assigning_data, by_an_optimizer, by_loading, by_assigning_what_is_loaded,
    by_a_new_parameter, by_pruning, by_a_parametrization, of_the_text_encoder,
]  # fmt: skip


@pytest.fixture
def head() -> op.OrdinalPromptHead:
    return op.OrdinalPromptHead(tiny_clip(), 5, context=4)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("frozen", [False, True])
def test_changes_are_seen(change: Callable[[Any], None], frozen: bool, head: op.OrdinalPromptHead) -> None:
    head.train(frozen).prompt.requires_grad_(not frozen)  # in eval mode, or frozen prompts in training
    for _ in range(2):  # the second change is not the first
        before = head.prototypes().detach().clone()
        assert head.kept_prototypes() is head.kept_prototypes()
        change(head)
        if frozen:
            head.prompt.requires_grad_(False)
        torch.testing.assert_close(head.prototypes(), computed_anew(head))
        assert (head.prototypes() - before).abs().max() > 1e-4


def test_changes_below_a_reparametrization_are_seen(head: op.OrdinalPromptHead) -> None:
    by_pruning(head.eval())
    before = head.prototypes()
    with torch.no_grad():
        head.prompt.rank_embeddings_orig.normal_()
    torch.testing.assert_close(head.prototypes(), computed_anew(head))
    assert (head.prototypes() - before).abs().max() > 1e-4
    head.train()(FEATURES).sum().backward()
    assert head.prompt.rank_embeddings_orig.grad is not None
    torch.testing.assert_close(head.prototypes_at([0, 2, 4]), head.prototypes()[[0, 2, 4]])


def test_a_reparametrized_prompt_is_not_saved(head: op.OrdinalPromptHead, tmp_path: Path) -> None:
    by_pruning(head)
    with pytest.raises(ValueError, match=r"reparametrization \(prompt.rank_embeddings_orig.*prune.remove"):
        head.save_pretrained(tmp_path)
    prune.remove(head.prompt, "rank_embeddings")
    head.save_pretrained(tmp_path)
    assert torch.equal(op.OrdinalPromptHead.from_pretrained(tmp_path).prototypes(), head.eval().prototypes())


def test_weights_that_change_under_the_head_change_all_of_it(tmp_path: Path) -> None:
    clip = tiny_clip()
    head = op.OrdinalPromptHead(clip, 5).eval()
    before = head(FEATURES)
    clip.load_state_dict(tiny_clip().state_dict())
    assert (head(FEATURES) - before).abs().max() > 1e-2
    torch.testing.assert_close(head.export()(FEATURES), head(FEATURES))
    head.save_pretrained(tmp_path)
    again = op.OrdinalPromptHead.from_pretrained(tmp_path, clip)
    torch.testing.assert_close(again(FEATURES), head(FEATURES))


def test_what_is_learned_in_inference_mode_is_not_kept(head: op.OrdinalPromptHead) -> None:
    with torch.inference_mode():
        inside = op.OrdinalPromptHead(tiny_clip(), 5).eval()
        before = inside(FEATURES)
        inside.prompt.rank_embeddings.normal_()
        assert (inside(FEATURES) - before).abs().max() > 1e-3
        head.eval()(FEATURES)
    head.train()(FEATURES).sum().backward()


def of_the_text_encoder_by_assigning(head: op.OrdinalPromptHead) -> None:
    state = {name: torch.randn_like(value) for name, value in head.text_encoder.state_dict().items()}
    head.text_encoder.load_state_dict(state, assign=True)


def of_the_text_encoder_by_pruning(head: op.OrdinalPromptHead) -> None:
    prune.random_unstructured(head.text_encoder.tower.transformer.resblocks[0].mlp.c_fc, "weight", 0.7)


def by_an_adapter(head: op.OrdinalPromptHead) -> None:
    peft = pytest.importorskip("peft")
    adapted = head.text_encoder.tower.transformer.resblocks[0].mlp
    if isinstance(adapted.c_fc, nn.Linear):
        config = peft.LoraConfig(target_modules=["c_fc"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, adapted)
    else:
        adapted.c_fc.enable_adapters(adapted.c_fc.disable_adapters)


def of_a_layer(head: op.OrdinalPromptHead) -> None:
    norm = nn.LayerNorm(16)
    nn.init.normal_(norm.weight)
    head.text_encoder.tower.ln_final = norm


def by_a_module_that_is_added(head: op.OrdinalPromptHead) -> None:
    layer: Any = head.text_encoder.tower.transformer.resblocks[0].mlp.c_fc
    layer.extra = nn.Linear(layer.in_features, layer.out_features)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias) + layer.extra(x)


def of_all_of_it(head: op.OrdinalPromptHead) -> None:
    head.text_encoder = op.OrdinalPromptHead(tiny_clip(), 5).text_encoder


def by_the_data_of_a_learning_one(head: op.OrdinalPromptHead) -> None:
    for parameter in head.text_encoder.parameters():
        parameter.data.lerp_(torch.randn_like(parameter), 0.5)  # as exponential moving averages do


def by_a_shared_vector(head: op.OrdinalPromptHead) -> None:
    vector = nn.utils.parameters_to_vector(head.parameters()).detach()
    nn.utils.vector_to_parameters(vector, head.parameters())
    head(FEATURES)
    vector.mul_(-2)


def by_a_view_in_shared_memory(head: op.OrdinalPromptHead) -> None:
    head.share_memory()
    head(FEATURES)
    head.prompt.context_embeddings.data.mul_(-2)


@pytest.mark.parametrize(
    "change",
    [
        of_the_text_encoder_by_assigning, of_the_text_encoder_by_pruning, by_an_adapter, of_a_layer,
        by_a_module_that_is_added, of_all_of_it, by_the_data_of_a_learning_one, by_a_shared_vector,
        by_a_view_in_shared_memory,
    ],
)  # fmt: skip
def test_rarer_changes_are_seen(change: Callable[[Any], None]) -> None:
    learning = change is by_the_data_of_a_learning_one
    head = op.OrdinalPromptHead(tiny_clip(), 5, context=4, freeze_text_encoder=not learning).eval()
    for _ in range(1 + (change is not of_the_text_encoder_by_pruning)):
        before = head(FEATURES)
        change(head)
        torch.testing.assert_close(head.prototypes(), computed_anew(head))
        torch.testing.assert_close(head.export()(FEATURES), head(FEATURES))
        assert (head(FEATURES) - before).abs().max() > 1e-4


def test_prototypes_may_be_written_to(head: op.OrdinalPromptHead) -> None:
    expected = head.eval()(FEATURES)
    head.prototypes().sub_(1)
    assert torch.equal(head(FEATURES), expected)


@pytest.mark.parametrize("options", [{}, {"alignment": 0.1, "residual": 1.0}])
@pytest.mark.parametrize("way", ["whole", "assigned", "mapped", "safetensors", "numpy"])
def test_weights_in_memory_of_others(way: str, options: dict[str, float], tmp_path: Path) -> None:
    def build() -> op.OrdinalPromptHead:
        return op.OrdinalPromptHead(clip, 3000, context=4, interpolation=None, **options)  # large enough

    clip = tiny_clip()
    head, file = build(), tmp_path / "head.pt"
    if way == "safetensors":
        safetensors.torch.save_model(head, str(file))
        state: Any = safetensors.torch.load_file(file)
    else:
        torch.save(head if way == "whole" else head.state_dict(), file)
        state = torch.load(file, weights_only=False, mmap=way == "mapped")
    if way == "whole":
        again = state
    elif way == "numpy":
        again = build()
        for name, parameter in again.named_parameters():
            parameter.data = torch.from_numpy(state[name].numpy().copy())
    else:
        again = build()
        again.load_state_dict(state, assign=True)
    optimizer = torch.optim.SGD(again.parameters(), lr=1.0)
    for _ in range(2):
        torch.testing.assert_close(again.eval().prototypes(), computed_anew(again))
        expected = again(FEATURES)
        again.train()(FEATURES).square().sum().backward()
        optimizer.step()
        assert not torch.equal(again.eval()(FEATURES), expected)
        again.prompt.rank_embeddings.data.mul_(-1)


# ------------------------------------------------------------------------------------------------------------- copies


def test_copies_share_the_text_encoder_and_go_their_own_way(head: op.OrdinalPromptHead) -> None:
    expected = head.eval()(FEATURES)
    twin = copy.deepcopy(head)
    assert twin.text_encoder is head.text_encoder
    assert torch.equal(twin(FEATURES), expected)
    for mine, theirs in zip(twin.prompt.parameters(), head.prompt.parameters(), strict=True):
        mine.data.lerp_(torch.randn_like(theirs), 0.5)  # as exponential moving averages do
    torch.testing.assert_close(twin.prototypes(), computed_anew(twin))
    assert (twin(FEATURES) - expected).abs().max() > 1e-3
    assert torch.equal(head(FEATURES), expected)
    twin.double()
    assert head.text_encoder.tower.ln_final.weight.dtype == torch.float32
    assert torch.equal(head(FEATURES), expected)
    restored = pickle.loads(pickle.dumps(head))
    assert torch.equal(restored(FEATURES), expected)


def test_averaged_models_share_it_too(head: op.OrdinalPromptHead) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Sequential(head))
    averaged.update_parameters(nn.Sequential(head))
    in_place(head)
    averaged.update_parameters(nn.Sequential(head))
    inner = averaged.eval().module[0]
    assert inner.text_encoder is head.text_encoder
    torch.testing.assert_close(inner.prototypes(), computed_anew(inner))


def test_a_copy_of_prototypes_alone_keeps_them(head: op.OrdinalPromptHead, tmp_path: Path) -> None:
    head.eval().save_pretrained(tmp_path)
    alone = op.OrdinalPromptHead.from_pretrained(tmp_path)
    for again in (copy.deepcopy(alone), pickle.loads(pickle.dumps(alone))):
        assert torch.equal(again(FEATURES), alone(FEATURES))
        in_place(again)
        for stale in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
            with pytest.raises(RuntimeError, match="no text encoder"):
                stale(FEATURES)


def test_prototypes_alone_hold_as_long_as_prompts_have_their_values(head: op.OrdinalPromptHead, tmp_path: Path) -> None:
    head.eval().save_pretrained(tmp_path)
    expected, alone = head(FEATURES), op.OrdinalPromptHead.from_pretrained(tmp_path)
    alone.load_state_dict(alone.state_dict())
    assert torch.equal(alone(FEATURES), expected)
    averaged = torch.optim.swa_utils.AveragedModel(alone)
    averaged.update_parameters(alone)
    averaged.update_parameters(alone)
    torch.testing.assert_close(averaged(FEATURES), expected)
    state = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(alone, state, (FEATURES,)), expected)
    torch.testing.assert_close(torch.vmap(alone)(FEATURES), expected)
    torch.testing.assert_close(alone.half().float().prototypes(), head.prototypes())
    torch.testing.assert_close(torch.compile(alone, backend="eager")(FEATURES), alone(FEATURES))
    alone.load_state_dict({**state, "prompt.rank_embeddings": -state["prompt.rank_embeddings"]})
    with pytest.raises(RuntimeError, match="no text encoder"):
        alone(FEATURES)


@pytest.mark.skipif(OLD_TORCH, reason="torch.export loses modules that are not registered")
def test_torch_export_of_prototypes_alone(head: op.OrdinalPromptHead, tmp_path: Path) -> None:
    head.eval().save_pretrained(tmp_path)
    alone = op.OrdinalPromptHead.from_pretrained(tmp_path)
    program = torch.export.export(alone, (FEATURES,))
    torch.testing.assert_close(program.module()(FEATURES), head(FEATURES))


def test_text_encoders_of_other_kinds_have_state_dicts() -> None:
    head = op.OrdinalPromptHead(tiny_clip(), 5, context=4)
    head.text_encoder.register_buffer("none", torch.zeros(0, 4))
    head.text_encoder.register_buffer("sparse", torch.eye(3).to_sparse())
    assert {*head.state_dict()} == {
        "rank_values", "logit_scale", "prompt.context_embeddings", "prompt.rank_embeddings"
    }  # fmt: skip


@pytest.mark.skipif(OLD_TORCH, reason="torch.export loses modules that are not registered")
def test_prototypes_alone_that_are_no_longer_right_are_refused_in_graphs(tmp_path: Path) -> None:
    op.OrdinalPromptHead(tiny_clip(), 5, context=4).eval().save_pretrained(tmp_path)
    alone = op.OrdinalPromptHead.from_pretrained(tmp_path)
    in_place(alone)
    with pytest.raises(RuntimeError, match="no text encoder"):
        torch.vmap(alone)(FEATURES)
    with pytest.raises(Exception, match="no text encoder"):
        torch.export.export(alone, (FEATURES,))


def test_unfreezing_a_model_does_not_let_frozen_prompts_learn() -> None:
    head = op.OrdinalPromptHead(tiny_clip(), 5, in_features=12, learn_prompts=False).requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in head.prompt.parameters())
    assert head.projection is not None
    assert head.projection.weight.requires_grad


def test_heads_in_shared_memory(head: op.OrdinalPromptHead) -> None:
    head.eval()(FEATURES)
    head.share_memory()
    in_place(head)
    torch.testing.assert_close(head.prototypes(), computed_anew(head))


def test_data_parallel_is_refused(head: op.OrdinalPromptHead) -> None:
    with pytest.raises(RuntimeError, match=r"nn.DataParallel cannot train .* DistributedDataParallel .*torchrun"):
        nn.Sequential(head)[0]._replicate_for_data_parallel()


def test_a_scale_that_does_not_learn_is_left_alone_by_unfreezing(head: op.OrdinalPromptHead) -> None:
    assert "logit_scale" not in dict(nn.Sequential(head).requires_grad_(True)[0].named_parameters())
    learned = op.OrdinalPromptHead(tiny_clip(), 5, learn_logit_scale=True)
    assert "logit_scale" in dict(learned.named_parameters())
    learned.load_state_dict(op.OrdinalPromptHead(tiny_clip(), 5).state_dict())
    head.load_state_dict({**head.state_dict(), "logit_scale": learned.state_dict()["logit_scale"]})


def test_a_state_dict_of_another_text_encoder_is_no_secret(tmp_path: Path) -> None:
    clip = tiny_clip()
    model = nn.Sequential(op.OrdinalPromptHead(clip, 5, context=4))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.pt")
    state = torch.load(tmp_path / "last.pt", weights_only=True)["state_dict"]
    other = nn.Sequential(op.OrdinalPromptHead(tiny_clip(), 5, context=4))
    other.load_state_dict(state)
    with pytest.warns(UserWarning, match="saved with other weights of the text encoder"):
        other(FEATURES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unlike = tiny_clip()
        same, late = (op.OrdinalPromptHead(encoder, 5, context=4) for encoder in (clip, unlike))
        for again in (same, copy.deepcopy(same).bfloat16(), late):
            nn.Sequential(again).load_state_dict(state)
            unlike.load_state_dict(clip.state_dict())  # behind the head's
            again(FEATURES)
        other.load_state_dict(dict(state))  # which says nothing
        other(FEATURES)


# -------------------------------------------------------------------------------------------------------- meta device


def test_forward_on_the_meta_device() -> None:
    head = op.OrdinalPromptHead(tiny_clip(), 5, device="meta")
    for mode in (True, False, False):
        assert head.train(mode)(FEATURES.to("meta")).is_meta
    assert op.OrdinalPromptHead(tiny_clip().to("meta"), 5).eval().export()[-1].weight.is_meta


def test_building_under_a_default_device() -> None:
    clip, tokenizer = tiny_clip(), open_clip.get_tokenizer("ViT-B-32")
    options: dict[str, Any] = {"tokenizer": tokenizer, "context": "a {} one", "rank_values": [1, 2, 4]}
    with torch.device("meta"):
        real = op.OrdinalPromptHead(clip, ["a", "b", "c"], **options)
        assert op.OrdinalPromptHead(tiny_clip().to("meta"), ["a", "b", "c"], **options)(FEATURES.to("meta")).is_meta
    assert torch.equal(real.prototypes(), op.OrdinalPromptHead(clip, ["a", "b", "c"], **options).prototypes())


def test_weights_for_a_head_on_the_meta_device() -> None:
    clip = tiny_clip()
    head = op.OrdinalPromptHead(clip, 5, device="meta")
    head.load_state_dict(op.OrdinalPromptHead(clip, 5).state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="was built on the meta device"):
        head(FEATURES)


def test_memory_without_weights_is_no_text_encoder() -> None:
    head = op.OrdinalPromptHead(tiny_clip(), 5, device="meta").to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="came from the meta device"):
        head.eval()(FEATURES)


# ------------------------------------------------------------------------------------------------ graphs and transforms


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_compiled_head_sees_changes_without_compiling_again(backend: str, frozen: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(backend)
    head = op.OrdinalPromptHead(tiny_clip(), 5, in_features=12, learn_prompts=not frozen).train(frozen)
    compiled = torch.compile(head, fullgraph=True, backend=counter)
    for change in (in_place, through_data, by_loading, in_place):
        features = FEATURES.clone().requires_grad_()
        logits = compiled(features)
        torch.testing.assert_close(logits, head(features))
        logits.sum().backward()
        assert features.grad is not None
        change(head)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiled_training_reaches_the_prompts(head: op.OrdinalPromptHead) -> None:
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        logits = compiled(FEATURES)
        torch.testing.assert_close(logits, head(FEATURES))
        logits.sum().backward()
        assert head.prompt.rank_embeddings.grad is not None
        in_place(head)


@pytest.mark.skipif(OLD_TORCH, reason="torch.export loses modules that are not registered")
@pytest.mark.parametrize("warm", [False, True])
def test_torch_export(warm: bool, head: op.OrdinalPromptHead) -> None:
    head.eval()
    if warm:
        head(FEATURES)
    program = torch.export.export(head, (FEATURES,))
    torch.testing.assert_close(program.module()(FEATURES), head(FEATURES))
    assert "ordinal_prompt" not in str(program.graph)  # runs where this package is not installed


def test_vmap_over_an_ensemble(head: op.OrdinalPromptHead) -> None:
    heads = [copy.deepcopy(head).eval() for _ in range(3)]
    for member in heads:
        in_place(member)
        member(FEATURES)
    parameters, buffers = torch.func.stack_module_state(heads)
    base = copy.deepcopy(heads[0])
    base(FEATURES)

    def run(parameters: Any, buffers: Any) -> Tensor:
        return torch.func.functional_call(base, (parameters, buffers), (FEATURES,))

    stacked = torch.vmap(run)(parameters, buffers)
    for logits, member in zip(stacked, heads, strict=True):
        torch.testing.assert_close(logits, member(FEATURES), rtol=1e-4, atol=1e-4)
    assert torch.equal(base(FEATURES), heads[0](FEATURES))


# --------------------------------------------------------------------------------------------------- several processes


def _process(rank: int, folder: str) -> None:
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    frozen = op.OrdinalPromptHead(tiny_clip(), 5, in_features=12, learn_prompts=False)
    learned = op.OrdinalPromptHead(tiny_clip(), 5, context=4)
    labels = torch.tensor([[0, 3], [4, 1]])[rank]
    features = torch.randn(2, 2, 12)[rank]
    text_passes = count_text_passes(frozen)
    for head in (frozen, learned):
        run = nn.parallel.DistributedDataParallel(head)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            head.loss()(run(features), labels).backward()
            optimizer.step()
        sent = {name for name, _ in run.module.named_buffers()}
        assert sent == {"rank_values", "logit_scale"}, sent  # nothing of the frozen encoder or its words
    assert len(text_passes) == 1  # frozen prompts are encoded once, not in every step
    torch.save(learned.state_dict(), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_send_nothing_of_the_text_encoder(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def by_a_fused_optimizer(head: op.OrdinalPromptHead) -> None:
    parameters = [*head.prompt.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(parameters, lr=0.1, fused=True).step()


def test_fused_optimizers_are_seen(head: op.OrdinalPromptHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ordinal_prompt.cache.same_values", lambda *_: True)  # as off the CPU
    monkeypatch.setattr("ordinal_prompt.cache._address", lambda _: 0)
    head.eval()
    before = head.prototypes()
    by_a_fused_optimizer(head)
    torch.testing.assert_close(head.prototypes(), computed_anew(head))
    assert (head.prototypes() - before).abs().max() > 1e-4


def test_fused_steps_among_batches_that_share_prototypes_are_refused(head: op.OrdinalPromptHead) -> None:
    def step_among_batches() -> None:
        with head.train().reuse_prototypes():
            head(FEATURES).sum().backward()
            by_a_fused_optimizer(head)

    with pytest.raises(RuntimeError, match="prompts were changed within"):
        step_among_batches()


def test_a_pass_in_training_mode_ends_what_was_kept(
    head: op.OrdinalPromptHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ordinal_prompt.cache.Kept.holds", lambda *_: True)  # whatever was written, by whatever way
    head.eval()(FEATURES)
    head.train()(FEATURES).sum().backward()
    through_data(head)
    torch.testing.assert_close(head.eval().prototypes(), computed_anew(head))


def test_a_text_encoder_that_is_unfrozen_later_is_no_secret(head: op.OrdinalPromptHead) -> None:
    head.train()(FEATURES)
    head.text_encoder.requires_grad_(True)
    head.eval()(FEATURES)
    with pytest.warns(UserWarning, match="frozen when the head was built.*freeze_text_encoder=False"):
        head.train()(FEATURES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(FEATURES)  # once


def test_values_of_ranks_keep_their_digits_through_a_state_dict_in_half_precision() -> None:
    years = [1900.0, 1931.0, 1957.0, 1983.0, 2019.0]
    head = op.OrdinalPromptHead(tiny_clip(), 5, rank_values=years)
    half = {name: tensor.bfloat16() for name, tensor in head.state_dict().items()}
    for assign in (False, True):
        loaded = copy.deepcopy(head)
        loaded.load_state_dict(half, assign=assign)
        assert loaded.rank_values.tolist() == years
        assert loaded.rank_values.dtype == torch.float32


def test_a_parametrized_scale_is_copied() -> None:
    class Bounded(nn.Module):
        def forward(self, log_scale: Tensor) -> Tensor:
            return log_scale.clamp(max=2.0)

    head = op.OrdinalPromptHead(tiny_clip(), 5, learn_logit_scale=True)
    parametrize.register_parametrization(head, "logit_scale", Bounded())
    copied = copy.deepcopy(head.eval())
    torch.testing.assert_close(copied(FEATURES), head(FEATURES))
    groups = op.parameter_groups(copied, lr=1.0)
    assert [group["lr"] for group in groups if any(part.numel() == 1 for part in group["params"])] == [10.0]


def test_prototypes_between_ranks_are_those_of_eval_mode_where_nothing_learns() -> None:
    text = open_clip.transformer.TextTransformer(width=16, heads=2, layers=1, output_dim=12)
    head = op.OrdinalPromptHead(text, 5, freeze_text_encoder=False)
    head.text_encoder.tower.ln_final = nn.Sequential(head.text_encoder.tower.ln_final, nn.Dropout(0.5))
    expected = head.eval().prototypes()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.train().prototypes_at(range(5)), expected)


def test_threads_that_share_a_text_encoder_do_not_meet() -> None:
    import concurrent.futures

    text = tiny_clip()
    heads = [
        op.OrdinalPromptHeads({"a": op.OrdinalPromptHead(text, 4, context=c), "b": op.OrdinalPromptHead(text, 7)})
        for c in (3, 8)
    ]
    expected = [{name: value.detach() for name, value in one.prototypes().items()} for one in heads]

    def encode(number: int) -> float:
        worst = 0.0
        for _ in range(100):
            for name, found in heads[number].prototypes().items():
                worst = max(worst, float((found.detach() - expected[number][name]).abs().max()))
        return worst

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert max(pool.map(encode, range(2))) < 1e-5
