//! Would the kernel tests notice a fault? Each test here plants faults in the kernels of one file, one at a time, and expects
//! that a test of that file fails: every barrier and every wait left out, and every mutant of `cuda/emulator/build/mutants.rs`.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::rc::Rc;

use qlora_emulator::{Synchronization, mutants};

use crate::device_under_test::{Device, DeviceUnderTest, Emulator, Memory};

/// The body of a kernel test.
type Body = fn(&DeviceUnderTest);

/// A barrier that can be left out, for the reason that `why` gives.
struct Unneeded {
    file: &'static str,
    /// The line of the source before it.
    after: &'static str,
    why: &'static str,
}

const UNNEEDED: &[Unneeded] = &[Unneeded {
    file: "nf4.cu",
    after: "bounds[threadIdx.x] = lower_bounds[threadIdx.x];",
    why: "block_max, between here and the first use of the bounds, has barriers too",
}];

/// Expects that each fault planted in `file` is noticed by one of the tests `bodies`.
fn assert_faults_are_noticed(file: &str, bodies: &[Body]) {
    let met = Met::default();
    for body in bodies {
        body(&DeviceUnderTest::new(Recorder(met.clone())));
    }
    for place in met.take() {
        // Barriers within block_sum and block_max: the tests of the emulator see to them, by calls that follow one another.
        if place.file == "common.cuh" {
            continue;
        }
        let noticed = is_noticed(bodies, |emulator| Emulator {
            without: Some(place.clone()),
            ..emulator
        });
        let unneeded = UNNEEDED.iter().find(|unneeded| unneeded.is_at(&place));
        let place = format!("{}:{}", place.file, place.line);
        match unneeded {
            None => assert!(
                noticed,
                "{place} can be left out, and no test of {file} fails"
            ),
            Some(Unneeded { why, .. }) => assert!(!noticed, "{place} is needed, although {why}"),
        }
    }
    for mutant in mutants().filter(|mutant| mutant.file == file) {
        let noticed = is_noticed(bodies, |emulator| Emulator {
            mutant: Some(mutant),
            ..emulator
        });
        assert!(noticed, "no test of {file} fails if it {}", mutant.name);
    }
}

impl Unneeded {
    fn is_at(&self, place: &Synchronization) -> bool {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("cuda")
            .join(self.file);
        let source = std::fs::read_to_string(path).expect("the kernels lie in cuda/");
        let line_before = source.lines().nth(place.line as usize - 2);
        self.file == place.file && line_before.is_some_and(|line| line.trim() == self.after)
    }
}

/// Whether some test fails on the emulator with a fault planted; watched first, since that finds most.
fn is_noticed(bodies: &[Body], plant: impl Fn(Emulator) -> Emulator) -> bool {
    Emulator::all()
        .into_iter()
        .rev()
        .map(plant)
        .any(|emulator| {
            bodies.iter().any(|body| {
                let device = DeviceUnderTest::new(emulator.clone());
                catch_unwind(AssertUnwindSafe(|| body(&device))).is_err()
            })
        })
}

/// The places where kernels synchronized.
type Met = Rc<RefCell<BTreeSet<Synchronization>>>;

/// The emulator, noting where kernels synchronize.
struct Recorder(Met);

impl Recorder {
    fn emulator() -> Emulator {
        let [first, ..] = Emulator::all();
        first
    }
}

impl Device for Recorder {
    fn allocate(&self, contents: &[u8]) -> Box<dyn Memory> {
        Self::emulator().allocate(contents)
    }

    fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        shared_bytes: usize,
        arguments: &[Vec<u8>],
        buffers: &[Range<usize>],
    ) -> Result<(), String> {
        let met = Self::emulator().run(kernel, grid, shared_bytes, arguments, buffers);
        self.0
            .borrow_mut()
            .extend(met.map_err(|fault| fault.to_string())?);
        Ok(())
    }
}

#[test]
fn in_adamw() {
    use crate::{adamw, adamw_8bit};
    assert_faults_are_noticed(
        "adamw",
        &[
            adamw::any_number_of_partial_sums_is_added::body,
            adamw::the_squared_norm_is_exact_to_the_last_digits::body,
            adamw_8bit::moments_in_8_bits_follow_the_plain_formula::body,
        ],
    );
}

#[test]
fn in_attention() {
    use crate::attention;
    assert_faults_are_noticed(
        "attention",
        &[
            attention::queries_on_a_cache_see_all_keys_before_them::body,
            attention::packed_sequences_do_not_see_each_other::body,
            attention::a_window_hides_the_distant_past::body,
            attention::heads_of_every_size_of_tile::body,
        ],
    );
}

#[test]
fn in_attention_on_hopper() {
    use crate::attention;
    assert_faults_are_noticed(
        "attention_hopper",
        &[attention::warpgroups_take_several_tiles::body],
    );
}

#[test]
fn in_embedding() {
    use crate::embedding;
    assert_faults_are_noticed(
        "embedding",
        &[
            embedding::each_token_gathers_its_row::body,
            embedding::scattered_rows_leave_the_others_alone::body,
            embedding::each_token_adds_up_the_gradients_of_its_rows::body,
        ],
    );
}

#[test]
fn in_linear_cross_entropy() {
    use crate::linear_cross_entropy;
    assert_faults_are_noticed(
        "linear_cross_entropy",
        &[
            linear_cross_entropy::forward_is_the_loss_of_each_row::body,
            linear_cross_entropy::backward_leaves_the_gradient_in_the_place_of_the_logits::body,
        ],
    );
}

#[test]
fn in_lora() {
    use crate::lora;
    assert_faults_are_noticed(
        "lora",
        &[
            lora::down_multiplies_what_dropout_leaves_of_x::body,
            lora::grad_a_adds_the_product_with_what_dropout_leaves_of_x::body,
            lora::up_adds_what_dropout_leaves_of_the_products::body,
        ],
    );
}

#[test]
fn in_nf4() {
    use crate::nf4;
    assert_faults_are_noticed(
        "nf4",
        &[
            nf4::dequantized_weights_have_the_bits_of_the_library::body,
            nf4::quantized_weights_have_the_bits_of_the_library::body,
            nf4::scales_have_the_codes_of_the_library::body,
        ],
    );
}

#[test]
fn in_rms_norm() {
    use crate::rms_norm;
    assert_faults_are_noticed(
        "rms_norm",
        &[
            rms_norm::forward_divides_each_row_by_its_rms::body,
            rms_norm::the_sum_with_the_branch_is_normalized_as_it_is_stored::body,
            rms_norm::backward_adds_the_gradient_to_dx::body,
            rms_norm::backward_gives_the_gradient_alone_whatever_lies_in_dx::body,
        ],
    );
}

#[test]
fn in_rope() {
    use crate::rope;
    assert_faults_are_noticed(
        "rope",
        &[rope::every_head_turns_by_the_angle_of_its_position::body],
    );
}

/// The files above.
const FILES: [&str; 9] = [
    "adamw",
    "attention",
    "attention_hopper",
    "embedding",
    "linear_cross_entropy",
    "lora",
    "nf4",
    "rms_norm",
    "rope",
];

#[test]
fn every_mutant_has_its_test() {
    let without: Vec<_> = mutants()
        .filter(|mutant| !FILES.contains(&mutant.file))
        .collect();
    assert!(without.is_empty(), "{without:?}");
}
