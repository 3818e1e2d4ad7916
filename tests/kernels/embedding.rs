//! The kernels of `cuda/embedding.cu` move whole rows and nothing else.

use crate::device_under_test::Arg;
use crate::kernel_test;
use crate::random_values::{random, random_bf16};

/// (rows, row length, rows of the table): rows of whole 16 bytes, with a tail, and of an odd length.
const SIZES: [(usize, usize, usize); 6] = [
    (1, 1, 1),
    (42, 64, 100),
    (5, 2056, 7),
    (3, 2050, 9),
    (42, 37, 50),
    (2, 4096, 3),
];

/// Neighbours differ, and so do rows; any 16 bits are a bf16 that has to arrive unchanged.
fn matrix(rows: usize, d: usize) -> Vec<u16> {
    (0..rows * d).map(|i| (i * 40_503) as u16).collect()
}

kernel_test!(each_token_gathers_its_row, |device| {
    for (rows, d, vocab) in SIZES {
        let table = matrix(vocab, d);
        // Some tokens come twice.
        let ids: Vec<u32> = (0..rows).map(|i| (i * i % vocab) as u32).collect();
        let table_on_device = device.upload(&table);
        let ids_on_device = device.upload(&ids);
        let out = device.poisoned::<u16>(rows * d);
        device.launch(
            "embedding_gather_bf16",
            [rows as u32, 1, 1],
            0,
            &[
                Arg::Buffer(&table_on_device),
                Arg::Buffer(&ids_on_device),
                Arg::U32(rows as u32),
                Arg::U32(d as u32),
                Arg::Buffer(&out),
            ],
        );
        let expected: Vec<u16> = ids
            .iter()
            .flat_map(|&id| &table[id as usize * d..][..d])
            .copied()
            .collect();
        assert!(
            device.download::<u16>(&out) == expected,
            "{rows} rows of {d}"
        );
    }
});

kernel_test!(scattered_rows_leave_the_others_alone, |device| {
    for (rows, d, vocab) in SIZES {
        let values = matrix(rows, d);
        let ids: Vec<u32> = (0..rows).map(|i| (vocab - 1 - i) as u32).collect();
        let before = vec![0x3f80; vocab * d];
        let values_on_device = device.upload(&values);
        let ids_on_device = device.upload(&ids);
        let out = device.upload(&before);
        device.launch(
            "embedding_scatter_bf16",
            [rows as u32, 1, 1],
            0,
            &[
                Arg::Buffer(&values_on_device),
                Arg::Buffer(&ids_on_device),
                Arg::U32(rows as u32),
                Arg::U32(d as u32),
                Arg::Buffer(&out),
            ],
        );
        let mut expected = before;
        for (value, &id) in values.chunks(d).zip(&ids) {
            expected[id as usize * d..][..d].copy_from_slice(value);
        }
        assert!(
            device.download::<u16>(&out) == expected,
            "{rows} rows of {d}"
        );
    }
});

/// Tokens, rows, row length, words: a token with several rows, one without, more columns than threads.
const GRADIENTS: [(&[u32], usize, usize); 4] = [
    (&[0], 1, 1),
    (&[3, 16, 0, 3, 16, 3], 300, 17),
    (&[7, 7, 7, 7, 7, 7, 7, 7, 7], 37, 8),
    (&[4, 3, 2, 1, 0], 256, 5),
];

kernel_test!(each_token_adds_up_the_gradients_of_its_rows, |device| {
    for (ids, d, words) in GRADIENTS {
        let dy = random_bf16(1, ids.len() * d);
        let before = random(2, words * d);
        let mut rows: Vec<u32> = (0..ids.len() as u32).collect();
        rows.sort_by_key(|row| ids[*row as usize]);
        let mut tokens: Vec<u32> = rows.iter().map(|row| ids[*row as usize]).collect();
        tokens.dedup();
        let below = |token: &u32| ids.iter().filter(|id| *id < token).count() as u32;
        let mut starts: Vec<u32> = tokens.iter().map(below).collect();
        starts.push(ids.len() as u32);
        let uploads = [&tokens, &starts, &rows].map(|list| device.upload(list));
        let (dy_on_device, sums) = (device.upload(&dy), device.upload(&before));
        device.launch(
            "embedding_backward_bf16",
            [tokens.len() as u32, 1, 1],
            0,
            &[
                Arg::Buffer(&dy_on_device),
                Arg::Buffer(&uploads[0]),
                Arg::Buffer(&uploads[1]),
                Arg::Buffer(&uploads[2]),
                Arg::U32(tokens.len() as u32),
                Arg::U32(d as u32),
                Arg::Buffer(&sums),
            ],
        );
        let mut expected = before;
        for (dy, &id) in dy.chunks(d).zip(ids) {
            for (sum, dy) in expected[id as usize * d..][..d].iter_mut().zip(dy) {
                *sum += dy.to_f32();
            }
        }
        // The order of the sum is part of the promise.
        assert!(device.download::<f32>(&sums) == expected, "{ids:?} of {d}");
    }
});
