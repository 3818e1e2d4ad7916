//! A run continues any PEFT adapter as it is, and refuses by name what would make another one of it.

mod tiny_run;

use std::fs;
use std::path::{Path, PathBuf};

use qlora::store::{Adapter, ModulePatterns, TargetModules};
use qlora::train::TrainConfig;
use serde_json::{Value, json};
use tiny_run::{config, model, trainer};

/// An adapter of rank 4 and alpha 8 on all linear layers, made by PEFT.
fn peft_adapter() -> PathBuf {
    model().join("train/init_adapter")
}

fn continued(adapter: &Path, output_dir: &Path) -> TrainConfig {
    TrainConfig {
        adapter: Some(adapter.to_path_buf()),
        lora_r: None,
        ..config(output_dir)
    }
}

fn refusal(config: TrainConfig) -> String {
    trainer(config).err().expect("a refusal").to_string()
}

#[test]
fn a_key_that_says_what_the_adapter_is_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let start = |config: TrainConfig| {
        trainer(config)
            .unwrap()
            .decoder()
            .adapter(&Default::default())
            .unwrap()
    };
    let unset = start(continued(&peft_adapter(), dir.path()));
    let all_named = start(TrainConfig {
        lora_r: Some(4),
        lora_alpha: Some(8.0),
        use_rslora: Some(false),
        lora_target_modules: Some(TargetModules::AllLinear),
        layers_to_transform: Some(vec![1, 0]),
        rank_pattern: Some(ModulePatterns::new([("q_proj".to_string(), 4)]).unwrap()),
        ..continued(&peft_adapter(), dir.path())
    });
    let stored = Adapter::read(peft_adapter()).unwrap();
    for (name, tensor) in &stored.tensors {
        assert!(unset.tensors[name].data == tensor.data, "{name}");
        assert!(all_named.tensors[name].data == tensor.data, "{name}");
    }
}

#[test]
fn a_key_unlike_the_adapter_is_named_with_both_values() {
    let dir = tempfile::tempdir().unwrap();
    let start = || continued(&peft_adapter(), dir.path());
    let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
    let ranks = ModulePatterns::new([("o_proj".to_string(), 2)]).unwrap();
    let alphas = ModulePatterns::new([("o_proj".to_string(), 4.0)]).unwrap();
    #[rustfmt::skip]
    let refused = [
        (TrainConfig { lora_r: Some(64), ..start() }, ["`lora_r`", "is 64, but 4"]),
        (TrainConfig { lora_alpha: Some(16.0), ..start() }, ["`lora_alpha`", "is 16, but 8"]),
        (TrainConfig { use_rslora: Some(true), ..start() }, ["`use_rslora`", "is true, but false"]),
        (TrainConfig { use_dora: Some(true), ..start() }, ["`use_dora`", "is true, but false"]),
        (TrainConfig { lora_target_modules: Some(TargetModules::Names(names(&["q_proj"]))), ..start() },
            ["`lora_target_modules`: is [\"q_proj\"]", "\"down_proj\""]),
        (TrainConfig { exclude_modules: Some(TargetModules::Names(names(&["q_proj"]))), ..start() },
            ["`exclude_modules`", "is [\"q_proj\"], but null"]),
        (TrainConfig { layers_to_transform: Some(vec![1]), ..start() }, ["`layers_to_transform`", "is [1], but null"]),
        (TrainConfig { rank_pattern: Some(ranks), ..start() }, ["`rank_pattern`", "is [\"o_proj=2\"], but []"]),
        (TrainConfig { alpha_pattern: Some(alphas), ..start() }, ["`alpha_pattern`", "is [\"o_proj=4\"], but []"]),
    ];
    for (config, parts) in refused {
        let message = refusal(config);
        for part in parts.into_iter().chain([peft_adapter().to_str().unwrap()]) {
            assert!(message.contains(part), "`{part}` is not in `{message}`");
        }
    }
}

/// A copy of PEFT's adapter with other keys in its config.
fn changed(dir: &Path, changes: Value) -> PathBuf {
    let copy = dir.join("adapter");
    fs::create_dir_all(&copy).unwrap();
    let weights = "adapter_model.safetensors";
    fs::copy(peft_adapter().join(weights), copy.join(weights)).unwrap();
    let text = fs::read(peft_adapter().join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    let keys = config.as_object_mut().unwrap();
    keys.extend(changes.as_object().unwrap().clone());
    fs::write(copy.join("adapter_config.json"), config.to_string()).unwrap();
    copy
}

#[test]
fn tensors_unlike_their_config_are_named() {
    let dir = tempfile::tempdir().unwrap();
    for (changes, parts) in [
        (json!({"r": 8}), &["lora_A.weight", "r = 8", "[4, "][..]),
        (
            json!({"rank_pattern": {"up_proj": 2}}),
            &["up_proj.lora_A.weight", "r = 2"],
        ),
        (
            json!({"target_modules": ["q_proj"]}),
            &["down_proj", "does not fit the model"],
        ),
        (
            json!({"layers_to_transform": [0]}),
            &["layers.1.", "does not fit the model"],
        ),
    ] {
        let adapter = changed(dir.path(), changes.clone());
        let message = refusal(continued(&adapter, &dir.path().join("run")));
        for part in parts {
            assert!(
                message.contains(part),
                "{changes}: `{part}` is not in `{message}`"
            );
        }
    }
}

/// PEFT makes and loads such adapters.
#[test]
fn names_in_its_config_that_fit_nothing_are_let_be() {
    let dir = tempfile::tempdir().unwrap();
    let mut names = vec!["c_attn", "q_proj", "k_proj", "v_proj", "o_proj"];
    names.extend(["gate_proj", "up_proj", "down_proj"]);
    for changes in [
        json!({"target_modules": names}),
        json!({"layers_to_transform": [0, 1, 2]}),
        json!({"exclude_modules": ["lm_head", "c_proj"]}),
    ] {
        let adapter = changed(dir.path(), changes.clone());
        let started = trainer(continued(&adapter, &dir.path().join("run")));
        assert!(started.is_ok(), "{changes}: {:?}", started.err());
    }
}

#[test]
fn a_target_without_tensors_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = Adapter::read(peft_adapter()).unwrap();
    adapter
        .tensors
        .retain(|name, _| !name.contains("layers.1.mlp.up_proj"));
    let copy = dir.path().join("adapter");
    adapter.write(&copy).unwrap();
    let message = refusal(continued(&copy, &dir.path().join("run")));
    assert!(
        message.contains("layers.1.mlp.up_proj.lora_A.weight"),
        "{message}"
    );
}

#[test]
fn a_new_adapter_for_what_is_not_there_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let start = || config(dir.path());
    let names = |name: &str| Some(TargetModules::Names(vec!["q_proj".into(), name.into()]));
    let ranks = ModulePatterns::new([("c_attn".to_string(), 2)]).unwrap();
    #[rustfmt::skip]
    let refused = [
        (TrainConfig { lora_target_modules: names("lm_head"), ..start() }, "`lora_target_modules`: no layer matches `lm_head`"),
        (TrainConfig { exclude_modules: names("c_attn"), ..start() }, "`exclude_modules`: no layer matches `c_attn`"),
        (TrainConfig { layers_to_transform: Some(vec![0, 2]), ..start() }, "`layers_to_transform`: there is no layer 2"),
        (TrainConfig { rank_pattern: Some(ranks), ..start() }, "`rank_pattern`: no layer matches `c_attn`"),
    ];
    for (config, part) in refused {
        let message = refusal(config);
        assert!(message.contains(part), "`{part}` is not in `{message}`");
    }
}

#[test]
fn a_run_with_patterns_and_magnitudes_resumes_and_its_adapter_reads_back() {
    let (whole, parted) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let config = |dir: &Path, steps| TrainConfig {
        lora_target_modules: Some(TargetModules::parse("q_proj,v_proj,down_proj").unwrap()),
        layers_to_transform: Some(vec![1]),
        exclude_modules: Some(TargetModules::parse("v_proj").unwrap()),
        rank_pattern: Some(ModulePatterns::new([("down_proj".to_string(), 2)]).unwrap()),
        alpha_pattern: Some(
            ModulePatterns::new([("1.self_attn.q_proj".to_string(), 8.0)]).unwrap(),
        ),
        use_rslora: Some(true),
        use_dora: Some(true),
        lora_dropout: Some(0.1),
        max_steps: steps,
        ..config(dir)
    };
    tiny_run::run(config(whole.path(), 10)).unwrap();
    tiny_run::run(config(parted.path(), 5)).unwrap();
    let started = Adapter::read(parted.path()).unwrap();
    tiny_run::run(tiny_run::resumed(config(parted.path(), 10))).unwrap();
    tiny_run::assert_same_end(parted.path(), whole.path());

    let read = Adapter::read(whole.path()).unwrap();
    let shapes: Vec<_> = read
        .tensors
        .iter()
        .map(|(name, t)| (name.as_str(), t.shape.clone()))
        .collect();
    let down = "base_model.model.model.layers.1.mlp.down_proj";
    let q = "base_model.model.model.layers.1.self_attn.q_proj";
    assert_eq!(
        shapes,
        [
            (&*format!("{down}.lora_A.weight"), vec![2, 128]),
            (&*format!("{down}.lora_B.weight"), vec![64, 2]),
            (&*format!("{down}.lora_magnitude_vector"), vec![64]),
            (&*format!("{q}.lora_A.weight"), vec![4, 64]),
            (&*format!("{q}.lora_B.weight"), vec![64, 4]),
            (&*format!("{q}.lora_magnitude_vector"), vec![64]),
        ]
    );
    for (name, tensor) in &read.tensors {
        assert!(
            tensor.data != started.tensors[name].data,
            "{name} is not trained"
        );
    }
    let path = |name: &str| format!("model.layers.1.{name}");
    assert_eq!(read.config.scaling_of(&path("self_attn.q_proj")), 4.0);
    assert_eq!(
        read.config.scaling_of(&path("mlp.down_proj")),
        16.0 / 2f64.sqrt()
    );
}

/// PEFT lets a pattern be that fits nothing, and so does a run that continues such an adapter.
#[test]
fn a_pattern_of_the_adapter_that_fits_nothing_is_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = Adapter::read(peft_adapter()).unwrap();
    adapter.config.rank_pattern = ModulePatterns::new([("nowhere".to_string(), 2)]).unwrap();
    let elsewhere = dir.path().join("adapter");
    adapter.write(&elsewhere).unwrap();
    trainer(continued(&elsewhere, &dir.path().join("run"))).unwrap();
}
