//! Every rule that a kernel can break is told, with the place, and the next launch works.

use crate::launches::{Arguments, ORDERS, launch_of, run, run_watched};
use qlora_emulator::{Fault, FaultKind, Launch, Order, kernels};

/// The fault of a kernel that takes one buffer of 64 numbers.
fn fault_of(kernel: &str, order: Order) -> Fault {
    let mut out = [0u32; 64];
    let arguments = Arguments::new().buffer(&mut out);
    run(&launch_of(kernel, 1, order), &arguments).expect_err(kernel)
}

#[test]
fn broken_rules_are_told_in_every_order() {
    let cases = [
        ("half_a_block_waits", FaultKind::Deadlock),
        ("two_barriers_for_one", FaultKind::DivergentBarrier),
        ("mask_without_the_caller", FaultKind::LaneMismatch),
        ("masks_that_differ", FaultKind::LaneMismatch),
        ("operations_that_differ", FaultKind::LaneMismatch),
        ("lane_that_has_exited", FaultKind::LaneMismatch),
        ("shuffle_from_outside_the_mask", FaultKind::LaneMismatch),
        ("misaligned_matrix_row", FaultKind::Misaligned),
        ("too_much_static_memory", FaultKind::SharedTooLarge),
    ];
    for (kernel, kind) in cases {
        for order in ORDERS {
            let fault = fault_of(kernel, order);
            assert_eq!(fault.kind, kind, "{order:?}: {fault}");
        }
    }
}

#[test]
fn a_deadlock_says_who_waits_where() {
    let fault = fault_of("half_a_block_waits", Order::Forward);
    assert_eq!(
        (fault.threads.at_barrier, fault.threads.in_warp_operation),
        (33, 31),
        "{fault}"
    );
    assert!(
        fault
            .message
            .contains("thread 0 waits in __syncthreads() at faults.cu:"),
        "{fault}"
    );
    assert!(
        fault
            .message
            .contains("thread 32 waits in __shfl_sync at faults.cu:"),
        "{fault}"
    );
}

#[test]
fn a_barrier_does_not_wait_for_threads_that_have_exited() {
    for order in ORDERS {
        let mut out = [0u32; 64];
        let arguments = Arguments::new().buffer(&mut out);
        run(
            &launch_of("exited_threads_are_not_waited_for", 1, order),
            &arguments,
        )
        .unwrap();
        assert_eq!(out.iter().sum::<u32>(), 43);
    }
}

#[test]
fn a_copy_from_an_odd_address_is_told() {
    let mut input = [0u64; 64];
    let arguments = Arguments::new().buffer(&mut input);
    let fault = run(&launch_of("misaligned_copy", 1, Order::Forward), &arguments).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Misaligned, "{fault}");
}

#[test]
fn a_vector_at_an_odd_address_is_told_when_watched() {
    let mut input = [0u64; 64];
    let mut out = [0f32; 32];
    let arguments = Arguments::new().buffer(&mut input).buffer(&mut out);
    let fault = run_watched(
        &launch_of("misaligned_vector", 1, Order::Forward),
        &arguments,
    )
    .unwrap_err();
    assert_eq!(fault.kind, FaultKind::Misaligned, "{fault}");
}

#[test]
fn undefined_behaviour_is_told_when_watched() {
    for (kernel, operand) in [
        ("shift_too_far", 32),
        ("signed_overflow", 0x8000),
        ("index_beyond_its_array", 4),
    ] {
        let mut out = [0u32; 32];
        let launch = launch_of(kernel, 1, Order::Forward);
        run_watched(
            &launch,
            &Arguments::new().buffer(&mut out).number(operand - 1),
        )
        .unwrap();
        let arguments = Arguments::new().buffer(&mut out).number(operand);
        let fault = run_watched(&launch, &arguments).unwrap_err();
        assert_eq!(fault.kind, FaultKind::Undefined, "{fault}");
        assert!(fault.message.contains("faults.cu:"), "{fault}");
    }
}

#[test]
fn a_write_behind_a_shared_array_is_told() {
    for order in ORDERS {
        let launch = launch_of("write_behind_a_shared_array", 1, order);
        run(&launch, &Arguments::new().number(31)).unwrap();
        for last in [32, 50] {
            let fault = run(&launch, &Arguments::new().number(last)).unwrap_err();
            assert_eq!(fault.kind, FaultKind::SharedOverrun, "{fault}");
            assert!(fault.message.contains("before"), "{fault}");
        }
    }
}

#[test]
fn a_write_behind_the_dynamic_memory_is_told() {
    let launch = Launch {
        shared_bytes: 400,
        ..launch_of("write_behind_the_dynamic_memory", 1, Order::Forward)
    };
    run(&launch, &Arguments::new().number(99)).unwrap();
    let fault = run(&launch, &Arguments::new().number(100)).unwrap_err();
    assert_eq!(fault.kind, FaultKind::SharedOverrun, "{fault}");
}

#[test]
fn more_dynamic_memory_than_a_gpu_has_is_told() {
    let launch = Launch {
        shared_bytes: 100 << 10,
        ..launch_of("write_behind_the_dynamic_memory", 1, Order::Forward)
    };
    let fault = run(&launch, &Arguments::new().number(0)).unwrap_err();
    assert_eq!(fault.kind, FaultKind::SharedTooLarge, "{fault}");
}

/// AddressSanitizer ends the process at these, with a report of its own.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[test]
fn traps_end_the_launch_and_not_the_process() {
    if option_env!("QLORA_EMULATOR_SANITIZE").is_some() {
        return;
    }
    let mut out = [0u32; 32];
    let mut limit = [u32::MAX];
    for _ in 0..2 {
        let wild = Arguments::new().buffer(&mut out).number(1 << 40);
        let fault = run(&launch_of("wild_address", 1, Order::Forward), &wild).unwrap_err();
        assert_eq!(
            (fault.kind, fault.thread),
            (FaultKind::InvalidAccess, 5),
            "{fault}"
        );

        let division = Arguments::new().buffer(&mut out).number(0);
        let fault = run(&launch_of("division_by_zero", 1, Order::Forward), &division).unwrap_err();
        assert!(fault.message.contains("division by zero"), "{fault}");

        let recursion = Arguments::new().buffer(&mut limit).buffer(&mut out);
        let fault = run(
            &launch_of("stack_that_runs_over", 1, Order::Forward),
            &recursion,
        )
        .unwrap_err();
        assert_eq!(fault.kind, FaultKind::InvalidAccess, "{fault}");
    }
}

#[test]
fn a_launch_must_name_a_kernel_and_give_its_arguments() {
    let fault = run(
        &launch_of("no_such_kernel", 1, Order::Forward),
        &Arguments::new(),
    )
    .unwrap_err();
    assert_eq!(fault.kind, FaultKind::UnknownKernel, "{fault}");
    let fault = run(
        &launch_of("thread_numbers", 1, Order::Forward),
        &Arguments::new(),
    )
    .unwrap_err();
    assert_eq!(fault.kind, FaultKind::ArgumentCount, "{fault}");
    assert_eq!(
        fault.to_string(),
        "thread_numbers, block (0, 0, 0), thread 0: takes 1 arguments, got 0 \
        (ArgumentCount; 0 ready, 0 in a warp operation, 0 at a barrier, 0 exited)"
    );
}

#[test]
fn a_grid_must_be_one_that_a_gpu_takes() {
    let mut out = [0u32; 64];
    let arguments = Arguments::new().buffer(&mut out);
    for grid in [[0, 1, 1], [1, 0, 1], [1, 1 << 16, 1], [1 << 31, 1, 1]] {
        let launch = Launch {
            grid,
            ..launch_of("thread_numbers", 1, Order::Forward)
        };
        assert_eq!(
            run(&launch, &arguments).unwrap_err().kind,
            FaultKind::Grid,
            "{grid:?}"
        );
    }
}

#[test]
fn after_a_fault_the_next_launch_works() {
    for order in ORDERS {
        fault_of("half_a_block_waits", order);
        let mut out = [0u32; 192];
        let arguments = Arguments::new().buffer(&mut out);
        run(&launch_of("thread_numbers", 3, order), &arguments).unwrap();
        let expected: Vec<u32> = (0..192).map(|i| 1000 * (i / 64) + i % 64).collect();
        assert_eq!(out.to_vec(), expected);
    }
}

#[test]
fn launches_on_several_threads_do_not_meet() {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(after_a_fault_the_next_launch_works);
        }
    });
}

#[test]
fn the_table_lists_the_kernels_of_the_repository_only() {
    assert!(
        kernels().any(|kernel| kernel.name == "residual_forward_bf16" && kernel.threads == 256)
    );
    assert!(kernels().all(|kernel| kernel.name != "thread_numbers"));
}
