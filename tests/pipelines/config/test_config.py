"""Every dict enters through one function: what it describes, or a refusal that names the key and the remedy."""

import dataclasses
import string
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_core.config import AugmentConfig, ClassifierConfig, MaskConfig, ModelConfig, OptimConfig
from mae_core.errors import UserError
from pipelines.config import (
    KINDS,
    PROBE,
    SCRATCH,
    CheckpointConfig,
    ClassifyConfig,
    ComputeConfig,
    DataConfig,
    PeriodicEvaluationConfig,
    PrepareConfig,
    PretrainConfig,
    SweepConfig,
    TrackingConfig,
    config_hash,
    from_dict,
    identity,
    load_preset,
    options_for,
    parse_space,
    run_name,
    to_dict,
    with_overrides,
)

words = st.text(string.ascii_letters + string.digits + "_-", max_size=12)
positive = st.floats(1e-8, 1e3)


@st.composite
def pretrain_configs(draw: st.DrawFn) -> PretrainConfig:
    micro, patch = draw(st.integers(1, 64)), draw(st.sampled_from([4, 7, 14, 16]))
    heads = draw(st.sampled_from([1, 2, 4, 8]))
    epochs = draw(st.integers(1, 2000))
    return PretrainConfig(
        name=draw(words),
        seed=draw(st.integers(0, 2**40)),
        epochs=epochs,
        data=DataConfig(
            uri=draw(words),
            batch=micro * draw(st.integers(1, 64)),
            micro_batch=micro,
            labels_per_class=draw(st.none() | st.integers(1, 100)),
        ),
        model=ModelConfig(
            arch=f"vit_{draw(st.sampled_from(['pico', 'nano', 'base', 'huge']))}_patch{patch}",
            image_px=(patch * draw(st.integers(4, 20)), patch * draw(st.integers(4, 20))),
            channels=draw(st.integers(1, 13)),
            mask=MaskConfig(kind=draw(st.sampled_from(["random", "block"])), ratio=draw(st.floats(0.05, 0.9))),
            decoder_width=heads * 4 * draw(st.integers(1, 16)),
            decoder_heads=heads,
            target=draw(st.sampled_from(["pixels", "norm_pixels"])),
        ),
        optim=OptimConfig(
            base_lr=draw(positive),
            warmup_epochs=draw(st.floats(0, epochs)),
            betas=(draw(st.floats(0, 0.99)), draw(st.floats(0, 0.999))),
            clip_norm=draw(st.none() | positive),
        ),
        augment=AugmentConfig(crop=draw(st.sampled_from(["random_resized", "none"])), flip=draw(st.booleans())),
        compute=ComputeConfig(num_workers=draw(st.integers(1, 512)), gpu=draw(st.booleans())),
        checkpoint=CheckpointConfig(every_epochs=draw(positive), keep=draw(st.integers(1, 9))),
        tracking=TrackingConfig(experiment=draw(words), register=draw(st.booleans())),
    )


@pytest.mark.parametrize("labels", ["1", "0%", "101%", "-1%", "1.%"])
def test_labels_are_a_percentage(labels: str) -> None:
    with pytest.raises(UserError, match=r"is no percentage above 0; try 1%, or --data.labels-per-class 20"):
        ClassifyConfig(labels=labels)
    assert (ClassifyConfig(labels="2.5%").label_share, ClassifyConfig().label_share) == (0.025, None)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"model": {"target": "pca"}}, "model.target pca"),
        ({"prepare": {"tile_px": 64}}, "prepare.tile_px"),
        ({"data": {"labels_per_class": 3}}, "data.labels_per_class"),
        ({"extend": "runs/mine"}, "extend runs/mine"),
    ],
)
def test_a_cache_is_refused_where_the_whole_dataset_is_needed_first(values: dict[str, Any], what: str) -> None:
    data = {"uri": "images", "cache": "prepared"} | values.get("data", {})
    said = rf"data.cache prepared is for `mae pretrain`, and {what} needs .* run `mae prepare images prepared`"
    with pytest.raises(UserError, match=said):
        from_dict(PretrainConfig, values | {"data": data})
    with pytest.raises(UserError, match="a classifier needs the whole dataset"):
        ClassifyConfig(data=DataConfig(uri="images", cache="prepared"))
    with pytest.raises(UserError, match="cache prepared needs a source"):
        DataConfig(cache="prepared")


def test_where_and_how_a_dataset_is_prepared_is_no_part_of_a_runs_identity() -> None:
    plain = PretrainConfig(data=DataConfig(uri="images"))
    cached = PretrainConfig(data=DataConfig(uri="images", cache="prepared"), prepare=PrepareConfig(val_fraction=0.5))
    assert identity(cached) == identity(plain)
    assert config_hash(cached, "digest") == config_hash(plain, "digest")


def test_a_share_and_a_count_of_labels_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"labels 1% and data.labels_per_class 20 exclude each other"):
        ClassifyConfig(labels="1%", data=DataConfig(labels_per_class=20))


@pytest.mark.slow
@settings(deadline=None)
@given(pretrain_configs())
def test_a_config_survives_yaml(config: PretrainConfig) -> None:
    assert from_dict(PretrainConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(pretrain_configs())
def test_a_config_survives_its_command_line(config: PretrainConfig) -> None:
    from pipelines.cli import parse

    assert parse(["pretrain", *options_for(config, PretrainConfig())]).config == config


@pytest.mark.parametrize("config", [PrepareConfig(), PretrainConfig(), ClassifyConfig(), PROBE, SweepConfig()])
def test_defaults_survive_yaml(config: Any) -> None:
    assert from_dict(type(config), yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    assert from_dict(type(config), {}) == type(config)()


def test_numbers_that_yaml_takes_for_words_are_numbers() -> None:
    values = yaml.safe_load("{optim: {base_lr: 1e-3, warmup_epochs: 1e0}, model: {mask: {ratio: 5e-1}}}")
    assert values["optim"]["base_lr"] == "1e-3"
    config = from_dict(PretrainConfig, values)
    assert config.optim.base_lr == 1e-3
    assert config.model.mask.ratio == 0.5


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epoch": 3}, "unknown key epoch; did you mean epochs?"),
        ({"data": {"bacth": 3}}, "unknown key data.bacth; did you mean data.batch?"),
        ({"model": {"mask": {"ration": 3}}}, "unknown key model.mask.ration; did you mean model.mask.ratio?"),
        ({"zzz": 1}, "unknown key zzz; known are name, output"),
        ({"data": {"batch": 33}}, "data: batch 33 is not a multiple of micro_batch 64; try 64"),
        ({"epochs": "many"}, "epochs: Input should be a valid integer.*got 'many'"),
        ({"epochs": 0}, "epochs 0 is below 1; try 1"),
        ({"data": 3}, "data: .*got 3"),
        ({"model": {"mask": {"ratio": 1.5}}}, r"mask ratio 1.5 is outside \(0, 1\); try 0.75"),
        ({"augment": {"mixup": 0.8}}, "augment.mixup is for classifiers"),
        ({"evaluate": {"every_epochs": -1}}, "evaluate: every_epochs -1 is negative; try 10, or 0 for no evaluation"),
        ({"evaluate": {"images": 1}}, "images 1 is below 2; try 2000"),
        ({"evaluate": {"threads": 0}}, "threads 0 is below 1; try 1"),
        ({"evaluate": {"wait_s": -1.0}}, "wait_s -1 is not a number of seconds from 0 up; try 600"),
        ({"epochs": 3}, "warmup_epochs 40 exceeds epochs 3; try 0"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_remedy(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        from_dict(PretrainConfig, values)
    assert "\n" not in str(caught.value)


def test_all_unknown_keys_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"unknown key epoch;.*; unknown key data\.bacth"):
        from_dict(PretrainConfig, {"epoch": 1, "data": {"bacth": 1}})


def test_unknown_keys_of_a_sweeps_parts_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown key pretrain\.model\.arhc; did you mean pretrain\.model\.arch\?"):
        from_dict(SweepConfig, {"pretrain": {"model": {"arhc": "vit_base_patch16"}}})


@pytest.mark.parametrize("values", [None, [], "text", 3])
def test_what_is_no_dict_is_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="expected fields of PretrainConfig"):
        from_dict(PretrainConfig, values)


def test_overrides_replace_dotted_fields_and_nothing_else() -> None:
    config = with_overrides(PretrainConfig(), {"model.mask.ratio": 0.5, "epochs": 100})
    assert config.model.mask.ratio == 0.5
    assert config.epochs == 100
    back = with_overrides(config, {"model.mask.ratio": 0.75, "epochs": 800})
    assert back == PretrainConfig()


@pytest.mark.parametrize(
    ("dotted", "said"),
    [
        ("model.mask.ration", "did you mean model.mask.ratio"),
        ("epochs.count", "epochs has no fields"),
        ("modell.arch", "unknown key modell; did you mean model"),
    ],
)
def test_overrides_of_unknown_fields_are_refused(dotted: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_overrides(PretrainConfig(), {dotted: 1})


def test_configs_cannot_be_changed_after_they_were_validated() -> None:
    config: Any = PretrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 3


def test_runs_of_earlier_versions_keep_their_identity() -> None:
    """The hashes are of commit 7e1ebf5; a field that is added since then must be marked `ADDED`."""
    assert config_hash(PretrainConfig(), "digest") == "2f38aedd60ca"
    assert config_hash(PROBE, "digest") == "f521c58fba25"
    epochs_were = {"epochs": 14, "optim.warmup_epochs": 2, "checkpoint.every_epochs": 7}
    data_were = {"data.batch": 128, "data.micro_batch": 64}
    tracking_were = {"tracking.log_every_steps": 20, "tracking.pictures_every_epochs": 7}
    pretrain = with_overrides(load_preset(PretrainConfig, "demo_pretrain"), epochs_were | data_were | tracking_were)
    assert config_hash(pretrain, "digest") == "5c524b0bda3a"
    finetune_was = {"epochs": 20, "eval_every_epochs": 20, "checkpoint.every_epochs": 20}
    finetune = with_overrides(load_preset(ClassifyConfig, "demo_finetune"), finetune_was)
    assert config_hash(finetune, "digest") == "ca447d62ca27"
    sweep_was = {"baselines": False, "scratch": to_dict(SCRATCH), "trials_per_group": 3, "read_test": True}
    trials_were = {"pretrain.epochs": 5, "pretrain.data.batch": 128, "pretrain.data.micro_batch": 128}
    steps_were = {"pretrain.checkpoint.every_epochs": 5, "pretrain.compute.data_tasks": "auto"}
    sweep = with_overrides(load_preset(SweepConfig, "demo_sweep"), sweep_was | trials_were | steps_were)
    assert config_hash(sweep, "digest") == "11036ca17f96"


def test_an_added_field_is_part_of_the_identity_unless_it_has_its_default() -> None:
    base = PretrainConfig()
    assert "norm_eps" not in identity(base)["model"]
    assert identity(with_overrides(base, {"model.norm_eps": 1e-12}))["model"]["norm_eps"] == 1e-12


def test_the_schedule_is_part_of_the_identity_and_the_path_of_an_extended_run_is_not() -> None:
    base = with_overrides(PretrainConfig(), {"extend": "runs/a"})
    assert config_hash(base, "d") == config_hash(with_overrides(base, {"extend": "s3://bucket/a"}), "d")
    assert config_hash(base, "d", "run") != config_hash(base, "d", "other")
    assert config_hash(base, "d") != config_hash(with_overrides(base, {"optim.schedule": "constant"}), "d")


@pytest.mark.parametrize("cls", [PretrainConfig, ClassifyConfig])
def test_a_constant_rate_has_room_for_warm_up_and_decay(cls: type) -> None:
    fitting = {"epochs": 10, "optim": {"schedule": "constant", "warmup_epochs": 8.0, "decay_share": 0.2}}
    assert from_dict(cls, fitting).optim.decay_share == 0.2
    with pytest.raises(UserError, match=r"warmup_epochs 9 and optim.decay_share 0.2 overlap in 10 epochs.*share 0\.1$"):
        from_dict(cls, {**fitting, "optim": {**fitting["optim"], "warmup_epochs": 9.0}})
    with pytest.raises(UserError, match=r"decay_share 1.5 is outside \[0, 1\]; try 0.2"):
        OptimConfig(decay_share=1.5)


def test_an_extension_takes_no_model_version_and_a_sweep_extends_nothing() -> None:
    with pytest.raises(UserError, match=r"extend 'runs/a' and backbone 'models:/m/1' exclude each other"):
        PretrainConfig(extend="runs/a", backbone="models:/m/1")
    with pytest.raises(UserError, match=r"pretrain.extend 'runs/a' is for `mae pretrain`.*leave it out"):
        SweepConfig(pretrain=PretrainConfig(extend="runs/a"))


def test_a_runs_identity_is_what_decides_its_result() -> None:
    base = PretrainConfig()
    same = dataclasses.replace(
        base,
        name="other",
        output="elsewhere",
        data=dataclasses.replace(base.data, uri="s3://bucket/moved"),
        compute=ComputeConfig(num_workers=8, threads=2),
        tracking=TrackingConfig(experiment="another"),
        checkpoint=CheckpointConfig(keep=9),
        evaluate=PeriodicEvaluationConfig(every_epochs=10),
    )
    assert config_hash(base, "d") == config_hash(same, "d")
    assert config_hash(base, "d") != config_hash(base, "e")
    for other in ({"seed": 1}, {"epochs": 900}, {"compute.precision": "bfloat16"}, {"data.batch": 8192}):
        assert config_hash(with_overrides(base, other), "d") != config_hash(base, "d"), other
    assert "uri" not in identity(SweepConfig())["pretrain"]["data"]


def test_a_run_is_called_as_asked_or_after_preset_and_config() -> None:
    assert run_name(PretrainConfig(name="mine"), "vit_base", "d") == "mine"
    named = run_name(PretrainConfig(), "/some/where/small.yaml", "d")
    assert named == f"small-{config_hash(PretrainConfig(), 'd')}"


def test_a_space_is_read_as_yaml() -> None:
    assert parse_space(["model.mask.ratio=0.5,0.75", "model.target=pixels,norm_pixels", "augment.flip=true"]) == {
        "model.mask.ratio": [0.5, 0.75],
        "model.target": ["pixels", "norm_pixels"],
        "augment.flip": [True],
    }
    for word in ("model.mask.ratio", "model.mask.ratio="):
        with pytest.raises(ValueError, match=r"is not FIELD=V1,V2; try model\.mask\.ratio"):
            parse_space([word])


def test_a_preset_of_another_command_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="has kind: classify, but this command takes pretrain; "):
        load_preset(PretrainConfig, "vit_base_probe")
    for text in ("", "epochs: 3", "[]", "- kind: pretrain", "kind: pretrian"):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match="its first key must be kind: pretrain"):
            load_preset(PretrainConfig, str(path))


def test_a_preset_that_is_no_yaml_or_absent_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("kind: [pretrain")
    with pytest.raises(ValueError, match=r"mine\.yaml.*is not YAML.*line 1") as caught:
        load_preset(PretrainConfig, str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no preset 'vit_bsae'; did you mean vit_base"):
        load_preset(PretrainConfig, "vit_bsae")


def test_every_kind_of_preset_has_a_config() -> None:
    assert set(KINDS.values()) == {"pretrain", "classify", "sweep", "gate"}
    assert to_dict(ClassifierConfig())["method"] == "finetune"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"masks_per_image": 0}, "masks_per_image 0 is below 1"),
        ({"ema_decay": 1.0}, "ema_decay 1.0 is outside"),
        ({"complementary_masks": True}, "1 complementary masks with 49 .* --masks-per-image 2 --model.mask.ratio 0.5"),
        (
            {"complementary_masks": True, "masks_per_image": 5},
            "5 complementary masks with 49 visible .* not all 196 patches; try --masks-per-image 4 .* 0.75",
        ),
        (
            {"complementary_masks": True, "masks_per_image": 4, "crops_per_image": 2},
            "need random masks of one crop",
        ),
        ({"masks_per_image": 3}, "epochs 800 is not a multiple of masks_per_image 3; try 801"),
        ({"masks_per_image": 128, "epochs": 1024}, "data.micro_batch 64 is not a multiple .* try 128"),
        ({"crops_per_image": 0}, "crops_per_image 0 is below 1"),
        (
            {"masks_per_image": 2, "crops_per_image": 3},
            "epochs 800 is not a multiple of masks_per_image x crops_per_image 6; try 804",
        ),
        ({"crops_per_image": 2, "augment": {"crop": "none"}}, "crops_per_image needs a random crop"),
    ],
)
def test_views_of_an_image_must_divide_what_it_is_taken_from(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_dict(PretrainConfig, values)


def test_tags_are_pairs_and_none_of_ours() -> None:
    config = TrackingConfig(tags=("team=vision", "note=a=b", "empty="))
    assert config.tag_values == {"team": "vision", "note": "a=b", "empty": ""}
    for tag in ("team", "=x", "mae.parent=x", "mlflow.user=x", "sha256.config.json=x", "a b=c"):
        with pytest.raises(UserError, match="is not KEY=VALUE with a key other than"):
            TrackingConfig(tags=(tag,))
    # They change no run's identity.
    tagged = dataclasses.replace(PretrainConfig(), tracking=config)
    assert identity(tagged) == identity(PretrainConfig())
