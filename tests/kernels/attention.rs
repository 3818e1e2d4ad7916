//! The kernels of `cuda/attention.cu` on packed sequences: forward, the gradients of q, k and v, and queries on a cache.

use std::ops::RangeInclusive;

use half::bf16;

use crate::device_under_test::{Arg, Buffer, DeviceUnderTest, assert_kernel_close};
use crate::kernel_test;

/// The rows of a tile and the bytes of dynamic shared memory, as the header of `cuda/attention.cu` has them.
#[derive(Clone, Copy)]
struct TileSize {
    rows: usize,
    shared_bytes: usize,
}

/// The kernels for heads of up to `columns` columns.
struct Kernels {
    columns: usize,
    /// The end of their names.
    suffix: &'static str,
    forward: TileSize,
    backward_q: TileSize,
    backward_kv: TileSize,
}

const fn kernels(
    columns: usize,
    forward: (usize, usize),
    backward_q: (usize, usize),
    backward_kv: (usize, usize),
) -> Kernels {
    const fn size((rows, shared_bytes): (usize, usize)) -> TileSize {
        TileSize { rows, shared_bytes }
    }
    Kernels {
        columns,
        suffix: "",
        forward: size(forward),
        backward_q: size(backward_q),
        backward_kv: size(backward_kv),
    }
}

const KERNELS: [Kernels; 5] = [
    kernels(64, (128, 49_152), (128, 65_536), (64, 58_368)),
    kernels(80, (128, 40_960), (128, 61_440), (64, 70_656)),
    kernels(96, (128, 49_152), (128, 73_728), (64, 82_944)),
    kernels(128, (128, 65_536), (128, 98_304), (64, 70_144)),
    kernels(256, (64, 98_304), (64, 98_304), (32, 100_864)),
];

/// Those of `cuda/attention_hopper.cu`, for heads of 128 columns and no others.
const HOPPER: Kernels = Kernels {
    suffix: "_hopper",
    ..kernels(128, (128, 164_864), (128, 148_480), (128, 166_400))
};

#[derive(Clone, Copy)]
struct Case {
    /// With the products of warpgroups.
    on_hopper: bool,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    /// The queries and the keys of each sequence; the last query is at the position of the last key.
    segments: &'static [(usize, usize)],
    /// How many positions a query sees, its own included; 0 = all before it.
    window: usize,
    /// 0 = none.
    soft_cap: f32,
}

const CASE: Case = Case {
    on_hopper: false,
    num_heads: 2,
    num_kv_heads: 1,
    head_dim: 64,
    segments: &[(42, 42)],
    window: 0,
    soft_cap: 0.0,
};

impl Case {
    fn kernels(&self) -> &'static Kernels {
        if self.on_hopper {
            return &HOPPER;
        }
        KERNELS
            .iter()
            .find(|kernels| self.head_dim <= kernels.columns)
            .expect("there are kernels for every head of a test")
    }

    fn queries(&self) -> usize {
        self.segments.iter().map(|&(queries, _)| queries).sum()
    }

    fn keys(&self) -> usize {
        self.segments.iter().map(|&(_, keys)| keys).sum()
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// The keys of a segment that the query at `position` of it sees.
    fn visible(&self, position: usize) -> RangeInclusive<usize> {
        let first = match self.window {
            0 => 0,
            window => (position + 1).saturating_sub(window),
        };
        first..=position
    }

    /// The first query row and the first key row of each segment, with its queries and keys.
    fn placed_segments(&self) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        let starts = self.segments.iter().scan((0, 0), |next, segment| {
            let start = *next;
            *next = (start.0 + segment.0, start.1 + segment.1);
            Some(start)
        });
        starts
            .zip(self.segments)
            .map(|((query, key), &(queries, keys))| (query, queries, key, keys))
    }

    /// `AttentionTile`s of up to `rows` queries, each with all keys of its segment.
    fn query_tiles(&self, rows: usize) -> Vec<[u32; 5]> {
        self.placed_segments()
            .flat_map(|(query, queries, key, keys)| {
                (0..queries).step_by(rows).map(move |start| {
                    let height = rows.min(queries - start);
                    let position = keys - queries + start;
                    [query + start, height, key, keys, position].map(|n| n as u32)
                })
            })
            .collect()
    }

    /// `AttentionTile`s of up to `rows` keys, each with all queries of its segment.
    fn key_tiles(&self, rows: usize) -> Vec<[u32; 5]> {
        self.placed_segments()
            .flat_map(|(query, queries, key, keys)| {
                (0..keys).step_by(rows).map(move |start| {
                    let height = rows.min(keys - start);
                    [query, queries, key + start, height, start].map(|n| n as u32)
                })
            })
            .collect()
    }

    fn describe(&self, what: &str) -> String {
        let Case {
            on_hopper,
            num_heads,
            num_kv_heads,
            head_dim,
            segments,
            window,
            soft_cap,
        } = self;
        format!(
            "{what} (on Hopper: {on_hopper}, heads {num_heads}/{num_kv_heads} of {head_dim}, segments {segments:?}, window {window}, cap {soft_cap})"
        )
    }
}

/// `q`, `d_out`: `[N, H * E]`; `k`, `v`: `[M, K * E]`.
struct Inputs {
    q: Vec<bf16>,
    k: Vec<bf16>,
    v: Vec<bf16>,
    d_out: Vec<bf16>,
}

impl Inputs {
    fn of(case: &Case) -> Self {
        let mut state = case.head_dim as u64;
        let mut matrix = |rows: usize, heads: usize| {
            (0..rows * heads * case.head_dim)
                .map(|_| bf16::from_f64(nearly_normal(&mut state)))
                .collect()
        };
        Self {
            q: matrix(case.queries(), case.num_heads),
            k: matrix(case.keys(), case.num_kv_heads),
            v: matrix(case.keys(), case.num_kv_heads),
            d_out: matrix(case.queries(), case.num_heads),
        }
    }
}

/// The sum of four uniform numbers, with variance 1.
fn nearly_normal(state: &mut u64) -> f64 {
    let mut uniform = || {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as f64 / 2f64.powi(64)
    };
    (uniform() + uniform() + uniform() + uniform() - 2.0) * 3f64.sqrt()
}

/// What numbers are rounded to on the way.
trait Precision {
    /// The result of any arithmetic.
    fn number(x: f64) -> f64;
    /// A factor of a matrix product, and what is stored.
    fn operand(x: f64) -> f64;
}

struct Exact;

impl Precision for Exact {
    fn number(x: f64) -> f64 {
        x
    }

    fn operand(x: f64) -> f64 {
        x
    }
}

/// bf16 products with sums in f32.
struct Low;

impl Precision for Low {
    fn number(x: f64) -> f64 {
        f64::from(x as f32)
    }

    fn operand(x: f64) -> f64 {
        f64::from(bf16::from_f32(x as f32))
    }
}

fn dot<P: Precision>(a: &[f64], b: &[f64]) -> f64 {
    a.iter()
        .zip(b)
        .fold(0.0, |sum, (a, b)| P::number(sum + a * b))
}

/// `y += factor * x`
fn add_scaled<P: Precision>(y: &mut [f64], factor: f64, x: &[f64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = P::number(*y + factor * x);
    }
}

/// Everything that the kernels compute.
struct Outcome {
    out: Vec<f64>,
    lse: Vec<f64>,
    delta: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

impl Outcome {
    /// From the definition, query by query.
    fn compute<P: Precision>(case: &Case, inputs: &Inputs) -> Self {
        let wide = |values: &[bf16]| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let (q, k, v) = (wide(&inputs.q), wide(&inputs.k), wide(&inputs.v));
        let d_out = wide(&inputs.d_out);
        let mut outcome = Self {
            out: vec![0.0; q.len()],
            lse: vec![0.0; case.queries() * case.num_heads],
            delta: vec![0.0; case.queries() * case.num_heads],
            dq: vec![0.0; q.len()],
            dk: vec![0.0; k.len()],
            dv: vec![0.0; v.len()],
        };
        for (query_row, queries, key_row, keys) in case.placed_segments() {
            for (query, head) in
                (0..queries).flat_map(|query| (0..case.num_heads).map(move |head| (query, head)))
            {
                let e = case.head_dim;
                let index = (query_row + query) * case.num_heads + head;
                let of_query = index * e..(index + 1) * e;
                let kv_head = head * case.num_kv_heads / case.num_heads;
                let of_key = |key: usize| {
                    let index = (key_row + key) * case.num_kv_heads + kv_head;
                    index * e..(index + 1) * e
                };
                let (q, d_out) = (&q[of_query.clone()], &d_out[of_query.clone()]);
                let visible = case.visible(keys - queries + query);

                let (scores, slopes): (Vec<f64>, Vec<f64>) = visible
                    .clone()
                    .map(|key| {
                        let score = dot::<P>(q, &k[of_key(key)]) * f64::from(case.scale());
                        capped::<P>(P::number(score), f64::from(case.soft_cap))
                    })
                    .unzip();
                let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total = scores.iter().fold(0.0, |sum, score| {
                    P::number(sum + P::number((score - highest).exp()))
                });
                let lse = P::number(highest + P::number(total.ln()));
                let weights: Vec<f64> = scores
                    .iter()
                    .map(|score| P::number(P::number(score - lse).exp()))
                    .collect();

                let out = &mut outcome.out[of_query.clone()];
                for (key, &weight) in visible.clone().zip(&weights) {
                    add_scaled::<P>(out, P::operand(weight), &v[of_key(key)]);
                }
                out.iter_mut().for_each(|x| *x = P::operand(*x));
                let delta = dot::<P>(d_out, out);

                let dq = &mut outcome.dq[of_query];
                for ((key, &weight), slope) in visible.zip(&weights).zip(slopes) {
                    let d_weight = dot::<P>(d_out, &v[of_key(key)]);
                    let d_score = P::operand(weight * (d_weight - delta) * slope);
                    add_scaled::<P>(dq, d_score, &k[of_key(key)]);
                    add_scaled::<P>(&mut outcome.dk[of_key(key)], d_score, q);
                    add_scaled::<P>(&mut outcome.dv[of_key(key)], P::operand(weight), d_out);
                }
                outcome.lse[index] = lse;
                outcome.delta[index] = delta;
            }
        }
        let scale = f64::from(case.scale());
        for d_score_product in [&mut outcome.dq, &mut outcome.dk] {
            d_score_product
                .iter_mut()
                .for_each(|x| *x = P::operand(*x * scale));
        }
        outcome.dv.iter_mut().for_each(|x| *x = P::operand(*x));
        outcome
    }
}

/// The score under the cap, and the slope of the cap there.
fn capped<P: Precision>(score: f64, cap: f64) -> (f64, f64) {
    if cap == 0.0 {
        return (score, 1.0);
    }
    let tanh = P::number((score / cap).tanh());
    (P::number(cap * tanh), P::number(1.0 - tanh * tanh))
}

/// The tensors of a case where the kernels find them; results are poisoned.
struct OnDevice<'a> {
    device: &'a DeviceUnderTest,
    case: &'a Case,
    inputs: [Buffer; 4],
    out: Buffer,
    lse: Buffer,
    delta: Buffer,
    dq: Buffer,
    dk: Buffer,
    dv: Buffer,
}

impl<'a> OnDevice<'a> {
    fn new(device: &'a DeviceUnderTest, case: &'a Case, inputs: &Inputs) -> Self {
        let Inputs { q, k, v, d_out } = inputs;
        let rows = case.queries() * case.num_heads;
        Self {
            device,
            case,
            inputs: [q, k, v, d_out].map(|values| device.upload(values)),
            out: device.poisoned::<bf16>(q.len()),
            lse: device.poisoned::<f32>(rows),
            delta: device.poisoned::<f32>(rows),
            dq: device.poisoned::<bf16>(q.len()),
            dk: device.poisoned::<bf16>(k.len()),
            dv: device.poisoned::<bf16>(v.len()),
        }
    }

    /// Launches one of the kernels that exist for each head dim.
    fn launch(
        &self,
        kernel: &str,
        size: TileSize,
        heads: usize,
        tiles: &[[u32; 5]],
        reads: &[&Buffer],
        writes: &[&Buffer],
    ) {
        let case = self.case;
        let tiles_on_device = self.device.upload(tiles.as_flattened());
        let mut args: Vec<Arg> = reads.iter().copied().map(Arg::Buffer).collect();
        args.extend([
            Arg::Buffer(&tiles_on_device),
            Arg::U32(case.num_heads as u32),
            Arg::U32(case.num_kv_heads as u32),
            Arg::U32(case.head_dim as u32),
            Arg::F32(case.scale()),
            Arg::U32(case.window as u32),
        ]);
        if !case.on_hopper {
            args.push(Arg::F32(case.soft_cap));
        }
        args.extend(writes.iter().copied().map(Arg::Buffer));
        self.device.launch(
            &format!(
                "attention_{kernel}_bf16_{}{}",
                case.kernels().columns,
                case.kernels().suffix
            ),
            [tiles.len() as u32, heads as u32, 1],
            size.shared_bytes,
            &args,
        );
    }

    fn forward(&self) {
        let [q, k, v, _] = &self.inputs;
        let (case, size) = (self.case, self.case.kernels().forward);
        let tiles = case.query_tiles(size.rows);
        let results = [&self.out, &self.lse];
        self.launch(
            "forward",
            size,
            case.num_heads,
            &tiles,
            &[q, k, v],
            &results,
        );
    }

    fn backward(&self) {
        let [q, k, v, d_out] = &self.inputs;
        let case = self.case;
        let rows = case.queries() * case.num_heads;
        self.device.launch(
            "attention_backward_delta_bf16",
            [rows.div_ceil(8) as u32, 1, 1],
            0,
            &[
                Arg::Buffer(d_out),
                Arg::Buffer(&self.out),
                Arg::U32(case.queries() as u32),
                Arg::U32(case.num_heads as u32),
                Arg::U32(case.head_dim as u32),
                Arg::Buffer(&self.delta),
            ],
        );
        let reads = [q, k, v, d_out, &self.lse, &self.delta];
        let size = case.kernels().backward_q;
        let tiles = case.query_tiles(size.rows);
        self.launch(
            "backward_q",
            size,
            case.num_heads,
            &tiles,
            &reads,
            &[&self.dq],
        );
        let size = case.kernels().backward_kv;
        let tiles = case.key_tiles(size.rows);
        let results = [&self.dk, &self.dv];
        self.launch(
            "backward_kv",
            size,
            case.num_kv_heads,
            &tiles,
            &reads,
            &results,
        );
    }

    fn assert_close<T>(&self, name: &str, got: &Buffer, exact: &[f64], low_precision: &[f64])
    where
        T: bytemuck::Pod + Into<f64>,
    {
        let got = self.device.download::<T>(got);
        assert_kernel_close(&self.case.describe(name), &got, exact, low_precision);
    }
}

/// Forward alone if any segment has keys without queries, else also backward.
fn check(device: &DeviceUnderTest, case: &Case) {
    let inputs = Inputs::of(case);
    let exact = Outcome::compute::<Exact>(case, &inputs);
    let low = Outcome::compute::<Low>(case, &inputs);
    let on_device = OnDevice::new(device, case, &inputs);
    on_device.forward();
    on_device.assert_close::<bf16>("out", &on_device.out, &exact.out, &low.out);
    on_device.assert_close::<f32>("lse", &on_device.lse, &exact.lse, &low.lse);
    if case.segments.iter().any(|(queries, keys)| queries != keys) {
        return;
    }
    on_device.backward();
    on_device.assert_close::<f32>("delta", &on_device.delta, &exact.delta, &low.delta);
    on_device.assert_close::<bf16>("dq", &on_device.dq, &exact.dq, &low.dq);
    on_device.assert_close::<bf16>("dk", &on_device.dk, &exact.dk, &low.dk);
    on_device.assert_close::<bf16>("dv", &on_device.dv, &exact.dv, &low.dv);
}

kernel_test!(heads_of_every_size_of_tile, |device| {
    for head_dim in [64, 80, 96, 128, 256] {
        check(device, &Case { head_dim, ..CASE });
    }
});

kernel_test!(heads_narrower_than_a_tile, |device| {
    // Rows of whole chunks of 16 bytes, and others.
    for head_dim in [8, 72, 6, 42, 101] {
        check(device, &Case { head_dim, ..CASE });
    }
});

kernel_test!(packed_sequences_do_not_see_each_other, |device| {
    let segments = &[(1, 1), (130, 130), (42, 42)];
    let (num_heads, num_kv_heads) = (6, 2);
    check(
        device,
        &Case {
            num_heads,
            num_kv_heads,
            segments,
            ..CASE
        },
    );
});

kernel_test!(a_long_sequence_takes_several_tiles, |device| {
    let segments = &[(300, 300)];
    for head_dim in [64, 128] {
        check(
            device,
            &Case {
                head_dim,
                segments,
                ..CASE
            },
        );
    }
});

kernel_test!(a_window_hides_the_distant_past, |device| {
    // Under 95 there are tiles of which only the last query does not see the first key.
    let (num_heads, num_kv_heads) = (2, 2);
    for (window, segments) in [(95, &[(300, 300)]), (12, &[(130, 130)]), (2, &[(42, 42)])] {
        check(
            device,
            &Case {
                num_heads,
                num_kv_heads,
                window,
                segments,
                ..CASE
            },
        );
    }
});

kernel_test!(scores_under_a_soft_cap, |device| {
    let segments = &[(70, 70), (7, 7)];
    for (head_dim, window) in [(64, 0), (80, 12), (256, 12)] {
        check(
            device,
            &Case {
                head_dim,
                window,
                segments,
                soft_cap: 2.0,
                ..CASE
            },
        );
    }
});

kernel_test!(queries_on_a_cache_see_all_keys_before_them, |device| {
    // In the longer ones the last key of a tile of keys is just beyond what the first query sees.
    let segments = &[(3, 30), (1, 200), (130, 192), (66, 192)];
    for (head_dim, window) in [(64, 0), (128, 100)] {
        check(
            device,
            &Case {
                head_dim,
                window,
                segments,
                ..CASE
            },
        );
    }
});

/// Checks cases on Hopper, where there is one.
fn check_on_hopper(device: &DeviceUnderTest, cases: impl IntoIterator<Item = Case>) {
    if device.has_warpgroup_products() {
        for case in cases {
            let (on_hopper, head_dim) = (true, 128);
            check(
                device,
                &Case {
                    on_hopper,
                    head_dim,
                    ..case
                },
            );
        }
    }
}

kernel_test!(warpgroups_take_several_tiles, |device| {
    let segments = &[(130, 130)];
    check_on_hopper(device, [Case { segments, ..CASE }]);
});

kernel_test!(warpgroups_take_packed_sequences, |device| {
    let lists = [&[(42, 42)][..], &[(1, 1), (130, 130), (64, 64)]];
    check_on_hopper(device, lists.map(|segments| Case { segments, ..CASE }));
});

kernel_test!(warpgroups_see_within_a_window, |device| {
    let (num_heads, num_kv_heads) = (6, 2);
    let cases = [(0, &[(200, 200)]), (95, &[(300, 300)]), (2, &[(42, 42)])];
    let cases = cases.map(|(window, segments)| Case {
        num_heads,
        num_kv_heads,
        window,
        segments,
        ..CASE
    });
    check_on_hopper(device, cases);
});

kernel_test!(warpgroups_take_queries_on_a_cache, |device| {
    let segments = &[(3, 30), (1, 200), (130, 192), (66, 192)];
    let cases = [0, 100].map(|window| Case {
        window,
        segments,
        ..CASE
    });
    check_on_hopper(device, cases);
});
