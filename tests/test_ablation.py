"""The ablation's variants differ only in the property that they are named after."""

import json
import sys

import ablation
import ablation_scenes as scenes
import pytest
import torch
from ablation import VARIANTS

BATCH = 4


@pytest.fixture(scope="module", params=VARIANTS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def features():
    return torch.randn(BATCH, 128, scenes.GRID, scenes.GRID, generator=torch.Generator().manual_seed(0))


def trained_a_little(name, features, num_steps=2):
    torch.manual_seed(0)
    model = ablation.build_model_to_budget(VARIANTS[name])
    dataset = ablation.ConversationDataset(features, num_steps * BATCH, 0, VARIANTS[name])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for step in range(num_steps):
        model(**ablation.collate([dataset[BATCH * step + i] for i in range(BATCH)])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_every_letter_and_every_dot_has_its_own_patch():
    for index in range(200):
        scene = scenes.scene_at("train", index)
        names, _, letters, _ = scenes.patch_targets(scene).unbind(-1)
        assert (names == scenes.NAMES.index("dot")).sum() == sum(thing.name == "dot" for thing in scene.things)
        written = [scenes.LETTERS.index(letter) for thing in scene.things for letter in thing.text]
        assert set(written) == set(letters[letters != scenes.IGNORED].tolist())
        assert (letters != scenes.IGNORED).sum() >= len(written)


def test_answers_follow_from_the_scene():
    for index in range(50):
        scene = scenes.scene_at("train", index)
        answers = {task: "".join(answer) for task, (_, answer) in scenes.questions(scene).items()}
        names = [thing.name for thing in scene.things]
        assert [thing.text for thing in scene.things if thing.name == "sign"] == [answers["read"]]
        assert names.count("dot") == int(answers["count"])
        assert names.count(answers["shape"]) == 1
        assert scene.background == answers["background"]


def test_all_variants_train_the_same_number_of_parameters_within_one_per_cent():
    trained = {name: ablation.num_trained(ablation.build_model_to_budget(VARIANTS[name])) for name in VARIANTS}
    assert max(trained.values()) < 1.01 * min(trained.values())


def test_all_variants_are_trained_on_the_same_questions(features):
    def words(name):
        dataset = ablation.ConversationDataset(features, 40, 5, VARIANTS[name])
        special = [scenes.VOCABULARY[word] for word in (scenes.IMAGE, scenes.QUERY)]
        return [[i for i in dataset[n]["input_ids"].tolist() if i not in special] for n in range(40)]

    assert all(words(name) == words("all") for name in VARIANTS)


def test_token_counts_are_those_of_the_table():
    counts = {name: ablation.token_counts(variant) for name, variant in VARIANTS.items()}
    assert counts["all"] == (81, 0)
    assert counts["average"] == counts["sap"] == (9, 0)
    assert counts["average-embq"] == counts["sap-embq"] == counts["sap-queries"] == (9, 4)


def test_only_average_pooling_has_equal_weights_in_a_window(name, features):
    pooling = trained_a_little(name, features).model.spatial_attention_pooling
    weights = pooling.window_weights(10 * features.flatten(2).transpose(1, 2))
    is_uniform = torch.allclose(weights, torch.full_like(weights, 1 / weights.shape[-1]))
    assert is_uniform == (VARIANTS[name].is_average or VARIANTS[name].window_size == 1)


def test_only_variants_with_the_module_let_it_change_an_answer(name, features):
    model = trained_a_little(name, features)
    dataset = ablation.ConversationDataset(features, BATCH, 0, VARIANTS[name])
    batch = ablation.collate([dataset[i] for i in range(BATCH)])
    before = model(**batch).logits
    torch.nn.init.normal_(model.model.embedded_query.image_attention.v_proj.weight)
    assert torch.equal(before, model(**batch).logits) != VARIANTS[name].has_module


@pytest.mark.slow
def test_one_pass_counts_what_generate_answers(features):
    """On evaluation images that the model has memorized, so that some answers are right."""
    variant = VARIANTS["sap-embq"]
    model = trained_a_little("sap-embq", features, num_steps=60)
    accuracy = ablation.evaluate(model, features, variant)
    generated = dict.fromkeys(accuracy, 0)
    for index, image in enumerate(features):
        turns = scenes.questions(scenes.scene_at("evaluation", index))
        for task, (question, answer) in turns.items():
            row = ablation.render([(question, answer)], *ablation.token_counts(variant))
            prompt = row["input_ids"][: -len(answer) - 1].unsqueeze(0)
            with torch.autocast("cpu", torch.bfloat16):
                said = model.generate(prompt, pixel_values=image.unsqueeze(0), max_new_tokens=6, do_sample=False)
            right = [*(scenes.VOCABULARY[word] for word in answer), scenes.VOCABULARY[scenes.END]]
            generated[task] += said[0, prompt.shape[1] :].tolist() == right
    assert accuracy == {task: hits / len(features) for task, hits in generated.items()}
    assert 0 < sum(accuracy.values()) < len(accuracy)


@pytest.mark.slow
def test_the_script_writes_its_tables_and_resumes(tmp_path, monkeypatch):
    sizes = ["--tower-steps", "1", "--steps", "1", "--images", "8", "--evaluation-images", "4"]
    command = ["ablation.py", "--output", str(tmp_path), *sizes, "--variants", "sap", "sap-embq", "--seeds"]
    monkeypatch.setattr(sys, "argv", [*command, "0"])
    ablation.main()
    first = (tmp_path / "sap-0.json").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", [*command, "0", "1"])
    ablation.main()
    assert (tmp_path / "sap-0.json").stat().st_mtime_ns == first
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(run["variant"], run["seed"]) for run in runs] == [
        ("sap", 0),
        ("sap-embq", 0),
        ("sap", 1),
        ("sap-embq", 1),
    ]
    assert "| SAP + EmbQ (FlashSloth) | 9 + 4 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_runs_of_different_length_do_not_share_a_folder(tmp_path):
    ablation.check_settings(tmp_path, {"steps": 1})
    with pytest.raises(ValueError, match="choose another --output"):
        ablation.check_settings(tmp_path, {"steps": 2})
