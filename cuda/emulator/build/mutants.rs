//! Kernels with a fault planted in them, for `tests/kernels/planted_faults.rs`: would the tests notice?
//!
//! Each is the source of a kernel file with one text replaced, which must occur exactly once. When a change of a kernel removes
//! such a text, plant the fault anew where its bound is checked now.

/// One replaced text.
pub struct Mutant {
    /// What is wrong.
    pub name: &'static str,
    /// The kernel file that is compiled.
    pub kernel_file: &'static str,
    /// The file with the text: the kernel file itself or a header of it.
    pub source: &'static str,
    pub text: &'static str,
    pub replacement: &'static str,
}

pub const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "copies rows past the last",
        kernel_file: "attention.cu",
        source: "attention_tile.cuh",
        text: "copy_async_16(to + first * E + column, source + column, is_row && column < columns);",
        replacement: "copy_async_16(to + first * E + column, source + column, column < columns);",
    },
    Mutant {
        name: "sees one key beyond the window",
        kernel_file: "attention.cu",
        source: "attention_tile.cuh",
        text: "static_cast<unsigned>(positions_before) < static_cast<unsigned>(reach)",
        replacement: "static_cast<unsigned>(positions_before) <= static_cast<unsigned>(reach)",
    },
    Mutant {
        name: "copies rows past the last",
        kernel_file: "attention_hopper.cu",
        source: "attention_hopper.cu",
        text: "start + row + i * ROW_STEP < end);",
        replacement: "true);",
    },
    Mutant {
        name: "dequantizes past the last weight",
        kernel_file: "nf4.cu",
        source: "nf4.cu",
        text: "const uint64_t end = min(first + SPAN, n);",
        replacement: "const uint64_t end = first + SPAN;",
    },
    Mutant {
        name: "quantizes past the last weight",
        kernel_file: "nf4.cu",
        source: "nf4.cu",
        text: "const uint64_t end = min(start + (1u << block_size_log2), n);",
        replacement: "const uint64_t end = start + (1u << block_size_log2);",
    },
    Mutant {
        name: "reads past the last scale",
        kernel_file: "nf4.cu",
        source: "nf4.cu",
        text: "const float z = i < m ? __fsub_rn(absmax[i], *offset) : 0.0f;",
        replacement: "const float z = __fsub_rn(absmax[i], *offset);",
    },
    Mutant {
        name: "normalizes past the last row",
        kernel_file: "rms_norm.cu",
        source: "rms_norm.cu",
        text: "if (row >= rows) {",
        replacement: "if (false) {",
    },
    Mutant {
        name: "reads past the end of a row",
        kernel_file: "rms_norm.cu",
        source: "rms_norm.cu",
        text: "if (i < d) {\n                held.vectors[k]",
        replacement: "{\n                held.vectors[k]",
    },
    Mutant {
        name: "reads past the last word",
        kernel_file: "linear_cross_entropy.cu",
        source: "linear_cross_entropy.cu",
        text: "if (start < vocab) {\n                read(",
        replacement: "{\n                read(",
    },
    Mutant {
        name: "writes past the last word",
        kernel_file: "linear_cross_entropy.cu",
        source: "linear_cross_entropy.cu",
        text: "if (start < vocab) {\n                float values[WIDTH];",
        replacement: "{\n                float values[WIDTH];",
    },
    Mutant {
        name: "copies one column too many",
        kernel_file: "embedding.cu",
        source: "embedding.cu",
        text: "for (unsigned i = copied + threadIdx.x; i < d;",
        replacement: "for (unsigned i = copied + threadIdx.x; i <= d;",
    },
    Mutant {
        name: "adds the first row of the next token",
        kernel_file: "embedding.cu",
        source: "embedding.cu",
        text: "for (unsigned i = first; i < end;",
        replacement: "for (unsigned i = first; i <= end;",
    },
    Mutant {
        name: "rotates past the last row",
        kernel_file: "rope.cu",
        source: "rope.cu",
        text: "i < rows * row_vectors;",
        replacement: "i <= rows * row_vectors;",
    },
    Mutant {
        name: "updates past the last weight",
        kernel_file: "adamw.cu",
        source: "adamw.cu",
        text: "if (i < n) {\n                m[k] =",
        replacement: "{\n                m[k] =",
    },
    Mutant {
        name: "copies rows past the last",
        kernel_file: "lora.cu",
        source: "matrix.cuh",
        text: "const bool valid = row < rows && col < cols;",
        replacement: "const bool valid = col < cols;",
    },
    Mutant {
        name: "loads columns past the last",
        kernel_file: "lora.cu",
        source: "matrix.cuh",
        text: "return row < rows && col < cols ? data",
        replacement: "return row < rows ? data",
    },
    Mutant {
        name: "drops the same for each adapter",
        kernel_file: "lora.cu",
        source: "lora.cu",
        text: "stream1 + place.adapter}",
        replacement: "stream1}",
    },
];
