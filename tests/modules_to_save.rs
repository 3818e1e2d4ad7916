//! The embedding and the head are trained whole where `modules_to_save` names them, and travel with the adapter as in PEFT;
//! `tests/adapter_kinds.rs` holds their logits and gradients against PEFT's.

mod emulated;
mod reference_case;
mod tiny_run;

use std::collections::BTreeSet;
use std::path::Path;

use emulated::placement_test;
use qlora::device::{Placement, Residence, Residency};
use qlora::model::ActivationPolicy::{self, Keep, Offload, Recompute};
use qlora::model::{ModuleToSave, Parameters};
use qlora::store::{Adapter, ModulesToSave, TargetModules};
use qlora::train::config::Optim;
use qlora::train::{TrainConfig, Trainer};
use reference_case::{ReferenceCase, micro_batch};
use tiny_run::{config, trainer};

const EMBEDDING: &str = "base_model.model.model.embed_tokens.weight";
const HEAD: &str = "base_model.model.lm_head.weight";

fn modules(names: &[&str]) -> Option<ModulesToSave> {
    let names = names.iter().map(|name| name.to_string());
    Some(ModulesToSave::of(names).unwrap())
}

fn both(output_dir: &Path, steps: i64) -> TrainConfig {
    TrainConfig {
        modules_to_save: modules(&["embed_tokens", "lm_head"]),
        neftune_noise_alpha: Some(5.0),
        max_steps: steps,
        ..config(output_dir)
    }
}

fn refusal(config: TrainConfig) -> String {
    trainer(config).err().expect("a refusal").to_string()
}

#[test]
fn a_run_resumes_to_the_same_bits_and_every_part_of_its_adapter_is_trained() {
    for optim in [Optim::AdamwTorch, Optim::Adamw8bit] {
        let (whole, parted) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let config = |dir: &Path, steps| TrainConfig {
            optim,
            ..both(dir, steps)
        };
        tiny_run::run(config(whole.path(), 10)).unwrap();
        tiny_run::run(config(parted.path(), 5)).unwrap();
        let started = Adapter::read(parted.path()).unwrap();
        tiny_run::run(tiny_run::resumed(config(parted.path(), 10))).unwrap();
        tiny_run::assert_same_end(parted.path(), whole.path());
        let ended = Adapter::read(whole.path()).unwrap();
        let names = ended.config.modules_to_save.names();
        assert_eq!(names.collect::<Vec<_>>(), ["embed_tokens", "lm_head"]);
        for name in [EMBEDDING, HEAD] {
            assert!(ended.tensors.contains_key(name), "{name}");
        }
        for (name, tensor) in &ended.tensors {
            let is_trained = tensor.data != started.tensors[name].data;
            assert!(is_trained, "{name} is not trained");
        }
    }
}

#[test]
fn they_can_join_an_adapter_on_the_way_and_not_be_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let continued = |adapter: &Path, names: &[&str]| TrainConfig {
        adapter: Some(adapter.to_path_buf()),
        modules_to_save: modules(names),
        lora_r: None,
        max_steps: 2,
        ..config(&second)
    };
    tiny_run::run(TrainConfig {
        modules_to_save: modules(&["lm_head"]),
        ..both(&first, 2)
    })
    .unwrap();
    let names = |dir: &Path| -> BTreeSet<String> {
        let adapter = Adapter::read(dir).unwrap();
        adapter.tensors.into_keys().collect()
    };
    assert!(names(&first).contains(HEAD) && !names(&first).contains(EMBEDDING));
    let unset = TrainConfig {
        modules_to_save: None,
        ..continued(&first, &[])
    };
    tiny_run::run(unset.clone()).unwrap();
    assert_eq!(names(&second), names(&first));
    std::fs::remove_dir_all(&second).unwrap();
    tiny_run::run(continued(&first, &["lm_head", "embed_tokens"])).unwrap();
    assert!(names(&second).contains(HEAD) && names(&second).contains(EMBEDDING));
    for left in [&[][..], &["embed_tokens"]] {
        let message = refusal(continued(&first, left));
        for part in ["`modules_to_save`", "but [\"lm_head\"] in"] {
            assert!(message.contains(part), "`{part}` is not in `{message}`");
        }
    }
    // A checkpoint has the states of those that were trained.
    let resumed = tiny_run::resumed(TrainConfig {
        resume_with_changes: true,
        ..both(&first, 4)
    });
    let message = refusal(resumed);
    assert!(
        message.contains("`modules_to_save`: is [\"embed_tokens\",\"lm_head\"], but [\"lm_head\"]"),
        "{message}"
    );
}

#[test]
fn what_is_neither_embedding_nor_head_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["norm", "q_proj", "embed"] {
        let message = refusal(TrainConfig {
            modules_to_save: modules(&["lm_head", name]),
            ..config(dir.path())
        });
        let part = format!("`modules_to_save`: `{name}` cannot be trained whole");
        assert!(message.contains(&part), "{message}");
    }
    assert!(ModulesToSave::of([String::new()]).is_err());
}

#[test]
fn a_tensor_that_is_missing_or_of_another_shape_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let stored = Adapter::read(ReferenceCase::of_adapter("modules_to_save").adapter).unwrap();
    let mut without = stored.clone();
    without.tensors.remove(HEAD);
    let message = without.write(dir.path()).unwrap_err().to_string();
    assert!(
        message.contains("base_model.model.*lm_head.weight"),
        "{message}"
    );

    let mut unnamed = stored.clone();
    unnamed.config.modules_to_save = modules(&["lm_head"]).unwrap();
    let message = unnamed.write(dir.path()).unwrap_err().to_string();
    assert!(
        message.contains(EMBEDDING) && message.contains("nor named in modules_to_save"),
        "{message}"
    );

    let mut other = stored;
    let head = other.tensors.get_mut(HEAD).unwrap();
    head.shape.reverse();
    let copy = dir.path().join("adapter");
    other.write(&copy).unwrap();
    let message = refusal(TrainConfig {
        adapter: Some(copy),
        lora_r: None,
        ..config(&dir.path().join("run"))
    });
    assert!(
        message.contains(HEAD) && message.contains("64"),
        "{message}"
    );
}

/// The gradients of all that is trained, of three micro-batches in so many passes.
fn gradients(
    case: &ReferenceCase,
    placement: &Placement,
    policies: [ActivationPolicy; 2],
    together: usize,
) -> Vec<f32> {
    let decoder = case.decoder_at(placement);
    let batch = case.batch();
    for part in [micro_batch(&batch, None); 3].chunks(together) {
        decoder.backward(part, 0.1, &policies).unwrap();
    }
    reference_case::values(Parameters::grads(decoder.parameters()))
}

placement_test!(
    policies_streaming_and_what_goes_together_change_no_bit,
    |placement| {
        let replaced = Residence {
            embedding: None,
            head: None,
            ..Residence::DEVICE
        };
        let streamed = Residence {
            weights: Residency::Streamed { slots: 2 },
            ..replaced
        };
        let case = ReferenceCase::of_adapter("modules_to_save");
        let expected = gradients(&case, placement, [Keep, Keep], 1);
        for (residence, policies, together) in [
            (replaced, [Keep, Keep], 3),
            (Residence::DEVICE, [Recompute, Keep], 2),
            (replaced, [Offload, Recompute], 1),
            (streamed, [Offload, Keep], 3),
        ] {
            let at = Placement {
                residence,
                ..placement.clone()
            };
            let found = gradients(&case, &at, policies, together);
            assert!(found == expected, "{residence:?} {policies:?} {together}");
        }
    }
);

placement_test!(paged_moments_have_the_bits_of_resident_ones, |placement| {
    let dir = tempfile::tempdir().unwrap();
    for (resident, paged) in [
        (Optim::AdamwTorch, Optim::PagedAdamw32bit),
        (Optim::Adamw8bit, Optim::PagedAdamw8bit),
    ] {
        let trained = |optim| {
            let config = TrainConfig {
                optim,
                lora_target_modules: Some(TargetModules::parse("q_proj").unwrap()),
                ..both(dir.path(), 2)
            };
            let mut trainer = Trainer::new(config, placement).unwrap();
            let base_is_left_out = trainer.decoder().placement().residence.head.is_none();
            assert!(base_is_left_out);
            for _ in 0..2 {
                trainer.step().unwrap();
            }
            let decoder = trainer.decoder();
            let head = decoder.vocabulary(ModuleToSave::Head).trained.clone();
            assert!(head.is_some());
            let all = decoder.trainables();
            all.map(|(name, t)| (name, t.master().unwrap()))
                .collect::<Vec<_>>()
        };
        assert!(trained(paged) == trained(resident), "{paged:?}");
    }
});
