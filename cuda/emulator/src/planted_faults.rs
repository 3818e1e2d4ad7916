//! Defects that are planted into copies of the kernels, to see that the tests would notice them.
//!
//! A copy's kernels are in the table under their names with `@` and the fault's name behind.

/// A place in a kernel's source where something is left out.
#[derive(Debug, Clone, Copy)]
pub struct PlantedFault {
    /// An identifier.
    pub name: &'static str,
    /// The stem of the kernel file whose kernels get the fault.
    pub file: &'static str,
    /// The file that is changed: the kernel file or a header that it includes.
    pub place: &'static str,
    /// Text that has to be in the place exactly once, and what takes its place.
    pub replaces: &'static str,
    pub with: &'static str,
}

pub const FAULTS: &[PlantedFault] = &[
    PlantedFault {
        name: "table_without_barrier",
        file: "nf4",
        place: "nf4.cu",
        replaces: "value_of[threadIdx.x] = code[threadIdx.x];\n    }\n    __syncthreads();",
        with: "value_of[threadIdx.x] = code[threadIdx.x];\n    }",
    },
    PlantedFault {
        name: "sum_without_barrier",
        file: "nf4",
        place: "common.cuh",
        replaces: "__syncthreads();\n    value = warp_sum(",
        with: "value = warp_sum(",
    },
    PlantedFault {
        name: "gradient_without_barrier",
        file: "linear_cross_entropy",
        place: "linear_cross_entropy.cu",
        replaces: "__syncthreads();\n        logits.store_gradient(",
        with: "logits.store_gradient(",
    },
    PlantedFault {
        name: "keys_without_wait",
        file: "attention",
        place: "attention_forward.cuh",
        replaces: "copy_async_wait<0>();\n            __syncthreads();  // the keys are there",
        with: "__syncthreads();  // the keys are there",
    },
    PlantedFault {
        name: "last_vector_unbounded",
        file: "residual",
        place: "bf16_vector.cuh",
        replaces: "aligned ? n / 8 : 0",
        with: "aligned ? (n + 7) / 8 : 0",
    },
    PlantedFault {
        name: "row_one_too_long",
        file: "embedding",
        place: "embedding.cu",
        replaces: "copied + threadIdx.x; i < d;",
        with: "copied + threadIdx.x; i <= d;",
    },
];

impl PlantedFault {
    /// The source of the place with the fault in it.
    pub fn plant(&self, source: &str) -> String {
        let places = source.matches(self.replaces).count();
        assert_eq!(
            places, 1,
            "{} has {places} places for the fault `{}`, not one",
            self.place, self.name
        );
        source.replace(self.replaces, self.with)
    }
}
