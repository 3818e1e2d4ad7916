//! A watched launch finds races, reads of unwritten shared memory and accesses outside of the buffers, whatever the order.

use crate::launches::{Arguments, ORDERS, assert_is_disorder, launch_of, run, run_watched};
use qlora_emulator::{Fault, FaultKind, Launch, Order, Synchronization};

fn watched(
    kernel: &str,
    blocks: u32,
    order: Order,
    numbers: &[u64],
) -> Result<Vec<Synchronization>, Fault> {
    let mut out = [0u32; 64];
    let arguments = numbers
        .iter()
        .fold(Arguments::new().buffer(&mut out), |all, &number| {
            all.number(number)
        });
    run_watched(&launch_of(kernel, blocks, order), &arguments)
}

#[test]
fn threads_that_meet_without_a_barrier_race() {
    for order in ORDERS {
        for kernel in [
            "neighbours_across_warps",
            "neighbours_in_a_warp",
            "write_after_read",
        ] {
            watched(kernel, 1, order, &[1]).unwrap();
            let fault = watched(kernel, 1, order, &[0]).expect_err(kernel);
            assert_is_disorder(&fault);
        }
    }
}

#[test]
fn what_does_not_order_memory_does_not_pass_for_a_barrier() {
    for order in ORDERS {
        for kernel in ["warp_barrier_between_warps", "shuffle_instead_of_a_barrier"] {
            let fault = watched(kernel, 1, order, &[]).expect_err(kernel);
            assert_is_disorder(&fault);
        }
    }
}

#[test]
fn blocks_may_meet_only_atomically() {
    for order in ORDERS {
        for kernel in [
            "blocks_that_write_one_word",
            "blocks_that_read_their_neighbour",
        ] {
            watched(kernel, 1, order, &[]).unwrap();
            let fault = watched(kernel, 2, order, &[]).expect_err(kernel);
            assert_eq!(fault.kind, FaultKind::Race, "{fault}");
            assert!(fault.message.contains("another block"), "{fault}");
        }
        watched("blocks_that_count_atomically", 3, order, &[]).unwrap();
    }
}

#[test]
fn unwritten_shared_memory_is_told() {
    let fault = watched("read_of_unwritten_shared_memory", 1, Order::Forward, &[]).unwrap_err();
    assert_eq!(
        (fault.kind, fault.thread),
        (FaultKind::Uninitialized, 31),
        "{fault}"
    );
    assert!(fault.message.contains("tile + 128"), "{fault}");
}

#[test]
fn reads_behind_a_buffer_are_told() {
    let mut input = [0u32; 33];
    let mut out = [0u32; 32];
    let launch = launch_of("read_behind_a_buffer", 1, Order::Forward);
    run_watched(
        &launch,
        &Arguments::new().buffer(&mut input).buffer(&mut out),
    )
    .unwrap();
    let fault = run_watched(
        &launch,
        &Arguments::new().buffer(&mut input[..32]).buffer(&mut out),
    )
    .unwrap_err();
    assert_eq!(
        (fault.kind, fault.thread),
        (FaultKind::InvalidAccess, 31),
        "{fault}"
    );
    assert!(
        fault
            .message
            .contains("reads 4 bytes at offset 128 of buffer number 0"),
        "{fault}"
    );
}

#[test]
fn sums_and_maxima_over_a_block_can_follow_one_another() {
    for order in ORDERS {
        for (kernel, expected) in [
            ("repeated_block_sums", 2080.0 * 2080.0),
            ("repeated_block_maxima", 63.0),
        ] {
            let mut input: Vec<f32> = (1..=64).map(|i| i as f32).collect();
            let mut out = [0f32; 64];
            let arguments = Arguments::new().buffer(&mut input).buffer(&mut out);
            let launch = launch_of(kernel, 1, order);
            let barriers = run_watched(&launch, &arguments).unwrap();
            assert_eq!(out, [expected; 64]);

            assert_eq!(barriers.len(), 2, "{barriers:?}");
            for barrier in &barriers {
                let launch = Launch {
                    without: Some(barrier),
                    ..launch.clone()
                };
                assert_is_disorder(&run_watched(&launch, &arguments).unwrap_err());
            }
        }
    }
}

#[test]
fn a_missing_barrier_is_seen_in_the_result_too() {
    let wrong = ORDERS.iter().filter(|&&order| {
        let mut out = [0u32; 64];
        run(
            &launch_of("neighbours_across_warps", 1, order),
            &Arguments::new().buffer(&mut out).number(0),
        )
        .unwrap();
        out.iter()
            .enumerate()
            .any(|(i, &value)| value != i as u32 ^ 32)
    });
    assert_eq!(wrong.count(), ORDERS.len());
}
