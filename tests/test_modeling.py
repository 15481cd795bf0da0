"""What the model computes, as properties of tiny real models."""

import copy
import pickle

import pytest
import torch
from conftest import DECODERS, VISION
from transformers import PreTrainedModel

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.generation_flashsloth import CACHE_NAME
from flashsloth.modeling_flashsloth import SpatialAttentionPooling, TilePositions


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def rows_of(logits, mask):
    """Logits of every row without its padding."""
    return [row[m.bool()] for row, m in zip(logits, mask, strict=True)]


def test_pooling_is_the_weighted_mean_of_each_window():
    torch.manual_seed(0)
    pooling = SpatialAttentionPooling(hidden_size=6, window_size=3, dropout=0.1).eval()
    patches = torch.randn(2, 81, 6)
    with torch.no_grad():
        pooled = pooling(patches)
    grid = patches.view(2, 9, 9, 6)
    for row in range(3):
        for column in range(3):
            window = grid[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].reshape(2, 9, 6)
            with torch.no_grad():
                weights = pooling.fc2(pooling.fc1(window).relu()).softmax(dim=1)
            torch.testing.assert_close(pooled[:, 3 * row + column], (weights * window).sum(dim=1))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_equals_its_rows(any_model, ask, conversations, padding_side):
    batch = ask(*conversations, padding_side=padding_side)
    together = rows_of(logits_of(any_model, batch), batch["attention_mask"])
    for row, conversation in zip(together, conversations, strict=True):
        alone = logits_of(any_model, ask(conversation))[0]
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=0)


def test_queries_depend_on_their_question_and_image(any_model, ask, images):
    """Later tokens depend on both through the queries alone: the image tokens are kept fixed."""
    inputs = ask([(images[:1], "What is it?")])
    before = logits_of(any_model, inputs)

    class Blind(torch.nn.Module):
        def forward(self, hidden_states, context):
            return hidden_states

    embedded_query = any_model.model.embedded_query
    any_model.model.embedded_query = Blind()
    try:
        without = logits_of(any_model, inputs)
    finally:
        any_model.model.embedded_query = embedded_query
    first = (inputs["input_ids"][0] == any_model.config.query_token_id).nonzero()[0].item()
    torch.testing.assert_close(before[:, :first], without[:, :first])
    assert (before[:, first:] - without[:, first:]).abs().max() > 1e-2


def test_a_query_does_not_see_later_images(model, ask, images):
    def first_turn(second_image):
        inputs = ask([(images[:1], "First?", "yes"), ([second_image], "Second?")])
        start = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[model.config.image_seq_length].item()
        return logits_of(model, inputs)[:, :start]

    torch.testing.assert_close(first_turn(images[1]), first_turn(images[2]))


def test_a_later_turn_sees_earlier_images(model, ask, images):
    outputs = []

    def record(_, args, output):
        outputs.append(output - args[0])

    hook = model.model.embedded_query.register_forward_hook(record)
    inputs = ask([(images[:1], "First?", "yes"), ([], "Second?")])
    logits_of(model, inputs)
    hook.remove()
    changed = outputs[0].abs().sum(dim=-1)[0] > 0
    assert torch.equal(changed, inputs["input_ids"][0] == model.config.query_token_id)


def test_rows_without_images_keep_their_queries(model, ask, images):
    calls = []
    hook = model.model.embedded_query.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    logits_of(model, ask([(images[:1], "What is it?")], [([], "Hello?")]))
    hook.remove()
    before, after = calls[0]
    torch.testing.assert_close(before[1], after[1], atol=0, rtol=0)


def test_the_module_changes_only_the_queries(model, ask, images):
    shapes = []
    norm = model.model.embedded_query.query_norm
    hook = norm.register_forward_hook(lambda _, args, output: shapes.append(tuple(output.shape[:2])))
    logits_of(model, ask([(images[:1], "First?", "yes"), ([], "Second?")], [(images[:1], "What is it?")]))
    hook.remove()
    assert shapes == [(2, 2 * model.config.num_query_tokens)]


def test_an_empty_question_gives_finite_answers(any_model, ask, images):
    inputs = ask([(images[:1], "")])
    assert logits_of(any_model, inputs).isfinite().all()


def test_a_text_only_batch_needs_no_pixels(any_model, ask):
    inputs = ask([([], "Hello?")], [([], "Hello, hello?")])
    assert "pixel_values" not in inputs
    assert logits_of(any_model, inputs).isfinite().all()


def test_high_definition_uses_five_tiles_in_the_same_model(model, ask, images):
    inputs = ask([(images[:1], "What is it?")], do_image_splitting=True)
    assert inputs["pixel_values"].shape[0] == 5
    num_image_tokens = (inputs["input_ids"] == model.config.image_token_id).sum().item()
    assert num_image_tokens == 5 * model.config.image_seq_length
    assert logits_of(model, inputs).isfinite().all()


@pytest.mark.parametrize(("is_told", "distinct"), [(False, 1), (True, 40)])
def test_the_module_can_be_told_which_tile_a_patch_comes_from(make_model, is_told, distinct):
    module = make_model(encode_tile_positions=is_told).model.embedded_query
    patches = torch.zeros(2, 40, 16, 32)  # rows, tiles, patches
    with torch.no_grad():
        marked = module.mark_tiles(patches, torch.arange(40))
    assert marked.shape == patches.shape
    assert len({tuple(patch.tolist()) for patch in marked.flatten(0, 2)}) == distinct


def test_places_of_tiles_are_orthogonal():
    places = TilePositions(32)
    torch.nn.init.eye_(places.weight)
    found = places(torch.arange(32)).detach()
    torch.testing.assert_close(found @ found.T, 16 * torch.eye(32), atol=1e-3, rtol=0)
    assert len({tuple(place.tolist()) for place in places(torch.arange(64)).detach().round(decimals=3)}) == 64


def test_new_tile_positions_change_no_answer_but_learn(make_model, ask, images, tmp_path):
    make_model(encode_tile_positions=False).save_pretrained(tmp_path)
    old, new = (
        FlashSlothForConditionalGeneration.from_pretrained(tmp_path, encode_tile_positions=is_told)
        for is_told in (False, True)
    )
    inputs = ask([(images[:2], "What differs?")])
    torch.testing.assert_close(new(**inputs).logits, old(**inputs).logits, rtol=0, atol=0)
    new(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert new.model.embedded_query.tile_positions.weight.grad.abs().max() > 0


def test_eager_and_sdpa_agree_and_reach_both_towers(make_model, ask, conversations):
    inputs = ask(*conversations)
    outputs = {}
    for implementation in ("eager", "sdpa"):
        model = make_model("llama", attn_implementation=implementation)
        assert model.model.vision_tower.config._attn_implementation == implementation
        assert model.model.language_model.config._attn_implementation == implementation
        outputs[implementation] = logits_of(model, inputs)
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs["eager"][mask], outputs["sdpa"][mask], atol=1e-4, rtol=0)


def test_each_part_can_have_its_own_attention(make_model):
    model = make_model("llama", attn_implementation={"text_config": "eager", "vision_config": "sdpa"})
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


def test_embeddings_instead_of_ids_give_the_same_logits(any_model, ask, conversations):
    inputs = dict(ask(*conversations))
    expected = logits_of(any_model, inputs)
    inputs["inputs_embeds"] = any_model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(logits_of(any_model, inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(DECODERS))
def test_the_forward_pass_compiles_without_graph_breaks(make_model, ask, conversations, family):
    model = make_model(family)
    inputs = ask(*conversations)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        logits = compiled(**inputs, use_cache=False).logits
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[mask], logits_of(model, inputs)[mask], atol=1e-4, rtol=0)


def test_every_parameter_learns_from_images(make_model, ask, conversations):
    model = make_model("qwen3").train()
    inputs = ask(*conversations)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_text_alone_touches_every_parameter_and_changes_nothing(make_model, ask, checkpointing):
    """Otherwise processes that train together would deadlock when one of them has no image."""
    model = make_model("qwen3", pooling_dropout=0.0)
    inputs = ask([([], "Hello there, who are you?")], [([], "Why?")])
    expected = logits_of(model, inputs)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    outputs = model(**inputs, labels=inputs["input_ids"])
    assert outputs.image_hidden_states is None
    assert torch.equal(outputs.logits, expected)
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    for part in ("vision_tower", "spatial_attention_pooling", "multi_modal_projector", "embedded_query"):
        unseen = [gradient for name, gradient in gradients.items() if part in name]
        assert unseen, part
        assert not any(gradient.any() for gradient in unseen), part


# transformers 5.17 has the first name only; newer ones have both, and their Trainer calls the second.
CHECKPOINTING = ["gradient_checkpointing_enable", "activation_checkpointing_enable"]
CHECKPOINTING = [name for name in CHECKPOINTING if hasattr(PreTrainedModel, name)]


@pytest.mark.parametrize("enable", CHECKPOINTING)
def test_gradient_checkpointing_leaves_gradients_equal(make_model, ask, conversations, enable):
    inputs = ask(*conversations)
    gradients = []
    for checkpointing in (False, True):
        model = make_model("phi", pooling_dropout=0.0).train()
        if checkpointing:
            getattr(model, enable)()
            assert all(layer.gradient_checkpointing for layer in model.model.language_model.layers)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("enable", CHECKPOINTING)
def test_reentrant_checkpointing_is_refused(model, enable):
    with pytest.raises(ValueError, match="use_reentrant=False"):
        getattr(copy.deepcopy(model), enable)({"use_reentrant": True})


def test_a_deep_copy_uses_its_own_modules(model, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    expected = logits_of(model, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.model.embedded_query.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits_of(model, inputs), expected)
    assert (logits_of(twin, inputs) - expected).abs().max() > 1e-2


def test_config_and_model_survive_pickling(model, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    assert pickle.loads(pickle.dumps(model.config)).to_dict() == model.config.to_dict()
    twin = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(logits_of(twin, inputs), logits_of(model, inputs))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.003), (torch.bfloat16, 0.02)])
def test_half_precision_works(make_model, ask, conversations, dtype, tolerance):
    model = make_model("phi").to(dtype)
    inputs = ask(*conversations)
    logits = logits_of(model, inputs)
    assert logits.dtype == dtype
    expected = logits_of(make_model("phi"), inputs)
    mask = inputs["attention_mask"].bool()
    difference = (logits.float() - expected)[mask].norm() / expected[mask].norm()
    assert difference < tolerance


def test_resizing_the_vocabulary_keeps_answers(make_model, ask, images):
    model = make_model("phi")
    inputs = ask([(images[:1], "What is it?")])
    expected = logits_of(model, inputs)
    model.resize_token_embeddings(300)
    torch.testing.assert_close(logits_of(model, inputs)[..., : expected.shape[-1]], expected)
    assert model.config.text_config.vocab_size == 300


def test_logits_to_keep_keeps_the_last(model, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    expected = logits_of(model, inputs)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, expected[:, -2:])


def test_the_tower_has_no_unused_parts(model):
    names = [name for name, _ in model.model.vision_tower.named_parameters()]
    assert names
    assert not any(word in name for name in names for word in ("post_layernorm", "head"))
    assert len(model.model.vision_tower.encoder.layers) == VISION["num_hidden_layers"]


def test_a_tower_with_a_class_token_pools_patches_only(make_config, ask, images):
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = FlashSlothForConditionalGeneration(make_config(vision_config=vision)).eval()
    features = model.get_image_features(torch.randn(2, 3, 32, 32))
    assert features.last_hidden_state.shape == (2, 16, 32)
    assert features.pooler_output.shape == (2, 4, 32)
    assert logits_of(model, ask([(images[:1], "What is it?")])).isfinite().all()


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_more_features_than_image_tokens_are_refused(model, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"]] * 2)
    with pytest.raises(ValueError, match=r"4 image tokens.*1 tiles are expected.*gives 2.*FlashSlothProcessor"):
        logits_of(model, inputs)


def test_image_tokens_without_pixels_are_refused(model, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match=r"1 tiles are expected.*gives 0"):
        logits_of(model, inputs)


def test_pixels_without_image_tokens_are_refused(model, ask, images):
    inputs = ask([([], "What is it?")])
    inputs["pixel_values"] = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"0 image tokens.*gives 1"):
        logits_of(model, inputs)


def test_ids_cut_inside_an_image_are_refused(model, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    last = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[-1].item()
    cut = {"input_ids": inputs["input_ids"][:, :last], "pixel_values": inputs["pixel_values"]}
    with pytest.raises(ValueError, match=r"Row 0 has 3 image tokens, but a tile has 4.*truncated"):
        logits_of(model, cut)


@pytest.mark.parametrize("cut", [slice(0, -1), slice(1, None)])
def test_query_tokens_outside_whole_blocks_are_refused(model, ask, images, cut):
    ids = ask([(images[:1], "What is it?")])["input_ids"][0].tolist()
    block = [i for i, token in enumerate(ids) if token == model.config.query_token_id][cut]
    keep = [i for i, token in enumerate(ids) if token != model.config.query_token_id or i in block]
    with pytest.raises(ValueError, match=r"2 query tokens that are not in whole blocks of 3"):
        logits_of(
            model, {"input_ids": torch.tensor([[ids[i] for i in keep]]), "pixel_values": torch.zeros(1, 3, 32, 32)}
        )


def test_a_torn_query_block_is_refused(model, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    ids = inputs["input_ids"]
    last = (ids[0] == model.config.query_token_id).nonzero()[-1].item()
    ids[0, [last, last + 1]] = ids[0, [last + 1, last]]
    with pytest.raises(ValueError, match="not in whole blocks"):
        logits_of(model, inputs)


def test_queries_without_their_question_are_refused(model, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    ids = inputs["input_ids"]
    newline = (ids[0] == model.config.image_token_id).nonzero()[-1].item() + 1
    ids[0, newline] = ids[0, newline + 1]
    user = (ids[0] == model.config.image_token_id).nonzero()[0].item() - 2
    ids[0, user] = ids[0, newline + 1]
    with pytest.raises(ValueError, match=r"their question does not begin in this call"):
        logits_of(model, inputs)


def test_images_of_another_size_are_refused(model, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    inputs["pixel_values"] = torch.zeros(1, 3, 40, 40)
    with pytest.raises(ValueError, match=r"\(num_tiles, channels, 32, 32\).*\(1, 3, 40, 40\)"):
        logits_of(model, inputs)


def test_ids_and_embeddings_together_are_refused(model, ask, images):
    inputs = ask([(images[:1], "What is it?")])
    with pytest.raises(ValueError, match="and not both"):
        model(**inputs, inputs_embeds=torch.zeros(1, 1, 32))
    with pytest.raises(ValueError, match="Pass either"):
        model()


def packed(*batches):
    """Rows of one sample each, packed into one row as `DataCollatorWithFlattening` does."""
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    pixels = [batch["pixel_values"] for batch in batches if "pixel_values" in batch]
    return {
        "input_ids": torch.cat([batch["input_ids"] for batch in batches], dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        "pixel_values": torch.cat(pixels) if pixels else None,
    }, lengths


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_packed_samples_do_not_read_each_other(
    make_model, ask, conversations, family, attn_implementation, is_training
):
    model = make_model(family, attn_implementation, pooling_dropout=0.0).train(is_training)
    alone = [ask(conversation) for conversation in conversations]
    for order in ([0, 2, 1, 3], [1, 3, 2, 0], [1, 1], [3]):
        inputs, lengths = packed(*(alone[index] for index in order))
        found = logits_of(model, inputs)[0].split(lengths)
        for index, logits in zip(order, found, strict=True):
            torch.testing.assert_close(logits, logits_of(model, alone[index])[0], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_compiled_model_keeps_packed_samples_apart(make_model, ask, conversations):
    model = make_model("qwen3", pooling_dropout=0.0).train()
    alone = [ask(conversation) for conversation in conversations[:2]]
    inputs, lengths = packed(*alone)
    expected = [logits_of(model, batch)[0] for batch in alone]
    model.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = model(**inputs).logits[0].split(lengths)
    for logits, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


def test_rows_of_packed_samples_make_a_batch(model, ask, images):
    first, second = (ask([([image], question)]) for image, question in zip(images, ("What?", "Who?"), strict=False))
    inputs, lengths = packed(first, second)
    other, _ = packed(second, first)
    both = {name: torch.cat([inputs[name], other[name]]) for name in inputs}
    found = logits_of(model, both)
    for row, expected in zip(found, (inputs, other), strict=True):
        torch.testing.assert_close(row, logits_of(model, expected)[0], atol=1e-4, rtol=0)
    assert lengths[0] != lengths[1]


def test_packed_samples_have_the_gradients_of_separate_ones(make_model, ask, conversations):
    model = make_model("qwen3", pooling_dropout=0.0).train()
    alone = [ask(conversation) for conversation in conversations]
    inputs, _ = packed(*alone)
    labels = inputs["input_ids"].masked_fill(inputs["position_ids"] == 0, -100)
    model(**inputs, labels=labels, num_items_in_batch=1).loss.backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for batch in alone:
        model(**batch, labels=batch["input_ids"], num_items_in_batch=1).loss.backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, atol=1e-6 * largest, rtol=1e-3)


def test_a_call_with_packed_samples_returns_no_cache(model, ask, images):
    sample = ask([(images[:1], "What?")])
    outputs = model(**packed(sample, sample)[0], use_cache=True)
    assert outputs.get(CACHE_NAME) is None
    assert model(**packed(sample)[0], use_cache=True)[CACHE_NAME] is not None


def test_packed_samples_that_would_be_mixed_are_refused(model, make_model, ask, images):
    sample = ask([(images[:1], "What?")])
    inputs, lengths = packed(sample, sample)
    with pytest.raises(ValueError, match=r"of row 0 restart within it.*omit `attention_mask`"):
        model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    with pytest.raises(ValueError, match="`cu_seq_lens_q` marks packed samples, but there are no `position_ids`"):
        model(inputs["input_ids"], inputs["pixel_values"], cu_seq_lens_q=torch.tensor([0, *lengths]).cumsum(dim=0))
    query = inputs["input_ids"][0] == model.config.query_token_id
    first_query = int(query.nonzero()[0])
    inputs["position_ids"] = torch.cat([torch.arange(first_query + 1), torch.arange(len(query) - first_query - 1)])[
        None
    ]
    with pytest.raises(ValueError, match="not in whole blocks of 3"):
        model(**inputs)
    image = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    inputs["position_ids"] = torch.cat([torch.arange(image + 1), torch.arange(len(query) - image - 1)])[None]
    with pytest.raises(ValueError, match="8 image tokens, cut between packed samples, but a tile has 4"):
        model(**inputs)


def test_a_decoder_whose_layers_mix_packed_samples_is_refused(make_config, ask, images):
    text = {**DECODERS["llama"], "model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2, "pad_token_id": 0}
    model = FlashSlothForConditionalGeneration(make_config("llama", text_config=text)).eval()
    sample = ask([(images[:1], "What?")])
    logits_of(model, packed(sample)[0])
    with pytest.raises(ValueError, match=r"\(lfm2\) has layers of type conv, which would mix them; put one"):
        model(**packed(sample, sample)[0])


def test_attention_can_be_set_after_loading(make_model, ask, conversations):
    model, inputs = make_model("phi"), ask(*conversations)
    expected = logits_of(model, inputs)
    model.set_attn_implementation("eager")
    parts = (model.config, model.model.language_model.config, model.model.vision_tower.config)
    assert [part._attn_implementation for part in parts] == ["eager"] * 3
    found = logits_of(model, inputs)
    for pair in zip(rows_of(found, inputs["attention_mask"]), rows_of(expected, inputs["attention_mask"]), strict=True):
        torch.testing.assert_close(*pair, atol=1e-4, rtol=0)
    assert model(**inputs, output_attentions=True).attentions[0] is not None
    model.set_attn_implementation({"vision_config": "sdpa"})
    assert [part._attn_implementation for part in parts] == ["eager", "eager", "sdpa"]


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_a_config_flag_equals_the_argument(make_model, ask, conversations, name):
    model, inputs = make_model("phi", "eager"), ask(*conversations)
    asked = model(**inputs, **{name: True})
    setattr(model.config, name, True)
    found = model(**inputs)
    assert set(found) == set(asked) > set(model(**inputs, **{name: False}))
    assert [len(found[key]) for key in found] == [len(asked[key]) for key in asked]


def test_image_features_include_the_towers_outputs(make_model, ask, images):
    model = make_model("phi", "eager")
    pixels = ask([(images[:2], "What?")])["pixel_values"]
    num_layers = model.config.vision_config.num_hidden_layers
    for part in (model, model.model):
        features = part.get_image_features(pixels, output_hidden_states=True, output_attentions=True)
        assert (len(features.hidden_states), len(features.attentions)) == (num_layers + 1, num_layers)
        assert torch.equal(features.hidden_states[-1], features.last_hidden_state)
        plain = part.get_image_features(pixels, return_dict=False)
        assert isinstance(plain, tuple) and len(plain) == 2
        assert torch.equal(plain[1], features.pooler_output)


def test_the_tower_gets_only_its_own_arguments(make_model, ask, images):
    model, given = make_model("phi").train(), []
    model.gradient_checkpointing_enable()
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(set(kwargs) - {"output_attentions", "output_hidden_states"}),
        with_kwargs=True,
    )
    inputs = ask([(images[:1], "What?")])
    model.get_image_features(inputs["pixel_values"])
    model(**inputs)
    hook.remove()
    assert given == [{"return_dict"}] * 2


def test_outputs_hold_the_image_features(make_model, ask, images):
    model = make_model("phi", "eager")
    inputs = ask([(images[:2], "What?")])
    features = model.get_image_features(inputs["pixel_values"])
    for part in (model, model.model):
        outputs = part(**inputs, output_hidden_states=True)
        assert torch.equal(outputs.image_outputs.last_hidden_state, features.last_hidden_state)
        assert torch.equal(outputs.image_outputs.pooler_output, outputs.image_hidden_states)
        assert len(outputs.image_outputs.hidden_states) == model.config.vision_config.num_hidden_layers + 1
        assert part(**ask([([], "Hello")])).image_outputs is None


def test_replicas_of_data_parallel_are_refused(make_model, ask, images):
    replica = replicate_without_gpus(make_model("phi"))
    with pytest.raises(RuntimeError, match=r"cannot run under `nn.DataParallel`.*torchrun --nproc_per_node NUM_GPUS"):
        replica(**ask([(images[:1], "What?")]))


def replicate_without_gpus(module):
    """The copies that `nn.DataParallel` makes of a module and of those inside it, by PyTorch's own function."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicate_without_gpus(child)
    return replica
