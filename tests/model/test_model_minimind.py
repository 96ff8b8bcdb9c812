"""The language model: shapes, masks, caches, mixture of experts and loss, against plain definitions."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

import model.model_minimind
from common.distributed import Runtime
from model.model_minimind import Attention, MiniMindConfig, MiniMindForCausalLM, MoE, rope_tables, signed
from trainer.learner import distribute

TINY = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    max_position_embeddings=256,
)
close = dict(atol=1e-4, rtol=0)


def build(seed: int = 0, **options) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    lm = MiniMindForCausalLM(MiniMindConfig(**(TINY | options))).eval()
    with torch.no_grad():  # the initial 0.02 would leave attention and routing nearly uniform
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return lm


YARN_64 = dict(rope_type="yarn", factor=16, original_max_position_embeddings=64, beta_fast=32, beta_slow=1)
DENSE_3 = dict(qk_norm=True, head_dim=24, rms_norm_eps=1e-6, rope_scaling=YARN_64 | {"attention_factor": 1.0})
MIXTURE_3 = dict(n_shared_experts=0, num_experts_per_tok=1, norm_top1_prob=True, moe_intermediate_size=96)
MOE = {"use_moe": True}
KINDS = {"dense": {}, "moe": MOE, "dense_3": DENSE_3, "moe_3": DENSE_3 | MIXTURE_3 | MOE}  # of both releases
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def lm(request):
    return build(**request.param)


def random_rows(lengths: list[int], seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (length,), generator=generator) for length in lengths]


def pad(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(row) for row in rows], batch_first=True, padding_side=side
    )
    return ids, mask


def test_parameter_count_and_initial_weights():
    lm = MiniMindForCausalLM()
    assert sum(parameter.numel() for parameter in lm.parameters()) == 25_829_888
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert lm.model.layers[3].self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert lm.model.embed_tokens.weight[0].abs().sum() > 0
    assert lm.config.intermediate_size == 1408


def test_state_dict_keys():
    keys = set(build(use_moe=True, num_hidden_layers=1).state_dict())
    block = "model.layers.0."
    attention = {f"{block}self_attn.{name}_proj.weight" for name in "qkvo"}
    norms = {f"{block}input_layernorm.weight", f"{block}post_attention_layernorm.weight"}
    experts = [f"experts.{index}" for index in range(4)] + ["shared_experts.0"]
    mlp = {f"{block}mlp.{expert}.{name}_proj.weight" for expert in experts for name in ("gate", "up", "down")}
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert keys == attention | norms | mlp | {f"{block}mlp.gate.weight"} | outside
    assert f"{block}mlp.gate_proj.weight" in build(num_hidden_layers=1).state_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(hidden_size=100), "num_attention_heads"),
        (dict(num_key_value_heads=3), "num_key_value_heads 3"),
        (dict(scoring_func="sigmoid"), "'sigmoid'"),
        (dict(use_moe=True, num_experts_per_tok=5), "num_experts_per_tok 5"),
    ],
)
def test_impossible_config_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        MiniMindConfig(**options)


def test_attention_equals_its_definition():
    torch.manual_seed(0)
    config = MiniMindConfig(**TINY)
    attention = Attention(config, 0)
    hidden = torch.randn(2, 9, 64)
    cos, sin = (table[:9] for table in rope_tables(config))

    def heads(projection, number):
        states = projection(hidden).view(2, 9, number, 16)
        x1, x2 = states[..., :8], states[..., 8:]
        rotated = states * cos[:, None] + torch.cat((-x2, x1), -1) * sin[:, None]
        return states, rotated

    (_, query), (_, key), (value, _) = (
        heads(attention.q_proj, 4),
        heads(attention.k_proj, 2),
        heads(attention.v_proj, 2),
    )
    expected = torch.zeros(2, 9, 4, 16)
    for row in range(2):
        for head in range(4):
            for position in range(9):
                past_key, past_value = (
                    key[row, : position + 1, head // 2],
                    value[row, : position + 1, head // 2],
                )
                scores = (past_key @ query[row, position, head]) / math.sqrt(16)
                expected[row, position, head] = scores.softmax(0) @ past_value
    rope = (cos[None, :, None], signed(sin)[None, :, None])
    torch.testing.assert_close(
        attention(hidden, rope, None, None)[0], attention.o_proj(expected.flatten(2)), **close
    )


def test_a_block_casts_each_of_its_states_once():
    """Not once for each product that takes it: a GPU starts a kernel for every cast."""

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            self.count += function.name() == "aten::_to_copy"
            return function(*arguments, **(options or {}))

    layer = build().model.layers[0]
    rope = torch.ones(2, 1, 9, 1, 16).unbind()
    with Casts() as casts, torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 9, 64), None, None, rope=rope, mask=None, past_key_values=None)
    assert casts.count == 7 + 2 + 1  # weights, norms' outputs, rotated heads


def test_shapes_are_told_without_numbers():
    """As tools do that count operations or memory: on the meta device, which has no autocast."""
    logits = build().to("meta")(torch.zeros(2, 9, dtype=torch.long, device="meta")).logits
    assert (logits.shape, logits.dtype) == ((2, 9, 128), torch.float32)


def test_rope_frequencies():
    cos, sin = rope_tables(MiniMindConfig(**TINY))
    assert cos.shape == sin.shape == (256, 16)
    torch.testing.assert_close(cos[7, 3].item(), math.cos(7 * 1e6 ** (-6 / 16)), atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[7, 11], sin[7, 3])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_single_rows(lm, side):
    rows = random_rows([5, 17, 11])
    ids, mask = pad(rows, side)
    logits = lm(ids, attention_mask=mask).logits
    for row, row_mask, row_logits in zip(rows, mask, logits, strict=True):
        torch.testing.assert_close(row_logits[row_mask.bool()], lm(row[None]).logits[0], **close)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_a_padded_batch_are_finite_and_equal(side):
    rows = random_rows([5, 17])
    ids, mask = pad(rows, side)
    # A first token is learnt from nothing; with padding on the left it has a position before it nevertheless.
    labels = ids.masked_fill((mask == 0) | (mask.cumsum(-1) == 1), -100)
    padded, single = build(), build()
    padded(ids, attention_mask=mask, labels=labels).loss.backward()
    sum(single(row[None], labels=row[None], num_items_in_batch=20).loss for row in rows).backward()
    for one, other in zip(padded.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_a_hole_in_the_mask_is_respected(lm):
    (row,) = random_rows([12])
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 4:7] = 0
    without_hole = torch.cat((row[:4], row[7:]))
    logits = lm(row[None], attention_mask=mask).logits[0, mask[0].bool()]
    torch.testing.assert_close(logits, lm(without_hole[None]).logits[0], **close)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", None], ids=["left", "unpadded"])
def test_cached_steps_equal_one_forward(lm, side, static):
    rows = random_rows([9, 14] if side else [14, 14])
    ids, mask = pad(rows, "left")
    expected = lm(ids, attention_mask=mask).logits
    cache = StaticCache(lm.config, max_cache_len=20) if static else DynamicCache(config=lm.config)
    pieces, start = [], 0
    for length in (7, 1, 4, 1, 1):
        end = start + length
        output = lm(
            ids[:, start:end],
            attention_mask=mask[:, :end] if side else None,
            past_key_values=cache,
            use_cache=True,
        )
        assert output.past_key_values is cache
        pieces.append(output.logits)
        start = end
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], expected[real], **close)


@pytest.mark.parametrize("side", ["left", "right"])
def test_attentions_are_the_weights_that_give_each_layers_output(lm, side, request):
    ids, mask = pad(random_rows([9, 14]), side)
    real = mask.bool()
    given = {}  # module -> its last output
    for layer in lm.model.layers:
        for module in (layer.self_attn, layer.self_attn.v_proj):
            hook = module.register_forward_hook(lambda module, _, output: given.update({module: output}))
            request.addfinalizer(hook.remove)

    attentions = lm(ids, attention_mask=mask, output_attentions=True).attentions

    assert [tuple(weights.shape) for weights in attentions] == [(2, 4, 14, 14)] * 2
    weights = torch.stack(attentions).transpose(2, 3)[:, real]  # (L, real tokens, H, S)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 23, 4))
    padding = ~real[:, None].expand(2, 14, 14)[real]  # (real tokens, S)
    assert (weights * padding[None, :, None]).abs().max() == 0
    for layer, weights in zip(lm.model.layers, attentions, strict=True):
        attention = layer.self_attn
        values = given[attention.v_proj].view(2, 14, 2, attention.head_dim).transpose(1, 2)  # (B, K, S, D)
        mixed = weights @ values.repeat_interleave(2, 1)  # (B, H, T, D)
        expected = attention.o_proj(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(given[attention][0][real], expected[real], **close)


@pytest.mark.parametrize("keep", [0, 1, torch.tensor([0, 5])], ids=["all", "last", "index"])
def test_hidden_states_go_from_embeddings_to_what_the_head_reads(lm, keep):
    ids = torch.stack(random_rows([8, 8]))
    found = lm(ids, output_hidden_states=True, logits_to_keep=keep)
    assert [tuple(states.shape) for states in found.hidden_states] == [(2, 8, 64)] * 3
    torch.testing.assert_close(found.hidden_states[0], lm.model.embed_tokens(ids))
    read = found.hidden_states[-1][:, slice(-keep, None) if isinstance(keep, int) else keep]
    torch.testing.assert_close(lm.lm_head(read), found.logits)
    assert not torch.allclose(found.hidden_states[1], found.hidden_states[0], atol=1e-2)
    assert found.attentions is None is lm(ids).hidden_states


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["cached", "beams", "uncached"]
)
def test_generation_returns_the_attentions_and_states_of_each_step(lm, options):
    ids, mask = pad(random_rows([5, 7]), "left")
    asked = dict(output_attentions=True, output_hidden_states=True, return_dict_in_generate=True)
    found = lm.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, **asked, **options)
    rows, cached = 2 * options.get("num_beams", 1), options.get("use_cache", True)
    shapes = [[tuple(layer.shape) for layer in step] for step in found.attentions]
    lengths = [(7, 7), (1 if cached else 8, 8), (1 if cached else 9, 9)]
    assert shapes == [[(rows, 4, *length)] * 2 for length in lengths]
    shapes = [[tuple(layer.shape) for layer in step] for step in found.hidden_states]
    assert shapes == [[(rows, length, 64)] * 3 for length, _ in lengths]


def test_attentions_of_cached_steps_equal_one_forward(lm):
    ids = torch.stack(random_rows([9, 9]))
    expected = lm(ids, output_attentions=True).attentions
    cache = lm(ids[:, :6], use_cache=True).past_key_values
    found = lm(ids[:, 6:], past_key_values=cache, output_attentions=True).attentions
    for weights, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(weights, whole[:, :, 6:], **close)


def test_attentions_and_states_of_a_training_step_keep_its_gradients():
    lm = build().train()
    ids = torch.stack(random_rows([8, 8]))
    gradients = []
    for asked in ({}, dict(output_attentions=True, output_hidden_states=True)):
        lm.zero_grad()
        lm.activation_checkpointing_enable()
        found = lm(ids, labels=ids, skip_logits=True, **asked)
        found.loss.backward()
        gradients.append([parameter.grad.clone() for parameter in lm.parameters()])
    assert (len(found.attentions), len(found.hidden_states)) == (2, 3)
    assert all(map(torch.equal, *gradients))


def test_ready_made_4d_mask(lm):
    ids, mask = pad(random_rows([6, 10]), "left")
    ready = torch.ones(10, 10).tril().bool() & mask.bool()[:, None, None, :]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = lm(ids, attention_mask=ready, position_ids=positions).logits
    expected = lm(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **close)


def test_embeddings_in_place_of_ids(lm):
    (row,) = random_rows([8])
    embedded = lm.get_input_embeddings()(row[None])
    torch.testing.assert_close(lm(inputs_embeds=embedded).logits, lm(row[None]).logits)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5])], ids=["one", "three", "index"])
def test_logits_to_keep(lm, keep):
    ids = torch.stack(random_rows([8, 8]))
    everything = lm(ids).logits
    expected = everything[:, -keep:] if isinstance(keep, int) else everything[:, keep]
    torch.testing.assert_close(lm(ids, logits_to_keep=keep).logits, expected)


def test_too_long_an_input_is_refused():
    with pytest.raises(ValueError, match="257 tokens"):
        build()(torch.ones(1, 257, dtype=torch.long))


def test_dropout_acts_in_training_only():
    lm = build(dropout=0.5)
    (row,) = random_rows([8])
    assert torch.equal(lm(row[None]).logits, lm(row[None]).logits)
    lm.train()
    assert not torch.equal(lm(row[None]).logits, lm(row[None]).logits)


MOE_VARIANTS = {
    "default": {},
    "top1": dict(num_experts_per_tok=1),
    "all_experts": dict(num_experts_per_tok=4),
    "no_shared": dict(n_shared_experts=0),
    "two_shared": dict(n_shared_experts=2),
    "unnormalized": dict(norm_topk_prob=False),
    "batch_aux": dict(seq_aux=False),
    "many": dict(n_routed_experts=16, num_experts_per_tok=3),
    "release_3": MIXTURE_3 | dict(seq_aux=False),
}


def plain_moe(moe: MoE, hidden: torch.Tensor, token_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, token by token."""
    config, experts = moe.config, moe.config.n_routed_experts
    k = config.num_experts_per_tok
    scores = (hidden @ moe.gate.weight.T).softmax(-1)
    output = torch.zeros_like(hidden)
    chosen = torch.zeros_like(scores)
    for row in range(hidden.shape[0]):
        for position in range(hidden.shape[1]):
            weights, choices = scores[row, position].topk(k)
            if config.norm_topk_prob and (k > 1 or config.norm_top1_prob):
                weights = weights / (weights.sum() + 1e-20)
            token = hidden[row, position]
            result = sum(
                weight * moe.experts[index](token)
                for weight, index in zip(weights, choices.tolist(), strict=True)
            )
            output[row, position] = result + sum(expert(token) for expert in moe.shared_experts)
            chosen[row, position, choices] = 1
    groups = [(chosen[row][keep], scores[row][keep]) for row, keep in enumerate(token_mask)]
    if not config.seq_aux:
        groups = [tuple(torch.cat(parts) for parts in zip(*groups, strict=True))]
    losses = [
        ((picks.sum(0) / (k * len(picks)) * experts) * values.mean(0)).sum() for picks, values in groups
    ]
    return output, config.aux_loss_alpha * torch.stack(losses).mean()


@pytest.mark.parametrize("options", MOE_VARIANTS.values(), ids=MOE_VARIANTS)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_moe_equals_its_definition(options, padded):
    moe = build(use_moe=True, **options).model.layers[0].mlp.train()
    reference = copy.deepcopy(moe)
    hidden = torch.randn(3, 7, 64, requires_grad=True)
    token_mask = torch.ones(3, 7, dtype=torch.bool)
    if padded:
        token_mask[1, 4:] = token_mask[2, :2] = False
    output, aux_loss = moe(hidden, token_mask[:, None] if padded else None)
    expected, expected_aux_loss = plain_moe(reference, hidden.detach().clone().requires_grad_(), token_mask)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(aux_loss, expected_aux_loss, atol=1e-6, rtol=1e-5)
    torch.manual_seed(3)
    direction = torch.randn_like(output)
    ((output * direction).sum() + aux_loss).backward()
    ((expected * direction).sum() + expected_aux_loss).backward()
    for (name, one), other in zip(moe.named_parameters(), reference.parameters(), strict=True):
        gradient = torch.zeros_like(other) if other.grad is None else other.grad
        torch.testing.assert_close(
            one.grad, gradient, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_expert_without_a_token_has_a_zero_gradient():
    moe = build(use_moe=True).model.layers[0].mlp.train()
    with torch.no_grad():
        moe.gate.weight[3] = -moe.gate.weight[:3].abs().sum(0) * 100
    moe(torch.rand(1, 5, 64))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())
    assert not moe.experts[3].up_proj.weight.grad.any()
    assert moe.experts[0].up_proj.weight.grad.any() or moe.experts[1].up_proj.weight.grad.any()


@pytest.mark.parametrize("options", MOE_VARIANTS.values(), ids=MOE_VARIANTS)
def test_grouped_matmul_equals_slices(monkeypatch, options):
    one = build(use_moe=True, **options).model.layers[0].mlp.train()
    other = copy.deepcopy(one)
    hidden = torch.randn(2, 9, 64)
    direction = torch.randn(2, 9, 64)
    expected = one(hidden)[0]
    (expected * direction).sum().backward()
    monkeypatch.setattr(model.model_minimind, "has_grouped_matmul", lambda states: True)
    output = other(hidden)[0]
    (output * direction).sum().backward()
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    for parameter, reference in zip(other.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, atol=1e-4, rtol=1e-3)


def test_experts_that_others_replaced_compute_themselves(monkeypatch):
    """As quantization and adapters do: one kernel for all would take the weights as they are."""

    class Doubled(torch.nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states)

    moe = build(use_moe=True).model.layers[0].mlp.eval()
    hidden = torch.randn(2, 9, 64)
    expected = 2 * moe(hidden)[0]
    for expert in [*moe.experts, *moe.shared_experts]:
        doubled = Doubled(*expert.up_proj.weight.shape[::-1], bias=False)
        doubled.weight = expert.up_proj.weight
        expert.up_proj = doubled
    monkeypatch.setattr(model.model_minimind, "has_grouped_matmul", lambda states: True)
    torch.testing.assert_close(moe(hidden)[0], expected)


def test_moe_trains_in_bfloat16():
    lm = build(use_moe=True).train()
    ids = torch.stack(random_rows([16, 16]))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            output = lm(ids, labels=ids)
        (output.loss + output.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.3


def pack(rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and restarting positions; padding goes on the right, its positions are zeros."""
    ids, mask = pad([torch.cat(parts) for parts in rows], "right")
    positions = [torch.cat([torch.arange(len(part)) for part in parts]) for parts in rows]
    return ids, mask, torch.nn.utils.rnn.pad_sequence(positions, batch_first=True)


@each_kind
def test_packed_rows_equal_single_rows(kind):
    lm = build(**kind).train()
    rows = random_rows([6, 9, 4, 11])
    ids, mask, positions = pack([rows[:3], rows[3:]])
    output = lm(ids, attention_mask=mask, position_ids=positions)
    alone = [lm(row[None]) for row in rows]
    expected = torch.cat([single.logits[0] for single in alone])
    torch.testing.assert_close(output.logits[mask.bool()], expected, **close)
    aux_loss = torch.stack([single.aux_loss for single in alone]).mean()
    torch.testing.assert_close(output.aux_loss, aux_loss, atol=1e-5, rtol=0)
    assert (aux_loss > 0) == lm.config.use_moe


def step(lm: MiniMindForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(9)  # of dropout
    output = lm(ids, labels=ids)
    loss = output.loss + output.aux_loss
    return loss, torch.autograd.grad(loss, [p for p in lm.parameters() if p.requires_grad])


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "last"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@each_kind
def test_checkpointing_changes_no_gradient(kind, dropout, frozen):
    lm = build(**kind, dropout=dropout).train()
    if frozen:
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_(name.startswith("model.layers.1."))
    ids = torch.stack(random_rows([12, 12]))
    loss, gradients = step(lm, ids)
    lm.activation_checkpointing_enable()
    lm.disable_input_require_grads()
    again, recomputed = step(lm, ids)
    torch.testing.assert_close(again, loss)
    for one, other in zip(recomputed, gradients, strict=True):
        torch.testing.assert_close(one, other)


def saved_bytes(lm: MiniMindForCausalLM, embedded: torch.Tensor) -> int:
    """What the backward pass through the blocks keeps, weights and tables aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*lm.parameters(), *lm.buffers())}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = lm.model(inputs_embeds=embedded)
    assert output[0].requires_grad
    return sum(kept.values())


def test_checkpointing_and_frozen_layers_keep_less():
    lm = build(num_hidden_layers=6).train()
    embedded = torch.randn(2, 30, 64, requires_grad=True)
    everything = saved_bytes(lm, embedded)
    lm.requires_grad_(False)
    # A frozen linear layer or norm needs its weight, not its input.
    assert saved_bytes(lm, embedded) < 0.7 * everything
    lm.requires_grad_(True)
    lm.activation_checkpointing_enable()
    assert saved_bytes(lm, embedded) < 0.25 * everything


@pytest.mark.slow
@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_compilations_are_bounded_whatever_the_lengths(use_moe):
    plain = build(use_moe=use_moe).train()
    compiled = copy.deepcopy(plain)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags = SimpleNamespace(compile=True)
    assert distribute(compiled, flags, Runtime(torch.device("cpu"))) is compiled
    for length in (17, 23, 40, 9, 31, 64, 50, 12):
        ids, mask = pad(random_rows([length, length - 3, 5]), "right")
        labels = ids.masked_fill(mask == 0, -100)
        inputs = {"attention_mask": mask, "labels": labels, "skip_logits": True}
        losses = [lm(ids, **inputs).loss for lm in (plain, compiled)]
        torch.testing.assert_close(*losses, **close)
        losses[1].backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (6 if use_moe else 2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seq_aux", [True, False], ids=["per_sequence", "per_batch"])
def test_padding_takes_no_part_in_the_auxiliary_loss(side, seq_aux):
    lm = build(use_moe=True, seq_aux=seq_aux).train()
    rows = random_rows([6, 6])
    ids, mask = pad([*rows, torch.ones(11, dtype=torch.long)], side)
    aux_loss = lm(ids[:2], attention_mask=mask[:2]).aux_loss
    torch.testing.assert_close(aux_loss, lm(torch.stack(rows)).aux_loss, atol=1e-6, rtol=0)


def test_auxiliary_loss_is_zero_outside_training(lm):
    (row,) = random_rows([6])
    assert lm(row[None]).aux_loss.item() == 0


def labelled_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.stack(random_rows([12, 12]))
    labels = ids.clone()
    labels[0, :7] = -100
    labels[1, [0, 3, 4, 11]] = -100
    return ids, labels


@pytest.mark.parametrize("chunk", [4096, 3], ids=["at_once", "in_chunks"])
def test_supervised_loss_equals_full_cross_entropy(monkeypatch, chunk):
    monkeypatch.setattr(model.model_minimind, "LOSS_CHUNK", chunk)
    one, other = build(), build()
    ids, labels = labelled_batch()
    output = one(ids, labels=labels)
    logits = other(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.logits, logits)
    output.loss.backward()
    expected.backward()
    for parameter, reference in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_loss_alone_equals_the_loss_beside_logits(use_moe):
    one, other = build(use_moe=use_moe).train(), build(use_moe=use_moe).train()
    ids, labels = labelled_batch()
    output, alone = (
        one(ids, labels=labels),
        other(ids, labels=labels, num_items_in_batch=40, skip_logits=True),
    )
    assert alone.logits is None and alone.last_hidden_state is None
    torch.testing.assert_close(alone.loss * 40 / (5 + 8), output.loss)  # both rows' supervised tokens
    torch.testing.assert_close(alone.aux_loss, output.aux_loss)
    (output.loss + output.aux_loss).backward()
    (alone.loss * 40 / (5 + 8) + alone.aux_loss).backward()
    for parameter, reference in zip(other.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, atol=1e-6, rtol=1e-4)


def test_no_supervised_token_gives_zero_loss_and_gradients():
    lm = build()
    ids, labels = labelled_batch()
    loss = lm(ids, labels=torch.full_like(labels, -100), skip_logits=True).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in lm.parameters())


def test_batched_greedy_generation_equals_row_by_row(lm):
    rows = random_rows([3, 12, 7])
    ids, mask = pad(rows, "left")
    # Tied, random weights repeat one token forever; without repetition each step needs the whole ranking.
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, no_repeat_ngram_size=1)
    options["suppress_tokens"] = [0]
    together = lm.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    alone = [lm.generate(row[None], **options)[0, len(row) :] for row in rows]
    assert torch.equal(together, torch.stack(alone))
    uncached = lm.generate(ids, attention_mask=mask, use_cache=False, **options)[:, ids.shape[1] :]
    assert torch.equal(together, uncached)


@pytest.mark.parametrize(
    "options",
    [dict(num_beams=3), dict(do_sample=True, top_p=0.9), dict()],
    ids=["beams", "sampling", "greedy"],
)
def test_static_cache_generates_the_same(lm, options):
    ids, mask = pad(random_rows([4, 9]), "left")
    outputs = []
    for cache in (None, "static"):
        torch.manual_seed(5)
        outputs.append(
            lm.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=6,
                eos_token_id=None,
                cache_implementation=cache,
                **options,
            )
        )
    assert outputs[0].shape == (2, 15)
    assert torch.equal(*outputs)


def test_streamer_sees_every_token(lm):
    class Collector(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    (row,) = random_rows([5])
    streamer = Collector()
    output = lm.generate(row[None], max_new_tokens=4, do_sample=False, eos_token_id=None, streamer=streamer)
    assert streamer.tokens == output[0].tolist()


def test_save_and_load_keeps_weights_and_rope(lm, tmp_path):
    lm.save_pretrained(tmp_path)
    loaded = MiniMindForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), lm.parameters(), strict=True))
    assert torch.equal(loaded.model.freqs_cos, lm.model.freqs_cos)
    assert torch.equal(loaded.model.freqs_sin, lm.model.freqs_sin)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.to_dict() == lm.config.to_dict() | {"_name_or_path": str(tmp_path)}
    (row,) = random_rows([9])
    torch.testing.assert_close(loaded(row[None]).logits, lm(row[None]).logits, atol=1e-5, rtol=0)


YARN = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 2048}
YARN |= {"beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"num_experts": 8, "router_aux_loss_coef": 0.1},
            "num_experts, router_aux_loss_coef: names of release 3",
        ),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"rope_scaling": {**YARN, "rope_type": "linear"}}, "expected rope_type 'yarn' with"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 16}}, "expected rope_type 'yarn' with .*beta_fast"),
    ],
    ids=["names", "odd_head", "linear", "missing_keys"],
)
def test_a_config_that_would_mean_something_else_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        MiniMindConfig(**config)


def test_rope_scaling_and_head_width_are_saved_and_read_back(tmp_path):
    config = MiniMindConfig(rope_scaling=YARN, head_dim=24, qk_norm=True, moe_intermediate_size=96)
    config.save_pretrained(tmp_path)
    read = MiniMindConfig.from_pretrained(tmp_path)
    assert read.rope_scaling == YARN and (read.head_dim, read.qk_norm) == (24, True)
    assert read.moe_intermediate_size == 96
