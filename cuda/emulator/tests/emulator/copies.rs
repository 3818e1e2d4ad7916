//! Asynchronous copies land at their wait at the latest, group by group, and are nobody's before.

use crate::launches::{Arguments, ORDERS, assert_is_disorder, launch_of, run, run_watched};
use qlora_emulator::{FaultKind, Order};

/// 16 bytes, aligned as a copy needs it.
#[repr(align(16))]
#[derive(Clone, Copy, Debug, PartialEq, Default)]
struct Chunk([u32; 4]);

fn chunks(count: u32) -> Vec<Chunk> {
    (0..count)
        .map(|i| Chunk([100 + i, 200 + i, 300 + i, 400 + i]))
        .collect()
}

#[test]
fn a_copy_is_there_after_its_wait() {
    for order in ORDERS {
        let (mut input, mut out) = (chunks(32), vec![Chunk::default(); 32]);
        let arguments = Arguments::new()
            .buffer(&mut input)
            .buffer(&mut out)
            .number(1);
        run(&launch_of("copy_and_wait", 1, order), &arguments).unwrap();
        assert_eq!(out, input);
    }
}

#[test]
fn without_a_wait_the_order_decides_what_is_read() {
    let landed = |order| {
        let (mut input, mut out) = (chunks(32), vec![Chunk::default(); 32]);
        let arguments = Arguments::new()
            .buffer(&mut input)
            .buffer(&mut out)
            .number(0);
        run(&launch_of("copy_and_wait", 1, order), &arguments).unwrap();
        let stale = out
            .iter()
            .filter(|&&chunk| chunk == Chunk([1, 2, 3, 4]))
            .count();
        assert_eq!(
            stale
                + out
                    .iter()
                    .zip(&input)
                    .filter(|(got, sent)| got == sent)
                    .count(),
            32
        );
        32 - stale
    };
    assert_eq!(landed(Order::Forward), 0);
    assert_eq!(landed(Order::Reverse), 32);
    assert!((1..32).contains(&landed(Order::Random(1))));
}

#[test]
fn a_copy_under_way_is_nobodys() {
    for order in ORDERS {
        let (mut input, mut out) = (chunks(32), vec![Chunk::default(); 32]);
        let arguments = Arguments::new().buffer(&mut input).buffer(&mut out);
        let launch = launch_of("copy_without_commit", 1, order);
        let fault = run_watched(&launch, &arguments).unwrap_err();
        assert_eq!(fault.kind, FaultKind::Race, "{fault}");
        assert!(fault.message.contains("a copy is under way"), "{fault}");
    }
}

#[test]
fn an_invalid_copy_writes_zeros_and_reads_nothing() {
    for order in ORDERS {
        let mut out = vec![Chunk([7; 4]); 32];
        run(
            &launch_of("copy_of_nothing", 1, order),
            &Arguments::new().buffer(&mut out),
        )
        .unwrap();
        assert_eq!(out, vec![Chunk::default(); 32]);
    }
}

#[test]
fn a_wait_may_leave_the_newest_group() {
    for order in ORDERS {
        let (mut input, mut out) = (chunks(64), vec![Chunk::default(); 64]);
        let arguments = Arguments::new().buffer(&mut input).buffer(&mut out);
        run_watched(&launch_of("older_of_two_groups", 1, order), &arguments).unwrap();
        assert_eq!(out, input);
    }
}

#[test]
fn a_thread_that_ends_before_its_copy_is_told() {
    let run_with = |wait| {
        let mut input = chunks(32);
        let arguments = Arguments::new().buffer(&mut input).number(wait);
        run_watched(
            &launch_of("copy_after_the_end", 1, Order::Forward),
            &arguments,
        )
    };
    run_with(1).unwrap();
    assert_eq!(run_with(0).unwrap_err().kind, FaultKind::UnderWay);
}

#[test]
fn another_lane_sees_a_copy_after_a_barrier_only() {
    for order in ORDERS {
        let (mut input, mut out) = (chunks(32), vec![Chunk::default(); 32]);
        let mut run_with = |synchronize| {
            let arguments = Arguments::new()
                .buffer(&mut input)
                .buffer(&mut out)
                .number(synchronize);
            run_watched(&launch_of("copy_for_the_neighbour", 1, order), &arguments)
        };
        run_with(1).unwrap();
        assert_is_disorder(&run_with(0).unwrap_err());
    }
}
